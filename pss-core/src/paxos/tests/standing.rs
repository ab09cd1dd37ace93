//! What servers know of each other's standing, and what a restored directory makes of it.

use super::*;

fn standing(life: u64, promised: f64, acknowledged: EntryId) -> Standing {
    Standing {
        life: Incarnation(life),
        promised: ballot(promised),
        acknowledged,
    }
}

fn seen(mark: Standing) -> Message {
    Message::Seen {
        mark,
        alive: false,
        epoch: 0,
    }
}

fn seen_alive(mark: Standing) -> Message {
    Message::Seen {
        mark,
        alive: true,
        epoch: 0,
    }
}

/// Life 4 of server 0, which holds `tail` and has promised 3.1.
fn life_four(tail: Vec<Entry>) -> Server {
    let recovered = Recovered {
        promised: ballot(3.1),
        tail,
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2, 5], tuning(), recovered);
    let told = server.wait(0);
    let asks = "asks, stands life 4 promised 3.1 to 0@0.0";
    for other in [1, 2, 5] {
        assert!(told.contains(&format!("{other} <- {asks}")), "{told:?}");
    }
    server
}

/// Nothing binds it to a server that has not said what it saw, and nothing of that one counts.
#[test]
fn a_server_that_starts_asks_before_it_takes_part() {
    let mut server = life_four(log([3.1]));
    server.pass(600);
    let known = standing(4, 3.1, id(1, 3.1));
    // Who is there and has not answered is asked again.
    let asks = "1 <- asks, stands life 4 promised 3.1 to 0@0.0".to_owned();
    assert!(server.gets_of(1, 1, prepare(4.1)).contains(&asks));
    for message in [
        prepare(4.1),
        pre_check(4.1),
        heartbeat(3.1, 0),
        accept(3.1, id(1, 3.1), [3.1], 0),
        Message::HandOver {
            ballot: ballot(3.1),
        },
    ] {
        assert_eq!(server.gets_of(1, 1, message), NOTHING);
    }
    assert_eq!(server.gets_of(1, 1, seen(known)), NOTHING);
    assert_eq!(server.gets_of(1, 1, prepare(4.1)), ["persist promise 4.1"]);
    assert!(!server.replica.is_rejoining());
    // The other one has still not said anything.
    assert_eq!(server.gets_of(2, 1, pre_check(5.2)), NOTHING);
    server.wait(100);
    assert_eq!(server.gets_of(2, 1, pre_check(5.2)), NOTHING);
    // An older program never does.
    server.wait(2000);
    assert_eq!(
        server.gets_of(2, 1, pre_check(5.2)),
        ["2 <- pre-check 5.2 yes"]
    );
}

/// A promise, or an entry under the same promise, that others saw and the disk does not know.
#[test]
fn who_has_forgotten_begins_another_life() {
    for mark in [
        standing(4, 3.2, EntryId::default()),
        standing(4, 9.1, id(7, 2.1)),
        standing(4, 3.1, id(2, 3.1)),
        standing(4, 3.1, id(1, 3.1)),
    ] {
        let mut server = life_four(log([2.1]));
        let begins = server.gets_of(2, 1, seen(mark));
        assert_eq!(begins, ["persist rejoining as 5"], "{mark:?}");
        assert!(server.replica.was_set_back());
        server.all_persisted();
        assert_eq!(server.replica.incarnation(), Incarnation(5));
        server.pass(600);
        assert_eq!(server.gets_of(1, 1, prepare(9.1)), ["1 <- absent 9.1"]);
    }
}

#[test]
fn who_has_forgotten_nothing_goes_on() {
    for mark in [
        Standing::default(),
        standing(3, 9.1, id(9, 9.1)),
        standing(4, 3.0, id(9, 3.0)),
        standing(4, 3.1, id(2, 3.1)),
    ] {
        let mut server = life_four(log([2.1, 3.1]));
        assert_eq!(server.gets_of(1, 1, seen(mark)), NOTHING, "{mark:?}");
        server.pass(600);
        server.gets_of(1, 1, prepare(4.1));
        assert_eq!(server.replica.promised(), ballot(4.1));
        // What it binds itself to afterwards is no loss, even if an answer comes twice.
        assert_eq!(server.gets_of(1, 1, seen(mark)), NOTHING, "{mark:?}");
    }
}

/// What damage has taken is claimed, not denied.
#[test]
fn a_claim_is_no_loss() {
    let recovered = Recovered {
        promised: ballot(3.1),
        tail: log([3.1]),
        evidence: Some(id(3, 3.1)),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 2], tuning(), recovered);
    server.outputs();
    assert_eq!(
        server.gets_of(1, 1, seen(standing(4, 3.1, id(3, 3.1)))),
        NOTHING
    );
    assert_eq!(
        server.gets_of(2, 1, seen(standing(4, 3.1, id(4, 3.1)))),
        ["persist rejoining as 5"]
    );
}

/// A directory of an earlier life waits until nobody hears of the later one any more.
#[test]
fn an_earlier_life_follows_the_later_one() {
    let mut server = life_four(log([3.1]));
    server.pass(600);
    let later = standing(6, 8.1, id(9, 8.1));
    assert_eq!(server.gets_of(1, 1, seen_alive(later)), NOTHING);
    // Nobody gets a vote of it meanwhile, whatever he has seen.
    server.gets_of(2, 1, seen(standing(4, 3.1, id(1, 3.1))));
    assert_eq!(server.gets_of(2, 1, prepare(9.2)), NOTHING);
    assert!(!server.replica.is_rejoining());
    assert_eq!(
        server.gets_of(1, 1, seen(later)),
        ["persist rejoining as 7"]
    );
    // As life 7 it votes again, once it counts.
    server.all_persisted();
    server.replica.note_complete(true);
    let admitted = first_entry(9.1, vec![admit(0, 7)]);
    let behind = Message::Chosen {
        prev: EntryId::default(),
        entries: vec![admitted],
        chosen: Slot(1),
    };
    server.gets_of(1, 1, behind);
    server.all_persisted();
    assert!(!server.replica.is_rejoining());
    server.pass(600);
    server.gets_of(1, 1, prepare(10.1));
    assert_eq!(server.replica.promised(), ballot(10.1));
}

/// Its log may be of the time when it only learned, or list others than those who vote now.
#[test]
fn whoever_learned_only_when_its_backup_was_made_asks_as_well() {
    let recovered = Recovered {
        promised: ballot(3.1),
        tail: log([3.1]),
        log_first: Slot(1),
        members: Some(super::members::list(1, &[1, 2], &[0]).into()),
        ..Recovered::default()
    };
    let mut server = Server::start_life(Incarnation(4), 0, &[0, 1, 3], tuning(), recovered);
    let told = server.wait(0);
    let asks = "asks, stands life 4 promised 3.1 to 0@0.0";
    for other in [1, 2, 3] {
        assert!(told.contains(&format!("{other} <- {asks}")), "{told:?}");
    }
    server.pass(600);
    server.gets_of(3, 1, heartbeat(9.3, 0));
    assert_eq!(server.replica.promised(), ballot(3.1));
    let mark = standing(4, 8.2, id(7, 8.2));
    assert_eq!(server.gets_of(1, 1, seen(mark)), ["persist rejoining as 5"]);
}

/// Who says where it stands answers too; that its answer takes long proves nothing.
#[test]
fn an_answer_is_waited_for_as_long_as_it_takes() {
    let mut server = life_four(log([3.1]));
    server.pass(600);
    let told = Message::Standing {
        standing: standing(1, 3.1, id(1, 3.1)),
        asks: false,
        epoch: 0,
    };
    server.gets_of(1, 1, told);
    server.gets_of(1, 1, pre_check(5.1));
    server.wait(10_000);
    assert!(!answers_pre_check(&server.gets_of(1, 1, pre_check(5.1))));
    server.gets_of(1, 1, seen(standing(4, 3.1, id(1, 3.1))));
    assert!(answers_pre_check(&server.gets_of(1, 1, pre_check(5.1))));
}

fn answers_pre_check(shown: &[String]) -> bool {
    shown.iter().any(|it| it == "1 <- pre-check 5.1 yes")
}

/// The greatest that was seen is kept; whoever asks does not change it.
#[test]
fn marks_are_kept_and_told() {
    let mut server = life_four(log([3.1]));
    let tell = |standing, asks| Message::Standing {
        standing,
        asks,
        epoch: 0,
    };
    let (lower, higher) = (standing(2, 3.1, id(4, 3.1)), standing(2, 3.1, id(5, 3.1)));
    assert_eq!(server.gets_of(1, 2, tell(higher, false)), NOTHING);
    assert_eq!(server.gets_of(1, 2, tell(higher, false)), NOTHING);
    let answer = ["1 <- seen life 2 promised 3.1 to 5@3.1"];
    assert_eq!(server.gets_of(1, 2, tell(lower, true)), answer);
    assert_eq!(server.gets_of(1, 2, tell(lower, false)), answer);
    let more = standing(2, 4.1, id(1, 1.1));
    assert_eq!(server.gets_of(1, 2, tell(more, true)), answer);
    assert_eq!(server.replica.marks().get(&ServerId(1)), Some(&higher));
    // Of another life than the datagram's: nobody sends that.
    assert_eq!(server.gets_of(1, 1, tell(more, false)), NOTHING);
    // A life before the one that was heard just now.
    let alive = ["1 <- seen life 2 promised 3.1 to 5@3.1 alive"];
    assert_eq!(
        server.gets_of(1, 1, tell(standing(1, 9.1, id(9, 9.1)), true)),
        alive
    );
}

/// What the leader and a candidate are told in other words counts as well.
#[test]
fn promises_and_acknowledgements_raise_marks() {
    let mut server = leader_of_lives();
    server.gets_of(2, 1, granted(2.0, server.now, 2));
    let marks = server.replica.marks().clone();
    let promised = standing(1, 2.0, EntryId::default());
    assert_eq!(marks.get(&ServerId(1)), Some(&promised));
    let acknowledged = standing(1, 2.0, id(2, 2.0));
    assert_eq!(marks.get(&ServerId(2)), Some(&acknowledged));
}
