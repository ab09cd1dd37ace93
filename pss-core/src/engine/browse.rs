//! Looking at volumes without being a client of them: for those who keep the cell.

use crate::engine::requests::{Reader, Span};
use crate::engine::{Engine, ReadWhat};
use crate::state::Refusal;
use crate::types::ChunkIndex;
use crate::wire::client::{Browse, ReplyBody, ReplyError};

impl Engine {
    /// Answers from what is applied here. Unless the answer may be stale, there is a lease.
    pub(super) fn browse(&mut self, reader: Reader, what: &Browse) {
        if reader.stale.is_some() && !self.is_complete() {
            // Whoever asks tries another server.
            let elsewhere = ReplyError::NotLeader { leader: None };
            return self.answer_reader(reader, Err(elsewhere));
        }
        match *what {
            Browse::Volumes => {
                let volumes = ReplyBody::Volumes(self.volume_list());
                self.answer_reader(reader, Ok(volumes));
            }
            Browse::Directories { volume } => {
                let body = match self.volumes.contains_key(&volume) {
                    true => Ok(ReplyBody::Directories(self.chunks.directories(volume))),
                    false => Err(ReplyError::Refused(Refusal::NoSuchVolume)),
                };
                self.answer_reader(reader, body);
            }
            Browse::Chunks {
                volume,
                from,
                until,
            } => match self.volumes.get(&volume).cloned() {
                Some(volume) => {
                    let most = volume.size_bytes.div_ceil(u64::from(volume.chunk_bytes));
                    let until = until.min(ChunkIndex(most as u32));
                    self.fetch(reader, volume, ReadWhat::Chunks(from..until), None);
                }
                None => {
                    let gone = ReplyError::Refused(Refusal::NoSuchVolume);
                    self.answer_reader(reader, Err(gone));
                }
            },
            Browse::Extents {
                volume,
                offset_bytes,
                length_bytes,
            } => self.extents(reader, Span::new(volume, offset_bytes, length_bytes)),
            Browse::Read {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                let span = Span::new(volume, offset_bytes, u64::from(length_bytes));
                self.read(reader, span);
            }
        }
    }
}
