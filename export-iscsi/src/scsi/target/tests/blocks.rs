//! Reading, writing, comparing, unmapping (SBC-3).

use super::*;

// SBC-3 §5.8 to §5.11, §5.32 to §5.35.
#[test]
fn what_each_write_wrote_each_read_reads() {
    let mut rig = Rig::new();
    let writes = [
        vec![0x0a, 0, 0, 8, 4, 0],
        cdb10(0x2a, 0x18, 8, 4),
        cdb12(0xaa, 0x08, 8, 4),
        cdb16(0x8a, 0x10, 8, 4),
        cdb10(0x2e, 0, 8, 4),
        cdb12(0xae, 2, 8, 4),
        cdb16(0x8e, 2, 8, 4),
    ];
    let reads = [
        vec![0x08, 0, 0, 8, 4, 0],
        cdb10(0x28, 0x18, 8, 4),
        cdb12(0xa8, 0x08, 8, 4),
        cdb16(0x88, 0x10, 8, 4),
    ];
    for (seed, write) in (1..).zip(&writes) {
        let data = pattern(4, seed);
        rig.good(1, write, &data);
        for read in &reads {
            assert_eq!(rig.good(1, read, &[]), data, "{write:x?} {read:x?}");
        }
    }
}

// SBC-3 §4.5: the last block exists, the one behind it does not.
#[test]
fn ranges_end_at_the_capacity() {
    let mut rig = Rig::new();
    let blocks = 8 * MIB as u32 / 512;
    let data = pattern(2, 0);
    for opcode in [0x28u8, 0x2a, 0x2e, 0x2f, 0x34, 0x35] {
        let out: &[u8] = if matches!(opcode, 0x2a | 0x2e) {
            &data
        } else {
            &[]
        };
        rig.good(1, &cdb10(opcode, 0, blocks - 2, 2), out);
        assert_eq!(
            rig.sense(1, &cdb10(opcode, 0, blocks - 1, 2), out),
            OUT_OF_RANGE
        );
        assert_eq!(
            rig.sense(1, &cdb10(opcode, 0, u32::MAX, 2), out),
            OUT_OF_RANGE
        );
    }
    for opcode in [0x88u8, 0x8a, 0x8b, 0x8e, 0x8f, 0x90, 0x91] {
        let out: &[u8] = if matches!(opcode, 0x8a | 0x8b | 0x8e) {
            &data
        } else {
            &[]
        };
        rig.good(1, &cdb16(opcode, 0, u64::from(blocks) - 2, 2), out);
        for lba in [u64::from(blocks) - 1, 1 << 63, u64::MAX] {
            assert_eq!(rig.sense(1, &cdb16(opcode, 0, lba, 2), out), OUT_OF_RANGE);
        }
    }
}

#[test]
fn zero_blocks_are_good_up_to_the_end_only() {
    let mut rig = Rig::new();
    let blocks = 8 * MIB as u32 / 512;
    for opcode in [0x28u8, 0x2a, 0x2e, 0x2f, 0x34, 0x35] {
        rig.good(1, &cdb10(opcode, 0, 0, 0), &[]);
        rig.good(1, &cdb10(opcode, 0, blocks, 0), &[]);
        assert_eq!(
            rig.sense(1, &cdb10(opcode, 0, blocks + 1, 0), &[]),
            OUT_OF_RANGE
        );
    }
    for opcode in [0x89u8, 0x8b, 0x9c] {
        rig.good(1, &cdb16(opcode, 0, 0, 0), &[]);
        assert_eq!(
            rig.sense(1, &cdb16(opcode, 0, u64::MAX, 0), &[]),
            OUT_OF_RANGE
        );
    }
}

// SBC-3 table 48: there is no protection information.
#[test]
fn protection_fields_are_refused() {
    let mut rig = Rig::new();
    for protect in 1..8u8 {
        for opcode in [0x28u8, 0x2a, 0x2e, 0x2f, 0x41] {
            let cdb = cdb10(opcode, protect << 5, 0, 1);
            assert_eq!(rig.sense(1, &cdb, &[0; 512]), INVALID_CDB);
        }
        for opcode in [0x88u8, 0x89, 0x8a, 0x8b, 0x8e, 0x8f, 0x93, 0x9c] {
            let cdb = cdb16(opcode, protect << 5, 0, 1);
            let outcome = rig.run(A, 1, &cdb, &[0; 1024]);
            assert_eq!(sense_of(&outcome), INVALID_CDB);
            // SPC-4 §4.5.2.4.2: it points at bit 7 of byte 1.
            assert_eq!(outcome.sense[15..18], [0xcf, 0, 1]);
        }
    }
}

#[test]
fn transfers_longer_than_the_limit_are_refused() {
    let mut rig = Rig::with(LunSettings {
        physical_block_bytes: 512,
        ..LunSettings::default()
    });
    let longer = info(1, 64 * MIB);
    rig.volumes.insert(1, Memory::new(64 * MIB));
    rig.target
        .device_changed(1, longer, Fate::Alive, &mut Actions::default());
    rig.clear_attentions();
    assert_eq!(
        rig.good(1, &cdb16(0x88, 0, 0, 65536), &[]).len() as u64,
        32 * MIB
    );
    let outcome = rig.run(A, 1, &cdb16(0x88, 0, 0, 65537), &[]);
    assert_eq!(sense_of(&outcome), INVALID_CDB);
    assert_eq!(outcome.sense[15..18], [0xc0, 0, 10]);
}

// RFC 7143 §11.4.5: whole blocks of what came are written, the rest is told as residual.
#[test]
fn write_with_less_data_than_blocks() {
    let mut rig = Rig::new();
    rig.good(1, &cdb10(0x2a, 0, 0, 2), &[b'a'; 1024]);
    let outcome = rig.run(A, 1, &cdb10(0x2a, 0, 0, 2), &[b'b'; 512]);
    assert_eq!((outcome.status, outcome.out_bytes), (Status::Good, 1024));
    let outcome = rig.run(A, 1, &cdb10(0x2a, 0, 1, 1), &[b'c'; 200]);
    assert_eq!((outcome.status, outcome.out_bytes), (Status::Good, 512));
    let read = rig.good(1, &cdb10(0x28, 0, 0, 2), &[]);
    assert_eq!(read[..512], [b'b'; 512]);
    assert_eq!(read[512..], [b'a'; 512]);
}

#[test]
fn write_with_more_data_than_blocks() {
    let mut rig = Rig::new();
    let outcome = rig.run(A, 1, &cdb10(0x2a, 0, 0, 1), &[b'b'; 1024]);
    assert_eq!((outcome.status, outcome.out_bytes), (Status::Good, 512));
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 1, 1), &[]), [0; 512]);
}

// SBC-3 §5.29: BYTCHK 00b reads, 01b compares, 10b is reserved, 11b compares every block with one.
#[test]
fn verify_compares() {
    let mut rig = Rig::new();
    let data = pattern(8, 3);
    rig.good(1, &cdb10(0x2a, 0, 0, 8), &data);
    for (cdb, none) in [
        (cdb10(0x2f, 2, 0, 8), cdb10(0x2f, 0, 0, 8)),
        (cdb12(0xaf, 2, 0, 8), cdb12(0xaf, 0, 0, 8)),
        (cdb16(0x8f, 2, 0, 8), cdb16(0x8f, 0, 0, 8)),
    ] {
        rig.good(1, &cdb, &data);
        let mut other = data.clone();
        other[1000] ^= 1;
        let outcome = rig.run(A, 1, &cdb, &other);
        assert_eq!(sense_of(&outcome), (0x0e, 0x1d00));
        assert_eq!(outcome.sense[3..7], 1000u32.to_be_bytes());
        assert_eq!(rig.run(A, 1, &none, &other).status, Status::Good);
    }
    assert_eq!(rig.sense(1, &cdb10(0x2f, 4, 0, 8), &data), INVALID_CDB);
    rig.good(1, &cdb10(0x41, 0, 0, 8), &[9; 512]);
    rig.good(1, &cdb10(0x2f, 6, 0, 8), &[9; 512]);
    rig.good(1, &cdb10(0x2a, 0, 7, 1), &[8; 512]);
    let outcome = rig.run(A, 1, &cdb10(0x2f, 6, 0, 8), &[9; 512]);
    assert_eq!(sense_of(&outcome), (0x0e, 0x1d00));
    assert_eq!(outcome.sense[3..7], (7 * 512u32).to_be_bytes());
}

#[test]
fn verify_of_several_steps_compares_all_of_them() {
    let mut rig = Rig::new();
    let mut data = pattern(6000, 1);
    rig.good(1, &cdb10(0x2a, 0, 3, 6000), &data);
    rig.good(1, &cdb10(0x2f, 2, 3, 6000), &data);
    let last = data.len() - 1;
    data[last] ^= 0x80;
    let outcome = rig.run(A, 1, &cdb10(0x2f, 2, 3, 6000), &data);
    assert_eq!(outcome.sense[3..7], (last as u32).to_be_bytes());
}

// SBC-3 §5.2.
#[test]
fn compare_and_write() {
    let mut rig = Rig::new();
    let (old, new) = (pattern(2, 1), pattern(2, 2));
    rig.good(1, &cdb10(0x2a, 0, 5, 2), &old);
    let mut cdb = cdb16(0x89, 0, 5, 0);
    cdb[13] = 2;
    let data = [&old[..], &new[..]].concat();
    let outcome = rig.run(A, 1, &cdb, &data);
    assert_eq!((outcome.status, outcome.out_bytes), (Status::Good, 2048));
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 5, 2), &[]), new);
    let outcome = rig.run(A, 1, &cdb, &data);
    assert_eq!(sense_of(&outcome), (0x0e, 0x1d00));
    assert_eq!(outcome.sense[3..7], 0u32.to_be_bytes());
    for length in [512, 1024, 4096] {
        assert_eq!(rig.sense(1, &cdb, &vec![0; length]), INVALID_CDB);
    }
}

// SBC-3 §5.10.
#[test]
fn or_write_merges() {
    let mut rig = Rig::new();
    let (a, b) = (pattern(1100, 1), pattern(1100, 0x55));
    rig.good(1, &cdb10(0x2a, 0, 1, 1100), &a);
    rig.good(1, &cdb16(0x8b, 0, 1, 1100), &b);
    let expected: Vec<u8> = a.iter().zip(&b).map(|(a, b)| a | b).collect();
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 1, 1100), &[]), expected);
}

// SBC-4 §5.48.
#[test]
fn write_atomic_is_one_request() {
    let mut rig = Rig::new();
    let mut cdb = cdb16(0x9c, 0, 1, 0);
    cdb[12..14].copy_from_slice(&2040u16.to_be_bytes());
    rig.holds = true;
    let tag = rig.send(A, 1, &cdb, &pattern(2040, 0));
    assert_eq!(rig.held.len(), 1);
    rig.holds = false;
    rig.release_held();
    assert_eq!(rig.ended(tag).unwrap().status, Status::Good);
    cdb[12..14].copy_from_slice(&2041u16.to_be_bytes());
    assert_eq!(rig.sense(1, &cdb, &pattern(2041, 0)), INVALID_CDB);
    cdb[12..14].copy_from_slice(&8u16.to_be_bytes());
    assert_eq!(rig.sense(1, &cdb, &pattern(4, 0)), INVALID_CDB);
    cdb[11] = 4;
    assert_eq!(rig.sense(1, &cdb, &pattern(8, 0)), INVALID_CDB);
}

// SBC-3 §5.41, table 108.
#[test]
fn write_same_fields() {
    let mut rig = Rig::new();
    rig.good(1, &cdb10(0x2a, 0, 0, 64), &pattern(64, 0));
    rig.good(1, &cdb10(0x41, 8, 2, 3), &[7; 512]);
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 2, 3), &[]), [0; 1536]);
    rig.good(1, &cdb10(0x41, 0, 2, 3), &[7; 512]);
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 2, 3), &[]), [7; 1536]);
    // NDOB of the long form; in the short form the bit is obsolete and there must be data.
    rig.good(1, &cdb16(0x93, 1, 3, 1), &[]);
    assert_eq!(rig.good(1, &cdb10(0x28, 0, 3, 1), &[]), [0; 512]);
    assert_eq!(rig.sense(1, &cdb10(0x41, 0, 3, 1), &[]), INVALID_CDB);
    // ANCHOR with and without UNMAP.
    for flags in [0x10, 0x18] {
        assert_eq!(
            rig.sense(1, &cdb10(0x41, flags, 0, 1), &[0; 512]),
            INVALID_CDB
        );
        assert_eq!(
            rig.sense(1, &cdb16(0x93, flags, 0, 1), &[0; 512]),
            INVALID_CDB
        );
    }
    // Data that is not one block.
    for length in [256, 1024] {
        assert_eq!(
            rig.sense(1, &cdb16(0x93, 8, 0, 1), &vec![0; length]),
            INVALID_CDB
        );
    }
    // 0 blocks: to the end (WSNZ 0).
    rig.good(1, &cdb16(0x93, 8, 16, 0), &[0; 512]);
    assert!(
        rig.volumes[&1].bytes[16 * 512..]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(rig.volumes[&1].allocated[..2].iter().all(|it| *it));
    assert!(!rig.volumes[&1].allocated[2]);
    let beyond = 8 * MIB / 512 + 1;
    assert_eq!(
        rig.sense(1, &cdb16(0x93, 0, beyond, 0), &[0; 512]),
        OUT_OF_RANGE
    );
}

#[test]
fn write_same_of_a_long_range() {
    let mut rig = Rig::new();
    rig.good(1, &cdb16(0x93, 0, 1, 16383), &[3; 512]);
    assert!(rig.volumes[&1].bytes[512..].iter().all(|byte| *byte == 3));
    assert_eq!(rig.volumes[&1].bytes[..512], [0; 512]);
}

fn unmap(descriptors: &[(u64, u32)]) -> (Vec<u8>, Vec<u8>) {
    let mut list = vec![0; 8];
    for (lba, blocks) in descriptors {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    let length = list.len() as u16;
    list[..2].copy_from_slice(&(length - 2).to_be_bytes());
    list[2..4].copy_from_slice(&(length - 8).to_be_bytes());
    let mut cdb = vec![0x42, 0, 0, 0, 0, 0, 0];
    cdb.extend(length.to_be_bytes());
    cdb.push(0);
    (cdb, list)
}

// SBC-3 §5.28; LBPRZ: what is unmapped reads as zeros.
#[test]
fn unmap_zeroes_whatever_its_alignment() {
    let mut rig = Rig::new();
    rig.good(1, &cdb10(0x2a, 0, 0, 64), &[0xff; 64 * 512]);
    let (cdb, list) = unmap(&[(3, 20), (40, 1), (50, 0)]);
    rig.good(1, &cdb, &list);
    let read = rig.good(1, &cdb10(0x28, 0, 0, 64), &[]);
    for (block, data) in read.chunks(512).enumerate() {
        let gone = (3..23).contains(&block) || block == 40;
        assert_eq!(data[0], if gone { 0 } else { 0xff }, "{block}");
    }
    assert!(!rig.volumes[&1].allocated[1]);
}

#[test]
fn unmap_limits() {
    let mut rig = Rig::new();
    let blocks = 8 * MIB / 512;
    // 0 blocks at the end are within the medium.
    let (cdb, list) = unmap(&[(blocks, 0)]);
    rig.good(1, &cdb, &list);
    let (cdb, list) = unmap(&[(blocks, 1)]);
    assert_eq!(rig.sense(1, &cdb, &list), OUT_OF_RANGE);
    let (cdb, list) = unmap(&[(u64::MAX, 2)]);
    assert_eq!(rig.sense(1, &cdb, &list), OUT_OF_RANGE);
    let (cdb, list) = unmap(&vec![(0, 1); 257]);
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2600));
    let (mut cdb, list) = unmap(&[(0, 1)]);
    assert_eq!(rig.sense(1, &cdb, &list[..10]), (5, 0x1a00));
    cdb[1] = 1;
    assert_eq!(rig.sense(1, &cdb, &list), INVALID_CDB);
    cdb[1] = 0;
    cdb[8] = 7;
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x1a00));
    cdb[8] = 0;
    rig.good(1, &cdb, &[]);
}

#[test]
fn thick_disks_know_no_unmap() {
    let mut rig = Rig::with(LunSettings {
        thin: false,
        ..LunSettings::default()
    });
    let (cdb, list) = unmap(&[(0, 1)]);
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2000));
    assert_eq!(rig.sense(1, &cdb10(0x41, 8, 0, 1), &[0; 512]), INVALID_CDB);
    let capacity = rig.good(
        1,
        &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
        &[],
    );
    assert_eq!(capacity[14], 0);
}

fn lba_status(lba: u64, allocation: u32) -> Vec<u8> {
    let mut cdb = cdb16(0x9e, 0x12, lba, 0);
    cdb[10..14].copy_from_slice(&allocation.to_be_bytes());
    cdb
}

// SBC-3 §5.4.
#[test]
fn lba_status_tells_what_is_mapped() {
    let mut rig = Rig::new();
    rig.good(1, &cdb10(0x2a, 0, 16, 8), &pattern(8, 0));
    let data = rig.good(1, &lba_status(4, 256), &[]);
    let descriptors: Vec<(u64, u32, u8)> = data[8..]
        .chunks(16)
        .map(|it| {
            let lba = u64::from_be_bytes(it[..8].try_into().unwrap());
            let blocks = u32::from_be_bytes(it[8..12].try_into().unwrap());
            (lba, blocks, it[12])
        })
        .collect();
    let end = (8 * MIB / 512) as u32;
    assert_eq!(descriptors, [(4, 12, 1), (16, 8, 0), (24, end - 24, 1)]);
    assert_eq!(data[..4], (data.len() as u32 - 4).to_be_bytes());
    assert_eq!(rig.good(1, &lba_status(4, 24), &[]).len(), 24);
    let beyond = u64::from(end);
    assert_eq!(rig.sense(1, &lba_status(beyond, 24), &[]), OUT_OF_RANGE);
}

#[test]
fn blocks_of_4096_bytes() {
    let mut rig = Rig::with(LunSettings {
        block_bytes: 4096,
        ..LunSettings::default()
    });
    let capacity = rig.good(1, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    assert_eq!(capacity[..4], 2047u32.to_be_bytes());
    assert_eq!(capacity[4..], 4096u32.to_be_bytes());
    rig.good(1, &cdb10(0x2a, 0, 2047, 1), &[5; 4096]);
    assert_eq!(
        rig.sense(1, &cdb10(0x2a, 0, 2048, 1), &[5; 4096]),
        OUT_OF_RANGE
    );
    let (cdb, list) = unmap(&[(2047, 1)]);
    rig.good(1, &cdb, &list);
    let data = rig.good(1, &lba_status(2047, 24), &[]);
    assert_eq!(data[20], 1);
}

#[test]
fn capacity_of_both_lengths() {
    let mut rig = Rig::new();
    let mut cdb = vec![0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    let data = rig.good(1, &cdb, &[]);
    assert_eq!(data[..8], (8 * MIB / 512 - 1).to_be_bytes());
    assert_eq!(data[8..16], [0, 0, 2, 0, 0, 3, 0xc0, 0]);
    cdb[13] = 12;
    assert_eq!(rig.good(1, &cdb, &[]).len(), 12);
    // SBC-3 §5.15: without PMI the LBA must be 0.
    assert_eq!(
        rig.sense(1, &[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[]),
        INVALID_CDB
    );
    rig.good(1, &[0x25, 0, 0, 0, 0, 1, 0, 0, 1, 0], &[]);
}

#[test]
fn read_only_disks_refuse_every_change() {
    let mut rig = Rig::with(LunSettings {
        read_only: true,
        ..LunSettings::default()
    });
    let protected = (7, 0x2700);
    for opcode in [0x2au8, 0x2e, 0x41] {
        assert_eq!(rig.sense(1, &cdb10(opcode, 0, 0, 1), &[0; 512]), protected);
    }
    for opcode in [0x89u8, 0x8a, 0x8b, 0x8e, 0x93, 0x9c] {
        assert_eq!(rig.sense(1, &cdb16(opcode, 0, 0, 1), &[0; 512]), protected);
    }
    let (cdb, list) = unmap(&[(0, 8)]);
    assert_eq!(rig.sense(1, &cdb, &list), protected);
    rig.good(1, &cdb10(0x28, 0, 0, 1), &[]);
    rig.good(1, &cdb10(0x35, 0, 0, 0), &[]);
    let mode = rig.good(1, &[0x1a, 0, 0x3f, 0, 255, 0], &[]);
    assert_eq!(mode[2] & 0x80, 0x80);
}

#[test]
fn failures_of_the_device_become_sense_data() {
    let mut rig = Rig::new();
    let cases = [
        (DeviceError::NoSpace, (7, 0x2707), (7, 0x2707)),
        (DeviceError::Io, (3, 0x1100), (3, 0x0c00)),
        (DeviceError::ReadOnly, (7, 0x2700), (7, 0x2700)),
        (DeviceError::Deleted, (5, 0x2500), (5, 0x2500)),
        (DeviceError::Fenced, (2, 0x040a), (2, 0x040a)),
    ];
    for (error, read, write) in cases {
        rig.volumes.get_mut(&1).unwrap().broken = Some(error);
        assert_eq!(rig.sense(1, &cdb10(0x28, 0, 0, 1), &[]), read);
        assert_eq!(rig.sense(1, &cdb10(0x2a, 0, 0, 1), &[0; 512]), write);
    }
}

// SPC-4 §6.4: block to block within the target.
#[test]
fn extended_copy_between_disks() {
    let mut rig = Rig::of(vec![LunSettings::default(), LunSettings::default()]);
    rig.clear_attentions();
    let data = pattern(3000, 9);
    rig.good(1, &cdb10(0x2a, 0, 10, 3000), &data);
    let (cdb, list) = extended_copy(&rig, &[1, 2], &[(0, 1, 3000, 10, 77)]);
    rig.good(1, &cdb, &list);
    assert_eq!(rig.good(2, &cdb10(0x28, 0, 77, 3000), &[]), data);
    // COPY STATUS of list identifier 1: completed; of another: unknown.
    let mut status = vec![0x84, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let result = rig.good(1, &status, &[]);
    assert_eq!(result[4..7], [1, 0, 1]);
    status[2] = 9;
    assert_eq!(rig.sense(1, &status, &[]), INVALID_CDB);
}

fn extended_copy(
    rig: &Rig,
    luns: &[u16],
    segments: &[(u16, u16, u16, u64, u64)],
) -> (Vec<u8>, Vec<u8>) {
    let mut list = vec![0; 16];
    list[0] = 1;
    list[2..4].copy_from_slice(&(32 * luns.len() as u16).to_be_bytes());
    list[8..12].copy_from_slice(&(28 * segments.len() as u32).to_be_bytes());
    for lun in luns {
        let disk = rig.target.units[lun].disk.as_ref().unwrap();
        let naa = super::super::super::inquiry::naa(&disk.info.uuid);
        let mut target = vec![0xe4, 0, 0, 0, 1, 3, 0, 8];
        target.extend(naa);
        target.resize(32, 0);
        target[30..32].copy_from_slice(&512u16.to_be_bytes());
        list.extend(target);
    }
    for (from, to, blocks, source, destination) in segments {
        list.extend([2, 0, 0, 0x18]);
        list.extend(from.to_be_bytes());
        list.extend(to.to_be_bytes());
        list.extend([0, 0]);
        list.extend(blocks.to_be_bytes());
        list.extend(source.to_be_bytes());
        list.extend(destination.to_be_bytes());
    }
    let mut cdb = vec![0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    cdb.extend((list.len() as u32).to_be_bytes());
    cdb.extend([0, 0]);
    (cdb, list)
}

#[test]
fn extended_copy_limits_and_failures() {
    let mut rig = Rig::new();
    let segment = (0, 0, 8, 0, 100);
    let (cdb, mut list) = extended_copy(&rig, &[1], &[segment]);
    rig.good(1, &cdb, &list);
    // NUL, LU ID TYPE (which is ignored), wrong descriptor codes.
    list[17] = 0x20;
    assert_eq!(rig.sense(1, &cdb, &list), (0x0a, 0x0d02));
    list[17] = 0xc0;
    rig.good(1, &cdb, &list);
    list[17] = 0;
    list[16] = 0xe0;
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2607));
    list[16] = 0xe4;
    list[48] = 0x03;
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2609));
    // A list that is cut short anywhere.
    for length in 1..list.len() {
        let mut cdb = cdb.clone();
        cdb[10..14].copy_from_slice(&(length as u32).to_be_bytes());
        assert_eq!(rig.sense(1, &cdb, &list).0, 5);
    }
    let (cdb, list) = extended_copy(&rig, &[1, 1, 1], &[segment]);
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2606));
    let (cdb, list) = extended_copy(&rig, &[1], &[segment; 65]);
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x2608));
    let (cdb, list) = extended_copy(&rig, &[1, 1, 1], &[segment; 65]);
    assert_eq!(rig.sense(1, &cdb, &list), (5, 0x1a00));
    let (cdb, list) = extended_copy(&rig, &[1], &[(0, 1, 8, 0, 0)]);
    assert_eq!(rig.sense(1, &cdb, &list), (0x0a, 0x0804));
    let end = 8 * MIB / 512;
    let (cdb, list) = extended_copy(&rig, &[1], &[(0, 0, 8, 0, end - 1)]);
    assert_eq!(rig.sense(1, &cdb, &list).0, 0x0a);
    rig.good(1, &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    let parameters = rig.good(1, &[0x84, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
    assert_eq!(parameters[8..12], [0, 2, 0, 64]);
}

fn sanitize(action: u8, length: u16) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    vec![0x48, action, 0, 0, 0, 0, 0, high, low, 0]
}

// SBC-3 §5.22.
#[test]
fn sanitize_overwrites_and_erases() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    let mut list = vec![2, 0, 2, 0];
    list.extend([0xaa; 512]);
    rig.good(1, &sanitize(1, 516), &list);
    assert!(rig.volumes[&1].bytes.iter().all(|byte| *byte == 0xaa));
    rig.good(1, &sanitize(2, 0), &[]);
    assert!(rig.volumes[&1].bytes.iter().all(|byte| *byte == 0));
    assert!(!rig.volumes[&1].allocated.contains(&true));
    rig.good(1, &sanitize(0x1f, 0), &[]);
    // Parameter lists.
    for length in (0..5).chain([517]) {
        assert_eq!(rig.sense(1, &sanitize(1, length), &[0; 520]), INVALID_CDB);
    }
    for at in [0, 2, 3] {
        let mut wrong = list.clone();
        wrong[at] = if at == 2 { 3 } else { 0 };
        if at == 3 {
            wrong[2] = 0;
        }
        assert_eq!(rig.sense(1, &sanitize(1, 516), &wrong), (5, 0x2600));
    }
    for action in [2, 0x1f] {
        assert_eq!(rig.sense(1, &sanitize(action, 8), &[0; 8]), INVALID_CDB);
    }
    for action in [0, 3, 4] {
        assert_eq!(rig.sense(1, &sanitize(action, 0), &[]), INVALID_CDB);
    }
    // Reserved bits.
    assert_eq!(rig.sense(1, &sanitize(0x42, 0), &[]), INVALID_CDB);
    for at in 2..7 {
        let mut cdb = sanitize(2, 0);
        cdb[at] = at as u8;
        assert_eq!(rig.sense(1, &cdb, &[]), INVALID_CDB);
    }
}

#[test]
fn sanitize_excludes_others_and_outlives_its_task() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    rig.holds = true;
    let tag = rig.send(A, 1, &sanitize(2, 0), &[]);
    let progress = (2, 0x041b);
    assert_eq!(rig.sense(1, &[0; 6], &[]), progress);
    assert_eq!(rig.sense(1, &cdb10(0x28, 0, 0, 1), &[]), progress);
    assert_eq!(rig.sense(1, &[0x1b, 0, 0, 0, 2, 0], &[]), progress);
    rig.good(1, &[0x12, 0, 0, 0, 255, 0], &[]);
    let sense = rig.good(1, &[0x03, 0, 0, 0, 18, 0], &[]);
    assert_eq!((sense[2], sense[12], sense[13]), (2, 0x04, 0x1b));
    let mut actions = Actions::default();
    rig.target.detach(A, &mut actions);
    rig.drive(actions);
    assert_eq!(rig.aborted, [(A, tag)]);
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), progress);
    rig.holds = false;
    rig.release_held();
    assert_eq!(rig.run(B, 1, &[0; 6], &[]).status, Status::Good);
}

fn write_one(rig: &mut Rig, nexus: NexusId) -> u32 {
    rig.send(nexus, 1, &cdb10(0x2a, 0, 0, 1), &[1; 512])
}

/// What an aborted command may still write would bring back what is erased.
#[test]
fn sanitize_is_busy_while_something_is_left_over() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    rig.holds = true;
    write_one(&mut rig, B);
    let mut actions = Actions::default();
    rig.target.detach(B, &mut actions);
    rig.drive(actions);
    rig.holds = false;
    assert_eq!(rig.run(A, 1, &sanitize(2, 0), &[]).status, Status::Busy);
    rig.release_held();
    assert_eq!(rig.volumes[&1].bytes[0], 1);
    rig.good(1, &sanitize(2, 0), &[]);
    assert_eq!(rig.volumes[&1].bytes[0], 0);
}

#[test]
fn a_disk_that_is_added_again_waits_for_the_sanitize_of_before() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    let lun = rig.target.config().luns[0].clone();
    rig.holds = true;
    rig.send(A, 1, &sanitize(2, 0), &[]);
    let mut actions = Actions::default();
    rig.target.remove_lun(1, &mut actions);
    rig.target.add_lun(lun, &mut actions);
    rig.drive(actions);
    rig.holds = false;
    // It has told of the new disk by now.
    rig.clear_attentions();
    let tag = write_one(&mut rig, A);
    assert!(rig.ended(tag).is_none());
    rig.release_held();
    assert_eq!(rig.ended(tag).unwrap().status, Status::Good);
    assert_eq!(rig.volumes[&1].bytes[0], 1);
}

#[test]
fn failed_sanitize_blocks_until_exit_failure_mode() {
    let mut rig = Rig::with(LunSettings {
        sanitize: true,
        ..LunSettings::default()
    });
    rig.volumes.get_mut(&1).unwrap().broken = Some(DeviceError::Io);
    assert_eq!(rig.sense(1, &sanitize(2, 0), &[]).0, 3);
    rig.volumes.get_mut(&1).unwrap().broken = None;
    assert_eq!(rig.sense(1, &cdb10(0x28, 0, 0, 1), &[]), (3, 0x3103));
    rig.good(1, &sanitize(0x1f, 0), &[]);
    rig.good(1, &cdb10(0x28, 0, 0, 1), &[]);
}
