//! The one interface between the front ends (NBD, iSCSI, FUSE) and the volumes.
//!
//! A request is submitted with a [`Completion`]; its result arrives in the [`CompletionQueue`] that the
//! front end made, many at a time, so that a connection with a hundred requests in flight takes one
//! lock and one wake-up for a batch.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::volume::reservation::{ReservationReply, ReservationRequest};

/// A virtual disk.
///
/// Requests run concurrently. A request that overlaps another one in flight may take effect before or
/// after it, per 4 KiB block; a block is never a mix of two requests' bytes beyond what each wrote.
/// A write is answered when it is durable on a majority of the servers; hence `flush` has nothing to
/// do and `fua` changes nothing.
pub trait BlockDevice: Send + Sync {
    /// What it is now.
    fn info(&self) -> DeviceInfo;
    /// Starts a request. Never blocks; a request that cannot be started completes with an error.
    fn submit(&self, request: DeviceRequest, done: Completion);
    /// Has `listener` called after a change of [`BlockDevice::info`] or [`BlockDevice::fate`], until it
    /// returns false.
    fn watch(&self, listener: Box<dyn Fn() -> bool + Send + Sync>);
    /// Whether the device can still be used.
    fn fate(&self) -> Fate;

    /// As [`BlockDevice::submit`], for a request that was found to be allowed under that version of the
    /// volume's reservations, 0 if there never were any. It fails with [`DeviceError::ReservationChanged`] if
    /// others hold by the time it is its turn.
    fn submit_checked(&self, request: DeviceRequest, reservations: u64, done: Completion) {
        let _ = reservations;
        self.submit(request, done);
    }

    /// Asks for, or changes, the volume's reservations. `None` if that is not possible: the device has
    /// none, or the cell cannot be reached in time (whether it was done is open then). Requests are carried out
    /// in the order of the calls, whenever their futures are polled.
    fn reserve(&self, request: ReservationRequest) -> BoxFuture<'static, Option<ReservationReply>> {
        let _ = request;
        Box::pin(std::future::ready(None))
    }

    /// Says whether somebody uses a device that was opened with [`Volumes::open_unused`]: while it is in use, the
    /// volume is attached.
    fn set_in_use(&self, in_use: bool) {
        let _ = in_use;
    }

    /// Version of the volume's reservations, as far as is known here; listeners are told when it changes.
    fn reservations_version(&self) -> u64 {
        0
    }
}

/// Facts about a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeviceInfo {
    /// Name of the volume.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Smallest addressable unit, bytes; 1 here: any alignment is served.
    pub minimum_block_bytes: u32,
    /// Unit below which a request costs more, bytes.
    pub preferred_block_bytes: u32,
    /// Identity, stable over renames and gateways.
    pub uuid: [u8; 16],
}

/// Whether a device can still be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    /// Yes.
    Alive,
    /// The volume was deleted.
    Deleted,
    /// The session was fenced: its requests that were in flight may or may not have taken effect.
    Fenced,
}

/// A request to a device. Offsets and lengths are bytes of any alignment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DeviceRequest {
    /// Reads; answered by [`DeviceReply::Data`].
    Read {
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u32,
    },
    /// Writes; `fua` asks for durability before the answer, which PSS gives always.
    Write {
        /// To.
        offset_bytes: u64,
        /// What.
        data: Bytes,
        /// Forced unit access.
        fua: bool,
    },
    /// Makes a range read as zeros.
    WriteZeroes {
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
        /// Keep space allocated.
        allocate: bool,
        /// Forced unit access.
        fua: bool,
    },
    /// Says that the content of a range is no longer needed. Whole 4 KiB blocks of it read as zeros
    /// afterwards; the rest is left alone.
    Trim {
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
        /// Forced unit access.
        fua: bool,
    },
    /// Everything answered before is durable when this is answered.
    Flush,
    /// Asks the servers how the volume is. When this is answered, [`BlockDevice::info`] and
    /// [`BlockDevice::fate`] hold whatever was answered to anyone before it was asked; and so does the version
    /// of the reservations, with which [`BlockDevice::submit_checked`] compares.
    Look,
    /// Writes `write` if the present content is `expected`, in one step.
    CompareAndWrite {
        /// Where.
        offset_bytes: u64,
        /// Must be there.
        expected: Bytes,
        /// Same length.
        write: Bytes,
    },
    /// Which parts are allocated; answered by [`DeviceReply::Extents`], which covers a part of the
    /// range from its start.
    Extents {
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
    },
    /// The range will be read soon.
    Prefetch {
        /// From.
        offset_bytes: u64,
        /// How much.
        length_bytes: u64,
    },
}

/// Result of a request that went well.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DeviceReply {
    /// Nothing to say.
    Done,
    /// Consecutive parts that make up the whole range.
    Data(Vec<ReadPart>),
    /// Consecutive extents from the start of the range; neighbours differ.
    Extents(Vec<Extent>),
}

/// Part of what was read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ReadPart {
    /// These bytes.
    Data(Bytes),
    /// So many zeros, which are not allocated.
    Hole(u32),
}

impl ReadPart {
    /// Bytes that it stands for.
    pub fn length_bytes(&self) -> u64 {
        match self {
            ReadPart::Data(data) => data.len() as u64,
            ReadPart::Hole(length) => u64::from(*length),
        }
    }

    /// Bytes that it holds in memory.
    pub fn data_bytes(&self) -> usize {
        match self {
            ReadPart::Data(data) => data.len(),
            ReadPart::Hole(_) => 0,
        }
    }
}

/// A run of a volume that is allocated or not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// Length, bytes.
    pub length_bytes: u64,
    /// Whether it takes space; if not, it reads as zeros.
    pub allocated: bool,
}

/// Result of a request.
pub type DeviceResult = Result<DeviceReply, DeviceError>;

/// Why a request failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// The range ends past the end of the volume.
    #[error("range ends past the end of the volume")]
    OutOfRange,
    /// The request is longer than 32 MiB, or makes no sense.
    #[error("request is not valid")]
    Invalid,
    /// The device is read-only.
    #[error("volume is read-only")]
    ReadOnly,
    /// The servers' disks are full.
    #[error("no space left on the servers")]
    NoSpace,
    /// The content is not what a compare-and-write expected.
    #[error("content differs at byte {0} of the range")]
    Miscompare(u64),
    /// The volume's reservations are not those under which the request was found to be allowed: ask for
    /// them, and again if it still is.
    #[error("reservations of the volume have changed")]
    ReservationChanged,
    /// A SCSI initiator has reserved the volume.
    #[error("volume is reserved by a SCSI initiator")]
    Reserved,
    /// The volume was deleted.
    #[error("volume was deleted")]
    Deleted,
    /// The session was fenced.
    #[error("session was fenced: the cell did not hear from it for too long")]
    Fenced,
    /// No leader answered within the limit. A write may or may not have taken effect.
    #[error("no majority of the servers answered in time")]
    Unavailable,
    /// Every copy of a block is bad, or another failure of storage.
    #[error("storage failed")]
    Io,
}

/// Where results arrive.
pub struct CompletionQueue {
    results: Mutex<Vec<(u64, DeviceResult)>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl CompletionQueue {
    /// `wake` is called when the queue stops being empty, by any thread; it must not block.
    pub fn new(wake: Box<dyn Fn() + Send + Sync>) -> Arc<CompletionQueue> {
        Arc::new(CompletionQueue {
            results: Mutex::default(),
            wake,
        })
    }

    /// A completion whose result will carry `cookie`.
    pub fn completion(self: &Arc<Self>, cookie: u64) -> Completion {
        Completion {
            queue: Some(Arc::clone(self)),
            cookie,
        }
    }

    /// Moves all results into `into`, which should be empty.
    pub fn take(&self, into: &mut Vec<(u64, DeviceResult)>) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if into.is_empty() {
            std::mem::swap(&mut *results, into);
        } else {
            into.append(&mut results);
        }
    }

    fn push(&self, cookie: u64, result: DeviceResult) {
        let was_empty = {
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            results.push((cookie, result));
            results.len() == 1
        };
        if was_empty {
            (self.wake)();
        }
    }
}

/// Delivers the result of one request. Dropped without a result, it delivers
/// [`DeviceError::Unavailable`], so no request is ever forgotten.
pub struct Completion {
    queue: Option<Arc<CompletionQueue>>,
    cookie: u64,
}

impl Completion {
    /// Delivers the result.
    pub fn complete(mut self, result: DeviceResult) {
        if let Some(queue) = self.queue.take() {
            queue.push(self.cookie, result);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.push(self.cookie, Err(DeviceError::Unavailable));
        }
    }
}

/// A future behind a pointer.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The volumes that can be opened.
pub trait Volumes: Send + Sync {
    /// All volumes, by name.
    fn list(&self) -> BoxFuture<'_, Result<Vec<DeviceInfo>, DeviceError>>;
    /// Opens a volume; an empty name opens the default one (the only volume, or none).
    ///
    /// # Errors
    /// `Ok(None)` if there is no such volume; [`DeviceError::Unavailable`] if the cell cannot be asked.
    fn open<'a>(
        &'a self,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn BlockDevice>>, DeviceError>>;

    /// As [`Volumes::open`], but the volume is attached only while [`BlockDevice::set_in_use`] says so: nobody has
    /// it yet, and it can be deleted and made smaller like one that is not open.
    ///
    /// # Errors
    /// As [`Volumes::open`].
    fn open_unused<'a>(
        &'a self,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn BlockDevice>>, DeviceError>> {
        self.open(name)
    }
}
