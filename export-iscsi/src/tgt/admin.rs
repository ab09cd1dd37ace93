//! `tgtadm`: one request a call, `--mode` saying about what and `--op` what to do.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum};

use super::{Server, called_as, finish, layout, parse, print, usage};
use crate::control::SOCKET;
use crate::control::client::ClientError;
use crate::control::edit::{Edit, Password};
use crate::control::protocol::{Failure, Kind, Request};
use crate::control::report::{Accounts, Target, Targets};

/// Time that the initiator of a connection to be deleted has to log out.
const LEAVE_SECONDS: u16 = 1;

/// tgt's tgtadm before pss-iscsi: shows and changes what it exports, until it reads its configuration
/// again
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Only iscsi
    #[arg(short = 'L', long, default_value = "iscsi")]
    lld: String,
    /// What about
    #[arg(short, long, value_enum, ignore_case = true)]
    mode: Mode,
    /// What to do
    #[arg(short, long, value_enum)]
    op: Op,
    /// Number of a target
    #[arg(short, long)]
    tid: Option<u32>,
    /// iSCSI name of a new target
    #[arg(short = 'T', long)]
    targetname: Option<String>,
    /// LUN of a disk, from 1 on
    #[arg(short, long)]
    lun: Option<u16>,
    /// Volume of the cell
    #[arg(short, long, value_name = "VOLUME")]
    backing_store: Option<String>,
    /// Only pss
    #[arg(short = 'E', long)]
    bstype: Option<String>,
    /// Ignored, with a warning
    #[arg(short = 'S', long)]
    bsopts: Option<String>,
    /// Ignored, with a warning
    #[arg(short = 'f', long)]
    bsoflags: Option<String>,
    /// Logical block of a new disk: 512 or 4096
    #[arg(short = 'y', long)]
    blocksize: Option<String>,
    /// Only disk
    #[arg(short = 'Y', long)]
    device_type: Option<String>,
    /// Parameter of a target: state, alias, or its name in RFC 7143
    #[arg(short, long)]
    name: Option<String>,
    /// Its value
    #[arg(short, long)]
    value: Option<String>,
    /// Parameters of a disk or target, as NAME=VALUE,NAME=VALUE
    #[arg(short = 'P', long)]
    params: Option<String>,
    /// ALL, an address, or a network
    #[arg(short = 'I', long)]
    initiator_address: Option<String>,
    /// ALL, or a name, which may end in *
    #[arg(short = 'Q', long)]
    initiator_name: Option<String>,
    /// Name of an account
    #[arg(short, long)]
    user: Option<String>,
    /// Its secret; 12 to 16 bytes if Windows is to log in
    #[arg(short, long)]
    password: Option<String>,
    /// The account is the target's own, with which it proves itself
    #[arg(short = 'O', long)]
    outgoing: bool,
    /// Number of a session, as the target's "I_T nexus" shows it
    #[arg(short, long)]
    sid: Option<u16>,
    /// Number of a connection
    #[arg(short, long)]
    cid: Option<u16>,
    /// Even if sessions use it
    #[arg(short = 'F', long)]
    force: bool,
    /// Only 0: pss-iscsi is told by --control
    #[arg(short = 'C', long, default_value_t = 0)]
    control_port: u16,
    /// Control socket of pss-iscsi
    #[arg(long, value_name = "PATH", env = "PSS_ISCSI_CONTROL", default_value = SOCKET)]
    control: PathBuf,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mode {
    #[value(alias = "system")]
    Sys,
    #[value(alias = "tgt")]
    Target,
    #[value(aliases = ["lun", "lu"])]
    Logicalunit,
    // As a manual spells it.
    #[value(alias = "accunt")]
    Account,
    #[value(alias = "connection")]
    Conn,
    #[value(alias = "sess")]
    Session,
    Portal,
    Lld,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Op {
    New,
    Delete,
    Bind,
    Unbind,
    Show,
    Update,
    Start,
    Stop,
}

/// The program.
pub fn main() -> ExitCode {
    match parse::<Args>() {
        Ok(args) => {
            let program = called_as("pss-tgtadm");
            finish(&program, run(&program, &args))
        }
        Err(code) => code,
    }
}

fn run(program: &str, args: &Args) -> Result<(), ClientError> {
    if args.lld != "iscsi" {
        return Err(usage(format!("lld {}: only iscsi is served", args.lld)));
    }
    if args.control_port != 0 {
        return Err(usage(
            "control ports are tgtd's; --control PATH says which pss-iscsi is meant",
        ));
    }
    let server = Server {
        control: &args.control,
    };
    if args.op == Op::Show {
        return show(&server, args);
    }
    let requests = match (args.mode, args.op) {
        (Mode::Sys, Op::Update) => system_state(args, &server.targets()?)?,
        _ => requests(args)?,
    };
    for request in requests {
        server.change(program, &request)?;
    }
    Ok(())
}

fn show(server: &Server<'_>, args: &Args) -> Result<(), ClientError> {
    let text = match (args.mode, args.tid) {
        (Mode::Target, None) => layout::targets(&server.targets()?, &server.sessions()?),
        (Mode::Target, Some(tid)) => {
            let targets = server.targets()?.targets;
            let target = targets.iter().find(|it| it.tid == tid);
            layout::parameters(target.ok_or_else(|| no_target(tid))?)
        }
        (Mode::Conn, Some(tid)) => {
            let targets = server.targets()?.targets;
            let target = targets.iter().find(|it| it.tid == tid);
            layout::connections(target.ok_or_else(|| no_target(tid))?, &server.sessions()?)
        }
        (Mode::Conn, None) => return Err(usage("--tid is missing")),
        (Mode::Account, _) => layout::accounts(&server.ask::<Accounts>(&Request::Accounts)?),
        (Mode::Sys, _) => layout::system(&server.targets()?),
        (Mode::Logicalunit | Mode::Session | Mode::Portal | Mode::Lld, _) => {
            return Err(unsupported(args));
        }
    };
    print(&text);
    Ok(())
}

fn no_target(tid: u32) -> ClientError {
    Failure::new(
        Kind::NotFound,
        format!("there is no target with number {tid}"),
    )
    .into()
}

fn unsupported(args: &Args) -> ClientError {
    let name =
        |value: Option<PossibleValue>| value.map_or(String::new(), |it| it.get_name().to_owned());
    usage(format!(
        "--mode {} has no --op {} here",
        name(args.mode.to_possible_value()),
        name(args.op.to_possible_value())
    ))
}

fn wanted<T: Clone>(value: &Option<T>, flag: &str) -> Result<T, ClientError> {
    value
        .clone()
        .ok_or_else(|| usage(format!("{flag} is missing")))
}

/// What a call asks for.
fn requests(args: &Args) -> Result<Vec<Request>, ClientError> {
    // The server puts in the name that belongs to the number.
    let target = String::new;
    let tid = || wanted(&args.tid, "--tid");
    let edit = |tid: Option<u32>, change: Edit| {
        vec![Request::Edit {
            tid,
            force: args.force,
            change,
        }]
    };
    Ok(match (args.mode, args.op) {
        (Mode::Target, Op::New) => {
            let target = wanted(&args.targetname, "--targetname")?;
            edit(Some(tid()?), Edit::NewTarget { target })
        }
        (Mode::Target, Op::Delete) => edit(Some(tid()?), Edit::DeleteTarget { target: target() }),
        (Mode::Target, Op::Update) => {
            let tid = tid()?;
            let changes = target_parameters(args)?;
            let change = |(name, value)| Request::Edit {
                tid: Some(tid),
                force: args.force,
                change: Edit::UpdateTarget {
                    target: target(),
                    name,
                    value,
                },
            };
            changes.into_iter().map(change).collect()
        }
        (Mode::Target, Op::Bind | Op::Unbind) => {
            let tid = tid()?;
            let rules = rules(args)?;
            let change = |change| Request::Edit {
                tid: Some(tid),
                force: args.force,
                change,
            };
            rules.into_iter().map(change).collect()
        }
        (Mode::Logicalunit, Op::New) => {
            let change = Edit::NewLun {
                target: target(),
                lun: wanted(&args.lun, "--lun")?,
                volume: wanted(&args.backing_store, "--backing-store")?,
                options: lun_options(args)?,
            };
            edit(Some(tid()?), change)
        }
        (Mode::Logicalunit, Op::Delete) => {
            let lun = wanted(&args.lun, "--lun")?;
            let target = target();
            edit(Some(tid()?), Edit::DeleteLun { target, lun })
        }
        (Mode::Logicalunit, Op::Update) => {
            let change = Edit::UpdateLun {
                target: target(),
                lun: wanted(&args.lun, "--lun")?,
                options: lun_options(args)?,
            };
            edit(Some(tid()?), change)
        }
        (Mode::Account, Op::New) => {
            let change = Edit::NewAccount {
                user: wanted(&args.user, "--user")?,
                password: Password(wanted(&args.password, "--password")?),
            };
            edit(None, change)
        }
        (Mode::Account, Op::Delete) => {
            let user = wanted(&args.user, "--user")?;
            edit(None, Edit::DeleteAccount { user })
        }
        (Mode::Account, Op::Bind) => {
            // Without a target it is for discovery, as with tgt.
            let change = Edit::BindAccount {
                target: args.tid.map(|_| target()),
                user: wanted(&args.user, "--user")?,
                outgoing: args.outgoing,
            };
            edit(args.tid, change)
        }
        (Mode::Account, Op::Unbind) => {
            let change = Edit::UnbindAccount {
                target: args.tid.map(|_| target()),
                user: wanted(&args.user, "--user")?,
                outgoing: args.outgoing,
            };
            edit(args.tid, change)
        }
        (Mode::Conn | Mode::Session, Op::Delete) => vec![Request::Kick {
            session: wanted(&args.sid, "--sid")?,
            within_s: Some(LEAVE_SECONDS),
        }],
        (Mode::Sys, Op::Delete) => {
            let text = "pss-iscsi ends with its service: systemctl stop pss-iscsi, or SIGTERM";
            return Err(usage(text));
        }
        _ => return Err(unsupported(args)),
    })
}

/// What tgt's units do around a start: no new sessions anywhere until all is set up.
fn system_state(args: &Args, targets: &Targets) -> Result<Vec<Request>, ClientError> {
    let name = wanted(&args.name, "--name")?;
    let value = wanted(&args.value, "--value")?;
    if !name.eq_ignore_ascii_case("state") {
        return Err(usage(format!("--name {name}: only State can be updated")));
    }
    let change = |target: &Target| Request::Edit {
        tid: None,
        force: args.force,
        change: Edit::UpdateTarget {
            target: target.name.clone(),
            name: "state".to_owned(),
            value: value.clone(),
        },
    };
    Ok(targets.targets.iter().map(change).collect())
}

fn rules(args: &Args) -> Result<Vec<Edit>, ClientError> {
    let target = String::new;
    let binds = args.op == Op::Bind;
    let address = args.initiator_address.clone().map(|address| match binds {
        true => Edit::BindAddress {
            target: target(),
            address,
        },
        false => Edit::UnbindAddress {
            target: target(),
            address,
        },
    });
    let name = args.initiator_name.clone().map(|initiator| match binds {
        true => Edit::BindName {
            target: target(),
            initiator,
        },
        false => Edit::UnbindName {
            target: target(),
            initiator,
        },
    });
    let rules: Vec<Edit> = address.into_iter().chain(name).collect();
    match rules.is_empty() {
        true => Err(usage("--initiator-address or --initiator-name is missing")),
        false => Ok(rules),
    }
}

/// `NAME=VALUE,NAME=VALUE`.
fn pairs(text: &str) -> Result<Vec<(String, String)>, ClientError> {
    let pair = |it: &str| match it.split_once('=') {
        Some((name, value)) => Ok((name.trim().to_owned(), value.to_owned())),
        None => Err(usage(format!("--params {it}: it is NAME=VALUE"))),
    };
    text.split(',').map(pair).collect()
}

fn target_parameters(args: &Args) -> Result<Vec<(String, String)>, ClientError> {
    match (&args.name, &args.value, &args.params) {
        (Some(name), Some(value), None) => Ok(vec![(name.clone(), value.clone())]),
        (None, None, Some(params)) => pairs(params),
        _ => Err(usage("--name and --value, or --params, are missing")),
    }
}

fn lun_options(args: &Args) -> Result<Vec<(String, String)>, ClientError> {
    let flags = [
        ("bs-type", &args.bstype),
        ("bsopts", &args.bsopts),
        ("bsoflags", &args.bsoflags),
        ("block-size", &args.blocksize),
        ("device-type", &args.device_type),
    ];
    let said = flags.into_iter().filter_map(|(key, value)| {
        let value = value.clone()?;
        Some((key.to_owned(), value))
    });
    let mut options: Vec<_> = said.collect();
    if let Some(params) = &args.params {
        options.extend(pairs(params)?);
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn asked(line: &str) -> Result<String, String> {
        let words = ["tgtadm", "--lld", "iscsi"].into_iter();
        let args = Args::try_parse_from(words.chain(line.split_whitespace()))
            .map_err(|error| error.to_string())?;
        let requests = requests(&args).map_err(|error| error.to_string())?;
        let lines = requests.iter().map(|it| serde_json::to_string(it).unwrap());
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn the_command_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn calls_and_what_they_ask_for() {
        let edit = |tid: &str, change: &str| {
            format!(r#"{{"verb":"edit","tid":{tid},"force":false,"change":{{{change}}}}}"#)
        };
        for (call, change) in [
            (
                "--op new --mode target --tid 3 -T iqn.x:y",
                r#""edit":"new-target","target":"iqn.x:y""#,
            ),
            (
                "-o new -m logicalunit -t 3 -l 1 -b vol001 -E pss",
                r#""edit":"new-lun","target":"","lun":1,"volume":"vol001","options":[["bs-type","pss"]]"#,
            ),
            (
                "--op update --mode logicalunit --tid 3 --lun 1 --params vendor_id=A,readonly=1",
                r#""edit":"update-lun","target":"","lun":1,"options":[["vendor_id","A"],["readonly","1"]]"#,
            ),
            (
                "--op bind --mode account --tid 3 --user u --outgoing",
                r#""edit":"bind-account","target":"","user":"u","outgoing":true"#,
            ),
            (
                "--op unbind --mode target --tid 3 -I ALL",
                r#""edit":"unbind-address","target":"","address":"ALL""#,
            ),
            (
                "--op update --mode target --tid 3 -n state -v offline",
                r#""edit":"update-target","target":"","name":"state","value":"offline""#,
            ),
        ] {
            assert_eq!(asked(call), Ok(edit("3", change)), "{call}");
        }
        let account = asked("--op new --mode accunt --user u --password p").unwrap();
        let change = r#""edit":"new-account","user":"u","password":"p""#;
        assert_eq!(account, edit("null", change));
        let discovery = asked("--op bind --mode account --user u").unwrap();
        assert!(discovery.contains(r#""target":null"#), "{discovery}");
        let both = asked("--op bind --mode target --tid 1 -I ::1 -Q iqn.x").unwrap();
        assert_eq!(both.lines().count(), 2);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (call, part) in [
            ("--mode target --op new --tid 1", "--targetname is missing"),
            ("--mode target --op delete", "--tid is missing"),
            (
                "--mode lun --op new --tid 1 --lun 1",
                "--backing-store is missing",
            ),
            ("--mode target --op bind --tid 1", "--initiator-address or"),
            (
                "--mode portal --op new",
                "--mode portal has no --op new here",
            ),
            ("--mode target --op update --tid 1 -n state", "--value"),
            (
                "--mode lun --op update --tid 1 --lun 1 --params x",
                "NAME=VALUE",
            ),
            ("--mode nonsense --op show", "nonsense"),
        ] {
            let error = asked(call).unwrap_err();
            assert!(error.contains(part), "{call}: {error}");
        }
    }
}
