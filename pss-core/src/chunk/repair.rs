//! Finds damaged blocks, and takes what other servers have in their place.
//!
//! What a block should be, its checksum says. If the table was damaged, or may be older than the data, nobody knows here what
//! some blocks should be ([`table::is_known`]); then another server's chunk says it, for which [`ChunkStore::take_over`]
//! has the rule.
//!
//! All of this must be called by the one thread that applies entries: nothing is written between what is compared here
//! and what is put in its place. A crash in between harms nothing. With the block goes nothing else that a checkpoint
//! would have to make durable: if the block was repaired and is lost again, its checksum still says so.

use std::io::IoSlice;
use std::sync::Arc;

use bytes::Bytes;

use super::cache::{Chunk, ChunkState};
use super::image::{self, Image};
use super::store::{BLOCK, ChunkStore};
use super::{ChunkError, ReadError, table};
use crate::entry::block_checksum;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot, VolumeId};
use crate::volume::map::chunk_ranges;

/// A damaged block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BadBlock {
    /// Block of the volume.
    pub block: u64,
    /// What it should be; `None`: nobody knows here.
    pub checksum: Option<u32>,
}

/// What came of a repair.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Repair {
    /// The block was written again.
    Done,
    /// It is not damaged, or not any more.
    NotNeeded,
    /// This is not what the block should be.
    Differs,
}

impl ChunkStore {
    /// Damaged blocks of a range, the first `most` of them. Reads all of it.
    ///
    /// # Errors
    /// [`ReadError`], but not [`ReadError::BadBlock`].
    pub fn find_bad(
        &self,
        volume: &Volume,
        first_block: u64,
        blocks: u64,
        most: usize,
    ) -> Result<Vec<BadBlock>, ReadError> {
        let id = volume.id;
        let volume = self.volume(id).ok_or(ReadError::NoSuchVolume(id))?;
        let mut found = Vec::new();
        for range in chunk_ranges(first_block, blocks, volume.chunk_bytes) {
            if !volume.is_present(range.chunk) {
                continue;
            }
            let chunk = self.cache.chunk(&volume, range.chunk);
            let snapshot = self.snapshot(&chunk, false)?;
            for at in (range.first as usize..).take(range.blocks as usize) {
                if found.len() >= most {
                    return Ok(found);
                }
                let mut data = [0; BLOCK_BYTES];
                if snapshot.table[at] == 0 || snapshot.read(&chunk, at, &mut data).is_ok() {
                    continue;
                }
                match self.read_again(&chunk, at, &mut data) {
                    Err(ReadError::BadBlock { block, .. }) => {
                        let checksum = snapshot.table[at];
                        found.push(BadBlock {
                            block,
                            checksum: Some(checksum).filter(|it| table::is_known(*it)),
                        });
                    }
                    other => other?,
                }
            }
        }
        Ok(found)
    }

    /// Writes a block again that was found damaged, if `data` are what it should hold.
    ///
    /// # Errors
    /// As [`ChunkStore::write`].
    pub fn repair(&self, volume: &Volume, block: u64, data: &[u8]) -> Result<Repair, ChunkError> {
        self.check()?;
        let (chunk, at) = self.chunk_of(volume.id, block)?;
        let mut state = self.loaded(&chunk)?;
        let Some(checksum) = self.bad_checksum(&chunk, &mut state, at)? else {
            return Ok(Repair::NotNeeded);
        };
        if !table::is_known(checksum) || block_checksum(volume.id, block, data) != checksum {
            return Ok(Repair::Differs);
        }
        self.put(&chunk, &mut state, at, checksum, data)?;
        Ok(Repair::Done)
    }

    /// Takes damaged blocks of a chunk over from another server's image, which is at least as new as `as_of`; `applied` is what is
    /// applied here. Gives those that it took.
    ///
    /// A block of which nobody knows here what it should be was not written here since it was found, or somebody would know. So it is
    /// as the image says if that was made later than the block was found (the caller asks for such an image only), and holds
    /// nothing that is not applied here yet: else a reader would see a write that is then undone. A block whose checksum
    /// is known, and which the other server has otherwise, may have been written here meanwhile, unless `as_of` is as new as
    /// the last change of the chunk; then our table is the one that is wrong.
    ///
    /// # Errors
    /// As [`ChunkStore::import`].
    pub fn take_over(
        &self,
        volume: &Volume,
        index: ChunkIndex,
        image: &ChunkImage,
        as_of: Slot,
        blocks: &[u64],
    ) -> Result<Vec<u64>, ChunkError> {
        self.check()?;
        let first = u64::from(index.0) * (u64::from(volume.chunk_bytes) / BLOCK);
        let (chunk, _) = self.chunk_of(volume.id, first)?;
        let mut state = self.loaded(&chunk)?;
        let mut taken = Vec::new();
        for at in 0..image.checksums.len() {
            if !blocks.contains(&(first + at as u64)) && table::is_known(state.table[at]) {
                continue;
            }
            let Some(checksum) = self.bad_checksum(&chunk, &mut state, at)? else {
                continue;
            };
            if table::is_known(checksum) && state.last_slot > as_of {
                continue;
            }
            self.put(&chunk, &mut state, at, image.checksums[at], image.block(at))?;
            taken.push(first + at as u64);
        }
        if taken.is_empty() {
            return Ok(taken);
        }
        if image.last_slot > state.last_slot {
            (state.last_slot, state.changed_ms) = (image.last_slot, image.changed_ms);
        }
        self.drop_if_empty(&chunk, &mut state)?;
        Ok(taken)
    }

    /// Makes a chunk what another server's image says, whatever is here: the caller knows that it is right, and that no entry has
    /// meant the chunk since. Gives the blocks that were otherwise.
    ///
    /// # Errors
    /// As [`ChunkStore::import`].
    pub fn replace(
        &self,
        volume: &Volume,
        index: ChunkIndex,
        image: &ChunkImage,
    ) -> Result<Vec<u64>, ChunkError> {
        self.check()?;
        let first = u64::from(index.0) * (u64::from(volume.chunk_bytes) / BLOCK);
        let (chunk, _) = self.chunk_of(volume.id, first)?;
        let mut state = self.loaded(&chunk)?;
        if state.suspect {
            self.resolve(&chunk, &mut state)?;
        }
        let mut replaced = Vec::new();
        for at in 0..image.checksums.len() {
            let checksum = image.checksums[at];
            if state.table[at] == checksum {
                let mut data = [0; BLOCK_BYTES];
                self.open_file(&chunk, &mut state)?;
                let file = state.file.as_deref();
                let read = file.map(|file| file.read_at(&mut data, at as u64 * BLOCK));
                let is_read = matches!(read, Some(Ok(_)));
                if checksum == 0 || is_read && data[..] == *image.block(at) {
                    continue;
                }
            }
            self.put(&chunk, &mut state, at, checksum, image.block(at))?;
            replaced.push(first + at as u64);
        }
        if !replaced.is_empty() {
            (state.last_slot, state.changed_ms) = (image.last_slot, image.changed_ms);
            self.drop_if_empty(&chunk, &mut state)?;
        }
        Ok(replaced)
    }

    /// Reads what another server sent as a chunk; see [`ChunkStore::take_over`].
    ///
    /// # Errors
    /// [`ChunkError::BadImage`].
    pub fn read_image(
        &self,
        volume: &Volume,
        index: ChunkIndex,
        image: &Bytes,
    ) -> Result<ChunkImage, ChunkError> {
        let owner = self.known(volume.id)?.owner(index);
        let image = match image.is_empty() {
            true => Image {
                last_slot: Slot(0),
                changed_ms: 0,
                checksums: vec![0; owner.blocks as usize],
                data: Bytes::new(),
            },
            false => image::decode(&owner, image)?,
        };
        let mut places = Vec::with_capacity(image.checksums.len());
        let mut next = 0;
        for checksum in &image.checksums {
            places.push(next);
            next += usize::from(*checksum != 0);
        }
        Ok(ChunkImage {
            last_slot: image.last_slot,
            changed_ms: image.changed_ms,
            checksums: image.checksums,
            places,
            data: image.data,
        })
    }

    /// Replaces a block whatever it should be, by nothing if there are no data: deliberate bugs, for the tests of the tests.
    ///
    /// # Errors
    /// As [`ChunkStore::write`].
    #[doc(hidden)]
    pub fn force(
        &self,
        volume: &Volume,
        block: u64,
        data: Option<&[u8]>,
    ) -> Result<(), ChunkError> {
        let (chunk, at) = self.chunk_of(volume.id, block)?;
        let mut state = self.loaded(&chunk)?;
        let checksum = data.map_or(0, |data| block_checksum(volume.id, block, data));
        self.put(&chunk, &mut state, at, checksum, data.unwrap_or_default())
    }

    fn chunk_of(&self, id: VolumeId, block: u64) -> Result<(Arc<Chunk>, usize), ChunkError> {
        let volume = self.known(id)?;
        let per_chunk = u64::from(volume.blocks_per_chunk());
        let index = ChunkIndex((block / per_chunk) as u32);
        let chunk = self.cache.chunk(&volume, index);
        Ok((chunk, (block % per_chunk) as usize))
    }

    /// What a block should be, if it is damaged.
    fn bad_checksum(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        at: usize,
    ) -> Result<Option<u32>, ChunkError> {
        if state.suspect {
            self.resolve(chunk, state)?;
        }
        let checksum = state.table[at];
        if checksum == 0 {
            return Ok(None);
        }
        self.open_file(chunk, state)?;
        let mut data = [0; BLOCK_BYTES];
        let read = match &state.file {
            Some(file) => file.read_at(&mut data, at as u64 * BLOCK),
            None => Ok(0),
        };
        let block = chunk.first_block() + at as u64;
        let fits = read.is_ok() && block_checksum(chunk.volume.id, block, &data) == checksum;
        Ok((!fits).then_some(checksum))
    }

    /// Puts a block in its place; checksum 0: it is unwritten.
    fn put(
        &self,
        chunk: &Arc<Chunk>,
        state: &mut ChunkState,
        at: usize,
        checksum: u32,
        data: &[u8],
    ) -> Result<(), ChunkError> {
        self.before_change(chunk, state, at as u32, 1);
        let file = self.file_for_write(chunk, state)?;
        let offset = at as u64 * BLOCK;
        let written = match checksum {
            0 => file.punch_hole(offset, BLOCK),
            _ => file.write_at(&[IoSlice::new(data)], offset),
        };
        self.finish("write", &chunk.path(), written)?;
        self.set_checksums(chunk, state, at as u32, &[checksum]);
        self.mark_dirty(chunk, state);
        Ok(())
    }
}

/// A chunk of another server.
pub struct ChunkImage {
    /// Last slot that changed it; 0 if it does not exist.
    pub last_slot: Slot,
    changed_ms: u64,
    checksums: Vec<u32>,
    /// Of each block: how many are before it in the data.
    places: Vec<usize>,
    data: Bytes,
}

impl ChunkImage {
    fn block(&self, at: usize) -> &[u8] {
        match self.checksums[at] {
            0 => &[],
            _ => &self.data[self.places[at] * BLOCK_BYTES..][..BLOCK_BYTES],
        }
    }
}
