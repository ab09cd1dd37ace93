//! Splits ranges of a volume into ranges of its chunks.

use crate::types::{BLOCK_BYTES, ChunkIndex};

/// Part of a block range that lies in one chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChunkRange {
    /// Which chunk.
    pub chunk: ChunkIndex,
    /// First block within the chunk.
    pub first: u32,
    /// How many blocks.
    pub blocks: u32,
}

/// Blocks of one chunk.
pub fn blocks_per_chunk(chunk_bytes: u32) -> u64 {
    u64::from(chunk_bytes) / BLOCK_BYTES as u64
}

/// Splits `blocks` blocks from `first_block` of a volume into the parts that lie in one chunk each, in
/// order.
pub fn chunk_ranges(
    first_block: u64,
    blocks: u64,
    chunk_bytes: u32,
) -> impl Iterator<Item = ChunkRange> {
    let per_chunk = blocks_per_chunk(chunk_bytes);
    let end = first_block + blocks;
    let mut next = first_block;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let first = next % per_chunk;
        let count = (per_chunk - first).min(end - next);
        let chunk = ChunkIndex((next / per_chunk) as u32);
        next += count;
        Some(ChunkRange {
            chunk,
            first: first as u32,
            blocks: count as u32,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_over_three_chunks() {
        let parts: Vec<_> = chunk_ranges(15, 34, 16 * 4096).collect();
        let part = |chunk, first, blocks| ChunkRange {
            chunk: ChunkIndex(chunk),
            first,
            blocks,
        };
        assert_eq!(
            parts,
            [
                part(0, 15, 1),
                part(1, 0, 16),
                part(2, 0, 16),
                part(3, 0, 1)
            ]
        );
    }

    #[test]
    fn empty_range_has_no_parts() {
        assert_eq!(chunk_ranges(7, 0, 65536).count(), 0);
    }
}
