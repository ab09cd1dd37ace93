//! INQUIRY: standard data and vital product data (SPC-4 §6.6, §7.8; SBC-3 §6.6).
//!
//! What identifies a disk is made of the volume's UUID alone, so that every gateway says the same and
//! multipath software never takes two volumes for one.

use super::cdb::Cdb;
use super::config::TargetConfig;
use super::copy;
use super::job::{Answer, Begin, Begun};
use super::sense::Sense;
use super::unit::{Disk, TRANSFER_BYTES_MAX, Unit};

const SUPPORTED_PAGES: u8 = 0x00;
const SERIAL: u8 = 0x80;
const IDENTIFICATION: u8 = 0x83;
const EXTENDED: u8 = 0x86;
const MODE_PAGE_POLICY: u8 = 0x87;
const THIRD_PARTY_COPY: u8 = 0x8f;
const BLOCK_LIMITS: u8 = 0xb0;
const BLOCK_CHARACTERISTICS: u8 = 0xb1;
const PROVISIONING: u8 = 0xb2;

/// Most blocks of one COMPARE AND WRITE: the field has one byte.
pub(super) const COMPARE_BLOCKS_MAX: u64 = 255;
/// Most blocks that one UNMAP command may name.
pub(super) const UNMAP_BLOCKS_MAX: u32 = 1 << 20;
/// Most descriptors of one UNMAP command.
pub(super) const UNMAP_DESCRIPTORS_MAX: u32 = 256;
/// Longest WRITE ATOMIC, bytes: what is one log entry wherever it begins.
pub(super) const ATOMIC_BYTES_MAX: u64 = (1 << 20) - 4096;
/// Length of a READ or WRITE at which PSS works best, bytes.
const OPTIMAL_BYTES: u64 = 1 << 20;

/// Peripheral device type of a disk.
const DISK: u8 = 0x00;
/// Peripheral device type of LUN 0: a storage array controller.
const CONTROLLER: u8 = 0x0c;
/// Peripheral qualifier and type of a logical unit that is not there (SPC-4 table 144).
const ABSENT: u8 = 0x7f;

/// INQUIRY of a LUN that may not exist, through a portal group.
pub(super) fn inquiry(
    config: &TargetConfig,
    unit: Option<&Unit>,
    portal_group: u16,
    cdb: &Cdb,
) -> Begin {
    let allocation = u64::from(cdb.u16(3));
    let vital = cdb.bit(1, 0);
    let page = cdb.u8(2);
    if !vital && page != 0 {
        return Err(Sense::cdb(2).into());
    }
    let data = match (vital, unit) {
        (false, unit) => standard(unit),
        (true, Some(unit)) => {
            let body = vital_page(config, unit, portal_group, page).ok_or(Sense::cdb(2))?;
            let [high, low] = (body.len() as u16).to_be_bytes();
            let mut data = vec![device_type(Some(unit)), page, high, low];
            data.extend(body);
            data
        }
        (true, None) => return Err(Sense::cdb(2).into()),
    };
    Ok(Begun::Done(Answer::data(data, allocation)))
}

fn device_type(unit: Option<&Unit>) -> u8 {
    match unit {
        None => ABSENT,
        Some(unit) if unit.disk.is_some() => DISK,
        Some(_) => CONTROLLER,
    }
}

/// Standard INQUIRY data (SPC-4 §6.6.2).
fn standard(unit: Option<&Unit>) -> Vec<u8> {
    let disk = unit.and_then(|unit| unit.disk.as_ref());
    let mut data = vec![0; 74];
    data[0] = device_type(unit);
    data[1] = u8::from(disk.is_some_and(|disk| disk.settings.removable)) << 7;
    // SPC-4.
    data[2] = 6;
    // HISUP, response data format 2.
    data[3] = 0x12;
    data[4] = (data.len() - 5) as u8;
    // TPGS implicit; third-party copy for disks.
    data[5] = 0x10 | u8::from(disk.is_some()) << 3;
    // MULTIP.
    data[6] = 0x10;
    // CMDQUE.
    data[7] = 0x02;
    let (vendor, product, revision) = match disk {
        Some(disk) => (
            disk.settings.vendor.as_str(),
            disk.settings.product.as_str(),
            disk.settings.revision.as_str(),
        ),
        None => ("PSS", "CONTROLLER", env!("CARGO_PKG_VERSION")),
    };
    data[8..16].copy_from_slice(&padded::<8>(vendor));
    data[16..32].copy_from_slice(&padded::<16>(product));
    data[32..36].copy_from_slice(&padded::<4>(revision));
    // SAM-5, SPC-4, iSCSI, SBC-3.
    let descriptors: &[u16] = match disk {
        Some(_) => &[0x00a0, 0x0460, 0x0960, 0x04c0],
        None => &[0x00a0, 0x0460, 0x0960],
    };
    for (at, descriptor) in (58..).step_by(2).zip(descriptors) {
        data[at..at + 2].copy_from_slice(&descriptor.to_be_bytes());
    }
    data
}

/// ASCII of a fixed length: other characters become `?`, the rest is spaces; never all spaces, which
/// breaks the scan of Linux.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [b' '; N];
    let text = if text.trim().is_empty() { "PSS" } else { text };
    for (byte, c) in out.iter_mut().zip(text.chars()) {
        *byte = match c {
            ' '..='~' => c as u8,
            _ => b'?',
        };
    }
    out
}

/// VPD pages of a unit, ascending as SPC-4 §7.8.14 has it.
fn pages_of(unit: &Unit) -> &'static [u8] {
    match unit.disk {
        Some(_) => &[
            SUPPORTED_PAGES,
            SERIAL,
            IDENTIFICATION,
            EXTENDED,
            MODE_PAGE_POLICY,
            THIRD_PARTY_COPY,
            BLOCK_LIMITS,
            BLOCK_CHARACTERISTICS,
            PROVISIONING,
        ],
        None => &[SUPPORTED_PAGES, SERIAL, IDENTIFICATION, EXTENDED],
    }
}

/// Body of a VPD page; `None` if the unit does not have it.
fn vital_page(config: &TargetConfig, unit: &Unit, portal_group: u16, page: u8) -> Option<Vec<u8>> {
    if !pages_of(unit).contains(&page) {
        return None;
    }
    let disk = unit.disk.as_ref();
    match page {
        SUPPORTED_PAGES => Some(pages_of(unit).to_vec()),
        SERIAL => Some(serial(config, disk)),
        IDENTIFICATION => Some(identification(config, disk, portal_group)),
        EXTENDED => Some(extended()),
        MODE_PAGE_POLICY => Some(mode_page_policy()),
        THIRD_PARTY_COPY => Some(copy::third_party_page()),
        BLOCK_LIMITS => disk.map(block_limits),
        BLOCK_CHARACTERISTICS => disk.map(block_characteristics),
        PROVISIONING => disk.map(provisioning),
        _ => None,
    }
}

/// Unit serial number (SPC-4 §7.8.15).
fn serial(config: &TargetConfig, disk: Option<&Disk>) -> Vec<u8> {
    match disk {
        None => config.name.clone().into_bytes(),
        Some(disk) => match &disk.settings.serial {
            Some(serial) => ascii(serial, 252),
            None => hex(&disk.info.uuid).into_bytes(),
        },
    }
}

/// Printable ASCII, cut at a length.
fn ascii(text: &str, most: usize) -> Vec<u8> {
    let ascii = |c: char| {
        if matches!(c, ' '..='~') {
            c as u8
        } else {
            b'?'
        }
    };
    text.chars().take(most).map(ascii).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A designator (SPC-4 §7.8.6.1).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Designator {
    /// 1 binary, 2 ASCII, 3 UTF-8.
    pub(super) code_set: u8,
    /// Designator type.
    pub(super) kind: u8,
    /// 0 logical unit, 1 target port, 2 target device.
    pub(super) association: u8,
    /// The designator.
    pub(super) bytes: Vec<u8>,
}

impl Designator {
    fn encode(&self, out: &mut Vec<u8>) {
        // Ports and the target are named for iSCSI (protocol 5, PIV).
        let (protocol, piv) = match self.association {
            0 => (0, 0),
            _ => (0x50, 0x80),
        };
        out.push(protocol | self.code_set);
        out.push(piv | self.association << 4 | self.kind);
        out.push(0);
        out.push(self.bytes.len() as u8);
        out.extend(&self.bytes);
    }
}

/// Network address authority identifier of type 3h, locally assigned (SPC-4 §7.8.6.6.4): 60 bits that
/// depend on all of the volume's UUID. Initiators know disks by it: it must never change.
pub(crate) fn naa(uuid: &[u8; 16]) -> [u8; 8] {
    let half = |at: usize| {
        uuid[at..at + 8]
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    // The finalizer of SplitMix64, over each half in turn.
    let mix = |mut z: u64| {
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    let mut naa = mix(mix(half(0)).wrapping_add(0x9e37_79b9_7f4a_7c15) ^ half(8)).to_be_bytes();
    naa[0] = 0x30 | naa[0] & 0x0f;
    naa
}

/// What names the logical unit itself.
pub(super) fn unit_designators(disk: &Disk) -> Vec<Designator> {
    let mut t10 = padded::<8>(&disk.settings.vendor).to_vec();
    match &disk.settings.scsi_id {
        Some(id) => t10.extend(ascii(id, 200)),
        None => t10.extend(hex(&disk.info.uuid).into_bytes()),
    }
    let naa = naa(&disk.info.uuid);
    let designator = |code_set, kind, bytes| Designator {
        code_set,
        kind,
        association: 0,
        bytes,
    };
    vec![
        designator(1, 3, naa.to_vec()),
        designator(2, 1, t10),
        designator(3, 8, format!("naa.{}", hex(&naa)).into_bytes()),
    ]
}

/// A text as a SCSI name string: NUL-terminated, a multiple of four bytes.
fn name_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.truncate(248);
    bytes.resize((bytes.len() + 4) / 4 * 4, 0);
    bytes
}

/// Name of a target port (RFC 7143 §4.4.2.2).
pub(super) fn target_port_name(target: &str, portal_group: u16) -> String {
    format!("{target},t,0x{portal_group:04x}")
}

/// Device identification (SPC-4 §7.8.6).
fn identification(config: &TargetConfig, disk: Option<&Disk>, portal_group: u16) -> Vec<u8> {
    let mut designators = disk.map(unit_designators).unwrap_or_default();
    let [high, low] = portal_group.to_be_bytes();
    let port = |kind, code_set, bytes| Designator {
        code_set,
        kind,
        association: 1,
        bytes,
    };
    designators.push(port(4, 1, vec![0, 0, high, low]));
    designators.push(port(5, 1, vec![0, 0, high, low]));
    let port_name = target_port_name(&config.name, portal_group);
    designators.push(port(8, 3, name_string(&port_name)));
    designators.push(Designator {
        code_set: 3,
        kind: 8,
        association: 2,
        bytes: name_string(&config.name),
    });
    let mut out = Vec::new();
    for designator in designators {
        designator.encode(&mut out);
    }
    out
}

/// Extended INQUIRY data (SPC-4 §7.8.7).
fn extended() -> Vec<u8> {
    let mut page = vec![0; 60];
    // HEADSUP, ORDSUP, SIMPSUP.
    page[1] = 0x07;
    // MAXIMUM SUPPORTED SENSE DATA LENGTH.
    page[9] = 252;
    page
}

/// Mode page policy (SPC-4 §7.8.9): a gateway, which is a target port, has pages of its own.
fn mode_page_policy() -> Vec<u8> {
    // All pages with all subpages; MLUS 0, per target port.
    vec![0x3f, 0xff, 0x01, 0]
}

/// Block limits (SBC-3 §6.6.4).
fn block_limits(disk: &Disk) -> Vec<u8> {
    let blocks = |bytes: u64| (bytes / disk.block_bytes()) as u32;
    let physical = 1u32 << disk.physical_exponent();
    let mut page = vec![0; 60];
    // WSNZ 0: WRITE SAME of 0 blocks goes to the end.
    page[1] = COMPARE_BLOCKS_MAX as u8;
    page[2..4].copy_from_slice(&(physical as u16).to_be_bytes());
    page[4..8].copy_from_slice(&blocks(TRANSFER_BYTES_MAX).to_be_bytes());
    page[8..12].copy_from_slice(&blocks(OPTIMAL_BYTES).to_be_bytes());
    if disk.settings.thin {
        page[16..20].copy_from_slice(&UNMAP_BLOCKS_MAX.to_be_bytes());
        page[20..24].copy_from_slice(&UNMAP_DESCRIPTORS_MAX.to_be_bytes());
        page[24..28].copy_from_slice(&unmap_granularity(disk).to_be_bytes());
        // UGAVALID, alignment 0.
        page[28] = 0x80;
    }
    // MAXIMUM WRITE SAME LENGTH 0: no limit. ATOMIC ALIGNMENT and GRANULARITY 0: any.
    page[40..44].copy_from_slice(&blocks(ATOMIC_BYTES_MAX).to_be_bytes());
    page
}

/// Blocks of which the cell frees all or nothing.
fn unmap_granularity(disk: &Disk) -> u32 {
    disk.info
        .preferred_block_bytes
        .div_ceil(disk.settings.block_bytes)
        .max(1)
}

/// Block device characteristics (SBC-3 §6.6.3).
fn block_characteristics(disk: &Disk) -> Vec<u8> {
    let mut page = vec![0; 60];
    // Not rotating.
    page[1] = 1;
    // WABEREQ: after a block erase reads succeed.
    page[3] = u8::from(disk.settings.sanitize) << 6;
    page
}

/// Logical block provisioning (SBC-3 §6.6.6).
fn provisioning(disk: &Disk) -> Vec<u8> {
    if !disk.settings.thin {
        return vec![0; 4];
    }
    // LBPU, LBPWS, LBPWS10, LBPRZ; provisioning type thin.
    vec![0, 0xe4, 0x02, 0]
}
