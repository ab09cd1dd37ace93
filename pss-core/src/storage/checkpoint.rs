//! Up to where chunks are durable, and the replicated state there.

use std::sync::Arc;

use bytes::{Buf, BufMut};

use super::pair::{Pair, PairError};
use crate::disk::Disk;
use crate::state::{BadState, State};
use crate::types::{Ballot, EntryId, Incarnation, Marks, SERVERS_MAX, ServerId, Slot, Standing};

const NAME: &str = "checkpoint";
const MAGIC: &[u8; 8] = b"PSSCKPT1";
const FIXED_BYTES: usize = 24;
const PROVEN_BYTES: usize = 8;

const COMPLETE: u8 = 0;
const INSTALLING: u8 = 1;
const INSTALLING_PARTLY_PROVEN: u8 = 2;
/// Added to one of these: marks follow.
const WITH_MARKS: u8 = 4;
const MARK_BYTES: usize = 35;

/// In [`CheckpointRecord::installing`]: the data of all chunks are as their tables say.
pub const ALL_PROVEN: Slot = Slot(u64::MAX);

/// A checkpoint.
///
/// | at | bytes | field                                                                     |
/// |----|-------|---------------------------------------------------------------------------|
/// | 0  | 8     | slot of the last entry that was applied                                   |
/// | 8  | 8     | number of its ballot                                                      |
/// | 16 | 1     | server id of its ballot                                                   |
/// | 17 | 1     | 1 or 2: chunks are being copied from another server; 2: with a proven slot; 4 more: with marks |
/// | 18 | 1     | number of marks                                                           |
/// | 19 | 5     | zero                                                                      |
/// | 24 | 8     | the proven slot, if at 17 is 2; otherwise left out                        |
/// |    | 35 each | marks: server id; incarnation u64; promised ballot (number u64, server); acknowledged entry (ballot, slot u64) |
/// |    |       | the replicated state                                                      |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CheckpointRecord {
    /// The last entry that was applied; all before it are durable in the chunks.
    pub applied: EntryId,
    /// Chunks are being copied from another server: those here are not complete. A table that was last
    /// changed above this slot may be newer than the data of its chunk, so it proves nothing.
    pub installing: Option<Slot>,
    /// What this server has seen of others: [`crate::paxos::Replica::marks`].
    pub marks: Marks,
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
        file.store(
            EntryId::default(),
            None,
            &Marks::new(),
            &State::default().encode(),
        )?;
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
        marks: &Marks,
        state: &[u8],
    ) -> Result<(), PairError> {
        self.pair.store(&encode(applied, installing, marks, state))
    }
}

fn encode(applied: EntryId, installing: Option<Slot>, marks: &Marks, state: &[u8]) -> Vec<u8> {
    let marks_bytes = marks.len() * MARK_BYTES;
    let mut body = Vec::with_capacity(FIXED_BYTES + PROVEN_BYTES + marks_bytes + state.len());
    body.put_u64_le(applied.slot.0);
    body.put_u64_le(applied.ballot.number);
    body.put_u8(applied.ballot.server.0);
    let (kind, proven) = match installing {
        None => (COMPLETE, None),
        Some(ALL_PROVEN) => (INSTALLING, None),
        Some(proven) => (INSTALLING_PARTLY_PROVEN, Some(proven)),
    };
    body.put_u8(if marks.is_empty() {
        kind
    } else {
        kind + WITH_MARKS
    });
    body.put_u8(marks.len() as u8);
    body.put_bytes(0, 5);
    if let Some(proven) = proven {
        body.put_u64_le(proven.0);
    }
    for (server, mark) in marks {
        body.put_u8(server.0);
        body.put_u64_le(mark.life.0);
        for ballot in [mark.promised, mark.acknowledged.ballot] {
            body.put_u64_le(ballot.number);
            body.put_u8(ballot.server.0);
        }
        body.put_u64_le(mark.acknowledged.slot.0);
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
    let (kind, with_marks) = match input.get_u8() {
        kind @ WITH_MARKS..=6 => (kind - WITH_MARKS, true),
        kind => (kind, false),
    };
    let marks_count = usize::from(input.get_u8());
    let installing = match kind {
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
    let mut marks = Marks::new();
    if with_marks {
        if marks_count > SERVERS_MAX {
            return Err(BadCheckpoint::Malformed);
        }
        let split = state.split_at_checked(marks_count * MARK_BYTES);
        let (listed, rest) = split.ok_or(BadCheckpoint::Malformed)?;
        marks.extend(listed.chunks_exact(MARK_BYTES).map(decode_mark));
        state = rest;
    }
    let state = State::decode(state)?;
    let ballot = Ballot { number, server };
    if state.applied() != slot {
        return Err(BadCheckpoint::Malformed);
    }
    Ok(CheckpointRecord {
        applied: EntryId { ballot, slot },
        installing,
        marks,
        state,
    })
}

/// Of [`MARK_BYTES`].
fn decode_mark(mut input: &[u8]) -> (ServerId, Standing) {
    let server = ServerId(input.get_u8());
    let life = Incarnation(input.get_u64_le());
    let mut ballot = || Ballot {
        number: input.get_u64_le(),
        server: ServerId(input.get_u8()),
    };
    let (promised, ballot) = (ballot(), ballot());
    let slot = Slot(input.get_u64_le());
    let acknowledged = EntryId { ballot, slot };
    let standing = Standing {
        life,
        promised,
        acknowledged,
    };
    (server, standing)
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
            let body = encode(applied, installing, &Marks::new(), &state);
            assert_eq!(body[..17], [0; 17]);
            assert_eq!(body[17..17 + start.len()], *start);
            assert_eq!(body[17 + start.len()..], state);
            let record = decode(&body).unwrap();
            assert_eq!((record.applied, record.installing), (applied, installing));
        }
    }

    #[test]
    fn marks_come_back() {
        let state = State::default().encode();
        let ballot = |number, server| Ballot {
            number,
            server: ServerId(server),
        };
        let mark = |number| Standing {
            life: Incarnation(number),
            promised: ballot(number + 1, 2),
            acknowledged: EntryId {
                ballot: ballot(number, 1),
                slot: Slot(number + 7),
            },
        };
        let marks = Marks::from([(ServerId(0), mark(5)), (ServerId(7), mark(6))]);
        for installing in [None, Some(ALL_PROVEN), Some(Slot(3))] {
            let body = encode(EntryId::default(), installing, &marks, &state);
            let record = decode(&body).unwrap();
            assert_eq!((&record.marks, record.installing), (&marks, installing));
            let cut = decode(&body[..body.len() - state.len() - 1]);
            assert_eq!(cut, Err(BadCheckpoint::Malformed));
        }
        let mut body = encode(EntryId::default(), None, &marks, &state);
        assert_eq!(body[17..19], [4, 2]);
        assert_eq!(body[24..34], [0, 5, 0, 0, 0, 0, 0, 0, 0, 6]);
        body[18] = 9;
        assert_eq!(decode(&body), Err(BadCheckpoint::Malformed));
    }

    #[test]
    fn wrong_bodies_are_refused() {
        let state = State::default().encode();
        let mut body = encode(EntryId::default(), Some(Slot(5)), &Marks::new(), &state);
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
                "checkpoint holds a replicated state of version 9, this program knows up to 6: it was written by a newer version; start that one",
            ),
            (0, "both copies of checkpoint are damaged"),
        ] {
            state[..2].copy_from_slice(&u16::to_le_bytes(version));
            file.store(EntryId::default(), None, &Marks::new(), &state)
                .unwrap();
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
