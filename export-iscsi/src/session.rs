//! A session (RFC 7143 §4): commands in order, tasks by their tag, data of writes, and the connections.
//!
//! Without IO: [`Session::handle_pdu`] takes what an initiator sent on a connection,
//! [`Session::poll_output`] gives what is to be done, [`Session::handle_outcome`] and the others take what
//! came of it, and each connection's [`Connection::sending`] holds what is to be sent. What an initiator
//! can make it keep is bounded by [`TASKS_MAX`] and [`BYTES_IN_FLIGHT_MAX`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pss_core::time::Instant;

use crate::connection::{CmdNumbers, Connection, Liveness, whole};
use crate::keys::Params;
use crate::pdu::framing::{FramingError, Pdu};
use crate::pdu::request::{Common, DataOut, LogoutRequest, NopOut, Request, Snack, TaskRequest};
use crate::pdu::response::{
    AsyncEvent, Reason, async_message, logout_response, nop_in, reject, task_response, {self},
};
use crate::pdu::{Bhs, RESERVED_TAG, opcode, serial_before};
use crate::scsi::{Command, NexusId, TaskFunction, TaskResponse};

mod collect;
mod tasks;
mod text;

use tasks::{Phase, Task};
pub use text::Wanted;

/// Most tasks of a session. The window of commands that an initiator may send is never larger, and is
/// at least half of it while no more than half are under way.
pub const TASKS_MAX: u32 = 256;
/// Immediate commands come without a window; so many more tasks are taken.
const IMMEDIATE_TASKS_MAX: usize = 64;
/// More data than this is not asked for; the SCSI side refuses such a command.
pub const COMMAND_BYTES_MAX: u32 = 32 << 20;
/// Most data of one session under way in either direction, bytes: two of the longest commands and some
/// headers. One command always has room.
pub const BYTES_IN_FLIGHT_MAX: usize = 2 * COMMAND_BYTES_MAX as usize + (1 << 20);
/// Longest ping that is answered, and longest text PDU.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// When initiators are asked whether they are still there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Probing {
    /// After so long without a word.
    pub interval: Duration,
    /// Without an answer for so long they are gone.
    pub limit: Duration,
}

impl Default for Probing {
    fn default() -> Probing {
        Probing {
            interval: Duration::from_secs(10),
            limit: Duration::from_secs(10),
        }
    }
}

/// What is to be done.
#[derive(Debug)]
pub enum Output {
    /// Hand a command to the target; [`Session::handle_outcome`] takes what comes of it.
    Submit(Command),
    /// Hand a task management function to the target; [`Session::handle_managed`] takes the answer.
    Manage {
        /// Comes back.
        id: u32,
        /// What.
        function: TaskFunction,
        /// Logical unit.
        lun: [u8; 8],
        /// Task.
        tag: u32,
    },
    /// List targets; [`Session::handle_targets`] takes the list.
    ListTargets {
        /// Comes back.
        cid: u16,
        /// Which.
        wanted: Wanted,
    },
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Ending {
    /// The initiator logged out.
    #[error("logged out")]
    LoggedOut,
    /// A connection was lost.
    #[error("connection lost")]
    Lost,
    /// The initiator does not answer.
    #[error("initiator does not answer")]
    Dead,
    /// What came could not be understood.
    #[error("protocol error: {0}")]
    Framing(#[from] FramingError),
    /// Data was damaged, and nothing was agreed on to repair it.
    #[error("data digest is wrong")]
    DataDigest,
    /// The initiator logged in again.
    #[error("reinstated by a new login")]
    Reinstated,
    /// Asked to log out, it did not in time, or it was thrown out.
    #[error("dropped by the target")]
    Dropped,
}

/// A session, seen from the target.
#[derive(Debug)]
pub struct Session {
    nexus: NexusId,
    /// Whether it is for finding targets only.
    discovery: bool,
    params: Params,
    probing: Probing,
    exp_cmd_sn: u32,
    max_cmd_sn: u32,
    /// What came before its turn, by CmdSN.
    early: HashMap<u32, Early>,
    tasks: HashMap<u32, Task>,
    /// Delivered tasks that the target does not have yet, in order.
    queue: VecDeque<u32>,
    /// Data of tasks that is under way or has room set aside.
    reserved_bytes: usize,
    connections: BTreeMap<u16, Connection>,
    managing: HashMap<u32, Managing>,
    next_id: u32,
    next_ttt: u32,
    outputs: VecDeque<Output>,
    ending: Option<Ending>,
    /// By when it is to have logged out.
    deadline: Option<Instant>,
    /// When its last command came.
    last_command: Option<Instant>,
}

/// What came before its turn.
#[derive(Debug)]
enum Early {
    /// The task is registered already.
    Task(u32),
    /// Another request.
    Request(u16, Request, Bytes, Bhs),
    /// Aborted before it came.
    Void,
}

/// A task management function under way.
#[derive(Debug)]
struct Managing {
    cid: u16,
    itt: u32,
}

impl Session {
    /// A session whose first connection has just logged in. `cmd_sn` is that of its first command.
    pub fn new(
        nexus: NexusId,
        discovery: bool,
        params: Params,
        probing: Probing,
        cmd_sn: u32,
    ) -> Session {
        Session {
            nexus,
            discovery,
            params,
            probing,
            exp_cmd_sn: cmd_sn,
            max_cmd_sn: cmd_sn.wrapping_add(TASKS_MAX - 1),
            early: HashMap::new(),
            tasks: HashMap::new(),
            queue: VecDeque::new(),
            reserved_bytes: 0,
            connections: BTreeMap::new(),
            managing: HashMap::new(),
            next_id: 0,
            next_ttt: 0,
            outputs: VecDeque::new(),
            ending: None,
            deadline: None,
            last_command: None,
        }
    }

    /// ExpCmdSN and MaxCmdSN.
    pub fn window(&self) -> CmdNumbers {
        CmdNumbers {
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
        }
    }

    /// Adds a connection.
    pub fn add_connection(&mut self, connection: Connection) {
        self.connections.insert(connection.cid, connection);
    }

    /// Whether another connection may be added; one with the same id is replaced.
    pub fn has_room_for(&self, cid: u16) -> bool {
        self.connections.contains_key(&cid)
            || self.connections.len() < usize::from(self.params.max_connections)
    }

    /// A connection.
    pub fn connection(&mut self, cid: u16) -> Option<&mut Connection> {
        self.connections.get_mut(&cid)
    }

    /// All connections.
    pub fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.connections.values()
    }

    /// Tasks under way.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// When its last command came.
    pub fn last_command(&self) -> Option<Instant> {
        self.last_command
    }

    /// Whether it was asked to log out.
    pub fn is_asked_to_leave(&self) -> bool {
        self.deadline.is_some()
    }

    /// What was agreed on.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Why it ended, if it did. What its connections still have to send may be sent.
    pub fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Ends it: nothing is taken any more, and connections close when all is sent.
    pub fn end(&mut self, why: Ending) {
        self.ending.get_or_insert(why);
        self.tasks.clear();
        self.queue.clear();
        self.early.clear();
        self.managing.clear();
        self.outputs.clear();
        self.reserved_bytes = 0;
        for connection in self.connections.values_mut() {
            connection.close();
        }
    }

    /// A connection cannot be used any more.
    pub fn handle_lost(&mut self, cid: u16) {
        let Some(connection) = self.connections.remove(&cid) else {
            return;
        };
        // Without connection recovery, a lost connection takes its session along (§7.6); one that was
        // logged out does not.
        if !connection.is_closing() {
            self.end(Ending::Lost);
        } else if self.connections.is_empty() {
            self.end(Ending::LoggedOut);
        }
    }

    /// A connection logs in again: what came on the old one is forgotten (§6.3.5).
    pub fn reinstate_connection(&mut self, cid: u16) {
        for tag in self.tags_of(&[cid]) {
            self.abandon(tag);
        }
        self.connections.remove(&cid);
    }

    fn tags_of(&self, cids: &[u16]) -> Vec<u32> {
        let tags = self.tasks.iter();
        let tags = tags.filter(|(_, task)| cids.contains(&task.cid));
        tags.map(|(tag, _)| *tag).collect()
    }

    /// Whether tasks wait for room.
    pub fn has_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// What comes on a connection cannot be understood any more.
    pub fn handle_garbage(&mut self, cid: u16, error: FramingError, bhs: Option<&Bhs>) {
        if let Some(bhs) = bhs {
            self.reject(cid, bhs, Reason::ProtocolError);
        }
        self.end(error.into());
    }

    /// Takes a PDU that came on a connection.
    pub fn handle_pdu(&mut self, now: Instant, cid: u16, pdu: Pdu) {
        let Some(connection) = self.connections.get_mut(&cid) else {
            return;
        };
        if connection.is_closing() {
            return;
        }
        connection.hear(now);
        let request = Request::decode(&pdu.bhs, &pdu.ahs);
        if !pdu.data_is_intact {
            return self.handle_damaged(cid, &pdu.bhs, request.ok());
        }
        let Ok(request) = request else {
            return self.reject(cid, &pdu.bhs, Reason::InvalidField);
        };
        if let Some(exp_stat_sn) = exp_stat_sn(&request) {
            connection.acknowledge(exp_stat_sn);
        }
        if matches!(request, Request::Command(_)) {
            self.last_command = Some(now);
        }
        match request {
            Request::DataOut(data) => self.handle_data_out(cid, data, pdu.data, &pdu.bhs),
            Request::Snack(snack) => self.handle_snack(cid, snack, &pdu.bhs),
            Request::Login(_) => self.reject(cid, &pdu.bhs, Reason::ProtocolError),
            Request::Unknown(_) => self.reject(cid, &pdu.bhs, Reason::NotSupported),
            // Pings that ask for no answer are no commands.
            Request::NopOut(nop) if nop.common.itt == RESERVED_TAG => {}
            request => self.handle_numbered(cid, request, pdu.data, pdu.bhs),
        }
    }

    /// A PDU with a wrong data digest (§7.8).
    fn handle_damaged(&mut self, cid: u16, bhs: &Bhs, request: Option<Request>) {
        self.reject(cid, bhs, Reason::DataDigest);
        match request {
            Some(Request::DataOut(data)) => self.handle_damaged_data(cid, data),
            // Its CmdSN was not taken: the initiator sends it again.
            Some(_) if self.params.error_recovery_level > 0 => {}
            _ => self.end(Ending::DataDigest),
        }
    }

    /// Requests with a CmdSN (§4.2.2.1).
    fn handle_numbered(&mut self, cid: u16, request: Request, data: Bytes, bhs: Bhs) {
        let Some(common) = common(&request) else {
            return;
        };
        if common.immediate {
            return self.deliver(cid, request, data, bhs);
        }
        let cmd_sn = common.cmd_sn;
        // "The target MUST silently ignore any non-immediate command outside of this range".
        let outside = serial_before(cmd_sn, self.exp_cmd_sn)
            || serial_before(self.max_cmd_sn, cmd_sn)
            || self.early.contains_key(&cmd_sn);
        if outside {
            return;
        }
        if cmd_sn == self.exp_cmd_sn {
            self.exp_cmd_sn = cmd_sn.wrapping_add(1);
            self.deliver(cid, request, data, bhs);
            return self.deliver_early();
        }
        let early = match request {
            // Its unsolicited data follows it, and has to find it.
            Request::Command(command) => {
                let itt = command.common.itt;
                match self.register(cid, command, data, &bhs) {
                    true => Early::Task(itt),
                    false => Early::Void,
                }
            }
            _ if data.len() > SMALL_BYTES_MAX => Early::Void,
            request => Early::Request(cid, request, data, bhs),
        };
        self.early.insert(cmd_sn, early);
    }

    fn deliver_early(&mut self) {
        while let Some(early) = self.early.remove(&self.exp_cmd_sn) {
            self.exp_cmd_sn = self.exp_cmd_sn.wrapping_add(1);
            match early {
                Early::Task(itt) => self.deliver_task(itt),
                Early::Request(cid, request, data, bhs) => self.deliver(cid, request, data, bhs),
                Early::Void => {}
            }
        }
    }

    /// A request whose turn it is.
    fn deliver(&mut self, cid: u16, request: Request, data: Bytes, bhs: Bhs) {
        match request {
            Request::Command(command) => {
                let itt = command.common.itt;
                if self.register(cid, command, data, &bhs) {
                    self.deliver_task(itt);
                }
            }
            Request::NopOut(nop) => self.handle_nop(cid, nop, data),
            Request::Task(task) => self.handle_task_request(cid, task, &bhs),
            Request::Text(text) => self.handle_text(cid, text, &data, &bhs),
            Request::Logout(logout) => self.handle_logout(cid, logout),
            Request::DataOut(_) | Request::Snack(_) | Request::Login(_) | Request::Unknown(_) => {}
        }
        self.open_window();
    }

    /// Lets the initiator send as many commands as there is room for. MaxCmdSN never goes back.
    fn open_window(&mut self) {
        let busy = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX);
        let room = TASKS_MAX.saturating_sub(busy);
        let max = self.exp_cmd_sn.wrapping_add(room).wrapping_sub(1);
        if serial_before(self.max_cmd_sn, max) {
            self.max_cmd_sn = max;
        }
    }

    /// Sends a PDU with a status on a connection, if it is still there.
    fn send_status(&mut self, cid: u16, bhs: Bhs, data: impl Into<Bytes>) {
        let numbers = self.window();
        if let Some(connection) = self.connections.get_mut(&cid) {
            connection.send_status(numbers, bhs, whole(data));
        }
    }

    fn reject(&mut self, cid: u16, rejected: &Bhs, reason: Reason) {
        let data = Bytes::copy_from_slice(rejected);
        self.send_status(cid, reject(reason), data);
    }

    /// Answers a ping at once, whatever the disks do.
    fn handle_nop(&mut self, cid: u16, nop: NopOut, data: Bytes) {
        let numbers = self.window();
        let Some(connection) = self.connections.get_mut(&cid) else {
            return;
        };
        let most = connection.sent_data_bytes_max.min(SMALL_BYTES_MAX);
        let echo = data.slice(..data.len().min(most));
        let bhs = nop_in(nop.common.itt, RESERVED_TAG, [0; 8]);
        connection.send_status(numbers, bhs, whole(echo));
    }

    fn next_ttt(&mut self) -> u32 {
        self.next_ttt = self.next_ttt.wrapping_add(1);
        if self.next_ttt == RESERVED_TAG {
            self.next_ttt = 0;
        }
        self.next_ttt
    }

    /// Task management (§11.5).
    fn handle_task_request(&mut self, cid: u16, request: TaskRequest, bhs: &Bhs) {
        use response::task_response as code;
        if self.discovery {
            return self.reject(cid, bhs, Reason::ProtocolError);
        }
        let function = match request.function {
            1 => TaskFunction::AbortTask,
            2 => TaskFunction::AbortTaskSet,
            3 => TaskFunction::ClearAca,
            4 => TaskFunction::ClearTaskSet,
            5 => TaskFunction::LogicalUnitReset,
            6 => TaskFunction::TargetWarmReset,
            7 => TaskFunction::TargetColdReset,
            8 => return self.answer_task(cid, &request, code::REASSIGNMENT_NOT_SUPPORTED),
            _ => return self.answer_task(cid, &request, code::NOT_SUPPORTED),
        };
        if function == TaskFunction::AbortTask
            && let Some(answer) = self.abort_here(&request)
        {
            self.answer_task(cid, &request, answer);
            return self.pump();
        }
        self.abort_unsubmitted(function, request.lun);
        if self.managing.len() >= IMMEDIATE_TASKS_MAX {
            return self.reject(cid, bhs, Reason::TooManyImmediate);
        }
        self.next_id = self.next_id.wrapping_add(1);
        let itt = request.common.itt;
        self.managing.insert(self.next_id, Managing { cid, itt });
        self.outputs.push_back(Output::Manage {
            id: self.next_id,
            function,
            lun: request.lun,
            tag: request.referenced_tag,
        });
        self.pump();
    }

    fn answer_task(&mut self, cid: u16, request: &TaskRequest, answer: u8) {
        let bhs = task_response(request.common.itt, answer);
        self.send_status(cid, bhs, Bytes::new());
    }

    /// Aborts a task that the target does not have; `None` if it has it.
    fn abort_here(&mut self, request: &TaskRequest) -> Option<u8> {
        use response::task_response as code;
        match self.tasks.get(&request.referenced_tag) {
            Some(task) if task.lun != request.lun => Some(code::TASK_DOES_NOT_EXIST),
            Some(task) if task.phase == Phase::WithTarget => None,
            Some(_) => {
                self.remove_task(request.referenced_tag);
                Some(code::COMPLETE)
            }
            None => {
                // "If the Referenced Task Tag does not identify an existing task, but if the CmdSN
                // indicated by the RefCmdSN field ... is within the valid CmdSN window and less than
                // the CmdSN of the Task Management Function Request itself, then targets must consider
                // the CmdSN received and return the Function complete response" (§11.6.1).
                let sn = request.ref_cmd_sn;
                let missing = !serial_before(sn, self.exp_cmd_sn)
                    && serial_before(sn, request.common.cmd_sn)
                    && !serial_before(self.max_cmd_sn, sn)
                    && !self.early.contains_key(&sn);
                if !missing {
                    return Some(code::TASK_DOES_NOT_EXIST);
                }
                self.early.insert(sn, Early::Void);
                self.deliver_early();
                Some(code::COMPLETE)
            }
        }
    }

    /// Aborts what a function means and the target does not know of.
    fn abort_unsubmitted(&mut self, function: TaskFunction, lun: [u8; 8]) {
        let everywhere = match function {
            TaskFunction::AbortTask | TaskFunction::ClearAca => return,
            TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset => true,
            TaskFunction::AbortTaskSet
            | TaskFunction::ClearTaskSet
            | TaskFunction::LogicalUnitReset => false,
        };
        let meant = |task: &Task| {
            task.phase != Phase::WithTarget && task.delivered && (everywhere || task.lun == lun)
        };
        let tags = self.tasks.iter().filter(|(_, task)| meant(task));
        for tag in tags.map(|(tag, _)| *tag).collect::<Vec<_>>() {
            self.remove_task(tag);
        }
    }

    /// A task management function was carried out.
    pub fn handle_managed(&mut self, id: u32, response: TaskResponse) {
        use response::task_response as code;
        let Some(managing) = self.managing.remove(&id) else {
            return;
        };
        let answer = match response {
            TaskResponse::Complete => code::COMPLETE,
            TaskResponse::TaskDoesNotExist => code::TASK_DOES_NOT_EXIST,
            TaskResponse::LunDoesNotExist => code::LUN_DOES_NOT_EXIST,
            TaskResponse::NotSupported => code::NOT_SUPPORTED,
            TaskResponse::Rejected => code::REJECTED,
        };
        let bhs = task_response(managing.itt, answer);
        self.send_status(managing.cid, bhs, Bytes::new());
    }

    /// Logout (§11.14).
    fn handle_logout(&mut self, cid: u16, request: LogoutRequest) {
        use response::logout_response as code;
        let (answer, closes): (u8, Vec<u16>) = match request.reason {
            0 => (code::CLOSED, self.connections.keys().copied().collect()),
            1 if self.connections.contains_key(&request.cid) => (code::CLOSED, vec![request.cid]),
            1 => (code::CID_NOT_FOUND, Vec::new()),
            _ => (code::RECOVERY_NOT_SUPPORTED, Vec::new()),
        };
        for tag in self.tags_of(&closes) {
            self.abandon(tag);
        }
        let (wait, retain) = (self.params.time2wait, self.params.time2retain);
        let bhs = logout_response(request.common.itt, answer, wait, retain);
        self.send_status(cid, bhs, Bytes::new());
        for cid in &closes {
            if let Some(connection) = self.connections.get_mut(cid) {
                connection.close();
            }
        }
        if self.connections.values().all(Connection::is_closing) {
            self.end(Ending::LoggedOut);
        }
    }

    /// A task whose connection goes: nobody waits for it any more.
    fn abandon(&mut self, tag: u32) {
        let Some(task) = self.tasks.get(&tag) else {
            return;
        };
        if task.phase == Phase::WithTarget {
            self.next_id = self.next_id.wrapping_add(1);
            self.outputs.push_back(Output::Manage {
                id: self.next_id,
                function: TaskFunction::AbortTask,
                lun: task.lun,
                tag,
            });
        }
        self.remove_task(tag);
    }

    /// SNACK (§11.16).
    fn handle_snack(&mut self, cid: u16, snack: Snack, bhs: &Bhs) {
        if self.params.error_recovery_level == 0 {
            return self.reject(cid, bhs, Reason::Snack);
        }
        let numbers = self.window();
        let done = match snack.kind {
            0 if self.resend_r2ts(cid, &snack) => true,
            0 => self.connections.get_mut(&cid).is_some_and(|connection| {
                connection.resend_data(numbers, snack.itt, snack.first, snack.count)
            }),
            1 => self.connections.get_mut(&cid).is_some_and(|connection| {
                connection.resend_status(numbers, snack.first, snack.count)
            }),
            // We never ask for a DataACK.
            2 => return self.reject(cid, bhs, Reason::InvalidDataAck),
            _ => false,
        };
        if !done {
            self.reject(cid, bhs, Reason::Snack);
        }
    }

    /// When [`Session::handle_timeout`] is to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let Probing { interval, limit } = self.probing;
        let due = |connection: &Connection| connection.liveness_due(interval, limit);
        let probes = self.connections.values().map(due).min();
        probes.into_iter().chain(self.deadline).min()
    }

    /// Time has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return self.drop_session();
        }
        let Probing { interval, limit } = self.probing;
        let cids: Vec<u16> = self.connections.keys().copied().collect();
        for cid in cids {
            let Some(connection) = self.connections.get(&cid) else {
                continue;
            };
            match connection.liveness(now, interval, limit) {
                Liveness::Heard => {}
                Liveness::Dead => return self.end(Ending::Dead),
                // Pings are not for discovery sessions.
                Liveness::Silent if self.discovery => return self.end(Ending::Dead),
                Liveness::Silent => self.probe(cid, now),
            }
        }
    }

    fn probe(&mut self, cid: u16, now: Instant) {
        // "The Target Transfer Tag ... MUST be valid" for an answer to come (§11.19.2).
        let ttt = self.next_ttt();
        let numbers = self.window();
        if let Some(connection) = self.connections.get_mut(&cid) {
            connection.send_plain(numbers, nop_in(RESERVED_TAG, ttt, [0; 8]));
            connection.probed(ttt, now);
        }
    }

    /// Asks the initiator to log out within a time, after which the session is dropped.
    pub fn request_logout(&mut self, now: Instant, within: Duration) {
        let seconds = u16::try_from(within.as_secs()).unwrap_or(u16::MAX);
        let cids: Vec<u16> = self.connections.keys().copied().collect();
        for cid in cids {
            let event = AsyncEvent::LogoutRequest(seconds);
            self.send_status(cid, async_message(event), Bytes::new());
        }
        let deadline = now + within;
        self.deadline = Some(self.deadline.map_or(deadline, |it| it.min(deadline)));
    }

    /// Drops the session, and tells the initiator so.
    pub fn drop_session(&mut self) {
        let event = AsyncEvent::DropSession {
            time2wait: self.params.time2wait,
            time2retain: self.params.time2retain,
        };
        let cids: Vec<u16> = self.connections.keys().copied().collect();
        for cid in cids {
            self.send_status(cid, async_message(event), Bytes::new());
        }
        self.end(Ending::Dropped);
    }
}

/// Fields that requests with a CmdSN share.
fn common(request: &Request) -> Option<&Common> {
    match request {
        Request::NopOut(it) => Some(&it.common),
        Request::Command(it) => Some(&it.common),
        Request::Task(it) => Some(&it.common),
        Request::Text(it) => Some(&it.common),
        Request::Logout(it) => Some(&it.common),
        Request::Login(_) | Request::DataOut(_) | Request::Snack(_) | Request::Unknown(_) => None,
    }
}

fn exp_stat_sn(request: &Request) -> Option<u32> {
    match request {
        Request::DataOut(DataOut { exp_stat_sn, .. })
        | Request::Snack(Snack { exp_stat_sn, .. }) => Some(*exp_stat_sn),
        other => common(other).map(|common| common.exp_stat_sn),
    }
}

/// What a PDU is, for logs.
pub fn opcode_of(bhs: &Bhs) -> u8 {
    bhs[0] & opcode::MASK
}

#[cfg(test)]
mod tests;
