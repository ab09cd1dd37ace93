//! `pss events`.

use std::time::Duration;

use clap::Args;
use pss_core::wire::events::ListedEvent;
use pss_gateway::text::printable_json;
use serde_json::{Value, json};

use super::cell::Access;
use super::{CellArgs, CliError, Exit, print, print_json, print_on, say};
use crate::render::{printable, time_iso, time_text};

const SCHEMA: &str = "pss.events/1";
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(super) struct EventsArgs {
    /// Show new events as they happen, until interrupted
    #[arg(long)]
    follow: bool,
    /// Begin with so many of the newest events; the cell keeps 4096
    #[arg(long, value_name = "N", default_value = "100", value_parser = parse_count)]
    last: u64,
}

pub(super) fn run(args: &CellArgs, events: &EventsArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    // There is nothing behind the last number.
    let list = cell.events(u64::MAX)?;
    let mut shown = list.last.saturating_sub(events.last);
    shown = shown.max(list.first.saturating_sub(1));
    if !events.follow {
        let all = new_events(&cell, &mut shown, true)?;
        if args.json {
            let events: Vec<Value> = all.iter().map(event_json).collect();
            return print_json(&json!({ "schema": SCHEMA, "first": list.first, "events": events }));
        }
        return print(&all.iter().map(line).collect::<String>());
    }
    let mut failed = false;
    loop {
        match new_events(&cell, &mut shown, false) {
            Ok(new) => {
                if std::mem::take(&mut failed) {
                    say("The cell answers again.");
                }
                let text = match args.json {
                    true => new.iter().map(line_json).collect(),
                    false => new.iter().map(line).collect::<String>(),
                };
                if !print_on(&text)? {
                    return Ok(());
                }
            }
            // It comes back, and then nothing is missing.
            Err(error) if matches!(error.exit, Exit::NoQuorum | Exit::Timeout) => {
                if !std::mem::replace(&mut failed, true) {
                    say(format!("{error} Waiting for it."));
                }
            }
            Err(error) => return Err(error),
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

fn parse_count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "write a number".to_owned())
}

/// The events behind the one of this number, which becomes that of the last: the `whole` list, or as many as there is
/// an answer for.
fn new_events(cell: &Access, shown: &mut u64, whole: bool) -> Result<Vec<ListedEvent>, CliError> {
    let mut all = Vec::new();
    loop {
        let list = match cell.events(*shown) {
            Ok(list) => list,
            // What came before it is shown first.
            Err(_) if !all.is_empty() && !whole => return Ok(all),
            Err(error) => return Err(error),
        };
        let lost = list.first.saturating_sub(1).saturating_sub(*shown);
        if lost > 0 {
            say(format!("{lost} events are not kept any more."));
        }
        let Some(last) = list.events.last() else {
            return Ok(all);
        };
        *shown = last.number();
        all.extend(list.events);
        if *shown >= list.last {
            return Ok(all);
        }
    }
}

/// An event as a line for people. Names come from other people: nothing in them moves the cursor.
fn line(event: &ListedEvent) -> String {
    let known = |name: &str| match name {
        "" => "?".to_owned(),
        name => printable(name),
    };
    let by = event.by();
    let address = by.address.map(|it| format!("@{}", it.ip()));
    format!(
        "{}  {}{}  {}  {}\n",
        time_text(event.time_ms()),
        known(&by.user),
        address.unwrap_or_default(),
        known(&by.name),
        printable(&event.to_string())
    )
}

fn line_json(event: &ListedEvent) -> String {
    let mut value = event_json(event);
    value["schema"] = SCHEMA.into();
    printable_json(&format!("{value}\n"))
}

fn event_json(event: &ListedEvent) -> Value {
    let (by, refused) = (event.by(), event.refused());
    json!({
        "number": event.number(),
        "slot": event.slot().0,
        "time": time_iso(event.time_ms()),
        "time_ms": event.time_ms(),
        "user": by.user,
        "address": by.address,
        "client": by.name,
        "action": event.action(),
        "done": refused.is_none(),
        "refused": refused,
        "text": event.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use pss_core::entry::Origin;
    use pss_core::state::{AdminAction, AdminEvent, Refusal};
    use pss_core::types::{Slot, VolumeId};

    use super::*;

    fn event(user: &str, address: &str, refused: Option<Refusal>) -> AdminEvent {
        AdminEvent {
            number: 3,
            slot: Slot(9),
            time_ms: 1_796_040_001_500,
            by: Origin {
                name: "pss@host".into(),
                user: user.into(),
                address: address.parse().ok(),
            },
            action: AdminAction::CreateVolume {
                volume: Some(VolumeId(1)),
                name: "vol001".into(),
                size_bytes: 10 << 30,
                chunk_bytes: 4 << 20,
            },
            refused,
        }
    }

    #[test]
    fn events_as_text() {
        assert_eq!(
            line(&event("alice", "10.0.0.5:4711", None).into()),
            "2026-11-30 12:00:01Z  alice@10.0.0.5  pss@host  created volume vol001 (10G)\n"
        );
        let refused = Some(Refusal::VolumeExists);
        assert_eq!(
            line(&event("", "[2001:db8::1]:1", refused).into()),
            "2026-11-30 12:00:01Z  ?@2001:db8::1  pss@host  could not create volume vol001 (10G): a volume of that name exists\n"
        );
        let mut evil = event("\u{1b}[2J", "", None);
        evil.by.name = String::new();
        evil.action = AdminAction::Note {
            text: "a\nb".into(),
        };
        evil.time_ms = 0;
        assert_eq!(line(&evil.into()), "unknown  \\u{1b}[2J  ?  a\\nb\n");
    }

    #[test]
    fn events_as_json() {
        let refused = Some(Refusal::VolumeExists);
        let text = line_json(&event("alice", "10.0.0.5:4711", refused).into());
        assert_eq!(text.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["schema"], "pss.events/1");
        assert_eq!(value["number"], 3);
        assert_eq!(value["time"], "2026-11-30T12:00:01.500Z");
        assert_eq!(value["address"], "10.0.0.5:4711");
        assert_eq!(value["action"]["kind"], "create_volume");
        assert_eq!(value["action"]["size_bytes"], 10_u64 << 30);
        assert_eq!(value["done"], false);
        assert_eq!(value["refused"], "a volume of that name exists");

        let evil = event("\u{7f}\u{9b}2J\u{1b}é", "", None);
        let text = line_json(&evil.clone().into());
        let controls = text.trim_end().chars().filter(|c| c.is_control());
        assert_eq!(controls.count(), 0, "{text:?}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["user"], evil.by.user);
    }
}
