//! UNMAP, WRITE SAME and GET LBA STATUS (SBC-3 §4.7, §5.4, §5.28, §5.41).

use bytes::{Bytes, BytesMut};
use pss_core::volume::device::{DeviceReply, DeviceRequest, DeviceResult};

use super::cdb::{Cdb, Transfer};
use super::inquiry::{UNMAP_BLOCKS_MAX, UNMAP_DESCRIPTORS_MAX};
use super::job::{Answer, Begin, Begun, ChangeJob, Job, Next, internal_failure, joined, length_of};
use super::sense::{Sense, device_failure};
use super::unit::Disk;

/// Bytes of one write of a WRITE SAME that is not of zeros.
const SAME_BYTES: u64 = 1 << 20;
/// How many of them are under way at once.
const SAME_WINDOW: usize = 4;
/// Bytes of one request of a WRITE SAME of zeros that stay allocated.
const ZERO_BYTES: u64 = 16 << 20;
/// How many ranges of an UNMAP are freed at once.
const UNMAP_WINDOW: usize = 16;

/// UNMAP (SBC-3 §5.28). As blocks read as zeros afterwards (LBPRZ), a range that is no whole number of the
/// cell's blocks is zeroed at its ends.
pub(super) fn unmap(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    if cdb.bit(1, 0) {
        // ANCHOR: ANC_SUP is 0.
        return Err(Sense::cdb_bit(1, 0).into());
    }
    let length = usize::from(cdb.u16(7));
    if length == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    if length < 8 || length_of(data) < length as u64 {
        return Err(Sense::list_length().into());
    }
    let list = joined(data, length);
    let descriptors = usize::from(u16::from_be_bytes([list[2], list[3]])) / 16;
    if descriptors > UNMAP_DESCRIPTORS_MAX as usize {
        return Err(Sense::parameter(2).into());
    }
    // Descriptors behind the end of the list are not there (SBC-3 §5.28.2).
    let mut requests = Vec::new();
    let mut total = 0u64;
    for (index, descriptor) in list[8..].chunks_exact(16).take(descriptors).enumerate() {
        let range = Transfer {
            lba: number(&descriptor[..8]),
            blocks: number(&descriptor[8..12]),
            fua: false,
            length_at: 8,
        };
        disk.check_range(&range, false)?;
        total += range.blocks;
        if total > u64::from(UNMAP_BLOCKS_MAX) {
            return Err(Sense::parameter(8 + index * 16 + 8).into());
        }
        if range.blocks > 0 {
            requests.push(zeroes(disk, &range, false));
        }
    }
    let lba = requests.len() as u64;
    Ok(change(requests, UNMAP_WINDOW, lba))
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn zeroes(disk: &Disk, range: &Transfer, allocate: bool) -> DeviceRequest {
    DeviceRequest::WriteZeroes {
        offset_bytes: disk.offset(range.lba),
        length_bytes: range.blocks * disk.block_bytes(),
        allocate,
        fua: false,
    }
}

/// Zeroes a range. What stays allocated is written in pieces, each of which may take its time.
fn zero(disk: &Disk, range: &Transfer, unmap: bool) -> Begun {
    if unmap {
        return change(vec![zeroes(disk, range, false)], 1, range.lba);
    }
    let end = disk.offset(range.lba) + range.blocks * disk.block_bytes();
    let mut next = disk.offset(range.lba);
    let pieces = std::iter::from_fn(move || {
        let offset_bytes = next;
        next = ((next / ZERO_BYTES + 1) * ZERO_BYTES).min(end);
        (offset_bytes < end).then_some(DeviceRequest::WriteZeroes {
            offset_bytes,
            length_bytes: next - offset_bytes,
            allocate: true,
            fua: false,
        })
    });
    Begun::Job(Box::new(ChangeJob {
        requests: pieces,
        window: SAME_WINDOW,
        lba: range.lba,
    }))
}

fn change(requests: Vec<DeviceRequest>, window: usize, lba: u64) -> Begun {
    if requests.is_empty() {
        return Begun::Done(Answer::good());
    }
    Begun::Job(Box::new(ChangeJob {
        requests: requests.into_iter(),
        window,
        lba,
    }))
}

/// WRITE SAME(10), (16) (SBC-3 §5.41, §5.42).
pub(super) fn write_same(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let mut range = Transfer::decode(cdb)?;
    let (anchor, unmap) = (cdb.bit(1, 4), cdb.bit(1, 3));
    // NDOB exists in the 16-byte form only; LBDATA and PBDATA are obsolete.
    let no_data = cdb.u8(0) == 0x93 && cdb.bit(1, 0);
    if anchor {
        // With UNMAP 0 it is wrong in itself (table 108), with UNMAP 1 as ANC_SUP is 0.
        return Err(Sense::cdb_bit(1, 4).into());
    }
    if unmap && !disk.settings.thin {
        return Err(Sense::cdb_bit(1, 3).into());
    }
    if cdb.bit(1, 2) || cdb.bit(1, 1) {
        return Err(Sense::cdb_bit(1, 2).into());
    }
    disk.check_range(&range, false)?;
    if range.blocks == 0 {
        // WSNZ is 0: to the end of the medium.
        range.blocks = disk.blocks() - range.lba;
    }
    let block = if no_data {
        Bytes::new()
    } else {
        // Exactly one block; what is checked by length catches initiators that got their size wrong.
        let missing_for_unmap = unmap && data.is_empty();
        if !missing_for_unmap && length_of(data) != disk.block_bytes() {
            return Err(Sense::cdb(range.length_at).into());
        }
        joined(data, disk.block_bytes() as usize)
    };
    if range.blocks == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    // With UNMAP whatever the data: SBC-3 §4.7.3.4.4 would have data that are not zeros written, but tgt and
    // LIO do not, and libiscsi's suite (WriteSame10.UnmapUntilEnd) insists.
    if unmap || block.iter().all(|byte| *byte == 0) {
        return Ok(zero(disk, &range, unmap));
    }
    Ok(Begun::Job(Box::new(ChangeJob {
        requests: Pattern::new(
            disk.offset(range.lba),
            range.blocks * disk.block_bytes(),
            &block,
        ),
        window: SAME_WINDOW,
        lba: range.lba,
    })))
}

/// Writes that repeat a pattern over a range.
pub(super) struct Pattern {
    next: u64,
    end: u64,
    /// The pattern, repeated up to [`SAME_BYTES`].
    run: Bytes,
    /// Length of the pattern.
    period: u64,
}

impl Pattern {
    /// From an offset, over so many bytes; the pattern begins at the start of the range.
    pub(super) fn new(offset: u64, length: u64, pattern: &Bytes) -> Pattern {
        let period = pattern.len().max(1) as u64;
        let repeats = (SAME_BYTES / period).max(1).min(length.div_ceil(period));
        let mut run = BytesMut::with_capacity((repeats * period) as usize);
        for _ in 0..repeats {
            run.extend_from_slice(pattern);
        }
        Pattern {
            next: offset,
            end: offset + length,
            run: run.freeze(),
            period,
        }
    }
}

impl Iterator for Pattern {
    type Item = DeviceRequest;

    fn next(&mut self) -> Option<DeviceRequest> {
        if self.next >= self.end || self.run.is_empty() {
            return None;
        }
        debug_assert!((self.run.len() as u64).is_multiple_of(self.period));
        let length = (self.end - self.next).min(self.run.len() as u64);
        let offset_bytes = self.next;
        self.next += length;
        Some(DeviceRequest::Write {
            offset_bytes,
            data: self.run.slice(..length as usize),
            fua: false,
        })
    }
}

/// GET LBA STATUS (SBC-3 §5.4).
pub(super) fn lba_status(disk: &Disk, cdb: &Cdb) -> Begin {
    let lba = cdb.u64(2);
    let allocation = cdb.u32(10);
    if lba >= disk.blocks() {
        return Err(Sense::out_of_range(lba).into());
    }
    if allocation < 24 {
        // "A value less than 24" makes no room for one descriptor: what there is room for is sent.
        let data = vec![0; 8];
        return Ok(Begun::Done(Answer::data(data, u64::from(allocation))));
    }
    Ok(Begun::Job(Box::new(StatusJob {
        lba,
        blocks: disk.blocks() - lba,
        block_bytes: disk.block_bytes(),
        allocation,
        thin: disk.settings.thin,
        asked: false,
    })))
}

/// Extents become provisioning states.
struct StatusJob {
    lba: u64,
    blocks: u64,
    block_bytes: u64,
    allocation: u32,
    thin: bool,
    asked: bool,
}

impl Job for StatusJob {
    fn next(&mut self, mut results: Vec<DeviceResult>) -> Next {
        if !self.asked {
            self.asked = true;
            return Next::Submit(vec![DeviceRequest::Extents {
                offset_bytes: self.lba * self.block_bytes,
                length_bytes: self.blocks * self.block_bytes,
            }]);
        }
        match results.pop() {
            Some(Ok(DeviceReply::Extents(extents))) => {
                let runs = extents
                    .iter()
                    .map(|it| (it.length_bytes, it.allocated || !self.thin));
                let data = self.encode(runs);
                Next::Done(Ok(Answer::data(data, u64::from(self.allocation))))
            }
            Some(Err(error)) => Next::fail(device_failure(error, false, self.lba)),
            _ => Next::fail(internal_failure()),
        }
    }
}

impl StatusJob {
    /// Descriptors of runs; a block of which a part is mapped is mapped.
    fn encode(&self, runs: impl Iterator<Item = (u64, bool)>) -> Vec<u8> {
        let most = (self.allocation as usize - 8) / 16;
        let mut descriptors: Vec<(u64, u64, bool)> = Vec::new();
        let mut at = 0;
        let mut lba = self.lba;
        for (bytes, mapped) in runs {
            at += bytes;
            let end = self.lba
                + match mapped {
                    true => at.div_ceil(self.block_bytes),
                    false => at / self.block_bytes,
                };
            let end = end.min(self.lba + self.blocks);
            while lba < end && descriptors.len() < most {
                let blocks = (end - lba).min(u64::from(u32::MAX));
                match descriptors.last_mut() {
                    Some(last) if last.2 == mapped && last.1 + blocks <= u64::from(u32::MAX) => {
                        last.1 += blocks;
                    }
                    _ => descriptors.push((lba, blocks, mapped)),
                }
                lba += blocks;
            }
        }
        let mut data = (4 + 16 * descriptors.len() as u32).to_be_bytes().to_vec();
        data.extend([0; 4]);
        for (lba, blocks, mapped) in descriptors {
            data.extend(lba.to_be_bytes());
            data.extend((blocks as u32).to_be_bytes());
            data.extend([u8::from(!mapped), 0, 0, 0]);
        }
        data
    }
}
