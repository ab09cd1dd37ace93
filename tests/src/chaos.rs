//! Five servers and two gateways on machines of their own, under load, with faults by a seed.
//!
//! A round begins one or two faults, lets them last, and ends them. At most two of the five servers are *affected*
//! at a time; whoever was killed, wiped, damaged or cut off is affected until `pss status` calls its copy
//! current. Every round service must go on by itself, during the faults where a gateway reaches a majority, and for
//! all clients after them. In the end histories must be linearizable, what was answered last be
//! readable, and all copies equal.

mod damage;
mod fault;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pss_core::engine::SESSION_LEASE;
use serde_json::Value;

use crate::checker::Time;
use crate::load::{LOAD_BYTES, Load};
use crate::netns::{self, Network};
use crate::processes::{Cell, Layout};
use crate::rng::Rng;
use crate::timeline::Timeline;

use fault::Fault;

/// Servers.
const SERVERS: u8 = 5;
/// Gateways.
const GATEWAYS: usize = 2;
/// So many servers may be affected at one time.
const AFFECTED_MAX: usize = 2;
/// Connections, half of them at home on each gateway.
const WORKERS: usize = 6;
const CHUNK_BYTES: usize = 1 << 20;
/// Service has returned by itself after this time at most. The gateways give up after 30 s.
const RETURN: Duration = Duration::from_secs(25);
/// A server that is left alone is current after this time at most.
const CURRENT: Duration = Duration::from_secs(120);
/// A gateway that was away for longer may have given requests up.
const EXCUSED: Duration = Duration::from_secs(20);
/// What a gateway says when it is told that it was silent for longer than its lease.
const SESSION_ENDED: &str = "the cell has ended this session: it was not heard of";
/// A sample of the timeline.
const SAMPLE: Duration = Duration::from_millis(250);

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// For how long faults begin.
    pub duration: Duration,
    /// What follows from it: which faults, on whom, for how long. Not when exactly.
    pub seed: u64,
    /// Where the timeline is drawn.
    pub plot: Option<PathBuf>,
    /// Whether files are damaged.
    pub rot: bool,
}

/// Runs it all.
///
/// # Panics
/// If something is found; the cell's directory stays, and its path is printed with the seed.
pub fn run(options: &Options) {
    println!("chaos: seed {}, {:?}", options.seed, options.duration);
    let network = Arc::new(Network::new(0..SERVERS, GATEWAYS));
    network.at_router(|| {
        let mut chaos = Chaos::new(options, &network);
        chaos.rounds();
        chaos.finish();
    });
}

/// A gateway is paused for longer than its lease. Each leader waits for that long by itself, so until then no
/// fault hits the one that leads.
struct Lapse {
    gateway: usize,
    since: Duration,
    until: Instant,
    /// And the ballot.
    leader: (u8, Value),
    /// Another ballot led meanwhile, and counted the lease anew.
    is_leader_new: bool,
}

/// The cell with its load.
struct Chaos {
    options: Options,
    network: Arc<Network>,
    cell: Cell,
    load: Option<Load>,
    rng: Rng,
    record: Record,
    /// Servers that are not current yet, and since when nothing is wrong with them.
    recovering: BTreeSet<u8>,
    calm_since: Instant,
    /// The server whose log was damaged and is not current yet.
    log_damaged: Option<u8>,
    /// A gateway that is paused for longer than its lease.
    lapsed: Option<Lapse>,
    lapses: u32,
    /// Requests that ended with an error, of gateways that were away for so long that they gave them up.
    excused: u64,
    begun: Instant,
}

impl Chaos {
    fn new(options: &Options, network: &Arc<Network>) -> Chaos {
        let layout = Layout {
            gateways: GATEWAYS,
            network: Some(Arc::clone(network)),
            ..Layout::small(SERVERS)
        };
        let cell = Cell::started(layout, "64M --chunk-size 1M");
        netns::remove_on_signal(cell.bench.path(""));
        let gateways = (0..GATEWAYS).map(|it| cell.nbd(it)).collect();
        let load = Load::start_at(network, gateways, WORKERS, options.seed);
        let title = format!("seed {}: five servers, two gateways", options.seed);
        Chaos {
            options: options.clone(),
            network: Arc::clone(network),
            record: Record::start(&load, &title),
            cell,
            load: Some(load),
            rng: Rng::new(options.seed),
            recovering: BTreeSet::new(),
            calm_since: Instant::now(),
            log_damaged: None,
            lapsed: None,
            lapses: 0,
            excused: 0,
            begun: Instant::now(),
        }
    }

    fn load(&self) -> &Load {
        self.load.as_ref().expect("it is taken when all ends")
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.load().now())
    }

    fn rounds(&mut self) {
        let mut round = 0;
        self.wait_served("start", 0, WORKERS);
        while self.begun.elapsed() < self.options.duration {
            round += 1;
            self.lapse();
            self.refresh();
            if self.recovering.len() >= AFFECTED_MAX || self.rng.chance(400) {
                self.wait_recovered();
            }
            let faults = self.choose();
            self.round(round, faults);
        }
        if let Some(lapse) = &self.lapsed {
            std::thread::sleep(lapse.until.saturating_duration_since(Instant::now()));
        }
        self.lapse();
        println!("{round} rounds");
    }

    /// Begins or ends the long pause of a gateway, which lasts over several rounds.
    fn lapse(&mut self) {
        let length = SESSION_LEASE + Duration::from_secs(6);
        match self.lapsed.take() {
            Some(lapse) if Instant::now() >= lapse.until => self.end_lapse(lapse),
            Some(mut lapse) => {
                lapse.is_leader_new |= self.cell.leadership() != lapse.leader;
                self.lapsed = Some(lapse);
            }
            None if self.lapses == 0 || self.rng.chance(40) => {
                let left = self.options.duration.saturating_sub(self.begun.elapsed());
                if left <= length {
                    return;
                }
                let gateway = self.rng.below(GATEWAYS as u64) as usize;
                self.say(&format!("gateway {gateway} is paused for {length:?}"));
                self.cell.gateways[&gateway].signal("STOP");
                self.lapses += 1;
                self.lapsed = Some(Lapse {
                    gateway,
                    since: self.now(),
                    until: Instant::now() + length,
                    leader: self.cell.leadership(),
                    is_leader_new: false,
                });
            }
            None => {}
        }
    }

    fn end_lapse(&mut self, lapse: Lapse) {
        let gateway = lapse.gateway;
        let is_leader_new = lapse.is_leader_new || self.cell.leadership() != lapse.leader;
        let before = self.cell.gateways[&gateway].text().len();
        self.cell.gateways[&gateway].signal("CONT");
        let what = format!("gateway {gateway} paused for longer than its lease");
        self.record.fault(lapse.since..self.now(), &what);
        let what = format!("{what}, going on");
        self.say(&what);
        let again = self.load().now();
        self.wait_served(&what, again, WORKERS);
        self.check_errors(&what, true);
        let text = self.cell.gateways[&gateway].text();
        let is_fenced = text[before..].contains(SESSION_ENDED);
        assert!(
            is_fenced || is_leader_new,
            "gateway {gateway} was paused for longer than its lease, and its session goes on:\n{text}"
        );
    }

    fn round(&mut self, round: u32, faults: Vec<Fault>) {
        let labels: Vec<String> = faults.iter().map(Fault::to_string).collect();
        let what = format!("round {round}: {}", labels.join("; "));
        self.say(&what);
        let (begun, instant) = (self.now(), Instant::now());
        for fault in &faults {
            self.begin(fault);
        }
        let during = self.load().now();
        let lasts = Duration::from_millis(self.rng.between(1000, 6000));
        if self.expects_service(&faults) {
            self.wait_served(&what, during, 1);
        }
        std::thread::sleep(lasts.saturating_sub(instant.elapsed()));
        // All at once, then the rest one by one.
        self.network.heal();
        for fault in &faults {
            self.end(fault);
        }
        let away = faults.iter().any(|it| !it.gateways().is_empty());
        let excused = away && instant.elapsed() > EXCUSED;
        let again = self.load().now();
        for (fault, label) in faults.iter().zip(&labels) {
            self.recovering.extend(fault.servers());
            self.record.fault(begun..self.now(), label);
        }
        self.calm_since = Instant::now();
        let wanted = if self.lapsed.is_some() { 1 } else { WORKERS };
        self.wait_served(&format!("{what}, healed"), again, wanted);
        self.must_run();
        self.check_errors(&what, excused);
        self.check_sessions();
    }

    /// No client is told of an error, but through a gateway that was away for long.
    fn check_errors(&mut self, what: &str, excused: bool) {
        let errors = self.load().errors();
        if excused && errors > self.excused {
            self.say(&format!("{} errors: {what}", errors - self.excused));
            self.excused = errors;
        }
        assert_eq!(errors, self.excused, "requests failed: {what}");
    }

    /// Whether a gateway that nothing has happened to reaches a majority.
    fn expects_service(&self, faults: &[Fault]) -> bool {
        (0..GATEWAYS).any(|gateway| {
            let lapsed = self.lapsed.as_ref();
            let lapsed = lapsed.is_some_and(|lapse| lapse.gateway == gateway);
            !lapsed && faults.iter().all(|it| !it.gateways().contains(&gateway))
        })
    }

    /// Waits until so many clients have had an answer to a write that was begun since.
    fn wait_served(&mut self, what: &str, since: Time, wanted: usize) {
        let begun = Instant::now();
        while self.load().served_since(since) < wanted {
            if begun.elapsed() > RETURN {
                let served = self.load().served_since(since);
                let text = self.cell.bench.run("pss", "status --timeout 2s").stdout();
                panic!("{served} clients of {wanted} are served after {RETURN:?}: {what}\n{text}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if begun.elapsed() > Duration::from_secs(3) {
            self.say(&format!("served after {:.1?}: {what}", begun.elapsed()));
        }
    }

    fn say(&self, what: &str) {
        println!("{:7.1} s: {what}", self.now().as_secs_f64());
    }

    /// Nobody has ended by himself.
    fn must_run(&mut self) {
        for (id, server) in &mut self.cell.servers {
            assert!(server.runs(), "pssd {id} has ended:\n{}", server.text());
        }
        for (id, gateway) in &mut self.cell.gateways {
            assert!(gateway.runs(), "pss-nbd {id} has ended");
        }
    }

    /// The cell has ended no session but those of gateways that were paused for longer than their lease: a minute
    /// without a word is more than any other fault lasts.
    fn check_sessions(&self) {
        let ended = |gateway: usize| {
            let path = self.cell.bench.path(&format!("pss-nbd{gateway}.log"));
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.matches(SESSION_ENDED).count()
        };
        let ended: usize = (0..GATEWAYS).map(ended).sum();
        let lapses = self.lapses as usize;
        assert!(
            ended <= lapses,
            "{ended} sessions were ended, {lapses} were silent for as long"
        );
    }

    /// Asks who is current again.
    fn refresh(&mut self) {
        if self.recovering.is_empty() {
            return;
        }
        let Some(status) = self.cell.status() else {
            return;
        };
        for id in 0..SERVERS {
            let servers = status["servers"].as_array().into_iter().flatten();
            let mut own = servers.filter(|server| server["id"] == id);
            if own.any(|server| server["current"] == true) {
                self.recovering.remove(&id);
                self.log_damaged = self.log_damaged.filter(|damaged| *damaged != id);
            }
        }
    }

    fn wait_recovered(&mut self) {
        while !self.recovering.is_empty() {
            self.must_run();
            self.refresh();
            if self.calm_since.elapsed() > CURRENT {
                let text = self.cell.bench.run("pss", "status --timeout 2s").stdout();
                panic!("{:?} do not become current:\n{text}", self.recovering);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn finish(&mut self) {
        self.say("all is healed");
        self.wait_recovered();
        self.cell.wait_current();
        self.record.stop.store(true, Ordering::Relaxed);
        let load = self.load.take().expect("it is taken once");
        let mut history = load.finish();
        let errors: u64 = history.errors.values().sum();
        assert_eq!(errors, self.excused, "requests failed in the end");
        for gateway in 0..GATEWAYS {
            history.read_all(&mut self.cell.client(gateway));
        }
        history.check();
        // What nobody has read is still damaged where it was; written anew it must be equal everywhere.
        history.write_all(&mut self.cell.client(0));
        history.read_all(&mut self.cell.client(1));
        history.check();
        self.cell.wait_current();
        for id in 0..SERVERS {
            self.cell.stop(id);
        }
        let content = |id| {
            let bytes = LOAD_BYTES as usize;
            self.cell.content(id, "v", CHUNK_BYTES, bytes)
        };
        let first = content(0);
        assert!(first.iter().any(|byte| *byte != 0));
        for id in 1..SERVERS {
            let other = content(id);
            let differ = first.chunks(4096).zip(other.chunks(4096)).enumerate();
            let differ: Vec<usize> = differ.filter(|(_, (a, b))| a != b).map(|it| it.0).collect();
            assert!(
                differ.is_empty(),
                "the copy of server {id} differs from that of server 0 in blocks {differ:?}"
            );
        }
        println!("all copies are equal");
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        // Of a run that found something, too, and before the processes are killed.
        if let Some(plot) = &self.options.plot {
            match self.record.timeline().write(plot) {
                Ok(()) => println!("timeline: {}", plot.display()),
                Err(error) => eprintln!("{error:#}"),
            }
        }
        if std::thread::panicking() {
            let path = self.cell.bench.keep();
            println!(
                "FOUND with seed {} after {:.0?}; data directories and logs are in {}",
                self.options.seed,
                self.begun.elapsed(),
                path.display()
            );
        }
    }
}

/// The timeline as it grows.
struct Record {
    timeline: Arc<Mutex<Timeline>>,
    stop: Arc<AtomicBool>,
}

impl Record {
    fn start(load: &Load, title: &str) -> Record {
        let record = Record {
            timeline: Arc::new(Mutex::new(Timeline::new(title))),
            stop: Arc::default(),
        };
        let (timeline, stop) = (Arc::clone(&record.timeline), Arc::clone(&record.stop));
        let meter = load.meter();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let (at, count) = meter.read();
                let mut timeline = timeline.lock().unwrap_or_else(PoisonError::into_inner);
                timeline.answered(at, count);
                drop(timeline);
                std::thread::sleep(SAMPLE);
            }
        });
        record
    }

    fn timeline(&self) -> Timeline {
        let timeline = self.timeline.lock();
        timeline.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fault(&self, during: Range<Duration>, label: &str) {
        let timeline = self.timeline.lock();
        timeline
            .unwrap_or_else(PoisonError::into_inner)
            .fault(during, label);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
