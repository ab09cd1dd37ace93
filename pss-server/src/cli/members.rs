//! `pss server add`, `remove` and `replace`: the servers of a running cell change.

use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use pss_core::members::{Member, Members};
use pss_core::servers::Ids;
use pss_core::state::Refusal;
use pss_core::types::ServerId;
use serde_json::json;

use super::cell::Access;
use super::health::{Answers, Health, Verdict};
use super::status::look;
use super::{CellArgs, CliError, Exit, confirm, parse_id, print_json, say};

/// Between two looks at a cell that changes.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Between two lines about a server that is still learning.
const SAY_AGAIN: Duration = Duration::from_secs(10);

pub(super) const ADD_EXAMPLES: &str = "\
First make the new server ready: give it the cell's key and a server.conf that lists all servers and itself, then
  pssd format --id 3 && pssd start --id 3
Then, anywhere:
  pss server add 3 192.0.2.14 /srv/pss
It learns everything before it votes. Then write its line into server.conf on every other machine.

A cell of four core servers survives the loss of one, as one of three does; five survive two.";

pub(super) const REPLACE_EXAMPLES: &str = "\
Server 1 has died, and a machine with another address takes its place:
  pss server replace 1 192.0.2.21 /srv/pss      (anywhere, while the others run)
  pssd format --replace --id 1                  (there, with the new line for it in server.conf)
  pssd start --id 1";

/// One that comes, or moves.
#[derive(Args, Debug)]
pub(super) struct PlaceArgs {
    /// Its id: 0 to 4 for a core server, 5 to 7 for a learner
    #[arg(value_name = "ID", value_parser = parse_id)]
    id: u8,
    /// Its address, or a name that stands for one
    #[arg(value_name = "HOST")]
    host: String,
    /// Its data directory there
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

/// One that goes.
#[derive(Args, Debug)]
pub(super) struct RemoveArgs {
    /// Its id
    #[arg(value_name = "ID", value_parser = parse_id)]
    id: u8,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(super) fn add(args: &CellArgs, place: &PlaceArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let (answers, health) = look(&cell)?;
    let members = current(&cell, &answers, &health)?;
    let new = member(&cell, &members, place)?;
    let id = new.id;
    if let Some(old) = members.get(id).filter(|old| old.core || !id.is_core()) {
        let at = match old.host.is_empty() {
            true => cell.address_text(id),
            false => old.host.clone(),
        };
        let message = format!(
            "server {id} belongs to the cell already, at {at}; 'pss server replace' gives it another place"
        );
        return Err(CliError::new(Exit::Busy, message));
    }
    let votes = members.list.iter().filter(|it| it.core).count();
    if id.is_core() && votes.is_multiple_of(2) {
        // One more than an even number is worth its while.
    } else if id.is_core() {
        say(format!(
            "With {} core servers the cell will survive the loss of {}, as it does with {votes}.",
            votes + 1,
            votes / 2,
        ));
    }
    cell.note(&health, &format!("add server {id} at {}", new.host));
    if members.get(id).is_none() {
        let learner = Member {
            core: false,
            ..new.clone()
        };
        change(args, &cell, |list| put(list, learner.clone()))?;
    }
    if id.is_core() {
        say(format!(
            "Server {id} belongs to the cell and learns; it votes when it has everything. (Ctrl-C leaves it at that; the same command goes on.)"
        ));
        change_when(args, &cell, id, |list| put(list, new.clone()))?;
    }
    let line = format!("{id} {} {}", new.host, new.path);
    done(
        args,
        "add",
        id,
        &format!(
            "Server {id} belongs to the cell{}. Write this line into server.conf on every machine: {line}",
            if id.is_core() { " and votes" } else { "" },
        ),
    )
}

pub(super) fn remove(args: &CellArgs, remove: &RemoveArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let (answers, health) = look(&cell)?;
    let members = current(&cell, &answers, &health)?;
    let id = ServerId(remove.id);
    let Some(member) = members.get(id) else {
        let ids: Vec<ServerId> = members.list.iter().map(|it| it.id).collect();
        let message = format!(
            "server {id} is none of the cell's; these are: {}",
            Ids(&ids)
        );
        return Err(CliError::new(Exit::NotFound, message));
    };
    if member.core {
        check_rest(&members, &health, id)?;
    }
    if !remove.yes {
        let left = members
            .list
            .iter()
            .filter(|it| it.core && it.id != id)
            .count();
        confirm(&format!(
            "Server {id} will hold no copy any more; {left} core {} stay. Remove it?",
            if left == 1 { "server" } else { "servers" }
        ))?;
    }
    cell.note(&health, &format!("remove server {id}"));
    change(args, &cell, |list| list.retain(|it| it.id != id))?;
    done(
        args,
        "remove",
        id,
        &format!(
            "Server {id} is none of the cell's any more. Stop it, and take its line out of server.conf on every machine."
        ),
    )
}

pub(super) fn replace(args: &CellArgs, place: &PlaceArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let (answers, health) = look(&cell)?;
    let members = current(&cell, &answers, &health)?;
    let id = ServerId(place.id);
    let Some(old) = members.get(id) else {
        let message = format!("server {id} is none of the cell's; 'pss server add' adds one");
        return Err(CliError::new(Exit::NotFound, message));
    };
    let new = Member {
        core: old.core,
        ..member(&cell, &members, place)?
    };
    if answers.statuses.contains_key(&id) {
        let message = format!(
            "server {id} runs at {}: stop it first ('pss server shutdown {id}'), for its new place would begin without what it holds",
            cell.address_text(id)
        );
        return Err(CliError::new(Exit::Busy, message));
    }
    cell.note(&health, &format!("server {id} moves to {}", new.host));
    let line = format!("{id} {} {}", new.host, new.path);
    change(args, &cell, |list| put(list, new.clone()))?;
    done(
        args,
        "replace",
        id,
        &format!(
            "The others look for server {id} at {} now. Write this line into server.conf on every machine: {line}\n\
             If its data directory does not come along: pssd format --replace --id {id}. Then: pssd start --id {id}",
            new.host
        ),
    )
}

fn done(args: &CellArgs, what: &str, id: ServerId, text: &str) -> Result<(), CliError> {
    if args.json {
        return print_json(&json!({ "schema": format!("pss.server.{what}/1"), "id": id.0 }));
    }
    say(text);
    Ok(())
}

/// The servers as the cell lists them now; a cell that never changed lists those of server.conf.
fn current(cell: &Access, answers: &Answers, health: &Health) -> Result<Members, CliError> {
    if !matches!(health.verdict, Verdict::Works { .. }) {
        return Err(CliError::new(Exit::NoQuorum, health.sentence()));
    }
    if let Some(members) = answers.members() {
        return Ok(members.clone());
    }
    Ok(of_configuration(cell))
}

/// The servers of server.conf.
pub(super) fn of_configuration(cell: &Access) -> Members {
    let member = |id: ServerId| Member {
        id,
        core: id.is_core(),
        host: String::new(),
        path: String::new(),
    };
    let list = cell.files.servers.ids().into_iter().map(member);
    Members {
        list: list.collect(),
        ..Members::default()
    }
}

/// Has a server vote as soon as it has everything.
pub(super) fn promote(args: &CellArgs, cell: &Access, id: ServerId) -> Result<(), CliError> {
    change_when(args, cell, id, |list| {
        let server = list.iter_mut().find(|it| it.id == id);
        server.into_iter().for_each(|it| it.core = true);
    })
}

/// A server at its new place, if it may be there.
fn member(cell: &Access, members: &Members, place: &PlaceArgs) -> Result<Member, CliError> {
    let id = ServerId(place.id);
    let Some(path) = place.path.to_str().filter(|path| path.starts_with('/')) else {
        let path = place.path.display();
        return Err(CliError::usage(format!(
            "the path '{path}' does not start with '/'; give the data directory as an absolute path"
        )));
    };
    let address = resolve(&place.host)?;
    if cell.files.key.is_none() && !address.is_loopback() {
        return Err(CliError::usage(format!(
            "{address} can be reached by other machines, but the cell has no key; make one with 'pss key new'"
        )));
    }
    if address.is_unspecified() || address.is_multicast() {
        return Err(CliError::usage(format!("{address} is no server's address")));
    }
    if members.list.iter().all(|it| it.id != id) && members.list.len() >= 8 {
        return Err(CliError::usage("a cell has at most eight servers"));
    }
    Ok(Member {
        id,
        core: id.is_core(),
        host: address.to_string(),
        path: path.to_owned(),
    })
}

fn resolve(host: &str) -> Result<IpAddr, CliError> {
    let unknown = |reason: String| {
        CliError::usage(format!(
            "'{host}' cannot be resolved: {reason}; give the server's address instead"
        ))
    };
    let found = (host, 0u16)
        .to_socket_addrs()
        .map_err(|error| unknown(error.to_string()))?;
    let addresses: Vec<IpAddr> = found.map(|it| it.ip()).collect();
    let address = addresses.first().copied();
    let address = address.ok_or_else(|| unknown("it has no address".into()))?;
    if host.parse::<IpAddr>().is_err() {
        say(format!("{host} is {address}."));
    }
    Ok(address)
}

/// Whether those that stay are a majority without a core server.
fn check_rest(members: &Members, health: &Health, id: ServerId) -> Result<(), CliError> {
    let core = members.list.iter().filter(|it| it.core && it.id != id);
    let left: Vec<ServerId> = core.map(|it| it.id).collect();
    if left.is_empty() {
        return Err(CliError::usage(format!(
            "server {id} is the only core server; a cell needs one"
        )));
    }
    let (current, majority) = (health.current(&left), left.len() / 2 + 1);
    if current.len() < majority {
        let message = format!(
            "without server {id} the cell would need {majority} of servers {}, and only {} of them hold everything: \
             'pss status' says what the others lack",
            Ids(&left),
            current.len(),
        );
        return Err(CliError::new(Exit::NoQuorum, message));
    }
    Ok(())
}

fn put(list: &mut Vec<Member>, member: Member) {
    list.retain(|it| it.id != member.id);
    list.push(member);
    list.sort_by_key(|it| it.id);
}

/// Changes the servers, and waits until the change holds.
fn change(args: &CellArgs, cell: &Access, edit: impl Fn(&mut Vec<Member>)) -> Result<(), CliError> {
    let until = Instant::now() + args.timeout;
    propose(cell, edit, |_| Instant::now() < until)
}

/// The same, as soon as a server has everything.
fn change_when(
    args: &CellArgs,
    cell: &Access,
    id: ServerId,
    edit: impl Fn(&mut Vec<Member>),
) -> Result<(), CliError> {
    let until = Instant::now() + args.timeout;
    let mut said = Instant::now();
    propose(cell, edit, |refusal| {
        if refusal != Some(Refusal::ServerBehind) {
            return refusal.is_some() || Instant::now() < until;
        }
        if said.elapsed() >= SAY_AGAIN {
            said = Instant::now();
            let how = match look(cell) {
                Ok((answers, health)) => answers.progress(&health, id),
                Err(error) => error.to_string(),
            };
            say(format!("Server {id} {how}."));
        }
        true
    })
}

/// Proposes changes until one holds; `goes_on` says whether to try again after a refusal.
fn propose(
    cell: &Access,
    edit: impl Fn(&mut Vec<Member>),
    mut goes_on: impl FnMut(Option<Refusal>) -> bool,
) -> Result<(), CliError> {
    loop {
        let (answers, health) = look(cell)?;
        let mut members = match current(cell, &answers, &health) {
            Ok(members) => members,
            Err(_) if goes_on(None) => {
                std::thread::sleep(LOOK_AGAIN);
                continue;
            }
            Err(error) => return Err(error),
        };
        let before = members.list.clone();
        edit(&mut members.list);
        if members.list == before {
            return Ok(());
        }
        members.version += 1;
        match cell.set_servers(members)? {
            // It holds once it is seen.
            None => {}
            Some(
                refusal @ (Refusal::ServersUnderWay
                | Refusal::ServersOutdated
                | Refusal::ServerLeads
                | Refusal::ServerBehind),
            ) if goes_on(Some(refusal)) => {}
            Some(refusal) => return Err(CliError::new(Exit::Failed, refusal)),
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
