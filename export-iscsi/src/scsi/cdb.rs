//! Command descriptor blocks: which commands there are, and their fields.
//!
//! [`COMMANDS`] is the one list of what is served: commands are looked up in it, REPORT SUPPORTED
//! OPERATION CODES is made of it, and it says how reservations see each command.

use pss_core::volume::reservation::Access;

use super::sense::{Asc, Sense};

/// A command descriptor block of at most 16 bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Cdb(pub(super) [u8; 16]);

impl Cdb {
    /// A byte.
    pub(super) fn u8(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Whether a bit is set.
    pub(super) fn bit(&self, at: usize, bit: u8) -> bool {
        self.u8(at) >> bit & 1 == 1
    }

    /// A big-endian number of two bytes.
    pub(super) fn u16(&self, at: usize) -> u16 {
        self.number(at, 2) as u16
    }

    /// A big-endian number of three bytes.
    pub(super) fn u24(&self, at: usize) -> u32 {
        self.number(at, 3) as u32
    }

    /// A big-endian number of four bytes.
    pub(super) fn u32(&self, at: usize) -> u32 {
        self.number(at, 4) as u32
    }

    /// A big-endian number of eight bytes.
    pub(super) fn u64(&self, at: usize) -> u64 {
        self.number(at, 8)
    }

    fn number(&self, at: usize, bytes: usize) -> u64 {
        (at..at + bytes).fold(0, |sum, at| sum << 8 | u64::from(self.u8(at)))
    }
}

/// What a command is, whatever its length.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[allow(missing_docs)]
pub(super) enum Kind {
    TestUnitReady,
    RequestSense,
    Inquiry,
    ReportLuns,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    WriteAndVerify,
    Verify,
    WriteSame,
    WriteAtomic,
    Unmap,
    CompareAndWrite,
    OrWrite,
    PreFetch,
    SynchronizeCache,
    GetLbaStatus,
    ModeSense,
    ModeSelect,
    LogSense,
    ReportOperationCodes,
    ReportTaskManagement,
    ReportTargetPortGroups,
    ReportIdentifyingInformation,
    StartStopUnit,
    PreventAllow,
    Reserve6,
    Release6,
    PersistentReserveIn,
    PersistentReserveOut,
    ExtendedCopy,
    ReceiveCopyResults,
    Sanitize,
    ReadDefectData,
    SendDiagnostic,
}

/// Which logical units know a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    /// The controller and disks.
    Every,
    /// Disks.
    Disk,
    /// Disks that may be sanitized.
    Sanitizable,
    /// Disks with thin provisioning.
    Thin,
}

/// A command that is served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// What it is.
    pub(super) kind: Kind,
    /// Operation code.
    pub(super) opcode: u8,
    /// Service action, in the low five bits of byte 1.
    pub(super) action: Option<u8>,
    /// Bits that are looked at, one bit set for each (SPC-4 §6.28.3, CDB usage data), without the
    /// operation code and service action.
    usage: &'static [u8],
    /// How reservations see it.
    pub(super) access: Access,
    /// Who knows it.
    pub(super) scope: Scope,
}

impl Known {
    /// Length of the CDB.
    pub(super) fn length(&self) -> usize {
        self.usage.len()
    }

    /// The CDB USAGE DATA of REPORT SUPPORTED OPERATION CODES.
    pub(super) fn usage(&self) -> Vec<u8> {
        let mut usage = self.usage.to_vec();
        usage[0] = self.opcode;
        if let Some(action) = self.action {
            usage[1] = usage[1] & 0xe0 | action;
        }
        usage
    }

    /// Finds a reserved bit that is set. Only the commands that destroy everything are that strict:
    /// old initiators set bits that were once defined.
    pub(super) fn reserved_bit(&self, cdb: &Cdb) -> Option<Sense> {
        if self.kind != Kind::Sanitize {
            return None;
        }
        (1..self.length()).find_map(|at| {
            let known = match (at, self.action) {
                (1, Some(_)) => self.usage[1] | 0x1f,
                _ => self.usage[at],
            };
            let wrong = cdb.u8(at) & !known;
            (wrong != 0).then(|| Sense::cdb_bit(at, 7 - wrong.leading_zeros() as u8))
        })
    }
}

const fn known(
    kind: Kind,
    opcode: u8,
    action: Option<u8>,
    usage: &'static [u8],
    access: Access,
    scope: Scope,
) -> Known {
    Known {
        kind,
        opcode,
        action,
        usage,
        access,
        scope,
    }
}

const RW6: &[u8] = &[0, 0x1f, 0xff, 0xff, 0xff, 0x04];
const RW10: &[u8] = &[0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0x04];
const RW12: &[u8] = &[
    0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x04,
];
const RW16: &[u8] = &[
    0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x04,
];
const VERIFY10: &[u8] = &[0, 0xf6, 0xff, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0x04];
const VERIFY12: &[u8] = &[
    0, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x04,
];
const VERIFY16: &[u8] = &[
    0, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x04,
];
const CACHE10: &[u8] = &[0, 0x06, 0xff, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0x04];
const CACHE16: &[u8] = &[
    0, 0x06, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 0x04,
];
/// A service action with an allocation or parameter list length in bytes 6 to 9.
const ACTION12: &[u8] = &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04];
/// A service action with an allocation length in bytes 10 to 13.
const ACTION16: &[u8] = &[
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
];
const PERSISTENT_IN: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04];
const PERSISTENT_OUT: &[u8] = &[0, 0, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x04];
const SANITIZE: &[u8] = &[0, 0xa0, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04];

/// Every command that is served, by operation code and service action.
pub(super) const COMMANDS: &[Known] = {
    use Access::{Free, Read, Status, Write};
    use Scope::{Disk, Every, Sanitizable, Thin};
    &[
        known(
            Kind::TestUnitReady,
            0x00,
            None,
            &[0, 0, 0, 0, 0, 0x04],
            Status,
            Every,
        ),
        known(
            Kind::RequestSense,
            0x03,
            None,
            &[0, 0x01, 0, 0, 0xff, 0x04],
            Free,
            Every,
        ),
        known(Kind::Read, 0x08, None, RW6, Read, Disk),
        known(Kind::Write, 0x0a, None, RW6, Write, Disk),
        known(
            Kind::Inquiry,
            0x12,
            None,
            &[0, 0x01, 0xff, 0xff, 0xff, 0x04],
            Free,
            Every,
        ),
        known(
            Kind::ModeSelect,
            0x15,
            None,
            &[0, 0x11, 0, 0, 0xff, 0x04],
            Write,
            Every,
        ),
        known(
            Kind::Reserve6,
            0x16,
            None,
            &[0, 0, 0, 0, 0, 0x04],
            Free,
            Disk,
        ),
        known(
            Kind::Release6,
            0x17,
            None,
            &[0, 0, 0, 0, 0, 0x04],
            Free,
            Disk,
        ),
        known(
            Kind::ModeSense,
            0x1a,
            None,
            &[0, 0x08, 0xff, 0xff, 0xff, 0x04],
            Write,
            Every,
        ),
        known(
            Kind::StartStopUnit,
            0x1b,
            None,
            &[0, 0x01, 0, 0x0f, 0xf7, 0x04],
            Free,
            Disk,
        ),
        known(
            Kind::SendDiagnostic,
            0x1d,
            None,
            &[0, 0xf7, 0, 0xff, 0xff, 0x04],
            Write,
            Every,
        ),
        known(
            Kind::PreventAllow,
            0x1e,
            None,
            &[0, 0, 0, 0, 0x03, 0x04],
            Free,
            Disk,
        ),
        known(
            Kind::ReadCapacity10,
            0x25,
            None,
            &[0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0x01, 0x04],
            Free,
            Disk,
        ),
        known(Kind::Read, 0x28, None, RW10, Read, Disk),
        known(Kind::Write, 0x2a, None, RW10, Write, Disk),
        known(Kind::WriteAndVerify, 0x2e, None, VERIFY10, Write, Disk),
        known(Kind::Verify, 0x2f, None, VERIFY10, Read, Disk),
        known(Kind::PreFetch, 0x34, None, CACHE10, Read, Disk),
        known(Kind::SynchronizeCache, 0x35, None, CACHE10, Write, Disk),
        known(
            Kind::ReadDefectData,
            0x37,
            None,
            &[0, 0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0x04],
            Read,
            Disk,
        ),
        known(
            Kind::WriteSame,
            0x41,
            None,
            &[0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0x04],
            Write,
            Disk,
        ),
        known(
            Kind::Unmap,
            0x42,
            None,
            &[0, 0x01, 0, 0, 0, 0, 0x1f, 0xff, 0xff, 0x04],
            Write,
            Thin,
        ),
        known(
            Kind::Sanitize,
            0x48,
            Some(0x01),
            SANITIZE,
            Write,
            Sanitizable,
        ),
        known(
            Kind::Sanitize,
            0x48,
            Some(0x02),
            SANITIZE,
            Write,
            Sanitizable,
        ),
        known(
            Kind::Sanitize,
            0x48,
            Some(0x1f),
            SANITIZE,
            Write,
            Sanitizable,
        ),
        known(
            Kind::LogSense,
            0x4d,
            None,
            &[0, 0x01, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 0x04],
            Free,
            Every,
        ),
        known(
            Kind::ModeSelect,
            0x55,
            None,
            &[0, 0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 0x04],
            Write,
            Every,
        ),
        known(
            Kind::ModeSense,
            0x5a,
            None,
            &[0, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0x04],
            Write,
            Every,
        ),
        known(
            Kind::PersistentReserveIn,
            0x5e,
            Some(0x00),
            PERSISTENT_IN,
            Status,
            Disk,
        ),
        known(
            Kind::PersistentReserveIn,
            0x5e,
            Some(0x01),
            PERSISTENT_IN,
            Status,
            Disk,
        ),
        known(
            Kind::PersistentReserveIn,
            0x5e,
            Some(0x02),
            PERSISTENT_IN,
            Status,
            Disk,
        ),
        known(
            Kind::PersistentReserveIn,
            0x5e,
            Some(0x03),
            PERSISTENT_IN,
            Status,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x00),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x01),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x02),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x03),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x04),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x05),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x06),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::PersistentReserveOut,
            0x5f,
            Some(0x07),
            PERSISTENT_OUT,
            Free,
            Disk,
        ),
        known(
            Kind::ExtendedCopy,
            0x83,
            Some(0x00),
            &[
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Write,
            Disk,
        ),
        known(
            Kind::ReceiveCopyResults,
            0x84,
            Some(0x00),
            &[
                0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Write,
            Disk,
        ),
        known(
            Kind::ReceiveCopyResults,
            0x84,
            Some(0x03),
            &[
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Write,
            Disk,
        ),
        known(
            Kind::ReceiveCopyResults,
            0x84,
            Some(0x04),
            &[
                0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Write,
            Disk,
        ),
        known(Kind::Read, 0x88, None, RW16, Read, Disk),
        known(
            Kind::CompareAndWrite,
            0x89,
            None,
            &[
                0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0x1f, 0x04,
            ],
            Write,
            Disk,
        ),
        known(Kind::Write, 0x8a, None, RW16, Write, Disk),
        known(Kind::OrWrite, 0x8b, None, RW16, Write, Disk),
        known(Kind::WriteAndVerify, 0x8e, None, VERIFY16, Write, Disk),
        known(Kind::Verify, 0x8f, None, VERIFY16, Read, Disk),
        known(Kind::PreFetch, 0x90, None, CACHE16, Read, Disk),
        known(Kind::SynchronizeCache, 0x91, None, CACHE16, Write, Disk),
        known(
            Kind::WriteSame,
            0x93,
            None,
            &[
                0, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                0x1f, 0x04,
            ],
            Write,
            Disk,
        ),
        known(
            Kind::WriteAtomic,
            0x9c,
            None,
            &[
                0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                0x1f, 0x04,
            ],
            Write,
            Disk,
        ),
        known(Kind::ReadCapacity16, 0x9e, Some(0x10), ACTION16, Free, Disk),
        known(
            Kind::GetLbaStatus,
            0x9e,
            Some(0x12),
            &[
                0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0,
                0x04,
            ],
            Read,
            Disk,
        ),
        known(
            Kind::ReportLuns,
            0xa0,
            None,
            &[0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
            Free,
            Every,
        ),
        known(
            Kind::ReportIdentifyingInformation,
            0xa3,
            Some(0x05),
            &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xfe, 0x04],
            Free,
            Every,
        ),
        known(
            Kind::ReportTargetPortGroups,
            0xa3,
            Some(0x0a),
            &[0, 0xe0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04],
            Free,
            Every,
        ),
        known(
            Kind::ReportOperationCodes,
            0xa3,
            Some(0x0c),
            &[
                0, 0, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Write,
            Every,
        ),
        known(
            Kind::ReportTaskManagement,
            0xa3,
            Some(0x0d),
            ACTION12,
            Write,
            Every,
        ),
        known(Kind::Read, 0xa8, None, RW12, Read, Disk),
        known(Kind::Write, 0xaa, None, RW12, Write, Disk),
        known(Kind::WriteAndVerify, 0xae, None, VERIFY12, Write, Disk),
        known(Kind::Verify, 0xaf, None, VERIFY12, Read, Disk),
        known(
            Kind::ReadDefectData,
            0xb7,
            None,
            &[
                0, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x04,
            ],
            Read,
            Disk,
        ),
    ]
};

/// Finds a command among those that `serves` admits.
///
/// # Errors
/// INVALID COMMAND OPERATION CODE; INVALID FIELD IN CDB if only the service action is unknown.
pub(super) fn find(cdb: &Cdb, serves: impl Fn(Scope) -> bool) -> Result<&'static Known, Sense> {
    let opcode = cdb.u8(0);
    let action = cdb.u8(1) & 0x1f;
    let mut of_opcode = COMMANDS
        .iter()
        .filter(|it| it.opcode == opcode && serves(it.scope))
        .peekable();
    if of_opcode.peek().is_none() {
        return Err(Sense::illegal(Asc::INVALID_OPERATION_CODE));
    }
    of_opcode
        .find(|it| it.action.is_none_or(|it| it == action))
        .ok_or(Sense::cdb_bit(1, 4))
}

/// Length of a CDB by its group code (SPC-4 §4.2.5.1); `None` of a variable or vendor's group.
pub(super) fn length_by_group(opcode: u8) -> Option<usize> {
    match opcode >> 5 {
        0 => Some(6),
        1 | 2 => Some(10),
        4 => Some(16),
        5 => Some(12),
        _ => None,
    }
}

/// A range of blocks with the fields that reads and writes share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Transfer {
    /// First block.
    pub(super) lba: u64,
    /// How many.
    pub(super) blocks: u64,
    /// FUA.
    pub(super) fua: bool,
    /// Byte of the CDB where the number of blocks stands, for field pointers.
    pub(super) length_at: usize,
}

impl Transfer {
    /// Reads LBA and length by the CDB's length, whatever the command; checks the protection field.
    ///
    /// # Errors
    /// INVALID FIELD IN CDB: there is no protection information (SBC-3 table 48).
    pub(super) fn decode(cdb: &Cdb) -> Result<Transfer, Sense> {
        let opcode = cdb.u8(0);
        let transfer = match length_by_group(opcode) {
            Some(6) => {
                let blocks = match cdb.u8(4) {
                    0 => 256,
                    blocks => u64::from(blocks),
                };
                return Ok(Transfer {
                    lba: u64::from(cdb.u24(1) & 0x1f_ffff),
                    blocks,
                    fua: false,
                    length_at: 4,
                });
            }
            Some(10) => Transfer {
                lba: u64::from(cdb.u32(2)),
                blocks: u64::from(cdb.u16(7)),
                fua: cdb.bit(1, 3),
                length_at: 7,
            },
            Some(12) => Transfer {
                lba: u64::from(cdb.u32(2)),
                blocks: u64::from(cdb.u32(6)),
                fua: cdb.bit(1, 3),
                length_at: 6,
            },
            _ => Transfer {
                lba: cdb.u64(2),
                blocks: match opcode {
                    // COMPARE AND WRITE has one byte, WRITE ATOMIC two behind the boundary.
                    0x89 => u64::from(cdb.u8(13)),
                    0x9c => u64::from(cdb.u16(12)),
                    _ => u64::from(cdb.u32(10)),
                },
                fua: cdb.bit(1, 3),
                length_at: match opcode {
                    0x89 => 13,
                    0x9c => 12,
                    _ => 10,
                },
            },
        };
        // PRE-FETCH and SYNCHRONIZE CACHE have nothing in these bits.
        let protected = !matches!(opcode, 0x34 | 0x35 | 0x90 | 0x91);
        if protected && cdb.u8(1) >> 5 != 0 {
            return Err(Sense::cdb_bit(1, 7));
        }
        Ok(transfer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_agree_with_group_codes() {
        for known in COMMANDS {
            assert_eq!(
                Some(known.length()),
                length_by_group(known.opcode),
                "{known:?}"
            );
            assert_eq!(known.usage()[0], known.opcode);
        }
    }

    #[test]
    fn commands_are_listed_once_and_sorted() {
        let keys: Vec<_> = COMMANDS.iter().map(|it| (it.opcode, it.action)).collect();
        assert!(keys.windows(2).all(|pair| pair[0] < pair[1]));
    }

    // SBC-3 §5.8: a length of 0 is 256 blocks.
    #[test]
    fn read6_of_zero_is_256_blocks() {
        let mut cdb = Cdb([0; 16]);
        cdb.0[..6].copy_from_slice(&[0x08, 0xff, 0x02, 0x03, 0, 0]);
        let transfer = Transfer::decode(&cdb).unwrap();
        assert_eq!((transfer.lba, transfer.blocks), (0x1f_0203, 256));
    }

    #[test]
    fn unknown_opcode_and_service_action_differ() {
        let mut cdb = Cdb([0; 16]);
        cdb.0[0] = 0x02;
        let unknown = find(&cdb, |_| true).unwrap_err();
        assert_eq!(unknown.asc, Asc::INVALID_OPERATION_CODE);
        cdb.0[..2].copy_from_slice(&[0x9e, 0x11]);
        let unknown = find(&cdb, |_| true).unwrap_err();
        assert_eq!(unknown, Sense::cdb_bit(1, 4));
    }
}
