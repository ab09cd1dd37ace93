//! Commands that only say something: REPORT LUNS, READ CAPACITY, LOG SENSE and others.

use super::actions::NexusId;
use super::cdb::{COMMANDS, Cdb, Known};
use super::config::TargetConfig;
use super::job::{Answer, Begin, Begun};
use super::sense::{Asc, Sense, SenseKey};
use super::unit::{Disk, Unit};

fn answer(data: Vec<u8>, allocation: impl Into<u64>) -> Begin {
    Ok(Begun::Done(Answer::data(data, allocation.into())))
}

/// A LUN in eight bytes: peripheral device addressing to 255, flat space addressing above (SAM-5 §4.7).
pub fn encode_lun(lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    match high {
        0 => [0, low, 0, 0, 0, 0, 0, 0],
        _ => [0x40 | high, low, 0, 0, 0, 0, 0, 0],
    }
}

/// The number of a LUN, if it is of one of the two forms that [`encode_lun`] makes.
pub fn decode_lun(lun: [u8; 8]) -> Option<u16> {
    if lun[2..].iter().any(|byte| *byte != 0) {
        return None;
    }
    match lun[0] >> 6 {
        0 if lun[0] == 0 => Some(u16::from(lun[1])),
        1 => Some(u16::from_be_bytes([lun[0] & 0x3f, lun[1]])),
        _ => None,
    }
}

/// REPORT LUNS (SPC-4 §6.33).
pub(super) fn luns(luns: impl Iterator<Item = u16>, cdb: &Cdb) -> Begin {
    let allocation = cdb.u32(6);
    if allocation < 16 {
        return Err(Sense::cdb(6).into());
    }
    let list: Vec<u8> = match cdb.u8(2) {
        0x00 | 0x02 => luns.flat_map(encode_lun).collect(),
        // There are no well known logical units, and no administrative ones.
        0x01 | 0x10 | 0x11 | 0x12 => Vec::new(),
        _ => return Err(Sense::cdb(2).into()),
    };
    let mut data = (list.len() as u32).to_be_bytes().to_vec();
    data.extend([0; 4]);
    data.extend(list);
    answer(data, allocation)
}

/// REQUEST SENSE (SPC-4 §6.39): a waiting unit attention, or how the unit stands.
pub(super) fn request_sense(unit: Option<&mut Unit>, nexus: NexusId, cdb: &Cdb) -> Begin {
    let descriptor = cdb.bit(1, 0);
    let sense = match unit {
        None => Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED),
        Some(unit) => match unit.take_attention(nexus) {
            Some(asc) => Sense::attention(asc),
            None => unit
                .disk
                .as_ref()
                .and_then(|disk| disk.sanitize.check().err())
                .unwrap_or(Sense::new(SenseKey::NoSense, Asc::NONE)),
        },
    };
    answer(sense.encode(descriptor), cdb.u8(4))
}

/// READ CAPACITY(10) (SBC-3 §5.15).
pub(super) fn capacity10(disk: &Disk, cdb: &Cdb) -> Begin {
    if !cdb.bit(8, 0) && cdb.u32(2) != 0 {
        return Err(Sense::cdb(2).into());
    }
    let last = u32::try_from(disk.blocks().saturating_sub(1)).unwrap_or(u32::MAX);
    let mut data = last.to_be_bytes().to_vec();
    data.extend(disk.settings.block_bytes.to_be_bytes());
    answer(data, 8u8)
}

/// READ CAPACITY(16) (SBC-3 §5.16).
pub(super) fn capacity16(disk: &Disk, cdb: &Cdb) -> Begin {
    let mut data = disk.blocks().saturating_sub(1).to_be_bytes().to_vec();
    data.extend(disk.settings.block_bytes.to_be_bytes());
    data.resize(32, 0);
    data[13] = disk.physical_exponent();
    if disk.settings.thin {
        // LBPME, LBPRZ.
        data[14] = 0xc0;
    }
    answer(data, cdb.u32(10))
}

/// LOG SENSE (SPC-4 §6.8): supported pages, logical block provisioning, informational exceptions.
pub(super) fn log_sense(unit: &Unit, cdb: &Cdb) -> Begin {
    const SUPPORTED: u8 = 0x00;
    const PROVISIONING: u8 = 0x0c;
    const EXCEPTIONS: u8 = 0x2f;
    if cdb.bit(1, 0) {
        return Err(Sense::cdb_bit(1, 0).into());
    }
    // Cumulative values only: there are no thresholds to ask for.
    if cdb.u8(2) >> 6 != 1 {
        return Err(Sense::cdb_bit(2, 7).into());
    }
    if cdb.u8(3) != 0 {
        return Err(Sense::cdb(3).into());
    }
    let from = cdb.u16(5);
    let thin = unit.disk.as_ref().is_some_and(|disk| disk.settings.thin);
    let page = cdb.u8(2) & 0x3f;
    let parameters = match page {
        SUPPORTED if thin => vec![SUPPORTED, PROVISIONING, EXCEPTIONS],
        SUPPORTED => vec![SUPPORTED, EXCEPTIONS],
        PROVISIONING if thin => provisioning_parameters(unit, from),
        EXCEPTIONS if from == 0 => vec![0, 0, 0x03, 4, 0, 0, 0, 0],
        EXCEPTIONS => return Err(Sense::cdb(5).into()),
        _ => return Err(Sense::cdb_bit(2, 5).into()),
    };
    let [high, low] = (parameters.len() as u16).to_be_bytes();
    let mut data = vec![page, 0, high, low];
    data.extend(parameters);
    answer(data, cdb.u16(7))
}

/// Available and used LBA mapping resource counts (SBC-3 §6.4.4), in thresholds sets of 2^11 blocks.
fn provisioning_parameters(unit: &Unit, from: u16) -> Vec<u8> {
    let Some(disk) = &unit.disk else {
        return Vec::new();
    };
    let Some((used, available)) = disk.usage else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for (code, bytes) in [(1u16, available), (2, used)] {
        if code >= from {
            let units = u32::try_from((bytes / disk.block_bytes()) >> 11).unwrap_or(u32::MAX);
            out.extend(code.to_be_bytes());
            out.extend([0x03, 8]);
            out.extend(units.to_be_bytes());
            // SCOPE: not dedicated to this logical unit.
            out.extend([0x02, 0, 0, 0]);
        }
    }
    out
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4 §6.34).
pub(super) fn operation_codes(unit: &Unit, cdb: &Cdb) -> Begin {
    let timeouts = cdb.bit(2, 7);
    let allocation = cdb.u32(6);
    let (opcode, action) = (cdb.u8(3), cdb.u16(4));
    let served = || COMMANDS.iter().filter(|it| unit.serves(it.scope));
    let data = match cdb.u8(2) & 0x07 {
        0 => {
            let list: Vec<u8> = served()
                .flat_map(|it| command_descriptor(it, timeouts))
                .collect();
            let mut data = (list.len() as u32).to_be_bytes().to_vec();
            data.extend(list);
            data
        }
        option @ 1..=3 => {
            let has_actions = served().any(|it| it.opcode == opcode && it.action.is_some());
            let exists = served().any(|it| it.opcode == opcode);
            match option {
                1 if has_actions => return Err(Sense::cdb_bit(2, 2).into()),
                2 if exists && !has_actions => return Err(Sense::cdb_bit(2, 2).into()),
                _ => {}
            }
            let found = served().find(|it| {
                it.opcode == opcode
                    && match it.action {
                        Some(own) => option != 1 && u16::from(own) == action,
                        None => option == 1 || option == 3 && action == 0,
                    }
            });
            one_command(found, timeouts)
        }
        _ => return Err(Sense::cdb_bit(2, 2).into()),
    };
    answer(data, allocation)
}

/// Command descriptor (SPC-4 §6.34.2).
fn command_descriptor(known: &Known, timeouts: bool) -> Vec<u8> {
    let [high, low] = u16::from(known.action.unwrap_or(0)).to_be_bytes();
    let flags = u8::from(timeouts) << 1 | u8::from(known.action.is_some());
    let mut out = vec![
        known.opcode,
        0,
        high,
        low,
        0,
        flags,
        0,
        known.length() as u8,
    ];
    if timeouts {
        out.extend(TIMEOUTS);
    }
    out
}

/// Command timeouts descriptor (SPC-4 §6.34.4): nothing is said.
const TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// One-command parameter data (SPC-4 §6.34.3).
fn one_command(known: Option<&Known>, timeouts: bool) -> Vec<u8> {
    let Some(known) = known else {
        // SUPPORT 001b: not supported.
        return vec![0, 0x01, 0, 0];
    };
    let usage = known.usage();
    let mut out = vec![0, u8::from(timeouts) << 7 | 0x03, 0, usage.len() as u8];
    out.extend(usage);
    if timeouts {
        out.extend(TIMEOUTS);
    }
    out
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 §6.35).
pub(super) fn task_management(cdb: &Cdb) -> Begin {
    if cdb.u32(6) < 4 {
        return Err(Sense::cdb(6).into());
    }
    // ATS ATSS CLTS LURS, and the target resets as TRS did; no ACA, no queries.
    let mut data = vec![0x80 | 0x40 | 0x10 | 0x08 | 0x02, 0, 0, 0];
    if cdb.bit(2, 7) {
        data[3] = 12;
        data.extend([0; 12]);
    }
    answer(data, cdb.u32(6))
}

/// REPORT TARGET PORT GROUPS (SPC-4 §6.37): every path is active and optimized.
pub(super) fn target_port_groups(config: &TargetConfig, cdb: &Cdb) -> Begin {
    let extended = match cdb.u8(1) >> 5 {
        0 => false,
        1 => true,
        _ => return Err(Sense::cdb_bit(1, 7).into()),
    };
    let mut groups = Vec::new();
    for group in &config.portal_groups {
        let [high, low] = group.to_be_bytes();
        // AO_SUP; status code 0; one port.
        groups.extend([0x00, 0x01, high, low, 0, 0, 0, 1, 0, 0, high, low]);
    }
    if extended {
        groups.splice(0..0, [0x10, 0, 0, 0]);
    }
    let mut data = (groups.len() as u32).to_be_bytes().to_vec();
    data.extend(groups);
    answer(data, cdb.u32(6))
}

/// REPORT IDENTIFYING INFORMATION (SPC-4 §6.32): none was set.
pub(super) fn identifying_information(cdb: &Cdb) -> Begin {
    match cdb.u8(10) >> 1 {
        0x00 | 0x02 => answer(vec![0; 4], cdb.u32(6)),
        // Supported types: peripheral device identifying information of at most 0 bytes.
        0x7f => answer(vec![0, 0, 0, 4, 0, 0, 0, 0], cdb.u32(6)),
        _ => Err(Sense::cdb_bit(10, 7).into()),
    }
}

/// READ DEFECT DATA(10) and (12) (SBC-3 §5.17, §5.18): there are none.
pub(super) fn defect_data(cdb: &Cdb) -> Begin {
    let long = cdb.u8(0) == 0xb7;
    let flags = if long { cdb.u8(1) } else { cdb.u8(2) } & 0x1f;
    let allocation = match long {
        true => cdb.u32(6),
        false => u32::from(cdb.u16(7)),
    };
    let mut data = vec![0, flags, 0, 0];
    if long {
        data.extend([0; 4]);
    }
    answer(data, allocation)
}

/// SEND DIAGNOSTIC (SPC-4 §6.42): the default self-test, which finds nothing.
pub(super) fn send_diagnostic(cdb: &Cdb) -> Begin {
    if cdb.u8(1) >> 5 != 0 {
        return Err(Sense::cdb_bit(1, 7).into());
    }
    if cdb.u16(3) != 0 {
        return Err(Sense::cdb(3).into());
    }
    Ok(Begun::Done(Answer::good()))
}
