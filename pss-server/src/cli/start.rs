//! `pssd start`.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::Args;
use pss_core::disk::files::FileDisk;
use pss_core::key::CellId;
use pss_core::log::LogError;
use pss_core::size::parse_size;
use pss_core::storage::{Identity, PairError, StorageError};
use pss_core::types::ServerId;
use pss_gateway::logging::{self, LogLevel, LogTarget};
use sd_notify::NotifyState;

use crate::config::{CellFiles, ServerConfig, Tuning};
use crate::node::{Server, ServerHandle, StartError};

use super::restart::{self, Place, RestartArgs};
use super::{CliError, Exit, on_stop_signal, parse_id};

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
    #[arg(long, value_name = "N", value_parser = parse_id)]
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
    #[arg(long, value_enum, value_name = "WHERE", default_value = "stderr")]
    log: LogTarget,
    /// How much is logged
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
    #[command(flatten)]
    restart: RestartArgs,
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
    /// Everything is verified in the background once in this time, such as 14d or 36h; off: never [default: 14d]
    #[arg(long, value_name = "TIME", value_parser = parse_period)]
    scrub_period: Option<Period>,
}

impl TuningArgs {
    fn tuning(&self) -> Tuning {
        let default = Tuning::default();
        Tuning {
            segment_bytes: self.segment_size.unwrap_or(default.segment_bytes),
            checkpoint_bytes: self.checkpoint_size.unwrap_or(default.checkpoint_bytes),
            log_retain_bytes: self.log_retain.unwrap_or(default.log_retain_bytes),
            scrub_period: match self.scrub_period {
                Some(Period(period)) => period,
                None => default.scrub_period,
            },
            ..default
        }
    }
}

/// How often everything is verified; none: never.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Period(Option<Duration>);

/// Shorter ones would do nothing else.
const PERIOD_MIN: Duration = Duration::from_secs(1);
const PERIOD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

fn parse_period(text: &str) -> Result<Period, String> {
    if text == "off" {
        return Ok(Period(None));
    }
    let units = [("d", 24 * 3600), ("h", 3600), ("m", 60), ("s", 1)];
    let parsed = units.iter().find_map(|(unit, seconds)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(Duration::from_secs(number.saturating_mul(*seconds)))
    });
    match parsed {
        Some(period) if (PERIOD_MIN..=PERIOD_MAX).contains(&period) => Ok(Period(Some(period))),
        Some(_) => Err("a period is from 1s to 366d".to_owned()),
        None => Err("a period is a number with d, h, m or s, such as 14d, or off".to_owned()),
    }
}

pub(super) fn run(args: StartArgs) -> Result<(), CliError> {
    let cell = CellFiles::read(&args.servers, args.key.as_deref())?;
    let mut config = cell.server(args.id, args.path, args.cell, args.tuning.tuning())?;
    let place = Place {
        servers: &args.servers,
        key: args.key.as_deref(),
    };
    let give_up = match args.restart.restart()? {
        Some(restart) => restart::prepare(restart, args.restart.yes, &place, &mut config)?,
        None => None,
    };
    logging::init(args.log, args.log_level, &format!("pssd_{}", args.id)).map_err(failed)?;
    // Whoever looks for the failure looks into syslog; on stderr it would be there twice.
    let log_failure = |text: &str| {
        if args.log == LogTarget::Syslog {
            tracing::error!(server = args.id, "{text}");
        }
    };
    // Before the server starts: a signal while it reads its log stops it as well, when it has.
    let (started, starting) = channel::<Arc<ServerHandle>>();
    on_stop_signal(move || {
        tell_systemd(&[NotifyState::Stopping]);
        // It fails if there is no server to stop: then this program is ending anyway.
        if let Ok(handle) = starting.recv() {
            handle.stop();
        }
    })
    .map_err(failed)?;
    if config.key.is_none() {
        tracing::warn!(
            server = args.id,
            "no cell key: serving this machine only, and every program on it"
        );
    }
    let handle = match start(config) {
        Ok(handle) => Arc::new(handle),
        Err(text) => {
            log_failure(&text);
            return Err(failed(text));
        }
    };
    // The receiver is gone only when the process is ending.
    let _ = started.send(Arc::clone(&handle));
    tell_systemd(&[NotifyState::Ready]);
    let (fails, failure) = channel::<CliError>();
    if let Some(give_up) = give_up {
        let handle = Arc::clone(&handle);
        std::thread::spawn(move || {
            if let Err(error) = give_up.carry_out() {
                // Whoever waits for the server learns it.
                let _ = fails.send(error);
                handle.stop();
            }
        });
    }
    handle.wait().map_err(|error| {
        log_failure(&error.to_string());
        failed(error)
    })?;
    match failure.try_recv() {
        Ok(error) => {
            log_failure(&error.to_string());
            Err(error)
        }
        Err(_) => Ok(()),
    }
}

fn failed(error: impl Display) -> CliError {
    CliError::new(Exit::Failed, error)
}

/// Starts a server; a failure says what to do about it.
pub(crate) fn start(config: ServerConfig) -> Result<ServerHandle, String> {
    let (id, path, cell) = (config.id, config.path.clone(), config.cell);
    Server::start(config).map_err(|error| {
        let remedy = remedy(&error, id, &path, cell);
        format!("{error}{}", remedy.unwrap_or_default())
    })
}

/// Why a server cannot be looked at, and what to do about it.
pub(super) fn explained(error: &StartError, config: &ServerConfig) -> String {
    let remedy = remedy(error, config.id, &config.path, config.cell);
    format!("{error}{}", remedy.unwrap_or_default())
}

fn remedy(error: &StartError, id: ServerId, path: &Path, cell: CellId) -> Option<String> {
    let text = match error {
        StartError::Directory { source, .. } => match source.kind() {
            io::ErrorKind::WouldBlock => {
                "; the directory is in use by another server: stop that one, or name another directory with --path".to_owned()
            }
            io::ErrorKind::NotFound => format!(
                "; if its file system is mounted, prepare it with 'pssd format --id {id}' before the first start, or with --replace as well if its disk is new"
            ),
            _ => return None,
        },
        StartError::Storage { source, .. } => match source.as_ref() {
            StorageError::Pair(PairError::Missing { .. }) => format!(
                "; if this is its first start, and its file system is mounted, prepare it with 'pssd format --id {id}'; if its disk is new, with --replace as well"
            ),
            StorageError::Pair(PairError::Version { .. })
            | StorageError::Log(LogError::Version { .. }) => {
                "; start a newer pssd on it".to_owned()
            }
            StorageError::OtherServer { found, .. } => {
                format!("; use --id {found}, or name the directory of server {id} with --path")
            }
            StorageError::OtherCell => format!(
                ", {}; server.conf and the key make it {cell}: use the key of its cell, or another --path; if the cell's hosts or key were changed on purpose, add --cell with its id",
                cell_of(path)?
            ),
            _ => return None,
        },
        _ => return None,
    };
    Some(text)
}

/// The cell that a directory belongs to.
fn cell_of(path: &Path) -> Option<CellId> {
    let disk = FileDisk::open(path).ok()?;
    let identity = Identity::open(Arc::new(disk)).ok()?;
    Some(CellId(identity.facts().cell))
}

/// Without systemd nobody listens, and that is no failure.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd was not told: {error}");
    }
}
