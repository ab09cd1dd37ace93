//! What a unit says about itself: INQUIRY, mode pages, lists of commands (SPC-4).

use super::*;

fn vital(page: u8) -> Vec<u8> {
    vec![0x12, 1, page, 1, 0, 0]
}

// SPC-4 §6.6.2.
#[test]
fn standard_inquiry_of_disk_controller_and_nothing() {
    let mut rig = Rig::new();
    let disk = rig.good(1, &[0x12, 0, 0, 1, 0, 0], &[]);
    assert_eq!(disk[..4], [0, 0, 6, 0x12]);
    assert_eq!(usize::from(disk[4]), disk.len() - 5);
    assert_eq!(&disk[8..32], b"PSS     VIRTUAL-DISK    ");
    let controller = rig.good(0, &[0x12, 0, 0, 1, 0, 0], &[]);
    assert_eq!(controller[0], 0x0c);
    let nothing = rig.good(9, &[0x12, 0, 0, 1, 0, 0], &[]);
    assert_eq!(nothing[0], 0x7f);
    assert_eq!(rig.good(1, &[0x12, 0, 0, 0, 5, 0], &[]).len(), 5);
    assert_eq!(rig.good(1, &[0x12, 0, 0, 0, 0, 0], &[]).len(), 0);
    assert_eq!(rig.sense(1, &[0x12, 0, 1, 1, 0, 0], &[]), INVALID_CDB);
}

#[test]
fn removable_disks_say_so() {
    let mut rig = Rig::with(LunSettings {
        removable: true,
        vendor: String::new(),
        ..LunSettings::default()
    });
    let disk = rig.good(1, &[0x12, 0, 0, 1, 0, 0], &[]);
    assert_eq!(disk[1], 0x80);
    assert_ne!(
        disk[8..16],
        [b' '; 8],
        "an empty vendor breaks the scan of Linux"
    );
}

// SPC-4 §7.8.14: the list is exact and ascending.
#[test]
fn supported_pages_are_exactly_those_that_are_served() {
    let mut rig = Rig::new();
    for (lun, expected) in [
        (1, &[0, 0x80, 0x83, 0x86, 0x87, 0x8f, 0xb0, 0xb1, 0xb2][..]),
        (0, &[0, 0x80, 0x83, 0x86][..]),
    ] {
        let pages = rig.good(lun, &vital(0), &[]);
        assert_eq!(&pages[4..], expected);
        for page in 0..=255 {
            if expected.contains(&page) {
                let data = rig.good(lun, &vital(page), &[]);
                assert_eq!(data[1], page);
                let length = u16::from_be_bytes([data[2], data[3]]);
                assert_eq!(usize::from(length) + 4, data.len());
            } else {
                assert_eq!(rig.sense(lun, &vital(page), &[]), INVALID_CDB);
            }
        }
    }
}

// SPC-4 §7.8.9.
#[test]
fn mode_pages_are_those_of_a_target_port() {
    let mut rig = Rig::new();
    let page = rig.good(1, &vital(0x87), &[]);
    assert_eq!(page, [0, 0x87, 0, 4, 0x3f, 0xff, 1, 0]);
}

const NAA_OF_ZEROS: [u8; 8] = [0x32, 0x20, 0xa8, 0x39, 0x7b, 0x1d, 0xcd, 0xaf];

/// Designators by (association, type).
fn designators(page: &[u8]) -> Vec<((u8, u8), Vec<u8>)> {
    let mut rest = &page[4..];
    let mut out = Vec::new();
    while !rest.is_empty() {
        let length = usize::from(rest[3]);
        let key = (rest[1] >> 4 & 3, rest[1] & 15);
        out.push((key, rest[4..4 + length].to_vec()));
        rest = &rest[4 + length..];
    }
    out
}

// SPC-4 §7.8.6; multipath software takes units with equal designators for one.
#[test]
fn identification_comes_from_the_uuid_alone() {
    let mut rig = Rig::of(vec![LunSettings::default(), LunSettings::default()]);
    rig.clear_attentions();
    let (one, two) = (
        designators(&rig.good(1, &vital(0x83), &[])),
        designators(&rig.good(2, &vital(0x83), &[])),
    );
    for (key, bytes) in &one {
        let other = two.iter().find(|it| it.0 == *key).unwrap();
        assert_eq!(key.0 == 0, other.1 != *bytes, "{key:?}");
    }
    let naa = one.iter().find(|it| it.0 == (0, 3)).unwrap();
    assert_eq!(naa.1.len(), 8);
    assert_eq!(naa.1[0] >> 4, 3);
    let port = one.iter().find(|it| it.0 == (1, 4)).unwrap();
    assert_eq!(port.1, [0, 0, 0, 1]);
    // Another gateway: another target name, the same volume.
    let mut config = rig.target.config().clone();
    config.name = "iqn.2026-01.other:gateway".into();
    let mut other = Target::new(config);
    std::mem::swap(&mut rig.target, &mut other);
    rig.target.attach(A, initiator(1));
    rig.target.attach(B, initiator(2));
    rig.clear_attentions();
    let again = designators(&rig.good(1, &vital(0x83), &[]));
    for (key, bytes) in one.iter().filter(|it| it.0.0 == 0) {
        assert_eq!(again.iter().find(|it| it.0 == *key).unwrap().1, *bytes);
    }
    assert_eq!(rig.good(1, &vital(0x80), &[]).len(), 4 + 32);
}

#[test]
fn every_bit_of_the_uuid_counts_in_the_naa() {
    let naa = super::super::super::inquiry::naa;
    // It never changes.
    assert_eq!(naa(&[0; 16]), NAA_OF_ZEROS);
    let base = [0x5a; 16];
    for bit in 0..128 {
        let mut other = base;
        other[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(naa(&base), naa(&other), "bit {bit}");
    }
}

#[test]
fn tgts_overrides_of_serial_and_identifier() {
    let mut rig = Rig::with(LunSettings {
        serial: Some("beaf11".into()),
        scsi_id: Some("IET     00010001".into()),
        ..LunSettings::default()
    });
    assert_eq!(&rig.good(1, &vital(0x80), &[])[4..], b"beaf11");
    let designators = designators(&rig.good(1, &vital(0x83), &[]));
    let t10 = designators.iter().find(|it| it.0 == (0, 1)).unwrap();
    assert_eq!(t10.1, b"PSS     IET     00010001");
}

// SBC-3 §6.6.4, §6.6.6: what is announced agrees.
#[test]
fn thin_provisioning_is_told_the_same_everywhere() {
    for thin in [true, false] {
        let mut rig = Rig::with(LunSettings {
            thin,
            ..LunSettings::default()
        });
        let limits = rig.good(1, &vital(0xb0), &[]);
        assert_eq!(limits.len(), 64);
        let unmap = u32::from_be_bytes(limits[20..24].try_into().unwrap());
        assert_eq!(unmap > 0, thin);
        assert_eq!(limits[32] & 0x80 != 0, thin);
        let provisioning = rig.good(1, &vital(0xb2), &[]);
        assert_eq!(provisioning[5], if thin { 0xe4 } else { 0 });
        assert_eq!(provisioning[6], if thin { 2 } else { 0 });
        let codes = rig.good(1, &[0xa3, 0x0c, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[]);
        let unmap = codes[4..].chunks(8).any(|it| it[0] == 0x42);
        assert_eq!(unmap, thin);
    }
}

// SPC-4 §6.33.
#[test]
fn report_luns() {
    let mut rig = Rig::of(vec![LunSettings::default(), LunSettings::default()]);
    let cdb = |select, length| vec![0xa0, 0, select, 0, 0, 0, 0, 0, 0, length, 0, 0];
    for lun in [0, 1, 77] {
        let data = rig.good(lun, &cdb(0, 255), &[]);
        assert_eq!(data[..8], [0, 0, 0, 24, 0, 0, 0, 0]);
        assert_eq!(data[8..16], [0; 8]);
        assert_eq!(data[24..], [0, 2, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(rig.good(0, &cdb(1, 16), &[]), [0; 8]);
    assert_eq!(rig.sense(0, &cdb(0, 15), &[]), INVALID_CDB);
    assert_eq!(rig.sense(0, &cdb(3, 16), &[]), INVALID_CDB);
}

// SAM-5 §4.7.
#[test]
fn lun_addressing() {
    use super::super::super::report::{decode_lun, encode_lun};
    for lun in [0, 1, 255, 256, 0x3fff] {
        assert_eq!(decode_lun(encode_lun(lun)), Some(lun));
    }
    assert_eq!(decode_lun([0x40, 1, 0, 0, 0, 0, 0, 0]), Some(1));
    for bad in [[1, 0], [0x80, 0], [0xc1, 1]] {
        assert_eq!(decode_lun([bad[0], bad[1], 0, 0, 0, 0, 0, 0]), None);
    }
    assert_eq!(decode_lun([0, 1, 0, 1, 0, 0, 0, 0]), None);
}

#[test]
fn absent_luns() {
    let mut rig = Rig::new();
    assert_eq!(rig.sense(5, &[0; 6], &[]), (5, 0x2500));
    let sense = rig.good(5, &[3, 0, 0, 0, 18, 0], &[]);
    assert_eq!((sense[2], sense[12]), (5, 0x25));
    assert_eq!(rig.sense(0, &cdb10(0x28, 0, 0, 1), &[]), (5, 0x2000));
}

// SPC-4 §6.11, §7.5.
#[test]
fn mode_pages_of_both_lengths() {
    let mut rig = Rig::new();
    let short = rig.good(1, &[0x1a, 0, 0x3f, 0, 255, 0], &[]);
    assert_eq!(usize::from(short[0]) + 1, short.len());
    assert_eq!(short[3], 8);
    let long = rig.good(1, &[0x5a, 0x10, 0x3f, 0, 0, 0, 0, 1, 0, 0], &[]);
    assert_eq!(
        usize::from(u16::from_be_bytes([long[0], long[1]])) + 2,
        long.len()
    );
    assert_eq!(long[7], 16);
    assert_eq!(short[12..], long[24..]);
    let bare = rig.good(1, &[0x1a, 8, 0x0a, 0, 255, 0], &[]);
    assert_eq!(bare.len(), 4 + 12);
    assert_eq!(rig.sense(1, &[0x1a, 0, 0xca, 0, 255, 0], &[]), (5, 0x3900));
    assert_eq!(rig.sense(1, &[0x1a, 0, 0x19, 0, 255, 0], &[]), INVALID_CDB);
    assert_eq!(rig.sense(1, &[0x1a, 0, 0x0a, 1, 255, 0], &[]), INVALID_CDB);
}

fn control_page(rig: &mut Rig, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut list = rig.good(1, &[0x1a, 8, 0x0a, 0, 255, 0], &[]);
    list[..4].fill(0);
    change(&mut list[4..]);
    list
}

#[test]
fn mode_select_changes_what_is_changeable() {
    let mut rig = Rig::new();
    let changeable = rig.good(1, &[0x1a, 8, 0x4a, 0, 255, 0], &[]);
    assert_eq!(changeable[4..10], [0x0a, 0x0a, 4, 0, 8, 0]);
    let list = control_page(&mut rig, |page| page[2] |= 4);
    rig.good(1, &[0x15, 0x10, 0, 0, 16, 0], &list);
    // D_SENSE: descriptor format from now on, for everyone.
    let outcome = rig.run(A, 1, &cdb10(0x28, 0x20, 0, 1), &[]);
    assert_eq!(outcome.sense[0], 0x72);
    // SPC-4 §6.11: the others are told.
    assert_eq!(sense_of(&rig.run(B, 1, &[0; 6], &[])), (6, 0x2a01));
    // SWP.
    let list = control_page(&mut rig, |page| page[4] |= 8);
    rig.good(1, &[0x15, 0x10, 0, 0, 16, 0], &list);
    assert_eq!(rig.sense(1, &cdb10(0x2a, 0, 0, 1), &[0; 512]), (7, 0x2702));
    rig.good(1, &cdb10(0x28, 0, 0, 1), &[]);
    assert_eq!(rig.good(1, &[0x1a, 8, 0x0a, 0, 255, 0], &[])[2], 0x90);
    // What is fixed.
    let list = control_page(&mut rig, |page| page[3] = 0);
    assert_eq!(rig.sense(1, &[0x15, 0x10, 0, 0, 16, 0], &list), (5, 0x2600));
}

#[test]
fn mode_select_lists_that_are_wrong() {
    let mut rig = Rig::new();
    let list = control_page(&mut rig, |_| ());
    for length in [1, 3, 5, 15] {
        let cdb = [0x15, 0x10, 0, 0, length, 0];
        assert_eq!(rig.sense(1, &cdb, &list), (5, 0x1a00), "{length}");
    }
    rig.good(1, &[0x15, 0x10, 0, 0, 0, 0], &[]);
    rig.good(1, &[0x15, 0x10, 0, 0, 4, 0], &list);
    assert_eq!(rig.sense(1, &[0x15, 0, 0, 0, 16, 0], &list), INVALID_CDB);
    assert_eq!(rig.sense(1, &[0x15, 0x11, 0, 0, 16, 0], &list), INVALID_CDB);
    assert_eq!(rig.sense(1, &[0x15, 0x10, 0, 0, 17, 0], &list), (5, 0x1a00));
    let mut other = list.clone();
    other[4] = 0x19;
    assert_eq!(
        rig.sense(1, &[0x15, 0x10, 0, 0, 16, 0], &other),
        (5, 0x2600)
    );
    // A block descriptor that changes the block size.
    let mut with = vec![0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 16, 0];
    with.extend(&list[4..]);
    assert_eq!(rig.sense(1, &[0x15, 0x10, 0, 0, 24, 0], &with), (5, 0x2600));
    with[10] = 2;
    rig.good(1, &[0x15, 0x10, 0, 0, 24, 0], &with);
}

// SPC-4 §6.34.
#[test]
fn operation_codes_one_by_one() {
    let mut rig = Rig::new();
    let all = rig.good(1, &[0xa3, 0x0c, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[]);
    let with_timeouts = rig.good(1, &[0xa3, 0x0c, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[]);
    assert_eq!((with_timeouts.len() - 4) / 20, (all.len() - 4) / 8);
    for descriptor in all[4..].chunks(8) {
        let (opcode, has_action) = (descriptor[0], descriptor[5] & 1 == 1);
        let action = [descriptor[2], descriptor[3]];
        assert!(has_action || action == [0, 0]);
        let cdb = |option| {
            vec![
                0xa3, 0x0c, option, opcode, action[0], action[1], 0, 0, 1, 0, 0, 0,
            ]
        };
        let (right, wrong) = if has_action { (2, 1) } else { (1, 2) };
        assert_eq!(rig.sense(1, &cdb(wrong), &[]), INVALID_CDB);
        for option in [right, 3] {
            let one = rig.good(1, &cdb(option), &[]);
            assert_eq!(one[1] & 7, 3);
            assert_eq!(usize::from(one[3]), usize::from(descriptor[7]));
            assert_eq!(one[4], opcode);
        }
    }
    let unknown = rig.good(1, &[0xa3, 0x0c, 1, 0x02, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
    assert_eq!(unknown[1] & 7, 1);
    assert_eq!(
        rig.sense(1, &[0xa3, 0x0c, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]),
        INVALID_CDB
    );
}

#[test]
fn other_reports() {
    let mut rig = Rig::new();
    let functions = rig.good(1, &[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], &[]);
    assert_eq!(functions, [0xda, 0, 0, 0]);
    let groups = rig.good(1, &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
    assert_eq!(groups, [0, 0, 0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]);
    let groups = rig.good(1, &[0xa3, 0x2a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
    assert_eq!(groups[..8], [0, 0, 0, 16, 0x10, 0, 0, 0]);
    assert_eq!(
        rig.good(1, &[0xa3, 5, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], &[]),
        [0; 4]
    );
    assert_eq!(
        rig.good(1, &[0x37, 0, 0x0d, 0, 0, 0, 0, 0, 8, 0], &[]),
        [0, 0x0d, 0, 0]
    );
    assert_eq!(
        rig.good(1, &[0xb7, 0x0d, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], &[])[1],
        0x0d
    );
    rig.good(1, &[0x1d, 4, 0, 0, 0, 0], &[]);
    assert_eq!(rig.sense(1, &[0x1d, 0x20, 0, 0, 0, 0], &[]), INVALID_CDB);
}

// SPC-4 §6.8, SBC-3 §6.4.4.
#[test]
fn log_pages() {
    let mut rig = Rig::new();
    let log = |page, from: u8| vec![0x4d, 0, page, 0, 0, 0, from, 1, 0, 0];
    assert_eq!(rig.good(1, &log(0x40, 0), &[]), [0, 0, 0, 3, 0, 0x0c, 0x2f]);
    assert_eq!(rig.good(1, &log(0x4c, 0), &[]).len(), 4);
    rig.target.usage_changed(1, 3 * MIB, 5 * MIB);
    let page = rig.good(1, &log(0x4c, 0), &[]);
    assert_eq!(page[4..12], [0, 1, 3, 8, 0, 0, 0, 5]);
    assert_eq!(page[16..24], [0, 2, 3, 8, 0, 0, 0, 3]);
    assert_eq!(rig.good(1, &log(0x6f, 0), &[]).len(), 12);
    assert_eq!(rig.sense(1, &log(0x4d, 0), &[]), INVALID_CDB);
    assert_eq!(rig.sense(1, &log(0x00, 0), &[]), INVALID_CDB);
}
