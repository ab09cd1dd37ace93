//! `pss up`: a whole cell in one process, to try PSS out and for development.
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

use clap::Args;
use pss_core::key::{CellKey, KEY_FILE_NAME};
use pss_core::servers::{ServersFile, TCP_PORT_BASE, UDP_PORT_BASE};
use pss_core::size::{Size, parse_size};

use crate::cli::{CliError, Exit};
use crate::logging::LogLevel;

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
    #[arg(long, value_name = "ADDR:PORT")]
    nbd: Option<SocketAddr>,
    /// How much is logged to stderr
    #[arg(long, value_enum, default_value = "warn")]
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

const NBD_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10809);
/// So many ports after the usual one are tried for NBD, and so many addresses for the cell.
const TRIES: u8 = 20;

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

    fn server_dir(&self, id: u8) -> PathBuf {
        self.dir.join(format!("server{id}"))
    }
}

fn failed(what: impl fmt::Display) -> CliError {
    CliError::new(Exit::Failed, what)
}

/// Decides where the cell runs; makes the directory.
fn plan(args: &UpArgs) -> Result<Plan, CliError> {
    std::fs::create_dir_all(&args.dir).map_err(|error| {
        failed(format!(
            "{}: cannot make the directory: {error}",
            args.dir.display()
        ))
    })?;
    let dir = std::fs::canonicalize(&args.dir)
        .map_err(|error| failed(format!("{}: {error}", args.dir.display())))?;
    // server.conf separates its fields by blanks and is text.
    if dir
        .to_str()
        .is_none_or(|text| text.contains(|c: char| c.is_whitespace() || c == '#'))
    {
        return Err(CliError::new(
            Exit::Usage,
            format!(
                "{}: the path has a blank or '#' in it, which server.conf cannot hold; use another --dir",
                dir.display()
            ),
        ));
    }
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
                    "{} holds a cell of {servers} servers; use --count {servers}, or another --dir",
                    plan.dir.display()
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

/// Opens the NBD port: the one that was asked for, or else the usual one or the next that is free.
fn bind_nbd(asked: Option<SocketAddr>, remarks: &mut Vec<String>) -> Result<TcpListener, CliError> {
    let first = asked.unwrap_or(NBD_DEFAULT);
    let taken = match TcpListener::bind(first) {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    let cannot = || {
        failed(format!(
            "{first}: cannot listen for NBD: {taken}; use another --nbd ADDR:PORT"
        ))
    };
    if asked.is_some() {
        return Err(cannot());
    }
    for port in 1..=u16::from(TRIES) {
        let next = SocketAddr::new(first.ip(), first.port() + port);
        if let Ok(listener) = TcpListener::bind(next) {
            remarks.push(format!(
                "{first} is taken ({taken}): NBD uses {next} instead."
            ));
            return Ok(listener);
        }
    }
    Err(cannot())
}

/// Runs the cell until it is told to stop.
///
/// # Errors
/// [`CliError`].
pub fn run(args: &UpArgs) -> Result<(), CliError> {
    let _ = args;
    Err(failed("not wired"))
}
