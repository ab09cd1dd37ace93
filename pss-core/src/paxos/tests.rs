//! Scripts: given this state, when this comes in, then exactly these outputs.
//!
//! Server 0 is under test, of the core servers 0, 1 and 2 and learner 5 unless a test says otherwise.
//! Outputs are compared as text. A log is written as the ballots of its entries: `log([1.0, 1.0, 3.2])`
//! stands for entries 1 and 2 of ballot (1, server 0) and entry 3 of ballot (3, server 2).

mod members;
mod recover;
mod standing;

use super::*;
use crate::entry::{Command, Op};
use crate::paxos::output::RoleChange;
use crate::types::{RequestNumber, SessionId, Standing, VolumeId};

/// `1.2` is ballot (1, server 2).
fn ballot(text: f64) -> Ballot {
    let tenths = (text * 10.0).round() as u64;
    Ballot {
        number: tenths / 10,
        server: ServerId((tenths % 10) as u8),
    }
}

fn id(slot: u64, of: f64) -> EntryId {
    EntryId {
        ballot: ballot(of),
        slot: Slot(slot),
    }
}

/// Entries behind `prev`, one of each ballot.
fn behind<const N: usize>(prev: EntryId, ballots: [f64; N]) -> Vec<Entry> {
    let mut before = prev;
    let entry = |of: f64| {
        let id = id(before.slot.0 + 1, of);
        let prev = std::mem::replace(&mut before, id).ballot;
        let commands = [Command::internal(Op::Noop)].into();
        Entry { id, prev, commands }
    };
    ballots.map(entry).into()
}

/// The first entries of a log.
fn log<const N: usize>(ballots: [f64; N]) -> Vec<Entry> {
    behind(EntryId::default(), ballots)
}

fn prepare(of: f64) -> Message {
    Message::Prepare {
        ballot: ballot(of),
        released: None,
    }
}

fn promise(of: f64, last: EntryId) -> Message {
    Message::Promise {
        ballot: ballot(of),
        last,
        certain: last,
        have: last,
        chosen: Slot(0),
        admitted: Admitted::default(),
    }
}

fn claim(of: f64, last: EntryId, certain: EntryId, have: EntryId) -> Message {
    Message::Promise {
        ballot: ballot(of),
        last,
        certain,
        have,
        chosen: Slot(0),
        admitted: Admitted::default(),
    }
}

fn accept<const N: usize>(of: f64, prev: EntryId, ballots: [f64; N], chosen: u64) -> Message {
    Message::Accept {
        ballot: ballot(of),
        prev,
        entries: behind(prev, ballots),
        chosen: Slot(chosen),
    }
}

fn accepted(of: f64, durable: u64) -> Message {
    Message::Accepted {
        ballot: ballot(of),
        durable: Slot(durable),
    }
}

fn heartbeat(of: f64, chosen: u64) -> Message {
    Message::Heartbeat {
        ballot: ballot(of),
        sent: Instant(7),
        chosen: Slot(chosen),
        last: Slot(0),
    }
}

fn granted(of: f64, sent: Instant, received: u64) -> Message {
    Message::HeartbeatAck {
        ballot: ballot(of),
        sent,
        durable: Slot(received),
        received: Slot(received),
        progress: Progress::default(),
    }
}

fn chosen<const N: usize>(prev: EntryId, ballots: [f64; N], chosen: u64) -> Message {
    Message::Chosen {
        prev,
        entries: behind(prev, ballots),
        chosen: Slot(chosen),
    }
}

fn tail<const N: usize>(of: f64, prev: EntryId, ballots: [f64; N]) -> Message {
    let entries = behind(prev, ballots);
    Message::Tail {
        ballot: ballot(of),
        prev,
        last: entries.last().map_or(prev, |entry| entry.id),
        entries,
    }
}

fn gone(first: u64, chosen: u64) -> Message {
    Message::LogGone {
        first: Slot(first),
        chosen: Slot(chosen),
    }
}

fn pre_check(of: f64) -> Message {
    Message::PreCheck {
        ballot: ballot(of),
        last: EntryId::default(),
    }
}

fn pre_check_answer(of: f64, last: EntryId) -> Message {
    Message::PreCheckAnswer {
        ballot: ballot(of),
        granted: true,
        promised: Ballot::default(),
        last,
    }
}

fn ids(entries: &[Entry]) -> String {
    let ids: Vec<String> = entries.iter().map(|entry| entry.id.to_string()).collect();
    format!("[{}]", ids.join(" "))
}

/// One line; nothing for the reports of progress that servers send now and then.
fn show(output: &Output) -> Option<String> {
    Some(match output {
        Output::Send { to, message } => format!("{to} <- {}", show_message(message)?),
        Output::Persist { what, .. } => match what {
            Persist::Promise(ballot) => format!("persist promise {ballot}"),
            Persist::Rejoining(Some(life)) => format!("persist rejoining as {life}"),
            Persist::Rejoining(None) => "persist rejoined".to_owned(),
            Persist::Reset { base } => format!("persist reset {base}"),
            Persist::Append {
                truncate_after,
                entries,
                ..
            } => match truncate_after {
                Some(slot) => format!("persist after {slot} {}", ids(entries)),
                None => format!("persist {}", ids(entries)),
            },
        },
        Output::Apply { entries } => format!("apply {}", ids(entries)),
        Output::ReadLog {
            to, after, until, ..
        } => format!("read log {after} to {until} for {to}"),
        Output::CopyChunks { donor } => format!("copy chunks of {donor}"),
        Output::Role(RoleChange::Leader(ballot)) => format!("leads {ballot}"),
        Output::Role(RoleChange::Follower) => "leads no more".to_owned(),
    })
}

fn show_message(message: &Message) -> Option<String> {
    use Message::*;
    Some(match message {
        PreCheck { ballot, .. } => format!("pre-check {ballot}"),
        PreCheckAnswer {
            ballot, granted, ..
        } => match granted {
            true => format!("pre-check {ballot} yes"),
            false => format!("pre-check {ballot} no"),
        },
        Prepare { ballot, released } => match released {
            Some(released) => format!("prepare {ballot} released {released}"),
            None => format!("prepare {ballot}"),
        },
        Promise {
            ballot,
            last,
            certain,
            have,
            chosen,
            ..
        } => {
            let mut lost = String::new();
            if certain != last {
                lost += &format!(" certain {certain}");
            }
            if have != certain {
                lost += &format!(" have {have}");
            }
            format!("promise {ballot} last {last}{lost} chosen {chosen}")
        }
        Nack { ballot, promised } => format!("nack {ballot} promised {promised}"),
        Accept {
            ballot,
            prev,
            entries,
            chosen,
        } => {
            let entries = ids(entries);
            format!("accept {ballot} behind {prev} {entries} chosen {chosen}")
        }
        Accepted { ballot, durable } => format!("accepted {ballot} to {durable}"),
        AcceptRejected {
            ballot,
            resume_after,
        } => format!("rejected {ballot} resume after {resume_after}"),
        Heartbeat { ballot, chosen, .. } => format!("heartbeat {ballot} chosen {chosen}"),
        HeartbeatAck {
            ballot,
            durable,
            received,
            ..
        } => format!("lease {ballot} durable {durable} received {received}"),
        HandOver { ballot } => format!("hand-over {ballot}"),
        FetchTail { ballot, after } => format!("fetch tail {ballot} after {after}"),
        Tail { prev, entries, .. } => format!("tail behind {prev} {}", ids(entries)),
        CatchUp { after } => format!("catch-up after {after}"),
        Chosen { prev, entries, .. } => format!("chosen behind {prev} {}", ids(entries)),
        LogGone { first, .. } => format!("gone before {first}"),
        Rejoin => "rejoin".to_owned(),
        Absent { ballot } => format!("absent {ballot}"),
        Standing { standing, asks, .. } => {
            let asks = if *asks { "asks, stands" } else { "stands" };
            format!("{asks} {}", show_standing(standing))
        }
        Seen { mark, alive, epoch } => {
            let alive = if *alive { " alive" } else { "" };
            let epoch = match epoch {
                0 => String::new(),
                epoch => format!(" epoch {epoch}"),
            };
            format!("seen {}{alive}{epoch}", show_standing(mark))
        }
        Progress(_) | Sync(_) => return None,
    })
}

fn show_standing(standing: &Standing) -> String {
    let Standing {
        life,
        promised,
        acknowledged,
    } = standing;
    format!("life {life} promised {promised} to {acknowledged}")
}

const NOTHING: [&str; 0] = [];

/// A server, driven like the engine does: it applies at once, and its writes are durable when told.
struct Server {
    replica: Replica,
    now: Instant,
    writes: VecDeque<WriteId>,
}

impl Server {
    fn start_as(server: u8, listed: &[u8], tuning: Tuning, recovered: Recovered) -> Server {
        Server::start_life(Incarnation(0), server, listed, tuning, recovered)
    }

    fn start_life(
        life: Incarnation,
        server: u8,
        listed: &[u8],
        tuning: Tuning,
        recovered: Recovered,
    ) -> Server {
        let now = Instant(1_000_000_000);
        let config = Config {
            id: ServerId(server),
            incarnation: life,
            members: Membership::new(listed.iter().copied().map(ServerId)),
            tuning,
            seed: 1,
        };
        Server {
            replica: Replica::new(config, recovered, now),
            now,
            writes: VecDeque::new(),
        }
    }

    /// Servers 1 and 2 have never seen more of it than it knows.
    fn meet(&mut self) {
        for other in [1, 2] {
            let (mark, alive, epoch) = (Standing::default(), false, 0);
            self.gets_of(other, 1, Message::Seen { mark, alive, epoch });
        }
    }

    fn start(recovered: Recovered) -> Server {
        Server::start_as(0, &[0, 1, 2, 5], tuning(), recovered)
    }

    /// Started long enough ago for leases of before to have ended.
    fn awake(promised: f64, tail: Vec<Entry>) -> Server {
        let mut server = Server::start(Recovered {
            promised: ballot(promised),
            tail,
            log_first: Slot(1),
            ..Recovered::default()
        });
        server.pass(500);
        server
    }

    /// Leads ballot 2.0 over `tail`, which servers 1 and 2 hold as well; its barrier is durable here only.
    fn leader(tail: Vec<Entry>) -> Server {
        let last = tail.last().map_or(EntryId::default(), |entry| entry.id);
        let mut server = Server::awake(1.0, tail);
        server.elect(last);
        server.all_persisted();
        server
    }

    /// Wins an election with the promise of server 1.
    fn elect(&mut self, last: EntryId) {
        self.wait(0);
        self.gets(1, pre_check_answer(2.0, last));
        self.all_persisted();
        self.gets(1, promise(2.0, last));
        assert_eq!(self.replica.role(), RoleKind::Leader { serving: false });
    }

    fn outputs(&mut self) -> Vec<String> {
        let mut shown = Vec::new();
        while let Some(output) = self.replica.poll_output() {
            match &output {
                Output::Persist { write, .. } => self.writes.push_back(*write),
                Output::Apply { entries } => {
                    let last = entries.last().expect("entries are applied");
                    self.replica.handle_applied(self.now, last.id.slot);
                }
                _ => {}
            }
            shown.extend(show(&output));
        }
        shown
    }

    /// From a life of a server of which it is known that it counts, or not.
    fn gets_of(&mut self, from: u8, life: u64, message: Message) -> Vec<String> {
        let life = Incarnation(life);
        self.replica
            .handle_message(self.now, ServerId(from), life, message);
        self.outputs()
    }

    fn gets(&mut self, from: u8, message: Message) -> Vec<String> {
        self.replica
            .handle_message(self.now, ServerId(from), Incarnation(0), message);
        self.outputs()
    }

    /// The oldest write is durable.
    fn persisted(&mut self) -> Vec<String> {
        let write = self.writes.pop_front().expect("a write is under way");
        self.replica.handle_persisted(self.now, write);
        self.outputs()
    }

    fn all_persisted(&mut self) -> Vec<String> {
        let mut shown = Vec::new();
        while !self.writes.is_empty() {
            shown.extend(self.persisted());
        }
        shown
    }

    /// Time passes, and nobody looks at it.
    fn pass(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
    }

    fn wait(&mut self, millis: u64) -> Vec<String> {
        self.pass(millis);
        self.replica.handle_timeout(self.now);
        self.outputs()
    }

    fn propose(&mut self, commands: Vec<Command>) -> Vec<String> {
        self.replica.propose(commands).expect("it leads");
        self.replica.flush(self.now);
        self.outputs()
    }

    fn slots(&self) -> (u64, u64, u64) {
        let replica = &self.replica;
        (
            replica.chosen().0,
            replica.durable().0,
            replica.last().slot.0,
        )
    }
}

/// Without randomness.
fn tuning() -> Tuning {
    Tuning {
        election_spread: Duration::ZERO,
        ..Tuning::default()
    }
}

fn write(bytes: usize) -> Command {
    Command {
        session: SessionId(1),
        number: RequestNumber(1),
        settled_below: RequestNumber(0),
        op: Op::Write {
            volume: VolumeId(1),
            first_block: 0,
            checksums: Vec::new(),
            payload: vec![0; bytes].into(),
        },
    }
}

// ---- Phase 1, the acceptor.

/// design.md 3: the promise is made durable, then it is sent.
#[test]
fn a_promise_is_sent_when_it_is_durable() {
    let mut server = Server::awake(1.0, log([1.0, 1.0]));
    assert_eq!(server.gets(1, prepare(2.1)), ["persist promise 2.1"]);
    assert_eq!(server.gets(1, prepare(2.1)), NOTHING);
    let promise = "1 <- promise 2.1 last 2@1.0 chosen 0";
    assert_eq!(server.persisted(), [promise]);
    // Doubled: the same answer.
    assert_eq!(server.gets(1, prepare(2.1)), [promise]);
}

/// Nothing of a lower ballot is promised or accepted (Paxos Made Simple, P1a).
#[test]
fn a_lower_ballot_is_refused() {
    let mut server = Server::awake(3.2, log([]));
    let nack = ["1 <- nack 2.1 promised 3.2"];
    assert_eq!(server.gets(1, prepare(2.1)), nack);
    assert_eq!(server.gets(1, heartbeat(2.1, 0)), nack);
    let accept = accept(2.1, EntryId::default(), [2.1], 0);
    assert_eq!(server.gets(1, accept), nack);
    assert_eq!(server.slots(), (0, 0, 0));
}

/// A ballot is its server's alone: nobody else can prepare it or accept under it.
#[test]
fn a_ballot_of_someone_else_is_ignored() {
    let mut server = Server::awake(1.0, log([]));
    assert_eq!(server.gets(2, prepare(2.1)), NOTHING);
    assert_eq!(server.gets(2, heartbeat(2.1, 0)), NOTHING);
    assert_eq!(server.replica.promised(), ballot(1.0));
}

/// Learners never vote (notes, T12): they acknowledge nothing, and whoever lists them to learn asks them for no promise and
/// counts none. Whether they learn only is what the candidate's list says, which may be newer than theirs.
#[test]
fn a_learner_acknowledges_nothing_and_its_promise_counts_by_the_list_of_the_candidate() {
    let mut candidate = Server::awake(1.0, log([]));
    let asked = candidate.wait(0);
    assert!(
        !asked.iter().any(|it| it.starts_with("5 <- pre-check")),
        "{asked:?}"
    );
    candidate.gets(1, pre_check_answer(2.0, EntryId::default()));
    candidate.all_persisted();
    candidate.gets(5, promise(2.0, EntryId::default()));
    assert_eq!(candidate.replica.role(), RoleKind::Candidate);

    let mut server = Server::start_as(5, &[0, 1, 2, 5], tuning(), Recovered::default());
    server.pass(500);
    assert_eq!(server.gets(1, prepare(2.1)), ["persist promise 2.1"]);
    assert_eq!(server.persisted(), ["1 <- promise 2.1 last 0@0.0 chosen 0"]);
    server.gets(1, accept(2.1, EntryId::default(), [2.1], 0));
    assert!(
        !server
            .all_persisted()
            .iter()
            .any(|it| it.contains("accepted"))
    );
}

/// With a slow disk a ballot that is not durable yet is not followed by the next.
#[test]
fn one_promise_at_a_time_is_on_its_way_to_the_disk() {
    let mut server = Server::awake(1.0, log([]));
    assert_eq!(server.gets(1, prepare(2.1)), ["persist promise 2.1"]);
    assert_eq!(server.wait(2000), NOTHING);
    assert_eq!(server.persisted(), ["1 <- promise 2.1 last 0@0.0 chosen 0"]);
}

// ---- Phase 2, the acceptor.

/// An acknowledgement says that log and promise are durable.
#[test]
fn an_entry_is_acknowledged_when_it_is_durable() {
    let mut server = Server::awake(1.0, log([]));
    let accept = accept(2.1, EntryId::default(), [2.1, 2.1], 0);
    let persist = ["persist promise 2.1", "persist [1@2.1 2@2.1]"];
    assert_eq!(server.gets(1, accept.clone()), persist);
    assert_eq!(server.gets(1, heartbeat(2.1, 0)), NOTHING, "not durable");
    assert_eq!(server.persisted(), NOTHING);
    let lease = ["1 <- lease 2.1 durable 0 received 2"];
    assert_eq!(server.gets(1, heartbeat(2.1, 0)), lease);
    assert_eq!(server.persisted(), ["1 <- accepted 2.1 to 2"]);
    // Doubled: acknowledged again, not written again.
    assert_eq!(server.gets(1, accept), ["1 <- accepted 2.1 to 2"]);
}

/// Acknowledged is what is equal to the leader's log: a longer log of an older ballot does not count
/// (notes, 1.4: never count old-ballot acknowledgements).
#[test]
fn only_what_matches_the_leader_is_acknowledged() {
    let mut server = Server::awake(2.1, log([1.0, 1.0, 1.0]));
    let lease = ["1 <- lease 2.1 durable 0 received 0"];
    assert_eq!(server.gets(1, heartbeat(2.1, 3)), lease);
    let accept = accept(2.1, EntryId::default(), [1.0], 3);
    let learned = ["1 <- accepted 2.1 to 1", "apply [1@1.0]"];
    assert_eq!(server.gets(1, accept), learned, "chosen as far as equal");
}

/// Notes, T10 and 1.4 (ABA): a sync of entries that were replaced meanwhile says nothing about what
/// stands in their slots now.
#[test]
fn a_sync_from_before_a_truncation_does_not_count() {
    let mut server = Server::awake(1.1, log([]));
    let first = accept(1.1, EntryId::default(), [1.1, 1.1, 1.1], 0);
    assert_eq!(server.gets(1, first), ["persist [1@1.1 2@1.1 3@1.1]"]);
    let second = accept(2.2, id(1, 1.1), [2.2, 2.2], 0);
    let persist = ["persist promise 2.2", "persist after 1 [2@2.2 3@2.2]"];
    assert_eq!(server.gets(2, second), persist);
    assert_eq!(server.persisted(), NOTHING, "the entries of ballot 1.1");
    assert_eq!(server.slots(), (0, 1, 3));
    assert_eq!(server.persisted(), ["2 <- accepted 2.2 to 1"]);
    assert_eq!(server.persisted(), ["2 <- accepted 2.2 to 3"]);
}

/// The log has no gaps: entries behind an unknown one are rejected, and the leader goes on from what is
/// surely equal.
#[test]
fn entries_behind_a_gap_are_rejected() {
    let mut server = Server::awake(2.1, log([1.0]));
    let late = accept(2.1, id(2, 1.0), [2.1], 0);
    let rejected = ["1 <- rejected 2.1 resume after 0"];
    assert_eq!(server.gets(1, late), rejected);
    let other = accept(2.1, id(1, 2.1), [2.1], 0);
    assert_eq!(server.gets(1, other), rejected, "another entry 1");
    assert_eq!(server.slots(), (0, 1, 1));
}

/// Messages that are doubled, late or in another order change nothing that later ones have made.
#[test]
fn late_and_doubled_entries_are_harmless() {
    let mut server = Server::awake(2.1, log([]));
    let first = accept(2.1, EntryId::default(), [2.1], 0);
    let second = accept(2.1, id(1, 2.1), [2.1, 2.1], 1);
    assert_eq!(
        server.gets(1, second.clone()),
        ["1 <- rejected 2.1 resume after 0"]
    );
    server.gets(1, first.clone());
    server.gets(1, second.clone());
    server.all_persisted();
    assert_eq!(server.slots(), (1, 3, 3));
    for message in [first, second, heartbeat(2.1, 0)] {
        let outputs = server.gets(1, message);
        assert!(
            !outputs.iter().any(|it| it.contains("persist")),
            "{outputs:?}"
        );
        assert_eq!(server.slots(), (1, 3, 3));
    }
}

/// What is chosen is never replaced: who asks for it leads no more. 5 servers: 1 led ballot 2.1 and was
/// unseated by 4 with 3.4; server 0 has not heard of that, but learns from 3 what 4 has chosen.
#[test]
fn a_deposed_leader_cannot_replace_what_is_chosen() {
    let recovered = Recovered {
        promised: ballot(2.1),
        tail: log([2.1, 2.1]),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &[0, 1, 2, 3, 4], tuning(), recovered);
    // Chosen by 4, but proposed by someone else before.
    let learned = server.gets(3, chosen(EntryId::default(), [1.0], 9));
    assert_eq!(learned[0], "persist after 0 [1@1.0]");
    assert_eq!(server.replica.promised(), ballot(2.1));
    server.all_persisted();
    let rejected = ["1 <- rejected 2.1 resume after 1"];
    let replaces = accept(2.1, EntryId::default(), [2.1, 2.1], 0);
    assert_eq!(server.gets(1, replaces), rejected);
    let follows = accept(2.1, id(1, 2.1), [2.1], 0);
    assert_eq!(server.gets(1, follows), rejected);
    assert_eq!(server.slots(), (1, 1, 1));
    // The first entry of ballot 3.4 tells of it.
    let outputs = server.gets(3, chosen(id(1, 1.0), [3.4], 9));
    assert!(
        outputs.contains(&"persist promise 3.4".to_owned()),
        "{outputs:?}"
    );
    let late = accept(2.1, EntryId::default(), [2.1], 0);
    assert_eq!(server.gets(1, late), ["1 <- nack 2.1 promised 3.4"]);
}

// ---- Elections.

/// A pre-check is refused while a leader is heard, and uses up no ballot.
#[test]
fn a_pre_check_is_refused_while_a_leader_is_heard() {
    let mut server = Server::awake(1.0, log([]));
    assert_eq!(server.gets(2, pre_check(2.2)), ["2 <- pre-check 2.2 yes"]);
    assert_eq!(server.gets(2, pre_check(1.0)), ["2 <- pre-check 1.0 no"]);
    server.gets(1, heartbeat(2.1, 0));
    assert_eq!(server.gets(2, pre_check(3.2)), ["2 <- pre-check 3.2 no"]);
    server.pass(499);
    assert_eq!(server.gets(2, pre_check(3.2)), ["2 <- pre-check 3.2 no"]);
    server.pass(1);
    assert_eq!(server.gets(2, pre_check(3.2)), ["2 <- pre-check 3.2 yes"]);
    assert_eq!(server.replica.promised(), ballot(2.1));
}

/// A restarted server may have granted a lease before: it waits one (notes, 1.4).
#[test]
fn a_restarted_server_is_quiet_for_a_lease() {
    let mut server = Server::start(Recovered::default());
    server.pass(499);
    assert_eq!(server.gets(1, pre_check(2.1)), ["1 <- pre-check 2.1 no"]);
    assert_eq!(server.gets(1, prepare(2.1)), NOTHING);
    let released = Message::Prepare {
        ballot: ballot(2.1),
        released: Some(ballot(1.2)),
    };
    assert_eq!(server.gets(1, released), NOTHING, "granted to whom?");
    server.pass(1);
    assert_eq!(server.gets(1, prepare(2.1)), ["persist promise 2.1"]);
}

/// A granted lease forbids promises, unless the leader itself has given it up.
#[test]
fn a_granted_lease_holds_until_it_ends_or_is_released() {
    let release = |of| Message::Prepare {
        ballot: ballot(of),
        released: Some(ballot(2.1)),
    };
    for (wait, message, promised) in [
        (499, prepare(3.2), false),
        (500, prepare(3.2), true),
        (10, release(3.2), true),
    ] {
        let mut server = Server::awake(2.1, log([]));
        server.gets(1, heartbeat(2.1, 0));
        server.pass(wait);
        let outputs = server.gets(2, message);
        assert_eq!(
            outputs == ["persist promise 3.2"],
            promised,
            "after {wait} ms"
        );
    }
}

/// Pre-check, own promise durable, prepare, promises of a majority, barrier.
#[test]
fn an_election_step_by_step() {
    let mut server = Server::awake(1.0, log([1.0]));
    assert_eq!(server.wait(0), ["1 <- pre-check 2.0", "2 <- pre-check 2.0"]);
    let learner = server.gets(5, pre_check_answer(2.0, EntryId::default()));
    assert_eq!(learner, NOTHING, "learners do not count");
    assert_eq!(
        server.gets(1, pre_check_answer(2.0, id(1, 1.0))),
        ["persist promise 2.0"]
    );
    assert_eq!(
        server.gets(1, promise(2.0, id(1, 1.0))),
        NOTHING,
        "asked nobody yet"
    );
    assert_eq!(server.persisted(), ["1 <- prepare 2.0", "2 <- prepare 2.0"]);
    assert_eq!(server.gets(5, promise(2.0, id(1, 1.0))), NOTHING);
    assert_eq!(server.gets(1, promise(1.0, id(1, 1.0))), NOTHING);
    let outputs = server.gets(1, promise(2.0, id(1, 1.0)));
    let expected = [
        "persist [2@2.0]",
        "1 <- heartbeat 2.0 chosen 0",
        "2 <- heartbeat 2.0 chosen 0",
        "5 <- heartbeat 2.0 chosen 0",
        "1 <- accept 2.0 behind 0@0.0 [1@1.0 2@2.0] chosen 0",
    ];
    assert_eq!(outputs, expected);
    assert_eq!(server.gets(1, promise(2.0, id(1, 1.0))), NOTHING, "doubled");
}

/// The value of phase 1 is the log with the greatest last id of a majority: a longer log of an older
/// ballot loses against it.
#[test]
fn a_candidate_takes_over_the_best_log() {
    let mut server = Server::awake(1.0, log([1.0, 1.0, 1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    let fetch = ["1 <- fetch tail 2.0 after 0"];
    assert_eq!(server.gets(1, promise(2.0, id(2, 1.1))), fetch);
    let tail = tail(2.0, EntryId::default(), [1.0, 1.1]);
    let outputs = server.gets(1, tail.clone());
    assert_eq!(outputs[0], "persist after 1 [2@1.1]");
    assert_eq!(outputs[1], "persist [3@2.0]");
    assert_eq!(server.gets(1, tail), NOTHING, "doubled");
}

/// An answer that brings nothing new is not followed by the same question.
#[test]
fn a_tail_that_became_shorter_ends_the_candidacy() {
    let mut server = Server::awake(1.0, log([1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    server.gets(1, promise(2.0, id(3, 1.1)));
    let outputs = server.gets(1, tail(2.0, EntryId::default(), [1.0]));
    assert_eq!(outputs, ["1 <- fetch tail 2.0 after 1"]);
    for _ in 0..3 {
        assert_eq!(server.gets(1, tail(2.0, id(1, 1.0), [])), NOTHING);
    }
    // It learned what ballot 3 chose: not the log that it promised to have.
    server.gets(1, tail(2.0, id(1, 1.0), [3.2, 3.2]));
    assert_eq!(server.replica.role(), RoleKind::Follower);
}

/// The other's log may begin within ours: equal there, it is equal before.
#[test]
fn a_tail_is_fetched_from_where_the_other_log_begins() {
    let mut server = Server::awake(1.0, log([1.0, 1.0, 1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    server.gets(1, promise(2.0, id(4, 1.0)));
    let fetch = ["1 <- fetch tail 2.0 after 2"];
    assert_eq!(server.gets(1, gone(3, 2)), fetch);
    let outputs = server.gets(1, tail(2.0, id(2, 1.0), [1.0, 1.0]));
    assert_eq!(outputs[0], "persist [4@1.0]");
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
}

/// Whose chunks are being copied does not lead, even if its log was reset to a base as good as the
/// others' while it waited for promises.
#[test]
fn a_reset_log_ends_a_candidacy() {
    let mut server = Server::awake(1.0, log([1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    let admitted = Admitted::default();
    server
        .replica
        .handle_base(server.now, id(9, 1.1), admitted, None);
    server.gets(1, promise(2.0, id(9, 1.1)));
    assert_eq!(server.replica.role(), RoleKind::Follower);
    assert_eq!(server.slots(), (9, 9, 9));
}

// ---- Disks that hang.

/// What a disk does not finish cannot be applied, and nobody is answered: another server shall lead.
#[test]
fn a_leader_whose_disk_hangs_resigns() {
    let mut server = Server::leader(log([1.0]));
    server.gets(1, accepted(2.0, 2));
    server.propose(vec![write(9)]);
    // The network lives: without the disk the leader would lead for ever.
    for _ in 0..30 {
        server.wait(100);
        let sent = server.now;
        for follower in [1, 2] {
            let progress = Progress {
                free_bytes: 1 << 30,
                ..Progress::default()
            };
            server.gets(follower, granted(2.0, sent, 3));
            server.gets(follower, Message::Progress(progress));
        }
        assert!(matches!(server.replica.role(), RoleKind::Leader { .. }));
    }
    let outputs = server.wait(100);
    assert!(
        outputs.contains(&"2 <- hand-over 2.0".to_owned()),
        "{outputs:?}"
    );
    assert_eq!(server.replica.role(), RoleKind::Follower);
    // It does not stand, and does not promise what it could not keep.
    for _ in 0..100 {
        assert_eq!(server.wait(100), NOTHING);
    }
    assert_eq!(server.gets(1, pre_check(3.1)), ["1 <- pre-check 3.1 no"]);
    // The disk goes on, and so does the server.
    server.all_persisted();
    assert_eq!(server.gets(1, pre_check(3.1)), ["1 <- pre-check 3.1 yes"]);
    server.wait(10_000);
    assert_eq!(server.replica.role(), RoleKind::Candidate);
}

/// Slow is not hanging: each write has its time anew.
#[test]
fn a_leader_with_a_slow_disk_goes_on() {
    let mut server = Server::leader(log([1.0]));
    server.gets(1, accepted(2.0, 2));
    server.propose(vec![write(9)]);
    server.gets(1, accepted(2.0, 3));
    server.propose(vec![write(9)]);
    for _ in 0..4 {
        for _ in 0..28 {
            server.wait(100);
            let sent = server.now;
            server.gets(1, granted(2.0, sent, 3));
        }
        server.persisted();
        let last = server.slots().2;
        server.gets(1, accepted(2.0, last));
        server.propose(vec![write(9)]);
        assert!(matches!(server.replica.role(), RoleKind::Leader { .. }));
    }
}

// ---- Damaged logs.

fn damaged() -> Server {
    let mut server = Server::start(Recovered {
        promised: ballot(3.1),
        tail: log([1.0, 1.0]),
        evidence: Some(id(4, 3.1)),
        ..Recovered::default()
    });
    server.pass(500);
    server
}

/// Notes, T8: what was acknowledged and cannot be read is not denied; who lost it does not lead.
#[test]
fn a_damaged_log_keeps_its_claim() {
    let mut server = damaged();
    assert_eq!(server.wait(10_000), NOTHING, "no pre-check");
    server.gets(2, prepare(4.2));
    let promise = ["2 <- promise 4.2 last 4@3.1 have 2@1.0 chosen 0"];
    assert_eq!(server.persisted(), promise);
}

/// A candidate does not win over a claim that nobody of its majority can show.
#[test]
fn a_candidate_waits_for_a_server_that_has_what_another_lost() {
    let mut server = Server::awake(1.0, log([1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    let lost = claim(2.0, id(2, 1.0), id(2, 1.0), id(1, 1.0));
    assert_eq!(server.gets(1, lost), NOTHING);
    let fetch = ["2 <- fetch tail 2.0 after 0"];
    assert_eq!(server.gets(2, promise(2.0, id(2, 1.0))), fetch);
}

/// A server whose disk is new does not come back with what it held. What may have been torn was then not chosen,
/// as long as no more than a minority of copies is gone; what another held for certain may have been.
#[test]
fn a_candidate_does_not_wait_for_what_a_wiped_disk_held() {
    for (certain, wins) in [(id(1, 1.0), true), (id(2, 1.0), false)] {
        let mut server = Server::awake(1.0, log([1.0]));
        server.wait(0);
        server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
        server.all_persisted();
        let lost = claim(2.0, id(2, 1.0), certain, id(1, 1.0));
        assert_eq!(server.gets(1, lost), NOTHING);
        let ballot = ballot(2.0);
        server.gets(2, Message::Absent { ballot });
        let leads = server.replica.role() == RoleKind::Leader { serving: false };
        assert_eq!(leads, wins, "{certain}");
    }
}

/// What a majority never acknowledged is not chosen, whatever one server claims.
#[test]
fn a_majority_without_claims_suffices() {
    let mut server = Server::awake(1.0, log([1.0]));
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
    server.all_persisted();
    let lost = claim(2.0, id(2, 1.0), id(2, 1.0), id(1, 1.0));
    assert_eq!(server.gets(1, lost), NOTHING);
    server.gets(2, promise(2.0, id(1, 1.0)));
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
}

/// Servers that were stopped while they wrote the same entry cannot tell whether it was torn or has
/// rotted. Together they can: if it was chosen, one of them could show it.
#[test]
fn doubts_of_all_servers_are_no_claim() {
    let doubtful = |doubt: Option<EntryId>| {
        let mut server = Server::start(Recovered {
            promised: ballot(1.0),
            tail: log([1.0]),
            doubt,
            ..Recovered::default()
        });
        server.pass(500);
        server.wait(0);
        server.gets(1, pre_check_answer(2.0, id(2, 1.0)));
        server.wait(0);
        server.gets(1, pre_check_answer(2.0, id(1, 1.0)));
        server
    };
    let own = Some(id(2, 1.0));
    let torn = claim(2.0, id(2, 1.0), id(1, 1.0), id(1, 1.0));
    let rotten = claim(2.0, id(2, 1.0), id(2, 1.0), id(1, 1.0));
    for other in [torn.clone(), rotten.clone(), promise(2.0, id(1, 1.0))] {
        let mut server = doubtful(own);
        server.all_persisted();
        assert_eq!(server.gets(1, other.clone()), NOTHING);
        assert_eq!(server.gets(1, other), NOTHING, "the same again");
        // One may have lost it for certain, the others never had it: those are a majority.
        server.gets(2, torn.clone());
        assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
        assert!(server.replica.may_lead());
    }
    // Two that had it for certain are as many as it takes to choose it.
    let mut server = doubtful(own);
    server.all_persisted();
    assert_eq!(server.gets(1, rotten.clone()), NOTHING);
    assert_eq!(server.gets(2, rotten), NOTHING);
    assert_eq!(server.replica.role(), RoleKind::Candidate);
}

/// Who doubts whether it held an entry claims it until a leader's log has settled it.
#[test]
fn a_doubt_is_a_claim() {
    let mut server = Server::start(Recovered {
        promised: ballot(3.1),
        tail: log([1.0, 1.0]),
        doubt: Some(id(4, 3.1)),
        ..Recovered::default()
    });
    server.pass(500);
    server.gets(2, prepare(4.2));
    let promise = ["2 <- promise 4.2 last 4@3.1 certain 2@1.0 chosen 0"];
    assert_eq!(server.persisted(), promise);
    server.gets(2, accept(4.2, id(2, 1.0), [4.2, 4.2], 0));
    server.all_persisted();
    server.pass(500);
    server.gets(2, prepare(5.2));
    assert_eq!(server.persisted(), ["2 <- promise 5.2 last 4@4.2 chosen 0"]);
}

/// The claim ends when the entries are back, or when a leader replaces them.
#[test]
fn a_claim_ends_when_the_entries_are_back_or_replaced() {
    let claim = |mut server: Server| {
        server.all_persisted();
        server.pass(500);
        server.gets(2, prepare(9.2));
        server.persisted()
    };
    let mut back = damaged();
    back.gets(1, accept(3.1, id(2, 1.0), [3.1], 0));
    let promise = ["2 <- promise 9.2 last 4@3.1 have 3@3.1 chosen 0"];
    assert_eq!(claim(back), promise, "entry 4 is still missing");
    let mut back = damaged();
    back.gets(1, accept(3.1, EntryId::default(), [1.0, 1.0, 3.1, 3.1], 0));
    assert_eq!(claim(back), ["2 <- promise 9.2 last 4@3.1 chosen 0"]);
    // Ballot 5 was won without entry 4 of ballot 3. Its log goes on behind 2@2.2.
    let mut replaced = damaged();
    replaced.gets(2, accept(5.2, id(0, 0.0), [1.0, 2.2], 0));
    assert_eq!(claim(replaced), ["2 <- promise 9.2 last 2@2.2 chosen 0"]);
    // Nothing that we hold is replaced, and 3 and 4 are still to come: the claim stays.
    let mut shorter = damaged();
    shorter.gets(2, accept(5.2, id(0, 0.0), [1.0, 1.0], 0));
    let promise = ["2 <- promise 9.2 last 4@3.1 have 2@1.0 chosen 0"];
    assert_eq!(claim(shorter), promise);
}

/// Also without damage: entries that were replaced are claimed no more, or nobody could be elected
/// once those who replaced them have gone.
#[test]
fn replaced_entries_are_not_claimed() {
    let mut server = Server::awake(3.1, log([1.1, 3.1]));
    server.gets(2, accept(4.2, id(1, 1.1), [2.2], 0));
    server.all_persisted();
    server.pass(500);
    server.gets(1, prepare(5.1));
    assert_eq!(server.persisted(), ["1 <- promise 5.1 last 2@2.2 chosen 0"]);
    assert!(server.replica.may_lead());
}

// ---- The leader.

/// A new leader counts nothing before a majority has its barrier (Raft, 5.4.2).
#[test]
fn nothing_is_chosen_before_the_barrier() {
    let mut server = Server::leader(log([1.0, 1.1]));
    assert_eq!(server.slots(), (0, 3, 3));
    assert_eq!(server.gets(1, accepted(2.0, 2)), NOTHING);
    assert_eq!(
        server.gets(1, accepted(1.0, 3)),
        NOTHING,
        "of an old ballot"
    );
    assert_eq!(server.gets(5, accepted(2.0, 3)), NOTHING, "of a learner");
    assert_eq!(
        server.gets(1, accepted(2.0, 4)),
        NOTHING,
        "of what is not there"
    );
    assert!(server.replica.propose(vec![write(1)]).is_err());
    let outputs = server.gets(1, accepted(2.0, 3));
    assert_eq!(outputs, ["apply [1@1.0 2@1.1 3@2.0]", "leads 2.0"]);
    assert_eq!(server.gets(1, accepted(2.0, 1)), NOTHING, "late");
    assert_eq!(server.slots(), (3, 3, 3));
}

/// A majority without the leader's own disk chooses; it applies what is durable here.
#[test]
fn the_leader_need_not_be_part_of_the_majority() {
    let mut server = Server::awake(1.0, log([]));
    server.elect(EntryId::default());
    server.gets(1, accepted(2.0, 1));
    assert_eq!(server.gets(2, accepted(2.0, 1)), NOTHING);
    assert_eq!(server.slots(), (1, 0, 1));
    assert_eq!(server.persisted(), ["apply [1@2.0]", "leads 2.0"]);
}

/// The lease counts from when the heartbeats were sent that a majority answered, and 5 % shorter.
#[test]
fn reads_end_with_the_lease() {
    let mut server = Server::leader(log([]));
    let sent = server.now;
    server.gets(1, accepted(2.0, 1));
    assert!(!server.replica.may_read(sent), "nobody has granted one");
    server.pass(200);
    server.gets(5, granted(2.0, sent, 1));
    server.gets(1, granted(1.0, sent, 1));
    assert!(
        !server.replica.may_read(server.now),
        "learners, old ballots"
    );
    server.gets(1, granted(2.0, sent, 1));
    assert!(server.replica.may_read(sent + Duration::from_millis(474)));
    assert!(!server.replica.may_read(sent + Duration::from_millis(475)));
    // A doubled answer makes it no longer.
    server.pass(200);
    server.gets(1, granted(2.0, sent, 1));
    assert!(!server.replica.may_read(sent + Duration::from_millis(475)));
    // While it holds, this server helps nobody to unseat itself.
    assert_eq!(server.gets(2, prepare(3.2)), NOTHING);
    server.pass(100);
    assert_eq!(
        server.gets(2, prepare(3.2)),
        ["leads no more", "persist promise 3.2"]
    );
    assert!(!server.replica.may_read(sent));
}

/// A leader that nobody follows gives up.
#[test]
fn a_leader_without_followers_steps_down() {
    let mut server = Server::leader(log([]));
    server.gets(1, accepted(2.0, 1));
    assert!(!server.wait(1000).contains(&"leads no more".to_owned()));
    assert!(server.wait(1).contains(&"leads no more".to_owned()));
}

/// At most `window_slots` entries are under way; few are sent at once, many gather.
#[test]
fn the_window_bounds_what_is_under_way() {
    let tuning = Tuning {
        window_slots: 4,
        eager_slots: 2,
        entry_bytes: 8192,
        ..tuning()
    };
    let mut server = Server::start_as(0, &[0], tuning, Recovered::default());
    assert_eq!(server.wait(0), ["persist promise 1.0"]);
    server.all_persisted();
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: true });
    for _ in 0..2 {
        assert_eq!(server.propose(vec![write(4096)]).len(), 1, "sent at once");
    }
    assert_eq!(server.propose(vec![write(4096)]), NOTHING, "half an entry");
    assert_eq!(server.propose(vec![write(4096)]), ["persist [4@1.0]"]);
    assert_eq!(server.propose(vec![write(8192); 3]), ["persist [5@1.0]"]);
    assert_eq!(server.replica.queued(), 2, "the window is full");
    assert_eq!(server.persisted(), ["persist [6@1.0]", "apply [2@1.0]"]);
    let rest = server.all_persisted();
    assert_eq!(rest.last().map(String::as_str), Some("apply [7@1.0]"));
    assert_eq!(server.replica.queued(), 0);
}

/// A rejection makes the leader send again from what is surely equal; one of many is enough.
#[test]
fn a_rejection_resumes_sending_once() {
    let mut server = Server::leader(log([1.0]));
    let reject = Message::AcceptRejected {
        ballot: ballot(2.0),
        resume_after: Slot(0),
    };
    let again = ["1 <- accept 2.0 behind 0@0.0 [1@1.0 2@2.0] chosen 0"];
    assert_eq!(server.gets(1, reject.clone()), again);
    assert_eq!(server.gets(1, reject.clone()), NOTHING);
    server.pass(50);
    assert_eq!(server.gets(1, reject), again);
}

/// Entries that were lost on the way without a rejection are missed by the heartbeats.
#[test]
fn lost_entries_are_sent_again() {
    let mut server = Server::leader(log([]));
    for round in 0..2 {
        server.wait(100);
        let outputs = server.gets(1, granted(2.0, server.now, 0));
        let again = ["1 <- accept 2.0 behind 0@0.0 [1@2.0] chosen 0"];
        assert_eq!(outputs == again, round == 1, "{outputs:?}");
    }
}

/// Who took nothing, for whatever reason, is not sent everything again and again: one message, until it
/// takes that.
#[test]
fn a_follower_that_takes_nothing_is_tried_with_one_message() {
    let tuning = Tuning {
        entry_bytes: 1,
        ..tuning()
    };
    let recovered = Recovered {
        promised: ballot(1.0),
        tail: log([1.0, 1.0]),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &[0, 1, 2], tuning, recovered);
    server.pass(500);
    server.elect(id(2, 1.0));
    server.all_persisted();
    let mut sent = Vec::new();
    for _ in 0..4 {
        server.wait(100);
        sent.push(server.gets(1, granted(2.0, server.now, 0)));
    }
    let first = "1 <- accept 2.0 behind 0@0.0 [1@1.0] chosen 0";
    let nothing: Vec<String> = Vec::new();
    assert_eq!(
        sent,
        [&nothing[..], &[first.into()], &nothing, &[first.into()]]
    );
    let rest = server.gets(1, accepted(2.0, 1));
    assert_eq!(rest.len(), 2, "{rest:?}");
}

/// Applying is far behind: entries are not taken, and nobody leads with that.
#[test]
fn a_backlog_takes_no_entries_and_does_not_lead() {
    let tuning = Tuning {
        backlog_bytes: 1,
        ..tuning()
    };
    let recovered = Recovered {
        promised: ballot(2.1),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &[0, 1, 2], tuning, recovered);
    server.pass(500);
    // It has looked at time before.
    server.gets(1, accept(2.1, EntryId::default(), [2.1], 1));
    let write = server.writes.pop_front().unwrap();
    server.replica.handle_persisted(server.now, write);
    let (from, now) = (ServerId(1), server.now);
    let hand_over = Message::HandOver {
        ballot: ballot(2.1),
    };
    let more = accept(2.1, id(1, 2.1), [2.1], 1);
    let life = Incarnation(0);
    server.replica.handle_message(now, from, life, more.clone());
    server
        .replica
        .handle_message(now, from, life, hand_over.clone());
    assert_eq!(
        server.outputs(),
        ["1 <- accepted 2.1 to 1", "apply [1@2.1]"],
        "neither"
    );
    assert_eq!(server.gets(1, more), ["persist [2@2.1]"]);
    assert_eq!(server.gets(1, hand_over), ["persist promise 3.0"]);
}

/// A leader that is far behind with applying proposes no more until it has caught up.
#[test]
fn a_leader_with_a_backlog_lets_requests_wait() {
    let tuning = Tuning {
        backlog_bytes: 1,
        ..tuning()
    };
    let mut server = Server::start_as(0, &[0], tuning, Recovered::default());
    server.wait(0);
    server.all_persisted();
    server.propose(vec![write(1)]);
    let persisted = server.writes.pop_front().unwrap();
    server.replica.handle_persisted(server.now, persisted);
    server.replica.propose(vec![write(1)]).unwrap();
    server.replica.flush(server.now);
    assert_eq!(server.replica.queued(), 1);
    assert_eq!(server.outputs(), ["apply [2@1.0]", "persist [3@1.0]"]);
}

/// A follower that needs entries which are not in memory any more catches up from someone; but it may hold
/// them without knowing that they are chosen, and then nobody else can tell it.
#[test]
fn a_follower_far_behind_is_asked_whether_it_is() {
    let tuning = Tuning {
        tail_bytes: 0,
        ..tuning()
    };
    let recovered = Recovered {
        promised: ballot(1.0),
        tail: log([1.0]),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &[0, 1, 2], tuning, recovered);
    server.pass(500);
    server.elect(id(1, 1.0));
    server.all_persisted();
    server.gets(1, accepted(2.0, 2));
    assert_eq!(server.slots(), (2, 2, 2));
    let question = ["2 <- accept 2.0 behind 2@2.0 [] chosen 2"];
    assert_eq!(server.gets(2, granted(2.0, server.now, 0)), question);
    let no = Message::AcceptRejected {
        ballot: ballot(2.0),
        resume_after: Slot(0),
    };
    assert_eq!(server.gets(2, no), NOTHING, "not before it has caught up");
    server.gets(2, granted(2.0, server.now, 2));
    server.propose(vec![write(1)]);
    assert_eq!(server.slots(), (2, 2, 3));

    let mut follower = Server::awake(2.1, log([1.0, 2.1]));
    let question = accept(2.1, id(2, 2.1), [], 2);
    let learned = ["1 <- accepted 2.1 to 2", "apply [1@1.0 2@2.1]"];
    assert_eq!(follower.gets(1, question), learned);
}

/// Handing over: the leader steps down, then the successor prepares, and the lease that the others have
/// granted does not stand in its way.
#[test]
fn handing_over() {
    let mut server = Server::leader(log([]));
    server.gets(1, accepted(2.0, 1));
    server.gets(1, granted(2.0, server.now, 1));
    assert!(!server.replica.hand_over(server.now));
    assert_eq!(server.outputs(), ["leads no more", "1 <- hand-over 2.0"]);
    assert!(!server.replica.may_read(server.now));

    let mut successor = Server::awake(2.1, log([2.1]));
    successor.gets(1, heartbeat(2.1, 1));
    let old = Message::HandOver {
        ballot: ballot(1.1),
    };
    assert_eq!(successor.gets(1, old), NOTHING);
    let hand_over = Message::HandOver {
        ballot: ballot(2.1),
    };
    assert_eq!(
        successor.gets(1, hand_over.clone()),
        ["persist promise 3.0"]
    );
    assert_eq!(successor.gets(1, hand_over), NOTHING, "doubled");
    let prepare = [
        "1 <- prepare 3.0 released 2.1",
        "2 <- prepare 3.0 released 2.1",
    ];
    assert_eq!(successor.persisted(), prepare);
}

/// A successor that stops does not stop the leader.
#[test]
fn handing_over_is_given_up() {
    let mut server = Server::leader(log([]));
    server.gets(1, accepted(2.0, 1));
    assert!(
        server.replica.hand_over(server.now),
        "nobody has answered lately"
    );
    server.gets(1, granted(2.0, server.now, 1));
    server.propose(vec![write(1)]);
    assert!(server.replica.hand_over(server.now));
    assert!(server.replica.propose(vec![write(1)]).is_err());
    // Server 1 is silent; server 2 keeps the leader in office.
    for _ in 0..10 {
        server.wait(100);
        server.gets(2, granted(2.0, server.now, 0));
    }
    assert!(server.replica.propose(vec![write(1)]).is_ok());
}

/// A leader whose disk is full leaves to a server with space, if there is one.
#[test]
fn a_leader_without_space_resigns() {
    let free = |free_bytes| Message::HeartbeatAck {
        ballot: ballot(2.0),
        sent: Instant(1_500_000_000),
        durable: Slot(1),
        received: Slot(1),
        progress: Progress {
            free_bytes,
            ..Progress::default()
        },
    };
    let mut server = Server::leader(log([]));
    server.gets(1, free(0));
    assert!(!server.replica.resign(server.now), "full as well");
    server.gets(2, free(1));
    assert!(server.replica.resign(server.now));
    let outputs = server.outputs();
    assert_eq!(
        outputs.last().map(String::as_str),
        Some("2 <- hand-over 2.0")
    );
    assert_eq!(server.replica.role(), RoleKind::Follower);
    assert_eq!(server.wait(1900), NOTHING, "the other may win first");
}

/// A new leader whose peers have not told their free space does not take their disks for full.
#[test]
fn unknown_space_is_not_full() {
    let server = Server::leader(log([]));
    assert!(server.replica.free_bytes_of_majority(server.now) > 0);
}

/// A write needs space on a majority of those that are there.
#[test]
fn space_of_a_server_that_is_away_does_not_count() {
    let mut server = Server::leader(log([]));
    let free = |free_bytes| {
        Message::Progress(Progress {
            free_bytes,
            ..Progress::default()
        })
    };
    let left = |server: &Server| server.replica.free_bytes_of_majority(server.now);
    server.gets(1, free(0));
    server.gets(2, free(7));
    assert_eq!(left(&server), 7);
    server.pass(4900);
    server.gets(1, free(0));
    assert_eq!(left(&server), 7, "it may come back");
    server.pass(200);
    server.gets(1, free(0));
    assert_eq!(left(&server), 0);
    server.gets(2, free(7));
    assert_eq!(left(&server), 7);
}

// ---- Catching up.

/// A learner asks one question at a time, and applies what is durable.
#[test]
fn a_learner_catches_up() {
    let mut server = Server::start_as(5, &[0, 1, 2, 5], tuning(), Recovered::default());
    let (first, second) = {
        let asked = server.wait(300);
        assert_eq!(asked.len(), 1);
        let to = |text: &str| text[..1].parse::<u8>().unwrap();
        assert_eq!(server.wait(200), NOTHING, "it may still answer");
        let next = server.wait(300);
        assert_eq!(next.len(), 1);
        (to(&asked[0]), to(&next[0]))
    };
    assert_ne!(first, second, "turns to another");
    let answer = chosen(EntryId::default(), [1.0, 1.0], 3);
    let outputs = server.gets(second, answer.clone());
    assert_eq!(
        outputs[..2],
        ["persist [1@1.0 2@1.0]", "persist promise 1.0"]
    );
    assert!(outputs[2].ends_with("catch-up after 2"));
    assert_eq!(server.gets(first, answer), NOTHING, "no second stream");
    assert_eq!(server.persisted(), ["apply [1@1.0 2@1.0]"]);
}

/// Who is asked for entries, over so many unanswered questions.
fn asked(server: &mut Server, from: &[(u8, u64)], leader: Option<u8>) -> Vec<u8> {
    let mut asked = Vec::new();
    while asked.len() < 12 {
        for (from, chosen) in from {
            let progress = Progress {
                chosen: Slot(*chosen),
                ..Progress::default()
            };
            server.gets(*from, Message::Progress(progress));
        }
        if let Some(leader) = leader {
            let of = 2.0 + f64::from(leader) / 10.0;
            server.gets(leader, heartbeat(of, 9));
        }
        let outputs = server.wait(150);
        let questions = outputs.iter().filter(|it| it.contains("catch-up after"));
        asked.extend(questions.map(|it| it[..1].parse::<u8>().unwrap()));
    }
    asked.truncate(12);
    asked
}

/// The leader has enough to do: it is asked only if others do not answer.
#[test]
fn learners_are_fed_by_followers() {
    let listed = [0, 1, 2, 5, 6];
    let start = || Server::start_as(5, &listed, tuning(), Recovered::default());
    let times = |asked: &[u8], who: u8| asked.iter().filter(|it| **it == who).count();
    let who = asked(&mut start(), &[(0, 9), (1, 9), (2, 9)], Some(1));
    assert_eq!((times(&who, 1), times(&who, 6)), (3, 0), "{who:?}");
    assert!(!who[..3].contains(&1), "{who:?}");
    // A learner that is ahead takes part in feeding, one that knows the same does not.
    let who = asked(&mut start(), &[(0, 9), (1, 9), (2, 9), (6, 9)], Some(1));
    assert!(times(&who, 6) > 0, "{who:?}");
    let who = asked(&mut start(), &[(0, 9), (1, 9), (2, 9), (6, 0)], Some(1));
    assert_eq!(times(&who, 6), 0, "{who:?}");
}

/// Core servers that lag get entries from learners too, and so do learners if nobody else is there.
#[test]
fn learners_feed() {
    let mut server = Server::awake(1.0, log([]));
    let who = asked(&mut server, &[(2, 9), (5, 9)], Some(1));
    assert!(who.contains(&5) && who.contains(&2), "{who:?}");
    let mut learner = Server::start_as(6, &[0, 1, 2, 5, 6], tuning(), Recovered::default());
    let who = asked(&mut learner, &[(5, 9)], None);
    assert_eq!(who.iter().filter(|it| **it == 5).count(), 9, "{who:?}");
    // A learner gives what it has.
    let mut learner = Server::start_as(5, &[0, 1, 2, 5], tuning(), Recovered::default());
    learner.wait(300);
    learner.gets(1, chosen(EntryId::default(), [1.0, 1.0], 2));
    learner.gets(2, chosen(EntryId::default(), [1.0, 1.0], 2));
    learner.all_persisted();
    let outputs = learner.gets(2, Message::CatchUp { after: Slot(0) });
    assert!(
        outputs.contains(&"2 <- chosen behind 0@0.0 [1@1.0 2@1.0]".to_owned()),
        "{outputs:?}"
    );
}

/// Fed are entries that are chosen and durable; who asks too early waits for them.
#[test]
fn a_feeder_answers_when_it_has_something_new() {
    let mut server = Server::awake(2.1, log([1.0]));
    let ask = |after| Message::CatchUp { after: Slot(after) };
    assert_eq!(server.gets(5, ask(0)), NOTHING);
    server.gets(1, accept(2.1, EntryId::default(), [1.0, 2.1, 2.1], 2));
    let outputs = server.persisted();
    let fed = outputs.iter().filter(|it| it.starts_with("5 <-")).count();
    assert_eq!((fed, server.slots()), (0, (2, 3, 3)), "{outputs:?}");
    let answer = ["5 <- chosen behind 0@0.0 [1@1.0 2@2.1]"];
    assert_eq!(server.gets(5, ask(0)), answer);
}

/// Entries that the others have trimmed and that we hold are chosen if the logs are equal where theirs
/// begin; if not, chunks are copied.
#[test]
fn a_log_that_nobody_can_confirm_from_its_start() {
    let behind_others = || {
        let mut server = Server::awake(3.1, log([1.0, 1.0, 1.0]));
        server.gets(1, heartbeat(3.1, 9));
        assert_eq!(
            server.gets(2, gone(3, 9)),
            NOTHING,
            "our log reaches to theirs"
        );
        let asked = server.wait(300);
        let asked = asked.iter().find(|it| it.contains("catch-up after 0"));
        let to: u8 = asked.unwrap()[..1].parse().unwrap();
        let again = format!("{to} <- catch-up after 2");
        assert_eq!(server.gets(to, gone(3, 9)), [again]);
        (server, to)
    };
    let (mut equal, to) = behind_others();
    let outputs = equal.gets(to, chosen(id(2, 1.0), [1.0], 9));
    assert!(
        outputs.contains(&"apply [1@1.0 2@1.0 3@1.0]".to_owned()),
        "{outputs:?}"
    );
    let (mut other, to) = behind_others();
    let outputs = other.gets(to, chosen(id(2, 2.2), [2.2], 9));
    assert_eq!(outputs, [format!("copy chunks of {to}")]);
    assert_eq!(other.slots(), (0, 3, 3));
    // Further behind than the log reaches.
    let outputs = other.gets(1, gone(5, 9));
    assert_eq!(outputs, ["copy chunks of 1"]);
}

/// Chunks are copied only if no log goes on where ours ends; and if who has such a log does not give it.
#[test]
fn every_log_is_asked_before_chunks_are_copied() {
    let mut server = Server::awake(3.1, log([1.0]));
    server.gets(1, heartbeat(3.1, 9));
    let keeps = Progress {
        chosen: Slot(9),
        applied: Slot(9),
        log_first: Slot(1),
        ..Progress::default()
    };
    let trimmed = Progress {
        log_first: Slot(5),
        ..keeps
    };
    server.gets(1, Message::Progress(keeps));
    let mut copies = Vec::new();
    for _ in 0..40 {
        server.gets(1, heartbeat(3.1, 9));
        server.gets(2, Message::Progress(trimmed));
        let asked = server.wait(150);
        let Some(asked) = asked.iter().find(|it| it.contains("catch-up after")) else {
            continue;
        };
        // Server 1 keeps everything and never answers.
        if asked.starts_with("2 <-") {
            copies.push(server.gets(2, gone(5, 9)));
        }
    }
    let (last, before) = copies.split_last().unwrap();
    assert!(before.len() >= 5, "{copies:?}");
    for asked in &before[..5] {
        assert_eq!(*asked, ["1 <- catch-up after 0"]);
    }
    assert_eq!(*last, ["copy chunks of 2"]);
}

/// A log that may not grow takes no entries, as if they were lost; the leader is followed all the same.
#[test]
fn a_full_log_takes_no_entries() {
    let mut server = Server::awake(2.1, log([1.0]));
    let entries = accept(2.1, id(1, 1.0), [2.1], 0);
    server.replica.note_log_full(true);
    assert_eq!(server.gets(1, entries.clone()), NOTHING);
    let outputs = server.gets(1, heartbeat(2.1, 0));
    assert_eq!(outputs, ["1 <- lease 2.1 durable 0 received 0"]);
    server.replica.note_log_full(false);
    assert_eq!(server.gets(1, entries), ["persist [2@2.1]"]);
}

/// What a majority beside this server has applied, with complete chunks.
#[test]
fn applied_by_a_majority_of_others() {
    let mut server = Server::awake(1.0, log([]));
    let mut applied = |from, applied, installing| {
        let progress = Progress {
            applied: Slot(applied),
            installing,
            ..Progress::default()
        };
        server.gets(from, Message::Progress(progress));
        server.replica.applied_by_others().0
    };
    assert_eq!(applied(1, 7, false), 0);
    assert_eq!(applied(5, 7, false), 0, "a learner does not count");
    assert_eq!(applied(2, 5, true), 0, "its chunks are not complete");
    assert_eq!(applied(2, 6, false), 6);
}

/// While the log waits to be reset, what is on disk is the old one: nobody is fed from it.
#[test]
fn nobody_is_fed_from_a_log_that_is_to_be_reset() {
    let mut server = Server::awake(1.0, log([1.0, 1.0]));
    let admitted = Admitted::default();
    server
        .replica
        .handle_base(server.now, id(9, 2.1), admitted, None);
    let outputs = server.outputs();
    assert_eq!(outputs, ["persist promise 2.1", "persist reset 9@2.1"]);
    let ask = Message::CatchUp { after: Slot(1) };
    assert_eq!(server.gets(5, ask.clone()), ["5 <- gone before 10"]);
    server.all_persisted();
    assert_eq!(server.gets(5, ask), ["read log 1 to 9 for 5"]);
}

/// A reset while entries are on their way to the disk: their sync says nothing about the new log.
#[test]
fn a_reset_while_entries_are_written() {
    let mut server = Server::awake(2.1, log([]));
    server.gets(1, accept(2.1, EntryId::default(), [2.1, 2.1], 0));
    let admitted = Admitted::default();
    server
        .replica
        .handle_base(server.now, id(9, 2.1), admitted, None);
    server.outputs();
    server.gets(1, accept(2.1, id(9, 2.1), [2.1], 0));
    assert_eq!(server.persisted(), NOTHING, "the old entries");
    assert_eq!(server.persisted(), NOTHING, "the reset");
    assert_eq!(server.slots(), (9, 9, 10));
    assert_eq!(server.persisted(), ["1 <- accepted 2.1 to 10"]);
}

/// Entries of an older ballot may reach further than what was chosen instead of them, once the others' logs begin
/// after the place where both part. Then only a base helps; and the leader of that old ballot is followed no more.
#[test]
fn a_base_replaces_entries_that_were_never_chosen() {
    let mut server = Server::awake(1.1, log([]));
    server.gets(1, accept(1.1, EntryId::default(), [1.1, 1.1, 1.1], 1));
    server.all_persisted();
    assert_eq!(server.slots(), (1, 3, 3));
    let chosen = id(2, 2.2);
    assert!(!server.replica.needs_base(id(2, 1.1)), "the log holds it");
    assert!(server.replica.needs_base(chosen));
    let admitted = Admitted::default();
    server
        .replica
        .handle_base(server.now, chosen, admitted, None);
    assert_eq!(
        server.outputs(),
        ["persist promise 2.2", "persist reset 2@2.2"]
    );
    server.all_persisted();
    assert_eq!(server.slots(), (2, 2, 2));
    assert_eq!(server.replica.last(), chosen);
    let rejected = server.gets(1, accept(1.1, id(3, 1.1), [1.1], 1));
    assert_eq!(rejected, ["1 <- nack 1.1 promised 2.2"]);
    server.gets(2, accept(2.2, chosen, [2.2], 2));
    assert_eq!(server.persisted(), ["2 <- accepted 2.2 to 3"]);
}

// ---- Lives of servers.

fn admit(server: u8, life: u64) -> Command {
    Command::internal(Op::AdmitServer {
        server: ServerId(server),
        incarnation: Incarnation(life),
    })
}

/// One entry of ballot `of` with these commands, and nothing before it.
fn first_entry(of: f64, commands: Vec<Command>) -> Entry {
    Entry {
        id: id(1, of),
        prev: Ballot::default(),
        commands: commands.into(),
    }
}

/// Life 7 of server 0, which replaces another.
fn rejoining() -> Server {
    let recovered = Recovered {
        log_first: Slot(1),
        rejoining: true,
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(7), 0, &[0, 1, 2, 5], tuning(), recovered);
    server.pass(1000);
    server
}

/// Chosen entries, as a server gets them that asks for what it lacks.
fn learned(entries: Vec<Entry>) -> Message {
    Message::Chosen {
        prev: EntryId::default(),
        chosen: entries.last().map_or(Slot(0), |entry| entry.id.slot),
        entries,
    }
}

/// design.md 3: a wiped disk holds data but acknowledges nothing, gives no promise and grants no lease.
#[test]
fn a_rejoining_server_does_not_count() {
    let mut server = rejoining();
    assert_eq!(server.gets(1, pre_check(2.1)), ["1 <- pre-check 2.1 no"]);
    assert_eq!(server.gets(1, prepare(2.1)), ["1 <- absent 2.1"]);
    assert_eq!(server.gets(1, heartbeat(2.1, 0)), ["persist promise 2.1"]);
    let entries = accept(2.1, EntryId::default(), [2.1], 0);
    assert_eq!(server.gets(1, entries), ["persist [1@2.1]"]);
    assert_eq!(server.all_persisted(), NOTHING);
    assert_eq!(server.gets(1, heartbeat(2.1, 1)), ["apply [1@2.1]"]);
    assert_eq!(server.replica.role(), RoleKind::Learner);
    // It asks to be let in, and never stands for election.
    let asked = server.wait(2000);
    assert!(asked.contains(&"1 <- rejoin".to_owned()), "{asked:?}");
    assert!(
        !asked.iter().any(|it| it.contains("pre-check")),
        "{asked:?}"
    );
}

/// It counts again when its admission is chosen and durable here, which it makes durable first.
#[test]
fn a_rejoining_server_counts_when_it_has_learned_its_admission() {
    let mut server = rejoining();
    server.gets(1, heartbeat(2.1, 0));
    server.all_persisted();
    // An earlier life's admission does not help.
    let earlier = first_entry(2.1, vec![admit(0, 6)]);
    let own = Entry {
        id: id(2, 2.1),
        prev: ballot(2.1),
        commands: vec![admit(0, 7)].into(),
    };
    server.gets(1, learned(vec![earlier]));
    assert_eq!(server.all_persisted(), ["apply [1@2.1]"]);
    assert!(server.replica.is_rejoining());
    let more = Message::Chosen {
        prev: id(1, 2.1),
        entries: vec![own],
        chosen: Slot(2),
    };
    let persists = server.gets(1, more);
    assert!(
        persists.contains(&"persist [2@2.1]".to_owned()),
        "{persists:?}"
    );
    assert_eq!(server.persisted(), ["apply [2@2.1]", "persist rejoined"]);
    assert_eq!(server.gets(1, heartbeat(2.1, 2)), NOTHING);
    assert_eq!(server.persisted(), ["1 <- accepted 2.1 to 2"]);
    assert!(!server.replica.is_rejoining());
    // And does not ask any more.
    assert!(!server.wait(600).contains(&"1 <- rejoin".to_owned()));
}

/// Its data count as much as its log: while chunks are being copied it has not learned everything.
#[test]
fn a_rejoining_server_waits_for_its_chunks() {
    let mut server = rejoining();
    let mut admitted = Admitted::default();
    admitted.admit(ServerId(0), Incarnation(7));
    server
        .replica
        .handle_base(server.now, id(9, 2.1), admitted, None);
    server.outputs();
    assert_eq!(server.all_persisted(), NOTHING);
    server.replica.handle_installed();
    server.wait(100);
    assert!(server.replica.is_rejoining());
    server.replica.note_complete(true);
    server.replica.flush(server.now);
    assert_eq!(server.outputs(), ["persist rejoined"]);
    server.all_persisted();
    assert!(!server.replica.is_rejoining());
}

/// A directory that was formatted anew without a word finds out when it learns that another life counts.
#[test]
fn another_life_that_counts_makes_a_server_rejoin() {
    let recovered = Recovered::default();
    let mut server = Server::start_life(Incarnation(7), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(1000);
    server.gets(1, heartbeat(2.1, 0));
    server.all_persisted();
    server.gets(1, learned(vec![first_entry(2.1, vec![admit(0, 3)])]));
    let counted = "1 <- accepted 2.1 to 1";
    let rejoins = "persist rejoining as 8";
    assert_eq!(server.persisted(), [counted, "apply [1@2.1]", rejoins]);
    assert_eq!(server.gets(1, prepare(3.1)), ["1 <- absent 3.1"]);
    assert!(server.replica.is_rejoining());
}

/// A leader in whose log the lives 1 of servers 1 and 2 count, the barrier being acknowledged by both.
fn leader_of_lives() -> Server {
    let founders = first_entry(1.0, vec![admit(1, 1), admit(2, 1)]);
    let last = founders.id;
    let mut server = Server::awake(1.0, vec![founders]);
    server.wait(0);
    server.gets_of(1, 1, pre_check_answer(2.0, last));
    server.all_persisted();
    server.gets_of(1, 1, promise(2.0, last));
    server.all_persisted();
    server.gets_of(1, 1, accepted(2.0, 2));
    server.gets_of(2, 1, accepted(2.0, 2));
    server
}

/// The leader proposes the admission; what an earlier life acknowledged, or acknowledges late, counts no more.
#[test]
fn a_leader_counts_only_the_life_that_it_admitted() {
    let mut server = leader_of_lives();
    server.propose(vec![write(10)]);
    server.all_persisted();
    assert_eq!(server.slots().0, 2);
    let proposes = server.gets_of(2, 5, Message::Rejoin);
    assert!(
        proposes.contains(&"persist [4@2.0]".to_owned()),
        "{proposes:?}"
    );
    // Once is enough.
    assert_eq!(server.gets_of(2, 5, Message::Rejoin), NOTHING);
    server.all_persisted();
    // Life 1 has acknowledged the write before its disk was wiped.
    assert_eq!(server.gets_of(2, 1, accepted(2.0, 3)), NOTHING);
    assert_eq!(server.gets_of(2, 5, accepted(2.0, 2)), NOTHING);
    assert_eq!(
        server.gets_of(1, 1, accepted(2.0, 4)),
        ["apply [3@2.0 4@2.0]"]
    );
    // A life before the one that counts is not let in.
    assert_eq!(server.gets_of(2, 4, Message::Rejoin), NOTHING);
}

/// Nor does a lease that it granted.
#[test]
fn a_leader_takes_no_lease_of_an_earlier_life() {
    let mut server = leader_of_lives();
    server.gets_of(2, 5, Message::Rejoin);
    let sent = server.now;
    server.gets_of(2, 1, granted(2.0, sent, 2));
    assert!(!server.replica.holds_lease(server.now));
    server.gets_of(1, 1, granted(2.0, sent, 2));
    assert!(server.replica.holds_lease(server.now));
}

/// Whoever leads first says which lives count: its own and those that it hears of.
#[test]
fn a_leader_admits_the_founders() {
    let recovered = Recovered {
        promised: ballot(1.0),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(7), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(500);
    server.elect(EntryId::default());
    server.all_persisted();
    server.gets_of(1, 3, accepted(2.0, 1));
    server.gets_of(1, 3, granted(2.0, server.now, 1));
    server.wait(200);
    let admitted = server.replica.admitted();
    let lives = [0, 1, 2].map(|server| admitted.of(ServerId(server)).0);
    assert_eq!(lives, [7, 3, 0]);
}

/// A promise of an earlier life is dropped if any of the others' logs says that another one counts.
#[test]
fn a_candidate_drops_the_promise_of_an_earlier_life() {
    let members = [0, 1, 2, 3, 4];
    let recovered = Recovered {
        promised: ballot(1.0),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &members, tuning(), recovered);
    server.pass(500);
    server.wait(0);
    for other in [1, 2] {
        server.gets(other, pre_check_answer(2.0, EntryId::default()));
    }
    server.all_persisted();
    // Life 1 of server 1 promised before its disk was wiped; server 2 knows of life 2.
    let mut known = Admitted::default();
    known.admit(ServerId(1), Incarnation(2));
    server.gets_of(1, 1, promise(2.0, EntryId::default()));
    let mut second = promise(2.0, EntryId::default());
    if let Message::Promise { admitted, .. } = &mut second {
        *admitted = known;
    }
    assert_eq!(server.gets_of(2, 1, second), NOTHING);
    assert_eq!(server.replica.role(), RoleKind::Candidate);
    // The promise of the life that counts does.
    server.gets_of(1, 2, promise(2.0, EntryId::default()));
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
}

/// What a leader has admitted and could not get chosen is taken back with its entry.
#[test]
fn an_admission_goes_with_its_entry() {
    let mut server = Server::awake(1.0, log([]));
    let entry = first_entry(2.1, vec![admit(2, 5)]);
    let message = Message::Accept {
        ballot: ballot(2.1),
        prev: EntryId::default(),
        entries: vec![entry],
        chosen: Slot(0),
    };
    server.gets(1, message);
    assert_eq!(server.replica.admitted().of(ServerId(2)), Incarnation(5));
    server.gets(2, accept(3.2, EntryId::default(), [3.2], 0));
    assert_eq!(server.replica.admitted().of(ServerId(2)), Incarnation(0));
}

/// An old disk that comes back and answers that it holds nothing says nothing about the life that counts.
#[test]
fn an_earlier_life_is_not_absent_for_the_one_that_counts() {
    let founders = first_entry(1.0, vec![admit(1, 1), admit(2, 5)]);
    let last = founders.id;
    for (life, wins) in [(1, false), (5, true), (9, true)] {
        let mut server = Server::awake(1.0, vec![founders.clone()]);
        server.wait(0);
        server.gets_of(1, 1, pre_check_answer(2.0, last));
        server.all_persisted();
        let lost = claim(2.0, id(2, 1.0), id(1, 1.0), id(1, 1.0));
        server.gets_of(1, 1, lost);
        let ballot = ballot(2.0);
        server.gets_of(2, life, Message::Absent { ballot });
        let leads = server.replica.role() == RoleKind::Leader { serving: false };
        assert_eq!(leads, wins, "life {life}");
    }
}

/// Its refusals and encouragements do not matter either.
#[test]
fn an_earlier_life_unseats_nobody() {
    let mut server = leader_of_lives();
    let nack = |life| {
        let (ballot, promised) = (ballot(2.0), ballot(7.1));
        (life, Message::Nack { ballot, promised })
    };
    let (life, message) = nack(9);
    server.gets_of(1, life, message);
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: true });
    let (life, message) = nack(1);
    server.gets_of(1, life, message);
    assert_eq!(server.replica.role(), RoleKind::Follower);
}

/// A late promise of an earlier life does not take the place of the one that counts.
#[test]
fn a_late_promise_of_an_earlier_life_is_dropped() {
    let members = [0, 1, 2, 3, 4];
    let recovered = Recovered {
        promised: ballot(1.0),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_as(0, &members, tuning(), recovered);
    server.pass(500);
    server.wait(0);
    for other in [1, 2] {
        server.gets(other, pre_check_answer(2.0, EntryId::default()));
    }
    server.all_persisted();
    server.gets_of(1, 4, promise(2.0, EntryId::default()));
    server.gets_of(1, 3, promise(2.0, EntryId::default()));
    let mut second = promise(2.0, EntryId::default());
    if let Message::Promise { admitted, .. } = &mut second {
        admitted.admit(ServerId(1), Incarnation(4));
    }
    server.gets_of(2, 1, second);
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
}

/// Nobody has said yet which life counts; then the later one, and what an earlier one acknowledged is forgotten.
#[test]
fn a_later_life_is_another_server_before_any_is_admitted() {
    let mut server = Server::leader(log([1.0]));
    server.gets_of(1, 0, accepted(2.0, 2));
    server.propose(vec![write(10)]);
    server.all_persisted();
    server.gets_of(2, 3, granted(2.0, Instant(0), 2));
    // Of life 3, before its disk was wiped; and late.
    server.gets_of(2, 4, granted(2.0, Instant(0), 0));
    server.gets_of(2, 3, accepted(2.0, 3));
    assert_eq!(server.slots().0, 2);
    server.gets_of(2, 4, accepted(2.0, 3));
    assert_eq!(server.slots().0, 3);
}

/// The barrier says which lives have elected the leader.
#[test]
fn the_barrier_admits_the_lives_that_promised() {
    let recovered = Recovered {
        promised: ballot(1.0),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(7), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(500);
    server.wait(0);
    server.gets_of(1, 3, pre_check_answer(2.0, EntryId::default()));
    server.all_persisted();
    server.gets_of(1, 3, promise(2.0, EntryId::default()));
    assert_eq!(server.replica.last().slot, Slot(1));
    let admitted = server.replica.admitted();
    let lives = [0, 1, 2].map(|server| admitted.of(ServerId(server)).0);
    assert_eq!(lives, [7, 3, 0]);
}

/// Whoever finds out that another life counts begins a new one: what this one has promised should not have been.
/// An old disk whose place is taken does not.
#[test]
fn who_is_found_out_begins_another_life() {
    for (own, counts, then, asks) in [(7, 3, 8, true), (3, 7, 3, false)] {
        let recovered = Recovered::default();
        let life = Incarnation(own);
        let mut server = Server::start_life(life, 0, &[0, 1, 2], tuning(), recovered);
        server.pass(1000);
        server.gets(1, heartbeat(2.1, 0));
        server.all_persisted();
        server.gets(1, learned(vec![first_entry(2.1, vec![admit(0, counts)])]));
        server.persisted();
        // Not before it is durable: others would take nothing of the earlier life any more.
        assert_eq!(server.replica.incarnation(), life);
        assert!(!server.wait(600).contains(&"1 <- rejoin".to_owned()));
        server.all_persisted();
        assert_eq!(server.replica.incarnation(), Incarnation(then));
        assert_eq!(server.wait(600).contains(&"1 <- rejoin".to_owned()), asks);
        assert!(server.replica.is_rejoining());
    }
}
