//! A server that lags, or a learner, fetches chosen entries; from followers where it can.
//!
//! The one that lags asks, one message at a time; the one that feeds answers when it has something new.

use std::time::Duration;

use crate::entry::Entry;
use crate::paxos::message::Message;
use crate::paxos::output::Output;
use crate::paxos::{PendingWrite, Replica};
use crate::time::Instant;
use crate::types::{Ballot, EntryId, ServerId, Slot};

/// A question that was not answered is asked again, of someone else, after this time.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(400);
/// A follower that has not got new entries from the leader for this long asks for them itself.
const PATIENCE: Duration = Duration::from_millis(300);
/// So often another server is asked for entries that one has no more, before chunks are copied.
const DETOURS_MAX: u32 = 5;
/// A feeder forgets a waiting server after this time: it would have asked again.
const WAITING_MAX: Duration = Duration::from_secs(2);

/// The asking side.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct CatchUp {
    /// Someone has chosen up to here.
    known_chosen: Slot,
    /// Our own chosen slot when it last rose, and when that was.
    progress: (Slot, Instant),
    /// Who was asked, and until when it may answer.
    asked: Option<(ServerId, Instant)>,
    /// Turns to another feeder with each question that was not answered.
    turn: usize,
    next_at: Instant,
    /// How often another server was asked for what one has no more, since it brought something.
    detours: u32,
}

impl CatchUp {
    pub(super) fn new(now: Instant) -> CatchUp {
        CatchUp {
            known_chosen: Slot(0),
            progress: (Slot(0), now),
            asked: None,
            turn: 0,
            next_at: now + PATIENCE,
            detours: 0,
        }
    }

    pub(super) fn note_chosen(&mut self, chosen: Slot) {
        self.known_chosen = self.known_chosen.max(chosen);
    }

    pub(super) fn next_at(&self) -> Instant {
        self.next_at
    }
}

/// The answering side: a server that waits for entries behind a slot.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Feeding {
    after: Slot,
    until: Instant,
    /// The log is being read for it.
    reading: bool,
}

/// What was read from the log on disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LogRead {
    /// Consecutive entries.
    Entries {
        /// The entry before the first.
        prev: EntryId,
        /// May be fewer than asked for.
        entries: Vec<Entry>,
    },
    /// The log does not reach back so far.
    Gone {
        /// Its first slot.
        first: Slot,
    },
}

impl Replica {
    pub(super) fn catch_up_timeout(&mut self, now: Instant) {
        if now < self.catch_up.next_at {
            return;
        }
        self.catch_up.next_at = now + PATIENCE / 2;
        if self.chosen > self.catch_up.progress.0 {
            self.catch_up.progress = (self.chosen, now);
        }
        if let Some((_, until)) = self.catch_up.asked {
            if now < until {
                return;
            }
            self.turn_to_another();
        }
        let behind = self.catch_up.known_chosen > self.chosen;
        let stuck = now.since(self.catch_up.progress.1) >= PATIENCE;
        if !self.is_core() || (behind && stuck && !self.compares_logs()) {
            self.ask(now);
        }
    }

    fn ask(&mut self, now: Instant) {
        // The disk may be slower than the network, and what is not applied stays in memory.
        let waiting = self.tail.weight_between(self.applied, self.chosen);
        if waiting >= self.config.tuning.window_bytes || self.log_full {
            return;
        }
        if let Some(feeder) = self.feeder(now) {
            self.ask_after(now, feeder, self.chosen);
        }
    }

    fn ask_after(&mut self, now: Instant, feeder: ServerId, after: Slot) {
        self.catch_up.asked = Some((feeder, now + ANSWER_TIMEOUT));
        self.send(feeder, Message::CatchUp { after });
    }

    /// An answer, or none in time, of no use: the next question goes to another server.
    fn turn_to_another(&mut self) {
        self.catch_up.asked = None;
        self.catch_up.turn += 1;
    }

    /// Who to ask: a server that was heard of lately and is not behind us; followers first, and learners that are
    /// ahead of us.
    fn feeder(&self, now: Instant) -> Option<ServerId> {
        let alive = |server: &ServerId| {
            let Some(peer) = self.peers.get(server) else {
                return false;
            };
            let lately = peer
                .heard
                .is_some_and(|at| now.since(at) < self.config.tuning.lease * 4);
            // Two learners that know the same must not wait for each other.
            let has_some = match self.config.members.core.contains(server) {
                true => peer.progress.chosen >= self.chosen,
                false => peer.progress.chosen > self.chosen,
            };
            lately && Some(*server) != self.leader && has_some
        };
        let mut feeders = self.other_servers();
        feeders.retain(alive);
        if feeders.is_empty() || self.catch_up.turn % 4 == 3 {
            feeders = self
                .leader
                .into_iter()
                .filter(|it| *it != self.config.id)
                .collect();
        }
        if feeders.is_empty() {
            feeders = self.other_core();
        }
        let start = self.catch_up.turn + usize::from(self.config.id.0);
        feeders.get(start % feeders.len().max(1)).copied()
    }

    pub(super) fn on_catch_up(&mut self, now: Instant, from: ServerId, after: Slot) {
        let feeding = Feeding {
            after,
            until: now + WAITING_MAX,
            reading: false,
        };
        self.feeding.insert(from, feeding);
    }

    /// Answers servers that wait, if there is something new for them.
    pub(super) fn feed(&mut self, now: Instant) {
        if self.feeding.is_empty() {
            return;
        }
        self.feeding.retain(|_, feeding| now < feeding.until);
        let due = self.feeding.iter().filter(|(_, feeding)| !feeding.reading);
        let due: Vec<(ServerId, Slot)> = due.map(|(to, feeding)| (*to, feeding.after)).collect();
        for (to, after) in due {
            if after < self.chosen.min(self.durable) {
                self.feed_one(to, after);
            }
        }
    }

    fn feed_one(&mut self, to: ServerId, after: Slot) {
        let until = self.chosen.min(self.durable);
        let bytes_max = self.config.tuning.catch_up_bytes;
        match self.tail.read(after, until, bytes_max) {
            Some((prev, entries)) => {
                self.feeding.remove(&to);
                let chosen = self.chosen;
                self.send(
                    to,
                    Message::Chosen {
                        prev,
                        entries,
                        chosen,
                    },
                );
            }
            None => {
                if let Some(feeding) = self.feeding.get_mut(&to) {
                    feeding.reading = true;
                }
                self.read_log(to, after, None);
            }
        }
    }

    pub(super) fn read_log(&mut self, to: ServerId, after: Slot, tail_for: Option<Ballot>) {
        // Until the log is started anew on the disk as well, it holds what was never chosen.
        if self
            .writes
            .iter()
            .any(|(_, write)| *write == PendingWrite::Reset)
        {
            let first = self.tail.base().slot.next();
            return self.handle_log_gone(to, first, tail_for);
        }
        let last = self.tail.last().slot;
        let chosen = self.chosen.min(self.durable);
        let until = if tail_for.is_some() {
            last.min(self.durable)
        } else {
            chosen
        };
        let bytes_max = self.config.tuning.catch_up_bytes;
        self.outputs.push_back(Output::ReadLog {
            to,
            after,
            until,
            bytes_max,
            tail_for,
        });
    }

    fn handle_log_gone(&mut self, to: ServerId, first: Slot, tail_for: Option<Ballot>) {
        if tail_for.is_none() {
            self.feeding.remove(&to);
        }
        let chosen = self.chosen;
        self.send(to, Message::LogGone { first, chosen });
    }

    /// Answer to [`Output::ReadLog`].
    pub fn handle_log_read(
        &mut self,
        now: Instant,
        to: ServerId,
        tail_for: Option<Ballot>,
        read: LogRead,
    ) {
        if tail_for.is_none() {
            self.feeding.remove(&to);
        }
        let chosen = self.chosen;
        match (read, tail_for) {
            (LogRead::Entries { prev, entries }, None) => {
                self.send(
                    to,
                    Message::Chosen {
                        prev,
                        entries,
                        chosen,
                    },
                );
            }
            (LogRead::Entries { prev, entries }, Some(ballot)) if ballot == self.promised => {
                let last = self.tail.last();
                self.send(
                    to,
                    Message::Tail {
                        ballot,
                        prev,
                        entries,
                        last,
                    },
                );
            }
            (LogRead::Gone { first }, _) => self.handle_log_gone(to, first, tail_for),
            _ => {}
        }
        self.advance(now);
    }

    pub(super) fn on_chosen_entries(
        &mut self,
        now: Instant,
        from: ServerId,
        prev: EntryId,
        entries: Vec<Entry>,
        chosen: Slot,
    ) {
        self.catch_up.note_chosen(chosen);
        let expected = self.catch_up.asked.is_some_and(|(asked, _)| asked == from);
        if expected {
            self.catch_up.asked = None;
        }
        // A leader's log holds everything that is chosen; a candidate's is being compared.
        if self.compares_logs() {
            return;
        }
        // Whose entries are chosen has won phase 1: the leader that we follow has lost, and so have the
        // leases that were granted to it.
        let ballot = entries.last().map(|entry| entry.id.ballot);
        let appended = match entries.is_empty() {
            false => self.append_behind(prev, entries, Slot(u64::MAX)),
            true => None,
        };
        let Some(end) = appended else {
            if expected {
                self.turn_to_another();
                let differs = self.tail.id(prev.slot).is_some_and(|own| own != prev);
                if differs && prev.slot > self.chosen {
                    // It has nothing from before this, see on_log_gone, and our log is another one.
                    self.outputs.push_back(Output::CopyChunks { donor: from });
                }
            }
            return;
        };
        if let Some(ballot) = ballot.filter(|ballot| *ballot > self.promised) {
            self.promise(ballot);
        }
        self.learn_chosen(end);
        self.settle_claim();
        self.catch_up.progress = (self.chosen, now);
        self.catch_up.detours = 0;
        // One question at a time, and none for what the leader has sent meanwhile.
        let behind = self.catch_up.known_chosen > self.equal_to_leader();
        if self.catch_up.asked.is_none() && (!self.is_core() || behind) {
            self.ask(now);
        }
    }

    pub(super) fn on_log_gone(&mut self, now: Instant, from: ServerId, first: Slot, chosen: Slot) {
        self.catch_up.note_chosen(chosen);
        let expected = self.catch_up.asked.is_some_and(|(asked, _)| asked == from);
        self.tail_is_gone(now, from, first);
        let before = Slot(first.0.saturating_sub(1));
        if expected {
            self.turn_to_another();
            if before > self.chosen && before <= self.tail.last().slot {
                // We hold what it has no more, but do not know it to be chosen. If the logs are equal
                // just before `first`, they are equal up to there.
                return self.ask_after(now, from, before);
            }
        }
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.progress.log_first = peer.progress.log_first.max(first);
        }
        // Only if even the log's first entries would leave a gap.
        if first <= self.tail.last().slot.next() {
            return;
        }
        match self.keeper(now) {
            Some(keeper) if expected => {
                self.catch_up.detours += 1;
                self.ask_after(now, keeper, self.chosen);
            }
            Some(_) => {}
            None => self.outputs.push_back(Output::CopyChunks { donor: from }),
        }
    }

    /// A server whose log goes on where ours ends. Copying chunks takes long, and what is copied is no copy
    /// that could replace another's meanwhile; so the log is asked for everywhere first, but not for ever.
    fn keeper(&self, now: Instant) -> Option<ServerId> {
        if self.catch_up.detours >= DETOURS_MAX {
            return None;
        }
        let keeps = |server: &ServerId| {
            self.peers.get(server).is_some_and(|peer| {
                let lately = self.config.tuning.lease * 4;
                peer.heard.is_some_and(|at| now.since(at) < lately)
                    && peer.progress.log_first <= self.chosen.next()
                    && peer.progress.chosen > self.chosen
            })
        };
        self.other_servers().into_iter().find(keeps)
    }
}
