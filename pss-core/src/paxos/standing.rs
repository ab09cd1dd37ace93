//! Directories that were restored from an old backup. Such a server has forgotten promises and acknowledgements like
//! one whose disk was wiped, but looks as if it had not.
//!
//! So the servers tell each other now and then where they stand, and keep of each other the greatest [`Standing`] that they
//! have seen (their *marks*), over restarts as well. A core server that starts takes no part in the agreement with
//! another one until that has told it what it saw; learners are asked too. If that is more than this server knows of
//! itself, its directory is older than its promises: it begins another life and rejoins, see `admission.rs`.
//!
//! What nobody has seen, nobody can miss: the mark of a server that was not heard for a while is old, and the last promise
//! before the loss may be known to nobody who answers. A backup is older than that.

use crate::paxos::message::Message;
use crate::paxos::{Bug, Replica, Role};
use crate::time::Instant;
use crate::types::{Ballot, EntryId, Incarnation, Marks, ServerId, Slot, Standing};

/// How long after it was first heard another server may leave open what it saw. Programs before this one do not answer.
const ANSWER_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// What a server that starts has not been told yet.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Unmet {
    server: ServerId,
    /// When it was first heard.
    heard: Option<Instant>,
}

impl Unmet {
    pub(super) fn server(&self) -> ServerId {
        self.server
    }
}

impl Replica {
    /// The greatest standing of each other server that this one has seen.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Whether this life was begun because others had seen more of this server than it knows, or it belongs to an older life.
    pub fn was_set_back(&self) -> bool {
        self.set_back
    }

    /// Who only learns, by what it knows, asks as well: it may have voted since, and may find that out as it learns. Asked
    /// are those of the file, too: a log that is too old lists others.
    pub(super) fn all_unmet(&self) -> Vec<Unmet> {
        let is_told_apart = self.config.incarnation > Incarnation(0);
        if !is_told_apart || self.rejoining {
            return Vec::new();
        }
        let unmet = |server| Unmet {
            server,
            heard: None,
        };
        self.peers.keys().copied().map(unmet).collect()
    }

    /// What others are told of this server.
    fn standing(&self) -> Standing {
        let acknowledged = self.durable.min(self.equal_to_leader());
        Standing {
            life: self.config.incarnation,
            promised: self.promised_durable,
            acknowledged: self.tail.id(acknowledged).unwrap_or_default(),
        }
    }

    /// Tells everyone where this server stands, and asks what they have seen of it if it is new.
    pub(super) fn tell_standing(&mut self) {
        if self.config.incarnation == Incarnation(0) {
            return;
        }
        let (standing, epoch) = (self.standing(), self.epoch());
        let mut others = self.other_servers();
        others.extend(self.unmet.iter().map(Unmet::server));
        others.sort_unstable();
        others.dedup();
        for to in others {
            let asks = self.asks(to);
            let told = Message::Standing {
                standing,
                asks,
                epoch,
            };
            self.send(to, told);
        }
    }

    /// Whether `server` shall say what it saw of this one before it started, and take no note of what it hears now.
    fn asks(&self, server: ServerId) -> bool {
        self.unmet.iter().any(|it| it.server == server)
    }

    /// While answers are missing, those who are there are asked again soon.
    pub(super) fn ask_the_unmet(&mut self, now: Instant) {
        // Whoever says where it stands answers, too, as soon as the question reaches it.
        let answers = |it: &Unmet| {
            let view = self.peers.get(&it.server);
            view.is_some_and(|view| view.reads_lists)
        };
        let late = |it: &Unmet| {
            let is_late = |at| now.since(at) >= ANSWER_PATIENCE;
            it.heard.is_some_and(is_late) && !answers(it)
        };
        self.unmet.retain(|it| !late(it));
        let is_missing = self.unmet.iter().any(|it| it.heard.is_some());
        if is_missing && now >= self.asked_at + self.config.tuning.heartbeat {
            self.asked_at = now;
            self.tell_standing();
        }
    }

    pub(super) fn ask_at(&self) -> Option<Instant> {
        let is_missing = self.unmet.iter().any(|it| it.heard.is_some());
        is_missing.then(|| self.asked_at + self.config.tuning.heartbeat)
    }

    /// Whether a message may be looked at: what would bind this server, or count on it, waits until the sender has
    /// said what it saw.
    pub(super) fn is_met(&mut self, now: Instant, from: ServerId, message: &Message) -> bool {
        let unmet = self.unmet.iter_mut().find(|it| it.server == from);
        let is_unmet = unmet.is_some();
        if let Some(unmet) = unmet {
            unmet.heard = unmet.heard.or(Some(now));
        }
        // Nor does anything bind that comes from the cell as it was before a majority was given up.
        let epoch = self.peers.get(&from).and_then(|it| it.epoch);
        let is_of_the_past = epoch.is_some_and(|epoch| epoch < self.epoch());
        if !is_unmet && !is_of_the_past {
            return true;
        }
        let binds = matches!(
            message,
            Message::PreCheck { .. }
                | Message::PreCheckAnswer { .. }
                | Message::Prepare { .. }
                | Message::Promise { .. }
                | Message::Accept { .. }
                | Message::Heartbeat { .. }
                | Message::HandOver { .. }
        );
        !binds || self.bug == Some(Bug::DenyForgotten)
    }

    /// Another server has stood here.
    pub(super) fn raise_mark(&mut self, server: ServerId, standing: Standing) {
        if standing.life > Incarnation(0) {
            let mark = self.marks.entry(server).or_default();
            *mark = standing.max(*mark);
        }
    }

    /// A candidate was promised a ballot.
    pub(super) fn note_promised(&mut self, from: ServerId, life: Incarnation, promised: Ballot) {
        let acknowledged = EntryId::default();
        self.raise_mark(
            from,
            Standing {
                life,
                promised,
                acknowledged,
            },
        );
    }

    /// The leader of a ballot was told how far a log is equal to its own.
    pub(super) fn note_acknowledged(
        &mut self,
        from: ServerId,
        life: Incarnation,
        ballot: Ballot,
        durable: Slot,
    ) {
        let leads = matches!(&self.role, Role::Leader(leader) if leader.ballot == ballot);
        if let (true, Some(acknowledged)) = (leads, self.tail.id(durable)) {
            let promised = ballot;
            self.raise_mark(
                from,
                Standing {
                    life,
                    promised,
                    acknowledged,
                },
            );
        }
    }

    pub(super) fn on_standing(
        &mut self,
        now: Instant,
        from: ServerId,
        standing: Standing,
        asks: bool,
        epoch: u64,
    ) {
        if self.config.incarnation == Incarnation(0) {
            return;
        }
        self.note_epoch(now, epoch);
        if let Some(view) = self.peers.get_mut(&from) {
            (view.reads_lists, view.epoch) = (true, Some(epoch));
        }
        if !asks {
            self.raise_mark(from, standing);
        }
        // Of a later life it may have been heard before this server started only, by the log.
        let life = self.admitted().of(from);
        let counts = Standing {
            life,
            ..Standing::default()
        };
        let mark = self.marks.get(&from).map_or(counts, |it| counts.max(*it));
        let own = self.epoch();
        if asks || standing < mark || epoch < own {
            let lately = self.config.tuning.lease * 4;
            let alive = self.peers.get(&from).is_some_and(|view| {
                let (life, heard) = view.latest;
                life > standing.life && now.since(heard) < lately
            });
            let epoch = own;
            self.send(from, Message::Seen { mark, alive, epoch });
        }
    }

    /// What another server has seen of this one; `alive`: lately, of a later life.
    pub(super) fn on_seen(
        &mut self,
        now: Instant,
        from: ServerId,
        seen: Standing,
        alive: bool,
        epoch: u64,
    ) {
        self.note_epoch(now, epoch);
        if epoch < self.epoch() {
            // Who does not know that a majority was given up speaks of what counts no more.
            return self.unmet.retain(|it| it.server != from);
        }
        if self.changes_life || self.bug == Some(Bug::DenyForgotten) {
            return;
        }
        let own = self.config.incarnation;
        // An asked server knows of this one what it was before it started.
        let known = match self.asks(from) {
            true => self.started_with,
            false => (self.promised, self.claimed_last()),
        };
        // What was acknowledged under a lower promise may have been replaced since.
        let has_forgotten = (seen.promised, seen.acknowledged) > known;
        if seen.life == own && has_forgotten && !self.rejoining || seen.life > own && !alive {
            self.set_back = true;
            return self.begin_life(now, Incarnation(seen.life.0 + 1));
        }
        if seen.life > own && !self.rejoining {
            // Its place is taken, until that one is silent.
            self.step_down(now);
            self.promise_to = None;
            self.outlived = true;
            return;
        }
        self.unmet.retain(|it| it.server != from);
    }
}
