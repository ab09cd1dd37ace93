//! Repairs damaged blocks with what other servers have.
//!
//! Whoever reads and finds a block that is not what its checksum says waits here, for a bounded time, while the other
//! servers are asked one after the other. What one of them sends is taken only if
//!
//! * it is what our own table says, compared in the moment in which it is put in its place: an entry that has rewritten the
//!   block meanwhile wins; and
//! * the other server had applied at least what was applied here when the damage was found. A table that is older than its chunk,
//!   because a write of it was lost, may say the same as a server that lags.
//!
//! If our table does not know what the block should be, or none of the others has what it says, the whole chunk
//! is asked for, and what is damaged here is taken from it: [`ChunkStore::take_over`] has the rule.
//!
//! Nobody is asked while our own chunks are incomplete, and then nobody is answered either: blocks may be newer than
//! their checksums.
//!
//! A disk on which many blocks are damaged within an hour cannot be trusted with what was not read yet. Its server does not lead
//! if another one can, and gives up once the others are a majority without it: see [`Engine::gives_up`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::chunk::{BadBlock, ChunkError, ChunkImage, ChunkStore, ReadError, Repair};
use crate::engine::{Action, Engine, VolumeRead};
use crate::paxos::message::{BLOCKS_ASKED_MAX, Message, SyncMessage};
use crate::state::Volume;
use crate::throttle::Throttle;
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, ChunkIndex, SERVERS_MAX, ServerId, Slot, VolumeId};
use crate::volume::device::ReadPart;
use crate::wire::client::ReplyError;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// A server that has not answered in this time is passed over: its disk may be slow, but then another's is not.
const BLOCKS_TIMEOUT: Duration = Duration::from_millis(500);
/// The same for a whole chunk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(2);
/// All were asked, and one of them may say something else soon: it lags, or was busy.
const RETRY: Duration = Duration::from_millis(100);
/// So long a request waits for a block at most: longer than a leader takes to be replaced, shorter than initiators and
/// file systems wait for a disk.
const PATIENCE: Duration = Duration::from_secs(5);
/// Who was heard of in this time is worth asking.
const REACHABLE: Duration = Duration::from_secs(4);
/// Blocks that are being repaired at most. Who finds more is sent away, and comes back.
const WANTED_MAX: usize = 16_384;
/// Requests that wait at most.
const WAITING_MAX: usize = 4096;
/// A request that has met damage so often is answered: the disk does not keep what it is given.
const TRIES_MAX: u32 = 8;
/// Questions for blocks under way at most.
const QUESTIONS_MAX: usize = 8;
/// Questions of others that are being answered at most: their answers are held in memory.
const GIVING_MAX: usize = 16;
/// Damaged blocks of a chunk that are looked for at once when it could not be read.
const FOUND_MAX: usize = 1024;
/// Lost blocks that are remembered, so that they are counted and logged once.
const LOST_MAX: usize = 4096;
/// After a block was given up, only clients have it asked for again in this time: else servers that all have a damaged copy
/// would ask each other for ever.
const LOST_FOR: Duration = Duration::from_secs(60);
/// Of each kind of line, so many are logged each 10 s.
const LINES_MAX: u32 = 20;

/// A disk with so many damaged blocks within [`TROUBLE_PERIOD`] is given up. A sound one has a few in years, and a failing one some
/// each minute. More than a chunk of the usual size has: one file that was damaged as a whole, by someone's mistake, is
/// no reason.
pub const BAD_BLOCKS_MAX: usize = 2048;
const TROUBLE_PERIOD: Duration = Duration::from_secs(3600);
/// So long the others must have been a majority without us before this server gives up, and as long again for each id below
/// ours: of two with bad disks, the second one sees that the first one has gone.
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);
/// That a server would give up and must not is said so often.
const TROUBLE_LINES: Duration = Duration::from_secs(600);

type BlockName = (VolumeId, u64);
type ChunkName = (VolumeId, ChunkIndex);

/// Counts of damaged blocks since the start.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RepairCounts {
    /// Blocks that were found damaged, each once until it is repaired.
    pub found: u64,
    /// Of these, those that were repaired with another server's copy.
    pub repaired: u64,
    /// How often no server had a good copy of one.
    pub lost: u64,
}

/// A deliberate bug, for the tests of the tests.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RepairBug {
    /// Takes whatever another server sends.
    Unverified,
    /// Compares with what the block should have been when the question was asked.
    Older,
    /// Takes a damaged block for one that was never written.
    Unwritten,
}

/// What another server asked for.
#[derive(Clone, Debug)]
pub struct Export {
    /// Who.
    pub to: ServerId,
    /// Of which volume.
    pub volume: Arc<Volume>,
    /// Our applied slot when it was asked for; the data are read later, so they are at least as new.
    pub as_of: Slot,
    pub(super) what: ExportWhat,
}

#[derive(Clone, Debug)]
pub(super) enum ExportWhat {
    Chunk(ChunkIndex),
    Blocks(Vec<u64>),
}

/// What came of an [`Export`].
#[derive(Debug)]
pub struct Exported {
    answer: SyncMessage,
    /// Blocks that are damaged here.
    damaged: Vec<BadBlock>,
}

impl Export {
    /// Reads, waiting for the device. Report the result with [`Engine::handle_exported`].
    pub fn run(&self, chunks: &ChunkStore) -> Exported {
        match &self.what {
            ExportWhat::Chunk(chunk) => self.read_chunk(chunks, *chunk),
            ExportWhat::Blocks(blocks) => self.read_blocks(chunks, blocks),
        }
    }

    fn read_chunk(&self, chunks: &ChunkStore, chunk: ChunkIndex) -> Exported {
        let (answer, damaged) = match chunks.export(&self.volume, chunk) {
            Ok(image) => {
                let answer = SyncMessage::Chunk {
                    as_of: self.as_of,
                    volume: self.volume.id,
                    chunk,
                    image,
                };
                (answer, Vec::new())
            }
            // Whoever asks goes to another server: two that wait for each other's chunk would wait in vain.
            Err(ChunkError::BadBlock { .. }) => {
                let (first, count) = blocks_of(&self.volume, chunk);
                let found = chunks.find_bad(&self.volume, first, count, FOUND_MAX);
                (SyncMessage::Refused, found.unwrap_or_default())
            }
            Err(_) => (SyncMessage::Refused, Vec::new()),
        };
        Exported { answer, damaged }
    }

    fn read_blocks(&self, chunks: &ChunkStore, asked: &[u64]) -> Exported {
        let (mut damaged, mut blocks, mut data) = (Vec::new(), Vec::new(), Vec::new());
        for block in asked {
            match chunks.read(&self.volume, *block, 1, false) {
                Ok(parts) => {
                    if let [ReadPart::Data(part)] = &parts[..] {
                        blocks.push(*block);
                        data.extend_from_slice(part);
                    }
                }
                Err(ReadError::BadBlock { .. }) => {
                    // It may just have been written.
                    let found = chunks.find_bad(&self.volume, *block, 1, 1);
                    damaged.extend(found.unwrap_or_default());
                }
                Err(_) => {
                    let volume = self.volume.id;
                    return Exported {
                        answer: SyncMessage::BlocksRefused { volume },
                        damaged,
                    };
                }
            }
        }
        Exported {
            answer: SyncMessage::Blocks {
                as_of: self.as_of,
                volume: self.volume.id,
                damaged: damaged.iter().map(|bad| bad.block).collect(),
                blocks,
                data: data.into(),
            },
            damaged,
        }
    }
}

/// A read for a client, or for a write of a part of blocks, that is tried again when its blocks are repaired.
struct Waiting {
    read: VolumeRead,
    /// Still damaged.
    blocks: BTreeSet<BlockName>,
}

/// A damaged block.
struct Wanted {
    volume: Arc<Volume>,
    /// Who answers must have applied as much.
    at_least: Slot,
    /// What it should be when it was found.
    checksum: Option<u32>,
    /// Given up then.
    until: Instant,
    /// Whose copy is damaged, too.
    bad_at: Servers,
    /// Who was asked in this round.
    tried: Servers,
    /// Nobody knows here what it should be, or what is known is not what the others have.
    by_chunk: bool,
    is_asked: bool,
    retry_at: Instant,
}

/// A set of servers.
#[derive(Clone, Copy, Default, Eq, PartialEq)]
struct Servers(u8);

const _: () = assert!(SERVERS_MAX <= 8);

impl Servers {
    fn add(&mut self, server: ServerId) {
        self.0 |= 1 << server.0;
    }

    fn has(self, server: ServerId) -> bool {
        self.0 & 1 << server.0 != 0
    }
}

struct Question {
    to: ServerId,
    until: Instant,
    volume: VolumeId,
    /// If the whole chunk was asked for.
    chunk: Option<ChunkIndex>,
    blocks: Vec<u64>,
}

/// A chunk of another server that is newer than what is applied here.
struct Held {
    from: ServerId,
    name: ChunkName,
    as_of: Slot,
    /// To be applied first.
    until: Slot,
    image: ChunkImage,
}

/// Damaged blocks and who waits for them.
pub(super) struct Repairs {
    wanted: BTreeMap<BlockName, Wanted>,
    waiting: Vec<Waiting>,
    /// How often the reads of a ticket have met damage.
    tries: BTreeMap<u64, u32>,
    questions: Vec<Question>,
    held: Option<Held>,
    giving: usize,
    /// Given up, and when.
    lost: BTreeMap<BlockName, Instant>,
    counts: RepairCounts,
    /// Something was repaired since a checkpoint was begun.
    pub(super) unsynced: bool,
    bug: Option<RepairBug>,
    found_lines: Throttle,
    repaired_lines: Throttle,
    lost_lines: Throttle,
    trouble: Trouble,
}

impl Repairs {
    pub(super) fn new() -> Repairs {
        Repairs {
            wanted: BTreeMap::new(),
            waiting: Vec::new(),
            tries: BTreeMap::new(),
            questions: Vec::new(),
            held: None,
            giving: 0,
            lost: BTreeMap::new(),
            counts: RepairCounts::default(),
            unsynced: false,
            bug: None,
            found_lines: Throttle::new(LINES_MAX),
            repaired_lines: Throttle::new(LINES_MAX),
            lost_lines: Throttle::new(LINES_MAX),
            trouble: Trouble::default(),
        }
    }

    /// When there is something to do.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let questions = self.questions.iter().map(|it| it.until);
        let wanted = self.wanted.values().map(|it| match it.is_asked {
            true => it.until,
            false => it.until.min(it.retry_at),
        });
        questions.chain(wanted).min()
    }
}

impl Engine {
    /// Damaged blocks so far.
    pub fn repairs(&self) -> RepairCounts {
        self.repairs.counts
    }

    /// Makes repairs misbehave: deliberate bugs, for the tests of the tests.
    #[doc(hidden)]
    pub fn inject_repair_bug(&mut self, bug: RepairBug) {
        self.repairs.bug = Some(bug);
    }

    /// A read has found damaged blocks. It waits until they are repaired, unless that is too much.
    pub(super) fn await_repair(&mut self, now: Instant, read: VolumeRead, found: &[BadBlock]) {
        let elsewhere = ReplyError::NotLeader { leader: None };
        let repairs = &mut self.repairs;
        if repairs.waiting.len() >= WAITING_MAX {
            return self.end_wait(&read, elsewhere);
        }
        let tries = repairs.tries.entry(read.ticket).or_default();
        *tries += 1;
        if *tries > TRIES_MAX {
            return self.end_wait(&read, ReplyError::Io);
        }
        let volume = Arc::clone(&read.volume);
        if !self.want(now, &volume, found) {
            return self.end_wait(&read, elsewhere);
        }
        if found.is_empty() {
            // It was written meanwhile.
            return self.actions.push_back(Action::Read(read));
        }
        self.repairs.waiting.push(Waiting {
            read,
            blocks: found.iter().map(|bad| (volume.id, bad.block)).collect(),
        });
        self.pump_repairs(now);
    }

    /// Has blocks repaired for which nobody waits here.
    pub(super) fn repair_unasked(
        &mut self,
        now: Instant,
        volume: &Arc<Volume>,
        found: &[BadBlock],
    ) {
        let lost = |bad: &BadBlock| {
            let at = self.repairs.lost.get(&(volume.id, bad.block));
            at.is_some_and(|at| now.since(*at) < LOST_FOR)
        };
        let found: Vec<BadBlock> = found.iter().copied().filter(|bad| !lost(bad)).collect();
        self.want(now, volume, &found);
        self.pump_repairs(now);
    }

    /// Notes that blocks are to be repaired; `false` if these are too many, or our chunks are incomplete.
    fn want(&mut self, now: Instant, volume: &Arc<Volume>, found: &[BadBlock]) -> bool {
        if self.repairs.wanted.len() + found.len() > WANTED_MAX || !self.is_complete() {
            return false;
        }
        let at_least = self.state.applied();
        for bad in found {
            let name = (volume.id, bad.block);
            if self.repairs.wanted.contains_key(&name) {
                continue;
            }
            self.note_found(now, volume, bad);
            if self.repairs.bug == Some(RepairBug::Unwritten) {
                let _ = self.chunks.force(volume, bad.block, None);
            }
            let wanted = Wanted {
                volume: Arc::clone(volume),
                at_least,
                checksum: bad.checksum,
                until: now + PATIENCE,
                bad_at: Servers::default(),
                tried: Servers::default(),
                by_chunk: bad.checksum.is_none(),
                is_asked: false,
                retry_at: now,
            };
            self.repairs.wanted.insert(name, wanted);
        }
        true
    }

    /// Counts a block that was not known to be damaged. Of a chunk that nobody knows anything about any more, one.
    fn note_found(&mut self, now: Instant, volume: &Volume, bad: &BadBlock) {
        let name = (volume.id, bad.block);
        let repairs = &mut self.repairs;
        if repairs.lost.contains_key(&name) {
            return;
        }
        repairs.counts.found += 1;
        let same_table = |(other, wanted): (&BlockName, &Wanted)| {
            let chunk = chunk_of(volume, bad.block);
            wanted.checksum.is_none() && other.0 == volume.id && chunk_of(volume, other.1) == chunk
        };
        if bad.checksum.is_some() || !repairs.wanted.iter().any(same_table) {
            repairs.trouble.note(now);
        }
        if let Some(more) = repairs.found_lines.admit(now) {
            tracing::warn!(
                volume = %volume.name,
                block = bad.block,
                byte = bad.block * BLOCK,
                more = (more > 0).then_some(more),
                "a damaged block: the other servers are asked for it"
            );
        }
    }

    /// Answers a read that cannot be done here.
    fn end_wait(&mut self, read: &VolumeRead, error: ReplyError) {
        self.repairs.tries.remove(&read.ticket);
        self.fail_read(read.ticket, error);
    }

    /// A read has met no damage.
    pub(super) fn forget_tries(&mut self, ticket: u64) {
        if !self.repairs.tries.is_empty() {
            self.repairs.tries.remove(&ticket);
        }
    }

    /// A block is repaired, or given up: goes on with those who have waited for it.
    fn settle(&mut self, name: BlockName, failure: Option<ReplyError>) {
        self.repairs.wanted.remove(&name);
        for question in &mut self.repairs.questions {
            if question.volume == name.0 {
                question.blocks.retain(|block| *block != name.1);
            }
        }
        let ends = |it: &mut Waiting| {
            it.blocks.remove(&name) && (failure.is_some() || it.blocks.is_empty())
        };
        let ready: Vec<Waiting> = self.repairs.waiting.extract_if(.., ends).collect();
        for Waiting { read, .. } in ready {
            match &failure {
                None => self.actions.push_back(Action::Read(read)),
                Some(error) => self.end_wait(&read, error.clone()),
            }
        }
    }

    /// Asks whom there is to ask, and gives up what nobody has.
    pub(super) fn pump_repairs(&mut self, now: Instant) {
        if self.repairs.wanted.is_empty() {
            self.repairs.questions.clear();
            self.repairs.held = None;
            return;
        }
        if !self.is_complete() {
            return self.cancel_repairs();
        }
        self.take_held(now);
        self.drop_late_questions(now);
        let peers: Vec<ServerId> = self.replica.peers().map(|(server, _)| server).collect();
        let order = self.reachable(now);
        let mut gone = Vec::new();
        let mut lost = Vec::new();
        let mut questions: BTreeMap<(ServerId, VolumeId, Option<ChunkIndex>), Vec<u64>> =
            BTreeMap::new();
        let mut asks_chunk = self.repairs.held.is_some()
            || self.repairs.questions.iter().any(|it| it.chunk.is_some());
        for (name, wanted) in &mut self.repairs.wanted {
            if !self.volumes.contains_key(&name.0) {
                gone.push(*name);
                continue;
            }
            if peers.iter().all(|peer| wanted.bad_at.has(*peer)) || now >= wanted.until {
                lost.push(*name);
                continue;
            }
            if wanted.is_asked || now < wanted.retry_at {
                continue;
            }
            let fit = |it: &&ServerId| !wanted.bad_at.has(**it) && !wanted.tried.has(**it);
            let Some(server) = order.iter().find(fit) else {
                wanted.tried = Servers::default();
                wanted.retry_at = now + RETRY;
                continue;
            };
            let chunk = wanted.by_chunk.then(|| chunk_of(&wanted.volume, name.1));
            let key = (*server, name.0, chunk);
            let many = self.repairs.questions.len() + questions.len() >= QUESTIONS_MAX;
            let blocks = match questions.contains_key(&key) {
                false if many || chunk.is_some() && asks_chunk => {
                    // After another one.
                    wanted.retry_at = now + RETRY;
                    continue;
                }
                _ => questions.entry(key).or_default(),
            };
            if chunk.is_none() && blocks.len() >= BLOCKS_ASKED_MAX {
                wanted.retry_at = now + RETRY / 10;
                continue;
            }
            asks_chunk |= chunk.is_some();
            wanted.is_asked = true;
            wanted.tried.add(*server);
            blocks.push(name.1);
        }
        for (key, blocks) in questions {
            self.ask_blocks(now, key, blocks);
        }
        for name in gone {
            let refusal = ReplyError::Refused(crate::state::Refusal::NoSuchVolume);
            self.settle(name, Some(refusal));
        }
        for name in lost {
            self.give_up_block(now, name);
        }
    }

    /// Servers that were heard of lately, followers first: the leader has enough to do.
    fn reachable(&self, now: Instant) -> Vec<ServerId> {
        let leader = self.replica.leader();
        let heard = self.replica.peers().filter(|(_, peer)| {
            let lately = peer.heard.is_some_and(|at| now.since(at) < REACHABLE);
            lately && !peer.progress.installing
        });
        let mut servers: Vec<ServerId> = heard.map(|(server, _)| server).collect();
        servers.sort_by_key(|server| (Some(*server) == leader, *server));
        servers
    }

    fn ask_blocks(
        &mut self,
        now: Instant,
        (to, volume, chunk): (ServerId, VolumeId, Option<ChunkIndex>),
        blocks: Vec<u64>,
    ) {
        // As new as what was applied when the last of them was found.
        let wanted = blocks
            .iter()
            .filter_map(|it| self.repairs.wanted.get(&(volume, *it)));
        let at_least = wanted.map(|it| it.at_least).max().unwrap_or_default();
        let (sync, patience) = match chunk {
            Some(chunk) => {
                let request = SyncMessage::RequestChunk {
                    at_least,
                    volume,
                    chunk,
                };
                (request, CHUNK_TIMEOUT)
            }
            None => {
                let request = SyncMessage::RequestBlocks {
                    at_least,
                    volume,
                    blocks: blocks.clone(),
                };
                (request, BLOCKS_TIMEOUT)
            }
        };
        self.repairs.questions.push(Question {
            to,
            until: now + patience,
            volume,
            chunk,
            blocks,
        });
        self.actions.push_back(Action::Send {
            to,
            message: Message::Sync(sync),
        });
    }

    /// Ends questions; their blocks are asked of someone else.
    fn end_questions(&mut self, now: Instant, ends: impl Fn(&Question) -> bool) -> Vec<Question> {
        let repairs = &mut self.repairs;
        let ended: Vec<Question> = repairs.questions.extract_if(.., |it| ends(it)).collect();
        for question in &ended {
            for block in &question.blocks {
                if let Some(wanted) = repairs.wanted.get_mut(&(question.volume, *block)) {
                    wanted.is_asked = false;
                    wanted.retry_at = now;
                }
            }
        }
        ended
    }

    fn drop_late_questions(&mut self, now: Instant) {
        self.end_questions(now, |it| now >= it.until || it.blocks.is_empty());
    }

    /// Nobody has a good copy.
    fn give_up_block(&mut self, now: Instant, name: BlockName) {
        let repairs = &mut self.repairs;
        let Some(wanted) = repairs.wanted.get(&name) else {
            return;
        };
        let volume = Arc::clone(&wanted.volume);
        repairs.counts.lost += 1;
        if repairs.lost.len() < LOST_MAX || repairs.lost.contains_key(&name) {
            repairs.lost.insert(name, now);
        }
        if let Some(more) = repairs.lost_lines.admit(now) {
            tracing::error!(
                volume = %volume.name,
                block = name.1,
                byte = name.1 * BLOCK,
                more = (more > 0).then_some(more),
                "a damaged block cannot be repaired: no server that answers has a good copy"
            );
        }
        self.settle(name, Some(ReplyError::Io));
    }

    /// Our chunks are incomplete: others answer for them.
    fn cancel_repairs(&mut self) {
        let names: Vec<BlockName> = self.repairs.wanted.keys().copied().collect();
        for name in names {
            self.settle(name, Some(ReplyError::NotLeader { leader: None }));
        }
        self.repairs.questions.clear();
        self.repairs.held = None;
    }

    // ---- Asked by others.

    pub(super) fn give_blocks(
        &mut self,
        to: ServerId,
        at_least: Slot,
        volume: VolumeId,
        blocks: Vec<u64>,
    ) {
        let end = |it: &Arc<Volume>| blocks.iter().all(|block| *block < it.blocks());
        match self.volume_to_give(at_least, volume).filter(end) {
            Some(volume) if self.repairs.giving < GIVING_MAX => {
                self.repairs.giving += 1;
                self.actions.push_back(Action::Export(Export {
                    to,
                    volume,
                    as_of: self.state.applied(),
                    what: ExportWhat::Blocks(blocks),
                }));
            }
            _ => {
                let message = Message::Sync(SyncMessage::BlocksRefused { volume });
                self.actions.push_back(Action::Send { to, message });
            }
        }
    }

    /// What another server asked for was read.
    pub fn handle_exported(&mut self, now: Instant, export: Export, exported: Exported) {
        if matches!(export.what, ExportWhat::Blocks(_)) {
            self.repairs.giving = self.repairs.giving.saturating_sub(1);
        }
        self.actions.push_back(Action::Send {
            to: export.to,
            message: Message::Sync(exported.answer),
        });
        if !exported.damaged.is_empty() {
            self.repair_unasked(now, &export.volume, &exported.damaged);
        }
        self.drain(now);
    }

    // ---- Answered.

    pub(super) fn take_blocks(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        volume: VolumeId,
        damaged: &[u64],
        good: Vec<(u64, &[u8])>,
    ) {
        let answers = |it: &Question| it.to == from && it.volume == volume && it.chunk.is_none();
        let asked = self.end_questions(now, answers);
        if !self.is_complete() {
            return self.pump_repairs(now);
        }
        for block in damaged {
            if let Some(wanted) = self.repairs.wanted.get_mut(&(volume, *block)) {
                wanted.bad_at.add(from);
            }
        }
        for (block, data) in &good {
            if !self.take_block(now, from, as_of, (volume, *block), data) {
                return;
            }
        }
        // It has them otherwise: unwritten.
        let otherwise = asked.iter().flat_map(|it| &it.blocks);
        let is_good = |block: &u64| good.iter().any(|(it, _)| it == block);
        for block in otherwise.filter(|it| !damaged.contains(it) && !is_good(it)) {
            if let Some(wanted) = self.repairs.wanted.get_mut(&(volume, *block)) {
                wanted.by_chunk |= as_of >= wanted.at_least;
            }
        }
        self.pump_repairs(now);
    }

    /// Puts a block of another server in its place, if it is right. `false` if nothing more can be written.
    fn take_block(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        name: BlockName,
        data: &[u8],
    ) -> bool {
        let Some(wanted) = self.repairs.wanted.get_mut(&name) else {
            return true;
        };
        let volume = Arc::clone(&wanted.volume);
        let repaired = match self.repairs.bug {
            Some(RepairBug::Unverified) => {
                let forced = self.chunks.force(&volume, name.1, Some(data));
                forced.map(|()| Repair::Done)
            }
            Some(RepairBug::Older) => {
                let actual = crate::entry::block_checksum(name.0, name.1, data);
                match wanted.checksum == Some(actual) {
                    true => {
                        let forced = self.chunks.force(&volume, name.1, Some(data));
                        forced.map(|()| Repair::Done)
                    }
                    false => Ok(Repair::Differs),
                }
            }
            // It lags, and what it sends may have been written over.
            _ if as_of < wanted.at_least => return true,
            _ => self.chunks.repair(&volume, name.1, data),
        };
        match repaired {
            Ok(Repair::Done) => self.repaired(now, from, name),
            Ok(Repair::NotNeeded) => self.settle(name, None),
            Ok(Repair::Differs) => {
                if let Some(wanted) = self.repairs.wanted.get_mut(&name) {
                    wanted.by_chunk = true;
                }
            }
            Err(ChunkError::NoSpace) => {}
            Err(error) => {
                self.failure = Some(error.into());
                return false;
            }
        }
        true
    }

    fn repaired(&mut self, now: Instant, from: ServerId, name: BlockName) {
        let repairs = &mut self.repairs;
        let Some(wanted) = repairs.wanted.get(&name) else {
            return;
        };
        repairs.counts.repaired += 1;
        repairs.unsynced = true;
        repairs.lost.remove(&name);
        if let Some(more) = repairs.repaired_lines.admit(now) {
            tracing::warn!(
                volume = %wanted.volume.name,
                block = name.1,
                byte = name.1 * BLOCK,
                peer = from.0,
                more = (more > 0).then_some(more),
                "a damaged block was repaired with the copy of server {from}"
            );
        }
        self.settle(name, None);
    }

    pub(super) fn blocks_refused(&mut self, now: Instant, from: ServerId, volume: VolumeId) {
        self.end_questions(now, |it| {
            it.to == from && it.volume == volume && it.chunk.is_none()
        });
        self.pump_repairs(now);
    }

    pub(super) fn repair_chunk_refused(&mut self, now: Instant, from: ServerId) {
        self.end_questions(now, |it| it.to == from && it.chunk.is_some());
        self.pump_repairs(now);
    }

    /// A chunk that was asked for here.
    pub(super) fn take_repair_chunk(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        name: ChunkName,
        image: &Bytes,
    ) {
        let answers = |it: &Question| it.volume == name.0 && it.chunk == Some(name.1);
        if self.end_questions(now, answers).is_empty() || self.repairs.held.is_some() {
            // Nobody has asked, or not of late.
            return;
        }
        let Some(volume) = self.volumes.get(&name.0).cloned() else {
            return self.pump_repairs(now);
        };
        if let Ok(read) = self.chunks.read_image(&volume, name.1, image) {
            let until = match image.is_empty() {
                // Removed by an entry that may not be applied here; whatever it is, it is in our log by now.
                true => self.replica.last().slot,
                false => read.last_slot,
            };
            self.repairs.held = Some(Held {
                from,
                name,
                as_of,
                until,
                image: read,
            });
        }
        self.pump_repairs(now);
    }

    /// Takes what is damaged from a chunk of another server, once everything is applied that it holds.
    fn take_held(&mut self, now: Instant) {
        let applied = self.state.applied();
        let Some(held) = self.repairs.held.take_if(|it| it.until <= applied) else {
            return;
        };
        let Held {
            from,
            name,
            as_of,
            image,
            ..
        } = held;
        let Some(volume) = self.volumes.get(&name.0).cloned() else {
            return;
        };
        let in_chunk = |it: &&BlockName| it.0 == name.0 && chunk_of(&volume, it.1) == name.1;
        let wanted = self.repairs.wanted.iter();
        let wanted = wanted.filter(|(name, wanted)| in_chunk(name) && wanted.at_least <= as_of);
        let blocks: Vec<u64> = wanted.map(|(name, _)| name.1).collect();
        if blocks.is_empty() {
            return;
        }
        let taken = match self
            .chunks
            .take_over(&volume, name.1, &image, as_of, &blocks)
        {
            Ok(taken) => taken,
            Err(ChunkError::NoSpace) => return,
            Err(error) => {
                self.failure = Some(error.into());
                return;
            }
        };
        for block in blocks {
            if taken.contains(&block) {
                self.repaired(now, from, (name.0, block));
                continue;
            }
            let found = self.chunks.find_bad(&volume, block, 1, 1);
            if found.is_ok_and(|found| found.is_empty()) {
                self.settle((name.0, block), None);
            }
        }
    }

    // ---- A disk that cannot be trusted.

    /// The disk has shown so many damaged blocks in an hour that this server should stop, which the cell can bear: the
    /// others have been a majority without it for a while. The number of blocks.
    pub fn gives_up(&self) -> Option<usize> {
        self.repairs
            .trouble
            .gives_up
            .then_some(self.repairs.trouble.found.len())
    }

    /// Looks whether the disk can be trusted.
    pub(super) fn check_trouble(&mut self, now: Instant) {
        if !self.repairs.trouble.is_too_much(now) {
            return;
        }
        // Who leads reads most, and keeps everybody waiting for what it has to repair.
        self.replica.resign(now);
        let is_borne = self.replica.is_dispensable(now);
        let rank = u32::from(self.replica.id().0) + 1;
        self.repairs
            .trouble
            .decide(now, is_borne, GIVE_UP_AFTER * rank);
    }
}

/// Damaged blocks of late.
#[derive(Default)]
struct Trouble {
    /// When they were found, the newest [`BAD_BLOCKS_MAX`].
    found: VecDeque<Instant>,
    /// Since when the others could do without us.
    dispensable: Option<Instant>,
    gives_up: bool,
    logged: Option<Instant>,
}

impl Trouble {
    fn note(&mut self, now: Instant) {
        if self.found.len() >= BAD_BLOCKS_MAX {
            self.found.pop_front();
        }
        self.found.push_back(now);
    }

    fn is_too_much(&mut self, now: Instant) -> bool {
        let old = |at: &Instant| now.since(*at) >= TROUBLE_PERIOD;
        while self.found.front().is_some_and(old) {
            self.found.pop_front();
        }
        self.found.len() >= BAD_BLOCKS_MAX
    }

    fn decide(&mut self, now: Instant, is_borne: bool, after: Duration) {
        self.dispensable = match is_borne {
            true => Some(self.dispensable.unwrap_or(now)),
            false => None,
        };
        self.gives_up |= self
            .dispensable
            .is_some_and(|since| now.since(since) >= after);
        let is_said = self.logged.is_some_and(|at| now.since(at) < TROUBLE_LINES);
        if !self.gives_up && !is_said {
            self.logged = Some(now);
            tracing::error!(
                "{} damaged blocks were found within an hour: this disk cannot be trusted and must be replaced; the server \
                 stops when the others can do without it",
                self.found.len()
            );
        }
    }
}

fn blocks_per_chunk(volume: &Volume) -> u64 {
    u64::from(volume.chunk_bytes) / BLOCK
}

fn chunk_of(volume: &Volume, block: u64) -> ChunkIndex {
    ChunkIndex((block / blocks_per_chunk(volume)) as u32)
}

fn blocks_of(volume: &Volume, chunk: ChunkIndex) -> (u64, u64) {
    let count = blocks_per_chunk(volume);
    (u64::from(chunk.0) * count, count)
}

#[cfg(test)]
pub(super) mod tests;
