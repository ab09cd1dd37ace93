//! A cell as separate processes: `pssd` for every server and any number of `pss-nbd`, on loopback
//! addresses of their own.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::nbd_client::NbdClient;
use crate::netns::{Host, Network};
use crate::programs::Bench;
use crate::proxy::{Mischief, Proxy};

/// So long may anything take that has to happen by itself, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Port of the gateways.
const NBD_PORT: u16 = 10_809;
/// A client notices that nothing comes any more; longer than a gateway waits for a leader.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// A process; killed when dropped.
pub struct Process {
    child: Child,
    name: String,
    output: PathBuf,
}

impl Process {
    /// Starts a program whose output goes behind what is in a file.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(name: &str, command: &mut Command, output: PathBuf) -> Process {
        let file = OpenOptions::new().create(true).append(true).open(&output);
        let file = file.expect("the test directory can be used");
        let second = file.try_clone().expect("a descriptor can be doubled");
        let child = command.stdout(file).stderr(second).spawn();
        Process {
            child: child.unwrap_or_else(|error| panic!("{name} cannot be started: {error}")),
            name: name.to_owned(),
            output,
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory that it has now, bytes.
    ///
    /// # Panics
    /// If it does not run.
    pub fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        kib.map_or(0, |kib: u64| kib << 10)
    }

    /// Processor time that it has used.
    ///
    /// # Panics
    /// If it does not run.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        // Fields 14 and 15 of proc_pid_stat(5); the name, field 2, may have spaces and brackets in it.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.filter_map(|it| it.parse::<u64>().ok()).sum();
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, signal: &str) {
        let (signal, pid) = (format!("-{signal}"), self.pid().to_string());
        let status = Command::new("kill").args([signal, pid]).status();
        let status = status.expect("kill can be run");
        assert!(status.success(), "{} has ended: {}", self.name, self.text());
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the end; the exit code, none after a signal.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn ends(&mut self, within: Duration) -> Option<i32> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status.code();
            }
            assert!(
                Instant::now() < end,
                "{} still runs:\n{}",
                self.name,
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Everything that it has written.
    pub fn text(&self) -> String {
        let bytes = fs::read(&self.output).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a cell is laid out.
#[derive(Clone)]
pub struct Layout {
    /// Core servers.
    pub servers: u8,
    /// Learners, ids 5 and on.
    pub learners: u8,
    /// Gateways.
    pub gateways: usize,
    /// With a cell key.
    pub key: bool,
    /// Flags of `pssd start`.
    pub flags: String,
    /// Data directories, instead of some in the directory of the test.
    pub paths: BTreeMap<u8, PathBuf>,
    /// Whether [`Cell::delay`] can be used.
    pub slow_disks: bool,
    /// What servers reach each other through, and gateways the servers, instead of directly.
    pub mischief: Option<Arc<Mischief>>,
    /// Machines for all of them, instead of this one. The test itself must be at the router.
    pub network: Option<Arc<Network>>,
}

impl Layout {
    /// All servers.
    pub fn ids(&self) -> impl Iterator<Item = u8> + use<> {
        (0..self.servers).chain(5..5 + self.learners)
    }

    /// Servers that take little space, and one gateway.
    pub fn small(servers: u8) -> Layout {
        Layout {
            servers,
            learners: 0,
            gateways: 1,
            key: true,
            flags: "--segment-size 8M --checkpoint-size 8M --log-retain 32M".to_owned(),
            paths: BTreeMap::new(),
            slow_disks: false,
            mischief: None,
            network: None,
        }
    }
}

/// A cell.
pub struct Cell {
    /// The directory with server.conf, and what runs `pss`.
    pub bench: Bench,
    /// How it is laid out.
    pub layout: Layout,
    /// Servers that run.
    pub servers: BTreeMap<u8, Process>,
    /// Gateways that run.
    pub gateways: BTreeMap<usize, Process>,
    network: [u8; 3],
    first_host: u8,
    proxies: Vec<Proxy>,
}

impl Cell {
    /// Formats the servers, and starts none.
    ///
    /// # Panics
    /// If that does not work.
    pub fn new(layout: Layout) -> Cell {
        static HOSTS: AtomicU8 = AtomicU8::new(0);
        // Cells of processes that run at the same time must not meet.
        let [.., high, low] = std::process::id().to_be_bytes();
        let host = HOSTS.fetch_add(1, Ordering::Relaxed);
        assert!(host < 36, "no addresses are left for cells of this process");
        let mut cell = Cell {
            bench: Bench::new(),
            servers: BTreeMap::new(),
            gateways: BTreeMap::new(),
            network: [127, 64 * (3 - host / 12) + high % 63, low],
            first_host: 1 + 20 * (host % 12),
            proxies: Vec::new(),
            layout,
        };
        cell.bench.servers(cell.conf(|id| cell.host(id)));
        if let Some(mischief) = cell.layout.mischief.clone() {
            let ids = cell.layout.ids();
            let proxies = ids.map(|id| Proxy::start(id, cell.proxy(id), cell.host(id), &mischief));
            cell.proxies = proxies.collect();
            cell.write("gateway.conf", &cell.conf(|id| cell.proxy(id)));
            for own in cell.layout.ids() {
                let host = |id| match id == own {
                    true => cell.host(id),
                    false => cell.proxy(id),
                };
                cell.write(&format!("server{own}.conf"), &cell.conf(host));
            }
        }
        if cell.layout.key {
            cell.bench.run("pss", "key new cell.key").done();
        }
        for id in cell.layout.ids() {
            cell.format(id, "");
        }
        cell
    }

    /// Formats and starts everything, and creates a volume `v` of this size.
    ///
    /// # Panics
    /// If that does not work.
    pub fn started(layout: Layout, size: &str) -> Cell {
        let mut cell = Cell::new(layout);
        for id in cell.layout.ids() {
            cell.start(id);
        }
        cell.wait_current();
        cell.bench
            .run("pss", &format!("volume create v {size}"))
            .done();
        for gateway in 0..cell.layout.gateways {
            cell.start_gateway(gateway);
        }
        cell
    }

    /// Address of a server.
    pub fn host(&self, id: u8) -> IpAddr {
        if self.layout.network.is_some() {
            return Host::Server(id).address();
        }
        let [a, b, c] = self.network;
        [a, b, c, self.first_host + id].into()
    }

    /// Address of the proxy of a server.
    fn proxy(&self, id: u8) -> IpAddr {
        let [a, b, c] = self.network;
        [a, b, c, self.first_host + 10 + id].into()
    }

    fn conf(&self, host: impl Fn(u8) -> IpAddr) -> String {
        let record = |id| format!("{id} {} {}\n", host(id), self.path(id).display());
        self.layout.ids().map(record).collect()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.bench.path(name), text).expect("the test directory can be used");
    }

    /// Data directory of a server.
    pub fn path(&self, id: u8) -> PathBuf {
        let given = self.layout.paths.get(&id).cloned();
        given.unwrap_or_else(|| self.bench.path(&format!("server{id}")))
    }

    /// Where a gateway listens.
    pub fn nbd(&self, gateway: usize) -> SocketAddr {
        if self.layout.network.is_some() {
            return (Host::Gateway(gateway).address(), NBD_PORT).into();
        }
        let [a, b, c] = self.network;
        let host = [a, b, c, self.first_host + 8];
        (host, NBD_PORT + gateway as u16).into()
    }

    /// `pssd format`.
    pub fn format(&self, id: u8, flags: &str) {
        let args = format!("format --id {id} {flags}");
        self.bench.run("pssd", &args).done();
    }

    /// `pssd start`.
    pub fn start(&mut self, id: u8) {
        self.start_with(id, None);
    }

    /// The same with another list of servers.
    pub fn start_by(&mut self, id: u8, servers: &str) {
        self.start_with(id, Some(servers));
    }

    fn start_with(&mut self, id: u8, servers: Option<&str>) {
        let mut command = self.bench.command("pssd");
        command.args(["start", "--id", &id.to_string()]);
        if let Some(servers) = servers {
            command.env("PSS_SERVERS", self.bench.path(servers));
        } else if self.layout.mischief.is_some() {
            command.env("PSS_SERVERS", self.bench.path(&format!("server{id}.conf")));
        }
        if self.layout.slow_disks {
            command.env("PSS_TEST_SYNC_DELAY", self.delay_file(id));
        }
        command.args(self.layout.flags.split_whitespace());
        let output = self.bench.path(&format!("pssd{id}.log"));
        let name = format!("pssd {id}");
        let process = self.launch(Host::Server(id), &name, &mut command, output);
        self.servers.insert(id, process);
    }

    /// `pss-nbd`; waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    pub fn start_gateway(&mut self, gateway: usize) {
        let address = self.nbd(gateway);
        let mut command = self.bench.command("pss-nbd");
        command.args(["--listen", &address.to_string()]);
        if self.layout.mischief.is_some() {
            command.env("PSS_SERVERS", self.bench.path("gateway.conf"));
        }
        let output = self.bench.path(&format!("pss-nbd{gateway}.log"));
        let name = format!("pss-nbd {gateway}");
        let mut process = self.launch(Host::Gateway(gateway), &name, &mut command, output);
        wait_until("the gateway listens", PATIENCE, || {
            assert!(process.runs(), "{}", process.text());
            TcpStream::connect(address).is_ok()
        });
        self.gateways.insert(gateway, process);
    }

    fn delay_file(&self, id: u8) -> PathBuf {
        self.bench.path(&format!("delay{id}"))
    }

    /// From now on every sync of a server takes so many milliseconds longer; `hang`: as long as this is not changed.
    ///
    /// # Panics
    /// If the layout does not say that this will be used.
    pub fn delay(&self, id: u8, delay: &str) {
        assert!(self.layout.slow_disks, "the servers do not look at it");
        // In one step: the server may be looking.
        let new = self.bench.path("delay.new");
        fs::write(&new, delay).expect("the test directory can be used");
        fs::rename(&new, self.delay_file(id)).expect("the test directory can be used");
    }

    fn launch(&self, host: Host, name: &str, command: &mut Command, output: PathBuf) -> Process {
        let start = || Process::start(name, command, output);
        match &self.layout.network {
            Some(network) => network.at(host, start),
            None => start(),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self, id: u8) {
        self.servers.remove(&id);
    }

    /// SIGTERM; waits for the end.
    ///
    /// # Panics
    /// If the server does not say that all is well.
    pub fn stop(&mut self, id: u8) {
        let Some(mut server) = self.servers.remove(&id) else {
            return;
        };
        server.signal("TERM");
        assert_eq!(server.ends(PATIENCE), Some(0), "{}", server.text());
    }

    /// Sends signals to servers.
    pub fn signal(&self, ids: &[u8], signal: &str) {
        for id in ids {
            self.servers[id].signal(signal);
        }
    }

    /// What `pss status --json` says; nothing if it could not say anything in time.
    pub fn status(&self) -> Option<Value> {
        let outcome = self.bench.run("pss", "status --json --timeout 2s");
        serde_json::from_slice(&outcome.0.stdout).ok()
    }

    /// Who leads, once somebody does.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn leader(&self) -> u8 {
        let mut leader = None;
        wait_until("somebody leads", PATIENCE, || {
            let status = self.status();
            leader = status.and_then(|status| status["leader"].as_u64());
            leader.is_some()
        });
        leader.expect("it was waited for") as u8
    }

    /// Who leads, and the ballot: whoever leads again has another one.
    ///
    /// # Panics
    /// If nobody leads for too long.
    pub fn leadership(&self) -> (u8, Value) {
        let mut found = None;
        wait_until("somebody leads", PATIENCE, || {
            found = self.status().and_then(|status| {
                let leader = status["leader"].as_u64()?;
                let servers = status["servers"].as_array()?;
                let server = servers.iter().find(|it| it["id"] == leader)?;
                let ballot = &server["status"]["ballot"];
                (!ballot.is_null()).then(|| (leader as u8, ballot.clone()))
            });
            found.is_some()
        });
        found.expect("it was waited for")
    }

    /// Waits until every copy is current.
    ///
    /// # Panics
    /// If that takes too long.
    #[track_caller]
    pub fn wait_current(&mut self) {
        let mut last = None;
        let end = Instant::now() + PATIENCE;
        loop {
            for (id, server) in &mut self.servers {
                assert!(server.runs(), "pssd {id} has ended:\n{}", server.text());
            }
            last = self.status().or(last);
            if last
                .as_ref()
                .is_some_and(|status| status["all_current"] == true)
            {
                return;
            }
            if Instant::now() >= end {
                self.dump();
                panic!("not all copies become current: {last:#?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A connection to volume `v` through a gateway.
    ///
    /// # Panics
    /// If there is none.
    pub fn client(&self, gateway: usize) -> NbdClient {
        self.connect(gateway).expect("the gateway serves")
    }

    /// A connection to volume `v` through a gateway, if there is one.
    ///
    /// # Errors
    /// See [`NbdClient::connect`].
    pub fn connect(&self, gateway: usize) -> std::io::Result<NbdClient> {
        NbdClient::connect(self.nbd(gateway), "v", CLIENT_PATIENCE)
    }

    /// Directory of a volume's chunks on a server.
    pub fn chunks(&self, id: u8, volume: &str) -> PathBuf {
        self.path(id).join("data").join(volume)
    }

    /// A volume as a stopped server has it in its files.
    pub fn content(&self, id: u8, volume: &str, chunk_bytes: usize, size_bytes: usize) -> Vec<u8> {
        let mut content = Vec::with_capacity(size_bytes);
        for chunk in 0..size_bytes.div_ceil(chunk_bytes) as u64 {
            let [.., high, middle, low] = chunk.to_be_bytes();
            let name = format!("{high:02x}/{middle:02x}/{low:02x}");
            let mut bytes = fs::read(self.chunks(id, volume).join(name)).unwrap_or_default();
            bytes.resize(chunk_bytes, 0);
            content.extend_from_slice(&bytes);
        }
        content.truncate(size_bytes);
        content
    }

    /// Shows the end of what all have written, for a test that fails.
    pub fn dump(&self) {
        let Ok(entries) = fs::read_dir(self.bench.path("")) else {
            return;
        };
        let mut logs: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|end| end == "log"))
            .collect();
        logs.sort();
        for log in logs {
            println!("--- {}\n{}", log.display(), tail(&log));
        }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dump();
        }
        // All at once, before their files go.
        for process in self.gateways.values_mut().chain(self.servers.values_mut()) {
            let _ = process.child.kill();
        }
    }
}

fn tail(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(6000)))?;
        file.read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => error.to_string(),
    }
}

/// Waits until something holds.
///
/// # Panics
/// If it does not in time.
#[track_caller]
pub fn wait_until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
