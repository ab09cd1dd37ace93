//! `pssd start --restart`: a person says whose data a server begins with.
//!
//! * `--restart` — its own are the truth, though a majority is lost: what `pss recover --from` does to a server that runs
//! * `--restart autonomic [ID]` — those of another: its own are dropped, and it rejoins like one with a new disk

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use pss_core::servers::Ids;
use pss_core::types::ServerId;
use pss_core::wire::client::{PeerStatus, ServerStatus};

use super::cell::Access;
use super::format::incarnation;
use super::health::{Answers, CopyState, Health};
use super::recover::{self, Plan, STOPPED, Truth};
use super::start::explained;
use super::{CellArgs, CliError, Exit, confirm, parse_id, print, say};
use crate::config::ServerConfig;
use crate::node::{Held, Server};

/// Servers that run answer within this time.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Servers that hear each other have a leader by then: the one that is to be started may have been it.
const ELECTS_WITHIN: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// A server that was started has heard all others by then that it can hear.
const HEARS_WITHIN: Duration = Duration::from_secs(3);
/// What is done to the cell afterwards may take so long.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(10);
/// The manual's word.
const AUTONOMIC: &str = "autonomic";

pub(super) const EXAMPLES: &str = "\
Examples:
  pssd start --id 1                           as always: the servers find out themselves who has what
  pssd start --id 1 --restart                 a majority is lost for good, and the data of server 1 are the truth
  pssd start --id 1 --restart autonomic       drops the data of server 1 and takes those of the leader
  pssd start --id 1 --restart autonomic 2     the same from server 2";

/// Whose data the server begins with.
#[derive(Args, Debug)]
pub(super) struct RestartArgs {
    /// Begin with the data of this server though a majority is lost; 'autonomic': with those of the leader, or of server ID
    #[arg(long, value_names = ["autonomic", "ID"], num_args = 0..=2)]
    restart: Option<Vec<String>>,
    /// Do not ask, though something is given up
    #[arg(long, requires = "restart")]
    pub(super) yes: bool,
}

/// What [`RestartArgs`] ask for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Restart {
    /// This server's data are the truth.
    Own,
    /// Those of another server; none: of the leader.
    From(Option<u8>),
}

impl RestartArgs {
    /// What is asked for.
    ///
    /// # Errors
    /// It is nothing that there is.
    pub(super) fn restart(&self) -> Result<Option<Restart>, CliError> {
        let Some(words) = &self.restart else {
            return Ok(None);
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let restart = match words[..] {
            [] => Restart::Own,
            [AUTONOMIC] => Restart::From(None),
            [AUTONOMIC, id] => {
                let id = parse_id(id);
                Restart::From(Some(id.map_err(|why| {
                    CliError::usage(format!("--restart autonomic {}: {why}", words[1]))
                })?))
            }
            [other, ..] => {
                return Err(CliError::usage(format!(
                    "--restart {other}: use --restart alone, --restart autonomic, or --restart autonomic ID"
                )));
            }
        };
        Ok(Some(restart))
    }
}

/// Where the cell is.
pub(super) struct Place<'a> {
    pub(super) servers: &'a Path,
    pub(super) key: Option<&'a Path>,
}

impl Place<'_> {
    fn args(&self, timeout: Duration) -> CellArgs {
        CellArgs {
            servers: self.servers.to_owned(),
            key: self.key.map(Path::to_owned),
            timeout,
            json: false,
        }
    }
}

/// Looks whether that may be done, asks, and prepares the directory. Returns what is left to do once the server runs.
///
/// # Errors
/// It may not be done, or nobody said yes. Then nothing was done.
pub(super) fn prepare(
    restart: Restart,
    yes: bool,
    place: &Place<'_>,
    config: &mut ServerConfig,
) -> Result<Option<GiveUp>, CliError> {
    let cell = Access::connect(&place.args(ASK_TIMEOUT))?;
    let mut answers = cell.answers()?;
    let until = Instant::now() + ELECTS_WITHIN;
    let elects = |answers: &Answers| !answers.statuses.is_empty() && answers.leader().is_none();
    while restart != Restart::Own && elects(&answers) && Instant::now() < until {
        thread::sleep(ASK_AGAIN);
        answers = cell.answers()?;
    }
    if let Some(running) = answers.statuses.get(&config.id) {
        return Err(failed(format!(
            "server {} runs (pid {}): stop it first",
            config.id, running.pid
        )));
    }
    match restart {
        Restart::Own => own(yes, place, config, &cell, answers).map(Some),
        Restart::From(source) => from(source, yes, config, &cell, &answers).map(|()| None),
    }
}

fn failed(message: String) -> CliError {
    CliError::new(Exit::Failed, message)
}

// ---- Its own data are the truth ----

/// What is done once the server runs: it gives the others up.
pub(super) struct GiveUp {
    plan: Plan,
    /// Who answered when a person said yes.
    seen: Vec<ServerId>,
    servers: PathBuf,
    key: Option<PathBuf>,
}

fn own(
    yes: bool,
    place: &Place<'_>,
    config: &mut ServerConfig,
    cell: &Access,
    mut answers: Answers,
) -> Result<GiveUp, CliError> {
    let seen = answers.statuses.keys().copied().collect();
    let held = Server::look(config).map_err(|error| failed(explained(&error, config)))?;
    answers.statuses.insert(config.id, status(&held));
    let plan = recover::plan(cell, &answers, Truth::Started(config.id))?;
    print(&plan.text(&answers))?;
    if !yes {
        recover::ask(&plan)?;
    }
    config.is_truth = true;
    Ok(GiveUp {
        plan,
        seen,
        servers: place.servers.to_owned(),
        key: place.key.map(Path::to_owned),
    })
}

/// What a server would say that does not run, as far as it matters here.
fn status(held: &Held) -> ServerStatus {
    let peers = held.marks.iter().map(|(server, mark)| PeerStatus {
        server: *server,
        alive: false,
        applied: 0,
        durable: 0,
        copying: false,
        silent_ms: None,
        behind_ms: None,
        behind_bytes: None,
        left_s: None,
        acknowledged: mark.acknowledged.slot.0,
    });
    ServerStatus {
        cell: String::new(),
        server: held.facts.server,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: 0,
        uptime_s: 0,
        role: STOPPED.to_owned(),
        leader: None,
        ballot: held.facts.promised,
        chosen: held.applied.0,
        applied: held.applied.0,
        last: held.last.slot.0,
        log_first: 0,
        copying: held.installing.then_some((0, 0)),
        copying_left_s: None,
        rejoining: held.facts.rejoining || held.facts.discards,
        incarnation: held.facts.incarnation.0,
        lives: Vec::new(),
        free_bytes: 0,
        space_left: 0,
        full: false,
        stalled: false,
        total_bytes: 0,
        bad_blocks: 0,
        repaired_blocks: 0,
        lost_blocks: 0,
        clients: 0,
        peers: peers.collect(),
        members: held.members.clone(),
        last_ballot: held.last.ballot,
        given_up_by: None,
        claimed_twice: Vec::new(),
        scrub: None,
    }
}

impl GiveUp {
    /// Gives the others up, on the server that runs now, and has those that are left learn what it holds.
    ///
    /// # Errors
    /// Somebody is there after all: nothing was done, and the server must not go on as if.
    pub(super) fn carry_out(&self) -> Result<(), CliError> {
        let place = Place {
            servers: &self.servers,
            key: self.key.as_deref(),
        };
        thread::sleep(HEARS_WITHIN);
        let args = place.args(FOLLOW_TIMEOUT);
        let cell = Access::connect(&place.args(ASK_TIMEOUT))?;
        let answers = cell.answers()?;
        let (from, there) = (self.plan.from, answers.statuses.keys().copied());
        let new: Vec<ServerId> = there
            .filter(|id| *id != from && !self.seen.contains(id))
            .collect();
        if !new.is_empty() {
            return Err(failed(format!(
                "nothing was done: since it was asked, {} {} come up; start server {from} without --restart, or ask again",
                if new.len() == 1 { "server" } else { "servers" },
                format_args!(
                    "{} {}",
                    Ids(&new),
                    if new.len() == 1 { "has" } else { "have" }
                ),
            )));
        }
        self.plan.give_up(&cell)?;
        tracing::warn!(
            server = from.0,
            "servers {} were given up (loss epoch {}): what this server holds is the truth now",
            Ids(&self.plan.lost),
            self.plan.members.epoch,
        );
        let cell = Access::connect(&args)?;
        match self.plan.follow(&args, &cell) {
            Ok(next) => say(next),
            // The server serves; what is left to do is shown by 'pss status'.
            Err(error) => tracing::warn!(server = from.0, "{error}; 'pss status' shows the rest"),
        }
        Ok(())
    }
}

// ---- The data of another server ----

fn from(
    source: Option<u8>,
    yes: bool,
    config: &mut ServerConfig,
    cell: &Access,
    answers: &Answers,
) -> Result<(), CliError> {
    let me = config.id;
    if source == Some(me.0) {
        return Err(CliError::usage(format!(
            "--restart autonomic {me}: that is this server itself; name another, or none to take the leader's data"
        )));
    }
    let health = answers.judge(None);
    let leader = check_cell(answers, &health, me)?;
    let source = match source {
        None => leader,
        Some(id) => check_source(answers, ServerId(id), || {
            let id = ServerId(id);
            cell.no_answer(id, answers.failures.get(&id))
        })?,
    };
    config.source = Some(source);
    let mut identity =
        Server::identity(config).map_err(|error| failed(explained(&error, config)))?;
    let facts = identity.facts();
    if facts.rejoining {
        say(format!(
            "Server {me} has no data that count, and goes on learning them, from server {source} first."
        ));
        return Ok(());
    }
    if !yes {
        confirm(&format!(
            "All data of server {me} in {} are dropped, and it takes those of server {source}. {}",
            config.path.display(),
            meanwhile(&health, me),
        ))?;
    }
    let lives = answers.statuses.values();
    let lives = lives.filter_map(|status| status.lives.get(usize::from(me.0)));
    let known = lives.copied().max().unwrap_or_default();
    let life = incarnation(known.max(facts.incarnation.0));
    // Learners have promised nothing that they could forget.
    identity
        .discard(life, me.is_core())
        .map_err(|error| failed(format!("{}: {error}", config.path.display())))
}

/// Whether the cell can spare the data of a server; who leads it.
fn check_cell(answers: &Answers, health: &Health, me: ServerId) -> Result<ServerId, CliError> {
    let refused = |why: String| {
        Err(failed(format!(
            "nothing was dropped: {why}, so the data of server {me} may be needed; start it without --restart"
        )))
    };
    let there: Vec<ServerId> = answers.statuses.keys().copied().collect();
    let who = match &there[..] {
        [] => "no other server answers".to_owned(),
        [id] => format!("only server {id} answers"),
        ids => format!("servers {} answer", Ids(ids)),
    };
    if !health.copies.contains_key(&me) {
        return Err(failed(format!(
            "nothing was dropped: server {me} is none of the cell's now; 'pss server add' takes it in"
        )));
    }
    let majority = health.core.len() / 2 + 1;
    let whole = |id: &&ServerId| {
        let status = answers.statuses.get(*id);
        **id != me && status.is_some_and(|it| !it.rejoining && it.copying.is_none())
    };
    let whole: Vec<ServerId> = health.core.iter().filter(whole).copied().collect();
    if health.core.contains(&me) && whole.len() < majority {
        let and = match whole.len() == there.len() {
            true => String::new(),
            false => format!(", and of the core servers {} with all data", whole.len()),
        };
        return refused(format!(
            "{majority} other core servers with all data must be there, and {who}{and}"
        ));
    }
    match health.leader {
        Some(leader) => Ok(leader),
        None => refused(format!("nobody leads ({who})")),
    }
}

/// The server whose data are to be taken, if it has them.
fn check_source(
    answers: &Answers,
    id: ServerId,
    no_answer: impl FnOnce() -> CliError,
) -> Result<ServerId, CliError> {
    let health = answers.judge(None);
    let Some(status) = answers.statuses.get(&id) else {
        if !health.copies.contains_key(&id) {
            let all: Vec<ServerId> = health.copies.keys().copied().collect();
            return Err(CliError::usage(format!(
                "--restart autonomic {id}: server {id} is none of the cell's; these are: {}",
                Ids(&all)
            )));
        }
        return Err(failed(format!("nothing was dropped: {}", no_answer())));
    };
    if status.rejoining || status.copying.is_some() {
        return Err(failed(format!(
            "nothing was dropped: server {id} has not got all data itself; wait until 'pss status' calls it current, or name another"
        )));
    }
    Ok(id)
}

/// What a person should know who drops the data of a server.
fn meanwhile(health: &Health, me: ServerId) -> String {
    if !health.core.contains(&me) {
        return "Until it has them, there is one copy less.".to_owned();
    }
    let majority = health.core.len() / 2 + 1;
    let current = |id: &&ServerId| **id != me && health.copies.get(id) == Some(&CopyState::Current);
    let current = health.core.iter().filter(current).count();
    let may_fail = match current.saturating_sub(majority) {
        0 => "no further server may fail".to_owned(),
        1 => "only one further server may fail".to_owned(),
        more => format!("only {more} further servers may fail"),
    };
    format!("Until it has them, it neither votes nor counts, and {may_fail}.")
}

#[cfg(test)]
mod tests {
    use super::super::health::tests::answers;
    use super::*;

    #[test]
    fn the_manuals_forms() {
        let parsed = |words: Option<&[&str]>| {
            let restart = words.map(|words| words.iter().map(|it| (*it).to_owned()).collect());
            let args = RestartArgs {
                restart,
                yes: false,
            };
            args.restart().map_err(|error| error.message)
        };
        assert_eq!(parsed(None), Ok(None));
        assert_eq!(parsed(Some(&[])), Ok(Some(Restart::Own)));
        assert_eq!(parsed(Some(&["autonomic"])), Ok(Some(Restart::From(None))));
        let from = Ok(Some(Restart::From(Some(3))));
        assert_eq!(parsed(Some(&["autonomic", "3"])), from);
        for wrong in [&["autonomic", "8"][..], &["3"], &["3", "autonomic"]] {
            assert!(parsed(Some(wrong)).unwrap_err().starts_with("--restart "));
        }
    }

    /// What is said; server 2 is the one whose data would be dropped.
    fn refusal(answers: &Answers, source: u8) -> String {
        let me = ServerId(2);
        let done = check_cell(answers, &answers.judge(None), me).and_then(|_| {
            check_source(answers, ServerId(source), || {
                failed("it is silent".to_owned())
            })
        });
        done.map_or_else(|error| error.message, |source| format!("from {source}"))
    }

    #[test]
    fn whose_data_can_be_taken() {
        let all = || {
            let others = [1, 3, 4, 5].map(|id| (id, true, 5000));
            answers(6, &others)
        };
        for source in [0, 1, 5] {
            assert_eq!(refusal(&all(), source), format!("from {source}"));
        }
        let mut silent = all();
        silent.statuses.remove(&ServerId(5));
        assert_eq!(refusal(&silent, 5), "nothing was dropped: it is silent");
        assert!(
            refusal(&all(), 7)
                .contains("server 7 is none of the cell's; these are: 0, 1, 2, 3, 4 and 5")
        );
        let learns = |id: u8, rejoins: bool| {
            let mut answers = answers(
                6,
                &[
                    (1, true, 5000),
                    (3, true, 5000),
                    (4, true, 5000),
                    (5, true, 10),
                ],
            );
            let status = answers.statuses.get_mut(&ServerId(id)).unwrap();
            status.rejoining = rejoins;
            status.copying = (!rejoins).then_some((1, 2));
            answers
        };
        for (id, rejoins) in [(1, true), (1, false), (5, false)] {
            let said = refusal(&learns(id, rejoins), id);
            let told = format!("nothing was dropped: server {id} has not got all data itself");
            assert!(said.starts_with(&told), "{said}");
        }
    }

    #[test]
    fn the_only_copy_is_not_dropped() {
        let said = |answers: &Answers| refusal(answers, 0);
        // 0 leads, and 1 is gone, or has nothing.
        let mut alone = answers(3, &[]);
        assert!(said(&alone).contains(
            "2 other core servers with all data must be there, and only server 0 answers"
        ));
        alone.statuses.clear();
        assert!(said(&alone).contains("no other server answers"));
        let mut two = answers(3, &[(1, true, 5000)]);
        assert_eq!(said(&two), "from 0");
        two.statuses.get_mut(&ServerId(0)).unwrap().role = "follower".to_owned();
        assert!(said(&two).contains(
            "nobody leads (servers 0 and 1 answer), so the data of server 2 may be needed"
        ));
        let mut learning = answers(3, &[(1, true, 5000)]);
        learning.statuses.get_mut(&ServerId(1)).unwrap().rejoining = true;
        assert!(said(&learning).contains("and of the core servers 1 with all data"));
    }
}
