//! Requests other than commands, and what becomes of tasks.

use super::*;

// Group: task attributes.

#[test]
fn ordered_tasks_do_not_overtake() {
    let mut bench = Bench::new("");
    let slow = bench.write(1, 512);
    bench.command(slow, b"");
    let (_, _, ttt) = r2t(&bench.only());
    let simple = bench.read(2, 512);
    bench.command(simple, b"");
    assert_eq!(bench.tags(), [2]);
    let mut ordered = bench.read(3, 512);
    ordered.attribute = 2;
    bench.command(ordered, b"");
    let late = bench.read(4, 512);
    bench.command(late, b"");
    assert!(bench.outputs().is_empty());
    let mut other = bench.read(5, 512);
    other.lun = [0; 8];
    bench.command(other, b"");
    assert_eq!(bench.tags(), [5]);
    bench.data_out(1, ttt, 0, 0, &[1; 512], true);
    assert_eq!(bench.tags(), [1, 3, 4]);
}

#[test]
fn a_tag_in_use_is_refused() {
    let mut bench = Bench::new("");
    for _ in 0..2 {
        let read = bench.read(1, 512);
        bench.command(read, b"");
    }
    assert_eq!(bench.tags(), [1]);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2]),
        (opcode::REJECT, Reason::TaskInProgress as u8)
    );
}

// Group: task management (§11.5, §11.6).

#[test]
fn abort_task_that_waits_for_data() {
    let mut bench = Bench::new("");
    let write = bench.write(1, 512);
    bench.command(write, b"");
    let (_, _, ttt) = r2t(&bench.only());
    bench.task_request(1, 1, FIRST);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2], word(&pdu.bhs, 16)),
        (opcode::TASK_RESPONSE, 0, 0x77)
    );
    bench.data_out(1, ttt, 0, 0, &[1; 512], true);
    assert!(bench.sent().is_empty() && bench.outputs().is_empty());
}

#[test]
fn abort_task_that_the_target_has() {
    let mut bench = Bench::new("");
    let read = bench.read(1, 512);
    bench.command(read, b"");
    bench.submitted();
    bench.task_request(1, 1, FIRST);
    let outputs = bench.outputs();
    let [
        Output::Manage {
            id,
            function: TaskFunction::AbortTask,
            lun: LUN,
            tag: 1,
        },
    ] = outputs[..]
    else {
        panic!("{outputs:?}");
    };
    bench.session.handle_aborted(1);
    bench.session.handle_managed(id, TaskResponse::Complete);
    assert_eq!(code(&bench.only()), opcode::TASK_RESPONSE);
    bench.finish(1, with_data(512));
    assert!(bench.sent().is_empty());
}

#[test]
fn abort_task_that_does_not_exist_or_has_not_come() {
    let mut bench = Bench::new("");
    bench.task_request(1, 55, FIRST.wrapping_sub(1));
    assert_eq!(bench.only().bhs[2], 1);
    // A command that was lost: its CmdSN counts as received.
    let lost = bench.read(1, 512);
    let next = bench.read(2, 512);
    bench.command(next, b"");
    assert!(bench.outputs().is_empty());
    bench.task_request(1, 1, FIRST);
    assert_eq!(bench.only().bhs[2], 0);
    assert_eq!(bench.tags(), [2]);
    bench.command(lost, b"");
    assert!(bench.outputs().is_empty());
}

#[test]
fn resets_abort_what_the_target_does_not_have() {
    for (function, other_lun_goes) in [(2, false), (4, false), (5, false), (6, true), (7, true)] {
        let mut bench = Bench::new("");
        let write = bench.write(1, 512);
        bench.command(write, b"");
        let mut other = bench.write(2, 512);
        other.lun = [0; 8];
        bench.command(other, b"");
        bench.sent();
        bench.task_request(function, RESERVED_TAG, 0);
        assert!(matches!(bench.outputs()[..], [Output::Manage { .. }]));
        assert_eq!(
            bench.session.tasks(),
            usize::from(!other_lun_goes),
            "{function}"
        );
    }
}

#[test]
fn functions_that_are_not_supported() {
    let mut bench = Bench::new("");
    for (function, answer) in [(8, 4), (9, 5), (0, 5), (0x7f, 5)] {
        bench.task_request(function, 1, 0);
        assert_eq!(bench.only().bhs[2], answer);
    }
}

// Group: NOP (§11.18, §11.19).

#[test]
fn pings_are_answered_at_once_and_data_comes_back() {
    let mut bench = Bench::new("MaxRecvDataSegmentLength=512");
    let ping = NopOut {
        common: bench.common(9),
        lun: LUN,
        ttt: RESERVED_TAG,
    };
    bench.send(&Request::NopOut(ping), &[3; 600]);
    let pong = bench.only();
    assert_eq!(
        (word(&pong.bhs, 16), word(&pong.bhs, 20)),
        (9, RESERVED_TAG)
    );
    // No more than the initiator takes.
    assert_eq!(pong.data.len(), 512);
    let quiet = NopOut {
        common: bench.immediate(RESERVED_TAG),
        lun: LUN,
        ttt: 5,
    };
    bench.send(&Request::NopOut(quiet), b"");
    assert!(bench.sent().is_empty());
}

#[test]
fn silent_initiators_are_asked_and_then_dropped() {
    let mut bench = Bench::new("");
    let started = bench.now;
    assert_eq!(
        bench.session.poll_timeout(),
        Some(started + Duration::from_secs(10))
    );
    bench.now = started + Duration::from_secs(10);
    bench.session.handle_timeout(bench.now);
    let probe = bench.only();
    assert_eq!(
        (code(&probe), word(&probe.bhs, 16)),
        (opcode::NOP_IN, RESERVED_TAG)
    );
    assert_ne!(word(&probe.bhs, 20), RESERVED_TAG);
    assert_eq!(word(&probe.bhs, 24), 100, "no StatSN is taken");
    // An answer keeps it.
    let pong = NopOut {
        common: bench.immediate(RESERVED_TAG),
        lun: [0; 8],
        ttt: word(&probe.bhs, 20),
    };
    bench.send(&Request::NopOut(pong), b"");
    for seconds in [20, 29] {
        bench
            .session
            .handle_timeout(started + Duration::from_secs(seconds));
    }
    assert_eq!(bench.session.ending(), None);
    bench
        .session
        .handle_timeout(started + Duration::from_secs(30));
    assert_eq!(bench.session.ending(), Some(Ending::Dead));
}

// Group: text (§11.10) and SendTargets (appendix C).

fn text(bench: &mut Bench, ttt: u32, flags: u8, keys: &str) {
    let request = TextRequest {
        common: bench.common(0x55),
        last: flags & 0x80 != 0,
        continues: flags & 0x40 != 0,
        lun: [0; 8],
        ttt,
    };
    bench.send(&Request::Text(request), keys.replace(' ', "\0").as_bytes());
}

fn said(pdu: &Pdu) -> String {
    assert_eq!(code(pdu), opcode::TEXT_RESPONSE);
    String::from_utf8_lossy(&pdu.data)
        .replace('\0', " ")
        .trim()
        .to_owned()
}

#[test]
fn send_targets_in_discovery_over_many_pdus() {
    let mut bench = Bench::with(true, "MaxRecvDataSegmentLength=512");
    text(&mut bench, RESERVED_TAG, 0x80, "SendTargets=All");
    let outputs = bench.outputs();
    assert!(matches!(
        &outputs[..],
        [Output::ListTargets {
            cid: 0,
            wanted: Wanted::All
        }]
    ));
    let targets: Vec<_> = (0..20)
        .map(|it| {
            (
                format!("iqn.2001-03.jp.tritech:{it}"),
                vec!["10.0.0.1:3260,1".to_owned()],
            )
        })
        .collect();
    bench.session.handle_targets(0, &targets);
    let mut whole = Vec::new();
    loop {
        let pdu = bench.only();
        whole.extend_from_slice(&pdu.data);
        let ttt = word(&pdu.bhs, 20);
        if pdu.bhs[1] & FINAL != 0 {
            assert_eq!((pdu.bhs[1], ttt), (0x80, RESERVED_TAG));
            break;
        }
        assert_eq!((pdu.bhs[1], pdu.data.len()), (0x40, 512));
        text(&mut bench, ttt, 0x80, "");
    }
    let whole = String::from_utf8(whole).unwrap();
    assert_eq!(whole.matches("TargetName=").count(), 20);
    assert_eq!(whole.matches("TargetAddress=10.0.0.1:3260,1\0").count(), 20);
}

#[test]
fn send_targets_in_a_normal_session() {
    let mut bench = Bench::new("");
    text(&mut bench, RESERVED_TAG, 0x80, "SendTargets=All");
    assert_eq!(said(&bench.only()), "SendTargets=Reject");
    text(&mut bench, RESERVED_TAG, 0x80, "SendTargets=");
    let outputs = bench.outputs();
    assert!(matches!(
        &outputs[..],
        [Output::ListTargets {
            wanted: Wanted::This,
            ..
        }]
    ));
    bench.session.handle_targets(0, &[("iqn.x".into(), vec![])]);
    assert_eq!(said(&bench.only()), "TargetName=iqn.x");
    assert_eq!(bench.session.ending(), None);
}

#[test]
fn text_with_the_c_bit_and_unknown_keys() {
    let mut bench = Bench::new("");
    text(&mut bench, RESERVED_TAG, 0x40, "X-first=");
    let pdu = bench.only();
    let ttt = word(&pdu.bhs, 20);
    assert_eq!((pdu.bhs[1], said(&pdu)), (0, String::new()));
    assert_ne!(ttt, RESERVED_TAG);
    text(&mut bench, ttt, 0x80, "1 HeaderDigest=None");
    let pdu = bench.only();
    assert_eq!(said(&pdu), "X-first=NotUnderstood HeaderDigest=Reject");
    // Another exchange's tag.
    text(&mut bench, ttt, 0x80, "");
    assert_eq!(bench.only().bhs[2], Reason::InvalidField as u8);
    // F and C together, text that is none.
    text(&mut bench, RESERVED_TAG, 0xc0, "a=b");
    assert_eq!(code(&bench.only()), opcode::REJECT);
    text(&mut bench, RESERVED_TAG, 0x80, "junk");
    assert_eq!(code(&bench.only()), opcode::REJECT);
}

#[test]
fn the_initiators_segment_length_can_change() {
    let mut bench = Bench::new("");
    text(
        &mut bench,
        RESERVED_TAG,
        0x80,
        "MaxRecvDataSegmentLength=512",
    );
    assert_eq!(said(&bench.only()), "");
    let read = bench.read(1, 1024);
    bench.command(read, b"");
    bench.finish(1, with_data(1024));
    assert_eq!(bench.sent().len(), 2);
}

// Group: logout (§11.14).

fn logout(bench: &mut Bench, reason: u8, cid: u16) {
    let request = LogoutRequest {
        common: bench.common(0x66),
        reason,
        cid,
    };
    bench.send(&Request::Logout(request), b"");
}

#[test]
fn logout_closes_the_session_and_ends_its_tasks() {
    let mut bench = Bench::new("");
    let read = bench.read(1, 512);
    bench.command(read, b"");
    bench.submitted();
    logout(&mut bench, 0, 0);
    let pdu = bench.only();
    assert_eq!((code(&pdu), pdu.bhs[2]), (opcode::LOGOUT_RESPONSE, 0));
    assert_eq!(bench.session.ending(), Some(Ending::LoggedOut));
    assert!(bench.session.connection(0).unwrap().is_closing());
    bench.finish(1, with_data(512));
    let read = bench.read(2, 512);
    bench.command(read, b"");
    assert!(bench.sent().is_empty() && bench.outputs().is_empty());
}

#[test]
fn logout_that_cannot_be() {
    let mut bench = Bench::new("");
    logout(&mut bench, 1, 9);
    assert_eq!(bench.only().bhs[2], 1);
    logout(&mut bench, 2, 0);
    assert_eq!(bench.only().bhs[2], 2);
    assert_eq!(bench.session.ending(), None);
}

// Group: Reject (§11.17).

#[test]
fn unknown_opcodes_and_logins_are_rejected_with_their_header() {
    let mut bench = Bench::new("");
    for (opcode, reason) in [
        (0x1f, Reason::NotSupported),
        (0x3f, Reason::NotSupported),
        (0x03, Reason::ProtocolError),
    ] {
        let mut bhs = [0; 48];
        bhs[0] = opcode;
        bhs[20] = 0x99;
        let pdu = Pdu {
            bhs,
            ahs: Bytes::new(),
            data: Bytes::new(),
            data_is_intact: true,
        };
        bench.session.handle_pdu(bench.now, 0, pdu);
        let rejected = bench.only();
        assert_eq!(
            (code(&rejected), rejected.bhs[2]),
            (opcode::REJECT, reason as u8)
        );
        assert_eq!(&rejected.data[..], bhs);
        assert_eq!(word(&rejected.bhs, 16), RESERVED_TAG);
    }
    assert_eq!(bench.session.ending(), None);
}

#[test]
fn discovery_sessions_take_no_commands() {
    let mut bench = Bench::with(true, "");
    let read = bench.read(1, 512);
    bench.command(read, b"");
    assert_eq!(bench.only().bhs[2], Reason::ProtocolError as u8);
    bench.task_request(5, 0, 0);
    assert_eq!(bench.only().bhs[2], Reason::ProtocolError as u8);
    bench
        .session
        .handle_timeout(bench.now + Duration::from_secs(10));
    assert_eq!(bench.session.ending(), Some(Ending::Dead));
}

// Group: asynchronous messages (§11.9).

#[test]
fn drain_asks_for_a_logout_and_then_drops() {
    let mut bench = Bench::new("");
    bench
        .session
        .request_logout(bench.now, Duration::from_secs(5));
    let pdu = bench.only();
    assert_eq!((code(&pdu), pdu.bhs[36]), (opcode::ASYNC_MESSAGE, 1));
    assert_eq!(&pdu.bhs[42..44], [0, 5]);
    let due = bench.session.poll_timeout().unwrap();
    assert_eq!(due, bench.now + Duration::from_secs(5));
    bench.session.handle_timeout(due);
    assert_eq!(bench.only().bhs[36], 3);
    assert_eq!(bench.session.ending(), Some(Ending::Dropped));
}

// Group: multiple connections.

#[test]
fn answers_go_where_the_command_came_from() {
    let mut bench = Bench::new("MaxConnections=2");
    let params = bench.session.params().clone();
    assert!(bench.session.has_room_for(7));
    bench
        .session
        .add_connection(Connection::new(7, &params, 900, bench.now));
    assert!(!bench.session.has_room_for(8) && bench.session.has_room_for(7));
    let one = bench.read(1, 512);
    let two = bench.read(2, 512);
    // The second command comes first, on the other connection.
    bench.send_on(7, &Request::Command(two), b"");
    assert!(bench.outputs().is_empty());
    bench.send_on(0, &Request::Command(one), b"");
    assert_eq!(bench.tags(), [1, 2]);
    bench.finish(2, with_data(512));
    bench.finish(1, with_data(512));
    let (here, there) = (bench.only(), bench.sent_on(7));
    assert_eq!((word(&here.bhs, 16), word(&here.bhs, 24)), (1, 100));
    assert_eq!((word(&there[0].bhs, 16), word(&there[0].bhs, 24)), (2, 900));
    // One of them logs out: the session goes on.
    logout(&mut bench, 1, 7);
    assert_eq!(bench.only().bhs[2], 0);
    bench.session.handle_lost(7);
    assert_eq!(bench.session.ending(), None);
    // The other one is lost: it does not.
    bench.session.handle_lost(0);
    assert_eq!(bench.session.ending(), Some(Ending::Lost));
}

#[test]
fn a_connection_that_logs_out_takes_its_tasks_along() {
    let mut bench = Bench::new("MaxConnections=2");
    let params = bench.session.params().clone();
    bench
        .session
        .add_connection(Connection::new(7, &params, 900, bench.now));
    let one = bench.read(1, 512);
    bench.send_on(7, &Request::Command(one), b"");
    bench.submitted();
    logout(&mut bench, 1, 7);
    let outputs = bench.outputs();
    assert!(matches!(
        outputs[..],
        [Output::Manage {
            function: TaskFunction::AbortTask,
            tag: 1,
            ..
        }]
    ));
    assert_eq!(bench.session.tasks(), 0);
}

#[test]
fn all_connections_are_asked_to_log_out_and_one_answers_for_the_session() {
    let mut bench = Bench::new("MaxConnections=2");
    let params = bench.session.params().clone();
    bench
        .session
        .add_connection(Connection::new(7, &params, 900, bench.now));
    bench
        .session
        .request_logout(bench.now, Duration::from_secs(5));
    for cid in [0, 7] {
        let sent = bench.sent_on(cid);
        assert_eq!(
            (sent.len(), code(&sent[0]), sent[0].bhs[36]),
            (1, opcode::ASYNC_MESSAGE, 1)
        );
    }
    // Commands are still taken until then.
    let read = bench.read(1, 512);
    bench.command(read, b"");
    assert_eq!(bench.tags(), [1]);
    logout(&mut bench, 0, 7);
    let answer = bench.only();
    assert_eq!((code(&answer), answer.bhs[2]), (opcode::LOGOUT_RESPONSE, 0));
    for cid in [0, 7] {
        assert!(bench.session.connection(cid).unwrap().is_closing());
    }
    assert_eq!(bench.session.ending(), Some(Ending::LoggedOut));
}

#[test]
fn a_logout_says_how_long_to_wait_and_what_is_kept() {
    let mut bench = Bench::new("DefaultTime2Wait=3 DefaultTime2Retain=7");
    let (wait, retain) = (
        bench.session.params().time2wait,
        bench.session.params().time2retain,
    );
    logout(&mut bench, 0, 0);
    let bhs = bench.only().bhs;
    assert_eq!(
        (&bhs[40..42], &bhs[42..44]),
        (&wait.to_be_bytes()[..], &retain.to_be_bytes()[..])
    );
    assert_eq!((bhs[1], word(&bhs, 16)), (FINAL, 0x66));
}

#[test]
fn a_command_that_contradicts_itself() {
    let mut bench = Bench::new("");
    // F=0 says that unsolicited data follows, of a command that has none.
    let mut read = bench.read(1, 512);
    read.last = false;
    bench.command(read, b"");
    assert_eq!(bench.only().bhs[2], Reason::InvalidField as u8);
    // The tag that means "none".
    let read = bench.read(RESERVED_TAG, 512);
    bench.command(read, b"");
    assert_eq!(bench.only().bhs[2], Reason::InvalidField as u8);
    // Both ways, without saying how much is read: nothing is.
    let mut both = bench.write(2, 512);
    both.reads = true;
    bench.command(both, &[1; 512]);
    let command = bench.submitted().remove(0);
    assert_eq!((command.read_bytes, command.write_bytes), (0, 512));
    bench.finish(2, written(512));
    let pdu = bench.only();
    assert_eq!((code(&pdu), pdu.bhs[1] & 0x1e), (opcode::SCSI_RESPONSE, 0));
}

#[test]
fn a_task_management_request_waits_its_turn_unless_it_is_immediate() {
    let mut bench = Bench::new("");
    let lost = bench.read(1, 512);
    let request = TaskRequest {
        common: bench.common(0x77),
        function: 5,
        lun: LUN,
        referenced_tag: RESERVED_TAG,
        ref_cmd_sn: 0,
    };
    bench.send(&Request::Task(request), b"");
    assert!(bench.outputs().is_empty());
    bench.task_request(5, RESERVED_TAG, 0);
    assert!(matches!(bench.outputs()[..], [Output::Manage { .. }]));
    bench.command(lost, b"");
    // The read came before it, and so it is aborted by it.
    assert!(matches!(
        bench.outputs()[..],
        [
            Output::Submit(Command { tag: 1, .. }),
            Output::Manage { .. }
        ]
    ));
}

#[test]
fn abort_task_of_another_unit_or_from_beyond_the_window() {
    let mut bench = Bench::new("");
    let mut other = bench.write(1, 512);
    other.lun = [0; 8];
    bench.command(other, b"");
    bench.sent();
    bench.task_request(1, 1, FIRST);
    assert_eq!(bench.only().bhs[2], 1);
    assert_eq!(bench.session.tasks(), 1);
    // A CmdSN that is not before that of the request, and one beyond MaxCmdSN.
    for beyond in [0, 1, TASKS_MAX + 9] {
        let sn = bench.cmd_sn.wrapping_add(beyond);
        bench.task_request(1, 55, sn);
        assert_eq!(bench.only().bhs[2], 1, "{beyond}");
    }
    let read = bench.read(2, 512);
    bench.command(read, b"");
    assert_eq!(bench.tags(), [2]);
}

#[test]
fn a_new_text_request_ends_the_exchange_before_it() {
    let mut bench = Bench::new("");
    text(&mut bench, RESERVED_TAG, 0x40, "X-first=");
    let ttt = word(&bench.only().bhs, 20);
    text(&mut bench, RESERVED_TAG, 0x80, "X-second=2");
    let pdu = bench.only();
    assert_eq!(said(&pdu), "X-second=NotUnderstood");
    assert_eq!((pdu.bhs[1], word(&pdu.bhs, 20)), (FINAL, RESERVED_TAG));
    // Its tag is worth nothing any more.
    text(&mut bench, ttt, 0x80, "1");
    assert_eq!(bench.only().bhs[2], Reason::InvalidField as u8);
    assert_eq!(bench.session.ending(), None);
}
