//! Replies on their way to a client: headers of our own and payload that is never copied.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes to be sent, as runs of headers and payloads in order.
#[derive(Debug, Default)]
pub struct SendQueue {
    /// All headers that are not sent yet, one behind the other.
    heads: BytesMut,
    segments: VecDeque<Segment>,
    length_bytes: usize,
    bodies: usize,
}

#[derive(Debug)]
enum Segment {
    /// The next so many bytes of `heads`.
    Heads(usize),
    Body(Bytes),
}

impl SendQueue {
    /// Appends a header; neighbours become one segment.
    pub fn push_head(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.length_bytes += bytes.len();
        match self.segments.back_mut() {
            Some(Segment::Heads(length)) => *length += bytes.len(),
            _ => self.segments.push_back(Segment::Heads(bytes.len())),
        }
    }

    /// Appends payload.
    pub fn push_body(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.length_bytes += bytes.len();
            self.bodies += 1;
            self.segments.push_back(Segment::Body(bytes));
        }
    }

    /// Appends zeroes, which take no memory.
    pub fn push_zeroes(&mut self, mut count: usize) {
        while count > 0 {
            let run = count.min(ZEROES.len());
            self.push_body(Bytes::from_static(&ZEROES[..run]));
            count -= run;
        }
    }

    /// Bytes left.
    pub fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    /// Payloads left.
    pub fn bodies(&self) -> usize {
        self.bodies
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.length_bytes == 0
    }

    /// Fills `slices` with what comes next, and says how many were filled.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut heads = &self.heads[..];
        let mut filled = 0;
        for (slice, segment) in slices.iter_mut().zip(&self.segments) {
            *slice = match segment {
                Segment::Heads(length) => {
                    let (run, rest) = heads.split_at(*length);
                    heads = rest;
                    IoSlice::new(run)
                }
                Segment::Body(bytes) => IoSlice::new(bytes),
            };
            filled += 1;
        }
        filled
    }

    /// Forgets the next `count` bytes, which were sent.
    pub fn advance(&mut self, mut count: usize) {
        assert!(count <= self.length_bytes, "no more is sent than there is");
        self.length_bytes -= count;
        while count > 0 {
            let Some(segment) = self.segments.front_mut() else {
                return;
            };
            let done = match segment {
                Segment::Heads(length) => {
                    let run = count.min(*length);
                    *length -= run;
                    self.heads.advance(run);
                    count -= run;
                    *length == 0
                }
                Segment::Body(bytes) => {
                    let run = count.min(bytes.len());
                    bytes.advance(run);
                    count -= run;
                    self.bodies -= usize::from(bytes.is_empty());
                    bytes.is_empty()
                }
            };
            if done {
                self.segments.pop_front();
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = SendQueue::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(queue: &SendQueue) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 8];
        let filled = queue.fill(&mut slices);
        slices[..filled]
            .iter()
            .flat_map(|slice| slice.to_vec())
            .collect()
    }

    #[test]
    fn any_cut_sends_the_same_bytes() {
        let full = || {
            let mut queue = SendQueue::default();
            queue.push_head(b"one");
            queue.push_head(b"two");
            queue.push_body(Bytes::from_static(b"payload"));
            queue.push_body(Bytes::new());
            queue.push_head(b"three");
            queue.push_zeroes(3);
            queue
        };
        let all = b"onetwopayloadthree\0\0\0";
        assert_eq!(full().segments.len(), 4);
        for cut in 0..=all.len() {
            let mut queue = full();
            queue.advance(cut);
            assert_eq!(collect(&queue), &all[cut..]);
            queue.push_head(b"!");
            assert_eq!(queue.length_bytes(), all.len() - cut + 1);
            queue.advance(all.len() - cut);
            assert_eq!((collect(&queue).as_slice(), queue.bodies()), (&b"!"[..], 0));
        }
    }

    #[test]
    fn zeroes_are_split() {
        let mut queue = SendQueue::default();
        queue.push_zeroes(150_000);
        assert_eq!((queue.length_bytes(), queue.bodies()), (150_000, 3));
    }
}
