//! Becoming leader: asking whether it could work, phase 1, taking over the tail.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::Entry;
use crate::paxos::message::Message;
use crate::paxos::{Bug, Replica, Role};
use crate::time::Instant;
use crate::types::{Admitted, Ballot, EntryId, Incarnation, ServerId, Slot};

/// How often a candidate whose log is behind lets others go first.
const POLITE_ROUNDS: u32 = 3;

/// A server that tries to become leader.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Candidate {
    /// The ballot it uses, or would use.
    pub(super) ballot: Ballot,
    /// A former leader's ballot that was given up for this candidate.
    released: Option<Ballot>,
    /// Rounds in which it let a server with a longer log go first.
    polite_rounds: u32,
    /// Who votes, as its log said when it began.
    core: Vec<ServerId>,
    stage: Stage,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Stage {
    /// Asks whether it could win. No ballot is used up yet.
    PreCheck { granted: BTreeSet<ServerId> },
    /// Waits for its own promise to become durable, then for those of a majority.
    Prepare {
        promises: BTreeMap<ServerId, Promised>,
        /// Lives of servers that rejoin: what earlier ones held is gone.
        absent: BTreeMap<ServerId, Incarnation>,
    },
    /// Has a majority and fetches the tail of the best log among it.
    Adopt {
        from: ServerId,
        target: EntryId,
        promises: BTreeMap<ServerId, Promised>,
    },
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Promised {
    /// What it may have acknowledged,
    pub(super) last: EntryId,
    /// what it held for certain,
    pub(super) certain: EntryId,
    /// and what it can show.
    pub(super) have: EntryId,
    pub(super) chosen: Slot,
    /// Which life of it promises,
    pub(super) life: Incarnation,
    /// and which lives count, as its log says.
    pub(super) admitted: Admitted,
}

impl Replica {
    /// Whether this server could lead at all: a core server with complete data, a log that is not certain
    /// to be damaged, and not so much to apply that nobody would be answered for long.
    pub(super) fn may_lead(&self) -> bool {
        let is_whole = !self.installing && self.certain <= self.tail.last();
        self.is_core() && is_whole && !self.has_backlog()
    }

    /// Whether it leads, or has used a ballot to. Who only asks whether it could win may have to learn first: as long as it
    /// does not know which lives of others count, it can neither win nor help others to.
    pub(super) fn compares_logs(&self) -> bool {
        match &self.role {
            Role::Follower => false,
            Role::Candidate(candidate) => !matches!(candidate.stage, Stage::PreCheck { .. }),
            Role::Leader(_) => true,
        }
    }

    pub(super) fn election_timeout(&mut self, now: Instant) {
        if now < self.election_at {
            return;
        }
        let polite_rounds = match &self.role {
            Role::Candidate(candidate) => candidate.polite_rounds,
            _ => 0,
        };
        if self.promised_durable != self.promised {
            // A slow disk: another ballot would only make it wait longer.
            self.election_at = now + self.config.tuning.lease + self.jitter();
            return;
        }
        if !self.may_lead() || self.disk_hangs(now) {
            self.leader = None;
            self.election_at = now + self.config.tuning.lease + self.jitter();
            return;
        }
        self.start_pre_check(now, polite_rounds);
    }

    fn start_pre_check(&mut self, now: Instant, polite_rounds: u32) {
        // Nothing may be promised yet? Then others would refuse as well.
        if !self.may_promise(now, None) {
            self.election_at = now + self.config.tuning.heartbeat + self.jitter();
            return;
        }
        self.leader = None;
        let ballot = self.next_ballot();
        self.role = Role::Candidate(Candidate {
            ballot,
            released: None,
            polite_rounds,
            core: self.config.members.core.clone(),
            stage: Stage::PreCheck {
                granted: BTreeSet::new(),
            },
        });
        self.election_at = now + self.retry_delay();
        let last = self.claimed_last();
        for server in self.other_core() {
            self.send(server, Message::PreCheck { ballot, last });
        }
        if self.majority() == 1 {
            self.start_prepare(now, None);
        }
    }

    pub(super) fn next_ballot(&self) -> Ballot {
        let number = self.highest_number.max(self.promised.number) + 1;
        Ballot {
            number,
            server: self.config.id,
        }
    }

    fn retry_delay(&mut self) -> std::time::Duration {
        self.config.tuning.heartbeat * 2 + self.jitter()
    }

    pub(super) fn on_pre_check_answer(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        granted: bool,
        promised: Ballot,
        last: EntryId,
    ) {
        self.highest_number = self.highest_number.max(promised.number);
        let own_last = self.claimed_last();
        let majority = self.majority();
        let core = self.config.members.core.contains(&from);
        let Role::Candidate(candidate) = &mut self.role else {
            return;
        };
        let Stage::PreCheck { granted: grants } = &mut candidate.stage else {
            return;
        };
        if candidate.ballot != ballot || !granted || !core {
            return;
        }
        grants.insert(from);
        if last > own_last && candidate.polite_rounds < POLITE_ROUNDS {
            // Its log is better, so that it would lead sooner: let it go first.
            candidate.polite_rounds += 1;
            candidate.stage = Stage::PreCheck {
                granted: BTreeSet::new(),
            };
            candidate.ballot.number = 0;
            self.election_at = now + self.retry_delay();
            return;
        }
        if grants.len() + 1 >= majority {
            self.start_prepare(now, None);
        }
    }

    /// Phase 1a. The candidate's own promise becomes durable first, so that the ballot is never used
    /// twice.
    fn start_prepare(&mut self, now: Instant, released: Option<Ballot>) {
        if !self.may_lead() {
            // It has learned meanwhile that it votes no more, or what it lacks.
            return self.step_down(now);
        }
        let ballot = self.next_ballot();
        self.role = Role::Candidate(Candidate {
            ballot,
            released,
            polite_rounds: 0,
            core: self.config.members.core.clone(),
            stage: Stage::Prepare {
                promises: BTreeMap::new(),
                absent: BTreeMap::new(),
            },
        });
        self.promise(ballot);
        self.election_at = now + self.config.tuning.lease + self.jitter();
    }

    pub(super) fn own_promise_is_durable(&mut self, now: Instant) {
        let own = Promised {
            last: self.claimed_last(),
            certain: self.certain.max(self.tail.last()),
            have: self.tail.last(),
            chosen: self.chosen,
            life: self.config.incarnation,
            admitted: self.admitted(),
        };
        let me = self.config.id;
        let Role::Candidate(candidate) = &mut self.role else {
            return;
        };
        let Stage::Prepare { promises, .. } = &mut candidate.stage else {
            return;
        };
        if candidate.ballot != self.promised {
            return;
        }
        promises.insert(me, own);
        let prepare = Message::Prepare {
            ballot: candidate.ballot,
            released: candidate.released,
        };
        for server in self.other_core() {
            self.send(server, prepare.clone());
        }
        // The others' disks need their time too.
        self.election_at = now + self.config.tuning.lease + self.jitter();
        self.count_promises(now);
    }

    pub(super) fn on_promise(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        promised: Promised,
    ) {
        let core = self.config.members.core.contains(&from);
        let me = self.config.id;
        let Role::Candidate(candidate) = &mut self.role else {
            return;
        };
        if candidate.ballot != ballot || !core {
            return;
        }
        match &mut candidate.stage {
            // Our own promise comes first: before it is durable nobody was asked.
            Stage::Prepare { promises, .. } if promises.contains_key(&me) => {
                // One of an earlier life may come late.
                let known = promises.get(&from).map(|it| it.life);
                if known > Some(promised.life) {
                    return;
                }
                promises.insert(from, promised);
                self.count_promises(now);
            }
            _ => {}
        }
    }

    /// A server that rejoins has answered our `Prepare`.
    pub(super) fn on_absent(
        &mut self,
        now: Instant,
        from: ServerId,
        life: Incarnation,
        ballot: Ballot,
    ) {
        let core = self.config.members.core.contains(&from);
        let Role::Candidate(candidate) = &mut self.role else {
            return;
        };
        if candidate.ballot != ballot || !core {
            return;
        }
        if let Stage::Prepare { absent, .. } = &mut candidate.stage {
            let latest = absent.entry(from).or_default();
            *latest = life.max(*latest);
            self.count_promises(now);
        }
    }

    /// Goes on when the promises are enough to take over the best log among them.
    fn count_promises(&mut self, now: Instant) {
        let majority = self.majority();
        let listed = self.config.members.core.len();
        let own = self.tail.last();
        // What damage hides may have been chosen by a list of one core server more or less. Of an odd number of servers, those
        // that do not hold it and are too many for this list are too many for those as well; of an even number it takes
        // one more of them.
        let slack = usize::from(listed.is_multiple_of(2));
        let known = self.admitted();
        let counts_all = self.bug == Some(Bug::CountOldLives);
        let me = (self.config.id, self.config.incarnation);
        let Role::Candidate(candidate) = &mut self.role else {
            return;
        };
        let Stage::Prepare { promises, absent } = &mut candidate.stage else {
            return;
        };
        // An earlier life has not promised what its server promises now.
        let known = promises
            .values()
            .fold(known, |known, it| known.merged(&it.admitted));
        if !known.counts(me.0, me.1) && !counts_all {
            return self.step_down(now);
        }
        for (server, promised) in &*promises {
            if promised.life > known.of(*server) && !known.counts(*server, promised.life) {
                // A life that nobody has let in yet.
                let latest = absent.entry(*server).or_default();
                *latest = promised.life.max(*latest);
            }
        }
        promises.retain(|server, it| counts_all || known.counts(*server, it.life));
        // The life that counts is not gone because an earlier one is.
        absent.retain(|server, life| *life >= known.of(*server) && !promises.contains_key(server));
        let have = promises.values().map(|promised| promised.have).max();
        let best = have.unwrap_or_default().max(own);
        let answered = promises.len() + absent.len();
        if !is_enough(
            promises.values(),
            best,
            answered == listed,
            listed,
            (majority, slack),
        ) {
            return;
        }
        if own >= best || self.bug == Some(Bug::SkipTail) {
            let promises = std::mem::take(promises);
            return self.lead(now, &promises);
        }
        let source = promises.iter().find(|(_, promised)| promised.have >= best);
        let Some((&from, _)) = source else { return };
        let promises = std::mem::take(promises);
        candidate.stage = Stage::Adopt {
            from,
            target: best,
            promises,
        };
        self.fetch_tail();
    }

    fn fetch_tail(&mut self) {
        self.fetch_tail_after(self.equal_to_leader());
    }

    fn fetch_tail_after(&mut self, after: Slot) {
        let Role::Candidate(candidate) = &self.role else {
            return;
        };
        let Stage::Adopt { from, .. } = candidate.stage else {
            return;
        };
        let ballot = candidate.ballot;
        self.send(from, Message::FetchTail { ballot, after });
    }

    /// The log that was to be taken over begins only with `first`.
    pub(super) fn tail_is_gone(&mut self, now: Instant, from: ServerId, first: Slot) {
        let before = Slot(first.0.saturating_sub(1));
        let adopts = |candidate: &Candidate| match candidate.stage {
            Stage::Adopt { from: source, .. } => source == from,
            _ => false,
        };
        if !matches!(&self.role, Role::Candidate(candidate) if adopts(candidate)) {
            return;
        }
        if before > self.equal_to_leader() && before <= self.tail.last().slot {
            // If the logs are equal just before `first`, they are equal up to there.
            return self.fetch_tail_after(before);
        }
        // Too far behind to lead.
        self.step_down(now);
        self.election_at = now + self.config.tuning.lease * 3;
    }

    pub(super) fn on_fetch_tail(&mut self, from: ServerId, ballot: Ballot, after: Slot) {
        if ballot != self.promised || ballot.server != from {
            return;
        }
        let last = self.tail.last();
        let bytes_max = self.config.tuning.catch_up_bytes;
        if let Some((prev, entries)) = self.tail.read(after, last.slot, bytes_max) {
            self.send(
                from,
                Message::Tail {
                    ballot,
                    prev,
                    entries,
                    last,
                },
            );
        } else {
            self.read_log(from, after, Some(ballot));
        }
    }

    pub(super) fn on_tail(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        prev: EntryId,
        entries: Vec<Entry>,
        _last: EntryId,
    ) {
        let Role::Candidate(candidate) = &self.role else {
            return;
        };
        let Stage::Adopt {
            from: source,
            target,
            ..
        } = &candidate.stage
        else {
            return;
        };
        if candidate.ballot != ballot || *source != from {
            return;
        }
        let target = *target;
        let Some(end) = self.append_behind(prev, entries, Slot(0)) else {
            return;
        };
        // A doubled answer, or a log that became shorter: asking again at once could go on for ever.
        if end <= self.matched && end < target.slot {
            return;
        }
        // Up to here our log is equal to the one that we take over.
        self.matched = self.matched.max(end);
        self.settle_claim();
        self.election_at = now + self.config.tuning.lease + self.jitter();
        if self.matched >= target.slot {
            if self.tail.id(target.slot) != Some(target) {
                // It learned what a later ballot chose, and that replaced its tail.
                return self.step_down(now);
            }
            let Role::Candidate(candidate) = &mut self.role else {
                return;
            };
            let Stage::Adopt { promises, .. } = &mut candidate.stage else {
                return;
            };
            let promises = std::mem::take(promises);
            self.lead(now, &promises);
        } else {
            self.fetch_tail();
        }
    }

    /// Leads, if the promises are a majority by the list of servers in the log that it leads with: one that was taken over
    /// from another may have a different one.
    fn lead(&mut self, now: Instant, promises: &BTreeMap<ServerId, Promised>) {
        let Role::Candidate(candidate) = &self.role else {
            return;
        };
        let is_same = candidate.core == self.config.members.core && self.is_core();
        if is_same || self.bug == Some(Bug::CountByOldList) {
            return self.become_leader(now, promises);
        }
        self.step_down(now);
        self.election_at = now + self.jitter();
    }

    /// The leader gives up for us: phase 1 at once.
    pub(super) fn on_hand_over(&mut self, now: Instant, ballot: Ballot) {
        let following = matches!(self.role, Role::Follower);
        let able = self.may_lead() && !self.disk_hangs(now);
        if !following || ballot != self.promised || !able || now < self.quiet_until {
            return;
        }
        self.start_prepare(now, Some(ballot));
    }
}

/// Whether the log that ends at `best`, the greatest that a server among the promises can show, holds
/// everything that may be chosen.
///
/// It does if a majority never acknowledged anything beyond it. A server that claims more than can be
/// shown does not count: what it claims may be chosen, and a server that is away may hold it.
///
/// If every core server has answered, nobody is away. What none of them can show was then not chosen,
/// as long as damage has not taken more copies of an entry than a minority; for that it must be possible
/// that a minority held the entry. A server that rejoins has answered in this sense: its copies are damaged, all
/// of them. Otherwise only a person may decide what to give up.
fn is_enough<'a>(
    promises: impl ExactSizeIterator<Item = &'a Promised> + Clone,
    best: EntryId,
    all: bool,
    listed: usize,
    (majority, slack): (usize, usize),
) -> bool {
    let promised = promises.len();
    let clean = promises.clone().filter(|it| it.last <= best).count();
    let without = promises.filter(|it| it.certain <= best).count();
    let denied = all && promised >= majority && without > listed + slack - majority;
    clean >= majority || denied
}
