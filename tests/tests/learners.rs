//! Learners as processes: they hold the same data, never vote, slow nobody down, are fed by followers, and feed.

use std::time::{Duration, Instant};

use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use serde_json::Value;

const LEARNER: u8 = 5;
const MIB: usize = 1 << 20;

fn started(learners: u8) -> Cell {
    let layout = Layout {
        learners,
        ..Layout::small(3)
    };
    Cell::started(layout, "256M --chunk-size 1M")
}

fn write(client: &mut NbdClient, offset: u64, data: &[u8]) -> Duration {
    let begun = Instant::now();
    let reply = client.request(Command::Write, offset, data.len() as u32, data);
    assert_eq!(reply.expect("the gateway serves").error, 0);
    begun.elapsed()
}

/// Median time of so many writes of 4 KiB.
fn median(client: &mut NbdClient, writes: u64) -> Duration {
    let times = (0..writes).map(|number| write(client, number * 4096, &[number as u8; 4096]));
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    times[times.len() / 2]
}

fn server(status: &Value, id: u8) -> &Value {
    let servers = status["servers"].as_array().expect("a list");
    let found = servers.iter().find(|it| it["id"] == id);
    found.expect("the server is listed")
}

/// A learner that stands still: writes go on as fast, its lag shows in slots, bytes and seconds, nobody calls the cell less
/// safe for it, and it comes back by itself.
#[test]
fn a_stopped_learner_slows_nobody_down_and_its_lag_shows() {
    let mut cell = started(1);
    let mut client = cell.client(0);
    median(&mut client, 500);
    let before = median(&mut client, 500);
    cell.signal(&[LEARNER], "STOP");
    let written = Instant::now();
    let while_stopped = median(&mut client, 500);
    println!("median with the learner {before:.0?}, while it stands still {while_stopped:.0?}");
    // Other tests may run beside this one.
    assert!(while_stopped < before * 3 + Duration::from_millis(2));
    std::thread::sleep(Duration::from_secs(3));
    let status = cell.status().expect("the cell works");
    let lag = server(&status, LEARNER);
    let age_ms = written.elapsed().as_millis() as u64;
    let behind_ms = lag["behind_ms"].as_u64().expect("it is known");
    assert!((2800..age_ms + 1500).contains(&behind_ms), "{lag:#}");
    assert!(lag["behind_bytes"].as_u64() >= Some(400 * 4096), "{lag:#}");
    assert_eq!(status["servers_that_may_fail"], 1, "{status:#}");
    let text = cell.bench.run("pss", "status").done().stdout();
    println!("{text}");
    assert!(text.starts_with("Server 5 "), "{text}");
    assert!(text.contains("Any 1 core server may fail."), "{text}");

    cell.signal(&[LEARNER], "CONT");
    cell.wait_current();
    let status = cell.status().expect("the cell works");
    let lag = server(&status, LEARNER);
    assert_eq!(
        (
            &lag["behind_ms"],
            &lag["behind_bytes"],
            &lag["behind_slots"]
        ),
        (&0.into(), &0.into(), &0.into())
    );
}

/// With a majority of the core gone a learner does not make one, and gives what it has to servers that come back.
#[test]
fn a_learner_is_no_majority_and_feeds_a_new_disk() {
    let mut cell = started(1);
    let mut client = cell.client(0);
    for place in 0..64 {
        write(&mut client, place * MIB as u64, &vec![place as u8 + 1; MIB]);
    }
    cell.wait_current();
    let lost = 2;
    cell.kill(lost);
    std::fs::remove_dir_all(cell.path(lost)).expect("it is there");
    // The logs of the others do not go back to the beginning any more: chunks are copied.
    for place in 64..128 {
        write(&mut client, place * MIB as u64, &vec![place as u8 + 1; MIB]);
    }
    let leader = cell.leader();
    cell.format(lost, "--replace");
    cell.start(lost);
    cell.wait_current();
    drop(client);

    let other = (0..3).find(|id| *id != leader && *id != lost).expect("one");
    cell.kill(lost);
    cell.kill(other);
    wait_until("there is no majority", PATIENCE, || {
        let status = cell.status();
        status.is_some_and(|status| status["works"] == false)
    });
    for id in [leader, LEARNER] {
        cell.stop(id);
    }
    let size = 128 * MIB;
    let whole = cell.content(leader, "v", MIB, size);
    assert!((0..128).all(|place| whole[place * MIB] == place as u8 + 1));
    for id in [lost, LEARNER] {
        assert!(
            cell.content(id, "v", MIB, size) == whole,
            "the copy of server {id} differs"
        );
    }
}
