//! A leader whose disk is much slower than the others': it leaves, because nobody is answered before an entry is
//! durable here as well, while as a follower it would hold nobody up.
//!
//! Now and then the leader looks how long an entry takes until it is durable here, and until a majority of the core
//! servers *without this one* has acknowledged it. Only if these could do better, most of the time, it hands the leadership to
//! one of them. Where the cell needs this disk anyway, because another server is away or as slow, it stays.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::Engine;
use crate::time::Instant;
use crate::types::Slot;

/// An entry is looked at this time after the last one, at least.
const EVERY: Duration = Duration::from_millis(100);
/// So many are judged by ...
const LOOKS: usize = 10;
/// ... of which so many must have been slow.
const SLOW_MIN: usize = 8;
/// What was seen longer ago says nothing of the disk now.
const MEMORY: Duration = Duration::from_secs(60);
/// A disk that has a write done within this time is not slow.
const SLOW: Duration = Duration::from_millis(10);
/// It is if it takes so many times as long as the others, network included.
const TIMES: u32 = 4;
/// A disk that the others did not wait for, for so long, hangs. [`crate::paxos::Tuning::disk_patience`] is for when nobody knows
/// whether the others are better off.
const HANGS: Duration = Duration::from_secs(1);
/// A leader stays for this time, so that leadership does not wander among disks that are slow in turn.
const TERM: Duration = Duration::from_secs(10);

/// The entry that is looked at.
#[derive(Clone, Copy, Debug)]
struct Look {
    slot: Slot,
    began: Instant,
    own: Option<Duration>,
    others: Option<Duration>,
}

/// What a leader has seen of its disk and the others'.
#[derive(Debug)]
pub(super) struct DiskWatch {
    led_since: Option<Instant>,
    look: Option<Look>,
    next_at: Instant,
    /// When, and whether our disk was slow.
    seen: VecDeque<(Instant, bool)>,
    /// A deliberate bug, for the tests of the tests.
    is_blind: bool,
}

impl DiskWatch {
    pub(super) fn new() -> DiskWatch {
        DiskWatch {
            led_since: None,
            look: None,
            next_at: Instant(0),
            seen: VecDeque::new(),
            is_blind: false,
        }
    }

    /// The server leads from now on, or leads no more.
    pub(super) fn leads(&mut self, since: Option<Instant>) {
        self.led_since = since;
        self.look = None;
        self.seen.clear();
    }

    /// Takes where the logs stand: the last slot, what is durable here, and what a majority of others has acknowledged.
    fn note(&mut self, now: Instant, last: Slot, own: Slot, others: Slot) {
        let Some(look) = &mut self.look else {
            if last > own && last > others && now >= self.next_at {
                self.next_at = now + EVERY;
                self.look = Some(Look {
                    slot: last,
                    began: now,
                    own: None,
                    others: None,
                });
            }
            return;
        };
        let took = now.since(look.began);
        if own >= look.slot {
            look.own.get_or_insert(took);
        }
        if others >= look.slot {
            look.others.get_or_insert(took);
        }
        let is_slow = match (look.own, look.others) {
            (Some(own), Some(others)) => own >= SLOW && own >= others * TIMES,
            // However long the others take: they need not be waited for.
            (Some(own), None) if own < SLOW => false,
            _ => return,
        };
        self.look = None;
        if self.seen.len() >= LOOKS {
            self.seen.pop_front();
        }
        self.seen.push_back((now, is_slow));
    }

    /// Whether another server should lead.
    fn is_too_slow(&mut self, now: Instant) -> bool {
        let settled = self.led_since.is_some_and(|since| now.since(since) >= TERM);
        if !settled || self.is_blind {
            return false;
        }
        let hangs = self.look.is_some_and(|look| {
            look.own.is_none() && look.others.is_some() && now.since(look.began) >= HANGS
        });
        while self
            .seen
            .front()
            .is_some_and(|(at, _)| now.since(*at) > MEMORY)
        {
            self.seen.pop_front();
        }
        let slow = self.seen.iter().filter(|(_, is_slow)| *is_slow).count();
        hangs || slow >= SLOW_MIN
    }
}

impl Engine {
    /// To be called after every input: compares our disk with the others'.
    pub(super) fn watch_disk(&mut self, now: Instant) {
        if self.disk.led_since.is_none() {
            return;
        }
        let replica = &self.replica;
        let (last, own) = (replica.last().slot, replica.durable());
        if self.disk.look.is_none() && own >= last {
            return;
        }
        let others = replica.acknowledged_by_others().unwrap_or_default();
        self.disk.note(now, last, own, others);
    }

    /// Leaves to a server with a faster disk, if there is one.
    pub(super) fn leave_if_slow(&mut self, now: Instant) {
        if !self.disk.is_too_slow(now) {
            return;
        }
        // Whoever has acknowledged most is one of those that were faster.
        if self.replica.resign(now) {
            tracing::warn!(
                "the disk of this server is much slower than the others': another server leads; look at it"
            );
        }
        self.disk.leads(None);
        self.drain(now);
        if self.replica.leader() == Some(self.replica.id()) {
            // Nobody was better off.
            self.disk.leads(Some(now));
        }
    }

    /// Makes the engine lead on however slow its disk is: a deliberate bug, for the tests of the tests.
    #[doc(hidden)]
    pub fn inject_patience(&mut self) {
        self.disk.is_blind = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    /// A leader since 0 that writes an entry each 200 ms from `from` on; `times`: until it is durable here and at others.
    fn writes(
        watch: &mut DiskWatch,
        from: u64,
        count: u64,
        times: impl Fn(u64) -> (u64, u64),
    ) -> u64 {
        for number in 0..count {
            let (begin, slot) = (from + number * 200, Slot(from + number + 1));
            let before = Slot(slot.0 - 1);
            watch.note(at(begin), slot, before, before);
            let (own, others) = times(number);
            let reached = |took, now| if now >= took { slot } else { before };
            for now in 1..200 {
                watch.note(
                    at(begin + now),
                    slot,
                    reached(own, now),
                    reached(others, now),
                );
            }
        }
        from + count * 200
    }

    fn leading() -> DiskWatch {
        let mut watch = DiskWatch::new();
        watch.leads(Some(at(0)));
        watch
    }

    #[test]
    fn a_disk_that_is_slow_most_of_the_time_is_left() {
        let mut watch = leading();
        let now = writes(&mut watch, 20_000, 7, |_| (100, 2));
        assert!(!watch.is_too_slow(at(now)), "too few");
        let now = writes(&mut watch, now, 1, |_| (100, 2));
        assert!(watch.is_too_slow(at(now)));
        assert!(!watch.is_too_slow(at(now + 61_000)), "that was long ago");
    }

    #[test]
    fn others_must_be_faster_and_much() {
        for (own, others) in [(100, 90), (100, 30), (9, 1), (2, 100), (1, 1), (1, 1000)] {
            let mut watch = leading();
            let now = writes(&mut watch, 20_000, 50, |_| (own, others));
            assert!(
                !watch.is_too_slow(at(now)),
                "{own} ms here, {others} ms there"
            );
        }
        // Now and then.
        let mut watch = leading();
        let now = writes(&mut watch, 20_000, 50, |number| match number % 4 {
            0 => (2, 2),
            _ => (100, 2),
        });
        assert!(!watch.is_too_slow(at(now)));
    }

    #[test]
    fn a_new_leader_stays_for_a_while() {
        let mut watch = leading();
        let now = writes(&mut watch, 0, 40, |_| (100, 2));
        assert!(now < 10_000 && !watch.is_too_slow(at(now)));
        let now = writes(&mut watch, now, 20, |_| (100, 2));
        assert!(watch.is_too_slow(at(now)));
        watch.leads(None);
        assert!(!watch.is_too_slow(at(now)));
    }

    #[test]
    fn a_disk_that_hangs_while_others_do_not_is_left_sooner() {
        let mut watch = leading();
        let begin = 20_000;
        watch.note(at(begin), Slot(5), Slot(4), Slot(4));
        watch.note(at(begin + 3), Slot(6), Slot(4), Slot(5));
        assert!(!watch.is_too_slow(at(begin + 900)));
        assert!(watch.is_too_slow(at(begin + 1100)));
        // Nobody else has it either.
        let mut watch = leading();
        watch.note(at(begin), Slot(5), Slot(4), Slot(4));
        assert!(!watch.is_too_slow(at(begin + 5000)));
    }
}
