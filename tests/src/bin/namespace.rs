//! How fast is a mounted namespace? Lists a volume of many chunks, and reads one through the mount and over NBD.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use pss_tests::fuse::Mount;
use pss_tests::nbd_client::{self, NbdClient};
use pss_tests::processes::{Cell, Layout, Process};
use pss_tests::rng::Rng;

const MIB: usize = 1 << 20;
/// The smallest that there are: many for little data.
const CHUNK_BYTES: u64 = 64 << 10;
/// Writes under way at a time.
const WRITES: usize = 64;

/// Lists and reads a mounted namespace
#[derive(Parser)]
struct Args {
    /// Chunks of the volume that is listed
    #[arg(long, default_value_t = 100_000)]
    chunks: u64,
    /// Data of the volume that is read, MiB
    #[arg(long, default_value_t = 1024)]
    data: usize,
    /// How often each thing is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let layout = Layout {
        flags: String::new(),
        ..Layout::small(3)
    };
    let cell = Cell::started(layout, &format!("{}M", args.data));
    let size = args.chunks * CHUNK_BYTES;
    let create = format!("volume create many {size} --chunk-size 64K");
    cell.bench.run("pss", &create).done();

    let mut client = NbdClient::connect(cell.nbd(0), "many", Duration::from_secs(60))?;
    write_all(
        &mut client,
        (0..args.chunks).map(|chunk| chunk * CHUNK_BYTES),
        &[1; 4096],
    )?;
    let mut rng = Rng::new(1);
    let data: Vec<u8> = (0..MIB).map(|_| rng.next() as u8).collect();
    let mut client = cell.client(0);
    write_all(
        &mut client,
        (0..args.data).map(|at| (at * MIB) as u64),
        &data,
    )?;

    for round in 1..=args.rounds {
        // What the kernel has learned of names is forgotten with the mount.
        let mount = Mount::start(&cell, "mnt", "");
        let many = mount.path("many");
        let (one, count) = timed("ls", &["-l".as_ref(), mount.path("many/00/07").as_ref()])?;
        ensure!(count == 257, "{count} lines");
        let (names, count) = timed("find", &[many.as_ref()])?;
        ensure!(count > args.chunks as usize, "{count} names");
        let (again, _) = timed("ls", &["-lR".as_ref(), many.as_ref()])?;
        println!(
            "round {round}: ls -l of 256 chunks {one:.1?}, find of {} chunks {names:.2?}, ls -lR {again:.2?}",
            args.chunks
        );
        let before = cpu(&cell, &mount);
        let mounted = dd(&mount.path(".volumes/v"), args.data)?;
        let used = cpu(&cell, &mount) - before;
        let started = Instant::now();
        for at in 0..args.data {
            let offset = (at * MIB) as u64;
            let reply = client.request(nbd_client::Command::Read, offset, MIB as u32, &[])?;
            ensure!(
                reply.error == 0 && reply.data == data,
                "wrong data at {offset}"
            );
        }
        let nbd = started.elapsed();
        let rate = |time: Duration| (args.data * MIB) as f64 / 1e6 / time.as_secs_f64();
        println!(
            "round {round}: {} MiB with dd bs=1M through the mount {:.0} MB/s ({:.0} us of CPU per MiB), over NBD one MiB at a time {:.0} MB/s",
            args.data,
            rate(mounted),
            used.as_secs_f64() * 1e6 / args.data as f64,
            rate(nbd)
        );
    }
    Ok(())
}

fn write_all(
    client: &mut NbdClient,
    offsets: impl Iterator<Item = u64>,
    data: &[u8],
) -> anyhow::Result<()> {
    let most = match data.len() < MIB {
        true => WRITES,
        false => 2,
    };
    for offset in offsets {
        if client.in_flight() >= most {
            ensure!(client.complete()?.error == 0, "a write failed");
        }
        client.submit(nbd_client::Command::Write, offset, data.len() as u32, data)?;
    }
    while client.in_flight() > 0 {
        ensure!(client.complete()?.error == 0, "a write failed");
    }
    Ok(())
}

/// Runs a program; how long it took and how many lines it wrote.
fn timed(program: &str, args: &[&std::ffi::OsStr]) -> anyhow::Result<(Duration, usize)> {
    let started = Instant::now();
    let output = Command::new(program)
        .args(args)
        .stderr(Stdio::inherit())
        .output()?;
    let took = started.elapsed();
    ensure!(output.status.success(), "{program} failed");
    let lines = output.stdout.iter().filter(|byte| **byte == b'\n').count();
    Ok((took, lines))
}

fn dd(path: &Path, mib: usize) -> anyhow::Result<Duration> {
    ensure!(
        fs::metadata(path)?.len() == (mib * MIB) as u64,
        "wrong size"
    );
    let started = Instant::now();
    let status = Command::new("dd")
        .arg(format!("if={}", path.display()))
        .args(["of=/dev/null", "bs=1M", "status=none"])
        .status()?;
    ensure!(status.success(), "dd failed");
    Ok(started.elapsed())
}

/// Processor time of the servers and the mount.
fn cpu(cell: &Cell, mount: &Mount) -> Duration {
    let servers = cell.servers.values().map(Process::cpu_time);
    servers.sum::<Duration>() + mount.process.cpu_time()
}
