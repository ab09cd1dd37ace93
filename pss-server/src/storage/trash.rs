//! The trash thread: removes the files of deleted volumes and zeroed chunks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pss_core::chunk::{ChunkError, ChunkStore};

use crate::storage::queue::{Queue, Waited};

/// How often it is looked whether there is something to remove.
const IDLE: Duration = Duration::from_secs(1);
/// So long files are removed at a time. Then the thread rests for as long as that took, because file
/// systems make removals and the syncs of log and chunks wait for each other.
const STEP: Duration = Duration::from_millis(10);
/// It rests no longer than that: a disk on which a removal takes so long may well be full.
const REST_MAX: Duration = Duration::from_millis(100);

/// The thread's state. Nobody waits for it: it has its own thread so that checkpoints need not, and a stop
/// waits for the removal of one file at most. The next start finds what is left.
pub(super) struct TrashThread {
    /// Only ever closed.
    pub(super) queue: Arc<Queue<Infallible>>,
    pub(super) chunks: Arc<ChunkStore>,
}

impl TrashThread {
    pub(super) fn run(self) {
        let mut warned = false;
        loop {
            let start = Instant::now();
            let done = self.remove_some(start);
            if let Err(error) = &done
                && !warned
            {
                tracing::warn!("deleted files could not be removed: {error}");
            }
            warned = done.is_err();
            let rest = match done {
                Ok(true) => start.elapsed().min(REST_MAX),
                Ok(false) | Err(_) => IDLE,
            };
            if let Err(Waited::Closed) = self.queue.take(Some(rest)) {
                return;
            }
        }
    }

    /// Removes files for a while. Says whether there are more.
    fn remove_some(&self, start: Instant) -> Result<bool, ChunkError> {
        while !self.queue.is_closed() && start.elapsed() < STEP {
            if !self.chunks.empty_trash(1)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
