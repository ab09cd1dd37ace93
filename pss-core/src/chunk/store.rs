//! Reads, writes and zeroes blocks; makes and removes volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;

use super::cache::{Cache, Chunk, ChunkState, Presence, UNKNOWN, VolumeChunks, lock};
use super::table::{self, Found};
use super::{ChunkError, ChunkParams, ReadError, path};
use crate::disk::{Disk, DiskFile, OpenMode};
use crate::entry::block_checksum;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot, VolumeId};
use crate::volume::device::{Extent, ReadPart};
use crate::volume::map::{ChunkRange, chunk_ranges};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// So many chunk files are removed at once when a range is zeroed; the rest when the next checkpoint
/// is made, by its thread.
const REMOVE_AT_ONCE: usize = 64;
/// Longer ranges are zeroed without keeping space for them: that would hold up everything else.
const ALLOCATE_BLOCKS_MAX: u64 = (1 << 30) / BLOCK;
/// Read at once when a whole chunk is looked through.
const PIECE_BLOCKS: usize = 256;

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
    poisoned: AtomicBool,
    bad_blocks: AtomicU64,
    next_trash: AtomicU64,
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
        let trash = disk
            .read_dir(path::TRASH)
            .map_err(|source| ChunkError::io("read", path::TRASH, source))?;
        let number = |name: &str| name.rsplit('.').next()?.parse::<u64>().ok();
        let last = trash.iter().filter_map(|entry| number(&entry.name)).max();
        let store = ChunkStore {
            cache: Cache::new(params.tables_bytes_max, params.files_max),
            disk,
            params,
            volumes: RwLock::default(),
            dirty: Mutex::default(),
            checkpoint: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            bad_blocks: AtomicU64::new(0),
            next_trash: AtomicU64::new(last.unwrap_or(0).saturating_add(1)),
        };
        for volume in volumes {
            let presence = store.scan(volume)?;
            store.register(volume, presence);
        }
        store.throw_away_unknown(volumes)?;
        Ok(store)
    }

    /// Puts directories aside that belong to no volume of the checkpoint: of volumes that were made
    /// since, which entries to come make and write anew, or left over from copying another server's
    /// chunks.
    fn throw_away_unknown(&self, volumes: &[Volume]) -> Result<(), ChunkError> {
        let known: BTreeSet<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        let entries = self
            .disk
            .read_dir(path::DATA)
            .map_err(|source| ChunkError::io("read", path::DATA, source))?;
        for entry in entries {
            if entry.is_dir && !entry.name.starts_with('.') && !known.contains(&*entry.name) {
                self.throw_away(&path::volume(&entry.name), "unknown")?;
            }
        }
        Ok(())
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
        let known = self.volume(volume.id);
        if let Some(chunks) = known {
            // From here on no checkpoint touches files by their names, which may be used again.
            *chunks
                .deleted
                .write()
                .unwrap_or_else(PoisonError::into_inner) = true;
            self.cache.forget_volume(volume.id);
            let mut dirty = lock(&self.dirty);
            dirty.chunks.retain(|chunk| chunk.volume.id != volume.id);
            drop(dirty);
        }
        self.throw_away(&path::volume(&volume.name), volume.id)?;
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.remove(&volume.id);
        Ok(())
    }

    /// Removes the files of deleted volumes. Takes long; for a thread of little importance.
    ///
    /// # Errors
    /// [`ChunkError::Io`]; it does no harm.
    pub fn empty_trash(&self) -> Result<(), ChunkError> {
        let entries = self
            .disk
            .read_dir(path::TRASH)
            .map_err(|source| ChunkError::io("read", path::TRASH, source))?;
        for entry in entries {
            let path = format!("{}/{}", path::TRASH, entry.name);
            let removed = match entry.is_dir {
                true => self.disk.remove_dir_all(&path),
                false => self.disk.remove_file(&path),
            };
            removed.map_err(|source| ChunkError::io("remove", &path, source))?;
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
        let mut done = 0;
        for range in chunk_ranges(first_block, checksums.len() as u64, volume.chunk_bytes) {
            let blocks = range.blocks as usize;
            let data = &payload[done * BLOCK_BYTES..][..blocks * BLOCK_BYTES];
            self.write_chunk(&volume, &range, &checksums[done..][..blocks], data, slot)?;
            done += blocks;
        }
        Ok(())
    }

    /// Makes blocks read as zeros. Chunks that do not exist are not touched, so that ranges of many
    /// TiB are cheap, unless space shall be allocated. Space is not kept for ranges above 1 GiB.
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
        self.zero_where(volume, first_block, blocks, allocate, slot, &|_| true)
    }

    /// Like [`ChunkStore::zero`], but only in chunks that `filter` lets through.
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
        filter: &dyn Fn(ChunkIndex) -> bool,
    ) -> Result<(), ChunkError> {
        self.check()?;
        let volume = self.known(volume.id)?;
        if allocate && blocks <= ALLOCATE_BLOCKS_MAX {
            for range in chunk_ranges(first_block, blocks, volume.chunk_bytes) {
                if filter(range.chunk) {
                    self.allocate_chunk(&volume, &range, slot)?;
                }
            }
            return Ok(());
        }
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let end = first_block.saturating_add(blocks);
        let mut removed = 0;
        let mut next = first_block / per_chunk;
        while let Some(chunk) = volume.next_present(next) {
            let start = u64::from(chunk.0) * per_chunk;
            if start >= end {
                break;
            }
            next = u64::from(chunk.0) + 1;
            if !filter(chunk) {
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
            self.read_chunk(&volume, &range, nowait, &mut parts)?;
        }
        Ok(parts)
    }

    /// Which blocks are allocated: at most `extents_max` extents, which cover the range from its
    /// start; neighbours differ.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn extents(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        let volume = self
            .volume(volume.id)
            .ok_or(ReadError::NoSuchVolume(volume.id))?;
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let end = first_block.saturating_add(blocks);
        let mut extents = Extents::new(extents_max);
        let mut next = first_block;
        while next < end && !extents.is_full() {
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
            let snapshot = self.snapshot(&chunk, false)?;
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

    /// How many damaged blocks were met since the start.
    pub fn bad_blocks(&self) -> u64 {
        self.bad_blocks.load(Ordering::Relaxed)
    }

    /// How many chunks the next checkpoint would write.
    pub fn dirty_count(&self) -> usize {
        lock(&self.dirty).chunks.len()
    }

    /// Writes blocks again that were found damaged, if `payload` is what they should hold. Says
    /// whether it is; if not, the whole chunk is to be imported from another server.
    ///
    /// # Errors
    /// As [`ChunkStore::write`].
    pub fn repair(
        &self,
        volume: &Volume,
        first_block: u64,
        payload: &Bytes,
    ) -> Result<bool, ChunkError> {
        self.check()?;
        let volume = self.known(volume.id)?;
        let blocks = (payload.len() / BLOCK_BYTES) as u64;
        let mut rest = &payload[..];
        for range in chunk_ranges(first_block, blocks, volume.chunk_bytes) {
            let (data, behind) = rest.split_at(range.blocks as usize * BLOCK_BYTES);
            rest = behind;
            let chunk = self.cache.chunk(&volume, range.chunk);
            let mut state = self.loaded(&chunk)?;
            let start = chunk.first_block() + u64::from(range.first);
            let expected = &state.table[range.first as usize..][..range.blocks as usize];
            let fits = data
                .chunks_exact(BLOCK_BYTES)
                .zip(start..)
                .zip(expected)
                .all(|((data, block), checksum)| {
                    block_checksum(volume.id, block, data) == *checksum
                });
            if !fits {
                return Ok(false);
            }
            let file = self.file_for_write(&chunk, &mut state)?;
            let written = file.write_at(&[IoSlice::new(data)], u64::from(range.first) * BLOCK);
            self.finish("write", &chunk.path(), written)?;
            self.mark_dirty(&chunk, &mut state);
        }
        Ok(true)
    }

    // ---- volumes ----

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

    /// Puts a directory aside, if it exists.
    fn throw_away(
        &self,
        directory: &str,
        volume: impl std::fmt::Display,
    ) -> Result<(), ChunkError> {
        let number = self.next_trash.fetch_add(1, Ordering::Relaxed);
        let to = format!("{}/{volume}.{number}", path::TRASH);
        match self.disk.rename(directory, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => {
                self.finish("rename", directory, result)?;
                let mut dirty = lock(&self.dirty);
                dirty.directories.insert(path::DATA.to_owned());
                dirty.directories.insert(path::TRASH.to_owned());
                Ok(())
            }
        }
    }

    // ---- one chunk ----

    fn write_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        checksums: &[u32],
        data: &[u8],
        slot: Slot,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, range.chunk);
        let mut state = self.loaded(&chunk)?;
        let file = self.file_for_write(&chunk, &mut state)?;
        let written = file.write_at(&[IoSlice::new(data)], u64::from(range.first) * BLOCK);
        if let Err(error) = written {
            let error = self.failed("write", &chunk.path(), error);
            if matches!(error, ChunkError::NoSpace) {
                self.settle(&chunk, &mut state, &*file, range, checksums)?;
            }
            return Err(error);
        }
        self.set_checksums(&chunk, &mut state, range.first, checksums);
        self.touch(&chunk, &mut state, slot);
        Ok(())
    }

    /// After a write that ran out of space: notes the blocks that it did write, so that they do not
    /// pass for damaged ones.
    fn settle(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        file: &dyn DiskFile,
        range: &ChunkRange,
        checksums: &[u32],
    ) -> Result<(), ChunkError> {
        for (block, checksum) in (range.first..).zip(checksums) {
            let mut data = [0; BLOCK_BYTES];
            let read = file.read_at(&mut data, u64::from(block) * BLOCK);
            let place = chunk.first_block() + u64::from(block);
            let is_new = block_checksum(chunk.volume.id, place, &data) == *checksum;
            if matches!(read, Ok(BLOCK_BYTES)) && is_new {
                self.set_checksums(chunk, state, block, &[*checksum]);
            }
        }
        self.mark_dirty(chunk, state);
        self.drop_if_empty(chunk, state)
    }

    /// A chunk without blocks does not exist.
    fn drop_if_empty(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) -> Result<(), ChunkError> {
        // With a suspect table nobody knows whether other blocks are in use.
        if state.allocated == 0 && !state.suspect {
            self.drop_state(chunk, state, true)?;
        }
        Ok(())
    }

    fn allocate_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        slot: Slot,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, range.chunk);
        let mut state = self.loaded(&chunk)?;
        let file = self.file_for_write(&chunk, &mut state)?;
        let (offset, bytes) = (
            u64::from(range.first) * BLOCK,
            u64::from(range.blocks) * BLOCK,
        );
        if let Err(error) = file.zero_range(offset, bytes) {
            let error = self.failed("zero", &chunk.path(), error);
            if matches!(error, ChunkError::NoSpace) {
                self.drop_if_empty(&chunk, &mut state)?;
            }
            return Err(error);
        }
        let first = chunk.first_block() + u64::from(range.first);
        let checksums: Vec<u32> = (first..first + u64::from(range.blocks))
            .map(|block| block_checksum(volume.id, block, &[0; BLOCK_BYTES]))
            .collect();
        self.set_checksums(&chunk, &mut state, range.first, &checksums);
        self.touch(&chunk, &mut state, slot);
        Ok(())
    }

    fn punch_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        slot: Slot,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, range.chunk);
        let mut state = self.loaded(&chunk)?;
        if !state.exists {
            return Ok(());
        }
        let file = self.file_for_write(&chunk, &mut state)?;
        let (offset, bytes) = (
            u64::from(range.first) * BLOCK,
            u64::from(range.blocks) * BLOCK,
        );
        self.finish("punch", &chunk.path(), file.punch_hole(offset, bytes))?;
        self.set_checksums(
            &chunk,
            &mut state,
            range.first,
            &vec![0; range.blocks as usize],
        );
        self.touch(&chunk, &mut state, slot);
        self.drop_if_empty(&chunk, &mut state)
    }

    pub(super) fn drop_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        index: ChunkIndex,
        at_once: bool,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, index);
        let mut state = lock(&chunk.state);
        // What its table says does not matter any more.
        if !state.loaded {
            state.loaded = true;
            state.exists = true;
        }
        self.drop_state(&chunk, &mut state, at_once)
    }

    /// Makes a chunk one that does not exist.
    fn drop_state(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        at_once: bool,
    ) -> Result<(), ChunkError> {
        self.forget(chunk, state);
        if at_once {
            self.remove_doomed(chunk, state)?;
        } else {
            self.mark_dirty(chunk, state);
        }
        Ok(())
    }

    /// The same without touching the file, which is doomed.
    fn forget(&self, chunk: &Chunk, state: &mut ChunkState) {
        state.doomed |= state.exists;
        state.exists = false;
        state.file = None;
        state.life = state.life.wrapping_add(1);
        state.table = Arc::clone(&chunk.volume.empty_table);
        state.allocated = 0;
        state.generation = 0;
        state.last_slot = Slot(0);
        state.suspect = false;
        chunk.volume.set_allocated(chunk.index, 0);
    }

    /// Removes the file of a chunk that does not exist any more.
    pub(super) fn remove_doomed(
        &self,
        chunk: &Chunk,
        state: &mut ChunkState,
    ) -> Result<(), ChunkError> {
        if !state.doomed {
            return Ok(());
        }
        let path = chunk.path();
        match self.disk.remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => self.finish("remove", &path, result)?,
        }
        state.doomed = false;
        let leaf = path::leaf(&chunk.volume.directory, chunk.index);
        lock(&self.dirty).directories.insert(leaf);
        Ok(())
    }

    fn read_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        nowait: bool,
        parts: &mut Vec<ReadPart>,
    ) -> Result<(), ReadError> {
        let chunk = match self.cache.find(volume.id, range.chunk) {
            Some(chunk) => chunk,
            None if !volume.is_present(range.chunk) => {
                add_hole(parts, range.blocks);
                return Ok(());
            }
            None => self.cache.chunk(volume, range.chunk),
        };
        let snapshot = self.snapshot(&chunk, nowait)?;
        let end = (range.first + range.blocks) as usize;
        let mut next = range.first as usize;
        while next < end {
            let is_hole = snapshot.table[next] == 0;
            let run = snapshot.table[next..end]
                .iter()
                .take_while(|checksum| (**checksum == 0) == is_hole)
                .count();
            if is_hole {
                add_hole(parts, run as u32);
            } else {
                let data = self.read_run(&chunk, &snapshot, next, run, nowait)?;
                parts.push(ReadPart::Data(data.into()));
            }
            next += run;
        }
        Ok(())
    }

    /// Reads consecutive blocks that are allocated.
    fn read_run(
        &self,
        chunk: &Chunk,
        snapshot: &Snapshot,
        first: usize,
        blocks: usize,
        nowait: bool,
    ) -> Result<Vec<u8>, ReadError> {
        let mut data = vec![0; blocks * BLOCK_BYTES];
        if nowait {
            let file = snapshot.file.as_deref().ok_or(ReadError::WouldBlock)?;
            // Whatever is wrong is found out by a read that may wait.
            file.read_at_nowait(&mut data, first as u64 * BLOCK)
                .map_err(|_| ReadError::WouldBlock)?;
            return match snapshot.verify(chunk, first, &data) {
                Ok(()) => Ok(data),
                Err(_) => Err(ReadError::WouldBlock),
            };
        }
        if snapshot.read(chunk, first, &mut data).is_err() {
            for (at, data) in (first..).zip(data.chunks_exact_mut(BLOCK_BYTES)) {
                if snapshot.verify(chunk, at, data).is_err() {
                    self.read_again(chunk, at, data)?;
                }
            }
        }
        Ok(data)
    }

    /// Reads a block that did not match: it may just have been written. Under the chunk's lock it is
    /// known what it should be.
    pub(super) fn read_again(
        &self,
        chunk: &Chunk,
        at: usize,
        data: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut state = lock(&chunk.state);
        let block = chunk.first_block() + at as u64;
        let checksum = state.table[at];
        if checksum == 0 {
            data.fill(0);
            return Ok(());
        }
        self.open_file(chunk, &mut state)?;
        data.fill(0);
        let read = match &state.file {
            Some(file) => file.read_at(data, at as u64 * BLOCK),
            None => Ok(0),
        };
        match read {
            Ok(_) if block_checksum(chunk.volume.id, block, data) == checksum => Ok(()),
            read => {
                self.bad_blocks.fetch_add(1, Ordering::Relaxed);
                let volume = chunk.volume.id;
                tracing::warn!(%volume, block, error = ?read.err(), "damaged block");
                Err(ReadError::BadBlock { volume, block })
            }
        }
    }

    /// The chunk as it is now.
    pub(super) fn snapshot(&self, chunk: &Arc<Chunk>, nowait: bool) -> Result<Snapshot, ReadError> {
        let mut state = lock(&chunk.state);
        if nowait && (!state.loaded || state.suspect) {
            return Err(ReadError::WouldBlock);
        }
        self.load(chunk, &mut state)?;
        if state.suspect {
            self.resolve(chunk, &mut state)?;
        }
        self.open_file(chunk, &mut state)?;
        Ok(Snapshot::of(&state))
    }

    fn loaded<'a>(&self, chunk: &'a Chunk) -> Result<MutexGuard<'a, ChunkState>, ChunkError> {
        let mut state = lock(&chunk.state);
        self.load(chunk, &mut state)?;
        Ok(state)
    }

    /// Reads the chunk's table.
    fn load(&self, chunk: &Chunk, state: &mut ChunkState) -> Result<(), ReadError> {
        if state.loaded {
            return Ok(());
        }
        if !chunk.volume.is_present(chunk.index) {
            state.loaded = true;
            return Ok(());
        }
        let path = chunk.path();
        let file = match self.disk.open(&path, OpenMode::Existing) {
            // It was there when the store was opened: what it held is lost, not zero.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let blocks = chunk.volume.blocks_per_chunk();
                state.table = Arc::new(vec![table::DAMAGED; blocks as usize]);
                state.allocated = blocks;
                state.doomed = true;
                state.loaded = true;
                return Ok(());
            }
            file => file.map_err(|source| ReadError::io("open", &path, source))?,
        };
        let owner = chunk.volume.owner(chunk.index);
        let mut bytes = vec![0; 2 * owner.slot_bytes()];
        let read = file.read_at(&mut bytes, u64::from(chunk.volume.chunk_bytes));
        let read = read.map_err(|source| ReadError::io("read table", &path, source))?;
        match table::choose(&owner, &bytes[..read]) {
            Found::Foreign => {
                state.doomed = true;
                chunk.volume.set_allocated(chunk.index, 0);
            }
            Found::Table(stored) => {
                state.exists = true;
                state.allocated = allocated(&stored.checksums);
                state.table = Arc::new(stored.checksums);
                state.generation = stored.generation;
                state.last_slot = stored.last_slot;
                state.suspect = stored.suspect;
                self.note_presence(chunk, state);
                state.file = Some(file);
                self.cache.opened(chunk);
            }
        }
        state.loaded = true;
        Ok(())
    }

    fn note_presence(&self, chunk: &Chunk, state: &ChunkState) {
        // A file without blocks exists only while its table is suspect.
        let at_least = u32::from(state.exists);
        let allocated = state.allocated.max(at_least);
        chunk.volume.set_allocated(chunk.index, allocated);
    }

    /// Looks through a chunk whose table may be out of date: a block that is unwritten by the table
    /// but holds something is not given out as zeros.
    fn resolve(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) -> Result<(), ReadError> {
        self.open_file(chunk, state)?;
        let Some(file) = state.file.clone() else {
            return Ok(());
        };
        let path = chunk.path();
        let mut table = state.table.to_vec();
        let mut data = vec![0; PIECE_BLOCKS.min(table.len()) * BLOCK_BYTES];
        for (piece, checksums) in table.chunks_mut(PIECE_BLOCKS).enumerate() {
            let first = (piece * PIECE_BLOCKS) as u64;
            let data = &mut data[..checksums.len() * BLOCK_BYTES];
            data.fill(0);
            file.read_at(data, first * BLOCK)
                .map_err(|source| ReadError::io("read", &path, source))?;
            let blocks = data
                .chunks_exact(BLOCK_BYTES)
                .zip(chunk.first_block() + first..);
            for (checksum, (data, block)) in checksums.iter_mut().zip(blocks) {
                if *checksum == 0 && data.iter().any(|byte| *byte != 0) {
                    let actual = block_checksum(chunk.volume.id, block, data);
                    *checksum = (!actual).max(1);
                    // The complement of a checksum is another, and so is 1 for the only other case.
                    assert_ne!(*checksum, actual, "a damaged block must not verify");
                }
            }
        }
        state.allocated = allocated(&table);
        state.table = Arc::new(table);
        state.suspect = false;
        if state.allocated == 0 {
            self.forget(chunk, state);
        }
        self.note_presence(chunk, state);
        self.mark_dirty(chunk, state);
        Ok(())
    }

    /// Opens the chunk's file if it exists.
    pub(super) fn open_file(&self, chunk: &Chunk, state: &mut ChunkState) -> Result<(), ReadError> {
        if state.file.is_some() || !state.exists {
            return Ok(());
        }
        let path = chunk.path();
        let file = self.disk.open(&path, OpenMode::Existing);
        state.file = Some(file.map_err(|source| ReadError::io("open", &path, source))?);
        self.cache.opened(chunk);
        Ok(())
    }

    /// The chunk's file, which is made if it does not exist.
    fn file_for_write(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
    ) -> Result<Arc<dyn DiskFile>, ChunkError> {
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        if state.exists {
            self.open_file(chunk, state)?;
        } else {
            self.remove_doomed(chunk, state)?;
            let file = self.create_file(&chunk.volume, &chunk.path(), chunk.index)?;
            state.exists = true;
            state.file = Some(file);
            self.mark_dirty(chunk, state);
            self.cache.opened(chunk);
        }
        Ok(Arc::clone(
            state.file.as_ref().expect("the file was opened"),
        ))
    }

    /// Makes an empty chunk file, with space for its tables: a checkpoint must not fail for lack of
    /// space, for it is what gives log space back.
    pub(super) fn create_file(
        &self,
        volume: &VolumeChunks,
        path: &str,
        index: ChunkIndex,
    ) -> Result<Arc<dyn DiskFile>, ChunkError> {
        let leaf = path::leaf(&volume.directory, index);
        let file = match self.disk.open(path, OpenMode::Create) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.finish("create", &leaf, self.disk.create_dir_all(&leaf))?;
                let mut directory = leaf.as_str();
                let mut dirty = lock(&self.dirty);
                while let Some((parent, _)) = directory.rsplit_once('/') {
                    dirty.directories.insert(parent.to_owned());
                    directory = parent;
                }
                drop(dirty);
                self.disk.open(path, OpenMode::Create)
            }
            file => file,
        };
        let file = file.map_err(|error| self.failed("create", path, error))?;
        lock(&self.dirty).directories.insert(leaf);
        let trailer = 2 * volume.owner(index).slot_bytes() as u64;
        let reserved = file
            .set_len(0)
            .and_then(|()| file.zero_range(u64::from(volume.chunk_bytes), trailer));
        if let Err(error) = reserved {
            // Half a chunk must not stay: without blocks it does not exist.
            let removed = self.disk.remove_file(path);
            removed.map_err(|error| self.failed("remove", path, error))?;
            return Err(self.failed("allocate", path, error));
        }
        Ok(file)
    }

    fn set_checksums(&self, chunk: &Chunk, state: &mut ChunkState, first: u32, checksums: &[u32]) {
        let table = Arc::make_mut(&mut state.table);
        let entries = &mut table[first as usize..][..checksums.len()];
        let before = state.allocated;
        state.allocated = before + allocated(checksums) - allocated(entries);
        entries.copy_from_slice(checksums);
        if state.allocated != before {
            self.note_presence(chunk, state);
        }
    }

    fn touch(&self, chunk: &Arc<Chunk>, state: &mut ChunkState, slot: Slot) {
        state.last_slot = state.last_slot.max(slot);
        self.mark_dirty(chunk, state);
    }

    pub(super) fn mark_dirty(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) {
        if !state.dirty {
            state.dirty = true;
            lock(&self.dirty).chunks.push(Arc::clone(chunk));
        }
    }

    // ---- failure ----

    /// Refuses if a write or sync has failed before.
    pub(super) fn check(&self) -> Result<(), ChunkError> {
        match self.poisoned.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(ChunkError::Poisoned),
        }
    }

    /// Makes an error of a change; all but a full disk are final.
    pub(super) fn failed(&self, action: &'static str, path: &str, error: io::Error) -> ChunkError {
        let error = ChunkError::io(action, path, error);
        if !matches!(error, ChunkError::NoSpace) {
            self.poisoned.store(true, Ordering::Release);
        }
        error
    }

    /// For syncs, whose errors are all final: what a full disk did not take is lost.
    pub(super) fn synced(&self, path: &str, result: io::Result<()>) -> Result<(), ChunkError> {
        result.map_err(|source| {
            self.poisoned.store(true, Ordering::Release);
            ChunkError::Io {
                path: path.to_owned(),
                action: "sync",
                source,
            }
        })
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

/// A chunk as it was at one moment.
pub(super) struct Snapshot {
    pub(super) table: Arc<Vec<u32>>,
    pub(super) file: Option<Arc<dyn DiskFile>>,
    pub(super) last_slot: Slot,
    pub(super) allocated: u32,
}

/// A block is not what the snapshot says, or could not be read.
pub(super) struct Differs;

impl Snapshot {
    pub(super) fn of(state: &ChunkState) -> Snapshot {
        Snapshot {
            table: Arc::clone(&state.table),
            file: state.file.clone(),
            last_slot: state.last_slot,
            allocated: state.allocated,
        }
    }

    /// Reads consecutive allocated blocks, which are verified.
    pub(super) fn read(&self, chunk: &Chunk, first: usize, data: &mut [u8]) -> Result<(), Differs> {
        let file = self.file.as_deref().ok_or(Differs)?;
        file.read_at(data, first as u64 * BLOCK)
            .map_err(|_| Differs)?;
        self.verify(chunk, first, data)
    }

    fn verify(&self, chunk: &Chunk, first: usize, data: &[u8]) -> Result<(), Differs> {
        let blocks = data
            .chunks_exact(BLOCK_BYTES)
            .zip(chunk.first_block() + first as u64..);
        let fits = blocks
            .zip(&self.table[first..])
            .all(|((data, block), checksum)| {
                block_checksum(chunk.volume.id, block, data) == *checksum
            });
        if fits { Ok(()) } else { Err(Differs) }
    }
}

pub(super) fn allocated(checksums: &[u32]) -> u32 {
    checksums.iter().filter(|checksum| **checksum != 0).count() as u32
}

fn add_hole(parts: &mut Vec<ReadPart>, blocks: u32) {
    let bytes = blocks * BLOCK_BYTES as u32;
    if let Some(ReadPart::Hole(before)) = parts.last_mut()
        && let Some(sum) = before.checked_add(bytes)
    {
        *before = sum;
    } else {
        parts.push(ReadPart::Hole(bytes));
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
