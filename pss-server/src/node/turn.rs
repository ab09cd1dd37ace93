//! The node thread: a loop whose every turn takes what has come in, lets the engine work on all of it
//! together, and sends what comes of it with one write per connection.
//!
//! Within a turn, what keeps the cell alive goes first: datagrams (heartbeats, leases, acknowledgements)
//! and reports of other threads before the bulk on TCP, of which a turn takes only so much.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mio::net::{TcpListener, UdpSocket};
use mio::{Events, Poll, Token};
use pss_core::engine::{Engine, ScrubPosition};
use pss_core::members::Members;
use pss_core::paxos::message::Message;
use pss_core::time::Instant;
use pss_core::types::{Incarnation, ServerId, Slot};
use pss_core::wire::auth::MacKey;
use pss_core::wire::client::ServerStatus;
use pss_core::wire::peer::Datagrams;
use pss_gateway::throttle::Throttle;

use crate::clock;
use crate::config::ServerConfig;
use crate::node::ServerError;
use crate::node::connections::{Connections, Kind};
use crate::node::datagrams::Batch;
use crate::node::inbox::{Event, Inbox};
use crate::node::space::SpaceWatch;
use crate::peers::Peers;
use crate::storage::{LogJob, ScrubJob, StorageThreads};

pub(super) const WAKER: Token = Token(0);
pub(super) const UDP: Token = Token(1);
pub(super) const LISTENER: Token = Token(2);
/// Connections have the tokens from here on.
pub(super) const FIRST_CONNECTION: usize = 3;

/// Reports of the kernel that a turn takes; the others wait for the next.
const EVENTS_MAX: usize = 256;
/// How often connections and the disk's size are looked at.
const CHORES: Duration = Duration::from_secs(1);
/// A caller that has not proved who it is by then is sent away.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is noted where the scrub is, if that has moved.
const SCRUB_NOTES: Duration = Duration::from_secs(10);
/// How long a stopping leader tries to hand over.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a server that has handed over goes on, at most, until it knows the new leader: it sends its
/// clients there.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often a stopping server looks how far it is.
const STOPPING_TICK: Duration = Duration::from_millis(5);

/// Everything that the kernel reports on.
pub(super) struct Sockets {
    pub(super) poll: Poll,
    pub(super) udp: UdpSocket,
    pub(super) listener: TcpListener,
}

/// What [`super::start`] has put together.
pub(super) struct NodeParts {
    pub(super) sockets: Sockets,
    pub(super) inbox: Arc<Inbox>,
    pub(super) engine: Engine,
    pub(super) datagrams: Datagrams,
    pub(super) key: Option<MacKey>,
    pub(super) incarnation: Incarnation,
    pub(super) boot: u64,
    pub(super) threads: StorageThreads,
    pub(super) chosen: Arc<AtomicU64>,
}

/// The node thread's state.
pub(super) struct Node {
    pub(super) config: ServerConfig,
    pub(super) sockets: Sockets,
    pub(super) inbox: Arc<Inbox>,
    pub(super) engine: Engine,
    pub(super) key: Option<MacKey>,
    pub(super) incarnation: Incarnation,
    pub(super) boot: u64,
    pub(super) threads: StorageThreads,
    chosen: Arc<AtomicU64>,
    pub(super) started: Instant,

    // Coming in.
    pub(super) udp_readable: bool,
    pub(super) accept_ready: bool,
    /// The kernel had no more descriptors: not before this moment again.
    pub(super) accept_at: Instant,
    pub(super) batch: Batch,
    pub(super) connections: Connections,
    /// Connections that have something to read, in turn.
    pub(super) ready: VecDeque<usize>,
    pub(super) peers: Peers,
    /// Epoch and version of the servers that `peers` follow.
    members: Option<(u64, u64)>,
    events: Vec<Event>,

    // Going out.
    pub(super) datagrams: Datagrams,
    pub(super) datagram: Vec<u8>,
    pub(super) outbox: Vec<(ServerId, Message)>,
    /// Connections that have something to send.
    pub(super) dirty: Vec<usize>,
    pub(super) log_jobs: Vec<LogJob>,

    pub(super) bad_datagrams: Throttle,
    pub(super) bad_callers: Throttle,
    chores_at: Instant,
    stopping: Option<Stopping>,
    /// It was logged that the disk is too full to apply what is chosen.
    stalled: bool,
    space: SpaceWatch,
    /// The log was trimmed up to this slot.
    trimmed: Slot,
    free_bytes: u64,
    total_bytes: u64,
    /// Where the scrub was when that was noted, and when.
    scrubbed: ScrubPosition,
    scrub_noted_at: Instant,
}

/// How far a server is that stops cleanly.
#[derive(Clone, Copy, Debug)]
enum Stopping {
    HandingOver { until: Instant },
    Leaving { until: Instant },
}

/// Whether the loop goes on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flow {
    GoOn,
    /// Stop after what is to be sent has been sent.
    Finish,
    /// Stop here.
    Crash,
}

impl Node {
    pub(super) fn new(config: ServerConfig, parts: NodeParts, now: Instant) -> Node {
        Node {
            peers: Peers::new(&config.servers, config.id, now),
            members: None,
            config,
            sockets: parts.sockets,
            inbox: parts.inbox,
            engine: parts.engine,
            key: parts.key,
            incarnation: parts.incarnation,
            boot: parts.boot,
            threads: parts.threads,
            chosen: parts.chosen,
            started: now,
            udp_readable: true,
            accept_ready: true,
            accept_at: now,
            batch: Batch::new(),
            connections: Connections::default(),
            ready: VecDeque::new(),
            events: Vec::new(),
            datagrams: parts.datagrams,
            datagram: Vec::new(),
            outbox: Vec::new(),
            dirty: Vec::new(),
            log_jobs: Vec::new(),
            bad_datagrams: Throttle::default(),
            bad_callers: Throttle::default(),
            chores_at: now + CHORES,
            stopping: None,
            stalled: false,
            space: SpaceWatch::default(),
            trimmed: Slot(0),
            free_bytes: 0,
            total_bytes: 0,
            scrubbed: ScrubPosition::default(),
            scrub_noted_at: now,
        }
    }

    /// Runs until the server stops.
    pub(super) fn run(mut self) -> Result<(), ServerError> {
        let mut reports = Events::with_capacity(EVENTS_MAX);
        // What the engine wants from the start.
        self.carry_out(clock::now());
        self.send();
        let flow = loop {
            let patience = self.patience();
            match self.sockets.poll.poll(&mut reports, Some(patience)) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(ServerError::Poll(error));
                }
                _ => {}
            }
            match self.turn(&reports)? {
                Flow::GoOn => {}
                flow => break flow,
            }
        };
        if flow == Flow::Finish {
            tracing::info!("stops");
            self.threads.finish();
        }
        Ok(())
    }

    /// How long to wait for something to happen.
    fn patience(&self) -> Duration {
        let now = clock::now();
        let more = !self.ready.is_empty()
            || self.engine.has_chosen()
            || self.udp_readable
            || (self.accept_ready && now >= self.accept_at && self.connections.has_room());
        if more || !self.inbox.sleep() {
            return Duration::ZERO;
        }
        let mut next = self.engine.poll_timeout().min(self.chores_at);
        if let Some(at) = self.peers.next_at() {
            next = next.min(at);
        }
        if self.stopping.is_some() {
            next = next.min(now + STOPPING_TICK);
        }
        next.since(now)
    }

    fn turn(&mut self, reports: &Events) -> Result<Flow, ServerError> {
        let now = clock::now();
        self.engine.set_wall_clock(clock::unix_ms());
        for report in reports {
            self.note(now, report);
        }
        let now = self.receive_datagrams(now);
        let flow = self.handle_events(now)?;
        if flow == Flow::Crash {
            return Ok(flow);
        }
        self.accept(now);
        self.serve_ready(now);
        self.timers(now);
        self.engine.finish_batch(now);
        self.carry_out(now);
        if self.engine.has_chosen() {
            // The other servers and our log need not wait until it is applied.
            self.send();
            self.engine.apply_chosen(now);
            self.carry_out(now);
        }
        self.follow_members(now);
        self.finish_reads();
        let flow = self.stop_if_done(now);
        self.send();
        if let Some(failure) = self.engine.failure() {
            return Err(ServerError::Apply(super::explain(failure)));
        }
        if let Some(blocks) = self.engine.gives_up() {
            return Err(ServerError::BadDisk {
                blocks,
                path: self.config.path.display().to_string(),
                server: self.config.id,
            });
        }
        // Behind the jobs whose entries it may speak of: the log thread relies on it.
        self.chosen
            .store(self.engine.replica().chosen().0, Ordering::Release);
        Ok(flow)
    }

    /// Servers may have come, gone or moved.
    fn follow_members(&mut self, now: Instant) {
        let Some(members) = self.engine.state().members() else {
            return;
        };
        let change = (members.epoch, members.version);
        if self.members == Some(change) {
            return;
        }
        self.members = Some(change);
        let own = self.config.id;
        self.peers.follow(members, own, now);
        match members.get(own) {
            Some(_) => tracing::info!("the servers of the cell: {members}"),
            None => tracing::warn!(
                "this server is none of the cell's any more ({members}): stop it, and take it out of server.conf"
            ),
        }
        for line in stale_lines(&self.config.servers.ids(), members, own) {
            tracing::warn!("{line}");
        }
    }

    /// Answers the reads that are done.
    fn finish_reads(&mut self) {
        if self.engine.has_finished_reads() {
            // The lease must hold after the data were read.
            let now = clock::now();
            self.engine.finish_reads(now);
            self.carry_out(now);
        }
    }

    /// Answers the reads that are done in the middle of a turn. Requests before them may have proposed
    /// something, which does not wait for the end of the turn either.
    pub(super) fn answer_reads(&mut self, now: Instant) {
        self.engine.finish_batch(now);
        self.carry_out(now);
        self.finish_reads();
        self.send();
    }

    /// Notes what the kernel reports.
    fn note(&mut self, now: Instant, report: &mio::event::Event) {
        match report.token() {
            WAKER => {}
            UDP => self.udp_readable = true,
            LISTENER => self.accept_ready = true,
            Token(token) => self.note_connection(now, token - FIRST_CONNECTION, report),
        }
    }

    /// Takes what the other threads have reported.
    fn handle_events(&mut self, now: Instant) -> Result<Flow, ServerError> {
        let mut events = std::mem::take(&mut self.events);
        self.inbox.take(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Persisted(write) => self.engine.handle_persisted(now, write),
                Event::LogRead { to, tail_for, read } => {
                    self.engine.handle_log_read(now, to, tail_for, read);
                }
                Event::Read { read, result } => self.engine.handle_read(now, read, result),
                Event::Exported { export, exported } => {
                    self.engine.handle_exported(now, export, exported);
                }
                Event::Digested { job, part } => self.engine.handle_digested(now, job, part),
                Event::EntriesRead {
                    client,
                    tag,
                    entries,
                } => self.entries_read(now, client, tag, entries),
                Event::Inspected {
                    client,
                    tag,
                    inspection,
                } => self.engine.answer_inspection(client, tag, inspection),
                Event::BaseStored => self.engine.handle_base_stored(now),
                Event::CheckpointDone(slot) => self.checkpoint_done(slot),
                Event::Space {
                    log_bytes,
                    free_bytes,
                    total_bytes,
                    log_first,
                } => {
                    (self.free_bytes, self.total_bytes) = (free_bytes, total_bytes);
                    self.engine.note_storage(free_bytes, log_first, log_bytes);
                    let left_bytes = self.engine.space_left();
                    self.space.note(left_bytes, total_bytes, &self.config.path);
                }
                Event::Failed(error) => return Err(error),
                Event::Stop => self.stop(now),
                Event::StopNow => return Ok(Flow::Crash),
                Event::Status(answer) => {
                    // Who asked may have lost patience.
                    let _ = answer.try_send(self.status(now));
                }
            }
        }
        self.events = events;
        Ok(Flow::GoOn)
    }

    fn checkpoint_done(&mut self, slot: Slot) {
        tracing::debug!(slot = slot.0, "checkpoint");
        self.engine.handle_checkpoint_done(slot);
        self.trim();
    }

    /// Has the log trimmed if more of it is not needed any more.
    fn trim(&mut self) {
        let slot = self.engine.trim_slot();
        if slot > self.trimmed {
            self.trimmed = slot;
            self.log_jobs.push(LogJob::Trim(slot));
        }
    }

    fn timers(&mut self, now: Instant) {
        if now >= self.engine.poll_timeout() {
            self.engine.handle_timeout(now);
        }
        self.call_peers(now);
        if now >= self.chores_at {
            self.chores_at = now + CHORES;
            self.close_slow_callers(now);
            self.log_stall();
            self.note_scrub(now);
            self.trim();
        }
    }

    /// Has the place noted where the scrub is, if it has moved.
    fn note_scrub(&mut self, now: Instant) {
        let position = self.engine.scrub_position();
        if position != self.scrubbed && now >= self.scrub_noted_at + SCRUB_NOTES {
            (self.scrubbed, self.scrub_noted_at) = (position, now);
            self.threads.digest(ScrubJob::Note(position));
        }
    }

    fn log_stall(&mut self) {
        let stalled = self.engine.is_stalled();
        match (self.stalled, stalled) {
            (false, true) => tracing::error!(
                "the disk is full: what was written cannot be put in its place, and this server falls \
                 behind; free some space on {}",
                self.config.path.display()
            ),
            (true, false) => tracing::info!("there is space on the disk again"),
            _ => {}
        }
        self.stalled = stalled;
    }

    fn close_slow_callers(&mut self, now: Instant) {
        let slow = self.connections.iter().filter(|(_, slot)| {
            matches!(slot.kind, Kind::Caller(_)) && now.since(slot.opened) >= HANDSHAKE_TIMEOUT
        });
        let slow: Vec<usize> = slow.map(|(place, _)| place).collect();
        for place in slow {
            self.close(now, place, &super::receive::ConnectionError::Silent);
        }
    }

    /// Where the server stands, with what only we know.
    pub(super) fn status(&self, now: Instant) -> ServerStatus {
        let mut status = self.engine.status(now);
        self.complete_status(now, &mut status);
        status
    }

    pub(super) fn complete_status(&self, now: Instant, status: &mut ServerStatus) {
        status.cell = self.config.cell.to_string();
        status.pid = std::process::id();
        status.uptime_s = now.since(self.started).as_secs();
        status.free_bytes = self.free_bytes;
        status.total_bytes = self.total_bytes;
        status.clients = self.connections.clients() as u32;
        let peers = self.peers.views().map(|(server, _)| server);
        let twice = |server: &ServerId| self.peers.is_claimed_twice(now, *server);
        status.claimed_twice = peers.filter(twice).collect();
    }

    /// Begins to stop cleanly.
    pub(super) fn stop(&mut self, now: Instant) {
        if self.stopping.is_none() {
            self.stopping = Some(Stopping::HandingOver {
                until: now + HAND_OVER_TIMEOUT,
            });
        }
    }

    fn stop_if_done(&mut self, now: Instant) -> Flow {
        if let Some(Stopping::HandingOver { until }) = self.stopping {
            let led = self.engine.replica().leader() == Some(self.config.id);
            if !led {
                return Flow::Finish;
            }
            let nobody = !self.anyone_could_lead(now);
            if nobody || now >= until || !self.engine.hand_over(now) {
                self.stopping = Some(Stopping::Leaving {
                    until: now + LEAVE_TIMEOUT,
                });
            }
            self.carry_out(now);
        }
        match self.stopping {
            Some(Stopping::Leaving { until }) => {
                let replica = self.engine.replica();
                let successor = replica
                    .leader()
                    .is_some_and(|leader| leader != replica.id());
                let done = successor || now >= until || !self.anyone_could_lead(now);
                if done { Flow::Finish } else { Flow::GoOn }
            }
            _ => Flow::GoOn,
        }
    }

    /// Whether another core server was heard of lately.
    fn anyone_could_lead(&self, now: Instant) -> bool {
        let lately = self.config.tuning.lease * 2;
        let mut others = self.engine.replica().peers();
        others.any(|(server, peer)| {
            server.is_core() && peer.heard.is_some_and(|heard| now.since(heard) < lately)
        })
    }
}
/// What server.conf here says that is not so any more.
fn stale_lines(listed: &[ServerId], members: &Members, own: ServerId) -> Vec<String> {
    let missing = members.list.iter().map(|it| it.id);
    let missing = missing.filter(|id| !listed.contains(id)).map(|id| {
        format!(
            "server {id} belongs to the cell and is not in this server's server.conf: add its line"
        )
    });
    let gone = listed
        .iter()
        .filter(|id| **id != own && members.get(**id).is_none());
    let gone = gone.map(|id| {
        format!("server {id} is in this server's server.conf and does not belong to the cell: take its line out")
    });
    missing.chain(gone).collect()
}
