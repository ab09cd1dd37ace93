//! The other servers: where they are, and the state of our connection to each.
//!
//! A server sends what carries payload on a connection that it has opened itself, and reads from those
//! that the others have opened. What cannot be sent is dropped: the agreement asks for it again.

use std::net::SocketAddr;
use std::time::Duration;

use pss_core::members::Members;
use pss_core::servers::Servers;
use pss_core::time::Instant;
use pss_core::types::{Incarnation, SERVERS_MAX, ServerId};
use pss_core::wire::inspect::LinkState;

/// Frames that wait for one server, bytes. More than the agreement has under way to a server, and what
/// a server that catches up asks for at once.
pub(crate) const LINK_QUEUE_BYTES_MAX: usize = 64 << 20;
/// First pause before a server is called again.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A connection that lasts so long is wanted.
const LASTING: Duration = Duration::from_secs(1);
/// A call that is not answered for this long is given up.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// All other servers of the cell.
pub(crate) struct Peers {
    all: [Option<Peer>; SERVERS_MAX],
}

struct Peer {
    tcp: SocketAddr,
    udp: SocketAddr,
    /// The newest that was heard of: what older ones say does not count any more.
    incarnation: Incarnation,
    /// Who says to be this server, in that incarnation.
    claims: Claims,
    link: Link,
    backoff: Duration,
    /// The last connection did not last: the other end does not want it.
    is_unwanted: bool,
    /// What was logged last about the link, so that it is not logged with every call.
    trouble: String,
    counts: LinkCounts,
}

/// What was exchanged with a server since the start, without what is counted by a connection that is still open.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct LinkCounts {
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) datagrams_sent: u64,
    pub(crate) datagrams_received: u64,
    /// Messages that were not sent: there was no connection, or too much waited.
    pub(crate) dropped: u64,
}

/// Our connection to a server, for those who look at it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct LinkView<'a> {
    pub(crate) tcp: SocketAddr,
    pub(crate) state: LinkState,
    /// Its place among the node's connections, if there is one.
    pub(crate) connection: Option<usize>,
    /// Since when it is up.
    pub(crate) up_since: Option<Instant>,
    /// None if it was not heard of.
    pub(crate) incarnation: Option<Incarnation>,
    /// Why there is none.
    pub(crate) trouble: Option<&'a str>,
    pub(crate) counts: LinkCounts,
}

/// Our connection to a server; the number is its place among the node's connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Link {
    Down { call_at: Instant },
    Calling { connection: usize, until: Instant },
    Up { connection: usize, since: Instant },
}

/// How many processes say that they are a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Claimed {
    Once,
    Twice,
    /// And it has not been logged lately.
    TwiceToLog,
}

/// A process whose datagrams come after those of a newer one so often is no late rest of a former one.
const RETURNS_MIN: u32 = 4;
/// Two of which one is not heard for this time are one.
const CLAIM_LASTS: Duration = Duration::from_secs(3);
/// A double claim is logged so often.
const LOG_CLAIMS_EVERY: Duration = Duration::from_secs(10);

/// The processes that say that they are one server, by the numbers that they have chosen at their start.
#[derive(Debug, Default)]
struct Claims {
    /// The one heard last, and the one before it.
    boots: [Option<u64>; 2],
    /// How often the one before it was heard again, each time soon after the last, and when that was.
    returns: u32,
    returned: Option<Instant>,
    logged: Option<Instant>,
}

impl Claims {
    fn note(&mut self, now: Instant, boot: u64) -> Claimed {
        let [last, former] = self.boots;
        if last != Some(boot) {
            self.boots = [Some(boot), last];
            if former == Some(boot) {
                self.returns = match self.has_returned(now) {
                    true => self.returns.saturating_add(1),
                    false => 1,
                };
                self.returned = Some(now);
            }
        }
        if !self.are_two(now) {
            return Claimed::Once;
        }
        let lately = |at: Instant| now.since(at) < LOG_CLAIMS_EVERY;
        if self.logged.is_some_and(lately) {
            return Claimed::Twice;
        }
        self.logged = Some(now);
        Claimed::TwiceToLog
    }

    fn has_returned(&self, now: Instant) -> bool {
        self.returned.is_some_and(|at| now.since(at) < CLAIM_LASTS)
    }

    fn are_two(&self, now: Instant) -> bool {
        self.returns >= RETURNS_MIN && self.has_returned(now)
    }
}

impl Peer {
    fn new(tcp: SocketAddr, udp: SocketAddr, now: Instant) -> Peer {
        Peer {
            tcp,
            udp,
            incarnation: Incarnation(0),
            claims: Claims::default(),
            link: Link::Down { call_at: now },
            backoff: BACKOFF_MIN,
            is_unwanted: false,
            trouble: String::new(),
            counts: LinkCounts::default(),
        }
    }

    fn view(&self) -> LinkView<'_> {
        let (state, connection, up_since) = match self.link {
            Link::Down { .. } => (LinkState::Down, None, None),
            Link::Calling { connection, .. } => (LinkState::Calling, Some(connection), None),
            Link::Up { connection, since } => (LinkState::Up, Some(connection), Some(since)),
        };
        let is_up = state == LinkState::Up;
        let trouble = Some(&self.trouble[..]).filter(|trouble| !is_up && !trouble.is_empty());
        LinkView {
            tcp: self.tcp,
            state,
            connection,
            up_since,
            incarnation: Some(self.incarnation).filter(|it| *it != Incarnation(0)),
            trouble,
            counts: self.counts,
        }
    }
}

impl Peers {
    pub(crate) fn new(servers: &Servers, own: ServerId, now: Instant) -> Peers {
        let mut all = [const { None }; SERVERS_MAX];
        for id in servers.ids() {
            let (Some(tcp), Some(udp)) = (servers.tcp(id), servers.udp(id)) else {
                continue;
            };
            if id != own {
                all[usize::from(id.0)] = Some(Peer::new(tcp, udp, now));
            }
        }
        Peers { all }
    }

    /// The log lists these servers: their addresses go before those of server.conf.
    pub(crate) fn follow(&mut self, members: &Members, own: ServerId, now: Instant) {
        for member in members.list.iter().filter(|it| it.id != own) {
            let Some(address) = member.address() else {
                continue;
            };
            let (tcp, udp) = pss_core::servers::sockets(member.id, address);
            match self.get_mut(member.id) {
                Some(peer) if peer.tcp == tcp => {}
                Some(peer) => {
                    let id = member.id;
                    tracing::info!(
                        peer = id.0,
                        "server {id} is at {tcp} now, not at {}",
                        peer.tcp
                    );
                    (peer.tcp, peer.udp) = (tcp, udp);
                }
                None => self.all[usize::from(member.id.0)] = Some(Peer::new(tcp, udp, now)),
            }
        }
    }

    fn get(&self, server: ServerId) -> Option<&Peer> {
        self.all.get(usize::from(server.0))?.as_ref()
    }

    fn get_mut(&mut self, server: ServerId) -> Option<&mut Peer> {
        self.all.get_mut(usize::from(server.0))?.as_mut()
    }

    /// Where a server takes connections.
    pub(crate) fn tcp(&self, server: ServerId) -> Option<SocketAddr> {
        self.get(server).map(|peer| peer.tcp)
    }

    /// Where a server takes datagrams.
    pub(crate) fn udp(&self, server: ServerId) -> Option<SocketAddr> {
        self.get(server).map(|peer| peer.udp)
    }

    /// Counts something that is exchanged with a server.
    pub(crate) fn count(&mut self, server: ServerId, add: impl FnOnce(&mut LinkCounts)) {
        if let Some(peer) = self.get_mut(server) {
            add(&mut peer.counts);
        }
    }

    /// All servers with the connections to them.
    pub(crate) fn views(&self) -> impl Iterator<Item = (ServerId, LinkView<'_>)> {
        let ids = (0..).map(ServerId).zip(&self.all);
        ids.filter_map(|(id, peer)| Some((id, peer.as_ref()?.view())))
    }

    /// Something was received from a server, or a process that says it is that. Returns whether it
    /// counts: the server is listed and we know of no later incarnation.
    pub(crate) fn heard(&mut self, now: Instant, server: ServerId, from: Incarnation) -> bool {
        let Some(peer) = self.get_mut(server) else {
            return false;
        };
        if from < peer.incarnation {
            return false;
        }
        if from > peer.incarnation {
            peer.claims = Claims::default();
        }
        peer.incarnation = from;
        // It lives, so a call may succeed now.
        if let Link::Down { call_at } = &mut peer.link {
            *call_at = (*call_at).min(now + BACKOFF_MIN);
        }
        true
    }

    /// A datagram of a server's process was received. Says whether two say that they are this server, which a copied data
    /// directory makes, so that neither counts: what one of them acknowledges the other need not have.
    pub(crate) fn note_process(
        &mut self,
        now: Instant,
        server: ServerId,
        from: Incarnation,
        boot: u64,
    ) -> Claimed {
        match self.get_mut(server) {
            Some(peer) if peer.incarnation == from => peer.claims.note(now, boot),
            _ => Claimed::Once,
        }
    }

    /// Whether two processes say that they are this server.
    pub(crate) fn is_claimed_twice(&self, now: Instant, server: ServerId) -> bool {
        self.get(server)
            .is_some_and(|peer| peer.claims.are_two(now))
    }

    /// Whether a connection of this incarnation is outdated.
    pub(crate) fn is_outdated(&self, server: ServerId, incarnation: Incarnation) -> bool {
        self.get(server)
            .is_none_or(|peer| incarnation < peer.incarnation)
    }

    /// The connection to a server, if it can be used.
    pub(crate) fn link(&self, server: ServerId) -> Option<usize> {
        match self.get(server)?.link {
            Link::Up { connection, .. } => Some(connection),
            _ => None,
        }
    }

    /// When something is to be done: a call to be made, or given up.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        let next = |peer: &Peer| match peer.link {
            Link::Down { call_at } => Some(call_at),
            Link::Calling { until, .. } => Some(until),
            Link::Up { .. } => None,
        };
        self.all.iter().flatten().filter_map(next).min()
    }

    /// Servers that are to be called now.
    pub(crate) fn due(&self, now: Instant) -> Vec<ServerId> {
        self.select(|link| matches!(link, Link::Down { call_at } if *call_at <= now))
    }

    /// Connections of calls that have not been answered in time.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<usize> {
        let overdue = |peer: &Peer| match peer.link {
            Link::Calling { connection, until } if until <= now => Some(connection),
            _ => None,
        };
        self.all.iter().flatten().filter_map(overdue).collect()
    }

    fn select(&self, which: impl Fn(&Link) -> bool) -> Vec<ServerId> {
        let ids = (0..).map(ServerId).zip(&self.all);
        ids.filter(|(_, peer)| peer.as_ref().is_some_and(|peer| which(&peer.link)))
            .map(|(id, _)| id)
            .collect()
    }

    /// A server is being called on a connection.
    pub(crate) fn calling(&mut self, now: Instant, server: ServerId, connection: usize) {
        if let Some(peer) = self.get_mut(server) {
            peer.link = Link::Calling {
                connection,
                until: now + CALL_TIMEOUT,
            };
        }
    }

    /// A server has answered.
    pub(crate) fn up(&mut self, now: Instant, server: ServerId) {
        if let Some(peer) = self.get_mut(server)
            && let Link::Calling { connection, .. } = peer.link
        {
            peer.link = Link::Up {
                connection,
                since: now,
            };
            if !peer.is_unwanted {
                peer.backoff = BACKOFF_MIN;
                peer.trouble.clear();
                tracing::info!(peer = server.0, "connected to server {server}");
            }
        }
    }

    /// The connection has ended, or could not be made.
    pub(crate) fn down(&mut self, now: Instant, server: ServerId, reason: &str) {
        let Some(peer) = self.get_mut(server) else {
            return;
        };
        let (was_up, lasted) = match peer.link {
            Link::Up { since, .. } => (true, now.since(since) >= LASTING),
            _ => (false, false),
        };
        if lasted {
            peer.backoff = BACKOFF_MIN;
        }
        peer.is_unwanted = was_up && !lasted;
        peer.link = Link::Down {
            call_at: now + peer.backoff,
        };
        peer.backoff = (peer.backoff * 2).min(BACKOFF_MAX);
        if peer.trouble == reason {
            return;
        }
        peer.trouble = reason.to_owned();
        let address = peer.tcp;
        if was_up {
            tracing::warn!(
                peer = server.0,
                "lost the connection to server {server}: {reason}"
            );
        } else {
            tracing::warn!(
                peer = server.0,
                "cannot reach server {server} at {address}: {reason}; trying again"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn peers() -> Peers {
        let address = IpAddr::from([127, 0, 0, 1]);
        let servers = Servers::new([0, 1, 2].map(|id| (ServerId(id), address)));
        Peers::new(&servers, ServerId(1), Instant(0))
    }

    #[test]
    fn calls_back_off() {
        let mut peers = peers();
        let mut now = Instant(0);
        assert_eq!(peers.due(now), [ServerId(0), ServerId(2)]);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            peers.calling(now, ServerId(0), 5);
            peers.down(now, ServerId(0), "refused");
            peers.calling(now, ServerId(2), 6);
            let next = peers.next_at().unwrap();
            pauses.push(next.since(now).as_millis());
            now = next;
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1000, 1000]);
    }

    #[test]
    fn a_server_that_is_heard_is_called_soon() {
        let mut peers = peers();
        for _ in 0..7 {
            peers.calling(Instant(0), ServerId(0), 5);
            peers.down(Instant(0), ServerId(0), "refused");
        }
        peers.heard(Instant(0), ServerId(0), Incarnation(1));
        assert!(
            peers
                .due(Instant(0))
                .iter()
                .all(|server| *server != ServerId(0))
        );
        assert!(peers.due(Instant(0) + BACKOFF_MIN).contains(&ServerId(0)));
    }

    #[test]
    fn only_a_call_that_was_answered_is_a_link() {
        let mut peers = peers();
        peers.up(Instant(7), ServerId(0));
        assert_eq!(peers.link(ServerId(0)), None);
        peers.calling(Instant(0), ServerId(0), 5);
        assert_eq!(peers.link(ServerId(0)), None);
        assert_eq!(peers.overdue(Instant(0) + CALL_TIMEOUT), [5]);
        peers.up(Instant(7), ServerId(0));
        assert_eq!(peers.link(ServerId(0)), Some(5));
        assert_eq!(peers.overdue(Instant(u64::MAX)), [0_usize; 0]);
        peers.down(Instant(9), ServerId(0), "closed");
        assert_eq!(peers.link(ServerId(0)), None);
    }

    #[test]
    fn older_incarnations_do_not_count() {
        let mut peers = peers();
        assert!(peers.heard(Instant(0), ServerId(0), Incarnation(5)));
        assert!(!peers.heard(Instant(0), ServerId(0), Incarnation(4)));
        assert!(peers.heard(Instant(0), ServerId(0), Incarnation(6)));
        assert!(peers.is_outdated(ServerId(0), Incarnation(5)));
        assert!(
            !peers.heard(Instant(0), ServerId(1), Incarnation(9)),
            "that is us"
        );
        assert!(
            !peers.heard(Instant(0), ServerId(7), Incarnation(9)),
            "not listed"
        );
        assert!(
            !peers.heard(Instant(0), ServerId(200), Incarnation(9)),
            "no server"
        );
    }

    #[test]
    fn two_processes_with_one_id_are_told_apart_from_a_restart() {
        let mut claims = Claims::default();
        let at = |ms: u64| Instant(0) + Duration::from_millis(ms);
        // A restart, with a few datagrams of the former process that come late.
        for (ms, boot) in [
            (0, 1),
            (100, 1),
            (200, 2),
            (210, 1),
            (220, 2),
            (230, 2),
            (900, 2),
        ] {
            assert_eq!(claims.note(at(ms), boot), Claimed::Once, "{ms}");
        }
        // Many restarts.
        for boot in 3..50 {
            assert_eq!(claims.note(at(1000 + boot * 10), boot), Claimed::Once);
        }
        let mut said = Vec::new();
        for round in 0..20 {
            said.push(claims.note(at(5000 + round * 500), 60 + round % 2));
        }
        assert_eq!(said[..5], [Claimed::Once; 5]);
        assert_eq!(said[5], Claimed::TwiceToLog);
        assert_eq!(said[6..], [Claimed::Twice; 14]);
        // One of them is gone.
        assert_eq!(claims.note(at(15_000), 60), Claimed::Twice);
        assert_eq!(claims.note(at(18_500), 60), Claimed::Once);
    }
}
