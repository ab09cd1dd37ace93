//! A volume as a [`BlockDevice`] over the connection to the leader.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::client::driver::{CallError, Handle, Item, Target};
use crate::entry::WRITE_BLOCKS_MAX;
use crate::key::CellId;
use crate::state::{Refusal, Volume};
use crate::types::{BLOCK_BYTES, VolumeId};
use crate::volume::device::{
    BlockDevice, BoxFuture, Completion, DeviceError, DeviceInfo, DeviceReply, DeviceRequest,
    DeviceResult, Extent, Fate, ReadPart,
};
use crate::volume::reservation::{ReservationAction, ReservationReply, ReservationRequest};
use crate::wire::client::{REQUEST_BYTES_MAX, ReplyBody, ReplyError, RequestBody};

/// Longest read or write of a front end: what NBD and iSCSI use at most.
pub const DEVICE_REQUEST_BYTES_MAX: usize = 32 << 20;
/// Parts under way of a range that is zeroed and kept allocated; the range may be a whole volume.
const ZERO_PARTS: usize = 16;

const ALIVE: u8 = 0;
const DELETED: u8 = 1;
const FENCED: u8 = 2;

/// An open volume. Dropping it detaches the volume, if it is in use.
pub(super) struct Device {
    pub(super) state: Arc<DeviceState>,
    handle: Arc<Handle>,
}

/// What is known of an open volume.
pub(super) struct DeviceState {
    pub(super) volume: VolumeId,
    name: String,
    uuid: [u8; 16],
    size_bytes: AtomicU64,
    reservations: AtomicU64,
    fate: AtomicU8,
    /// The cell is to know that it is attached.
    in_use: AtomicBool,
    listeners: Mutex<Vec<Listener>>,
}

type Listener = Arc<dyn Fn() -> bool + Send + Sync>;

impl Device {
    /// A device in use: its `Attach` must follow; or one that nobody uses yet.
    pub(super) fn new(volume: &Volume, handle: Arc<Handle>, in_use: bool) -> Device {
        let state = Arc::new(DeviceState::new(volume, in_use));
        handle.push(Item::Opened(Arc::clone(&state)));
        Device { state, handle }
    }
}

impl Device {
    /// Begins a request, with the version of the reservations under which it is allowed.
    fn start(&self, request: DeviceRequest, reservations: Option<u64>, done: Completion) {
        if self.state.fate() == Fate::Deleted {
            done.complete(Err(DeviceError::Deleted));
            return;
        }
        let size_bytes = self.state.size_bytes.load(Ordering::Acquire);
        match plan(self.state.volume, size_bytes, request) {
            Plan::Now(result) => done.complete(result),
            Plan::One(body) => self.handle.push(Item::Request {
                body: checked(body, reservations),
                target: Target::Device(done),
            }),
            Plan::Parts(mut parts) => {
                parts.reservations = reservations;
                Join::start(parts, done, &self.handle);
            }
            Plan::Look => self.handle.push(Item::Request {
                body: RequestBody::Look {
                    volume: self.state.volume,
                },
                target: Target::Look {
                    device: Arc::clone(&self.state),
                    reservations,
                    done,
                },
            }),
        }
    }
}

/// Has a request carried out, which is on its way when this returns; `None` if there was no answer.
fn call(
    handle: &Handle,
    body: RequestBody,
) -> impl Future<Output = Option<Result<ReplyBody, ReplyError>>> + use<> {
    let (sender, answer) = oneshot::channel();
    let target = Target::Call(sender);
    handle.push(Item::Request { body, target });
    async move {
        match answer.await {
            Ok(Ok(body)) => Some(Ok(body)),
            Ok(Err(CallError::Reply(error))) => Some(Err(error)),
            Ok(Err(CallError::Expired | CallError::Fenced)) | Err(_) => None,
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.handle.push(Item::Closed(Arc::clone(&self.state)));
    }
}

impl DeviceState {
    fn new(volume: &Volume, in_use: bool) -> DeviceState {
        DeviceState {
            volume: volume.id,
            name: volume.name.clone(),
            uuid: volume.uuid,
            size_bytes: AtomicU64::new(volume.size_bytes),
            reservations: AtomicU64::new(0),
            fate: AtomicU8::new(ALIVE),
            in_use: AtomicBool::new(in_use),
            listeners: Mutex::default(),
        }
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire)
    }

    fn fate(&self) -> Fate {
        match self.fate.load(Ordering::Acquire) {
            DELETED => Fate::Deleted,
            FENCED => Fate::Fenced,
            _ => Fate::Alive,
        }
    }

    /// A deleted volume never comes back.
    pub(super) fn set_fate(&self, fate: Fate) {
        let code = match fate {
            Fate::Alive => ALIVE,
            Fate::Deleted => DELETED,
            Fate::Fenced => FENCED,
        };
        let change = |old| (old != DELETED && old != code).then_some(code);
        let changed = self
            .fate
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
        if changed.is_ok() {
            tracing::info!(volume = %self.name, ?fate, "fate of an open volume changed");
            self.notify();
        }
    }

    pub(super) fn set_size(&self, size_bytes: u64) {
        let old = self.size_bytes.swap(size_bytes, Ordering::AcqRel);
        if old != size_bytes {
            tracing::info!(volume = %self.name, bytes = size_bytes, "volume has a new size");
            self.notify();
        }
    }

    pub(super) fn set_reservations(&self, version: u64) {
        if self.reservations.fetch_max(version, Ordering::AcqRel) < version {
            self.notify();
        }
    }

    /// Calls the listeners without holding the lock, so that they may use the device.
    fn notify(&self) {
        let lock = || {
            self.listeners
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let listeners = lock().clone();
        let done: Vec<Listener> = listeners.into_iter().filter(|listen| !listen()).collect();
        lock().retain(|listener| !done.iter().any(|done| Arc::ptr_eq(done, listener)));
    }
}

impl BlockDevice for Device {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size_bytes: self.state.size_bytes.load(Ordering::Acquire),
            ..device_info(&self.state.name, self.state.uuid)
        }
    }

    fn submit(&self, request: DeviceRequest, done: Completion) {
        self.start(request, None, done);
    }

    fn submit_checked(&self, request: DeviceRequest, reservations: u64, done: Completion) {
        self.start(request, Some(reservations), done);
    }

    fn reserve(&self, request: ReservationRequest) -> BoxFuture<'static, Option<ReservationReply>> {
        let (handle, state) = (Arc::clone(&self.handle), Arc::clone(&self.state));
        let volume = state.volume;
        // Under way before anyone polls: a nexus that is lost must not overtake its own RESERVE(6).
        let changed = (request.action != ReservationAction::Read).then(|| {
            let request = Box::new(request);
            call(&handle, RequestBody::Reserve { volume, request })
        });
        Box::pin(async move {
            let mut result = Ok(());
            if let Some(changed) = changed {
                match changed.await? {
                    Ok(_) => {}
                    Err(ReplyError::Refused(refusal)) => {
                        result = Err(refusal.of_reservation()?);
                    }
                    Err(_) => return None,
                }
            }
            let body = RequestBody::Reservations { volume };
            let Some(Ok(ReplyBody::Reservations(now))) = call(&handle, body).await else {
                return None;
            };
            state.set_reservations(now.version());
            let now = Arc::from(now);
            Some(ReservationReply { result, now })
        })
    }

    fn reservations_version(&self) -> u64 {
        self.state.reservations.load(Ordering::Acquire)
    }

    fn set_in_use(&self, in_use: bool) {
        if self.state.in_use.swap(in_use, Ordering::AcqRel) != in_use {
            let device = Arc::clone(&self.state);
            self.handle.push(Item::Used { device, in_use });
        }
    }

    fn watch(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        let mut listeners = self
            .state
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.push(Arc::from(listener));
    }

    fn fate(&self) -> Fate {
        self.state.fate()
    }
}

/// The facts about a volume that never change, with size 0.
fn device_info(name: &str, uuid: [u8; 16]) -> DeviceInfo {
    DeviceInfo {
        name: name.to_owned(),
        // The name can be given to another volume, this cannot.
        description: format!("PSS volume {}", CellId(uuid)),
        size_bytes: 0,
        read_only: false,
        minimum_block_bytes: 1,
        preferred_block_bytes: BLOCK_BYTES as u32,
        uuid,
    }
}

/// A volume that is not open, as a device.
pub(super) fn info_of(volume: &Volume) -> DeviceInfo {
    DeviceInfo {
        size_bytes: volume.size_bytes,
        ..device_info(&volume.name, volume.uuid)
    }
}

/// How a request of a front end is carried out.
#[derive(Debug)]
enum Plan {
    /// Without asking a server.
    Now(DeviceResult),
    /// By one request.
    One(RequestBody),
    /// By several, whose results are joined.
    Parts(Parts),
    /// By asking how the volume is.
    Look,
}

fn plan(volume: VolumeId, size_bytes: u64, request: DeviceRequest) -> Plan {
    let (offset, length, limit) = match &request {
        // Whatever was answered is durable on a majority.
        DeviceRequest::Flush => return Plan::Now(Ok(DeviceReply::Done)),
        DeviceRequest::Look => return Plan::Look,
        DeviceRequest::Read {
            offset_bytes,
            length_bytes,
        } => (
            *offset_bytes,
            u64::from(*length_bytes),
            DEVICE_REQUEST_BYTES_MAX,
        ),
        DeviceRequest::Write {
            offset_bytes, data, ..
        } => (*offset_bytes, data.len() as u64, DEVICE_REQUEST_BYTES_MAX),
        DeviceRequest::CompareAndWrite {
            offset_bytes,
            expected,
            write,
        } if expected.len() == write.len() => {
            (*offset_bytes, write.len() as u64, REQUEST_BYTES_MAX)
        }
        DeviceRequest::CompareAndWrite { .. } => return Plan::Now(Err(DeviceError::Invalid)),
        DeviceRequest::WriteZeroes {
            offset_bytes,
            length_bytes,
            ..
        }
        | DeviceRequest::Trim {
            offset_bytes,
            length_bytes,
            ..
        }
        | DeviceRequest::Extents {
            offset_bytes,
            length_bytes,
        }
        | DeviceRequest::Prefetch {
            offset_bytes,
            length_bytes,
        } => (*offset_bytes, *length_bytes, usize::MAX),
    };
    match offset.checked_add(length) {
        Some(end) if end <= size_bytes => {}
        _ => return Plan::Now(Err(DeviceError::OutOfRange)),
    }
    if length > limit as u64 {
        return Plan::Now(Err(DeviceError::Invalid));
    }
    if length == 0 {
        return Plan::Now(Ok(match request {
            DeviceRequest::Read { .. } => DeviceReply::Data(Vec::new()),
            DeviceRequest::Extents { .. } => DeviceReply::Extents(Vec::new()),
            _ => DeviceReply::Done,
        }));
    }
    plan_checked(volume, size_bytes, request)
}

/// Plans a request whose range is not empty and lies within the volume.
fn plan_checked(volume: VolumeId, size_bytes: u64, request: DeviceRequest) -> Plan {
    let parts = |offset: u64, length: u64, kind| {
        let parts = Parts {
            volume,
            next: offset,
            end: offset + length,
            kind,
            reservations: None,
        };
        if is_one_request(offset, length) {
            Plan::One(parts.body(offset, length))
        } else {
            Plan::Parts(parts)
        }
    };
    match request {
        DeviceRequest::Read {
            offset_bytes,
            length_bytes,
        } => parts(offset_bytes, length_bytes.into(), PartKind::Read),
        DeviceRequest::Write {
            offset_bytes, data, ..
        } => parts(
            offset_bytes,
            data.len() as u64,
            PartKind::Write(data, offset_bytes),
        ),
        DeviceRequest::WriteZeroes {
            offset_bytes,
            length_bytes,
            allocate,
            ..
        } => {
            let zeroes = || Parts {
                volume,
                next: offset_bytes,
                end: offset_bytes + length_bytes,
                kind: PartKind::Zeroes {
                    allocate,
                    size_bytes,
                },
                reservations: None,
            };
            let mut parts = zeroes();
            match parts.next() {
                Some(only) if parts.next == parts.end => Plan::One(only),
                _ => Plan::Parts(zeroes()),
            }
        }
        DeviceRequest::Trim {
            offset_bytes,
            length_bytes,
            ..
        } => Plan::One(trim(volume, offset_bytes, length_bytes)),
        DeviceRequest::CompareAndWrite {
            offset_bytes,
            expected,
            write,
        } => {
            // It happens in one log entry or not at all, so it cannot be split.
            if !is_one_request(offset_bytes, write.len() as u64) {
                return Plan::Now(Err(DeviceError::Invalid));
            }
            let data = Bytes::from([&expected[..], &write[..]].concat());
            Plan::One(RequestBody::CompareAndWrite {
                volume,
                offset_bytes,
                checksum: crc32c::crc32c(&data),
                data,
            })
        }
        DeviceRequest::Extents {
            offset_bytes,
            length_bytes,
        } => Plan::One(RequestBody::Extents {
            volume,
            offset_bytes,
            length_bytes,
        }),
        // The servers read ahead by themselves; data sent here would only be thrown away.
        DeviceRequest::Prefetch { .. } | DeviceRequest::Flush => Plan::Now(Ok(DeviceReply::Done)),
        DeviceRequest::Look => Plan::Look,
    }
}

/// A request with the version of the reservations under which it is allowed.
fn checked(body: RequestBody, reservations: Option<u64>) -> RequestBody {
    match reservations {
        None => body,
        Some(reservations) => RequestBody::Checked {
            reservations,
            body: Box::new(body),
        },
    }
}

fn trim(volume: VolumeId, offset_bytes: u64, length_bytes: u64) -> RequestBody {
    RequestBody::Zero {
        volume,
        offset_bytes,
        length_bytes,
        allocate: false,
        whole_blocks_only: true,
    }
}

/// Whether a range is short enough for one request: of 1 MiB that begins within a block, the server
/// would have to write one block too many.
fn is_one_request(offset: u64, length: u64) -> bool {
    let block = BLOCK_BYTES as u64;
    (offset + length).div_ceil(block) - offset / block <= WRITE_BLOCKS_MAX as u64
}

/// A long request that is cut at multiples of 1 MiB; gives the requests that it consists of.
#[derive(Debug)]
struct Parts {
    volume: VolumeId,
    next: u64,
    end: u64,
    kind: PartKind,
    /// Version of the reservations under which they are allowed.
    reservations: Option<u64>,
}

#[derive(Debug)]
enum PartKind {
    Read,
    /// The data, and where on the volume they begin.
    Write(Bytes, u64),
    /// Servers zero whole blocks only; what of the range is a part of a block is written.
    Zeroes {
        allocate: bool,
        /// Of the volume, whose last block may be short.
        size_bytes: u64,
    },
}

impl Parts {
    fn body(&self, offset_bytes: u64, length: u64) -> RequestBody {
        let volume = self.volume;
        match &self.kind {
            PartKind::Read => RequestBody::Read {
                volume,
                offset_bytes,
                length_bytes: length as u32,
            },
            PartKind::Write(data, start) => {
                let at = (offset_bytes - start) as usize;
                let data = data.slice(at..at + length as usize);
                RequestBody::Write {
                    volume,
                    offset_bytes,
                    checksums: RequestBody::write_checksums(volume, offset_bytes, &data),
                    data,
                }
            }
            PartKind::Zeroes {
                allocate,
                size_bytes,
            } => {
                let block = BLOCK_BYTES as u64;
                let end = offset_bytes + length;
                let is_whole = offset_bytes.is_multiple_of(block)
                    && (end.is_multiple_of(block) || end == *size_bytes);
                if is_whole {
                    return RequestBody::Zero {
                        volume,
                        offset_bytes,
                        length_bytes: length,
                        allocate: *allocate,
                        whole_blocks_only: false,
                    };
                }
                let data = Bytes::from(vec![0; length as usize]);
                RequestBody::Write {
                    volume,
                    offset_bytes,
                    checksums: RequestBody::write_checksums(volume, offset_bytes, &data),
                    data,
                }
            }
        }
    }

    /// Where the part that begins at `next` ends.
    fn part_end(&self) -> u64 {
        let boundary = (self.next / REQUEST_BYTES_MAX as u64 + 1) * REQUEST_BYTES_MAX as u64;
        let PartKind::Zeroes {
            allocate,
            size_bytes,
        } = &self.kind
        else {
            return boundary.min(self.end);
        };
        let block = BLOCK_BYTES as u64;
        let next_block = (self.next / block + 1) * block;
        let whole_end = match self.end == *size_bytes {
            true => self.end,
            false => self.end / block * block,
        };
        if !self.next.is_multiple_of(block) || whole_end <= self.next {
            next_block.min(self.end)
        } else if *allocate {
            boundary.min(whole_end)
        } else {
            whole_end
        }
    }
}

impl Iterator for Parts {
    type Item = RequestBody;

    fn next(&mut self) -> Option<RequestBody> {
        if self.next >= self.end {
            return None;
        }
        let offset = self.next;
        self.next = self.part_end();
        let body = self.body(offset, self.next - offset);
        Some(checked(body, self.reservations))
    }
}

/// Joins the results of the parts of one request.
pub(super) struct Join(Mutex<JoinState>);

struct JoinState {
    done: Option<Completion>,
    /// What has not been started.
    rest: Parts,
    /// What was read, by part.
    read: Vec<Vec<ReadPart>>,
    started: usize,
    under_way: usize,
    error: Option<DeviceError>,
}

impl Join {
    fn start(rest: Parts, done: Completion, handle: &Handle) {
        // Reads and writes are at most 32 MiB long; only zeroes go on and on.
        let parts_max = match rest.kind {
            PartKind::Zeroes { .. } => ZERO_PARTS,
            _ => usize::MAX,
        };
        let join = Arc::new(Join(Mutex::new(JoinState {
            done: Some(done),
            rest,
            read: Vec::new(),
            started: 0,
            under_way: 0,
            error: None,
        })));
        let items: Vec<Item> = std::iter::from_fn(|| join.next_item())
            .take(parts_max)
            .collect();
        handle.push_all(items);
    }

    /// The next part as a request whose result comes to [`Join::finish`].
    fn next_item(self: &Arc<Self>) -> Option<Item> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let body = state.rest.next()?;
        let part = state.started;
        state.started += 1;
        state.under_way += 1;
        state.read.push(Vec::new());
        let join = Arc::clone(self);
        Some(Item::Request {
            body,
            target: Target::Part { join, part },
        })
    }

    /// Takes the result of a part. Gives the next part, if there is one; after the last, the whole
    /// request is answered.
    pub(super) fn finish(self: &Arc<Self>, part: usize, result: DeviceResult) -> Option<Item> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.under_way -= 1;
        match result {
            Ok(DeviceReply::Data(data)) => state.read[part] = data,
            Ok(_) => {}
            Err(error) => {
                state.error.get_or_insert(error);
                state.rest.next = state.rest.end;
            }
        }
        if state.rest.next < state.rest.end {
            drop(state);
            return self.next_item();
        }
        if state.under_way == 0
            && let Some(done) = state.done.take()
        {
            let result = match (state.error, &state.rest.kind) {
                (Some(error), _) => Err(error),
                (None, PartKind::Read) => {
                    let parts = std::mem::take(&mut state.read);
                    Ok(DeviceReply::Data(parts.into_iter().flatten().collect()))
                }
                (None, _) => Ok(DeviceReply::Done),
            };
            drop(state);
            done.complete(result);
        }
        None
    }
}

/// What a server's answer to `body` means to the front end.
pub(super) fn device_result(
    body: &RequestBody,
    result: Result<ReplyBody, ReplyError>,
) -> DeviceResult {
    match (body.unchecked(), result) {
        (RequestBody::Read { length_bytes, .. }, Ok(ReplyBody::Data(parts))) => {
            if parts.iter().map(ReadPart::length_bytes).sum::<u64>() != u64::from(*length_bytes) {
                return Err(DeviceError::Io);
            }
            Ok(DeviceReply::Data(parts))
        }
        (RequestBody::Extents { length_bytes, .. }, Ok(ReplyBody::Extents(extents))) => {
            let extents = clipped(extents, *length_bytes);
            if extents.is_empty() {
                return Err(DeviceError::Io);
            }
            Ok(DeviceReply::Extents(extents))
        }
        (RequestBody::Read { .. } | RequestBody::Extents { .. }, Ok(_)) => Err(DeviceError::Io),
        (_, Ok(ReplyBody::Done)) => Ok(DeviceReply::Done),
        (_, Ok(_)) => Err(DeviceError::Io),
        (_, Err(error)) => Err(device_error(&error)),
    }
}

/// Notes what a server's answer to `Look` says, and what it means to the front end, which knows that version of
/// the reservations.
pub(super) fn look_result(
    device: &DeviceState,
    known: Option<u64>,
    result: Result<ReplyBody, ReplyError>,
) -> DeviceResult {
    match result {
        Ok(ReplyBody::Volume {
            size_bytes,
            reservations,
        }) => {
            device.set_size(size_bytes);
            device.set_reservations(reservations);
            match known {
                Some(known) if known != reservations => Err(DeviceError::ReservationChanged),
                _ => Ok(DeviceReply::Done),
            }
        }
        Ok(_) => Err(DeviceError::Io),
        Err(error) => {
            let error = device_error(&error);
            if error == DeviceError::Deleted {
                device.set_fate(Fate::Deleted);
            }
            Err(error)
        }
    }
}

/// Extents as a front end may pass them on: none empty, none past the range, neighbours differ.
fn clipped(extents: Vec<Extent>, mut length: u64) -> Vec<Extent> {
    let mut result: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        let length_bytes = extent.length_bytes.min(length);
        length -= length_bytes;
        match result.last_mut() {
            _ if length_bytes == 0 => {}
            Some(last) if last.allocated == extent.allocated => last.length_bytes += length_bytes,
            _ => result.push(Extent {
                length_bytes,
                ..extent
            }),
        }
    }
    result
}

fn device_error(error: &ReplyError) -> DeviceError {
    match error {
        ReplyError::NotLeader { .. } => DeviceError::Unavailable,
        ReplyError::NoSpace => DeviceError::NoSpace,
        ReplyError::Miscompare(at) => DeviceError::Miscompare(*at),
        // We made the request, so it was valid; what was damaged on its way is sent again.
        ReplyError::Invalid | ReplyError::Io | ReplyError::UnknownRefusal(_) => DeviceError::Io,
        ReplyError::Refused(refusal) => match refusal {
            Refusal::StaleSession => DeviceError::Fenced,
            Refusal::NoSuchVolume => DeviceError::Deleted,
            Refusal::OutOfRange => DeviceError::OutOfRange,
            Refusal::TooMany => DeviceError::Unavailable,
            Refusal::ReservationsChanged => DeviceError::ReservationChanged,
            Refusal::Reserved => DeviceError::Reserved,
            Refusal::VolumeExists
            | Refusal::VolumeAttached
            | Refusal::BadName
            | Refusal::BadSize
            | Refusal::BadChunkSize
            | Refusal::WouldShrink
            | Refusal::EndWithinBlock
            | Refusal::OutsideWindow
            | Refusal::ReservationConflict
            | Refusal::InvalidRelease
            | Refusal::TooManyRegistrations
            | Refusal::InvalidReservation
            | Refusal::ServersUnderWay
            | Refusal::ServersOutdated
            | Refusal::ServersTooMuch
            | Refusal::ServerLeads
            | Refusal::ServerBehind
            | Refusal::BadServers
            | Refusal::MajorityAlive
            | Refusal::Incomplete
            | Refusal::Settled => DeviceError::Io,
        },
    }
}

#[cfg(test)]
mod tests;
