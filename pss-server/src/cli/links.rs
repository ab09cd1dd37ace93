//! `pss server links`.

use clap::Args;
use pss_core::size::Size;
use pss_core::types::ServerId;
use pss_core::wire::inspect::{Inspect, Inspection, LinkInfo, LinkState};
use serde_json::{Value, json};

use super::cell::{Access, Told, check_any_answers};
use super::probe::{link_word, span_text};
use super::watch::WatchArgs;
use super::{CellArgs, CliError, json_text, parse_id, print};
use crate::render::{Table, left, right, span};

pub(super) const EXAMPLES: &str = "Examples:
  pss server links            every server to every other
  pss server links 2          as server 2 sees them
  pss server links --watch";

#[derive(Args, Debug)]
pub(super) struct LinksArgs {
    /// As this server sees them [default: all servers]
    #[arg(value_name = "ID", value_parser = parse_id)]
    pub(super) id: Option<u8>,
    #[command(flatten)]
    pub(super) watch: WatchArgs,
}

pub(super) fn run(args: &CellArgs, links: &LinksArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let ids = asked(&cell, links.id)?;
    links.watch.run(args, || {
        let told = cell.inspect_all(&ids, Inspect::Links);
        shown(args, &told, links_json, links_text)
    })
}

/// One server, or all.
pub(super) fn asked(cell: &Access, id: Option<u8>) -> Result<Vec<ServerId>, CliError> {
    match id {
        Some(id) => Ok(vec![cell.listed(id)?]),
        None => Ok(cell.files.file.ids()),
    }
}

/// What several servers told. If none answered, programs still get the document that says so.
pub(super) fn shown(
    args: &CellArgs,
    told: &[Told],
    to_json: impl FnOnce(&[Told]) -> Value,
    to_text: impl FnOnce(&[Told]) -> String,
) -> Result<String, CliError> {
    let any = check_any_answers(told);
    if args.json {
        let document = json_text(&to_json(told));
        if any.is_err() {
            print(&document)?;
        }
        return any.map(|()| document);
    }
    any.map(|()| to_text(told))
}

/// A document about several servers; `answer` is what it holds of one that answered.
pub(super) fn servers_json(
    schema: &str,
    name: &str,
    told: &[Told],
    answer: impl Fn(&Inspection) -> Option<Value>,
) -> Value {
    let servers: Vec<Value> = told
        .iter()
        .map(|told| {
            json!({
                "id": told.id,
                "address": told.address,
                "answers": told.answer.is_ok(),
                "failure": told.answer.as_ref().err().map(ToString::to_string),
                name: told.answer.as_ref().ok().and_then(&answer),
            })
        })
        .collect();
    json!({ "schema": schema, "servers": servers })
}

/// The lines about servers that did not answer, below a blank line.
pub(super) fn failures_text(told: &[Told]) -> String {
    let failures: Vec<String> = told.iter().filter_map(Told::failure).collect();
    match failures.is_empty() {
        true => String::new(),
        false => format!("\n{}\n", failures.join("\n")),
    }
}

fn links_json(told: &[Told]) -> Value {
    servers_json("pss.server.links/1", "links", told, |found| match found {
        Inspection::Links(links) => Some(json!(links)),
        _ => None,
    })
}

fn links_text(told: &[Told]) -> String {
    let mut table = Table::new([
        left("FROM"),
        left("TO"),
        left("LINK"),
        right("UP FOR"),
        right("ROUND TRIP"),
        right("LOSS"),
        right("SENT"),
        right("RECEIVED"),
        right("INCARNATION"),
        left("LEASE"),
        left("TROUBLE"),
    ]);
    for one in told {
        let Ok(Inspection::Links(links)) = &one.answer else {
            continue;
        };
        for link in links {
            table.row([
                one.id.to_string(),
                link.server.to_string(),
                link_word(&link.link),
                span_text(link.up_ms),
                link.round_trip_us.map_or("-".to_owned(), round_trip),
                loss(link.segments_lost, link.segments_sent),
                Size(link.sent_bytes).to_string(),
                Size(link.received_bytes).to_string(),
                link.incarnation
                    .map_or("-".to_owned(), |life| life.to_string()),
                lease(link),
                trouble(link),
            ]);
        }
    }
    table.render() + &failures_text(told)
}

fn round_trip(microseconds: u32) -> String {
    format!("{}.{:03} ms", microseconds / 1000, microseconds % 1000)
}

/// The share of segments that were lost; a dash if none was sent.
fn loss(lost: u64, sent: u64) -> String {
    match sent {
        0 => "-".to_owned(),
        _ => format!("{:.2}%", lost as f64 * 100.0 / sent as f64),
    }
}

fn lease(link: &LinkInfo) -> String {
    match link.lease {
        Some(lease) => format!("server {}, {} ms left", lease.holder, lease.left_ms),
        None => "-".to_owned(),
    }
}

/// Everything that is not as it should be.
fn trouble(link: &LinkInfo) -> String {
    let mut troubles = Vec::new();
    if !link.alive {
        troubles.push(match link.silent_ms {
            Some(silent) => format!("not heard of for {}", span(silent / 1000)),
            None => "never heard of".to_owned(),
        });
    }
    if link.link == LinkState::Up && !link.inbound {
        troubles.push("has not connected to this one".to_owned());
    }
    troubles.extend(link.trouble.clone());
    troubles.join("; ")
}

#[cfg(test)]
pub(super) mod tests {
    use pss_core::client::ServerError;
    use pss_core::wire::auth::HandshakeError;
    use pss_core::wire::client::ReplyError;
    use pss_core::wire::inspect::LeaseInfo;

    use super::super::Exit;
    use super::*;

    /// The answer of a server at 192.0.2.ID.
    pub(in crate::cli) fn told(id: u8, answer: Result<Inspection, ServerError>) -> Told {
        Told {
            id: ServerId(id),
            address: format!("192.0.2.{id}:401{id}"),
            answer,
        }
    }

    fn link(server: u8) -> LinkInfo {
        LinkInfo {
            server: ServerId(server),
            alive: true,
            silent_ms: Some(20),
            link: LinkState::Up,
            up_ms: Some(7_200_000),
            trouble: None,
            inbound: true,
            round_trip_us: Some(1234),
            segments_sent: 10_000,
            segments_lost: 12,
            sent_bytes: 3 << 29,
            received_bytes: 4096,
            datagrams_sent: 1,
            datagrams_received: 2,
            incarnation: Some(7),
            lease: Some(LeaseInfo {
                holder: ServerId(0),
                left_ms: 480,
            }),
        }
    }

    fn broken() -> LinkInfo {
        LinkInfo {
            alive: false,
            silent_ms: Some(14_900),
            link: LinkState::Down,
            up_ms: None,
            trouble: Some("Connection refused (os error 111)".into()),
            inbound: false,
            round_trip_us: None,
            segments_sent: 0,
            segments_lost: 0,
            incarnation: None,
            lease: None,
            ..link(2)
        }
    }

    fn three() -> Vec<Told> {
        vec![
            told(0, Ok(Inspection::Links(vec![link(1), broken()]))),
            told(1, Ok(Inspection::Links(vec![link(0)]))),
            told(2, Err(ServerError::Closed)),
        ]
    }

    #[test]
    fn links_for_people() {
        assert_eq!(
            links_text(&three()),
            "FROM  TO  LINK  UP FOR  ROUND TRIP   LOSS  SENT  RECEIVED  INCARNATION  LEASE                  TROUBLE\n\
             0     1   up       2 h    1.234 ms  0.12%  1.5G        4K            7  server 0, 480 ms left\n\
             0     2   down       -           -      -  1.5G        4K            -  -                      not heard of for 14 s; Connection refused (os error 111)\n\
             1     0   up       2 h    1.234 ms  0.12%  1.5G        4K            7  server 0, 480 ms left\n\
             \n\
             Server 2 at 192.0.2.2:4012: the connection was closed\n"
        );
    }

    #[test]
    fn links_for_programs() {
        let value = links_json(&three());
        assert_eq!(value["schema"], "pss.server.links/1");
        assert_eq!(value["servers"][0]["id"], 0);
        assert_eq!(value["servers"][0]["links"][1]["server"], 2);
        assert_eq!(value["servers"][0]["links"][0]["lease"]["holder"], 0);
        assert_eq!(value["servers"][2]["answers"], false);
        assert_eq!(value["servers"][2]["failure"], "the connection was closed");
        assert_eq!(value["servers"][2]["links"], Value::Null);
    }

    #[test]
    fn troubles_have_names() {
        let never = LinkInfo {
            alive: false,
            silent_ms: None,
            inbound: false,
            ..link(1)
        };
        assert_eq!(
            trouble(&never),
            "never heard of; has not connected to this one"
        );
    }

    #[test]
    fn without_an_answer_it_fails() {
        let refused = || ServerError::Io(std::sync::Arc::new(std::io::Error::other("refused")));
        let nobody = [told(0, Err(refused())), told(1, Err(ServerError::Closed))];
        let error = check_any_answers(&nobody).unwrap_err();
        assert_eq!(error.exit, Exit::NoQuorum);
        assert_eq!(
            error.message,
            "no server answers: server 0 at 192.0.2.0:4010: refused; server 1 at 192.0.2.1:4011: the connection was closed"
        );
        let error = check_any_answers(&nobody[..1]).unwrap_err();
        assert_eq!(error.exit, Exit::NoQuorum);
        assert!(
            error
                .message
                .starts_with("server 0 does not answer at 192.0.2.0:4010 (refused)"),
            "{}",
            error.message
        );
        let server = Some(ServerId(1));
        let denial = ServerError::Handshake(HandshakeError::Proof { server });
        let denied = [told(0, Err(refused())), told(1, Err(denial))];
        assert_eq!(check_any_answers(&denied).unwrap_err().exit, Exit::Denied);

        // Servers of before this question.
        let old = || Err(ServerError::Reply(ReplyError::Invalid));
        let error = check_any_answers(&[told(0, old()), told(1, old())]).unwrap_err();
        assert_eq!(error.exit, Exit::Unsupported);
        assert_eq!(
            error.message,
            "servers 0 at 192.0.2.0:4010, 1 at 192.0.2.1:4011 do not know the question: they are too old; update pssd there"
        );
        let mixed = [told(0, Err(refused())), told(1, old())];
        let error = check_any_answers(&mixed).unwrap_err();
        assert_eq!(error.exit, Exit::Unsupported);
        assert_eq!(
            error.message,
            "server 1 at 192.0.2.1:4011 does not know the question: it is too old; update pssd there; server 0 at 192.0.2.0:4010: refused"
        );
        assert_eq!(
            check_any_answers(&mixed[1..]).unwrap_err().exit,
            Exit::Unsupported
        );
        assert!(failures_text(&mixed).contains("too old"));
    }
}
