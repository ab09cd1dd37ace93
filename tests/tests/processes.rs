//! Five servers and two gateways as processes that are killed and paused under load from several NBD
//! connections: what every 4 KiB block showed must be linearizable, nothing that was answered may be
//! lost, and service must return by itself.
//!
//! `PSS_TEST_SEED=N` makes other choices.

use std::time::{Duration, Instant};

use pss_tests::load::{LOAD_BYTES, Load};
use pss_tests::processes::{Cell, Layout};
use pss_tests::rng::Rng;

/// Connections, half of them at home on each gateway.
const WORKERS: usize = 6;
/// Service has returned by itself after this time at most. The gateways give up after 30 s.
const RETURN: Duration = Duration::from_secs(25);
/// Load between two faults.
const CALM: Duration = Duration::from_millis(1500);

/// The cell with its load.
struct Chaos {
    cell: Cell,
    load: Load,
    rng: Rng,
}

impl Chaos {
    fn new(seed: u64) -> Chaos {
        let layout = Layout {
            gateways: 2,
            ..Layout::small(5)
        };
        let cell = Cell::started(layout, "64M --chunk-size 1M");
        let load = Load::start(vec![cell.nbd(0), cell.nbd(1)], WORKERS, seed);
        Chaos {
            cell,
            load,
            rng: Rng::new(seed),
        }
    }

    /// Servers, chosen at random.
    fn some(&mut self, count: usize) -> Vec<u8> {
        let mut all: Vec<u8> = (0..5).collect();
        while all.len() > count {
            let place = self.rng.below(all.len() as u64);
            all.remove(place as usize);
        }
        all
    }

    fn calm(&self) {
        std::thread::sleep(CALM);
    }

    /// SIGKILL; service returns without them; they are started again and catch up.
    fn kill(&mut self, what: &str, ids: &[u8]) {
        self.calm();
        let fault = self.load.now();
        for id in ids {
            self.cell.signal(&[*id], "KILL");
        }
        for id in ids {
            self.cell.kill(*id);
        }
        let what = format!("{what} {ids:?} killed");
        if ids.len() <= 2 {
            self.load.wait_served(&what, fault, RETURN);
            self.calm();
        }
        let again = self.load.now();
        for id in ids {
            self.cell.start(*id);
        }
        self.load
            .wait_served(&format!("{what}, started again"), again, RETURN);
        self.cell.wait_current();
    }

    /// The disk of a server is lost: it gets an empty one, and learns everything under load.
    fn wipe(&mut self, what: &str, id: u8) {
        self.calm();
        let fault = self.load.now();
        self.cell.kill(id);
        std::fs::remove_dir_all(self.cell.path(id)).expect("it is there");
        let what = format!("{what} {id} wiped");
        self.load.wait_served(&what, fault, RETURN);
        self.cell.format(id, "--replace");
        let again = self.load.now();
        self.cell.start(id);
        let what = format!("{what}, started again");
        self.load.wait_served(&what, again, RETURN);
        self.cell.wait_current();
    }

    /// SIGSTOP for two to four seconds, then SIGCONT.
    fn pause(&mut self, what: &str, ids: &[u8]) {
        self.calm();
        let fault = self.load.now();
        self.cell.signal(ids, "STOP");
        let until = Instant::now() + Duration::from_millis(self.rng.between(2000, 4000));
        let what = format!("{what} {ids:?} paused");
        if ids.len() <= 2 {
            self.load.wait_served(&what, fault, RETURN);
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        let again = self.load.now();
        self.cell.signal(ids, "CONT");
        self.load
            .wait_served(&format!("{what}, going on"), again, RETURN);
        self.cell.wait_current();
    }

    /// SIGKILL of a gateway; its clients go to the other one.
    fn kill_gateway(&mut self, gateway: usize) {
        self.calm();
        let fault = self.load.now();
        self.cell.gateways.remove(&gateway);
        let what = format!("gateway {gateway} killed");
        self.load.wait_served(&what, fault, RETURN);
        self.calm();
        self.cell.start_gateway(gateway);
        let again = self.load.now();
        self.load
            .wait_served(&format!("{what}, started again"), again, RETURN);
    }

    /// SIGSTOP of a gateway: its clients wait, those of the other one do not; then SIGCONT.
    fn pause_gateway(&mut self, gateway: usize) {
        self.calm();
        self.cell.gateways[&gateway].signal("STOP");
        let other = 1 - gateway;
        let client = self.cell.client(other);
        drop(client);
        std::thread::sleep(Duration::from_millis(self.rng.between(2000, 4000)));
        let again = self.load.now();
        self.cell.gateways[&gateway].signal("CONT");
        let what = format!("gateway {gateway} paused, going on");
        self.load.wait_served(&what, again, RETURN);
    }
}

#[test]
fn servers_and_gateways_are_killed_and_paused_under_load() {
    let seed = std::env::var("PSS_TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("PSS_TEST_SEED={seed}");
    let mut chaos = Chaos::new(seed);

    let two = chaos.some(2);
    chaos.kill("servers", &two);
    let two = chaos.some(2);
    chaos.pause("servers", &two);
    let leader = chaos.cell.leader();
    chaos.kill("leader", &[leader]);
    let leader = chaos.cell.leader();
    chaos.pause("leader", &[leader]);
    chaos.kill_gateway(0);
    let leader = chaos.cell.leader();
    let other = (leader + 1 + chaos.rng.below(4) as u8) % 5;
    chaos.kill("leader and another", &[leader, other]);
    chaos.kill("all", &[0, 1, 2, 3, 4]);
    chaos.kill_gateway(1);
    chaos.pause_gateway(0);
    chaos.pause("all", &[0, 1, 2, 3, 4]);
    let leader = chaos.cell.leader();
    let other = (leader + 1 + chaos.rng.below(4) as u8) % 5;
    chaos.pause("leader and another", &[leader, other]);
    let three = chaos.some(3);
    chaos.kill("majority", &three);
    let three = chaos.some(3);
    chaos.pause("majority", &three);
    let leader = chaos.cell.leader();
    chaos.wipe("leader", leader);
    let follower = (chaos.cell.leader() + 1 + chaos.rng.below(4) as u8) % 5;
    chaos.wipe("follower", follower);
    for _ in 0..3 {
        let leader = chaos.cell.leader();
        chaos.kill("leader, again,", &[leader]);
    }

    let Chaos { mut cell, load, .. } = chaos;
    let mut history = load.finish();
    // A request that waits for a leader is answered in the end.
    assert!(history.errors.is_empty(), "errors: {:?}", history.errors);
    history.read_all(&mut cell.client(0));
    history.read_all(&mut cell.client(1));
    history.check();

    // All copies are the same, to the byte.
    cell.wait_current();
    for id in 0..5 {
        cell.stop(id);
    }
    let first = cell.content(0, "v", 1 << 20, LOAD_BYTES as usize);
    assert!(first.iter().any(|byte| *byte != 0));
    for id in 1..5 {
        let other = cell.content(id, "v", 1 << 20, LOAD_BYTES as usize);
        assert!(
            other == first,
            "the copy of server {id} differs from that of server 0"
        );
    }
}
