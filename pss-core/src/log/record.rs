//! Bytes of a record and of a segment's header.

use bytes::{Buf, BufMut, Bytes};

use crate::disk::ALIGN_BYTES;
use crate::entry::{ENTRY_HEADER_MAX, ENTRY_PAYLOAD_MAX, Entry, EntryError};
use crate::types::{Ballot, EntryId, GroupId, ServerId, Slot};

/// Version of the log's layout, and of what entries may hold: a program must know all commands of the version. It is
/// raised with each command that is added, so that a program from before refuses the segment and reads none of it.
///
/// | version | commands (docs/formats.md, section 4) |
/// |---------|---------------------------------------|
/// | 1       | 0..=15                                |
/// | 2       | 0..=15                                |
///
/// The two are the same: some programs write commands 10..=15 into segments of version 1, and those that do not know
/// them take the entries for a torn tail. They refuse version 2.
pub(super) const LOG_VERSION: u16 = 2;
/// The oldest version that is read.
const LOG_VERSION_MIN: u16 = 1;
/// Bytes of a segment's header; the first record follows.
pub(super) const SEGMENT_HEADER_BYTES: u64 = ALIGN_BYTES as u64;
/// Bytes of a record in front of the entry's header.
const FIXED_BYTES: usize = 96;
/// Most bytes of one record.
pub(super) const RECORD_BYTES_MAX: usize =
    (FIXED_BYTES + ENTRY_HEADER_MAX).next_multiple_of(ALIGN_BYTES) + ENTRY_PAYLOAD_MAX;

const SEGMENT_MAGIC: &[u8; 8] = b"PSSLSEG1";
const SEGMENT_USED_BYTES: usize = 128;
const RECORD_MAGIC: &[u8; 8] = b"PSSLREC1";
const FLAG_RESET: u32 = 1;
const KIND_ENTRY: u32 = 1;
const KIND_MARKER: u32 = 2;

/// What stands at the start of a segment.
///
/// | at  | bytes | field                                                              |
/// |-----|-------|--------------------------------------------------------------------|
/// | 0   | 8     | magic `PSSLSEG1`                                                   |
/// | 8   | 4     | CRC32C of bytes 12..128                                            |
/// | 12  | 2     | format version                                                     |
/// | 14  | 2     | group                                                              |
/// | 16  | 16    | cell                                                               |
/// | 32  | 8     | sequence of the segment                                            |
/// | 40  | 4     | flags: 1 = everything before this segment is to be forgotten       |
/// | 44  | 4     | zero                                                               |
/// | 48  | 24    | base: slot u64, ballot number u64, ballot server u8, 7 zeros       |
/// | 72  | 24    | evidence, in the same form; slot 0 = none                          |
/// | 96  | 24    | doubt, in the same form; slot 0 = none                             |
/// | 120 | 3976  | zero                                                               |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct SegmentHeader {
    pub(super) group: GroupId,
    pub(super) cell: [u8; 16],
    pub(super) sequence: u64,
    pub(super) reset: bool,
    /// The entry before the first record.
    pub(super) base: EntryId,
    /// The server had acknowledged entries up to here, though it cannot read them all any more.
    pub(super) evidence: Option<EntryId>,
    /// It may have acknowledged entries up to here: see `Recovered::doubt`.
    pub(super) doubt: Option<EntryId>,
}

/// What the first bytes of a segment are.
pub(super) enum SegmentStart {
    Header(SegmentHeader),
    /// A header of a format version that is not known here.
    Version(u16),
    /// Not a header, or a damaged one.
    Unreadable,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SEGMENT_HEADER_BYTES as usize);
        out.put_slice(SEGMENT_MAGIC);
        out.put_u32_le(0);
        out.put_u16_le(LOG_VERSION);
        out.put_u16_le(self.group.0);
        out.put_slice(&self.cell);
        out.put_u64_le(self.sequence);
        out.put_u32_le(if self.reset { FLAG_RESET } else { 0 });
        out.put_u32_le(0);
        put_id(&mut out, self.base);
        put_id(&mut out, self.evidence.unwrap_or_default());
        put_id(&mut out, self.doubt.unwrap_or_default());
        out.resize(SEGMENT_HEADER_BYTES as usize, 0);
        let crc = crc32c::crc32c(&out[12..SEGMENT_USED_BYTES]);
        out[8..12].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> SegmentStart {
        let Some(used) = bytes.get(..SEGMENT_USED_BYTES) else {
            return SegmentStart::Unreadable;
        };
        let mut input = used;
        let magic_fits = input.copy_to_bytes(8) == SEGMENT_MAGIC[..];
        if !magic_fits || input.get_u32_le() != crc32c::crc32c(&used[12..]) {
            return SegmentStart::Unreadable;
        }
        let version = input.get_u16_le();
        if !(LOG_VERSION_MIN..=LOG_VERSION).contains(&version) {
            return SegmentStart::Version(version);
        }
        let group = GroupId(input.get_u16_le());
        let mut cell = [0; 16];
        input.copy_to_slice(&mut cell);
        let sequence = input.get_u64_le();
        let reset = input.get_u32_le() & FLAG_RESET != 0;
        input.advance(4);
        let base = take_id(&mut input);
        let evidence = take_id(&mut input);
        let doubt = take_id(&mut input);
        SegmentStart::Header(SegmentHeader {
            group,
            cell,
            sequence,
            reset,
            base,
            evidence: (evidence.slot > Slot(0)).then_some(evidence),
            doubt: (doubt.slot > Slot(0)).then_some(doubt),
        })
    }
}

fn put_id(out: &mut Vec<u8>, id: EntryId) {
    out.put_u64_le(id.slot.0);
    out.put_u64_le(id.ballot.number);
    out.put_u8(id.ballot.server.0);
    out.put_bytes(0, 7);
}

/// The caller has checked the length.
fn take_id(input: &mut &[u8]) -> EntryId {
    let slot = Slot(input.get_u64_le());
    let ballot = take_ballot(input);
    EntryId { ballot, slot }
}

fn take_ballot(input: &mut &[u8]) -> Ballot {
    let number = input.get_u64_le();
    let server = ServerId(input.get_u8());
    input.advance(7);
    Ballot { number, server }
}

/// Where a record stands and what every record says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    /// Seeds the checksum, so that a record that a guest has written into its volume is none.
    pub(super) cell: [u8; 16],
    /// Of the segment.
    pub(super) sequence: u64,
    /// In the segment.
    pub(super) offset: u64,
}

impl Place {
    fn checksum(&self, used: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.cell), &used[12..])
    }
}

/// The fixed part of a record.
///
/// | at  | bytes | field                                                               |
/// |-----|-------|---------------------------------------------------------------------|
/// | 0   | 8     | magic `PSSLREC1`                                                    |
/// | 8   | 4     | CRC32C of the cell id and then of bytes 12..96 + entry header bytes |
/// | 12  | 4     | kind: 1 entry, 2 marker                                             |
/// | 16  | 8     | sequence of the segment                                             |
/// | 24  | 8     | offset of this record in the segment                                |
/// | 32  | 8     | slot; of a marker: the last slot before it                          |
/// | 40  | 8     | `durable_before`: highest slot that was synced when this was written |
/// | 48  | 8     | hint: known chosen                                                  |
/// | 56  | 4     | bytes of the entry's header                                         |
/// | 60  | 4     | bytes of the header area, a multiple of 4096                        |
/// | 64  | 8     | offset of the payload in the segment                                |
/// | 72  | 8     | bytes of the payload, a multiple of 4096                            |
/// | 80  | 16    | ballot of the entry in that slot: number u64, server u8, 7 zeros    |
/// | 96  |       | the entry's header, then zeros to the end of the header area        |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct RecordHeader {
    pub(super) is_entry: bool,
    /// Of the entry; of a marker: of the entry before it.
    pub(super) id: EntryId,
    pub(super) durable_before: Slot,
    pub(super) chosen: Slot,
    entry_bytes: u32,
    /// Bytes of the header area.
    pub(super) area_bytes: u32,
    /// Bytes of payload.
    pub(super) payload_bytes: u64,
}

impl RecordHeader {
    /// Bytes of the whole record.
    pub(super) fn record_bytes(&self) -> u64 {
        u64::from(self.area_bytes) + self.payload_bytes
    }

    /// Reads the fixed part. The checksum is not verified: that needs the whole header area.
    pub(super) fn decode(bytes: &[u8], place: &Place) -> Option<RecordHeader> {
        let mut input = bytes.get(..FIXED_BYTES)?;
        if !input.starts_with(RECORD_MAGIC) {
            return None;
        }
        input.advance(12);
        let kind = input.get_u32_le();
        let sequence = input.get_u64_le();
        let offset = input.get_u64_le();
        let slot = Slot(input.get_u64_le());
        let durable_before = Slot(input.get_u64_le());
        let chosen = Slot(input.get_u64_le());
        let entry_bytes = input.get_u32_le();
        let area_bytes = input.get_u32_le();
        let payload_at = input.get_u64_le();
        let payload_bytes = input.get_u64_le();
        let ballot = take_ballot(&mut input);
        let fits = matches!(kind, KIND_ENTRY | KIND_MARKER)
            && sequence == place.sequence
            && offset == place.offset
            && entry_bytes as usize <= ENTRY_HEADER_MAX
            && area_bytes as usize == area_bytes_for(entry_bytes as usize)
            && payload_at == offset + u64::from(area_bytes)
            && payload_bytes <= ENTRY_PAYLOAD_MAX as u64
            && payload_bytes.is_multiple_of(ALIGN_BYTES as u64);
        fits.then_some(RecordHeader {
            is_entry: kind == KIND_ENTRY,
            id: EntryId { ballot, slot },
            durable_before,
            chosen,
            entry_bytes,
            area_bytes,
            payload_bytes,
        })
    }

    /// Verifies the checksum over the header area; gives the entry's header.
    pub(super) fn verify<'a>(&self, area: &'a [u8], place: &Place) -> Option<&'a [u8]> {
        let used = area.get(..FIXED_BYTES + self.entry_bytes as usize)?;
        let stored = u32::from_le_bytes(used[8..12].try_into().ok()?);
        (stored == place.checksum(used)).then_some(&used[FIXED_BYTES..])
    }
}

fn area_bytes_for(entry_bytes: usize) -> usize {
    (FIXED_BYTES + entry_bytes).next_multiple_of(ALIGN_BYTES)
}

/// Encodes the header area of an entry's record, or of a marker, at the end of `out`. Returns its
/// length, or `None` if the entry's header or payload is too large.
pub(super) fn encode_area(
    out: &mut Vec<u8>,
    place: &Place,
    entry: Option<&Entry>,
    id: EntryId,
    durable_before: Slot,
    chosen: Slot,
) -> Option<usize> {
    let start = out.len();
    out.put_slice(RECORD_MAGIC);
    out.put_bytes(0, FIXED_BYTES - 8);
    let mut payload_bytes = 0;
    if let Some(entry) = entry {
        entry.encode_header(out);
        payload_bytes = entry.payload_bytes();
    }
    let entry_bytes = out.len() - start - FIXED_BYTES;
    if entry_bytes > ENTRY_HEADER_MAX || payload_bytes > ENTRY_PAYLOAD_MAX {
        out.truncate(start);
        return None;
    }
    let area_bytes = area_bytes_for(entry_bytes);
    let kind = if entry.is_some() {
        KIND_ENTRY
    } else {
        KIND_MARKER
    };
    let mut fixed = &mut out[start + 12..start + FIXED_BYTES];
    fixed.put_u32_le(kind);
    fixed.put_u64_le(place.sequence);
    fixed.put_u64_le(place.offset);
    fixed.put_u64_le(id.slot.0);
    fixed.put_u64_le(durable_before.0);
    fixed.put_u64_le(chosen.0);
    fixed.put_u32_le(entry_bytes as u32);
    fixed.put_u32_le(area_bytes as u32);
    fixed.put_u64_le(place.offset + area_bytes as u64);
    fixed.put_u64_le(payload_bytes as u64);
    fixed.put_u64_le(id.ballot.number);
    fixed.put_u8(id.ballot.server.0);
    let crc = place.checksum(&out[start..]);
    out[start + 8..start + 12].copy_from_slice(&crc.to_le_bytes());
    out.resize(start + area_bytes, 0);
    Some(area_bytes)
}

/// Reads the entry of a record from its verified header and its payload, and verifies that; `None` if the payload is
/// damaged.
///
/// # Errors
/// What this version does not know: the header is as it was written, so this is no damage.
pub(super) fn decode_entry(
    header: &RecordHeader,
    entry: &[u8],
    payload: Bytes,
) -> Result<Option<Entry>, EntryError> {
    let entry = Entry::decode(entry, payload)?;
    Ok((entry.id == header.id && entry.verify().is_ok()).then_some(entry))
}

/// The ballot of the entry before, from the start of an entry's header.
pub(super) fn peek_prev(entry: &[u8]) -> Option<Ballot> {
    let mut input = entry.get(17..26)?;
    let number = input.get_u64_le();
    let server = ServerId(input.get_u8());
    Some(Ballot { number, server })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Command, Op};

    const PLACE: Place = Place {
        cell: [7; 16],
        sequence: 3,
        offset: 8192,
    };

    fn entry() -> Entry {
        Entry {
            id: EntryId {
                ballot: Ballot {
                    number: 2,
                    server: ServerId(1),
                },
                slot: Slot(5),
            },
            prev: Ballot {
                number: 1,
                server: ServerId(0),
            },
            commands: vec![Command::internal(Op::Noop)].into(),
        }
    }

    #[test]
    fn record_golden_bytes() {
        let mut out = Vec::new();
        let bytes = encode_area(
            &mut out,
            &PLACE,
            Some(&entry()),
            entry().id,
            Slot(4),
            Slot(3),
        );
        assert_eq!(bytes, Some(4096));
        assert_eq!(out.len(), 4096);
        let hex: String = out[..160]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, RECORD_GOLDEN);
        assert!(out[160..].iter().all(|byte| *byte == 0));
    }

    const RECORD_GOLDEN: &str = "\
        5053534c5245433103f2f4d001000000030000000000000000200000000000000500000000000000\
        04000000000000000300000000000000370000000010000000300000000000000000000000000000\
        02000000000000000100000000000000050000000000000002000000000000000101000000000000\
        00000100000000000000000000000000000000000000000000000000000000000000000000000000";

    #[test]
    fn segment_header_golden_bytes() {
        let header = SegmentHeader {
            group: GroupId(0),
            cell: [7; 16],
            sequence: 3,
            reset: true,
            base: entry().id,
            evidence: Some(entry().id),
            doubt: Some(EntryId {
                slot: Slot(6),
                ..entry().id
            }),
        };
        let out = header.encode();
        assert_eq!(out.len(), 4096);
        let hex: String = out[..120]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, SEGMENT_GOLDEN);
        assert!(out[120..].iter().all(|byte| *byte == 0));
        match SegmentHeader::decode(&out) {
            SegmentStart::Header(back) => assert_eq!(back, header),
            _ => panic!("not read back"),
        }
        let mut first = out;
        first[8..14].copy_from_slice(&SEGMENT_GOLDEN_1);
        match SegmentHeader::decode(&first) {
            SegmentStart::Header(back) => assert_eq!(back, header),
            _ => panic!("version 1 is read no more"),
        }
    }

    /// Checksum and version of the same header in version 1, the rest is equal.
    const SEGMENT_GOLDEN_1: [u8; 6] = [0xcb, 0x2d, 0x9e, 0x77, 1, 0];

    const SEGMENT_GOLDEN: &str = "\
        5053534c5345473111ba224c02000000070707070707070707070707070707070300000000000000\
        01000000000000000500000000000000020000000000000001000000000000000500000000000000\
        02000000000000000100000000000000060000000000000002000000000000000100000000000000";

    #[test]
    fn record_round_trip() {
        let mut out = Vec::new();
        encode_area(
            &mut out,
            &PLACE,
            Some(&entry()),
            entry().id,
            Slot(4),
            Slot(3),
        )
        .unwrap();
        let header = RecordHeader::decode(&out, &PLACE).unwrap();
        assert_eq!(
            (header.id, header.durable_before, header.chosen),
            (entry().id, Slot(4), Slot(3))
        );
        let bytes = header.verify(&out, &PLACE).unwrap();
        assert_eq!(peek_prev(bytes), Some(entry().prev));
        let back = decode_entry(&header, bytes, Bytes::new());
        assert_eq!(back, Ok(Some(entry())));
    }

    #[test]
    fn record_in_another_place_is_none() {
        let mut out = Vec::new();
        encode_area(&mut out, &PLACE, None, entry().id, Slot(5), Slot(3)).unwrap();
        let elsewhere = [
            Place {
                sequence: 4,
                ..PLACE
            },
            Place {
                offset: 4096,
                ..PLACE
            },
        ];
        for place in &elsewhere {
            assert_eq!(RecordHeader::decode(&out, place), None);
        }
        let other_cell = Place {
            cell: [8; 16],
            ..PLACE
        };
        let header = RecordHeader::decode(&out, &other_cell).unwrap();
        assert_eq!(header.verify(&out, &other_cell), None);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut out = Vec::new();
        encode_area(
            &mut out,
            &PLACE,
            Some(&entry()),
            entry().id,
            Slot(4),
            Slot(3),
        )
        .unwrap();
        for bit in 0..151 * 8 {
            let mut bad = out.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let found = RecordHeader::decode(&bad, &PLACE)
                .and_then(|header| header.verify(&bad, &PLACE).map(|_| ()));
            assert_eq!(found, None, "bit {bit}");
        }
    }
}
