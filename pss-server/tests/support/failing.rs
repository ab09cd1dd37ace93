//! A disk that fails when it is told to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pss_core::disk::{DirEntry, Disk, DiskFile, OpenMode};

/// What fails from now on.
#[derive(Default)]
pub(crate) struct Failures {
    /// Writes of files that are durable when they return: the log.
    pub(crate) direct_writes: AtomicBool,
    /// Syncs of the others: chunks, identity.
    pub(crate) syncs: AtomicBool,
    /// To remove a file in the trash takes [`SLOW_REMOVAL`].
    pub(crate) slow_removals: AtomicBool,
    /// How many files were removed there.
    pub(crate) removed: AtomicU64,
}

/// What a full, fragmented disk may take.
const SLOW_REMOVAL: Duration = Duration::from_millis(100);

impl Failures {
    fn note_removal(&self, path: &str) {
        if !path.starts_with("trash/") {
            return;
        }
        if self.slow_removals.load(Ordering::Relaxed) {
            std::thread::sleep(SLOW_REMOVAL);
        }
        self.removed.fetch_add(1, Ordering::Relaxed);
    }
}

pub(crate) struct FailingDisk {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) failures: Arc<Failures>,
}

struct FailingFile {
    file: Arc<dyn DiskFile>,
    failures: Arc<Failures>,
    direct: bool,
}

fn broken(what: &AtomicBool) -> io::Result<()> {
    match what.load(Ordering::Relaxed) {
        true => Err(io::Error::from_raw_os_error(libc::EIO)),
        false => Ok(()),
    }
}

impl Disk for FailingDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(FailingFile {
            file: self.disk.open(path, mode)?,
            failures: Arc::clone(&self.failures),
            direct: mode == OpenMode::DirectSync,
        }))
    }

    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.disk.read_dir(path)
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        self.failures.note_removal(path);
        self.disk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        for entry in self.disk.read_dir(path)? {
            let path = format!("{path}/{}", entry.name);
            match entry.is_dir {
                true => self.remove_dir_all(&path)?,
                false => self.remove_file(&path)?,
            }
        }
        self.disk.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn sync_all(&self) -> io::Result<()> {
        broken(&self.failures.syncs)?;
        self.disk.sync_all()
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        self.disk.space()
    }
}

impl DiskFile for FailingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at_nowait(buf, offset)
    }

    fn write_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        if self.direct {
            broken(&self.failures.direct_writes)?;
        }
        self.file.write_at(parts, offset)
    }

    fn sync(&self) -> io::Result<()> {
        broken(&self.failures.syncs)?;
        self.file.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.punch_hole(offset, bytes)
    }

    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.zero_range(offset, bytes)
    }
}
