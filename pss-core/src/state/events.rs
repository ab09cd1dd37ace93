//! What was done to the cell, by whom and when: the newest of it, as part of the replicated state.

use std::collections::VecDeque;
use std::fmt;

use bytes::BufMut;
use serde::{Deserialize, Serialize};

use super::{BadState, Refusal, array_of, put_string, string_of, u32_of, u64_of};
use crate::entry::Origin;
use crate::size::Size;
use crate::types::{Slot, VolumeId};

/// So many events are kept, the newest.
pub const EVENTS_MAX: usize = 4096;

/// Something that was done to the cell, or refused.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct AdminEvent {
    /// Counts the events of the cell, from 1.
    pub number: u64,
    /// Slot of the entry that did it.
    pub slot: Slot,
    /// When, by the clock of whoever led: milliseconds since the beginning of 1970, UTC; 0: the log had not told.
    pub time_ms: u64,
    /// Who asked for it.
    pub by: Origin,
    /// What.
    pub action: AdminAction,
    /// Why it was not done, if it was not.
    pub refused: Option<Refusal>,
}

/// What was done. A volume without a number does not exist: it was not created, or there is none of that number.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AdminAction {
    /// A volume was created.
    CreateVolume {
        /// Its number; none if that was refused.
        volume: Option<VolumeId>,
        /// Name.
        name: String,
        /// Size, bytes.
        size_bytes: u64,
        /// Chunk size, bytes.
        chunk_bytes: u32,
    },
    /// A volume was given another size.
    ResizeVolume {
        /// Which.
        volume: VolumeId,
        /// Name; empty if there is none.
        name: String,
        /// Size before, bytes.
        from_bytes: u64,
        /// Size after, bytes.
        to_bytes: u64,
        /// It may become smaller whoever has it attached.
        forced: bool,
    },
    /// A volume was deleted.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
        /// Name; empty if there is none.
        name: String,
        /// Size, bytes.
        size_bytes: u64,
        /// Whoever had it attached.
        forced: bool,
    },
    /// A client was about to do something outside of the state, or has done it.
    Note {
        /// What, in its words.
        text: String,
    },
}

/// The newest events.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Events {
    /// How many there ever were: the number of the last.
    made: u64,
    /// With consecutive numbers, at most [`EVENTS_MAX`].
    kept: VecDeque<AdminEvent>,
}

impl Events {
    /// How many there ever were: the number of the last.
    pub(super) fn made(&self) -> u64 {
        self.made
    }

    /// Number of the oldest that is kept, or of the next if none is.
    pub(super) fn first(&self) -> u64 {
        self.made + 1 - self.kept.len() as u64
    }

    /// Those that are kept with numbers above this one, oldest first.
    pub(super) fn after(&self, number: u64) -> impl Iterator<Item = &AdminEvent> {
        let skip = number.saturating_add(1).saturating_sub(self.first());
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        self.kept.range(skip.min(self.kept.len())..)
    }

    /// Adds an event, which gets the next number.
    pub(super) fn push(&mut self, mut event: AdminEvent) {
        self.made += 1;
        event.number = self.made;
        if self.kept.len() >= EVENTS_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(event);
    }

    /// Layout: how many there ever were u64, list of those that are kept, without their numbers.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.made);
        out.put_u32_le(self.kept.len() as u32);
        for event in &self.kept {
            event.encode(out);
        }
    }

    pub(super) fn decode(input: &mut &[u8]) -> Result<Events, BadState> {
        let made = u64_of(input)?;
        let count = u32_of(input)? as usize;
        // Nobody counts so far; one more must have a number.
        if count > EVENTS_MAX || count as u64 > made || made == u64::MAX {
            return Err(BadState::Malformed);
        }
        let mut events = Events {
            made: made - count as u64,
            kept: VecDeque::new(),
        };
        for _ in 0..count {
            events.push(AdminEvent::decode(input)?);
        }
        Ok(events)
    }
}

impl AdminEvent {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.slot.0);
        out.put_u64_le(self.time_ms);
        self.by.encode(out);
        out.put_u8(self.refused.map_or(0, |refusal| refusal as u8));
        match &self.action {
            AdminAction::CreateVolume {
                volume,
                name,
                size_bytes,
                chunk_bytes,
            } => {
                out.put_u8(1);
                out.put_u32_le(volume.map_or(0, |volume| volume.0));
                put_string(out, name);
                out.put_u64_le(*size_bytes);
                out.put_u32_le(*chunk_bytes);
            }
            AdminAction::ResizeVolume {
                volume,
                name,
                from_bytes,
                to_bytes,
                forced,
            } => {
                out.put_u8(2);
                out.put_u32_le(volume.0);
                put_string(out, name);
                out.put_u64_le(*from_bytes);
                out.put_u64_le(*to_bytes);
                out.put_u8(u8::from(*forced));
            }
            AdminAction::DeleteVolume {
                volume,
                name,
                size_bytes,
                forced,
            } => {
                out.put_u8(3);
                out.put_u32_le(volume.0);
                put_string(out, name);
                out.put_u64_le(*size_bytes);
                out.put_u8(u8::from(*forced));
            }
            AdminAction::Note { text } => {
                out.put_u8(4);
                put_string(out, text);
            }
        }
    }

    /// The number is for [`Events::push`] to give.
    fn decode(input: &mut &[u8]) -> Result<AdminEvent, BadState> {
        let slot = Slot(u64_of(input)?);
        let time_ms = u64_of(input)?;
        let by = Origin::decode(input).map_err(|_| BadState::Malformed)?;
        let refused = match array_of::<1>(input)?[0] {
            0 => None,
            code => Some(Refusal::from_code(code).ok_or(BadState::Malformed)?),
        };
        let action = match array_of::<1>(input)?[0] {
            // No volume has number 0.
            1 => AdminAction::CreateVolume {
                volume: Some(u32_of(input)?).filter(|it| *it > 0).map(VolumeId),
                name: string_of(input)?,
                size_bytes: u64_of(input)?,
                chunk_bytes: u32_of(input)?,
            },
            2 => AdminAction::ResizeVolume {
                volume: VolumeId(u32_of(input)?),
                name: string_of(input)?,
                from_bytes: u64_of(input)?,
                to_bytes: u64_of(input)?,
                forced: flag_of(input)?,
            },
            3 => AdminAction::DeleteVolume {
                volume: VolumeId(u32_of(input)?),
                name: string_of(input)?,
                size_bytes: u64_of(input)?,
                forced: flag_of(input)?,
            },
            4 => AdminAction::Note {
                text: string_of(input)?,
            },
            _ => return Err(BadState::Malformed),
        };
        Ok(AdminEvent {
            number: 0,
            slot,
            time_ms,
            by,
            action,
            refused,
        })
    }
}

fn flag_of(input: &mut &[u8]) -> Result<bool, BadState> {
    match array_of::<1>(input)? {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(BadState::Malformed),
    }
}

/// What was done, or was not, for people. Names are written as they are, whatever is in them.
impl fmt::Display for AdminEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = self.refused.is_none();
        let by_force = |forced: bool| if forced { " by force" } else { "" };
        match &self.action {
            AdminAction::CreateVolume {
                name, size_bytes, ..
            } => {
                let verb = if done { "created" } else { "could not create" };
                write!(f, "{verb} volume {name} ({})", Size(*size_bytes))?;
            }
            AdminAction::ResizeVolume {
                volume,
                name,
                from_bytes,
                to_bytes,
                forced,
            } => {
                let verb = if done { "resized" } else { "could not resize" };
                let (from, to) = (Size(*from_bytes), Size(*to_bytes));
                match name.is_empty() {
                    true => write!(f, "{verb} volume {volume} to {to}")?,
                    false => write!(f, "{verb} volume {name} from {from} to {to}")?,
                }
                f.write_str(by_force(*forced && to_bytes < from_bytes))?;
            }
            AdminAction::DeleteVolume {
                volume,
                name,
                size_bytes,
                forced,
            } => {
                let verb = if done { "deleted" } else { "could not delete" };
                match name.is_empty() {
                    true => write!(f, "{verb} volume {volume}")?,
                    false => write!(f, "{verb} volume {name} ({})", Size(*size_bytes))?,
                }
                f.write_str(by_force(*forced))?;
            }
            AdminAction::Note { text } => f.write_str(text)?,
        }
        match self.refused {
            Some(refusal) => write!(f, ": {refusal}"),
            None => Ok(()),
        }
    }
}
