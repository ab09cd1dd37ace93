//! What the programs of the gateways have in common.

use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use pss_core::client::{Cell, CellConfig};
use pss_core::key::CellKey;
use pss_core::servers::ServersFile;
use rustix::process::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// Starts to log to standard error; `level` is a level or directives of tracing's EnvFilter.
///
/// # Errors
/// When `level` is neither.
pub fn start_log(level: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(level).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    Ok(())
}

/// The end of a program: what failed is one line for the person who typed the command.
pub fn end(program: &str, result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done if stderr is gone.
            let _ = writeln!(std::io::stderr(), "{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Opens the cell that a server.conf describes, with the key given or the one beside the file.
///
/// # Errors
/// When the file or the key cannot be used.
pub fn connect(
    program: &str,
    servers: &Path,
    key: Option<&Path>,
    request_timeout: Duration,
) -> anyhow::Result<Arc<Cell>> {
    let file = ServersFile::read(servers)?;
    let key = CellKey::find(key, servers)?;
    let servers = file.resolve()?;
    let addresses = servers
        .ids()
        .into_iter()
        .filter_map(|id| Some((id, servers.tcp(id)?)));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("{program}@{}", host.trim());
    Ok(Cell::connect(CellConfig {
        key,
        request_timeout,
        ..CellConfig::new(addresses.collect(), &name)
    }))
}

/// Lets the process have as many descriptors as it may: the usual limit of 1024 is meant for programs that
/// use `select`, and chunks and clients need more.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!("the limit of open files could not be raised: {error}");
    }
}

/// Is done when the process is told to stop, by SIGTERM or SIGINT.
///
/// # Errors
/// When signals cannot be received.
pub fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        info!("stopping");
        tell_manager(NotifyState::Stopping);
    })
}

/// Tells the service manager, if there is one.
pub fn tell_manager(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        error!(%error, "cannot notify the service manager");
    }
}
