//! CmdSN, ExpCmdSN, MaxCmdSN and StatSN.

use super::*;

// Group: CmdSN (RFC 7143 §4.2.2.1).

#[test]
fn cmd_sn_wraps_and_the_window_is_at_least_128() {
    let mut bench = Bench::new("");
    for itt in 0..40 {
        let read = bench.read(itt, 512);
        bench.command(read, b"");
        assert_eq!(bench.tags(), [itt]);
        bench.finish(itt, with_data(512));
        let pdu = bench.only();
        assert_eq!(word(&pdu.bhs, 28), bench.cmd_sn);
        let window = word(&pdu.bhs, 32)
            .wrapping_sub(word(&pdu.bhs, 28))
            .wrapping_add(1);
        assert!(window >= 128, "{window}");
    }
}

#[test]
fn cmd_sn_outside_of_the_window_is_silently_ignored() {
    let mut bench = Bench::new("");
    let (low, high) = (FIRST.wrapping_sub(1), FIRST.wrapping_add(TASKS_MAX));
    for cmd_sn in [
        low,
        FIRST.wrapping_sub(0x7fff_0000),
        high,
        high.wrapping_add(1000),
    ] {
        let mut read = bench.read(5, 512);
        read.common.cmd_sn = cmd_sn;
        bench.command(read, b"");
        assert!(
            bench.outputs().is_empty() && bench.sent().is_empty(),
            "{cmd_sn:#x}"
        );
    }
    assert!(bench.session.ending().is_none());
    bench.cmd_sn = FIRST;
    let read = bench.read(6, 512);
    bench.command(read, b"");
    assert_eq!(bench.tags(), [6]);
}

#[test]
fn commands_are_delivered_in_order_of_cmd_sn() {
    let mut bench = Bench::new("");
    let commands: Vec<_> = (0..4).map(|itt| bench.read(itt, 512)).collect();
    for at in [2, 1, 3] {
        bench.command(commands[at].clone(), b"");
        assert!(bench.outputs().is_empty());
    }
    // Once more, as a retry.
    bench.command(commands[2].clone(), b"");
    bench.command(commands[0].clone(), b"");
    assert_eq!(bench.tags(), [0, 1, 2, 3]);
}

#[test]
fn immediate_commands_do_not_take_a_cmd_sn_and_need_no_window() {
    let mut bench = Bench::new("");
    for itt in 0..TASKS_MAX {
        let read = bench.read(itt, 512);
        bench.command(read, b"");
    }
    assert_eq!(bench.submitted().len(), TASKS_MAX as usize);
    // The window is closed.
    let read = bench.read(1000, 512);
    bench.command(read, b"");
    assert!(bench.outputs().is_empty());
    let nop = NopOut {
        common: bench.immediate(7),
        lun: [0; 8],
        ttt: RESERVED_TAG,
    };
    bench.send(&Request::NopOut(nop), b"ping");
    let pong = bench.only();
    assert_eq!(
        (code(&pong), &pong.data[..]),
        (opcode::NOP_IN, &b"ping"[..])
    );
    assert_eq!(word(&pong.bhs, 32).wrapping_add(1), word(&pong.bhs, 28));
    let mut urgent = bench.read(1001, 512);
    urgent.common.immediate = true;
    bench.command(urgent, b"");
    assert_eq!(bench.tags(), [1001]);
    // It opens again with the first answer.
    bench.finish(1001, with_data(512));
    bench.finish(0, with_data(512));
    let last = bench.sent().pop().unwrap();
    assert_eq!(word(&last.bhs, 32), word(&last.bhs, 28));
}

#[test]
fn immediate_commands_are_bounded() {
    let mut bench = Bench::new("");
    let total = TASKS_MAX as usize + IMMEDIATE_TASKS_MAX;
    for itt in 0..=total as u32 {
        let mut read = bench.read(itt, 512);
        read.common.immediate = true;
        bench.command(read, b"");
    }
    assert_eq!(bench.session.tasks(), total);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2]),
        (opcode::REJECT, Reason::TooManyImmediate as u8)
    );
}

/// One request of every kind that takes a CmdSN.
fn numbered(bench: &mut Bench) -> [Request; 5] {
    [
        Request::Command(bench.read(1, 512)),
        Request::NopOut(NopOut {
            common: bench.common(2),
            lun: [0; 8],
            ttt: RESERVED_TAG,
        }),
        Request::Text(TextRequest {
            common: bench.common(3),
            last: true,
            continues: false,
            lun: [0; 8],
            ttt: RESERVED_TAG,
        }),
        Request::Task(TaskRequest {
            common: bench.common(4),
            function: 8,
            lun: LUN,
            referenced_tag: 1,
            ref_cmd_sn: 0,
        }),
        // The reason is for connection recovery, which there is none of: the session stays.
        Request::Logout(LogoutRequest {
            common: bench.common(5),
            reason: 2,
            cid: 0,
        }),
    ]
}

#[test]
fn every_request_takes_one_cmd_sn() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1");
    for (at, request) in (1..).zip(numbered(&mut bench)) {
        bench.send(&request, b"");
        assert_eq!(bench.session.window().exp_cmd_sn, FIRST.wrapping_add(at));
    }
    // Data, SNACK, and what is immediate take none.
    let before = bench.session.window().exp_cmd_sn;
    let mut write = bench.write(9, 512);
    write.common.immediate = true;
    bench.command(write, b"");
    let (_, _, ttt) = bench.sent().last().map(r2t).unwrap();
    bench.data_out(9, ttt, 0, 0, &[1; 512], true);
    let snack = Snack {
        kind: 0,
        itt: 1,
        ttt: RESERVED_TAG,
        exp_stat_sn: bench.exp_stat_sn,
        first: 0,
        count: 0,
    };
    bench.send(&Request::Snack(snack), b"");
    assert_eq!(bench.session.window().exp_cmd_sn, before);
    assert_eq!(bench.tags(), [1, 9]);
}

#[test]
fn a_hole_holds_back_requests_of_every_kind() {
    for held in 0..5 {
        let mut bench = Bench::new("");
        let lost = bench.read(77, 512);
        let request = numbered(&mut bench)[held].clone();
        let request = with_cmd_sn(request, FIRST.wrapping_add(1));
        bench.send(&request, b"");
        assert!(
            bench.outputs().is_empty() && bench.sent().is_empty(),
            "{request:?}"
        );
        assert_eq!(bench.session.window().exp_cmd_sn, FIRST);
        bench.command(lost, b"");
        let done = bench.outputs().len() + bench.sent().len();
        assert_eq!(
            (done, bench.session.window().exp_cmd_sn),
            (2, FIRST.wrapping_add(2))
        );
    }
}

fn with_cmd_sn(mut request: Request, cmd_sn: u32) -> Request {
    match &mut request {
        Request::Command(it) => it.common.cmd_sn = cmd_sn,
        Request::NopOut(it) => it.common.cmd_sn = cmd_sn,
        Request::Text(it) => it.common.cmd_sn = cmd_sn,
        Request::Task(it) => it.common.cmd_sn = cmd_sn,
        Request::Logout(it) => it.common.cmd_sn = cmd_sn,
        other => panic!("{other:?} has no CmdSN"),
    }
    request
}

#[test]
fn a_retry_of_what_was_received_does_nothing() {
    let mut bench = Bench::new("");
    for request in numbered(&mut bench) {
        bench.send(&request, b"");
        bench.outputs();
        bench.sent();
        bench.send(&request, b"");
        assert!(
            bench.outputs().is_empty() && bench.sent().is_empty(),
            "{request:?}"
        );
    }
    assert_eq!(bench.session.tasks(), 1);
}

#[test]
fn max_cmd_sn_never_falls() {
    let mut bench = Bench::new("");
    let mut highest = bench.session.window().max_cmd_sn;
    let mut check = |bench: &mut Bench| {
        for pdu in bench.sent() {
            let max = word(&pdu.bhs, 32);
            assert!(!serial_before(max, highest), "{max:#x} after {highest:#x}");
            highest = max;
        }
    };
    for itt in 0..TASKS_MAX {
        let cmd_sn = bench.cmd_sn;
        let mut read = bench.read(itt, 512);
        // One that takes no number has the room of one that would.
        read.common.immediate = itt % 8 == 7;
        if read.common.immediate {
            bench.cmd_sn = cmd_sn;
        }
        bench.command(read, b"");
        // So that the window is said often, while it closes.
        let ping = NopOut {
            common: bench.immediate(0x1000),
            lun: [0; 8],
            ttt: RESERVED_TAG,
        };
        bench.send(&Request::NopOut(ping), b"");
        check(&mut bench);
    }
    for itt in (0..TASKS_MAX).rev() {
        bench.finish(itt, with_data(512));
        check(&mut bench);
    }
    assert_eq!(
        bench.session.window().max_cmd_sn,
        bench.cmd_sn.wrapping_add(TASKS_MAX - 1)
    );
}

// Group: StatSN.

#[test]
fn stat_sn_counts_statuses_only() {
    let mut bench = Bench::new("MaxRecvDataSegmentLength=512");
    let read = bench.read(1, 1024);
    bench.command(read, b"");
    let write = bench.write(2, 4096);
    bench.command(write, b"");
    bench.finish(1, with_data(1024));
    let sent = bench.sent();
    let codes: Vec<u8> = sent.iter().map(code).collect();
    assert_eq!(codes, [opcode::R2T, opcode::DATA_IN, opcode::DATA_IN]);
    // R2T says the next one, Data-In without status none, and that with status takes it.
    let numbers: Vec<u32> = sent.iter().map(|it| word(&it.bhs, 24)).collect();
    assert_eq!(numbers, [100, 0, 100]);
    let nop = NopOut {
        common: bench.immediate(7),
        lun: [0; 8],
        ttt: RESERVED_TAG,
    };
    bench.send(&Request::NopOut(nop), b"");
    assert_eq!(word(&bench.only().bhs, 24), 101);
}

#[test]
fn every_kind_of_answer_takes_one_stat_sn() {
    let mut bench = Bench::new("");
    let requests = numbered(&mut bench);
    let codes = [
        opcode::DATA_IN,
        opcode::NOP_IN,
        opcode::TEXT_RESPONSE,
        opcode::TASK_RESPONSE,
        opcode::LOGOUT_RESPONSE,
    ];
    let mut stat_sn = 100;
    for (request, expected) in requests.iter().zip(codes) {
        bench.send(request, b"");
        for command in bench.submitted() {
            bench.finish(command.tag, with_data(512));
        }
        let answer = bench.only();
        assert_eq!((code(&answer), word(&answer.bhs, 24)), (expected, stat_sn));
        stat_sn += 1;
    }
    // A Reject has one of its own, and so has a logout request of ours.
    let nameless = bench.read(RESERVED_TAG, 512);
    bench.command(nameless, b"");
    bench
        .session
        .request_logout(bench.now, Duration::from_secs(5));
    let sent = bench.sent();
    let said: Vec<_> = sent
        .iter()
        .map(|it| (code(it), word(&it.bhs, 24)))
        .collect();
    assert_eq!(
        said,
        [
            (opcode::REJECT, stat_sn),
            (opcode::ASYNC_MESSAGE, stat_sn + 1)
        ]
    );
}

#[test]
fn an_exp_stat_sn_from_nowhere_does_no_harm() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1");
    for (itt, exp_stat_sn) in [
        (1, 100),
        (2, 0x7fff_ffff),
        (3, 99),
        (4, 0x9000_0000),
        (5, 102),
    ] {
        bench.exp_stat_sn = exp_stat_sn;
        let read = bench.read(itt, 512);
        bench.command(read, b"");
        bench.finish(itt, with_data(512));
        assert_eq!(word(&bench.only().bhs, 24), 99 + itt, "{exp_stat_sn:#x}");
    }
}
