//! Carries chosen entries out: on the replicated state and on the chunks.

use crate::chunk::{ChunkError, ChunkStore};
use crate::entry::{Command, Entry, Op};
use crate::state::{Answer, Effect, State, Volume};
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot, VolumeId};
use crate::volume::map::chunk_ranges;

/// Says which chunks an entry takes effect on while others are still to be copied.
pub type ChunkFilter<'a> = &'a dyn Fn(VolumeId, ChunkIndex) -> bool;

/// Why an entry was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The disk is full; see [`Stalled`].
    #[error("no space left to apply the entry of slot {}", .0.entry.id.slot)]
    NoSpace(Box<Stalled>),
    /// Final.
    #[error(transparent)]
    Chunks(#[from] ChunkError),
}

/// An entry that was applied in part when the disk was full.
///
/// The state is between two slots meanwhile: nothing else may be applied, and no checkpoint record
/// may be stored. (Flushing chunks is allowed; it frees the space of what was zeroed.)
#[derive(Debug)]
pub struct Stalled {
    entry: Entry,
    /// Of the commands that were carried out, and of the one whose effect is pending.
    answers: Vec<Answer>,
    pending: Pending,
}

/// An effect that is to be tried again.
#[derive(Debug)]
enum Pending {
    Write(Volume),
    Zero(Volume, u64, u64, bool),
    Create(Volume),
    Delete(Volume),
}

impl Stalled {
    /// The entry.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Goes on where the disk was full. Gives the answers of all commands of the entry.
    ///
    /// # Errors
    /// [`ApplyError`]: the disk may still be full.
    pub fn resume(
        self,
        state: &mut State,
        chunks: &ChunkStore,
        filter: Option<ChunkFilter<'_>>,
    ) -> Result<(Entry, Vec<Answer>), ApplyError> {
        let Stalled {
            entry,
            answers,
            pending,
        } = self;
        let command = &entry.commands[answers.len() - 1];
        let effect = match &pending {
            Pending::Write(volume) => Effect::Write(volume),
            Pending::Zero(volume, first_block, blocks, allocate) => Effect::Zero {
                volume,
                first_block: *first_block,
                blocks: *blocks,
                allocate: *allocate,
            },
            Pending::Create(volume) => Effect::Create(volume),
            Pending::Delete(volume) => Effect::Delete(volume.clone()),
        };
        match perform(chunks, &effect, command, entry.id.slot, filter) {
            Ok(()) => {}
            Err(ChunkError::NoSpace) => {
                return Err(ApplyError::NoSpace(Box::new(Stalled {
                    entry,
                    answers,
                    pending,
                })));
            }
            Err(error) => return Err(error.into()),
        }
        let answers = go_on(state, chunks, &entry, filter, answers)?;
        Ok((entry, answers))
    }
}

/// Applies an entry: every command in order, to the state and to the chunks. Gives the answers.
/// `filter` says which chunks take part; `None`: all.
///
/// # Errors
/// [`ApplyError::NoSpace`] can be resumed; other errors are final.
///
/// # Panics
/// If the entry is not the one after those that were applied.
pub fn apply_entry(
    state: &mut State,
    chunks: &ChunkStore,
    entry: &Entry,
    filter: Option<ChunkFilter<'_>>,
) -> Result<Vec<Answer>, ApplyError> {
    let answers = Vec::with_capacity(entry.commands.len());
    go_on(state, chunks, entry, filter, answers)
}

fn go_on(
    state: &mut State,
    chunks: &ChunkStore,
    entry: &Entry,
    filter: Option<ChunkFilter<'_>>,
    mut answers: Vec<Answer>,
) -> Result<Vec<Answer>, ApplyError> {
    let slot = entry.id.slot;
    for position in answers.len()..entry.commands.len() {
        let command = &entry.commands[position];
        chunks.set_clock(state.clock_ms());
        let (answer, effect) = state.apply(slot, position as u32, command);
        answers.push(answer);
        match perform(chunks, &effect, command, slot, filter) {
            Ok(()) => {}
            Err(ChunkError::NoSpace) => {
                return Err(ApplyError::NoSpace(Box::new(Stalled {
                    pending: pending(effect),
                    entry: entry.clone(),
                    answers,
                })));
            }
            Err(error) => return Err(error.into()),
        }
    }
    state.finish_slot(slot);
    Ok(answers)
}

fn perform(
    chunks: &ChunkStore,
    effect: &Effect<'_>,
    command: &Command,
    slot: Slot,
    filter: Option<ChunkFilter<'_>>,
) -> Result<(), ChunkError> {
    match effect {
        Effect::None => Ok(()),
        Effect::Write(volume) => write(chunks, volume, command, slot, filter),
        Effect::Zero {
            volume,
            first_block,
            blocks,
            allocate,
        } => {
            let takes_part = filter.map(|filter| move |chunk| filter(volume.id, chunk));
            let takes_part = takes_part
                .as_ref()
                .map(|it| it as &dyn Fn(ChunkIndex) -> bool);
            chunks.zero_where(volume, *first_block, *blocks, *allocate, slot, takes_part)
        }
        Effect::Create(volume) => chunks.create_volume(volume),
        Effect::Delete(volume) => chunks.delete_volume(volume),
    }
}

fn write(
    chunks: &ChunkStore,
    volume: &Volume,
    command: &Command,
    slot: Slot,
    filter: Option<ChunkFilter<'_>>,
) -> Result<(), ChunkError> {
    let Op::Write {
        first_block,
        checksums,
        payload,
        ..
    } = &command.op
    else {
        unreachable!("only a write has the effect of one");
    };
    let Some(filter) = filter else {
        return chunks.write(volume, *first_block, checksums, payload, slot);
    };
    let mut done = 0;
    for range in chunk_ranges(*first_block, checksums.len() as u64, volume.chunk_bytes) {
        let until = done + range.blocks as usize;
        if filter(volume.id, range.chunk) {
            let data = payload.slice(done * BLOCK_BYTES..until * BLOCK_BYTES);
            let first = first_block + done as u64;
            chunks.write(volume, first, &checksums[done..until], &data, slot)?;
        }
        done = until;
    }
    Ok(())
}

fn pending(effect: Effect<'_>) -> Pending {
    match effect {
        Effect::None => unreachable!("nothing takes no space"),
        Effect::Write(volume) => Pending::Write(volume.clone()),
        Effect::Zero {
            volume,
            first_block,
            blocks,
            allocate,
        } => Pending::Zero(volume.clone(), first_block, blocks, allocate),
        Effect::Create(volume) => Pending::Create(volume.clone()),
        Effect::Delete(volume) => Pending::Delete(volume),
    }
}
