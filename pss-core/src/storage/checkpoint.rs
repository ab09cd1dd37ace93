//! Up to where chunks are durable, and the replicated state there.

use std::sync::Arc;

use bytes::{Buf, BufMut};

use super::pair::{Pair, PairError};
use crate::disk::Disk;
use crate::state::State;
use crate::types::{Ballot, EntryId, ServerId, Slot};

const NAME: &str = "checkpoint";
const MAGIC: &[u8; 8] = b"PSSCKPT1";
const FIXED_BYTES: usize = 24;

/// A checkpoint.
///
/// | at | bytes | field                                          |
/// |----|-------|------------------------------------------------|
/// | 0  | 8     | slot of the last entry that was applied        |
/// | 8  | 8     | number of its ballot                           |
/// | 16 | 1     | server id of its ballot                        |
/// | 17 | 1     | 1: chunks are being copied from another server |
/// | 18 | 6     | zero                                           |
/// | 24 |       | the replicated state                           |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CheckpointRecord {
    /// The last entry that was applied; all before it are durable in the chunks.
    pub applied: EntryId,
    /// Chunks are being copied from another server: those here are not complete.
    pub installing: bool,
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
        file.store(EntryId::default(), false, &State::default().encode())?;
        Ok(file)
    }

    /// Reads the newest checkpoint.
    ///
    /// # Errors
    /// [`PairError`].
    pub fn open(disk: Arc<dyn Disk>) -> Result<(CheckpointFile, CheckpointRecord), PairError> {
        let (pair, body) = Pair::open(disk, NAME, MAGIC)?;
        let record = decode(&body).ok_or_else(|| pair.damaged())?;
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
        installing: bool,
        state: &[u8],
    ) -> Result<(), PairError> {
        let mut body = Vec::with_capacity(FIXED_BYTES + state.len());
        body.put_u64_le(applied.slot.0);
        body.put_u64_le(applied.ballot.number);
        body.put_u8(applied.ballot.server.0);
        body.put_u8(u8::from(installing));
        body.put_bytes(0, 6);
        body.put_slice(state);
        self.pair.store(&body)
    }
}

fn decode(body: &[u8]) -> Option<CheckpointRecord> {
    let (mut input, state) = body.split_at_checked(FIXED_BYTES)?;
    let slot = Slot(input.get_u64_le());
    let number = input.get_u64_le();
    let server = ServerId(input.get_u8());
    let installing = input.get_u8() != 0;
    let state = State::decode(state).ok()?;
    let ballot = Ballot { number, server };
    (state.applied() == slot).then_some(CheckpointRecord {
        applied: EntryId { ballot, slot },
        installing,
        state,
    })
}
