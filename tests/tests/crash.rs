//! Stops a server's storage at every operation that changes the disk, keeps, drops or tears what was
//! not synced, opens it again, and compares with a model.
//!
//! `PSS_SEED=…` runs one seed, `PSS_SEEDS=…` so many of them.

#![expect(clippy::unwrap_used, reason = "a test: what fails ends it")]

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use pss_core::chunk::{ChunkError, ChunkParams, ChunkStore, ReadError, Repair};
use pss_core::disk::files::FileDisk;
use pss_core::disk::{DirEntry, Disk, DiskFile, OpenMode};
use pss_core::engine::{Action, Engine, EngineConfig};
use pss_core::entry::{Command, Entry, Op, Origin, block_checksums};
use pss_core::log::{Log, LogError, LogParams, LogRead, LogReader, Recovered};
use pss_core::paxos::quorum::Membership;
use pss_core::paxos::{Config, Tuning};
use pss_core::state::{Answer, Effect, State, Volume};
use pss_core::storage::{ApplyError, Identity, IdentityFacts, Storage, StorageParams, apply_entry};
use pss_core::time::Instant;
use pss_core::types::{
    BLOCK_BYTES, Ballot, ChunkIndex, EntryId, GroupId, Incarnation, Marks, RequestNumber, ServerId,
    SessionId, Slot, VolumeId,
};
use pss_core::volume::device::ReadPart;
use pss_tests::disk::{Rng, SimDisk, Survival};

const CELL: [u8; 16] = [7; 16];
const SEGMENT_BYTES: u64 = 96 << 10;
/// Few enough for some files to be closed before they are synced, and not all.
const FILES_MAX: usize = 4;

fn params() -> StorageParams {
    StorageParams {
        server: ServerId(1),
        log: LogParams {
            cell: CELL,
            group: GroupId(0),
            segment_bytes: SEGMENT_BYTES,
            retain_bytes: SEGMENT_BYTES,
            spares: 1,
            spares_max: 1,
        },
        chunks: ChunkParams {
            group: GroupId(0),
            tables_bytes_max: 1000,
            files_max: FILES_MAX,
        },
    }
}

fn seeds(usual: u64) -> Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match (number("PSS_SEED"), number("PSS_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, count) => 0..count.unwrap_or(usual),
    }
}

/// A disk that can be stopped.
trait CrashDisk {
    fn disk(&self) -> Arc<dyn Disk>;
    fn ops(&self) -> u64;
    fn crash_at(&self, op: u64);
    /// Loses what may be lost; afterwards [`CrashDisk::disk`] gives it anew.
    fn cut(&mut self, rng: &mut Rng);
}

impl CrashDisk for SimDisk {
    fn disk(&self) -> Arc<dyn Disk> {
        SimDisk::disk(self)
    }
    fn ops(&self) -> u64 {
        self.stats().mutating_ops
    }
    fn crash_at(&self, op: u64) {
        self.crash_at_op(op);
    }
    fn cut(&mut self, rng: &mut Rng) {
        match rng.below(8) {
            0 => self.process_crash(),
            _ => self.power_cut(rng),
        }
    }
}

// ---- entries ----

fn ballot(number: u64) -> Ballot {
    Ballot {
        number,
        server: ServerId(0),
    }
}

/// Blocks that say who wrote them; every seventh write is of zeros.
fn payload(tag: u64, blocks: usize) -> Bytes {
    let word = if tag.is_multiple_of(7) { 0 } else { tag };
    let block = |at| (word + ((at as u64) << 40) * u64::from(word > 0)).to_le_bytes();
    let data = (0..blocks).flat_map(|at| block(at).repeat(BLOCK_BYTES / 8));
    data.collect::<Vec<u8>>().into()
}

fn write_op(volume: VolumeId, first_block: u64, data: Bytes) -> Op {
    Op::Write {
        volume,
        first_block,
        checksums: block_checksums(volume, first_block, &data),
        payload: data,
    }
}

fn noop_entry(prev: EntryId, ballot: Ballot, blocks: usize, tag: u64) -> Entry {
    let op = match blocks {
        0 => Op::Noop,
        blocks => write_op(VolumeId(9), tag, payload(tag, blocks)),
    };
    Entry {
        id: EntryId {
            ballot,
            slot: prev.slot.next(),
        },
        prev: prev.ballot,
        commands: [Command::internal(op)].into(),
    }
}

// ---- the log alone ----

/// A log and what it should hold.
struct LogWorld {
    log: Log,
    /// From slot `base + 1`.
    model: Vec<Entry>,
    base: EntryId,
    chosen: Slot,
    applied: EntryId,
    /// What was being done when the disk stopped.
    inflight: Option<(Option<Slot>, Vec<Entry>)>,
    reset_inflight: Option<EntryId>,
    /// A write was torn, and may have been more.
    doubt: Option<EntryId>,
    ballot: u64,
    tag: u64,
}

fn log_params() -> LogParams {
    params().log
}

impl LogWorld {
    fn new(disk: Arc<dyn Disk>) -> Result<LogWorld, LogError> {
        let (log, recovered) = Log::open(disk, log_params(), EntryId::default())?;
        assert_eq!(recovered.last, EntryId::default());
        Ok(LogWorld {
            log,
            model: Vec::new(),
            base: EntryId::default(),
            chosen: Slot(0),
            applied: EntryId::default(),
            inflight: None,
            reset_inflight: None,
            doubt: None,
            ballot: 1,
            tag: 0,
        })
    }

    fn last(&self) -> EntryId {
        self.model.last().map_or(self.base, |entry| entry.id)
    }

    fn id_at(&self, slot: Slot) -> EntryId {
        match slot.0 - self.base.slot.0 {
            0 => self.base,
            at => self.model[at as usize - 1].id,
        }
    }

    fn new_entries(&mut self, rng: &mut Rng, after: EntryId, count: u64) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut prev = after;
        for _ in 0..count {
            self.tag += 1;
            let blocks = *rng.pick(&[0, 0, 1, 1, 2, 7]);
            let entry = noop_entry(prev, ballot(self.ballot), blocks, self.tag);
            prev = entry.id;
            entries.push(entry);
        }
        entries
    }

    fn step(&mut self, rng: &mut Rng) -> Result<(), LogError> {
        match rng.below(20) {
            0..=9 => {
                let count = 1 + rng.below(4);
                let entries = self.new_entries(rng, self.last(), count);
                self.append(None, entries)
            }
            10..=12 => {
                self.ballot += 1;
                let room = self.last().slot.0 - self.chosen.0;
                let after = Slot(self.chosen.0 + rng.below(room + 1));
                let count = rng.below(3);
                let entries = self.new_entries(rng, self.id_at(after), count);
                self.append(Some(after), entries)
            }
            13 => self.log.mark_idle(self.chosen),
            14 | 15 => {
                let room = self.last().slot.0 - self.chosen.0;
                self.chosen.0 += rng.below(room + 1);
                Ok(())
            }
            16 | 17 => {
                let room = self.chosen.0 - self.applied.slot.0;
                let slot = Slot(self.applied.slot.0 + rng.below(room + 1));
                self.applied = self.id_at(slot);
                self.log.trim(self.applied.slot)?;
                let first = self.log.first_slot();
                assert!(first <= self.applied.slot.next());
                Ok(())
            }
            18 => {
                self.log.spares().prepare()?;
                Ok(())
            }
            _ if rng.chance(200) => {
                self.ballot += 1;
                let base = EntryId {
                    ballot: ballot(self.ballot),
                    slot: Slot(self.last().slot.0 + rng.below(5)),
                };
                // The state at the base is made durable before.
                self.applied = base;
                self.chosen = base.slot;
                self.reset_inflight = Some(base);
                self.log.reset(base)?;
                self.base = base;
                self.model.clear();
                self.reset_inflight = None;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn append(&mut self, truncate: Option<Slot>, entries: Vec<Entry>) -> Result<(), LogError> {
        self.inflight = Some((truncate, entries.clone()));
        // Half of them as a group commit.
        let half = entries.len() / 2;
        let (first, second) = entries.split_at(half);
        let batch = [(truncate, first, self.chosen), (None, second, self.chosen)];
        self.log.append_many(batch)?;
        if let Some(slot) = truncate {
            self.model.truncate((slot.0 - self.base.slot.0) as usize);
        }
        self.model.extend(entries);
        self.inflight = None;
        assert_eq!(self.log.last(), self.last());
        Ok(())
    }

    /// Opens the log again and compares.
    fn reopen(&mut self, disk: Arc<dyn Disk>) -> Result<(), LogError> {
        let (log, recovered) = Log::open(disk, log_params(), self.applied)?;
        self.log = log;
        assert_eq!(recovered.evidence, None, "nothing was damaged");
        if let Some(doubt) = recovered.doubt {
            let torn = self
                .inflight
                .as_ref()
                .and_then(|(_, entries)| entries.last());
            let known = self.doubt.max(torn.map(|entry| entry.id));
            assert!(Some(doubt) <= known, "{doubt} was never being written");
        }
        self.doubt = recovered.doubt;
        if let Some(base) = self.reset_inflight.take() {
            assert_eq!((recovered.base, recovered.last), (base, base));
            self.base = base;
            self.model.clear();
        }
        self.settle(&recovered);
        assert!(recovered.chosen >= self.applied.slot && recovered.chosen <= self.chosen);
        let tail_from = (recovered.chosen.0 - self.base.slot.0) as usize;
        assert_eq!(recovered.tail, self.model[tail_from..]);
        self.check_reader();
        Ok(())
    }

    /// The operation that was under way happened, in part, or did not.
    fn settle(&mut self, recovered: &Recovered) {
        let mut possible = vec![self.model.clone()];
        if let Some((truncate, entries)) = self.inflight.take() {
            let keep = truncate.map_or(self.model.len(), |slot| {
                (slot.0 - self.base.slot.0) as usize
            });
            for count in 0..=entries.len() {
                let mut model = self.model[..keep].to_vec();
                model.extend_from_slice(&entries[..count]);
                possible.push(model);
            }
        }
        let last = |model: &Vec<Entry>| model.last().map_or(self.base, |entry| entry.id);
        let found = possible.iter().find(|model| last(model) == recovered.last);
        let found = found
            .unwrap_or_else(|| panic!("the log ends at {}, which it should not", recovered.last));
        self.model = found.clone();
    }

    fn check_reader(&self) {
        let reader = self.log.reader();
        let first = reader.first_slot();
        assert!(
            first <= self.applied.slot.next(),
            "{first} {}",
            self.applied
        );
        let entries = read_all(&reader, first);
        let skip = (first.0 - 1).saturating_sub(self.base.slot.0) as usize;
        let behind = (self.base.slot.0 + 1).saturating_sub(first.0) as usize;
        assert_eq!(entries[behind.min(entries.len())..], self.model[skip..]);
    }
}

fn read_all(reader: &LogReader, first: Slot) -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    let mut after = Slot(first.0 - 1);
    while after < reader.last().slot {
        match reader.read(after, Slot(u64::MAX), 20_000).unwrap() {
            LogRead::Entries { prev, entries } => {
                assert_eq!(prev.slot, after);
                assert!(!entries.is_empty());
                assert_eq!(entries[0].prev, prev.ballot);
                after = entries.last().unwrap().id.slot;
                all.extend(entries);
            }
            LogRead::Gone { first } => panic!("gone up to {first}"),
        }
    }
    all
}

#[test]
fn log_survives_a_stop_at_every_operation() {
    for seed in seeds(6) {
        let disk = SimDisk::new();
        let mut rng = Rng::new(seed);
        let mut world = LogWorld::new(disk.disk()).unwrap();
        for _ in 0..60 {
            world.step(&mut rng).unwrap();
        }
        world.check_reader();
        let ops = disk.stats().mutating_ops;
        for stop in 1..=ops {
            log_run(seed, stop);
        }
    }
}

fn log_run(seed: u64, stop: u64) {
    let disk = SimDisk::new();
    let mut chance = Rng::new(seed * 1_000_003 + stop);
    disk.crash_at_op(stop);
    let mut rng = Rng::new(seed);
    let mut world = loop {
        match LogWorld::new(disk.disk()) {
            Ok(world) => break world,
            Err(_) => disk.power_cut(&mut chance),
        }
    };
    for _ in 0..5 {
        for _ in 0..60 {
            if world.step(&mut rng).is_err() {
                break;
            }
        }
        disk.power_cut(&mut chance);
        // The next stop may come while it is being opened.
        disk.crash_at_op(disk.stats().mutating_ops + 1 + chance.below(60));
        while world.reopen(disk.disk()).is_err() {
            disk.power_cut(&mut chance);
        }
    }
}

/// One flipped bit anywhere in the log: nothing is lost without a trace.
#[test]
fn damage_of_the_log_is_noticed() {
    for seed in seeds(300) {
        let disk = SimDisk::new();
        let mut rng = Rng::new(seed);
        let mut world = LogWorld::new(disk.disk()).unwrap();
        for _ in 0..40 {
            world.step(&mut rng).unwrap();
        }
        // Half of them stop in the midst of their work.
        let idle = rng.chance(500);
        if idle {
            world.log.mark_idle(world.chosen).unwrap();
        }
        let last = world.last();
        disk.power_cut_with(&mut rng, Survival::Nothing);
        let (path, offset) = disk.flip_random_bit("log/", &mut rng).unwrap();
        let context = format!("seed {seed}, flipped {path} at {offset}");
        let mut evidence_before = None;
        // It is the same however often it is opened.
        for round in 0..3 {
            let (log, recovered) = Log::open(disk.disk(), log_params(), world.applied).unwrap();
            let mut evidence = recovered.evidence.max(recovered.doubt);
            if recovered.last != last {
                assert_eq!(evidence, Some(last), "{context}");
                assert!(!idle || recovered.doubt.is_none(), "{context}");
                assert!(recovered.last.slot >= world.applied.slot, "{context}");
            } else {
                assert_eq!(evidence, None, "{context}");
                evidence = None;
            }
            if round > 0 {
                assert_eq!(evidence, evidence_before, "{context}");
            }
            evidence_before = evidence;
            let reader = log.reader();
            for slot in reader.first_slot().0..=recovered.last.slot.0 {
                if slot > world.base.slot.0 {
                    assert_eq!(reader.id_at(Slot(slot)), Some(world.id_at(Slot(slot))));
                }
            }
            disk.power_cut(&mut rng);
        }
        if evidence_before.is_some() {
            fetch_again(&disk, &mut world, &mut rng, last);
        }
    }
}

/// Appends what was lost, as a leader would send it: then the evidence has done its duty.
fn fetch_again(disk: &SimDisk, world: &mut LogWorld, rng: &mut Rng, last: EntryId) {
    let (mut log, recovered) = Log::open(disk.disk(), log_params(), world.applied).unwrap();
    let skip = (recovered.last.slot.0 - world.base.slot.0) as usize;
    let missing = world.model[skip..].to_vec();
    let (now, later) = missing.split_at(missing.len() - 1);
    log.append(None, now, Slot(0)).unwrap();
    assert_eq!(log.evidence().max(log.doubt()), Some(last));
    disk.power_cut(rng);
    let (mut log, recovered) = Log::open(disk.disk(), log_params(), world.applied).unwrap();
    assert_eq!(recovered.evidence.max(recovered.doubt), Some(last));
    log.append(None, later, Slot(0)).unwrap();
    assert_eq!((log.evidence(), log.doubt()), (None, None));
    disk.power_cut(rng);
    let (_, recovered) = Log::open(disk.disk(), log_params(), world.applied).unwrap();
    let claims = (recovered.evidence, recovered.doubt);
    assert_eq!((recovered.last, claims), (last, (None, None)));
}

/// Any damage, any number of times: no panic, and what is read was written.
#[test]
fn mutated_logs_never_panic() {
    for seed in seeds(300) {
        let disk = SimDisk::new();
        let mut rng = Rng::new(seed);
        let mut world = LogWorld::new(disk.disk()).unwrap();
        for _ in 0..40 {
            world.step(&mut rng).unwrap();
        }
        disk.power_cut_with(&mut rng, Survival::Nothing);
        for _ in 0..1 + rng.below(20) {
            mutate(&disk, &mut rng);
        }
        for _ in 0..2 {
            let opened = Log::open(disk.disk(), log_params(), world.applied);
            let Ok((log, recovered)) = opened else {
                break;
            };
            assert!(recovered.last >= world.applied);
            let reader = log.reader();
            let mut after = Slot(reader.first_slot().0 - 1);
            while after < reader.last().slot {
                let Ok(read) = reader.read(after, after.next(), 1) else {
                    after = after.next();
                    continue;
                };
                let LogRead::Entries { entries, .. } = read else {
                    panic!("it said that it holds {after}");
                };
                for entry in &entries {
                    // Damage may bring entries back that were replaced, but it makes none.
                    entry.verify().unwrap();
                }
                after = after.next();
            }
            disk.power_cut(&mut rng);
        }
    }
}

/// One record anywhere in the log with a command of a newer version: the log is not opened and not a byte of it changes,
/// whatever a power cut makes of the write that was under way.
#[test]
fn a_command_of_a_newer_version_is_never_cut() {
    for seed in seeds(200) {
        let disk = SimDisk::new();
        let mut rng = Rng::new(seed);
        let mut world = LogWorld::new(disk.disk()).unwrap();
        for _ in 0..40 {
            world.step(&mut rng).unwrap();
        }
        let entries = world.new_entries(&mut rng, world.last(), 3);
        world.log.append(None, &entries, Slot(0)).unwrap();
        if rng.chance(500) {
            disk.crash_at_op(disk.stats().mutating_ops + 1);
            let more = world.new_entries(&mut rng, entries[2].id, 4);
            world.log.append(None, &more, Slot(0)).unwrap_err();
        }
        disk.power_cut(&mut rng);
        let slot = entries[rng.below(3) as usize].id.slot;
        set_command(&disk, slot, 200);
        let contents = || {
            let files = disk.files().into_iter();
            let files = files.map(|(path, _)| (disk.contents(&path), path));
            files.collect::<Vec<_>>()
        };
        let before = contents();
        for _ in 0..2 {
            let opened = Log::open(disk.disk(), log_params(), world.applied);
            let error = opened.err().expect("it must not be opened");
            let named = matches!(&error, LogError::Newer { slot: at, .. } if *at == slot);
            assert!(named, "seed {seed}: {error}");
            disk.power_cut(&mut rng);
            assert!(contents() == before, "seed {seed}: the log was written");
        }
    }
}

/// Gives the first command of the newest record of a slot another code; the record is valid then.
fn set_command(disk: &SimDisk, slot: Slot, code: u8) {
    let mut newest = None;
    for (path, _) in disk.files() {
        let bytes = disk.contents(&path).unwrap();
        for (page, at) in bytes
            .chunks_exact(BLOCK_BYTES)
            .zip((0..).step_by(BLOCK_BYTES))
        {
            let of_slot = page[32..40] == slot.0.to_le_bytes() && page[12] == 1;
            if page.starts_with(b"PSSLREC1") && of_slot && path.starts_with("log/0") {
                let key = (page[16..24].to_vec(), at);
                newest = newest.max(Some((key, path.clone(), page.to_vec())));
            }
        }
    }
    let ((_, at), path, mut page) = newest.expect("the log has the slot");
    page[96 + 30] = code;
    let used = 96 + u32::from_le_bytes(page[56..60].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&log_params().cell), &page[12..used]);
    page[8..12].copy_from_slice(&crc.to_le_bytes());
    let file = Disk::open(disk, &path, OpenMode::Existing).unwrap();
    file.write_at(&[IoSlice::new(&page)], at as u64).unwrap();
    file.sync().unwrap();
}

/// Damages a page of a log file: flipped, zeroed, or copied from elsewhere.
fn mutate(disk: &SimDisk, rng: &mut Rng) {
    let files = disk.files();
    let files: Vec<_> = files
        .iter()
        .filter(|(path, _)| path.starts_with("log/"))
        .collect();
    let ((path, length), (other, other_length)) = (rng.pick(&files), rng.pick(&files));
    let pages = |length: &u64| length / BLOCK_BYTES as u64;
    if pages(length) == 0 || pages(other_length) == 0 {
        return;
    }
    let to = rng.below(pages(length)) * BLOCK_BYTES as u64;
    let from = rng.below(pages(other_length)) as usize * BLOCK_BYTES;
    let file = Disk::open(disk, path, OpenMode::Existing).unwrap();
    match rng.below(4) {
        0 => drop(disk.flip_random_bit("log/", rng)),
        1 => file.punch_hole(to, BLOCK_BYTES as u64).unwrap(),
        2 => file.set_len(to).unwrap(),
        _ => {
            let page = disk.contents(other).unwrap()[from..from + BLOCK_BYTES].to_vec();
            file.write_at(&[IoSlice::new(&page)], to).unwrap();
        }
    }
    file.sync().unwrap();
}

/// A server that is killed leaves a segment that is nearly empty; only the last of them is read whole.
#[test]
fn segments_that_were_left_early_are_not_read_whole() {
    let disk = SimDisk::new();
    let mut world = LogWorld::new(disk.disk()).unwrap();
    let mut rng = Rng::new(1);
    let params = LogParams {
        segment_bytes: 4 << 20,
        ..log_params()
    };
    for starts in 1..20 {
        let entries = world.new_entries(&mut rng, world.last(), 1);
        world.log.append(None, &entries, Slot(0)).unwrap();
        world.model.extend(entries);
        let before = disk.stats().bytes_read;
        let (log, recovered) = Log::open(disk.disk(), params.clone(), world.applied).unwrap();
        world.log = log;
        assert_eq!((recovered.last, recovered.evidence), (world.last(), None));
        let bytes = disk.stats().bytes_read - before;
        let most = params.segment_bytes + (starts + 1) * (256 << 10);
        assert!(bytes <= most, "{bytes} bytes read after {starts} starts");
    }
}

#[test]
fn log_of_another_cell_is_refused() {
    let disk = SimDisk::new();
    drop(Log::open(disk.disk(), log_params(), EntryId::default()).unwrap());
    let other = LogParams {
        cell: [8; 16],
        ..log_params()
    };
    let error = Log::open(disk.disk(), other, EntryId::default())
        .err()
        .unwrap();
    assert!(matches!(error, LogError::Foreign { .. }), "{error}");
}

#[test]
fn log_that_is_gone_is_refused() {
    let disk = SimDisk::new();
    let applied = EntryId {
        ballot: ballot(1),
        slot: Slot(5),
    };
    let error = Log::open(disk.disk(), log_params(), applied).err().unwrap();
    assert!(matches!(error, LogError::Missing { .. }), "{error}");
}

#[test]
fn failed_write_of_the_log_is_final() {
    let disk = SimDisk::new();
    let mut world = LogWorld::new(disk.disk()).unwrap();
    let mut rng = Rng::new(1);
    let entries = world.new_entries(&mut rng, world.last(), 2);
    disk.fail_write(0);
    let error = world.log.append(None, &entries, Slot(0)).unwrap_err();
    assert!(matches!(error, LogError::Io { .. }), "{error}");
    let error = world.log.append(None, &entries, Slot(0)).unwrap_err();
    assert!(matches!(error, LogError::Poisoned { .. }), "{error}");
    assert!(error.to_string().contains("write failed: "), "{error}");
    assert_eq!(world.log.last(), EntryId::default());
}

/// A record that a guest has copied into its own volume is not taken for one.
#[test]
fn guest_cannot_forge_records() {
    let disk = SimDisk::new();
    let (mut log, _) = Log::open(disk.disk(), log_params(), EntryId::default()).unwrap();
    let first = noop_entry(EntryId::default(), ballot(1), 1, 1);
    log.append(None, std::slice::from_ref(&first), Slot(0))
        .unwrap();
    let segment = &disk.files()[0].0;
    // What a second record would look like behind a payload that holds it, made by another cell.
    let mut forged = disk.contents(segment).unwrap()[4096..8192].to_vec();
    forged[24..32].copy_from_slice(&(4096u64 * 5).to_le_bytes());
    let data = Bytes::from(forged);
    let mut second = noop_entry(first.id, ballot(1), 0, 2);
    second.commands = [Command::internal(write_op(VolumeId(1), 0, data))].into();
    log.append(None, std::slice::from_ref(&second), Slot(0))
        .unwrap();
    // The header of the real one is damaged: only the end of its write tells of it.
    disk.flip_bit(segment, 4096 * 4 + 40, 1);
    drop(log);
    let (_, recovered) = Log::open(disk.disk(), log_params(), EntryId::default()).unwrap();
    assert_eq!((recovered.last, recovered.evidence), (first.id, None));
    assert_eq!(recovered.doubt, Some(second.id));
}

// ---- everything ----

/// What a block should hold: nothing, or what a write has left.
type Blocks = Vec<Option<Bytes>>;

/// Volumes grow up to so many blocks.
const BLOCKS_MAX: u64 = 700 * 16;

/// A size in blocks: of a few chunks, or of so many that their files fill directories.
fn some_size(rng: &mut Rng) -> u64 {
    match rng.chance(300) {
        true => 16 * 200 + rng.below(BLOCKS_MAX - 16 * 200),
        false => 1 + rng.below(60),
    }
}

/// A block of a volume: any, or one of a few chunks at the ends of directories if there are many.
fn some_block(rng: &mut Rng, blocks: u64) -> u64 {
    if blocks < 16 * 200 {
        return rng.below(blocks);
    }
    let chunk = *rng.pick(&[0, 1, 2, 254, 255, 256, 257, 300, 511, 512]);
    (chunk * 16 + rng.below(16)).min(blocks - 1)
}

/// Replicated state and blocks, as plain values.
#[derive(Clone, Default)]
struct Model {
    state: State,
    blocks: BTreeMap<VolumeId, Blocks>,
}

impl Model {
    fn apply(&mut self, entry: &Entry) -> Vec<Answer> {
        let mut answers = Vec::new();
        for (position, command) in entry.commands.iter().enumerate() {
            let (answer, effect) = self.state.apply(entry.id.slot, position as u32, command);
            answers.push(answer);
            let per_volume = |volume: &Volume| volume.blocks().max(BLOCKS_MAX) as usize;
            match effect {
                Effect::None => {}
                Effect::Create(volume) => {
                    self.blocks
                        .insert(volume.id, vec![None; per_volume(volume)]);
                }
                Effect::Delete(volume) => {
                    self.blocks.remove(&volume.id);
                }
                Effect::Write(volume) => {
                    let Op::Write {
                        first_block,
                        payload,
                        ..
                    } = &command.op
                    else {
                        panic!("not a write");
                    };
                    let blocks = self.blocks.get_mut(&volume.id).unwrap();
                    for at in 0..payload.len() / BLOCK_BYTES {
                        let data = payload.slice(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES);
                        blocks[*first_block as usize + at] = Some(data);
                    }
                }
                Effect::Zero {
                    volume,
                    first_block,
                    blocks,
                    allocate,
                } => {
                    let content = allocate.then(|| Bytes::from(vec![0; BLOCK_BYTES]));
                    let all = self.blocks.get_mut(&volume.id).unwrap();
                    let end = (first_block + blocks).min(all.len() as u64);
                    for block in &mut all[first_block as usize..end as usize] {
                        block.clone_from(&content);
                    }
                }
            }
        }
        self.state.finish_slot(entry.id.slot);
        answers
    }
}

struct World {
    storage: Storage,
    /// All entries from slot 1.
    entries: Vec<Entry>,
    chosen: Slot,
    inflight: Vec<Entry>,
    model: Model,
    promised: Ballot,
    promise_inflight: Option<Ballot>,
    checkpointed: Slot,
    tag: u64,
}

fn format(disk: Arc<dyn Disk>) -> Result<(), pss_core::storage::StorageError> {
    let facts = IdentityFacts {
        group: GroupId(0),
        cell: CELL,
        server: ServerId(1),
        incarnation: Incarnation(1),
        promised: Ballot::default(),
        rejoining: false,
        discards: false,
    };
    Identity::create(disk, facts, true).map(drop)
}

/// An operation failed because the disk stopped.
struct Stopped;

impl World {
    fn new(disk: Arc<dyn Disk>) -> World {
        format(Arc::clone(&disk)).unwrap();
        World {
            storage: Storage::open(disk, &params()).unwrap(),
            entries: Vec::new(),
            chosen: Slot(0),
            inflight: Vec::new(),
            model: Model::default(),
            promised: Ballot::default(),
            promise_inflight: None,
            checkpointed: Slot(0),
            tag: 0,
        }
    }

    fn last(&self) -> EntryId {
        self.entries
            .last()
            .map_or(EntryId::default(), |entry| entry.id)
    }

    fn random_op(&mut self, rng: &mut Rng) -> Op {
        let volumes: Vec<Volume> = self.model.state.volumes().cloned().collect();
        self.tag += 1;
        if volumes.is_empty() || rng.chance(60) {
            return Op::CreateVolume {
                name: format!("v{}", rng.below(3)),
                size_bytes: some_size(rng) * BLOCK_BYTES as u64,
                // Tables of one sector, and of nine.
                chunk_bytes: *rng.pick(&[64 << 10, 64 << 10, 4 << 20]),
                uuid: [self.tag as u8; 16],
            };
        }
        let volume = rng.pick(&volumes);
        let blocks = volume.blocks();
        let first_block = some_block(rng, blocks);
        let most = blocks - first_block;
        match rng.below(20) {
            0 => Op::DeleteVolume { volume: volume.id },
            1 => Op::ResizeVolume {
                volume: volume.id,
                size_bytes: some_size(rng) * BLOCK_BYTES as u64,
                allow_shrink: rng.chance(500),
            },
            2..=4 => Op::Zero {
                volume: volume.id,
                first_block: first_block / 16 * 16,
                blocks: (rng.below(40)).min(blocks - first_block / 16 * 16),
                allocate: rng.chance(300),
            },
            5 => {
                let blocks = rng.below(most + 1);
                Op::Zero {
                    volume: volume.id,
                    first_block,
                    blocks,
                    // Of many chunks that would take too long.
                    allocate: blocks < 60 && rng.chance(300),
                }
            }
            6 if rng.chance(500) => Op::Note {
                text: self.tag.to_string(),
            },
            6 => Op::OpenSessionFrom {
                nonce: self.tag,
                origin: Box::new(Origin {
                    name: "x".into(),
                    user: "y".into(),
                    address: Some(([10, 0, 0, 1], self.tag as u16).into()),
                }),
            },
            _ => {
                let count = (1 + rng.below(4)).min(most) as usize;
                write_op(volume.id, first_block, payload(self.tag, count))
            }
        }
    }

    fn new_entry(&mut self, rng: &mut Rng) -> Entry {
        let prev = self.last();
        let commands = (0..1 + rng.below(4)).map(|_| {
            let op = self.random_op(rng);
            let sessions: Vec<SessionId> = self.model.state.sessions().map(|s| s.id).collect();
            match sessions.first() {
                Some(session) if rng.chance(300) => Command {
                    session: *session,
                    // Some are repetitions.
                    number: RequestNumber(1 + rng.below(30)),
                    settled_below: RequestNumber(1),
                    op,
                },
                _ => Command::internal(op),
            }
        });
        Entry {
            id: EntryId {
                ballot: ballot(1),
                slot: prev.slot.next(),
            },
            prev: prev.ballot,
            commands: commands.collect(),
        }
    }

    fn step(&mut self, rng: &mut Rng) -> Result<(), Stopped> {
        match rng.below(20) {
            0..=11 => {
                let entry = self.new_entry(rng);
                self.carry_out(entry)
            }
            12 | 13 => self.checkpoint(rng),
            14 => self.storage.log.mark_idle(self.chosen).map_err(|_| Stopped),
            15 => {
                let promise = ballot(self.promised.number + 1);
                self.promise_inflight = Some(promise);
                self.storage
                    .identity
                    .set_promise(promise)
                    .map_err(|_| Stopped)?;
                self.promise_inflight = None;
                self.promised = promise;
                Ok(())
            }
            16 => self.empty_trash(rng),
            17 => self.carry(rng),
            _ => self.check_some(rng),
        }
    }

    /// Appends an entry and applies it.
    fn carry_out(&mut self, entry: Entry) -> Result<(), Stopped> {
        self.inflight = vec![entry.clone()];
        let appended = self.storage.log.append(None, &self.inflight, self.chosen);
        appended.map_err(|_| Stopped)?;
        self.inflight.clear();
        self.entries.push(entry.clone());
        self.chosen = entry.id.slot;
        self.apply(&entry)
    }

    /// The entry of one operation.
    fn entry_of(&self, op: Op) -> Entry {
        let prev = self.last();
        Entry {
            id: EntryId {
                ballot: ballot(1),
                slot: prev.slot.next(),
            },
            prev: prev.ballot,
            commands: [Command::internal(op)].into(),
        }
    }

    /// Some of it.
    fn empty_trash(&mut self, rng: &mut Rng) -> Result<(), Stopped> {
        let emptied = self.storage.chunks.empty_trash(1 + rng.below(8) as usize);
        emptied.map(drop).map_err(|_| Stopped)
    }

    fn apply(&mut self, entry: &Entry) -> Result<(), Stopped> {
        let Storage { state, chunks, .. } = &mut self.storage;
        let answers = apply_entry(state, chunks, entry, None).map_err(|_| Stopped)?;
        assert_eq!(answers, self.model.apply(entry));
        self.storage.applied = entry.id;
        Ok(())
    }

    /// A checkpoint with entries in the middle of it.
    fn checkpoint(&mut self, rng: &mut Rng) -> Result<(), Stopped> {
        let checkpoint = self.storage.chunks.begin_checkpoint().unwrap();
        let applied = self.storage.applied;
        let state = self.storage.state.encode();
        for _ in 0..rng.below(3) {
            let entry = self.new_entry(rng);
            self.carry_out(entry)?;
        }
        if rng.chance(100) {
            // Given up: the next takes it over.
            return Ok(());
        }
        checkpoint.flush().map_err(|_| Stopped)?;
        let stored = self
            .storage
            .checkpoint
            .store(applied, None, &Marks::new(), &state);
        stored.map_err(|_| Stopped)?;
        self.checkpointed = applied.slot;
        self.storage.log.trim(applied.slot).map_err(|_| Stopped)
    }

    /// Exports a chunk and imports it again.
    fn carry(&mut self, rng: &mut Rng) -> Result<(), Stopped> {
        let volumes: Vec<Volume> = self.model.state.volumes().cloned().collect();
        if volumes.is_empty() {
            return Ok(());
        }
        let volume = rng.pick(&volumes);
        let chunk =
            some_block(rng, volume.blocks()) * BLOCK_BYTES as u64 / u64::from(volume.chunk_bytes);
        let chunk = ChunkIndex(chunk as u32);
        let stopped = |error: ChunkError| match error {
            ChunkError::BadBlock { volume, block } => panic!("bad block {block} of {volume}"),
            _ => Stopped,
        };
        let chunks = &self.storage.chunks;
        let (list, rest) = chunks.list(volume, ChunkIndex(0), 100).map_err(stopped)?;
        assert_eq!(rest, None);
        let image = chunks.export(volume, chunk).map_err(stopped)?;
        assert_eq!(
            image.is_empty(),
            !list.iter().any(|summary| summary.chunk == chunk)
        );
        chunks.import(volume, chunk, &image).map_err(stopped)?;
        let again = chunks.list(volume, ChunkIndex(0), 100).map_err(stopped)?;
        assert_eq!(again.0, list);
        Ok(())
    }

    fn check_some(&mut self, rng: &mut Rng) -> Result<(), Stopped> {
        let volumes: Vec<Volume> = self.model.state.volumes().cloned().collect();
        if volumes.is_empty() {
            return Ok(());
        }
        let volume = rng.pick(&volumes).clone();
        self.check_volume(&volume)
    }

    fn check_volume(&self, volume: &Volume) -> Result<(), Stopped> {
        let model = &self.model.blocks[&volume.id];
        let chunks = &self.storage.chunks;
        let parts = match chunks.read(volume, 0, model.len() as u64, false) {
            Ok(parts) => parts,
            Err(ReadError::BadBlock { volume, block }) => panic!("bad block {block} of {volume}"),
            Err(_) => return Err(Stopped),
        };
        let mut expected = model.iter();
        for part in parts {
            let (data, blocks) = match &part {
                ReadPart::Data(data) => (Some(data), data.len() / BLOCK_BYTES),
                ReadPart::Hole(bytes) => (None, *bytes as usize / BLOCK_BYTES),
            };
            for at in 0..blocks {
                let data = data.map(|data| data.slice(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES));
                assert!(data == *expected.next().unwrap(), "volume {}", volume.id);
            }
        }
        assert_eq!(expected.next(), None);
        let extents = chunks.extents(volume, 0, model.len() as u64, 1000, false);
        let extents = extents.map_err(|_| Stopped)?;
        let mut at = 0;
        for extent in extents {
            let blocks = extent.length_bytes as usize / BLOCK_BYTES;
            let all = model[at..at + blocks].iter();
            assert!(
                all.into_iter()
                    .all(|block| block.is_some() == extent.allocated)
            );
            at += blocks;
        }
        assert_eq!(at, model.len());
        let allocated = model.iter().flatten().count() * BLOCK_BYTES;
        assert_eq!(chunks.allocated_bytes(volume.id), allocated as u64);
        Ok(())
    }

    fn check_all(&self) -> Result<(), Stopped> {
        assert_eq!(self.storage.state, self.model.state);
        for volume in self.model.state.volumes() {
            self.check_volume(volume)?;
        }
        Ok(())
    }

    /// Opens everything again and compares.
    fn reopen(&mut self, disk: Arc<dyn Disk>) -> Result<(), Stopped> {
        self.storage = Storage::open(disk, &params()).map_err(|error| {
            let text = error.to_string();
            let is_stop = text.contains("failed") || text.contains("failed write");
            assert!(is_stop, "cannot be opened: {text}");
            Stopped
        })?;
        let promised = self.storage.identity.facts().promised;
        if Some(promised) == self.promise_inflight {
            self.promised = promised;
        }
        self.promise_inflight = None;
        assert_eq!(promised, self.promised);
        let recovered = self.storage.recovered.clone();
        assert_eq!(recovered.evidence, None);
        assert!(self.storage.checkpointed >= self.checkpointed);
        if recovered.last != self.last() {
            self.entries.append(&mut self.inflight);
            assert_eq!(recovered.last, self.last());
        }
        self.inflight.clear();
        assert!(self.storage.applied.slot <= self.chosen);
        assert!(self.storage.applied.slot >= self.storage.checkpointed);
        self.model = Model::default();
        for entry in &self.entries[..self.storage.applied.slot.0 as usize] {
            self.model.apply(entry);
        }
        assert_eq!(self.storage.state, self.model.state);
        // A cell of one server: what is in the log is chosen. Chunks may hold what entries after the
        // hint have written before the stop; they can be read when these were applied again.
        for entry in &recovered.tail {
            assert_eq!(*entry, self.entries[entry.id.slot.0 as usize - 1]);
            self.apply(entry)?;
            self.chosen = self.chosen.max(entry.id.slot);
        }
        assert_eq!(self.storage.applied, self.last());
        self.check_all()
    }
}

fn run(mut disk: impl CrashDisk, seed: u64, steps: usize, stop: Option<u64>) -> u64 {
    // Shown if it fails.
    println!("seed {seed}, stop {stop:?}");
    let mut rng = Rng::new(seed);
    let mut chance = Rng::new(seed * 1_000_003 + stop.unwrap_or(0));
    let mut world = World::new(disk.disk());
    let start = disk.ops();
    if let Some(stop) = stop {
        disk.crash_at(start + stop);
    }
    for round in 0..3 {
        for _ in 0..steps {
            if world.step(&mut rng).is_err() {
                break;
            }
        }
        if stop.is_none() {
            assert!(world.check_all().is_ok());
            break;
        }
        disk.cut(&mut chance);
        if round < 2 {
            disk.crash_at(disk.ops() + 1 + chance.below(100));
        }
        while world.reopen(disk.disk()).is_err() {
            disk.cut(&mut chance);
        }
    }
    disk.ops() - start
}

#[test]
fn storage_survives_a_stop_at_every_operation() {
    for seed in seeds(4) {
        let ops = run(SimDisk::new(), seed, 60, None);
        assert!(ops > 100);
        for stop in 1..=ops {
            run(SimDisk::new(), seed, 60, Some(stop));
        }
    }
}

/// Longer runs, each stopped somewhere.
#[test]
fn storage_survives_random_stops() {
    for seed in seeds(150) {
        let mut chance = Rng::new(seed);
        run(
            SimDisk::new(),
            1000 + seed,
            200,
            Some(1 + chance.below(900)),
        );
    }
}

/// A volume of many chunks shrinks and grows again, is written to, and is checkpointed while the trash is
/// emptied.
fn shrink_and_grow(world: &mut World, rng: &mut Rng) -> Result<(), Stopped> {
    let resize = |blocks: u64| Op::ResizeVolume {
        volume: VolumeId(1),
        size_bytes: blocks * BLOCK_BYTES as u64,
        allow_shrink: true,
    };
    let write = |chunk: u64| write_op(VolumeId(1), chunk * 16 + 5, payload(1000 + chunk, 3));
    let steps = [resize(20), resize(BLOCKS_MAX), write(300), write(511)];
    for op in steps {
        let entry = world.entry_of(op);
        world.carry_out(entry)?;
        world.empty_trash(rng)?;
    }
    let checkpoint = world.storage.chunks.begin_checkpoint().unwrap();
    let (applied, state) = (world.storage.applied, world.storage.state.encode());
    let entry = world.entry_of(write(255));
    world.carry_out(entry)?;
    checkpoint.flush().map_err(|_| Stopped)?;
    let stored = world
        .storage
        .checkpoint
        .store(applied, None, &Marks::new(), &state);
    stored.map_err(|_| Stopped)?;
    for _ in 0..4 {
        world.empty_trash(rng)?;
    }
    world.check_all()
}

/// What was behind the end of a volume does not come back, and what is written there later stays, whenever
/// the power fails.
#[test]
fn shrinking_survives_a_stop_at_every_operation() {
    for seed in seeds(4) {
        for stop in 1.. {
            println!("seed {seed}, stop {stop}");
            let mut rng = Rng::new(seed * 1_000_003 + stop);
            let disk = SimDisk::new();
            let mut world = World::new(disk.disk());
            apply_op(&mut world, create("v", BLOCKS_MAX)).unwrap();
            for chunk in [0, 2, 10, 255, 256, 300, 301, 511, 512, 699] {
                let write = write_op(VolumeId(1), chunk * 16, payload(chunk, 10));
                apply_op(&mut world, write).unwrap();
            }
            checkpoint(&mut world);
            disk.crash_at_op(disk.stats().mutating_ops + stop);
            if shrink_and_grow(&mut world, &mut rng).is_ok() {
                assert!(stop > 40, "{stop}");
                break;
            }
            disk.power_cut(&mut rng);
            assert!(world.reopen(disk.disk()).is_ok());
            while world.storage.chunks.empty_trash(9).unwrap() {}
            assert!(world.check_all().is_ok());
            checkpoint(&mut world);
            disk.power_cut(&mut rng);
            assert!(world.reopen(disk.disk()).is_ok());
        }
    }
}

// ---- real files ----

/// Real files, with a memory of what was there before each write that is not synced yet.
struct RecordingDisk {
    directory: tempfile::TempDir,
    shared: Arc<Recording>,
}

struct Recording {
    disk: Mutex<Option<FileDisk>>,
    ops: AtomicU64,
    crash_at: AtomicU64,
    undo: Mutex<Vec<Undo>>,
}

struct Undo {
    file: Arc<dyn DiskFile>,
    /// Which file, for syncs.
    key: usize,
    offset: u64,
    before: Vec<u8>,
}

struct RecordingHandle(Arc<Recording>);

impl RecordingDisk {
    fn new() -> RecordingDisk {
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(directory.path()).unwrap();
        RecordingDisk {
            directory,
            shared: Arc::new(Recording {
                disk: Mutex::new(Some(disk)),
                ops: AtomicU64::new(0),
                crash_at: AtomicU64::new(u64::MAX),
                undo: Mutex::default(),
            }),
        }
    }
}

impl CrashDisk for RecordingDisk {
    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(RecordingHandle(Arc::clone(&self.shared)))
    }
    fn ops(&self) -> u64 {
        self.shared.ops.load(Ordering::Relaxed)
    }
    fn crash_at(&self, op: u64) {
        self.shared.crash_at.store(op, Ordering::Relaxed);
    }
    fn cut(&mut self, rng: &mut Rng) {
        let mut undo = std::mem::take(&mut *self.shared.undo.lock().unwrap());
        let mode = rng.below(3);
        for step in undo.drain(..).rev() {
            for (at, sector) in step.before.chunks(512).enumerate() {
                let is_lost = match mode {
                    0 => true,
                    1 => false,
                    _ => rng.chance(500),
                };
                if is_lost {
                    let offset = step.offset + 512 * at as u64;
                    step.file.write_at(&[IoSlice::new(sector)], offset).unwrap();
                }
            }
        }
        // Everything that still holds the old disk is dead to us, but not its lock.
        *self.shared.disk.lock().unwrap() = None;
        self.shared = Arc::new(Recording {
            disk: Mutex::new(Some(FileDisk::open(self.directory.path()).unwrap())),
            ops: AtomicU64::new(self.ops()),
            crash_at: AtomicU64::new(u64::MAX),
            undo: Mutex::default(),
        });
    }
}

impl Recording {
    fn with<T>(&self, step: impl FnOnce(&FileDisk) -> io::Result<T>) -> io::Result<T> {
        match &*self.disk.lock().unwrap() {
            Some(disk) => step(disk),
            None => Err(io::Error::other("stopped")),
        }
    }

    /// Counts an operation that changes the disk. `true`: it is the last.
    fn count(&self) -> io::Result<bool> {
        let number = self.ops.fetch_add(1, Ordering::Relaxed) + 1;
        let crash_at = self.crash_at.load(Ordering::Relaxed);
        match number.cmp(&crash_at) {
            std::cmp::Ordering::Less => Ok(false),
            std::cmp::Ordering::Equal => Ok(true),
            std::cmp::Ordering::Greater => Err(io::Error::other("stopped")),
        }
    }

    fn change<T>(&self, step: impl FnOnce(&FileDisk) -> io::Result<T>) -> io::Result<T> {
        let is_last = self.count()?;
        let result = self.with(step);
        if is_last {
            Err(io::Error::other("stopped"))
        } else {
            result
        }
    }
}

impl Disk for RecordingHandle {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let shared = Arc::clone(&self.0);
        let (file, plain) = if mode == OpenMode::Create {
            self.0.change(|disk| {
                let file = disk.open(path, mode)?;
                Ok((Arc::clone(&file), file))
            })?
        } else {
            self.0.with(|disk| {
                let plain = disk.open(path, OpenMode::Existing)?;
                Ok((disk.open(path, mode)?, plain))
            })?
        };
        // Files are told apart by their inodes.
        let inode = {
            use std::os::unix::fs::MetadataExt;
            self.0
                .with(|disk| Ok(std::fs::metadata(disk.root().join(path))?.ino()))?
        };
        Ok(Arc::new(RecordingFile {
            shared,
            file,
            plain,
            key: inode as usize,
            direct: mode == OpenMode::DirectSync,
        }))
    }
    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.0.with(|disk| disk.read_dir(path))
    }
    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.0.change(|disk| disk.create_dir_all(path))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.change(|disk| disk.rename(from, to))
    }
    fn remove_file(&self, path: &str) -> io::Result<()> {
        self.0.change(|disk| disk.remove_file(path))
    }
    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        self.0.change(|disk| disk.remove_dir_all(path))
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.0.change(|disk| disk.sync_dir(path))
    }
    fn sync_all(&self) -> io::Result<()> {
        if self.0.count()? {
            return Err(io::Error::other("stopped"));
        }
        self.0.undo.lock().unwrap().clear();
        Ok(())
    }
    fn space(&self) -> io::Result<(u64, u64)> {
        self.0.with(FileDisk::space)
    }
}

struct RecordingFile {
    shared: Arc<Recording>,
    file: Arc<dyn DiskFile>,
    /// The same through the page cache, for reads and writes of any alignment.
    plain: Arc<dyn DiskFile>,
    key: usize,
    direct: bool,
}

impl RecordingFile {
    /// Carries out a change of a range, noting what was there.
    fn change(
        &self,
        offset: u64,
        bytes: u64,
        step: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let is_last = self.shared.count()?;
        let mut before = vec![0; bytes as usize];
        self.plain.read_at(&mut before, offset)?;
        let result = step();
        if is_last || !self.direct {
            self.shared.undo.lock().unwrap().push(Undo {
                file: Arc::clone(&self.plain),
                key: self.key,
                offset,
                before,
            });
        }
        if is_last {
            Err(io::Error::other("stopped"))
        } else {
            result
        }
    }
}

impl DiskFile for RecordingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at_nowait(buf, offset)
    }
    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        self.change(offset, bytes, || self.file.write_at(parts, offset))
    }
    fn sync(&self) -> io::Result<()> {
        if self.shared.count()? {
            return Err(io::Error::other("stopped"));
        }
        self.shared
            .undo
            .lock()
            .unwrap()
            .retain(|undo| undo.key != self.key);
        // The real sync is left out: the machine stays up, and it would take most of the time.
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let is_last = self.shared.count()?;
        self.file.set_len(bytes)?;
        if is_last {
            Err(io::Error::other("stopped"))
        } else {
            Ok(())
        }
    }
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.change(offset, bytes, || self.file.punch_hole(offset, bytes))
    }
    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.change(offset, bytes, || self.file.zero_range(offset, bytes))
    }
}

#[test]
fn real_files_survive_stops() {
    for seed in seeds(1) {
        let ops = run(RecordingDisk::new(), seed, 30, None);
        // Each takes a while: these sync in truth.
        for stop in (1..=ops).step_by(5) {
            run(RecordingDisk::new(), seed, 30, Some(stop));
        }
    }
}

// ---- single cases ----

fn apply_op(world: &mut World, op: Op) -> Result<(), ApplyError> {
    let entry = world.entry_of(op);
    world
        .storage
        .log
        .append(None, std::slice::from_ref(&entry), world.chosen)
        .unwrap();
    world.entries.push(entry.clone());
    world.chosen = entry.id.slot;
    world.model.apply(&entry);
    apply_entry(
        &mut world.storage.state,
        &world.storage.chunks,
        &entry,
        None,
    )?;
    world.storage.applied = entry.id;
    Ok(())
}

fn create(name: &str, blocks: u64) -> Op {
    Op::CreateVolume {
        name: name.into(),
        size_bytes: blocks * BLOCK_BYTES as u64,
        chunk_bytes: 64 << 10,
        uuid: [1; 16],
    }
}

fn checkpoint(world: &mut World) {
    world
        .storage
        .chunks
        .begin_checkpoint()
        .unwrap()
        .flush()
        .unwrap();
    let state = world.storage.state.encode();
    world
        .storage
        .checkpoint
        .store(world.storage.applied, None, &Marks::new(), &state)
        .unwrap();
}

fn first_volume(world: &World) -> Volume {
    world.model.state.volumes().next().unwrap().clone()
}

/// `cat` of the chunk files gives the disk back.
#[test]
fn chunk_files_are_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(directory.path()).unwrap());
    let mut world = World::new(disk);
    apply_op(&mut world, create("vol001", 16 * 300)).unwrap();
    let mut expected = Vec::new();
    for chunk in 0..300 {
        let data = payload(chunk * 3 + 1, 16);
        expected.extend_from_slice(&data);
        apply_op(&mut world, write_op(VolumeId(1), chunk * 16, data)).unwrap();
    }
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "for f in data/vol001/*/*/*; do head -c 65536 $f; done",
        ])
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert!(output.stdout == expected);
    let last = directory.path().join("data/vol001/00/01/2b");
    assert!(last.exists());
}

#[test]
fn damaged_block_is_not_given_out() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    apply_op(&mut world, create("v", 40)).unwrap();
    apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 20))).unwrap();
    checkpoint(&mut world);
    let volume = first_volume(&world);
    assert!(disk.flip_bit("data/v/00/00/00", 5 * BLOCK_BYTES as u64 + 7, 3));
    let chunks = Arc::clone(&world.storage.chunks);
    let error = chunks.read(&volume, 3, 10, false).unwrap_err();
    assert!(
        matches!(error, ReadError::BadBlock { block: 5, .. }),
        "{error}"
    );
    assert_eq!(chunks.bad_blocks(), 1);
    let error = chunks.read(&volume, 5, 1, true).unwrap_err();
    assert!(matches!(error, ReadError::WouldBlock), "{error}");
    let error = chunks.export(&volume, ChunkIndex(0)).unwrap_err();
    assert!(
        matches!(error, ChunkError::BadBlock { block: 5, .. }),
        "{error}"
    );
    chunks.read(&volume, 6, 14, false).unwrap();
    // Another server's copy heals it; something else does not.
    let good = payload(1, 20);
    let block = |at: usize| good.slice(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES);
    let repair = |data: Bytes| chunks.repair(&volume, 5, &data).unwrap();
    assert_eq!(repair(block(6)), Repair::Differs);
    assert_eq!(repair(block(5)), Repair::Done);
    assert_eq!(repair(block(5)), Repair::NotNeeded);
    assert!(world.check_all().is_ok());
}

/// A table that is lost must not make blocks read as zeros.
#[test]
fn damaged_tables_give_no_zeros() {
    let trailer = 64 << 10;
    for (even, odd) in [(true, true), (true, false), (false, true)] {
        let disk = SimDisk::new();
        let mut world = World::new(disk.disk());
        apply_op(&mut world, create("v", 40)).unwrap();
        apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 4))).unwrap();
        checkpoint(&mut world);
        apply_op(&mut world, write_op(VolumeId(1), 4, payload(2, 4))).unwrap();
        checkpoint(&mut world);
        for (slot, is_damaged) in [(0, even), (1, odd)] {
            if is_damaged {
                assert!(disk.flip_bit("data/v/00/00/00", trailer + slot * 4096 + 70, 0));
            }
        }
        disk.process_crash();
        world.storage = Storage::open(disk.disk(), &params()).unwrap();
        let volume = first_volume(&world);
        for block in 0..8 {
            let read = world.storage.chunks.read(&volume, block, 1, false);
            // The newer table was the even one.
            let is_readable = !even || (block < 4 && !odd);
            assert_eq!(read.is_ok(), is_readable, "{even} {odd} {block}");
        }
        // What was never written is still known not to be; unless nothing is known.
        let read = world.storage.chunks.read(&volume, 9, 1, false);
        assert_eq!(read.is_ok(), !(even && odd));
        // The server goes on, and so does the damage over a checkpoint.
        apply_op(&mut world, write_op(VolumeId(1), 1, payload(3, 1))).unwrap();
        checkpoint(&mut world);
        disk.process_crash();
        world.storage = Storage::open(disk.disk(), &params()).unwrap();
        assert!(world.storage.chunks.read(&volume, 1, 1, false).is_ok());
        let read = world.storage.chunks.read(&volume, 5, 1, false);
        assert_eq!(read.is_ok(), !even, "{even} {odd}");
    }
}

#[test]
fn misdirected_write_is_noticed() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    apply_op(&mut world, create("v", 40)).unwrap();
    apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 8))).unwrap();
    disk.misdirect_write("data/v/", BLOCK_BYTES as i64);
    apply_op(&mut world, write_op(VolumeId(1), 2, payload(2, 1))).unwrap();
    let volume = first_volume(&world);
    for block in [2, 3] {
        let error = world
            .storage
            .chunks
            .read(&volume, block, 1, false)
            .unwrap_err();
        assert!(matches!(error, ReadError::BadBlock { .. }), "{error}");
    }
}

#[test]
fn full_disk_loses_nothing() {
    for seed in seeds(40) {
        let disk = SimDisk::new();
        let mut rng = Rng::new(seed);
        let mut world = World::new(disk.disk());
        apply_op(&mut world, create("v", 60)).unwrap();
        apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 10))).unwrap();
        let prev = world.last();
        let commands = [
            create("w", 10),
            write_op(VolumeId(1), rng.below(20), payload(2, 12)),
            write_op(VolumeId(1), 12 + rng.below(20), payload(3, 8)),
        ];
        let entry = Entry {
            id: EntryId {
                ballot: ballot(1),
                slot: prev.slot.next(),
            },
            prev: prev.ballot,
            commands: commands.map(Command::internal).into(),
        };
        world
            .storage
            .log
            .append(None, std::slice::from_ref(&entry), world.chosen)
            .unwrap();
        world.entries.push(entry.clone());
        world.chosen = entry.id.slot;
        let expected = world.model.apply(&entry);
        let volume = first_volume(&world);
        disk.set_capacity(disk.used_bytes() + rng.below(12) * BLOCK_BYTES as u64);
        let Storage { state, chunks, .. } = &mut world.storage;
        let mut result = apply_entry(state, chunks, &entry, None);
        while let Err(error) = result {
            let ApplyError::NoSpace(stalled) = error else {
                panic!("{error}");
            };
            // Reads go on, of what was there before or of what the entry has written.
            chunks.read(&volume, 0, 60, false).unwrap();
            if rng.chance(500) {
                chunks.begin_checkpoint().unwrap().flush().unwrap();
            }
            disk.set_capacity(disk.used_bytes() + (1 + rng.below(8)) * BLOCK_BYTES as u64);
            result = stalled
                .resume(state, chunks, None)
                .map(|(_, answers)| answers);
        }
        assert_eq!(result.unwrap(), expected);
        world.storage.applied = entry.id;
        assert!(world.check_all().is_ok());
        disk.set_capacity(u64::MAX);
        disk.power_cut(&mut rng);
        assert!(world.reopen(disk.disk()).is_ok());
    }
}

/// One block in each of 100 chunks, then all of them zeroed, then one block in each of 100 others. The first
/// 64 files are removed with the zeroing, which is too few for the others.
fn zeroed_and_written_elsewhere() -> impl Iterator<Item = Op> {
    let zero = Op::Zero {
        volume: VolumeId(1),
        first_block: 0,
        blocks: 1600,
        allocate: false,
    };
    let write = |chunk: u64| write_op(VolumeId(1), chunk * 16, payload(chunk + 1, 1));
    (0..100)
        .map(write)
        .chain([zero])
        .chain((100..200).map(write))
}

/// What was zeroed gives its space back before a server gives up at its start.
#[test]
fn a_start_on_a_full_disk_frees_what_was_zeroed() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    apply_op(&mut world, create("v", 3200)).unwrap();
    let mut ops = zeroed_and_written_elsewhere();
    for op in ops.by_ref().take(100) {
        apply_op(&mut world, op).unwrap();
    }
    checkpoint(&mut world);
    let last = append_only(&mut world, ops);
    drop(world);
    // Enough for a log segment.
    disk.set_capacity(disk.used_bytes() + SEGMENT_BYTES + 8 * BLOCK_BYTES as u64);
    let storage = Storage::open(disk.disk(), &params()).unwrap();
    assert!(storage.stalled.is_none(), "the disk has space enough");
    assert_eq!(storage.applied, last);
}

/// Appends entries that are chosen, and applies none.
fn append_only(world: &mut World, ops: impl Iterator<Item = Op>) -> EntryId {
    for op in ops {
        let entry = world.entry_of(op);
        let log = &mut world.storage.log;
        let before = Slot(entry.id.slot.0 - 1);
        log.append(None, std::slice::from_ref(&entry), before)
            .unwrap();
        world.entries.push(entry);
    }
    let last = world.last();
    world.storage.log.mark_idle(last.slot).unwrap();
    last
}

/// What was deleted gives back what a start needs; it does not wait until all of it is removed.
#[test]
fn a_start_on_a_full_disk_removes_as_much_as_it_needs() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    apply_op(&mut world, create("old", 16 * 1500)).unwrap();
    write_chunks(&mut world, 0..1500);
    let delete = Op::DeleteVolume {
        volume: VolumeId(1),
    };
    apply_op(&mut world, delete).unwrap();
    apply_op(&mut world, create("new", 16 * 100)).unwrap();
    checkpoint(&mut world);
    let write = |chunk: u64| write_op(VolumeId(2), chunk * 16, payload(chunk + 1, 1));
    let last = append_only(&mut world, (0..100).map(write));
    drop(world);
    disk.set_capacity(disk.used_bytes() + SEGMENT_BYTES + 8 * BLOCK_BYTES as u64);
    let storage = Storage::open(disk.disk(), &params()).unwrap();
    assert!(storage.stalled.is_none(), "there is enough to remove");
    assert_eq!(storage.applied, last);
    let files = disk.files();
    let left = files.iter().filter(|(path, _)| path.starts_with("trash/"));
    let left = left.count();
    assert!((1000..1500).contains(&left), "{left}");
}

/// The same while a server runs: it flushes its chunks without storing a record.
#[test]
fn a_full_server_frees_what_was_zeroed() {
    let disk = SimDisk::new();
    let chunks = ChunkStore::open(disk.disk(), ChunkParams::default(), &[]).unwrap();
    let chunks = Arc::new(chunks);
    let config = EngineConfig {
        replica: Config {
            id: ServerId(0),
            incarnation: Incarnation(0),
            members: Membership::new([ServerId(0)]),
            tuning: Tuning::default(),
            seed: 1,
        },
        checkpoint_bytes: u64::MAX,
        checkpoint_interval: Duration::from_secs(1000),
        checkpoint_chunks: usize::MAX,
        log_bytes_max: u64::MAX,
        apply_bytes: usize::MAX,
        reserve_bytes: 0,
        session_lease: Duration::from_secs(60),
    };
    let nothing = pss_core::paxos::Recovered::default();
    let mut now = Instant(1_000_000_000);
    let mut engine = Engine::new(config, nothing, State::default(), chunks, now);
    let mut flushed = 0;
    let mut perform = |engine: &mut Engine, now: Instant| {
        engine.finish_batch(now);
        loop {
            match engine.poll_action() {
                Some(Action::Persist { write, .. }) => engine.handle_persisted(now, write),
                Some(Action::Checkpoint(checkpoint)) => {
                    assert!(checkpoint.flush_only, "the state is between two entries");
                    checkpoint.chunks.flush().unwrap();
                    engine.handle_checkpoint_done(Slot(0));
                    flushed += 1;
                }
                Some(_) => {}
                None if engine.has_chosen() => engine.apply_chosen(now),
                None => return,
            }
        }
    };
    now += Duration::from_secs(1);
    engine.handle_timeout(now);
    perform(&mut engine, now);
    let ops = [create("v", 3200)].into_iter();
    for (at, op) in ops.chain(zeroed_and_written_elsewhere()).enumerate() {
        let proposed = engine.replica_mut().propose(vec![Command::internal(op)]);
        proposed.expect("it leads");
        perform(&mut engine, now);
        if at == 100 {
            disk.set_capacity(disk.used_bytes() + 8 * BLOCK_BYTES as u64);
        }
    }
    assert!(engine.is_stalled(), "the disk is full");
    for _ in 0..4 {
        now += Duration::from_secs(1);
        engine.handle_timeout(now);
        perform(&mut engine, now);
    }
    assert!(!engine.is_stalled());
    assert_eq!(engine.state().applied(), engine.replica().last().slot);
    assert_eq!(flushed, 1);
    assert_eq!(engine.trim_slot(), Slot(0), "nothing was stored");
}

#[test]
fn failed_sync_of_chunks_is_final() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    apply_op(&mut world, create("v", 60)).unwrap();
    apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 10))).unwrap();
    disk.fail_sync(0);
    let chunks = Arc::clone(&world.storage.chunks);
    let error = chunks.begin_checkpoint().unwrap().flush().unwrap_err();
    assert!(
        matches!(error, ChunkError::Io { action: "sync", .. }),
        "{error}"
    );
    let error = chunks.begin_checkpoint().unwrap().flush().unwrap_err();
    assert!(matches!(error, ChunkError::Poisoned { .. }), "{error}");
    let volume = first_volume(&world);
    let error = chunks.zero(&volume, 0, 1, false, Slot(9)).unwrap_err();
    assert!(matches!(error, ChunkError::Poisoned { .. }), "{error}");
    // Whoever meets it later still says what happened.
    assert!(error.to_string().contains("sync failed: "), "{error}");
    chunks.read(&volume, 0, 10, false).unwrap();
}

/// Writes one block in each of these chunks.
fn write_chunks(world: &mut World, chunks: Range<u64>) {
    for chunk in chunks {
        let write = write_op(VolumeId(1), chunk * 16, payload(chunk + 1, 1));
        apply_op(world, write).unwrap();
    }
}

/// The kernel could not write back what a file held that was closed since, and has let go of its inode: a
/// sync of the file as it is opened anew knows nothing of that.
#[test]
fn lost_write_of_a_closed_chunk_is_noticed() {
    let chunks = 2 * FILES_MAX as u64;
    for lost in 0..chunks {
        let disk = SimDisk::new();
        let mut world = World::new(disk.disk());
        apply_op(&mut world, create("v", 16 * chunks)).unwrap();
        write_chunks(&mut world, 0..chunks);
        let path = format!("data/v/00/00/{lost:02x}");
        assert_eq!(disk.fail_write_back(&path), 1);
        let store = &world.storage.chunks;
        let error = store.begin_checkpoint().unwrap().flush().unwrap_err();
        assert!(
            matches!(error, ChunkError::Io { action: "sync", .. }),
            "chunk {lost}: {error}"
        );
    }
}

/// The same if the file is closed when a checkpoint has already begun.
#[test]
fn lost_write_of_a_chunk_closed_within_a_checkpoint_is_noticed() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    let chunks = 3 * FILES_MAX as u64;
    apply_op(&mut world, create("v", 16 * chunks)).unwrap();
    write_chunks(&mut world, 0..1);
    let store = Arc::clone(&world.storage.chunks);
    let begun = store.begin_checkpoint().unwrap();
    write_chunks(&mut world, 1..chunks);
    assert_eq!(disk.fail_write_back("data/v/00/00/00"), 1);
    begun.flush().unwrap_err();
}

/// A checkpoint of little does not wait for all that the machine has to write, unless it must.
#[test]
fn few_chunks_are_synced_singly() {
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    let chunks = 2 * FILES_MAX as u64;
    apply_op(&mut world, create("v", 16 * chunks)).unwrap();
    let mut syncs_of_all = |chunks| {
        let before = disk.stats().syncs_of_all;
        write_chunks(&mut world, 0..chunks);
        checkpoint(&mut world);
        disk.stats().syncs_of_all - before
    };
    assert_eq!(syncs_of_all(1), 0);
    assert_eq!(syncs_of_all(chunks), 1);
    // What was closed then is forgotten.
    assert_eq!(syncs_of_all(1), 0);
    // To be closed when it is synced does no harm.
    let volume = first_volume(&world);
    for chunk in 0..chunks {
        let read = world.storage.chunks.read(&volume, chunk * 16, 1, false);
        read.unwrap();
    }
    let before = disk.stats().syncs_of_all;
    checkpoint(&mut world);
    assert_eq!(disk.stats().syncs_of_all, before);
}

#[test]
fn damaged_copies_of_the_identity() {
    use pss_core::storage::{PairError, StorageError};
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    world.storage.identity.set_promise(ballot(5)).unwrap();
    for copy in [0, 1] {
        // One copy is damaged: the promise stands, and the copy is healed.
        disk.process_crash();
        assert!(disk.flip_bit(&format!("identity.{copy}"), 40, 2));
        let storage = Storage::open(disk.disk(), &params()).unwrap();
        assert_eq!(storage.identity.facts().promised, ballot(5));
    }
    disk.process_crash();
    for copy in [0, 1] {
        assert!(disk.flip_bit(&format!("identity.{copy}"), 40, 2));
    }
    let error = Storage::open(disk.disk(), &params()).err().unwrap();
    let is_damaged = matches!(
        error,
        StorageError::Pair(PairError::Damaged { name: "identity" })
    );
    assert!(is_damaged, "{error}");
}

/// The power fails while a damaged copy is healed: the good one is not touched before that is done.
#[test]
fn healing_a_copy_of_the_checkpoint_can_be_stopped() {
    use pss_core::storage::CheckpointFile;
    let disk = SimDisk::new();
    let mut world = World::new(disk.disk());
    // Longer than a sector, so that it can be torn.
    for number in 0..40 {
        apply_op(&mut world, create(&format!("v{number}"), 10)).unwrap();
    }
    checkpoint(&mut world);
    for round in 0..100 {
        let mut rng = Rng::new(round);
        disk.process_crash();
        assert!(disk.flip_bit(&format!("checkpoint.{}", round % 2), 700, 2));
        disk.crash_at_op(disk.stats().mutating_ops + 1 + rng.below(8));
        drop(CheckpointFile::open(disk.disk()));
        disk.power_cut(&mut rng);
        let (_, record) = CheckpointFile::open(disk.disk()).unwrap();
        assert_eq!(record.applied, world.last());
        assert_eq!(record.state, world.model.state);
    }
}

#[test]
fn directories_of_others_are_refused() {
    use pss_core::storage::{PairError, StorageError};
    let disk = SimDisk::new();
    let error = Storage::open(disk.disk(), &params()).err().unwrap();
    assert!(
        matches!(error, StorageError::Pair(PairError::Missing { .. })),
        "{error}"
    );
    drop(World::new(disk.disk()));
    let mut other = params();
    other.server = ServerId(2);
    let error = Storage::open(disk.disk(), &other).err().unwrap();
    assert!(matches!(error, StorageError::OtherServer { .. }), "{error}");
    let mut other = params();
    other.log.cell = [1; 16];
    let error = Storage::open(disk.disk(), &other).err().unwrap();
    assert!(matches!(error, StorageError::OtherCell), "{error}");
    let facts = Storage::open(disk.disk(), &params())
        .unwrap()
        .identity
        .facts();
    let error = Identity::create(disk.disk(), facts, false).err().unwrap();
    assert!(matches!(error, StorageError::NotEmpty { .. }), "{error}");
}

/// A format that is stopped leaves a directory that does not open, or one that is as formatted.
#[test]
fn format_survives_a_stop_at_every_operation() {
    for stop in 1..60 {
        let disk = SimDisk::new();
        let mut rng = Rng::new(stop);
        let mut world = World::new(disk.disk());
        apply_op(&mut world, create("v", 60)).unwrap();
        apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 10))).unwrap();
        checkpoint(&mut world);
        disk.crash_at_op(disk.stats().mutating_ops + stop);
        let result = format(disk.disk());
        disk.power_cut(&mut rng);
        match Storage::open(disk.disk(), &params()) {
            Ok(storage) if storage.applied.slot > Slot(0) => {
                assert!(result.is_err());
                world.storage = storage;
                assert!(world.check_all().is_ok());
            }
            Ok(storage) => {
                assert_eq!(storage.state, State::default());
                assert_eq!(storage.recovered.evidence, None);
            }
            Err(_) => {
                assert!(result.is_err());
                format(disk.disk()).unwrap();
                Storage::open(disk.disk(), &params()).unwrap();
            }
        }
    }
}

/// A server that drops what it has to learn it anew, stopped anywhere: it has all of it and its old life, or none of it and
/// counts for nothing.
#[test]
fn discarding_survives_a_stop_at_every_operation() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..400 {
        let disk = SimDisk::new();
        let (mut rng, stop) = (Rng::new(seed), 1 + seed % 40);
        let mut world = World::new(disk.disk());
        apply_op(&mut world, create("v", 60)).unwrap();
        apply_op(&mut world, write_op(VolumeId(1), 0, payload(1, 10))).unwrap();
        checkpoint(&mut world);
        let mut identity = Identity::open(disk.disk()).unwrap();
        disk.crash_at_op(disk.stats().mutating_ops + stop);
        let promised = identity.discard(Incarnation(2), true).is_ok();
        // The second one is stopped as well, where the first has come so far.
        for _ in 0..2 {
            drop(Storage::open(disk.disk(), &params()));
            disk.power_cut(&mut rng);
            disk.crash_at_op(disk.stats().mutating_ops + 1 + rng.below(30));
        }
        disk.power_cut(&mut rng);
        let storage = Storage::open(disk.disk(), &params()).unwrap();
        let facts = storage.identity.facts();
        assert!(!facts.discards);
        if facts.incarnation == Incarnation(1) {
            assert!(!promised && !facts.rejoining);
            old += 1;
            world.storage = storage;
            assert!(world.check_all().is_ok());
            continue;
        }
        new += 1;
        assert!(facts.rejoining && facts.incarnation == Incarnation(2));
        assert_eq!(storage.state, State::default());
        assert_eq!(storage.log.last(), EntryId::default());
        assert_eq!(storage.installing, None);
        assert_eq!(storage.recovered.evidence, None);
        let left = disk.disk().read_dir("data/v").unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
    }
    assert!(old > 4 && new > 200, "{old} old, {new} new");
}
