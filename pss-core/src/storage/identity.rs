//! Who a server is and what it has promised.

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
/// | 4  | 1     | 1: still learns what its earlier life knew; else 0 |
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
}

impl IdentityFacts {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BODY_BYTES);
        out.put_u16_le(self.group.0);
        out.put_u8(self.server.0);
        out.put_u8(self.promised.server.0);
        out.put_u8(u8::from(self.rejoining));
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
        let rejoining = input.get_u8() != 0;
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
            rejoining,
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
        let failed = |source| pair.error("format", source);
        for entry in disk.read_dir("").map_err(failed)? {
            let name = entry.name;
            if !force && !IGNORED.contains(&name.as_str()) {
                return Err(StorageError::NotEmpty { name });
            }
            // The identity goes first: a format that is cut short leaves nothing that opens.
            if FILES.contains(&name.as_str()) {
                disk.remove_file(&name).map_err(failed)?;
            }
        }
        disk.sync_dir("").map_err(failed)?;
        for entry in disk.read_dir("").map_err(failed)? {
            if DIRECTORIES.contains(&entry.name.as_str()) {
                disk.remove_dir_all(&entry.name).map_err(failed)?;
            }
        }
        disk.sync_dir("").map_err(failed)?;
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
        };
        let bytes = facts.encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "01000205010000000707070707070707070707070707070703000000000000000400000000000000"
        );
        assert_eq!(IdentityFacts::decode(&bytes), Some(facts));
        assert_eq!(IdentityFacts::decode(&bytes[1..]), None);
    }
}
