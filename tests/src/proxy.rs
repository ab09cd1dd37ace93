//! A network that does more than lose messages: it sits in front of one server, passes everything on,
//! and adds copies that were changed, cut, blown up or heard before. In streams it changes bits.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::rng::Rng;

/// How often threads look whether they are to end.
const TICK: Duration = Duration::from_millis(50);
/// Datagrams and beginnings of streams that are kept.
const KEPT: usize = 500;
const STREAM_KEPT_BYTES: usize = 1 << 20;
/// The longest datagram of IPv4.
const DATAGRAM_BYTES_MAX: usize = 65_507;

/// What is done to messages; shared by the proxies of a cell.
#[derive(Default)]
pub struct Mischief {
    /// In how many of a thousand cases a bad datagram follows a good one.
    pub datagrams: AtomicU64,
    /// In how many of a thousand cases a bit of what came in one piece from a stream is changed.
    pub streams: AtomicU64,
    /// Bad datagrams that were sent.
    pub datagrams_sent: AtomicU64,
    /// Bits that were changed in streams.
    pub bits_changed: AtomicU64,
    heard: Mutex<Vec<Vec<u8>>>,
    streams_heard: Mutex<Vec<Vec<u8>>>,
    stop: AtomicBool,
}

impl Mischief {
    /// Datagrams that were heard, from whom and for whom ever.
    pub fn datagrams_heard(&self) -> Vec<Vec<u8>> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.clone()
    }

    /// How connections began, in the direction to the server.
    pub fn streams_heard(&self) -> Vec<Vec<u8>> {
        let heard = self.streams_heard.lock();
        heard.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What a server is reached through.
pub struct Proxy {
    mischief: Arc<Mischief>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Stands at `here` for server `id` at `there`.
    ///
    /// # Panics
    /// If the ports cannot be had.
    pub fn start(id: u8, here: IpAddr, there: IpAddr, mischief: &Arc<Mischief>) -> Proxy {
        let udp = move |host| SocketAddr::new(host, 4000 + u16::from(id));
        let tcp = move |host| SocketAddr::new(host, 4010 + u16::from(id));
        let socket = UdpSocket::bind(udp(here)).expect("the address is the test's own");
        let listener = TcpListener::bind(tcp(here)).expect("the address is the test's own");
        let (first, second) = (Arc::clone(mischief), Arc::clone(mischief));
        let seed = u64::from(id);
        Proxy {
            mischief: Arc::clone(mischief),
            threads: vec![
                std::thread::spawn(move || datagrams(&first, &socket, udp(there), seed)),
                std::thread::spawn(move || connections(&second, &listener, tcp(there), seed)),
            ],
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mischief.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It says itself why it has panicked.
            let _ = thread.join();
        }
    }
}

fn datagrams(mischief: &Mischief, socket: &UdpSocket, to: SocketAddr, seed: u64) {
    let mut rng = Rng::new(seed);
    let out = UdpSocket::bind((to.ip(), 0)).expect("a loopback address");
    socket
        .set_read_timeout(Some(TICK))
        .expect("the time is not zero");
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while !mischief.stops() {
        let Ok((length, _)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let good = &buffer[..length];
        // Nobody may listen there now.
        let _ = out.send_to(good, to);
        let mut heard = mischief
            .heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if heard.len() < KEPT {
            heard.push(good.to_vec());
        } else {
            let place = rng.below(KEPT as u64) as usize;
            heard[place] = good.to_vec();
        }
        if rng.chance(mischief.datagrams.load(Ordering::Relaxed)) {
            let bad = bad_datagram(good, &heard, &mut rng);
            let _ = out.send_to(&bad, to);
            mischief.datagrams_sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn bad_datagram(good: &[u8], heard: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut bad = good.to_vec();
    match rng.below(6) {
        0 => bad.truncate(rng.below(good.len() as u64) as usize),
        1 => change_bit(&mut bad, rng),
        2 => bad.resize(DATAGRAM_BYTES_MAX, 0),
        // The beginning fits, the rest is of another message.
        3 => {
            let other = rng.pick(heard);
            let cut = 52.min(good.len()).min(other.len());
            bad.truncate(cut);
            bad.extend_from_slice(&other[cut..]);
        }
        _ => bad.clone_from(rng.pick(heard)),
    }
    bad
}

fn change_bit(bytes: &mut [u8], rng: &mut Rng) {
    let bit = rng.below(bytes.len() as u64 * 8);
    if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
        *byte ^= 1 << (bit % 8);
    }
}

fn connections(mischief: &Arc<Mischief>, listener: &TcpListener, to: SocketAddr, seed: u64) {
    listener
        .set_nonblocking(true)
        .expect("a socket can be non-blocking");
    let mut rng = Rng::new(seed + 1000);
    let mut threads = Vec::new();
    while !mischief.stops() {
        let Ok((caller, _)) = listener.accept() else {
            std::thread::sleep(TICK / 10);
            continue;
        };
        // Nobody may listen there: then the caller is sent away.
        let Ok(server) = TcpStream::connect(to) else {
            continue;
        };
        for stream in [&caller, &server] {
            let prepared = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| stream.set_read_timeout(Some(TICK)));
            prepared.expect("options of a socket");
        }
        for keeps in [true, false] {
            let (from, to) = match keeps {
                true => (caller.try_clone(), server.try_clone()),
                false => (server.try_clone(), caller.try_clone()),
            };
            let (from, to) = (from.expect("descriptors"), to.expect("descriptors"));
            let (mischief, rng) = (Arc::clone(mischief), Rng::new(rng.next()));
            threads.push(std::thread::spawn(move || {
                pass_on(&mischief, from, to, keeps, rng);
            }));
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn pass_on(mischief: &Mischief, mut from: TcpStream, mut to: TcpStream, keeps: bool, mut rng: Rng) {
    let mut begins = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while !mischief.stops() {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if is_timeout(&error) => continue,
            Err(_) => break,
        };
        let bytes = &mut buffer[..length];
        if keeps && begins.len() < STREAM_KEPT_BYTES {
            begins.extend_from_slice(bytes);
        }
        if rng.chance(mischief.streams.load(Ordering::Relaxed)) {
            change_bit(bytes, &mut rng);
            mischief.bits_changed.fetch_add(1, Ordering::Relaxed);
        }
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        // It may be closed already.
        let _ = stream.shutdown(Shutdown::Both);
    }
    let heard = mischief.streams_heard.lock();
    let mut heard = heard.unwrap_or_else(PoisonError::into_inner);
    if keeps && heard.len() < KEPT {
        heard.push(begins);
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock
            | std::io::ErrorKind::TimedOut
            | std::io::ErrorKind::Interrupted
    )
}
