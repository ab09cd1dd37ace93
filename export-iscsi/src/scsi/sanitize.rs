//! SANITIZE (SBC-3 §4.11, §5.22): an operation of the logical unit, not of a task; it goes on whatever
//! happens to the task, the session or other commands.

use bytes::Bytes;
use pss_core::volume::device::{DeviceRequest, DeviceResult};

use super::cdb::Cdb;
use super::job::{Answer, Begin, Begun, joined, length_of};
use super::provision::Pattern;
use super::sense::{Asc, Sense, SenseKey, device_failure};
use super::unit::Disk;

/// Bytes that are erased in one request.
const ERASE_BYTES: u64 = 1 << 30;
/// Writes under way at once.
const WINDOW: usize = 8;

/// Whether a unit is being sanitized.
pub(super) enum SanitizeState {
    /// No.
    Idle,
    /// Yes.
    Running(Sanitize),
    /// The last attempt failed; only another one, or EXIT FAILURE MODE, helps.
    Failed,
}

impl SanitizeState {
    /// Refuses commands that may not run meanwhile.
    ///
    /// # Errors
    /// SANITIZE IN PROGRESS with how far it is, or SANITIZE COMMAND FAILED.
    pub(super) fn check(&self) -> Result<(), Sense> {
        match self {
            SanitizeState::Idle => Ok(()),
            SanitizeState::Running(sanitize) => {
                let mut sense = Sense::new(SenseKey::NotReady, Asc::SANITIZE_IN_PROGRESS);
                sense.progress = Some(sanitize.progress());
                Err(sense)
            }
            SanitizeState::Failed => Err(Sense::new(
                SenseKey::MediumError,
                Asc::SANITIZE_COMMAND_FAILED,
            )),
        }
    }
}

/// A sanitize operation.
pub(super) struct Sanitize {
    passes: Vec<Pass>,
    size_bytes: u64,
    passes_total: u64,
    unrestricted: bool,
    /// Of the current pass.
    next: u64,
}

/// One pass over the disk.
enum Pass {
    Erase,
    Overwrite(Bytes),
}

/// What comes next.
pub(super) enum Step {
    /// These requests.
    Submit(Vec<DeviceRequest>),
    /// It is done.
    Done,
    /// It failed; whether the unit may be used all the same (AUSE).
    Failed(Sense, bool),
}

impl Sanitize {
    fn progress(&self) -> u16 {
        let done = self.passes_total - self.passes.len() as u64;
        let total = u128::from(self.passes_total) * u128::from(self.size_bytes.max(1));
        let position = u128::from(done) * u128::from(self.size_bytes) + u128::from(self.next);
        (position * 65536 / total).min(65535) as u16
    }

    /// Goes on with the results of the last step.
    pub(super) fn step(&mut self, results: Vec<DeviceResult>) -> Step {
        if let Some(error) = results.into_iter().find_map(Result::err) {
            let sense = match device_failure(error, true, 0) {
                super::sense::Failure::Sense(sense) => sense,
                super::sense::Failure::Status(_) => {
                    Sense::new(SenseKey::MediumError, Asc::SANITIZE_COMMAND_FAILED)
                }
            };
            return Step::Failed(sense, self.unrestricted);
        }
        while let Some(pass) = self.passes.last() {
            if self.next < self.size_bytes {
                let requests = pass.requests(self.next, self.size_bytes);
                self.next += requests.1;
                return Step::Submit(requests.0);
            }
            self.passes.pop();
            self.next = 0;
        }
        Step::Done
    }
}

impl Pass {
    /// The next requests from an offset, and how many bytes they cover.
    fn requests(&self, from: u64, size_bytes: u64) -> (Vec<DeviceRequest>, u64) {
        match self {
            Pass::Erase => {
                let length_bytes = ERASE_BYTES.min(size_bytes - from);
                let request = DeviceRequest::WriteZeroes {
                    offset_bytes: from,
                    length_bytes,
                    allocate: false,
                    fua: true,
                };
                (vec![request], length_bytes)
            }
            Pass::Overwrite(block) => {
                let length = ((WINDOW as u64) << 20).min(size_bytes - from);
                (Pattern::new(from, length, block).collect(), length)
            }
        }
    }
}

/// SANITIZE. What is wrong with the parameter list is told as INVALID FIELD IN CDB or PARAMETER LIST.
pub(super) fn sanitize(disk: &Disk, cdb: &Cdb, data: &[Bytes]) -> Begin {
    let immediate = cdb.bit(1, 7);
    let length = usize::from(cdb.u16(7));
    let action = cdb.u8(1) & 0x1f;
    let passes = match action {
        0x01 => overwrite_passes(disk, length, data)?,
        _ if length != 0 => return Err(Sense::cdb(7).into()),
        0x02 => vec![Pass::Erase],
        // EXIT FAILURE MODE is carried out by the caller, who may change the unit.
        0x1f => return Ok(Begun::Done(Answer::good())),
        _ => return Err(Sense::cdb_bit(1, 4).into()),
    };
    Ok(Begun::Sanitize(
        Sanitize {
            passes_total: passes.len() as u64,
            passes,
            size_bytes: disk.blocks() * disk.block_bytes(),
            unrestricted: cdb.bit(1, 5),
            next: 0,
        },
        immediate,
    ))
}

/// OVERWRITE's parameter list (SBC-3 §5.22.2.2). Passes are taken from the end.
fn overwrite_passes(disk: &Disk, length: usize, data: &[Bytes]) -> Result<Vec<Pass>, Sense> {
    let block_bytes = disk.block_bytes() as usize;
    if !(5..=block_bytes + 4).contains(&length) || length_of(data) < length as u64 {
        return Err(Sense::cdb(7));
    }
    let list = joined(data, length);
    let (invert, test) = (list[0] >> 7 == 1, list[0] >> 5 & 3);
    let count = list[0] & 0x1f;
    if test != 0 {
        return Err(Sense::parameter(0));
    }
    if count == 0 {
        return Err(Sense::parameter(0));
    }
    let pattern_bytes = usize::from(u16::from_be_bytes([list[2], list[3]]));
    if pattern_bytes == 0 || pattern_bytes > block_bytes || pattern_bytes != length - 4 {
        return Err(Sense::parameter(2));
    }
    // The pattern is repeated within each block.
    let block: Vec<u8> = list[4..]
        .iter()
        .copied()
        .cycle()
        .take(block_bytes)
        .collect();
    let block = Bytes::from(block);
    let inverted: Bytes = block.iter().map(|byte| !byte).collect::<Vec<u8>>().into();
    Ok((0..count)
        .map(|pass| {
            // Counted from the end: the last pass writes the pattern as it is.
            let turned = invert && pass % 2 == 1;
            Pass::Overwrite(if turned {
                inverted.clone()
            } else {
                block.clone()
            })
        })
        .collect())
}
