//! Administrative actions as a server tells of them, which may be newer than whoever reads it.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::entry::Origin;
use crate::state::{AdminAction, AdminEvent, Refusal};
use crate::types::Slot;

/// An administrative action in an answer.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ListedEvent {
    /// One that this version knows.
    Known(AdminEvent),
    /// One that a later version made.
    Newer(NewerEvent),
}

/// An administrative action of which this version knows who and when, but not all of the rest.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct NewerEvent {
    /// As [`AdminEvent::number`].
    pub number: u64,
    /// As [`AdminEvent::slot`].
    pub slot: Slot,
    /// As [`AdminEvent::time_ms`].
    pub time_ms: u64,
    /// As [`AdminEvent::by`].
    pub by: Origin,
    /// What, as it was told.
    pub action: Value,
    /// Why it was not done, as it was told; null if it was.
    #[serde(default)]
    pub refused: Value,
}

impl From<AdminEvent> for ListedEvent {
    fn from(event: AdminEvent) -> ListedEvent {
        ListedEvent::Known(event)
    }
}

impl ListedEvent {
    /// Counts the events of the cell, from 1.
    pub fn number(&self) -> u64 {
        match self {
            ListedEvent::Known(event) => event.number,
            ListedEvent::Newer(event) => event.number,
        }
    }

    /// Slot of the entry that did it.
    pub fn slot(&self) -> Slot {
        match self {
            ListedEvent::Known(event) => event.slot,
            ListedEvent::Newer(event) => event.slot,
        }
    }

    /// When, as [`AdminEvent::time_ms`].
    pub fn time_ms(&self) -> u64 {
        match self {
            ListedEvent::Known(event) => event.time_ms,
            ListedEvent::Newer(event) => event.time_ms,
        }
    }

    /// Who asked for it.
    pub fn by(&self) -> &Origin {
        match self {
            ListedEvent::Known(event) => &event.by,
            ListedEvent::Newer(event) => &event.by,
        }
    }

    /// What it was, as it was told.
    pub fn action(&self) -> Value {
        match self {
            ListedEvent::Known(event) => {
                serde_json::to_value(&event.action).expect("plain structures into memory")
            }
            ListedEvent::Newer(event) => event.action.clone(),
        }
    }

    /// Why it was not done, if it was not.
    pub fn refused(&self) -> Option<String> {
        match self {
            ListedEvent::Known(event) => event.refused.map(|refusal| refusal.to_string()),
            ListedEvent::Newer(event) => match Refusal::deserialize(&event.refused) {
                Ok(refusal) => Some(refusal.to_string()),
                Err(_) if event.refused.is_null() => None,
                Err(_) => Some(unknown(&event.refused)),
            },
        }
    }
}

/// What was done, or was not, for people, as of [`AdminEvent`].
impl fmt::Display for ListedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event = match self {
            ListedEvent::Known(event) => return event.fmt(f),
            ListedEvent::Newer(event) => event,
        };
        let kind = &event.action["kind"];
        match (AdminAction::deserialize(&event.action), kind.as_str()) {
            // Then it is the refusal that is not known.
            (Ok(_), Some(kind)) => f.write_str(kind)?,
            _ => f.write_str(&unknown(kind))?,
        }
        match self.refused() {
            Some(refused) => write!(f, ": {refused}"),
            None => Ok(()),
        }
    }
}

/// A word of a later version.
fn unknown(word: &Value) -> String {
    match word {
        Value::String(word) => format!("unknown ({word})"),
        word => format!("unknown ({word})"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listed(action: Value, refused: Value) -> ListedEvent {
        let event = json!({
            "number": 7, "slot": 8, "time_ms": 9, "later": [1],
            "by": { "name": "pss@host", "user": "alice", "address": "10.0.0.5:4711" },
            "action": action, "refused": refused,
        });
        serde_json::from_value(event).unwrap()
    }

    #[test]
    fn what_is_known_is_known() {
        let note = json!({ "kind": "note", "text": "stop server 1", "later": 1 });
        let event = listed(note, Value::Null);
        assert!(matches!(&event, ListedEvent::Known(event) if event.number == 7));
        assert_eq!(event.to_string(), "stop server 1");
        assert_eq!(event.refused(), None);
    }

    #[test]
    fn what_later_versions_do_is_shown_as_far_as_it_is_known() {
        let action = json!({ "kind": "snapshot", "of": "vol001" });
        let event = listed(action.clone(), Value::Null);
        assert_eq!(event.to_string(), "unknown (snapshot)");
        assert_eq!((event.number(), event.slot()), (7, Slot(8)));
        assert_eq!((event.time_ms(), &*event.by().user), (9, "alice"));
        assert_eq!((event.action(), event.refused()), (action, None));
        let event = listed(json!(3), json!("NoSuchVolume"));
        assert_eq!(event.to_string(), "unknown (null): no such volume");
        let event = listed(json!({ "kind": "note", "text": "x" }), json!("Frozen"));
        assert_eq!(event.to_string(), "note: unknown (Frozen)");
    }
}
