//! `pss-iscsi` before a cell, against initiators that make every mistake there is: malformed openings, and sessions
//! that log in rightly and then send PDUs that were changed, in any order, in any state. A session on another target
//! goes on unharmed; nothing ends, hangs, grows or stays behind.
//!
//! `PSS_FUZZ_SECONDS` is how long the sessions go on, `PSS_FUZZ_SEED` what they send follows from.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::env;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use pss_tests::iscsi::Gateway;
use pss_tests::iscsi_client::{IscsiClient, cdb10};
use pss_tests::processes::{Cell, Layout, wait_until};
use pss_tests::rng::Rng;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
/// For every answer to the session that does nothing wrong; less than a gateway's limit for a command.
const PATIENCE: Duration = Duration::from_secs(11);
/// An opening is answered or its connection closed within this time, on a machine that has other work to do.
const VERDICT: Duration = Duration::from_secs(5);
/// What the gateway may take in all; it takes some 12 MiB with a few sessions.
const MEMORY_MAX_KIB: u64 = 96 << 10;
/// Threads with a session each.
const FUZZERS: u64 = 4;
/// Most data of a read or write: so much is soon written three times.
const BLOCKS: u64 = 64;

/// 64 MiB in blocks of 512 bytes.
const VOLUME_BLOCKS: u64 = 1 << 17;
/// No task.
const NO_TAG: u32 = u32::MAX;

fn seconds() -> Duration {
    let given = env::var("PSS_FUZZ_SECONDS").ok();
    let given = given.map(|text| {
        text.parse()
            .expect("PSS_FUZZ_SECONDS is a number of seconds")
    });
    Duration::from_secs(given.unwrap_or(15))
}

fn seed() -> u64 {
    let given = env::var("PSS_FUZZ_SEED").ok();
    given.map_or(1, |text| text.parse().expect("PSS_FUZZ_SEED is a number"))
}

type Bhs = [u8; 48];

fn put(bhs: &mut [u8], at: usize, value: u32) {
    bhs[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A header, its length of data set right, and the data.
fn pdu(mut bhs: Bhs, data: &[u8]) -> Vec<u8> {
    bhs[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
    let mut bytes = bhs.to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A login request (RFC 7143 §11.12).
fn login_pdu(flags: u8, isid: u8, tsih: u16, text: &[u8]) -> Vec<u8> {
    let mut bhs = [0; 48];
    (bhs[0], bhs[1]) = (0x43, flags);
    bhs[8..14].copy_from_slice(&[0x80, 0, 0, 0, 0xf, isid]);
    bhs[14..16].copy_from_slice(&tsih.to_be_bytes());
    put(&mut bhs, 24, 1);
    pdu(bhs, text)
}

fn names(target: &str) -> String {
    format!("InitiatorName=iqn.2026-01.test:fuzz\0TargetName={target}\0")
}

/// A gateway with a volume for the session that does nothing wrong, `v`, and one for the others, `w`.
struct Stage {
    cell: Cell,
    gateway: Gateway,
}

impl Stage {
    fn new() -> Stage {
        let cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
        let create = "volume create w 64M --chunk-size 1M";
        cell.bench.run("pss", create).done();
        let conf = ["v", "w"].map(|volume| {
            format!(
                "<target {TARGET}-{volume}>\n<backing-store {volume}>\nbs-type pss\nlun 1\n</backing-store>\n</target>\n"
            )
        });
        let gateway = Gateway::start(&cell, 0, &conf.concat());
        Stage { cell, gateway }
    }

    fn bystander(&self) -> Bystander {
        let target = format!("{TARGET}-v");
        let portal = self.gateway.portal;
        let mut client = IscsiClient::login(portal, &target, 1, PATIENCE).unwrap();
        client.ready().unwrap();
        Bystander { client, round: 0 }
    }

    fn memory_kib(&self) -> u64 {
        self.gateway.process.resident_bytes() >> 10
    }

    fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.gateway.process.pid());
        fs::read_dir(path).expect("the gateway runs").count()
    }

    fn sessions(&self) -> usize {
        let control = self.gateway.control.display();
        let text = format!("iscsi --control {control} --json sessions");
        let outcome = self.cell.bench.run("pss", &text);
        let sessions: Value = serde_json::from_str(&outcome.done().stdout()).unwrap();
        sessions["sessions"]
            .as_array()
            .expect("a list of sessions")
            .len()
    }

    /// It runs, has met nothing unexpected, and takes no more than it may.
    fn check(&mut self) {
        let text = self.gateway.process.text();
        assert!(
            self.gateway.process.runs(),
            "the gateway has ended:\n{text}"
        );
        assert!(!text.contains("panicked"), "{text}");
        let memory = self.memory_kib();
        assert!(memory <= MEMORY_MAX_KIB, "the gateway takes {memory} KiB");
    }

    /// Nothing is left of those who have gone.
    fn check_left(&mut self, descriptors: usize) {
        wait_until("only one session is left", VERDICT, || self.sessions() == 1);
        wait_until("all descriptors are given back", VERDICT, || {
            self.descriptors() <= descriptors
        });
        self.check();
    }
}

/// A session that does nothing wrong.
struct Bystander {
    client: IscsiClient,
    round: u32,
}

impl Bystander {
    /// Writes a block, reads it back.
    fn step(&mut self) {
        self.round += 1;
        let lba = self.round % 1000 * 8;
        let block = [self.round as u8; 512];
        let ended = self.client.command(&cdb10(0x2a, lba, 1), 0, &block);
        assert_eq!(ended.unwrap().status, 0, "write {}", self.round);
        let ended = self.client.command(&cdb10(0x28, lba, 1), 512, &[]);
        assert_eq!(ended.unwrap().data, block, "read {}", self.round);
    }
}

/// What a target does about an opening.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    /// It answered; the class of the status, if the answer is a login response.
    Answered(Option<u8>),
    /// It closed the connection without a word.
    Closed,
}

/// Reads one PDU; none at the end of the connection.
fn receive(stream: &mut TcpStream) -> std::io::Result<Option<(Bhs, Vec<u8>)>> {
    let mut bhs = [0; 48];
    match stream.read_exact(&mut bhs) {
        Ok(()) => {}
        Err(error) => {
            return match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => Ok(None),
                _ => Err(error),
            };
        }
    }
    let length = (word(&bhs, 4) & 0xff_ffff) as usize + usize::from(bhs[4]) * 4;
    let mut data = vec![0; length.next_multiple_of(4)];
    stream.read_exact(&mut data)?;
    Ok(Some((bhs, data)))
}

/// Sends an opening of so many PDUs; what the last answer is, or that there is none.
fn open(portal: SocketAddr, bytes: &[u8], pdus: usize) -> Verdict {
    let mut stream = TcpStream::connect(portal).unwrap();
    stream.set_read_timeout(Some(VERDICT)).unwrap();
    stream.set_write_timeout(Some(VERDICT)).unwrap();
    match stream.write_all(bytes) {
        Ok(()) => {}
        // It may well be closed before all is sent.
        Err(error) => assert!(
            matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ),
            "{error}"
        ),
    }
    let mut verdict = Verdict::Closed;
    for _ in 0..pdus {
        match receive(&mut stream) {
            Ok(Some((bhs, _))) if bhs[0] & 0x3f == 0x23 => {
                verdict = Verdict::Answered(Some(bhs[36]));
            }
            Ok(Some(_)) => verdict = Verdict::Answered(None),
            Ok(None) => break,
            Err(error) => panic!("neither an answer nor a close in {VERDICT:?}: {error}"),
        }
    }
    verdict
}

/// Text in login requests of 8,000 bytes each, all but the last with the C bit.
fn in_parts(text: &[u8]) -> (Vec<u8>, usize) {
    let parts: Vec<&[u8]> = text.chunks(8000).collect();
    let mut bytes = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let flags = if number + 1 == parts.len() {
            0x87
        } else {
            0x44
        };
        bytes.extend(login_pdu(flags, 7, 0, part));
    }
    (bytes, parts.len())
}

#[test]
fn malformed_openings_are_answered_or_closed() {
    let mut stage = Stage::new();
    let mut bystander = stage.bystander();
    bystander.step();
    let descriptors = stage.descriptors();
    let portal = stage.gateway.portal;
    let right = names(&format!("{TARGET}-w"));
    let with = |more: &str| format!("{right}{more}");
    let whole = |flags: u8, text: &[u8]| (login_pdu(flags, 7, 0, text), 1);

    let command = {
        let mut bhs = [0; 48];
        (bhs[0], bhs[1], bhs[9], bhs[32]) = (0x01, 0x81, 1, 0x12);
        pdu(bhs, &[])
    };
    let text_request = {
        let mut bhs = [0; 48];
        (bhs[0], bhs[1]) = (0x44, 0x80);
        put(&mut bhs, 16, 1);
        put(&mut bhs, 20, NO_TAG);
        pdu(bhs, b"SendTargets=All\0")
    };
    let mut sixteen_mb = login_pdu(0x87, 7, 0, &[]);
    sixteen_mb[5..8].copy_from_slice(&[0xff; 3]);
    let mut long_ahs = login_pdu(0x87, 7, 0, right.as_bytes());
    long_ahs[4] = 255;
    long_ahs.splice(48..48, [0; 1020]);
    let mut reserved = login_pdu(0x87, 7, 0, right.as_bytes());
    reserved[0] = 0x5f;
    let keys: String = (0..3000)
        .map(|number| format!("X-key{number}=1\0"))
        .collect();
    let big_value = with(&format!("X-big={}\0", "v".repeat(60_000)));
    let lists = "HeaderDigest=,,,\0DataDigest=CRC32C,,None\0MaxConnections=1,2\0";
    let negative = "MaxRecvDataSegmentLength=-1\0DefaultTime2Wait=-2\0FirstBurstLength=-512\0";

    let refused = [Verdict::Answered(Some(2)), Verdict::Closed];
    let any = [0, 2].map(|class| Verdict::Answered(Some(class)));
    let openings = [
        ("no login first", (command, 1), vec![Verdict::Closed]),
        ("text first", (text_request, 1), vec![Verdict::Closed]),
        (
            "nothing but junk",
            (vec![0xa5; 4096], 1),
            vec![Verdict::Closed],
        ),
        ("16 MB of data", (sixteen_mb, 1), refused.to_vec()),
        ("an AHS of 255 words", (long_ahs, 1), any.to_vec()),
        (
            "a key without =",
            whole(0x87, with("NoValue\0").as_bytes()),
            refused.to_vec(),
        ),
        (
            "a value of 60 KB",
            in_parts(big_value.as_bytes()),
            refused.to_vec(),
        ),
        (
            "3,000 keys",
            in_parts(with(&keys).as_bytes()),
            refused.to_vec(),
        ),
        ("NUL only", whole(0x87, &[0; 4000]), refused.to_vec()),
        ("opcode 1Fh", (reserved, 1), refused.to_vec()),
        (
            "reserved CSG",
            whole(0x8b, right.as_bytes()),
            refused.to_vec(),
        ),
        (
            "reserved NSG",
            whole(0x86, right.as_bytes()),
            refused.to_vec(),
        ),
        (
            "T with CSG=NSG",
            whole(0x85, right.as_bytes()),
            refused.to_vec(),
        ),
        (
            "T with NSG before CSG",
            whole(0x84, right.as_bytes()),
            refused.to_vec(),
        ),
        ("C and T", whole(0xc7, right.as_bytes()), refused.to_vec()),
        (
            "junk lists",
            whole(0x87, with(lists).as_bytes()),
            any.to_vec(),
        ),
        (
            "negative numbers",
            whole(0x87, with(negative).as_bytes()),
            any.to_vec(),
        ),
    ];
    for round in 0..8 {
        for (name, (bytes, pdus), allowed) in &openings {
            let verdict = open(portal, bytes, *pdus);
            if round == 0 {
                println!("{name}: {verdict:?}");
            }
            assert!(allowed.contains(&verdict), "{name}: {verdict:?}");
        }
        bystander.step();
    }
    stage.check_left(descriptors);
}

#[test]
fn sessions_need_no_more_descriptors_than_a_process_may_have() {
    const SESSIONS: u16 = 200;
    let limit = getrlimit(Resource::Nofile);
    // What a shell or a service manager gives is often meant for programs that use `select`.
    let small = Rlimit {
        current: Some(128),
        ..limit
    };
    setrlimit(Resource::Nofile, small).unwrap();
    let stage = Stage::new();
    setrlimit(Resource::Nofile, limit).unwrap();
    let (portal, target) = (stage.gateway.portal, format!("{TARGET}-w"));
    let login = |number| IscsiClient::login(portal, &target, number, PATIENCE).unwrap();
    let mut clients: Vec<IscsiClient> = (0..SESSIONS).map(login).collect();
    assert_eq!(stage.sessions(), usize::from(SESSIONS));
    for client in &mut clients {
        client.ready().unwrap();
    }
}

/// What a fuzzer's reader hears.
enum Heard {
    /// A login response: class of the status, TSIH.
    Login(u8, u16),
    /// An R2T: tag, target's tag, offset, length.
    Asked(u32, u32, u32, u32),
    /// A NOP-In that wants an answer.
    Ping(u32),
}

/// Reads what comes until the end; `exp_stat_sn` follows.
fn listen(
    mut stream: TcpStream,
    exp_stat_sn: &AtomicU32,
    heard: &Sender<Heard>,
    reached: &Reached,
) {
    // Any error is an end: the target may close in the middle of a PDU.
    while let Ok(Some((bhs, _))) = receive(&mut stream) {
        let opcode = bhs[0] & 0x3f;
        let status = matches!(opcode, 0x21 | 0x25) && (opcode == 0x21 || bhs[1] & 1 != 0);
        if status || !matches!(opcode, 0x31 | 0x25) {
            exp_stat_sn.store(word(&bhs, 24).wrapping_add(1), Ordering::Relaxed);
        }
        if status {
            let count = if bhs[3] == 0 {
                &reached.good
            } else {
                &reached.failed
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        if opcode == 0x3f {
            reached.rejected.fetch_add(1, Ordering::Relaxed);
        }
        let what = match opcode {
            0x23 => Heard::Login(bhs[36], u16::from_be_bytes([bhs[14], bhs[15]])),
            0x31 => Heard::Asked(
                word(&bhs, 16),
                word(&bhs, 20),
                word(&bhs, 40),
                word(&bhs, 44),
            ),
            0x20 if word(&bhs, 20) != NO_TAG => Heard::Ping(word(&bhs, 20)),
            _ => continue,
        };
        let _ = heard.send(what);
    }
}

/// One connection of a fuzzer.
struct Fuzzer<'a> {
    rng: Rng,
    stream: TcpStream,
    heard: Receiver<Heard>,
    exp_stat_sn: &'a AtomicU32,
    /// Of a thousand PDUs, so many are changed.
    changes: u64,
    cmd_sn: u32,
    itt: u32,
}

/// Why a connection ends.
struct Over;

impl Fuzzer<'_> {
    fn number(&mut self) -> u32 {
        let any = self.rng.next() as u32;
        *self.rng.pick(&[
            0,
            1,
            2,
            511,
            0x7fff_ffff,
            0x8000_0000,
            NO_TAG - 1,
            NO_TAG,
            self.cmd_sn,
            any,
        ])
    }

    fn send(&mut self, mut bytes: Vec<u8>) -> Result<(), Over> {
        put(&mut bytes, 28, self.exp_stat_sn.load(Ordering::Relaxed));
        let mut times = 1;
        if self.rng.chance(self.changes) {
            let at = |rng: &mut Rng, from: u64, to: u64| rng.between(from, to) as usize;
            match self.rng.below(16) {
                // The header, apart from the lengths.
                0..8 => {
                    for _ in 0..self.rng.between(1, 4) {
                        let byte = match self.rng.chance(250) {
                            true => at(&mut self.rng, 0, 3),
                            false => at(&mut self.rng, 8, 47),
                        };
                        bytes[byte] ^= 1 << self.rng.below(8);
                    }
                }
                8..11 => {
                    let field = at(&mut self.rng, 4, 11) * 4;
                    let number = self.number();
                    put(&mut bytes, field, number);
                }
                11 => bytes[0] = self.rng.next() as u8,
                // The lengths: what follows is read as something else.
                12 => {
                    let byte = at(&mut self.rng, 4, 7);
                    bytes[byte] ^= 1 << self.rng.below(8);
                }
                13 => {
                    let length = at(&mut self.rng, 1, bytes.len() as u64);
                    bytes.truncate(length);
                }
                14 => times = 2,
                _ => {
                    for _ in 0..self.rng.between(1, 8) {
                        let byte = at(&mut self.rng, 0, bytes.len() as u64 - 1);
                        bytes[byte] = self.rng.next() as u8;
                    }
                }
            }
        }
        for _ in 0..times {
            self.stream.write_all(&bytes).map_err(|_| Over)?;
        }
        Ok(())
    }

    /// A header with the next tag, mostly with the next CmdSN.
    fn header(&mut self, opcode: u8, flags: u8) -> Bhs {
        let mut bhs = [0; 48];
        (bhs[0], bhs[1], bhs[9]) = (opcode, flags, 1);
        if self.rng.chance(30) {
            bhs[9] = *self.rng.pick(&[0, 2, 0xff]);
        }
        self.itt += 1;
        put(&mut bhs, 16, self.itt);
        put(&mut bhs, 24, self.cmd_sn);
        match self.rng.chance(100) {
            true => bhs[0] |= 0x40,
            false => self.cmd_sn = self.cmd_sn.wrapping_add(1),
        }
        bhs
    }

    /// A CDB of something that the target knows, with fields that often fit; and bytes of data in and out.
    fn cdb(&mut self) -> ([u8; 16], u64, u64) {
        const WITH_LBA_10: [u8; 7] = [0x28, 0x2a, 0x2e, 0x2f, 0x35, 0x34, 0x41];
        const WITH_LBA_16: [u8; 10] = [0x88, 0x8a, 0x8e, 0x8f, 0x90, 0x91, 0x93, 0x89, 0x8b, 0x9c];
        /// Opcode, service action, and where the allocation or parameter list length is.
        const OTHER: [(u8, u8, usize); 33] = [
            (0x00, 0, 0),
            (0x03, 0, 4),
            (0x12, 0, 3),
            (0x12, 1, 3),
            (0x1a, 8, 3),
            (0x5a, 0, 7),
            (0x15, 0x10, 4),
            (0x55, 0x10, 7),
            (0x25, 0, 0),
            (0x9e, 0x10, 10),
            (0x9e, 0x12, 10),
            (0x42, 0, 7),
            (0x16, 0, 0),
            (0x17, 0, 0),
            (0x5e, 0, 7),
            (0x5e, 3, 7),
            (0x5f, 0, 5),
            (0x5f, 6, 5),
            (0x5f, 1, 5),
            (0x5f, 4, 5),
            (0x83, 0, 10),
            (0x84, 3, 10),
            (0xa3, 0x0c, 6),
            (0xa3, 0x0d, 6),
            (0xa3, 0x0a, 6),
            (0xa3, 5, 6),
            (0xa0, 0, 6),
            (0x4d, 0, 7),
            (0x1b, 0, 0),
            (0x1e, 0, 0),
            (0x1d, 0, 3),
            (0x37, 0, 7),
            (0x48, 0x1f, 7),
        ];
        let mut cdb = [0; 16];
        let lba = match self.rng.below(10) {
            0 => self.rng.next(),
            1 => VOLUME_BLOCKS - self.rng.below(BLOCKS),
            _ => self.rng.below(VOLUME_BLOCKS - BLOCKS),
        };
        let blocks = if self.rng.chance(50) {
            u64::from(self.number())
        } else {
            self.rng.below(BLOCKS)
        };
        let bytes = blocks * 512;
        let (reads, writes);
        match self.rng.below(3) {
            0 => {
                cdb[0] = *self.rng.pick(&WITH_LBA_10);
                cdb[1] = *self.rng.pick(&[0, 0, 0, 8, 0x10, 2]);
                put(&mut cdb, 2, lba as u32);
                cdb[7..9].copy_from_slice(&(blocks as u16).to_be_bytes());
                reads = if cdb[0] == 0x28 { bytes } else { 0 };
                writes = match cdb[0] {
                    0x2a | 0x2e => bytes,
                    0x41 => 512,
                    _ => 0,
                };
            }
            1 => {
                cdb[0] = *self.rng.pick(&WITH_LBA_16);
                cdb[1] = *self.rng.pick(&[0, 0, 0, 8, 1, 2]);
                cdb[2..10].copy_from_slice(&lba.to_be_bytes());
                put(&mut cdb, 10, blocks as u32);
                if cdb[0] == 0x89 {
                    put(&mut cdb, 10, (blocks % 4) as u32);
                }
                reads = if cdb[0] == 0x88 { bytes } else { 0 };
                writes = match cdb[0] {
                    0x8a | 0x8e | 0x8b | 0x9c => bytes,
                    0x93 => 512,
                    0x89 => 1024 * (blocks % 4),
                    _ => 0,
                };
            }
            _ => {
                let (opcode, action, length_at) = *self.rng.pick(&OTHER);
                (cdb[0], cdb[1]) = (opcode, action);
                if self.rng.chance(300) {
                    cdb[2] = self.rng.next() as u8;
                }
                let length = *self.rng.pick(&[0, 4, 24, 252, 4096]) as u16;
                if length_at > 0 {
                    cdb[length_at + 1] = length as u8;
                    cdb[length_at] = (length >> 8) as u8;
                }
                let out = [0x15, 0x55, 0x5f, 0x83, 0x42, 0x48].contains(&opcode);
                (reads, writes) = if out {
                    (0, u64::from(length))
                } else {
                    (4096, 0)
                };
            }
        }
        if self.rng.chance(self.changes / 2) {
            let byte = self.rng.below(16) as usize;
            cdb[byte] = self.rng.next() as u8;
        }
        (cdb, reads, writes)
    }

    fn command(&mut self) -> Result<(), Over> {
        let (cdb, reads, writes) = self.cdb();
        let attribute = self.rng.below(5) as u8;
        let direction = u8::from(reads > 0) << 6 | u8::from(writes > 0) << 5;
        let mut bhs = self.header(0x01, 0x80 | direction | attribute);
        let itt = word(&bhs, 16);
        let expected = match self.rng.chance(100) {
            true => self.number(),
            false => reads.max(writes) as u32,
        };
        put(&mut bhs, 20, expected);
        bhs[32..48].copy_from_slice(&cdb);
        let immediate = match self.rng.below(3) {
            0 => 0,
            _ => writes.min(8192),
        };
        let mut data = vec![self.rng.next() as u8; immediate as usize];
        // A parameter list says how long it is in one of its first bytes.
        for byte in data.iter_mut().take(24) {
            *byte = *self.rng.pick(&[0, 0, 0, 0, 1, 8, 16, 22, 0xff]);
        }
        let unsolicited = writes > immediate && self.rng.chance(100);
        if unsolicited {
            bhs[1] &= 0x7f;
        }
        self.send(pdu(bhs, &data))?;
        if unsolicited {
            self.data_out(itt, NO_TAG, immediate as u32, (writes - immediate) as u32)?;
        }
        Ok(())
    }

    /// What an R2T asked for, more or less.
    fn data_out(&mut self, itt: u32, ttt: u32, offset: u32, length: u32) -> Result<(), Over> {
        let (mut at, end) = (offset, offset.saturating_add(length.min(1 << 17)));
        let mut data_sn = 0;
        while at < end {
            let part = (end - at).min(8192);
            let mut bhs = [0; 48];
            (bhs[0], bhs[1], bhs[9]) = (0x05, u8::from(at + part == end) << 7, 1);
            put(&mut bhs, 16, itt);
            put(&mut bhs, 20, ttt);
            put(&mut bhs, 36, data_sn);
            put(&mut bhs, 40, at);
            self.send(pdu(bhs, &vec![0x5a; part as usize]))?;
            (at, data_sn) = (at + part, data_sn + 1);
        }
        Ok(())
    }

    fn other(&mut self) -> Result<(), Over> {
        match self.rng.below(10) {
            // NOP-Out.
            0..3 => {
                let mut bhs = self.header(0x00, 0x80);
                put(&mut bhs, 20, NO_TAG);
                let length = self.rng.below(600) as usize;
                self.send(pdu(bhs, &vec![0x77; length]))
            }
            // Text.
            3..6 => {
                const TEXTS: [&str; 6] = [
                    "SendTargets=All\0",
                    "SendTargets=\0",
                    "MaxRecvDataSegmentLength=512\0",
                    "X-unknown=1\0HeaderDigest=None\0",
                    "=\0==\0\0a\0",
                    "SendTargets=iqn.2001-03.jp.tritech:tgtd-pss-v\0InitialR2T=No\0",
                ];
                let flags = *self.rng.pick(&[0x80, 0x80, 0x80, 0x40, 0]);
                let mut bhs = self.header(0x04, flags);
                let tag = self.number();
                put(&mut bhs, 20, *self.rng.pick(&[NO_TAG, NO_TAG, tag]));
                let text = *self.rng.pick(&TEXTS);
                self.send(pdu(bhs, text.as_bytes()))
            }
            // Task management, TARGET COLD RESET seldom.
            6..8 => {
                let function = *self.rng.pick(&[1, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9]);
                let mut bhs = self.header(0x02, 0x80 | function);
                let back = self.rng.below(8) as u32;
                put(&mut bhs, 20, self.itt.wrapping_sub(back));
                put(&mut bhs, 32, self.cmd_sn.wrapping_sub(back));
                self.send(pdu(bhs, &[]))
            }
            // SNACK: data, status, acknowledgement, resegmenting.
            8 => {
                let kind = self.rng.below(5) as u8;
                let mut bhs = self.header(0x10, 0x80 | kind);
                put(&mut bhs, 16, self.itt.wrapping_sub(1));
                let (from, count) = (self.number(), self.number());
                put(&mut bhs, 40, from);
                put(&mut bhs, 44, count);
                self.send(pdu(bhs, &[]))
            }
            // Data that nobody asked for.
            _ => {
                let (itt, ttt) = (self.itt, self.number());
                let offset = self.number();
                self.data_out(itt, ttt, offset, 512)
            }
        }
    }

    fn answer(&mut self) -> Result<(), Over> {
        while let Ok(heard) = self.heard.try_recv() {
            match heard {
                Heard::Asked(itt, ttt, offset, length) => {
                    if self.rng.chance(900) {
                        self.data_out(itt, ttt, offset, length)?;
                    }
                }
                Heard::Ping(ttt) => {
                    let mut bhs = [0; 48];
                    (bhs[0], bhs[1]) = (0x40, 0x80);
                    put(&mut bhs, 16, NO_TAG);
                    put(&mut bhs, 20, ttt);
                    put(&mut bhs, 24, self.cmd_sn);
                    self.send(pdu(bhs, &[]))?;
                }
                Heard::Login(..) => {}
            }
        }
        Ok(())
    }

    /// Takes away what others have reserved: REGISTER AND IGNORE EXISTING KEY, CLEAR.
    fn clear_reservations(&mut self) -> Result<(), Over> {
        for (action, key, service_key) in [(6_u8, 0_u64, 1_u64), (3, 1, 0)] {
            let mut bhs = self.header(0x01, 0xa1);
            bhs[9] = 1;
            put(&mut bhs, 20, 24);
            (bhs[32], bhs[33], bhs[40]) = (0x5f, action, 24);
            let list = [key.to_be_bytes(), service_key.to_be_bytes(), [0; 8]].concat();
            self.send(pdu(bhs, &list))?;
        }
        Ok(())
    }

    fn session(&mut self) -> Result<(), Over> {
        if self.rng.chance(200) {
            self.clear_reservations()?;
        }
        for _ in 0..self.rng.between(1, 60) {
            self.answer()?;
            match self.rng.chance(750) {
                true => self.command()?,
                false => self.other()?,
            }
        }
        // What is still asked for is mostly given, and then it takes leave or does not.
        for _ in 0..self.rng.below(12) {
            thread::sleep(Duration::from_millis(5));
            self.answer()?;
        }
        if self.rng.chance(300) {
            let bhs = self.header(0x06, 0x80);
            self.send(pdu(bhs, &[]))?;
            while self.heard.recv_timeout(Duration::from_millis(200)).is_ok() {}
        }
        Ok(())
    }
}

/// How far the fuzzers came: commands that failed and that did not, and PDUs that were rejected.
#[derive(Debug, Default)]
struct Reached {
    connections: AtomicU64,
    sessions: AtomicU64,
    good: AtomicU64,
    failed: AtomicU64,
    rejected: AtomicU64,
}

/// One connection from its opening to its end.
fn fuzz_once(portal: SocketAddr, seed: u64, tsih: &mut u16, reached: &Reached) {
    let mut rng = Rng::new(seed);
    let Ok(stream) = TcpStream::connect_timeout(&portal, PATIENCE) else {
        panic!("seed {seed}: the gateway takes no connection");
    };
    stream
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let (sender, heard) = channel();
    let exp_stat_sn = AtomicU32::new(0);
    let own = stream.try_clone().unwrap();
    // Some never read.
    let deaf = rng.chance(30);
    thread::scope(|scope| {
        if !deaf {
            let exp_stat_sn = &exp_stat_sn;
            scope.spawn(move || listen(own, exp_stat_sn, &sender, reached));
        }
        let changes = *rng.pick(&[0, 20, 20, 100, 300]);
        let mut fuzzer = Fuzzer {
            rng,
            stream: stream.try_clone().unwrap(),
            heard,
            exp_stat_sn: &exp_stat_sn,
            changes,
            cmd_sn: 1,
            itt: 0,
        };
        reached.connections.fetch_add(1, Ordering::Relaxed);
        let rng = &mut fuzzer.rng;
        let discovery = rng.chance(50);
        let mut text = names(&format!("{TARGET}-w"));
        if discovery {
            text.push_str("SessionType=Discovery\0");
        }
        const KEYS: [&str; 10] = [
            "ImmediateData=No\0",
            "InitialR2T=No\0",
            "MaxOutstandingR2T=8\0",
            "ErrorRecoveryLevel=1\0",
            "MaxConnections=4\0",
            "MaxBurstLength=4096\0FirstBurstLength=512\0",
            "MaxRecvDataSegmentLength=512\0",
            "MaxRecvDataSegmentLength=16777215\0",
            "DataDigest=CRC32C,None\0",
            "DefaultTime2Wait=0\0DefaultTime2Retain=0\0",
        ];
        for key in KEYS {
            if rng.chance(150) {
                text.push_str(key);
            }
        }
        let mut old = 0;
        if rng.chance(50) {
            old = *tsih;
        }
        let isid = rng.below(6) as u8;
        let login = login_pdu(0x87, isid, old, text.as_bytes());
        // The gateway may well be the one who ends it.
        let _ = fuzzer.send(login).and_then(|()| {
            match fuzzer.heard.recv_timeout(Duration::from_secs(1)) {
                Ok(Heard::Login(0, new)) => {
                    reached.sessions.fetch_add(1, Ordering::Relaxed);
                    *tsih = new;
                }
                // It sends on regardless.
                _ if fuzzer.rng.chance(800) => return Err(Over),
                _ => {}
            }
            fuzzer.session()
        });
        let _ = stream.shutdown(Shutdown::Both);
    });
}

#[test]
fn sessions_that_send_anything_harm_nobody() {
    let mut stage = Stage::new();
    let mut bystander = stage.bystander();
    bystander.step();
    let descriptors = stage.descriptors();
    let portal = stage.gateway.portal;
    let (first_seed, end) = (seed(), Instant::now() + seconds());
    let (stop, reached) = (AtomicBool::new(false), Reached::default());
    let latest: Vec<AtomicU64> = (0..FUZZERS).map(|_| AtomicU64::new(0)).collect();
    let mut most = 0;
    thread::scope(|scope| {
        for (number, latest) in (0..FUZZERS).zip(&latest) {
            let (stop, reached) = (&stop, &reached);
            scope.spawn(move || {
                let mut tsih = 1;
                let mut seed = first_seed.wrapping_mul(1 << 40) + (number << 32);
                while !stop.load(Ordering::Relaxed) {
                    latest.store(seed, Ordering::Relaxed);
                    fuzz_once(portal, seed, &mut tsih, reached);
                    seed += 1;
                }
            });
        }
        let harmed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while Instant::now() < end {
                bystander.step();
                stage.check();
                most = most.max(stage.memory_kib());
                thread::sleep(Duration::from_millis(20));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(reason) = harmed {
            println!("last seeds: {latest:?}");
            std::panic::resume_unwind(reason);
        }
    });
    println!("{reached:?}, at most {most} KiB");
    for (name, count, least) in [
        ("sessions", &reached.sessions, 20),
        ("good commands", &reached.good, 100),
        ("failed commands", &reached.failed, 100),
        ("rejected PDUs", &reached.rejected, 10),
    ] {
        let count = count.load(Ordering::Relaxed);
        assert!(
            count >= least,
            "{count} {name} are too few to show anything"
        );
    }
    stage.check_left(descriptors);
    bystander.step();
    // The others' disk is as good as it was.
    let mut client = IscsiClient::login(portal, &format!("{TARGET}-w"), 1, PATIENCE).unwrap();
    // It may have been told to sanitize itself.
    wait_until("the disk is ready", PATIENCE, || client.ready().is_ok());
}
