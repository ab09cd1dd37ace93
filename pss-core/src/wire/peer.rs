//! Messages between servers, in TCP frames and in UDP datagrams.
//!
//! A message is its code and its fields. Messages with entries carry the entries' headers among the
//! fields and the payload of all entries, in order, behind: in a frame, entries are sent and received
//! without a copy of their payload.
//!
//! Datagram, little-endian:
//!
//! | bytes | field                                                                  |
//! |-------|------------------------------------------------------------------------|
//! | 0-3   | magic `PSSD`                                                           |
//! | 4     | format version, 1                                                      |
//! | 5     | 1 with HMAC, 0 with CRC                                                |
//! | 6-7   | group                                                                  |
//! | 8-23  | cell                                                                   |
//! | 24-25 | sender, receiver                                                       |
//! | 26-27 | zero                                                                   |
//! | 28-35 | incarnation of the sender                                              |
//! | 36-43 | boot: random number that the sender chose when its process started     |
//! | 44-51 | sequence: counts the datagrams of one boot, from 1                     |
//! | 52-   | message                                                                |
//! | end   | HMAC-SHA-256 of all before, first 16 bytes; or CRC32C of all before    |

use std::collections::VecDeque;

use bytes::Bytes;
use hmac::Mac;

use crate::entry::{ENTRY_HEADER_MAX, ENTRY_PAYLOAD_MAX, Entry};
use crate::key::CellId;
use crate::paxos::message::{BLOCKS_ASKED_MAX, ChunkSummary, Message, Progress, SyncMessage};
use crate::time::Instant;
use crate::types::{
    Admitted, BLOCK_BYTES, Ballot, ChunkIndex, EntryId, GroupId, Incarnation, SERVERS_MAX,
    ServerId, Slot, Standing, VolumeId,
};
use crate::wire::DecodeError;
use crate::wire::auth::MacKey;
use crate::wire::codec::{Input, Output};
use crate::wire::frame::{Frame, FrameKind, SendQueue};
use crate::wire::survey;

/// Most bytes of a datagram: fits the smallest usual MTU with room for tunnels.
pub const DATAGRAM_BYTES_MAX: usize = 1400;

const DATAGRAM_MAGIC: [u8; 4] = *b"PSSD";
const DATAGRAM_VERSION: u8 = 1;
const DATAGRAM_HEAD_BYTES: usize = 52;
const MAC_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// Shortest encoded header of an entry with its two lengths; bounds what a count can allocate.
const ENTRY_BYTES_MIN: usize = 8 + 30;
const SUMMARY_BYTES: usize = 16;

/// Appends a message as a frame.
pub fn encode_frame(message: &Message, out: &mut SendQueue) {
    let write = |header: &mut Vec<u8>| encode(message, header);
    let payload = Payload::of(message);
    out.frame(FrameKind::Peer, GroupId(0), write, payload);
}

/// Reads a message from a [`FrameKind::Peer`] frame. Payloads of entries are slices of the frame's.
///
/// Block checksums of entries are *not* verified here: a receiver calls [`Entry::verify`] once for
/// each entry that it is going to use, before that goes to disk or into the replica; entries that it
/// has already are dropped without the cost. The payload of `Base`, `Chunk` and `Blocks` is verified.
///
/// # Errors
/// [`DecodeError`]; the connection must be closed then.
pub fn decode_frame(frame: Frame) -> Result<Message, DecodeError> {
    decode(&frame.header, frame.payload)
}

/// The payload parts of a message.
#[derive(Clone)]
enum Payload<'a> {
    /// What is left of the entries, and of the parts of the entry before them.
    Entries(std::slice::Iter<'a, Entry>, EntryParts<'a>),
    Whole(Option<&'a Bytes>),
}

type EntryParts<'a> = std::slice::Iter<'a, crate::entry::Command>;

impl<'a> Payload<'a> {
    fn of(message: &'a Message) -> Payload<'a> {
        match message {
            Message::Accept { entries, .. }
            | Message::Tail { entries, .. }
            | Message::Chosen { entries, .. } => Payload::Entries(entries.iter(), [].iter()),
            Message::Sync(SyncMessage::Base { state, .. }) => Payload::Whole(Some(state)),
            Message::Sync(SyncMessage::Chunk { image, .. }) => Payload::Whole(Some(image)),
            Message::Sync(SyncMessage::Blocks { data, .. }) => Payload::Whole(Some(data)),
            _ => Payload::Whole(None),
        }
    }
}

impl<'a> Iterator for Payload<'a> {
    type Item = &'a Bytes;

    fn next(&mut self) -> Option<&'a Bytes> {
        let (entries, commands) = match self {
            Payload::Whole(part) => return part.take(),
            Payload::Entries(entries, commands) => (entries, commands),
        };
        loop {
            for command in commands.by_ref() {
                if let crate::entry::Op::Write { payload, .. } = &command.op {
                    return Some(payload);
                }
            }
            *commands = entries.next()?.commands.iter();
        }
    }
}

/// Appends a message without its payload.
fn encode(message: &Message, out: &mut Vec<u8>) {
    let mut put = Output(out);
    match message {
        Message::PreCheck { ballot, last } => {
            put.u8(1);
            put.ballot(*ballot);
            put.entry_id(*last);
        }
        Message::PreCheckAnswer {
            ballot,
            granted,
            promised,
            last,
        } => {
            put.u8(2);
            put.ballot(*ballot);
            put.u8(u8::from(*granted));
            put.ballot(*promised);
            put.entry_id(*last);
        }
        Message::Prepare { ballot, released } => {
            put.u8(3);
            put.ballot(*ballot);
            put.u8(u8::from(released.is_some()));
            put.ballot(released.unwrap_or_default());
        }
        Message::Promise {
            ballot,
            last,
            certain,
            have,
            chosen,
            admitted,
        } => {
            // Code 4 is that of programs that do not tell lives apart.
            let tells_lives = *admitted != Admitted::default();
            put.u8(if tells_lives { 19 } else { 4 });
            put.ballot(*ballot);
            put.entry_id(*last);
            put.entry_id(*certain);
            put.entry_id(*have);
            put.u64(chosen.0);
            if tells_lives {
                put.admitted(admitted);
            }
        }
        Message::Nack { ballot, promised } => {
            put.u8(5);
            put.ballot(*ballot);
            put.ballot(*promised);
        }
        Message::Accept {
            ballot,
            prev,
            entries,
            chosen,
        } => {
            put.u8(6);
            put.ballot(*ballot);
            put.entry_id(*prev);
            put.u64(chosen.0);
            put.entries(entries);
        }
        Message::Accepted { ballot, durable } => {
            put.u8(7);
            put.ballot(*ballot);
            put.u64(durable.0);
        }
        Message::AcceptRejected {
            ballot,
            resume_after,
        } => {
            put.u8(8);
            put.ballot(*ballot);
            put.u64(resume_after.0);
        }
        Message::Heartbeat {
            ballot,
            sent,
            chosen,
            last,
        } => {
            put.u8(9);
            put.ballot(*ballot);
            put.u64(sent.0);
            put.u64(chosen.0);
            put.u64(last.0);
        }
        Message::HeartbeatAck {
            ballot,
            sent,
            durable,
            received,
            progress,
        } => {
            put.u8(10);
            put.ballot(*ballot);
            put.u64(sent.0);
            put.u64(durable.0);
            put.u64(received.0);
            put.progress(progress);
        }
        Message::HandOver { ballot } => {
            put.u8(11);
            put.ballot(*ballot);
        }
        Message::FetchTail { ballot, after } => {
            put.u8(12);
            put.ballot(*ballot);
            put.u64(after.0);
        }
        Message::Tail {
            ballot,
            prev,
            entries,
            last,
        } => {
            put.u8(13);
            put.ballot(*ballot);
            put.entry_id(*prev);
            put.entry_id(*last);
            put.entries(entries);
        }
        Message::CatchUp { after } => {
            put.u8(14);
            put.u64(after.0);
        }
        Message::Chosen {
            prev,
            entries,
            chosen,
        } => {
            put.u8(15);
            put.entry_id(*prev);
            put.u64(chosen.0);
            put.entries(entries);
        }
        Message::LogGone { first, chosen } => {
            put.u8(16);
            put.u64(first.0);
            put.u64(chosen.0);
        }
        Message::Progress(progress) => {
            put.u8(17);
            put.progress(progress);
        }
        Message::Rejoin => put.u8(18),
        Message::Absent { ballot } => {
            put.u8(20);
            put.ballot(*ballot);
        }
        Message::Standing {
            standing,
            asks,
            epoch,
        } => {
            put.u8(21);
            put.standing(standing);
            put.u8(u8::from(*asks));
            put.u64(*epoch);
        }
        Message::Seen { mark, alive, epoch } => {
            put.u8(22);
            put.standing(mark);
            put.u8(u8::from(*alive));
            put.u64(*epoch);
        }
        Message::Sync(message) => encode_sync(message, &mut put),
    }
}

fn encode_sync(message: &SyncMessage, put: &mut Output<'_>) {
    match message {
        SyncMessage::RequestBase => put.u8(32),
        SyncMessage::Base { base, state } => {
            put.u8(33);
            put.entry_id(*base);
            put.u32(crc32c::crc32c(state));
        }
        SyncMessage::RequestList {
            at_least,
            volume,
            from,
        } => {
            put.u8(34);
            put.u64(at_least.0);
            put.u32(volume.0);
            put.u32(from.0);
        }
        SyncMessage::List {
            as_of,
            volume,
            from,
            until,
            total,
            chunks,
        } => {
            // Code 35 is that of programs that do not count.
            put.u8(if *total > 0 { 39 } else { 35 });
            if *total > 0 {
                put.u64(*total);
            }
            put.u64(as_of.0);
            put.u32(volume.0);
            put.u32(from.0);
            put.u8(u8::from(until.is_some()));
            put.u32(until.unwrap_or_default().0);
            put.u32(chunks.len() as u32);
            for chunk in chunks {
                put.u32(chunk.chunk.0);
                put.u64(chunk.last_slot.0);
                put.u32(chunk.digest);
            }
        }
        SyncMessage::RequestChunk {
            at_least,
            volume,
            chunk,
        } => {
            put.u8(36);
            put.u64(at_least.0);
            put.u32(volume.0);
            put.u32(chunk.0);
        }
        SyncMessage::Chunk {
            as_of,
            volume,
            chunk,
            image,
        } => {
            put.u8(37);
            put.u64(as_of.0);
            put.u32(volume.0);
            put.u32(chunk.0);
            put.u32(crc32c::crc32c(image));
        }
        SyncMessage::Refused => put.u8(38),
        SyncMessage::RequestBlocks {
            at_least,
            volume,
            blocks,
        } => {
            put.u8(40);
            put.u64(at_least.0);
            put.u32(volume.0);
            put.blocks(blocks);
        }
        SyncMessage::Blocks {
            as_of,
            volume,
            damaged,
            blocks,
            data,
        } => {
            put.u8(41);
            put.u64(as_of.0);
            put.u32(volume.0);
            put.blocks(damaged);
            put.blocks(blocks);
            put.u32(crc32c::crc32c(data));
        }
        SyncMessage::BlocksRefused { volume } => {
            put.u8(42);
            put.u32(volume.0);
        }
        SyncMessage::TakePoint(_)
        | SyncMessage::Point(_)
        | SyncMessage::Mend(_)
        | SyncMessage::Mended(_) => survey::encode(message, put),
    }
}

fn decode(header: &[u8], payload: Bytes) -> Result<Message, DecodeError> {
    let input = &mut Input(header);
    let mut payload = Some(payload);
    let message = match input.u8()? {
        1 => Message::PreCheck {
            ballot: input.ballot()?,
            last: input.entry_id()?,
        },
        2 => Message::PreCheckAnswer {
            ballot: input.ballot()?,
            granted: input.flag()?,
            promised: input.ballot()?,
            last: input.entry_id()?,
        },
        3 => {
            let ballot = input.ballot()?;
            let is_released = input.flag()?;
            let released = input.ballot()?;
            Message::Prepare {
                ballot,
                released: is_released.then_some(released),
            }
        }
        code @ (4 | 19) => Message::Promise {
            ballot: input.ballot()?,
            last: input.entry_id()?,
            certain: input.entry_id()?,
            have: input.entry_id()?,
            chosen: Slot(input.u64()?),
            admitted: match code {
                19 => input.admitted()?,
                _ => Admitted::default(),
            },
        },
        5 => Message::Nack {
            ballot: input.ballot()?,
            promised: input.ballot()?,
        },
        6 => Message::Accept {
            ballot: input.ballot()?,
            prev: input.entry_id()?,
            chosen: Slot(input.u64()?),
            entries: input.entries(payload.take())?,
        },
        7 => Message::Accepted {
            ballot: input.ballot()?,
            durable: Slot(input.u64()?),
        },
        8 => Message::AcceptRejected {
            ballot: input.ballot()?,
            resume_after: Slot(input.u64()?),
        },
        9 => Message::Heartbeat {
            ballot: input.ballot()?,
            sent: Instant(input.u64()?),
            chosen: Slot(input.u64()?),
            last: Slot(input.u64()?),
        },
        10 => Message::HeartbeatAck {
            ballot: input.ballot()?,
            sent: Instant(input.u64()?),
            durable: Slot(input.u64()?),
            received: Slot(input.u64()?),
            progress: input.progress()?,
        },
        11 => Message::HandOver {
            ballot: input.ballot()?,
        },
        12 => Message::FetchTail {
            ballot: input.ballot()?,
            after: Slot(input.u64()?),
        },
        13 => Message::Tail {
            ballot: input.ballot()?,
            prev: input.entry_id()?,
            last: input.entry_id()?,
            entries: input.entries(payload.take())?,
        },
        14 => Message::CatchUp {
            after: Slot(input.u64()?),
        },
        15 => Message::Chosen {
            prev: input.entry_id()?,
            chosen: Slot(input.u64()?),
            entries: input.entries(payload.take())?,
        },
        16 => Message::LogGone {
            first: Slot(input.u64()?),
            chosen: Slot(input.u64()?),
        },
        17 => Message::Progress(input.progress()?),
        18 => Message::Rejoin,
        20 => Message::Absent {
            ballot: input.ballot()?,
        },
        21 => Message::Standing {
            standing: input.standing()?,
            asks: input.flag()?,
            epoch: input.u64()?,
        },
        22 => Message::Seen {
            mark: input.standing()?,
            alive: input.flag()?,
            epoch: input.u64()?,
        },
        code => Message::Sync(decode_sync(code, input, &mut payload)?),
    };
    input.end()?;
    match payload {
        Some(payload) if !payload.is_empty() => Err(DecodeError::PayloadLength {
            have: payload.len() as u64,
            want: 0,
        }),
        _ => Ok(message),
    }
}

fn decode_sync(
    code: u8,
    input: &mut Input<'_>,
    payload: &mut Option<Bytes>,
) -> Result<SyncMessage, DecodeError> {
    Ok(match code {
        32 => SyncMessage::RequestBase,
        33 => SyncMessage::Base {
            base: input.entry_id()?,
            state: input.checked(payload.take())?,
        },
        34 => SyncMessage::RequestList {
            at_least: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            from: ChunkIndex(input.u32()?),
        },
        35 | 39 => {
            let total = match code {
                39 => input.u64()?,
                _ => 0,
            };
            let as_of = Slot(input.u64()?);
            let volume = VolumeId(input.u32()?);
            let from = ChunkIndex(input.u32()?);
            let is_until = input.flag()?;
            let until = ChunkIndex(input.u32()?);
            let count = input.count(SUMMARY_BYTES)?;
            let mut chunks = Vec::with_capacity(count);
            for _ in 0..count {
                chunks.push(ChunkSummary {
                    chunk: ChunkIndex(input.u32()?),
                    last_slot: Slot(input.u64()?),
                    digest: input.u32()?,
                });
            }
            SyncMessage::List {
                as_of,
                volume,
                from,
                until: is_until.then_some(until),
                total,
                chunks,
            }
        }
        36 => SyncMessage::RequestChunk {
            at_least: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            chunk: ChunkIndex(input.u32()?),
        },
        37 => SyncMessage::Chunk {
            as_of: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            chunk: ChunkIndex(input.u32()?),
            image: input.checked(payload.take())?,
        },
        38 => SyncMessage::Refused,
        40 => SyncMessage::RequestBlocks {
            at_least: Slot(input.u64()?),
            volume: VolumeId(input.u32()?),
            blocks: input.blocks()?,
        },
        41 => {
            let (as_of, volume) = (Slot(input.u64()?), VolumeId(input.u32()?));
            let (damaged, blocks) = (input.blocks()?, input.blocks()?);
            let data = input.checked(payload.take())?;
            if data.len() != blocks.len() * BLOCK_BYTES {
                return Err(DecodeError::PayloadLength {
                    have: data.len() as u64,
                    want: (blocks.len() * BLOCK_BYTES) as u64,
                });
            }
            SyncMessage::Blocks {
                as_of,
                volume,
                damaged,
                blocks,
                data,
            }
        }
        42 => SyncMessage::BlocksRefused {
            volume: VolumeId(input.u32()?),
        },
        code => survey::decode(code, input)?,
    })
}

impl Output<'_> {
    fn ballot(&mut self, ballot: Ballot) {
        self.u64(ballot.number);
        self.u8(ballot.server.0);
    }

    fn entry_id(&mut self, id: EntryId) {
        self.ballot(id.ballot);
        self.u64(id.slot.0);
    }

    fn progress(&mut self, progress: &Progress) {
        self.u64(progress.chosen.0);
        self.u64(progress.applied.0);
        self.u64(progress.log_first.0);
        self.u64(progress.free_bytes);
        self.u8(u8::from(progress.installing));
    }

    fn standing(&mut self, standing: &Standing) {
        self.u64(standing.life.0);
        self.ballot(standing.promised);
        self.entry_id(standing.acknowledged);
    }

    /// The incarnation of each server that counts.
    fn admitted(&mut self, admitted: &Admitted) {
        for (_, incarnation) in admitted.iter() {
            self.u64(incarnation.0);
        }
    }

    /// A count, then the numbers of blocks.
    fn blocks(&mut self, blocks: &[u64]) {
        self.u32(blocks.len() as u32);
        for block in blocks {
            self.u64(*block);
        }
    }

    /// A count, then per entry: header length, payload length, header.
    fn entries(&mut self, entries: &[Entry]) {
        self.u32(entries.len() as u32);
        for entry in entries {
            let at = self.0.len();
            self.u32(0);
            self.u32(entry.payload_bytes() as u32);
            entry.encode_header(self.0);
            let header_bytes = (self.0.len() - at - 8) as u32;
            self.0[at..at + 4].copy_from_slice(&header_bytes.to_le_bytes());
        }
    }
}

impl Input<'_> {
    fn ballot(&mut self) -> Result<Ballot, DecodeError> {
        Ok(Ballot {
            number: self.u64()?,
            server: ServerId(self.u8()?),
        })
    }

    fn entry_id(&mut self) -> Result<EntryId, DecodeError> {
        Ok(EntryId {
            ballot: self.ballot()?,
            slot: Slot(self.u64()?),
        })
    }

    fn progress(&mut self) -> Result<Progress, DecodeError> {
        Ok(Progress {
            chosen: Slot(self.u64()?),
            applied: Slot(self.u64()?),
            log_first: Slot(self.u64()?),
            free_bytes: self.u64()?,
            installing: self.flag()?,
        })
    }

    fn standing(&mut self) -> Result<Standing, DecodeError> {
        Ok(Standing {
            life: Incarnation(self.u64()?),
            promised: self.ballot()?,
            acknowledged: self.entry_id()?,
        })
    }

    fn admitted(&mut self) -> Result<Admitted, DecodeError> {
        let mut admitted = Admitted::default();
        for server in (0..SERVERS_MAX as u8).map(ServerId) {
            admitted.admit(server, Incarnation(self.u64()?));
        }
        Ok(admitted)
    }

    fn blocks(&mut self) -> Result<Vec<u64>, DecodeError> {
        let count = self.count(8)?;
        limit("list of blocks", count, BLOCKS_ASKED_MAX)?;
        (0..count).map(|_| self.u64()).collect()
    }

    fn entries(&mut self, payload: Option<Bytes>) -> Result<Vec<Entry>, DecodeError> {
        let mut payload = payload.unwrap_or_default();
        let count = self.count(ENTRY_BYTES_MIN)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let header_bytes = self.u32()? as usize;
            let payload_bytes = self.u32()? as usize;
            limit("entry header", header_bytes, ENTRY_HEADER_MAX)?;
            limit("entry payload", payload_bytes, ENTRY_PAYLOAD_MAX)?;
            let header = self.bytes(header_bytes)?;
            if payload_bytes > payload.len() {
                return Err(DecodeError::PayloadLength {
                    have: payload.len() as u64,
                    want: payload_bytes as u64,
                });
            }
            entries.push(Entry::decode(header, payload.split_to(payload_bytes))?);
        }
        if payload.is_empty() {
            Ok(entries)
        } else {
            Err(DecodeError::Trailing)
        }
    }

    /// The whole payload, whose CRC32C comes next.
    fn checked(&mut self, payload: Option<Bytes>) -> Result<Bytes, DecodeError> {
        let payload = payload.unwrap_or_default();
        if crc32c::crc32c(&payload) != self.u32()? {
            return Err(DecodeError::Checksum);
        }
        Ok(payload)
    }
}

fn limit(what: &'static str, have: usize, most: usize) -> Result<(), DecodeError> {
    if have <= most {
        return Ok(());
    }
    Err(DecodeError::TooLong {
        what,
        have: have as u64,
        most: most as u64,
    })
}

/// Why a datagram is dropped.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DatagramError {
    /// Too short for its fields.
    #[error("datagram is cut short")]
    Truncated,
    /// No datagram of this protocol.
    #[error("not a PSS datagram")]
    Magic,
    /// Of another version.
    #[error("datagram of version {0}, this program knows version {DATAGRAM_VERSION}")]
    Version(u8),
    /// The sender has a cell key and we have none.
    #[error("datagram is signed with a cell key, and none is configured here")]
    KeyMissing,
    /// The sender has no cell key and we have one.
    #[error("datagram is not signed, and a cell key is configured here")]
    NotSigned,
    /// The HMAC is wrong: another key, or a forgery.
    #[error("datagram is signed with another cell key")]
    Signature,
    /// The CRC is wrong.
    #[error("datagram checksum mismatch")]
    Checksum,
    /// Sent in another cell.
    #[error("datagram of another cell, {0}")]
    OtherCell(CellId),
    /// For another server, or from one that cannot be.
    #[error("datagram from server {from} to server {to}")]
    OtherServer {
        /// Sender.
        from: ServerId,
        /// Receiver.
        to: ServerId,
    },
    /// Seen before, or too old to tell.
    #[error("datagram {sequence} of server {from} was seen before")]
    Replayed {
        /// Sender.
        from: ServerId,
        /// Its number.
        sequence: u64,
    },
    /// The message in it is malformed.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// The message cannot be sent as a datagram: it carries entries or chunks, or is too long.
    #[error("message does not fit a datagram")]
    NoDatagram,
}

/// A datagram that was received and found good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Datagram {
    /// Sender.
    pub from: ServerId,
    /// Life of the sender's data directory. The caller drops older ones than it knows.
    pub incarnation: Incarnation,
    /// Names the sender's process.
    pub boot: u64,
    /// What it says.
    pub message: Message,
}

/// Makes and reads the datagrams of one server. One per process: it counts what it sends and
/// remembers what it has received.
#[derive(Debug)]
pub struct Datagrams {
    cell: CellId,
    own: ServerId,
    incarnation: Incarnation,
    boot: u64,
    key: Option<MacKey>,
    sent: u64,
    received: [ReplayWindow; SERVERS_MAX],
}

impl Datagrams {
    /// For the server `own`; `boot` is a random number, new for each start of the process.
    pub fn new(
        cell: CellId,
        own: ServerId,
        incarnation: Incarnation,
        boot: u64,
        key: Option<MacKey>,
    ) -> Datagrams {
        Datagrams {
            cell,
            own,
            incarnation,
            boot,
            key,
            sent: 0,
            received: Default::default(),
        }
    }

    /// From now on for another life of this server's data directory.
    pub fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// Replaces the content of `out` by a datagram.
    ///
    /// # Errors
    /// [`DatagramError::NoDatagram`] if the message has to go by TCP.
    pub fn encode(
        &mut self,
        to: ServerId,
        message: &Message,
        out: &mut Vec<u8>,
    ) -> Result<(), DatagramError> {
        if !message.is_datagram() {
            return Err(DatagramError::NoDatagram);
        }
        self.sent += 1;
        out.clear();
        out.extend_from_slice(&DATAGRAM_MAGIC);
        out.push(DATAGRAM_VERSION);
        out.push(u8::from(self.key.is_some()));
        out.extend_from_slice(&GroupId(0).0.to_le_bytes());
        out.extend_from_slice(&self.cell.0);
        out.extend_from_slice(&[self.own.0, to.0, 0, 0]);
        out.extend_from_slice(&self.incarnation.0.to_le_bytes());
        out.extend_from_slice(&self.boot.to_le_bytes());
        out.extend_from_slice(&self.sent.to_le_bytes());
        encode(message, out);
        match &self.key {
            Some(key) => {
                let mac = key.over(&[out.as_slice()]).finalize().into_bytes();
                out.extend_from_slice(&mac[..MAC_BYTES]);
            }
            None => out.extend_from_slice(&crc32c::crc32c(out).to_le_bytes()),
        }
        if out.len() > DATAGRAM_BYTES_MAX {
            return Err(DatagramError::NoDatagram);
        }
        Ok(())
    }

    /// Reads a datagram that was received.
    ///
    /// # Errors
    /// [`DatagramError`]: drop it.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Datagram, DatagramError> {
        let signed = self.verify(bytes)?;
        let input = &mut Input(&signed[8..]);
        let truncated = |_| DatagramError::Truncated;
        let cell = CellId(input.array().map_err(truncated)?);
        let [from, to, _, _] = input.array().map_err(truncated)?;
        let incarnation = Incarnation(input.u64().map_err(truncated)?);
        let boot = input.u64().map_err(truncated)?;
        let sequence = input.u64().map_err(truncated)?;
        if cell != self.cell {
            return Err(DatagramError::OtherCell(cell));
        }
        let (from, to) = (ServerId(from), ServerId(to));
        let window = self.received.get_mut(usize::from(from.0));
        let (Some(window), true) = (window, to == self.own && from != self.own) else {
            return Err(DatagramError::OtherServer { from, to });
        };
        let message = decode(input.0, Bytes::new())?;
        if !message.is_datagram() {
            return Err(DatagramError::NoDatagram);
        }
        if !window.admit(boot, sequence) {
            return Err(DatagramError::Replayed { from, sequence });
        }
        Ok(Datagram {
            from,
            incarnation,
            boot,
            message,
        })
    }

    /// Checks everything that protects the bytes; gives them without HMAC or CRC.
    fn verify<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], DatagramError> {
        let Some((magic, rest)) = bytes.split_first_chunk::<4>() else {
            return Err(DatagramError::Truncated);
        };
        if *magic != DATAGRAM_MAGIC {
            return Err(DatagramError::Magic);
        }
        let [version, is_signed, ..] = *rest else {
            return Err(DatagramError::Truncated);
        };
        if version != DATAGRAM_VERSION {
            return Err(DatagramError::Version(version));
        }
        let end_bytes = match (is_signed, &self.key) {
            (1, Some(_)) => MAC_BYTES,
            (1, None) => return Err(DatagramError::KeyMissing),
            (_, Some(_)) => return Err(DatagramError::NotSigned),
            (_, None) => CRC_BYTES,
        };
        let Some(message_end) = bytes
            .len()
            .checked_sub(end_bytes)
            .filter(|end| *end > DATAGRAM_HEAD_BYTES)
        else {
            return Err(DatagramError::Truncated);
        };
        let (signed, end) = bytes.split_at(message_end);
        match &self.key {
            Some(key) => key
                .over(&[signed])
                .verify_truncated_left(end)
                .map_err(|_| DatagramError::Signature)?,
            None if crc32c::crc32c(signed).to_le_bytes()[..] != *end => {
                return Err(DatagramError::Checksum);
            }
            None => {}
        }
        Ok(signed)
    }
}

/// Remembers which datagrams of one sender were received.
///
/// Per boot of the sender, for the boots heard last: what lies more than 1024 numbers back is taken
/// for seen. A boot that was forgotten starts anew, so old datagrams of it would pass; agreement
/// stands late and doubled messages, and incarnations fence those of a wiped disk.
#[derive(Clone, Debug, Default)]
pub struct ReplayWindow {
    /// The boot heard last is at the front.
    boots: VecDeque<BootWindow>,
}

const WINDOW_WORDS: usize = 16;
const BOOTS_MAX: usize = 4;

#[derive(Clone, Debug)]
struct BootWindow {
    boot: u64,
    newest: u64,
    /// Bit `n % 1024`: whether number `n`, of the newest 1024, was seen.
    seen: [u64; WINDOW_WORDS],
}

impl ReplayWindow {
    /// Whether this datagram was not received before; it is remembered.
    pub fn admit(&mut self, boot: u64, sequence: u64) -> bool {
        match self.boots.iter().position(|window| window.boot == boot) {
            Some(0) => {}
            Some(index) => self.boots.swap(0, index),
            None => {
                self.boots.truncate(BOOTS_MAX - 1);
                self.boots.push_front(BootWindow {
                    boot,
                    newest: 0,
                    seen: [0; WINDOW_WORDS],
                });
            }
        }
        self.boots[0].admit(sequence)
    }
}

impl BootWindow {
    fn admit(&mut self, sequence: u64) -> bool {
        const SPAN: u64 = 64 * WINDOW_WORDS as u64;
        if sequence == 0 || sequence.saturating_add(SPAN) <= self.newest {
            return false;
        }
        if sequence > self.newest {
            if sequence - self.newest >= SPAN {
                self.seen = [0; WINDOW_WORDS];
            } else {
                for skipped in self.newest + 1..sequence {
                    self.bit(skipped, |word, bit| *word &= !bit);
                }
            }
            self.newest = sequence;
            self.bit(sequence, |word, bit| *word |= bit);
            return true;
        }
        let mut is_new = false;
        self.bit(sequence, |word, bit| {
            is_new = *word & bit == 0;
            *word |= bit;
        });
        is_new
    }

    fn bit(&mut self, sequence: u64, change: impl FnOnce(&mut u64, u64)) {
        let word = (sequence / 64) as usize % WINDOW_WORDS;
        change(&mut self.seen[word], 1 << (sequence % 64));
    }
}

#[cfg(test)]
mod tests;
