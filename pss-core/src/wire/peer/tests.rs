use std::io::IoSlice;

use proptest::prelude::*;

use super::*;
use crate::chunk::Digest;
use crate::entry::{Command, Op, block_checksums};
use crate::key::CellKey;
use crate::types::{BLOCK_BYTES, RequestNumber, SessionId};
use crate::wire::frame::{FrameLimits, FrameReader};
use crate::wire::survey::{POINT_CHUNKS_MAX, PointAnswer, PointRequest, PointResult, PointStage};

fn frame_of(message: &Message) -> Frame {
    let mut out = SendQueue::new();
    encode_frame(message, &mut out);
    let mut slices = [IoSlice::new(&[]); 256];
    let used = out.as_io_slices(&mut slices);
    let bytes: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
    assert_eq!(bytes.len(), out.len_bytes());
    let mut frames = Vec::new();
    FrameReader::new(FrameLimits::PEERS)
        .handle_bytes(&bytes, |frame| frames.push(frame))
        .unwrap();
    frames.remove(0)
}

fn ballot(number: u64, server: u8) -> Ballot {
    Ballot {
        number,
        server: ServerId(server),
    }
}

fn standing() -> Standing {
    Standing {
        life: Incarnation(7),
        promised: ballot(5, 1),
        acknowledged: EntryId {
            ballot: ballot(6, 2),
            slot: Slot(9),
        },
    }
}

fn lives() -> impl Strategy<Value = Admitted> {
    prop::collection::vec((0..8u8, any::<u64>()), 0..4).prop_map(|lives| {
        let mut admitted = Admitted::default();
        for (server, life) in lives {
            admitted.admit(ServerId(server), Incarnation(life));
        }
        admitted
    })
}

fn id(number: u64, slot: u64) -> EntryId {
    EntryId {
        ballot: ballot(number, 1),
        slot: Slot(slot),
    }
}

fn entry(slot: u64, blocks: &[usize]) -> Entry {
    let commands = blocks.iter().map(|blocks| {
        let payload = Bytes::from(vec![slot as u8; blocks * BLOCK_BYTES]);
        Command {
            session: SessionId(9),
            number: RequestNumber(slot),
            settled_below: RequestNumber(1),
            op: Op::Write {
                volume: VolumeId(1),
                first_block: 5,
                checksums: block_checksums(VolumeId(1), 5, &payload),
                payload,
            },
        }
    });
    Entry {
        id: id(2, slot),
        prev: ballot(1, 0),
        commands: commands.chain([Command::internal(Op::Noop)]).collect(),
    }
}

fn progress() -> impl Strategy<Value = Progress> {
    any::<(u64, u64, u64, u64, bool)>().prop_map(|(chosen, applied, first, free, installing)| {
        Progress {
            chosen: Slot(chosen),
            applied: Slot(applied),
            log_first: Slot(first),
            free_bytes: free,
            installing,
        }
    })
}

fn blocks() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(any::<u64>(), 0..=BLOCKS_ASKED_MAX)
}

fn digests() -> impl Strategy<Value = Vec<(ChunkIndex, Option<Digest>)>> {
    let digest = prop::option::of(any::<[u8; 32]>().prop_map(Digest));
    let chunk = (any::<u32>().prop_map(ChunkIndex), digest);
    prop::collection::vec(chunk, 0..=POINT_CHUNKS_MAX)
}

fn datagram_message() -> impl Strategy<Value = Message> {
    let ballots = || any::<(u64, u8)>().prop_map(|(number, server)| ballot(number, server));
    let ids = move || {
        (ballots(), any::<u64>()).prop_map(|(ballot, slot)| EntryId {
            ballot,
            slot: Slot(slot),
        })
    };
    let slots = || any::<u64>().prop_map(Slot);
    let standings = move || {
        (any::<u64>(), ballots(), ids()).prop_map(|(life, promised, acknowledged)| Standing {
            life: Incarnation(life),
            promised,
            acknowledged,
        })
    };
    prop_oneof![
        (ballots(), ids()).prop_map(|(ballot, last)| Message::PreCheck { ballot, last }),
        (ballots(), any::<bool>(), ballots(), ids()).prop_map(
            |(ballot, granted, promised, last)| Message::PreCheckAnswer {
                ballot,
                granted,
                promised,
                last
            }
        ),
        (ballots(), prop::option::of(ballots()))
            .prop_map(|(ballot, released)| Message::Prepare { ballot, released }),
        (ballots(), ids(), ids(), ids(), slots(), lives()).prop_map(
            |(ballot, last, certain, have, chosen, admitted)| {
                Message::Promise {
                    ballot,
                    last,
                    certain,
                    have,
                    chosen,
                    admitted,
                }
            }
        ),
        Just(Message::Rejoin),
        ballots().prop_map(|ballot| Message::Absent { ballot }),
        (standings(), any::<(bool, u64)>()).prop_map(|(standing, (asks, epoch))| {
            Message::Standing {
                standing,
                asks,
                epoch,
            }
        }),
        (standings(), any::<(bool, u64)>()).prop_map(|(mark, (alive, epoch))| Message::Seen {
            mark,
            alive,
            epoch
        }),
        (ballots(), ballots()).prop_map(|(ballot, promised)| Message::Nack { ballot, promised }),
        (ballots(), slots()).prop_map(|(ballot, durable)| Message::Accepted { ballot, durable }),
        (ballots(), slots()).prop_map(|(ballot, resume_after)| Message::AcceptRejected {
            ballot,
            resume_after
        }),
        (ballots(), any::<u64>(), slots(), slots()).prop_map(|(ballot, sent, chosen, last)| {
            Message::Heartbeat {
                ballot,
                sent: Instant(sent),
                chosen,
                last,
            }
        }),
        (ballots(), any::<u64>(), slots(), slots(), progress()).prop_map(
            |(ballot, sent, durable, received, progress)| Message::HeartbeatAck {
                ballot,
                sent: Instant(sent),
                durable,
                received,
                progress
            }
        ),
        ballots().prop_map(|ballot| Message::HandOver { ballot }),
        (ballots(), slots()).prop_map(|(ballot, after)| Message::FetchTail { ballot, after }),
        slots().prop_map(|after| Message::CatchUp { after }),
        (slots(), slots()).prop_map(|(first, chosen)| Message::LogGone { first, chosen }),
        progress().prop_map(Message::Progress),
        (slots(), any::<u32>(), blocks()).prop_map(|(at_least, volume, blocks)| {
            Message::Sync(SyncMessage::RequestBlocks {
                at_least,
                volume: VolumeId(volume),
                blocks,
            })
        }),
        (any::<(u64, u32, u32, u32, bool)>(), slots()).prop_map(
            |((id, volume, from, most, calm), at)| {
                Message::Sync(SyncMessage::TakePoint(PointRequest {
                    id,
                    at,
                    volume: VolumeId(volume),
                    from: ChunkIndex(from),
                    chunks_max: most,
                    calm,
                }))
            }
        ),
        (any::<(u64, u64, u64, Option<u32>)>(), slots(), digests()).prop_map(
            |((id, size_bytes, bad, until), at, chunks)| {
                let result = PointResult {
                    size_bytes,
                    until: until.map(ChunkIndex),
                    digest: chunks.first().and_then(|it| it.1),
                    blocks: 9,
                    bad,
                    chunks,
                };
                let stage = PointStage::Done(result);
                Message::Sync(SyncMessage::Point(PointAnswer { id, at, stage }))
            }
        ),
        any::<u32>().prop_map(|volume| {
            let volume = VolumeId(volume);
            Message::Sync(SyncMessage::BlocksRefused { volume })
        }),
    ]
}

fn frame_message() -> impl Strategy<Value = Message> {
    let entries = prop::collection::vec(prop::collection::vec(0..4_usize, 0..4), 0..4);
    let entries = entries.prop_map(|shapes| {
        let shapes = shapes.iter().zip(1..);
        shapes
            .map(|(blocks, slot)| entry(slot, blocks))
            .collect::<Vec<_>>()
    });
    let bytes = prop::collection::vec(any::<u8>(), 0..3000).prop_map(Bytes::from);
    let summary = any::<(u32, u64, u32)>().prop_map(|(chunk, slot, digest)| ChunkSummary {
        chunk: ChunkIndex(chunk),
        last_slot: Slot(slot),
        digest,
    });
    let list = (
        any::<(u64, u32, u32)>(),
        prop::option::of(any::<u32>().prop_map(ChunkIndex)),
        prop::collection::vec(summary, 0..20),
    );
    let sync = prop_oneof![
        Just(SyncMessage::RequestBase),
        bytes.clone().prop_map(|state| SyncMessage::Base {
            base: id(3, 4),
            state
        }),
        any::<(u64, u32, u32)>().prop_map(|(slot, volume, from)| SyncMessage::RequestList {
            at_least: Slot(slot),
            volume: VolumeId(volume),
            from: ChunkIndex(from),
        }),
        (list, any::<u16>()).prop_map(|(((slot, volume, from), until, chunks), total)| {
            SyncMessage::List {
                as_of: Slot(slot),
                volume: VolumeId(volume),
                from: ChunkIndex(from),
                until,
                total: u64::from(total),
                chunks,
            }
        }),
        any::<(u64, u32, u32)>().prop_map(|(slot, volume, chunk)| SyncMessage::RequestChunk {
            at_least: Slot(slot),
            volume: VolumeId(volume),
            chunk: ChunkIndex(chunk),
        }),
        (any::<(u64, u32, u32)>(), bytes).prop_map(|((slot, volume, chunk), image)| {
            SyncMessage::Chunk {
                as_of: Slot(slot),
                volume: VolumeId(volume),
                chunk: ChunkIndex(chunk),
                image,
            }
        }),
        Just(SyncMessage::Refused),
        (any::<(u64, u32)>(), blocks(), blocks()).prop_map(|((slot, volume), damaged, blocks)| {
            SyncMessage::Blocks {
                as_of: Slot(slot),
                volume: VolumeId(volume),
                damaged,
                data: Bytes::from(vec![slot as u8; blocks.len() * BLOCK_BYTES]),
                blocks,
            }
        }),
    ];
    prop_oneof![
        datagram_message(),
        entries.clone().prop_map(|entries| Message::Accept {
            ballot: ballot(7, 2),
            prev: id(1, 0),
            entries,
            chosen: Slot(3),
        }),
        entries.clone().prop_map(|entries| Message::Tail {
            ballot: ballot(7, 2),
            prev: id(1, 0),
            entries,
            last: id(2, 9),
        }),
        entries.prop_map(|entries| Message::Chosen {
            prev: id(1, 0),
            entries,
            chosen: Slot(3),
        }),
        sync.prop_map(Message::Sync),
    ]
}

fn datagrams(own: u8, key: Option<u8>) -> Datagrams {
    let key = key.map(|byte| MacKey::new(&CellKey::from_bytes([byte; 32])));
    Datagrams::new(
        CellId([0xcc; 16]),
        ServerId(own),
        Incarnation(2),
        0x0807_0605_0403_0201,
        key,
    )
}

fn heartbeat() -> Message {
    Message::Heartbeat {
        ballot: ballot(5, 1),
        sent: Instant(6),
        chosen: Slot(7),
        last: Slot(8),
    }
}

#[test]
fn literal_datagram() {
    let mut bytes = Vec::new();
    datagrams(1, None)
        .encode(ServerId(3), &heartbeat(), &mut bytes)
        .unwrap();
    let mut expected = b"PSSD\x01\x00\x00\x00".to_vec();
    expected.extend([0xcc; 16]);
    expected.extend([1, 3, 0, 0]);
    expected.extend([2, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([9, 5, 0, 0, 0, 0, 0, 0, 0, 1]);
    expected.extend([
        6, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let crc = crc32c::crc32c(&expected);
    expected.extend(crc.to_le_bytes());
    assert_eq!(bytes, expected);
}

#[test]
fn literal_accept_header() {
    let message = Message::Accept {
        ballot: ballot(5, 1),
        prev: id(4, 2),
        entries: vec![Entry {
            id: id(5, 3),
            prev: ballot(4, 1),
            commands: [].into(),
        }],
        chosen: Slot(1),
    };
    #[rustfmt::skip]
    let expected = [
        6, 5, 0, 0, 0, 0, 0, 0, 0, 1,
        4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 30, 0, 0, 0, 0, 0, 0, 0,
        3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
    ];
    assert_eq!(frame_of(&message).header[..], expected);
}

/// Made from docs/wire.md apart from this program: code and fields of every message that has no
/// test of its own above.
#[test]
fn literal_messages() {
    let progress = Progress {
        chosen: Slot(21),
        applied: Slot(22),
        log_first: Slot(23),
        free_bytes: 24,
        installing: true,
    };
    let summary = ChunkSummary {
        chunk: ChunkIndex(28),
        last_slot: Slot(29),
        digest: 30,
    };
    let volume = VolumeId(3);
    let bytes = Bytes::from_static(b"bytes");
    let messages = [
        (
            Message::PreCheck {
                ballot: ballot(5, 1),
                last: id(6, 7),
            },
            "010500000000000000010600000000000000010700000000000000",
        ),
        (
            Message::PreCheckAnswer {
                ballot: ballot(5, 1),
                granted: true,
                promised: ballot(8, 2),
                last: id(6, 7),
            },
            "02050000000000000001010800000000000000020600000000000000010700000000000000",
        ),
        (
            Message::Prepare {
                ballot: ballot(5, 1),
                released: Some(ballot(4, 3)),
            },
            "0305000000000000000101040000000000000003",
        ),
        (
            Message::Prepare {
                ballot: ballot(5, 1),
                released: None,
            },
            "0305000000000000000100000000000000000000",
        ),
        (
            Message::Promise {
                ballot: ballot(5, 1),
                last: id(6, 7),
                certain: id(11, 12),
                have: id(8, 9),
                chosen: Slot(10),
                admitted: Admitted::default(),
            },
            "0405000000000000000106000000000000000107000000000000000b00000000000000010c0000000000000008000000000000000109000000000000000a00000000000000",
        ),
        (
            Message::Promise {
                ballot: ballot(5, 1),
                last: id(6, 7),
                certain: id(11, 12),
                have: id(8, 9),
                chosen: Slot(10),
                admitted: {
                    let mut admitted = Admitted::default();
                    admitted.admit(ServerId(1), Incarnation(13));
                    admitted
                },
            },
            concat!(
                "1305000000000000000106000000000000000107000000000000000b00000000000000010c00000000000000",
                "08000000000000000109000000000000000a00000000000000",
                "00000000000000000d00000000000000000000000000000000000000000000000000000000000000",
                "000000000000000000000000000000000000000000000000",
            ),
        ),
        (Message::Rejoin, "12"),
        (
            Message::Absent {
                ballot: ballot(5, 1),
            },
            "14050000000000000001",
        ),
        (
            Message::Standing {
                standing: standing(),
                asks: true,
                epoch: 2,
            },
            concat!(
                "15070000000000000005000000000000000106000000000000000209000000000000",
                "00010200000000000000"
            ),
        ),
        (
            Message::Seen {
                mark: standing(),
                alive: false,
                epoch: 2,
            },
            concat!(
                "16070000000000000005000000000000000106000000000000000209000000000000",
                "00000200000000000000"
            ),
        ),
        (
            Message::Nack {
                ballot: ballot(5, 1),
                promised: ballot(8, 2),
            },
            "05050000000000000001080000000000000002",
        ),
        (
            Message::Accepted {
                ballot: ballot(5, 1),
                durable: Slot(11),
            },
            "070500000000000000010b00000000000000",
        ),
        (
            Message::AcceptRejected {
                ballot: ballot(5, 1),
                resume_after: Slot(12),
            },
            "080500000000000000010c00000000000000",
        ),
        (
            Message::HeartbeatAck {
                ballot: ballot(5, 1),
                sent: Instant(13),
                durable: Slot(14),
                received: Slot(20),
                progress,
            },
            "0a0500000000000000010d000000000000000e000000000000001400000000000000150000000000000016000000000000001700000000000000180000000000000001",
        ),
        (
            Message::HandOver {
                ballot: ballot(5, 1),
            },
            "0b050000000000000001",
        ),
        (
            Message::FetchTail {
                ballot: ballot(5, 1),
                after: Slot(15),
            },
            "0c0500000000000000010f00000000000000",
        ),
        (
            Message::Tail {
                ballot: ballot(5, 1),
                prev: id(6, 7),
                entries: vec![],
                last: id(8, 9),
            },
            "0d0500000000000000010600000000000000010700000000000000080000000000000001090000000000000000000000",
        ),
        (Message::CatchUp { after: Slot(16) }, "0e1000000000000000"),
        (
            Message::Chosen {
                prev: id(6, 7),
                entries: vec![],
                chosen: Slot(17),
            },
            "0f0600000000000000010700000000000000110000000000000000000000",
        ),
        (
            Message::LogGone {
                first: Slot(18),
                chosen: Slot(19),
            },
            "1012000000000000001300000000000000",
        ),
        (
            Message::Progress(progress),
            "11150000000000000016000000000000001700000000000000180000000000000001",
        ),
        (Message::Sync(SyncMessage::RequestBase), "20"),
        (
            Message::Sync(SyncMessage::Base {
                base: id(6, 7),
                state: bytes.clone(),
            }),
            "210600000000000000010700000000000000929c6ed0",
        ),
        (
            Message::Sync(SyncMessage::RequestList {
                at_least: Slot(25),
                volume,
                from: ChunkIndex(26),
            }),
            "221900000000000000030000001a000000",
        ),
        (
            Message::Sync(SyncMessage::List {
                as_of: Slot(25),
                volume,
                from: ChunkIndex(26),
                until: Some(ChunkIndex(27)),
                total: 0,
                chunks: vec![summary],
            }),
            "231900000000000000030000001a000000011b000000010000001c0000001d000000000000001e000000",
        ),
        (
            Message::Sync(SyncMessage::List {
                as_of: Slot(25),
                volume,
                from: ChunkIndex(26),
                until: Some(ChunkIndex(27)),
                total: 31,
                chunks: vec![summary],
            }),
            "271f000000000000001900000000000000030000001a000000011b000000010000001c0000001d000000000000001e000000",
        ),
        (
            Message::Sync(SyncMessage::RequestChunk {
                at_least: Slot(25),
                volume,
                chunk: ChunkIndex(26),
            }),
            "241900000000000000030000001a000000",
        ),
        (
            Message::Sync(SyncMessage::Chunk {
                as_of: Slot(25),
                volume,
                chunk: ChunkIndex(26),
                image: bytes,
            }),
            "251900000000000000030000001a000000929c6ed0",
        ),
        (Message::Sync(SyncMessage::Refused), "26"),
        (
            Message::Sync(SyncMessage::RequestBlocks {
                at_least: Slot(25),
                volume,
                blocks: vec![32, 33],
            }),
            "281900000000000000030000000200000020000000000000002100000000000000",
        ),
        (
            Message::Sync(SyncMessage::Blocks {
                as_of: Slot(25),
                volume,
                damaged: vec![32],
                blocks: vec![33],
                data: Bytes::from(vec![7; BLOCK_BYTES]),
            }),
            "29190000000000000003000000010000002000000000000000010000002100000000000000a9788697",
        ),
        (
            Message::Sync(SyncMessage::BlocksRefused { volume }),
            "2a03000000",
        ),
    ];
    for (message, hex) in messages {
        let header = frame_of(&message).header;
        let written: String = header.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(written, hex, "{message:?}");
    }
}

#[test]
fn payload_of_entries_is_not_copied() {
    let entries = vec![entry(1, &[1, 2]), entry(2, &[]), entry(3, &[1])];
    let parts: Vec<_> = entries
        .iter()
        .flat_map(Entry::payload_parts)
        .cloned()
        .collect();
    let message = Message::Chosen {
        prev: id(1, 0),
        entries,
        chosen: Slot(3),
    };
    let mut out = SendQueue::new();
    encode_frame(&message, &mut out);
    let mut slices = [IoSlice::new(&[]); 8];
    assert_eq!(out.as_io_slices(&mut slices), 4);
    for (slice, part) in slices[1..].iter().zip(&parts) {
        assert_eq!(slice.as_ptr(), part.as_ptr());
    }
    let frame = frame_of(&message);
    let whole = frame.payload.as_ptr_range();
    let Message::Chosen { entries, .. } = decode_frame(frame).unwrap() else {
        panic!();
    };
    for part in entries.iter().flat_map(Entry::payload_parts) {
        assert!(whole.contains(&part.as_ptr()));
    }
    entries.iter().for_each(|entry| entry.verify().unwrap());
}

#[test]
fn blocks_are_bounded_and_complete() {
    let blocks = |count: usize| (0..count as u64).collect::<Vec<_>>();
    let request = |count| {
        Message::Sync(SyncMessage::RequestBlocks {
            at_least: Slot(u64::MAX),
            volume: VolumeId(1),
            blocks: blocks(count),
        })
    };
    let most = request(BLOCKS_ASKED_MAX);
    assert_eq!(decode_frame(frame_of(&most)).unwrap(), most);
    let mut datagram = Vec::new();
    datagrams(1, Some(1))
        .encode(ServerId(2), &most, &mut datagram)
        .unwrap();
    let more = decode_frame(frame_of(&request(BLOCKS_ASKED_MAX + 1)));
    assert!(matches!(more, Err(DecodeError::TooLong { .. })), "{more:?}");
    // Data of fewer or more blocks than are named, or changed ones.
    let answer = |named, bytes| {
        Message::Sync(SyncMessage::Blocks {
            as_of: Slot(1),
            volume: VolumeId(1),
            damaged: Vec::new(),
            blocks: blocks(named),
            data: Bytes::from(vec![1; bytes]),
        })
    };
    for (named, bytes) in [
        (1, 0),
        (0, BLOCK_BYTES),
        (2, BLOCK_BYTES),
        (1, BLOCK_BYTES - 1),
    ] {
        let decoded = decode_frame(frame_of(&answer(named, bytes)));
        assert!(
            matches!(decoded, Err(DecodeError::PayloadLength { .. })),
            "{decoded:?}"
        );
    }
    let mut frame = frame_of(&answer(1, BLOCK_BYTES));
    frame.payload = Bytes::from(vec![2; BLOCK_BYTES]);
    assert_eq!(decode_frame(frame), Err(DecodeError::Checksum));
}

#[test]
fn damaged_image_is_noticed() {
    let message = Message::Sync(SyncMessage::Chunk {
        as_of: Slot(1),
        volume: VolumeId(1),
        chunk: ChunkIndex(1),
        image: Bytes::from_static(b"image"),
    });
    let mut frame = frame_of(&message);
    frame.payload = Bytes::from_static(b"imagE");
    assert_eq!(decode_frame(frame), Err(DecodeError::Checksum));
}

#[test]
fn entries_are_no_datagram() {
    let message = Message::Chosen {
        prev: id(1, 0),
        entries: vec![],
        chosen: Slot(3),
    };
    let result = datagrams(1, None).encode(ServerId(2), &message, &mut Vec::new());
    assert_eq!(result, Err(DatagramError::NoDatagram));
}

#[test]
fn datagram_errors_are_named() {
    let encode = |key| {
        let mut bytes = Vec::new();
        datagrams(1, key)
            .encode(ServerId(2), &heartbeat(), &mut bytes)
            .unwrap();
        bytes
    };
    let decode = |own, key, bytes: &[u8]| datagrams(own, key).decode(bytes).unwrap_err();
    let (plain, signed) = (encode(None), encode(Some(1)));
    assert_eq!(decode(2, None, &signed), DatagramError::KeyMissing);
    assert_eq!(decode(2, Some(1), &plain), DatagramError::NotSigned);
    assert_eq!(decode(2, Some(2), &signed), DatagramError::Signature);
    assert_eq!(decode(2, None, b"PSSD"), DatagramError::Truncated);
    assert_eq!(decode(2, None, b"GET / HTTP"), DatagramError::Magic);
    assert_eq!(decode(2, None, b"PSSD\x09\0\0"), DatagramError::Version(9));
    let (from, to) = (ServerId(1), ServerId(2));
    assert_eq!(
        decode(3, None, &plain),
        DatagramError::OtherServer { from, to }
    );
    let mut other = datagrams(2, None);
    other.cell = CellId([1; 16]);
    assert_eq!(
        other.decode(&plain),
        Err(DatagramError::OtherCell(CellId([0xcc; 16])))
    );
}

#[test]
fn replayed_datagram_is_dropped() {
    let mut bytes = Vec::new();
    datagrams(1, Some(1))
        .encode(ServerId(2), &heartbeat(), &mut bytes)
        .unwrap();
    let mut receiver = datagrams(2, Some(1));
    assert_eq!(receiver.decode(&bytes).unwrap().message, heartbeat());
    let from = ServerId(1);
    assert_eq!(
        receiver.decode(&bytes),
        Err(DatagramError::Replayed { from, sequence: 1 })
    );
}

#[test]
fn window_admits_each_number_once_within_its_span() {
    let mut window = ReplayWindow::default();
    assert!(!window.admit(1, 0));
    assert!(window.admit(1, 5) && window.admit(1, 3) && !window.admit(1, 3));
    assert!(window.admit(1, 2000));
    assert!(!window.admit(1, 976), "too old to tell");
    assert!(window.admit(1, 977) && !window.admit(1, 977));
    assert!(window.admit(1, u64::MAX) && !window.admit(1, u64::MAX));
}

#[test]
fn window_of_a_new_boot_starts_anew_and_the_old_one_is_kept() {
    let mut window = ReplayWindow::default();
    assert!(window.admit(1, 1) && window.admit(2, 1) && !window.admit(1, 1));
    assert!((3..20).all(|boot| window.admit(boot, 1)));
    assert_eq!(window.boots.len(), BOOTS_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn frame_round_trip(message in frame_message()) {
        prop_assert_eq!(decode_frame(frame_of(&message)).unwrap(), message);
    }

    #[test]
    fn datagram_round_trip(message in datagram_message(), key in prop::option::of(any::<u8>())) {
        let mut bytes = Vec::new();
        datagrams(4, key).encode(ServerId(6), &message, &mut bytes).unwrap();
        prop_assert!(bytes.len() <= DATAGRAM_BYTES_MAX);
        let datagram = datagrams(6, key).decode(&bytes).unwrap();
        prop_assert_eq!(datagram.from, ServerId(4));
        prop_assert_eq!(datagram.incarnation, Incarnation(2));
        prop_assert_eq!(datagram.message, message);
    }

    #[test]
    fn changed_datagram_is_refused(
        message in datagram_message(),
        key in prop::option::of(any::<u8>()),
        at in any::<prop::sample::Index>(),
        change in 1..=255_u8,
    ) {
        let mut bytes = Vec::new();
        datagrams(4, key).encode(ServerId(6), &message, &mut bytes).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        prop_assert!(datagrams(6, key).decode(&bytes).is_err());
    }

    #[test]
    fn cut_or_changed_message_never_panics(
        message in frame_message(),
        cut in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        change in any::<u8>(),
        payload_bytes in 0..20_000_usize,
    ) {
        let mut frame = frame_of(&message);
        let mut header = frame.header.to_vec();
        let index = at.index(header.len());
        header[index] ^= change;
        header.truncate(cut.index(header.len() + 1));
        frame.header = header.into();
        frame.payload = frame.payload.slice(..frame.payload.len().min(payload_bytes));
        let _ = decode_frame(frame);
    }

    #[test]
    fn every_cut_header_is_an_error(message in frame_message(), cut in any::<prop::sample::Index>()) {
        let mut frame = frame_of(&message);
        frame.header = frame.header.slice(..cut.index(frame.header.len()));
        prop_assert!(decode_frame(frame).is_err());
    }

    #[test]
    fn garbage_never_panics(header in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&header, Bytes::new());
        let _ = datagrams(1, None).decode(&header);
    }

    #[test]
    fn window_agrees_with_a_set(numbers in prop::collection::vec(1..3000_u64, 0..400)) {
        let mut window = ReplayWindow::default();
        let mut seen = std::collections::BTreeSet::new();
        for number in numbers {
            let newest = seen.last().copied().unwrap_or(0);
            let is_new = number + 1024 > newest && seen.insert(number);
            prop_assert_eq!(window.admit(1, number), is_new);
        }
    }
}
