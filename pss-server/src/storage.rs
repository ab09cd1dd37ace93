//! The threads that wait for the disk, so that the node thread never does.
//!
//! * the log thread appends to the log and makes promises durable, in order, as many at once as wait
//! * the checkpoint thread makes chunks durable and keeps log segments ready
//! * the trash thread removes the files of what was deleted
//! * the digest thread reads chunks that are compared with those of other servers
//! * the read threads read blocks, chunks and old entries that are not in memory
//!
//! Each takes jobs from a queue and reports to the node's [`Inbox`]. Whatever fails in a way that
//! leaves it open what is on disk is reported as [`Event::Failed`] and ends the server.

mod checkpoint;
mod digest;
mod log;
mod queue;
mod read;
mod trash;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;

use pss_core::chunk::ChunkStore;
use pss_core::disk::Disk;
use pss_core::log::Log;
use pss_core::storage::{CheckpointFile, Identity};

use crate::node::ServerError;
use crate::node::inbox::{Event, Inbox};
pub(crate) use crate::storage::checkpoint::CheckpointJob;
use crate::storage::checkpoint::CheckpointThread;
use crate::storage::digest::DigestThread;
pub(crate) use crate::storage::digest::{ScrubJob, read_position as read_scrub_position};
pub(crate) use crate::storage::log::LogJob;
use crate::storage::log::LogThread;
use crate::storage::queue::Queue;
pub(crate) use crate::storage::read::ReadJob;
use crate::storage::read::ReadThread;
use crate::storage::trash::TrashThread;

/// Threads that wait for reads: one that sends chunks to a server does not hold up the clients' reads.
const READ_THREADS: usize = 2;

/// The running threads. They end when this is dropped.
pub(crate) struct StorageThreads {
    log: Arc<Queue<LogJob>>,
    reads: Arc<Queue<ReadJob>>,
    checkpoints: Arc<Queue<CheckpointJob>>,
    digests: Arc<Queue<ScrubJob>>,
    trash: Arc<Queue<Infallible>>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads work on.
pub(crate) struct Parts {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) log: Log,
    pub(crate) identity: Identity,
    pub(crate) checkpoint: CheckpointFile,
    pub(crate) chunks: Arc<ChunkStore>,
    /// The data directory.
    pub(crate) directory: PathBuf,
    /// See [`LogThread::chosen`].
    pub(crate) chosen: Arc<AtomicU64>,
    /// See [`LogThread::log_bytes_max`].
    pub(crate) log_bytes_max: u64,
}

impl StorageThreads {
    /// Starts the threads.
    pub(crate) fn start(
        parts: Parts,
        inbox: &Arc<Inbox>,
        span: &tracing::Span,
    ) -> io::Result<StorageThreads> {
        let mut threads = StorageThreads {
            log: Arc::new(Queue::new()),
            reads: Arc::new(Queue::new()),
            checkpoints: Arc::new(Queue::new()),
            digests: Arc::new(Queue::new()),
            trash: Arc::new(Queue::new()),
            threads: Vec::new(),
        };
        let reporter = Reporter {
            inbox: Arc::clone(inbox),
            span: span.clone(),
        };
        for _ in 0..READ_THREADS {
            let read = ReadThread {
                queue: Arc::clone(&threads.reads),
                reporter: reporter.clone(),
                chunks: Arc::clone(&parts.chunks),
                log: parts.log.reader(),
            };
            threads.spawn("read", &reporter, move || read.run())?;
        }
        let digest = DigestThread {
            queue: Arc::clone(&threads.digests),
            reporter: reporter.clone(),
            chunks: Arc::clone(&parts.chunks),
            directory: parts.directory,
        };
        threads.spawn("digest", &reporter, move || digest.run())?;
        let trash = TrashThread {
            queue: Arc::clone(&threads.trash),
            chunks: parts.chunks,
        };
        threads.spawn("trash", &reporter, move || trash.run())?;
        let checkpoint = CheckpointThread {
            queue: Arc::clone(&threads.checkpoints),
            reporter: reporter.clone(),
            file: parts.checkpoint,
            spares: parts.log.spares(),
        };
        threads.spawn("checkpoint", &reporter, move || checkpoint.run())?;
        let log = LogThread {
            queue: Arc::clone(&threads.log),
            reporter: reporter.clone(),
            disk: parts.disk,
            log: parts.log,
            identity: parts.identity,
            chosen: parts.chosen,
            log_bytes_max: parts.log_bytes_max,
            free_bytes: 0,
        };
        threads.spawn("log", &reporter, move || log.run())?;
        Ok(threads)
    }

    fn spawn(
        &mut self,
        thread: &'static str,
        reporter: &Reporter,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let Reporter { inbox, span } = reporter.clone();
        let builder = std::thread::Builder::new().name(format!("pssd-{thread}"));
        self.threads.push(builder.spawn(move || {
            let _watch = Watch { inbox, thread };
            let _span = span.enter();
            work();
        })?);
        Ok(())
    }

    /// Gives jobs to the log thread, in order.
    pub(crate) fn log(&self, jobs: impl IntoIterator<Item = LogJob>) {
        self.log.push_all(jobs);
    }

    pub(crate) fn read(&self, job: ReadJob) {
        self.reads.push(job);
    }

    pub(crate) fn digest(&self, job: ScrubJob) {
        self.digests.push(job);
    }

    pub(crate) fn checkpoint(&self, job: CheckpointJob) {
        self.checkpoints.push(job);
    }

    /// Lets the log thread finish what it has, and ends the others.
    pub(crate) fn finish(self) {
        self.log.push(LogJob::Finish);
        self.log.close();
    }
}

impl Drop for StorageThreads {
    fn drop(&mut self) {
        self.reads.abandon();
        self.checkpoints.abandon();
        self.digests.abandon();
        self.trash.abandon();
        if !self.log.is_closed() {
            self.log.abandon();
        }
        for thread in self.threads.drain(..) {
            // A panic was reported by its `Watch`.
            let _ = thread.join();
        }
    }
}

/// What the threads have in common.
#[derive(Clone)]
struct Reporter {
    inbox: Arc<Inbox>,
    span: tracing::Span,
}

impl Reporter {
    fn failed(&self, error: impl Into<ServerError>) {
        self.inbox.push(Event::Failed(error.into()));
    }
}

/// Tells the node thread if the thread that holds it panics.
struct Watch {
    inbox: Arc<Inbox>,
    thread: &'static str,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.inbox.push(Event::Failed(ServerError::Panicked {
                thread: self.thread,
            }));
        }
    }
}
