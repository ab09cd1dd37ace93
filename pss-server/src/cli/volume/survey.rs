//! Asks the cell what its servers hold, until it is told.

use std::thread::sleep;
use std::time::{Duration, Instant};

use pss_core::state::Volume;
use pss_core::types::{ChunkIndex, ServerId};
use pss_core::wire::inspect::{
    Inspect, Inspection, SurveyInfo, SurveyQuestion, SurveyScope, SurveyServer,
};
use pss_gateway::progress::Progress;

use super::super::cell::{Access, unexpected};
use super::super::paxos::leader;
use super::super::{CliError, Exit};
use crate::render::printable;

/// Questions follow each other at first so fast, and then more and more slowly.
const WAIT_MIN: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_millis(500);
/// So often something that may pass is tried again.
const TRIES: u32 = 10;
/// A cell without a leader is waited for so long.
const LEADERLESS: Duration = Duration::from_secs(20);

/// A number that names a survey.
fn new_id() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => u64::from(std::process::id()),
    }
}

/// Asks until it is done; `see` is shown what is known so far. `server`: of its own copy only.
pub(super) fn ask(
    cell: &Access,
    volume: &Volume,
    server: Option<ServerId>,
    scope: SurveyScope,
    from: ChunkIndex,
    see: impl Fn(&SurveyInfo),
) -> Result<SurveyInfo, CliError> {
    let mut tries = 0;
    loop {
        let question = SurveyQuestion {
            id: new_id(),
            volume: volume.id,
            from,
            scope,
        };
        let id = server.map_or_else(|| wait_for_leader(cell), Ok)?;
        match ask_one(cell, id, question, &see) {
            Ok(info) if info.state == "done" && !is_passing(scope, &info) => return Ok(info),
            Ok(info) if tries >= TRIES && info.state == "done" => return Ok(info),
            Ok(info) if tries >= TRIES || is_final(&info) => return Err(failed(volume, &info)),
            // The leader may have gone.
            Err(error) if tries >= TRIES || server.is_some() || error.exit != Exit::NoQuorum => {
                return Err(error);
            }
            _ => {}
        }
        tries += 1;
        sleep(WAIT_MAX);
    }
}

fn ask_one(
    cell: &Access,
    id: ServerId,
    question: SurveyQuestion,
    see: impl Fn(&SurveyInfo),
) -> Result<SurveyInfo, CliError> {
    let mut wait = WAIT_MIN;
    loop {
        let Inspection::Survey(info) = cell.inspect(id, Inspect::Survey(question))? else {
            return Err(unexpected(id));
        };
        see(&info);
        if info.state != "running" {
            return Ok(info);
        }
        sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
    }
}

fn wait_for_leader(cell: &Access) -> Result<ServerId, CliError> {
    let start = Instant::now();
    loop {
        match leader(cell) {
            Ok(id) => return Ok(id),
            Err(error) if start.elapsed() >= LEADERLESS => return Err(error),
            Err(_) => sleep(WAIT_MAX),
        }
    }
}

/// Whether a server had damaged blocks, which are being repaired now, so that there is no digest yet.
fn is_passing(scope: SurveyScope, info: &SurveyInfo) -> bool {
    let lacks = |it: &SurveyServer| it.state == "done" && it.digest.is_none() && it.bad > 0;
    // What is verified is looked at again by the servers themselves.
    scope != SurveyScope::Verify && info.servers.iter().any(lacks)
}

/// Whether to ask again would bring the same.
fn is_final(info: &SurveyInfo) -> bool {
    let reason = info.reason.as_deref().unwrap_or_default();
    info.state == "failed" && reason.starts_with("there is no such volume")
}

fn failed(volume: &Volume, info: &SurveyInfo) -> CliError {
    let name = printable(&volume.name);
    let reason = info.reason.as_deref().map(printable);
    CliError::new(
        Exit::Failed,
        format!(
            "volume {name}: server {} cannot tell what it holds: {}",
            info.server,
            reason.unwrap_or_else(|| info.state.clone())
        ),
    )
}

/// Shows how far the slowest server is; `from` is what is done before, and `bytes` the whole.
pub(super) fn show(progress: &Progress, info: &SurveyInfo, from: u64, bytes: u64) {
    let shares = info.servers.iter().filter(|it| it.total > 0);
    let share = shares
        .map(|it| it.done as f64 / it.total as f64)
        .fold(1.0, f64::min);
    if info.servers.iter().any(|it| it.total > 0) {
        progress.reach(from + (share * bytes.saturating_sub(from) as f64) as u64);
    }
}

/// Servers that were not compared, and why.
pub(super) fn missing(info: &SurveyInfo) -> Vec<(ServerId, String)> {
    let missing = info.servers.iter().filter(|it| it.state != "done");
    let missing = missing.map(|it| {
        let why = match (&*it.state, &it.reason) {
            (_, Some(reason)) => reason.clone(),
            ("silent", _) => "it does not answer, or is too old to know the question".to_owned(),
            ("behind", _) => "it is too far behind".to_owned(),
            (state, _) => state.to_owned(),
        };
        (it.server, why)
    });
    missing.collect()
}
