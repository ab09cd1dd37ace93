//! What clients (gateways, `pss`, tests) and servers say to each other over TCP 4010+id.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::state::{Refusal, Volume};
use crate::types::{Ballot, RequestNumber, ServerId, SessionId, VolumeId};
use crate::volume::device::{Extent, ReadPart};

/// Most bytes that one request may read or write. Clients split longer ones.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Most extents in one answer.
pub const EXTENTS_MAX: usize = 4096;

/// A request of a client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// Chosen by the client; the reply carries it. Unique among the requests in flight of a connection.
    pub tag: u64,
    /// The client's session; `SessionId(0)` before one is open and for requests that need none.
    pub session: SessionId,
    /// For requests that change something: which of the session. A repetition after a broken
    /// connection or a change of leader carries the same number. 0 for the others.
    pub number: RequestNumber,
    /// The client has the answers of all numbered requests below.
    pub settled_below: RequestNumber,
    /// What.
    pub body: RequestBody,
}

/// What a client wants.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RequestBody {
    /// Opens a session. Not numbered: repetitions are recognised by the nonce.
    OpenSession {
        /// Random.
        nonce: u64,
        /// For people, such as `pss-nbd@host`.
        name: String,
    },
    /// Ends the session.
    EndSession,
    /// The client lives; sent when it has sent nothing else for a while.
    KeepAlive,
    /// Reads; `length_bytes` at most [`REQUEST_BYTES_MAX`]. Any alignment.
    Read {
        /// Where.
        volume: VolumeId,
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
    },
    /// Writes. Numbered.
    Write {
        /// Where.
        volume: VolumeId,
        /// To. Any alignment.
        offset_bytes: u64,
        /// [`crate::entry::block_checksums`] if offset and length are multiples of 4096; else one
        /// CRC32C over the data.
        checksums: Vec<u32>,
        /// At most [`REQUEST_BYTES_MAX`].
        data: Bytes,
    },
    /// Zeroes a range of any alignment and length. Numbered.
    Zero {
        /// Where.
        volume: VolumeId,
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
        /// Keep space allocated (at most [`REQUEST_BYTES_MAX`] then).
        allocate: bool,
        /// Leave the parts of blocks at both ends alone (trim).
        whole_blocks_only: bool,
    },
    /// Writes the second half of `data` if the range holds the first. Numbered.
    CompareAndWrite {
        /// Where.
        volume: VolumeId,
        /// Of the range.
        offset_bytes: u64,
        /// CRC32C of `data`.
        checksum: u32,
        /// Expected content, then new content, of equal length.
        data: Bytes,
    },
    /// Which parts of a range are allocated.
    Extents {
        /// Where.
        volume: VolumeId,
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
    },
    /// All volumes.
    ListVolumes,
    /// Creates a volume. Numbered.
    CreateVolume {
        /// Name.
        name: String,
        /// Size, bytes.
        size_bytes: u64,
        /// Chunk size, bytes.
        chunk_bytes: u32,
        /// Random identity.
        uuid: [u8; 16],
    },
    /// Changes a volume's size. Numbered.
    ResizeVolume {
        /// Which.
        volume: VolumeId,
        /// New size, bytes.
        size_bytes: u64,
        /// Whether it may become smaller.
        allow_shrink: bool,
    },
    /// Deletes a volume. Numbered.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Notes that the session uses the volume. Numbered.
    Attach {
        /// Which.
        volume: VolumeId,
    },
    /// Takes `Attach` back. Numbered.
    Detach {
        /// Which.
        volume: VolumeId,
    },
    /// Where this server stands; answered by every server.
    Status,
    /// Stops this server cleanly.
    Shutdown,
}

/// A server's answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reply {
    /// Of the request.
    pub tag: u64,
    /// What came of it.
    pub body: Result<ReplyBody, ReplyError>,
}

/// Result of a request that went well.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ReplyBody {
    /// Done.
    Done,
    /// The session is open.
    Session(SessionId),
    /// Data that was read.
    Data(Vec<ReadPart>),
    /// Extents from the start of the range; at most [`EXTENTS_MAX`], so maybe not to its end.
    Extents(Vec<Extent>),
    /// Volumes.
    Volumes(Vec<VolumeStatus>),
    /// The volume was created.
    VolumeCreated(VolumeId),
    /// Where the server stands.
    Status(Box<ServerStatus>),
}

/// Why a request failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReplyError {
    /// Another server leads, or none. Nothing was begun, or whether it will be done is open: repeat it
    /// at the leader with the same number.
    #[error("this server does not lead")]
    NotLeader {
        /// Who may.
        leader: Option<ServerId>,
    },
    /// Refused by the replicated state.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The disks are full.
    #[error("no space left")]
    NoSpace,
    /// Compare-and-write found something else at this byte of the range.
    #[error("content differs at byte {0}")]
    Miscompare(u64),
    /// The request is malformed, or its data do not match their checksums.
    #[error("the request is not valid")]
    Invalid,
    /// A block is bad.
    #[error("a block could not be read")]
    Io,
}

/// A volume with what is known of its use.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: Volume,
    /// Bytes that its chunks take on the answering server.
    pub allocated_bytes: u64,
    /// Names of the sessions that have it attached.
    pub attached_by: Vec<String>,
}

/// Where one server stands.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Identity of the cell.
    pub cell: String,
    /// The server.
    pub server: ServerId,
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_s: u64,
    /// `leader`, `follower`, `candidate`, `learner`.
    pub role: String,
    /// Who leads, as far as it knows.
    pub leader: Option<ServerId>,
    /// Highest promised ballot.
    pub ballot: Ballot,
    /// Slot up to which it knows the log to be chosen.
    pub chosen: u64,
    /// Slot up to which its chunks are current.
    pub applied: u64,
    /// Last slot of its log.
    pub last: u64,
    /// First slot of its log.
    pub log_first: u64,
    /// Whether chunks are being copied to it, and how far that is (done, total).
    pub copying: Option<(u64, u64)>,
    /// Bytes free for chunks.
    pub free_bytes: u64,
    /// Size of its file system.
    pub total_bytes: u64,
    /// Blocks that failed their checksum since the start.
    pub bad_blocks: u64,
    /// Open client connections.
    pub clients: u32,
    /// The other servers as it sees them.
    pub peers: Vec<PeerStatus>,
}

/// One server as seen by another.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Which.
    pub server: ServerId,
    /// Whether it was heard of lately.
    pub alive: bool,
    /// Its applied slot when last heard of.
    pub applied: u64,
    /// Its durable slot when last heard of (for the leader).
    pub durable: u64,
    /// Whether chunks are being copied to it.
    pub copying: bool,
    /// Milliseconds since it was last heard of; none if never.
    pub silent_ms: Option<u64>,
}
