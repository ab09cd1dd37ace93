//! Reads the log at start: finds its end, tells a torn tail from damage.
//!
//! Within a segment records are written one behind the other and never again, so:
//!
//! * The first place where no valid record stands is the end of what the segment adds to the log ...
//! * ... unless something proves that the missing entry was durable: a later record of the segment
//!   whose `durable_before` covers it, or a later segment whose base does. Then it is damage. The log
//!   is kept up to the damage; how far it went is handed on as *evidence*.
//! * If all that is known is that the write ended (its marker is there) while not all of it can be read, it
//!   was torn, so that nobody was told of it, or it was whole and has rotted. That is handed on as *doubt*.
//! * What was found then stands in the next segment's header. Where a segment's records end at the base of the
//!   next one, the rest of it is not read again: every start begins a segment, and may leave most of it empty.
//! * Damage at or below the checkpoint does no harm: the log then starts behind it.
//! * A marker that is damaged takes nothing with it.
//! * A record that is whole and says what this version does not know is neither torn nor damaged, wherever it stands:
//!   then the log is not opened, and nothing is cut.
//! * Where the start of a segment is lost with its first record, nobody knows which entries it replaced. What
//!   the rest of it may have held is doubt, and from there on no hint is believed: those that it speaks of as
//!   chosen may be others than the ones that are left here.
//!
//! A segment's base cuts the log back to that entry: that is how truncation is written down.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::index::{Index, Segment, Span};
use super::record::{
    Place, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentStart, decode_entry, peek_prev,
};
use super::{LogError, LogParams};
use crate::disk::{ALIGN_BYTES, AlignedBuf, DiskFile};
use crate::entry::Entry;
use crate::types::{Ballot, EntryId, Slot};

/// Read at once where the records before were not wanted whole: enough for most headers.
const WINDOW_BYTES_MIN: usize = 16 << 10;
/// Read at once where every byte is wanted.
const WINDOW_BYTES_MAX: usize = 4 << 20;

/// Most bytes of entries, with payload, that are kept for replay, so that they need not be read again.
const REPLAY_BYTES_MAX: usize = 64 << 20;

/// What the segments hold.
pub(super) struct Scan {
    pub(super) index: Index,
    /// Highest hint.
    pub(super) chosen: Slot,
    /// Entries above the hint.
    pub(super) tail: VecDeque<Entry>,
    /// Entries from the checkpoint on, in order, that are chosen by the hint.
    pub(super) replay: VecDeque<Entry>,
    replay_bytes: usize,
    /// The last entry that the server ever held and did not replace.
    pub(super) seen: EntryId,
    /// The last entry that it may have held.
    pub(super) doubt: EntryId,
    /// Files that are named like segments but were not in use yet.
    pub(super) unused: Vec<String>,
    applied: EntryId,
    /// Entries above the checkpoint are missing from here on; what follows is evidence only.
    beyond: bool,
    started: bool,
}

impl Scan {
    /// Scans the segments, which come in order and with no spans yet.
    pub(super) fn run(
        segments: Vec<Segment>,
        params: &LogParams,
        applied: EntryId,
    ) -> Result<Scan, LogError> {
        let mut scan = Scan {
            index: Index::new(applied),
            chosen: Slot(0),
            tail: VecDeque::new(),
            replay: VecDeque::new(),
            replay_bytes: 0,
            seen: applied,
            doubt: applied,
            unused: Vec::new(),
            applied,
            beyond: false,
            started: false,
        };
        let mut segments = segments.into_iter().peekable();
        while let Some(segment) = segments.next() {
            let next = segments.peek();
            let next_base = next.map(|it| base_of(it, params)).transpose()?.flatten();
            scan.segment(segment, params, next_base)?;
        }
        scan.finish();
        Ok(scan)
    }

    fn segment(
        &mut self,
        segment: Segment,
        params: &LogParams,
        next_base: Option<EntryId>,
    ) -> Result<(), LogError> {
        let mut window = Window::new(&segment, params.cell);
        let bytes = window.bytes(0, SEGMENT_HEADER_BYTES as usize)?;
        let header = match SegmentHeader::decode(bytes) {
            SegmentStart::Header(header) => {
                if header.cell != params.cell || header.group != params.group {
                    return Err(LogError::Foreign {
                        path: segment.path.clone(),
                    });
                }
                // A file that was being recycled: what it holds is what its name says.
                (header.sequence == segment.sequence).then_some(header)
            }
            SegmentStart::Version(found) => {
                return Err(LogError::Version {
                    path: segment.path.clone(),
                    found,
                });
            }
            SegmentStart::Unreadable => None,
        };
        let base = match header {
            Some(header) => {
                self.enter(header.base, header.reset);
                self.seen = header.evidence.unwrap_or_default().max(header.base);
                self.doubt = header.doubt.unwrap_or_default().max(self.seen);
                Some(header.base)
            }
            None => match window.next_valid(SEGMENT_HEADER_BYTES)? {
                // Its base can be had from its first record, if that is there.
                Some(first) if first.offset == SEGMENT_HEADER_BYTES && first.is_entry() => {
                    // What its header said is lost: what was known before it stays.
                    self.enter(first.base(), false);
                    self.seen = self.seen.max(first.base());
                    Some(first.base())
                }
                // Records behind a damaged start: where they belong is found out below.
                Some(_) => None,
                // The file was not in use yet.
                None => {
                    self.unused.push(segment.path);
                    return Ok(());
                }
            },
        };
        self.index.segments.push_back(segment);
        self.records(&mut window, base, next_base)
    }

    /// Brings the log to the state that a segment starts from.
    fn enter(&mut self, base: EntryId, reset: bool) {
        let known = self.index.id_at(base.slot) == Some(base);
        if !self.started || reset {
            self.restart(base);
        } else if known {
            self.index.cut(base.slot);
            self.drop_tail(base.slot);
            self.beyond = false;
        } else if base.slot <= self.applied.slot {
            self.restart(base);
        } else {
            self.lost();
        }
        self.started = true;
    }

    /// Starts the log anew behind `base`; what was before is not needed or not readable.
    fn restart(&mut self, base: EntryId) {
        let segments = std::mem::take(&mut self.index.segments);
        self.index = Index::new(base);
        self.index.segments = segments;
        for segment in &mut self.index.segments {
            segment.spans.clear();
        }
        self.tail.clear();
        self.replay.clear();
        self.replay_bytes = 0;
        self.beyond = false;
    }

    /// Notes that entries between the log's end and something above the checkpoint are missing.
    fn lost(&mut self) {
        if self.index.last.slot < self.applied.slot {
            self.restart(self.applied);
        }
        self.beyond = true;
    }

    fn drop_tail(&mut self, after: Slot) {
        while self.tail.back().is_some_and(|entry| entry.id.slot > after) {
            self.tail.pop_back();
        }
    }

    /// Walks the records of a segment that starts behind `base`; `None` if that is lost. The same holds for
    /// the next segment and `next_base`.
    fn records(
        &mut self,
        window: &mut Window,
        base: Option<EntryId>,
        next_base: Option<EntryId>,
    ) -> Result<(), LogError> {
        let mut is_based = base.is_some();
        let mut cursor = base.unwrap_or(self.index.last);
        let mut offset = SEGMENT_HEADER_BYTES;
        loop {
            let expected = match window.record(offset)? {
                Some(record) if record.follows(cursor) => self.load(window, record)?,
                _ => None,
            };
            let (record, entry) = match expected {
                Some(loaded) => loaded,
                None if is_based && next_base == Some(cursor) => return Ok(()),
                None => match self.skip_damage(window, offset, cursor, is_based)? {
                    Some(loaded) => loaded,
                    None => return Ok(()),
                },
            };
            is_based = true;
            offset = record.offset + record.header.record_bytes();
            // What was known chosen when a record was written is chosen whatever became of others. But if
            // entries are missing, what is before them may have been replaced by some of them.
            if !self.beyond {
                self.chosen = self.chosen.max(record.header.chosen);
            }
            if record.is_entry() {
                cursor = record.header.id;
                self.accept(&record, entry);
            }
            self.forget_chosen();
        }
    }

    /// At a place without the record that should be there: decides between a torn tail (`None`) and
    /// damage, behind which it finds the next record. Unless `is_based` the segment's base is lost, and
    /// `cursor` is the last entry before the segment.
    fn skip_damage(
        &mut self,
        window: &mut Window,
        offset: u64,
        cursor: EntryId,
        is_based: bool,
    ) -> Result<Option<(Record, Option<Entry>)>, LogError> {
        let missing = Slot(cursor.slot.0.saturating_add(1));
        let mut next = None;
        let mut durable = EntryId::default();
        let mut ended = EntryId::default();
        let mut at = offset + ALIGN_BYTES as u64;
        while let Some(record) = window.next_valid(at)? {
            at = record.offset + ALIGN_BYTES as u64;
            let id = record.header.id;
            if record.is_entry() && id.slot <= cursor.slot {
                continue;
            }
            if record.is_entry() {
                durable.slot = durable.slot.max(record.header.durable_before);
                durable.ballot = durable.ballot.max(record.prev);
            } else if record.header.durable_before >= id.slot {
                durable = durable.max(id);
            } else {
                durable.slot = durable.slot.max(record.header.durable_before);
                ended = ended.max(id);
            }
            if let Some(loaded) = self.load(window, record)? {
                at = record.offset + record.header.record_bytes();
                if next.is_none() && record.is_entry() {
                    if record.base() == cursor {
                        // Nothing is missing: a marker was damaged.
                        return Ok(Some(loaded));
                    }
                    next = Some(loaded);
                }
            } else if id.slot <= durable.slot {
                self.seen = self.seen.max(id);
            }
        }
        if ended.slot >= missing || !is_based {
            self.doubt = self.doubt.max(ended);
        }
        if durable.slot < missing {
            if !is_based {
                // Slots that are not missing may have been filled anew.
                self.doubt = self.doubt.max(durable);
            }
            // Entries up to the checkpoint were durable, whatever the log says.
            if self.applied.slot < missing {
                return Ok(None);
            }
        } else {
            self.seen = self.seen.max(durable);
        }
        match &next {
            Some((record, _)) if record.base().slot <= self.applied.slot => {
                self.restart(record.base());
            }
            None if durable.slot <= self.applied.slot => {}
            _ => self.lost(),
        }
        Ok(next)
    }

    fn accept(&mut self, record: &Record, entry: Option<Entry>) {
        self.seen = self.seen.max(record.header.id);
        if self.beyond {
            return;
        }
        let span = Span::new(record.offset, record.header.record_bytes());
        self.index.push(record.header.id, span);
        self.tail.extend(entry);
    }

    /// Verifies a record's payload and reads its entry. Entries up to the checkpoint are not read:
    /// nobody needs them to start, and a reader verifies what it reads.
    fn load(
        &self,
        window: &mut Window,
        record: Record,
    ) -> Result<Option<(Record, Option<Entry>)>, LogError> {
        if !record.is_entry() || record.header.id.slot <= self.applied.slot {
            return Ok(Some((record, None)));
        }
        let entry = window.entry(&record)?;
        Ok(entry.map(|entry| (record, Some(entry))))
    }

    /// Takes what is chosen out of the tail, and keeps for replay what there is room for.
    fn forget_chosen(&mut self) {
        while let Some(entry) = self.tail.pop_front() {
            if entry.id.slot > self.chosen {
                self.tail.push_front(entry);
                break;
            }
            let follows = self.applied.slot.0 + 1 + self.replay.len() as u64 == entry.id.slot.0;
            if follows && self.replay_bytes < REPLAY_BYTES_MAX {
                self.replay_bytes += entry.weight_bytes();
                self.replay.push_back(entry);
            }
        }
    }

    fn finish(&mut self) {
        let applied = self.applied;
        if self.index.id_at(applied.slot) != Some(applied) {
            self.restart(applied);
        }
        self.chosen = self.chosen.clamp(applied.slot, self.index.last.slot);
        self.forget_chosen();
    }
}

/// Where a segment begins, if its header can be read and it is in use.
fn base_of(segment: &Segment, params: &LogParams) -> Result<Option<EntryId>, LogError> {
    let mut window = Window::new(segment, params.cell);
    let bytes = window.bytes(0, SEGMENT_HEADER_BYTES as usize)?;
    let SegmentStart::Header(header) = SegmentHeader::decode(bytes) else {
        return Ok(None);
    };
    Ok((header.sequence == segment.sequence).then_some(header.base))
}

/// A record whose header area is valid.
#[derive(Clone, Copy)]
struct Record {
    offset: u64,
    header: RecordHeader,
    /// Ballot of the entry before.
    prev: Ballot,
}

impl Record {
    fn is_entry(&self) -> bool {
        self.header.is_entry
    }

    /// The entry before.
    fn base(&self) -> EntryId {
        EntryId {
            ballot: self.prev,
            slot: Slot(self.header.id.slot.0 - 1),
        }
    }

    fn follows(&self, cursor: EntryId) -> bool {
        if self.is_entry() {
            self.base() == cursor
        } else {
            self.header.id == cursor
        }
    }
}

/// Reads a segment front to back: the more at once the longer nothing is left out. Payloads up to the
/// checkpoint are left out, so that large ones cost no time.
struct Window {
    file: Arc<dyn DiskFile>,
    path: String,
    file_bytes: u64,
    cell: [u8; 16],
    sequence: u64,
    /// Offset of the buffer in the file.
    start: u64,
    buffer: AlignedBuf,
    /// Bytes of the buffer that were read.
    filled: usize,
    /// What is read at once next.
    want: usize,
}

impl Window {
    fn new(segment: &Segment, cell: [u8; 16]) -> Window {
        Window {
            file: Arc::clone(&segment.file),
            path: segment.path.clone(),
            file_bytes: segment.bytes,
            cell,
            sequence: segment.sequence,
            start: 0,
            buffer: AlignedBuf::zeroed(0),
            filled: 0,
            want: WINDOW_BYTES_MIN,
        }
    }

    /// Bytes of the segment; fewer at its end.
    fn bytes(&mut self, offset: u64, bytes: usize) -> Result<&[u8], LogError> {
        let inside = offset >= self.start
            && offset + bytes as u64 <= self.start + self.filled as u64
            && self.filled > 0;
        if !inside {
            let rest = self.file_bytes.saturating_sub(offset) as usize;
            let is_next = offset >= self.start && offset <= self.start + self.filled as u64;
            self.want = match is_next {
                true => (self.want * 2).min(WINDOW_BYTES_MAX),
                false => WINDOW_BYTES_MIN,
            };
            let want = self.want.min(rest).max(bytes);
            let want = want.next_multiple_of(ALIGN_BYTES);
            if self.buffer.len() < want {
                self.buffer = AlignedBuf::zeroed(want);
            }
            let memory = &mut self.buffer.as_mut_slice()[..want];
            let read = self.file.read_at(memory, offset);
            self.filled = read.map_err(|source| LogError::io("read", &self.path, source))?;
            self.start = offset;
        }
        let from = (offset - self.start) as usize;
        let until = self.filled.min(from + bytes);
        Ok(&self.buffer.as_slice()[from..until])
    }

    fn place(&self, offset: u64) -> Place {
        Place {
            cell: self.cell,
            sequence: self.sequence,
            offset,
        }
    }

    /// The record at a place, if its header area is valid.
    fn record(&mut self, offset: u64) -> Result<Option<Record>, LogError> {
        let place = self.place(offset);
        let Some(header) = RecordHeader::decode(self.bytes(offset, ALIGN_BYTES)?, &place) else {
            return Ok(None);
        };
        if offset + header.record_bytes() > self.file_bytes {
            return Ok(None);
        }
        let area = self.bytes(offset, header.area_bytes as usize)?;
        let Some(entry) = header.verify(area, &place) else {
            return Ok(None);
        };
        let prev = match header.is_entry {
            true => peek_prev(entry),
            false => Some(Ballot::default()),
        };
        let is_possible = header.id.slot > Slot(0) || !header.is_entry;
        Ok(prev.filter(|_| is_possible).map(|prev| Record {
            offset,
            header,
            prev,
        }))
    }

    /// The entry of a record, if its payload is as it was written. The payload is a copy, so that it does not
    /// keep the window in memory.
    fn entry(&mut self, record: &Record) -> Result<Option<Entry>, LogError> {
        let place = self.place(record.offset);
        let bytes = self.bytes(record.offset, record.header.record_bytes() as usize)?;
        let Some((area, payload)) = bytes.split_at_checked(record.header.area_bytes as usize)
        else {
            return Ok(None);
        };
        let payload = Bytes::copy_from_slice(payload);
        let entry = record.header.verify(area, &place);
        let Some(entry) = entry else {
            return Ok(None);
        };
        decode_entry(&record.header, entry, payload).map_err(|what| LogError::Newer {
            path: self.path.clone(),
            slot: record.header.id.slot,
            what,
        })
    }

    /// The first place from `offset` on with a record whose header area is valid.
    fn next_valid(&mut self, offset: u64) -> Result<Option<Record>, LogError> {
        let mut at = offset;
        while at + ALIGN_BYTES as u64 <= self.file_bytes {
            if let Some(record) = self.record(at)? {
                return Ok(Some(record));
            }
            at += ALIGN_BYTES as u64;
        }
        Ok(None)
    }
}
