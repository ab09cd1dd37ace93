//! The programs under test, as the workspace builds them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Path of a program of the workspace, such as `pssd`.
///
/// # Panics
/// If it was not built.
pub fn path(name: &str) -> PathBuf {
    // A test runs as target/PROFILE/deps/NAME, a benchmark or helper program as target/PROFILE/NAME.
    let this = std::env::current_exe().expect("a process knows its own program");
    let dirs = this.ancestors().skip(1).take(2);
    dirs.map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| {
            panic!(
                "{name} is not beside {}: run 'cargo build --workspace' first (run-tests.sh does)",
                this.display()
            )
        })
}

/// A command that runs a program of the workspace without anything of the caller's environment that
/// changes what it does.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(path(name));
    for variable in [
        "PSS_SERVERS",
        "PSS_KEY",
        "PSS_ISCSI_CONTROL",
        "PSS_SYSLOG_SOCKET",
        "NOTIFY_SOCKET",
        "PSS_TEST_SYNC_DELAY",
    ] {
        command.env_remove(variable);
    }
    command
}

/// Path of a program that the machine must have.
///
/// # Panics
/// If it is not there; `package` is the Debian package that brings it.
pub fn tool(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|dir: PathBuf| Path::join(&dir, name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: install it with 'apt-get install {package}'"))
}
