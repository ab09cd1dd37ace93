//! How commands are carried out: at once, or as a job that asks the device until it is done.

use bytes::{Bytes, BytesMut};
use pss_core::volume::device::{DeviceReply, DeviceRequest, DeviceResult, ReadPart};
use pss_core::volume::reservation::{ReservationReply, ReservationRequest};

use super::actions::Status;
use super::sense::{Asc, Failure, Sense, SenseKey, device_failure};

/// What a command that ended well is answered.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// GOOD, or CONDITION MET.
    pub(super) status: Option<Status>,
    /// Data-in.
    pub(super) data: Vec<ReadPart>,
    /// Its length.
    pub(super) in_bytes: u64,
}

impl Answer {
    /// GOOD, no data.
    pub(super) fn good() -> Answer {
        Answer::default()
    }

    /// GOOD with data, cut at the allocation length.
    pub(super) fn data(mut data: Vec<u8>, allocation: u64) -> Answer {
        data.truncate(usize::try_from(allocation).unwrap_or(usize::MAX));
        let in_bytes = data.len() as u64;
        Answer {
            status: None,
            data: match in_bytes {
                0 => Vec::new(),
                _ => vec![ReadPart::Data(data.into())],
            },
            in_bytes,
        }
    }
}

/// How a command begins.
pub(super) enum Begun {
    /// It has ended already.
    Done(Answer),
    /// It asks the device.
    Job(Box<dyn Job>),
    /// It goes on as the LUN's sanitize operation.
    Sanitize(super::sanitize::Sanitize, /* immediate: */ bool),
}

/// Result of beginning a command.
pub(super) type Begin = Result<Begun, Failure>;

/// What a job wants next.
pub(super) enum Next {
    /// These requests, all at once; the results come in the same order.
    Submit(Vec<DeviceRequest>),
    /// Requests to disks that need not be the job's own.
    SubmitTo(Vec<(u16, DeviceRequest)>),
    /// A request to the reservations.
    Reserve(ReservationRequest),
    /// It has ended.
    Done(Result<Answer, Failure>),
}

impl Next {
    /// It has ended well.
    pub(super) fn good() -> Next {
        Next::Done(Ok(Answer::good()))
    }

    /// It has failed.
    pub(super) fn fail(failure: impl Into<Failure>) -> Next {
        Next::Done(Err(failure.into()))
    }
}

/// A command that is being carried out.
pub(super) trait Job: Send {
    /// Goes on with the results of what was asked for; the first time with none.
    fn next(&mut self, results: Vec<DeviceResult>) -> Next;

    /// Goes on with the answer of the reservations; `None` if they could not be reached.
    fn reserved(&mut self, _reply: Option<ReservationReply>) -> Next {
        Next::fail(Sense::new(
            SenseKey::HardwareError,
            Asc::INTERNAL_TARGET_FAILURE,
        ))
    }
}

/// One READ.
pub(super) struct ReadJob {
    /// What to read; taken at the start.
    pub(super) request: Option<DeviceRequest>,
    /// For sense data.
    pub(super) lba: u64,
    /// Bytes.
    pub(super) length: u64,
}

impl Job for ReadJob {
    fn next(&mut self, mut results: Vec<DeviceResult>) -> Next {
        if let Some(request) = self.request.take() {
            return Next::Submit(vec![request]);
        }
        Next::Done(match results.pop() {
            Some(Ok(DeviceReply::Data(data))) => Ok(Answer {
                status: None,
                data,
                in_bytes: self.length,
            }),
            Some(Err(error)) => Err(device_failure(error, false, self.lba)),
            _ => Err(internal_failure()),
        })
    }
}

/// Requests that change the disk or prepare for it, all of which must succeed; at most `window` at once.
pub(super) struct ChangeJob<I: Iterator<Item = DeviceRequest> + Send> {
    /// What to do, in this order.
    pub(super) requests: I,
    /// How many may be under way at once.
    pub(super) window: usize,
    /// For sense data.
    pub(super) lba: u64,
}

impl<I: Iterator<Item = DeviceRequest> + Send> Job for ChangeJob<I> {
    fn next(&mut self, results: Vec<DeviceResult>) -> Next {
        if let Some(error) = results.into_iter().find_map(Result::err) {
            return Next::fail(device_failure(error, true, self.lba));
        }
        let batch: Vec<DeviceRequest> = self.requests.by_ref().take(self.window).collect();
        if batch.is_empty() {
            Next::good()
        } else {
            Next::Submit(batch)
        }
    }
}

/// Something the device said makes no sense.
pub(super) fn internal_failure() -> Failure {
    Sense::new(SenseKey::HardwareError, Asc::INTERNAL_TARGET_FAILURE).into()
}

/// Data-out of a command, in the parts that it came in.
pub(super) fn length_of(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

/// The first `length` bytes of data-out, copied only if they lie in several parts.
pub(super) fn joined(parts: &[Bytes], length: usize) -> Bytes {
    match parts {
        [] => Bytes::new(),
        [only, ..] if only.len() >= length => only.slice(..length),
        _ => {
            let mut out = BytesMut::with_capacity(length.min(length_of(parts) as usize));
            for part in parts {
                let take = part.len().min(length - out.len());
                out.extend_from_slice(&part[..take]);
            }
            out.freeze()
        }
    }
}

/// What was read, as one run of bytes.
pub(super) fn joined_read(parts: &[ReadPart], length: usize) -> Bytes {
    if let [ReadPart::Data(only)] = parts {
        return only.clone();
    }
    let mut out = BytesMut::with_capacity(length);
    for part in parts {
        match part {
            ReadPart::Data(data) => out.extend_from_slice(data),
            ReadPart::Hole(zeros) => out.resize(out.len() + *zeros as usize, 0),
        }
    }
    out.freeze()
}
