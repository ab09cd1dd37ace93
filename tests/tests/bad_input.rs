//! Running cells and what must not harm them: nonsense on the servers' ports, a network that changes
//! and repeats messages, NBD clients that lie and vanish, full disks, failing disks.
//!
//! Wrong files and flags are in `cli.rs` and `cli_running.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pss_tests::binaries::tool;
use pss_tests::iscsi::Gateway;
use pss_tests::iscsi_client::{IscsiClient, cdb10};
use pss_tests::load::{LOAD_BYTES, Load};
use pss_tests::nbd_client::{Command, ENOSPC, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};
use pss_tests::proxy::Mischief;
use pss_tests::rng::Rng;

const MIB: u32 = 1 << 20;
/// The cell serves everybody again after this time at most.
const RETURN: Duration = Duration::from_secs(25);

/// Fails without root: a test that cannot be done is no test that has passed.
#[track_caller]
fn need_root(what: &str) {
    let output = Program::new("id").arg("-u").output().unwrap();
    assert!(
        output.stdout.starts_with(b"0\n"),
        "this test {what}, which needs root: run it as root, as in 'sudo env PATH=\"$PATH\" ./run-tests.sh'"
    );
}

// ---- the servers' ports ----

#[test]
fn a_network_that_forges_replays_cuts_and_blows_up_messages() {
    let mischief = Arc::new(Mischief::default());
    let layout = Layout {
        mischief: Some(Arc::clone(&mischief)),
        ..Layout::small(3)
    };
    let mut cell = Cell::started(layout, "64M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], 4, 1);
    load.wait_served("the start", load.now(), RETURN);

    mischief.datagrams.store(700, Ordering::Relaxed);
    let ballot = |cell: &Cell| cell.status().unwrap()["servers"][0]["status"]["ballot"].clone();
    let before = ballot(&cell);
    std::thread::sleep(Duration::from_secs(4));
    // None of it makes anybody believe that somebody has died.
    assert_eq!(ballot(&cell), before);
    load.wait_served("bad datagrams", load.now(), RETURN);

    // Nor do old datagrams harm a server that has just been started and remembers none.
    let leader = cell.leader();
    cell.kill(leader);
    load.wait_served("the leader killed", load.now(), RETURN);
    cell.start(leader);
    let socket = UdpSocket::bind((cell.host(0), 0)).unwrap();
    for _ in 0..20 {
        for datagram in mischief.datagrams_heard() {
            for id in 0..3 {
                let to = (cell.host(id), 4000 + u16::from(id));
                let _ = socket.send_to(&datagram, to);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    load.wait_served("replayed datagrams", load.now(), RETURN);
    cell.wait_current();
    mischief.datagrams.store(0, Ordering::Relaxed);

    // What a client once said, said again.
    let streams = mischief.streams_heard();
    assert!(!streams.is_empty());
    let clients = |cell: &Cell| cell.status().unwrap()["servers"][0]["status"]["clients"].clone();
    wait_until("only the gateway is a client", PATIENCE, || {
        clients(&cell) == 1 || clients(&cell) == 2
    });
    for stream in streams.iter().take(20) {
        for id in 0..3 {
            let mut caller = TcpStream::connect((cell.host(id), 4010 + u16::from(id))).unwrap();
            caller.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = caller.write_all(stream);
            let _ = caller.shutdown(Shutdown::Write);
            let mut said = Vec::new();
            // It is told why, at most, and the connection ends.
            let _ = caller.read_to_end(&mut said);
            assert!(said.len() < 4096, "{} bytes", said.len());
        }
    }
    load.wait_served("replayed streams", load.now(), RETURN);

    // Bits change between servers, and between gateway and servers.
    mischief.streams.store(3, Ordering::Relaxed);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_secs(1));
        load.wait_served("changed bits", load.now(), RETURN);
    }
    mischief.streams.store(0, Ordering::Relaxed);
    load.wait_served("all is well", load.now(), RETURN);
    let (datagrams, bits) = (&mischief.datagrams_sent, &mischief.bits_changed);
    println!("{datagrams:?} bad datagrams, {bits:?} bits changed");
    assert!(datagrams.load(Ordering::Relaxed) > 100 && bits.load(Ordering::Relaxed) > 3);

    let mut history = load.finish();
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    cell.wait_current();
    history.read_all(&mut cell.client(0));
    history.check();
}

#[test]
fn nonsense_on_the_ports() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], 4, 2);
    let mut rng = Rng::new(3);
    let status = cell.status().unwrap();
    let socket = UdpSocket::bind((cell.host(0), 0)).unwrap();
    let mut silent = Vec::new();
    for round in 0..200_u64 {
        for id in 0..3 {
            let length = *rng.pick(&[0_usize, 1, 51, 52, 53, 1400, 1401, 2048, 9000, 65_507]);
            let mut noise: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
            if round % 2 == 0 && length > 6 {
                noise[..6].copy_from_slice(b"PSSD\x01\x01");
            }
            let _ = socket.send_to(&noise, (cell.host(id), 4000 + u16::from(id)));
            let mut caller = TcpStream::connect((cell.host(id), 4010 + u16::from(id))).unwrap();
            if round % 2 == 0 {
                // A frame with lengths of its own.
                let mut frame = b"PSSF\x01\x01\0\0".to_vec();
                frame.extend_from_slice(&rng.next().to_le_bytes());
                frame.resize(32, 0);
                noise.splice(0..0, frame);
            }
            let _ = caller.write_all(&noise);
            match round % 4 {
                0 => drop(caller),
                1 => {
                    let _ = caller.shutdown(Shutdown::Write);
                }
                // More than there may be callers that do not say who they are.
                _ => silent.push(caller),
            }
        }
    }
    load.wait_served("nonsense", load.now(), RETURN);
    // The places of those that say nothing come back after the time for the handshake.
    wait_until("a new client is let in", RETURN, || {
        cell.bench
            .run("pss", "volume list --timeout 2s")
            .0
            .status
            .success()
    });
    let after = cell.status().unwrap();
    for id in 0..3 {
        let of = |status: &serde_json::Value| status["servers"][id]["status"].clone();
        assert_eq!(of(&after)["pid"], of(&status)["pid"]);
        assert_eq!(
            of(&after)["ballot"],
            of(&status)["ballot"],
            "nobody had to elect"
        );
    }
    for server in cell.servers.values() {
        assert!(server.resident_bytes() < 300 << 20);
        let said = server.text();
        assert!(said.lines().count() < 200, "{} lines", said.lines().count());
        assert!(
            said.contains("dropped") && said.contains("refused"),
            "{said}"
        );
    }
    let mut history = load.finish();
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    history.read_all(&mut cell.client(0));
    history.check();
    cell.wait_current();
}

// ---- NBD clients ----

/// A request as it stands on the wire.
fn request(command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend_from_slice(&[0, 0]);
    request.extend_from_slice(&command.to_be_bytes());
    request.extend_from_slice(&7_u64.to_be_bytes());
    request.extend_from_slice(&offset.to_be_bytes());
    request.extend_from_slice(&length.to_be_bytes());
    request
}

fn pattern(byte: u8, length: u32) -> Vec<u8> {
    vec![byte; length as usize]
}

fn write(client: &mut NbdClient, offset: u64, data: &[u8]) -> u32 {
    let length = data.len() as u32;
    client
        .request(Command::Write, offset, length, data)
        .unwrap()
        .error
}

fn read(client: &mut NbdClient, offset: u64, length: u32) -> Vec<u8> {
    let reply = client.request(Command::Read, offset, length, &[]).unwrap();
    assert_eq!(reply.error, 0);
    reply.data
}

#[test]
fn nbd_clients_that_lie_vanish_and_stop_reading() {
    let cell = Cell::started(Layout::small(3), "256M --chunk-size 1M");
    // Behind what the load uses.
    let base = LOAD_BYTES;
    let load = Load::start(vec![cell.nbd(0)], 4, 4);
    let mut honest = cell.client(0);
    assert_eq!(write(&mut honest, base, &pattern(1, MIB)), 0);

    // Vanishes in the middle of a request: nothing of it is written.
    for sent in [1, 27, 28, 29, 4096, 28 + 300_000] {
        let liar = cell.client(0);
        let mut bytes = request(1, base, MIB);
        bytes.extend_from_slice(&pattern(2, MIB));
        liar.stream().write_all(&bytes[..sent]).unwrap();
        drop(liar);
    }
    load.wait_served("clients that vanish", load.now(), RETURN);
    assert!(read(&mut honest, base, MIB) == pattern(1, MIB));

    // Vanishes with complete requests in flight: each is done or not, and each block whole.
    for round in 3..8 {
        let mut liar = cell.client(0);
        for place in 0..16 {
            let data = pattern(round, 64 << 10);
            liar.submit(Command::Write, base + place * (64 << 10), 64 << 10, &data)
                .unwrap();
        }
        drop(liar);
    }
    load.wait_served("clients that vanish with requests", load.now(), RETURN);
    for block in read(&mut honest, base, MIB).chunks_exact(4096) {
        assert!(block.iter().all(|byte| *byte == block[0] && *byte < 8));
    }

    // Announce payload and do not send it; send nonsense; ask for what is not there.
    let mut silent = Vec::new();
    for _ in 0..50 {
        let liar = cell.client(0);
        liar.stream()
            .write_all(&request(1, base, 32 * MIB))
            .unwrap();
        silent.push(liar);
    }
    for nonsense in [
        vec![0xff; 4096],
        request(1, base, u32::MAX),
        request(77, base, 4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
    ] {
        let liar = cell.client(0);
        liar.stream().write_all(&nonsense).unwrap();
        silent.push(liar);
    }
    let mut wrong = cell.client(0);
    for (command, offset) in [
        (Command::Read, 256 << 20),
        (Command::Write, (256 << 20) - 1),
        (Command::Trim, u64::MAX),
        (Command::WriteZeroes, u64::MAX - 4095),
    ] {
        let payload = if command == Command::Write {
            vec![9; 4096]
        } else {
            Vec::new()
        };
        let reply = wrong.request(command, offset, 4096, &payload).unwrap();
        assert_ne!(reply.error, 0, "{command:?} at {offset}");
    }
    load.wait_served("clients that lie", load.now(), RETURN);

    // Ask for much and read nothing of it.
    let mut greedy = Vec::new();
    for _ in 0..8 {
        let client = cell.client(0);
        let timeout = Some(Duration::from_millis(300));
        client.stream().set_write_timeout(timeout).unwrap();
        for _ in 0..2000 {
            if client.stream().write_all(&request(0, base, MIB)).is_err() {
                break;
            }
        }
        greedy.push(client);
    }
    load.wait_served("clients that do not read", load.now(), RETURN);
    let memory = cell.gateways[&0].resident_bytes();
    println!("the gateway takes {} MiB", memory >> 20);
    // 64 MiB for each of those connections, and the payload that was announced.
    assert!(memory < 1200 << 20);
    drop(greedy);
    drop(silent);
    for server in cell.servers.values() {
        let memory = server.resident_bytes();
        println!("a server takes {} MiB", memory >> 20);
        assert!(memory < 300 << 20);
    }
    assert_eq!(write(&mut honest, base, &pattern(9, MIB)), 0);
    assert!(read(&mut honest, base, MIB) == pattern(9, MIB));
    let mut history = load.finish();
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    history.read_all(&mut honest);
    history.check();
}

// ---- iSCSI initiators ----

/// Whoever opens connections without end gets few of them, fills no log, and harms nobody; nor does one that
/// sends its login a byte a second.
#[test]
fn ten_thousand_iscsi_connections_harm_nobody() {
    const TARGET: &str = "iqn.2001-03.jp.tritech:v";
    let cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let conf = format!("<target {TARGET}>\nbacking-store v\n</target>\n");
    let mut gateway = Gateway::start(&cell, 0, &conf);
    let mut slow = TcpStream::connect(gateway.portal).unwrap();
    let mut bystander = IscsiClient::login(gateway.portal, TARGET, 1, PATIENCE).unwrap();
    bystander.ready().unwrap();
    let mut step = |round: u32| {
        let block = [round as u8; 512];
        let written = bystander.command(&cdb10(0x2a, 8, 1), 0, &block).unwrap();
        let read = bystander.command(&cdb10(0x28, 8, 1), 512, &[]).unwrap();
        assert_eq!((written.status, read.data), (0, block.to_vec()), "{round}");
    };
    let mut open = VecDeque::new();
    for round in 0..10_000 {
        // An end that was closed is held on to all the same.
        open.push_back(TcpStream::connect(gateway.portal).unwrap());
        if open.len() > 256 {
            open.pop_front();
        }
        if round % 500 == 0 {
            step(round);
            let _ = slow.write_all(&[0x43]);
        }
    }
    drop(open);
    wait_until("the login of single bytes has ended", PATIENCE, || {
        let ended = slow.write_all(&[0]).is_err();
        std::thread::sleep(Duration::from_secs(1));
        ended
    });
    step(10_000);
    let text = gateway.process.text();
    let crowded = text.matches("too many connections").count();
    assert!((1..=10).contains(&crowded), "{crowded} lines:\n{text}");
    assert!(text.contains("it took too long"), "{text}");
    assert!(gateway.process.runs() && gateway.process.resident_bytes() < 64 << 20);
    // Its places are free again.
    IscsiClient::login(gateway.portal, TARGET, 2, PATIENCE).unwrap();
}

// ---- data directories ----

#[test]
fn a_newer_log_or_checkpoint_is_left_alone() {
    let mut cell = Cell::new(Layout {
        key: false,
        ..Layout::small(1)
    });
    cell.start(0);
    cell.wait_current();
    cell.bench.run("pss", "volume create v 1M").done();
    cell.stop(0);
    let segment = fs::read_dir(cell.path(0).join("log"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| !path.to_str().unwrap().contains("spare"));
    let checkpoint = cell.path(0).join("checkpoint.0");
    let segment = segment.unwrap();
    for file in [&segment, &checkpoint] {
        let whole = fs::read(file).unwrap();
        let mut newer = whole.clone();
        // docs/formats.md: CRC32C at 8, version at 12, in both.
        newer[12] = 9;
        let end = match file == &segment {
            true => 128,
            false => 32 + u64::from_le_bytes(newer[24..32].try_into().unwrap()) as usize,
        };
        let crc_of = 12..end;
        let crc = crc32c::crc32c(&newer[crc_of]);
        newer[8..12].copy_from_slice(&crc.to_le_bytes());
        fs::write(file, &newer).unwrap();
        let outcome = cell.bench.run(
            "pssd",
            "start --id 0 --segment-size 8M --checkpoint-size 8M",
        );
        let name = file.file_stem().unwrap().to_str().unwrap();
        outcome.fails(1, &[name, "format version 9", "newer pssd"]);
        assert!(fs::read(file).unwrap() == newer, "{name} was changed");
        fs::write(file, &whole).unwrap();
    }
    cell.start(0);
    cell.wait_current();
    cell.bench.run("pss", "volume show v").done();
}

// ---- full disks ----

/// File systems of this size, one for each server; unmounted when dropped.
struct SmallDisks {
    mounts: Vec<PathBuf>,
    directory: tempfile::TempDir,
}

impl SmallDisks {
    /// ext4 in files if there are loop devices, or else tmpfs.
    fn new(count: u8, mib: u32) -> SmallDisks {
        need_root("mounts small disks to fill them");
        let mut disks = SmallDisks {
            mounts: Vec::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        let mkfs = tool("mke2fs", "e2fsprogs");
        for disk in 0..count {
            let image = disks.directory.path().join(format!("image{disk}"));
            let mount = disks.directory.path().join(format!("mount{disk}"));
            fs::create_dir(&mount).unwrap();
            let size = format!("{mib}M");
            // A file that is there already is no question to ask about.
            fs::File::create(&image).unwrap();
            let made = Program::new(&mkfs)
                .args(["-q", "-F", "-t", "ext4", "-m", "0"])
                .arg(&image)
                .arg(&size)
                .status();
            assert!(made.unwrap().success());
            let looped = Program::new("mount")
                .args(["-o", "loop"])
                .args([&image, &mount])
                .output();
            if !looped.unwrap().status.success() {
                println!("no loop devices: tmpfs instead of ext4");
                let mounted = Program::new("mount")
                    .args(["-t", "tmpfs", "-o", &format!("size={size}"), "pss-test"])
                    .arg(&mount)
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
                assert!(mounted.status.success(), "root, but may not mount: {said}");
            }
            disks.mounts.push(mount);
        }
        disks
    }

    fn layout(&self, layout: Layout) -> Layout {
        let paths = self.mounts.iter().map(|mount| mount.join("pss"));
        Layout {
            paths: (0..).zip(paths).collect::<BTreeMap<u8, _>>(),
            ..layout
        }
    }
}

impl Drop for SmallDisks {
    fn drop(&mut self) {
        for mount in &self.mounts {
            // Lazy: a process of a failed test may still end.
            let unmounted = Program::new("umount").arg("-l").arg(mount).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                println!("{} is still mounted", mount.display());
            }
        }
    }
}

/// What was written where, in MiB of the volume.
type Written = BTreeMap<u64, u8>;

/// Fills the volume, so many requests at once, until there is no space. Gives the first MiB that was
/// not begun.
fn fill(client: &mut NbdClient, from: u64, depth: usize, written: &mut Written) -> u64 {
    let mut next = from;
    let mut full = false;
    let mut in_flight = BTreeMap::new();
    loop {
        while !full && client.in_flight() < depth {
            assert!(next < 1024, "the disks never get full");
            let byte = (next % 250) as u8 + 1;
            let offset = next * u64::from(MIB);
            let cookie = client
                .submit(Command::Write, offset, MIB, &pattern(byte, MIB))
                .unwrap();
            in_flight.insert(cookie, (next, byte));
            next += 1;
        }
        if client.in_flight() == 0 {
            return next;
        }
        let reply = client.complete().unwrap();
        let (place, byte) = in_flight.remove(&reply.cookie).unwrap();
        match reply.error {
            0 => {
                written.insert(place, byte);
            }
            ENOSPC => full = true,
            error => panic!("error {error}"),
        }
    }
}

fn check_written(client: &mut NbdClient, written: &Written) {
    for (place, byte) in written {
        let data = read(client, place * u64::from(MIB), MIB);
        assert!(data == pattern(*byte, MIB), "MiB {place} is lost");
    }
}

/// Trims what was written, piece by piece, until writes go on.
fn free_some(client: &mut NbdClient, written: &mut Written) {
    let places: Vec<u64> = written
        .iter()
        .filter(|(_, byte)| **byte != 0)
        .map(|(place, _)| *place)
        .collect();
    let start = Instant::now();
    for (trimmed, pieces) in places.chunks(16).enumerate() {
        for place in pieces {
            let offset = place * u64::from(MIB);
            let reply = client.request(Command::Trim, offset, MIB, &[]).unwrap();
            assert_eq!(reply.error, 0, "a trim needs no space");
            written.insert(*place, 0);
        }
        // The servers look how full their disks are every second.
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(100));
            if write(client, places[0] * u64::from(MIB), &pattern(251, MIB)) == 0 {
                written.insert(places[0], 251);
                let mib = 16 * (trimmed + 1);
                println!(
                    "writes go on {:?} after {mib} MiB were trimmed",
                    start.elapsed()
                );
                return;
            }
        }
    }
    panic!("writes do not go on though nearly nothing is left");
}

/// Limits that leave most of a small disk to the chunks.
fn thrifty(servers: u8) -> Layout {
    Layout {
        flags: "--segment-size 8M --checkpoint-size 8M --log-retain 1M".to_owned(),
        ..Layout::small(servers)
    }
}

#[test]
fn full_disks_refuse_writes_and_nothing_else() {
    let disks = SmallDisks::new(3, 256);
    let mut cell = Cell::started(disks.layout(thrifty(3)), "1G --chunk-size 1M");
    let mut client = cell.client(0);
    let mut written = Written::new();

    let next = fill(&mut client, 0, 1, &mut written);
    println!("full after {next} MiB");
    assert!(next > 64 && next < 256);
    for place in next + 1..next + 5 {
        let error = write(&mut client, place * u64::from(MIB), &pattern(1, 4096));
        assert_eq!(error, ENOSPC);
    }
    check_written(&mut client, &written);
    cell.wait_current();
    free_some(&mut client, &mut written);
    check_written(&mut client, &written);

    // Many at once: more may be on its way than is known to have space.
    let next = fill(&mut client, next, 32, &mut written);
    println!("full again after {next} MiB");
    check_written(&mut client, &written);
    free_some(&mut client, &mut written);
    cell.wait_current();

    // Killed and started again while full.
    let next = fill(&mut client, next, 4, &mut written);
    for id in 0..3 {
        cell.kill(id);
    }
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    check_written(&mut client, &written);
    free_some(&mut client, &mut written);
    fill(&mut client, next, 8, &mut written);
    check_written(&mut client, &written);
    cell.wait_current();
    drop(cell);
}

/// A file that takes the space of a disk, as files of others do; `None`: all of it.
fn ballast(mount: &Path, mib: Option<u64>) -> PathBuf {
    let path = mount.join("ballast");
    let mut file = fs::File::create(&path).unwrap();
    for _ in 0..mib.unwrap_or(u64::MAX) {
        if file.write_all(&pattern(1, MIB)).is_err() {
            assert!(mib.is_none());
            break;
        }
    }
    path
}

#[test]
fn disks_that_others_have_filled() {
    let disks = SmallDisks::new(3, 192);
    let mut cell = Cell::started(disks.layout(thrifty(3)), "1G --chunk-size 1M");
    let mut client = cell.client(0);
    let mut written = Written::new();
    for place in 0..40 {
        assert_eq!(
            write(&mut client, place * u64::from(MIB), &pattern(7, MIB)),
            0
        );
        written.insert(place, 7);
    }
    let files: Vec<_> = disks
        .mounts
        .iter()
        .map(|mount| ballast(mount, None))
        .collect();
    wait_until("writes are refused", PATIENCE, || {
        write(&mut client, 41 << 20, &pattern(8, 4096)) == ENOSPC
    });
    check_written(&mut client, &written);
    let reply = client.request(Command::Trim, 0, MIB, &[]).unwrap();
    assert_eq!(reply.error, 0, "a trim needs no space");
    written.insert(0, 0);
    check_written(&mut client, &written);
    // What a server needs at its start may be there or not; it says so if not.
    let leader = cell.leader();
    cell.kill(leader);
    cell.start(leader);
    std::thread::sleep(Duration::from_secs(2));
    let server = cell.servers.get_mut(&leader).unwrap();
    if !server.runs() {
        println!("while the disk is full: {}", server.text());
        assert!(server.text().contains("the disk is full"));
    }
    check_written(&mut client, &written);
    for file in files {
        fs::remove_file(file).unwrap();
    }
    if !cell.servers.get_mut(&leader).unwrap().runs() {
        cell.kill(leader);
        cell.start(leader);
    }
    cell.wait_current();
    wait_until("writes go on", PATIENCE, || {
        write(&mut client, 41 << 20, &pattern(8, MIB)) == 0
    });
    written.insert(41, 8);
    check_written(&mut client, &written);
    drop(cell);
}

#[test]
fn one_full_disk_holds_nobody_up() {
    let disks = SmallDisks::new(1, 320);
    let mut layout = thrifty(3);
    layout.paths.insert(1, disks.mounts[0].join("pss"));
    let mut cell = Cell::started(layout, "1G --chunk-size 1M");
    let file = ballast(&disks.mounts[0], Some(180));
    let mut client = cell.client(0);
    let mut written = Written::new();
    for place in 0..200 {
        let byte = (place % 250) as u8 + 1;
        let error = write(&mut client, place * u64::from(MIB), &pattern(byte, MIB));
        assert_eq!(error, 0, "MiB {place}: two of three have space");
        written.insert(place, byte);
    }
    check_written(&mut client, &written);
    let status = cell.status().unwrap();
    let summary = status["summary"].as_str().unwrap();
    assert!(summary.starts_with("Server 1 is "), "{summary}");
    let text = cell.bench.run("pss", "status").done().stdout();
    println!("{text}");
    assert!(text.contains("its disk is full"), "{text}");
    assert_ne!(status["leader"], 1);
    // What its log may need is not taken by chunks: most of what is kept back is there.
    let free = status["servers"][1]["status"]["free_bytes"]
        .as_u64()
        .unwrap();
    assert!(free > 4 << 20, "{status:#}");
    // It has warned early, and its log is in no danger: it runs.
    let server = cell.servers.get_mut(&1).unwrap();
    let text = server.text();
    let nearly = text.find("the disk is nearly full");
    let stalled = text.find("the disk is full");
    assert!(nearly.is_some() && nearly < stalled, "{text}");
    assert!(server.runs(), "{text}");

    // With another server away there is no majority that has space: no write waits for one in vain, and everything else
    // goes on.
    let away = (status["leader"].as_u64().unwrap() as u8 + 1) % 3;
    let away = if away == 1 { 2 } else { away };
    cell.kill(away);
    wait_until("writes are refused", PATIENCE, || {
        let begun = Instant::now();
        let error = write(&mut client, 200 << 20, &pattern(9, 4096));
        assert!(begun.elapsed() < Duration::from_secs(20), "a write hangs");
        error == ENOSPC
    });
    check_written(&mut client, &written);
    let text = cell.bench.run("pss", "status").done().stdout();
    assert!(
        text.starts_with("Writes are refused: the disk of server 1 is full"),
        "{text}"
    );
    cell.start(away);
    wait_until("writes go on", PATIENCE, || {
        write(&mut client, 200 << 20, &pattern(9, 4096)) == 0
    });

    // Once there is space it goes on by itself.
    fs::remove_file(file).unwrap();
    cell.wait_current();
    assert!(cell.servers.get_mut(&1).unwrap().runs());
    check_written(&mut client, &written);
    for id in 0..3 {
        cell.stop(id);
    }
    let size = 200 << 20;
    let whole = cell.content(0, "v", 1 << 20, size);
    assert!(cell.content(1, "v", 1 << 20, size) == whole);
    drop(cell);
}

// ---- failing disks ----

/// Makes system calls of a server fail from now on.
fn inject(cell: &Cell, id: u8, calls: &str) -> Process {
    let pid = cell.servers[&id].pid().to_string();
    let mut command = Program::new(tool("strace", "strace"));
    command.args(["-f", "-qq", "-o", "/dev/null", "-p", &pid]);
    command.args(["-e", &format!("trace={calls}")]);
    command.args(["-e", &format!("inject={calls}:error=EIO")]);
    let output = cell.bench.path("strace.out");
    Process::start("strace", &mut command, output)
}

/// A server whose disk fails stops, says so, and catches up when it is started again.
fn fails_and_returns(cell: &mut Cell, load: &Load, id: u8, calls: &str, says: &str) {
    let mut strace = inject(cell, id, calls);
    let fault = load.now();
    let mut bulk = cell.client(0);
    // Brings a checkpoint about.
    for place in 0..12 {
        let offset = LOAD_BYTES + place * u64::from(MIB);
        assert_eq!(write(&mut bulk, offset, &pattern(id + 1, MIB)), 0);
    }
    let server = cell.servers.get_mut(&id).unwrap();
    assert_eq!(server.ends(PATIENCE), Some(1), "{}", server.text());
    strace.ends(PATIENCE);
    let text = server.text();
    let last = text.lines().last().unwrap();
    println!("server {id}, {calls}: {last}");
    for part in [says, "so this server stops", "Input/output error"] {
        assert!(last.contains(part), "no '{part}' in: {text}");
    }
    load.wait_served(&format!("{calls} of server {id} fails"), fault, RETURN);
    cell.kill(id);
    cell.start(id);
    cell.wait_current();
}

#[test]
fn a_failing_disk_stops_its_server_and_nobody_else() {
    need_root("makes the system calls of a server fail with strace");
    let mut cell = Cell::started(Layout::small(3), "128M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], 4, 5);
    load.wait_served("the start", load.now(), RETURN);
    for syncs in [false, true] {
        for leads in [false, true] {
            let leader = cell.leader();
            let id = if leads { leader } else { (leader + 1) % 3 };
            match syncs {
                true => fails_and_returns(&mut cell, &load, id, "fdatasync,fsync,syncfs", ""),
                false => fails_and_returns(&mut cell, &load, id, "pwrite64,pwritev", "cannot be"),
            }
        }
    }
    let mut history = load.finish();
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    let mut client = cell.client(0);
    history.read_all(&mut client);
    history.check();
    let data = read(&mut client, LOAD_BYTES, 12 * MIB);
    assert!(data.iter().all(|byte| *byte == data[0]));
}
