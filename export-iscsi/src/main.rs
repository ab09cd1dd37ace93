//! `pss-iscsi`: serves the volumes of a cell to iSCSI initiators.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;
use export_iscsi::args::{Args, PORT};
use export_iscsi::auth::Algorithm;
use export_iscsi::config::{self, ConfigError, Loaded};
use export_iscsi::control::socket::ControlSocket;
use export_iscsi::control::{Configuration, Control, SOCKET};
use export_iscsi::server::{Limits, Server};
use export_iscsi::session::Probing;
use pss_core::client::Cell;
use pss_gateway::listen::Listener;
use pss_gateway::notes::Notes;
use pss_gateway::program;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

fn main() -> ExitCode {
    program::end("pss-iscsi", run(Args::parse()))
}

fn run(args: Args) -> anyhow::Result<()> {
    program::start_log(&args.log)?;
    program::raise_file_limit();
    // A wrong configuration is told before any socket is opened.
    let loaded = load(&args).map_err(|error| match args.config.exists() {
        true => anyhow::Error::new(error),
        false => anyhow!("{error}; write the targets into it, or name another file with --config"),
    })?;
    if args.check {
        println!("{}: {}", args.config.display(), loaded.catalog.summary());
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
    let config = program::cell("pss-iscsi", &args.servers, args.key.as_deref(), patience)?;
    let cell = Cell::connect(config.clone());
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
    let notes = Notes::new(config);
    let control = Control::new(
        Arc::clone(&server),
        Some(configuration),
        Some(Arc::clone(&notes)),
    );
    if let Some(socket) = socket {
        tokio::spawn(socket.serve(Arc::clone(&control)));
    }
    // Initiators are told to come again until the cell has been asked for the volumes.
    tokio::spawn(reload(hangups, Arc::clone(&server), control, loaded));
    program::tell_manager(NotifyState::Ready);
    server.run(listeners, stop).await;
    // The cell need not wait for this gateway's session to run out.
    tokio::join!(cell.close(), notes.close());
    Ok(())
}

fn listeners(args: &Args) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Listener::inherited().context("sockets passed by LISTEN_FDS")?;
    for address in &args.portal {
        let listener = Listener::tcp(*address);
        listeners.push(listener.with_context(|| refused(address))?);
    }
    if listeners.is_empty() {
        let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT);
        let listener = Listener::tcp(address);
        listeners.push(listener.with_context(|| refused(&address))?);
        // A machine without IPv6 is served all the same.
        let address = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
        match Listener::tcp(address) {
            Ok(listener) => listeners.push(listener),
            Err(error) => warn!("cannot serve on portal {address}: {error}"),
        }
    }
    Ok(listeners)
}

fn refused(portal: &SocketAddr) -> String {
    format!("cannot serve on portal {portal} (choose another with --portal)")
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
