//! What comes in: datagrams, callers, frames.

use std::io;
use std::time::Duration;

use mio::event::Event;
use mio::{Interest, Token};
use pss_core::entry::EntryError;
use pss_core::paxos::message::Message;
use pss_core::time::Instant;
use pss_core::types::ServerId;
use pss_core::wire::DecodeError;
use pss_core::wire::auth::{Handshake, HandshakeConfig, HandshakeError, NONCE_BYTES, Peer, Role};
use pss_core::wire::client::{ClientDecodeError, Reply, ReplyError, Request, RequestBody};
use pss_core::wire::frame::{Frame, FrameError, FrameKind, FrameLimits};
use pss_core::wire::peer::decode_frame;
use socket2::{SockRef, TcpKeepalive};

use crate::clients::{CLIENTS_MAX, ClientLoad};
use crate::clock;
use crate::node::connection::{Connection, Fill};
use crate::node::connections::{Kind, Slot};
use crate::node::turn::{FIRST_CONNECTION, Node};
use crate::peers::Claimed;

/// Bytes that a turn reads from one connection, about.
const CONNECTION_BYTES_PER_TURN: usize = 1 << 20;
/// Bytes that a turn reads from all connections, about: as many as are handled in a few milliseconds, so
/// that heartbeats are never late.
const BYTES_PER_TURN: usize = 4 << 20;
/// After this time nothing more is read in a turn: what was read before had to wait for the disk.
const TURN_TIME: Duration = Duration::from_millis(20);
/// Reads are answered when they have brought so much, not only at the end of a turn: the client sends it on
/// while more is read.
const READ_BYTES_PER_ANSWER: usize = 256 << 10;
/// When a client's reads have brought so much, its other requests wait for the next turn: a small request
/// can ask for much, and a client that takes it all must not make heartbeats late.
const READ_BYTES_PER_TURN: usize = 4 << 20;
/// Questions about the server's inside that a turn takes, of all clients: an answer may take milliseconds, and a thousand
/// clients may ask at once.
const INSPECTIONS_PER_TURN: usize = 2;
/// Callers that a turn accepts.
const ACCEPTS_PER_TURN: usize = 64;
/// After the kernel ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Batches of datagrams that a turn takes.
const DATAGRAM_BATCHES_PER_TURN: usize = 8;
/// A server that does not acknowledge what we send for this long is called again: after a partition TCP
/// would wait minutes before it tries.
const LINK_PATIENCE: Duration = Duration::from_secs(3);
/// Silent connections are probed after this time, so that those of dead machines end.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Why a connection is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("closed by the other end")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("malformed message: {0}")]
    Message(#[from] DecodeError),
    #[error("malformed request: {0}")]
    Request(#[from] ClientDecodeError),
    #[error("entry with damaged data: {0}")]
    Entry(#[from] EntryError),
    #[error("unexpected {0:?} frame")]
    Unexpected(FrameKind),
    #[error("server {0} is not listed, or has been replaced")]
    Outdated(ServerId),
    #[error("there are {CLIENTS_MAX} clients already")]
    TooManyClients,
    #[error("others call, and it did not say who it is")]
    Crowded,
    #[error("it did not say who it is in time")]
    Silent,
    #[error("no answer to the call")]
    NoAnswer,
}

impl ConnectionError {
    /// Whether it is part of a connection's usual life.
    fn is_usual(&self) -> bool {
        matches!(self, ConnectionError::Closed | ConnectionError::Io(_))
    }
}

/// What the requests of a connection have cost in a turn.
#[derive(Debug, Default)]
struct Cost {
    /// Bytes that reads have brought, and what other answers cost in comparison.
    answered: usize,
    /// What is taken from the bytes that the turn may read from all connections.
    of_turn: usize,
}

impl Cost {
    fn add_inspection(&mut self) {
        self.answered += READ_BYTES_PER_TURN / INSPECTIONS_PER_TURN;
        self.of_turn += BYTES_PER_TURN / INSPECTIONS_PER_TURN;
    }

    /// Whether the connection waits for the next turn.
    fn is_share_used(&self) -> bool {
        self.answered >= READ_BYTES_PER_TURN
    }
}

/// How much of its share of a turn a connection has used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Share {
    Left,
    /// All of it; there may be more requests.
    Used,
}

impl Node {
    /// Takes the datagrams that have come; returns the time of the last look at the clock.
    ///
    /// The clock is read after the datagrams were received: an answer to a heartbeat grants a lease
    /// from now on. With a moment from before, on a machine that was paused in between (a VM, a signal),
    /// the lease would have ended here before the leader counts it as begun.
    pub(super) fn receive_datagrams(&mut self, mut now: Instant) -> Instant {
        if !self.udp_readable {
            return now;
        }
        for _ in 0..DATAGRAM_BATCHES_PER_TURN {
            match self.batch.receive(&self.sockets.udp) {
                Ok(more) => self.udp_readable = more,
                Err(error) => {
                    // Errors of a UDP socket tell of datagrams that were sent; they are lost.
                    tracing::debug!("receiving datagrams: {error}");
                }
            }
            now = clock::now();
            self.handle_datagrams(now);
            if !self.udp_readable {
                break;
            }
        }
        now
    }

    /// Whether the agreement tells the lives of a server apart: then an old disk may learn that its place is taken. Otherwise
    /// nothing of an earlier life is taken.
    fn knows_lives_of(&self, server: ServerId) -> bool {
        self.engine.replica().admitted().of(server).0 > 0
    }

    fn handle_datagrams(&mut self, now: Instant) {
        let mut claimed_twice = None;
        for bytes in self.batch.iter() {
            match self.datagrams.decode(bytes) {
                Ok(datagram) => {
                    let known = self.peers.heard(now, datagram.from, datagram.incarnation)
                        || self.knows_lives_of(datagram.from);
                    let (from, life) = (datagram.from, datagram.incarnation);
                    let claimed = self.peers.note_process(now, from, life, datagram.boot);
                    if claimed == Claimed::TwiceToLog {
                        claimed_twice = Some(from);
                    }
                    let known = known && claimed == Claimed::Once;
                    self.peers
                        .count(datagram.from, |counts| counts.datagrams_received += 1);
                    if known {
                        self.engine.handle_message(
                            now,
                            datagram.from,
                            datagram.incarnation,
                            datagram.message,
                        );
                    }
                }
                Err(error) => {
                    if let Some(more) = self.bad_datagrams.admit(now) {
                        tracing::warn!(more, "a datagram was dropped: {error}");
                    }
                }
            }
        }
        if let Some(server) = claimed_twice {
            self.log_claimed_twice(server);
        }
    }

    fn log_claimed_twice(&self, server: ServerId) {
        let of_it = |place: &Slot| matches!(place.kind, Kind::Inbound(from, _) if from == server);
        let places = self.connections.iter().filter(|(_, place)| of_it(place));
        let mut from: Vec<String> = places
            .filter_map(|(_, place)| place.connection.socket().peer_addr().ok())
            .map(|address| address.ip().to_string())
            .collect();
        from.sort();
        from.dedup();
        let at = match from.is_empty() {
            true => String::new(),
            false => format!(" (connected from {})", from.join(" and ")),
        };
        tracing::error!(
            peer = server.0,
            "two processes say that they are server {server}{at}, with copies of one data directory: neither counts here until \
             one of them is stopped; if both shall run, format one of them for an id of its own"
        );
    }

    /// Lets callers in.
    pub(super) fn accept(&mut self, now: Instant) {
        if !self.accept_ready || now < self.accept_at {
            return;
        }
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.connections.has_room() {
                return;
            }
            match self.sockets.listener.accept() {
                Ok((stream, _)) => {
                    if let Some(place) = self.connections.surplus_caller() {
                        self.close(now, place, &ConnectionError::Crowded);
                    }
                    let config = self.handshake_config(None);
                    let Some(nonce) = nonce() else { continue };
                    let caller = Kind::Caller(Handshake::server(config, nonce));
                    self.add(now, Connection::new(stream, true), caller);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.accept_ready = false;
                    return;
                }
                // The caller has gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if let Some(more) = self.bad_callers.admit(now) {
                        tracing::warn!(more, "a connection could not be accepted: {error}");
                    }
                    self.accept_at = now + ACCEPT_PAUSE;
                    return;
                }
            }
        }
    }

    /// Calls servers that are not connected, and gives up calls that were not answered.
    pub(super) fn call_peers(&mut self, now: Instant) {
        if self.peers.next_at().is_none_or(|at| now < at) {
            return;
        }
        for place in self.peers.overdue(now) {
            self.close(now, place, &ConnectionError::NoAnswer);
        }
        for server in self.peers.due(now) {
            if let Err(error) = self.call(now, server) {
                self.peers.down(now, server, &error.to_string());
            }
        }
    }

    fn call(&mut self, now: Instant, server: ServerId) -> io::Result<()> {
        let address = self.peers.tcp(server).ok_or(io::ErrorKind::NotFound)?;
        let stream = mio::net::TcpStream::connect(address)?;
        let nonce = nonce().ok_or(io::ErrorKind::Other)?;
        let mut connection = Connection::new(stream, false);
        let config = self.handshake_config(Some(server));
        let handshake = Handshake::client(config, nonce, &mut connection.out);
        let place = self.connections.next_place();
        self.add(now, connection, Kind::Calling(server, handshake));
        self.peers.calling(now, server, place);
        Ok(())
    }

    fn handshake_config(&self, wanted: Option<ServerId>) -> HandshakeConfig {
        HandshakeConfig {
            cell: Some(self.config.cell),
            key: self.key.clone(),
            role: Role::Server {
                id: self.config.id,
                incarnation: self.incarnation,
                boot: self.boot,
            },
            wanted,
        }
    }

    fn add(&mut self, now: Instant, mut connection: Connection, kind: Kind) {
        let place = self.connections.next_place();
        if let Err(error) = prepare(&mut connection, &kind) {
            // It works without; only slower, or longer after the other end has died.
            tracing::debug!("options of a connection: {error}");
        }
        let token = Token(FIRST_CONNECTION + place);
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registered =
            self.sockets
                .poll
                .registry()
                .register(connection.stream(), token, interest);
        self.connections.insert(now, connection, kind);
        match registered {
            Ok(()) => self.make_ready(place),
            Err(error) => self.close(now, place, &error.into()),
        }
    }

    /// Notes what the kernel reports of a connection.
    pub(super) fn note_connection(&mut self, now: Instant, place: usize, report: &Event) {
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        slot.connection.note(report);
        if !slot.connected && slot.connection.is_writable() {
            match slot.connection.take_error() {
                Ok(()) => slot.connected = true,
                Err(error) => return self.close(now, place, &error.into()),
            }
        }
        if slot.connected && slot.connection.is_writable() && !slot.connection.out.is_empty() {
            self.make_dirty(place);
        }
        self.make_ready(place);
    }

    /// Puts a connection in line for reading, if it may be read from.
    pub(super) fn make_ready(&mut self, place: usize) {
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        if slot.connected && slot.connection.is_readable() && !slot.queued && !slot.paused {
            slot.queued = true;
            self.ready.push_back(place);
        }
    }

    /// Reads from the connections that have something, each in turn.
    pub(super) fn serve_ready(&mut self, now: Instant) {
        let mut bytes = 0;
        for _ in 0..self.ready.len() {
            if bytes >= BYTES_PER_TURN || clock::now().since(now) >= TURN_TIME {
                return;
            }
            let Some(place) = self.ready.pop_front() else {
                return;
            };
            match self.serve(now, place) {
                Ok(count) => {
                    bytes += count;
                    self.make_ready(place);
                }
                Err(error) => self.close(now, place, &error),
            }
        }
    }

    /// Reads from one connection and handles what that completes. Gives how many bytes were read, and adds what
    /// requests have cost.
    fn serve(&mut self, now: Instant, place: usize) -> Result<usize, ConnectionError> {
        let mut cost = Cost::default();
        let bytes = self.read_from(now, place, &mut cost)?;
        Ok(bytes + cost.of_turn)
    }

    fn read_from(
        &mut self,
        now: Instant,
        place: usize,
        cost: &mut Cost,
    ) -> Result<usize, ConnectionError> {
        let mut bytes = 0;
        let Some(slot) = self.connections.get_mut(place) else {
            return Ok(0);
        };
        slot.queued = false;
        loop {
            // Those that were left when the client was paused or had its share come first.
            if self.handle_frames(now, place, cost)? == Share::Used {
                self.come_back(place);
                return Ok(bytes);
            }
            let Some(slot) = self.connections.get_mut(place) else {
                return Ok(bytes);
            };
            let enough = bytes >= CONNECTION_BYTES_PER_TURN;
            if slot.paused || enough || !slot.connection.is_readable() {
                return Ok(bytes);
            }
            match slot.connection.fill()? {
                Fill::Bytes(count) => bytes += count,
                Fill::Nothing => return Ok(bytes),
                Fill::Closed => return Err(ConnectionError::Closed),
            }
        }
    }

    /// Puts a connection in line though it may have nothing more to read: requests of it wait.
    fn come_back(&mut self, place: usize) {
        if let Some(slot) = self.connections.get_mut(place) {
            slot.queued = true;
            self.ready.push_back(place);
        }
    }

    /// Handles the frames that have come.
    fn handle_frames(
        &mut self,
        now: Instant,
        place: usize,
        cost: &mut Cost,
    ) -> Result<Share, ConnectionError> {
        while let Some(slot) = self.connections.get_mut(place) {
            if let Kind::Client(load) = &slot.kind
                && load.is_full(&slot.connection.out)
            {
                slot.paused = true;
                return Ok(Share::Left);
            }
            if cost.is_share_used() {
                return Ok(Share::Used);
            }
            let Some(frame) = slot.connection.reader.poll_frame()? else {
                return Ok(Share::Left);
            };
            match &mut slot.kind {
                Kind::Client(load) => {
                    if frame.kind != FrameKind::Request {
                        return Err(ConnectionError::Unexpected(frame.kind));
                    }
                    match Request::decode(frame) {
                        Ok(request) => {
                            load.begin(&request);
                            slot.requests += 1;
                            slot.last_request = Some(now);
                            if matches!(request.body, RequestBody::Inspect(_)) {
                                cost.add_inspection();
                            }
                            self.engine.handle_request(now, slot.id, request);
                            let read = self.engine.finished_read_bytes();
                            if read >= READ_BYTES_PER_ANSWER {
                                cost.answered += read;
                                self.answer_reads(now);
                            }
                        }
                        Err(ClientDecodeError {
                            tag: Some(tag),
                            error,
                        }) => {
                            tracing::debug!("malformed request: {error}");
                            let reply = Reply {
                                tag,
                                body: Err(ReplyError::Invalid),
                            };
                            reply.encode(&mut slot.connection.out);
                            self.make_dirty(place);
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                Kind::Inbound(server, incarnation) => {
                    let (server, incarnation) = (*server, *incarnation);
                    if self.peers.is_outdated(server, incarnation) && !self.knows_lives_of(server) {
                        return Err(ConnectionError::Outdated(server));
                    }
                    let message = read_message(frame)?;
                    if !self.peers.is_claimed_twice(now, server) {
                        self.engine
                            .handle_message(now, server, incarnation, message);
                    }
                }
                Kind::Outbound(_) => return Err(ConnectionError::Unexpected(frame.kind)),
                Kind::Caller(_) | Kind::Calling(..) => self.shake_hands(now, place, &frame)?,
            }
        }
        Ok(Share::Left)
    }

    /// A frame of the handshake.
    fn shake_hands(
        &mut self,
        now: Instant,
        place: usize,
        frame: &Frame,
    ) -> Result<(), ConnectionError> {
        let Some(slot) = self.connections.get_mut(place) else {
            return Ok(());
        };
        let (handshake, called) = match &mut slot.kind {
            Kind::Caller(handshake) => (handshake, None),
            Kind::Calling(server, handshake) => (handshake, Some(*server)),
            _ => return Ok(()),
        };
        let result = handshake.handle_frame(frame, &mut slot.connection.out);
        if result.is_err() {
            // Tells the other end why.
            slot.connection.flush()?;
        }
        let peer = result?;
        self.make_dirty(place);
        match (peer, called) {
            (None, _) => Ok(()),
            (Some(_), Some(server)) => {
                self.connections.become_kind(place, Kind::Outbound(server));
                self.peers.up(now, server);
                Ok(())
            }
            (Some(peer), None) => self.let_in(now, place, peer),
        }
    }

    /// A caller has proved who it is.
    fn let_in(&mut self, now: Instant, place: usize, peer: Peer) -> Result<(), ConnectionError> {
        let (kind, limits) = match peer.role {
            Role::Client(name) => {
                if self.connections.clients() >= CLIENTS_MAX {
                    return Err(ConnectionError::TooManyClients);
                }
                tracing::debug!("client {name:?} is connected");
                (Kind::Client(ClientLoad::new(name)), FrameLimits::REQUESTS)
            }
            Role::Server {
                id, incarnation, ..
            } => {
                if !self.peers.heard(now, id, incarnation) && !self.knows_lives_of(id) {
                    return Err(ConnectionError::Outdated(id));
                }
                tracing::debug!(peer = id.0, "server {id} is connected");
                (Kind::Inbound(id, incarnation), FrameLimits::PEERS)
            }
        };
        self.connections.become_kind(place, kind);
        if let Some(slot) = self.connections.get_mut(place) {
            if let (Kind::Client(_), Ok(address)) =
                (&slot.kind, slot.connection.stream().peer_addr())
            {
                self.engine.note_client(slot.id, address);
            }
            slot.connection.reader.set_limits(limits);
        }
        Ok(())
    }

    /// Ends a connection.
    pub(super) fn close(&mut self, now: Instant, place: usize, reason: &ConnectionError) {
        let Some(mut slot) = self.connections.remove(place) else {
            return;
        };
        // Closing the descriptor would do, too; only then mio would not know.
        let _ = self
            .sockets
            .poll
            .registry()
            .deregister(slot.connection.stream());
        match slot.kind {
            Kind::Client(load) => {
                self.engine.handle_client_gone(slot.id);
                let name = load.name;
                if reason.is_usual() {
                    tracing::debug!("client {name:?} is gone: {reason}");
                } else {
                    tracing::warn!("the connection of client {name:?} was closed: {reason}");
                }
            }
            Kind::Inbound(server, _) => {
                let peer = server.0;
                let received = slot.connection.received;
                self.peers
                    .count(server, |counts| counts.received_bytes += received);
                if reason.is_usual() {
                    tracing::debug!(peer, "server {server} has disconnected: {reason}");
                } else {
                    tracing::warn!(
                        peer,
                        "the connection of server {server} was closed: {reason}"
                    );
                }
            }
            Kind::Calling(server, _) | Kind::Outbound(server) => {
                let sent = slot.connection.sent;
                self.peers.count(server, |counts| counts.sent_bytes += sent);
                self.peers.down(now, server, &reason.to_string());
            }
            Kind::Caller(_) => {
                if !reason.is_usual()
                    && let Some(more) = self.bad_callers.admit(now)
                {
                    let from = slot.connection.stream().peer_addr();
                    let from = from.map_or_else(|_| "unknown".to_owned(), |from| from.to_string());
                    tracing::warn!(more, "a connection from {from} was refused: {reason}");
                }
            }
        }
    }
}

/// Reads a message and checks the data in it, so that nothing damaged reaches the agreement or the disk.
fn read_message(frame: Frame) -> Result<Message, ConnectionError> {
    if frame.kind != FrameKind::Peer {
        return Err(ConnectionError::Unexpected(frame.kind));
    }
    let message = decode_frame(frame)?;
    if let Message::Accept { entries, .. }
    | Message::Tail { entries, .. }
    | Message::Chosen { entries, .. } = &message
    {
        for entry in entries {
            entry.verify()?;
        }
    }
    Ok(message)
}

fn prepare(connection: &mut Connection, kind: &Kind) -> io::Result<()> {
    let stream = connection.stream();
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&*stream);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE / 3);
    socket.set_tcp_keepalive(&keepalive)?;
    if matches!(kind, Kind::Calling(..)) {
        socket.set_tcp_user_timeout(Some(LINK_PATIENCE))?;
    }
    Ok(())
}

fn nonce() -> Option<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    match getrandom::fill(&mut nonce) {
        Ok(()) => Some(nonce),
        Err(error) => {
            tracing::error!("no random numbers: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many clients ask, a turn takes few of their questions; and one client alone no more.
    #[test]
    fn inspections_of_all_clients_are_bounded() {
        let mut cost = Cost::default();
        let mut turn = 0;
        for _ in 0..INSPECTIONS_PER_TURN {
            assert!(turn < BYTES_PER_TURN, "another client has its turn");
            let mut other = Cost::default();
            other.add_inspection();
            turn += other.of_turn;
            assert!(!cost.is_share_used());
            cost.add_inspection();
        }
        assert!(turn >= BYTES_PER_TURN, "the turn is over");
        assert!(cost.is_share_used());
    }
}
