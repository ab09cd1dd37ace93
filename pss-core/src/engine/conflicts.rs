//! Keeps a request that must read before it writes (part of a block, compare-and-write) apart from the
//! others on the same blocks.
//!
//! Blocks are counted in granules of 64 KiB, hashed into a fixed table: a collision only costs a wait.

use crate::types::VolumeId;

const GRANULE_BLOCKS: u64 = 16;
const GRANULES: usize = 4096;
/// A range over more granules than this holds the whole table.
const WIDE: u64 = 256;

/// A range of blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct BlockRange {
    pub(super) volume: VolumeId,
    pub(super) first: u64,
    pub(super) blocks: u64,
}

impl BlockRange {
    /// Indices of the table, or `None`: all.
    fn granules(&self) -> Option<impl Iterator<Item = usize> + use<>> {
        let volume = u64::from(self.volume.0).wrapping_mul(0x9e37_79b9);
        let first = self.first / GRANULE_BLOCKS;
        let last = (self.first + self.blocks.max(1) - 1) / GRANULE_BLOCKS;
        (last - first < WIDE)
            .then(|| (first..=last).map(move |it| (it.wrapping_add(volume)) as usize % GRANULES))
    }
}

/// How many ranges hold each granule.
pub(super) struct Counts {
    granules: Vec<u32>,
    wide: u32,
    total: u32,
}

impl Counts {
    pub(super) fn new() -> Counts {
        Counts {
            granules: vec![0; GRANULES],
            wide: 0,
            total: 0,
        }
    }

    pub(super) fn add(&mut self, range: BlockRange) {
        self.total += 1;
        match range.granules() {
            Some(granules) => granules.for_each(|it| self.granules[it] += 1),
            None => self.wide += 1,
        }
    }

    pub(super) fn remove(&mut self, range: BlockRange) {
        self.total -= 1;
        match range.granules() {
            Some(granules) => granules.for_each(|it| self.granules[it] -= 1),
            None => self.wide -= 1,
        }
    }

    /// Whether a range that was added may overlap this one.
    pub(super) fn touches(&self, range: BlockRange) -> bool {
        if self.total == 0 {
            return false;
        }
        let own = match range.granules() {
            Some(mut granules) => granules.any(|it| self.granules[it] > 0),
            None => true,
        };
        self.wide > 0 || own
    }

    pub(super) fn clear(&mut self) {
        *self = Counts::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(volume: u32, first: u64, blocks: u64) -> BlockRange {
        BlockRange {
            volume: VolumeId(volume),
            first,
            blocks,
        }
    }

    #[test]
    fn overlapping_ranges_touch_until_removed() {
        let mut counts = Counts::new();
        counts.add(range(1, 100, 1));
        assert!(counts.touches(range(1, 100, 1)));
        assert!(counts.touches(range(1, 0, 1000)));
        assert!(!counts.touches(range(1, 200, 1)));
        assert!(!counts.touches(range(2, 100, 1)));
        counts.remove(range(1, 100, 1));
        assert!(!counts.touches(range(1, 100, 1)));
    }

    #[test]
    fn wide_range_touches_everything() {
        let mut counts = Counts::new();
        counts.add(range(1, 0, 1 << 30));
        assert!(counts.touches(range(2, 7, 1)));
        counts.remove(range(1, 0, 1 << 30));
        counts.add(range(2, 7, 1));
        assert!(counts.touches(range(1, 0, 1 << 30)));
    }
}
