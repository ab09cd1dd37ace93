//! `pss paxos`.

use clap::{Args, Subcommand};
use pss_core::types::{ServerId, Slot};
use pss_core::wire::inspect::{
    CommandInfo, EntryInfo, INSPECT_ENTRIES_MAX, Inspect, Inspection, LogInfo,
};
use serde_json::{Value, json};

use super::cell::{Access, unexpected};
use super::watch::WatchArgs;
use super::{CellArgs, CliError, Exit, json_text, parse_id};
use crate::render::{Table, exact, grouped, left, printable, right};

const LOG_EXAMPLES: &str = "Examples:
  pss paxos log                     the newest entries of the leader's log
  pss paxos log 2                   those before them
  pss paxos log --server 1          as server 1 has them
  pss paxos log --count 5 --watch";

#[derive(Debug, Subcommand)]
pub(super) enum PaxosVerb {
    /// Shows what the servers have agreed on, slot by slot, newest first
    #[command(after_help = LOG_EXAMPLES)]
    Log(LogArgs),
}

#[derive(Args, Debug)]
pub(super) struct LogArgs {
    /// Which page; 1 is the newest
    #[arg(value_name = "PAGE", default_value = "1", value_parser = parse_page)]
    pub(super) page: u64,
    /// Of this server's log [default: the leader's]
    #[arg(long, value_name = "ID", value_parser = parse_id)]
    pub(super) server: Option<u8>,
    /// Entries of a page, at most 256
    #[arg(long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u16).range(1..=i64::from(INSPECT_ENTRIES_MAX)))]
    pub(super) count: u16,
    #[command(flatten)]
    pub(super) watch: WatchArgs,
}

/// Entries of a page, if nothing else is asked for.
pub(super) const COUNT_DEFAULT: u16 = 20;

pub(super) fn run(args: &CellArgs, verb: PaxosVerb) -> Result<(), CliError> {
    match verb {
        PaxosVerb::Log(log) => show(args, &log, &next_command(&log)),
    }
}

/// Shows a page of the log; `next` is the command that shows the next one, without its number.
pub(super) fn show(args: &CellArgs, log: &LogArgs, next: &str) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let given = log.server.map(|id| cell.listed(id)).transpose()?;
    log.watch.run(args, || {
        let id = given.map_or_else(|| leader(&cell), Ok)?;
        let ask = |before| match cell.inspect(id, question(before, log.count))? {
            Inspection::Log(found) => Ok(found),
            _ => Err(unexpected(id)),
        };
        let found = page(log.page, log.count, ask)?;
        Ok(match args.json {
            true => json_text(&log_json(&found, log.page, log.count)),
            false => log_text(&found, log.page, log.count, next),
        })
    })
}

/// The number of a page.
pub(super) fn parse_page(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(page @ 1..) => Ok(page),
        _ => Err("pages are numbers from 1, which is the newest".to_owned()),
    }
}

fn question(before: Slot, count: u16) -> Inspect {
    Inspect::Log { before, count }
}

fn next_command(log: &LogArgs) -> String {
    let server = log.server.map(|id| format!(" --server {id}"));
    let count = (log.count != COUNT_DEFAULT).then(|| format!(" --count {}", log.count));
    format!(
        "pss paxos log{}{}",
        server.unwrap_or_default(),
        count.unwrap_or_default()
    )
}

pub(super) fn leader(cell: &Access) -> Result<ServerId, CliError> {
    let answers = cell.answers()?;
    let health = answers.judge(None);
    health.leader.ok_or_else(|| {
        let remedy = match answers.statuses.is_empty() {
            true => "",
            false => " Look at the log of a server that answers with --server ID.",
        };
        CliError::new(Exit::NoQuorum, health.sentence() + remedy)
    })
}

/// A page of the log. Pages are counted from where the log ended when its newest was looked at: slots have no gaps.
fn page(
    page: u64,
    count: u16,
    ask: impl Fn(Slot) -> Result<LogInfo, CliError>,
) -> Result<LogInfo, CliError> {
    let newest = ask(Slot(0))?;
    if page == 1 {
        return Ok(newest);
    }
    let skipped = (page - 2).saturating_mul(u64::from(count));
    let before = newest
        .next
        .and_then(|next| next.0.checked_sub(skipped))
        .filter(|before| *before > newest.first.0);
    let Some(before) = before else {
        return Err(past_the_end(page, count, &newest));
    };
    let found = ask(Slot(before))?;
    match found.entries.is_empty() {
        // It was cut off meanwhile.
        true => Err(past_the_end(page, count, &found)),
        false => Ok(found),
    }
}

fn past_the_end(page: u64, count: u16, log: &LogInfo) -> CliError {
    let server = log.server;
    let holds = match pages(log, count) {
        0 => "no entries".to_owned(),
        1 => format!("{}: page 1", slots(log)),
        pages => format!("{}: pages 1 to {}", slots(log), grouped(pages)),
    };
    CliError::new(
        Exit::NotFound,
        format!("there is no page {page}: the log of server {server} holds {holds}"),
    )
}

fn slots(log: &LogInfo) -> String {
    format!("slots {} to {}", grouped(log.first.0), grouped(log.last.0))
}

fn pages(log: &LogInfo, count: u16) -> u64 {
    let entries = log
        .last
        .0
        .saturating_add(1)
        .saturating_sub(log.first.0.max(1));
    entries.div_ceil(u64::from(count))
}

fn log_json(log: &LogInfo, page: u64, count: u16) -> Value {
    let pages = pages(log, count);
    let mut document = json!({
        "schema": "pss.paxos.log/1",
        "page": page,
        "pages": pages,
    });
    if let (Value::Object(document), Value::Object(log)) = (&mut document, json!(log)) {
        document.extend(log);
    }
    document
}

fn log_text(log: &LogInfo, page: u64, count: u16, next: &str) -> String {
    let LogInfo { server, role, .. } = log;
    let header = format!(
        "Server {server}, {}, ballot {}.",
        printable(role),
        log.ballot
    );
    if log.entries.is_empty() {
        return format!("{header} Its log is empty.\n");
    }
    let mut table = Table::new([
        right("SLOT"),
        left("BALLOT"),
        left("COMMAND"),
        left("VOLUME"),
        left("RANGE"),
        left("ACCEPTED BY"),
        left("CHOSEN"),
        left("APPLIED"),
    ]);
    for entry in &log.entries {
        add_entry(&mut table, entry);
    }
    let footer = match log.next {
        Some(_) => format!("Older: {next} {}", page + 1),
        None => "There is nothing older in this log.".to_owned(),
    };
    format!(
        "{header} Its log holds {}, chosen up to {}, applied up to {}.\n\n{}\nPage {} of {}. {footer}\n",
        slots(log),
        grouped(log.chosen.0),
        grouped(log.applied.0),
        table.render(),
        grouped(page),
        grouped(pages(log, count).max(page)),
    )
}

/// An entry takes a line for each of its commands; what holds for all of it is on the first.
fn add_entry(table: &mut Table, entry: &EntryInfo) {
    let mut lines: Vec<[String; 3]> = entry.commands.iter().map(command).collect();
    if entry.more > 0 {
        lines.push(note(format!("... {} more", grouped(entry.more))));
    }
    if entry.damaged {
        lines.push(note("damaged record".to_owned()));
    } else if lines.is_empty() {
        lines.push(note("-".to_owned()));
    }
    for (index, [what, volume, range]) in lines.into_iter().enumerate() {
        let once = |text: String| match index {
            0 => text,
            _ => String::new(),
        };
        table.row([
            once(grouped(entry.slot.0)),
            once(entry.ballot.to_string()),
            what,
            volume,
            range,
            once(ids(&entry.accepted_by)),
            once(yes(entry.chosen)),
            once(yes(entry.applied)),
        ]);
    }
}

fn note(text: String) -> [String; 3] {
    [text, String::new(), String::new()]
}

/// What a command does, to which volume, and where.
fn command(command: &CommandInfo) -> [String; 3] {
    let what = match &command.detail {
        Some(detail) => format!("{}: {detail}", command.what),
        None => command.what.clone(),
    };
    let volume = match (&command.volume_name, command.volume) {
        (Some(name), _) => name.clone(),
        // It is gone.
        (None, Some(number)) => format!("#{number}"),
        (None, None) => "-".to_owned(),
    };
    let range = match (command.offset_bytes, command.length_bytes) {
        (Some(offset), Some(length)) => format!("{}+{}", exact(offset), exact(length)),
        (Some(offset), None) => exact(offset),
        (None, _) => "-".to_owned(),
    };
    [what, volume, range]
}

fn ids(servers: &[ServerId]) -> String {
    let ids: Vec<String> = servers.iter().map(ToString::to_string).collect();
    match ids.is_empty() {
        true => "-".to_owned(),
        false => ids.join(" "),
    }
}

fn yes(is_so: bool) -> String {
    match is_so {
        true => "yes".to_owned(),
        false => "no".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use pss_core::types::{Ballot, VolumeId};

    use super::*;

    fn entry(slot: u64) -> EntryInfo {
        EntryInfo {
            slot: Slot(slot),
            ballot: Ballot {
                number: 3,
                server: ServerId(0),
            },
            commands: vec![CommandInfo {
                what: "write".into(),
                session: 9,
                number: 4,
                volume: Some(VolumeId(1)),
                volume_name: Some("vol001".into()),
                offset_bytes: Some(5 << 30),
                length_bytes: Some(4096),
                detail: None,
            }],
            more: 0,
            payload_bytes: 4096,
            accepted_by: vec![ServerId(0), ServerId(1), ServerId(2)],
            chosen: true,
            applied: true,
            damaged: false,
        }
    }

    /// What a server answers whose log holds slots `first` to `last`.
    fn answer(first: u64, last: u64, before: u64, count: u16) -> LogInfo {
        let end = match before {
            0 => last + 1,
            before => before.min(last + 1),
        };
        let start = end.saturating_sub(u64::from(count)).max(first);
        LogInfo {
            server: ServerId(0),
            role: "leader".into(),
            ballot: Ballot {
                number: 3,
                server: ServerId(0),
            },
            first: Slot(first),
            last: Slot(last),
            chosen: Slot(last),
            applied: Slot(last),
            entries: (start..end).rev().map(entry).collect(),
            next: (start > first).then_some(Slot(start)),
        }
    }

    fn shown(first: u64, last: u64, number: u64, count: u16) -> Result<Vec<u64>, CliError> {
        let ask = |before: Slot| Ok(answer(first, last, before.0, count));
        let found = page(number, count, ask)?;
        Ok(found.entries.iter().map(|entry| entry.slot.0).collect())
    }

    #[test]
    fn pages_follow_each_other() {
        assert_eq!(shown(1, 50, 1, 3).unwrap(), [50, 49, 48]);
        assert_eq!(shown(1, 50, 2, 3).unwrap(), [47, 46, 45]);
        assert_eq!(shown(1, 50, 16, 3).unwrap(), [5, 4, 3]);
        assert_eq!(shown(1, 50, 17, 3).unwrap(), [2, 1]);
        assert_eq!(shown(41, 50, 2, 5).unwrap(), [45, 44, 43, 42, 41]);
    }

    #[test]
    fn past_the_end_of_the_log() {
        for (first, page) in [(1, 18), (41, 5), (1, u64::MAX)] {
            let error = shown(first, 50, page, 3).unwrap_err();
            assert_eq!(error.exit, Exit::NotFound);
        }
        assert_eq!(
            shown(41, 50, 3, 5).unwrap_err().message,
            "there is no page 3: the log of server 0 holds slots 41 to 50: pages 1 to 2"
        );
        assert_eq!(
            shown(41, 50, 2, 10).unwrap_err().message,
            "there is no page 2: the log of server 0 holds slots 41 to 50: page 1"
        );
        assert_eq!(
            shown(1, 0, 2, 10).unwrap_err().message,
            "there is no page 2: the log of server 0 holds no entries"
        );
    }

    #[test]
    fn a_page_for_people() {
        let mut log = answer(1, 5000, 0, 3);
        log.applied = Slot(4999);
        log.entries[0].applied = false;
        log.entries[0].accepted_by = Vec::new();
        let resize = CommandInfo {
            what: "resize".into(),
            volume_name: None,
            offset_bytes: None,
            length_bytes: None,
            detail: Some("10G".into()),
            ..log.entries[0].commands[0].clone()
        };
        log.entries[1].commands.push(resize);
        log.entries[1].more = 1200;
        log.entries[2].commands.clear();
        assert_eq!(
            log_text(&log, 1, 3, "pss paxos log --count 3"),
            "Server 0, leader, ballot 3.0. Its log holds slots 1 to 5,000, chosen up to 5,000, applied up to 4,999.\n\
             \n \
             SLOT  BALLOT  COMMAND         VOLUME  RANGE  ACCEPTED BY  CHOSEN  APPLIED\n\
             5,000  3.0     write           vol001  5G+4K  -            yes     no\n\
             4,999  3.0     write           vol001  5G+4K  0 1 2        yes     yes\n       \
             \x20       resize: 10G     #1      -\n       \
             \x20       ... 1,200 more\n\
             4,998  3.0     -                              0 1 2        yes     yes\n\
             \n\
             Page 1 of 1,667. Older: pss paxos log --count 3 2\n"
        );
        let last = answer(1, 2, 0, 3);
        let text = log_text(&last, 1, 3, "pss paxos log");
        assert!(
            text.ends_with("Page 1 of 1. There is nothing older in this log.\n"),
            "{text}"
        );
        let empty = answer(1, 0, 0, 3);
        assert_eq!(
            log_text(&empty, 1, 3, ""),
            "Server 0, leader, ballot 3.0. Its log is empty.\n"
        );
    }

    #[test]
    fn a_page_for_programs() {
        let value = log_json(&answer(1, 50, 0, 3), 1, 3);
        assert_eq!(value["schema"], "pss.paxos.log/1");
        assert_eq!(value["page"], 1);
        assert_eq!(value["pages"], 17);
        assert_eq!(value["server"], 0);
        assert_eq!(value["next"], 48);
        assert_eq!(value["entries"][0]["slot"], 50);
        assert_eq!(value["entries"][0]["ballot"]["number"], 3);
        assert_eq!(value["entries"][0]["commands"][0]["volume"], 1);
    }

    #[test]
    fn the_next_page_is_of_the_same_log() {
        let log = |server, count| LogArgs {
            page: 1,
            server,
            count,
            watch: WatchArgs::default(),
        };
        assert_eq!(next_command(&log(None, 20)), "pss paxos log");
        assert_eq!(
            next_command(&log(Some(2), 5)),
            "pss paxos log --server 2 --count 5"
        );
    }
}
