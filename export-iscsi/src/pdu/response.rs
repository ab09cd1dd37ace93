//! What a target sends. Sequence numbers are filled in when a PDU is sent, see [`Numbers`].

use super::{BHS_BYTES, Bhs, CONTINUE, FINAL, RESERVED_TAG, opcode, set_word};

/// The numbers in every PDU of a target.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Numbers {
    /// Number of this status on its connection.
    pub stat_sn: u32,
    /// The command that is expected next.
    pub exp_cmd_sn: u32,
    /// The last command that may be sent.
    pub max_cmd_sn: u32,
}

impl Numbers {
    /// Fills them in.
    pub fn put(&self, bhs: &mut Bhs) {
        set_word(bhs, 24, self.stat_sn);
        set_word(bhs, 28, self.exp_cmd_sn);
        set_word(bhs, 32, self.max_cmd_sn);
    }
}

/// A header with an opcode, the final bit, and an ITT.
pub fn header(opcode: u8, itt: u32) -> Bhs {
    let mut bhs = [0; BHS_BYTES];
    bhs[0] = opcode;
    bhs[1] = FINAL;
    set_word(&mut bhs, 16, itt);
    bhs
}

/// NOP-In (§11.19): the answer to a ping, or with an ITT of 0xffffffff a ping.
pub fn nop_in(itt: u32, ttt: u32, lun: [u8; 8]) -> Bhs {
    let mut bhs = header(opcode::NOP_IN, itt);
    bhs[8..16].copy_from_slice(&lun);
    set_word(&mut bhs, 20, ttt);
    bhs
}

/// How much more or less was transferred than the initiator expected (§11.4.5).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Residual {
    /// As expected.
    #[default]
    None,
    /// So many bytes did not fit.
    Overflow(u32),
    /// So many bytes were not transferred.
    Underflow(u32),
}

impl Residual {
    /// What the initiator expected, what was transferred, and what the command would have transferred.
    pub fn of(expected: u64, transferred: u64, wanted: u64) -> Residual {
        let clamp = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        if wanted > expected {
            Residual::Overflow(clamp(wanted - expected))
        } else if transferred < expected {
            Residual::Underflow(clamp(expected - transferred))
        } else {
            Residual::None
        }
    }

    /// Flags with the bits at `overflow` and below it, and the count.
    fn parts(self, overflow: u8) -> (u8, u32) {
        match self {
            Residual::None => (0, 0),
            Residual::Overflow(count) => (overflow, count),
            Residual::Underflow(count) => (overflow >> 1, count),
        }
    }
}

/// SCSI Response (§11.4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ScsiResponse {
    /// Task.
    pub itt: u32,
    /// SCSI status.
    pub status: u8,
    /// Of the only direction, or of data out.
    pub residual: Residual,
    /// Of data in, if both directions are used.
    pub bidirectional: Residual,
    /// How many Data-In and R2T PDUs were sent for the task.
    pub exp_data_sn: u32,
}

impl ScsiResponse {
    /// The header: response code 0, command completed at target.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::SCSI_RESPONSE, self.itt);
        let (flags, count) = self.residual.parts(0x04);
        let (read_flags, read_count) = self.bidirectional.parts(0x10);
        bhs[1] |= flags | read_flags;
        bhs[3] = self.status;
        set_word(&mut bhs, 36, self.exp_data_sn);
        set_word(&mut bhs, 40, read_count);
        set_word(&mut bhs, 44, count);
        bhs
    }
}

/// SCSI Data-In (§11.7).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataIn {
    /// Ends a sequence.
    pub last: bool,
    /// Task.
    pub itt: u32,
    /// Number within the task.
    pub data_sn: u32,
    /// Where the data belongs, bytes.
    pub buffer_offset: u32,
    /// Ends the command too: SCSI status and residual.
    pub status: Option<(u8, Residual)>,
}

impl DataIn {
    /// The header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::DATA_IN, self.itt);
        bhs[1] = if self.last { FINAL } else { 0 };
        if let Some((status, residual)) = self.status {
            let (flags, count) = residual.parts(0x04);
            bhs[1] |= FINAL | 1 | flags;
            bhs[3] = status;
            set_word(&mut bhs, 44, count);
        }
        set_word(&mut bhs, 20, RESERVED_TAG);
        set_word(&mut bhs, 36, self.data_sn);
        set_word(&mut bhs, 40, self.buffer_offset);
        bhs
    }
}

/// Ready To Transfer (§11.8).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct R2t {
    /// Task.
    pub itt: u32,
    /// What the Data-Out PDUs are to carry.
    pub ttt: u32,
    /// Logical unit of the command.
    pub lun: [u8; 8],
    /// Number within the task.
    pub r2t_sn: u32,
    /// From where, bytes.
    pub buffer_offset: u32,
    /// How much, bytes.
    pub length: u32,
}

impl R2t {
    /// The header.
    pub fn encode(&self) -> Bhs {
        let mut bhs = header(opcode::R2T, self.itt);
        bhs[8..16].copy_from_slice(&self.lun);
        set_word(&mut bhs, 20, self.ttt);
        set_word(&mut bhs, 36, self.r2t_sn);
        set_word(&mut bhs, 40, self.buffer_offset);
        set_word(&mut bhs, 44, self.length);
        bhs
    }
}

/// Task management response codes (§11.6.1).
pub mod task_response {
    pub const COMPLETE: u8 = 0;
    pub const TASK_DOES_NOT_EXIST: u8 = 1;
    pub const LUN_DOES_NOT_EXIST: u8 = 2;
    pub const REASSIGNMENT_NOT_SUPPORTED: u8 = 4;
    pub const NOT_SUPPORTED: u8 = 5;
    pub const REJECTED: u8 = 255;
}

/// Task Management Function Response (§11.6).
pub fn task_response(itt: u32, response: u8) -> Bhs {
    let mut bhs = header(opcode::TASK_RESPONSE, itt);
    bhs[2] = response;
    bhs
}

/// Logout response codes (§11.15.1).
pub mod logout_response {
    pub const CLOSED: u8 = 0;
    pub const CID_NOT_FOUND: u8 = 1;
    pub const RECOVERY_NOT_SUPPORTED: u8 = 2;
}

/// Logout Response (§11.15); the times are seconds.
pub fn logout_response(itt: u32, response: u8, time2wait: u16, time2retain: u16) -> Bhs {
    let mut bhs = header(opcode::LOGOUT_RESPONSE, itt);
    bhs[2] = response;
    bhs[40..42].copy_from_slice(&time2wait.to_be_bytes());
    bhs[42..44].copy_from_slice(&time2retain.to_be_bytes());
    bhs
}

/// Text Response (§11.11).
pub fn text_response(itt: u32, last: bool, continues: bool, lun: [u8; 8], ttt: u32) -> Bhs {
    let mut bhs = header(opcode::TEXT_RESPONSE, itt);
    bhs[1] = if last { FINAL } else { 0 } | if continues { CONTINUE } else { 0 };
    bhs[8..16].copy_from_slice(&lun);
    set_word(&mut bhs, 20, ttt);
    bhs
}

/// Reasons to reject (§11.17.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Reason {
    /// The data digest is wrong.
    DataDigest = 0x02,
    /// What a SNACK wants is not there.
    Snack = 0x03,
    /// Not allowed now.
    ProtocolError = 0x04,
    /// No such request here.
    NotSupported = 0x05,
    /// Too many immediate commands.
    TooManyImmediate = 0x06,
    /// The task is still under way.
    TaskInProgress = 0x07,
    /// DataACK for what was not sent.
    InvalidDataAck = 0x08,
    /// A field makes no sense.
    InvalidField = 0x09,
    /// No resources for a long operation.
    LongOperation = 0x0a,
}

/// Reject (§11.17); the header that is rejected is its data.
pub fn reject(reason: Reason) -> Bhs {
    let mut bhs = header(opcode::REJECT, RESERVED_TAG);
    bhs[2] = reason as u8;
    bhs
}

/// Events of asynchronous messages (§11.9.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AsyncEvent {
    /// The initiator should log this connection out within so many seconds.
    LogoutRequest(u16),
    /// The target will drop the connection; reconnect after and until so many seconds.
    DropConnection {
        /// Which.
        cid: u16,
        /// Earliest.
        time2wait: u16,
        /// Latest.
        time2retain: u16,
    },
    /// The target will drop all connections of the session.
    DropSession {
        /// Earliest.
        time2wait: u16,
        /// Latest.
        time2retain: u16,
    },
}

/// Asynchronous Message (§11.9).
pub fn async_message(event: AsyncEvent) -> Bhs {
    let mut bhs = header(opcode::ASYNC_MESSAGE, RESERVED_TAG);
    let (code, parameters) = match event {
        AsyncEvent::LogoutRequest(seconds) => (1, [0, 0, seconds]),
        AsyncEvent::DropConnection {
            cid,
            time2wait,
            time2retain,
        } => (2, [cid, time2wait, time2retain]),
        AsyncEvent::DropSession {
            time2wait,
            time2retain,
        } => (3, [0, time2wait, time2retain]),
    };
    bhs[36] = code;
    for (at, parameter) in [38, 40, 42].into_iter().zip(parameters) {
        bhs[at..at + 2].copy_from_slice(&parameter.to_be_bytes());
    }
    bhs
}

/// Login status (§11.13.5).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum LoginStatus {
    /// Goes on.
    Success = 0x0000,
    /// The target is elsewhere for now.
    MovedTemporarily = 0x0101,
    /// The target is elsewhere for good.
    MovedPermanently = 0x0102,
    /// The initiator made a mistake.
    InitiatorError = 0x0200,
    /// Not who it says.
    AuthenticationFailure = 0x0201,
    /// May not use this target.
    AuthorizationFailure = 0x0202,
    /// There is no such target.
    NotFound = 0x0203,
    /// It is gone and will not return.
    TargetRemoved = 0x0204,
    /// No version in common.
    UnsupportedVersion = 0x0205,
    /// No more connections in this session.
    TooManyConnections = 0x0206,
    /// A name is missing.
    MissingParameter = 0x0207,
    /// This connection cannot be in that session.
    CannotInclude = 0x0208,
    /// No such type of session.
    SessionTypeNotSupported = 0x0209,
    /// There is no such session.
    SessionDoesNotExist = 0x020a,
    /// Not allowed during login.
    InvalidDuringLogin = 0x020b,
    /// We made a mistake.
    TargetError = 0x0300,
    /// Not now.
    ServiceUnavailable = 0x0301,
    /// No resources.
    OutOfResources = 0x0302,
}

/// Login Response (§11.13).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoginResponse {
    /// Leaves the stage.
    pub transit: bool,
    /// The text goes on in the next PDU.
    pub continues: bool,
    /// Stage now.
    pub current_stage: u8,
    /// Stage next, if it leaves.
    pub next_stage: u8,
    /// Echo.
    pub isid: [u8; 6],
    /// Session; 0 until the last response.
    pub tsih: u16,
    /// Echo.
    pub itt: u32,
    /// Outcome.
    pub status: LoginStatus,
}

impl LoginResponse {
    /// The header. Versions are 0.
    pub fn encode(&self, numbers: Numbers) -> Bhs {
        let mut bhs = header(opcode::LOGIN_RESPONSE, self.itt);
        bhs[1] = if self.transit {
            FINAL | self.next_stage
        } else {
            0
        };
        bhs[1] |= self.current_stage << 2;
        if self.continues {
            bhs[1] |= CONTINUE;
        }
        bhs[8..14].copy_from_slice(&self.isid);
        bhs[14..16].copy_from_slice(&self.tsih.to_be_bytes());
        numbers.put(&mut bhs);
        bhs[36..38].copy_from_slice(&(self.status as u16).to_be_bytes());
        bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residuals_both_ways() {
        // RFC 7143 §11.4.5.1.
        assert_eq!(Residual::of(512, 512, 512), Residual::None);
        assert_eq!(Residual::of(512, 512, 1024), Residual::Overflow(512));
        assert_eq!(Residual::of(1024, 512, 512), Residual::Underflow(512));
        assert_eq!(Residual::of(0, 0, 36), Residual::Overflow(36));
        assert_eq!(Residual::of(512, 0, 0), Residual::Underflow(512));
    }

    #[test]
    fn scsi_response_as_in_the_table() {
        let response = ScsiResponse {
            itt: 0x01020304,
            status: 2,
            residual: Residual::Underflow(0x10),
            bidirectional: Residual::Overflow(0x20),
            exp_data_sn: 3,
        };
        let bhs = response.encode();
        assert_eq!(&bhs[..4], [0x21, 0x92, 0, 2]);
        assert_eq!(&bhs[16..20], [1, 2, 3, 4]);
        assert_eq!(&bhs[36..], [0, 0, 0, 3, 0, 0, 0, 0x20, 0, 0, 0, 0x10]);
    }

    #[test]
    fn data_in_with_status_as_in_the_table() {
        let data = DataIn {
            last: true,
            itt: 5,
            data_sn: 1,
            buffer_offset: 8192,
            status: Some((0, Residual::Overflow(9))),
        };
        let bhs = data.encode();
        assert_eq!(&bhs[..4], [0x25, 0x85, 0, 0]);
        assert_eq!(&bhs[20..24], [0xff; 4]);
        assert_eq!(&bhs[36..], [0, 0, 0, 1, 0, 0, 0x20, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn login_response_as_in_the_table() {
        let response = LoginResponse {
            transit: true,
            continues: false,
            current_stage: 1,
            next_stage: 3,
            isid: [1, 2, 3, 4, 5, 6],
            tsih: 7,
            itt: 8,
            status: LoginStatus::NotFound,
        };
        let bhs = response.encode(Numbers::default());
        assert_eq!(&bhs[..4], [0x23, 0x87, 0, 0]);
        assert_eq!(&bhs[8..16], [1, 2, 3, 4, 5, 6, 0, 7]);
        assert_eq!(&bhs[36..38], [2, 3]);
    }
}
