//! Tasks, task management and unit attentions (SAM-5).

use super::super::super::actions::{TaskAttribute, TaskFunction, TaskResponse};
use super::super::super::report::encode_lun;
use super::*;

fn manage(rig: &mut Rig, nexus: NexusId, function: TaskFunction, lun: u16, tag: u32) {
    let mut actions = Actions::default();
    let lun = encode_lun(lun);
    rig.target
        .task_management(nexus, 1, function, lun, tag, &mut actions);
    rig.drive(actions);
}

fn write(rig: &mut Rig, nexus: NexusId, lba: u32) -> u32 {
    rig.send(nexus, 1, &cdb10(0x2a, 0, lba, 1), &[1; 512])
}

// SAM-5 §5.14.
#[test]
fn power_on_is_told_once_per_unit() {
    let mut rig = Rig::of(vec![LunSettings::default()]);
    // INQUIRY and REPORT LUNS leave it alone.
    rig.good(1, &[0x12, 0, 0, 0, 36, 0], &[]);
    rig.good(1, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], &[]);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (6, 0x2900));
    rig.good(1, &[0; 6], &[]);
    // REQUEST SENSE takes it as data.
    let sense = rig.good(0, &[3, 0, 0, 0, 18, 0], &[]);
    assert_eq!((sense[2], sense[12]), (6, 0x29));
    rig.good(0, &[0; 6], &[]);
}

#[test]
fn capacity_and_lun_list_changes_are_told_to_everyone() {
    let mut rig = Rig::new();
    let mut actions = Actions::default();
    let bigger = info(1, 16 * MIB);
    rig.target
        .device_changed(1, bigger, Fate::Alive, &mut actions);
    for nexus in [A, B] {
        assert_eq!(sense_of(&rig.run(nexus, 1, &[0; 6], &[])), (6, 0x2a09));
    }
    let lun = LunConfig {
        lun: 2,
        info: info(2, MIB),
        settings: LunSettings::default(),
    };
    rig.volumes.insert(2, Memory::new(MIB));
    rig.reservations.insert(2, Reservations::default());
    rig.target.add_lun(lun, &mut actions);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (6, 0x3f0e));
    rig.good(1, &[0; 6], &[]);
    rig.good(2, &[0; 6], &[]);
    // SPC-4 §6.33: REPORT LUNS takes it away.
    rig.run(B, 0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], &[]);
    assert_eq!(rig.run(B, 1, &[0; 6], &[]).status, Status::Good);
    rig.target.remove_lun(2, &mut actions);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (6, 0x3f0e));
    assert_eq!(rig.sense(2, &[0; 6], &[]), (5, 0x2500));
}

// SAM-5 §7.2: after the answer the task has no effect any more.
#[test]
fn abort_task_is_answered_when_its_write_has_ended() {
    let mut rig = Rig::new();
    rig.holds = true;
    let tag = write(&mut rig, A, 0);
    manage(&mut rig, A, TaskFunction::AbortTask, 1, tag);
    assert_eq!(rig.aborted, [(A, tag)]);
    assert_eq!(rig.managed, []);
    rig.release_held();
    assert_eq!(rig.managed, [(1, TaskResponse::Complete)]);
    assert!(rig.ended(tag).is_none());
}

#[test]
fn abort_of_a_read_is_answered_at_once() {
    let mut rig = Rig::new();
    rig.holds = true;
    let tag = rig.send(A, 1, &cdb10(0x28, 0, 0, 1), &[]);
    manage(&mut rig, A, TaskFunction::AbortTask, 1, tag);
    assert_eq!(rig.managed, [(1, TaskResponse::Complete)]);
    rig.release_held();
    assert!(rig.ended(tag).is_none());
}

#[test]
fn abort_of_what_is_not_there() {
    let mut rig = Rig::new();
    rig.holds = true;
    let tag = write(&mut rig, A, 0);
    manage(&mut rig, B, TaskFunction::AbortTask, 1, tag);
    manage(&mut rig, A, TaskFunction::AbortTask, 0, tag);
    manage(&mut rig, A, TaskFunction::AbortTask, 9, tag);
    manage(&mut rig, A, TaskFunction::ClearAca, 1, tag);
    assert_eq!(
        rig.managed.iter().map(|it| it.1).collect::<Vec<_>>(),
        [
            TaskResponse::TaskDoesNotExist,
            TaskResponse::TaskDoesNotExist,
            TaskResponse::LunDoesNotExist,
            TaskResponse::NotSupported,
        ]
    );
}

#[test]
fn abort_task_set_ends_ones_own_and_clear_task_set_all() {
    let mut rig = Rig::new();
    rig.holds = true;
    let (a, b) = (write(&mut rig, A, 0), write(&mut rig, B, 1));
    manage(&mut rig, A, TaskFunction::AbortTaskSet, 1, 0);
    assert_eq!(rig.aborted, [(A, a)]);
    manage(&mut rig, A, TaskFunction::ClearTaskSet, 1, 0);
    assert_eq!(rig.aborted, [(A, a), (B, b)]);
    rig.release_held();
    assert_eq!(rig.managed.len(), 2);
    rig.holds = false;
    // SAM-5 §7.4: those whose tasks went are told.
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2f00));
    rig.good(1, &[0; 6], &[]);
}

// SAM-5 §6.3.3, §7.6.
#[test]
fn logical_unit_reset() {
    let mut rig = Rig::with(LunSettings {
        removable: true,
        ..LunSettings::default()
    });
    rig.good(1, &[0x1e, 0, 0, 0, 1, 0], &[]);
    rig.holds = true;
    let (a, b) = (write(&mut rig, A, 0), write(&mut rig, B, 1));
    manage(&mut rig, A, TaskFunction::LogicalUnitReset, 1, 0);
    assert_eq!(rig.aborted, [(A, a), (B, b)]);
    assert_eq!(rig.managed, []);
    rig.release_held();
    assert_eq!(rig.managed, [(1, TaskResponse::Complete)]);
    for nexus in [A, B] {
        assert_eq!(sense_of(&rig.run(nexus, 1, &[0; 6], &[])), (6, 0x2903));
        assert_eq!(rig.run(nexus, 1, &[0; 6], &[]).status, Status::Good);
    }
    // The removal is not prevented any more.
    rig.good(1, &[0x1b, 0, 0, 0, 2, 0], &[]);
}

#[test]
fn target_resets() {
    let mut rig = Rig::new();
    manage(&mut rig, A, TaskFunction::TargetWarmReset, 0, 0);
    assert_eq!(rig.managed, [(1, TaskResponse::Complete)]);
    for lun in [0, 1] {
        assert_eq!(rig.sense(lun, &[0; 6], &[]), (6, 0x2903));
    }
    assert_eq!(rig.dropped, []);
    manage(&mut rig, A, TaskFunction::TargetColdReset, 0, 0);
    assert_eq!(rig.dropped, [A, B]);
}

// SAM-5 §8.
#[test]
fn ordered_and_head_of_queue() {
    let mut rig = Rig::new();
    rig.holds = true;
    write(&mut rig, A, 0);
    let cdb = cdb10(0x2a, 0, 1, 1);
    let ordered = rig.send_as(A, 1, &cdb, &[2; 512], TaskAttribute::Ordered);
    let simple = write(&mut rig, B, 2);
    assert_eq!(rig.held.len(), 1);
    rig.send_as(A, 1, &cdb, &[3; 512], TaskAttribute::HeadOfQueue);
    assert_eq!(rig.held.len(), 2);
    rig.release_held();
    let order: Vec<u32> = rig.done.iter().map(|it| it.1).collect();
    assert_eq!(order[2..], [ordered, simple]);
}

#[test]
fn aca_is_refused() {
    let mut rig = Rig::new();
    let tag = rig.send_as(A, 1, &[0; 6], &[], TaskAttribute::Aca);
    assert_eq!(sense_of(&rig.ended(tag).unwrap()), (5, 0x4900));
    assert_eq!(rig.sense(1, &[0, 0, 0, 0, 0, 4], &[]), INVALID_CDB);
}

#[test]
fn too_many_tasks_are_told_so() {
    let mut rig = Rig::new();
    rig.holds = true;
    for lba in 0..NEXUS_TASKS_MAX {
        write(&mut rig, A, lba as u32);
    }
    let tag = write(&mut rig, A, 0);
    assert_eq!(rig.ended(tag).unwrap().status, Status::TaskSetFull);
    let tag = write(&mut rig, B, 0);
    assert!(rig.ended(tag).is_none());
    rig.release_held();
    rig.holds = false;
    assert_eq!(rig.run(A, 1, &[0; 6], &[]).status, Status::Good);
}

// Issue 3, item 7: BUSY, then NOT READY; a late write must not overtake a newer one.
#[test]
fn without_a_majority_commands_are_answered_in_time() {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.holds = true;
    let first = write(&mut rig, A, 0);
    rig.tick(12);
    assert!(rig.ended(first).is_none());
    rig.tick(14);
    assert_eq!(rig.ended(first).unwrap().status, Status::Busy);
    // The same block: not before the first request has ended.
    let again = write(&mut rig, A, 0);
    let other = write(&mut rig, A, 8);
    rig.tick(30);
    for tag in [again, other] {
        assert_eq!(sense_of(&rig.ended(tag).unwrap()), (2, 0x040a));
    }
    rig.release_held();
    rig.holds = false;
    assert_eq!(
        rig.run(A, 1, &cdb10(0x2a, 0, 0, 1), &[5; 512]).status,
        Status::Good
    );
    assert_eq!(rig.volumes[&1].bytes[0], 5);
}

/// A task of another initiator wrote these blocks, was aborted and may still take effect.
fn with_leftover() -> Rig {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.holds = true;
    let tag = write(&mut rig, B, 0);
    manage(&mut rig, B, TaskFunction::AbortTask, 1, tag);
    rig.holds = false;
    rig
}

#[test]
fn a_command_waits_for_what_was_left_over_in_its_blocks() {
    let mut rig = with_leftover();
    let new = rig.send(A, 1, &cdb10(0x2a, 0, 0, 1), &[5; 512]);
    let read = rig.send(A, 1, &cdb10(0x28, 0, 0, 1), &[]);
    let aside = rig.send(A, 1, &cdb10(0x28, 0, 9, 1), &[]);
    assert!(rig.ended(new).is_none() && rig.ended(read).is_none());
    assert_eq!(rig.ended(aside).unwrap().status, Status::Good);
    rig.release_held();
    for tag in [new, read] {
        assert_eq!(rig.ended(tag).unwrap().status, Status::Good);
    }
    assert_eq!(rig.volumes[&1].bytes[0], 5);
}

#[test]
fn a_command_that_waited_is_bound_by_the_reservations_of_then() {
    let mut rig = with_leftover();
    let new = rig.send(A, 1, &cdb10(0x2a, 0, 0, 1), &[5; 512]);
    // RESERVE(6).
    let reserved = rig.run(B, 1, &[0x16, 0, 0, 0, 0, 0], &[]);
    assert_eq!(reserved.status, Status::Good);
    assert!(rig.ended(new).is_none());
    rig.release_held();
    assert_eq!(rig.ended(new).unwrap().status, Status::ReservationConflict);
    assert_ne!(rig.volumes[&1].bytes[0], 5);
}

#[test]
fn a_command_that_waited_and_was_aborted_does_nothing() {
    let mut rig = with_leftover();
    let new = rig.send(A, 1, &cdb10(0x2a, 0, 0, 1), &[5; 512]);
    manage(&mut rig, A, TaskFunction::AbortTask, 1, new);
    rig.release_held();
    assert!(rig.ended(new).is_none());
    assert_ne!(rig.volumes[&1].bytes[0], 5);
}

#[test]
fn a_reset_that_cannot_end_is_refused_in_time() {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.holds = true;
    write(&mut rig, A, 0);
    manage(&mut rig, A, TaskFunction::LogicalUnitReset, 1, 0);
    rig.tick(14);
    assert_eq!(rig.managed, [(1, TaskResponse::Rejected)]);
}

#[test]
fn a_reset_that_the_cell_does_not_do_is_refused() {
    let mut rig = Rig::new();
    rig.is_cut = true;
    manage(&mut rig, A, TaskFunction::LogicalUnitReset, 1, 0);
    manage(&mut rig, A, TaskFunction::TargetColdReset, 0, 0);
    let rejected = (1, TaskResponse::Rejected);
    assert_eq!(rig.managed, [rejected, rejected]);
    assert_eq!(rig.dropped, []);
}

/// Nobody calls `tick` while nobody is logged in.
#[test]
fn a_command_after_a_pause_is_not_late() {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.target
        .note_time(Instant::default() + Duration::from_secs(100));
    rig.holds = true;
    let tag = write(&mut rig, A, 0);
    rig.tick(101);
    assert!(rig.ended(tag).is_none());
    rig.release_held();
    assert_eq!(rig.ended(tag).unwrap().status, Status::Good);
}

/// NOT READY is for a disk that is silent, not for one request that is slow.
#[test]
fn a_disk_that_answers_others_is_busy_at_most() {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.holds = true;
    let slow = write(&mut rig, A, 0);
    rig.holds = false;
    rig.tick(5);
    rig.run(B, 1, &cdb10(0x28, 0, 9, 1), &[]);
    rig.tick(14);
    assert_eq!(rig.ended(slow).unwrap().status, Status::Busy);
    rig.tick(40);
    let again = write(&mut rig, A, 0);
    rig.tick(45);
    rig.run(B, 1, &cdb10(0x28, 0, 9, 1), &[]);
    rig.tick(80);
    assert_eq!(rig.ended(again).unwrap().status, Status::Busy);
}

/// Issue 3, item 7, of commands that touch no blocks.
#[test]
fn a_disk_whose_servers_are_silent_is_not_ready() {
    let mut rig = Rig::new();
    rig.tick(1);
    rig.is_cut = true;
    assert_eq!(rig.run(A, 1, &[0; 6], &[]).status, Status::Busy);
    rig.tick(20);
    assert_eq!(rig.sense(1, &[0; 6], &[]), (2, 0x040a));
    // The list of disks, and what they are, is known here.
    rig.good(1, &[0x12, 0, 0, 0, 36, 0], &[]);
    rig.good(1, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], &[]);
    rig.is_cut = false;
    rig.good(1, &[0; 6], &[]);
}

#[test]
fn a_lost_nexus_leaves_nothing_behind() {
    let mut rig = Rig::new();
    rig.holds = true;
    write(&mut rig, A, 0);
    rig.send_as(
        A,
        1,
        &cdb10(0x2a, 0, 0, 1),
        &[2; 512],
        TaskAttribute::Ordered,
    );
    let mut actions = Actions::default();
    rig.target.detach(A, &mut actions);
    rig.drive(actions);
    assert_eq!(rig.aborted.len(), 2);
    rig.release_held();
    assert!(rig.target.tasks.is_empty());
    assert!(rig.target.requests.is_empty());
    rig.holds = false;
    assert_eq!(
        rig.run(B, 1, &cdb10(0x28, 0, 0, 1), &[]).status,
        Status::Good
    );
}

fn start_stop(bits: u8) -> [u8; 6] {
    [0x1b, 0, 0, 0, bits, 0]
}

// SBC-3 §5.25, §5.12.
#[test]
fn medium_is_ejected_prevented_and_loaded() {
    let mut rig = Rig::with(LunSettings {
        removable: true,
        ..LunSettings::default()
    });
    // With a power condition, or without LOEJ, nothing happens.
    for bits in [0x12, 0x10, 0x00] {
        rig.good(1, &start_stop(bits), &[]);
        rig.good(1, &[0; 6], &[]);
    }
    rig.run(B, 1, &[0x1e, 0, 0, 0, 1, 0], &[]);
    assert_eq!(rig.sense(1, &start_stop(2), &[]), (5, 0x5302));
    rig.run(B, 1, &[0x1e, 0, 0, 0, 0, 0], &[]);
    rig.good(1, &start_stop(2), &[]);
    for cdb in [
        vec![0; 6],
        cdb10(0x28, 0, 0, 1),
        cdb10(0x2a, 0, 0, 1),
        cdb10(0x35, 0, 0, 1),
        cdb16(0x8f, 0, 0, 1),
        cdb16(0x89, 0, 0, 0),
        vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
        vec![0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(rig.sense(1, &cdb, &[]), (2, 0x3a00), "{cdb:x?}");
    }
    rig.good(1, &[0x1a, 0, 0x3f, 0, 255, 0], &[]);
    rig.good(1, &[0x1e, 0, 0, 0, 1, 0], &[]);
    assert_eq!(rig.sense(1, &start_stop(3), &[]), (5, 0x5302));
    rig.good(1, &[0x1e, 0, 0, 0, 0, 0], &[]);
    rig.good(1, &start_stop(3), &[]);
    rig.good(1, &cdb10(0x28, 0, 0, 1), &[]);
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2800));
}

#[test]
fn prevention_ends_with_its_nexus() {
    let mut rig = Rig::with(LunSettings {
        removable: true,
        ..LunSettings::default()
    });
    rig.run(B, 1, &[0x1e, 0, 0, 0, 1, 0], &[]);
    let mut actions = Actions::default();
    rig.target.detach(B, &mut actions);
    rig.good(1, &start_stop(2), &[]);
}

#[test]
fn fixed_disks_cannot_be_ejected() {
    let mut rig = Rig::new();
    assert_eq!(rig.sense(1, &start_stop(2), &[]), INVALID_CDB);
    rig.good(1, &start_stop(1), &[]);
}

#[test]
fn deleted_and_fenced_volumes() {
    let mut rig = Rig::new();
    for (fate, sense) in [(Fate::Fenced, (2, 0x040a)), (Fate::Deleted, (5, 0x2500))] {
        rig.target
            .device_changed(1, info(1, 8 * MIB), fate, &mut Actions::default());
        assert_eq!(rig.sense(1, &[0; 6], &[]), sense);
    }
}
