//! A simulated disk: keeps what a real one may keep, loses what it may lose, and repeats itself for the
//! same seed.
//!
//! On a power cut every page that was not synced is kept, lost, or torn by sectors of 512 bytes, each by
//! itself; so are names that were not made durable by `sync_dir`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pss_core::disk::{DirEntry, Disk, DiskFile, OpenMode};

use crate::rng::Rng;

const PAGE: usize = 4096;
const SECTOR: usize = 512;

type Page = Arc<[u8; PAGE]>;

#[derive(Clone, Default)]
struct FileData {
    pages: BTreeMap<u64, Page>,
    len: u64,
    /// What pages held when they were last synced; only for those changed since.
    synced: BTreeMap<u64, Option<Page>>,
    synced_len: u64,
}

impl FileData {
    fn change(&mut self, index: u64, page: Option<Page>) {
        let old = self.pages.get(&index).cloned();
        self.synced.entry(index).or_insert(old);
        match page {
            Some(page) => self.pages.insert(index, page),
            None => self.pages.remove(&index),
        };
    }

    fn sync(&mut self) {
        self.synced.clear();
        self.synced_len = self.len;
    }

    fn set_len(&mut self, bytes: u64) {
        let first = bytes.div_ceil(PAGE as u64);
        let beyond: Vec<u64> = self.pages.range(first..).map(|(index, _)| *index).collect();
        for index in beyond {
            self.change(index, None);
        }
        if !bytes.is_multiple_of(PAGE as u64)
            && let Some(page) = self.pages.get(&(bytes / PAGE as u64))
        {
            let mut page = **page;
            page[(bytes % PAGE as u64) as usize..].fill(0);
            self.change(bytes / PAGE as u64, Some(Arc::new(page)));
        }
        self.len = bytes;
    }

    fn write(&mut self, mut data: &[u8], mut offset: u64, zero: &Page) {
        self.len = self.len.max(offset + data.len() as u64);
        while !data.is_empty() {
            let index = offset / PAGE as u64;
            let start = (offset % PAGE as u64) as usize;
            let count = data.len().min(PAGE - start);
            let page = if data[..count].iter().all(|byte| *byte == 0) && count == PAGE {
                Arc::clone(zero)
            } else {
                let mut page = self.pages.get(&index).map_or([0; PAGE], |page| **page);
                page[start..start + count].copy_from_slice(&data[..count]);
                Arc::new(page)
            };
            self.change(index, Some(page));
            offset += count as u64;
            data = &data[count..];
        }
    }

    /// What is left after a power cut.
    fn cut(&mut self, rng: &mut Rng) {
        let lost_len = self.len != self.synced_len && rng.per_mille(500);
        for (index, old) in std::mem::take(&mut self.synced) {
            let new = self.pages.get(&index).cloned();
            let kept = match rng.below(3) {
                0 => new,
                1 => old,
                _ => torn(new.as_ref(), old.as_ref(), rng),
            };
            match kept {
                Some(page) => self.pages.insert(index, page),
                None => self.pages.remove(&index),
            };
        }
        if lost_len {
            let synced_len = self.synced_len;
            self.set_len(synced_len);
        }
        self.sync();
    }
}

fn torn(new: Option<&Page>, old: Option<&Page>, rng: &mut Rng) -> Option<Page> {
    let mut page = old.map_or([0; PAGE], |page| **page);
    let new = new.map_or([0; PAGE], |page| **page);
    for sector in 0..PAGE / SECTOR {
        if rng.per_mille(500) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            page[range.clone()].copy_from_slice(&new[range]);
        }
    }
    Some(Arc::new(page))
}

struct Inner {
    rng: Rng,
    zero: Page,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    directories: BTreeSet<String>,
    files: BTreeMap<u64, FileData>,
    next_file: u64,
    /// Mutating operations until the power fails; none: it does not.
    crash_in: Option<u64>,
    frozen: bool,
    fail_syncs: u32,
    operations: u64,
    syncs: u64,
    capacity: u64,
    would_block_per_mille: u64,
}

/// See the module's text.
pub struct SimDisk {
    inner: Arc<Mutex<Inner>>,
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> SimDisk {
        let inner = Inner {
            rng: Rng::new(seed),
            zero: Arc::new([0; PAGE]),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            directories: BTreeSet::new(),
            files: BTreeMap::new(),
            next_file: 1,
            crash_in: None,
            frozen: false,
            fail_syncs: 0,
            operations: 0,
            syncs: 0,
            capacity: 1 << 40,
            would_block_per_mille: 50,
        };
        SimDisk {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mutating operation after `after` more of them hits a power cut: it is done in part, and it and
    /// everything behind it fails until [`SimDisk::power_cut`].
    pub fn crash_at_op(&self, after: u64) {
        self.lock().crash_in = Some(after);
    }

    /// Whether such an operation was reached.
    pub fn has_crashed(&self) -> bool {
        self.lock().frozen
    }

    /// The power comes back: what was not durable is kept, lost or torn.
    pub fn power_cut(&self) {
        let inner = &mut *self.lock();
        inner.crash_in = None;
        inner.frozen = false;
        inner.fail_syncs = 0;
        for file in inner.files.values_mut() {
            file.cut(&mut inner.rng);
        }
        let paths: BTreeSet<String> = inner
            .names
            .keys()
            .chain(inner.durable_names.keys())
            .cloned()
            .collect();
        let mut names = BTreeMap::new();
        for path in paths {
            let (new, old) = (inner.names.get(&path), inner.durable_names.get(&path));
            let kept = if new == old || inner.rng.per_mille(500) {
                new
            } else {
                old
            };
            if let Some(file) = kept {
                names.insert(path, *file);
            }
        }
        inner.durable_names.clone_from(&names);
        inner.names = names;
    }

    /// The next sync, or write that is durable when it returns, fails.
    pub fn fail_next_sync(&self) {
        self.lock().fail_syncs = 1;
    }

    /// Flips one bit of a page of a file whose path starts so. Says whether there was one.
    pub fn rot(&self, prefix: &str) -> bool {
        let inner = &mut *self.lock();
        let ids: Vec<u64> = inner
            .names
            .iter()
            .filter(|(path, _)| path.starts_with(prefix))
            .map(|(_, id)| *id)
            .collect();
        let Some(id) = inner.rng.pick(&ids).copied() else {
            return false;
        };
        let Some(file) = inner.files.get_mut(&id) else {
            return false;
        };
        let written = file
            .pages
            .iter()
            .filter(|(_, page)| !Arc::ptr_eq(page, &inner.zero));
        let indexes: Vec<u64> = written.map(|(index, _)| *index).collect();
        let Some(index) = inner.rng.pick(&indexes).copied() else {
            return false;
        };
        let mut page = *file.pages[&index];
        page[inner.rng.below(PAGE as u64) as usize] ^= 1 << inner.rng.below(8);
        file.pages.insert(index, Arc::new(page));
        true
    }

    /// Mutating operations so far, and how many of them were syncs.
    pub fn operations(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.operations, inner.syncs)
    }

    /// Limits the space.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = bytes;
    }

    /// A copy of the whole disk as it is now, unsynced parts included.
    #[must_use]
    pub fn fork(&self, seed: u64) -> SimDisk {
        let inner = self.lock();
        let inner = Inner {
            rng: Rng::new(seed),
            zero: Arc::clone(&inner.zero),
            names: inner.names.clone(),
            durable_names: inner.durable_names.clone(),
            directories: inner.directories.clone(),
            files: inner.files.clone(),
            ..*inner
        };
        SimDisk {
            inner: Arc::new(Mutex::new(inner)),
        }
    }
}

fn power_failed() -> io::Error {
    io::Error::other("the power has failed (simulated)")
}

/// Whether the operation is to be done whole, or in part because the power fails in it.
#[derive(PartialEq)]
enum Go {
    Whole,
    Part,
}

impl Inner {
    fn begin(&mut self) -> io::Result<Go> {
        if self.frozen {
            return Err(power_failed());
        }
        self.operations += 1;
        match &mut self.crash_in {
            Some(0) => {
                self.frozen = true;
                Ok(Go::Part)
            }
            Some(left) => {
                *left -= 1;
                Ok(Go::Whole)
            }
            None => Ok(Go::Whole),
        }
    }

    fn used(&self) -> u64 {
        let zero = &self.zero;
        let used = |file: &FileData| {
            file.pages
                .values()
                .filter(|page| !Arc::ptr_eq(page, zero))
                .count() as u64
        };
        self.files.values().map(used).sum::<u64>() * PAGE as u64
    }

    fn syncs_fail(&mut self) -> io::Result<()> {
        self.syncs += 1;
        if self.fail_syncs > 0 {
            self.fail_syncs -= 1;
            return Err(io::Error::other("sync failed (simulated)"));
        }
        Ok(())
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Disk for SimDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let inner = &mut *self.lock();
        if inner.frozen {
            return Err(power_failed());
        }
        let id = match (inner.names.get(path), mode) {
            (Some(id), _) => *id,
            (None, OpenMode::Create) => {
                if inner.begin()? == Go::Part {
                    return Err(power_failed());
                }
                let id = inner.next_file;
                inner.next_file += 1;
                inner.names.insert(path.to_owned(), id);
                inner.files.insert(id, FileData::default());
                id
            }
            (None, _) => return Err(ErrorKind::NotFound.into()),
        };
        let direct = mode == OpenMode::DirectSync;
        Ok(Arc::new(SimFile {
            inner: Arc::clone(&self.inner),
            id,
            direct,
        }))
    }

    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let inner = self.lock();
        let mut found = BTreeSet::new();
        let inside = |it: &str| -> Option<String> {
            if path.is_empty() || path == "." {
                return Some(it.to_owned());
            }
            it.strip_prefix(path)?.strip_prefix('/').map(str::to_owned)
        };
        for rest in inner.names.keys().filter_map(|it| inside(it)) {
            match rest.split_once('/') {
                Some((name, _)) => found.insert(DirEntry {
                    name: name.to_owned(),
                    is_dir: true,
                }),
                None => found.insert(DirEntry {
                    name: rest,
                    is_dir: false,
                }),
            };
        }
        for rest in inner.directories.iter().filter_map(|it| inside(it)) {
            let name = rest.split('/').next().unwrap_or_default();
            if !name.is_empty() {
                found.insert(DirEntry {
                    name: name.to_owned(),
                    is_dir: true,
                });
            }
        }
        Ok(found.into_iter().collect())
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        let inner = &mut *self.lock();
        let mut all = path;
        loop {
            // Directories come back as soon as something in them does; empty ones matter to nobody.
            if !inner.directories.insert(all.to_owned()) {
                return Ok(());
            }
            match all.rsplit_once('/') {
                Some((parent, _)) => all = parent,
                None => return Ok(()),
            }
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part && inner.rng.per_mille(500) {
            return Err(power_failed());
        }
        if let Some(id) = inner.names.remove(from) {
            inner.names.insert(to.to_owned(), id);
        } else {
            let prefix = format!("{from}/");
            let inside: Vec<String> = inner
                .names
                .keys()
                .filter(|it| it.starts_with(&prefix))
                .cloned()
                .collect();
            if inside.is_empty() && !inner.directories.contains(from) {
                return Err(ErrorKind::NotFound.into());
            }
            for path in inside {
                if let Some(id) = inner.names.remove(&path) {
                    inner
                        .names
                        .insert(format!("{to}/{}", &path[prefix.len()..]), id);
                }
            }
            let moved: Vec<String> = inner
                .directories
                .iter()
                .filter(|it| *it == from || it.starts_with(&prefix))
                .cloned()
                .collect();
            for path in moved {
                inner.directories.remove(&path);
                inner
                    .directories
                    .insert(format!("{to}{}", &path[from.len()..]));
            }
        }
        if inner.frozen {
            Err(power_failed())
        } else {
            Ok(())
        }
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        inner
            .names
            .remove(path)
            .map(|_| ())
            .ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        let prefix = format!("{path}/");
        inner.names.retain(|it, _| !it.starts_with(&prefix));
        inner
            .directories
            .retain(|it| it != path && !it.starts_with(&prefix));
        Ok(())
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        inner.syncs_fail()?;
        let here = |it: &String| parent(it) == path || (path == "." && parent(it).is_empty());
        // A renamed directory takes what is below it along.
        let below = format!("{path}/");
        inner.durable_names.retain(|it, id| {
            let moved = it.starts_with(&below) && inner.names.get(it) != Some(id);
            !(here(it) || moved)
        });
        let now: Vec<(String, u64)> = inner
            .names
            .iter()
            .filter(|(it, _)| here(it))
            .map(|(it, id)| (it.clone(), *id))
            .collect();
        inner.durable_names.extend(now);
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        inner.syncs_fail()?;
        for file in inner.files.values_mut() {
            file.sync();
        }
        inner.durable_names.clone_from(&inner.names);
        Ok(())
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        let inner = self.lock();
        let used = if inner.capacity == 1 << 40 {
            0
        } else {
            inner.used()
        };
        Ok((inner.capacity.saturating_sub(used), inner.capacity))
    }
}

struct SimFile {
    inner: Arc<Mutex<Inner>>,
    id: u64,
    direct: bool,
}

impl SimFile {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let inner = self.lock();
        let file = inner.files.get(&self.id).ok_or(ErrorKind::NotFound)?;
        let count = (file.len.saturating_sub(offset)).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let start = (at % PAGE as u64) as usize;
            let part = (PAGE - start).min(count - done);
            match file.pages.get(&(at / PAGE as u64)) {
                Some(page) => {
                    buf[done..done + part].copy_from_slice(&page[start..start + part]);
                }
                None => buf[done..done + part].fill(0),
            }
            done += part;
        }
        Ok(count)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        {
            let inner = &mut *self.lock();
            let chance = inner.would_block_per_mille;
            if inner.rng.per_mille(chance) {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        self.read_at(buf, offset)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        let go = inner.begin()?;
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        if inner.capacity < 1 << 40 && inner.used() + bytes > inner.capacity {
            return Err(ErrorKind::StorageFull.into());
        }
        let zero = Arc::clone(&inner.zero);
        let file = inner.files.get_mut(&self.id).ok_or(ErrorKind::NotFound)?;
        let mut at = offset;
        for part in parts {
            file.write(part, at, &zero);
            at += part.len() as u64;
        }
        if go == Go::Part {
            // Stays unsynced: the power cut decides what is left of it.
            return Err(power_failed());
        }
        if self.direct {
            inner.syncs_fail()?;
            if let Some(file) = inner.files.get_mut(&self.id) {
                for page in offset / PAGE as u64..(offset + bytes).div_ceil(PAGE as u64) {
                    file.synced.remove(&page);
                }
                file.synced_len = file.synced_len.max((offset + bytes).min(file.len));
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        inner.syncs_fail()?;
        if let Some(file) = inner.files.get_mut(&self.id) {
            file.sync();
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().files.get(&self.id).map_or(0, |file| file.len))
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        if let Some(file) = inner.files.get_mut(&self.id) {
            file.set_len(bytes);
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        if let Some(file) = inner.files.get_mut(&self.id) {
            for page in offset.div_ceil(PAGE as u64)..(offset + bytes) / PAGE as u64 {
                file.change(page, None);
            }
        }
        Ok(())
    }

    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        if inner.begin()? == Go::Part {
            return Err(power_failed());
        }
        let zero = Arc::clone(&inner.zero);
        if let Some(file) = inner.files.get_mut(&self.id) {
            file.len = file.len.max(offset + bytes);
            for page in offset.div_ceil(PAGE as u64)..(offset + bytes) / PAGE as u64 {
                file.change(page, Some(Arc::clone(&zero)));
            }
        }
        Ok(())
    }
}
