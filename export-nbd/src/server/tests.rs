//! Clients that misbehave, and servers that stop, over real sockets.

use std::sync::Arc;
use std::time::Duration;

use pss_core::volume::device::{DeviceError, Fate};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::export::Policy;
use crate::memory::{MemoryDevice, MemoryVolumes};

const SIZE: u64 = 64 << 20;
/// Nothing here takes a second; this ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    server: Arc<Server>,
    volumes: Arc<MemoryVolumes>,
    serving: JoinHandle<()>,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new(limits: Limits) -> Fixture {
        let volumes = MemoryVolumes::new([MemoryDevice::new("vol", SIZE)]);
        let exports = Exports::new(Arc::clone(&volumes) as _, Policy::default());
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new(exports, limits);
        let listener = Listener::unix(&directory.path().join("s")).unwrap();
        let serving = tokio::spawn(Arc::clone(&server).serve(listener));
        Fixture {
            server,
            volumes,
            serving,
            directory,
        }
    }

    fn device(&self) -> Arc<MemoryDevice> {
        self.volumes.get("vol").unwrap()
    }

    async fn connect(&self) -> Client {
        let path = self.directory.path().join("s");
        Client(UnixStream::connect(path).await.unwrap())
    }

    /// A client in the transmission phase, with simple replies.
    async fn client(&self) -> Client {
        let mut client = self.connect().await;
        client
            .send(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vol")
            .await;
        client.receive(18 + 10).await;
        client
    }
}

struct Client(UnixStream);

impl Client {
    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        timeout(PATIENCE, self.0.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        bytes
    }

    async fn request(&mut self, command: u16, offset: u64, length: u32) {
        self.send(&request(command, offset, length)).await;
    }

    /// Error of the next simple reply.
    async fn error(&mut self) -> u32 {
        let reply = self.receive(16).await;
        assert_eq!(reply[..4], [0x67, 0x44, 0x66, 0x98]);
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    async fn closed(&mut self) {
        let mut byte = [0];
        let read = timeout(PATIENCE, self.0.read(&mut byte)).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "got {read:?}");
    }
}

fn request(command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&[7; 8]);
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

async fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "condition never came true");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn silent_client_is_closed_after_the_handshake_timeout() {
    let handshake_timeout = Duration::from_millis(100);
    let fixture = Fixture::new(Limits {
        handshake_timeout,
        ..Limits::default()
    });
    let mut silent = fixture.connect().await;
    silent.receive(18).await;
    silent.closed().await;
    // A client that sends a byte now and then gains no time.
    let mut slow = fixture.connect().await;
    slow.receive(18).await;
    let started = Instant::now();
    while slow.0.write_all(b"\0").await.is_ok() {
        tokio::time::sleep(handshake_timeout / 5).await;
        assert!(started.elapsed() < PATIENCE);
    }
    // In transmission there is no deadline.
    let mut idle = fixture.client().await;
    tokio::time::sleep(3 * handshake_timeout).await;
    idle.request(3, 0, 0).await;
    assert_eq!(idle.error().await, 0);
}

#[tokio::test]
async fn connections_are_bounded_and_places_come_back() {
    let fixture = Fixture::new(Limits {
        connections_max: 2,
        ..Limits::default()
    });
    let first = fixture.client().await;
    let _second = fixture.client().await;
    fixture.connect().await.closed().await;
    drop(first);
    let places = Arc::clone(&fixture.server.places);
    until(|| places.available_permits() == 1).await;
    fixture.client().await;
}

#[tokio::test]
async fn requests_behind_the_handshake_are_served() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.connect().await;
    let mut all = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vol".to_vec();
    all.extend_from_slice(&request(3, 0, 0));
    client.send(&all).await;
    client.receive(28).await;
    assert_eq!(client.error().await, 0);
}

#[tokio::test]
async fn replies_come_in_the_order_of_completion() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    let device = fixture.device();
    device.hold();
    for cookie in 0..100_u8 {
        let mut bytes = request(0, 0, 1);
        bytes[8] = cookie;
        client.send(&bytes).await;
    }
    until(|| device.held() == 100).await;
    device.release();
    for cookie in (0..100).rev() {
        assert_eq!(client.receive(17).await[8], cookie);
    }
}

#[tokio::test]
async fn long_and_short_writes_in_one_stream() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    let mut expected = vec![0; SIZE as usize];
    let mut at = 0;
    let mut stream = Vec::new();
    let lengths = [
        1,
        65536,
        4096,
        65535,
        300_000,
        65537,
        28,
        1 << 20,
        4096,
        262_144,
        7,
    ];
    for (number, length) in lengths.into_iter().cycle().take(40).enumerate() {
        stream.extend_from_slice(&request(1, at as u64, length as u32));
        let data: Vec<u8> = (0..length).map(|byte| (byte * 7 + number) as u8).collect();
        stream.extend_from_slice(&data);
        expected[at..at + length].copy_from_slice(&data);
        at += length;
    }
    client.send(&stream).await;
    for _ in 0..40 {
        assert_eq!(client.error().await, 0);
    }
    assert!(fixture.device().content() == expected);
    // And back, in one read of 32 MiB.
    client.request(0, 0, 32 << 20).await;
    assert_eq!(client.error().await, 0);
    assert!(client.receive(32 << 20).await == expected[..32 << 20]);
}

#[tokio::test]
async fn client_that_does_not_read_holds_nobody_up() {
    let fixture = Fixture::new(Limits::default());
    let mut stubborn = fixture.client().await;
    // 4 GiB of replies, of which the server keeps two at most.
    stubborn.send(&request(0, 0, 32 << 20).repeat(128)).await;
    let mut other = fixture.client().await;
    other.request(0, 0, 4096).await;
    assert_eq!(other.error().await, 0);
    other.receive(4096).await;
    // When it reads after all, it gets all.
    for _ in 0..3 {
        assert_eq!(stubborn.error().await, 0);
        stubborn.receive(32 << 20).await;
    }
}

#[tokio::test]
async fn client_that_announces_too_much_and_vanishes() {
    let fixture = Fixture::new(Limits::default());
    let places = Arc::clone(&fixture.server.places);
    let free = places.available_permits();
    for length in [100, 4096, 1 << 20, 32 << 20, u32::MAX] {
        let mut client = fixture.client().await;
        client.request(1, 0, length).await;
        client.send(&[1; 50]).await;
    }
    let mut cut = fixture.client().await;
    cut.send(&request(0, 0, 1)[..20]).await;
    drop(cut);
    until(|| places.available_permits() == free).await;
    assert!(fixture.device().content().iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn place_of_a_vanished_client_is_kept_until_its_requests_end() {
    let fixture = Fixture::new(Limits::default());
    let places = Arc::clone(&fixture.server.places);
    let free = places.available_permits();
    let device = fixture.device();
    device.hold();
    let mut client = fixture.client().await;
    client.request(0, 0, 4096).await;
    until(|| device.held() == 1).await;
    drop(client);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(places.available_permits(), free - 1);
    device.release();
    until(|| places.available_permits() == free).await;
}

#[tokio::test]
async fn half_closed_client_gets_its_replies() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    fixture.device().hold();
    client.request(0, 0, 4).await;
    client.0.shutdown().await.unwrap();
    until(|| fixture.device().held() == 1).await;
    fixture.device().release();
    assert_eq!(client.error().await, 0);
    client.receive(4).await;
    client.closed().await;
}

#[tokio::test]
async fn nonsense_closes_after_the_replies_in_flight() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    fixture.device().hold();
    client.request(0, 0, 4).await;
    client
        .send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await;
    until(|| fixture.device().held() == 1).await;
    fixture.device().release();
    assert_eq!(client.error().await, 0);
    client.receive(4).await;
    client.closed().await;
}

#[tokio::test]
async fn stop_answers_what_is_in_flight_and_closes() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    let mut negotiating = fixture.connect().await;
    negotiating.receive(18).await;
    fixture.device().hold();
    client.request(0, 0, 4).await;
    until(|| fixture.device().held() == 1).await;
    fixture.server.stop();
    negotiating.closed().await;
    let path = fixture.directory.path().join("s");
    until(|| !path.exists()).await;
    // A request that comes now is not served: the client sends it again to the next server.
    client.request(0, 0, 4).await;
    fixture.device().release();
    assert_eq!(client.error().await, 0, "no ESHUTDOWN");
    client.receive(4).await;
    client.closed().await;
    timeout(PATIENCE, fixture.serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn stop_does_not_wait_for_ever() {
    let fixture = Fixture::new(Limits {
        stop_timeout: Duration::from_millis(50),
        ..Limits::default()
    });
    let mut client = fixture.client().await;
    let device = fixture.device();
    device.hold();
    client.request(0, 0, 4).await;
    until(|| device.held() == 1).await;
    fixture.server.stop();
    timeout(PATIENCE, fixture.serving).await.unwrap().unwrap();
    client.closed().await;
    // The request ends after its connection.
    device.release();
}

#[tokio::test]
async fn deleted_volume_closes_its_connections() {
    let fixture = Fixture::new(Limits::default());
    let mut idle = fixture.client().await;
    let mut busy = fixture.client().await;
    let device = fixture.device();
    device.hold();
    busy.request(0, 0, 4).await;
    until(|| device.held() == 1).await;
    device.set_fate(Fate::Deleted);
    idle.closed().await;
    device.release();
    assert_eq!(busy.error().await, 108);
    busy.closed().await;
}

#[tokio::test]
async fn fenced_session_fails_requests_until_there_is_a_new_one() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    let device = fixture.device();
    device.hold();
    client.request(0, 0, 4).await;
    until(|| device.held() == 1).await;
    device.set_fate(Fate::Fenced);
    device.release();
    assert_eq!(client.error().await, 5);
    device.set_fate(Fate::Alive);
    client.request(0, 0, 4).await;
    assert_eq!(client.error().await, 0);
}

#[tokio::test]
async fn resize_is_seen_by_the_next_connection() {
    let fixture = Fixture::new(Limits::default());
    let mut old = fixture.client().await;
    fixture.device().resize(SIZE * 2);
    old.request(0, SIZE, 4).await;
    assert_eq!(old.error().await, 22);
    let mut new = fixture.client().await;
    new.request(0, SIZE, 4).await;
    assert_eq!(new.error().await, 0);
}

#[tokio::test]
async fn failing_device_gives_errors_and_the_connection_stays() {
    let fixture = Fixture::new(Limits::default());
    let mut client = fixture.client().await;
    for (failure, error) in [
        (DeviceError::Unavailable, 5),
        (DeviceError::NoSpace, 28),
        (DeviceError::Io, 5),
    ] {
        fixture.device().set_failing(Some(failure));
        client.request(1, 0, 3).await;
        client.send(b"abc").await;
        assert_eq!(client.error().await, error);
    }
    fixture.device().set_failing(None);
    client.request(3, 0, 0).await;
    assert_eq!(client.error().await, 0);
}

#[tokio::test]
async fn unix_socket_of_a_server_that_is_gone_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::unix(&path).unwrap();
    assert!(Listener::unix(&path).is_err(), "in use");
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    assert!(Listener::unix(&path).is_err(), "not ours to remove");
}

/// The independent client of the crate `nbd`: EXPORT_NAME, 124 zeroes, simple replies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_style_client_over_tcp() {
    use std::io::{Read, Seek, SeekFrom, Write};

    let fixture = Fixture::new(Limits::default());
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = listener.uri("nbd");
    let address = uri
        .trim_start_matches("nbd://")
        .trim_end_matches('/')
        .to_owned();
    tokio::spawn(Arc::clone(&fixture.server).serve(listener));
    let client = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let export = nbd::client::handshake(&mut stream, b"vol").unwrap();
        assert_eq!((export.size, export.readonly), (SIZE, false));
        assert!(export.send_flush && export.send_trim);
        let mut client = nbd::client::NbdClient::new(&mut stream, &export);
        client.seek(SeekFrom::Start(5000)).unwrap();
        client.write_all(b"from an old client").unwrap();
        client.flush().unwrap();
        client.seek(SeekFrom::Start(5000)).unwrap();
        let mut read = [0; 18];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"from an old client");
    });
    client.await.unwrap();
}
