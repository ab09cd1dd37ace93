//! `pss volume import`.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pss_core::client::Cell;
use pss_core::size::Size;
use pss_core::state::Volume;
use pss_core::types::BLOCK_BYTES;
use pss_core::volume::device::{
    BlockDevice, CompletionQueue, DeviceError, DeviceRequest, ReadPart, Volumes,
};
use pss_gateway::progress::Progress;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use super::super::volume::check_new;
use super::super::{CellArgs, CliError, Exit, print_json, say};
use super::{Client, ImportArgs, PIECE_BYTES, PIECES_MAX, Reads, failed, hash_zeros, hex, qemu};
use crate::render::printable;

/// Begins every qcow2 image.
const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";

pub(in super::super) fn run(args: &CellArgs, import: &ImportArgs) -> Result<(), CliError> {
    let file = &import.file;
    let image = File::open(file).map_err(|error| failed("open", file, &error))?;
    let format = match &import.format {
        Some(format) => format.clone(),
        None => guess_format(&image, file)?,
    };
    let size_bytes = match format.as_str() {
        "raw" => length(&image, file)?,
        format => qemu::size(file, format)?,
    };
    if import.resume && format != "raw" {
        let message = format!(
            "--resume is for raw images, and this is {format}: delete the volume, and import it again"
        );
        return Err(CliError::usage(message));
    }
    // The file's end may lie within a sector.
    let size_bytes = size_bytes.next_multiple_of(512);
    let chunk_bytes = check_new(&import.name, size_bytes, import.chunk_size)?;
    let digest = Client::run(args, async |client: Arc<Client>| {
        let (volume, is_new) = prepare(&client, import, size_bytes, chunk_bytes).await?;
        let digest = match format.as_str() {
            "raw" => {
                let copy = Copy {
                    client: &client,
                    file,
                    image: &image,
                    volume: &volume,
                };
                copy.run(is_new, import.no_verify).await.map(Some)
            }
            format => {
                let verify = !import.no_verify;
                qemu::import(&client, file, format, &volume, is_new, verify).await?;
                Ok(None)
            }
        };
        digest.map_err(|error| match error.exit {
            Exit::Usage | Exit::NotFound | Exit::Busy => error,
            _ => CliError::new(
                error.exit,
                format!(
                    "{error}; the volume is incomplete: {}delete it with 'pss volume delete {}'",
                    match format == "raw" {
                        true => "go on with --resume, or ",
                        false => "",
                    },
                    printable(&volume.name)
                ),
            ),
        })
    })?;
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.import/1",
            "name": import.name,
            "size_bytes": size_bytes,
            "format": format,
            "verified": !import.no_verify,
            "sha256": digest,
        }));
    }
    let verified = match (import.no_verify, &digest) {
        (true, _) => String::new(),
        (false, Some(digest)) => format!(" It holds what the file holds: sha256 {digest}."),
        (false, None) => " It holds what the image holds.".to_owned(),
    };
    say(format!(
        "Imported {} as volume {} of {}.{verified}",
        file.display(),
        printable(&import.name),
        Size(size_bytes)
    ));
    Ok(())
}

fn guess_format(image: &File, file: &Path) -> Result<String, CliError> {
    let mut start = Vec::new();
    let read = image.take(QCOW_MAGIC.len() as u64).read_to_end(&mut start);
    read.map_err(|error| failed("read", file, &error))?;
    let format = match start == QCOW_MAGIC {
        true => "qcow2",
        false => "raw",
    };
    Ok(format.to_owned())
}

/// Length of a file or of a disk.
fn length(image: &File, file: &Path) -> Result<u64, CliError> {
    let about = image
        .metadata()
        .map_err(|error| failed("look at", file, &error))?;
    let kind = about.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let message = format!("{}: an image is a file or a disk", file.display());
        return Err(CliError::usage(message));
    }
    let end = rustix::fs::seek(image, rustix::fs::SeekFrom::End(0));
    end.map_err(|error| failed("look at", file, &error.into()))
}

/// The volume that is to be written, and whether it was made for this.
async fn prepare(
    client: &Client,
    import: &ImportArgs,
    size_bytes: u64,
    chunk_bytes: u32,
) -> Result<(Volume, bool), CliError> {
    let name = printable(&import.name);
    let Some(found) = client.find(&import.name).await? else {
        let created = client
            .cell
            .create_volume(&import.name, size_bytes, chunk_bytes)
            .await;
        if let Err(error) = created {
            return Err(client.explain(error).await);
        }
        return Ok((client.volume(&import.name).await?.volume, true));
    };
    if !import.resume {
        let message = format!(
            "volume {name} exists already; take another name, or go on with an import that was interrupted with --resume"
        );
        return Err(CliError::new(Exit::Busy, message));
    }
    if !found.attached_by.is_empty() {
        let by = printable(&found.attached_by.join(", "));
        let message = format!("volume {name} is attached by {by}; disconnect it there first");
        return Err(CliError::new(Exit::Busy, message));
    }
    if found.volume.chunk_bytes != chunk_bytes && import.chunk_size.is_some() {
        let size = Size(u64::from(found.volume.chunk_bytes));
        let message = format!("volume {name} has chunks of {size}; leave --chunk-size out");
        return Err(CliError::usage(message));
    }
    if found.volume.size_bytes != size_bytes {
        let message = format!(
            "volume {name} has {} bytes and the image {size_bytes}: it is not what an import of this image has left",
            found.volume.size_bytes
        );
        return Err(CliError::usage(message));
    }
    Ok((found.volume, false))
}

/// A raw image on its way into a volume.
struct Copy<'a> {
    client: &'a Arc<Client>,
    file: &'a Path,
    image: &'a File,
    volume: &'a Volume,
}

impl Copy<'_> {
    /// Gives the digest of the image.
    async fn run(&self, is_new: bool, no_verify: bool) -> Result<String, CliError> {
        let mut writes = Writes::open(&self.client.cell, self.volume).await?;
        // We are one; whoever came in the meantime is another.
        let users = self.client.volume(&self.volume.name).await?.attached_by;
        if users.len() > 1 {
            let by = printable(&users.join(", "));
            let message = format!(
                "volume {} is attached by {by}",
                printable(&self.volume.name)
            );
            return Err(CliError::new(Exit::Busy, message));
        }
        let digest = match is_new {
            true => self.write_all(&mut writes, is_new).await?,
            false => {
                self.check_left_behind().await?;
                self.write_what_differs(&mut writes).await?
            }
        };
        writes.finish().await?;
        if no_verify {
            return Ok(digest);
        }
        let size = self.volume.size_bytes;
        let progress = Progress::new("verifying", size);
        let found = self.client.digest(self.volume.id, size, &progress).await?;
        drop(progress);
        match found == digest {
            true => Ok(digest),
            false => Err(CliError::new(
                Exit::Differ,
                format!(
                    "the volume's sha256 is {found}, that of the image was {digest}: one of them was changed meanwhile"
                ),
            )),
        }
    }

    /// Writes to a volume that is empty.
    async fn write_all(&self, writes: &mut Writes, is_new: bool) -> Result<String, CliError> {
        let mut digest = Sha256::new();
        let size = self.volume.size_bytes;
        let progress = Progress::new("importing", size);
        let mut at = 0;
        while at < size {
            let hole = self.hole(at)?.min(size - at);
            if hole > 0 {
                hash_zeros(&mut digest, hole);
                progress.advance(hole);
                at += hole;
                continue;
            }
            let piece = self.piece(at)?;
            let length = piece.len() as u64;
            digest.update(&piece);
            writes.write(at, piece, is_new).await?;
            progress.advance(length);
            at += length;
        }
        self.check_length()?;
        Ok(hex(digest))
    }

    /// What an interrupted import leaves behind has, block by block, what the image has, or zeros. Anything else is
    /// somebody's disk.
    async fn check_left_behind(&self) -> Result<(), CliError> {
        let size = self.volume.size_bytes;
        let progress = Progress::new("looking", size);
        let mut reads = Reads::new(Arc::clone(self.client), self.volume.id, 0, size);
        while let Some((at, parts)) = reads.next().await {
            let parts = parts?;
            progress.advance(parts.iter().map(ReadPart::length_bytes).sum());
            if parts.iter().all(|part| matches!(part, ReadPart::Hole(_))) {
                continue;
            }
            if let Some(differs) = foreign(&self.piece(at)?, &parts) {
                let message = format!(
                    "volume {} has other data than the image at byte {}: it is not what an import of this image has left; take another name",
                    printable(&self.volume.name),
                    at + differs as u64
                );
                return Err(CliError::new(Exit::Busy, message));
            }
        }
        Ok(())
    }

    /// Writes where a volume differs.
    async fn write_what_differs(&self, writes: &mut Writes) -> Result<String, CliError> {
        let mut digest = Sha256::new();
        let size = self.volume.size_bytes;
        let progress = Progress::new("importing", size);
        let mut reads = Reads::new(Arc::clone(self.client), self.volume.id, 0, size);
        while let Some((at, parts)) = reads.next().await {
            let parts = parts?;
            let piece = self.piece(at)?;
            digest.update(&piece);
            progress.advance(piece.len() as u64);
            if !is_equal(&piece, &parts) {
                writes.write(at, piece, false).await?;
            }
        }
        Ok(hex(digest))
    }

    /// How long the hole at a position of the image is; 0 where there are data.
    fn hole(&self, at: u64) -> Result<u64, CliError> {
        match rustix::fs::seek(self.image, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => Ok(data - at),
            // No data before the end, or the end is before this.
            Err(rustix::io::Errno::NXIO) => self.check_length().map(|()| u64::MAX - at),
            // Not every file system knows of holes.
            Err(_) => Ok(0),
        }
    }

    /// The image is as long as it was.
    fn check_length(&self) -> Result<(), CliError> {
        let now = length(self.image, self.file)?;
        match now.next_multiple_of(512) == self.volume.size_bytes {
            true => Ok(()),
            false => Err(self.became_shorter()),
        }
    }

    fn became_shorter(&self) -> CliError {
        let message = format!("{} changed its length meanwhile", self.file.display());
        CliError::new(Exit::Failed, message)
    }

    /// What the image has at a position; zeros behind its end, which may lie within a sector.
    fn piece(&self, at: u64) -> Result<Vec<u8>, CliError> {
        let length = (self.volume.size_bytes - at).min(PIECE_BYTES as u64);
        let mut piece = vec![0; length as usize];
        let mut filled = 0;
        while filled < piece.len() {
            match self.image.read_at(&mut piece[filled..], at + filled as u64) {
                Ok(0) if self.volume.size_bytes - (at + filled as u64) < 512 => break,
                Ok(0) => return Err(self.became_shorter()),
                Ok(more) => filled += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", self.file, &error)),
            }
        }
        Ok(piece)
    }
}

fn is_equal(piece: &[u8], parts: &[ReadPart]) -> bool {
    let mut rest = piece;
    parts.iter().all(|part| {
        let (here, after) = rest.split_at((part.length_bytes() as usize).min(rest.len()));
        rest = after;
        match part {
            ReadPart::Data(data) => here == data,
            ReadPart::Hole(_) => here.iter().all(|byte| *byte == 0),
        }
    })
}

/// Where a volume has a block that is neither that of the image nor zeros.
fn foreign(piece: &[u8], parts: &[ReadPart]) -> Option<usize> {
    let mut at = 0;
    for part in parts {
        let length = part.length_bytes() as usize;
        if let ReadPart::Data(data) = part {
            let own = piece.get(at..at + length)?;
            let mut blocks = own.chunks(BLOCK_BYTES).zip(data.chunks(BLOCK_BYTES));
            let is_foreign =
                |(own, has): (&[u8], &[u8])| own != has && has.iter().any(|byte| *byte != 0);
            if let Some(block) = blocks.position(is_foreign) {
                return Some(at + block * BLOCK_BYTES);
            }
        }
        at += length;
    }
    None
}

/// Writes to a volume, some at a time.
struct Writes {
    device: Arc<dyn BlockDevice>,
    queue: Arc<CompletionQueue>,
    wake: Arc<Notify>,
    next: u64,
    /// Where each write that is under way goes.
    under_way: HashMap<u64, u64>,
}

impl Writes {
    async fn open(cell: &Arc<Cell>, volume: &Volume) -> Result<Writes, CliError> {
        let opened = cell.open(&volume.name).await;
        let device = opened.map_err(|error| CliError::new(exit_of(error), error))?;
        let gone = || CliError::new(Exit::NotFound, "the volume was deleted meanwhile");
        let device = device.ok_or_else(gone)?;
        let wake = Arc::new(Notify::new());
        let waker = Arc::clone(&wake);
        Ok(Writes {
            device,
            queue: CompletionQueue::new(Box::new(move || waker.notify_one())),
            wake,
            next: 0,
            under_way: HashMap::new(),
        })
    }

    /// Blocks of zeros take no space: they are zeroed, or left out if they `are_zero` already.
    async fn write(
        &mut self,
        offset_bytes: u64,
        data: Vec<u8>,
        are_zero: bool,
    ) -> Result<(), CliError> {
        let data = Bytes::from(data);
        for run in runs(&data) {
            let offset_bytes = offset_bytes + run.range.start as u64;
            let request = match run.is_zero {
                true if are_zero => continue,
                true => DeviceRequest::WriteZeroes {
                    offset_bytes,
                    length_bytes: run.range.len() as u64,
                    allocate: false,
                    fua: false,
                },
                false => DeviceRequest::Write {
                    offset_bytes,
                    data: data.slice(run.range),
                    fua: false,
                },
            };
            while self.under_way.len() >= PIECES_MAX {
                self.complete().await?;
            }
            self.next += 1;
            self.under_way.insert(self.next, offset_bytes);
            let done = self.queue.completion(self.next);
            self.device.submit(request, done);
        }
        Ok(())
    }

    /// Waits until something is answered.
    async fn complete(&mut self) -> Result<(), CliError> {
        let mut results = Vec::new();
        self.queue.take(&mut results);
        if results.is_empty() {
            self.wake.notified().await;
        }
        for (cookie, result) in results {
            let at = self.under_way.remove(&cookie).unwrap_or_default();
            if let Err(error) = result {
                let message = format!("writing at byte {at}: {error}");
                return Err(CliError::new(exit_of(error), message));
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), CliError> {
        while !self.under_way.is_empty() {
            self.complete().await?;
        }
        Ok(())
    }
}

/// Blocks that are all zero, or all not.
#[derive(Debug, Eq, PartialEq)]
struct Run {
    range: Range<usize>,
    is_zero: bool,
}

fn runs(data: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (at, block) in data.chunks(BLOCK_BYTES).enumerate() {
        let is_zero = block.iter().all(|byte| *byte == 0);
        let start = at * BLOCK_BYTES;
        let end = start + block.len();
        match runs.last_mut() {
            Some(last) if last.is_zero == is_zero => last.range.end = end,
            _ => runs.push(Run {
                range: start..end,
                is_zero,
            }),
        }
    }
    runs
}

fn exit_of(error: DeviceError) -> Exit {
    match error {
        DeviceError::Unavailable => Exit::Timeout,
        DeviceError::Deleted => Exit::NotFound,
        DeviceError::Reserved | DeviceError::ReservationChanged => Exit::Busy,
        DeviceError::OutOfRange
        | DeviceError::Invalid
        | DeviceError::ReadOnly
        | DeviceError::NoSpace
        | DeviceError::Miscompare(_)
        | DeviceError::Fenced
        | DeviceError::Io => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_from_data() {
        let mut data = vec![0; 3 * BLOCK_BYTES + 100];
        data[BLOCK_BYTES + 5] = 1;
        data[3 * BLOCK_BYTES] = 1;
        let found = runs(&data);
        let expected = [
            (0..4096, true),
            (4096..8192, false),
            (8192..12288, true),
            (12288..12388, false),
        ];
        let expected = expected.map(|(range, is_zero)| Run { range, is_zero });
        assert_eq!(found, expected);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn pieces_are_compared_with_parts() {
        let piece = [1, 2, 0, 0, 3];
        let parts = |last: &'static [u8]| {
            [
                ReadPart::Data(Bytes::from_static(&[1, 2])),
                ReadPart::Hole(2),
                ReadPart::Data(Bytes::from_static(last)),
            ]
        };
        assert!(is_equal(&piece, &parts(&[3])));
        assert!(!is_equal(&piece, &parts(&[4])));
        assert!(!is_equal(&[1, 2, 9, 0, 3], &parts(&[3])));
    }

    #[test]
    fn foreign_data_are_told_from_unfinished_ones() {
        let mut image = vec![7; 3 * BLOCK_BYTES];
        image[5] = 1;
        let mut volume = image.clone();
        volume[BLOCK_BYTES..].fill(0);
        let parts = |bytes: &[u8]| [ReadPart::Data(Bytes::copy_from_slice(bytes))];
        assert_eq!(foreign(&image, &parts(&volume)), None);
        volume[2 * BLOCK_BYTES + 9] = 7;
        assert_eq!(foreign(&image, &parts(&volume)), Some(2 * BLOCK_BYTES));
        assert_eq!(
            foreign(&image, &[ReadPart::Hole(3 * BLOCK_BYTES as u32)]),
            None
        );
    }
}
