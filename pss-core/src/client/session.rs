//! The requests of one gateway: which are under way, which wait, which numbers they have.
//!
//! No IO: requests go in, frames come out, replies go in, events come out. After a connection broke,
//! [`Session::reconnected`] sends again whatever was not answered, in the same order and under the same
//! numbers, so that what was already applied is answered but not done twice.

use std::collections::VecDeque;
use std::time::Instant;

use crate::state::{Refusal, SESSION_WINDOW};
use crate::types::{RequestNumber, ServerId, SessionId, VolumeId};
use crate::wire::client::{Reply, ReplyBody, ReplyError, RequestBody, RequestEnvelope};
use crate::wire::frame::SendQueue;

/// Most numbered requests under way: a quarter of what the servers remember, so that a few that stay
/// without an answer do not stop the others soon.
pub(super) const NUMBERED_MAX: u64 = SESSION_WINDOW / 4;
/// Most other requests under way.
pub(super) const PLAIN_MAX: usize = 1024;
/// Most bytes of requests under way, in each direction: enough for 10 Gb/s at 10 ms.
pub(super) const UNDER_WAY_BYTES_MAX: usize = 16 << 20;

const TAG_OPEN: u64 = u64::MAX;
const TAG_KEEP_ALIVE: u64 = u64::MAX - 1;
const TAG_END: u64 = u64::MAX - 2;
/// Set in tags of requests without a number, which hold a generation and an index; tags of numbered
/// ones hold the generation of the session and the number.
const PLAIN_BIT: u64 = 1 << 63;
const NUMBER_BITS: u32 = 44;
const NUMBER_MASK: u64 = (1 << NUMBER_BITS) - 1;
const GENERATION_MASK: u64 = (1 << 19) - 1;
/// Below bit 30, so that no plain tag is one of the three above.
const PLAIN_GENERATION_MASK: u32 = (1 << 30) - 1;

/// A request with `T`, to whom its outcome is told.
#[derive(Debug)]
pub(super) struct Pending<T> {
    pub(super) body: RequestBody,
    /// `None`: nobody waits for the outcome any more.
    pub(super) target: Option<T>,
    pub(super) deadline: Instant,
}

/// What became of requests.
#[derive(Debug)]
pub(super) enum Event<T> {
    /// An answer.
    Answered {
        target: T,
        body: RequestBody,
        result: Result<ReplyBody, ReplyError>,
    },
    /// No answer in time; whether it was or will be done is open.
    Expired(T),
    /// The session was ended by the servers while this was under way or waited.
    Fenced(T),
    /// The session was ended by the servers; a new one will be opened when there is need.
    SessionLost,
    /// The server does not lead (any more).
    NotLeader(Option<ServerId>),
    /// Data were damaged on their way to the server: everything is to be sent again on a new connection.
    Damaged,
    /// The session was ended as we asked.
    Ended,
}

pub(super) struct Session<T> {
    name: String,
    user: String,
    nonces: Box<dyn FnMut() -> u64 + Send>,
    nonce: u64,
    id: Option<SessionId>,
    /// Counts sessions, so that late answers to an earlier one are told apart.
    generation: u64,
    /// Sent on the present connection.
    is_opening: bool,
    is_keep_alive_sent: bool,
    numbered: Numbered<T>,
    plain: Plain<T>,
}

/// Numbered requests. All below `first` have been answered.
struct Numbered<T> {
    first: u64,
    under_way: VecDeque<Option<Pending<T>>>,
    bytes: usize,
    waiting: VecDeque<Pending<T>>,
}

/// Requests without a number, which may be repeated freely.
struct Plain<T> {
    slots: Vec<PlainSlot<T>>,
    free: Vec<u32>,
    bytes: usize,
    waiting: VecDeque<Pending<T>>,
}

struct PlainSlot<T> {
    /// Counts the requests that have used this slot.
    generation: u32,
    pending: Option<Pending<T>>,
    /// Generation of the session under which it was sent last.
    sent_under: u64,
}

impl<T> Session<T> {
    /// A session that is not open yet. `nonces` gives random numbers.
    pub(super) fn new(
        name: String,
        user: String,
        mut nonces: Box<dyn FnMut() -> u64 + Send>,
    ) -> Session<T> {
        Session {
            name,
            user,
            nonce: nonces(),
            nonces,
            id: None,
            generation: 0,
            is_opening: false,
            is_keep_alive_sent: false,
            numbered: Numbered {
                first: 1,
                under_way: VecDeque::new(),
                bytes: 0,
                waiting: VecDeque::new(),
            },
            plain: Plain {
                slots: Vec::new(),
                free: Vec::new(),
                bytes: 0,
                waiting: VecDeque::new(),
            },
        }
    }

    /// Whether the servers know this session.
    pub(super) fn is_open(&self) -> bool {
        self.id.is_some()
    }

    /// Whether requests wait or are under way, for whose outcome someone waits or whose number must
    /// be settled.
    pub(super) fn is_busy(&self) -> bool {
        self.is_awaiting() || !self.numbered.waiting.is_empty() || !self.plain.waiting.is_empty()
    }

    /// Whether numbered requests wait or are under way.
    pub(super) fn is_changing(&self) -> bool {
        !self.numbered.under_way.is_empty() || !self.numbered.waiting.is_empty()
    }

    /// Whether the server owes an answer.
    pub(super) fn is_awaiting(&self) -> bool {
        self.is_opening
            || self.is_keep_alive_sent
            || !self.numbered.under_way.is_empty()
            || self.plain.free.len() < self.plain.slots.len()
    }

    /// Takes a request; [`Session::pump`] sends it.
    pub(super) fn submit(&mut self, pending: Pending<T>) {
        if pending.body.is_numbered() {
            self.numbered.waiting.push_back(pending);
        } else {
            self.plain.waiting.push_back(pending);
        }
    }

    /// Sends what waits, as far as the limits allow. Gives whether something was sent.
    pub(super) fn pump(&mut self, out: &mut SendQueue) -> bool {
        let before = out.len_bytes();
        while let Some((tag, pending)) = self.plain.start_next(self.generation) {
            envelope(tag, self.id, 0, self.numbered.first).encode(&pending.body, out);
        }
        if !self.numbered.waiting.is_empty() {
            match self.id {
                Some(_) => self.pump_numbered(out),
                None => self.open(out),
            }
        }
        out.len_bytes() != before
    }

    fn pump_numbered(&mut self, out: &mut SendQueue) {
        while let Some(number) = self.numbered.start_next() {
            self.send_numbered(number, out);
        }
    }

    fn send_numbered(&self, number: u64, out: &mut SendQueue) {
        let index = (number - self.numbered.first) as usize;
        if let Some(Some(pending)) = self.numbered.under_way.get(index) {
            let tag = (self.generation & GENERATION_MASK) << NUMBER_BITS | number;
            envelope(tag, self.id, number, self.numbered.first).encode(&pending.body, out);
        }
    }

    fn open(&mut self, out: &mut SendQueue) {
        if self.is_opening {
            return;
        }
        self.is_opening = true;
        let body = RequestBody::OpenSession {
            nonce: self.nonce,
            name: self.name.clone(),
            user: self.user.clone(),
        };
        envelope(TAG_OPEN, None, 0, 0).encode(&body, out);
    }

    /// On a new connection: sends what was not answered.
    pub(super) fn reconnected(&mut self, out: &mut SendQueue) {
        self.is_opening = false;
        self.is_keep_alive_sent = false;
        let first = self.numbered.first;
        for number in first..first + self.numbered.under_way.len() as u64 {
            self.send_numbered(number, out);
        }
        for (index, slot) in self.plain.slots.iter_mut().enumerate() {
            if let Some(pending) = &slot.pending {
                slot.sent_under = self.generation;
                let tag = plain_tag(slot.generation, index);
                envelope(tag, self.id, 0, first).encode(&pending.body, out);
            }
        }
        self.pump(out);
    }

    /// Says that the client lives, if a session is open.
    pub(super) fn keep_alive(&mut self, out: &mut SendQueue) {
        if self.id.is_some() && !self.is_keep_alive_sent {
            self.is_keep_alive_sent = true;
            envelope(TAG_KEEP_ALIVE, self.id, 0, self.numbered.first)
                .encode(&RequestBody::KeepAlive, out);
        }
    }

    /// Ends the session.
    pub(super) fn end(&mut self, out: &mut SendQueue) {
        envelope(TAG_END, self.id, 0, self.numbered.first).encode(&RequestBody::EndSession, out);
    }

    /// Takes a reply.
    pub(super) fn handle_reply(&mut self, reply: Reply, events: &mut Vec<Event<T>>) {
        if let Err(ReplyError::NotLeader { leader }) = reply.body {
            events.push(Event::NotLeader(leader));
            return;
        }
        let is_stale = reply.body == Err(ReplyError::Refused(Refusal::StaleSession));
        match reply.tag {
            TAG_OPEN => self.handle_open(reply.body, events),
            TAG_END => events.push(Event::Ended),
            TAG_KEEP_ALIVE => {
                let was_sent = std::mem::take(&mut self.is_keep_alive_sent);
                if is_stale && was_sent {
                    self.lose(events);
                }
            }
            tag if tag & PLAIN_BIT != 0 => {
                let Some((pending, sent_under)) = self.plain.take(tag) else {
                    return;
                };
                if !is_stale {
                    answer(pending, reply.body, events);
                    return;
                }
                // Reading changes nothing: it is repeated under the next session.
                self.plain.waiting.push_front(pending);
                if sent_under == self.generation && self.id.is_some() {
                    self.lose(events);
                }
            }
            tag => {
                if tag >> NUMBER_BITS != self.generation & GENERATION_MASK {
                    return;
                }
                if is_stale {
                    self.lose(events);
                    return;
                }
                let number = tag & NUMBER_MASK;
                if reply.body == Err(ReplyError::Invalid) && self.numbered.has_data(number) {
                    events.push(Event::Damaged);
                    return;
                }
                if let Some(pending) = self.numbered.take(number) {
                    answer(pending, reply.body, events);
                }
            }
        }
    }

    fn handle_open(&mut self, body: Result<ReplyBody, ReplyError>, events: &mut Vec<Event<T>>) {
        if !self.is_opening {
            return;
        }
        self.is_opening = false;
        let error = match body {
            Ok(ReplyBody::Session(id)) => {
                self.id = Some(id);
                return;
            }
            Ok(_) => ReplyError::Invalid,
            Err(error) => error,
        };
        for pending in self.numbered.waiting.drain(..) {
            answer(pending, Err(error.clone()), events);
        }
    }

    /// The servers have ended the session. What was under way may or may not have been done; what
    /// waited was meant for the time before, in which others may have taken over since.
    fn lose(&mut self, events: &mut Vec<Event<T>>) {
        self.generation += 1;
        self.id = None;
        self.nonce = (self.nonces)();
        self.is_opening = false;
        self.is_keep_alive_sent = false;
        let numbered = &mut self.numbered;
        numbered.first = 1;
        numbered.bytes = 0;
        let under_way = numbered.under_way.drain(..).flatten();
        for pending in under_way.chain(numbered.waiting.drain(..)) {
            events.extend(pending.target.map(Event::Fenced));
        }
        events.push(Event::SessionLost);
    }

    /// Gives up what was not answered by its deadline. Gives whether a numbered request that was sent
    /// is among it: the connection should be closed then, so that no more of it is sent.
    ///
    /// Such a number stays in use until it is answered. But it must not be *done* later, when the
    /// front end's client may have written elsewhere in its place: from now on the number stands for
    /// a request that does nothing, and whichever of the two comes first in the log is the one.
    pub(super) fn expire(&mut self, now: Instant, events: &mut Vec<Event<T>>) -> bool {
        for waiting in [&mut self.numbered.waiting, &mut self.plain.waiting] {
            // One timeout for all, so the oldest are at the front; one that was put back to the front
            // is older than the others.
            while waiting
                .front()
                .is_some_and(|pending| pending.deadline <= now)
            {
                let target = waiting.pop_front().and_then(|pending| pending.target);
                events.extend(target.map(Event::Expired));
            }
        }
        self.plain.expire(now, events);
        self.numbered.expire(now, events)
    }
}

impl<T> Numbered<T> {
    /// Moves the next request that waits to those under way; gives its number.
    fn start_next(&mut self) -> Option<u64> {
        let cost = cost_bytes(&self.waiting.front()?.body);
        let is_full = self.under_way.len() as u64 >= NUMBERED_MAX;
        if is_full || (self.bytes > 0 && self.bytes + cost > UNDER_WAY_BYTES_MAX) {
            return None;
        }
        self.bytes += cost;
        self.under_way.push_back(self.waiting.pop_front());
        Some(self.first + self.under_way.len() as u64 - 1)
    }

    /// Whether the request is under way and carries data.
    fn has_data(&self, number: u64) -> bool {
        let index = number.checked_sub(self.first);
        let pending = index.and_then(|index| self.under_way.get(index as usize));
        let Some(Some(Pending { body, .. })) = pending else {
            return false;
        };
        matches!(
            body.unchecked(),
            RequestBody::Write { .. } | RequestBody::CompareAndWrite { .. }
        )
    }

    fn take(&mut self, number: u64) -> Option<Pending<T>> {
        let index = number.checked_sub(self.first)?;
        let pending = self.under_way.get_mut(index as usize)?.take()?;
        self.bytes -= cost_bytes(&pending.body);
        while let Some(None) = self.under_way.front() {
            self.under_way.pop_front();
            self.first += 1;
        }
        Some(pending)
    }

    fn expire(&mut self, now: Instant, events: &mut Vec<Event<T>>) -> bool {
        let mut is_any = false;
        for pending in self.under_way.iter_mut().flatten() {
            if pending.deadline > now || pending.target.is_none() {
                continue;
            }
            is_any = true;
            events.extend(pending.target.take().map(Event::Expired));
            self.bytes -= cost_bytes(&pending.body);
            pending.body = nothing();
            self.bytes += cost_bytes(&pending.body);
        }
        is_any
    }
}

impl<T> Plain<T> {
    fn start_next(&mut self, session_generation: u64) -> Option<(u64, &Pending<T>)> {
        let cost = cost_bytes(&self.waiting.front()?.body);
        let under_way = self.slots.len() - self.free.len();
        if under_way >= PLAIN_MAX || (self.bytes > 0 && self.bytes + cost > UNDER_WAY_BYTES_MAX) {
            return None;
        }
        self.bytes += cost;
        let pending = self.waiting.pop_front();
        let index = match self.free.pop() {
            Some(index) => index as usize,
            None => {
                self.slots.push(PlainSlot {
                    generation: 0,
                    pending: None,
                    sent_under: 0,
                });
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[index];
        slot.pending = pending;
        slot.sent_under = session_generation;
        let tag = plain_tag(slot.generation, index);
        slot.pending.as_ref().map(|pending| (tag, pending))
    }

    /// Takes a request out, with the generation of the session under which it was sent.
    fn take(&mut self, tag: u64) -> Option<(Pending<T>, u64)> {
        let index = tag as u32 as usize;
        let slot = self.slots.get_mut(index)?;
        if plain_tag(slot.generation, index) != tag {
            return None;
        }
        let pending = slot.pending.take()?;
        slot.generation = (slot.generation + 1) & PLAIN_GENERATION_MASK;
        self.free.push(index as u32);
        self.bytes -= cost_bytes(&pending.body);
        Some((pending, slot.sent_under))
    }

    fn expire(&mut self, now: Instant, events: &mut Vec<Event<T>>) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            let is_late = slot
                .pending
                .as_ref()
                .is_some_and(|pending| pending.deadline <= now);
            if is_late && let Some((pending, _)) = self.take(plain_tag(slot.generation, index)) {
                events.extend(pending.target.map(Event::Expired));
            }
        }
    }
}

fn answer<T>(
    pending: Pending<T>,
    result: Result<ReplyBody, ReplyError>,
    events: &mut Vec<Event<T>>,
) {
    let Pending { body, target, .. } = pending;
    events.extend(target.map(|target| Event::Answered {
        target,
        body,
        result,
    }));
}

fn plain_tag(generation: u32, index: usize) -> u64 {
    PLAIN_BIT | u64::from(generation) << 32 | index as u64
}

fn envelope(tag: u64, session: Option<SessionId>, number: u64, first: u64) -> RequestEnvelope {
    RequestEnvelope {
        tag,
        session: session.unwrap_or_default(),
        number: RequestNumber(number),
        settled_below: RequestNumber(first),
    }
}

/// A numbered request without effect: no volume has number 0, and taking back what was never done is
/// no error.
pub(super) fn nothing() -> RequestBody {
    RequestBody::Detach {
        volume: VolumeId(0),
    }
}

/// What a request counts for against [`UNDER_WAY_BYTES_MAX`].
fn cost_bytes(body: &RequestBody) -> usize {
    match body.unchecked() {
        RequestBody::Read { length_bytes, .. } => *length_bytes as usize,
        RequestBody::Write { data, .. } | RequestBody::CompareAndWrite { data, .. } => data.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
