//! What other threads tell the node thread.

use std::sync::mpsc::SyncSender;
use std::sync::{Mutex, PoisonError};

use mio::Waker;
use pss_core::chunk::ReadError;
use pss_core::engine::{ClientId, DigestJob, DigestPart, Export, Exported, Fetched, VolumeRead};
use pss_core::paxos::LogRead;
use pss_core::paxos::output::WriteId;
use pss_core::types::{Ballot, ServerId, Slot};
use pss_core::wire::client::ServerStatus;
use pss_core::wire::inspect::{EntryInfo, Inspection};

use crate::node::ServerError;

/// Something that has happened on another thread.
pub(crate) enum Event {
    /// A write of the log is durable.
    Persisted(WriteId),
    /// Entries were read from the log.
    LogRead {
        to: ServerId,
        tail_for: Option<Ballot>,
        read: LogRead,
    },
    /// Blocks were read.
    Read {
        read: VolumeRead,
        result: Result<Fetched, ReadError>,
    },
    /// What another server asked for was read.
    Exported { export: Export, exported: Exported },
    /// Chunks were read for a comparison.
    Digested { job: DigestJob, part: DigestPart },
    /// Entries were read for someone who wants to see them, newest first.
    EntriesRead {
        client: ClientId,
        tag: u64,
        entries: Vec<EntryInfo>,
    },
    /// What another thread had to look for was found.
    Inspected {
        client: ClientId,
        tag: u64,
        inspection: Inspection,
    },
    /// The base of a copy is durable.
    BaseStored,
    /// A checkpoint is durable up to this slot.
    CheckpointDone(Slot),
    /// How full the disk is, and where the log begins.
    Space {
        /// Bytes of the log's segments.
        log_bytes: u64,
        free_bytes: u64,
        total_bytes: u64,
        log_first: Slot,
    },
    /// Something that ends the server.
    Failed(ServerError),
    /// Hand the leadership over and stop.
    Stop,
    /// Stop at once, as if the process had been killed.
    StopNow,
    /// Tell where the server stands.
    Status(SyncSender<ServerStatus>),
}

/// Queue of [`Event`]s that interrupts the node thread's waiting.
pub(crate) struct Inbox {
    state: Mutex<State>,
    waker: Waker,
}

#[derive(Default)]
struct State {
    events: Vec<Event>,
    /// The node thread waits, or is about to. Else it looks here again before it waits, and the system
    /// call that wakes it can be saved.
    sleeping: bool,
}

impl Inbox {
    pub(crate) fn new(waker: Waker) -> Inbox {
        Inbox {
            state: Mutex::default(),
            waker,
        }
    }

    pub(crate) fn push(&self, event: Event) {
        self.push_all([event]);
    }

    pub(crate) fn push_all(&self, events: impl IntoIterator<Item = Event>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.events.extend(events);
        let wake = std::mem::take(&mut state.sleeping);
        drop(state);
        if wake {
            // It fails only when the poll is gone, and then nobody waits.
            let _ = self.waker.wake();
        }
    }

    /// Announces that the node thread is going to wait. Returns whether it may: if not, something is
    /// here for it.
    pub(crate) fn sleep(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sleeping = state.events.is_empty();
        state.sleeping
    }

    /// Moves all events to `into`, which is empty.
    pub(crate) fn take(&self, into: &mut Vec<Event>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sleeping = false;
        std::mem::swap(&mut state.events, into);
    }
}
