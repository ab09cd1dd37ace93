//! The checkpoint thread.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pss_core::chunk::ChunkError;
use pss_core::engine::Checkpoint;
use pss_core::log::Spares;
use pss_core::storage::CheckpointFile;
use pss_core::types::{EntryId, Marks, Slot};

use crate::node::ServerError;
use crate::node::inbox::Event;
use crate::storage::Reporter;
use crate::storage::queue::{Queue, Waited};

/// How often it is looked whether log segments are needed.
const CHORES: Duration = Duration::from_secs(1);

/// What the checkpoint thread does.
pub(crate) enum CheckpointJob {
    /// Flush the chunks and store the record.
    Checkpoint(Checkpoint),
    /// Store the state from which a copy of another server's chunks starts.
    StoreBase {
        base: EntryId,
        proven: Slot,
        marks: Marks,
        state: Bytes,
    },
}

/// The thread's state.
pub(super) struct CheckpointThread {
    pub(super) queue: Arc<Queue<CheckpointJob>>,
    pub(super) reporter: Reporter,
    pub(super) file: CheckpointFile,
    pub(super) spares: Arc<Spares>,
}

impl CheckpointThread {
    pub(super) fn run(mut self) {
        let mut warned = false;
        loop {
            match self.queue.take(Some(CHORES)) {
                Ok(job) => match self.perform(job) {
                    Ok(event) => self.reporter.inbox.push(event),
                    Err(error) => return self.reporter.failed(error),
                },
                Err(Waited::Closed) => return,
                Err(_) => self.chores(&mut warned),
            }
        }
    }

    fn perform(&mut self, job: CheckpointJob) -> Result<Event, ServerError> {
        match job {
            CheckpointJob::Checkpoint(checkpoint) => {
                let Checkpoint {
                    applied,
                    state,
                    installing,
                    marks,
                    flush_only,
                    chunks,
                } = checkpoint;
                match chunks.flush() {
                    Ok(()) => {}
                    Err(ChunkError::NoSpace) => {
                        // The log keeps everything until a later one succeeds.
                        tracing::error!(
                            slot = applied.slot.0,
                            "no checkpoint: the disk is full; free some space on it"
                        );
                        return Ok(Event::CheckpointDone(Slot(0)));
                    }
                    Err(error) => return Err(error.into()),
                }
                if flush_only {
                    return Ok(Event::CheckpointDone(Slot(0)));
                }
                self.file.store(applied, installing, &marks, &state)?;
                Ok(Event::CheckpointDone(applied.slot))
            }
            CheckpointJob::StoreBase {
                base,
                proven,
                marks,
                state,
            } => {
                self.file.store(base, Some(proven), &marks, &state)?;
                Ok(Event::BaseStored)
            }
        }
    }

    /// Work that can wait and that may fail: without a spare segment the log makes one itself.
    fn chores(&self, warned: &mut bool) {
        let done = self.spares.prepare();
        if let Err(error) = &done
            && !*warned
        {
            tracing::warn!("no log segment could be made ready: {error}");
        }
        *warned = done.is_err();
    }
}
