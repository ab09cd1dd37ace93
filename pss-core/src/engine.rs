//! One server without its sockets, threads and clock: the agreement, the replicated state, the chunks
//! and the requests of clients, tied together.
//!
//! Like the [`Replica`] in it, an [`Engine`] takes inputs with a time and gives [`Action`]s. It applies
//! chosen entries to the [`ChunkStore`] itself, and reads from it as long as that needs no wait for the
//! device; everything else that takes time is an action for another thread. `pssd` and the simulator run
//! the same engine.

mod browse;
mod conflicts;
mod copy;
mod inspect;
mod lag;
mod repair;
mod requests;
mod reservations;
mod scrub;
mod slow_disk;
mod space;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::chunk::{self, BadBlock, ChunkStore, ReadError};
use crate::engine::conflicts::{BlockRange, Counts};
use crate::engine::copy::Copying;
pub use crate::engine::inspect::LogPage;
use crate::engine::lag::Pace;
use crate::engine::repair::Repairs;
pub use crate::engine::repair::{BAD_BLOCKS_MAX, Export, Exported, RepairBug, RepairCounts};
use crate::engine::scrub::Scrub;
pub use crate::engine::scrub::{
    DigestJob, DigestPart, ScrubBug, ScrubCounts, ScrubPosition, ScrubStatus,
};
use crate::engine::slow_disk::DiskWatch;
use crate::entry::{Command, Entry, Op};
use crate::members::Members;
use crate::paxos::members::ChangeRefused;
use crate::paxos::message::{Message, SyncMessage};
use crate::paxos::output::{Output, Persist, RoleChange, WriteId};
use crate::paxos::recover::RecoverRefused;
use crate::paxos::{Config, LogRead, Recovered, Replica, RoleKind};
use crate::state::{AdminAction, Answer, State};
use crate::storage::{self, ApplyError, Stalled};
use crate::throttle::Throttle;
use crate::time::Instant;
use crate::types::{
    Ballot, ChunkIndex, EntryId, Incarnation, Marks, RequestNumber, ServerId, SessionId, Slot,
    VolumeId,
};
use crate::volume::device::{Extent, ReadPart};
use crate::wire::client::{
    CHUNKS_MAX, ChunkStatus, EXTENTS_MAX, Reply, ReplyBody, ReplyError, Request,
};
use crate::wire::inspect::Inspect;

/// A session that the leader has not heard from for this long is fenced.
pub const SESSION_LEASE: Duration = Duration::from_secs(60);
/// The log tells the time when it has moved by so much, in milliseconds, and something else is proposed.
const CLOCK_STEP_MS: u64 = 100;
/// Notes of clients that are logged each 10 s.
const NOTE_LINES_MAX: u32 = 10;
/// Other administrative actions that are logged each 10 s: a person's script may create many volumes.
const EVENT_LINES_MAX: u32 = 100;
/// A learner that has a place in a cell that was recovered knows it after this time.
const LEARNS_WITHIN: Duration = Duration::from_secs(5);
/// How often sessions and the need for a checkpoint are looked at.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// A client's connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ClientId(pub u64);

/// Bounds of the engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The agreement.
    pub replica: Config,
    /// A checkpoint is made after so many bytes of entries ...
    pub checkpoint_bytes: u64,
    /// ... or this time, if anything was applied ...
    pub checkpoint_interval: Duration,
    /// ... or when so many chunks have tables that are not on disk.
    pub checkpoint_chunks: usize,
    /// While chunks are being copied here, the log keeps what may be nowhere else. At this size, bytes, it
    /// takes no more entries.
    pub log_bytes_max: u64,
    /// About so much is applied at once, bytes: that must not hold up heartbeats.
    pub apply_bytes: usize,
    /// Writes are refused when a majority has less than this free, bytes.
    pub reserve_bytes: u64,
    /// See [`SESSION_LEASE`].
    pub session_lease: Duration,
}

/// What the engine wants done.
pub enum Action {
    /// Send to a server; may get lost.
    Send {
        /// Receiver.
        to: ServerId,
        /// What.
        message: Message,
    },
    /// Make durable, in order, and report with [`Engine::handle_persisted`].
    Persist {
        /// Name.
        write: WriteId,
        /// What.
        what: Persist,
    },
    /// Read the log; report with [`Engine::handle_log_read`].
    ReadLog {
        /// For whom.
        to: ServerId,
        /// Entries after this slot.
        after: Slot,
        /// Up to this one.
        until: Slot,
        /// About so many bytes.
        bytes_max: usize,
        /// See [`Output::ReadLog`].
        tail_for: Option<Ballot>,
    },
    /// Answer a client.
    Reply {
        /// Connection.
        client: ClientId,
        /// What.
        reply: Reply,
    },
    /// Read from a volume, waiting for the device; report with [`Engine::handle_read`].
    Read(VolumeRead),
    /// Read a chunk or blocks for another server, waiting for the device; report with [`Engine::handle_exported`].
    Export(Export),
    /// Read chunks for a comparison, at low priority; report with [`Engine::handle_digested`].
    Digest(DigestJob),
    /// Store the checkpoint durably, `installing` with the proven slot, then call
    /// [`Engine::handle_base_stored`].
    StoreBase {
        /// Last entry that the state holds.
        base: EntryId,
        /// See [`storage::CheckpointRecord::installing`].
        proven: Slot,
        /// See [`storage::CheckpointRecord::marks`].
        marks: Marks,
        /// The state, encoded.
        state: Bytes,
    },
    /// Flush the chunks, store the checkpoint, then call [`Engine::handle_checkpoint_done`].
    Checkpoint(Checkpoint),
    /// The role changed.
    Role(RoleChange),
    /// A client has asked this server to stop.
    Shutdown,
    /// A client wants to know something of the inside: answer it with [`Engine::answer_inspection`].
    Inspect {
        /// Connection.
        client: ClientId,
        /// Of the request.
        tag: u64,
        /// What.
        what: Inspect,
    },
}

/// A read that has to wait for the device.
#[derive(Clone, Debug)]
pub struct VolumeRead {
    /// Name.
    pub ticket: u64,
    /// Of which volume.
    pub volume: Arc<crate::state::Volume>,
    what: ReadWhat,
}

/// What is read.
#[derive(Clone, Debug)]
enum ReadWhat {
    /// Content of blocks.
    Blocks(BlockRange),
    /// Which blocks take space.
    Extents(BlockRange),
    /// Which chunks exist.
    Chunks(Range<ChunkIndex>),
}

/// What a [`VolumeRead`] has brought.
#[derive(Debug)]
pub enum Fetched {
    /// Content.
    Blocks(Vec<ReadPart>),
    /// From the start of the range, at most [`EXTENTS_MAX`].
    Extents(Vec<Extent>),
    /// At most [`CHUNKS_MAX`], and from where to go on.
    Chunks(Vec<ChunkStatus>, Option<ChunkIndex>),
    /// No content: these blocks are damaged.
    Damaged(Vec<BadBlock>),
}

impl VolumeRead {
    /// Reads, waiting for the device.
    ///
    /// # Errors
    /// As [`ChunkStore::read`], but for [`ReadError::BadBlock`].
    pub fn run(&self, chunks: &ChunkStore) -> Result<Fetched, ReadError> {
        match (self.what.fetch(chunks, &self.volume, false), &self.what) {
            (Err(ReadError::BadBlock { .. }), ReadWhat::Blocks(range)) => {
                let (first, blocks) = (range.first, range.blocks);
                let found = chunks.find_bad(&self.volume, first, blocks, blocks as usize)?;
                Ok(Fetched::Damaged(found))
            }
            (result, _) => result,
        }
    }
}

impl ReadWhat {
    fn fetch(
        &self,
        chunks: &ChunkStore,
        volume: &crate::state::Volume,
        nowait: bool,
    ) -> Result<Fetched, ReadError> {
        match self {
            ReadWhat::Blocks(range) => {
                let parts = chunks.read(volume, range.first, range.blocks, nowait)?;
                Ok(Fetched::Blocks(parts))
            }
            ReadWhat::Extents(range) => {
                let (first, blocks) = (range.first, range.blocks);
                let extents = chunks.extents(volume, first, blocks, EXTENTS_MAX, nowait)?;
                Ok(Fetched::Extents(extents))
            }
            ReadWhat::Chunks(range) => {
                let (found, next) = chunks.statuses(volume, range.clone(), CHUNKS_MAX, nowait)?;
                Ok(Fetched::Chunks(found, next))
            }
        }
    }
}

/// A checkpoint that is to be made.
pub struct Checkpoint {
    /// Last entry that the state holds.
    pub applied: EntryId,
    /// The state, encoded.
    pub state: Vec<u8>,
    /// Whether chunks are still being copied to this server; see
    /// [`storage::CheckpointRecord::installing`].
    pub installing: Option<Slot>,
    /// [`storage::CheckpointRecord::marks`].
    pub marks: Marks,
    /// The state is between two entries, because the disk is full: only flush the chunks, which frees what was
    /// zeroed, store nothing, and call [`Engine::handle_checkpoint_done`] with slot 0.
    pub flush_only: bool,
    /// The chunks to flush.
    pub chunks: chunk::Checkpoint,
}

/// Where the answer of a command goes.
struct Waiting {
    client: ClientId,
    tag: u64,
    /// Blocks that the command writes.
    range: Option<BlockRange>,
}

type CommandKey = (SessionId, RequestNumber);

/// A server's inside. See the module's text.
pub struct Engine {
    config: EngineConfig,
    replica: Replica,
    state: State,
    chunks: Arc<ChunkStore>,
    actions: VecDeque<Action>,
    copying: Option<Copying>,
    /// Whom a person has named to copy chunks from.
    source: Option<ServerId>,
    /// Takes nothing from others until it has given them up: what it holds is to be the truth.
    is_deaf: bool,

    // Requests of clients, while we lead.
    waiting: HashMap<CommandKey, Waiting>,
    /// Writes that are proposed.
    in_flight: Counts,
    /// Requests that read before they write, and wait or read.
    held: Counts,
    deferred: VecDeque<requests::Deferred>,
    /// Requests that wait for the order that a change of reservations asks for.
    queued: VecDeque<(ClientId, Request)>,
    /// Changes of reservations that are proposed and not applied.
    reserving: HashMap<VolumeId, u32>,
    /// New sizes of volumes that are proposed and not applied.
    resizing: Vec<(VolumeId, u64)>,
    merging: HashMap<u64, requests::Merge>,
    slow_reads: HashMap<u64, requests::PendingRead>,
    repairs: Repairs,
    scrub: Scrub,
    next_ticket: u64,
    /// Reads that wait for the lease.
    reads_waiting: VecDeque<(ClientId, Request)>,
    /// Answers that hold only if we still have the lease, or for stale readers all chunks, now that the data were read.
    reads_done: Vec<(requests::Reader, Result<ReplyBody, ReplyError>)>,
    reads_done_bytes: usize,
    /// How often chunks of another server have begun to come.
    installs: u64,
    heard: HashMap<SessionId, Instant>,
    /// See [`Engine::note_client`].
    addresses: HashMap<ClientId, SocketAddr>,
    /// Number of the newest administrative action that was logged, or that came with the state.
    logged_event: u64,
    note_lines: Throttle,
    event_lines: Throttle,
    /// Volumes as the applied state has them, shared with reads on other threads.
    volumes: HashMap<VolumeId, Arc<crate::state::Volume>>,
    /// See [`Engine::set_wall_clock`].
    wall_clock_ms: u64,
    /// What this leader has told the log last.
    told_ms: u64,
    pace: Pace,
    disk: DiskWatch,

    // Housekeeping.
    housekeeping_at: Instant,
    checkpoint_running: bool,
    /// What was applied when the last one was made.
    checkpoint_slot: Slot,
    /// Of the newest that this process has stored.
    stored_slot: Slot,
    checkpoint_at: Instant,
    /// The one under way says that chunks are still being copied.
    checkpoint_installing: bool,
    /// The newest checkpoint says so too: the log began behind this slot then.
    installed_base: Option<Slot>,
    log_bytes: u64,
    /// Handed to the log since it was told last how full the disk is, and between that and the time before.
    appended: [u64; 2],
    /// Of the disk, beside what the log may grow to.
    free_bytes: u64,
    /// When [`Engine::handle_timeout`] was called last.
    looked_at: Instant,
    bytes_applied: u64,
    /// Everything that was in the log at the start is applied again or replaced: until then blocks may
    /// be newer than their checksums.
    recovered_last: Slot,
    /// Entries up to here may have been applied before the server started.
    held_last: Slot,
    failure: Option<ApplyError>,
    /// The disk was full in the middle of an entry; the entries behind it wait.
    stalled: Option<Box<Stalled>>,
    /// Chosen entries that wait: for space, or for chunks that are on their way here.
    backlog: VecDeque<Entry>,
    backlog_bytes: usize,
    forgetful: bool,
    /// [`Replica::is_rejoining`] and [`Replica::was_set_back`], as they were logged last.
    rejoins: (bool, bool),
    /// A learner: since when the cell has gone on without it, as far as it knows, until it has logged that.
    left_behind: LeftBehind,
}

/// What a learner knows of the cell's having been recovered without it. It may only not have learned yet that it has a place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum LeftBehind {
    No,
    Since(Instant),
    Logged,
}

impl Engine {
    /// A server that starts at `now` with what [`storage::Storage::open`] found.
    pub fn new(
        config: EngineConfig,
        recovered: Recovered,
        state: State,
        chunks: Arc<ChunkStore>,
        now: Instant,
    ) -> Engine {
        let installing = recovered.installing;
        let applied = state.applied();
        let log_base = Slot(recovered.log_first.0.saturating_sub(1));
        let recovered_last = recovered.tail.last().map_or(applied, |entry| entry.id.slot);
        let damaged = [recovered.evidence, recovered.doubt];
        let held = damaged.iter().flatten().map(|entry| entry.slot);
        let held_last = held.max().unwrap_or_default().max(recovered_last);
        let replica = Replica::new(config.replica.clone(), recovered, now);
        let mut engine = Engine {
            config,
            replica,
            state,
            chunks,
            actions: VecDeque::new(),
            copying: installing.map(|proven| Copying::resume(proven, now)),
            source: None,
            is_deaf: false,
            waiting: HashMap::new(),
            in_flight: Counts::new(),
            held: Counts::new(),
            queued: VecDeque::new(),
            reserving: HashMap::new(),
            resizing: Vec::new(),
            deferred: VecDeque::new(),
            merging: HashMap::new(),
            slow_reads: HashMap::new(),
            repairs: Repairs::new(),
            scrub: Scrub::new(),
            next_ticket: 1,
            reads_waiting: VecDeque::new(),
            reads_done: Vec::new(),
            reads_done_bytes: 0,
            installs: 0,
            heard: HashMap::new(),
            addresses: HashMap::new(),
            logged_event: 0,
            note_lines: Throttle::new(NOTE_LINES_MAX),
            event_lines: Throttle::new(EVENT_LINES_MAX),
            volumes: HashMap::new(),
            wall_clock_ms: 0,
            told_ms: 0,
            pace: Pace::default(),
            disk: DiskWatch::new(),
            housekeeping_at: now + HOUSEKEEPING,
            checkpoint_running: false,
            checkpoint_slot: applied,
            stored_slot: Slot(0),
            checkpoint_at: now,
            checkpoint_installing: false,
            installed_base: installing.map(|_| log_base),
            log_bytes: 0,
            appended: [0; 2],
            free_bytes: u64::MAX,
            looked_at: now,
            bytes_applied: 0,
            recovered_last,
            held_last,
            failure: None,
            stalled: None,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            forgetful: false,
            rejoins: (false, false),
            left_behind: LeftBehind::No,
        };
        engine.logged_event = engine.state.events_made();
        engine.share_volumes();
        engine.drain(now);
        engine
    }

    /// The agreement.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The agreement, to be made to misbehave.
    #[doc(hidden)]
    pub fn replica_mut(&mut self) -> &mut Replica {
        &mut self.replica
    }

    /// Makes the engine apply repeated requests again: a deliberate bug, for the tests of the tests.
    #[doc(hidden)]
    pub fn inject_forgetfulness(&mut self) {
        self.forgetful = true;
    }

    /// The replicated state as applied here.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// How far the copying of chunks to this server is: (done, total known).
    pub fn copying(&self) -> Option<(u64, u64)> {
        self.copying.as_ref().map(Copying::progress)
    }

    /// About how long that takes still, if it can be told.
    pub fn copying_left(&self, now: Instant) -> Option<Duration> {
        self.copying.as_ref()?.time_left(now)
    }

    /// A failure after which the server must stop: it could not apply what is chosen.
    pub fn failure(&self) -> Option<&ApplyError> {
        self.failure.as_ref()
    }

    /// A message of another server.
    pub fn handle_message(
        &mut self,
        now: Instant,
        from: ServerId,
        life: Incarnation,
        message: Message,
    ) {
        if self.is_deaf {
            return self.replica.note_heard(now, from, life);
        }
        self.replica.note_log_full(self.is_log_full(now));
        match message {
            Message::Sync(sync) => self.on_sync(now, from, sync),
            message => self.replica.handle_message(now, from, life, message),
        }
        self.drain(now);
    }

    /// See [`Replica::handle_persisted`].
    pub fn handle_persisted(&mut self, now: Instant, write: WriteId) {
        self.replica.handle_persisted(now, write);
        self.drain(now);
    }

    /// See [`Replica::handle_log_read`].
    pub fn handle_log_read(
        &mut self,
        now: Instant,
        to: ServerId,
        tail_for: Option<Ballot>,
        read: LogRead,
    ) {
        self.replica.handle_log_read(now, to, tail_for, read);
        self.drain(now);
    }

    /// Time has passed: [`Engine::poll_timeout`].
    pub fn handle_timeout(&mut self, now: Instant) {
        self.looked_at = now;
        self.replica.note_log_full(self.is_log_full(now));
        if now >= self.replica.poll_timeout() {
            self.replica.handle_timeout(now);
        }
        if now >= self.housekeeping_at {
            self.housekeeping_at = now + HOUSEKEEPING;
            self.resume_applying(now);
            if self.is_stalled() {
                if self.chunks.dirty_count() > 0 {
                    self.start_checkpoint(now);
                }
                // Nobody is answered here; a server with space can answer.
                self.replica.resign(now);
            }
            self.expire_sessions(now);
            self.watch_lags(now);
            self.watch_given_up(now);
            self.checkpoint_if_due(now);
            self.check_trouble(now);
        }
        self.copy_timeout(now);
        self.pump_repairs(now);
        self.pump_scrub(now);
        self.retry_waiting_reads(now);
        self.drain(now);
        self.leave_if_slow(now);
    }

    fn log_rejoining(&mut self) {
        let rejoins = self.replica.is_rejoining();
        let state = (rejoins, rejoins && self.replica.was_set_back());
        if state == self.rejoins || self.replica.changes_life() {
            return;
        }
        self.rejoins = state;
        let life = self.replica.incarnation();
        let counts = self.replica.admitted().of(self.replica.id());
        match state {
            (false, _) => {
                tracing::info!("everything is learned: this server votes and counts again");
            }
            (true, true) => tracing::error!(
                "this data directory is older than what others have seen of this server: it was restored from a backup, or its \
                 disk lost writes; as incarnation {life} the server learns what the others hold, and neither votes nor counts \
                 until it has"
            ),
            (true, false) if self.replica.given_up_by().is_some() => self.log_given_up(),
            (true, false) if counts > life => tracing::error!(
                "another data directory has taken the place of this one (incarnation {counts}, this one is {life}): this server \
                 does not count while that one runs"
            ),
            (true, false) => tracing::warn!(
                "this data directory is new to the cell (incarnation {life}): the server learns what the others hold, \
                 and neither votes nor counts until it has"
            ),
        }
    }

    fn log_given_up(&self) {
        tracing::error!(
            "the cell was recovered without this server (loss epoch {}): what it holds does not count any more; to take it in \
             again use 'pssd format --replace' and 'pss server add'",
            self.replica.given_up_by().unwrap_or_default()
        );
    }

    /// One that votes begins another life, and says so then.
    fn watch_given_up(&mut self, now: Instant) {
        let is_left = self.replica.given_up_by().is_some() && !self.replica.is_rejoining();
        self.left_behind = match (is_left, self.left_behind) {
            (false, _) => LeftBehind::No,
            (true, LeftBehind::No) => LeftBehind::Since(now),
            (true, LeftBehind::Since(at)) if now.since(at) >= LEARNS_WITHIN => {
                self.log_given_up();
                LeftBehind::Logged
            }
            (true, other) => other,
        };
    }

    /// When to call [`Engine::handle_timeout`].
    pub fn poll_timeout(&self) -> Instant {
        let copy = self.copying.as_ref().map(Copying::next_at);
        let others = copy.into_iter().chain(self.repairs.next_at());
        let others = others.chain(self.scrub.next_at());
        let next = self.replica.poll_timeout().min(self.housekeeping_at);
        others.fold(next, Instant::min)
    }

    /// The next thing to do, if there is one.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The time of day, in milliseconds since the beginning of 1970: what is proposed from now on is noted to have
    /// happened then. Nothing else depends on it, so it may be wrong, and may step.
    pub fn set_wall_clock(&mut self, unix_ms: u64) {
        self.wall_clock_ms = unix_ms;
    }

    /// Tells the log the time before something else is proposed, if it has moved.
    fn tell_time(&mut self) {
        let unix_ms = self.wall_clock_ms;
        if unix_ms.abs_diff(self.told_ms) >= CLOCK_STEP_MS {
            let clock = Command::internal(Op::Clock { unix_ms });
            if self.replica.propose(vec![clock]).is_ok() {
                self.told_ms = unix_ms;
            }
        }
    }

    /// Proposes a list of servers.
    ///
    /// # Errors
    /// See [`Replica::change_members`].
    pub fn change_members(&mut self, now: Instant, members: Members) -> Result<(), ChangeRefused> {
        let proposed = self.replica.change_members(now, members);
        self.drain(now);
        proposed
    }

    /// Gives the majority up.
    ///
    /// # Errors
    /// From now on chunks are copied from this server first, and from others if it does not answer or has not got them.
    pub fn prefer_source(&mut self, source: ServerId) {
        self.source = Some(source);
    }

    /// Takes nothing from others but that they are there, until [`Engine::recover`] has succeeded.
    pub fn stay_deaf(&mut self) {
        self.is_deaf = true;
    }

    /// See [`Replica::recover`].
    pub fn recover(&mut self, now: Instant, members: Members) -> Result<(), RecoverRefused> {
        let done = self.replica.recover(now, members);
        self.is_deaf &= done.is_err();
        self.drain(now);
        done
    }

    /// Hands the leadership over; see [`Replica::hand_over`].
    pub fn hand_over(&mut self, now: Instant) -> bool {
        let leads = self.replica.hand_over(now);
        self.drain(now);
        leads
    }

    /// The checkpoint that was asked for is durable up to `slot`, or was not made: 0.
    pub fn handle_checkpoint_done(&mut self, slot: Slot) {
        self.checkpoint_running = false;
        self.checkpoint_slot = self.checkpoint_slot.max(slot);
        self.stored_slot = self.stored_slot.max(slot);
        if slot > Slot(0) && !self.checkpoint_installing {
            self.installed_base = None;
            self.replica.note_complete(true);
        }
    }

    /// The log may be trimmed up to this slot.
    ///
    /// That is the newest durable checkpoint, unless it says that chunks are being copied here. Entries of
    /// chunks that were not copied took no effect then, and this server has acknowledged them all the same:
    /// its log may be the only other place that has them. It keeps them until a majority of others has
    /// applied them, or all chunks are here.
    pub fn trim_slot(&self) -> Slot {
        match self.installed_base {
            None => self.stored_slot,
            Some(base) => {
                let elsewhere = self.replica.applied_by_others();
                self.stored_slot.min(elsewhere.max(base))
            }
        }
    }

    /// Whether the log keeps so much for chunks that are not here yet that it may not grow. As long as they
    /// keep coming, that ends; if they do not, whoever could send them may need our acknowledgement first.
    /// Or whether there is no space for it.
    fn is_log_full(&self, now: Instant) -> bool {
        let coming = |it: &Copying| it.is_installing() && it.is_moving(now);
        let is_kept = self.installed_base.is_some() && self.copying.as_ref().is_some_and(coming);
        is_kept && self.log_bytes >= self.config.log_bytes_max || self.log_lacks_space()
    }

    /// See [`EngineConfig::log_bytes_max`]: whether entries are dropped now.
    pub fn drops_entries(&self, now: Instant) -> bool {
        self.is_log_full(now)
    }

    /// Makes a checkpoint now, if anything was applied since the last one and none is under way.
    pub fn checkpoint_now(&mut self, now: Instant) {
        if self.state.applied() > self.checkpoint_slot {
            self.start_checkpoint(now);
        }
    }

    /// Carries out what the replica wants.
    fn drain(&mut self, now: Instant) {
        loop {
            while let Some(output) = self.replica.poll_output() {
                self.carry_out(now, output);
            }
            let moved = self.pump_deferred(now);
            if !self.pump_queued(now) && !moved {
                self.watch_disk(now);
                return self.log_rejoining();
            }
        }
    }

    fn carry_out(&mut self, now: Instant, output: Output) {
        match output {
            Output::Send { to, message } => self.actions.push_back(Action::Send { to, message }),
            Output::Persist { write, what } => {
                if let Persist::Append { entries, .. } = &what {
                    let bytes: usize = entries.iter().map(Entry::weight_bytes).sum();
                    self.appended[0] += bytes as u64;
                }
                self.actions.push_back(Action::Persist { write, what });
            }
            Output::Apply { entries } => self.keep_chosen(entries),
            Output::ReadLog {
                to,
                after,
                until,
                bytes_max,
                tail_for,
            } => {
                let read = Action::ReadLog {
                    to,
                    after,
                    until,
                    bytes_max,
                    tail_for,
                };
                self.actions.push_back(read);
            }
            Output::CopyChunks { donor } => self.start_copying(now, donor),
            Output::Role(change) => self.role_changed(now, change),
        }
    }

    fn keep_chosen(&mut self, entries: Vec<Entry>) {
        self.backlog_bytes += entries.iter().map(Entry::weight_bytes).sum::<usize>();
        for entry in &entries {
            self.pace.note(entry, self.wall_clock_ms);
        }
        self.backlog.extend(entries);
    }

    /// Whether so many chunks have changed beside a checkpoint that is being made that their tables would
    /// take too much memory: a disk that is too slow for the writes slows them down.
    fn waits_for_checkpoint(&self) -> bool {
        let most = self.config.checkpoint_chunks.saturating_mul(2);
        self.checkpoint_running && self.chunks.dirty_count() >= most
    }

    /// Whether [`Engine::apply_chosen`] has something to do now.
    pub fn has_chosen(&self) -> bool {
        !self.backlog.is_empty() && self.may_apply()
    }

    fn may_apply(&self) -> bool {
        let stuck = self.failure.is_some() || self.stalled.is_some();
        !stuck && !self.holds_back() && !self.waits_for_checkpoint() && !self.waits_for_space()
    }

    /// Applies what is chosen, or some of it if that is much, and answers whoever waits for it. To be
    /// called after every batch of inputs, when the actions that they led to are under way: the log and the
    /// other servers do not wait for it. To be called again as long as [`Engine::has_chosen`] says so, with
    /// other inputs between.
    pub fn apply_chosen(&mut self, now: Instant) {
        if self.has_chosen() {
            self.apply_backlog(now);
            self.drain(now);
        }
    }

    /// Applies some of what waits, unless the disk is full or chunks are on their way here.
    fn apply_backlog(&mut self, now: Instant) {
        if !self.may_apply() {
            return;
        }
        let mut bytes = 0;
        while bytes < self.config.apply_bytes
            && !self.waits_for_checkpoint()
            && !self.waits_for_space()
            && let Some(entry) = self.backlog.pop_front()
        {
            self.backlog_bytes -= entry.weight_bytes();
            bytes += entry.weight_bytes();
            let slot = entry.id.slot;
            let copying = self.copying.as_ref();
            let copying = copying.filter(|it| it.decides(slot, self.held_last));
            let copied = |volume, chunk| copying.is_none_or(|it| it.is_copied(volume, chunk));
            let filter: Option<storage::ChunkFilter<'_>> = match copying {
                Some(_) => Some(&copied),
                None => None,
            };
            let applied = if self.forgetful {
                let forgotten = without_sessions(&entry);
                storage::apply_entry(&mut self.state, &self.chunks, &forgotten, filter)
            } else {
                storage::apply_entry(&mut self.state, &self.chunks, &entry, filter)
            };
            match applied {
                Ok(answers) => self.entry_applied(now, &entry, answers),
                Err(ApplyError::NoSpace(stalled)) => {
                    self.stalled = Some(stalled);
                    break;
                }
                Err(failure) => {
                    self.failure = Some(failure);
                    return;
                }
            }
            let much = self.bytes_applied >= self.config.checkpoint_bytes
                || self.chunks.dirty_count() >= self.config.checkpoint_chunks;
            if much {
                self.checkpoint_if_due(now);
            }
        }
        self.replica.handle_applied(now, self.state.applied());
    }

    fn entry_applied(&mut self, now: Instant, entry: &Entry, answers: Vec<Answer>) {
        self.bytes_applied += entry.weight_bytes() as u64;
        if entry
            .commands
            .iter()
            .any(|command| changes_volumes(&command.op))
        {
            self.share_volumes();
        }
        self.take_points(now);
        self.log_events(now);
        self.note_reserved(entry);
        self.note_resized(entry);
        if !self.waiting.is_empty() {
            for (command, answer) in entry.commands.iter().zip(answers) {
                self.answer_command((command.session, command.number), answer);
            }
        }
    }

    /// Logs what an entry has done to the cell. After a restart some of it is logged again, under the same number. A client
    /// in a loop does not fill the logs of all servers: `more` counts what was left out before a line. Notes change nothing
    /// and cost least, so they do not take the place of the others.
    fn log_events(&mut self, now: Instant) {
        if self.logged_event == self.state.events_made() {
            return;
        }
        for event in self.state.events_after(self.logged_event) {
            let lines = match event.action {
                AdminAction::Note { .. } => &mut self.note_lines,
                _ => &mut self.event_lines,
            };
            let Some(more) = lines.admit(now) else {
                continue;
            };
            let address = event.by.address.map(tracing::field::display);
            tracing::info!(
                event = event.number,
                slot = event.slot.0,
                more = (more > 0).then_some(more),
                user = ?event.by.user,
                address,
                client = ?event.by.name,
                "administration: {}",
                event.to_string().escape_debug()
            );
        }
        self.logged_event = self.state.events_made();
    }

    /// Tries again to apply the entry for which there was no space.
    fn resume_applying(&mut self, now: Instant) {
        if self.copying.as_ref().is_some_and(Copying::is_storing) {
            // The base counts on data and tables as they are; the entry may be in it.
            return;
        }
        let Some(stalled) = self.stalled.take() else {
            return;
        };
        let slot = stalled.entry().id.slot;
        let copying = self.copying.as_ref();
        let copying = copying.filter(|it| it.decides(slot, self.held_last));
        let copied = |volume, chunk| copying.is_none_or(|it| it.is_copied(volume, chunk));
        let resumed = stalled.resume(&mut self.state, &self.chunks, Some(&copied));
        match resumed {
            Ok((entry, answers)) => {
                self.entry_applied(now, &entry, answers);
                self.replica.handle_applied(now, self.state.applied());
                self.apply_backlog(now);
            }
            Err(ApplyError::NoSpace(stalled)) => self.stalled = Some(stalled),
            Err(failure) => self.failure = Some(failure),
        }
    }

    fn answer_command(&mut self, key: CommandKey, answer: Answer) {
        let Some(waiting) = self.waiting.remove(&key) else {
            return;
        };
        if let Some(range) = waiting.range {
            self.in_flight.remove(range);
        }
        let opens_session = key.0 == SessionId(0);
        let body = match answer {
            Answer::Done => Ok(ReplyBody::Done),
            Answer::Created(id) if opens_session => Ok(ReplyBody::Session(SessionId(id))),
            Answer::Created(id) => Ok(ReplyBody::VolumeCreated(VolumeId(id as u32))),
            Answer::Refused(refusal) => Err(ReplyError::Refused(refusal)),
        };
        self.reply(waiting.client, waiting.tag, body);
    }

    fn reply(&mut self, client: ClientId, tag: u64, body: Result<ReplyBody, ReplyError>) {
        self.actions.push_back(Action::Reply {
            client,
            reply: Reply { tag, body },
        });
    }

    fn share_volumes(&mut self) {
        let volumes = self.state.volumes();
        self.volumes = volumes
            .map(|volume| (volume.id, Arc::new(volume.clone())))
            .collect();
    }

    fn role_changed(&mut self, now: Instant, change: RoleChange) {
        match change {
            RoleChange::Leader(_) => {
                self.disk.leads(Some(now));
                self.told_ms = 0;
                self.heard = self
                    .state
                    .sessions()
                    .map(|session| (session.id, now))
                    .collect();
            }
            RoleChange::Follower => {
                self.disk.leads(None);
                self.send_everyone_away();
            }
        }
        self.actions.push_back(Action::Role(change));
    }

    fn serves(&self) -> bool {
        self.replica.role() == RoleKind::Leader { serving: true }
    }

    fn checkpoint_if_due(&mut self, now: Instant) {
        // That all chunks are here is written down at once: only then the log may be trimmed.
        let installed = self.installed_base.is_some() && !self.is_installing();
        let some =
            self.state.applied() > self.checkpoint_slot || installed || self.repairs.unsynced;
        let due = installed
            || self.bytes_applied >= self.config.checkpoint_bytes
            || now.since(self.checkpoint_at) >= self.config.checkpoint_interval
            || self.chunks.dirty_count() >= self.config.checkpoint_chunks;
        if some && due {
            self.start_checkpoint(now);
        }
    }

    fn start_checkpoint(&mut self, now: Instant) {
        let Some(applied) = self.replica.entry_id(self.state.applied()) else {
            return;
        };
        let storing_base = self.copying.as_ref().is_some_and(Copying::is_storing);
        if self.checkpoint_running || storing_base || self.failure.is_some() {
            return;
        }
        let Some(chunks) = self.chunks.begin_checkpoint() else {
            return;
        };
        self.checkpoint_running = true;
        self.repairs.unsynced = false;
        self.checkpoint_installing = self.is_installing();
        let flush_only = self.stalled.is_some();
        if !flush_only {
            self.checkpoint_at = now;
            self.bytes_applied = 0;
        }
        self.actions.push_back(Action::Checkpoint(Checkpoint {
            applied,
            state: self.state.encode(),
            installing: self.copying.as_ref().and_then(Copying::installing),
            marks: self.replica.marks().clone(),
            flush_only,
            chunks,
        }));
    }
}

/// The entry with commands that no session remembers.
fn without_sessions(entry: &Entry) -> Entry {
    let forget = |command: &Command| match command.op {
        Op::Write { .. } | Op::Zero { .. } => Command {
            session: SessionId(0),
            ..command.clone()
        },
        _ => command.clone(),
    };
    Entry {
        commands: entry.commands.iter().map(forget).collect(),
        ..entry.clone()
    }
}

fn changes_volumes(op: &Op) -> bool {
    matches!(
        op,
        Op::CreateVolume { .. }
            | Op::ResizeVolume { .. }
            | Op::ShrinkVolume { .. }
            | Op::DeleteVolume { .. }
            | Op::DeleteAttachedVolume { .. }
    )
}
