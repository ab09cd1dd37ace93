//! `pss up`: a whole cell with its NBD and iSCSI servers in one process, to try PSS out and for development.
//!
//! ```text
//! DIR/server.conf   the list of servers, rewritten at every start
//! DIR/cell.key      the cell key, made at the first start
//! DIR/server0 ...   the servers' data directories
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Args;
use export_iscsi::catalog::{Catalog, LunEntry, TargetEntry};
use export_iscsi::control::Control;
use export_iscsi::control::socket::ControlSocket;
use export_iscsi::scsi::LunSettings;
use export_iscsi::server as iscsi;
use export_nbd::export::{Exports, Policy};
use export_nbd::server as nbd;
use pss_core::client::{Cell, ClientError};
use pss_core::disk::files::{FileDisk, LOCK_FILE};
use pss_core::key::{CellKey, KEY_FILE_NAME};
use pss_core::servers::{Ids, ServersFile, TCP_PORT_BASE, UDP_PORT_BASE};
use pss_core::size::{Size, parse_size};
use pss_core::state::CHUNK_BYTES_DEFAULT;
use pss_core::types::ServerId;
use pss_core::volume::device::Volumes;
use pss_gateway::listen::Listener;
use pss_gateway::logging::{self, LogLevel};
use pss_gateway::notes::Notes;
use pss_gateway::program::parse_address;
use pss_gateway::text::counted;
use tokio::sync::watch;

use crate::cli::cell::{config, connect, explain};
use crate::cli::{self, CliError, Exit, check_new_volume, format, on_stop_signal, start_server};
use crate::config::{CellFiles, Tuning};
use crate::node::ServerHandle;

/// Flags of `pss up`.
#[derive(Args, Debug)]
pub struct UpArgs {
    /// How many servers [default: 3, or as many as DIR has]
    #[arg(long, value_name = "N", value_parser = ["1", "3", "5"])]
    count: Option<String>,
    /// A volume to create if it is missing; may be repeated [default: vol001:10G]
    #[arg(long = "volume", value_name = "NAME:SIZE")]
    volumes: Vec<VolumeSpec>,
    /// Where the data are kept
    #[arg(long, value_name = "DIR", default_value = "./pss-data")]
    dir: PathBuf,
    /// Where the NBD server listens [default: 127.0.0.1:10809, or the next free port]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    nbd: Option<SocketAddr>,
    /// Where the iSCSI server listens [default: 127.0.0.1:3260, or the next free port]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    iscsi: Option<SocketAddr>,
    /// How much is logged to stderr
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,
}

/// `NAME:SIZE`.
#[derive(Clone, Debug, Eq, PartialEq)]
struct VolumeSpec {
    name: String,
    size_bytes: u64,
}

impl FromStr for VolumeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<VolumeSpec, String> {
        let Some((name, size)) = text.rsplit_once(':') else {
            return Err(format!("'{text}' is no NAME:SIZE, such as vol001:10G"));
        };
        let size_bytes = parse_size(size).map_err(|error| error.to_string())?;
        Ok(VolumeSpec {
            name: name.to_owned(),
            size_bytes,
        })
    }
}

/// A front end of the cell: how it is called, and where it usually listens.
#[derive(Clone, Copy, Debug)]
struct FrontEnd {
    name: &'static str,
    flag: &'static str,
    usual: SocketAddr,
}

const NBD: FrontEnd = FrontEnd {
    name: "NBD",
    flag: "--nbd",
    usual: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10809),
};
const ISCSI: FrontEnd = FrontEnd {
    name: "iSCSI",
    flag: "--iscsi",
    usual: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3260),
};
/// The target whose disks are the volumes, in their order from LUN 1 on: tgt's LUN 0 is no disk either.
const TARGET: &str = "iqn.2001-03.jp.tritech:pss-up";
/// So many ports after the usual one are tried for a front end, and so many addresses for the cell.
const TRIES: u8 = 20;
/// For a request to the cell; an election after a crash takes part of a second.
const CELL_TIMEOUT: Duration = Duration::from_secs(30);
/// What this calls itself to the cell.
const PROGRAM: &str = "pss-up";

/// Where everything is, once it is decided.
#[derive(Debug)]
struct Plan {
    dir: PathBuf,
    host: IpAddr,
    servers: u8,
    /// What the user should know about the choices.
    remarks: Vec<String>,
}

impl Plan {
    fn servers_file(&self) -> PathBuf {
        self.dir.join("server.conf")
    }

    /// Socket for `pss iscsi`.
    fn control(&self) -> PathBuf {
        self.dir.join("iscsi.sock")
    }

    fn server_dir(&self, id: u8) -> PathBuf {
        self.dir.join(format!("server{id}"))
    }
}

fn failed(what: impl fmt::Display) -> CliError {
    CliError::new(Exit::Failed, what)
}

/// Makes the directory; its absolute path.
fn open_dir(dir: &Path) -> Result<PathBuf, CliError> {
    let cannot = |error| {
        failed(format!(
            "{}: cannot make the directory: {error}; use another --dir",
            dir.display()
        ))
    };
    let dir = std::path::absolute(dir).map_err(cannot)?;
    // server.conf is text, separates its fields by blanks, and has comments.
    let bad = |c: char| c.is_whitespace() || c == '#';
    if dir.to_str().is_none_or(|text| text.contains(bad)) {
        return Err(CliError::new(
            Exit::Usage,
            format!(
                "{}: the path has a blank or '#' in it, which server.conf cannot hold; use another --dir",
                dir.display()
            ),
        ));
    }
    std::fs::create_dir_all(&dir).map_err(cannot)?;
    Ok(dir)
}

/// Decides how many servers there are and where.
fn plan(args: &UpArgs, dir: PathBuf) -> Result<Plan, CliError> {
    let mut plan = Plan {
        dir,
        host: IpAddr::V4(Ipv4Addr::LOCALHOST),
        servers: 3,
        remarks: Vec::new(),
    };
    let before = previous(&plan.servers_file())?;
    let asked: Option<u8> = args.count.as_deref().and_then(|count| count.parse().ok());
    match (&before, asked) {
        (Some((_, servers)), Some(count)) if *servers != count => {
            return Err(CliError::new(
                Exit::Usage,
                format!(
                    "{} holds a cell of {}; use --count {servers}, or another --dir",
                    plan.dir.display(),
                    counted(usize::from(*servers), "server")
                ),
            ));
        }
        (Some((_, servers)), _) => plan.servers = *servers,
        (None, count) => plan.servers = count.unwrap_or(3),
    }
    choose_host(&mut plan, before.map(|(host, _)| host))?;
    Ok(plan)
}

/// Address and number of servers of the cell that the directory already holds.
fn previous(file: &Path) -> Result<Option<(IpAddr, u8)>, CliError> {
    if !file.exists() {
        return Ok(None);
    }
    let list = ServersFile::read(file).map_err(|error| CliError::new(Exit::Usage, error))?;
    let host = list.records[0].host.parse().map_err(|_| {
        let text = "this server.conf was not written by 'pss up'; use another --dir";
        CliError::new(Exit::Usage, format!("{}: {text}", file.display()))
    })?;
    Ok(Some((host, list.records.len() as u8)))
}

/// The first loopback address on which all ports of the cell are free; the one used before if it is.
fn choose_host(plan: &mut Plan, before: Option<IpAddr>) -> Result<(), CliError> {
    let others = (1..=TRIES).map(|last| IpAddr::from([127, 0, 1, last]));
    let candidates = before.into_iter().chain([plan.host]).chain(others);
    let mut taken = None;
    for host in candidates {
        match ports_free(host, plan.servers) {
            Ok(()) => {
                if let Some((address, error)) = taken {
                    plan.remarks.push(format!(
                        "{address} is taken ({error}): the cell uses {host} instead."
                    ));
                }
                plan.host = host;
                return Ok(());
            }
            Err(trouble) => _ = taken.get_or_insert(trouble),
        }
    }
    let (address, error) = taken.expect("there were candidates, and all were taken");
    Err(failed(format!(
        "{address}: {error}; on every loopback address from 127.0.0.1 to 127.0.1.{TRIES} a port of the cell (UDP {UDP_PORT_BASE} and up, TCP {TCP_PORT_BASE} and up) is taken: stop what uses them"
    )))
}

fn ports_free(host: IpAddr, servers: u8) -> Result<(), (SocketAddr, io::Error)> {
    for id in 0..u16::from(servers) {
        let udp = SocketAddr::new(host, UDP_PORT_BASE + id);
        let tcp = SocketAddr::new(host, TCP_PORT_BASE + id);
        UdpSocket::bind(udp).map_err(|error| (udp, error))?;
        TcpListener::bind(tcp).map_err(|error| (tcp, error))?;
    }
    Ok(())
}

/// Writes server.conf, and the key at the first start.
fn write_files(plan: &Plan) -> Result<(), CliError> {
    let file = plan.servers_file();
    let key = plan.dir.join(KEY_FILE_NAME);
    if !key.exists() {
        // Servers that were formatted under another key would refuse this one, and say less well why.
        if file.exists() {
            return Err(failed(format!(
                "{}: the key of this cell is missing; bring it back, or use another --dir",
                key.display()
            )));
        }
        CellKey::generate()
            .and_then(|new| new.write_new(&key))
            .map_err(failed)?;
    }
    let mut text = String::from("# Written by 'pss up' at every start.\n# id server path\n");
    for id in 0..plan.servers {
        let dir = plan.server_dir(id);
        text.push_str(&format!("{id} {} {}\n", plan.host, dir.display()));
    }
    replace_file(&file, text.as_bytes())
        .map_err(|error| failed(format!("{}: cannot write it: {error}", file.display())))
}

fn replace_file(file: &Path, content: &[u8]) -> io::Result<()> {
    let new = file.with_extension("conf.new");
    let mut output = File::create(&new)?;
    output.write_all(content)?;
    output.sync_all()?;
    std::fs::rename(&new, file)
}

/// An open port, and what the user should know about it.
struct Port {
    listener: Listener,
    address: SocketAddr,
    remark: Option<String>,
}

/// Opens a front end's port: the one that was asked for, or else the usual one or the next that is free.
fn bind(end: FrontEnd, asked: Option<SocketAddr>) -> Result<Port, CliError> {
    let first = asked.unwrap_or(end.usual);
    let taken = match Listener::tcp(first) {
        Ok(listener) => {
            let address = match &listener {
                // Port 0 has become a free one.
                Listener::Tcp(socket) => socket.local_addr().map_err(failed)?,
                Listener::Unix { .. } => first,
            };
            return Ok(Port {
                listener,
                address,
                remark: None,
            });
        }
        Err(error) => error,
    };
    let ports = match asked {
        Some(_) => 0,
        None => u16::from(TRIES),
    };
    for port in 1..=ports {
        let address = SocketAddr::new(first.ip(), first.port() + port);
        if let Ok(listener) = Listener::tcp(address) {
            let name = end.name;
            return Ok(Port {
                listener,
                address,
                remark: Some(format!(
                    "{first} is taken ({taken}): {name} uses {address} instead."
                )),
            });
        }
    }
    Err(failed(format!(
        "{first}: cannot listen for {}: {taken}; use another {} ADDR:PORT",
        end.name, end.flag
    )))
}

/// Runs the cell until it is told to stop.
///
/// # Errors
/// [`CliError`].
pub fn run(args: &UpArgs) -> Result<(), CliError> {
    let volumes = volumes(args)?;
    let dir = open_dir(&args.dir)?;
    // Its servers start and stop together: that each of them misses the others for a moment is no news, and
    // reads like a failure.
    logging::init_cell(args.log_level, "pss_server::peers=error");
    let _locked = lock(&dir)?;
    let plan = plan(args, dir)?;
    write_files(&plan)?;
    let files = CellFiles::read(&plan.servers_file(), None)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        let ports = [bind(NBD, args.nbd)?, bind(ISCSI, args.iscsi)?];
        // Before anything runs, so that Ctrl-C is never the end of a half-started cell.
        let stop = stop_signal()?;
        let servers = RunningServers::start(&files)?;
        let served = serve(&plan, &files, &volumes, ports, &servers, stop).await;
        let stopped = servers.stop();
        served.and(stopped)
    })
}

fn volumes(args: &UpArgs) -> Result<Vec<VolumeSpec>, CliError> {
    let mut volumes = args.volumes.clone();
    if volumes.is_empty() {
        volumes.push(VolumeSpec {
            name: "vol001".to_owned(),
            size_bytes: 10 << 30,
        });
    }
    for volume in &volumes {
        check_new_volume(&volume.name, volume.size_bytes, None)?;
    }
    Ok(volumes)
}

/// Keeps another `pss up` off the directory.
fn lock(dir: &Path) -> Result<FileDisk, CliError> {
    FileDisk::open(dir).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => failed(format!(
            "{}: another 'pss up' runs there; stop it, or use another --dir",
            dir.display()
        )),
        _ => failed(format!("{}: {error}", dir.display())),
    })
}

/// Ends at the first SIGINT or SIGTERM.
fn stop_signal() -> Result<watch::Receiver<bool>, CliError> {
    let (stop, stopped) = watch::channel(false);
    on_stop_signal(move || {
        stop.send_replace(true);
    })
    .map_err(failed)?;
    Ok(stopped)
}

/// The servers of the cell.
struct RunningServers {
    servers: Vec<(ServerId, Arc<ServerHandle>, JoinHandle<bool>)>,
    running: Arc<watch::Sender<usize>>,
}

impl RunningServers {
    /// Starts all servers; formats those that have no data yet.
    fn start(files: &CellFiles) -> Result<RunningServers, CliError> {
        let mut running = RunningServers {
            servers: Vec::new(),
            running: Arc::new(watch::Sender::new(0)),
        };
        let mut first_error = None;
        for started in start_all(files) {
            if let Err(error) = started.and_then(|handle| running.watch(handle)) {
                first_error.get_or_insert(error);
            }
        }
        match first_error {
            None => Ok(running),
            Some(error) => {
                // What was started stops cleanly; the first error is the one to show.
                let _ = running.stop();
                Err(failed(error))
            }
        }
    }

    /// Takes a server in.
    fn watch(&mut self, handle: ServerHandle) -> anyhow::Result<()> {
        let id = handle.id();
        let handle = Arc::new(handle);
        self.running.send_modify(|running| *running += 1);
        let (waiting, running) = (Arc::clone(&handle), Arc::clone(&self.running));
        let waiter = std::thread::Builder::new()
            .name(format!("wait-{id}"))
            .spawn(move || {
                let ended = waiting.wait();
                running.send_modify(|running| *running -= 1);
                if let Err(error) = &ended {
                    tracing::error!(server = id.0, "stopped: {error}");
                }
                ended.is_ok()
            })?;
        self.servers.push((id, handle, waiter));
        Ok(())
    }

    /// Ends when no server runs any more.
    async fn all_ended(&self) {
        // The sender is ours, so waiting cannot fail.
        let _ = self
            .running
            .subscribe()
            .wait_for(|running| *running == 0)
            .await;
    }

    /// Stops all servers.
    fn stop(self) -> Result<(), CliError> {
        for (_, handle, _) in &self.servers {
            handle.stop();
        }
        let mut failures = Vec::new();
        for (id, _, waiter) in self.servers {
            if !waiter.join().unwrap_or(false) {
                failures.push(id);
            }
        }
        match failures.is_empty() {
            true => Ok(()),
            false => Err(failed(format!(
                "server {} did not stop cleanly; the log above says why",
                Ids(&failures)
            ))),
        }
    }
}

/// Starts all servers at a time, as each reads its log first, and gives them in order.
fn start_all(files: &CellFiles) -> Vec<anyhow::Result<ServerHandle>> {
    let start = |id: ServerId| {
        let config = files.server(id.0, None, None, tuning())?;
        if is_new(&config.path) {
            format(&config, false)?;
        }
        start_server(config).map_err(anyhow::Error::msg)
    };
    std::thread::scope(|scope| {
        let records = &files.file.records;
        let starting: Vec<_> = records
            .iter()
            .map(|record| scope.spawn(move || start(record.id)))
            .collect();
        let ended = starting.into_iter().map(|thread| {
            // A panic has been told on stderr by itself.
            let panicked = |_| Err(anyhow::anyhow!("a server panicked at its start"));
            thread.join().unwrap_or_else(panicked)
        });
        ended.collect()
    })
}

/// Smaller than a server's own: these are several servers on somebody's workstation, and start soon.
fn tuning() -> Tuning {
    Tuning {
        segment_bytes: 64 << 20,
        checkpoint_bytes: 64 << 20,
        log_retain_bytes: 256 << 20,
        ..Tuning::default()
    }
}

/// Opens the volumes, serves them over NBD and iSCSI, and says so, until told to stop.
async fn serve(
    plan: &Plan,
    files: &CellFiles,
    volumes: &[VolumeSpec],
    [nbd_port, iscsi_port]: [Port; 2],
    servers: &RunningServers,
    mut stop: watch::Receiver<bool>,
) -> Result<(), CliError> {
    let mut stopping = stop.clone();
    let (cell, volumes) = tokio::select! {
        opened = open_volumes(files, volumes) => opened?,
        _ = stopping.wait_for(|stop| *stop) => return Ok(()),
    };
    let exports = Exports::new(Arc::clone(&cell) as Arc<dyn Volumes>, Policy::default());
    let nbd_server = nbd::Server::new(exports, nbd::Limits::default());
    let iscsi_server = iscsi::Server::new(Arc::clone(&cell) as _, 1, iscsi::Limits::default());
    for missing in iscsi_server.apply(catalog(&volumes)).await {
        missing.log();
    }
    let notes = Notes::new(config(files, PROGRAM, CELL_TIMEOUT));
    let control = Control::new(Arc::clone(&iscsi_server), None, Some(Arc::clone(&notes)));
    match ControlSocket::bind(&plan.control()) {
        Ok(socket) => drop(tokio::spawn(socket.serve(control))),
        Err(error) => tracing::warn!("{error}; 'pss iscsi' cannot see this cell"),
    }
    let remarks = [&nbd_port.remark, &iscsi_port.remark];
    let remarks: Vec<_> = plan
        .remarks
        .iter()
        .chain(remarks.into_iter().flatten())
        .collect();
    let addresses = (nbd_port.address, iscsi_port.address);
    cli::print(&summary(plan, &volumes, addresses, &remarks))?;
    let stopped = async {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            () = servers.all_ended() => tracing::error!("all servers have stopped"),
        }
    };
    let (end, ended) = watch::channel(false);
    let told = |mut ended: watch::Receiver<bool>| async move {
        // It cannot be dropped before both servers have ended.
        let _ = ended.wait_for(|end| *end).await;
    };
    tokio::join!(
        async {
            stopped.await;
            end.send_replace(true);
        },
        nbd_server.run(vec![nbd_port.listener], told(ended.clone())),
        iscsi_server.run(vec![iscsi_port.listener], told(ended)),
    );
    tokio::join!(cell.close(), notes.close());
    Ok(())
}

/// One target with the volumes as its disks.
fn catalog(volumes: &[VolumeSpec]) -> Catalog {
    let disk = |volume: &VolumeSpec| LunEntry {
        volume: volume.name.clone(),
        settings: LunSettings::default(),
    };
    let target = TargetEntry {
        luns: (1..).zip(volumes.iter().map(disk)).collect(),
        ..TargetEntry::new(TARGET)
    };
    Catalog {
        targets: [(TARGET.to_owned(), Arc::new(target))].into(),
        ..Catalog::default()
    }
}

/// Connects to the cell and creates the volumes that are missing; says what the volumes are.
async fn open_volumes(
    files: &CellFiles,
    volumes: &[VolumeSpec],
) -> Result<(Arc<Cell>, Vec<VolumeSpec>), CliError> {
    let cell = connect(files, PROGRAM, CELL_TIMEOUT);
    match create_missing(&cell, volumes).await {
        Ok(volumes) => Ok((cell, volumes)),
        Err(error) => Err(explain(files, &cell, error).await),
    }
}

async fn create_missing(
    cell: &Cell,
    volumes: &[VolumeSpec],
) -> Result<Vec<VolumeSpec>, ClientError> {
    let existing = cell.volumes().await?;
    let mut opened = Vec::new();
    for volume in volumes {
        let (name, mut size_bytes) = (volume.name.clone(), volume.size_bytes);
        match existing.iter().find(|status| status.volume.name == name) {
            // It may have been resized since.
            Some(status) => size_bytes = status.volume.size_bytes,
            None => {
                cell.create_volume(&name, size_bytes, CHUNK_BYTES_DEFAULT)
                    .await?;
            }
        }
        opened.push(VolumeSpec { name, size_bytes });
    }
    Ok(opened)
}

/// Whether a server's directory has never been used: it is missing or empty.
fn is_new(path: &Path) -> bool {
    match std::fs::read_dir(path) {
        Ok(mut entries) => {
            entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK_FILE))
        }
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// What the user can do now.
fn summary(
    plan: &Plan,
    volumes: &[VolumeSpec],
    (nbd, iscsi): (SocketAddr, SocketAddr),
    remarks: &[&String],
) -> String {
    let mut text = String::new();
    for remark in remarks {
        text.push_str(&format!("{remark}\n"));
    }
    let ports = |first: u16| match plan.servers {
        1 => first.to_string(),
        servers => format!("{first}-{}", first + u16::from(servers) - 1),
    };
    text.push_str(&format!(
        "PSS cell of {} at {} (UDP {}, TCP {}), data in {}\n",
        counted(plan.servers.into(), "server"),
        plan.host,
        ports(UDP_PORT_BASE),
        ports(TCP_PORT_BASE),
        plan.dir.display(),
    ));
    for (lun, volume) in (1..).zip(volumes) {
        text.push_str(&format!(
            "Volume {} of {} at nbd://{nbd}/{}\n    or iscsi://{iscsi}/{TARGET}/{lun}\n",
            volume.name,
            Size(volume.size_bytes),
            uri_escaped(&volume.name),
        ));
    }
    let first = &volumes[0].name;
    let uri = format!("nbd://{nbd}/{}", uri_escaped(first));
    let name = shell_quoted(first);
    text.push_str(&format!(
        "
  am I safe?           {pss} --servers {conf} status
  what is exported     nbdinfo {uri}
  copy an image in     qemu-img convert -n -O raw disk.img {uri}
  copy it back out     nbdcopy {uri} copy.img
  attach it (Linux)    sudo modprobe nbd && sudo nbd-client {ip} {port} /dev/nbd0 -N {name}
  use it               sudo mkfs.ext4 /dev/nbd0 && sudo mount /dev/nbd0 /mnt
  detach it            sudo umount /mnt && sudo nbd-client -d /dev/nbd0
  over iSCSI (Linux)   sudo iscsiadm -m discovery -t sendtargets -p {iscsi} && sudo iscsiadm -m node -T {TARGET} -l
  who is logged in     {pss} iscsi --control {control} sessions
  leave it             sudo iscsiadm -m node -T {TARGET} -u

Ctrl-C stops the cell, a second Ctrl-C at once; the same command starts it again on the same data.
",
        pss = pss_command(),
        conf = shell_quoted(&plan.servers_file().display().to_string()),
        control = shell_quoted(&plan.control().display().to_string()),
        ip = nbd.ip(),
        port = nbd.port(),
    ));
    text
}

/// How the user reaches `pss`: as this program, beside it, or through cargo.
fn pss_command() -> String {
    let this = std::env::current_exe().unwrap_or_default();
    let pss = this.with_file_name("pss");
    match pss.is_file() {
        true => shell_quoted(&pss.display().to_string()),
        false => "cargo run --release --bin pss --".to_owned(),
    }
}

fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':');
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// A volume's name as the path of a URI (RFC 3986, section 3.3).
fn uri_escaped(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte));
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: &Path) -> UpArgs {
        UpArgs {
            count: None,
            volumes: Vec::new(),
            dir: dir.to_owned(),
            nbd: None,
            iscsi: None,
            log_level: LogLevel::Warn,
        }
    }

    #[test]
    fn volume_specs() {
        let spec = |text: &str| text.parse::<VolumeSpec>();
        assert_eq!(
            spec("a:b:10G"),
            Ok(VolumeSpec {
                name: "a:b".into(),
                size_bytes: 10 << 30
            })
        );
        assert!(spec("vol001").unwrap_err().contains("NAME:SIZE"));
        assert!(spec("vol001:10GB").unwrap_err().contains("ambiguous"));
    }

    #[test]
    fn the_plan_is_kept_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut five = args(dir);
        five.count = Some("5".into());
        let mut first = plan(&five, dir.to_owned()).unwrap();
        assert_eq!(first.servers, 5);
        // As if the usual address had been taken at the first start.
        first.host = IpAddr::from([127, 0, 1, 19]);
        write_files(&first).unwrap();
        let files = CellFiles::read(&first.servers_file(), None).unwrap();
        assert!(files.key.is_some());
        let again = plan(&args(dir), dir.to_owned()).unwrap();
        assert_eq!((again.servers, again.host), (5, first.host));
        write_files(&again).unwrap();
        let later = CellFiles::read(&again.servers_file(), None).unwrap();
        assert_eq!(later.cell_id(None), files.cell_id(None));
        assert_eq!(later.file.records[4].path, dir.join("server4"));

        let mut three = args(dir);
        three.count = Some("3".into());
        let message = plan(&three, dir.to_owned()).unwrap_err().message;
        assert!(message.contains("a cell of 5 servers"), "{message}");
        std::fs::remove_file(dir.join("cell.key")).unwrap();
        assert!(write_files(&again).unwrap_err().message.contains("key"));
    }

    #[test]
    fn a_taken_address_is_avoided_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(&args(dir.path()), dir.path().to_owned()).unwrap();
        plan.remarks.clear();
        let host = IpAddr::from([127, 0, 1, 20]);
        let taken = UdpSocket::bind((host, UDP_PORT_BASE + 2)).unwrap();
        choose_host(&mut plan, Some(host)).unwrap();
        assert_ne!(plan.host, host);
        assert!(plan.remarks[0].starts_with("127.0.1.20:4002 is taken"));
        plan.remarks.clear();
        drop(taken);
        choose_host(&mut plan, Some(host)).unwrap();
        assert_eq!(plan.host, host);
        assert!(plan.remarks.is_empty());
    }

    #[test]
    fn the_summary_can_be_pasted() {
        let plan = Plan {
            dir: "/tmp/it's".into(),
            host: IpAddr::from([127, 0, 0, 1]),
            servers: 3,
            remarks: Vec::new(),
        };
        let volumes = ["a b:1G".parse().unwrap()];
        let addresses = (NBD.usual, ISCSI.usual);
        let text = summary(&plan, &volumes, addresses, &[&"remark".to_owned()]);
        assert!(text.starts_with("remark\nPSS cell of 3 servers at 127.0.0.1 (UDP 4000-4002,"));
        assert!(
            text.contains("nbdinfo nbd://127.0.0.1:10809/a%20b\n"),
            "{text}"
        );
        let iscsi = "or iscsi://127.0.0.1:3260/iqn.2001-03.jp.tritech:pss-up/1\n";
        assert!(text.contains(iscsi), "{text}");
        assert!(text.contains("nbd-client 127.0.0.1 10809 /dev/nbd0 -N 'a b'\n"));
        assert!(text.contains(r"--servers '/tmp/it'\''s/server.conf' status"));
    }
}
