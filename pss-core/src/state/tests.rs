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
        assert_eq!(State::decode(&bytes[..length]), Err(BadState));
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
        assert_eq!(State::decode(&bytes[..length]), Err(BadState));
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
    for code in 1..=18 {
        assert_eq!(Refusal::from_code(code).map(|it| it as u8), Some(code));
    }
    assert_eq!(Refusal::from_code(19), None);
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
