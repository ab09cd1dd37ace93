//! `pss status`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use pss_core::size::Size;
use pss_core::types::ServerId;
use serde_json::{Value, json};

use super::cell::Access;
use super::health::{Answers, CopyState, Health, Lag, Verdict};
use super::watch::WatchArgs;
use super::{CellArgs, CliError, Exit, json_text, print};
use crate::node::space::is_nearly_full;
use crate::render::{Table, grouped, left, right, span};

/// A server that is behind by what was written in this time is not behind.
const SETTLE: Duration = Duration::from_millis(300);

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    watch: WatchArgs,
}

pub(super) fn run(args: &CellArgs, status: &StatusArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    if status.watch.watch {
        return status.watch.run(args, || {
            let (answers, health) = look(&cell)?;
            Ok(shown(args, &cell, &answers, &health))
        });
    }
    let (answers, health) = look(&cell)?;
    print(&shown(args, &cell, &answers, &health))?;
    outcome(&health, args.json)
}

/// Asks all servers; twice if one seems behind, because in a busy cell every answer is from another
/// moment.
pub(super) fn look(cell: &Access) -> Result<(Answers, Health), CliError> {
    let answers = cell.answers()?;
    let health = answers.judge(None);
    let behind = |state: &CopyState| matches!(state, CopyState::Behind(_));
    if !health.copies.values().any(behind) {
        return Ok((answers, health));
    }
    let mark = answers.mark();
    std::thread::sleep(SETTLE);
    let later = cell.answers()?;
    let settled = later.judge(mark);
    // Really behind: then by how much it is now.
    let health = match settled.copies.values().any(behind) {
        true => later.judge(None),
        false => settled,
    };
    Ok((later, health))
}

fn shown(args: &CellArgs, cell: &Access, answers: &Answers, health: &Health) -> String {
    let address = |id: ServerId| cell.address_text(id);
    match args.json {
        true => json_text(&status_json(answers, health, address)),
        false => status_text(answers, health, address),
    }
}

/// Without a majority the command fails, but only after it has shown what it knows.
fn outcome(health: &Health, json: bool) -> Result<(), CliError> {
    match health.verdict {
        Verdict::Works { .. } => Ok(()),
        Verdict::NoLeader if json => Err(CliError::new(Exit::NoQuorum, "no leader")),
        Verdict::NoMajority if json => Err(CliError::new(Exit::NoQuorum, "no majority")),
        Verdict::NoLeader | Verdict::NoMajority => Err(CliError::new(
            Exit::NoQuorum,
            "the cell cannot serve its volumes now",
        )),
    }
}

fn status_text(answers: &Answers, health: &Health, address: impl Fn(ServerId) -> String) -> String {
    let mut table = Table::new([
        left("ID"),
        left("ADDRESS"),
        left("ROLE"),
        left("STATE"),
        right("APPLIED"),
        right("BEHIND"),
        right("LAG"),
        right("FREE"),
    ]);
    for (id, state) in &health.copies {
        let own = answers.statuses.get(id);
        let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let lag = answers.lag(*id, *state);
        table.row([
            id.to_string(),
            address(*id),
            known(own.map(|own| own.role.clone())),
            state.word(),
            known(own.map(|own| grouped(own.applied))),
            known(lag.slots.map(grouped)),
            known(lag_text(lag)),
            known(own.map(|own| format!("{} of {}", Size(own.free_bytes), Size(own.total_bytes)))),
        ]);
    }
    let mut text = format!("{}\n\n{}", health.sentence(), table.render());
    let failures = answers
        .failures
        .iter()
        .map(|(id, error)| format!("Server {id} at {}: {error}", address(*id)));
    let bad_disks = answers
        .statuses
        .iter()
        .filter(|(_, own)| own.bad_blocks > 0)
        .map(|(id, own)| {
            let blocks = grouped(own.bad_blocks);
            let repaired = grouped(own.repaired_blocks);
            let mut note = format!(
                "Server {id} has found {blocks} bad blocks since it was started, and repaired {repaired}: look at its disk."
            );
            if own.lost_blocks > 0 {
                note.push_str(" Some were bad on every server that answered; its log names them.");
            }
            note
        });
    let scrubs = scrub_notes(answers, wall_clock_ms());
    let full_disks = answers.statuses.iter().filter_map(|(id, own)| {
        // An older server does not tell.
        let is_full =
            own.full || own.space_left > 0 && is_nearly_full(own.space_left, own.total_bytes);
        let left = match own.space_left {
            0 => "nothing".to_owned(),
            left => format!("only {}", Size(left)),
        };
        let total = Size(own.total_bytes);
        let how = match own.full {
            true => "full",
            false => "nearly full",
        };
        is_full.then(|| {
            format!("Server {id} has {left} of {total} left for volumes: its disk is {how}.")
        })
    });
    let twice = answers.statuses.iter().flat_map(|(id, own)| {
        own.claimed_twice.iter().map(move |twice| {
            format!("Two processes say to server {id} that they are server {twice}, so neither counts: stop one of them.")
        })
    });
    let notes = failures.chain(twice).chain(bad_disks).chain(scrubs);
    let notes = notes.chain(full_disks);
    let notes: Vec<String> = notes.chain(answers.stale_lines()).collect();
    if !notes.is_empty() {
        text.push_str(&format!("\n{}\n", notes.join("\n")));
    }
    text
}

/// What the scrub in the background has found, and how far it is.
fn scrub_notes(answers: &Answers, now_ms: u64) -> Vec<String> {
    let mut notes = Vec::new();
    for (id, own) in &answers.statuses {
        let Some(scrub) = own.scrub else { continue };
        if scrub.mended_blocks > 0 {
            notes.push(format!(
                "Server {id} held {} blocks that matched their checksums and were not what the majority holds, and has replaced them \
                 since it was started: look at its disk.",
                grouped(scrub.mended_blocks)
            ));
        }
        if scrub.undecided > 0 {
            notes.push(format!(
                "Server {id} has found {} chunks of which no majority of the servers holds the same: its log names them.",
                grouped(scrub.undecided)
            ));
        }
    }
    let scrub = answers.leader().and_then(|leader| leader.scrub);
    let scrub = scrub.filter(|it| it.period_s.is_some());
    if let Some(scrub) = scrub.filter(|it| it.done_permille > 0 || it.position.completed_ms > 0) {
        let last = match scrub.position.completed_ms {
            0 => "for the first time".to_owned(),
            at => format!(
                "again, last done {} ago",
                span(now_ms.saturating_sub(at) / 1000)
            ),
        };
        notes.push(format!(
            "All blocks are being verified {last}: {} % done{}.",
            scrub.done_permille / 10,
            match scrub.paused {
                true => ", paused while a server lags or copies",
                false => "",
            }
        ));
    }
    notes
}

/// Milliseconds since the beginning of 1970, UTC.
fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |it| it.as_millis() as u64)
}

/// Time and bytes, as far as they are known.
fn lag_text(lag: Lag) -> Option<String> {
    let time = lag.ms.map(|ms| match ms {
        0 => "0".to_owned(),
        1..1000 => format!("{ms} ms"),
        _ => span(ms / 1000),
    });
    let bytes = lag.bytes.filter(|bytes| *bytes > 0);
    let bytes = bytes.map(|bytes| Size(bytes).to_string());
    let parts: Vec<String> = time.into_iter().chain(bytes).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn status_json(answers: &Answers, health: &Health, address: impl Fn(ServerId) -> String) -> Value {
    let (works, may_fail) = match health.verdict {
        Verdict::Works { may_fail } => (true, may_fail),
        Verdict::NoLeader | Verdict::NoMajority => (false, 0),
    };
    let servers: Vec<Value> = health
        .copies
        .iter()
        .map(|(id, state)| {
            let lag = answers.lag(*id, *state);
            json!({
                "id": id.0,
                "address": address(*id),
                "core": health.core.contains(id),
                "answers": answers.statuses.contains_key(id),
                "current": *state == CopyState::Current,
                "state": state.word(),
                "behind_slots": lag.slots,
                "behind_ms": lag.ms,
                "behind_bytes": lag.bytes,
                "left_s": match state {
                    CopyState::Behind(behind) => behind.left_s,
                    CopyState::Copying(_, left_s) | CopyState::Rejoining(_, left_s) => *left_s,
                    _ => None,
                },
                "failure": answers.failures.get(id).map(ToString::to_string),
                "status": answers.statuses.get(id),
            })
        })
        .collect();
    json!({
        "schema": "pss.status/1",
        "works": works,
        "all_current": health.copies.values().all(|state| *state == CopyState::Current),
        "servers_that_may_fail": may_fail,
        "leader": health.leader,
        "summary": health.sentence(),
        "servers": servers,
    })
}

#[cfg(test)]
mod tests {
    use pss_core::engine::{ScrubPosition, ScrubStatus};

    use super::super::health::tests::answers;
    use super::*;

    #[test]
    fn status_for_people() {
        let mut answers = answers(3, &[(1, true, 5000), (2, false, 3)]);
        let leader = answers.statuses.get_mut(&ServerId(0)).unwrap();
        (leader.peers[1].behind_ms, leader.peers[1].behind_bytes) = (Some(14_200), Some(5 << 20));
        let text = status_text(&answers, &answers.judge(None), |id| {
            format!("127.0.0.1:401{id}")
        });
        assert_eq!(
            text,
            "Server 2 has not been heard from for 14 s: start it. Until then no further server may fail.\n\n\
             ID  ADDRESS         ROLE      STATE      APPLIED  BEHIND       LAG      FREE\n\
             0   127.0.0.1:4010  leader    current      5,000       0         0  1G of 2G\n\
             1   127.0.0.1:4011  follower  current      5,000       0         0  1G of 2G\n\
             2   127.0.0.1:4012  -         no answer        -   4,997  14 s, 5M         -\n"
        );
    }

    #[test]
    fn disks_that_get_full() {
        let mut answers = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        let mut leave = |id, left: u64| {
            let own = answers.statuses.get_mut(&ServerId(id)).unwrap();
            (own.space_left, own.full) = (left, left == 0);
        };
        leave(0, 100 << 20);
        leave(2, 0);
        let text = status_text(&answers, &answers.judge(None), |_| String::new());
        let notes: Vec<&str> = text.lines().skip(6).collect();
        let told = [
            "",
            "Server 0 has only 100M of 2G left for volumes: its disk is nearly full.",
            "Server 2 has nothing of 2G left for volumes: its disk is full.",
        ];
        assert_eq!(notes, told, "{text}");
        assert!(
            text.starts_with("All 3 copies current. Any 1 server may fail."),
            "{text}"
        );
    }

    #[test]
    fn what_the_scrub_found() {
        let mut answers = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        assert_eq!(scrub_notes(&answers, 0), Vec::<String>::new());
        let mut set = |id, period_s, completed_ms, (mended_blocks, undecided)| {
            let own = answers.statuses.get_mut(&ServerId(id)).unwrap();
            let position = ScrubPosition {
                completed_ms,
                ..ScrubPosition::default()
            };
            own.scrub = Some(ScrubStatus {
                period_s,
                position,
                done_permille: 123,
                mended_blocks,
                undecided,
                ..ScrubStatus::default()
            });
        };
        set(0, Some(9), 1_000, (0, 3));
        set(1, Some(9), 0, (2000, 0));
        assert_eq!(
            scrub_notes(&answers, 31_000),
            [
                "Server 0 has found 3 chunks of which no majority of the servers holds the same: its log names them.",
                "Server 1 held 2,000 blocks that matched their checksums and were not what the majority holds, and has replaced \
                 them since it was started: look at its disk.",
                "All blocks are being verified again, last done 30 s ago: 12 % done.",
            ]
        );
        let mut answers =
            super::super::health::tests::answers(3, &[(1, true, 5000), (2, true, 5000)]);
        let own = answers.statuses.get_mut(&ServerId(0)).unwrap();
        own.scrub = Some(ScrubStatus {
            done_permille: 123,
            ..ScrubStatus::default()
        });
        assert_eq!(scrub_notes(&answers, 0), Vec::<String>::new(), "it is off");
    }

    #[test]
    fn status_for_programs() {
        let answers = answers(3, &[(1, true, 4000), (2, true, 5000)]);
        let value = status_json(&answers, &answers.judge(None), |_| String::new());
        assert_eq!(value["schema"], "pss.status/1");
        assert_eq!(value["works"], true);
        assert_eq!(value["all_current"], false);
        assert_eq!(value["servers_that_may_fail"], 0);
        assert_eq!(value["leader"], 0);
        assert_eq!(value["servers"][1]["behind_slots"], 1000);
        assert_eq!(value["servers"][2]["behind_ms"], 0);
        assert_eq!(value["servers"][1]["behind_ms"], Value::Null);
        assert_eq!(value["servers"][1]["status"]["applied"], 4000);
    }

    #[test]
    fn without_a_majority_it_fails_with_6() {
        let answers = answers(3, &[(1, false, 0), (2, false, 0)]);
        let error = outcome(&answers.judge(None), false).unwrap_err();
        assert_eq!(error.exit, Exit::NoQuorum);
    }
}
