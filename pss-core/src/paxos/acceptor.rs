//! The acceptor: promises, the log, acknowledgements, and the lease it grants.

use crate::entry::Entry;
use crate::paxos::message::Message;
use crate::paxos::output::{Output, Persist, RoleChange};
use crate::paxos::{Bug, PendingWrite, Replica, Role};
use crate::time::Instant;
use crate::types::{Ballot, EntryId, Incarnation, ServerId, Slot};

impl Replica {
    pub(super) fn on_pre_check(
        &mut self,
        now: Instant,
        from: ServerId,
        life: Incarnation,
        ballot: Ballot,
        last: EntryId,
    ) {
        // Who cannot make a promise durable does not raise hopes.
        let able = self.may_promise(now, None) && !self.disk_hangs(now);
        // One that does not vote here, but whose log is newer, may know of its vote by that.
        let is_candidate = self.may_win(from) || last > self.claimed_last();
        let able = able && self.counts(from, life) && is_candidate;
        let granted = ballot > self.promised && able;
        let answer = Message::PreCheckAnswer {
            ballot,
            granted,
            promised: self.promised,
            last: self.claimed_last(),
        };
        self.send(from, answer);
    }

    /// Phase 1b.
    pub(super) fn on_prepare(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        released: Option<Ballot>,
    ) {
        if self.rejoining && ballot.server == from && !self.may_vote() {
            return self.send(from, Message::Absent { ballot });
        }
        if !self.may_vote() || ballot.server != from {
            return;
        }
        self.highest_number = self.highest_number.max(ballot.number);
        if ballot < self.promised {
            let promised = self.promised;
            return self.send(from, Message::Nack { ballot, promised });
        }
        if ballot > self.promised {
            if !self.may_promise(now, released) {
                return;
            }
            self.step_down(now);
            self.promise(ballot);
            // Give the candidate time to win.
            self.election_at = now + self.config.tuning.lease + self.jitter();
        }
        self.promise_to = Some(from);
        if self.promised_durable == ballot || self.bug == Some(Bug::PromiseBeforeSync) {
            self.send_promise();
        }
    }

    /// Whether a promise to a new ballot could contradict a lease that this server granted, or may have
    /// granted before its restart, or holds itself.
    pub(super) fn may_promise(&self, now: Instant, released: Option<Ballot>) -> bool {
        if self.bug == Some(Bug::IgnoreGrantedLease) {
            return true;
        }
        if !self.may_vote() || now < self.quiet_until || self.holds_lease(now) {
            return false;
        }
        now >= self.granted_until || released == Some(self.granted_to)
    }

    /// Raises the promise. Nothing of a lower ballot is accepted from now on.
    pub(super) fn promise(&mut self, ballot: Ballot) {
        assert!(ballot > self.promised, "ballots only rise");
        self.promised = ballot;
        self.highest_number = self.highest_number.max(ballot.number);
        self.leader = None;
        self.matched = Slot(0);
        self.promise_to = None;
        self.persist(Persist::Promise(ballot), PendingWrite::Promise(ballot));
    }

    pub(super) fn promise_is_durable(&mut self, now: Instant) {
        if self.promised_durable != self.promised {
            return;
        }
        match &self.role {
            Role::Candidate(_) => self.own_promise_is_durable(now),
            _ if self.promise_to.is_some() => self.send_promise(),
            _ => self.acknowledge(),
        }
    }

    fn send_promise(&mut self) {
        let Some(to) = self.promise_to else { return };
        if !self.may_vote() {
            return;
        }
        let promise = Message::Promise {
            ballot: self.promised,
            last: self.claimed_last(),
            certain: self.certain.max(self.tail.last()),
            have: self.tail.last(),
            chosen: self.chosen,
            admitted: self.admitted(),
        };
        self.send(to, promise);
    }

    pub(super) fn claimed_last(&self) -> EntryId {
        self.claimed.max(self.tail.last())
    }

    /// Follows the leader of `ballot`. False if a higher ballot was promised.
    fn follow(&mut self, now: Instant, from: ServerId, ballot: Ballot) -> bool {
        if ballot.server != from || ballot < self.promised {
            if ballot.server == from {
                let promised = self.promised;
                self.send(from, Message::Nack { ballot, promised });
            }
            return false;
        }
        if ballot > self.promised {
            self.step_down(now);
            self.promise(ballot);
        }
        assert!(
            ballot.server != self.config.id,
            "nobody else leads our ballot"
        );
        if let Role::Candidate(_) = self.role {
            self.step_down(now);
        }
        self.leader = Some(from);
        self.promise_to = None;
        self.election_at = now + self.config.tuning.lease + self.jitter();
        true
    }

    /// Phase 2b.
    pub(super) fn on_accept(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        prev: EntryId,
        entries: Vec<Entry>,
        chosen: Slot,
    ) {
        if !self.follow(now, from, ballot) {
            return;
        }
        if (self.log_full || self.has_backlog()) && !entries.is_empty() {
            // As if they were lost; the leader sends them again.
            return;
        }
        let Some(last) = self.append_behind(prev, entries, chosen) else {
            // What is chosen is equal everywhere.
            let resume_after = self.equal_to_leader();
            return self.send(
                from,
                Message::AcceptRejected {
                    ballot,
                    resume_after,
                },
            );
        };
        self.matched = self.matched.max(last);
        self.learn_chosen(chosen.min(self.matched));
        self.settle_claim();
        self.catch_up.note_chosen(chosen);
        if self.durable >= last {
            self.acknowledge();
        } else if self.bug == Some(Bug::AcknowledgeBeforeSync) {
            let durable = self.matched;
            self.send(from, Message::Accepted { ballot, durable });
        }
    }

    /// Puts consecutive entries behind `prev` into the log; what stands there and differs is removed.
    /// Returns the slot of the last one. `None` if the log does not hold `prev`, or if the entries
    /// contradict what is chosen: then whoever sent them leads no more and does not know it yet.
    pub(super) fn append_behind(
        &mut self,
        prev: EntryId,
        entries: Vec<Entry>,
        chosen_hint: Slot,
    ) -> Option<Slot> {
        if !is_chain(prev, &entries) {
            return None;
        }
        let end = entries.last().map_or(prev.slot, |entry| entry.id.slot);
        // What the log holds already stays; before its base everything is chosen and equal everywhere.
        let base = self.tail.base();
        let holds = |id: EntryId| id.slot < base.slot || self.tail.id(id.slot) == Some(id);
        let equal = entries.iter().take_while(|entry| holds(entry.id)).count();
        let before = match equal {
            0 => prev,
            some => entries[some - 1].id,
        };
        let unchecked = self.bug == Some(Bug::SkipPreviousCheck) && before == prev;
        if !(holds(before) || unchecked && prev.slot == self.tail.last().slot) {
            return None;
        }
        if equal == entries.len() {
            return Some(end);
        }
        if before.slot < base.slot || before.slot < self.chosen && self.bug.is_none() {
            return None;
        }
        let mut fresh: Vec<Entry> = entries.into_iter().skip(equal).collect();
        let replaces = before.slot < self.tail.last().slot;
        if replaces {
            self.truncate_after(before.slot);
        }
        if unchecked {
            fresh[0].prev = self.tail.last().ballot;
        }
        for entry in &fresh {
            self.tail.push(entry.clone());
        }
        self.follow_members();
        let last = self.tail.last();
        // What is replaced was not chosen and never will be, nor what followed it, readable or not.
        match replaces {
            true => self.give_up_claims(),
            false => self.claim(last),
        }
        let chosen = self.chosen.max(chosen_hint.min(last.slot));
        let append = Persist::Append {
            truncate_after: replaces.then_some(before.slot),
            entries: fresh,
            chosen,
        };
        self.persist(append, PendingWrite::Append(last.slot));
        Some(end)
    }

    fn truncate_after(&mut self, slot: Slot) {
        self.tail.truncate_after(slot);
        self.durable = self.durable.min(slot);
        self.matched = self.matched.min(slot);
        // A sync that is under way says nothing about what will be written in these slots now.
        for (_, write) in &mut self.writes {
            if let PendingWrite::Append(last) = write {
                *last = (*last).min(slot);
            }
        }
    }

    /// Gives up the claim to entries that damage took, once the log is equal beyond them to one that holds
    /// everything that is chosen: either they are here again, or they were not chosen.
    pub(super) fn settle_claim(&mut self) {
        if self.equal_to_leader() >= self.claimed.slot {
            self.give_up_claims();
        }
    }

    /// It holds this entry.
    pub(super) fn claim(&mut self, held: EntryId) {
        self.claimed = self.claimed.max(held);
        self.certain = self.certain.max(held);
    }

    /// It claims no more than it can show.
    pub(super) fn give_up_claims(&mut self) {
        self.claimed = self.tail.last();
        self.certain = self.tail.last();
    }

    /// Whether it answers heartbeats: learners do as well, for whoever wants to know where they stand.
    fn acknowledges(&self) -> bool {
        self.is_core() || !self.rejoining && !self.outlived
    }

    /// Tells the leader how far our log is durably equal to its own.
    pub(super) fn acknowledge(&mut self) {
        let Some(leader) = self.leader else { return };
        let ballot = self.promised;
        if self.promised_durable != ballot || !matches!(self.role, Role::Follower) {
            return;
        }
        let durable = self.durable.min(self.equal_to_leader());
        if durable > Slot(0) && self.is_core() {
            self.send(leader, Message::Accepted { ballot, durable });
        }
    }

    /// Up to here our log is equal to that of the leader of `promised`: what it sent, and what is chosen,
    /// which every leader's log holds.
    pub(super) fn equal_to_leader(&self) -> Slot {
        self.matched.max(self.chosen)
    }

    /// Entries up to `slot` of our log are chosen.
    pub(super) fn learn_chosen(&mut self, slot: Slot) {
        assert!(
            slot <= self.tail.last().slot,
            "only what is in the log is known to be chosen"
        );
        self.chosen = self.chosen.max(slot);
    }

    pub(super) fn on_heartbeat(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        sent: Instant,
        chosen: Slot,
        _last: Slot,
    ) {
        if !self.follow(now, from, ballot) {
            return;
        }
        self.granted_until = now + self.config.tuning.lease;
        self.granted_to = ballot;
        self.learn_chosen(chosen.min(self.matched));
        self.catch_up.note_chosen(chosen);
        if self.promised_durable != ballot || !self.acknowledges() {
            return;
        }
        let received = self.equal_to_leader();
        let durable = self.durable.min(received);
        let progress = self.progress();
        self.send(
            from,
            Message::HeartbeatAck {
                ballot,
                sent,
                durable,
                received,
                progress,
            },
        );
    }

    pub(super) fn on_nack(&mut self, now: Instant, ballot: Ballot, promised: Ballot) {
        self.highest_number = self.highest_number.max(promised.number);
        let ours = match &self.role {
            Role::Leader(leader) => leader.ballot == ballot,
            Role::Candidate(candidate) => candidate.ballot == ballot,
            Role::Follower => false,
        };
        if ours && promised > ballot {
            self.step_down(now);
        }
    }

    /// Becomes a follower that knows no leader.
    pub(super) fn step_down(&mut self, now: Instant) {
        if matches!(self.role, Role::Follower) {
            return;
        }
        self.role = Role::Follower;
        self.leader = None;
        self.election_at = now + self.config.tuning.lease + self.jitter();
        if self.announced {
            self.announced = false;
            self.outputs.push_back(Output::Role(RoleChange::Follower));
        }
    }
}

/// Whether the entries follow `prev` and each other without a gap.
fn is_chain(prev: EntryId, entries: &[Entry]) -> bool {
    let mut before = prev;
    entries.iter().all(|entry| {
        let follows = entry.id.slot == before.slot.next()
            && entry.prev == before.ballot
            && entry.id.ballot >= before.ballot;
        before = entry.id;
        follows
    })
}
