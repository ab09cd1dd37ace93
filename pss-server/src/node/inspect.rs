//! What the server tells of its inside to whoever looks after it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use pss_core::engine::ClientId;
use pss_core::time::Instant;
use pss_core::types::{ServerId, Slot};
use pss_core::wire::inspect::{
    ClientInfo, EntryInfo, Inspect, Inspection, LinkInfo, LinkState, OutboundInfo, ProcessInfo,
    SocketInfo,
};

use crate::node::connections::{Kind, Slot as Place};
use crate::node::turn::Node;
use crate::peers::LINK_QUEUE_BYTES_MAX;
use crate::process;
use crate::storage::ReadJob;

impl Node {
    /// Answers a question, or has another thread look for the answer.
    pub(super) fn inspect(&mut self, now: Instant, client: ClientId, tag: u64, what: Inspect) {
        let inspection = match what {
            Inspect::Process => Inspection::Process(self.process_info(now)),
            Inspect::Clients => Inspection::Clients(self.client_infos(now)),
            Inspect::Outbound => Inspection::Outbound(self.outbound_infos()),
            Inspect::Links => Inspection::Links(self.link_infos(now)),
            Inspect::Sockets => Inspection::Sockets(self.socket_infos()),
            Inspect::Files => {
                let volumes = self.engine.open_volumes();
                return self.threads.read(ReadJob::Files {
                    client,
                    tag,
                    volumes,
                });
            }
            // The engine answers it.
            Inspect::Survey(_) => return,
            Inspect::Log { before, count } => {
                return self.show_log(now, client, tag, before, count);
            }
        };
        self.engine.answer_inspection(client, tag, inspection);
    }

    fn show_log(&mut self, now: Instant, client: ClientId, tag: u64, before: Slot, count: u16) {
        let Some(page) = self.engine.log_page(before, count) else {
            return self.entries_read(now, client, tag, Vec::new());
        };
        match self.engine.page_in_memory(page) {
            (entries, None) => self.entries_read(now, client, tag, entries),
            (newer, Some(page)) => self.threads.read(ReadJob::Entries {
                client,
                tag,
                page,
                newer,
            }),
        }
    }

    /// The entries that someone wants to see are there, newest first.
    pub(super) fn entries_read(
        &mut self,
        now: Instant,
        client: ClientId,
        tag: u64,
        entries: Vec<EntryInfo>,
    ) {
        let log = Inspection::Log(self.engine.log_info(now, entries));
        self.engine.answer_inspection(client, tag, log);
    }

    fn process_info(&self, now: Instant) -> ProcessInfo {
        let process::Usage {
            state,
            cpu_ms,
            memory_bytes,
        } = process::usage();
        let program = std::env::current_exe().unwrap_or_default();
        ProcessInfo {
            server: self.config.id,
            pid: std::process::id(),
            state,
            cpu_ms,
            memory_bytes,
            program: program.display().to_string(),
            path: self.config.path.display().to_string(),
            uptime_s: now.since(self.started).as_secs(),
        }
    }

    fn client_infos(&self, now: Instant) -> Vec<ClientInfo> {
        let mut clients: Vec<(ClientId, ClientInfo)> = Vec::new();
        for (_, place) in self.connections.iter() {
            let Kind::Client(load) = &place.kind else {
                continue;
            };
            let info = ClientInfo {
                name: load.name.clone(),
                address: remote(place).unwrap_or_default(),
                connected_ms: milliseconds(now.since(place.opened)),
                idle_ms: place.last_request.map(|at| milliseconds(now.since(at))),
                requests: place.requests,
                in_flight: load.under_way() as u64,
                received_bytes: place.connection.received,
                sent_bytes: place.connection.sent,
                unsent_bytes: place.connection.out.len_bytes() as u64,
            };
            clients.push((place.id, info));
        }
        clients.sort_by_key(|(_, info)| std::cmp::Reverse(info.connected_ms));
        clients.into_iter().map(|(_, info)| info).collect()
    }

    fn outbound_infos(&self) -> Vec<OutboundInfo> {
        let replica = self.engine.replica();
        let last = replica.last().slot.0;
        let views = self.peers.views();
        let infos = views.map(|(server, view)| {
            let place = view.connection.and_then(|at| self.connections.get(at));
            let connection = place.map(|place| &place.connection);
            let durable = replica.durable_at(server);
            OutboundInfo {
                server,
                address: view.tcp.to_string(),
                link: view.state,
                waiting_bytes: connection.map_or(0, |it| it.out.len_bytes() as u64),
                limit_bytes: LINK_QUEUE_BYTES_MAX as u64,
                dropped: view.counts.dropped,
                sent_bytes: view.counts.sent_bytes + connection.map_or(0, |it| it.sent),
                unacknowledged: durable.map(|durable| last.saturating_sub(durable.0)),
            }
        });
        infos.collect()
    }

    fn link_infos(&self, now: Instant) -> Vec<LinkInfo> {
        let status = self.engine.status(now);
        let views = self.peers.views();
        let infos = views.map(|(server, view)| {
            let peer = status.peers.iter().find(|peer| peer.server == server);
            let place = view.connection.and_then(|at| self.connections.get(at));
            let is_up = view.state == LinkState::Up;
            let socket = place.filter(|_| is_up).map(|it| it.connection.socket());
            let facts = socket.and_then(|socket| tcp_facts(socket.as_raw_fd()).ok());
            let inbound = self.inbound(server);
            let counts = view.counts;
            LinkInfo {
                server,
                alive: peer.is_some_and(|peer| peer.alive),
                silent_ms: peer.and_then(|peer| peer.silent_ms),
                link: view.state,
                up_ms: view.up_since.map(|since| milliseconds(now.since(since))),
                trouble: view.trouble.map(str::to_owned),
                inbound: inbound.is_some(),
                round_trip_us: facts.map(|facts| facts.round_trip_us),
                segments_sent: facts.map_or(0, |facts| facts.segments_sent),
                segments_lost: facts.map_or(0, |facts| facts.segments_lost),
                sent_bytes: counts.sent_bytes + place.map_or(0, |it| it.connection.sent),
                received_bytes: counts.received_bytes + inbound.unwrap_or(0),
                datagrams_sent: counts.datagrams_sent,
                datagrams_received: counts.datagrams_received,
                incarnation: view.incarnation.map(|incarnation| incarnation.0),
                lease: self.engine.lease_with(now, server),
            }
        });
        infos.collect()
    }

    /// Bytes received on the connections that a server has opened to us, if there are any.
    fn inbound(&self, server: ServerId) -> Option<u64> {
        let from = |place: &Place| matches!(place.kind, Kind::Inbound(from, _) if from == server);
        let places = self.connections.iter().filter(|(_, place)| from(place));
        let received = places.map(|(_, place)| place.connection.received);
        received.fold(None, |sum, bytes| Some(sum.unwrap_or(0) + bytes))
    }

    fn socket_infos(&self) -> Vec<SocketInfo> {
        let (udp, listener) = (&self.sockets.udp, &self.sockets.listener);
        let datagrams = queues(udp.as_raw_fd());
        let mut sockets = vec![
            SocketInfo {
                protocol: "udp".to_owned(),
                local: text(udp.local_addr()),
                remote: None,
                state: String::new(),
                receive_queue_bytes: datagrams.received,
                send_queue_bytes: datagrams.sent,
                who: None,
            },
            SocketInfo {
                protocol: "tcp".to_owned(),
                local: text(listener.local_addr()),
                remote: None,
                state: "LISTEN".to_owned(),
                receive_queue_bytes: 0,
                send_queue_bytes: 0,
                who: None,
            },
        ];
        let places = self.connections.iter();
        sockets.extend(places.map(|(_, place)| socket_info(place)));
        sockets
    }
}

fn socket_info(place: &Place) -> SocketInfo {
    let (state, who) = match &place.kind {
        Kind::Calling(server, _) if !place.connected => {
            ("SYN_SENT", Some(format!("server {server}")))
        }
        Kind::Inbound(server, _) | Kind::Outbound(server) | Kind::Calling(server, _) => {
            ("ESTABLISHED", Some(format!("server {server}")))
        }
        Kind::Client(load) => ("ESTABLISHED", Some(load.name.clone())),
        Kind::Caller(_) => ("ESTABLISHED", None),
    };
    let socket = place.connection.socket();
    let kernel = queues(socket.as_raw_fd());
    SocketInfo {
        protocol: "tcp".to_owned(),
        local: text(socket.local_addr()),
        remote: remote(place),
        state: state.to_owned(),
        receive_queue_bytes: kernel.received,
        send_queue_bytes: place.connection.out.len_bytes() as u64 + kernel.sent,
        who,
    }
}

fn text(address: io::Result<SocketAddr>) -> String {
    address.map_or_else(|_| String::new(), |it| it.to_string())
}

/// Bytes that a socket holds in the kernel.
struct Queues {
    received: u64,
    sent: u64,
}

/// What netstat shows as Recv-Q and Send-Q; nothing if the kernel does not tell (tcp(7), udp(7)).
fn queues(socket: RawFd) -> Queues {
    let ask = |what| {
        let mut bytes: libc::c_int = 0;
        #[expect(unsafe_code, reason = "std does not ask for SIOCINQ and SIOCOUTQ")]
        // SAFETY: both requests write one int, which lives through the call.
        let result = unsafe { libc::ioctl(socket, what, &raw mut bytes) };
        match result {
            0 => u64::try_from(bytes).unwrap_or(0),
            _ => 0,
        }
    };
    Queues {
        // SIOCINQ and SIOCOUTQ have the numbers of these.
        received: ask(libc::FIONREAD),
        sent: ask(libc::TIOCOUTQ),
    }
}

fn remote(place: &Place) -> Option<String> {
    let address = place.connection.socket().peer_addr();
    address.ok().map(|address| address.to_string())
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis() as u64
}

/// What the kernel has measured of a TCP connection.
#[derive(Clone, Copy, Debug)]
struct TcpFacts {
    /// Smoothed (RFC 6298).
    round_trip_us: u32,
    /// With data.
    segments_sent: u64,
    /// Of them, sent again.
    segments_lost: u64,
}

#[expect(unsafe_code, reason = "std does not ask for TCP_INFO")]
fn tcp_facts(socket: RawFd) -> io::Result<TcpFacts> {
    // SAFETY: all fields of `tcp_info` are integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` has `length` bytes and lives through the call; an older kernel fills fewer, and the rest stays
    // zero.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpFacts {
        round_trip_us: info.tcpi_rtt,
        segments_sent: u64::from(info.tcpi_data_segs_out),
        segments_lost: u64::from(info.tcpi_total_retrans),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn queues_of_a_socket_are_what_waits_in_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut reader, _) = listener.accept().unwrap();
        assert_eq!(queues(listener.as_raw_fd()).received, 0);
        writer.write_all(&[7; 1000]).unwrap();
        // Over loopback it has arrived when the call returns.
        assert_eq!(queues(reader.as_raw_fd()).received, 1000);
        reader.read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(queues(reader.as_raw_fd()).received, 0);
        // What the reader does not take stays with the writer.
        writer.set_nonblocking(true).unwrap();
        while writer.write(&[7; 1 << 16]).is_ok() {}
        assert!(queues(writer.as_raw_fd()).sent > 0);
        assert!(queues(reader.as_raw_fd()).received > 0);
    }
}
