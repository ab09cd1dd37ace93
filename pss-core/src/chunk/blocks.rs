//! Blocks of one chunk: written, zeroed, read.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::cache::{Chunk, ChunkState, VolumeChunks, lock};
use super::store::{BLOCK, ChunkStore};
use super::{ChunkError, ReadError};
use crate::disk::DiskFile;
use crate::entry::block_checksum;
use crate::payload::{LARGE_PAYLOAD_BYTES, Payload};
use crate::types::{BLOCK_BYTES, Slot};
use crate::volume::device::ReadPart;
use crate::volume::map::ChunkRange;

impl ChunkStore {
    pub(super) fn write_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        checksums: &[u32],
        data: &[u8],
        slot: Slot,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, range.chunk);
        let mut state = self.loaded(&chunk)?;
        self.before_change(&chunk, &mut state, range.first, range.blocks);
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
    pub(super) fn settle(
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

    pub(super) fn allocate_chunk(
        &self,
        volume: &Arc<VolumeChunks>,
        range: &ChunkRange,
        slot: Slot,
    ) -> Result<(), ChunkError> {
        let chunk = self.cache.chunk(volume, range.chunk);
        let mut state = self.loaded(&chunk)?;
        self.before_change(&chunk, &mut state, range.first, range.blocks);
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

    pub(super) fn punch_chunk(
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
        self.before_change(&chunk, &mut state, range.first, range.blocks);
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

    pub(super) fn read_chunk(
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
                parts.push(ReadPart::Data(data));
            }
            next += run;
        }
        Ok(())
    }

    /// Reads consecutive blocks that are allocated.
    pub(super) fn read_run(
        &self,
        chunk: &Chunk,
        snapshot: &Snapshot,
        first: usize,
        blocks: usize,
        nowait: bool,
    ) -> Result<Bytes, ReadError> {
        let bytes = blocks * BLOCK_BYTES;
        if bytes < LARGE_PAYLOAD_BYTES {
            let mut data = vec![0; bytes];
            self.read_into(chunk, snapshot, first, &mut data, nowait)?;
            return Ok(data.into());
        }
        let mut data = Payload::with_length(bytes);
        self.read_into(chunk, snapshot, first, data.spare(), nowait)?;
        data.advance(bytes);
        Ok(data.freeze())
    }

    /// The same; all of `data` is read and verified when it returns without an error.
    fn read_into(
        &self,
        chunk: &Chunk,
        snapshot: &Snapshot,
        first: usize,
        data: &mut [u8],
        nowait: bool,
    ) -> Result<(), ReadError> {
        if nowait {
            let file = snapshot.file.as_deref().ok_or(ReadError::WouldBlock)?;
            // Whatever is wrong is found out by a read that may wait.
            let read = file.read_at_nowait(data, first as u64 * BLOCK);
            let all = matches!(read, Ok(count) if count == data.len());
            return match all && snapshot.verify(chunk, first, data).is_ok() {
                true => Ok(()),
                false => Err(ReadError::WouldBlock),
            };
        }
        if snapshot.read(chunk, first, data).is_err() {
            for (at, data) in (first..).zip(data.chunks_exact_mut(BLOCK_BYTES)) {
                if snapshot.verify(chunk, at, data).is_err() {
                    self.read_again(chunk, at, data)?;
                }
            }
        }
        Ok(())
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
        self.open_file(chunk, &mut state)?;
        let checksum = state.table[at];
        if checksum == 0 {
            data.fill(0);
            return Ok(());
        }
        data.fill(0);
        let read = match &state.file {
            Some(file) => file.read_at(data, at as u64 * BLOCK),
            None => Ok(0),
        };
        match read {
            Ok(_) if block_checksum(chunk.volume.id, block, data) == checksum => Ok(()),
            _ if chunk.volume.is_deleted() => Err(ReadError::NoSuchVolume(chunk.volume.id)),
            _ => {
                self.bad_blocks.fetch_add(1, Ordering::Relaxed);
                let volume = chunk.volume.id;
                Err(ReadError::BadBlock { volume, block })
            }
        }
    }

    /// The chunk as it is now.
    pub(super) fn snapshot(&self, chunk: &Arc<Chunk>, nowait: bool) -> Result<Snapshot, ReadError> {
        self.look(chunk, nowait, true)
    }

    /// The chunk's table as it is now. Opens no file if the table is in memory: whoever looks at thousands of chunks
    /// would close those that are written to.
    pub(super) fn table(&self, chunk: &Arc<Chunk>, nowait: bool) -> Result<Snapshot, ReadError> {
        self.look(chunk, nowait, false)
    }

    fn look(
        &self,
        chunk: &Arc<Chunk>,
        nowait: bool,
        with_file: bool,
    ) -> Result<Snapshot, ReadError> {
        let mut state = lock(&chunk.state);
        if nowait && (!state.loaded || state.suspect) {
            return Err(ReadError::WouldBlock);
        }
        self.load(chunk, &mut state)?;
        if state.suspect {
            self.resolve(chunk, &mut state)?;
        }
        if with_file {
            self.open_file(chunk, &mut state)?;
        }
        Ok(Snapshot::of(&state))
    }
}

/// A chunk as it was at one moment.
pub(super) struct Snapshot {
    pub(super) table: Arc<Vec<u32>>,
    pub(super) file: Option<Arc<dyn DiskFile>>,
    pub(super) last_slot: Slot,
    pub(super) changed_ms: u64,
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
            changed_ms: state.changed_ms,
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
