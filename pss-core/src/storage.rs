//! Everything that one server keeps on its disk: identity, checkpoint, log and chunks.
//!
//! * `pair` — a small record in two copies
//! * [`Identity`] — who the server is, what it has promised
//! * [`CheckpointFile`] — up to where the chunks are durable, and the replicated state there
//! * [`apply_entry`] — carries a chosen entry out
//! * [`Storage`] — opens all of it at start and brings the chunks up to date

mod apply;
mod checkpoint;
mod identity;
mod pair;

use std::sync::Arc;

pub use apply::{ApplyError, ChunkFilter, Stalled, apply_entry};
pub use checkpoint::{ALL_PROVEN, CheckpointFile, CheckpointRecord};
pub use identity::{Identity, IdentityFacts};
pub use pair::PairError;

use crate::chunk::{ChunkError, ChunkParams, ChunkStore};
use crate::disk::Disk;
use crate::entry::Entry;
use crate::log::{Log, LogError, LogParams, LogRead, LogReadError, Recovered};
use crate::state::{State, Volume};
use crate::types::{EntryId, Marks, ServerId, Slot};

/// Entries are read for replay in pieces of about this size.
const REPLAY_BYTES: usize = 8 << 20;
/// A start on a full disk removes so many files of what was deleted before it tries again to go on: it
/// shall not wait for all of many TiB.
const ROOM_NAMES: usize = 256;

/// How a server's files are kept, and whose they must be.
#[derive(Clone, Debug)]
pub struct StorageParams {
    /// The files must be of this server.
    pub server: ServerId,
    /// Log; its cell is the one that the files must be of.
    pub log: LogParams,
    /// Chunks.
    pub chunks: ChunkParams,
}

/// Why a server's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The identity or the checkpoint.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// The directory is of another cell.
    #[error("the data directory belongs to another cell")]
    OtherCell,
    /// The directory is of another server.
    #[error("the data directory belongs to server {found}, not to server {expected}")]
    OtherServer {
        /// Whose it is.
        found: ServerId,
        /// Whose it should be.
        expected: ServerId,
    },
    /// There are files in a directory that is to be formatted.
    #[error("the data directory is not empty: it holds {name}")]
    NotEmpty {
        /// One of them.
        name: String,
    },
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Reading the log back.
    #[error(transparent)]
    LogRead(#[from] LogReadError),
    /// The log ends before an entry that it should hold.
    #[error("the log does not hold the entry of slot {0}, which is to be applied again")]
    LogEnds(Slot),
    /// The chunks.
    #[error(transparent)]
    Chunks(#[from] ChunkError),
}

/// A server's files, opened and up to date.
pub struct Storage {
    /// Identity and promise.
    pub identity: Identity,
    /// Writes checkpoint records.
    pub checkpoint: CheckpointFile,
    /// The log, for the one thread that appends.
    pub log: Log,
    /// The chunks.
    pub chunks: Arc<ChunkStore>,
    /// The replicated state as of `applied`.
    pub state: State,
    /// The last entry that was applied: all that were known chosen, unless `stalled`.
    pub applied: EntryId,
    /// Slot of the last checkpoint.
    pub checkpointed: Slot,
    /// See [`CheckpointRecord::installing`].
    pub installing: Option<Slot>,
    /// See [`CheckpointRecord::marks`].
    pub marks: Marks,
    /// What the log held.
    pub recovered: Recovered,
    /// The disk was too full to go on applying after `applied`.
    pub stalled: Option<Stalled>,
}

impl Storage {
    /// Opens a server's files and applies what was known chosen and not in the last checkpoint.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn open(disk: Arc<dyn Disk>, params: &StorageParams) -> Result<Storage, StorageError> {
        let mut identity = Identity::open(Arc::clone(&disk))?;
        let facts = identity.facts();
        if facts.cell != params.log.cell || facts.group != params.log.group {
            return Err(StorageError::OtherCell);
        }
        if facts.server != params.server {
            return Err(StorageError::OtherServer {
                found: facts.server,
                expected: params.server,
            });
        }
        identity.finish_discarding(&disk)?;
        let (checkpoint, record) = CheckpointFile::open(Arc::clone(&disk))?;
        let (log, recovered) = Log::open(Arc::clone(&disk), params.log.clone(), record.applied)?;
        let volumes: Vec<Volume> = record.state.volumes().cloned().collect();
        let chunks = ChunkStore::open(disk, params.chunks.clone(), &volumes)?;
        let mut storage = Storage {
            identity,
            checkpoint,
            log,
            chunks: Arc::new(chunks),
            state: record.state,
            applied: record.applied,
            checkpointed: record.applied.slot,
            installing: record.installing,
            marks: record.marks,
            recovered,
            stalled: None,
        };
        storage.replay()?;
        Ok(storage)
    }

    /// Frees what was zeroed, and some of what was deleted. Says whether it is worth another try. (No
    /// record is stored: the state is between two entries.)
    fn make_room(&self, flushed: &mut bool) -> Result<bool, ChunkError> {
        if !std::mem::replace(flushed, true) {
            return match self.chunks.begin_checkpoint().map(|it| it.flush()) {
                None | Some(Ok(()) | Err(ChunkError::NoSpace)) => Ok(true),
                Some(Err(error)) => Err(error),
            };
        }
        if self.chunks.is_trash_empty() {
            return Ok(false);
        }
        // What cannot be removed gives no space.
        Ok(self.chunks.empty_trash(ROOM_NAMES).is_ok())
    }

    /// Applies the entries between the checkpoint and what is known chosen. While chunks are being
    /// copied that is right as well: what is missing is found by comparing with the other server.
    fn replay(&mut self) -> Result<(), StorageError> {
        let reader = self.log.reader();
        let until = self.recovered.chosen;
        for entry in std::mem::take(&mut self.recovered.replay) {
            if reader.id_at(entry.id.slot) != Some(entry.id) {
                break;
            }
            if !self.replay_entry(&entry)? {
                return Ok(());
            }
        }
        while self.applied.slot < until {
            let after = self.applied.slot;
            let entries = match reader.read(after, until, REPLAY_BYTES)? {
                LogRead::Entries { entries, .. } if !entries.is_empty() => entries,
                _ => return Err(StorageError::LogEnds(after.next())),
            };
            for entry in &entries {
                if !self.replay_entry(entry)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Applies an entry; `false` if the disk is too full.
    fn replay_entry(&mut self, entry: &Entry) -> Result<bool, StorageError> {
        let mut applied = apply_entry(&mut self.state, &self.chunks, entry, None).map(drop);
        let mut flushed = false;
        loop {
            match applied {
                Ok(()) => {
                    self.applied = entry.id;
                    return Ok(true);
                }
                Err(ApplyError::NoSpace(stalled)) => {
                    if !self.make_room(&mut flushed)? {
                        self.stalled = Some(*stalled);
                        return Ok(false);
                    }
                    let resumed = stalled.resume(&mut self.state, &self.chunks, None);
                    applied = resumed.map(drop);
                }
                Err(ApplyError::Chunks(error)) => return Err(error.into()),
            }
        }
    }
}
