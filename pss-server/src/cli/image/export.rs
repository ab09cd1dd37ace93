//! `pss volume export`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pss_core::size::Size;
use pss_core::volume::device::ReadPart;
use pss_core::wire::client::VolumeStatus;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::super::{CellArgs, CliError, Exit, print_json, say};
use super::{Client, ExportArgs, PIECE_BYTES, Progress, Reads, failed, hash, hex, qemu};
use crate::render::printable;

/// So much is made durable at once, and noted as done.
const DURABLE_BYTES: u64 = 256 << 20;

/// How far an export is: beside the file that it writes.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Done {
    /// Identity of the volume.
    uuid: [u8; 16],
    size_bytes: u64,
    /// Slot of its last change.
    changed: u64,
    /// So much from the start is in the file, durably.
    done_bytes: u64,
}

impl Done {
    fn nothing(status: &VolumeStatus) -> Done {
        Done {
            uuid: status.volume.uuid,
            size_bytes: status.volume.size_bytes,
            changed: status.times.changed.0,
            done_bytes: 0,
        }
    }

    /// What an earlier export has noted, if that still holds.
    fn read(path: &Path, status: &VolumeStatus) -> Option<Done> {
        let text = fs::read(path).ok()?;
        let found: Done = serde_json::from_slice(&text).ok()?;
        let wanted = Done {
            done_bytes: found.done_bytes,
            ..Done::nothing(status)
        };
        (found == wanted && found.done_bytes <= found.size_bytes).then_some(found)
    }

    fn write(&self, path: &Path) -> Result<(), CliError> {
        let text = serde_json::to_vec(self).expect("numbers are JSON");
        fs::write(path, text).map_err(|error| failed("write", path, &error))
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
        let digest = match format {
            "raw" => Some(raw(&client, &status, export, &part).await?),
            format => {
                qemu::export(&client, &part, format, &status.volume, !export.no_verify).await?;
                None
            }
        };
        let now = client.volume(&export.name).await?;
        Ok((digest, status, now.times.changed))
    })?;
    fs::rename(&part, file).map_err(|error| failed("write", file, &error))?;
    if changed != status.times.changed {
        say(format!(
            "Volume {} was written to meanwhile: the file is not of one moment.",
            printable(&export.name)
        ));
    }
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.export/1",
            "name": export.name,
            "size_bytes": status.volume.size_bytes,
            "format": format,
            "verified": !export.no_verify,
            "sha256": digest,
            "changed_meanwhile": changed != status.times.changed,
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

/// Writes a raw image and gives its digest.
async fn raw(
    client: &Arc<Client>,
    status: &VolumeStatus,
    export: &ExportArgs,
    part: &Path,
) -> Result<String, CliError> {
    let notes = beside(part, ".json");
    let found = Done::read(&notes, status).filter(|_| export.resume);
    let mut done = found.unwrap_or_else(|| Done::nothing(status));
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(done.done_bytes == 0);
    let mut image = options
        .open(part)
        .map_err(|error| failed("write", part, &error))?;
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
            done.write(&notes)?;
        }
    }
    drop(progress);
    make_durable(&image, part, size)?;
    let digest = hex(digest);
    if !export.no_verify {
        verify(client, status, &mut image, part, &digest, resumed > 0).await?;
    }
    // If it stays, it describes a file that is no more.
    let _ = fs::remove_file(&notes);
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
