//! Faults by a seed on a cell of processes in network namespaces, under load: `chaos --minutes N --seed S`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use pss_tests::chaos::{Options, run};
use pss_tests::netns;

/// Five servers and two gateways on machines of their own, with faults; every promise is checked (needs root)
#[derive(Parser)]
struct Args {
    /// For how long faults begin
    #[arg(long, default_value_t = 60.0, value_parser = minutes)]
    minutes: f64,
    /// Which faults, on whom, for how long; not when exactly
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Draw a timeline of answered operations and faults (SVG)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Damage no files
    #[arg(long)]
    no_rot: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "a number is needed".to_owned())?;
    match minutes > 0.0 && minutes <= 100_000.0 {
        true => Ok(minutes),
        false => Err("more than 0 and at most 100000".to_owned()),
    }
}

fn main() {
    let args = Args::parse();
    netns::end_on_signals();
    run(&Options {
        duration: Duration::from_secs_f64(args.minutes * 60.0),
        seed: args.seed,
        plot: args.plot,
        rot: !args.no_rot,
    });
}
