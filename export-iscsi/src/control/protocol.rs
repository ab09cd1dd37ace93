//! What is said on the control socket: one [`Request`] a line, one [`Answer`] a line, both JSON.
//!
//! ```text
//! {"verb":"kick","session":7}
//! {"ok":{"session":7,"ended":true}}
//! {"error":{"kind":"not-found","message":"there is no session 7"}}
//! ```

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::edit::Edit;

/// Longest line, bytes.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Time that initiators have to log out, unless a request says another.
pub const LEAVE_SECONDS: u16 = 10;
/// Longest time that a request may give them.
pub const LEAVE_SECONDS_MAX: u16 = 600;

/// What is wanted.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answered by [`super::report::Targets`].
    Targets,
    /// Answered by [`super::report::Sessions`].
    Sessions,
    /// Answered by [`super::report::Connections`].
    Connections,
    /// Answered by [`super::report::Accounts`].
    Accounts,
    /// Asks an initiator to log out, drops its session if it does not, and is answered when it is gone.
    Kick {
        /// Its TSIH.
        session: u16,
        /// Time that it has; [`LEAVE_SECONDS`] if not said.
        within_s: Option<u16>,
    },
    /// Takes no new sessions, and kicks those that are there.
    Drain {
        /// A target; all if not said.
        target: Option<Named>,
        /// Time that initiators have.
        within_s: Option<u16>,
    },
    /// Takes sessions again.
    Undrain {
        /// A target; all if not said.
        target: Option<Named>,
    },
    /// Reads the configuration again; what was edited while running is forgotten.
    Reload {
        /// The only target of which that holds; all if not said.
        target: Option<Named>,
        /// The file that is meant, as an absolute path. It must be the one that the server was started with.
        #[serde(default)]
        file: Option<PathBuf>,
    },
    /// Changes what is exported, until the configuration is read again.
    Edit {
        /// Number of a new target, or that of the target which the edit is about (its name may then be
        /// empty).
        tid: Option<u32>,
        /// Even if sessions use what goes.
        #[serde(default)]
        force: bool,
        /// The change.
        change: Edit,
    },
}

/// A target by number or name.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Named {
    /// tgt's number of it.
    Tid(u32),
    /// Its iSCSI name.
    Name(String),
}

/// What came of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// What was asked for.
    Ok(serde_json::Value),
    /// Nothing was done, because of this.
    Error(Failure),
}

/// Why nothing was done.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub kind: Kind,
    /// For people.
    pub message: String,
}

impl Failure {
    /// A failure.
    pub fn new(kind: Kind, message: impl fmt::Display) -> Failure {
        Failure {
            kind,
            message: message.to_string(),
        }
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request cannot be understood, or breaks a rule.
    Usage,
    /// It is about something that is not there.
    NotFound,
    /// What is to be made is there already.
    Exists,
    /// Something uses it.
    Busy,
    /// The cell cannot be asked.
    Unavailable,
    /// This server does not do that.
    Unsupported,
    /// Something went wrong.
    Failed,
}

/// Parses a line.
///
/// # Errors
/// [`Kind::Usage`] with what is wrong.
pub fn parse(line: &[u8]) -> Result<Request, Failure> {
    serde_json::from_slice(line)
        .map_err(|error| Failure::new(Kind::Usage, format!("no request that I know: {error}")))
}

/// An answer as a line.
pub fn line(answer: &Answer) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_as_lines() {
        let parsed = |line: &str| parse(line.as_bytes());
        assert_eq!(parsed(r#"{"verb":"targets"}"#), Ok(Request::Targets));
        assert_eq!(
            parsed(r#"{"verb":"kick","session":7}"#),
            Ok(Request::Kick {
                session: 7,
                within_s: None
            })
        );
        assert_eq!(
            parsed(r#"{"verb":"drain","target":3,"within_s":1}"#),
            Ok(Request::Drain {
                target: Some(Named::Tid(3)),
                within_s: Some(1)
            })
        );
        let edit = r#"{"verb":"edit","change":{"edit":"delete-lun","target":"a","lun":1}}"#;
        assert!(matches!(
            parsed(edit),
            Ok(Request::Edit { force: false, .. })
        ));
        for wrong in [
            "",
            "[]",
            "targets",
            r#"{"verb":"dance"}"#,
            r#"{"verb":"kick"}"#,
            r#"{"verb":"kick","session":70000}"#,
            r#"{"verb":"kick","session":1,"hard":true}"#,
            r#"{"verb":"edit","change":{"edit":"delete-lun","target":"a","lun":-1}}"#,
        ] {
            assert_eq!(parsed(wrong).unwrap_err().kind, Kind::Usage, "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_parsed_or_refused(line: Vec<u8>) {
            if let Err(failure) = parse(&line) {
                assert_eq!(failure.kind, Kind::Usage);
            }
        }
    }

    #[test]
    fn answers_as_lines() {
        let failure = Failure::new(Kind::NotFound, "gone");
        let text = line(&Answer::Error(failure));
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "{\"error\":{\"kind\":\"not-found\",\"message\":\"gone\"}}\n"
        );
        let text = line(&Answer::Ok(serde_json::json!({"a": 1})));
        assert_eq!(text, b"{\"ok\":{\"a\":1}}\n");
    }
}
