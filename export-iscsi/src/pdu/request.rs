//! What an initiator sends. Every decode takes any bytes; codes that are not known are values.

use bytes::Bytes;

use super::{
    BHS_BYTES, Bhs, CONTINUE, FINAL, ahs_bytes, data_bytes, lun, opcode, set_data_bytes, set_word,
    word,
};

/// Longest command descriptor block: 16 bytes in the header and an AHS of 260 - 16 more.
pub const CDB_BYTES_MAX: usize = 260;

/// Fields that all requests share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Common {
    /// Takes no CmdSN.
    pub immediate: bool,
    /// Initiator task tag.
    pub itt: u32,
    /// Its number in the session; absent from Data-Out and SNACK, whose bytes are reserved.
    pub cmd_sn: u32,
    /// The status number that the initiator expects next.
    pub exp_stat_sn: u32,
}

impl Common {
    fn decode(bhs: &Bhs) -> Common {
        Common {
            immediate: bhs[0] & opcode::IMMEDIATE != 0,
            itt: word(bhs, 16),
            cmd_sn: word(bhs, 24),
            exp_stat_sn: word(bhs, 28),
        }
    }

    fn encode(&self, opcode: u8) -> Bhs {
        let mut bhs = [0; BHS_BYTES];
        bhs[0] = opcode;
        if self.immediate {
            bhs[0] |= opcode::IMMEDIATE;
        }
        set_word(&mut bhs, 16, self.itt);
        set_word(&mut bhs, 24, self.cmd_sn);
        set_word(&mut bhs, 28, self.exp_stat_sn);
        bhs
    }
}

/// NOP-Out (§11.18): a ping, or the answer to ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NopOut {
    /// Shared fields; an ITT of 0xffffffff asks for no answer.
    pub common: Common,
    /// Logical unit, if it answers a NOP-In.
    pub lun: [u8; 8],
    /// Target transfer tag of the NOP-In that it answers.
    pub ttt: u32,
}

/// SCSI Command (§11.3).
///
/// | 1     | F R W . . ATTR                     |
/// | 8-15  | LUN                                |
/// | 20-23 | expected data transfer length, bytes |
/// | 32-47 | CDB                                |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ScsiCommand {
    /// Shared fields.
    pub common: Common,
    /// No unsolicited Data-Out follows.
    pub last: bool,
    /// Data comes in.
    pub reads: bool,
    /// Data goes out.
    pub writes: bool,
    /// Task attribute code, three bits.
    pub attribute: u8,
    /// Logical unit.
    pub lun: [u8; 8],
    /// What the initiator wants to transfer, bytes; data out if both directions are used.
    pub expected_bytes: u32,
    /// First 16 bytes of the CDB.
    pub cdb: [u8; 16],
    /// The whole CDB if it is longer.
    pub long_cdb: Option<Bytes>,
    /// What comes in if both directions are used, bytes.
    pub bidirectional_read_bytes: Option<u32>,
}

/// Task Management Function Request (§11.5).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TaskRequest {
    /// Shared fields.
    pub common: Common,
    /// Function code, seven bits.
    pub function: u8,
    /// Logical unit.
    pub lun: [u8; 8],
    /// The task meant, if the function has one.
    pub referenced_tag: u32,
    /// CmdSN of that task.
    pub ref_cmd_sn: u32,
}

/// Login Request (§11.12).
///
/// | 1     | T C . . CSG NSG                    |
/// | 2, 3  | highest and lowest version         |
/// | 8-13  | ISID                               |
/// | 14-15 | TSIH                               |
/// | 20-21 | CID                                |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoginRequest {
    /// Shared fields.
    pub common: Common,
    /// Wants to leave the stage.
    pub transit: bool,
    /// The text goes on in the next PDU.
    pub continues: bool,
    /// Stage now, two bits.
    pub current_stage: u8,
    /// Stage wanted next, two bits.
    pub next_stage: u8,
    /// Highest version known.
    pub version_max: u8,
    /// Lowest version known.
    pub version_min: u8,
    /// Initiator's part of the session id.
    pub isid: [u8; 6],
    /// Session that a connection is added to, or 0.
    pub tsih: u16,
    /// Connection id.
    pub cid: u16,
}

/// Text Request (§11.10).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TextRequest {
    /// Shared fields.
    pub common: Common,
    /// The initiator has nothing more to say.
    pub last: bool,
    /// The text goes on in the next PDU.
    pub continues: bool,
    /// Logical unit; echoes what the target gave with its tag.
    pub lun: [u8; 8],
    /// Target transfer tag of the exchange that it continues, or 0xffffffff.
    pub ttt: u32,
}

/// SCSI Data-Out (§11.7).
///
/// | 36-39 | DataSN                             |
/// | 40-43 | buffer offset, bytes               |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DataOut {
    /// Last of its sequence.
    pub last: bool,
    /// Logical unit, if it answers an R2T.
    pub lun: [u8; 8],
    /// Task.
    pub itt: u32,
    /// Tag of the R2T that it answers, or 0xffffffff if nobody asked.
    pub ttt: u32,
    /// The status number that the initiator expects next.
    pub exp_stat_sn: u32,
    /// Number within its sequence.
    pub data_sn: u32,
    /// Where the data belongs, bytes.
    pub buffer_offset: u32,
}

/// Logout Request (§11.14).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LogoutRequest {
    /// Shared fields.
    pub common: Common,
    /// Reason code, seven bits.
    pub reason: u8,
    /// The connection to close, if the reason is not the session.
    pub cid: u16,
}

/// SNACK Request (§11.16).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Snack {
    /// Type code, four bits.
    pub kind: u8,
    /// Task.
    pub itt: u32,
    /// Tag, depending on the type.
    pub ttt: u32,
    /// The status number that the initiator expects next.
    pub exp_stat_sn: u32,
    /// First number missed.
    pub first: u32,
    /// How many; 0 for all.
    pub count: u32,
}

/// What an initiator sends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// Ping or pong.
    NopOut(NopOut),
    /// A SCSI command.
    Command(ScsiCommand),
    /// Task management.
    Task(TaskRequest),
    /// Login.
    Login(LoginRequest),
    /// Text negotiation.
    Text(TextRequest),
    /// Data of a write.
    DataOut(DataOut),
    /// Logout.
    Logout(LogoutRequest),
    /// Wants something again.
    Snack(Snack),
    /// No request of ours; whether it was immediate.
    Unknown(u8),
}

impl Request {
    /// Understands a header and its additional segments.
    ///
    /// # Errors
    /// [`BadAhs`] if the additional segments are no list of segments.
    pub fn decode(bhs: &Bhs, ahs: &Bytes) -> Result<Request, BadAhs> {
        let common = Common::decode(bhs);
        Ok(match bhs[0] & opcode::MASK {
            opcode::NOP_OUT => Request::NopOut(NopOut {
                common,
                lun: lun(bhs),
                ttt: word(bhs, 20),
            }),
            opcode::SCSI_COMMAND => Request::Command(decode_command(bhs, ahs)?),
            opcode::TASK_REQUEST => Request::Task(TaskRequest {
                common,
                function: bhs[1] & 0x7f,
                lun: lun(bhs),
                referenced_tag: word(bhs, 20),
                ref_cmd_sn: word(bhs, 32),
            }),
            opcode::LOGIN_REQUEST => Request::Login(LoginRequest::decode(bhs)),
            opcode::TEXT_REQUEST => Request::Text(TextRequest {
                common,
                last: bhs[1] & FINAL != 0,
                continues: bhs[1] & CONTINUE != 0,
                lun: lun(bhs),
                ttt: word(bhs, 20),
            }),
            opcode::DATA_OUT => Request::DataOut(DataOut {
                last: bhs[1] & FINAL != 0,
                lun: lun(bhs),
                itt: word(bhs, 16),
                ttt: word(bhs, 20),
                exp_stat_sn: word(bhs, 28),
                data_sn: word(bhs, 36),
                buffer_offset: word(bhs, 40),
            }),
            opcode::LOGOUT_REQUEST => Request::Logout(LogoutRequest {
                common,
                reason: bhs[1] & 0x7f,
                cid: u16::from_be_bytes([bhs[20], bhs[21]]),
            }),
            opcode::SNACK => Request::Snack(Snack {
                kind: bhs[1] & 0x0f,
                itt: word(bhs, 16),
                ttt: word(bhs, 20),
                exp_stat_sn: word(bhs, 28),
                first: word(bhs, 40),
                count: word(bhs, 44),
            }),
            unknown => Request::Unknown(unknown),
        })
    }

    /// The header. Additional segments and data lengths are the caller's, see [`encode_long_cdb`].
    pub fn encode(&self) -> Bhs {
        match self {
            Request::NopOut(nop) => {
                let mut bhs = nop.common.encode(opcode::NOP_OUT);
                bhs[1] = FINAL;
                bhs[8..16].copy_from_slice(&nop.lun);
                set_word(&mut bhs, 20, nop.ttt);
                bhs
            }
            Request::Command(command) => encode_command(command),
            Request::Task(task) => {
                let mut bhs = task.common.encode(opcode::TASK_REQUEST);
                bhs[1] = FINAL | task.function;
                bhs[8..16].copy_from_slice(&task.lun);
                set_word(&mut bhs, 20, task.referenced_tag);
                set_word(&mut bhs, 32, task.ref_cmd_sn);
                bhs
            }
            Request::Login(login) => login.encode(),
            Request::Text(text) => {
                let mut bhs = text.common.encode(opcode::TEXT_REQUEST);
                bhs[1] = flag(text.last, FINAL) | flag(text.continues, CONTINUE);
                bhs[8..16].copy_from_slice(&text.lun);
                set_word(&mut bhs, 20, text.ttt);
                bhs
            }
            Request::DataOut(data) => {
                let mut bhs = [0; BHS_BYTES];
                bhs[0] = opcode::DATA_OUT;
                bhs[1] = flag(data.last, FINAL);
                bhs[8..16].copy_from_slice(&data.lun);
                set_word(&mut bhs, 16, data.itt);
                set_word(&mut bhs, 20, data.ttt);
                set_word(&mut bhs, 28, data.exp_stat_sn);
                set_word(&mut bhs, 36, data.data_sn);
                set_word(&mut bhs, 40, data.buffer_offset);
                bhs
            }
            Request::Logout(logout) => {
                let mut bhs = logout.common.encode(opcode::LOGOUT_REQUEST);
                bhs[1] = FINAL | logout.reason;
                bhs[20..22].copy_from_slice(&logout.cid.to_be_bytes());
                bhs
            }
            Request::Snack(snack) => {
                let mut bhs = [0; BHS_BYTES];
                bhs[0] = opcode::SNACK;
                bhs[1] = FINAL | snack.kind;
                set_word(&mut bhs, 16, snack.itt);
                set_word(&mut bhs, 20, snack.ttt);
                set_word(&mut bhs, 28, snack.exp_stat_sn);
                set_word(&mut bhs, 40, snack.first);
                set_word(&mut bhs, 44, snack.count);
                bhs
            }
            Request::Unknown(code) => {
                let mut bhs = [0; BHS_BYTES];
                bhs[0] = *code;
                bhs
            }
        }
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

impl LoginRequest {
    fn decode(bhs: &Bhs) -> LoginRequest {
        let mut isid = [0; 6];
        isid.copy_from_slice(&bhs[8..14]);
        LoginRequest {
            common: Common::decode(bhs),
            transit: bhs[1] & FINAL != 0,
            continues: bhs[1] & CONTINUE != 0,
            current_stage: bhs[1] >> 2 & 3,
            next_stage: bhs[1] & 3,
            version_max: bhs[2],
            version_min: bhs[3],
            isid,
            tsih: u16::from_be_bytes([bhs[14], bhs[15]]),
            cid: u16::from_be_bytes([bhs[20], bhs[21]]),
        }
    }

    fn encode(&self) -> Bhs {
        let mut bhs = self.common.encode(opcode::LOGIN_REQUEST);
        bhs[1] = flag(self.transit, FINAL)
            | flag(self.continues, CONTINUE)
            | self.current_stage << 2
            | self.next_stage;
        bhs[2] = self.version_max;
        bhs[3] = self.version_min;
        bhs[8..14].copy_from_slice(&self.isid);
        bhs[14..16].copy_from_slice(&self.tsih.to_be_bytes());
        bhs[20..22].copy_from_slice(&self.cid.to_be_bytes());
        bhs
    }
}

/// Additional header segments that are no list of segments.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("additional header segments make no sense")]
pub struct BadAhs;

const AHS_EXTENDED_CDB: u8 = 1;
const AHS_READ_LENGTH: u8 = 2;

fn decode_command(bhs: &Bhs, ahs: &Bytes) -> Result<ScsiCommand, BadAhs> {
    let mut cdb = [0; 16];
    cdb.copy_from_slice(&bhs[32..48]);
    let mut command = ScsiCommand {
        common: Common::decode(bhs),
        last: bhs[1] & FINAL != 0,
        reads: bhs[1] & 0x40 != 0,
        writes: bhs[1] & 0x20 != 0,
        attribute: bhs[1] & 7,
        lun: lun(bhs),
        expected_bytes: word(bhs, 20),
        cdb,
        long_cdb: None,
        bidirectional_read_bytes: None,
    };
    // A segment: length of what follows the type (2 bytes), type (1 byte), content, padding to 4 bytes.
    let mut rest = &ahs[..];
    while !rest.is_empty() {
        let (Some(head), true) = (rest.first_chunk::<3>(), rest.len() >= 4) else {
            return Err(BadAhs);
        };
        let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
        let content = rest.get(3..3 + length).ok_or(BadAhs)?;
        match head[2] & 0x3f {
            // One reserved byte, then the CDB from byte 16 on.
            AHS_EXTENDED_CDB if length > 1 && length - 1 <= CDB_BYTES_MAX - 16 => {
                command.long_cdb = Some([&cdb[..], &content[1..]].concat().into());
            }
            AHS_READ_LENGTH if length == 5 => {
                let bytes = [content[1], content[2], content[3], content[4]];
                command.bidirectional_read_bytes = Some(u32::from_be_bytes(bytes));
            }
            AHS_EXTENDED_CDB | AHS_READ_LENGTH => return Err(BadAhs),
            _ => {}
        }
        rest = rest.get((3 + length).next_multiple_of(4)..).ok_or(BadAhs)?;
    }
    Ok(command)
}

fn encode_command(command: &ScsiCommand) -> Bhs {
    let mut bhs = command.common.encode(opcode::SCSI_COMMAND);
    bhs[1] = flag(command.last, FINAL)
        | flag(command.reads, 0x40)
        | flag(command.writes, 0x20)
        | command.attribute;
    bhs[8..16].copy_from_slice(&command.lun);
    set_word(&mut bhs, 20, command.expected_bytes);
    bhs[32..48].copy_from_slice(&command.cdb);
    bhs[4] = (encode_ahs(command).len() / 4) as u8;
    bhs
}

/// The additional header segments of a command.
pub fn encode_ahs(command: &ScsiCommand) -> Vec<u8> {
    let mut ahs = Vec::new();
    let mut segment = |code: u8, content: &[u8]| {
        ahs.extend_from_slice(&(content.len() as u16 + 1).to_be_bytes());
        ahs.extend_from_slice(&[code, 0]);
        ahs.extend_from_slice(content);
        ahs.resize(ahs.len().next_multiple_of(4), 0);
    };
    if let Some(cdb) = &command.long_cdb {
        segment(AHS_EXTENDED_CDB, &cdb[16..]);
    }
    if let Some(bytes) = command.bidirectional_read_bytes {
        segment(AHS_READ_LENGTH, &bytes.to_be_bytes());
    }
    ahs
}

/// Header, additional segments, data and padding in one, without digests: for tests and tools.
pub fn encode_whole(request: &Request, data: &[u8]) -> Vec<u8> {
    let mut bhs = request.encode();
    set_data_bytes(&mut bhs, data.len());
    let mut bytes = bhs.to_vec();
    if let Request::Command(command) = request {
        bytes.extend_from_slice(&encode_ahs(command));
    }
    assert_eq!(bytes.len(), BHS_BYTES + ahs_bytes(&bhs));
    assert_eq!(data.len(), data_bytes(&bhs));
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn common() -> impl Strategy<Value = Common> {
        (any::<bool>(), any::<u32>(), any::<u32>(), any::<u32>()).prop_map(
            |(immediate, itt, cmd_sn, exp_stat_sn)| Common {
                immediate,
                itt,
                cmd_sn,
                exp_stat_sn,
            },
        )
    }

    fn command() -> impl Strategy<Value = ScsiCommand> {
        (
            common(),
            any::<[bool; 3]>(),
            0..8u8,
            any::<[u8; 8]>(),
            any::<u32>(),
            any::<[u8; 16]>(),
            proptest::option::of(proptest::collection::vec(any::<u8>(), 1..240)),
            proptest::option::of(any::<u32>()),
        )
            .prop_map(
                |(
                    common,
                    [last, reads, writes],
                    attribute,
                    lun,
                    expected_bytes,
                    cdb,
                    long,
                    bidi,
                )| {
                    ScsiCommand {
                        common,
                        last,
                        reads,
                        writes,
                        attribute,
                        lun,
                        expected_bytes,
                        cdb,
                        long_cdb: long.map(|tail| [&cdb[..], &tail].concat().into()),
                        bidirectional_read_bytes: bidi,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn commands_survive_encoding(command in command()) {
            let request = Request::Command(command.clone());
            let ahs = Bytes::from(encode_ahs(&command));
            prop_assert_eq!(Request::decode(&request.encode(), &ahs), Ok(request));
        }

        #[test]
        fn any_header_is_understood_or_refused(
            head in any::<[u8; 32]>(),
            tail in any::<[u8; 16]>(),
            ahs in proptest::collection::vec(any::<u8>(), 0..1021),
        ) {
            let mut bhs = [0; BHS_BYTES];
            bhs[..32].copy_from_slice(&head);
            bhs[32..].copy_from_slice(&tail);
            let ahs = Bytes::from(ahs);
            if let Ok(request) = Request::decode(&bhs, &ahs)
                && !matches!(request, Request::Command(_))
            {
                // What was understood says the same again.
                let again = request.encode();
                prop_assert_eq!(Request::decode(&again, &Bytes::new()), Ok(request));
            }
        }
    }

    #[test]
    fn login_request_as_in_the_table() {
        // RFC 7143 §11.12, with T, CSG 1 and NSG 3.
        let mut bhs = [0; BHS_BYTES];
        bhs[0] = 0x43;
        bhs[1] = 0x87;
        bhs[8..14].copy_from_slice(&[0x40, 1, 2, 3, 4, 5]);
        bhs[14..16].copy_from_slice(&[0x12, 0x34]);
        bhs[20..22].copy_from_slice(&[0, 7]);
        bhs[24..28].copy_from_slice(&[0, 0, 0, 9]);
        let Ok(Request::Login(login)) = Request::decode(&bhs, &Bytes::new()) else {
            panic!("a login");
        };
        assert!(login.transit && !login.continues && login.common.immediate);
        assert_eq!((login.current_stage, login.next_stage), (1, 3));
        assert_eq!((login.tsih, login.cid, login.common.cmd_sn), (0x1234, 7, 9));
        assert_eq!(login.encode(), bhs);
    }

    #[test]
    fn additional_segments_that_run_out_are_refused() {
        let mut bhs = [0; BHS_BYTES];
        bhs[0] = opcode::SCSI_COMMAND;
        for ahs in [
            &[0u8, 9, 1, 0][..],
            &[0, 1, 1, 0],
            &[0xff, 0xff, 2, 0],
            &[0, 5, 2],
            &[0, 2, 2, 0, 0, 0, 0, 0],
        ] {
            let ahs = Bytes::copy_from_slice(ahs);
            assert_eq!(Request::decode(&bhs, &ahs), Err(BadAhs), "{ahs:?}");
        }
    }
}
