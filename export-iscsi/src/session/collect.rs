//! Data of a write on its way in.

use bytes::{Bytes, BytesMut};

/// Shorter parts are copied together: each part has a cost, and holds on to the buffer it came in.
const COPIED_BYTES_MAX: usize = 8 << 10;

/// Parts of a write's data, in order.
#[derive(Debug, Default)]
pub(super) struct Collected {
    parts: Vec<Bytes>,
    /// Short parts, copied.
    tail: BytesMut,
    length: usize,
}

impl Collected {
    pub(super) fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        self.length += data.len();
        // What comes in one part is never copied.
        let first = self.parts.is_empty() && self.tail.is_empty();
        if data.len() > COPIED_BYTES_MAX || first {
            self.seal();
            self.parts.push(data);
        } else {
            self.tail.extend_from_slice(&data);
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.parts.push(self.tail.split().freeze());
        }
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn take(&mut self) -> Vec<Bytes> {
        self.seal();
        std::mem::take(&mut self.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_short_parts_become_few() {
        let mut collected = Collected::default();
        for at in 0..1000u32 {
            collected.push(Bytes::copy_from_slice(&at.to_be_bytes()));
        }
        collected.push(Bytes::from(vec![7; 20_000]));
        collected.push(Bytes::new());
        assert_eq!(collected.length(), 24_000);
        let parts = collected.take();
        assert_eq!(
            parts.iter().map(Bytes::len).collect::<Vec<_>>(),
            [4, 3996, 20_000]
        );
    }
}
