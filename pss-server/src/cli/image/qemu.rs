//! Images of other formats: `qemu-img` reads and writes them, and reaches the volume over NBD on a unix socket that
//! only this user can open.

use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use export_nbd::export::{Exports, Policy};
use export_nbd::server::{Limits, Server};
use pss_core::state::Volume;
use pss_gateway::listen::Listener;
use tempfile::TempDir;

use super::super::{CliError, Exit};
use super::{Client, failed};
use crate::render::printable;

const QEMU_IMG: &str = "qemu-img";
/// What qemu-img says when images differ.
const DIFFERENT: i32 = 1;

/// Fails if there is no qemu-img.
pub(super) fn check() -> Result<(), CliError> {
    run(Command::new(QEMU_IMG).arg("--version")).map(|_| ())
}

/// The size of the disk in an image.
pub(super) fn size(file: &Path, format: &str) -> Result<u64, CliError> {
    let mut command = Command::new(QEMU_IMG);
    command
        .args(["info", "--output=json", "-f", format, "--"])
        .arg(file);
    let output = done(run(&mut command)?)?;
    let about: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    about["virtual-size"].as_u64().ok_or_else(|| {
        let message = format!("{}: qemu-img tells no size", file.display());
        CliError::new(Exit::Failed, message)
    })
}

/// Copies an image into a volume.
pub(super) async fn import(
    client: &Client,
    file: &Path,
    format: &str,
    volume: &Volume,
    is_new: bool,
    verify: bool,
) -> Result<(), CliError> {
    let served = Served::start(client, volume, false)?;
    let mut command = convert();
    command.args(["-n", "-f", format, "-O", "raw"]);
    if is_new {
        command.arg("--target-is-zero");
    }
    command.arg("--").arg(file).arg(&served.uri);
    done(wait(command).await?)?;
    if verify {
        compare(file, format, &served.uri).await?;
    }
    Ok(())
}

/// Copies a volume into a new image.
pub(super) async fn export(
    client: &Client,
    file: &Path,
    format: &str,
    volume: &Volume,
    verify: bool,
) -> Result<(), CliError> {
    let served = Served::start(client, volume, true)?;
    let mut command = convert();
    command.args(["-f", "raw", "-O", format, "--"]);
    command.arg(&served.uri).arg(file);
    done(wait(command).await?)?;
    if verify {
        compare(file, format, &served.uri).await?;
    }
    Ok(())
}

fn convert() -> Command {
    let mut command = Command::new(QEMU_IMG);
    // Writeback: what is left in caches at the end is written, and an error of that is told.
    command.args(["convert", "-W", "-m", "8", "-t", "writeback"]);
    if std::io::stderr().is_terminal() && std::io::stdout().is_terminal() {
        command.arg("-p");
    }
    command
}

async fn compare(file: &Path, format: &str, uri: &str) -> Result<(), CliError> {
    let mut command = Command::new(QEMU_IMG);
    command.args(["compare", "-f", format, "-F", "raw", "--"]);
    command.arg(file).arg(uri);
    let output = wait(command).await?;
    match output.status.code() {
        Some(DIFFERENT) => {
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let message = format!("image and volume differ: {}", printable(&said));
            Err(CliError::new(Exit::Differ, message))
        }
        _ => done(output).map(|_| ()),
    }
}

/// Runs without standing in the way of the NBD server.
async fn wait(mut command: Command) -> Result<Output, CliError> {
    let running = tokio::task::spawn_blocking(move || run(&mut command));
    running.await.expect("running a program does not panic")
}

fn run(command: &mut Command) -> Result<Output, CliError> {
    command.stdin(Stdio::null());
    command.output().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => CliError::new(
            Exit::Unsupported,
            "formats other than raw need qemu-img: install the package qemu-utils, or use a raw image",
        ),
        _ => CliError::new(Exit::Failed, format!("{QEMU_IMG}: {error}")),
    })
}

fn done(output: Output) -> Result<Output, CliError> {
    match output.status.success() {
        true => Ok(output),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let said = said.strip_prefix("qemu-img: ").unwrap_or(&said);
            Err(CliError::new(
                Exit::Failed,
                format!("{QEMU_IMG}: {}", printable(said)),
            ))
        }
    }
}

/// A volume that this process serves to qemu-img.
struct Served {
    uri: String,
    task: tokio::task::JoinHandle<()>,
    /// With the socket; removed at the end.
    _directory: TempDir,
}

impl Served {
    fn start(client: &Client, volume: &Volume, read_only: bool) -> Result<Served, CliError> {
        let at = |error: &std::io::Error| failed("make a socket in", &std::env::temp_dir(), error);
        let directory = tempfile::tempdir().map_err(|error| at(&error))?;
        let path = directory.path().join("nbd");
        let listener = Listener::unix(&path).map_err(|error| at(&error))?;
        let policy = Policy {
            default_export: Some(volume.name.clone()),
            read_only,
            ..Policy::default()
        };
        let exports = Exports::new(Arc::clone(&client.cell) as _, policy);
        let server = Server::new(exports, Limits::default());
        let task = tokio::spawn(server.run(vec![listener], std::future::pending()));
        Ok(Served {
            uri: format!("nbd+unix:///?socket={}", path.display()),
            task,
            _directory: directory,
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}
