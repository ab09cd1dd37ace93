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
/// Role of a server that does not run, in a status that was made from its files.
pub(super) const STOPPED: &str = "stopped";
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
    let truth = recover
        .from
        .map_or(Truth::Newest, |id| Truth::Of(ServerId(id)));
    let plan = plan(&cell, &answers, truth)?;
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
    plan.give_up(&cell)?;
    let done = plan.follow(args, &cell)?;
    if args.json {
        return print_json(&json!({ "schema": "pss.recovered/1", "from": plan.from.0 }));
    }
    say(done);
    Ok(())
}

/// Whose data are to be the truth.
#[derive(Clone, Copy)]
pub(super) enum Truth {
    /// Those of the newest log of those that answer.
    Newest,
    /// Those of this server, if no other has a newer log.
    Of(ServerId),
    /// Those of this server, whatever others have. It does not run: its status is made from its files.
    Started(ServerId),
}

/// What is known, and what would be done.
pub(super) struct Plan {
    /// Goes on with what it has.
    pub(super) from: ServerId,
    last: (Ballot, u64),
    /// Others that are left; they get what they lack.
    left: Vec<ServerId>,
    /// Whoever does not answer, or has a newer log that is given up.
    pub(super) lost: Vec<ServerId>,
    /// Of these, those that answer, with the ends of their logs.
    newer: Vec<(ServerId, (Ballot, u64))>,
    /// The newest slot that anybody who answers knows a lost server to have acknowledged or applied.
    known: u64,
    pub(super) members: Members,
}

/// Ids of an entry order logs.
fn last(status: &ServerStatus) -> (Ballot, u64) {
    (status.last_ballot, status.last)
}

fn failed<T>(exit: Exit, message: String) -> Result<T, CliError> {
    Err(CliError::new(exit, message))
}

/// Whether it has got all data.
fn is_whole(status: &ServerStatus) -> bool {
    !status.rejoining && status.copying.is_none()
}

/// What is to be done.
///
/// # Errors
/// Nothing is lost; or what is left is not enough.
pub(super) fn plan(cell: &Access, answers: &Answers, truth: Truth) -> Result<Plan, CliError> {
    let health = answers.judge(None);
    if answers.statuses.is_empty() {
        return failed(
            Exit::NoQuorum,
            "no server answers: start one that holds the data".to_owned(),
        );
    }
    if let Truth::Started(_) = truth {
        // Whoever is none of the cell's any more need not hear who is alive.
        the_truth(cell, answers, truth)?;
    }
    check_lost(answers, &health.core, truth)?;
    let chosen = the_truth(cell, answers, truth)?;
    let from = chosen.server;
    let known = match truth {
        Truth::Started(_) => chosen.members.as_ref(),
        Truth::Newest | Truth::Of(_) => answers.members(),
    };
    let old = known.map_or_else(|| members::of_configuration(cell), Members::clone);
    let newer = answers
        .statuses
        .values()
        .filter(|it| last(it) > last(chosen));
    let newer: Vec<_> = newer.map(|it| (it.server, last(it))).collect();
    let is_newer = |id: &ServerId| newer.iter().any(|(newer, _)| newer == id);
    let is_left = |id: &ServerId| answers.statuses.contains_key(id) && !is_newer(id);
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
        .chain(newer.iter().map(|(_, (_, slot))| *slot))
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
        newer,
        known,
        members: Members {
            epoch: old.epoch + 1,
            version: old.version + 1,
            list,
        },
    })
}

/// Whether a majority is lost, as far as can be seen.
fn check_lost(answers: &Answers, core: &[ServerId], truth: Truth) -> Result<(), CliError> {
    let mut there = core.to_vec();
    there.retain(|id| answers.statuses.contains_key(id));
    let all = Ids(core);
    let has_majority = there.len() > core.len() / 2;
    let started = match truth {
        Truth::Started(id) => Some(id),
        Truth::Newest | Truth::Of(_) => None,
    };
    let mut others = there.clone();
    others.retain(|id| Some(*id) != started);
    let answer = |ids: &[ServerId]| match ids {
        [id] => format!("server {id} answers"),
        ids => format!("servers {} answer", Ids(ids)),
    };
    if let (Some(id), true) = (started, has_majority) {
        let why = match &others[..] {
            [] => format!("server {id} is a majority of the core servers {all} itself"),
            others => format!(
                "{}, which is with server {id} a majority of the core servers {all}",
                answer(others)
            ),
        };
        let message = format!("nothing is lost: {why}; start it without --restart");
        return failed(Exit::Failed, message);
    }
    if has_majority {
        return failed(
            Exit::Failed,
            format!(
                "nothing is lost: {}, which is a majority of the core servers {all}; 'pss status' says what is wrong",
                answer(&there)
            ),
        );
    }
    if let Some(leader) = answers.leader() {
        let then = match started {
            Some(_) => "start without --restart; if a majority is gone, the leader",
            None => "if the others are gone, it",
        };
        return failed(
            Exit::Failed,
            format!(
                "server {} still leads; {then} notices within seconds: try again",
                leader.server
            ),
        );
    }
    Ok(())
}

/// The server whose data are to be the truth.
fn the_truth<'a>(
    cell: &Access,
    answers: &'a Answers,
    truth: Truth,
) -> Result<&'a ServerStatus, CliError> {
    if let Truth::Started(id) = truth {
        let Some(own) = answers.statuses.get(&id) else {
            return Err(cell.no_answer(id, answers.failures.get(&id)));
        };
        return check_started(answers, own).map(|()| own);
    }
    let best = answers.statuses.values().filter(|it| is_whole(it));
    let Some(best) = best.max_by_key(|status| last(status)) else {
        return failed(
            Exit::Failed,
            "none of the servers that answer holds all data: chunks are missing on each of them"
                .to_owned(),
        );
    };
    let Truth::Of(id) = truth else {
        return Ok(best);
    };
    match answers.statuses.get(&id) {
        None => Err(cell.no_answer(id, answers.failures.get(&id))),
        Some(status) if !is_whole(status) => failed(
            Exit::Failed,
            format!(
                "server {id} has not got all data itself; server {} has",
                best.server
            ),
        ),
        Some(status) if last(status) < last(best) => failed(
            Exit::Failed,
            format!(
                "server {} has a newer log (slot {}) than server {id} (slot {}): leave --from out, or stop server {0} if its data must not be the truth",
                best.server,
                grouped(best.last),
                grouped(status.last),
            ),
        ),
        Some(status) => Ok(status),
    }
}

/// Whether the data of a server that was told to go on alone may be the truth.
fn check_started(answers: &Answers, own: &ServerStatus) -> Result<(), CliError> {
    let id = own.server;
    if !is_whole(own) {
        return failed(
            Exit::Failed,
            format!(
                "server {id} has not got all data itself, so it cannot be the truth; start it without --restart, and it learns from the others what it lacks"
            ),
        );
    }
    if own.last == 0 {
        return failed(
            Exit::Failed,
            format!(
                "server {id} holds nothing yet that could be the truth; start it without --restart"
            ),
        );
    }
    let epoch = |members: Option<&Members>| members.map_or(0, |it| it.epoch);
    let newest = answers.members();
    if epoch(newest) > epoch(own.members.as_ref()) {
        return failed(
            Exit::Failed,
            format!(
                "the cell was recovered without server {id} (loss epoch {}): what it holds does not count any more; to take it in again: \
                 'pssd format --replace --id {id} --force', start it, 'pss server add {id} HOST PATH'",
                epoch(newest)
            ),
        );
    }
    if newest.is_some_and(|members| members.get(id).is_none()) {
        return failed(
            Exit::Failed,
            format!("server {id} was taken out of the cell: what it holds does not count any more"),
        );
    }
    Ok(())
}

impl Plan {
    /// Entries that are known to be missing.
    fn missing(&self) -> u64 {
        self.known.saturating_sub(self.last.1)
    }

    pub(super) fn text(&self, answers: &Answers) -> String {
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
                match status.role.as_str() {
                    STOPPED => "this one",
                    _ => "yes",
                }
                .to_owned(),
                grouped(status.last),
                grouped(status.applied),
                "now".to_owned(),
            ]);
        }
        let silent = |id: &&ServerId| !answers.statuses.contains_key(id);
        for id in self.lost.iter().filter(silent) {
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
        let mut whose = match self.newer.is_empty() {
            true => format!(
                "Server {} has the newest log that is left, up to slot {}.",
                self.from,
                grouped(self.last.1)
            ),
            false => format!(
                "The log of server {} ends with slot {}.",
                self.from,
                grouped(self.last.1)
            ),
        };
        for (id, (_, slot)) in &self.newer {
            let by = match slot.saturating_sub(self.last.1) {
                0 => "has entries of a later leader".to_owned(),
                slots => format!("is newer by {} slots", grouped(slots)),
            };
            whose.push_str(&format!(
                "\nThat of server {id}, which answers, ends with slot {} and {by}: these are given up, and server {id} with them. \
                 To keep them, start this server without --restart, and use 'pss recover'.",
                grouped(*slot)
            ));
        }
        format!("{}\n{whose}\n{missing}\n", table.render())
    }

    /// Has the server give the others up.
    ///
    /// # Errors
    /// It refuses; then nothing was done.
    pub(super) fn give_up(&self, cell: &Access) -> Result<(), CliError> {
        let from = self.from;
        match cell.recover(from, self.members.clone()) {
            Ok(()) => Ok(()),
            Err(ServerError::Reply(ReplyError::Refused(Refusal::MajorityAlive))) => failed(
                Exit::Failed,
                format!(
                    "nothing was done: server {from} hears a majority of the core servers, though they do not all answer here"
                ),
            ),
            Err(error) => failed(
                Exit::Failed,
                format!("server {from} does not go on: {error}"),
            ),
        }
    }

    /// Waits until that server leads, and has the others that are left learn and vote again. Says what to do next.
    ///
    /// # Errors
    /// It does not lead, or the others do not vote again. What was given up stays given up.
    pub(super) fn follow(&self, args: &CellArgs, cell: &Access) -> Result<String, CliError> {
        let (from, epoch) = (self.from, self.members.epoch);
        let until = Instant::now() + LEADS_WITHIN;
        while cell
            .answers()?
            .leader()
            .is_none_or(|leader| leader.server != from)
        {
            if Instant::now() >= until {
                return failed(
                    Exit::Timeout,
                    format!(
                        "server {from} has given the others up and does not lead yet; its log says why"
                    ),
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        say(format!("Server {from} leads and serves."));
        let (_, health) = look(cell)?;
        let text = format!("gave up servers {}, loss epoch {epoch}", Ids(&self.lost));
        cell.note(&health, &text);
        for id in self.left.iter().filter(|id| id.is_core()) {
            say(format!(
                "Server {id} learns what server {from} has, and then votes again."
            ));
            members::promote(args, cell, *id)?;
        }
        Ok(format!(
            "The cell works without servers {}. Check the file systems on the volumes, open them again, and replace the \
             lost servers: 'pss server add' says how.",
            Ids(&self.lost)
        ))
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

pub(super) fn ask(plan: &Plan) -> Result<(), CliError> {
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
