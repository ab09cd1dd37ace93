//! `pss volume digest`.

use clap::Args;
use pss_core::types::{BLOCK_BYTES, ChunkIndex};
use pss_core::wire::inspect::{SurveyInfo, SurveyScope};
use pss_gateway::progress::Progress;
use serde_json::{Value, json};

use super::super::cell::Access;
use super::super::{CellArgs, CliError, Exit, parse_id, print, print_json, say};
use super::survey;
use crate::render::{Table, grouped, left, printable};

pub(in super::super) const DIGEST_EXAMPLES: &str = "Examples:
  pss volume digest vol001                 of the leader's copy
  pss volume digest vol001 --server 2      of the copy of server 2
  pss volume digest vol001 --all           of all copies at one moment: are they equal?

Volumes of the same size with the same content have the same digest, in whatever cell.";

#[derive(Args, Debug)]
pub(in super::super) struct DigestArgs {
    /// Name of the volume
    name: String,
    /// Of the copy of this server [default: the leader]
    #[arg(long, value_name = "ID", value_parser = parse_id, conflicts_with = "all")]
    server: Option<u8>,
    /// Of the copies of all servers at one slot; exit code 8 if they differ
    #[arg(long)]
    all: bool,
}

pub(in super::super) fn run(args: &CellArgs, digest: &DigestArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let given = digest.server.map(|id| cell.listed(id)).transpose()?;
    let status = cell.volume(&digest.name)?;
    let volume = &status.volume;
    let (scope, server) = match (digest.all, given) {
        (true, _) => (SurveyScope::All, None),
        (false, Some(id)) => (SurveyScope::Own, Some(id)),
        (false, None) => (SurveyScope::Own, Some(super::super::paxos::leader(&cell)?)),
    };
    let bytes = status.allocated_bytes;
    let progress = Progress::new("reading", bytes);
    let see = |info: &SurveyInfo| survey::show(&progress, info, 0, bytes);
    let info = survey::ask(&cell, volume, server, scope, ChunkIndex(0), see)?;
    drop(progress);
    match digest.all {
        true => show_all(args, &volume.name, &info),
        false => show_own(args, &volume.name, &info),
    }
}

fn show_own(args: &CellArgs, name: &str, info: &SurveyInfo) -> Result<(), CliError> {
    let server = info.servers.first();
    let (Some(server), Some(digest)) = (server, server.and_then(|it| it.digest.as_ref())) else {
        let bad = server.map_or(0, |it| it.bad);
        return Err(damaged(name, &format!("server {}", info.server), bad));
    };
    let slot = info.slot.unwrap_or_default().0;
    if args.json {
        return print_json(&json!({
            "schema": "pss.volume.digest/1",
            "name": name,
            "size_bytes": info.size_bytes,
            "block_bytes": BLOCK_BYTES,
            "digest": digest,
            "server": server.server.0,
            "slot": slot,
        }));
    }
    print(&format!("{digest}  {}\n", printable(name)))?;
    say(format!(
        "As server {} holds it after slot {}.",
        server.server,
        grouped(slot)
    ));
    Ok(())
}

fn damaged(name: &str, who: &str, blocks: u64) -> CliError {
    let blocks = match blocks {
        1 => "a damaged block".to_owned(),
        blocks => format!("{} damaged blocks", grouped(blocks)),
    };
    CliError::new(
        Exit::Failed,
        format!(
            "volume {}: {who} has {blocks}, which could not be repaired yet; 'pss volume verify' says more",
            printable(name)
        ),
    )
}

fn show_all(args: &CellArgs, name: &str, info: &SurveyInfo) -> Result<(), CliError> {
    let (verdict, result) = verdict(name, info);
    if args.json {
        print_json(&all_json(name, info, verdict))?;
    } else {
        print(&all_text(info))?;
        if result.is_ok() {
            let slot = info.slot.unwrap_or_default().0;
            say(format!(
                "All {} servers hold the same after slot {}.",
                info.servers.len(),
                grouped(slot)
            ));
        }
    }
    result
}

/// In one word, and as an error if it is no good news.
fn verdict(name: &str, info: &SurveyInfo) -> (&'static str, Result<(), CliError>) {
    let name = printable(name);
    let mut digests = info.servers.iter().filter_map(|it| it.digest.as_deref());
    let first = digests.next();
    if digests.any(|it| Some(it) != first) {
        let message = format!(
            "volume {name}: the servers hold different data; 'pss volume verify {name}' finds where, and repairs what it can"
        );
        return ("different", Err(CliError::new(Exit::Differ, message)));
    }
    if let Some(bad) = info.servers.iter().find(|it| it.bad > 0) {
        let who = format!("server {}", bad.server);
        return ("damaged", Err(damaged(&name, &who, bad.bad)));
    }
    if let Some((id, why)) = survey::missing(info).first() {
        let message = format!("volume {name}: server {id} was not compared: {why}");
        return ("incomplete", Err(CliError::new(Exit::Failed, message)));
    }
    ("equal", Ok(()))
}

fn all_text(info: &SurveyInfo) -> String {
    let mut table = Table::new([left("SERVER"), left("DIGEST")]);
    for server in &info.servers {
        let digest = server.digest.clone();
        table.row([
            server.server.to_string(),
            digest.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.render()
}

fn all_json(name: &str, info: &SurveyInfo, verdict: &str) -> Value {
    let servers = info.servers.iter().map(|it| {
        json!({
            "server": it.server.0,
            "state": it.state,
            "reason": it.reason,
            "digest": it.digest,
            "bad_blocks": it.bad,
        })
    });
    json!({
        "schema": "pss.volume.digests/1",
        "name": name,
        "size_bytes": info.size_bytes,
        "block_bytes": BLOCK_BYTES,
        "slot": info.slot.unwrap_or_default().0,
        "verdict": verdict,
        "servers": servers.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use pss_core::types::{ServerId, Slot};
    use pss_core::wire::inspect::SurveyServer;

    use super::*;

    fn info(digests: [Option<&str>; 3]) -> SurveyInfo {
        let servers = (0..).zip(digests).map(|(id, digest)| SurveyServer {
            server: ServerId(id),
            state: if digest.is_some() { "done" } else { "silent" }.to_owned(),
            digest: digest.map(str::to_owned),
            ..SurveyServer::default()
        });
        SurveyInfo {
            server: ServerId(0),
            state: "done".to_owned(),
            leader: None,
            reason: None,
            slot: Some(Slot(9)),
            size_bytes: 4096,
            next: None,
            servers: servers.collect(),
            differences: Vec::new(),
        }
    }

    #[test]
    fn verdicts() {
        let of = |digests| {
            let (word, result) = verdict("v", &info(digests));
            (word, result.err().map(|error| error.exit as u8))
        };
        assert_eq!(of([Some("a"), Some("a"), Some("a")]), ("equal", None));
        assert_eq!(of([Some("a"), Some("b"), None]), ("different", Some(8)));
        assert_eq!(of([Some("a"), Some("a"), None]), ("incomplete", Some(1)));
        let mut one = info([Some("a"), Some("a"), None]);
        one.servers[2].state = "done".to_owned();
        one.servers[2].bad = 2;
        let (word, result) = verdict("v", &one);
        assert_eq!(word, "damaged");
        let message = result.unwrap_err().message;
        assert!(
            message.contains("server 2 has 2 damaged blocks"),
            "{message}"
        );
    }

    #[test]
    fn digests_as_text() {
        assert_eq!(
            all_text(&info([Some("a1"), None, Some("a1")])),
            "SERVER  DIGEST\n0       a1\n1       -\n2       a1\n"
        );
    }
}
