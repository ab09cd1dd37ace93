use proptest::prelude::*;

use super::*;
use ReservationType::*;

fn nexus(n: u8) -> Nexus {
    Nexus {
        initiator: format!("iqn.2026-01.test:i{n},i,0x00023d00000{n}"),
        target: "iqn.2026-01.test:t,t,0x0001".into(),
    }
}

fn ask(
    state: &mut Reservations,
    n: u8,
    action: ReservationAction,
) -> Result<(), ReservationRefusal> {
    let before = state.clone();
    let nexus = nexus(n);
    let result = state.apply(&ReservationRequest { nexus, action });
    if result.is_err() {
        assert_eq!(*state, before, "a refused request changes nothing");
    }
    result
}

fn register(
    state: &mut Reservations,
    n: u8,
    key: u64,
    new_key: u64,
) -> Result<(), ReservationRefusal> {
    let action = ReservationAction::Register {
        key,
        new_key,
        ignore_existing: false,
        aptpl: false,
        also: Vec::new(),
    };
    ask(state, n, action)
}

fn reserve(
    state: &mut Reservations,
    n: u8,
    kind: ReservationType,
) -> Result<(), ReservationRefusal> {
    let key = u64::from(n);
    ask(state, n, ReservationAction::Reserve { key, kind })
}

fn preempt(
    state: &mut Reservations,
    n: u8,
    victim: u64,
    kind: ReservationType,
    abort: bool,
) -> Result<(), ReservationRefusal> {
    let action = ReservationAction::Preempt {
        key: u64::from(n),
        victim,
        kind,
        abort,
    };
    ask(state, n, action)
}

/// Nexuses 1 to `count`, registered with their number as key.
fn registered(count: u8) -> Reservations {
    let mut state = Reservations::default();
    for n in 1..=count {
        register(&mut state, n, 0, n.into()).unwrap();
    }
    state
}

fn notices(state: &Reservations, after: u64) -> Vec<(NoticeKind, Nexus)> {
    let notices = state.notices_after(after);
    notices.map(|it| (it.kind, it.to.clone())).collect()
}

const CONFLICT: Result<(), ReservationRefusal> = Err(ReservationRefusal::Conflict);

// SPC-4 table 68.
#[test]
fn register_needs_the_present_key() {
    let mut state = Reservations::default();
    assert_eq!(register(&mut state, 1, 5, 1), CONFLICT);
    register(&mut state, 1, 0, 1).unwrap();
    assert_eq!(register(&mut state, 1, 0, 2), CONFLICT);
    register(&mut state, 1, 1, 2).unwrap();
    assert_eq!(state.key(&nexus(1)), Some(2));
    assert_eq!(state.generation(), 2);
    register(&mut state, 1, 2, 0).unwrap();
    assert_eq!(state.key(&nexus(1)), None);
}

#[test]
fn unregistering_an_unregistered_nexus_does_nothing() {
    let mut state = Reservations::default();
    register(&mut state, 1, 0, 0).unwrap();
    assert_eq!(state, Reservations::default());
}

// SPC-4 table 69.
#[test]
fn register_and_ignore_replaces_any_key() {
    let mut state = registered(1);
    let action = ReservationAction::Register {
        key: 77,
        new_key: 9,
        ignore_existing: true,
        aptpl: true,
        also: Vec::new(),
    };
    ask(&mut state, 1, action).unwrap();
    assert_eq!(state.key(&nexus(1)), Some(9));
    assert!(state.aptpl());
}

#[test]
fn register_for_others_in_the_same_step() {
    let mut state = Reservations::default();
    let action = ReservationAction::Register {
        key: 0,
        new_key: 4,
        ignore_existing: false,
        aptpl: false,
        also: vec![nexus(2), nexus(3)],
    };
    ask(&mut state, 1, action).unwrap();
    assert_eq!(state.registrations().count(), 3);
    assert_eq!(state.generation(), 1);
}

#[test]
fn registrations_are_bounded() {
    let mut state = Reservations::default();
    let many = |n: usize| Nexus {
        initiator: format!("i{n}"),
        target: "t".into(),
    };
    let request = |n| ReservationRequest {
        nexus: many(n),
        action: ReservationAction::Register {
            key: 0,
            new_key: 1,
            ignore_existing: false,
            aptpl: false,
            also: Vec::new(),
        },
    };
    for n in 0..REGISTRATIONS_MAX {
        state.apply(&request(n)).unwrap();
    }
    let full = state.apply(&request(REGISTRATIONS_MAX));
    assert_eq!(full, Err(ReservationRefusal::TooMany));
}

// SPC-4 §5.13.9.
#[test]
fn reserve_needs_a_registration_and_its_key() {
    let mut state = registered(1);
    assert_eq!(reserve(&mut state, 2, WriteExclusive), CONFLICT);
    let wrong = ReservationAction::Reserve {
        key: 8,
        kind: WriteExclusive,
    };
    assert_eq!(ask(&mut state, 1, wrong), CONFLICT);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    assert_eq!(state.generation(), 1, "RESERVE does not count");
}

#[test]
fn reserve_again_is_good_for_the_same_type_only() {
    let mut state = registered(2);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    reserve(&mut state, 1, WriteExclusive).unwrap();
    assert_eq!(reserve(&mut state, 1, ExclusiveAccess), CONFLICT);
    assert_eq!(reserve(&mut state, 2, WriteExclusive), CONFLICT);
}

#[test]
fn every_registrant_holds_an_all_registrants_reservation() {
    let mut state = registered(2);
    reserve(&mut state, 1, WriteExclusiveAllRegistrants).unwrap();
    assert!(state.is_holder(&nexus(2)));
    reserve(&mut state, 2, WriteExclusiveAllRegistrants).unwrap();
    register(&mut state, 1, 1, 0).unwrap();
    assert!(state.held().is_some());
    register(&mut state, 2, 2, 0).unwrap();
    assert!(state.held().is_none());
}

// SPC-4 §5.13.11.2.2.
#[test]
fn release_by_the_holder_with_another_type_is_invalid() {
    let mut state = registered(2);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    let release = |key, kind| ReservationAction::Release { key, kind };
    assert_eq!(
        ask(&mut state, 1, release(1, ExclusiveAccess)),
        Err(ReservationRefusal::InvalidRelease)
    );
    ask(&mut state, 2, release(2, WriteExclusive)).unwrap();
    assert!(state.held().is_some(), "not its own: nothing happens");
    ask(&mut state, 1, release(1, WriteExclusive)).unwrap();
    assert!(state.held().is_none());
    ask(&mut state, 1, release(1, WriteExclusive)).unwrap();
    assert_eq!(ask(&mut state, 1, release(7, WriteExclusive)), CONFLICT);
}

#[test]
fn release_tells_registrants_of_registrants_only_types_only() {
    for (kind, told) in [(WriteExclusive, 0), (WriteExclusiveRegistrantsOnly, 2)] {
        let mut state = registered(3);
        reserve(&mut state, 1, kind).unwrap();
        let seen = state.version();
        ask(&mut state, 1, ReservationAction::Release { key: 1, kind }).unwrap();
        let notices = notices(&state, seen);
        assert_eq!(notices.len(), told);
        assert!(notices.iter().all(|(_, to)| *to != nexus(1)));
    }
}

// SPC-4 §5.13.11.2.3: all but the nexus that unregistered are told.
#[test]
fn unregistering_holder_releases_and_tells_the_others() {
    let mut state = registered(2);
    reserve(&mut state, 1, ExclusiveAccessRegistrantsOnly).unwrap();
    let seen = state.version();
    register(&mut state, 1, 1, 0).unwrap();
    assert!(state.held().is_none());
    assert_eq!(
        notices(&state, seen),
        [(NoticeKind::ReservationsReleased, nexus(2))]
    );
}

#[test]
fn clear_tells_the_others() {
    let mut state = registered(2);
    reserve(&mut state, 2, WriteExclusive).unwrap();
    let seen = state.version();
    ask(&mut state, 1, ReservationAction::Clear { key: 1 }).unwrap();
    assert_eq!(state.registrations().count(), 0);
    assert!(state.held().is_none());
    assert_eq!(
        notices(&state, seen),
        [(NoticeKind::ReservationsPreempted, nexus(2))]
    );
}

// SPC-4 §5.13.11.2.4.
#[test]
fn preempt_of_the_holder_takes_the_reservation() {
    let mut state = registered(3);
    reserve(&mut state, 1, WriteExclusiveRegistrantsOnly).unwrap();
    let seen = state.version();
    preempt(&mut state, 2, 1, ExclusiveAccess, true).unwrap();
    let held = state.held().unwrap();
    assert_eq!((held.kind, &held.by), (ExclusiveAccess, &nexus(2)));
    assert_eq!(state.key(&nexus(1)), None);
    assert_eq!(
        notices(&state, seen),
        [
            (NoticeKind::RegistrationsPreempted, nexus(1)),
            (NoticeKind::TasksAborted, nexus(1)),
            (NoticeKind::ReservationsReleased, nexus(3)),
        ]
    );
}

#[test]
fn preempt_of_others_leaves_the_reservation() {
    let mut state = registered(3);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    preempt(&mut state, 2, 3, ExclusiveAccess, false).unwrap();
    assert_eq!(state.held().unwrap().by, nexus(1));
    assert_eq!(state.key(&nexus(3)), None);
    assert_eq!(preempt(&mut state, 2, 3, ExclusiveAccess, false), CONFLICT);
}

#[test]
fn preempt_of_key_zero() {
    let mut state = registered(3);
    assert_eq!(preempt(&mut state, 1, 0, WriteExclusive, false), CONFLICT);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    assert_eq!(
        preempt(&mut state, 2, 0, WriteExclusive, false),
        Err(ReservationRefusal::InvalidField)
    );
    let mut state = registered(3);
    reserve(&mut state, 1, WriteExclusiveAllRegistrants).unwrap();
    preempt(&mut state, 2, 0, ExclusiveAccess, false).unwrap();
    assert_eq!(state.registrations().count(), 1);
    assert_eq!(state.held().unwrap().by, nexus(2));
}

#[test]
fn preempt_of_itself_changes_the_type() {
    let mut state = registered(1);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    preempt(&mut state, 1, 1, ExclusiveAccess, false).unwrap();
    assert_eq!(state.key(&nexus(1)), Some(1));
    assert_eq!(state.held().unwrap().kind, ExclusiveAccess);
}

// SPC-4 §5.13.8.
#[test]
fn register_and_move_hands_the_reservation_over() {
    let mut state = registered(1);
    let request = |new_key, to| ReservationAction::RegisterAndMove {
        key: 1,
        new_key,
        unregister: true,
        aptpl: false,
        to,
    };
    assert_eq!(ask(&mut state, 1, request(5, nexus(2))), CONFLICT);
    reserve(&mut state, 1, WriteExclusive).unwrap();
    let invalid = Err(ReservationRefusal::InvalidField);
    assert_eq!(ask(&mut state, 1, request(0, nexus(2))), invalid);
    assert_eq!(ask(&mut state, 1, request(5, nexus(1))), invalid);
    ask(&mut state, 1, request(5, nexus(2))).unwrap();
    assert_eq!(state.key(&nexus(1)), None);
    assert_eq!(state.key(&nexus(2)), Some(5));
    assert!(state.is_holder(&nexus(2)));
}

// SPC-4 tables 66 and 67.
#[test]
fn access_by_type() {
    let kinds = [
        WriteExclusive,
        ExclusiveAccess,
        WriteExclusiveRegistrantsOnly,
        ExclusiveAccessRegistrantsOnly,
        WriteExclusiveAllRegistrants,
        ExclusiveAccessAllRegistrants,
    ];
    for kind in kinds {
        let mut state = registered(2);
        reserve(&mut state, 1, kind).unwrap();
        for access in [Access::Free, Access::Status, Access::Read, Access::Write] {
            let harmless = matches!(access, Access::Free | Access::Status);
            let outsider = harmless || access == Access::Read && kind.lets_read();
            assert!(state.allows(Some(&nexus(1)), access));
            assert_eq!(state.allows(Some(&nexus(3)), access), outsider);
            assert_eq!(state.allows(None, access), outsider);
            let registrant = outsider || kind.lets_registrants();
            assert_eq!(state.allows(Some(&nexus(2)), access), registrant);
        }
    }
}

// SPC-2 §7.21 and §7.16.
#[test]
fn reserve6_excludes_others_until_released_or_lost() {
    for end in [
        ReservationAction::ReleaseUnit,
        ReservationAction::NexusLost,
        ReservationAction::Reset,
    ] {
        let mut state = Reservations::default();
        ask(&mut state, 1, ReservationAction::ReserveUnit).unwrap();
        ask(&mut state, 1, ReservationAction::ReserveUnit).unwrap();
        assert_eq!(ask(&mut state, 2, ReservationAction::ReserveUnit), CONFLICT);
        assert!(!state.allows(Some(&nexus(2)), Access::Status));
        assert!(state.allows(Some(&nexus(2)), Access::Free));
        assert_eq!(register(&mut state, 1, 0, 1), CONFLICT);
        ask(&mut state, 2, ReservationAction::ReleaseUnit).unwrap();
        ask(&mut state, 2, ReservationAction::NexusLost).unwrap();
        assert!(state.unit_holder().is_some());
        ask(&mut state, 1, end).unwrap();
        ask(&mut state, 2, ReservationAction::ReserveUnit).unwrap();
    }
}

// SPC-4 §5.13.3, CRH.
#[test]
fn reserve6_beside_registrations() {
    let mut state = registered(1);
    assert_eq!(ask(&mut state, 2, ReservationAction::ReserveUnit), CONFLICT);
    ask(&mut state, 1, ReservationAction::ReserveUnit).unwrap();
    assert_eq!(state.unit_holder(), None);
}

#[test]
fn reset_is_told_with_its_version() {
    let mut state = registered(1);
    ask(&mut state, 1, ReservationAction::Reset).unwrap();
    assert_eq!(state.reset(), Some((state.version(), &nexus(1))));
    assert_eq!(state.key(&nexus(1)), Some(1), "registrations stay");
}

fn arbitrary_action() -> impl Strategy<Value = ReservationAction> {
    let kind = prop::sample::select(vec![
        WriteExclusive,
        ExclusiveAccess,
        WriteExclusiveRegistrantsOnly,
        ExclusiveAccessRegistrantsOnly,
        WriteExclusiveAllRegistrants,
        ExclusiveAccessAllRegistrants,
    ]);
    let key = 0..4u64;
    let also = prop::collection::vec(1..5u8, 0..3);
    prop_oneof![
        Just(ReservationAction::Read),
        Just(ReservationAction::ReserveUnit),
        Just(ReservationAction::ReleaseUnit),
        Just(ReservationAction::NexusLost),
        Just(ReservationAction::Reset),
        (key.clone(), key.clone(), any::<bool>(), any::<bool>(), also).prop_map(
            |(key, new_key, ignore_existing, aptpl, also)| ReservationAction::Register {
                key,
                new_key,
                ignore_existing,
                aptpl,
                also: also.into_iter().map(nexus).collect(),
            }
        ),
        (key.clone(), kind.clone())
            .prop_map(|(key, kind)| ReservationAction::Reserve { key, kind }),
        (key.clone(), kind.clone())
            .prop_map(|(key, kind)| ReservationAction::Release { key, kind }),
        key.clone().prop_map(|key| ReservationAction::Clear { key }),
        (key.clone(), key.clone(), kind, any::<bool>()).prop_map(|(key, victim, kind, abort)| {
            ReservationAction::Preempt {
                key,
                victim,
                kind,
                abort,
            }
        }),
        (key.clone(), key, any::<bool>(), any::<bool>(), 1..5u8).prop_map(
            |(key, new_key, unregister, aptpl, to)| ReservationAction::RegisterAndMove {
                key,
                new_key,
                unregister,
                aptpl,
                to: nexus(to),
            }
        ),
    ]
}

proptest! {
    #[test]
    fn whatever_is_asked_the_state_stays_sound(
        requests in prop::collection::vec((1..5u8, arbitrary_action()), 0..60)
    ) {
        let mut state = Reservations::default();
        for (n, action) in requests {
            let request = ReservationRequest { nexus: nexus(n), action };
            let mut bytes = Vec::new();
            request.encode(&mut bytes);
            prop_assert_eq!(ReservationRequest::decode(&mut &bytes[..]), Ok(request.clone()));
            let before = state.clone();
            if state.apply(&request).is_err() {
                prop_assert_eq!(&state, &before);
            }
            if let Some(held) = state.held().filter(|held| !held.kind.held_by_all()) {
                prop_assert!(state.key(&held.by).is_some(), "the holder is registered");
            }
            prop_assert!(state.held().is_none() || state.registrations().count() > 0);
            prop_assert!(state.unit_holder().is_none() || state.registrations().count() == 0);
            let mut bytes = Vec::new();
            state.encode(&mut bytes);
            let input = &mut &bytes[..];
            prop_assert_eq!(Reservations::decode(input), Ok(state.clone()));
            prop_assert!(input.is_empty());
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Reservations::decode(&mut &bytes[..]);
        let _ = ReservationRequest::decode(&mut &bytes[..]);
    }
}
