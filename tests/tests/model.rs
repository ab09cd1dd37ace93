//! Model check of the agreement core: every order of messages, losses and crashes, within small bounds.
//!
//! Stateright walks through all states that three replicas can reach with a few commands, message loss
//! and crashes, where a crash forgets what was not persisted. The replicas are the product's own.
//! A lost message is one that is never delivered; questions of the pre-check are answered at once, for
//! they change no acceptor. Time stands still for the network and jumps for timeouts: a timeout may come at any moment, which covers
//! every speed of clocks as far as safety goes without leases; leases are the simulator's business.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::time::Duration;

use pss_core::entry::{Command, Entry, Op};
use pss_core::paxos::message::Message;
use pss_core::paxos::output::{Output, Persist, WriteId};
use pss_core::paxos::quorum::Membership;
use pss_core::paxos::{Bug, Config, Recovered, Replica, RoleKind, Tuning};
use pss_core::time::Instant;
use pss_core::types::{Ballot, EntryId, Incarnation, RequestNumber, ServerId, SessionId, Slot};
use stateright::{Checker, Model, Property};

/// What a server's disk holds.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct Stable {
    promised: Ballot,
    log: Vec<Entry>,
}

impl Stable {
    fn write(&mut self, what: &Persist) {
        match what {
            Persist::Promise(ballot) => self.promised = *ballot,
            Persist::Rejoining(_) => {}
            Persist::Append {
                truncate_after,
                entries,
                ..
            } => {
                if let Some(slot) = truncate_after {
                    self.log.truncate(slot.0 as usize);
                }
                self.log.extend(entries.iter().cloned());
            }
            Persist::Reset { .. } => unreachable!("nobody is that far behind here"),
        }
    }
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Server {
    replica: Replica,
    stable: Stable,
    /// Asked for, and not durable yet.
    unsynced: Vec<(WriteId, Persist)>,
    now: Instant,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Cell {
    servers: Vec<Server>,
    /// Messages under way: a set, for the order does not matter and a copy may be delivered twice.
    network: BTreeMap<(ServerId, ServerId, u64), Message>,
    chosen: BTreeMap<Slot, EntryId>,
    commands_left: u8,
    crashes_left: u8,
    timeouts_left: u8,
    /// Two values in one slot, or another broken promise.
    broken: bool,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Step {
    Deliver((ServerId, ServerId, u64)),
    Sync(usize),
    Timeout(usize),
    Propose(usize),
    Crash(usize),
}

#[derive(Clone)]
struct Bounds {
    commands: u8,
    crashes: u8,
    timeouts: u8,
    bug: Option<Bug>,
}

fn tuning() -> Tuning {
    Tuning {
        election_spread: Duration::ZERO,
        ..Tuning::default()
    }
}

fn config(server: u8) -> Config {
    let members = Membership::new((0..3).map(ServerId));
    Config {
        id: ServerId(server),
        incarnation: Incarnation(0),
        members,
        tuning: tuning(),
        seed: 0,
    }
}

fn start(server: u8, stable: &Stable, now: Instant, bug: Option<Bug>) -> Replica {
    let recovered = Recovered {
        promised: stable.promised,
        tail: stable.log.clone(),
        log_first: Slot(1),
        ..Recovered::default()
    };
    let mut replica = Replica::new(config(server), recovered, now);
    if let Some(bug) = bug {
        replica.inject(bug);
    }
    replica
}

fn hash(message: &Message) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    message.hash(&mut hasher);
    hasher.finish()
}

impl Cell {
    fn new(bounds: &Bounds) -> Cell {
        let server = |id| Server {
            replica: start(id, &Stable::default(), Instant(0), bounds.bug),
            stable: Stable::default(),
            unsynced: Vec::new(),
            now: Instant(0),
        };
        Cell {
            servers: (0..3).map(server).collect(),
            network: BTreeMap::new(),
            chosen: BTreeMap::new(),
            commands_left: bounds.commands,
            crashes_left: bounds.crashes,
            timeouts_left: bounds.timeouts,
            broken: false,
        }
    }

    fn drain(&mut self, index: usize) {
        let from = ServerId(index as u8);
        while let Some(output) = self.servers[index].replica.poll_output() {
            match output {
                Output::Send { to, message } => {
                    // Nothing here depends on these, and they would multiply the states.
                    let idle = matches!(
                        message,
                        Message::Progress(_)
                            | Message::CatchUp { .. }
                            | Message::Heartbeat { .. }
                            | Message::HeartbeatAck { .. }
                    );
                    let pre_check = matches!(
                        message,
                        Message::PreCheck { .. } | Message::PreCheckAnswer { .. }
                    );
                    if pre_check {
                        let other = usize::from(to.0);
                        let now = self.servers[other].now;
                        self.servers[other].replica.handle_message(
                            now,
                            from,
                            Incarnation(0),
                            message,
                        );
                        self.drain(other);
                    } else if !idle {
                        self.network.insert((from, to, hash(&message)), message);
                    }
                }
                Output::Persist { write, what } => {
                    self.servers[index].unsynced.push((write, what));
                }
                Output::Apply { entries } => {
                    for entry in &entries {
                        let known = self.chosen.entry(entry.id.slot).or_insert(entry.id);
                        self.broken |= *known != entry.id;
                    }
                    let now = self.servers[index].now;
                    let last = entries
                        .last()
                        .map(|entry| entry.id.slot)
                        .unwrap_or_default();
                    self.servers[index].replica.handle_applied(now, last);
                }
                _ => {}
            }
        }
    }
}

struct PaxosModel(Bounds);

impl Model for PaxosModel {
    type State = Cell;
    type Action = Step;

    fn init_states(&self) -> Vec<Cell> {
        vec![Cell::new(&self.0)]
    }

    fn actions(&self, cell: &Cell, steps: &mut Vec<Step>) {
        for key in cell.network.keys() {
            steps.push(Step::Deliver(*key));
        }
        for (index, server) in cell.servers.iter().enumerate() {
            if !server.unsynced.is_empty() {
                steps.push(Step::Sync(index));
            }
            let leads = matches!(server.replica.role(), RoleKind::Leader { .. });
            if cell.timeouts_left > 0 && !leads {
                steps.push(Step::Timeout(index));
            }
            let serves = server.replica.role() == RoleKind::Leader { serving: true };
            if cell.commands_left > 0 && serves {
                steps.push(Step::Propose(index));
            }
            if cell.crashes_left > 0 {
                steps.push(Step::Crash(index));
            }
        }
    }

    fn next_state(&self, cell: &Cell, step: Step) -> Option<Cell> {
        let mut cell = cell.clone();
        let index = match step {
            Step::Deliver(key) => {
                // Taken off the network: a copy that comes twice is what retries make of it.
                let message = cell.network.remove(&key)?;
                let index = usize::from(key.1.0);
                let now = cell.servers[index].now;
                cell.servers[index]
                    .replica
                    .handle_message(now, key.0, Incarnation(0), message);
                index
            }
            Step::Sync(index) => {
                let server = &mut cell.servers[index];
                let (write, what) = server.unsynced.remove(0);
                server.stable.write(&what);
                server.replica.handle_persisted(server.now, write);
                index
            }
            Step::Timeout(index) => {
                cell.timeouts_left -= 1;
                // Every lease has run out.
                for server in &mut cell.servers {
                    server.now += Duration::from_secs(3);
                }
                let server = &mut cell.servers[index];
                server.replica.handle_timeout(server.now);
                index
            }
            Step::Propose(index) => {
                cell.commands_left -= 1;
                let number = RequestNumber(u64::from(cell.commands_left) + 1);
                let command = Command {
                    number,
                    ..Command::internal(Op::Noop)
                };
                let command = Command {
                    session: SessionId(index as u64 + 1),
                    ..command
                };
                let server = &mut cell.servers[index];
                server.replica.propose(vec![command]).ok()?;
                server.replica.flush(server.now);
                index
            }
            Step::Crash(index) => {
                cell.crashes_left -= 1;
                let server = &mut cell.servers[index];
                server.unsynced.clear();
                server.now += Duration::from_secs(3);
                let now = server.now;
                server.replica = start(index as u8, &server.stable, now, self.0.bug);
                index
            }
        };
        cell.drain(index);
        Some(cell)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one value per slot", |_, cell: &Cell| !cell.broken),
            Property::sometimes("a command is chosen", |_, cell: &Cell| {
                cell.chosen.len() >= 2
            }),
        ]
    }
}

fn run(bounds: Bounds, states_max: usize) -> impl Checker<PaxosModel> {
    let checker = PaxosModel(bounds)
        .checker()
        .threads(2)
        .target_state_count(states_max);
    checker.spawn_bfs().join()
}

/// (commands, crashes, timeouts) that are walked through whole.
const WALKS: [(u8, u8, u8); 3] = [(2, 1, 1), (1, 1, 2), (0, 0, 3)];

#[test]
fn one_value_per_slot() {
    for (commands, crashes, timeouts) in WALKS {
        let checker = run(
            Bounds {
                commands,
                crashes,
                timeouts,
                bug: None,
            },
            4_000_000,
        );
        println!(
            "{commands} commands, {crashes} crashes, {timeouts} timeouts: {} states, depth {}",
            checker.unique_state_count(),
            checker.max_depth()
        );
        checker.assert_no_discovery("one value per slot");
        if commands > 0 {
            checker.assert_any_discovery("a command is chosen");
        }
    }
}

#[test]
fn the_model_bites() {
    for bug in [Bug::SmallQuorum, Bug::SkipTail] {
        let bounds = Bounds {
            commands: 1,
            crashes: 0,
            timeouts: 2,
            bug: Some(bug),
        };
        let checker = run(bounds, 4_000_000);
        assert!(
            checker.discovery("one value per slot").is_some(),
            "{bug:?} was not found"
        );
    }
}
