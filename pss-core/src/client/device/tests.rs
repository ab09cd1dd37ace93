use proptest::prelude::*;

use super::*;
use crate::volume::device::CompletionQueue;

const VOLUME: VolumeId = VolumeId(3);
const MIB: u64 = 1 << 20;

fn read(offset_bytes: u64, length_bytes: u32) -> DeviceRequest {
    DeviceRequest::Read {
        offset_bytes,
        length_bytes,
    }
}

fn zeroes(offset_bytes: u64, length_bytes: u64, allocate: bool) -> DeviceRequest {
    DeviceRequest::WriteZeroes {
        offset_bytes,
        length_bytes,
        allocate,
        fua: false,
    }
}

fn now(request: DeviceRequest) -> DeviceResult {
    match plan(VOLUME, 100 * MIB, request) {
        Plan::Now(result) => result,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ranges_past_the_end() {
    let past = Err(DeviceError::OutOfRange);
    assert_eq!(now(read(100 * MIB, 1)), past);
    assert_eq!(now(read(100 * MIB - 1, 2)), past);
    assert_eq!(now(read(u64::MAX, 2)), past);
    assert_eq!(now(zeroes(1, u64::MAX, false)), past);
    assert_eq!(now(zeroes(0, 100 * MIB + 1, true)), past);
}

#[test]
fn empty_requests_are_answered_here() {
    assert_eq!(now(read(100 * MIB, 0)), Ok(DeviceReply::Data(vec![])));
    assert_eq!(now(zeroes(7, 0, true)), Ok(DeviceReply::Done));
    assert_eq!(now(DeviceRequest::Flush), Ok(DeviceReply::Done));
}

#[test]
fn requests_that_make_no_sense() {
    assert_eq!(now(read(0, 32 * MIB as u32 + 1)), Err(DeviceError::Invalid));
    let compare = |expected: usize, write: usize| DeviceRequest::CompareAndWrite {
        offset_bytes: 1,
        expected: vec![0; expected].into(),
        write: vec![0; write].into(),
    };
    assert_eq!(now(compare(1, 2)), Err(DeviceError::Invalid));
    // From byte 1 on, 1 MiB lies in 257 blocks: too many for one step.
    assert_eq!(now(compare(1 << 20, 1 << 20)), Err(DeviceError::Invalid));
}

#[test]
fn long_zeroes_are_one_request_unless_allocated() {
    let one = plan(VOLUME, 100 * MIB, zeroes(4096, 99 * MIB, false));
    assert!(
        matches!(one, Plan::One(RequestBody::Zero { length_bytes, .. }) if length_bytes == 99 * MIB)
    );
    let count = |allocate| match plan(VOLUME, 100 * MIB, zeroes(1, 99 * MIB, allocate)) {
        Plan::Parts(parts) => parts.count(),
        other => panic!("{other:?}"),
    };
    // Both ends are parts of blocks.
    assert_eq!(count(false), 3);
    assert_eq!(count(true), 101);
}

#[test]
fn trim_spares_partial_blocks() {
    let trim = DeviceRequest::Trim {
        offset_bytes: 5,
        length_bytes: 10_000,
        fua: false,
    };
    let Plan::One(RequestBody::Zero {
        whole_blocks_only, ..
    }) = plan(VOLUME, MIB, trim)
    else {
        panic!();
    };
    assert!(whole_blocks_only);
}

#[test]
fn aligned_mebibyte_is_one_request() {
    assert!(matches!(
        plan(VOLUME, 9 * MIB, read(4096, 1 << 20)),
        Plan::One(_)
    ));
    assert!(matches!(
        plan(VOLUME, 9 * MIB, read(4095, 1 << 20)),
        Plan::Parts(_)
    ));
}

proptest! {
    #[test]
    fn parts_cover_the_write(offset in 0..3 * MIB, length in 1..5_000_000_usize) {
        let data: Bytes = (0..length).map(|at| (at % 251) as u8).collect::<Vec<_>>().into();
        let request = DeviceRequest::Write { offset_bytes: offset, data: data.clone(), fua: false };
        let bodies: Vec<RequestBody> = match plan(VOLUME, 100 * MIB, request) {
            Plan::One(body) => vec![body],
            Plan::Parts(parts) => parts.collect(),
            Plan::Now(_) | Plan::Look => vec![],
        };
        let mut next = offset;
        let mut all = Vec::new();
        for body in bodies {
            prop_assert!(body.verify());
            let RequestBody::Write { offset_bytes, data, .. } = body else { panic!() };
            prop_assert_eq!(offset_bytes, next);
            prop_assert!(is_one_request(offset_bytes, data.len() as u64));
            next += data.len() as u64;
            all.extend_from_slice(&data);
        }
        prop_assert_eq!(all, data);
    }
}

fn extent(length_bytes: u64, allocated: bool) -> Extent {
    Extent {
        length_bytes,
        allocated,
    }
}

#[test]
fn extents_are_merged_and_cut_to_the_range() {
    let extents = vec![
        extent(5, true),
        extent(0, false),
        extent(5, true),
        extent(7, false),
        extent(100, true),
    ];
    assert_eq!(
        clipped(extents, 20),
        [extent(10, true), extent(7, false), extent(3, true)]
    );
}

#[test]
fn answer_of_another_length_is_an_error() {
    let body = RequestBody::Read {
        volume: VOLUME,
        offset_bytes: 0,
        length_bytes: 10,
    };
    let data = |length| {
        Ok(ReplyBody::Data(vec![
            ReadPart::Hole(4),
            ReadPart::Hole(length),
        ]))
    };
    assert!(device_result(&body, data(6)).is_ok());
    assert_eq!(device_result(&body, data(5)), Err(DeviceError::Io));
    assert_eq!(
        device_result(&body, Ok(ReplyBody::Done)),
        Err(DeviceError::Io)
    );
}

struct Joined {
    queue: Arc<CompletionQueue>,
    inbox: Arc<crate::client::driver::Inbox>,
    handle: Handle,
}

impl Joined {
    fn start(request: DeviceRequest) -> Joined {
        let inbox = Arc::<crate::client::driver::Inbox>::default();
        let handle = Handle::new(Arc::clone(&inbox));
        let queue = CompletionQueue::new(Box::new(|| {}));
        let Plan::Parts(parts) = plan(VOLUME, 100 * MIB, request) else {
            panic!();
        };
        Join::start(parts, queue.completion(7), &handle);
        Joined {
            queue,
            inbox,
            handle,
        }
    }

    /// Answers every part that has been started, and those that follow, last first.
    fn finish(&self, answer: impl Fn(&RequestBody, usize) -> DeviceResult) -> (usize, usize) {
        let (mut most, mut all) = (0, 0);
        let mut items = self.inbox.kill();
        while let Some(item) = items.pop() {
            most = most.max(items.len() + 1);
            all += 1;
            let Item::Request {
                body,
                target: Target::Part { join, part },
            } = item
            else {
                panic!();
            };
            items.extend(join.finish(part, answer(&body, part)));
        }
        (most, all)
    }

    fn result(&self) -> Vec<(u64, DeviceResult)> {
        let mut results = Vec::new();
        self.queue.take(&mut results);
        results
    }
}

#[test]
fn parts_of_a_read_are_joined_in_order() {
    let joined = Joined::start(read(5, 3 << 20));
    joined.finish(|body, part| {
        let RequestBody::Read { length_bytes, .. } = body else {
            panic!();
        };
        let data = vec![part as u8; *length_bytes as usize];
        Ok(DeviceReply::Data(vec![ReadPart::Data(data.into())]))
    });
    let [(7, Ok(DeviceReply::Data(parts)))] = &joined.result()[..] else {
        panic!();
    };
    let lengths: Vec<_> = parts
        .iter()
        .map(|part| match part {
            ReadPart::Data(data) => (data[0], data.len()),
            ReadPart::Hole(_) => panic!(),
        })
        .collect();
    assert_eq!(
        lengths,
        [(0, (1 << 20) - 5), (1, 1 << 20), (2, 1 << 20), (3, 5)]
    );
}

#[test]
fn one_failed_part_fails_the_whole_once_all_are_done() {
    let joined = Joined::start(read(0, 4 << 20));
    joined.finish(|_, part| match part {
        2 => Err(DeviceError::NoSpace),
        _ => Ok(DeviceReply::Data(vec![])),
    });
    assert_eq!(joined.result(), [(7, Err(DeviceError::NoSpace))]);
}

#[test]
fn allocated_zeroes_go_out_few_at_a_time() {
    let joined = Joined::start(zeroes(0, 100 * MIB, true));
    let (most, all) = joined.finish(|_, _| Ok(DeviceReply::Done));
    assert_eq!((most, all), (ZERO_PARTS, 100));
    assert_eq!(joined.result(), [(7, Ok(DeviceReply::Done))]);
}

#[test]
fn requests_to_a_dead_task_are_answered() {
    let joined = Joined::start(read(0, 4 << 20));
    drop(joined.inbox.kill());
    assert_eq!(joined.result(), [(7, Err(DeviceError::Unavailable))]);
    joined.handle.push(Item::Request {
        body: RequestBody::ListVolumes,
        target: Target::Device(joined.queue.completion(8)),
    });
    assert_eq!(joined.result(), [(8, Err(DeviceError::Unavailable))]);
}

#[test]
fn listeners_hear_of_changes_until_they_have_enough() {
    let state = DeviceState {
        volume: VOLUME,
        name: "v".into(),
        uuid: [0; 16],
        size_bytes: AtomicU64::new(1),
        reservations: AtomicU64::new(0),
        fate: AtomicU8::new(ALIVE),
        in_use: AtomicBool::new(true),
        listeners: Mutex::default(),
    };
    let calls = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&calls);
    let listener = move || counter.fetch_add(1, Ordering::Relaxed) < 2;
    state.listeners.lock().unwrap().push(Arc::new(listener));
    state.set_size(1);
    state.set_fate(Fate::Alive);
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    state.set_size(2);
    state.set_fate(Fate::Fenced);
    state.set_fate(Fate::Deleted);
    state.set_fate(Fate::Alive);
    assert_eq!(state.fate(), Fate::Deleted);
    state.set_size(3);
    assert_eq!(calls.load(Ordering::Relaxed), 3);
}

/// What zeroing a range of a volume of 10,240 bytes asks for: (offset, length, whole blocks).
fn zeroing(offset_bytes: u64, length_bytes: u64, allocate: bool) -> Vec<(u64, u64, bool)> {
    let request = DeviceRequest::WriteZeroes {
        offset_bytes,
        length_bytes,
        allocate,
        fua: false,
    };
    let bodies = match plan(VOLUME, 10_240, request) {
        Plan::One(body) => vec![body],
        Plan::Parts(parts) => parts.collect(),
        Plan::Now(result) => panic!("{result:?}"),
        Plan::Look => panic!("a look"),
    };
    let part = |body| match body {
        RequestBody::Zero {
            offset_bytes,
            length_bytes,
            allocate: kept,
            whole_blocks_only: false,
            ..
        } if kept == allocate => (offset_bytes, length_bytes, true),
        RequestBody::Write {
            offset_bytes, data, ..
        } if data.iter().all(|byte| *byte == 0) => (offset_bytes, data.len() as u64, false),
        other => panic!("{other:?}"),
    };
    bodies.into_iter().map(part).collect()
}

// Servers zero whole blocks; the range is promised whole.
#[test]
fn parts_of_blocks_are_written_when_a_range_is_zeroed() {
    for allocate in [true, false] {
        assert_eq!(zeroing(0, 8192, allocate), [(0, 8192, true)]);
        assert_eq!(zeroing(4096, 6144, allocate), [(4096, 6144, true)]);
        assert_eq!(zeroing(512, 512, allocate), [(512, 512, false)]);
        assert_eq!(zeroing(0, 512, allocate), [(0, 512, false)]);
        assert_eq!(
            zeroing(3584, 5120, allocate),
            [(3584, 512, false), (4096, 4096, true), (8192, 512, false)]
        );
        assert_eq!(
            zeroing(3584, 1024, allocate),
            [(3584, 512, false), (4096, 512, false)]
        );
        assert_eq!(
            zeroing(512, 9728, allocate),
            [(512, 3584, false), (4096, 6144, true)]
        );
    }
}
