//! "`pssd start` needs no thought": the power of all servers fails at once under load, again and again, and they come up in any
//! order. What every 4 KiB block showed must be linearizable, nothing that was answered may be lost, and the copies are equal
//! in the end.
//!
//! Processes are killed here, so what was written and not synced stays; the simulator and `crash.rs` lose that as well.
//! `PSS_TEST_CUTS=N` cuts N times, `PSS_TEST_SEED=N` makes other choices.

use std::time::{Duration, Instant};

use pss_tests::load::{LOAD_BYTES, Load};
use pss_tests::processes::{Cell, Layout};
use pss_tests::rng::Rng;

const SERVERS: u8 = 3;
/// Connections to the gateway.
const WORKERS: usize = 4;
/// Service has returned by itself after this time at most. The gateway gives up after 30 s.
const RETURN: Duration = Duration::from_secs(25);
/// Cuts in the usual run.
const CUTS: u64 = 25;
/// Cuts with one history, which is then checked; a longer one takes longer to check than it takes to make.
const CUTS_AT_ONCE: u64 = 50;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |it| it.parse().expect("a number"))
}

/// How servers come up.
struct Order {
    /// Each with the time since the one before it.
    ids: Vec<(u8, Duration)>,
    /// The last one comes only when the others serve.
    late: bool,
}

impl Order {
    fn random(rng: &mut Rng) -> Order {
        let mut left: Vec<u8> = (0..SERVERS).collect();
        let mut ids = Vec::new();
        while !left.is_empty() {
            let place = rng.below(left.len() as u64) as usize;
            // At once, within an election, and after one could have ended.
            let wait = match rng.below(3) {
                0 => 0,
                1 => rng.between(1, 200),
                _ => rng.between(200, 700),
            };
            ids.push((left.remove(place), Duration::from_millis(wait)));
        }
        let late = rng.chance(333);
        Order { ids, late }
    }
}

/// Seconds, sorted: the least, the median, the 9th decile, the most.
fn figures(times: &mut [Duration]) -> String {
    times.sort();
    let at = |tenths: usize| times[(times.len() - 1) * tenths / 10].as_secs_f64();
    format!(
        "{:.2} / {:.2} / {:.2} / {:.2} s",
        at(0),
        at(5),
        at(9),
        at(10)
    )
}

/// Cuts so many times. Returns how long each took until all clients were served again, since a majority was started.
fn cut_again_and_again(cuts: u64, seed: u64) -> Vec<Duration> {
    let mut rng = Rng::new(seed);
    let mut cell = Cell::started(Layout::small(SERVERS), "64M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], WORKERS, seed);
    load.wait_served("the start", load.now(), RETURN);
    let mut times = Vec::new();
    for cut in 0..cuts {
        std::thread::sleep(Duration::from_millis(rng.between(20, 120)));
        // All of them before one is waited for.
        let all: Vec<u8> = (0..SERVERS).collect();
        cell.signal(&all, "KILL");
        for id in all {
            cell.kill(id);
        }
        let fault = load.now();
        let order = Order::random(&mut rng);
        let mut majority = None;
        let (last, first) = order.ids.split_last().expect("there are servers");
        for (id, wait) in first {
            std::thread::sleep(*wait);
            cell.start(*id);
            majority = Some(Instant::now());
        }
        let what = format!(
            "cut {cut}, up in order {:?}, late: {}",
            order.ids, order.late
        );
        if order.late {
            load.wait_served(&what, fault, RETURN);
            times.extend(majority.map(|at| at.elapsed()));
            cell.start(last.0);
            continue;
        }
        std::thread::sleep(last.1);
        cell.start(last.0);
        load.wait_served(&what, fault, RETURN);
        times.extend(majority.map(|at| at.elapsed()));
    }
    let mut history = load.finish();
    // A request that waits for a leader is answered in the end.
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    cell.wait_current();
    history.read_all(&mut cell.client(0));
    history.check();
    for id in 0..SERVERS {
        cell.stop(id);
    }
    let first = cell.content(0, "v", 1 << 20, LOAD_BYTES as usize);
    assert!(first.iter().any(|byte| *byte != 0));
    for id in 1..SERVERS {
        let other = cell.content(id, "v", 1 << 20, LOAD_BYTES as usize);
        assert!(
            other == first,
            "the copy of server {id} differs from that of server 0"
        );
    }
    times
}

fn run(cuts: u64) {
    let seed = number("PSS_TEST_SEED", 1);
    println!("PSS_TEST_SEED={seed}, {cuts} cuts");
    let (mut times, begun) = (Vec::new(), Instant::now());
    let mut left = cuts;
    while left > 0 {
        let some = left.min(CUTS_AT_ONCE);
        times.extend(cut_again_and_again(some, seed + left));
        left -= some;
    }
    println!(
        "{cuts} cuts in {:.0} s; from the start of the second server until every client had a write answered: {} \
         (least, median, 9th decile, most)",
        begun.elapsed().as_secs_f64(),
        figures(&mut times)
    );
}

#[test]
fn all_servers_lose_power_at_once() {
    run(number("PSS_TEST_CUTS", CUTS));
}

#[test]
#[ignore = "takes several minutes: `./run-tests.sh --all` runs it"]
fn all_servers_lose_power_at_once_200_times() {
    run(number("PSS_TEST_CUTS", 200));
}
