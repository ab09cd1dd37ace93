//! The command line. Data go to stdout, talk to stderr; exit codes are those of [`Exit`].

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use pss_gateway::logging::{self, LogLevel, LogTarget};
use pss_gateway::program::{self, parse_time};
use pss_gateway::text::printable;

use crate::error::FsError;
use crate::mount::{self, MountError, WATCH_VERB};
use crate::namespace::Namespace;
use crate::source::{Consistency, Source};

mod look;
mod mounting;

/// Exit codes: the same as those of `pss`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// Something went wrong that has no code of its own.
    Failed = 1,
    /// Used wrongly.
    Usage = 2,
    /// No such path, volume or directory.
    NotFound = 3,
    /// Mounted already, or in use.
    Busy = 4,
    /// The servers do not accept this client.
    Denied = 5,
    /// No majority of the servers answers, or none with --stale.
    NoQuorum = 6,
    /// No answer in time.
    Timeout = 7,
    /// Data do not match their checksum, or a disk failed.
    Damaged = 8,
}

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed
  2  used wrongly: flags, paths, server.conf or key file
  3  there is no such path, volume or directory
  4  mounted already, or in use
  5  denied: the key is not that of the cell
  6  no majority of the servers answers, or none with --stale
  7  no answer within --timeout
  8  data do not match their checksum, or a disk failed";

const EXAMPLES: &str = "Examples:
  pss-fuse mount /mnt/pss                        see the cell as files
  pss-fuse ls -l /vol001/00/00                   without a mount
  pss-fuse read /vol001/00/00/01 --out chunk     save the data of a chunk
  pss-fuse read /.volumes/vol001 | sha256sum     the whole volume
  pss-fuse umount /mnt/pss";

/// A failure with its exit code and its message.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CliError {
    exit: Exit,
    message: String,
}

impl CliError {
    fn new(exit: Exit, message: impl Display) -> CliError {
        CliError {
            exit,
            message: message.to_string(),
        }
    }

    /// A failure to look at a path.
    fn at(path: &str, error: &FsError) -> CliError {
        let exit = match error {
            FsError::NotFound => Exit::NotFound,
            FsError::NotDirectory
            | FsError::IsDirectory
            | FsError::PastEnd
            | FsError::NoAttribute => Exit::Usage,
            FsError::NoMajority(_) | FsError::NoServer(_) => Exit::NoQuorum,
            FsError::TimedOut(_) => Exit::Timeout,
            FsError::Denied(_) => Exit::Denied,
            FsError::Damaged => Exit::Damaged,
            FsError::Changing | FsError::Unexpected(_) => Exit::Failed,
        };
        match error.is_outage() {
            // That is about no path.
            true => CliError::new(exit, error),
            false => CliError::new(exit, format!("{}: {error}", printable(path))),
        }
    }
}

impl From<MountError> for CliError {
    fn from(error: MountError) -> CliError {
        let exit = match error {
            MountError::NoDirectory(_) | MountError::NotMounted(_) => Exit::NotFound,
            MountError::NotDirectory(_) => Exit::Usage,
            MountError::Mounted(_) | MountError::Busy(_) => Exit::Busy,
            MountError::NoFuse(_)
            | MountError::NoHelper
            | MountError::Helper(_)
            | MountError::Io { .. } => Exit::Failed,
        };
        CliError::new(exit, error)
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> CliError {
        CliError::new(Exit::Failed, error)
    }
}

/// Which cell, and how to talk to it.
#[derive(Args, Clone, Debug)]
struct CellArgs {
    /// The cell's list of servers
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf"
    )]
    servers: PathBuf,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "PSS_KEY")]
    key: Option<PathBuf>,
    /// How long to wait for the cell before a read or a look fails, such as 500ms or 10s
    #[arg(long, global = true, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    timeout: Duration,
    /// Read from the nearest server instead of the leader: works without a majority, but may lack the last changes
    #[arg(long, global = true)]
    stale: bool,
    /// What to log [default: info for mounts, else warn]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<LogLevel>,
}

impl CellArgs {
    /// The namespace of the cell. Within a tokio runtime.
    fn open(&self, shows_images: bool) -> Result<Namespace, CliError> {
        let cell = program::connect("pss-fuse", &self.servers, self.key.as_deref(), self.timeout)
            .map_err(|error| CliError::new(Exit::Usage, format!("{error:#}")))?;
        let consistency = match self.stale {
            true => Consistency::Stale,
            false => Consistency::Linearizable,
        };
        let source = Source::new(cell, consistency, self.timeout);
        Ok(Namespace::new(source, shows_images))
    }
}

/// The namespace of a PSS cell: its volumes as a tree of chunk files, mounted or for scripts
#[derive(Debug, Parser)]
#[command(name = "pss-fuse", version, after_help = EXIT_CODES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct PssFuse {
    #[command(flatten)]
    cell: CellArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Mounts the namespace, read-only, on a directory
    Mount(mounting::MountArgs),
    /// Takes a mount away
    Umount(mounting::UmountArgs),
    /// Lists a directory
    #[command(visible_alias = "readdir")]
    Ls(look::LsArgs),
    /// Shows size, space, last change and copies of files and directories
    Stat(look::StatArgs),
    /// Writes the data of a chunk or a volume to standard output or a file
    #[command(visible_alias = "cat")]
    Read(look::ReadArgs),
    /// Shows which parts of a file take space
    Map(look::MapArgs),
    /// Unmounts what a process leaves behind that dies
    #[command(name = WATCH_VERB, hide = true)]
    Watch { directory: PathBuf, id: u64 },
}

/// The command line, for what is made of it: completions and pages of the manual.
pub fn command() -> clap::Command {
    <PssFuse as clap::CommandFactory>::command()
}

/// `mount -t fuse.pss` calls this; see mount(8).
const HELPER_NAME: &str = "mount.fuse.pss";
/// What the manual of 2011 calls it.
const MANUAL_NAME: &str = "PFSClient";

/// The name that this program is called by, if it is one that means something.
fn program_name() -> &'static str {
    let program = std::env::args_os().next().map(PathBuf::from);
    let name = program.as_deref().and_then(Path::file_name);
    let called = |known: &&str| name.is_some_and(|name| name == *known);
    let known = [HELPER_NAME, MANUAL_NAME].into_iter().find(called);
    known.unwrap_or("pss-fuse")
}

/// The programs of this binary, by the name that it is called by.
pub fn main() -> ExitCode {
    let result = match program_name() {
        HELPER_NAME => mounting::run_helper(),
        name => {
            let args = PssFuse::parse();
            if name == MANUAL_NAME && io::stderr().is_terminal() {
                let _ = writeln!(io::stderr(), "Hint: {MANUAL_NAME} is now 'pss-fuse'.");
            }
            run(args)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error);
            ExitCode::from(error.exit as u8)
        }
    }
}

fn run(args: PssFuse) -> Result<(), CliError> {
    let cell = args.cell;
    match args.verb {
        Verb::Mount(args) => mounting::run(&cell, &args),
        Verb::Umount(args) => mounting::unmount(&args),
        Verb::Ls(args) => look::ls(&cell, &args),
        Verb::Stat(args) => look::stat(&cell, &args),
        Verb::Read(args) => look::read(&cell, &args),
        Verb::Map(args) => look::map(&cell, &args),
        Verb::Watch { directory, id } => {
            mount::watch(directory, id);
            Ok(())
        }
    }
}

fn start_log(target: LogTarget, level: LogLevel) -> Result<(), CliError> {
    logging::init(target, level, "pss-fuse").map_err(|error| CliError::new(Exit::Failed, error))
}

/// Writes data to stdout. A reader that went away early (`| head`) is no failure.
fn print(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::new(
            Exit::Failed,
            format!("cannot write to standard output: {error}"),
        )),
        _ => Ok(()),
    }
}

/// Says something that is not data. Nothing can be done about a stderr that is gone.
fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{}: {text}", program_name());
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn commands_are_sound() {
        PssFuse::command().debug_assert();
    }
}
