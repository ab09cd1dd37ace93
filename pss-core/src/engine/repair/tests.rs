use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::*;
use crate::chunk::ChunkParams;
use crate::disk::files::FileDisk;
use crate::engine::{ClientId, EngineConfig};
use crate::entry::{Command, Op, block_checksums};
use crate::paxos::quorum::Membership;
use crate::paxos::{Config, Recovered, RoleKind, Tuning};
use crate::state::State;
use crate::types::{Incarnation, RequestNumber, SessionId};
use crate::wire::client::{Browse, ReplyBody, Request, RequestBody};

pub(in crate::engine) const VOLUME: VolumeId = VolumeId(1);
const CHUNK_BYTES: u32 = 64 << 10;

/// A cell whose messages arrive at once, unless `loses` says otherwise.
pub(in crate::engine) struct Cell {
    pub(in crate::engine) directories: Vec<tempfile::TempDir>,
    pub(in crate::engine) engines: Vec<Engine>,
    pub(in crate::engine) now: Instant,
    pub(in crate::engine) messages: VecDeque<(ServerId, ServerId, Message)>,
    pub(in crate::engine) loses: fn(ServerId, ServerId, &Message) -> bool,
    /// What was sent, of the messages of repairs.
    pub(in crate::engine) sent: Vec<(ServerId, ServerId, SyncMessage)>,
    pub(in crate::engine) replies: BTreeMap<u64, Result<ReplyBody, ReplyError>>,
    /// Answers to reads of chunks are kept back.
    pub(in crate::engine) holds: bool,
    pub(in crate::engine) held: Vec<(usize, Export)>,
    pub(in crate::engine) checkpoints: u64,
    pub(in crate::engine) next: u64,
}

fn engine(directory: &tempfile::TempDir, id: u8, count: u8) -> Engine {
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let chunks = ChunkStore::open(disk, ChunkParams::default(), &[]).unwrap();
    let config = EngineConfig {
        replica: Config {
            id: ServerId(id),
            incarnation: Incarnation(0),
            members: Membership::new((0..count).map(ServerId)),
            tuning: Tuning::default(),
            seed: 1 + u64::from(id),
        },
        checkpoint_bytes: u64::MAX,
        checkpoint_interval: Duration::from_secs(1_000_000),
        checkpoint_chunks: usize::MAX,
        log_bytes_max: u64::MAX,
        apply_bytes: usize::MAX,
        reserve_bytes: 0,
        session_lease: Duration::from_secs(1_000_000),
    };
    let (recovered, state) = (Recovered::default(), State::default());
    Engine::new(config, recovered, state, Arc::new(chunks), Instant(0))
}

impl Cell {
    pub(in crate::engine) fn new(count: u8) -> Cell {
        let directories: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
        let ids = directories.iter().zip(0..);
        let engines = ids.map(|(it, id)| engine(it, id, count));
        let mut cell = Cell {
            engines: engines.collect(),
            directories,
            now: Instant(0),
            messages: VecDeque::new(),
            loses: |_, _, _| false,
            sent: Vec::new(),
            replies: BTreeMap::new(),
            holds: false,
            held: Vec::new(),
            checkpoints: 0,
            next: 0,
        };
        cell.pass(Duration::from_secs(3));
        let create = Op::CreateVolume {
            name: "vol".to_owned(),
            size_bytes: 1 << 20,
            chunk_bytes: CHUNK_BYTES,
            uuid: [1; 16],
        };
        cell.propose(create);
        cell
    }

    pub(in crate::engine) fn leader(&self) -> usize {
        let leads = |it: &Engine| it.replica().role() == RoleKind::Leader { serving: true };
        self.engines.iter().position(leads).expect("someone leads")
    }

    /// The leader's, then the others.
    pub(in crate::engine) fn order(&self) -> [usize; 3] {
        let leader = self.leader();
        [leader, (leader + 1) % 3, (leader + 2) % 3]
    }

    pub(in crate::engine) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += Duration::from_millis(10);
            for index in 0..self.engines.len() {
                if self.now >= self.engines[index].poll_timeout() {
                    self.engines[index].handle_timeout(self.now);
                }
            }
            self.settle();
        }
    }

    pub(in crate::engine) fn settle(&mut self) {
        loop {
            for index in 0..self.engines.len() {
                self.act(index);
            }
            let Some((from, to, message)) = self.messages.pop_front() else {
                return;
            };
            if !(self.loses)(from, to, &message) {
                let engine = &mut self.engines[usize::from(to.0)];
                engine.handle_message(self.now, from, Incarnation(0), message);
            }
        }
    }

    pub(in crate::engine) fn act(&mut self, index: usize) {
        let (now, id) = (self.now, ServerId(index as u8));
        let engine = &mut self.engines[index];
        loop {
            engine.finish_batch(now);
            let Some(action) = engine.poll_action() else {
                if engine.has_finished_reads() {
                    engine.finish_reads(now);
                } else if engine.has_chosen() {
                    engine.apply_chosen(now);
                } else {
                    return;
                }
                continue;
            };
            match action {
                Action::Send { to, message } => {
                    if let Message::Sync(sync) = &message {
                        self.sent.push((id, to, sync.clone()));
                    }
                    self.messages.push_back((id, to, message));
                }
                Action::Persist { write, .. } => engine.handle_persisted(now, write),
                Action::Reply { reply, .. } => _ = self.replies.insert(reply.tag, reply.body),
                Action::Read(read) => {
                    let result = read.run(&Arc::clone(&engine.chunks));
                    engine.handle_read(now, read, result);
                }
                Action::Checkpoint(checkpoint) => {
                    checkpoint.chunks.flush().unwrap();
                    engine.handle_checkpoint_done(checkpoint.applied.slot);
                    self.checkpoints += 1;
                }
                Action::Digest(job) => {
                    let part = job.run(&engine.chunks);
                    engine.handle_digested(now, job, part);
                }
                Action::Export(export) if self.holds => self.held.push((index, export)),
                Action::Export(export) => {
                    let exported = export.run(&Arc::clone(&engine.chunks));
                    engine.handle_exported(now, export, exported);
                }
                _ => {}
            }
        }
    }

    pub(in crate::engine) fn propose(&mut self, op: Op) {
        let leader = self.leader();
        let engine = &mut self.engines[leader];
        engine
            .replica
            .propose(vec![Command::internal(op)])
            .expect("it leads");
        // Until the others know that it is chosen.
        self.pass(Duration::from_millis(300));
    }

    pub(in crate::engine) fn write(&mut self, first_block: u64, value: u8, blocks: usize) {
        let payload = Bytes::from(vec![value; blocks * BLOCK_BYTES]);
        self.propose(Op::Write {
            volume: VOLUME,
            first_block,
            checksums: block_checksums(VOLUME, first_block, &payload),
            payload,
        });
    }

    pub(in crate::engine) fn ask(&mut self, index: usize, body: RequestBody) -> u64 {
        self.next += 1;
        let request = Request {
            tag: self.next,
            session: SessionId(0),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            body,
        };
        self.engines[index].handle_request(self.now, ClientId(1), request);
        self.settle();
        self.next
    }

    /// Reads a range at a server; the tag of the answer.
    pub(in crate::engine) fn read(
        &mut self,
        index: usize,
        first_block: u64,
        blocks: u64,
        stale: bool,
    ) -> u64 {
        let (offset_bytes, length_bytes) = (first_block * BLOCK, (blocks * BLOCK) as u32);
        let body = match stale {
            true => RequestBody::Browse {
                stale,
                what: Browse::Read {
                    volume: VOLUME,
                    offset_bytes,
                    length_bytes,
                },
            },
            false => RequestBody::Read {
                volume: VOLUME,
                offset_bytes,
                length_bytes,
            },
        };
        self.ask(index, body)
    }

    /// What was read, if it was answered.
    pub(in crate::engine) fn answer(&self, tag: u64) -> Option<Result<Vec<u8>, ReplyError>> {
        let answer = self.replies.get(&tag)?;
        Some(answer.clone().map(|body| {
            let ReplyBody::Data(parts) = body else {
                panic!("{body:?}");
            };
            let mut all = Vec::new();
            for part in parts {
                match part {
                    ReadPart::Data(data) => all.extend_from_slice(&data),
                    ReadPart::Hole(length) => all.resize(all.len() + length as usize, 0),
                }
            }
            all
        }))
    }

    pub(in crate::engine) fn path(&self, index: usize, chunk: u32) -> PathBuf {
        self.directories[index]
            .path()
            .join(format!("data/vol/00/00/{chunk:02x}"))
    }

    pub(in crate::engine) fn file(&self, index: usize, chunk: u32) -> File {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .open(self.path(index, chunk))
            .unwrap()
    }

    /// Changes a byte of a block.
    pub(in crate::engine) fn damage(&self, index: usize, block: u64) {
        let file = self.file(index, (block / 16) as u32);
        let at = block % 16 * BLOCK + 100;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }

    pub(in crate::engine) fn stored(&self, index: usize, block: u64) -> Vec<u8> {
        let mut data = vec![0; BLOCK_BYTES];
        let file = self.file(index, (block / 16) as u32);
        file.read_exact_at(&mut data, block % 16 * BLOCK).unwrap();
        data
    }

    pub(in crate::engine) fn counts(&self, index: usize) -> (u64, u64, u64) {
        let counts = self.engines[index].repairs();
        (counts.found, counts.repaired, counts.lost)
    }

    /// A server has made a checkpoint and reads its files anew, changed by `change`.
    pub(in crate::engine) fn reopen(&mut self, index: usize, change: impl FnOnce(&Cell)) {
        let checkpoint = self.engines[index].chunks.begin_checkpoint();
        checkpoint.unwrap().flush().unwrap();
        change(self);
        let elsewhere = tempfile::tempdir().unwrap();
        let open = |directory: &tempfile::TempDir, volumes: &[Volume]| {
            let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
            let chunks = ChunkStore::open(disk, ChunkParams::default(), volumes);
            Arc::new(chunks.unwrap())
        };
        let engine = &mut self.engines[index];
        let volumes: Vec<Volume> = engine.state.volumes().cloned().collect();
        // The old one lets go of the directory first.
        engine.chunks = open(&elsewhere, &[]);
        engine.chunks = open(&self.directories[index], &volumes);
    }
}

fn block(value: u8, blocks: usize) -> Vec<u8> {
    vec![value; blocks * BLOCK_BYTES]
}

#[test]
fn a_damaged_block_is_answered_with_anothers_copy_and_repaired() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 20);
    let [leader, ..] = cell.order();
    for bad in [3, 5, 17] {
        cell.damage(leader, bad);
    }
    let tag = cell.read(leader, 0, 20, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 20))));
    assert_eq!(cell.counts(leader), (3, 3, 0));
    for bad in [3, 5, 17] {
        assert_eq!(cell.stored(leader, bad), block(7, 1));
    }
    // All in one question.
    let asked =
        |it: &&(ServerId, ServerId, SyncMessage)| matches!(it.2, SyncMessage::RequestBlocks { .. });
    assert_eq!(cell.sent.iter().filter(asked).count(), 1);
    assert!(cell.engines[leader].repairs.tries.is_empty());
    let tag = cell.read(leader, 0, 20, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 20))));
    assert_eq!(cell.counts(leader), (3, 3, 0));
}

#[test]
fn a_copy_that_is_damaged_too_is_repaired_as_well() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, first, second] = cell.order();
    for server in [leader, first.min(second)] {
        cell.damage(server, 2);
    }
    let tag = cell.read(leader, 2, 1, false);
    cell.pass(Duration::from_millis(100));
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
    for server in [leader, first.min(second)] {
        assert_eq!(cell.stored(server, 2), block(7, 1));
        assert_eq!(cell.counts(server), (1, 1, 0));
    }
}

#[test]
fn a_block_that_is_damaged_everywhere_is_an_error_and_others_are_not() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let order = cell.order();
    for server in order {
        cell.damage(server, 2);
    }
    let tag = cell.read(order[0], 1, 3, false);
    cell.pass(Duration::from_millis(200));
    assert_eq!(cell.answer(tag), Some(Err(ReplyError::Io)), "at once");
    let tag = cell.read(order[0], 3, 1, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
    assert_eq!(cell.counts(order[0]), (1, 0, 1));
    // It is counted once, however often it is read.
    cell.read(order[0], 2, 1, false);
    cell.pass(Duration::from_millis(200));
    assert_eq!(cell.counts(order[0]).0, 1);
    // Written anew it is whole.
    cell.write(2, 8, 1);
    let tag = cell.read(order[0], 2, 1, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(8, 1))));
}

#[test]
fn without_an_answer_the_wait_ends() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, ..] = cell.order();
    cell.damage(leader, 2);
    cell.loses = |_, _, message| matches!(message, Message::Sync(_));
    let tag = cell.read(leader, 2, 1, false);
    cell.pass(PATIENCE - Duration::from_millis(200));
    assert_eq!(cell.answer(tag), None);
    cell.pass(Duration::from_millis(400));
    assert_eq!(cell.answer(tag), Some(Err(ReplyError::Io)));
    // Both were asked, again and again.
    let asked = |server: usize| {
        let to = ServerId(server as u8);
        cell.sent.iter().filter(|(_, it, _)| *it == to).count()
    };
    let [_, first, second] = cell.order();
    assert!(asked(first) > 2 && asked(second) > 2);
    cell.loses = |_, _, _| false;
    let tag = cell.read(leader, 2, 1, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
    assert!(cell.engines[leader].repairs.lost.is_empty());
}

#[test]
fn a_lost_answer_leads_to_the_next_server() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, first, second] = cell.order();
    cell.damage(leader, 2);
    // The one that is asked first says nothing.
    let silent = first.min(second);
    cell.loses = match silent {
        0 => |from, _, message| from.0 == 0 && matches!(message, Message::Sync(_)),
        1 => |from, _, message| from.0 == 1 && matches!(message, Message::Sync(_)),
        _ => |from, _, message| from.0 == 2 && matches!(message, Message::Sync(_)),
    };
    let tag = cell.read(leader, 2, 1, false);
    assert_eq!(cell.answer(tag), None);
    cell.pass(BLOCKS_TIMEOUT * 2);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
}

#[test]
fn a_write_meanwhile_wins() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, ..] = cell.order();
    cell.damage(leader, 2);
    cell.holds = true;
    let tag = cell.read(leader, 2, 1, false);
    assert_eq!(cell.held.len(), 1);
    // The other server reads the old block, and the answer comes after the write.
    let (index, export) = cell.held.pop().unwrap();
    let exported = export.run(&Arc::clone(&cell.engines[index].chunks));
    cell.write(2, 8, 1);
    cell.holds = false;
    let now = cell.now;
    cell.engines[index].handle_exported(now, export, exported);
    cell.settle();
    cell.pass(Duration::from_millis(300));
    assert_eq!(cell.answer(tag), Some(Ok(block(8, 1))));
    assert_eq!(cell.stored(leader, 2), block(8, 1));
}

/// As if from a server that lies, or is of another age: only what our own table says is taken.
#[test]
fn nothing_is_taken_but_what_the_table_says() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, other, _] = cell.order();
    cell.damage(leader, 2);
    cell.loses = |_, _, message| matches!(message, Message::Sync(_));
    let tag = cell.read(leader, 2, 1, false);
    let applied = cell.engines[leader].state.applied();
    let blocks = |as_of, block: u64, value: u8| {
        Message::Sync(SyncMessage::Blocks {
            as_of,
            volume: VOLUME,
            damaged: Vec::new(),
            blocks: vec![block],
            data: vec![value; BLOCK_BYTES].into(),
        })
    };
    let (now, from) = (cell.now, ServerId(other as u8));
    let mut tell =
        |message| cell.engines[leader].handle_message(now, from, Incarnation(0), message);
    tell(blocks(applied, 2, 8));
    tell(blocks(applied, 9, 7));
    tell(blocks(applied, u64::MAX, 7));
    // A server that lags: our table may be the one that is older than it should be.
    tell(blocks(Slot(applied.0 - 1), 2, 7));
    assert_eq!(cell.answer(tag), None);
    assert_eq!(cell.counts(leader), (1, 0, 0));
    let mut tell =
        |message| cell.engines[leader].handle_message(now, from, Incarnation(0), message);
    tell(blocks(applied, 2, 7));
    cell.settle();
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
    assert_eq!(cell.counts(leader), (1, 1, 0));
}

#[test]
fn who_lags_or_is_asked_too_much_refuses() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, other, _] = cell.order();
    let request = |at_least, blocks: Vec<u64>| SyncMessage::RequestBlocks {
        at_least,
        volume: VOLUME,
        blocks,
    };
    let applied = cell.engines[leader].state.applied();
    let now = cell.now;
    let ask = |cell: &mut Cell, message| {
        let from = ServerId(other as u8);
        cell.sent.clear();
        let message = Message::Sync(message);
        cell.engines[leader].handle_message(now, from, Incarnation(0), message);
        cell.settle();
        cell.sent.pop().map(|(_, _, answer)| answer)
    };
    let refused = Some(SyncMessage::BlocksRefused { volume: VOLUME });
    assert_eq!(
        ask(&mut cell, request(Slot(applied.0 + 1), vec![1])),
        refused
    );
    // Beyond the end.
    assert_eq!(ask(&mut cell, request(applied, vec![1, 256])), refused);
    assert_eq!(ask(&mut cell, request(applied, vec![u64::MAX])), refused);
    let given = ask(&mut cell, request(applied, vec![1, 200]));
    let Some(SyncMessage::Blocks { blocks, data, .. }) = given else {
        panic!("{given:?}");
    };
    assert_eq!((blocks, data), (vec![1], Bytes::from(block(7, 1))));
    cell.holds = true;
    for _ in 0..GIVING_MAX {
        assert_eq!(ask(&mut cell, request(applied, vec![1])), None);
    }
    assert_eq!(ask(&mut cell, request(applied, vec![1])), refused);
}

#[test]
fn followers_repair_what_they_show() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [_, follower, _] = cell.order();
    cell.damage(follower, 1);
    let tag = cell.read(follower, 0, 4, true);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 4))));
    assert_eq!(cell.stored(follower, 1), block(7, 1));
}

/// A part of a block is written: the rest comes from another server.
#[test]
fn parts_of_damaged_blocks_are_written() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 2);
    let [leader, ..] = cell.order();
    let opened = cell.ask(
        leader,
        RequestBody::OpenSession {
            nonce: 5,
            name: "a client".to_owned(),
            user: String::new(),
        },
    );
    cell.pass(Duration::from_millis(100));
    let Some(Ok(ReplyBody::Session(session))) = cell.replies.get(&opened).cloned() else {
        panic!("{:?}", cell.replies.get(&opened));
    };
    cell.damage(leader, 1);
    let data = Bytes::from(vec![9; 512]);
    let request = Request {
        tag: 1000,
        session,
        number: RequestNumber(1),
        settled_below: RequestNumber(1),
        body: RequestBody::Write {
            volume: VOLUME,
            offset_bytes: BLOCK + 512,
            checksums: vec![crc32c::crc32c(&data)],
            data,
        },
    };
    let now = cell.now;
    cell.engines[leader].handle_request(now, ClientId(1), request);
    cell.settle();
    cell.pass(Duration::from_millis(100));
    assert_eq!(cell.replies.get(&1000), Some(&Ok(ReplyBody::Done)));
    let mut expected = block(7, 1);
    expected[512..1024].fill(9);
    assert_eq!(cell.stored(leader, 1), expected);
}

/// A chunk whose tables are lost is put right by another server's chunk, blocks that were trimmed included, while it is
/// written to.
#[test]
fn lost_tables_are_replaced_block_by_block() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 6);
    cell.propose(Op::Zero {
        volume: VOLUME,
        first_block: 4,
        blocks: 1,
        allocate: false,
    });
    let [leader, follower, _] = cell.order();
    for server in [leader, follower] {
        cell.reopen(server, |cell| {
            let file = cell.file(server, 0);
            file.write_all_at(&[0x55; 2 * BLOCK_BYTES], u64::from(CHUNK_BYTES))
                .unwrap();
        });
    }
    cell.write(1, 8, 1);
    let order = cell.order();
    let expected = [
        block(7, 1),
        block(8, 1),
        block(7, 2),
        block(0, 1),
        block(7, 1),
        block(0, 2),
    ];
    for server in order {
        let tag = cell.read(server, 0, 8, true);
        cell.pass(Duration::from_secs(3));
        assert_eq!(
            cell.answer(tag),
            Some(Ok(expected.concat())),
            "server {server}"
        );
    }
    let all = ChunkIndex(0)..ChunkIndex(16);
    let statuses = cell.engines.iter().map(|it| {
        let volume = it.state.volume(VOLUME).unwrap();
        it.chunks.statuses(volume, all.clone(), 100, false).unwrap()
    });
    let statuses: Vec<_> = statuses.collect();
    assert!(
        statuses.windows(2).all(|two| two[0] == two[1]),
        "{statuses:?}"
    );
}

/// A write of the newest table was lost: the one before says what the blocks were, and nobody has that any more.
#[test]
fn a_table_that_is_too_old_is_found_out() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, ..] = cell.order();
    cell.engines[leader]
        .chunks
        .begin_checkpoint()
        .unwrap()
        .flush()
        .unwrap();
    cell.write(1, 8, 1);
    cell.engines[leader]
        .chunks
        .begin_checkpoint()
        .unwrap()
        .flush()
        .unwrap();
    let mut slots = vec![0; 2 * BLOCK_BYTES];
    cell.file(leader, 0)
        .read_exact_at(&mut slots, u64::from(CHUNK_BYTES))
        .unwrap();
    cell.write(2, 9, 1);
    cell.reopen(leader, |cell| {
        cell.file(leader, 0)
            .write_all_at(&slots, u64::from(CHUNK_BYTES))
            .unwrap();
    });
    let expected = [block(7, 1), block(8, 1), block(9, 1), block(7, 1)].concat();
    let tag = cell.read(leader, 0, 4, true);
    cell.pass(Duration::from_secs(2));
    assert_eq!(cell.answer(tag), Some(Ok(expected)));
    assert_eq!(cell.counts(leader), (1, 1, 0));
}

/// A chunk for a server that lags is refused and repaired; asked again, it is given.
#[test]
fn a_damaged_chunk_is_repaired_before_it_is_given() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, other, _] = cell.order();
    cell.damage(leader, 3);
    let (now, from) = (cell.now, ServerId(other as u8));
    let given = |it: &(ServerId, ServerId, SyncMessage)| {
        let large = |image: &Bytes| image.len() > 4 * BLOCK_BYTES;
        it.1 == from && matches!(&it.2, SyncMessage::Chunk { image, .. } if large(image))
    };
    for is_given in [false, true] {
        let request = SyncMessage::RequestChunk {
            at_least: Slot(1),
            volume: VOLUME,
            chunk: ChunkIndex(0),
        };
        let message = Message::Sync(request);
        cell.engines[leader].handle_message(now, from, Incarnation(0), message);
        cell.settle();
        assert_eq!(cell.sent.iter().any(given), is_given);
        assert_eq!(cell.counts(leader), (1, 1, 0));
    }
}

/// The first chunk as a server sends it that has applied `last_slot`: four blocks of a value.
fn image(cell: &Cell, value: u8, last_slot: Slot) -> Bytes {
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let chunks = ChunkStore::open(disk, ChunkParams::default(), &[]).unwrap();
    let volume = cell.engines[0].state.volume(VOLUME).unwrap();
    chunks.create_volume(volume).unwrap();
    let payload = Bytes::from(block(value, 4));
    let checksums = block_checksums(VOLUME, 0, &payload);
    chunks
        .write(volume, 0, &checksums, &payload, last_slot)
        .unwrap();
    chunks.export(volume, ChunkIndex(0)).unwrap()
}

fn chunk(as_of: Slot, image: Bytes) -> Message {
    Message::Sync(SyncMessage::Chunk {
        as_of,
        volume: VOLUME,
        chunk: ChunkIndex(0),
        image,
    })
}

/// What another server has applied and this one has not would be seen, and then undone by the entries in between.
#[test]
fn a_newer_chunk_waits_until_its_entries_are_applied() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, other, _] = cell.order();
    cell.reopen(leader, |cell| {
        let file = cell.file(leader, 0);
        file.write_all_at(&[0x55; 2 * BLOCK_BYTES], u64::from(CHUNK_BYTES))
            .unwrap();
    });
    cell.loses = |_, _, message| matches!(message, Message::Sync(_));
    let tag = cell.read(leader, 2, 1, true);
    let applied = cell.engines[leader].state.applied();
    let newer = chunk(applied, image(&cell, 8, applied.next()));
    let (now, from) = (cell.now, ServerId(other as u8));
    // From before the damage: what was written in between would be missing.
    let before = Slot(applied.0 - 1);
    let older = chunk(before, image(&cell, 6, before));
    cell.engines[leader].handle_message(now, from, Incarnation(0), older);
    cell.settle();
    assert_eq!(cell.answer(tag), None);
    cell.engines[leader].handle_message(now, from, Incarnation(0), newer);
    cell.pass(Duration::from_millis(200));
    assert_eq!(cell.answer(tag), None);
    // The entry that the other one had applied.
    cell.write(0, 8, 4);
    assert_eq!(cell.answer(tag), Some(Ok(block(8, 1))));
}

/// Our table has a checksum, and another server's chunk another: if the chunk was changed here since, that is no reason to
/// believe the other one.
#[test]
fn an_older_chunk_does_not_replace_what_is_known_here() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, other, _] = cell.order();
    cell.damage(leader, 2);
    cell.loses = |_, _, message| matches!(message, Message::Sync(_));
    let tag = cell.read(leader, 2, 1, false);
    let applied = cell.engines[leader].state.applied();
    let (now, from) = (cell.now, ServerId(other as u8));
    // It has something else, so that the whole chunk is asked for.
    let differs = Message::Sync(SyncMessage::Blocks {
        as_of: applied,
        volume: VOLUME,
        damaged: Vec::new(),
        blocks: vec![2],
        data: block(8, 1).into(),
    });
    cell.engines[leader].handle_message(now, from, Incarnation(0), differs);
    cell.write(3, 9, 1);
    cell.pass(BLOCKS_TIMEOUT);
    let older = chunk(applied, image(&cell, 8, applied));
    let now = cell.now;
    let is_asked = |cell: &Cell| {
        let questions = &cell.engines[leader].repairs.questions;
        questions.iter().any(|it| it.chunk == Some(ChunkIndex(0)))
    };
    assert!(is_asked(&cell));
    cell.engines[leader].handle_message(now, from, Incarnation(0), older);
    cell.settle();
    assert_eq!(cell.answer(tag), None);
    assert_ne!(cell.stored(leader, 2), block(8, 1));
    // What others say in truth.
    cell.loses = |_, _, _| false;
    cell.pass(Duration::from_secs(3));
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
}

#[test]
fn a_repair_is_made_durable_though_nothing_is_written() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, ..] = cell.order();
    cell.engines[leader].config.checkpoint_interval = Duration::from_secs(1);
    cell.pass(Duration::from_secs(5));
    let before = cell.checkpoints;
    cell.pass(Duration::from_secs(5));
    assert_eq!(cell.checkpoints, before);
    cell.damage(leader, 2);
    cell.read(leader, 2, 1, false);
    cell.pass(Duration::from_secs(5));
    assert_eq!(cell.checkpoints, before + 1);
}

#[test]
fn one_server_alone_says_so_at_once() {
    let mut cell = Cell::new(1);
    cell.write(0, 7, 4);
    cell.damage(0, 2);
    let tag = cell.read(0, 2, 1, false);
    assert_eq!(cell.answer(tag), Some(Err(ReplyError::Io)));
    let tag = cell.read(0, 3, 1, false);
    assert_eq!(cell.answer(tag), Some(Ok(block(7, 1))));
}

#[test]
fn a_new_leader_answers_whoever_waits() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 4);
    let [leader, ..] = cell.order();
    cell.damage(leader, 2);
    cell.loses = |_, _, message| matches!(message, Message::Sync(_));
    let tag = cell.read(leader, 2, 1, false);
    let now = cell.now;
    cell.engines[leader].hand_over(now);
    cell.settle();
    assert!(matches!(
        cell.answer(tag),
        Some(Err(ReplyError::NotLeader { .. }))
    ));
    cell.loses = |_, _, _| false;
    cell.pass(Duration::from_secs(3));
    assert!(cell.engines[leader].repairs.waiting.is_empty());
    assert!(cell.engines[leader].repairs.tries.is_empty());
    assert_eq!(cell.stored(leader, 2), block(7, 1));
}

#[test]
fn a_bad_disk_gives_up_if_the_others_can_do_without_it() {
    let mut cell = Cell::new(3);
    let [leader, other, _] = cell.order();
    let fill = |cell: &mut Cell, index: usize, count| {
        for _ in 0..count {
            let now = cell.now;
            cell.engines[index].repairs.trouble.note(now);
        }
    };
    fill(&mut cell, leader, BAD_BLOCKS_MAX - 1);
    cell.pass(Duration::from_secs(60));
    assert_eq!(cell.leader(), leader);
    assert_eq!(cell.engines[leader].gives_up(), None);
    fill(&mut cell, leader, 1);
    cell.pass(Duration::from_secs(2));
    assert_ne!(cell.leader(), leader, "it leads no more");
    assert_eq!(cell.engines[leader].gives_up(), None);
    cell.pass(GIVE_UP_AFTER * 4);
    assert_eq!(cell.engines[leader].gives_up(), Some(BAD_BLOCKS_MAX));
    // An hour later it would not have been too much.
    fill(&mut cell, other, BAD_BLOCKS_MAX - 1);
    cell.now += TROUBLE_PERIOD;
    cell.pass(Duration::from_secs(2));
    fill(&mut cell, other, 1);
    cell.pass(GIVE_UP_AFTER * 4);
    assert_eq!(cell.engines[other].gives_up(), None);
}

#[test]
fn a_bad_disk_goes_on_if_the_cell_needs_it() {
    let mut cell = Cell::new(1);
    for _ in 0..BAD_BLOCKS_MAX {
        cell.engines[0].repairs.trouble.note(Instant(1));
    }
    cell.pass(Duration::from_secs(60));
    assert_eq!(cell.engines[0].gives_up(), None);
    let mut cell = Cell::new(3);
    let [leader, ..] = cell.order();
    // The third one is away.
    cell.loses = match leader {
        0 => |from, to, _| from.0 == 1 || to.0 == 1,
        _ => |from, to, _| from.0 == 0 || to.0 == 0,
    };
    let now = cell.now;
    for _ in 0..BAD_BLOCKS_MAX {
        cell.engines[leader].repairs.trouble.note(now);
    }
    cell.pass(Duration::from_secs(60));
    assert_eq!(cell.engines[leader].gives_up(), None);
}
