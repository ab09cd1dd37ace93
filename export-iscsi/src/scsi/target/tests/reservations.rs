//! Reservations as initiators see them (SPC-4 §5.13, SPC-2 §7.16, §7.21).

use super::*;

/// PERSISTENT RESERVE OUT with basic parameters.
fn out(rig: &mut Rig, nexus: NexusId, action: u8, kind: u8, key: u64, service_key: u64) -> Outcome {
    let mut list = key.to_be_bytes().to_vec();
    list.extend(service_key.to_be_bytes());
    list.extend([0; 8]);
    rig.run(nexus, 1, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list)
}

fn register(rig: &mut Rig, nexus: NexusId, key: u64) {
    assert_eq!(out(rig, nexus, 6, 0, 0, key).status, Status::Good);
}

/// PERSISTENT RESERVE IN.
fn read(rig: &mut Rig, action: u8) -> Vec<u8> {
    rig.good(1, &[0x5e, action, 0, 0, 0, 0, 0, 4, 0, 0], &[])
}

const CONFLICT: Status = Status::ReservationConflict;

fn status(rig: &mut Rig, nexus: NexusId, cdb: &[u8], out: &[u8]) -> Status {
    rig.run(nexus, 1, cdb, out).status
}

#[test]
fn keys_reservation_and_full_status() {
    let mut rig = Rig::new();
    assert_eq!(read(&mut rig, 0), [0; 8]);
    register(&mut rig, A, 0x11);
    register(&mut rig, B, 0x22);
    let keys = read(&mut rig, 0);
    assert_eq!(keys[..8], [0, 0, 0, 2, 0, 0, 0, 16]);
    assert_eq!((keys[15], keys[23]), (0x11, 0x22));
    assert_eq!(read(&mut rig, 1).len(), 8);
    assert_eq!(out(&mut rig, A, 1, 5, 0x11, 0).status, Status::Good);
    let reservation = read(&mut rig, 1);
    assert_eq!(reservation[15], 0x11);
    assert_eq!(reservation[21], 5);
    let full = read(&mut rig, 3);
    assert_eq!(full[8 + 12..8 + 14], [1, 5]);
    assert_eq!(full[8 + 18..8 + 20], [0, 1]);
    let id = &full[8 + 24..];
    assert_eq!(id[0], 0x45);
    assert!(id[4..].starts_with(b"iqn.2026-01.test:i1,i,0x00023d000001"));
    let length = u32::from_be_bytes(full[4..8].try_into().unwrap());
    assert_eq!(length as usize + 8, full.len());
    let capabilities = read(&mut rig, 2);
    assert_eq!(capabilities, [0, 8, 0x1d, 0x90, 0xea, 1, 0, 0]);
    // All registrants: the key that is shown is 0.
    assert_eq!(out(&mut rig, A, 2, 5, 0x11, 0).status, Status::Good);
    assert_eq!(out(&mut rig, A, 1, 7, 0x11, 0).status, Status::Good);
    assert_eq!(read(&mut rig, 1)[8..16], [0; 8]);
}

#[test]
fn allocation_length_cuts_but_the_length_stays() {
    let mut rig = Rig::new();
    register(&mut rig, A, 1);
    let short = rig.good(1, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 10, 0], &[]);
    assert_eq!(short.len(), 10);
    assert_eq!(short[7], 8);
    for action in 4..32 {
        let cdb = [0x5e, action, 0, 0, 0, 0, 0, 1, 0, 0];
        assert_eq!(rig.sense(1, &cdb, &[]), INVALID_CDB);
    }
}

// SPC-4 tables 66 and 67, SBC-3 table 13.
#[test]
fn commands_under_each_type() {
    for (kind, reads, registrant_writes) in [
        (1, true, false),
        (3, false, false),
        (5, true, true),
        (6, false, true),
        (7, true, true),
        (8, false, true),
    ] {
        for registered in [false, true] {
            let mut rig = Rig::new();
            register(&mut rig, A, 1);
            assert_eq!(out(&mut rig, A, 1, kind, 1, 0).status, Status::Good);
            if registered {
                register(&mut rig, B, 2);
            }
            let full = registered && registrant_writes;
            let expect = |allowed| if allowed { Status::Good } else { CONFLICT };
            let data = [0; 512];
            for (cdb, data, allowed) in [
                (cdb10(0x28, 0, 0, 1), &data[..0], reads || full),
                (cdb10(0x2f, 0, 0, 1), &data[..0], reads || full),
                (cdb10(0x2a, 0, 0, 1), &data[..], full),
                (cdb10(0x41, 0, 0, 1), &data[..], full),
                (cdb10(0x35, 0, 0, 1), &data[..0], full),
                (vec![0x1a, 0, 0x3f, 0, 255, 0], &data[..0], full),
                (vec![0x1e, 0, 0, 0, 1, 0], &data[..0], full),
                (vec![0x1e, 0, 0, 0, 0, 0], &data[..0], true),
                (vec![0x1b, 0, 0, 0, 1, 0], &data[..0], true),
                (vec![0x1b, 0, 0, 0, 0, 0], &data[..0], full),
                (vec![0; 6], &data[..0], true),
                (vec![0x12, 0, 0, 0, 36, 0], &data[..0], true),
                (vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &data[..0], true),
                (vec![0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0], &data[..0], true),
            ] {
                let found = status(&mut rig, B, &cdb, data);
                assert_eq!(found, expect(allowed), "type {kind} {registered} {cdb:x?}");
                assert_eq!(status(&mut rig, A, &cdb, data), Status::Good, "{cdb:x?}");
            }
        }
    }
}

// SPC-4 §5.13.11: who is told what.
#[test]
fn unit_attentions_of_release_clear_and_preempt() {
    let mut rig = Rig::new();
    register(&mut rig, A, 1);
    register(&mut rig, B, 2);
    out(&mut rig, A, 1, 5, 1, 0);
    assert_eq!(out(&mut rig, A, 2, 5, 1, 0).status, Status::Good);
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2a04));
    rig.good(1, &[0; 6], &[]);
    out(&mut rig, A, 1, 5, 1, 0);
    assert_eq!(out(&mut rig, B, 5, 1, 2, 1).status, Status::Good);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (6, 0x2a05));
    assert_eq!(
        status(&mut rig, A, &cdb10(0x2a, 0, 0, 1), &[0; 512]),
        CONFLICT
    );
    register(&mut rig, A, 1);
    assert_eq!(out(&mut rig, B, 3, 0, 2, 0).status, Status::Good);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (6, 0x2a03));
}

#[test]
fn preempt_and_abort_ends_the_victims_tasks() {
    let mut rig = Rig::new();
    register(&mut rig, A, 1);
    register(&mut rig, B, 2);
    out(&mut rig, A, 1, 1, 1, 0);
    rig.holds = true;
    let tag = rig.send(A, 1, &cdb10(0x2a, 0, 0, 1), &[1; 512]);
    assert_eq!(out(&mut rig, B, 5, 1, 2, 1).status, Status::Good);
    assert_eq!(rig.aborted, [(A, tag)]);
}

// SPC-4 §6.16.3.
#[test]
fn parameter_lists_of_persistent_reserve_out() {
    let mut rig = Rig::new();
    let list = [0u8; 24];
    for length in [0u8, 23] {
        let cdb = [0x5f, 6, 0, 0, 0, 0, 0, 0, length, 0];
        assert_eq!(rig.sense(1, &cdb, &list), (5, 0x1a00));
    }
    assert_eq!(
        rig.sense(1, &[0x5f, 6, 0, 0, 0, 0, 0, 0, 25, 0], &[0; 25]),
        (5, 0x1a00)
    );
    assert_eq!(
        rig.sense(1, &[0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0], &list[..20]),
        (5, 0x1a00)
    );
    register(&mut rig, A, 1);
    for (action, kind) in [(1, 0x15), (1, 2), (1, 0), (2, 4), (4, 9)] {
        assert_eq!(sense_of(&out(&mut rig, A, action, kind, 1, 1)), INVALID_CDB);
    }
    assert_eq!(sense_of(&out(&mut rig, A, 8, 0, 1, 1)), INVALID_CDB);
    // SPEC_I_PT with anything but REGISTER.
    let mut list = [0u8; 28];
    list[20] = 8;
    assert_eq!(
        rig.sense(1, &[0x5f, 6, 0, 0, 0, 0, 0, 0, 28, 0], &list),
        (5, 0x2600)
    );
    // RELEASE of another type.
    out(&mut rig, A, 1, 1, 1, 0);
    assert_eq!(sense_of(&out(&mut rig, A, 2, 3, 1, 0)), (5, 0x2604));
    // PREEMPT of key 0.
    assert_eq!(sense_of(&out(&mut rig, A, 4, 1, 1, 0)), (5, 0x2600));
}

fn transport_id(n: u64) -> Vec<u8> {
    let name = format!("iqn.2026-01.test:i{n},i,0x00023d00000{n}");
    let mut id = vec![0x45, 0, 0, 40];
    id.extend(name.as_bytes());
    id.resize(44, 0);
    id
}

#[test]
fn register_for_another_port_and_move_to_it() {
    let mut rig = Rig::new();
    let id = transport_id(2);
    let mut list = vec![0; 24];
    list[15] = 1;
    list[20] = 8;
    list.extend((id.len() as u32).to_be_bytes());
    list.extend(&id);
    let length = list.len() as u8;
    rig.good(1, &[0x5f, 0, 0, 0, 0, 0, 0, 0, length, 0], &list);
    assert_eq!(read(&mut rig, 0).len(), 8 + 16);
    // B is registered now and may reserve.
    assert_eq!(out(&mut rig, B, 1, 1, 1, 0).status, Status::Good);
    assert_eq!(out(&mut rig, B, 2, 1, 1, 0).status, Status::Good);
    out(&mut rig, A, 1, 3, 1, 0);
    let mut list = 1u64.to_be_bytes().to_vec();
    list.extend(9u64.to_be_bytes());
    list.extend([0, 2, 0, 1]);
    list.extend((id.len() as u32).to_be_bytes());
    list.extend(&id);
    let length = list.len() as u8;
    rig.good(1, &[0x5f, 7, 0, 0, 0, 0, 0, 0, length, 0], &list);
    let reservation = read(&mut rig, 1);
    assert_eq!((reservation[15], reservation[21]), (9, 3));
    assert_eq!(status(&mut rig, A, &cdb10(0x28, 0, 0, 1), &[]), CONFLICT);
    assert_eq!(
        status(&mut rig, B, &cdb10(0x28, 0, 0, 1), &[]),
        Status::Good
    );
    list[19] = 7;
    let mut again = list.clone();
    again[7] = 9;
    let outcome = rig.run(B, 1, &[0x5f, 7, 0, 0, 0, 0, 0, 0, length, 0], &again);
    assert_eq!(sense_of(&outcome), (5, 0x2600), "no such target port");
}

// SPC-2 §7.16, §7.21.
#[test]
fn reserve6_between_two_initiators() {
    let mut rig = Rig::new();
    let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
    rig.good(1, &reserve, &[]);
    rig.good(1, &reserve, &[]);
    assert_eq!(status(&mut rig, B, &reserve, &[]), CONFLICT);
    assert_eq!(status(&mut rig, B, &release, &[]), Status::Good);
    assert_eq!(
        status(&mut rig, B, &[0x1a, 0, 0x3f, 0, 255, 0], &[]),
        CONFLICT
    );
    assert_eq!(status(&mut rig, B, &[0; 6], &[]), CONFLICT);
    assert_eq!(
        status(&mut rig, B, &[0x12, 0, 0, 0, 36, 0], &[]),
        Status::Good
    );
    rig.good(1, &[0x1a, 0, 0x3f, 0, 255, 0], &[]);
    assert_eq!(out(&mut rig, A, 6, 0, 0, 1).status, CONFLICT);
    rig.good(1, &release, &[]);
    assert_eq!(status(&mut rig, B, &reserve, &[]), Status::Good);
    assert_eq!(rig.sense(1, &[0x16, 1, 0, 0, 0, 0], &[]), INVALID_CDB);
}

#[test]
fn reserve6_ends_with_its_nexus_and_with_a_reset() {
    let mut rig = Rig::new();
    rig.good(1, &[0x16, 0, 0, 0, 0, 0], &[]);
    let mut actions = Actions::default();
    rig.target.detach(A, &mut actions);
    rig.drive(actions);
    assert_eq!(status(&mut rig, B, &[0; 6], &[]), Status::Good);
    assert_eq!(
        status(&mut rig, B, &[0x16, 0, 0, 0, 0, 0], &[]),
        Status::Good
    );
    rig.target.attach(A, initiator(1));
    let mut actions = Actions::default();
    let lun = super::super::super::report::encode_lun(1);
    let function = super::super::super::actions::TaskFunction::LogicalUnitReset;
    rig.target
        .task_management(A, 1, function, lun, 0, &mut actions);
    rig.drive(actions);
    while rig.run(A, 1, &[0; 6], &[]).status == Status::CheckCondition {}
    assert_eq!(
        status(&mut rig, A, &[0x16, 0, 0, 0, 0, 0], &[]),
        Status::Good
    );
}

/// A change through another gateway, of which this one has not heard.
fn elsewhere(rig: &mut Rig, n: u64, action: ReservationAction) {
    let nexus = Nexus {
        initiator: format!("iqn.2026-01.test:other{n},i,0x00023d000001"),
        target: "iqn.2001-03.jp.tritech:tgtd-pss,t,0x0002".into(),
    };
    let request = ReservationRequest { nexus, action };
    let state = rig.reservations.get_mut(&1).unwrap();
    state.apply(&request).unwrap();
}

fn registered_elsewhere(rig: &mut Rig, n: u64, key: u64) {
    let action = ReservationAction::Register {
        key: 0,
        new_key: key,
        ignore_existing: true,
        aptpl: true,
        also: Vec::new(),
    };
    elsewhere(rig, n, action);
}

#[test]
fn a_reservation_of_another_gateway_holds_before_it_is_heard_of() {
    use pss_core::volume::reservation::ReservationType::*;
    let mut rig = Rig::new();
    registered_elsewhere(&mut rig, 7, 70);
    // The version differs, but nothing forbids the write: it is made again.
    assert_eq!(
        status(&mut rig, A, &cdb10(0x2a, 0, 0, 1), &[1; 512]),
        Status::Good
    );
    let kind = WriteExclusive;
    elsewhere(&mut rig, 7, ReservationAction::Reserve { key: 70, kind });
    assert_eq!(
        status(&mut rig, A, &cdb10(0x2a, 0, 0, 1), &[2; 512]),
        CONFLICT
    );
    assert_eq!(
        status(&mut rig, A, &cdb10(0x28, 0, 0, 1), &[]),
        Status::Good
    );
    assert_eq!(rig.volumes[&1].bytes[0], 1);
}

/// A command that comes after another gateway has answered PREEMPT is told so, whether it is allowed or not.
#[test]
fn what_a_preemption_tells_comes_before_what_it_forbids() {
    use pss_core::volume::reservation::ReservationType::*;
    let write = (cdb10(0x2a, 0, 0, 1), &[1; 512][..], CONFLICT);
    let read = (cdb10(0x28, 0, 0, 1), &[][..], Status::Good);
    for (cdb, data, then) in [write, read] {
        let mut rig = Rig::new();
        register(&mut rig, A, 1);
        out(&mut rig, A, 1, 1, 1, 0);
        registered_elsewhere(&mut rig, 7, 70);
        let preempt = ReservationAction::Preempt {
            key: 70,
            victim: 1,
            kind: WriteExclusive,
            abort: false,
        };
        elsewhere(&mut rig, 7, preempt);
        assert_eq!(rig.sense(1, &cdb, data), (6, 0x2a05));
        assert_eq!(status(&mut rig, A, &cdb, data), then);
        assert_eq!(rig.volumes[&1].bytes[0], 0);
    }
}

#[test]
fn preempted_and_reset_from_another_gateway() {
    use pss_core::volume::reservation::ReservationType::*;
    let mut rig = Rig::new();
    register(&mut rig, A, 1);
    out(&mut rig, A, 1, 1, 1, 0);
    registered_elsewhere(&mut rig, 7, 70);
    rig.holds = true;
    let tag = rig.send(A, 1, &cdb10(0x28, 0, 0, 1), &[]);
    elsewhere(
        &mut rig,
        7,
        ReservationAction::Preempt {
            key: 70,
            victim: 1,
            kind: WriteExclusive,
            abort: true,
        },
    );
    let now = Arc::new(rig.reservations[&1].clone());
    let mut actions = Actions::default();
    rig.target.reservations_changed(1, now, &mut actions);
    rig.drive(actions);
    // It may have come after that was answered: it is answered as though it had.
    assert_eq!(sense_of(&rig.ended(tag).unwrap()), (6, 0x2a05));
    assert_eq!(rig.aborted, []);
    rig.good(1, &[0; 6], &[]);
    elsewhere(&mut rig, 7, ReservationAction::Reset);
    let now = Arc::new(rig.reservations[&1].clone());
    let mut actions = Actions::default();
    rig.target.reservations_changed(1, now, &mut actions);
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2903));
}

/// What another gateway has answered counts for every command that comes afterwards, heard of or not.
#[test]
fn a_reset_through_another_gateway_is_told_to_whatever_comes_next() {
    for cdb in [
        vec![0; 6],
        vec![0x1a, 0, 0x3f, 0, 255, 0],
        vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![0x1e, 0, 0, 0, 1, 0],
        cdb10(0x35, 0, 0, 0),
        cdb10(0x28, 0, 0, 1),
        cdb10(0x28, 0, 0, 0),
        // Not a command of ours.
        vec![0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // Past the end.
        cdb10(0x28, 0, u32::MAX, 1),
    ] {
        let mut rig = Rig::new();
        elsewhere(&mut rig, 7, ReservationAction::Reset);
        assert_eq!(rig.sense(1, &cdb, &[]), (6, 0x2903), "{cdb:x?}");
        rig.good(1, &[0; 6], &[]);
        assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2903));
        assert_eq!(rig.run(B, 1, &[0; 6], &[]).status, Status::Good);
    }
    let mut rig = Rig::new();
    elsewhere(&mut rig, 7, ReservationAction::Reset);
    let write = cdb10(0x2a, 0, 0, 1);
    assert_eq!(rig.sense(1, &write, &[1; 512]), (6, 0x2903));
    assert_eq!(rig.volumes[&1].bytes[0], 0, "it was not carried out");
    assert_eq!(rig.aborted, []);
}

#[test]
fn a_reset_through_another_gateway_ends_all_tasks_with_an_answer() {
    let mut rig = Rig::new();
    rig.holds = true;
    let data = [1; 512];
    let a = rig.send(A, 1, &cdb10(0x2a, 0, 0, 1), &data);
    let more = rig.send(A, 1, &cdb10(0x2a, 0, 1, 1), &data);
    let b = rig.send(B, 1, &cdb10(0x28, 0, 0, 1), &[]);
    let attribute = TaskAttribute::Ordered;
    let waits = rig.send_as(B, 1, &cdb10(0x2a, 0, 2, 1), &data, attribute);
    elsewhere(&mut rig, 7, ReservationAction::Reset);
    // Whoever comes next finds out, if it need not wait for its turn.
    let finder = rig.send_as(A, 1, &[0; 6], &[], TaskAttribute::HeadOfQueue);
    for tag in [a, more, b, waits, finder] {
        assert_eq!(sense_of(&rig.ended(tag).unwrap()), (6, 0x2903));
    }
    // The cell refuses what is still on its way.
    while let Some((cookie, ..)) = rig.held.pop_front() {
        let mut actions = Actions::default();
        let changed = Err(DeviceError::ReservationChanged);
        rig.target.completed(cookie, changed, &mut actions);
        rig.drive(actions);
    }
    assert!(rig.target.requests.is_empty());
    assert!(rig.volumes[&1].bytes.iter().all(|byte| *byte == 0));
    rig.holds = false;
    // It was told with the answers.
    assert_eq!(rig.run(B, 1, &[0; 6], &[]).status, Status::Good);
}

#[test]
fn what_another_gateway_allows_is_allowed_at_once() {
    use pss_core::volume::reservation::ReservationType::*;
    let mut rig = Rig::new();
    registered_elsewhere(&mut rig, 7, 70);
    let kind = ExclusiveAccess;
    elsewhere(&mut rig, 7, ReservationAction::Reserve { key: 70, kind });
    let (read, sense) = (cdb10(0x28, 0, 0, 1), [0x1a, 0, 0x3f, 0, 255, 0]);
    assert_eq!(status(&mut rig, A, &read, &[]), CONFLICT);
    assert_eq!(status(&mut rig, A, &sense, &[]), CONFLICT);
    elsewhere(&mut rig, 7, ReservationAction::Release { key: 70, kind });
    assert_eq!(status(&mut rig, A, &read, &[]), Status::Good);
    elsewhere(&mut rig, 7, ReservationAction::Clear { key: 70 });
    elsewhere(&mut rig, 7, ReservationAction::ReserveUnit);
    // TEST UNIT READY asks nobody else.
    assert_eq!(status(&mut rig, A, &[0; 6], &[]), CONFLICT);
    elsewhere(&mut rig, 7, ReservationAction::NexusLost);
    assert_eq!(status(&mut rig, A, &[0; 6], &[]), Status::Good);
}

#[test]
fn changes_before_a_disk_was_opened_are_nobodys_concern() {
    let mut rig = Rig::new();
    elsewhere(&mut rig, 7, ReservationAction::Reset);
    let now = Arc::new(rig.reservations[&1].clone());
    rig.target.reservations_known(1, now);
    rig.good(1, &[0; 6], &[]);
}

#[test]
fn a_sanitize_operation_goes_on_under_other_reservations() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    rig.good(1, &cdb10(0x2a, 0, 0, 1), &[1; 512]);
    registered_elsewhere(&mut rig, 7, 70);
    // IMMED 0, BLOCK ERASE; the look that comes first would find the change.
    rig.holds = true;
    let tag = rig.send(A, 1, &[0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    assert_eq!(rig.held.len(), 1);
    registered_elsewhere(&mut rig, 8, 80);
    rig.holds = false;
    let (cookie, ..) = rig.held.pop_front().unwrap();
    let mut actions = Actions::default();
    let changed = Err(DeviceError::ReservationChanged);
    rig.target.completed(cookie, changed, &mut actions);
    rig.drive(actions);
    assert_eq!(rig.ended(tag).unwrap().status, Status::Good);
    assert_eq!(rig.volumes[&1].bytes[0], 0);
}
