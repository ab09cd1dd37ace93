//! Up to where chunks are durable, and the replicated state there.

use std::sync::Arc;

use bytes::{Buf, BufMut};

use super::pair::{Pair, PairError};
use crate::disk::Disk;
use crate::state::{BadState, State};
use crate::types::{Ballot, EntryId, ServerId, Slot};

const NAME: &str = "checkpoint";
const MAGIC: &[u8; 8] = b"PSSCKPT1";
const FIXED_BYTES: usize = 24;
const PROVEN_BYTES: usize = 8;

const COMPLETE: u8 = 0;
const INSTALLING: u8 = 1;
const INSTALLING_PARTLY_PROVEN: u8 = 2;

/// In [`CheckpointRecord::installing`]: the data of all chunks are as their tables say.
pub const ALL_PROVEN: Slot = Slot(u64::MAX);

/// A checkpoint.
///
/// | at | bytes | field                                                                     |
/// |----|-------|---------------------------------------------------------------------------|
/// | 0  | 8     | slot of the last entry that was applied                                   |
/// | 8  | 8     | number of its ballot                                                      |
/// | 16 | 1     | server id of its ballot                                                   |
/// | 17 | 1     | 1 or 2: chunks are being copied from another server; 2: with a proven slot |
/// | 18 | 6     | zero                                                                      |
/// | 24 | 8     | the proven slot, if at 17 is 2; otherwise left out                        |
/// |    |       | the replicated state                                                      |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CheckpointRecord {
    /// The last entry that was applied; all before it are durable in the chunks.
    pub applied: EntryId,
    /// Chunks are being copied from another server: those here are not complete. A table that was last
    /// changed above this slot may be newer than the data of its chunk, so it proves nothing.
    pub installing: Option<Slot>,
    /// The replicated state there.
    pub state: State,
}

/// The checkpoint in a data directory: `checkpoint.0` and `checkpoint.1`.
pub struct CheckpointFile {
    pair: Pair,
}

impl CheckpointFile {
    /// Makes the checkpoint before the first entry.
    pub(super) fn create(disk: Arc<dyn Disk>) -> Result<CheckpointFile, PairError> {
        let pair = Pair::create(disk, NAME, MAGIC);
        let mut file = CheckpointFile { pair };
        file.store(EntryId::default(), None, &State::default().encode())?;
        Ok(file)
    }

    /// Reads the newest checkpoint.
    ///
    /// # Errors
    /// [`PairError`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<(CheckpointFile, CheckpointRecord), PairError> {
        let (pair, body) = Pair::open(disk, NAME, MAGIC)?;
        let record = decode(&body).map_err(|bad| match bad {
            BadCheckpoint::Malformed => pair.damaged(),
            BadCheckpoint::Newer(what) => pair.newer(what),
        })?;
        Ok((CheckpointFile { pair }, record))
    }

    /// Makes a checkpoint durable: `state` is [`State::encode`] at `applied`, and the chunks have
    /// been flushed since. Afterwards the log may be trimmed up to `applied`.
    ///
    /// # Errors
    /// [`PairError::Io`]; final.
    pub fn store(
        &mut self,
        applied: EntryId,
        installing: Option<Slot>,
        state: &[u8],
    ) -> Result<(), PairError> {
        self.pair.store(&encode(applied, installing, state))
    }
}

fn encode(applied: EntryId, installing: Option<Slot>, state: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(FIXED_BYTES + PROVEN_BYTES + state.len());
    body.put_u64_le(applied.slot.0);
    body.put_u64_le(applied.ballot.number);
    body.put_u8(applied.ballot.server.0);
    let (kind, proven) = match installing {
        None => (COMPLETE, None),
        Some(ALL_PROVEN) => (INSTALLING, None),
        Some(proven) => (INSTALLING_PARTLY_PROVEN, Some(proven)),
    };
    body.put_u8(kind);
    body.put_bytes(0, 6);
    if let Some(proven) = proven {
        body.put_u64_le(proven.0);
    }
    body.put_slice(state);
    body
}

/// Why a body is no checkpoint.
#[derive(Debug, Eq, PartialEq)]
enum BadCheckpoint {
    Malformed,
    /// It holds this.
    Newer(String),
}

impl From<BadState> for BadCheckpoint {
    fn from(bad: BadState) -> BadCheckpoint {
        match bad {
            BadState::Malformed => BadCheckpoint::Malformed,
            BadState::Version(_) => BadCheckpoint::Newer(bad.to_string()),
        }
    }
}

fn decode(body: &[u8]) -> Result<CheckpointRecord, BadCheckpoint> {
    let fixed = body.split_at_checked(FIXED_BYTES);
    let (mut input, mut state) = fixed.ok_or(BadCheckpoint::Malformed)?;
    let slot = Slot(input.get_u64_le());
    let number = input.get_u64_le();
    let server = ServerId(input.get_u8());
    let installing = match input.get_u8() {
        COMPLETE => None,
        INSTALLING => Some(ALL_PROVEN),
        INSTALLING_PARTLY_PROVEN => match state.try_get_u64_le() {
            Ok(proven) => Some(Slot(proven)),
            Err(_) => return Err(BadCheckpoint::Malformed),
        },
        kind => {
            return Err(BadCheckpoint::Newer(format!(
                "record of kind {kind}, which this program does not know"
            )));
        }
    };
    let state = State::decode(state)?;
    let ballot = Ballot { number, server };
    if state.applied() != slot {
        return Err(BadCheckpoint::Malformed);
    }
    Ok(CheckpointRecord {
        applied: EntryId { ballot, slot },
        installing,
        state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::files::FileDisk;

    #[test]
    fn literal_start_of_a_body() {
        let state = State::default().encode();
        let applied = EntryId::default();
        for (installing, start) in [
            (None, &[0, 0, 0, 0, 0, 0, 0][..]),
            (Some(ALL_PROVEN), &[1, 0, 0, 0, 0, 0, 0]),
            (
                Some(Slot(0x0102)),
                &[2, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0],
            ),
        ] {
            let body = encode(applied, installing, &state);
            assert_eq!(body[..17], [0; 17]);
            assert_eq!(body[17..17 + start.len()], *start);
            assert_eq!(body[17 + start.len()..], state);
            let record = decode(&body).unwrap();
            assert_eq!((record.applied, record.installing), (applied, installing));
        }
    }

    #[test]
    fn wrong_bodies_are_refused() {
        let state = State::default().encode();
        let mut body = encode(EntryId::default(), Some(Slot(5)), &state);
        let short = decode(&body[..FIXED_BYTES + 7]);
        assert_eq!(short, Err(BadCheckpoint::Malformed));
        body[17] = 3;
        let newer =
            BadCheckpoint::Newer("record of kind 3, which this program does not know".to_owned());
        assert_eq!(decode(&body), Err(newer));
    }

    #[test]
    fn a_state_of_a_newer_version_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(directory.path()).unwrap());
        let mut file = CheckpointFile::create(Arc::clone(&disk)).unwrap();
        let mut state = State::default().encode();
        for (version, text) in [
            (
                9,
                "checkpoint holds a replicated state of version 9, this program knows up to 5: it was written by a newer version; start that one",
            ),
            (0, "both copies of checkpoint are damaged"),
        ] {
            state[..2].copy_from_slice(&u16::to_le_bytes(version));
            file.store(EntryId::default(), None, &state).unwrap();
            let copies = || {
                ["checkpoint.0", "checkpoint.1"]
                    .map(|it| std::fs::read(directory.path().join(it)).unwrap())
            };
            let before = copies();
            let error = CheckpointFile::open(Arc::clone(&disk)).err().unwrap();
            assert_eq!(error.to_string(), text);
            assert_eq!(copies(), before);
        }
    }
}
