//! The log of one server: entries in the order of their slots, durable when an append returns.
//!
//! * `record` — bytes of a record and of a segment's header
//! * `recovery` — what is read at start: the torn-tail rule
//! * `index` — where the records are
//! * [`LogReader`] — reads entries back beside the appending thread
//! * [`Log`] — appends, truncates, trims
//!
//! The log is a directory of segments, numbered in the order of their making. A segment is zero-filled
//! or recycled before its first record is written, so that a write of records changes no metadata of
//! the file system. Nothing in a segment is ever written twice: to remove entries a new segment is
//! begun whose header names the entry behind which it goes on.

mod index;
mod reader;
mod record;
mod recovery;

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;

use crate::disk::{ALIGN_BYTES, AlignedBuf, Disk, OpenMode};
use crate::entry::{ENTRY_PAYLOAD_MAX, Entry, EntryError};
use crate::types::{EntryId, GroupId, Slot};
use index::{Index, Segment, Span};
pub use reader::{LogRead, LogReadError, LogReader};
use record::{
    LOG_VERSION, Place, RECORD_BYTES_MAX, SEGMENT_HEADER_BYTES, SegmentHeader, encode_area,
};
use recovery::Scan;

/// Directory of the log.
const DIRECTORY: &str = "log";
/// Names of files that are ready to become segments, and of those that are being made so, start thus.
const SPARE_PREFIX: &str = "spare-";
/// A write takes at most so much; a larger batch takes several.
const WRITE_BYTES_MAX: usize = 8 << 20;
/// A write has at most so many parts (`IOV_MAX`).
const WRITE_PARTS_MAX: usize = 1024;
/// Most parts that one entry makes: its payload in place, with copied pieces between.
const ENTRY_PARTS_MAX: usize = 2 * (ENTRY_PAYLOAD_MAX / IN_PLACE_BYTES) + 2;
/// Payloads from this size on are written from where they are if they are aligned; smaller ones are
/// cheaper to copy.
const IN_PLACE_BYTES: usize = 64 << 10;
/// Zeros are written in pieces of this size.
const FILL_BYTES: usize = 4 << 20;
/// A marker takes one block.
const MARKER_BYTES: usize = ALIGN_BYTES;

/// How a log is kept.
#[derive(Clone, Debug)]
pub struct LogParams {
    /// Cell that the log belongs to.
    pub cell: [u8; 16],
    /// Which log of the cell.
    pub group: GroupId,
    /// Size of a segment, a multiple of 4096.
    pub segment_bytes: u64,
    /// So much is kept when the log is trimmed, to feed servers that lag.
    pub retain_bytes: u64,
    /// So many files are made ready to become segments.
    pub spares: usize,
    /// Segments that are given up become spares, up to so many: those that one trim gives up are needed
    /// again before the next, and to remove them and fill others with zeros would cost as much as
    /// writing the log once more.
    pub spares_max: usize,
}

impl LogParams {
    /// The usual sizes.
    pub fn new(cell: [u8; 16]) -> LogParams {
        LogParams {
            cell,
            group: GroupId(0),
            segment_bytes: 128 << 20,
            retain_bytes: 512 << 20,
            spares: 2,
            spares_max: 8,
        }
    }
}

/// What a log held when it was opened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Recovered {
    /// The entry before the first that can be read.
    pub base: EntryId,
    /// The last entry.
    pub last: EntryId,
    /// Highest slot that is known to be chosen; at least the checkpoint's.
    pub chosen: Slot,
    /// The server held entries up to this one, above `last`, which damage has taken. It must not deny
    /// them when it votes.
    pub evidence: Option<EntryId>,
    /// The same, where a torn write is possible as well: the end of the last write can be read, and not
    /// all that was before it. If the write was torn, nobody was told of its entries; if they rotted, the
    /// server may have acknowledged them. Above `last` and `evidence`.
    pub doubt: Option<EntryId>,
    /// The entries above `chosen`.
    pub tail: Vec<Entry>,
    /// The first entries above the checkpoint, none above `chosen`: those that are still in memory.
    pub replay: VecDeque<Entry>,
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk failed. Final: what is on it now is known only after a restart.
    #[error("log file {path}: {action} failed")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Another call has failed before.
    #[error("the log cannot be used after this failure: {first}")]
    Poisoned {
        /// What failed first.
        first: String,
    },
    /// A segment of a format version that this program does not know.
    #[error(
        "log segment {path} has format version {found}, this program knows versions up to {LOG_VERSION}"
    )]
    Version {
        /// Which file.
        path: String,
        /// Its version.
        found: u16,
    },
    /// An entry that this version cannot read, though it is as it was written: it must not be taken for damage.
    #[error("log segment {path}: {}", newer(*.slot, .what))]
    Newer {
        /// Which file.
        path: String,
        /// Which entry.
        slot: Slot,
        /// What is not known.
        what: EntryError,
    },
    /// A segment of another cell or group.
    #[error("log segment {path}: belongs to another cell or group")]
    Foreign {
        /// Which file.
        path: String,
    },
    /// There is a checkpoint, but no log beside it.
    #[error("the log is gone, though a checkpoint at slot {applied} exists")]
    Missing {
        /// Slot of the checkpoint.
        applied: Slot,
    },
    /// An entry that no record can hold.
    #[error("the entry of slot {slot} is larger than a record can be")]
    TooLarge {
        /// Which.
        slot: Slot,
    },
}

impl LogError {
    fn io(action: &'static str, path: &str, source: io::Error) -> LogError {
        LogError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

/// What is said of an entry that this version cannot read.
fn newer(slot: Slot, what: &EntryError) -> String {
    let unknown = what.unknown().unwrap_or_else(|| what.to_string());
    format!(
        "the entry in slot {slot} has {unknown}, which this version does not know: it was written by a newer version; start that one"
    )
}

/// A log, for the one thread that appends.
pub struct Log {
    disk: Arc<dyn Disk>,
    params: LogParams,
    index: Arc<RwLock<Index>>,
    spares: Arc<Spares>,
    active: Active,
    next_sequence: u64,
    /// See [`Recovered::evidence`].
    evidence: Option<EntryId>,
    /// See [`Recovered::doubt`].
    doubt: Option<EntryId>,
    staging: Staging,
    /// Entries were appended since the last marker.
    wants_marker: bool,
    appended_bytes: u64,
    /// What failed first; the log takes nothing after it.
    failure: Option<String>,
}

/// The segment that is written.
struct Active {
    sequence: u64,
    path: String,
    file: Arc<dyn crate::disk::DiskFile>,
    /// Where the next record goes.
    end: u64,
    bytes: u64,
}

impl Log {
    /// Opens the log of a server whose checkpoint stands at `applied`; makes one if that is before
    /// the first entry and there is none.
    ///
    /// # Errors
    /// [`LogError`]. Damage of records is none: see [`Recovered`].
    pub fn open(
        disk: Arc<dyn Disk>,
        params: LogParams,
        applied: EntryId,
    ) -> Result<(Log, Recovered), LogError> {
        assert!(
            params.segment_bytes.is_multiple_of(ALIGN_BYTES as u64)
                && params.segment_bytes > SEGMENT_HEADER_BYTES,
            "a segment is a multiple of 4096 bytes"
        );
        let segments = existing_segments(&*disk)?;
        if segments.is_empty() && applied.slot > Slot(0) {
            return Err(LogError::Missing {
                applied: applied.slot,
            });
        }
        let next_sequence = segments.last().map_or(1, |segment| segment.sequence + 1);
        let scan = Scan::run(segments, &params, applied)?;
        let spares = Arc::new(Spares::open(Arc::clone(&disk), &params, &scan.unused)?);
        let last = scan.index.last;
        let evidence = (scan.seen > last).then_some(scan.seen);
        let doubt = (scan.doubt > scan.seen.max(last)).then_some(scan.doubt);
        let recovered = Recovered {
            base: scan.index.base,
            last,
            chosen: scan.chosen,
            evidence,
            doubt,
            tail: scan.tail.into(),
            replay: scan.replay,
        };
        let is_empty = scan.index.base == last;
        let index = Arc::new(RwLock::new(scan.index));
        let active = Active::begin(&*disk, &spares, &params, next_sequence, |sequence| {
            SegmentHeader {
                group: params.group,
                cell: params.cell,
                sequence,
                reset: is_empty,
                base: last,
                evidence,
                doubt,
            }
        })?;
        let mut log = Log {
            disk,
            params,
            index,
            spares,
            active,
            next_sequence: next_sequence + 1,
            evidence,
            doubt,
            staging: Staging::default(),
            wants_marker: false,
            appended_bytes: 0,
            failure: None,
        };
        log.list_active();
        log.recycle_dead()?;
        Ok((log, recovered))
    }

    /// Appends entries, after removing those behind `truncate_after` if that is given. Durable when
    /// it returns. `chosen` is written down as a hint for the next start.
    ///
    /// # Errors
    /// [`LogError`]; after any the log cannot be used any more.
    ///
    /// # Panics
    /// If the entries do not follow the log's last.
    pub fn append(
        &mut self,
        truncate_after: Option<Slot>,
        entries: &[Entry],
        chosen: Slot,
    ) -> Result<(), LogError> {
        self.append_many([(truncate_after, entries, chosen)])
    }

    /// Carries out several appends, with one write where possible. All are durable when it returns.
    ///
    /// # Errors
    /// As [`Log::append`].
    ///
    /// # Panics
    /// As [`Log::append`].
    pub fn append_many<'a>(
        &mut self,
        batch: impl IntoIterator<Item = (Option<Slot>, &'a [Entry], Slot)>,
    ) -> Result<(), LogError> {
        self.guard(|log| {
            for (truncate_after, entries, chosen) in batch {
                if let Some(slot) = truncate_after {
                    log.truncate(slot)?;
                }
                for entry in entries {
                    log.stage(Some(entry), chosen)?;
                }
            }
            log.flush()
        })
    }

    /// Writes a record that shows that the entries before it were durable, so that damage to the last
    /// write leaves no doubt whether it was torn. Does nothing if no entry was appended since the last marker.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn mark_idle(&mut self, chosen: Slot) -> Result<(), LogError> {
        if !self.wants_marker && self.failure.is_none() {
            return Ok(());
        }
        self.guard(|log| {
            log.stage(None, chosen)?;
            log.flush()?;
            log.wants_marker = false;
            Ok(())
        })
    }

    /// Forgets all entries and goes on behind `base`, up to which the server's state is durable.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn reset(&mut self, base: EntryId) -> Result<(), LogError> {
        self.guard(|log| {
            log.evidence = log.evidence.filter(|evidence| *evidence > base);
            log.doubt = log.doubt.filter(|doubt| *doubt > base);
            log.begin_segment(base, true)?;
            {
                let mut index = log.index.write().unwrap_or_else(PoisonError::into_inner);
                let mut segments = std::mem::take(&mut index.segments);
                for segment in &mut segments {
                    segment.spans.clear();
                }
                *index = Index::new(base);
                index.segments = segments;
            }
            log.list_active();
            log.recycle_dead()
        })
    }

    /// Gives up entries up to `below`, which a checkpoint holds durably, by whole segments; the
    /// newest `retain_bytes` stay.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn trim(&mut self, below: Slot) -> Result<(), LogError> {
        self.guard(|log| {
            {
                let mut index = log.index.write().unwrap_or_else(PoisonError::into_inner);
                let mut bytes: u64 = index.segments.iter().map(|segment| segment.bytes).sum();
                let active = log.active.sequence;
                let mut last = None;
                for segment in &mut index.segments {
                    bytes -= segment.bytes;
                    let is_needed = segment.sequence == active
                        || segment.last() > below
                        || bytes < log.params.retain_bytes;
                    if is_needed {
                        break;
                    }
                    last = Some(segment.last());
                    segment.spans.clear();
                }
                if let Some(last) = last {
                    index.advance_base(last);
                }
            }
            log.recycle_dead()
        })
    }

    /// A handle for other threads.
    pub fn reader(&self) -> LogReader {
        LogReader {
            index: Arc::clone(&self.index),
            cell: self.params.cell,
        }
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

    /// Bytes of all segments and spares.
    pub fn bytes(&self) -> u64 {
        self.kept_bytes() + self.spares.bytes()
    }

    /// Bytes of all segments.
    pub fn kept_bytes(&self) -> u64 {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// The file that is written, and where in it the next record goes.
    pub fn end(&self) -> (&str, u64) {
        (&self.active.path, self.active.end)
    }

    /// Bytes that were appended since the log was opened.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Evidence of entries that are lost here: see [`Recovered::evidence`]. `None` once the log has
    /// grown beyond.
    pub fn evidence(&self) -> Option<EntryId> {
        self.evidence
    }

    /// See [`Recovered::doubt`]. `None` once the log has grown beyond.
    pub fn doubt(&self) -> Option<EntryId> {
        self.doubt
    }

    /// A handle with which another thread keeps spare segments ready.
    pub fn spares(&self) -> Arc<Spares> {
        Arc::clone(&self.spares)
    }

    /// Runs a step; whatever fails poisons the log.
    fn guard(
        &mut self,
        step: impl FnOnce(&mut Log) -> Result<(), LogError>,
    ) -> Result<(), LogError> {
        if let Some(first) = &self.failure {
            return Err(LogError::Poisoned {
                first: first.clone(),
            });
        }
        let result = step(self);
        if let Err(error) = &result {
            let source = std::error::Error::source(error);
            let source = source.map(|source| format!(": {source}"));
            self.failure = Some(format!("{error}{}", source.unwrap_or_default()));
        }
        result
    }

    /// Removes the entries behind `slot`, by beginning a segment that goes on from there.
    fn truncate(&mut self, slot: Slot) -> Result<(), LogError> {
        self.flush()?;
        let base = {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            if slot >= index.last.slot {
                return Ok(());
            }
            index
                .id_at(slot)
                .expect("only entries that the log holds are removed")
        };
        // What is cut off was not chosen, nor was what damage has taken behind it.
        self.evidence = None;
        self.doubt = None;
        self.begin_segment(base, false)?;
        {
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            index.cut(slot);
        }
        self.list_active();
        self.recycle_dead()
    }

    /// Puts a record, or a marker, into the next write.
    fn stage(&mut self, entry: Option<&Entry>, chosen: Slot) -> Result<(), LogError> {
        let last = self.staging.last.unwrap_or_else(|| self.last());
        if let Some(entry) = entry {
            let follows = entry.id.slot == last.slot.next() && entry.prev == last.ballot;
            assert!(follows, "entry {} does not follow {last}", entry.id);
        }
        let id = entry.map_or(last, |entry| entry.id);
        let durable = self.staging.durable.unwrap_or(last.slot);
        self.staging.durable = Some(durable);
        self.staging.chosen = chosen;
        // The header goes into a scratch buffer first because its length decides where it goes.
        let offset = self.active.end + self.staging.bytes as u64;
        let place = self.place(offset);
        self.staging.header.clear();
        let area = encode_area(&mut self.staging.header, &place, entry, id, durable, chosen);
        let area = area.ok_or(LogError::TooLarge { slot: id.slot })?;
        let bytes = area + entry.map_or(0, Entry::payload_bytes);
        if self.must_write_first(bytes) {
            self.flush()?;
            if self.active.end + (bytes + MARKER_BYTES) as u64 > self.active.bytes
                && self.active.end > SEGMENT_HEADER_BYTES
            {
                self.begin_segment(last, false)?;
                self.list_active();
                self.recycle_dead()?;
            }
            // Elsewhere, and with what was written now being durable.
            return self.stage(entry, chosen);
        }
        self.staging.add(entry, bytes);
        if entry.is_some() {
            let span = Span::new(offset, bytes as u64);
            self.staging.spans.push((id, span));
            self.staging.last = Some(id);
        }
        Ok(())
    }

    /// Whether what is staged must be written before `bytes` more can be.
    fn must_write_first(&self, bytes: usize) -> bool {
        let staged = self.staging.bytes;
        let is_first = staged == 0 && self.active.end == SEGMENT_HEADER_BYTES;
        // Behind the last entry of a write stands a marker.
        let needed = (staged + bytes + MARKER_BYTES) as u64;
        let does_not_fit = self.active.end + needed > self.active.bytes;
        // A record that is larger than a segment gets one for itself, which grows.
        let rotate = does_not_fit && !is_first;
        let too_much = staged + bytes > WRITE_BYTES_MAX
            || self.staging.parts.len() + ENTRY_PARTS_MAX > WRITE_PARTS_MAX;
        rotate || (staged > 0 && too_much)
    }

    fn place(&self, offset: u64) -> Place {
        Place {
            cell: self.params.cell,
            sequence: self.active.sequence,
            offset,
        }
    }

    /// Writes what is staged.
    fn flush(&mut self) -> Result<(), LogError> {
        if self.staging.bytes == 0 {
            return Ok(());
        }
        self.stage_end();
        let bytes = self.staging.bytes as u64;
        let parts = self.staging.parts();
        let written = self.active.file.write_at(&parts, self.active.end);
        drop(parts);
        written.map_err(|source| LogError::io("write", &self.active.path, source))?;
        self.active.end += bytes;
        self.active.bytes = self.active.bytes.max(self.active.end);
        self.appended_bytes += bytes;
        if !self.staging.spans.is_empty() {
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            for (id, span) in self.staging.spans.drain(..) {
                index.push(id, span);
            }
            if let Some(segment) = index.segments.back_mut() {
                segment.bytes = self.active.bytes;
            }
            self.wants_marker = true;
            let last = index.last;
            self.evidence = self.evidence.filter(|evidence| last < *evidence);
            self.doubt = self.doubt.filter(|doubt| last < *doubt);
        }
        self.staging.clear();
        Ok(())
    }

    /// Ends a write of entries with a marker that names the last one. Of entries that can be read no
    /// more a trace remains then in another place, so that what was acknowledged is never denied.
    fn stage_end(&mut self) {
        let (Some(id), Some(durable)) = (self.staging.last, self.staging.durable) else {
            return;
        };
        let place = self.place(self.active.end + self.staging.bytes as u64);
        let chosen = self.staging.chosen;
        self.staging.header.clear();
        let area = encode_area(&mut self.staging.header, &place, None, id, durable, chosen);
        let bytes = area.expect("a marker has no entry that could be too large");
        assert_eq!(bytes, MARKER_BYTES, "room was left for it");
        self.staging.add(None, bytes);
    }

    /// Begins the segment that goes on behind `base`. The caller adds it to the index.
    fn begin_segment(&mut self, base: EntryId, reset: bool) -> Result<(), LogError> {
        let (group, cell) = (self.params.group, self.params.cell);
        let (evidence, doubt) = (self.evidence, self.doubt);
        let header = |sequence| SegmentHeader {
            group,
            cell,
            sequence,
            reset,
            base,
            evidence,
            doubt,
        };
        let sequence = self.next_sequence;
        self.active = Active::begin(&*self.disk, &self.spares, &self.params, sequence, header)?;
        self.next_sequence += 1;
        self.wants_marker = false;
        Ok(())
    }

    /// Adds the active segment to the index.
    fn list_active(&mut self) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let segment = Segment {
            sequence: self.active.sequence,
            path: self.active.path.clone(),
            file: Arc::clone(&self.active.file),
            bytes: self.active.bytes,
            first: index.last.slot.next(),
            spans: Vec::new(),
        };
        index.segments.push_back(segment);
    }

    /// Makes spares of the segments that hold no entry any more. Whatever part of this survives a
    /// power cut, the segments that stay say the same.
    fn recycle_dead(&mut self) -> Result<(), LogError> {
        let dead = {
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            index.take_dead()
        };
        for segment in dead {
            self.spares.recycle(&segment.path, segment.bytes)?;
        }
        Ok(())
    }
}

impl Active {
    fn begin(
        disk: &dyn Disk,
        spares: &Spares,
        params: &LogParams,
        sequence: u64,
        header: impl FnOnce(u64) -> SegmentHeader,
    ) -> Result<Active, LogError> {
        let spare = spares.take()?;
        let file = disk
            .open(&spare, OpenMode::DirectSync)
            .map_err(|source| LogError::io("open", &spare, source))?;
        let mut bytes = AlignedBuf::zeroed(SEGMENT_HEADER_BYTES as usize);
        bytes
            .as_mut_slice()
            .copy_from_slice(&header(sequence).encode());
        file.write_at(&[IoSlice::new(bytes.as_slice())], 0)
            .map_err(|source| LogError::io("write", &spare, source))?;
        // The name comes last: a file that is called a segment has a durable header.
        let path = segment_path(sequence);
        disk.rename(&spare, &path)
            .and_then(|()| disk.sync_dir(DIRECTORY))
            .map_err(|source| LogError::io("rename", &path, source))?;
        Ok(Active {
            sequence,
            path,
            file,
            end: SEGMENT_HEADER_BYTES,
            bytes: params.segment_bytes,
        })
    }
}

fn segment_path(sequence: u64) -> String {
    format!("{DIRECTORY}/{sequence:016x}")
}

/// The segments in the directory, in order. Everything in them is made durable, so that nothing that
/// is read now can be lost later.
fn existing_segments(disk: &dyn Disk) -> Result<Vec<Segment>, LogError> {
    let failed = |action, source| LogError::io(action, DIRECTORY, source);
    disk.create_dir_all(DIRECTORY)
        .map_err(|source| failed("create", source))?;
    disk.sync_dir("").map_err(|source| failed("sync", source))?;
    let mut segments = Vec::new();
    for entry in disk
        .read_dir(DIRECTORY)
        .map_err(|source| failed("read", source))?
    {
        let Some(sequence) = parse_sequence(&entry.name).filter(|_| !entry.is_dir) else {
            continue;
        };
        let path = segment_path(sequence);
        let opened = disk.open(&path, OpenMode::DirectSync).and_then(|file| {
            file.sync()?;
            let bytes = file.len()?;
            Ok((file, bytes))
        });
        let (file, bytes) = opened.map_err(|source| LogError::io("open", &path, source))?;
        segments.push(Segment {
            sequence,
            path,
            file,
            bytes: bytes.min(SEGMENT_BYTES_MAX),
            first: Slot(0),
            spans: Vec::new(),
        });
    }
    disk.sync_dir(DIRECTORY)
        .map_err(|source| failed("sync", source))?;
    segments.sort_by_key(|segment| segment.sequence);
    Ok(segments)
}

/// No segment is longer, whatever the file system says: positions are kept in 32 bits of 4 KiB.
const SEGMENT_BYTES_MAX: u64 = 1 << 40;

fn parse_sequence(name: &str) -> Option<u64> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (name.len() == 16 && name.bytes().all(is_hex))
        .then(|| u64::from_str_radix(name, 16).ok())
        .flatten()
        .filter(|sequence| *sequence < u64::MAX / 2)
}

/// Files that are ready to become segments.
pub struct Spares {
    disk: Arc<dyn Disk>,
    segment_bytes: u64,
    wanted: usize,
    most: usize,
    ready: Mutex<VecDeque<String>>,
    next_name: AtomicU64,
}

impl Spares {
    /// Finds the spares of earlier runs; `unused` are segments that were never begun.
    fn open(
        disk: Arc<dyn Disk>,
        params: &LogParams,
        unused: &[String],
    ) -> Result<Spares, LogError> {
        let spares = Spares {
            disk,
            segment_bytes: params.segment_bytes,
            wanted: params.spares,
            most: params.spares_max.max(params.spares),
            ready: Mutex::default(),
            next_name: AtomicU64::new(0),
        };
        let names = spares
            .disk
            .read_dir(DIRECTORY)
            .map_err(|source| LogError::io("read", DIRECTORY, source))?;
        let mut numbers: Vec<u64> = names
            .iter()
            .filter_map(|entry| entry.name.strip_prefix(SPARE_PREFIX)?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let next = numbers.last().map_or(0, |last| last + 1);
        spares.next_name.store(next, Ordering::Relaxed);
        for number in numbers {
            spares.readopt(&format!("{DIRECTORY}/{SPARE_PREFIX}{number}"))?;
        }
        for path in unused {
            spares.readopt(path)?;
        }
        Ok(spares)
    }

    /// Takes a file of an earlier run if it is of the right length: one that is still being filled,
    /// or was made with other parameters, is not.
    fn readopt(&self, path: &str) -> Result<(), LogError> {
        let bytes = self
            .disk
            .open(path, OpenMode::Existing)
            .and_then(|file| file.len())
            .map_err(|source| LogError::io("open", path, source))?;
        self.recycle(path, bytes)
    }

    /// Makes a spare of a file that is no segment any more, or removes it.
    fn recycle(&self, path: &str, bytes: u64) -> Result<(), LogError> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes != self.segment_bytes || ready.len() >= self.most {
            return self
                .disk
                .remove_file(path)
                .map_err(|source| LogError::io("remove", path, source));
        }
        let spare = self.new_name();
        self.disk
            .rename(path, &spare)
            .map_err(|source| LogError::io("rename", path, source))?;
        ready.push_back(spare);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.len() as u64 * self.segment_bytes
    }

    fn new_name(&self) -> String {
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        format!("{DIRECTORY}/{SPARE_PREFIX}{number}")
    }

    /// Makes one more spare if there are fewer than wanted; says whether it did. For a thread of
    /// little importance: it writes a whole segment of zeros.
    ///
    /// # Errors
    /// [`LogError::Io`]; it does not harm the log, which makes a segment itself if it finds no spare.
    pub fn prepare(&self) -> Result<bool, LogError> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if ready.len() >= self.wanted {
            return Ok(false);
        }
        drop(ready);
        let spare = self.make()?;
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.push_back(spare);
        Ok(true)
    }

    fn take(&self) -> Result<String, LogError> {
        let ready = self
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        ready.map_or_else(|| self.make(), Ok)
    }

    /// Makes a file of zeros whose blocks are all allocated.
    fn make(&self) -> Result<String, LogError> {
        let path = self.new_name();
        let made = self.fill(&path);
        if let Err(source) = made {
            // A full disk must not be fuller for it.
            let _ = self.disk.remove_file(&path);
            return Err(LogError::io("fill", &path, source));
        }
        Ok(path)
    }

    fn fill(&self, path: &str) -> io::Result<()> {
        self.disk.open(path, OpenMode::Create)?;
        // Past the page cache, as the records will be.
        let file = self.disk.open(path, OpenMode::DirectSync)?;
        let zeros = AlignedBuf::zeroed(FILL_BYTES.min(self.segment_bytes as usize));
        let mut offset = 0;
        while offset < self.segment_bytes {
            let bytes = (self.segment_bytes - offset).min(zeros.len() as u64) as usize;
            file.write_at(&[IoSlice::new(&zeros.as_slice()[..bytes])], offset)?;
            offset += bytes as u64;
        }
        Ok(())
    }
}

/// The next write, as it is put together.
#[derive(Default)]
struct Staging {
    /// Headers and copied payload; the rest of the write is in `parts`.
    memory: Option<AlignedBuf>,
    used: usize,
    parts: Vec<Part>,
    /// Of all parts.
    bytes: usize,
    spans: Vec<(EntryId, Span)>,
    last: Option<EntryId>,
    /// Highest slot that was durable when the first record was staged.
    durable: Option<Slot>,
    /// The hint of the last record.
    chosen: Slot,
    /// Header area of the record that is being staged.
    header: Vec<u8>,
}

enum Part {
    /// From the staging memory.
    Copied(usize, usize),
    /// From where it is.
    InPlace(Bytes),
}

impl Staging {
    /// Adds the record whose header area is in `header`; `bytes` is its whole length.
    fn add(&mut self, entry: Option<&Entry>, bytes: usize) {
        let header = std::mem::take(&mut self.header);
        self.reserve(bytes);
        self.copy(&header);
        for payload in entry.into_iter().flat_map(Entry::payload_parts) {
            let is_aligned = (payload.as_ptr() as usize).is_multiple_of(ALIGN_BYTES)
                && payload.len().is_multiple_of(ALIGN_BYTES);
            if payload.len() >= IN_PLACE_BYTES && is_aligned {
                self.parts.push(Part::InPlace(payload.clone()));
                self.bytes += payload.len();
            } else {
                self.copy(payload);
            }
        }
        self.header = header;
    }

    fn copy(&mut self, bytes: &[u8]) {
        let memory = self.memory.as_mut().expect("memory was reserved");
        let (from, until) = (self.used, self.used + bytes.len());
        memory.as_mut_slice()[from..until].copy_from_slice(bytes);
        self.used = until;
        self.bytes += bytes.len();
        match self.parts.last_mut() {
            Some(Part::Copied(_, end)) if *end == from => *end = until,
            _ => self.parts.push(Part::Copied(from, until)),
        }
    }

    /// Makes sure that `bytes` more can be copied.
    fn reserve(&mut self, bytes: usize) {
        let have = self.memory.as_ref().map_or(0, AlignedBuf::len);
        if self.used + bytes <= have {
            return;
        }
        let want = (self.used + bytes).next_power_of_two().max(64 << 10);
        let mut memory = AlignedBuf::zeroed(want);
        if let Some(old) = &self.memory {
            memory.as_mut_slice()[..self.used].copy_from_slice(&old.as_slice()[..self.used]);
        }
        self.memory = Some(memory);
    }

    fn parts(&self) -> Vec<IoSlice<'_>> {
        let memory = self.memory.as_ref().map_or(&[][..], AlignedBuf::as_slice);
        self.parts
            .iter()
            .map(|part| match part {
                Part::Copied(from, until) => IoSlice::new(&memory[*from..*until]),
                Part::InPlace(bytes) => IoSlice::new(bytes),
            })
            .collect()
    }

    fn clear(&mut self) {
        self.used = 0;
        self.parts.clear();
        self.bytes = 0;
        self.spans.clear();
        self.last = None;
        self.durable = None;
    }
}

const _: () = assert!(RECORD_BYTES_MAX <= WRITE_BYTES_MAX);

#[cfg(test)]
mod tests;
