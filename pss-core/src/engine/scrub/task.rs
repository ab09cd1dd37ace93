//! The side that answers: takes points and reads what they are of.

use std::sync::Arc;
use std::time::Duration;

use super::{CHUNKS_AT_ONCE, DigestJob, DigestPart, ScrubBug};
use crate::chunk::digest::{TREE_LEVELS, Tree};
use crate::chunk::{Digest, Point, PointFailure};
use crate::engine::{Action, Engine};
use crate::paxos::message::{Message, SyncMessage};
use crate::state::Volume;
use crate::time::Instant;
use crate::types::{ChunkIndex, ServerId, Slot};
use crate::wire::survey::{
    POINT_CHUNKS_MAX, PointAnswer, PointRefusal, PointRequest, PointResult, PointStage,
};

/// Points under way at most: each may keep some 50 MiB.
const UNDER_WAY_MAX: usize = 4;
/// Answers that are kept, so that they can be asked for again.
const KEPT_MAX: usize = 16;
/// Who has not asked for so long has lost interest.
const INTEREST: Duration = Duration::from_secs(30);
/// Where nobody waits, a chunk is followed by a pause, of at least this time and
const CALM_PAUSE: Duration = Duration::from_millis(100);
/// so many times what it took to read the chunk, so that a slow disk has time for others,
const CALM_RESTS: u32 = 4;
/// but at most this.
const CALM_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What this server was asked for.
#[derive(Default)]
pub(in crate::engine) struct Tasks(Vec<Task>);

struct Task {
    request: PointRequest,
    asked: Instant,
    stage: Stage,
}

enum Stage {
    Waiting,
    Running(Running),
    Refused(PointRefusal),
    Done(PointResult),
}

struct Running {
    volume: Arc<Volume>,
    point: Arc<Point>,
    tree: Tree,
    result: PointResult,
    done: u64,
    total: u64,
    /// Of the volume, so far.
    is_whole: bool,
    is_busy: bool,
    /// Since it is busy.
    since: Instant,
    next_at: Instant,
}

impl Tasks {
    pub(super) fn next_at(&self) -> Option<Instant> {
        let each = self.0.iter().map(|task| match &task.stage {
            Stage::Running(running) if !running.is_busy => running.next_at,
            _ => task.asked + INTEREST,
        });
        each.min()
    }

    /// Of which slot the point of a survey is.
    pub(super) fn slot_of(&self, id: u64) -> Option<Slot> {
        let task = self.0.iter().find(|task| task.request.id == id);
        task.map(|task| task.request.at)
    }

    fn under_way(&self) -> usize {
        let is = |task: &&Task| matches!(task.stage, Stage::Waiting | Stage::Running(_));
        self.0.iter().filter(is).count()
    }

    /// Whether one waits for that slot.
    pub(in crate::engine) fn wait_for(&self, slot: Slot) -> bool {
        let waits = |task: &Task| matches!(task.stage, Stage::Waiting) && task.request.at <= slot;
        self.0.iter().any(waits)
    }
}

impl Task {
    fn stage(&self, applied: Slot) -> PointStage {
        match &self.stage {
            Stage::Waiting => PointStage::Waiting { applied },
            Stage::Running(running) => PointStage::Running {
                done: running.done,
                total: running.total,
            },
            Stage::Refused(refusal) => PointStage::Refused(*refusal),
            Stage::Done(result) => PointStage::Done(result.clone()),
        }
    }
}

impl Engine {
    /// Another server asks.
    pub(super) fn point_asked(&mut self, now: Instant, from: ServerId, request: PointRequest) {
        if request.calm {
            self.note_scrub(&request);
        }
        let stage = self.point(now, request);
        let answer = SyncMessage::Point(PointAnswer {
            id: request.id,
            at: request.at,
            stage,
        });
        self.actions.push_back(Action::Send {
            to: from,
            message: Message::Sync(answer),
        });
    }

    /// How far the point is; it is begun if it was not.
    pub(super) fn point(&mut self, now: Instant, request: PointRequest) -> PointStage {
        let applied = self.state.applied();
        let tasks = &mut self.scrub.tasks.0;
        let known = tasks.iter_mut().find(|task| task.request.id == request.id);
        if let Some(task) = known
            && task.request.at >= request.at
        {
            task.asked = now;
            return match task.request.at == request.at {
                true => task.stage(applied),
                // It has taken a long way.
                false => PointStage::Refused(PointRefusal::Passed),
            };
        }
        self.end_tasks(|task| task.request.id == request.id);
        if request.at < applied {
            return PointStage::Refused(PointRefusal::Passed);
        }
        if self.scrub.tasks.under_way() >= UNDER_WAY_MAX {
            return PointStage::Refused(PointRefusal::Busy);
        }
        if self.scrub.tasks.0.len() >= KEPT_MAX {
            let is_old = |task: &Task| matches!(task.stage, Stage::Done(_) | Stage::Refused(_));
            let old = self.scrub.tasks.0.iter().filter(|it| is_old(it));
            let oldest = old.min_by_key(|task| task.asked).map(|it| it.request.id);
            self.end_tasks(|task| Some(task.request.id) == oldest);
        }
        self.scrub.tasks.0.push(Task {
            request,
            asked: now,
            stage: Stage::Waiting,
        });
        if self.scrub.bug == Some(ScrubBug::OtherSlots) {
            let stage = self.begin(now, request);
            if let Some(task) = self.scrub.tasks.0.last_mut() {
                task.stage = stage;
            }
        }
        self.take_points(now);
        self.pump_tasks(now);
        let tasks = &self.scrub.tasks.0;
        let task = tasks.iter().find(|task| task.request.id == request.id);
        let stage = task.map(|task| task.stage(self.state.applied()));
        stage.unwrap_or(PointStage::Refused(PointRefusal::Busy))
    }

    /// Takes the points of the slot that was just applied; to be called between two entries.
    pub(in crate::engine) fn take_points(&mut self, now: Instant) {
        let applied = self.state.applied();
        if !self.scrub.tasks.wait_for(applied) || self.stalled.is_some() {
            return;
        }
        for at in 0..self.scrub.tasks.0.len() {
            let task = &self.scrub.tasks.0[at];
            if !matches!(task.stage, Stage::Waiting) || task.request.at > applied {
                continue;
            }
            let stage = match task.request.at == applied {
                true => self.begin(now, task.request),
                false => Stage::Refused(PointRefusal::Passed),
            };
            self.scrub.tasks.0[at].stage = stage;
        }
    }

    fn begin(&self, now: Instant, request: PointRequest) -> Stage {
        if !self.is_complete() {
            return Stage::Refused(PointRefusal::Incomplete);
        }
        let Some(volume) = self.volumes.get(&request.volume) else {
            return Stage::Refused(PointRefusal::NoVolume);
        };
        let end = volume.size_bytes.div_ceil(u64::from(volume.chunk_bytes));
        let range = request.from..ChunkIndex(end as u32);
        let is_whole = request.chunks_max == 0;
        let most = (request.chunks_max as usize).min(POINT_CHUNKS_MAX);
        let taken = self
            .chunks
            .take_point(volume, range, (!is_whole).then_some(most));
        let Ok((point, until)) = taken else {
            return Stage::Refused(PointRefusal::NoVolume);
        };
        Stage::Running(Running {
            volume: Arc::clone(volume),
            result: PointResult {
                size_bytes: volume.size_bytes,
                until,
                ..PointResult::default()
            },
            done: 0,
            total: point.chunks(),
            point,
            tree: Tree::default(),
            is_whole,
            is_busy: false,
            since: now,
            next_at: now,
        })
    }

    pub(super) fn pump_tasks(&mut self, now: Instant) {
        self.end_tasks(|task| now.since(task.asked) >= INTEREST);
        self.take_points(now);
        let lags = !self.backlog.is_empty();
        for task in &mut self.scrub.tasks.0 {
            let Stage::Running(running) = &mut task.stage else {
                continue;
            };
            if running.is_busy || now < running.next_at {
                continue;
            }
            if task.request.calm && lags {
                running.next_at = now + CALM_PAUSE;
                continue;
            }
            running.is_busy = true;
            running.since = now;
            self.actions.push_back(Action::Digest(DigestJob {
                id: task.request.id,
                at: task.request.at,
                point: Arc::clone(&running.point),
                chunks_max: if task.request.calm { 1 } else { CHUNKS_AT_ONCE },
            }));
        }
    }

    fn end_tasks(&mut self, ends: impl Fn(&Task) -> bool) {
        for task in self.scrub.tasks.0.extract_if(.., |task| ends(task)) {
            if let Stage::Running(running) = task.stage {
                self.chunks.end_point(&running.point);
            }
        }
    }

    /// What [`Action::Digest`] asked for was read.
    pub fn handle_digested(&mut self, now: Instant, job: DigestJob, part: DigestPart) {
        let mut tasks = self.scrub.tasks.0.iter_mut();
        let task = tasks.find(|it| (it.request.id, it.request.at) == (job.id, job.at));
        let Some(Task {
            stage: stage @ Stage::Running(_),
            request,
            ..
        }) = task
        else {
            // Nobody wants it any more.
            return;
        };
        let Stage::Running(running) = stage else {
            return;
        };
        let mut bad = Vec::new();
        for chunk in part.chunks {
            running.add(&chunk);
            bad.extend(chunk.bad);
        }
        running.is_busy = false;
        let rest = now.since(running.since) * CALM_RESTS;
        running.next_at = match request.calm {
            true => now + rest.clamp(CALM_PAUSE, CALM_PAUSE_MAX),
            false => now,
        };
        let volume = Arc::clone(&running.volume);
        let end = match part.failure {
            Some(failure) => Some(Stage::Refused(match failure {
                PointFailure::Overwritten => PointRefusal::Overwritten,
                PointFailure::Gone => PointRefusal::NoVolume,
                PointFailure::Unreadable => PointRefusal::Unreadable,
            })),
            None if running.point.next().is_none() => Some(Stage::Done(running.finish())),
            None => None,
        };
        if let Some(end) = end {
            self.chunks.end_point(&running.point);
            *stage = end;
        }
        if !bad.is_empty() {
            self.repair_unasked(now, &volume, &bad);
        }
        self.pump_scrub(now);
        self.drain(now);
    }
}

impl Running {
    fn add(&mut self, chunk: &crate::chunk::ChunkDigest) {
        self.done += 1;
        self.result.blocks += u64::from(chunk.blocks);
        let bad = chunk.bad.len() as u64;
        self.result.bad += bad.max(u64::from(chunk.digest.is_none()));
        if !self.is_whole {
            self.result.chunks.push((chunk.chunk, chunk.digest));
        } else if let Some(digest) = chunk.digest {
            let level = self.point.chunk_levels();
            self.tree
                .add(u64::from(chunk.chunk.0) << level, level, digest);
        }
    }

    fn finish(&mut self) -> PointResult {
        let mut result = std::mem::take(&mut self.result);
        if self.is_whole && result.bad == 0 {
            let root = std::mem::take(&mut self.tree).root(TREE_LEVELS);
            result.digest = Some(Digest::volume(result.size_bytes, &root));
        }
        result
    }
}
