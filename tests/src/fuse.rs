//! The namespace of a cell, mounted by `pss-fuse` in a process of its own.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::processes::{Cell, PATIENCE, Process, wait_until};

/// A mount; its process is killed when this is dropped, and what watches over it takes the mount away.
pub struct Mount {
    /// Where.
    pub directory: PathBuf,
    /// Its process.
    pub process: Process,
}

impl Mount {
    /// Mounts on a new directory of that name in the cell's.
    ///
    /// # Panics
    /// If it is not mounted in time.
    pub fn start(cell: &Cell, name: &str, flags: &str) -> Mount {
        let directory = cell.bench.path(name);
        fs::create_dir_all(&directory).expect("the test directory can be used");
        Mount::start_on(cell, directory, flags)
    }

    /// Mounts on a directory.
    ///
    /// # Panics
    /// If it is not mounted in time, or the machine has no FUSE.
    pub fn start_on(cell: &Cell, directory: PathBuf, flags: &str) -> Mount {
        assert!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: load the kernel module with 'modprobe fuse'"
        );
        let mut command = cell.bench.command("pss-fuse");
        command.args(["mount", "--foreground"]).arg(&directory);
        command.args(flags.split_whitespace());
        // Of its own, so that what an earlier one has said is not taken for its words.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let output = cell.bench.path(&format!("pss-fuse{count}.log"));
        let mut process = Process::start("pss-fuse", &mut command, output);
        wait_until("it is mounted", PATIENCE, || {
            assert!(process.runs(), "{}", process.text());
            is_mounted(&directory) && process.text().contains("mounted on")
        });
        Mount { directory, process }
    }

    /// A path in it, such as `vol001/00/00/01`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// SIGTERM; waits for the end.
    ///
    /// # Panics
    /// If it does not end, ends badly, or leaves the mount behind.
    pub fn stop(mut self) {
        self.process.signal("TERM");
        assert_eq!(
            self.process.ends(PATIENCE),
            Some(0),
            "{}",
            self.process.text()
        );
        assert!(!is_mounted(&self.directory), "the mount stayed behind");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.process.kill();
        if !std::thread::panicking() {
            wait_until("the mount is gone", PATIENCE, || {
                !is_mounted(&self.directory)
            });
        }
    }
}

/// Whether a namespace is mounted there, alive or dead.
pub fn is_mounted(directory: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc is there");
    let directory = directory.to_str().expect("test directories are UTF-8");
    mounts.lines().any(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        fields.get(1) == Some(&directory) && fields.get(2) == Some(&"fuse.pss")
    })
}

/// Part of a file as memory, to read from.
pub struct Mapping {
    start: *const u8,
    length: usize,
}

impl Mapping {
    /// Maps so many bytes from an offset, a multiple of the page size: `MAP_SHARED` or `MAP_PRIVATE`.
    ///
    /// # Errors
    /// Of mmap(2).
    pub fn new(file: &File, offset: u64, length: usize, is_shared: bool) -> io::Result<Mapping> {
        let flags = match is_shared {
            true => libc::MAP_SHARED,
            false => libc::MAP_PRIVATE,
        };
        #[expect(unsafe_code, reason = "there is no safe way to map a file")]
        // SAFETY: the kernel chooses a place where nothing is; it is only read, by copying.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        match start == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Mapping {
                start: start.cast(),
                length,
            }),
        }
    }

    /// What it shows now. The file must not have become shorter: that ends the process.
    ///
    /// # Panics
    /// Behind its end.
    pub fn read(&self, from: usize, length: usize) -> Vec<u8> {
        assert!(from + length <= self.length);
        let mut bytes = vec![0; length];
        #[expect(
            unsafe_code,
            reason = "others may change what is mapped: no reference to it may exist"
        )]
        // SAFETY: within the mapping, which lives as long as this.
        unsafe {
            std::ptr::copy(self.start.add(from), bytes.as_mut_ptr(), length);
        }
        bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "what was mapped by hand is unmapped by hand")]
        // SAFETY: it was mapped with this length, and nobody has a reference into it.
        unsafe {
            libc::munmap(self.start.cast_mut().cast(), self.length);
        }
    }
}
