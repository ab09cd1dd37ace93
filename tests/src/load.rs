//! Load over NBD or iSCSI on a few hundred 4 KiB blocks, and the history of each of them.
//!
//! Every write has a value of its own, which fills its block. What is under way when a connection is
//! cut, or fails, stays open in the history: it may take effect at any time, or never.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::checker::{Kind, Operation, Time, check};
use crate::iscsi_client::{IscsiClient, cdb10};
use crate::nbd_client::{Command, NbdClient};
use crate::netns::{Host, Network, Place};
use crate::processes::wait_until;
use crate::rng::Rng;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// The blocks that are used are in runs, far apart, so that many chunks are written to.
const RUNS: u64 = 10;
const RUN_BLOCKS: u64 = 30;
const RUN_STRIDE: u64 = 6 << 20;
/// The load uses no byte behind this one.
pub const LOAD_BYTES: u64 = 64 << 20;
/// Blocks that are used.
pub const BLOCKS: u64 = RUNS * RUN_BLOCKS;
/// Requests that each connection has in flight.
const DEPTH: usize = 4;
/// Pause after each answer: the machine has other work to do.
const THINK: Duration = Duration::from_millis(3);
/// A connection to a gateway that is not the worker's own ends after so many requests.
const GUEST_REQUESTS: u32 = 300;
/// As many as an initiator sends with a command.
const INITIATOR_BLOCKS_MAX: u64 = 2;
/// UNIT ATTENTION.
const ATTENTION: u8 = 6;
/// A client gives a connection up when nothing has come for this time; the gateways give up after 30 s.
const CLIENT_PATIENCE: Duration = Duration::from_secs(75);

const _: () = assert!((RUNS - 1) * RUN_STRIDE + RUN_BLOCKS * BLOCK <= LOAD_BYTES);

/// Where a block of the load stands in the volume, bytes.
pub fn offset(block: u64) -> u64 {
    block / RUN_BLOCKS * RUN_STRIDE + block % RUN_BLOCKS * BLOCK
}

/// Clients that read and write volume `v` until they are told to stop.
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<Worker>>,
}

impl Load {
    /// Starts so many clients; they are at home on the gateways in turn.
    pub fn start(gateways: Vec<SocketAddr>, workers: usize, seed: u64) -> Load {
        Load::start_over(Vec::new(), None, gateways, workers, seed)
    }

    /// The same with clients that are on the machines of their gateways.
    pub fn start_at(
        network: &Network,
        gateways: Vec<SocketAddr>,
        workers: usize,
        seed: u64,
    ) -> Load {
        let places = (0..gateways.len()).map(|gateway| network.place(Host::Gateway(gateway)));
        Load::start_over(places.collect(), None, gateways, workers, seed)
    }

    /// The same with initiators of a target, whose LUN 1 is the volume; each has one command in flight.
    pub fn over_iscsi(target: &str, gateways: Vec<SocketAddr>, workers: usize, seed: u64) -> Load {
        Load::start_over(Vec::new(), Some(target.to_owned()), gateways, workers, seed)
    }

    fn start_over(
        places: Vec<Place>,
        target: Option<String>,
        gateways: Vec<SocketAddr>,
        workers: usize,
        seed: u64,
    ) -> Load {
        let shared = Arc::new(Shared {
            start: Instant::now(),
            stop: AtomicBool::new(false),
            places,
            target,
            gateways,
            answered: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            progress: (0..workers).map(|_| AtomicU64::new(0)).collect(),
        });
        let workers = (0..workers).map(|number| Worker::start(&shared, number, seed));
        Load {
            workers: workers.collect(),
            shared,
        }
    }

    /// This moment, as it stands in the history.
    pub fn now(&self) -> Time {
        self.shared.now()
    }

    /// Connections.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Connections that have had an answer to a write that began after `fault`.
    pub fn served_since(&self, fault: Time) -> usize {
        let progress = self.shared.progress.iter();
        let begun = progress.map(|it| it.load(Ordering::Relaxed));
        begun.filter(|begun| *begun > fault).count()
    }

    /// Requests that ended with an error.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }

    /// What tells how much has been answered.
    pub fn meter(&self) -> Meter {
        Meter(Arc::clone(&self.shared))
    }

    /// Waits until every client has had an answer to a write that began after `fault`, and prints how
    /// long that took.
    ///
    /// # Panics
    /// If it takes too long.
    #[track_caller]
    pub fn wait_served(&self, what: &str, fault: Time, within: Duration) {
        let mut first = None;
        wait_until(&format!("service returns after: {what}"), within, || {
            let served = self.served_since(fault);
            if served > 0 && first.is_none() {
                first = Some(self.now());
            }
            served == self.workers.len()
        });
        let seconds = |time: Time| time.saturating_sub(fault) as f64 / 1e9;
        println!(
            "{:6.1} s: {what}: first write answered after {:.2} s, all connections after {:.2} s",
            fault as f64 / 1e9,
            seconds(first.unwrap_or(fault)),
            seconds(self.now())
        );
    }

    /// Lets the clients finish what is under way, and gives the history.
    ///
    /// # Panics
    /// If a read showed a mixture.
    pub fn finish(mut self) -> History {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut history = History {
            start: self.shared.start,
            blocks: BTreeMap::new(),
            errors: BTreeMap::new(),
        };
        let (mut operations, mut cut) = (0, 0);
        for worker in std::mem::take(&mut self.workers) {
            let worker = worker.join().expect("a worker does not panic");
            assert!(worker.broken.is_empty(), "{:?}", worker.broken);
            for (error, count) in worker.errors {
                *history.errors.entry(error).or_default() += count;
            }
            operations += worker.history.len();
            cut += worker.cut;
            for (block, operation) in worker.history {
                history.blocks.entry(block).or_default().push(operation);
            }
        }
        println!("{operations} operations on {BLOCKS} blocks; {cut} requests were cut");
        history
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Ends the workers even if the test fails.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Tells how much has been answered.
pub struct Meter(Arc<Shared>);

impl Meter {
    /// The time since the start of the load, and the requests that were carried out until then.
    pub fn read(&self) -> (Duration, u64) {
        let answered = self.0.answered.load(Ordering::Relaxed);
        (self.0.start.elapsed(), answered)
    }
}

/// What the clients did and saw.
pub struct History {
    start: Instant,
    blocks: BTreeMap<u64, Vec<Operation>>,
    /// Requests that ended with an error, by its number (over iSCSI: with a status).
    pub errors: BTreeMap<u32, u64>,
}

impl History {
    /// Reads every block, as part of the history.
    ///
    /// # Panics
    /// If that does not work.
    pub fn read_all(&mut self, client: &mut NbdClient) {
        let now = |start: Instant| start.elapsed().as_nanos() as Time + 1;
        for block in 0..BLOCKS {
            let begun = now(self.start);
            let reply = client.request(Command::Read, offset(block), BLOCK as u32, &[]);
            let reply = reply.expect("the cell works");
            assert_eq!(reply.error, 0);
            let (words, _) = reply.data.as_chunks::<8>();
            assert!(words.iter().all(|word| *word == words[0]), "block {block}");
            self.blocks.entry(block).or_default().push(Operation {
                begun,
                answered: Some(now(self.start)),
                kind: Kind::Read(u64::from_le_bytes(words[0])),
            });
        }
    }

    /// Writes every block, as part of the history.
    ///
    /// # Panics
    /// If that does not work.
    pub fn write_all(&mut self, client: &mut NbdClient) {
        let now = |start: Instant| start.elapsed().as_nanos() as Time + 1;
        for block in 0..BLOCKS {
            // No worker has a number as high.
            let value = (1 << 60) + block;
            let data = value.to_le_bytes().repeat(BLOCK as usize / 8);
            let begun = now(self.start);
            let reply = client.request(Command::Write, offset(block), BLOCK as u32, &data);
            assert_eq!(reply.expect("the cell works").error, 0);
            self.blocks.entry(block).or_default().push(Operation {
                begun,
                answered: Some(now(self.start)),
                kind: Kind::Write(value),
            });
        }
    }

    /// Checks that every block's history is linearizable, and that the check is not blind.
    ///
    /// # Panics
    /// If one is not.
    pub fn check(&self) {
        let begun = Instant::now();
        for (block, operations) in &self.blocks {
            if let Err(operation) = check(operations) {
                const NEAR: Time = 5_000_000_000;
                let ends = operation.answered.unwrap_or(Time::MAX);
                let near = |it: &&Operation| {
                    it.answered.is_none_or(|end| end + NEAR > operation.begun) && it.begun < ends
                };
                let mut near: Vec<_> = operations.iter().filter(near).collect();
                near.sort_by_key(|it| it.begun);
                panic!("block {block}: nothing explains {operation:?} in {near:#?}");
            }
        }
        println!("histories checked in {:?}", begun.elapsed());
        assert!(self.finds_a_lost_write(), "the check is blind");
    }

    /// Whether a history would be refused if reads showed what was there before the last write.
    fn finds_a_lost_write(&self) -> bool {
        let answered = |it: &&Operation| it.answered.is_some() && matches!(it.kind, Kind::Write(_));
        self.blocks.values().any(|operations| {
            let mut writes: Vec<_> = operations.iter().filter(answered).collect();
            writes.sort_by_key(|it| it.answered);
            let [.., before, last] = &writes[..] else {
                return false;
            };
            let (Kind::Write(old), Kind::Write(new)) = (before.kind, last.kind) else {
                return false;
            };
            let mut lost = operations.clone();
            for read in lost.iter_mut().filter(|it| it.kind == Kind::Read(new)) {
                read.kind = Kind::Read(old);
            }
            before.answered < Some(last.begun) && lost != *operations && check(&lost).is_err()
        })
    }
}

struct Shared {
    start: Instant,
    stop: AtomicBool,
    /// Where the clients of each gateway are, if not here.
    places: Vec<Place>,
    /// Over iSCSI.
    target: Option<String>,
    gateways: Vec<SocketAddr>,
    /// Requests that were carried out.
    answered: AtomicU64,
    /// Requests that ended with an error.
    errors: AtomicU64,
    /// For each worker, when the latest write was begun that was answered.
    progress: Vec<AtomicU64>,
}

impl Shared {
    fn now(&self) -> Time {
        self.start.elapsed().as_nanos() as Time + 1
    }
}

struct Pending {
    begun: Time,
    first: u64,
    /// What each block becomes; none for a read.
    values: Option<Vec<u64>>,
}

/// One client: connects, and connects again, for as long as the test lasts.
struct Worker {
    shared: Arc<Shared>,
    number: usize,
    rng: Rng,
    next_value: u64,
    pending: BTreeMap<u64, Pending>,
    history: Vec<(u64, Operation)>,
    broken: Vec<String>,
    errors: BTreeMap<u32, u64>,
    cut: u64,
}

impl Worker {
    fn start(shared: &Arc<Shared>, number: usize, seed: u64) -> JoinHandle<Worker> {
        let mut worker = Worker {
            shared: Arc::clone(shared),
            number,
            rng: Rng::new(seed * 100 + number as u64),
            next_value: (number as u64 + 1) << 40,
            pending: BTreeMap::new(),
            history: Vec::new(),
            broken: Vec::new(),
            errors: BTreeMap::new(),
            cut: 0,
        };
        std::thread::spawn(move || {
            worker.run();
            worker
        })
    }

    fn run(&mut self) {
        let home = self.number % self.shared.gateways.len();
        if let Some(place) = self.shared.places.get(home) {
            place.enter();
        }
        let mut gateway = home;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let address = self.shared.gateways[gateway];
            let at_home = gateway == home;
            let used = match self.shared.target.clone() {
                None => NbdClient::connect(address, "v", CLIENT_PATIENCE)
                    .and_then(|client| self.use_client(client, at_home)),
                Some(target) => {
                    IscsiClient::login(address, &target, self.number as u16, CLIENT_PATIENCE)
                        .and_then(|client| self.use_initiator(client, at_home))
                }
            };
            // What is under way on a connection that was cut stays open for ever.
            self.cut += self.pending.len() as u64;
            for (_, pending) in std::mem::take(&mut self.pending) {
                self.note(&pending, None);
            }
            gateway = match used {
                Ok(()) => home,
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(20));
                    (gateway + 1) % self.shared.gateways.len()
                }
            };
        }
    }

    fn use_client(&mut self, mut client: NbdClient, at_home: bool) -> io::Result<()> {
        let mut left = if at_home { u32::MAX } else { GUEST_REQUESTS };
        loop {
            let ends = left == 0 || self.shared.stop.load(Ordering::Relaxed);
            while !ends && client.in_flight() < DEPTH {
                left = left.saturating_sub(1);
                self.begin(&mut client)?;
            }
            if client.in_flight() == 0 {
                return client.submit(Command::Disconnect, 0, 0, &[]).map(drop);
            }
            self.finish(&mut client)?;
            std::thread::sleep(THINK);
        }
    }

    fn use_initiator(&mut self, mut client: IscsiClient, at_home: bool) -> io::Result<()> {
        let mut left = if at_home { u32::MAX } else { GUEST_REQUESTS };
        while left > 0 && !self.shared.stop.load(Ordering::Relaxed) {
            left = left.saturating_sub(1);
            let (command, count, pending, payload) = self.choose(INITIATOR_BLOCKS_MAX);
            let lba = (offset(pending.first) / 512) as u32;
            let mut cdb = cdb10(0x28, lba, (count * BLOCK / 512) as u16);
            // READ, WRITE, WRITE SAME with and without UNMAP.
            let (opcode, flags, reads) = match command {
                Command::Read => (0x28, 0, count * BLOCK),
                Command::Write => (0x2a, 0, 0),
                Command::Trim => (0x41, 8, 0),
                _ => (0x41, 0, 0),
            };
            (cdb[0], cdb[1]) = (opcode, flags);
            let out = match opcode {
                0x41 => &[0; 512][..],
                _ => &payload,
            };
            let ended = match client.command(&cdb, reads as u32, out) {
                Ok(ended) => ended,
                Err(error) => {
                    self.cut += 1;
                    self.note(&pending, None);
                    return Err(error);
                }
            };
            match (ended.status, ended.sense) {
                (0, _) => self.answered(pending, ended.data),
                // Not carried out; to leave it open allows more than that.
                (_, Some((ATTENTION, _))) => self.note(&pending, None),
                (status, _) => {
                    *self.errors.entry(status.into()).or_default() += 1;
                    self.shared.errors.fetch_add(1, Ordering::Relaxed);
                    self.note(&pending, None);
                }
            }
            std::thread::sleep(THINK);
        }
        Ok(())
    }

    fn begin(&mut self, client: &mut NbdClient) -> io::Result<()> {
        let (command, count, pending, payload) = self.choose(4);
        let length = (count * BLOCK) as u32;
        let sent = client.submit(command, offset(pending.first), length, &payload);
        match sent {
            Ok(cookie) => {
                self.pending.insert(cookie, pending);
                Ok(())
            }
            Err(error) => {
                self.note(&pending, None);
                Err(error)
            }
        }
    }

    /// The next request: what, on how many blocks, how it stands in the history, with which payload.
    fn choose(&mut self, blocks_max: u64) -> (Command, u64, Pending, Vec<u8>) {
        let count = match self.rng.chance(150) {
            true => self.rng.between(2, blocks_max),
            false => 1,
        };
        let run = self.rng.below(RUNS) * RUN_BLOCKS;
        let first = run + self.rng.below(RUN_BLOCKS - count + 1);
        let command = match self.rng.below(100) {
            0..40 => Command::Read,
            40..43 => Command::WriteZeroes,
            43..46 => Command::Trim,
            _ => Command::Write,
        };
        let mut payload = Vec::new();
        let values = match command {
            Command::Read => None,
            Command::Write => {
                let mut values = Vec::new();
                for _ in 0..count {
                    self.next_value += 1;
                    values.push(self.next_value);
                    for _ in 0..BLOCK / 8 {
                        payload.extend_from_slice(&self.next_value.to_le_bytes());
                    }
                }
                Some(values)
            }
            _ => Some(vec![0; count as usize]),
        };
        let pending = Pending {
            begun: self.shared.now(),
            first,
            values,
        };
        (command, count, pending, payload)
    }

    fn finish(&mut self, client: &mut NbdClient) -> io::Result<()> {
        let reply = client.complete()?;
        let pending = self.pending.remove(&reply.cookie).expect("it was sent");
        if reply.error != 0 {
            *self.errors.entry(reply.error).or_default() += 1;
            self.shared.errors.fetch_add(1, Ordering::Relaxed);
            self.note(&pending, None);
            return Ok(());
        }
        self.answered(pending, reply.data);
        Ok(())
    }

    /// A request was carried out.
    fn answered(&mut self, mut pending: Pending, data: Vec<u8>) {
        let now = self.shared.now();
        self.shared.answered.fetch_add(1, Ordering::Relaxed);
        if pending.values.is_some() {
            self.note(&pending, Some(now));
            self.shared.progress[self.number].fetch_max(pending.begun, Ordering::Relaxed);
            return;
        }
        pending.values = Some(self.values_of(&pending, &data));
        self.note_read(&pending, now);
    }

    fn values_of(&mut self, pending: &Pending, data: &[u8]) -> Vec<u64> {
        let mut values = Vec::new();
        for (index, block) in data.chunks_exact(BLOCK as usize).enumerate() {
            let (words, _) = block.as_chunks::<8>();
            let value = u64::from_le_bytes(words[0]);
            if words.iter().any(|word| u64::from_le_bytes(*word) != value) {
                let block = pending.first + index as u64;
                self.broken.push(format!("block {block} is a mixture"));
            }
            values.push(value);
        }
        values
    }

    /// Writes a change down. A read without an answer says nothing.
    fn note(&mut self, pending: &Pending, answered: Option<Time>) {
        for (index, value) in pending.values.iter().flatten().enumerate() {
            let operation = Operation {
                begun: pending.begun,
                answered,
                kind: Kind::Write(*value),
            };
            self.history.push((pending.first + index as u64, operation));
        }
    }

    fn note_read(&mut self, pending: &Pending, now: Time) {
        for (index, value) in pending.values.iter().flatten().enumerate() {
            let operation = Operation {
                begun: pending.begun,
                answered: Some(now),
                kind: Kind::Read(*value),
            };
            self.history.push((pending.first + index as u64, operation));
        }
    }
}
