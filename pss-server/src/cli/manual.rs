//! The names that the manual of 2011 gives the commands. Links with these names lead to `pss`, which does then what
//! they did; see `packaging/manual`.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::Path;
use std::process::ExitCode;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand, ValueEnum};
use pss_core::servers::Ids;
use pss_core::size::parse_size;
use pss_core::types::ServerId;
use pss_core::wire::inspect::{Inspect, Inspection, ProcessInfo};
use serde_json::{Value, json};

use super::cell::{Access, Told};
use super::links::{self, LinksArgs, servers_json, shown};
use super::paxos::{self, COUNT_DEFAULT, LogArgs, parse_page};
use super::probe::{self, Probe, ProbeArgs};
use super::watch::WatchArgs;
use super::{
    CellArgs, CliError, finish, format, parse_id, ports, print, print_json, say, server, volume,
};
use crate::config::CellFiles;
use crate::render::printable;

/// What a name of the manual is called with.
#[derive(Debug)]
struct Manual {
    cell: CellArgs,
    name: Name,
}

impl Manual {
    /// The names, each with the options of `pss`. A multicall command has no options of its own.
    fn command() -> Command {
        let command = Command::new("manual")
            .version(env!("CARGO_PKG_VERSION"))
            .propagate_version(true)
            .disable_help_subcommand(true)
            .subcommand_required(true)
            .multicall(true);
        Name::augment_subcommands(command).mut_subcommands(|name| {
            let about = name.get_about().cloned();
            // That brings its own text about what it is.
            CellArgs::augment_args(name).about(about.unwrap_or_default())
        })
    }

    fn from_matches(matches: &ArgMatches) -> Result<Manual, clap::Error> {
        let (_, options) = matches
            .subcommand()
            .expect("a multicall command is always called by one of its names");
        Ok(Manual {
            cell: CellArgs::from_arg_matches(options)?,
            name: Name::from_arg_matches(matches)?,
        })
    }
}

/// A name of the manual; clap leaves `.sh` off.
#[derive(Debug, Subcommand)]
enum Name {
    /// Stops a server cleanly, as 'pss server shutdown' does
    #[command(name = "PSSShutdown")]
    Shutdown {
        /// Its id
        #[arg(value_name = "ID", value_parser = parse_id)]
        id: u8,
        /// Do not ask, even if the cell stops working without it
        #[arg(long)]
        yes: bool,
    },
    /// Shows what a server holds open, as 'pss server probe' does
    #[command(name = "PFSProbe")]
    Probe {
        /// Id of the server
        #[arg(value_name = "ID", value_parser = parse_id)]
        id: u8,
        /// What to look at
        #[arg(value_enum, value_name = "WHAT")]
        what: Probe,
    },
    /// Shows the links of a server or its log, as 'pss server links' and 'pss paxos log' do
    #[command(name = "PSSAdmin")]
    Admin {
        /// Id of the server
        #[arg(value_name = "ID", value_parser = parse_id)]
        id: u8,
        /// What to look at
        #[arg(value_enum, value_name = "WHAT")]
        what: Admin,
        /// Which page of the log; 1 is the newest [default: 1]
        #[arg(value_name = "PAGE", value_parser = parse_page)]
        page: Option<u64>,
    },
    /// Lists the processes of the servers as ps does
    #[command(name = "pss_lookup-server")]
    LookupServer,
    /// Lists the sockets of the servers as netstat does
    #[command(name = "pss_lookup_port")]
    LookupPort,
    /// Once let the servers' machines log in to each other with ssh; nothing needs that any more
    #[command(name = "pss_set_ssh")]
    SetSsh {
        #[arg(hide = true)]
        ignored: Vec<String>,
    },
    /// Creates a volume, as 'pss volume create' does
    #[command(name = "createISCSIVol")]
    CreateVolume {
        /// Its name, at most 64 bytes
        #[arg(value_name = "NAME")]
        name: String,
        /// Its size: a whole number and G or T, such as 10G or 2T
        #[arg(value_name = "SIZE", value_parser = parse_volume_size)]
        size: u64,
    },
    /// Initialises a server's data directory before its first start, as 'pssd format' does
    #[command(name = "pss_delper")]
    Delper {
        /// Id of the server [default: the one that server.conf has on this machine]
        #[arg(value_name = "ID", value_parser = parse_id)]
        id: Option<u8>,
        /// Do not ask, even if the data of a server are lost
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Admin {
    /// How the server is connected with the others
    Control,
    /// What the servers have agreed on, by slot, newest first
    Paxos,
}

/// Runs what the program is called by, if that is a name of the manual.
pub(super) fn main() -> Option<ExitCode> {
    let name = called_by(std::env::args_os().next()?.as_os_str())?;
    let matches = Manual::command().get_matches();
    let manual = Manual::from_matches(&matches).unwrap_or_else(|error| error.exit());
    Some(finish(&name, || {
        if io::stderr().is_terminal() {
            say(hint(&manual.name));
        }
        run(&manual.cell, manual.name)
    }))
}

/// The name of the manual that a program is called by.
fn called_by(program: &OsStr) -> Option<String> {
    let name = Path::new(program).file_stem()?.to_str()?;
    let found = Manual::command().find_subcommand(name).is_some();
    found.then(|| name.to_owned())
}

fn run(cell: &CellArgs, name: Name) -> Result<(), CliError> {
    match name {
        Name::Shutdown { id, yes } => server::shutdown(cell, id, yes),
        Name::Probe { id, what } => {
            let all = false;
            let watch = WatchArgs::default();
            probe::run(
                cell,
                &ProbeArgs {
                    id,
                    what,
                    all,
                    watch,
                },
            )
        }
        Name::Admin { id, what, page } => admin(cell, id, what, page),
        Name::LookupServer => lookup_servers(cell),
        Name::LookupPort => ports::lookup(cell),
        Name::SetSsh { .. } => set_ssh(cell),
        Name::CreateVolume { name, size } => volume::create(cell, &name, size, None),
        Name::Delper { id, yes } => {
            let id = id.map_or_else(|| own_id(cell), Ok)?;
            format::run_asking(&cell.servers, cell.key.as_deref(), id, yes)
        }
    }
}

/// Which command of today does the same.
fn hint(name: &Name) -> String {
    let (old, new) = match name {
        Name::Shutdown { id, .. } => ("PSSShutdown", format!("pss server shutdown {id}")),
        Name::Probe { id, what } => {
            let what = match what {
                Probe::Accept => "accept",
                Probe::Outbound => "outbound",
                Probe::Fd => "fd",
            };
            ("PFSProbe", format!("pss server probe {id} {what}"))
        }
        Name::Admin { id, what, .. } => {
            let new = match what {
                Admin::Control => format!("pss server links {id}"),
                Admin::Paxos => format!("pss paxos log --server {id}"),
            };
            ("PSSAdmin", new)
        }
        Name::LookupServer => ("pss_lookup-server.sh", "pss server list".to_owned()),
        Name::LookupPort => ("pss_lookup_port.sh", "pss server ports".to_owned()),
        Name::SetSsh { .. } => {
            return "Hint: pss_set_ssh.sh does nothing any more; leave it out.".to_owned();
        }
        Name::CreateVolume { .. } => ("createISCSIVol", "pss volume create NAME SIZE".to_owned()),
        Name::Delper { .. } => ("pss_delper.sh", "pssd format --id ID".to_owned()),
    };
    format!("Hint: {old} is now '{new}'.")
}

fn admin(cell: &CellArgs, id: u8, what: Admin, page: Option<u64>) -> Result<(), CliError> {
    let watch = WatchArgs::default();
    match (what, page) {
        (Admin::Control, Some(page)) => Err(CliError::usage(format!(
            "control has no pages: leave {page} out, or type 'PSSAdmin {id} paxos {page}'"
        ))),
        (Admin::Control, None) => {
            let id = Some(id);
            links::run(cell, &LinksArgs { id, watch })
        }
        (Admin::Paxos, page) => {
            let log = LogArgs {
                page: page.unwrap_or(1),
                server: Some(id),
                count: COUNT_DEFAULT,
                watch,
            };
            paxos::show(cell, &log, &format!("PSSAdmin {id} paxos"))
        }
    }
}

fn lookup_servers(args: &CellArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let told = cell.inspect_all(&cell.files.file.ids(), Inspect::Process);
    print(&shown(args, &told, processes_json, processes_text)?)
}

fn processes_json(told: &[Told]) -> Value {
    let schema = "pss.server.processes/1";
    servers_json(schema, "process", told, |found| match found {
        Inspection::Process(process) => Some(json!(process)),
        _ => None,
    })
}

fn processes_text(told: &[Told]) -> String {
    let processes = told.iter().filter_map(|one| match &one.answer {
        Ok(Inspection::Process(process)) => Some(process),
        _ => None,
    });
    processes.map(process_line).collect()
}

/// A process as `ps ax` shows it.
fn process_line(process: &ProcessInfo) -> String {
    let seconds = process.cpu_ms / 1000;
    format!(
        "{} ? {} {}:{:02} {} {} {}\n",
        process.pid,
        printable(&process.state),
        seconds / 60,
        seconds % 60,
        printable(&process.program),
        process.server,
        printable(&process.path)
    )
}

fn set_ssh(args: &CellArgs) -> Result<(), CliError> {
    if args.json {
        return print_json(&json!({ "schema": "pss.ssh/1", "needed": false }));
    }
    print(
        "Nothing to do: logins with ssh between the servers are not needed, because the tools ask the servers directly.\n",
    )
}

/// The sizes of the manual: a whole number and G or T.
fn parse_volume_size(text: &str) -> Result<u64, String> {
    let digits = text.strip_suffix(['G', 'T', 'g', 't']);
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !digits.is_some_and(is_number) {
        return Err("type a whole number and G or T, such as 10G or 2T".to_owned());
    }
    parse_size(text).map_err(|error| error.to_string())
}

/// The server that server.conf has on this machine.
fn own_id(args: &CellArgs) -> Result<u8, CliError> {
    let cell = CellFiles::read(&args.servers, args.key.as_deref())?;
    let ids = cell.file.ids();
    let here = |id: &ServerId| cell.servers.address(*id).is_some_and(is_own);
    let own: Vec<ServerId> = ids.iter().copied().filter(here).collect();
    only(&own, &ids, &cell.file.file)
}

/// The one server of this machine.
fn only(own: &[ServerId], listed: &[ServerId], file: &Path) -> Result<u8, CliError> {
    let file = file.display();
    match own {
        [one] => Ok(one.0),
        [] => Err(CliError::usage(format!(
            "{file}: none of the servers {} has an address of this machine; correct the list, or name the server: pss_delper.sh ID",
            Ids(listed)
        ))),
        several => Err(CliError::usage(format!(
            "{file}: the servers {} are on this machine; name the one to initialise: pss_delper.sh ID",
            Ids(several)
        ))),
    }
}

/// Whether an address is one of this machine: then it is what the machine itself would call it from.
fn is_own(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Nothing is sent.
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use pss_core::client::ServerError;

    use super::super::links::tests::told;
    use super::*;

    fn manual(line: &str) -> Result<Manual, clap::Error> {
        Manual::from_matches(&Manual::command().try_get_matches_from(line.split(' '))?)
    }

    fn parse(line: &str) -> Result<Name, clap::Error> {
        manual(line).map(|manual| manual.name)
    }

    #[test]
    fn commands_are_sound() {
        Manual::command().debug_assert();
    }

    #[test]
    fn help_says_what_a_name_does() {
        let error = manual("pss_lookup_port.sh --help").unwrap_err();
        let text = error.to_string();
        let start = "Lists the sockets of the servers as netstat does\n\nUsage: pss_lookup_port [OPTIONS]\n";
        assert!(text.starts_with(start), "{text}");
    }

    #[test]
    fn names_with_and_without_directory_and_sh() {
        let called = |name: &str| called_by(OsStr::new(name));
        for name in [
            "PSSShutdown",
            "PFSProbe",
            "PSSAdmin",
            "pss_lookup-server",
            "pss_lookup_port",
            "pss_set_ssh",
            "createISCSIVol",
            "pss_delper",
        ] {
            assert_eq!(called(name).as_deref(), Some(name));
            assert_eq!(called(&format!("{name}.sh")).as_deref(), Some(name));
            assert_eq!(called(&format!("/usr/bin/{name}")).as_deref(), Some(name));
        }
        for name in ["pss", "./pss", "pss-up", "help", "", "PSSSHUTDOWN"] {
            assert_eq!(called(name), None);
        }
    }

    #[test]
    fn commands_of_the_manual() {
        assert!(matches!(
            parse("/usr/bin/PSSShutdown 2 --yes"),
            Ok(Name::Shutdown { id: 2, yes: true })
        ));
        assert!(matches!(
            parse("PFSProbe 1 fd"),
            Ok(Name::Probe {
                id: 1,
                what: Probe::Fd
            })
        ));
        assert!(matches!(
            parse("PSSAdmin 0 paxos 3"),
            Ok(Name::Admin {
                id: 0,
                what: Admin::Paxos,
                page: Some(3)
            })
        ));
        assert!(matches!(
            parse("/x/pss_lookup-server.sh"),
            Ok(Name::LookupServer)
        ));
        assert!(matches!(parse("pss_delper.sh"), Ok(Name::Delper { .. })));
        assert!(matches!(
            parse("pss_set_ssh.sh a b"),
            Ok(Name::SetSsh { .. })
        ));
        for wrong in [
            "PSSShutdown",
            "PSSShutdown x",
            "PSSShutdown 256",
            "PFSProbe 1",
            "PFSProbe 1 files",
            "PSSAdmin 0 paxos 0",
            "PSSAdmin 0 paxos -1",
            "createISCSIVol v",
            "pss_delper.sh 1 2",
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn options_are_those_of_pss() {
        let line = "createISCSIVol --servers x.conf --key k --timeout 2s --json v 1G";
        let manual = manual(line).unwrap();
        assert_eq!(manual.cell.servers, Path::new("x.conf"));
        assert_eq!(manual.cell.timeout.as_secs(), 2);
        assert!(manual.cell.json);
    }

    #[test]
    fn sizes_are_a_number_with_g_or_t() {
        assert_eq!(parse_volume_size("10G"), Ok(10 << 30));
        assert_eq!(parse_volume_size("2t"), Ok(2 << 40));
        for wrong in [
            "", "G", "10", "10M", "1.5G", "10GB", "10GiB", "+1G", "-1G", " 1G", "1G ", "٣G",
        ] {
            assert_eq!(
                parse_volume_size(wrong).unwrap_err(),
                "type a whole number and G or T, such as 10G or 2T",
                "{wrong}"
            );
        }
        assert!(parse_volume_size("0G").unwrap_err().contains("zero"));
        let error = parse_volume_size("99999999999T").unwrap_err();
        assert!(error.contains("too large"), "{error}");
    }

    #[test]
    fn processes_as_ps_shows_them() {
        let process = |server: u8, cpu_ms| {
            Inspection::Process(ProcessInfo {
                server: ServerId(server),
                pid: 9326,
                state: "Sl".into(),
                cpu_ms,
                memory_bytes: 1 << 20,
                program: "/pss/PFSserver".into(),
                path: format!("/pss/PFS-{server}"),
                uptime_s: 9,
            })
        };
        let told = [
            told(0, Ok(process(0, 146_999))),
            told(1, Err(ServerError::Closed)),
            told(2, Ok(process(2, 6_001_000))),
        ];
        assert_eq!(
            processes_text(&told),
            "9326 ? Sl 2:26 /pss/PFSserver 0 /pss/PFS-0\n\
             9326 ? Sl 100:01 /pss/PFSserver 2 /pss/PFS-2\n"
        );
        let value = processes_json(&told);
        assert_eq!(value["schema"], "pss.server.processes/1");
        assert_eq!(value["servers"][0]["process"]["pid"], 9326);
        assert_eq!(value["servers"][1]["answers"], false);
    }

    #[test]
    fn hints_name_what_to_type() {
        for (line, hint_text) in [
            (
                "PSSShutdown 2",
                "Hint: PSSShutdown is now 'pss server shutdown 2'.",
            ),
            (
                "PFSProbe 1 outbound",
                "Hint: PFSProbe is now 'pss server probe 1 outbound'.",
            ),
            (
                "PSSAdmin 1 control",
                "Hint: PSSAdmin is now 'pss server links 1'.",
            ),
            (
                "PSSAdmin 1 paxos",
                "Hint: PSSAdmin is now 'pss paxos log --server 1'.",
            ),
        ] {
            assert_eq!(hint(&parse(line).unwrap()), hint_text);
        }
    }

    #[test]
    fn the_server_of_this_machine() {
        let listed: Vec<ServerId> = [0, 1, 2].map(ServerId).to_vec();
        let file = Path::new("server.conf");
        assert_eq!(only(&listed[1..2], &listed, file).unwrap(), 1);
        for own in [&listed[..0], &listed[..2]] {
            let error = only(own, &listed, file).unwrap_err();
            assert_eq!(error.exit, super::super::Exit::Usage);
            assert!(
                error.message.ends_with("pss_delper.sh ID"),
                "{}",
                error.message
            );
        }
        assert!(is_own(Ipv4Addr::LOCALHOST.into()));
        // RFC 5737: documentation.
        assert!(!is_own(Ipv4Addr::new(192, 0, 2, 1).into()));
    }
}
