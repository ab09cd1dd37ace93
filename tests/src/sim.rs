//! A whole cell in one thread: the real engine, log and chunk store over simulated disks, network and
//! clocks, with simulated clients. Everything follows from the seed.
//!
//! The checkers are always on: one value per slot; promises only rise; one leaseholder at a time; nothing
//! is applied that is not chosen; what was answered is never lost and reads are linearizable per half
//! block; a block is never a mixture of two writes; what clients have noted is there once; and when the faults stop, every request ends, all
//! servers reach the same slot and hold the same bytes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pss_core::engine::{
    Action, Checkpoint, ClientId, DigestJob, Engine, EngineConfig, Export, RepairBug, VolumeRead,
};
use pss_core::entry::{Entry, Op, Origin};
use pss_core::members::{Member, Members};
use pss_core::paxos::message::{Message, SyncMessage};
use pss_core::paxos::output::{Persist, WriteId};
use pss_core::paxos::quorum::Membership;
use pss_core::paxos::{Bug, Config, RoleKind, Tuning};
use pss_core::state::{AdminAction, CHUNK_BYTES_MIN};
use pss_core::time::Instant;
use pss_core::types::{
    Ballot, ChunkIndex, EntryId, Incarnation, Marks, RequestNumber, ServerId, SessionId, Slot,
    VolumeId,
};
use pss_core::wire::client::{Browse, ChunkStatus, Reply, ReplyError, Request, RequestBody};

use crate::checker;
use crate::disk::{SimDisk, Unreliable};
use crate::rng::Rng;
use crate::sim_storage;
use crate::workload::{Client, History, Playground};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
/// Faults stop after this time at the latest.
const FAULTS_UNTIL: u64 = 40 * SECOND;
/// Then everything must end within this time.
const CALM: u64 = 60 * SECOND;
/// Blocks of a volume: 16 chunks of the smallest size.
const VOLUME_BLOCKS: u64 = 16 * 16;
/// Ends a cell without a failure; see `Sim::is_out_of_budget`.
const OUT_OF_BUDGET: &str = "the faults have taken every copy";
/// What rots in chunks follows from the seed and this.
const ROT_SEED: u64 = 0x726f_7421_726f_7421;
const CHANGES_SEED: u64 = 0x6d65_6d62_6572_7321;

/// What disks are slow for long follows from the seed and this.
const CRAWL_SEED: u64 = 0x6372_6177_6c21_6372;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Everything follows from it.
    pub seed: u64,
    /// Core servers; `None`: 3, 4 or 5 by the seed.
    pub core: Option<u8>,
    /// Requests of all clients together.
    pub operations: u32,
    /// A deliberate bug, to see whether it is found.
    pub bug: Option<SimBug>,
    /// Print what happens.
    pub trace: bool,
}

/// A deliberate bug.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SimBug {
    /// Of the agreement.
    Agreement(Bug),
    /// Of the engine: repeated requests are applied again.
    ForgetSessions,
    /// Of the engine: leads on with a disk that is much slower than the others'.
    LeadSlowly,
    /// Of the repair of damaged blocks.
    Repair(RepairBug),
}

/// Every deliberate bug.
pub const BUGS: [SimBug; 27] = [
    SimBug::Agreement(Bug::AcknowledgeBeforeSync),
    SimBug::Agreement(Bug::CountOldBallots),
    SimBug::Agreement(Bug::SkipBarrier),
    SimBug::Agreement(Bug::SkipTail),
    SimBug::Agreement(Bug::ReadWithoutLease),
    SimBug::Agreement(Bug::IgnoreGrantedLease),
    SimBug::Agreement(Bug::ApplyUnchosen),
    SimBug::Agreement(Bug::PromiseBeforeSync),
    SimBug::Agreement(Bug::SmallQuorum),
    SimBug::Agreement(Bug::NoQuietTime),
    SimBug::Agreement(Bug::SkipPreviousCheck),
    SimBug::Agreement(Bug::DenyDamaged),
    SimBug::Agreement(Bug::LeadHanging),
    SimBug::Agreement(Bug::VoteWhileLearning),
    SimBug::Agreement(Bug::CountOldLives),
    SimBug::Agreement(Bug::CountIncomplete),
    SimBug::Agreement(Bug::DenyForgotten),
    SimBug::Agreement(Bug::IgnoreEpoch),
    SimBug::Agreement(Bug::ListByFile),
    SimBug::Agreement(Bug::ChangeUnchosen),
    SimBug::Agreement(Bug::ChangeMany),
    SimBug::Agreement(Bug::CountByOldList),
    SimBug::ForgetSessions,
    SimBug::LeadSlowly,
    SimBug::Repair(RepairBug::Unverified),
    SimBug::Repair(RepairBug::Older),
    SimBug::Repair(RepairBug::Unwritten),
];

impl SimBug {
    /// Its name on the command line.
    pub fn name(&self) -> String {
        match self {
            SimBug::Agreement(bug) => format!("{bug:?}"),
            SimBug::ForgetSessions => "ForgetSessions".to_owned(),
            SimBug::LeadSlowly => "LeadSlowly".to_owned(),
            SimBug::Repair(bug) => format!("Repair{bug:?}"),
        }
    }
}

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were answered.
    pub answered: u64,
    /// Requests whose outcome stayed open.
    pub lost: u64,
    /// Sessions that clients ended,
    pub ended: u64,
    /// and how often they asked for it.
    pub ends_asked: u64,
    /// Events.
    pub events: u64,
    /// Slots that were chosen.
    pub slots: u64,
    /// Power cuts and restarts.
    pub crashes: u64,
    /// Disks that hung.
    pub hangs: u64,
    /// How often a leader left because of its slow disk when nothing else was wrong.
    pub left_slow: u64,
    /// Times that chunks could not be written back.
    pub lost_writes: u64,
    /// Entries that waited in the middle because a disk was full.
    pub stalls: u64,
    /// The same where chunks were copied at the same time.
    pub stalled_copies: u64,
    /// Bits that rotted in a log.
    pub rots: u64,
    /// Bits that rotted in blocks of chunks,
    pub block_rots: u64,
    /// tables of chunks of which something rotted,
    pub table_rots: u64,
    /// and blocks whose write was lost or went elsewhere.
    pub strayed: u64,
    /// Damaged blocks that were found,
    pub found: u64,
    /// of these, repaired,
    pub repaired: u64,
    /// and given up because nobody answered.
    pub given_up: u64,
    /// Cells that ended because all good copies of a chunk were lost.
    pub out_of_budget: u64,
    /// Times that a server copied chunks,
    pub copies: u64,
    /// and that its log held too much meanwhile to grow.
    pub drops: u64,
    /// Servers that were lost for good while another copied chunks.
    pub lost_for_good: u64,
    /// Disks that were wiped,
    pub wipes: u64,
    /// and of these, formatted as if they had always been empty.
    pub plain_wipes: u64,
    /// Directories that were restored from an old backup.
    pub restored: u64,
    /// Changes of the servers that were proposed.
    pub changes: u64,
    /// Majorities that were given up.
    pub recovered: u64,
    /// Ballots that led.
    pub leaders: u64,
    /// Simulated time, milliseconds.
    pub simulated_ms: u64,
}

impl Report {
    /// Adds another run.
    pub fn add(&mut self, other: &Report) {
        self.answered += other.answered;
        self.lost += other.lost;
        self.ended += other.ended;
        self.ends_asked += other.ends_asked;
        self.events += other.events;
        self.slots += other.slots;
        self.crashes += other.crashes;
        self.hangs += other.hangs;
        self.left_slow += other.left_slow;
        self.lost_writes += other.lost_writes;
        self.stalls += other.stalls;
        self.stalled_copies += other.stalled_copies;
        self.rots += other.rots;
        self.block_rots += other.block_rots;
        self.table_rots += other.table_rots;
        self.strayed += other.strayed;
        self.found += other.found;
        self.repaired += other.repaired;
        self.given_up += other.given_up;
        self.out_of_budget += other.out_of_budget;
        self.copies += other.copies;
        self.drops += other.drops;
        self.lost_for_good += other.lost_for_good;
        self.wipes += other.wipes;
        self.plain_wipes += other.plain_wipes;
        self.restored += other.restored;
        self.changes += other.changes;
        self.recovered += other.recovered;
        self.leaders += other.leaders;
        self.simulated_ms += other.simulated_ms;
    }
}

impl Report {
    /// Of one life of a server.
    fn count_repairs(&mut self, engine: &Engine) {
        let counts = engine.repairs();
        self.found += counts.found;
        self.repaired += counts.repaired;
        self.given_up += counts.lost;
    }
}

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Of the run.
    pub seed: u64,
    /// When, simulated nanoseconds.
    pub at: u64,
    /// What.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.at as f64 / 1e9;
        write!(f, "seed {}: at {seconds:.6} s: {}", self.seed, self.what)
    }
}

enum Event {
    Message {
        from: ServerId,
        life: Incarnation,
        to: ServerId,
        message: Message,
    },
    Request {
        client: usize,
        to: ServerId,
        request: Request,
    },
    Answer {
        client: usize,
        from: ServerId,
        reply: Reply,
    },
    Timer {
        node: usize,
        life: u64,
    },
    LogDone {
        node: usize,
        life: u64,
    },
    /// The next checkpoint or base is stored.
    Stored {
        node: usize,
        life: u64,
    },
    Work {
        node: usize,
        life: u64,
        work: Box<Work>,
    },
    Start {
        node: usize,
    },
    Resume {
        node: usize,
    },
    /// Its disk has space again.
    Space {
        node: usize,
    },
    Client {
        client: usize,
    },
    Fault,
    /// The servers change.
    Change,
    /// Something rots in a chunk.
    Rot,
    Heal,
}

enum Work {
    ReadLog {
        to: ServerId,
        after: Slot,
        until: Slot,
        bytes_max: usize,
        tail_for: Option<Ballot>,
    },
    Read(VolumeRead),
    Export(Export),
    Digest(DigestJob),
    StoreBase {
        base: EntryId,
        proven: Slot,
        marks: Marks,
        state: bytes::Bytes,
    },
    Checkpoint(Checkpoint),
}

struct Scheduled(u64, u64, Event);

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// The running part of a server; gone after a power cut.
struct Running {
    engine: Engine,
    storage: sim_storage::Parts,
    log_queue: VecDeque<(WriteId, Persist)>,
    log_busy: bool,
    checkpoint_queue: VecDeque<Work>,
    checkpoint_busy: bool,
    timer_at: u64,
    /// It took no entries when it was last looked at.
    drops: bool,
    /// Its disk was full then.
    stalled: bool,
}

struct Node {
    id: ServerId,
    disk: SimDisk,
    running: Option<Running>,
    /// Counts starts, so that events of an earlier life are dropped.
    life: u64,
    /// Stopped until then (a pause of the machine); what comes in waits.
    paused_until: u64,
    waiting: Vec<Event>,
    /// The node's clock: `offset + time * (1000 + drift) / 1000`.
    offset: u64,
    drift_per_mille: i64,
    slow_disk: bool,
    /// Its disk finishes nothing until then.
    hangs_until: u64,
    /// Until then each write of the log takes about 100 ms.
    crawls_until: u64,
    promised: Ballot,
    seen_chosen: Slot,
    /// What its log holds on the disk.
    disk_log: BTreeMap<Slot, EntryId>,
    /// What it held and damage has taken. It must not deny these.
    rotted: BTreeMap<Slot, EntryId>,
    /// A bit has rotted since the server stopped.
    rot_pending: bool,
    /// It will not come back.
    is_lost: bool,
    /// Life of its data directory.
    incarnation: Incarnation,
    /// What the log of its last life held, until the server counts again.
    wiped: Option<BTreeMap<Slot, EntryId>>,
    /// Nobody told it that it replaces another.
    is_plain: bool,
    /// The cell goes on without it.
    given_up: bool,
    /// It is not started for now.
    is_away: bool,
    /// Its directory was restored from a backup of this life.
    restored: Option<Incarnation>,
    /// When it stopped: the end of its log, and behind which slot it was being cut.
    stopped_at: (String, u64),
    cut_pending: Option<Slot>,
}

/// A cell with its clients and faults.
pub struct Sim {
    config: SimConfig,
    rng: Rng,
    now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    nodes: Vec<Node>,
    core: usize,
    clients: Vec<Client>,
    ground: Playground,
    history: History,
    /// Values that are chosen.
    chosen: BTreeMap<Slot, EntryId>,
    /// Blocked directions of the network.
    blocked: Vec<Vec<bool>>,
    loss_per_mille: u64,
    duplicate_per_mille: u64,
    delay_max: u64,
    faults: bool,
    leader_ballots: std::collections::BTreeSet<Ballot>,
    report: Report,
    /// Last delivery on each connection, which keeps the order of what goes by TCP.
    fifo: BTreeMap<(u8, u8), u64>,
    /// The last leader that a rivalry was about.
    rival: Option<Ballot>,
    /// Chunks that are copied get lost on the way.
    loses_chunks: bool,
    /// Entries get lost on the way to this server.
    starves: Option<usize>,
    /// The servers that the cell begins with.
    listed: Vec<ServerId>,
    /// Changes of the servers follow from this.
    changes: Rng,
    /// Faults of chunks follow from this, so that they shift no others.
    rot: Rng,
    rots: bool,
    /// On so many core servers at most.
    rots_at: usize,
    /// Chunk files whose tables rotted somewhere.
    table_rots: std::collections::BTreeSet<String>,
    /// Disks that are slow for long follow from this, so that they shift no other faults.
    crawl: Rng,
    /// Since then nothing is in the way of a repair.
    calm_since: Option<u64>,
}

/// In some cells servers come and go.
fn changes_members(seed: u64) -> bool {
    seed % 8 == 3
}

/// In some cells servers are started with a server.conf that lists others than the cell's log.
fn edits_files(seed: u64) -> bool {
    seed % 8 == 5
}

type Checked<T> = Result<T, Failure>;

/// Runs one cell.
///
/// # Errors
/// The first promise that was broken.
pub fn run(config: SimConfig) -> Result<Report, Failure> {
    let mut sim = Sim::new(config);
    match sim.run() {
        Err(failure) if failure.what == OUT_OF_BUDGET => {
            sim.check_history()?;
            sim.report.out_of_budget += 1;
        }
        result => result?,
    }
    sim.report.simulated_ms = sim.now / MS;
    Ok(sim.report)
}

/// Like [`run`]; an assertion of the product that fails is a broken promise as well.
///
/// # Errors
/// As [`run`].
pub fn run_caught(config: SimConfig) -> Result<Report, Failure> {
    let seed = config.seed;
    match std::panic::catch_unwind(|| run(config)) {
        Ok(result) => result,
        Err(cause) => {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(|it| (*it).to_owned()));
            let what = format!("assertion: {}", text.unwrap_or_default());
            Err(Failure { seed, at: 0, what })
        }
    }
}

impl Sim {
    fn new(config: SimConfig) -> Sim {
        let mut rng = Rng::new(config.seed);
        let mut core = usize::from(config.core.unwrap_or(3 + rng.below(3) as u8));
        let started_with = core.min(3);
        if changes_members(config.seed) {
            core = 5;
        }
        let learners = rng.below(3) as usize;
        let ids = (0..core as u8).chain((0..learners as u8).map(|it| 5 + it));
        let nodes: Vec<Node> = ids
            .map(|id| Node {
                id: ServerId(id),
                disk: new_disk(config.seed, id),
                running: None,
                life: 0,
                paused_until: 0,
                waiting: Vec::new(),
                offset: rng.below(1000 * SECOND),
                drift_per_mille: rng.between(0, 40) as i64 - 20,
                slow_disk: rng.chance(150),
                hangs_until: 0,
                crawls_until: 0,
                promised: Ballot::default(),
                seen_chosen: Slot(0),
                disk_log: BTreeMap::new(),
                rotted: BTreeMap::new(),
                rot_pending: false,
                is_lost: false,
                incarnation: Incarnation(1),
                wiped: None,
                is_plain: false,
                restored: None,
                given_up: false,
                is_away: false,
                stopped_at: (String::new(), 0),
                cut_pending: None,
            })
            .collect();
        let count = nodes.len();
        let mut listed: Vec<ServerId> = nodes.iter().map(|node| node.id).collect();
        if changes_members(config.seed) {
            listed.retain(|id| usize::from(id.0) < started_with || !id.is_core());
            // Every server may come to vote.
            core = count;
        }
        let clients = rng.between(2, 5);
        let each = config.operations / clients as u32;
        let clients = (0..clients).map(|id| Client::new(id, each, 1 + rng.below(4) as usize));
        let clients: Vec<Client> = clients.collect();
        // Few blocks, so that requests meet; several chunks, and both ends of one.
        let blocks = [0, 1, 2, 15, 16, 17, 40, 130, 131, 200].to_vec();
        Sim {
            rng,
            rot: Rng::new(config.seed ^ ROT_SEED),
            crawl: Rng::new(config.seed ^ CRAWL_SEED),
            rots: false,
            rots_at: 0,
            table_rots: std::collections::BTreeSet::new(),
            calm_since: None,
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            nodes,
            core,
            clients,
            ground: Playground {
                volumes: Vec::new(),
                blocks,
            },
            history: History::default(),
            chosen: BTreeMap::new(),
            blocked: vec![vec![false; count]; count],
            loss_per_mille: 0,
            duplicate_per_mille: 0,
            delay_max: MS / 2,
            faults: true,
            leader_ballots: std::collections::BTreeSet::new(),
            report: Report::default(),
            fifo: BTreeMap::new(),
            rival: None,
            loses_chunks: false,
            starves: None,
            listed,
            changes: Rng::new(config.seed ^ CHANGES_SEED),
            config,
        }
    }

    fn run(&mut self) -> Checked<()> {
        for node in 0..self.nodes.len() {
            self.format(node)?;
            let at = self.rng.below(100 * MS);
            self.schedule(at, Event::Start { node });
        }
        self.create_volumes()?;
        for client in 0..self.clients.len() {
            self.schedule(self.now, Event::Client { client });
        }
        let first_fault = self.now + self.rng.below(SECOND);
        self.schedule(first_fault, Event::Fault);
        self.begin_rotting();
        if changes_members(self.config.seed) {
            self.schedule(first_fault, Event::Change);
        }
        self.let_a_disk_crawl();
        let heal_at = self.now + FAULTS_UNTIL;
        while self.now < heal_at && !self.clients.iter().all(Client::is_done) {
            self.step()?;
        }
        self.schedule(self.now, Event::Heal);
        self.step_until("every request ends", |sim| {
            !sim.faults && sim.clients.iter().all(Client::is_done)
        })?;
        self.step_until("every server reaches the same slot", Sim::has_converged)?;
        self.rot_in_calm()?;
        self.lead_with_a_disk_that_hangs()?;
        self.restore_an_old_backup()?;
        self.lead_with_a_disk_that_crawls()?;
        self.give_up_a_majority()?;
        self.lose_a_server_while_another_installs()?;
        self.read_everything()?;
        self.check_history()?;
        self.check_notes()?;
        self.check_equal_data()?;
        for node in &self.nodes {
            if let Some(running) = &node.running {
                self.report.count_repairs(&running.engine);
            }
            self.report.strayed += node.disk.stats().strayed;
        }
        self.report.slots = self.chosen.len() as u64;
        self.report.leaders = self.leader_ballots.len() as u64;
        self.report.answered = self.clients.iter().map(|client| client.answered).sum();
        self.report.lost = self.clients.iter().map(|client| client.lost).sum();
        let ended = self.clients.iter().map(|client| client.ended);
        self.report.ended = ended.clone().map(|(ended, _)| ended).sum();
        self.report.ends_asked = ended.map(|(_, asked)| asked).sum();
        Ok(())
    }

    /// A disk that hangs for good is one server less, even if it is the leader's and the network lives.
    fn lead_with_a_disk_that_hangs(&mut self) -> Checked<()> {
        if !self.config.seed.is_multiple_of(3) || self.members().core.len() < 3 {
            return Ok(());
        }
        let leads = |sim: &Sim| sim.nodes.iter().position(Node::leads);
        self.step_until("there is a leader", |sim| leads(sim).is_some())?;
        let Some(index) = leads(self) else {
            return Ok(());
        };
        self.hang(index, u64::MAX);
        for client in 0..self.clients.len() {
            self.clients[client].left += 3;
            self.schedule(self.now, Event::Client { client });
        }
        self.step_until("every request ends though a disk hangs", |sim| {
            sim.clients.iter().all(Client::is_done)
        })?;
        self.crash(index);
        self.schedule(self.now, Event::Start { node: index });
        self.step_until("the disk that hung catches up", Sim::has_converged)
    }

    /// Of three servers one is stopped, and comes back with what a backup held of it that is older than what it has
    /// acknowledged; who has that from it is away, and the third has heard of it, but does not hold it. Nobody may lead
    /// before the second is back. In some cells the backup is of an earlier life.
    fn restore_an_old_backup(&mut self) -> Checked<()> {
        if self.core != 3 || self.config.seed % 5 != 3 || changes_members(self.config.seed) {
            return Ok(());
        }
        let leads = |sim: &Sim| sim.nodes.iter().position(Node::leads);
        let knows = |sim: &Sim| {
            let running = sim.nodes[..3].iter().filter_map(|it| it.running.as_ref());
            let mut admitted = running.map(|it| it.engine.replica().admitted());
            admitted.all(|it| (0..3).all(|id| it.of(ServerId(id)) > Incarnation(0)))
        };
        self.step_until("there is a leader that knows all", |sim| {
            leads(sim).is_some() && knows(sim)
        })?;
        let holds = leads(self).unwrap_or(0);
        let (restored, hears) = ((holds + 1) % 3, (holds + 2) % 3);
        let life = self.nodes[restored].life_sent();
        let saved = self.nodes[restored].log_last();
        self.crash(restored);
        let backup = self.nodes[restored].disk.backup();
        if self.rot.chance(300) {
            self.write(1)?;
            self.wipe(restored)?;
        }
        self.schedule(self.now, Event::Start { node: restored });
        self.step_until("who was backed up is back", Sim::has_converged)?;
        self.starves = Some(hears);
        let started = self.nodes[hears].life;
        self.write(4)?;
        let until = self.now + 2 * SECOND;
        while self.now < until {
            self.step()?;
        }
        let forgets = self.nodes[restored].log_last() > saved;
        let hears_all = self.nodes[hears].running.is_some() && self.nodes[hears].life == started;
        if leads(self) != Some(holds) || !hears_all || !forgets {
            // Another order of things; a disk failed, somebody slept, or nothing was written.
            self.starves = None;
            return self.step_until("every server is there", Sim::has_converged);
        }
        self.crash(restored);
        self.crash(holds);
        self.starves = None;
        self.report.restored += 1;
        let node = &mut self.nodes[restored];
        node.disk = backup;
        node.wiped = Some(std::mem::take(&mut node.disk_log));
        node.is_plain = false;
        node.restored = Some(life);
        node.promised = Ballot::default();
        node.seen_chosen = Slot(0);
        let id = node.id;
        self.trace(|| format!("server {id} is restored from a backup"));
        self.schedule(self.now, Event::Start { node: restored });
        let until = self.now + 6 * SECOND;
        // A start may have been waiting for it from before.
        while self.now < until && self.nodes[holds].running.is_none() {
            self.step()?;
            if leads(self).is_some() {
                return self.fail("a server leads that lacks what was chosen");
            }
        }
        let node = &self.nodes[restored];
        let running = node.running.as_ref();
        if !running.is_some_and(|it| it.engine.replica().is_rejoining())
            && self.nodes[hears].life != started
        {
            // A disk failed, and with it nobody is left who knows better but who holds everything.
            self.nodes[restored].wiped = None;
        }
        self.schedule(self.now, Event::Start { node: holds });
        self.step_until("who was restored has learned all", Sim::has_converged)
    }

    /// Of three servers two are taken for lost, and the third, which has everything, goes on alone; then the others come back, with
    /// their votes. Nobody else may lead but who went on, and what was answered is there.
    fn give_up_a_majority(&mut self) -> Checked<()> {
        if self.core != 3 || self.config.seed % 5 != 1 || changes_members(self.config.seed) {
            return Ok(());
        }
        let leads = |sim: &Sim| sim.nodes.iter().position(Node::leads);
        self.step_until("there is a leader", |sim| leads(sim).is_some())?;
        self.step_until("all are equal", Sim::has_converged)?;
        let Some(left) = leads(self) else {
            return Ok(());
        };
        let lost = [(left + 1) % 3, (left + 2) % 3];
        for index in lost {
            self.crash(index);
            self.nodes[index].is_away = true;
        }
        // Nothing of them is on its way any more.
        let until = self.now + 8 * SECOND;
        while self.now < until {
            self.step()?;
        }
        let now = self.clock(left);
        let ids: Vec<ServerId> = self.nodes.iter().map(|it| it.id).collect();
        let list = ids.into_iter().enumerate();
        let list = list.filter(|(index, _)| !lost.contains(index));
        let member = |(index, id): (usize, ServerId)| Member {
            id,
            core: index == left,
            host: String::new(),
            path: String::new(),
        };
        let Some(running) = &mut self.nodes[left].running else {
            return Ok(());
        };
        let old = running.engine.replica().members();
        let members = Members {
            epoch: 1,
            version: old.map_or(0, |it| it.version) + 1,
            list: list.map(member).collect(),
        };
        if let Err(error) = running.engine.recover(now, members) {
            return self.fail(format!("the majority cannot be given up: {error}"));
        }
        self.report.recovered += 1;
        self.after(left)?;
        self.step_until("who is left leads", |sim| leads(sim) == Some(left))?;
        for index in lost {
            // As whoever is given up.
            self.nodes[index].given_up = true;
            self.nodes[index].is_away = false;
            self.schedule(self.now, Event::Start { node: index });
        }
        let until = self.now + 6 * SECOND;
        while self.now < until {
            self.step()?;
            if leads(self).is_some_and(|it| lost.contains(&it)) {
                return self.fail("a server leads that was given up");
            }
        }
        self.write(3)?;
        self.step_until("who is left holds the same", Sim::has_converged)
    }

    /// Disks of some cells are slow for most of the run.
    fn has_crawls(&self) -> bool {
        self.config.seed % 8 == 4
    }

    /// One core server's disk, or two; beside all other faults.
    fn let_a_disk_crawl(&mut self) {
        if !self.has_crawls() {
            return;
        }
        for _ in 0..self.crawl.between(1, 3) {
            let index = self.crawl.below(self.core as u64) as usize;
            self.nodes[index].crawls_until = self.crawl.between(20 * SECOND, FAULTS_UNTIL);
        }
    }

    /// Leadership leaves a disk that is slow for minutes, and does not come back as long as it is; but it stays if all
    /// others are as slow.
    fn lead_with_a_disk_that_crawls(&mut self) -> Checked<()> {
        if !self.has_crawls() {
            return Ok(());
        }
        let leads = |sim: &Sim| sim.nodes.iter().position(Node::leads);
        self.step_until("there is a leader", |sim| leads(sim).is_some())?;
        let Some(index) = leads(self) else {
            return Ok(());
        };
        for node in &mut self.nodes {
            (node.slow_disk, node.crawls_until) = (false, 0);
        }
        self.nodes[index].crawls_until = u64::MAX;
        self.keep_writing(15 * SECOND)?;
        if self.nodes[index].leads() {
            let id = self.nodes[index].id;
            return self.fail(format!(
                "server {id} leads on with a disk that is much slower than the others'"
            ));
        }
        self.report.left_slow += 1;
        let ballots = self.leader_ballots.len();
        self.keep_writing(30 * SECOND)?;
        if self.leader_ballots.len() > ballots {
            return self.fail("leadership wanders though the leader's disk is fast");
        }
        for node in &mut self.nodes {
            node.crawls_until = u64::MAX;
        }
        self.keep_writing(30 * SECOND)?;
        if self.leader_ballots.len() > ballots {
            return self.fail("leadership wanders though all disks are as slow");
        }
        for node in &mut self.nodes {
            node.crawls_until = 0;
        }
        Ok(())
    }

    /// Lets the clients send requests for a while, and waits until all are answered.
    fn keep_writing(&mut self, time: u64) -> Checked<()> {
        let end = self.now + time;
        while self.now < end {
            for client in 0..self.clients.len() {
                self.clients[client].left += 3;
                self.schedule(self.now, Event::Client { client });
            }
            let next = self.now + 200 * MS;
            self.step_until("every request ends though a disk is slow", |sim| {
                sim.now >= next && sim.clients.iter().all(Client::is_done)
            })?;
        }
        Ok(())
    }

    /// Of three servers one is lost for good while chunks are being copied to another, which has
    /// acknowledged entries for chunks that it does not have; the third has slept meanwhile. Nothing of
    /// what was answered is lost.
    fn lose_a_server_while_another_installs(&mut self) -> Checked<()> {
        if self.core != 3 || self.config.seed % 5 != 2 || changes_members(self.config.seed) {
            return Ok(());
        }
        let leads = |sim: &Sim| sim.nodes.iter().position(Node::leads);
        self.step_until("there is a leader", |sim| leads(sim).is_some())?;
        let lost = leads(self).unwrap_or(0);
        let (copies, sleeps) = ((lost + 1) % 3, (lost + 2) % 3);
        self.crash(copies);
        self.write_until_trimmed(&[lost, sleeps], copies)?;
        self.loses_chunks = true;
        self.schedule(self.now, Event::Start { node: copies });
        let installs = |sim: &Sim| {
            let running = sim.nodes[copies].running.as_ref();
            running.is_some_and(|it| it.engine.is_installing())
        };
        self.step_until("chunks are copied", |sim| {
            installs(sim) || sim.has_converged()
        })?;
        if !installs(self) || leads(self) != Some(lost) {
            // Someone had the entries in memory still, or the one that is to be lost lags itself.
            self.loses_chunks = false;
            return self.step_until("all are there again", Sim::has_converged);
        }
        self.crash(sleeps);
        self.write_until_trimmed(&[lost], sleeps)?;
        self.crash(lost);
        self.nodes[lost].is_lost = true;
        self.report.lost_for_good += 1;
        self.loses_chunks = false;
        self.schedule(self.now, Event::Start { node: sleeps });
        self.write(5)?;
        self.step_until("two servers of three hold the same", Sim::has_converged)
    }

    /// Lets clients write until the logs of servers begin behind what another's ends with.
    fn write_until_trimmed(&mut self, servers: &[usize], behind: usize) -> Checked<()> {
        let last = self.nodes[behind].log_last().slot;
        let first = |node: &Node| {
            let running = node.running.as_ref();
            running.map_or(Slot(0), |it| it.engine.replica().log_first())
        };
        for _ in 0..60 {
            if servers
                .iter()
                .all(|it| first(&self.nodes[*it]) > last.next())
            {
                return Ok(());
            }
            self.write(40)?;
        }
        self.fail("the log is not trimmed")
    }

    /// Lets every client make some more requests.
    fn write(&mut self, requests: u32) -> Checked<()> {
        for client in 0..self.clients.len() {
            self.clients[client].left += requests;
            self.schedule(self.now, Event::Client { client });
        }
        self.step_until("every request ends", |sim| {
            sim.clients.iter().all(Client::is_done)
        })
    }

    /// A disk finishes nothing for a while.
    fn hang(&mut self, index: usize, until: u64) {
        self.report.hangs += 1;
        self.nodes[index].hangs_until = until;
        let id = self.nodes[index].id;
        self.trace(|| format!("the disk of server {id} hangs"));
    }

    fn fail<T>(&self, what: impl Into<String>) -> Checked<T> {
        Err(Failure {
            seed: self.config.seed,
            at: self.now,
            what: what.into(),
        })
    }

    fn trace(&self, what: impl FnOnce() -> String) {
        if self.config.trace {
            println!("{:12.6} {}", self.now as f64 / 1e9, what());
        }
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue
            .push(Reverse(Scheduled(at.max(self.now), self.sequence, event)));
    }

    fn step(&mut self) -> Checked<()> {
        let Some(Reverse(Scheduled(at, _, event))) = self.queue.pop() else {
            return self.fail("nothing will ever happen again");
        };
        self.now = at;
        self.report.events += 1;
        self.handle(event)
    }

    fn step_until(&mut self, what: &str, done: impl Fn(&Sim) -> bool) -> Checked<()> {
        let until = self.now + CALM;
        while !done(self) {
            if self.now > until {
                let hanging: Vec<_> = self
                    .clients
                    .iter()
                    .flat_map(Client::hanging)
                    .take(3)
                    .collect();
                if self.is_out_of_budget() {
                    return self.fail(OUT_OF_BUDGET);
                }
                let nodes: Vec<String> = self.nodes.iter().map(Node::describe).collect();
                let nodes = nodes.join("; ");
                let hanging: String = format!("{hanging:?}").chars().take(300).collect();
                return self.fail(format!("liveness: not so: {what}. {nodes}; {hanging}"));
            }
            self.step()?;
        }
        Ok(())
    }

    // ---- Servers.

    fn format(&mut self, node: usize) -> Checked<()> {
        let node = &self.nodes[node];
        match sim_storage::format(&node.disk, node.id, node.incarnation, false) {
            Ok(()) => Ok(()),
            Err(error) => self.fail(format!("format: {error}")),
        }
    }

    fn start(&mut self, index: usize) -> Checked<()> {
        if self.nodes[index].running.is_some() || self.nodes[index].is_away {
            return Ok(());
        }
        let now = self.clock(index);
        let seed = self.rng.next();
        let rivals = self.has_rivals();
        let node = &mut self.nodes[index];
        node.life += 1;
        let storage = match sim_storage::open(&node.disk, node.id) {
            Ok(storage) => storage,
            Err(error) => {
                let id = node.id;
                return self.fail(format!("server {id} does not start: {error}"));
            }
        };
        let recovered = sim_storage::recovered(&storage);
        let state = storage.state.clone();
        let promised = recovered.promised;
        node.incarnation = storage.identity.facts().incarnation;
        let lists = |entry: &Entry| {
            let mut ops = entry.commands.iter().map(|it| &it.op);
            ops.any(|op| matches!(op, Op::SetMembers { .. }))
        };
        // Chosen: one that is not may be taken back.
        let tail = recovered.tail.iter();
        let mut tail = tail.take_while(|entry| entry.id.slot <= recovered.chosen);
        let has_list = state.members().is_some() || tail.any(lists);
        let members = self.file_of(index, has_list);
        let node = &mut self.nodes[index];
        let mut config = engine_config(node.id, node.incarnation, members, seed);
        if rivals {
            // One message an entry: logs are equal in part for longer.
            config.replica.tuning.entry_bytes = 4 << 10;
        }
        let installing = recovered.installing.is_some();
        let (last, chosen) = (
            recovered.tail.last().map_or(recovered.applied, |it| it.id),
            recovered.chosen,
        );
        let claims = recovered.evidence.max(recovered.doubt).unwrap_or_default();
        let ids = sim_storage::ids(&storage);
        let parts = sim_storage::Parts::new(storage, node.disk.disk());
        let chunks = Arc::clone(&parts.chunks);
        let mut engine = Engine::new(config, recovered, state, chunks, now);
        match self.config.bug {
            Some(SimBug::Agreement(bug)) => engine.replica_mut().inject(bug),
            Some(SimBug::ForgetSessions) => engine.inject_forgetfulness(),
            Some(SimBug::LeadSlowly) => engine.inject_patience(),
            Some(SimBug::Repair(bug)) => engine.inject_repair_bug(bug),
            None => {}
        }
        let lower = promised < node.promised;
        let denied = node.find_denied(ids, engine.replica().claimed());
        node.seen_chosen = Slot(0);
        node.running = Some(Running {
            engine,
            storage: parts,
            log_queue: VecDeque::new(),
            log_busy: false,
            checkpoint_queue: VecDeque::new(),
            checkpoint_busy: false,
            timer_at: u64::MAX,
            drops: false,
            stalled: false,
        });
        let id = node.id;
        self.trace(|| {
            format!("server {id} starts: last {last}, chosen {chosen}, installing {installing}, claims {claims}")
        });
        if lower {
            return self.fail(format!("server {id} forgot a promise"));
        }
        if let Some((entry, claimed)) = denied {
            return self.fail(format!(
                "server {id} denies {entry}, which it reported durable: it claims {claimed}"
            ));
        }
        self.after(index)
    }

    /// A node's own clock.
    fn clock(&self, index: usize) -> Instant {
        let node = &self.nodes[index];
        let rate = 1000 + node.drift_per_mille;
        Instant(node.offset + self.now / 1000 * rate as u64)
    }

    /// When a moment of the node's clock will be.
    fn when(&self, index: usize, at: Instant) -> u64 {
        let node = &self.nodes[index];
        let rate = (1000 + node.drift_per_mille) as u64;
        let since = at.0.saturating_sub(node.offset);
        (since / rate * 1000 + 1000).max(self.now + 1000)
    }

    /// Power cut: what was not durable is lost, kept or torn.
    fn crash(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let Some(mut running) = node.running.take() else {
            return;
        };
        self.report.crashes += 1;
        self.report.count_repairs(&running.engine);
        // A server does not start before there is space.
        node.disk.set_full(None);
        node.stopped_at = running.storage.log_end();
        let cut = cut_of(&running.log_queue);
        node.cut_pending = node.cut_pending.into_iter().chain(cut).min();
        // Writes that were under way reach the disk in part.
        if !running.log_queue.is_empty() && self.rng.chance(700) {
            let operations = node.disk.stats().mutating_ops;
            node.disk.crash_at_op(operations + 1 + self.rng.below(3));
            let batch: Vec<_> = running.log_queue.drain(..).collect();
            let _ = running.storage.persist(&batch);
        }
        if let Some(Work::Checkpoint(checkpoint)) = running.checkpoint_queue.pop_front()
            && self.rng.chance(500)
        {
            let operations = node.disk.stats().mutating_ops;
            node.disk.crash_at_op(operations + 1 + self.rng.below(6));
            let _ = running.storage.checkpoint(checkpoint);
        }
        drop(running);
        node.hangs_until = 0;
        node.disk.power_cut(&mut self.rng);
        let id = node.id;
        self.trace(|| format!("server {id} loses power"));
    }

    /// After every input of a node: checks, then its actions, then its timer.
    fn after(&mut self, index: usize) -> Checked<()> {
        self.check_node(index)?;
        // Once in a turn; what is left has to wait for the next.
        let mut applied = false;
        loop {
            let now = self.clock(index);
            let Some(running) = &mut self.nodes[index].running else {
                return Ok(());
            };
            running.engine.finish_batch(now);
            running.engine.finish_reads(now);
            let mut actions = Vec::new();
            while let Some(action) = running.engine.poll_action() {
                actions.push(action);
            }
            if actions.is_empty() {
                if applied || !running.engine.has_chosen() {
                    break;
                }
                running.engine.apply_chosen(now);
                applied = true;
            }
            for action in actions {
                self.act(index, action)?;
            }
        }
        self.check_node(index)?;
        self.check_leases()?;
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        let stalled = running.engine.is_stalled();
        let before = std::mem::replace(&mut running.stalled, stalled);
        let copies = running.engine.is_installing();
        self.report.stalled_copies += u64::from(stalled && !before && copies);
        self.report.stalls += u64::from(stalled && !before);
        if let Some(failure) = running.engine.failure() {
            let failure = failure.to_string();
            self.trace(|| failure.clone());
            // A server that cannot go on stops, and comes back.
            self.crash(index);
            let at = self.now + self.rng.between(10 * MS, 500 * MS);
            self.schedule(at, Event::Start { node: index });
            return Ok(());
        }
        let timeout = running.engine.poll_timeout();
        let at = match running.engine.has_chosen() {
            true => self.now + MS / 10,
            false => self.when(index, timeout),
        };
        let life = self.nodes[index].life;
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        if at < running.timer_at || running.timer_at <= self.now {
            running.timer_at = at;
            self.schedule(at, Event::Timer { node: index, life });
        }
        Ok(())
    }

    fn act(&mut self, index: usize, action: Action) -> Checked<()> {
        let life = self.nodes[index].life;
        let id = self.nodes[index].id;
        match action {
            Action::Send { to, message } => {
                self.check_sent(index, &message)?;
                self.send(id, to, message);
            }
            Action::Persist { write, what } => {
                self.trace(|| format!("server {id} persists {}", summary(&what)));
                let Some(running) = &mut self.nodes[index].running else {
                    return Ok(());
                };
                running.log_queue.push_back((write, what));
                self.start_log(index);
            }
            Action::Reply { client, reply } => {
                self.check_error(id, &reply)?;
                let client = client.0 as usize;
                if client >= self.clients.len() {
                    return Ok(());
                }
                if let Some(delay) = self.client_delay() {
                    self.schedule(
                        self.now + delay,
                        Event::Answer {
                            client,
                            from: id,
                            reply,
                        },
                    );
                }
            }
            Action::ReadLog {
                to,
                after,
                until,
                bytes_max,
                tail_for,
            } => {
                let work = Work::ReadLog {
                    to,
                    after,
                    until,
                    bytes_max,
                    tail_for,
                };
                self.work(index, life, work);
            }
            Action::Read(read) => self.work(index, life, Work::Read(read)),
            Action::Export(export) => self.work(index, life, Work::Export(export)),
            Action::Digest(job) => self.work(index, life, Work::Digest(job)),
            Action::StoreBase {
                base,
                proven,
                marks,
                state,
            } => {
                self.report.copies += 1;
                if self.faults && self.rng.chance(300) {
                    self.fill_disk(index, 4);
                }
                let work = Work::StoreBase {
                    base,
                    proven,
                    marks,
                    state,
                };
                self.queue_checkpoint(index, work);
            }
            Action::Checkpoint(checkpoint) => {
                self.queue_checkpoint(index, Work::Checkpoint(checkpoint));
            }
            Action::Role(role) => {
                self.trace(|| format!("server {id}: {role:?}"));
                if let pss_core::paxos::output::RoleChange::Leader(ballot) = role {
                    self.leader_ballots.insert(ballot);
                }
            }
            Action::Shutdown | Action::Inspect { .. } => {}
        }
        Ok(())
    }

    fn work(&mut self, index: usize, life: u64, work: Work) {
        let at = self.now + self.rng.between(MS / 10, 5 * MS);
        self.schedule(
            at,
            Event::Work {
                node: index,
                life,
                work: Box::new(work),
            },
        );
    }

    fn start_log(&mut self, index: usize) {
        let delay = if self.nodes[index].crawls_until > self.now {
            self.crawl.between(70 * MS, 130 * MS)
        } else if self.nodes[index].slow_disk {
            self.rng.between(MS, 30 * MS)
        } else {
            self.rng.between(MS / 20, MS)
        };
        let node = &mut self.nodes[index];
        let life = node.life;
        let Some(running) = &mut node.running else {
            return;
        };
        if !running.log_busy && !running.log_queue.is_empty() {
            running.log_busy = true;
            self.schedule(self.now + delay, Event::LogDone { node: index, life });
        }
    }

    /// Checkpoints and bases are stored one after the other, by one thread.
    fn queue_checkpoint(&mut self, index: usize, work: Work) {
        if let Some(running) = &mut self.nodes[index].running {
            running.checkpoint_queue.push_back(work);
        }
        self.start_checkpoint(index);
    }

    fn start_checkpoint(&mut self, index: usize) {
        let delay = self.rng.between(MS, 40 * MS);
        let node = &mut self.nodes[index];
        let life = node.life;
        let Some(running) = &mut node.running else {
            return;
        };
        if !running.checkpoint_busy && !running.checkpoint_queue.is_empty() {
            running.checkpoint_busy = true;
            self.schedule(self.now + delay, Event::Stored { node: index, life });
        }
    }

    // ---- Network.

    fn index_of(&self, server: ServerId) -> Option<usize> {
        self.nodes.iter().position(|node| node.id == server)
    }

    fn send(&mut self, from: ServerId, to: ServerId, message: Message) {
        let (Some(a), Some(b)) = (self.index_of(from), self.index_of(to)) else {
            return;
        };
        let life = self.nodes[a].life_sent();
        let is_chunk = matches!(message, Message::Sync(SyncMessage::Chunk { .. }));
        if self.loses_chunks && is_chunk {
            return;
        }
        let is_entries = matches!(
            message,
            Message::Accept { .. } | Message::Chosen { .. } | Message::Sync(_)
        );
        if self.starves == Some(b) && is_entries {
            return;
        }
        if self.blocked[a][b] || self.rng.chance(self.loss_per_mille) {
            return;
        }
        let copies = if self.rng.chance(self.duplicate_per_mille) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let mut at = self.now + self.rng.between(MS / 20, self.delay_max);
            let late = match self.has_rivals() || self.has_wipes() {
                true if matches!(message, Message::Accepted { .. }) => 250,
                _ => 10,
            };
            if self.faults && message.is_datagram() && self.rng.chance(late) {
                // Lost in some queue, and found again.
                at += self.rng.below(4 * SECOND);
            }
            if !message.is_datagram() {
                let last = self.fifo.entry((from.0, to.0)).or_default();
                at = at.max(*last + 1);
                *last = at;
            }
            let message = message.clone();
            let event = Event::Message {
                from,
                life,
                to,
                message,
            };
            self.schedule(at, event);
        }
    }

    /// How long something takes between a client and a server; `None`: the connection broke.
    fn client_delay(&mut self) -> Option<u64> {
        if self.rng.chance(self.loss_per_mille / 2) {
            return None;
        }
        Some(self.rng.between(MS / 20, self.delay_max))
    }

    // ---- Events.

    fn handle(&mut self, event: Event) -> Checked<()> {
        let index = match &event {
            Event::Message { to, .. } | Event::Request { to, .. } => self.index_of(*to),
            Event::Timer { node, .. }
            | Event::LogDone { node, .. }
            | Event::Stored { node, .. }
            | Event::Work { node, .. } => Some(*node),
            _ => None,
        };
        if let Some(index) = index {
            let until = self.nodes[index].hangs_until;
            if until > self.now && matches!(event, Event::LogDone { .. } | Event::Stored { .. }) {
                // What hangs for good ends with the power.
                if until < u64::MAX {
                    self.schedule(until, event);
                }
                return Ok(());
            }
            if self.nodes[index].paused_until > self.now {
                self.nodes[index].waiting.push(event);
                return Ok(());
            }
            return self.handle_at(index, event);
        }
        match event {
            Event::Start { node } => self.start(node),
            Event::Resume { node } => {
                for event in std::mem::take(&mut self.nodes[node].waiting) {
                    self.schedule(self.now, event);
                }
                Ok(())
            }
            Event::Space { node } => {
                self.nodes[node].disk.set_full(None);
                Ok(())
            }
            Event::Client { client } => {
                self.client_step(client);
                if !self.clients[client].is_done() {
                    let again = self.now + self.rng.between(5 * MS, 60 * MS);
                    self.schedule(again, Event::Client { client });
                }
                Ok(())
            }
            Event::Answer {
                client,
                from,
                reply,
            } => {
                let now = self.now;
                self.clients[client].take(now, from, reply, &mut self.history);
                self.client_step(client);
                Ok(())
            }
            Event::Fault => self.fault(),
            Event::Change => self.change(),
            Event::Rot => {
                self.rot_chunk();
                Ok(())
            }
            Event::Heal => self.heal(),
            _ => Ok(()),
        }
    }

    fn handle_at(&mut self, index: usize, event: Event) -> Checked<()> {
        let now = self.clock(index);
        let life_now = self.nodes[index].life;
        let node = &mut self.nodes[index];
        let (disk_log, rotted) = (&mut node.disk_log, &mut node.rotted);
        let is_plain = &mut node.is_plain;
        let Some(running) = &mut node.running else {
            return Ok(());
        };
        // Each server has its own idea of the time of day.
        running.engine.set_wall_clock(now.0 / 1_000_000);
        match event {
            Event::Message {
                from,
                life,
                message,
                ..
            } => {
                running.engine.handle_message(now, from, life, message);
            }
            Event::Request {
                client, request, ..
            } => {
                let id = ClientId(client as u64);
                running
                    .engine
                    .note_client(id, self.clients[client].address());
                running.engine.handle_request(now, id, request);
            }
            Event::Timer { life, .. } if life == life_now => {
                running.timer_at = u64::MAX;
                let (free, first, bytes) = running.storage.facts();
                running.engine.note_storage(free, first, bytes);
                running.engine.handle_timeout(now);
                let drops = running.engine.drops_entries(now);
                self.report.drops += u64::from(drops && !running.drops);
                running.drops = drops;
                let slot = running.engine.trim_slot();
                if let Err(error) = running.storage.trim(slot) {
                    return self.disk_failed(index, &error);
                }
            }
            Event::LogDone { life, .. } if life == life_now => {
                let batch: Vec<_> = running.log_queue.drain(..).collect();
                running.log_busy = false;
                if let Err(error) = running.storage.persist(&batch) {
                    // Any part of it may have happened.
                    let cut = cut_of(&batch);
                    self.nodes[index].cut_pending = cut;
                    return self.disk_failed(index, &error);
                }
                for (write, what) in batch {
                    note_durable(disk_log, rotted, &what);
                    *is_plain &= !matches!(what, Persist::Rejoining(Some(_)));
                    running.engine.handle_persisted(now, write);
                }
                self.after(index)?;
                self.start_log(index);
                return self.mark_idle(index);
            }
            Event::Stored { life, .. } if life == life_now => return self.store(index),
            Event::Work { life, work, .. } if life == life_now => {
                return self.do_work(index, *work);
            }
            _ => return Ok(()),
        }
        self.after(index)
    }

    /// A log that has nothing to do says so now and then.
    fn mark_idle(&mut self, index: usize) -> Checked<()> {
        let marks = self.rng.chance(200);
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        if !marks || running.log_busy {
            return Ok(());
        }
        let chosen = running.engine.replica().chosen();
        match running.storage.mark_idle(chosen) {
            Ok(()) => Ok(()),
            Err(error) => self.disk_failed(index, &error),
        }
    }

    fn do_work(&mut self, index: usize, work: Work) -> Checked<()> {
        let now = self.clock(index);
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        match work {
            Work::ReadLog {
                to,
                after,
                until,
                bytes_max,
                tail_for,
            } => {
                let read = running.storage.read_log(after, until, bytes_max);
                running.engine.handle_log_read(now, to, tail_for, read);
            }
            Work::Read(read) => {
                let result = read.run(&running.storage.chunks);
                running.engine.handle_read(now, read, result);
            }
            Work::Export(export) => {
                let exported = export.run(&running.storage.chunks);
                running.engine.handle_exported(now, export, exported);
            }
            Work::Digest(job) => {
                let part = job.run(&running.storage.chunks);
                running.engine.handle_digested(now, job, part);
            }
            Work::StoreBase { .. } | Work::Checkpoint(_) => {}
        }
        self.after(index)
    }

    /// Stores the checkpoint or base that is next, and begins with the one behind it.
    fn store(&mut self, index: usize) -> Checked<()> {
        let now = self.clock(index);
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        running.checkpoint_busy = false;
        let stored = match running.checkpoint_queue.pop_front() {
            Some(Work::Checkpoint(checkpoint)) => {
                let slot = match checkpoint.flush_only {
                    true => Slot(0),
                    false => checkpoint.applied.slot,
                };
                let stored = running.storage.checkpoint(checkpoint);
                stored.map(|()| running.engine.handle_checkpoint_done(slot))
            }
            Some(Work::StoreBase {
                base,
                proven,
                marks,
                state,
            }) => running
                .storage
                .store_base(base, proven, &marks, &state)
                .map(|()| {
                    running.engine.handle_base_stored(now);
                }),
            _ => Ok(()),
        };
        if let Err(error) = stored {
            return self.disk_failed(index, &error);
        }
        let slot = running.engine.trim_slot();
        if let Err(error) = running.storage.trim(slot) {
            return self.disk_failed(index, &error);
        }
        self.start_checkpoint(index);
        self.after(index)
    }

    fn disk_failed(&mut self, index: usize, error: &str) -> Checked<()> {
        let id = self.nodes[index].id;
        self.trace(|| format!("server {id}: {error}"));
        self.crash(index);
        let at = self.now + self.rng.between(10 * MS, SECOND);
        self.schedule(at, Event::Start { node: index });
        Ok(())
    }

    fn client_step(&mut self, client: usize) {
        let now = self.now;
        let servers = self.core as u64;
        let (rng, history) = (&mut self.rng, &mut self.history);
        let requests = self.clients[client].step(now, servers, rng, &self.ground, history);
        self.send_requests(client, requests);
    }

    fn send_requests(&mut self, client: usize, requests: Vec<Request>) {
        let mut to = self.clients[client].server;
        if self.index_of(to).is_none_or(|index| index >= self.core) {
            to = ServerId(0);
            self.clients[client].server = to;
        }
        for request in requests {
            if let Some(delay) = self.client_delay() {
                self.schedule(
                    self.now + delay,
                    Event::Request {
                        client,
                        to,
                        request,
                    },
                );
            }
        }
    }

    fn create_volumes(&mut self) -> Checked<()> {
        // Through the log, like everything; the answer is looked up in the leader's state.
        for name in ["vol001", "vol002"] {
            let until = self.now + CALM;
            loop {
                if self.now > until {
                    return self.fail("liveness: no leader at the start");
                }
                self.step()?;
                let leader = self.nodes.iter().position(|node| {
                    let role = node.running.as_ref().map(|it| it.engine.replica().role());
                    role == Some(RoleKind::Leader { serving: true })
                });
                let Some(index) = leader else { continue };
                let Some(running) = &mut self.nodes[index].running else {
                    continue;
                };
                if let Some(volume) = running.engine.state().volume_named(name) {
                    self.ground.volumes.push(volume.id);
                    break;
                }
                let body = RequestBody::CreateVolume {
                    name: name.to_owned(),
                    size_bytes: VOLUME_BLOCKS * 4096,
                    chunk_bytes: CHUNK_BYTES_MIN,
                    uuid: [7; 16],
                };
                self.create_volume(index, body);
                self.after(index)?;
            }
        }
        let volumes: Vec<VolumeId> = self.ground.volumes.clone();
        self.trace(|| format!("volumes {volumes:?}"));
        Ok(())
    }

    fn create_volume(&mut self, index: usize, body: RequestBody) {
        let RequestBody::CreateVolume {
            name,
            size_bytes,
            chunk_bytes,
            uuid,
        } = body
        else {
            return;
        };
        let op = pss_core::entry::Op::CreateVolume {
            name,
            size_bytes,
            chunk_bytes,
            uuid,
        };
        let command = pss_core::entry::Command::internal(op);
        if let Some(running) = &mut self.nodes[index].running {
            // One at a time: a second one of the same name is refused anyway.
            let _ = running.engine.replica_mut().propose(vec![command]);
        }
    }

    // ---- Changes of the servers.

    /// The servers of the file that a server is started with; `has_list`: its own log has a list.
    fn file_of(&mut self, index: usize, has_list: bool) -> Membership {
        let is_late = has_list || self.config.bug == Some(SimBug::Agreement(Bug::ListByFile));
        let mut listed = self.listed.clone();
        if edits_files(self.config.seed) && is_late && self.now > SECOND && self.changes.chance(500)
        {
            let me = self.nodes[index].id;
            let changes = &mut self.changes;
            listed.retain(|id| *id == me || changes.chance(500));
            if !listed.iter().any(|id| id.is_core()) {
                listed.push(ServerId(0));
            }
        }
        Membership::new(listed)
    }

    /// Who the servers are, by the newest list that is chosen.
    fn members(&self) -> Membership {
        let running = self.nodes.iter().filter_map(|it| it.running.as_ref());
        let lists = running.filter_map(|it| it.engine.state().members());
        match lists.max_by_key(|it| it.version) {
            Some(members) => members.membership(),
            None => Membership::new(self.listed.iter().copied()),
        }
    }

    /// Servers come and go while everything else goes wrong.
    fn change(&mut self) -> Checked<()> {
        if !self.faults {
            return Ok(());
        }
        let next = self.now + self.changes.between(5 * MS, 400 * MS);
        self.schedule(next, Event::Change);
        let Some(index) = self.nodes.iter().position(Node::leads) else {
            return Ok(());
        };
        let now = self.clock(index);
        let count = self.nodes.len() as u64;
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        let replica = running.engine.replica();
        let member = |id: ServerId, core: bool| Member {
            id,
            core,
            host: format!("10.0.0.{id}"),
            path: "/data".to_owned(),
        };
        let mut members = match replica.members() {
            Some(members) => Members::clone(members),
            None => {
                let list = self.listed.iter().map(|id| member(*id, id.is_core()));
                let list = list.collect();
                Members {
                    list,
                    ..Members::default()
                }
            }
        };
        members.version += 1;
        let id = ServerId(self.changes.below(count) as u8);
        let core = members.list.iter().filter(|it| it.core).count();
        match members.list.iter().position(|it| it.id == id) {
            None => members.list.push(member(id, false)),
            Some(at) if members.list[at].core => {
                if core <= 2 {
                    return Ok(());
                }
                match self.changes.chance(500) {
                    true => members.list[at].core = false,
                    false => drop(members.list.remove(at)),
                }
            }
            Some(at) => match self.changes.chance(700) {
                true => members.list[at].core = true,
                false => drop(members.list.remove(at)),
            },
        }
        if self.config.bug == Some(SimBug::Agreement(Bug::ChangeMany)) {
            for member in &mut members.list {
                member.core |= self.changes.chance(500);
            }
        }
        members.list.sort_by_key(|it| it.id);
        let text = members.to_string();
        let changed = running.engine.change_members(now, members);
        self.report.changes += u64::from(changed.is_ok());
        self.trace(|| format!("{text}: {changed:?}"));
        self.after(index)
    }

    // ---- Faults.

    /// Some cells live with nothing but rivals: leaders are cut off with a minority while others win, and
    /// are let in again, so that logs of several ballots stand against each other.
    fn has_rivals(&self) -> bool {
        self.config.seed % 4 == 1
    }

    /// Disks of some cells are wiped now and then, as many at a time as may be lost.
    fn has_wipes(&self) -> bool {
        // Rot takes one server's copies, so that five servers can bear another one without any.
        let rots = self.config.seed.is_multiple_of(4) && self.core == 5;
        self.config.seed % 4 == 2 || self.config.seed % 16 == 1 || rots
    }

    /// A server gets an empty disk. Mostly it is told so; a directory that was formatted as if the server were new is
    /// found out, as long as the others know which lives count.
    fn wipe(&mut self, index: usize) -> Checked<()> {
        let id = self.nodes[index].id;
        let core = &self.nodes[..self.core];
        // One that is wiped may be wiped again before it counts.
        let away = |node: &Node| node.id != id && (node.wiped.is_some() || node.is_lost);
        let is_core = index < self.core;
        let victim = (self.config.seed / 4) as usize % self.core;
        let rots = self.config.seed.is_multiple_of(4);
        let most = (self.core - 1) / 2 - usize::from(rots);
        if rots && index == victim {
            return Ok(());
        }
        if is_core && core.iter().filter(|it| away(it)).count() >= most {
            return Ok(());
        }
        let knows = |node: &Node| {
            let running = node.running.as_ref();
            let admitted = running.map(|it| it.engine.replica().admitted());
            node.id == id || admitted.is_some_and(|it| it.of(id) > Incarnation(0))
        };
        let known = core.iter().all(knows);
        let is_plain = is_core && known && self.rng.chance(300);
        self.crash(index);
        self.report.wipes += 1;
        self.report.plain_wipes += u64::from(is_plain);
        let node = &mut self.nodes[index];
        node.incarnation.0 += 10;
        node.disk = new_disk(self.config.seed ^ node.incarnation.0, id.0);
        let held = std::mem::take(&mut node.disk_log);
        // What it held before it counted again helped to choose nothing.
        node.wiped = node.wiped.take().or(is_core.then_some(held));
        node.is_plain = is_plain;
        node.restored = None;
        node.promised = Ballot::default();
        node.rotted.clear();
        node.rot_pending = false;
        node.cut_pending = None;
        let rejoining = is_core && !is_plain;
        let formatted = sim_storage::format(&node.disk, id, node.incarnation, rejoining);
        self.trace(|| format!("the disk of server {id} is wiped, plain: {is_plain}"));
        if let Err(error) = formatted {
            return self.fail(format!("format: {error}"));
        }
        let at = self.now + self.rng.between(10 * MS, SECOND);
        self.schedule(at, Event::Start { node: index });
        Ok(())
    }

    /// A step of rivalry, about as often as a leader can be elected.
    fn rivalry(&mut self) {
        let leader = self.nodes.iter().position(Node::leads);
        // A leader that has just won may be cut off before others know much of it.
        let ballot = leader.map(|index| self.nodes[index].promised);
        let is_new = ballot > self.rival;
        self.rival = ballot.max(self.rival);
        if leader.is_none() && self.rng.chance(900) {
            return self.schedule(self.now + 20 * MS, Event::Fault);
        }
        let next = match is_new && self.rng.chance(500) {
            true => self.now + self.rng.between(MS, 60 * MS),
            false => self.now + self.rng.between(300 * MS, 1500 * MS),
        };
        self.schedule(next, Event::Fault);
        let count = self.nodes.len();
        self.blocked.iter_mut().flatten().for_each(|it| *it = false);
        match (self.rng.below(10), leader) {
            (0..=5, Some(leader)) => {
                // With as many others as make no majority.
                let mut inside = vec![false; count];
                inside[leader] = true;
                for _ in 1..self.core.div_ceil(2) {
                    inside[self.rng.below(count as u64) as usize] |= self.rng.chance(700);
                }
                for a in 0..count {
                    for b in 0..count {
                        self.blocked[a][b] = inside[a] != inside[b];
                    }
                }
                self.trace(|| format!("cut off: {inside:?}"));
                if self.rng.chance(200) {
                    // The others start again at once: they no longer know whom they granted a lease.
                    for index in (0..count).filter(|it| !inside[*it]) {
                        self.crash(index);
                        let at = self.now + self.rng.between(5 * MS, 60 * MS);
                        self.schedule(at, Event::Start { node: index });
                    }
                }
            }
            (6 | 7, Some(leader)) => self.crash_for_a_while(leader),
            (8, _) => {
                let index = self.rng.below(count as u64) as usize;
                self.crash_for_a_while(index);
            }
            _ => {}
        }
    }

    fn fault(&mut self) -> Checked<()> {
        if !self.faults {
            return Ok(());
        }
        if self.has_wipes() && self.rng.chance(120) {
            let leader = self.nodes.iter().position(Node::leads);
            let index = self.rng.below(self.nodes.len() as u64) as usize;
            let index = leader.filter(|_| self.rng.chance(300)).unwrap_or(index);
            self.wipe(index)?;
        }
        if self.has_rivals() {
            self.rivalry();
            return Ok(());
        }
        let next = self.now + self.rng.between(10 * MS, 700 * MS);
        self.schedule(next, Event::Fault);
        let index = self.rng.below(self.nodes.len() as u64) as usize;
        match self.rng.below(18) {
            0..=2 => self.crash_for_a_while(index),
            3 => {
                // A power cut of everything.
                if self.rng.chance(500) {
                    for index in 0..self.nodes.len() {
                        self.crash_for_a_while(index);
                    }
                }
            }
            4 | 5 => self.partition(),
            6 => self.blocked.iter_mut().flatten().for_each(|it| *it = false),
            7 => {
                self.loss_per_mille = self.rng.below(300);
                self.duplicate_per_mille = self.rng.below(200);
                self.delay_max = MS / 2 + self.rng.below(60 * MS);
            }
            8 => {
                self.loss_per_mille = 0;
                self.delay_max = MS / 2;
            }
            9 | 10 => {
                let until = self.now + self.rng.between(50 * MS, 3 * SECOND);
                let node = &mut self.nodes[index];
                if node.paused_until <= self.now {
                    node.paused_until = until;
                    self.schedule(until, Event::Resume { node: index });
                }
            }
            11 => {
                // The leader's machine stops and comes back: it may still believe that it leads.
                let leader = self.nodes.iter().position(Node::leads);
                if let Some(index) = leader.filter(|it| self.nodes[*it].paused_until <= self.now) {
                    let until = self.now + self.rng.between(300 * MS, 2 * SECOND);
                    self.nodes[index].paused_until = until;
                    self.schedule(until, Event::Resume { node: index });
                }
            }
            12 => {
                let leader = self.nodes.iter().position(Node::leads);
                let index = leader.filter(|_| self.rng.chance(600)).unwrap_or(index);
                let until = self.now + self.rng.between(SECOND / 10, 6 * SECOND);
                self.hang(index, until);
            }
            13 => {
                let lost = self.nodes[index].disk.fail_write_back("data/");
                self.report.lost_writes += u64::from(lost > 0);
                let id = self.nodes[index].id;
                self.trace(|| format!("server {id} cannot write back {lost} files"));
            }
            14 | 15 => {
                // One that copies chunks, if there is one.
                let copies = |node: &Node| {
                    let running = node.running.as_ref();
                    running.is_some_and(|it| it.engine.is_installing())
                };
                let index = self.nodes.iter().position(copies).unwrap_or(index);
                if self.nodes[index].running.is_some() {
                    self.fill_disk(index, 20);
                }
            }
            16 => {
                let client = self.rng.below(self.clients.len() as u64) as usize;
                self.clients[client].crash();
            }
            _ => {
                let leader = self.nodes.iter().position(Node::leads);
                if let Some(index) = leader {
                    if self.rng.chance(300) {
                        let now = self.clock(index);
                        if let Some(running) = &mut self.nodes[index].running {
                            running.engine.hand_over(now);
                            return self.after(index);
                        }
                    } else if self.rng.chance(300) {
                        self.nodes[index].disk.fail_write(self.rng.below(4));
                    } else {
                        self.crash_for_a_while(index);
                    }
                }
            }
        }
        Ok(())
    }

    /// For a while the disk has space for a few blocks of volumes only. (Chunks that are copied find some:
    /// a server that lacks it for them stops.)
    fn fill_disk(&mut self, index: usize, most: u64) {
        let pages = self.rng.below(most);
        let node = &self.nodes[index];
        node.disk.set_full(Some(("data/", pages)));
        let id = node.id;
        self.trace(|| format!("the disk of server {id} is full"));
        let until = self.now + self.rng.between(20 * MS, 2 * SECOND);
        self.schedule(until, Event::Space { node: index });
    }

    fn crash_for_a_while(&mut self, index: usize) {
        self.crash(index);
        // Some stay down long enough for the log to be trimmed meanwhile.
        let long = self.rng.chance(200);
        let most = if long { 8 * SECOND } else { SECOND };
        let at = self.now + self.rng.between(10 * MS, most);
        self.schedule(at, Event::Start { node: index });
        self.damage_log(index);
    }

    /// Bit rot in the log. The faults have a budget: damage takes copies on one server only, so that of
    /// every chosen entry it takes fewer than others may lose by being away; and that server's next bit
    /// rots only after it has got back what the last one took, because a record and all traces of it
    /// gone together are more than one fault.
    fn damage_log(&mut self, index: usize) {
        let seed = self.config.seed;
        let victim = (seed / 4) as usize % self.core;
        let node = &mut self.nodes[index];
        let may = node.running.is_none() && !node.rot_pending && node.rotted.is_empty();
        if !seed.is_multiple_of(4) || index != victim || !may || !self.rng.chance(300) {
            return;
        }
        let (path, end) = &node.stopped_at;
        let rot = if self.rng.chance(500) && *end > 0 {
            // What was written last is what matters most.
            let back = self.rng.below((*end).min(24 << 10));
            let at = *end - 1 - back;
            let hit = node.disk.flip_bit(path, at, self.rng.below(8) as u8);
            hit.then(|| (path.clone(), at))
        } else {
            node.disk.flip_random_bit("log/", &mut self.rng)
        };
        node.rot_pending = rot.is_some();
        self.report.rots += u64::from(rot.is_some());
        let id = node.id;
        self.trace(|| format!("a bit rots in the log of server {id}: {rot:?}"));
    }

    /// Chunks of some cells rot. In half of them tables do too; in the others writes of blocks are lost or go elsewhere. (Both
    /// in one chunk of a server are more than it can notice: an old block that an old table says is right.)
    ///
    /// The faults have a budget: of every chunk they hit the copies of as few servers as may be lost, and while all are there and
    /// complete, of all but one.
    fn has_chunk_rot(&self) -> bool {
        self.config.seed % 8 == 7
    }

    fn has_table_rot(&self) -> bool {
        self.config.seed % 16 == 15
    }

    /// Whether chunks are being copied to all core servers but for as few as may have damaged copies: what the others had they
    /// have not any more, and what these have lost nobody can give them. The copying waits for ever then.
    fn is_out_of_budget(&self) -> bool {
        let is_complete = |node: &&Node| {
            let running = node.running.as_ref();
            running.is_some_and(|it| !it.engine.is_installing())
        };
        let complete = self.nodes[..self.core].iter().filter(is_complete).count();
        self.has_chunk_rot() && complete <= self.rots_at
    }

    /// Makes the disks unreliable, and things rot from time to time.
    fn begin_rotting(&mut self) {
        if !self.has_chunk_rot() {
            return;
        }
        self.rots = true;
        self.let_writes_stray(self.core.div_ceil(2) - 1);
        self.schedule(self.now, Event::Rot);
    }

    /// From now on `most` core servers have damaged copies of a chunk.
    fn let_writes_stray(&mut self, most: usize) {
        self.rots_at = most;
        if self.has_table_rot() {
            return;
        }
        for index in 0..self.nodes.len() {
            let (seed, core) = (self.config.seed, self.core);
            let unreliable = Unreliable {
                per_mille: 30,
                rng: Rng::new(self.rot.next()),
                may: Box::new(move |path, _| may_rot(path, seed, core, most, index)),
                end_bytes: u64::from(CHUNK_BYTES_MIN),
            };
            self.nodes[index].disk.set_unreliable(Some(unreliable));
        }
    }

    /// A bit rots in a block, or in a table, of a server that runs or not.
    fn rot_chunk(&mut self) {
        if !self.rots {
            return;
        }
        let next = self.now + self.rot.between(5 * MS, 150 * MS);
        self.schedule(next, Event::Rot);
        let index = self.rot.below(self.nodes.len() as u64) as usize;
        let node = &self.nodes[index];
        let files = node.disk.files().into_iter().map(|(path, _)| path);
        let (seed, core, most) = (self.config.seed, self.core, self.rots_at);
        let may = |it: &String| may_rot(it, seed, core, most, index);
        let files: Vec<String> = files.filter(may).collect();
        if files.is_empty() {
            return;
        }
        let path = self.rot.pick(&files).clone();
        let data = u64::from(CHUNK_BYTES_MIN);
        let (offset, bit) = match self.has_table_rot() && self.rot.chance(250) {
            // In one table or both.
            true => (data + self.rot.below(2) * 4096 + self.rot.below(136), 2),
            false => {
                let blocks = [0, 1, 2, 8, 15, self.rot.below(16)];
                let block = *self.rot.pick(&blocks);
                (block * 4096 + self.rot.below(4096), self.rot.below(8) as u8)
            }
        };
        let mut hit = node.disk.flip_bit(&path, offset, bit);
        if offset >= data {
            if self.rot.chance(500) {
                let other = data + (offset - data + 4096) % 8192;
                hit |= node.disk.flip_bit(&path, other, bit);
            }
            self.report.table_rots += u64::from(hit);
            self.table_rots.insert(path.clone());
        } else {
            self.report.block_rots += u64::from(hit);
        }
        let id = node.id;
        self.trace(|| format!("server {id}: {path} rots at {offset}"));
    }

    /// Nothing but rot: whoever asks gets right answers, and no errors. In the end nothing is left of it.
    fn rot_in_calm(&mut self) -> Checked<()> {
        if !self.has_chunk_rot() {
            return Ok(());
        }
        // What could not be repaired while servers were away is given up by then.
        let from = self.now + 6 * SECOND;
        while self.now < from {
            self.step()?;
        }
        self.calm_since = Some(self.now);
        // What rotted before must not be the last good copy of what rots now.
        self.rots_at = 0;
        self.repair_everything()?;
        self.let_writes_stray(self.core - 1);
        self.write(30)?;
        (self.rots, self.rots_at) = (false, 0);
        for node in &self.nodes {
            node.disk.set_unreliable(None);
        }
        self.repair_everything()?;
        // Tables that rotted while they were in memory are found when they are read again.
        for index in 0..self.nodes.len() {
            self.crash(index);
            self.schedule(self.now, Event::Start { node: index });
            self.step_until("it starts again", Sim::has_converged)?;
        }
        self.repair_everything()
    }

    /// Until nothing is damaged on any server, and what was repaired is durable.
    fn repair_everything(&mut self) -> Checked<()> {
        // Every server is made to look at everything that it has.
        let until = self.now + CALM;
        let mut next = self.now;
        while let Some(bad) = self.damaged() {
            if self.now > until {
                return self.fail(format!("liveness: damage is not repaired: {bad}"));
            }
            if self.now >= next {
                next = self.now + SECOND;
                for index in 0..self.nodes.len() {
                    self.look_at_everything(index)?;
                }
            }
            let soon = self.now + 50 * MS;
            while self.now < soon {
                self.step()?;
            }
        }
        // A checkpoint is made now and then.
        let until = self.now + 12 * SECOND;
        while self.now < until {
            self.step()?;
        }
        self.step_until("every server reaches the same slot", Sim::has_converged)
    }

    /// Reads all blocks of all volumes of one server.
    fn look_at_everything(&mut self, index: usize) -> Checked<()> {
        let now = self.clock(index);
        let Some(running) = &mut self.nodes[index].running else {
            return Ok(());
        };
        let volumes = running.engine.state().volumes();
        let volumes: Vec<(VolumeId, u64)> = volumes.map(|it| (it.id, it.size_bytes)).collect();
        for (volume, size_bytes) in volumes {
            let what = Browse::Read {
                volume,
                offset_bytes: 0,
                length_bytes: size_bytes.min(1 << 20) as u32,
            };
            let request = Request {
                tag: 0,
                session: SessionId(0),
                number: RequestNumber(0),
                settled_below: RequestNumber(0),
                body: RequestBody::Browse { stale: true, what },
            };
            // Nobody waits for the answer.
            let nobody = ClientId(u64::MAX);
            running.engine.handle_request(now, nobody, request);
        }
        self.after(index)
    }

    /// Says which block is damaged somewhere, if one is.
    fn damaged(&self) -> Option<String> {
        for node in &self.nodes {
            let Some(running) = &node.running else {
                return Some(format!("server {} is down", node.id));
            };
            for volume in running.engine.state().volumes() {
                let chunks = &running.storage.chunks;
                match chunks.find_bad(volume, 0, volume.blocks(), 1) {
                    Ok(bad) if bad.is_empty() => {}
                    bad => return Some(format!("server {}, {}: {bad:?}", node.id, volume.name)),
                }
            }
        }
        None
    }

    /// Nobody is told that a block cannot be read if a good copy can be reached.
    fn check_error(&self, server: ServerId, reply: &Reply) -> Checked<()> {
        let is_error = matches!(reply.body, Err(ReplyError::Io));
        let calm = self.calm_since.is_some() || !self.has_chunk_rot();
        match is_error && calm {
            true => self.fail(format!("server {server} says that a block cannot be read")),
            false => Ok(()),
        }
    }

    fn partition(&mut self) {
        let count = self.nodes.len();
        let one_way = self.rng.chance(400);
        let sides: Vec<bool> = (0..count).map(|_| self.rng.chance(500)).collect();
        for a in 0..count {
            for b in 0..count {
                self.blocked[a][b] = sides[a] != sides[b] && (!one_way || sides[a]);
            }
        }
        if self.rng.chance(300) {
            // Every link by itself: majorities that are no groups.
            for a in 0..count {
                for b in 0..count {
                    self.blocked[a][b] = self.rng.chance(400);
                }
            }
        }
        self.trace(|| format!("partition {sides:?} one-way {one_way}"));
    }

    fn heal(&mut self) -> Checked<()> {
        self.trace(|| "faults stop".to_owned());
        self.faults = false;
        self.blocked.iter_mut().flatten().for_each(|it| *it = false);
        self.loss_per_mille = 0;
        self.duplicate_per_mille = 0;
        self.delay_max = MS / 2;
        for index in 0..self.nodes.len() {
            self.nodes[index].paused_until = 0;
            self.nodes[index].disk.set_full(None);
            self.nodes[index].hangs_until = self.nodes[index].hangs_until.min(self.now + SECOND);
            self.schedule(self.now, Event::Resume { node: index });
            self.schedule(self.now, Event::Start { node: index });
        }
        Ok(())
    }

    // ---- Checkers.

    /// Nothing is said before it is durable.
    fn check_sent(&self, index: usize, message: &Message) -> Checked<()> {
        let node = &self.nodes[index];
        let Some(running) = &node.running else {
            return Ok(());
        };
        let replica = running.engine.replica();
        let id = node.id;
        // What it says before it finds out is worth nothing to others.
        let learns = node.wiped.is_some() && !node.is_plain;
        match message {
            Message::Promise { .. } | Message::Accepted { .. } | Message::HeartbeatAck { .. }
                if learns =>
            {
                self.fail(format!("server {id} counts while it learns"))
            }
            Message::Promise { ballot, .. } if replica.promised_durable() < *ballot => {
                self.fail(format!("server {id} sends a promise that is not durable"))
            }
            Message::Accepted { durable, .. } | Message::HeartbeatAck { durable, .. }
                if replica.durable() < *durable =>
            {
                self.fail(format!("server {id} acknowledges what is not durable"))
            }
            _ => Ok(()),
        }
    }

    /// What a leader calls chosen lies on the disks of a majority. A copy that has rotted counts: it was
    /// there when the server said so.
    fn check_majority(&self, leader: usize, slot: Slot, entry: EntryId) -> Checked<()> {
        let lists = |node: &Node| {
            let running = node.running.as_ref();
            running.map(|it| it.engine.replica().membership().core.clone())
        };
        let listed = lists(&self.nodes[leader]).unwrap_or_default();
        let core = self.nodes.iter().filter(|it| listed.contains(&it.id));
        let admitted = self.nodes[leader].running.as_ref();
        let admitted = admitted.map(|it| it.engine.replica().admitted());
        // What a disk held that was wiped since counts until the leader knows: it cannot be lost but with another
        // server, and nobody votes instead.
        let was_there = |node: &Node| {
            let known = admitted.is_some_and(|it| it.of(node.id) >= node.incarnation);
            let wiped = node.wiped.as_ref().filter(|_| !known);
            wiped.is_some_and(|wiped| wiped.get(&slot) == Some(&entry))
        };
        let holds = |node: &&Node| match node.disk_log.get(&slot) {
            _ if node.wiped.is_some() => was_there(node),
            _ if node.rotted.get(&slot) == Some(&entry) => true,
            Some(held) => *held == entry,
            // Its log begins later: the entry is in its chunks.
            None => node
                .disk_log
                .keys()
                .next()
                .is_some_and(|first| *first > slot),
        };
        let holders = core.clone().filter(holds).count();
        if holders <= listed.len() / 2 {
            return self.fail(format!(
                "slot {slot} is called chosen, but {holders} of servers {listed:?} hold {entry}"
            ));
        }
        // And no majority could elect a log without it: the logs are ordered by their last entries.
        let votes = |node: &&Node| node.wiped.is_none();
        for rival in core.filter(votes).filter(|node| !holds(node)) {
            // It goes by the list in its own log.
            let listed = lists(rival).unwrap_or_else(|| listed.clone());
            let core = self.nodes.iter().filter(|it| listed.contains(&it.id));
            let voters = core
                .filter(votes)
                .filter(|node| node.log_last() <= rival.log_last());
            if listed.contains(&rival.id) && voters.count() > listed.len() / 2 {
                let (id, last) = (rival.id, rival.log_last());
                return self.fail(format!(
                    "slot {slot} is called chosen with {entry}, but server {id} may still win with \
                     {last}"
                ));
            }
        }
        Ok(())
    }

    fn check_node(&mut self, index: usize) -> Checked<()> {
        let node = &mut self.nodes[index];
        let Some(running) = &node.running else {
            return Ok(());
        };
        let replica = running.engine.replica();
        let id = node.id;
        let promised = replica.promised_durable();
        if promised < node.promised || replica.promised() < promised {
            return self.fail(format!("server {id}: the promise went back"));
        }
        node.promised = promised;
        if replica.applied() > replica.chosen() {
            return self.fail(format!("server {id}: applied beyond what is chosen"));
        }
        if replica.is_rejoining()
            && index < self.core
            && node.wiped.is_none()
            && node.restored.is_none()
            && !node.given_up
        {
            return self.fail(format!("server {id} has forgotten nothing and rejoins"));
        }
        let (from, until) = (node.seen_chosen, replica.chosen());
        let leads = matches!(replica.role(), RoleKind::Leader { .. });
        node.seen_chosen = until;
        let mut fresh = Vec::new();
        for slot in from.0 + 1..=until.0 {
            let Some(entry) = replica.entry_id(Slot(slot)) else {
                continue;
            };
            if leads && !self.chosen.contains_key(&Slot(slot)) {
                fresh.push((Slot(slot), entry));
            }
            let first = *self.chosen.entry(Slot(slot)).or_insert(entry);
            if first != entry {
                let what = format!("server {id}: slot {slot} is {entry} and was {first}");
                return Err(Failure {
                    seed: self.config.seed,
                    at: self.now,
                    what,
                });
            }
        }
        for (slot, entry) in fresh {
            self.check_majority(index, slot, entry)?;
        }
        self.check_learned(index)
    }

    /// Who counts again after its disk was wiped holds what its earlier life may have helped to choose.
    fn check_learned(&mut self, index: usize) -> Checked<()> {
        let node = &self.nodes[index];
        let (Some(running), Some(wiped)) = (&node.running, &node.wiped) else {
            return Ok(());
        };
        let replica = running.engine.replica();
        let is_admitted = replica.admitted().of(node.id) == replica.incarnation();
        // Who was restored has to find out before it says anything.
        let knows = node.restored != Some(replica.incarnation());
        if replica.is_rejoining() || !is_admitted || !knows {
            return Ok(());
        }
        let first = node.disk_log.keys().next().copied();
        let in_chunks = |slot: Slot| first.is_some_and(|first| first > slot);
        for (slot, entry) in wiped {
            let is_chosen = self.chosen.get(slot) == Some(entry);
            let is_here = match in_chunks(*slot) {
                true => !running.engine.is_installing(),
                false => node.disk_log.get(slot) == Some(entry),
            };
            if is_chosen && !is_here {
                let id = node.id;
                return self.fail(format!("server {id} counts and has not learned {entry}"));
            }
        }
        self.nodes[index].wiped = None;
        Ok(())
    }

    /// At most one server may serve reads at any moment.
    fn check_leases(&mut self) -> Checked<()> {
        let mut holder = None;
        for index in 0..self.core {
            let now = self.clock(index);
            let node = &self.nodes[index];
            let Some(running) = &node.running else {
                continue;
            };
            if running.engine.replica().may_read(now) {
                if let Some(other) = holder {
                    let id = node.id;
                    return self.fail(format!("servers {other} and {id} hold the lease at once"));
                }
                holder = Some(node.id);
            }
        }
        Ok(())
    }

    fn has_converged(&self) -> bool {
        let applied = |node: &Node| {
            let engine = &node.running.as_ref()?.engine;
            let replica = engine.replica();
            let settled = replica.applied() == replica.last().slot && engine.copying().is_none();
            let settled = settled && node.wiped.is_none();
            settled.then(|| replica.applied())
        };
        let members = self.members();
        let is_there = |node: &&Node| !node.is_lost && members.has(node.id);
        let mut nodes = self.nodes.iter().filter(is_there);
        let first = nodes.next().and_then(applied);
        first.is_some() && nodes.all(|node| applied(node) == first)
    }

    /// Reads every block once more at the end, so that a loss that nobody happened to read is seen.
    fn read_everything(&mut self) -> Checked<()> {
        // The last reader is a client of its own: others may have been fenced.
        let client = self.clients.len();
        self.clients.push(Client::new(client as u64, 0, 1));
        let until = self.now + CALM;
        loop {
            if self.now > until {
                return self.fail("liveness: the last reader gets no session");
            }
            let now = self.now;
            let ground = self.ground.clone();
            if let Some(requests) = self.clients[client].read_everything(now, &ground) {
                self.send_requests(client, requests);
                break;
            }
            self.client_step(client);
            let wake = self.now + 50 * MS;
            self.schedule(wake, Event::Client { client });
            while self.now < wake {
                self.step()?;
            }
        }
        self.schedule(self.now, Event::Client { client });
        self.step_until("the last reads end", |sim| sim.clients[client].is_done())?;
        self.step_until(
            "every server reaches the same slot again",
            Sim::has_converged,
        )
    }

    fn check_history(&self) -> Checked<()> {
        if let Some(broken) = self.history.broken.first() {
            return self.fail(broken.clone());
        }
        for (register, operations) in &self.history.operations {
            if let Err(operation) = checker::check(operations) {
                for operation in operations {
                    self.trace(|| format!("{operation:?}"));
                }
                return self.fail(format!("{register:?} is not linearizable: {operation:?}"));
            }
        }
        Ok(())
    }

    /// What clients noted is there once, with who it was; not more than once if they got no answer.
    fn check_notes(&self) -> Checked<()> {
        let members = self.members();
        let nodes = self.nodes.iter().filter(|it| members.has(it.id));
        let mut running = nodes.filter_map(|node| node.running.as_ref());
        let Some(running) = running.next() else {
            return Ok(());
        };
        let mut found: BTreeMap<&str, u32> = BTreeMap::new();
        for event in running.engine.state().events_after(0) {
            let AdminAction::Note { text } = &event.action else {
                continue;
            };
            *found.entry(text).or_default() += 1;
            let Some((client, _)) = self.history.notes.get(text) else {
                return self.fail(format!("nobody noted '{text}'"));
            };
            let by = Origin {
                name: format!("client {client}"),
                user: format!("user {client}"),
                address: Some(self.clients[*client as usize].address()),
            };
            if event.by != by {
                return self.fail(format!("'{text}' is said to be by {:?}", event.by));
            }
        }
        for (text, (_, answered)) in &self.history.notes {
            let times = found.get(&text[..]).copied().unwrap_or_default();
            if times > 1 || *answered && times == 0 {
                return self.fail(format!("'{text}' is there {times} times"));
            }
        }
        Ok(())
    }

    /// All servers hold the same state and the same bytes.
    fn check_equal_data(&self) -> Checked<()> {
        let mut first: Option<(ServerId, Vec<u8>, Vec<Contents>)> = None;
        let members = self.members();
        for node in self.nodes.iter().filter(|it| members.has(it.id)) {
            let Some(running) = &node.running else {
                continue;
            };
            let state = running.engine.state();
            let mut volumes = Vec::new();
            for volume in state.volumes() {
                let chunks = &running.storage.chunks;
                let all = ChunkIndex(0)..ChunkIndex(u32::MAX);
                let found = sim_storage::contents(chunks, volume).and_then(|bytes| {
                    let statuses = chunks.statuses(volume, all, usize::MAX, false);
                    let mut statuses = statuses.map_err(|error| error.to_string())?.0;
                    // Of a chunk whose table was damaged nobody knows when it changed last, or which zeros take space.
                    statuses.retain(|status| {
                        let name = format!("data/{}/00/00/{:02x}", volume.name, status.chunk.0);
                        !self.table_rots.contains(&name)
                    });
                    Ok((bytes, statuses))
                });
                match found {
                    Ok(contents) => volumes.push(contents),
                    Err(error) => return self.fail(format!("server {}: {error}", node.id)),
                }
            }
            let encoded = state.encode();
            match &first {
                None => first = Some((node.id, encoded, volumes)),
                Some((other, state, bytes)) => {
                    let (id, other) = (node.id, *other);
                    if *state != encoded {
                        return self.fail(format!("servers {other} and {id} hold other states"));
                    }
                    if *bytes != volumes {
                        for (volume, (a, b)) in bytes.iter().zip(&volumes).enumerate() {
                            let ((a, one), (b, two)) = (a, b);
                            self.trace(|| format!("chunks of {volume}: {one:?} and {two:?}"));
                            let pairs = a.chunks(4096).zip(b.chunks(4096)).enumerate();
                            for (block, (a, b)) in pairs.filter(|(_, (a, b))| a != b) {
                                let value = |it: &[u8]| {
                                    u64::from_le_bytes([
                                        it[0], it[1], it[2], it[3], it[4], it[5], it[6], it[7],
                                    ])
                                };
                                let (a, b) = (value(a), value(b));
                                self.trace(|| {
                                    format!("volume {volume} block {block}: {a} and {b}")
                                });
                            }
                        }
                        return self.fail(format!(
                            "servers {other} and {id} hold other bytes, or call them of another time"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether a chunk file may rot on a server: on `most` of the core servers, others for every file.
fn may_rot(path: &str, seed: u64, core: usize, most: usize, index: usize) -> bool {
    let is_chunk = path.starts_with("data/") && !path.ends_with(".new");
    let sum = path
        .bytes()
        .fold(seed / 8, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
    // Learners are none of those that others count on.
    let first = (sum % core as u64) as usize;
    is_chunk && (index >= core || (index + core - first) % core < most)
}

/// A volume's bytes, and when its chunks were changed.
type Contents = (Vec<u8>, Vec<ChunkStatus>);

impl Node {
    /// Takes what the log holds after a start. Gives the entry that the server denies, and what it
    /// claims: whatever was reported durable must be there, or be claimed if a bit has rotted.
    fn find_denied(
        &mut self,
        ids: BTreeMap<Slot, EntryId>,
        claimed: EntryId,
    ) -> Option<(EntryId, EntryId)> {
        let rots = std::mem::take(&mut self.rot_pending);
        let cut = self.cut_pending.take();
        let mut before = std::mem::replace(&mut self.disk_log, ids);
        // If it was being cut, what was cut off was not chosen.
        if let Some(cut) = cut {
            before.split_off(&cut.next());
            self.rotted.split_off(&cut.next());
        }
        let held = self.disk_log.values().max().copied().unwrap_or_default();
        let had = before.values().max().copied().unwrap_or_default();
        if had > held && !rots && self.rotted.is_empty() {
            return Some((had, held));
        }
        if rots {
            let gone = |(slot, _): &(Slot, EntryId)| !self.disk_log.contains_key(slot);
            self.rotted.extend(before.into_iter().filter(gone));
        }
        self.rotted.retain(|_, id| *id > held);
        let lost = self.rotted.values().max().copied().unwrap_or_default();
        (lost > claimed).then_some((lost, claimed))
    }

    /// What it would promise to have, were it asked now.
    fn log_last(&self) -> EntryId {
        let held = self.disk_log.values().chain(self.rotted.values());
        held.max().copied().unwrap_or_default()
    }

    /// The life that its messages are of.
    fn life_sent(&self) -> Incarnation {
        let running = self.running.as_ref();
        running.map_or(self.incarnation, |it| it.engine.replica().incarnation())
    }

    fn leads(&self) -> bool {
        let role = self.running.as_ref().map(|it| it.engine.replica().role());
        matches!(role, Some(RoleKind::Leader { .. }))
    }

    fn describe(&self) -> String {
        let Some(running) = &self.running else {
            return format!("server {} is down", self.id);
        };
        let replica = running.engine.replica();
        format!(
            "server {}{}: {:?} of {:?}, promised {}, chosen {}, applied {}, last {}, copying {:?}",
            self.id,
            if replica.is_rejoining() {
                " (rejoins)"
            } else {
                ""
            },
            replica.role(),
            replica.leader(),
            replica.promised(),
            replica.chosen(),
            replica.applied(),
            replica.last(),
            running.engine.copying(),
        )
    }
}

fn new_disk(seed: u64, id: u8) -> SimDisk {
    let disk = SimDisk::new();
    disk.set_would_block(50, seed ^ (u64::from(id) << 56));
    disk
}

/// Behind which slot the queue cuts the log.
fn cut_of<'a>(queue: impl IntoIterator<Item = &'a (WriteId, Persist)>) -> Option<Slot> {
    let cuts = queue.into_iter().filter_map(|(_, what)| match what {
        Persist::Append { truncate_after, .. } => *truncate_after,
        _ => None,
    });
    cuts.min()
}

fn note_durable(
    log: &mut BTreeMap<Slot, EntryId>,
    rotted: &mut BTreeMap<Slot, EntryId>,
    what: &Persist,
) {
    match what {
        Persist::Append {
            truncate_after,
            entries,
            ..
        } => {
            if let Some(slot) = truncate_after {
                log.split_off(&slot.next());
                rotted.split_off(&slot.next());
            }
            log.extend(entries.iter().map(|entry| (entry.id.slot, entry.id)));
            // What is here again, and what a later leader did without, needs no claim.
            let held = entries.last().map(|entry| entry.id).unwrap_or_default();
            rotted.retain(|_, id| *id > held);
        }
        Persist::Reset { base } => {
            log.clear();
            log.insert(base.slot, *base);
            rotted.retain(|_, id| *id > *base);
        }
        Persist::Promise(_) | Persist::Rejoining(_) => {}
    }
}

fn summary(what: &Persist) -> String {
    match what {
        Persist::Append {
            truncate_after,
            entries,
            chosen,
        } => {
            let ids = (
                entries.first().map(|it| it.id),
                entries.last().map(|it| it.id),
            );
            let (first, last) = (ids.0.unwrap_or_default(), ids.1.unwrap_or_default());
            format!("{first} to {last}, behind {truncate_after:?}, chosen {chosen}")
        }
        other => format!("{other:?}"),
    }
}

fn engine_config(
    id: ServerId,
    incarnation: Incarnation,
    members: Membership,
    seed: u64,
) -> EngineConfig {
    // Small bounds, so that windows, trims and copies of chunks happen in a short run.
    let tuning = Tuning {
        window_bytes: 256 << 10,
        window_slots: 16,
        tail_bytes: 96 << 10,
        backlog_bytes: 512 << 10,
        peer_window_bytes: 128 << 10,
        entry_bytes: 32 << 10,
        catch_up_bytes: 64 << 10,
        ..Tuning::default()
    };
    EngineConfig {
        replica: Config {
            id,
            incarnation,
            members,
            tuning,
            seed,
        },
        checkpoint_bytes: 256 << 10,
        checkpoint_interval: Duration::from_secs(5),
        checkpoint_chunks: 24,
        log_bytes_max: 1 << 20,
        apply_bytes: 48 << 10,
        reserve_bytes: 0,
        session_lease: Duration::from_secs(4),
    }
}
