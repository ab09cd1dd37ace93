//! The running server: an engine, its sockets and its disk.
//!
//! * `turn` — the node thread: one turn of the loop takes what has come in, lets the engine work and
//!   sends what comes of it
//! * `connection`, `connections`, `datagrams` — its sockets
//! * `inspect` — what it tells of its inside
//! * `inbox` — what the other threads ([`crate::storage`]) report to it
//!
//! Several servers can run in one process.

mod connection;
mod connections;
mod datagrams;
pub(crate) mod inbox;
mod inspect;
mod receive;
mod send;
pub(crate) mod space;
mod start;
mod turn;

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pss_core::chunk::ChunkError;
use pss_core::disk::{Disk, is_full};
use pss_core::log::LogError;
use pss_core::members::Members;
use pss_core::storage::{Identity, IdentityFacts, PairError, StorageError};
use pss_core::types::{EntryId, Marks, ServerId, Slot};
use pss_core::wire::client::ServerStatus;

use crate::config::ServerConfig;
use crate::node::inbox::{Event, Inbox};

/// How long [`ServerHandle::status`] waits for an answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// A PSS server.
pub struct Server;

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The server is not in its own list.
    #[error("server {0} is not listed among the servers of its cell")]
    NotListed(ServerId),
    /// Others can reach the address, and there is no key.
    #[error(
        "{0}: other machines can reach this address, and the cell has no key: make one with 'pss key new', or use a loopback address"
    )]
    NoKey(SocketAddr),
    /// The data directory cannot be used.
    #[error("{path}: cannot use the data directory: {}", explain(source))]
    Directory {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The files in it cannot be used.
    #[error("{path}: {}", explain(source.as_ref()))]
    Storage {
        /// The data directory.
        path: String,
        /// Why.
        source: Box<StorageError>,
    },
    /// What was chosen cannot be applied because the disk is full.
    #[error(
        "{path}: the disk is full, and what was written before cannot be put in its place; free some space and start again"
    )]
    Full {
        /// The data directory.
        path: String,
    },
    /// An address is taken, or not ours.
    #[error(
        "{protocol} {address}: cannot listen: {source}; is another server running there, and is it an address of this machine?"
    )]
    Listen {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The operating system refuses something else.
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why a server stopped. After a failed write of the log or the chunks it is open what is on the disk:
/// a new start reads it.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The log.
    #[error("the log cannot be written, so this server stops: {}", explain(.0))]
    Log(#[from] LogError),
    /// The promise or the checkpoint.
    #[error("identity or checkpoint cannot be written, so this server stops: {}", explain(.0))]
    Pair(#[from] PairError),
    /// The chunks.
    #[error("chunks cannot be written, so this server stops: {}", explain(.0))]
    Chunks(#[from] ChunkError),
    /// What is chosen cannot be applied.
    #[error("what was chosen cannot be applied, so this server stops: {0}")]
    Apply(String),
    /// So many blocks are damaged that the others cannot be trusted either.
    #[error(
        "{path}: {blocks} damaged blocks were found within an hour, so this server stops: its disk cannot be trusted; replace \
         the disk, then make the directory anew with 'pssd format --replace' for server {server}: it gets everything back from the others"
    )]
    BadDisk {
        /// How many.
        blocks: usize,
        /// The data directory.
        path: String,
        /// Whose.
        server: ServerId,
    },
    /// The free space of the disk cannot be read.
    #[error("the free space of the disk cannot be read, so this server stops: {0}")]
    Space(#[source] io::Error),
    /// Waiting for the sockets.
    #[error("waiting for the network failed: {0}")]
    Poll(#[source] io::Error),
    /// There is a bug: the server stops before it can do harm.
    #[error("the {thread} thread of the server has panicked; this is a bug, please report it")]
    Panicked {
        /// Which thread.
        thread: &'static str,
    },
}

/// An error with its causes, and what to do if the disk is full.
fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let is_full_disk = |error: &(dyn std::error::Error + 'static)| {
        error.downcast_ref::<io::Error>().is_some_and(is_full)
    };
    let mut text = error.to_string();
    let mut full = is_full_disk(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        full |= is_full_disk(error);
        cause = error.source();
    }
    if full {
        text.push_str("; the disk is full: free some space on it, then start the server again");
    }
    text
}

/// What a server holds that does not run.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) facts: IdentityFacts,
    /// Last entry of its log.
    pub(crate) last: EntryId,
    pub(crate) applied: Slot,
    /// Up to here its log was durable before it was damaged.
    pub(crate) claimed: Slot,
    /// Chunks are missing.
    pub(crate) installing: bool,
    /// The last list of servers in its log.
    pub(crate) members: Option<Members>,
    /// What it has seen of others.
    pub(crate) marks: Marks,
}

/// A running server. Dropping it leaves the server running.
pub struct ServerHandle {
    id: ServerId,
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<Result<(), ServerError>>>>,
}

impl Server {
    /// Starts a server on the files in `config.path`, which `pssd format` has made.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(config: ServerConfig) -> Result<ServerHandle, StartError> {
        start::start(config)
    }

    /// Starts a server on another disk; `config.path` only names it.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_with_disk(
        config: ServerConfig,
        disk: Arc<dyn Disk>,
    ) -> Result<ServerHandle, StartError> {
        start::start_with_disk(config, disk)
    }
}

impl Server {
    /// What a server holds that does not run.
    pub(crate) fn look(config: &ServerConfig) -> Result<Held, StartError> {
        start::look(config)
    }

    /// The identity of a server that does not run. While it is held, none can be started.
    pub(crate) fn identity(config: &ServerConfig) -> Result<Identity, StartError> {
        start::identity(config)
    }
}

impl ServerHandle {
    /// Which server it is.
    pub fn id(&self) -> ServerId {
        self.id
    }

    /// Asks it to hand its leadership over, if it has it, and then to stop. Returns at once;
    /// the server takes two seconds at most.
    pub fn stop(&self) {
        self.inbox.push(Event::Stop);
    }

    /// Makes it stop at once, as if the process had been killed: nothing is handed over, written or
    /// answered any more.
    pub fn stop_now(&self) {
        self.inbox.push(Event::StopNow);
    }

    /// Waits until it has stopped and its ports and files are free. If several wait, one gets the
    /// error.
    ///
    /// # Errors
    /// [`ServerError`] if it was not asked to stop.
    pub fn wait(&self) -> Result<(), ServerError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(ServerError::Panicked { thread: "node" }),
        }
    }

    /// Where it stands; none if it has stopped.
    pub fn status(&self) -> Option<ServerStatus> {
        let (answer, status) = sync_channel(1);
        self.inbox.push(Event::Status(answer));
        status.recv_timeout(STATUS_TIMEOUT).ok()
    }
}
