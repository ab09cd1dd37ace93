//! One connection in its full feature phase: socket ↔ session.
//!
//! One future does everything, as in the NBD server: each time it runs, it takes all PDUs that are there,
//! hands over all commands in them, and sends all answers in one vectored write.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use pss_gateway::listen::Stream;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::Sleep;

use crate::clock::Clock;
use crate::pdu::framing::Framing;
use crate::server::Server;
use crate::session::{BYTES_IN_FLIGHT_MAX, Ending, Output};
use crate::sessions::Place;

/// Size of the receive buffer: about sixty writes of 4 KiB for one system call.
const RECEIVE_BYTES: usize = 256 << 10;
/// Below this much space in the receive buffer a new one is made.
const RECEIVE_SPACE_MIN: usize = 64 << 10;
/// What is read behind a long payload: enough to find the next PDU, and little of its data, which is to
/// be read into its own buffer.
const RECEIVE_BEHIND_PAYLOAD: usize = 4 << 10;
/// Most slices in one write; the system's limit is 1024.
const SLICES_MAX: usize = 256;
/// An initiator that lets so much wait is not listened to: it does not read what it asks for.
const UNSENT_BYTES_MAX: usize = BYTES_IN_FLIGHT_MAX + (4 << 20);
/// Time for the last words of a connection.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A connection after its login.
pub(crate) struct Link {
    stream: Stream,
    input: BytesMut,
    framing: Framing,
    place: Place,
    server: Arc<Server>,
    clock: Clock,
    timer: Pin<Box<Sleep>>,
    reads_long: bool,
    /// Nothing can be sent or received any more.
    broken: bool,
    left: bool,
}

impl Link {
    pub(crate) fn new(
        stream: Stream,
        input: BytesMut,
        framing: Framing,
        place: Place,
        server: Arc<Server>,
    ) -> Link {
        let clock = server.clock();
        Link {
            stream,
            input,
            framing,
            place,
            server,
            clock,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            reads_long: false,
            broken: false,
            left: false,
        }
    }

    /// Serves until the connection ends: why its session ended, if it did.
    pub(crate) async fn run(mut self) -> Option<Ending> {
        poll_fn(|cx| self.poll_run(cx)).await;
        // What is still to be sent, such as a logout response, may take a moment.
        let _ = tokio::time::timeout(LAST_WORDS, poll_fn(|cx| self.poll_last_words(cx))).await;
        if !self.is_replaced() {
            self.place.handle.session().handle_lost(self.place.cid);
            self.leave_if_over();
            self.place.handle.ring();
        }
        self.server.sessions().hang_up(&self.place);
        self.place.handle.session().ending()
    }

    /// Whether another connection has taken its place.
    fn is_replaced(&self) -> bool {
        let mut session = self.place.handle.session();
        let now = session.connection(self.place.cid);
        now.is_none_or(|it| it.incarnation != self.place.incarnation)
    }

    fn leave_if_over(&mut self) {
        if !self.left && self.place.handle.session().ending().is_some() {
            self.left = true;
            self.server.sessions().leave(&self.place.handle);
            self.place.handle.ring_others(self.place.cid);
        }
    }

    fn poll_run(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.place.alarm.register(cx.waker());
        loop {
            if self.is_replaced() {
                self.broken = true;
                return Poll::Ready(());
            }
            let mut moved = self.take_pdus();
            moved |= self.carry_out();
            moved |= self.poll_timer(cx);
            moved |= self.poll_send(cx);
            self.leave_if_over();
            if self.broken || self.is_over() {
                return Poll::Ready(());
            }
            moved |= self.poll_receive(cx);
            if !moved {
                return Poll::Pending;
            }
        }
    }

    /// Whether the connection takes nothing any more.
    fn is_over(&self) -> bool {
        let mut session = self.place.handle.session();
        let over = session.ending().is_some();
        over || session
            .connection(self.place.cid)
            .is_none_or(|it| it.is_closing())
    }

    fn poll_last_words(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_send(cx);
        let mut session = self.place.handle.session();
        let connection = session.connection(self.place.cid);
        match connection {
            Some(connection) if !self.broken && connection.unsent_bytes() > 0 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }

    /// Takes all PDUs that are there.
    fn take_pdus(&mut self) -> bool {
        let now = self.clock.now();
        let handle = Arc::clone(&self.place.handle);
        let mut session = handle.session();
        let mut moved = false;
        loop {
            match self.framing.poll(&mut self.input) {
                Ok(Some(pdu)) => session.handle_pdu(now, self.place.cid, pdu),
                Ok(None) => return moved,
                Err(error) => {
                    let bhs = self.input.first_chunk().copied();
                    session.handle_garbage(self.place.cid, error, bhs.as_ref());
                    self.input.clear();
                    return true;
                }
            }
            moved = true;
        }
    }

    /// Has done what the session wants.
    fn carry_out(&mut self) -> bool {
        let mut moved = false;
        loop {
            let mut session = self.place.handle.session();
            let outputs: Vec<Output> = std::iter::from_fn(|| session.poll_output()).collect();
            drop(session);
            if outputs.is_empty() {
                return moved;
            }
            moved = true;
            let mut rest = Vec::with_capacity(outputs.len());
            for output in outputs {
                match output {
                    Output::ListTargets { cid, wanted } => {
                        let (handle, peer, local) = (&self.place.handle, self.peer(), self.local());
                        let targets = self.server.list_targets(handle, &wanted, peer, local);
                        handle.session().handle_targets(cid, &targets);
                    }
                    other => rest.push(other),
                }
            }
            if let Some(host) = &self.place.handle.host {
                host.carry_out(self.place.handle.nexus, rest);
            }
        }
    }

    fn peer(&self) -> Option<std::net::SocketAddr> {
        self.stream.tcp().and_then(|it| it.peer_addr().ok())
    }

    fn local(&self) -> Option<std::net::SocketAddr> {
        self.stream.tcp().and_then(|it| it.local_addr().ok())
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let mut session = self.place.handle.session();
        let Some(due) = session.poll_timeout() else {
            return false;
        };
        let due_at = self.clock.at(due);
        // What was heard moves the time on: the timer is set again when it rings.
        if self.timer.deadline() > due_at {
            self.timer.as_mut().reset(due_at);
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return false;
        }
        let now = self.clock.now();
        session.handle_timeout(now);
        let next = session.poll_timeout().map(|it| self.clock.at(it));
        let soon = tokio::time::Instant::now() + Duration::from_millis(1);
        self.timer.as_mut().reset(next.unwrap_or(soon).max(soon));
        true
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut session = self.place.handle.session();
        let mut moved = false;
        let Some(connection) = session.connection(self.place.cid) else {
            return false;
        };
        let sending = connection.sending();
        if self.broken {
            sending.clear();
            return false;
        }
        while !sending.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let filled = sending.fill(&mut slices);
            match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..filled]) {
                Poll::Ready(Ok(count)) if count > 0 => {
                    sending.advance(count);
                    let sent = &self.place.handle.sent_bytes;
                    sent.fetch_add(count as u64, Ordering::Relaxed);
                }
                Poll::Ready(_) => {
                    sending.clear();
                    self.broken = true;
                    return true;
                }
                Poll::Pending => break,
            }
            moved = true;
        }
        if moved && session.has_waiting() {
            session.pump();
        }
        moved
    }

    fn wants_bytes(&self) -> bool {
        let mut session = self.place.handle.session();
        let connection = session.connection(self.place.cid);
        connection.is_some_and(|it| it.unsent_bytes() <= UNSENT_BYTES_MAX)
    }

    /// Reads once.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.wants_bytes() {
            return false;
        }
        let read = if let Some(buffer) = self.framing.own_buffer() {
            self.reads_long = true;
            let read = pin!(self.stream.read(buffer.spare())).poll(cx);
            if let Poll::Ready(Ok(count)) = read {
                buffer.advance(count);
            }
            read
        } else {
            let most = match self.reads_long {
                true => RECEIVE_BEHIND_PAYLOAD,
                false => RECEIVE_BYTES,
            };
            self.reads_long = false;
            if self.input.capacity() - self.input.len() < RECEIVE_SPACE_MIN {
                self.input.reserve(RECEIVE_BYTES);
            }
            let mut limited = (&mut self.input).limit(most);
            pin!(self.stream.read_buf(&mut limited)).poll(cx)
        };
        match read {
            Poll::Ready(Ok(count)) if count > 0 => {
                let received = &self.place.handle.received_bytes;
                received.fetch_add(count as u64, Ordering::Relaxed);
            }
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Poll::Ready(_) => self.broken = true,
            Poll::Pending => return false,
        }
        true
    }
}
