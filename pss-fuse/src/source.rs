//! Questions to the cell, each with an end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pss_core::client::{Cell, ClientError, Freshness, Nearest};
use pss_core::types::{ChunkIndex, ServerId, VolumeId};
use pss_core::volume::device::{Extent, ReadPart};
use pss_core::wire::client::{Browse, ChunkStatus, ReplyBody, ServerStatus, VolumeStatus};
use tracing::{error, info};

use crate::error::FsError;

/// How long a question waits after one that found nobody: who lists a directory while the servers are away must not
/// wait as often as the directory has entries.
const TIMEOUT_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Which server is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Consistency {
    /// The leader: the answer holds everything that was written before the question.
    Linearizable,
    /// The nearest: the answer may lack what was written last.
    Stale,
}

/// A cell as the namespace asks it.
pub struct Source {
    cell: Arc<Cell>,
    nearest: Option<Nearest>,
    timeout: Duration,
    /// Whether the last question found nobody.
    is_away: AtomicBool,
}

impl Source {
    /// Questions get an answer or an error within `timeout`.
    pub fn new(cell: Arc<Cell>, consistency: Consistency, timeout: Duration) -> Source {
        Source {
            nearest: (consistency == Consistency::Stale).then(|| cell.nearest()),
            cell,
            timeout,
            is_away: AtomicBool::new(false),
        }
    }

    /// All volumes.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeStatus>, FsError> {
        match self.ask(Browse::Volumes).await? {
            ReplyBody::Volumes(volumes) => Ok(volumes),
            other => Err(unexpected(&other)),
        }
    }

    /// The volume's directories in which chunks are: numbers of chunks divided by 256, ascending.
    pub(crate) async fn directories(&self, volume: VolumeId) -> Result<Vec<u32>, FsError> {
        match self.ask(Browse::Directories { volume }).await? {
            ReplyBody::Directories(directories) => Ok(directories),
            other => Err(unexpected(&other)),
        }
    }

    /// The volume's chunks of the range that exist.
    pub(crate) async fn chunks(
        &self,
        volume: VolumeId,
        range: std::ops::Range<u32>,
    ) -> Result<Vec<ChunkStatus>, FsError> {
        let mut all = Vec::new();
        let mut from = ChunkIndex(range.start);
        loop {
            let until = ChunkIndex(range.end);
            let what = Browse::Chunks {
                volume,
                from,
                until,
            };
            let (chunks, next) = match self.ask(what).await? {
                ReplyBody::Chunks { chunks, next } => (chunks, next),
                other => return Err(unexpected(&other)),
            };
            all.extend(chunks);
            match next {
                Some(next) if next > from => from = next,
                _ => return Ok(all),
            }
        }
    }

    /// At most [`pss_core::wire::client::REQUEST_BYTES_MAX`] bytes of a volume.
    pub(crate) async fn read(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        length_bytes: u32,
    ) -> Result<Vec<ReadPart>, FsError> {
        let what = Browse::Read {
            volume,
            offset_bytes,
            length_bytes,
        };
        match self.ask(what).await? {
            ReplyBody::Data(parts) => Ok(parts),
            other => Err(unexpected(&other)),
        }
    }

    /// Extents from the start of the range, maybe not to its end.
    pub(crate) async fn extents(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<Vec<Extent>, FsError> {
        let what = Browse::Extents {
            volume,
            offset_bytes,
            length_bytes,
        };
        match self.ask(what).await? {
            ReplyBody::Extents(extents) => Ok(extents),
            other => Err(unexpected(&other)),
        }
    }

    /// Where the servers stand that answer.
    pub(crate) async fn statuses(&self) -> Vec<ServerStatus> {
        let answers = self.cell.status_all().await;
        answers
            .into_iter()
            .filter_map(|(_, answer)| answer.ok())
            .collect()
    }

    /// How far the server that answers may be behind; none for answers that are never behind.
    ///
    /// # Errors
    /// [`FsError::NoMajority`] and the like if no server answers.
    pub async fn freshness(&self) -> Result<Option<Freshness>, FsError> {
        match &self.nearest {
            None => Ok(None),
            Some(nearest) => match nearest.freshness().await {
                Ok(freshness) => Ok(Some(freshness)),
                Err(error) => Err(self.fail(error, self.timeout)),
            },
        }
    }

    /// Ends the session.
    pub async fn close(&self) {
        self.cell.close().await;
    }

    async fn ask(&self, what: Browse) -> Result<ReplyBody, FsError> {
        let limit = match self.is_away.load(Ordering::Relaxed) {
            true => TIMEOUT_AFTER_FAILURE.min(self.timeout),
            false => self.timeout,
        };
        let answer = async {
            match &self.nearest {
                Some(nearest) => nearest.browse(what).await,
                None => self.cell.browse(what).await,
            }
        };
        let error = match tokio::time::timeout(limit, answer).await {
            Ok(Ok(body)) => {
                self.note(None);
                return Ok(body);
            }
            Ok(Err(error)) => error,
            Err(_) => self.cell.unavailable(),
        };
        let error = self.fail(error, limit);
        self.note(error.is_outage().then_some(&error));
        Err(error)
    }

    fn fail(&self, error: ClientError, limit: Duration) -> FsError {
        FsError::from_client(error, &self.servers(), limit)
    }

    fn servers(&self) -> Vec<ServerId> {
        self.cell.servers()
    }

    /// Says once that the cell is away, and once that it is back.
    fn note(&self, outage: Option<&FsError>) {
        let was_away = self.is_away.swap(outage.is_some(), Ordering::Relaxed);
        match outage {
            Some(error) if !was_away => error!(%error, "the cell cannot be read"),
            None if was_away => info!("the cell can be read again"),
            _ => {}
        }
    }
}

fn unexpected(body: &ReplyBody) -> FsError {
    let kind = match body {
        ReplyBody::Done => "done",
        ReplyBody::Session(_) => "a session",
        ReplyBody::Data(_) => "data",
        ReplyBody::Extents(_) => "extents",
        ReplyBody::Directories(_) => "directories",
        ReplyBody::Chunks { .. } => "chunks",
        ReplyBody::Volumes(_) => "volumes",
        ReplyBody::VolumeCreated(_) | ReplyBody::Volume { .. } => "a volume",
        ReplyBody::Status(_) => "a status",
        ReplyBody::Reservations(_) => "reservations",
    };
    FsError::Unexpected(kind.to_owned())
}
