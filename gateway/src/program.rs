//! What the programs of the gateways have in common.

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
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
use tracing_subscriber::filter::LevelFilter;

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
            let _ = writeln!(std::io::stderr(), "{program}: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes; those whose text an error above them holds already are left out.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
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
    let config = cell(program, servers, key, request_timeout)?;
    Ok(Cell::connect(config))
}

/// How to reach the cell that a server.conf describes, with the key given or the one beside the file.
///
/// # Errors
/// When the file or the key cannot be used.
pub fn cell(
    program: &str,
    servers: &Path,
    key: Option<&Path>,
    request_timeout: Duration,
) -> anyhow::Result<CellConfig> {
    let file = ServersFile::read(servers)?;
    let key = CellKey::find(key, servers)?;
    let servers = file.resolve()?;
    let addresses = servers
        .ids()
        .into_iter()
        .filter_map(|id| Some((id, servers.tcp(id)?)));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("{program}@{}", host.trim());
    Ok(CellConfig {
        key,
        client_user: crate::user::user_name(),
        request_timeout,
        ..CellConfig::new(addresses.collect(), &name)
    })
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

/// Parses what to log: a level, or directives of tracing's EnvFilter.
///
/// A word that is no level would be taken for the name of a module, of which nothing else is logged then.
///
/// # Errors
/// What to write instead, for the person who wrote it.
pub fn parse_log(text: &str) -> Result<String, String> {
    let is_directive = |part: &str| {
        let is_level = || !part.is_empty() && part.parse::<LevelFilter>().is_ok();
        part.contains(['=', '[']) || is_level()
    };
    let is_right = text.split(',').all(is_directive) && EnvFilter::try_new(text).is_ok();
    match is_right {
        true => Ok(text.to_owned()),
        false => Err(
            "write error, warn, info, debug or trace, or directives such as info,export_nbd=debug"
                .to_owned(),
        ),
    }
}

/// Parses an address with a port.
///
/// # Errors
/// What to write instead, for the person who wrote it.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let example = "write ADDRESS:PORT, such as 127.0.0.1:10809 or [::1]:10809";
    text.parse().map_err(|_| example.to_owned())
}

/// Parses a time to wait: a number with `ms`, `s` or `m`; a bare number is seconds.
///
/// # Errors
/// What is wrong, for the person who wrote it.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no time: write a number with ms, s or m, such as 10s");
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        _ => return Err(wrong()),
    };
    let time = number.checked_mul(milliseconds).ok_or_else(wrong)?;
    if !(1..=86_400_000).contains(&time) {
        return Err(format!("'{text}' is no time to wait: use 1ms to 1440m"));
    }
    Ok(Duration::from_millis(time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let cause = std::io::Error::other("it is gone");
        let error = anyhow::Error::new(cause).context("cannot read f: it is gone; look there");
        assert_eq!(
            with_causes(&error.context("starting")),
            "starting: cannot read f: it is gone; look there"
        );
        let cause = std::io::Error::other("it is gone");
        let error = anyhow::Error::new(cause).context("cannot read f");
        assert_eq!(with_causes(&error), "cannot read f: it is gone");
    }

    #[test]
    fn what_to_log() {
        for right in [
            "info",
            "off",
            "DEBUG",
            "info,export_nbd=debug",
            "[request]=trace",
        ] {
            assert_eq!(parse_log(right).as_deref(), Ok(right));
        }
        for wrong in ["", "loud", "info,loud", "info,", "export_nbd=loud"] {
            assert!(parse_log(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_time("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        for wrong in [
            "",
            "s",
            "0",
            "-1",
            "1h",
            "1.5s",
            "99999999999999999999",
            "9999999m",
        ] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
