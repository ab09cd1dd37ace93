//! Puts the file system into the tree of directories, and takes it away again, whatever happened meanwhile.

use std::ffi::{CString, OsString};
use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::sync::oneshot;
use tracing::warn;

use crate::fuse::Fuse;

/// The type that `mount` and /proc/mounts show.
pub const FS_TYPE: &str = "fuse.pss";
const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// What the helper has said at its end is there at once.
const HELPER_LIMIT: Duration = Duration::from_secs(5);
/// What the process that watches over a mount is called with; see [`watch`].
pub const WATCH_VERB: &str = "watch";

/// Why something could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no such directory.
    #[error("{0} does not exist: make it with mkdir")]
    NoDirectory(PathBuf),
    /// It is a file.
    #[error("{0} is not a directory")]
    NotDirectory(PathBuf),
    /// A live file system of ours is there.
    #[error("{0} is already mounted: unmount it with 'pss-fuse umount {0}' first")]
    Mounted(PathBuf),
    /// Nothing of ours is there.
    #[error("{0} is no mounted namespace of a cell")]
    NotMounted(PathBuf),
    /// Files are open.
    #[error(
        "{0} is in use; wait for its users with --wait, or take it away from new ones with --lazy"
    )]
    Busy(PathBuf),
    /// There is no FUSE.
    #[error(
        "cannot open {DEVICE}: {0}; load the kernel module with 'modprobe fuse', or let this user open it"
    )]
    NoFuse(io::Error),
    /// The helper for users other than root is missing.
    #[error("{HELPER} is missing, which users other than root need: install the package fuse3")]
    NoHelper,
    /// The helper failed.
    #[error("{HELPER} failed: {0}")]
    Helper(String),
    /// The kernel refuses.
    #[error("{action} {directory} failed: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        directory: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A file system that is mounted; it is unmounted when this is dropped.
pub struct Mounted {
    place: Place,
    /// Is told when the kernel has ended the session: somebody else has unmounted it.
    ended: oneshot::Receiver<io::Result<()>>,
    /// Whether it is unmounted.
    is_over: bool,
    /// Unmounts when this process dies: its standard input ends then.
    watcher: Option<Child>,
}

/// A mount, told apart from others that were or will be in the same place.
#[derive(Clone, Debug)]
struct Place {
    directory: PathBuf,
    id: u64,
}

/// Finds out at once, before a cell is asked, that there is nothing to mount on.
///
/// # Errors
/// [`MountError::NoDirectory`] or [`MountError::NotDirectory`].
pub fn check_place(directory: &Path) -> Result<(), MountError> {
    match std::fs::metadata(directory) {
        Ok(facts) if !facts.is_dir() => Err(MountError::NotDirectory(directory.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(MountError::NoDirectory(directory.to_owned()))
        }
        // What else is in the way, a dead mount for example, is seen when it is mounted.
        _ => Ok(()),
    }
}

/// Mounts on a directory and serves in a thread of its own.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(
    directory: &Path,
    fuse: Fuse,
    source: &str,
    allows_others: bool,
) -> Result<Mounted, MountError> {
    let directory = absolute(directory)?;
    // Nobody takes what we mount for something dead that was there before.
    let changing = lock_place(&directory);
    // Two processes that mount on one directory at once would take each other's mount for their own.
    let locked = lock(&directory)?;
    check_directory(&directory)?;
    let acl = match allows_others {
        true => SessionACL::All,
        false => SessionACL::Owner,
    };
    let session = match rustix::process::geteuid().is_root() {
        true => mount_as_root(&directory, fuse, source, acl)?,
        false => mount_by_helper(&directory, fuse, source, acl)?,
    };
    let place = match find(&directory).filter(|found| found.fs_type == FS_TYPE) {
        Some(found) => Place {
            directory,
            id: found.id,
        },
        None => {
            // It is ours: nobody else has mounted here since.
            let _ = detach(&directory);
            return Err(MountError::NotMounted(directory));
        }
    };
    drop((locked, changing));
    let (sender, ended) = oneshot::channel();
    let mut mounted = Mounted {
        place,
        ended,
        is_over: false,
        watcher: None,
    };
    let spawned = thread::Builder::new().name("fuse".to_owned()).spawn(|| {
        // Nobody may wait for it any more.
        let _ = sender.send(session.run());
    });
    spawned.map_err(|error| failed("serving", &mounted.place.directory, error))?;
    match spawn_watcher(&mounted.place) {
        Ok(watcher) => mounted.watcher = Some(watcher),
        Err(error) => warn!("if this process is killed, the mount stays behind: {error}"),
    }
    Ok(mounted)
}

impl Mounted {
    /// Returns when the kernel has ended the session.
    ///
    /// # Errors
    /// The session's.
    pub async fn ended(&mut self) -> io::Result<()> {
        let result = (&mut self.ended).await;
        self.is_over = true;
        match result {
            Ok(result) => result,
            Err(_) => Err(io::Error::other(
                "the thread that serves the kernel has panicked",
            )),
        }
    }

    /// Takes it out of the tree, even if files are open: they stay open as long as this process lives.
    ///
    /// # Errors
    /// [`MountError`]; not that it is gone already.
    pub fn unmount(&mut self) -> Result<(), MountError> {
        self.place.detach()?;
        self.is_over = true;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What is over must not be touched again: somebody else may have mounted in its place.
        if !self.is_over
            && let Err(error) = self.place.detach()
        {
            warn!("{error}");
        }
        if let Some(mut watcher) = self.watcher.take() {
            let _ = watcher.kill();
            let _ = watcher.wait();
        }
    }
}

impl Place {
    /// Whether this very mount is the one that is seen there.
    fn is_seen(&self) -> bool {
        find(&self.directory).is_some_and(|found| found.id == self.id)
    }

    fn detach(&self) -> Result<(), MountError> {
        let _changing = lock_place(&self.directory);
        self.detach_seen()
    }

    fn detach_seen(&self) -> Result<(), MountError> {
        match self.is_seen() {
            true => detach(&self.directory),
            false => Ok(()),
        }
    }
}

/// Unmounts a namespace that any process serves.
///
/// # Errors
/// [`MountError::NotMounted`]; [`MountError::Busy`] without `is_lazy`.
pub fn unmount(directory: &Path, is_lazy: bool) -> Result<(), MountError> {
    let directory = absolute(directory)?;
    if find(&directory).is_none_or(|found| found.fs_type != FS_TYPE) {
        return Err(MountError::NotMounted(directory));
    }
    match is_lazy {
        true => detach(&directory),
        false => unmount_unused(&directory),
    }
}

/// Waits until the process whose end of standard input this has is gone, then unmounts what it has left behind.
pub fn watch(directory: PathBuf, id: u64) {
    // Ctrl-C is meant for the one that is watched.
    let _ = rustix::process::setsid();
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    let place = Place { directory, id };
    let end = Instant::now() + DEATH_LIMIT;
    // The kernel may take a moment to notice. A mount that lives is not the one that is left behind, whatever its number.
    while place.is_seen() && Instant::now() < end {
        // Between looking and taking away nobody mounts there anew: that could be of the same number.
        let changing = lock_place(&place.directory);
        if place.is_seen() && is_dead(&place.directory) {
            // There is nobody to tell.
            let _ = place.detach_seen();
            return;
        }
        drop(changing);
        thread::sleep(DEATH_PAUSE);
    }
}

/// Whether the process of a file system is gone.
fn is_dead(directory: &Path) -> bool {
    rustix::fs::stat(directory).is_err_and(|error| error == Errno::NOTCONN)
}

fn spawn_watcher(place: &Place) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        // Whatever this process is called, such as mount.fuse.pss.
        .arg0("pss-fuse")
        .arg(WATCH_VERB)
        .arg(&place.directory)
        .arg(place.id.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
}

/// Keeps other processes of ours from changing what is mounted on a directory, as long as the answer lives; and on those
/// beside it, for it is the directory above that is locked, as one on which something dead is mounted cannot be opened.
/// `None` if that cannot be read, or if somebody takes longer than all of that takes.
fn lock_place(directory: &Path) -> Option<OwnedFd> {
    let above = OpenOptions::new()
        .read(true)
        .open(directory.parent()?)
        .ok()?;
    let end = Instant::now() + LOCK_LIMIT;
    while rustix::fs::flock(&above, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(DEATH_PAUSE);
    }
    Some(above.into())
}

/// Keeps others from mounting on a directory, as long as the answer lives.
fn lock(directory: &Path) -> Result<OwnedFd, MountError> {
    if is_dead(directory) {
        // Cannot be opened; whoever is first to take it away goes on.
        take_away_dead(directory)?;
    }
    let opened = OpenOptions::new().read(true).open(directory);
    let file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoDirectory(directory.to_owned()),
        _ => failed("looking at", directory, error),
    })?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(
        |error| match error {
            Errno::WOULDBLOCK => MountError::Mounted(directory.to_owned()),
            error => failed("locking", directory, error.into()),
        },
    )?;
    Ok(file.into())
}

/// Takes away what is left of a namespace whose process has died.
fn take_away_dead(directory: &Path) -> Result<(), MountError> {
    if find(directory).is_some_and(|found| found.fs_type == FS_TYPE) {
        warn!(
            "{} was left behind by a process that died; it is unmounted",
            directory.display()
        );
        detach(directory)?;
    }
    Ok(())
}

/// Can be mounted on that?
fn check_directory(directory: &Path) -> Result<(), MountError> {
    if find(directory).is_some_and(|found| found.fs_type == FS_TYPE) {
        return Err(MountError::Mounted(directory.to_owned()));
    }
    match std::fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(MountError::NotDirectory(directory.to_owned())),
        Err(error) => Err(failed("looking at", directory, error)),
    }
}

/// The path as the kernel lists it: without links. The last part is not looked at, for that of a dead file system
/// cannot be.
fn absolute(directory: &Path) -> Result<PathBuf, MountError> {
    let directory =
        std::path::absolute(directory).map_err(|error| failed("looking at", directory, error))?;
    if let Ok(canonical) = directory.canonicalize() {
        return Ok(canonical);
    }
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Ok(directory);
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(MountError::NoDirectory(directory))
        }
        Err(error) => Err(failed("looking at", parent, error)),
    }
}

fn mount_as_root(
    directory: &Path,
    fuse: Fuse,
    source: &str,
    acl: SessionACL,
) -> Result<Session<Fuse>, MountError> {
    let device = open_device()?;
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
    let mut data =
        format!("fd={fd},rootmode=40000,user_id={uid},group_id={gid},default_permissions");
    if acl == SessionACL::All {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).expect("numbers and names have no NUL");
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    // By mount(2) itself: the fuser crate would lose the type that /proc/mounts shows.
    rustix::mount::mount(source, directory, FS_TYPE, flags, data.as_c_str())
        .map_err(|error| failed("mounting on", directory, error.into()))?;
    let config = Config::default();
    Session::from_fd(fuse, device, acl, config).map_err(|error| {
        let _ = detach(directory);
        failed("mounting on", directory, error)
    })
}

fn open_device() -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE);
    device.map(OwnedFd::from).map_err(MountError::NoFuse)
}

fn mount_by_helper(
    directory: &Path,
    fuse: Fuse,
    source: &str,
    acl: SessionACL,
) -> Result<Session<Fuse>, MountError> {
    // The helper would not say what is wrong.
    drop(open_device()?);
    let mut options =
        format!("fsname={source},subtype=pss,ro,nodev,nosuid,noexec,default_permissions");
    if acl == SessionACL::All {
        options.push_str(",allow_other");
    }
    let at_helper = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => failed("mounting on", directory, error),
    };
    // Not by the fuser crate's own call of it: when its session ends, it unmounts by name what others may have mounted in the
    // same place meanwhile.
    let (ours, helpers) = UnixStream::pair().map_err(at_helper)?;
    ours.set_read_timeout(Some(HELPER_LIMIT))
        .map_err(at_helper)?;
    let output = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(directory)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(helpers))
        .stdout(Stdio::null())
        .output()
        .map_err(at_helper)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(MountError::Helper(said.trim().to_owned()));
    }
    let session = receive_device(&ours)
        .and_then(|device| Session::from_fd(fuse, device, acl, Config::default()));
    session.map_err(|error| {
        let _ = detach(directory);
        failed("mounting on", directory, error)
    })
}

/// Takes the descriptor of the mount that the helper has sent.
fn receive_device(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let sent = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    sent.ok_or_else(|| io::Error::other(format!("{HELPER} has not sent the mount")))
}

/// Takes what is mounted there out of the tree, whether it is in use or not.
fn detach(directory: &Path) -> Result<(), MountError> {
    match rustix::process::geteuid().is_root() {
        true => match rustix::mount::unmount(directory, UnmountFlags::DETACH) {
            Ok(()) => Ok(()),
            // It is gone already.
            Err(Errno::INVAL) if find(directory).is_none() => Ok(()),
            Err(error) => Err(failed("unmounting", directory, error.into())),
        },
        false => unmount_by_helper(directory, &["-u", "-z"]),
    }
}

fn unmount_unused(directory: &Path) -> Result<(), MountError> {
    match rustix::process::geteuid().is_root() {
        true => match rustix::mount::unmount(directory, UnmountFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(MountError::Busy(directory.to_owned())),
            Err(error) => Err(failed("unmounting", directory, error.into())),
        },
        false => unmount_by_helper(directory, &["-u"]),
    }
}

fn unmount_by_helper(directory: &Path, flags: &[&str]) -> Result<(), MountError> {
    let output = Command::new(HELPER)
        .args(flags)
        .arg("--")
        .arg(directory)
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => failed("unmounting", directory, error),
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false if said.contains("busy") => Err(MountError::Busy(directory.to_owned())),
        false => Err(MountError::Helper(said.trim().to_owned())),
    }
}

fn failed(action: &'static str, directory: &Path, error: io::Error) -> MountError {
    MountError::Io {
        action,
        directory: directory.to_owned(),
        error,
    }
}

/// How long it takes at most until the kernel has ended the session of a mount that nobody uses.
pub const END_LIMIT: Duration = Duration::from_secs(1);
/// The same until it has noticed that a process is dead.
const DEATH_LIMIT: Duration = Duration::from_secs(10);
const DEATH_PAUSE: Duration = Duration::from_millis(20);
/// Longest wait for others that mount or unmount something near by.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Eq, PartialEq)]
struct MountInfo {
    id: u64,
    directory: PathBuf,
    fs_type: String,
}

/// What is seen in a place: the last that was mounted there.
fn find(directory: &Path) -> Option<MountInfo> {
    let mounts = std::fs::read("/proc/self/mountinfo").ok()?;
    let lines = mounts.split(|byte| *byte == b'\n').rev();
    lines
        .filter_map(parse_mount)
        .find(|found| found.directory == directory)
}

fn parse_mount(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    let id = text(fields.next()?)?.parse().ok()?;
    let directory = PathBuf::from(unescaped(fields.nth(3)?));
    // Optional fields end with a lone dash.
    let fs_type = text(fields.skip_while(|field| *field != b"-").nth(1)?)?;
    Some(MountInfo {
        id,
        directory,
        fs_type,
    })
}

/// Undoes the octal escapes of blanks and backslashes.
fn unescaped(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let line = br"36 35 98:0 / /mnt/my\040disk rw,noatime master:1 shared:2 - fuse.pss pss ro,user_id=0";
        let expected = MountInfo {
            id: 36,
            directory: PathBuf::from("/mnt/my disk"),
            fs_type: "fuse.pss".to_owned(),
        };
        assert_eq!(parse_mount(line), Some(expected));
        for wrong in ["", "x", "36 35 98:0 / /mnt rw", "36 35 98:0 / /mnt rw -"] {
            assert_eq!(parse_mount(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn escapes() {
        let cases: [(&[u8], &[u8]); 4] = [
            (br"\134\011", b"\\\t"),
            (br"a\04", br"a\04"),
            (br"\999", br"\999"),
            (br"\\", br"\\"),
        ];
        for (field, expected) in cases {
            assert_eq!(unescaped(field).as_bytes(), expected);
        }
    }

    #[test]
    fn directories_that_cannot_be_mounted_on() {
        let missing = lock(Path::new("/proc/self/nothing")).map(drop);
        assert!(
            matches!(missing, Err(MountError::NoDirectory(_))),
            "{missing:?}"
        );
        let missing = absolute(Path::new("/proc/self/nothing/here"));
        assert!(
            matches!(missing, Err(MountError::NoDirectory(_))),
            "{missing:?}"
        );
        let file = check_directory(Path::new("/proc/self/status"));
        assert!(matches!(file, Err(MountError::NotDirectory(_))), "{file:?}");
        let plain = unmount(Path::new("/proc"), false);
        assert!(matches!(plain, Err(MountError::NotMounted(_))), "{plain:?}");
    }
}
