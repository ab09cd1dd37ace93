//! A disk that can be made slow while the server runs, for tests and measurements of slow disks.
//!
//! [`VARIABLE`] names a file. What it holds is read before each sync: a number of milliseconds that each takes longer, or
//! `hang`: it does not end before something else is written there. Without the file, or if it is empty, nothing is added. Syncs
//! are durable writes of the log, of the identity and of checkpoints, and syncs of files, directories and everything.
//! It never makes a sync less: what the server promises holds.

use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pss_core::disk::{DirEntry, Disk, DiskFile, OpenMode};

/// Names the file.
pub(crate) const VARIABLE: &str = "PSS_TEST_SYNC_DELAY";
/// How often a sync that hangs looks whether it still does.
const LOOK: Duration = Duration::from_millis(20);
const DELAY_MAX: Duration = Duration::from_secs(60);

/// The disk as it is, or slow if the environment asks for that.
pub(crate) fn disk(disk: Arc<dyn Disk>) -> Arc<dyn Disk> {
    match std::env::var_os(VARIABLE) {
        None => disk,
        Some(file) => {
            let switch = Arc::new(Switch { file: file.into() });
            tracing::warn!(
                "{VARIABLE} is set: every sync takes as much longer as {} says; that is for tests",
                switch.file.display()
            );
            Arc::new(SlowDisk { disk, switch })
        }
    }
}

struct Switch {
    file: PathBuf,
}

enum Delay {
    For(Duration),
    Hang,
}

impl Switch {
    fn delay(&self) -> Delay {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        match text.trim() {
            "hang" => Delay::Hang,
            text => {
                let ms = Duration::from_millis(text.parse().unwrap_or(0));
                Delay::For(ms.min(DELAY_MAX))
            }
        }
    }

    fn wait(&self) {
        loop {
            match self.delay() {
                Delay::For(Duration::ZERO) => return,
                Delay::For(time) => return std::thread::sleep(time),
                Delay::Hang => std::thread::sleep(LOOK),
            }
        }
    }
}

struct SlowDisk {
    disk: Arc<dyn Disk>,
    switch: Arc<Switch>,
}

impl Disk for SlowDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(SlowFile {
            file: self.disk.open(path, mode)?,
            syncs_writes: matches!(mode, OpenMode::DirectSync),
            switch: Arc::clone(&self.switch),
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
        self.disk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.switch.wait();
        self.disk.sync_dir(path)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.switch.wait();
        self.disk.sync_all()
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        self.disk.space()
    }
}

struct SlowFile {
    file: Arc<dyn DiskFile>,
    syncs_writes: bool,
    switch: Arc<Switch>,
}

impl DiskFile for SlowFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at_nowait(buf, offset)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if self.syncs_writes {
            self.switch.wait();
        }
        self.file.write_at(parts, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.switch.wait();
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

#[cfg(test)]
mod tests {
    use pss_core::disk::files::FileDisk;

    use super::*;
    use std::time::Instant;

    #[test]
    fn a_sync_takes_as_long_as_the_file_says() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("delay");
        let root = directory.path().join("disk");
        std::fs::create_dir(&root).unwrap();
        let switch = Arc::new(Switch { file: file.clone() });
        let slow = SlowDisk {
            disk: Arc::new(FileDisk::open(&root).unwrap()),
            switch,
        };
        let written = slow.open("a", OpenMode::Create).unwrap();
        let took = || {
            let begun = Instant::now();
            written.write_at(&[IoSlice::new(b"x")], 0).unwrap();
            let write = begun.elapsed();
            written.sync().unwrap();
            (write, begun.elapsed() - write)
        };
        let half = Duration::from_millis(500);
        assert!(took().1 < half, "no file");
        std::fs::write(&file, "500\n").unwrap();
        let (write, sync) = took();
        assert!(write < half && sync >= half, "{write:?}, {sync:?}");
        std::fs::write(&file, "hang").unwrap();
        std::thread::scope(|scope| {
            let hanging = scope.spawn(|| took().1);
            std::thread::sleep(half);
            assert!(!hanging.is_finished());
            std::fs::write(&file, "").unwrap();
            assert!(hanging.join().unwrap() >= half);
        });
    }
}
