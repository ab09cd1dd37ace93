//! What does one slow disk cost? Writes 4 KiB blocks at random places through `pss-nbd` to a cell of processes, one and 32 requests at a
//! time, while all disks are as they are, while a follower's takes 100 ms for each sync, and while the disk of the server does that
//! led before, once leadership has left it. The cases take turns, so that what else the machine does meets all of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE};
use pss_tests::rng::Rng;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 128 << 10;
const DEPTHS: [usize; 2] = [1, 32];
/// Before it the answers of the change itself would be counted.
const SETTLE: Duration = Duration::from_secs(1);
/// Longer than a leader with a slow disk stays.
const TERM: Duration = Duration::from_secs(12);

/// Measures what one slow disk costs
#[derive(Parser)]
struct Args {
    /// Core servers of the cell
    #[arg(long, default_value_t = 3)]
    servers: u8,
    /// How much longer each sync of the slow disk takes, milliseconds
    #[arg(long, default_value_t = 100)]
    delay: u32,
    /// How often each case is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// For how long each time and with each depth, seconds
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Flags of `pssd start`
    #[arg(
        long,
        default_value = "--segment-size 64M --checkpoint-size 256M --log-retain 256M"
    )]
    flags: String,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Case {
    Healthy,
    SlowFollower,
    SlowLeader,
}

/// Times of writes by case and depth.
type Times = BTreeMap<(Case, usize), Vec<Duration>>;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let layout = Layout {
        slow_disks: true,
        flags: args.flags.clone(),
        ..Layout::small(args.servers)
    };
    let mut cell = Cell::started(layout, "512M");
    let mut client = cell.client(0);
    let mut rng = Rng::new(1);
    // Everything that is written to exists before anything is measured.
    write(&mut client, &mut rng, 32, Duration::from_secs(10))?;
    let mut times = Times::new();
    let mut moves = Vec::new();
    for round in 1..=args.rounds {
        println!("round {round} of {}", args.rounds);
        let follower = (cell.leader() + 1) % args.servers;
        for case in [Case::Healthy, Case::SlowFollower, Case::SlowLeader] {
            match case {
                Case::Healthy => {}
                Case::SlowFollower => cell.delay(follower, &args.delay.to_string()),
                Case::SlowLeader => {
                    let leader = cell.leader();
                    cell.delay(leader, &args.delay.to_string());
                    moves.push(wait_for_move(&cell, &mut client, &mut rng, leader)?);
                }
            }
            measure(&args, case, &mut client, &mut rng, &mut times)?;
            for id in 0..args.servers {
                cell.delay(id, "0");
            }
            cell.wait_current();
        }
    }
    drop(client);
    println!(
        "{} servers, {} ms more for each sync of one disk, {} rounds of {} s; leadership left the slow disk after {moves:.1?}",
        args.servers, args.delay, args.rounds, args.seconds
    );
    report(&mut times);
    Ok(())
}

/// Writes until another server leads; gives how long that took.
fn wait_for_move(
    cell: &Cell,
    client: &mut NbdClient,
    rng: &mut Rng,
    leader: u8,
) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    while cell.leader() == leader {
        write(client, rng, 4, Duration::from_millis(500))?;
        ensure!(
            begun.elapsed() < PATIENCE,
            "leadership does not leave a slow disk"
        );
    }
    let took = begun.elapsed();
    // The next leader may be asked to leave in the next round.
    write(client, rng, 4, TERM.saturating_sub(took))?;
    Ok(took)
}

fn measure(
    args: &Args,
    case: Case,
    client: &mut NbdClient,
    rng: &mut Rng,
    times: &mut Times,
) -> anyhow::Result<()> {
    for depth in DEPTHS {
        write(client, rng, depth, SETTLE)?;
        let more = write(client, rng, depth, Duration::from_secs(args.seconds))?;
        times.entry((case, depth)).or_default().extend(more);
    }
    Ok(())
}

/// Keeps so many writes under way; gives their times.
fn write(
    client: &mut NbdClient,
    rng: &mut Rng,
    depth: usize,
    time: Duration,
) -> anyhow::Result<Vec<Duration>> {
    let begun = Instant::now();
    let mut sent = BTreeMap::new();
    let mut times = Vec::new();
    loop {
        while sent.len() < depth && begun.elapsed() < time {
            let offset = rng.below(BLOCKS) * u64::from(BLOCK);
            let data = [offset as u8; BLOCK as usize];
            let at = Instant::now();
            sent.insert(client.submit(Command::Write, offset, BLOCK, &data)?, at);
        }
        if sent.is_empty() {
            return Ok(times);
        }
        let reply = client.complete()?;
        ensure!(
            reply.error == 0,
            "a write failed with error {}",
            reply.error
        );
        let at = sent
            .remove(&reply.cookie)
            .context("an answer to no request")?;
        times.push(at.elapsed());
    }
}

fn report(times: &mut Times) {
    let mut healthy = BTreeMap::new();
    for ((case, depth), times) in times {
        times.sort();
        let at = |per_mille: usize| times[(times.len() - 1) * per_mille / 1000];
        let base = *healthy.entry(*depth).or_insert(at(500));
        println!(
            "{case:?}, {depth} at a time: {} writes, median {:.0?} ({:+.1} %), p90 {:.0?}, p99 {:.0?}, p99.9 {:.0?}, max {:.1?}",
            times.len(),
            at(500),
            (at(500).as_secs_f64() / base.as_secs_f64() - 1.0) * 100.0,
            at(900),
            at(990),
            at(999),
            at(1000)
        );
    }
}
