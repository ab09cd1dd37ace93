//! The transmission phase of one connection: bytes ↔ [`Transmission`] ↔ device.
//!
//! One future does everything. Each time it runs, it takes all results that are there, sends all replies
//! in one vectored write, reads what the client sent, and submits all requests in it.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::{BufMut, BytesMut};
use pss_core::volume::device::{BlockDevice, CompletionQueue, DeviceResult, Fate};
use pss_gateway::alarm::Alarm;
use pss_gateway::listen::Stream;
use tokio::io::{AsyncReadExt, AsyncWrite};

use crate::handshake::Start;
use crate::transmission::{Ending, Terms, Transmission};

/// Size of the receive buffer: about sixty writes of 4 KiB for one system call.
const RECEIVE_BYTES: usize = 256 << 10;
/// Below this much space in the receive buffer a new one is made.
const RECEIVE_SPACE_MIN: usize = 64 << 10;
/// What is read behind a long payload: enough to find the next request, and little of its payload, which
/// is to be read into its own buffer.
const RECEIVE_BEHIND_PAYLOAD: usize = 4 << 10;
/// Most slices in one write; the system's limit is 1024.
const SLICES_MAX: usize = 256;

/// One connection after the handshake.
pub(crate) struct Connection {
    stream: Stream,
    input: BytesMut,
    transmission: Transmission,
    device: Arc<dyn BlockDevice>,
    queue: Arc<CompletionQueue>,
    results: Vec<(u64, DeviceResult)>,
    alarm: Arc<Alarm>,
    device_changed: Arc<AtomicBool>,
    /// The payload read last had its own buffer.
    reads_long: bool,
    /// Nothing can be sent any more.
    broken: bool,
    /// Keeps the export's place until the end.
    _export: Arc<crate::export::Export>,
}

impl Connection {
    pub(crate) fn new(stream: Stream, input: BytesMut, start: Start) -> Connection {
        let terms = Terms {
            size_bytes: start.export.size_bytes,
            read_only: start.export.read_only,
            structured_replies: start.structured_replies,
            allocation_context: start.allocation_context,
        };
        let alarm = Arc::new(Alarm::default());
        let rung = Arc::clone(&alarm);
        let device = Arc::clone(&start.export.device);
        // The device may have gone before it was watched.
        let device_changed = Arc::new(AtomicBool::new(true));
        let watched = (Arc::downgrade(&alarm), Arc::clone(&device_changed));
        device.watch(Box::new(move || match watched.0.upgrade() {
            Some(alarm) => {
                watched.1.store(true, Ordering::Release);
                alarm.ring();
                true
            }
            None => false,
        }));
        Connection {
            stream,
            input,
            transmission: Transmission::new(terms),
            device,
            queue: CompletionQueue::new(Box::new(move || rung.ring())),
            results: Vec::new(),
            alarm,
            device_changed,
            reads_long: false,
            broken: false,
            _export: start.export,
        }
    }

    /// Takes no more requests; [`Connection::run`] ends when those in flight are answered.
    pub(crate) fn stop(&mut self) {
        self.transmission.end(Ending::ServerStops);
    }

    /// Serves until the connection ends. Can be dropped and called again.
    pub(crate) async fn run(&mut self) -> Ending {
        poll_fn(|cx| self.poll_run(cx)).await
    }

    fn poll_run(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        self.alarm.register(cx.waker());
        if self.device_changed.swap(false, Ordering::AcqRel) {
            self.look_at_device();
        }
        loop {
            // What was read with the handshake, or waited for room, comes before what is on the wire.
            self.transmission.handle_bytes(&mut self.input);
            let mut moved = self.submit();
            moved |= self.take_results();
            moved |= self.poll_send(cx);
            if let (true, Some(ending)) =
                (self.transmission.is_finished(), self.transmission.ending())
            {
                return Poll::Ready(ending);
            }
            moved |= self.poll_receive(cx);
            if !moved {
                return Poll::Pending;
            }
        }
    }

    fn look_at_device(&mut self) {
        match self.device.fate() {
            // A fenced session is followed by a new one: requests fail until then, and clients that can
            // wait for nothing else keep their connection.
            Fate::Alive | Fate::Fenced => {}
            Fate::Deleted => self.transmission.end(Ending::DeviceGone),
        }
    }

    fn submit(&mut self) -> bool {
        let mut moved = false;
        while let Some(submit) = self.transmission.poll_submit() {
            let done = self.queue.completion(submit.token);
            self.device.submit(submit.request, done);
            moved = true;
        }
        moved
    }

    fn take_results(&mut self) -> bool {
        self.queue.take(&mut self.results);
        let moved = !self.results.is_empty();
        for (token, result) in self.results.drain(..) {
            self.transmission.handle_completion(token, result);
        }
        moved
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let sending = self.transmission.sending();
        if self.broken {
            sending.clear();
            return false;
        }
        let mut moved = false;
        while !sending.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let filled = sending.fill(&mut slices);
            match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..filled]) {
                Poll::Ready(Ok(count)) if count > 0 => sending.advance(count),
                Poll::Ready(_) => {
                    sending.clear();
                    self.broken = true;
                    self.transmission.end(Ending::PeerClosed);
                    return true;
                }
                Poll::Pending => break,
            }
            moved = true;
        }
        moved
    }

    /// Reads once.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.broken || !self.transmission.wants_bytes(&self.input) {
            return false;
        }
        let read = if let Some(buffer) = self.transmission.own_buffer() {
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
            Poll::Ready(Ok(count)) if count > 0 => self.transmission.handle_own_buffer(),
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Poll::Ready(Ok(_)) => self.transmission.end(Ending::PeerClosed),
            Poll::Ready(Err(_)) => {
                self.broken = true;
                self.transmission.end(Ending::PeerClosed);
            }
            Poll::Pending => return false,
        }
        true
    }
}
