//! The rules of the full feature phase. docs/testing.md has a table of them by the groups of UNH-IOL's plan.

mod data;
mod numbering;
mod recovery;
mod requests;

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
