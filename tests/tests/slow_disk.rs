//! Disks that take 100 ms for each sync, or do not end one: majority answers hide them, and leadership leaves them.

use std::time::{Duration, Instant};

use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};

/// A leader stays so long at least.
const TERM: Duration = Duration::from_secs(10);
const SLOW: &str = "100";

fn started() -> (Cell, NbdClient) {
    let layout = Layout {
        slow_disks: true,
        ..Layout::small(3)
    };
    let cell = Cell::started(layout, "64M");
    let client = cell.client(0);
    (cell, client)
}

/// Writes blocks one after the other for a while; gives the times, in order.
fn writes(client: &mut NbdClient, time: Duration) -> Vec<Duration> {
    let begun = Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < time {
        let number = times.len() as u64 % 10_000;
        let sent = Instant::now();
        let data = [number as u8; 4096];
        let reply = client.request(Command::Write, number * 4096, 4096, &data);
        assert_eq!(reply.expect("the gateway serves").error, 0);
        times.push(sent.elapsed());
    }
    times.sort();
    times
}

fn median(times: &[Duration]) -> Duration {
    times[times.len() / 2]
}

fn ballot(cell: &Cell) -> String {
    let status = cell.status().expect("the cell works");
    let leader = status["leader"].as_u64().expect("somebody leads");
    status["servers"][leader as usize]["status"]["ballot"].to_string()
}

#[test]
fn a_slow_follower_holds_nobody_up() {
    let (mut cell, mut client) = started();
    let healthy = writes(&mut client, Duration::from_secs(2));
    let leader = cell.leader();
    cell.delay((leader + 1) % 3, SLOW);
    let slow = writes(&mut client, Duration::from_secs(3));
    println!(
        "median {:.0?}, with a slow follower {:.0?}",
        median(&healthy),
        median(&slow)
    );
    // Other tests may run beside this one; the figures are for the benchmark.
    assert!(median(&slow) < median(&healthy) * 3 + Duration::from_millis(2));
    assert_eq!(cell.leader(), leader);
    cell.delay((leader + 1) % 3, "");
    cell.wait_current();
}

/// Leadership leaves a slow disk by itself, does not come back as long as it is slow, and stays where all are as slow.
#[test]
fn leadership_leaves_a_slow_disk() {
    let (mut cell, mut client) = started();
    let healthy = writes(&mut client, TERM);
    let slow = cell.leader();
    cell.delay(slow, SLOW);
    let begun = Instant::now();
    let mut leader = slow;
    while leader == slow {
        let times = writes(&mut client, Duration::from_millis(500));
        assert!(
            begun.elapsed() < PATIENCE,
            "it leads on; median {:?}",
            median(&times)
        );
        leader = cell.leader();
    }
    println!("left after {:.1?}", begun.elapsed());
    let text = cell.servers[&slow].text();
    assert!(text.contains("much slower than the others'"), "{text}");

    let before = ballot(&cell);
    let after = writes(&mut client, TERM + Duration::from_secs(5));
    println!(
        "median {:.0?}, with one slow {:.0?}",
        median(&healthy),
        median(&after)
    );
    assert!(median(&after) < median(&healthy) * 3 + Duration::from_millis(2));
    assert_eq!(ballot(&cell), before, "leadership wanders");

    // No reason to leave where nobody is better off: the median is that of the disks.
    for id in 0..3 {
        cell.delay(id, SLOW);
    }
    let all = writes(&mut client, TERM);
    assert!(
        median(&all) >= Duration::from_millis(100),
        "{:?}",
        median(&all)
    );
    assert_eq!(ballot(&cell), before, "leadership wanders");
    for id in 0..3 {
        cell.delay(id, "");
    }
    cell.wait_current();
}

#[test]
fn leadership_leaves_a_disk_that_hangs() {
    let (mut cell, mut client) = started();
    writes(&mut client, TERM);
    let leader = cell.leader();
    cell.delay(leader, "hang");
    let begun = Instant::now();
    let times = writes(&mut client, Duration::from_secs(5));
    let longest = times[times.len() - 1];
    println!("longest write {longest:.1?}");
    assert!(longest < Duration::from_secs(20));
    assert!(times.len() > 100, "{}", times.len());
    assert_ne!(cell.leader(), leader);
    // It runs, and goes on when its disk does.
    cell.delay(leader, "");
    cell.wait_current();
    println!("current {:.1?} after the disk hung", begun.elapsed());
    wait_until("the first line says so", PATIENCE, || {
        cell.status()
            .is_some_and(|it| it["servers_that_may_fail"] == 1)
    });
}
