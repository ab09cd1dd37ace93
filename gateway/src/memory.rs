//! A volume in memory: the second implementation of [`BlockDevice`], for tests of the front ends.
//!
//! It can hold requests back and fail them, so that a test decides when each is answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use pss_core::volume::device::{
    BlockDevice, BoxFuture, Completion, DeviceError, DeviceInfo, DeviceReply, DeviceRequest,
    DeviceResult, Extent, Fate, ReadPart, Volumes,
};
use pss_core::volume::reservation::{ReservationReply, ReservationRequest, Reservations};

const BLOCK_BYTES: u64 = 4096;
/// As the cell's answers: a range of many extents takes several requests.
const EXTENTS_MAX: usize = 4096;
/// Longest read or write.
const REQUEST_BYTES_MAX: usize = 32 << 20;

type Listener = Box<dyn Fn() -> bool + Send + Sync>;

/// A sparse volume in memory, in blocks of 4 KiB.
pub struct MemoryDevice {
    state: Mutex<State>,
    listeners: Mutex<Vec<Listener>>,
}

struct State {
    info: DeviceInfo,
    fate: Fate,
    blocks: BTreeMap<u64, Bytes>,
    failing: Option<DeviceError>,
    held: Option<Vec<(DeviceRequest, Completion)>>,
    extents_max: usize,
    reservations: Arc<Reservations>,
}

impl MemoryDevice {
    /// An empty volume.
    pub fn new(name: &str, size_bytes: u64) -> MemoryDevice {
        let mut uuid = [0; 16];
        for (to, from) in uuid.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let info = DeviceInfo {
            name: name.to_owned(),
            description: String::new(),
            size_bytes,
            read_only: false,
            minimum_block_bytes: 1,
            preferred_block_bytes: 4096,
            uuid,
        };
        MemoryDevice {
            state: Mutex::new(State {
                info,
                fate: Fate::Alive,
                blocks: BTreeMap::new(),
                failing: None,
                held: None,
                extents_max: EXTENTS_MAX,
                reservations: Arc::default(),
            }),
            listeners: Mutex::default(),
        }
    }

    /// The same volume with a description.
    #[must_use]
    pub fn described(self, text: &str) -> MemoryDevice {
        text.clone_into(&mut self.state().info.description);
        self
    }

    /// The same volume, refusing writes.
    #[must_use]
    pub fn read_only(self) -> MemoryDevice {
        self.state().info.read_only = true;
        self
    }

    /// Most extents in one answer from now on.
    pub fn set_extents_max(&self, count: usize) {
        self.state().extents_max = count.max(1);
    }

    /// Fails every request from now on, or none.
    pub fn set_failing(&self, error: Option<DeviceError>) {
        self.state().failing = error;
    }

    /// Holds requests back from now on, but for looks.
    pub fn hold(&self) {
        self.state().held.get_or_insert_default();
    }

    /// How many requests are held back.
    pub fn held(&self) -> usize {
        self.state().held.as_ref().map_or(0, Vec::len)
    }

    /// Serves what was held back, last one first, and holds no more.
    pub fn release(&self) {
        let held = self.state().held.take().unwrap_or_default();
        for (request, done) in held.into_iter().rev() {
            self.submit(request, done);
        }
    }

    /// Deletes or fences the volume.
    pub fn set_fate(&self, fate: Fate) {
        self.state().fate = fate;
        self.tell();
    }

    /// Changes the size.
    pub fn resize(&self, size_bytes: u64) {
        let mut state = self.state();
        state.info.size_bytes = size_bytes;
        state.blocks.split_off(&size_bytes.div_ceil(BLOCK_BYTES));
        drop(state);
        self.tell();
    }

    /// All its bytes.
    pub fn content(&self) -> Vec<u8> {
        let state = self.state();
        let size = usize::try_from(state.info.size_bytes).expect("a test's volume fits in memory");
        let mut bytes = vec![0; size];
        for (block, data) in &state.blocks {
            let at = usize::try_from(block * BLOCK_BYTES).expect("within the size");
            let end = (at + data.len()).min(size);
            bytes[at..end].copy_from_slice(&data[..end - at]);
        }
        bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener());
    }
}

impl BlockDevice for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        self.state().info.clone()
    }

    fn submit(&self, request: DeviceRequest, done: Completion) {
        let mut state = self.state();
        if let Some(held) = &mut state.held
            && request != DeviceRequest::Look
        {
            held.push((request, done));
            return;
        }
        let result = state.serve(request);
        drop(state);
        done.complete(result);
    }

    fn submit_checked(&self, request: DeviceRequest, reservations: u64, done: Completion) {
        if self.reservations_version() != reservations {
            return done.complete(Err(DeviceError::ReservationChanged));
        }
        self.submit(request, done);
    }

    fn reserve(&self, request: ReservationRequest) -> BoxFuture<'static, Option<ReservationReply>> {
        let mut state = self.state();
        let mut changed = Reservations::clone(&state.reservations);
        let result = changed.apply(&request);
        let is_new = changed.version() != state.reservations.version();
        if is_new {
            state.reservations = Arc::new(changed);
        }
        let now = Arc::clone(&state.reservations);
        drop(state);
        if is_new {
            self.tell();
        }
        Box::pin(std::future::ready(Some(ReservationReply { result, now })))
    }

    fn reservations_version(&self) -> u64 {
        self.state().reservations.version()
    }

    fn watch(&self, listener: Listener) {
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.push(listener);
    }

    fn fate(&self) -> Fate {
        self.state().fate
    }
}

impl State {
    fn serve(&mut self, request: DeviceRequest) -> DeviceResult {
        match (self.fate, self.failing) {
            (Fate::Deleted, _) => return Err(DeviceError::Deleted),
            (Fate::Fenced, _) => return Err(DeviceError::Fenced),
            (Fate::Alive, Some(error)) => return Err(error),
            (Fate::Alive, None) => {}
        }
        match request {
            DeviceRequest::Read {
                offset_bytes,
                length_bytes,
            } => {
                self.check(offset_bytes, length_bytes.into(), false)?;
                self.read(offset_bytes, length_bytes.into())
            }
            DeviceRequest::Write {
                offset_bytes, data, ..
            } => {
                self.check(offset_bytes, data.len() as u64, true)?;
                if data.len() > REQUEST_BYTES_MAX {
                    return Err(DeviceError::Invalid);
                }
                self.write(offset_bytes, &data);
                Ok(DeviceReply::Done)
            }
            DeviceRequest::WriteZeroes {
                offset_bytes,
                length_bytes,
                allocate,
                ..
            } => {
                self.check(offset_bytes, length_bytes, true)?;
                self.zero(offset_bytes, length_bytes, allocate, false);
                Ok(DeviceReply::Done)
            }
            DeviceRequest::Trim {
                offset_bytes,
                length_bytes,
                ..
            } => {
                self.check(offset_bytes, length_bytes, true)?;
                self.zero(offset_bytes, length_bytes, false, true);
                Ok(DeviceReply::Done)
            }
            DeviceRequest::Flush | DeviceRequest::Look => Ok(DeviceReply::Done),
            DeviceRequest::CompareAndWrite {
                offset_bytes,
                expected,
                write,
            } => {
                self.check(offset_bytes, expected.len() as u64, true)?;
                if expected.len() != write.len() || expected.len() > REQUEST_BYTES_MAX {
                    return Err(DeviceError::Invalid);
                }
                self.compare_and_write(offset_bytes, &expected, &write)
            }
            DeviceRequest::Extents {
                offset_bytes,
                length_bytes,
            } => {
                self.check(offset_bytes, length_bytes, false)?;
                Ok(self.extents(offset_bytes, length_bytes))
            }
            DeviceRequest::Prefetch {
                offset_bytes,
                length_bytes,
            } => {
                self.check(offset_bytes, length_bytes, false)?;
                Ok(DeviceReply::Done)
            }
        }
    }

    fn check(&self, offset: u64, length: u64, writes: bool) -> Result<(), DeviceError> {
        if writes && self.info.read_only {
            return Err(DeviceError::ReadOnly);
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.info.size_bytes => Ok(()),
            _ => Err(DeviceError::OutOfRange),
        }
    }

    fn read(&self, offset: u64, length: u64) -> DeviceResult {
        if length > REQUEST_BYTES_MAX as u64 {
            return Err(DeviceError::Invalid);
        }
        let mut parts = Vec::new();
        for Piece { block, from, to } in pieces(offset, length) {
            match (self.blocks.get(&block), parts.last_mut()) {
                (Some(data), _) => parts.push(ReadPart::Data(data.slice(from..to))),
                (None, Some(ReadPart::Hole(run))) => *run += (to - from) as u32,
                (None, _) => parts.push(ReadPart::Hole((to - from) as u32)),
            }
        }
        Ok(DeviceReply::Data(parts))
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for Piece { block, from, to } in pieces(offset, data.len() as u64) {
            let (part, behind) = rest.split_at(to - from);
            rest = behind;
            self.overlay(block, from, part);
        }
    }

    fn overlay(&mut self, block: u64, from: usize, part: &[u8]) {
        let new = if part.len() as u64 == BLOCK_BYTES {
            Bytes::copy_from_slice(part)
        } else {
            let mut bytes = match self.blocks.get(&block) {
                Some(old) => old.to_vec(),
                None => vec![0; BLOCK_BYTES as usize],
            };
            bytes[from..from + part.len()].copy_from_slice(part);
            Bytes::from(bytes)
        };
        self.blocks.insert(block, new);
    }

    fn zero(&mut self, offset: u64, length: u64, allocate: bool, whole_blocks_only: bool) {
        const ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let (first, end) = (
            offset.div_ceil(BLOCK_BYTES),
            (offset + length) / BLOCK_BYTES,
        );
        if !allocate && first < end {
            // One step for a range of any length, as the cell does it.
            let behind = self.blocks.split_off(&end);
            self.blocks.split_off(&first);
            self.blocks.extend(behind);
        }
        if whole_blocks_only {
            return;
        }
        if allocate || first >= end {
            for Piece { block, from, to } in pieces(offset, length) {
                if allocate || self.blocks.contains_key(&block) {
                    self.overlay(block, from, &ZEROES[from..to]);
                }
            }
            return;
        }
        let head = first * BLOCK_BYTES - offset;
        let tail = offset + length - end * BLOCK_BYTES;
        for (offset, length) in [(offset, head), (end * BLOCK_BYTES, tail)] {
            for Piece { block, from, to } in pieces(offset, length) {
                if self.blocks.contains_key(&block) {
                    self.overlay(block, from, &ZEROES[from..to]);
                }
            }
        }
    }

    fn compare_and_write(&mut self, offset: u64, expected: &[u8], write: &[u8]) -> DeviceResult {
        let mut at = 0;
        for Piece { block, from, to } in pieces(offset, expected.len() as u64) {
            let present = self.blocks.get(&block);
            for within in from..to {
                if present.map_or(0, |data| data[within]) != expected[at] {
                    return Err(DeviceError::Miscompare(at as u64));
                }
                at += 1;
            }
        }
        self.write(offset, write);
        Ok(DeviceReply::Done)
    }

    fn extents(&self, offset: u64, length: u64) -> DeviceReply {
        let end = offset + length;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let allocated = self.blocks.contains_key(&block);
            let next = if allocated {
                (block + 1) * BLOCK_BYTES
            } else {
                let next = self.blocks.range(block..).next();
                next.map_or(end, |(block, _)| block * BLOCK_BYTES)
            };
            let length_bytes = next.min(end) - at;
            at += length_bytes;
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.length_bytes += length_bytes,
                _ if count == self.extents_max => break,
                _ => extents.push(Extent {
                    length_bytes,
                    allocated,
                }),
            }
        }
        DeviceReply::Extents(extents)
    }
}

/// Part of a range within one block.
struct Piece {
    block: u64,
    from: usize,
    to: usize,
}

fn pieces(offset: u64, length: u64) -> impl Iterator<Item = Piece> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let block = at / BLOCK_BYTES;
        let next = ((block + 1) * BLOCK_BYTES).min(end);
        let piece = Piece {
            block,
            from: (at % BLOCK_BYTES) as usize,
            to: (next - block * BLOCK_BYTES) as usize,
        };
        at = next;
        Some(piece)
    })
}

/// Some volumes in memory.
pub struct MemoryVolumes {
    devices: Mutex<Vec<Arc<MemoryDevice>>>,
}

impl MemoryVolumes {
    /// These volumes.
    pub fn new(devices: impl IntoIterator<Item = MemoryDevice>) -> Arc<MemoryVolumes> {
        Arc::new(MemoryVolumes {
            devices: Mutex::new(devices.into_iter().map(Arc::new).collect()),
        })
    }

    /// Adds a volume.
    pub fn add(&self, device: MemoryDevice) {
        self.devices().push(Arc::new(device));
    }

    /// The volume of a name.
    pub fn get(&self, name: &str) -> Option<Arc<MemoryDevice>> {
        let devices = self.devices();
        let found = devices.iter().find(|device| device.info().name == name);
        found.map(Arc::clone)
    }

    /// Removes a volume from the list and deletes it.
    pub fn remove(&self, name: &str) {
        let mut gone = Vec::new();
        let mut devices = self.devices();
        devices.retain(|device| {
            let keep = device.info().name != name;
            if !keep {
                gone.push(Arc::clone(device));
            }
            keep
        });
        drop(devices);
        for device in gone {
            device.set_fate(Fate::Deleted);
        }
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Arc<MemoryDevice>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volumes for MemoryVolumes {
    fn list(&self) -> BoxFuture<'_, Result<Vec<DeviceInfo>, DeviceError>> {
        let mut infos: Vec<_> = self.devices().iter().map(|device| device.info()).collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        Box::pin(std::future::ready(Ok(infos)))
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn BlockDevice>>, DeviceError>> {
        let devices = self.devices();
        let found = match (name, devices.as_slice()) {
            ("", [only]) => Some(only),
            ("", _) => None,
            _ => devices.iter().find(|device| device.info().name == name),
        };
        let found = found.map(|device| Arc::clone(device) as Arc<dyn BlockDevice>);
        Box::pin(std::future::ready(Ok(found)))
    }
}

#[cfg(test)]
mod tests {
    use pss_core::volume::device::CompletionQueue;

    use super::*;

    fn call(device: &MemoryDevice, request: DeviceRequest) -> DeviceResult {
        let queue = CompletionQueue::new(Box::new(|| {}));
        device.submit(request, queue.completion(1));
        let mut results = Vec::new();
        queue.take(&mut results);
        results.remove(0).1
    }

    /// Random operations against a plain byte vector.
    #[test]
    fn behaves_as_a_byte_vector() {
        const SIZE: u64 = 10 * 4096 + 100;
        let device = MemoryDevice::new("a", SIZE);
        let mut model = vec![0_u8; SIZE as usize];
        let mut random = 88_172_645_463_325_252_u64;
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for round in 0..3000_u32 {
            let offset_bytes = next(SIZE);
            let length_bytes = next(SIZE - offset_bytes + 1);
            let range = offset_bytes as usize..(offset_bytes + length_bytes) as usize;
            match next(4) {
                0 => {
                    let data = Bytes::from(vec![round as u8; range.len()]);
                    model[range].copy_from_slice(&data);
                    let write = DeviceRequest::Write {
                        offset_bytes,
                        data,
                        fua: false,
                    };
                    assert_eq!(call(&device, write), Ok(DeviceReply::Done));
                }
                1 => {
                    model[range].fill(0);
                    let allocate = next(2) == 0;
                    let zero = DeviceRequest::WriteZeroes {
                        offset_bytes,
                        length_bytes,
                        allocate,
                        fua: false,
                    };
                    assert_eq!(call(&device, zero), Ok(DeviceReply::Done));
                }
                2 => {
                    let first = range.start.next_multiple_of(4096);
                    let end = range.end / 4096 * 4096;
                    if first < end {
                        model[first..end].fill(0);
                    }
                    let trim = DeviceRequest::Trim {
                        offset_bytes,
                        length_bytes,
                        fua: false,
                    };
                    assert_eq!(call(&device, trim), Ok(DeviceReply::Done));
                }
                _ => {
                    let read = DeviceRequest::Read {
                        offset_bytes,
                        length_bytes: length_bytes as u32,
                    };
                    let Ok(DeviceReply::Data(parts)) = call(&device, read) else {
                        panic!("read failed");
                    };
                    let mut got = Vec::new();
                    for part in parts {
                        match part {
                            ReadPart::Data(data) => got.extend_from_slice(&data),
                            ReadPart::Hole(run) => got.resize(got.len() + run as usize, 0),
                        }
                    }
                    assert_eq!(got, model[range]);
                }
            }
            assert_eq!(device.content(), model, "round {round}");
        }
    }

    #[test]
    fn extents_merge_and_stop_at_the_limit() {
        let device = MemoryDevice::new("a", 1 << 20);
        for block in [0, 1, 4] {
            let write = DeviceRequest::Write {
                offset_bytes: block * 4096,
                data: Bytes::from_static(b"x"),
                fua: false,
            };
            call(&device, write).unwrap();
        }
        let ask = DeviceRequest::Extents {
            offset_bytes: 100,
            length_bytes: 8 * 4096,
        };
        let extent = |length_bytes, allocated| Extent {
            length_bytes,
            allocated,
        };
        let all = vec![
            extent(8092, true),
            extent(8192, false),
            extent(4096, true),
            extent(3 * 4096 + 100, false),
        ];
        assert_eq!(
            call(&device, ask.clone()),
            Ok(DeviceReply::Extents(all.clone()))
        );
        device.set_extents_max(2);
        assert_eq!(
            call(&device, ask),
            Ok(DeviceReply::Extents(all[..2].to_vec()))
        );
    }
}
