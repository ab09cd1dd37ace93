//! Sense data (SPC-4 §4.5): what went wrong, and what failures of a device become.

use pss_core::volume::device::DeviceError;

use super::actions::Status;

/// Sense key (SPC-4 §4.5.6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
#[allow(missing_docs)]
pub(super) enum SenseKey {
    NoSense = 0x0,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    CopyAborted = 0xa,
    Miscompare = 0xe,
}

/// Additional sense code and qualifier, as one number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Asc(pub(super) u16);

macro_rules! additional_sense_codes {
    ($($name:ident = $code:literal),* $(,)?) => {
        impl Asc { $(pub(super) const $name: Asc = Asc($code);)* }
    };
}

additional_sense_codes! {
    NONE = 0x0000,
    ASYMMETRIC_ACCESS_STATE_TRANSITION = 0x040a,
    SANITIZE_IN_PROGRESS = 0x041b,
    UNREACHABLE_COPY_TARGET = 0x0804,
    COPY_TARGET_DEVICE_NOT_REACHABLE = 0x0d02,
    WRITE_ERROR = 0x0c00,
    UNRECOVERED_READ_ERROR = 0x1100,
    PARAMETER_LIST_LENGTH_ERROR = 0x1a00,
    MISCOMPARE_DURING_VERIFY = 0x1d00,
    INVALID_OPERATION_CODE = 0x2000,
    LBA_OUT_OF_RANGE = 0x2100,
    INVALID_FIELD_IN_CDB = 0x2400,
    LOGICAL_UNIT_NOT_SUPPORTED = 0x2500,
    INVALID_FIELD_IN_PARAMETER_LIST = 0x2600,
    INVALID_RELEASE = 0x2604,
    TOO_MANY_TARGET_DESCRIPTORS = 0x2606,
    UNSUPPORTED_TARGET_DESCRIPTOR = 0x2607,
    TOO_MANY_SEGMENT_DESCRIPTORS = 0x2608,
    UNSUPPORTED_SEGMENT_DESCRIPTOR = 0x2609,
    WRITE_PROTECTED = 0x2700,
    SOFTWARE_WRITE_PROTECTED = 0x2702,
    SPACE_ALLOCATION_FAILED = 0x2707,
    MEDIUM_MAY_HAVE_CHANGED = 0x2800,
    POWER_ON = 0x2900,
    BUS_DEVICE_RESET = 0x2903,
    MODE_PARAMETERS_CHANGED = 0x2a01,
    RESERVATIONS_PREEMPTED = 0x2a03,
    RESERVATIONS_RELEASED = 0x2a04,
    REGISTRATIONS_PREEMPTED = 0x2a05,
    CAPACITY_DATA_HAS_CHANGED = 0x2a09,
    COMMANDS_CLEARED_BY_ANOTHER_INITIATOR = 0x2f00,
    SANITIZE_COMMAND_FAILED = 0x3103,
    SAVING_PARAMETERS_NOT_SUPPORTED = 0x3900,
    MEDIUM_NOT_PRESENT = 0x3a00,
    INVALID_MESSAGE = 0x4900,
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3f0e,
    INTERNAL_TARGET_FAILURE = 0x4400,
    MEDIUM_REMOVAL_PREVENTED = 0x5302,
    INSUFFICIENT_REGISTRATION_RESOURCES = 0x5504,
}

/// Which field of a command was wrong (SPC-4 §4.5.2.4.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct FieldPointer {
    /// In the CDB, not in the parameter list.
    pub(super) in_cdb: bool,
    /// First byte of the field.
    pub(super) byte: u16,
    /// Its most significant bit, if that matters.
    pub(super) bit: Option<u8>,
}

/// Sense data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Sense {
    /// Sense key.
    pub(super) key: SenseKey,
    /// Additional sense code and qualifier.
    pub(super) asc: Asc,
    /// INFORMATION: an LBA or an offset.
    pub(super) information: Option<u64>,
    /// What was wrong, of ILLEGAL REQUEST.
    pub(super) field: Option<FieldPointer>,
    /// Done part of 65536, of NOT READY.
    pub(super) progress: Option<u16>,
}

impl Sense {
    /// Sense data without particulars.
    pub(super) const fn new(key: SenseKey, asc: Asc) -> Sense {
        Sense {
            key,
            asc,
            information: None,
            field: None,
            progress: None,
        }
    }

    /// ILLEGAL REQUEST.
    pub(super) const fn illegal(asc: Asc) -> Sense {
        Sense::new(SenseKey::IllegalRequest, asc)
    }

    /// INVALID FIELD IN CDB, of a whole byte or more.
    pub(super) fn cdb(byte: usize) -> Sense {
        Sense::illegal(Asc::INVALID_FIELD_IN_CDB).at(true, byte, None)
    }

    /// INVALID FIELD IN CDB, from a bit on downwards.
    pub(super) fn cdb_bit(byte: usize, bit: u8) -> Sense {
        Sense::illegal(Asc::INVALID_FIELD_IN_CDB).at(true, byte, Some(bit))
    }

    /// INVALID FIELD IN PARAMETER LIST.
    pub(super) fn parameter(byte: usize) -> Sense {
        Sense::illegal(Asc::INVALID_FIELD_IN_PARAMETER_LIST).at(false, byte, None)
    }

    /// PARAMETER LIST LENGTH ERROR.
    pub(super) const fn list_length() -> Sense {
        Sense::illegal(Asc::PARAMETER_LIST_LENGTH_ERROR)
    }

    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub(super) fn out_of_range(lba: u64) -> Sense {
        Sense {
            information: Some(lba),
            ..Sense::illegal(Asc::LBA_OUT_OF_RANGE)
        }
    }

    /// UNIT ATTENTION.
    pub(super) const fn attention(asc: Asc) -> Sense {
        Sense::new(SenseKey::UnitAttention, asc)
    }

    fn at(mut self, in_cdb: bool, byte: usize, bit: Option<u8>) -> Sense {
        self.field = Some(FieldPointer {
            in_cdb,
            byte: u16::try_from(byte).unwrap_or(u16::MAX),
            bit,
        });
        self
    }

    /// The bytes, in descriptor format (SPC-4 §4.5.2) or fixed format (§4.5.3).
    pub(super) fn encode(&self, descriptor: bool) -> Vec<u8> {
        if descriptor {
            self.encode_descriptors()
        } else {
            self.encode_fixed()
        }
    }

    fn encode_fixed(&self) -> Vec<u8> {
        let mut bytes = vec![0; 18];
        bytes[0] = 0x70;
        bytes[2] = self.key as u8;
        // Fixed format has 4 bytes: without VALID if the number does not fit.
        if let Some(information) = self.information.and_then(|it| u32::try_from(it).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        bytes[7] = 10;
        bytes[12..14].copy_from_slice(&self.asc.0.to_be_bytes());
        if let Some(specific) = self.key_specific() {
            bytes[15..18].copy_from_slice(&specific);
        }
        bytes
    }

    fn encode_descriptors(&self) -> Vec<u8> {
        let [asc, qualifier] = self.asc.0.to_be_bytes();
        let mut bytes = vec![0x72, self.key as u8, asc, qualifier, 0, 0, 0, 0];
        if let Some(information) = self.information {
            bytes.extend([0x00, 0x0a, 0x80, 0]);
            bytes.extend(information.to_be_bytes());
        }
        if let Some([a, b, c]) = self.key_specific() {
            bytes.extend([0x02, 0x06, 0, 0, a, b, c, 0]);
        }
        bytes[7] = (bytes.len() - 8) as u8;
        bytes
    }

    fn key_specific(&self) -> Option<[u8; 3]> {
        if let Some(field) = self.field {
            let [high, low] = field.byte.to_be_bytes();
            let bit = field.bit.map_or(0, |bit| 0x08 | bit & 7);
            return Some([0x80 | u8::from(field.in_cdb) << 6 | bit, high, low]);
        }
        let [high, low] = self.progress?.to_be_bytes();
        Some([0x80, high, low])
    }
}

/// How a command fails: with sense data, or with a status that has none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Failure {
    /// CHECK CONDITION.
    Sense(Sense),
    /// Another status.
    Status(Status),
}

impl From<Sense> for Failure {
    fn from(sense: Sense) -> Failure {
        Failure::Sense(sense)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::Status(status)
    }
}

/// What a device's error becomes; `writes` says which kind of medium error it is, `lba` where it was.
pub(super) fn device_failure(error: DeviceError, writes: bool, lba: u64) -> Failure {
    let sense = match error {
        DeviceError::OutOfRange => Sense::out_of_range(lba),
        DeviceError::Invalid => Sense::new(SenseKey::HardwareError, Asc::INTERNAL_TARGET_FAILURE),
        DeviceError::ReadOnly => Sense::new(SenseKey::DataProtect, Asc::WRITE_PROTECTED),
        DeviceError::NoSpace => Sense::new(SenseKey::DataProtect, Asc::SPACE_ALLOCATION_FAILED),
        DeviceError::Miscompare(at) => Sense {
            information: Some(at),
            ..Sense::new(SenseKey::Miscompare, Asc::MISCOMPARE_DURING_VERIFY)
        },
        DeviceError::Deleted => Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED),
        DeviceError::Fenced => {
            Sense::new(SenseKey::NotReady, Asc::ASYMMETRIC_ACCESS_STATE_TRANSITION)
        }
        DeviceError::Unavailable | DeviceError::ReservationChanged => {
            return Failure::Status(Status::Busy);
        }
        DeviceError::Reserved => return Failure::Status(Status::ReservationConflict),
        DeviceError::Io => Sense {
            information: Some(lba),
            ..Sense::new(
                SenseKey::MediumError,
                if writes {
                    Asc::WRITE_ERROR
                } else {
                    Asc::UNRECOVERED_READ_ERROR
                },
            )
        },
    };
    Failure::Sense(sense)
}

#[cfg(test)]
mod tests {
    use super::*;

    // SPC-4 §4.5.3, table 53.
    #[test]
    fn fixed_format_with_field_pointer() {
        let bytes = Sense::cdb_bit(1, 7).encode(false);
        let expected = [
            0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcf, 0, 1,
        ];
        assert_eq!(bytes, expected);
    }

    // SPC-4 §4.5.2, table 28.
    #[test]
    fn descriptor_format_with_information_and_field_pointer() {
        let mut sense = Sense::parameter(0x102);
        sense.information = Some(0x1_0000_0001);
        let bytes = sense.encode(true);
        let expected = [
            0x72, 5, 0x26, 0, 0, 0, 0, 20, 0, 10, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 6, 0, 0,
            0x80, 1, 2, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn information_that_does_not_fit_is_not_valid() {
        assert_eq!(Sense::out_of_range(u64::MAX).encode(false)[0], 0x70);
        assert_eq!(Sense::out_of_range(7).encode(false)[0], 0xf0);
    }

    #[test]
    fn progress_is_key_specific() {
        let mut sense = Sense::new(SenseKey::NotReady, Asc::SANITIZE_IN_PROGRESS);
        sense.progress = Some(0x8000);
        assert_eq!(sense.encode(false)[15..18], [0x80, 0x80, 0]);
    }
}
