//! The rules of the full feature phase; groups are those of UNH-IOL's plan for targets.

use super::*;
use crate::keys::{Negotiation, Pair, Wishes, parse};
use crate::pdu::framing::Framing;
use crate::pdu::request::{ScsiCommand, TextRequest, encode_whole};
use crate::pdu::{FINAL, data_bytes, word};
use crate::scsi::{Outcome, Status};
use bytes::BytesMut;
use proptest::prelude::*;
use pss_core::volume::device::ReadPart;
use std::io::IoSlice;

const LUN: [u8; 8] = [0, 1, 0, 0, 0, 0, 0, 0];
const FIRST: u32 = 0xffff_fff0;

/// A session with one connection, and the initiator's side of it.
struct Bench {
    session: Session,
    now: Instant,
    cmd_sn: u32,
    exp_stat_sn: u32,
}

fn params(keys: &str) -> Params {
    let mut negotiation = Negotiation::new(Wishes::default());
    let pairs: Vec<Pair> = parse(keys.replace(' ', "\0").as_bytes()).unwrap();
    negotiation.answer(&pairs, &mut Vec::new()).unwrap();
    negotiation.finish().unwrap()
}

impl Bench {
    fn with(discovery: bool, keys: &str) -> Bench {
        let params = params(keys);
        let probing = Probing::default();
        let mut session = Session::new(NexusId(1), discovery, params, probing, FIRST);
        let params = session.params().clone();
        let now = Instant(1_000_000_000);
        session.add_connection(Connection::new(0, &params, 100, now));
        Bench {
            session,
            now,
            cmd_sn: FIRST,
            exp_stat_sn: 100,
        }
    }

    fn new(keys: &str) -> Bench {
        Bench::with(false, keys)
    }

    fn common(&mut self, itt: u32) -> Common {
        let cmd_sn = self.cmd_sn;
        self.cmd_sn = cmd_sn.wrapping_add(1);
        Common {
            immediate: false,
            itt,
            cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        }
    }

    fn immediate(&self, itt: u32) -> Common {
        Common {
            immediate: true,
            itt,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        }
    }

    fn send_on(&mut self, cid: u16, request: &Request, data: &[u8]) {
        let mut input = BytesMut::from(&encode_whole(request, data)[..]);
        let pdu = Framing::new(1 << 24).poll(&mut input).unwrap().unwrap();
        self.session.handle_pdu(self.now, cid, pdu);
    }

    fn send(&mut self, request: &Request, data: &[u8]) {
        self.send_on(0, request, data);
    }

    /// What the target sent on a connection.
    fn sent_on(&mut self, cid: u16) -> Vec<Pdu> {
        let Some(connection) = self.session.connection(cid) else {
            return Vec::new();
        };
        let mut input = BytesMut::new();
        let queue = connection.sending();
        while !queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = queue.fill(&mut slices);
            let bytes: Vec<u8> = slices[..filled].iter().flat_map(|it| it.to_vec()).collect();
            queue.advance(bytes.len());
            input.extend_from_slice(&bytes);
        }
        let mut framing = Framing::new(1 << 24);
        std::iter::from_fn(|| framing.poll(&mut input).unwrap()).collect()
    }

    fn sent(&mut self) -> Vec<Pdu> {
        self.sent_on(0)
    }

    fn only(&mut self) -> Pdu {
        let mut sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        sent.remove(0)
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.session.poll_output()).collect()
    }

    fn submitted(&mut self) -> Vec<Command> {
        let command = |output| match output {
            Output::Submit(command) => command,
            other => panic!("{other:?}"),
        };
        self.outputs().into_iter().map(command).collect()
    }

    fn tags(&mut self) -> Vec<u32> {
        self.submitted().iter().map(|it| it.tag).collect()
    }

    fn read(&mut self, itt: u32, bytes: u32) -> ScsiCommand {
        ScsiCommand {
            common: self.common(itt),
            last: true,
            reads: true,
            writes: false,
            attribute: 1,
            lun: LUN,
            expected_bytes: bytes,
            cdb: [0x28; 16],
            long_cdb: None,
            bidirectional_read_bytes: None,
        }
    }

    fn write(&mut self, itt: u32, bytes: u32) -> ScsiCommand {
        ScsiCommand {
            reads: false,
            writes: true,
            ..self.read(itt, bytes)
        }
    }

    fn command(&mut self, command: ScsiCommand, data: &[u8]) {
        self.send(&Request::Command(command), data);
    }

    fn finish(&mut self, tag: u32, outcome: Outcome) {
        self.session.handle_outcome(tag, &outcome);
    }

    fn data_out(&mut self, itt: u32, ttt: u32, data_sn: u32, offset: u32, data: &[u8], last: bool) {
        let out = DataOut {
            last,
            lun: LUN,
            itt,
            ttt,
            exp_stat_sn: self.exp_stat_sn,
            data_sn,
            buffer_offset: offset,
        };
        self.send(&Request::DataOut(out), data);
    }

    fn task_request(&mut self, function: u8, tag: u32, ref_cmd_sn: u32) {
        let request = TaskRequest {
            common: self.immediate(0x77),
            function,
            lun: LUN,
            referenced_tag: tag,
            ref_cmd_sn,
        };
        self.send(&Request::Task(request), b"");
    }
}

fn good() -> Outcome {
    Outcome {
        status: Status::Good,
        sense: Vec::new(),
        data_in: Vec::new(),
        in_bytes: 0,
        out_bytes: 0,
    }
}

fn with_data(bytes: usize) -> Outcome {
    Outcome {
        data_in: vec![ReadPart::Data(vec![0xab; bytes].into())],
        in_bytes: bytes as u64,
        ..good()
    }
}

fn written(bytes: u64) -> Outcome {
    Outcome {
        out_bytes: bytes,
        ..good()
    }
}

fn code(pdu: &Pdu) -> u8 {
    opcode_of(&pdu.bhs)
}

/// Offset, length and tag of an R2T.
fn r2t(pdu: &Pdu) -> (u32, u32, u32) {
    assert_eq!(code(pdu), opcode::R2T);
    (word(&pdu.bhs, 40), word(&pdu.bhs, 44), word(&pdu.bhs, 20))
}

fn sense_code(pdu: &Pdu) -> (u8, u8, u8) {
    assert_eq!((code(pdu), pdu.bhs[3]), (opcode::SCSI_RESPONSE, 2));
    (pdu.data[4], pdu.data[14], pdu.data[15])
}

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

// Group: SCSI Data-In (§11.7).

#[test]
fn data_in_is_cut_at_segments_and_bursts() {
    let mut bench = Bench::new("MaxRecvDataSegmentLength=1000 MaxBurstLength=2500");
    let read = bench.read(1, 6000);
    bench.command(read, b"");
    bench.finish(1, with_data(6000));
    let sent = bench.sent();
    let shape: Vec<_> = sent
        .iter()
        .map(|it| {
            (
                word(&it.bhs, 36),
                word(&it.bhs, 40),
                it.data.len(),
                it.bhs[1],
            )
        })
        .collect();
    assert_eq!(
        shape,
        [
            (0, 0, 1000, 0),
            (1, 1000, 1000, 0),
            (2, 2000, 500, FINAL),
            (3, 2500, 1000, 0),
            (4, 3500, 1000, 0),
            (5, 4500, 500, FINAL),
            (6, 5000, 1000, FINAL | 1),
        ]
    );
}

#[test]
fn status_comes_apart_if_there_is_sense() {
    let mut bench = Bench::new("");
    let read = bench.read(1, 512);
    bench.command(read, b"");
    let outcome = Outcome {
        status: Status::CheckCondition,
        sense: vec![0x70, 0, 5],
        ..with_data(512)
    };
    bench.finish(1, outcome);
    let sent = bench.sent();
    assert_eq!((code(&sent[0]), sent[0].bhs[1]), (opcode::DATA_IN, FINAL));
    assert_eq!((code(&sent[1]), sent[1].bhs[3]), (opcode::SCSI_RESPONSE, 2));
    assert_eq!(&sent[1].data[..], [0, 3, 0x70, 0, 5]);
    assert_eq!(word(&sent[1].bhs, 36), 1, "ExpDataSN");
}

// Group: residuals (§11.4.5).

#[test]
fn read_residuals() {
    for (room, there, flag, count) in [(512, 1024, 4, 512), (1024, 512, 2, 512), (512, 512, 0, 0)] {
        let mut bench = Bench::new("");
        let read = bench.read(1, room);
        bench.command(read, b"");
        bench.finish(1, with_data(there));
        let pdu = bench.only();
        assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (flag, count));
        assert_eq!(data_bytes(&pdu.bhs), there.min(room as usize));
    }
}

#[test]
fn write_residuals() {
    for (announced, wanted, flag, count) in
        [(512, 1024, 4, 512), (1024, 512, 2, 512), (512, 512, 0, 0)]
    {
        let mut bench = Bench::new("");
        let write = bench.write(1, announced);
        bench.command(write, &vec![1; announced as usize]);
        bench.finish(1, written(wanted));
        let pdu = bench.only();
        assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (flag, count));
    }
}

#[test]
fn no_room_for_data_is_an_overflow() {
    let mut bench = Bench::new("");
    let mut read = bench.read(1, 0);
    read.reads = false;
    bench.command(read, b"");
    bench.finish(1, with_data(36));
    let pdu = bench.only();
    assert_eq!(code(&pdu), opcode::SCSI_RESPONSE);
    assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (4, 36));
}

// Group: R2T (§11.8) and Data-Out.

#[test]
fn data_comes_immediately_unsolicited_and_solicited() {
    let mut bench = Bench::new("InitialR2T=No FirstBurstLength=1024 MaxBurstLength=1024");
    let mut write = bench.write(1, 3000);
    write.last = false;
    bench.command(write, &[1; 512]);
    assert!(bench.sent().is_empty());
    bench.data_out(1, RESERVED_TAG, 0, 512, &[2; 256], false);
    bench.data_out(1, RESERVED_TAG, 1, 768, &[3; 256], true);
    let (offset, length, ttt) = r2t(&bench.only());
    assert_eq!((offset, length), (1024, 1024));
    bench.data_out(1, ttt, 0, 1024, &[4; 600], false);
    bench.data_out(1, ttt, 1, 1624, &[5; 424], true);
    let (offset, length, ttt) = r2t(&bench.only());
    assert_eq!((offset, length), (2048, 952));
    assert!(bench.outputs().is_empty());
    bench.data_out(1, ttt, 0, 2048, &[6; 952], true);
    let commands = bench.submitted();
    let data = commands[0].data_out.concat();
    let runs = [(1, 512), (2, 256), (3, 256), (4, 600), (5, 424), (6, 952)];
    let expected: Vec<u8> = runs
        .iter()
        .flat_map(|(byte, count)| vec![*byte; *count])
        .collect();
    assert_eq!(data, expected);
    bench.finish(1, written(3000));
    let pdu = bench.only();
    assert_eq!((code(&pdu), word(&pdu.bhs, 36)), (opcode::SCSI_RESPONSE, 2));
}

#[test]
fn many_r2ts_at_a_time() {
    let mut bench = Bench::new("MaxOutstandingR2T=3 MaxBurstLength=512");
    let write = bench.write(1, 2048);
    bench.command(write, b"");
    let asked: Vec<_> = bench.sent().iter().map(r2t).collect();
    assert_eq!(
        asked.iter().map(|it| it.0).collect::<Vec<_>>(),
        [0, 512, 1024]
    );
    bench.data_out(1, asked[0].2, 0, 0, &[1; 512], true);
    let fourth = r2t(&bench.only());
    assert_eq!((fourth.0, fourth.1), (1536, 512));
    for (offset, _, ttt) in [asked[1], asked[2], fourth] {
        bench.data_out(1, ttt, 0, offset, &[1; 512], true);
    }
    assert_eq!(bench.tags(), [1]);
}

#[test]
fn r2t_sn_counts_within_the_task() {
    let mut bench = Bench::new("MaxOutstandingR2T=2 MaxBurstLength=512");
    for itt in [1, 2] {
        let write = bench.write(itt, 1024);
        bench.command(write, b"");
        let sent = bench.sent();
        let numbers: Vec<u32> = sent.iter().map(|it| word(&it.bhs, 36)).collect();
        assert_eq!(numbers, [0, 1]);
        assert!(sent.iter().all(|it| word(&it.bhs, 20) != RESERVED_TAG));
    }
}

#[test]
fn unsolicited_data_that_was_not_agreed_on() {
    // InitialR2T=Yes, and yet F is 0.
    let mut bench = Bench::new("");
    let mut write = bench.write(1, 1024);
    write.last = false;
    bench.command(write, b"");
    bench.data_out(1, RESERVED_TAG, 0, 0, &[1; 512], true);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0c));
    // ImmediateData=No, and yet there is some.
    let mut bench = Bench::new("ImmediateData=No");
    let write = bench.write(1, 512);
    bench.command(write, &[1; 512]);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0c));
    assert!(bench.outputs().is_empty());
}

#[test]
fn data_beyond_first_burst_length() {
    let mut bench = Bench::new("InitialR2T=No FirstBurstLength=1024");
    let write = bench.write(1, 4096);
    bench.command(write, &[1; 2048]);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0d));
    let mut write = bench.write(2, 4096);
    write.last = false;
    bench.command(write, &[1; 1024]);
    bench.data_out(2, RESERVED_TAG, 0, 1024, &[1; 512], true);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0d));
}

#[test]
fn wrong_data_sn_offset_and_length_fail_the_task() {
    type Case = (u32, u32, usize);
    let cases: [Case; 4] = [(1, 0, 1024), (0, 512, 1024), (0, 0, 1025), (0, 0, 1000)];
    for (data_sn, offset, length) in cases {
        let mut bench = Bench::new("MaxBurstLength=1024");
        let write = bench.write(1, 1024);
        bench.command(write, b"");
        let (_, _, ttt) = r2t(&bench.only());
        bench.data_out(1, ttt, data_sn, offset, &vec![1; length], true);
        assert_eq!(sense_code(&bench.only()).0, 0x0b);
        assert!(bench.outputs().is_empty());
        assert_eq!(bench.session.tasks(), 0);
    }
}

#[test]
fn unknown_tags() {
    let mut bench = Bench::new("");
    let write = bench.write(1, 1024);
    bench.command(write, b"");
    let (_, _, ttt) = r2t(&bench.only());
    bench.data_out(1, ttt.wrapping_add(9), 0, 0, &[1; 512], true);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2]),
        (opcode::REJECT, Reason::InvalidField as u8)
    );
    // Data of a task that is no more.
    bench.data_out(99, RESERVED_TAG, 0, 0, &[1; 512], true);
    assert!(bench.sent().is_empty());
}

#[test]
fn more_data_than_can_be_kept_waits() {
    let mut bench = Bench::new("");
    let size = COMMAND_BYTES_MAX;
    for itt in 0..4 {
        let write = bench.write(itt, size);
        bench.command(write, b"");
    }
    let asked = bench.sent();
    let tasks: Vec<u32> = asked.iter().map(|it| word(&it.bhs, 16)).collect();
    assert_eq!(tasks, [0, 1]);
    // A read that is small waits its turn, for fairness.
    bench.task_request(1, 0, FIRST);
    let codes: Vec<u8> = bench.sent().iter().map(code).collect();
    assert!(codes.contains(&opcode::R2T) && codes.contains(&opcode::TASK_RESPONSE));
}

#[test]
fn reads_wait_while_the_initiator_does_not_take_them() {
    let mut bench = Bench::new("");
    for itt in 0..3 {
        let read = bench.read(itt, COMMAND_BYTES_MAX);
        bench.command(read, b"");
    }
    assert_eq!(bench.tags(), [0, 1]);
    bench.finish(0, with_data(COMMAND_BYTES_MAX as usize));
    assert!(bench.outputs().is_empty());
    bench.sent();
    bench.session.pump();
    assert_eq!(bench.tags(), [2]);
}

#[test]
fn absurd_transfer_lengths_are_not_asked_for() {
    let mut bench = Bench::new("");
    let write = bench.write(1, u32::MAX);
    bench.command(write, b"");
    let mut asked = 0u64;
    loop {
        let sent = bench.sent();
        let Some(pdu) = sent.first() else { break };
        let (offset, length, ttt) = r2t(pdu);
        asked += u64::from(length);
        bench.data_out(1, ttt, 0, offset, &vec![0; length as usize], true);
    }
    assert_eq!(asked, u64::from(COMMAND_BYTES_MAX));
    assert_eq!(bench.tags(), [1]);
}

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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_headers_keep_the_session_within_its_bounds(
        pdus in proptest::collection::vec(
            (any::<[u8; 32]>(), any::<[u8; 16]>(), 0..2000usize, any::<[bool; 4]>(), 0..17u8), 1..200),
        level in 0..2u8,
    ) {
        let keys = format!("ErrorRecoveryLevel={level} InitialR2T=No MaxOutstandingR2T=4");
        let mut bench = Bench::new(&keys);
        for (head, tail, length, [numbered, small, intact, finish], opcode) in pdus {
            let mut bhs = [0; 48];
            bhs[..32].copy_from_slice(&head);
            bhs[32..].copy_from_slice(&tail);
            bhs[0] = bhs[0] & 0x40 | opcode;
            if numbered {
                let next = bench.session.window().exp_cmd_sn.wrapping_add(u32::from(head[1] & 3));
                bhs[24..28].copy_from_slice(&next.to_be_bytes());
            }
            if small {
                bhs[16..20].copy_from_slice(&u32::from(head[19] & 7).to_be_bytes());
                bhs[20..22].fill(0);
            }
            let pdu = Pdu { bhs, ahs: Bytes::new(), data: vec![0; length].into(), data_is_intact: intact || opcode != 5 };
            bench.session.handle_pdu(bench.now, 0, pdu);
            for output in bench.outputs() {
                match output {
                    Output::Submit(command) if finish => {
                        let outcome = with_data(command.read_bytes.min(100_000) as usize);
                        bench.session.handle_outcome(command.tag, &outcome);
                    }
                    Output::Manage { id, .. } => bench.session.handle_managed(id, TaskResponse::Complete),
                    Output::ListTargets { cid, .. } => bench.session.handle_targets(cid, &[]),
                    Output::Submit(_) => {}
                }
            }
            let window = bench.session.window();
            prop_assert!(!serial_before(window.max_cmd_sn.wrapping_add(1), window.exp_cmd_sn));
            prop_assert!(bench.session.tasks() <= TASKS_MAX as usize + IMMEDIATE_TASKS_MAX);
            bench.session.handle_timeout(bench.now);
        }
    }
}
