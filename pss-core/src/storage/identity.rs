//! Who a server is and what it has promised.

use std::io;
use std::sync::Arc;

use bytes::{Buf, BufMut};

use super::StorageError;
use super::checkpoint::CheckpointFile;
use super::pair::{Pair, PairError};
use crate::disk::{DIRECTORIES, Disk};
use crate::types::{Ballot, GroupId, Incarnation, ServerId};

const NAME: &str = "identity";
const MAGIC: &[u8; 8] = b"PSSIDEN1";
const BODY_BYTES: usize = 40;
/// What formatting removes, with [`DIRECTORIES`].
const FILES: [&str; 4] = ["identity.0", "identity.1", "checkpoint.0", "checkpoint.1"];
/// What may be in a directory that counts as empty: our lock, and what `mkfs` leaves.
const IGNORED: [&str; 2] = ["lock", "lost+found"];

/// What a data directory says of its server.
///
/// | at | bytes | field                                |
/// |----|-------|--------------------------------------|
/// | 0  | 2     | group                                |
/// | 2  | 1     | server id                            |
/// | 3  | 1     | server id of the promised ballot     |
/// | 4  | 1     | 1: still learns what its earlier life knew; 2: the same, and what that one left is to be removed first; 3: only the latter; else 0 |
/// | 5  | 3     | zero                                 |
/// | 8  | 16    | cell                                 |
/// | 24 | 8     | incarnation                          |
/// | 32 | 8     | number of the promised ballot        |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IdentityFacts {
    /// Group.
    pub group: GroupId,
    /// Cell.
    pub cell: [u8; 16],
    /// Server.
    pub server: ServerId,
    /// Life of this directory.
    pub incarnation: Incarnation,
    /// No ballot below is accepted.
    pub promised: Ballot,
    /// The directory replaces another one whose promises and log are gone: until it has learned what others
    /// know, the server neither votes nor acknowledges.
    pub rejoining: bool,
    /// What the earlier life left in the directory is removed when it is opened next.
    pub discards: bool,
}

const REJOINING: u8 = 1;
const REJOINING_DISCARDS: u8 = 2;
const DISCARDS: u8 = 3;

impl IdentityFacts {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BODY_BYTES);
        out.put_u16_le(self.group.0);
        out.put_u8(self.server.0);
        out.put_u8(self.promised.server.0);
        out.put_u8(match (self.rejoining, self.discards) {
            (false, false) => 0,
            (true, false) => REJOINING,
            (true, true) => REJOINING_DISCARDS,
            (false, true) => DISCARDS,
        });
        out.put_slice(&[0; 3]);
        out.put_slice(&self.cell);
        out.put_u64_le(self.incarnation.0);
        out.put_u64_le(self.promised.number);
        out
    }

    fn decode(mut body: &[u8]) -> Option<IdentityFacts> {
        if body.len() < BODY_BYTES {
            return None;
        }
        let input = &mut body;
        let group = GroupId(input.get_u16_le());
        let server = ServerId(input.get_u8());
        let promised_server = ServerId(input.get_u8());
        let life = input.get_u8();
        input.advance(3);
        let mut cell = [0; 16];
        input.copy_to_slice(&mut cell);
        Some(IdentityFacts {
            group,
            cell,
            server,
            incarnation: Incarnation(input.get_u64_le()),
            promised: Ballot {
                number: input.get_u64_le(),
                server: promised_server,
            },
            rejoining: life != 0 && life != DISCARDS,
            discards: matches!(life, REJOINING_DISCARDS | DISCARDS),
        })
    }
}

/// The identity in a data directory: `identity.0` and `identity.1`.
pub struct Identity {
    pair: Pair,
    facts: IdentityFacts,
}

impl Identity {
    /// Formats a directory: makes the identity, and a checkpoint before the first entry.
    ///
    /// # Errors
    /// [`StorageError::NotEmpty`] unless `force`, which removes what an earlier format has made.
    pub fn create(
        disk: Arc<dyn Disk>,
        facts: IdentityFacts,
        force: bool,
    ) -> Result<Identity, StorageError> {
        let mut pair = Pair::create(Arc::clone(&disk), NAME, MAGIC);
        for entry in disk.read_dir("").map_err(|it| pair.error("format", it))? {
            let name = entry.name;
            if !force && !IGNORED.contains(&name.as_str()) {
                return Err(StorageError::NotEmpty { name });
            }
        }
        // The identity goes first: a format that is cut short leaves nothing that opens.
        remove_all(&disk, &FILES).map_err(|it| pair.error("format", it))?;
        CheckpointFile::create(disk)?;
        // And comes last: without it the directory is not formatted.
        pair.store(&facts.encode())?;
        Ok(Identity { pair, facts })
    }

    /// Opens the identity of a formatted directory.
    ///
    /// # Errors
    /// [`PairError`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<Identity, PairError> {
        let (pair, body) = Pair::open(disk, NAME, MAGIC)?;
        let facts = IdentityFacts::decode(&body).ok_or_else(|| pair.damaged())?;
        Ok(Identity { pair, facts })
    }

    /// What it says.
    pub fn facts(&self) -> IdentityFacts {
        self.facts
    }

    /// Makes a promise durable.
    ///
    /// # Errors
    /// [`PairError::Io`]; then no promise may be given any more.
    ///
    /// # Panics
    /// If the promise is below the present one.
    pub fn set_promise(&mut self, promised: Ballot) -> Result<(), PairError> {
        assert!(promised >= self.facts.promised, "promises only rise");
        let facts = IdentityFacts {
            promised,
            ..self.facts
        };
        self.pair.store(&facts.encode())?;
        self.facts = facts;
        Ok(())
    }

    /// Makes durable that the server, in this life, learns what an earlier one knew; or that it has.
    ///
    /// # Errors
    /// [`PairError::Io`].
    pub fn set_rejoining(&mut self, life: Option<Incarnation>) -> Result<(), PairError> {
        let facts = IdentityFacts {
            rejoining: life.is_some(),
            incarnation: life.unwrap_or(self.facts.incarnation),
            ..self.facts
        };
        self.pair.store(&facts.encode())?;
        self.facts = facts;
        Ok(())
    }

    /// Makes durable that the server begins a life in which nothing counts that the directory holds: whoever opens it
    /// next removes that first. Until this is durable, the directory is what it was. `rejoining`: see
    /// [`IdentityFacts::rejoining`].
    ///
    /// # Errors
    /// [`PairError::Io`].
    pub fn discard(&mut self, life: Incarnation, rejoining: bool) -> Result<(), PairError> {
        let facts = IdentityFacts {
            incarnation: life,
            rejoining,
            discards: true,
            ..self.facts
        };
        self.pair.store(&facts.encode())?;
        self.facts = facts;
        Ok(())
    }

    /// Removes what an earlier life has left, if that is to be done. Cut short, it is done again by the next one.
    pub(super) fn finish_discarding(&mut self, disk: &Arc<dyn Disk>) -> Result<(), PairError> {
        if !self.facts.discards {
            return Ok(());
        }
        let [_, _, checkpoints @ ..] = FILES;
        remove_all(disk, &checkpoints).map_err(|it| self.pair.error("discard", it))?;
        CheckpointFile::create(Arc::clone(disk))?;
        let facts = IdentityFacts {
            discards: false,
            ..self.facts
        };
        self.pair.store(&facts.encode())?;
        self.facts = facts;
        Ok(())
    }
}

/// Removes these files, then log and chunks.
fn remove_all(disk: &Arc<dyn Disk>, files: &[&str]) -> io::Result<()> {
    for entry in disk.read_dir("")? {
        if files.contains(&entry.name.as_str()) {
            disk.remove_file(&entry.name)?;
        }
    }
    disk.sync_dir("")?;
    for entry in disk.read_dir("")? {
        if DIRECTORIES.contains(&entry.name.as_str()) {
            disk.remove_dir_all(&entry.name)?;
        }
    }
    disk.sync_dir("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let facts = IdentityFacts {
            group: GroupId(1),
            cell: [7; 16],
            server: ServerId(2),
            incarnation: Incarnation(3),
            promised: Ballot {
                number: 4,
                server: ServerId(5),
            },
            rejoining: true,
            discards: false,
        };
        let bytes = facts.encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "01000205010000000707070707070707070707070707070703000000000000000400000000000000"
        );
        assert_eq!(IdentityFacts::decode(&bytes), Some(facts));
        assert_eq!(IdentityFacts::decode(&bytes[1..]), None);
        for (rejoining, discards, byte) in [
            (false, false, 0),
            (true, false, 1),
            (true, true, 2),
            (false, true, 3),
        ] {
            let facts = IdentityFacts {
                rejoining,
                discards,
                ..facts
            };
            assert_eq!(facts.encode()[4], byte);
            assert_eq!(IdentityFacts::decode(&facts.encode()), Some(facts));
        }
    }
}
