//! `pss server`.

use clap::Subcommand;
use pss_core::servers::ServerRecord;
use pss_core::types::ServerId;
use serde_json::{Value, json};

use super::cell::Access;
use super::health::{Answers, CopyState, Health, Verdict};
use super::status::look;
use super::{
    CellArgs, CliError, confirm, links, members, parse_id, ports, print, print_json, probe, say,
};
use crate::render::{Table, left, right, span};

#[derive(Debug, Subcommand)]
pub(super) enum ServerVerb {
    /// Lists the servers with addresses, ports and paths, and whether they answer
    List,
    /// Stops a server cleanly; it comes back with 'pssd start'
    Shutdown {
        /// Its id
        #[arg(value_name = "ID", value_parser = parse_id)]
        id: u8,
        /// Do not ask, even if the cell stops working without it
        #[arg(long)]
        yes: bool,
    },
    /// Adds a server to the running cell
    #[command(after_help = members::ADD_EXAMPLES)]
    Add(members::PlaceArgs),
    /// Takes a server out of the running cell
    Remove(members::RemoveArgs),
    /// Gives a server of the running cell another address or data directory
    #[command(after_help = members::REPLACE_EXAMPLES)]
    Replace(members::PlaceArgs),
    /// Shows what a server holds open: clients, what waits for the other servers, files
    #[command(after_help = probe::EXAMPLES)]
    Probe(probe::ProbeArgs),
    /// Shows how the servers are connected with each other
    #[command(after_help = links::EXAMPLES)]
    Links(links::LinksArgs),
    /// Lists the sockets of the servers as netstat does
    #[command(after_help = ports::EXAMPLES)]
    Ports(ports::PortsArgs),
}

pub(super) fn run(args: &CellArgs, verb: ServerVerb) -> Result<(), CliError> {
    match verb {
        ServerVerb::List => list(args),
        ServerVerb::Shutdown { id, yes } => shutdown(args, id, yes),
        ServerVerb::Add(place) => members::add(args, &place),
        ServerVerb::Remove(remove) => members::remove(args, &remove),
        ServerVerb::Replace(place) => members::replace(args, &place),
        ServerVerb::Probe(probe) => probe::run(args, &probe),
        ServerVerb::Links(links) => links::run(args, &links),
        ServerVerb::Ports(ports) => ports::run(args, &ports),
    }
}

fn list(args: &CellArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let answers = cell.answers()?;
    let address = |id| {
        let address = cell.files.servers.address(id);
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    };
    let records = &cell.files.file.records;
    if args.json {
        return print_json(&list_json(records, &answers, address));
    }
    print(&list_text(records, &answers, address))
}

fn kind(id: ServerId) -> &'static str {
    match id.is_core() {
        true => "core",
        false => "learner",
    }
}

fn udp_port(id: ServerId) -> u16 {
    pss_core::servers::UDP_PORT_BASE + u16::from(id.0)
}

fn tcp_port(id: ServerId) -> u16 {
    pss_core::servers::TCP_PORT_BASE + u16::from(id.0)
}

fn list_text(
    records: &[ServerRecord],
    answers: &Answers,
    address: impl Fn(ServerId) -> String,
) -> String {
    let mut table = Table::new([
        left("ID"),
        left("HOST"),
        left("ADDRESS"),
        right("UDP"),
        right("TCP"),
        left("KIND"),
        left("ANSWERS"),
        left("PATH"),
    ]);
    for record in records {
        let answer = match answers.statuses.get(&record.id) {
            Some(status) => format!("up {}, version {}", span(status.uptime_s), status.version),
            None => "no".to_owned(),
        };
        table.row([
            record.id.to_string(),
            record.host.clone(),
            address(record.id),
            udp_port(record.id).to_string(),
            tcp_port(record.id).to_string(),
            kind(record.id).to_owned(),
            answer,
            record.path.display().to_string(),
        ]);
    }
    table.render()
}

fn list_json(
    records: &[ServerRecord],
    answers: &Answers,
    address: impl Fn(ServerId) -> String,
) -> Value {
    let servers: Vec<Value> = records
        .iter()
        .map(|record| {
            let status = answers.statuses.get(&record.id);
            json!({
                "id": record.id.0,
                "host": record.host,
                "address": address(record.id),
                "udp_port": udp_port(record.id),
                "tcp_port": tcp_port(record.id),
                "path": record.path,
                "core": record.id.is_core(),
                "answers": status.is_some(),
                "version": status.map(|status| &status.version),
                "pid": status.map(|status| status.pid),
                "uptime_s": status.map(|status| status.uptime_s),
            })
        })
        .collect();
    json!({ "schema": "pss.server.list/1", "servers": servers })
}

pub(super) fn shutdown(args: &CellArgs, id: u8, yes: bool) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let id = cell.listed(id)?;
    let (answers, health) = look(&cell)?;
    if !answers.statuses.contains_key(&id) {
        return Err(cell.no_answer(id, answers.failures.get(&id)));
    }
    if let Some(question) = objection(&health, id).filter(|_| !yes) {
        confirm(&question)?;
    }
    cell.note(&health, &format!("stop server {id}"));
    cell.shutdown(id)?;
    if args.json {
        return print_json(&json!({ "schema": "pss.server.shutdown/1", "id": id.0 }));
    }
    say(format!("Server {id} is stopping."));
    Ok(())
}

/// What speaks against stopping a server: that the cell works now and would not without it.
fn objection(health: &Health, id: ServerId) -> Option<String> {
    let core = || {
        health
            .copies
            .iter()
            .filter(|(id, _)| health.core.contains(id))
    };
    let majority = core().count() / 2 + 1;
    let left = core()
        .filter(|(other, state)| **other != id && **state == CopyState::Current)
        .count();
    let works = matches!(health.verdict, Verdict::Works { .. });
    (health.core.contains(&id) && works && left < majority).then(|| {
        format!(
            "Without server {id} no majority is left: all volumes stand still until a server comes back. Stop it?"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::health::tests::answers;
    use super::*;

    #[test]
    fn stopping_the_last_that_is_needed_is_asked_about() {
        let objects = |followers: &[(u8, bool, u64)], id| {
            let health = answers(3, followers).judge(None);
            objection(&health, ServerId(id)).is_some()
        };
        assert!(!objects(&[(1, true, 5000), (2, true, 5000)], 0));
        let degraded = [(1, true, 5000), (2, true, 10)];
        assert!(objects(&degraded, 0) && objects(&degraded, 1));
        assert!(!objects(&degraded, 2));
        let broken = [(1, false, 0), (2, false, 0)];
        assert!(!objects(&broken, 0));
    }

    #[test]
    fn servers_as_text_and_json() {
        let answers = answers(2, &[(1, false, 5000)]);
        let text = b"0 paxos00 /pss\n1 paxos01 /pss\n";
        let file = pss_core::servers::ServersFile::parse("s".as_ref(), text).unwrap();
        let text = list_text(&file.records, &answers, |_| "192.0.2.1".into());
        assert!(text.contains("0   paxos00  192.0.2.1  4000  4010  core  up 1 s, version 0  /pss"));
        assert!(text.contains("1   paxos01  192.0.2.1  4001  4011  core  no"));
        let value = list_json(&file.records, &answers, |_| "192.0.2.1".into());
        assert_eq!(value["servers"][1]["tcp_port"], 4011);
        assert_eq!(value["servers"][1]["answers"], false);
    }
}
