//! Digests and comparisons of what servers hold, with real files.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use pss_core::entry::block_checksum;
use pss_core::types::VolumeId;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use serde_json::Value;
use sha2::{Digest, Sha256};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
const CHUNK: usize = 64 << 10;
/// docs/formats.md, section 3.
const TABLE_HEADER: usize = 72;

/// The digest of a volume as docs/formats.md defines it.
fn digest(content: &[u8]) -> String {
    let hash = |parts: &[&[u8]]| -> Vec<u8> {
        let mut hash = Sha256::new();
        parts.iter().for_each(|part| hash.update(part));
        hash.finalize().to_vec()
    };
    let leaf = |block: &[u8]| {
        let mut whole = block.to_vec();
        whole.resize(BLOCK, 0);
        hash(&[&[0], &whole])
    };
    let mut nodes: Vec<Vec<u8>> = content.chunks(BLOCK).map(leaf).collect();
    // Stands for everything behind the end, on each level.
    let mut zeros = leaf(&[]);
    for _ in 0..40 {
        if nodes.len() % 2 == 1 {
            nodes.push(zeros.clone());
        }
        nodes = nodes
            .chunks(2)
            .map(|pair| hash(&[&[1], &pair[0], &pair[1]]))
            .collect();
        zeros = hash(&[&[1], &zeros, &zeros]);
    }
    assert_eq!(nodes.len(), 1);
    let size = (content.len() as u64).to_le_bytes();
    let root = hash(&[&[2], &size, &(BLOCK as u32).to_le_bytes(), &nodes[0]]);
    root.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Data, zeros and gaps.
fn pattern(size: usize) -> Vec<u8> {
    let mut content = vec![0; size];
    for (number, block) in content.chunks_mut(BLOCK).enumerate() {
        if number % 7 > 2 && number / 40 % 2 == 0 {
            block.fill(1 + (number % 251) as u8);
        }
    }
    content
}

fn request(client: &mut NbdClient, command: Command, offset: usize, length: usize, data: &[u8]) {
    let reply = client.request(command, offset as u64, length as u32, data);
    assert_eq!(reply.expect("the gateway serves").error, 0);
}

/// Writes what is not zero.
fn write(client: &mut NbdClient, content: &[u8]) {
    for (number, block) in content.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            request(client, Command::Write, number * BLOCK, block.len(), block);
        }
    }
}

fn json(cell: &Cell, arguments: &str) -> Value {
    let told = cell.bench.run("pss", &format!("{arguments} --json"));
    told.done();
    serde_json::from_str(&told.stdout()).expect("it is JSON")
}

/// Ends with that code and says that; it may have shown what it found.
#[track_caller]
fn ends(cell: &Cell, arguments: &str, code: i32, parts: &[&str]) {
    let told = cell.bench.run("pss", arguments);
    let stderr = told.stderr();
    assert_eq!(told.0.status.code(), Some(code), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no '{part}' in: {stderr}");
    }
}

fn digest_of(cell: &Cell, arguments: &str) -> String {
    let told = json(cell, &format!("volume digest v {arguments}"));
    told["digest"].as_str().expect("there is one").to_owned()
}

fn chunk_path(cell: &Cell, id: u8, block: usize) -> PathBuf {
    let chunk = block * BLOCK / CHUNK;
    let name = format!("00/{:02x}/{:02x}", chunk >> 8, chunk & 255);
    cell.chunks(id, "v").join(name)
}

/// What a server's file holds of a block.
fn stored(cell: &Cell, id: u8, block: usize) -> Vec<u8> {
    let bytes = fs::read(chunk_path(cell, id, block)).expect("it is there");
    bytes[block * BLOCK % CHUNK..][..BLOCK].to_vec()
}

/// Replaces a block of a stopped server, and its checksum in every table, as if the last write of it had been lost with them.
fn replace(cell: &Cell, id: u8, volume: VolumeId, block: usize, data: &[u8]) {
    let path = chunk_path(cell, id, block);
    let mut bytes = fs::read(&path).expect("it is there");
    let within = block % (CHUNK / BLOCK);
    bytes[within * BLOCK..][..BLOCK].copy_from_slice(data);
    let checksum = block_checksum(volume, block as u64, data).to_le_bytes();
    let used = TABLE_HEADER + 4 * CHUNK / BLOCK;
    for slot in bytes[CHUNK..].chunks_mut(BLOCK) {
        if slot[..8] != *b"PSSTABL1" {
            continue;
        }
        slot[TABLE_HEADER + 4 * within..][..4].copy_from_slice(&checksum);
        let crc = crc32c::crc32c(&slot[12..used]);
        slot[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    let file = OpenOptions::new().write(true).open(&path);
    file.expect("it is there")
        .write_all_at(&bytes, 0)
        .expect("it can be written");
}

/// Whether a checkpoint has put the table of a block's chunk into its file.
fn has_table(cell: &Cell, id: u8, block: usize) -> bool {
    let bytes = fs::read(chunk_path(cell, id, block)).unwrap_or_default();
    bytes.len() > CHUNK && bytes[CHUNK..].iter().any(|byte| *byte != 0)
}

const SMALL_LOG: &str = "--segment-size 8M --checkpoint-size 8M --log-retain 32M";

/// A cell whose volume holds [`pattern`].
fn written(mut layout: Layout, mib: usize, chunk: &str) -> (Cell, NbdClient) {
    layout.flags = SMALL_LOG.to_owned();
    let mut cell = Cell::started(layout, &format!("{mib}M --chunk-size {chunk}"));
    let mut client = cell.client(0);
    write(&mut client, &pattern(mib * MIB));
    cell.wait_current();
    (cell, client)
}

#[test]
fn volumes_of_equal_content_have_equal_digests_in_all_cells() {
    let content = pattern(6 * MIB);
    let expected = digest(&content);
    let (cell, mut client) = written(Layout::small(3), 6, "64K");
    for server in 0..3 {
        assert_eq!(digest_of(&cell, &format!("--server {server}")), expected);
    }
    let all = json(&cell, "volume digest v --all");
    assert_eq!(all["verdict"], "equal", "{all}");
    for server in all["servers"].as_array().expect("a list") {
        assert_eq!(server["digest"], *expected);
    }
    let text = cell.bench.run("pss", "volume digest v").done().stdout();
    assert_eq!(text, format!("{expected}  v\n"));

    // Zeros that were written, and chunks that were written and trimmed, are what was never written.
    let layout = Layout {
        learners: 1,
        ..Layout::small(1)
    };
    let (other, mut theirs) = written(layout, 6, "1M");
    request(
        &mut theirs,
        Command::Write,
        45 * BLOCK,
        BLOCK,
        &vec![0; BLOCK],
    );
    request(
        &mut theirs,
        Command::Write,
        5 * MIB + 300 * 1024,
        BLOCK,
        &vec![9; BLOCK],
    );
    assert_ne!(digest_of(&other, ""), expected);
    let at = (5 * MIB + 300 * 1024) / BLOCK;
    let back = &content[at * BLOCK..][..BLOCK];
    request(&mut theirs, Command::Write, at * BLOCK, BLOCK, back);
    assert_eq!(digest_of(&other, ""), expected);
    let all = json(&other, "volume digest v --all");
    assert_eq!(all["servers"][1]["digest"], *expected, "{all}");

    // Another size is another volume.
    other.bench.run("pss", "volume resize v +512").done();
    let longer = [content.as_slice(), &[0; 512]].concat();
    assert_eq!(digest_of(&other, ""), digest(&longer));
    // One block more.
    let mut changed = content;
    changed[41 * BLOCK..][..BLOCK].fill(3);
    request(&mut client, Command::Write, 41 * BLOCK, BLOCK, &[3; BLOCK]);
    assert_eq!(digest_of(&cell, ""), digest(&changed));
    // A follower says what it has applied.
    let changed = digest(&changed);
    wait_until("server 1 has it", PATIENCE, || {
        digest_of(&cell, "--server 1") == changed
    });
}

/// One moment, whatever is written meanwhile.
#[test]
fn digests_are_equal_while_the_volume_is_written_to() {
    let (cell, mut client) = written(Layout::small(3), 16, "64K");
    let stop = std::sync::atomic::AtomicBool::new(false);
    // Even if the test fails: the writer is waited for.
    struct Stop<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut number = 0_usize;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && number < 200_000 {
                number += 1;
                let block = number * 7919 % (16 * MIB / BLOCK);
                let data = vec![number as u8 | 1; BLOCK];
                request(&mut client, Command::Write, block * BLOCK, BLOCK, &data);
            }
        });
        let mut slots = Vec::new();
        for _ in 0..5 {
            let all = json(&cell, "volume digest v --all");
            assert_eq!(all["verdict"], "equal", "{all}");
            slots.push(all["slot"].as_u64());
        }
        assert!(slots.windows(2).all(|pair| pair[0] < pair[1]), "{slots:?}");
        let verified = json(&cell, "volume verify v");
        assert_eq!(verified["verdict"], "equal", "{verified}");
    });
}

#[test]
fn a_server_that_lost_writes_silently_is_found_and_repaired() {
    let layout = Layout {
        learners: 1,
        ..Layout::small(3)
    };
    let (mut cell, mut client) = written(layout, 24, "64K");
    // So much behind it that all of it is in a checkpoint, and no log puts it right at the next start.
    let content = [pattern(8 * MIB), vec![5; 16 * MIB]].concat();
    for _ in 0..2 {
        for number in 8..24 {
            let data = &content[number * MIB..][..MIB];
            request(&mut client, Command::Write, number * MIB, MIB, data);
        }
        wait_until("checkpoints are made", PATIENCE, || {
            [0, 1, 2, 5].into_iter().all(|id| has_table(&cell, id, 101))
        });
    }
    cell.wait_current();
    let expected = digest(&content);
    let volume = json(&cell, "volume show v")["id"]
        .as_u64()
        .expect("a number");
    let volume = VolumeId(volume as u32);
    let leader = cell.leader();
    // A follower and a learner, so that it can be compared with them stopped.
    let follower = (leader + 1) % 3;
    for id in [follower, 5] {
        cell.stop(id);
        for block in [3, 4, 101] {
            replace(&cell, id, volume, block, &[0xee; BLOCK]);
        }
        cell.start(id);
        cell.wait_current();
        ends(
            &cell,
            "volume digest v --all",
            8,
            &["the servers hold different data", "pss volume verify v"],
        );
        assert_ne!(digest_of(&cell, &format!("--server {id}")), expected);

        let text = cell.bench.run("pss", "volume verify v").done().stdout();
        for (chunk, line) in [
            (
                0,
                format!("of server {id} was not what the majority holds: 2 blocks were replaced."),
            ),
            (
                6,
                format!("of server {id} was not what the majority holds: 1 block was replaced."),
            ),
        ] {
            let line = format!("Chunk {chunk} (byte {}) {line}", thousands(chunk * CHUNK));
            assert!(text.contains(&line), "{text}");
        }
        let all = json(&cell, "volume digest v --all");
        assert_eq!(all["verdict"], "equal", "{all}");
        for block in [3, 4, 101] {
            assert!(stored(&cell, id, block) == content[block * BLOCK..][..BLOCK]);
        }
        let log = cell.servers[&id].text();
        let parts = [
            "ERROR",
            "it was replaced with the copy of server ",
            "volume=v",
            "chunk=0",
            "block=3",
        ];
        let is_it = |line: &str| parts.iter().all(|part| line.contains(part));
        assert!(log.lines().any(is_it), "{log}");
    }
    // What was repaired is on the disk.
    cell.stop(follower);
    assert!(cell.content(follower, "v", CHUNK, 24 * MIB) == content);
}

/// Nobody asks for anything, and nothing is read.
#[test]
fn what_was_lost_silently_is_found_in_the_background() {
    let mut layout = Layout::small(3);
    layout.flags = format!("{SMALL_LOG} --scrub-period 2s");
    let mut cell = Cell::started(layout, "2M --chunk-size 64K");
    let mut client = cell.client(0);
    let content = pattern(2 * MIB);
    write(&mut client, &content);
    // So much behind it that no log puts it right at the next start.
    for _ in 0..2 {
        for _ in 0..16 {
            request(&mut client, Command::Write, MIB, MIB, &content[MIB..]);
        }
        wait_until("checkpoints are made", PATIENCE, || {
            (0..3).all(|id| has_table(&cell, id, 20))
        });
    }
    cell.wait_current();
    let volume = json(&cell, "volume show v")["id"].as_u64();
    let volume = VolumeId(volume.expect("a number") as u32);
    let follower = (cell.leader() + 1) % 3;
    cell.stop(follower);
    let is_lost = |cell: &Cell| stored(cell, follower, 20) == [0xee; BLOCK];
    replace(&cell, follower, volume, 20, &[0xee; BLOCK]);
    cell.start(follower);
    cell.wait_current();
    wait_until("the block is replaced", PATIENCE, || !is_lost(&cell));
    assert!(stored(&cell, follower, 20) == content[20 * BLOCK..][..BLOCK]);
    let note = format!("Server {follower} held 1 blocks");
    wait_until("it is told, and the round ends", PATIENCE, || {
        let text = cell.bench.run("pss", "status").done().stdout();
        text.contains(&note) && text.contains("last done")
    });
    let json = json(&cell, "status");
    let status = &json["servers"][usize::from(cell.leader())]["status"]["scrub"];
    assert_eq!(status["period_s"], 2, "{json:#}");
    // A server that is started again goes on where it was.
    let path = cell.path(follower).join("scrub.json");
    wait_until("it is noted", PATIENCE, || path.exists());
}

fn thousands(number: usize) -> String {
    match number < 1000 {
        true => number.to_string(),
        false => format!("{},{:03}", number / 1000, number % 1000),
    }
}

#[test]
fn damaged_blocks_are_found_and_repaired_without_being_read() {
    let (cell, _client) = written(Layout::small(3), 8, "64K");
    wait_until("a checkpoint is made", PATIENCE, || {
        (0..3).all(|id| chunk_path(&cell, id, 3).exists())
    });
    for id in 0..3 {
        let file = OpenOptions::new()
            .write(true)
            .open(chunk_path(&cell, id, 3));
        let at = (3 + u64::from(id)) * BLOCK as u64 + 77;
        file.expect("it is there")
            .write_all_at(b"rot", at)
            .expect("it can be written");
    }
    let verified = json(&cell, "volume verify v");
    assert_eq!(verified["verdict"], "equal", "{verified}");
    for id in 0..3 {
        let server = &verified["servers"][id];
        assert_eq!(
            (&server["bad_blocks"], &server["repaired_blocks"]),
            (&1.into(), &1.into())
        );
    }
    assert_eq!(digest_of(&cell, ""), digest(&pattern(8 * MIB)));
    // The same block everywhere: nobody has it.
    for id in 0..3 {
        let file = OpenOptions::new()
            .write(true)
            .open(chunk_path(&cell, id, 3));
        let at = 3 * BLOCK as u64 + 99;
        file.expect("it is there")
            .write_all_at(b"rot", at)
            .expect("it can be written");
    }
    ends(
        &cell,
        "volume verify v",
        8,
        &["3 damaged blocks and 0 chunks that differ could not be repaired"],
    );
    ends(
        &cell,
        "volume digest v",
        1,
        &["has a damaged block, which could not be repaired yet"],
    );
}

#[test]
fn servers_that_are_away_are_named() {
    let (mut cell, _client) = written(Layout::small(3), 1, "64K");
    let away = (cell.leader() + 1) % 3;
    cell.kill(away);
    let part = format!("server {away}");
    ends(
        &cell,
        "volume digest v --all",
        1,
        &[&part, "was not compared"],
    );
    ends(&cell, "volume verify v", 1, &[&part, "does not answer"]);
    // Used wrongly.
    cell.bench
        .run("pss", "volume digest none")
        .fails(3, &["there is no volume none"]);
    cell.bench
        .run("pss", "volume verify none")
        .fails(3, &["there is no volume none"]);
    cell.bench
        .run("pss", "volume digest v --server 4")
        .fails(3, &["4"]);
    cell.bench
        .run("pss", "volume digest v --all --server 1")
        .fails(2, &["--all"]);
    cell.bench
        .run("pss", &format!("volume digest v --server {away}"))
        .fails(6, &[&part]);
}
