//! A chunk as it travels to another server.

use bytes::{Buf, BufMut, Bytes};

use super::ChunkError;
use super::table::Owner;
use crate::entry::block_checksum;
use crate::types::{BLOCK_BYTES, Slot};

const VERSION: u16 = 1;
const MAGIC: &[u8; 8] = b"PSSCHNK1";
const HEADER_BYTES: usize = 64;

/// The start of an image; the allocated blocks follow in order.
///
/// | at | bytes      | field                                   |
/// |----|------------|-----------------------------------------|
/// | 0  | 8          | magic `PSSCHNK1`                        |
/// | 8  | 4          | CRC32C of bytes 12..64 + 4 × blocks     |
/// | 12 | 2          | format version                          |
/// | 14 | 2          | group                                   |
/// | 16 | 4          | volume                                  |
/// | 20 | 4          | chunk                                   |
/// | 24 | 8          | last slot applied to the chunk          |
/// | 32 | 4          | blocks of a chunk                       |
/// | 36 | 8          | time of that, ms since 1970; 0: unknown |
/// | 44 | 4          | zero                                    |
/// | 48 | 16         | uuid of the volume                      |
/// | 64 | 4 × blocks | checksum of each block, or 0: unwritten |
pub(super) fn encode_start(
    owner: &Owner,
    (last_slot, changed_ms): (Slot, u64),
    checksums: &[u32],
) -> Vec<u8> {
    let allocated = checksums.iter().filter(|checksum| **checksum != 0).count();
    let start = HEADER_BYTES + 4 * checksums.len();
    let mut out = Vec::with_capacity(start + allocated * BLOCK_BYTES);
    out.put_slice(MAGIC);
    out.put_u32_le(0);
    out.put_u16_le(VERSION);
    out.put_u16_le(owner.group.0);
    out.put_u32_le(owner.volume.0);
    out.put_u32_le(owner.chunk.0);
    out.put_u64_le(last_slot.0);
    out.put_u32_le(owner.blocks);
    out.put_u64_le(changed_ms);
    out.put_bytes(0, 4);
    out.put_slice(&owner.uuid);
    for checksum in checksums {
        out.put_u32_le(*checksum);
    }
    let crc = crc32c::crc32c(&out[12..]);
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    out
}

/// A verified image.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) last_slot: Slot,
    pub(super) changed_ms: u64,
    pub(super) checksums: Vec<u32>,
    /// The allocated blocks, in order.
    pub(super) data: Bytes,
}

/// Reads an image and verifies all of it.
pub(super) fn decode(owner: &Owner, image: &Bytes) -> Result<Image, ChunkError> {
    let bad = |what| Err(ChunkError::BadImage(what));
    let start = HEADER_BYTES + 4 * owner.blocks as usize;
    let Some(used) = image.get(..start) else {
        return bad("it is cut short");
    };
    let mut input = used;
    if input.copy_to_bytes(8) != MAGIC[..] {
        return bad("it has no magic");
    }
    if input.get_u32_le() != crc32c::crc32c(&used[12..]) {
        return bad("its header is damaged");
    }
    if input.get_u16_le() != VERSION {
        return bad("it has another format version");
    }
    let place = (input.get_u16_le(), input.get_u32_le(), input.get_u32_le());
    let last_slot = Slot(input.get_u64_le());
    let blocks = input.get_u32_le();
    let changed_ms = input.get_u64_le();
    input.advance(4);
    let mut uuid = [0; 16];
    input.copy_to_slice(&mut uuid);
    let expected = (owner.group.0, owner.volume.0, owner.chunk.0);
    if place != expected || uuid != owner.uuid || blocks != owner.blocks {
        return bad("it is one of another chunk");
    }
    let checksums: Vec<u32> = input
        .chunks_exact(4)
        .map(|mut sum| sum.get_u32_le())
        .collect();
    let data = image.slice(start..);
    let first = u64::from(owner.chunk.0) * u64::from(owner.blocks);
    let mut rest = &data[..];
    for (checksum, block) in checksums.iter().zip(first..) {
        if *checksum == 0 {
            continue;
        }
        let Some((data, behind)) = rest.split_at_checked(BLOCK_BYTES) else {
            return bad("it is cut short");
        };
        if block_checksum(owner.volume, block, data) != *checksum {
            return bad("a block is damaged");
        }
        rest = behind;
    }
    if !rest.is_empty() || data.is_empty() {
        return bad("its length is wrong");
    }
    Ok(Image {
        last_slot,
        changed_ms,
        checksums,
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ChunkIndex, GroupId, VolumeId};

    fn owner() -> Owner {
        Owner {
            group: GroupId(0),
            volume: VolumeId(3),
            uuid: [9; 16],
            chunk: ChunkIndex(5),
            blocks: 16,
        }
    }

    fn image() -> Vec<u8> {
        let mut checksums = vec![0; 16];
        let data = [3; BLOCK_BYTES];
        checksums[7] = block_checksum(VolumeId(3), 5 * 16 + 7, &data);
        let mut image = encode_start(&owner(), (Slot(77), 1234), &checksums);
        image.extend_from_slice(&data);
        image
    }

    #[test]
    fn golden_bytes() {
        let hex: String = image()[..96]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, GOLDEN);
    }

    const GOLDEN: &str = "\
        50535343484e4b3129646fc90100000003000000050000004d0000000000000010000000d2040000\
        00000000000000000909090909090909090909090909090900000000000000000000000000000000\
        0000000000000000000000008d864094";

    #[test]
    fn round_trip() {
        let image = decode(&owner(), &image().into()).unwrap();
        assert_eq!((image.last_slot, image.changed_ms), (Slot(77), 1234));
        assert_eq!(image.checksums.iter().filter(|sum| **sum != 0).count(), 1);
        assert_eq!(image.data, vec![3; BLOCK_BYTES]);
    }

    #[test]
    fn every_damage_is_noticed() {
        let good = image();
        for length in (0..good.len()).step_by(61) {
            decode(&owner(), &good[..length].to_vec().into()).unwrap_err();
        }
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            decode(&owner(), &bad.into()).unwrap_err();
        }
        let mut long = good.clone();
        long.push(0);
        decode(&owner(), &long.into()).unwrap_err();
        let other = Owner {
            chunk: ChunkIndex(6),
            ..owner()
        };
        decode(&other, &good.into()).unwrap_err();
    }
}
