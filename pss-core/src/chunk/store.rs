//! Reads, writes and zeroes blocks; makes and removes volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use bytes::Bytes;

use super::cache::{Cache, Chunk, Presence, UNKNOWN, VolumeChunks, lock};
use super::point::{PointFailure, Points};
use super::trash::{Filter, Trash};
use super::{ChunkError, ChunkParams, ReadError, path};
use crate::disk::Disk;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot, VolumeId};
use crate::volume::device::{Extent, ReadPart};
use crate::volume::map::{ChunkRange, chunk_ranges};

pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;
/// So many chunk files are removed at once when a range is zeroed, of those that do not fill a directory;
/// the rest, a few hundred, when the next checkpoint is made, by its thread.
const REMOVE_AT_ONCE: usize = 64;
/// Longer ranges are zeroed without keeping space for them: that would hold up everything else.
const ALLOCATE_BLOCKS_MAX: u64 = (1 << 30) / BLOCK;
/// Chunks whose tables one question looks at: those of a whole volume may have to be read from disk.
pub(super) const LOOKED_AT_MAX: usize = 1024;

/// The blocks of all volumes. Every method may be called by any thread; changes of one volume are to
/// be made in log order by one of them.
pub struct ChunkStore {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) params: ChunkParams,
    volumes: RwLock<BTreeMap<VolumeId, Arc<VolumeChunks>>>,
    pub(super) cache: Cache,
    pub(super) dirty: Mutex<Dirty>,
    /// A checkpoint is being made.
    pub(super) checkpoint: AtomicBool,
    /// What failed first; the store takes no changes after it.
    failure: OnceLock<String>,
    pub(super) bad_blocks: AtomicU64,
    pub(super) trash: Trash,
    pub(super) points: Points,
    /// See [`ChunkStore::set_clock`].
    pub(super) clock_ms: AtomicU64,
}

/// What the next checkpoint makes durable.
#[derive(Default)]
pub(super) struct Dirty {
    /// Each once.
    pub(super) chunks: Vec<Arc<Chunk>>,
    /// Directories in which names have changed.
    pub(super) directories: BTreeSet<String>,
}

impl ChunkStore {
    /// Opens the store with the volumes of the last checkpoint.
    ///
    /// # Errors
    /// [`ChunkError::Io`].
    pub fn open(
        disk: Arc<dyn Disk>,
        params: ChunkParams,
        volumes: &[Volume],
    ) -> Result<ChunkStore, ChunkError> {
        for directory in [path::DATA, path::TRASH] {
            disk.create_dir_all(directory)
                .map_err(|source| ChunkError::io("create", directory, source))?;
        }
        // What an earlier process wrote and did not sync, names above all, looks the same as what is
        // durable; nobody would sync it later.
        disk.sync_all().map_err(|source| ChunkError::Io {
            path: String::new(),
            action: "sync",
            source,
        })?;
        let trash = Trash::open(&*disk)?;
        let store = ChunkStore {
            cache: Cache::new(params.tables_bytes_max, params.files_max),
            disk,
            params,
            volumes: RwLock::default(),
            dirty: Mutex::default(),
            checkpoint: AtomicBool::new(false),
            failure: OnceLock::new(),
            bad_blocks: AtomicU64::new(0),
            clock_ms: AtomicU64::new(0),
            trash,
            points: Points::default(),
        };
        for volume in volumes {
            let presence = store.scan(volume)?;
            store.register(volume, presence);
        }
        store.throw_away_unknown(volumes)?;
        Ok(store)
    }

    /// Makes the directory of a new volume. Does nothing for a volume that is known.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn create_volume(&self, volume: &Volume) -> Result<(), ChunkError> {
        self.check()?;
        if self.volume(volume.id).is_some() {
            return Ok(());
        }
        let directory = path::volume(&volume.name);
        // What is there is of an earlier life: this entry is being applied again, or a deletion was
        // not made durable before a crash. The entries that follow will write it anew.
        self.throw_away(&directory, volume.id)?;
        self.finish("create", &directory, self.disk.create_dir_all(&directory))?;
        lock(&self.dirty).directories.insert(path::DATA.to_owned());
        self.register(volume, Presence::default());
        Ok(())
    }

    /// Removes a volume; its files are put aside for [`ChunkStore::empty_trash`].
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn delete_volume(&self, volume: &Volume) -> Result<(), ChunkError> {
        self.check()?;
        match self.volume(volume.id) {
            Some(chunks) => self.remove_volume(&chunks),
            None => self.throw_away(&path::volume(&volume.name), volume.id),
        }
    }

    fn remove_volume(&self, volume: &VolumeChunks) -> Result<(), ChunkError> {
        // From here on no checkpoint touches files by their names, which may be used again.
        *volume
            .deleted
            .write()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.fail_points(volume.id, &(0..u64::MAX), PointFailure::Gone);
        self.cache.forget_volume(volume.id);
        let mut dirty = lock(&self.dirty);
        dirty.chunks.retain(|chunk| chunk.volume.id != volume.id);
        drop(dirty);
        self.throw_away(&volume.directory, volume.id)?;
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.remove(&volume.id);
        Ok(())
    }

    /// Removes all volumes but these, and makes those of them that are not known.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn exchange_volumes<'a>(
        &self,
        volumes: impl Iterator<Item = &'a Volume>,
    ) -> Result<(), ChunkError> {
        self.check()?;
        let new: BTreeMap<VolumeId, &Volume> = volumes.map(|it| (it.id, it)).collect();
        let known = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        let old: Vec<Arc<VolumeChunks>> = known.values().map(Arc::clone).collect();
        drop(known);
        for volume in old.iter().filter(|it| !new.contains_key(&it.id)) {
            self.remove_volume(volume)?;
        }
        for volume in new.values() {
            self.create_volume(volume)?;
        }
        Ok(())
    }

    /// Writes whole blocks: `checksums` and `payload` are those of the entry in `slot`.
    ///
    /// # Errors
    /// [`ChunkError::NoSpace`]: some of the blocks may have been written; the same write may be made
    /// again. After [`ChunkError::Io`] the store takes no more writes.
    ///
    /// # Panics
    /// If `payload` is not `checksums.len()` blocks.
    pub fn write(
        &self,
        volume: &Volume,
        first_block: u64,
        checksums: &[u32],
        payload: &Bytes,
        slot: Slot,
    ) -> Result<(), ChunkError> {
        assert_eq!(payload.len(), checksums.len() * BLOCK_BYTES);
        self.check()?;
        let volume = self.known(volume.id)?;
        self.touch_watches(&volume, first_block, checksums.len() as u64);
        let mut done = 0;
        for range in chunk_ranges(first_block, checksums.len() as u64, volume.chunk_bytes) {
            let blocks = range.blocks as usize;
            let data = &payload[done * BLOCK_BYTES..][..blocks * BLOCK_BYTES];
            self.write_chunk(&volume, &range, &checksums[done..][..blocks], data, slot)?;
            done += blocks;
        }
        Ok(())
    }

    /// Makes blocks read as zeros. Chunks that do not exist are not touched, and of those that do
    /// whole directories are put aside for [`ChunkStore::empty_trash`], so that ranges of many TiB are
    /// cheap, unless space shall be allocated. Space is not kept for ranges above 1 GiB.
    ///
    /// # Errors
    /// As [`ChunkStore::write`].
    pub fn zero(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        allocate: bool,
        slot: Slot,
    ) -> Result<(), ChunkError> {
        self.zero_where(volume, first_block, blocks, allocate, slot, None)
    }

    /// Like [`ChunkStore::zero`], but only in chunks that `filter` lets through, if there is one.
    ///
    /// # Errors
    /// As [`ChunkStore::write`].
    pub fn zero_where(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        allocate: bool,
        slot: Slot,
        filter: Filter<'_>,
    ) -> Result<(), ChunkError> {
        self.check()?;
        let volume = self.known(volume.id)?;
        self.touch_watches(&volume, first_block, blocks);
        let takes_part = |chunk| filter.is_none_or(|filter| filter(chunk));
        if allocate && blocks <= ALLOCATE_BLOCKS_MAX {
            for range in chunk_ranges(first_block, blocks, volume.chunk_bytes) {
                if takes_part(range.chunk) {
                    self.allocate_chunk(&volume, &range, slot)?;
                }
            }
            return Ok(());
        }
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let end = first_block.saturating_add(blocks);
        let whole = first_block.div_ceil(per_chunk)..end / per_chunk;
        self.put_aside(&volume, whole, filter)?;
        let mut removed = 0;
        let mut next = first_block / per_chunk;
        while let Some(chunk) = volume.next_present(next) {
            let start = u64::from(chunk.0) * per_chunk;
            if start >= end {
                break;
            }
            next = u64::from(chunk.0) + 1;
            if !takes_part(chunk) {
                continue;
            }
            let first = first_block.max(start) - start;
            let range = ChunkRange {
                chunk,
                first: first as u32,
                blocks: (end.min(start + per_chunk) - start - first) as u32,
            };
            if u64::from(range.blocks) == per_chunk {
                self.drop_chunk(&volume, chunk, removed < REMOVE_AT_ONCE)?;
                removed += 1;
            } else {
                self.punch_chunk(&volume, &range, slot)?;
            }
        }
        Ok(())
    }

    fn touch_watches(&self, volume: &VolumeChunks, first_block: u64, blocks: u64) {
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let end = first_block.saturating_add(blocks).div_ceil(per_chunk);
        self.points
            .touch(volume.id, &(first_block / per_chunk..end));
    }

    /// Reads blocks; every block is verified. A block that is being written is read as it was before
    /// or as it is after, whole.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::WouldBlock`] only if `nowait`.
    pub fn read(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        nowait: bool,
    ) -> Result<Vec<ReadPart>, ReadError> {
        let volume = self
            .volume(volume.id)
            .ok_or(ReadError::NoSuchVolume(volume.id))?;
        let mut parts = Vec::new();
        for range in chunk_ranges(first_block, blocks, volume.chunk_bytes) {
            let read = self.read_chunk(&volume, &range, nowait, &mut parts);
            if volume.is_deleted() {
                // Whatever was found, zeros of files that are gone perhaps.
                return Err(ReadError::NoSuchVolume(volume.id));
            }
            read?;
        }
        Ok(parts)
    }

    /// Which blocks are allocated: at most `extents_max` extents of at most [`LOOKED_AT_MAX`] chunks that exist, which cover
    /// the range from its start; neighbours differ.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::WouldBlock`] only if `nowait`.
    pub fn extents(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        extents_max: usize,
        nowait: bool,
    ) -> Result<Vec<Extent>, ReadError> {
        let volume = self
            .volume(volume.id)
            .ok_or(ReadError::NoSuchVolume(volume.id))?;
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let end = first_block.saturating_add(blocks);
        let mut extents = Extents::new(extents_max);
        let mut next = first_block;
        let mut looked_at = 0;
        while next < end && !extents.is_full() && looked_at < LOOKED_AT_MAX {
            let present = volume.next_present(next / per_chunk);
            let start = present.map_or(end, |chunk| u64::from(chunk.0) * per_chunk);
            if start > next {
                let until = start.min(end);
                extents.add(until - next, false);
                next = until;
                continue;
            }
            let chunk = self
                .cache
                .chunk(&volume, ChunkIndex((next / per_chunk) as u32));
            let snapshot = self.table(&chunk, nowait);
            if volume.is_deleted() {
                // Whatever was found, tables of files that are gone perhaps.
                return Err(ReadError::NoSuchVolume(volume.id));
            }
            let snapshot = snapshot?;
            looked_at += 1;
            let until = (start + per_chunk).min(end);
            for checksum in &snapshot.table[(next - start) as usize..(until - start) as usize] {
                extents.add(1, *checksum != 0);
            }
            next = until;
        }
        Ok(extents.list)
    }

    /// Bytes of the volume's allocated blocks. Chunks that were not used since the start count in
    /// full.
    pub fn allocated_bytes(&self, volume: VolumeId) -> u64 {
        self.volume(volume).map_or(0, |volume| {
            let presence = volume
                .presence
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            presence.allocated_bytes(volume.chunk_bytes)
        })
    }

    /// In which directories of 256 chunks some exist: the numbers of their first chunks, divided by 256.
    pub fn directories(&self, volume: VolumeId) -> Vec<u32> {
        self.volume(volume).map_or_else(Vec::new, |volume| {
            let presence = volume
                .presence
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            presence.groups()
        })
    }

    /// How many chunks of the volume exist.
    pub fn chunk_count(&self, volume: VolumeId) -> u64 {
        self.volume(volume).map_or(0, |volume| {
            let presence = volume
                .presence
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            presence.count()
        })
    }

    /// Says when what is written from now on was written: milliseconds since the beginning of 1970. Called by
    /// whoever applies entries, with what the log says, so that chunks have the same times on every server.
    pub fn set_clock(&self, unix_ms: u64) {
        self.clock_ms.store(unix_ms, Ordering::Relaxed);
    }

    /// Open chunk files: how many, how many there may be, and `most` of them with their paths and whether they have
    /// changes for the next checkpoint. Those that are being worked on may be left out.
    pub fn open_files(&self, most: usize) -> (usize, usize, Vec<(String, bool)>) {
        self.cache.open_files(most)
    }

    /// How often damaged blocks were met since the start.
    pub fn bad_blocks(&self) -> u64 {
        self.bad_blocks.load(Ordering::Relaxed)
    }

    /// How many chunks the next checkpoint would write.
    pub fn dirty_count(&self) -> usize {
        lock(&self.dirty).chunks.len()
    }

    pub(super) fn volume(&self, id: VolumeId) -> Option<Arc<VolumeChunks>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.get(&id).map(Arc::clone)
    }

    pub(super) fn known(&self, id: VolumeId) -> Result<Arc<VolumeChunks>, ChunkError> {
        self.volume(id).ok_or(ChunkError::NoSuchVolume(id))
    }

    fn register(&self, volume: &Volume, presence: Presence) {
        let blocks = volume.chunk_bytes as usize / BLOCK_BYTES;
        let chunks = VolumeChunks {
            group: self.params.group,
            id: volume.id,
            uuid: volume.uuid,
            chunk_bytes: volume.chunk_bytes,
            directory: path::volume(&volume.name),
            presence: RwLock::new(presence),
            names: RwLock::new(()),
            deleted: RwLock::new(false),
            empty_table: Arc::new(vec![0; blocks]),
        };
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.insert(volume.id, Arc::new(chunks));
    }

    /// Finds the chunk files of a volume, by name.
    fn scan(&self, volume: &Volume) -> Result<Presence, ChunkError> {
        let top = path::volume(&volume.name);
        let read = |directory: &str| {
            self.disk
                .read_dir(directory)
                .map_err(|source| ChunkError::io("read", directory, source))
        };
        let mut presence = Presence::default();
        for high in read(&top)? {
            let Some(high_byte) = path::parse(&high.name) else {
                continue;
            };
            for middle in read(&format!("{top}/{}", high.name))? {
                let Some(middle_byte) = path::parse(&middle.name) else {
                    continue;
                };
                let leaf = format!("{top}/{}/{}", high.name, middle.name);
                for file in read(&leaf)? {
                    if let Some(low_byte) = path::parse(&file.name) {
                        let number = u32::from_be_bytes([0, high_byte, middle_byte, low_byte]);
                        presence.set(ChunkIndex(number), UNKNOWN);
                    } else if file.name.ends_with(path::INCOMPLETE) {
                        let path = format!("{leaf}/{}", file.name);
                        self.finish("remove", &path, self.disk.remove_file(&path))?;
                    }
                }
            }
        }
        Ok(presence)
    }

    /// Refuses if a write or sync has failed before.
    pub(super) fn check(&self) -> Result<(), ChunkError> {
        match self.failure.get() {
            None => Ok(()),
            Some(first) => Err(ChunkError::Poisoned {
                first: first.clone(),
            }),
        }
    }

    /// Makes an error of a change; all but a full disk are final.
    pub(super) fn failed(&self, action: &'static str, path: &str, error: io::Error) -> ChunkError {
        self.remember(ChunkError::io(action, path, error))
    }

    /// For syncs, whose errors are all final: what a full disk did not take is lost.
    pub(super) fn synced(&self, path: &str, result: io::Result<()>) -> Result<(), ChunkError> {
        result.map_err(|source| {
            self.remember(ChunkError::Io {
                path: path.to_owned(),
                action: "sync",
                source,
            })
        })
    }

    /// Keeps the first failure for those that come after it.
    fn remember(&self, error: ChunkError) -> ChunkError {
        if let ChunkError::Io { source, .. } = &error {
            let _ = self.failure.set(format!("{error}: {source}"));
        }
        error
    }

    pub(super) fn finish(
        &self,
        action: &'static str,
        path: &str,
        result: io::Result<()>,
    ) -> Result<(), ChunkError> {
        result.map_err(|error| self.failed(action, path, error))
    }
}

/// Extents as they are put together from runs.
struct Extents {
    list: Vec<Extent>,
    most: usize,
    full: bool,
}

impl Extents {
    fn new(most: usize) -> Extents {
        Extents {
            list: Vec::new(),
            most,
            full: most == 0,
        }
    }

    fn is_full(&self) -> bool {
        self.full
    }

    fn add(&mut self, blocks: u64, allocated: bool) {
        let length_bytes = blocks * BLOCK;
        let count = self.list.len();
        match self.list.last_mut() {
            _ if self.full => {}
            Some(last) if last.allocated == allocated => last.length_bytes += length_bytes,
            _ if count == self.most => self.full = true,
            _ => self.list.push(Extent {
                length_bytes,
                allocated,
            }),
        }
    }
}
