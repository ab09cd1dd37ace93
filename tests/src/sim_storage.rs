//! What the threads of a server do with its files, done by the simulator.

use std::collections::BTreeMap;
use std::sync::Arc;

use pss_core::chunk::{ChunkParams, ChunkStore};
use pss_core::disk::Disk;
use pss_core::engine::Checkpoint;
use pss_core::log::{Log, LogParams};
use pss_core::paxos::output::{Persist, WriteId};
use pss_core::paxos::{LogRead, Recovered};
use pss_core::state::Volume;
use pss_core::storage::{
    CheckpointFile, Identity, IdentityFacts, Storage, StorageError, StorageParams,
};
use pss_core::types::{Ballot, EntryId, GroupId, Incarnation, Marks, ServerId, Slot};
use pss_core::volume::device::ReadPart;

use crate::disk::SimDisk;

const CELL: [u8; 16] = *b"simulated cell!!";
/// Small, so that segments end, are recycled and trimmed in a short run.
const SEGMENT_BYTES: u64 = 256 << 10;
/// The trash is emptied so slowly that a crash finds some.
const TRASH_NAMES: usize = 3;

fn params(server: ServerId) -> StorageParams {
    let mut log = LogParams::new(CELL);
    log.segment_bytes = SEGMENT_BYTES;
    log.retain_bytes = 2 * SEGMENT_BYTES;
    log.spares = 1;
    let chunks = ChunkParams {
        tables_bytes_max: 8 << 10,
        files_max: 8,
        ..ChunkParams::default()
    };
    StorageParams {
        server,
        log,
        chunks,
    }
}

/// Makes an empty data directory; `rejoining`: to replace another.
///
/// # Errors
/// As [`Identity::create`].
pub(crate) fn format(
    disk: &SimDisk,
    server: ServerId,
    incarnation: Incarnation,
    rejoining: bool,
) -> Result<(), StorageError> {
    let facts = IdentityFacts {
        group: GroupId(0),
        cell: CELL,
        server,
        incarnation,
        promised: Ballot::default(),
        rejoining,
        discards: false,
    };
    let disk: Arc<dyn Disk> = disk.disk();
    Identity::create(disk, facts, false).map(|_| ())
}

/// Opens a data directory.
///
/// # Errors
/// As [`Storage::open`].
pub(crate) fn open(disk: &SimDisk, server: ServerId) -> Result<Storage, StorageError> {
    let disk: Arc<dyn Disk> = disk.disk();
    Storage::open(disk, &params(server))
}

/// What the agreement is told of a directory that was opened.
pub(crate) fn recovered(storage: &Storage) -> Recovered {
    let applied = storage.applied;
    let tail = storage.recovered.tail.iter();
    Recovered {
        promised: storage.identity.facts().promised,
        applied,
        tail: tail
            .filter(|entry| entry.id.slot > applied.slot)
            .cloned()
            .collect(),
        chosen: storage.recovered.chosen,
        evidence: storage.recovered.evidence,
        doubt: storage.recovered.doubt,
        log_first: storage.log.first_slot(),
        installing: storage.installing,
        rejoining: storage.identity.facts().rejoining,
        admitted: *storage.state.admitted(),
        members: storage.state.members().cloned(),
        marks: storage.marks.clone(),
    }
}

/// Ids of the entries that the log holds, after the one before its first.
pub(crate) fn ids(storage: &Storage) -> BTreeMap<Slot, EntryId> {
    let mut ids = BTreeMap::from([(storage.applied.slot, storage.applied)]);
    let last = storage.log.last();
    ids.insert(last.slot, last);
    ids.extend(
        storage
            .recovered
            .tail
            .iter()
            .map(|entry| (entry.id.slot, entry.id)),
    );
    let mut after = Slot(storage.log.first_slot().0 - 1);
    let reader = storage.log.reader();
    while let Ok(LogRead::Entries { prev, entries }) = reader.read(after, last.slot, 1 << 20) {
        ids.insert(prev.slot, prev);
        let Some(end) = entries.last() else { break };
        after = end.id.slot;
        ids.extend(entries.iter().map(|entry| (entry.id.slot, entry.id)));
    }
    ids
}

/// The files of a running server.
pub(crate) struct Parts {
    identity: Identity,
    checkpoint: CheckpointFile,
    log: Log,
    disk: Arc<dyn Disk>,
    /// The chunks.
    pub(crate) chunks: Arc<ChunkStore>,
}

impl Parts {
    /// Takes an opened directory apart.
    pub(crate) fn new(storage: Storage, disk: Arc<dyn Disk>) -> Parts {
        let Storage {
            identity,
            checkpoint,
            log,
            chunks,
            ..
        } = storage;
        Parts {
            identity,
            checkpoint,
            log,
            disk,
            chunks,
        }
    }

    /// What the log thread does with all that is queued.
    ///
    /// # Errors
    /// What failed; the server must stop.
    pub(crate) fn persist(&mut self, batch: &[(WriteId, Persist)]) -> Result<(), String> {
        let mut at = 0;
        while at < batch.len() {
            let appends: Vec<_> = batch[at..]
                .iter()
                .map_while(|(_, what)| match what {
                    Persist::Append {
                        truncate_after,
                        entries,
                        chosen,
                    } => Some((*truncate_after, &entries[..], *chosen)),
                    _ => None,
                })
                .collect();
            if !appends.is_empty() {
                let count = appends.len();
                self.log
                    .append_many(appends)
                    .map_err(|error| error.to_string())?;
                at += count;
                continue;
            }
            match &batch[at].1 {
                Persist::Promise(ballot) => {
                    self.identity
                        .set_promise(*ballot)
                        .map_err(|error| error.to_string())?;
                }
                Persist::Rejoining(life) => {
                    self.identity
                        .set_rejoining(*life)
                        .map_err(|error| error.to_string())?;
                }
                Persist::Reset { base } => {
                    self.log.reset(*base).map_err(|error| error.to_string())?;
                }
                Persist::Append { .. } => {}
            }
            at += 1;
        }
        Ok(())
    }

    /// What the log thread does when it has been idle.
    ///
    /// # Errors
    /// What failed; the server must stop.
    pub(crate) fn mark_idle(&mut self, chosen: Slot) -> Result<(), String> {
        let chosen = chosen.min(self.log.last().slot);
        self.log
            .mark_idle(chosen)
            .map_err(|error| error.to_string())
    }

    /// See [`Log::end`].
    pub(crate) fn log_end(&self) -> (String, u64) {
        let (path, end) = self.log.end();
        (path.to_owned(), end)
    }

    /// What the checkpoint thread does.
    ///
    /// # Errors
    /// What failed; the server must stop.
    pub(crate) fn checkpoint(&mut self, checkpoint: Checkpoint) -> Result<(), String> {
        checkpoint
            .chunks
            .flush()
            .map_err(|error| error.to_string())?;
        // The trash thread goes on meanwhile.
        self.chunks
            .empty_trash(TRASH_NAMES)
            .map_err(|error| error.to_string())?;
        let Checkpoint {
            applied,
            installing,
            marks,
            state,
            flush_only,
            ..
        } = checkpoint;
        if flush_only {
            return Ok(());
        }
        self.checkpoint
            .store(applied, installing, &marks, &state)
            .map_err(|error| error.to_string())
    }

    /// Stores the base for copying chunks.
    ///
    /// # Errors
    /// What failed; the server must stop.
    pub(crate) fn store_base(
        &mut self,
        base: EntryId,
        proven: Slot,
        marks: &Marks,
        state: &[u8],
    ) -> Result<(), String> {
        self.checkpoint
            .store(base, Some(proven), marks, state)
            .map_err(|error| error.to_string())
    }

    /// Trims the log behind a checkpoint.
    ///
    /// # Errors
    /// What failed; the server must stop.
    pub(crate) fn trim(&mut self, below: Slot) -> Result<(), String> {
        self.log.trim(below).map_err(|error| error.to_string())
    }

    /// Reads entries for a server that lags. A damaged record cannot be given: it counts as gone.
    pub(crate) fn read_log(&self, after: Slot, until: Slot, bytes_max: usize) -> LogRead {
        let read = self.log.reader().read(after, until, bytes_max);
        read.unwrap_or(LogRead::Gone {
            first: until.next(),
        })
    }

    /// Free space, the first slot of the log, and its size.
    pub(crate) fn facts(&self) -> (u64, Slot, u64) {
        let free = self.disk.space().map_or(0, |(free, _)| free);
        (free, self.log.first_slot(), self.log.kept_bytes())
    }
}

/// A volume's bytes.
///
/// # Errors
/// Which block cannot be read.
pub(crate) fn contents(chunks: &ChunkStore, volume: &Volume) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let parts = chunks.read(volume, 0, volume.blocks(), false);
    for part in parts.map_err(|error| error.to_string())? {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(&data),
            ReadPart::Hole(length) => bytes.resize(bytes.len() + length as usize, 0),
        }
    }
    Ok(bytes)
}
