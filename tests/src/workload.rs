//! Simulated clients: numbered requests of a session, repeated until they are answered, and the history
//! of what they did and saw.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use pss_core::entry::block_checksums;
use pss_core::state::{CHUNK_BYTES_MIN, Refusal};
use pss_core::types::{BLOCK_BYTES, RequestNumber, ServerId, SessionId, VolumeId};
use pss_core::volume::device::ReadPart;
use pss_core::wire::client::{Reply, ReplyBody, ReplyError, Request, RequestBody};

use crate::checker::{Kind, Operation, Time, Value};
use crate::rng::Rng;

/// The register that is checked: half a block, so that writes of parts of blocks are covered.
pub const HALF_BYTES: usize = BLOCK_BYTES / 2;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// An unanswered request is repeated, maybe elsewhere, after this time.
const REPEAT: Time = 400_000_000;
/// The same, if the server said that it does not lead.
const REPEAT_SOON: Time = 40_000_000;
/// Longest pause between two requests.
const THINK_MAX: Time = 600_000_000;

/// A half block.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Register {
    /// Of this volume.
    pub volume: VolumeId,
    /// Counted in half blocks.
    pub half: u64,
}

/// What all clients did and saw.
#[derive(Default)]
pub struct History {
    /// By register.
    pub operations: BTreeMap<Register, Vec<Operation>>,
    /// Reads that showed a mixture, which no order of writes explains.
    pub broken: Vec<String>,
    /// Notes that clients had the cell take, who did, and whether that was answered.
    pub notes: BTreeMap<String, (u64, bool)>,
    next_value: Value,
    /// Values that were written to whole blocks.
    whole: std::collections::BTreeSet<Value>,
}

impl History {
    fn fresh_value(&mut self, whole_block: bool) -> Value {
        self.next_value += 1;
        if whole_block {
            self.whole.insert(self.next_value);
        }
        self.next_value
    }

    fn push(&mut self, register: Register, operation: Operation) -> usize {
        let operations = self.operations.entry(register).or_default();
        operations.push(operation);
        operations.len() - 1
    }
}

/// A request that is not answered yet.
struct Pending {
    request: Request,
    begun: Time,
    sent: Time,
    /// The writes that it stands for in the history.
    writes: Vec<(Register, usize)>,
    /// First register and count of a read.
    reads: Option<(Register, u64)>,
    /// The note that it is.
    note: Option<String>,
}

/// Which part of the volumes clients use.
#[derive(Clone, Debug)]
pub struct Playground {
    /// Volumes.
    pub volumes: Vec<VolumeId>,
    /// Blocks of each that are used, a few of every chunk.
    pub blocks: Vec<u64>,
}

/// A client.
pub struct Client {
    /// Number, for its name.
    pub id: u64,
    session: Option<SessionId>,
    opening: Option<(u64, Time)>,
    /// The request that ends the session, and when it was sent.
    ending: Option<(Request, Time)>,
    next_number: u64,
    pending: BTreeMap<u64, Pending>,
    /// Where it believes the leader is.
    pub server: ServerId,
    /// Requests still to begin.
    pub left: u32,
    /// Answered requests.
    pub answered: u64,
    /// Requests whose outcome stays open.
    pub lost: u64,
    /// Sessions that it ended, and how often it had to ask.
    pub ended: (u64, u64),
    next_tag: u64,
    /// Answers to what was asked before the last start are not for us.
    first_tag: u64,
    depth: usize,
    think_until: Time,
}

impl Client {
    /// A client that will make `operations` requests, up to `depth` at once.
    pub fn new(id: u64, operations: u32, depth: usize) -> Client {
        Client {
            id,
            session: None,
            opening: None,
            ending: None,
            next_number: 1,
            pending: BTreeMap::new(),
            server: ServerId(0),
            left: operations,
            answered: 0,
            lost: 0,
            ended: (0, 0),
            next_tag: 1,
            first_tag: 0,
            depth,
            think_until: 0,
        }
    }

    /// Whether everything is done.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.pending.is_empty() && self.ending.is_none()
    }

    /// Requests that wait for an answer, for a message about what hangs.
    pub fn hanging(&self) -> Vec<String> {
        let ending = self.ending.iter().map(|(request, _)| request);
        self.pending
            .values()
            .map(|it| &it.request)
            .chain(ending)
            .map(|request| format!("{:?}", request.body))
            .collect()
    }

    /// The client dies and starts again: what was under way stays open for ever.
    pub fn crash(&mut self) {
        self.lost += self.pending.len() as u64;
        self.pending.clear();
        self.session = None;
        self.opening = None;
        self.ending = None;
        self.next_number = 1;
        self.first_tag = self.next_tag + 1;
    }

    /// What to send now.
    pub fn step(
        &mut self,
        now: Time,
        servers: u64,
        rng: &mut Rng,
        ground: &Playground,
        history: &mut History,
    ) -> Vec<Request> {
        let Some(session) = self.session else {
            return self.open(now, servers, rng);
        };
        if let Some((request, sent)) = &mut self.ending {
            if now < *sent + REPEAT {
                return Vec::new();
            }
            *sent = now;
            self.ended.1 += 1;
            if rng.chance(500) {
                self.server = ServerId(rng.below(servers) as u8);
            }
            return vec![request.clone()];
        }
        if self.pending.is_empty() && self.left > 0 && rng.chance(20) {
            let request = self.request(session, RequestNumber(0), RequestBody::EndSession);
            self.ending = Some((request.clone(), now));
            self.ended.1 += 1;
            return vec![request];
        }
        let mut out = Vec::new();
        let mut elsewhere = false;
        for pending in self.pending.values_mut() {
            if now >= pending.sent + REPEAT {
                pending.sent = now;
                elsewhere = true;
                out.push(pending.request.clone());
            }
        }
        if elsewhere && rng.chance(500) {
            self.server = ServerId(rng.below(servers) as u8);
        }
        while self.left > 0 && self.pending.len() < self.depth && now >= self.think_until {
            // Now and then a pause, so that a run lasts long enough for faults.
            if rng.chance(100) {
                self.think_until = now + rng.below(THINK_MAX);
            }
            self.left -= 1;
            let pending = self.make(now, session, rng, ground, history);
            out.push(pending.request.clone());
            self.pending.insert(pending.request.tag, pending);
        }
        out
    }

    fn open(&mut self, now: Time, servers: u64, rng: &mut Rng) -> Vec<Request> {
        if self.opening.is_some_and(|(_, sent)| now < sent + REPEAT) {
            return Vec::new();
        }
        if self.opening.is_some() {
            self.server = ServerId(rng.below(servers) as u8);
        }
        let nonce = self
            .opening
            .map_or_else(|| rng.next() >> 2, |(nonce, _)| nonce);
        self.opening = Some((nonce, now));
        let body = RequestBody::OpenSession {
            nonce,
            name: format!("client {}", self.id),
            user: format!("user {}", self.id),
        };
        vec![self.request(SessionId(0), RequestNumber(0), body)]
    }

    /// Whence it is connected.
    pub fn address(&self) -> SocketAddr {
        let [.., high, low] = self.id.to_be_bytes();
        ([10, 0, high, low], 40_000).into()
    }

    fn request(&mut self, session: SessionId, number: RequestNumber, body: RequestBody) -> Request {
        self.next_tag += 1;
        let settled = self
            .pending
            .values()
            .map(|it| it.request.number.0)
            .filter(|it| *it > 0);
        let settled_below = settled.chain([self.next_number]).min().unwrap_or_default();
        Request {
            tag: self.next_tag,
            session,
            number,
            settled_below: RequestNumber(settled_below.min(number.0.max(1))),
            body,
        }
    }

    fn make(
        &mut self,
        now: Time,
        session: SessionId,
        rng: &mut Rng,
        ground: &Playground,
        history: &mut History,
    ) -> Pending {
        let volume = *rng.pick(&ground.volumes);
        let block = *rng.pick(&ground.blocks);
        let dice = rng.below(100);
        let mut writes = Vec::new();
        let mut reads = None;
        let mut note = None;
        let body = if dice < 40 {
            let blocks = rng.between(1, 3);
            let count = blocks * 2;
            let first = Register {
                volume,
                half: block * 2,
            };
            reads = Some((first, count));
            let length_bytes = (blocks * BLOCK) as u32;
            RequestBody::Read {
                volume,
                offset_bytes: block * BLOCK,
                length_bytes,
            }
        } else if dice < 80 {
            let blocks = rng.between(1, 3);
            let mut data = BytesMut::new();
            for block in block..block + blocks {
                let value = history.fresh_value(true);
                fill(&mut data, value, BLOCK_BYTES);
                for half in [block * 2, block * 2 + 1] {
                    writes.push(begin_write(history, Register { volume, half }, now, value));
                }
            }
            let checksums = block_checksums(volume, block, &data);
            let offset_bytes = block * BLOCK;
            RequestBody::Write {
                volume,
                offset_bytes,
                checksums,
                data: data.freeze(),
            }
        } else if dice < 92 {
            let half = block * 2 + rng.below(2);
            let value = history.fresh_value(false);
            let mut data = BytesMut::new();
            fill(&mut data, value, HALF_BYTES);
            writes.push(begin_write(history, Register { volume, half }, now, value));
            let checksums = vec![crc32c::crc32c(&data)];
            let offset_bytes = half * HALF_BYTES as u64;
            RequestBody::Write {
                volume,
                offset_bytes,
                checksums,
                data: data.freeze(),
            }
        } else if dice == 98 {
            let text = format!("note {}-{}", self.id, self.next_tag);
            history.notes.insert(text.clone(), (self.id, false));
            note = Some(text.clone());
            RequestBody::Note { text }
        } else if dice == 99 {
            administer(rng)
        } else {
            let blocks = rng.between(1, 2);
            for half in block * 2..(block + blocks) * 2 {
                writes.push(begin_write(history, Register { volume, half }, now, 0));
            }
            RequestBody::Zero {
                volume,
                offset_bytes: block * BLOCK,
                length_bytes: blocks * BLOCK,
                allocate: rng.chance(300),
                whole_blocks_only: true,
            }
        };
        let number = if reads.is_some() { 0 } else { self.next_number };
        let request = self.request(session, RequestNumber(number), body);
        if number > 0 {
            self.next_number += 1;
        }
        Pending {
            request,
            begun: now,
            sent: now,
            writes,
            reads,
            note,
        }
    }

    /// An answer has come in.
    pub fn take(&mut self, now: Time, from: ServerId, reply: Reply, history: &mut History) {
        if reply.tag < self.first_tag {
            return;
        }
        let ends = |(request, _): &(Request, Time)| request.tag == reply.tag;
        if self.ending.as_ref().is_some_and(ends) {
            match reply.body {
                Ok(ReplyBody::Done) => {
                    self.ended.0 += 1;
                    self.crash();
                    return;
                }
                Err(ReplyError::NotLeader { .. }) => {}
                // However often it is asked, and if the servers have ended it themselves.
                other => {
                    let what = format!("the end of a session was answered {other:?}");
                    return history.broken.push(what);
                }
            }
        }
        match reply.body {
            Ok(ReplyBody::Session(session)) if self.session.is_none() => {
                self.session = Some(session);
                self.opening = None;
                self.server = from;
                return;
            }
            Err(ReplyError::Refused(Refusal::StaleSession)) if self.session.is_some() => {
                // Fenced: what was under way stays open.
                if self.pending.contains_key(&reply.tag) {
                    self.crash();
                }
                return;
            }
            Err(ReplyError::NotLeader { leader }) => {
                if from == self.server {
                    let next = leader.unwrap_or(ServerId(from.0 + 1));
                    self.server = next;
                }
                let soon = now + REPEAT_SOON;
                if let Some(pending) = self.pending.get_mut(&reply.tag) {
                    pending.sent = soon.saturating_sub(REPEAT);
                }
                if let Some((_, sent)) = &mut self.opening {
                    *sent = soon.saturating_sub(REPEAT);
                }
                if let Some((_, sent)) = &mut self.ending {
                    *sent = soon.saturating_sub(REPEAT);
                }
                return;
            }
            _ => {}
        }
        let Some(pending) = self.pending.remove(&reply.tag) else {
            return;
        };
        self.answered += 1;
        if let Some(text) = pending.note {
            match reply.body {
                Ok(ReplyBody::Done) => _ = history.notes.insert(text, (self.id, true)),
                other => history
                    .broken
                    .push(format!("{text} was answered {other:?}")),
            }
            return;
        }
        match (reply.body, pending.reads) {
            (Ok(ReplyBody::Data(parts)), Some((first, count))) => {
                note_read(history, &pending, now, first, count, &parts);
            }
            (Ok(ReplyBody::Done), None) => {
                for (register, index) in pending.writes {
                    if let Some(operations) = history.operations.get_mut(&register) {
                        operations[index].answered = Some(now);
                    }
                }
            }
            // Refused or failed: a write stays open in the history, a read says nothing.
            _ => self.lost += 1,
        }
    }

    /// Sends a read of everything, one request a block, at the end.
    pub fn read_everything(&mut self, now: Time, ground: &Playground) -> Option<Vec<Request>> {
        let session = self.session?;
        let mut out = Vec::new();
        for volume in &ground.volumes {
            for block in &ground.blocks {
                let body = RequestBody::Read {
                    volume: *volume,
                    offset_bytes: block * BLOCK,
                    length_bytes: BLOCK as u32,
                };
                let request = self.request(session, RequestNumber(0), body);
                let first = Register {
                    volume: *volume,
                    half: block * 2,
                };
                let pending = Pending {
                    request: request.clone(),
                    begun: now,
                    sent: now,
                    writes: Vec::new(),
                    reads: Some((first, 2)),
                    note: None,
                };
                self.pending.insert(request.tag, pending);
                out.push(request);
            }
        }
        Some(out)
    }
}

/// Something that is done to the cell beside the volumes that everyone uses: of those there are never many.
fn administer(rng: &mut Rng) -> RequestBody {
    let volume = VolumeId(rng.between(3, 8) as u32);
    let size_bytes = rng.between(1, 4) * u64::from(CHUNK_BYTES_MIN);
    match rng.below(4) {
        0 | 1 => RequestBody::CreateVolume {
            name: format!("extra{}", rng.below(3)),
            size_bytes,
            chunk_bytes: CHUNK_BYTES_MIN,
            uuid: [8; 16],
        },
        2 => RequestBody::ShrinkVolume { volume, size_bytes },
        _ => RequestBody::DeleteVolume { volume },
    }
}

fn begin_write(
    history: &mut History,
    register: Register,
    now: Time,
    value: Value,
) -> (Register, usize) {
    let operation = Operation {
        begun: now,
        answered: None,
        kind: Kind::Write(value),
    };
    (register, history.push(register, operation))
}

fn fill(data: &mut BytesMut, value: Value, bytes: usize) {
    for _ in 0..bytes / 8 {
        data.extend_from_slice(&value.to_le_bytes());
    }
}

fn note_read(
    history: &mut History,
    pending: &Pending,
    now: Time,
    first: Register,
    count: u64,
    parts: &[ReadPart],
) {
    let mut bytes = BytesMut::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(data),
            ReadPart::Hole(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    let bytes: Bytes = bytes.freeze();
    if bytes.len() != count as usize * HALF_BYTES {
        let length = bytes.len();
        history
            .broken
            .push(format!("read of {count} half blocks gave {length} bytes"));
        return;
    }
    let mut values = Vec::new();
    for (half, data) in bytes.chunks_exact(HALF_BYTES).enumerate() {
        let (words, _) = data.as_chunks::<8>();
        let value = Value::from_le_bytes(words[0]);
        if words
            .iter()
            .any(|word| Value::from_le_bytes(*word) != value)
        {
            history
                .broken
                .push(format!("half block {half} behind {first:?} is a mixture"));
        }
        values.push(value);
        let register = Register {
            half: first.half + half as u64,
            ..first
        };
        let kind = Kind::Read(value);
        history.push(
            register,
            Operation {
                begun: pending.begun,
                answered: Some(now),
                kind,
            },
        );
    }
    // Two writes of the whole block can never show half of each.
    for pair in values.chunks_exact(2) {
        let whole = |value: &Value| *value == 0 || history.whole.contains(value);
        if pair[0] != pair[1] && whole(&pair[0]) && whole(&pair[1]) {
            let (a, b) = (pair[0], pair[1]);
            history.broken.push(format!(
                "{first:?}: block shows halves of writes {a} and {b}"
            ));
        }
    }
}
