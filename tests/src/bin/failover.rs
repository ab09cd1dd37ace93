//! How long does a client wait when a server fails? Makes servers fail again and again, on machines of their own
//! and under load, while one client writes, one request at a time, and prints how long its longest wait
//! was, counted from the fault on.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::{Parser, ValueEnum};
use pss_tests::load::{LOAD_BYTES, Load};
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::netns::{self, Host, Network};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use pss_tests::rng::Rng;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 10_000;
/// What is felt is looked for during this time after service has returned.
const AFTER: Duration = Duration::from_secs(1);

/// Makes servers fail and measures how long nobody answers (needs root)
#[derive(Parser)]
struct Args {
    /// How often, of each fault
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,
    /// Faults, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Fault::value_variants().to_vec())]
    faults: Vec<Fault>,
    /// Servers of the cell
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=5))]
    servers: u8,
    /// Connections that read and write beside the one that is measured
    #[arg(long, default_value_t = 4)]
    load: usize,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Fault {
    LeaderKilled,
    LeaderCut,
    LeaderPaused,
    FollowerKilled,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::LeaderKilled => "leader-killed",
            Fault::LeaderCut => "leader-cut",
            Fault::LeaderPaused => "leader-paused",
            Fault::FollowerKilled => "follower-killed",
        })
    }
}

/// Writes since the last fault: when they were sent and answered, since the start.
type Writes = Mutex<Vec<(Duration, Duration)>>;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    netns::end_on_signals();
    let network = Arc::new(Network::new(0..args.servers, 1));
    network.at_router(|| measure(&args, &network))
}

fn measure(args: &Args, network: &Arc<Network>) -> anyhow::Result<()> {
    let layout = Layout {
        network: Some(Arc::clone(network)),
        ..Layout::small(args.servers)
    };
    let mut cell = Cell::started(layout, "128M");
    netns::remove_on_signal(cell.bench.path(""));
    let load = Load::start_at(network, vec![cell.nbd(0)], args.load, 1);
    let client = network.at(Host::Gateway(0), || cell.client(0));
    let writes = Arc::new(Writes::default());
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let writer = {
        let (writes, stop) = (Arc::clone(&writes), Arc::clone(&stop));
        std::thread::spawn(move || write(client, &writes, &stop, start))
    };
    let mut rng = Rng::new(1);
    for fault in &args.faults {
        let mut waits = Vec::new();
        for number in 1..=args.kills {
            cell.wait_current();
            std::thread::sleep(Duration::from_millis(rng.between(300, 800)));
            let leader = cell.leader();
            let other = (leader + rng.between(1, u64::from(args.servers) - 1) as u8) % args.servers;
            let victim = match fault {
                Fault::FollowerKilled => other,
                _ => leader,
            };
            lock(&writes).clear();
            let failed = start.elapsed();
            begin(*fault, &mut cell, network, victim);
            // Until then the victim may have answered.
            let complete = start.elapsed();
            wait_until("writes go on", PATIENCE, || {
                let writes = lock(&writes);
                writes.last().is_some_and(|(sent, _)| *sent > complete)
            });
            std::thread::sleep(AFTER);
            let wait = longest_wait(&lock(&writes), failed);
            println!(
                "{fault} {number} of {}: server {victim}, {}",
                args.kills,
                ms(wait)
            );
            waits.push(wait);
            end(*fault, &mut cell, network, victim);
        }
        show(args, *fault, waits);
    }
    stop.store(true, Ordering::Relaxed);
    let count = writer.join().expect("the writer does not panic")?;
    println!("{count} writes were measured");
    let history = load.finish();
    ensure!(
        history.errors.is_empty(),
        "requests failed: {:?}",
        history.errors
    );
    if args.load > 0 {
        history.check();
    }
    Ok(())
}

fn begin(fault: Fault, cell: &mut Cell, network: &Network, victim: u8) {
    match fault {
        Fault::LeaderKilled | Fault::FollowerKilled => cell.kill(victim),
        Fault::LeaderCut => network.isolate(Host::Server(victim)),
        Fault::LeaderPaused => cell.signal(&[victim], "STOP"),
    }
}

fn end(fault: Fault, cell: &mut Cell, network: &Network, victim: u8) {
    match fault {
        Fault::LeaderKilled | Fault::FollowerKilled => cell.start(victim),
        Fault::LeaderCut => network.heal(),
        Fault::LeaderPaused => cell.signal(&[victim], "CONT"),
    }
}

fn show(args: &Args, fault: Fault, mut waits: Vec<Duration>) {
    waits.sort();
    let at = |percent: usize| waits[(waits.len() - 1) * percent / 100];
    println!(
        "{fault}: longest wait for a write from the fault on, {} times, {} servers, {} other connections: \
         min {}, p50 {}, p90 {}, max {}",
        waits.len(),
        args.servers,
        args.load,
        ms(at(0)),
        ms(at(50)),
        ms(at(90)),
        ms(at(100))
    );
}

fn ms(wait: Duration) -> String {
    format!("{:.0} ms", wait.as_secs_f64() * 1000.0)
}

/// Of the writes that were answered after the fault, the longest wait, without what it had waited before.
fn longest_wait(writes: &[(Duration, Duration)], failed: Duration) -> Duration {
    let after = writes.iter().filter(|(_, answered)| *answered > failed);
    let waits = after.map(|(sent, answered)| *answered - (*sent).max(failed));
    waits.max().unwrap_or(Duration::MAX)
}

/// Writes behind what the load uses until it is stopped; gives how many writes that were.
fn write(
    mut client: NbdClient,
    writes: &Writes,
    stop: &AtomicBool,
    start: Instant,
) -> anyhow::Result<u64> {
    let mut rng = Rng::new(2);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let offset = LOAD_BYTES + rng.below(BLOCKS) * u64::from(BLOCK);
        let data = [count as u8; BLOCK as usize];
        let sent = start.elapsed();
        let reply = client.request(Command::Write, offset, BLOCK, &data)?;
        ensure!(
            reply.error == 0,
            "a write failed with error {}",
            reply.error
        );
        lock(writes).push((sent, start.elapsed()));
        count += 1;
    }
    Ok(count)
}

fn lock(writes: &Writes) -> MutexGuard<'_, Vec<(Duration, Duration)>> {
    writes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_count_from_the_fault_on() {
        const fn at(ms: u64) -> Duration {
            Duration::from_millis(ms)
        }
        let writes = [
            (at(0), at(900)),
            (at(990), at(1300)),
            (at(1300), at(1550)),
            (at(1550), at(1560)),
        ];
        assert_eq!(longest_wait(&writes, at(1000)), at(300));
        assert_eq!(longest_wait(&writes, at(1100)), at(250));
        assert_eq!(longest_wait(&writes, at(2000)), Duration::MAX);
    }
}
