//! The client against servers in this process that speak the wire and keep everything in memory.

use std::collections::HashMap;
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex as StdMutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, broadcast};
use tokio::time::timeout;

use super::*;
use crate::entry::{Command, Op, Origin};
use crate::key::CellId;
use crate::state::{Answer, CHUNK_BYTES_DEFAULT, Effect, State};
use crate::types::{Ballot, Incarnation, RequestNumber, SessionId};
use crate::volume::device::{
    Completion, CompletionQueue, DeviceReply, DeviceRequest, DeviceResult, Fate, ReadPart,
};
use crate::wire::auth::{Handshake, HandshakeConfig, MacKey, Role};
use crate::wire::client::{Browse, Reply, Request};
use crate::wire::frame::{FrameKind, FrameLimits, FrameReader, SendQueue};

/// Nobody leads.
const NOBODY: u8 = 255;

/// A volume of this name is refused for a reason that only servers of a newer version have.
const NEWER: &str = "newer";

/// What the servers of the fake cell share: it is always in agreement with itself.
struct Fake {
    store: StdMutex<Store>,
    leader: AtomicU8,
    /// Requests are read and forgotten.
    is_mute: AtomicBool,
    /// This server lets others answer first.
    slow: AtomicU8,
    /// This server has not got its chunks.
    incomplete: AtomicU8,
    /// Last slot that all servers have, and have applied.
    applied: AtomicU64,
    /// After so many more replies to numbered requests, connections break instead of a reply.
    replies_left: AtomicU64,
    /// Breaks all connections.
    cut: broadcast::Sender<()>,
    key: Option<CellKey>,
}

#[derive(Default)]
struct Store {
    state: State,
    data: HashMap<VolumeId, Vec<u8>>,
    /// Commands that had an effect on data.
    effects: u64,
}

impl Fake {
    async fn start(servers: u8, key: Option<CellKey>) -> (Arc<Fake>, CellConfig) {
        let fake = Arc::new(Fake {
            store: StdMutex::default(),
            leader: AtomicU8::new(0),
            is_mute: AtomicBool::new(false),
            slow: AtomicU8::new(NOBODY),
            incomplete: AtomicU8::new(NOBODY),
            applied: AtomicU64::new(100),
            replies_left: AtomicU64::new(u64::MAX),
            cut: broadcast::channel(4).0,
            key: key.clone(),
        });
        let mut addresses = Vec::new();
        for server in 0..servers {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push((ServerId(server), listener.local_addr().unwrap()));
            tokio::spawn(Arc::clone(&fake).listen(server, listener));
        }
        let mut config = CellConfig::new(addresses, "test");
        config.key = key;
        (fake, config)
    }

    /// One server, with an open volume of 8 MiB.
    async fn device() -> (Arc<Fake>, Arc<Cell>, Arc<dyn BlockDevice>) {
        Fake::device_on(1, |_| {}).await
    }

    async fn device_on(
        servers: u8,
        change: impl FnOnce(&mut CellConfig),
    ) -> (Arc<Fake>, Arc<Cell>, Arc<dyn BlockDevice>) {
        let (fake, mut config) = Fake::start(servers, None).await;
        change(&mut config);
        let cell = Cell::connect(config);
        cell.create_volume("v", 8 << 20, CHUNK_BYTES_DEFAULT)
            .await
            .unwrap();
        let device = cell.open("v").await.unwrap().unwrap();
        (fake, cell, device)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    fn end_all_sessions(&self) {
        let mut store = self.store();
        let sessions = store.state.sessions().map(|session| session.id).collect();
        store.apply(Command::internal(Op::EndSessions { sessions }), |_| {});
    }

    fn sessions(&self) -> Vec<crate::state::SessionInfo> {
        self.store().state.sessions().collect()
    }

    async fn listen(self: Arc<Self>, server: u8, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut cut = self.cut.subscribe();
            let fake = Arc::clone(&self);
            tokio::spawn(async move {
                tokio::select! {
                    _ = fake.serve(server, stream) => {}
                    _ = cut.recv() => {}
                }
            });
        }
    }

    async fn serve(&self, server: u8, mut stream: TcpStream) -> Option<()> {
        let role = Role::Server {
            id: ServerId(server),
            incarnation: Incarnation(1),
            boot: u64::from(server),
        };
        let config = HandshakeConfig {
            cell: Some(CellId([9; 16])),
            key: self.key.as_ref().map(MacKey::new),
            role,
            wanted: None,
        };
        let mut handshake = Some(Handshake::server(config, [3; 32]));
        let mut reader = FrameReader::new(FrameLimits::REQUESTS);
        let mut out = SendQueue::new();
        loop {
            let spare = reader.spare();
            let count = stream.read(spare).await.ok().filter(|count| *count > 0)?;
            reader.filled(count);
            while let Some(frame) = reader.poll_frame().unwrap() {
                if let Some(pending) = &mut handshake {
                    let result = pending.handle_frame(&frame, &mut out);
                    if !matches!(result, Ok(None)) {
                        handshake = None;
                    }
                    if result.is_err() {
                        flush(&mut stream, &mut out).await?;
                        return None;
                    }
                    continue;
                }
                assert_eq!(frame.kind, FrameKind::Request);
                let request = Request::decode(frame).unwrap();
                assert!(request.body.verify());
                if self.is_mute.load(Ordering::SeqCst) && request.body != RequestBody::Status {
                    continue;
                }
                if self.slow.load(Ordering::SeqCst) == server {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                let is_numbered = request.body.is_numbered();
                let tag = request.tag;
                let is_stale = matches!(request.body, RequestBody::Browse { stale: true, .. });
                let is_complete = self.incomplete.load(Ordering::SeqCst) != server;
                let leader = match is_stale && is_complete {
                    // It does not ask who leads.
                    true => server,
                    false if is_stale => NOBODY,
                    false => self.leader(),
                };
                let mut body = self.store().answer(request, server, leader);
                if let Ok(ReplyBody::Status(status)) = &mut body {
                    status.applied = self.applied.load(Ordering::SeqCst);
                    status.last = status.applied;
                }
                if is_numbered && self.replies_left.fetch_sub(1, Ordering::SeqCst) == 0 {
                    self.replies_left.store(u64::MAX, Ordering::SeqCst);
                    return None;
                }
                Reply { tag, body }.encode(&mut out);
            }
            flush(&mut stream, &mut out).await?;
        }
    }

    fn leader(&self) -> u8 {
        self.leader.load(Ordering::SeqCst)
    }
}

async fn flush(stream: &mut TcpStream, out: &mut SendQueue) -> Option<()> {
    while !out.is_empty() {
        let mut slices = [IoSlice::new(&[]); 8];
        let used = out.as_io_slices(&mut slices);
        let count = stream.write_vectored(&slices[..used]).await.ok()?;
        out.advance(count);
    }
    Some(())
}

impl Store {
    fn apply(&mut self, command: Command, effect: impl FnOnce(&mut Vec<u8>)) -> Answer {
        let slot = self.state.applied().next();
        let (answer, done) = self.state.apply(slot, 0, &command);
        let volume = match done {
            Effect::Zero { volume, .. } => Some(volume.id),
            Effect::Create(volume) => {
                self.data
                    .insert(volume.id, vec![0; volume.size_bytes as usize]);
                None
            }
            _ => None,
        };
        self.state.finish_slot(slot);
        if let Some(data) = volume.and_then(|volume| self.data.get_mut(&volume)) {
            self.effects += 1;
            effect(data);
        }
        answer
    }

    fn answer(
        &mut self,
        request: Request,
        server: u8,
        leader: u8,
    ) -> Result<ReplyBody, ReplyError> {
        let Request {
            session,
            number,
            settled_below,
            body,
            ..
        } = request;
        if body == RequestBody::Status {
            return Ok(ReplyBody::Status(Box::new(status(server, leader))));
        }
        if body == RequestBody::Shutdown {
            return Ok(ReplyBody::Done);
        }
        if server != leader {
            let leader = Some(ServerId(leader)).filter(|leader| leader.0 != NOBODY);
            return Err(ReplyError::NotLeader { leader });
        }
        if session != SessionId(0) && !self.state.has_session(session) {
            return Err(ReplyError::Refused(Refusal::StaleSession));
        }
        assert_eq!(body.is_numbered(), number != RequestNumber(0));
        let command = |op| Command {
            session,
            number,
            settled_below,
            op,
        };
        let range = |volume, offset: u64, length: u64| {
            let first_block = offset / 4096;
            command(Op::Zero {
                volume,
                first_block,
                blocks: (offset + length).div_ceil(4096) - first_block,
                allocate: false,
            })
        };
        let answer = match body {
            RequestBody::OpenSession { nonce, name, user } => {
                let origin = Box::new(Origin {
                    name,
                    user,
                    address: None,
                });
                let open = Command::internal(Op::OpenSessionFrom { nonce, origin });
                return match self.apply(open, |_| {}) {
                    Answer::Created(id) => Ok(ReplyBody::Session(SessionId(id))),
                    _ => Err(ReplyError::Refused(Refusal::TooMany)),
                };
            }
            RequestBody::EndSession => {
                let sessions = vec![session];
                self.apply(Command::internal(Op::EndSessions { sessions }), |_| {})
            }
            RequestBody::KeepAlive => Answer::Done,
            RequestBody::Read {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                let at = offset_bytes as usize;
                let data = self.data.get(&volume);
                let data = data.and_then(|data| data.get(at..at + length_bytes as usize));
                let Some(data) = data else {
                    return Err(ReplyError::Refused(Refusal::OutOfRange));
                };
                let is_hole = data.iter().all(|byte| *byte == 0);
                return Ok(ReplyBody::Data(vec![match is_hole {
                    true => ReadPart::Hole(length_bytes),
                    false => ReadPart::Data(Bytes::copy_from_slice(data)),
                }]));
            }
            RequestBody::Write {
                volume,
                offset_bytes,
                data,
                ..
            } => {
                let at = offset_bytes as usize;
                self.apply(range(volume, offset_bytes, data.len() as u64), |all| {
                    all[at..at + data.len()].copy_from_slice(&data);
                })
            }
            RequestBody::Zero {
                volume,
                offset_bytes,
                length_bytes,
                whole_blocks_only,
                ..
            } => {
                let (mut start, mut end) = (offset_bytes, offset_bytes + length_bytes);
                if whole_blocks_only {
                    start = start.next_multiple_of(4096);
                    end = (end / 4096 * 4096).max(start);
                }
                self.apply(range(volume, offset_bytes, length_bytes), |all| {
                    all[start as usize..end as usize].fill(0);
                })
            }
            RequestBody::CompareAndWrite {
                volume,
                offset_bytes,
                data,
                ..
            } => {
                let at = offset_bytes as usize;
                let (expected, write) = data.split_at(data.len() / 2);
                let present = &self.data[&volume][at..at + write.len()];
                let differs = present.iter().zip(expected).position(|(a, b)| a != b);
                if let Some(differs) = differs {
                    return Err(ReplyError::Miscompare(differs as u64));
                }
                self.apply(range(volume, offset_bytes, write.len() as u64), |all| {
                    all[at..at + write.len()].copy_from_slice(write);
                })
            }
            RequestBody::Extents { length_bytes, .. } => {
                return Ok(ReplyBody::Extents(vec![crate::volume::device::Extent {
                    length_bytes: length_bytes + 4096,
                    allocated: true,
                }]));
            }
            RequestBody::ListVolumes
            | RequestBody::Browse {
                what: Browse::Volumes,
                ..
            } => {
                let status = |volume: &Volume| VolumeStatus {
                    reservations: 0,
                    volume: volume.clone(),
                    allocated_bytes: 0,
                    attached_by: vec![],
                    chunks: 0,
                    times: Default::default(),
                };
                return Ok(ReplyBody::Volumes(
                    self.state.volumes().map(status).collect(),
                ));
            }
            RequestBody::CreateVolume { name, .. } if name == NEWER => {
                return Err(ReplyError::UnknownRefusal(200));
            }
            RequestBody::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            } => {
                let create = command(Op::CreateVolume {
                    name,
                    size_bytes,
                    chunk_bytes,
                    uuid,
                });
                return match self.apply(create, |_| {}) {
                    Answer::Created(id) => Ok(ReplyBody::VolumeCreated(VolumeId(id as u32))),
                    Answer::Refused(refusal) => Err(ReplyError::Refused(refusal)),
                    Answer::Done => Err(ReplyError::Io),
                };
            }
            RequestBody::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => self.apply(
                command(Op::ResizeVolume {
                    volume,
                    size_bytes,
                    allow_shrink,
                }),
                |all| all.truncate(size_bytes as usize),
            ),
            RequestBody::DeleteVolume { volume } => {
                self.apply(command(Op::DeleteVolume { volume }), |_| {})
            }
            RequestBody::ShrinkVolume { volume, size_bytes } => self
                .apply(command(Op::ShrinkVolume { volume, size_bytes }), |all| {
                    all.truncate(size_bytes as usize)
                }),
            RequestBody::Browse { .. } => return Err(ReplyError::Invalid),
            RequestBody::DeleteAttachedVolume { volume } => {
                self.apply(command(Op::DeleteAttachedVolume { volume }), |_| {})
            }
            RequestBody::Attach { volume } => self.apply(command(Op::Attach { volume }), |_| {}),
            RequestBody::Detach { volume } => self.apply(command(Op::Detach { volume }), |_| {}),
            RequestBody::Look { volume } => {
                let found = self.state.volume(volume);
                let volume = found.ok_or(ReplyError::Refused(Refusal::NoSuchVolume))?;
                return Ok(ReplyBody::Volume {
                    size_bytes: volume.size_bytes,
                    reservations: 0,
                });
            }
            RequestBody::Reserve { .. }
            | RequestBody::Reservations { .. }
            | RequestBody::Events { .. }
            | RequestBody::SetServers { .. }
            | RequestBody::Recover { .. }
            | RequestBody::Checked { .. } => return Err(ReplyError::Invalid),
            RequestBody::Note { text } => self.apply(command(Op::Note { text }), |_| {}),
            RequestBody::Status | RequestBody::Shutdown | RequestBody::Inspect(_) => Answer::Done,
        };
        match answer {
            Answer::Refused(refusal) => Err(ReplyError::Refused(refusal)),
            _ => Ok(ReplyBody::Done),
        }
    }
}

fn status(server: u8, leader: u8) -> ServerStatus {
    let role = if server == leader {
        "leader"
    } else {
        "follower"
    };
    ServerStatus {
        cell: "fake".into(),
        server: ServerId(server),
        version: String::new(),
        pid: 1,
        uptime_s: 1,
        role: role.into(),
        leader: None,
        ballot: Ballot::default(),
        chosen: 0,
        applied: 0,
        last: 0,
        log_first: 0,
        copying: None,
        copying_left_s: None,
        rejoining: false,
        incarnation: 1,
        lives: Vec::new(),
        free_bytes: 0,
        space_left: 1 << 30,
        full: false,
        stalled: false,
        total_bytes: 0,
        bad_blocks: 0,
        repaired_blocks: 0,
        lost_blocks: 0,
        clients: 0,
        peers: vec![],
        members: None,
        last_ballot: Ballot::default(),
        given_up_by: None,
        claimed_twice: Vec::new(),
        scrub: None,
    }
}

/// Submits requests and awaits their results.
struct Runner {
    queue: Arc<CompletionQueue>,
    wake: Arc<Notify>,
    next: u64,
    results: HashMap<u64, DeviceResult>,
}

impl Runner {
    fn new() -> Runner {
        let wake = Arc::new(Notify::new());
        let waker = Arc::clone(&wake);
        Runner {
            queue: CompletionQueue::new(Box::new(move || waker.notify_one())),
            wake,
            next: 0,
            results: HashMap::new(),
        }
    }

    fn completion(&mut self) -> (u64, Completion) {
        self.next += 1;
        (self.next, self.queue.completion(self.next))
    }

    fn submit(&mut self, device: &Arc<dyn BlockDevice>, request: DeviceRequest) -> u64 {
        let (cookie, done) = self.completion();
        device.submit(request, done);
        cookie
    }

    async fn result(&mut self, cookie: u64) -> DeviceResult {
        loop {
            let mut results = Vec::new();
            self.queue.take(&mut results);
            self.results.extend(results);
            if let Some(result) = self.results.remove(&cookie) {
                return result;
            }
            let limit = Duration::from_secs(20);
            timeout(limit, self.wake.notified())
                .await
                .expect("a result in time");
        }
    }

    async fn run(&mut self, device: &Arc<dyn BlockDevice>, request: DeviceRequest) -> DeviceResult {
        let cookie = self.submit(device, request);
        self.result(cookie).await
    }

    async fn read(&mut self, device: &Arc<dyn BlockDevice>, at: u64, length: u32) -> Vec<u8> {
        let request = DeviceRequest::Read {
            offset_bytes: at,
            length_bytes: length,
        };
        let Ok(DeviceReply::Data(parts)) = self.run(device, request).await else {
            panic!("read failed");
        };
        let mut data = Vec::new();
        for part in parts {
            match part {
                ReadPart::Data(part) => data.extend_from_slice(&part),
                ReadPart::Hole(length) => data.resize(data.len() + length as usize, 0),
            }
        }
        data
    }
}

fn write(offset_bytes: u64, data: impl Into<Bytes>) -> DeviceRequest {
    DeviceRequest::Write {
        offset_bytes,
        data: data.into(),
        fua: false,
    }
}

const DONE: DeviceResult = Ok(DeviceReply::Done);

/// A small generator of numbers that are the same in each run (Knuth's MMIX constants).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[tokio::test]
async fn volume_agrees_with_a_byte_vector() {
    let (_fake, _cell, device) = Fake::device().await;
    let mut runner = Runner::new();
    let mut model = vec![0_u8; 8 << 20];
    let mut numbers = Numbers(1);
    for step in 0..400_u64 {
        let longest = [5000, 20_000, 200_000, 3 << 20][numbers.below(4) as usize];
        let length = 1 + numbers.below(longest);
        let mut at = numbers.below((8 << 20) - length);
        if numbers.below(2) == 0 {
            at = at / 4096 * 4096;
        }
        let range = at as usize..(at + length) as usize;
        let byte = step as u8;
        match numbers.below(6) {
            0 | 1 => {
                let data = vec![byte; length as usize];
                assert_eq!(runner.run(&device, write(at, data)).await, DONE);
                model[range].fill(byte);
            }
            2 => {
                let zeroes = DeviceRequest::WriteZeroes {
                    offset_bytes: at,
                    length_bytes: length,
                    allocate: numbers.below(2) == 0,
                    fua: false,
                };
                assert_eq!(runner.run(&device, zeroes).await, DONE);
                model[range].fill(0);
            }
            3 => {
                let trim = DeviceRequest::Trim {
                    offset_bytes: at,
                    length_bytes: length,
                    fua: false,
                };
                assert_eq!(runner.run(&device, trim).await, DONE);
                let start = range.start.next_multiple_of(4096);
                let end = range.end / 4096 * 4096;
                model[start..end.max(start)].fill(0);
            }
            4 => {
                let range = range.start..range.end.min(range.start + 9000);
                let compare = DeviceRequest::CompareAndWrite {
                    offset_bytes: at,
                    expected: Bytes::copy_from_slice(&model[range.clone()]),
                    write: vec![byte; range.len()].into(),
                };
                assert_eq!(runner.run(&device, compare).await, DONE);
                model[range].fill(byte);
            }
            _ => {
                let data = runner.read(&device, at, length as u32).await;
                assert!(data == model[range], "step {step}");
            }
        }
    }
    assert!(runner.read(&device, 0, 8 << 20).await == model);
}

#[tokio::test]
async fn errors_and_extents_reach_the_front_end() {
    let (_fake, _cell, device) = Fake::device().await;
    let mut runner = Runner::new();
    let compare = DeviceRequest::CompareAndWrite {
        offset_bytes: 10,
        expected: Bytes::from_static(&[0, 0, 1]),
        write: Bytes::from_static(&[1, 1, 1]),
    };
    assert_eq!(
        runner.run(&device, compare).await,
        Err(DeviceError::Miscompare(2))
    );
    assert_eq!(runner.run(&device, DeviceRequest::Flush).await, DONE);
    let extents = DeviceRequest::Extents {
        offset_bytes: 0,
        length_bytes: 10_000,
    };
    let Ok(DeviceReply::Extents(extents)) = runner.run(&device, extents).await else {
        panic!();
    };
    assert_eq!(extents[0].length_bytes, 10_000);
    let info = device.info();
    assert_eq!((info.name.as_str(), info.size_bytes), ("v", 8 << 20));
}

#[tokio::test]
async fn leader_changes_lose_nothing_and_repeat_nothing() {
    let (fake, _cell, device) = Fake::device_on(3, |_| {}).await;
    let mut runner = Runner::new();
    let mut cookies = Vec::new();
    let before = fake.store().effects;
    for round in 0..6_u64 {
        for block in 0..100_u64 {
            let data = vec![round as u8 + 1; 4096];
            cookies.push(runner.submit(&device, write(block * 4096, data)));
        }
        match round % 3 {
            0 => fake.leader.store((round as u8 + 1) % 3, Ordering::SeqCst),
            1 => {
                let _ = fake.cut.send(());
            }
            _ => fake.leader.store(NOBODY, Ordering::SeqCst),
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
        if fake.leader() == NOBODY {
            tokio::time::sleep(Duration::from_millis(100)).await;
            fake.leader.store(2, Ordering::SeqCst);
        }
    }
    for cookie in cookies {
        assert_eq!(runner.result(cookie).await, DONE);
    }
    assert_eq!(fake.store().effects - before, 600, "each write once");
    assert!(
        runner
            .read(&device, 0, 409_600)
            .await
            .iter()
            .all(|byte| *byte == 6)
    );
}

#[tokio::test]
async fn a_named_leader_is_followed_at_once() {
    // Server 0 accepts connections, but never answers anything: whoever waits for it loses time.
    let hangs = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hung = hangs.local_addr().unwrap();
    let (fake, mut config) = Fake::start(3, None).await;
    config.servers[0].1 = hung;
    fake.leader.store(1, Ordering::SeqCst);
    let cell = Cell::connect(config);
    cell.create_volume("v", 8 << 20, CHUNK_BYTES_DEFAULT)
        .await
        .unwrap();
    let device = cell.open("v").await.unwrap().unwrap();
    let mut runner = Runner::new();
    let mut shortest = Duration::MAX;
    for round in 0..10_u8 {
        fake.leader.store(2 - round % 2, Ordering::SeqCst);
        let start = Instant::now();
        assert_eq!(runner.run(&device, write(0, vec![round; 4096])).await, DONE);
        shortest = shortest.min(start.elapsed());
        // Servers that name each other faster than this are asked after a pause.
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    // With the pause it would be 50 ms, with waiting for rivals 20 ms more. The shortest of ten, so that
    // a machine that is busy now and then does not matter.
    assert!(shortest < Duration::from_millis(20), "{shortest:?}");
}

#[tokio::test]
async fn write_whose_reply_was_lost_is_not_done_twice() {
    let (fake, _cell, device) = Fake::device().await;
    let mut runner = Runner::new();
    let before = fake.store().effects;
    for number in 0..20 {
        fake.replies_left.store(number % 5, Ordering::SeqCst);
        let cookies: Vec<u64> = (0..8)
            .map(|block| runner.submit(&device, write(block * 4096, vec![1; 4096])))
            .collect();
        for cookie in cookies {
            assert_eq!(runner.result(cookie).await, DONE);
        }
    }
    assert_eq!(fake.store().effects - before, 160);
}

#[tokio::test]
async fn write_without_an_answer_expires_and_is_not_done_later() {
    let set = |config: &mut CellConfig| config.request_timeout = Duration::from_millis(300);
    let (fake, _cell, device) = Fake::device_on(1, set).await;
    let mut runner = Runner::new();
    fake.is_mute.store(true, Ordering::SeqCst);
    let start = Instant::now();
    let result = runner.run(&device, write(0, vec![1; 4096])).await;
    assert_eq!(result, Err(DeviceError::Unavailable));
    assert!(start.elapsed() >= Duration::from_millis(290));
    let read = DeviceRequest::Read {
        offset_bytes: 0,
        length_bytes: 512,
    };
    assert_eq!(
        runner.run(&device, read).await,
        Err(DeviceError::Unavailable)
    );
    fake.is_mute.store(false, Ordering::SeqCst);
    let before = fake.store().effects;
    while runner.run(&device, write(4096, vec![2; 4096])).await != DONE {}
    assert_eq!(runner.read(&device, 0, 4096).await, vec![0; 4096]);
    assert_eq!(fake.store().effects, before + 1);
}

#[tokio::test]
async fn silent_leader_is_left_for_another() {
    let (fake, mut config) = Fake::start(1, None).await;
    // A second server of the same cell that is never mute.
    let (other, other_config) = Fake::start(2, None).await;
    other.leader.store(NOBODY, Ordering::SeqCst);
    config.servers.push(other_config.servers[1]);
    let cell = Cell::connect(config);
    cell.create_volume("a", 1 << 20, CHUNK_BYTES_DEFAULT)
        .await
        .unwrap();
    fake.is_mute.store(true, Ordering::SeqCst);
    fake.leader.store(NOBODY, Ordering::SeqCst);
    other.leader.store(1, Ordering::SeqCst);
    let start = Instant::now();
    assert!(
        cell.volumes().await.unwrap().is_empty(),
        "the other one's volumes"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn fenced_session_fails_what_is_under_way_and_goes_on() {
    let (fake, cell, device) = Fake::device().await;
    let mut runner = Runner::new();
    assert_eq!(runner.run(&device, write(0, vec![1; 4096])).await, DONE);
    let fates = Arc::new(StdMutex::new(Vec::new()));
    let (log, watched) = (Arc::clone(&fates), Arc::downgrade(&device));
    device.watch(Box::new(move || {
        let fate = watched.upgrade().map(|device| device.fate());
        log.lock().unwrap().extend(fate);
        true
    }));
    fake.end_all_sessions();
    let cookies: Vec<u64> = (0..5)
        .map(|block| runner.submit(&device, write(block * 4096, vec![2; 4096])))
        .collect();
    for cookie in cookies {
        assert_eq!(runner.result(cookie).await, Err(DeviceError::Fenced));
    }
    assert_eq!(runner.run(&device, write(0, vec![3; 4096])).await, DONE);
    assert_eq!(runner.read(&device, 0, 8192).await[4095..4097], [3, 0]);
    assert_eq!(*fates.lock().unwrap(), [Fate::Fenced, Fate::Alive]);
    let sessions = fake.sessions();
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].volumes.len(), 1, "attached again");
    drop(cell);
}

#[tokio::test]
async fn volume_that_was_deleted_while_the_session_was_lost() {
    let (fake, _cell, device) = Fake::device().await;
    fake.end_all_sessions();
    let volume = fake.store().state.volume_named("v").unwrap().id;
    fake.store()
        .apply(Command::internal(Op::DeleteVolume { volume }), |_| {});
    let mut runner = Runner::new();
    let result = runner.run(&device, write(0, vec![1; 512])).await;
    assert_eq!(result, Err(DeviceError::Fenced));
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if device.fate() == Fate::Deleted {
            break;
        }
    }
    assert_eq!(device.fate(), Fate::Deleted);
    let result = runner.run(&device, write(0, vec![1; 512])).await;
    assert_eq!(result, Err(DeviceError::Deleted));
}

#[tokio::test]
async fn shrunken_volume_is_noticed() {
    let (fake, cell, device) = Fake::device().await;
    let volume = cell.volumes().await.unwrap()[0].volume.id;
    let shrink = Shrink::Always;
    cell.resize_volume(volume, 1 << 20, shrink).await.unwrap();
    let changed = Arc::new(Notify::new());
    let notify = Arc::clone(&changed);
    device.watch(Box::new(move || {
        notify.notify_one();
        false
    }));
    let mut runner = Runner::new();
    let result = runner.run(&device, write(2 << 20, vec![1; 4096])).await;
    assert_eq!(result, Err(DeviceError::OutOfRange));
    timeout(Duration::from_secs(3), changed.notified())
        .await
        .unwrap();
    assert_eq!(device.info().size_bytes, 1 << 20);
    drop(fake);
}

#[tokio::test]
async fn grown_volume_is_noticed_without_a_request() {
    let (fake, _cell, device) = Fake::device().await;
    let volume = fake.store().state.volume_named("v").unwrap().id;
    fake.store().apply(
        Command::internal(Op::ResizeVolume {
            volume,
            size_bytes: 16 << 20,
            allow_shrink: false,
        }),
        |_| {},
    );
    let changed = Arc::new(Notify::new());
    let notify = Arc::clone(&changed);
    device.watch(Box::new(move || {
        notify.notify_one();
        false
    }));
    timeout(Duration::from_secs(9), changed.notified())
        .await
        .unwrap();
    assert_eq!(device.info().size_bytes, 16 << 20);
}

/// Before the poll of every five seconds.
#[tokio::test]
async fn whoever_looks_sees_a_new_size_at_once() {
    let (fake, cell, device) = Fake::device().await;
    let mut runner = Runner::new();
    assert_eq!(runner.run(&device, DeviceRequest::Look).await, DONE);
    let volume = fake.store().state.volume_named("v").unwrap().id;
    fake.store().apply(
        Command::internal(Op::ResizeVolume {
            volume,
            size_bytes: 16 << 20,
            allow_shrink: false,
        }),
        |_| {},
    );
    assert_eq!(device.info().size_bytes, 8 << 20);
    assert_eq!(runner.run(&device, DeviceRequest::Look).await, DONE);
    assert_eq!(device.info().size_bytes, 16 << 20);
    drop(cell);
}

#[tokio::test]
async fn volume_is_attached_once_and_detached_when_the_last_handle_goes() {
    let (fake, cell, device) = Fake::device().await;
    let again = cell.open("").await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&device, &again));
    assert!(cell.open("nonesuch").await.unwrap().is_none());
    let id = cell.volumes().await.unwrap()[0].volume.id;
    assert!(matches!(
        cell.delete_volume(id, false).await,
        Err(ClientError::Refused(Refusal::VolumeAttached))
    ));
    drop((device, again));
    cell.delete_volume(id, false).await.unwrap();
    assert!(cell.list().await.unwrap().is_empty());
    cell.close().await;
    assert!(fake.sessions().is_empty());
    assert!(matches!(
        cell.volumes().await,
        Err(ClientError::Unavailable { .. })
    ));
}

/// As an iSCSI gateway opens it: attached while a session uses it.
#[tokio::test]
async fn an_unused_volume_is_attached_while_it_is_used() {
    let (fake, cell, device) = Fake::device().await;
    drop(device);
    let unused = cell.open_unused("v").await.unwrap().unwrap();
    assert!(cell.open_unused("nonesuch").await.unwrap().is_none());
    let volume = cell.volumes().await.unwrap()[0].volume.id;
    let attached = || {
        let sessions = fake.sessions().into_iter();
        sessions.filter(|it| it.volumes.contains(&volume)).count()
    };
    let becomes = async |count| {
        for _ in 0..500 {
            if attached() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("attached by {} instead of {count}", attached());
    };
    becomes(0).await;
    let mut runner = Runner::new();
    assert_eq!(runner.run(&unused, write(0, vec![1; 4096])).await, DONE);
    assert_eq!(attached(), 0);
    unused.set_in_use(true);
    unused.set_in_use(true);
    becomes(1).await;
    let busy = Err(Refusal::VolumeAttached);
    let refused = |result: Result<(), ClientError>| {
        result.map_err(|error| match error {
            ClientError::Refused(refusal) => refusal,
            other => panic!("{other}"),
        })
    };
    assert_eq!(refused(cell.delete_volume(volume, false).await), busy);
    let shrink = |shrink| cell.resize_volume(volume, 4096, shrink);
    assert_eq!(refused(shrink(Shrink::Unused).await), busy);
    // The session is lost and comes again: it is attached as before.
    fake.end_all_sessions();
    let lost = runner.run(&unused, write(0, vec![2; 4096])).await;
    assert_eq!(lost, Err(DeviceError::Fenced));
    becomes(1).await;
    unused.set_in_use(false);
    becomes(0).await;
    shrink(Shrink::Unused).await.unwrap();
    unused.set_in_use(true);
    becomes(1).await;
    cell.delete_volume(volume, true).await.unwrap();
    assert_eq!(
        runner.run(&unused, DeviceRequest::Look).await,
        Err(DeviceError::Deleted)
    );
    assert_eq!(unused.fate(), Fate::Deleted);
}

#[tokio::test]
async fn a_device_that_nobody_uses_lives_on_after_its_session_was_lost() {
    let (fake, cell, device) = Fake::device().await;
    drop(device);
    let unused = cell.open_unused("v").await.unwrap().unwrap();
    let mut runner = Runner::new();
    assert_eq!(runner.run(&unused, write(0, vec![1; 4096])).await, DONE);
    fake.end_all_sessions();
    let lost = runner.run(&unused, write(0, vec![2; 4096])).await;
    assert_eq!(lost, Err(DeviceError::Fenced));
    for _ in 0..500 {
        if unused.fate() == Fate::Alive {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(runner.run(&unused, write(0, vec![3; 4096])).await, DONE);
    assert!(fake.sessions().iter().all(|it| it.volumes.is_empty()));
}

/// It is an answer: the client asks no more, and its connection stays.
#[tokio::test]
async fn a_refusal_that_is_not_known_is_one() {
    let (_fake, cell, _device) = Fake::device().await;
    let created = cell.create_volume(NEWER, 1 << 20, CHUNK_BYTES_DEFAULT);
    let error = created.await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "refused for a reason that this version does not know (code 200)"
    );
    cell.create_volume("other", 1 << 20, CHUNK_BYTES_DEFAULT)
        .await
        .unwrap();
}

#[tokio::test]
async fn session_ends_with_the_last_handle() {
    let (fake, cell, device) = Fake::device().await;
    drop(cell);
    let mut runner = Runner::new();
    assert_eq!(runner.run(&device, write(0, vec![1; 1])).await, DONE);
    drop(device);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if fake.sessions().is_empty() {
            return;
        }
    }
    panic!("the session lives on");
}

#[tokio::test]
async fn asking_needs_no_session() {
    let (fake, config) = Fake::start(3, None).await;
    let cell = Cell::connect(config);
    assert!(cell.volumes().await.unwrap().is_empty());
    let all = cell.status_all().await;
    let roles: Vec<_> = all
        .into_iter()
        .map(|(server, status)| (server.0, status.unwrap().role))
        .collect();
    assert_eq!(roles[0], (0, "leader".to_owned()));
    assert_eq!(roles[2], (2, "follower".to_owned()));
    cell.shutdown(ServerId(1)).await.unwrap();
    assert!(matches!(
        cell.status(ServerId(7)).await,
        Err(ServerError::NotListed)
    ));
    assert!(fake.sessions().is_empty());
}

#[tokio::test]
async fn the_nearest_server_answers_whether_it_leads_or_not() {
    let (fake, cell, _device) = Fake::device_on(3, |_| {}).await;
    fake.leader.store(NOBODY, Ordering::SeqCst);
    let nearest = cell.nearest();
    let names = async || match nearest.browse(Browse::Volumes).await {
        Ok(ReplyBody::Volumes(volumes)) => volumes.len(),
        other => panic!("{other:?}"),
    };
    let server = || nearest.server();
    assert_eq!(nearest.freshness().await, None);
    fake.slow.store(0, Ordering::SeqCst);
    assert_eq!(names().await, 1);
    let first = server().unwrap();
    assert_ne!(first, ServerId(0), "it is the slowest");
    let freshness = nearest.freshness().await.unwrap();
    assert_eq!(
        (freshness.server, freshness.behind_slots_max),
        (first, Some(0))
    );
    // What the answer lacked, it lacks still when the server has caught up.
    fake.applied.store(120, Ordering::SeqCst);
    let freshness = nearest.freshness().await.unwrap();
    assert_eq!(
        (freshness.applied, freshness.behind_slots_max),
        (100, Some(20))
    );
    // It stays with that one, slow as it may be now.
    fake.slow.store(first.0, Ordering::SeqCst);
    assert_eq!(names().await, 1);
    assert_eq!(server(), Some(first));
    // Until it has nothing to give.
    fake.incomplete.store(first.0, Ordering::SeqCst);
    assert_eq!(names().await, 1);
    assert_ne!(server(), Some(first));
    // What an earlier answer lacked, the whole lacks.
    assert_eq!(nearest.freshness().await, Some(freshness));
    // A connection that breaks is no reason for an error.
    fake.cut.send(()).unwrap();
    assert_eq!(names().await, 1);
    // What no server would do otherwise is not asked of all.
    let unknown = Browse::Directories {
        volume: VolumeId(9),
    };
    let refused = nearest.browse(unknown).await;
    assert!(
        matches!(refused, Err(ClientError::Reply(ReplyError::Invalid))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn unreachable_majority_is_described() {
    let (fake, mut config) = Fake::start(1, None).await;
    fake.leader.store(NOBODY, Ordering::SeqCst);
    // A port that nobody listens on.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    config
        .servers
        .push((ServerId(1), free.local_addr().unwrap()));
    drop(free);
    config.request_timeout = Duration::from_millis(300);
    let cell = Cell::connect(config);
    let Err(ClientError::Unavailable { answered, silent }) = cell.volumes().await else {
        panic!();
    };
    assert_eq!(answered, [ServerId(0)]);
    assert_eq!(silent[0].0, ServerId(1));
    assert!(
        cell.open("v")
            .await
            .is_err_and(|error| error == DeviceError::Unavailable)
    );
}

#[tokio::test]
async fn cell_key_is_needed_where_there_is_one() {
    let key = |byte| Some(CellKey::from_bytes([byte; 32]));
    let (_fake, config) = Fake::start(1, key(1)).await;
    let cell = Cell::connect(config.clone());
    cell.create_volume("v", 1 << 20, CHUNK_BYTES_DEFAULT)
        .await
        .unwrap();
    for other in [key(2), None] {
        let mut config = config.clone();
        config.key = other;
        let error = Cell::connect(config).status(ServerId(0)).await.unwrap_err();
        assert!(matches!(
            error,
            ServerError::Handshake(
                HandshakeError::Proof { .. } | HandshakeError::KeyMissing { .. }
            )
        ));
    }
}

#[test]
fn requests_after_the_runtime_is_gone_are_answered() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_fake, _cell, device) = runtime.block_on(Fake::device());
    drop(runtime);
    let mut runner = Runner::new();
    let cookie = runner.submit(&device, write(0, vec![1; 1]));
    let mut results = Vec::new();
    runner.queue.take(&mut results);
    assert_eq!(results, [(cookie, Err(DeviceError::Unavailable))]);
}

/// `cargo test --release -p pss-core cpu_of_a_write -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn cpu_of_a_write() {
    const REQUESTS: u64 = 200_000;
    let servers = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let client = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (_fake, config) = servers.block_on(Fake::start(1, None));
    let cpu = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let first = text.split(' ').next().unwrap();
        Duration::from_nanos(first.parse().unwrap())
    };
    client.block_on(async {
        let cell = Cell::connect(config);
        cell.create_volume("v", 64 << 20, CHUNK_BYTES_DEFAULT)
            .await
            .unwrap();
        let device = cell.open("v").await.unwrap().unwrap();
        let data = Bytes::from(vec![1; 4096]);
        for is_write in [true, false] {
            let mut runner = Runner::new();
            let (mut started, mut ended) = (0, 0);
            let (wall, before) = (Instant::now(), cpu());
            let mut results = Vec::new();
            while ended < REQUESTS {
                while started < REQUESTS && started - ended < 32 {
                    let offset_bytes = started * 7919 % 16384 * 4096;
                    let request = match is_write {
                        true => write(offset_bytes, data.clone()),
                        false => DeviceRequest::Read {
                            offset_bytes,
                            length_bytes: 4096,
                        },
                    };
                    runner.submit(&device, request);
                    started += 1;
                }
                runner.queue.take(&mut results);
                if results.is_empty() {
                    runner.wake.notified().await;
                }
                ended += results
                    .drain(..)
                    .filter(|(_, result)| result.is_ok())
                    .count() as u64;
            }
            let used = cpu() - before;
            println!(
                "write {is_write}: {:.2} us CPU each, {:.0} a second",
                used.as_secs_f64() * 1e6 / REQUESTS as f64,
                REQUESTS as f64 / wall.elapsed().as_secs_f64(),
            );
        }
    });
}

#[test]
fn uuids_are_of_version_four() {
    let uuid = random_uuid();
    assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (4, 2));
    assert_ne!(uuid, random_uuid());
}
