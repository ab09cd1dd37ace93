//! Chunks in memory, and which files are open.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use super::path;
use super::table::Owner;
use super::trash::Filter;
use crate::disk::DiskFile;
use crate::types::{BLOCK_BYTES, ChunkIndex, GroupId, Slot, VolumeId};

/// Locks over the map of chunks, so that threads seldom meet.
const SHARDS: usize = 64;
/// At most so many chunks are looked at when one is to be let go, so that no request pays for many.
const ATTEMPTS: usize = 16;
/// Memory of a cached chunk beside its table, about.
const CHUNK_OVERHEAD_BYTES: usize = 256;

/// Locks; a thread that panicked while it held the lock has stopped the server anyway.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A volume's chunks.
pub(super) struct VolumeChunks {
    pub(super) group: GroupId,
    pub(super) id: VolumeId,
    pub(super) uuid: [u8; 16],
    pub(super) chunk_bytes: u32,
    /// `data/NAME`.
    pub(super) directory: String,
    /// Which chunks exist.
    pub(super) presence: RwLock<Presence>,
    /// Held while a file is looked up by its name, and exclusively while directories are put aside: else
    /// a chunk that goes with its directory would pass for one whose file is lost. Taken after the lock of
    /// a chunk.
    pub(super) names: RwLock<()>,
    /// Nothing of it may be written any more.
    pub(super) deleted: RwLock<bool>,
    /// The table of a chunk without blocks, shared by all of them.
    pub(super) empty_table: Arc<Vec<u32>>,
}

impl VolumeChunks {
    pub(super) fn blocks_per_chunk(&self) -> u32 {
        self.chunk_bytes / BLOCK_BYTES as u32
    }

    pub(super) fn path(&self, chunk: ChunkIndex) -> String {
        path::chunk(&self.directory, chunk)
    }

    pub(super) fn owner(&self, chunk: ChunkIndex) -> Owner {
        Owner {
            group: self.group,
            volume: self.id,
            uuid: self.uuid,
            chunk,
            blocks: self.blocks_per_chunk(),
        }
    }

    pub(super) fn is_deleted(&self) -> bool {
        *self.deleted.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_present(&self, chunk: ChunkIndex) -> bool {
        let presence = self.presence.read().unwrap_or_else(PoisonError::into_inner);
        presence.get(chunk) != ABSENT
    }

    /// The first chunk from `from` on that exists.
    pub(super) fn next_present(&self, from: u64) -> Option<ChunkIndex> {
        let presence = self.presence.read().unwrap_or_else(PoisonError::into_inner);
        presence.next(u32::try_from(from).ok()?)
    }

    /// Whether `filter` lets all chunks of the range through that exist.
    pub(super) fn all_present(&self, chunks: &Range<u64>, filter: Filter<'_>) -> bool {
        let Some(filter) = filter else {
            return true;
        };
        let mut next = chunks.start;
        while let Some(chunk) = self.next_present(next)
            && u64::from(chunk.0) < chunks.end
        {
            if !filter(chunk) {
                return false;
            }
            next = u64::from(chunk.0) + 1;
        }
        true
    }

    /// Notes how many blocks of a chunk are allocated; none: it does not exist.
    pub(super) fn set_allocated(&self, chunk: ChunkIndex, allocated: u32) {
        self.write_presence().set(chunk, presence_of(allocated));
    }

    /// The same if the chunk still counts as one that exists: for those who only look at it, while it may
    /// be put aside.
    pub(super) fn refine_allocated(&self, chunk: ChunkIndex, allocated: u32) {
        let mut presence = self.write_presence();
        if presence.get(chunk) != ABSENT {
            presence.set(chunk, presence_of(allocated));
        }
    }

    /// Notes that none of these chunks exists, all of one or more directories.
    pub(super) fn set_absent(&self, chunks: &Range<u64>) {
        self.write_presence().clear(chunks);
    }

    fn write_presence(&self) -> RwLockWriteGuard<'_, Presence> {
        self.presence
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn presence_of(allocated: u32) -> u16 {
    if allocated == 0 {
        ABSENT
    } else {
        allocated as u16
    }
}

const ABSENT: u16 = 0;
/// Exists; how many blocks are allocated is known when the table has been read.
pub(super) const UNKNOWN: u16 = u16::MAX;

/// Which chunks of a volume exist, and how many blocks each has: 512 bytes for 256 neighbours.
#[derive(Default)]
pub(super) struct Presence {
    groups: BTreeMap<u32, Box<[u16; 256]>>,
    /// Of all groups: whoever lists volumes must not walk through millions of chunks.
    sums: Sums,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Sums {
    /// Chunks that exist.
    chunks: u64,
    /// Of these, chunks whose blocks are not counted yet.
    unknown: u64,
    /// Blocks of the others.
    blocks: u64,
}

impl Sums {
    fn add(&mut self, value: u16) {
        match value {
            ABSENT => {}
            UNKNOWN => {
                self.chunks += 1;
                self.unknown += 1;
            }
            blocks => {
                self.chunks += 1;
                self.blocks += u64::from(blocks);
            }
        }
    }

    fn remove(&mut self, value: u16) {
        match value {
            ABSENT => {}
            UNKNOWN => {
                self.chunks -= 1;
                self.unknown -= 1;
            }
            blocks => {
                self.chunks -= 1;
                self.blocks -= u64::from(blocks);
            }
        }
    }
}

impl Presence {
    fn get(&self, chunk: ChunkIndex) -> u16 {
        let group = self.groups.get(&(chunk.0 >> 8));
        group.map_or(ABSENT, |group| group[chunk.0 as usize & 255])
    }

    pub(super) fn set(&mut self, chunk: ChunkIndex, value: u16) {
        let key = chunk.0 >> 8;
        if value == ABSENT && !self.groups.contains_key(&key) {
            return;
        }
        let group = self
            .groups
            .entry(key)
            .or_insert_with(|| Box::new([ABSENT; 256]));
        let before = std::mem::replace(&mut group[chunk.0 as usize & 255], value);
        self.sums.remove(before);
        self.sums.add(value);
    }

    /// Whole groups only.
    fn clear(&mut self, chunks: &Range<u64>) {
        for key in chunks.start >> 8..chunks.end >> 8 {
            let removed = self.groups.remove(&(key as u32));
            for value in removed.iter().flat_map(|group| group.iter()) {
                self.sums.remove(*value);
            }
        }
    }

    fn next(&self, from: u32) -> Option<ChunkIndex> {
        for (key, group) in self.groups.range(from >> 8..) {
            let start = if *key == from >> 8 {
                from as usize & 255
            } else {
                0
            };
            if let Some(at) = (start..256).find(|at| group[*at] != ABSENT) {
                return Some(ChunkIndex((key << 8) + at as u32));
            }
        }
        None
    }

    /// Groups of 256 neighbours of which some exist.
    pub(super) fn groups(&self) -> Vec<u32> {
        let some = self
            .groups
            .iter()
            .filter(|(_, group)| group.iter().any(|value| *value != ABSENT));
        some.map(|(key, _)| *key).collect()
    }

    /// How many exist.
    pub(super) fn count(&self) -> u64 {
        self.sums.chunks
    }

    /// Bytes of all allocated blocks; chunks whose tables were not read yet count in full.
    pub(super) fn allocated_bytes(&self, chunk_bytes: u32) -> u64 {
        self.sums.unknown * u64::from(chunk_bytes) + self.sums.blocks * BLOCK_BYTES as u64
    }
}

/// A chunk in memory.
pub(super) struct Chunk {
    pub(super) volume: Arc<VolumeChunks>,
    pub(super) index: ChunkIndex,
    pub(super) state: Mutex<ChunkState>,
    used: AtomicBool,
}

impl Chunk {
    pub(super) fn path(&self) -> String {
        self.volume.path(self.index)
    }

    /// First block of the chunk, in blocks of the volume.
    pub(super) fn first_block(&self) -> u64 {
        u64::from(self.index.0) * u64::from(self.volume.blocks_per_chunk())
    }

    fn key(&self) -> Key {
        (self.volume.id, self.index)
    }
}

/// What is known of a chunk. Whoever changes its file or table holds the lock.
pub(super) struct ChunkState {
    /// The rest is valid.
    pub(super) loaded: bool,
    /// The file exists.
    pub(super) exists: bool,
    /// A file exists that is not part of the chunk any more: it is removed before the next is made,
    /// or at the next checkpoint.
    pub(super) doomed: bool,
    /// Checksum of each block, or 0. Shared with readers and checkpoints, copied when it changes
    /// under them.
    pub(super) table: Arc<Vec<u32>>,
    /// How many blocks are not unwritten.
    pub(super) allocated: u32,
    /// Last slot applied.
    pub(super) last_slot: Slot,
    /// When that was, in milliseconds since the beginning of 1970; 0: nobody knows.
    pub(super) changed_ms: u64,
    /// Generation of the newest table in the file.
    pub(super) generation: u64,
    /// See [`super::table::Stored::suspect`].
    pub(super) suspect: bool,
    /// Waits for the next checkpoint.
    pub(super) dirty: bool,
    /// Was changed since the last checkpoint that is complete.
    pub(super) unsynced: bool,
    /// Raised whenever the file is removed or replaced.
    pub(super) life: u32,
    pub(super) file: Option<Arc<dyn DiskFile>>,
}

type Key = (VolumeId, ChunkIndex);

/// Volume and chunk numbers are small and dense: a multiplication spreads them well enough.
#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }
    fn write_u32(&mut self, value: u32) {
        let mixed = (self.0 ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

type ChunkMap = HashMap<Key, Arc<Chunk>, BuildHasherDefault<KeyHasher>>;

/// The chunks in memory. What must not be let go is held by someone else as well (the list of what
/// the next checkpoint writes, a checkpoint under way, a request).
pub(super) struct Cache {
    shards: Vec<Mutex<ChunkMap>>,
    tables: Mutex<VecDeque<Key>>,
    tables_bytes: AtomicUsize,
    tables_bytes_max: usize,
    /// Every open file has a key here.
    files: Mutex<VecDeque<Key>>,
    files_max: usize,
    /// See [`Cache::take_closed_unsynced`].
    closed_unsynced: AtomicBool,
}

impl Cache {
    pub(super) fn new(tables_bytes_max: usize, files_max: usize) -> Cache {
        Cache {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            tables: Mutex::default(),
            tables_bytes: AtomicUsize::new(0),
            tables_bytes_max,
            files: Mutex::default(),
            files_max: files_max.max(1),
            closed_unsynced: AtomicBool::new(false),
        }
    }

    fn shard(&self, key: Key) -> MutexGuard<'_, ChunkMap> {
        let mut hasher = KeyHasher::default();
        hasher.write_u32(key.0.0);
        hasher.write_u32(key.1.0);
        // The map uses the other bits.
        lock(&self.shards[(hasher.finish() >> 32) as usize % SHARDS])
    }

    /// A chunk that is in memory.
    pub(super) fn find(&self, volume: VolumeId, index: ChunkIndex) -> Option<Arc<Chunk>> {
        let key = (volume, index);
        let chunk = self.shard(key).get(&key).map(Arc::clone)?;
        chunk.used.store(true, Ordering::Relaxed);
        Some(chunk)
    }

    /// A chunk, which is brought into memory (not loaded) if it is not there.
    pub(super) fn chunk(&self, volume: &Arc<VolumeChunks>, index: ChunkIndex) -> Arc<Chunk> {
        let key = (volume.id, index);
        let mut shard = self.shard(key);
        if let Some(chunk) = shard.get(&key) {
            chunk.used.store(true, Ordering::Relaxed);
            return Arc::clone(chunk);
        }
        let chunk = Arc::new(Chunk {
            volume: Arc::clone(volume),
            index,
            state: Mutex::new(ChunkState {
                loaded: false,
                exists: false,
                doomed: false,
                table: Arc::clone(&volume.empty_table),
                allocated: 0,
                last_slot: Slot(0),
                changed_ms: 0,
                generation: 0,
                suspect: false,
                dirty: false,
                unsynced: false,
                life: 0,
                file: None,
            }),
            used: AtomicBool::new(false),
        });
        shard.insert(key, Arc::clone(&chunk));
        drop(shard);
        lock(&self.tables).push_back(key);
        self.tables_bytes
            .fetch_add(weight(&chunk), Ordering::Relaxed);
        self.let_go_of_tables();
        chunk
    }

    fn let_go_of_tables(&self) {
        for _ in 0..ATTEMPTS {
            if self.tables_bytes.load(Ordering::Relaxed) <= self.tables_bytes_max {
                return;
            }
            let Some(key) = lock(&self.tables).pop_front() else {
                return;
            };
            if !self.let_go(key) {
                lock(&self.tables).push_back(key);
            }
        }
    }

    /// Lets a chunk go unless it was used since it was last asked for or someone holds it. Nobody can
    /// get hold of it meanwhile: that takes the shard's lock.
    fn let_go(&self, key: Key) -> bool {
        let mut shard = self.shard(key);
        let Some(chunk) = shard.get(&key) else {
            return true;
        };
        if chunk.used.swap(false, Ordering::Relaxed) || Arc::strong_count(chunk) > 1 {
            return false;
        }
        self.tables_bytes
            .fetch_sub(weight(chunk), Ordering::Relaxed);
        shard.remove(&key);
        true
    }

    /// Notes that the chunk's file was opened; closes others if there are too many. The caller holds
    /// the chunk's lock, so no other chunk's lock is waited for.
    pub(super) fn opened(&self, chunk: &Chunk) {
        lock(&self.files).push_back(chunk.key());
        for _ in 0..ATTEMPTS {
            let key = {
                let mut files = lock(&self.files);
                if files.len() <= self.files_max {
                    return;
                }
                files.pop_front()
            };
            if let Some(key) = key
                && !self.close(key)
            {
                lock(&self.files).push_back(key);
            }
        }
    }

    /// See [`super::ChunkStore::open_files`].
    pub(super) fn open_files(&self, most: usize) -> (usize, usize, Vec<(String, bool)>) {
        let keys: Vec<Key> = {
            let files = lock(&self.files);
            files.iter().copied().collect()
        };
        let keys: BTreeSet<Key> = keys.into_iter().collect();
        let mut open = Vec::new();
        let mut count = 0;
        for key in keys {
            let Some(chunk) = self.shard(key).get(&key).map(Arc::clone) else {
                continue;
            };
            let Ok(state) = chunk.state.try_lock() else {
                // Someone reads or writes it.
                count += 1;
                continue;
            };
            if state.file.is_some() {
                count += 1;
                if open.len() < most {
                    open.push((chunk.path(), state.dirty));
                }
            }
        }
        (count, self.files_max, open)
    }

    fn close(&self, key: Key) -> bool {
        let Some(chunk) = self.shard(key).get(&key).map(Arc::clone) else {
            return true;
        };
        if chunk.used.swap(false, Ordering::Relaxed) {
            return false;
        }
        let Ok(mut state) = chunk.state.try_lock() else {
            return false;
        };
        if state.file.take().is_some() && state.unsynced {
            self.closed_unsynced.store(true, Ordering::Release);
        }
        true
    }

    /// Whether a file was closed since this was asked last that held what is not synced. If the kernel
    /// fails to write that and lets go of the inode, a sync of the file, opened anew, says nothing of it.
    pub(super) fn take_closed_unsynced(&self) -> bool {
        self.closed_unsynced.swap(false, Ordering::AcqRel)
    }

    /// The volume's chunks of the range that are in memory.
    pub(super) fn within(&self, volume: VolumeId, chunks: &Range<u64>) -> Vec<Arc<Chunk>> {
        let is_inside = |key: &Key| key.0 == volume && chunks.contains(&u64::from(key.1.0));
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = lock(shard);
            let inside = shard.iter().filter(|(key, _)| is_inside(key));
            found.extend(inside.map(|(_, chunk)| Arc::clone(chunk)));
        }
        found
    }

    /// Forgets the chunks of a volume.
    pub(super) fn forget_volume(&self, volume: VolumeId) {
        for shard in &self.shards {
            lock(shard).retain(|key, chunk| {
                let stays = key.0 != volume;
                if !stays {
                    self.tables_bytes
                        .fetch_sub(weight(chunk), Ordering::Relaxed);
                }
                stays
            });
        }
    }
}

fn weight(chunk: &Chunk) -> usize {
    4 * chunk.volume.blocks_per_chunk() as usize + CHUNK_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sums_are_those_of_all_groups(
            steps in prop::collection::vec((0_u32..1024, 0_u16..5, any::<bool>()), 0..200)
        ) {
            let mut presence = Presence::default();
            for (chunk, value, is_clear) in steps {
                let group = u64::from(chunk >> 8 << 8);
                match (is_clear && value == 0, value) {
                    (true, _) => presence.clear(&(group..group + 256)),
                    (false, 4) => presence.set(ChunkIndex(chunk), UNKNOWN),
                    (false, value) => presence.set(ChunkIndex(chunk), value),
                }
                let mut sums = Sums::default();
                for value in presence.groups.values().flat_map(|group| group.iter()) {
                    sums.add(*value);
                }
                prop_assert_eq!(presence.sums, sums);
            }
        }
    }
}
