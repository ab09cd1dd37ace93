//! A majority that is lost for good. Only a person can decide to go on without it, for what it alone acknowledged is lost.
//!
//! One server that is left goes on alone: it puts a list of servers with a higher *loss epoch* into its log, in which nobody votes
//! but itself, and wins an election by that. What it holds is chosen, and nothing else. Others that are left are learners of the new
//! list, get what they lack, and may come to vote again.
//!
//! A server that hears of a loss epoch above its own log's has been given up, with its votes: it begins a life that nobody admits, so that it
//! does not vote any more, after a restart either. As a learner of the new list it learns on; else it has to be formatted anew.

use std::sync::Arc;

use crate::entry::{Command, Op};
use crate::members::{BadMembers, Members};
use crate::paxos::{Bug, Replica, Role};
use crate::time::Instant;
use crate::types::{Incarnation, ServerId};

/// Why a server does not go on alone.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RecoverRefused {
    /// Nothing is lost for good.
    #[error("a majority is there: {0:?}")]
    MajorityAlive(Vec<ServerId>),
    /// It lacks data that others may have.
    #[error("this server has not got all data itself")]
    Incomplete,
    /// The list is not one that it could go on with: itself the only one that votes, and the next loss epoch.
    #[error("the list is not that of a server that goes on alone")]
    NotAlone,
    /// It is no list.
    #[error(transparent)]
    Bad(#[from] BadMembers),
}

impl Replica {
    /// How often a majority was given up, as the log says.
    pub fn epoch(&self) -> u64 {
        self.members().map_or(0, |members| members.epoch)
    }

    /// The loss epoch of the cell that has given this server up.
    pub fn given_up_by(&self) -> Option<u64> {
        self.given_up_by.filter(|epoch| *epoch > self.epoch())
    }

    /// Core servers that were heard of lately, in a life that counts; this one included if it is one.
    pub fn core_alive(&self, now: Instant) -> Vec<ServerId> {
        let lately = self.config.tuning.lease * 4;
        let admitted = self.admitted();
        let is_alive = |server: &ServerId| {
            let peer = self.peers.get(server);
            let peer = peer.filter(|it| admitted.counts(*server, it.life));
            let heard = peer.and_then(|peer| peer.heard);
            *server == self.config.id || heard.is_some_and(|at| now.since(at) < lately)
        };
        let core = self.config.members.core.iter().copied();
        core.filter(is_alive).collect()
    }

    /// Gives the majority up, and goes on with what this server has.
    ///
    /// # Errors
    /// [`RecoverRefused`]; nothing was done.
    pub fn recover(&mut self, now: Instant, members: Members) -> Result<(), RecoverRefused> {
        members.check()?;
        let alive = self.core_alive(now);
        if alive.len() >= self.config.members.majority() {
            return Err(RecoverRefused::MajorityAlive(alive));
        }
        if self.installing || !self.complete || self.rejoining || self.changes_life {
            return Err(RecoverRefused::Incomplete);
        }
        let version = self.members().map_or(0, |it| it.version);
        let is_next = (members.epoch, members.version) == (self.epoch() + 1, version + 1);
        if !is_next || members.membership().core != [self.config.id] {
            return Err(RecoverRefused::NotAlone);
        }
        self.step_down(now);
        // What damage has taken is given up, too.
        self.give_up_claims();
        let ballot = self.next_ballot();
        self.promise(ballot);
        let members = Arc::new(members);
        self.append_own(vec![Command::internal(Op::SetMembers { members })]);
        // Nobody is there to be asked what he saw.
        self.unmet.clear();
        self.election_at = now;
        self.advance(now);
        Ok(())
    }

    /// Others speak of this loss epoch.
    pub(super) fn note_epoch(&mut self, now: Instant, epoch: u64) {
        if epoch <= self.epoch() || self.bug == Some(Bug::IgnoreEpoch) {
            return;
        }
        self.given_up_by = self.given_up_by.max(Some(epoch));
        if matches!(self.role, Role::Leader(_) | Role::Candidate(_)) {
            self.step_down(now);
        }
        let votes = self.config.members.core.contains(&self.config.id);
        if votes && !self.rejoining && !self.changes_life {
            let life = Incarnation(self.config.incarnation.0 + 1);
            self.begin_life(now, life);
        }
    }
}
