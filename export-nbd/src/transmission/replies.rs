//! How results of requests become bytes.

use bytes::{BufMut, BytesMut};
use pss_core::volume::device::ReadPart;

use super::{Pending, Transmission};
use crate::error::NbdError;
use crate::wire::{
    Command, REPLY_FLAG_DONE, Request, allocation, chunk_header, chunk_type, simple_reply,
};

impl Transmission {
    pub(super) fn push_bad_answer(&mut self, pending: &Pending) {
        tracing::error!("device gave an answer that does not fit the request");
        self.push_error(pending.cookie, NbdError::Io, "");
    }

    pub(super) fn push_read(&mut self, pending: &Pending, parts: &[ReadPart], unfragmented: bool) {
        let total: u64 = parts.iter().map(ReadPart::length_bytes).sum();
        if total != u64::from(pending.length_bytes) {
            return self.push_bad_answer(pending);
        }
        if !self.terms.structured_replies {
            self.sending.push_head(&simple_reply(0, pending.cookie));
            return self.push_parts(parts);
        }
        let is_hole = |part: &ReadPart| matches!(part, ReadPart::Hole(_));
        let explicit_zeroes = unfragmented && !parts.iter().all(is_hole);
        let mut at = pending.offset_bytes;
        let mut rest = parts;
        while let Some(first) = rest.first() {
            // "If the area being read contains both data and a hole, the server MUST use
            // NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present" (DF).
            let hole = is_hole(first) && !explicit_zeroes;
            let same = |part: &&ReadPart| unfragmented || is_hole(part) == hole;
            let (run, behind) = rest.split_at(rest.iter().take_while(same).count());
            rest = behind;
            let length = run.iter().map(ReadPart::length_bytes).sum::<u64>();
            if length > 0 {
                self.push_chunk(pending.cookie, at, length as u32, hole, rest.is_empty());
                if !hole {
                    self.push_parts(run);
                }
                at += length;
            }
        }
    }

    /// Header of a content chunk.
    ///
    /// | 20-27 | offset, bytes                                     |
    /// | 28-   | data, or length of the hole in bytes (4)          |
    fn push_chunk(&mut self, cookie: u64, offset: u64, length: u32, hole: bool, last: bool) {
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        let mut head = [0; 32];
        head[20..28].copy_from_slice(&offset.to_be_bytes());
        if hole {
            let header = chunk_header(flags, chunk_type::OFFSET_HOLE, cookie, 12);
            head[..20].copy_from_slice(&header);
            head[28..].copy_from_slice(&length.to_be_bytes());
            self.sending.push_head(&head);
        } else {
            let header = chunk_header(flags, chunk_type::OFFSET_DATA, cookie, 8 + length);
            head[..20].copy_from_slice(&header);
            self.sending.push_head(&head[..28]);
        }
    }

    fn push_parts(&mut self, parts: &[ReadPart]) {
        for part in parts {
            match part {
                ReadPart::Data(bytes) => self.sending.push_body(bytes.clone()),
                ReadPart::Hole(length) => self.sending.push_zeroes(*length as usize),
            }
        }
    }

    /// The only chunk of a reply to BLOCK_STATUS.
    ///
    /// | 20-23 | id of the context                |
    /// | each  | length, bytes (4), status (4)    |
    pub(super) fn push_status(&mut self, cookie: u64, descriptors: &[(u32, bool)]) {
        let length = 4 + 8 * descriptors.len();
        let mut chunk = BytesMut::with_capacity(20 + length);
        let kind = chunk_type::BLOCK_STATUS;
        chunk.put_slice(&chunk_header(REPLY_FLAG_DONE, kind, cookie, length as u32));
        chunk.put_u32(allocation::CONTEXT_ID);
        for (length, allocated) in descriptors {
            chunk.put_u32(*length);
            chunk.put_u32(if *allocated {
                0
            } else {
                allocation::HOLE | allocation::ZERO
            });
        }
        self.sending.push_body(chunk.freeze());
    }

    /// Success of a request of length zero.
    pub(super) fn push_done(&mut self, request: &Request) {
        if request.command == Command::Read && self.terms.structured_replies {
            let header = chunk_header(REPLY_FLAG_DONE, chunk_type::NONE, request.cookie, 0);
            self.sending.push_head(&header);
        } else {
            self.sending.push_head(&simple_reply(0, request.cookie));
        }
    }

    /// An error. A READ with structured replies may never get a simple reply, not even for an error, and
    /// the others may get either.
    ///
    /// | 20-23 | error                  |
    /// | 24-25 | length of the message  |
    /// | 26-   | message                |
    pub(super) fn push_error(&mut self, cookie: u64, error: NbdError, message: &str) {
        if !self.terms.structured_replies {
            return self.sending.push_head(&simple_reply(error as u32, cookie));
        }
        let message = message.as_bytes();
        let length = 6 + message.len();
        let kind = chunk_type::ERROR;
        self.sending
            .push_head(&chunk_header(REPLY_FLAG_DONE, kind, cookie, length as u32));
        self.sending.push_head(&(error as u32).to_be_bytes());
        self.sending
            .push_head(&(message.len() as u16).to_be_bytes());
        self.sending.push_head(message);
    }
}
