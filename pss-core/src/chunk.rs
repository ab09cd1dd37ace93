//! The chunk store of one server: the blocks of its volumes, as of the entries that were applied.
//!
//! * `path` — chunk ↔ `data/NAME/00/00/01`
//! * `table` — the checksummed table behind a chunk's data
//! * `image` — a chunk as it travels to another server
//! * `cache` — chunks in memory, open files
//! * `file` — the file of one chunk: loaded, made, removed
//! * `blocks` — blocks of one chunk: written, zeroed, read
//! * [`ChunkStore`] — read, write, zero over chunks; volumes
//! * `transfer` — lists, exports and imports chunks
//! * `repair` — finds damaged blocks, and takes what other servers have in their place
//! * `digest` — what chunks and volumes hold, as one number
//! * `point` — what chunks held at one slot, told while they are written to
//! * `trash` — directories of many chunks are put aside at once, and removed little by little
//! * [`Checkpoint`] — makes what was written durable
//!
//! A chunk file starts with the plain data of the chunk; what was never written, or was trimmed, is a
//! hole. Behind the data stand two slots for the chunk's table: a checksum for each block, or
//! "unwritten". Tables live in memory and are written at a checkpoint, into the slots in turn.
//!
//! Between checkpoints a crash may leave any mix of old and new blocks. That does no harm: the log
//! still holds every entry since the last checkpoint, and applying entries again, in order, ends in
//! the same blocks whatever was there before. Nothing is read before that has been done.
//!
//! A block that is not what its checksum says is damaged. It stays so until it is written anew or repaired.

mod blocks;
mod cache;
mod checkpoint;
pub mod digest;
mod file;
mod image;
mod path;
mod point;
mod repair;
mod store;
mod table;
mod transfer;
mod trash;

use std::io;

pub use checkpoint::Checkpoint;
pub use digest::Digest;
pub use point::{ChunkDigest, Point, PointFailure, Watch};
pub use repair::{BadBlock, ChunkImage, Repair};
pub use store::ChunkStore;

use crate::disk::is_full;
use crate::types::{GroupId, VolumeId};

/// How chunks are kept.
#[derive(Clone, Debug)]
pub struct ChunkParams {
    /// Which log of the cell the volumes belong to.
    pub group: GroupId,
    /// Memory for tables that need not be written, bytes.
    pub tables_bytes_max: usize,
    /// Most files that are kept open.
    pub files_max: usize,
}

impl Default for ChunkParams {
    fn default() -> ChunkParams {
        ChunkParams {
            group: GroupId(0),
            tables_bytes_max: 32 << 20,
            files_max: 512,
        }
    }
}

/// Why the chunk store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The disk is full. Nothing is lost: the same call may be made again later.
    #[error("no space left for chunks")]
    NoSpace,
    /// Another call has failed before.
    #[error("the chunk store cannot be used after this failure: {first}")]
    Poisoned {
        /// What failed first.
        first: String,
    },
    /// The store was not told of the volume.
    #[error("volume {0} does not exist here")]
    NoSuchVolume(VolumeId),
    /// A chunk image that is damaged or belongs to another chunk.
    #[error("chunk image is not valid: {0}")]
    BadImage(&'static str),
    /// A stored block is damaged.
    #[error("volume {volume}: block {block} is damaged")]
    BadBlock {
        /// Volume.
        volume: VolumeId,
        /// Block of the volume.
        block: u64,
    },
    /// The disk failed. Final for writes.
    #[error("chunk file {path}: {action} failed")]
    Io {
        /// Which file or directory.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl ChunkError {
    fn io(action: &'static str, path: &str, source: io::Error) -> ChunkError {
        if is_full(&source) {
            return ChunkError::NoSpace;
        }
        ChunkError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

/// Why blocks could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It would take a wait for the disk.
    #[error("the read would wait for the disk")]
    WouldBlock,
    /// A stored block is damaged. Another server has it.
    #[error("volume {volume}: block {block} is damaged")]
    BadBlock {
        /// Volume.
        volume: VolumeId,
        /// Block of the volume.
        block: u64,
    },
    /// The store was not told of the volume.
    #[error("volume {0} does not exist here")]
    NoSuchVolume(VolumeId),
    /// The disk failed.
    #[error("chunk file {path}: {action} failed")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl ReadError {
    fn io(action: &'static str, path: &str, source: io::Error) -> ReadError {
        ReadError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

impl From<ReadError> for ChunkError {
    fn from(error: ReadError) -> ChunkError {
        match error {
            ReadError::WouldBlock => ChunkError::io("read", "", io::ErrorKind::WouldBlock.into()),
            ReadError::BadBlock { volume, block } => ChunkError::BadBlock { volume, block },
            ReadError::NoSuchVolume(volume) => ChunkError::NoSuchVolume(volume),
            ReadError::Io {
                path,
                action,
                source,
            } => ChunkError::io(action, &path, source),
        }
    }
}

#[cfg(test)]
mod tests;
