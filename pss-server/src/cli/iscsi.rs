//! `pss iscsi`: sees and steers the `pss-iscsi` of this machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use export_iscsi::control::client::{ClientError, ask};
use export_iscsi::control::protocol::{Kind, LEAVE_SECONDS, LEAVE_SECONDS_MAX, Named, Request};
use export_iscsi::control::report::{Accounts, Connections, Sessions, State, Targets, now_s};
use pss_core::size::Size;
use pss_gateway::program::parse_time;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{CellArgs, CliError, Exit, print, print_json, say};
use crate::render::{Table, left, printable, right, span};

#[derive(Args, Debug)]
pub(super) struct IscsiArgs {
    /// Control socket of pss-iscsi
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "PSS_ISCSI_CONTROL",
        default_value = export_iscsi::control::SOCKET
    )]
    control: PathBuf,
    #[command(subcommand)]
    verb: IscsiVerb,
}

#[derive(Debug, Subcommand)]
enum IscsiVerb {
    /// Lists targets with their disks, and who may use them
    Targets,
    /// Lists sessions: who, from where, since when, and how much
    Sessions,
    /// Lists the connections of all sessions
    Connections,
    /// Lists CHAP accounts and what they are for; never secrets
    Accounts,
    /// Ends a session: asks its initiator to log out, and drops it if it does not
    Kick {
        /// Its number, as in 'pss iscsi sessions'
        #[arg(value_name = "SESSION", value_parser = parse_session)]
        session: u16,
        /// Time that the initiator has to log out
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = within)]
        within: Duration,
    },
    /// Takes no new sessions and ends those that are there, until 'undrain' or 'reload'
    Drain {
        /// Name or number of a target [default: all]
        target: Option<String>,
        /// Time that initiators have to log out
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = within)]
        within: Duration,
    },
    /// Takes sessions again
    Undrain {
        /// Name or number of a target [default: all]
        target: Option<String>,
    },
    /// Reads the configuration again; sessions of targets that are the same go on
    Reload,
}

/// The number of a session.
fn parse_session(text: &str) -> Result<u16, String> {
    let number = "write the session's number, as 'pss iscsi sessions' shows it";
    text.parse().map_err(|_| number.to_owned())
}

/// A time in whole seconds that initiators can be given.
fn within(text: &str) -> Result<Duration, String> {
    if text == "0" || text == "0s" {
        return Ok(Duration::ZERO);
    }
    let time = parse_time(text)?;
    match time > Duration::from_secs(LEAVE_SECONDS_MAX.into()) {
        true => Err(format!("at most {LEAVE_SECONDS_MAX}s")),
        false => Ok(time),
    }
}

fn seconds(time: Duration) -> u16 {
    u16::try_from(time.as_millis().div_ceil(1000)).unwrap_or(LEAVE_SECONDS_MAX)
}

fn named(text: String) -> Named {
    match text.parse() {
        Ok(tid) => Named::Tid(tid),
        Err(_) => Named::Name(text),
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> CliError {
        let exit = match &error {
            ClientError::Absent { .. } => Exit::NoQuorum,
            ClientError::Denied(_) => Exit::Denied,
            ClientError::Timeout(_) => Exit::Timeout,
            ClientError::Broken { .. } => Exit::Failed,
            ClientError::Refused(failure) => match failure.kind {
                Kind::Usage => Exit::Usage,
                Kind::NotFound => Exit::NotFound,
                Kind::Exists | Kind::Busy => Exit::Busy,
                Kind::Unavailable => Exit::NoQuorum,
                Kind::Unsupported => Exit::Unsupported,
                Kind::Failed => Exit::Failed,
            },
        };
        CliError::new(exit, error)
    }
}

/// A request with the time that its answer may take.
struct Asking<'a> {
    args: &'a CellArgs,
    control: PathBuf,
}

impl Asking<'_> {
    fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, CliError> {
        // Initiators first have their time, then are dropped.
        let waits = match request {
            Request::Kick { within_s, .. } | Request::Drain { within_s, .. } => {
                Duration::from_secs(u64::from(within_s.unwrap_or(0)) + 5)
            }
            _ => Duration::ZERO,
        };
        ask(&self.control, request, self.args.timeout + waits).map_err(|error| {
            let mut error = CliError::from(error);
            if error.exit == Exit::NotFound {
                let list = match request {
                    Request::Kick { .. } => "sessions",
                    _ => "targets",
                };
                error
                    .message
                    .push_str(&format!("; 'pss iscsi {list}' shows all"));
            }
            error
        })
    }

    /// Shows a list as text or JSON.
    fn list<T: DeserializeOwned + Serialize>(
        &self,
        request: &Request,
        schema: &str,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let report: T = self.ask(request)?;
        if !self.args.json {
            return print(&text(&report));
        }
        print_json(&with_schema(schema, json!(report)))
    }

    /// Shows what a change came to.
    fn change(
        &self,
        request: &Request,
        schema: &str,
        text: impl FnOnce(&Value) -> String,
    ) -> Result<(), CliError> {
        let answer: Value = self.ask(request)?;
        if let Some(reason) = answer["not_noted"].as_str() {
            let reason = printable(reason);
            say(format!("This may be missing from 'pss events': {reason}"));
        }
        if !self.args.json {
            say(text(&answer));
            return Ok(());
        }
        print_json(&with_schema(schema, answer))
    }
}

fn with_schema(schema: &str, mut value: Value) -> Value {
    value["schema"] = json!(schema);
    value
}

pub(super) fn run(args: &CellArgs, iscsi: IscsiArgs) -> Result<(), CliError> {
    let asking = Asking {
        args,
        control: iscsi.control,
    };
    match iscsi.verb {
        IscsiVerb::Targets => asking.list(&Request::Targets, "pss.iscsi.targets/1", targets_text),
        IscsiVerb::Sessions => asking.list(
            &Request::Sessions,
            "pss.iscsi.sessions/1",
            |sessions: &Sessions| sessions_text(sessions, now_s()),
        ),
        IscsiVerb::Connections => asking.list(
            &Request::Connections,
            "pss.iscsi.connections/1",
            connections_text,
        ),
        IscsiVerb::Accounts => {
            asking.list(&Request::Accounts, "pss.iscsi.accounts/1", accounts_text)
        }
        IscsiVerb::Kick { session, within } => {
            let request = Request::Kick {
                session,
                within_s: Some(seconds(within)),
            };
            asking.change(&request, "pss.iscsi.kick/1", |_| {
                format!("Session {session} has ended.")
            })
        }
        IscsiVerb::Drain { target, within } => {
            let request = Request::Drain {
                target: target.map(named),
                within_s: Some(seconds(within)),
            };
            asking.change(&request, "pss.iscsi.drain/1", drain_text)
        }
        IscsiVerb::Undrain { target } => {
            let request = Request::Undrain {
                target: target.map(named),
            };
            asking.change(&request, "pss.iscsi.undrain/1", |answer| {
                format!("{} sessions again.", takes(answer))
            })
        }
        IscsiVerb::Reload => {
            let request = Request::Reload {
                target: None,
                file: None,
            };
            asking.change(&request, "pss.iscsi.reload/1", reload_text)
        }
    }
}

fn takes(answer: &Value) -> String {
    match answer["target"].as_str() {
        Some(target) => format!("Target {} takes", printable(target)),
        None => "All targets take".to_owned(),
    }
}

fn drain_text(answer: &Value) -> String {
    let left = answer["left"].as_u64().unwrap_or(0);
    let rest = match left {
        0 => String::new(),
        left => format!(" {left} are still there."),
    };
    format!(
        "{} no new sessions; {} ended.{rest}",
        takes(answer),
        answer["asked"].as_u64().unwrap_or(0).saturating_sub(left),
    )
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

fn reload_text(answer: &Value) -> String {
    let changed: Vec<String> = texts(&answer["changed"]).map(printable).collect();
    let changed = match changed.as_slice() {
        [] => "nothing changed".to_owned(),
        names => format!("changed, came or went: {}", names.join(", ")),
    };
    let mut text = match answer["targets"].as_u64() {
        Some(1) => format!("1 target is served; {changed}."),
        _ => format!("{} targets are served; {changed}.", answer["targets"]),
    };
    for ended in texts(&answer["ended"]) {
        text.push_str(&format!(
            "\nended: {}; it has {LEAVE_SECONDS} s to log out",
            printable(ended)
        ));
    }
    for warning in texts(&answer["warnings"]) {
        text.push_str(&format!("\nwarning: {}", printable(warning)));
    }
    for missing in texts(&answer["missing"]) {
        text.push_str(&format!("\nmissing: {}", printable(missing)));
    }
    text
}

/// A list of words, or what it means that there is none.
fn words(words: &[String], none: &str) -> String {
    match words {
        [] => none.to_owned(),
        words => words.join(", "),
    }
}

fn targets_text(targets: &Targets) -> String {
    let mut table = Table::new([
        right("TID"),
        left("TARGET"),
        left("STATE"),
        right("SESSIONS"),
        left("DISKS"),
        left("ACCOUNTS"),
        left("INITIATORS"),
    ]);
    for target in &targets.targets {
        let state = match target.state {
            State::Ready => "ready",
            State::Offline => "offline",
            State::Opening => "opening",
        };
        let disks = target.luns.iter().map(|lun| match lun.online {
            true => format!("{}:{} {}", lun.lun, lun.volume, Size(lun.size_bytes)),
            false => format!("{}:{} missing", lun.lun, lun.volume),
        });
        let disks: Vec<String> = disks.collect();
        let rules = [&*target.initiator_addresses, &*target.initiator_names].concat();
        let none = if target.admits_nobody {
            "nobody"
        } else {
            "all"
        };
        table.row([
            target.tid.to_string(),
            target.name.clone(),
            state.to_owned(),
            target.sessions.to_string(),
            words(&disks, "-"),
            words(&target.accounts, "-"),
            words(&rules, none),
        ]);
    }
    table.render()
}

fn digests(header: bool, data: bool) -> String {
    match (header, data) {
        (true, true) => "header, data",
        (true, false) => "header",
        (false, true) => "data",
        (false, false) => "-",
    }
    .to_owned()
}

fn target_text(target: Option<&String>) -> String {
    target.map_or("(discovery)".to_owned(), String::clone)
}

fn sessions_text(sessions: &Sessions, now_s: u64) -> String {
    let mut table = Table::new([
        right("SESSION"),
        left("INITIATOR"),
        left("ADDRESS"),
        left("TARGET"),
        left("USER"),
        left("DIGESTS"),
        left("SINCE"),
        left("LAST IO"),
        right("TASKS"),
        right("IN"),
        right("OUT"),
    ]);
    for session in &sessions.sessions {
        let addresses = session.connections.iter().map(|it| it.address.to_string());
        let addresses: Vec<String> = addresses.collect();
        let last = match session.idle_ms {
            Some(idle) => format!("{} ago", span(idle / 1000)),
            None => "-".to_owned(),
        };
        table.row([
            session.session.to_string(),
            session.initiator_name.clone(),
            words(&addresses, "-"),
            target_text(session.target.as_ref()),
            session.user.clone().unwrap_or("-".to_owned()),
            digests(session.header_digest, session.data_digest),
            format!("{} ago", span(now_s.saturating_sub(session.since))),
            last,
            session.tasks.to_string(),
            Size(session.received_bytes).to_string(),
            Size(session.sent_bytes).to_string(),
        ]);
    }
    table.render()
}

fn connections_text(connections: &Connections) -> String {
    let mut table = Table::new([
        right("SESSION"),
        right("CID"),
        left("ADDRESS"),
        left("PORTAL"),
        left("INITIATOR"),
        left("TARGET"),
        left("DIGESTS"),
        left("HEARD"),
        right("UNSENT"),
    ]);
    for it in &connections.connections {
        let connection = &it.connection;
        table.row([
            it.session.to_string(),
            connection.cid.to_string(),
            connection.address.to_string(),
            connection.portal.to_string(),
            it.initiator_name.clone(),
            target_text(it.target.as_ref()),
            digests(connection.header_digest, connection.data_digest),
            format!("{} ago", span(connection.silent_ms / 1000)),
            Size(connection.unsent_bytes).to_string(),
        ]);
    }
    table.render()
}

fn accounts_text(accounts: &Accounts) -> String {
    let mut table = Table::new([
        left("USER"),
        left("LETS INTO"),
        left("PROVES"),
        left("DISCOVERY"),
    ]);
    for account in &accounts.accounts {
        let discovery = match (account.discovery, account.outgoing_discovery) {
            (true, _) => "lets in",
            (false, true) => "proves",
            (false, false) => "-",
        };
        table.row([
            account.user.clone(),
            words(&account.targets, "-"),
            words(&account.outgoing_targets, "-"),
            discovery.to_owned(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_initiators() {
        assert_eq!(within("0"), Ok(Duration::ZERO));
        assert_eq!(within("500ms").map(seconds), Ok(1));
        assert_eq!(within("2m").map(seconds), Ok(120));
        assert!(within("601s").is_err() && within("x").is_err());
    }

    #[test]
    fn sessions_as_text() {
        let sessions: Sessions = serde_json::from_value(json!({ "sessions": [{
            "session": 7, "isid": "800000000001", "target": null, "initiator_name": "iqn.x\u{1b}[2J",
            "initiator_alias": "", "user": "u", "header_digest": true, "data_digest": false,
            "since": 100, "tasks": 3, "idle_ms": 2500, "received_bytes": 4096, "sent_bytes": 0,
            "leaving": false, "connections": [],
        }]}))
        .unwrap();
        let text = sessions_text(&sessions, 160);
        assert!(
            text.contains("(discovery)") && text.contains("header"),
            "{text}"
        );
        assert!(text.contains("2 s ago") && text.contains("4K"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn what_a_reload_came_to() {
        let answer = json!({
            "targets": 2, "changed": ["a"], "ended": ["e"], "warnings": ["w"], "missing": ["m"],
        });
        assert_eq!(
            reload_text(&answer),
            "2 targets are served; changed, came or went: a.\n\
             ended: e; it has 10 s to log out\nwarning: w\nmissing: m"
        );
    }
}
