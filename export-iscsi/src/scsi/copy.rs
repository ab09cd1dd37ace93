//! EXTENDED COPY(LID1), RECEIVE COPY RESULTS(LID1) and the third-party copy page (SPC-4 §6.4, §6.18 to
//! §6.21, §7.8.17).
//!
//! Disks of the same target are copied block to block; the data never leave the gateway.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use pss_core::volume::device::{DeviceReply, DeviceRequest, DeviceResult};

use super::actions::NexusId;
use super::cdb::Cdb;
use super::job::{
    Answer, Begin, Begun, Job, Next, internal_failure, joined, joined_read, length_of,
};
use super::sense::{Asc, Failure, Sense, SenseKey, device_failure};

/// Most target descriptors (CSCD descriptors).
const TARGETS_MAX: usize = 2;
/// Most segment descriptors.
const SEGMENTS_MAX: usize = 64;
const HEADER_BYTES: usize = 16;
const TARGET_BYTES: usize = 32;
const SEGMENT_BYTES: usize = 28;
const LIST_BYTES_MAX: usize = TARGETS_MAX * TARGET_BYTES + SEGMENTS_MAX * SEGMENT_BYTES;
/// Bytes that are read and written in one step.
const STEP_BYTES: u64 = 1 << 20;
/// Longest segment, bytes: the number of blocks has 16 bits.
const SEGMENT_DATA_BYTES_MAX: u32 = 0xffff * 512;
/// Identification descriptor.
const IDENTIFICATION_TARGET: u8 = 0xe4;
/// Block device to block device.
const BLOCK_TO_BLOCK: u8 = 0x02;
/// Finished copies that are remembered for RECEIVE COPY RESULTS, per nexus.
const HISTORY_MAX: usize = 16;

/// A disk as EXTENDED COPY finds it.
pub(super) struct CopyDisk {
    /// Its LUN.
    pub(super) lun: u16,
    /// Bytes of a block.
    pub(super) block_bytes: u64,
    /// Blocks.
    pub(super) blocks: u64,
}

/// How a copy ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct CopyStatus {
    /// LIST IDENTIFIER.
    pub(super) list_id: u8,
    /// Without errors.
    pub(super) good: bool,
    /// Segments done.
    pub(super) segments: u16,
    /// Bytes written.
    pub(super) bytes: u64,
}

/// How the last copies of each nexus ended.
#[derive(Default)]
pub(super) struct CopyHistory(BTreeMap<NexusId, VecDeque<CopyStatus>>);

impl CopyHistory {
    /// Remembers a copy; an older one of the same list identifier is forgotten.
    pub(super) fn push(&mut self, nexus: NexusId, status: CopyStatus) {
        let history = self.0.entry(nexus).or_default();
        history.retain(|old| old.list_id != status.list_id);
        if history.len() >= HISTORY_MAX {
            history.pop_front();
        }
        history.push_back(status);
    }

    /// A nexus is gone.
    pub(super) fn forget(&mut self, nexus: NexusId) {
        self.0.remove(&nexus);
    }

    fn find(&self, nexus: NexusId, list_id: u8) -> Option<CopyStatus> {
        self.0
            .get(&nexus)?
            .iter()
            .find(|status| status.list_id == list_id)
            .copied()
    }
}

/// A segment that was checked.
struct Segment {
    from: (u16, u64),
    to: (u16, u64),
    bytes: u64,
    /// First block of the destination, for sense data.
    lba: u64,
}

/// EXTENDED COPY. `find` gives the disk of a designator, or why it cannot be used as source (false) or
/// destination (true).
pub(super) fn extended_copy(
    cdb: &Cdb,
    data: &[Bytes],
    find: impl Fn(&[u8]) -> Option<CopyDisk>,
    usable: impl Fn(u16, bool) -> Result<(), Failure>,
) -> Begin {
    let length = cdb.u32(10) as usize;
    if length == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    if length < HEADER_BYTES || length_of(data) < length as u64 {
        return Err(Sense::list_length().into());
    }
    if length > HEADER_BYTES + LIST_BYTES_MAX + TARGET_BYTES + SEGMENT_BYTES {
        return Err(Sense::list_length().into());
    }
    let list = joined(data, length);
    let target_bytes = usize::from(u16::from_be_bytes([list[2], list[3]]));
    let segment_bytes = word(&list, 8) as usize;
    if word(&list, 12) != 0 {
        // There is no inline data for block to block.
        return Err(Sense::parameter(12).into());
    }
    let total = target_bytes.saturating_add(segment_bytes);
    if total > LIST_BYTES_MAX || total.saturating_add(HEADER_BYTES) > list.len() {
        return Err(Sense::list_length().into());
    }
    if !target_bytes.is_multiple_of(TARGET_BYTES) {
        return Err(Sense::parameter(2).into());
    }
    if target_bytes / TARGET_BYTES > TARGETS_MAX {
        return Err(Sense::illegal(Asc::TOO_MANY_TARGET_DESCRIPTORS).into());
    }
    let (targets, segments) = list[HEADER_BYTES..HEADER_BYTES + total].split_at(target_bytes);
    let mut disks = Vec::new();
    for (index, target) in targets.chunks_exact(TARGET_BYTES).enumerate() {
        disks.push(decode_target(
            target,
            HEADER_BYTES + index * TARGET_BYTES,
            &find,
        )?);
    }
    let mut plan = VecDeque::new();
    let mut rest = segments;
    let mut at = HEADER_BYTES + target_bytes;
    while !rest.is_empty() {
        if plan.len() >= SEGMENTS_MAX {
            return Err(Sense::illegal(Asc::TOO_MANY_SEGMENT_DESCRIPTORS).into());
        }
        if rest[0] != BLOCK_TO_BLOCK {
            return Err(Sense::illegal(Asc::UNSUPPORTED_SEGMENT_DESCRIPTOR).into());
        }
        let segment = rest.get(..SEGMENT_BYTES).ok_or(Sense::list_length())?;
        if segment[2..4] != [0, 0x18] {
            return Err(Sense::parameter(at + 2).into());
        }
        plan.extend(decode_segment(segment, &disks, &usable)?);
        rest = &rest[SEGMENT_BYTES..];
        at += SEGMENT_BYTES;
    }
    Ok(Begun::Job(Box::new(CopyJob {
        segments: plan,
        done: 0,
        step: 0,
    })))
}

fn word(list: &[u8], at: usize) -> u32 {
    list[at..at + 4]
        .iter()
        .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn long(list: &[u8], at: usize) -> u64 {
    u64::from(word(list, at)) << 32 | u64::from(word(list, at + 4))
}

/// Identification descriptor target descriptor (SPC-4 §6.4.5.3).
fn decode_target(
    target: &[u8],
    at: usize,
    find: &impl Fn(&[u8]) -> Option<CopyDisk>,
) -> Result<CopyDisk, Sense> {
    if target[0] != IDENTIFICATION_TARGET {
        return Err(Sense::illegal(Asc::UNSUPPORTED_TARGET_DESCRIPTOR));
    }
    let unreachable = Sense::new(SenseKey::CopyAborted, Asc::COPY_TARGET_DEVICE_NOT_REACHABLE);
    // NUL, or not a disk. LU ID TYPE says nothing of this kind of descriptor.
    if target[1] & 0x20 != 0 || target[1] & 0x1f != 0 {
        return Err(unreachable);
    }
    let length = usize::from(target[7]);
    if length > 20 {
        return Err(Sense::parameter(at + 7));
    }
    // Of the logical unit, not of a port.
    if target[5] & 0x30 != 0 {
        return Err(unreachable);
    }
    let mut wanted = vec![target[4] & 0x0f, target[5] & 0x0f];
    wanted.extend(&target[8..8 + length]);
    let disk = find(&wanted).ok_or(unreachable)?;
    let block_bytes = u64::from(word(target, 28) & 0xff_ffff);
    if block_bytes != 0 && block_bytes != disk.block_bytes {
        return Err(Sense::parameter(at + 29));
    }
    Ok(disk)
}

/// Block device to block device segment descriptor (SPC-4 §6.4.6.3).
fn decode_segment(
    segment: &[u8],
    disks: &[CopyDisk],
    usable: &impl Fn(u16, bool) -> Result<(), Failure>,
) -> Result<Option<Segment>, Failure> {
    let destination_counts = segment[1] & 0x02 != 0;
    let disk = |at: usize| {
        let index = usize::from(u16::from_be_bytes([segment[at], segment[at + 1]]));
        let unreachable = Sense::new(SenseKey::CopyAborted, Asc::UNREACHABLE_COPY_TARGET);
        disks.get(index).ok_or(unreachable)
    };
    let (from, to) = (disk(4)?, disk(6)?);
    usable(from.lun, false)?;
    usable(to.lun, true)?;
    let blocks = u64::from(u16::from_be_bytes([segment[10], segment[11]]));
    let unit = match destination_counts {
        true => to.block_bytes,
        false => from.block_bytes,
    };
    let bytes = blocks * unit;
    let place = |disk: &CopyDisk, lba: u64| {
        let blocks = bytes.div_ceil(disk.block_bytes);
        let fits = lba
            .checked_add(blocks)
            .is_some_and(|end| end <= disk.blocks);
        // Which has no code of its own among those of COPY ABORTED.
        let outside = Sense {
            information: Some(lba),
            ..Sense::new(SenseKey::CopyAborted, Asc::NONE)
        };
        fits.then(|| lba * disk.block_bytes).ok_or(outside)
    };
    let lba = long(segment, 20);
    let (source, destination) = (place(from, long(segment, 12))?, place(to, lba)?);
    if bytes % from.block_bytes != 0 || bytes % to.block_bytes != 0 {
        // Part of a block would have to be padded.
        return Err(Sense::new(SenseKey::CopyAborted, Asc::NONE).into());
    }
    Ok((bytes > 0).then_some(Segment {
        from: (from.lun, source),
        to: (to.lun, destination),
        bytes,
        lba,
    }))
}

struct CopyJob {
    segments: VecDeque<Segment>,
    /// Bytes of the first segment that are copied.
    done: u64,
    /// Bytes that are being copied.
    step: u64,
}

impl CopyJob {
    fn read(&mut self) -> Next {
        let Some(segment) = self.segments.front() else {
            return Next::good();
        };
        self.step = STEP_BYTES.min(segment.bytes - self.done);
        let request = DeviceRequest::Read {
            offset_bytes: segment.from.1 + self.done,
            length_bytes: self.step as u32,
        };
        Next::SubmitTo(vec![(segment.from.0, request)])
    }
}

impl Job for CopyJob {
    fn next(&mut self, mut results: Vec<DeviceResult>) -> Next {
        let Some(result) = results.pop() else {
            return self.read();
        };
        let Some(segment) = self.segments.front() else {
            return Next::fail(internal_failure());
        };
        match result {
            Ok(DeviceReply::Data(parts)) => {
                let request = DeviceRequest::Write {
                    offset_bytes: segment.to.1 + self.done,
                    data: joined_read(&parts, self.step as usize),
                    fua: false,
                };
                Next::SubmitTo(vec![(segment.to.0, request)])
            }
            Ok(_) => {
                self.done += self.step;
                if self.done == segment.bytes {
                    self.segments.pop_front();
                    self.done = 0;
                }
                self.read()
            }
            Err(error) => Next::fail(device_failure(error, true, segment.lba)),
        }
    }
}

/// LIST IDENTIFIER, number of segments and bytes that an EXTENDED COPY would come to, from its list.
pub(super) fn summary(cdb: &Cdb, data: &[Bytes]) -> Option<(u8, u16)> {
    let length = cdb.u32(10) as usize;
    if !(HEADER_BYTES..=HEADER_BYTES + LIST_BYTES_MAX).contains(&length) {
        return None;
    }
    let list = joined(data, length);
    if list.len() < HEADER_BYTES || list[1] >> 3 & 3 == 3 {
        // LIST ID USAGE 11b: nothing is to be remembered.
        return None;
    }
    let segments = word(&list, 8) as usize / SEGMENT_BYTES;
    Some((list[0], segments.min(SEGMENTS_MAX) as u16))
}

/// RECEIVE COPY RESULTS.
pub(super) fn receive_results(history: &CopyHistory, nexus: NexusId, cdb: &Cdb) -> Begin {
    let allocation = u64::from(cdb.u32(10));
    let list_id = cdb.u8(2);
    let data = match cdb.u8(1) & 0x1f {
        0x03 => operating_parameters(),
        0x00 => {
            let status = history.find(nexus, list_id).ok_or(Sense::cdb(2))?;
            copy_status(&status)
        }
        // FAILED SEGMENT DETAILS: sense data went with the command itself.
        0x04 => {
            let failed = history.find(nexus, list_id).filter(|it| !it.good);
            failed.ok_or(Sense::cdb(2))?;
            let mut data = vec![0; 60];
            data[3] = 56;
            data
        }
        _ => return Err(Sense::cdb_bit(1, 4).into()),
    };
    Ok(Begun::Done(Answer::data(data, allocation)))
}

/// COPY STATUS (SPC-4 §6.18).
fn copy_status(status: &CopyStatus) -> Vec<u8> {
    let mut data = vec![0, 0, 0, 8];
    data.push(if status.good { 0x01 } else { 0x02 });
    data.extend(status.segments.to_be_bytes());
    // Transfer count in KiB.
    data.push(0x01);
    data.extend(((status.bytes >> 10) as u32).to_be_bytes());
    data
}

/// OPERATING PARAMETERS (SPC-4 §6.20).
fn operating_parameters() -> Vec<u8> {
    let mut data = vec![0; 44];
    data[8..10].copy_from_slice(&(TARGETS_MAX as u16).to_be_bytes());
    data[10..12].copy_from_slice(&(SEGMENTS_MAX as u16).to_be_bytes());
    data[12..16].copy_from_slice(&(LIST_BYTES_MAX as u32).to_be_bytes());
    data[16..20].copy_from_slice(&SEGMENT_DATA_BYTES_MAX.to_be_bytes());
    // Total and per-unit concurrent copies; data segment granularity 2^9.
    data[34..36].copy_from_slice(&255u16.to_be_bytes());
    data[36] = 255;
    data[37] = 9;
    data[43] = 2;
    data.extend([BLOCK_TO_BLOCK, IDENTIFICATION_TARGET]);
    let length = (data.len() - 4) as u32;
    data[..4].copy_from_slice(&length.to_be_bytes());
    data
}

/// Third-party copy page (SPC-4 §7.8.17).
pub(super) fn third_party_page() -> Vec<u8> {
    let mut page = Vec::new();
    let mut descriptor = |kind: u16, body: &[u8]| {
        let length = body.len().next_multiple_of(4);
        page.extend(kind.to_be_bytes());
        page.extend((length as u16).to_be_bytes());
        page.extend(body);
        page.resize(page.len() + length - body.len(), 0);
    };
    // Supported commands: EXTENDED COPY(LID1), RECEIVE COPY RESULTS.
    descriptor(0x0001, &[8, 0x83, 1, 0x00, 0x84, 3, 0x00, 0x03, 0x04]);
    // Parameter data.
    let mut parameters = vec![0; 28];
    parameters[4..6].copy_from_slice(&(TARGETS_MAX as u16).to_be_bytes());
    parameters[6..8].copy_from_slice(&(SEGMENTS_MAX as u16).to_be_bytes());
    parameters[8..12].copy_from_slice(&(LIST_BYTES_MAX as u32).to_be_bytes());
    descriptor(0x0004, &parameters);
    // Supported descriptors.
    descriptor(0x0008, &[2, BLOCK_TO_BLOCK, IDENTIFICATION_TARGET]);
    // General copy operations.
    let mut general = vec![0; 32];
    general[..4].copy_from_slice(&255u32.to_be_bytes());
    general[4..8].copy_from_slice(&255u32.to_be_bytes());
    general[8..12].copy_from_slice(&SEGMENT_DATA_BYTES_MAX.to_be_bytes());
    general[12] = 9;
    descriptor(0x8001, &general);
    page
}
