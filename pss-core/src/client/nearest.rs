//! Answers of the nearest server, whether it leads or not: they may lack what was changed last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::client::leader::{Connection, Dialer};
use crate::client::{ClientError, ServerError};
use crate::types::ServerId;
use crate::wire::client::{Browse, ReplyBody, ReplyError, RequestBody, ServerStatus};

/// Idle connections that are kept: as many requests may be under way without a new connection for each.
const IDLE_MAX: usize = 8;

/// Asks the server that answers fastest for what it has.
///
/// It is searched when there is need: at first, and when it fails.
pub struct Nearest {
    dialer: Arc<Dialer>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The nearest server, if one is known.
    server: Option<ServerId>,
    /// Connections to it on which nothing is under way.
    idle: Vec<Connection>,
}

/// How far a server may be behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Freshness {
    /// The server that answers.
    pub server: ServerId,
    /// Slot up to which its chunks are current.
    pub applied: u64,
    /// At most so many slots of the log, which others may have answered for, are missing in its chunks. None: no
    /// majority of the core servers answers, so nobody can tell.
    pub behind_slots_max: Option<u64>,
    /// Time that it took the server to answer.
    pub round_trip: Duration,
}

impl Nearest {
    pub(super) fn new(dialer: Arc<Dialer>) -> Nearest {
        Nearest {
            dialer,
            state: Mutex::default(),
        }
    }

    /// Has the nearest server look at its volumes. One that cannot answer, because it fails or chunks are being copied
    /// to it, is replaced by the next.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Unavailable`] if no server answers.
    pub async fn browse(&self, what: Browse) -> Result<ReplyBody, ClientError> {
        let body = RequestBody::Browse { stale: true, what };
        if let Some(mut connection) = self.connection().await {
            match self.dialer.ask_on(&mut connection, body.clone()).await {
                Ok(answer) => {
                    self.put_back(connection);
                    return Ok(answer);
                }
                Err(ServerError::Reply(error)) if is_final(&error) => {
                    self.put_back(connection);
                    return Err(refused(error));
                }
                Err(error) => {
                    let server = connection.server;
                    tracing::debug!(%server, %error, "the nearest server is replaced");
                    self.forget(server);
                }
            }
        }
        self.search(body).await
    }

    /// How far the nearest server may be behind the others.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] if no server answers.
    pub async fn freshness(&self) -> Result<Freshness, ClientError> {
        let started = Instant::now();
        let mut answers = self.ask_all(RequestBody::Status);
        let mut statuses: Vec<(ServerId, ServerStatus, Duration)> = Vec::new();
        let mut silent = Vec::new();
        while let Some(answer) = answers.join_next().await {
            match answer.expect("questions do not panic") {
                (server, Ok(ReplyBody::Status(status))) => {
                    statuses.push((server, *status, started.elapsed()));
                }
                (server, Ok(_)) => silent.push((server, ServerError::Unexpected)),
                (server, Err(error)) => silent.push((server, error)),
            }
        }
        let used = self.lock().server;
        let nearest = statuses.iter().find(|(server, ..)| Some(*server) == used);
        let Some((server, status, round_trip)) = nearest.or(statuses.first()) else {
            return Err(unavailable(silent));
        };
        let listed = self.dialer.config.servers.iter().map(|(server, _)| *server);
        let lasts = statuses
            .iter()
            .map(|(server, status, _)| (*server, status.last));
        Ok(Freshness {
            server: *server,
            applied: status.applied,
            behind_slots_max: behind(listed, lasts, status.applied),
            round_trip: *round_trip,
        })
    }

    /// A connection to the nearest server, if one is known and lets us in.
    async fn connection(&self) -> Option<Connection> {
        let server = {
            let mut state = self.lock();
            if let Some(connection) = state.idle.pop() {
                return Some(connection);
            }
            state.server?
        };
        match self.dialer.dial(server).await {
            Ok(connection) => Some(connection),
            Err(error) => {
                tracing::debug!(%server, %error, "the nearest server is replaced");
                self.forget(server);
                None
            }
        }
    }

    /// Asks all servers and takes the first proper answer; its server is the nearest from now on.
    async fn search(&self, body: RequestBody) -> Result<ReplyBody, ClientError> {
        let mut answers = self.ask_all(body);
        let mut silent = BTreeMap::new();
        while let Some(answer) = answers.join_next().await {
            let (server, answer) = answer.expect("questions do not panic");
            match answer {
                Ok(answer) => {
                    self.choose(server);
                    return Ok(answer);
                }
                Err(ServerError::Reply(error)) if is_final(&error) => {
                    self.choose(server);
                    return Err(refused(error));
                }
                Err(error) => _ = silent.insert(server, error),
            }
        }
        Err(unavailable(silent.into_iter().collect()))
    }

    fn ask_all(&self, body: RequestBody) -> JoinSet<(ServerId, Result<ReplyBody, ServerError>)> {
        let mut questions = JoinSet::new();
        for (server, _) in &self.dialer.config.servers {
            let (dialer, server, body) = (Arc::clone(&self.dialer), *server, body.clone());
            questions.spawn(async move { (server, dialer.ask(server, body).await) });
        }
        questions
    }

    fn choose(&self, server: ServerId) {
        let mut state = self.lock();
        if state.server != Some(server) {
            state.server = Some(server);
            state.idle.clear();
        }
    }

    fn forget(&self, server: ServerId) {
        let mut state = self.lock();
        if state.server == Some(server) {
            *state = State::default();
        }
    }

    fn put_back(&self, connection: Connection) {
        let mut state = self.lock();
        if state.server == Some(connection.server) && state.idle.len() < IDLE_MAX {
            state.idle.push(connection);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many slots at most someone lacks who has applied so many: `lasts` are the last slots in the logs of servers.
fn behind(
    listed: impl Iterator<Item = ServerId>,
    lasts: impl Iterator<Item = (ServerId, u64)>,
    applied: u64,
) -> Option<u64> {
    let listed = listed.filter(|server| server.is_core()).count();
    // Learners may have less than what was answered.
    let lasts: Vec<u64> = lasts
        .filter(|(server, _)| server.is_core())
        .map(|(_, last)| last)
        .collect();
    // Whatever was answered is in the logs of a majority, and every majority shares a server with these.
    let newest = lasts.iter().max().filter(|_| lasts.len() > listed / 2)?;
    Some(newest.saturating_sub(applied))
}

/// Whether another server would hardly answer otherwise.
fn is_final(error: &ReplyError) -> bool {
    match error {
        ReplyError::Refused(_) | ReplyError::Invalid => true,
        // Its copy of a block may be bad, or chunks are being copied to it.
        ReplyError::NotLeader { .. }
        | ReplyError::NoSpace
        | ReplyError::Miscompare(_)
        | ReplyError::Io => false,
    }
}

fn refused(error: ReplyError) -> ClientError {
    match error {
        ReplyError::Refused(refusal) => ClientError::Refused(refusal),
        error => ClientError::Reply(error),
    }
}

fn unavailable(silent: Vec<(ServerId, ServerError)>) -> ClientError {
    ClientError::Unavailable {
        answered: Vec::new(),
        silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_tells_how_far_behind_a_server_is() {
        let behind = |lasts: &[(u8, u64)]| {
            let listed = [0, 1, 2, 5, 6].map(ServerId).into_iter();
            let lasts = lasts
                .iter()
                .map(|(server, last)| (ServerId(*server), *last));
            super::behind(listed, lasts, 100)
        };
        assert_eq!(behind(&[(0, 120), (1, 100)]), Some(20));
        assert_eq!(behind(&[(0, 90), (1, 100), (2, 95)]), Some(0));
        // Learners answer for nothing.
        assert_eq!(behind(&[(0, 120), (5, 120), (6, 500)]), None);
        assert_eq!(behind(&[(0, 120), (1, 110), (6, 500)]), Some(20));
        assert_eq!(behind(&[]), None);
    }
}
