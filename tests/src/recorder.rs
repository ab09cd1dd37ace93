//! What goes over iSCSI connections, as Wireshark's `tshark` understands it: a decoder that others wrote.
//!
//! Connections are passed on and written down on the way, so that nobody has to be allowed to listen to the network.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::binaries::tool;

/// How often threads look whether they are to end.
const TICK: Duration = Duration::from_millis(20);
/// What is read at a time: less than the longest packet of IPv4.
const PIECE_BYTES: usize = 32 << 10;
/// The ports of initiator and target in the packets that are made of what was written down.
const PORTS: [&str; 2] = ["50000", "3260"];

/// A piece of a stream as it was read, and whether the initiator sent it.
type Piece = (bool, Vec<u8>);

/// Listens, passes every connection on to one address, and keeps what goes over it.
pub struct Recorder {
    /// Where it listens.
    pub address: SocketAddr,
    connections: Arc<Mutex<Vec<Recording>>>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

/// One connection.
#[derive(Clone)]
struct Recording {
    pieces: Arc<Mutex<Vec<Piece>>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// Listens on a free port of an address.
    ///
    /// # Panics
    /// If it cannot.
    pub fn start(address: IpAddr, target: SocketAddr) -> Recorder {
        let listener = TcpListener::bind((address, 0)).expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        listener
            .set_nonblocking(true)
            .expect("a socket can be asked");
        let connections = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let acceptor = {
            let (connections, stop) = (Arc::clone(&connections), Arc::clone(&stop));
            std::thread::spawn(move || accept(&listener, target, &connections, &stop))
        };
        Recorder {
            address,
            connections,
            stop,
            acceptor: Some(acceptor),
        }
    }

    /// Waits until all connections have ended; what went over each, in the order in which they were made.
    ///
    /// # Panics
    /// If tshark cannot be run or does not understand its input.
    pub fn decode(mut self, dir: &Path) -> Vec<Vec<WirePdu>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().expect("the acceptor does not panic");
        }
        let recordings = std::mem::take(&mut *lock(&self.connections));
        let decoded = recordings.iter().map(|recording| {
            for thread in lock(&recording.threads).drain(..) {
                thread.join().expect("a copier does not panic");
            }
            decode(dir, &lock(&recording.pieces))
        });
        decoded.collect()
    }
}

fn accept(
    listener: &TcpListener,
    target: SocketAddr,
    connections: &Mutex<Vec<Recording>>,
    stop: &AtomicBool,
) {
    loop {
        let Ok((initiator, _)) = listener.accept() else {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(TICK);
            continue;
        };
        let Ok(target) = TcpStream::connect(target) else {
            continue;
        };
        let ends = [initiator, target];
        for end in &ends {
            end.set_nonblocking(false).expect("a socket can be asked");
            end.set_nodelay(true).expect("a socket can be asked");
        }
        let pieces: Arc<Mutex<Vec<Piece>>> = Arc::default();
        let threads = [(0, 1), (1, 0)].map(|(from, to)| {
            let clone = |at: usize| ends[at].try_clone().expect("a descriptor can be doubled");
            let (from_end, to_end) = (clone(from), clone(to));
            let pieces = Arc::clone(&pieces);
            std::thread::spawn(move || copy(from_end, to_end, from == 0, &pieces))
        });
        let recording = Recording {
            pieces,
            threads: Arc::new(Mutex::new(threads.into())),
        };
        lock(connections).push(recording);
    }
}

/// Writes down first and passes on then: an answer never comes before what it answers.
fn copy(mut from: TcpStream, mut to: TcpStream, by_initiator: bool, pieces: &Mutex<Vec<Piece>>) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let piece = buffer[..length].to_vec();
        lock(pieces).push((by_initiator, piece));
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// A PDU as tshark shows it.
#[derive(Debug, Default)]
pub struct WirePdu {
    /// Whether the initiator sent it.
    pub by_initiator: bool,
    /// Its fields: name without `iscsi.`, and value.
    fields: BTreeMap<String, String>,
}

impl WirePdu {
    /// A field as a number.
    pub fn get(&self, name: &str) -> Option<u32> {
        let text = self.fields.get(name)?;
        match text.as_str() {
            "True" => Some(1),
            "False" => Some(0),
            text => match text.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16).ok(),
                None => text.parse().ok(),
            },
        }
    }

    /// A field that has to be there.
    ///
    /// # Panics
    /// If it is not.
    pub fn field(&self, name: &str) -> u32 {
        self.get(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }

    /// Its length on the wire: header, additional header, data, digests (§11.2).
    fn bytes(&self) -> usize {
        // The decoder shows no length in PDUs whose type has no data segment.
        let data = self
            .get("datasegmentlength")
            .unwrap_or(0)
            .next_multiple_of(4);
        let additional = self.get("totalahslength").unwrap_or(0) * 4;
        let digests = ["headerdigest32", "datadigest32"].map(|it| self.fields.contains_key(it));
        let digests = digests.into_iter().filter(|it| *it).count();
        (48 + additional + data) as usize + 4 * digests
    }

    /// Operation code.
    ///
    /// # Panics
    /// If there is none.
    pub fn opcode(&self) -> u32 {
        self.field("opcode")
    }
}

fn decode(dir: &Path, pieces: &[Piece]) -> Vec<WirePdu> {
    // The form of a hex dump that text2pcap reads: direction, offset, bytes.
    let mut text = String::new();
    for (by_initiator, piece) in pieces {
        text.push_str(if *by_initiator {
            "I\n000000"
        } else {
            "O\n000000"
        });
        for byte in piece {
            let _ = write!(text, " {byte:02x}");
        }
        text.push_str("\n\n");
    }
    let (dump, capture) = (dir.join("dump.txt"), dir.join("capture.pcap"));
    fs::write(&dump, text).expect("the test directory can be used");
    run(Command::new(tool("text2pcap", "tshark"))
        .args(["-q", "-D", "-T", &PORTS.join(",")])
        .args([&dump, &capture]));
    let shown = run(Command::new(tool("tshark", "tshark"))
        .arg("-r")
        .arg(&capture)
        .args(["-d", &format!("tcp.port=={},iscsi", PORTS[1]), "-T", "pdml"])
        .args(["-o", "iscsi.desegment_iscsi_messages:TRUE"]));
    let mut pdus = parse(&shown);
    // The rejected header within a Reject (§11.17) is shown as a PDU too: a target that sends an initiator's opcode.
    let mut rejected = false;
    pdus.retain(|it| {
        let within_reject = rejected && it.field("opcode") & 0x20 == 0;
        rejected = !it.by_initiator && it.field("opcode") == 0x3f;
        it.by_initiator || !within_reject
    });
    for by_initiator in [true, false] {
        let of_side = |side: &bool| *side == by_initiator;
        let sent = pieces.iter().filter(|(side, _)| of_side(side));
        let sent: usize = sent.map(|(_, piece)| piece.len()).sum();
        let understood = pdus.iter().filter(|it| of_side(&it.by_initiator));
        let understood: usize = understood.map(WirePdu::bytes).sum();
        assert_eq!(
            understood, sent,
            "tshark does not see all bytes as PDUs (by the initiator: {by_initiator})"
        );
    }
    pdus
}

fn run(command: &mut Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("the program can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Reads tshark's XML. Each element is on a line of its own.
fn parse(pdml: &str) -> Vec<WirePdu> {
    let mut pdus: Vec<WirePdu> = Vec::new();
    let mut by_initiator = false;
    let mut within = false;
    let (mut asked, mut cut) = (None, false);
    for line in pdml.lines().map(str::trim_start) {
        let name = attribute(line, "name").unwrap_or_default();
        // What the initiator asked for only in part (SPC-4 §4.2.5.6), tshark takes for damaged: it says so in the
        // answers that are as long as the allocation length.
        if name.ends_with(".alloclen")
            || name.ends_with(".alloclen16")
            || name.ends_with(".alloclen32")
        {
            asked = attribute(line, "show");
        } else if line.starts_with("<proto ") && name == "scsi" {
            cut = !by_initiator && asked.is_some() && attribute(line, "size") == asked;
        }
        assert!(
            cut || name != "_ws.malformed"
                && !line.contains("severity\" showname=\"Severity level: Error"),
            "malformed: {line}"
        );
        if line.starts_with("<proto ") {
            within = name == "iscsi";
            if within {
                cut = false;
                pdus.push(WirePdu {
                    by_initiator,
                    ..WirePdu::default()
                });
            }
        } else if name == "tcp.srcport" {
            by_initiator = attribute(line, "show") == Some(PORTS[0]);
        } else if within
            && let Some(field) = name.strip_prefix("iscsi.")
            && let (Some(pdu), Some(show)) = (pdus.last_mut(), attribute(line, "show"))
        {
            assert!(!line.contains("Bad CRC32"), "{line}");
            pdu.fields.insert(field.to_owned(), show.to_owned());
        }
    }
    pdus
}

fn attribute<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let start = line.find(&format!(" {name}=\""))? + name.len() + 3;
    let rest = line.get(start..)?;
    rest.get(..rest.find('"')?)
}
