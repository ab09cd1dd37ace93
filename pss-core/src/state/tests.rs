use bytes::Bytes;

use super::*;
use crate::entry::block_checksums;
use crate::volume::reservation::Nexus;

struct Driver(State);

impl Driver {
    fn new() -> Driver {
        Driver(State::default())
    }

    /// Applies one command in an entry of its own.
    fn run(&mut self, command: Command) -> (Answer, bool) {
        let slot = self.0.applied().next();
        let (answer, effect) = self.0.apply(slot, 0, &command);
        let has_effect = effect != Effect::None;
        self.0.finish_slot(slot);
        (answer, has_effect)
    }

    fn open(&mut self, nonce: u64) -> SessionId {
        match self
            .run(Command::internal(Op::OpenSession {
                nonce,
                name: "t".into(),
            }))
            .0
        {
            Answer::Created(id) => SessionId(id),
            other => panic!("{other:?}"),
        }
    }

    fn volume(&mut self, name: &str) -> VolumeId {
        let op = Op::CreateVolume {
            name: name.into(),
            size_bytes: 1 << 20,
            chunk_bytes: CHUNK_BYTES_MIN,
            uuid: [0; 16],
        };
        match self.run(Command::internal(op)).0 {
            Answer::Created(id) => VolumeId(id as u32),
            other => panic!("{other:?}"),
        }
    }
}

/// The administrative actions that are kept, as people see them.
fn told(state: &State) -> Vec<String> {
    let events = state.events_after(0);
    events
        .map(|it| format!("{} {}@{:?}: {it}", it.number, it.by.user, it.by.address))
        .collect()
}

fn opened(nonce: u64) -> Command {
    Command::internal(Op::OpenSessionFrom {
        nonce,
        origin: Box::new(Origin {
            name: "pss@host".into(),
            user: "alice".into(),
            // The scope is none of the log's business.
            address: Some(std::net::SocketAddrV6::new([0; 16].into(), 7, 8, 9).into()),
        }),
    })
}

fn write(session: SessionId, number: u64, settled: u64, volume: VolumeId, block: u64) -> Command {
    let payload = Bytes::from(vec![1; BLOCK_BYTES]);
    Command {
        session,
        number: RequestNumber(number),
        settled_below: RequestNumber(settled),
        op: Op::Write {
            volume,
            first_block: block,
            checksums: block_checksums(volume, block, &payload),
            payload,
        },
    }
}

#[test]
fn repeated_write_is_answered_but_not_applied() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    assert_eq!(
        driver.run(write(session, 1, 0, volume, 0)),
        (Answer::Done, true)
    );
    assert_eq!(
        driver.run(write(session, 2, 0, volume, 0)),
        (Answer::Done, true)
    );
    assert_eq!(
        driver.run(write(session, 1, 0, volume, 0)),
        (Answer::Done, false)
    );
}

#[test]
fn settled_request_is_refused() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    driver.run(write(session, 1, 0, volume, 0));
    driver.run(write(session, 3, 2, volume, 0));
    let settled = (Answer::Refused(Refusal::Settled), false);
    assert_eq!(driver.run(write(session, 1, 0, volume, 0)), settled);
    assert_eq!(
        driver.run(write(session, 2, 2, volume, 0)),
        (Answer::Done, true)
    );
}

#[test]
fn ended_session_is_fenced() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    driver.run(Command::internal(Op::EndSessions {
        sessions: vec![session],
    }));
    let stale = (Answer::Refused(Refusal::StaleSession), false);
    assert_eq!(driver.run(write(session, 1, 0, volume, 0)), stale);
}

#[test]
fn number_beyond_the_window_is_refused() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    let beyond = driver.run(write(session, SESSION_WINDOW + 1, 0, volume, 0));
    assert_eq!(beyond, (Answer::Refused(Refusal::OutsideWindow), false));
    assert_eq!(
        driver.run(write(session, SESSION_WINDOW, 0, volume, 0)).0,
        Answer::Done
    );
}

#[test]
fn open_session_with_the_same_nonce_is_the_same_session() {
    let mut driver = Driver::new();
    assert_eq!(driver.open(7), driver.open(7));
    assert_ne!(driver.open(7), driver.open(8));
}

fn numbered(session: SessionId, number: u64, op: Op) -> Command {
    Command {
        session,
        number: RequestNumber(number),
        settled_below: RequestNumber(0),
        op,
    }
}

#[test]
fn attached_volume_is_not_deleted() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    let command = |number, op| numbered(session, number, op);
    driver.run(command(1, Op::Attach { volume }));
    let delete = || Command::internal(Op::DeleteVolume { volume });
    let attached = (Answer::Refused(Refusal::VolumeAttached), false);
    assert_eq!(driver.run(delete()), attached);
    driver.run(command(2, Op::Detach { volume }));
    assert_eq!(driver.run(delete()), (Answer::Done, true));
    let gone = (Answer::Refused(Refusal::NoSuchVolume), false);
    assert_eq!(driver.run(write(session, 3, 0, volume, 0)), gone);
    assert_ne!(driver.volume("v"), volume);
}

#[test]
fn an_attached_volume_is_shrunk_and_deleted_by_force_only() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    let command = |number, op| numbered(session, number, op);
    driver.run(command(1, Op::Attach { volume }));
    let shrink = |size_bytes| Command::internal(Op::ShrinkVolume { volume, size_bytes });
    let attached = (Answer::Refused(Refusal::VolumeAttached), false);
    let size = driver.0.volume(volume).unwrap().size_bytes;
    assert_eq!(driver.run(shrink(4096)), attached);
    let bad = (Answer::Refused(Refusal::BadSize), false);
    assert_eq!(driver.run(shrink(1)), bad);
    // To grow is no loss.
    assert_eq!(driver.run(shrink(size + 512)), (Answer::Done, true));
    let by_force = Op::ResizeVolume {
        volume,
        size_bytes: 8192,
        allow_shrink: true,
    };
    assert_eq!(
        driver.run(Command::internal(by_force)),
        (Answer::Done, true)
    );
    driver.run(command(2, Op::Detach { volume }));
    assert_eq!(driver.run(shrink(4096)), (Answer::Done, true));
    driver.run(command(3, Op::Attach { volume }));
    let delete = || Command::internal(Op::DeleteAttachedVolume { volume });
    assert_eq!(driver.run(delete()), (Answer::Done, true));
    assert_eq!(driver.0.attachments(volume), 0);
    let gone = (Answer::Refused(Refusal::NoSuchVolume), false);
    assert_eq!(driver.run(delete()), gone);
    assert_eq!(
        driver.run(command(4, Op::Detach { volume })).0,
        Answer::Done
    );
    assert_eq!(driver.run(write(session, 5, 0, volume, 0)), gone);
}

#[test]
fn volume_names() {
    for good in ["vol001", "a", "Größe 1", &"x".repeat(64)] {
        assert_eq!(check_volume_name(good), Ok(()));
    }
    for bad in ["", ".", "..", ".x", "a/b", "a\0", "a\n", &"x".repeat(65)] {
        assert_eq!(check_volume_name(bad), Err(Refusal::BadName), "{bad:?}");
    }
}

#[test]
fn volume_sizes() {
    let check = |bytes| check_volume_size(bytes, CHUNK_BYTES_DEFAULT);
    assert_eq!(check(512), Ok(()));
    assert_eq!(check(VOLUME_BYTES_MAX), Ok(()));
    for bad in [0, 511, VOLUME_BYTES_MAX + 512] {
        assert_eq!(check(bad), Err(Refusal::BadSize));
    }
    assert_eq!(
        check_volume_size(2 << 40, CHUNK_BYTES_MIN),
        Err(Refusal::BadSize)
    );
}

#[test]
fn encoded_state_comes_back() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    driver.open(2);
    driver.run(write(session, 1, 0, volume, 0));
    driver.run(write(session, 3, 0, volume, 1 << 40));
    let bytes = driver.0.encode();
    assert_eq!(State::decode(&bytes), Ok(driver.0));
    for length in 0..bytes.len() {
        assert_eq!(State::decode(&bytes[..length]), Err(BadState::Malformed));
    }
}

#[test]
fn shrinking_needs_leave_and_zeroes_the_rest() {
    let mut driver = Driver::new();
    let volume = driver.volume("v");
    let resize = |size_bytes, allow_shrink| {
        Command::internal(Op::ResizeVolume {
            volume,
            size_bytes,
            allow_shrink,
        })
    };
    let refused = (Answer::Refused(Refusal::WouldShrink), false);
    assert_eq!(driver.run(resize(4096, false)), refused);
    assert_eq!(driver.run(resize(4096, true)), (Answer::Done, true));
    assert_eq!(driver.run(resize(2 << 20, false)), (Answer::Done, false));
}

fn nexus(n: u8) -> Nexus {
    Nexus {
        initiator: format!("iqn.2026-01.test:i{n},i,0x00023d000001"),
        target: "iqn.2026-01.test:t,t,0x0001".into(),
    }
}

fn reserve(volume: VolumeId, n: u8, action: ReservationAction) -> Op {
    let nexus = nexus(n);
    let request = Box::new(ReservationRequest { nexus, action });
    Op::Reserve { volume, request }
}

fn register(volume: VolumeId, n: u8, new_key: u64) -> Op {
    let action = ReservationAction::Register {
        key: 0,
        new_key,
        ignore_existing: false,
        aptpl: true,
        also: Vec::new(),
    };
    reserve(volume, n, action)
}

#[test]
fn reservations_are_part_of_the_state() {
    let mut driver = Driver::new();
    let volume = driver.volume("v");
    let before = driver.0.encode();
    assert_eq!(before[..2], [1, 0], "old programs can read a state without");
    assert_eq!(driver.0.reservations(volume), None);
    let done = (Answer::Done, false);
    assert_eq!(driver.run(Command::internal(register(volume, 1, 7))), done);
    let refused = (Answer::Refused(Refusal::ReservationConflict), false);
    assert_eq!(
        driver.run(Command::internal(register(volume, 1, 8))),
        refused
    );
    let missing = register(VolumeId(99), 1, 7);
    assert_eq!(
        driver.run(Command::internal(missing)).0,
        Answer::Refused(Refusal::NoSuchVolume)
    );
    let reservations = driver.0.reservations(volume).unwrap();
    assert_eq!(reservations.key(&nexus(1)), Some(7));
    let bytes = driver.0.encode();
    assert_eq!(bytes[..2], [2, 0]);
    assert_eq!(State::decode(&bytes), Ok(driver.0.clone()));
    for length in 0..bytes.len() {
        assert_eq!(State::decode(&bytes[..length]), Err(BadState::Malformed));
    }
    driver.run(Command::internal(Op::DeleteVolume { volume }));
    assert_eq!(driver.0.reservations(volume), None);
}

#[test]
fn repeated_reservation_is_answered_once() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    let command = Command {
        session,
        number: RequestNumber(1),
        settled_below: RequestNumber(0),
        op: register(volume, 1, 7),
    };
    assert_eq!(driver.run(command.clone()).0, Answer::Done);
    let version = driver.0.reservations(volume).unwrap().version();
    assert_eq!(driver.run(command).0, Answer::Done);
    assert_eq!(driver.0.reservations(volume).unwrap().version(), version);
}

#[test]
fn reserve6_ends_with_the_session_of_its_gateway() {
    let mut driver = Driver::new();
    let (one, two, volume) = (driver.open(1), driver.open(2), driver.volume("v"));
    let command = |session, op| Command {
        session,
        number: RequestNumber(1),
        settled_below: RequestNumber(0),
        op,
    };
    driver.run(command(
        one,
        reserve(volume, 1, ReservationAction::ReserveUnit),
    ));
    let end = |session| {
        let sessions = vec![session];
        Command::internal(Op::EndSessions { sessions })
    };
    driver.run(end(two));
    let holder = |driver: &Driver| {
        driver
            .0
            .reservations(volume)
            .unwrap()
            .unit_holder()
            .cloned()
    };
    assert_eq!(holder(&driver), Some(nexus(1)));
    driver.run(end(one));
    assert_eq!(holder(&driver), None);
    let reservations = driver.0.reservations(volume).unwrap();
    assert_eq!(reservations.notices_after(1).count(), 1, "it is told");
}

#[test]
fn every_refusal_has_its_code() {
    for code in 1..=27 {
        assert_eq!(Refusal::from_code(code).map(|it| it as u8), Some(code));
    }
    assert_eq!(Refusal::from_code(28), None);
}

#[test]
fn a_state_with_a_clock_comes_back_whole() {
    let mut state = State::default();
    let apply = |state: &mut State, op| {
        let slot = state.applied().next();
        let answer = state.apply(slot, 0, &Command::internal(op)).0;
        state.finish_slot(slot);
        answer
    };
    let create = |name: &str| Op::CreateVolume {
        name: name.to_owned(),
        size_bytes: 1 << 30,
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        uuid: [1; 16],
    };
    apply(&mut state, create("old"));
    let untold = state.encode();
    assert_eq!(untold[..2], 1_u16.to_le_bytes());
    apply(&mut state, Op::Clock { unix_ms: 5000 });
    apply(&mut state, create("new"));
    apply(&mut state, Op::Clock { unix_ms: 6000 });
    let resize = Op::ResizeVolume {
        volume: VolumeId(1),
        size_bytes: 2 << 30,
        allow_shrink: false,
    };
    apply(&mut state, resize);
    assert_eq!(state.encode()[..2], 3_u16.to_le_bytes());
    assert_eq!(State::decode(&state.encode()), Ok(state.clone()));
    let times = |volume| {
        let times = state.times(VolumeId(volume));
        (times.created_ms, times.changed.0, times.changed_ms)
    };
    assert_eq!((times(1), times(2)), ((0, 5, 6000), (5000, 3, 5000)));
    // A leader whose clock stands at the beginning of 1970 makes nobody forget the times.
    apply(&mut state, Op::Clock { unix_ms: 0 });
    assert_eq!(State::decode(&state.encode()), Ok(state.clone()));
    let volume = VolumeId(2);
    apply(&mut state, Op::DeleteVolume { volume });
    assert_eq!(state.times(volume), VolumeTimes::default());
}

#[test]
fn administrative_actions_are_recorded_once_with_who_asked() {
    let mut driver = Driver::new();
    driver.run(Command::internal(Op::Clock { unix_ms: 5000 }));
    let Answer::Created(session) = driver.run(opened(1)).0 else {
        panic!("a session");
    };
    let session = SessionId(session);
    let create = |name: &str| Op::CreateVolume {
        name: name.into(),
        size_bytes: 1 << 30,
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        uuid: [0; 16],
    };
    let volume = VolumeId(1);
    let resize = |volume, size_bytes, allow_shrink| Op::ResizeVolume {
        volume,
        size_bytes,
        allow_shrink,
    };
    let size_bytes = 1 << 20;
    let text = "stop server 2".to_owned();
    let ops = [
        create("v"),
        create("v"),
        create(&"x".repeat(300)),
        resize(volume, 2 << 30, false),
        resize(volume, 1 << 30, false),
        resize(volume, 1 << 30, true),
        resize(VolumeId(7), 1 << 30, true),
        Op::Attach { volume },
        Op::ShrinkVolume { volume, size_bytes },
        Op::DeleteVolume { volume },
        Op::Note { text },
        Op::DeleteAttachedVolume { volume },
        Op::DeleteVolume { volume },
    ];
    for (op, number) in ops.into_iter().zip(1..) {
        let command = numbered(session, number, op);
        let answer = driver.run(command.clone()).0;
        assert_eq!(driver.run(command).0, answer, "a repetition");
    }
    driver.run(write(session, 20, 0, volume, 0));
    let x = "x".repeat(64);
    let expected = [
        "created volume v (1G)".to_owned(),
        "could not create volume v (1G): a volume of that name exists".to_owned(),
        format!(
            "could not create volume {x} (1G): a volume's name has 1 to 64 bytes and no '/', NUL or leading '.'"
        ),
        "resized volume v from 1G to 2G".to_owned(),
        "could not resize volume v from 2G to 1G: the volume would become smaller".to_owned(),
        "resized volume v from 2G to 1G by force".to_owned(),
        "could not resize volume 7 to 1G: no such volume".to_owned(),
        "could not resize volume v from 1G to 1M: the volume is attached".to_owned(),
        "could not delete volume v (1G): the volume is attached".to_owned(),
        "stop server 2".to_owned(),
        "deleted volume v (1G) by force".to_owned(),
        "could not delete volume 1: no such volume".to_owned(),
    ];
    let expected: Vec<String> = expected
        .iter()
        .zip(1..)
        .map(|(text, number)| format!("{number} alice@Some([::]:7): {text}"))
        .collect();
    assert_eq!(told(&driver.0), expected);
    let state = driver.0;
    assert!(
        state
            .events_after(0)
            .all(|it| it.time_ms == 5000 && it.by.name == "pss@host")
    );
    let created = state.events_after(0).next().unwrap();
    assert!(matches!(
        created.action,
        AdminAction::CreateVolume {
            volume: Some(VolumeId(1)),
            ..
        }
    ));
    assert_eq!(created.slot, Slot(3));
    // Who asked is known for as long as the event is kept.
    let mut driver = Driver(state);
    let sessions = vec![session];
    driver.run(Command::internal(Op::EndSessions { sessions }));
    assert_eq!(told(&driver.0), expected);
    let bytes = driver.0.encode();
    assert_eq!(bytes[..2], [4, 0]);
    assert_eq!(State::decode(&bytes), Ok(driver.0));
    for length in 0..bytes.len() {
        assert_eq!(State::decode(&bytes[..length]), Err(BadState::Malformed));
    }
}

#[test]
fn the_newest_events_are_kept() {
    let mut driver = Driver::new();
    assert_eq!((driver.0.first_event(), driver.0.events_made()), (1, 0));
    let more = 10;
    for number in 1..=EVENTS_MAX as u64 + more {
        let text = number.to_string();
        driver.run(Command::internal(Op::Note { text }));
    }
    let state = driver.0;
    assert_eq!(state.events_made(), EVENTS_MAX as u64 + more);
    assert_eq!(state.first_event(), more + 1);
    let numbers = |after| -> Vec<u64> { state.events_after(after).map(|it| it.number).collect() };
    assert_eq!(
        numbers(0),
        (more + 1..=state.events_made()).collect::<Vec<_>>()
    );
    assert_eq!(numbers(more), numbers(0));
    assert_eq!(numbers(more + 1)[0], more + 2);
    assert_eq!(numbers(state.events_made() - 1), [state.events_made()]);
    assert!(numbers(state.events_made()).is_empty() && numbers(u64::MAX).is_empty());
    for event in state.events_after(0) {
        assert_eq!(event.to_string(), event.number.to_string());
    }
    assert_eq!(State::decode(&state.encode()), Ok(state));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|it| format!("{it:02x}")).collect()
}

/// Made from docs/formats.md apart from this program.
#[test]
fn literal_states() {
    let mut driver = Driver::new();
    driver.run(Command::internal(Op::Clock { unix_ms: 5000 }));
    let empty = "0000000000000000" /* volumes made, volumes */
        .to_owned();
    let clock = "00000000" /* reservations */
        .to_owned()
        + "881300000000000000000000";
    let third = format!("03000100000000000000{empty}00000000{clock}");
    assert_eq!(hex(&driver.0.encode()), third);
    driver.run(opened(1));
    driver.run(numbered(
        SessionId(2 << 16),
        1,
        Op::Note { text: "é".into() },
    ));
    let name = "08000000707373406 86f7374".replace(' ', "");
    let session = "0000020000000000" /* id */.to_owned()
        + "0100000000000000" /* nonce */ + &name
        + "0200000000000000" /* opened */
        + "0100000000000000" /* first number */
        + "01000000ff" /* answers */
        + "00000000" /* attached */;
    let origin = name + "05000000616c696365" + "06000000000000000000000000000000000700";
    let event = "0300000000000000" /* slot */.to_owned()
        + "8813000000000000" /* time */ + &origin
        + "00" /* done */ + "0402000000c3a9";
    let fourth = format!(
        "04000300000000000000{empty}01000000{session}{clock}010000000000020000000000{origin}010000000000000001000000{event}"
    );
    assert_eq!(hex(&driver.0.encode()), fourth);
}

#[test]
fn bytes_that_are_no_events_are_no_state() {
    let mut driver = Driver::new();
    driver.run(opened(1));
    for text in ["a", "b"] {
        driver.run(Command::internal(Op::Note { text: text.into() }));
    }
    let bytes = driver.0.encode();
    let event = 8 + 8 + 4 + 4 + 1 + 1 + 1 + 4 + 1;
    let list = bytes.len() - 2 * event;
    let changed = |at: usize, byte: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        State::decode(&bytes)
    };
    assert!(changed(list - 12, 2).is_ok());
    assert_eq!(
        changed(list - 12, 1),
        Err(BadState::Malformed),
        "more are kept than there were"
    );
    assert_eq!(changed(list - 4, 3), Err(BadState::Malformed), "cut short");
    assert_eq!(
        changed(list - 2, 1),
        Err(BadState::Malformed),
        "more than are ever kept"
    );
    assert_eq!(changed(list + 24, 5), Err(BadState::Malformed), "family");
    assert_eq!(changed(list + 25, 99), Err(BadState::Malformed), "refusal");
    assert_eq!(changed(list + 26, 9), Err(BadState::Malformed), "action");
    assert_eq!(
        changed(bytes.len() - 1, 0xff),
        Err(BadState::Malformed),
        "UTF-8"
    );
}

/// The state is encoded for each checkpoint, on the thread that does everything else.
#[test]
#[ignore = "measures"]
fn encoding_all_events_takes_no_time() {
    for long in [false, true] {
        let mut driver = Driver::new();
        let text = |short: &str, most: usize| match long {
            true => "x".repeat(most),
            false => short.to_owned(),
        };
        let Answer::Created(session) = driver
            .run(Command::internal(Op::OpenSessionFrom {
                nonce: 1,
                origin: Box::new(Origin {
                    name: text("pss@storage-host-1", 256),
                    user: text("alice", 64),
                    address: "10.0.0.5:40100".parse().ok(),
                }),
            }))
            .0
        else {
            panic!("a session");
        };
        for number in 1..=EVENTS_MAX as u64 + 1 {
            let text = text("stop server 2", 200);
            driver.run(numbered(SessionId(session), number, Op::Note { text }));
        }
        let start = std::time::Instant::now();
        for _ in 0..100 {
            std::hint::black_box(driver.0.encode());
        }
        let (took, bytes) = (start.elapsed() / 100, driver.0.encode().len());
        println!("long {long}: {bytes} bytes, encoded in {took:?}");
    }
}

/// Servers that apply an old log from different slots on must come to the same.
#[test]
fn what_sessions_of_old_logs_do_is_not_recorded() {
    let mut driver = Driver::new();
    let (session, volume) = (driver.open(1), driver.volume("v"));
    driver.run(numbered(session, 1, Op::DeleteVolume { volume }));
    driver.volume("v");
    assert_eq!(driver.0.events_made(), 0);
    assert_eq!(driver.0.encode()[..2], [1, 0]);
    // A note stands in new logs only.
    let text = "n".to_owned();
    driver.run(numbered(session, 2, Op::Note { text }));
    assert_eq!(told(&driver.0), ["1 @None: n"]);
    assert_eq!(State::decode(&driver.0.encode()), Ok(driver.0));
}

#[test]
fn changed_states_never_panic() {
    let mut driver = Driver::new();
    driver.run(Command::internal(Op::Clock { unix_ms: 5000 }));
    driver.run(opened(1));
    let (session, volume) = (SessionId(2 << 16), VolumeId(1));
    let create = Op::CreateVolume {
        name: "v".into(),
        size_bytes: 1 << 30,
        chunk_bytes: CHUNK_BYTES_DEFAULT,
        uuid: [0; 16],
    };
    let (size_bytes, text) = (1 << 20, "n".to_owned());
    let shrink = Op::ShrinkVolume { volume, size_bytes };
    let ops = [
        create,
        shrink,
        Op::Note { text },
        Op::DeleteVolume { volume },
    ];
    for (op, number) in ops.into_iter().zip(1..) {
        driver.run(numbered(session, number, op));
    }
    let bytes = driver.0.encode();
    for at in 0..bytes.len() {
        for change in [1, 2, 4, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            if let Ok(state) = State::decode(&changed) {
                assert_eq!(State::decode(&state.encode()), Ok(state));
            }
        }
    }
}
