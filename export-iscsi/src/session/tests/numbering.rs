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
