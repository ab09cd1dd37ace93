//! The command line: what all verbs of `pss` and `pssd` share.
//!
//! Data goes to stdout, talk to stderr. Exit codes are those of [`Exit`].

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use pss_core::types::SERVERS_MAX;
use pss_gateway::program::parse_time;
use pss_gateway::text::printable_json;

use crate::config::{CellFiles, ConfigError};

pub(crate) mod cell;
mod config;
mod events;
mod format;
mod generate;
mod health;
mod image;
mod iscsi;
mod key;
mod links;
mod manual;
mod measure;
mod members;
mod paxos;
mod ports;
mod probe;
mod recover;
mod restart;
mod server;
mod signals;
mod start;
mod status;
mod volume;
mod watch;

pub use format::{FormatArgs, FormatError, format};
pub use signals::on_stop_signal;
pub use start::StartArgs;

pub(crate) use start::start as start_server;
pub(crate) use volume::check_new as check_new_volume;

/// Exit codes of `pss`; `pssd` uses the first three.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// Something went wrong that has no code of its own.
    Failed = 1,
    /// Used wrongly: flags, sizes, names, server.conf, key file.
    Usage = 2,
    /// There is no such volume, server, target or session.
    NotFound = 3,
    /// It exists already, or is in use.
    Busy = 4,
    /// The servers, or the gateway, do not accept this client.
    Denied = 5,
    /// No server, no majority of the core servers, or no gateway can be reached.
    NoQuorum = 6,
    /// No answer in time.
    Timeout = 7,
    /// Data that should be equal differ.
    Differ = 8,
    /// What was asked does not do that.
    Unsupported = 9,
}

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed
  2  used wrongly: flags, sizes, names, server.conf or key file
  3  there is no such volume, server, target or session
  4  exists already, or is in use
  5  denied: the key is not that of the cell, or the control socket is not yours
  6  no majority of the core servers, no server, or no gateway can be reached
  7  no answer within --timeout; a change may or may not have been made
  8  data differ
  9  not supported";

const EXAMPLES: &str = "Examples:
  pss status                                  are the volumes safe, and who is behind?
  pss volume create vol001 100G
  pss volume resize vol001 +50G
  pss server shutdown 2
  pss --servers other.conf volume list --json";

const COMPLETIONS_EXAMPLES: &str = "Examples:
  source <(pss completions bash)                            in this shell
  pss completions bash --out /etc/bash_completion.d         for everybody
  pss completions zsh --out /usr/local/share/zsh/site-functions
  pss completions fish --out ~/.config/fish/completions";

const EVENTS_EXAMPLES: &str = "Examples:
  pss events                                  the last 100
  pss events --last 1000 | grep vol001
  pss events --follow
  pss events --follow --last 0 --json         new ones, each an object on a line of its own";

const MAN_EXAMPLES: &str = "Examples:
  pss man | man -l -
  pss man pss-nbd | man -l -
  pss man --out /usr/local/share/man/man1";

const EXIT_CODES_SERVER: &str = "Exit codes:
  0  stopped by a signal or by 'pss server shutdown'; formatted
  1  failed: data directory, port or storage
  2  used wrongly: flags, server.conf or key file; nothing was changed";

/// A failure with its exit code and its message.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CliError {
    /// Of the process.
    pub exit: Exit,
    /// For stderr.
    pub message: String,
}

impl CliError {
    /// A failure of a kind.
    pub fn new(exit: Exit, message: impl Display) -> CliError {
        CliError {
            exit,
            message: message.to_string(),
        }
    }

    fn usage(message: impl Display) -> CliError {
        CliError::new(Exit::Usage, message)
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> CliError {
        CliError::usage(error)
    }
}

/// Which cell, and how to talk to it.
#[derive(Args, Clone, Debug)]
pub struct CellArgs {
    /// The cell's list of servers
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf"
    )]
    pub servers: PathBuf,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "PSS_KEY")]
    pub key: Option<PathBuf>,
    /// How long to wait for the cell, such as 10s, 500ms or 2m
    #[arg(long, global = true, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    pub timeout: Duration,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

impl CellArgs {
    fn read(&self) -> Result<CellFiles, CliError> {
        Ok(CellFiles::read(&self.servers, self.key.as_deref())?)
    }
}

/// The command line of PSS: looks at a cell of servers and manages its volumes
#[derive(Debug, Parser)]
#[command(name = "pss", version, after_help = EXIT_CODES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Pss {
    #[command(flatten)]
    cell: CellArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Goes on without a majority that is lost for good
    #[command(after_help = recover::EXAMPLES)]
    Recover(recover::RecoverArgs),
    /// Says whether the data are safe, who leads, and who is behind
    Status(status::StatusArgs),
    /// Creates, shows, resizes and deletes volumes
    #[command(subcommand)]
    Volume(volume::VolumeVerb),
    /// Shows the agreement of the servers
    #[command(subcommand)]
    Paxos(paxos::PaxosVerb),
    /// Lists servers, looks into them and stops them
    #[command(subcommand)]
    Server(server::ServerVerb),
    /// Shows who did what to the cell, and when
    #[command(after_help = EVENTS_EXAMPLES)]
    Events(events::EventsArgs),
    /// Makes the cell key
    #[command(subcommand)]
    Key(key::KeyVerb),
    /// Sees and steers the iSCSI gateway (pss-iscsi) of this machine
    Iscsi(iscsi::IscsiArgs),
    /// Runs a whole cell with its NBD and iSCSI servers in this process, to try it out
    Up(crate::up::UpArgs),
    /// Checks configuration files
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Prints what makes a shell complete the commands of PSS
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(generate::CompletionsArgs),
    /// Prints pages of the manual
    #[command(after_help = MAN_EXAMPLES)]
    Man(generate::ManArgs),
}

/// A PSS server
#[derive(Debug, Parser)]
#[command(name = "pssd", version, after_help = EXIT_CODES_SERVER)]
struct Pssd {
    #[command(subcommand)]
    verb: PssdVerb,
}

#[derive(Debug, Subcommand)]
enum PssdVerb {
    /// Initialises a server's data directory before its first start
    Format(FormatArgs),
    /// Runs the server until SIGTERM or SIGINT
    #[command(after_help = restart::EXAMPLES)]
    Start(Box<StartArgs>),
}

/// A whole PSS cell with its NBD and iSCSI servers in one process, to try it out
#[derive(Debug, Parser)]
#[command(name = "pss-up", version)]
struct PssUp {
    #[command(flatten)]
    up: crate::up::UpArgs,
}

/// `pss`, also under the names of the manual.
pub fn pss_main() -> ExitCode {
    if let Some(exit) = manual::main() {
        return exit;
    }
    let pss = Pss::parse();
    finish("pss", || match pss.verb {
        Verb::Status(args) => status::run(&pss.cell, &args),
        Verb::Recover(args) => recover::run(&pss.cell, &args),
        Verb::Volume(verb) => volume::run(&pss.cell, verb),
        Verb::Paxos(verb) => paxos::run(&pss.cell, verb),
        Verb::Server(verb) => server::run(&pss.cell, verb),
        Verb::Events(args) => events::run(&pss.cell, &args),
        Verb::Key(verb) => key::run(&pss.cell, verb),
        Verb::Iscsi(args) => iscsi::run(&pss.cell, args),
        Verb::Up(args) => crate::up::run(&args),
        Verb::Config(verb) => config::run(&pss.cell, verb),
        Verb::Completions(args) => generate::completions(&args),
        Verb::Man(args) => generate::man(&args),
    })
}

/// `pssd`.
pub fn pssd_main() -> ExitCode {
    let pssd = Pssd::parse();
    finish("pssd", || match pssd.verb {
        PssdVerb::Format(args) => format::run(&args),
        PssdVerb::Start(args) => start::run(*args),
    })
}

/// `pss-up`.
pub fn pss_up_main() -> ExitCode {
    let args = PssUp::parse();
    finish("pss-up", || crate::up::run(&args.up))
}

fn finish(program: &str, run: impl FnOnce() -> Result<(), CliError>) -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done about a stderr that is gone.
            let _ = writeln!(io::stderr(), "{program}: {error}");
            ExitCode::from(error.exit as u8)
        }
    }
}

/// Writes data to stdout. A reader that went away early (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    print_on(text).map(|_| ())
}

/// Writes data to stdout; says whether there is someone who reads it.
fn print_on(text: &str) -> Result<bool, CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(CliError::new(
            Exit::Failed,
            format!("cannot write to standard output: {error}"),
        )),
    }
}

fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    print(&json_text(value))
}

fn json_text(value: &serde_json::Value) -> String {
    printable_json(&format!("{value:#}\n"))
}

/// A server's id as an argument.
fn parse_id(text: &str) -> Result<u8, String> {
    match text.parse::<u8>() {
        Ok(id) if usize::from(id) < SERVERS_MAX => Ok(id),
        _ => Err(format!(
            "a server's id is a number from 0 to {}",
            SERVERS_MAX - 1
        )),
    }
}

/// Says something that is not data.
fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Asks on the terminal. Without one, or with another answer than yes, nothing is done.
fn confirm(question: &str) -> Result<(), CliError> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(CliError::usage(format!(
            "{question} Nothing was done: there is no terminal to ask on; add --yes to say yes"
        )));
    }
    let _ = write!(io::stderr(), "{question} Type yes to go on: ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    match read.is_ok() && answer.trim().eq_ignore_ascii_case("yes") {
        true => Ok(()),
        false => Err(CliError::new(Exit::Failed, "nothing was done")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn ids_of_servers() {
        assert_eq!(parse_id("0"), Ok(0));
        assert_eq!(parse_id("7"), Ok(7));
        for wrong in ["8", "256", "-1", "x", ""] {
            let error = parse_id(wrong).unwrap_err();
            assert_eq!(error, "a server's id is a number from 0 to 7");
        }
    }

    #[test]
    fn commands_are_sound() {
        Pss::command().debug_assert();
        Pssd::command().debug_assert();
        PssUp::command().debug_assert();
    }
}
