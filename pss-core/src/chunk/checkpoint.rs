//! Makes what was written to chunks durable.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::cache::{Chunk, lock};
use super::store::ChunkStore;
use super::{ChunkError, table};
use crate::disk::DiskFile;
use crate::types::Slot;

/// Up to so many files and directories are synced one by one; for more the whole file system is.
const SYNC_SINGLY_MAX: usize = 64;

/// What had been written to chunks at one moment. Nothing of it is durable before
/// [`Checkpoint::flush`] returns. If it is dropped before, the next checkpoint takes its place.
pub struct Checkpoint {
    store: Arc<ChunkStore>,
    items: Vec<Item>,
    directories: BTreeSet<String>,
    done: bool,
}

struct Item {
    /// Keeps the chunk in memory until its table is in the file.
    chunk: Arc<Chunk>,
    /// Which file it was.
    life: u32,
    table: Arc<Vec<u32>>,
    last_slot: Slot,
    changed_ms: u64,
    suspect: bool,
}

impl ChunkStore {
    /// Takes what has been written so far; later writes belong to the next checkpoint. `None` if one
    /// is under way.
    pub fn begin_checkpoint(self: &Arc<Self>) -> Option<Checkpoint> {
        if self.checkpoint.swap(true, Ordering::AcqRel) {
            return None;
        }
        let dirty = std::mem::take(&mut *lock(&self.dirty));
        let mut items = Vec::with_capacity(dirty.chunks.len());
        for chunk in dirty.chunks {
            let mut state = lock(&chunk.state);
            state.dirty = false;
            let item = Item {
                life: state.life,
                table: Arc::clone(&state.table),
                last_slot: state.last_slot,
                changed_ms: state.changed_ms,
                suspect: state.suspect,
                chunk: Arc::clone(&chunk),
            };
            let is_needed = state.exists || state.doomed;
            drop(state);
            if is_needed {
                items.push(item);
            }
        }
        Some(Checkpoint {
            store: Arc::clone(self),
            items,
            directories: dirty.directories,
            done: false,
        })
    }
}

impl Checkpoint {
    /// How many chunks it holds.
    pub fn chunks(&self) -> usize {
        self.items.len()
    }

    /// Makes it durable: a few files and directories are synced one by one. The whole file system is
    /// if there are many, or if one was closed that had been written: a failure to write it back would be
    /// noticed by nothing else (see ARCHITECTURE.md, "Failures of writing back").
    ///
    /// May run beside all other uses of the store, on a thread that may wait.
    ///
    /// # Errors
    /// [`ChunkError::NoSpace`]: everything stays for the next checkpoint; but files of chunks that do not exist
    /// any more are removed. Other errors are final.
    pub fn flush(mut self) -> Result<(), ChunkError> {
        self.store.check()?;
        for item in &self.items {
            self.remove_file(item)?;
        }
        // Files stay open until they are synced; of many only a few, because a process may have only so
        // many open and the whole file system is synced then.
        let mut files = Vec::new();
        let mut are_many = false;
        for item in &self.items {
            if let Some(file) = self.write_table(item)?
                && !are_many
            {
                files.push((item, file));
                if files.len() > SYNC_SINGLY_MAX {
                    are_many = true;
                    files.clear();
                }
            }
        }
        // Files that were removed only now.
        self.directories
            .extend(std::mem::take(&mut lock(&self.store.dirty).directories));
        // All files that are left to sync are open here: whoever is closed from now on does no harm.
        let may_have_failed = self.store.cache.take_closed_unsynced();
        let are_many = are_many || files.len() + self.directories.len() > SYNC_SINGLY_MAX;
        if are_many || may_have_failed {
            let synced = self.store.disk.sync_all();
            self.store.synced("", synced)?;
        } else {
            for (item, file) in &files {
                self.store.synced(&item.chunk.path(), file.sync())?;
            }
            for directory in &self.directories {
                match self.store.disk.sync_dir(directory) {
                    // It was put aside with its volume; that changed another directory.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    synced => self.store.synced(directory, synced)?,
                }
            }
        }
        for item in &self.items {
            let mut state = lock(&item.chunk.state);
            state.unsynced = state.dirty;
        }
        self.done = true;
        Ok(())
    }

    /// Removes the file of a chunk that does not exist any more.
    fn remove_file(&self, item: &Item) -> Result<(), ChunkError> {
        let chunk = &item.chunk;
        let deleted = chunk.volume.deleted.read();
        let deleted = deleted.unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&chunk.state);
        if !*deleted && !state.exists {
            self.store.remove_doomed(chunk, &mut state)?;
        }
        Ok(())
    }

    /// Writes a chunk's table. Gives the file that is to be synced.
    fn write_table(&self, item: &Item) -> Result<Option<Arc<dyn DiskFile>>, ChunkError> {
        let chunk = &item.chunk;
        let deleted = chunk.volume.deleted.read();
        let deleted = deleted.unwrap_or_else(PoisonError::into_inner);
        if *deleted {
            return Ok(None);
        }
        let state = lock(&chunk.state);
        if !state.exists || state.life != item.life {
            return Ok(None);
        }
        let path = chunk.path();
        let file = match &state.file {
            Some(file) => Arc::clone(file),
            None => {
                let file = self.store.open_by_name(chunk);
                match file.map_err(|error| self.store.failed("open", &path, error))? {
                    Some(file) => file,
                    None => return Ok(None),
                }
            }
        };
        let owner = chunk.volume.owner(chunk.index);
        let generation = state.generation + 1;
        // Readers and writers go on meanwhile: nobody else writes tables, and the file is this one
        // even if the chunk gets another.
        drop(state);
        let bytes = table::encode(
            &owner,
            generation,
            (item.last_slot, item.changed_ms),
            item.suspect,
            &item.table,
        );
        let slot = generation % 2 * owner.slot_bytes() as u64;
        let offset = u64::from(chunk.volume.chunk_bytes) + slot;
        let written = file.write_at(&[IoSlice::new(&bytes)], offset);
        self.store.finish("write table", &path, written)?;
        let mut state = lock(&chunk.state);
        if state.life == item.life {
            state.generation = generation;
        }
        Ok(Some(file))
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        if !self.done {
            for item in &self.items {
                let deleted = item.chunk.volume.deleted.read();
                if !*deleted.unwrap_or_else(PoisonError::into_inner) {
                    let mut state = lock(&item.chunk.state);
                    self.store.mark_dirty(&item.chunk, &mut state);
                }
            }
            let directories = std::mem::take(&mut self.directories);
            lock(&self.store.dirty).directories.extend(directories);
        }
        self.store.checkpoint.store(false, Ordering::Release);
    }
}
