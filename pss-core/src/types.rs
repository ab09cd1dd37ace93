//! Names for the things that must not be mixed up.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a block, the unit that PSS orders, checksums and stores.
pub const BLOCK_BYTES: usize = 4096;
/// Most servers of one cell: ids 0 to 7.
pub const SERVERS_MAX: usize = 8;
/// Ids below this take part in agreement; the others only learn.
pub const CORE_SERVERS_MAX: u8 = 5;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize,
        )]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// One log of a cell. Group 0 is the only one that exists now; every format carries the number.
    GroupId(u16)
);
number!(
    /// A server of the cell, 0 to 7. Ids 0 to 4 are core servers, 5 to 7 learners.
    ServerId(u8)
);
number!(
    /// Position in the replicated log. The first entry has slot 1; slot 0 is before every entry.
    Slot(u64)
);
number!(
    /// A volume, numbered in the order of creation and never used again.
    VolumeId(u32)
);
number!(
    /// Chunk of a volume: its number, at most 2^24 - 1.
    ChunkIndex(u32)
);
number!(
    /// A client session; the slot of the log entry that opened it, so never used twice.
    SessionId(u64)
);
number!(
    /// Number of a request within its session, counted from 1.
    RequestNumber(u64)
);
number!(
    /// Life of a data directory. A wiped or replaced disk comes back with a higher one.
    Incarnation(u64)
);

impl ServerId {
    /// Whether this server votes (ids 0 to 4).
    pub fn is_core(self) -> bool {
        self.0 < CORE_SERVERS_MAX
    }
}

impl Slot {
    /// The slot after this one.
    #[must_use]
    pub fn next(self) -> Slot {
        Slot(self.0 + 1)
    }
}

/// Ballot: (number, server), totally ordered (Paxos Made Simple, section 2.2). The default is below
/// every ballot that a server can use.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize,
)]
pub struct Ballot {
    /// Round.
    pub number: u64,
    /// The server that may propose under it.
    pub server: ServerId,
}

impl fmt::Display for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.number, self.server)
    }
}

/// Identity of a log entry. Two entries with equal ids are equal, and so is everything before them;
/// of two logs the one whose last entry has the greater id holds everything that can be chosen.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize,
)]
pub struct EntryId {
    /// Ballot under which the entry was first proposed.
    pub ballot: Ballot,
    /// Its position.
    pub slot: Slot,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.slot, self.ballot)
    }
}

/// How much a server has bound itself to: nothing that it has told others is beyond it. It only rises, in this order.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Standing {
    /// Life of its data directory.
    pub life: Incarnation,
    /// Its durable promise.
    pub promised: Ballot,
    /// The last entry that it has acknowledged under that promise.
    pub acknowledged: EntryId,
}

/// The greatest standing of other servers that one has seen.
pub type Marks = BTreeMap<ServerId, Standing>;

/// Which life of each server counts, as an entry of the log has said: promises and acknowledgements of another
/// one do not. `Incarnation(0)`: nobody has said it yet, any counts.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Admitted([Incarnation; SERVERS_MAX]);

impl Admitted {
    /// The life that counts.
    pub fn of(&self, server: ServerId) -> Incarnation {
        let admitted = self.0.get(usize::from(server.0));
        admitted.copied().unwrap_or_default()
    }

    /// Whether what this life of the server says counts.
    pub fn counts(&self, server: ServerId, incarnation: Incarnation) -> bool {
        let admitted = self.of(server);
        admitted == Incarnation(0) || admitted == incarnation
    }

    /// From now on this life counts, unless a later one does already.
    pub fn admit(&mut self, server: ServerId, incarnation: Incarnation) {
        if let Some(admitted) = self.0.get_mut(usize::from(server.0)) {
            *admitted = incarnation.max(*admitted);
        }
    }

    /// What one of the two knows.
    #[must_use]
    pub fn merged(mut self, other: &Admitted) -> Admitted {
        for (server, incarnation) in other.iter() {
            self.admit(server, incarnation);
        }
        self
    }

    /// Every server with the life that counts.
    pub fn iter(&self) -> impl Iterator<Item = (ServerId, Incarnation)> + '_ {
        let ids = (0..).map(ServerId);
        ids.zip(self.0.iter().copied())
    }
}
