//! `pss-nbd`: serves the volumes of a cell to NBD clients.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use export_nbd::args::Args;
use export_nbd::export::{Exports, Policy};
use export_nbd::server::{Limits, Server};
use pss_core::client::Cell;
use pss_gateway::listen::{Listener, Stream};
use pss_gateway::notes::Notes;
use pss_gateway::program;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info};

const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 10809);

fn main() -> ExitCode {
    program::end("pss-nbd", run(Args::parse()))
}

fn run(args: Args) -> anyhow::Result<()> {
    program::start_log(&args.log)?;
    program::raise_file_limit();
    // One thread: a connection's cost is system calls, and hand-over between threads would add to it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let policy = read_policy(&args)?;
    // Sockets first: a wrong address is told before the cell is asked.
    let listeners = match args.stdio {
        true => Vec::new(),
        false => listeners(&args)?,
    };
    let timeout = Duration::from_secs(args.timeout);
    let config = program::cell("pss-nbd", &args.servers, args.key.as_deref(), timeout)?;
    let cell = Cell::connect(config.clone());
    let exports = Exports::new(Arc::clone(&cell) as _, policy);
    let limits = Limits {
        connections_max: args.max_connections,
        ..Limits::default()
    };
    let server = Server::new(Arc::clone(&exports), limits);
    let stop = program::stop_signal()?;
    if args.stdio {
        let (stream, peer) = Stream::stdio()?;
        server.run_one(stream, peer, stop).await;
        cell.close().await;
        return Ok(());
    }
    let notes = Notes::new(config);
    let hangups = signal(SignalKind::hangup())?;
    tokio::spawn(reload_policy(hangups, exports, args, Arc::clone(&notes)));
    program::tell_manager(NotifyState::Ready);
    server.run(listeners, stop).await;
    // The cell need not wait for this gateway's session to run out.
    tokio::join!(cell.close(), notes.close());
    Ok(())
}

fn listeners(args: &Args) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Listener::inherited().context("sockets passed by LISTEN_FDS")?;
    for path in &args.unix {
        let listener = Listener::unix(path);
        listeners.push(listener.with_context(|| {
            let path = path.display();
            format!("cannot listen on {path} (choose another with --unix)")
        })?);
    }
    let default = listeners.is_empty() && args.listen.is_empty();
    for address in args.listen.iter().chain(default.then_some(&DEFAULT_LISTEN)) {
        let listener = Listener::tcp(*address);
        listeners.push(listener.with_context(|| {
            format!("cannot listen on {address} (choose another with --listen)")
        })?);
    }
    Ok(listeners)
}

fn read_policy(args: &Args) -> anyhow::Result<Policy> {
    let policy = Policy {
        default_export: args.default_export.clone(),
        read_only: args.read_only,
        ..Policy::default()
    };
    let Some(path) = &args.export_policy else {
        return Ok(policy);
    };
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    policy
        .with_rules(&text)
        .with_context(|| path.display().to_string())
}

/// Reads the policy again on SIGHUP. Who sent it is not known.
async fn reload_policy(mut hangups: Signal, exports: Arc<Exports>, args: Args, notes: Arc<Notes>) {
    const ACTION: &str = "reload the export policy on SIGHUP";
    while hangups.recv().await.is_some() {
        // It is in the log if it cannot be noted; nobody else waits for that.
        match read_policy(&args) {
            Ok(policy) => {
                exports.set_policy(policy);
                info!("export policy read again");
                drop(notes.note("", ACTION));
            }
            Err(error) => {
                error!("export policy stays as it was: {error:#}");
                drop(notes.note("", &format!("could not {ACTION}: {error:#}")));
            }
        }
    }
}
