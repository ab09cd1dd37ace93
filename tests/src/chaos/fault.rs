//! The faults: which there are, how they are chosen, begun and ended.

use std::fmt;
use std::fs;

use crate::netns::Host;

use super::damage::Damage;
use super::{AFFECTED_MAX, Chaos, GATEWAYS, SERVERS};

/// One fault, with its victims.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// SIGKILL, started again in the end.
    Kill(Vec<u8>),
    /// SIGSTOP, SIGCONT in the end.
    Pause(Vec<u8>),
    /// SIGTERM, started again in the end.
    Stop(u8),
    /// The disk is lost, an empty one is there in the end.
    Wipe(u8),
    /// SIGKILL, files are changed, started again in the end.
    Rot(u8, Damage),
    /// These neither reach the others nor are reached by them.
    CutOff(Vec<u8>, Vec<usize>),
    /// The server sends nothing to these.
    Mute(u8, Vec<Host>),
    /// The server hears nothing from these.
    Deaf(u8, Vec<Host>),
    /// Two pairs of servers that do not see each other, and one server that sees all.
    Bridge([u8; 2], [u8; 2]),
    /// SIGKILL, started again in the end.
    KillGateway(usize),
    /// SIGSTOP, SIGCONT in the end.
    PauseGateway(usize),
}

impl Fault {
    /// Servers that are affected.
    pub(super) fn servers(&self) -> Vec<u8> {
        match self {
            Fault::Kill(ids) | Fault::Pause(ids) | Fault::CutOff(ids, _) => ids.clone(),
            Fault::Stop(id)
            | Fault::Wipe(id)
            | Fault::Rot(id, _)
            | Fault::Mute(id, _)
            | Fault::Deaf(id, _) => vec![*id],
            // Whoever is on the other side of whoever leads.
            Fault::Bridge(left, right) => [*left, *right].concat(),
            Fault::KillGateway(_) | Fault::PauseGateway(_) => Vec::new(),
        }
    }

    /// Gateways that cannot be expected to serve.
    pub(super) fn gateways(&self) -> Vec<usize> {
        match self {
            Fault::CutOff(_, gateways) => gateways.clone(),
            Fault::KillGateway(gateway) | Fault::PauseGateway(gateway) => vec![*gateway],
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill(ids) => write!(f, "{} killed", servers(ids)),
            Fault::Pause(ids) => write!(f, "{} paused", servers(ids)),
            Fault::Stop(id) => write!(f, "server {id} stopped"),
            Fault::Wipe(id) => write!(f, "server {id} wiped"),
            Fault::Rot(id, damage) => write!(f, "server {id} killed, {damage} damaged"),
            Fault::CutOff(ids, gateways) => {
                let servers = ids.iter().copied().map(Host::Server);
                let gateways = gateways.iter().copied().map(Host::Gateway);
                let hosts: Vec<Host> = servers.chain(gateways).collect();
                write!(f, "{} cut off", names(&hosts))
            }
            Fault::Mute(id, to) => write!(f, "server {id} mute to {}", names(to)),
            Fault::Deaf(id, from) => write!(f, "server {id} deaf to {}", names(from)),
            Fault::Bridge(left, right) => write!(f, "servers {left:?} and {right:?} part, bridged"),
            Fault::KillGateway(gateway) => write!(f, "gateway {gateway} killed"),
            Fault::PauseGateway(gateway) => write!(f, "gateway {gateway} paused"),
        }
    }
}

fn servers(ids: &[u8]) -> String {
    let hosts: Vec<Host> = ids.iter().copied().map(Host::Server).collect();
    names(&hosts)
}

fn names(hosts: &[Host]) -> String {
    let mut servers = Vec::new();
    let mut gateways = Vec::new();
    for host in hosts {
        match host {
            Host::Server(id) => servers.push(id.to_string()),
            Host::Gateway(gateway) => gateways.push(gateway.to_string()),
        }
    }
    let kinds = [("server", servers), ("gateway", gateways)];
    let kinds = kinds.iter().filter(|(_, numbers)| !numbers.is_empty());
    let parts: Vec<String> = kinds
        .map(|(kind, numbers)| match numbers.len() {
            1 => format!("{kind} {}", numbers[0]),
            _ => format!("{kind}s {}", numbers.join(", ")),
        })
        .collect();
    parts.join(" and ")
}

impl Chaos {
    /// One or two faults that may be begun now.
    pub(super) fn choose(&mut self) -> Vec<Fault> {
        let wanted = if self.rng.chance(350) { 2 } else { 1 };
        let leader = self.cell.status();
        let leader = leader.and_then(|status| status["leader"].as_u64());
        let mut faults: Vec<Fault> = Vec::new();
        // Not every draw is allowed.
        for _ in 0..50 {
            if faults.len() == wanted {
                break;
            }
            let taken: Vec<u8> = faults.iter().flat_map(Fault::servers).collect();
            let fault = self.draw(&taken, leader.map(|id| id as u8));
            let spared = self.lapsed.as_ref().map(|lapse| lapse.leader.0);
            let fault = fault.filter(|it| spared.is_none_or(|id| !it.servers().contains(&id)));
            faults.extend(fault.filter(|fault| self.is_allowed(&faults, fault)));
        }
        faults
    }

    fn is_allowed(&self, faults: &[Fault], fault: &Fault) -> bool {
        let bridge = |fault: &Fault| matches!(fault, Fault::Bridge(..));
        let gateways = faults.iter().flat_map(Fault::gateways).count();
        // One gateway remains.
        let free = gateways == 0 && self.lapsed.is_none();
        if bridge(fault) {
            // Nobody is away, so that each side and the bridge are a majority.
            return faults.is_empty() && self.recovering.is_empty() && self.lapsed.is_none();
        }
        let affected: usize = faults.iter().map(|it| it.servers().len()).sum();
        let affected = affected + self.recovering.len() + fault.servers().len();
        let log = matches!(fault, Fault::Rot(_, Damage::Log));
        affected <= AFFECTED_MAX
            && !faults.iter().any(bridge)
            && (free || fault.gateways().is_empty())
            && (self.options.rot || !matches!(fault, Fault::Rot(..)))
            // Until the server has back what the first damage took.
            && !(log && self.log_damaged.is_some())
    }

    fn draw(&mut self, taken: &[u8], leader: Option<u8>) -> Option<Fault> {
        let mut free: Vec<u8> = (0..SERVERS).collect();
        free.retain(|id| !taken.contains(id) && !self.recovering.contains(id));
        // In random order; the leader is hit more often.
        for place in (1..free.len()).rev() {
            let other = self.rng.below(place as u64 + 1) as usize;
            free.swap(place, other);
        }
        let to_leader = free.iter().position(|id| Some(*id) == leader);
        if let Some(place) = to_leader.filter(|_| self.rng.chance(400)) {
            free.swap(0, place);
        }
        let one = *free.first()?;
        let count = self.rng.between(1, AFFECTED_MAX as u64) as usize;
        let some = free.iter().copied().take(count).collect();
        let gateway = self.rng.below(GATEWAYS as u64) as usize;
        Some(match self.rng.below(100) {
            0..14 => Fault::Kill(some),
            14..26 => Fault::Pause(some),
            26..33 => Fault::Stop(one),
            33..47 => {
                let gateways = match self.rng.below(4) {
                    0 | 1 => Vec::new(),
                    2 => vec![gateway],
                    _ => (0..GATEWAYS).collect(),
                };
                Fault::CutOff(free.iter().copied().take(2).collect(), gateways)
            }
            47..54 => Fault::CutOff(vec![one], Vec::new()),
            54..62 => Fault::Mute(one, self.some_others(one)),
            62..70 => Fault::Deaf(one, self.some_others(one)),
            70..75 => match free[..] {
                [_, a, b, c, d] => Fault::Bridge([a, b], [c, d]),
                _ => return None,
            },
            75..84 => Fault::Wipe(one),
            84..94 => Fault::Rot(one, *self.rng.pick(&Damage::ALL)),
            94..97 => Fault::KillGateway(gateway),
            97..99 => Fault::PauseGateway(gateway),
            _ => Fault::CutOff(Vec::new(), vec![gateway]),
        })
    }

    /// All machines but one, or all servers, or some.
    fn some_others(&mut self, id: u8) -> Vec<Host> {
        let mut others = self.network.hosts().to_vec();
        others.retain(|host| *host != Host::Server(id));
        match self.rng.below(3) {
            0 => {}
            1 => others.retain(|host| matches!(host, Host::Server(_))),
            _ => {
                let count = self.rng.between(1, others.len() as u64 - 1) as usize;
                while others.len() > count {
                    let place = self.rng.below(others.len() as u64) as usize;
                    others.remove(place);
                }
            }
        }
        others
    }

    pub(super) fn begin(&mut self, fault: &Fault) {
        match fault {
            Fault::Kill(ids) => self.kill(ids),
            Fault::Pause(ids) => self.cell.signal(ids, "STOP"),
            Fault::Stop(id) => self.cell.stop(*id),
            Fault::Wipe(id) => {
                self.cell.kill(*id);
                fs::remove_dir_all(self.cell.path(*id)).expect("it is there");
            }
            Fault::Rot(id, damage) => {
                self.cell.kill(*id);
                let places = damage.inflict(&self.cell, *id, &mut self.rng);
                self.say(&format!("server {id}: {places}"));
                if *damage == Damage::Log {
                    self.log_damaged = Some(*id);
                }
            }
            Fault::CutOff(ids, gateways) => {
                let cut = |host: &Host| match host {
                    Host::Server(id) => ids.contains(id),
                    Host::Gateway(gateway) => gateways.contains(gateway),
                };
                let hosts = self.network.hosts();
                let (away, rest): (Vec<_>, Vec<_>) = hosts.iter().partition(|host| cut(host));
                self.network.part(&away, &rest);
            }
            Fault::Mute(id, to) => {
                let pairs: Vec<_> = to.iter().map(|to| (Host::Server(*id), *to)).collect();
                self.network.cut_all(&pairs);
            }
            Fault::Deaf(id, from) => {
                let pairs: Vec<_> = from.iter().map(|from| (*from, Host::Server(*id))).collect();
                self.network.cut_all(&pairs);
            }
            Fault::Bridge(left, right) => {
                let [left, right] = [left, right].map(|ids| ids.map(Host::Server));
                self.network.part(&left, &right);
            }
            Fault::KillGateway(gateway) => {
                self.cell.gateways.remove(gateway);
            }
            Fault::PauseGateway(gateway) => self.cell.gateways[gateway].signal("STOP"),
        }
    }

    fn kill(&mut self, ids: &[u8]) {
        self.cell.signal(ids, "KILL");
        for id in ids {
            self.cell.kill(*id);
        }
    }

    /// Ends a fault; the network is whole already.
    pub(super) fn end(&mut self, fault: &Fault) {
        match fault {
            Fault::Kill(ids) => {
                for id in ids {
                    self.cell.start(*id);
                }
            }
            Fault::Pause(ids) => self.cell.signal(ids, "CONT"),
            Fault::Stop(id) | Fault::Rot(id, _) => self.cell.start(*id),
            Fault::Wipe(id) => {
                self.cell.format(*id, "--replace");
                self.cell.start(*id);
            }
            Fault::CutOff(..) | Fault::Mute(..) | Fault::Deaf(..) | Fault::Bridge(..) => {}
            Fault::KillGateway(gateway) => self.cell.start_gateway(*gateway),
            Fault::PauseGateway(gateway) => self.cell.gateways[gateway].signal("CONT"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_the_victims() {
        let cut = Fault::CutOff(vec![3, 1], vec![0]);
        assert_eq!(cut.to_string(), "servers 3, 1 and gateway 0 cut off");
        let cut = Fault::CutOff(vec![], vec![0, 1]);
        assert_eq!(cut.to_string(), "gateways 0, 1 cut off");
        assert_eq!(Fault::Kill(vec![2]).to_string(), "server 2 killed");
        let mute = Fault::Mute(2, vec![Host::Server(0), Host::Gateway(1)]);
        assert_eq!(mute.to_string(), "server 2 mute to server 0 and gateway 1");
    }
}
