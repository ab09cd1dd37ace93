//! The agreement core: Multi-Paxos with a stable leader over one gap-free log.
//!
//! A [`Replica`] is a value. Inputs come with a time; what it wants done is drained with
//! [`Replica::poll_output`]. It never reads a clock, a file or a socket and draws its randomness from a
//! seed, so the simulator, the model checker and the server run the same code.
//!
//! How it differs from the textbook (Paxos Made Simple, section 3) and why it is still right is told in
//! ARCHITECTURE.md. In short: acceptors hold gap-free logs, whose last entry's id `(ballot, slot)` orders
//! them; phase 1 is over the whole log, and its value is the log with the greatest last id among a
//! majority; phase 2 is cumulative. A new leader puts a *barrier* entry of its own ballot behind the
//! tail that it took over and counts nothing before a majority has acknowledged the barrier: that is the
//! re-proposal of the tail, without writing it again.

mod acceptor;
mod admission;
mod catch_up;
mod election;
mod leader;
pub mod members;
pub mod message;
pub mod output;
pub mod quorum;
pub mod recover;
mod standing;
mod tail;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::entry::Entry;
use crate::members::Members;
pub use crate::paxos::catch_up::LogRead;
use crate::paxos::catch_up::{CatchUp, Feeding};
use crate::paxos::election::{Candidate, Promised};
use crate::paxos::leader::Leader;
use crate::paxos::message::{Message, Progress};
use crate::paxos::output::{Output, Persist, WriteId};
use crate::paxos::quorum::Membership;
use crate::paxos::standing::Unmet;
use crate::paxos::tail::Tail;
use crate::time::Instant;
use crate::types::{Admitted, Ballot, EntryId, Incarnation, Marks, ServerId, Slot};

/// What a replica is told at its start.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Config {
    /// This server.
    pub id: ServerId,
    /// Life of its data directory; 0: nobody tells lives apart.
    pub incarnation: Incarnation,
    /// The servers of the cell, if its log does not list others.
    pub members: Membership,
    /// Times and bounds.
    pub tuning: Tuning,
    /// Randomness for election delays; different on every server and start.
    pub seed: u64,
}

/// Times and bounds of the agreement.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Tuning {
    /// Between two heartbeats of the leader.
    pub heartbeat: Duration,
    /// How long a granted lease holds on the granting server's clock.
    pub lease: Duration,
    /// By how much two clocks may differ in rate, in thousandths: the leader counts the lease as shorter
    /// by this part.
    pub drift_per_mille: u32,
    /// Elections start up to this much later than they could, at random.
    pub election_spread: Duration,
    /// A disk that has not finished a write for so long hangs: its server does not lead. Several election
    /// times, so that a slow disk does not make the leadership wander.
    pub disk_patience: Duration,
    /// Most bytes of entries that are proposed and not chosen.
    pub window_bytes: u64,
    /// Most entries that are proposed and not chosen.
    pub window_slots: u64,
    /// While so many entries are under way, requests gather until [`Tuning::entry_bytes`] are there.
    pub eager_slots: u64,
    /// Payload of one entry at which it is closed.
    pub entry_bytes: usize,
    /// Commands of one entry at which it is closed.
    pub entry_commands: usize,
    /// Most bytes of entries sent to one server and not acknowledged.
    pub peer_window_bytes: u64,
    /// Entries that are applied stay in memory for servers that lag a little, up to so many bytes.
    pub tail_bytes: u64,
    /// Chosen entries that are not applied stay in memory, up to about so many bytes: more are not taken,
    /// and who has so many does not lead. Beyond it lies at most what is on its way to be chosen, see
    /// [`Tuning::window_bytes`].
    pub backlog_bytes: u64,
    /// Most bytes of one catch-up message.
    pub catch_up_bytes: usize,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            heartbeat: Duration::from_millis(100),
            lease: Duration::from_millis(500),
            drift_per_mille: 50,
            election_spread: Duration::from_millis(150),
            disk_patience: Duration::from_secs(3),
            window_bytes: 32 << 20,
            window_slots: 1024,
            eager_slots: 1,
            entry_bytes: 1 << 20,
            entry_commands: 256,
            peer_window_bytes: 24 << 20,
            tail_bytes: 24 << 20,
            backlog_bytes: 256 << 20,
            catch_up_bytes: 1 << 20,
        }
    }
}

/// What a server found on its disk.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Recovered {
    /// Durable promise.
    pub promised: Ballot,
    /// Known chosen and applied: log and chunks agree up to here.
    pub applied: EntryId,
    /// The entries behind `applied`, durable.
    pub tail: Vec<Entry>,
    /// Slot up to which the entries of `tail` are known to be chosen.
    pub chosen: Slot,
    /// The log was acknowledged up to this entry, though it cannot be read so far.
    pub evidence: Option<EntryId>,
    /// It may have been acknowledged up to this one.
    pub doubt: Option<EntryId>,
    /// First slot that the log on disk holds.
    pub log_first: Slot,
    /// Chunks are being copied to this server; its data are not complete. See
    /// [`crate::storage::CheckpointRecord::installing`].
    pub installing: Option<Slot>,
    /// Its data directory replaces another, and it has not learned yet what that knew.
    pub rejoining: bool,
    /// Which lives of servers count, as of `applied`.
    pub admitted: Admitted,
    /// What it had seen of others.
    pub marks: Marks,
    /// The servers, if the log has listed them, as of `applied`.
    pub members: Option<Arc<Members>>,
}

/// A deliberate bug, for the tests of the tests.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Bug {
    /// Acknowledges entries that are not synced.
    AcknowledgeBeforeSync,
    /// Counts acknowledgements that were given to another ballot.
    CountOldBallots,
    /// Counts the tail of old ballots before the barrier is chosen.
    SkipBarrier,
    /// A new leader keeps its own tail instead of the best one of a majority.
    SkipTail,
    /// Serves reads after the lease has ended.
    ReadWithoutLease,
    /// Grants votes while a lease that it granted runs.
    IgnoreGrantedLease,
    /// Applies what is in the log, chosen or not.
    ApplyUnchosen,
    /// Sends the promise before it is durable.
    PromiseBeforeSync,
    /// Takes one server less for a majority.
    SmallQuorum,
    /// Forgets after a restart that a lease may have been granted.
    NoQuietTime,
    /// Accepts entries without looking at the one before.
    SkipPreviousCheck,
    /// Votes as if the damaged part of the log had never been.
    DenyDamaged,
    /// Leads though its disk hangs.
    LeadHanging,
    /// Votes and acknowledges while it learns what its wiped disk knew.
    VoteWhileLearning,
    /// Counts what earlier lives of servers have promised and acknowledged.
    CountOldLives,
    /// Takes itself for complete while chunks are still being copied to it.
    CountIncomplete,
    /// Proposes a change of the servers before the last one is chosen.
    ChangeUnchosen,
    /// Takes changes of more than one core server at a time.
    ChangeMany,
    /// A candidate counts its promises by the list that its log had before it took over another.
    CountByOldList,
    /// Goes by the servers of the configuration until somebody changes them.
    ListByFile,
    /// Votes on though the cell was recovered without it.
    IgnoreEpoch,
    /// Does not care that others have seen more of it than its disk knows.
    DenyForgotten,
}

/// What a replica is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RoleKind {
    /// Follows a leader, or waits for one.
    Follower,
    /// Tries to become leader.
    Candidate,
    /// Leads; `serving` once its barrier is applied.
    Leader {
        /// Whether it serves requests.
        serving: bool,
    },
    /// Does not vote: it never does, or learns what its wiped disk knew.
    Learner,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Role {
    Follower,
    Candidate(Candidate),
    Leader(Box<Leader>),
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum PendingWrite {
    /// The log up to this slot.
    Append(Slot),
    Promise(Ballot),
    Rejoining(Option<Incarnation>),
    Reset,
}

/// What is known of another server.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct PeerView {
    /// When it was last heard of.
    pub heard: Option<Instant>,
    /// Which life of it that was.
    pub life: Incarnation,
    /// The latest life of it that was heard since this server started, and when last.
    pub latest: (Incarnation, Instant),
    /// Where it stood then.
    pub progress: Progress,
    /// Up to where its log is durably equal to ours, if we lead.
    pub durable: Slot,
    /// Whether it has said where it stands: its program can read a list of servers in the log.
    pub reads_lists: bool,
    /// The loss epoch in which it was heard last.
    pub epoch: Option<u64>,
}

/// One server's part of the agreement. See the module's text.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Replica {
    /// Its members are those of the log, if that lists them.
    config: Config,
    /// Those of the configuration.
    listed: Membership,
    rng: u64,
    bug: Option<Bug>,

    // Acceptor.
    promised: Ballot,
    promised_durable: Ballot,
    tail: Tail,
    /// The last entry that it may have held and that was not replaced; beyond `tail` only if damage has
    /// taken it.
    claimed: EntryId,
    /// The last one that it is certain to have held.
    certain: EntryId,
    log_first: Slot,
    durable: Slot,
    writes: VecDeque<(WriteId, PendingWrite)>,
    next_write: u64,
    /// Since when the disk has been at the first of `writes`.
    writing_since: Option<Instant>,
    /// A candidate that waits for our promise to become durable.
    promise_to: Option<ServerId>,
    /// See [`Replica::is_rejoining`].
    rejoining: bool,
    /// That it has begun or is over is being made durable.
    changes_life: bool,
    /// See [`Replica::note_complete`].
    complete: bool,
    /// See [`Replica::marks`].
    marks: Marks,
    /// Loss epoch in which they were made.
    marks_epoch: u64,
    /// Servers that have not said yet what they saw of this one.
    unmet: Vec<Unmet>,
    /// When they were asked last.
    asked_at: Instant,
    /// Promise and last entry at the start.
    started_with: (Ballot, EntryId),
    /// See [`Replica::was_set_back`].
    set_back: bool,
    /// Others have heard a later life of this server lately. It does not vote meanwhile.
    outlived: bool,
    /// The latest loss epoch that was heard of, if that is later than the log's.
    given_up_by: Option<u64>,

    // Learner.
    chosen: Slot,
    applying: Slot,
    applied: Slot,
    installing: bool,
    free_bytes: u64,
    /// See [`Replica::note_log_full`].
    log_full: bool,

    // Follower.
    leader: Option<ServerId>,
    /// Up to here the log is equal to that of the leader of `promised`.
    matched: Slot,
    granted_until: Instant,
    granted_to: Ballot,
    quiet_until: Instant,

    role: Role,
    election_at: Instant,
    progress_at: Instant,
    highest_number: u64,
    peers: BTreeMap<ServerId, PeerView>,
    catch_up: CatchUp,
    feeding: BTreeMap<ServerId, Feeding>,
    outputs: VecDeque<Output>,
    /// Whether the outside was told that we lead.
    announced: bool,
}

impl Replica {
    /// A server that starts at `now` with what it found on its disk.
    pub fn new(config: Config, recovered: Recovered, now: Instant) -> Replica {
        let marks_epoch = recovered.members.as_ref().map_or(0, |it| it.epoch);
        let mut tail = Tail::new(recovered.applied, recovered.admitted, recovered.members);
        for entry in recovered.tail {
            tail.push(entry);
        }
        let last = tail.last();
        let evidence = recovered.evidence.unwrap_or_default();
        let members = tail.members().map(|it| it.membership());
        let alone = members.as_ref().unwrap_or(&config.members).core == [config.id];
        let mut replica = Replica {
            rng: config.seed ^ 0x9e37_79b9_7f4a_7c15,
            bug: None,
            promised: recovered.promised,
            promised_durable: recovered.promised,
            claimed: last.max(evidence).max(recovered.doubt.unwrap_or_default()),
            certain: last.max(evidence),
            log_first: recovered.log_first,
            durable: last.slot,
            writes: VecDeque::new(),
            next_write: 1,
            writing_since: None,
            promise_to: None,
            rejoining: recovered.rejoining,
            changes_life: false,
            complete: recovered.installing.is_none(),
            marks: recovered.marks,
            marks_epoch,
            unmet: Vec::new(),
            asked_at: now,
            started_with: (
                recovered.promised,
                last.max(evidence).max(recovered.doubt.unwrap_or_default()),
            ),
            set_back: false,
            outlived: false,
            given_up_by: None,
            chosen: recovered.chosen.max(recovered.applied.slot).min(last.slot),
            applying: recovered.applied.slot,
            applied: recovered.applied.slot,
            installing: recovered.installing.is_some(),
            free_bytes: u64::MAX,
            log_full: false,
            leader: None,
            matched: Slot(0),
            granted_until: now,
            granted_to: Ballot::default(),
            // A lease may have been granted before the restart: let it run out first.
            quiet_until: if alone {
                now
            } else {
                now + config.tuning.lease
            },
            role: Role::Follower,
            election_at: now,
            progress_at: now,
            // What was learned from others can be of a ballot that was not promised here.
            highest_number: recovered.promised.number.max(last.ballot.number),
            peers: config
                .members
                .others(config.id)
                .map(|server| {
                    let mut view = PeerView::default();
                    // Until it says so, no disk is taken for full.
                    view.progress.free_bytes = u64::MAX;
                    (server, view)
                })
                .collect(),
            catch_up: CatchUp::new(now),
            feeding: BTreeMap::new(),
            outputs: VecDeque::new(),
            announced: false,
            tail,
            listed: config.members.clone(),
            config,
        };
        replica.follow_members();
        replica.election_at = replica.quiet_until + replica.jitter();
        replica.unmet = replica.all_unmet();
        replica.apply_chosen();
        replica
    }

    /// Makes this replica misbehave.
    #[doc(hidden)]
    pub fn inject(&mut self, bug: Bug) {
        self.bug = Some(bug);
        if bug == Bug::NoQuietTime {
            self.quiet_until = Instant(0);
            self.election_at = Instant(0);
        }
        if bug == Bug::DenyDamaged {
            self.give_up_claims();
        }
    }

    /// Another server was heard, and what it says is not looked at.
    pub fn note_heard(&mut self, now: Instant, from: ServerId, life: Incarnation) {
        if let Some(peer) = self.peers.get_mut(&from) {
            (peer.heard, peer.life) = (Some(now), life);
        }
    }

    /// A message has come in. Its sender has been authenticated. `now` must have been read from the clock
    /// after the message was received: it is when a lease begins that the answer grants. `life` is the
    /// incarnation of the sender.
    pub fn handle_message(
        &mut self,
        now: Instant,
        from: ServerId,
        life: Incarnation,
        message: Message,
    ) {
        let is_gone = life < self.admitted().of(from);
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        // What an old disk says of itself is of no interest.
        if !is_gone {
            (peer.heard, peer.life) = (Some(now), life);
        }
        if life >= peer.latest.0 {
            peer.latest = (life, now);
        }
        if !self.is_met(now, from, &message) {
            self.ask_the_unmet(now);
            return;
        }
        match message {
            Message::PreCheck { ballot, last } => self.on_pre_check(now, from, life, ballot, last),
            Message::PreCheckAnswer {
                ballot,
                granted,
                promised,
                last,
            } if self.counts(from, life) => {
                self.on_pre_check_answer(now, from, ballot, granted, promised, last);
            }
            Message::Prepare { ballot, released } if self.counts(from, life) => {
                self.on_prepare(now, from, ballot, released);
            }
            Message::Promise {
                ballot,
                last,
                certain,
                have,
                chosen,
                admitted,
            } => {
                let promised = Promised {
                    last,
                    certain,
                    have,
                    chosen,
                    life,
                    admitted,
                };
                self.note_promised(from, life, ballot);
                self.on_promise(now, from, ballot, promised);
            }
            Message::Nack { ballot, promised } if self.counts(from, life) => {
                self.on_nack(now, ballot, promised);
            }
            Message::Accept {
                ballot,
                prev,
                entries,
                chosen,
            } => {
                self.on_accept(now, from, ballot, prev, entries, chosen);
            }
            Message::Accepted { ballot, durable } if self.counts(from, life) => {
                self.on_accepted(from, life, ballot, durable);
            }
            Message::AcceptRejected {
                ballot,
                resume_after,
            } if self.counts(from, life) => {
                self.on_accept_rejected(now, from, ballot, resume_after);
            }
            Message::Heartbeat {
                ballot,
                sent,
                chosen,
                last,
            } => {
                self.on_heartbeat(now, from, ballot, sent, chosen, last);
            }
            Message::HeartbeatAck {
                ballot,
                sent,
                durable,
                received,
                progress,
            } => {
                if !is_gone {
                    self.note_progress(from, progress);
                }
                if self.counts(from, life) {
                    self.note_acknowledged(from, life, ballot, durable);
                    let answered = (ballot, sent);
                    self.on_heartbeat_ack(now, from, life, answered, durable, received, progress);
                }
            }
            Message::HandOver { ballot } => self.on_hand_over(now, ballot),
            Message::FetchTail { ballot, after } => self.on_fetch_tail(from, ballot, after),
            Message::Tail {
                ballot,
                prev,
                entries,
                last,
            } => {
                self.on_tail(now, from, ballot, prev, entries, last);
            }
            Message::CatchUp { after } => self.on_catch_up(now, from, after),
            Message::Chosen {
                prev,
                entries,
                chosen,
            } => {
                self.on_chosen_entries(now, from, prev, entries, chosen);
            }
            Message::LogGone { first, chosen } => self.on_log_gone(now, from, first, chosen),
            Message::Progress(progress) if !is_gone => self.note_progress(from, progress),
            Message::Progress(_) => {}
            Message::Rejoin => self.on_rejoin(from, life),
            Message::Absent { ballot } => self.on_absent(now, from, life, ballot),
            Message::Standing {
                standing,
                asks,
                epoch,
            } if standing.life == life => {
                self.on_standing(now, from, standing, asks, epoch);
            }
            Message::Standing { .. } => {}
            Message::Seen { mark, alive, epoch } => self.on_seen(now, from, mark, alive, epoch),
            // Of a life that does not count.
            Message::PreCheckAnswer { .. }
            | Message::Nack { .. }
            | Message::Prepare { .. }
            | Message::Accepted { .. }
            | Message::AcceptRejected { .. } => {}
            // The copying of chunks is not the agreement's business.
            Message::Sync(_) => {}
        }
        self.advance(now);
    }

    /// The disk has the write. Writes are reported in the order in which they were asked for.
    pub fn handle_persisted(&mut self, now: Instant, write: WriteId) {
        let (expected, what) = self
            .writes
            .pop_front()
            .expect("only what was asked is reported");
        assert_eq!(expected, write, "writes are reported in order");
        self.writing_since = None;
        match what {
            PendingWrite::Append(last) => {
                if last > self.durable {
                    self.durable = last;
                    self.acknowledge();
                }
            }
            PendingWrite::Promise(ballot) => {
                assert!(ballot >= self.promised_durable, "promises only rise");
                self.promised_durable = ballot;
                self.promise_is_durable(now);
            }
            PendingWrite::Rejoining(life) => self.rejoining_is_durable(life),
            PendingWrite::Reset => {}
        }
        self.advance(now);
    }

    /// Entries up to `slot` are applied to the state and the chunks.
    pub fn handle_applied(&mut self, now: Instant, slot: Slot) {
        assert!(
            slot >= self.applied && slot <= self.applying,
            "applied in order, when asked"
        );
        self.applied = slot;
        self.advance(now);
    }

    /// Time has passed: [`Replica::poll_timeout`].
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.role {
            Role::Leader(_) => self.leader_timeout(now),
            _ => self.election_timeout(now),
        }
        self.catch_up_timeout(now);
        if now >= self.progress_at {
            self.progress_at = now + self.config.tuning.lease;
            let progress = self.progress();
            for server in self.other_servers() {
                self.send(server, Message::Progress(progress));
            }
            self.ask_to_rejoin();
            self.tell_standing();
        }
        self.ask_the_unmet(now);
        self.advance(now);
    }

    /// The next thing to do, if there is one.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Replica::handle_timeout`].
    pub fn poll_timeout(&self) -> Instant {
        let role = match &self.role {
            Role::Leader(leader) => leader.heartbeat_at,
            _ if self.may_lead() => self.election_at,
            _ => self.progress_at,
        };
        let next = role.min(self.progress_at).min(self.catch_up.next_at());
        self.ask_at().map_or(next, |at| next.min(at))
    }

    /// The server's free space, and where its log begins now.
    pub fn note_storage(&mut self, free_bytes: u64, log_first: Slot) {
        self.free_bytes = free_bytes;
        self.log_first = log_first;
    }

    /// Whether the log may not grow now: entries are dropped as if they were lost on the way.
    pub fn note_log_full(&mut self, full: bool) {
        self.log_full = full;
    }

    /// Whether the log does not hold `base`, which is chosen. Every log whose last entry is as great holds it; one
    /// that reaches as far and ends in entries of older ballots was never chosen from some slot on.
    pub fn needs_base(&self, base: EntryId) -> bool {
        base > self.tail.last()
    }

    /// The state at `base` is durable and chunks are being copied: start the log behind it. `admitted`: which
    /// lives of servers count, and `members`: who they are, as that state says.
    pub fn handle_base(
        &mut self,
        now: Instant,
        base: EntryId,
        admitted: Admitted,
        members: Option<Arc<Members>>,
    ) {
        assert!(self.needs_base(base), "the log does not hold it");
        // Whose chunks are incomplete must not lead: not even if it is about to win.
        self.step_down(now);
        if base.ballot > self.promised {
            // The leader that we follow has lost: what its log holds beyond here need not be what is chosen.
            self.promise(base.ballot);
        }
        self.tail = Tail::new(base, admitted, members);
        self.follow_members();
        self.highest_number = self.highest_number.max(base.ballot.number);
        self.complete = false;
        self.claim(base);
        self.durable = base.slot;
        self.chosen = base.slot;
        self.applying = base.slot;
        self.applied = base.slot;
        self.log_first = base.slot.next();
        self.matched = self.matched.max(base.slot);
        self.installing = true;
        for (_, write) in &mut self.writes {
            if let PendingWrite::Append(last) = write {
                *last = base.slot;
            }
        }
        self.persist(Persist::Reset { base }, PendingWrite::Reset);
        self.advance(now);
    }

    /// All chunks have been copied.
    pub fn handle_installed(&mut self) {
        self.installing = false;
    }

    /// Common end of every input: apply, propose, send, feed.
    fn advance(&mut self, now: Instant) {
        if let Role::Leader(_) = self.role {
            self.leader_advance(now);
        }
        if self.writing_since.is_none() && !self.writes.is_empty() {
            self.writing_since = Some(now);
        }
        self.apply_chosen();
        self.feed(now);
        self.check_life(now);
        self.forget_applied();
    }

    fn apply_chosen(&mut self) {
        let mut until = self.chosen.min(self.durable);
        if self.bug == Some(Bug::ApplyUnchosen) {
            until = self.durable;
        }
        if until <= self.applying {
            return;
        }
        let (_, entries) = self
            .tail
            .read(self.applying, until, usize::MAX)
            .expect("what is not applied stays in memory");
        self.applying = until;
        self.outputs.push_back(Output::Apply { entries });
    }

    /// Whether applying is so far behind that more entries would take too much memory.
    pub(super) fn has_backlog(&self) -> bool {
        let waiting = self.tail.weight_between(self.applied, self.chosen);
        waiting >= self.config.tuning.backlog_bytes
    }

    fn forget_applied(&mut self) {
        // Chosen entries stay a little for servers that lag, applied ones at least are in the log.
        while self.tail.weight() > self.config.tuning.tail_bytes
            && self
                .tail
                .first()
                .is_some_and(|first| first <= self.applied.min(self.chosen))
        {
            self.tail.pop_front();
        }
    }

    fn persist(&mut self, what: Persist, pending: PendingWrite) {
        let write = WriteId(self.next_write);
        self.next_write += 1;
        self.writes.push_back((write, pending));
        self.outputs.push_back(Output::Persist { write, what });
    }

    fn send(&mut self, to: ServerId, message: Message) {
        self.outputs.push_back(Output::Send { to, message });
    }

    fn other_servers(&self) -> Vec<ServerId> {
        self.config.members.others(self.config.id).collect()
    }

    fn other_core(&self) -> Vec<ServerId> {
        let me = self.config.id;
        self.config
            .members
            .core
            .iter()
            .copied()
            .filter(|server| *server != me)
            .collect()
    }

    fn majority(&self) -> usize {
        let majority = self.config.members.majority();
        if self.bug == Some(Bug::SmallQuorum) {
            majority - 1
        } else {
            majority
        }
    }

    /// Whether this server votes and acknowledges.
    fn is_core(&self) -> bool {
        self.config.members.core.contains(&self.config.id) && self.may_vote()
    }

    /// Whether it votes if the list of the candidate has it vote. Its own list may be older: if only those voted that
    /// know already that they do, a list could be chosen that has no majority after the next failure (Ongaro, section 4.1).
    fn may_vote(&self) -> bool {
        let learns = self.rejoining || self.outlived;
        !learns || self.bug == Some(Bug::VoteWhileLearning)
    }

    fn random(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn jitter(&mut self) -> Duration {
        let z = self.random();
        let spread = self.config.tuning.election_spread.as_nanos() as u64;
        Duration::from_nanos(if spread == 0 { 0 } else { z % spread })
    }

    fn progress(&self) -> Progress {
        Progress {
            chosen: self.chosen,
            applied: self.applied,
            log_first: self.log_first,
            free_bytes: self.free_bytes,
            installing: self.installing,
        }
    }

    fn note_progress(&mut self, from: ServerId, progress: Progress) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.progress = progress;
        }
        self.catch_up.note_chosen(progress.chosen);
    }
}

/// Where the replica stands.
impl Replica {
    /// This server.
    pub fn id(&self) -> ServerId {
        self.config.id
    }

    /// Life of its data directory. A server that finds out that it rejoins begins another one.
    pub fn incarnation(&self) -> Incarnation {
        self.config.incarnation
    }

    /// What it is doing.
    pub fn role(&self) -> RoleKind {
        match &self.role {
            Role::Leader(_) => RoleKind::Leader {
                serving: self.announced,
            },
            Role::Candidate(_) => RoleKind::Candidate,
            Role::Follower if !self.is_core() => RoleKind::Learner,
            Role::Follower => RoleKind::Follower,
        }
    }

    /// Who leads, as far as it knows.
    pub fn leader(&self) -> Option<ServerId> {
        match &self.role {
            Role::Leader(_) => Some(self.config.id),
            Role::Candidate(_) => None,
            Role::Follower => self.leader,
        }
    }

    /// Highest promised ballot.
    pub fn promised(&self) -> Ballot {
        self.promised
    }

    /// Highest promised ballot that is durable: others may have been told.
    pub fn promised_durable(&self) -> Ballot {
        self.promised_durable
    }

    /// Slot up to which it knows the log to be chosen.
    pub fn chosen(&self) -> Slot {
        self.chosen
    }

    /// Slot up to which entries were reported applied.
    pub fn applied(&self) -> Slot {
        self.applied
    }

    /// Last entry of its log.
    pub fn last(&self) -> EntryId {
        self.tail.last()
    }

    /// Slot up to which its log is durable.
    pub fn durable(&self) -> Slot {
        self.durable
    }

    /// The last entry that it does not deny to have held: beyond [`Replica::last`] if damage has taken some.
    pub fn claimed(&self) -> EntryId {
        self.claimed_last()
    }

    /// First slot of its log on disk.
    pub fn log_first(&self) -> Slot {
        self.log_first
    }

    /// The entry in a slot, if it is in memory.
    pub fn entry(&self, slot: Slot) -> Option<&Entry> {
        self.tail.get(slot)
    }

    /// Id of the entry in a slot, if it is in memory or the one before what is.
    pub fn entry_id(&self, slot: Slot) -> Option<EntryId> {
        self.tail.id(slot)
    }

    /// Whether the disk has not finished a write for longer than [`Tuning::disk_patience`].
    pub fn disk_hangs(&self, now: Instant) -> bool {
        let patience = self.config.tuning.disk_patience;
        let since = self.writing_since;
        since.is_some_and(|since| now.since(since) > patience) && self.bug != Some(Bug::LeadHanging)
    }

    /// The other servers of the cell. One that was removed may be heard still; it is none of them.
    pub fn peers(&self) -> impl Iterator<Item = (ServerId, PeerView)> + '_ {
        let others = self
            .peers
            .iter()
            .filter(|(id, _)| self.config.members.has(**id));
        others.map(|(id, view)| (*id, *view))
    }

    /// Slot up to which a majority beside this server has applied every entry, as far as this one knows.
    /// What is applied is durable there, and their chunks are complete.
    pub fn applied_by_others(&self) -> Slot {
        let core = &self.config.members.core;
        let admitted = self.admitted();
        let counts = |server: &&ServerId| {
            let peer = self.peers.get(server);
            peer.is_some_and(|peer| admitted.counts(**server, peer.life))
        };
        let others = core.iter().filter(counts);
        let others = others.filter_map(|server| self.peers.get(server));
        let complete = others.filter(|peer| peer.heard.is_some() && !peer.progress.installing);
        let applied = complete.map(|peer| peer.progress.applied);
        quorum::reached_by_majority(core.len(), applied).unwrap_or_default()
    }

    /// Whether the cell has a majority without this server, of servers that count, are complete and were heard of lately.
    pub fn is_dispensable(&self, now: Instant) -> bool {
        let members = &self.config.members;
        let admitted = self.admitted();
        let is_able = |server: &&ServerId| {
            let peer = self.peers.get(server);
            peer.is_some_and(|peer| {
                let lately = peer
                    .heard
                    .is_some_and(|at| now.since(at) < self.config.tuning.lease * 2);
                lately && !peer.progress.installing && admitted.counts(**server, peer.life)
            })
        };
        let others = members.core.iter().filter(|it| **it != self.config.id);
        others.filter(is_able).count() >= members.majority()
    }

    /// Bytes free on the fullest disk of the best majority, this server's included: what a write must
    /// find room in. Who was not heard of for ten leases takes no writes now.
    pub fn free_bytes_of_majority(&self, now: Instant) -> u64 {
        let patience = self.config.tuning.lease * 10;
        let me = std::iter::once(self.free_bytes);
        let core = &self.config.members.core;
        let others = core.iter().filter_map(|server| self.peers.get(server));
        let free = others
            .filter(|peer| peer.heard.is_some_and(|at| now.since(at) < patience))
            .map(|peer| peer.progress.free_bytes);
        quorum::reached_by_majority(core.len(), me.chain(free)).unwrap_or(self.free_bytes)
    }
}
