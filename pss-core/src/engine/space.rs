//! A disk that gets full: what is refused, and what waits.
//!
//! Writes are refused while a majority has no space, before they come into the log. While a majority has some, they go on,
//! and a server without space is the odd one out: it applies no more writes before what is left would be missing for its
//! log, falls behind, and comes back when there is space. Its log goes on meanwhile, as long as it has room.
//! What every server keeps back ([`EngineConfig::reserve_bytes`]) is there for the writes that are on their way when a
//! majority gets full: these are applied.
//!
//! [`EngineConfig::reserve_bytes`]: crate::engine::EngineConfig::reserve_bytes

use crate::engine::Engine;
use crate::engine::copy::Copying;
use crate::entry::{Entry, Op};
use crate::types::Slot;

impl Engine {
    /// Space of the disk beside what the log may grow to, where the log begins, and its size.
    pub fn note_storage(&mut self, free_bytes: u64, log_first: Slot, log_bytes: u64) {
        self.log_bytes = log_bytes;
        self.free_bytes = free_bytes;
        // Who looked may not have seen what was handed to the log just before.
        self.appended = [0, self.appended[0]];
        let free = free_bytes.saturating_sub(self.config.reserve_bytes);
        self.replica.note_storage(free, log_first);
    }

    /// Bytes that are left for volumes.
    pub fn space_left(&self) -> u64 {
        self.free_bytes.saturating_sub(self.config.reserve_bytes)
    }

    /// Whether writes are refused: a majority of the servers that were heard of lately has no space.
    pub(super) fn refuses_writes(&self) -> bool {
        self.replica.free_bytes_of_majority(self.looked_at) == 0
    }

    /// Whether the cell takes writes for which this server has no space, and the next entry is one.
    pub(super) fn waits_for_space(&self) -> bool {
        self.stalled.is_none()
            && self.chunks_lack_space()
            && self.backlog.front().is_some_and(needs_space)
            && !self.refuses_writes()
    }

    /// Whether the log must not grow any more, because nothing that it holds can be applied. Where writes are refused it
    /// may: what comes then frees space.
    pub(super) fn log_lacks_space(&self) -> bool {
        let on_the_way = self.appended.iter().sum();
        self.free_bytes.saturating_sub(on_the_way) < self.config.reserve_bytes / 8 * 5
            && self.is_stalled()
            && !self.refuses_writes()
    }

    /// Whether chunks that are copied would take what the log may need.
    pub(super) fn chunks_lack_space(&self) -> bool {
        self.free_bytes < self.config.reserve_bytes / 8 * 7
    }

    /// Whether the disk is too full to apply what is chosen, or for the chunks that are copied; tried again now and then.
    pub fn is_stalled(&self) -> bool {
        let copying = self.copying.as_ref();
        self.stalled.is_some()
            || self.waits_for_space()
            || copying.is_some_and(Copying::lacks_space)
    }
}

fn needs_space(entry: &Entry) -> bool {
    let needs = |op: &Op| matches!(op, Op::Write { .. } | Op::Zero { allocate: true, .. });
    entry.commands.iter().any(|command| needs(&command.op))
}
