//! Digests and error recovery level 1.

use super::*;

// Group: digests and error recovery level 1 (§7).

fn damaged(bench: &mut Bench, request: &Request, data: &[u8]) {
    let mut input = BytesMut::from(&encode_whole(request, data)[..]);
    let mut pdu = Framing::new(1 << 24).poll(&mut input).unwrap().unwrap();
    pdu.data_is_intact = false;
    bench.session.handle_pdu(bench.now, 0, pdu);
}

fn out(itt: u32, ttt: u32, data_sn: u32, offset: u32, last: bool) -> Request {
    Request::DataOut(DataOut {
        last,
        lun: LUN,
        itt,
        ttt,
        exp_stat_sn: 100,
        data_sn,
        buffer_offset: offset,
    })
}

#[test]
fn damaged_data_at_level_0_fails_the_task_when_all_has_come() {
    let mut bench = Bench::new("");
    let write = bench.write(1, 1024);
    bench.command(write, b"");
    let (_, _, ttt) = r2t(&bench.only());
    damaged(&mut bench, &out(1, ttt, 0, 0, false), &[1; 512]);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2]),
        (opcode::REJECT, Reason::DataDigest as u8)
    );
    bench.data_out(1, ttt, 1, 512, &[1; 512], true);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x47, 0x05));
}

#[test]
fn damaged_command_at_level_0_ends_the_session() {
    let mut bench = Bench::new("");
    let write = Request::Command(bench.write(1, 512));
    damaged(&mut bench, &write, &[1; 512]);
    assert_eq!(bench.only().bhs[2], Reason::DataDigest as u8);
    assert_eq!(bench.session.ending(), Some(Ending::DataDigest));
}

#[test]
fn damaged_data_at_level_1_is_asked_for_again() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1 MaxBurstLength=2048 MaxOutstandingR2T=2");
    let write = bench.write(1, 4096);
    bench.command(write, b"");
    let asked: Vec<_> = bench.sent().iter().map(r2t).collect();
    let (first, second) = (asked[0].2, asked[1].2);
    bench.data_out(1, first, 0, 0, &[1; 1024], false);
    damaged(&mut bench, &out(1, first, 1, 1024, true), &[2; 1024]);
    let sent = bench.sent();
    assert_eq!(sent[0].bhs[2], Reason::DataDigest as u8);
    let (offset, length, again) = r2t(&sent[1]);
    assert_eq!((offset, length, word(&sent[1].bhs, 36)), (1024, 1024, 2));
    // What was under way meanwhile comes too early, and is asked for again as well.
    bench.data_out(1, second, 0, 2048, &[3; 2048], true);
    let (offset, length, third) = r2t(&bench.only());
    assert_eq!((offset, length), (2048, 2048));
    bench.data_out(1, again, 0, 1024, &[2; 1024], true);
    bench.data_out(1, third, 0, 2048, &[3; 2048], true);
    let data = bench.submitted()[0].data_out.concat();
    assert_eq!(
        (data.len(), data[1023], data[1024], data[2048]),
        (4096, 1, 2, 3)
    );
}

#[test]
fn damaged_command_at_level_1_is_sent_again() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1");
    let write = Request::Command(bench.write(1, 512));
    damaged(&mut bench, &write, &[1; 512]);
    assert_eq!(bench.only().bhs[2], Reason::DataDigest as u8);
    bench.send(&write, &[1; 512]);
    assert_eq!(bench.tags(), [1]);
}

fn snack(bench: &mut Bench, kind: u8, itt: u32, first: u32, count: u32) {
    let request = Snack {
        kind,
        itt,
        ttt: RESERVED_TAG,
        exp_stat_sn: bench.exp_stat_sn,
        first,
        count,
    };
    bench.send(&Request::Snack(request), b"");
}

#[test]
fn snack_at_level_0_is_rejected() {
    let mut bench = Bench::new("");
    snack(&mut bench, 1, RESERVED_TAG, 100, 1);
    assert_eq!(bench.only().bhs[2], Reason::Snack as u8);
}

#[test]
fn snack_for_data_and_status() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1 MaxRecvDataSegmentLength=512");
    for itt in [1, 2] {
        let read = bench.read(itt, 1536);
        bench.command(read, b"");
        bench.finish(itt, with_data(1536));
    }
    let sent = bench.sent();
    assert_eq!(sent.len(), 6);
    snack(&mut bench, 0, 1, 1, 1);
    let again = bench.sent();
    assert_eq!(again.len(), 1);
    assert_eq!((word(&again[0].bhs, 36), word(&again[0].bhs, 40)), (1, 512));
    assert_eq!(again[0].data, sent[1].data);
    snack(&mut bench, 1, RESERVED_TAG, 101, 1);
    let again = bench.only();
    assert_eq!((word(&again.bhs, 24), word(&again.bhs, 16)), (101, 2));
    // All of a task's data.
    snack(&mut bench, 0, 2, 0, 0);
    assert_eq!(bench.sent().len(), 3);
    // What was acknowledged is gone.
    bench.exp_stat_sn = 102;
    snack(&mut bench, 0, 1, 0, 0);
    assert_eq!(bench.only().bhs[2], Reason::Snack as u8);
    snack(&mut bench, 2, 1, 0, 0);
    assert_eq!(bench.only().bhs[2], Reason::InvalidDataAck as u8);
}

#[test]
fn snack_for_an_r2t() {
    let mut bench = Bench::new("ErrorRecoveryLevel=1");
    let write = bench.write(1, 512);
    bench.command(write, b"");
    let first = r2t(&bench.only());
    snack(&mut bench, 0, 1, 0, 1);
    assert_eq!(r2t(&bench.only()), first);
}
