//! How far the other servers are behind this one: in time, in bytes of the log, and how long they take still.
//!
//! The log tells the time at most each 100 ms (see [`Engine::tell_time`]), so it says when an entry was proposed,
//! also of entries that were replayed or fetched later. Where it says nothing, the moment counts at which the entry
//! came here, until a time that the log tells behind it proves that it is older.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::engine::Engine;
use crate::entry::{Entry, Op};
use crate::time::Instant;
use crate::types::{ServerId, Slot};

/// Moments that are remembered, about 200 KiB. When there are more, those are forgotten ...
const SAMPLES_MAX: usize = 8192;
/// ... that lie close to each other for their age: by less than this part of it.
const AGE_PART: u64 = 16;
/// An entry that comes so long after the last time that the log told is a sample of its own, milliseconds.
const UNTOLD_MS: u64 = 1000;
/// How fast a server catches up is measured over so many housekeepings (500 ms each) at most ...
const CHASE_MAX: usize = 20;
/// ... and at least this time.
const CHASE_TIME_MIN: Duration = Duration::from_secs(2);

/// How far a server is behind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Lag {
    /// Since the oldest entry was proposed that it has not applied.
    pub(super) ms: u64,
    /// Of the log, about, that it has not applied.
    pub(super) bytes: u64,
}

/// A moment in the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Sample {
    /// The first entry of that moment.
    first: Slot,
    at_ms: u64,
    /// Of all entries before it, on an arbitrary scale.
    weight_before: u64,
    /// Whether the log has told the moment.
    is_told: bool,
}

/// When the entries of the log were proposed, and how large they are. See the module's text.
#[derive(Debug, Default)]
pub(super) struct Pace {
    samples: VecDeque<Sample>,
    weight: u64,
    last: Slot,
    /// What servers that are behind lacked lately, bytes.
    chasing: BTreeMap<ServerId, VecDeque<(Instant, u64)>>,
}

impl Pace {
    /// Takes a chosen entry, in order. After a gap everything before is forgotten.
    pub(super) fn note(&mut self, entry: &Entry, now_ms: u64) {
        let slot = entry.id.slot;
        if slot != self.last.next() {
            self.samples.clear();
        }
        let told = entry.commands.iter().find_map(|command| match command.op {
            Op::Clock { unix_ms } => Some(unix_ms),
            _ => None,
        });
        let before = self.samples.back();
        let is_due = match told {
            Some(_) => true,
            None => {
                before.is_none_or(|it| it.is_told && now_ms.saturating_sub(it.at_ms) >= UNTOLD_MS)
            }
        };
        if is_due {
            self.push(Sample {
                first: slot,
                at_ms: told.unwrap_or(now_ms),
                weight_before: self.weight,
                is_told: told.is_some(),
            });
        }
        self.weight += entry.weight_bytes() as u64;
        self.last = slot;
    }

    fn push(&mut self, sample: Sample) {
        if let Some(before) = self.samples.back_mut()
            && !before.is_told
        {
            before.at_ms = before.at_ms.min(sample.at_ms);
        }
        if self.samples.len() >= SAMPLES_MAX {
            self.thin_out(sample.at_ms);
        }
        self.samples.push_back(sample);
    }

    fn thin_out(&mut self, now_ms: u64) {
        let old = std::mem::take(&mut self.samples);
        for (place, sample) in old.iter().enumerate() {
            let next_ms = old.get(place + 1).map_or(now_ms, |next| next.at_ms);
            let is_apart = self.samples.back().is_none_or(|kept| {
                let gap_ms = next_ms.saturating_sub(kept.at_ms);
                gap_ms > now_ms.saturating_sub(next_ms) / AGE_PART
            });
            if is_apart {
                self.samples.push_back(*sample);
            }
        }
        // A clock that jumps to and fro.
        if self.samples.len() > SAMPLES_MAX / 2 {
            self.samples.drain(..SAMPLES_MAX / 4);
        }
    }

    /// How far a server is behind that has applied up to `applied`; `None` if what it lacks is too old to be known.
    pub(super) fn lag(&self, applied: Slot, now_ms: u64) -> Option<Lag> {
        if applied >= self.last {
            return Some(Lag::default());
        }
        let missing = applied.next();
        let place = self.samples.partition_point(|it| it.first <= missing);
        let sample = self.samples.get(place.checked_sub(1)?)?;
        // Between two moments the entries count as equally large.
        let next = self.samples.get(place);
        let (end, weight_end) = match next {
            Some(next) => (next.first, next.weight_before),
            None => (self.last.next(), self.weight),
        };
        let within = u128::from(weight_end - sample.weight_before);
        let done = u128::from(missing.0 - sample.first.0);
        let done = within * done / u128::from(end.0 - sample.first.0);
        let weight = sample.weight_before + done as u64;
        Some(Lag {
            ms: now_ms.saturating_sub(sample.at_ms),
            bytes: self.weight - weight,
        })
    }

    /// Notes now and then what a server lacks, for [`Pace::time_left`].
    fn chase(&mut self, now: Instant, server: ServerId, lag: Option<Lag>) {
        match lag {
            Some(lag) if lag.bytes > 0 => {
                let chase = self.chasing.entry(server).or_default();
                if chase.len() >= CHASE_MAX {
                    chase.pop_front();
                }
                chase.push_back((now, lag.bytes));
            }
            _ => {
                self.chasing.remove(&server);
            }
        }
    }

    /// About how long a server takes until it lacks nothing, if it comes nearer.
    pub(super) fn time_left(&self, server: ServerId) -> Option<Duration> {
        let chase = self.chasing.get(&server)?;
        let (&(began, most), &(ended, left)) = (chase.front()?, chase.back()?);
        let elapsed = ended.since(began);
        if elapsed < CHASE_TIME_MIN || left >= most {
            return None;
        }
        Some(elapsed.mul_f64(left as f64 / (most - left) as f64))
    }
}

impl Engine {
    /// Looks how fast the servers that are behind catch up.
    pub(super) fn watch_lags(&mut self, now: Instant) {
        for (server, view) in self.replica.peers() {
            let lag = view
                .heard
                .and_then(|_| self.pace.lag(view.progress.applied, self.wall_clock_ms));
            self.pace.chase(now, server, lag);
        }
    }

    /// How far a server is behind that has applied up to `applied`.
    pub(super) fn lag_of(&self, applied: Slot) -> Option<Lag> {
        self.pace.lag(applied, self.wall_clock_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Command;
    use crate::types::{Ballot, EntryId};

    fn entry(slot: u64, told: Option<u64>) -> Entry {
        let op = told.map_or(Op::Noop, |unix_ms| Op::Clock { unix_ms });
        let ballot = Ballot::default();
        Entry {
            id: EntryId {
                ballot,
                slot: Slot(slot),
            },
            prev: ballot,
            commands: [Command::internal(op)].into(),
        }
    }

    fn ms(pace: &Pace, applied: u64, now_ms: u64) -> Option<u64> {
        pace.lag(Slot(applied), now_ms).map(|lag| lag.ms)
    }

    #[test]
    fn the_log_says_when_what_is_missing_was_written() {
        let mut pace = Pace::default();
        // Replayed or fetched long after.
        for slot in 1..=100 {
            pace.note(
                &entry(slot, (slot % 10 == 1).then_some(slot * 1000)),
                500_000,
            );
        }
        assert_eq!(ms(&pace, 100, 600_000), Some(0), "nothing is missing");
        // Behind the last time that the log told an entry is as old as it is here.
        assert_eq!(ms(&pace, 99, 600_000), Some(100_000));
        assert_eq!(ms(&pace, 90, 600_000), Some(600_000 - 91_000));
        assert_eq!(ms(&pace, 10, 600_000), Some(600_000 - 11_000));
        assert_eq!(ms(&pace, 0, 600_000), Some(600_000 - 1000));
        let weight = entry(1, None).weight_bytes() as u64;
        let bytes = |applied| pace.lag(Slot(applied), 600_000).unwrap().bytes;
        assert!(bytes(0) >= 100 * weight);
        // Within a moment by the share of its entries.
        assert_eq!(bytes(95), bytes(90) / 2);
        assert!((90..=100).is_sorted_by(|a, b| bytes(*a) >= bytes(*b)));
    }

    /// After an hour without a write a new leader's first entry is no hour old.
    #[test]
    fn an_entry_without_a_time_is_as_old_as_it_is_here() {
        let mut pace = Pace::default();
        pace.note(&entry(1, Some(1000)), 1000);
        pace.note(&entry(2, None), 1100);
        pace.note(&entry(3, None), 3_600_000);
        pace.note(&entry(4, None), 3_600_001);
        assert_eq!(
            ms(&pace, 1, 3_605_000),
            Some(3_604_000),
            "of the same moment as slot 1"
        );
        assert_eq!(ms(&pace, 2, 3_605_000), Some(5000));
        // It came late: what is behind it was written earlier than it came.
        pace.note(&entry(5, Some(2000)), 3_610_000);
        assert_eq!(ms(&pace, 2, 3_605_000), Some(3_603_000));
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let mut pace = Pace::default();
        assert_eq!(ms(&pace, 0, 5), Some(0), "an empty log");
        pace.note(&entry(41, Some(1000)), 1000);
        pace.note(&entry(42, None), 1000);
        assert_eq!(ms(&pace, 39, 2000), None, "before what was seen");
        assert_eq!(ms(&pace, 40, 2000), Some(1000));
        // Chunks of another server: the log begins anew.
        pace.note(&entry(80, Some(5000)), 5000);
        assert_eq!(ms(&pace, 42, 6000), None);
        assert_eq!(ms(&pace, 79, 6000), Some(1000));
        // A clock that stepped back.
        assert_eq!(ms(&pace, 79, 4000), Some(0));
    }

    #[test]
    fn memory_is_bounded() {
        let mut pace = Pace::default();
        for slot in 1..=100_000 {
            pace.note(&entry(slot, Some(slot * 100)), slot * 100);
        }
        assert!(pace.samples.len() <= SAMPLES_MAX);
        let now = 100_000 * 100;
        for applied in [99_990, 99_000, 90_000, 50_000, 10_000, 10] {
            let lag = pace.lag(Slot(applied), now).unwrap();
            let real = now - (applied + 1) * 100;
            let off = lag.ms - real;
            assert!(
                off <= 100 || off * 10 <= real,
                "{applied}: {} is {real}",
                lag.ms
            );
        }
        for slot in 100_001..=200_000 {
            pace.note(&entry(slot, Some(slot % 2 * 1_000_000_000)), 0);
        }
        assert!(pace.samples.len() <= SAMPLES_MAX);
    }

    #[test]
    fn the_time_left() {
        let mut pace = Pace::default();
        let server = ServerId(2);
        let at = |seconds: u64| Instant(seconds * 1_000_000_000);
        let lacks = |bytes| Some(Lag { ms: 1, bytes });
        pace.chase(at(0), server, lacks(1000));
        pace.chase(at(1), server, lacks(900));
        assert_eq!(pace.time_left(server), None, "too short");
        pace.chase(at(2), server, lacks(800));
        assert_eq!(pace.time_left(server), Some(Duration::from_secs(8)));
        for second in 3..60 {
            pace.chase(at(second), server, lacks(800));
        }
        assert_eq!(pace.time_left(server), None, "it comes no nearer");
        pace.chase(at(60), server, lacks(0));
        assert!(pace.chasing.is_empty());
    }
}
