//! `pss volume import` and `export`: volumes from files and into files.
//!
//! Raw images go straight through a client of the cell; other formats through `qemu-img`, to which this process is
//! an NBD server meanwhile.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use pss_core::client::{Cell, ClientError};
use pss_core::size::parse_size;
use pss_core::types::VolumeId;
use pss_core::volume::device::ReadPart;
use pss_core::wire::client::{Browse, REQUEST_BYTES_MAX, ReplyBody, VolumeStatus};
use pss_gateway::progress::Progress;
use sha2::{Digest, Sha256};

use super::cell::{connect, explain};
use super::{CellArgs, CliError, Exit};
use crate::config::CellFiles;
use crate::render::printable;

mod export;
mod import;
mod qemu;

/// What is read, written and compared at once.
const PIECE_BYTES: usize = REQUEST_BYTES_MAX;
/// Pieces under way at a time.
const PIECES_MAX: usize = 8;

#[derive(Args, Debug)]
pub(super) struct ImportArgs {
    /// The image: raw, or qcow2 and others that qemu-img reads
    file: PathBuf,
    /// Name of the volume; it is created
    name: String,
    /// Format of the image, such as raw, qcow2 or vmdk [default: qcow2 if it begins like one, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Size of the volume's chunks [default: 4M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    chunk_size: Option<u64>,
    /// Go on with a volume that an interrupted import of this raw image has left
    #[arg(long)]
    resume: bool,
    /// Do not read the volume afterwards to compare it with the image
    #[arg(long)]
    no_verify: bool,
}

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    /// Name of the volume
    name: String,
    /// The file to write; it must not exist
    file: PathBuf,
    /// Format of the file: raw or qcow2 [default: qcow2 if its name ends so, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Go on with what an interrupted raw export has left, if the volume was not written to since
    #[arg(long)]
    resume: bool,
    /// Do not read the file afterwards to compare it with the volume
    #[arg(long)]
    no_verify: bool,
}

pub(super) use export::run as export;
pub(super) use import::run as import;

/// A client of the cell for many requests at a time.
struct Client {
    files: CellFiles,
    cell: Arc<Cell>,
}

impl Client {
    /// Runs something with a client, and ends its session.
    fn run<T, F>(args: &CellArgs, work: impl FnOnce(Arc<Client>) -> F) -> Result<T, CliError>
    where
        F: Future<Output = Result<T, CliError>>,
    {
        let files = args.read()?;
        // Files are read and written by one thread, answers are taken by another.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| CliError::new(Exit::Failed, error))?;
        runtime.block_on(async {
            let cell = connect(&files, "pss", args.timeout);
            let client = Arc::new(Client { files, cell });
            let result = work(Arc::clone(&client)).await;
            client.cell.close().await;
            result
        })
    }

    async fn explain(&self, error: ClientError) -> CliError {
        explain(&self.files, &self.cell, error).await
    }

    /// A volume by name, if there is one.
    async fn find(&self, name: &str) -> Result<Option<VolumeStatus>, CliError> {
        match self.cell.volumes().await {
            Ok(volumes) => Ok(volumes.into_iter().find(|it| it.volume.name == name)),
            Err(error) => Err(self.explain(error).await),
        }
    }

    async fn volume(&self, name: &str) -> Result<VolumeStatus, CliError> {
        let found = self.find(name).await?;
        found.ok_or_else(|| {
            let name = printable(name);
            let message = format!("there is no volume {name}; 'pss volume list' shows all");
            CliError::new(Exit::NotFound, message)
        })
    }

    /// At most [`PIECE_BYTES`] of a volume.
    async fn read(
        self: Arc<Self>,
        volume: VolumeId,
        offset_bytes: u64,
        length_bytes: u32,
    ) -> Result<Vec<ReadPart>, CliError> {
        let what = Browse::Read {
            volume,
            offset_bytes,
            length_bytes,
        };
        match self.cell.browse(what).await {
            Ok(ReplyBody::Data(parts)) => {
                let length: u64 = parts.iter().map(ReadPart::length_bytes).sum();
                match length == u64::from(length_bytes) {
                    true => Ok(parts),
                    false => Err(self.explain(ClientError::Unexpected).await),
                }
            }
            Ok(_) => Err(self.explain(ClientError::Unexpected).await),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// SHA-256 of a volume's data.
    async fn digest(
        self: &Arc<Self>,
        volume: VolumeId,
        size_bytes: u64,
        progress: &Progress,
    ) -> Result<String, CliError> {
        let mut digest = Sha256::new();
        let mut reads = Reads::new(Arc::clone(self), volume, 0, size_bytes);
        while let Some((_, parts)) = reads.next().await {
            for part in parts? {
                hash(&mut digest, &part);
                progress.advance(part.length_bytes());
            }
        }
        Ok(hex(digest))
    }
}

/// A range of a volume, piece by piece in order, with some read ahead.
struct Reads {
    client: Arc<Client>,
    volume: VolumeId,
    /// Of the next piece that is asked for.
    at: u64,
    end: u64,
    under_way: std::collections::VecDeque<(u64, Reading)>,
}

type Reading = tokio::task::JoinHandle<Result<Vec<ReadPart>, CliError>>;

impl Reads {
    fn new(client: Arc<Client>, volume: VolumeId, from: u64, end: u64) -> Reads {
        Reads {
            client,
            volume,
            at: from,
            end,
            under_way: Default::default(),
        }
    }

    /// The next piece with its position.
    async fn next(&mut self) -> Option<(u64, Result<Vec<ReadPart>, CliError>)> {
        while self.at < self.end && self.under_way.len() < PIECES_MAX {
            let length = (self.end - self.at).min(PIECE_BYTES as u64) as u32;
            let read = Arc::clone(&self.client).read(self.volume, self.at, length);
            self.under_way.push_back((self.at, tokio::spawn(read)));
            self.at += u64::from(length);
        }
        let (at, reading) = self.under_way.pop_front()?;
        Some((at, reading.await.expect("reading does not panic")))
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        for (_, reading) in &self.under_way {
            reading.abort();
        }
    }
}

/// Adds a part to a digest.
fn hash(digest: &mut Sha256, part: &ReadPart) {
    match part {
        ReadPart::Data(data) => digest.update(data),
        ReadPart::Hole(length) => hash_zeros(digest, u64::from(*length)),
    }
}

fn hash_zeros(digest: &mut Sha256, mut length: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while length > 0 {
        let now = length.min(ZEROS.len() as u64);
        digest.update(&ZEROS[..now as usize]);
        length -= now;
    }
}

fn hex(digest: Sha256) -> String {
    let digest = digest.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn failed(action: &str, path: &Path, error: &io::Error) -> CliError {
    CliError::new(
        Exit::Failed,
        format!("cannot {action} {}: {error}", path.display()),
    )
}
