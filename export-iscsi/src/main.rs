//! `pss-iscsi`: serves the volumes of a cell to iSCSI initiators.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use export_iscsi::auth::Algorithm;
use export_iscsi::config::{self, ConfigError, Loaded};
use export_iscsi::control::socket::ControlSocket;
use export_iscsi::control::{Configuration, Control, SOCKET};
use export_iscsi::server::{CONNECTIONS_MAX, Limits, Server};
use export_iscsi::session::Probing;
use export_iscsi::sessions::SESSIONS_MAX;
use pss_gateway::listen::Listener;
use pss_gateway::program;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

const PORT: u16 = 3260;

/// Serves the volumes of a cell to iSCSI initiators, as a configuration file says.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The cell: a server.conf
    #[arg(
        long,
        env = "PSS_SERVERS",
        default_value = "/etc/pss/server.conf",
        value_name = "FILE"
    )]
    servers: PathBuf,
    /// The cell key [default: cell.key beside the list of servers, if it exists]
    #[arg(long, env = "PSS_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// Targets, disks and users: tgt's targets.conf, or pss.toml if the name ends so; read again on
    /// SIGHUP
    #[arg(long, default_value = "/etc/tgt/targets.conf", value_name = "FILE")]
    config: PathBuf,
    /// Serve initiators on this address; may be repeated [default: port 3260 of all addresses, unless a
    /// service manager passed sockets]
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = portal)]
    portal: Vec<SocketAddr>,
    /// Portal group tag; gateways that serve the same targets need different ones
    #[arg(long, default_value_t = 1, value_name = "TAG", value_parser = clap::value_parser!(u16).range(1..))]
    portal_group: u16,
    /// Most sessions at a time
    #[arg(long, default_value_t = SESSIONS_MAX, value_name = "COUNT")]
    max_sessions: usize,
    /// Most connections at a time
    #[arg(long, default_value_t = CONNECTIONS_MAX, value_name = "COUNT")]
    max_connections: usize,
    /// How long a command waits for a majority of the servers, in seconds, before it is answered BUSY.
    /// Keep it below the initiators' own timeout
    #[arg(long, default_value_t = 12, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// After how many silent seconds an initiator is asked whether it is still there. After as many more
    /// it is dropped
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    probe: u64,
    /// Socket for `pss iscsi` and pss-tgtadm [default: /run/pss/iscsi.sock, if it can be made]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    check: bool,
    /// What to log: error, warn, info, debug, trace, or directives of tracing's EnvFilter
    #[arg(long, env = "PSS_LOG", default_value = "info", value_name = "LEVEL")]
    log: String,
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
        Err(_) => Err("not an ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT".to_owned()),
    }
}

fn main() -> ExitCode {
    program::end("pss-iscsi", run(Args::parse()))
}

fn run(args: Args) -> anyhow::Result<()> {
    program::start_log(&args.log)?;
    program::raise_file_limit();
    // A wrong configuration is told before any socket is opened.
    let loaded = load(&args)?;
    if args.check {
        println!(
            "{}: {} targets",
            args.config.display(),
            loaded.catalog.targets.len()
        );
        return Ok(());
    }
    // One thread: a connection's cost is system calls, and hand-over between threads would add to it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args, loaded))
}

fn load(args: &Args) -> Result<Loaded, ConfigError> {
    let loaded = config::load(&args.config)?;
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    let catalog = &loaded.catalog;
    let chap = catalog.discovery.required()
        || catalog
            .targets
            .values()
            .any(|target| target.accounts.required());
    let mut weak = catalog.algorithms.0.iter().filter(|it| it.is_weak());
    if chap && weak.any(|it| matches!(it, Algorithm::Md5 | Algorithm::Sha1)) {
        info!("CHAP with MD5 and SHA1 is allowed, which Windows and Mac need");
    }
    Ok(loaded)
}

async fn serve(args: Args, loaded: Loaded) -> anyhow::Result<()> {
    let socket = control_socket(args.control.as_deref())?;
    // Sockets before the cell: a wrong address is told at once.
    let listeners = listeners(&args)?;
    // The SCSI side answers in time; the cell's requests may take a little longer, so that what was
    // answered BUSY does not take effect much later.
    let patience = Duration::from_secs(args.timeout);
    let cell = program::connect("pss-iscsi", &args.servers, args.key.as_deref(), patience)?;
    let probe = Duration::from_secs(args.probe);
    let limits = Limits {
        connections_max: args.max_connections,
        sessions_max: args.max_sessions,
        command_timeout: patience,
        probing: Probing {
            interval: probe,
            limit: probe,
        },
        ..Limits::default()
    };
    let server = Server::new(Arc::clone(&cell) as _, args.portal_group, limits);
    let stop = program::stop_signal()?;
    let hangups = signal(SignalKind::hangup())?;
    let configuration = Configuration {
        file: args.config.clone(),
        load: Box::new(move || load(&args)),
    };
    let control = Control::new(Arc::clone(&server), Some(configuration));
    if let Some(socket) = socket {
        tokio::spawn(socket.serve(Arc::clone(&control)));
    }
    // Initiators are told to come again until the cell has been asked for the volumes.
    tokio::spawn(reload(hangups, Arc::clone(&server), control, loaded));
    program::tell_manager(NotifyState::Ready);
    server.run(listeners, stop).await;
    // The cell need not wait for this gateway's session to run out.
    cell.close().await;
    Ok(())
}

fn listeners(args: &Args) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Listener::inherited().context("sockets passed by LISTEN_FDS")?;
    for address in &args.portal {
        let listener = Listener::tcp(*address);
        listeners.push(listener.with_context(|| format!("cannot serve on portal {address}"))?);
    }
    if listeners.is_empty() {
        let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT);
        let listener = Listener::tcp(address);
        listeners.push(listener.with_context(|| format!("cannot serve on portal {address}"))?);
        // A machine without IPv6 is served all the same.
        let address = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
        match Listener::tcp(address) {
            Ok(listener) => listeners.push(listener),
            Err(error) => warn!("cannot serve on portal {address}: {error}"),
        }
    }
    Ok(listeners)
}

/// The socket that was asked for, or the usual one if it can be made.
fn control_socket(path: Option<&Path>) -> anyhow::Result<Option<ControlSocket>> {
    if let Some(path) = path {
        return Ok(Some(ControlSocket::bind(path)?));
    }
    match ControlSocket::bind(Path::new(SOCKET)) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => {
            warn!("{error}; this server cannot be seen or steered");
            Ok(None)
        }
    }
}

/// Applies the configuration, now and on SIGHUP.
async fn reload(mut hangups: Signal, server: Arc<Server>, control: Arc<Control>, first: Loaded) {
    for missing in server.apply(first.catalog).await {
        missing.log();
    }
    while hangups.recv().await.is_some() {
        if let Err(failure) = control.reload().await {
            error!("{failure}");
        }
    }
}
