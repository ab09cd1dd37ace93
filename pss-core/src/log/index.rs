//! Where the records of the log are.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::disk::{ALIGN_BYTES, DiskFile};
use crate::types::{Ballot, EntryId, Slot};

/// A record's place in its segment, in units of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    page: u32,
    pages: u32,
}

impl Span {
    pub(super) fn new(offset: u64, bytes: u64) -> Span {
        Span {
            page: (offset / ALIGN_BYTES as u64) as u32,
            pages: (bytes / ALIGN_BYTES as u64) as u32,
        }
    }

    pub(super) fn offset(self) -> u64 {
        u64::from(self.page) * ALIGN_BYTES as u64
    }

    pub(super) fn bytes(self) -> u64 {
        u64::from(self.pages) * ALIGN_BYTES as u64
    }

    pub(super) fn end(self) -> u64 {
        self.offset() + self.bytes()
    }
}

/// A segment and the records in it that are part of the log.
pub(super) struct Segment {
    pub(super) sequence: u64,
    pub(super) path: String,
    pub(super) file: Arc<dyn DiskFile>,
    /// Length of the file.
    pub(super) bytes: u64,
    /// Slot of the first of `spans`.
    pub(super) first: Slot,
    /// One for each slot from `first`.
    pub(super) spans: Vec<Span>,
}

impl Segment {
    /// The same without the spans.
    pub(super) fn handle(&self) -> Segment {
        Segment {
            sequence: self.sequence,
            path: self.path.clone(),
            file: Arc::clone(&self.file),
            bytes: self.bytes,
            first: self.first,
            spans: Vec::new(),
        }
    }

    /// The last slot in it; the one before `first` if there is none.
    pub(super) fn last(&self) -> Slot {
        Slot(self.first.0 + self.spans.len() as u64 - 1)
    }
}

/// The log's entries, without their contents.
pub(super) struct Index {
    /// The entry before the first.
    pub(super) base: EntryId,
    /// The last entry.
    pub(super) last: EntryId,
    /// Ballots by the first slot that has them, from the base on.
    ballots: VecDeque<(Slot, Ballot)>,
    /// In order. All but the last hold records.
    pub(super) segments: VecDeque<Segment>,
}

impl Index {
    pub(super) fn new(base: EntryId) -> Index {
        Index {
            base,
            last: base,
            ballots: VecDeque::from([(base.slot, base.ballot)]),
            segments: VecDeque::new(),
        }
    }

    /// Id of an entry of the log, or of its base.
    pub(super) fn id_at(&self, slot: Slot) -> Option<EntryId> {
        if slot < self.base.slot || slot > self.last.slot {
            return None;
        }
        let after = self.ballots.partition_point(|(first, _)| *first <= slot);
        let (_, ballot) = self.ballots[after - 1];
        Some(EntryId { ballot, slot })
    }

    /// Adds an entry to the last segment.
    pub(super) fn push(&mut self, id: EntryId, span: Span) {
        assert_eq!(id.slot, self.last.slot.next(), "the log has no gaps");
        let segment = self.segments.back_mut().expect("a segment was opened");
        if segment.spans.is_empty() {
            segment.first = id.slot;
        }
        segment.spans.push(span);
        if id.ballot != self.last.ballot {
            self.ballots.push_back((id.slot, id.ballot));
        }
        self.last = id;
    }

    /// Forgets the entries behind `slot`, which is in the log or its base.
    pub(super) fn cut(&mut self, slot: Slot) {
        let last = self.id_at(slot).expect("the cut lies in the log");
        while let Some(segment) = self.segments.iter_mut().rev().find(|s| !s.spans.is_empty()) {
            if segment.last() <= slot {
                break;
            }
            let keep = (slot.0 + 1).saturating_sub(segment.first.0);
            segment.spans.truncate(keep as usize);
        }
        while self.ballots.back().is_some_and(|(first, _)| *first > slot) {
            self.ballots.pop_back();
        }
        self.last = last;
    }

    /// Forgets the entries up to `slot`, which is in the log or its base; for whole segments.
    pub(super) fn advance_base(&mut self, slot: Slot) {
        let base = self.id_at(slot).expect("the new base lies in the log");
        while self.ballots.get(1).is_some_and(|(first, _)| *first <= slot) {
            self.ballots.pop_front();
        }
        self.base = base;
    }

    /// Takes out the segments without records, except the last.
    pub(super) fn take_dead(&mut self) -> Vec<Segment> {
        let mut dead = Vec::new();
        let count = self.segments.len();
        for (position, segment) in std::mem::take(&mut self.segments).into_iter().enumerate() {
            if segment.spans.is_empty() && position + 1 < count {
                dead.push(segment);
            } else {
                self.segments.push_back(segment);
            }
        }
        dead
    }

    /// The segment that holds a slot, and the position of its span.
    pub(super) fn locate(&self, slot: Slot) -> Option<(&Segment, usize)> {
        if slot <= self.base.slot || slot > self.last.slot {
            return None;
        }
        let holds = |segment: &Segment| !segment.spans.is_empty() && segment.first <= slot;
        let after = self.segments.partition_point(holds);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let position = (slot.0 - segment.first.0) as usize;
        (position < segment.spans.len()).then_some((segment, position))
    }
}
