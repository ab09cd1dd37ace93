//! Protocol data units (RFC 7143 §11): a header of 48 bytes, and what may follow it.
//!
//! [`request`] is what initiators send, [`response`] what targets send, [`framing`] finds PDUs in a stream
//! of bytes and checks their digests, [`outgoing`] puts them on their way.

pub mod framing;
pub mod outgoing;
pub mod request;
pub mod response;

/// Length of a basic header segment, bytes.
pub const BHS_BYTES: usize = 48;
/// A basic header segment.
pub type Bhs = [u8; BHS_BYTES];

/// A tag or number that names nothing.
pub const RESERVED_TAG: u32 = 0xffff_ffff;

/// Opcodes (RFC 7143 §11.2.1.2).
pub mod opcode {
    pub const NOP_OUT: u8 = 0x00;
    pub const SCSI_COMMAND: u8 = 0x01;
    pub const TASK_REQUEST: u8 = 0x02;
    pub const LOGIN_REQUEST: u8 = 0x03;
    pub const TEXT_REQUEST: u8 = 0x04;
    pub const DATA_OUT: u8 = 0x05;
    pub const LOGOUT_REQUEST: u8 = 0x06;
    pub const SNACK: u8 = 0x10;
    pub const NOP_IN: u8 = 0x20;
    pub const SCSI_RESPONSE: u8 = 0x21;
    pub const TASK_RESPONSE: u8 = 0x22;
    pub const LOGIN_RESPONSE: u8 = 0x23;
    pub const TEXT_RESPONSE: u8 = 0x24;
    pub const DATA_IN: u8 = 0x25;
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    pub const R2T: u8 = 0x31;
    pub const ASYNC_MESSAGE: u8 = 0x32;
    pub const REJECT: u8 = 0x3f;
    /// Where the opcode is in byte 0, beside the immediate bit.
    pub const MASK: u8 = 0x3f;
    /// The command is delivered at once and takes no CmdSN.
    pub const IMMEDIATE: u8 = 0x40;
}

/// The final bit, in byte 1 of most PDUs.
pub const FINAL: u8 = 0x80;
/// The continue bit of text and login PDUs.
pub const CONTINUE: u8 = 0x40;

/// Length of the additional header segments, bytes.
pub fn ahs_bytes(bhs: &Bhs) -> usize {
    usize::from(bhs[4]) * 4
}

/// Length of the data segment without padding, bytes; at most 16 MiB.
pub fn data_bytes(bhs: &Bhs) -> usize {
    usize::from(bhs[5]) << 16 | usize::from(bhs[6]) << 8 | usize::from(bhs[7])
}

/// Sets the length of the data segment.
pub fn set_data_bytes(bhs: &mut Bhs, length: usize) {
    assert!(length < 1 << 24, "a data segment's length has 24 bits");
    bhs[5..8].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
}

/// Four bytes of a header, big-endian.
pub fn word(bhs: &Bhs, at: usize) -> u32 {
    u32::from_be_bytes([bhs[at], bhs[at + 1], bhs[at + 2], bhs[at + 3]])
}

/// Sets four bytes of a header.
pub fn set_word(bhs: &mut Bhs, at: usize, value: u32) {
    bhs[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// The eight bytes of a logical unit number.
pub fn lun(bhs: &Bhs) -> [u8; 8] {
    let mut lun = [0; 8];
    lun.copy_from_slice(&bhs[8..16]);
    lun
}

/// Whether `a` comes before `b` in serial number arithmetic (RFC 7143 §4.2.2.1, RFC 1982).
pub fn serial_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Which digests follow headers and data segments.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Digests {
    /// CRC32C behind the header segments.
    pub header: bool,
    /// CRC32C behind data segment and padding.
    pub data: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_wrap() {
        // RFC 7143 §4.2.2.1: "comparisons and arithmetic on CmdSN use Serial Number Arithmetic".
        assert!(serial_before(1, 2));
        assert!(serial_before(u32::MAX, 0));
        assert!(serial_before(u32::MAX - 5, 5));
        assert!(!serial_before(5, u32::MAX - 5));
        assert!(!serial_before(7, 7));
    }

    #[test]
    fn lengths_have_24_bits() {
        let mut bhs = [0; BHS_BYTES];
        set_data_bytes(&mut bhs, 0x12_3456);
        assert_eq!(&bhs[4..8], [0, 0x12, 0x34, 0x56]);
        assert_eq!(data_bytes(&bhs), 0x12_3456);
        bhs[4] = 255;
        assert_eq!(ahs_bytes(&bhs), 1020);
    }
}
