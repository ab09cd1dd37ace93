//! `pss recover`: a majority is lost for good, and a person decides to go on without it.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use pss_core::client::ServerError;
use pss_core::members::{Member, Members};
use pss_core::servers::Ids;
use pss_core::state::Refusal;
use pss_core::types::{Ballot, ServerId};
use pss_core::wire::client::{ReplyError, ServerStatus};
use serde_json::json;

use super::cell::Access;
use super::health::Answers;
use super::status::look;
use super::{CellArgs, CliError, Exit, members, parse_id, print, print_json, say};
use crate::render::{Table, grouped, left, right, span};

/// What a person types who means it.
const WORD: &str = "give up";
/// How long the server that goes on may take to lead.
const LEADS_WITHIN: Duration = Duration::from_secs(20);

pub(super) const EXAMPLES: &str = "\
Look first: it shows which servers are known, what each last reported, and what may be missing.
  pss recover --look
Then, if the others are lost for good:
  pss recover

Servers that come back later do not count any more. To take one in again: pssd format --replace --id N,
'pss server add N HOST PATH', pssd start --id N.";

#[derive(Args, Debug)]
pub(super) struct RecoverArgs {
    /// Only show what is known
    #[arg(long)]
    look: bool,
    /// The server whose data are to be the truth [default: of those that answer, the one with the newest log]
    #[arg(long, value_name = "ID", value_parser = parse_id)]
    from: Option<u8>,
    /// Do not ask, though what the lost servers alone had is given up
    #[arg(long)]
    yes: bool,
}

pub(super) fn run(args: &CellArgs, recover: &RecoverArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let answers = cell.answers()?;
    let plan = plan(&cell, &answers, recover.from)?;
    if args.json && recover.look {
        return print_json(&plan.json());
    }
    if !args.json {
        print(&plan.text(&answers))?;
    }
    if recover.look {
        return Ok(());
    }
    if !recover.yes {
        ask(&plan)?;
    }
    carry_out(args, &cell, plan)
}

/// What is known, and what would be done.
struct Plan {
    /// Goes on with what it has.
    from: ServerId,
    last: (Ballot, u64),
    /// Others that are left; they get what they lack.
    left: Vec<ServerId>,
    lost: Vec<ServerId>,
    /// The newest slot that anybody who answers knows a lost server to have acknowledged or applied.
    known: u64,
    members: Members,
}

/// Ids of an entry order logs.
fn last(status: &ServerStatus) -> (Ballot, u64) {
    (status.last_ballot, status.last)
}

fn plan(cell: &Access, answers: &Answers, from: Option<u8>) -> Result<Plan, CliError> {
    let failed = |exit, message: String| Err(CliError::new(exit, message));
    let health = answers.judge(None);
    if answers.statuses.is_empty() {
        return failed(
            Exit::NoQuorum,
            "no server answers: start one that holds the data".to_owned(),
        );
    }
    let core = &health.core;
    let there: Vec<ServerId> = core
        .iter()
        .copied()
        .filter(|id| answers.statuses.contains_key(id))
        .collect();
    if there.len() > core.len() / 2 {
        return failed(
            Exit::Failed,
            format!(
                "nothing is lost: {} {} answer{}, which is a majority of the core servers {}; 'pss status' says what is wrong",
                if there.len() == 1 {
                    "server"
                } else {
                    "servers"
                },
                Ids(&there),
                if there.len() == 1 { "s" } else { "" },
                Ids(core)
            ),
        );
    }
    if let Some(leader) = answers.leader() {
        return failed(
            Exit::Failed,
            format!(
                "server {} still leads; if the others are gone, it notices within seconds: try again",
                leader.server
            ),
        );
    }
    let whole = |status: &&ServerStatus| !status.rejoining && status.copying.is_none();
    let best = answers.statuses.values().filter(whole);
    let Some(best) = best.max_by_key(|status| last(status)) else {
        return failed(
            Exit::Failed,
            "none of the servers that answer holds all data: chunks are missing on each of them"
                .to_owned(),
        );
    };
    let chosen = match from.map(ServerId) {
        None => best,
        Some(id) => match answers.statuses.get(&id) {
            None => return Err(cell.no_answer(id, answers.failures.get(&id))),
            Some(status) if !whole(&status) => {
                return failed(
                    Exit::Failed,
                    format!(
                        "server {id} has not got all data itself; server {} has",
                        best.server
                    ),
                );
            }
            Some(status) if last(status) < last(best) => {
                return failed(
                    Exit::Failed,
                    format!(
                        "server {} has a newer log (slot {}) than server {id} (slot {}): leave --from out, or stop server {0} if its data must not be the truth",
                        best.server,
                        grouped(best.last),
                        grouped(status.last),
                    ),
                );
            }
            Some(status) => status,
        },
    };
    let from = chosen.server;
    let old = match answers.members() {
        Some(members) => members.clone(),
        None => members::of_configuration(cell),
    };
    let is_left = |id: &ServerId| answers.statuses.contains_key(id);
    let left = old.list.iter().map(|it| it.id);
    let left: Vec<ServerId> = left.filter(|id| is_left(id) && *id != from).collect();
    let lost: Vec<ServerId> = old
        .list
        .iter()
        .map(|it| it.id)
        .filter(|id| !is_left(id))
        .collect();
    let told = answers.statuses.values().flat_map(|status| &status.peers);
    let told = told.filter(|peer| lost.contains(&peer.server));
    let known = told
        .map(|peer| peer.acknowledged.max(peer.applied))
        .max()
        .unwrap_or(0);
    let list = old
        .list
        .iter()
        .filter(|it| it.id == from || left.contains(&it.id));
    let list = list.map(|it| Member {
        core: it.id == from,
        ..it.clone()
    });
    let list: Vec<Member> = list.collect();
    Ok(Plan {
        from,
        last: last(chosen),
        left,
        lost,
        known,
        members: Members {
            epoch: old.epoch + 1,
            version: old.version + 1,
            list,
        },
    })
}

impl Plan {
    /// Entries that are known to be missing.
    fn missing(&self) -> u64 {
        self.known.saturating_sub(self.last.1)
    }

    fn text(&self, answers: &Answers) -> String {
        let mut table = Table::new([
            left("ID"),
            left("ANSWERS"),
            right("LAST SLOT"),
            right("APPLIED"),
            left("LAST HEARD"),
        ]);
        for (id, status) in &answers.statuses {
            table.row([
                id.to_string(),
                "yes".to_owned(),
                grouped(status.last),
                grouped(status.applied),
                "now".to_owned(),
            ]);
        }
        for id in &self.lost {
            let seen = answers.statuses.values().flat_map(|status| &status.peers);
            let seen = seen.filter(|peer| peer.server == *id);
            let newest = seen
                .clone()
                .map(|peer| peer.acknowledged.max(peer.applied))
                .max();
            let heard = seen.filter_map(|peer| peer.silent_ms).min();
            let known = |slot: Option<u64>| match slot {
                Some(slot) if slot > 0 => format!("at least {}", grouped(slot)),
                _ => "not known".to_owned(),
            };
            table.row([
                id.to_string(),
                "no".to_owned(),
                known(newest),
                "-".to_owned(),
                match heard {
                    Some(ms) => format!("{} ago", span(ms / 1000)),
                    None => "not since the servers that answer were started".to_owned(),
                },
            ]);
        }
        let missing = match self.missing() {
            0 => "Nothing is known to be missing. What the lost servers acknowledged between themselves after they were last heard cannot be known.".to_owned(),
            slots => format!(
                "At least {} entries are missing: a lost server had acknowledged slot {}, and the newest that is left is {}. More may be.",
                grouped(slots),
                grouped(self.known),
                grouped(self.last.1),
            ),
        };
        format!(
            "{}\nServer {} has the newest log that is left, up to slot {}.\n{missing}\n",
            table.render(),
            self.from,
            grouped(self.last.1),
        )
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "schema": "pss.recover/1",
            "from": self.from.0,
            "last_slot": self.last.1,
            "left": self.left,
            "lost": self.lost,
            "slot_of_a_lost_server": self.known,
            "entries_known_to_be_missing": self.missing(),
            "loss_epoch": self.members.epoch,
        })
    }
}

fn ask(plan: &Plan) -> Result<(), CliError> {
    let question = format!(
        "Server {} goes on with what it has{}. Servers {} never count again with what they hold, and what they alone had is given up for good. \
         Whoever has a volume open is cut off and has to open it again.",
        plan.from,
        match plan.left.is_empty() {
            true => String::new(),
            false => format!(", and servers {} learn it", Ids(&plan.left)),
        },
        Ids(&plan.lost),
    );
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(CliError::usage(format!(
            "{question} Nothing was done: there is no terminal to ask on; add --yes to say yes"
        )));
    }
    let _ = write!(io::stderr(), "{question} Type '{WORD}' to go on: ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    match read.is_ok() && answer.trim().eq_ignore_ascii_case(WORD) {
        true => Ok(()),
        false => Err(CliError::new(Exit::Failed, "nothing was done")),
    }
}

fn carry_out(args: &CellArgs, cell: &Access, plan: Plan) -> Result<(), CliError> {
    let (from, epoch) = (plan.from, plan.members.epoch);
    let voted: Vec<ServerId> = plan
        .left
        .iter()
        .copied()
        .filter(|id| id.is_core())
        .collect();
    match cell.recover(from, plan.members) {
        Ok(()) => {}
        Err(ServerError::Reply(ReplyError::Refused(Refusal::MajorityAlive))) => {
            return Err(CliError::new(
                Exit::Failed,
                format!(
                    "nothing was done: server {from} hears a majority of the core servers, though they do not all answer here"
                ),
            ));
        }
        Err(error) => {
            return Err(CliError::new(
                Exit::Failed,
                format!("server {from} does not go on: {error}"),
            ));
        }
    }
    let until = Instant::now() + LEADS_WITHIN;
    while cell
        .answers()?
        .leader()
        .is_none_or(|leader| leader.server != from)
    {
        if Instant::now() >= until {
            return Err(CliError::new(
                Exit::Timeout,
                format!(
                    "server {from} has given the others up and does not lead yet; its log says why"
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    say(format!("Server {from} leads and serves."));
    let (_, health) = look(cell)?;
    let text = format!("gave up servers {}, loss epoch {epoch}", Ids(&plan.lost));
    cell.note(&health, &text);
    for id in voted {
        say(format!(
            "Server {id} learns what server {from} has, and then votes again."
        ));
        members::promote(args, cell, id)?;
    }
    if args.json {
        return print_json(&json!({ "schema": "pss.recovered/1", "from": from.0 }));
    }
    say(format!(
        "The cell works without servers {}. Check the file systems on the volumes, open them again, and replace the \
         lost servers: 'pss server add' says how.",
        Ids(&plan.lost)
    ));
    Ok(())
}
