//! The package `pss-manual`: the commands under the names of the manual, and the script that starts servers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binaries;
use crate::programs::{Bench, Outcome};

/// Directory `packaging` of the sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
}

/// Builds the package into a directory.
///
/// # Panics
/// If it cannot be built.
pub fn build(out: &Path) -> PathBuf {
    run(Command::new(sources().join("build-manual.sh")).arg(out));
    let mut files = fs::read_dir(out).expect("the directory is there");
    let file = files.next().expect("there is a package");
    file.expect("the directory can be read").path()
}

/// Runs a program that must succeed.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program can be run");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The package, unpacked beside links to the programs under test. What its script has started is stopped when this is
/// dropped.
pub struct Package {
    root: PathBuf,
    servers: PathBuf,
}

impl Package {
    /// Builds and unpacks it in the directory of a bench, for the cell of its server.conf.
    ///
    /// # Panics
    /// If it cannot be built or unpacked.
    pub fn unpack(bench: &Bench) -> Package {
        let deb = build(&bench.path("debs"));
        let package = Package {
            root: bench.path("root"),
            servers: bench.path("server.conf"),
        };
        run(Command::new("dpkg-deb")
            .arg("-x")
            .arg(deb)
            .arg(&package.root));
        for program in ["pss", "pssd", "pss-fuse"] {
            let link = package.bin().join(program);
            symlink(binaries::path(program), link).expect("the directory can be used");
        }
        package
    }

    /// Where the commands are.
    pub fn bin(&self) -> PathBuf {
        self.root.join("usr/bin")
    }

    /// `/etc/init.d/pssd`.
    pub fn script(&self) -> PathBuf {
        self.root.join("etc/init.d/pssd")
    }

    /// Where the script's servers write their logs.
    pub fn logs(&self) -> PathBuf {
        self.root.join("log")
    }

    /// What the package's commands need to find each other, and to keep to the test's directory.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let text = |path: PathBuf| path.display().to_string();
        let path = std::env::var("PATH").unwrap_or_default();
        vec![
            ("PATH", format!("{}:{path}", text(self.bin()))),
            ("PSS_RUN_DIR", text(self.root.join("run"))),
            ("PSS_LOG_DIR", text(self.logs())),
            ("PSS_DEFAULTS", text(self.root.join("none"))),
            ("PSS_SERVERS", text(self.servers.clone())),
        ]
    }

    /// The script with arguments.
    pub fn script_with(&self, args: &str) -> Command {
        let mut command = Command::new(self.script());
        command
            .args(args.split_whitespace())
            .env_remove("PSS_KEY")
            .env_remove("PSS_IDS")
            .env_remove("PSS_USER")
            .env_remove("PSS_WAIT")
            .env_remove("PSS_SYSLOG_SOCKET")
            .envs(self.environment());
        command
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        // The test may have failed before there was anything to stop.
        let _ = self.script_with("stop").output();
    }
}

/// Runs a command and takes what it did.
///
/// # Panics
/// If it cannot be run.
pub fn outcome(command: &mut Command) -> Outcome {
    Outcome(command.output().expect("the program can be run"))
}
