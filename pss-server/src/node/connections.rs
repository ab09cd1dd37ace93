//! All TCP connections of a server and what each is for.

use pss_core::engine::ClientId;
use pss_core::time::Instant;
use pss_core::types::{Incarnation, ServerId};
use pss_core::wire::auth::Handshake;

use crate::clients::{CLIENTS_MAX, ClientLoad};
use crate::node::connection::Connection;

/// Callers that have not said who they are. They are let in before they have proved anything, so they
/// are few.
pub(super) const CALLERS_MAX: usize = 128;
/// Everything that is accepted; the rest are the servers of the cell, in both directions.
const SLOTS_MAX: usize = CLIENTS_MAX + CALLERS_MAX + 64;
/// A [`ClientId`] has the place of the connection in its low bits, so that it is found without a search,
/// and a number that is never used again above.
const PLACE_BITS: u32 = 16;

const _: () = assert!(SLOTS_MAX < 1 << PLACE_BITS);

/// What a connection is for.
pub(super) enum Kind {
    /// Someone has called and not proved who it is.
    Caller(Handshake),
    /// A client sends requests.
    Client(ClientLoad),
    /// Another server sends messages.
    Inbound(ServerId, Incarnation),
    /// We call another server.
    Calling(ServerId, Handshake),
    /// We send messages to another server.
    Outbound(ServerId),
}

/// A connection in its place.
pub(super) struct Slot {
    pub(super) connection: Connection,
    pub(super) kind: Kind,
    pub(super) id: ClientId,
    pub(super) opened: Instant,
    /// It is up: false only while we are calling.
    pub(super) connected: bool,
    /// It waits to be read from.
    pub(super) queued: bool,
    /// It waits to be flushed.
    pub(super) dirty: bool,
    /// It is not read from until some of its requests are answered.
    pub(super) paused: bool,
    /// Requests that a client has sent.
    pub(super) requests: u64,
    /// When it sent the last one.
    pub(super) last_request: Option<Instant>,
}

/// The connections, each in a place that is used again when it has ended.
#[derive(Default)]
pub(super) struct Connections {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    opened: u64,
    callers: usize,
    clients: usize,
}

impl Connections {
    /// Whether one more connection may be taken.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() - self.free.len() < SLOTS_MAX
    }

    /// The caller that has to go before another one is let in, if there are too many: the one that has
    /// had the most time. So those who say nothing cannot keep out those who do.
    pub(super) fn surplus_caller(&self) -> Option<usize> {
        if self.callers < CALLERS_MAX {
            return None;
        }
        let callers = self
            .iter()
            .filter(|(_, slot)| matches!(slot.kind, Kind::Caller(_)));
        callers
            .min_by_key(|(_, slot)| slot.id.0 >> PLACE_BITS)
            .map(|(place, _)| place)
    }

    /// Connections of clients.
    pub(super) fn clients(&self) -> usize {
        self.clients
    }

    /// The place that the next connection gets.
    pub(super) fn next_place(&self) -> usize {
        self.free.last().copied().unwrap_or(self.slots.len())
    }

    /// Puts a connection into [`Connections::next_place`].
    pub(super) fn insert(&mut self, now: Instant, connection: Connection, kind: Kind) {
        let place = self.next_place();
        self.opened += 1;
        self.count(&kind, true);
        let slot = Slot {
            connected: !matches!(kind, Kind::Calling(..)),
            connection,
            kind,
            id: ClientId(self.opened << PLACE_BITS | place as u64),
            opened: now,
            queued: false,
            dirty: false,
            paused: false,
            requests: 0,
            last_request: None,
        };
        match self.free.pop() {
            Some(place) => self.slots[place] = Some(slot),
            None => self.slots.push(Some(slot)),
        }
    }

    pub(super) fn remove(&mut self, place: usize) -> Option<Slot> {
        let slot = self.slots.get_mut(place)?.take()?;
        self.count(&slot.kind, false);
        self.free.push(place);
        Some(slot)
    }

    pub(super) fn get(&self, place: usize) -> Option<&Slot> {
        self.slots.get(place)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, place: usize) -> Option<&mut Slot> {
        self.slots.get_mut(place)?.as_mut()
    }

    /// The place of a client's connection, if it is still the one that the id was made for.
    pub(super) fn place_of(&self, client: ClientId) -> Option<usize> {
        let place = (client.0 & ((1 << PLACE_BITS) - 1)) as usize;
        let slot = self.slots.get(place)?.as_ref()?;
        (slot.id == client).then_some(place)
    }

    /// Says what a connection is for, now that it is known.
    pub(super) fn become_kind(&mut self, place: usize, kind: Kind) {
        self.count(&kind, true);
        let Some(slot) = self.get_mut(place) else {
            return;
        };
        let before = std::mem::replace(&mut slot.kind, kind);
        self.count(&before, false);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Slot)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(place, slot)| Some((place, slot.as_ref()?)))
    }

    fn count(&mut self, kind: &Kind, more: bool) {
        let counter = match kind {
            Kind::Caller(_) => &mut self.callers,
            Kind::Client(_) => &mut self.clients,
            _ => return,
        };
        if more {
            *counter += 1;
        } else {
            *counter -= 1;
        }
    }
}
