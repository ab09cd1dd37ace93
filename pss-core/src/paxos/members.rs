//! Changes of the membership, one core server at a time.
//!
//! A server goes by the last list in its log, chosen or not; if an entry is taken back, so is the list. Of two lists
//! that follow each other any two majorities have a server in common, for they differ in one core server at
//! most. A leader proposes a list only when its barrier and the list before are chosen, and a candidate leads only with promises
//! of a majority by the list of the log that it leads with. So everything that is chosen by the time of a promise
//! lies in the log that the candidate takes over: the argument is Raft's for changes of one server (Ongaro,
//! Consensus: Bridging Theory and Practice, section 4.1, with the correction of 2015 that a leader first has an entry of its own
//! term chosen), and it needs of the log only what holds here too: equal ids mean equal logs.
//!
//! A lease is a majority by the leader's own last list, which whoever else could win has a server in common with.

use std::sync::Arc;

use crate::entry::{Command, Op};
use crate::members::{BadMembers, Member, Members};
use crate::paxos::leader::Follower;
use crate::paxos::quorum::Membership;
use crate::paxos::{Bug, PeerView, Replica, Role};
use crate::time::Instant;
use crate::types::{Incarnation, ServerId};

/// Why a change was not proposed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ChangeRefused {
    /// Another server leads, or nobody does.
    #[error("this server does not lead")]
    NotLeader,
    /// An earlier change is not chosen yet.
    #[error("another change of the servers is under way")]
    UnderWay,
    /// More than one core server would come or go.
    #[error("core servers come and go one at a time")]
    TooMuch,
    /// The leader cannot take its own vote away.
    #[error("the leader cannot remove itself; it has to hand over first")]
    Leader,
    /// One that is to vote is not there, or has not got everything yet.
    #[error("server {0} does not answer or has not got all data yet")]
    Behind(ServerId),
    /// Of an older list than the one that holds.
    #[error("the servers have changed meanwhile")]
    Outdated,
    /// It is no list of members.
    #[error(transparent)]
    Bad(#[from] BadMembers),
}

/// Most entries that a server may lag behind that is to vote.
const LAG_SLOTS_MAX: u64 = 1000;

impl Replica {
    /// The last list of servers in the log; `None`: they are those of the configuration.
    pub fn members(&self) -> Option<&Arc<Members>> {
        self.tail.members()
    }

    /// Who votes and who learns.
    pub fn membership(&self) -> &Membership {
        &self.config.members
    }

    /// Proposes a list of servers.
    ///
    /// # Errors
    /// [`ChangeRefused`]; nothing was proposed.
    pub fn change_members(&mut self, now: Instant, members: Members) -> Result<(), ChangeRefused> {
        members.check()?;
        let leads = matches!(self.role, Role::Leader(_)) && self.announced;
        if !leads {
            return Err(ChangeRefused::NotLeader);
        }
        if self.tail.members_slot() > self.chosen && self.bug != Some(Bug::ChangeUnchosen) {
            return Err(ChangeRefused::UnderWay);
        }
        let (epoch, version) = self.members().map_or((0, 0), |it| (it.epoch, it.version));
        if (members.epoch, members.version) != (epoch, version + 1) {
            return Err(ChangeRefused::Outdated);
        }
        let (old, new) = (&self.config.members, members.membership());
        let comes = new.core.iter().filter(|it| !old.core.contains(it));
        let goes = old.core.iter().filter(|it| !new.core.contains(it)).count();
        if comes.clone().count() + goes > 1 && self.bug != Some(Bug::ChangeMany) {
            return Err(ChangeRefused::TooMuch);
        }
        if !new.core.contains(&self.config.id) {
            return Err(ChangeRefused::Leader);
        }
        for server in comes {
            if !self.is_up_to_date(now, *server) {
                return Err(ChangeRefused::Behind(*server));
            }
        }
        let members = Arc::new(members);
        self.append_own(vec![Command::internal(Op::SetMembers { members })]);
        self.advance(now);
        Ok(())
    }

    /// The first leader puts the servers of its configuration into the log, so that who votes never changes with a
    /// file. It waits until all of them are known to be able to read that.
    pub(super) fn list_founders(&mut self) {
        let can_read = |server: &ServerId| self.peers.get(server).is_some_and(|it| it.reads_lists);
        let is_told_apart = self.config.incarnation > Incarnation(0);
        if !is_told_apart
            || !self.announced
            || self.members().is_some()
            || !self.other_servers().iter().all(can_read)
            || self.bug == Some(Bug::ListByFile)
        {
            return;
        }
        let of = |ids: &[ServerId], core| {
            let member = |id: &ServerId| Member {
                id: *id,
                core,
                host: String::new(),
                path: String::new(),
            };
            ids.iter().map(member).collect::<Vec<_>>()
        };
        let mut list = of(&self.config.members.core, true);
        list.extend(of(&self.config.members.learners, false));
        list.sort_by_key(|it| it.id);
        let members = Members {
            epoch: 0,
            version: 1,
            list,
        };
        if members.check().is_ok() {
            let members = Arc::new(members);
            self.append_own(vec![Command::internal(Op::SetMembers { members })]);
        }
    }

    /// Whether another server could vote without anybody waiting for it.
    pub fn is_up_to_date(&self, now: Instant, server: ServerId) -> bool {
        let admitted = self.tail.admitted_through(self.chosen);
        self.peers.get(&server).is_some_and(|peer| {
            // Its life must count, or nothing could be chosen that makes it count.
            let counts = !server.is_core() || admitted.of(server) == peer.life;
            let lately = self.config.tuning.lease * 2;
            let is_there = peer.heard.is_some_and(|at| now.since(at) < lately);
            let applied = peer.progress.applied.0 + LAG_SLOTS_MAX;
            is_there && counts && !peer.progress.installing && applied >= self.chosen.0
        })
    }

    /// Whether another server may win: by our list, or by the last one that is chosen, for ours may be taken back. Others that ask have been
    /// removed.
    pub(super) fn may_win(&self, server: ServerId) -> bool {
        let is_core = |it: &Arc<Members>| it.get(server).is_some_and(|it| it.core);
        let by_configuration = !self.tail.has_list(self.chosen);
        by_configuration && self.listed.core.contains(&server)
            || self.tail.lists_since(self.chosen).any(is_core)
    }

    /// The log has grown or shrunk: goes by its last list.
    pub(super) fn follow_members(&mut self) {
        if self.epoch() > self.marks_epoch {
            // What a server has done before a majority was given up binds nobody: the one that went on may know less.
            self.marks_epoch = self.epoch();
            self.marks.clear();
        }
        let members = match self.tail.members() {
            Some(members) => members.membership(),
            None => self.listed.clone(),
        };
        if members == self.config.members {
            return;
        }
        self.config.members = members;
        let me = self.config.id;
        for server in self.other_servers() {
            self.peers.entry(server).or_insert_with(|| {
                let mut view = PeerView::default();
                view.progress.free_bytes = u64::MAX;
                view
            });
        }
        // A list that is not chosen may be taken back, and who is not in it may win.
        let (tail, chosen, listed) = (&self.tail, self.chosen, &self.listed);
        let is_known = |server: ServerId| {
            let mut lists = tail.lists_since(chosen);
            listed.has(server) || lists.any(|it| it.get(server).is_some())
        };
        self.peers.retain(|server, _| is_known(*server));
        let members = &self.config.members;
        let majority = members.majority();
        let usable = self.usable_lease();
        let known = &self.peers;
        self.unmet.retain(|it| known.contains_key(&it.server()));
        if let Role::Leader(leader) = &mut self.role {
            let core = members.core.iter().filter(|it| **it != me);
            leader
                .followers
                .retain(|server, _| members.core.contains(server));
            for server in core {
                leader
                    .followers
                    .entry(*server)
                    .or_insert_with(Follower::default);
            }
            // A lease by the list before is none by the one after the next, of whose servers it need not hold any.
            leader.end_lease_with_list(majority, usable);
        }
    }
}
