//! "Am I safe?": what the servers' answers say about the cell.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use pss_core::client::ServerError;
use pss_core::members::Members;
use pss_core::servers::Ids;
use pss_core::types::ServerId;
use pss_core::wire::client::{PeerStatus, ServerStatus};

use crate::render::{grouped, span};

/// What was heard of the servers of a cell.
pub(super) struct Answers {
    /// All servers that server.conf lists.
    pub(super) listed: Vec<ServerId>,
    /// Where those stand that answered.
    pub(super) statuses: BTreeMap<ServerId, ServerStatus>,
    /// Why the others did not.
    pub(super) failures: BTreeMap<ServerId, ServerError>,
}

/// The state of one server's copy of the data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CopyState {
    /// It holds everything that was chosen when the leader was asked.
    Current,
    /// It takes part, but entries are missing.
    Behind(Behind),
    /// Chunks are being copied to it: so many of so many, and it takes about so many seconds still, if it says so.
    Copying(Option<(u64, u64)>, Option<u64>),
    /// Its disk is new: it learns everything, and does not count until it has. So many chunks of so many are here, and
    /// it takes about so many seconds still, if it says so.
    Rejoining(Option<(u64, u64)>, Option<u64>),
    /// It answers, but the leader has no contact with it; for so many seconds, if ever it had.
    Apart(Option<u64>),
    /// It does not answer; the leader has heard nothing for so many seconds, if ever it had.
    Silent(Option<u64>),
    /// Nobody leads, so nobody knows.
    Unknown,
}

/// What a server lacks that takes part.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Behind {
    /// Entries.
    pub(super) slots: u64,
    /// The age of the oldest, if the leader knows it.
    pub(super) ms: Option<u64>,
    /// About how many seconds it takes still, if the leader knows it.
    pub(super) left_s: Option<u64>,
    /// Its disk is too full to go on.
    pub(super) is_stalled: bool,
}

/// What the leader knows of how far a server is behind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Lag {
    /// Chosen entries that it has not applied.
    pub(super) slots: Option<u64>,
    /// See [`PeerStatus::behind_ms`].
    pub(super) ms: Option<u64>,
    /// See [`PeerStatus::behind_bytes`].
    pub(super) bytes: Option<u64>,
}

/// Whether the cell works and what it can lose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// It works, and so many core servers with current copies may fail before it does not.
    Works {
        /// Core servers.
        may_fail: usize,
    },
    /// A majority answers, but nobody leads.
    NoLeader,
    /// No majority.
    NoMajority,
}

/// The judgement.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Health {
    /// Who leads.
    pub(super) leader: Option<ServerId>,
    /// The copies of all listed servers.
    pub(super) copies: BTreeMap<ServerId, CopyState>,
    /// The servers that vote.
    pub(super) core: Vec<ServerId>,
    /// What follows.
    pub(super) verdict: Verdict,
    answering: Vec<ServerId>,
    /// Core servers that have nothing left for volumes, if that are so many that writes are refused.
    full: Vec<ServerId>,
}

impl Answers {
    /// The server that leads: of those that say so, the one with the highest ballot.
    pub(super) fn leader(&self) -> Option<&ServerStatus> {
        self.statuses
            .values()
            .filter(|status| status.role == "leader")
            .max_by_key(|status| status.ballot)
    }

    /// The servers as the log lists them, by the newest list that anyone has told; none: as server.conf does.
    pub(super) fn members(&self) -> Option<&Members> {
        let lists = self.statuses.values().filter_map(|it| it.members.as_ref());
        lists.max_by_key(|it| (it.epoch, it.version))
    }

    /// All servers, and those of them that vote.
    fn servers(&self) -> (Vec<ServerId>, Vec<ServerId>) {
        let Some(members) = self.members() else {
            let core = self.listed.iter().copied().filter(|id| id.is_core());
            return (self.listed.clone(), core.collect());
        };
        let all = members.list.iter().map(|it| it.id).collect();
        (all, members.membership().core)
    }

    /// What server.conf says that is not so any more.
    pub(super) fn stale_lines(&self) -> Vec<String> {
        let Some(members) = self.members() else {
            return Vec::new();
        };
        let missing = members
            .list
            .iter()
            .filter(|it| !self.listed.contains(&it.id));
        let missing = missing.map(|it| {
            format!(
                "Server {} belongs to the cell and is not in server.conf here: add the line '{} {} {}'.",
                it.id, it.id, it.host, it.path
            )
        });
        let gone = self.listed.iter().filter(|id| members.get(**id).is_none());
        let gone = gone.map(|id| {
            format!("Server {id} is in server.conf here, and was taken out of the cell: take the line out.")
        });
        missing.chain(gone).collect()
    }

    /// What a server that is to vote is waited for.
    pub(super) fn progress(&self, health: &Health, id: ServerId) -> String {
        let state = health.copies.get(&id).copied();
        match state {
            Some(
                CopyState::Copying(Some((done, total)), _)
                | CopyState::Rejoining(Some((done, total)), _),
            ) => {
                format!("has {} of {} chunks", grouped(done), grouped(total))
            }
            Some(CopyState::Behind(behind)) => format!("lacks {} entries", grouped(behind.slots)),
            Some(CopyState::Silent(_) | CopyState::Apart(_)) => {
                "does not answer the others: is it formatted and started?".to_owned()
            }
            _ => "is learning".to_owned(),
        }
    }

    /// The slot that a copy must reach to be current, if these answers decide.
    pub(super) fn mark(&self) -> Option<u64> {
        self.leader().map(|leader| leader.chosen)
    }

    /// Judges the answers. `mark` is the slot that the copies must have reached: that of these answers,
    /// or of earlier ones, so that a busy server that keeps pace is not called behind.
    pub(super) fn judge(&self, mark: Option<u64>) -> Health {
        let leader = self.leader();
        let mark = mark.or(self.mark()).unwrap_or(0);
        let (servers, votes) = self.servers();
        let copies: BTreeMap<_, _> = servers
            .iter()
            .map(|id| (*id, self.copy_state(*id, leader, mark)))
            .collect();
        let core: Vec<_> = votes.iter().collect();
        let majority = core.len() / 2 + 1;
        let counts = |id: &&&ServerId| !self.statuses.get(**id).is_some_and(|it| it.rejoining);
        let heard = core.iter().filter(counts);
        let heard = heard.filter(|id| self.heard(***id, leader)).count();
        let current = core
            .iter()
            .filter(|id| copies[**id] == CopyState::Current)
            .count();
        let verdict = match leader {
            _ if heard < majority => Verdict::NoMajority,
            None => Verdict::NoLeader,
            Some(_) => Verdict::Works {
                may_fail: current.saturating_sub(majority),
            },
        };
        let mut full: Vec<ServerId> = core.iter().map(|id| **id).collect();
        full.retain(|id| self.statuses.get(id).is_some_and(|status| status.full));
        // Without these there is no majority.
        if heard.saturating_sub(full.len()) >= majority {
            full.clear();
        }
        Health {
            core: votes.clone(),
            full,
            leader: leader.map(|leader| leader.server),
            copies,
            verdict,
            answering: self.statuses.keys().copied().collect(),
        }
    }

    /// Whether nothing listens where a server should be: the leader may not have missed it yet.
    fn is_stopped(&self, id: ServerId) -> bool {
        let Some(ServerError::Io(error)) = self.failures.get(&id) else {
            return false;
        };
        error.kind() == ErrorKind::ConnectionRefused
    }

    /// Whether a server runs, as far as can be told: it answers, or the leader hears it.
    fn heard(&self, id: ServerId, leader: Option<&ServerStatus>) -> bool {
        match leader {
            _ if self.is_stopped(id) => false,
            Some(leader) if leader.server != id => peer(leader, id).is_some_and(|peer| peer.alive),
            _ => self.statuses.contains_key(&id),
        }
    }

    fn copy_state(&self, id: ServerId, leader: Option<&ServerStatus>, mark: u64) -> CopyState {
        let own = self.statuses.get(&id);
        let Some(leader) = leader else {
            return match own {
                Some(_) => CopyState::Unknown,
                None => CopyState::Silent(None),
            };
        };
        let seen = peer(leader, id);
        let silent_s = seen.and_then(|peer| peer.silent_ms).map(|ms| ms / 1000);
        let alive = id == leader.server || seen.is_some_and(|peer| peer.alive);
        match own {
            None if !alive => return CopyState::Silent(silent_s),
            None if self.is_stopped(id) => return CopyState::Silent(None),
            Some(_) if !alive => return CopyState::Apart(silent_s),
            _ => {}
        }
        let copying = own.and_then(|status| status.copying);
        let left_s = own.and_then(|status| status.copying_left_s);
        if own.is_some_and(|status| status.rejoining) {
            return CopyState::Rejoining(copying, left_s);
        }
        if copying.is_some() || seen.is_some_and(|peer| peer.copying) {
            return CopyState::Copying(copying, left_s);
        }
        let applied = own
            .map(|status| status.applied)
            .max(seen.map(|peer| peer.applied));
        match mark.saturating_sub(applied.unwrap_or(0)) {
            0 => CopyState::Current,
            slots => CopyState::Behind(Behind {
                slots,
                ms: seen.and_then(|peer| peer.behind_ms),
                left_s: seen.and_then(|peer| peer.left_s),
                is_stalled: own.is_some_and(|status| status.stalled),
            }),
        }
    }

    /// How far a server is behind, as far as the leader knows.
    pub(super) fn lag(&self, id: ServerId, state: CopyState) -> Lag {
        let leader = self.leader();
        let seen = leader.and_then(|leader| peer(leader, id));
        let slots = match (state, leader, seen) {
            (CopyState::Current, ..) => Some(0),
            (CopyState::Behind(behind), ..) => Some(behind.slots),
            // What it has applied says nothing of the chunks that are not there yet.
            (CopyState::Copying(..) | CopyState::Rejoining(..) | CopyState::Unknown, ..) => None,
            (_, Some(leader), Some(peer)) if peer.silent_ms.is_some() => {
                Some(leader.chosen.saturating_sub(peer.applied))
            }
            _ => None,
        };
        match (slots, seen) {
            (None, _) => Lag::default(),
            (Some(0), _) | (_, None) => Lag {
                slots,
                ms: slots.filter(|slots| *slots == 0),
                bytes: slots.filter(|slots| *slots == 0),
            },
            (_, Some(peer)) => Lag {
                slots,
                ms: peer.behind_ms,
                bytes: peer.behind_bytes,
            },
        }
    }
}

fn peer(leader: &ServerStatus, id: ServerId) -> Option<&PeerStatus> {
    leader.peers.iter().find(|peer| peer.server == id)
}

impl Health {
    /// Those of the servers that hold everything.
    pub(super) fn current(&self, servers: &[ServerId]) -> Vec<ServerId> {
        let is_current = |id: &ServerId| self.copies.get(id) == Some(&CopyState::Current);
        servers.iter().copied().filter(is_current).collect()
    }

    /// The first line of `pss status`.
    pub(super) fn sentence(&self) -> String {
        match self.verdict {
            Verdict::NoMajority => self.no_majority(),
            Verdict::NoLeader => format!(
                "No leader: {} answer, which is a majority, and are about to elect one. Ask again in a few seconds.",
                servers(&self.answering)
            ),
            Verdict::Works { may_fail } => {
                let troubles: Vec<String> = self
                    .copies
                    .iter()
                    .filter_map(|(id, state)| trouble(*id, *state))
                    .collect();
                let sentence = match troubles.is_empty() {
                    true => self.all_well(may_fail),
                    false => self.degraded(&troubles.join(" "), may_fail),
                };
                match self.full.is_empty() {
                    true => sentence,
                    false => format!("{} {sentence}", self.refused()),
                }
            }
        }
    }

    fn refused(&self) -> String {
        let (disk, is) = match self.full.len() {
            1 => ("disk", "is"),
            _ => ("disks", "are"),
        };
        format!(
            "Writes are refused: the {disk} of {} {is} full; free some space, or trim or delete volumes.",
            servers(&self.full)
        )
    }

    fn core(&self) -> usize {
        self.core.len()
    }

    fn no_majority(&self) -> String {
        let core = self.core();
        let majority = core / 2 + 1;
        let mut answering = self.answering.clone();
        answering.retain(|id| self.core.contains(id));
        let who = match answering.len() {
            0 => format!("none of {core} core servers answers"),
            1 => format!(
                "1 of {core} core servers answers (server {})",
                Ids(&answering)
            ),
            n => format!(
                "{n} of {core} core servers answer (servers {})",
                Ids(&answering)
            ),
        };
        // Enough may answer here and still not hear each other.
        if answering.len() >= majority {
            return format!(
                "No majority: {who}, but they do not reach each other. Volumes can be neither read nor written until {majority} do."
            );
        }
        format!(
            "No majority: {who}; {majority} are needed. Volumes can be neither read nor written until {} more {}.",
            majority - answering.len(),
            if majority - answering.len() == 1 {
                "runs"
            } else {
                "run"
            }
        )
    }

    fn all_well(&self, may_fail: usize) -> String {
        let core = self.core();
        let copies = match self.copies.len() {
            1 => "The only copy is current.".to_owned(),
            n => format!("All {n} copies current."),
        };
        let servers = match core == self.copies.len() {
            true => "server",
            false => "core server",
        };
        match may_fail {
            0 => format!("{copies} No {servers} may fail."),
            1 => format!("{copies} Any 1 {servers} may fail."),
            n => format!("{copies} Any {n} {servers}s may fail."),
        }
    }

    fn degraded(&self, troubles: &str, may_fail: usize) -> String {
        let core_is_well = self
            .copies
            .iter()
            .filter(|(id, _)| self.core.contains(id))
            .all(|(_, state)| *state == CopyState::Current);
        // Learners do not count towards what may fail.
        if core_is_well {
            let rest = match may_fail {
                0 => "No core server may fail.".to_owned(),
                1 => "Any 1 core server may fail.".to_owned(),
                n => format!("Any {n} core servers may fail."),
            };
            return format!("{troubles} All core servers are current. {rest}");
        }
        match may_fail {
            0 => format!("{troubles} Until then no further server may fail."),
            1 => format!("{troubles} Until then 1 further server may fail."),
            n => format!("{troubles} Until then {n} further servers may fail."),
        }
    }
}

/// What is wrong with one server, as a sentence.
fn trouble(id: ServerId, state: CopyState) -> Option<String> {
    Some(match state {
        CopyState::Current => return None,
        CopyState::Behind(behind) => {
            let by = match (behind.ms, behind.slots) {
                (Some(ms @ 1000..), _) => span(ms / 1000),
                (_, 1) => "1 slot".to_owned(),
                (_, slots) => format!("{} slots", grouped(slots)),
            };
            if behind.is_stalled {
                return Some(format!(
                    "Server {id} is {by} behind, because its disk is full: free some space there."
                ));
            }
            let left = how_far(None, behind.left_s);
            format!("Server {id} is {by} behind, catching up{left}.")
        }
        CopyState::Copying(progress, left_s) => {
            format!(
                "Server {id} is copying chunks{}.",
                how_far(progress, left_s)
            )
        }
        CopyState::Rejoining(progress, left_s) => format!(
            "Server {id} has a new disk and learns what the others hold{}.",
            how_far(progress, left_s)
        ),
        CopyState::Apart(Some(seconds)) => format!(
            "Server {id} runs, but the leader has not heard from it for {}: check the network between them.",
            span(seconds)
        ),
        CopyState::Apart(None) => format!(
            "Server {id} runs, but the leader has never heard from it: check the network between them."
        ),
        CopyState::Silent(Some(seconds)) => {
            format!(
                "Server {id} has not been heard from for {}: start it.",
                span(seconds)
            )
        }
        CopyState::Silent(None) => format!("Server {id} does not answer: start it."),
        CopyState::Unknown => return None,
    })
}

/// Behind a sentence: how far copying is, and how long it takes still.
fn how_far(progress: Option<(u64, u64)>, left_s: Option<u64>) -> String {
    let done = match progress {
        Some((done, total)) if total > 0 => {
            format!(", {} of {} chunks done", grouped(done), grouped(total))
        }
        _ => String::new(),
    };
    let left = left_s.map(|left_s| {
        let (number, unit) = match left_s {
            0..120 => (left_s, "seconds"),
            120..7200 => (left_s / 60, "minutes"),
            _ => (left_s / 3600, "hours"),
        };
        format!(", about {number} {unit} left")
    });
    done + &left.unwrap_or_default()
}

fn servers(ids: &[ServerId]) -> String {
    match ids.len() {
        1 => format!("server {}", Ids(ids)),
        _ => format!("servers {}", Ids(ids)),
    }
}

impl CopyState {
    /// A word for the table.
    pub(super) fn word(self) -> String {
        match self {
            CopyState::Current => "current".into(),
            CopyState::Behind(_) => "catching up".into(),
            CopyState::Copying(Some((done, total)), _) if total > 0 => {
                format!("copying {} %", u128::from(done) * 100 / u128::from(total))
            }
            CopyState::Copying(..) => "copying".into(),
            CopyState::Rejoining(Some((done, total)), _) if total > 0 => {
                format!("learning {} %", u128::from(done) * 100 / u128::from(total))
            }
            CopyState::Rejoining(..) => "learning".into(),
            CopyState::Apart(_) => "no contact".into(),
            CopyState::Silent(_) => "no answer".into(),
            CopyState::Unknown => "unknown".into(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use pss_core::types::Ballot;

    use super::*;

    pub(in crate::cli) fn status(id: u8, role: &str, applied: u64) -> ServerStatus {
        ServerStatus {
            cell: "c".into(),
            server: ServerId(id),
            version: "0".into(),
            pid: 1,
            uptime_s: 1,
            role: role.into(),
            leader: Some(ServerId(0)),
            ballot: Ballot::default(),
            chosen: applied,
            applied,
            last: applied,
            log_first: 1,
            copying: None,
            copying_left_s: None,
            rejoining: false,
            incarnation: 1,
            lives: Vec::new(),
            free_bytes: 1 << 30,
            space_left: 1 << 30,
            full: false,
            stalled: false,
            total_bytes: 2 << 30,
            bad_blocks: 0,
            repaired_blocks: 0,
            lost_blocks: 0,
            clients: 0,
            peers: Vec::new(),
            members: None,
            last_ballot: Ballot::default(),
            given_up_by: None,
            claimed_twice: Vec::new(),
            scrub: None,
        }
    }

    fn seen(id: u8, alive: bool, applied: u64, silent_ms: u64) -> PeerStatus {
        PeerStatus {
            server: ServerId(id),
            alive,
            applied,
            durable: applied,
            copying: false,
            silent_ms: Some(silent_ms),
            behind_ms: None,
            behind_bytes: None,
            left_s: None,
            acknowledged: 12,
        }
    }

    /// Server 0 leads at slot 5000 and hears servers below `count` at (alive, applied).
    pub(in crate::cli) fn answers(count: u8, followers: &[(u8, bool, u64)]) -> Answers {
        let mut leader = status(0, "leader", 5000);
        let mut statuses = BTreeMap::new();
        for &(id, alive, applied) in followers {
            leader.peers.push(seen(id, alive, applied, 14_000));
            if alive {
                let role = if id < 5 { "follower" } else { "learner" };
                statuses.insert(ServerId(id), status(id, role, applied));
            }
        }
        statuses.insert(ServerId(0), leader);
        Answers {
            listed: (0..count).map(ServerId).collect(),
            statuses,
            failures: BTreeMap::new(),
        }
    }

    fn sentence(answers: &Answers) -> String {
        answers.judge(None).sentence()
    }

    #[test]
    fn all_current() {
        let three = answers(3, &[(1, true, 5000), (2, true, 5001)]);
        assert_eq!(
            sentence(&three),
            "All 3 copies current. Any 1 server may fail."
        );
        let one = answers(1, &[]);
        assert_eq!(
            sentence(&one),
            "The only copy is current. No server may fail."
        );
        let all: Vec<_> = (1..8).map(|id| (id, true, 5000)).collect();
        assert_eq!(
            sentence(&answers(8, &all)),
            "All 8 copies current. Any 2 core servers may fail."
        );
    }

    #[test]
    fn a_server_behind() {
        let three = answers(3, &[(1, true, 5000), (2, true, 3796)]);
        assert_eq!(
            sentence(&three),
            "Server 2 is 1,204 slots behind, catching up. Until then no further server may fail."
        );
        assert_eq!(three.judge(None).verdict, Verdict::Works { may_fail: 0 });
        // It had reached what was chosen when the leader was first asked.
        assert_eq!(
            three.judge(Some(3796)).verdict,
            Verdict::Works { may_fail: 1 }
        );
    }

    #[test]
    fn a_server_behind_by_some_time() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 3796)]);
        let leader = three.statuses.get_mut(&ServerId(0)).unwrap();
        let seen = &mut leader.peers[1];
        (seen.behind_ms, seen.behind_bytes) = (Some(14_200), Some(5 << 20));
        seen.left_s = Some(190);
        assert_eq!(
            sentence(&three),
            "Server 2 is 14 s behind, catching up, about 3 minutes left. Until then no further server may fail."
        );
        let state = three.judge(None).copies[&ServerId(2)];
        let lag = three.lag(ServerId(2), state);
        assert_eq!((lag.ms, lag.bytes), (Some(14_200), Some(5 << 20)));
        let leader = three.statuses.get_mut(&ServerId(0)).unwrap();
        leader.peers[1].behind_ms = Some(600);
        assert!(
            sentence(&three).starts_with("Server 2 is 1,204 slots behind, catching up, about 3")
        );
    }

    #[test]
    fn full_disks() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 3796)]);
        let fill = |answers: &mut Answers, id| {
            let status = answers.statuses.get_mut(&ServerId(id)).unwrap();
            (status.full, status.stalled) = (true, true);
        };
        fill(&mut three, 2);
        assert_eq!(
            sentence(&three),
            "Server 2 is 1,204 slots behind, because its disk is full: free some space there. \
             Until then no further server may fail."
        );
        fill(&mut three, 0);
        assert!(
            sentence(&three).starts_with(
                "Writes are refused: the disks of servers 0 and 2 are full; free some space, or trim or delete volumes. \
                 Server 2 is 1,204"
            ),
            "{}",
            sentence(&three)
        );
        // One is away, and one of the two that are left is full.
        let mut three = answers(3, &[(1, false, 5000), (2, true, 5000)]);
        fill(&mut three, 2);
        assert!(sentence(&three).starts_with("Writes are refused: the disk of server 2 is full"));
    }

    #[test]
    fn a_server_that_has_just_stopped() {
        let mut three = answers(3, &[(1, true, 4997), (2, true, 5000)]);
        three.statuses.remove(&ServerId(1));
        // Another network may be all that keeps us from it.
        let slow = ServerError::TimedOut(std::time::Duration::from_secs(1));
        three.failures.insert(ServerId(1), slow);
        assert!(sentence(&three).starts_with("Server 1 is 3 slots behind"));
        let refused = std::io::Error::from(ErrorKind::ConnectionRefused);
        three.failures.insert(ServerId(1), refused.into());
        assert_eq!(
            sentence(&three),
            "Server 1 does not answer: start it. Until then no further server may fail."
        );
        let refused = std::io::Error::from(ErrorKind::ConnectionRefused);
        three.failures.insert(ServerId(2), refused.into());
        three.statuses.remove(&ServerId(2));
        assert_eq!(three.judge(None).verdict, Verdict::NoMajority);
    }

    #[test]
    fn a_silent_server() {
        let five = answers(
            5,
            &[
                (1, true, 5000),
                (2, true, 5000),
                (3, true, 5000),
                (4, false, 1),
            ],
        );
        assert_eq!(
            sentence(&five),
            "Server 4 has not been heard from for 14 s: start it. Until then 1 further server may fail."
        );
    }

    #[test]
    fn a_server_that_only_the_leader_hears_counts() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        three.statuses.remove(&ServerId(2));
        assert_eq!(three.judge(None).copies[&ServerId(2)], CopyState::Current);
    }

    #[test]
    fn a_server_without_contact_to_the_leader() {
        let mut three = answers(3, &[(1, true, 5000), (2, false, 5000)]);
        three
            .statuses
            .insert(ServerId(2), status(2, "candidate", 5000));
        assert!(sentence(&three).starts_with("Server 2 runs, but the leader has not heard"));
    }

    #[test]
    fn copying() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 100)]);
        three.statuses.get_mut(&ServerId(2)).unwrap().copying = Some((37, 1200));
        assert!(
            sentence(&three).starts_with("Server 2 is copying chunks, 37 of 1,200 chunks done.")
        );
        assert_eq!(three.judge(None).copies[&ServerId(2)].word(), "copying 3 %");
    }

    #[test]
    fn a_new_disk() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 100)]);
        three.statuses.get_mut(&ServerId(2)).unwrap().rejoining = true;
        assert_eq!(
            sentence(&three),
            "Server 2 has a new disk and learns what the others hold. Until then no further server may fail."
        );
        assert_eq!(three.judge(None).copies[&ServerId(2)].word(), "learning");
        let status = three.statuses.get_mut(&ServerId(2)).unwrap();
        (status.copying, status.copying_left_s) = (Some((300, 1200)), Some(190));
        assert_eq!(
            sentence(&three),
            "Server 2 has a new disk and learns what the others hold, 300 of 1,200 chunks done, about 3 minutes left. \
             Until then no further server may fail."
        );
        assert_eq!(
            three.judge(None).copies[&ServerId(2)].word(),
            "learning 25 %"
        );
        // It is no majority with one other.
        let mut two = answers(3, &[(1, false, 0), (2, true, 5000)]);
        two.statuses.get_mut(&ServerId(2)).unwrap().rejoining = true;
        assert_eq!(two.judge(None).verdict, Verdict::NoMajority);
    }

    #[test]
    fn a_learner_behind_does_not_matter_to_the_majority() {
        let mut with_learner = answers(3, &[(1, true, 5000), (2, true, 5000), (5, true, 4999)]);
        with_learner.listed.push(ServerId(5));
        assert_eq!(
            sentence(&with_learner),
            "Server 5 is 1 slot behind, catching up. All core servers are current. Any 1 core server may fail."
        );
    }

    #[test]
    fn no_majority() {
        let mut three = answers(3, &[(1, false, 0), (2, false, 0)]);
        let health = three.judge(None);
        assert_eq!(health.verdict, Verdict::NoMajority);
        assert_eq!(
            health.sentence(),
            "No majority: 1 of 3 core servers answers (server 0); 2 are needed. Volumes can be neither read nor written until 1 more runs."
        );
        three.statuses.clear();
        assert!(sentence(&three).starts_with("No majority: none of 3 core servers answers; 2"));
    }

    #[test]
    fn no_leader() {
        let mut three = answers(3, &[(1, true, 5000), (2, true, 5000)]);
        three.statuses.get_mut(&ServerId(0)).unwrap().role = "candidate".into();
        let health = three.judge(None);
        assert_eq!(health.verdict, Verdict::NoLeader);
        assert!(
            health
                .sentence()
                .starts_with("No leader: servers 0, 1 and 2 answer")
        );
    }
}
