//! Where chunks are in the tree.

use std::ops::Range;

use crate::types::ChunkIndex;

/// Directory of the volumes.
pub(super) const DATA: &str = "data";
/// Directory of what is to be removed.
pub(super) const TRASH: &str = "trash";
/// Ends the name of a chunk file that is being received.
pub(super) const INCOMPLETE: &str = ".new";

/// Directory of a volume.
pub(super) fn volume(name: &str) -> String {
    format!("{DATA}/{name}")
}

/// So many low bits of a chunk's number tell the files of one directory apart.
pub(super) const LEAF_BITS: u32 = 8;
/// The same for what is below one directory in that of the volume.
const BRANCH_BITS: u32 = 16;

/// The chunks whose files are in the same directory.
pub(super) fn leaf_of(chunk: ChunkIndex) -> Range<u64> {
    neighbours(chunk, LEAF_BITS)
}

/// The chunks whose directories are in the same directory.
pub(super) fn branch_of(chunk: ChunkIndex) -> Range<u64> {
    neighbours(chunk, BRANCH_BITS)
}

fn neighbours(chunk: ChunkIndex, bits: u32) -> Range<u64> {
    let first = u64::from(chunk.0) >> bits << bits;
    first..first + (1 << bits)
}

/// Directory of the directory of the chunk's file.
pub(super) fn branch(volume: &str, chunk: ChunkIndex) -> String {
    let [_, high, ..] = chunk.0.to_be_bytes();
    format!("{volume}/{high:02x}")
}

/// Directory of the chunk's file, below that of its volume.
pub(super) fn leaf(volume: &str, chunk: ChunkIndex) -> String {
    let [_, high, middle, _] = chunk.0.to_be_bytes();
    format!("{volume}/{high:02x}/{middle:02x}")
}

/// The chunk's file.
pub(super) fn chunk(volume: &str, chunk: ChunkIndex) -> String {
    let [_, high, middle, low] = chunk.0.to_be_bytes();
    format!("{volume}/{high:02x}/{middle:02x}/{low:02x}")
}

/// A number of two hexadecimal digits.
pub(super) fn parse(name: &str) -> Option<u8> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (name.len() == 2 && name.bytes().all(is_hex))
        .then(|| u8::from_str_radix(name, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(chunk(&volume("a"), ChunkIndex(0)), "data/a/00/00/00");
        assert_eq!(chunk("v", ChunkIndex(0x01_02_ff)), "v/01/02/ff");
        assert_eq!(leaf("v", ChunkIndex(0xfe_02_03)), "v/fe/02");
        assert_eq!(branch("v", ChunkIndex(0xfe_02_03)), "v/fe");
        assert_eq!(leaf_of(ChunkIndex(0xfe_02_03)), 0xfe_02_00..0xfe_03_00);
        assert_eq!(branch_of(ChunkIndex(0xfe_02_03)), 0xfe_00_00..0xff_00_00);
        assert_eq!(parse("0a"), Some(10));
        for name in ["", "0", "0A", "+1", "000", "0g"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
