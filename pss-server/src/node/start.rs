//! Puts a server together: files first, then sockets, then threads.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use mio::net::TcpListener;
use mio::{Interest, Poll, Waker};
use pss_core::disk::Disk;
use pss_core::disk::files::FileDisk;
use pss_core::engine::{Engine, EngineConfig, SESSION_LEASE};
use pss_core::entry::{Entry, Op};
use pss_core::log::LogParams;
use pss_core::members::Members;
use pss_core::paxos::quorum::Membership;
use pss_core::paxos::{self, Recovered};
use pss_core::storage::{Identity, Storage, StorageError, StorageParams};
use pss_core::types::{EntryId, Incarnation, Marks, Slot};
use pss_core::wire::auth::MacKey;
use pss_core::wire::peer::Datagrams;
use pss_gateway::program;
use socket2::{Domain, Protocol, Socket, Type};

use crate::clock;
use crate::config::{ServerConfig, Tuning};
use crate::node::inbox::Inbox;
use crate::node::turn::{LISTENER, Node, NodeParts, Sockets, UDP, WAKER};
use crate::node::{Held, ServerHandle, StartError, datagrams};
use crate::storage::{Parts, StorageThreads, read_scrub_position};
use crate::testing;

/// Bytes that stay free on the disk beside what the log may still grow to: chunk tables, checkpoint
/// and what the file system needs for itself.
const RESERVE_BYTES: u64 = 64 << 20;
/// A checkpoint is due when so many chunks have tables that are only in memory: 16 MiB of them with
/// chunks of the usual size, and about as many small writes.
const CHECKPOINT_CHUNKS: usize = 4096;
/// The log may hold so much more while chunks are being copied to this server.
const INSTALLING_LOG_BYTES: u64 = 4 << 30;
/// A turn applies about so much: a few milliseconds.
const APPLY_BYTES: usize = 8 << 20;
/// Callers that the kernel keeps until they are accepted.
const BACKLOG: i32 = 1024;

pub(super) fn start(config: ServerConfig) -> Result<ServerHandle, StartError> {
    let disk = open_disk(&config)?;
    start_with_disk(config, testing::disk(disk))
}

fn open_disk(config: &ServerConfig) -> Result<Arc<dyn Disk>, StartError> {
    let path = &config.path;
    let unusable = |source| StartError::Directory {
        path: path.display().to_string(),
        source,
    };
    // `FileDisk` would make the directory; but one that does not exist is not formatted either, and
    // more likely a file system that is not mounted.
    std::fs::metadata(path).map_err(unusable)?;
    Ok(Arc::new(FileDisk::open(path).map_err(unusable)?))
}

/// The identity of a server that does not run, if it is that of the configuration.
pub(super) fn identity(config: &ServerConfig) -> Result<Identity, StartError> {
    identity_on(config, &open_disk(config)?)
}

fn identity_on(config: &ServerConfig, disk: &Arc<dyn Disk>) -> Result<Identity, StartError> {
    let failed = |source| StartError::Storage {
        path: config.path.display().to_string(),
        source: Box::new(source),
    };
    let identity = Identity::open(Arc::clone(disk)).map_err(|error| failed(error.into()))?;
    let facts = identity.facts();
    if facts.cell != config.cell.0 {
        return Err(failed(StorageError::OtherCell));
    }
    if facts.server != config.id {
        let (found, expected) = (facts.server, config.id);
        return Err(failed(StorageError::OtherServer { found, expected }));
    }
    Ok(identity)
}

/// What a server holds that does not run. Of one that has not got all data nothing but its identity is read.
pub(super) fn look(config: &ServerConfig) -> Result<Held, StartError> {
    let disk = open_disk(config)?;
    let facts = identity_on(config, &disk)?.facts();
    let mut held = Held {
        facts,
        last: EntryId::default(),
        applied: Slot(0),
        claimed: Slot(0),
        installing: false,
        members: None,
        marks: Marks::new(),
    };
    if facts.rejoining || facts.discards {
        return Ok(held);
    }
    let storage = open_storage(config, &disk)?;
    let lists = |entry: &Entry| {
        let mut ops = entry.commands.iter().rev().map(|it| &it.op);
        ops.find_map(|op| match op {
            Op::SetMembers { members } => Some(Arc::clone(members)),
            _ => None,
        })
    };
    let recovered = &storage.recovered;
    let newest = recovered.tail.iter().rev().find_map(lists);
    let members = newest.or(storage.state.members().cloned());
    let damaged = [recovered.evidence, recovered.doubt].into_iter().flatten();
    held.claimed = damaged.map(|it| it.slot).max().unwrap_or_default();
    held.last = storage.log.last();
    held.applied = storage.applied.slot;
    held.installing = storage.installing.is_some();
    held.members = members.map(|it| Members::clone(&it));
    held.marks = storage.marks;
    Ok(held)
}

pub(super) fn start_with_disk(
    config: ServerConfig,
    disk: Arc<dyn Disk>,
) -> Result<ServerHandle, StartError> {
    let span = tracing::info_span!("pssd", server = config.id.0);
    let entered = span.clone().entered();
    let addresses = addresses(&config)?;
    program::raise_file_limit();
    warn_of_old_kernel();
    let storage = open_storage(&config, &disk)?;
    let system = |action| move |source| StartError::System { action, source };
    let udp = datagrams::bind(addresses.udp).map_err(|source| StartError::Listen {
        protocol: "UDP",
        address: addresses.udp,
        source,
    })?;
    let listener = listen(addresses.tcp).map_err(|source| StartError::Listen {
        protocol: "TCP",
        address: addresses.tcp,
        source,
    })?;
    let poll = Poll::new().map_err(system("cannot make an epoll instance"))?;
    let mut sockets = Sockets {
        poll,
        udp,
        listener,
    };
    let waker = register(&mut sockets).map_err(system("cannot watch the sockets"))?;
    let inbox = Arc::new(Inbox::new(waker));

    let boot = random().map_err(system("no random numbers"))?;
    let facts = storage.identity.facts();
    let key = config.key.as_ref().map(MacKey::new);
    let datagrams = Datagrams::new(config.cell, config.id, facts.incarnation, boot, key.clone());
    let now = clock::now();
    let recovered = Recovered {
        promised: facts.promised,
        applied: storage.applied,
        tail: storage.recovered.tail,
        chosen: storage.applied.slot,
        evidence: storage.recovered.evidence,
        doubt: storage.recovered.doubt,
        log_first: storage.log.first_slot(),
        installing: storage.installing,
        rejoining: facts.rejoining,
        admitted: *storage.state.admitted(),
        members: storage.state.members().cloned(),
        marks: storage.marks,
    };
    let last = storage.log.last().slot;
    let seed = random().map_err(system("no random numbers"))?;
    let engine_config = engine_config(&config, facts.incarnation, seed);
    let chunks = Arc::clone(&storage.chunks);
    let mut engine = Engine::new(engine_config, recovered, storage.state, chunks, now);
    if let Some(source) = config.source {
        engine.prefer_source(source);
    }
    if config.is_truth {
        engine.stay_deaf();
    }
    engine.set_scrub(
        config.tuning.scrub_period,
        read_scrub_position(&config.path),
    );
    let chosen = Arc::new(AtomicU64::new(0));
    let parts = Parts {
        disk,
        log: storage.log,
        identity: storage.identity,
        checkpoint: storage.checkpoint,
        chunks: storage.chunks,
        chosen: Arc::clone(&chosen),
        log_bytes_max: log_bytes_max(&config.tuning),
        directory: config.path.clone(),
    };
    let threads =
        StorageThreads::start(parts, &inbox, &span).map_err(system("cannot start a thread"))?;
    tracing::info!(
        slot = last.0,
        incarnation = facts.incarnation.0,
        "server {} of cell {} runs at {}, data in {}",
        config.id,
        config.cell,
        addresses.tcp,
        config.path.display(),
    );
    let id = config.id;
    let node = Node::new(
        config,
        NodeParts {
            sockets,
            inbox: Arc::clone(&inbox),
            engine,
            datagrams,
            key,
            incarnation: facts.incarnation,
            boot,
            threads,
            chosen,
        },
        now,
    );
    drop(entered);
    let builder = std::thread::Builder::new().name("pssd-node".to_owned());
    let thread = builder
        .spawn(move || {
            let _span = span.entered();
            node.run()
        })
        .map_err(system("cannot start a thread"))?;
    Ok(ServerHandle {
        id,
        inbox,
        thread: Mutex::new(Some(thread)),
    })
}

/// The first kernel whose `syncfs` reports what could not be written back.
const REPORTING_KERNEL: (u32, u32) = (5, 8);

/// On older kernels a write that fails after the chunk's file was closed goes unnoticed.
fn warn_of_old_kernel() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if kernel_version(&release).is_some_and(|version| version < REPORTING_KERNEL) {
        let (major, minor) = REPORTING_KERNEL;
        tracing::warn!(
            "Linux {} does not report every write that the disk did not take; use {major}.{minor} or later",
            release.trim()
        );
    }
}

/// Major and minor number: the release begins with them.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|it: char| !it.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

struct Addresses {
    tcp: SocketAddr,
    udp: SocketAddr,
}

fn addresses(config: &ServerConfig) -> Result<Addresses, StartError> {
    let (Some(tcp), Some(udp)) = (config.servers.tcp(config.id), config.servers.udp(config.id))
    else {
        return Err(StartError::NotListed(config.id));
    };
    if config.key.is_none() && !tcp.ip().is_loopback() {
        return Err(StartError::NoKey(tcp));
    }
    Ok(Addresses { tcp, udp })
}

fn open_storage(config: &ServerConfig, disk: &Arc<dyn Disk>) -> Result<Storage, StartError> {
    let path = || config.path.display().to_string();
    let params = StorageParams {
        server: config.id,
        log: LogParams {
            segment_bytes: config.tuning.segment_bytes,
            retain_bytes: config.tuning.log_retain_bytes,
            // What one trim gives up: what was written between two checkpoints, and while one was made.
            spares_max: (config.tuning.checkpoint_bytes / config.tuning.segment_bytes) as usize + 2,
            ..LogParams::new(config.cell.0)
        },
        chunks: Default::default(),
    };
    let storage =
        Storage::open(Arc::clone(disk), &params).map_err(|source| StartError::Storage {
            path: path(),
            source: Box::new(source),
        })?;
    if storage.stalled.is_some() {
        return Err(StartError::Full { path: path() });
    }
    Ok(storage)
}

/// What the log takes at most: what is kept for others, what grows between two checkpoints and while
/// one is made, and the segments that are open or ready.
fn log_bytes_max(tuning: &Tuning) -> u64 {
    tuning.log_retain_bytes + tuning.checkpoint_bytes + 2 * tuning.segment_bytes
}

fn engine_config(config: &ServerConfig, incarnation: Incarnation, seed: u64) -> EngineConfig {
    let tuning = &config.tuning;
    EngineConfig {
        replica: paxos::Config {
            id: config.id,
            incarnation,
            members: Membership::new(config.servers.ids()),
            tuning: paxos::Tuning {
                lease: tuning.lease,
                heartbeat: tuning.lease / 5,
                election_spread: tuning.lease * 3 / 10,
                ..paxos::Tuning::default()
            },
            seed,
        },
        checkpoint_bytes: tuning.checkpoint_bytes,
        checkpoint_interval: tuning.checkpoint_interval,
        checkpoint_chunks: CHECKPOINT_CHUNKS,
        log_bytes_max: log_bytes_max(tuning) + INSTALLING_LOG_BYTES,
        apply_bytes: APPLY_BYTES,
        reserve_bytes: RESERVE_BYTES,
        session_lease: SESSION_LEASE,
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    // A server that is started again must not wait for its old connections to time out.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

fn register(sockets: &mut Sockets) -> io::Result<Waker> {
    let registry = sockets.poll.registry();
    let waker = Waker::new(registry, WAKER)?;
    registry.register(&mut sockets.udp, UDP, Interest::READABLE)?;
    registry.register(&mut sockets.listener, LISTENER, Interest::READABLE)?;
    Ok(waker)
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        assert_eq!(kernel_version("4.18.0-553.el8.x86_64\n"), Some((4, 18)));
        assert_eq!(kernel_version("5.8-rc1"), Some((5, 8)));
        assert_eq!(kernel_version("6.18.44-fc-v782\n"), Some((6, 18)));
        assert!(kernel_version("5.4.0") < Some(REPORTING_KERNEL));
        assert!(kernel_version("5.10.1") > Some(REPORTING_KERNEL));
        assert_eq!(kernel_version(""), None);
    }
}
