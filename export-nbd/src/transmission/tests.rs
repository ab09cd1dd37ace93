//! Literal bytes in, literal bytes out. Quotations are from proto.md.

use std::io::IoSlice;

use proptest::prelude::*;
use pss_core::volume::device::{BlockDevice, CompletionQueue, ReadPart};

use super::*;
use crate::memory::MemoryDevice;

const SIZE: u64 = 1 << 20;
const COOKIE: [u8; 8] = *b"COOKIE42";

const TERMS: Terms = Terms {
    size_bytes: SIZE,
    read_only: false,
    structured_replies: true,
    allocation_context: true,
};
const SIMPLE: Terms = Terms {
    structured_replies: false,
    allocation_context: false,
    ..TERMS
};

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// A transmission over a volume in memory.
struct Driver {
    transmission: Transmission,
    input: BytesMut,
    device: MemoryDevice,
    submits: Vec<Submit>,
}

impl Driver {
    fn new(terms: Terms) -> Driver {
        Driver {
            transmission: Transmission::new(terms),
            input: BytesMut::new(),
            device: MemoryDevice::new("vol", terms.size_bytes),
            submits: Vec::new(),
        }
    }

    /// Takes bytes; requests stay where they are.
    fn feed(&mut self, bytes: &[u8]) -> &mut Driver {
        self.input.extend_from_slice(bytes);
        self.transmission.handle_bytes(&mut self.input);
        while let Some(submit) = self.transmission.poll_submit() {
            self.submits.push(submit);
        }
        self
    }

    /// Lets the device serve all requests.
    fn serve(&mut self) -> &mut Driver {
        while let Some(submit) = self.submits.pop() {
            let queue = CompletionQueue::new(Box::new(|| {}));
            self.device
                .submit(submit.request, queue.completion(submit.token));
            let mut results = Vec::new();
            queue.take(&mut results);
            for (token, result) in results {
                self.transmission.handle_completion(token, result);
            }
            self.feed(b"");
        }
        self
    }

    /// What is sent, all of it.
    fn sent(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !self.transmission.sending().is_empty() {
            let mut slices = [IoSlice::new(&[]); 4];
            let filled = self.transmission.sending().fill(&mut slices);
            let run: Vec<u8> = slices[..filled]
                .iter()
                .flat_map(|slice| slice.to_vec())
                .collect();
            self.transmission.sending().advance(run.len());
            bytes.extend_from_slice(&run);
        }
        bytes
    }

    /// The reply to one request.
    fn ask(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
        self.feed(&request(flags, command, offset, length))
            .serve()
            .sent()
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Vec<u8> {
        let header = request(0, 1, offset, data.len() as u32);
        self.feed(&header).feed(data).serve().sent()
    }
}

fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&COOKIE);
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

fn simple(error: u32) -> Vec<u8> {
    [&[0x67, 0x44, 0x66, 0x98], &error.to_be_bytes()[..], &COOKIE].concat()
}

fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
    let length = (payload.len() as u32).to_be_bytes();
    [
        &[0x66, 0x8e, 0x33, 0xef],
        &flags[..],
        &kind,
        &COOKIE,
        &length,
        payload,
    ]
    .concat()
}

fn error_chunk(error: u32) -> Vec<u8> {
    chunk(1, 0x8001, &[&error.to_be_bytes()[..], &[0, 0]].concat())
}

fn data_chunk(flags: u16, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(flags, 1, &[&offset.to_be_bytes()[..], data].concat())
}

fn hole_chunk(flags: u16, offset: u64, length: u32) -> Vec<u8> {
    chunk(
        flags,
        2,
        &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat(),
    )
}

fn status_chunk(descriptors: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = 1_u32.to_be_bytes().to_vec();
    for (length, status) in descriptors {
        payload.extend_from_slice(&length.to_be_bytes());
        payload.extend_from_slice(&status.to_be_bytes());
    }
    chunk(1, 5, &payload)
}

#[test]
fn simple_replies_of_write_and_read() {
    let mut driver = Driver::new(SIMPLE);
    assert_eq!(driver.write(4090, b"over a block"), simple(0));
    let expected = [&simple(0)[..], &[0, 0], b"over a block", &[0, 0]].concat();
    assert_eq!(driver.ask(0, 0, 4088, 16), expected);
}

#[test]
fn read_of_data_and_holes_in_chunks() {
    let mut driver = Driver::new(TERMS);
    driver.write(4096, &[1; 4096]);
    driver.write(8192, &[2; 4096]);
    let expected = [
        hole_chunk(0, 100, 3996),
        data_chunk(0, 4096, &[[1; 4096], [2; 4096]].concat()),
        hole_chunk(1, 12288, 12),
    ];
    assert_eq!(driver.ask(0, 0, 100, 12200), expected.concat());
    assert_eq!(driver.ask(0, 0, 5000, 3), data_chunk(1, 5000, &[1; 3]));
}

#[test]
fn unfragmented_read_has_one_chunk() {
    // "the server MUST send at most one content chunk"; "If the area being read contains both data and
    // a hole, the server MUST use NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present."
    let mut driver = Driver::new(TERMS);
    driver.write(4096, &[1; 4096]);
    let data = [[0; 4096], [1; 4096], [0; 4096]].concat();
    assert_eq!(driver.ask(4, 0, 0, 12288), data_chunk(1, 0, &data));
    assert_eq!(driver.ask(4, 0, 8192, 4096), hole_chunk(1, 8192, 4096));
}

#[test]
fn unfragmented_read_of_any_length() {
    // "the server MUST support unfragmented reads in which the client's request length does not
    // exceed 65,536 bytes"; here longer ones too.
    let mut driver = Driver::new(TERMS);
    driver.write(0, &[7]);
    let reply = driver.ask(4, 0, 0, SIZE as u32);
    assert_eq!(reply.len(), 28 + SIZE as usize);
}

#[test]
fn read_error_is_never_a_simple_reply() {
    // "the server MUST use structured replies to the NBD_CMD_READ transmission request".
    let mut driver = Driver::new(TERMS);
    assert_eq!(driver.ask(0, 0, SIZE, 1), error_chunk(EINVAL));
    driver.device.set_failing(Some(DeviceError::Io));
    let message = b"storage failed";
    let payload = [&[0, 0, 0, 5, 0, 14][..], message].concat();
    assert_eq!(driver.ask(0, 0, 0, 1), chunk(1, 0x8001, &payload));
    // A simple error has no payload: "it MUST NOT send any payload for this request".
    let mut driver = Driver::new(SIMPLE);
    driver.device.set_failing(Some(DeviceError::Io));
    assert_eq!(driver.ask(0, 0, 0, 4096), simple(5));
}

/// The table of errors, in the order command, flags, offset, length, error.
#[test]
fn errors_of_requests_that_cannot_be() {
    let huge = (32 << 20) + 1;
    let wrapping = u64::MAX - 10;
    for (command, flags, offset, length, error) in [
        // "read [...] beyond the bounds" EINVAL, "write [...] beyond the size" ENOSPC.
        (0, 0, SIZE - 1, 2, EINVAL),
        (0, 0, wrapping, 100, EINVAL),
        (4, 0, SIZE - 1, 2, EINVAL),
        (5, 0, SIZE, 1, EINVAL),
        (6, 0, SIZE - 1, 2, ENOSPC),
        (6, 0, wrapping, 100, ENOSPC),
        (7, 0, SIZE - 1, 2, EINVAL),
        // TRIM and WRITE_ZEROES above the payload limit do not disconnect.
        (4, 0, 0, u32::MAX, EINVAL),
        (6, 0, 0, u32::MAX, ENOSPC),
        (0, 0, 0, huge, EINVAL),
        // Unknown commands and flags.
        (8, 0, 0, 0, EINVAL),
        (99, 0, 0, 0, EINVAL),
        (0, 0x8000, 0, 1, EINVAL),
        (0, 2, 0, 1, EINVAL),
        (3, 4, 0, 0, EINVAL),
        (4, 8, 0, 1, EINVAL),
        (5, 0x20, 0, 1, EINVAL),
        (6, 4, 0, 1, EINVAL),
        (7, 16, 0, 1, EINVAL),
        // "length and offset are reserved, and MUST be set to all-zero" (FLUSH).
        (3, 0, 0, 1, EINVAL),
        (3, 0, 1, 0, EINVAL),
        // No descriptor may be empty.
        (7, 0, 0, 0, EINVAL),
        // FAST_ZERO with NO_HOLE is not faster than a write.
        (6, 2 | 16, 0, 4096, ENOTSUP),
    ] {
        let case = format!("command {command} flags {flags:#x} at {offset} length {length}");
        let mut driver = Driver::new(TERMS);
        assert_eq!(
            driver.ask(flags, command, offset, length),
            error_chunk(error),
            "{case}"
        );
        assert!(
            driver.submits.is_empty() && driver.transmission.ending().is_none(),
            "{case}"
        );
        assert_eq!(driver.ask(0, 3, 0, 0), simple(0), "{case}: goes on");
    }
}

#[test]
fn flags_that_were_not_negotiated_are_invalid() {
    // DF "MUST NOT be set unless the transmission flags include NBD_FLAG_SEND_DF"; BLOCK_STATUS needs a
    // context.
    let mut driver = Driver::new(SIMPLE);
    assert_eq!(driver.ask(4, 0, 0, 1), simple(EINVAL));
    assert_eq!(driver.ask(0, 7, 0, 1), simple(EINVAL));
    let mut driver = Driver::new(Terms {
        allocation_context: false,
        ..TERMS
    });
    assert_eq!(driver.ask(0, 7, 0, 1), error_chunk(EINVAL));
}

#[test]
fn fua_is_accepted_on_every_command() {
    // "the server MUST accept all commands with this bit set (even by ignoring the bit)".
    let mut driver = Driver::new(TERMS);
    for command in [0, 3, 4, 5, 6, 7] {
        let length = if command == 3 { 0 } else { 4096 };
        let reply = driver.ask(1, command, 0, length);
        assert_ne!(reply[6..8], [0x80, 0x01], "command {command}");
    }
    let header = request(1, 1, 0, 1);
    driver.feed(&header).feed(b"x");
    let expected = DeviceRequest::Write {
        offset_bytes: 0,
        data: Bytes::from_static(b"x"),
        fua: true,
    };
    assert_eq!(driver.submits[0].request, expected);
}

#[test]
fn refused_write_has_its_payload_drained() {
    for (terms, offset, length, error) in [
        (TERMS, SIZE - 1, 2, ENOSPC),
        (TERMS, 0, (32 << 20) + 1, EINVAL),
        (
            Terms {
                read_only: true,
                ..TERMS
            },
            0,
            5000,
            EPERM,
        ),
    ] {
        let mut driver = Driver::new(terms);
        driver.feed(&request(0, 1, offset, length));
        let mut left = length as usize;
        while left > 0 {
            assert!(driver.sent().is_empty(), "the reply follows the payload");
            let run = left.min(1 << 20);
            driver.feed(&vec![0x25; run]);
            assert!(driver.input.is_empty(), "nothing is kept");
            left -= run;
        }
        assert_eq!(driver.sent(), error_chunk(error));
        assert_eq!(driver.ask(0, 3, 0, 0), simple(0));
    }
}

#[test]
fn read_only_export_refuses_all_changes() {
    // "If this flag is set, the server MUST error subsequent write operations to the export."
    let mut driver = Driver::new(Terms {
        read_only: true,
        ..TERMS
    });
    for command in [1, 4, 6] {
        assert_eq!(driver.ask(0, command, 0, 0), error_chunk(EPERM));
    }
    assert_eq!(driver.ask(0, 3, 0, 0), simple(0));
}

#[test]
fn length_zero_succeeds_and_does_nothing() {
    let mut driver = Driver::new(TERMS);
    assert_eq!(driver.ask(0, 0, 0, 0), chunk(1, 0, b""));
    for command in [1, 4, 5, 6] {
        assert_eq!(driver.ask(0, command, SIZE, 0), simple(0));
    }
    assert_eq!(driver.ask(0, 0, SIZE + 1, 0), error_chunk(EINVAL));
    assert_eq!(Driver::new(SIMPLE).ask(0, 0, 0, 0), simple(0));
}

#[test]
fn trim_zeroes_cache_and_flush_reach_the_device() {
    let mut driver = Driver::new(TERMS);
    driver.feed(&request(1, 4, 1, 2));
    driver.feed(&request(2, 6, 3, 4));
    driver.feed(&request(16, 6, 5, 6));
    driver.feed(&request(0, 5, 7, 8));
    driver.feed(&request(0, 3, 0, 0));
    let requests: Vec<_> = driver
        .submits
        .iter()
        .map(|submit| submit.request.clone())
        .collect();
    let zeroes = |offset_bytes, length_bytes, allocate| DeviceRequest::WriteZeroes {
        offset_bytes,
        length_bytes,
        allocate,
        fua: false,
    };
    let expected = [
        DeviceRequest::Trim {
            offset_bytes: 1,
            length_bytes: 2,
            fua: true,
        },
        zeroes(3, 4, true),
        zeroes(5, 6, false),
        DeviceRequest::Prefetch {
            offset_bytes: 7,
            length_bytes: 8,
        },
        DeviceRequest::Flush,
    ];
    assert_eq!(requests, expected);
    assert_eq!(driver.serve().sent(), simple(0).repeat(5));
}

#[test]
fn fast_zero_is_not_supported_only_together_with_no_hole() {
    // "NBD_FLAG_FAST_ZERO is not set, then the server MUST NOT fail with NBD_ENOTSUP".
    let mut driver = Driver::new(TERMS);
    assert_eq!(driver.ask(16, 6, 0, 8192), simple(0));
    assert_eq!(driver.ask(2, 6, 0, 8192), simple(0));
    assert_eq!(driver.ask(2 | 16, 6, 0, 8192), error_chunk(ENOTSUP));
}

#[test]
fn block_status_covers_the_range_in_several_steps() {
    let mut driver = Driver::new(TERMS);
    driver.device.set_extents_max(1);
    driver.write(4096, &[1; 8192]);
    let expected = status_chunk(&[(4096 - 10, 3), (8192, 0), (SIZE as u32 - 3 * 4096, 3)]);
    assert_eq!(driver.ask(0, 7, 10, SIZE as u32 - 10), expected);
    assert_eq!(driver.ask(0, 7, 5000, 100), status_chunk(&[(100, 0)]));
}

#[test]
fn block_status_joins_extents_across_answers() {
    let mut driver = Driver::new(TERMS);
    driver.feed(&request(0, 7, 0, 12288));
    let extent = |length_bytes, allocated| Extent {
        length_bytes,
        allocated,
    };
    let token = driver.submits.remove(0).token;
    let some = DeviceReply::Extents(vec![extent(100, true), extent(200, true)]);
    driver.transmission.handle_completion(token, Ok(some));
    driver.feed(b"");
    let again = driver.submits.remove(0);
    let rest = DeviceRequest::Extents {
        offset_bytes: 300,
        length_bytes: 11988,
    };
    assert_eq!(again.request, rest);
    let more = DeviceReply::Extents(vec![extent(700, true), extent(u64::MAX, false)]);
    driver.transmission.handle_completion(again.token, Ok(more));
    assert_eq!(driver.sent(), status_chunk(&[(1000, 0), (11288, 3)]));
}

#[test]
fn block_status_of_one_extent() {
    // "then every reply chunk MUST contain exactly one descriptor, and that descriptor MUST NOT exceed
    // the length of the original request".
    let mut driver = Driver::new(TERMS);
    driver.write(0, &[1; 4096]);
    driver.write(8192, &[1; 4096]);
    assert_eq!(driver.ask(8, 7, 0, 65536), status_chunk(&[(4096, 0)]));
    assert_eq!(driver.ask(8, 7, 16384, 4096), status_chunk(&[(4096, 3)]));
}

#[test]
fn block_status_ends_when_the_device_says_nothing() {
    let mut driver = Driver::new(TERMS);
    driver.feed(&request(0, 7, 0, 8192));
    let token = driver.submits.remove(0).token;
    driver
        .transmission
        .handle_completion(token, Ok(DeviceReply::Extents(Vec::new())));
    assert_eq!(driver.sent(), status_chunk(&[(8192, 0)]));
}

#[test]
fn block_status_has_at_most_2_to_20_descriptors() {
    let mut driver = Driver::new(Terms {
        size_bytes: 1 << 32,
        ..TERMS
    });
    driver.feed(&request(0, 7, 0, u32::MAX));
    let extents = (0..DESCRIPTORS_MAX + 5).map(|count| Extent {
        length_bytes: 1,
        allocated: count % 2 == 0,
    });
    let token = driver.submits.remove(0).token;
    let reply = DeviceReply::Extents(extents.collect());
    driver.transmission.handle_completion(token, Ok(reply));
    driver.feed(b"");
    assert!(driver.submits.is_empty());
    assert_eq!(driver.sent().len(), 20 + 4 + 8 * DESCRIPTORS_MAX);
}

#[test]
fn many_long_block_statuses_stay_within_the_bound() {
    let mut driver = Driver::new(Terms {
        size_bytes: 1 << 32,
        ..TERMS
    });
    for _ in 0..REQUESTS_IN_FLIGHT_MAX {
        driver.feed(&request(0, 7, 0, u32::MAX));
    }
    // The cell's answers have 4096 extents each; all requests get one in turn.
    let extents = (0..4096).map(|count| Extent {
        length_bytes: 1,
        allocated: count % 2 == 0,
    });
    let reply = DeviceReply::Extents(extents.collect());
    while !driver.submits.is_empty() {
        for submit in std::mem::take(&mut driver.submits) {
            driver
                .transmission
                .handle_completion(submit.token, Ok(reply.clone()));
        }
        driver.feed(b"");
        let kept = driver.transmission.pending_bytes + driver.transmission.sending.length_bytes();
        // Every request has one answer at least, and some had more before the bound was met.
        assert!(kept <= BYTES_IN_FLIGHT_MAX + REQUESTS_IN_FLIGHT_MAX * 33_000);
    }
    assert_eq!(driver.transmission.in_flight(), 0);
}

#[test]
fn requests_in_flight_are_bounded_in_number() {
    let mut driver = Driver::new(TERMS);
    let all = request(0, 0, 0, 1).repeat(REQUESTS_IN_FLIGHT_MAX + 2);
    driver.feed(&all);
    assert_eq!(driver.submits.len(), REQUESTS_IN_FLIGHT_MAX);
    assert!(!driver.transmission.wants_bytes(&driver.input));
    // A reply that is not sent yet still counts.
    driver.device.submit(
        DeviceRequest::Write {
            offset_bytes: 0,
            data: Bytes::from_static(b"x"),
            fua: false,
        },
        CompletionQueue::new(Box::new(|| {})).completion(0),
    );
    driver.serve();
    assert_eq!(driver.input.len(), 2 * Request::BYTES);
    driver.sent();
    driver.feed(b"");
    assert_eq!(driver.submits.len(), 2);
    assert!(driver.transmission.wants_bytes(&driver.input));
}

#[test]
fn requests_in_flight_are_bounded_in_bytes() {
    let mut driver = Driver::new(Terms {
        size_bytes: 1 << 30,
        ..TERMS
    });
    driver.feed(&request(0, 0, 0, 32 << 20).repeat(3));
    assert_eq!(driver.submits.len(), 2);
    // A trim has no payload, but waits for its turn.
    driver.feed(&request(0, 4, 0, 1 << 30));
    assert_eq!(driver.submits.len(), 2);
    let submit = driver.submits.remove(0);
    driver
        .transmission
        .handle_completion(submit.token, Err(DeviceError::Io));
    driver.sent();
    driver.feed(b"");
    assert_eq!(driver.submits.len(), 3, "two reads and the trim");
}

#[test]
fn client_that_does_not_read_is_not_served_without_bound() {
    let mut driver = Driver::new(SIMPLE);
    let bad = request(0, 99, 0, 0).repeat(1000);
    for _ in 0..10_000 {
        driver.feed(&bad);
        if !driver.transmission.wants_bytes(&driver.input) {
            break;
        }
    }
    assert!(!driver.transmission.wants_bytes(&driver.input));
    assert!(driver.transmission.sending.length_bytes() <= BYTES_IN_FLIGHT_MAX + 16);
}

#[test]
fn long_payload_gets_an_aligned_buffer() {
    let mut driver = Driver::new(TERMS);
    let data: Vec<u8> = (0..100_000_u32).map(|at| at as u8).collect();
    driver
        .feed(&request(0, 1, 7, 100_000))
        .feed(&data[..10_000]);
    let buffer = driver.transmission.own_buffer().unwrap();
    assert_eq!(buffer.spare().len(), 90_000);
    buffer.fill(&data[10_000..]);
    driver.transmission.handle_own_buffer();
    driver.feed(b"");
    let DeviceRequest::Write { data: got, .. } = &driver.submits[0].request else {
        panic!("not a write");
    };
    assert_eq!(got.as_ptr().align_offset(4096), 0);
    assert_eq!(got[..], data[..]);
    assert_eq!(driver.serve().sent(), simple(0));
    assert_eq!(driver.device.content()[7..100_007], data[..]);
}

#[test]
fn disconnect_lets_requests_in_flight_end() {
    // "The server MUST handle all outstanding requests".
    let mut driver = Driver::new(TERMS);
    driver
        .feed(&request(0, 0, 0, 1))
        .feed(&request(0, 2, 0, 0))
        .feed(&request(0, 0, 0, 1));
    assert_eq!(driver.submits.len(), 1, "nothing is taken after DISC");
    assert_eq!(driver.transmission.ending(), Some(Ending::Disconnected));
    assert!(!driver.transmission.is_finished());
    assert_eq!(driver.serve().sent(), hole_chunk(1, 0, 1));
    assert!(driver.transmission.is_finished());
}

#[test]
fn nonsense_ends_the_connection() {
    let mut driver = Driver::new(TERMS);
    driver.feed(&[0; 28]);
    let ending = driver.transmission.ending();
    assert_eq!(ending, Some(Ending::Wire(WireError::RequestMagic(0))));
    assert!(driver.sent().is_empty());
}

#[test]
fn wrong_answer_of_the_device_is_an_error() {
    let mut driver = Driver::new(TERMS);
    for wrong in [
        DeviceReply::Done,
        DeviceReply::Data(vec![ReadPart::Hole(4095)]),
        DeviceReply::Data(vec![ReadPart::Hole(u32::MAX), ReadPart::Hole(4097)]),
        DeviceReply::Extents(Vec::new()),
    ] {
        driver.feed(&request(0, 0, 0, 4096));
        let token = driver.submits.remove(0).token;
        driver.transmission.handle_completion(token, Ok(wrong));
        assert_eq!(driver.sent(), error_chunk(5));
    }
    driver
        .transmission
        .handle_completion(99, Ok(DeviceReply::Done));
    assert!(driver.sent().is_empty());
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let well_formed = (
        prop_oneof![4 => Just(0_u16), 1 => 0_u16..40],
        0_u16..10,
        prop_oneof![4 => 0..SIZE, 1 => any::<u64>()],
        prop_oneof![4 => 0_u32..20_000, 1 => 60_000_u32..150_000, 1 => Just(u32::MAX)],
    );
    let bytes = well_formed.prop_map(|(flags, command, offset, length)| {
        let length = if command == 3 && length % 4 != 0 {
            0
        } else {
            length
        };
        let mut bytes = request(flags, command, offset, length);
        if command == 1 && length < 1 << 20 {
            bytes.resize(bytes.len() + length as usize, flags as u8 + 1);
        }
        bytes
    });
    prop_oneof![20 => bytes, 1 => prop::collection::vec(any::<u8>(), 0..60)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a client sends, the cuts of the stream change nothing.
    #[test]
    fn cuts_change_nothing(
        requests in prop::collection::vec(any_request(), 0..12),
        cuts in prop::collection::vec(prop_oneof![1_usize..40, 1_usize..30_000], 1..40),
        structured_replies: bool,
    ) {
        let terms = Terms { structured_replies, allocation_context: structured_replies, ..TERMS };
        let bytes = requests.concat();
        let mut whole = Driver::new(terms);
        whole.feed(&bytes);
        let mut pieces = Driver::new(terms);
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (piece, behind) = rest.split_at((*cut).min(rest.len()));
            pieces.feed(piece);
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(&whole.submits, &pieces.submits);
        prop_assert_eq!(whole.transmission.ending(), pieces.transmission.ending());
        whole.submits.reverse();
        pieces.submits.reverse();
        prop_assert_eq!(whole.serve().sent(), pieces.serve().sent());
        prop_assert_eq!(whole.device.content(), pieces.device.content());
    }

    /// Bytes without any sense neither panic nor take memory.
    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut driver = Driver::new(TERMS);
        driver.feed(&bytes);
        prop_assert!(driver.submits.is_empty() || bytes[..4] == [0x25, 0x60, 0x95, 0x13]);
    }
}
