//! The table behind a chunk's data.

use bytes::{Buf, BufMut};

use crate::disk::ALIGN_BYTES;
use crate::types::{ChunkIndex, GroupId, Slot, VolumeId};

/// Version of the chunk file's layout without times, which is still read.
const CHUNK_VERSION_UNTIMED: u16 = 1;
/// Version of the chunk file's layout.
const CHUNK_VERSION: u16 = 2;
const MAGIC: &[u8; 8] = b"PSSTABL1";
/// Of the first version; the second has 8 bytes more.
const HEADER_BYTES_UNTIMED: usize = 64;
const HEADER_BYTES: usize = 72;
/// The table is a guess: see [`Stored::suspect`].
const FLAG_SUSPECT: u32 = 1;
/// Stands for a block of which nobody knows here what it should be. It is a checksum that the block does not have.
pub(super) const DAMAGED: u32 = u32::MAX;

/// What stands for a block whose data have that checksum, and of which nobody knows here what it should be.
pub(super) fn damaged(actual: u32) -> u32 {
    DAMAGED - u32::from(actual == DAMAGED)
}

/// Whether a checksum says what the block should be. (Of blocks that have these two checksums it is not believed: they are only
/// more work to repair.)
pub(super) fn is_known(checksum: u32) -> bool {
    checksum < DAMAGED - 1
}

/// What a table is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Owner {
    pub(super) group: GroupId,
    pub(super) volume: VolumeId,
    pub(super) uuid: [u8; 16],
    pub(super) chunk: ChunkIndex,
    /// Blocks of a chunk.
    pub(super) blocks: u32,
}

impl Owner {
    /// Bytes of one slot.
    pub(super) fn slot_bytes(&self) -> usize {
        (HEADER_BYTES + 4 * self.blocks as usize).next_multiple_of(ALIGN_BYTES)
    }
}

/// Encodes a table as it stands in its slot.
///
/// | at | bytes      | field                                                                    |
/// |----|------------|--------------------------------------------------------------------------|
/// | 0  | 8          | magic `PSSTABL1`                                                         |
/// | 8  | 4          | CRC32C of bytes 12..72 + 4 × blocks                                      |
/// | 12 | 2          | format version                                                           |
/// | 14 | 2          | group                                                                    |
/// | 16 | 4          | volume                                                                   |
/// | 20 | 4          | chunk                                                                    |
/// | 24 | 8          | generation; the slot is generation mod 2                                 |
/// | 32 | 8          | last slot applied to the chunk                                           |
/// | 40 | 4          | flags: 1 = suspect                                                       |
/// | 44 | 4          | blocks                                                                   |
/// | 48 | 16         | uuid of the volume                                                       |
/// | 64 | 8          | time of the last slot applied, ms since 1970; 0: unknown                 |
/// | 72 | 4 × blocks | checksum of each block, or 0: unwritten                                  |
///
/// Version 1 has no time: its checksums begin at 64.
pub(super) fn encode(
    owner: &Owner,
    generation: u64,
    (last_slot, changed_ms): (Slot, u64),
    suspect: bool,
    checksums: &[u32],
) -> Vec<u8> {
    assert_eq!(checksums.len(), owner.blocks as usize);
    let mut out = Vec::with_capacity(owner.slot_bytes());
    out.put_slice(MAGIC);
    out.put_u32_le(0);
    out.put_u16_le(CHUNK_VERSION);
    out.put_u16_le(owner.group.0);
    out.put_u32_le(owner.volume.0);
    out.put_u32_le(owner.chunk.0);
    out.put_u64_le(generation);
    out.put_u64_le(last_slot.0);
    out.put_u32_le(if suspect { FLAG_SUSPECT } else { 0 });
    out.put_u32_le(owner.blocks);
    out.put_slice(&owner.uuid);
    out.put_u64_le(changed_ms);
    for checksum in checksums {
        out.put_u32_le(*checksum);
    }
    let crc = crc32c::crc32c(&out[12..]);
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    out.resize(owner.slot_bytes(), 0);
    out
}

/// What the two slots of a chunk file say.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// Use this.
    Table(Stored),
    /// The file belongs to another volume.
    Foreign,
}

/// A table as it was stored.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Stored {
    pub(super) checksums: Vec<u32>,
    /// 0: none was written yet.
    pub(super) generation: u64,
    pub(super) last_slot: Slot,
    /// When that was; 0: unknown.
    pub(super) changed_ms: u64,
    /// A newer table may have been lost, by a crash while it was written (then the log has what is
    /// missing) or by damage: blocks that are unwritten here but hold something must not be taken for
    /// zeros.
    pub(super) suspect: bool,
}

enum SlotContent {
    Valid(Stored),
    /// Never written.
    Blank,
    Bad,
    Foreign,
}

/// Chooses between the slots; `bytes` is what the file has behind its data.
pub(super) fn choose(owner: &Owner, bytes: &[u8]) -> Found {
    let (first, second) = bytes.split_at(bytes.len().min(owner.slot_bytes()));
    let table = |checksum, suspect| Stored {
        checksums: vec![checksum; owner.blocks as usize],
        generation: 0,
        last_slot: Slot(0),
        changed_ms: 0,
        suspect,
    };
    use SlotContent::*;
    let chosen = match (decode(owner, 0, first), decode(owner, 1, second)) {
        (Valid(even), Valid(odd)) if even.generation < odd.generation => odd,
        (Valid(even), Valid(_)) => even,
        (Valid(only), other) | (other, Valid(only)) => {
            // Of the first table there is only one.
            let complete = only.generation == 1 && matches!(other, Blank);
            Stored {
                suspect: only.suspect || !complete,
                ..only
            }
        }
        (Foreign, _) | (_, Foreign) => return Found::Foreign,
        (Bad, Bad) => table(DAMAGED, false),
        (Blank | Bad, Blank | Bad) => table(0, true),
    };
    Found::Table(chosen)
}

fn decode(owner: &Owner, parity: u64, bytes: &[u8]) -> SlotContent {
    let blank = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    if blank(&bytes[..bytes.len().min(HEADER_BYTES_UNTIMED)]) {
        return SlotContent::Blank;
    }
    let untimed = CHUNK_VERSION_UNTIMED.to_le_bytes();
    let header_bytes = match bytes.get(12..14) {
        Some(version) if version == untimed => HEADER_BYTES_UNTIMED,
        _ => HEADER_BYTES,
    };
    let used_bytes = header_bytes + 4 * owner.blocks as usize;
    let Some(used) = bytes.get(..used_bytes) else {
        return SlotContent::Bad;
    };
    let mut input = used;
    let magic_fits = input.copy_to_bytes(8) == MAGIC[..];
    if !magic_fits || input.get_u32_le() != crc32c::crc32c(&used[12..]) {
        return SlotContent::Bad;
    }
    let version = input.get_u16_le();
    let group = GroupId(input.get_u16_le());
    let volume = VolumeId(input.get_u32_le());
    let chunk = ChunkIndex(input.get_u32_le());
    let generation = input.get_u64_le();
    let last_slot = Slot(input.get_u64_le());
    let flags = input.get_u32_le();
    let blocks = input.get_u32_le();
    let mut uuid = [0; 16];
    input.copy_to_slice(&mut uuid);
    let changed_ms = match version {
        CHUNK_VERSION_UNTIMED => 0,
        _ => input.get_u64_le(),
    };
    if (group, volume, uuid) != (owner.group, owner.volume, owner.uuid) {
        return SlotContent::Foreign;
    }
    let in_place = chunk == owner.chunk
        && blocks == owner.blocks
        && generation % 2 == parity
        && generation > 0
        && (CHUNK_VERSION_UNTIMED..=CHUNK_VERSION).contains(&version);
    if !in_place {
        return SlotContent::Bad;
    }
    SlotContent::Valid(Stored {
        checksums: input
            .chunks_exact(4)
            .map(|mut sum| sum.get_u32_le())
            .collect(),
        generation,
        last_slot,
        changed_ms,
        suspect: flags & FLAG_SUSPECT != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner {
            group: GroupId(0),
            volume: VolumeId(3),
            uuid: [9; 16],
            chunk: ChunkIndex(5),
            blocks: 16,
        }
    }

    fn slots(even: Option<&[u8]>, odd: Option<&[u8]>) -> Vec<u8> {
        let zeros = vec![0; owner().slot_bytes()];
        [even.unwrap_or(&zeros), odd.unwrap_or(&zeros)].concat()
    }

    fn table(generation: u64) -> Vec<u8> {
        let last_change = (Slot(generation * 10), generation * 100);
        encode(&owner(), generation, last_change, false, &[7; 16])
    }

    fn chosen(bytes: &[u8]) -> Stored {
        match choose(&owner(), bytes) {
            Found::Table(table) => table,
            Found::Foreign => panic!("foreign"),
        }
    }

    #[test]
    fn golden_bytes() {
        let hex: String = table(2)[..80]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, GOLDEN);
    }

    const GOLDEN: &str = "\
        5053535441424c31460a6de102000000030000000500000002000000000000001400000000000000\
        000000001000000009090909090909090909090909090909c8000000000000000700000007000000";

    #[test]
    fn tables_without_times_are_read() {
        let hex = GOLDEN_UNTIMED.as_bytes().chunks(2);
        let bytes = hex.map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap());
        let mut bytes: Vec<u8> = bytes.collect();
        // The golden bytes show two of the sixteen checksums.
        for _ in 2..16 {
            bytes.extend_from_slice(&[7, 0, 0, 0]);
        }
        bytes.resize(owner().slot_bytes(), 0);
        let found = chosen(&slots(Some(&bytes), Some(&table(1))));
        assert_eq!((found.generation, found.suspect), (2, false));
        assert_eq!((found.last_slot, found.changed_ms), (Slot(20), 0));
        assert_eq!(found.checksums, [7; 16]);
    }

    /// As version 1 was.
    const GOLDEN_UNTIMED: &str = "\
        5053535441424c31940b029a01000000030000000500000002000000000000001400000000000000\
        0000000010000000090909090909090909090909090909090700000007000000";

    #[test]
    fn newer_slot_wins() {
        let found = chosen(&slots(Some(&table(2)), Some(&table(3))));
        assert_eq!((found.generation, found.suspect), (3, false));
        let found = chosen(&slots(Some(&table(4)), Some(&table(3))));
        assert_eq!((found.generation, found.suspect), (4, false));
        assert_eq!((found.last_slot, found.changed_ms), (Slot(40), 400));
    }

    #[test]
    fn first_table_stands_alone() {
        let found = chosen(&slots(None, Some(&table(1))));
        assert_eq!((found.generation, found.suspect), (1, false));
    }

    #[test]
    fn a_lost_slot_is_suspect() {
        let bad = vec![1; owner().slot_bytes()];
        let found = chosen(&slots(Some(&table(2)), Some(&bad)));
        assert_eq!((found.generation, found.suspect), (2, true));
        let found = chosen(&slots(Some(&table(2)), None));
        assert_eq!((found.generation, found.suspect), (2, true));
    }

    #[test]
    fn no_table_yet() {
        for bytes in [&slots(None, None)[..], &[], &[0; 100]] {
            let found = chosen(bytes);
            assert_eq!((found.generation, found.suspect), (0, true));
            assert_eq!(found.checksums, [0; 16]);
        }
    }

    #[test]
    fn both_slots_bad() {
        let bad = vec![1; owner().slot_bytes()];
        assert_eq!(
            chosen(&slots(Some(&bad), Some(&bad))).checksums,
            [DAMAGED; 16]
        );
    }

    #[test]
    fn another_volume() {
        let other = Owner {
            volume: VolumeId(4),
            ..owner()
        };
        assert_eq!(
            choose(&other, &slots(None, Some(&table(1)))),
            Found::Foreign
        );
        // A table that strayed here from another chunk of the volume is damage.
        let other = Owner {
            chunk: ChunkIndex(4),
            ..owner()
        };
        let bytes = slots(Some(&table(2)), Some(&table(1)));
        let Found::Table(found) = choose(&other, &bytes) else {
            panic!("foreign");
        };
        assert_eq!(found.checksums, [DAMAGED; 16]);
    }

    #[test]
    fn table_in_the_wrong_slot_is_bad() {
        let found = chosen(&slots(Some(&table(1)), None));
        assert_eq!((found.generation, found.suspect), (0, true));
    }
}
