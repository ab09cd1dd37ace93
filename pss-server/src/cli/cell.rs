//! The cell as the verbs of `pss` use it, and what its refusals mean to the caller.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pss_core::client::{Cell, CellConfig, ClientError, ServerError, Shrink};
use pss_core::members::Members;
use pss_core::state::{Refusal, Volume};
use pss_core::types::{ServerId, VolumeId};
use pss_core::wire::client::{EventList, ReplyError, VolumeStatus};
use pss_core::wire::inspect::{Inspect, Inspection};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::health::{Answers, Health, Verdict};
use super::{CellArgs, CliError, Exit, say};
use crate::config::CellFiles;
use crate::render::printable;

/// A server that does not accept a connection for so long is taken for unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A client of the cell. Needs a tokio runtime.
pub(crate) fn connect(files: &CellFiles, program: &str, timeout: Duration) -> Arc<Cell> {
    Cell::connect(config(files, program, timeout))
}

/// How a client of the cell reaches it.
pub(crate) fn config(files: &CellFiles, program: &str, timeout: Duration) -> CellConfig {
    let servers = files.servers.ids();
    let servers = servers
        .into_iter()
        .filter_map(|id| Some((id, files.servers.tcp(id)?)))
        .collect();
    let name = format!("{program}@{}", host_name());
    CellConfig {
        key: files.key.clone(),
        client_user: pss_gateway::user::user_name(),
        request_timeout: timeout,
        connect_timeout: CONNECT_TIMEOUT.min(timeout),
        ..CellConfig::new(servers, &name)
    }
}

/// What this machine calls itself.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

/// Where the servers stand that answer.
pub(super) async fn ask_all(files: &CellFiles, cell: &Cell) -> Answers {
    let mut answers = Answers {
        listed: files.servers.ids(),
        statuses: BTreeMap::new(),
        failures: BTreeMap::new(),
    };
    for (id, answer) in cell.status_all().await {
        match answer {
            Ok(status) => _ = answers.statuses.insert(id, status),
            Err(error) => _ = answers.failures.insert(id, error),
        }
    }
    answers
}

/// What a failure means, with the exit code that says so.
pub(crate) async fn explain(files: &CellFiles, cell: &Cell, error: ClientError) -> CliError {
    let exit = match &error {
        ClientError::Unavailable { .. } => {
            let answers = ask_all(files, cell).await;
            return unavailable(&answers);
        }
        ClientError::Refused(refusal) => match refusal {
            Refusal::NoSuchVolume => Exit::NotFound,
            Refusal::VolumeExists | Refusal::VolumeAttached => Exit::Busy,
            Refusal::BadName
            | Refusal::BadSize
            | Refusal::BadChunkSize
            | Refusal::WouldShrink
            | Refusal::EndWithinBlock
            | Refusal::BadServers => Exit::Usage,
            Refusal::StaleSession
            | Refusal::OutOfRange
            | Refusal::TooMany
            | Refusal::OutsideWindow
            | Refusal::ReservationConflict
            | Refusal::InvalidRelease
            | Refusal::TooManyRegistrations
            | Refusal::InvalidReservation
            | Refusal::ReservationsChanged
            | Refusal::Reserved
            | Refusal::Settled
            | Refusal::ServersUnderWay
            | Refusal::ServersOutdated
            | Refusal::ServersTooMuch
            | Refusal::ServerLeads
            | Refusal::MajorityAlive
            | Refusal::Incomplete
            | Refusal::ServerBehind => Exit::Failed,
        },
        ClientError::Reply(ReplyError::NoSpace) => {
            return CliError::new(
                Exit::Failed,
                "no space left on the servers; 'pss status' shows how much each has free",
            );
        }
        ClientError::Reply(ReplyError::Invalid) => {
            let answers = ask_all(files, cell).await;
            return leader_too_old(&answers, |id| files.servers.tcp(id));
        }
        ClientError::Reply(_) | ClientError::Fenced | ClientError::Unexpected => Exit::Failed,
    };
    CliError::new(exit, error)
}

/// What it means that the leader does not know a request: whatever it was, this program made it as its version does.
fn leader_too_old(answers: &Answers, address: impl Fn(ServerId) -> Option<SocketAddr>) -> CliError {
    let mut leaders = answers.statuses.iter();
    let leader = leaders.find(|(_, status)| status.role == "leader");
    let message = match leader {
        Some((id, status)) => {
            let address = address(*id).map(|it| format!(" at {it}"));
            format!(
                "server {id}{}, which leads, does not know this request: it is too old ({}, this is {}); update pssd there, and on the other servers",
                address.unwrap_or_default(),
                printable(&status.version),
                env!("CARGO_PKG_VERSION"),
            )
        }
        None => "the leader does not know this request: it is too old; update pssd on all servers"
            .to_owned(),
    };
    CliError::new(Exit::Unsupported, message)
}

fn unavailable(answers: &Answers) -> CliError {
    if let Some(denied) = denied(answers) {
        return denied;
    }
    let health = answers.judge(None);
    match health.verdict {
        Verdict::NoMajority | Verdict::NoLeader => CliError::new(Exit::NoQuorum, health.sentence()),
        Verdict::Works { .. } => CliError::new(
            Exit::Timeout,
            "the cell works, but did not answer in time; a change may or may not have been made: look before you repeat it, or wait longer with --timeout",
        ),
    }
}

/// The failure to report if servers turn this client away, and none lets it in.
pub(super) fn denied(answers: &Answers) -> Option<CliError> {
    if !answers.statuses.is_empty() {
        return None;
    }
    let (id, error) = answers
        .failures
        .iter()
        .find(|(_, error)| error.is_denial())?;
    Some(turned_away(*id, error))
}

fn turned_away(id: ServerId, error: &ServerError) -> CliError {
    CliError::new(
        Exit::Denied,
        format!(
            "server {id} does not let this client in: {error}; use the cell's own key with --key FILE or PSS_KEY"
        ),
    )
}

/// What it means that one server, on which everything depends, gave no answer.
fn no_answer(id: ServerId, address: &str, error: Option<&ServerError>) -> CliError {
    match error {
        Some(error) if error.is_denial() => turned_away(id, error),
        Some(error) if is_too_old(error) => too_old(&[(id, address)]),
        _ => {
            let reason = error.map(|error| format!(" ({error})")).unwrap_or_default();
            CliError::new(
                Exit::NoQuorum,
                format!(
                    "server {id} does not answer at {address}{reason}; it is not running, or cannot be reached from here"
                ),
            )
        }
    }
}

/// Whether a server does not know the question.
fn is_too_old(error: &ServerError) -> bool {
    matches!(error, ServerError::Reply(ReplyError::Invalid))
}

/// What it means that servers do not know the question.
fn too_old(servers: &[(ServerId, &str)]) -> CliError {
    let names = servers
        .iter()
        .map(|(id, address)| format!("{id} at {address}"));
    let names = names.collect::<Vec<_>>().join(", ");
    let message = match servers {
        [_] => {
            format!("server {names} does not know the question: it is too old; update pssd there")
        }
        _ => {
            format!("servers {names} do not know the question: they are too old; update pssd there")
        }
    };
    CliError::new(Exit::Unsupported, message)
}

/// The cell, for programs that do one thing after the other.
pub(super) struct Access {
    /// What the files say about it.
    pub(super) files: CellFiles,
    cell: Arc<Cell>,
    runtime: Runtime,
}

impl Access {
    pub(super) fn connect(args: &CellArgs) -> Result<Access, CliError> {
        let files = args.read()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CliError::new(Exit::Failed, error))?;
        let cell = {
            let _entered = runtime.enter();
            connect(&files, "pss", args.timeout)
        };
        Ok(Access {
            files,
            cell,
            runtime,
        })
    }

    /// Where the servers stand that answer.
    ///
    /// # Errors
    /// [`Exit::Denied`] if they turn us away.
    pub(super) fn answers(&self) -> Result<Answers, CliError> {
        let answers = self.runtime.block_on(ask_all(&self.files, &self.cell));
        match denied(&answers) {
            Some(error) => Err(error),
            None => Ok(answers),
        }
    }

    /// A server's address for messages.
    pub(super) fn address_text(&self, id: ServerId) -> String {
        let address = self.files.servers.tcp(id);
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    }

    pub(super) fn volumes(&self) -> Result<Vec<VolumeStatus>, CliError> {
        self.wait(self.cell.volumes())
    }

    /// A volume by name.
    pub(super) fn volume(&self, name: &str) -> Result<VolumeStatus, CliError> {
        self.volumes()?
            .into_iter()
            .find(|status| status.volume.name == name)
            .ok_or_else(|| {
                let name = printable(name);
                let message = format!("there is no volume {name}; 'pss volume list' shows all");
                CliError::new(Exit::NotFound, message)
            })
    }

    pub(super) fn create_volume(
        &self,
        name: &str,
        size_bytes: u64,
        chunk_bytes: u32,
    ) -> Result<VolumeId, CliError> {
        self.wait(self.cell.create_volume(name, size_bytes, chunk_bytes))
            .map_err(|error| about(name, error))
    }

    pub(super) fn resize_volume(
        &self,
        volume: &Volume,
        size_bytes: u64,
        shrink: Shrink,
    ) -> Result<(), CliError> {
        self.wait(self.cell.resize_volume(volume.id, size_bytes, shrink))
            .map_err(|error| about(&volume.name, error))
    }

    pub(super) fn delete_volume(&self, volume: &Volume, force: bool) -> Result<(), CliError> {
        self.wait(self.cell.delete_volume(volume.id, force))
            .map_err(|error| about(&volume.name, error))
    }

    /// A server that is listed.
    ///
    /// # Errors
    /// [`Exit::NotFound`].
    pub(super) fn listed(&self, id: u8) -> Result<ServerId, CliError> {
        match self.files.file.record(id) {
            Ok(record) => Ok(record.id),
            Err(error) => Err(CliError::new(Exit::NotFound, error)),
        }
    }

    /// What it means that a server gave no answer.
    pub(super) fn no_answer(&self, id: ServerId, error: Option<&ServerError>) -> CliError {
        no_answer(id, &self.address_text(id), error)
    }

    /// What one server tells of its inside.
    pub(super) fn inspect(&self, id: ServerId, what: Inspect) -> Result<Inspection, CliError> {
        self.runtime
            .block_on(self.cell.inspect(id, what))
            .map_err(|error| self.no_answer(id, Some(&error)))
    }

    /// What some servers tell of their inside, all asked at once.
    pub(super) fn inspect_all(&self, ids: &[ServerId], what: Inspect) -> Vec<Told> {
        let mut told = self.runtime.block_on(async {
            let mut questions = JoinSet::new();
            for &id in ids {
                let cell = Arc::clone(&self.cell);
                questions.spawn(async move { (id, cell.inspect(id, what).await) });
            }
            questions.join_all().await
        });
        told.sort_by_key(|(id, _)| *id);
        told.into_iter()
            .map(|(id, answer)| Told {
                id,
                address: self.address_text(id),
                answer,
            })
            .collect()
    }

    /// Proposes another list of servers. What the cell has against it is for the caller.
    pub(super) fn set_servers(&self, members: Members) -> Result<Option<Refusal>, CliError> {
        match self.runtime.block_on(self.cell.set_servers(members)) {
            Ok(()) => Ok(None),
            Err(ClientError::Refused(refusal)) => Ok(Some(refusal)),
            Err(error) => self.wait(async { Err(error) }),
        }
    }

    /// Has a server give up the majority and go on alone.
    pub(super) fn recover(&self, id: ServerId, members: Members) -> Result<(), ServerError> {
        self.runtime.block_on(self.cell.recover(id, members))
    }

    /// Has the cell note what is about to be done outside of it. If it cannot, says so and goes on.
    pub(super) fn note(&self, health: &Health, text: &str) {
        let noted = match health.verdict {
            Verdict::NoMajority => Err(health.sentence()),
            Verdict::Works { .. } | Verdict::NoLeader => self
                .runtime
                .block_on(self.cell.note(text))
                .map_err(|error| error.to_string()),
        };
        if let Err(reason) = noted {
            say(format!(
                "'{text}' may be missing from 'pss events': {reason}"
            ));
        }
    }

    /// What was done to the cell after the event of this number.
    pub(super) fn events(&self, after: u64) -> Result<EventList, CliError> {
        self.wait(self.cell.events(after))
    }

    /// Stops a server.
    pub(super) fn shutdown(&self, id: ServerId) -> Result<(), CliError> {
        self.runtime
            .block_on(self.cell.shutdown(id))
            .map_err(|error| {
                let address = self.address_text(id);
                CliError::new(Exit::Failed, format!("server {id} at {address}: {error}"))
            })
    }

    fn wait<T>(
        &self,
        request: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, CliError> {
        self.runtime.block_on(async {
            match request.await {
                Ok(done) => Ok(done),
                Err(error) => Err(explain(&self.files, &self.cell, error).await),
            }
        })
    }
}

/// What a server told of its inside, or why it did not.
pub(super) struct Told {
    pub(super) id: ServerId,
    /// Where it was asked.
    pub(super) address: String,
    pub(super) answer: Result<Inspection, ServerError>,
}

impl Told {
    /// The line that tells of a server that did not answer.
    pub(super) fn failure(&self) -> Option<String> {
        let error = self.answer.as_ref().err()?;
        let reason = match is_too_old(error) {
            true => "it is too old to know the question; update pssd there".to_owned(),
            false => error.to_string(),
        };
        Some(format!("Server {} at {}: {reason}", self.id, self.address))
    }
}

/// The failure to report if no server answered.
pub(super) fn check_any_answers(told: &[Told]) -> Result<(), CliError> {
    if told.iter().any(|told| told.answer.is_ok()) {
        return Ok(());
    }
    let errors = || {
        told.iter()
            .filter_map(|told| Some((told, told.answer.as_ref().err()?)))
    };
    if let Some((told, error)) = errors().find(|(_, error)| error.is_denial()) {
        return Err(turned_away(told.id, error));
    }
    let old: Vec<(ServerId, &str)> = errors()
        .filter(|(_, error)| is_too_old(error))
        .map(|(told, _)| (told.id, &*told.address))
        .collect();
    // Those that are reached would not know it later either, whatever is with the others.
    if !old.is_empty() {
        let mut error = too_old(&old);
        let others = errors().filter(|(_, error)| !is_too_old(error));
        for (told, reason) in others {
            let (id, address) = (told.id, &told.address);
            error.message += &format!("; server {id} at {address}: {reason}");
        }
        return Err(error);
    }
    if let [one] = told {
        return Err(no_answer(one.id, &one.address, one.answer.as_ref().err()));
    }
    let reasons: Vec<String> = errors()
        .map(|(told, error)| format!("server {} at {}: {error}", told.id, told.address))
        .collect();
    Err(CliError::new(
        Exit::NoQuorum,
        format!("no server answers: {}", reasons.join("; ")),
    ))
}

/// The failure to report if an answer fits no question; a server would have to be wrong.
pub(super) fn unexpected(id: ServerId) -> CliError {
    CliError::new(
        Exit::Failed,
        format!("server {id}: {}", ServerError::Unexpected),
    )
}

impl Drop for Access {
    /// Ends the session: the cell need not wait until it expires.
    fn drop(&mut self) {
        self.runtime.block_on(self.cell.close());
    }
}

/// A refusal says what is wrong, not with which volume; unreachable servers are about no volume.
fn about(name: &str, error: CliError) -> CliError {
    match error.exit {
        Exit::NotFound | Exit::Busy | Exit::Usage => CliError::new(
            error.exit,
            format!("volume {}: {}", printable(name), error.message),
        ),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use pss_core::client::ServerError;
    use pss_core::wire::auth::HandshakeError;

    use super::super::health::tests::answers;
    use super::*;

    #[test]
    fn a_wrong_key_is_not_a_missing_majority() {
        let mut nobody = answers(3, &[]);
        nobody.statuses.clear();
        assert_eq!(unavailable(&nobody).exit, Exit::NoQuorum);
        let server = Some(ServerId(1));
        let error = ServerError::Handshake(HandshakeError::Proof { server });
        nobody.failures.insert(ServerId(1), error);
        let error = unavailable(&nobody);
        assert_eq!(error.exit, Exit::Denied);
        assert!(error.message.contains("--key"), "{}", error.message);
    }

    #[test]
    fn a_leader_that_is_too_old_is_named() {
        let three = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        let (leader, _) = three
            .statuses
            .iter()
            .find(|(_, status)| status.role == "leader")
            .unwrap();
        let address = |id: ServerId| Some(SocketAddr::from(([192, 0, 2, id.0], 4010)));
        let error = leader_too_old(&three, address);
        assert_eq!(error.exit, Exit::Unsupported);
        let named = format!("server {leader} at 192.0.2.{leader}:4010, which leads, ");
        assert!(error.message.starts_with(&named), "{}", error.message);
        assert!(error.message.contains("update pssd"), "{}", error.message);
        let nobody = answers(3, &[]);
        let error = leader_too_old(
            &Answers {
                statuses: BTreeMap::new(),
                ..nobody
            },
            address,
        );
        assert_eq!(error.exit, Exit::Unsupported);
    }

    #[test]
    fn a_cell_that_works_but_is_slow_is_a_timeout() {
        let three = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        assert_eq!(unavailable(&three).exit, Exit::Timeout);
    }
}
