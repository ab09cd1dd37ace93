//! The command line programs as a test runs them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::binaries;

/// Commands of qemu-io: every kind of request. What is read must be what was written.
pub const QEMU_IO: [&str; 18] = [
    "write -P 0xab 1M 64k",
    "read -P 0xab 1M 64k",
    "write -P 0x11 2M 4M",
    "write -z 2M 1M",
    "write -z -u 3M 1M",
    "discard 4M 1M",
    "write -f -P 0x22 7M 4k",
    "aio_write -P 0x33 8M 1M",
    "aio_write -P 0x44 9M 1M",
    "aio_flush",
    "flush",
    "read -P 0 2M 3M",
    "read -P 0x11 5M 1M",
    "read -P 0x22 7M 4k",
    "read -P 0x33 8M 1M",
    "read -P 0x44 9M 1M",
    // Aligned to neither sectors nor blocks.
    "write -P 0x55 10000001 777",
    "read -P 0x55 10000001 777",
];

/// A directory with a server.conf of three servers at addresses where nobody is.
pub struct Bench {
    dir: TempDir,
}

impl Default for Bench {
    fn default() -> Bench {
        Bench::new()
    }
}

impl Bench {
    /// A new directory.
    pub fn new() -> Bench {
        let bench = Bench {
            dir: tempfile::tempdir().expect("the test directory can be used"),
        };
        bench.servers("0 127.9.9.1 /pss\n1 127.9.9.2 /pss\n2 127.9.9.3 /pss\n");
        bench
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leaves the directory for a person to look into, and says where it is.
    pub fn keep(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.path("")
    }

    /// Writes server.conf.
    pub fn servers(&self, text: impl AsRef<[u8]>) {
        fs::write(self.path("server.conf"), text).expect("the test directory can be used");
    }

    /// Runs a program in this directory on its server.conf; `args` are separated by blanks.
    pub fn run(&self, program: &str, args: &str) -> Outcome {
        let args: Vec<&str> = args.split_whitespace().collect();
        self.run_args(program, &args)
    }

    /// Runs a program in this directory on its server.conf.
    pub fn run_args(&self, program: &str, args: &[&str]) -> Outcome {
        let output = self
            .command(program)
            .args(args)
            .output()
            .expect("the program can be run");
        Outcome(output)
    }

    /// A program that will run in this directory on its server.conf.
    pub fn command(&self, program: &str) -> Command {
        let mut command = binaries::command(program);
        command
            .env("PSS_SERVERS", self.path("server.conf"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }
}

/// What a program did.
pub struct Outcome(pub Output);

impl Outcome {
    /// What it wrote to stdout.
    pub fn stdout(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).expect("text")
    }

    /// What it wrote to stderr.
    pub fn stderr(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).expect("text")
    }

    /// Succeeded.
    #[track_caller]
    pub fn done(&self) -> &Outcome {
        assert_eq!(self.0.status.code(), Some(0), "{}", self.stderr());
        self
    }

    /// Failed with this code; the message holds all these parts; nothing is on stdout.
    #[track_caller]
    pub fn fails(&self, code: i32, parts: &[&str]) -> &Outcome {
        let stderr = self.stderr();
        assert_eq!(self.0.status.code(), Some(code), "{stderr}");
        assert_eq!(self.stdout(), "");
        for part in parts {
            assert!(stderr.contains(part), "no '{part}' in: {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
        self
    }
}

/// A terminal: the end of the person, and that of the program.
///
/// # Panics
/// If the system has none to give.
pub fn terminal() -> (File, File) {
    let (mut person, mut program) = (-1, -1);
    #[expect(unsafe_code, reason = "there is no safe way to open a terminal")]
    // SAFETY: openpty writes two descriptors, which nobody else owns, and takes null for the rest.
    unsafe {
        let null = std::ptr::null_mut();
        let result = libc::openpty(&mut person, &mut program, null, null.cast(), null.cast());
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        (File::from_raw_fd(person), File::from_raw_fd(program))
    }
}

/// A program that runs; killed when dropped.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

impl Running {
    /// Starts a program; its stdout and stderr are read line by line.
    pub fn start(command: &mut Command) -> Running {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program can be run");
        let (sender, lines) = channel();
        let stdout = child.stdout.take().expect("it is piped");
        let stderr = child.stderr.take().expect("it is piped");
        let streams: [Box<dyn std::io::Read + Send>; 2] = [Box::new(stdout), Box::new(stderr)];
        for stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    // The test may have ended.
                    let _ = sender.send(line);
                }
            });
        }
        Running {
            child,
            lines,
            seen: String::new(),
        }
    }

    /// Starts a program on a terminal; what it says there is read line by line.
    pub fn start_on_terminal(command: &mut Command) -> (Running, File) {
        let (person, program) = terminal();
        let clone = || program.try_clone().expect("a descriptor can be doubled");
        let child = command
            .stdin(clone())
            .stdout(clone())
            .stderr(clone())
            .spawn()
            .expect("the program can be run");
        // The command holds copies, without which the terminal ends with the program.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null());
        let (sender, lines) = channel();
        let reader = person.try_clone().expect("a descriptor can be doubled");
        std::thread::spawn(move || {
            // A question ends with a colon and no end of line. A terminal whose program has ended gives an
            // error instead of an end.
            let mut part = Vec::new();
            for byte in BufReader::new(reader).bytes().map_while(Result::ok) {
                part.push(byte);
                if matches!(byte, b':' | b'\n') {
                    let _ = sender.send(String::from_utf8_lossy(&part).into_owned());
                    part.clear();
                }
            }
        });
        let running = Running {
            child,
            lines,
            seen: String::new(),
        };
        (running, person)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that holds `part`, and returns it.
    ///
    /// # Panics
    /// If it does not come in time, or the program ends without it.
    #[track_caller]
    pub fn wait_for(&mut self, part: &str, within: Duration) -> String {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push_str(&line);
                    self.seen.push('\n');
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no '{part}' in time in:\n{}", self.seen),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("ended without '{part}':\n{}", self.seen)
                }
            }
        }
    }

    /// Sends a signal, such as `INT`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.pid().to_string()])
            .status()
            .expect("kill can be run");
        assert!(status.success());
    }

    /// Waits for the end; the exit code, none after a signal.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn ends(&mut self, within: Duration) -> Option<i32> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status.code();
            }
            assert!(Instant::now() < end, "still runs:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything that it has written so far.
    pub fn output(&mut self) -> &str {
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        &self.seen
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
