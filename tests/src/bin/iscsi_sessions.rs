//! What iSCSI sessions cost: the time from a connection to the first block that it reads, and memory and
//! processor time of `pss-iscsi` with many sessions that do nothing but answer its probes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use pss_tests::iscsi::Gateway;
use pss_tests::iscsi_client::{IscsiClient, cdb10};
use pss_tests::processes::{Cell, Layout, PATIENCE};

const TARGET: &str = "iqn.2001-03.jp.tritech:sessions";
/// What a thread that waits for probes needs.
const STACK_BYTES: usize = 128 << 10;

/// Logs many initiators in and measures what they cost
#[derive(Parser)]
struct Args {
    /// How many sessions
    #[arg(long, default_value_t = 1000)]
    sessions: u16,
    /// How long they idle, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let cell = Cell::started(Layout::small(3), "64M");
    cell.bench.run("pss", "volume create disk 64M").done();
    let conf = format!("<target {TARGET}>\nbacking-store disk\n</target>\n");
    let gateway = Gateway::start_with(&cell, 0, &conf, &[]);
    let before = gateway.process.resident_bytes();
    let mut times = Vec::new();
    for number in 1..=args.sessions {
        let begun = Instant::now();
        let mut client = IscsiClient::login(gateway.portal, TARGET, number, PATIENCE)?;
        client.ready()?;
        let read = client.command(&cdb10(0x28, 0, 8), 4096, &[])?;
        times.push(begun.elapsed());
        ensure!(read.status == 0 && read.data == [0; 4096], "{read:?}");
        let idle = move || client.idle();
        // It ends with the gateway.
        drop(thread::Builder::new().stack_size(STACK_BYTES).spawn(idle)?);
    }
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "from the connection to the first block read, {} logins one after the other: \
         min {:.2?}, p50 {:.2?}, p99 {:.2?}, max {:.2?}",
        times.len(),
        at(0),
        at(50),
        at(99),
        at(100)
    );
    let cpu = gateway.process.cpu_time();
    thread::sleep(Duration::from_secs(args.seconds));
    let used = gateway.process.cpu_time() - cpu;
    let memory = gateway.process.resident_bytes();
    println!(
        "{} idle sessions, probed every 10 s: {:.1} MiB ({:.1} MiB before they came), {:.2} % of a core over {} s",
        args.sessions,
        memory as f64 / f64::from(1 << 20),
        before as f64 / f64::from(1 << 20),
        used.as_secs_f64() * 100.0 / args.seconds as f64,
        args.seconds
    );
    Ok(())
}
