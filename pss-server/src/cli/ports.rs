//! `pss server ports`.

use std::net::SocketAddr;

use clap::Args;
use pss_core::wire::inspect::{Inspect, Inspection, SocketInfo};
use serde_json::{Value, json};

use super::cell::{Access, Told};
use super::links::{asked, failures_text, servers_json, shown};
use super::watch::WatchArgs;
use super::{CellArgs, CliError, parse_id};
use crate::render::printable;

pub(super) const EXAMPLES: &str = "Examples:
  pss server ports            of every server
  pss server ports 2
  pss server ports --json";

#[derive(Args, Debug)]
pub(super) struct PortsArgs {
    /// Of this server [default: all servers]
    #[arg(value_name = "ID", value_parser = parse_id)]
    pub(super) id: Option<u8>,
    #[command(flatten)]
    pub(super) watch: WatchArgs,
}

pub(super) fn run(args: &CellArgs, ports: &PortsArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let ids = asked(&cell, ports.id)?;
    ports.watch.run(args, || {
        let told = cell.inspect_all(&ids, Inspect::Sockets);
        shown(args, &told, ports_json, ports_text)
    })
}

/// The lines of the sockets of all servers that are in use, as `pss_lookup_port.sh` shows them.
pub(super) fn lookup(args: &CellArgs) -> Result<(), CliError> {
    let cell = Access::connect(args)?;
    let told = cell.inspect_all(&asked(&cell, None)?, Inspect::Sockets);
    super::print(&shown(args, &told, ports_json, lookup_text)?)
}

pub(super) fn ports_json(told: &[Told]) -> Value {
    servers_json("pss.server.ports/1", "sockets", told, |found| match found {
        Inspection::Sockets(sockets) => Some(json!(sockets)),
        _ => None,
    })
}

fn ports_text(told: &[Told]) -> String {
    let mut parts = Vec::new();
    for one in told {
        let Ok(Inspection::Sockets(sockets)) = &one.answer else {
            continue;
        };
        let mut part = format!("Server {} at {}\n", one.id, one.address);
        part.push_str(&line(&[
            "Proto",
            "Recv-Q",
            "Send-Q",
            "Local Address",
            "Foreign Address",
            "State",
            "Who",
        ]));
        part.extend(sockets.iter().map(socket_line));
        parts.push(part);
    }
    parts.join("\n") + &failures_text(told)
}

fn lookup_text(told: &[Told]) -> String {
    let sockets = told.iter().filter_map(|one| match &one.answer {
        Ok(Inspection::Sockets(sockets)) => Some(sockets),
        _ => None,
    });
    // UDP has no state.
    let in_use = |socket: &&SocketInfo| matches!(&*socket.state, "LISTEN" | "ESTABLISHED" | "");
    sockets.flatten().filter(in_use).map(socket_line).collect()
}

fn socket_line(socket: &SocketInfo) -> String {
    let remote = socket
        .remote
        .clone()
        .unwrap_or_else(|| anyone(&socket.local));
    line(&[
        &socket.protocol,
        &socket.receive_queue_bytes.to_string(),
        &socket.send_queue_bytes.to_string(),
        &socket.local,
        &remote,
        &socket.state,
        socket.who.as_deref().unwrap_or_default(),
    ])
}

/// The other end of a socket that has none, as netstat writes it.
fn anyone(local: &str) -> String {
    match local.parse::<SocketAddr>() {
        Ok(SocketAddr::V6(_)) => ":::*".to_owned(),
        _ => "0.0.0.0:*".to_owned(),
    }
}

/// In the columns of netstat.
fn line(cells: &[&str; 7]) -> String {
    let [protocol, received, sent, local, remote, state, who] = cells.map(printable);
    let text =
        format!("{protocol:<5} {received:>6} {sent:>6} {local:<23} {remote:<23} {state:<11} {who}");
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use pss_core::client::ServerError;

    use super::super::links::tests::told;
    use super::*;

    fn socket(protocol: &str, local: &str, remote: Option<&str>, state: &str) -> SocketInfo {
        SocketInfo {
            protocol: protocol.into(),
            local: local.into(),
            remote: remote.map(Into::into),
            state: state.into(),
            receive_queue_bytes: 0,
            send_queue_bytes: 0,
            who: None,
        }
    }

    fn servers() -> Vec<Told> {
        let listen = socket("tcp", "192.0.2.0:4010", None, "LISTEN");
        let mut client = socket(
            "tcp",
            "192.0.2.0:4010",
            Some("192.0.2.9:51000"),
            "ESTABLISHED",
        );
        client.receive_queue_bytes = 48;
        client.send_queue_bytes = 4096;
        client.who = Some("pss-iscsi@gw1".into());
        let datagrams = socket("udp", "192.0.2.0:4000", None, "");
        let calling = socket("tcp", "192.0.2.0:52000", Some("192.0.2.2:4012"), "SYN_SENT");
        let six = socket("tcp", "[2001:db8::1]:4011", None, "LISTEN");
        vec![
            told(
                0,
                Ok(Inspection::Sockets(vec![
                    datagrams, listen, client, calling,
                ])),
            ),
            told(1, Ok(Inspection::Sockets(vec![six]))),
            told(2, Err(ServerError::Closed)),
        ]
    }

    #[test]
    fn sockets_as_netstat_shows_them() {
        assert_eq!(
            ports_text(&servers()),
            "Server 0 at 192.0.2.0:4010\n\
             Proto Recv-Q Send-Q Local Address           Foreign Address         State       Who\n\
             udp        0      0 192.0.2.0:4000          0.0.0.0:*\n\
             tcp        0      0 192.0.2.0:4010          0.0.0.0:*               LISTEN\n\
             tcp       48   4096 192.0.2.0:4010          192.0.2.9:51000         ESTABLISHED pss-iscsi@gw1\n\
             tcp        0      0 192.0.2.0:52000         192.0.2.2:4012          SYN_SENT\n\
             \n\
             Server 1 at 192.0.2.1:4011\n\
             Proto Recv-Q Send-Q Local Address           Foreign Address         State       Who\n\
             tcp        0      0 [2001:db8::1]:4011      :::*                    LISTEN\n\
             \n\
             Server 2 at 192.0.2.2:4012: the connection was closed\n"
        );
    }

    #[test]
    fn the_old_script_shows_what_is_in_use() {
        assert_eq!(
            lookup_text(&servers()),
            "udp        0      0 192.0.2.0:4000          0.0.0.0:*\n\
             tcp        0      0 192.0.2.0:4010          0.0.0.0:*               LISTEN\n\
             tcp       48   4096 192.0.2.0:4010          192.0.2.9:51000         ESTABLISHED pss-iscsi@gw1\n\
             tcp        0      0 [2001:db8::1]:4011      :::*                    LISTEN\n"
        );
    }

    #[test]
    fn sockets_for_programs() {
        let value = ports_json(&servers());
        assert_eq!(value["schema"], "pss.server.ports/1");
        assert_eq!(value["servers"][0]["sockets"][1]["state"], "LISTEN");
        assert_eq!(value["servers"][0]["sockets"][2]["send_queue_bytes"], 4096);
        assert_eq!(value["servers"][0]["sockets"][2]["receive_queue_bytes"], 48);
        assert_eq!(value["servers"][2]["answers"], false);
    }
}
