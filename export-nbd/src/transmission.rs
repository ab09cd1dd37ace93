//! The transmission phase: requests in, replies out, many at a time and in any order.
//!
//! Without IO: [`Transmission::handle_bytes`] takes what a client sent, [`Transmission::poll_submit`]
//! gives requests for the device, [`Transmission::handle_completion`] takes its results, and
//! [`Transmission::sending`] holds the replies. What a client can make it keep is bounded by
//! [`REQUESTS_IN_FLIGHT_MAX`] and [`BYTES_IN_FLIGHT_MAX`].

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use pss_core::payload::{LARGE_PAYLOAD_BYTES, Payload};
use pss_core::volume::device::{DeviceError, DeviceReply, DeviceRequest, DeviceResult, Extent};

use crate::error::{NbdError, device_error};
use crate::wire::{
    Command, DESCRIPTORS_MAX, PAYLOAD_BYTES_MAX, Request, WireError, command_flag as flag,
    simple_reply,
};
use pss_gateway::sending::SendQueue;

/// Most requests of one connection that are with the device or whose payload waits to be sent. The
/// kernel's client keeps 128, qemu 16, nbdcopy 64.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 512;
/// Most payload of one connection in either direction, bytes: two of the longest requests.
pub const BYTES_IN_FLIGHT_MAX: usize = 2 * PAYLOAD_BYTES_MAX as usize;

/// What the client and the server agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Terms {
    /// Size of the export, bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// READ is answered by structured replies.
    pub structured_replies: bool,
    /// BLOCK_STATUS is served.
    pub allocation_context: bool,
}

/// A request for the device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Submit {
    /// Comes back in [`Transmission::handle_completion`].
    pub token: u64,
    /// What.
    pub request: DeviceRequest,
}

/// Why no more requests are taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Ending {
    /// `NBD_CMD_DISC`.
    #[error("client disconnected")]
    Disconnected,
    /// The client closed, or reset, the connection.
    #[error("client closed the connection")]
    PeerClosed,
    /// Not a request; there is no way to find the next one.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The server stops.
    #[error("server stops")]
    ServerStops,
    /// The volume was deleted.
    #[error("volume was deleted")]
    DeviceGone,
}

/// The server's side of one connection after the handshake.
pub struct Transmission {
    terms: Terms,
    receiving: Receiving,
    ending: Option<Ending>,
    pending: Slots,
    /// Payload bytes of pending requests.
    pending_bytes: usize,
    submits: VecDeque<Submit>,
    sending: SendQueue,
}

/// What the next bytes of the client are.
enum Receiving {
    Header,
    /// Payload of a write that goes into the receive buffer.
    Payload(Write),
    /// Payload of a write that has memory of its own.
    OwnBuffer {
        write: Write,
        buffer: Payload,
    },
    /// Payload of a refused write; the reply follows it, as simple clients send all before they read.
    Refused {
        left: u32,
        cookie: u64,
        error: NbdError,
    },
}

#[derive(Clone, Copy)]
struct Write {
    cookie: u64,
    offset_bytes: u64,
    length_bytes: u32,
    fua: bool,
}

/// A request that the device has.
struct Pending {
    cookie: u64,
    offset_bytes: u64,
    length_bytes: u32,
    /// What it counts towards [`BYTES_IN_FLIGHT_MAX`].
    charged_bytes: u32,
    kind: Kind,
}

enum Kind {
    Read {
        unfragmented: bool,
    },
    /// Answered with success or an error.
    Plain {
        writes: bool,
    },
    Status(Box<Status>),
}

/// Descriptors found so far.
struct Status {
    one: bool,
    covered_bytes: u32,
    descriptors: Vec<(u32, bool)>,
}

impl Transmission {
    /// A connection right after the handshake.
    pub fn new(terms: Terms) -> Transmission {
        Transmission {
            terms,
            receiving: Receiving::Header,
            ending: None,
            pending: Slots::default(),
            pending_bytes: 0,
            submits: VecDeque::new(),
            sending: SendQueue::default(),
        }
    }

    /// The replies.
    pub fn sending(&mut self) -> &mut SendQueue {
        &mut self.sending
    }

    /// The next request for the device.
    pub fn poll_submit(&mut self) -> Option<Submit> {
        self.submits.pop_front()
    }

    /// Requests that the device has.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Takes no more requests. Those in flight are answered.
    pub fn end(&mut self, why: Ending) {
        self.ending.get_or_insert(why);
        self.receiving = Receiving::Header;
    }

    /// Why it takes no more requests.
    pub fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Whether everything is done and sent.
    pub fn is_finished(&self) -> bool {
        self.ending.is_some() && self.pending.len() == 0 && self.sending.is_empty()
    }

    /// Whether more bytes from the client could be used now, when `input` was not taken.
    pub fn wants_bytes(&self, input: &BytesMut) -> bool {
        let waits_for_room =
            || matches!(self.receiving, Receiving::Header) && input.len() >= Request::BYTES;
        self.ending.is_none() && !waits_for_room()
    }

    /// Where the next bytes of the client belong if not into the receive buffer.
    pub fn own_buffer(&mut self) -> Option<&mut Payload> {
        match &mut self.receiving {
            Receiving::OwnBuffer { buffer, .. } => Some(buffer),
            _ => None,
        }
    }

    /// Says that [`Transmission::own_buffer`] has more bytes.
    pub fn handle_own_buffer(&mut self) {
        match std::mem::replace(&mut self.receiving, Receiving::Header) {
            Receiving::OwnBuffer { write, buffer } if buffer.is_full() => {
                self.submit_write(write, buffer.freeze());
            }
            incomplete => self.receiving = incomplete,
        }
    }

    /// Takes what it can use from the front of `input`. What is left is an incomplete request, or
    /// waits until requests in flight are done and sent.
    pub fn handle_bytes(&mut self, input: &mut BytesMut) {
        loop {
            if self.ending.is_some() {
                return input.clear();
            }
            match &mut self.receiving {
                Receiving::Header => {
                    let Some(header) = input.first_chunk() else {
                        return;
                    };
                    match Request::decode(header) {
                        Ok(request) if !self.has_room(&request) => return,
                        Ok(request) => {
                            input.advance(Request::BYTES);
                            self.handle_request(request);
                        }
                        Err(error) => self.end(error.into()),
                    }
                }
                Receiving::Payload(write) => {
                    let length = write.length_bytes as usize;
                    if input.len() < length {
                        return;
                    }
                    let (write, data) = (*write, input.split_to(length).freeze());
                    self.receiving = Receiving::Header;
                    self.submit_write(write, data);
                }
                Receiving::OwnBuffer { buffer, .. } => {
                    let taken = buffer.fill(input);
                    input.advance(taken);
                    if !buffer.is_full() {
                        return;
                    }
                    self.handle_own_buffer();
                }
                Receiving::Refused {
                    left,
                    cookie,
                    error,
                } => {
                    let taken = input.len().min(*left as usize);
                    input.advance(taken);
                    *left -= taken as u32;
                    if *left > 0 {
                        return;
                    }
                    let (cookie, error) = (*cookie, *error);
                    self.receiving = Receiving::Header;
                    self.push_error(cookie, error, "");
                }
            }
        }
    }

    /// Whether a request can be taken without going over the bounds. A single one always can.
    fn has_room(&self, request: &Request) -> bool {
        let payload = match request.command {
            Command::Read | Command::Write => request.length_bytes.min(PAYLOAD_BYTES_MAX) as usize,
            _ => 0,
        };
        self.pending.len() + self.sending.bodies() < REQUESTS_IN_FLIGHT_MAX
            && self.pending_bytes + self.sending.length_bytes() + payload <= BYTES_IN_FLIGHT_MAX
    }

    fn handle_request(&mut self, request: Request) {
        if request.command == Command::Disconnect {
            return self.end(Ending::Disconnected);
        }
        match self.check(&request) {
            Ok(()) if request.length_bytes == 0 && request.command != Command::Flush => {
                self.push_done(&request);
            }
            Ok(()) => self.start(request),
            Err(error) if request.command == Command::Write && request.length_bytes > 0 => {
                self.receiving = Receiving::Refused {
                    left: request.length_bytes,
                    cookie: request.cookie,
                    error,
                };
            }
            Err(error) => self.push_error(request.cookie, error, ""),
        }
    }

    /// What can be refused without asking the device, in the order: command and flags, permission,
    /// length, range.
    fn check(&self, request: &Request) -> Result<(), NbdError> {
        // "the server MUST accept all commands with this bit set" (FUA).
        let (known_flags, writes) = match request.command {
            Command::Read if self.terms.structured_replies => (flag::FUA | flag::DF, false),
            Command::Read | Command::Flush | Command::Cache => (flag::FUA, false),
            Command::Write | Command::Trim => (flag::FUA, true),
            Command::WriteZeroes => (flag::FUA | flag::NO_HOLE | flag::FAST_ZERO, true),
            Command::BlockStatus if self.terms.allocation_context => {
                (flag::FUA | flag::REQ_ONE, false)
            }
            Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => {
                return Err(NbdError::Invalid);
            }
        };
        if request.flags & !known_flags != 0 {
            return Err(NbdError::Invalid);
        }
        if writes && self.terms.read_only {
            return Err(NbdError::NotPermitted);
        }
        let length = request.length_bytes;
        match request.command {
            Command::Read | Command::Write if length > PAYLOAD_BYTES_MAX => {
                return Err(NbdError::Invalid);
            }
            // "length and offset are reserved, and MUST be set to all-zero".
            Command::Flush if (length, request.offset_bytes) != (0, 0) => {
                return Err(NbdError::Invalid);
            }
            // A descriptor of length zero is forbidden, so there is no answer to give.
            Command::BlockStatus if length == 0 => return Err(NbdError::Invalid),
            _ => {}
        }
        let end = request.offset_bytes.checked_add(u64::from(length));
        if end.is_none_or(|end| end > self.terms.size_bytes) {
            // TRIM past the end is EINVAL, as it puts nothing there.
            let fills = writes && request.command != Command::Trim;
            return Err(device_error(DeviceError::OutOfRange, fills));
        }
        // Zeroes that keep their space are written like data: that is never faster.
        let slow = flag::FAST_ZERO | flag::NO_HOLE;
        if request.command == Command::WriteZeroes && request.flags & slow == slow {
            return Err(NbdError::NotSupported);
        }
        Ok(())
    }

    fn start(&mut self, request: Request) {
        let Request {
            cookie,
            offset_bytes,
            length_bytes,
            ..
        } = request;
        let fua = request.flags & flag::FUA != 0;
        let length = u64::from(length_bytes);
        let (kind, device_request) = match request.command {
            Command::Write => {
                let write = Write {
                    cookie,
                    offset_bytes,
                    length_bytes,
                    fua,
                };
                return self.receive_payload(write);
            }
            Command::Read => (
                Kind::Read {
                    unfragmented: request.flags & flag::DF != 0,
                },
                DeviceRequest::Read {
                    offset_bytes,
                    length_bytes,
                },
            ),
            Command::Flush => (Kind::Plain { writes: false }, DeviceRequest::Flush),
            Command::Trim => (
                Kind::Plain { writes: false },
                DeviceRequest::Trim {
                    offset_bytes,
                    length_bytes: length,
                    fua,
                },
            ),
            Command::Cache => (
                Kind::Plain { writes: false },
                DeviceRequest::Prefetch {
                    offset_bytes,
                    length_bytes: length,
                },
            ),
            Command::WriteZeroes => (
                Kind::Plain { writes: true },
                DeviceRequest::WriteZeroes {
                    offset_bytes,
                    length_bytes: length,
                    allocate: request.flags & flag::NO_HOLE != 0,
                    fua,
                },
            ),
            Command::BlockStatus => (
                Kind::Status(Box::new(Status {
                    one: request.flags & flag::REQ_ONE != 0,
                    covered_bytes: 0,
                    descriptors: Vec::new(),
                })),
                DeviceRequest::Extents {
                    offset_bytes,
                    length_bytes: length,
                },
            ),
            Command::Disconnect | Command::Unknown(_) => {
                return self.push_error(cookie, NbdError::Invalid, "");
            }
        };
        let charged_bytes = match kind {
            Kind::Read { .. } => length_bytes,
            _ => 0,
        };
        self.submit(
            Pending {
                cookie,
                offset_bytes,
                length_bytes,
                charged_bytes,
                kind,
            },
            device_request,
        );
    }

    fn receive_payload(&mut self, write: Write) {
        let length = write.length_bytes as usize;
        self.receiving = match length < LARGE_PAYLOAD_BYTES {
            true => Receiving::Payload(write),
            false => Receiving::OwnBuffer {
                write,
                buffer: Payload::with_length(length),
            },
        };
    }

    fn submit_write(&mut self, write: Write, data: Bytes) {
        let pending = Pending {
            cookie: write.cookie,
            offset_bytes: write.offset_bytes,
            length_bytes: write.length_bytes,
            charged_bytes: write.length_bytes,
            kind: Kind::Plain { writes: true },
        };
        let request = DeviceRequest::Write {
            offset_bytes: write.offset_bytes,
            data,
            fua: write.fua,
        };
        self.submit(pending, request);
    }

    fn submit(&mut self, pending: Pending, request: DeviceRequest) {
        self.pending_bytes += pending.charged_bytes as usize;
        let token = self.pending.insert(pending);
        self.submits.push_back(Submit { token, request });
    }

    /// The device's result for a request.
    pub fn handle_completion(&mut self, token: u64, result: DeviceResult) {
        let Some(mut pending) = self.pending.remove(token) else {
            return;
        };
        self.pending_bytes -= pending.charged_bytes as usize;
        match (&mut pending.kind, result) {
            (Kind::Read { unfragmented }, Ok(DeviceReply::Data(parts))) => {
                let unfragmented = *unfragmented;
                self.push_read(&pending, &parts, unfragmented);
            }
            (Kind::Plain { .. }, Ok(DeviceReply::Done)) => {
                self.sending.push_head(&simple_reply(0, pending.cookie));
            }
            (Kind::Status(status), Ok(DeviceReply::Extents(extents))) => {
                status.add(&extents, pending.length_bytes);
                self.continue_status(pending);
            }
            (kind, Err(error)) => {
                let writes = matches!(kind, Kind::Plain { writes: true });
                let message = error.to_string();
                self.push_error(pending.cookie, device_error(error, writes), &message);
            }
            (_, Ok(_)) => self.push_bad_answer(&pending),
        }
    }

    /// Asks for the rest of the range, or answers. "The server MAY return fewer descriptors in the reply
    /// than would be required to fully specify the whole range": so it does when they are too many,
    /// or when other replies of this connection already take the memory it may have.
    fn continue_status(&mut self, mut pending: Pending) {
        let Kind::Status(status) = &mut pending.kind else {
            return;
        };
        let found_bytes = status.descriptors.len() * 8;
        let full =
            self.pending_bytes + self.sending.length_bytes() + found_bytes > BYTES_IN_FLIGHT_MAX;
        let done = status.covered_bytes == pending.length_bytes
            || status.descriptors.len() >= DESCRIPTORS_MAX
            || (status.one && !status.descriptors.is_empty());
        if !(done || full) {
            let request = DeviceRequest::Extents {
                offset_bytes: pending.offset_bytes + u64::from(status.covered_bytes),
                length_bytes: u64::from(pending.length_bytes - status.covered_bytes),
            };
            pending.charged_bytes = found_bytes as u32;
            return self.submit(pending, request);
        }
        self.push_status(pending.cookie, &status.descriptors);
    }
}

impl Status {
    /// Appends extents up to the end of the request.
    fn add(&mut self, extents: &[Extent], length_bytes: u32) {
        for extent in extents {
            let left = length_bytes - self.covered_bytes;
            let length = u32::try_from(extent.length_bytes).map_or(left, |length| length.min(left));
            if !self.push(length, extent.allocated) {
                return;
            }
        }
        if extents.iter().all(|extent| extent.length_bytes == 0) {
            // A device that says nothing must not be asked for ever; "status 0" is always true.
            self.push(length_bytes - self.covered_bytes, true);
        }
    }

    /// False if there is no place for one more descriptor.
    fn push(&mut self, length: u32, allocated: bool) -> bool {
        let most = if self.one { 1 } else { DESCRIPTORS_MAX };
        let count = self.descriptors.len();
        match self.descriptors.last_mut() {
            _ if length == 0 => {}
            Some((last, same)) if *same == allocated => *last += length,
            _ if count >= most => return false,
            _ => self.descriptors.push((length, allocated)),
        }
        self.covered_bytes += length;
        true
    }
}

/// Requests by token.
#[derive(Default)]
struct Slots {
    slots: Vec<Option<Pending>>,
    free: Vec<u64>,
}

impl Slots {
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn insert(&mut self, pending: Pending) -> u64 {
        match self.free.pop() {
            Some(token) => {
                self.slots[token as usize] = Some(pending);
                token
            }
            None => {
                self.slots.push(Some(pending));
                self.slots.len() as u64 - 1
            }
        }
    }

    fn remove(&mut self, token: u64) -> Option<Pending> {
        let slot = usize::try_from(token).ok()?;
        let pending = self.slots.get_mut(slot)?.take()?;
        self.free.push(token);
        Some(pending)
    }
}

mod replies;
#[cfg(test)]
mod tests;
