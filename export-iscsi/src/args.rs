//! The command line of `pss-iscsi`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use pss_gateway::program::parse_log;

use crate::server::CONNECTIONS_MAX;
use crate::sessions::SESSIONS_MAX;

/// The usual port.
pub const PORT: u16 = 3260;

/// Serves the volumes of a cell to iSCSI initiators, as a configuration file says.
#[derive(Debug, Parser)]
#[command(name = "pss-iscsi", version)]
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
    /// Targets, disks and users: tgt's targets.conf, or pss.toml if the name ends so; read again on
    /// SIGHUP
    #[arg(long, default_value = "/etc/tgt/targets.conf", value_name = "FILE")]
    pub config: PathBuf,
    /// Serve initiators on this address; may be repeated [default: port 3260 of all addresses, unless a
    /// service manager passed sockets]
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = portal)]
    pub portal: Vec<SocketAddr>,
    /// Portal group tag; gateways that serve the same targets need different ones
    #[arg(long, default_value_t = 1, value_name = "TAG", value_parser = clap::value_parser!(u16).range(1..))]
    pub portal_group: u16,
    /// Most sessions at a time
    #[arg(long, default_value_t = SESSIONS_MAX, value_name = "COUNT")]
    pub max_sessions: usize,
    /// Most connections at a time
    #[arg(long, default_value_t = CONNECTIONS_MAX, value_name = "COUNT")]
    pub max_connections: usize,
    /// How long a command waits for a majority of the servers, in seconds, before it is answered BUSY.
    /// Keep it below the initiators' own timeout
    #[arg(long, default_value_t = 12, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// After how many silent seconds an initiator is asked whether it is still there. After as many more
    /// it is dropped
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub probe: u64,
    /// Socket for `pss iscsi` and pss-tgtadm [default: /run/pss/iscsi.sock, if it can be made]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    pub check: bool,
    /// What to log: error, warn, info, debug, trace, or directives of tracing's EnvFilter
    #[arg(long, env = "PSS_LOG", default_value = "info", value_name = "LEVEL", value_parser = parse_log)]
    pub log: String,
}

/// An address with or without a port.
fn portal(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    let bare = text
        .strip_prefix('[')
        .and_then(|it| it.strip_suffix(']'))
        .unwrap_or(text);
    match bare.parse::<IpAddr>() {
        Ok(address) => Ok(SocketAddr::new(address, PORT)),
        Err(_) => Err(
            "write an ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, such as 192.0.2.1:3260".to_owned(),
        ),
    }
}
