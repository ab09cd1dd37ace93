//! Leading: phase 2 in a pipeline of batches, the lease, handing over.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::entry::{Command, Entry, Op};
use crate::paxos::election::Promised;
use crate::paxos::message::{Message, Progress};
use crate::paxos::output::{Output, Persist, RoleChange};
use crate::paxos::quorum::reached_by_majority;
use crate::paxos::{Bug, PendingWrite, Replica, Role, quorum};
use crate::time::Instant;
use crate::types::{Ballot, EntryId, Incarnation, ServerId, Slot};

/// Commands that wait for a place in the pipeline at most; the server stops reading from its clients
/// long before.
const QUEUE_COMMANDS_MAX: usize = 1 << 16;

/// The leader of a ballot.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Leader {
    pub(super) ballot: Ballot,
    /// The first entry of the ballot: nothing counts before a majority has it.
    pub(super) barrier: Slot,
    pub(super) followers: BTreeMap<ServerId, Follower>,
    queue: VecDeque<Command>,
    queue_bytes: usize,
    /// On our clock. The lease is ours before this.
    lease_until: Instant,
    pub(super) heartbeat_at: Instant,
    /// When a majority was last known to follow.
    followed: Instant,
    /// The server that shall take over, and until when; no new requests are taken meanwhile.
    handing_over: Option<(ServerId, Instant)>,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub(super) struct Follower {
    /// Next slot to send; none: where its log stands is not known, or it must catch up first.
    next: Option<Slot>,
    /// Its life that answered last.
    life: Incarnation,
    /// Acknowledged under our ballot.
    durable: Slot,
    /// When the heartbeat was sent that it answered last: its lease counts from then.
    granted: Option<Instant>,
    /// When entries were last sent.
    sent: Instant,
    /// Answers in a row that showed less received than sent.
    short: u32,
    /// Entries from this slot on were lost, or it takes none: the next message follows when it has the first.
    probe: Option<Slot>,
    /// Where sending was last resumed after a rejection, and when.
    resumed: Option<(Slot, Instant)>,
}

impl Follower {
    /// Whether this life of it may be counted: it is not older than the last one. Of a newer one nothing is known.
    fn is_of(&mut self, life: Incarnation) -> bool {
        if life > self.life {
            if self.life > Incarnation(0) {
                *self = Follower::default();
            }
            self.life = life;
        }
        life >= self.life
    }
}

impl Leader {
    /// What a follower has told counts no more: its disk is new.
    pub(super) fn forget(&mut self, server: ServerId) {
        // One that only learns is none of them.
        if let Some(follower) = self.followers.get_mut(&server) {
            *follower = Follower::default();
        }
    }

    /// The servers have changed: a lease is what a majority of those has granted that vote now. It is the smaller one of this and
    /// the one so far, so that it ends not later than either.
    pub(super) fn end_lease_with_list(&mut self, majority: usize, usable: Duration) {
        let granted = self.followers.values().filter_map(|it| it.granted);
        let mut granted: Vec<Instant> = granted.collect();
        granted.sort_unstable_by(|a, b| b.cmp(a));
        // The leader itself is one of the majority.
        if let Some(others) = majority.checked_sub(2) {
            let until = granted.get(others).map(|from| *from + usable);
            self.lease_until = self.lease_until.min(until.unwrap_or(Instant(0)));
        }
    }

    /// The lives of the followers that have answered.
    pub(super) fn lives(&self) -> impl Iterator<Item = (ServerId, Incarnation)> + '_ {
        self.followers.iter().map(|(server, it)| (*server, it.life))
    }
}

impl Replica {
    /// Proposes commands, in order. They are batched and sent by the time outputs are drained.
    ///
    /// # Errors
    /// Gives the commands back if this server does not lead or its queue is full.
    pub fn propose(&mut self, commands: Vec<Command>) -> Result<(), Vec<Command>> {
        let Role::Leader(leader) = &mut self.role else {
            return Err(commands);
        };
        let full = leader.queue.len() + commands.len() > QUEUE_COMMANDS_MAX;
        if full || !self.announced || leader.handing_over.is_some() {
            return Err(commands);
        }
        leader.queue_bytes += commands.iter().map(Command::payload_bytes).sum::<usize>();
        leader.queue.extend(commands);
        Ok(())
    }

    /// Sends what was proposed. To be called after a batch of [`Replica::propose`].
    pub fn flush(&mut self, now: Instant) {
        self.advance(now);
    }

    /// Commands that were proposed and not yet sent.
    pub fn queued(&self) -> usize {
        match &self.role {
            Role::Leader(leader) => leader.queue.len(),
            _ => 0,
        }
    }

    /// Whether a read that is served from the applied state now is linearizable: this server leads, has
    /// applied its barrier, and holds the lease. To be asked again after the data were read.
    pub fn may_read(&self, now: Instant) -> bool {
        let leads = matches!(self.role, Role::Leader(_)) && self.announced;
        leads && (self.holds_lease(now) || self.bug == Some(Bug::ReadWithoutLease))
    }

    /// Gives the leadership to a server that is up to date, if there is one. Returns whether this server
    /// still leads; ask again until it does not, or give up waiting.
    pub fn hand_over(&mut self, now: Instant) -> bool {
        let best = self.best_successor(now);
        let Role::Leader(leader) = &mut self.role else {
            return false;
        };
        let Some(best) = best else { return true };
        if leader.handing_over.is_none() {
            leader.handing_over = Some((best, now + self.config.tuning.lease * 2));
        }
        self.advance(now);
        matches!(self.role, Role::Leader(_))
    }

    /// Gives the leadership up at once, to a follower that has space, because this server cannot apply
    /// what is chosen: its disk is full or hangs. Returns whether it did; if nobody is better off it goes
    /// on.
    pub fn resign(&mut self, now: Instant) -> bool {
        let Role::Leader(leader) = &self.role else {
            return false;
        };
        let has_space = |server: &ServerId| {
            let progress = self.peers.get(server).map(|peer| peer.progress);
            progress.is_some_and(|it| it.free_bytes > 0 && !it.installing)
        };
        let lease = self.config.tuning.lease;
        let able = leader.followers.iter().filter(|(server, follower)| {
            let alive = follower.granted.is_some_and(|at| now.since(at) < lease);
            alive && has_space(server)
        });
        // It need not have everything: phase 1 finds what is missing.
        let Some((successor, _)) = able.max_by_key(|(_, follower)| follower.durable) else {
            return false;
        };
        let (ballot, successor) = (leader.ballot, *successor);
        self.step_down(now);
        self.election_at = now + lease * 4;
        self.send(successor, Message::HandOver { ballot });
        true
    }

    fn best_successor(&self, now: Instant) -> Option<ServerId> {
        let Role::Leader(leader) = &self.role else {
            return None;
        };
        if let Some((chosen, _)) = leader.handing_over {
            return Some(chosen);
        }
        let ready = leader.followers.iter().filter(|(server, follower)| {
            let complete = self
                .peers
                .get(server)
                .is_some_and(|peer| !peer.progress.installing);
            let alive = follower
                .granted
                .is_some_and(|at| now.since(at) < self.config.tuning.lease);
            follower.next.is_some() && complete && alive
        });
        ready
            .max_by_key(|(_, follower)| follower.durable)
            .map(|(server, _)| *server)
    }

    pub(super) fn holds_lease(&self, now: Instant) -> bool {
        matches!(&self.role, Role::Leader(leader) if now < leader.lease_until)
    }

    pub(super) fn become_leader(&mut self, now: Instant, promises: &BTreeMap<ServerId, Promised>) {
        let ballot = self.promised;
        let last = self.tail.last();
        assert!(
            ballot > last.ballot,
            "a new leader's ballot is above its log"
        );
        let followers = self.other_core().into_iter().map(|server| {
            let promised = promises.get(&server);
            let next = promised.map(|it| it.chosen.min(last.slot).next());
            let life = promised.map(|it| it.life).unwrap_or_default();
            (
                server,
                Follower {
                    next,
                    life,
                    ..Follower::default()
                },
            )
        });
        let leader = Leader {
            ballot,
            barrier: last.slot.next(),
            followers: followers.collect(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            lease_until: Instant(0),
            heartbeat_at: now,
            followed: now,
            handing_over: None,
        };
        self.role = Role::Leader(Box::new(leader));
        self.leader = Some(self.config.id);
        let mut commands = vec![Command::internal(Op::Noop)];
        commands.extend(self.founders());
        self.append_own(commands);
        self.leader_timeout(now);
    }

    /// Appends an entry of our own ballot.
    pub(super) fn append_own(&mut self, commands: Vec<Command>) {
        let last = self.tail.last();
        let entry = Entry {
            id: EntryId {
                ballot: self.promised,
                slot: last.slot.next(),
            },
            prev: last.ballot,
            commands: commands.into(),
        };
        self.tail.push(entry.clone());
        self.follow_members();
        self.claim(entry.id);
        let last = entry.id.slot;
        let append = Persist::Append {
            truncate_after: None,
            entries: vec![entry],
            chosen: self.chosen,
        };
        self.persist(append, PendingWrite::Append(last));
    }

    pub(super) fn leader_timeout(&mut self, now: Instant) {
        if self.disk_hangs(now) && self.majority() > 1 {
            // What is chosen cannot be applied here, so nobody is answered; another can answer.
            if !self.resign(now) {
                self.step_down(now);
            }
            return;
        }
        let lease = self.config.tuning.lease;
        let heartbeat = self.config.tuning.heartbeat;
        let chosen = self.chosen;
        let last = self.tail.last().slot;
        let alone = self.majority() == 1;
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        if alone {
            leader.followed = now;
            leader.lease_until = now + lease;
        }
        if now.since(leader.followed) > lease * 2 {
            // Nobody would miss us, and requests wait at a leader that works.
            return self.step_down(now);
        }
        if now < leader.heartbeat_at {
            return;
        }
        leader.heartbeat_at = now + heartbeat;
        let ballot = leader.ballot;
        self.admit_founders();
        self.list_founders();
        for server in self.other_servers() {
            self.send(
                server,
                Message::Heartbeat {
                    ballot,
                    sent: now,
                    chosen,
                    last,
                },
            );
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn on_heartbeat_ack(
        &mut self,
        now: Instant,
        from: ServerId,
        life: Incarnation,
        (ballot, sent): (Ballot, Instant),
        durable: Slot,
        received: Slot,
        progress: Progress,
    ) {
        let last = self.tail.last().slot;
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let Some(follower) = leader.followers.get_mut(&from) else {
            return;
        };
        if ballot != leader.ballot || sent > now || received > last || durable > received {
            return;
        }
        if !follower.is_of(life) {
            return;
        }
        follower.granted = follower.granted.max(Some(sent));
        follower.durable = follower.durable.max(durable);
        follower.probe = follower.probe.filter(|at| received < *at);
        match follower.next {
            None => follower.next = Some(received.max(progress.chosen.min(last)).next()),
            // The answer was sent after the entries arrived or not: two answers in a row that a
            // heartbeat behind the last entry brought, and less received than sent, mean a loss.
            Some(next) if received.next() < next && sent > follower.sent => {
                follower.short += 1;
                if follower.short >= 2 {
                    follower.next = Some(received.next());
                    follower.probe = follower.next;
                    follower.short = 0;
                }
            }
            Some(_) => follower.short = 0,
        }
        self.renew_lease(now);
    }

    /// The lease counts from when the heartbeats were sent that a majority, this server included,
    /// answered; shortened by what clocks may differ in rate.
    fn renew_lease(&mut self, now: Instant) {
        let usable = self.usable_lease();
        let listed = self.config.members.core.len();
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let granted = leader
            .followers
            .values()
            .filter_map(|follower| follower.granted);
        if let Some(from) = reached_by_majority(listed, granted.chain([now])) {
            leader.lease_until = leader.lease_until.max(from + usable);
            leader.followed = leader.followed.max(from);
        }
    }

    pub(super) fn on_accepted(
        &mut self,
        from: ServerId,
        life: Incarnation,
        ballot: Ballot,
        durable: Slot,
    ) {
        let last = self.tail.last().slot;
        let any_ballot = self.bug == Some(Bug::CountOldBallots);
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let Some(follower) = leader.followers.get_mut(&from) else {
            return;
        };
        if (ballot == leader.ballot || any_ballot) && durable <= last && follower.is_of(life) {
            follower.durable = follower.durable.max(durable);
            follower.probe = follower.probe.filter(|at| durable < *at);
        }
    }

    pub(super) fn on_accept_rejected(
        &mut self,
        now: Instant,
        from: ServerId,
        ballot: Ballot,
        resume_after: Slot,
    ) {
        let base = self.tail.base().slot;
        let last = self.tail.last().slot;
        let pause = self.config.tuning.heartbeat / 2;
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let Some(follower) = leader.followers.get_mut(&from) else {
            return;
        };
        if ballot != leader.ballot || resume_after > last {
            return;
        }
        if resume_after < base {
            // It goes on with the next answer to a heartbeat, if it has caught up by then.
            follower.next = None;
        } else {
            let next = resume_after.next();
            // Each entry behind a lost one is rejected; one of the rejections is enough.
            let again = |(at, when): (Slot, Instant)| at == next && now.since(when) < pause;
            if follower.next.is_none_or(|old| next < old) && !follower.resumed.is_some_and(again) {
                follower.next = Some(next);
                follower.resumed = Some((next, now));
            }
        }
    }

    pub(super) fn leader_advance(&mut self, now: Instant) {
        self.count_acknowledgements(now);
        self.announce();
        self.fill_pipeline();
        self.send_entries(now);
        self.finish_hand_over(now);
    }

    fn count_acknowledgements(&mut self, _now: Instant) {
        let listed = self.config.members.core.len();
        let majority = self.majority();
        let own = self.durable;
        let skip_barrier = self.bug == Some(Bug::SkipBarrier);
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let durable = leader.followers.values().map(|follower| follower.durable);
        let mut durable: Vec<Slot> = durable.chain([own]).collect();
        debug_assert_eq!(durable.len(), listed, "every core server is counted");
        durable.sort_unstable_by(|a, b| b.cmp(a));
        let reached = durable[majority - 1];
        if (reached >= leader.barrier || skip_barrier) && reached > self.chosen {
            self.learn_chosen(reached);
        }
    }

    /// Requests are served once the barrier is applied: then everything that was ever answered is.
    fn announce(&mut self) {
        let Role::Leader(leader) = &self.role else {
            return;
        };
        if !self.announced && self.applied >= leader.barrier {
            self.announced = true;
            let ballot = leader.ballot;
            self.outputs
                .push_back(Output::Role(RoleChange::Leader(ballot)));
        }
    }

    /// Makes entries of what waits, while the window has room.
    fn fill_pipeline(&mut self) {
        loop {
            let tuning = &self.config.tuning;
            let last = self.tail.last().slot;
            let under_way = last.0 - self.chosen.0;
            let bytes = self.tail.weight_between(self.chosen, last);
            let room = under_way < tuning.window_slots
                && bytes < tuning.window_bytes
                && !self.has_backlog();
            let Role::Leader(leader) = &mut self.role else {
                return;
            };
            // Few entries under way: send at once, however little. Many: let an entry fill up.
            let worth_it =
                under_way < tuning.eager_slots || leader.queue_bytes >= tuning.entry_bytes;
            if leader.queue.is_empty() || !room || !worth_it {
                return;
            }
            let mut commands = Vec::with_capacity(leader.queue.len().min(tuning.entry_commands));
            let mut bytes = 0;
            while let Some(command) = leader.queue.front() {
                let more = command.payload_bytes();
                let full =
                    bytes + more > tuning.entry_bytes || commands.len() >= tuning.entry_commands;
                if full && !commands.is_empty() {
                    break;
                }
                bytes += more;
                commands.extend(leader.queue.pop_front());
            }
            leader.queue_bytes -= bytes;
            self.append_own(commands);
        }
    }

    fn send_entries(&mut self, now: Instant) {
        let last = self.tail.last().slot;
        let base = self.tail.base();
        let chosen = self.chosen;
        let tuning = &self.config.tuning;
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let ballot = leader.ballot;
        for (server, follower) in &mut leader.followers {
            while let Some(next) = follower.next {
                let after = Slot(next.0 - 1);
                if after < base.slot {
                    // Not in memory any more: it fetches what is chosen from someone, see catch_up. But
                    // it may hold the base without knowing it to be chosen: ask, without entries.
                    follower.next = None;
                    let message = Message::Accept {
                        ballot,
                        prev: base,
                        entries: Vec::new(),
                        chosen,
                    };
                    self.outputs.push_back(Output::Send {
                        to: *server,
                        message,
                    });
                    break;
                }
                let unacknowledged = self
                    .tail
                    .weight_between(follower.durable.max(base.slot), after);
                let waits = follower.probe.is_some_and(|at| next > at);
                if next > last || waits || unacknowledged >= tuning.peer_window_bytes {
                    break;
                }
                let read = self.tail.read(after, last, tuning.entry_bytes);
                let (prev, entries) = read.expect("the slot lies in memory");
                follower.next = entries.last().map(|entry| entry.id.slot.next());
                follower.sent = now;
                follower.short = 0;
                let message = Message::Accept {
                    ballot,
                    prev,
                    entries,
                    chosen,
                };
                self.outputs.push_back(Output::Send {
                    to: *server,
                    message,
                });
            }
        }
    }

    /// Leaves when the successor has everything.
    fn finish_hand_over(&mut self, now: Instant) {
        let last = self.tail.last().slot;
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        let Some((successor, until)) = leader.handing_over else {
            return;
        };
        if now >= until {
            // It has stopped or cannot follow: requests are taken again.
            leader.handing_over = None;
            return;
        }
        let done = leader.queue.is_empty() && self.chosen == last && self.applied == last;
        if done
            && leader
                .followers
                .get(&successor)
                .is_some_and(|it| it.durable == last)
        {
            let ballot = leader.ballot;
            self.step_down(now);
            self.election_at = now + self.config.tuning.lease * 2 + self.jitter();
            self.send(successor, Message::HandOver { ballot });
        }
    }

    /// Slot up to which a majority of core servers has acknowledged our log, this one not counted; `None`: they are too few, or
    /// we do not lead.
    pub fn acknowledged_by_others(&self) -> Option<Slot> {
        let Role::Leader(leader) = &self.role else {
            return None;
        };
        let durable = leader.followers.values().map(|follower| follower.durable);
        reached_by_majority(self.config.members.core.len(), durable)
    }

    /// What the leader knows of the others, for `status`.
    pub fn durable_at(&self, server: ServerId) -> Option<Slot> {
        let Role::Leader(leader) = &self.role else {
            return None;
        };
        leader
            .followers
            .get(&server)
            .map(|follower| follower.durable)
    }

    /// The lease between this server and another one, by what it knows: who holds it, and how long it lasts.
    pub fn lease_with(&self, now: Instant, server: ServerId) -> Option<(ServerId, Duration)> {
        let (holder, until) = match &self.role {
            Role::Leader(leader) => {
                let granted = leader.followers.get(&server)?.granted?;
                (self.config.id, granted + self.usable_lease())
            }
            _ if self.granted_to.server == server => (server, self.granted_until),
            _ => return None,
        };
        (now < until).then(|| (holder, until.since(now)))
    }

    /// How long a granted lease is counted as ours from when it was asked for.
    pub(super) fn usable_lease(&self) -> Duration {
        let lease = self.config.tuning.lease;
        lease - lease * self.config.tuning.drift_per_mille / 1000
    }

    /// Whether a majority follows this leader now.
    pub fn is_followed(&self, now: Instant) -> bool {
        quorum::majority(self.config.members.core.len()) == 1 || self.holds_lease(now)
    }
}
