//! Network namespaces: machines with addresses of their own on one machine.
//!
//! A routing namespace is joined to every other one by a pair of virtual interfaces. Whom it does not
//! pass packets from and to is a rule of its routing, so that links are cut one way or both, without a word to
//! either end.
//!
//! The namespaces are named `pss-PID-N-WHO`, by the process that made them. They end with [`Network`]; what a
//! process left that was killed is removed by the next one.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::binaries;

/// Where `ip netns` keeps them.
const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "pss-";
/// Priority of the rules that drop packets: before the routes.
const DROP_PRIORITY: u32 = 100;
/// An address ends with two bytes: number of the machine, and 1 (router) or 2 (machine).
const NETWORK: [u8; 2] = [10, 77];

/// What is to be removed when this process is told to end.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

#[derive(Clone, Eq, PartialEq)]
enum Left {
    Namespaces(String),
    Directory(PathBuf),
}

/// A machine.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Host {
    /// With this server.
    Server(u8),
    /// With this gateway and its clients.
    Gateway(usize),
}

impl Host {
    fn number(self) -> u8 {
        match self {
            Host::Server(id) => id + 1,
            Host::Gateway(gateway) => 101 + gateway as u8,
        }
    }

    /// Its address, the same in every network.
    pub fn address(self) -> IpAddr {
        Ipv4Addr::from([NETWORK[0], NETWORK[1], self.number(), 2]).into()
    }

    fn router_address(self) -> String {
        format!("{}.{}.{}.1", NETWORK[0], NETWORK[1], self.number())
    }

    fn name(self) -> String {
        match self {
            Host::Server(id) => format!("s{id}"),
            Host::Gateway(gateway) => format!("g{gateway}"),
        }
    }
}

/// See [`Network::place`].
#[derive(Clone, Debug)]
pub struct Place(String);

impl Place {
    /// Moves the calling thread there for good.
    ///
    /// # Panics
    /// If the network is no more.
    pub fn enter(&self) {
        enter(&self.0);
    }
}

/// Machines that reach each other through a router. Removed with everything that runs there when dropped.
pub struct Network {
    /// `pss-PID-N-`.
    prefix: String,
    hosts: Vec<Host>,
    /// Pairs of which the first does not reach the second.
    cut: Mutex<Vec<(Host, Host)>>,
}

impl Network {
    /// Servers with these ids and so many gateways.
    ///
    /// # Panics
    /// Without root or iproute2.
    pub fn new(servers: impl IntoIterator<Item = u8>, gateways: usize) -> Network {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "network namespaces can only be made by root: run this with sudo env \"PATH=$PATH\""
        );
        remove_leftovers();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX}{}-{number}-", std::process::id());
        lock(&LEFT).push(Left::Namespaces(prefix.clone()));
        let servers = servers.into_iter().map(Host::Server);
        let network = Network {
            prefix,
            hosts: servers.chain((0..gateways).map(Host::Gateway)).collect(),
            cut: Mutex::default(),
        };
        network.make();
        network
    }

    fn make(&self) {
        let router = self.name("r");
        ip(&["netns", "add", &router]);
        let forward = "/proc/sys/net/ipv4/ip_forward";
        self.at_router(|| fs::write(forward, "1"))
            .unwrap_or_else(|error| panic!("{forward} of the router cannot be set: {error}"));
        for host in &self.hosts {
            let namespace = self.name(&host.name());
            ip(&["netns", "add", &namespace]);
            let (name, at_router) = (host.name(), host.router_address());
            ip(&[
                "link", "add", "name", &name, "netns", &router, "type", "veth", "peer", "name",
                "eth0", "netns", &namespace,
            ]);
            let lines = format!("addr add {at_router}/24 dev {name}\nlink set {name} up\n");
            batch(&router, &lines);
            let address = host.address();
            let lines = format!(
                "addr add {address}/24 dev eth0\nlink set lo up\nlink set eth0 up\n\
                 route add default via {at_router}\n"
            );
            batch(&namespace, &lines);
        }
    }

    fn name(&self, end: &str) -> String {
        format!("{}{end}", self.prefix)
    }

    /// The machines.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Runs something in a thread on a machine; processes that it starts stay there.
    pub fn at<T: Send>(&self, host: Host, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.name(&host.name()), run)
    }

    /// Runs something in a thread that reaches all machines, whoever is cut off.
    pub fn at_router<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.name("r"), run)
    }

    /// A machine, for threads that may outlive the network.
    pub fn place(&self, host: Host) -> Place {
        Place(self.name(&host.name()))
    }

    /// From now on nothing comes from `from` to `to`; the other way is as it was.
    pub fn cut(&self, from: Host, to: Host) {
        self.cut_all(&[(from, to)]);
    }

    /// The same for many pairs at once.
    pub fn cut_all(&self, pairs: &[(Host, Host)]) {
        let mut cut = lock(&self.cut);
        let new: Vec<_> = pairs.iter().filter(|it| !cut.contains(it)).collect();
        let lines: String = new.iter().map(|pair| rule("add", pair)).collect();
        batch(&self.name("r"), &lines);
        cut.extend(new);
    }

    /// Nothing passes between these two groups.
    pub fn part(&self, one: &[Host], other: &[Host]) {
        let pairs = one.iter().flat_map(|a| other.iter().map(|b| (*a, *b)));
        let both: Vec<_> = pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
        self.cut_all(&both);
    }

    /// Cuts a machine off from all others.
    pub fn isolate(&self, host: Host) {
        let others: Vec<Host> = self.others(host);
        self.part(&[host], &others);
    }

    fn others(&self, host: Host) -> Vec<Host> {
        let others = self.hosts.iter().filter(|it| **it != host);
        others.copied().collect()
    }

    /// Everything passes again.
    pub fn heal(&self) {
        let mut cut = lock(&self.cut);
        let lines: String = cut.iter().map(|pair| rule("del", pair)).collect();
        batch(&self.name("r"), &lines);
        cut.clear();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.prefix);
        lock(&LEFT).retain(|it| *it != Left::Namespaces(self.prefix.clone()));
    }
}

fn rule(action: &str, (from, to): &(Host, Host)) -> String {
    let (from, to) = (from.address(), to.address());
    format!("rule {action} pref {DROP_PRIORITY} from {from} to {to} blackhole\n")
}

/// When this process gets SIGINT, SIGTERM or SIGHUP it ends its networks, with what runs there, and removes
/// the directories that are named with [`remove_on_signal`].
pub fn end_on_signals() {
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]);
    let mut signals = signals.expect("signals can be caught");
    thread::spawn(move || {
        let signal = signals.forever().next().unwrap_or(SIGTERM);
        eprintln!("signal {signal}: everything is removed");
        // It stays locked: nothing new is made.
        let left = lock(&LEFT);
        for it in left.iter() {
            match it {
                Left::Namespaces(prefix) => remove(prefix),
                Left::Directory(path) => {
                    // What was left there only takes space.
                    let _ = fs::remove_dir_all(path);
                }
            }
        }
        std::process::exit(128 + signal);
    });
}

/// See [`end_on_signals`].
pub fn remove_on_signal(directory: PathBuf) {
    lock(&LEFT).push(Left::Directory(directory));
}

/// Removes the namespaces of processes that are no more, and kills what still runs there.
pub fn remove_leftovers() {
    for name in namespaces() {
        if let Some((pid, number)) = creator(&name)
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            remove(&format!("{PREFIX}{pid}-{number}-"));
        }
    }
}

/// Process id and number of network in a name; none if it is not one of ours.
fn creator(name: &str) -> Option<(u32, u32)> {
    let mut parts = name.strip_prefix(PREFIX)?.splitn(3, '-');
    let pid = parts.next()?.parse().ok()?;
    let number = parts.next()?.parse().ok()?;
    parts.next().map(|_| (pid, number))
}

fn namespaces() -> Vec<String> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.collect()
}

/// Kills what runs in the namespaces whose names begin so, and removes them. Another process may do the same.
fn remove(prefix: &str) {
    let names: Vec<_> = namespaces()
        .into_iter()
        .filter(|name| name.starts_with(prefix))
        .collect();
    let own = std::process::id();
    for name in &names {
        let pids = ip_command().args(["netns", "pids", name]).output();
        let pids = pids.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
        for pid in pids.unwrap_or_default().split_whitespace() {
            // A thread of ours may be there.
            if pid.parse() != Ok(own) {
                // It may have ended meanwhile.
                let _ = Command::new("kill").args(["-KILL", pid]).status();
            }
        }
    }
    for name in &names {
        let mut command = ip_command();
        command.args(["netns", "del", name]).stderr(Stdio::null());
        // Whoever else removed it has done the same.
        let _ = command.status();
    }
}

fn enter(namespace: &str) {
    let path = Path::new(NAMESPACES).join(namespace);
    let file = File::open(&path);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let moved = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
    moved.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn inside<T: Send>(namespace: &str, run: impl FnOnce() -> T + Send) -> T {
    let run = || {
        enter(namespace);
        run()
    };
    thread::scope(|scope| match scope.spawn(run).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn ip_command() -> Command {
    Command::new(binaries::tool("ip", "iproute2"))
}

/// # Panics
/// If it fails.
fn ip(args: &[&str]) {
    let output = ip_command().args(args).output();
    let output = output.expect("ip can be run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {}: {text}", args.join(" "));
}

/// Runs lines of `ip` in a namespace.
fn batch(namespace: &str, lines: &str) {
    if lines.is_empty() {
        return;
    }
    let mut command = ip_command();
    command.args(["-n", namespace, "-batch", "-"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("ip can be run");
    let mut stdin = child.stdin.take().expect("it is piped");
    // If it has ended it says why.
    let _ = stdin.write_all(lines.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("it is our child");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{namespace}: {text} in\n{lines}");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;

    const SERVER: Host = Host::Server(0);
    const OTHER: Host = Host::Server(1);

    /// Whether a datagram passes.
    fn passes(network: &Network, from: Host, to: Host) -> bool {
        let receiver = network.at(to, || UdpSocket::bind((to.address(), 0)));
        let receiver = receiver.expect("the address is its own");
        let wait = Some(Duration::from_millis(200));
        receiver.set_read_timeout(wait).expect("it is not 0");
        let address = receiver.local_addr().expect("it is bound");
        network.at(from, || {
            let sender = UdpSocket::bind((from.address(), 0)).expect("the address is its own");
            // A packet that is dropped by the router is sent nevertheless.
            let _ = sender.send_to(b"x", address);
        });
        receiver.recv(&mut [0]).is_ok()
    }

    #[test]
    fn links_are_cut_one_way_and_both_and_all_is_removed() {
        let network = Network::new([0, 1], 1);
        let prefix = network.prefix.clone();
        let gateway = Host::Gateway(0);
        assert!(passes(&network, SERVER, OTHER) && passes(&network, OTHER, gateway));
        network.cut(SERVER, OTHER);
        assert!(!passes(&network, SERVER, OTHER));
        assert!(passes(&network, OTHER, SERVER) && passes(&network, SERVER, gateway));
        network.isolate(OTHER);
        assert!(!passes(&network, OTHER, SERVER) && !passes(&network, gateway, OTHER));
        assert!(passes(&network, SERVER, gateway));
        network.heal();
        assert!(passes(&network, SERVER, OTHER) && passes(&network, OTHER, SERVER));

        // An established stream is cut, too; the router reaches everybody nevertheless.
        let listener = network.at(SERVER, || TcpListener::bind((SERVER.address(), 0)));
        let listener = listener.expect("the address is its own");
        let address = listener.local_addr().expect("it is bound");
        let mut stream = network.at(OTHER, || TcpStream::connect(address)).unwrap();
        let (mut served, _) = listener.accept().unwrap();
        network.part(&[SERVER], &[OTHER, gateway]);
        served.write_all(b"x").unwrap();
        let wait = Some(Duration::from_millis(200));
        stream.set_read_timeout(wait).unwrap();
        assert!(stream.read(&mut [0]).is_err());
        network.at_router(|| TcpStream::connect(address)).unwrap();
        network.heal();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.read_exact(&mut [0]).unwrap();

        let mut sleeper = network.at(SERVER, || Command::new("sleep").arg("100").spawn().unwrap());
        drop(network);
        assert!(!sleeper.wait().unwrap().success());
        assert!(!namespaces().iter().any(|name| name.starts_with(&prefix)));
    }

    #[test]
    fn leftovers_of_dead_processes_only_are_removed() {
        let mut dead = Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let left = format!("{PREFIX}{}-0-s0", dead.id());
        let own = Network::new([0], 0);
        ip(&["netns", "add", &left]);
        remove_leftovers();
        let names = namespaces();
        assert!(!names.contains(&left));
        assert!(names.contains(&own.name("s0")) && names.contains(&own.name("r")));
        assert_eq!(creator("pss-12-3-s0"), Some((12, 3)));
        for other in ["pss-12", "pss-x-1-r", "other", "pss-1-2", "pss--"] {
            assert_eq!(creator(other), None, "{other}");
        }
    }
}
