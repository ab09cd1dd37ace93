//! `tgt-admin`: all targets at a time.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Parser};

use super::{Server, called_as, dump, finish, layout, parse, print, usage};
use crate::control::SOCKET;
use crate::control::client::ClientError;
use crate::control::edit::Edit;
use crate::control::protocol::{Named, Request};
use crate::control::report::{Accounts, Target};

/// tgt's tgt-admin before pss-iscsi: shows targets, and makes them what the configuration says
#[derive(Debug, Parser)]
#[command(version, group(ArgGroup::new("action").required(true)))]
struct Args {
    /// Shows all targets
    #[arg(short, long, group = "action")]
    show: bool,
    /// Prints what is exported as a targets.conf, without passwords
    #[arg(long, group = "action")]
    dump: bool,
    /// Reads the configuration of pss-iscsi again
    #[arg(short, long, group = "action")]
    execute: bool,
    /// Makes a target, or ALL, what the configuration says now
    #[arg(long, group = "action", value_name = "ALL|tid=N|NAME")]
    update: Option<String>,
    /// Deletes a target, or ALL, until the configuration is read again
    #[arg(short, long, group = "action", value_name = "ALL|tid=N|NAME")]
    delete: Option<String>,
    /// Lets a target, or ALL, take no new sessions
    #[arg(long, group = "action", value_name = "ALL|tid=N|NAME")]
    offline: Option<String>,
    /// Lets a target, or ALL, take sessions again
    #[arg(long, group = "action", value_name = "ALL|tid=N|NAME")]
    ready: Option<String>,
    /// With -e or --update: the file that is meant, which is the one that pss-iscsi was started with
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
    /// Even if sessions use it
    #[arg(short, long)]
    force: bool,
    /// Says what would be done
    #[arg(short, long)]
    pretend: bool,
    /// Says what is done
    #[arg(short, long)]
    verbose: bool,
    /// Control socket of pss-iscsi
    #[arg(long, value_name = "PATH", env = "PSS_ISCSI_CONTROL", default_value = SOCKET)]
    control: PathBuf,
}

/// The program.
pub fn main() -> ExitCode {
    match parse::<Args>() {
        Ok(args) => {
            let program = called_as("pss-tgt-admin");
            finish(&program, run(&program, &args))
        }
        Err(code) => code,
    }
}

fn run(program: &str, args: &Args) -> Result<(), ClientError> {
    let server = Server {
        control: &args.control,
    };
    if args.show {
        print(&layout::targets(&server.targets()?, &server.sessions()?));
        return Ok(());
    }
    if args.dump {
        let accounts: Accounts = server.ask(&Request::Accounts)?;
        print(&dump::dump(&server.targets()?, &accounts));
        return Ok(());
    }
    for request in requests(args, &server.targets()?.targets)? {
        if args.verbose || args.pretend {
            print(&format!("{request:?}\n"));
        }
        if !args.pretend {
            server.change(program, &request)?;
        }
    }
    Ok(())
}

fn requests(args: &Args, targets: &[Target]) -> Result<Vec<Request>, ClientError> {
    let state = |which: &str, value: &str| {
        let update = |target: String| Edit::UpdateTarget {
            target,
            name: "state".to_owned(),
            value: value.to_owned(),
        };
        edits(which, targets, args.force, update)
    };
    if let Some(which) = &args.delete {
        return edits(which, targets, args.force, |target| Edit::DeleteTarget {
            target,
        });
    }
    let file = args.conf.as_deref().map(absolute).transpose()?;
    match (&args.offline, &args.ready, &args.update) {
        (Some(which), _, _) => state(which, "offline"),
        (_, Some(which), _) => state(which, "ready"),
        (_, _, Some(which)) if which != "ALL" => {
            let target = match which.strip_prefix("tid=") {
                Some(_) => Named::Name(chosen(which, targets)?.remove(0)),
                // It may be new in the configuration.
                None => Named::Name(which.clone()),
            };
            let target = Some(target);
            Ok(vec![Request::Reload { target, file }])
        }
        _ => Ok(vec![Request::Reload { target: None, file }]),
    }
}

fn absolute(file: &Path) -> Result<PathBuf, ClientError> {
    file.canonicalize()
        .map_err(|error| usage(format!("--conf {}: {error}", file.display())))
}

fn edits(
    which: &str,
    targets: &[Target],
    force: bool,
    edit: impl Fn(String) -> Edit,
) -> Result<Vec<Request>, ClientError> {
    let request = |target| Request::Edit {
        tid: None,
        force,
        change: edit(target),
    };
    let chosen = chosen(which, targets)?;
    Ok(chosen.into_iter().map(request).collect())
}

/// Names of the targets that are meant.
fn chosen(which: &str, targets: &[Target]) -> Result<Vec<String>, ClientError> {
    let is_meant = |it: &&Target| match which.strip_prefix("tid=") {
        _ if which == "ALL" => true,
        Some(tid) => it.tid.to_string() == tid,
        None => it.name.eq_ignore_ascii_case(which),
    };
    let chosen = targets.iter().filter(is_meant);
    let chosen: Vec<String> = chosen.map(|it| it.name.clone()).collect();
    match chosen.is_empty() && which != "ALL" {
        true => Err(usage(format!("there is no target {which}"))),
        false => Ok(chosen),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_is_sound() {
        Args::command().debug_assert();
        let wrong = Args::try_parse_from(["tgt-admin"]).unwrap_err();
        assert!(wrong.to_string().contains("--show"), "{wrong}");
    }

    #[test]
    fn one_target_or_all() {
        let asked = |line: &str| {
            let args = Args::try_parse_from(["tgt-admin"].into_iter().chain(line.split(' ')));
            requests(&args.unwrap(), &[])
        };
        let all = Request::Reload {
            target: None,
            file: None,
        };
        assert_eq!(asked("-e").unwrap(), std::slice::from_ref(&all));
        assert_eq!(asked("--update ALL").unwrap(), [all]);
        let one = Request::Reload {
            target: Some(Named::Name("iqn.x".into())),
            file: None,
        };
        assert_eq!(asked("--update iqn.x").unwrap(), [one]);
        assert!(asked("-e --conf /nowhere/targets.conf").is_err());
        assert_eq!(asked("--delete ALL").unwrap(), []);
        assert!(asked("--delete tid=4").is_err());
    }
}
