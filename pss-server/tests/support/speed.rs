//! How fast a cell in one process is, and which thread takes how much time. Not a benchmark to compare
//! with others: for finding out where time goes. Run it with
//! `cargo test --release -p pss-server --test servers speed -- --ignored --nocapture`.

use std::collections::BTreeMap;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pss_core::volume::device::{CompletionQueue, DeviceRequest};
use pss_server::config::Tuning;

use super::{TestCell, Volume};

const VOLUME_BYTES: u64 = 1 << 30;

#[test]
#[ignore = "measures; nothing can fail"]
fn speed() {
    let seconds = std::env::var("SECONDS_EACH").map_or(3, |text| text.parse().unwrap());
    let cell = TestCell::started(3, Tuning::default());
    let client = cell.client();
    let created = client.cell.create_volume("v", VOLUME_BYTES, 4 << 20);
    cell.runtime.block_on(created).unwrap();
    let volume = client.open("v");
    for piece in 0..VOLUME_BYTES >> 20 {
        volume.write(piece << 20, &vec![1; 1 << 20]);
    }
    let only = std::env::var("ONLY").unwrap_or_default();
    let time = Duration::from_secs(seconds);
    let before = cpu_by_thread();
    std::thread::sleep(time);
    let idle: f64 = cpu_by_thread()
        .iter()
        .map(|(thread, after)| after - before.get(thread).copied().unwrap_or(0.0))
        .sum();
    println!(
        "idle: {:.2} % of a processor",
        idle / time.as_secs_f64() * 100.0
    );
    for (name, depth, bytes, write) in [
        ("write 4K QD1", 1, 4096, true),
        ("write 4K QD32", 32, 4096, true),
        ("read 4K QD1", 1, 4096, false),
        ("read 4K QD32", 32, 4096, false),
        ("write 1M QD8", 8, 1 << 20, true),
        ("read 1M QD8", 8, 1 << 20, false),
    ] {
        if name.contains(&only) {
            run(name, &volume, depth, bytes, write, time);
        }
    }
}

fn run(name: &str, volume: &Volume, depth: u64, bytes: u64, write: bool, time: Duration) {
    let data = Bytes::from(vec![7; bytes as usize]);
    let mut seed = 1_u64;
    let mut request = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset_bytes = (seed >> 33) % (VOLUME_BYTES / bytes) * bytes;
        match write {
            true => DeviceRequest::Write {
                offset_bytes,
                data: data.clone(),
                fua: false,
            },
            false => DeviceRequest::Read {
                offset_bytes,
                length_bytes: bytes as u32,
            },
        }
    };
    let (done, wake) = channel();
    let queue = CompletionQueue::new(Box::new(move || _ = done.send(())));
    let mut latencies = Vec::new();
    let before = cpu_by_thread();
    let start = Instant::now();
    let mut started = vec![start; depth as usize];
    for cookie in 0..depth {
        volume.device.submit(request(), queue.completion(cookie));
    }
    let mut in_flight = depth;
    let mut results = Vec::new();
    while in_flight > 0 {
        wake.recv().unwrap();
        results.clear();
        queue.take(&mut results);
        for (cookie, result) in results.drain(..) {
            result.unwrap();
            let now = Instant::now();
            latencies.push(now - started[cookie as usize]);
            if now - start < time {
                started[cookie as usize] = now;
                volume.device.submit(request(), queue.completion(cookie));
            } else {
                in_flight -= 1;
            }
        }
    }
    let count = latencies.len() as f64;
    let elapsed = start.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |part: f64| latencies[(part * (count - 1.0)) as usize].as_micros();
    println!(
        "{name}: {:.0}/s, {} us median, {} us 99 %, {} us longest",
        count / elapsed,
        at(0.5),
        at(0.99),
        at(1.0),
    );
    let mut total = 0.0;
    for (thread, after) in cpu_by_thread() {
        let used = (after - before.get(&thread).copied().unwrap_or(0.0)) * 1e6 / count;
        if used > 0.2 {
            println!("    {thread:16} {used:6.1} us CPU per request");
        }
        if thread.starts_with("pssd") {
            total += used;
        }
    }
    println!("    servers together {total:6.1} us CPU per request");
}

/// Seconds of CPU time, by name of thread.
fn cpu_by_thread() -> BTreeMap<String, f64> {
    let mut all = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else {
            continue;
        };
        let Ok(times) = std::fs::read_to_string(task.join("schedstat")) else {
            continue;
        };
        let nanoseconds: f64 = times.split(' ').next().unwrap().parse().unwrap();
        *all.entry(name.trim().to_owned()).or_insert(0.0) += nanoseconds / 1e9;
    }
    all
}
