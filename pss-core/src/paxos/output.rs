//! Everything a replica can ask the outside to do.

use crate::entry::Entry;
use crate::paxos::message::Message;
use crate::types::{Ballot, EntryId, Incarnation, ServerId, Slot};

/// Names one [`Output::Persist`]; the outside reports them back in order.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct WriteId(pub u64);

/// What a replica wants done. Outputs are carried out in order; `Persist` may be carried out by
/// another thread, in order among themselves, and is reported by `handle_persisted` when durable.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Output {
    /// Send a message. It may get lost.
    Send {
        /// Receiver.
        to: ServerId,
        /// What.
        message: Message,
    },
    /// Make something durable, then call `handle_persisted(write)`. A failure ends the server.
    Persist {
        /// Name of this write.
        write: WriteId,
        /// What.
        what: Persist,
    },
    /// Apply these chosen entries, which are durable here, in order; then call `handle_applied`.
    Apply {
        /// Consecutive entries.
        entries: Vec<Entry>,
    },
    /// Read chosen entries after a slot from the log for a server that lags (at most about
    /// `bytes_max`), and call `handle_log_read`.
    ReadLog {
        /// For whom.
        to: ServerId,
        /// Entries after this slot.
        after: Slot,
        /// And up to this one.
        until: Slot,
        /// Stop after about so many bytes.
        bytes_max: usize,
        /// The ballot of the candidate that asked for a tail; none for a server that catches up.
        tail_for: Option<Ballot>,
    },
    /// The log of `donor` does not reach back to our applied slot: copy chunks.
    CopyChunks {
        /// Who has said so.
        donor: ServerId,
    },
    /// The role changed.
    Role(RoleChange),
}

/// Something to make durable.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Persist {
    /// Append entries to the log, after cutting it behind `truncate_after` if that is given.
    Append {
        /// Remove the entries behind this slot first.
        truncate_after: Option<Slot>,
        /// Consecutive entries.
        entries: Vec<Entry>,
        /// Known chosen, written down as a hint for the next start.
        chosen: Slot,
    },
    /// Sync the log, then make the promise durable.
    Promise(Ballot),
    /// Sync the log, then make durable that this server, in this life, learns what an earlier one knew; or that it has.
    Rejoining(Option<Incarnation>),
    /// Forget the log and start it anew behind `base`; the state at `base` and the note that chunks
    /// are being copied have been made durable before.
    Reset {
        /// The entry before the first that will be appended.
        base: EntryId,
    },
}

/// What a server has become.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum RoleChange {
    /// Leads: the barrier of its ballot is applied, requests are served.
    Leader(Ballot),
    /// Follows, or searches a leader. Requests in hand must be sent elsewhere: whether they will be
    /// chosen is open.
    Follower,
}
