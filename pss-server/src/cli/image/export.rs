//! `pss volume export`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pss_core::size::Size;
use pss_core::volume::device::ReadPart;
use pss_core::wire::client::VolumeStatus;
use pss_gateway::progress::Progress;
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::super::{CellArgs, CliError, Exit, print_json, say};
use super::{Client, ExportArgs, PIECE_BYTES, Reads, failed, hash, hex, qemu};
use crate::render::printable;

/// So much is made durable at once, and noted as done.
const DURABLE_BYTES: u64 = 256 << 20;
/// A link in the place of one of our files leads to somebody else's.
const NOFOLLOW: i32 = OFlags::NOFOLLOW.bits() as i32;

/// How far an export is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Done {
    format: String,
    /// Identity of the volume.
    uuid: [u8; 16],
    size_bytes: u64,
    /// Slot of its last change.
    changed: u64,
    /// So much from the start is in the file, durably.
    done_bytes: u64,
}

impl Done {
    fn nothing(status: &VolumeStatus, format: &str) -> Done {
        Done {
            format: format.to_owned(),
            uuid: status.volume.uuid,
            size_bytes: status.volume.size_bytes,
            changed: status.times.changed.0,
            done_bytes: 0,
        }
    }
}

/// The file with how far an export is, beside the one that it writes. It is there from before that is made until after that
/// has got its name, and locked as long as the export runs.
struct Notes {
    file: File,
    path: PathBuf,
    /// What an earlier export has noted.
    found: Option<Done>,
}

impl Notes {
    /// `part` is the file that is written.
    fn open(part: &Path) -> Result<Notes, CliError> {
        let path = beside(part, ".json");
        let had_notes = path.symlink_metadata().is_ok();
        if !had_notes && part.symlink_metadata().is_ok() {
            let message = format!(
                "{} exists and is not what an export has left; remove it, or write another file",
                part.display()
            );
            return Err(CliError::new(Exit::Busy, message));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let opened = options.custom_flags(NOFOLLOW).open(&path);
        let mut file = opened.map_err(|error| failed("write", &path, &error))?;
        if let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            return Err(match error {
                Errno::WOULDBLOCK => CliError::new(
                    Exit::Busy,
                    format!("another export writes {}", part.display()),
                ),
                error => failed("lock", &path, &error.into()),
            });
        }
        let mut text = Vec::new();
        let read = file.read_to_end(&mut text);
        read.map_err(|error| failed("read", &path, &error))?;
        // A file of that name that is no export's is not ours to overwrite.
        let found = serde_json::from_slice(&text).ok();
        if had_notes && found.is_none() && !text.is_empty() {
            let message = format!(
                "{} is not what an export has left; remove it",
                path.display()
            );
            return Err(CliError::new(Exit::Busy, message));
        }
        Ok(Notes { file, path, found })
    }

    fn write(&mut self, done: &Done) -> Result<(), CliError> {
        let text = serde_json::to_vec(done).expect("numbers are JSON");
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.write_all_at(&text, 0))
            .and_then(|()| self.file.sync_data());
        written.map_err(|error| failed("write", &self.path, &error))
    }
}

pub(in super::super) fn run(args: &CellArgs, export: &ExportArgs) -> Result<(), CliError> {
    let file = &export.file;
    let format = match &export.format {
        Some(format) if matches!(format.as_str(), "raw" | "qcow2") => format.as_str(),
        Some(other) => {
            let message = format!("--format {}: use raw or qcow2", printable(other));
            return Err(CliError::usage(message));
        }
        None if file.extension().is_some_and(|end| end == "qcow2") => "qcow2",
        None => "raw",
    };
    if format != "raw" {
        qemu::check()?;
    }
    if file.symlink_metadata().is_ok() {
        let message = format!(
            "{} exists already; remove it, or write another file",
            file.display()
        );
        return Err(CliError::new(Exit::Busy, message));
    }
    let part = beside(file, ".part");
    let (digest, status, changed) = Client::run(args, async |client: Arc<Client>| {
        let status = client.volume(&export.name).await?;
        let mut notes = Notes::open(&part)?;
        let nothing = Done::nothing(&status, format);
        let found = notes.found.take().filter(|found| {
            let length = part.metadata().map_or(0, |about| about.len());
            let wanted = Done {
                done_bytes: found.done_bytes,
                ..nothing.clone()
            };
            *found == wanted && found.done_bytes <= length.min(found.size_bytes)
        });
        let done = found
            .filter(|_| export.resume && format == "raw")
            .unwrap_or(nothing);
        notes.write(&done)?;
        if done.done_bytes == 0
            && let Err(error) = fs::remove_file(&part)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(failed("write", &part, &error));
        }
        let digest = match format {
            "raw" => Some(raw(&client, &status, export, &part, &mut notes, done).await?),
            format => {
                qemu::export(&client, &part, format, &status.volume, !export.no_verify).await?;
                None
            }
        };
        publish(&part, file)?;
        let _ = fs::remove_file(&notes.path);
        // The file is complete, whatever the answer is.
        let now = client.volume(&export.name).await.ok();
        let changed = now.map(|now| now.times.changed != status.times.changed);
        Ok((digest, status, changed))
    })?;
    match changed {
        Some(false) => {}
        Some(true) => say(format!(
            "Volume {} was written to meanwhile: the file is not of one moment.",
            printable(&export.name)
        )),
        None => say(format!(
            "Whether volume {} was written to meanwhile could not be asked.",
            printable(&export.name)
        )),
    }
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.export/1",
            "name": export.name,
            "size_bytes": status.volume.size_bytes,
            "format": format,
            "verified": !export.no_verify,
            "sha256": digest,
            "changed_meanwhile": changed,
        }));
    }
    let digest = digest
        .map(|digest| format!(" sha256 {digest}."))
        .unwrap_or_default();
    say(format!(
        "Exported volume {} of {} to {}.{digest}",
        printable(&export.name),
        Size(status.volume.size_bytes),
        file.display()
    ));
    Ok(())
}

/// A file's name with something behind it.
fn beside(file: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(end);
    PathBuf::from(name)
}

/// Gives a complete file its name, durably; one that has come there meanwhile stays.
fn publish(part: &Path, file: &Path) -> Result<(), CliError> {
    let complete = File::open(part).and_then(|part| part.sync_all());
    complete.map_err(|error| failed("write", part, &error))?;
    let renamed = renameat_with(CWD, part, CWD, file, RenameFlags::NOREPLACE);
    let renamed = match renamed {
        // Not every file system can say so.
        Err(Errno::INVAL | Errno::NOSYS) if file.symlink_metadata().is_err() => {
            fs::rename(part, file).map_err(|error| failed("write", file, &error))
        }
        Err(Errno::EXIST | Errno::INVAL | Errno::NOSYS) => Err(CliError::new(
            Exit::Busy,
            format!(
                "{} has come to be meanwhile; the copy is complete in {}",
                file.display(),
                part.display()
            ),
        )),
        result => result.map_err(|error| failed("write", file, &error.into())),
    };
    renamed?;
    let parent = file.parent().filter(|parent| *parent != Path::new(""));
    let synced = File::open(parent.unwrap_or(Path::new("."))).and_then(|parent| parent.sync_all());
    synced.map_err(|error| failed("write", file, &error))
}

/// Writes a raw image and gives its digest.
async fn raw(
    client: &Arc<Client>,
    status: &VolumeStatus,
    export: &ExportArgs,
    part: &Path,
    notes: &mut Notes,
    mut done: Done,
) -> Result<String, CliError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.create_new(done.done_bytes == 0);
    let opened = options.custom_flags(NOFOLLOW).open(part);
    let mut image = opened.map_err(|error| failed("write", part, &error))?;
    let mut digest = Sha256::new();
    let resumed = done.done_bytes;
    if resumed > 0 {
        say(format!("Going on at {}.", Size(resumed)));
        hash_file(&mut digest, &mut image, part, resumed)?;
    }
    let size = status.volume.size_bytes;
    let progress = Progress::new("exporting", size);
    progress.advance(resumed);
    let mut reads = Reads::new(Arc::clone(client), status.volume.id, resumed, size);
    while let Some((at, parts)) = reads.next().await {
        let mut end = at;
        for piece in parts? {
            hash(&mut digest, &piece);
            write(&mut image, end, &piece).map_err(|error| failed("write", part, &error))?;
            end += piece.length_bytes();
        }
        progress.advance(end - at);
        if end - done.done_bytes >= DURABLE_BYTES {
            make_durable(&image, part, end)?;
            done.done_bytes = end;
            notes.write(&done)?;
        }
    }
    drop(progress);
    make_durable(&image, part, size)?;
    let digest = hex(digest);
    if !export.no_verify {
        verify(client, status, &mut image, part, &digest, resumed > 0).await?;
    }
    Ok(digest)
}

/// Where a volume has nothing, an image has a hole.
fn write(image: &mut File, at: u64, piece: &ReadPart) -> std::io::Result<()> {
    match piece {
        ReadPart::Data(data) => {
            image.seek(SeekFrom::Start(at))?;
            image.write_all(data)
        }
        // Also what an export that is gone on with has left there.
        ReadPart::Hole(_) => Ok(()),
    }
}

fn make_durable(image: &File, part: &Path, length: u64) -> Result<(), CliError> {
    let done = image.set_len(length).and_then(|()| image.sync_data());
    done.map_err(|error| failed("write", part, &error))
}

/// Reads the file again, and the volume too if its first part was read by an earlier export.
async fn verify(
    client: &Arc<Client>,
    status: &VolumeStatus,
    image: &mut File,
    part: &Path,
    digest: &str,
    is_resumed: bool,
) -> Result<(), CliError> {
    let size = status.volume.size_bytes;
    let mut found = Sha256::new();
    hash_file(&mut found, image, part, size)?;
    let found = hex(found);
    let differ = |what: &str, other: &str| {
        let message = format!(
            "{what} has sha256 {other}, what was copied {digest}; export again without --resume"
        );
        Err(CliError::new(Exit::Differ, message))
    };
    if found != digest {
        return differ(&part.display().to_string(), &found);
    }
    if is_resumed {
        let progress = Progress::new("verifying", size);
        let volume = client.digest(status.volume.id, size, &progress).await?;
        if volume != digest {
            return differ("the volume", &volume);
        }
    }
    Ok(())
}

/// Adds the first so many bytes of a file to a digest.
fn hash_file(
    digest: &mut Sha256,
    image: &mut File,
    path: &Path,
    length: u64,
) -> Result<(), CliError> {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut left = length;
    let mut read = || -> std::io::Result<()> {
        image.seek(SeekFrom::Start(0))?;
        while left > 0 {
            let now = left.min(buffer.len() as u64) as usize;
            image.read_exact(&mut buffer[..now])?;
            digest.update(&buffer[..now]);
            left -= now as u64;
        }
        Ok(())
    };
    read().map_err(|error| failed("read", path, &error))
}
