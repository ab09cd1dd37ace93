//! `pss server probe`.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use pss_core::size::Size;
use pss_core::types::ServerId;
use pss_core::wire::inspect::{
    ClientInfo, FilesInfo, Inspect, Inspection, LinkState, OpenChunk, OpenVolume, OutboundInfo,
};
use serde_json::{Value, json};

use super::cell::{Access, unexpected};
use super::watch::WatchArgs;
use super::{CellArgs, CliError, json_text, parse_id};
use crate::render::{Table, grouped, left, right, span, time_text};

pub(super) const EXAMPLES: &str = "Examples:
  pss server probe 1 accept             who is connected to server 1?
  pss server probe 1 outbound           what waits for the other servers?
  pss server probe 1 fd --all           which files has it open?
  pss server probe 1 accept --watch";

/// Chunk files that text shows without `--all`.
const CHUNKS_SHOWN: usize = 50;

#[derive(Args, Debug)]
pub(super) struct ProbeArgs {
    /// Id of the server
    #[arg(value_name = "ID", value_parser = parse_id)]
    pub(super) id: u8,
    /// What to look at
    #[arg(value_enum, value_name = "WHAT")]
    pub(super) what: Probe,
    /// Show all open chunk files, not only the first 50
    #[arg(long)]
    pub(super) all: bool,
    #[command(flatten)]
    pub(super) watch: WatchArgs,
}

/// What to look at.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(super) enum Probe {
    /// Connected clients
    Accept,
    /// What waits to be sent to the other servers
    Outbound,
    /// Open files: volumes, log segments, chunk files, descriptors
    Fd,
}

impl Probe {
    fn question(self) -> Inspect {
        match self {
            Probe::Accept => Inspect::Clients,
            Probe::Outbound => Inspect::Outbound,
            Probe::Fd => Inspect::Files,
        }
    }
}

pub(super) fn run(args: &CellArgs, probe: &ProbeArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let id = cell.listed(probe.id)?;
    probe.watch.run(args, || {
        let found = cell.inspect(id, probe.what.question())?;
        let shown = match args.json {
            true => probe_json(id, &found).map(|value| json_text(&value)),
            false => probe_text(id, &found, now_ms(), probe.all),
        };
        shown.ok_or_else(|| unexpected(id))
    })
}

fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970.unwrap_or_default().as_millis() as u64
}

/// None if it is not what a probe asks for.
fn probe_json(id: ServerId, found: &Inspection) -> Option<Value> {
    let (what, name, value) = match found {
        Inspection::Clients(clients) => ("accept", "clients", json!(clients)),
        Inspection::Outbound(outbound) => ("outbound", "outbound", json!(outbound)),
        Inspection::Files(files) => ("fd", "files", json!(files)),
        Inspection::Process(_)
        | Inspection::Links(_)
        | Inspection::Log(_)
        | Inspection::Sockets(_)
        | Inspection::Survey(_) => return None,
    };
    Some(json!({ "schema": "pss.server.probe/1", "server": id, "what": what, name: value }))
}

/// None if it is not what a probe asks for.
fn probe_text(id: ServerId, found: &Inspection, now_ms: u64, all: bool) -> Option<String> {
    match found {
        Inspection::Clients(clients) => Some(clients_text(id, clients, now_ms)),
        Inspection::Outbound(outbound) => Some(outbound_text(id, outbound)),
        Inspection::Files(files) => Some(files_text(files, all)),
        Inspection::Process(_)
        | Inspection::Links(_)
        | Inspection::Log(_)
        | Inspection::Sockets(_)
        | Inspection::Survey(_) => None,
    }
}

fn clients_text(id: ServerId, clients: &[ClientInfo], now_ms: u64) -> String {
    if clients.is_empty() {
        return format!("No client is connected to server {id}.\n");
    }
    let mut table = Table::new([
        left("CLIENT"),
        left("ADDRESS"),
        left("SINCE"),
        right("IDLE"),
        right("REQUESTS"),
        right("IN FLIGHT"),
        right("RECEIVED"),
        right("SENT"),
        right("UNSENT"),
    ]);
    for client in clients {
        table.row([
            client.name.clone(),
            client.address.clone(),
            time_text(now_ms.saturating_sub(client.connected_ms)),
            span_text(client.idle_ms),
            grouped(client.requests),
            grouped(client.in_flight),
            Size(client.received_bytes).to_string(),
            Size(client.sent_bytes).to_string(),
            Size(client.unsent_bytes).to_string(),
        ]);
    }
    table.render()
}

/// A time span, or a dash if there is none.
pub(super) fn span_text(milliseconds: Option<u64>) -> String {
    match milliseconds {
        Some(milliseconds) => span(milliseconds / 1000),
        None => "-".to_owned(),
    }
}

/// The word for the state of a connection.
pub(super) fn link_word(link: &LinkState) -> String {
    match link {
        LinkState::Up => "up".to_owned(),
        LinkState::Calling => "calling".to_owned(),
        LinkState::Down => "down".to_owned(),
        LinkState::Newer(word) => format!("unknown ({word})"),
    }
}

fn outbound_text(id: ServerId, outbound: &[OutboundInfo]) -> String {
    if outbound.is_empty() {
        return format!("Server {id} is the only one of its cell.\n");
    }
    let mut table = Table::new([
        left("TO"),
        left("ADDRESS"),
        left("LINK"),
        right("WAITING"),
        right("LIMIT"),
        right("DROPPED"),
        right("SENT"),
        right("UNACKNOWLEDGED"),
    ]);
    for queue in outbound {
        table.row([
            queue.server.to_string(),
            queue.address.clone(),
            link_word(&queue.link),
            Size(queue.waiting_bytes).to_string(),
            Size(queue.limit_bytes).to_string(),
            grouped(queue.dropped),
            Size(queue.sent_bytes).to_string(),
            queue.unacknowledged.map_or("-".to_owned(), grouped),
        ]);
    }
    table.render()
}

fn files_text(files: &FilesInfo, all: bool) -> String {
    let parts = [
        volumes_text(&files.volumes),
        segments_text(files),
        chunks_text(files, all),
        format!(
            "{} of at most {} descriptors are open.\n",
            grouped(files.descriptors),
            grouped(files.descriptors_max)
        ),
    ];
    parts.join("\n")
}

fn volumes_text(volumes: &[OpenVolume]) -> String {
    if volumes.is_empty() {
        return "No volume is attached.\n".to_owned();
    }
    let mut table = Table::new([left("VOLUME"), left("ATTACHED BY")]);
    for volume in volumes {
        table.row([volume.name.clone(), volume.attached_by.join(", ")]);
    }
    table.render()
}

fn segments_text(files: &FilesInfo) -> String {
    let mut table = Table::new([left("LOG SEGMENT"), right("FIRST SLOT"), right("SIZE")]);
    for segment in &files.segments {
        table.row([
            segment.path.clone(),
            grouped(segment.first.0),
            Size(segment.bytes).to_string(),
        ]);
    }
    table.render()
}

fn chunks_text(files: &FilesInfo, all: bool) -> String {
    let count = format!(
        "{} of at most {} chunk files are open",
        grouped(files.chunks_open),
        grouped(files.chunks_max)
    );
    if files.chunks.is_empty() {
        return format!("{count}.\n");
    }
    let shown = match all {
        true => &files.chunks[..],
        false => &files.chunks[..files.chunks.len().min(CHUNKS_SHOWN)],
    };
    let mut text = format!("{count}:\n");
    for OpenChunk { path, dirty } in shown {
        let dirty = match dirty {
            true => "  (newer in the log)",
            false => "",
        };
        text.push_str(&format!("  {}{dirty}\n", crate::render::printable(path)));
    }
    let more = files.chunks_open.saturating_sub(shown.len() as u64);
    if more > 0 {
        let remedy = match shown.len() < files.chunks.len() {
            true => "; --all shows them",
            // The server itself leaves them out.
            false => "",
        };
        text.push_str(&format!("  ... {} more{remedy}\n", grouped(more)));
    }
    text
}

#[cfg(test)]
mod tests {
    use pss_core::types::Slot;
    use pss_core::wire::inspect::SegmentInfo;

    use super::*;

    fn clients() -> Inspection {
        Inspection::Clients(vec![
            ClientInfo {
                name: "pss-iscsi@gw1".into(),
                address: "192.0.2.9:51000".into(),
                connected_ms: 60_000,
                idle_ms: Some(3_500),
                requests: 1204,
                in_flight: 2,
                received_bytes: 3 << 29,
                sent_bytes: 4096,
                unsent_bytes: 0,
            },
            ClientInfo {
                name: "pss\u{1b}[2J".into(),
                address: "[2001:db8::1]:51001".into(),
                connected_ms: u64::MAX,
                idle_ms: None,
                requests: 0,
                in_flight: 0,
                received_bytes: 100,
                sent_bytes: 0,
                unsent_bytes: 0,
            },
        ])
    }

    #[test]
    fn clients_for_people() {
        let text = probe_text(ServerId(1), &clients(), 1_764_506_096_000, false).unwrap();
        assert_eq!(
            text,
            "CLIENT         ADDRESS              SINCE                 IDLE  REQUESTS  IN FLIGHT  RECEIVED  SENT  UNSENT\n\
             pss-iscsi@gw1  192.0.2.9:51000      2025-11-30 12:33:56Z   3 s     1,204          2      1.5G    4K       0\n\
             pss\\u{1b}[2J   [2001:db8::1]:51001  unknown                  -         0          0       100     0       0\n"
        );
        let nobody = Inspection::Clients(Vec::new());
        assert_eq!(
            probe_text(ServerId(1), &nobody, 0, false).unwrap(),
            "No client is connected to server 1.\n"
        );
    }

    #[test]
    fn clients_for_programs() {
        let value = probe_json(ServerId(1), &clients()).unwrap();
        assert_eq!(value["schema"], "pss.server.probe/1");
        assert_eq!(value["server"], 1);
        assert_eq!(value["what"], "accept");
        assert_eq!(value["clients"][0]["requests"], 1204);
        assert_eq!(value["clients"][1]["idle_ms"], Value::Null);
    }

    #[test]
    fn queues_for_people() {
        let queue = |server, link, unacknowledged| OutboundInfo {
            server: ServerId(server),
            address: format!("192.0.2.{server}:401{server}"),
            link,
            waiting_bytes: 1536,
            limit_bytes: 64 << 20,
            dropped: 1000,
            sent_bytes: 10 << 30,
            unacknowledged,
        };
        let found = Inspection::Outbound(vec![
            queue(0, LinkState::Up, Some(12)),
            queue(2, LinkState::Calling, None),
        ]);
        assert_eq!(
            probe_text(ServerId(1), &found, 0, false).unwrap(),
            "TO  ADDRESS         LINK     WAITING  LIMIT  DROPPED  SENT  UNACKNOWLEDGED\n\
             0   192.0.2.0:4010  up          1.5K    64M    1,000   10G              12\n\
             2   192.0.2.2:4012  calling     1.5K    64M    1,000   10G               -\n"
        );
        let value = probe_json(ServerId(1), &found).unwrap();
        assert_eq!(value["outbound"][1]["server"], 2);
        assert_eq!(value["outbound"][1]["link"], "calling");
    }

    fn files(chunks: usize) -> FilesInfo {
        FilesInfo {
            volumes: vec![OpenVolume {
                name: "vol001".into(),
                attached_by: vec!["pss-iscsi@gw1".into(), "pss-nbd@gw2".into()],
            }],
            chunks: (0..chunks)
                .map(|index| OpenChunk {
                    path: format!("data/vol001/00/00/{index:02}"),
                    dirty: index == 1,
                })
                .collect(),
            chunks_open: chunks as u64,
            chunks_max: 1024,
            segments: vec![SegmentInfo {
                path: "log/0000000000000001".into(),
                first: Slot(1),
                bytes: 128 << 20,
            }],
            descriptors: 30,
            descriptors_max: 1_048_576,
        }
    }

    #[test]
    fn files_for_people() {
        assert_eq!(
            files_text(&files(2), false),
            "VOLUME  ATTACHED BY\n\
             vol001  pss-iscsi@gw1, pss-nbd@gw2\n\
             \n\
             LOG SEGMENT           FIRST SLOT  SIZE\n\
             log/0000000000000001           1  128M\n\
             \n\
             2 of at most 1,024 chunk files are open:\n  \
             data/vol001/00/00/00\n  \
             data/vol001/00/00/01  (newer in the log)\n\
             \n\
             30 of at most 1,048,576 descriptors are open.\n"
        );
        let nothing = FilesInfo::default();
        assert!(files_text(&nothing, false).starts_with("No volume is attached.\n"));
    }

    #[test]
    fn long_lists_of_chunks_are_cut() {
        let mut many = files(53);
        let text = chunks_text(&many, false);
        assert_eq!(text.lines().count(), 52);
        assert!(
            text.ends_with("/49\n  ... 3 more; --all shows them\n"),
            "{text}"
        );
        assert!(chunks_text(&many, true).ends_with("/52\n"));
        many.chunks_open = 5053;
        let text = chunks_text(&many, true);
        assert!(text.ends_with("/52\n  ... 5,000 more\n"), "{text}");
    }

    #[test]
    fn answers_to_other_questions_are_no_probe() {
        let links = Inspection::Links(Vec::new());
        assert_eq!(probe_text(ServerId(1), &links, 0, false), None);
        assert_eq!(probe_json(ServerId(1), &links), None);
    }
}
