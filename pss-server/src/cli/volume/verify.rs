//! `pss volume verify`.

use std::collections::BTreeMap;

use clap::Args;
use pss_core::state::Volume;
use pss_core::types::{BLOCK_BYTES, ChunkIndex, ServerId};
use pss_core::wire::inspect::{SurveyDifference, SurveyInfo, SurveyScope};
use pss_gateway::progress::Progress;
use serde_json::{Value, json};

use super::super::cell::Access;
use super::super::{CellArgs, CliError, Exit, print, print_json, say};
use super::survey;
use crate::render::{Table, grouped, left, printable, right};

pub(in super::super) const VERIFY_EXAMPLES: &str = "Examples:
  pss volume verify vol001
  pss volume verify vol001 --json

Every block of every server is compared with its checksum, and what the servers hold is compared with each other, while the volume is
in use. Damaged blocks are repaired with another server's copy; what differs although it matches its checksums is replaced by what the
majority of the servers holds.

Exit codes: 0 all servers hold the same now, 8 something is left that could not be repaired, 1 not all servers could be compared.";

#[derive(Args, Debug)]
pub(in super::super) struct VerifyArgs {
    /// Name of the volume
    name: String,
}

/// What was found so far.
#[derive(Default)]
struct Found {
    servers: BTreeMap<ServerId, Server>,
    differences: Vec<SurveyDifference>,
}

#[derive(Default)]
struct Server {
    blocks: u64,
    bad: u64,
    bad_left: u64,
    /// Why some of it was not compared.
    missing: Option<String>,
}

pub(in super::super) fn run(args: &CellArgs, verify: &VerifyArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let volume = cell.volume(&verify.name)?.volume;
    let chunk_bytes = u64::from(volume.chunk_bytes);
    let progress = Progress::new("verifying", volume.size_bytes);
    let mut found = Found::default();
    let mut from = ChunkIndex(0);
    loop {
        let scope = SurveyScope::Verify;
        let info = survey::ask(&cell, &volume, None, scope, from, |_| {})?;
        found.add(&info);
        match info.next {
            Some(next) if next > from.0 => {
                from = ChunkIndex(next);
                progress.reach(u64::from(next) * chunk_bytes);
            }
            _ => break,
        }
    }
    progress.reach(volume.size_bytes);
    drop(progress);
    let result = found.verdict(&volume);
    match args.json {
        true => print_json(&found.json(&volume))?,
        false => {
            print(&found.text(&volume))?;
            if result.is_ok() {
                say(format!(
                    "All {} servers hold the same.",
                    found.servers.len()
                ));
            }
        }
    }
    result
}

impl Found {
    fn add(&mut self, info: &SurveyInfo) {
        for told in &info.servers {
            let server = self.servers.entry(told.server).or_default();
            server.blocks += told.blocks;
            server.bad += told.bad;
            server.bad_left += told.bad_left;
        }
        for (id, why) in survey::missing(info) {
            self.servers
                .entry(id)
                .or_default()
                .missing
                .get_or_insert(why);
        }
        self.differences.extend(info.differences.iter().cloned());
    }

    fn verdict(&self, volume: &Volume) -> Result<(), CliError> {
        let name = printable(&volume.name);
        let open = self.differences.iter().filter(|it| !it.repaired).count();
        let bad: u64 = self.servers.values().map(|it| it.bad_left).sum();
        if open > 0 || bad > 0 {
            let message = format!(
                "volume {name}: {} damaged blocks and {} chunks that differ could not be repaired; the servers' logs say more",
                grouped(bad),
                grouped(open as u64)
            );
            return Err(CliError::new(Exit::Differ, message));
        }
        let mut servers = self.servers.iter();
        match servers.find_map(|(id, it)| Some((id, it.missing.as_ref()?))) {
            Some((id, why)) => Err(CliError::new(
                Exit::Failed,
                format!("volume {name}: not everything of server {id} was compared: {why}"),
            )),
            None => Ok(()),
        }
    }

    fn text(&self, volume: &Volume) -> String {
        let mut table = Table::new([
            right("SERVER"),
            right("BLOCKS"),
            right("DAMAGED"),
            right("REPAIRED"),
            left(""),
        ]);
        for (id, server) in &self.servers {
            table.row([
                id.to_string(),
                grouped(server.blocks),
                grouped(server.bad),
                grouped(server.bad - server.bad_left.min(server.bad)),
                server.missing.clone().unwrap_or_default(),
            ]);
        }
        let mut text = table.render();
        for difference in &self.differences {
            text += &line(volume, difference);
        }
        text
    }

    fn json(&self, volume: &Volume) -> Value {
        let verdict = match self.verdict(volume) {
            Ok(()) => "equal",
            Err(error) if error.exit == Exit::Differ => "different",
            Err(_) => "incomplete",
        };
        let servers = self.servers.iter().map(|(id, it)| {
            json!({
                "server": id.0,
                "blocks": it.blocks,
                "bad_blocks": it.bad,
                "repaired_blocks": it.bad - it.bad_left.min(it.bad),
                "missing": it.missing,
            })
        });
        let differences = self.differences.iter().map(|it| {
            json!({
                "chunk": it.chunk,
                "offset_bytes": u64::from(it.chunk) * u64::from(volume.chunk_bytes),
                "servers": it.servers.iter().map(|id| id.0).collect::<Vec<_>>(),
                "replaced_blocks": it.replaced,
                "repaired": it.repaired,
            })
        });
        json!({
            "schema": "pss.volume.verify/1",
            "name": volume.name,
            "size_bytes": volume.size_bytes,
            "block_bytes": BLOCK_BYTES,
            "chunk_bytes": volume.chunk_bytes,
            "verdict": verdict,
            "servers": servers.collect::<Vec<_>>(),
            "differences": differences.collect::<Vec<_>>(),
        })
    }
}

fn line(volume: &Volume, difference: &SurveyDifference) -> String {
    let at = u64::from(difference.chunk) * u64::from(volume.chunk_bytes);
    let chunk = format!("Chunk {} (byte {})", difference.chunk, grouped(at));
    let servers: Vec<String> = difference.servers.iter().map(ToString::to_string).collect();
    let servers = match &servers[..] {
        [] => return format!("{chunk} differs, and no majority agrees: nothing was repaired.\n"),
        [one] => format!("server {one}"),
        many => format!("servers {}", many.join(", ")),
    };
    match (difference.repaired, difference.replaced) {
        (false, _) => format!("{chunk} of {servers} is not what the majority holds.\n"),
        (true, 1) => {
            format!("{chunk} of {servers} was not what the majority holds: 1 block was replaced.\n")
        }
        (true, blocks) => format!(
            "{chunk} of {servers} was not what the majority holds: {} blocks were replaced.\n",
            grouped(blocks)
        ),
    }
}

#[cfg(test)]
mod tests {
    use pss_core::types::{Slot, VolumeId};
    use pss_core::wire::inspect::SurveyServer;

    use super::*;

    fn volume() -> Volume {
        Volume {
            id: VolumeId(1),
            name: "vol001".into(),
            size_bytes: 10 << 30,
            chunk_bytes: 4 << 20,
            uuid: [0xab; 16],
            created: Slot(7),
        }
    }

    fn found() -> Found {
        let server = |id, bad, bad_left| SurveyServer {
            server: ServerId(id),
            state: "done".to_owned(),
            blocks: 1024,
            bad,
            bad_left,
            ..SurveyServer::default()
        };
        let info = SurveyInfo {
            server: ServerId(0),
            state: "done".to_owned(),
            leader: None,
            reason: None,
            slot: Some(Slot(9)),
            size_bytes: 10 << 30,
            next: None,
            servers: vec![server(0, 0, 0), server(1, 3, 0)],
            differences: vec![SurveyDifference {
                chunk: 2,
                servers: vec![ServerId(1)],
                replaced: 5,
                repaired: true,
            }],
        };
        let mut found = Found::default();
        found.add(&info);
        found.add(&info);
        found
    }

    #[test]
    fn what_was_found_as_text() {
        let mut found = found();
        assert!(found.verdict(&volume()).is_ok());
        found.differences.pop();
        assert_eq!(
            found.text(&volume()),
            "\
SERVER  BLOCKS  DAMAGED  REPAIRED
     0   2,048        0         0
     1   2,048        6         6
Chunk 2 (byte 8,388,608) of server 1 was not what the majority holds: 5 blocks were replaced.
"
        );
        found.differences[0].servers.clear();
        found.differences[0].repaired = false;
        let error = found.verdict(&volume()).unwrap_err();
        assert_eq!(error.exit, Exit::Differ);
        assert!(found.text(&volume()).contains("no majority agrees"));
    }

    #[test]
    fn what_was_found_as_json() {
        let value = found().json(&volume());
        assert_eq!(value["verdict"], "equal");
        assert_eq!(value["servers"][1]["repaired_blocks"], 6);
        assert_eq!(value["differences"][0]["offset_bytes"], 8 << 20);
    }

    #[test]
    fn who_is_missing_is_no_success() {
        let mut found = found();
        let server = found.servers.get_mut(&ServerId(1)).unwrap();
        server.missing = Some("it does not answer".to_owned());
        assert_eq!(found.verdict(&volume()).unwrap_err().exit, Exit::Failed);
        assert_eq!(found.json(&volume())["verdict"], "incomplete");
    }
}
