//! Reads entries back from the log, beside the thread that appends.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use super::index::{Index, Segment, Span};
use super::newer;
use super::record::{Place, RecordHeader, decode_entry};
use crate::disk::AlignedBuf;
use crate::entry::{ENTRY_PAYLOAD_MAX, Entry, EntryError};
pub use crate::paxos::LogRead;
use crate::types::{EntryId, Slot};

/// Of an entry's header so much is read at first; most are shorter.
const HEADER_BYTES_USUAL: u64 = 8 << 10;
/// Stands for payloads that are not read.
static ZEROS: [u8; ENTRY_PAYLOAD_MAX] = [0; ENTRY_PAYLOAD_MAX];

/// Reads a log that another thread appends to and trims. Cheap to clone.
#[derive(Clone)]
pub struct LogReader {
    pub(super) index: Arc<RwLock<Index>>,
    pub(super) cell: [u8; 16],
}

/// Why entries could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LogReadError {
    /// The record is not as it was written. Another server has the entry.
    #[error("log segment {path}: the record of slot {slot} is damaged")]
    Damaged {
        /// Which entry.
        slot: Slot,
        /// Where.
        path: String,
    },
    /// This version cannot read the entry, though it is as it was written. Final: see `LogError::Newer`.
    #[error("log segment {path}: {}", newer(*.slot, .what))]
    Newer {
        /// Which entry.
        slot: Slot,
        /// Where.
        path: String,
        /// What is not known.
        what: EntryError,
    },
    /// The disk failed.
    #[error("log segment {path}: read failed")]
    Io {
        /// Where.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Consecutive records of one segment, to be read at once.
struct Piece {
    segment: Segment,
    first: Slot,
    spans: Vec<Span>,
}

impl LogReader {
    /// Entries after `after` and up to `until`, and not many more than `bytes_max` bytes of them; but
    /// one at least.
    ///
    /// # Errors
    /// [`LogReadError`]; what lies before the error is not given.
    pub fn read(
        &self,
        after: Slot,
        until: Slot,
        bytes_max: usize,
    ) -> Result<LogRead, LogReadError> {
        let (prev, pieces) = match self.plan(after, until, bytes_max) {
            Ok(plan) => plan,
            Err(first) => return Ok(LogRead::Gone { first }),
        };
        let mut entries = Vec::new();
        for piece in &pieces {
            match self.read_piece(piece, &mut entries) {
                Ok(()) => {}
                // The segment may have been recycled meanwhile; then the log says so.
                Err(error) => match self.first_slot() {
                    first if first > after.next() => return Ok(LogRead::Gone { first }),
                    _ => return Err(error),
                },
            }
        }
        Ok(LogRead::Entries { prev, entries })
    }

    /// The entries from `newest` down to `oldest`, as far as the log has them, for people: only the headers are read,
    /// and payloads are zeros of their lengths. `None` where a header is damaged or cannot be read. What is given up while
    /// it is read is left out: its place may hold something else already.
    pub fn headers(&self, newest: Slot, oldest: Slot) -> Vec<(EntryId, Option<Entry>)> {
        let mut headers = Vec::new();
        let mut slot = newest;
        while slot >= oldest.max(Slot(1))
            && let Some((id, segment, span)) = self.place_of(slot)
        {
            headers.push((id, self.read_header(id, &segment, span)));
            slot = Slot(slot.0 - 1);
        }
        let first = self.first_slot();
        headers.retain(|(id, _)| id.slot >= first && self.id_at(id.slot) == Some(*id));
        headers
    }

    /// Where an entry is that the log holds.
    fn place_of(&self, slot: Slot) -> Option<(EntryId, Segment, Span)> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        if slot <= index.base.slot {
            return None;
        }
        let id = index.id_at(slot)?;
        let (segment, position) = index.locate(slot)?;
        Some((id, segment.handle(), *segment.spans.get(position)?))
    }

    fn read_header(&self, id: EntryId, segment: &Segment, span: Span) -> Option<Entry> {
        let place = Place {
            cell: self.cell,
            sequence: segment.sequence,
            offset: span.offset(),
        };
        let read = |bytes: u64| -> Option<AlignedBuf> {
            let mut buffer = AlignedBuf::zeroed(bytes.min(span.bytes()) as usize);
            let read = segment.file.read_at(buffer.as_mut_slice(), span.offset());
            (read.ok()? == buffer.len()).then_some(buffer)
        };
        let mut area = read(HEADER_BYTES_USUAL)?;
        let header = RecordHeader::decode(area.as_slice(), &place)?;
        if area.len() < header.area_bytes as usize {
            area = read(u64::from(header.area_bytes))?;
        }
        let entry = header.verify(area.as_slice(), &place)?;
        let payload = ZEROS.get(..usize::try_from(header.payload_bytes).ok()?)?;
        let entry = Entry::decode(entry, Bytes::from_static(payload)).ok()?;
        (header.is_entry && entry.id == id).then_some(entry)
    }

    /// The segments, oldest first: path, first slot and length of each file, bytes.
    pub fn segments(&self) -> Vec<(String, Slot, u64)> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let segments = index.segments.iter();
        segments
            .map(|segment| (segment.path.clone(), segment.first, segment.bytes))
            .collect()
    }

    /// First slot that the log holds, or would hold if it is empty.
    pub fn first_slot(&self) -> Slot {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.base.slot.next()
    }

    /// The last entry.
    pub fn last(&self) -> EntryId {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.last
    }

    /// Id of an entry that the log holds, or of the one before the first.
    pub fn id_at(&self, slot: Slot) -> Option<EntryId> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.id_at(slot)
    }

    fn plan(
        &self,
        after: Slot,
        until: Slot,
        bytes_max: usize,
    ) -> Result<(EntryId, Vec<Piece>), Slot> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        if after < index.base.slot {
            return Err(index.base.slot.next());
        }
        let Some(prev) = index.id_at(after) else {
            return Ok((index.last, Vec::new()));
        };
        let mut pieces = Vec::new();
        let mut bytes = 0;
        let mut next = after.next();
        let until = until.min(index.last.slot);
        while next <= until && (bytes == 0 || bytes < bytes_max as u64) {
            let (segment, position) = index.locate(next).expect("the log has no gaps");
            let mut spans = Vec::new();
            for span in &segment.spans[position..] {
                let is_wanted = next <= until && (bytes == 0 || bytes < bytes_max as u64);
                // Markers leave gaps between records; small ones are read along.
                if !is_wanted {
                    break;
                }
                spans.push(*span);
                bytes += span.bytes();
                next = next.next();
            }
            pieces.push(Piece {
                first: Slot(next.0 - spans.len() as u64),
                segment: segment.handle(),
                spans,
            });
        }
        Ok((prev, pieces))
    }

    fn read_piece(&self, piece: &Piece, entries: &mut Vec<Entry>) -> Result<(), LogReadError> {
        let (Some(head), Some(tail)) = (piece.spans.first(), piece.spans.last()) else {
            return Ok(());
        };
        let start = head.offset();
        let mut buffer = AlignedBuf::zeroed((tail.end() - start) as usize);
        let read = piece.segment.file.read_at(buffer.as_mut_slice(), start);
        let read = read.map_err(|source| LogReadError::Io {
            path: piece.segment.path.clone(),
            source,
        })?;
        let bytes = buffer.into_bytes().slice(..read);
        for (span, slot) in piece.spans.iter().zip(piece.first.0..) {
            let place = Place {
                cell: self.cell,
                sequence: piece.segment.sequence,
                offset: span.offset(),
            };
            let from = (span.offset() - start) as usize;
            let until = (span.end() - start) as usize;
            let (slot, path) = (Slot(slot), || piece.segment.path.clone());
            let entry = match until <= bytes.len() {
                true => decode_record(bytes.slice(from..until), &place),
                false => Ok(None),
            };
            let entry = entry.map_err(|what| LogReadError::Newer {
                slot,
                path: path(),
                what,
            })?;
            let entry = entry.filter(|entry| entry.id.slot == slot);
            entries.push(entry.ok_or_else(|| LogReadError::Damaged { slot, path: path() })?);
        }
        Ok(())
    }
}

/// `None` if the record is damaged; an error if it holds what this version does not know.
fn decode_record(bytes: Bytes, place: &Place) -> Result<Option<Entry>, EntryError> {
    let Some(header) = RecordHeader::decode(&bytes, place) else {
        return Ok(None);
    };
    let Some(entry) = header.verify(&bytes, place) else {
        return Ok(None);
    };
    let from = header.area_bytes as usize;
    let until = from + header.payload_bytes as usize;
    if !header.is_entry || until > bytes.len() {
        return Ok(None);
    }
    decode_entry(&header, entry, bytes.slice(from..until))
}
