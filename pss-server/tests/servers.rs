//! Real servers on real sockets and files: elections, restarts, catching up, bad input, failing disks.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pss_core::client::{Cell, CellConfig, ClientError};
use pss_core::key::{CellId, CellKey};
use pss_core::servers::Servers;
use pss_core::state::Refusal;
use pss_core::types::ServerId;
use pss_core::volume::device::{DeviceReply, DeviceRequest, ReadPart};
use pss_core::wire::client::{ReplyBody, RequestBody};
use pss_server::node::Server;
use support::failing::{FailingDisk, Failures};
use support::{TestCell, pattern, small};

const BLOCK: u64 = 4096;

#[test]
fn a_cell_elects_writes_and_reads() {
    let cell = TestCell::started(3, small());
    let client = cell.client();
    client.create("vol001", 64 << 20);
    let volume = client.open("vol001");
    for block in 0..50 {
        volume.write(block * BLOCK, &pattern(block, 1));
    }
    volume.write(100_000, b"in the middle of a block");
    for block in 0..50 {
        if block != 100_000 / BLOCK {
            assert_eq!(volume.read(block * BLOCK, 4096), pattern(block, 1));
        }
    }
    assert_eq!(volume.read(100_000, 24), b"in the middle of a block");
    assert_eq!(volume.read(40 << 20, 1 << 20), vec![0; 1 << 20]);
    let zeroes = DeviceRequest::WriteZeroes {
        offset_bytes: 0,
        length_bytes: 10 * BLOCK,
        allocate: false,
        fua: false,
    };
    assert_eq!(volume.request(zeroes), Ok(DeviceReply::Done));
    assert_eq!(volume.read(9 * BLOCK, 8192)[..4096], [0; 4096]);
    assert_eq!(volume.read(9 * BLOCK, 8192)[4096..], pattern(10, 1));
    let status = cell.status(cell.leader());
    assert_eq!(status.cell, cell.id.to_string());
    assert_eq!(status.pid, std::process::id());
    assert_eq!(status.clients, 1);
    assert!(status.total_bytes > status.free_bytes && status.free_bytes > 0);
    assert_eq!(status.peers.iter().filter(|peer| peer.alive).count(), 2);
}

/// The rest of a block behind a new end would come back when the volume grows again.
#[test]
fn a_volume_does_not_become_smaller_within_a_block() {
    let cell = TestCell::started(1, small());
    let client = cell.client();
    client.create("v", 1 << 20);
    let volume = client.open("v");
    volume.write(0, &pattern(0, 9));
    let resize = |size_bytes| client.resize("v", size_bytes);
    for size_bytes in [512, 4096 + 512, (1 << 20) - 512] {
        let refused = resize(size_bytes).unwrap_err();
        let is_right = matches!(refused, ClientError::Refused(Refusal::EndWithinBlock));
        assert!(is_right, "{size_bytes}: {refused}");
    }
    assert_eq!(volume.read(0, 4096), pattern(0, 9));
    for size_bytes in [(1 << 20) + 512, 1 << 20, 4096] {
        resize(size_bytes).unwrap();
    }
}

#[test]
fn one_server_alone_works() {
    let mut cell = TestCell::started(1, small());
    {
        let client = cell.client();
        client.create("v", 1 << 20);
        client.open("v").write(0, &pattern(0, 9));
    }
    cell.stop(0);
    cell.start(0);
    assert_eq!(cell.client().open("v").read(0, 4096), pattern(0, 9));
}

#[test]
fn a_killed_leader_is_replaced_and_catches_up() {
    let mut cell = TestCell::started(3, small());
    let client = cell.client();
    client.create("v", 64 << 20);
    let volume = client.open("v");
    let mut version = 0;
    for _ in 0..3 {
        version += 1;
        for block in 0..100 {
            volume.write(block * BLOCK, &pattern(block, version));
        }
        let leader = cell.leader();
        cell.kill(leader);
        let start = Instant::now();
        volume.write(0, &pattern(0, version));
        println!(
            "first write after the leader was killed: {:?}",
            start.elapsed()
        );
        for block in 100..200 {
            volume.write(block * BLOCK, &pattern(block, version));
        }
        for block in 0..200 {
            assert_eq!(volume.read(block * BLOCK, 4096), pattern(block, version));
        }
        cell.start(leader);
        cell.wait_caught_up(leader);
    }
}

#[test]
fn a_cell_that_is_killed_forgets_nothing() {
    let mut cell = TestCell::started(3, small());
    {
        let client = cell.client();
        client.create("v", 64 << 20);
        let volume = client.open("v");
        for block in 0..300 {
            volume.write(block * BLOCK, &pattern(block, 5));
        }
    }
    for id in 0..3 {
        cell.kill(id);
    }
    for id in 0..3 {
        cell.start(id);
    }
    let client = cell.client();
    let volume = client.open("v");
    for block in 0..300 {
        assert_eq!(volume.read(block * BLOCK, 4096), pattern(block, 5));
    }
}

#[test]
fn a_server_that_missed_the_log_copies_chunks() {
    let tuning = pss_server::config::Tuning {
        log_retain_bytes: 0,
        ..small()
    };
    let mut cell = TestCell::started(3, tuning);
    let client = cell.client();
    client.create("v", 256 << 20);
    let volume = client.open("v");
    volume.write(0, &pattern(0, 1));
    let away = (0..3).find(|id| *id != cell.leader()).unwrap();
    cell.wait_caught_up(away);
    cell.kill(away);
    let big = |piece: u64, version: u64| -> Vec<u8> {
        (0..64)
            .flat_map(|block| pattern(piece * 64 + block, version))
            .collect()
    };
    // Several segments, so that those that hold what the server misses are recycled.
    for version in 2..4 {
        for piece in 0..160 {
            volume.write(piece * 64 * BLOCK, &big(piece, version));
        }
    }
    let missed = cell.status(cell.leader()).applied;
    cell.wait_for("a short log", |cell| {
        cell.running
            .keys()
            .all(|id| cell.status(*id).log_first > 10)
    });
    cell.start(away);
    cell.wait_for("chunks to be copied", |cell| {
        cell.status(away).applied >= missed
    });
    volume.write(0, &pattern(0, 77));
    cell.wait_caught_up(away);
    assert!(
        cell.status(away).log_first > 10,
        "it was not fed from the log"
    );
    // With one of the others away, what the copied server has decides.
    let other = (0..3)
        .find(|id| *id != away && *id != cell.leader())
        .unwrap();
    cell.kill(other);
    volume.write(BLOCK, &pattern(1, 78));
    let leader = cell.leader();
    if leader != away {
        cell.stop(leader);
        cell.start(other);
    }
    assert_eq!(volume.read(0, 4096), pattern(0, 77));
    assert_eq!(volume.read(BLOCK, 4096), pattern(1, 78));
    for piece in 1..160 {
        assert!(
            volume.read(piece * 64 * BLOCK, 64 * 4096) == big(piece, 3),
            "piece {piece}"
        );
    }
}

#[test]
fn a_clean_stop_hands_over() {
    let mut cell = TestCell::started(3, small());
    let client = cell.client();
    client.create("v", 64 << 20);
    let volume = client.open("v");
    volume.write(0, &pattern(0, 0));
    let leader = cell.leader();
    let all: Vec<u8> = (0..3).filter(|id| *id != leader).collect();
    for id in &all {
        cell.wait_caught_up(*id);
    }
    let writing = volume.clone();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        let mut version = 0;
        while stopped.try_recv().is_err() {
            version += 1;
            let start = Instant::now();
            writing.write(0, &pattern(0, version));
            longest = longest.max(start.elapsed());
        }
        (version, longest)
    });
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    cell.stop(leader);
    println!("clean stop of the leader: {:?}", start.elapsed());
    std::thread::sleep(Duration::from_millis(300));
    stop.send(()).unwrap();
    let (version, longest) = writer.join().unwrap();
    println!("{version} writes, longest {longest:?}");
    assert_eq!(volume.read(0, 4096), pattern(0, version));
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_client_can_stop_a_server() {
    let mut cell = TestCell::started(3, small());
    let client = cell.client().cell;
    cell.wait_all_count();
    let leader = cell.leader();
    cell.runtime
        .block_on(client.shutdown(ServerId(leader)))
        .unwrap();
    cell.running.remove(&leader).unwrap().wait().unwrap();
    assert_ne!(cell.leader(), leader);
}

/// Starts servers 0 and 1 on plain disks and server 2 on one that can fail.
fn with_failing_disk() -> (TestCell, Arc<Failures>) {
    let mut cell = TestCell::new(3, small());
    cell.start(0);
    cell.start(1);
    let failures = Arc::new(Failures::default());
    let disk = FailingDisk {
        disk: cell.disk(2),
        failures: Arc::clone(&failures),
    };
    let handle = Server::start_with_disk(cell.config(2), Arc::new(disk)).unwrap();
    cell.running.insert(2, handle);
    (cell, failures)
}

#[test]
fn a_failing_log_stops_the_server() {
    let (mut cell, failures) = with_failing_disk();
    let client = cell.client();
    client.create("v", 1 << 20);
    let volume = client.open("v");
    volume.write(0, &pattern(0, 1));
    cell.wait_caught_up(2);
    failures.direct_writes.store(true, Ordering::Relaxed);
    let failed = cell.running.remove(&2).unwrap();
    for version in 0..20 {
        volume.write(0, &pattern(0, version));
    }
    let error = failed.wait().unwrap_err().to_string();
    assert!(error.contains("the log cannot be written"), "{error}");
    assert!(error.contains("os error 5"), "{error}");
    assert!(failed.status().is_none());
    // The log behind the last durable entry is torn or whole; either way it starts again.
    cell.start(2);
    cell.wait_caught_up(2);
    assert_eq!(volume.read(0, 4096), pattern(0, 19));
}

#[test]
fn a_failing_sync_of_chunks_stops_the_server() {
    let (mut cell, failures) = with_failing_disk();
    let client = cell.client();
    client.create("v", 1 << 20);
    let volume = client.open("v");
    failures.syncs.store(true, Ordering::Relaxed);
    let failed = cell.running.remove(&2).unwrap();
    volume.write(0, &pattern(0, 7));
    let error = failed.wait().unwrap_err().to_string();
    assert!(error.contains("so this server stops"), "{error}");
    cell.start(2);
    cell.wait_caught_up(2);
    assert_eq!(volume.read(0, 4096), pattern(0, 7));
}

/// How often a server has stored a checkpoint.
fn checkpoints(cell: &TestCell, id: u8) -> u64 {
    let bytes = std::fs::read(cell.path(id).join("checkpoint.0")).unwrap();
    u64::from_le_bytes(bytes[16..24].try_into().unwrap())
}

/// To remove the files of a deleted volume holds up neither checkpoints nor a stop, and goes on after the
/// next start.
#[test]
fn deleted_files_are_removed_beside_everything_else() {
    const CHUNKS: u64 = 200;
    let (mut cell, failures) = with_failing_disk();
    let client = cell.client();
    client.create("old", CHUNKS << 20);
    client.create("v", 1 << 20);
    let old = client.open("old");
    for chunk in 0..CHUNKS {
        old.write(chunk << 20, &pattern(chunk, 1));
    }
    drop(old);
    cell.wait_caught_up(2);
    failures.slow_removals.store(true, Ordering::Relaxed);
    client.delete("old");
    let removed = || failures.removed.load(Ordering::Relaxed);
    cell.wait_for("the first files to be removed", |_| removed() > 0);
    let before = checkpoints(&cell, 2);
    let volume = client.open("v");
    volume.write(0, &pattern(0, 2));
    cell.wait_for("a checkpoint", |cell| checkpoints(cell, 2) > before);
    assert!(removed() < CHUNKS, "the checkpoint waited for all files");
    cell.stop(2);
    assert!(removed() < CHUNKS, "the stop waited for all files");
    let trash = cell.path(2).join("trash");
    let left = || std::fs::read_dir(&trash).unwrap().count();
    assert_eq!(left(), 1);
    cell.start(2);
    cell.wait_for("the rest to be removed", |_| left() == 0);
    cell.wait_caught_up(2);
    assert_eq!(volume.read(0, 4096), pattern(0, 2));
}

#[test]
fn strangers_are_refused() {
    let mut cell = TestCell::started(3, small());
    cell.client().create("v", 1 << 20);
    let refused = |config: CellConfig| {
        let client = {
            let _inside = cell.runtime.enter();
            Cell::connect(config)
        };
        let status = cell.runtime.block_on(client.status(ServerId(0)));
        status.unwrap_err().to_string()
    };
    let other_key = Some(CellKey::from_bytes([8; 32]));
    let message = refused(CellConfig {
        key: other_key.clone(),
        ..cell.client_config()
    });
    assert!(message.contains("another cell key"), "{message}");
    let message = refused(CellConfig {
        key: None,
        ..cell.client_config()
    });
    assert!(message.contains("asks for the cell key"), "{message}");
    // A server with the wrong key, or of another cell, takes no part. The others go on.
    let foreign = cell
        .running
        .keys()
        .copied()
        .find(|id| Some(*id) != cell.leader_now())
        .unwrap();
    cell.kill(foreign);
    let right = cell.key.take();
    cell.key = other_key;
    cell.start(foreign);
    std::thread::sleep(Duration::from_secs(1));
    let status = cell.status(foreign);
    assert!(
        status.leader.is_none() && status.peers.iter().all(|peer| !peer.alive),
        "{status:?}"
    );
    cell.key = right;
    cell.client().open("v").write(0, &pattern(0, 1));
    cell.kill(foreign);
    cell.start(foreign);
    cell.wait_caught_up(foreign);
}

#[test]
fn a_directory_of_another_cell_is_refused() {
    let mut cell = TestCell::new(1, small());
    cell.id = CellId([4; 16]);
    let error = cell.try_start(0).err().unwrap().to_string();
    assert!(error.contains("another cell"), "{error}");
    cell.id = CellId([3; 16]);
    cell.start(0);
    let error = cell.try_start(0).err().unwrap().to_string();
    assert!(error.contains("data directory"), "{error}");
}

#[test]
fn a_directory_that_is_not_formatted_is_refused() {
    let cell = TestCell::new(1, small());
    let mut config = cell.config(0);
    config.path = cell.path(7);
    let error = Server::start(config.clone()).err().unwrap().to_string();
    assert!(
        error.contains("/7: cannot use the data directory"),
        "{error}"
    );
    std::fs::create_dir(&config.path).unwrap();
    let error = Server::start(config).err().unwrap().to_string();
    assert!(error.contains("not formatted"), "{error}");
}

/// A sync of the directory's file system would leave out what is on another one.
#[test]
fn a_directory_over_several_file_systems_is_refused() {
    let cell = TestCell::new(1, small());
    let trash = cell.path(0).join("trash");
    std::os::unix::fs::symlink("/proc", &trash).unwrap();
    let error = cell.try_start(0).err().unwrap().to_string();
    let named = format!("{} is not on the same", trash.display());
    assert!(error.contains(&named), "{error}");
    assert!(error.contains("on that file system"), "{error}");
}

#[test]
fn taken_ports_are_named() {
    let mut cell = TestCell::new(1, small());
    let taken = TcpListener::bind(cell.tcp(0)).unwrap();
    let error = cell.try_start(0).err().unwrap().to_string();
    assert!(error.contains(&format!("TCP {}", cell.tcp(0))), "{error}");
    drop(taken);
    let taken = UdpSocket::bind(cell.udp(0)).unwrap();
    let error = cell.try_start(0).err().unwrap().to_string();
    assert!(error.contains(&format!("UDP {}", cell.udp(0))), "{error}");
    drop(taken);
    cell.start(0);
}

#[test]
fn without_a_key_only_loopback() {
    let mut cell = TestCell::new(1, small());
    cell.key = None;
    cell.servers = Servers::new([(ServerId(0), [192, 0, 2, 1].into())]);
    let error = cell.try_start(0).err().unwrap().to_string();
    assert!(
        error.contains("192.0.2.1:4010") && error.contains("pss key new"),
        "{error}"
    );
}

#[test]
fn a_cell_without_a_key_works() {
    let mut cell = TestCell::new(3, small());
    cell.key = None;
    for id in 0..3 {
        cell.start(id);
    }
    let client = cell.client();
    client.create("v", 1 << 20);
    client.open("v").write(0, &pattern(0, 3));
    assert_eq!(client.open("v").read(0, 4096), pattern(0, 3));
}

#[test]
fn garbage_does_no_harm() {
    let cell = TestCell::started(3, small());
    let client = cell.client();
    client.create("v", 1 << 20);
    let volume = client.open("v");
    let leader = cell.leader();
    let ballot = cell.status(leader).ballot;
    let noise = UdpSocket::bind((cell.udp(0).ip(), 0)).unwrap();
    let mut seed = 1_u64;
    let mut bytes = |count: usize| -> Vec<u8> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        };
        (0..count).map(|_| next()).collect()
    };
    for round in 0..60 {
        for id in 0..3 {
            for length in [0, 1, 51, 52, 100, 1400, 9000] {
                let mut datagram = bytes(length);
                if round % 2 == 0 && length > 8 {
                    datagram[..6].copy_from_slice(b"PSSD\x01\x01");
                }
                let _ = noise.send_to(&datagram, cell.udp(id));
            }
            let mut caller = TcpStream::connect(cell.tcp(id)).unwrap();
            let mut said = bytes(200);
            if round % 2 == 0 {
                said[..5].copy_from_slice(b"PSSF\x01");
                // Announces a header and a payload of gigabytes.
                said[8..16].fill(0xff);
            }
            let _ = caller.write_all(&said);
            if round % 3 == 0 {
                // The server ends the connection, whatever it says to that.
                caller.set_read_timeout(Some(support::PATIENCE)).unwrap();
                let _ = caller.read_to_end(&mut Vec::new());
            }
        }
        volume.write(0, &pattern(0, round));
        assert_eq!(volume.read(0, 4096), pattern(0, round));
    }
    assert_eq!(cell.status(leader).ballot, ballot, "nobody had to elect");
    assert_eq!(cell.status(leader).clients, 1);
}

#[test]
fn a_client_that_does_not_read_is_held_up_alone() {
    let cell = TestCell::started(1, small());
    let client = cell.client();
    client.create("v", 64 << 20);
    let volume = client.open("v");
    for piece in 0..64 {
        volume.write(piece << 20, &vec![piece as u8 + 1; 1 << 20]);
    }
    let id = cell.runtime.block_on(client.cell.volumes()).unwrap()[0]
        .volume
        .id;
    // Asks for 4 GiB and reads none of it.
    let mut greedy = support::raw::connect(&cell, 0);
    greedy
        .stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    for tag in 0..4096 {
        let body = RequestBody::Read {
            volume: id,
            offset_bytes: (tag % 64) << 20,
            length_bytes: 1 << 20,
        };
        greedy.queue(tag, body);
    }
    let _ = greedy.send();
    let start = Instant::now();
    for block in 0..100 {
        volume.write(block * BLOCK, &pattern(block, 1));
        assert_eq!(volume.read(block * BLOCK, 4096), pattern(block, 1));
    }
    assert!(start.elapsed() < support::PATIENCE);
    assert!(
        support::resident_bytes() < 1 << 30,
        "{}",
        support::resident_bytes()
    );
    // When it reads, it gets everything.
    let sender = greedy.send_rest();
    for _ in 0..4096 {
        let reply = greedy.reply();
        let piece = reply.tag % 64;
        if piece != 0 {
            assert_eq!(
                reply.body,
                Ok(ReplyBody::Data(vec![ReadPart::Data(
                    vec![piece as u8 + 1; 1 << 20].into(),
                )]))
            );
        }
    }
    sender.join().unwrap();
}

#[test]
fn a_learner_learns_and_does_not_count() {
    let mut cell = TestCell::with_ids(&[0, 1, 2, 5], small());
    for id in [0, 1, 5] {
        cell.start(id);
    }
    let client = cell.client();
    client.create("v", 16 << 20);
    let volume = client.open("v");
    for block in 0..100 {
        volume.write(block * BLOCK, &pattern(block, 1));
    }
    cell.wait_caught_up(5);
    assert_eq!(cell.status(5).role, "learner");
    // One core server and the learner are no majority.
    let other = (0..2).find(|id| *id != cell.leader()).unwrap();
    cell.kill(other);
    let write = DeviceRequest::Write {
        offset_bytes: 0,
        data: pattern(0, 2).into(),
        fua: true,
    };
    let writing = {
        let volume = volume.clone();
        std::thread::spawn(move || volume.request(write))
    };
    std::thread::sleep(Duration::from_secs(2));
    assert!(!writing.is_finished());
    cell.start(2);
    assert_eq!(writing.join().unwrap(), Ok(DeviceReply::Done));
    assert_eq!(volume.read(0, 4096), pattern(0, 2));
    cell.wait_caught_up(5);
}

#[test]
fn callers_that_say_nothing_are_sent_away() {
    let cell = TestCell::started(1, small());
    let mut silent: Vec<TcpStream> = (0..300)
        .map(|_| TcpStream::connect(cell.tcp(0)).unwrap())
        .collect();
    // The first ones had to go when there were too many; others can call meanwhile.
    let client = cell.client();
    client.create("v", 1 << 20);
    client.open("v").write(0, &pattern(0, 1));
    let start = Instant::now();
    for caller in &mut silent {
        caller.set_read_timeout(Some(support::PATIENCE)).unwrap();
        assert_eq!(caller.read(&mut [0; 100]).unwrap_or(0), 0);
    }
    let waited = start.elapsed();
    assert!((5..20).contains(&waited.as_secs()), "{waited:?}");
    assert_eq!(client.open("v").read(0, 4096), pattern(0, 1));
}
