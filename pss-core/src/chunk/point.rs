//! Points: what chunks held at one slot, told while they are written to.
//!
//! A point is taken between two entries, by the thread that applies them. From then on another thread computes the digests of the
//! chunks in ascending order, and whoever is about to change a block of a chunk that was not reached yet notes the digest of its
//! old content first ([`ChunkStore::before_change`], under the chunk's lock). A chunk that goes as a whole leaves its file and table with the point.
//! So what is told is the content between the two entries, whatever comes after, and writers wait for no more than the reading
//! of what they overwrite. If very much is overwritten, the point fails, and memory stays bounded.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::blocks::Snapshot;
use super::cache::{Chunk, ChunkState, VolumeChunks, lock};
use super::digest::{Digest, Tree};
use super::repair::BadBlock;
use super::store::{BLOCK, ChunkStore};
use super::{ChunkError, ReadError, table};
use crate::disk::DiskFile;
use crate::entry::block_checksum;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex, VolumeId};

/// Overwritten blocks that a point notes, about 50 MiB: 2 GiB of data that were overwritten before they were reached.
const NOTED_MAX: usize = 512 * 1024;
/// Files of removed chunks that a point keeps open.
const GONE_MAX: usize = 64;
/// Read at once.
const PIECE_BLOCKS: usize = 256;

/// Why a point tells nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PointFailure {
    /// Too much was overwritten or removed before it was reached.
    Overwritten,
    /// The volume is gone, or its chunks come from another server.
    Gone,
    /// The disk failed.
    Unreadable,
}

/// What chunks of a volume held when it was taken.
pub struct Point {
    volume: Arc<VolumeChunks>,
    size_bytes: u64,
    state: Mutex<PointState>,
}

struct PointState {
    /// Chunks that existed, a bit each, by their number divided by 64.
    present: BTreeMap<u32, u64>,
    /// Chunks below are done.
    next: u64,
    /// Old content of blocks; `None`: it was damaged.
    noted: BTreeMap<u64, Option<Digest>>,
    gone: BTreeMap<ChunkIndex, Gone>,
    failure: Option<PointFailure>,
}

/// A chunk that was removed.
struct Gone {
    table: Arc<Vec<u32>>,
    file: Option<Arc<dyn DiskFile>>,
}

/// A chunk as a point has found it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ChunkDigest {
    /// Which.
    pub chunk: ChunkIndex,
    /// The node above its blocks; none if one of them is damaged.
    pub digest: Option<Digest>,
    /// Blocks that take space, all of which were compared with their checksums.
    pub blocks: u32,
    /// Those that are damaged here now.
    pub bad: Vec<BadBlock>,
}

/// Tells whether an entry has meant a chunk since it began, whether that chunk exists or not.
pub struct Watch {
    volume: VolumeId,
    chunk: ChunkIndex,
    changed: AtomicBool,
}

impl Watch {
    /// Whether an entry has.
    pub fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }
}

/// The points and watches of a store.
#[derive(Default)]
pub(super) struct Points {
    /// So that a write need not look into the lists.
    count: AtomicUsize,
    list: RwLock<Vec<Arc<Point>>>,
    watches: RwLock<Vec<Arc<Watch>>>,
}

impl Point {
    /// Size of the volume, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Of the volume.
    pub fn chunk_bytes(&self) -> u32 {
        self.volume.chunk_bytes
    }

    /// Levels of a chunk's tree.
    pub fn chunk_levels(&self) -> u32 {
        self.volume.blocks_per_chunk().trailing_zeros()
    }

    /// Why it tells nothing, if it does not.
    pub fn failure(&self) -> Option<PointFailure> {
        lock(&self.state).failure
    }

    /// The chunk that is to be looked at next; all others up to it are zeros or done.
    pub fn next(&self) -> Option<ChunkIndex> {
        let state = lock(&self.state);
        let from = state.next;
        let mut words = state.present.range((from >> 6) as u32..);
        words.find_map(|(key, word)| {
            let mask = match u64::from(*key) == from >> 6 {
                true => u64::MAX << (from & 63),
                false => u64::MAX,
            };
            let left = word & mask;
            (left != 0).then(|| ChunkIndex((key << 6) + left.trailing_zeros()))
        })
    }

    /// Chunks that it looks at in all.
    pub fn chunks(&self) -> u64 {
        let state = lock(&self.state);
        let bits = state.present.values().map(|word| word.count_ones());
        bits.map(u64::from).sum()
    }

    fn fail(&self, failure: PointFailure) {
        let mut state = lock(&self.state);
        state.failure.get_or_insert(failure);
        state.noted.clear();
        state.gone.clear();
    }

    /// What a block counts for: nothing behind the end of the volume.
    fn leaf(&self, block: u64, data: &mut [u8]) -> Digest {
        let inside = self.size_bytes.saturating_sub(block * BLOCK);
        if inside < BLOCK {
            data[inside as usize..].fill(0);
        }
        Digest::leaf(data)
    }
}

impl PointState {
    /// Whether a change of the chunk is to be noted.
    fn keeps(&self, chunk: ChunkIndex) -> bool {
        let bit = 1 << (chunk.0 & 63);
        let present = self.present.get(&(chunk.0 >> 6));
        self.failure.is_none()
            && u64::from(chunk.0) >= self.next
            && present.is_some_and(|word| word & bit != 0)
            && !self.gone.contains_key(&chunk)
    }
}

impl Points {
    fn recount(&self) {
        let points = read(&self.list).len();
        let watches = read(&self.watches).len();
        self.count.store(points + watches, Ordering::Release);
    }

    /// An entry means chunks of the range.
    pub(super) fn touch(&self, volume: VolumeId, chunks: &Range<u64>) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        for watch in read(&self.watches).iter() {
            if watch.volume == volume && chunks.contains(&u64::from(watch.chunk.0)) {
                watch.changed.store(true, Ordering::Release);
            }
        }
    }

    /// Those of a volume; the usual case, none at all, costs a look at a number.
    fn of(&self, volume: VolumeId) -> Vec<Arc<Point>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let list = read(&self.list);
        let ours = list.iter().filter(|point| point.volume.id == volume);
        ours.map(Arc::clone).collect()
    }
}

impl ChunkStore {
    /// Takes a point of the chunks of a range that exist, at most `chunks_max` of them if that is given; says where the next
    /// range begins, if there are more. To be called between two entries by the thread that applies them, and to be ended by
    /// [`ChunkStore::end_point`].
    ///
    /// # Errors
    /// [`ChunkError::NoSuchVolume`].
    pub fn take_point(
        &self,
        volume: &Volume,
        range: Range<ChunkIndex>,
        chunks_max: Option<usize>,
    ) -> Result<(Arc<Point>, Option<ChunkIndex>), ChunkError> {
        let chunks = self.known(volume.id)?;
        let mut present: BTreeMap<u32, u64> = BTreeMap::new();
        let (mut next, mut count, mut more) = (u64::from(range.start.0), 0, None);
        while let Some(index) = chunks.next_present(next) {
            if index >= range.end {
                break;
            }
            if chunks_max.is_some_and(|most| count >= most) {
                more = Some(index);
                break;
            }
            *present.entry(index.0 >> 6).or_default() |= 1 << (index.0 & 63);
            (next, count) = (u64::from(index.0) + 1, count + 1);
        }
        let point = Arc::new(Point {
            volume: chunks,
            size_bytes: volume.size_bytes,
            state: Mutex::new(PointState {
                present,
                next: 0,
                noted: BTreeMap::new(),
                gone: BTreeMap::new(),
                failure: None,
            }),
        });
        write(&self.points.list).push(Arc::clone(&point));
        self.points.recount();
        Ok((point, more))
    }

    /// Nothing is noted for the point any more.
    pub fn end_point(&self, point: &Arc<Point>) {
        write(&self.points.list).retain(|it| !Arc::ptr_eq(it, point));
        self.points.recount();
    }

    /// Watches a chunk, from now on and until [`ChunkStore::end_watch`]. To be called by the thread that applies entries.
    pub fn watch(&self, volume: VolumeId, chunk: ChunkIndex) -> Arc<Watch> {
        let watch = Arc::new(Watch {
            volume,
            chunk,
            changed: AtomicBool::new(false),
        });
        write(&self.points.watches).push(Arc::clone(&watch));
        self.points.recount();
        watch
    }

    /// Watches it no more.
    pub fn end_watch(&self, watch: &Arc<Watch>) {
        write(&self.points.watches).retain(|it| !Arc::ptr_eq(it, watch));
        self.points.recount();
    }

    /// Computes the digest of the chunk that [`Point::next`] names. Waits for the device; for one thread at a time.
    ///
    /// # Errors
    /// [`PointFailure`].
    pub fn digest_chunk(
        &self,
        point: &Point,
        index: ChunkIndex,
    ) -> Result<ChunkDigest, PointFailure> {
        let result = self.try_digest(point, index);
        if point.volume.is_deleted() {
            point.fail(PointFailure::Gone);
        }
        if let Err(failure) = &result {
            point.fail(*failure);
        }
        match point.failure() {
            Some(failure) => Err(failure),
            None => result,
        }
    }

    fn try_digest(&self, point: &Point, index: ChunkIndex) -> Result<ChunkDigest, PointFailure> {
        let chunk = self.cache.chunk(&point.volume, index);
        let (snapshot, is_gone) = self.point_snapshot(point, &chunk)?;
        let first = chunk.first_block();
        let mut leaves = vec![Some(Digest::zeros(0)); snapshot.table.len()];
        let mut bad = Vec::new();
        let mut data = vec![0; PIECE_BLOCKS.min(leaves.len()) * BLOCK_BYTES];
        for (piece, checksums) in snapshot.table.chunks(PIECE_BLOCKS).enumerate() {
            if checksums.iter().all(|checksum| *checksum == 0) {
                continue;
            }
            let start = piece * PIECE_BLOCKS;
            let data = &mut data[..checksums.len() * BLOCK_BYTES];
            data.fill(0);
            let file = snapshot.file.as_deref();
            let read = file.map(|file| file.read_at(data, start as u64 * BLOCK));
            let is_read = matches!(read, Some(Ok(_)));
            let each = data.chunks_exact_mut(BLOCK_BYTES).zip(start..);
            for (checksum, (data, at)) in checksums.iter().zip(each) {
                if *checksum == 0 {
                    continue;
                }
                let block = first + at as u64;
                let fits = is_read && block_checksum(chunk.volume.id, block, data) == *checksum;
                if fits || !is_gone && self.reads_again(&chunk, at, data)? {
                    leaves[at] = Some(point.leaf(block, data));
                    continue;
                }
                leaves[at] = None;
                bad.push(BadBlock {
                    block,
                    checksum: Some(*checksum).filter(|it| table::is_known(*it)),
                });
            }
        }
        let mut state = lock(&point.state);
        let range = first..first + leaves.len() as u64;
        for (block, noted) in state.noted.range(range.clone()) {
            leaves[(block - first) as usize] = *noted;
            // What was overwritten is damaged no more.
            bad.retain(|it| it.block != *block);
        }
        state.noted.retain(|block, _| !range.contains(block));
        state.gone.remove(&index);
        state.next = u64::from(index.0) + 1;
        drop(state);
        if is_gone {
            bad.clear();
        }
        Ok(ChunkDigest {
            chunk: index,
            digest: subtree(&leaves),
            blocks: snapshot.allocated,
            bad,
        })
    }

    /// The chunk as it is now, or as it was when it was removed.
    fn point_snapshot(
        &self,
        point: &Point,
        chunk: &Arc<Chunk>,
    ) -> Result<(Snapshot, bool), PointFailure> {
        let mut state = lock(&chunk.state);
        if let Some(gone) = lock(&point.state).gone.get(&chunk.index) {
            let snapshot = Snapshot {
                table: Arc::clone(&gone.table),
                file: gone.file.clone(),
                allocated: super::file::allocated(&gone.table),
                ..Snapshot::of(&state)
            };
            return Ok((snapshot, true));
        }
        self.bring_in(chunk, &mut state)?;
        Ok((Snapshot::of(&state), false))
    }

    /// Whether a block that did not match can be read after all. What it holds then may be newer than the point; its old
    /// content is noted in that case.
    fn reads_again(&self, chunk: &Chunk, at: usize, data: &mut [u8]) -> Result<bool, PointFailure> {
        match self.read_again(chunk, at, data) {
            Ok(()) => Ok(true),
            Err(ReadError::BadBlock { .. }) => Ok(false),
            Err(ReadError::NoSuchVolume(_)) => Err(PointFailure::Gone),
            Err(_) => Err(PointFailure::Unreadable),
        }
    }

    /// Notes what blocks of a chunk hold, before they are changed, for the points that have not reached them. The caller holds the
    /// chunk's lock.
    pub(super) fn before_change(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        first: u32,
        blocks: u32,
    ) {
        for point in self.points.of(chunk.volume.id) {
            let keeps = lock(&point.state).keeps(chunk.index);
            if keeps {
                let noted = self.note_blocks(&point, chunk, state, first..first + blocks);
                noted.unwrap_or_else(|failure| point.fail(failure));
            }
        }
    }

    fn note_blocks(
        &self,
        point: &Point,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        range: Range<u32>,
    ) -> Result<(), PointFailure> {
        self.bring_in(chunk, state)?;
        let mut data = vec![0; PIECE_BLOCKS.min(range.len()) * BLOCK_BYTES];
        let mut start = range.start as usize;
        while start < range.end as usize {
            let count = PIECE_BLOCKS.min(range.end as usize - start);
            let data = &mut data[..count * BLOCK_BYTES];
            data.fill(0);
            let file = state.file.as_deref();
            let read = file.map(|file| file.read_at(data, start as u64 * BLOCK));
            let is_read = matches!(read, Some(Ok(_)));
            let each = data.chunks_exact_mut(BLOCK_BYTES).zip(start..);
            let mut noted = lock(&point.state);
            for (data, at) in each {
                let block = chunk.first_block() + at as u64;
                if noted.noted.contains_key(&block) {
                    continue;
                }
                let checksum = state.table[at];
                let old = match checksum {
                    0 => Some(Digest::zeros(0)),
                    _ if is_read && block_checksum(chunk.volume.id, block, data) == checksum => {
                        Some(point.leaf(block, data))
                    }
                    _ => None,
                };
                noted.noted.insert(block, old);
            }
            if noted.noted.len() > NOTED_MAX {
                return Err(PointFailure::Overwritten);
            }
            start += count;
        }
        Ok(())
    }

    /// Leaves the file and the table of a chunk that is about to be removed with the points that have not reached it. The caller
    /// holds the chunk's lock.
    pub(super) fn before_removal(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) {
        for point in self.points.of(chunk.volume.id) {
            if !lock(&point.state).keeps(chunk.index) {
                continue;
            }
            if let Err(failure) = self.bring_in(chunk, state) {
                point.fail(failure);
                continue;
            }
            let mut kept = lock(&point.state);
            let gone = Gone {
                table: Arc::clone(&state.table),
                file: state.file.clone(),
            };
            kept.gone.insert(chunk.index, gone);
            let too_many = kept.gone.len() > GONE_MAX;
            drop(kept);
            if too_many {
                point.fail(PointFailure::Overwritten);
            }
        }
    }

    /// Brings the table and the file of a chunk in.
    fn bring_in(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) -> Result<(), PointFailure> {
        let unreadable = |_: ReadError| PointFailure::Unreadable;
        self.load(chunk, state).map_err(unreadable)?;
        if state.suspect {
            self.resolve(chunk, state).map_err(unreadable)?;
        }
        self.open_file(chunk, state).map_err(unreadable)
    }

    /// Ends the points that have not reached chunks of the range, which change as a whole.
    pub(super) fn fail_points(&self, volume: VolumeId, chunks: &Range<u64>, failure: PointFailure) {
        for point in self.points.of(volume) {
            let next = point.next().map(|chunk| u64::from(chunk.0));
            if next.is_some_and(|next| next < chunks.end) {
                point.fail(failure);
            }
        }
    }
}

fn read<T>(list: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    list.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(list: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    list.write().unwrap_or_else(PoisonError::into_inner)
}

fn subtree(leaves: &[Option<Digest>]) -> Option<Digest> {
    let mut tree = Tree::default();
    for (at, leaf) in (0..).zip(leaves) {
        tree.add(at, 0, (*leaf)?);
    }
    Some(tree.root(leaves.len().trailing_zeros()))
}
