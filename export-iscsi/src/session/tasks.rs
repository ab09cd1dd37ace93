//! Tasks: SCSI commands from their first byte to their status.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use pss_core::volume::device::ReadPart;

use crate::connection::{CmdNumbers, Connection, whole};
use crate::pdu::outgoing::{Cutter, part_bytes};
use crate::pdu::request::{DataOut, ScsiCommand, Snack};
use crate::pdu::response::{DataIn, R2t, Reason, Residual, ScsiResponse};
use crate::pdu::{Bhs, RESERVED_TAG};
use crate::scsi::{Command, Outcome, Status, TaskAttribute};

use super::collect::Collected;
use super::{
    BYTES_IN_FLIGHT_MAX, COMMAND_BYTES_MAX, IMMEDIATE_TASKS_MAX, Output, Session, TASKS_MAX,
};

/// A SCSI command under way.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) cid: u16,
    pub(super) lun: [u8; 8],
    pub(super) phase: Phase,
    /// Its turn has come.
    pub(super) delivered: bool,
    attribute: TaskAttribute,
    cdb: [u8; 16],
    long_cdb: Option<Bytes>,
    read_bytes: u32,
    write_bytes: u32,
    bidirectional: bool,
    data: Collected,
    /// Unsolicited data is still to come.
    unsolicited: Option<Unsolicited>,
    r2ts: VecDeque<Outstanding>,
    next_r2t_sn: u32,
    /// Up to where data was asked for or came unasked.
    asked_bytes: u32,
    /// What is set aside for it; `None` while it waits for room.
    reserved: Option<usize>,
    failure: Option<Failure>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    /// Its data comes, or it waits for others.
    Waiting,
    /// The target has it.
    WithTarget,
}

#[derive(Debug)]
struct Unsolicited {
    next_data_sn: u32,
}

/// An R2T whose data has not all come.
#[derive(Debug)]
struct Outstanding {
    ttt: u32,
    r2t_sn: u32,
    offset: u32,
    length: u32,
    received: u32,
    next_data_sn: u32,
}

/// What is wrong with the data of a write (§11.4.7.2): additional sense code and qualifier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Failure {
    /// Data that was not asked for.
    UnexpectedUnsolicited,
    /// Less or more than there should be.
    IncorrectAmount,
    /// Data was damaged or lost on the way.
    Crc,
}

impl Failure {
    fn sense(self) -> Vec<u8> {
        let (code, qualifier) = match self {
            Failure::UnexpectedUnsolicited => (0x0c, 0x0c),
            Failure::IncorrectAmount => (0x0c, 0x0d),
            Failure::Crc => (0x47, 0x05),
        };
        // Fixed format, ABORTED COMMAND.
        let mut sense = vec![0; 18];
        sense[0] = 0x70;
        sense[2] = 0x0b;
        sense[7] = 10;
        sense[12] = code;
        sense[13] = qualifier;
        sense
    }
}

impl Task {
    /// Data that is wanted from the initiator.
    fn goal_bytes(&self) -> u32 {
        self.write_bytes.min(COMMAND_BYTES_MAX)
    }

    /// Whether nothing more will come, or is waited for.
    fn is_complete(&self) -> bool {
        self.unsolicited.is_none()
            && self.r2ts.is_empty()
            && (self.failure.is_some() || self.data.length() >= self.goal_bytes() as usize)
    }

    fn need_bytes(&self) -> usize {
        let read = self.read_bytes.min(COMMAND_BYTES_MAX) as usize;
        self.goal_bytes() as usize + read
    }
}

impl Session {
    /// Takes a SCSI command's PDU; whether there is a task for it now.
    pub(super) fn register(
        &mut self,
        cid: u16,
        command: ScsiCommand,
        data: Bytes,
        bhs: &Bhs,
    ) -> bool {
        let itt = command.common.itt;
        let reason = if self.discovery {
            Some(Reason::ProtocolError)
        } else if itt == RESERVED_TAG || (!command.last && !command.writes) {
            Some(Reason::InvalidField)
        } else if self.tasks.contains_key(&itt) {
            Some(Reason::TaskInProgress)
        } else if self.tasks.len() >= TASKS_MAX as usize + IMMEDIATE_TASKS_MAX {
            Some(Reason::TooManyImmediate)
        } else {
            None
        };
        if let Some(reason) = reason {
            self.reject(cid, bhs, reason);
            return false;
        }
        let task = self.new_task(cid, command, data);
        self.tasks.insert(itt, task);
        true
    }

    fn new_task(&self, cid: u16, command: ScsiCommand, data: Bytes) -> Task {
        let expected = command.expected_bytes;
        let read_bytes = match (command.reads, command.writes) {
            (true, true) => command.bidirectional_read_bytes.unwrap_or(0),
            (true, false) => expected,
            (false, _) => 0,
        };
        let write_bytes = if command.writes { expected } else { 0 };
        let most = write_bytes as usize;
        let failure = if !data.is_empty() && !self.params.immediate_data {
            Some(Failure::UnexpectedUnsolicited)
        } else if data.len() > most.min(self.params.first_burst_length) {
            Some(Failure::IncorrectAmount)
        } else if !command.last && self.params.initial_r2t {
            Some(Failure::UnexpectedUnsolicited)
        } else {
            None
        };
        let mut task = Task {
            cid,
            lun: command.lun,
            phase: Phase::Waiting,
            delivered: false,
            attribute: attribute(command.attribute),
            cdb: command.cdb,
            long_cdb: command.long_cdb,
            read_bytes,
            write_bytes,
            bidirectional: command.reads && command.writes,
            data: Collected::default(),
            unsolicited: (!command.last).then_some(Unsolicited { next_data_sn: 0 }),
            r2ts: VecDeque::new(),
            next_r2t_sn: 0,
            asked_bytes: data.len() as u32,
            reserved: None,
            failure,
        };
        if failure.is_none() {
            task.data.push(data);
        }
        task
    }

    /// A task's turn has come.
    pub(super) fn deliver_task(&mut self, itt: u32) {
        if let Some(task) = self.tasks.get_mut(&itt) {
            task.delivered = true;
            self.queue.push_back(itt);
            self.pump();
        }
    }

    /// Forgets a task, and what was set aside for it.
    pub(super) fn remove_task(&mut self, itt: u32) -> Option<Task> {
        let task = self.tasks.remove(&itt)?;
        self.reserved_bytes -= task.reserved.unwrap_or(0);
        if task.phase == Phase::Waiting {
            self.queue.retain(|queued| *queued != itt);
        }
        self.open_window();
        Some(task)
    }

    /// Room may have become free, or data complete: sets room aside, asks for data, hands over what is
    /// complete.
    pub fn pump(&mut self) {
        // Logical units with a task that waits, and whether one of these is ORDERED.
        let mut waiting: Vec<([u8; 8], bool)> = Vec::new();
        let mut has_room = true;
        let mut at = 0;
        while let Some(itt) = self.queue.get(at).copied() {
            has_room = has_room && self.set_aside(itt);
            self.ask(itt);
            let Some(task) = self.tasks.get(&itt) else {
                self.queue.remove(at);
                continue;
            };
            // SIMPLE tasks may overtake each other; ORDERED ones neither overtake nor are overtaken.
            let before = waiting.iter().find(|(lun, _)| *lun == task.lun);
            let in_order = match (task.attribute, before) {
                (_, None) | (TaskAttribute::HeadOfQueue, _) => true,
                (TaskAttribute::Ordered, Some(_)) => false,
                (_, Some((_, ordered))) => !ordered,
            };
            if task.reserved.is_some() && task.is_complete() && in_order {
                self.queue.remove(at);
                self.hand_over(itt);
                continue;
            }
            let ordered = task.attribute == TaskAttribute::Ordered;
            match waiting.iter_mut().find(|(lun, _)| *lun == task.lun) {
                Some((_, any)) => *any |= ordered,
                None => waiting.push((task.lun, ordered)),
            }
            at += 1;
        }
    }

    /// Sets room aside for a task's data; whether there was some.
    fn set_aside(&mut self, itt: u32) -> bool {
        let unsent: usize = self
            .connections
            .values()
            .map(Connection::unsent_bytes)
            .sum();
        let used = self.reserved_bytes + unsent;
        let Some(task) = self.tasks.get_mut(&itt) else {
            return true;
        };
        if task.reserved.is_some() {
            return true;
        }
        let need = task.need_bytes();
        // A single task always has room, so that everything ends some time.
        if need > 0 && used > 0 && used + need > BYTES_IN_FLIGHT_MAX {
            return false;
        }
        task.reserved = Some(need);
        self.reserved_bytes += need;
        true
    }

    /// Sends as many R2Ts for a task as it may have.
    fn ask(&mut self, itt: u32) {
        let most = usize::from(self.params.max_outstanding_r2t);
        let burst = u32::try_from(self.params.max_burst_length).unwrap_or(u32::MAX);
        loop {
            let Some(task) = self.tasks.get(&itt) else {
                return;
            };
            let may_ask = task.reserved.is_some()
                && task.unsolicited.is_none()
                && task.failure.is_none()
                && task.r2ts.len() < most
                && task.asked_bytes < task.goal_bytes();
            if !may_ask {
                return;
            }
            let length = burst.min(task.goal_bytes() - task.asked_bytes);
            let offset = task.asked_bytes;
            self.send_r2t(itt, offset, length);
        }
    }

    fn send_r2t(&mut self, itt: u32, offset: u32, length: u32) {
        let ttt = self.next_ttt();
        let numbers = self.window();
        let Some(task) = self.tasks.get_mut(&itt) else {
            return;
        };
        let r2t_sn = task.next_r2t_sn;
        task.next_r2t_sn += 1;
        task.asked_bytes = task.asked_bytes.max(offset + length);
        task.r2ts.push_back(Outstanding {
            ttt,
            r2t_sn,
            offset,
            length,
            received: 0,
            next_data_sn: 0,
        });
        let r2t = R2t {
            itt,
            ttt,
            lun: task.lun,
            r2t_sn,
            buffer_offset: offset,
            length,
        };
        if let Some(connection) = self.connections.get_mut(&task.cid) {
            connection.send_plain(numbers, r2t.encode());
        }
    }

    /// R2Ts that the initiator missed (§11.16.1); whether the task is a write.
    pub(super) fn resend_r2ts(&mut self, cid: u16, snack: &Snack) -> bool {
        let numbers = self.window();
        let Some(task) = self.tasks.get(&snack.itt).filter(|it| it.write_bytes > 0) else {
            return false;
        };
        let Some(connection) = self.connections.get_mut(&cid) else {
            return false;
        };
        let wanted = |it: &&Outstanding| {
            it.r2t_sn >= snack.first && (snack.count == 0 || it.r2t_sn - snack.first < snack.count)
        };
        for it in task.r2ts.iter().filter(wanted) {
            let r2t = R2t {
                itt: snack.itt,
                ttt: it.ttt,
                lun: task.lun,
                r2t_sn: it.r2t_sn,
                buffer_offset: it.offset,
                length: it.length,
            };
            connection.send_plain(numbers, r2t.encode());
        }
        true
    }

    /// Data of a write (§11.7).
    pub(super) fn handle_data_out(&mut self, cid: u16, out: DataOut, data: Bytes, bhs: &Bhs) {
        // Data of a task that was aborted, or never was one of ours, is not wanted.
        let Some(task) = self.tasks.get_mut(&out.itt).filter(|it| it.cid == cid) else {
            return;
        };
        let known = match out.ttt {
            RESERVED_TAG => task.unsolicited.is_some(),
            ttt => task.r2ts.iter().any(|it| it.ttt == ttt),
        };
        if !known {
            // Unsolicited data after its end, or a tag that we did not give, or took back.
            if out.ttt == RESERVED_TAG && task.phase == Phase::Waiting {
                task.failure.get_or_insert(Failure::UnexpectedUnsolicited);
                return self.finish_data(out.itt);
            }
            return self.reject(cid, bhs, Reason::InvalidField);
        }
        let first_burst = self.params.first_burst_length;
        let recovers = self.params.error_recovery_level > 0;
        let taken = match out.ttt {
            RESERVED_TAG => task.take_unsolicited(&out, &data, first_burst),
            _ => task.take_solicited(&out, &data),
        };
        match taken {
            Ok(()) if task.failure.is_none() => task.data.push(data),
            Ok(()) => {}
            // What is missing will be asked for again.
            Err(Failure::Crc) if recovers => {}
            Err(failure) => {
                task.failure.get_or_insert(failure);
            }
        }
        if out.last {
            self.end_sequence(out.itt, out.ttt);
        }
    }

    /// A Data-Out whose data is damaged.
    pub(super) fn handle_damaged_data(&mut self, cid: u16, out: DataOut) {
        let Some(task) = self.tasks.get_mut(&out.itt).filter(|it| it.cid == cid) else {
            return;
        };
        if self.params.error_recovery_level == 0 {
            // "it MUST wait to receive all data ... before sending the SCSI Response PDU" (§7.8).
            task.failure.get_or_insert(Failure::Crc);
        }
        if out.last {
            self.end_sequence(out.itt, out.ttt);
        }
    }

    /// The last PDU of a sequence came.
    fn end_sequence(&mut self, itt: u32, ttt: u32) {
        let recovers = self.params.error_recovery_level > 0;
        let Some(task) = self.tasks.get_mut(&itt) else {
            return;
        };
        if ttt == RESERVED_TAG {
            task.unsolicited = None;
            task.asked_bytes = task.data.length() as u32;
        } else if let Some(at) = task.r2ts.iter().position(|it| it.ttt == ttt)
            && let Some(done) = task.r2ts.remove(at)
            && done.received < done.length
            && task.failure.is_none()
        {
            if recovers {
                // A recovery R2T (§7.2).
                let (offset, length) = (done.offset + done.received, done.length - done.received);
                self.send_r2t(itt, offset, length);
            } else {
                task.failure = Some(Failure::IncorrectAmount);
            }
        }
        self.finish_data(itt);
    }

    /// Answers a task whose data cannot be used, when no more of it is to come; goes on with others.
    fn finish_data(&mut self, itt: u32) {
        let failed = |task: &Task| task.is_complete() && task.failure.is_some();
        if self
            .tasks
            .get(&itt)
            .is_some_and(|it| it.delivered && failed(it))
        {
            self.fail_task(itt);
        }
        self.pump();
    }

    fn fail_task(&mut self, itt: u32) {
        let Some(task) = self.remove_task(itt) else {
            return;
        };
        let Some(failure) = task.failure else {
            return;
        };
        let outcome = Outcome {
            status: Status::CheckCondition,
            sense: failure.sense(),
            data_in: Vec::new(),
            in_bytes: 0,
            out_bytes: 0,
        };
        self.answer(itt, &task, &outcome);
    }

    /// A task is complete.
    fn hand_over(&mut self, itt: u32) {
        let nexus = self.nexus;
        let Some(task) = self.tasks.get_mut(&itt) else {
            return;
        };
        if task.failure.is_some() {
            return self.fail_task(itt);
        }
        task.phase = Phase::WithTarget;
        self.outputs.push_back(Output::Submit(Command {
            nexus,
            tag: itt,
            lun: task.lun,
            attribute: task.attribute,
            cdb: task.cdb,
            long_cdb: task.long_cdb.take(),
            data_out: task.data.take(),
            read_bytes: task.read_bytes,
            write_bytes: task.write_bytes,
        }));
    }

    /// A command ended.
    pub fn handle_outcome(&mut self, tag: u32, outcome: &Outcome) {
        let with_target = |task: &&Task| task.phase == Phase::WithTarget;
        if self.tasks.get(&tag).filter(with_target).is_none() {
            return;
        }
        if let Some(task) = self.remove_task(tag) {
            self.answer(tag, &task, outcome);
        }
        if !self.queue.is_empty() {
            self.pump();
        }
    }

    /// A command was aborted, and gets no response.
    pub fn handle_aborted(&mut self, tag: u32) {
        let with_target = |task: &&Task| task.phase == Phase::WithTarget;
        if self.tasks.get(&tag).filter(with_target).is_some() {
            self.remove_task(tag);
            self.pump();
        }
    }

    /// Sends data and status.
    fn answer(&mut self, itt: u32, task: &Task, outcome: &Outcome) {
        let numbers = self.window();
        let max_burst = self.params.max_burst_length;
        let Some(connection) = self.connections.get_mut(&task.cid) else {
            return;
        };
        let there: usize = outcome.data_in.iter().map(part_bytes).sum();
        let total = there.min(task.read_bytes as usize);
        let read = Residual::of(task.read_bytes.into(), total as u64, outcome.in_bytes);
        let write = Residual::of(
            task.write_bytes.into(),
            outcome.out_bytes.min(task.write_bytes.into()),
            outcome.out_bytes,
        );
        let (residual, bidirectional) = match (task.bidirectional, task.write_bytes > 0) {
            (true, _) => (write, read),
            (false, true) => (write, Residual::None),
            (false, false) if task.read_bytes > 0 || outcome.in_bytes > 0 => (read, Residual::None),
            (false, false) => (write, Residual::None),
        };
        // Status may come with the last data if there is nothing more to say (§11.7.3).
        let collapses = matches!(outcome.status, Status::Good | Status::ConditionMet)
            && outcome.sense.is_empty()
            && !task.bidirectional
            && total > 0;
        let status = collapses.then_some((outcome.status as u8, residual));
        let sending = Sending {
            itt,
            total,
            max_burst,
            status,
        };
        let sent = sending.data_in(connection, numbers, &outcome.data_in);
        if collapses {
            return;
        }
        let response = ScsiResponse {
            itt,
            status: outcome.status as u8,
            residual,
            bidirectional,
            exp_data_sn: sent + task.next_r2t_sn,
        };
        let sense = sense_segment(&outcome.sense);
        connection.send_status(numbers, response.encode(), whole(sense));
    }
}

impl Task {
    fn take_unsolicited(
        &mut self,
        out: &DataOut,
        data: &Bytes,
        first_burst: usize,
    ) -> Result<(), Failure> {
        let collected = self.data.length();
        let most = first_burst.min(self.write_bytes as usize);
        let Some(unsolicited) = &mut self.unsolicited else {
            return Err(Failure::UnexpectedUnsolicited);
        };
        if self.failure.is_some() {
            return Ok(());
        }
        if out.data_sn != unsolicited.next_data_sn || out.buffer_offset as usize != collected {
            return Err(Failure::Crc);
        }
        unsolicited.next_data_sn += 1;
        if collected + data.len() > most {
            return Err(Failure::IncorrectAmount);
        }
        Ok(())
    }

    fn take_solicited(&mut self, out: &DataOut, data: &Bytes) -> Result<(), Failure> {
        let collected = self.data.length();
        let failed = self.failure.is_some();
        let r2t = self.r2ts.iter_mut().find(|it| it.ttt == out.ttt);
        let Some(r2t) = r2t else {
            return Err(Failure::UnexpectedUnsolicited);
        };
        if failed {
            return Ok(());
        }
        let expected = r2t.offset + r2t.received;
        let in_order = out.data_sn == r2t.next_data_sn
            && out.buffer_offset == expected
            && expected as usize == collected;
        if !in_order {
            return Err(Failure::Crc);
        }
        r2t.next_data_sn += 1;
        if data.len() > (r2t.length - r2t.received) as usize {
            return Err(Failure::IncorrectAmount);
        }
        r2t.received += data.len() as u32;
        Ok(())
    }
}

/// Data-In on its way.
struct Sending {
    itt: u32,
    total: usize,
    max_burst: usize,
    /// Goes with the last PDU.
    status: Option<(u8, Residual)>,
}

impl Sending {
    /// Sends all data; how many PDUs it took.
    fn data_in(&self, connection: &mut Connection, numbers: CmdNumbers, parts: &[ReadPart]) -> u32 {
        let mut cutter = Cutter::new(parts);
        let (mut offset, mut data_sn) = (0, 0);
        let mut burst_left = self.max_burst;
        while offset < self.total {
            let left = self.total - offset;
            let run = connection.sent_data_bytes_max.min(burst_left).min(left);
            burst_left -= run;
            let ends = run == left;
            let data_in = DataIn {
                last: ends || burst_left == 0,
                itt: self.itt,
                data_sn,
                buffer_offset: offset as u32,
                status: self.status.filter(|_| ends),
            };
            if burst_left == 0 {
                burst_left = self.max_burst;
            }
            let (bhs, data) = (data_in.encode(), cutter.take(run));
            if data_in.status.is_some() {
                connection.send_data_in_with_status(numbers, bhs, data, data_sn);
            } else {
                connection.send_data_in(numbers, bhs, data, data_sn);
            }
            offset += run;
            data_sn += 1;
        }
        data_sn
    }
}

/// Sense data as a data segment (§11.4.7.2): its length comes before it.
fn sense_segment(sense: &[u8]) -> Bytes {
    if sense.is_empty() {
        return Bytes::new();
    }
    let mut segment = BytesMut::with_capacity(2 + sense.len());
    segment.put_u16(u16::try_from(sense.len()).unwrap_or(u16::MAX));
    segment.put_slice(sense);
    segment.freeze()
}

/// Task attribute codes (§11.3.1).
fn attribute(code: u8) -> TaskAttribute {
    match code {
        1 => TaskAttribute::Simple,
        2 => TaskAttribute::Ordered,
        3 => TaskAttribute::HeadOfQueue,
        4 => TaskAttribute::Aca,
        _ => TaskAttribute::Untagged,
    }
}
