//! What clients (gateways, `pss`, tests) and servers say to each other over TCP 4010+id.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::engine::ScrubStatus;
use crate::entry::{NOTE_BYTES_MAX, USER_NAME_MAX};
use crate::members::Members;
use crate::state::{Refusal, Volume, VolumeTimes};
use crate::types::{
    BLOCK_BYTES, Ballot, ChunkIndex, GroupId, RequestNumber, SERVERS_MAX, ServerId, SessionId,
    Slot, VolumeId,
};
use crate::volume::device::{Extent, ReadPart};
use crate::volume::reservation::{ReservationRequest, Reservations};
use crate::wire::DecodeError;
use crate::wire::codec::{Input, Output, shortened};
use crate::wire::events::ListedEvent;
use crate::wire::frame::{Frame, FrameKind, SendQueue};
use crate::wire::inspect::{INSPECT_ENTRIES_MAX, Inspect, Inspection, SurveyQuestion, SurveyScope};

/// Most bytes that one request may read or write. Clients split longer ones.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Most chunks in one answer.
pub const CHUNKS_MAX: usize = 4096;
/// Most administrative actions in one answer.
pub const EVENTS_ANSWERED_MAX: usize = 1000;
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
        /// The client's user, for people; may be empty.
        user: String,
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
        /// Whether it may become smaller, whoever has it attached.
        allow_shrink: bool,
    },
    /// Deletes a volume that no session has attached. Numbered.
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
    /// Changes a volume's reservations. Numbered.
    Reserve {
        /// Of which volume.
        volume: VolumeId,
        /// How.
        request: Box<ReservationRequest>,
    },
    /// A volume's reservations.
    Reservations {
        /// Which.
        volume: VolumeId,
    },
    /// How a volume is now.
    Look {
        /// Which.
        volume: VolumeId,
    },
    /// Changes a volume's size; smaller only if no session has it attached. Numbered.
    ShrinkVolume {
        /// Which.
        volume: VolumeId,
        /// New size, bytes.
        size_bytes: u64,
    },
    /// Deletes a volume whoever has it attached. Numbered.
    DeleteAttachedVolume {
        /// Which.
        volume: VolumeId,
    },
    /// A request to blocks that was found to be allowed under a volume's reservations. Without it, a
    /// request is allowed what someone is allowed who cannot be registered.
    Checked {
        /// Version of the reservations; 0 if there never were any.
        reservations: u64,
        /// `Read`, `Write`, `Zero`, `CompareAndWrite` or `Extents`. Numbered if that is.
        body: Box<RequestBody>,
    },
    /// Looks at volumes as their keeper, to whom reservations do not apply. Changes nothing.
    Browse {
        /// Asks this server for what it has, whether it leads or not and whatever it has missed. Without it, the
        /// answer holds everything that was answered before.
        stale: bool,
        /// What to look at.
        what: Browse,
    },
    /// What this server tells of its inside; answered by every server.
    Inspect(Inspect),
    /// What was done to the cell, by whom and when.
    Events {
        /// Only what has a number above this one; the answer has at most [`EVENTS_ANSWERED_MAX`] of it, the oldest.
        after: u64,
    },
    /// Says what the client is about to do, or has done, that the replicated state would not know of otherwise. Numbered.
    Note {
        /// At most [`NOTE_BYTES_MAX`].
        text: String,
    },
    /// Proposes another list of servers, which follows the last one. `Done` says that it was proposed; that it holds is
    /// seen in [`ServerStatus::members`].
    SetServers {
        /// All of them.
        members: Box<Members>,
    },
    /// Has this server give up the majority and go on alone: see [`crate::paxos::recover`].
    Recover {
        /// The list that it goes on with.
        members: Box<Members>,
    },
}

/// What [`RequestBody::Browse`] looks at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Browse {
    /// All volumes.
    Volumes,
    /// Directories in which chunks exist; answered by [`ReplyBody::Directories`].
    Directories {
        /// Of which volume.
        volume: VolumeId,
    },
    /// Chunks that exist; answered by [`ReplyBody::Chunks`].
    Chunks {
        /// Of which volume.
        volume: VolumeId,
        /// From this one on ...
        from: ChunkIndex,
        /// ... up to before this one.
        until: ChunkIndex,
    },
    /// As [`RequestBody::Extents`].
    Extents {
        /// Where.
        volume: VolumeId,
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
    },
    /// As [`RequestBody::Read`].
    Read {
        /// Where.
        volume: VolumeId,
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
    },
}

/// A chunk that exists.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChunkStatus {
    /// Which.
    pub chunk: ChunkIndex,
    /// Last slot that changed it.
    pub changed: Slot,
    /// When that was, by the clock of whoever led: milliseconds since the beginning of 1970, UTC; 0: unknown.
    pub changed_ms: u64,
    /// How many of its blocks take space.
    pub allocated_blocks: u32,
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
    /// Directories of 256 chunks in which some exist: each is the number of its first chunk divided by 256.
    Directories(Vec<u32>),
    /// Chunks of the range that exist, in order; at most [`CHUNKS_MAX`].
    Chunks {
        /// They.
        chunks: Vec<ChunkStatus>,
        /// From where to ask for the rest, if this is not all.
        next: Option<ChunkIndex>,
    },
    /// Volumes.
    Volumes(Vec<VolumeStatus>),
    /// The volume was created.
    VolumeCreated(VolumeId),
    /// Where the server stands.
    Status(Box<ServerStatus>),
    /// A volume's reservations.
    Reservations(Box<Reservations>),
    /// How a volume is: everything that was answered before the question was asked is in it.
    Volume {
        /// Size, bytes.
        size_bytes: u64,
        /// Version of its reservations; 0 if there never were any.
        reservations: u64,
    },
    /// What a server tells of its inside.
    Inspection(Box<Inspection>),
    /// What was done to the cell.
    Events(Box<EventList>),
}

/// Some of what was done to the cell.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct EventList {
    /// Number of the oldest event that the cell still has, or of the next if it has none.
    pub first: u64,
    /// Number of the newest event; 0 if there never was one.
    pub last: u64,
    /// Those that were asked for, oldest first.
    pub events: Vec<ListedEvent>,
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
    /// The same, with a code that servers of a newer version have. It is an answer like any other: to ask again would bring
    /// the same.
    #[error("refused for a reason that this version does not know (code {0})")]
    UnknownRefusal(u8),
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
    /// Version of its reservations; 0 if there never were any.
    #[serde(default)]
    pub reservations: u64,
    /// How many of its chunks exist.
    #[serde(default)]
    pub chunks: u64,
    /// When it was made and changed.
    #[serde(default)]
    pub times: VolumeTimes,
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
    /// About how many seconds that takes still, if it can be told.
    #[serde(default)]
    pub copying_left_s: Option<u64>,
    /// Whether its disk is new, and it has not learned everything yet: until then it does not count.
    #[serde(default)]
    pub rejoining: bool,
    /// Life of its data directory; 0 if it does not say.
    #[serde(default)]
    pub incarnation: u64,
    /// By server: the life that counts, 0 if nobody has said it yet.
    #[serde(default)]
    pub lives: Vec<u64>,
    /// Bytes free beside what the log may grow to.
    pub free_bytes: u64,
    /// Of these, what is left for volumes; the rest is kept back. 0 if it does not say.
    #[serde(default)]
    pub space_left: u64,
    /// Whether nothing is left for volumes: writes are refused while that is so for a majority.
    #[serde(default)]
    pub full: bool,
    /// Whether it is too full to apply what is chosen, and falls behind.
    #[serde(default)]
    pub stalled: bool,
    /// Size of its file system.
    pub total_bytes: u64,
    /// Damaged blocks that were found since the start, each once until it is repaired.
    pub bad_blocks: u64,
    /// Of these, those that were repaired with another server's copy.
    #[serde(default)]
    pub repaired_blocks: u64,
    /// How often no server had a good copy of one.
    #[serde(default)]
    pub lost_blocks: u64,
    /// The scrub in the background.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// Open client connections.
    pub clients: u32,
    /// The other servers as it sees them.
    pub peers: Vec<PeerStatus>,
    /// The servers as its log lists them; none: as server.conf does.
    #[serde(default)]
    pub members: Option<Members>,
    /// Ballot of the last entry of its log.
    #[serde(default)]
    pub last_ballot: Ballot,
    /// The loss epoch of the cell that has given this server up.
    #[serde(default)]
    pub given_up_by: Option<u64>,
    /// Others for which two processes speak: neither counts for this server.
    #[serde(default)]
    pub claimed_twice: Vec<ServerId>,
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
    /// How long ago the oldest entry was proposed that it has not applied, milliseconds; 0: there is none. None if
    /// that is not known.
    #[serde(default)]
    pub behind_ms: Option<u64>,
    /// About how many bytes of the log it has not applied; none if that is not known.
    #[serde(default)]
    pub behind_bytes: Option<u64>,
    /// About how many seconds it takes until it lacks nothing; none if that is not known, or it comes no nearer.
    #[serde(default)]
    pub left_s: Option<u64>,
    /// Last slot that it is known to have acknowledged, over restarts of the one that says so.
    #[serde(default)]
    pub acknowledged: u64,
}

/// A frame that is no request, or no reply. With a tag, the request may be answered with
/// [`ReplyError::Invalid`] and the connection goes on; without, it must be closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{error}")]
pub struct ClientDecodeError {
    /// Tag of the message, if that much could be read.
    pub tag: Option<u64>,
    /// What is wrong.
    #[source]
    pub error: DecodeError,
}

/// Most bytes of a client's or volume's name in a request.
const NAME_BYTES_MAX: usize = 256;
/// A volume has at most 2^24 chunks.
const DIRECTORIES_MAX: usize = 1 << 16;
const EXTENT_BYTES: usize = 9;
const CHUNK_BYTES: usize = 24;
const PART_BYTES: usize = 9;

/// Header, little-endian: code u8, tag u64, session u64, number u64, settled_below u64, then the
/// fields of the body in the order of their declaration. The data of a write or a compare-and-write
/// is the payload.
impl Request {
    /// Appends the request as a frame; its data is not copied.
    pub fn encode(&self, out: &mut SendQueue) {
        let envelope = RequestEnvelope {
            tag: self.tag,
            session: self.session,
            number: self.number,
            settled_below: self.settled_below,
        };
        envelope.encode(&self.body, out);
    }

    /// Reads a [`FrameKind::Request`] frame; data are a slice of its payload. Lengths are checked
    /// against each other and against the limits, checksums are not: see [`RequestBody::verify`].
    ///
    /// # Errors
    /// [`ClientDecodeError`].
    pub fn decode(frame: Frame) -> Result<Request, ClientDecodeError> {
        let input = &mut Input(&frame.header);
        let no_tag = |error| ClientDecodeError { tag: None, error };
        let code = input.u8().map_err(no_tag)?;
        let tag = input.u64().map_err(no_tag)?;
        let decode = || {
            Ok(Request {
                tag,
                session: SessionId(input.u64()?),
                number: RequestNumber(input.u64()?),
                settled_below: RequestNumber(input.u64()?),
                body: RequestBody::decode(code, input, frame.payload)?,
            })
        };
        decode().map_err(|error| ClientDecodeError {
            tag: Some(tag),
            error,
        })
    }
}

/// A request without its body, so that a body can be sent again under another tag.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestEnvelope {
    pub(crate) tag: u64,
    pub(crate) session: SessionId,
    pub(crate) number: RequestNumber,
    pub(crate) settled_below: RequestNumber,
}

impl RequestEnvelope {
    pub(crate) fn encode(&self, body: &RequestBody, out: &mut SendQueue) {
        let write = |header: &mut Vec<u8>| {
            let mut put = Output(header);
            put.u8(body.code());
            put.u64(self.tag);
            put.u64(self.session.0);
            put.u64(self.number.0);
            put.u64(self.settled_below.0);
            body.encode(&mut put);
        };
        let data = body.data().into_iter();
        out.frame(FrameKind::Request, GroupId(0), write, data);
    }
}

impl RequestBody {
    /// Whether the request changes something and so carries a number.
    pub fn is_numbered(&self) -> bool {
        matches!(
            self.unchecked(),
            RequestBody::Write { .. }
                | RequestBody::Zero { .. }
                | RequestBody::CompareAndWrite { .. }
                | RequestBody::CreateVolume { .. }
                | RequestBody::ResizeVolume { .. }
                | RequestBody::DeleteVolume { .. }
                | RequestBody::Attach { .. }
                | RequestBody::Detach { .. }
                | RequestBody::Reserve { .. }
                | RequestBody::ShrinkVolume { .. }
                | RequestBody::DeleteAttachedVolume { .. }
                | RequestBody::Note { .. }
        )
    }

    /// The request itself, if it is wrapped in `Checked`.
    pub fn unchecked(&self) -> &RequestBody {
        match self {
            RequestBody::Checked { body, .. } => body,
            body => body,
        }
    }

    /// Whether the data match their checksums. Of requests without data always.
    pub fn verify(&self) -> bool {
        match self.unchecked() {
            RequestBody::Write {
                volume,
                offset_bytes,
                checksums,
                data,
            } => match aligned_first_block(*offset_bytes, data.len()) {
                Some(first) => data
                    .chunks_exact(BLOCK_BYTES)
                    .zip(checksums)
                    .zip(first..)
                    .all(|((data, checksum), block)| {
                        crate::entry::block_checksum(*volume, block, data) == *checksum
                    }),
                None => checksums[..] == [crc32c::crc32c(data)],
            },
            RequestBody::CompareAndWrite { checksum, data, .. } => {
                crc32c::crc32c(data) == *checksum
            }
            _ => true,
        }
    }

    /// The checksums that a write of `data` carries.
    pub fn write_checksums(volume: VolumeId, offset_bytes: u64, data: &[u8]) -> Vec<u32> {
        match aligned_first_block(offset_bytes, data.len()) {
            Some(first) => crate::entry::block_checksums(volume, first, data),
            None => vec![crc32c::crc32c(data)],
        }
    }

    fn data(&self) -> Option<&Bytes> {
        match self.unchecked() {
            RequestBody::Write { data, .. } | RequestBody::CompareAndWrite { data, .. } => {
                Some(data)
            }
            _ => None,
        }
    }

    fn code(&self) -> u8 {
        match self {
            RequestBody::OpenSession { .. } => 1,
            RequestBody::EndSession => 2,
            RequestBody::KeepAlive => 3,
            RequestBody::Read { .. } => 4,
            RequestBody::Write { .. } => 5,
            RequestBody::Zero { .. } => 6,
            RequestBody::CompareAndWrite { .. } => 7,
            RequestBody::Extents { .. } => 8,
            RequestBody::ListVolumes => 9,
            RequestBody::CreateVolume { .. } => 10,
            RequestBody::ResizeVolume { .. } => 11,
            RequestBody::DeleteVolume { .. } => 12,
            RequestBody::Attach { .. } => 13,
            RequestBody::Detach { .. } => 14,
            RequestBody::Status => 15,
            RequestBody::Shutdown => 16,
            RequestBody::Reserve { .. } => 17,
            RequestBody::Reservations { .. } => 18,
            RequestBody::Checked { .. } => 19,
            RequestBody::Look { .. } => 20,
            RequestBody::ShrinkVolume { .. } => 21,
            RequestBody::DeleteAttachedVolume { .. } => 22,
            RequestBody::Browse { .. } => 23,
            RequestBody::Inspect(_) => 24,
            RequestBody::Events { .. } => 25,
            RequestBody::Note { .. } => 26,
            RequestBody::SetServers { .. } => 27,
            RequestBody::Recover { .. } => 28,
        }
    }

    fn encode(&self, put: &mut Output<'_>) {
        match self {
            RequestBody::OpenSession { nonce, name, user } => {
                put.u64(*nonce);
                put.string(shortened(name, NAME_BYTES_MAX));
                put.string(shortened(user, USER_NAME_MAX));
            }
            RequestBody::EndSession
            | RequestBody::KeepAlive
            | RequestBody::ListVolumes
            | RequestBody::Status
            | RequestBody::Shutdown => {}
            RequestBody::Read {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u32(*length_bytes);
            }
            RequestBody::Write {
                volume,
                offset_bytes,
                checksums,
                data,
            } => {
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u32(data.len() as u32);
                put.u32(checksums.len() as u32);
                for checksum in checksums {
                    put.u32(*checksum);
                }
            }
            RequestBody::Zero {
                volume,
                offset_bytes,
                length_bytes,
                allocate,
                whole_blocks_only,
            } => {
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u64(*length_bytes);
                put.flag(*allocate);
                put.flag(*whole_blocks_only);
            }
            RequestBody::CompareAndWrite {
                volume,
                offset_bytes,
                checksum,
                data,
            } => {
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u32(*checksum);
                put.u32(data.len() as u32);
            }
            RequestBody::Extents {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u64(*length_bytes);
            }
            RequestBody::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            } => {
                put.string(shortened(name, NAME_BYTES_MAX));
                put.u64(*size_bytes);
                put.u32(*chunk_bytes);
                put.bytes(uuid);
            }
            RequestBody::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => {
                put.u32(volume.0);
                put.u64(*size_bytes);
                put.flag(*allow_shrink);
            }
            RequestBody::DeleteVolume { volume }
            | RequestBody::Attach { volume }
            | RequestBody::Detach { volume }
            | RequestBody::Reservations { volume }
            | RequestBody::Look { volume }
            | RequestBody::DeleteAttachedVolume { volume } => put.u32(volume.0),
            RequestBody::ShrinkVolume { volume, size_bytes } => {
                put.u32(volume.0);
                put.u64(*size_bytes);
            }
            RequestBody::Reserve { volume, request } => {
                put.u32(volume.0);
                request.encode(put.0);
            }
            RequestBody::Checked { reservations, body } => {
                put.u64(*reservations);
                put.u8(body.code());
                body.encode(put);
            }
            RequestBody::Browse { stale, what } => {
                put.flag(*stale);
                what.encode(put);
            }
            RequestBody::Inspect(what) => what.encode(put),
            RequestBody::Events { after } => put.u64(*after),
            RequestBody::Note { text } => put.string(shortened(text, NOTE_BYTES_MAX)),
            RequestBody::SetServers { members } | RequestBody::Recover { members } => {
                let mut bytes = Vec::new();
                members.encode(&mut bytes);
                put.u32(bytes.len() as u32);
                put.bytes(&bytes);
            }
        }
    }

    fn decode(code: u8, input: &mut Input<'_>, data: Bytes) -> Result<RequestBody, DecodeError> {
        if code == 19 {
            let reservations = input.u64()?;
            let code = input.u8()?;
            if !matches!(code, 4..=8) {
                return Err(DecodeError::Meaningless("a checked request of this kind"));
            }
            let body = Box::new(RequestBody::decode(code, input, data)?);
            return Ok(RequestBody::Checked { reservations, body });
        }
        if !matches!(code, 5 | 7) {
            payload_length(&data, 0)?;
        }
        let body = match code {
            1 => RequestBody::OpenSession {
                nonce: input.u64()?,
                name: name(input)?,
                // Clients of before do not say.
                user: match input.0.is_empty() {
                    true => String::new(),
                    false => string("user", input, USER_NAME_MAX)?,
                },
            },
            2 => RequestBody::EndSession,
            3 => RequestBody::KeepAlive,
            4 => RequestBody::Read {
                volume: VolumeId(input.u32()?),
                offset_bytes: input.u64()?,
                length_bytes: at_most("read", input.u32()?, REQUEST_BYTES_MAX)?,
            },
            5 => return RequestBody::decode_write(input, data),
            6 => RequestBody::decode_zero(input)?,
            7 => RequestBody::decode_compare_and_write(input, data)?,
            8 => RequestBody::Extents {
                volume: VolumeId(input.u32()?),
                offset_bytes: input.u64()?,
                length_bytes: input.u64()?,
            },
            9 => RequestBody::ListVolumes,
            10 => RequestBody::CreateVolume {
                name: name(input)?,
                size_bytes: input.u64()?,
                chunk_bytes: input.u32()?,
                uuid: input.array()?,
            },
            11 => RequestBody::ResizeVolume {
                volume: VolumeId(input.u32()?),
                size_bytes: input.u64()?,
                allow_shrink: input.flag()?,
            },
            12 => RequestBody::DeleteVolume {
                volume: VolumeId(input.u32()?),
            },
            13 => RequestBody::Attach {
                volume: VolumeId(input.u32()?),
            },
            14 => RequestBody::Detach {
                volume: VolumeId(input.u32()?),
            },
            15 => RequestBody::Status,
            16 => RequestBody::Shutdown,
            17 => RequestBody::Reserve {
                volume: VolumeId(input.u32()?),
                request: Box::new(
                    ReservationRequest::decode(&mut input.0)
                        .map_err(|_| DecodeError::Meaningless("a request about reservations"))?,
                ),
            },
            18 => RequestBody::Reservations {
                volume: VolumeId(input.u32()?),
            },
            20 => RequestBody::Look {
                volume: VolumeId(input.u32()?),
            },
            21 => RequestBody::ShrinkVolume {
                volume: VolumeId(input.u32()?),
                size_bytes: input.u64()?,
            },
            22 => RequestBody::DeleteAttachedVolume {
                volume: VolumeId(input.u32()?),
            },
            23 => RequestBody::Browse {
                stale: input.flag()?,
                what: Browse::decode(input)?,
            },
            24 => RequestBody::Inspect(Inspect::decode(input)?),
            25 => RequestBody::Events {
                after: input.u64()?,
            },
            26 => RequestBody::Note {
                text: string("note", input, NOTE_BYTES_MAX)?,
            },
            27 | 28 => {
                let length = input.count(1)?;
                let mut bytes = input.bytes(length)?;
                let members = Members::decode(&mut bytes).map_err(|_| DecodeError::Truncated)?;
                if !bytes.is_empty() {
                    return Err(DecodeError::Trailing);
                }
                let members = Box::new(members);
                match code {
                    27 => RequestBody::SetServers { members },
                    _ => RequestBody::Recover { members },
                }
            }
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "request",
                    code,
                });
            }
        };
        input.end()?;
        Ok(body)
    }

    fn decode_write(input: &mut Input<'_>, data: Bytes) -> Result<RequestBody, DecodeError> {
        let volume = VolumeId(input.u32()?);
        let offset_bytes = input.u64()?;
        let length = at_most("write", input.u32()?, REQUEST_BYTES_MAX)?;
        payload_length(&data, length)?;
        let count = input.count(4)?;
        let wanted = match aligned_first_block(offset_bytes, data.len()) {
            Some(_) => data.len() / BLOCK_BYTES,
            None => 1,
        };
        if count != wanted {
            return Err(DecodeError::Meaningless("number of checksums"));
        }
        let mut checksums = Vec::with_capacity(count);
        for _ in 0..count {
            checksums.push(input.u32()?);
        }
        input.end()?;
        Ok(RequestBody::Write {
            volume,
            offset_bytes,
            checksums,
            data,
        })
    }

    fn decode_zero(input: &mut Input<'_>) -> Result<RequestBody, DecodeError> {
        let volume = VolumeId(input.u32()?);
        let offset_bytes = input.u64()?;
        let length_bytes = input.u64()?;
        let allocate = input.flag()?;
        if allocate && length_bytes > REQUEST_BYTES_MAX as u64 {
            return Err(DecodeError::TooLong {
                what: "allocating zero request",
                have: length_bytes,
                most: REQUEST_BYTES_MAX as u64,
            });
        }
        Ok(RequestBody::Zero {
            volume,
            offset_bytes,
            length_bytes,
            allocate,
            whole_blocks_only: input.flag()?,
        })
    }

    fn decode_compare_and_write(
        input: &mut Input<'_>,
        data: Bytes,
    ) -> Result<RequestBody, DecodeError> {
        let volume = VolumeId(input.u32()?);
        let offset_bytes = input.u64()?;
        let checksum = input.u32()?;
        let length = at_most("compare-and-write", input.u32()?, 2 * REQUEST_BYTES_MAX)?;
        payload_length(&data, length)?;
        if !data.len().is_multiple_of(2) {
            return Err(DecodeError::Meaningless("an odd compare-and-write"));
        }
        Ok(RequestBody::CompareAndWrite {
            volume,
            offset_bytes,
            checksum,
            data,
        })
    }
}

impl Browse {
    fn encode(&self, put: &mut Output<'_>) {
        match self {
            Browse::Volumes => put.u8(0),
            Browse::Directories { volume } => {
                put.u8(4);
                put.u32(volume.0);
            }
            Browse::Chunks {
                volume,
                from,
                until,
            } => {
                put.u8(1);
                put.u32(volume.0);
                put.u32(from.0);
                put.u32(until.0);
            }
            Browse::Extents {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                put.u8(2);
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u64(*length_bytes);
            }
            Browse::Read {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                put.u8(3);
                put.u32(volume.0);
                put.u64(*offset_bytes);
                put.u32(*length_bytes);
            }
        }
    }

    fn decode(input: &mut Input<'_>) -> Result<Browse, DecodeError> {
        Ok(match input.u8()? {
            0 => Browse::Volumes,
            1 => Browse::Chunks {
                volume: VolumeId(input.u32()?),
                from: ChunkIndex(input.u32()?),
                until: ChunkIndex(input.u32()?),
            },
            2 => Browse::Extents {
                volume: VolumeId(input.u32()?),
                offset_bytes: input.u64()?,
                length_bytes: input.u64()?,
            },
            3 => Browse::Read {
                volume: VolumeId(input.u32()?),
                offset_bytes: input.u64()?,
                length_bytes: at_most("read", input.u32()?, REQUEST_BYTES_MAX)?,
            },
            4 => Browse::Directories {
                volume: VolumeId(input.u32()?),
            },
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "way to browse",
                    code,
                });
            }
        })
    }
}

impl Inspect {
    fn encode(&self, put: &mut Output<'_>) {
        match self {
            Inspect::Process => put.u8(0),
            Inspect::Clients => put.u8(1),
            Inspect::Outbound => put.u8(2),
            Inspect::Files => put.u8(3),
            Inspect::Links => put.u8(4),
            Inspect::Log { before, count } => {
                put.u8(5);
                put.u64(before.0);
                put.u32(u32::from(*count));
            }
            Inspect::Sockets => put.u8(6),
            Inspect::Survey(question) => {
                put.u8(9);
                put.u64(question.id);
                put.u32(question.volume.0);
                put.u32(question.from.0);
                put.u8(match question.scope {
                    SurveyScope::Own => 0,
                    SurveyScope::All => 1,
                    SurveyScope::Verify => 2,
                });
            }
        }
    }

    fn decode(input: &mut Input<'_>) -> Result<Inspect, DecodeError> {
        Ok(match input.u8()? {
            0 => Inspect::Process,
            1 => Inspect::Clients,
            2 => Inspect::Outbound,
            3 => Inspect::Files,
            4 => Inspect::Links,
            5 => Inspect::Log {
                before: Slot(input.u64()?),
                count: at_most("page", input.u32()?, usize::from(INSPECT_ENTRIES_MAX))? as u16,
            },
            6 => Inspect::Sockets,
            9 => Inspect::Survey(SurveyQuestion {
                id: input.u64()?,
                volume: VolumeId(input.u32()?),
                from: ChunkIndex(input.u32()?),
                scope: match input.u8()? {
                    0 => SurveyScope::Own,
                    1 => SurveyScope::All,
                    2 => SurveyScope::Verify,
                    code => {
                        return Err(DecodeError::UnknownCode {
                            what: "scope of a survey",
                            code,
                        });
                    }
                },
            }),
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "way to inspect",
                    code,
                });
            }
        })
    }
}

/// The first block of a range of whole blocks.
fn aligned_first_block(offset_bytes: u64, length: usize) -> Option<u64> {
    let block = BLOCK_BYTES as u64;
    let is_whole = offset_bytes.is_multiple_of(block) && length.is_multiple_of(BLOCK_BYTES);
    is_whole.then_some(offset_bytes / block)
}

fn name(input: &mut Input<'_>) -> Result<String, DecodeError> {
    string("name", input, NAME_BYTES_MAX)
}

fn string(what: &'static str, input: &mut Input<'_>, most: usize) -> Result<String, DecodeError> {
    let text = input.string()?;
    at_most(what, text.len() as u32, most)?;
    Ok(text)
}

fn at_most(what: &'static str, have: u32, most: usize) -> Result<u32, DecodeError> {
    if have as usize <= most {
        return Ok(have);
    }
    Err(DecodeError::TooLong {
        what,
        have: u64::from(have),
        most: most as u64,
    })
}

fn payload_length(payload: &Bytes, want: u32) -> Result<(), DecodeError> {
    if payload.len() == want as usize {
        return Ok(());
    }
    Err(DecodeError::PayloadLength {
        have: payload.len() as u64,
        want: u64::from(want),
    })
}

/// Header, little-endian: code u8 (from 64 on an error), tag u64, then the fields. Data that were
/// read are the payload, with a CRC32C of each part in the header. Volumes, status, inspections and events are JSON.
impl Reply {
    /// Appends the reply as a frame; data that were read are not copied.
    pub fn encode(&self, out: &mut SendQueue) {
        let write = |header: &mut Vec<u8>| self.encode_header(&mut Output(header));
        let parts = match &self.body {
            Ok(ReplyBody::Data(parts)) => &parts[..],
            _ => &[],
        };
        let data = parts.iter().filter_map(|part| match part {
            ReadPart::Data(data) => Some(data),
            ReadPart::Hole(_) => None,
        });
        out.frame(FrameKind::Reply, GroupId(0), write, data);
    }

    fn encode_header(&self, put: &mut Output<'_>) {
        let (code, error) = match &self.body {
            Ok(body) => (body.code(), None),
            Err(error) => (error.code(), Some(error)),
        };
        put.u8(code);
        put.u64(self.tag);
        match (&self.body, error) {
            (Ok(body), _) => body.encode(put),
            (_, Some(ReplyError::NotLeader { leader })) => {
                put.u8(leader.map_or(NO_SERVER, |leader| leader.0));
            }
            (_, Some(ReplyError::Refused(refusal))) => put.u8(*refusal as u8),
            (_, Some(ReplyError::UnknownRefusal(code))) => put.u8(*code),
            (_, Some(ReplyError::Miscompare(at))) => put.u64(*at),
            (_, Some(ReplyError::NoSpace | ReplyError::Invalid | ReplyError::Io) | None) => {}
        }
    }

    /// Reads a [`FrameKind::Reply`] frame and checks the data in it; they are slices of its payload.
    ///
    /// # Errors
    /// [`ClientDecodeError`]; the connection must be closed, whether there is a tag or not.
    pub fn decode(frame: Frame) -> Result<Reply, ClientDecodeError> {
        let input = &mut Input(&frame.header);
        let no_tag = |error| ClientDecodeError { tag: None, error };
        let code = input.u8().map_err(no_tag)?;
        let tag = input.u64().map_err(no_tag)?;
        let with_tag = |error| ClientDecodeError {
            tag: Some(tag),
            error,
        };
        let body = match code {
            64.. => Err(ReplyError::decode(code, input).map_err(with_tag)?),
            _ => Ok(ReplyBody::decode(code, input, frame.payload).map_err(with_tag)?),
        };
        input.end().map_err(with_tag)?;
        Ok(Reply { tag, body })
    }
}

const NO_SERVER: u8 = 255;

impl ReplyBody {
    fn code(&self) -> u8 {
        match self {
            ReplyBody::Done => 1,
            ReplyBody::Session(_) => 2,
            ReplyBody::Data(_) => 3,
            ReplyBody::Extents(_) => 4,
            ReplyBody::Volumes(_) => 5,
            ReplyBody::VolumeCreated(_) => 6,
            ReplyBody::Status(_) => 7,
            ReplyBody::Reservations(_) => 8,
            ReplyBody::Volume { .. } => 9,
            ReplyBody::Chunks { .. } => 10,
            ReplyBody::Directories(_) => 11,
            ReplyBody::Inspection(_) => 12,
            ReplyBody::Events(_) => 13,
        }
    }

    fn encode(&self, put: &mut Output<'_>) {
        match self {
            ReplyBody::Done => {}
            ReplyBody::Session(session) => put.u64(session.0),
            ReplyBody::Data(parts) => {
                put.u32(parts.len() as u32);
                for part in parts {
                    let (kind, length, checksum) = match part {
                        ReadPart::Data(data) => (0, data.len() as u32, crc32c::crc32c(data)),
                        ReadPart::Hole(length) => (1, *length, 0),
                    };
                    put.u8(kind);
                    put.u32(length);
                    put.u32(checksum);
                }
            }
            ReplyBody::Extents(extents) => {
                put.u32(extents.len() as u32);
                for extent in extents {
                    put.u64(extent.length_bytes);
                    put.flag(extent.allocated);
                }
            }
            ReplyBody::Volumes(volumes) => put_json(put, volumes),
            ReplyBody::VolumeCreated(volume) => put.u32(volume.0),
            ReplyBody::Status(status) => put_json(put, status),
            ReplyBody::Inspection(inspection) => put_json(put, inspection),
            ReplyBody::Events(events) => put_json(put, events),
            ReplyBody::Reservations(reservations) => reservations.encode(put.0),
            ReplyBody::Volume {
                size_bytes,
                reservations,
            } => {
                put.u64(*size_bytes);
                put.u64(*reservations);
            }
            ReplyBody::Directories(directories) => {
                put.u32(directories.len() as u32);
                for directory in directories {
                    put.u32(*directory);
                }
            }
            ReplyBody::Chunks { chunks, next } => {
                put.u32(next.map_or(u32::MAX, |next| next.0));
                put.u32(chunks.len() as u32);
                for chunk in chunks {
                    put.u32(chunk.chunk.0);
                    put.u64(chunk.changed.0);
                    put.u64(chunk.changed_ms);
                    put.u32(chunk.allocated_blocks);
                }
            }
        }
    }

    fn decode(code: u8, input: &mut Input<'_>, payload: Bytes) -> Result<ReplyBody, DecodeError> {
        if code == 3 {
            return Ok(ReplyBody::Data(decode_parts(input, payload)?));
        }
        payload_length(&payload, 0)?;
        Ok(match code {
            1 => ReplyBody::Done,
            2 => ReplyBody::Session(SessionId(input.u64()?)),
            4 => {
                let count = input.count(EXTENT_BYTES)?;
                at_most("list of extents", count as u32, EXTENTS_MAX)?;
                let mut extents = Vec::with_capacity(count);
                for _ in 0..count {
                    extents.push(Extent {
                        length_bytes: input.u64()?,
                        allocated: input.flag()?,
                    });
                }
                ReplyBody::Extents(extents)
            }
            5 => ReplyBody::Volumes(get_json(input)?),
            6 => ReplyBody::VolumeCreated(VolumeId(input.u32()?)),
            7 => ReplyBody::Status(get_json(input)?),
            8 => ReplyBody::Reservations(Box::new(
                Reservations::decode(&mut input.0)
                    .map_err(|_| DecodeError::Meaningless("reservations"))?,
            )),
            9 => ReplyBody::Volume {
                size_bytes: input.u64()?,
                reservations: input.u64()?,
            },
            10 => {
                let next = Some(input.u32()?).filter(|next| *next != u32::MAX);
                let count = input.count(CHUNK_BYTES)?;
                at_most("list of chunks", count as u32, CHUNKS_MAX)?;
                let mut chunks = Vec::with_capacity(count);
                for _ in 0..count {
                    chunks.push(ChunkStatus {
                        chunk: ChunkIndex(input.u32()?),
                        changed: Slot(input.u64()?),
                        changed_ms: input.u64()?,
                        allocated_blocks: input.u32()?,
                    });
                }
                ReplyBody::Chunks {
                    chunks,
                    next: next.map(ChunkIndex),
                }
            }
            11 => {
                let count = input.count(4)?;
                at_most("list of directories", count as u32, DIRECTORIES_MAX)?;
                let mut directories = Vec::with_capacity(count);
                for _ in 0..count {
                    directories.push(input.u32()?);
                }
                ReplyBody::Directories(directories)
            }
            12 => ReplyBody::Inspection(get_json(input)?),
            13 => ReplyBody::Events(get_json(input)?),
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "reply",
                    code,
                });
            }
        })
    }
}

fn decode_parts(input: &mut Input<'_>, mut payload: Bytes) -> Result<Vec<ReadPart>, DecodeError> {
    let count = input.count(PART_BYTES)?;
    let mut parts = Vec::with_capacity(count);
    let mut total = 0_u64;
    for _ in 0..count {
        let kind = input.u8()?;
        let length = input.u32()?;
        let checksum = input.u32()?;
        total += u64::from(length);
        parts.push(match kind {
            0 if length as usize <= payload.len() => {
                let data = payload.split_to(length as usize);
                if crc32c::crc32c(&data) != checksum {
                    return Err(DecodeError::Checksum);
                }
                ReadPart::Data(data)
            }
            0 => {
                return Err(DecodeError::PayloadLength {
                    have: payload.len() as u64,
                    want: u64::from(length),
                });
            }
            1 => ReadPart::Hole(length),
            code => return Err(DecodeError::UnknownCode { what: "part", code }),
        });
    }
    payload_length(&payload, 0)?;
    if total > REQUEST_BYTES_MAX as u64 {
        return Err(DecodeError::TooLong {
            what: "read",
            have: total,
            most: REQUEST_BYTES_MAX as u64,
        });
    }
    Ok(parts)
}

impl ReplyError {
    fn code(&self) -> u8 {
        match self {
            ReplyError::NotLeader { .. } => 64,
            ReplyError::Refused(_) | ReplyError::UnknownRefusal(_) => 65,
            ReplyError::NoSpace => 66,
            ReplyError::Miscompare(_) => 67,
            ReplyError::Invalid => 68,
            ReplyError::Io => 69,
        }
    }

    fn decode(code: u8, input: &mut Input<'_>) -> Result<ReplyError, DecodeError> {
        Ok(match code {
            64 => ReplyError::NotLeader {
                leader: match input.u8()? {
                    NO_SERVER => None,
                    id if usize::from(id) < SERVERS_MAX => Some(ServerId(id)),
                    _ => return Err(DecodeError::Meaningless("leader")),
                },
            },
            65 => {
                let code = input.u8()?;
                Refusal::from_code(code)
                    .map_or(ReplyError::UnknownRefusal(code), ReplyError::Refused)
            }
            66 => ReplyError::NoSpace,
            67 => ReplyError::Miscompare(input.u64()?),
            68 => ReplyError::Invalid,
            69 => ReplyError::Io,
            code => {
                return Err(DecodeError::UnknownCode {
                    what: "reply",
                    code,
                });
            }
        })
    }
}

fn put_json(put: &mut Output<'_>, value: &impl Serialize) {
    serde_json::to_writer(&mut *put.0, value).expect("plain structures into memory");
}

fn get_json<T: for<'a> Deserialize<'a>>(input: &mut Input<'_>) -> Result<T, DecodeError> {
    let rest = std::mem::take(&mut input.0);
    serde_json::from_slice(rest).map_err(|_| DecodeError::Json)
}

#[cfg(test)]
mod tests;
