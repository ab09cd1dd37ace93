//! Changes of the servers.

use super::*;
use crate::members::{Member, Members};
use crate::paxos::members::ChangeRefused;

/// The servers, of which those below 5 vote unless they are listed to learn.
pub(super) fn list(version: u64, core: &[u8], learners: &[u8]) -> Members {
    let member = |id: u8, core| Member {
        id: ServerId(id),
        core,
        host: format!("10.0.0.{id}"),
        path: "/srv".into(),
    };
    let mut list: Vec<Member> = core.iter().map(|id| member(*id, true)).collect();
    list.extend(learners.iter().map(|id| member(*id, false)));
    list.sort_by_key(|it| it.id);
    Members {
        epoch: 0,
        version,
        list,
    }
}

fn change(members: Members) -> Command {
    Command::internal(Op::SetMembers {
        members: members.into(),
    })
}

impl Server {
    fn change(&mut self, members: Members) -> Result<(), ChangeRefused> {
        self.replica.change_members(self.now, members)
    }

    fn core(&self) -> Vec<u8> {
        let core = &self.replica.membership().core;
        core.iter().map(|it| it.0).collect()
    }

    /// Server 5 is there and has everything.
    fn learner_answers(&mut self) {
        let progress = Progress {
            chosen: Slot(2),
            applied: Slot(2),
            log_first: Slot(1),
            free_bytes: 1 << 30,
            installing: false,
        };
        self.gets(5, Message::Progress(progress));
    }
}

/// Leads 2.0 with its barrier in slot 1 chosen.
fn serving() -> Server {
    let mut server = Server::leader(log([]));
    server.gets(1, accepted(2.0, 1));
    server
}

#[test]
fn a_change_holds_from_when_it_is_in_the_log() {
    let mut server = serving();
    server.learner_answers();
    server.change(list(1, &[0, 1, 2, 5], &[])).unwrap();
    assert_eq!(server.core(), [0, 1, 2, 5]);
    let proposed = server.outputs();
    // The new one is sent entries once it has said where it stands.
    assert!(
        proposed.contains(&"persist [2@2.0]".to_owned()),
        "{proposed:?}"
    );
    server.all_persisted();
    // Three of four now.
    assert_eq!(server.gets(1, accepted(2.0, 2)), NOTHING);
    assert_eq!(server.gets(5, accepted(2.0, 2)), ["apply [2@2.0]"]);
}

#[test]
fn changes_that_are_refused() {
    let mut server = serving();
    let refused = [
        (
            list(1, &[0, 1, 2, 5], &[]),
            ChangeRefused::Behind(ServerId(5)),
        ),
        (list(1, &[1, 2], &[]), ChangeRefused::Leader),
        (list(1, &[0], &[]), ChangeRefused::TooMuch),
        (list(1, &[0, 1, 5], &[]), ChangeRefused::TooMuch),
        (list(2, &[0, 1, 2], &[]), ChangeRefused::Outdated),
    ];
    for (members, error) in refused {
        assert_eq!(server.change(members), Err(error));
    }
    server.change(list(1, &[0, 1, 2], &[5, 6])).unwrap();
    assert_eq!(
        server.change(list(2, &[0, 1, 2], &[5])),
        Err(ChangeRefused::UnderWay)
    );
    server.outputs();
    server.all_persisted();
    server.gets(1, accepted(2.0, 2));
    server.change(list(2, &[0, 1, 2], &[5])).unwrap();
    let mut follower = Server::awake(1.0, log([]));
    assert_eq!(
        follower.change(list(1, &[0, 1, 2], &[5, 6])),
        Err(ChangeRefused::NotLeader)
    );
}

/// An entry that is taken back takes its list with it.
#[test]
fn a_list_goes_with_its_entry() {
    let mut server = Server::awake(1.0, log([]));
    let entry = first_entry(2.1, vec![change(list(1, &[0, 1], &[2]))]);
    let accept_list = Message::Accept {
        ballot: ballot(2.1),
        prev: EntryId::default(),
        entries: vec![entry],
        chosen: Slot(0),
    };
    server.gets(1, accept_list);
    server.all_persisted();
    assert_eq!(server.core(), [0, 1]);
    // The server that the list drops may win still.
    server.pass(2000);
    assert_eq!(server.gets(2, pre_check(9.2)), ["2 <- pre-check 9.2 yes"]);
    server.gets(2, accept(9.2, EntryId::default(), [9.2], 0));
    assert_eq!(server.core(), [0, 1, 2]);
}

/// Once the list is chosen, whoever was removed gets no vote.
#[test]
fn who_was_removed_gets_no_vote() {
    let mut server = Server::awake(1.0, log([]));
    let entry = first_entry(2.1, vec![change(list(1, &[0, 1], &[2]))]);
    server.gets(1, learned(vec![entry]));
    server.all_persisted();
    server.pass(2000);
    assert_eq!(server.gets(2, pre_check(9.2)), ["2 <- pre-check 9.2 no"]);
    assert_eq!(server.gets(1, pre_check(9.1)), ["1 <- pre-check 9.1 yes"]);
}

/// Who knows a list in which this server votes, and the other one too, has it in its log, which is newer then: the vote counts by that list.
#[test]
fn a_vote_counts_by_the_list_of_the_candidate() {
    let mut server = Server::awake(1.0, log([]));
    let entry = first_entry(2.1, vec![change(list(1, &[1, 3], &[0, 2]))]);
    server.gets(1, learned(vec![entry]));
    server.all_persisted();
    server.pass(2000);
    let newer = Message::PreCheck {
        ballot: ballot(9.2),
        last: id(2, 2.1),
    };
    assert_eq!(server.gets(2, newer), ["2 <- pre-check 9.2 yes"]);
    assert_eq!(server.gets(2, prepare(9.2)), ["persist promise 9.2"]);
    let promised = server.persisted();
    assert!(promised[0].starts_with("2 <- promise 9.2"), "{promised:?}");
}

/// The promises of a candidate are a majority by the list that it began with; the log that it takes over has another one.
#[test]
fn a_candidate_begins_anew_if_the_log_lists_others() {
    let mut server = Server::awake(1.0, log([]));
    let entry = first_entry(1.1, vec![change(list(1, &[0, 1, 2, 5], &[]))]);
    let best = entry.id;
    server.wait(0);
    server.gets(1, pre_check_answer(2.0, EntryId::default()));
    server.all_persisted();
    assert_eq!(
        server.gets(1, promise(2.0, best)),
        ["1 <- fetch tail 2.0 after 0"]
    );
    let tail = Message::Tail {
        ballot: ballot(2.0),
        prev: EntryId::default(),
        entries: vec![entry],
        last: best,
    };
    server.gets(1, tail);
    assert_eq!(server.core(), [0, 1, 2, 5]);
    assert_eq!(server.replica.role(), RoleKind::Follower);
    // Two of four are no majority.
    server.all_persisted();
    server.wait(200);
    server.gets(1, pre_check_answer(3.0, best));
    server.gets(2, pre_check_answer(3.0, best));
    server.all_persisted();
    server.gets(1, promise(3.0, best));
    assert_eq!(server.replica.role(), RoleKind::Candidate);
    server.gets(5, promise(3.0, best));
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: false });
}

/// A server that starts goes by what its log says.
#[test]
fn a_start_goes_by_the_log() {
    let recovered = Recovered {
        promised: ballot(1.0),
        members: Some(list(3, &[0, 1], &[2]).into()),
        tail: vec![first_entry(1.0, vec![change(list(4, &[0], &[1, 2]))])],
        log_first: Slot(1),
        ..Recovered::default()
    };
    let server = Server::start(recovered);
    assert_eq!(server.core(), [0]);
}

/// A lease counts by the servers that vote now: what those granted that went need not meet who wins without them.
#[test]
fn a_lease_does_not_outlive_the_servers_that_granted_it() {
    let mut server = Server::start_as(0, &[0, 1, 2, 3, 4], tuning(), Recovered::default());
    server.pass(500);
    server.wait(0);
    for other in [1, 2] {
        server.gets(other, pre_check_answer(1.0, EntryId::default()));
    }
    server.all_persisted();
    for other in [1, 2] {
        server.gets(other, promise(1.0, EntryId::default()));
    }
    server.all_persisted();
    server.gets(1, accepted(1.0, 1));
    server.gets(2, accepted(1.0, 1));
    for other in [3, 4] {
        server.gets(other, granted(1.0, server.now, 1));
    }
    assert!(server.replica.holds_lease(server.now));
    server.change(list(1, &[0, 1, 2, 3], &[])).unwrap();
    server.outputs();
    server.all_persisted();
    assert!(!server.replica.holds_lease(server.now), "two of four");
    server.gets(1, granted(1.0, server.now, 1));
    assert!(server.replica.holds_lease(server.now));
    server.gets(1, accepted(1.0, 2));
    server.gets(2, accepted(1.0, 2));
    server.change(list(2, &[0, 1, 2], &[])).unwrap();
    server.outputs();
    assert!(server.replica.holds_lease(server.now), "0 and 1 of three");
}
