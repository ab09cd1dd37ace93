//! Lists, exports and imports chunks, for a server that is too far behind for the log.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::blocks::Snapshot;
use super::cache::{Chunk, lock};
use super::file::allocated;
use super::point::PointFailure;
use super::store::{ChunkStore, LOOKED_AT_MAX};
use super::{ChunkError, ReadError, image, path, table};
use crate::paxos::message::ChunkSummary;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex};
use crate::wire::client::ChunkStatus;

impl ChunkStore {
    /// What chunks of the volume exist, from `from` on and at most `chunks_max`; and from where to
    /// go on, if there may be more.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn list(
        &self,
        volume: &Volume,
        from: ChunkIndex,
        chunks_max: usize,
    ) -> Result<(Vec<ChunkSummary>, Option<ChunkIndex>), ChunkError> {
        let volume = self.known(volume.id)?;
        let mut chunks = Vec::new();
        let mut next = u64::from(from.0);
        while let Some(index) = volume.next_present(next) {
            if chunks.len() >= chunks_max {
                return Ok((chunks, Some(index)));
            }
            next = u64::from(index.0) + 1;
            let snapshot = self.table(&self.cache.chunk(&volume, index), false)?;
            if snapshot.allocated > 0 {
                chunks.push(ChunkSummary {
                    chunk: index,
                    last_slot: snapshot.last_slot,
                    digest: digest(&snapshot.table),
                });
            }
        }
        Ok((chunks, None))
    }

    /// The chunks of `from..until` that exist, at most `chunks_max` and of at most [`LOOKED_AT_MAX`]; and from where to go on,
    /// if that is not all.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::WouldBlock`] only if `nowait`.
    pub fn statuses(
        &self,
        volume: &Volume,
        range: Range<ChunkIndex>,
        chunks_max: usize,
        nowait: bool,
    ) -> Result<(Vec<ChunkStatus>, Option<ChunkIndex>), ReadError> {
        let id = volume.id;
        let volume = self.volume(id).ok_or(ReadError::NoSuchVolume(id))?;
        let mut chunks = Vec::new();
        let mut next = u64::from(range.start.0);
        let mut looked_at = 0;
        while let Some(index) = volume.next_present(next) {
            if index >= range.end {
                break;
            }
            if chunks.len() >= chunks_max || looked_at >= LOOKED_AT_MAX {
                return Ok((chunks, Some(index)));
            }
            next = u64::from(index.0) + 1;
            looked_at += 1;
            let snapshot = self.table(&self.cache.chunk(&volume, index), nowait);
            if volume.is_deleted() {
                return Err(ReadError::NoSuchVolume(id));
            }
            let snapshot = snapshot?;
            if snapshot.allocated > 0 {
                chunks.push(ChunkStatus {
                    chunk: index,
                    changed: snapshot.last_slot,
                    changed_ms: snapshot.changed_ms,
                    allocated_blocks: snapshot.allocated,
                });
            }
        }
        Ok((chunks, None))
    }

    /// The chunk's blocks as an image for [`ChunkStore::import`]; empty if it does not exist.
    ///
    /// # Errors
    /// [`ChunkError::BadBlock`] if a block is damaged.
    pub fn export(&self, volume: &Volume, index: ChunkIndex) -> Result<Bytes, ChunkError> {
        let volume = self.known(volume.id)?;
        if !volume.is_present(index) {
            return Ok(Bytes::new());
        }
        let chunk = self.cache.chunk(&volume, index);
        let snapshot = self.snapshot(&chunk, false)?;
        if let Some(image) = self.try_export(&chunk, &snapshot)? {
            return Ok(image);
        }
        // It was written meanwhile; now nobody writes.
        let mut state = lock(&chunk.state);
        self.open_file(&chunk, &mut state)?;
        let snapshot = Snapshot::of(&state);
        let image = self.try_export(&chunk, &snapshot)?;
        drop(state);
        image.ok_or_else(|| self.bad_block(&chunk, &snapshot).into())
    }

    /// The image of a snapshot, or `None` if a block is not as the snapshot says.
    fn try_export(&self, chunk: &Chunk, snapshot: &Snapshot) -> Result<Option<Bytes>, ChunkError> {
        if snapshot.allocated == 0 {
            return Ok(Some(Bytes::new()));
        }
        let owner = chunk.volume.owner(chunk.index);
        let last_change = (snapshot.last_slot, snapshot.changed_ms);
        let mut image = image::encode_start(&owner, last_change, &snapshot.table);
        for (first, blocks) in runs(&snapshot.table) {
            let start = image.len();
            image.resize(start + blocks * BLOCK_BYTES, 0);
            if snapshot.read(chunk, first, &mut image[start..]).is_err() {
                return Ok(None);
            }
        }
        Ok(Some(image.into()))
    }

    /// Finds the damaged block of a chunk that cannot be exported.
    fn bad_block(&self, chunk: &Chunk, snapshot: &Snapshot) -> ReadError {
        let allocated = (0..snapshot.table.len()).filter(|at| snapshot.table[*at] != 0);
        for at in allocated {
            if let Err(error) = self.read_again(chunk, at, &mut [0; BLOCK_BYTES]) {
                return error;
            }
        }
        // Reads failed before and do not any more.
        ReadError::WouldBlock
    }

    /// Replaces a chunk by an image; an empty one removes it. After a crash the chunk is as before or
    /// as in the image.
    ///
    /// # Errors
    /// [`ChunkError::BadImage`]: nothing was changed.
    pub fn import(
        &self,
        volume: &Volume,
        index: ChunkIndex,
        image: &Bytes,
    ) -> Result<(), ChunkError> {
        self.check()?;
        let volume = self.known(volume.id)?;
        self.fail_points(volume.id, &(0..u64::MAX), PointFailure::Gone);
        if image.is_empty() {
            return match volume.is_present(index) {
                true => self.drop_chunk(&volume, index, true),
                false => Ok(()),
            };
        }
        let owner = volume.owner(index);
        let image = image::decode(&owner, image)?;
        let chunk = self.cache.chunk(&volume, index);
        let path = chunk.path();
        let incomplete = format!("{path}{}", path::INCOMPLETE);
        // A whole new file, complete with its table, takes the place of the old one in one step.
        let file = self.create_file(&volume, &incomplete, index)?;
        let written = self.fill(&chunk, &image, &*file);
        if let Err(error) = written {
            let error = self.failed("import", &incomplete, error);
            if matches!(error, ChunkError::NoSpace) {
                let removed = self.disk.remove_file(&incomplete);
                self.finish("remove", &incomplete, removed)?;
            }
            return Err(error);
        }
        let mut state = lock(&chunk.state);
        self.finish("rename", &path, self.disk.rename(&incomplete, &path))?;
        // A checkpoint under way cannot sync the replaced file any more, so this one must be durable.
        let leaf = path::leaf(&volume.directory, index);
        self.synced(&leaf, self.disk.sync_dir(&leaf))?;
        state.loaded = true;
        state.exists = true;
        state.doomed = false;
        state.allocated = allocated(&image.checksums);
        volume.set_allocated(index, state.allocated);
        state.table = Arc::new(image.checksums);
        state.last_slot = image.last_slot;
        state.changed_ms = image.changed_ms;
        state.generation = 1;
        state.suspect = false;
        state.life = state.life.wrapping_add(1);
        state.file = Some(file);
        self.cache.opened(&chunk);
        self.mark_dirty(&chunk, &mut state);
        Ok(())
    }

    /// Writes blocks and table of an image.
    fn fill(
        &self,
        chunk: &Chunk,
        image: &image::Image,
        file: &dyn crate::disk::DiskFile,
    ) -> std::io::Result<()> {
        let mut rest = &image.data[..];
        for (first, blocks) in runs(&image.checksums) {
            let (data, behind) = rest.split_at(blocks * BLOCK_BYTES);
            rest = behind;
            file.write_at(&[IoSlice::new(data)], (first * BLOCK_BYTES) as u64)?;
        }
        let owner = chunk.volume.owner(chunk.index);
        let last_change = (image.last_slot, image.changed_ms);
        let table = table::encode(&owner, 1, last_change, false, &image.checksums);
        let offset = chunk.volume.chunk_bytes as usize + owner.slot_bytes();
        file.write_at(&[IoSlice::new(&table)], offset as u64)?;
        file.sync()
    }
}

/// Runs of allocated blocks: first and how many.
fn runs(checksums: &[u32]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = next
            + checksums[next..]
                .iter()
                .position(|checksum| *checksum != 0)?;
        let rest = &checksums[first..];
        let blocks = rest.iter().position(|checksum| *checksum == 0);
        let blocks = blocks.unwrap_or(rest.len());
        next = first + blocks;
        Some((first, blocks))
    })
}

/// CRC32C of a table's checksums.
fn digest(checksums: &[u32]) -> u32 {
    checksums.iter().fold(0, |digest, checksum| {
        crc32c::crc32c_append(digest, &checksum.to_le_bytes())
    })
}
