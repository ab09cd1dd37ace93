//! One connection in its full feature phase: StatSN, what is sent, what may have to be sent again, and
//! whether the initiator is still there. What its requests mean is the session's.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use pss_core::time::Instant;
use pss_core::volume::device::ReadPart;
use pss_gateway::sending::SendQueue;

use crate::keys::Params;
use crate::pdu::outgoing::{part_bytes, push};
use crate::pdu::response::Numbers;
use crate::pdu::{Bhs, Digests, serial_before, word};

/// Most PDUs that are kept to be sent again, and most of their data.
const HISTORY_PDUS_MAX: usize = 4096;
const HISTORY_BYTES_MAX: usize = 16 << 20;

/// One connection of a session.
#[derive(Debug)]
pub struct Connection {
    /// Connection id.
    pub cid: u16,
    /// Which of the connections that had this id.
    pub incarnation: u64,
    /// For lists of connections.
    pub header_digest: bool,
    /// For lists of connections.
    pub data_digest: bool,
    /// Longest data segment that the initiator takes, bytes.
    pub sent_data_bytes_max: usize,
    sending: SendQueue,
    stat_sn: u32,
    acknowledged: u32,
    /// What was sent and is not acknowledged, if error recovery was agreed on.
    history: Option<History>,
    /// When something came last.
    heard: Instant,
    probe: Option<(u32, Instant)>,
    closing: bool,
    pub(crate) text: Option<TextExchange>,
}

/// PDUs with their data, oldest first.
#[derive(Debug, Default)]
struct History {
    sent: VecDeque<Sent>,
    bytes: usize,
}

#[derive(Debug)]
struct Sent {
    bhs: Bhs,
    data: Vec<ReadPart>,
    itt: u32,
    /// The status that it carries, or of the status that it came before.
    stat_sn: u32,
    /// Number within its task, for Data-In.
    data_sn: Option<u32>,
    has_status: bool,
}

/// A text negotiation of several PDUs.
#[derive(Debug, Default)]
pub(crate) struct TextExchange {
    pub(crate) ttt: u32,
    pub(crate) itt: u32,
    pub(crate) lun: [u8; 8],
    /// The initiator said that it has nothing more to say.
    pub(crate) last: bool,
    /// What came so far.
    pub(crate) text: Vec<u8>,
    /// What is still to be sent.
    pub(crate) answer: Vec<u8>,
}

/// The session's numbers that every PDU carries.
#[derive(Clone, Copy, Debug)]
pub struct CmdNumbers {
    /// ExpCmdSN.
    pub exp_cmd_sn: u32,
    /// MaxCmdSN.
    pub max_cmd_sn: u32,
}

/// Whether the initiator is still there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Liveness {
    /// Something came lately.
    Heard,
    /// Nothing came for a while: it is to be asked.
    Silent,
    /// It was asked and said nothing.
    Dead,
}

impl Connection {
    /// A connection that has just logged in. `stat_sn` is that of its next status.
    pub fn new(cid: u16, params: &Params, stat_sn: u32, now: Instant) -> Connection {
        Connection {
            cid,
            incarnation: 0,
            header_digest: params.header_digest,
            data_digest: params.data_digest,
            sent_data_bytes_max: params.sent_data_bytes_max,
            sending: SendQueue::default(),
            stat_sn,
            acknowledged: stat_sn,
            history: (params.error_recovery_level > 0).then(History::default),
            heard: now,
            probe: None,
            closing: false,
            text: None,
        }
    }

    /// What is to be sent.
    pub fn sending(&mut self) -> &mut SendQueue {
        &mut self.sending
    }

    /// Bytes that wait to be sent.
    pub fn unsent_bytes(&self) -> usize {
        self.sending.length_bytes()
    }

    /// Takes no more requests, and is closed when all is sent.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Whether it takes no more requests.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    fn digests(&self) -> Digests {
        Digests {
            header: self.header_digest,
            data: self.data_digest,
        }
    }

    /// Sends a PDU that ends something: it takes a StatSN.
    pub(crate) fn send_status(&mut self, numbers: CmdNumbers, bhs: Bhs, data: Vec<ReadPart>) {
        self.send(numbers, bhs, data, None, true);
        self.stat_sn = self.stat_sn.wrapping_add(1);
    }

    /// Sends Data-In without status; its StatSN is reserved.
    pub(crate) fn send_data_in(
        &mut self,
        numbers: CmdNumbers,
        bhs: Bhs,
        data: Vec<ReadPart>,
        data_sn: u32,
    ) {
        self.send(numbers, bhs, data, Some(data_sn), false);
    }

    /// Sends Data-In with status.
    pub(crate) fn send_data_in_with_status(
        &mut self,
        numbers: CmdNumbers,
        bhs: Bhs,
        data: Vec<ReadPart>,
        data_sn: u32,
    ) {
        self.send(numbers, bhs, data, Some(data_sn), true);
        self.stat_sn = self.stat_sn.wrapping_add(1);
    }

    /// Sends a PDU that takes no StatSN but says the next one, such as R2T.
    pub(crate) fn send_plain(&mut self, numbers: CmdNumbers, mut bhs: Bhs) {
        self.numbers(numbers).put(&mut bhs);
        let digests = self.digests();
        push(&mut self.sending, digests, bhs, &[]);
    }

    fn numbers(&self, numbers: CmdNumbers) -> Numbers {
        Numbers {
            stat_sn: self.stat_sn,
            exp_cmd_sn: numbers.exp_cmd_sn,
            max_cmd_sn: numbers.max_cmd_sn,
        }
    }

    fn send(
        &mut self,
        numbers: CmdNumbers,
        mut bhs: Bhs,
        data: Vec<ReadPart>,
        data_sn: Option<u32>,
        has_status: bool,
    ) {
        let mut numbers = self.numbers(numbers);
        if !has_status {
            numbers.stat_sn = 0;
        }
        numbers.put(&mut bhs);
        let digests = self.digests();
        push(&mut self.sending, digests, bhs, &data);
        if let Some(history) = &mut self.history {
            history.push(Sent {
                bhs,
                itt: word(&bhs, 16),
                data,
                stat_sn: self.stat_sn,
                data_sn,
                has_status,
            });
        }
    }

    /// Takes ExpStatSN: all before it have arrived.
    pub(crate) fn acknowledge(&mut self, exp_stat_sn: u32) {
        let moves = serial_before(self.acknowledged, exp_stat_sn)
            && !serial_before(self.stat_sn, exp_stat_sn);
        if moves {
            self.acknowledged = exp_stat_sn;
            if let Some(history) = &mut self.history {
                history.forget_before(exp_stat_sn);
            }
        }
    }

    /// Sends statuses again (§11.16, type 1). Whether all of them were there.
    pub(crate) fn resend_status(&mut self, numbers: CmdNumbers, first: u32, count: u32) -> bool {
        let all = count == 0;
        let wanted = |sent: &Sent| {
            sent.has_status
                && (all && (first == 0 || !serial_before(sent.stat_sn, first))
                    || sent.stat_sn.wrapping_sub(first) < count)
        };
        let again = self.resend(numbers, wanted);
        all || again == count as usize
    }

    /// Sends Data-In again (§11.16, type 0). Whether there was any.
    pub(crate) fn resend_data(
        &mut self,
        numbers: CmdNumbers,
        itt: u32,
        first: u32,
        count: u32,
    ) -> bool {
        let wanted = |sent: &Sent| {
            let within = |sn: u32| sn >= first && (count == 0 || sn - first < count);
            sent.itt == itt && sent.data_sn.is_some_and(within)
        };
        self.resend(numbers, wanted) > 0
    }

    fn resend(&mut self, numbers: CmdNumbers, wanted: impl Fn(&Sent) -> bool) -> usize {
        let digests = self.digests();
        let Some(history) = &self.history else {
            return 0;
        };
        let mut again = 0;
        for sent in history.sent.iter().filter(|sent| wanted(sent)) {
            let mut bhs = sent.bhs;
            let numbers = Numbers {
                stat_sn: word(&bhs, 24),
                exp_cmd_sn: numbers.exp_cmd_sn,
                max_cmd_sn: numbers.max_cmd_sn,
            };
            numbers.put(&mut bhs);
            push(&mut self.sending, digests, bhs, &sent.data);
            again += 1;
        }
        again
    }

    /// Something came.
    pub(crate) fn hear(&mut self, now: Instant) {
        self.heard = now;
        self.probe = None;
    }

    /// A probe with this tag was sent.
    pub(crate) fn probed(&mut self, ttt: u32, now: Instant) {
        self.probe = Some((ttt, now));
    }

    pub(crate) fn liveness(&self, now: Instant, interval: Duration, limit: Duration) -> Liveness {
        match self.probe {
            Some((_, sent)) if now.since(sent) >= limit => Liveness::Dead,
            None if now.since(self.heard) >= interval => Liveness::Silent,
            _ => Liveness::Heard,
        }
    }

    /// When to look at its liveness again.
    pub(crate) fn liveness_due(&self, interval: Duration, limit: Duration) -> Instant {
        match self.probe {
            Some((_, sent)) => sent + limit,
            None => self.heard + interval,
        }
    }

    /// When something came last.
    pub fn heard(&self) -> Instant {
        self.heard
    }
}

impl History {
    fn push(&mut self, sent: Sent) {
        self.bytes += data_bytes(&sent.data);
        self.sent.push_back(sent);
        while self.sent.len() > HISTORY_PDUS_MAX || self.bytes > HISTORY_BYTES_MAX {
            self.pop();
        }
    }

    fn forget_before(&mut self, exp_stat_sn: u32) {
        let is_old = |sent: &Sent| serial_before(sent.stat_sn, exp_stat_sn);
        while self.sent.front().is_some_and(is_old) {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(sent) = self.sent.pop_front() {
            self.bytes -= data_bytes(&sent.data);
        }
    }
}

fn data_bytes(data: &[ReadPart]) -> usize {
    data.iter().map(part_bytes).sum()
}

/// Bytes as a data segment.
pub(crate) fn whole(data: impl Into<Bytes>) -> Vec<ReadPart> {
    vec![ReadPart::Data(data.into())]
}
