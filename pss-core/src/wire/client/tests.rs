use std::io::IoSlice;

use proptest::prelude::*;

use super::*;
use crate::entry::{Origin, VOLUME_NAME_MAX};
use crate::state::{AdminAction, AdminEvent};
use crate::types::Slot;
use crate::volume::reservation::{Nexus, ReservationAction};
use crate::wire::frame::{FrameLimits, FrameReader};
use crate::wire::inspect::{
    CommandInfo, EntryInfo, FilesInfo, INSPECT_CHUNKS_MAX, INSPECT_COMMANDS_MAX,
    INSPECT_ENTRIES_MAX, INSPECT_NAME_MAX, INSPECT_SEGMENTS_MAX, INSPECT_USERS_MAX,
    INSPECT_VOLUMES_MAX, Inspect, LogInfo, OpenChunk, OpenVolume, SegmentInfo, SurveyQuestion,
    SurveyScope,
};

fn frame_of(encode: impl FnOnce(&mut SendQueue), limits: FrameLimits) -> Frame {
    let mut out = SendQueue::new();
    encode(&mut out);
    let mut slices = [IoSlice::new(&[]); 64];
    let used = out.as_io_slices(&mut slices);
    let bytes: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
    let mut frames = Vec::new();
    FrameReader::new(limits)
        .handle_bytes(&bytes, |frame| frames.push(frame))
        .unwrap();
    frames.remove(0)
}

fn request_frame(request: &Request) -> Frame {
    frame_of(|out| request.encode(out), FrameLimits::REQUESTS)
}

fn reply_frame(reply: &Reply) -> Frame {
    frame_of(|out| reply.encode(out), FrameLimits::REPLIES)
}

fn request(body: RequestBody) -> Request {
    Request {
        tag: 0x0102,
        session: SessionId(3),
        number: RequestNumber(4),
        settled_below: RequestNumber(5),
        body,
    }
}

fn write(offset_bytes: u64, data: Bytes) -> RequestBody {
    RequestBody::Write {
        volume: VolumeId(7),
        offset_bytes,
        checksums: RequestBody::write_checksums(VolumeId(7), offset_bytes, &data),
        data,
    }
}

fn data(most: usize) -> impl Strategy<Value = Bytes> {
    let length = prop_oneof![0..most, Just(BLOCK_BYTES), Just(2 * BLOCK_BYTES)];
    (length, any::<u8>()).prop_map(|(length, byte)| Bytes::from(vec![byte; length]))
}

fn body() -> impl Strategy<Value = RequestBody> {
    let volume = || any::<u32>().prop_map(VolumeId);
    let offset = || prop_oneof![any::<u64>(), (0..9_u64).prop_map(|block| block * 4096)];
    prop_oneof![
        (any::<u64>(), "[a-zé]{0,20}", "[a-zé]{0,20}")
            .prop_map(|(nonce, name, user)| RequestBody::OpenSession { nonce, name, user }),
        any::<u64>().prop_map(|after| RequestBody::Events { after }),
        "[a-zé\\x00]{0,60}".prop_map(|text| RequestBody::Note { text }),
        Just(RequestBody::SetServers { members: members() }),
        Just(RequestBody::Recover { members: members() }),
        Just(RequestBody::EndSession),
        Just(RequestBody::KeepAlive),
        (volume(), offset(), 0..=REQUEST_BYTES_MAX as u32).prop_map(
            |(volume, offset_bytes, length_bytes)| RequestBody::Read {
                volume,
                offset_bytes,
                length_bytes
            }
        ),
        (offset(), data(9000)).prop_map(|(offset, data)| write(offset, data)),
        (
            volume(),
            offset(),
            0..1_u64 << 20,
            any::<bool>(),
            any::<bool>()
        )
            .prop_map(
                |(volume, offset_bytes, length_bytes, allocate, whole_blocks_only)| {
                    RequestBody::Zero {
                        volume,
                        offset_bytes,
                        length_bytes,
                        allocate,
                        whole_blocks_only,
                    }
                }
            ),
        (volume(), offset(), data(2000)).prop_map(|(volume, offset_bytes, half)| {
            let data = Bytes::from([&half[..], &half[..]].concat());
            RequestBody::CompareAndWrite {
                volume,
                offset_bytes,
                checksum: crc32c::crc32c(&data),
                data,
            }
        }),
        (volume(), offset(), any::<u64>()).prop_map(|(volume, offset_bytes, length_bytes)| {
            RequestBody::Extents {
                volume,
                offset_bytes,
                length_bytes,
            }
        }),
        Just(RequestBody::ListVolumes),
        ("[a-z]{0,64}", any::<(u64, u32, [u8; 16])>()).prop_map(
            |(name, (size_bytes, chunk_bytes, uuid))| RequestBody::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid
            }
        ),
        (volume(), any::<u64>(), any::<bool>()).prop_map(|(volume, size_bytes, allow_shrink)| {
            RequestBody::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            }
        }),
        volume().prop_map(|volume| RequestBody::DeleteVolume { volume }),
        volume().prop_map(|volume| RequestBody::Attach { volume }),
        volume().prop_map(|volume| RequestBody::Detach { volume }),
        Just(RequestBody::Status),
        Just(RequestBody::Shutdown),
        (0..8_u8, any::<u64>(), 0..=INSPECT_ENTRIES_MAX).prop_map(|(code, before, count)| {
            let question = SurveyQuestion {
                id: before,
                volume: VolumeId(u32::from(count)),
                from: ChunkIndex(before as u32),
                scope: [SurveyScope::Own, SurveyScope::All, SurveyScope::Verify]
                    [before as usize % 3],
            };
            let before = Slot(before);
            RequestBody::Inspect(match code {
                0 => Inspect::Process,
                1 => Inspect::Clients,
                2 => Inspect::Outbound,
                3 => Inspect::Files,
                4 => Inspect::Links,
                5 => Inspect::Log { before, count },
                7 => Inspect::Survey(question),
                _ => Inspect::Sockets,
            })
        }),
        (volume(), any::<u64>()).prop_map(|(volume, key)| reserve(volume, key)),
        volume().prop_map(|volume| RequestBody::Reservations { volume }),
        volume().prop_map(|volume| RequestBody::Look { volume }),
        (volume(), any::<u64>())
            .prop_map(|(volume, size_bytes)| RequestBody::ShrinkVolume { volume, size_bytes }),
        volume().prop_map(|volume| RequestBody::DeleteAttachedVolume { volume }),
        (any::<bool>(), browse()).prop_map(|(stale, what)| RequestBody::Browse { stale, what }),
        (any::<u64>(), offset(), data(9000)).prop_map(|(reservations, offset, data)| {
            let body = Box::new(write(offset, data));
            RequestBody::Checked { reservations, body }
        }),
    ]
}

fn browse() -> impl Strategy<Value = Browse> {
    let place = (any::<u32>().prop_map(VolumeId), any::<u64>());
    let chunk = || any::<u32>().prop_map(ChunkIndex);
    prop_oneof![
        Just(Browse::Volumes),
        any::<u32>().prop_map(|volume| Browse::Directories {
            volume: VolumeId(volume),
        }),
        (place.clone(), chunk(), chunk()).prop_map(|((volume, _), from, until)| Browse::Chunks {
            volume,
            from,
            until,
        }),
        (place.clone(), any::<u64>()).prop_map(|((volume, offset_bytes), length_bytes)| {
            Browse::Extents {
                volume,
                offset_bytes,
                length_bytes,
            }
        }),
        (place, 0..=REQUEST_BYTES_MAX as u32).prop_map(|((volume, offset_bytes), length_bytes)| {
            Browse::Read {
                volume,
                offset_bytes,
                length_bytes,
            }
        }),
    ]
}

fn reserve(volume: VolumeId, key: u64) -> RequestBody {
    let nexus = Nexus {
        initiator: "i".into(),
        target: "t".into(),
    };
    let action = ReservationAction::Clear { key };
    let request = Box::new(ReservationRequest { nexus, action });
    RequestBody::Reserve { volume, request }
}

fn members() -> Box<Members> {
    let member = crate::members::Member {
        id: ServerId(3),
        core: true,
        host: "10.0.0.3".into(),
        path: "/a".into(),
    };
    Box::new(Members {
        epoch: 1,
        version: 2,
        list: vec![member],
    })
}

fn status() -> ServerStatus {
    ServerStatus {
        cell: "c".into(),
        server: ServerId(1),
        version: "0.1.0".into(),
        pid: 7,
        uptime_s: 8,
        role: "leader".into(),
        leader: Some(ServerId(1)),
        ballot: Ballot {
            number: 3,
            server: ServerId(1),
        },
        chosen: 10,
        applied: 9,
        last: 11,
        log_first: 1,
        copying: Some((1, 2)),
        copying_left_s: None,
        rejoining: false,
        incarnation: 1,
        lives: Vec::new(),
        free_bytes: 1 << 40,
        space_left: 1 << 30,
        full: false,
        stalled: false,
        total_bytes: 1 << 41,
        bad_blocks: 0,
        repaired_blocks: 0,
        lost_blocks: 0,
        clients: 2,
        members: None,
        last_ballot: Ballot::default(),
        given_up_by: None,
        claimed_twice: Vec::new(),
        scrub: None,
        peers: vec![PeerStatus {
            server: ServerId(0),
            alive: true,
            applied: 9,
            durable: 11,
            copying: false,
            silent_ms: Some(3),
            behind_ms: Some(14_000),
            behind_bytes: Some(1 << 20),
            left_s: None,
            acknowledged: 12,
        }],
    }
}

fn volume_status(name: &str) -> VolumeStatus {
    VolumeStatus {
        reservations: 3,
        volume: Volume {
            id: VolumeId(1),
            name: name.into(),
            size_bytes: 1 << 30,
            chunk_bytes: 4 << 20,
            uuid: [5; 16],
            created: Slot(3),
        },
        allocated_bytes: 4096,
        attached_by: vec!["pss-nbd@a".into()],
        chunks: 1,
        times: VolumeTimes {
            created_ms: 1,
            changed: Slot(4),
            changed_ms: 2,
        },
    }
}

fn event(number: u64, text: &str) -> AdminEvent {
    AdminEvent {
        number,
        slot: Slot(5),
        time_ms: 6,
        by: Origin {
            name: "pss@host".into(),
            user: text.into(),
            address: "[2001:db8::1]:7".parse().ok(),
        },
        action: match number % 4 {
            0 => AdminAction::Note { text: text.into() },
            1 => AdminAction::CreateVolume {
                volume: Some(VolumeId(1)),
                name: text.into(),
                size_bytes: u64::MAX,
                chunk_bytes: 8,
            },
            2 => AdminAction::ResizeVolume {
                volume: VolumeId(1),
                name: text.into(),
                from_bytes: 9,
                to_bytes: 10,
                forced: true,
            },
            _ => AdminAction::DeleteVolume {
                volume: VolumeId(1),
                name: text.into(),
                size_bytes: 9,
                forced: false,
            },
        },
        refused: number.is_multiple_of(5).then_some(Refusal::NoSuchVolume),
    }
}

fn reply_body() -> impl Strategy<Value = Result<ReplyBody, ReplyError>> {
    let part = prop_oneof![
        data(5000).prop_map(ReadPart::Data),
        (0..5000_u32).prop_map(ReadPart::Hole),
    ];
    let extent = any::<(u64, bool)>().prop_map(|(length_bytes, allocated)| Extent {
        length_bytes,
        allocated,
    });
    let good = prop_oneof![
        Just(ReplyBody::Done),
        any::<u64>().prop_map(|id| ReplyBody::Session(SessionId(id))),
        prop::collection::vec(part, 0..8).prop_map(ReplyBody::Data),
        prop::collection::vec(extent, 0..20).prop_map(ReplyBody::Extents),
        prop::collection::vec("[a-z\"\\\\]{1,9}", 0..4).prop_map(|names| {
            ReplyBody::Volumes(names.iter().map(|name| volume_status(name)).collect())
        }),
        (
            any::<(u32, u32)>(),
            prop::collection::vec("[a-zé\"\\x00]{0,9}", 0..6)
        )
            .prop_map(|((first, last), texts)| {
                let (first, last) = (u64::from(first), u64::from(last));
                let events = texts.iter().zip(first..);
                let events = events.map(|(text, number)| event(number, text).into());
                let events = events.collect();
                let list = EventList {
                    first,
                    last,
                    events,
                };
                ReplyBody::Events(Box::new(list))
            }),
        any::<u32>().prop_map(|id| ReplyBody::VolumeCreated(VolumeId(id))),
        Just(ReplyBody::Status(Box::new(status()))),
        any::<(u64, u64)>().prop_map(|(size_bytes, reservations)| ReplyBody::Volume {
            size_bytes,
            reservations,
        }),
    ];
    let leader = prop::option::of((0..8_u8).prop_map(ServerId));
    let bad = prop_oneof![
        leader.prop_map(|leader| ReplyError::NotLeader { leader }),
        any::<u8>().prop_map(|code| {
            Refusal::from_code(code).map_or(ReplyError::UnknownRefusal(code), ReplyError::Refused)
        }),
        Just(ReplyError::NoSpace),
        any::<u64>().prop_map(ReplyError::Miscompare),
        Just(ReplyError::Invalid),
        Just(ReplyError::Io),
    ];
    prop_oneof![good.prop_map(Ok), bad.prop_map(Err)]
}

#[test]
fn literal_write() {
    let frame = request_frame(&request(write(0x1001, Bytes::from_static(b"data"))));
    #[rustfmt::skip]
    let expected = [
        5, 2, 1, 0, 0, 0, 0, 0, 0,
        3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0,
        7, 0, 0, 0, 0x01, 0x10, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0,
    ];
    assert_eq!(frame.header[..expected.len()], expected);
    assert_eq!(
        frame.header[expected.len()..],
        crc32c::crc32c(b"data").to_le_bytes()
    );
    assert_eq!(&frame.payload[..], b"data");
}

#[test]
fn literal_read_and_its_reply() {
    let frame = request_frame(&request(RequestBody::Read {
        volume: VolumeId(7),
        offset_bytes: 8,
        length_bytes: 9,
    }));
    let fields = [7, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0];
    assert_eq!(frame.header[0], 4);
    assert_eq!(frame.header[33..], fields);

    let parts = vec![
        ReadPart::Hole(5),
        ReadPart::Data(Bytes::from_static(b"abcd")),
    ];
    let frame = reply_frame(&Reply {
        tag: 6,
        body: Ok(ReplyBody::Data(parts)),
    });
    let mut expected = vec![3, 6, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0];
    expected.extend([1, 5, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0, 4, 0, 0, 0]);
    expected.extend(crc32c::crc32c(b"abcd").to_le_bytes());
    assert_eq!(frame.header[..], expected);
    assert_eq!(&frame.payload[..], b"abcd");
}

#[test]
fn literal_errors() {
    let header = |error| {
        let reply = Reply {
            tag: 1,
            body: Err(error),
        };
        reply_frame(&reply).header.to_vec()
    };
    let leader = Some(ServerId(2));
    assert_eq!(
        header(ReplyError::NotLeader { leader }),
        [64, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    );
    let leader = None;
    assert_eq!(
        header(ReplyError::NotLeader { leader }),
        [64, 1, 0, 0, 0, 0, 0, 0, 0, 255]
    );
    assert_eq!(
        header(ReplyError::Refused(Refusal::StaleSession)),
        [65, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    );
    let unknown = ReplyError::UnknownRefusal(200);
    assert_eq!(header(unknown.clone()), [65, 1, 0, 0, 0, 0, 0, 0, 0, 200]);
    let reply = Reply {
        tag: 1,
        body: Err(unknown.clone()),
    };
    assert_eq!(
        Reply::decode(reply_frame(&reply)).unwrap().body,
        Err(unknown)
    );
}

/// Made from docs/wire.md apart from this program, as are the replies below.
#[test]
fn literal_requests() {
    let envelope = "030000000000000004000000000000000500000000000000";
    let requests = [
        (
            RequestBody::OpenSession {
                nonce: 11,
                name: "é".into(),
                user: "al".into(),
            },
            1,
            "0b000000000000000200c3a90200616c",
        ),
        (RequestBody::Events { after: 258 }, 25, "0201000000000000"),
        (
            RequestBody::Note {
                text: "stop".into(),
            },
            26,
            "040073746f70",
        ),
        (
            RequestBody::SetServers { members: members() },
            27,
            concat!(
                "2100000001000000000000000200000000000000010301",
                "080031302e302e302e33",
                "02002f61",
            ),
        ),
        (RequestBody::EndSession, 2, ""),
        (RequestBody::KeepAlive, 3, ""),
        (
            RequestBody::Zero {
                volume: VolumeId(7),
                offset_bytes: 12,
                length_bytes: 13,
                allocate: true,
                whole_blocks_only: false,
            },
            6,
            "070000000c000000000000000d000000000000000100",
        ),
        (
            RequestBody::CompareAndWrite {
                volume: VolumeId(7),
                offset_bytes: 12,
                checksum: 14,
                data: Bytes::from_static(b"ab"),
            },
            7,
            "070000000c000000000000000e00000002000000",
        ),
        (
            RequestBody::Extents {
                volume: VolumeId(7),
                offset_bytes: 12,
                length_bytes: 13,
            },
            8,
            "070000000c000000000000000d00000000000000",
        ),
        (RequestBody::ListVolumes, 9, ""),
        (
            RequestBody::CreateVolume {
                name: "v".into(),
                size_bytes: 15,
                chunk_bytes: 16,
                uuid: [17; 16],
            },
            10,
            "0100760f000000000000001000000011111111111111111111111111111111",
        ),
        (
            RequestBody::ResizeVolume {
                volume: VolumeId(7),
                size_bytes: 15,
                allow_shrink: true,
            },
            11,
            "070000000f0000000000000001",
        ),
        (
            RequestBody::DeleteVolume {
                volume: VolumeId(7),
            },
            12,
            "07000000",
        ),
        (
            RequestBody::Attach {
                volume: VolumeId(7),
            },
            13,
            "07000000",
        ),
        (
            RequestBody::Detach {
                volume: VolumeId(7),
            },
            14,
            "07000000",
        ),
        (RequestBody::Status, 15, ""),
        (RequestBody::Shutdown, 16, ""),
        (RequestBody::Inspect(Inspect::Sockets), 24, "06"),
        (
            RequestBody::Inspect(Inspect::Survey(SurveyQuestion {
                id: 2,
                volume: VolumeId(3),
                from: ChunkIndex(4),
                scope: SurveyScope::Verify,
            })),
            24,
            "090200000000000000030000000400000002",
        ),
        (
            reserve(VolumeId(7), 9),
            17,
            "0700000001000000690100000074040900000000000000",
        ),
        (
            RequestBody::Reservations {
                volume: VolumeId(7),
            },
            18,
            "07000000",
        ),
        (
            RequestBody::Checked {
                reservations: 5,
                body: Box::new(RequestBody::Extents {
                    volume: VolumeId(7),
                    offset_bytes: 1,
                    length_bytes: 2,
                }),
            },
            19,
            "0500000000000000080700000001000000000000000200000000000000",
        ),
        (
            RequestBody::Look {
                volume: VolumeId(7),
            },
            20,
            "07000000",
        ),
        (
            RequestBody::ShrinkVolume {
                volume: VolumeId(7),
                size_bytes: 1024,
            },
            21,
            "070000000004000000000000",
        ),
        (
            RequestBody::DeleteAttachedVolume {
                volume: VolumeId(7),
            },
            22,
            "07000000",
        ),
        (
            RequestBody::Browse {
                stale: true,
                what: Browse::Chunks {
                    volume: VolumeId(7),
                    from: ChunkIndex(1),
                    until: ChunkIndex(258),
                },
            },
            23,
            "0101070000000100000002010000",
        ),
        (
            RequestBody::Browse {
                stale: false,
                what: Browse::Read {
                    volume: VolumeId(7),
                    offset_bytes: 512,
                    length_bytes: 1024,
                },
            },
            23,
            "000307000000000200000000000000040000",
        ),
    ];
    for (body, code, fields) in requests {
        let header = request_frame(&request(body.clone())).header;
        assert_eq!(header[0], code);
        assert_eq!(hex(&header[1..9]), "0201000000000000");
        assert_eq!(hex(&header[9..33]), envelope);
        assert_eq!(hex(&header[33..]), fields, "{body:?}");
    }
}

#[test]
fn literal_replies() {
    let extent = Extent {
        length_bytes: 18,
        allocated: true,
    };
    let replies = [
        (Ok(ReplyBody::Done), 1, ""),
        (Ok(ReplyBody::Session(SessionId(9))), 2, "0900000000000000"),
        (
            Ok(ReplyBody::Extents(vec![extent])),
            4,
            "01000000120000000000000001",
        ),
        (Ok(ReplyBody::VolumeCreated(VolumeId(7))), 6, "07000000"),
        (
            Ok(ReplyBody::Volume {
                size_bytes: 1024,
                reservations: 5,
            }),
            9,
            "00040000000000000500000000000000",
        ),
        (
            Ok(ReplyBody::Chunks {
                chunks: vec![ChunkStatus {
                    chunk: ChunkIndex(3),
                    changed: Slot(4),
                    changed_ms: 5,
                    allocated_blocks: 6,
                }],
                next: None,
            }),
            10,
            "ffffffff01000000030000000400000000000000050000000000000006000000",
        ),
        (
            Ok(ReplyBody::Directories(vec![1, 258])),
            11,
            "020000000100000002010000",
        ),
        (Err(ReplyError::UnknownRefusal(200)), 65, "c8"),
        (Err(ReplyError::NoSpace), 66, ""),
        (Err(ReplyError::Miscompare(19)), 67, "1300000000000000"),
        (Err(ReplyError::Invalid), 68, ""),
        (Err(ReplyError::Io), 69, ""),
    ];
    for (body, code, fields) in replies {
        let header = reply_frame(&Reply { tag: 0x0102, body }).header;
        assert_eq!(header[0], code);
        assert_eq!(hex(&header[1..9]), "0201000000000000");
        assert_eq!(hex(&header[9..]), fields, "code {code}");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn status_is_json_behind_code_and_tag() {
    let reply = Reply {
        tag: 1,
        body: Ok(ReplyBody::Status(Box::new(status()))),
    };
    let header = reply_frame(&reply).header;
    let json: serde_json::Value = serde_json::from_slice(&header[9..]).unwrap();
    assert_eq!(json["role"], "leader");
}

/// As programs read it, `pss events --json` among them.
#[test]
fn events_are_json_behind_code_and_tag() {
    let list = EventList {
        first: 1,
        last: 9,
        events: vec![event(8, "stop").into(), event(5, "v").into()],
    };
    let body = Ok(ReplyBody::Events(Box::new(list)));
    let header = reply_frame(&Reply { tag: 1, body }).header;
    assert_eq!(header[0], 13);
    let json: serde_json::Value = serde_json::from_slice(&header[9..]).unwrap();
    let by = r#""by":{"name":"pss@host","user":"stop","address":"[2001:db8::1]:7"}"#;
    let expected = format!(
        r#"{{"number":8,"slot":5,"time_ms":6,{by},"action":{{"kind":"note","text":"stop"}},"refused":null}}"#
    );
    assert_eq!(
        json["events"][0],
        serde_json::from_str::<serde_json::Value>(&expected).unwrap()
    );
    assert_eq!(json["events"][1]["refused"], "NoSuchVolume");
    assert_eq!(json["events"][1]["action"]["size_bytes"], u64::MAX);
    assert_eq!((&json["first"], &json["last"]), (&1.into(), &9.into()));
}

/// The longest answer there can be fits the frame of one.
#[test]
fn the_longest_list_of_events_fits_a_frame() {
    let worst = "\u{1}".repeat(NAME_BYTES_MAX);
    let mut longest = event(8, &worst);
    longest.by.name = worst.clone();
    let list = EventList {
        first: 1,
        last: 9,
        events: vec![longest.into(); EVENTS_ANSWERED_MAX],
    };
    let body = Ok(ReplyBody::Events(Box::new(list)));
    let reply = Reply { tag: 1, body };
    assert_eq!(Reply::decode(reply_frame(&reply)).unwrap(), reply);
}

/// The same of open files and of the log.
#[test]
fn the_longest_inspections_fit_a_frame() {
    // Of all that a name may hold, nothing is longer in JSON.
    let worst = |bytes: usize| "\u{1}".repeat(bytes);
    let volume = worst(VOLUME_NAME_MAX);
    let open = OpenVolume {
        name: volume.clone(),
        attached_by: vec![worst(INSPECT_NAME_MAX); INSPECT_USERS_MAX],
    };
    let chunk = OpenChunk {
        path: format!("data/{volume}/ff/ff/ff"),
        dirty: false,
    };
    let segment = SegmentInfo {
        path: format!("log/{:016x}", u64::MAX),
        first: Slot(u64::MAX),
        bytes: u64::MAX,
    };
    let files = FilesInfo {
        volumes: vec![open; INSPECT_VOLUMES_MAX],
        chunks: vec![chunk; INSPECT_CHUNKS_MAX],
        chunks_open: u64::MAX,
        chunks_max: u64::MAX,
        segments: vec![segment; INSPECT_SEGMENTS_MAX],
        descriptors: u64::MAX,
        descriptors_max: u64::MAX,
    };
    let ballot = Ballot {
        number: u64::MAX,
        server: ServerId(7),
    };
    let command = CommandInfo {
        what: "delete volume".to_owned(),
        session: u64::MAX,
        number: u64::MAX,
        volume: Some(VolumeId(u32::MAX)),
        volume_name: Some(volume),
        offset_bytes: Some(u64::MAX),
        length_bytes: Some(u64::MAX),
        detail: Some(worst(INSPECT_NAME_MAX)),
    };
    let entry = EntryInfo {
        slot: Slot(u64::MAX),
        ballot,
        commands: vec![command; INSPECT_COMMANDS_MAX],
        more: u64::MAX,
        payload_bytes: u64::MAX,
        accepted_by: (0..5).map(ServerId).collect(),
        chosen: false,
        applied: false,
        damaged: false,
    };
    let log = LogInfo {
        server: ServerId(7),
        role: "candidate".to_owned(),
        ballot,
        first: Slot(u64::MAX),
        last: Slot(u64::MAX),
        chosen: Slot(u64::MAX),
        applied: Slot(u64::MAX),
        entries: vec![entry; usize::from(INSPECT_ENTRIES_MAX)],
        next: Some(Slot(u64::MAX)),
    };
    for inspection in [Inspection::Files(files), Inspection::Log(log)] {
        let body = Ok(ReplyBody::Inspection(Box::new(inspection)));
        let reply = Reply { tag: 1, body };
        assert_eq!(Reply::decode(reply_frame(&reply)).unwrap(), reply);
    }
}

#[test]
fn users_and_notes_are_bounded() {
    let open = |user: String| RequestBody::OpenSession {
        nonce: 1,
        name: String::new(),
        user,
    };
    let sent = request(open("é".repeat(USER_NAME_MAX)));
    let cut = Request::decode(request_frame(&sent)).unwrap();
    assert_eq!(cut.body, open("é".repeat(USER_NAME_MAX / 2)));
    let header = |code: u8, fields: &[u8]| {
        let mut header = request_frame(&request(RequestBody::Status)).header.to_vec();
        header[0] = code;
        header.extend(fields);
        let frame = request_frame(&request(RequestBody::Status));
        Request::decode(Frame {
            header: header.into(),
            ..frame
        })
    };
    let text = |length: usize| {
        let mut bytes = (length as u16).to_le_bytes().to_vec();
        bytes.resize(2 + length, b'a');
        bytes
    };
    assert!(header(26, &text(NOTE_BYTES_MAX)).is_ok());
    assert!(header(26, &text(NOTE_BYTES_MAX + 1)).is_err());
    let opened = |length| [&[0; 10][..], &text(length)].concat();
    assert!(header(1, &opened(USER_NAME_MAX)).is_ok());
    assert!(header(1, &opened(USER_NAME_MAX + 1)).is_err());
}

#[test]
fn damaged_data_is_noticed() {
    let body = write(4096, Bytes::from(vec![1; 8192]));
    assert!(body.verify());
    let RequestBody::Write { checksums, .. } = body else {
        panic!();
    };
    let damaged = |offset_bytes, checksums: &[u32], data: &'static [u8]| RequestBody::Write {
        volume: VolumeId(7),
        offset_bytes,
        checksums: checksums.to_vec(),
        data: data.into(),
    };
    assert!(!damaged(4096, &checksums, &[2; 8192]).verify());
    assert!(
        !damaged(8192, &checksums, &[1; 8192]).verify(),
        "another place"
    );
    assert!(!damaged(1, &[7], b"x").verify());

    let reply = Reply {
        tag: 1,
        body: Ok(ReplyBody::Data(vec![ReadPart::Data(Bytes::from_static(
            b"abcd",
        ))])),
    };
    let mut frame = reply_frame(&reply);
    frame.payload = Bytes::from_static(b"abce");
    let error = Reply::decode(frame).unwrap_err();
    assert_eq!((error.tag, error.error), (Some(1), DecodeError::Checksum));
}

#[test]
fn senseless_requests_have_a_tag_to_be_answered_under() {
    let mut unknown = request_frame(&request(RequestBody::Status));
    let mut header = unknown.header.to_vec();
    header[0] = 99;
    unknown.header = header.into();
    assert_eq!(Request::decode(unknown).unwrap_err().tag, Some(0x0102));

    let too_long = request(RequestBody::Read {
        volume: VolumeId(1),
        offset_bytes: 0,
        length_bytes: REQUEST_BYTES_MAX as u32 + 1,
    });
    let error = Request::decode(request_frame(&too_long)).unwrap_err();
    assert!(matches!(error.error, DecodeError::TooLong { .. }));

    let odd = request(RequestBody::CompareAndWrite {
        volume: VolumeId(1),
        offset_bytes: 0,
        checksum: 0,
        data: Bytes::from_static(b"abc"),
    });
    assert!(Request::decode(request_frame(&odd)).is_err());

    let few_checksums = request(RequestBody::Write {
        volume: VolumeId(1),
        offset_bytes: 0,
        checksums: vec![1],
        data: Bytes::from(vec![0; 8192]),
    });
    assert!(Request::decode(request_frame(&few_checksums)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn request_round_trip(body in body()) {
        let request = request(body);
        let back = Request::decode(request_frame(&request)).unwrap();
        prop_assert!(back.body.verify());
        prop_assert_eq!(back, request);
    }

    #[test]
    fn reply_round_trip(tag in any::<u64>(), body in reply_body()) {
        let reply = Reply { tag, body };
        prop_assert_eq!(Reply::decode(reply_frame(&reply)).unwrap(), reply);
    }

    #[test]
    fn cut_or_changed_messages_never_panic(
        request_body in body(),
        reply_body in reply_body(),
        cut in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        change in any::<u8>(),
        payload_bytes in 0..9000_usize,
    ) {
        let reply = Reply { tag: 1, body: reply_body };
        for mut frame in [request_frame(&request(request_body)), reply_frame(&reply)] {
            let mut header = frame.header.to_vec();
            let index = at.index(header.len());
            header[index] ^= change;
            header.truncate(cut.index(header.len() + 1));
            frame.header = header.into();
            frame.payload = frame.payload.slice(..frame.payload.len().min(payload_bytes));
            let _ = Request::decode(frame.clone());
            let _ = Reply::decode(frame);
        }
    }

    #[test]
    fn garbage_never_panics(
        header in prop::collection::vec(any::<u8>(), 0..300),
        payload in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let frame = Frame {
            kind: FrameKind::Request,
            group: GroupId(0),
            header: header.into(),
            payload: payload.into(),
        };
        let _ = Request::decode(frame.clone());
        let _ = Reply::decode(frame);
    }
}

#[test]
fn only_requests_to_blocks_can_be_checked() {
    for body in [
        RequestBody::ListVolumes,
        RequestBody::Checked {
            reservations: 1,
            body: Box::new(RequestBody::KeepAlive),
        },
    ] {
        let body = Box::new(body);
        let checked = RequestBody::Checked {
            reservations: 1,
            body,
        };
        let decoded = Request::decode(request_frame(&request(checked)));
        assert!(decoded.is_err());
    }
}
