//! Commands that read, write and compare blocks (SBC-3 §5).

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use pss_core::volume::device::{DeviceError, DeviceReply, DeviceRequest, DeviceResult};

use super::actions::Status;
use super::cdb::{Cdb, Transfer};
use super::inquiry::{ATOMIC_BYTES_MAX, COMPARE_BLOCKS_MAX};
use super::job::{
    Answer, Begin, Begun, ChangeJob, Job, Next, ReadJob, internal_failure, joined, joined_read,
    length_of,
};
use super::sense::{Asc, Failure, Sense, SenseKey, device_failure};
use super::unit::Disk;

/// Blocks of the cell; writes are cut at their boundaries only.
const CELL_BLOCK: u64 = 4096;
/// Parts of data-out shorter than this on average are copied together.
const PART_BYTES_MIN: u64 = 64 << 10;
/// Bytes that are read back, compared or merged in one step.
const STEP_BYTES: u64 = 1 << 20;
/// Bytes that ORWRITE merges in one compare-and-write.
const OR_BYTES: u64 = 512 << 10;
/// How often ORWRITE begins anew because another write came between.
const OR_ATTEMPTS_MAX: u32 = 100;

/// READ(6), (10), (12), (16).
pub(super) fn read(disk: &Disk, cdb: &Cdb) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, true)?;
    if transfer.blocks == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    let length = transfer.blocks * disk.block_bytes();
    Ok(Begun::Job(Box::new(ReadJob {
        request: Some(DeviceRequest::Read {
            offset_bytes: disk.offset(transfer.lba),
            length_bytes: length as u32,
        }),
        lba: transfer.lba,
        length,
    })))
}

/// What of a WRITE has data: initiators may announce less than the CDB says (RFC 7143 §11.4.5.1), and get
/// a residual; whole blocks of what came are written.
fn blocks_with_data(disk: &Disk, transfer: &Transfer, data: &[Bytes]) -> u64 {
    transfer.blocks.min(length_of(data) / disk.block_bytes())
}

/// WRITE(6), (10), (12), (16).
pub(super) fn write(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, true)?;
    let length = blocks_with_data(disk, &transfer, data) * disk.block_bytes();
    let requests = writes(disk.offset(transfer.lba), data, length, transfer.fua);
    Ok(change(requests, transfer.lba))
}

fn change(requests: Vec<DeviceRequest>, lba: u64) -> Begun {
    if requests.is_empty() {
        return Begun::Done(Answer::good());
    }
    Begun::Job(Box::new(ChangeJob {
        window: requests.len(),
        requests: requests.into_iter(),
        lba,
    }))
}

/// Requests that write the first `length` bytes of data-out, without copying it where its parts end at
/// boundaries of the cell's blocks.
fn writes(start: u64, data: &[Bytes], length: u64, fua: bool) -> Vec<DeviceRequest> {
    let mut requests = Vec::new();
    let mut push = |offset_bytes, data: Bytes| {
        if !data.is_empty() {
            requests.push(DeviceRequest::Write {
                offset_bytes,
                data,
                fua,
            });
        }
    };
    if data.len() <= 1 || length / (data.len() as u64) < PART_BYTES_MIN {
        push(start, joined(data, length as usize));
        return requests;
    }
    let mut left = length;
    let mut at = start;
    let mut head = BytesMut::new();
    for part in data {
        let mut part = part.slice(..part.len().min(left as usize));
        left -= part.len() as u64;
        // Bytes up to the last boundary go now; the rest is joined with the next part.
        let end = at + head.len() as u64 + part.len() as u64;
        let boundary = if left == 0 {
            end
        } else {
            end / CELL_BLOCK * CELL_BLOCK
        };
        if boundary <= at {
            head.extend_from_slice(&part);
            continue;
        }
        let tail = part.split_off(part.len() - ((end - boundary) as usize).min(part.len()));
        if head.is_empty() {
            push(at, part);
        } else {
            // Complete the block that two parts share, then go on without copying.
            let first = ((at + CELL_BLOCK) / CELL_BLOCK * CELL_BLOCK).min(boundary) - at;
            let first = (first as usize).saturating_sub(head.len()).min(part.len());
            head.extend_from_slice(&part.split_to(first));
            let merged = std::mem::take(&mut head).freeze();
            let next = at + merged.len() as u64;
            push(at, merged);
            push(next, part);
        }
        at = boundary;
        head.extend_from_slice(&tail);
    }
    push(at, head.freeze());
    requests
}

/// WRITE ATOMIC(16) (SBC-4 §5.48): one log entry.
pub(super) fn write_atomic(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    if cdb.u16(10) != 0 {
        // No ATOMIC BOUNDARY: MAXIMUM ATOMIC TRANSFER LENGTH WITH BOUNDARY is 0.
        return Err(Sense::cdb(10).into());
    }
    disk.check_range(&transfer, true)?;
    let length = transfer.blocks * disk.block_bytes();
    if length > ATOMIC_BYTES_MAX {
        return Err(Sense::cdb(transfer.length_at).into());
    }
    if length_of(data) < length {
        // Half of it would not be atomic.
        return Err(Sense::cdb(transfer.length_at).into());
    }
    let requests = match length {
        0 => Vec::new(),
        _ => vec![DeviceRequest::Write {
            offset_bytes: disk.offset(transfer.lba),
            data: joined(data, length as usize),
            fua: transfer.fua,
        }],
    };
    Ok(change(requests, transfer.lba))
}

/// BYTCHK (SBC-3 §5.30).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ByteCheck {
    /// The medium is read, nothing is compared.
    Medium,
    /// Compared with as much data-out.
    All,
    /// Every block is compared with the one that was sent.
    OneBlock,
}

impl ByteCheck {
    fn decode(cdb: &Cdb) -> Result<ByteCheck, Sense> {
        match cdb.u8(1) >> 1 & 3 {
            0 => Ok(ByteCheck::Medium),
            1 => Ok(ByteCheck::All),
            3 => Ok(ByteCheck::OneBlock),
            _ => Err(Sense::cdb_bit(1, 2)),
        }
    }
}

/// VERIFY(10), (12), (16). Data-out that is wanted, bytes, and how it begins.
pub(super) fn verify(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    let check = ByteCheck::decode(cdb)?;
    disk.check_range(&transfer, true)?;
    let wanted = verify_out_bytes(disk, cdb);
    if length_of(data) < wanted {
        return Err(Sense::cdb(transfer.length_at).into());
    }
    let compare = compare(disk, &transfer, check, data, transfer.blocks);
    Ok(start_compare(compare))
}

/// Data-out that a VERIFY wants.
pub(super) fn verify_out_bytes(disk: &Disk, cdb: &Cdb) -> u64 {
    match (Transfer::decode(cdb), ByteCheck::decode(cdb)) {
        (Ok(transfer), Ok(ByteCheck::All)) => transfer.blocks.saturating_mul(disk.block_bytes()),
        (Ok(transfer), Ok(ByteCheck::OneBlock)) if transfer.blocks > 0 => disk.block_bytes(),
        _ => 0,
    }
}

fn compare(
    disk: &Disk,
    transfer: &Transfer,
    check: ByteCheck,
    data: &[Bytes],
    blocks: u64,
) -> CompareJob {
    let block_bytes = disk.block_bytes();
    let start = disk.offset(transfer.lba);
    let length = blocks * block_bytes;
    CompareJob {
        writes: Vec::new(),
        expected: match check {
            ByteCheck::Medium => Expected::Anything,
            ByteCheck::All => Expected::These(joined(data, length as usize)),
            ByteCheck::OneBlock => Expected::Repeated(joined(data, block_bytes as usize)),
        },
        start,
        next: start,
        end: start + length,
        step: 0,
        lba: transfer.lba,
    }
}

fn start_compare(job: CompareJob) -> Begun {
    if job.next == job.end && job.writes.is_empty() {
        return Begun::Done(Answer::good());
    }
    Begun::Job(Box::new(job))
}

/// WRITE AND VERIFY(10), (12), (16).
pub(super) fn write_and_verify(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    let check = match ByteCheck::decode(cdb)? {
        // BYTCHK has one bit that counts here (SBC-3 §5.42).
        ByteCheck::OneBlock => return Err(Sense::cdb_bit(1, 2).into()),
        check => check,
    };
    disk.check_range(&transfer, true)?;
    let blocks = blocks_with_data(disk, &transfer, data);
    let mut job = compare(disk, &transfer, check, data, blocks);
    job.writes = writes(job.start, data, job.end - job.start, true);
    Ok(start_compare(job))
}

enum Expected {
    Anything,
    These(Bytes),
    Repeated(Bytes),
}

/// Writes, then reads back in steps and compares.
struct CompareJob {
    writes: Vec<DeviceRequest>,
    expected: Expected,
    start: u64,
    /// What is not read yet, from here.
    next: u64,
    end: u64,
    /// Bytes that are being read, before `next`.
    step: u64,
    lba: u64,
}

impl Job for CompareJob {
    fn next(&mut self, results: Vec<DeviceResult>) -> Next {
        if !self.writes.is_empty() {
            return Next::Submit(std::mem::take(&mut self.writes));
        }
        for result in results {
            match result {
                Ok(DeviceReply::Data(parts)) => {
                    let at = self.next - self.step - self.start;
                    let found = joined_read(&parts, self.step as usize);
                    if let Some(differs) = self.expected.first_difference(at, &found) {
                        return Next::fail(device_failure(
                            DeviceError::Miscompare(differs),
                            false,
                            self.lba,
                        ));
                    }
                }
                Ok(_) => {}
                Err(error) => return Next::fail(device_failure(error, self.step == 0, self.lba)),
            }
        }
        if self.next == self.end {
            return Next::good();
        }
        self.step = STEP_BYTES.min(self.end - self.next);
        let offset_bytes = self.next;
        self.next += self.step;
        Next::Submit(vec![DeviceRequest::Read {
            offset_bytes,
            length_bytes: self.step as u32,
        }])
    }
}

impl Expected {
    /// Where what was found at `at` differs, from the start of the range.
    fn first_difference(&self, at: u64, found: &[u8]) -> Option<u64> {
        let from = at as usize;
        let position = match self {
            Expected::Anything => None,
            Expected::These(expected) => {
                let expected = expected.get(from..from + found.len()).unwrap_or(&[]);
                if expected == found {
                    None
                } else {
                    let same = expected.iter().zip(found).position(|(a, b)| a != b);
                    Some(same.unwrap_or(expected.len()))
                }
            }
            Expected::Repeated(block) => found
                .chunks(block.len().max(1))
                .enumerate()
                .find(|(_, chunk)| *chunk != &block[..chunk.len()])
                .map(|(index, chunk)| {
                    let within = chunk.iter().zip(block).position(|(a, b)| a != b);
                    index * block.len() + within.unwrap_or(0)
                }),
        };
        position.map(|position| at + position as u64)
    }
}

/// COMPARE AND WRITE (SBC-3 §5.2): one step in the cell.
pub(super) fn compare_and_write(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, true)?;
    if transfer.blocks > COMPARE_BLOCKS_MAX {
        return Err(Sense::cdb(13).into());
    }
    let length = (transfer.blocks * disk.block_bytes()) as usize;
    if length_of(data) != 2 * length as u64 {
        return Err(Sense::cdb(13).into());
    }
    if length == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    let mut expected = joined(data, 2 * length);
    let write = expected.split_off(length);
    let request = DeviceRequest::CompareAndWrite {
        offset_bytes: disk.offset(transfer.lba),
        expected,
        write,
    };
    Ok(change(vec![request], transfer.lba))
}

/// ORWRITE(16) (SBC-3 §5.10).
pub(super) fn or_write(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, true)?;
    let length = blocks_with_data(disk, &transfer, data) * disk.block_bytes();
    if length == 0 {
        return Ok(Begun::Done(Answer::good()));
    }
    let start = disk.offset(transfer.lba);
    let mut pieces = VecDeque::new();
    let mut rest = joined(data, length as usize);
    let mut at = start;
    while !rest.is_empty() {
        let boundary = (at / OR_BYTES + 1) * OR_BYTES;
        let piece = rest.split_to(rest.len().min((boundary - at) as usize));
        let offset = at;
        at += piece.len() as u64;
        pieces.push_back((offset, piece));
    }
    Ok(Begun::Job(Box::new(OrJob {
        pieces,
        merged: false,
        attempts: 0,
        lba: transfer.lba,
    })))
}

/// Reads a piece, and writes it merged if it is still the same; else again.
struct OrJob {
    pieces: VecDeque<(u64, Bytes)>,
    /// A compare-and-write of the first piece is under way, not a read.
    merged: bool,
    attempts: u32,
    lba: u64,
}

impl OrJob {
    fn read(&self) -> Next {
        let Some((offset_bytes, piece)) = self.pieces.front() else {
            return Next::good();
        };
        Next::Submit(vec![DeviceRequest::Read {
            offset_bytes: *offset_bytes,
            length_bytes: piece.len() as u32,
        }])
    }
}

impl Job for OrJob {
    fn next(&mut self, mut results: Vec<DeviceResult>) -> Next {
        let Some(result) = results.pop() else {
            return self.read();
        };
        match result {
            Ok(DeviceReply::Data(parts)) if !self.merged => {
                let Some((offset_bytes, piece)) = self.pieces.front() else {
                    return Next::fail(internal_failure());
                };
                let expected = joined_read(&parts, piece.len());
                let write: Vec<u8> = expected.iter().zip(piece).map(|(a, b)| a | b).collect();
                self.merged = true;
                Next::Submit(vec![DeviceRequest::CompareAndWrite {
                    offset_bytes: *offset_bytes,
                    expected,
                    write: write.into(),
                }])
            }
            Ok(_) => {
                self.pieces.pop_front();
                self.merged = false;
                self.attempts = 0;
                self.read()
            }
            Err(DeviceError::Miscompare(_)) if self.attempts < OR_ATTEMPTS_MAX => {
                self.attempts += 1;
                self.merged = false;
                self.read()
            }
            Err(DeviceError::Miscompare(_)) => Next::fail(Failure::Status(Status::Busy)),
            Err(error) => Next::fail(device_failure(error, self.merged, self.lba)),
        }
    }
}

/// PRE-FETCH(10), (16): GOOD, not CONDITION MET, which would say that all is in a cache of ours.
pub(super) fn pre_fetch(disk: &Disk, cdb: &Cdb) -> Begin {
    let mut transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, false)?;
    if transfer.blocks == 0 {
        transfer.blocks = disk.blocks() - transfer.lba;
    }
    let request = DeviceRequest::Prefetch {
        offset_bytes: disk.offset(transfer.lba),
        length_bytes: transfer.blocks * disk.block_bytes(),
    };
    Ok(change(vec![request], transfer.lba))
}

/// SYNCHRONIZE CACHE(10), (16).
pub(super) fn synchronize_cache(disk: &Disk, cdb: &Cdb) -> Begin {
    let transfer = Transfer::decode(cdb)?;
    disk.check_range(&transfer, false)?;
    Ok(change(vec![DeviceRequest::Flush], transfer.lba))
}

/// Refuses what would change the medium if it may not be changed.
///
/// # Errors
/// DATA PROTECT.
pub(super) fn check_writable(disk: &Disk, software_protected: bool) -> Result<(), Sense> {
    let protect = |asc| Err(Sense::new(SenseKey::DataProtect, asc));
    if disk.is_read_only() {
        return protect(Asc::WRITE_PROTECTED);
    }
    if software_protected {
        return protect(Asc::SOFTWARE_WRITE_PROTECTED);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn data_out_in_parts_is_written_whole(
            start in 0..20u64,
            parts in prop::collection::vec(1..300usize, 1..6),
            short in 0..3u64,
        ) {
            // Units of 512 bytes; parts are large so that they are not simply joined.
            let start = start * 512;
            let mut byte = 0u8;
            let parts: Vec<Bytes> = parts
                .into_iter()
                .map(|blocks| {
                    let bytes: Vec<u8> = (0..blocks * 512)
                        .map(|_| {
                            byte = byte.wrapping_mul(5).wrapping_add(3);
                            byte
                        })
                        .collect();
                    Bytes::from(bytes)
                })
                .collect();
            let length = length_of(&parts).saturating_sub(short * 512);
            let whole = joined(&parts, length as usize);
            let mut at = start;
            let requests = writes(start, &parts, length, true);
            let count = requests.len();
            for (index, request) in requests.into_iter().enumerate() {
                let DeviceRequest::Write { offset_bytes, data, fua: true } = request else {
                    panic!("not a write");
                };
                prop_assert_eq!(offset_bytes, at);
                let from = (at - start) as usize;
                prop_assert_eq!(&data[..], &whole[from..from + data.len()]);
                at += data.len() as u64;
                prop_assert!(index + 1 == count || at % CELL_BLOCK == 0);
            }
            prop_assert_eq!(at, start + length);
        }
    }
}
