//! The read threads.

use std::sync::Arc;

use pss_core::chunk::ChunkStore;
use pss_core::engine::{ClientId, Export, LogPage, VolumeRead};
use pss_core::log::{self, LogReadError, LogReader};
use pss_core::paxos;
use pss_core::types::{Ballot, ServerId, Slot};
use pss_core::wire::inspect::{
    EntryInfo, FilesInfo, INSPECT_CHUNKS_MAX, INSPECT_SEGMENTS_MAX, Inspection, OpenChunk,
    OpenVolume, SegmentInfo,
};

use crate::node::inbox::Event;
use crate::process;
use crate::storage::Reporter;
use crate::storage::queue::Queue;

/// What the read threads do.
pub(crate) enum ReadJob {
    /// Read blocks for a client.
    Blocks(VolumeRead),
    /// Read a chunk or blocks for another server.
    Export(Export),
    /// Read entries for another server.
    Log {
        /// Which.
        to: ServerId,
        /// After this slot.
        after: Slot,
        /// Up to this one.
        until: Slot,
        /// About so many bytes.
        bytes_max: usize,
        /// See [`pss_core::engine::Action::ReadLog`].
        tail_for: Option<Ballot>,
    },
    /// Read entries for someone who wants to see them.
    Entries {
        /// Who.
        client: ClientId,
        /// Of the request.
        tag: u64,
        /// Which.
        page: LogPage,
        /// What comes before them.
        newer: Vec<EntryInfo>,
    },
    /// See which files are open.
    Files {
        /// Who wants to know.
        client: ClientId,
        /// Of the request.
        tag: u64,
        /// What the node thread knows.
        volumes: Vec<OpenVolume>,
    },
}

/// The state of one of them.
pub(super) struct ReadThread {
    pub(super) queue: Arc<Queue<ReadJob>>,
    pub(super) reporter: Reporter,
    pub(super) chunks: Arc<ChunkStore>,
    pub(super) log: LogReader,
}

impl ReadThread {
    pub(super) fn run(self) {
        while let Ok(job) = self.queue.take(None) {
            if let Some(event) = self.perform(job) {
                self.reporter.inbox.push(event);
            }
        }
    }

    fn perform(&self, job: ReadJob) -> Option<Event> {
        match job {
            ReadJob::Blocks(read) => {
                let result = read.run(&self.chunks);
                if let Err(error) = &result {
                    tracing::error!(volume = read.volume.id.0, "a read failed: {error}");
                }
                Some(Event::Read { read, result })
            }
            ReadJob::Export(export) => {
                let exported = export.run(&self.chunks);
                Some(Event::Exported { export, exported })
            }
            ReadJob::Log {
                to,
                after,
                until,
                bytes_max,
                tail_for,
            } => {
                let read = self.read_log(after, until, bytes_max)?;
                Some(Event::LogRead { to, tail_for, read })
            }
            ReadJob::Entries {
                client,
                tag,
                page,
                newer,
            } => Some(Event::EntriesRead {
                client,
                tag,
                entries: self.entries(page, newer),
            }),
            ReadJob::Files {
                client,
                tag,
                volumes,
            } => Some(Event::Inspected {
                client,
                tag,
                inspection: Inspection::Files(self.files(volumes)),
            }),
        }
    }

    /// Adds the entries of a page, newest first.
    fn entries(&self, page: LogPage, mut entries: Vec<EntryInfo>) -> Vec<EntryInfo> {
        let older = self.log.headers(page.newest, page.oldest).into_iter();
        entries.extend(older.map(|(id, entry)| match entry {
            Some(entry) => EntryInfo::of(&entry),
            None => EntryInfo::damaged(id),
        }));
        entries
    }

    fn files(&self, volumes: Vec<OpenVolume>) -> FilesInfo {
        let (chunks_open, chunks_max, open) = self.chunks.open_files(INSPECT_CHUNKS_MAX);
        let segments = self.log.segments();
        let older = segments.len().saturating_sub(INSPECT_SEGMENTS_MAX);
        let segments = segments.into_iter().skip(older);
        let chunks = open.into_iter();
        FilesInfo {
            volumes,
            chunks: chunks
                .map(|(path, dirty)| OpenChunk { path, dirty })
                .collect(),
            chunks_open: chunks_open as u64,
            chunks_max: chunks_max as u64,
            segments: segments
                .map(|(path, first, bytes)| SegmentInfo { path, first, bytes })
                .collect(),
            descriptors: process::descriptors(),
            descriptors_max: process::descriptors_max(),
        }
    }

    /// None if there is nothing to give: the other server will ask someone else.
    fn read_log(&self, after: Slot, until: Slot, bytes_max: usize) -> Option<paxos::LogRead> {
        let mut result = self.log.read(after, until, bytes_max);
        if let Err(LogReadError::Damaged { slot, path }) = &result {
            tracing::error!(slot = slot.0, "log segment {path}: a record is damaged");
            // What lies before it can still be given.
            let last = Slot(slot.0.saturating_sub(1));
            if last <= after {
                return None;
            }
            result = self.log.read(after, last, bytes_max);
        }
        match result {
            Ok(log::LogRead::Entries { prev, entries }) => {
                Some(paxos::LogRead::Entries { prev, entries })
            }
            Ok(log::LogRead::Gone { first }) => Some(paxos::LogRead::Gone { first }),
            Err(error) => {
                tracing::error!("entries could not be read from the log: {error}");
                None
            }
        }
    }
}
