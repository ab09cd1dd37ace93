//! A majority that is given up.

use super::members::list;
use super::*;
use crate::members::Members;
use crate::paxos::recover::RecoverRefused;

/// The list that server 0 goes on with: others only learn.
fn alone() -> Members {
    Members {
        epoch: 1,
        ..list(1, &[0], &[1, 2])
    }
}

#[test]
fn a_survivor_goes_on_with_what_it_has() {
    let mut server = Server::awake(3.1, log([1.1, 3.1]));
    assert_eq!(server.slots(), (0, 2, 2));
    server.pass(3000);
    server.replica.recover(server.now, alone()).unwrap();
    let done = server.outputs();
    assert_eq!(done[..2], ["persist promise 4.0", "persist [3@4.0]"]);
    server.all_persisted();
    server.wait(500);
    server.all_persisted();
    assert_eq!(server.replica.role(), RoleKind::Leader { serving: true });
    assert_eq!(
        server.slots().0,
        4,
        "its barrier is chosen, and all before it"
    );
    assert_eq!(server.replica.epoch(), 1);
}

#[test]
fn nothing_is_given_up_without_need() {
    let mut server = Server::awake(3.1, log([1.1, 3.1]));
    server.gets(1, Message::Progress(Progress::default()));
    let refused = server.replica.recover(server.now, alone());
    let alive = vec![ServerId(0), ServerId(1)];
    assert_eq!(refused, Err(RecoverRefused::MajorityAlive(alive)));
    server.pass(3000);
    for bad in [
        list(1, &[0], &[1, 2]),
        Members {
            epoch: 2,
            ..alone()
        },
        Members {
            version: 2,
            ..alone()
        },
        Members {
            epoch: 1,
            ..list(1, &[1], &[0, 2])
        },
        Members {
            epoch: 1,
            ..list(1, &[0, 1], &[2])
        },
    ] {
        let refused = server.replica.recover(server.now, bad);
        assert_eq!(refused, Err(RecoverRefused::NotAlone));
    }
    let mut wiped = rejoining();
    wiped.pass(3000);
    let refused = wiped.replica.recover(wiped.now, alone());
    assert_eq!(refused, Err(RecoverRefused::Incomplete));
}

/// What was given up counts no more, and says so over a restart.
#[test]
fn whoever_was_given_up_does_not_vote() {
    let recovered = Recovered {
        promised: ballot(3.1),
        tail: log([3.1]),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(600);
    let told = Message::Standing {
        standing: Standing {
            life: Incarnation(1),
            ..Standing::default()
        },
        asks: false,
        epoch: 1,
    };
    let begins = server.gets_of(2, 1, told);
    assert_eq!(begins, ["persist rejoining as 5"]);
    server.all_persisted();
    assert_eq!(server.replica.given_up_by(), Some(1));
    assert_eq!(server.gets_of(1, 1, prepare(9.1)), ["1 <- absent 9.1"]);
}

/// Who asks and lives in an earlier loss epoch is told of the later one.
#[test]
fn old_epochs_are_told() {
    let recovered = Recovered {
        promised: ballot(3.0),
        members: Some(alone().into()),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.outputs();
    let told = |epoch| Message::Standing {
        standing: Standing {
            life: Incarnation(1),
            ..Standing::default()
        },
        asks: false,
        epoch,
    };
    let answer = server.gets_of(1, 1, told(0));
    assert_eq!(answer, ["1 <- seen life 1 promised 0.0 to 0@0.0 epoch 1"]);
    assert_eq!(server.gets_of(1, 1, told(1)), NOTHING);
}

/// Who leads the cell as it was before is not followed.
#[test]
fn nobody_follows_an_old_epoch() {
    let recovered = Recovered {
        promised: ballot(3.0),
        members: Some(alone().into()),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(600);
    let told = |epoch| Message::Standing {
        standing: Standing {
            life: Incarnation(1),
            ..Standing::default()
        },
        asks: false,
        epoch,
    };
    server.gets_of(1, 1, told(0));
    assert_eq!(server.gets_of(1, 1, heartbeat(9.1, 0)), NOTHING);
    assert_eq!(server.replica.promised(), ballot(3.0));
    server.gets_of(1, 1, told(1));
    server.gets_of(1, 1, heartbeat(9.1, 0));
    assert_eq!(server.replica.promised(), ballot(9.1));
}

/// Whoever is there and does not count, because its disk has forgotten what it was, makes no majority.
#[test]
fn who_does_not_count_is_not_alive() {
    let founders = first_entry(1.0, vec![admit(0, 4), admit(1, 1), admit(2, 1)]);
    let recovered = Recovered {
        promised: ballot(3.0),
        tail: vec![founders],
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.replica.note_complete(true);
    server.pass(3000);
    let (mark, alive, epoch) = (Standing::default(), false, 0);
    for (other, life, count) in [(1, 2, 1), (2, 2, 1), (2, 1, 2)] {
        server.gets_of(other, life, Message::Seen { mark, alive, epoch });
        assert_eq!(server.replica.core_alive(server.now).len(), count);
    }
}

/// The server that goes on may be a restored backup, of which others have seen more than it knows.
#[test]
fn what_was_seen_before_an_epoch_binds_nobody() {
    let recovered = Recovered {
        promised: ballot(3.1),
        tail: log([1.1, 3.1]),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.meet();
    server.pass(600);
    let standing = |life, promised, slot| Standing {
        life: Incarnation(life),
        promised: ballot(promised),
        acknowledged: id(slot, promised),
    };
    let told = Message::Standing {
        standing: standing(1, 3.1, 2),
        asks: false,
        epoch: 0,
    };
    server.gets_of(1, 1, told);
    assert!(server.replica.marks().contains_key(&ServerId(1)));
    server.pass(3000);
    server.replica.recover(server.now, alone()).unwrap();
    assert!(server.replica.marks().is_empty());
    server.outputs();
    server.all_persisted();
    server.wait(500);
    server.all_persisted();
    let seen = |epoch| Message::Seen {
        mark: standing(server.replica.incarnation().0, 9.1, 900),
        alive: false,
        epoch,
    };
    let (past, present) = (seen(0), seen(1));
    assert_eq!(server.gets_of(1, 1, past), NOTHING);
    assert!(!server.replica.was_set_back());
    server.gets_of(1, 1, present);
    assert!(server.replica.was_set_back());
}
