//! Transcripts of the command line: what a person types, and what is answered, to the letter.
//!
//! They are in `transcripts/`, in trycmd's format: `[..]` stands for anything within a line, `...` for any lines.
//! `TRYCMD=overwrite cargo test -p pss-tests --test transcripts` writes what is answered now into them; read the
//! difference before you keep it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pss_tests::binaries::{self, tool};
use pss_tests::package::Package;
use pss_tests::processes::wait_until;
use pss_tests::programs::{Bench, Running};
use trycmd::TestCases;

#[path = "transcripts/coverage.rs"]
mod coverage;

const SOON: Duration = Duration::from_secs(30);

/// What lies in the directory in which transcripts are played.
const FILES: [(&str, &str); 6] = [
    ("wrong.conf", "0 127.0.0.1 /pss\n0 127.0.0.1 /pss2\n"),
    (
        "targets.conf",
        "<target iqn.2001-03.jp.tritech:tgtd-pss>\n  <backing-store vol001>\n    bs-type pss\n    lun 1\n  \
         </backing-store>\n  incominguser iscsi_pss iscsi_pss000\n</target>\n",
    ),
    (
        "wrong-targets.conf",
        "<target iqn.2001-03.jp.tritech:tgtd-pss>\n  backing-stor vol001\n</target>\n",
    ),
    (
        "pss.toml",
        "[[iscsi.target]]\nname = \"iqn.2001-03.jp.tritech:tgtd-pss\"\n\n\
         [[iscsi.target.lun]]\nlun = 1\nvolume = \"vol001\"\n",
    ),
    ("wrong.toml", "[[iscsi.target]]\nnam = 1\n"),
    ("wrong.policy", "vol001 read-only\n* connections=many\n"),
];

fn transcripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("transcripts")
}

/// A place in which transcripts are played, one after the other.
struct Stage {
    bench: Bench,
    host: &'static str,
}

impl Stage {
    /// With a server.conf of three servers at one address, whose data are in the stage's directory.
    fn new(host: &'static str) -> Stage {
        let bench = Bench::new();
        let line = |id: u8| {
            format!(
                "{id} {host} {}\n",
                bench.path(&format!("PFS-{id}")).display()
            )
        };
        let lines: String = (0..3).map(line).collect();
        bench.servers(&lines);
        fs::create_dir_all(bench.path("here/empty")).unwrap();
        for (name, content) in FILES {
            fs::write(bench.path("here").join(name), content).unwrap();
        }
        // Two chunks, with something in the first and in the second block of the first, and in the second.
        let mut disk = vec![0; 8 << 20];
        disk[..20].copy_from_slice(b"the first block here");
        disk[4096..4108].copy_from_slice(b"and a second");
        disk[4 << 20..][..16].copy_from_slice(b"the second chunk");
        fs::write(bench.path("here/disk.img"), disk).unwrap();
        Stage { bench, host }
    }

    /// Plays a transcript in the directory `here` of the stage.
    fn play(&self, name: &str, prepare: impl FnOnce(&TestCases)) {
        let original = transcripts().join(format!("{name}.trycmd"));
        let copy = self.bench.path(&format!("{name}.trycmd"));
        fs::copy(&original, &copy).unwrap();
        let place = self.bench.path(&format!("{name}.in"));
        // trycmd runs commands in NAME.in.
        symlink(self.bench.path("here"), &place).unwrap();
        let cases = TestCases::new();
        for program in coverage::programs() {
            cases.register_bin(&*program, binaries::path(&program));
        }
        cases.register_bin("until", binaries::path("until"));
        // Programs that others run find each other.
        let path = std::env::var("PATH").unwrap();
        let programs = binaries::path("pss").parent().unwrap().to_owned();
        cases.env("PATH", format!("{}:{path}", programs.display()));
        cases.env(
            "PSS_SERVERS",
            self.bench.path("server.conf").to_str().unwrap(),
        );
        cases.env("NO_COLOR", "1");
        let directory = self
            .bench
            .path("")
            .to_str()
            .unwrap()
            .trim_end_matches('/')
            .to_owned();
        cases.insert_var("[DIR]", directory).unwrap();
        cases.insert_var("[HOST]", self.host).unwrap();
        prepare(&cases);
        cases.timeout(Duration::from_secs(60));
        cases.case(&copy);
        cases.run();
        if std::env::var_os("TRYCMD").is_some_and(|mode| mode == "overwrite") {
            fs::copy(&copy, &original).unwrap();
        }
    }
}

/// A cell of three servers.
struct Servers {
    _running: Vec<Running>,
}

impl Servers {
    fn start(stage: &Stage) -> Servers {
        let start = |id: u8| {
            let id = id.to_string();
            stage
                .bench
                .run_args("pssd", &["format", "--id", &id])
                .done();
            let mut command = stage.bench.command("pssd");
            Running::start(command.args(["start", "--id", &id]))
        };
        let servers = Servers {
            _running: (0..3).map(start).collect(),
        };
        wait_until("the cell works", SOON, || {
            stage.bench.run("pss", "volume list").0.status.code() == Some(0)
        });
        servers
    }
}

/// No command is without a transcript, of what it does and of how it fails.
#[test]
fn every_command_is_in_a_transcript() {
    let lines = coverage::lines(&transcripts());
    let missing = coverage::missing(&coverage::commands(), &lines);
    assert!(
        missing.is_empty(),
        "not in tests/transcripts/*.trycmd:\n{}",
        missing.join("\n")
    );
}

/// Commands without a cell: what can be said wrongly before anything is asked.
#[test]
fn without_a_cell() {
    let stage = Stage::new("127.0.91.1");
    stage.play("files", |_| {});
    stage.play("no_cell", |_| {});
}

/// Commands on a cell that works.
#[test]
fn on_a_cell() {
    let stage = Stage::new("127.0.91.2");
    let _servers = Servers::start(&stage);
    for name in ["events", "volumes", "namespace", "servers"] {
        stage.play(name, |_| {});
    }
}

/// Servers and gateways, which run until they are told to stop; and what may be in their way.
#[test]
fn what_runs_until_it_is_stopped() {
    let stage = Stage::new("127.0.91.4");
    // As if a former run had chosen the address, so that no other test is met.
    let up = stage.bench.path("here/up");
    fs::create_dir(&up).unwrap();
    let record = format!("0 {} {}\n", stage.host, up.join("server0").display());
    fs::write(up.join("server.conf"), record).unwrap();
    let _taken = [10810, 3261].map(|port| TcpListener::bind((stage.host, port)).unwrap());
    stage.play("daemons", |cases| {
        // Whether this machine has a syslog or not.
        let socket = stage.bench.path("nobody");
        cases.env("PSS_SYSLOG_SOCKET", socket.to_str().unwrap());
    });
}

/// `pss iscsi` and the programs in tgt's place, with a gateway and an initiator that is logged in.
#[test]
fn before_a_gateway() {
    let stage = Stage::new("127.0.91.5");
    let _servers = Servers::start(&stage);
    for name in ["vol001", "vol002"] {
        let create = format!("volume create {name} 64M");
        stage.bench.run("pss", &create).done();
    }
    let mut gateway = stage.bench.command("pss-iscsi");
    gateway.args(["--portal", stage.host, "--config"]);
    gateway.arg(stage.bench.path("here/targets.conf"));
    gateway.args(["--control", "iscsi.sock"]);
    let mut gateway = Running::start(&mut gateway);
    gateway.wait_for("serving", SOON);
    let targets = "iscsi --control iscsi.sock targets";
    wait_until("the gateway has its disks", SOON, || {
        stage.bench.run("pss", targets).stdout().contains("ready")
    });
    let _initiator = Initiator::start(&stage);
    stage.play("iscsi", |cases| {
        let control = stage.bench.path("iscsi.sock");
        cases.env("PSS_ISCSI_CONTROL", control.to_str().unwrap());
    });
}

/// Mounts, which only root can make.
#[test]
fn mounts() {
    let stage = Stage::new("127.0.91.6");
    let _servers = Servers::start(&stage);
    let create = "volume create vol001 64M";
    stage.bench.run("pss", create).done();
    fs::create_dir(stage.bench.path("here/mnt")).unwrap();
    let helper = stage.bench.path("mount.fuse.pss");
    symlink(binaries::path("pss-fuse"), &helper).unwrap();
    let syslog = stage.bench.path("syslog");
    let _syslog = UnixDatagram::bind(&syslog).unwrap();
    stage.play("mounts", |cases| {
        cases.register_bin("mount.fuse.pss", &helper);
        cases.env("PSS_SYSLOG_SOCKET", syslog.to_str().unwrap());
    });
}

/// Every command of the manual of 2011 as it stands there, from the package that has them, and some wrong turns.
#[test]
fn the_manual() {
    let stage = Stage::new("127.0.91.3");
    play_manual(&stage, "manual");
    // The manual has one server on a machine, which needs no number then.
    let stage = Stage::new("127.0.91.7");
    let path = stage.bench.path("PFS-0");
    let record = format!("0 {} {}\n", stage.host, path.display());
    stage.bench.servers(record);
    play_manual(&stage, "manual_one_server");
}

/// Each of the manual's lines is played, letter by letter, and does what it is for.
#[test]
fn the_manual_is_complete() {
    let lines = coverage::lines(&transcripts());
    for line in [
        "pss_delper.sh",
        "/etc/init.d/pssd start",
        "/etc/init.d/pssd stop",
        "/etc/init.d/pssd restart",
        "/etc/init.d/pssd restart autonomic 2",
        "/etc/init.d/pssd restart autonomic",
        "pss_lookup-server.sh",
        "pss_set_ssh.sh",
        "PSSShutdown 0",
        "PFSProbe 0 accept",
        "PFSProbe 1 outbound",
        "PFSProbe 2 fd",
        "PSSAdmin 0 control",
        "PSSAdmin 1 paxos",
        "PSSAdmin 1 paxos 1",
        "pss_lookup_port.sh",
        "createISCSIVol vol001 1T",
        "PFSClient readdir /",
        "PFSClient stat /vol001",
        "PFSClient read /vol003/00/00/01 file1",
    ] {
        let is_played = |played: &&coverage::Line| played.text == line && played.succeeds;
        assert!(
            lines.iter().any(|played| is_played(&played)),
            "no transcript has '{line}' with success"
        );
    }
}

fn play_manual(stage: &Stage, name: &str) {
    let package = Package::unpack(&stage.bench);
    stage.play(name, |cases| {
        for link in coverage::links() {
            cases.register_bin(&*link, package.bin().join(&link));
        }
        cases.register_bin(coverage::SCRIPT, package.script());
        for (name, value) in package.environment() {
            cases.env(name, value);
        }
        // There is no terminal for the question whether data may be dropped.
        cases.env("PSS_YES", "1");
    });
}

/// An initiator that others wrote, which stays logged in and reads.
struct Initiator(Child);

impl Initiator {
    fn start(stage: &Stage) -> Initiator {
        let mut command = Command::new(tool("iscsi-perf", "libiscsi-bin"));
        command.args(["-i", "iqn.1994-05.com.example:mac1", "-m", "1", "-t", "300"]);
        command.arg(format!(
            "iscsi://iscsi_pss%iscsi_pss000@{}/iqn.2001-03.jp.tritech:tgtd-pss/1",
            stage.host
        ));
        command.stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let initiator = Initiator(command.spawn().unwrap());
        let sessions = "iscsi --control iscsi.sock sessions";
        wait_until("the initiator has logged in", SOON, || {
            let sessions = stage.bench.run("pss", sessions).stdout();
            sessions.contains("mac1") && !sessions.contains("discovery")
        });
        initiator
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
