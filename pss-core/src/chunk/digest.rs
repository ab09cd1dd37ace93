//! What a volume holds, as one number: the root of a Merkle tree over its blocks.
//!
//! ```text
//! leaf(data)        = SHA-256(00 ‖ data)                      4096 bytes; a block that takes no space is zeros
//! node(left, right) = SHA-256(01 ‖ left ‖ right)
//! volume            = SHA-256(02 ‖ size u64 ‖ block size u32 ‖ root), little-endian
//! ```
//!
//! The tree has [`TREE_LEVELS`] levels above its leaves; behind the end of the volume everything is zeros. A chunk is a subtree, because it
//! has a power of two of blocks and begins at a multiple of it: its digest is the node above its blocks. So the root does not
//! depend on the size of chunks, nor on which blocks take space.

use std::fmt;
use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use crate::types::BLOCK_BYTES;

/// Levels of nodes above the leaves: 2^40 blocks, 4 PiB.
pub const TREE_LEVELS: u32 = 40;

const LEAF: u8 = 0;
const NODE: u8 = 1;
const VOLUME: u8 = 2;

/// A SHA-256 digest.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Digest {
    /// Of a block's content.
    pub fn leaf(data: &[u8]) -> Digest {
        let hash = Sha256::new_with_prefix([LEAF]).chain_update(data);
        Digest(hash.finalize().into())
    }

    fn node(left: &Digest, right: &Digest) -> Digest {
        let hash = Sha256::new_with_prefix([NODE]).chain_update(left.0);
        Digest(hash.chain_update(right.0).finalize().into())
    }

    /// Of a volume of that size with that tree.
    pub fn volume(size_bytes: u64, root: &Digest) -> Digest {
        let hash = Sha256::new_with_prefix([VOLUME])
            .chain_update(size_bytes.to_le_bytes())
            .chain_update((BLOCK_BYTES as u32).to_le_bytes());
        Digest(hash.chain_update(root.0).finalize().into())
    }

    /// Of 2^`level` blocks of zeros.
    pub fn zeros(level: u32) -> Digest {
        static ZEROS: OnceLock<Vec<Digest>> = OnceLock::new();
        let zeros = ZEROS.get_or_init(|| {
            let mut zeros = vec![Digest::leaf(&[0; BLOCK_BYTES])];
            for level in 0..TREE_LEVELS as usize {
                zeros.push(Digest::node(&zeros[level], &zeros[level]));
            }
            zeros
        });
        zeros[level.min(TREE_LEVELS) as usize]
    }
}

/// A tree that is put together from the left.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Complete subtrees and their levels, which fall.
    subtrees: Vec<(u32, Digest)>,
    /// Blocks that they cover.
    blocks: u64,
}

impl Tree {
    /// Adds a subtree of 2^`level` blocks that begins at `block`; what lies between it and the one before is zeros.
    ///
    /// # Panics
    /// If `block` is no multiple of 2^`level`, or something was added behind it.
    pub fn add(&mut self, block: u64, level: u32, digest: Digest) {
        assert!(block.is_multiple_of(1 << level) && block >= self.blocks);
        self.fill(block);
        self.push(level, digest);
    }

    /// The node `levels` above the leaves that holds everything.
    ///
    /// # Panics
    /// If more was added.
    pub fn root(mut self, levels: u32) -> Digest {
        assert!(self.blocks <= 1 << levels);
        self.fill(1 << levels);
        let (level, root) = self.subtrees[0];
        debug_assert_eq!(level, levels);
        root
    }

    fn fill(&mut self, until: u64) {
        while self.blocks < until {
            let fits = (until - self.blocks).ilog2();
            let level = fits.min(self.blocks.trailing_zeros()).min(TREE_LEVELS);
            self.push(level, Digest::zeros(level));
        }
    }

    fn push(&mut self, mut level: u32, mut digest: Digest) {
        self.blocks += 1 << level;
        while let Some((last, left)) = self.subtrees.last()
            && *last == level
        {
            digest = Digest::node(left, &digest);
            level += 1;
            self.subtrees.pop();
        }
        self.subtrees.push((level, digest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word for word.
    fn naive(blocks: &[Digest], levels: u32) -> Digest {
        if levels == 0 {
            return blocks.first().copied().unwrap_or(Digest::zeros(0));
        }
        if blocks.is_empty() {
            let below = naive(blocks, levels - 1);
            return Digest::node(&below, &below);
        }
        let half = blocks.len().min(1 << (levels - 1));
        let (left, right) = blocks.split_at(half);
        Digest::node(&naive(left, levels - 1), &naive(right, levels - 1))
    }

    #[test]
    fn a_tree_is_what_its_definition_says() {
        let leaves: Vec<Digest> = (0..37u8).map(|byte| Digest::leaf(&[byte; 16])).collect();
        for count in [0, 1, 2, 3, 16, 31, 37] {
            let mut tree = Tree::default();
            for (at, leaf) in (0..).zip(&leaves[..count]) {
                tree.add(at, 0, *leaf);
            }
            assert_eq!(tree.root(6), naive(&leaves[..count], 6), "{count}");
        }
    }

    #[test]
    fn gaps_are_zeros_and_subtrees_may_have_any_size() {
        let mut leaves = vec![Digest::zeros(0); 64];
        for at in [5, 40, 41] {
            leaves[at] = Digest::leaf(&[at as u8; 16]);
        }
        let expected = naive(&leaves, TREE_LEVELS);
        for level in 0..5 {
            let mut tree = Tree::default();
            for (number, part) in leaves.chunks(1 << level).enumerate() {
                if part.iter().any(|it| *it != Digest::zeros(0)) {
                    let block = (number << level) as u64;
                    tree.add(block, level, naive(part, level));
                }
            }
            assert_eq!(tree.root(TREE_LEVELS), expected, "chunks of 2^{level}");
        }
    }

    /// Anybody may recompute these.
    #[test]
    fn literal_digests() {
        // printf '\0' | cat - <(head -c 4096 /dev/zero) | sha256sum
        let zeros = Digest::zeros(0).to_string();
        assert_eq!(
            zeros,
            "b587fa297299ce9c602e58292b51379402bf7b1074f6b18679c2fb871c917ca8"
        );
    }
}
