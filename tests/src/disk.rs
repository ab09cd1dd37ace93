//! A simulated disk: in memory, deterministic, and able to fail in the ways that disks fail.
//!
//! What it models:
//!
//! * Writes are in the page cache until the file is synced; on a power cut each 512-byte sector that
//!   was not synced is as it was at the last sync, or as it was written, in any mixture.
//! * Names are durable when their directory is synced; on a power cut any subset of the other changes
//!   of names survives that could survive (a change that builds on another only with that one).
//! * Writes through `OpenMode::DirectSync` are durable when they return. One that a power cut hits is
//!   torn like any other.
//! * Writing back that fails: the page is then clean, and never was written. Who has the file open is told
//!   by its next sync, and so is the next sync of everything; a file that is opened later knows nothing.
//! * Syncs and writes that fail, a full disk, flipped bits, writes that are lost or go to the wrong place.
//!
//! It has no clock and no threads, and every random choice comes from a [`Rng`] that the caller seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pss_core::disk::{DirEntry, Disk, DiskFile, OpenMode};

pub use crate::rng::Rng;

const PAGE: usize = 4096;
const SECTOR: usize = 512;

/// Counts of what was done to a disk.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DiskStats {
    /// Everything that changes the disk, syncs included: what [`SimDisk::crash_at_op`] counts.
    pub mutating_ops: u64,
    /// Syncs of files, directories and everything, and direct writes.
    pub syncs: u64,
    /// Syncs of everything.
    pub syncs_of_all: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Pages that were not written, or elsewhere.
    pub strayed: u64,
}

/// What a power cut leaves of things that were not synced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Survival {
    /// Nothing.
    Nothing,
    /// Everything.
    Everything,
    /// Whatever chance gives.
    Chance,
}

/// Says of a file and an offset whether what is written there may be lost.
pub type MayStray = Box<dyn Fn(&str, u64) -> bool + Send>;

/// How pages of writes are lost or misdirected; see [`SimDisk::set_unreliable`].
pub struct Unreliable {
    /// Chance of either, for each write.
    pub per_mille: u64,
    /// Where from that follows.
    pub rng: Rng,
    /// Whether the page at this offset of a file may be lost or overwritten.
    pub may: MayStray,
    /// Pages from here on are never hit.
    pub end_bytes: u64,
}

impl Unreliable {
    /// What happens to a write: which of its pages, and where it goes instead (`None`: nowhere).
    fn strike(&mut self, path: &str, offset: u64, bytes: u64) -> Option<(usize, Option<usize>)> {
        let is_whole = offset.is_multiple_of(PAGE as u64) && bytes.is_multiple_of(PAGE as u64);
        if !is_whole || bytes == 0 || offset + bytes > self.end_bytes {
            return None;
        }
        if !self.rng.chance(self.per_mille) {
            return None;
        }
        let at = offset + self.rng.below(bytes / PAGE as u64) * PAGE as u64;
        let elsewhere = self.rng.below(self.end_bytes / PAGE as u64) * PAGE as u64;
        let is_lost = self.rng.chance(500) || elsewhere == at;
        let may = (self.may)(path, at) && (is_lost || (self.may)(path, elsewhere));
        let page = |at: u64| (at / PAGE as u64) as usize;
        may.then(|| (page(at), (!is_lost).then(|| page(elsewhere))))
    }
}

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    inner: Arc<Mutex<Inner>>,
}

type Page = Arc<[u8; PAGE]>;

/// One page of a file: what is read, and what is durable.
#[derive(Clone, Default)]
struct Slot {
    /// `None`: a hole.
    current: Option<Page>,
    durable: Option<Page>,
}

#[derive(Default)]
struct Inode {
    pages: Vec<Slot>,
    /// Pages that differ from what is durable, or may.
    dirty: BTreeSet<usize>,
    /// Pages that could not be written back: they pass for clean until they are written again.
    lost: BTreeSet<usize>,
    /// How often pages could not be written back.
    failures: u64,
    length: u64,
    durable_length: u64,
}

impl Inode {
    /// What of it is durable.
    fn backup(&self) -> Inode {
        let page = |slot: &Slot| Slot {
            current: slot.durable.clone(),
            durable: slot.durable.clone(),
        };
        Inode {
            pages: self.pages.iter().map(page).collect(),
            length: self.durable_length,
            durable_length: self.durable_length,
            ..Inode::default()
        }
    }
}

type InodeRef = Arc<Mutex<Inode>>;

#[derive(Clone)]
enum Node {
    Directory,
    File(InodeRef),
}

/// A change of names.
#[derive(Clone)]
enum NameOp {
    Create(String, Node),
    Remove(String),
    Rename(String, String),
}

impl NameOp {
    fn paths(&self) -> Vec<&str> {
        match self {
            NameOp::Create(path, _) | NameOp::Remove(path) => vec![path],
            NameOp::Rename(from, to) => vec![from, to],
        }
    }

    /// Whether it changes names in the directory.
    fn touches(&self, directory: &str) -> bool {
        self.paths().iter().any(|path| parent(path) == directory)
    }

    /// Whether this one cannot survive without the other, which came before.
    fn needs(&self, earlier: &NameOp) -> bool {
        let overlap = |a: &str, b: &str| is_below(a, b) || is_below(b, a);
        let paths = self.paths();
        paths
            .iter()
            .any(|path| earlier.paths().iter().any(|other| overlap(path, other)))
    }

    fn apply(&self, names: &mut BTreeMap<String, Node>) {
        match self {
            NameOp::Create(path, node) => {
                names.insert(path.clone(), node.clone());
            }
            NameOp::Remove(path) => {
                for path in tree(names, path) {
                    names.remove(&path);
                }
            }
            NameOp::Rename(from, to) => {
                let moved = tree(names, from);
                if !moved.is_empty() {
                    for path in tree(names, to) {
                        names.remove(&path);
                    }
                }
                for path in moved {
                    let node = names.remove(&path).expect("it was just listed");
                    names.insert(format!("{to}{}", &path[from.len()..]), node);
                }
            }
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Whether `path` is `top` or below it.
fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A path and everything below it.
fn tree(names: &BTreeMap<String, Node>, top: &str) -> Vec<String> {
    names
        .range(top.to_owned()..)
        .map(|(path, _)| path)
        .take_while(|path| path.starts_with(top))
        .filter(|path| is_below(path, top))
        .cloned()
        .collect()
}

struct Inner {
    names: BTreeMap<String, Node>,
    durable_names: BTreeMap<String, Node>,
    /// Not durable yet, in order.
    name_ops: Vec<NameOp>,
    /// Files with changes that are not durable.
    dirty_files: Vec<InodeRef>,
    /// Files with pages that could not be written back.
    lost_files: Vec<InodeRef>,
    /// Of those failures, what no sync of everything has told yet.
    untold_failures: bool,
    /// Raised by a power cut: files opened before are gone.
    life: u64,
    frozen: bool,
    crash_at: Option<u64>,
    fail_syncs: Vec<u64>,
    fail_writes: Vec<u64>,
    syncs_seen: u64,
    writes_seen: u64,
    misdirect: Option<(String, i64)>,
    unreliable: Option<Unreliable>,
    would_block_per_mille: u64,
    would_block: Rng,
    capacity_pages: u64,
    /// Files below this get so many more pages.
    full: Option<(String, u64)>,
    used_pages: u64,
    zero: Page,
    stats: DiskStats,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn frozen() -> io::Error {
    io::Error::other("the simulated disk has lost power")
}

impl Default for SimDisk {
    fn default() -> SimDisk {
        SimDisk::new()
    }
}

impl SimDisk {
    /// An empty disk of unlimited size.
    pub fn new() -> SimDisk {
        let inner = Inner {
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_ops: Vec::new(),
            dirty_files: Vec::new(),
            lost_files: Vec::new(),
            untold_failures: false,
            life: 0,
            frozen: false,
            crash_at: None,
            fail_syncs: Vec::new(),
            fail_writes: Vec::new(),
            syncs_seen: 0,
            writes_seen: 0,
            misdirect: None,
            unreliable: None,
            would_block_per_mille: 0,
            would_block: Rng::new(0),
            capacity_pages: u64::MAX,
            full: None,
            used_pages: 0,
            zero: Arc::new([0; PAGE]),
            stats: DiskStats::default(),
        };
        SimDisk {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// As the trait object that the product takes.
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    /// What was done so far.
    pub fn stats(&self) -> DiskStats {
        lock(&self.inner).stats
    }

    /// The mutating operation with this number (counted from 1 since the disk was made, see
    /// [`DiskStats::mutating_ops`]) fails: a write is then torn by the power cut, nothing of a sync is
    /// certain. Everything fails from then on, until [`SimDisk::power_cut`].
    pub fn crash_at_op(&self, number: u64) {
        lock(&self.inner).crash_at = Some(number);
    }

    /// Stops everything now, as if [`SimDisk::crash_at_op`] had struck.
    pub fn freeze(&self) {
        lock(&self.inner).frozen = true;
    }

    /// Whether it waits for [`SimDisk::power_cut`].
    pub fn is_frozen(&self) -> bool {
        lock(&self.inner).frozen
    }

    /// The power fails and comes back. Files that were open give errors.
    pub fn power_cut(&self, rng: &mut Rng) {
        let survival = match rng.below(6) {
            0 => Survival::Nothing,
            1 => Survival::Everything,
            _ => Survival::Chance,
        };
        self.power_cut_with(rng, survival);
    }

    /// Like [`SimDisk::power_cut`], with a say in what survives.
    pub fn power_cut_with(&self, rng: &mut Rng, survival: Survival) {
        let mut inner = lock(&self.inner);
        inner.life += 1;
        inner.frozen = false;
        inner.crash_at = None;
        inner.fail_syncs.clear();
        inner.fail_writes.clear();
        inner.misdirect = None;
        for file in std::mem::take(&mut inner.dirty_files) {
            lock(&file).power_cut(rng, survival);
        }
        for file in std::mem::take(&mut inner.lost_files) {
            lock(&file).lose();
        }
        inner.untold_failures = false;
        let ops = std::mem::take(&mut inner.name_ops);
        // How many are lost differs from time to time, as what the disk was doing does.
        let keep_per_mille = *rng.pick(&[100, 500, 900, 1000]);
        let mut lost: Vec<&NameOp> = Vec::new();
        for op in &ops {
            let survives = match survival {
                Survival::Nothing => false,
                Survival::Everything => true,
                Survival::Chance => {
                    rng.chance(keep_per_mille) && !lost.iter().any(|earlier| op.needs(earlier))
                }
            };
            if survives {
                op.apply(&mut inner.durable_names);
            } else {
                lost.push(op);
            }
        }
        inner.names = inner.durable_names.clone();
        inner.count_pages();
    }

    /// A copy of what is durable, as a backup of a stopped server's disk holds it.
    pub fn backup(&self) -> SimDisk {
        let copy = SimDisk::new();
        let inner = lock(&self.inner);
        let mut target = lock(&copy.inner);
        for (path, node) in &inner.durable_names {
            let node = match node {
                Node::Directory => Node::Directory,
                Node::File(file) => Node::File(Arc::new(Mutex::new(lock(file).backup()))),
            };
            target.names.insert(path.clone(), node);
        }
        target.durable_names = target.names.clone();
        target.count_pages();
        drop(target);
        copy
    }

    /// The process dies, the machine does not: nothing is lost, but open files give errors.
    pub fn process_crash(&self) {
        let mut inner = lock(&self.inner);
        inner.life += 1;
        inner.frozen = false;
        inner.crash_at = None;
    }

    /// The sync after the next `after` ones fails. (Direct writes are not counted.)
    pub fn fail_sync(&self, after: u64) {
        let mut inner = lock(&self.inner);
        let number = inner.syncs_seen + after + 1;
        inner.fail_syncs.push(number);
    }

    /// The write after the next `after` ones fails, having written any part.
    pub fn fail_write(&self, after: u64) {
        let mut inner = lock(&self.inner);
        let number = inner.writes_seen + after + 1;
        inner.fail_writes.push(number);
    }

    /// What is dirty in files whose path starts with `prefix` cannot be written back. Says in how many files.
    pub fn fail_write_back(&self, prefix: &str) -> usize {
        let mut inner = lock(&self.inner);
        let names = inner.names.iter();
        let below: Vec<InodeRef> = names
            .filter(|(path, _)| path.starts_with(prefix))
            .filter_map(|(_, node)| match node {
                Node::File(file) if !lock(file).dirty.is_empty() => Some(Arc::clone(file)),
                _ => None,
            })
            .collect();
        for file in &below {
            let mut inode = lock(file);
            let pages = std::mem::take(&mut inode.dirty);
            inode.lost.extend(pages);
            inode.failures += 1;
        }
        inner.untold_failures |= !below.is_empty();
        let count = below.len();
        inner.lost_files.extend(below);
        count
    }

    /// Reads that do not wait are told to wait in so many of 1000 cases.
    pub fn set_would_block(&self, per_mille: u64, seed: u64) {
        let mut inner = lock(&self.inner);
        inner.would_block_per_mille = per_mille;
        inner.would_block = Rng::new(seed);
    }

    /// Bytes that the files may take together.
    pub fn set_capacity(&self, bytes: u64) {
        lock(&self.inner).capacity_pages = bytes / PAGE as u64;
    }

    /// Files below `prefix`, except those with names that end in `.new`, get only `pages` more pages together, until this is called with `None`.
    pub fn set_full(&self, left: Option<(&str, u64)>) {
        lock(&self.inner).full = left.map(|(prefix, pages)| (prefix.to_owned(), pages));
    }

    /// Bytes that the files take.
    pub fn used_bytes(&self) -> u64 {
        lock(&self.inner).used_pages * PAGE as u64
    }

    /// All files, with their lengths.
    pub fn files(&self) -> Vec<(String, u64)> {
        let inner = lock(&self.inner);
        inner
            .names
            .iter()
            .filter_map(|(path, node)| match node {
                Node::File(file) => Some((path.clone(), lock(file).length)),
                Node::Directory => None,
            })
            .collect()
    }

    /// The contents of a file.
    pub fn contents(&self, path: &str) -> Option<Vec<u8>> {
        let file = lock(&self.inner).file(path)?;
        let file = lock(&file);
        let mut bytes = vec![0; file.length as usize];
        file.read(&mut bytes, 0);
        Some(bytes)
    }

    /// Flips a bit of a file, for good. Says whether there was such a byte.
    pub fn flip_bit(&self, path: &str, offset: u64, bit: u8) -> bool {
        let Some(file) = lock(&self.inner).file(path) else {
            return false;
        };
        let mut file = lock(&file);
        if offset >= file.length {
            return false;
        }
        file.flip(offset, bit);
        true
    }

    /// Flips a random bit of a random file whose path starts with `prefix`. Says where.
    pub fn flip_random_bit(&self, prefix: &str, rng: &mut Rng) -> Option<(String, u64)> {
        let files = self.files();
        let files: Vec<_> = files
            .iter()
            .filter(|(path, length)| path.starts_with(prefix) && *length > 0)
            .collect();
        if files.is_empty() {
            return None;
        }
        let (path, length) = rng.pick(&files);
        let offset = rng.below(*length);
        self.flip_bit(path, offset, rng.below(8) as u8);
        Some((path.clone(), offset))
    }

    /// From now on pages that are written to files get lost, or go to another place of the file.
    pub fn set_unreliable(&self, unreliable: Option<Unreliable>) {
        lock(&self.inner).unreliable = unreliable;
    }

    /// The next write to a file whose path starts with `prefix` goes so many bytes further on.
    pub fn misdirect_write(&self, prefix: &str, by_bytes: i64) {
        lock(&self.inner).misdirect = Some((prefix.to_owned(), by_bytes));
    }
}

impl Inner {
    /// Takes a page, if there is one left.
    fn take_page(&mut self, path: &str) -> io::Result<()> {
        let left = self.full.as_mut();
        let is_meant = |prefix: &str| path.starts_with(prefix) && !path.ends_with(".new");
        let left = left.filter(|(prefix, _)| is_meant(prefix));
        match left {
            Some((_, 0)) => return Err(io::ErrorKind::StorageFull.into()),
            Some((_, pages)) => *pages -= 1,
            None if self.used_pages >= self.capacity_pages => {
                return Err(io::ErrorKind::StorageFull.into());
            }
            None => {}
        }
        self.used_pages += 1;
        Ok(())
    }

    fn file(&self, path: &str) -> Option<InodeRef> {
        match self.names.get(path) {
            Some(Node::File(file)) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.frozen { Err(frozen()) } else { Ok(()) }
    }

    /// Counts a mutating operation. `Ok(true)`: this is the one that the power cut hits; it is to be
    /// carried out, and then to fail.
    fn begin(&mut self) -> io::Result<bool> {
        self.check()?;
        self.stats.mutating_ops += 1;
        if self
            .crash_at
            .is_some_and(|at| self.stats.mutating_ops >= at)
        {
            self.frozen = true;
        }
        Ok(self.frozen)
    }

    fn change_names(&mut self, op: NameOp) -> io::Result<()> {
        let hit = self.begin()?;
        op.apply(&mut self.names);
        self.name_ops.push(op);
        if hit { Err(frozen()) } else { Ok(()) }
    }

    /// Makes names durable: the chosen changes and those that they build on.
    fn settle_names(&mut self, is_chosen: impl Fn(&NameOp) -> bool) {
        let ops = std::mem::take(&mut self.name_ops);
        let mut chosen = vec![false; ops.len()];
        for (at, op) in ops.iter().enumerate().rev() {
            let is_needed = (at + 1..ops.len()).any(|later| chosen[later] && ops[later].needs(op));
            chosen[at] = is_needed || is_chosen(op);
        }
        for (op, chosen) in ops.into_iter().zip(chosen) {
            if chosen {
                op.apply(&mut self.durable_names);
            } else {
                self.name_ops.push(op);
            }
        }
    }

    fn sync_step(&mut self) -> io::Result<()> {
        let hit = self.begin()?;
        self.stats.syncs += 1;
        self.syncs_seen += 1;
        if hit {
            return Err(frozen());
        }
        if self.fail_syncs.contains(&self.syncs_seen) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn count_pages(&mut self) {
        let mut seen = BTreeSet::new();
        let mut pages = 0;
        for node in self.names.values() {
            if let Node::File(file) = node
                && seen.insert(Arc::as_ptr(file) as usize)
            {
                pages += lock(file).allocated();
            }
        }
        self.used_pages = pages;
    }

    fn mark_dirty(&mut self, file: &InodeRef) {
        if !self
            .dirty_files
            .iter()
            .any(|other| Arc::ptr_eq(other, file))
        {
            self.dirty_files.push(Arc::clone(file));
        }
    }
}

impl Inode {
    fn allocated(&self) -> u64 {
        self.pages
            .iter()
            .filter(|slot| slot.current.is_some())
            .count() as u64
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let length = self.length.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < length {
            let at = offset as usize + done;
            let within = at % PAGE;
            let bytes = (PAGE - within).min(length - done);
            let to = &mut buf[done..done + bytes];
            match self
                .pages
                .get(at / PAGE)
                .and_then(|slot| slot.current.as_ref())
            {
                Some(page) => to.copy_from_slice(&page[within..within + bytes]),
                None => to.fill(0),
            }
            done += bytes;
        }
        length
    }

    fn slot(&mut self, page: usize) -> &mut Slot {
        if self.pages.len() <= page {
            self.pages.resize(page + 1, Slot::default());
        }
        &mut self.pages[page]
    }

    /// Changes one page.
    fn set_page(&mut self, page: usize, content: Option<Page>) {
        self.slot(page).current = content;
        self.lost.remove(&page);
        self.dirty.insert(page);
    }

    /// Writes within one page.
    fn write_page(&mut self, at: usize, bytes: &[u8], zero: &Page) {
        let (page, within) = (at / PAGE, at % PAGE);
        let content = if bytes.len() == PAGE {
            match <&[u8; PAGE]>::try_from(bytes) {
                Ok(bytes) if **zero == *bytes => Arc::clone(zero),
                Ok(bytes) => Arc::new(*bytes),
                Err(_) => unreachable!("the length was just compared"),
            }
        } else {
            let mut content = self.pages[page]
                .current
                .as_deref()
                .copied()
                .unwrap_or([0; PAGE]);
            content[within..within + bytes.len()].copy_from_slice(bytes);
            Arc::new(content)
        };
        self.set_page(page, Some(content));
    }

    fn set_len(&mut self, bytes: u64) -> u64 {
        let before = self.allocated();
        self.length = bytes;
        let keep = (bytes as usize).div_ceil(PAGE);
        for page in keep..self.pages.len() {
            if self.pages[page].current.is_some() {
                self.set_page(page, None);
            }
        }
        let within = bytes as usize % PAGE;
        if within > 0
            && let Some(content) = self
                .pages
                .get(keep - 1)
                .and_then(|slot| slot.current.clone())
        {
            let mut content = *content;
            content[within..].fill(0);
            self.set_page(keep - 1, Some(Arc::new(content)));
        }
        before - self.allocated()
    }

    fn sync(&mut self) {
        for page in std::mem::take(&mut self.dirty) {
            let slot = &mut self.pages[page];
            slot.durable.clone_from(&slot.current);
        }
        self.durable_length = self.length;
    }

    fn sync_range(&mut self, offset: u64, bytes: u64) {
        let pages = offset as usize / PAGE..(offset + bytes).div_ceil(PAGE as u64) as usize;
        for page in pages {
            self.dirty.remove(&page);
            self.lost.remove(&page);
            let slot = &mut self.pages[page];
            slot.durable.clone_from(&slot.current);
        }
        self.durable_length = self.durable_length.max(offset + bytes);
    }

    fn power_cut(&mut self, rng: &mut Rng, survival: Survival) {
        let mode = rng.below(4);
        for page in std::mem::take(&mut self.dirty) {
            let slot = &mut self.pages[page];
            let content = match (survival, mode) {
                (Survival::Nothing, _) | (_, 0) if survival != Survival::Everything => {
                    slot.durable.clone()
                }
                (Survival::Everything, _) | (_, 1) => slot.current.clone(),
                (_, 2) if rng.chance(500) => slot.current.clone(),
                (_, 2) => slot.durable.clone(),
                _ => Some(tear(rng, slot)),
            };
            slot.current.clone_from(&content);
            slot.durable = content;
        }
        let keeps_length = match survival {
            Survival::Nothing => false,
            Survival::Everything => true,
            Survival::Chance => rng.chance(500),
        };
        let length = if keeps_length {
            self.length
        } else {
            self.durable_length
        };
        self.length = length;
        let keep = (length as usize).div_ceil(PAGE);
        self.pages.truncate(keep);
        self.durable_length = length;
    }

    /// What could not be written back is not there after a power cut.
    fn lose(&mut self) {
        for page in std::mem::take(&mut self.lost) {
            if let Some(slot) = self.pages.get_mut(page) {
                slot.current.clone_from(&slot.durable);
            }
        }
    }

    fn flip(&mut self, offset: u64, bit: u8) {
        let (page, within) = (offset as usize / PAGE, offset as usize % PAGE);
        let slot = self.slot(page);
        for content in [&mut slot.current, &mut slot.durable] {
            let mut bytes = content.as_deref().copied().unwrap_or([0; PAGE]);
            bytes[within] ^= 1 << (bit % 8);
            *content = Some(Arc::new(bytes));
        }
    }
}

/// Any mixture of the sectors of two pages.
fn tear(rng: &mut Rng, slot: &Slot) -> Page {
    let empty = [0; PAGE];
    let mut content = slot.durable.as_deref().copied().unwrap_or(empty);
    let current = slot.current.as_deref().unwrap_or(&empty);
    for start in (0..PAGE).step_by(SECTOR) {
        if rng.chance(500) {
            let sector = start..start + SECTOR;
            content[sector.clone()].copy_from_slice(&current[sector]);
        }
    }
    Arc::new(content)
}

impl Disk for SimDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        let file = match (inner.names.get(path), mode) {
            (Some(Node::File(file)), _) => Arc::clone(file),
            (Some(Node::Directory), _) => return Err(io::ErrorKind::IsADirectory.into()),
            (None, OpenMode::Create) => {
                let above = parent(path);
                if !above.is_empty() && !inner.names.contains_key(above) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let file = InodeRef::default();
                let node = Node::File(Arc::clone(&file));
                inner.change_names(NameOp::Create(path.to_owned(), node))?;
                file
            }
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        let failures_told = AtomicU64::new(lock(&file).failures);
        Ok(Arc::new(SimFile {
            disk: Arc::clone(&self.inner),
            life: inner.life,
            path: path.to_owned(),
            file,
            failures_told,
            direct: mode == OpenMode::DirectSync,
        }))
    }

    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let inner = lock(&self.inner);
        inner.check()?;
        let start = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        let entries = inner
            .names
            .range(start.clone()..)
            .take_while(|(found, _)| found.starts_with(&start))
            .filter(|(found, _)| parent(found) == path)
            .map(|(found, node)| DirEntry {
                name: found[start.len()..].to_owned(),
                is_dir: matches!(node, Node::Directory),
            });
        Ok(entries.collect())
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        let ends = path.match_indices('/').map(|(at, _)| at);
        for end in ends.chain([path.len()]) {
            let directory = &path[..end];
            match inner.names.get(directory) {
                Some(Node::Directory) => {}
                Some(Node::File(_)) => return Err(io::ErrorKind::AlreadyExists.into()),
                None => {
                    let op = NameOp::Create(directory.to_owned(), Node::Directory);
                    inner.change_names(op)?;
                }
            }
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        let above = parent(to);
        let is_possible =
            inner.names.contains_key(from) && (above.is_empty() || inner.names.contains_key(above));
        if !is_possible {
            return Err(io::ErrorKind::NotFound.into());
        }
        let result = inner.change_names(NameOp::Rename(from.to_owned(), to.to_owned()));
        inner.count_pages();
        result
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        let pages = match inner.file(path) {
            Some(file) => lock(&file).allocated(),
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        inner.used_pages = inner.used_pages.saturating_sub(pages);
        inner.change_names(NameOp::Remove(path.to_owned()))
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        if !matches!(inner.names.get(path), Some(Node::Directory)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // One name after the other, the deepest first, as it is done in truth.
        let mut paths = tree(&inner.names, path);
        paths.reverse();
        for path in paths {
            inner.change_names(NameOp::Remove(path))?;
        }
        inner.count_pages();
        Ok(())
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.check()?;
        if !path.is_empty() && !matches!(inner.names.get(path), Some(Node::Directory)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        inner.sync_step()?;
        inner.settle_names(|op| op.touches(path));
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.sync_step()?;
        inner.settle_names(|_| true);
        for file in std::mem::take(&mut inner.dirty_files) {
            lock(&file).sync();
        }
        inner.stats.syncs_of_all += 1;
        match std::mem::take(&mut inner.untold_failures) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        let inner = lock(&self.inner);
        inner.check()?;
        let total = inner.capacity_pages.min(1 << 40);
        let free = total.saturating_sub(inner.used_pages);
        Ok((free * PAGE as u64, total * PAGE as u64))
    }
}

struct SimFile {
    disk: Arc<Mutex<Inner>>,
    life: u64,
    path: String,
    file: InodeRef,
    /// Failures of writing back that were told here, or were over when the file was opened.
    failures_told: AtomicU64,
    direct: bool,
}

impl SimFile {
    fn inner(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = lock(&self.disk);
        inner.check()?;
        if inner.life != self.life {
            return Err(io::Error::other("the file was opened before a power cut"));
        }
        Ok(inner)
    }

    /// Direct IO must be aligned, or it fails on real disks.
    fn check_aligned(&self, pointer: *const u8, bytes: usize, offset: u64) {
        let is_aligned = |value: usize| value.is_multiple_of(PAGE);
        assert!(
            !self.direct
                || (is_aligned(pointer as usize)
                    && is_aligned(bytes)
                    && is_aligned(offset as usize)),
            "{}: direct IO of {bytes} bytes at {offset} is not aligned",
            self.path
        );
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Inner, &mut Inode) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut inner = self.inner()?;
        let hit = inner.begin()?;
        inner.mark_dirty(&self.file);
        let mut file = lock(&self.file);
        let result = change(&mut inner, &mut file);
        if hit { Err(frozen()) } else { result }
    }

    fn fill(&self, offset: u64, bytes: u64, allocate: bool) -> io::Result<()> {
        self.change(|inner, file| {
            if allocate {
                let length = file.length.max(offset + bytes);
                file.length = length;
            }
            let (zero, end) = (Arc::clone(&inner.zero), (offset + bytes).min(file.length));
            let mut at = offset;
            while at < end {
                let part = (PAGE as u64 - at % PAGE as u64).min(end - at);
                let page = (at / PAGE as u64) as usize;
                let is_hole = file.slot(page).current.is_none();
                if allocate && is_hole {
                    inner.take_page(&self.path)?;
                }
                if part == PAGE as u64 && !allocate {
                    if !is_hole {
                        file.set_page(page, None);
                        inner.used_pages -= 1;
                    }
                } else if allocate || !is_hole {
                    file.write_page(at as usize, &zero[..part as usize], &zero);
                }
                at += part;
            }
            Ok(())
        })
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.check_aligned(buf.as_ptr(), buf.len(), offset);
        let mut inner = self.inner()?;
        let count = lock(&self.file).read(buf, offset);
        inner.stats.reads += 1;
        inner.stats.bytes_read += count as u64;
        Ok(count)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut inner = self.inner()?;
        let per_mille = inner.would_block_per_mille;
        if per_mille > 0 && inner.would_block.chance(per_mille) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        drop(inner);
        self.read_at(buf, offset)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        for part in parts {
            self.check_aligned(part.as_ptr(), part.len(), offset);
        }
        let mut inner = self.inner()?;
        let hit = inner.begin()?;
        inner.writes_seen += 1;
        let fails = inner.fail_writes.contains(&inner.writes_seen);
        let mut offset = offset;
        if let Some((prefix, by)) = &inner.misdirect
            && self.path.starts_with(prefix.as_str())
        {
            offset = offset.saturating_add_signed(*by);
            inner.misdirect = None;
        }
        let zero = Arc::clone(&inner.zero);
        let start = offset;
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        let strike = inner.unreliable.as_mut();
        let strike = strike.and_then(|it| it.strike(&self.path, offset, bytes));
        inner.stats.strayed += u64::from(strike.is_some());
        let mut file = lock(&self.file);
        let mut result = Ok(());
        'parts: for part in parts {
            let mut rest = &part[..];
            while !rest.is_empty() {
                let bytes = (PAGE - offset as usize % PAGE).min(rest.len());
                let (now, behind) = rest.split_at(bytes);
                let mut page = offset as usize / PAGE;
                match strike {
                    Some((hit, None)) if hit == page => {
                        offset += bytes as u64;
                        rest = behind;
                        continue;
                    }
                    Some((hit, Some(elsewhere))) if hit == page => page = elsewhere,
                    _ => {}
                }
                if file.slot(page).current.is_none()
                    && let Err(error) = inner.take_page(&self.path)
                {
                    result = Err(error);
                    break 'parts;
                }
                file.write_page(page * PAGE + offset as usize % PAGE, now, &zero);
                offset += bytes as u64;
                rest = behind;
            }
        }
        file.length = file.length.max(offset);
        inner.stats.bytes_written += offset - start;
        if fails {
            result = Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if self.direct && !hit && result.is_ok() {
            inner.stats.syncs += 1;
            file.sync_range(start, offset - start);
        } else {
            drop(file);
            inner.mark_dirty(&self.file);
        }
        if hit { Err(frozen()) } else { result }
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.inner()?;
        inner.sync_step()?;
        let mut file = lock(&self.file);
        file.sync();
        let failures = file.failures;
        drop(file);
        inner
            .dirty_files
            .retain(|file| !Arc::ptr_eq(file, &self.file));
        match self.failures_told.swap(failures, Ordering::Relaxed) < failures {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }

    fn len(&self) -> io::Result<u64> {
        let _inner = self.inner()?;
        Ok(lock(&self.file).length)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change(|inner, file| {
            inner.used_pages -= file.set_len(bytes);
            Ok(())
        })
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.fill(offset, bytes, false)
    }

    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.fill(offset, bytes, true)
    }
}
