//! Lives of servers. A disk that was wiped or replaced has forgotten what its server promised and acknowledged, so
//! the server begins another life, with a higher incarnation, and *rejoins*: it learns what is chosen like a learner,
//! and neither promises, grants a lease nor acknowledges.
//!
//! It asks the leader, who proposes [`Op::AdmitServer`]. Only others count towards its being chosen. From proposing it
//! on the leader counts nothing of an earlier life; and everything that an earlier life may have helped to choose
//! lies before it in the log. When the server has all of that durable, data included, it counts again.
//!
//! A promise of an earlier life may still be on its way to a candidate. Of the others that have promised to it, one at
//! least has the admission in its log, if that was chosen: a majority of all, without the server, and a majority
//! with it have another server in common, which did not accept the admission after its promise to a higher
//! ballot. So promises say which lives count, and a candidate drops those of other lives.
//!
//! Who founds a cell need not ask: a leader admits the lives that promised to it, and later those that it hears of. A directory that was formatted
//! anew without a word is then found out as soon as it has learned that another life counts, and rejoins. Nor are its
//! promises and acknowledgements counted by anyone who knows.

use crate::entry::{Command, Op};
use crate::paxos::message::Message;
use crate::paxos::output::Persist;
use crate::paxos::{Bug, PendingWrite, Replica, Role};
use crate::time::Instant;
use crate::types::{Admitted, Incarnation, ServerId};

impl Replica {
    /// Whether this server still learns what its earlier life knew, and does not count.
    pub fn is_rejoining(&self) -> bool {
        self.rejoining
    }

    /// Whether that begins or ends just now.
    pub fn changes_life(&self) -> bool {
        self.changes_life
    }

    /// Which lives of servers count, as far as the log knows.
    pub fn admitted(&self) -> Admitted {
        self.tail.admitted_through(self.tail.last().slot)
    }

    /// Whether all chunks are here, and the durable checkpoint says so.
    pub fn note_complete(&mut self, complete: bool) {
        self.complete = complete;
    }

    /// Whether what this life of the server promises and acknowledges counts.
    pub(super) fn counts(&self, server: ServerId, incarnation: Incarnation) -> bool {
        self.bug == Some(Bug::CountOldLives) || self.admitted().counts(server, incarnation)
    }

    /// Asks the leader, whoever that is.
    pub(super) fn ask_to_rejoin(&mut self) {
        let admitted = self.tail.admitted_through(self.chosen);
        let is_later = admitted.of(self.config.id) < self.config.incarnation;
        if self.rejoining && is_later && !self.changes_life {
            for server in self.other_core() {
                self.send(server, Message::Rejoin);
            }
        }
    }

    pub(super) fn on_rejoin(&mut self, from: ServerId, incarnation: Incarnation) {
        let is_member = self.config.members.has(from);
        let is_later = incarnation > self.admitted().of(from);
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        if self.announced && is_member && is_later {
            // What it acknowledged in an earlier life is gone.
            leader.forget(from);
            self.append_own(vec![Command::internal(Op::AdmitServer {
                server: from,
                incarnation,
            })]);
        }
    }

    /// What a leader of a cell proposes that does not know yet which lives count: its own, and those of others that it has
    /// heard of.
    pub(super) fn founders(&self) -> Vec<Command> {
        let Role::Leader(leader) = &self.role else {
            return Vec::new();
        };
        let admitted = self.admitted();
        let me = (self.config.id, self.config.incarnation);
        // One that learns, and is to vote, is let in before: a cell of one could not let it in afterwards.
        let learners = self.config.members.learners.iter();
        let learners = learners.filter(|id| id.is_core());
        let learners = learners.filter_map(|id| Some((*id, self.peers.get(id)?.life)));
        let lives = leader.lives().chain(learners).chain([me]);
        let new = lives.filter(|(server, incarnation)| {
            admitted.of(*server) == Incarnation(0) && *incarnation > Incarnation(0)
        });
        let admit = |(server, incarnation)| {
            Command::internal(Op::AdmitServer {
                server,
                incarnation,
            })
        };
        new.map(admit).collect()
    }

    /// The same for those who were heard of later.
    pub(super) fn admit_founders(&mut self) {
        let commands = self.founders();
        if self.announced && !commands.is_empty() {
            self.append_own(commands);
        }
    }

    /// Looks whether this life counts, by what is chosen.
    pub(super) fn check_life(&mut self, now: Instant) {
        let me = self.config.id;
        let learned = self.chosen.min(self.durable);
        if learned < self.tail.base().slot || !self.config.members.has(me) {
            return;
        }
        let admitted = self.tail.admitted_through(learned);
        if !self.rejoining && !admitted.counts(me, self.config.incarnation) {
            // What this life has promised so far it should not have, so it ends; but if it is the older one, its place
            // may be taken: see `on_seen`.
            let mut life = self.config.incarnation;
            if life > admitted.of(me) {
                life.0 += 1;
            }
            self.begin_life(now, life);
        }
        let is_admitted = admitted.of(me) == self.config.incarnation;
        let complete = self.complete || self.bug == Some(Bug::CountIncomplete);
        if self.rejoining && is_admitted && complete && !self.changes_life {
            self.changes_life = true;
            // What is learned from a copy is of a ballot that was not promised here.
            let ballot = self.tail.last().ballot;
            if ballot > self.promised {
                self.promise(ballot);
            }
            self.persist(Persist::Rejoining(None), PendingWrite::Rejoining(None));
        }
    }

    /// This server rejoins, in this life.
    pub(super) fn begin_life(&mut self, now: Instant, life: Incarnation) {
        self.step_down(now);
        self.outlived = false;
        self.rejoining = true;
        self.changes_life = true;
        self.promise_to = None;
        self.unmet.clear();
        let life = Some(life);
        self.persist(Persist::Rejoining(life), PendingWrite::Rejoining(life));
    }

    pub(super) fn rejoining_is_durable(&mut self, life: Option<Incarnation>) {
        self.changes_life = false;
        self.rejoining = life.is_some();
        if let Some(life) = life {
            // Only now: who heard of it takes nothing of an earlier one any more.
            self.config.incarnation = life;
        }
        self.acknowledge();
    }
}
