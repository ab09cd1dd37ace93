//! `pss-iscsi` as a process before a cell, and what libiscsi's conformance suite says of it.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::binaries::tool;
use crate::processes::{Cell, PATIENCE, Process, wait_until};

/// Most tests of the suite take a second or two; those with thousands of writes, a minute on a slow disk.
const TEST_PATIENCE: Duration = Duration::from_secs(240);

/// A gateway that runs.
pub struct Gateway {
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub portal: SocketAddr,
    /// Its control socket.
    pub control: PathBuf,
}

impl Gateway {
    /// Starts a gateway on a targets.conf and waits until it listens and has its disks.
    ///
    /// # Panics
    /// If it does not.
    pub fn start(cell: &Cell, number: u16, conf: &str) -> Gateway {
        // A test of the suite sleeps for a minute and answers nothing meanwhile.
        Gateway::start_with(cell, number, conf, &["--probe", "60"])
    }

    /// [`Gateway::start`] with arguments of its own.
    ///
    /// # Panics
    /// As that.
    pub fn start_with(cell: &Cell, number: u16, conf: &str, args: &[&str]) -> Gateway {
        let file = cell.bench.path(&format!("targets{number}.conf"));
        fs::write(&file, conf).expect("the test directory can be used");
        // The addresses of NBD gateways of the same cell are free on other ports.
        let portal = SocketAddr::new(cell.nbd(0).ip(), 3260 + number);
        let mut command = cell.bench.command("pss-iscsi");
        command.args(["--portal", &portal.to_string()]);
        command.args(["--portal-group", &(number + 1).to_string()]);
        command.arg("--config").arg(&file);
        let control = cell.bench.path(&format!("iscsi{number}.sock"));
        command.arg("--control").arg(&control);
        command.args(args);
        let output = cell.bench.path(&format!("pss-iscsi{number}.log"));
        let mut process = Process::start(&format!("pss-iscsi {number}"), &mut command, output);
        wait_until("the gateway listens", PATIENCE, || {
            assert!(process.runs(), "{}", process.text());
            TcpStream::connect(portal).is_ok()
        });
        // Until its disks are there it tells initiators to come again, which libiscsi's tools do not.
        let targets = format!("iscsi --control {} --json targets", control.display());
        wait_until("the gateway has its disks", PATIENCE, || {
            let seen = cell.bench.run("pss", &targets).done().stdout();
            !seen.contains("\"opening\"")
        });
        Gateway {
            process,
            portal,
            control,
        }
    }

    /// The URL of a disk, with a user and secret (`user%secret@`) or without.
    pub fn url(&self, user: &str, target: &str, lun: u16) -> String {
        format!("iscsi://{user}{}/{target}/{lun}", self.portal)
    }
}

/// Runs one of libiscsi's programs; whether it succeeded, and what it wrote.
///
/// # Panics
/// If it cannot be run or does not end.
pub fn libiscsi(program: &str, args: &[&str]) -> (bool, String) {
    let (code, text) = run(program, "libiscsi-bin", args);
    (code == Some(0), text)
}

/// Runs one of QEMU's programs; whether it succeeded, and what it wrote.
///
/// # Panics
/// If it cannot be run, knows no iSCSI or does not end.
pub fn qemu(program: &str, args: &[&str]) -> (bool, String) {
    let (code, text) = run(program, "qemu-utils", args);
    let knows =
        !text.contains("nknown protocol 'iscsi'") && !text.contains("nknown driver 'iscsi'");
    assert!(
        knows,
        "install iSCSI for qemu with 'apt-get install qemu-block-extra': {text}"
    );
    (code == Some(0), text)
}

/// Runs a machine in QEMU until it ends; its exit code and what its serial port said.
///
/// # Panics
/// If QEMU cannot be run.
pub fn machine(args: &[&str]) -> (Option<i32>, String) {
    let card = Path::new("/usr/lib/ipxe/qemu/pxe-e1000.rom");
    assert!(
        card.exists(),
        "install iPXE with 'apt-get install ipxe-qemu'"
    );
    run("qemu-system-x86_64", "qemu-system-x86", args)
}

fn run(program: &str, package: &str, args: &[&str]) -> (Option<i32>, String) {
    let output = tempfile::NamedTempFile::new().expect("temporary files can be made");
    let file = output.reopen().expect("the file is there");
    let second = file.try_clone().expect("a descriptor can be doubled");
    let mut child = Command::new(tool(program, package))
        .args(args)
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(second)
        .spawn()
        .expect("the program can be run");
    let end = Instant::now() + TEST_PATIENCE;
    let text = || {
        let bytes = fs::read(output.path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            return (status.code(), text());
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            return (None, text() + "\nDID NOT END IN TIME");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What became of one test of the suite.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It passed. The suite calls a test that it skipped passed as well; that is `Skipped` here.
    Passed,
    /// The disk or the machine does not have what it is about.
    Skipped,
    /// It failed, or did not end.
    Failed,
}

/// Names of all tests of the suite, as `Suite.Test`.
///
/// # Panics
/// If the suite cannot list them.
pub fn suite() -> Vec<String> {
    let (_, text) = libiscsi("iscsi-test-cu", &["-l"]);
    let names = text.lines().filter_map(|line| {
        let name = line.trim().strip_prefix("ALL.")?;
        name.contains('.').then(|| name.to_owned())
    });
    let names: Vec<String> = names.collect();
    assert!(names.len() > 200, "{text}");
    names
}

/// Runs one test of the suite in a process of its own, on a disk by one or two paths.
pub fn suite_test(name: &str, urls: &[String]) -> (Verdict, String) {
    let test = format!("ALL.{name}");
    let mut args = vec!["-d", "-S", "-f", "-v", "-t", &test];
    args.extend(urls.iter().map(String::as_str));
    let (code, text) = run("iscsi-test-cu", "libiscsi-bin", &args);
    // "tests  total ran passed failed inactive"; nothing is to be had from the exit code alone.
    let counts = text.lines().find_map(|line| {
        let fields = line.trim().strip_prefix("tests ")?;
        Some(
            fields
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        )
    });
    let passed = counts.is_some_and(|it| it.get(1..4) == Some(&["1", "1", "0"].map(str::to_owned)));
    let verdict = if code != Some(0) || !passed {
        Verdict::Failed
    } else if text.contains("[SKIPPED]") {
        Verdict::Skipped
    } else {
        Verdict::Passed
    };
    (verdict, text)
}
