//! An NBD server of volumes in memory, for tests with NBD clients.
//!
//! Serves on a socket passed by the client (`nbdinfo -- [ memory_server ]`), on standard input
//! (`--stdio`), or where told.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use export_nbd::export::{Exports, Policy};
use export_nbd::listen::{Listener, Stream};
use export_nbd::memory::{MemoryDevice, MemoryVolumes};
use export_nbd::server::{Limits, Server};

#[derive(Parser)]
struct Args {
    /// Name of the volume.
    #[arg(long, default_value = "memory")]
    name: String,
    /// Size in MiB.
    #[arg(long, default_value_t = 64)]
    mebibytes: u64,
    #[arg(long)]
    read_only: bool,
    #[arg(long)]
    listen: Vec<SocketAddr>,
    #[arg(long)]
    unix: Vec<PathBuf>,
    #[arg(long)]
    stdio: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let volumes = MemoryVolumes::new([MemoryDevice::new(&args.name, args.mebibytes << 20)]);
    let policy = Policy {
        read_only: args.read_only,
        ..Policy::default()
    };
    let server = Server::new(Exports::new(volumes, policy), Limits::default());
    if args.stdio {
        let (stream, peer) = Stream::stdio()?;
        server.serve_stream(stream, peer).await;
        return Ok(());
    }
    let mut listeners = Listener::inherited()?;
    for address in args.listen {
        listeners.push(Listener::tcp(address)?);
    }
    for path in args.unix {
        listeners.push(Listener::unix(&path)?);
    }
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let stop = async {
        terminated.recv().await;
    };
    server.run(listeners, stop).await;
    Ok(())
}
