//! The digest thread: reads chunks that are compared with those of other servers.

use std::sync::Arc;

use pss_core::chunk::ChunkStore;
use pss_core::engine::DigestJob;

use crate::node::inbox::Event;
use crate::storage::Reporter;
use crate::storage::queue::Queue;

/// Lower than everybody else's; the scale is that of nice(1).
const NICENESS: libc::c_int = 10;

/// The thread's state. It has a thread of its own so that reads of clients and other servers do not wait for it.
pub(super) struct DigestThread {
    pub(super) queue: Arc<Queue<DigestJob>>,
    pub(super) reporter: Reporter,
    pub(super) chunks: Arc<ChunkStore>,
}

impl DigestThread {
    pub(super) fn run(self) {
        be_nice();
        while let Ok(job) = self.queue.take(None) {
            let part = job.run(&self.chunks);
            self.reporter.inbox.push(Event::Digested { job, part });
        }
    }
}

/// Gives this thread a low priority, for the processor and, as the kernel derives it from that (ioprio_set(2)), for the disk. That it
/// cannot be had does no harm.
#[expect(unsafe_code, reason = "std does not set priorities")]
fn be_nice() {
    // SAFETY: the call takes no pointers; on Linux it is about the calling thread only (setpriority(2)).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}
