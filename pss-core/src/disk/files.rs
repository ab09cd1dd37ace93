//! The machine's files as a [`Disk`].

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{ALIGN_BYTES, DIRECTORIES, DirEntry, Disk, DiskFile, OpenMode};

/// Name of the lock file in the root.
pub const LOCK_FILE: &str = "lock";
/// Most parts that the kernel takes in one call (`IOV_MAX`).
const PARTS_MAX: usize = 1024;
/// Writes through the page cache are cut into pieces of this size. The kernel keeps what was written
/// at once in one folio, and a later write of 4 KiB into a folio of 2 MiB costs ext4 a walk over all 512
/// buffers of it: 15 us instead of one.
const CACHED_WRITE_BYTES: usize = 16 << 10;
/// Directory whose own directories, those of the volumes, are looked at as well.
const VOLUMES: &str = "data";
/// Zeros are written in pieces of this size where the file system cannot make them itself.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A directory of the machine. It is locked for this process as long as the value lives.
#[derive(Debug)]
pub struct FileDisk {
    root: PathBuf,
    /// Open directory, for `syncfs`: it reports what could not be written back since the descriptor that
    /// it is given was opened (Linux 5.8), so this one lives as long as the disk.
    directory: File,
    _lock: File,
}

impl FileDisk {
    /// Takes a directory, which is created if it does not exist.
    ///
    /// # Errors
    /// `WouldBlock` if another process uses it, [`Apart`] if a part of it is elsewhere.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<FileDisk> {
        let root = root.into();
        fs::create_dir_all(&root)?;
        check_is_in_one_place(&root)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(root.join(LOCK_FILE))?;
        lock_exclusively(&lock)?;
        Ok(FileDisk {
            directory: File::open(&root)?,
            _lock: lock,
            root,
        })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, path: &str) -> io::Result<PathBuf> {
        let path = Path::new(path);
        let inside = |part| matches!(part, Component::Normal(_));
        if path.components().all(inside) {
            Ok(self.root.join(path))
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// A part of a server's directory is mounted, or linked to, from another file system.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} is not on the same mounted file system as {}: syncs, renames and the count of free space are of \
     one; unmount it or replace the link by a directory, or put all of {} on that file system",
    part.display(), root.display(), root.display()
)]
pub struct Apart {
    /// The part.
    pub part: PathBuf,
    /// The directory that it should be with.
    pub root: PathBuf,
}

/// Refuses a directory of a server whose parts are on several file systems: `syncfs` of the root would
/// leave out the others, their free space would not be counted, and a deleted volume could not be
/// renamed into the trash.
///
/// # Errors
/// [`Apart`] as the inner error; others if the directories cannot be looked at.
pub fn check_is_in_one_place(root: &Path) -> io::Result<()> {
    let home = Place::of(root)?;
    let mut parts: Vec<PathBuf> = DIRECTORIES.map(|name| root.join(name)).into();
    match fs::read_dir(root.join(VOLUMES)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        volumes => {
            for volume in volumes? {
                parts.push(volume?.path());
            }
        }
    }
    for part in parts {
        match Place::of(&part) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(place) if place == home => {}
            Ok(_) => {
                let root = root.to_owned();
                return Err(io::Error::other(Apart { part, root }));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where a file is: the file system and how it is reached. Within one mount names can be exchanged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Place {
    device: (u32, u32),
    /// Kernels before 5.8 do not say.
    mount: Option<u64>,
}

impl Place {
    /// Of what the path leads to, links followed.
    #[expect(unsafe_code, reason = "std does not say which mount a file is on")]
    fn of(path: &Path) -> io::Result<Place> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut facts = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: `path` ends with a zero and outlives the call; `facts` is writable memory of the right
        // type, and all zeros is a value of it.
        let facts = unsafe {
            let mask = libc::STATX_MNT_ID;
            if libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, mask, facts.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            facts.assume_init()
        };
        let says_mount = facts.stx_mask & libc::STATX_MNT_ID != 0;
        Ok(Place {
            device: (facts.stx_dev_major, facts.stx_dev_minor),
            mount: says_mount.then_some(facts.stx_mnt_id),
        })
    }
}

impl Disk for FileDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.path(path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match mode {
            OpenMode::Existing => {}
            OpenMode::Create => {
                options.create(true);
            }
            OpenMode::DirectSync => return open_direct(&path, options),
        }
        let file = options.open(path)?;
        Ok(Arc::new(PlainFile {
            file,
            cached: true,
            sync_each_write: false,
        }))
    }

    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let entries = match fs::read_dir(self.path(path)?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            // Names of ours are UTF-8; others are none of our business.
            if let Ok(name) = entry.file_name().into_string() {
                let is_dir = entry.file_type()?.is_dir();
                found.push(DirEntry { name, is_dir });
            }
        }
        Ok(found)
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        fs::create_dir_all(self.path(path)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from)?, self.path(to)?)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.path(path)?)
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        fs::remove_dir_all(self.path(path)?)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        File::open(self.path(path)?)?.sync_all()
    }

    fn sync_all(&self) -> io::Result<()> {
        sync_file_system(&self.directory)
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        space(&self.directory)
    }
}

fn open_direct(path: &Path, mut options: OpenOptions) -> io::Result<Arc<dyn DiskFile>> {
    let direct = options
        .clone()
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
        .open(path);
    match direct {
        Ok(file) => Ok(Arc::new(PlainFile {
            file,
            cached: false,
            sync_each_write: false,
        })),
        // Some file systems have no direct IO.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            let file = options.custom_flags(0).open(path)?;
            Ok(Arc::new(PlainFile {
                file,
                cached: true,
                sync_each_write: true,
            }))
        }
        Err(error) => Err(error),
    }
}

struct PlainFile {
    file: File,
    /// Goes through the page cache.
    cached: bool,
    /// Stands in for `O_DSYNC`.
    sync_each_write: bool,
}

impl DiskFile for PlainFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Direct IO behind an end that is not aligned.
                Err(_)
                    if !done.is_multiple_of(ALIGN_BYTES)
                        && buf.len().is_multiple_of(ALIGN_BYTES) =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match read_nowait(&self.file, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EOPNOTSUPP | libc::ENOSYS) => return self.read_at(buf, offset),
                    _ => return Err(error),
                },
            }
        }
        Ok(done)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        match parts {
            [part] if self.cached => {
                for (piece, at) in part
                    .chunks(CACHED_WRITE_BYTES)
                    .zip((offset..).step_by(CACHED_WRITE_BYTES))
                {
                    self.file.write_all_at(piece, at)?;
                }
            }
            [part] => self.file.write_all_at(part, offset)?,
            parts => {
                let mut at = offset;
                for parts in parts.chunks(PARTS_MAX) {
                    at += write_parts(&self.file, parts, at)?;
                }
            }
        }
        if self.sync_each_write {
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.make_zeros(mode, offset, bytes)
    }

    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.make_zeros(libc::FALLOC_FL_ZERO_RANGE, offset, bytes)
    }
}

impl PlainFile {
    /// Lets the file system make zeros, or writes them.
    fn make_zeros(&self, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match allocate(&self.file, mode, offset, bytes) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.write_zeros(offset, bytes)
            }
            result => result,
        }
    }

    fn write_zeros(&self, mut offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset + bytes;
        while offset < end {
            let part = (end - offset).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], offset)?;
            offset += part;
        }
        Ok(())
    }
}

/// Writes all parts from `offset`, however often the kernel writes less. Returns how many bytes.
fn write_parts(file: &File, parts: &[IoSlice<'_>], offset: u64) -> io::Result<u64> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    let mut done = write_vectored(file, parts, offset)?;
    if done == total {
        return Ok(total as u64);
    }
    // A short write: the rest goes out part by part.
    let mut position = 0;
    for part in parts {
        let end = position + part.len();
        if done < end {
            file.write_all_at(&part[done - position..], offset + done as u64)?;
            done = end;
        }
        position = end;
    }
    Ok(total as u64)
}

#[expect(unsafe_code, reason = "std has no positioned vectored write")]
fn write_vectored(file: &File, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
    loop {
        // SAFETY: `IoSlice` has the layout of `iovec` on Unix; the parts outlive the call, which only
        // reads them; there are at most IOV_MAX of them.
        let done = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                parts.as_ptr().cast(),
                parts.len() as i32,
                offset as libc::off_t,
            )
        };
        match usize::try_from(done) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[expect(unsafe_code, reason = "std has no read that does not wait")]
fn read_nowait(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: `part` describes `buf`, which is writable and outlives the call.
    let done = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            &raw const part,
            1,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

#[expect(unsafe_code, reason = "std has no fallocate")]
fn allocate(file: &File, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
    loop {
        // SAFETY: takes no pointers.
        let result = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode,
                offset as libc::off_t,
                bytes as libc::off_t,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[expect(
    unsafe_code,
    reason = "std's file locks are newer than our rust-version"
)]
fn lock_exclusively(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "std has no syncfs")]
fn sync_file_system(directory: &File) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::syncfs(directory.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "std has no statvfs")]
fn space(directory: &File) -> io::Result<(u64, u64)> {
    let mut facts = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `facts` is writable memory of the right type, and all zeros is a value of it.
    let facts = unsafe {
        if libc::fstatvfs(directory.as_raw_fd(), facts.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        facts.assume_init()
    };
    // 64-bit here, but not on every system.
    #[allow(clippy::unnecessary_cast)]
    let (unit, free, total) = (
        facts.f_frsize as u64,
        facts.f_bavail as u64,
        facts.f_blocks as u64,
    );
    Ok((free * unit, total * unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::AlignedBuf;

    fn disk() -> (tempfile::TempDir, FileDisk) {
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(directory.path()).unwrap();
        (directory, disk)
    }

    #[test]
    fn second_user_is_refused() {
        let (directory, disk) = disk();
        let second = FileDisk::open(directory.path()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(disk);
        FileDisk::open(directory.path()).unwrap();
    }

    #[test]
    fn parts_on_other_file_systems_are_refused() {
        use std::os::unix::fs::symlink;
        for part in ["log", "data", "trash", "data/vol001"] {
            let (directory, disk) = disk();
            drop(disk);
            let path = directory.path().join(part);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink("/proc", &path).unwrap();
            let error = FileDisk::open(directory.path()).unwrap_err();
            let inner = error.get_ref().and_then(|it| it.downcast_ref::<Apart>());
            let apart = inner.unwrap_or_else(|| panic!("{part}: {error}"));
            assert_eq!(apart.part, path);
            fs::remove_file(&path).unwrap();
            FileDisk::open(directory.path()).unwrap();
        }
    }

    /// A link within the file system is as good as a directory.
    #[test]
    fn parts_may_be_linked_within_the_file_system() {
        let (directory, disk) = disk();
        drop(disk);
        fs::create_dir(directory.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", directory.path().join("log")).unwrap();
        FileDisk::open(directory.path()).unwrap();
    }

    #[test]
    fn many_parts_are_one_write() {
        let (_directory, disk) = disk();
        let file = disk.open("a", OpenMode::Create).unwrap();
        let data: Vec<u8> = (0..3000 * 7).map(|i| i as u8).collect();
        let parts: Vec<_> = data.chunks(7).map(IoSlice::new).collect();
        file.write_at(&parts, 5).unwrap();
        let mut back = vec![0; data.len() + 5];
        assert_eq!(file.read_at(&mut back, 0).unwrap(), back.len());
        assert_eq!(back[5..], data);
        assert_eq!(file.read_at_nowait(&mut back, 0).unwrap(), data.len() + 5);
    }

    #[test]
    fn direct_writes_and_reads() {
        let (_directory, disk) = disk();
        let missing = disk.open("a", OpenMode::DirectSync).err().unwrap();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        disk.open("a", OpenMode::Create).unwrap();
        let file = disk.open("a", OpenMode::DirectSync).unwrap();
        let mut data = AlignedBuf::zeroed(8192);
        data.as_mut_slice().fill(9);
        let (first, second) = data.as_slice().split_at(4096);
        let parts = [IoSlice::new(first), IoSlice::new(second)];
        file.write_at(&parts, 4096).unwrap();
        let mut back = AlignedBuf::zeroed(16384);
        assert_eq!(file.read_at(back.as_mut_slice(), 0).unwrap(), 12288);
        assert!(back.as_slice()[..4096].iter().all(|byte| *byte == 0));
        assert!(back.as_slice()[4096..12288].iter().all(|byte| *byte == 9));
    }

    #[test]
    fn holes_read_as_zeros() {
        let (_directory, disk) = disk();
        let file = disk.open("a", OpenMode::Create).unwrap();
        file.write_at(&[IoSlice::new(&[1; 16384])], 0).unwrap();
        file.punch_hole(4096, 4096).unwrap();
        file.zero_range(8192, 4096).unwrap();
        assert_eq!(file.len().unwrap(), 16384);
        let mut back = vec![7; 16384];
        file.read_at(&mut back, 0).unwrap();
        assert_eq!(back[..4096], [1; 4096]);
        assert_eq!(back[4096..12288], [0; 8192]);
        assert_eq!(back[12288..], [1; 4096]);
        file.zero_range(16384, 4096).unwrap();
        assert_eq!(file.len().unwrap(), 20480);
    }

    #[test]
    fn paths_stay_inside() {
        let (_directory, disk) = disk();
        for path in ["../a", "/a", "a/../b"] {
            let error = disk.open(path, OpenMode::Create).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
        }
        disk.open(".", OpenMode::Create).err().unwrap();
    }

    #[test]
    fn names() {
        let (_directory, disk) = disk();
        disk.create_dir_all("x/y").unwrap();
        disk.open("x/y/f", OpenMode::Create).unwrap();
        disk.rename("x/y", "z").unwrap();
        disk.sync_dir("z").unwrap();
        disk.sync_all().unwrap();
        let found = disk.read_dir("z").unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].is_dir), ("f", false));
        disk.remove_file("z/f").unwrap();
        disk.remove_dir_all("z").unwrap();
        assert!(disk.read_dir("z").unwrap().is_empty());
        let (free, total) = disk.space().unwrap();
        assert!(free <= total && total > 0);
    }
}
