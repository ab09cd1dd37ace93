//! What there is in the namespace, and its names and inode numbers.
//!
//! ```text
//! /vol001                  directory of a volume
//! /vol001/00/00            directories of chunks
//! /vol001/00/00/01         the second chunk's data
//! /.volumes/vol001         the whole volume's data
//! ```

use std::ops::Range;

use pss_core::types::{ChunkIndex, VolumeId};

/// Name of the directory of whole volumes.
pub const IMAGES_NAME: &str = ".volumes";

/// Something in the namespace.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Node {
    /// `/`
    Root,
    /// `/.volumes`
    Images,
    /// `/.volumes/vol001`
    Image(VolumeId),
    /// `/vol001`
    Volume(VolumeId),
    /// `/vol001/00`: chunks of the same upper 8 bits.
    Branch(VolumeId, u8),
    /// `/vol001/00/00`: chunks of the same upper 16 bits.
    Leaf(VolumeId, u16),
    /// `/vol001/00/00/01`
    Chunk(VolumeId, ChunkIndex),
}

/// Bits of an inode number that tell the chunk or directory.
const INDEX_BITS: u32 = 24;
/// Where the kind begins; between lies the volume.
const KIND_SHIFT: u32 = INDEX_BITS + 32;

impl Node {
    /// Its inode number: made of the volume's number, which is never used again, and the chunk's; so it stays the same
    /// as long as the chunk exists, on all machines.
    pub fn inode(self) -> u64 {
        let number = |kind: u64, volume: VolumeId, index: u32| {
            kind << KIND_SHIFT | u64::from(volume.0) << INDEX_BITS | u64::from(index)
        };
        match self {
            Node::Root => 1,
            Node::Images => 2,
            Node::Image(volume) => number(1, volume, 0),
            Node::Volume(volume) => number(2, volume, 0),
            Node::Branch(volume, branch) => number(3, volume, branch.into()),
            Node::Leaf(volume, leaf) => number(4, volume, leaf.into()),
            Node::Chunk(volume, chunk) => number(5, volume, chunk.0),
        }
    }

    /// The node of an inode number.
    pub fn from_inode(inode: u64) -> Option<Node> {
        let volume = VolumeId((inode >> INDEX_BITS) as u32);
        let index = inode as u32 & ((1 << INDEX_BITS) - 1);
        let node = match inode >> KIND_SHIFT {
            0 if inode == 1 => Node::Root,
            0 if inode == 2 => Node::Images,
            1 => Node::Image(volume),
            2 => Node::Volume(volume),
            3 => Node::Branch(volume, u8::try_from(index).ok()?),
            4 => Node::Leaf(volume, u16::try_from(index).ok()?),
            5 => Node::Chunk(volume, ChunkIndex(index)),
            _ => return None,
        };
        (node.inode() == inode).then_some(node)
    }

    /// Whether it is a directory.
    pub fn is_directory(self) -> bool {
        match self {
            Node::Root | Node::Images | Node::Volume(_) | Node::Branch(..) | Node::Leaf(..) => true,
            Node::Image(_) | Node::Chunk(..) => false,
        }
    }

    /// The directory that it is in; that of the root is the root.
    pub fn parent(self) -> Node {
        match self {
            Node::Root | Node::Images | Node::Volume(_) => Node::Root,
            Node::Image(_) => Node::Images,
            Node::Branch(volume, _) => Node::Volume(volume),
            Node::Leaf(volume, leaf) => Node::Branch(volume, (leaf >> 8) as u8),
            Node::Chunk(volume, chunk) => Node::Leaf(volume, (chunk.0 >> 8) as u16),
        }
    }

    /// The volume that it is, or is part of.
    pub fn volume(self) -> Option<VolumeId> {
        match self {
            Node::Root | Node::Images => None,
            Node::Image(volume)
            | Node::Volume(volume)
            | Node::Branch(volume, _)
            | Node::Leaf(volume, _)
            | Node::Chunk(volume, _) => Some(volume),
        }
    }

    /// The chunks that are in it, of all that a volume may have.
    pub fn chunks(self) -> Range<u32> {
        let below = |first: u32, bits: u32| first << bits..(first + 1) << bits;
        match self {
            Node::Root | Node::Images => 0..0,
            Node::Image(_) | Node::Volume(_) => below(0, 24),
            Node::Branch(_, branch) => below(branch.into(), 16),
            Node::Leaf(_, leaf) => below(leaf.into(), 8),
            Node::Chunk(_, chunk) => below(chunk.0, 0),
        }
    }

    /// The directory or chunk of that number in it, if it holds such.
    pub fn child(self, number: u8) -> Option<Node> {
        let number_wide = u32::from(number);
        match self {
            Node::Volume(volume) => Some(Node::Branch(volume, number)),
            Node::Branch(volume, branch) => Some(Node::Leaf(
                volume,
                u16::from(branch) << 8 | u16::from(number),
            )),
            Node::Leaf(volume, leaf) => {
                let chunk = ChunkIndex(u32::from(leaf) << 8 | number_wide);
                Some(Node::Chunk(volume, chunk))
            }
            Node::Root | Node::Images | Node::Image(_) | Node::Chunk(..) => None,
        }
    }

    /// Its name, if that is made of its number.
    pub fn number_name(self) -> Option<String> {
        let number = match self {
            Node::Root | Node::Images | Node::Image(_) | Node::Volume(_) => return None,
            Node::Branch(_, branch) => branch,
            Node::Leaf(_, leaf) => leaf as u8,
            Node::Chunk(_, chunk) => chunk.0 as u8,
        };
        Some(format!("{number:02x}"))
    }
}

/// The number that a directory of chunks or a chunk is named after: two hexadecimal digits in lower case.
pub fn parse_number(name: &str) -> Option<u8> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match name.len() == 2 && name.bytes().all(is_digit) {
        true => u8::from_str_radix(name, 16).ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_tell_everything_apart() {
        let mut nodes = vec![Node::Root, Node::Images];
        for volume in [1, 2, u32::MAX].map(VolumeId) {
            nodes.extend([Node::Image(volume), Node::Volume(volume)]);
            nodes.extend([0, 1, u8::MAX].map(|branch| Node::Branch(volume, branch)));
            nodes.extend([0, 1, u16::MAX].map(|leaf| Node::Leaf(volume, leaf)));
            let last = (1 << 24) - 1;
            nodes.extend([0, 1, last].map(|chunk| Node::Chunk(volume, ChunkIndex(chunk))));
        }
        for node in &nodes {
            assert_eq!(Node::from_inode(node.inode()), Some(*node));
        }
        let count = nodes.len();
        let mut numbers: Vec<u64> = nodes.into_iter().map(Node::inode).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), count);
    }

    #[test]
    fn numbers_that_no_inode_has() {
        for wrong in [0, 3, 1 << 24, 1 << 56 | 1, 3 << 56 | 256, 6 << 56, u64::MAX] {
            assert_eq!(Node::from_inode(wrong), None, "{wrong:#x}");
        }
    }

    #[test]
    fn the_way_down_leads_up() {
        let volume = Node::Volume(VolumeId(7));
        let child = |node: Node, number| node.child(number).expect("has children");
        let chunk = child(child(child(volume, 0x12), 0x34), 0x56);
        assert_eq!(chunk, Node::Chunk(VolumeId(7), ChunkIndex(0x12_3456)));
        assert_eq!(chunk.parent().parent().parent(), volume);
        assert_eq!(chunk.number_name().as_deref(), Some("56"));
        assert_eq!(chunk.parent().number_name().as_deref(), Some("34"));
        assert_eq!(chunk.parent().parent().number_name().as_deref(), Some("12"));
        assert_eq!(chunk.parent().chunks(), 0x12_3400..0x12_3500);
        assert_eq!(chunk.child(0), None);
        assert_eq!(volume.chunks(), 0..1 << 24);
    }

    #[test]
    fn names_of_numbers() {
        assert_eq!(parse_number("00"), Some(0));
        assert_eq!(parse_number("ff"), Some(255));
        for wrong in ["", "0", "000", "FF", "+1", "0x", "g0"] {
            assert_eq!(parse_number(wrong), None, "{wrong}");
        }
    }
}
