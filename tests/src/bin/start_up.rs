//! How long does `pss up` take on existing data, from its start to the first answered read? Fills a
//! volume, stops the cell, cleanly or with SIGKILL, starts it again, and reads one block over NBD.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{PATIENCE, Process};
use pss_tests::programs::Bench;

const MIB: u32 = 1 << 20;
/// Loopback address of the cell, which nothing else uses.
const HOST: &str = "127.0.4.1";

/// Starts `pss up` on existing data and measures the time to the first read
#[derive(Parser)]
struct Args {
    /// How much data there is
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    data: u32,
    /// Starts after a clean stop, and as many after SIGKILL
    #[arg(long, default_value_t = 10)]
    starts: usize,
}

/// `pss-up` in a directory.
struct Up {
    bench: Bench,
    nbd: SocketAddr,
}

impl Up {
    fn new() -> anyhow::Result<Up> {
        let bench = Bench::new();
        let record = |id: u8| {
            let path = bench.path(&format!("server{id}"));
            format!("{id} {HOST} {}\n", path.display())
        };
        let records: String = (0..3).map(record).collect();
        bench.servers(records);
        bench.run("pss", "key new cell.key").done();
        // A port that is free now.
        let nbd = TcpListener::bind((HOST, 0))?.local_addr()?;
        Ok(Up { bench, nbd })
    }

    fn start(&self) -> Process {
        let mut command = self.bench.command("pss-up");
        command.args(["--dir", ".", "--nbd", &self.nbd.to_string()]);
        command.args(["--iscsi", "127.0.0.1:0"]);
        Process::start("pss-up", &mut command, self.bench.path("log"))
    }

    /// Connects as soon as that is possible.
    fn connect(&self) -> anyhow::Result<NbdClient> {
        let end = Instant::now() + PATIENCE;
        loop {
            match NbdClient::connect(self.nbd, "vol001", PATIENCE) {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// From the start of the process to the first block.
    fn measure(&self) -> anyhow::Result<(Process, Duration)> {
        let begun = Instant::now();
        let running = self.start();
        let mut client = self.connect()?;
        let reply = client.request(Command::Read, 0, 4096, &[])?;
        let time = begun.elapsed();
        ensure!(reply.error == 0 && reply.data == [1; 4096], "wrong data");
        Ok((running, time))
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let up = Up::new()?;
    let mut running = up.start();
    let mut client = up.connect()?;
    for mib in 0..u64::from(args.data) {
        let offset = mib * u64::from(MIB);
        let reply = client.request(Command::Write, offset, MIB, &[1; MIB as usize])?;
        ensure!(
            reply.error == 0,
            "a write failed with error {}",
            reply.error
        );
    }
    drop(client);
    for (what, is_clean) in [("a clean stop", true), ("SIGKILL", false)] {
        let mut times = Vec::new();
        for _ in 0..args.starts {
            match is_clean {
                true => {
                    running.signal("INT");
                    ensure!(running.ends(PATIENCE) == Some(0), running.text());
                }
                false => running.kill(),
            }
            let (again, time) = up.measure().context(running.text())?;
            running = again;
            times.push(time);
        }
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!(
            "pss up on {} MiB, from its start to the first read, after {what}, {} starts: \
             min {:.0?}, p50 {:.0?}, max {:.0?}",
            args.data,
            times.len(),
            at(0),
            at(50),
            at(100)
        );
    }
    Ok(())
}
