//! The digest thread: reads chunks that are compared with those of other servers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use pss_core::chunk::ChunkStore;
use pss_core::engine::{DigestJob, ScrubPosition};

use crate::node::inbox::Event;
use crate::storage::Reporter;
use crate::storage::queue::Queue;

/// Lower than everybody else's; the scale is that of nice(1).
const NICENESS: libc::c_int = 10;

/// Where the scrub is, in the data directory. That it may be lost does no harm: the scrub then begins anew.
const POSITION: &str = "scrub.json";

/// What the thread does.
pub(crate) enum ScrubJob {
    /// Read chunks.
    Digest(DigestJob),
    /// Note where the scrub is.
    Note(ScrubPosition),
}

/// Where the scrub was when the server last ran.
pub(crate) fn read_position(directory: &Path) -> ScrubPosition {
    let text = fs::read(directory.join(POSITION)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn write_position(directory: &Path, position: &ScrubPosition) -> io::Result<()> {
    let new = directory.join(format!("{POSITION}.new"));
    fs::write(&new, serde_json::to_vec(position)?)?;
    fs::rename(&new, directory.join(POSITION))
}

/// The thread's state. It has a thread of its own so that reads of clients and other servers do not wait for it.
pub(super) struct DigestThread {
    pub(super) queue: Arc<Queue<ScrubJob>>,
    pub(super) reporter: Reporter,
    pub(super) chunks: Arc<ChunkStore>,
    pub(super) directory: PathBuf,
}

impl DigestThread {
    pub(super) fn run(self) {
        be_nice();
        while let Ok(job) = self.queue.take(None) {
            match job {
                ScrubJob::Digest(job) => {
                    let part = job.run(&self.chunks);
                    self.reporter.inbox.push(Event::Digested { job, part });
                }
                ScrubJob::Note(position) => {
                    if let Err(error) = write_position(&self.directory, &position) {
                        tracing::debug!("where the scrub is could not be noted: {error}");
                    }
                }
            }
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
