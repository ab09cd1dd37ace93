use proptest::prelude::*;

use super::*;
use crate::disk::ALIGN_BYTES;

fn flat(queue: &SendQueue) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); 64];
    let used = queue.as_io_slices(&mut slices);
    slices[..used]
        .iter()
        .flat_map(|slice| slice.to_vec())
        .collect()
}

fn frame_bytes(kind: FrameKind, header: &[u8], payload: &[Bytes]) -> Vec<u8> {
    let mut queue = SendQueue::new();
    let write = |out: &mut Vec<u8>| out.extend_from_slice(header);
    queue.frame(kind, GroupId(0), write, payload.iter());
    let bytes = flat(&queue);
    assert_eq!(bytes.len(), queue.len_bytes());
    bytes
}

fn read_all(bytes: &[u8], step: usize) -> Result<Vec<Frame>, FrameError> {
    let mut reader = FrameReader::new(FrameLimits::PEERS);
    let mut frames = Vec::new();
    for part in bytes.chunks(step.max(1)) {
        reader.handle_bytes(part, |frame| frames.push(frame))?;
    }
    Ok(frames)
}

#[test]
fn literal_frame() {
    let bytes = frame_bytes(FrameKind::Request, b"head", &[Bytes::from_static(b"data!")]);
    #[rustfmt::skip]
    let expected = [
        b'P', b'S', b'S', b'F', 1, 32, 0, 0,
        4, 0, 0, 0, 5, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0,
        b'h', b'e', b'a', b'd', b'd', b'a', b't', b'a', b'!',
    ];
    let mut without_crc = bytes.clone();
    without_crc[28..32].fill(0);
    assert_eq!(without_crc, expected);
    assert_eq!(bytes[28..32], LITERAL_CRC);
    let frames = read_all(&bytes, 1).unwrap();
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].kind, FrameKind::Request);
    assert_eq!(&frames[0].header[..], b"head");
    assert_eq!(&frames[0].payload[..], b"data!");
}

/// Computed bit by bit, apart from this program.
const LITERAL_CRC: [u8; 4] = [21, 222, 40, 190];

#[test]
fn empty_frame() {
    let frames = read_all(&frame_bytes(FrameKind::Unknown(200), b"", &[]), 7).unwrap();
    assert_eq!(frames[0].kind, FrameKind::Unknown(200));
    assert!(frames[0].header.is_empty() && frames[0].payload.is_empty());
}

#[test]
fn bad_frames_are_named() {
    let good = frame_bytes(FrameKind::Peer, b"abc", &[]);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        read_all(&bytes, 64).unwrap_err()
    };
    assert_eq!(with(0, b'G'), FrameError::Magic(*b"GSSF"));
    assert_eq!(with(4, 2), FrameError::Version(2));
    assert_eq!(with(5, 9), FrameError::Checksum);
    assert_eq!(with(20, 1), FrameError::Checksum);
    assert_eq!(with(33, b'x'), FrameError::Checksum);
    assert_eq!(
        with(11, 255),
        FrameError::TooLong {
            what: "header",
            have: 0xff00_0003,
            most: 8 << 20,
        }
    );
    assert_eq!(
        with(15, 255),
        FrameError::TooLong {
            what: "payload",
            have: 0xff00_0000,
            most: 65 << 20,
        }
    );
}

#[test]
fn length_beyond_the_limit_is_refused_before_anything_is_allocated() {
    let mut reader = FrameReader::new(FrameLimits::HANDSHAKE);
    let bytes = frame_bytes(FrameKind::Hello, &[0; 5000], &[]);
    let result = reader.handle_bytes(&bytes[..32], |_| panic!("no frame"));
    assert!(matches!(
        result,
        Err(FrameError::TooLong { have: 5000, .. })
    ));
    assert!(reader.buffer.capacity() <= RECEIVE_BYTES);
}

#[test]
fn large_payload_is_aligned_and_not_moved() {
    let payload = Bytes::from(vec![0xab; 1 << 20]);
    let mut bytes = frame_bytes(FrameKind::Peer, b"first", &[]);
    bytes.extend(frame_bytes(
        FrameKind::Peer,
        b"second",
        std::slice::from_ref(&payload),
    ));
    bytes.extend(frame_bytes(FrameKind::Peer, b"third", &[]));
    let frames = read_all(&bytes, 100_000).unwrap();
    assert_eq!(frames.len(), 3);
    assert_eq!(frames[1].payload, payload);
    assert_eq!(frames[1].payload.as_ptr().align_offset(ALIGN_BYTES), 0);
    assert_eq!(&frames[2].header[..], b"third");
}

#[test]
fn large_payload_that_arrives_whole_is_a_slice() {
    let payload = Bytes::from(vec![1; LARGE_PAYLOAD_BYTES]);
    let bytes = frame_bytes(FrameKind::Peer, b"x", std::slice::from_ref(&payload));
    let frames = read_all(&bytes, bytes.len()).unwrap();
    assert_eq!(frames[0].payload, payload);
}

#[test]
fn queue_copies_small_parts_and_keeps_large_ones() {
    let large = Bytes::from(vec![7; COPY_BELOW_BYTES]);
    let small = Bytes::from(vec![8; COPY_BELOW_BYTES - 1]);
    let mut queue = SendQueue::new();
    let parts = [large.clone(), small.clone()];
    queue.frame(FrameKind::Peer, GroupId(0), |_| {}, parts.iter());
    let mut slices = [IoSlice::new(&[]); 8];
    assert_eq!(queue.as_io_slices(&mut slices), 3);
    assert_eq!(slices[0].len(), FRAME_HEAD_BYTES);
    assert_eq!(slices[1].as_ptr(), large.as_ptr());
    assert_eq!(slices[2][..], small[..]);
    queue.clear();
    assert!(queue.is_empty());
    assert!(flat(&queue).is_empty());
}

#[test]
fn few_slices_give_the_front_of_the_queue() {
    let part = Bytes::from(vec![7; 5000]);
    let mut queue = SendQueue::new();
    queue.frame(
        FrameKind::Peer,
        GroupId(0),
        |_| {},
        [&part, &part].into_iter(),
    );
    let mut slices = [IoSlice::new(&[]); 2];
    assert_eq!(queue.as_io_slices(&mut slices), 2);
    assert_eq!(slices[1].len(), 5000);
}

fn payload() -> impl Strategy<Value = Vec<Bytes>> {
    let part = prop_oneof![0..2000_usize, Just(4096), Just(70_000), Just(200_000)];
    let part = (part, any::<u8>()).prop_map(|(length, byte)| Bytes::from(vec![byte; length]));
    prop::collection::vec(part, 0..4)
}

fn frames() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<Bytes>)>> {
    let header = prop::collection::vec(any::<u8>(), 0..300);
    prop::collection::vec((header, payload()), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn round_trip_in_any_pieces(
        frames in frames(),
        steps in prop::collection::vec(1..90_000_usize, 1..8),
        sends in prop::collection::vec(1..60_000_usize, 1..8),
    ) {
        let mut queue = SendQueue::new();
        for (header, payload) in &frames {
            let write = |out: &mut Vec<u8>| out.extend_from_slice(header);
            queue.frame(FrameKind::Peer, GroupId(3), write, payload.iter());
        }
        // Sent in pieces of any size ...
        let mut bytes = Vec::new();
        for send in sends.iter().cycle() {
            if queue.is_empty() {
                break;
            }
            let front = flat(&queue);
            let count = front.len().min(*send);
            bytes.extend_from_slice(&front[..count]);
            queue.advance(count);
        }
        // ... and received in pieces of others.
        let mut reader = FrameReader::new(FrameLimits::PEERS);
        let mut received = Vec::new();
        let mut rest = &bytes[..];
        for step in steps.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (part, behind) = rest.split_at(rest.len().min(*step));
            reader.handle_bytes(part, |frame| received.push(frame)).unwrap();
            rest = behind;
        }
        prop_assert!(reader.is_between_frames());
        prop_assert_eq!(received.len(), frames.len());
        for (frame, (header, payload)) in received.iter().zip(&frames) {
            prop_assert_eq!(frame.group, GroupId(3));
            prop_assert_eq!(&frame.header[..], &header[..]);
            prop_assert_eq!(frame.payload.to_vec(), payload.concat());
        }
    }

    #[test]
    fn garbage_never_panics(
        mut bytes in prop::collection::vec(any::<u8>(), 0..2000),
        step in 1..500_usize,
        is_framed in any::<bool>(),
    ) {
        if is_framed && bytes.len() > 5 {
            bytes[..4].copy_from_slice(&FRAME_MAGIC);
            bytes[4] = FRAME_VERSION;
        }
        let _ = read_all(&bytes, step);
    }

    #[test]
    fn one_changed_byte_before_the_payload_is_noticed(at in 0..100_usize, change in 1..=255_u8) {
        let mut bytes = frame_bytes(FrameKind::Peer, &[5; 68], &[]);
        bytes[at] ^= change;
        let frames = read_all(&bytes, 1000);
        // A longer length may leave the frame incomplete; a frame never comes out of it.
        prop_assert!(frames.is_err() || frames.unwrap().is_empty());
    }
}
