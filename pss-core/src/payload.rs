//! Memory for large payloads, used again and again.
//!
//! A payload of a megabyte lives for a few milliseconds: received, checked, sent on, written, applied.
//! Taken from the allocator each time, its pages are given back to the kernel and faulted in again,
//! and zeroed once more than needed; at 500 MB/s that is a tenth of all the work.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use crate::disk::AlignedBuf;

/// Payloads from this size on are worth memory of their own: it is aligned, so that the log can write it
/// from where it is. Smaller ones are cheaper to copy.
pub const LARGE_PAYLOAD_BYTES: usize = 64 << 10;
/// Lengths are rounded up to a multiple of this, so that memory of one payload fits the next.
const STEP_BYTES: usize = LARGE_PAYLOAD_BYTES;
/// Longer ones are rare, and go back to the allocator: servers exchange up to 1 MiB, and what copies
/// images (qemu-img) writes 2 MiB at once.
const KEPT_BYTES_MAX: usize = 2 << 20;
/// Memory that waits for use in the whole process: what a busy connection has under way.
const IDLE_BYTES_MAX: usize = 16 << 20;

static IDLE: Mutex<Idle> = Mutex::new(Idle {
    buffers: VecDeque::new(),
    bytes: 0,
});

/// Memory that waits for use; what was used last is at the back.
struct Idle {
    buffers: VecDeque<AlignedBuf>,
    bytes: usize,
}

impl Idle {
    fn take(&mut self, bytes: usize) -> Option<AlignedBuf> {
        let at = self.buffers.iter().rposition(|it| it.len() == bytes)?;
        let buffer = self.buffers.remove(at)?;
        self.bytes -= bytes;
        Some(buffer)
    }

    /// Takes memory back. What has waited longest makes room; the caller frees it, without the lock.
    fn put(&mut self, buffer: AlignedBuf) -> Vec<AlignedBuf> {
        self.bytes += buffer.len();
        self.buffers.push_back(buffer);
        let mut surplus = Vec::new();
        while self.bytes > IDLE_BYTES_MAX
            && let Some(oldest) = self.buffers.pop_front()
        {
            self.bytes -= oldest.len();
            surplus.push(oldest);
        }
        surplus
    }
}

/// A payload that is being filled from its start. Aligned to [`crate::disk::ALIGN_BYTES`].
#[derive(Debug)]
pub struct Payload {
    /// Initialised over its whole length, with zeros or with what an earlier payload left.
    memory: AlignedBuf,
    length: usize,
    filled: usize,
}

impl Payload {
    /// Room for `bytes` bytes.
    pub fn with_length(bytes: usize) -> Payload {
        let rounded = bytes.next_multiple_of(STEP_BYTES);
        let idle = (rounded <= KEPT_BYTES_MAX)
            .then(|| {
                let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
                idle.take(rounded)
            })
            .flatten();
        Payload {
            memory: idle.unwrap_or_else(|| AlignedBuf::zeroed(rounded)),
            length: bytes,
            filled: 0,
        }
    }

    /// Where the next bytes go.
    pub fn spare(&mut self) -> &mut [u8] {
        &mut self.memory.as_mut_slice()[self.filled..self.length]
    }

    /// The first `count` bytes of [`Payload::spare`] have been filled.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.length - self.filled, "filled within spare");
        self.filled += count;
    }

    /// Copies as many of `bytes` as there is room for; gives how many.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let spare = self.spare();
        let count = spare.len().min(bytes.len());
        spare[..count].copy_from_slice(&bytes[..count]);
        self.advance(count);
        count
    }

    /// Bytes that have been filled.
    pub fn filled(&self) -> &[u8] {
        &self.memory.as_slice()[..self.filled]
    }

    /// Whether all bytes have been filled.
    pub fn is_full(&self) -> bool {
        self.filled == self.length
    }

    /// The bytes; their memory is used again when the last reference to them is gone.
    ///
    /// # Panics
    /// If it is not full: what an earlier payload left must not be seen.
    pub fn freeze(self) -> Bytes {
        assert!(self.is_full(), "only filled bytes are given out");
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        self.filled()
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if memory.len() <= KEPT_BYTES_MAX {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            let surplus = idle.put(memory);
            drop(idle);
            drop(surplus);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ALIGN_BYTES;

    #[test]
    fn filled_in_parts() {
        let mut payload = Payload::with_length(100_000);
        assert_eq!(payload.fill(&[7; 60_000]), 60_000);
        assert!(!payload.is_full());
        payload.spare()[..10].fill(8);
        payload.advance(10);
        assert_eq!(payload.fill(&[9; 60_000]), 39_990);
        assert!(payload.is_full());
        let bytes = payload.freeze();
        assert_eq!(bytes.len(), 100_000);
        assert_eq!(bytes.as_ptr() as usize % ALIGN_BYTES, 0);
        assert_eq!((bytes[59_999], bytes[60_000], bytes[99_999]), (7, 8, 9));
    }

    #[test]
    #[should_panic(expected = "only filled bytes are given out")]
    fn what_an_earlier_payload_left_is_not_seen() {
        let mut payload = Payload::with_length(LARGE_PAYLOAD_BYTES);
        payload.advance(LARGE_PAYLOAD_BYTES - 1);
        payload.freeze();
    }

    #[test]
    fn idle_memory_is_bounded_and_fits_exactly() {
        let mut idle = Idle {
            buffers: VecDeque::new(),
            bytes: 0,
        };
        for _ in 0..IDLE_BYTES_MAX / KEPT_BYTES_MAX {
            assert!(idle.put(AlignedBuf::zeroed(KEPT_BYTES_MAX)).is_empty());
        }
        let surplus = idle.put(AlignedBuf::zeroed(STEP_BYTES));
        assert_eq!(surplus.len(), 1);
        assert!(idle.take(2 * STEP_BYTES).is_none());
        assert_eq!(idle.take(STEP_BYTES).map(|it| it.len()), Some(STEP_BYTES));
        assert!(idle.take(STEP_BYTES).is_none());
        assert_eq!(idle.bytes, IDLE_BYTES_MAX - KEPT_BYTES_MAX);
    }
}
