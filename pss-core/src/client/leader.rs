//! Connects to servers and finds the one that leads.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::client::{CellConfig, ServerError};
use crate::key::CellId;
use crate::members::Members;
use crate::servers::sockets;
use crate::types::{Ballot, RequestNumber, SERVERS_MAX, ServerId, SessionId};
use crate::wire::auth::{Handshake, HandshakeConfig, MacKey, Peer, Role};
use crate::wire::client::{Reply, ReplyBody, Request, RequestBody, ServerStatus};
use crate::wire::frame::{Frame, FrameError, FrameKind, FrameLimits, FrameReader, SendQueue};

/// A server that does not lead is asked again after this, at first.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(50);
/// And at last, after some seven seconds: each pause is a twentieth longer than the one before, so that what
/// is waited for too long is a twentieth of the time that the cell was without a leader.
const ASK_AGAIN_MAX: Duration = Duration::from_millis(400);
/// How long an answer "I lead" waits for one of a higher ballot, if other servers have not answered:
/// a leader that was cut off may not know yet that it leads no more.
const RIVAL_GRACE: Duration = Duration::from_millis(20);
/// Parts of one vectored write.
const SLICES: usize = 64;

/// A connection to a server, after the handshake.
pub(super) struct Connection {
    pub(super) server: ServerId,
    /// Names the server's process.
    pub(super) boot: u64,
    stream: TcpStream,
    reader: FrameReader,
    pub(super) out: SendQueue,
}

/// What the connections of one cell have in common.
pub(super) struct Dialer {
    pub(super) config: CellConfig,
    key: Option<MacKey>,
    /// Learned from the first server that answers.
    cell: OnceLock<CellId>,
    /// What came of the last attempt with each server.
    pub(super) outcomes: Mutex<BTreeMap<ServerId, Result<(), ServerError>>>,
    /// What servers have told of who they are.
    learned: Mutex<Learned>,
}

/// The servers as the cell lists them, which goes before the configuration.
#[derive(Default)]
struct Learned {
    /// Epoch and version of the list; (0, 0): none was told.
    change: (u64, u64),
    addresses: BTreeMap<ServerId, SocketAddr>,
}

impl Dialer {
    pub(super) fn new(config: CellConfig) -> Dialer {
        Dialer {
            key: config.key.as_ref().map(MacKey::new),
            config,
            cell: OnceLock::new(),
            outcomes: Mutex::default(),
            learned: Mutex::default(),
        }
    }

    /// Connects to one server.
    pub(super) async fn dial(&self, server: ServerId) -> Result<Connection, ServerError> {
        let address = self.address(server)?;
        let limit = self.config.connect_timeout;
        match timeout(limit, self.dial_unbounded(server, address)).await {
            Ok(result) => result,
            Err(_) => Err(ServerError::TimedOut(limit)),
        }
    }

    fn learned(&self) -> MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A server says who the servers are: some may have come, gone or moved since the configuration was written.
    pub(super) fn learn(&self, members: Option<&Members>) {
        let Some(members) = members else { return };
        let mut learned = self.learned();
        let change = (members.epoch, members.version);
        if change <= learned.change {
            return;
        }
        let addresses = members.list.iter().filter_map(|member| {
            let (tcp, _) = sockets(member.id, member.address()?);
            Some((member.id, tcp))
        });
        *learned = Learned {
            change,
            addresses: addresses.collect(),
        };
    }

    /// The servers that can be asked: those of the configuration, even if they were removed when somebody last told, and those
    /// that are known to have come: what was told last may be old, and all of them gone.
    pub(super) fn servers(&self) -> Vec<ServerId> {
        let mut servers: Vec<ServerId> = self.config.servers.iter().map(|it| it.0).collect();
        let learned = self.learned();
        let new = learned.addresses.keys().copied();
        let new: Vec<ServerId> = new.filter(|id| !servers.contains(id)).collect();
        servers.extend(new);
        servers
    }

    fn address(&self, server: ServerId) -> Result<SocketAddr, ServerError> {
        if let Some(address) = self.learned().addresses.get(&server) {
            return Ok(*address);
        }
        let mut servers = self.config.servers.iter();
        match servers.find(|(id, _)| *id == server) {
            Some((_, address)) => Ok(*address),
            None => Err(ServerError::NotListed),
        }
    }

    async fn dial_unbounded(
        &self,
        server: ServerId,
        address: SocketAddr,
    ) -> Result<Connection, ServerError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).expect("the operating system gives random numbers");
        let config = HandshakeConfig {
            cell: self.cell.get().copied(),
            key: self.key.clone(),
            role: Role::Client(self.config.client_name.clone()),
            wanted: Some(server),
        };
        let mut connection = Connection {
            server,
            boot: 0,
            stream,
            reader: FrameReader::new(FrameLimits::HANDSHAKE),
            out: SendQueue::new(),
        };
        let mut handshake = Handshake::client(config, nonce, &mut connection.out);
        let peer = connection.shake_hands(&mut handshake).await?;
        if let Role::Server { boot, .. } = peer.role {
            connection.boot = boot;
        }
        let _ = self.cell.set(peer.cell);
        connection.reader.set_limits(FrameLimits::REPLIES);
        Ok(connection)
    }

    /// Connects to one server and asks it one thing that needs no session.
    pub(super) async fn ask(
        &self,
        server: ServerId,
        body: RequestBody,
    ) -> Result<ReplyBody, ServerError> {
        let mut connection = self.dial(server).await?;
        self.ask_on(&mut connection, body).await
    }

    async fn ask_on(
        &self,
        connection: &mut Connection,
        body: RequestBody,
    ) -> Result<ReplyBody, ServerError> {
        let limit = self.config.connect_timeout;
        match timeout(limit, connection.ask(body)).await {
            Ok(result) => result,
            Err(_) => Err(ServerError::TimedOut(limit)),
        }
    }

    pub(super) async fn status_on(
        &self,
        connection: &mut Connection,
    ) -> Result<ServerStatus, ServerError> {
        match self.ask_on(connection, RequestBody::Status).await? {
            ReplyBody::Status(status) => Ok(*status),
            _ => Err(ServerError::Unexpected),
        }
    }

    fn note(&self, server: ServerId, outcome: Result<(), ServerError>) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        outcomes.insert(server, outcome);
    }

    /// Asks one server until it says that it leads. Reports its first answer, or that there was none,
    /// and its claim.
    async fn await_leadership(&self, server: ServerId, reports: mpsc::Sender<Report>) {
        let mut pause = ASK_AGAIN_MIN;
        let mut connection = None;
        let mut is_first = true;
        loop {
            let answer = self.check_leadership(server, &mut connection).await;
            if let Err(error) = &answer {
                tracing::debug!(%server, %error, "no answer while the leader is searched");
                connection = None;
            }
            let ballot = answer.as_ref().ok().copied().flatten();
            self.note(server, answer.map(|_| ()));
            let claim = ballot.and_then(|ballot| Some((connection.take()?, ballot)));
            let is_claim = claim.is_some();
            if is_first || is_claim {
                let _ = reports.send(Report { claim }).await;
            }
            if is_claim {
                return;
            }
            is_first = false;
            sleep(pause).await;
            pause = (pause * 21 / 20).min(ASK_AGAIN_MAX);
        }
    }

    async fn check_leadership(
        &self,
        server: ServerId,
        connection: &mut Option<Connection>,
    ) -> Result<Option<Ballot>, ServerError> {
        let connection = match connection {
            Some(connection) => connection,
            None => connection.insert(self.dial(server).await?),
        };
        let status = self.status_on(connection).await?;
        self.learn(status.members.as_ref());
        Ok((status.role == "leader").then_some(status.ballot))
    }
}

/// A server's first answer in a search, or its claim to lead.
struct Report {
    claim: Option<(Connection, Ballot)>,
}

/// Asks all servers at once, again and again, until one says that it leads.
///
/// `named` is the server that another one has called the leader: if it agrees, nobody else is heard.
pub(super) async fn find_leader(dialer: Arc<Dialer>, named: Option<ServerId>) -> Connection {
    let (sender, mut reports) = mpsc::channel(2 * SERVERS_MAX);
    let mut searches = JoinSet::new();
    let mut servers: Vec<ServerId> = Vec::new();
    let mut answered = 0;
    let mut best = None;
    while best.is_none() {
        // The first answers may tell of servers that the configuration does not know.
        for server in dialer.servers() {
            if !servers.contains(&server) {
                servers.push(server);
                let (dialer, sender) = (Arc::clone(&dialer), sender.clone());
                searches.spawn(async move { dialer.await_leadership(server, sender).await });
            }
        }
        // The sender above lives, so there is always another report to wait for.
        let report = reports.recv().await;
        answered += 1;
        best = report.and_then(|report| report.claim);
    }
    if let Some((connection, _)) = best.take_if(|(found, _)| named == Some(found.server)) {
        return connection;
    }
    let rivals = async {
        while answered < servers.len()
            && let Some(report) = reports.recv().await
        {
            answered += 1;
            let ballot = |claim: &Option<(Connection, Ballot)>| claim.as_ref().map(|claim| claim.1);
            if ballot(&report.claim) > ballot(&best) {
                best = report.claim;
            }
        }
    };
    let _ = timeout(RIVAL_GRACE, rivals).await;
    match best {
        Some((connection, _)) => connection,
        None => std::future::pending().await,
    }
}

impl Connection {
    async fn shake_hands(&mut self, handshake: &mut Handshake) -> Result<Peer, ServerError> {
        loop {
            poll_fn(|cx| self.poll_flush(cx)).await?;
            let frame = self.next_frame().await?;
            let result = handshake.handle_frame(&frame, &mut self.out);
            if let Some(peer) = result? {
                poll_fn(|cx| self.poll_flush(cx)).await?;
                return Ok(peer);
            }
        }
    }

    pub(super) async fn ask(&mut self, body: RequestBody) -> Result<ReplyBody, ServerError> {
        let request = Request {
            tag: 1,
            session: SessionId(0),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            body,
        };
        request.encode(&mut self.out);
        poll_fn(|cx| self.poll_flush(cx)).await?;
        let frame = self.next_frame().await?;
        if frame.kind != FrameKind::Reply {
            return Err(ServerError::Unexpected);
        }
        Ok(Reply::decode(frame)?.body?)
    }

    async fn next_frame(&mut self) -> Result<Frame, ServerError> {
        loop {
            if let Some(frame) = self.poll_frame()? {
                return Ok(frame);
            }
            poll_fn(|cx| self.poll_fill(cx)).await?;
        }
    }

    /// A frame that has been received.
    pub(super) fn poll_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        self.reader.poll_frame()
    }

    /// Receives once, after [`Connection::poll_frame`] gave nothing. Gives how many bytes came.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, ServerError>> {
        let mut buffer = ReadBuf::new(self.reader.spare());
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        let count = buffer.filled().len();
        if count == 0 {
            return Poll::Ready(Err(ServerError::Closed));
        }
        self.reader.filled(count);
        Poll::Ready(Ok(count))
    }

    /// Sends until nothing waits.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServerError>> {
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let used = self.out.as_io_slices(&mut slices);
            let stream = Pin::new(&mut self.stream);
            let count = ready!(stream.poll_write_vectored(cx, &slices[..used]))?;
            if count == 0 {
                return Poll::Ready(Err(ServerError::Closed));
            }
            self.out.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}
