//! The one seam between the storage code and the machine's files, so that tests can put a simulated
//! disk under the real log and chunk store.

pub mod files;

use std::io;
use std::sync::Arc;

use bytes::Bytes;

/// What offsets, lengths and buffers of [`OpenMode::DirectSync`] are multiples of.
pub const ALIGN_BYTES: usize = 4096;

/// The directories in the tree of a server: syncs, renames and the count of free space are of them together.
pub(crate) const DIRECTORIES: [&str; 3] = ["log", "data", "trash"];

/// A directory tree that belongs to one server. Paths are relative, with `/` between parts.
///
/// What the contract allows to be lost: contents until [`DiskFile::sync`] returned, names (created,
/// renamed, removed) until [`Disk::sync_dir`] of the directory returned. An error of a write or sync
/// is final: the caller must stop using the tree.
pub trait Disk: Send + Sync {
    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// `NotFound` if it does not exist.
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Names and kinds of what a directory holds, in no order. A missing directory is empty.
    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>>;
    /// Creates a directory and its parents.
    fn create_dir_all(&self, path: &str) -> io::Result<()>;
    /// Renames a file or directory, replacing a file.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &str) -> io::Result<()>;
    /// Removes a directory and everything in it.
    fn remove_dir_all(&self, path: &str) -> io::Result<()>;
    /// Makes the names within a directory durable.
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// Makes everything in the tree durable (`syncfs`). Fails also if something that was written since the
    /// disk was opened could not be written back meanwhile, whether its file is still open or not.
    fn sync_all(&self) -> io::Result<()>;
    /// (free, total) bytes that this process may still use.
    fn space(&self) -> io::Result<(u64, u64)>;
}

/// How [`Disk::open`] opens a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpenMode {
    /// An existing file, through the page cache.
    Existing,
    /// A file that is created empty if it does not exist, through the page cache.
    Create,
    /// An existing file whose writes go past the page cache where the file system can do it, and are
    /// durable when they return. Offsets, lengths and buffers are multiples of 4096 bytes.
    DirectSync,
}

/// One name in a directory.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct DirEntry {
    /// Last part of the path.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// An open file. All methods may be called from several threads at once.
pub trait DiskFile: Send + Sync {
    /// Fills `buf` from `offset`; bytes past the end of the file are left as they are. Returns how
    /// many bytes were read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Like [`DiskFile::read_at`] but fails with `WouldBlock` instead of waiting for the device.
    fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `parts`, one behind the other, from `offset`.
    fn write_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Makes the contents durable (`fdatasync`; the length too).
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends with a hole.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// Frees a range, which then reads as zeros; the length stays.
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Makes a range read as zeros and keeps space allocated for it.
    fn zero_range(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Whether the file is empty.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// Whether an error says that the disk (or the owner's share of it) is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Memory that starts at a multiple of [`ALIGN_BYTES`], as direct IO needs it.
#[derive(Debug, Default)]
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuf {
    /// `bytes` zeros.
    pub fn zeroed(bytes: usize) -> AlignedBuf {
        let memory = vec![0; bytes + ALIGN_BYTES - 1];
        let start = (memory.as_ptr() as usize).next_multiple_of(ALIGN_BYTES);
        AlignedBuf {
            start: start - memory.as_ptr() as usize,
            memory,
            length: bytes,
        }
    }

    /// Length.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    /// The same memory as [`Bytes`]; still aligned.
    pub fn into_bytes(self) -> Bytes {
        let range = self.start..self.start + self.length;
        Bytes::from(self.memory).slice(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buffers_stay_aligned() {
        for bytes in [0, 1, 4096, 1 << 20] {
            let buffer = AlignedBuf::zeroed(bytes);
            assert_eq!(buffer.len(), bytes);
            assert_eq!(buffer.as_slice().as_ptr() as usize % ALIGN_BYTES, 0);
            let bytes = buffer.into_bytes();
            assert_eq!(bytes.as_ptr() as usize % ALIGN_BYTES, 0);
        }
    }
}
