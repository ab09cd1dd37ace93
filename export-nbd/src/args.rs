//! The command line of `pss-nbd`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use pss_gateway::program::{parse_address, parse_log};

use crate::server::CONNECTIONS_MAX;

/// Serves the volumes of a cell to NBD clients. A volume is an export of the same name.
#[derive(Debug, Parser)]
#[command(name = "pss-nbd", version, after_help = AFTER_HELP)]
pub struct Args {
    /// The cell: a server.conf
    #[arg(
        long,
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf",
        value_name = "FILE"
    )]
    pub servers: PathBuf,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, env = "PSS_KEY", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Listen on this TCP address; may be repeated [default: 127.0.0.1:10809, unless --unix or
    /// --stdio is given or a service manager passed sockets]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_address)]
    pub listen: Vec<SocketAddr>,
    /// Listen on this unix socket; may be repeated
    #[arg(long, visible_alias = "listen-unix", value_name = "PATH")]
    pub unix: Vec<PathBuf>,
    /// Serve the one client whose socket is standard input, and end with it
    #[arg(long, conflicts_with_all = ["listen", "unix"])]
    pub stdio: bool,
    /// Volume for clients that name none [default: the only volume, if there is only one]
    #[arg(long, value_name = "NAME")]
    pub default_export: Option<String>,
    /// Refuse writes to all exports
    #[arg(long)]
    pub read_only: bool,
    /// Which volumes are exported to whom; read again on SIGHUP [default: all, to everyone]
    #[arg(long, value_name = "FILE")]
    pub export_policy: Option<PathBuf>,
    /// Most connections at a time
    #[arg(long, default_value_t = CONNECTIONS_MAX, value_name = "COUNT")]
    pub max_connections: usize,
    /// How long a request waits for a leader, in seconds, before it fails with EIO. Keep it below
    /// the clients' own timeout
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// What to log: error, warn, info, debug, trace, or directives of tracing's EnvFilter
    #[arg(long, env = "PSS_LOG", default_value = "info", value_name = "LEVEL", value_parser = parse_log)]
    pub log: String,
}

const AFTER_HELP: &str = "\
Lines of --export-policy FILE; the first whose name fits a volume holds:
  NAME [read-only] [hidden] [connections=N] [allow=ADDRESS/BITS|uid:N|gid:N|unix]...
NAME may end in *. Without allow= everyone may connect.";
