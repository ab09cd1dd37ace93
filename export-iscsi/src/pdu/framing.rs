//! Finds PDUs in what an initiator sent, and checks their digests.
//!
//! Nothing is allocated before its length has been checked. A long data segment gets memory of its own,
//! into which the socket can be read; a short one stays in the receive buffer.

use bytes::{Buf, Bytes, BytesMut};
use pss_core::payload::{LARGE_PAYLOAD_BYTES, Payload};

use super::{BHS_BYTES, Bhs, Digests, ahs_bytes, data_bytes};

const DIGEST_BYTES: usize = 4;

/// A PDU as it came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pdu {
    /// Header.
    pub bhs: Bhs,
    /// Additional header segments.
    pub ahs: Bytes,
    /// Data segment without padding.
    pub data: Bytes,
    /// Whether the data digest, if there is one, is right.
    pub data_is_intact: bool,
}

/// Why no further PDU can be found on this connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FramingError {
    /// Header digest: its lengths cannot be trusted.
    #[error("header digest is wrong")]
    HeaderDigest,
    /// More data than we said we would take.
    #[error("data segment of {length} bytes, at most {most} are taken (opcode {opcode:#04x})")]
    TooLong {
        /// What the PDU is.
        opcode: u8,
        /// What it says.
        length: usize,
        /// What was agreed on.
        most: usize,
    },
}

/// The receiving side of one connection.
#[derive(Debug)]
pub struct Framing {
    digests: Digests,
    data_bytes_max: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Header,
    /// Data segment in the receive buffer.
    Data(Bhs, Bytes),
    /// Data segment with memory of its own.
    OwnBuffer(Bhs, Bytes, Payload),
}

impl Framing {
    /// A connection without digests, as login has it.
    pub fn new(data_bytes_max: usize) -> Framing {
        Framing {
            digests: Digests::default(),
            data_bytes_max,
            state: State::Header,
        }
    }

    /// Changes what holds from the next PDU on.
    pub fn set_terms(&mut self, digests: Digests, data_bytes_max: usize) {
        self.digests = digests;
        self.data_bytes_max = data_bytes_max;
    }

    /// Where the next bytes belong if not into the receive buffer.
    pub fn own_buffer(&mut self) -> Option<&mut Payload> {
        match &mut self.state {
            State::OwnBuffer(_, _, buffer) if !buffer.is_full() => Some(buffer),
            _ => None,
        }
    }

    /// Takes the next PDU from the front of `input`, if all of it is there.
    ///
    /// # Errors
    /// When the next PDU cannot be found any more.
    pub fn poll(&mut self, input: &mut BytesMut) -> Result<Option<Pdu>, FramingError> {
        loop {
            match std::mem::replace(&mut self.state, State::Header) {
                State::Header => match self.take_header(input)? {
                    Some((bhs, ahs)) if data_bytes(&bhs) == 0 => {
                        return Ok(Some(self.pdu(bhs, ahs, Bytes::new(), true)));
                    }
                    Some((bhs, ahs)) if data_bytes(&bhs) >= LARGE_PAYLOAD_BYTES => {
                        let buffer = Payload::with_length(data_bytes(&bhs));
                        self.state = State::OwnBuffer(bhs, ahs, buffer);
                    }
                    Some((bhs, ahs)) => self.state = State::Data(bhs, ahs),
                    None => return Ok(None),
                },
                State::Data(bhs, ahs) => {
                    let (length, padding) = lengths(&bhs);
                    if input.len() < length + padding + self.data_digest_bytes() {
                        self.state = State::Data(bhs, ahs);
                        return Ok(None);
                    }
                    let data = input.split_to(length).freeze();
                    let intact = self.take_trailer(input, &data, padding);
                    return Ok(Some(self.pdu(bhs, ahs, data, intact)));
                }
                State::OwnBuffer(bhs, ahs, mut buffer) => {
                    let taken = buffer.fill(input);
                    input.advance(taken);
                    let (_, padding) = lengths(&bhs);
                    if !buffer.is_full() || input.len() < padding + self.data_digest_bytes() {
                        self.state = State::OwnBuffer(bhs, ahs, buffer);
                        return Ok(None);
                    }
                    let data = buffer.freeze();
                    let intact = self.take_trailer(input, &data, padding);
                    return Ok(Some(self.pdu(bhs, ahs, data, intact)));
                }
            }
        }
    }

    fn pdu(&self, bhs: Bhs, ahs: Bytes, data: Bytes, data_is_intact: bool) -> Pdu {
        Pdu {
            bhs,
            ahs,
            data,
            data_is_intact,
        }
    }

    fn data_digest_bytes(&self) -> usize {
        usize::from(self.digests.data) * DIGEST_BYTES
    }

    fn take_header(&self, input: &mut BytesMut) -> Result<Option<(Bhs, Bytes)>, FramingError> {
        let Some(bhs) = input.first_chunk::<BHS_BYTES>() else {
            return Ok(None);
        };
        let bhs = *bhs;
        let digest_bytes = usize::from(self.digests.header) * DIGEST_BYTES;
        let end = BHS_BYTES + ahs_bytes(&bhs);
        // A length that is too long for an intact header is told from a damaged one by the digest.
        let too_long = data_bytes(&bhs) > self.data_bytes_max;
        if !too_long && input.len() < end + digest_bytes {
            return Ok(None);
        }
        if self.digests.header && input.len() >= end + digest_bytes {
            let digest = crc32c::crc32c(&input[..end]).to_le_bytes();
            if input[end..end + DIGEST_BYTES] != digest {
                return Err(FramingError::HeaderDigest);
            }
        }
        if too_long {
            return Err(FramingError::TooLong {
                opcode: bhs[0] & super::opcode::MASK,
                length: data_bytes(&bhs),
                most: self.data_bytes_max,
            });
        }
        input.advance(BHS_BYTES);
        let ahs = match end - BHS_BYTES {
            0 => Bytes::new(),
            length => Bytes::copy_from_slice(&input.split_to(length)),
        };
        input.advance(digest_bytes);
        Ok(Some((bhs, ahs)))
    }

    /// Takes padding and digest, which are there, and says whether the digest is right.
    fn take_trailer(&self, input: &mut BytesMut, data: &[u8], padding: usize) -> bool {
        let mut intact = true;
        if self.digests.data {
            let digest = crc32c::crc32c_append(crc32c::crc32c(data), &input[..padding]);
            intact = input[padding..padding + DIGEST_BYTES] == digest.to_le_bytes();
        }
        input.advance(padding + self.data_digest_bytes());
        intact
    }
}

fn lengths(bhs: &Bhs) -> (usize, usize) {
    let length = data_bytes(bhs);
    (length, length.next_multiple_of(4) - length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdu::outgoing::push;
    use crate::pdu::{opcode, set_data_bytes};
    use proptest::prelude::*;
    use pss_core::volume::device::ReadPart;
    use pss_gateway::sending::SendQueue;
    use std::io::IoSlice;

    const BOTH: Digests = Digests {
        header: true,
        data: true,
    };

    fn encoded(digests: Digests, data: &[u8]) -> Vec<u8> {
        let mut queue = SendQueue::default();
        let parts = [ReadPart::Data(Bytes::copy_from_slice(data))];
        push(&mut queue, digests, [0; BHS_BYTES], &parts);
        let mut slices = [IoSlice::new(&[]); 8];
        let filled = queue.fill(&mut slices);
        slices[..filled].iter().flat_map(|it| it.to_vec()).collect()
    }

    fn framing(digests: Digests) -> Framing {
        let mut framing = Framing::new(8192);
        framing.set_terms(digests, 1 << 20);
        framing
    }

    proptest! {
        #[test]
        fn pdus_survive_any_cut(
            header in any::<bool>(),
            data in any::<bool>(),
            lengths in proptest::collection::vec(0..2000usize, 1..6),
            step in 1..700usize,
        ) {
            let digests = Digests { header, data };
            let mut stream = Vec::new();
            for length in &lengths {
                stream.extend(encoded(digests, &vec![*length as u8; *length]));
            }
            let mut framing = framing(digests);
            let mut input = BytesMut::new();
            let mut found = Vec::new();
            for piece in stream.chunks(step) {
                input.extend_from_slice(piece);
                while let Some(pdu) = framing.poll(&mut input).unwrap() {
                    prop_assert!(pdu.data_is_intact);
                    found.push(pdu.data.len());
                }
            }
            prop_assert_eq!(found, lengths);
        }

        #[test]
        fn junk_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            let mut input = BytesMut::from(&bytes[..]);
            let mut framing = framing(BOTH);
            while let Ok(Some(_)) = framing.poll(&mut input) {}
        }
    }

    #[test]
    fn long_segments_get_their_own_memory() {
        let data: Vec<u8> = (0..LARGE_PAYLOAD_BYTES + 5).map(|at| at as u8).collect();
        let stream = encoded(BOTH, &data);
        let mut framing = framing(BOTH);
        let mut input = BytesMut::from(&stream[..100]);
        assert_eq!(framing.poll(&mut input), Ok(None));
        let buffer = framing.own_buffer().unwrap();
        assert_eq!(buffer.fill(&stream[100..]), data.len() - 48);
        // Padding and digest are still missing.
        assert_eq!(framing.poll(&mut input), Ok(None));
        assert!(framing.own_buffer().is_none());
        input.extend_from_slice(&stream[52 + data.len()..]);
        let pdu = framing.poll(&mut input).unwrap().unwrap();
        assert!(pdu.data_is_intact && input.is_empty());
        assert_eq!(pdu.data, data);
    }

    #[test]
    fn wrong_data_digest_is_told() {
        let mut stream = encoded(BOTH, b"hello");
        stream[53] ^= 1;
        let mut input = BytesMut::from(&stream[..]);
        let pdu = framing(BOTH).poll(&mut input).unwrap().unwrap();
        assert!(!pdu.data_is_intact);
    }

    #[test]
    fn wrong_header_digest_ends_the_connection() {
        let mut stream = encoded(BOTH, b"hello");
        stream[20] ^= 1;
        let mut input = BytesMut::from(&stream[..]);
        let found = framing(BOTH).poll(&mut input);
        assert_eq!(found, Err(FramingError::HeaderDigest));
    }

    #[test]
    fn length_beyond_the_limit_is_refused_before_it_comes() {
        let mut bhs = [0; BHS_BYTES];
        bhs[0] = opcode::LOGIN_REQUEST;
        set_data_bytes(&mut bhs, 16 << 20 >> 1);
        let mut input = BytesMut::from(&bhs[..]);
        let found = Framing::new(8192).poll(&mut input);
        assert!(matches!(
            found,
            Err(FramingError::TooLong {
                opcode: 3,
                most: 8192,
                ..
            })
        ));
    }
}
