//! Replaces a chunk that is not what the majority holds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::ScrubBug;
use crate::chunk::{ChunkError, ChunkImage, Watch};
use crate::engine::{Action, Engine};
use crate::paxos::message::{Message, SyncMessage};
use crate::throttle::Throttle;
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, ChunkIndex, ServerId, Slot, VolumeId};
use crate::wire::survey::{MendAnswer, MendRequest};

/// Chunks that are mended at once: their images are held in memory.
const AT_ONCE: usize = 2;
/// Those that are remembered, so that the answer can be given again.
const KEPT_MAX: usize = 64;
/// Who has not asked for so long has lost interest.
const INTEREST: Duration = Duration::from_secs(30);
/// A server that has not sent the chunk in this time is asked again.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(2);
/// After a refusal, or after the chunk was written to.
const RETRY: Duration = Duration::from_millis(100);
/// How often it is looked whether all is applied that a chunk holds.
const LOOK: Duration = Duration::from_millis(10);
/// Lines each 10 s.
const LINES_MAX: u32 = 50;

pub(in crate::engine) struct Mends {
    list: Vec<Mend>,
    lines: Throttle,
}

impl Default for Mends {
    fn default() -> Mends {
        Mends {
            list: Vec::new(),
            lines: Throttle::new(LINES_MAX),
        }
    }
}

struct Mend {
    request: MendRequest,
    asked: Instant,
    stage: Stage,
}

enum Stage {
    /// To be asked for at that time.
    Ready(Instant),
    Asked {
        watch: Arc<Watch>,
        /// What was applied here.
        applied: Slot,
        until: Instant,
    },
    /// It came, and waits until everything is applied that it holds.
    Held {
        watch: Arc<Watch>,
        image: ChunkImage,
        applied: Slot,
        look_at: Instant,
    },
    Done(u32),
}

impl Mends {
    pub(super) fn next_at(&self) -> Option<Instant> {
        let each = self.list.iter().map(|mend| match &mend.stage {
            Stage::Ready(at) | Stage::Asked { until: at, .. } => *at,
            Stage::Held { look_at, .. } => *look_at,
            Stage::Done(_) => mend.asked + INTEREST,
        });
        each.min()
    }

    fn under_way(&self) -> usize {
        let is = |mend: &&Mend| !matches!(mend.stage, Stage::Done(_));
        self.list.iter().filter(is).count()
    }
}

impl Engine {
    /// Another server asks.
    pub(super) fn mend_asked(&mut self, now: Instant, from: ServerId, request: MendRequest) {
        let answer = SyncMessage::Mended(self.mend(now, request));
        self.actions.push_back(Action::Send {
            to: from,
            message: Message::Sync(answer),
        });
    }

    /// How far it is; it is begun if it was not.
    pub(super) fn mend(&mut self, now: Instant, request: MendRequest) -> MendAnswer {
        let MendRequest { id, at, chunk, .. } = request;
        let known = self.scrub.mends.list.iter_mut();
        let known = known.into_iter().find(|mend| mend.request == request);
        let blocks = match known {
            Some(mend) => {
                mend.asked = now;
                match mend.stage {
                    Stage::Done(blocks) => Some(blocks),
                    _ => None,
                }
            }
            None => {
                self.begin_mend(now, request);
                None
            }
        };
        MendAnswer {
            id,
            at,
            chunk,
            blocks,
        }
    }

    fn begin_mend(&mut self, now: Instant, request: MendRequest) {
        let is_peer = self.replica.peers().any(|(id, _)| id == request.from);
        let fits = self.volumes.get(&request.volume).is_some_and(|volume| {
            let chunks = volume.size_bytes.div_ceil(u64::from(volume.chunk_bytes));
            u64::from(request.chunk.0) < chunks
        });
        let is_full = self.scrub.mends.under_way() >= AT_ONCE;
        if !is_peer || !fits || is_full || !self.is_complete() || self.state.applied() < request.at
        {
            return;
        }
        if self.scrub.mends.list.len() >= KEPT_MAX {
            let is_done = |mend: &Mend| matches!(mend.stage, Stage::Done(_));
            if let Some(old) = self.scrub.mends.list.iter().position(is_done) {
                self.scrub.mends.list.remove(old);
            }
        }
        self.scrub.mends.list.push(Mend {
            request,
            asked: now,
            stage: Stage::Ready(now),
        });
        self.pump_mends(now);
    }

    pub(super) fn pump_mends(&mut self, now: Instant) {
        let mut list = std::mem::take(&mut self.scrub.mends.list);
        for mend in &mut list {
            self.pump_mend(now, mend);
        }
        let gone = |mend: &mut Mend| now.since(mend.asked) >= INTEREST;
        for mend in list.extract_if(.., gone) {
            self.end_watch_of(&mend.stage);
        }
        self.scrub.mends.list = list;
    }

    fn end_watch_of(&self, stage: &Stage) {
        if let Stage::Asked { watch, .. } | Stage::Held { watch, .. } = stage {
            self.chunks.end_watch(watch);
        }
    }

    fn pump_mend(&mut self, now: Instant, mend: &mut Mend) {
        if !self.is_complete() {
            self.end_watch_of(&mend.stage);
            mend.stage = Stage::Ready(now + RETRY);
            return;
        }
        match &mut mend.stage {
            Stage::Asked { watch, until, .. } if now >= *until => {
                self.chunks.end_watch(watch);
                mend.stage = Stage::Ready(now);
            }
            Stage::Held { applied, .. } if *applied > self.state.applied() => {
                if let Stage::Held { look_at, .. } = &mut mend.stage {
                    *look_at = now + LOOK;
                }
            }
            Stage::Held { watch, image, .. } => {
                self.chunks.end_watch(watch);
                let is_late = watch.has_changed() && self.scrub.bug != Some(ScrubBug::Unwatched);
                mend.stage = match is_late {
                    true => Stage::Ready(now),
                    false => match self.put_in_place(now, &mend.request, image) {
                        Some(blocks) => Stage::Done(blocks),
                        None => Stage::Ready(now + RETRY),
                    },
                };
            }
            _ => {}
        }
        if let Stage::Ready(at) = mend.stage
            && now >= at
        {
            let MendRequest {
                volume,
                chunk,
                from,
                ..
            } = mend.request;
            let applied = self.state.applied();
            mend.stage = Stage::Asked {
                watch: self.chunks.watch(volume, chunk),
                applied,
                until: now + CHUNK_TIMEOUT,
            };
            self.actions.push_back(Action::Send {
                to: from,
                message: Message::Sync(SyncMessage::RequestChunk {
                    at_least: applied,
                    volume,
                    chunk,
                }),
            });
        }
    }

    /// A chunk has come; `false` if it is not for us.
    pub(in crate::engine) fn take_mend_chunk(
        &mut self,
        now: Instant,
        from: ServerId,
        as_of: Slot,
        name: (VolumeId, ChunkIndex),
        image: &Bytes,
    ) -> bool {
        let last = self.replica.last().slot;
        let volume = self.volumes.get(&name.0).cloned();
        let mut mends = self.scrub.mends.list.iter_mut();
        let ours = |mend: &&mut Mend| {
            let MendRequest { volume, chunk, .. } = mend.request;
            let is_asked = matches!(mend.stage, Stage::Asked { .. });
            (volume, chunk, mend.request.from) == (name.0, name.1, from) && is_asked
        };
        let (Some(mend), Some(volume)) = (mends.find(ours), volume) else {
            return false;
        };
        let Stage::Asked { watch, applied, .. } = &mend.stage else {
            return false;
        };
        let read = self.chunks.read_image(&volume, name.1, image);
        mend.stage = match read {
            Ok(read) if as_of >= *applied => Stage::Held {
                watch: Arc::clone(watch),
                applied: match image.is_empty() {
                    // Removed by an entry that may not be applied here; whatever it is, it is in our log by now.
                    true => last,
                    false => read.last_slot,
                },
                image: read,
                look_at: now,
            },
            _ => {
                self.chunks.end_watch(watch);
                Stage::Ready(now + RETRY)
            }
        };
        self.pump_mends(now);
        true
    }

    /// A server cannot give a chunk; it does not say which.
    pub(in crate::engine) fn mend_refused(&mut self, now: Instant, from: ServerId) {
        for mend in &mut self.scrub.mends.list {
            if let Stage::Asked { until, .. } = &mut mend.stage
                && mend.request.from == from
            {
                *until = (*until).min(now + RETRY);
            }
        }
    }

    /// How many blocks were otherwise; none if it has to be tried again.
    fn put_in_place(
        &mut self,
        now: Instant,
        request: &MendRequest,
        image: &ChunkImage,
    ) -> Option<u32> {
        let volume = self.volumes.get(&request.volume)?;
        let replaced = match self.chunks.replace(volume, request.chunk, image) {
            Ok(replaced) => replaced,
            Err(ChunkError::NoSpace) => return None,
            Err(error) => {
                self.failure = Some(error.into());
                return None;
            }
        };
        let counts = &mut self.scrub.counts;
        counts.mended += u64::from(!replaced.is_empty());
        counts.mended_blocks += replaced.len() as u64;
        self.repairs.unsynced |= !replaced.is_empty();
        for block in &replaced {
            let Some(more) = self.scrub.mends.lines.admit(now) else {
                continue;
            };
            tracing::error!(
                volume = %volume.name,
                chunk = request.chunk.0,
                block,
                byte = block * BLOCK_BYTES as u64,
                peer = request.from.0,
                more = (more > 0).then_some(more),
                "a block matched its checksum and was not what the majority of the servers holds: it was replaced with the copy of \
                 server {}",
                request.from
            );
        }
        Some(replaced.len() as u32)
    }
}
