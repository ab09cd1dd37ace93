//! How long does a client wait when the leader is killed? Kills the leader of a cell of processes again
//! and again while one client writes, one request at a time, and prints how long it took from each kill
//! to the first answer to a write that was sent after it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use pss_tests::rng::Rng;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 10_000;

/// Kills leaders and measures how long nobody answers
#[derive(Parser)]
struct Args {
    /// How often
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// Servers of the cell
    #[arg(long, default_value_t = 3)]
    servers: u8,
}

/// Writes since the last kill: when they were sent and answered, since the start.
type Writes = Mutex<Vec<(Duration, Duration)>>;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut cell = Cell::started(Layout::small(args.servers), "64M");
    let client = cell.client(0);
    let writes = Arc::new(Writes::default());
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let writer = {
        let (writes, stop) = (Arc::clone(&writes), Arc::clone(&stop));
        std::thread::spawn(move || write(client, &writes, &stop, start))
    };
    let mut outages = Vec::new();
    let mut rng = Rng::new(1);
    for kill in 1..=args.kills {
        cell.wait_current();
        let leader = cell.leader();
        std::thread::sleep(Duration::from_millis(rng.between(300, 800)));
        lock(&writes).clear();
        let killed = start.elapsed();
        cell.kill(leader);
        wait_until("writes go on", PATIENCE, || {
            lock(&writes).last().is_some_and(|(sent, _)| *sent > killed)
        });
        let outage = outage(&lock(&writes), killed);
        println!("{kill} of {}: server {leader}, {outage:.0?}", args.kills);
        outages.push(outage);
        cell.start(leader);
    }
    stop.store(true, Ordering::Relaxed);
    let count = writer.join().expect("the writer does not panic")?;
    outages.sort();
    let at = |percent: usize| outages[(outages.len() - 1) * percent / 100];
    println!(
        "first answered write after the leader was killed, {} kills, {} servers, {count} writes: \
         min {:.0?}, p50 {:.0?}, p90 {:.0?}, max {:.0?}",
        outages.len(),
        args.servers,
        at(0),
        at(50),
        at(90),
        at(100)
    );
    Ok(())
}

/// The old leader may have answered a write that was on its way; the one that waited for the new leader
/// took longest.
fn outage(writes: &[(Duration, Duration)], killed: Duration) -> Duration {
    let after = writes.iter().filter(|(_, answered)| *answered > killed);
    let waited = after.max_by_key(|(sent, answered)| *answered - *sent);
    waited.map_or(Duration::MAX, |(_, answered)| *answered - killed)
}

/// Writes until it is stopped; gives how many writes that were.
fn write(
    mut client: NbdClient,
    writes: &Writes,
    stop: &AtomicBool,
    start: Instant,
) -> anyhow::Result<u64> {
    let mut rng = Rng::new(2);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let offset = rng.below(BLOCKS) * u64::from(BLOCK);
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
