//! The scrub in the background: everything is verified once in a period, little by little.
//!
//! The leader verifies a few chunks at a time, spread evenly over the period, and every server remembers where that is, so that whoever leads next goes
//! on there. When a part is due follows from when the round began, so time that passed without a server is made up for, at the pace of calm tasks.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::survey::SurveyEnd;
use crate::engine::Engine;
use crate::time::Instant;
use crate::types::{ChunkIndex, VolumeId};
use crate::wire::inspect::{SurveyQuestion, SurveyScope};
use crate::wire::survey::{POINT_CHUNKS_MAX, PointRequest};

/// How often it is looked whether something is due.
const LOOK: Duration = Duration::from_secs(1);
/// Between two parts, while it makes up for lost time.
const PAUSE: Duration = Duration::from_secs(1);
/// Servers that were heard of in this time are not to be disturbed while they copy chunks.
const LATELY: Duration = Duration::from_secs(4);

/// Where the scrub is. Times are milliseconds since the beginning of 1970, UTC; 0: never.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ScrubPosition {
    /// Everything before this volume is verified in this round,
    pub volume: u32,
    /// and of it what lies before this chunk.
    pub chunk: u32,
    /// When the round began.
    pub began_ms: u64,
    /// When the last complete one ended.
    pub completed_ms: u64,
}

/// The scrub as `pss status` shows it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Everything is verified once in this time, seconds; none: it is off.
    pub period_s: Option<u64>,
    /// Where it is.
    pub position: ScrubPosition,
    /// How much of the round is done, in thousandths.
    pub done_permille: u32,
    /// It waits, for a server that copies chunks or lags.
    pub paused: bool,
    /// Chunks that were not the same on all servers, found by this server since its start.
    pub different: u64,
    /// Of these, those for which there was no majority.
    pub undecided: u64,
    /// Blocks of this server that were replaced by what the majority holds, since its start.
    pub mended_blocks: u64,
}

#[derive(Default)]
pub(in crate::engine) struct Background {
    period: Option<Duration>,
    position: ScrubPosition,
    next_at: Instant,
    /// The survey under way.
    current: Option<u64>,
    begun: u64,
}

impl Background {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.period.map(|_| self.next_at)
    }
}

impl Engine {
    /// Verifies everything once in `period` from now on, beginning at `position`; none: never.
    pub fn set_scrub(&mut self, period: Option<Duration>, position: ScrubPosition) {
        let scrub = &mut self.scrub.background;
        (scrub.period, scrub.position) = (period, position);
    }

    /// Where the scrub is, to be remembered over a restart.
    pub fn scrub_position(&self) -> ScrubPosition {
        self.scrub.background.position
    }

    /// How it stands with the scrub.
    pub fn scrub_status(&self, now: Instant) -> ScrubStatus {
        let (done, total) = self.scrubbed();
        let counts = self.scrub.counts;
        let period = self.scrub.background.period;
        ScrubStatus {
            period_s: period.map(|it| it.as_secs()),
            position: self.scrub.background.position,
            done_permille: (done * 1000).checked_div(total).unwrap_or(0) as u32,
            paused: period.is_some() && self.is_scrub_paused(now),
            different: counts.different,
            undecided: counts.undecided,
            mended_blocks: counts.mended_blocks,
        }
    }

    /// About how many chunks are done in this round, and how many there are.
    fn scrubbed(&self) -> (u64, u64) {
        let position = self.scrub.background.position;
        let (mut done, mut total) = (0, 0);
        for volume in self.state.volumes() {
            let count = self.chunks.chunk_count(volume.id);
            let most = volume.size_bytes.div_ceil(u64::from(volume.chunk_bytes));
            total += count;
            done += match volume.id.0.cmp(&position.volume) {
                std::cmp::Ordering::Less => count,
                std::cmp::Ordering::Equal => {
                    let share = u128::from(count) * u128::from(position.chunk);
                    (share / u128::from(most.max(1))) as u64
                }
                std::cmp::Ordering::Greater => 0,
            };
        }
        (done.min(total), total)
    }

    fn is_scrub_paused(&self, now: Instant) -> bool {
        let disturbed = |view: &crate::paxos::PeerView| {
            view.progress.installing && view.heard.is_some_and(|at| now.since(at) < LATELY)
        };
        let mut peers = self.replica.peers();
        !self.is_complete() || !self.backlog.is_empty() || peers.any(|(_, it)| disturbed(&it))
    }

    /// Another server leads the scrub: remembers where it is.
    pub(super) fn note_scrub(&mut self, request: &PointRequest) {
        let now_ms = self.wall_clock_ms;
        let position = &mut self.scrub.background.position;
        let at = (request.volume.0, request.from.0);
        if at < (position.volume, position.chunk) {
            position.completed_ms = now_ms;
            position.began_ms = now_ms;
        }
        if position.began_ms == 0 {
            position.began_ms = now_ms;
        }
        (position.volume, position.chunk) = at;
    }

    pub(super) fn pump_background(&mut self, now: Instant) {
        let Some(period) = self.scrub.background.period else {
            return;
        };
        if now < self.scrub.background.next_at {
            return;
        }
        self.scrub.background.next_at = now + LOOK;
        if !self.serves() {
            self.scrub.background.current = None;
            return;
        }
        if let Some(id) = self.scrub.background.current {
            let end = self.scrub.surveys.end_of(id);
            if !matches!(end, SurveyEnd::NotYet) {
                self.scrub.background.current = None;
                self.scrub.background.next_at = now + PAUSE;
            }
            if let SurveyEnd::Until(until) = end {
                self.part_is_done(until);
            }
            return;
        }
        if !self.is_scrub_paused(now) && self.is_part_due(period) {
            self.begin_part(now);
        }
    }

    fn is_part_due(&mut self, period: Duration) -> bool {
        let now_ms = self.wall_clock_ms;
        let (done, total) = self.scrubbed();
        let position = &mut self.scrub.background.position;
        if position.began_ms == 0 || position.began_ms > now_ms {
            position.began_ms = now_ms;
        }
        if total == 0 || now_ms == 0 {
            return false;
        }
        let share = (done + POINT_CHUNKS_MAX as u64).min(total);
        let due_ms = period.as_millis() * u128::from(share) / u128::from(total);
        u128::from(now_ms - position.began_ms) >= due_ms
    }

    fn begin_part(&mut self, now: Instant) {
        let position = self.scrub.background.position;
        let later = self.state.volumes().map(|volume| volume.id.0);
        let Some(volume) = later.filter(|id| *id >= position.volume).min() else {
            return self.round_is_done();
        };
        let from = match volume == position.volume {
            true => ChunkIndex(position.chunk),
            false => ChunkIndex(0),
        };
        let scrub = &mut self.scrub.background;
        scrub.begun += 1;
        // Unlike those of clients, which are random, they are small.
        let id = u64::from(self.replica.id().0) << 32 | scrub.begun;
        scrub.position.volume = volume;
        scrub.position.chunk = from.0;
        scrub.current = Some(id);
        let question = SurveyQuestion {
            id,
            volume: VolumeId(volume),
            from,
            scope: SurveyScope::Verify,
        };
        self.begin_survey(now, question, true);
    }

    /// The chunks of the volume below `until` are done; none: all.
    fn part_is_done(&mut self, until: Option<ChunkIndex>) {
        let position = &mut self.scrub.background.position;
        match until {
            Some(until) => position.chunk = until.0,
            None => (position.volume, position.chunk) = (position.volume + 1, 0),
        }
        let next = position.volume;
        if !self.state.volumes().any(|volume| volume.id.0 >= next) {
            self.round_is_done();
        }
    }

    fn round_is_done(&mut self) {
        let now_ms = self.wall_clock_ms;
        self.scrub.background.position = ScrubPosition {
            volume: 0,
            chunk: 0,
            began_ms: now_ms,
            completed_ms: now_ms,
        };
        let counts = self.scrub.counts;
        tracing::info!(
            different = counts.different,
            undecided = counts.undecided,
            "everything was verified on all servers"
        );
    }
}
