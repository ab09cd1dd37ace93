//! Where chunks are in the tree.

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
        assert_eq!(parse("0a"), Some(10));
        for name in ["", "0", "0A", "+1", "000", "0g"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
