//! The file of one chunk and its table: loaded, made, removed.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::cache::{Chunk, ChunkState, VolumeChunks, lock};
use super::store::{BLOCK, ChunkStore};
use super::table::{self, Found, Owner};
use super::{ChunkError, ReadError, path};
use crate::disk::{DiskFile, OpenMode};
use crate::entry::block_checksum;
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot};

/// Read at once when a whole chunk is looked through.
const PIECE_BLOCKS: usize = 256;

impl ChunkStore {
    /// A chunk without blocks does not exist.
    pub(super) fn drop_if_empty(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
    ) -> Result<(), ChunkError> {
        // With a suspect table nobody knows whether other blocks are in use.
        if state.allocated == 0 && !state.suspect {
            self.drop_state(chunk, state, true)?;
        }
        Ok(())
    }

    pub(super) fn drop_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        index: ChunkIndex,
        at_once: bool,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, index);
        let mut state = lock(&chunk.state);
        self.before_removal(&chunk, &mut state);
        // What its table says does not matter any more.
        if !state.loaded {
            state.loaded = true;
            state.exists = true;
        }
        self.drop_state(&chunk, &mut state, at_once)
    }

    /// Makes a chunk one that does not exist.
    pub(super) fn drop_state(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        at_once: bool,
    ) -> Result<(), ChunkError> {
        self.before_removal(chunk, state);
        self.forget(chunk, state);
        if at_once {
            self.remove_doomed(chunk, state)?;
        } else {
            self.mark_dirty(chunk, state);
        }
        Ok(())
    }

    /// The same without touching the file, which is doomed.
    pub(super) fn forget(&self, chunk: &Chunk, state: &mut ChunkState) {
        state.doomed |= state.exists;
        state.exists = false;
        state.file = None;
        state.life = state.life.wrapping_add(1);
        state.table = Arc::clone(&chunk.volume.empty_table);
        state.allocated = 0;
        state.generation = 0;
        state.last_slot = Slot(0);
        state.changed_ms = 0;
        state.suspect = false;
        chunk.volume.set_allocated(chunk.index, 0);
    }

    /// Makes a chunk whose directory was put aside one that does not exist.
    pub(super) fn forget_if_put_aside(&self, chunk: &Chunk, state: &mut ChunkState) {
        let is_something = state.exists || state.allocated > 0;
        if state.loaded && is_something && !chunk.volume.is_present(chunk.index) {
            // Its file went with the directory: none by this name is doomed.
            state.exists = false;
            self.forget(chunk, state);
        }
    }

    /// Opens the file of a chunk by its name; `None` if the chunk does not exist, or does not any more.
    pub(super) fn open_by_name(&self, chunk: &Chunk) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let names = chunk.volume.names.read();
        let _names = names.unwrap_or_else(PoisonError::into_inner);
        if !chunk.volume.is_present(chunk.index) {
            return Ok(None);
        }
        let file = self.disk.open(&chunk.path(), OpenMode::Existing);
        file.map(Some)
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

    pub(super) fn loaded<'a>(
        &self,
        chunk: &'a Chunk,
    ) -> Result<MutexGuard<'a, ChunkState>, ChunkError> {
        let mut state = lock(&chunk.state);
        self.load(chunk, &mut state)?;
        Ok(state)
    }

    /// Reads the chunk's table.
    pub(super) fn load(&self, chunk: &Chunk, state: &mut ChunkState) -> Result<(), ReadError> {
        if state.loaded {
            return Ok(());
        }
        let path = chunk.path();
        let file = match self.open_by_name(chunk) {
            Ok(None) => {
                state.loaded = true;
                return Ok(());
            }
            Ok(Some(file)) => file,
            // It was there when the store was opened: what it held is lost, not zero.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let blocks = chunk.volume.blocks_per_chunk();
                state.table = Arc::new(vec![table::DAMAGED; blocks as usize]);
                state.allocated = blocks;
                state.doomed = true;
                state.loaded = true;
                return Ok(());
            }
            Err(source) => return Err(ReadError::io("open", &path, source)),
        };
        let owner = chunk.volume.owner(chunk.index);
        let slots = read_slots(&*file, &owner, u64::from(chunk.volume.chunk_bytes));
        let slots = slots.map_err(|source| ReadError::io("read table", &path, source))?;
        match table::choose(&owner, &slots) {
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
                state.changed_ms = stored.changed_ms;
                state.suspect = stored.suspect;
                let presence = presence(state);
                chunk.volume.refine_allocated(chunk.index, presence);
                state.file = Some(file);
                self.cache.opened(chunk);
            }
        }
        state.loaded = true;
        Ok(())
    }

    /// Looks through a chunk whose table may be out of date. A block that is not what the table says may be newer than it, so
    /// nobody knows any more what it should be; one that is unwritten by the table but holds something is not given out as zeros.
    pub(super) fn resolve(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
    ) -> Result<(), ReadError> {
        self.open_file(chunk, state)?;
        let Some(file) = state.file.clone() else {
            return Ok(());
        };
        let mut table = state.table.to_vec();
        let mut data = vec![0; PIECE_BLOCKS.min(table.len()) * BLOCK_BYTES];
        for (piece, checksums) in table.chunks_mut(PIECE_BLOCKS).enumerate() {
            let first = (piece * PIECE_BLOCKS) as u64;
            let data = &mut data[..checksums.len() * BLOCK_BYTES];
            data.fill(0);
            let is_read = file.read_at(data, first * BLOCK).is_ok();
            let blocks = data.chunks_exact_mut(BLOCK_BYTES).zip(first..);
            for (checksum, (data, at)) in checksums.iter_mut().zip(blocks) {
                let block = chunk.first_block() + at;
                if !is_read {
                    data.fill(0);
                    match file.read_at(data, at * BLOCK) {
                        Ok(_) => {}
                        Err(error) if is_unreadable(&error) => {
                            *checksum = table::DAMAGED;
                            continue;
                        }
                        Err(source) => return Err(ReadError::io("read", &chunk.path(), source)),
                    }
                }
                let is_zero = *checksum == 0 && data.iter().all(|byte| *byte == 0);
                let actual = block_checksum(chunk.volume.id, block, data);
                if !is_zero && actual != *checksum {
                    *checksum = table::damaged(actual);
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
        let presence = presence(state);
        chunk.volume.refine_allocated(chunk.index, presence);
        self.mark_dirty(chunk, state);
        Ok(())
    }

    /// Opens the chunk's file if it exists; a chunk that was put aside meanwhile does not.
    pub(super) fn open_file(&self, chunk: &Chunk, state: &mut ChunkState) -> Result<(), ReadError> {
        if state.file.is_some() || !state.exists {
            return Ok(());
        }
        let file = self.open_by_name(chunk);
        match file.map_err(|source| ReadError::io("open", &chunk.path(), source))? {
            Some(file) => {
                state.file = Some(file);
                self.cache.opened(chunk);
            }
            None => self.forget_if_put_aside(chunk, state),
        }
        Ok(())
    }

    /// The chunk's file, which is made if it does not exist.
    pub(super) fn file_for_write(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
    ) -> Result<Arc<dyn DiskFile>, ChunkError> {
        self.open_file(chunk, state)?;
        if state.file.is_none() {
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

    pub(super) fn set_checksums(
        &self,
        chunk: &Chunk,
        state: &mut ChunkState,
        first: u32,
        checksums: &[u32],
    ) {
        let table = Arc::make_mut(&mut state.table);
        let entries = &mut table[first as usize..][..checksums.len()];
        let before = state.allocated;
        state.allocated = before + allocated(checksums) - allocated(entries);
        entries.copy_from_slice(checksums);
        if state.allocated != before {
            let presence = presence(state);
            chunk.volume.set_allocated(chunk.index, presence);
        }
    }

    pub(super) fn touch(&self, chunk: &Arc<Chunk>, state: &mut ChunkState, slot: Slot) {
        // An entry that is applied again after others must not make the chunk older.
        if slot >= state.last_slot {
            state.last_slot = slot;
            state.changed_ms = self.clock_ms.load(Ordering::Relaxed);
        }
        self.mark_dirty(chunk, state);
    }

    pub(super) fn mark_dirty(&self, chunk: &Arc<Chunk>, state: &mut ChunkState) {
        state.unsynced = true;
        if !state.dirty {
            state.dirty = true;
            lock(&self.dirty).chunks.push(Arc::clone(chunk));
        }
    }
}

/// What a chunk file has behind its data. A slot that the device cannot read counts as a damaged one.
fn read_slots(file: &dyn DiskFile, owner: &Owner, offset: u64) -> io::Result<Vec<u8>> {
    let mut slots = vec![0; 2 * owner.slot_bytes()];
    match file.read_at(&mut slots, offset) {
        Ok(read) => {
            slots.truncate(read);
            return Ok(slots);
        }
        Err(error) if is_unreadable(&error) => {}
        Err(error) => return Err(error),
    }
    let each = slots.chunks_exact_mut(owner.slot_bytes());
    for (slot, number) in each.zip(0u64..) {
        slot.fill(0);
        match file.read_at(slot, offset + number * owner.slot_bytes() as u64) {
            Ok(_) => {}
            Err(error) if is_unreadable(&error) => slot.fill(u8::MAX),
            Err(error) => return Err(error),
        }
    }
    Ok(slots)
}

/// Whether the device has lost what it should read; other errors are no reason to give it up.
fn is_unreadable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::ENODATA | libc::EBADMSG | libc::EUCLEAN)
    )
}

/// How many blocks count as allocated: a file without any exists only while its table is suspect.
fn presence(state: &ChunkState) -> u32 {
    state.allocated.max(u32::from(state.exists))
}

pub(super) fn allocated(checksums: &[u32]) -> u32 {
    checksums.iter().filter(|checksum| **checksum != 0).count() as u32
}
