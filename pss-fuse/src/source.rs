//! Questions to the cell, each with an end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pss_core::client::{Cell, ClientError, Freshness, Nearest};
use pss_core::types::{ChunkIndex, VolumeId};
use pss_core::volume::device::{Extent, ReadPart};
use pss_core::wire::client::{Browse, ChunkStatus, ReplyBody, ServerStatus, VolumeStatus};
use tracing::{error, info};

use crate::error::FsError;

/// How long questions wait after one that found nobody: who lists a directory while the servers are away must not
/// wait as often as the directory has entries. Now and then one still waits for the whole time, for the servers may be
/// slow, not away.
const TIMEOUT_AFTER_FAILURE: Duration = Duration::from_secs(1);
/// So many times the whole time pass between two that wait for it.
const PATIENT_EVERY: u32 = 4;

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
    /// If the last question found nobody: when one that was given the whole time last began, or ended in vain.
    away: Mutex<Option<Instant>>,
}

impl Source {
    /// Questions get an answer or an error within `timeout`.
    pub fn new(cell: Arc<Cell>, consistency: Consistency, timeout: Duration) -> Source {
        Source {
            nearest: (consistency == Consistency::Stale).then(|| cell.nearest()),
            cell,
            timeout,
            away: Mutex::default(),
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

    /// Where the servers stand that answer in time.
    pub(crate) async fn statuses(&self) -> Vec<ServerStatus> {
        let answers = tokio::time::timeout(self.timeout, self.cell.status_all()).await;
        answers
            .unwrap_or_default()
            .into_iter()
            .filter_map(|(_, answer)| answer.ok())
            .collect()
    }

    /// How far the answers may be behind that were given; none if they are never behind.
    pub async fn freshness(&self) -> Option<Freshness> {
        self.nearest.as_ref()?.freshness().await
    }

    /// How long an answer may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Ends the session.
    pub async fn close(&self) {
        self.cell.close().await;
    }

    async fn ask(&self, what: Browse) -> Result<ReplyBody, FsError> {
        let limit = self.limit();
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
            Ok(Err(error)) => self.fail(error, limit),
            Err(_) => match &self.nearest {
                // Nobody has asked for a leader, so nothing is known of the others.
                Some(_) => FsError::TimedOut(limit),
                None => self.fail(self.cell.unavailable(), limit),
            },
        };
        self.note(error.is_outage().then_some((&error, limit)));
        Err(error)
    }

    fn limit(&self) -> Duration {
        let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *away {
            None => self.timeout,
            Some(last) if last.elapsed() >= self.timeout * PATIENT_EVERY => {
                *last = Instant::now();
                self.timeout
            }
            Some(_) => TIMEOUT_AFTER_FAILURE.min(self.timeout),
        }
    }

    fn fail(&self, error: ClientError, limit: Duration) -> FsError {
        match (&self.nearest, error) {
            (Some(_), ClientError::Unavailable { silent, .. }) => {
                FsError::no_server(&silent, limit)
            }
            (_, error) => FsError::from_client(error, &self.cell.servers(), limit),
        }
    }

    /// Says once that the cell is away, and once that it is back.
    fn note(&self, outage: Option<(&FsError, Duration)>) {
        let was_away = {
            let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
            let was_away = away.is_some();
            *away = outage.map(|(_, waited)| match *away {
                Some(last) if waited < self.timeout => last,
                _ => Instant::now(),
            });
            was_away
        };
        match outage {
            Some((error, _)) if !was_away => error!(%error, "the cell cannot be read"),
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
        ReplyBody::Events(_) => "events",
        ReplyBody::Reservations(_) => "reservations",
        ReplyBody::Inspection(_) => "an inspection",
    };
    FsError::Unexpected(kind.to_owned())
}
