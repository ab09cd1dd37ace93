//! Compares what servers hold, and repairs what differs.
//!
//! *Points.* Whoever leads asks every server, itself too, for digests of chunks as they are after the entry of one slot
//! ([`PointRequest`]). The slot is one that is not proposed yet, so nobody has applied it; the leader then proposes something, and each
//! server takes its point ([`ChunkStore::take_point`]) when it has applied that entry and before the next. So digests are of equal slots
//! however far servers lag, and nothing waits for them. Who missed the question, or was started anew meanwhile, refuses, and all are asked
//! for a later slot. Nothing of this is in the log.
//!
//! *Differences.* Damaged blocks, which do not match their checksums, are repaired as any others ([`super::repair`]). A chunk whose blocks all match
//! and that is not what others hold was silently lost or misdirected, together with its checksums. If more than half of all servers of the cell hold the
//! same, the others shall replace theirs by the chunk of one of them ([`MendRequest`]); if not, it is only reported, for nobody knows who is right.
//!
//! *Mending.* The server asks for the chunk, as new as what it has applied, and takes it when it has applied all that the chunk holds, if no entry has meant
//! that chunk since it asked ([`Watch`]): then what the other one sent is what entries have made of the chunk, here too. Else it asks again.
//!
//! Both is asked for again and again by whoever wants it, so lost messages, and servers that are started anew, need no further care.

mod background;
mod mend;
mod survey;
mod task;

use std::sync::Arc;

use crate::chunk::{ChunkDigest, ChunkStore, Point, PointFailure};
use crate::engine::{Engine, SyncMessage};
use crate::time::Instant;
use crate::types::{ServerId, Slot};

pub(super) use background::Background;
pub use background::{ScrubPosition, ScrubStatus};
pub(super) use mend::Mends;
pub(super) use survey::Surveys;
pub(super) use task::Tasks;

/// Chunks that are read at once before other questions have their turn.
const CHUNKS_AT_ONCE: usize = 4;

/// What comparing has found since the start, on this server.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ScrubCounts {
    /// Chunks that were not the same on all servers, as the leader found.
    pub different: u64,
    /// Chunks here that were replaced by what the majority holds,
    pub mended: u64,
    /// and blocks in them.
    pub mended_blocks: u64,
    /// Chunks for which there was no majority, as the leader found.
    pub undecided: u64,
}

/// A deliberate bug, for the tests of the tests.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ScrubBug {
    /// Repairs from the minority.
    Minority,
    /// Compares digests of different slots.
    OtherSlots,
    /// Replaces a chunk that was written to meanwhile.
    Unwatched,
    /// Takes whoever comes first for the majority.
    Undecided,
}

/// What is compared, on the side that asks and on the side that answers.
pub(super) struct Scrub {
    pub(super) tasks: Tasks,
    pub(super) surveys: Surveys,
    pub(super) mends: Mends,
    pub(super) background: Background,
    pub(super) counts: ScrubCounts,
    pub(super) bug: Option<ScrubBug>,
}

impl Scrub {
    pub(super) fn new() -> Scrub {
        Scrub {
            tasks: Tasks::default(),
            surveys: Surveys::default(),
            mends: Mends::default(),
            background: Background::default(),
            counts: ScrubCounts::default(),
            bug: None,
        }
    }

    /// When there is something to do.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let tasks = self.tasks.next_at().into_iter();
        let others = self
            .surveys
            .next_at()
            .into_iter()
            .chain(self.mends.next_at());
        let background = self.background.next_at().into_iter();
        tasks.chain(others).chain(background).min()
    }
}

/// Chunks to be read for a point.
pub struct DigestJob {
    id: u64,
    at: Slot,
    point: Arc<Point>,
    chunks_max: usize,
}

/// What came of a [`DigestJob`].
#[derive(Debug)]
pub struct DigestPart {
    chunks: Vec<ChunkDigest>,
    failure: Option<PointFailure>,
}

impl DigestJob {
    /// Reads, waiting for the device. Report the result with [`Engine::handle_digested`].
    pub fn run(&self, chunks: &ChunkStore) -> DigestPart {
        let mut part = DigestPart {
            chunks: Vec::new(),
            failure: self.point.failure(),
        };
        while part.failure.is_none()
            && part.chunks.len() < self.chunks_max
            && let Some(index) = self.point.next()
        {
            match chunks.digest_chunk(&self.point, index) {
                Ok(digest) => part.chunks.push(digest),
                Err(failure) => part.failure = Some(failure),
            }
        }
        part
    }
}

impl Engine {
    /// What comparing has found.
    pub fn scrub_counts(&self) -> ScrubCounts {
        self.scrub.counts
    }

    /// Makes comparisons misbehave: deliberate bugs, for the tests of the tests.
    #[doc(hidden)]
    pub fn inject_scrub_bug(&mut self, bug: ScrubBug) {
        self.scrub.bug = Some(bug);
    }

    pub(super) fn on_scrub(&mut self, now: Instant, from: ServerId, message: SyncMessage) {
        match message {
            SyncMessage::TakePoint(request) => self.point_asked(now, from, request),
            SyncMessage::Point(answer) => self.point_answered(now, from, answer),
            SyncMessage::Mend(request) => self.mend_asked(now, from, request),
            SyncMessage::Mended(answer) => self.mend_answered(now, from, answer),
            _ => {}
        }
    }

    /// Goes on with whatever is under way.
    pub(super) fn pump_scrub(&mut self, now: Instant) {
        self.pump_tasks(now);
        self.pump_surveys(now);
        self.pump_mends(now);
        self.pump_background(now);
    }
}

#[cfg(test)]
mod tests;
