//! Disks that rot: blocks and log records that are changed under servers, in their real files.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pss_core::engine::BAD_BLOCKS_MAX;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
const CHUNK: usize = 64 << 10;
const EIO: u32 = 5;

/// Every block something else.
fn pattern(size: usize) -> Vec<u8> {
    let block = |number: usize| {
        let mut bytes = vec![7; BLOCK];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    (0..size / BLOCK).flat_map(block).collect()
}

fn block(number: usize) -> Vec<u8> {
    pattern((number + 1) * BLOCK).split_off(number * BLOCK)
}

fn write_all(client: &mut NbdClient, data: &[u8]) {
    for (number, part) in data.chunks(MIB).enumerate() {
        let offset = (number * MIB) as u64;
        let reply = client.request(Command::Write, offset, part.len() as u32, part);
        assert_eq!(reply.expect("the gateway serves").error, 0);
    }
}

/// Data, or an error number.
fn read(client: &mut NbdClient, first: usize, blocks: usize) -> Result<Vec<u8>, u32> {
    let (offset, length) = ((first * BLOCK) as u64, (blocks * BLOCK) as u32);
    let reply = client.request(Command::Read, offset, length, &[]);
    let reply = reply.expect("the gateway serves");
    match reply.error {
        0 => Ok(reply.data),
        error => Err(error),
    }
}

fn chunk_path(cell: &Cell, id: u8, block: usize) -> PathBuf {
    let chunk = block * BLOCK / CHUNK;
    let name = format!("00/{:02x}/{:02x}", chunk >> 8, chunk & 255);
    cell.chunks(id, "v").join(name)
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.expect("it is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("it is as long");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).expect("it can be written");
}

fn damage(cell: &Cell, id: u8, block: usize) {
    let at = block * BLOCK % CHUNK + 1000;
    flip(&chunk_path(cell, id, block), at as u64);
}

/// What a server's file holds of a block.
fn stored(cell: &Cell, id: u8, block: usize) -> Vec<u8> {
    let bytes = fs::read(chunk_path(cell, id, block)).expect("it is there");
    bytes[block * BLOCK % CHUNK..][..BLOCK].to_vec()
}

/// Damaged blocks that a server has found, repaired, and given up.
fn counts(cell: &Cell, id: u8) -> (u64, u64, u64) {
    let mut counts = None;
    wait_until("the server says where it stands", PATIENCE, || {
        let status = cell.status();
        counts = status.and_then(|status| {
            let own = &status["servers"][usize::from(id)]["status"];
            let count = |name: &str| own[name].as_u64();
            Some((
                count("bad_blocks")?,
                count("repaired_blocks")?,
                count("lost_blocks")?,
            ))
        });
        counts.is_some()
    });
    counts.expect("it was waited for")
}

/// A cell whose volume of `mib` is written, and whose first third is in a checkpoint on all servers.
fn written(mib: usize) -> (Cell, NbdClient) {
    let mut layout = Layout::small(3);
    layout.flags = "--segment-size 8M --checkpoint-size 8M --log-retain 32M".to_owned();
    let mut cell = Cell::started(layout, &format!("{mib}M --chunk-size 64K"));
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(mib * MIB));
    cell.wait_current();
    let third = mib * MIB / BLOCK / 3;
    wait_until("a checkpoint is made", PATIENCE, || {
        let has_table = |id| {
            let bytes = fs::read(chunk_path(&cell, id, third)).unwrap_or_default();
            bytes.len() > CHUNK && bytes[CHUNK..].iter().any(|byte| *byte != 0)
        };
        (0..3).all(has_table)
    });
    (cell, client)
}

#[test]
fn damage_under_a_running_server_is_repaired() {
    let (cell, mut client) = written(24);
    let leader = cell.leader();
    for bad in [3, 5, 17] {
        damage(&cell, leader, bad);
    }
    let expected = pattern(MIB);
    assert!(read(&mut client, 0, MIB / BLOCK) == Ok(expected));
    for bad in [3, 5, 17] {
        assert!(stored(&cell, leader, bad) == block(bad), "block {bad}");
    }
    assert_eq!(counts(&cell, leader), (3, 3, 0));
    let log = cell.servers[&leader].text();
    let line = log.lines().find(|line| line.contains("was repaired"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    for part in ["WARN", "volume=v", "block=3", "byte=12288", "server "] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let status = cell.bench.run("pss", "status").done().stdout();
    let note =
        format!("Server {leader} has found 3 bad blocks since it was started, and repaired 3");
    assert!(status.contains(&note), "{status}");

    // The same block on two of three servers.
    let other = (leader + 1) % 3;
    for id in [leader, other] {
        damage(&cell, id, 40);
    }
    assert!(read(&mut client, 40, 1) == Ok(block(40)));
    wait_until("both copies are repaired", PATIENCE, || {
        stored(&cell, leader, 40) == block(40)
    });

    // On all three: an error for this block, and only for it, until it is written anew.
    for id in 0..3 {
        damage(&cell, id, 50);
    }
    assert_eq!(read(&mut client, 48, 4), Err(EIO));
    assert_eq!(read(&mut client, 50, 1), Err(EIO));
    assert!(read(&mut client, 49, 1) == Ok(block(49)));
    assert!(read(&mut client, 51, 1) == Ok(block(51)));
    assert_eq!(counts(&cell, leader).2, 2, "each time it was asked for");
    let log = cell.servers[&leader].text();
    assert!(
        log.contains("no server that answers has a good copy"),
        "{log}"
    );
    let reply = client.request(Command::Write, 50 * BLOCK as u64, BLOCK as u32, &block(51));
    assert_eq!(reply.expect("the gateway serves").error, 0);
    assert!(read(&mut client, 50, 1) == Ok(block(51)));
    // A part of a block is written: the rest of it comes from another server.
    damage(&cell, leader, 60);
    let reply = client.request(Command::Write, 60 * BLOCK as u64, 512, &[9; 512]);
    assert_eq!(reply.expect("the gateway serves").error, 0);
    let mut expected = block(60);
    expected[..512].fill(9);
    assert!(read(&mut client, 60, 1) == Ok(expected));
}

#[test]
fn damage_under_stopped_servers_is_repaired() {
    let (mut cell, client) = written(24);
    drop(client);
    for id in 0..3 {
        cell.stop(id);
    }
    // Of each block one copy is good; of chunk 4 two servers have lost all tables, and one of them a block more.
    for id in 0..3 {
        for bad in (0..60).filter(|bad| bad % 3 != usize::from(id)) {
            damage(&cell, id, bad);
        }
    }
    for id in [0, 1] {
        let path = chunk_path(&cell, id, 64);
        for slot in [0, 1] {
            flip(&path, (CHUNK + slot * BLOCK + 80) as u64);
        }
    }
    damage(&cell, 0, 66);
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    cell.gateways.clear();
    cell.start_gateway(0);
    let mut client = cell.client(0);
    assert!(read(&mut client, 0, MIB / BLOCK) == Ok(pattern(MIB)));
    let leader = cell.leader();
    for good in 0..80 {
        assert!(stored(&cell, leader, good) == block(good), "block {good}");
    }
    let (found, repaired, lost) = counts(&cell, leader);
    assert!(found >= 40 && repaired == found, "{found} {repaired}");
    assert_eq!(lost, 0);
    // It is durable: the server finds nothing after a restart.
    drop(client);
    for id in 0..3 {
        cell.stop(id);
    }
    let content = cell.content(leader, "v", CHUNK, 24 * MIB);
    assert!(content == pattern(24 * MIB));
}

/// A record of the log that rots below what was durable is not taken for one that was never written: it comes back from the
/// others.
#[test]
fn a_damaged_log_record_comes_from_the_others() {
    // No checkpoint covers it.
    let mut layout = Layout::small(3);
    layout.flags = "--segment-size 64M --checkpoint-size 512M --log-retain 64M".to_owned();
    let mut cell = Cell::started(layout, "8M --chunk-size 64K");
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(8 * MIB));
    cell.wait_current();
    let victim = (cell.leader() + 1) % 3;
    cell.kill(victim);
    // What was written to the chunks is lost with the power, as it were: the log alone has it.
    let wanted = block(700);
    let log = cell.path(victim).join("log");
    let segments = fs::read_dir(log).expect("it is there");
    let mut hits = 0;
    for segment in segments {
        let path = segment.expect("it can be listed").path();
        let bytes = fs::read(&path).expect("it can be read");
        let mut places = bytes.chunks(BLOCK).enumerate();
        if let Some((at, _)) = places.find(|(_, bytes)| *bytes == wanted) {
            flip(&path, (at * BLOCK + 99) as u64);
            hits += 1;
        }
    }
    assert_eq!(hits, 1, "the record is in one segment");
    for bad in [699, 700, 701] {
        damage(&cell, victim, bad);
    }
    cell.start(victim);
    cell.wait_current();
    assert!(read(&mut client, 512, 256) == Ok(pattern(8 * MIB)[2 * MIB..3 * MIB].to_vec()));
    drop(client);
    for id in 0..3 {
        cell.stop(id);
    }
    let content = cell.content(victim, "v", CHUNK, 8 * MIB);
    assert!(
        content == pattern(8 * MIB),
        "the copy of server {victim} differs"
    );
}

/// So many damaged blocks that the disk cannot be trusted: the server leads no more, and stops as the others can do without it.
#[test]
fn a_disk_with_many_damaged_blocks_is_given_up() {
    let (mut cell, mut client) = written(48);
    let bad = cell.leader();
    for block in 0..BAD_BLOCKS_MAX + 64 {
        damage(&cell, bad, block);
    }
    for part in 0..9 {
        let first = part * MIB / BLOCK;
        let expected = pattern((part + 1) * MIB).split_off(part * MIB);
        assert!(
            read(&mut client, first, MIB / BLOCK) == Ok(expected),
            "{part}"
        );
    }
    let server = cell.servers.get_mut(&bad).expect("it was started");
    assert_eq!(server.ends(PATIENCE), Some(1), "{}", server.text());
    let log = server.text();
    let path = cell.path(bad).display().to_string();
    let told = [
        "damaged blocks were found within an hour, so this server stops",
        "'pssd format --replace'",
        &path,
    ];
    for part in told {
        assert!(log.contains(part), "{part}: {log}");
    }
    cell.servers.remove(&bad);
    assert!(read(&mut client, 0, 1) == Ok(block(0)));
    cell.bench
        .run("pssd", &format!("format --id {bad} --replace --force"))
        .done();
}
