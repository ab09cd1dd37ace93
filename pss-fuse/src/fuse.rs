//! The namespace as the kernel's FUSE module sees it. Everything that knows the `fuser` crate is here.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr,
    Request,
};
use pss_core::types::BLOCK_BYTES;
use pss_core::volume::device::ReadPart;
use pss_core::wire::client::REQUEST_BYTES_MAX;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tracing::{error, warn};

use crate::error::FsError;
use crate::namespace::{Attributes, Entry, Namespace, Seek};
use crate::node::Node;

/// Reads under way at a time, each of at most 1 MiB: what memory is used for.
const READS_MAX: usize = 64;
/// Requests of the kernel's read-ahead and asynchronous IO under way at a time.
const BACKGROUND_MAX: u16 = READS_MAX as u16;
/// An operation of several questions may take so much longer than one question.
const OPERATION_MARGIN: Duration = Duration::from_secs(1);
/// The only kind of extended attributes that there is.
const USER_ATTRIBUTES: &[u8] = b"user.";
/// A number is never used for anything else.
const GENERATION: Generation = Generation(0);

/// How files and directories look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Look {
    /// Their owner.
    pub uid: u32,
    /// Their group.
    pub gid: u32,
    /// Permissions of files.
    pub file_mode: u16,
    /// Permissions of directories.
    pub directory_mode: u16,
    /// For so long the kernel may answer from what it knows of names and attributes. Data are always asked for.
    pub metadata_ttl: Duration,
}

/// Answers the kernel's requests by tasks on a tokio runtime.
pub struct Fuse {
    shared: Arc<Shared>,
    runtime: Handle,
}

struct Shared {
    namespace: Namespace,
    look: Look,
    reads: Semaphore,
    /// Open directories, as they were when they were read from the start.
    directories: Mutex<HashMap<u64, Option<Arc<Vec<Entry>>>>>,
    next_handle: AtomicU64,
}

impl Fuse {
    /// Serves a namespace.
    pub fn new(namespace: Namespace, look: Look, runtime: Handle) -> Fuse {
        let shared = Arc::new(Shared {
            namespace,
            look,
            reads: Semaphore::new(READS_MAX),
            directories: Mutex::default(),
            next_handle: AtomicU64::new(1),
        });
        Fuse { shared, runtime }
    }

    /// Runs a task that answers a request. The thread that takes the kernel's requests never waits.
    fn spawn<F: Future<Output = ()> + Send + 'static>(&self, task: impl FnOnce(Arc<Shared>) -> F) {
        self.runtime.spawn(task(Arc::clone(&self.shared)));
    }
}

impl Shared {
    fn attr(&self, attributes: &Attributes) -> FileAttr {
        let changed = UNIX_EPOCH
            .checked_add(Duration::from_millis(attributes.changed_ms))
            .unwrap_or(UNIX_EPOCH);
        let (kind, perm) = match attributes.node.is_directory() {
            true => (FileType::Directory, self.look.directory_mode),
            false => (FileType::RegularFile, self.look.file_mode),
        };
        FileAttr {
            ino: INodeNo(attributes.node.inode()),
            size: attributes.size_bytes,
            blocks: attributes.allocated_bytes.div_ceil(512),
            atime: changed,
            mtime: changed,
            ctime: changed,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink: attributes.links,
            uid: self.look.uid,
            gid: self.look.gid,
            rdev: 0,
            // What programs read with one call.
            blksize: match attributes.node.is_directory() {
                true => BLOCK_BYTES as u32,
                false => REQUEST_BYTES_MAX as u32,
            },
            flags: 0,
        }
    }

    /// Bounds an operation of the kernel, however many questions it takes.
    async fn bounded<T>(
        &self,
        operation: impl Future<Output = Result<T, FsError>>,
    ) -> Result<T, FsError> {
        let limit = self.namespace.source().timeout() + OPERATION_MARGIN;
        match tokio::time::timeout(limit, operation).await {
            Ok(result) => result,
            Err(_) => Err(FsError::TimedOut(limit)),
        }
    }

    /// A directory's entries with `.` and `..`; read again from the start, as they are now.
    async fn entries(
        &self,
        node: Node,
        handle: u64,
        from: u64,
    ) -> Result<Arc<Vec<Entry>>, FsError> {
        let kept = match from {
            0 => None,
            _ => self.directories().get(&handle).cloned().flatten(),
        };
        if let Some(kept) = kept {
            return Ok(kept);
        }
        let mut entries = Vec::new();
        for (name, node) in [(".", node), ("..", node.parent())] {
            entries.push(Entry {
                name: name.to_owned(),
                attributes: self.namespace.attributes(node).await?,
            });
        }
        entries.extend(self.namespace.list(node).await?);
        let entries = Arc::new(entries);
        if let Some(kept) = self.directories().get_mut(&handle) {
            *kept = Some(Arc::clone(&entries));
        }
        Ok(entries)
    }

    fn directories(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Option<Arc<Vec<Entry>>>>> {
        self.directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The node of an inode number that the kernel has from us.
fn node(inode: INodeNo) -> Result<Node, FsError> {
    Node::from_inode(inode.0).ok_or(FsError::NotFound)
}

/// What the kernel is told, after a person could read of it.
fn errno(what: &str, node: Option<Node>, error: &FsError) -> Errno {
    match error {
        FsError::Damaged | FsError::Unexpected(_) => error!(what, ?node, %error, "failed"),
        // That the cell is away is said once, where it is noticed.
        error if error.is_outage() => {}
        _ => tracing::debug!(what, ?node, %error, "failed"),
    }
    Errno::from_i32(error.errno().raw_os_error())
}

/// The same for an open file: it is not missing, its volume is gone.
fn errno_of_open(what: &str, node: Option<Node>, error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::from_i32(rustix::io::Errno::STALE.raw_os_error()),
        error => errno(what, node, error),
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Always, not by the kernel's guess: attributes come with the names in any case.
        let wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            | InitFlags::FUSE_MAX_PAGES;
        // What an older kernel lacks costs speed, or mmap; nothing else.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_max_write(REQUEST_BYTES_MAX as u32);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_str().map(str::to_owned);
        self.spawn(async move |shared: Arc<Shared>| {
            let found = async {
                let parent = node(parent)?;
                // Volumes have names in UTF-8.
                let name = name.ok_or(FsError::NotFound)?;
                shared.namespace.lookup(parent, &name).await
            };
            match shared.bounded(found).await {
                Ok(attributes) => {
                    let attr = shared.attr(&attributes);
                    reply.entry(&shared.look.metadata_ttl, &attr, GENERATION);
                }
                Err(error) => reply.error(errno("lookup", None, &error)),
            }
        });
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.spawn(async move |shared: Arc<Shared>| {
            let found = async { shared.namespace.attributes(node(inode)?).await };
            match shared.bounded(found).await {
                Ok(attributes) => {
                    reply.attr(&shared.look.metadata_ttl, &shared.attr(&attributes));
                }
                Err(error) if handle.is_some() => {
                    reply.error(errno_of_open("getattr", node(inode).ok(), &error));
                }
                Err(error) => reply.error(errno("getattr", node(inode).ok(), &error)),
            }
        });
    }

    fn open(&self, _request: &Request, _inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.0 & (rustix::fs::OFlags::ACCMODE.bits() as i32) != 0 {
            return reply.error(Errno::EROFS);
        }
        // Past the page cache: every read is asked for, so that it holds what was written before.
        reply.opened(
            FileHandle(0),
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
        );
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.spawn(async move |shared: Arc<Shared>| {
            let data = async {
                let node = node(inode)?;
                let _permit = shared.reads.acquire().await;
                shared.namespace.read(node, offset, size as usize).await
            };
            match shared.bounded(data).await {
                Ok(parts) => match parts.as_slice() {
                    [ReadPart::Data(data)] => reply.data(data),
                    parts => reply.data(&joined(parts)),
                },
                Err(error) => reply.error(errno_of_open("read", node(inode).ok(), &error)),
            }
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel asks for these two only (lseek(2)).
        let what = match whence {
            3 => Seek::Data,
            4 => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        self.spawn(async move |shared: Arc<Shared>| {
            let found = async { shared.namespace.seek(node(inode)?, offset, what).await };
            match shared.bounded(found).await {
                Ok(at) => reply.offset(i64::try_from(at).unwrap_or(i64::MAX)),
                Err(error) => reply.error(errno_of_open("lseek", node(inode).ok(), &error)),
            }
        });
    }

    fn opendir(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.shared.next_handle.fetch_add(1, Ordering::Relaxed);
        self.shared.directories().insert(handle, None);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.spawn(async move |shared: Arc<Shared>| {
            let entries = async { shared.entries(node(inode)?, handle.0, offset).await };
            let entries = match shared.bounded(entries).await {
                Ok(entries) => entries,
                Err(error) => return reply.error(errno("readdir", node(inode).ok(), &error)),
            };
            for (at, entry) in numbered(&entries, offset) {
                let attr = shared.attr(&entry.attributes);
                if reply.add(attr.ino, at, attr.kind, &entry.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.spawn(async move |shared: Arc<Shared>| {
            let entries = async { shared.entries(node(inode)?, handle.0, offset).await };
            let entries = match shared.bounded(entries).await {
                Ok(entries) => entries,
                Err(error) => return reply.error(errno("readdir", node(inode).ok(), &error)),
            };
            for (at, entry) in numbered(&entries, offset) {
                let attr = shared.attr(&entry.attributes);
                let ttl = shared.look.metadata_ttl;
                if reply.add(attr.ino, at, &entry.name, &ttl, &attr, GENERATION) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.shared.directories().remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        self.spawn(
            async move |shared: Arc<Shared>| match shared.namespace.capacity().await {
                Some(capacity) => {
                    let total = capacity.total_bytes / BLOCK_BYTES as u64;
                    let free = capacity.free_bytes / BLOCK_BYTES as u64;
                    reply.statfs(
                        total,
                        free,
                        free,
                        0,
                        0,
                        BLOCK_BYTES as u32,
                        255,
                        BLOCK_BYTES as u32,
                    );
                }
                None => reply.error(Errno::EIO),
            },
        );
    }

    fn getxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        // `ls -l` asks for security contexts and access lists; once it knows that there is no such thing here, it does
        // not ask for those of every file.
        if !name.as_bytes().starts_with(USER_ATTRIBUTES) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let names = node(inode).map(|node| self.shared.namespace.attribute_names(node));
        let names = names.unwrap_or_default();
        let Some(name) = names.iter().find(|known| name == **known) else {
            return reply.error(Errno::from_i32(FsError::NoAttribute.errno().raw_os_error()));
        };
        self.spawn(async move |shared: Arc<Shared>| {
            let value = async { shared.namespace.attribute(node(inode)?, name).await };
            match shared.bounded(value).await {
                Ok(value) => reply_xattr(reply, size, value.as_bytes()),
                Err(error) => reply.error(errno("getxattr", node(inode).ok(), &error)),
            }
        });
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        match node(inode) {
            Ok(node) => {
                let names = self.shared.namespace.attribute_names(node);
                let names: String = names.iter().map(|name| format!("{name}\0")).collect();
                reply_xattr(reply, size, names.as_bytes());
            }
            Err(error) => reply.error(errno("listxattr", None, &error)),
        }
    }

    fn access(&self, _request: &Request, _inode: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions by itself (default_permissions).
        match mask.contains(AccessFlags::W_OK) {
            true => reply.error(Errno::EROFS),
            false => reply.ok(),
        }
    }

    fn destroy(&mut self) {
        let open = self.shared.directories().len();
        if open > 0 {
            warn!(open, "directories were open at the end");
        }
    }
}

/// Entries from a position on, each with the position behind it.
fn numbered(entries: &[Entry], from: u64) -> impl Iterator<Item = (u64, &Entry)> {
    let from = usize::try_from(from).unwrap_or(usize::MAX);
    entries
        .iter()
        .enumerate()
        .skip(from)
        .map(|(at, entry)| (at as u64 + 1, entry))
}

/// Answers with the length if that is asked for (`size` 0), or with the value if it fits (getxattr(2)).
fn reply_xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

/// Parts as one piece, which the kernel wants.
fn joined(parts: &[ReadPart]) -> Vec<u8> {
    let mut all = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => all.extend_from_slice(data),
            ReadPart::Hole(length) => all.resize(all.len() + *length as usize, 0),
        }
    }
    all
}
