//! Copying the chunks of another server to one that is too far behind for the log.
//!
//! The receiver takes over the donor's replicated state at one slot, the *base*, starts its log behind it
//! and goes on appending, acknowledging and applying entries; but an entry takes effect only on chunks
//! that have been copied. A chunk is copied as of a slot that is at least as new as what is applied here
//! at that moment, so that no entry can be missed between; entries that it holds already are applied once
//! more, which changes nothing because they write whole blocks in order. An entry that was applied in part
//! when the disk was full counts as applied: of its first commands nobody asks again. So that a chunk is not outdated
//! when it comes, nothing is applied here while the answer to a question is on its way. Volumes and chunks
//! are copied in ascending order: what lies below the cursor is done.
//!
//! A chunk whose table equals the donor's is not copied, so our table must not be newer than our data. A crash
//! leaves such tables, and what puts the data right is that the entries since the checkpoint are applied
//! again, to all chunks: those known chosen when the storage is opened, those that the server held besides
//! when they are found chosen. If a base comes before that, tables above what was applied prove nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::chunk::ChunkError;
use crate::engine::repair::ExportWhat;
use crate::engine::{Action, Engine, Export};
use crate::paxos::message::{ChunkSummary, Message, SyncMessage};
use crate::state::{State, Volume};
use crate::storage::ALL_PROVEN;
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, ChunkIndex, EntryId, ServerId, Slot, VolumeId};

/// A question that is not answered in this time is asked of someone else.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// After a refusal.
const RETRY: Duration = Duration::from_millis(100);
/// What has sent nothing for this time cannot.
const MOVING: Duration = Duration::from_secs(10);
/// Chunks asked for at once; entries wait until they are all here.
const CHUNKS_AT_ONCE: usize = 4;
/// Entries that wait at most, bytes; then they are applied, and what comes too late is asked for again.
/// Less than `Tuning::backlog_bytes`, at which no more come.
const BACKLOG_BYTES_MAX: usize = 128 << 20;
/// Copying is logged so often.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// Before this time nobody can tell how long it takes.
const ESTIMATE_AFTER: Duration = Duration::from_secs(1);
/// A chunk for which there was no space is asked for again after this time.
const SPACE_RETRY: Duration = Duration::from_secs(1);
/// Chunks in one list.
const LIST_MAX: usize = 1024;

type ChunkName = (VolumeId, ChunkIndex);

/// The receiving side.
pub(super) struct Copying {
    stage: Stage,
    /// A base is stored: our chunks are incomplete until all are copied. Before that they are only old.
    installing: bool,
    donor: Option<ServerId>,
    /// Whose chunks the log said last that they come.
    told: Option<ServerId>,
    /// Turns to the next donor when one does not answer.
    turn: usize,
    /// See [`crate::storage::CheckpointRecord::installing`].
    proven: Slot,
    /// Every chunk below is copied.
    cursor: ChunkName,
    asked: BTreeMap<ChunkName, Instant>,
    /// A list was asked for, and its answer is on its way.
    list_asked: bool,
    retry_at: Instant,
    /// When a list or a chunk came last.
    moved_at: Instant,
    /// There was no space for a chunk.
    lacks_space: bool,
    chunks_done: u64,
    chunks_known: u64,
    /// As many as the donor has, if it says so.
    chunks_total: u64,
    /// When copying began, and what was done when it was last logged.
    began: Instant,
    logged_at: Instant,
}

enum Stage {
    /// Asked for the state to start from.
    Base,
    /// The base is being stored.
    Storing { base: EntryId, state: Box<State> },
    /// Asked for the list of chunks from the cursor on.
    List,
    /// Fetching the chunks of a list; `until`: where the next list begins, in this volume.
    Chunks {
        missing: BTreeSet<ChunkIndex>,
        until: Option<ChunkIndex>,
    },
}

impl Copying {
    fn new(donor: Option<ServerId>, stage: Stage, now: Instant) -> Copying {
        Copying {
            stage,
            installing: false,
            donor,
            told: None,
            turn: 0,
            proven: ALL_PROVEN,
            cursor: (VolumeId(0), ChunkIndex(0)),
            asked: BTreeMap::new(),
            list_asked: false,
            retry_at: now,
            moved_at: now,
            lacks_space: false,
            chunks_done: 0,
            chunks_known: 0,
            chunks_total: 0,
            began: now,
            logged_at: now,
        }
    }

    /// Goes on after a restart: what was copied before is found equal and not copied again, unless its table
    /// is above `proven`.
    pub(super) fn resume(proven: Slot, now: Instant) -> Copying {
        Copying {
            installing: true,
            proven,
            ..Copying::new(None, Stage::List, now)
        }
    }

    /// Whether the entry of a slot takes effect on copied chunks only. One that the server held when it
    /// started may have been applied before: it takes effect on all of them again.
    pub(super) fn decides(&self, slot: Slot, held_last: Slot) -> bool {
        self.is_installing() && slot > held_last
    }

    /// Whether entries take effect on a chunk, if that is decided here.
    pub(super) fn is_copied(&self, volume: VolumeId, chunk: ChunkIndex) -> bool {
        if (volume, chunk) < self.cursor {
            return true;
        }
        // Within the list that is being fetched, what is not missing is equal, copied or absent.
        match &self.stage {
            Stage::Chunks { missing, until } if volume == self.cursor.0 => {
                until.is_none_or(|until| chunk < until) && !missing.contains(&chunk)
            }
            _ => false,
        }
    }

    /// Whether our chunks are incomplete.
    pub(super) fn is_installing(&self) -> bool {
        self.installing
    }

    /// See [`crate::storage::CheckpointRecord::installing`].
    pub(super) fn installing(&self) -> Option<Slot> {
        self.installing.then_some(self.proven)
    }

    /// Whether lists and chunks have come lately.
    pub(super) fn is_moving(&self, now: Instant) -> bool {
        now.since(self.moved_at) < MOVING
    }

    /// Whether it waits for space on the disk.
    pub(super) fn lacks_space(&self) -> bool {
        self.lacks_space
    }

    /// Whether a checkpoint made now could undo the stored base.
    pub(super) fn is_storing(&self) -> bool {
        matches!(self.stage, Stage::Storing { .. })
    }

    /// Whether a list, chunks or another base are on their way here.
    fn is_waiting(&self) -> bool {
        let asked = match self.stage {
            Stage::Base | Stage::Storing { .. } => true,
            Stage::List | Stage::Chunks { .. } => self.list_asked || !self.asked.is_empty(),
        };
        self.is_installing() && asked
    }

    /// The question was not answered in time, or not as hoped; asks another server next.
    fn give_up_question(&mut self, retry_at: Instant) {
        // While a base or a list is asked for, it is another's turn already.
        if self.donor.take().is_some() {
            self.turn += 1;
        }
        self.asked.clear();
        self.list_asked = false;
        self.retry_at = retry_at;
    }

    pub(super) fn next_at(&self) -> Instant {
        self.retry_at
    }

    pub(super) fn progress(&self) -> (u64, u64) {
        let total = self.chunks_total.max(self.chunks_known);
        (self.chunks_done, total.max(self.chunks_done))
    }

    /// About how long it takes still; none while nothing can be said.
    pub(super) fn time_left(&self, now: Instant) -> Option<Duration> {
        let (done, total) = self.progress();
        let elapsed = now.since(self.began);
        let says = done > 0 && self.chunks_total > 0 && elapsed >= ESTIMATE_AFTER;
        says.then(|| elapsed.mul_f64((total - done) as f64 / done as f64))
    }
}

impl Engine {
    pub(super) fn start_copying(&mut self, now: Instant, donor: ServerId) {
        // Whoever is preferred comes first in the order, if he is there.
        let donor = self.source.is_none().then_some(donor);
        match &mut self.copying {
            None => self.copying = Some(Copying::new(donor, Stage::Base, now)),
            // The log has fallen behind again while chunks are copied: it needs another base.
            Some(copying) if matches!(copying.stage, Stage::List | Stage::Chunks { .. }) => {
                copying.give_up_question(now);
                copying.stage = Stage::Base;
                copying.donor = donor;
            }
            Some(_) => return,
        }
        self.copy_timeout(now);
    }

    pub(super) fn copy_timeout(&mut self, now: Instant) {
        let donors: Vec<ServerId> = self
            .replica
            .peers()
            .filter(|(_, peer)| {
                let lately = peer
                    .heard
                    .is_some_and(|at| now.since(at) < ANSWER_TIMEOUT * 2);
                lately && !peer.progress.installing
            })
            .map(|(server, _)| server)
            .collect();
        let leader = self.replica.leader();
        let source = self.source;
        let Some(copying) = &mut self.copying else {
            return;
        };
        if now < copying.retry_at {
            return;
        }
        let is_there = source.is_none_or(|source| donors.contains(&source));
        if copying.donor.is_none() && !is_there && now.since(copying.began) < ANSWER_TIMEOUT {
            // Followers are not heard all the time.
            copying.retry_at = now + RETRY;
            return self.apply_backlog(now);
        }
        if copying.donor.is_none() {
            // Followers rather than the leader, which has enough to do.
            let followers = donors.iter().filter(|server| Some(**server) != leader);
            let mut order: Vec<ServerId> = followers.copied().collect();
            order.extend(donors.iter().filter(|server| Some(**server) == leader));
            order.sort_by_key(|server| source.is_some() && Some(*server) != source);
            copying.donor = order.get(copying.turn % order.len().max(1)).copied();
            copying.asked.clear();
            copying.list_asked = false;
        }
        copying.retry_at = now + RETRY;
        if copying.donor.is_some() {
            self.ask_donor(now);
        }
        self.apply_backlog(now);
    }

    /// Whether chosen entries wait for chunks that are on their way here.
    pub(super) fn holds_back(&self) -> bool {
        let waits = |it: &Copying| it.is_waiting() && self.backlog_bytes < BACKLOG_BYTES_MAX;
        let holds = |it: &Copying| it.is_storing() || waits(it);
        self.copying.as_ref().is_some_and(holds)
    }

    /// What a list or a chunk must be as new as, so that no entry that takes no effect on it here is missing.
    fn needed(&self) -> Slot {
        let stalled = self.stalled.as_ref().map(|it| it.entry().id.slot);
        stalled.unwrap_or(self.state.applied())
    }

    /// Asks for what is needed next.
    fn ask_donor(&mut self, now: Instant) {
        // The answer must be as new as what is applied here, so the less remains to be applied the better.
        self.apply_backlog(now);
        let at_least = self.needed();
        let Some(copying) = &mut self.copying else {
            return;
        };
        let Some(donor) = copying.donor else { return };
        let sync = match &copying.stage {
            Stage::Base => SyncMessage::RequestBase,
            Stage::Storing { .. } => return,
            Stage::List => {
                // The next volume that still exists, from the cursor on.
                let next = self.state.volumes().find(|it| it.id >= copying.cursor.0);
                let Some(volume) = next else {
                    return self.finish_copying(now);
                };
                if volume.id > copying.cursor.0 {
                    copying.cursor = (volume.id, ChunkIndex(0));
                }
                let (volume, from) = copying.cursor;
                SyncMessage::RequestList {
                    at_least,
                    volume,
                    from,
                }
            }
            Stage::Chunks { .. } => return self.ask_chunks(now, donor),
        };
        copying.list_asked = matches!(copying.stage, Stage::List);
        copying.retry_at = now + ANSWER_TIMEOUT;
        // If this is not answered, the next one is asked.
        copying.donor = None;
        copying.turn += 1;
        self.actions.push_back(Action::Send {
            to: donor,
            message: Message::Sync(sync),
        });
    }

    fn ask_chunks(&mut self, now: Instant, donor: ServerId) {
        let at_least = self.needed();
        let lacks_space = self.chunks_lack_space();
        let Some(copying) = &mut self.copying else {
            return;
        };
        let Stage::Chunks { missing, .. } = &copying.stage else {
            return;
        };
        let volume = copying.cursor.0;
        let late = copying
            .asked
            .values()
            .any(|at| now.since(*at) >= ANSWER_TIMEOUT);
        if late {
            return copying.give_up_question(now);
        }
        if !copying.asked.is_empty() {
            return;
        }
        copying.lacks_space |= lacks_space;
        if lacks_space {
            return copying.give_up_question(now + SPACE_RETRY);
        }
        for chunk in missing {
            if copying.asked.len() >= CHUNKS_AT_ONCE {
                break;
            }
            let chunk = *chunk;
            if copying.asked.contains_key(&(volume, chunk)) {
                continue;
            }
            copying.asked.insert((volume, chunk), now);
            let request = SyncMessage::RequestChunk {
                at_least,
                volume,
                chunk,
            };
            self.actions.push_back(Action::Send {
                to: donor,
                message: Message::Sync(request),
            });
        }
    }

    pub(super) fn on_sync(&mut self, now: Instant, from: ServerId, message: SyncMessage) {
        match message {
            SyncMessage::RequestBase => self.give_base(from),
            SyncMessage::RequestList {
                at_least,
                volume,
                from: first,
            } => {
                self.give_list(from, at_least, volume, first);
            }
            SyncMessage::RequestChunk {
                at_least,
                volume,
                chunk,
            } => {
                self.give_chunk(from, at_least, volume, chunk);
            }
            SyncMessage::Base { base, state } => self.take_base(now, from, base, state),
            SyncMessage::List {
                as_of,
                volume,
                from: first,
                until,
                total,
                chunks,
            } => {
                if let Some(copying) = &mut self.copying {
                    copying.chunks_total = total;
                }
                self.take_list(now, from, as_of, (volume, first), until, &chunks);
            }
            SyncMessage::Chunk {
                as_of,
                volume,
                chunk,
                image,
            } => match self.copying {
                Some(_) => self.take_chunk(now, from, as_of, (volume, chunk), &image),
                None => {
                    let name = (volume, chunk);
                    if !self.take_mend_chunk(now, from, as_of, name, &image) {
                        self.take_repair_chunk(now, from, as_of, name, &image);
                    }
                }
            },
            SyncMessage::Refused => match &mut self.copying {
                Some(copying) => copying.give_up_question(now + RETRY),
                None => {
                    self.mend_refused(now, from);
                    self.repair_chunk_refused(now, from);
                }
            },
            SyncMessage::RequestBlocks {
                at_least,
                volume,
                blocks,
            } => self.give_blocks(from, at_least, volume, blocks),
            SyncMessage::Blocks {
                as_of,
                volume,
                damaged,
                blocks,
                data,
            } => {
                let good = blocks.into_iter().zip(data.chunks_exact(BLOCK_BYTES));
                self.take_blocks(now, from, as_of, volume, &damaged, good.collect());
            }
            SyncMessage::BlocksRefused { volume } => self.blocks_refused(now, from, volume),
            scrub @ (SyncMessage::TakePoint(_)
            | SyncMessage::Point(_)
            | SyncMessage::Mend(_)
            | SyncMessage::Mended(_)) => self.on_scrub(now, from, scrub),
        }
    }

    /// Whether chunks are being copied to this server, so that its data are not complete.
    pub fn is_installing(&self) -> bool {
        self.copying.as_ref().is_some_and(Copying::is_installing)
    }

    /// Whether our state is what the entries up to our applied slot made, not something in between, and
    /// the chunks for it are here.
    fn is_whole(&self) -> bool {
        !self.is_installing() && self.failure.is_none() && self.stalled.is_none()
    }

    /// Whether our chunks can be read as well.
    pub(super) fn is_complete(&self) -> bool {
        let settled = self.state.applied() >= self.recovered_last.min(self.replica.last().slot);
        self.is_whole() && settled
    }

    fn refuse(&mut self, to: ServerId) {
        let message = Message::Sync(SyncMessage::Refused);
        self.actions.push_back(Action::Send { to, message });
    }

    fn give_base(&mut self, to: ServerId) {
        let base = self.replica.entry_id(self.state.applied());
        match base {
            // Without waiting for what was recovered to be chosen: that may need the one who asks.
            Some(base) if self.is_whole() => {
                let state = Bytes::from(self.state.encode());
                let message = Message::Sync(SyncMessage::Base { base, state });
                self.actions.push_back(Action::Send { to, message });
            }
            _ => self.refuse(to),
        }
    }

    /// Our volume of that id, if we may give its chunks.
    pub(super) fn volume_to_give(&self, at_least: Slot, volume: VolumeId) -> Option<Arc<Volume>> {
        let fit = self.is_complete() && self.state.applied() >= at_least;
        fit.then(|| self.volumes.get(&volume).cloned()).flatten()
    }

    fn give_list(&mut self, to: ServerId, at_least: Slot, volume: VolumeId, from: ChunkIndex) {
        let Some(volume) = self.volume_to_give(at_least, volume) else {
            return self.refuse(to);
        };
        let Ok((chunks, until)) = self.chunks.list(&volume, from, LIST_MAX) else {
            return self.refuse(to);
        };
        let as_of = self.state.applied();
        let volumes = self.state.volumes();
        let total = volumes.map(|volume| self.chunks.chunk_count(volume.id));
        let list = SyncMessage::List {
            as_of,
            volume: volume.id,
            from,
            until,
            total: total.sum(),
            chunks,
        };
        self.actions.push_back(Action::Send {
            to,
            message: Message::Sync(list),
        });
    }

    fn give_chunk(&mut self, to: ServerId, at_least: Slot, volume: VolumeId, chunk: ChunkIndex) {
        let Some(volume) = self.volume_to_give(at_least, volume) else {
            return self.refuse(to);
        };
        let as_of = self.state.applied();
        self.actions.push_back(Action::Export(Export {
            to,
            volume,
            as_of,
            what: ExportWhat::Chunk(chunk),
        }));
    }

    fn take_base(&mut self, now: Instant, from: ServerId, base: EntryId, state: Bytes) {
        let Some(copying) = &mut self.copying else {
            return;
        };
        if !matches!(copying.stage, Stage::Base) {
            return;
        }
        let decoded = State::decode(&state);
        let Ok(decoded) = decoded else {
            return self.refuse_answer(now);
        };
        if decoded.applied() != base.slot {
            return self.refuse_answer(now);
        }
        if !self.replica.needs_base(base) {
            // Meanwhile the log has reached us.
            return self.no_base_needed(now);
        }
        if self.checkpoint_running || self.replica.changes_life() {
            // It would be stored over the base; or the server counts in a moment, because it is complete.
            return self.refuse_answer(now);
        }
        if self.chunks.dirty_count() > 0 {
            // A chunk can have been copied newer than the entries that were applied to it since. After a
            // power cut its data may then be older than its checksums, which are equal to the donor's; and
            // from the new base on nothing is applied again that would put it right.
            self.start_checkpoint(now);
            return self.refuse_answer(now);
        }
        let applied = self.state.applied();
        let is_proven = applied >= self.held_last;
        let Some(copying) = &mut self.copying else {
            return;
        };
        if !is_proven {
            copying.proven = copying.proven.min(applied);
        }
        // From now on the disk says so.
        self.replica.note_complete(false);
        copying.donor = Some(from);
        copying.stage = Stage::Storing {
            base,
            state: Box::new(decoded),
        };
        self.actions.push_back(Action::StoreBase {
            base,
            proven: copying.proven,
            marks: self.replica.marks().clone(),
            state,
        });
    }

    /// The log goes on without another base; chunks may still be incomplete because of an earlier one.
    fn no_base_needed(&mut self, now: Instant) {
        self.copying = self.copying.take().filter(Copying::is_installing);
        if let Some(copying) = &mut self.copying {
            copying.stage = Stage::List;
            copying.give_up_question(now);
        }
        self.apply_backlog(now);
    }

    fn refuse_answer(&mut self, now: Instant) {
        if let Some(copying) = &mut self.copying {
            copying.give_up_question(now + RETRY);
        }
    }

    /// The base that [`Action::StoreBase`] named is durable.
    pub fn handle_base_stored(&mut self, now: Instant) {
        let Some(copying) = &mut self.copying else {
            return;
        };
        let Stage::Storing { base, state } = std::mem::replace(&mut copying.stage, Stage::List)
        else {
            return;
        };
        copying.retry_at = now;
        if !self.replica.needs_base(base) {
            // The log grew beyond the base while that was being stored. It is kept; the base stands on
            // disk as a checkpoint that the next one replaces.
            self.no_base_needed(now);
            return self.checkpoint_now(now);
        }
        copying.installing = true;
        tracing::info!(
            slot = base.slot.0,
            "the log does not go back so far: chunks are copied from the others"
        );
        self.installs += 1;
        // What was copied before has missed the entries up to the base.
        copying.cursor = (VolumeId(0), ChunkIndex(0));
        if let Err(failure) = self.chunks.exchange_volumes(state.volumes()) {
            self.failure = Some(failure.into());
            return;
        }
        self.state = *state;
        // What happened meanwhile is in the journals of those who applied it.
        self.logged_event = self.state.events_made();
        // What waited for space is in the base.
        self.stalled = None;
        self.backlog.clear();
        self.backlog_bytes = 0;
        self.share_volumes();
        self.checkpoint_slot = base.slot;
        self.stored_slot = base.slot;
        self.installed_base = Some(base.slot);
        self.recovered_last = base.slot;
        let admitted = *self.state.admitted();
        let members = self.state.members().cloned();
        self.replica.handle_base(now, base, admitted, members);
        self.drain(now);
        self.copy_timeout(now);
    }

    fn take_list(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        start: ChunkName,
        until: Option<ChunkIndex>,
        chunks: &[ChunkSummary],
    ) {
        let needed = self.needed();
        let Some(copying) = &mut self.copying else {
            return;
        };
        if !matches!(copying.stage, Stage::List) || start != copying.cursor {
            return;
        }
        let Some(volume) = self.volumes.get(&start.0).cloned() else {
            return;
        };
        // An older list could miss what entries that we skipped have made.
        let ordered = chunks.windows(2).all(|pair| pair[0].chunk < pair[1].chunk);
        if as_of < needed || !ordered || until.is_some_and(|until| until <= start.1) {
            return self.refuse_answer(now);
        }
        copying.donor = Some(from);
        if copying.told.replace(from) != Some(from) {
            tracing::info!("copying chunks from server {from}");
        }
        copying.list_asked = false;
        copying.moved_at = now;
        copying.chunks_known += chunks.len() as u64;
        let inside = |chunk: ChunkIndex| until.is_none_or(|until| chunk < until);
        let listed: BTreeMap<ChunkIndex, &ChunkSummary> = chunks
            .iter()
            .filter(|it| inside(it.chunk))
            .map(|it| (it.chunk, it))
            .collect();
        // What we have and the donor has not is gone; what is equal need not be copied.
        let mut missing: BTreeSet<ChunkIndex> = listed.keys().copied().collect();
        let mut at = start.1;
        loop {
            let (own, next) = match self.chunks.list(&volume, at, LIST_MAX) {
                Ok(listed) => listed,
                Err(error) => {
                    self.failure = Some(error.into());
                    return;
                }
            };
            for summary in own.iter().filter(|summary| inside(summary.chunk)) {
                match listed.get(&summary.chunk) {
                    Some(theirs) if *theirs == summary && summary.last_slot <= copying.proven => {
                        missing.remove(&summary.chunk);
                        copying.chunks_done += 1;
                    }
                    Some(_) => {}
                    None => {
                        if let Err(failure) =
                            self.chunks.import(&volume, summary.chunk, &Bytes::new())
                        {
                            self.failure = Some(failure.into());
                            return;
                        }
                    }
                }
            }
            match next {
                Some(next) if inside(next) => at = next,
                _ => break,
            }
        }
        copying.stage = Stage::Chunks { missing, until };
        copying.retry_at = now;
        self.after_chunk(now);
    }

    fn take_chunk(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        name: ChunkName,
        image: &Bytes,
    ) {
        let needed = self.needed();
        let Some(copying) = &mut self.copying else {
            return;
        };
        let Stage::Chunks { missing, .. } = &mut copying.stage else {
            return;
        };
        if name.0 != copying.cursor.0 || !missing.contains(&name.1) {
            return;
        }
        copying.asked.remove(&name);
        let Some(volume) = self.volumes.get(&name.0).cloned() else {
            return;
        };
        if as_of < needed {
            copying.retry_at = now;
            return self.copy_timeout(now);
        }
        match self.chunks.import(&volume, name.1, image) {
            Ok(()) => {}
            Err(ChunkError::BadImage(_)) => {
                // Damaged on the way or at the donor: ask another one.
                return copying.give_up_question(now + RETRY);
            }
            Err(ChunkError::NoSpace) => {
                copying.lacks_space = true;
                return copying.give_up_question(now + SPACE_RETRY);
            }
            Err(error) => {
                self.failure = Some(error.into());
                return;
            }
        }
        copying.lacks_space = false;
        copying.donor = Some(from);
        missing.remove(&name.1);
        copying.chunks_done += 1;
        copying.moved_at = now;
        copying.retry_at = now;
        self.after_chunk(now);
    }

    /// Goes on with the next chunks, the next list, or the end.
    fn after_chunk(&mut self, now: Instant) {
        let Some(copying) = &mut self.copying else {
            return;
        };
        if now.since(copying.logged_at) >= LOG_EVERY {
            copying.logged_at = now;
            let (done, total) = copying.progress();
            let left_s = copying.time_left(now).map(|left| left.as_secs());
            tracing::info!(left_s, "copying chunks: {done} of {total} are here");
        }
        let gone = !self.volumes.contains_key(&copying.cursor.0);
        if let Stage::Chunks { missing, until } = &copying.stage
            && (missing.is_empty() || gone)
        {
            copying.cursor = match until {
                Some(until) if !gone => (copying.cursor.0, *until),
                _ => (VolumeId(copying.cursor.0.0 + 1), ChunkIndex(0)),
            };
            copying.asked.clear();
            copying.stage = Stage::List;
            if self.source.is_some() {
                // If another had to help out, that was for one list.
                copying.donor = None;
                copying.turn = 0;
            }
        }
        self.copy_timeout(now);
    }

    fn finish_copying(&mut self, now: Instant) {
        if let Some(copying) = self.copying.take() {
            let seconds = now.since(copying.began).as_secs();
            let chunks = copying.chunks_done;
            tracing::info!(chunks, seconds, "all chunks are here");
        }
        self.replica.handle_installed();
        // The note that copying is under way ends with the next checkpoint.
        self.start_checkpoint(now);
    }
}
