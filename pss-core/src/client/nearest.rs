//! Answers of the nearest server, whether it leads or not: they may lack what was changed last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use crate::client::leader::{Connection, Dialer};
use crate::client::{ClientError, ServerError};
use crate::types::ServerId;
use crate::wire::client::{Browse, ReplyBody, ReplyError, RequestBody, ServerStatus};

/// Idle connections that are kept: as many requests may be under way without a new connection for each.
const IDLE_MAX: usize = 8;

/// Where a server stands, and the connection on which it said so.
type Standing = (Connection, ServerStatus);

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
    /// The servers that were asked, with what each had applied before it was asked first.
    used: BTreeMap<ServerId, u64>,
}

/// How far answers may be behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Freshness {
    /// The server that gave them; if there were several, the one that had least.
    pub server: ServerId,
    /// They hold at least everything up to this slot.
    pub applied: u64,
    /// At most so many slots of the log, which others may have answered for, are missing in them. None: no
    /// majority of the core servers answers, so nobody can tell.
    pub behind_slots_max: Option<u64>,
}

impl Nearest {
    pub(super) fn new(dialer: Arc<Dialer>) -> Nearest {
        Nearest {
            dialer,
            state: Mutex::default(),
        }
    }

    /// Has the nearest server look at its volumes. One that cannot answer, because it fails or chunks are being copied
    /// to it, is replaced by the next; each is asked once.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Unavailable`] if no server answers.
    pub async fn browse(&self, what: Browse) -> Result<ReplyBody, ClientError> {
        let body = RequestBody::Browse { stale: true, what };
        let limit = self.dialer.config.request_timeout;
        let mut failed = BTreeMap::new();
        loop {
            let Some((mut connection, is_old)) = self.connection(&mut failed).await else {
                return Err(unavailable(failed.into_iter().collect()));
            };
            let server = connection.server;
            let asked = connection.ask(body.clone());
            let error = match tokio::time::timeout(limit, asked).await {
                Ok(Ok(answer)) => {
                    self.put_back(connection);
                    return Ok(answer);
                }
                Ok(Err(ServerError::Reply(error))) if is_final(&error) => {
                    self.put_back(connection);
                    return Err(refused(error));
                }
                Ok(Err(error)) => error,
                Err(_) => ServerError::TimedOut(limit),
            };
            if is_old && matches!(error, ServerError::Closed | ServerError::Io(_)) {
                // Closed while nothing was under way: that says nothing of the server.
                self.lock().idle.clear();
                continue;
            }
            tracing::debug!(%server, %error, "the nearest server is replaced");
            self.forget(server);
            failed.insert(server, error);
        }
    }

    /// How far the answers that were given may be behind what was answered before the first of them was asked for.
    /// None if none was given.
    pub async fn freshness(&self) -> Option<Freshness> {
        let (server, applied) = {
            let state = self.lock();
            let least = state.used.iter().min_by_key(|(_, applied)| **applied);
            least.map(|(server, applied)| (*server, *applied))?
        };
        let mut answers = self.ask_statuses(|_| true);
        let mut lasts = Vec::new();
        while let Some(answer) = answers.join_next().await {
            if let (server, Ok((_, status))) = answer.expect("questions do not panic") {
                lasts.push((server, status.last));
            }
        }
        let listed = self.dialer.config.servers.iter().map(|(server, _)| *server);
        Some(Freshness {
            server,
            applied,
            behind_slots_max: behind(listed, lasts.into_iter(), applied),
        })
    }

    /// The nearest server, if one is known.
    pub fn server(&self) -> Option<ServerId> {
        self.lock().server
    }

    /// A connection to the nearest server that has not failed, and whether it was used before.
    async fn connection(
        &self,
        failed: &mut BTreeMap<ServerId, ServerError>,
    ) -> Option<(Connection, bool)> {
        let known = {
            let mut state = self.lock();
            if let Some(connection) = state.idle.pop() {
                return Some((connection, true));
            }
            state.server.filter(|server| !failed.contains_key(server))
        };
        if let Some(server) = known {
            match standing(&self.dialer, server).await {
                Ok((connection, status)) if status.copying.is_none() => {
                    self.choose(server, status.applied);
                    return Some((connection, false));
                }
                Ok(_) => {
                    self.forget(server);
                    failed.insert(server, incomplete());
                }
                Err(error) => {
                    tracing::debug!(%server, %error, "the nearest server is replaced");
                    self.forget(server);
                    failed.insert(server, error);
                }
            }
        }
        let mut answers = self.ask_statuses(|server| !failed.contains_key(&server));
        while let Some(answer) = answers.join_next().await {
            match answer.expect("questions do not panic") {
                (server, Ok((connection, status))) if status.copying.is_none() => {
                    self.choose(server, status.applied);
                    return Some((connection, false));
                }
                (server, Ok(_)) => _ = failed.insert(server, incomplete()),
                (server, Err(error)) => _ = failed.insert(server, error),
            }
        }
        None
    }

    /// Asks servers where they stand, all at once.
    fn ask_statuses(
        &self,
        wanted: impl Fn(ServerId) -> bool,
    ) -> JoinSet<(ServerId, Result<Standing, ServerError>)> {
        let mut questions = JoinSet::new();
        let servers = self.dialer.config.servers.iter();
        for server in servers.map(|(server, _)| *server).filter(|it| wanted(*it)) {
            let dialer = Arc::clone(&self.dialer);
            questions.spawn(async move { (server, standing(&dialer, server).await) });
        }
        questions
    }

    fn choose(&self, server: ServerId, applied: u64) {
        let mut state = self.lock();
        let least = state.used.entry(server).or_insert(applied);
        // It may have come back with less.
        *least = applied.min(*least);
        if state.server != Some(server) {
            state.server = Some(server);
            state.idle.clear();
        }
    }

    fn forget(&self, server: ServerId) {
        let mut state = self.lock();
        if state.server == Some(server) {
            state.server = None;
            state.idle.clear();
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

/// Connects to a server and asks it where it stands.
async fn standing(dialer: &Dialer, server: ServerId) -> Result<Standing, ServerError> {
    let mut connection = dialer.dial(server).await?;
    let status = dialer.status_on(&mut connection).await?;
    Ok((connection, status))
}

/// Chunks are being copied to the server.
fn incomplete() -> ServerError {
    ServerError::Reply(ReplyError::NotLeader { leader: None })
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
        ReplyError::Refused(_) | ReplyError::RefusedNewer(_) | ReplyError::Invalid => true,
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
