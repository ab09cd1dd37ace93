//! One TCP connection: bytes in and out, without a protocol.

use std::io::{self, IoSlice, Read, Write};

use mio::event::Event;
use mio::net::TcpStream;
use pss_core::wire::frame::{FrameLimits, FrameReader, SendQueue};

/// Parts of one vectored write. `IOV_MAX` is 1024; a quarter of it already makes the call's own cost
/// vanish beside what it copies.
const WRITE_PARTS_MAX: usize = 256;

/// A connection whose socket never blocks.
pub(crate) struct Connection {
    stream: TcpStream,
    pub(crate) reader: FrameReader,
    pub(crate) out: SendQueue,
    /// A read may bring bytes: the socket was reported readable and not read empty since.
    readable: bool,
    /// The other end will send no more: only a read that gives nothing means that all has been read.
    read_closed: bool,
    /// The socket took everything so far; if not, it will be reported writable.
    writable: bool,
    /// Bytes received so far.
    pub(crate) received: u64,
    /// Bytes sent so far.
    pub(crate) sent: u64,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fill {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The end.
    Closed,
}

impl Connection {
    /// A connection that was accepted, or one that is being set up (`connected` not set).
    pub(crate) fn new(stream: TcpStream, connected: bool) -> Connection {
        Connection {
            stream,
            reader: FrameReader::new(FrameLimits::HANDSHAKE),
            out: SendQueue::new(),
            readable: connected,
            read_closed: false,
            writable: connected,
            received: 0,
            sent: 0,
        }
    }

    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// For questions about the socket.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Notes what the socket was reported to be.
    pub(crate) fn note(&mut self, event: &Event) {
        self.read_closed |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.read_closed;
        self.writable |= event.is_writable();
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.readable
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The error that ended the setting up, if one did.
    pub(crate) fn take_error(&self) -> io::Result<()> {
        match self.stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Reads once, into the frame reader, whose frames have all been taken.
    pub(crate) fn fill(&mut self) -> io::Result<Fill> {
        let spare = self.reader.spare();
        let room = spare.len();
        loop {
            match self.stream.read(spare) {
                Ok(0) => return Ok(Fill::Closed),
                Ok(count) => {
                    // Less than there was room for: the socket is empty, and will be reported when it
                    // is not (epoll(7), question 9). Saves the read that would say so.
                    self.readable = count == room || self.read_closed;
                    self.reader.filled(count);
                    self.received += count as u64;
                    return Ok(Fill::Bytes(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(Fill::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes until the queue is empty or the socket takes no more.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while self.writable && !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_PARTS_MAX];
            let used = self.out.as_io_slices(&mut slices);
            let slices = &slices[..used];
            let total: usize = slices.iter().map(|slice| slice.len()).sum();
            match self.stream.write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.writable = count == total;
                    self.out.advance(count);
                    self.sent += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
