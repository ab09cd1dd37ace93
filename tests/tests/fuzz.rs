//! Everything that reads bytes from outside is given valid input that was changed: bits flipped, ends cut
//! off, parts removed, doubled and moved, numbers replaced by extreme ones. Checksums that only guard
//! against accidents are made right again, so that the change reaches what lies behind them.
//!
//! Nothing may panic, take memory that the input does not justify, or accept what a key protects; and
//! what a person will read names the place.
//!
//! Input without any sense is fed to the same parsers by the unit tests beside them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use export_nbd::export::{Export, Listed, Policy};
use export_nbd::handshake::{Handshake as NbdHandshake, Output};
use export_nbd::memory::MemoryDevice;
use export_nbd::transmission::{BYTES_IN_FLIGHT_MAX, Terms, Transmission};
use export_nbd::wire::PAYLOAD_BYTES_MAX;
use proptest::prelude::*;
use proptest::sample::Index;
use pss_core::disk::{Disk, OpenMode};
use pss_core::entry::{
    Command, ENTRY_HEADER_MAX, ENTRY_PAYLOAD_MAX, Entry, Op, Origin, block_checksums,
};
use pss_core::key::{CellId, CellKey};
use pss_core::log::{Log, LogParams, LogRead};
use pss_core::members::{Member, Members};
use pss_core::paxos::message::{ChunkSummary, Message, Progress, SyncMessage};
use pss_core::servers::ServersFile;
use pss_core::state::{AdminAction, AdminEvent, Refusal, Volume, VolumeTimes};
use pss_core::time::Instant;
use pss_core::types::{
    BLOCK_BYTES, Ballot, ChunkIndex, EntryId, GroupId, Incarnation, RequestNumber, ServerId,
    SessionId, Slot, Standing, VolumeId,
};
use pss_core::volume::device::{BlockDevice, CompletionQueue, Extent, ReadPart};
use pss_core::wire::auth::{Handshake, HandshakeConfig, MacKey, Role};
use pss_core::wire::client::{
    Browse, ChunkStatus, EventList, PeerStatus, Reply, ReplyBody, ReplyError, Request, RequestBody,
    ServerStatus, VolumeStatus,
};
use pss_core::wire::events::ListedEvent;
use pss_core::wire::frame::{Frame, FrameKind, FrameLimits, FrameReader, SendQueue};
use pss_core::wire::inspect::{
    ClientInfo, CommandInfo, EntryInfo, FilesInfo, Inspect, Inspection, LeaseInfo, LinkInfo,
    LinkState, LogInfo, OpenChunk, OpenVolume, OutboundInfo, ProcessInfo, SegmentInfo, SocketInfo,
};
use pss_core::wire::peer::{Datagrams, decode_frame, encode_frame};
use pss_tests::disk::SimDisk;

// ---- memory ----

/// Counts what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Not while the thread ends.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

#[expect(unsafe_code, reason = "an allocator is unsafe; this one only counts")]
// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Runs something and gives how many bytes it held at most.
fn memory_of<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = run();
    (result, (MOST.get() - before).max(0) as usize)
}

#[test]
fn memory_is_counted() {
    let (_, most) = memory_of(|| drop(vec![1_u8; 10 << 20]));
    assert!((10 << 20..11 << 20).contains(&most), "{most}");
}

/// What a parser may hold for input of this length: structures are larger than their encoding, and
/// buffers have a size of their own.
fn justified(input_bytes: usize) -> usize {
    (1 << 20) + 32 * input_bytes
}

// ---- changes ----

#[derive(Clone, Debug)]
enum Change {
    Flip(Index, u8),
    Cut(Index),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    /// From, to, length.
    Copy(Index, Index, usize),
    /// A number of so many bytes, of either order.
    Number(Index, usize, u64, bool),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let index = any::<Index>;
    let number = prop_oneof![
        0..3_u64,
        Just(u64::MAX),
        Just(u64::MAX >> 1),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        Just(1 << 20),
        any::<u64>(),
    ];
    let change = prop_oneof![
        3 => (index(), 0..8_u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        1 => index().prop_map(Change::Cut),
        1 => (index(), 1..40_usize).prop_map(|(at, length)| Change::Remove(at, length)),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (index(), index(), 1..200_usize)
            .prop_map(|(from, to, length)| Change::Copy(from, to, length)),
        4 => (index(), prop::sample::select(vec![1, 2, 4, 8]), number, any::<bool>())
            .prop_map(|(at, width, value, little)| Change::Number(at, width, value, little)),
    ];
    prop::collection::vec(change, 1..5)
}

fn change(bytes: &mut Vec<u8>, changes: &[Change]) {
    for change in changes {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        match change {
            Change::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
            Change::Cut(at) => bytes.truncate(at.index(length)),
            Change::Remove(at, count) => {
                let from = at.index(length);
                bytes.drain(from..length.min(from + count));
            }
            Change::Insert(at, new) => {
                let at = at.index(length);
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Copy(from, to, count) => {
                let (from, to) = (from.index(length), to.index(length));
                let count = (*count).min(length - from.max(to));
                bytes.copy_within(from..from + count, to);
            }
            Change::Number(at, width, value, little) => {
                let at = at.index(length);
                let all = match little {
                    true => value.to_le_bytes(),
                    false => (value << (64 - 8 * width)).to_be_bytes(),
                };
                let count = (*width).min(length - at);
                bytes[at..at + count].copy_from_slice(&all[..count]);
            }
        }
    }
}

/// The same without a change of length.
fn change_in_place(bytes: &mut [u8], changes: &[Change]) {
    for one in changes {
        if matches!(
            one,
            Change::Flip(..) | Change::Copy(..) | Change::Number(..)
        ) {
            let mut copy = bytes.to_vec();
            change(&mut copy, std::slice::from_ref(one));
            bytes.copy_from_slice(&copy);
        }
    }
}

/// `PROPTEST_CASES=N` tries so many.
fn cases(usual: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok();
    let asked = asked.and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(asked.unwrap_or(usual))
}

// ---- frames ----

fn bytes_of(out: &SendQueue) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); 1024];
    let used = out.as_io_slices(&mut slices);
    let bytes: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
    assert_eq!(bytes.len(), out.len_bytes());
    bytes
}

fn framed(kind: FrameKind, header: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = SendQueue::new();
    let payload = [Bytes::copy_from_slice(payload)];
    let write = |into: &mut Vec<u8>| into.extend_from_slice(header);
    out.frame(kind, GroupId(0), write, payload.iter());
    bytes_of(&out)
}

fn frames(bytes: &[u8], step: usize, limits: FrameLimits) -> Vec<Frame> {
    let mut reader = FrameReader::new(limits);
    let mut frames = Vec::new();
    for piece in bytes.chunks(step.max(1)) {
        // An error ends the connection; what came before it counts.
        if reader
            .handle_bytes(piece, |frame| frames.push(frame))
            .is_err()
        {
            break;
        }
    }
    frames
}

/// Changes header and payload of a frame, and makes a frame of them again.
fn changed_frame(
    bytes: &[u8],
    limits: FrameLimits,
    of_header: &[Change],
    of_payload: &[Change],
) -> (Frame, usize) {
    let frame = frames(bytes, bytes.len(), limits).remove(0);
    let (mut header, mut payload) = (frame.header.to_vec(), frame.payload.to_vec());
    change(&mut header, of_header);
    change(&mut payload, of_payload);
    let bytes = framed(frame.kind, &header, &payload);
    let length = bytes.len();
    (frames(&bytes, length, limits).remove(0), length)
}

fn ballot(number: u64, server: u8) -> Ballot {
    Ballot {
        number,
        server: ServerId(server),
    }
}

fn id(number: u64, slot: u64) -> EntryId {
    EntryId {
        ballot: ballot(number, 1),
        slot: Slot(slot),
    }
}

fn ops() -> Vec<Op> {
    let payload = Bytes::from(vec![7; 2 * BLOCK_BYTES]);
    vec![
        Op::Noop,
        Op::Write {
            volume: VolumeId(1),
            first_block: 5,
            checksums: block_checksums(VolumeId(1), 5, &payload),
            payload,
        },
        Op::Zero {
            volume: VolumeId(1),
            first_block: 9,
            blocks: 1000,
            allocate: true,
        },
        Op::OpenSession {
            nonce: 77,
            name: "pss-nbd@host".into(),
        },
        Op::EndSessions {
            sessions: vec![SessionId(3), SessionId(4)],
        },
        Op::CreateVolume {
            name: "vol001".into(),
            size_bytes: 10 << 30,
            chunk_bytes: 4 << 20,
            uuid: [3; 16],
        },
        Op::ResizeVolume {
            volume: VolumeId(1),
            size_bytes: 1 << 40,
            allow_shrink: false,
        },
        Op::DeleteVolume {
            volume: VolumeId(2),
        },
        Op::Attach {
            volume: VolumeId(1),
        },
        Op::Detach {
            volume: VolumeId(1),
        },
        Op::ShrinkVolume {
            volume: VolumeId(1),
            size_bytes: 1 << 20,
        },
        Op::DeleteAttachedVolume {
            volume: VolumeId(2),
        },
        Op::Clock { unix_ms: 1 << 40 },
        Op::OpenSessionFrom {
            nonce: 78,
            origin: Box::new(Origin {
                name: "pss@host".into(),
                user: "alice".into(),
                address: Some(([10, 0, 0, 5], 40_000).into()),
            }),
        },
        Op::Note {
            text: "stop server 2".into(),
        },
    ]
}

fn entry(slot: u64) -> Entry {
    let commands = ops().into_iter().zip(1..).map(|(op, number)| Command {
        session: SessionId(9),
        number: RequestNumber(number),
        settled_below: RequestNumber(1),
        op,
    });
    Entry {
        id: id(2, slot),
        prev: ballot(if slot == 1 { 0 } else { 2 }, if slot == 1 { 0 } else { 1 }),
        commands: commands.collect(),
    }
}

/// Those that a datagram holds, then those that it does not.
fn messages() -> (Vec<Message>, Vec<Message>) {
    let (ballot, slot) = (ballot(5, 1), Slot(7));
    let (volume, chunk) = (VolumeId(1), ChunkIndex(3));
    let progress = Progress {
        chosen: slot,
        applied: slot,
        log_first: Slot(1),
        free_bytes: 1 << 40,
        installing: false,
    };
    let standing = Standing {
        life: Incarnation(3),
        promised: ballot,
        acknowledged: id(4, 7),
    };
    let short = vec![
        Message::PreCheck {
            ballot,
            last: id(4, 7),
        },
        Message::PreCheckAnswer {
            ballot,
            granted: true,
            promised: ballot,
            last: id(4, 7),
        },
        Message::Prepare {
            ballot,
            released: Some(ballot),
        },
        Message::Rejoin,
        Message::Absent { ballot },
        Message::Standing {
            standing,
            asks: true,
            epoch: 1,
        },
        Message::Seen {
            mark: standing,
            alive: false,
            epoch: 1,
        },
        Message::Promise {
            ballot,
            last: id(4, 7),
            certain: id(4, 7),
            have: id(4, 6),
            chosen: slot,
            admitted: {
                let mut admitted = pss_core::types::Admitted::default();
                admitted.admit(ServerId(1), pss_core::types::Incarnation(7));
                admitted
            },
        },
        Message::Nack {
            ballot,
            promised: ballot,
        },
        Message::Accepted {
            ballot,
            durable: slot,
        },
        Message::AcceptRejected {
            ballot,
            resume_after: slot,
        },
        Message::Heartbeat {
            ballot,
            sent: Instant(6),
            chosen: slot,
            last: slot,
        },
        Message::HeartbeatAck {
            ballot,
            sent: Instant(6),
            durable: slot,
            received: slot,
            progress,
        },
        Message::HandOver { ballot },
        Message::FetchTail {
            ballot,
            after: slot,
        },
        Message::CatchUp { after: slot },
        Message::LogGone {
            first: slot,
            chosen: slot,
        },
        Message::Progress(progress),
        Message::Sync(SyncMessage::RequestBlocks {
            at_least: slot,
            volume,
            blocks: vec![1, 2, 70],
        }),
        Message::Sync(SyncMessage::BlocksRefused { volume }),
    ];
    let entries: Vec<Entry> = (1..4).map(entry).collect();
    let summaries = (0..20).map(|chunk| ChunkSummary {
        chunk: ChunkIndex(chunk),
        last_slot: slot,
        digest: 99,
    });
    let long = vec![
        Message::Accept {
            ballot,
            prev: EntryId::default(),
            entries: entries.clone(),
            chosen: slot,
        },
        Message::Tail {
            ballot,
            prev: EntryId::default(),
            entries: entries.clone(),
            last: id(2, 9),
        },
        Message::Chosen {
            prev: EntryId::default(),
            entries,
            chosen: slot,
        },
        Message::Sync(SyncMessage::RequestBase),
        Message::Sync(SyncMessage::Base {
            base: id(3, 4),
            state: Bytes::from(vec![1; 3000]),
        }),
        Message::Sync(SyncMessage::RequestList {
            at_least: slot,
            volume,
            from: chunk,
        }),
        Message::Sync(SyncMessage::List {
            as_of: slot,
            volume,
            from: ChunkIndex(0),
            until: Some(ChunkIndex(20)),
            total: 9,
            chunks: summaries.collect(),
        }),
        Message::Sync(SyncMessage::RequestChunk {
            at_least: slot,
            volume,
            chunk,
        }),
        Message::Sync(SyncMessage::Chunk {
            as_of: slot,
            volume,
            chunk,
            image: Bytes::from(vec![2; 5000]),
        }),
        Message::Sync(SyncMessage::Refused),
        Message::Sync(SyncMessage::Blocks {
            as_of: slot,
            volume,
            damaged: vec![2],
            blocks: vec![1, 70],
            data: Bytes::from(vec![3; 2 * BLOCK_BYTES]),
        }),
    ];
    (short, long)
}

fn peer_frames() -> Vec<Vec<u8>> {
    let (short, long) = messages();
    let frame = |message| {
        let mut out = SendQueue::new();
        encode_frame(message, &mut out);
        bytes_of(&out)
    };
    short.iter().chain(&long).map(frame).collect()
}

fn requests() -> Vec<RequestBody> {
    let volume = VolumeId(1);
    let data = Bytes::from(vec![5; 2 * BLOCK_BYTES]);
    vec![
        RequestBody::OpenSession {
            nonce: 1,
            name: "pss-nbd@host".into(),
            user: "root (alice)".into(),
        },
        RequestBody::EndSession,
        RequestBody::KeepAlive,
        RequestBody::Read {
            volume,
            offset_bytes: 4096,
            length_bytes: 8192,
        },
        RequestBody::Write {
            volume,
            offset_bytes: 4096,
            checksums: RequestBody::write_checksums(volume, 4096, &data),
            data: data.clone(),
        },
        RequestBody::Write {
            volume,
            offset_bytes: 7,
            checksums: RequestBody::write_checksums(volume, 7, &data),
            data: data.clone(),
        },
        RequestBody::Zero {
            volume,
            offset_bytes: 0,
            length_bytes: 1 << 20,
            allocate: false,
            whole_blocks_only: true,
        },
        RequestBody::CompareAndWrite {
            volume,
            offset_bytes: 512,
            checksum: crc32c::crc32c(&data),
            data,
        },
        RequestBody::Extents {
            volume,
            offset_bytes: 0,
            length_bytes: 1 << 30,
        },
        RequestBody::ListVolumes,
        RequestBody::CreateVolume {
            name: "vol001".into(),
            size_bytes: 1 << 30,
            chunk_bytes: 4 << 20,
            uuid: [4; 16],
        },
        RequestBody::ResizeVolume {
            volume,
            size_bytes: 1 << 31,
            allow_shrink: true,
        },
        RequestBody::DeleteVolume { volume },
        RequestBody::Attach { volume },
        RequestBody::Detach { volume },
        RequestBody::Look { volume },
        RequestBody::ShrinkVolume {
            volume,
            size_bytes: 1 << 20,
        },
        RequestBody::DeleteAttachedVolume { volume },
        RequestBody::Browse {
            stale: true,
            what: Browse::Chunks {
                volume,
                from: ChunkIndex(0),
                until: ChunkIndex(256),
            },
        },
        RequestBody::Browse {
            stale: false,
            what: Browse::Read {
                volume,
                offset_bytes: 4096,
                length_bytes: 4096,
            },
        },
        RequestBody::Status,
        RequestBody::Shutdown,
        RequestBody::Events { after: 7 },
        RequestBody::Note {
            text: "stop server 2".into(),
        },
        RequestBody::SetServers {
            members: Box::new(Members {
                epoch: 0,
                version: 1,
                list: vec![Member {
                    id: ServerId(1),
                    core: true,
                    host: "10.0.0.1".into(),
                    path: "/srv".into(),
                }],
            }),
        },
        RequestBody::Inspect(Inspect::Process),
        RequestBody::Inspect(Inspect::Clients),
        RequestBody::Inspect(Inspect::Outbound),
        RequestBody::Inspect(Inspect::Files),
        RequestBody::Inspect(Inspect::Links),
        RequestBody::Inspect(Inspect::Log {
            before: Slot(9),
            count: 256,
        }),
        RequestBody::Inspect(Inspect::Sockets),
    ]
}

/// An answer to every question about the inside of a server.
fn inspections() -> Vec<Inspection> {
    let address = || "10.0.0.5:40000".to_owned();
    let process = ProcessInfo {
        server: ServerId(1),
        pid: 7,
        state: "Sl".into(),
        cpu_ms: 8,
        memory_bytes: 9,
        program: "/usr/bin/pssd".into(),
        path: "/pss".into(),
        uptime_s: 10,
    };
    let client = ClientInfo {
        name: "pss-nbd@a".into(),
        address: address(),
        connected_ms: 1,
        idle_ms: Some(2),
        requests: 3,
        in_flight: 4,
        received_bytes: 5,
        sent_bytes: 6,
        unsent_bytes: 7,
    };
    let outbound = OutboundInfo {
        server: ServerId(2),
        address: address(),
        link: LinkState::Up,
        waiting_bytes: 1,
        limit_bytes: 2,
        dropped: 3,
        sent_bytes: 4,
        unacknowledged: Some(5),
    };
    let files = FilesInfo {
        volumes: vec![OpenVolume {
            name: "vol001".into(),
            attached_by: vec!["pss-nbd@a".into()],
        }],
        chunks: vec![OpenChunk {
            path: "data/vol001/00/00/01".into(),
            dirty: true,
        }],
        chunks_open: 1,
        chunks_max: 2,
        segments: vec![SegmentInfo {
            path: "log/0000000000000001".into(),
            first: Slot(1),
            bytes: 128 << 20,
        }],
        descriptors: 3,
        descriptors_max: 4,
    };
    let link = LinkInfo {
        server: ServerId(2),
        alive: true,
        silent_ms: Some(1),
        link: LinkState::Down,
        up_ms: None,
        trouble: Some("connection refused".into()),
        inbound: true,
        round_trip_us: Some(2),
        segments_sent: 3,
        segments_lost: 4,
        sent_bytes: 5,
        received_bytes: 6,
        datagrams_sent: 7,
        datagrams_received: 8,
        incarnation: Some(9),
        lease: Some(LeaseInfo {
            holder: ServerId(1),
            left_ms: 10,
        }),
    };
    let log = LogInfo {
        server: ServerId(1),
        role: "leader".into(),
        ballot: ballot(3, 1),
        first: Slot(1),
        last: Slot(11),
        chosen: Slot(10),
        applied: Slot(9),
        entries: vec![EntryInfo {
            slot: Slot(11),
            ballot: ballot(3, 1),
            commands: vec![CommandInfo {
                what: "write".into(),
                session: 3,
                number: 4,
                volume: Some(VolumeId(1)),
                volume_name: Some("vol001".into()),
                offset_bytes: Some(4096),
                length_bytes: Some(8192),
                detail: Some("more".into()),
            }],
            more: 1,
            payload_bytes: 8192,
            accepted_by: vec![ServerId(0), ServerId(1)],
            chosen: true,
            applied: false,
            damaged: false,
        }],
        next: Some(Slot(11)),
    };
    let socket = SocketInfo {
        protocol: "tcp".into(),
        local: address(),
        remote: Some(address()),
        state: "ESTABLISHED".into(),
        receive_queue_bytes: 2,
        send_queue_bytes: 1,
        who: Some("server 2".into()),
    };
    vec![
        Inspection::Process(process),
        Inspection::Clients(vec![client]),
        Inspection::Outbound(vec![outbound]),
        Inspection::Files(files),
        Inspection::Links(vec![link]),
        Inspection::Log(log),
        Inspection::Sockets(vec![socket]),
    ]
}

fn replies() -> Vec<Result<ReplyBody, ReplyError>> {
    let volumes = (1..4).map(|volume| VolumeStatus {
        volume: Volume {
            id: VolumeId(volume),
            name: format!("vol{volume:03}"),
            size_bytes: 1 << 30,
            chunk_bytes: 4 << 20,
            uuid: [5; 16],
            created: Slot(3),
        },
        allocated_bytes: 4096,
        attached_by: vec!["pss-nbd@a".into()],
        reservations: 1,
        chunks: 1,
        times: VolumeTimes::default(),
    });
    let status = ServerStatus {
        cell: "c".into(),
        server: ServerId(1),
        version: "0.1.0".into(),
        pid: 7,
        uptime_s: 8,
        role: "leader".into(),
        leader: Some(ServerId(1)),
        ballot: ballot(3, 1),
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
        last_ballot: ballot(3, 1),
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
    };
    let events = EventList {
        first: 1,
        last: 2,
        events: vec![ListedEvent::Known(AdminEvent {
            number: 2,
            slot: Slot(3),
            time_ms: 4,
            by: Origin {
                name: "pss@host".into(),
                user: "alice".into(),
                address: Some(([10, 0, 0, 5], 40_000).into()),
            },
            action: AdminAction::DeleteVolume {
                volume: VolumeId(1),
                name: "vol001".into(),
                size_bytes: 1 << 30,
                forced: false,
            },
            refused: Some(Refusal::VolumeAttached),
        })],
    };
    let extents = (0..100).map(|extent| Extent {
        length_bytes: 4096,
        allocated: extent % 2 == 0,
    });
    let inspections = inspections().into_iter();
    let inspections = inspections.map(|it| Ok(ReplyBody::Inspection(Box::new(it))));
    let others = [
        Ok(ReplyBody::Done),
        Ok(ReplyBody::Session(SessionId(3))),
        Ok(ReplyBody::Data(vec![
            ReadPart::Data(Bytes::from(vec![1; 4096])),
            ReadPart::Hole(8192),
            ReadPart::Data(Bytes::from(vec![2; 77])),
        ])),
        Ok(ReplyBody::Extents(extents.collect())),
        Ok(ReplyBody::Volumes(volumes.collect())),
        Ok(ReplyBody::VolumeCreated(VolumeId(4))),
        Ok(ReplyBody::Chunks {
            chunks: vec![ChunkStatus {
                chunk: ChunkIndex(1),
                changed: Slot(2),
                changed_ms: 3,
                allocated_blocks: 4,
            }],
            next: Some(ChunkIndex(9)),
        }),
        Ok(ReplyBody::Status(Box::new(status))),
        Ok(ReplyBody::Events(Box::new(events))),
        Err(ReplyError::NotLeader {
            leader: Some(ServerId(2)),
        }),
        Err(ReplyError::Refused(Refusal::VolumeAttached)),
        Err(ReplyError::UnknownRefusal(200)),
        Err(ReplyError::NoSpace),
        Err(ReplyError::Miscompare(5)),
        Err(ReplyError::Invalid),
        Err(ReplyError::Io),
    ];
    others.into_iter().chain(inspections).collect()
}

fn client_frames() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let frame = |encode: &dyn Fn(&mut SendQueue)| {
        let mut out = SendQueue::new();
        encode(&mut out);
        bytes_of(&out)
    };
    let requests = requests().into_iter().map(|body| {
        let request = Request {
            tag: 0x0102,
            session: SessionId(3),
            number: RequestNumber(u64::from(body.is_numbered())),
            settled_below: RequestNumber(1),
            body,
        };
        frame(&|out| request.encode(out))
    });
    let replies = replies().into_iter().map(|body| {
        let reply = Reply { tag: 1, body };
        frame(&|out| reply.encode(out))
    });
    (requests.collect(), replies.collect())
}

/// Uses what was decoded as far as its receiver does before it looks into it.
fn check_message(message: &Message) {
    match message {
        Message::Accept { entries, .. }
        | Message::Tail { entries, .. }
        | Message::Chosen { entries, .. } => {
            for entry in entries {
                let _ = entry.verify();
            }
        }
        _ => {}
    }
}

fn keyed(byte: u8) -> MacKey {
    MacKey::new(&CellKey::from_bytes([byte; 32]))
}

fn datagrams(own: u8, key: Option<u8>) -> Datagrams {
    let cell = CellId([0xcc; 16]);
    Datagrams::new(cell, ServerId(own), Incarnation(2), 77, key.map(keyed))
}

proptest! {
    #![proptest_config(cases(2000))]

    /// Heads, lengths and cuts of a stream of frames.
    #[test]
    fn streams_of_frames(
        picks in prop::collection::vec(any::<Index>(), 1..4),
        changes in changes(),
        step in 1..5000_usize,
        fix in any::<bool>(),
    ) {
        let (requests, replies) = client_frames();
        for (corpus, limits) in [
            (peer_frames(), FrameLimits::PEERS),
            (requests, FrameLimits::REQUESTS),
            (replies, FrameLimits::REPLIES),
        ] {
            let mut bytes: Vec<u8> = picks.iter().flat_map(|pick| pick.get(&corpus[..]).clone()).collect();
            if fix {
                // Only the head, whose checksum then fits.
                change_in_place(&mut bytes[..28], &changes);
                let header = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
                if let Some(rest) = bytes.get(32..).and_then(|rest| rest.get(..header)) {
                    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..28]), rest);
                    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
                }
            } else {
                change(&mut bytes, &changes);
            }
            let (frames, most) = memory_of(|| frames(&bytes, step, limits));
            // A frame that has been announced rightly may be waited for.
            let announced = limits.header_bytes + limits.payload_bytes;
            prop_assert!(most <= justified(bytes.len()) + announced, "{most} bytes");
            for frame in frames {
                let _ = decode_frame(frame.clone());
                let _ = Request::decode(frame.clone());
                let _ = Reply::decode(frame);
            }
        }
    }

    #[test]
    fn messages_of_servers(
        pick in any::<Index>(),
        of_header in changes(),
        of_payload in prop::option::weighted(0.3, changes()),
    ) {
        let corpus = peer_frames();
        let of_payload = of_payload.unwrap_or_default();
        let (frame, length) =
            changed_frame(&corpus[pick.index(corpus.len())], FrameLimits::PEERS, &of_header, &of_payload);
        let (decoded, most) = memory_of(|| decode_frame(frame));
        prop_assert!(most <= justified(length), "{most} bytes for {length}");
        match decoded {
            Ok(message) => check_message(&message),
            Err(error) => prop_assert!((10..200).contains(&error.to_string().len())),
        }
    }

    #[test]
    fn messages_of_clients(
        pick in any::<Index>(),
        of_header in changes(),
        of_payload in prop::option::weighted(0.3, changes()),
    ) {
        let (requests, replies) = client_frames();
        let of_payload = of_payload.unwrap_or_default();
        let (frame, length) =
            changed_frame(&requests[pick.index(requests.len())], FrameLimits::REQUESTS, &of_header, &of_payload);
        let (decoded, most) = memory_of(|| Request::decode(frame));
        prop_assert!(most <= justified(length), "{most} bytes for {length}");
        match decoded {
            Ok(request) => _ = request.body.verify(),
            Err(error) => prop_assert!((10..200).contains(&error.to_string().len())),
        }
        let (frame, length) =
            changed_frame(&replies[pick.index(replies.len())], FrameLimits::REPLIES, &of_header, &of_payload);
        let (decoded, most) = memory_of(|| Reply::decode(frame));
        prop_assert!(most <= justified(length), "{most} bytes for {length}");
        if let Err(error) = decoded {
            prop_assert!((10..200).contains(&error.to_string().len()));
        }
    }

    #[test]
    fn datagrams_of_servers(
        pick in any::<Index>(),
        changes in changes(),
        key in prop::option::of(Just(1_u8)),
    ) {
        let (short, _) = messages();
        let mut bytes = Vec::new();
        datagrams(4, key).encode(ServerId(6), pick.get(&short[..]), &mut bytes).unwrap();
        let valid = bytes.clone();
        change(&mut bytes, &changes);
        if key.is_none() && bytes.len() > 4 {
            let (rest, crc) = bytes.split_last_chunk_mut::<4>().unwrap();
            *crc = crc32c::crc32c(rest).to_le_bytes();
        }
        let (decoded, most) = memory_of(|| datagrams(6, key).decode(&bytes));
        prop_assert!(most <= justified(bytes.len()), "{most} bytes");
        match decoded {
            Ok(datagram) => {
                prop_assert!(key.is_none() || bytes == valid, "a key protects every bit");
                prop_assert!(datagram.incarnation.0 > 0 || key.is_none());
            }
            Err(error) => prop_assert!((10..200).contains(&error.to_string().len())),
        }
    }

    /// The first frames of a connection, with and without a key.
    #[test]
    fn greetings(changes in changes(), with_key in any::<bool>(), is_server in any::<bool>()) {
        let config = |role, key: bool| HandshakeConfig {
            cell: Some(CellId([9; 16])),
            key: key.then(|| keyed(1)),
            role,
            wanted: None,
        };
        let server = |id| Role::Server { id: ServerId(id), incarnation: Incarnation(1), boot: 5 };
        let caller = match is_server {
            true => server(1),
            false => Role::Client("pss-nbd@host".into()),
        };
        let only = |out: &SendQueue| {
            let bytes = bytes_of(out);
            frames(&bytes, bytes.len(), FrameLimits::HANDSHAKE).remove(0)
        };
        let altered = |frame: &Frame| {
            let mut header = frame.header.to_vec();
            change(&mut header, &changes);
            let bytes = framed(frame.kind, &header, &[]);
            frames(&bytes, bytes.len(), FrameLimits::HANDSHAKE).pop()
        };
        let mut hello = SendQueue::new();
        let mut client = Handshake::client(config(caller, with_key), [1; 32], &mut hello);
        let hello = only(&hello);
        // A changed Hello.
        if let Some(frame) = altered(&hello) {
            let mut out = SendQueue::new();
            let mut answering = Handshake::server(config(server(0), with_key), [2; 32]);
            let (result, most) = memory_of(|| answering.handle_frame(&frame, &mut out));
            prop_assert!(most < 1 << 20);
            if let Err(error) = result {
                prop_assert!((10..300).contains(&error.to_string().len()), "{error}");
            }
        }
        // A changed Welcome, and then a changed Proof.
        let mut out = SendQueue::new();
        let mut answering = Handshake::server(config(server(0), with_key), [2; 32]);
        prop_assert!(answering.handle_frame(&hello, &mut out).is_ok());
        let welcome = only(&out);
        if let Some(frame) = altered(&welcome) {
            let mut hello = SendQueue::new();
            let role = Role::Client("x".into());
            let mut other = Handshake::client(config(role, with_key), [1; 32], &mut hello);
            let _ = other.handle_frame(&frame, &mut SendQueue::new());
        }
        let mut proof = SendQueue::new();
        prop_assert!(client.handle_frame(&welcome, &mut proof).is_ok());
        if let (true, false) = (with_key, proof.is_empty()) {
            let proof = only(&proof);
            let changed = altered(&proof).filter(|frame| frame.header != proof.header);
            if let Some(frame) = changed {
                let peer = answering.handle_frame(&frame, &mut SendQueue::new());
                prop_assert!(!matches!(peer, Ok(Some(_))), "a wrong proof lets nobody in");
            }
        }
    }
}

// ---- the log ----

const CELL: [u8; 16] = [7; 16];

fn log_params() -> LogParams {
    LogParams {
        cell: CELL,
        group: GroupId(0),
        segment_bytes: 96 << 10,
        retain_bytes: 96 << 10,
        spares: 0,
        spares_max: 0,
    }
}

/// Makes the checksums of a segment's header and records right again (docs/formats.md, section 2).
fn fix_checksums(bytes: &mut [u8]) {
    for at in (0..bytes.len()).step_by(4096) {
        let page = &mut bytes[at..];
        let (end, seed): (usize, &[u8]) = match page.get(..8) {
            Some(b"PSSLSEG1") => (128, &[]),
            Some(b"PSSLREC1") if page.len() >= 96 => {
                let length = u32::from_le_bytes(page[56..60].try_into().unwrap());
                (96 + length as usize, &CELL)
            }
            _ => continue,
        };
        if let Some(covered) = page.get(12..end) {
            let crc = crc32c::crc32c_append(crc32c::crc32c(seed), covered);
            page[8..12].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

proptest! {
    #![proptest_config(cases(300))]

    /// Records whose checksums fit and whose content does not.
    #[test]
    fn log_files(
        pages in prop::collection::vec((any::<Index>(), changes()), 1..4),
        cut in prop::option::weighted(0.1, any::<Index>()),
        fix in prop::bool::weighted(0.8),
    ) {
        let disk = SimDisk::new();
        let (mut log, _) = Log::open(disk.disk(), log_params(), EntryId::default()).unwrap();
        for slot in 1..12 {
            log.append(None, &[entry(slot)], Slot(slot - 1)).unwrap();
        }
        drop(log);
        let files: Vec<_> = disk.files().into_iter().filter(|(path, _)| path.starts_with("log/")).collect();
        for (place, changes) in &pages {
            let (path, _) = place.get(&files[..]);
            let mut bytes = disk.contents(path).unwrap();
            // Pages with a header: there is where a reader believes what it reads.
            let heads: Vec<usize> = (0..bytes.len())
                .step_by(4096)
                .filter(|at| bytes[*at..].starts_with(b"PSSL"))
                .collect();
            if heads.is_empty() {
                continue;
            }
            let at = *place.get(&heads[..]);
            let end = (at + 600).min(bytes.len());
            change_in_place(&mut bytes[(at + 8).min(end)..end], changes);
            if fix {
                fix_checksums(&mut bytes);
            }
            let file = Disk::open(&disk, path, OpenMode::Existing).unwrap();
            file.write_at(&[IoSlice::new(&bytes)], 0).unwrap();
            if let Some(cut) = cut {
                file.set_len(cut.index(bytes.len()) as u64).unwrap();
            }
            file.sync().unwrap();
        }
        let allowed = justified(1 << 20) + 2 * (ENTRY_HEADER_MAX + ENTRY_PAYLOAD_MAX);
        let (opened, most) = memory_of(|| Log::open(disk.disk(), log_params(), EntryId::default()));
        prop_assert!(most <= allowed, "{most} bytes");
        match opened {
            Err(error) => {
                let text = error.to_string();
                prop_assert!(text.contains("log/0000"), "names no file: {text}");
            }
            Ok((log, _)) => {
                let reader = log.reader();
                let mut after = Slot(reader.first_slot().0 - 1);
                // A record may claim any slot.
                for _ in 0..40 {
                    if after >= reader.last().slot {
                        break;
                    }
                    let (read, most) = memory_of(|| reader.read(after, Slot(u64::MAX), 1));
                    prop_assert!(most <= allowed, "{most} bytes");
                    match read {
                        Ok(LogRead::Entries { entries, .. }) => {
                            for entry in &entries {
                                prop_assert!(entry.verify().is_ok());
                            }
                            after = entries.last().map_or(after.next(), |entry| entry.id.slot);
                        }
                        Ok(LogRead::Gone { .. }) => break,
                        Err(error) => {
                            prop_assert!(error.to_string().len() > 10);
                            after = after.next();
                        }
                    }
                }
            }
        }
    }
}

// ---- NBD ----

fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", &code.to_be_bytes()[..], &length, data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn info(name: &str, requests: &[u16]) -> Vec<u8> {
    let count = requests.len() as u16;
    let requests = requests.iter().flat_map(|request| request.to_be_bytes());
    [
        string(name),
        count.to_be_bytes().to_vec(),
        requests.collect(),
    ]
    .concat()
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = queries.len() as u32;
    let queries = queries.iter().flat_map(|query| string(query));
    [
        string(name),
        count.to_be_bytes().to_vec(),
        queries.collect(),
    ]
    .concat()
}

/// Every option that real clients send, and one that is skipped.
fn nbd_options() -> Vec<Vec<u8>> {
    vec![
        option(3, b""),
        option(5, b""),
        option(6, &info("vol", &[0, 1, 2, 3])),
        option(7, &info("none", &[3])),
        option(8, b""),
        option(9, &contexts("vol", &["base:"])),
        option(
            10,
            &contexts("vol", &["base:allocation", "qemu:dirty-bitmap:x"]),
        ),
        option(11, b""),
        option(99, &[1; 3000]),
        option(2, b""),
        option(1, b"vol"),
        option(7, &info("vol", &[1, 3])),
    ]
}

fn negotiate(bytes: &[u8], step: usize) -> usize {
    let mut handshake = NbdHandshake::new();
    let mut input = BytesMut::new();
    let mut sent = 0;
    for piece in bytes.chunks(step.max(1)) {
        input.extend_from_slice(piece);
        loop {
            while let Some(output) = handshake.poll_output() {
                match output {
                    Output::Send(bytes) => sent += bytes.len(),
                    Output::List => handshake.handle_list(Ok(vec![Listed {
                        name: "vol".into(),
                        description: "a disk".into(),
                    }])),
                    Output::Open(name) => {
                        let device = Arc::new(MemoryDevice::new("vol", 1 << 20));
                        let export = Export::new(device, false);
                        handshake.handle_open(Ok((name == "vol").then_some(export)));
                    }
                    Output::Start(_) => return sent,
                    Output::Close(why) => {
                        assert!(why.to_string().len() > 5);
                        return sent;
                    }
                }
            }
            if !handshake.handle_bytes(&mut input) {
                break;
            }
        }
    }
    sent
}

const NBD_BYTES: u64 = 1 << 20;

/// Every command, with flags.
fn nbd_requests() -> Vec<Vec<u8>> {
    let request = |flags: u16, command: u16, offset: u64, length: u32, data: &[u8]| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    };
    vec![
        request(0, 0, 4096, 8192, &[]),
        request(4, 0, 0, 65536, &[]),
        request(1, 1, 8192, 4096, &[3; 4096]),
        request(0, 1, 77, 700, &[4; 700]),
        request(0, 1, 0, 100_000, &[5; 100_000]),
        request(0, 3, 0, 0, &[]),
        request(0, 4, 0, 65536, &[]),
        request(0, 5, 4096, 4096, &[]),
        request(2, 6, 0, 65536, &[]),
        request(16, 6, 0, 65536, &[]),
        request(0, 7, 0, 1 << 20, &[]),
        request(8, 7, 0, 1 << 20, &[]),
        request(0, 2, 0, 0, &[]),
    ]
}

/// Lets a connection take bytes and the device serve it; gives what was sent.
fn transmit(bytes: &[u8], step: usize, structured: bool) -> usize {
    let device = MemoryDevice::new("vol", NBD_BYTES);
    let mut transmission = Transmission::new(Terms {
        size_bytes: NBD_BYTES,
        read_only: false,
        structured_replies: structured,
        allocation_context: structured,
    });
    let mut input = BytesMut::new();
    let mut sent = 0;
    for mut piece in bytes.chunks(step.max(1)) {
        while !piece.is_empty() && transmission.ending().is_none() {
            let count = match transmission.own_buffer() {
                Some(buffer) => buffer.fill(piece),
                None => {
                    input.extend_from_slice(piece);
                    piece.len()
                }
            };
            piece = &piece[count..];
            transmission.handle_own_buffer();
            transmission.handle_bytes(&mut input);
            while let Some(submit) = transmission.poll_submit() {
                let queue = CompletionQueue::new(Box::new(|| {}));
                device.submit(submit.request, queue.completion(submit.token));
                let mut results = Vec::new();
                queue.take(&mut results);
                for (token, result) in results {
                    transmission.handle_completion(token, result);
                }
                transmission.handle_bytes(&mut input);
            }
            while !transmission.sending().is_empty() {
                let mut slices = [IoSlice::new(&[]); 16];
                let filled = transmission.sending().fill(&mut slices);
                let count = slices[..filled].iter().map(|slice| slice.len()).sum();
                transmission.sending().advance(count);
                sent += count;
            }
        }
    }
    sent
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn nbd_handshakes(
        picks in prop::collection::vec(any::<Index>(), 0..8),
        changes in changes(),
        step in 1..300_usize,
    ) {
        let options = nbd_options();
        let picked = picks.iter().flat_map(|pick| pick.get(&options[..]).clone());
        let mut bytes: Vec<u8> = [0, 0, 0, 3].into_iter().chain(picked).collect();
        change(&mut bytes, &changes);
        let (sent, most) = memory_of(|| negotiate(&bytes, step));
        prop_assert!(most <= justified(bytes.len()), "{most} bytes for {}", bytes.len());
        prop_assert!(sent < 64 << 10, "{sent} bytes");
    }

    #[test]
    fn nbd_transmissions(
        picks in prop::collection::vec(any::<Index>(), 1..8),
        changes in changes(),
        step in 1..20_000_usize,
        structured in any::<bool>(),
    ) {
        let requests = nbd_requests();
        let mut bytes: Vec<u8> = picks.iter().flat_map(|pick| pick.get(&requests[..]).clone()).collect();
        // Mostly the headers, which are few of the bytes.
        let heads = bytes.len().min(200);
        change_in_place(&mut bytes[..heads], &changes);
        change(&mut bytes, &changes);
        let (sent, most) = memory_of(|| transmit(&bytes, step, structured));
        let allowed = BYTES_IN_FLIGHT_MAX + PAYLOAD_BYTES_MAX as usize + (8 << 20);
        prop_assert!(most <= allowed, "{most} bytes");
        prop_assert!(sent <= picks.len() * (NBD_BYTES as usize + 4096) * 2, "{sent} bytes");
    }
}

// ---- text ----

const SERVER_CONF: &str = "# id server path\n0 paxos00 /pss\n1\tpaxos01   /pss # second\r\n\n  2 192.0.2.3 /pss\n\
                           3 fe80::1 /var/lib/pss/3\n5 paxos05.example /pss\n";
const RULES: &str = "vol001     read-only  allow=10.0.0.0/8  allow=2001:db8::/32\n\
                     scratch    allow=uid:1000  allow=gid:100  connections=1 # one\n\nprivate-*  hidden\n*\n";

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn lists_of_servers(changes in changes()) {
        let mut text = SERVER_CONF.as_bytes().to_vec();
        change(&mut text, &changes);
        let path = Path::new("/etc/pss/server.conf");
        let (parsed, most) = memory_of(|| ServersFile::parse(path, &text));
        prop_assert!(most <= justified(text.len()));
        match parsed {
            Ok(file) => {
                prop_assert!((1..=8).contains(&file.records.len()));
                for record in &file.records {
                    prop_assert!(record.id.0 < 8 && record.path.is_absolute());
                }
            }
            Err(error) => {
                let message = error.to_string();
                let place = message.strip_prefix("/etc/pss/server.conf:").unwrap();
                let line = place.split(':').next().unwrap().parse::<usize>();
                let whole = place.starts_with(" lists no ");
                prop_assert!(line.is_ok_and(|line| line > 0) || whole, "{message}");
                prop_assert!(!message.contains(|c: char| c.is_control()), "{message:?}");
            }
        }
    }

    #[test]
    fn rules_of_exports(changes in changes()) {
        let mut text = RULES.as_bytes().to_vec();
        change(&mut text, &changes);
        let text = String::from_utf8_lossy(&text);
        if let Err(error) = Policy::default().with_rules(&text) {
            let message = error.to_string();
            prop_assert!(message.starts_with("line "), "{message}");
        }
    }
}
