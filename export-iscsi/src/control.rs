//! Seeing and steering a server while it runs, over a unix socket that only its own user can open:
//! [`protocol`] (what is said), [`report`] (what is seen), [`edit`] (what can be changed), [`socket`] (who
//! is served) and [`client`] (the other end, for `pss iscsi` and `pss-tgtadm`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pss_gateway::notes::{Notes, Noting};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::catalog::{Catalog, NotAdmitted};
use crate::config::{ConfigError, Loaded};
use crate::scsi::NexusId;
use crate::server::{Missing, Server};
use crate::sessions::Handle;

pub mod client;
pub mod edit;
pub mod protocol;
pub mod report;
pub mod socket;

use edit::Edit;
use protocol::{Failure, Kind, LEAVE_SECONDS, LEAVE_SECONDS_MAX, Named, Request};

/// Where the socket is, unless configured.
pub const SOCKET: &str = "/run/pss/iscsi.sock";

/// How often it is looked whether initiators have left.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Sessions that were dropped are gone so soon after.
const DROP_TIME: Duration = Duration::from_secs(3);

/// Reads the configuration.
pub type Load = Box<dyn Fn() -> Result<Loaded, ConfigError> + Send + Sync>;

/// A configuration file, with the way to read it.
pub struct Configuration {
    /// Where it is.
    pub file: PathBuf,
    /// Reads it.
    pub load: Load,
}

/// Steers a server.
pub struct Control {
    server: Arc<Server>,
    configuration: Option<Configuration>,
    /// Where it is noted what was done.
    notes: Option<Arc<Notes>>,
    tids: Mutex<Tids>,
    /// Changes of the catalog are made one after the other.
    changing: tokio::sync::Mutex<()>,
}

/// tgt's numbers of targets.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tids(BTreeMap<String, u32>);

impl Tids {
    fn of(&self, name: &str) -> u32 {
        self.0.get(name).copied().unwrap_or(0)
    }

    fn name(&self, tid: u32) -> Option<&str> {
        let mut all = self.0.iter();
        all.find(|(_, it)| **it == tid)
            .map(|(name, _)| name.as_str())
    }

    /// Numbers new targets, and forgets those that are gone. A number is not used again while a higher one
    /// is in use, so that a script that is late does not meet another target.
    fn follow(&mut self, catalog: &Catalog) {
        self.0.retain(|name, _| catalog.targets.contains_key(name));
        for name in catalog.targets.keys() {
            if !self.0.contains_key(name) {
                let next = self.0.values().max().map_or(1, |it| it.saturating_add(1));
                self.0.insert(name.clone(), next);
            }
        }
    }
}

impl Control {
    /// Steers a server; what is done to it is noted, if there are notes.
    pub fn new(
        server: Arc<Server>,
        configuration: Option<Configuration>,
        notes: Option<Arc<Notes>>,
    ) -> Arc<Control> {
        Arc::new(Control {
            server,
            configuration,
            notes,
            tids: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// The numbers of what is exported now.
    fn tids(&self, catalog: &Catalog) -> MutexGuard<'_, Tids> {
        let mut tids = self.tids.lock().unwrap_or_else(PoisonError::into_inner);
        tids.follow(catalog);
        tids
    }

    /// Does what a request of this user wants. What changes something, or was to, is noted; the answer says whether it
    /// was (`noted`, `not_noted`).
    ///
    /// # Errors
    /// [`Failure`] if nothing was done.
    pub async fn handle(&self, user: &str, request: Request) -> Result<Value, Failure> {
        let catalog = self.server.catalog();
        match request {
            Request::Targets => {
                let tids = self.tids(&catalog).clone();
                value(&report::targets(&self.server, &catalog, &tids))
            }
            Request::Sessions => value(&report::sessions(&self.server)),
            Request::Connections => value(&report::connections(&self.server)),
            Request::Accounts => value(&report::accounts(&catalog)),
            Request::Kick { session, within_s } => {
                let within = within(within_s)?;
                let kicked = self.kick(session, within);
                let whose = kicked.as_deref().map(whose).unwrap_or_default();
                let noting = self.note(user, &format!("kick session {session}{whose}"), &kicked);
                let handle = kicked?;
                let answer = self.until_kicked(&handle, within).await;
                Ok(with_note(answer, noting).await)
            }
            Request::Drain { target, within_s } => {
                let within = within(within_s)?;
                let action = format!("drain {}", named(target.as_ref()));
                let drained = match self.find(&catalog, target) {
                    Ok(target) => Ok(self.drain(target, within).await),
                    Err(failure) => Err(failure),
                };
                let what = drained.as_ref().map_or(action, Drained::action);
                let noting = self.note(user, &what, &drained);
                let answer = self.until_drained(&drained?, within).await;
                Ok(with_note(answer, noting).await)
            }
            Request::Undrain { target } => {
                let action = format!("undrain {}", named(target.as_ref()));
                let done = match self.find(&catalog, target) {
                    Ok(target) => {
                        self.set_offline(target.as_deref(), false).await;
                        Ok(target)
                    }
                    Err(failure) => Err(failure),
                };
                let known = done.as_ref().ok().and_then(Option::as_ref);
                let action = known.map_or(action, |name| format!("undrain target {name}"));
                let noting = self.note(user, &action, &done);
                Ok(with_note(json!({ "target": done? }), noting).await)
            }
            Request::Reload { target, file } => {
                let action = match &target {
                    None => "reload the configuration".to_owned(),
                    Some(_) => format!("reload the configuration of {}", named(target.as_ref())),
                };
                let done = self.reload_named(&catalog, target, file.as_deref()).await;
                self.noted_reload(user, action, done).await
            }
            Request::Edit {
                tid,
                force,
                mut change,
            } => {
                let done = self.edit(tid, force, &mut change).await;
                if let (Some(tid), Some(target)) = (tid, change.target())
                    && target.is_empty()
                {
                    *target = format!("number {tid}");
                }
                let forced = if force { " by force" } else { "" };
                let noting = self.note(user, &format!("{change}{forced}"), &done);
                Ok(with_note(done?, noting).await)
            }
        }
    }

    /// Has it noted what somebody did, or tried.
    fn note<T>(&self, user: &str, action: &str, done: &Result<T, Failure>) -> Option<Noting> {
        let notes = self.notes.as_ref()?;
        Some(match done {
            Ok(_) => notes.note(user, action),
            Err(failure) => notes.note(user, &format!("could not {action}: {failure}")),
        })
    }

    fn find(&self, catalog: &Catalog, named: Option<Named>) -> Result<Option<String>, Failure> {
        match named {
            None => Ok(None),
            Some(Named::Tid(tid)) => Ok(Some(self.name_of(catalog, tid)?)),
            Some(Named::Name(name)) => {
                let lower = name.to_lowercase();
                match catalog.targets.contains_key(&lower) {
                    true => Ok(Some(lower)),
                    false => Err(Failure::new(
                        Kind::NotFound,
                        format!("there is no target {name}"),
                    )),
                }
            }
        }
    }

    fn name_of(&self, catalog: &Catalog, tid: u32) -> Result<String, Failure> {
        let tids = self.tids(catalog);
        let name = tids.name(tid).map(str::to_owned);
        name.ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("there is no target with number {tid}"),
            )
        })
    }

    fn kick(&self, tsih: u16, within: Duration) -> Result<Arc<Handle>, Failure> {
        let all = self.server.sessions().all();
        let found = all.into_iter().find(|it| it.tsih == tsih);
        let handle = found
            .ok_or_else(|| Failure::new(Kind::NotFound, format!("there is no session {tsih}")))?;
        info!(session = tsih, initiator = handle.initiator_name, "kicked");
        self.server.kick(tsih, within);
        Ok(handle)
    }

    async fn until_kicked(&self, handle: &Handle, within: Duration) -> Value {
        let ended = self
            .until(within, || handle.session().ending().is_some())
            .await;
        json!({ "session": handle.tsih, "ended": ended })
    }

    async fn drain(&self, target: Option<String>, within: Duration) -> Drained {
        self.set_offline(target.as_deref(), true).await;
        let mut drained = Drained { target, asked: 0 };
        drained.asked = self.left(&drained);
        info!(
            target_name = drained.target.as_deref().unwrap_or("all"),
            sessions = drained.asked,
            "drained"
        );
        self.server.drain(drained.target.as_deref(), within);
        drained
    }

    /// Sessions of a target that are still there.
    fn left(&self, drained: &Drained) -> usize {
        let all = self.server.sessions().all().into_iter();
        let meant = all.filter(|it| {
            let name = it.host.as_ref().map(|host| host.name());
            drained.target.is_none() || name == drained.target.as_deref()
        });
        meant.count()
    }

    async fn until_drained(&self, drained: &Drained, within: Duration) -> Value {
        self.until(within, || self.left(drained) == 0).await;
        json!({ "target": drained.target, "asked": drained.asked, "left": self.left(drained) })
    }

    /// Waits until initiators have left, or were dropped.
    async fn until(&self, within: Duration, mut gone: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + within + DROP_TIME;
        while !gone() {
            if Instant::now() >= end {
                return false;
            }
            sleep(LOOK_AGAIN).await;
        }
        true
    }

    async fn set_offline(&self, target: Option<&str>, offline: bool) {
        let _changing = self.changing.lock().await;
        let mut catalog = Catalog::clone(&self.server.catalog());
        for (name, entry) in &mut catalog.targets {
            if target.is_none_or(|it| it == name) && entry.offline != offline {
                Arc::make_mut(entry).offline = offline;
            }
        }
        self.server.apply(catalog).await;
    }

    /// Reads the configuration again because of a signal. Who sent it is not known. A wrong one changes nothing.
    ///
    /// # Errors
    /// [`Failure`] with all that is wrong.
    pub async fn reload(&self) -> Result<Value, Failure> {
        let done = self.reload_only(None).await;
        let action = "reload the configuration on SIGHUP".to_owned();
        self.noted_reload("", action, done).await
    }

    async fn noted_reload(
        &self,
        user: &str,
        mut action: String,
        done: Result<Value, Failure>,
    ) -> Result<Value, Failure> {
        if let Ok(answer) = &done {
            action.push_str(&came_to(answer));
        }
        let noting = self.note(user, &action, &done);
        Ok(with_note(done?, noting).await)
    }

    async fn reload_named(
        &self,
        catalog: &Catalog,
        target: Option<Named>,
        file: Option<&Path>,
    ) -> Result<Value, Failure> {
        if let Some(file) = file {
            self.check_file(file)?;
        }
        let only = match target {
            None => None,
            Some(Named::Tid(tid)) => Some(self.name_of(catalog, tid)?),
            // It may be new in the configuration.
            Some(Named::Name(name)) => Some(name.to_lowercase()),
        };
        self.reload_only(only.as_deref()).await
    }

    fn configuration(&self) -> Result<&Configuration, Failure> {
        self.configuration.as_ref().ok_or_else(|| {
            let text = "this server has no configuration file to read again";
            Failure::new(Kind::Unsupported, text)
        })
    }

    /// There is one file; who means another is told so.
    fn check_file(&self, meant: &Path) -> Result<(), Failure> {
        let ours = &self.configuration()?.file;
        // Links come to the same file.
        match (meant.canonicalize(), ours.canonicalize()) {
            (Ok(meant), Ok(ours)) if meant == ours => Ok(()),
            _ if meant == ours => Ok(()),
            _ => Err(Failure::new(
                Kind::Usage,
                format!(
                    "{} is not the file that pss-iscsi was started with, which is {}; \
                     start it with --config {0} to use that one",
                    meant.display(),
                    ours.display(),
                ),
            )),
        }
    }

    /// Reads the configuration of one target, or of all, again.
    async fn reload_only(&self, only: Option<&str>) -> Result<Value, Failure> {
        let configuration = self.configuration()?;
        let _changing = self.changing.lock().await;
        let loaded = (configuration.load)().map_err(|error| {
            let text = format!("configuration stays as it was: {error}");
            Failure::new(Kind::Usage, text)
        })?;
        let warnings = loaded.warnings.iter().map(ToString::to_string);
        let mut warnings: Vec<String> = warnings.collect();
        let before = self.server.catalog();
        let next = match only {
            Some(name) => with_target_of(&before, &loaded.catalog, name)?,
            None => loaded.catalog,
        };
        let (targets, changed) = changes(&before, &next);
        let missing = self.server.apply(next).await;
        info!("configuration read again");
        missing.iter().for_each(Missing::log);
        let (ended, stays) = self.end_revoked();
        warnings.extend(stays);
        Ok(json!({
            "targets": targets,
            "changed": changed,
            "ended": ended,
            "warnings": warnings,
            "missing": missing.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }))
    }

    /// Asks initiators whose right to a target is gone to log out, and drops them if they do not; gives
    /// these sessions, and those that go on although they could not log in again as they are.
    fn end_revoked(&self) -> (Vec<String>, Vec<String>) {
        let (revoked, stays): (Vec<_>, Vec<_>) = self
            .server
            .not_admitted()
            .into_iter()
            .partition(|(_, rule)| rule.is_revoked());
        let within = Duration::from_secs(LEAVE_SECONDS.into());
        let ended = revoked.iter().map(|(handle, rule)| {
            let text = shown(handle, *rule);
            warn!("{text}: it has {LEAVE_SECONDS} s to log out");
            self.server.kick(handle.tsih, within);
            text
        });
        let ended = ended.collect();
        let stays = stays.iter().map(|(handle, rule)| {
            let text = format!("{}: that holds from its next login", shown(handle, *rule));
            warn!("{text}");
            text
        });
        (ended, stays.collect())
    }

    /// Sessions that could not log in again since a change. They go on: a change is one step of several that
    /// a script makes, and the next may admit them again.
    fn left_behind(&self, before: &[NexusId]) -> Vec<String> {
        let now = self.server.not_admitted().into_iter();
        let new = now.filter(|(handle, _)| !before.contains(&handle.nexus));
        new.map(|(handle, rule)| {
            let text = shown(&handle, rule);
            format!(
                "{text}, and goes on until it is kicked: pss iscsi kick {}",
                handle.tsih
            )
        })
        .collect()
    }

    /// Makes a change, in which the target is told by its name afterwards.
    async fn edit(
        &self,
        tid: Option<u32>,
        force: bool,
        change: &mut Edit,
    ) -> Result<Value, Failure> {
        let _changing = self.changing.lock().await;
        let catalog = self.server.catalog();
        let tid = self.resolve(&catalog, tid, change)?;
        let (next, mut warnings) = change.apply(&catalog)?;
        if !force {
            self.check_use(change)?;
        }
        if let Edit::NewLun { volume, .. } = change {
            self.check_there(volume).await?;
        }
        info!(?change, "configuration changed");
        let not_admitted = self.server.not_admitted().into_iter();
        let before: Vec<NexusId> = not_admitted.map(|(handle, _)| handle.nexus).collect();
        let missing = self.server.apply(next).await;
        missing.iter().for_each(Missing::log);
        warnings.extend(self.left_behind(&before));
        for warning in &warnings {
            warn!("{warning}");
        }
        if let (Some(tid), Edit::NewTarget { target }) = (tid, change) {
            let mut tids = self.tids(&self.server.catalog());
            tids.0.insert(target.clone(), tid);
        }
        Ok(json!({ "warnings": warnings }))
    }

    /// Puts in the name of a target that was told by its number; gives the number for a new one.
    fn resolve(
        &self,
        catalog: &Catalog,
        tid: Option<u32>,
        change: &mut Edit,
    ) -> Result<Option<u32>, Failure> {
        if let Edit::NewTarget { target } = change {
            *target = target.to_lowercase();
            if tid == Some(0) {
                return Err(Failure::new(Kind::Usage, "number 0 is no target's"));
            }
            let taken = tid.and_then(|tid| self.tids(catalog).name(tid).map(str::to_owned));
            return match (taken, tid) {
                (Some(name), Some(tid)) => Err(Failure::new(
                    Kind::Exists,
                    format!("target number {tid} is {name} already"),
                )),
                _ => Ok(tid),
            };
        }
        if let Some(target) = change.target() {
            *target = match tid {
                Some(tid) => self.name_of(catalog, tid)?,
                None => target.to_lowercase(),
            };
        }
        Ok(None)
    }

    /// What sessions use goes only by force.
    fn check_use(&self, change: &Edit) -> Result<(), Failure> {
        // A disk that is shown in another way is taken away and comes again.
        let (Edit::DeleteTarget { target }
        | Edit::DeleteLun { target, .. }
        | Edit::UpdateLun { target, .. }) = change
        else {
            return Ok(());
        };
        let sessions = self
            .server
            .host(target)
            .map_or(0, |host| host.sessions().len());
        match sessions {
            0 => Ok(()),
            1 => Err(Failure::new(
                Kind::Busy,
                format!("a session uses {target}: kick or drain it first, or use force"),
            )),
            more => Err(Failure::new(
                Kind::Busy,
                format!("{more} sessions use {target}: drain it first, or use force"),
            )),
        }
    }

    async fn check_there(&self, volume: &str) -> Result<(), Failure> {
        match self.server.has_volume(volume).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::new(
                Kind::NotFound,
                format!("there is no volume {volume} in the cell"),
            )),
            Err(error) => Err(Failure::new(
                Kind::Unavailable,
                format!("the cell cannot be asked for volume {volume}: {error}"),
            )),
        }
    }
}

/// What takes no sessions any more.
struct Drained {
    /// A target, or all.
    target: Option<String>,
    /// How many sessions were asked to leave.
    asked: usize,
}

impl Drained {
    fn action(&self) -> String {
        let what = match &self.target {
            Some(name) => format!("target {name}"),
            None => "all targets".to_owned(),
        };
        let sessions = match self.asked {
            1 => "1 session".to_owned(),
            more => format!("{more} sessions"),
        };
        format!("drain {what} of {sessions}")
    }
}

/// A target as it was asked for.
fn named(target: Option<&Named>) -> String {
    match target {
        None => "all targets".to_owned(),
        Some(Named::Tid(tid)) => format!("target number {tid}"),
        Some(Named::Name(name)) => format!("target {name}"),
    }
}

/// What a reload came to, for the note of it.
fn came_to(answer: &Value) -> String {
    let texts = |key: &str| {
        let all = answer[key].as_array().into_iter().flatten();
        all.filter_map(Value::as_str).collect::<Vec<_>>()
    };
    match (texts("ended").len(), texts("changed").as_slice()) {
        (0, []) => ": nothing changed".to_owned(),
        (0, names) => format!(": changed {}", names.join(", ")),
        (ended, names) => format!(": ended {ended} sessions, changed {}", names.join(", ")),
    }
}

/// An answer that says whether the cell has noted what was done.
async fn with_note(mut answer: Value, noting: Option<Noting>) -> Value {
    if let Some(noting) = noting {
        let noted = noting.outcome().await;
        answer["noted"] = noted.is_ok().into();
        if let Err(reason) = noted {
            answer["not_noted"] = reason.to_string().into();
        }
    }
    answer
}

/// Whose a session is.
fn whose(handle: &Handle) -> String {
    let target = handle.host.as_ref().map(|host| host.name());
    format!(
        " of {} with {}",
        handle.initiator_name,
        target.unwrap_or("(discovery)")
    )
}

/// A session that its target would not let in again.
fn shown(handle: &Handle, rule: NotAdmitted) -> String {
    let target = handle.host.as_ref().map_or("", |host| host.name());
    format!(
        "session {} of {} with {target}: {rule}",
        handle.tsih, handle.initiator_name
    )
}

/// What is exported, with one target as a configuration has it.
fn with_target_of(now: &Catalog, read: &Catalog, name: &str) -> Result<Catalog, Failure> {
    let mut next = now.clone();
    let gone = next.targets.remove(name).is_some();
    match read.targets.get(name) {
        Some(entry) => {
            next.targets.insert(name.to_owned(), Arc::clone(entry));
        }
        None if gone => {}
        None => {
            let text = format!("there is no target {name}, nor is there in the configuration");
            return Err(Failure::new(Kind::NotFound, text));
        }
    }
    Ok(next)
}

/// How many targets there are, and which changed, came or went.
fn changes(before: &Catalog, after: &Catalog) -> (usize, Vec<String>) {
    let names = before.targets.keys().chain(after.targets.keys());
    let mut changed: Vec<String> = names
        .filter(|name| before.targets.get(*name) != after.targets.get(*name))
        .cloned()
        .collect();
    changed.sort();
    changed.dedup();
    (after.targets.len(), changed)
}

fn within(seconds: Option<u16>) -> Result<Duration, Failure> {
    let seconds = seconds.unwrap_or(LEAVE_SECONDS);
    match seconds > LEAVE_SECONDS_MAX {
        true => Err(Failure::new(
            Kind::Usage,
            format!("within {seconds} s: at most {LEAVE_SECONDS_MAX} s"),
        )),
        false => Ok(Duration::from_secs(seconds.into())),
    }
}

fn value(report: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(report).map_err(|error| Failure::new(Kind::Failed, error))
}
