//! Transcripts of the command line: what a person types, and what is answered, to the letter.
//!
//! They are in `transcripts/`, in trycmd's format: `[..]` stands for anything within a line, `...` for any lines.
//! `TRYCMD=overwrite cargo test -p pss-tests --test transcripts` writes what is answered now into them; read the
//! difference before you keep it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pss_tests::binaries;
use pss_tests::programs::{Bench, Running};
use trycmd::TestCases;

const SOON: Duration = Duration::from_secs(30);
const PROGRAMS: [&str; 6] = ["pss", "pssd", "pss-fuse", "pss-nbd", "pss-iscsi", "pss-up"];

/// What lies in the directory in which transcripts are played.
const FILES: [(&str, &str); 5] = [
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
        for program in PROGRAMS {
            cases.register_bin(program, binaries::path(program));
        }
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
        let begin = Instant::now();
        while stage.bench.run("pss", "volume list").0.status.code() != Some(0) {
            assert!(begin.elapsed() < SOON, "the cell does not begin to work");
            std::thread::sleep(Duration::from_millis(50));
        }
        servers
    }
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
    for name in ["volumes", "namespace", "servers"] {
        stage.play(name, |_| {});
    }
}

/// Every command of the manual of 2011 as it stands there, from the package that has them, and some wrong turns.
#[test]
fn the_manual() {
    let stage = Stage::new("127.0.91.3");
    let package = Package::unpack(&stage);
    stage.play("manual", |cases| {
        for name in [
            "PFSClient",
            "PFSProbe",
            "PSSAdmin",
            "PSSShutdown",
            "createISCSIVol",
            "pss_delper.sh",
            "pss_lookup-server.sh",
            "pss_lookup_port.sh",
            "pss_set_ssh.sh",
        ] {
            cases.register_bin(name, package.bin().join(name));
        }
        cases.register_bin("/etc/init.d/pssd", package.script());
        for (name, value) in package.environment() {
            cases.env(name, value);
        }
    });
}

/// The package of the manual's commands, unpacked beside the programs that it leads to. What its script has started is
/// stopped when this is dropped.
struct Package {
    root: PathBuf,
    servers: PathBuf,
}

impl Package {
    fn unpack(stage: &Stage) -> Package {
        let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
        let debs = stage.bench.path("debs");
        run(Command::new(packaging.join("build-manual.sh")).arg(&debs));
        let deb = fs::read_dir(&debs).unwrap().next().unwrap().unwrap().path();
        let package = Package {
            root: stage.bench.path("root"),
            servers: stage.bench.path("server.conf"),
        };
        run(Command::new("dpkg-deb")
            .arg("-x")
            .arg(deb)
            .arg(&package.root));
        for program in ["pss", "pssd", "pss-fuse"] {
            symlink(binaries::path(program), package.bin().join(program)).unwrap();
        }
        package
    }

    fn bin(&self) -> PathBuf {
        self.root.join("usr/bin")
    }

    fn script(&self) -> PathBuf {
        self.root.join("etc/init.d/pssd")
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let path = std::env::var("PATH").unwrap();
        vec![
            ("PATH", format!("{}:{path}", text(self.bin()))),
            ("PSS_RUN", text(self.root.join("run"))),
            ("PSS_LOG", text(self.root.join("log"))),
            ("PSS_DEFAULTS", text(self.root.join("none"))),
        ]
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        let mut stop = Command::new(self.script());
        stop.arg("stop").envs(self.environment());
        // The test may have failed before there was anything to stop.
        let _ = stop.env("PSS_SERVERS", &self.servers).output();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}
