//! Log entries and the commands in them.
//!
//! An entry is what one slot of the log holds: a batch of commands that are applied one after the
//! other. The *header* of an entry says everything but the written data; the payload of its `Write`
//! commands, whole 4 KiB blocks, travels and is stored behind it and is never copied.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};
use serde::{Deserialize, Serialize};

use crate::members::Members;
use crate::types::{
    BLOCK_BYTES, Ballot, EntryId, Incarnation, RequestNumber, ServerId, SessionId, Slot, VolumeId,
};
use crate::volume::reservation::ReservationRequest;

/// Most bytes of payload in one entry.
pub const ENTRY_PAYLOAD_MAX: usize = 4 << 20;
/// Most bytes of an encoded header.
pub const ENTRY_HEADER_MAX: usize = 1 << 20;
/// Most blocks that one `Write` command may carry.
pub const WRITE_BLOCKS_MAX: usize = (1 << 20) / BLOCK_BYTES;
/// Most bytes of a volume's name.
pub const VOLUME_NAME_MAX: usize = 64;
/// Most bytes of the name of a client's user.
pub const USER_NAME_MAX: usize = 64;
/// Most bytes of a note.
pub const NOTE_BYTES_MAX: usize = 200;

/// What one slot of the log holds.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub struct Entry {
    /// Position and first ballot.
    pub id: EntryId,
    /// Ballot of the entry in the slot before; the default ballot for slot 1.
    pub prev: Ballot,
    /// Applied in this order; shared, so that an entry is cheap to clone.
    pub commands: Arc<[Command]>,
}

/// A request of a client, as it is ordered.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub struct Command {
    /// Who asks; `SessionId(0)` for commands of the servers themselves, which are never repeated.
    pub session: SessionId,
    /// Which request of the session.
    pub number: RequestNumber,
    /// The session has the answers of all requests below this number and will not repeat them.
    pub settled_below: RequestNumber,
    /// What to do.
    pub op: Op,
}

/// What a command does to the replicated state.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub enum Op {
    /// Nothing: the barrier with which a new leader re-proposes the tail of the log.
    Noop,
    /// Writes whole blocks.
    Write {
        /// Where.
        volume: VolumeId,
        /// First block, in 4 KiB blocks from the start of the volume.
        first_block: u64,
        /// [`block_checksum`] of each block.
        checksums: Vec<u32>,
        /// `checksums.len()` blocks.
        payload: Bytes,
    },
    /// Makes whole blocks read as zeros.
    Zero {
        /// Where.
        volume: VolumeId,
        /// First block.
        first_block: u64,
        /// How many blocks.
        blocks: u64,
        /// Keep space allocated for them (NBD's `NO_HOLE`).
        allocate: bool,
    },
    /// Opens a session, whose id is this entry's slot and position. Leaders propose
    /// [`Op::OpenSessionFrom`] now; logs from before hold this.
    OpenSession {
        /// Number by which the client recognises its session when it repeats the request.
        nonce: u64,
        /// What the client calls itself, for people.
        name: String,
    },
    /// Ends sessions: their writes that are still under way will be refused.
    EndSessions {
        /// Which.
        sessions: Vec<SessionId>,
    },
    /// Creates a volume.
    CreateVolume {
        /// Name, also of its directory.
        name: String,
        /// Size, bytes.
        size_bytes: u64,
        /// Size of a chunk, bytes: a power of two from 64 KiB to 64 MiB.
        chunk_bytes: u32,
        /// Random identity.
        uuid: [u8; 16],
    },
    /// Changes the size of a volume.
    ResizeVolume {
        /// Which.
        volume: VolumeId,
        /// New size, bytes.
        size_bytes: u64,
        /// Whether it may become smaller.
        allow_shrink: bool,
    },
    /// Deletes a volume that no session has attached.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Notes that the session uses a volume; it cannot be deleted meanwhile.
    Attach {
        /// Which.
        volume: VolumeId,
    },
    /// Takes one `Attach` of the session back.
    Detach {
        /// Which.
        volume: VolumeId,
    },
    /// Changes a volume's reservations.
    Reserve {
        /// Of which volume.
        volume: VolumeId,
        /// How.
        request: Box<ReservationRequest>,
    },
    /// Changes the size of a volume, which may become smaller unless a session has it attached.
    ShrinkVolume {
        /// Which.
        volume: VolumeId,
        /// New size, bytes.
        size_bytes: u64,
    },
    /// Deletes a volume, and takes it from the sessions that have it attached.
    DeleteAttachedVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Says what time it is, by the leader's clock: what follows in the log happened then. It orders nothing; it is
    /// for people who ask when something was changed.
    Clock {
        /// Milliseconds since the beginning of 1970, UTC.
        unix_ms: u64,
    },
    /// Opens a session as [`Op::OpenSession`] does, and says for whom.
    OpenSessionFrom {
        /// As there.
        nonce: u64,
        /// Who opens it.
        origin: Box<Origin>,
    },
    /// Changes nothing: a client says what it is about to do outside of the state, so that it is known who did it.
    Note {
        /// What; at most [`NOTE_BYTES_MAX`].
        text: String,
    },
    /// Of a core server only what this life of it promises and acknowledges counts from here on.
    AdmitServer {
        /// Which.
        server: ServerId,
        /// Which life of its data directory.
        incarnation: Incarnation,
    },
    /// From here on these are the servers: see [`crate::paxos::members`].
    SetMembers {
        /// Who.
        members: Arc<Members>,
    },
}

/// Where the requests of a session come from, for people.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// What the client calls itself, such as `pss@host`.
    pub name: String,
    /// Its user, as it says; empty if it does not.
    pub user: String,
    /// Whence it was connected when it opened the session, as its server saw it.
    pub address: Option<SocketAddr>,
}

impl Origin {
    /// Layout: name and user as strings, family of the address u8 (0: none, 4, 6) and if there is one, its 4 or
    /// 16 bytes as they are written, and the port u16.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_string(out, &self.name);
        put_string(out, &self.user);
        match self.address.map(|it| (it.ip(), it.port())) {
            None => out.put_u8(0),
            Some((IpAddr::V4(ip), port)) => {
                out.put_u8(4);
                out.put_slice(&ip.octets());
                out.put_u16_le(port);
            }
            Some((IpAddr::V6(ip), port)) => {
                out.put_u8(6);
                out.put_slice(&ip.octets());
                out.put_u16_le(port);
            }
        }
    }

    pub(crate) fn decode(input: &mut &[u8]) -> Result<Origin, EntryError> {
        let name = get_string(input)?;
        let user = get_string(input)?;
        let ip = match get_u8(input)? {
            0 => None,
            4 => Some(IpAddr::from(get_array::<4>(input)?)),
            6 => Some(IpAddr::from(get_array::<16>(input)?)),
            family => return Err(EntryError::UnknownFamily(family)),
        };
        let address = match ip {
            Some(ip) => Some(SocketAddr::new(ip, u16::from_le_bytes(get_array(input)?))),
            None => None,
        };
        Ok(Origin {
            name,
            user,
            address,
        })
    }
}

impl Command {
    /// A command of the servers themselves.
    pub fn internal(op: Op) -> Command {
        Command {
            session: SessionId(0),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            op,
        }
    }

    /// Bytes of payload.
    pub fn payload_bytes(&self) -> usize {
        match &self.op {
            Op::Write { payload, .. } => payload.len(),
            _ => 0,
        }
    }
}

/// Checksum of one 4 KiB block: CRC32C over (volume, block number, data), never 0, so that a block
/// that stands in the wrong place fails and 0 can mean "unwritten".
pub fn block_checksum(volume: VolumeId, block: u64, data: &[u8]) -> u32 {
    let mut place = [0; 12];
    place[..4].copy_from_slice(&volume.0.to_le_bytes());
    place[4..].copy_from_slice(&block.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), data).max(1)
}

/// Checksums of consecutive blocks; `data` is a whole number of blocks.
pub fn block_checksums(volume: VolumeId, first_block: u64, data: &[u8]) -> Vec<u32> {
    data.chunks_exact(BLOCK_BYTES)
        .zip(first_block..)
        .map(|(data, block)| block_checksum(volume, block, data))
        .collect()
}

/// Why bytes are not an entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EntryError {
    /// The header ends early or a count in it is larger than the header.
    #[error("entry header is cut short")]
    Truncated,
    /// A command code that this version does not know.
    #[error("entry has unknown command code {0}")]
    UnknownCommand(u8),
    /// The payload has another length than the header says.
    #[error("entry payload has {have} bytes, its header says {want}")]
    PayloadLength {
        /// Bytes given.
        have: usize,
        /// Bytes announced.
        want: usize,
    },
    /// A payload block does not match its checksum.
    #[error("payload of slot {slot}: checksum mismatch in block {block} of volume {volume}")]
    Checksum {
        /// Entry.
        slot: Slot,
        /// Volume.
        volume: VolumeId,
        /// Block of the volume.
        block: u64,
    },
    /// A string is not UTF-8.
    #[error("entry holds a string that is not UTF-8")]
    NotUtf8,
    /// A request about reservations is malformed.
    #[error("entry holds a request about reservations that is none")]
    Reservation,
    /// A list of servers is malformed.
    #[error("entry holds a list of servers that is none: {0}")]
    Members(#[from] crate::members::BadMembers),
    /// An address is of a family that this version does not know.
    #[error("entry has an address of unknown family {0}")]
    UnknownFamily(u8),
}

impl EntryError {
    /// What a header holds that another version must have written, if it is known that its bytes are as they were
    /// written: then nothing but a payload can be damaged. `None` for that.
    pub fn unknown(&self) -> Option<String> {
        Some(match self {
            EntryError::UnknownCommand(code) => format!("command code {code}"),
            EntryError::UnknownFamily(family) => format!("an address of family {family}"),
            EntryError::Reservation => "a request about reservations".to_owned(),
            EntryError::Members(_) => "a list of servers".to_owned(),
            EntryError::Truncated | EntryError::NotUtf8 | EntryError::PayloadLength { .. } => {
                "a form of a command".to_owned()
            }
            EntryError::Checksum { .. } => return None,
        })
    }
}

/// Header layout, little-endian: slot u64, ballot (u64, u8), previous ballot (u64, u8), number of
/// commands u32, then each command: code u8, session u64, number u64, settled_below u64 and the
/// fields of the operation. Strings and lists carry a u32 count in front.
impl Entry {
    /// Bytes of payload of all commands.
    pub fn payload_bytes(&self) -> usize {
        self.commands.iter().map(Command::payload_bytes).sum()
    }

    /// Memory this entry holds, about.
    pub fn weight_bytes(&self) -> usize {
        64 + self.commands.len() * 160 + self.payload_bytes()
    }

    /// The payload parts, in order.
    pub fn payload_parts(&self) -> impl Iterator<Item = &Bytes> {
        self.commands
            .iter()
            .filter_map(|command| match &command.op {
                Op::Write { payload, .. } => Some(payload),
                _ => None,
            })
    }

    /// Appends the header to `out`.
    pub fn encode_header(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.id.slot.0);
        put_ballot(out, self.id.ballot);
        put_ballot(out, self.prev);
        out.put_u32_le(self.commands.len() as u32);
        for command in self.commands.iter() {
            out.put_u8(command.op.code());
            out.put_u64_le(command.session.0);
            out.put_u64_le(command.number.0);
            out.put_u64_le(command.settled_below.0);
            command.op.encode(out);
        }
    }

    /// Reads a header and takes the payload of its writes from `payload`, which must be used up.
    /// Block checksums are not verified: see [`Entry::verify`].
    ///
    /// # Errors
    /// [`EntryError`] if the bytes are not what [`Entry::encode_header`] makes.
    pub fn decode(mut header: &[u8], payload: Bytes) -> Result<Entry, EntryError> {
        let mut payload = PayloadCursor {
            rest: payload,
            taken: 0,
        };
        let input = &mut header;
        let slot = Slot(get_u64(input)?);
        let ballot = get_ballot(input)?;
        let prev = get_ballot(input)?;
        let count = get_u32(input)? as usize;
        // Each command takes at least 25 bytes, so the count cannot make us allocate much more than
        // the peer sent.
        if count > input.len() / 25 {
            return Err(EntryError::Truncated);
        }
        let mut commands = Vec::with_capacity(count);
        for _ in 0..count {
            let code = get_u8(input)?;
            commands.push(Command {
                session: SessionId(get_u64(input)?),
                number: RequestNumber(get_u64(input)?),
                settled_below: RequestNumber(get_u64(input)?),
                op: Op::decode(code, input, &mut payload)?,
            });
        }
        if !input.is_empty() {
            return Err(EntryError::Truncated);
        }
        if !payload.rest.is_empty() {
            let want = payload.taken;
            return Err(EntryError::PayloadLength {
                have: want + payload.rest.len(),
                want,
            });
        }
        Ok(Entry {
            id: EntryId { ballot, slot },
            prev,
            commands: commands.into(),
        })
    }

    /// Checks every payload block against its checksum. Blocks past the last number there is match none.
    ///
    /// # Errors
    /// [`EntryError::Checksum`] names the first block that differs.
    pub fn verify(&self) -> Result<(), EntryError> {
        for command in self.commands.iter() {
            let Op::Write {
                volume,
                first_block,
                checksums,
                payload,
            } = &command.op
            else {
                continue;
            };
            let blocks = payload.chunks_exact(BLOCK_BYTES).zip(checksums);
            for ((data, checksum), number) in blocks.zip(0..) {
                let block = first_block.checked_add(number);
                if block.map(|block| block_checksum(*volume, block, data)) != Some(*checksum) {
                    return Err(EntryError::Checksum {
                        slot: self.id.slot,
                        volume: *volume,
                        block: block.unwrap_or(u64::MAX),
                    });
                }
            }
        }
        Ok(())
    }
}

struct PayloadCursor {
    rest: Bytes,
    taken: usize,
}

impl PayloadCursor {
    fn take(&mut self, bytes: usize) -> Result<Bytes, EntryError> {
        if self.rest.len() < bytes {
            let have = self.taken + self.rest.len();
            return Err(EntryError::PayloadLength {
                have,
                want: self.taken + bytes,
            });
        }
        self.taken += bytes;
        Ok(self.rest.split_to(bytes))
    }
}

impl Op {
    fn code(&self) -> u8 {
        match self {
            Op::Noop => 0,
            Op::Write { .. } => 1,
            Op::Zero { .. } => 2,
            Op::OpenSession { .. } => 3,
            Op::EndSessions { .. } => 4,
            Op::CreateVolume { .. } => 5,
            Op::ResizeVolume { .. } => 6,
            Op::DeleteVolume { .. } => 7,
            Op::Attach { .. } => 8,
            Op::Detach { .. } => 9,
            Op::Reserve { .. } => 10,
            Op::ShrinkVolume { .. } => 11,
            Op::DeleteAttachedVolume { .. } => 12,
            Op::Clock { .. } => 13,
            Op::OpenSessionFrom { .. } => 14,
            Op::Note { .. } => 15,
            Op::AdmitServer { .. } => 16,
            Op::SetMembers { .. } => 17,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Op::Noop => {}
            Op::Write {
                volume,
                first_block,
                checksums,
                payload,
            } => {
                debug_assert_eq!(payload.len(), checksums.len() * BLOCK_BYTES);
                out.put_u32_le(volume.0);
                out.put_u64_le(*first_block);
                out.put_u32_le(checksums.len() as u32);
                for checksum in checksums {
                    out.put_u32_le(*checksum);
                }
            }
            Op::Zero {
                volume,
                first_block,
                blocks,
                allocate,
            } => {
                out.put_u32_le(volume.0);
                out.put_u64_le(*first_block);
                out.put_u64_le(*blocks);
                out.put_u8(u8::from(*allocate));
            }
            Op::OpenSession { nonce, name } => {
                out.put_u64_le(*nonce);
                put_string(out, name);
            }
            Op::EndSessions { sessions } => {
                out.put_u32_le(sessions.len() as u32);
                for session in sessions {
                    out.put_u64_le(session.0);
                }
            }
            Op::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            } => {
                put_string(out, name);
                out.put_u64_le(*size_bytes);
                out.put_u32_le(*chunk_bytes);
                out.put_slice(uuid);
            }
            Op::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => {
                out.put_u32_le(volume.0);
                out.put_u64_le(*size_bytes);
                out.put_u8(u8::from(*allow_shrink));
            }
            Op::DeleteVolume { volume }
            | Op::Attach { volume }
            | Op::Detach { volume }
            | Op::DeleteAttachedVolume { volume } => {
                out.put_u32_le(volume.0);
            }
            Op::ShrinkVolume { volume, size_bytes } => {
                out.put_u32_le(volume.0);
                out.put_u64_le(*size_bytes);
            }
            Op::Reserve { volume, request } => {
                out.put_u32_le(volume.0);
                request.encode(out);
            }
            Op::Clock { unix_ms } => out.put_u64_le(*unix_ms),
            Op::OpenSessionFrom { nonce, origin } => {
                out.put_u64_le(*nonce);
                origin.encode(out);
            }
            Op::Note { text } => put_string(out, text),
            Op::AdmitServer {
                server,
                incarnation,
            } => {
                out.put_u8(server.0);
                out.put_u64_le(incarnation.0);
            }
            Op::SetMembers { members } => members.encode(out),
        }
    }

    fn decode(code: u8, input: &mut &[u8], payload: &mut PayloadCursor) -> Result<Op, EntryError> {
        Ok(match code {
            0 => Op::Noop,
            1 => {
                let volume = VolumeId(get_u32(input)?);
                let first_block = get_u64(input)?;
                let count = get_u32(input)? as usize;
                if count > input.len() / 4 {
                    return Err(EntryError::Truncated);
                }
                let checksums = (0..count).map(|_| input.get_u32_le()).collect();
                let payload = payload.take(count * BLOCK_BYTES)?;
                Op::Write {
                    volume,
                    first_block,
                    checksums,
                    payload,
                }
            }
            2 => Op::Zero {
                volume: VolumeId(get_u32(input)?),
                first_block: get_u64(input)?,
                blocks: get_u64(input)?,
                allocate: get_u8(input)? != 0,
            },
            3 => Op::OpenSession {
                nonce: get_u64(input)?,
                name: get_string(input)?,
            },
            4 => {
                let count = get_u32(input)? as usize;
                if count > input.len() / 8 {
                    return Err(EntryError::Truncated);
                }
                let sessions = (0..count).map(|_| SessionId(input.get_u64_le())).collect();
                Op::EndSessions { sessions }
            }
            5 => Op::CreateVolume {
                name: get_string(input)?,
                size_bytes: get_u64(input)?,
                chunk_bytes: get_u32(input)?,
                uuid: get_array(input)?,
            },
            6 => Op::ResizeVolume {
                volume: VolumeId(get_u32(input)?),
                size_bytes: get_u64(input)?,
                allow_shrink: get_u8(input)? != 0,
            },
            7 => Op::DeleteVolume {
                volume: VolumeId(get_u32(input)?),
            },
            8 => Op::Attach {
                volume: VolumeId(get_u32(input)?),
            },
            9 => Op::Detach {
                volume: VolumeId(get_u32(input)?),
            },
            10 => Op::Reserve {
                volume: VolumeId(get_u32(input)?),
                request: Box::new(
                    ReservationRequest::decode(input).map_err(|_| EntryError::Reservation)?,
                ),
            },
            11 => Op::ShrinkVolume {
                volume: VolumeId(get_u32(input)?),
                size_bytes: get_u64(input)?,
            },
            12 => Op::DeleteAttachedVolume {
                volume: VolumeId(get_u32(input)?),
            },
            13 => Op::Clock {
                unix_ms: get_u64(input)?,
            },
            14 => Op::OpenSessionFrom {
                nonce: get_u64(input)?,
                origin: Box::new(Origin::decode(input)?),
            },
            15 => Op::Note {
                text: get_string(input)?,
            },
            16 => Op::AdmitServer {
                server: ServerId(get_u8(input)?),
                incarnation: Incarnation(get_u64(input)?),
            },
            17 => Op::SetMembers {
                members: Arc::new(Members::decode(input)?),
            },
            unknown => return Err(EntryError::UnknownCommand(unknown)),
        })
    }
}

fn put_ballot(out: &mut Vec<u8>, ballot: Ballot) {
    out.put_u64_le(ballot.number);
    out.put_u8(ballot.server.0);
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32_le(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn get_array<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], EntryError> {
    let (array, rest) = input
        .split_first_chunk::<N>()
        .ok_or(EntryError::Truncated)?;
    *input = rest;
    Ok(*array)
}

fn get_u8(input: &mut &[u8]) -> Result<u8, EntryError> {
    Ok(get_array::<1>(input)?[0])
}

fn get_u32(input: &mut &[u8]) -> Result<u32, EntryError> {
    Ok(u32::from_le_bytes(get_array(input)?))
}

fn get_u64(input: &mut &[u8]) -> Result<u64, EntryError> {
    Ok(u64::from_le_bytes(get_array(input)?))
}

fn get_ballot(input: &mut &[u8]) -> Result<Ballot, EntryError> {
    Ok(Ballot {
        number: get_u64(input)?,
        server: ServerId(get_u8(input)?),
    })
}

fn get_string(input: &mut &[u8]) -> Result<String, EntryError> {
    let length = get_u32(input)? as usize;
    if length > input.len() {
        return Err(EntryError::Truncated);
    }
    let (text, rest) = input.split_at(length);
    *input = rest;
    String::from_utf8(text.to_vec()).map_err(|_| EntryError::NotUtf8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::Member;
    use crate::volume::reservation::{Nexus, ReservationAction};

    fn sample() -> Entry {
        let data = Bytes::from(vec![7; 2 * BLOCK_BYTES]);
        let write = Op::Write {
            volume: VolumeId(3),
            first_block: 9,
            checksums: block_checksums(VolumeId(3), 9, &data),
            payload: data,
        };
        let command = |op| Command {
            session: SessionId(5),
            number: RequestNumber(6),
            settled_below: RequestNumber(4),
            op,
        };
        Entry {
            id: EntryId {
                ballot: Ballot {
                    number: 2,
                    server: ServerId(1),
                },
                slot: Slot(8),
            },
            prev: Ballot {
                number: 1,
                server: ServerId(0),
            },
            commands: vec![
                command(write),
                command(Op::CreateVolume {
                    name: "vol001".into(),
                    size_bytes: 1 << 30,
                    chunk_bytes: 4 << 20,
                    uuid: [9; 16],
                }),
                Command::internal(Op::EndSessions {
                    sessions: vec![SessionId(1), SessionId(2)],
                }),
                command(Op::Reserve {
                    volume: VolumeId(3),
                    request: Box::new(ReservationRequest {
                        nexus: Nexus {
                            initiator: "iqn.2026-01.test:i,i,0x1".into(),
                            target: "iqn.2026-01.test:t,t,0x0001".into(),
                        },
                        action: ReservationAction::Clear { key: 7 },
                    }),
                }),
                command(opened("[2001:db8::1]:7")),
                command(Op::Note {
                    text: "stop server 2".into(),
                }),
                command(Op::AdmitServer {
                    server: ServerId(2),
                    incarnation: Incarnation(1 << 40),
                }),
                command(Op::SetMembers {
                    members: Arc::new(Members {
                        epoch: 1,
                        version: 2,
                        list: vec![Member {
                            id: ServerId(3),
                            core: true,
                            host: "10.0.0.3".into(),
                            path: "/srv".into(),
                        }],
                    }),
                }),
            ]
            .into(),
        }
    }

    fn opened(address: &str) -> Op {
        Op::OpenSessionFrom {
            nonce: 9,
            origin: Box::new(Origin {
                name: "é".into(),
                user: "al".into(),
                address: address.parse().ok(),
            }),
        }
    }

    /// Made from docs/formats.md apart from this program.
    #[test]
    fn literal_commands_of_people() {
        let bytes = |op: &Op| {
            let mut out = vec![op.code()];
            op.encode(&mut out);
            out.iter().map(|it| format!("{it:02x}")).collect::<String>()
        };
        let common = "0e0900000000000000" /* nonce */.to_owned()
            + "02000000c3a9" /* name */
            + "02000000616c" /* user */;
        let v6 = "0620010db8000000000000000000000001aa0f";
        for (address, end) in [
            ("none", "00"),
            ("10.0.0.5:4010", "040a000005aa0f"),
            ("[2001:db8::1]:4010", v6),
        ] {
            assert_eq!(bytes(&opened(address)), common.clone() + end, "{address}");
        }
        let note = Op::Note {
            text: "stop".into(),
        };
        assert_eq!(bytes(&note), "0f0400000073746f70");
    }

    #[test]
    fn an_address_of_another_family_is_an_error() {
        let mut bytes = Vec::new();
        Origin::default().encode(&mut bytes);
        assert_eq!(Origin::decode(&mut &bytes[..]), Ok(Origin::default()));
        *bytes.last_mut().unwrap() = 5;
        let error = Origin::decode(&mut &bytes[..]);
        assert_eq!(error, Err(EntryError::UnknownFamily(5)));
    }

    #[test]
    fn header_round_trip() {
        let entry = sample();
        let mut header = Vec::new();
        entry.encode_header(&mut header);
        let payload: Vec<u8> = entry.payload_parts().flatten().copied().collect();
        let back = Entry::decode(&header, payload.into()).unwrap();
        assert_eq!(back, entry);
        back.verify().unwrap();
    }

    #[test]
    fn blocks_past_the_last_number_match_no_checksum() {
        let payload = Bytes::from(vec![1; 2 * BLOCK_BYTES]);
        let write = |first_block| Entry {
            commands: [Command::internal(Op::Write {
                volume: VolumeId(1),
                first_block,
                checksums: (0..2)
                    .map(|at| {
                        block_checksum(
                            VolumeId(1),
                            first_block.wrapping_add(at),
                            &payload[..BLOCK_BYTES],
                        )
                    })
                    .collect(),
                payload: payload.clone(),
            })]
            .into(),
            ..sample()
        };
        assert!(write(u64::MAX - 1).verify().is_ok());
        let error = write(u64::MAX).verify().unwrap_err();
        assert!(
            matches!(
                error,
                EntryError::Checksum {
                    block: u64::MAX,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn every_cut_of_a_header_is_an_error() {
        let mut header = Vec::new();
        sample().encode_header(&mut header);
        for length in 0..header.len() {
            assert!(Entry::decode(&header[..length], Bytes::new()).is_err());
        }
    }

    #[test]
    fn block_in_another_place_fails_its_checksum() {
        let data = vec![1; BLOCK_BYTES];
        let here = block_checksum(VolumeId(1), 5, &data);
        assert_ne!(here, block_checksum(VolumeId(1), 6, &data));
        assert_ne!(here, block_checksum(VolumeId(2), 5, &data));
    }
}
