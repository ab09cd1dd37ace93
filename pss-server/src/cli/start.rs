//! `pssd start`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pss_core::key::CellId;
use pss_core::size::parse_size;
use sd_notify::NotifyState;

use crate::config::{CellFiles, Tuning};
use crate::logging::{self, LogLevel, LogTarget};
use crate::node::Server;

use super::{CliError, Exit, on_stop_signal};

/// Flags of `pssd start`.
#[derive(Args, Debug)]
pub struct StartArgs {
    /// The cell's list of servers
    #[arg(
        long,
        value_name = "FILE",
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf"
    )]
    servers: PathBuf,
    /// Which of the listed servers this is
    #[arg(long, value_name = "N")]
    id: u8,
    /// The data directory, instead of the one in the list of servers
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, value_name = "FILE", env = "PSS_KEY")]
    key: Option<PathBuf>,
    /// The cell's id, if it was given to 'pssd format'
    #[arg(long, value_name = "UUID")]
    cell: Option<CellId>,
    /// Where log lines go
    #[arg(long, value_enum, default_value = "stderr")]
    log: LogTarget,
    /// How much is logged
    #[arg(long, value_enum, default_value = "info")]
    log_level: LogLevel,
    #[command(flatten)]
    tuning: TuningArgs,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Advanced")]
struct TuningArgs {
    /// Size of a log segment [default: 128M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    segment_size: Option<u64>,
    /// Log between two checkpoints [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    checkpoint_size: Option<u64>,
    /// Log kept behind the checkpoint for servers that were down [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    log_retain: Option<u64>,
}

impl TuningArgs {
    fn tuning(&self) -> Tuning {
        let default = Tuning::default();
        Tuning {
            segment_bytes: self.segment_size.unwrap_or(default.segment_bytes),
            checkpoint_bytes: self.checkpoint_size.unwrap_or(default.checkpoint_bytes),
            log_retain_bytes: self.log_retain.unwrap_or(default.log_retain_bytes),
            ..default
        }
    }
}

pub(super) fn run(args: StartArgs) -> Result<(), CliError> {
    let cell = CellFiles::read(&args.servers, args.key.as_deref())?;
    let config = cell.server(args.id, args.path, args.cell, args.tuning.tuning())?;
    let failed = |error: &dyn std::fmt::Display| CliError::new(Exit::Failed, error);
    logging::init(args.log, args.log_level, &format!("pssd_{}", args.id))
        .map_err(|error| failed(&error))?;
    if config.key.is_none() {
        tracing::warn!(
            server = args.id,
            "no cell key: serving this machine only, and every program on it"
        );
    }
    let handle = Server::start(config).map_err(|error| {
        // The log may be syslog: whoever started the server sees stderr.
        tracing::error!(server = args.id, "did not start: {error}");
        failed(&error)
    })?;
    let handle = Arc::new(handle);
    let stopped = Arc::clone(&handle);
    on_stop_signal(move || {
        tell_systemd(&[NotifyState::Stopping]);
        stopped.stop();
    })
    .map_err(|error| failed(&error))?;
    tell_systemd(&[NotifyState::Ready]);
    handle.wait().map_err(|error| {
        tracing::error!(server = args.id, "stopped: {error}");
        failed(&error)
    })
}

/// Without systemd nobody listens, and that is no failure.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd was not told: {error}");
    }
}
