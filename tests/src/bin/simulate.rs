//! Runs simulated cells: `simulate --seeds N [--seed S]`.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use pss_tests::sim::{self, Report, SimConfig};

/// Simulates whole cells with faults and checks every promise.
#[derive(Parser)]
struct Arguments {
    /// How many cells, with one seed each.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// First seed. With `--seeds 1` this replays one cell.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// From one seed to the next: with `--seed 7 --step 8` only cells whose chunks rot, for instance.
    #[arg(long, default_value_t = 1)]
    step: u64,
    /// Requests of all clients of a cell.
    #[arg(long, default_value_t = 2000)]
    operations: u32,
    /// Core servers; by the seed if left out.
    #[arg(long)]
    core: Option<u8>,
    /// Threads.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print what happens.
    #[arg(long)]
    trace: bool,
    /// A deliberate bug, by name; ends with the first seed that finds it.
    #[arg(long)]
    bug: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let bug = match &arguments.bug {
        None => None,
        Some(name) => match sim::BUGS.iter().find(|bug| bug.name() == *name) {
            Some(bug) => Some(*bug),
            None => {
                let names: Vec<String> = sim::BUGS.iter().map(sim::SimBug::name).collect();
                eprintln!("there is no bug {name}; there are {}", names.join(", "));
                return ExitCode::from(2);
            }
        },
    };
    let jobs = arguments.jobs.unwrap_or(cores).max(1);
    let next = AtomicU64::new(arguments.seed);
    let step = arguments.step.max(1);
    let end = arguments.seed + arguments.seeds * step;
    let total: Mutex<Report> = Mutex::default();
    let failed = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(step, Ordering::Relaxed);
                    if seed >= end || (bug.is_some() && failed.load(Ordering::Relaxed) > 0) {
                        return;
                    }
                    let config = SimConfig {
                        seed,
                        core: arguments.core,
                        operations: arguments.operations,
                        bug,
                        trace: arguments.trace,
                    };
                    match sim::run_caught(config) {
                        Ok(report) => {
                            let mut total = total.lock().expect("no thread panics with it");
                            total.add(&report);
                        }
                        Err(failure) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            println!("{failure}");
                            let operations = arguments.operations;
                            println!(
                                "replay: cargo run --release -p pss-tests --bin simulate -- \
                                 --seeds 1 --seed {seed} --operations {operations} --trace"
                            );
                        }
                    }
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let failed = failed.into_inner();
    let total = total.into_inner().expect("no thread panics with it");
    println!("{} seeds, {failed} failed, {seconds:.1} s", arguments.seeds);
    println!("{:.1} seeds per minute and thread", {
        arguments.seeds as f64 * 60.0 / seconds / jobs as f64
    });
    println!("{total:?}");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
