//! PDUs on their way: headers of our own, data that is never copied, padding and digests.

use pss_core::volume::device::ReadPart;
use pss_gateway::sending::SendQueue;

use super::{BHS_BYTES, Bhs, Digests, set_data_bytes};

/// Below this a copy is cheaper than a slice of its own.
const COPIED_BYTES_MAX: usize = 256;
static ZEROES: [u8; 4096] = [0; 4096];

/// Puts a PDU with its data segment behind what is to be sent. The header's length field is set here.
pub fn push(queue: &mut SendQueue, digests: Digests, mut bhs: Bhs, data: &[ReadPart]) {
    let length = data.iter().map(part_bytes).sum();
    set_data_bytes(&mut bhs, length);
    queue.push_head(&bhs);
    if digests.header {
        queue.push_head(&crc32c::crc32c(&bhs[..BHS_BYTES]).to_le_bytes());
    }
    if length == 0 {
        return;
    }
    let mut digest = 0;
    for part in data {
        match part {
            ReadPart::Data(bytes) => {
                if digests.data {
                    digest = crc32c::crc32c_append(digest, bytes);
                }
                if bytes.len() <= COPIED_BYTES_MAX {
                    queue.push_head(bytes);
                } else {
                    queue.push_body(bytes.clone());
                }
            }
            ReadPart::Hole(count) => {
                if digests.data {
                    digest = append_zeroes(digest, *count as usize);
                }
                queue.push_zeroes(*count as usize);
            }
        }
    }
    let padding = length.next_multiple_of(4) - length;
    queue.push_head(&ZEROES[..padding]);
    if digests.data {
        // "padding bytes are included in the digest" (§11.2.3).
        digest = append_zeroes(digest, padding);
        queue.push_head(&digest.to_le_bytes());
    }
}

/// Bytes that a part stands for.
pub fn part_bytes(part: &ReadPart) -> usize {
    match part {
        ReadPart::Data(bytes) => bytes.len(),
        ReadPart::Hole(count) => *count as usize,
    }
}

/// Cuts parts into consecutive runs, without copying.
#[derive(Debug)]
pub struct Cutter<'a> {
    parts: &'a [ReadPart],
    skip: usize,
}

impl<'a> Cutter<'a> {
    /// From the start of all parts.
    pub fn new(parts: &'a [ReadPart]) -> Cutter<'a> {
        Cutter { parts, skip: 0 }
    }

    /// The next `length` bytes, or what is left of them.
    pub fn take(&mut self, length: usize) -> Vec<ReadPart> {
        let mut left = length;
        let mut cut = Vec::new();
        while let (Some(part), true) = (self.parts.first(), left > 0) {
            let bytes = part_bytes(part);
            let run = (bytes - self.skip).min(left);
            if run > 0 {
                cut.push(match part {
                    ReadPart::Data(data) => ReadPart::Data(data.slice(self.skip..self.skip + run)),
                    ReadPart::Hole(_) => ReadPart::Hole(run as u32),
                });
            }
            left -= run;
            self.skip += run;
            if self.skip == bytes {
                self.parts = &self.parts[1..];
                self.skip = 0;
            }
        }
        cut
    }
}

fn append_zeroes(mut digest: u32, mut count: usize) -> u32 {
    while count > 0 {
        let run = count.min(ZEROES.len());
        digest = crc32c::crc32c_append(digest, &ZEROES[..run]);
        count -= run;
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::io::IoSlice;

    fn sent(queue: &SendQueue) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 32];
        let filled = queue.fill(&mut slices);
        slices[..filled].iter().flat_map(|it| it.to_vec()).collect()
    }

    #[test]
    fn digests_are_as_in_the_examples() {
        // RFC 7143 appendix A.4: 32 bytes of zeros have the digest aa 36 91 8a.
        let digests = Digests {
            header: true,
            data: true,
        };
        let mut queue = SendQueue::default();
        push(&mut queue, digests, [0; BHS_BYTES], &[ReadPart::Hole(32)]);
        let bytes = sent(&queue);
        assert_eq!(bytes.len(), 48 + 4 + 32 + 4);
        assert_eq!(&bytes[84..], [0xaa, 0x36, 0x91, 0x8a]);
        let header = crc32c::crc32c(&bytes[..48]).to_le_bytes();
        assert_eq!(&bytes[48..52], header);
        assert_eq!(bytes[7], 32);
    }

    #[test]
    fn data_is_padded_and_padding_is_digested() {
        let digests = Digests {
            header: false,
            data: true,
        };
        let mut queue = SendQueue::default();
        let parts = [
            ReadPart::Data(Bytes::from(vec![7; 1000])),
            ReadPart::Hole(1),
        ];
        push(&mut queue, digests, [0; BHS_BYTES], &parts);
        let bytes = sent(&queue);
        assert_eq!(bytes.len(), 48 + 1004 + 4);
        let digest = crc32c::crc32c(&bytes[48..1052]).to_le_bytes();
        assert_eq!(&bytes[1052..], digest);
    }

    #[test]
    fn parts_are_cut_anywhere() {
        let parts = [
            ReadPart::Data(Bytes::from_static(b"abcd")),
            ReadPart::Hole(3),
            ReadPart::Data(Bytes::from_static(b"efg")),
        ];
        let whole = b"abcd\0\0\0efg";
        for from in 0..=10 {
            for length in 0..=10 - from {
                let mut cutter = Cutter::new(&parts);
                cutter.take(from);
                let mut bytes = Vec::new();
                for part in cutter.take(length) {
                    match part {
                        ReadPart::Data(data) => bytes.extend_from_slice(&data),
                        ReadPart::Hole(run) => bytes.resize(bytes.len() + run as usize, 0),
                    }
                }
                assert_eq!(bytes, &whole[from..from + length]);
            }
        }
    }
}
