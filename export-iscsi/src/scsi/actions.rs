//! The seam to the transport: what comes in and what goes out.

use bytes::Bytes;
use pss_core::volume::device::{DeviceRequest, ReadPart};
use pss_core::volume::reservation::ReservationRequest;

/// Identifies an I_T nexus within this process; made by the transport for each session.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NexusId(pub u64);

/// The ports at both ends of an I_T nexus (RFC 7143 §4.4.2).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NexusInfo {
    /// iSCSI name of the initiator. With the ISID it names the initiator port.
    pub initiator_name: String,
    /// Of the session.
    pub isid: [u8; 6],
    /// Target portal group tag, which is the relative target port identifier.
    pub portal_group: u16,
}

/// Task attribute (SAM-5 §8.6).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TaskAttribute {
    /// None given: treated as SIMPLE.
    #[default]
    Untagged,
    /// SIMPLE.
    Simple,
    /// ORDERED.
    Ordered,
    /// HEAD OF QUEUE.
    HeadOfQueue,
    /// ACA: never valid, as no ACA is ever established (NACA is refused).
    Aca,
}

/// A SCSI command with all of its data-out.
#[derive(Clone, Debug)]
pub struct Command {
    /// Where it came from.
    pub nexus: NexusId,
    /// Initiator task tag, unique in the nexus.
    pub tag: u32,
    /// Logical unit number as it was sent.
    pub lun: [u8; 8],
    /// Task attribute.
    pub attribute: TaskAttribute,
    /// Command descriptor block, padded.
    pub cdb: [u8; 16],
    /// The whole CDB if it is longer than 16 bytes (from an AHS).
    pub long_cdb: Option<Bytes>,
    /// What the initiator sent, in parts so that nothing is copied.
    pub data_out: Vec<Bytes>,
    /// Room that the initiator has for data-in; 0 if none.
    pub read_bytes: u32,
    /// Data-out that the initiator announced.
    pub write_bytes: u32,
}

/// Status (SAM-5 §5.3.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Status {
    /// GOOD.
    Good = 0x00,
    /// CHECK CONDITION: sense data say what.
    CheckCondition = 0x02,
    /// CONDITION MET.
    ConditionMet = 0x04,
    /// BUSY: try again.
    Busy = 0x08,
    /// RESERVATION CONFLICT.
    ReservationConflict = 0x18,
    /// TASK SET FULL.
    TaskSetFull = 0x28,
    /// ACA ACTIVE.
    AcaActive = 0x30,
    /// TASK ABORTED.
    TaskAborted = 0x40,
}

/// How a command ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outcome {
    /// Status.
    pub status: Status,
    /// Sense data, empty if none.
    pub sense: Vec<u8>,
    /// Consecutive parts; the transport cuts them at the command's `read_bytes`.
    pub data_in: Vec<ReadPart>,
    /// What the command would have transferred in.
    pub in_bytes: u64,
    /// What the command wanted of data-out.
    pub out_bytes: u64,
}

/// Task management function (SAM-5 §7).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TaskFunction {
    /// ABORT TASK.
    AbortTask,
    /// ABORT TASK SET.
    AbortTaskSet,
    /// CLEAR TASK SET.
    ClearTaskSet,
    /// LOGICAL UNIT RESET.
    LogicalUnitReset,
    /// TARGET WARM RESET.
    TargetWarmReset,
    /// TARGET COLD RESET.
    TargetColdReset,
    /// CLEAR ACA.
    ClearAca,
}

/// Answer to a task management function (RFC 7143 §11.6.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TaskResponse {
    /// Function complete.
    Complete,
    /// Task does not exist.
    TaskDoesNotExist,
    /// LUN does not exist.
    LunDoesNotExist,
    /// Task management function not supported.
    NotSupported,
    /// Function rejected.
    Rejected,
}

/// What is to be done, in order; the driver drains it after each call.
#[derive(Debug, Default)]
pub struct Actions(pub Vec<Action>);

/// One thing to be done.
#[derive(Debug)]
pub enum Action {
    /// Hand a request to the LUN's device; its result goes to [`super::Target::completed`].
    Submit {
        /// Comes back with the result.
        cookie: u64,
        /// Which disk.
        lun: u16,
        /// What.
        request: DeviceRequest,
        /// Version of the LUN's reservations under which the request was found to be allowed. The cell
        /// refuses it with `DeviceError::ReservationChanged` if another one holds by then.
        reservations: u64,
    },
    /// Hand a request to the LUN's reservations; its result goes to [`super::Target::reserved`].
    Reserve {
        /// Comes back with the result.
        cookie: u64,
        /// Which disk.
        lun: u16,
        /// What.
        request: ReservationRequest,
    },
    /// Send the response, with data-in.
    Done {
        /// Where to.
        nexus: NexusId,
        /// Of the command.
        tag: u32,
        /// How it ended.
        outcome: Outcome,
    },
    /// No response will come for this command.
    Aborted {
        /// Of the command.
        nexus: NexusId,
        /// Of the command.
        tag: u32,
    },
    /// Send the response to a task management function.
    Managed {
        /// Of the function.
        nexus: NexusId,
        /// The caller's cookie.
        id: u32,
        /// What came of it.
        response: TaskResponse,
    },
    /// Close these sessions (cold reset).
    DropSessions {
        /// Which.
        nexuses: Vec<NexusId>,
    },
}
