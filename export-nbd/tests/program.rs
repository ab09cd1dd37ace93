//! The program `pss-nbd`, without a cell that answers.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
const LIST: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0";

/// A directory with a server.conf of a server that does not run.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("server.conf"), "0 127.0.9.77 /pss\n").unwrap();
    directory
}

fn program(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pss-nbd"));
    command
        .current_dir(directory)
        .env("PSS_SERVERS", "server.conf")
        .env_remove("PSS_KEY")
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null());
    command
}

fn failure(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// Waits until the program listens.
fn connect(socket: &Path) -> UnixStream {
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, signal: &str) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args([signal, &id]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn serves_and_stops_when_told() {
    let directory = directory();
    let socket = directory.path().join("nbd.sock");
    let notify = directory.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    std::fs::write(directory.path().join("policy"), "vol allow=unix\n").unwrap();
    let mut child = program(directory.path())
        .args([
            "--timeout",
            "1",
            "--unix",
            "nbd.sock",
            "--export-policy",
            "policy",
        ])
        .env("NOTIFY_SOCKET", &notify)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let told = |text: &str| {
        let mut message = [0; 64];
        // Signals that this process gets, such as of a child that ends, interrupt it.
        let count = loop {
            match manager.recv(&mut message) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                received => break received.unwrap(),
            }
        };
        let message = String::from_utf8_lossy(&message[..count]).into_owned();
        assert!(message.contains(text), "{message}");
    };
    told("READY=1");

    // No leader: the client is told so, and not that there are no exports.
    let mut stream = connect(&socket);
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(LIST).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..16], [0x80, 0, 0, 7]);

    // A policy that cannot be read changes nothing.
    std::fs::write(directory.path().join("policy"), "vol\nvol nonsense\n").unwrap();
    signal(&child, "-HUP");
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, "-TERM");
    told("STOPPING=1");
    assert!(child.wait().unwrap().success());
    assert!(!socket.exists());
    let mut log = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(log.contains("stays as it was"), "{log}");
    assert!(log.contains("line 2"), "{log}");
}

#[test]
fn mistakes_are_told_with_the_place() {
    let directory = directory();
    std::fs::write(
        directory.path().join("policy"),
        "# all\n* connections=many\n",
    )
    .unwrap();
    let run = |arguments: &[&str]| failure(program(directory.path()).args(arguments));

    let (code, text) = run(&["--unix", "s", "--export-policy", "policy"]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("policy") && text.contains("line 2") && text.contains("connections=many"),
        "{text}"
    );
    let (code, text) = run(&["--servers", "none.conf", "--unix", "s"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("none.conf"), "{text}");
    let (code, text) = run(&["--unix", "none/s"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.starts_with("pss-nbd: ") && text.contains("none/s"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    let (code, text) = run(&["--stdio"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("standard input is not a socket"), "{text}");
    assert_eq!(run(&["--listen", "nonsense"]).0, Some(2));
    assert_eq!(run(&["--timeout", "0"]).0, Some(2));
}
