//! Frames on a TCP connection.
//!
//! | bytes | field                                                        |
//! |-------|--------------------------------------------------------------|
//! | 0-3   | magic `PSSF`                                                 |
//! | 4     | format version, 1                                            |
//! | 5     | kind                                                         |
//! | 6-7   | group                                                        |
//! | 8-11  | header length, bytes                                         |
//! | 12-15 | payload length, bytes                                        |
//! | 16-27 | zero                                                         |
//! | 28-31 | CRC32C over bytes 0-27 and the header                        |
//! | 32-   | header, then payload                                         |
//!
//! Little-endian. The payload is not under this CRC: whatever fills it has checksums of its own in
//! the header, which the receiver needs again later (an entry's block checksums go to disk with it).

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Bytes, BytesMut};

use crate::entry::ENTRY_PAYLOAD_MAX;
use crate::payload::{LARGE_PAYLOAD_BYTES, Payload};
use crate::state::CHUNK_BYTES_MAX;
use crate::types::GroupId;
use crate::wire::client::REQUEST_BYTES_MAX;

/// First bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"PSSF";
/// Version of this layout.
pub const FRAME_VERSION: u8 = 1;
/// Bytes before a frame's header.
pub const FRAME_HEAD_BYTES: usize = 32;
/// A receive buffer. Small frames are slices of it, so each keeps the whole of it alive: larger would
/// waste memory, smaller would cost system calls.
pub const RECEIVE_BYTES: usize = 128 << 10;
/// Payload below this size is copied behind its header: a slice of its own would cost more.
pub const COPY_BELOW_BYTES: usize = 1024;

const SPARE_BYTES_MIN: usize = 4096;

/// What a frame is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrameKind {
    /// Opens a connection: who calls.
    Hello,
    /// Answer to `Hello`: who answers.
    Welcome,
    /// The caller proves that it has the cell key.
    Proof,
    /// The handshake failed; the connection is closed.
    Denied,
    /// A message between servers ([`crate::wire::peer`]).
    Peer,
    /// A client's request ([`crate::wire::client`]).
    Request,
    /// A server's reply.
    Reply,
    /// Something newer than this program.
    Unknown(u8),
}

impl FrameKind {
    fn from_code(code: u8) -> FrameKind {
        match code {
            1 => FrameKind::Hello,
            2 => FrameKind::Welcome,
            3 => FrameKind::Proof,
            4 => FrameKind::Denied,
            16 => FrameKind::Peer,
            32 => FrameKind::Request,
            33 => FrameKind::Reply,
            unknown => FrameKind::Unknown(unknown),
        }
    }

    fn code(self) -> u8 {
        match self {
            FrameKind::Hello => 1,
            FrameKind::Welcome => 2,
            FrameKind::Proof => 3,
            FrameKind::Denied => 4,
            FrameKind::Peer => 16,
            FrameKind::Request => 32,
            FrameKind::Reply => 33,
            FrameKind::Unknown(code) => code,
        }
    }
}

/// One frame.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// What it is about.
    pub kind: FrameKind,
    /// Which log.
    pub group: GroupId,
    /// Checked by the frame's CRC.
    pub header: Bytes,
    /// Not checked yet. A slice of the receive buffer, or memory of its own if large.
    pub payload: Bytes,
}

/// What is read from a connection at most. Bounds every allocation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrameLimits {
    /// Longest header.
    pub header_bytes: usize,
    /// Longest payload.
    pub payload_bytes: usize,
}

impl FrameLimits {
    /// Before the other end is known: no payload, and headers that fit a few names.
    pub const HANDSHAKE: FrameLimits = FrameLimits {
        header_bytes: 4 << 10,
        payload_bytes: 0,
    };
    /// Requests of clients; compare-and-write carries its range twice.
    pub const REQUESTS: FrameLimits = FrameLimits {
        header_bytes: 64 << 10,
        payload_bytes: 2 * REQUEST_BYTES_MAX,
    };
    /// Replies to clients; the list of volumes is the longest header.
    pub const REPLIES: FrameLimits = FrameLimits {
        header_bytes: 8 << 20,
        payload_bytes: REQUEST_BYTES_MAX,
    };
    /// Messages of servers: a batch of entries, a chunk with its table, or the replicated state.
    pub const PEERS: FrameLimits = FrameLimits {
        header_bytes: 8 << 20,
        payload_bytes: CHUNK_BYTES_MAX as usize + (1 << 20),
    };
}

const _: () = assert!(FrameLimits::PEERS.payload_bytes > 4 * ENTRY_PAYLOAD_MAX);

/// Why bytes are not a frame. Final for the connection: where the next frame starts is not known.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// The other end does not speak this protocol.
    #[error("the other end does not speak the PSS protocol (frame starts with {0:02x?})")]
    Magic([u8; 4]),
    /// The other end speaks another version of it.
    #[error(
        "the other end sends frames of version {0}, this program knows version {FRAME_VERSION}"
    )]
    Version(u8),
    /// A header or payload longer than allowed here.
    #[error("frame {what} of {have} bytes, at most {most} allowed")]
    TooLong {
        /// `header` or `payload`.
        what: &'static str,
        /// Announced.
        have: usize,
        /// Allowed.
        most: usize,
    },
    /// The CRC is wrong.
    #[error("frame checksum mismatch")]
    Checksum,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    kind: FrameKind,
    group: GroupId,
    header_bytes: usize,
    payload_bytes: usize,
}

impl Head {
    /// Reads the head without its CRC, for which the header is needed.
    fn decode(bytes: &[u8; FRAME_HEAD_BYTES], limits: FrameLimits) -> Result<Head, FrameError> {
        let four = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        if four(0) != FRAME_MAGIC {
            return Err(FrameError::Magic(four(0)));
        }
        if bytes[4] != FRAME_VERSION {
            return Err(FrameError::Version(bytes[4]));
        }
        let length = |at, what, most| {
            let have = u32::from_le_bytes(four(at)) as usize;
            if have > most {
                return Err(FrameError::TooLong { what, have, most });
            }
            Ok(have)
        };
        Ok(Head {
            kind: FrameKind::from_code(bytes[5]),
            group: GroupId(u16::from_le_bytes([bytes[6], bytes[7]])),
            header_bytes: length(8, "header", limits.header_bytes)?,
            payload_bytes: length(12, "payload", limits.payload_bytes)?,
        })
    }

    /// Bytes before the payload.
    fn front_bytes(&self) -> usize {
        FRAME_HEAD_BYTES + self.header_bytes
    }
}

/// Cuts a stream of bytes into frames.
///
/// Read into [`FrameReader::spare`], tell [`FrameReader::filled`], then call
/// [`FrameReader::poll_frame`] until it gives `None`.
#[derive(Debug)]
pub struct FrameReader {
    limits: FrameLimits,
    /// Initialised over its whole length; the first `filled` bytes were received.
    buffer: BytesMut,
    filled: usize,
    /// Bytes of `buffer` that the frame at its front needs, as far as is known.
    wanted: usize,
    /// Head of the frame at the front of `buffer`, once its CRC was found right.
    head: Option<Head>,
    large: Option<Large>,
}

/// A frame whose payload is being received into memory of its own.
#[derive(Debug)]
struct Large {
    head: Head,
    header: Bytes,
    payload: Payload,
}

impl FrameReader {
    /// A reader at the start of a connection.
    pub fn new(limits: FrameLimits) -> FrameReader {
        FrameReader {
            limits,
            buffer: BytesMut::new(),
            filled: 0,
            wanted: FRAME_HEAD_BYTES,
            head: None,
            large: None,
        }
    }

    /// Changes the limits for the frames whose head has not been received yet.
    pub fn set_limits(&mut self, limits: FrameLimits) {
        self.limits = limits;
    }

    /// Where the next bytes of the stream go. Not empty, provided that `poll_frame` gave `None` since
    /// the last bytes came.
    pub fn spare(&mut self) -> &mut [u8] {
        if self.large.is_none() {
            self.make_room();
        }
        match &mut self.large {
            Some(large) => large.payload.spare(),
            None => &mut self.buffer[self.filled..],
        }
    }

    /// The first `count` bytes of [`FrameReader::spare`] have been received.
    pub fn filled(&mut self, count: usize) {
        match &mut self.large {
            Some(large) => large.payload.advance(count),
            None => {
                self.filled += count;
                assert!(self.filled <= self.buffer.len(), "filled within spare");
            }
        }
    }

    /// Whether the bytes received so far end between two frames.
    pub fn is_between_frames(&self) -> bool {
        self.filled == 0 && self.large.is_none()
    }

    /// Takes received bytes from elsewhere and gives the frames that they complete to `each`. For
    /// callers to whom a copy does not matter.
    ///
    /// # Errors
    /// As [`FrameReader::poll_frame`].
    pub fn handle_bytes(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(Frame),
    ) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            let spare = self.spare();
            let count = spare.len().min(bytes.len());
            spare[..count].copy_from_slice(&bytes[..count]);
            self.filled(count);
            bytes = &bytes[count..];
            while let Some(frame) = self.poll_frame()? {
                each(frame);
            }
        }
        Ok(())
    }

    /// The next frame, if all of it has been received.
    ///
    /// # Errors
    /// [`FrameError`]; the connection must be closed then.
    pub fn poll_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.large.is_some() {
            return Ok(self.poll_large());
        }
        let Some(head) = self.poll_head()? else {
            return Ok(None);
        };
        let whole = head.front_bytes() + head.payload_bytes;
        if self.filled < whole {
            if head.payload_bytes >= LARGE_PAYLOAD_BYTES {
                self.start_large(head);
                return Ok(None);
            }
            self.wanted = whole;
            return Ok(None);
        }
        self.head = None;
        self.wanted = FRAME_HEAD_BYTES;
        self.filled -= whole;
        let mut rest = self.buffer.split_to(whole).freeze();
        let payload = rest.split_off(head.front_bytes());
        Ok(Some(head.frame(rest.slice(FRAME_HEAD_BYTES..), payload)))
    }

    fn poll_head(&mut self) -> Result<Option<Head>, FrameError> {
        if self.head.is_some() {
            return Ok(self.head);
        }
        let received = &self.buffer[..self.filled];
        let Some(bytes) = received.first_chunk::<FRAME_HEAD_BYTES>() else {
            return Ok(None);
        };
        let head = Head::decode(bytes, self.limits)?;
        let Some(header) = received.get(FRAME_HEAD_BYTES..head.front_bytes()) else {
            self.wanted = head.front_bytes();
            return Ok(None);
        };
        let stored = u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
        if frame_checksum(bytes, header) != stored {
            return Err(FrameError::Checksum);
        }
        self.head = Some(head);
        Ok(Some(head))
    }

    fn poll_large(&mut self) -> Option<Frame> {
        let large = self.large.take_if(|large| large.payload.is_full())?;
        Some(large.head.frame(large.header, large.payload.freeze()))
    }

    fn start_large(&mut self, head: Head) {
        let mut payload = Payload::with_length(head.payload_bytes);
        let front = self.buffer.split_to(head.front_bytes()).freeze();
        let filled = self.filled - head.front_bytes();
        payload.fill(&self.buffer[..filled]);
        // The bytes behind are unused; nobody shares them, so the next frames may have them.
        self.filled = 0;
        self.wanted = FRAME_HEAD_BYTES;
        self.head = None;
        self.large = Some(Large {
            head,
            header: front.slice(FRAME_HEAD_BYTES..),
            payload,
        });
    }

    /// Makes sure that the frame at the front fits and that a read is worth its system call.
    fn make_room(&mut self) {
        let room = self.buffer.len() - self.filled;
        let cramped = room < SPARE_BYTES_MIN && self.filled < SPARE_BYTES_MIN;
        if self.buffer.len() >= self.wanted && room > 0 && !cramped {
            return;
        }
        let mut buffer = BytesMut::zeroed(self.wanted.max(RECEIVE_BYTES));
        buffer[..self.filled].copy_from_slice(&self.buffer[..self.filled]);
        self.buffer = buffer;
    }
}

impl Head {
    fn frame(self, header: Bytes, payload: Bytes) -> Frame {
        Frame {
            kind: self.kind,
            group: self.group,
            header,
            payload,
        }
    }
}

fn frame_checksum(head: &[u8; FRAME_HEAD_BYTES], header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&head[..28]), header)
}

/// Bytes that wait to be sent on a connection: frames' heads and headers coalesced, payload by
/// reference.
#[derive(Debug, Default)]
pub struct SendQueue {
    parts: VecDeque<Bytes>,
    /// What follows `parts`.
    tail: BytesMut,
    bytes: usize,
    scratch: Vec<u8>,
}

impl SendQueue {
    /// An empty queue.
    pub fn new() -> SendQueue {
        SendQueue::default()
    }

    /// Bytes that wait.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Forgets everything that waits.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.tail.clear();
        self.bytes = 0;
    }

    /// Appends a frame whose header `write_header` makes and whose payload are the `payload` parts.
    pub fn frame<'a>(
        &mut self,
        kind: FrameKind,
        group: GroupId,
        write_header: impl FnOnce(&mut Vec<u8>),
        payload: impl Iterator<Item = &'a Bytes> + Clone,
    ) {
        let mut frame = std::mem::take(&mut self.scratch);
        frame.clear();
        frame.resize(FRAME_HEAD_BYTES, 0);
        write_header(&mut frame);
        let payload_bytes: usize = payload.clone().map(Bytes::len).sum();
        finish_head(&mut frame, kind, group, payload_bytes);
        self.push_copy(&frame);
        self.scratch = frame;
        for part in payload {
            self.push(part);
        }
    }

    /// Appends bytes by reference, or by copy if they are few.
    fn push(&mut self, bytes: &Bytes) {
        if bytes.len() < COPY_BELOW_BYTES {
            self.push_copy(bytes);
            return;
        }
        if !self.tail.is_empty() {
            self.parts.push_back(self.tail.split().freeze());
        }
        self.parts.push_back(bytes.clone());
        self.bytes += bytes.len();
    }

    fn push_copy(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.bytes += bytes.len();
    }

    /// Fills `slices` with the front of the queue for a vectored write; gives how many are used.
    pub fn as_io_slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = Some(&self.tail[..]).filter(|tail| !tail.is_empty());
        let parts = self.parts.iter().map(|part| &part[..]).chain(tail);
        let mut used = 0;
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
            used += 1;
        }
        used
    }

    /// The first `count` bytes have been sent.
    pub fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes, "no more was sent than waited");
        self.bytes -= count;
        while let Some(part) = self.parts.front_mut() {
            if count < part.len() {
                bytes::Buf::advance(part, count);
                return;
            }
            count -= part.len();
            self.parts.pop_front();
        }
        bytes::Buf::advance(&mut self.tail, count);
    }
}

/// Fills in the head in front of a header, once both lengths are known.
fn finish_head(frame: &mut [u8], kind: FrameKind, group: GroupId, payload_bytes: usize) {
    let (head, header) = frame
        .split_first_chunk_mut::<FRAME_HEAD_BYTES>()
        .expect("the caller left room for the head");
    let length = |bytes: usize| u32::try_from(bytes).expect("frames are far below 4 GiB");
    head[..4].copy_from_slice(&FRAME_MAGIC);
    head[4] = FRAME_VERSION;
    head[5] = kind.code();
    head[6..8].copy_from_slice(&group.0.to_le_bytes());
    head[8..12].copy_from_slice(&length(header.len()).to_le_bytes());
    head[12..16].copy_from_slice(&length(payload_bytes).to_le_bytes());
    let checksum = frame_checksum(head, header);
    head[28..].copy_from_slice(&checksum.to_le_bytes());
}

#[cfg(test)]
mod tests;
