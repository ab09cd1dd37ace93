//! What servers of a cell say to each other about the log.

use bytes::Bytes;

use crate::entry::Entry;
use crate::time::Instant;
use crate::types::{
    Admitted, Ballot, ChunkIndex, EntryId, Incarnation, ServerId, Slot, Standing, VolumeId,
};
use crate::wire::survey::{MendAnswer, MendRequest, PointAnswer, PointRequest};

/// A message between two servers. The network may lose, double, delay and reorder messages.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub enum Message {
    /// "Could I win?": asked before a ballot is used, so that a server that cannot win does not
    /// unseat a leader that works.
    PreCheck {
        /// The ballot that the candidate would use.
        ballot: Ballot,
        /// Last entry of the candidate's log.
        last: EntryId,
    },
    /// Answer to `PreCheck`.
    PreCheckAnswer {
        /// The ballot asked about.
        ballot: Ballot,
        /// Whether a `Prepare` would be promised now.
        granted: bool,
        /// Highest ballot that the answering server has promised.
        promised: Ballot,
        /// Last entry of the answering server's log.
        last: EntryId,
    },
    /// Phase 1a, over the whole log.
    Prepare {
        /// New ballot.
        ballot: Ballot,
        /// A ballot whose leader has given up its leadership and lease for good: leases granted to it
        /// do not stand in the way.
        released: Option<Ballot>,
    },
    /// Phase 1b: no ballot below will be accepted. Sent after log and promise are durable.
    Promise {
        /// The promised ballot.
        ballot: Ballot,
        /// The last entry that this server may have acknowledged and not replaced.
        last: EntryId,
        /// The last one that it is certain to have held; less than `last` if the end of its log was torn
        /// or is damaged, it cannot tell which.
        certain: EntryId,
        /// The last entry that it can still read; less than `last` if its log is damaged.
        have: EntryId,
        /// Slot up to which it knows its log to be chosen.
        chosen: Slot,
        /// Which lives of servers count, as its log says.
        admitted: Admitted,
    },
    /// Answer to `Prepare` of a server that rejoins: it promises nothing, and what its earlier life held is gone.
    Absent {
        /// Of the question.
        ballot: Ballot,
    },
    /// Refusal of a `Prepare`, `Accept` or `Heartbeat` because of a higher promise.
    Nack {
        /// Ballot of the refused message.
        ballot: Ballot,
        /// Promised instead.
        promised: Ballot,
    },
    /// Phase 2a for the slots after `prev`.
    Accept {
        /// The leader's ballot.
        ballot: Ballot,
        /// The entry before the first of `entries` in the leader's log.
        prev: EntryId,
        /// Consecutive entries.
        entries: Vec<Entry>,
        /// The leader's chosen slot.
        chosen: Slot,
    },
    /// Phase 2b, cumulative: this server's log is equal to the leader's up to `durable` and synced.
    Accepted {
        /// The leader's ballot.
        ballot: Ballot,
        /// See above.
        durable: Slot,
    },
    /// The log does not hold the `prev` of an `Accept`.
    AcceptRejected {
        /// The leader's ballot.
        ballot: Ballot,
        /// The leader may send from the slot after this one, up to which the logs are surely equal.
        resume_after: Slot,
    },
    /// The leader lives: renews the lease, carries the chosen slot.
    Heartbeat {
        /// The leader's ballot.
        ballot: Ballot,
        /// The leader's clock when it sent this.
        sent: Instant,
        /// The leader's chosen slot.
        chosen: Slot,
        /// Last slot of the leader's log.
        last: Slot,
    },
    /// Answer to `Heartbeat`; grants the lease.
    HeartbeatAck {
        /// The leader's ballot.
        ballot: Ballot,
        /// `sent` of the heartbeat.
        sent: Instant,
        /// As in `Accepted`.
        durable: Slot,
        /// Like `durable`, but maybe not synced yet: tells the leader what got lost on the way.
        received: Slot,
        /// Where this server stands.
        progress: Progress,
    },
    /// The leader gives its leadership to the receiver, which should prepare at once.
    HandOver {
        /// The ballot that is given up for good.
        ballot: Ballot,
    },
    /// A candidate with a quorum of promises fetches the tail of the best log.
    FetchTail {
        /// The candidate's ballot.
        ballot: Ballot,
        /// Send what follows this slot (up to which the asked server knows its log to be chosen, or
        /// that the candidate has fetched already).
        after: Slot,
    },
    /// Answer to `FetchTail`.
    Tail {
        /// The candidate's ballot.
        ballot: Ballot,
        /// The entry before the first of `entries`.
        prev: EntryId,
        /// Consecutive entries, chosen or not.
        entries: Vec<Entry>,
        /// Last entry of the sender's log.
        last: EntryId,
    },
    /// A server that lags, or a learner, asks for chosen entries.
    CatchUp {
        /// Its own log is chosen up to here.
        after: Slot,
    },
    /// Answer to `CatchUp`: entries that are chosen.
    Chosen {
        /// The entry before the first of `entries`.
        prev: EntryId,
        /// Consecutive entries, all chosen. May be empty.
        entries: Vec<Entry>,
        /// The sender's chosen slot.
        chosen: Slot,
    },
    /// Answer to `CatchUp`: the log does not reach back so far; copy chunks instead.
    LogGone {
        /// First slot that the sender still has.
        first: Slot,
        /// The sender's chosen slot.
        chosen: Slot,
    },
    /// Where a server that is no leader stands, to everyone, now and then (for feeders and `status`).
    Progress(Progress),
    /// A server whose disk is new asks the leader to let it in: its life, the sender's incarnation, shall count.
    Rejoin,
    /// Where the sender stands, to everyone, now and then.
    Standing {
        /// Nothing that it has promised or acknowledged is beyond it.
        standing: Standing,
        /// It has started, and asks for the receiver's mark of it, which `standing` shall not raise.
        asks: bool,
        /// How often a majority was given up, as its log says.
        epoch: u64,
    },
    /// Answer to `Standing`: the sender's mark of the receiver.
    Seen {
        /// The greatest standing that was seen.
        mark: Standing,
        /// Whether a later life than that of the question was heard lately.
        alive: bool,
        /// As in `Standing`.
        epoch: u64,
    },
    /// Copying of chunks.
    Sync(SyncMessage),
}

/// How far a server is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Hash)]
pub struct Progress {
    /// Known chosen.
    pub chosen: Slot,
    /// Applied to the chunk store.
    pub applied: Slot,
    /// First slot that its log still holds.
    pub log_first: Slot,
    /// Bytes free for chunks, after the reserve.
    pub free_bytes: u64,
    /// Whether chunks are being copied to it: its data are not complete yet.
    pub installing: bool,
}

/// Copying of chunks to a server that is too far behind for the log.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub enum SyncMessage {
    /// Asks for the state to start from.
    RequestBase,
    /// The replicated state at one slot.
    Base {
        /// Last entry that the state holds.
        base: EntryId,
        /// [`crate::state::State::encode`].
        state: Bytes,
    },
    /// Asks which chunks exist.
    RequestList {
        /// The receiver's applied slot: the answer must be at least as new.
        at_least: Slot,
        /// Which volume.
        volume: VolumeId,
        /// Chunks from this one on.
        from: ChunkIndex,
    },
    /// Which chunks exist in `from..until`, as of one applied slot.
    List {
        /// Applied slot.
        as_of: Slot,
        /// Which volume.
        volume: VolumeId,
        /// Asked for.
        from: ChunkIndex,
        /// The list is complete below this; `None`: to the end of the volume.
        until: Option<ChunkIndex>,
        /// How many chunks all volumes have; 0: not said.
        total: u64,
        /// (chunk, last slot applied to it, digest of its table).
        chunks: Vec<ChunkSummary>,
    },
    /// Asks for one chunk.
    RequestChunk {
        /// The receiver's applied slot: the answer must be at least as new.
        at_least: Slot,
        /// Which volume.
        volume: VolumeId,
        /// Which chunk.
        chunk: ChunkIndex,
    },
    /// One chunk, as of one applied slot.
    Chunk {
        /// Applied slot.
        as_of: Slot,
        /// Which volume.
        volume: VolumeId,
        /// Which chunk.
        chunk: ChunkIndex,
        /// Encoded by [`crate::chunk`]; empty: the chunk does not exist.
        image: Bytes,
    },
    /// The sender cannot serve the request (too old, installing itself, a bad block).
    Refused,
    /// Asks for blocks that are damaged at the sender.
    RequestBlocks {
        /// The receiver must have applied as much.
        at_least: Slot,
        /// Which volume.
        volume: VolumeId,
        /// Which blocks, at most [`BLOCKS_ASKED_MAX`].
        blocks: Vec<u64>,
    },
    /// Blocks that are good at the sender. Those that were asked for and are in neither list take no space there.
    Blocks {
        /// Its applied slot; the blocks are at least as new.
        as_of: Slot,
        /// Which volume.
        volume: VolumeId,
        /// These are damaged here, too.
        damaged: Vec<u64>,
        /// Which blocks the data are.
        blocks: Vec<u64>,
        /// [`crate::types::BLOCK_BYTES`] for each.
        data: Bytes,
    },
    /// The sender cannot give blocks of the volume now (too old, incomplete, too much to do).
    BlocksRefused {
        /// Which volume.
        volume: VolumeId,
    },
    /// Asks for what chunks hold at one slot.
    TakePoint(PointRequest),
    /// What they hold, or how far the sender is.
    Point(PointAnswer),
    /// A chunk of the receiver shall be replaced.
    Mend(MendRequest),
    /// Whether it is.
    Mended(MendAnswer),
}

/// Blocks in one [`SyncMessage::RequestBlocks`]: it fits a datagram, and the answer is no more than a few requests of clients.
pub const BLOCKS_ASKED_MAX: usize = 128;

/// What a list says of one chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub struct ChunkSummary {
    /// Which.
    pub chunk: ChunkIndex,
    /// Slot of the last entry applied to it.
    pub last_slot: Slot,
    /// CRC32C of its block checksums.
    pub digest: u32,
}

/// A message with its way.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub struct Envelope {
    /// Sender.
    pub from: ServerId,
    /// Life of the sender's data directory.
    pub incarnation: Incarnation,
    /// Receiver.
    pub to: ServerId,
    /// What.
    pub message: Message,
}

impl Message {
    /// Whether it goes by UDP; the others carry payload and go by TCP. A server that does not know a message drops a datagram,
    /// and closes a connection: what may be asked of an older server is a datagram.
    pub fn is_datagram(&self) -> bool {
        match self {
            Message::Sync(sync) => matches!(
                sync,
                SyncMessage::RequestBlocks { .. }
                    | SyncMessage::BlocksRefused { .. }
                    | SyncMessage::TakePoint(_)
                    | SyncMessage::Point(_)
                    | SyncMessage::Mend(_)
                    | SyncMessage::Mended(_)
            ),
            Message::Accept { .. } | Message::Tail { .. } | Message::Chosen { .. } => false,
            _ => true,
        }
    }
}
