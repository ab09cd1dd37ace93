//! The side that asks: gathers what all servers hold, compares, and has the minority mended.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::ScrubBug;
use crate::chunk::Digest;
use crate::engine::{Action, ClientId, Engine};
use crate::entry::{Command, Op};
use crate::paxos::message::{Message, SyncMessage};
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, ChunkIndex, ServerId, Slot};
use crate::wire::inspect::{
    Inspection, SurveyDifference, SurveyInfo, SurveyQuestion, SurveyScope, SurveyServer,
};
use crate::wire::survey::{
    MendAnswer, MendRequest, POINT_CHUNKS_MAX, PointAnswer, PointRefusal, PointRequest,
    PointResult, PointStage,
};

/// Surveys under way at once, of clients and our own.
const SURVEYS_MAX: usize = 4;
/// Those that are kept, so that the result can be asked for again.
const KEPT_MAX: usize = 16;
/// A client that has not asked for so long has lost interest.
const INTEREST: Duration = Duration::from_secs(30);
/// How often servers are asked: until their first answer, and then.
const ASK_AGAIN: Duration = Duration::from_millis(200);
const TICK: Duration = Duration::from_millis(50);
/// A server that has not answered for so long does not.
const SILENT: Duration = Duration::from_secs(5);
/// So long a server may lag behind the slot.
const LAGS: Duration = Duration::from_secs(60);
/// Other slots that are tried if a server has missed the question.
const ATTEMPTS_MAX: u32 = 20;
/// Of a range that is verified: how often it is looked at, the first time included.
const ROUNDS_MAX: u32 = 3;
/// So long damaged blocks have to be repaired before they are looked at again: requests for them are given up then.
const REPAIR_TIME: Duration = Duration::from_secs(3);
/// So long the minority has to mend its chunks.
const MEND_TIME: Duration = Duration::from_secs(20);

#[derive(Default)]
pub(in crate::engine) struct Surveys(Vec<Survey>);

struct Survey {
    question: SurveyQuestion,
    /// Nobody waits for it.
    is_calm: bool,
    /// Asked for by the client.
    asked: Instant,
    at: Slot,
    attempt: u32,
    round: u32,
    servers: BTreeMap<ServerId, Seen>,
    stage: Stage,
    next_at: Instant,
    /// Of the first round: damaged blocks by server, and differences.
    bad: BTreeMap<ServerId, u64>,
    differences: BTreeMap<ChunkIndex, Difference>,
}

enum Stage {
    Points { since: Instant },
    Mending { since: Instant },
    Done,
    Failed(String),
}

struct Seen {
    stage: Option<PointStage>,
    heard: Instant,
    ask_at: Instant,
    /// It is not waited for any more: why.
    given_up: Option<&'static str>,
}

#[derive(Clone, Debug, Default)]
struct Difference {
    /// Who is to mend; empty: nobody knows who is right.
    minority: BTreeSet<ServerId>,
    source: Option<ServerId>,
    /// Slot of the comparison.
    at: Slot,
    /// Blocks that were replaced, by server.
    replaced: BTreeMap<ServerId, u32>,
    is_equal: bool,
}

/// See [`Surveys::end_of`].
pub(super) enum SurveyEnd {
    NotYet,
    /// It was given up: another server leads.
    Lost,
    /// The chunks of the volume below this one were looked at; none: all.
    Until(Option<ChunkIndex>),
}

impl Surveys {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.0.iter().map(|survey| survey.next_at).min()
    }

    /// How a survey of our own has ended; it is forgotten then.
    pub(super) fn end_of(&mut self, id: u64) -> SurveyEnd {
        let Some(at) = self.0.iter().position(|it| it.question.id == id) else {
            return SurveyEnd::Lost;
        };
        if !self.0[at].is_over() {
            return SurveyEnd::NotYet;
        }
        let survey = self.0.remove(at);
        SurveyEnd::Until(match survey.stage {
            // The volume is gone.
            Stage::Failed(_) => None,
            _ => survey.until(),
        })
    }

    fn under_way(&self) -> usize {
        self.0.iter().filter(|survey| !survey.is_over()).count()
    }

    fn forget_old(&mut self) {
        if self.0.len() >= KEPT_MAX
            && let Some(old) = self.0.iter().position(Survey::is_over)
        {
            self.0.remove(old);
        }
    }

    fn get_mut(&mut self, id: u64, at: Slot) -> Option<&mut Survey> {
        let mut surveys = self.0.iter_mut();
        surveys.find(|it| it.question.id == id && it.at == at)
    }
}

impl Seen {
    fn new(now: Instant) -> Seen {
        Seen {
            stage: None,
            heard: now,
            ask_at: now,
            given_up: None,
        }
    }

    fn is_final(&self) -> bool {
        let answered = matches!(
            self.stage,
            Some(PointStage::Done(_) | PointStage::Refused(_))
        );
        answered || self.given_up.is_some()
    }

    fn result(&self) -> Option<&PointResult> {
        match &self.stage {
            Some(PointStage::Done(result)) => Some(result),
            _ => None,
        }
    }
}

impl Survey {
    fn request(&self) -> PointRequest {
        let is_part = self.question.scope == SurveyScope::Verify;
        PointRequest {
            id: self.question.id,
            at: self.at,
            volume: self.question.volume,
            from: self.question.from,
            chunks_max: if is_part { POINT_CHUNKS_MAX as u32 } else { 0 },
            calm: self.is_calm,
        }
    }

    /// All servers have looked at the chunks below this one; none: all of them.
    fn until(&self) -> Option<ChunkIndex> {
        let results = self.servers.values().filter_map(Seen::result);
        results.filter_map(|result| result.until).min()
    }

    fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Failed(_))
    }
}

impl Engine {
    /// A client asks how far a survey is, and begins it by that.
    pub(in crate::engine) fn answer_survey(
        &mut self,
        now: Instant,
        client: ClientId,
        tag: u64,
        question: SurveyQuestion,
    ) {
        let info = match question.scope {
            SurveyScope::Own => self.own_survey(now, question),
            SurveyScope::All | SurveyScope::Verify => self.survey(now, question),
        };
        self.answer_inspection(client, tag, Inspection::Survey(info));
        self.drain(now);
    }

    fn own_survey(&mut self, now: Instant, question: SurveyQuestion) -> SurveyInfo {
        let known = self.scrub.tasks.slot_of(question.id);
        let request = PointRequest {
            id: question.id,
            at: known.unwrap_or(self.state.applied()),
            volume: question.volume,
            from: ChunkIndex(0),
            chunks_max: 0,
            calm: false,
        };
        let seen = Seen {
            stage: Some(self.point(now, request)),
            ..Seen::new(now)
        };
        let server = server_info(self.replica.id(), &seen);
        SurveyInfo {
            state: match server.state.as_str() {
                "waiting" => "running".to_owned(),
                state => state.to_owned(),
            },
            slot: Some(request.at),
            size_bytes: seen.result().map_or(0, |result| result.size_bytes),
            reason: server.reason.clone(),
            servers: vec![server],
            ..self.empty_info()
        }
    }

    fn empty_info(&self) -> SurveyInfo {
        SurveyInfo {
            server: self.replica.id(),
            state: String::new(),
            leader: None,
            reason: None,
            slot: None,
            size_bytes: 0,
            next: None,
            servers: Vec::new(),
            differences: Vec::new(),
        }
    }

    fn survey(&mut self, now: Instant, question: SurveyQuestion) -> SurveyInfo {
        if !self.serves() {
            let leader = self.replica.leader().filter(|it| *it != self.replica.id());
            return SurveyInfo {
                state: "elsewhere".to_owned(),
                leader,
                ..self.empty_info()
            };
        }
        let failed = |reason: &str| SurveyInfo {
            state: "failed".to_owned(),
            reason: Some(reason.to_owned()),
            ..self.empty_info()
        };
        if !self.volumes.contains_key(&question.volume) {
            return failed("there is no such volume");
        }
        let at = self
            .scrub
            .surveys
            .0
            .iter()
            .position(|it| it.question == question);
        let at = match at {
            Some(at) => at,
            None if self.scrub.surveys.under_way() >= SURVEYS_MAX => {
                return failed("the leader has too much of this to do; ask again later");
            }
            None => {
                self.scrub.surveys.forget_old();
                self.begin_survey(now, question, false);
                self.scrub.surveys.0.len() - 1
            }
        };
        self.scrub.surveys.0[at].asked = now;
        self.pump_surveys(now);
        let survey = self
            .scrub
            .surveys
            .0
            .iter()
            .find(|it| it.question == question);
        survey.map_or_else(|| self.empty_info(), |it| self.survey_info(it))
    }

    fn survey_info(&self, survey: &Survey) -> SurveyInfo {
        let (state, reason) = match &survey.stage {
            Stage::Done => ("done", None),
            Stage::Failed(reason) => ("failed", Some(reason.clone())),
            _ => ("running", None),
        };
        let servers = survey.servers.iter().map(|(id, seen)| {
            let mut info = server_info(*id, seen);
            info.bad_left = info.bad;
            info.bad = survey
                .bad
                .get(id)
                .copied()
                .unwrap_or_default()
                .max(info.bad);
            info
        });
        let differences = survey.differences.iter();
        let differences = differences.map(|(chunk, difference)| SurveyDifference {
            chunk: chunk.0,
            servers: difference.minority.iter().copied().collect(),
            replaced: difference.replaced.values().map(|it| u64::from(*it)).sum(),
            repaired: difference.is_equal,
        });
        let sizes = survey.servers.values().filter_map(Seen::result);
        SurveyInfo {
            state: state.to_owned(),
            reason,
            slot: Some(survey.at),
            size_bytes: sizes.map(|result| result.size_bytes).max().unwrap_or(0),
            next: survey.until().map(|chunk| chunk.0),
            servers: servers.collect(),
            differences: differences.collect(),
            ..self.empty_info()
        }
    }

    pub(super) fn begin_survey(&mut self, now: Instant, question: SurveyQuestion, is_calm: bool) {
        let mut survey = Survey {
            question,
            is_calm,
            asked: now,
            at: Slot(0),
            attempt: 0,
            round: 1,
            servers: BTreeMap::new(),
            stage: Stage::Points { since: now },
            next_at: now,
            bad: BTreeMap::new(),
            differences: BTreeMap::new(),
        };
        self.choose_slot(now, &mut survey);
        self.scrub.surveys.0.push(survey);
    }

    /// Asks everybody anew, for a slot that nobody has applied.
    fn choose_slot(&mut self, now: Instant, survey: &mut Survey) {
        let margin = u64::from(survey.attempt) * 4;
        survey.at = Slot(self.replica.last().slot.0 + 1 + margin);
        survey.stage = Stage::Points { since: now };
        let peers = self.replica.peers().map(|(id, _)| id);
        let servers = peers.chain([self.replica.id()]);
        survey.servers = servers.map(|id| (id, Seen::new(now))).collect();
        survey.next_at = now;
    }

    pub(super) fn pump_surveys(&mut self, now: Instant) {
        if self.scrub.surveys.0.is_empty() {
            return;
        }
        if !self.serves() {
            return self.scrub.surveys.0.clear();
        }
        let mut surveys = std::mem::take(&mut self.scrub.surveys.0);
        for survey in &mut surveys {
            if !survey.is_over() {
                self.pump_survey(now, survey);
            }
            survey.next_at = match survey.is_over() {
                true if survey.is_calm => now + INTEREST,
                true => survey.asked + INTEREST,
                false => now + TICK,
            };
        }
        // One of our own is taken by `Surveys::end_of`, however long it took.
        surveys.retain(|it| it.is_calm || now.since(it.asked) < INTEREST);
        self.scrub.surveys.0 = surveys;
    }

    fn pump_survey(&mut self, now: Instant, survey: &mut Survey) {
        match survey.stage {
            Stage::Points { since } => {
                self.ask_points(now, survey);
                self.give_up_servers(now, survey, since);
                if survey.servers.values().all(Seen::is_final) {
                    self.all_told(now, survey);
                }
            }
            Stage::Mending { since } => {
                self.ask_mends(now, survey);
                let is_mended = survey
                    .differences
                    .values()
                    .all(|it| it.minority.iter().all(|id| it.replaced.contains_key(id)));
                let waited = now.since(since);
                let has_bad = survey.bad.values().any(|bad| *bad > 0);
                let rests = has_bad && waited < REPAIR_TIME;
                if (is_mended || waited >= MEND_TIME) && !rests {
                    survey.round += 1;
                    survey.attempt = 0;
                    self.choose_slot(now, survey);
                }
            }
            Stage::Done | Stage::Failed(_) => {}
        }
    }

    /// Asks who has not told everything, and has the log reach the slot.
    fn ask_points(&mut self, now: Instant, survey: &mut Survey) {
        let request = survey.request();
        let own = self.replica.id();
        for (id, seen) in &mut survey.servers {
            if seen.is_final() || now < seen.ask_at {
                continue;
            }
            seen.ask_at = now + ASK_AGAIN;
            if *id == own {
                seen.heard = now;
                seen.stage = Some(self.point(now, request));
                continue;
            }
            self.actions.push_back(Action::Send {
                to: *id,
                message: Message::Sync(SyncMessage::TakePoint(request)),
            });
        }
        if self.replica.last().slot < survey.at && self.replica.queued() == 0 {
            let _ = self.replica.propose(vec![Command::internal(Op::Noop)]);
            self.replica.flush(now);
        }
    }

    fn give_up_servers(&mut self, now: Instant, survey: &mut Survey, since: Instant) {
        for seen in survey.servers.values_mut() {
            if seen.is_final() {
                continue;
            }
            let lags = matches!(seen.stage, Some(PointStage::Waiting { .. }));
            if now.since(seen.heard) >= SILENT {
                seen.given_up = Some("silent");
            } else if lags && now.since(since) >= LAGS {
                seen.given_up = Some("behind");
            }
        }
    }

    /// Everybody has told what there is to tell.
    fn all_told(&mut self, now: Instant, survey: &mut Survey) {
        let refused = |refusal| {
            let is = move |seen: &Seen| seen.stage == Some(PointStage::Refused(refusal));
            survey.servers.values().any(is)
        };
        let again = refused(PointRefusal::Passed) || refused(PointRefusal::Busy);
        if again && survey.attempt < ATTEMPTS_MAX {
            survey.attempt += 1;
            return self.choose_slot(now, survey);
        }
        if survey.question.scope == SurveyScope::All {
            survey.stage = Stage::Done;
            return;
        }
        self.compare(now, survey);
    }

    fn compare(&mut self, now: Instant, survey: &mut Survey) {
        let listed = survey.servers.len();
        let Some(volume) = self.volumes.get(&survey.question.volume).cloned() else {
            survey.stage = Stage::Failed("the volume was deleted".to_owned());
            return;
        };
        let level = (volume.chunk_bytes / BLOCK_BYTES as u32).trailing_zeros();
        let results: Vec<(ServerId, &PointResult)> = survey
            .servers
            .iter()
            .filter_map(|(id, seen)| Some((*id, seen.result()?)))
            .collect();
        if survey.round == 1 {
            survey.bad = results.iter().map(|(id, it)| (*id, it.bad)).collect();
        }
        let until = survey.until();
        let chunks: BTreeSet<ChunkIndex> = results
            .iter()
            .flat_map(|(_, result)| result.chunks.iter().map(|(chunk, _)| *chunk))
            .filter(|chunk| until.is_none_or(|until| *chunk < until))
            .collect();
        for difference in survey.differences.values_mut() {
            // Found equal now, unless it is found again.
            difference.is_equal = !difference.minority.is_empty();
        }
        let mut again = results.iter().any(|(_, result)| result.bad > 0);
        for chunk in chunks {
            let mut votes: BTreeMap<Digest, BTreeSet<ServerId>> = BTreeMap::new();
            for (id, result) in &results {
                let held = result.chunks.iter().find(|(it, _)| *it == chunk);
                let digest = held.map_or(Some(Digest::zeros(level)), |(_, digest)| *digest);
                if let Some(digest) = digest {
                    votes.entry(digest).or_default().insert(*id);
                }
            }
            if votes.len() < 2 {
                continue;
            }
            let is_majority = |servers: &&BTreeSet<ServerId>| match self.scrub.bug {
                Some(ScrubBug::Minority) => servers.len() * 2 < listed,
                Some(ScrubBug::Undecided) => true,
                _ => servers.len() * 2 > listed,
            };
            let majority = votes.values().find(is_majority);
            let minority: BTreeSet<ServerId> = majority.map_or_else(BTreeSet::new, |majority| {
                let others = votes.values().filter(|it| *it != majority);
                others.flatten().copied().collect()
            });
            // The leader has enough to do.
            let own = self.replica.id();
            let source = majority.and_then(|it| it.iter().max_by_key(|id| (**id != own, **id)));
            let is_new = !survey.differences.contains_key(&chunk);
            again |= majority.is_some();
            if is_new {
                note_difference(&volume.name, chunk, survey.at, &votes, &minority);
                self.scrub.counts.different += 1;
                self.scrub.counts.undecided += u64::from(majority.is_none());
            }
            let before = survey.differences.remove(&chunk).unwrap_or_default();
            let difference = Difference {
                minority: &minority | &before.minority,
                source: source.copied(),
                at: survey.at,
                // Those that are to mend again.
                replaced: before
                    .replaced
                    .into_iter()
                    .filter(|(id, _)| !minority.contains(id))
                    .collect(),
                is_equal: false,
            };
            survey.differences.insert(chunk, difference);
        }
        survey.stage = match again && survey.round < ROUNDS_MAX {
            true => Stage::Mending { since: now },
            false => Stage::Done,
        };
        for seen in survey.servers.values_mut() {
            seen.ask_at = now;
        }
    }

    fn ask_mends(&mut self, now: Instant, survey: &mut Survey) {
        let own = self.replica.id();
        let due: BTreeSet<ServerId> = survey
            .servers
            .iter()
            .filter_map(|(id, seen)| (now >= seen.ask_at).then_some(*id))
            .collect();
        for id in &due {
            if let Some(seen) = survey.servers.get_mut(id) {
                seen.ask_at = now + ASK_AGAIN;
            }
        }
        for (chunk, difference) in &mut survey.differences {
            let Some(source) = difference.source.filter(|_| !difference.is_equal) else {
                continue;
            };
            let request = MendRequest {
                id: survey.question.id,
                at: difference.at,
                volume: survey.question.volume,
                chunk: *chunk,
                from: source,
            };
            let open: Vec<ServerId> = difference
                .minority
                .iter()
                .filter(|id| due.contains(id) && !difference.replaced.contains_key(id))
                .copied()
                .collect();
            for id in open {
                if id == own {
                    if let Some(blocks) = self.mend(now, request).blocks {
                        difference.replaced.insert(own, blocks);
                    }
                    continue;
                }
                self.actions.push_back(Action::Send {
                    to: id,
                    message: Message::Sync(SyncMessage::Mend(request)),
                });
            }
        }
    }

    pub(super) fn point_answered(&mut self, now: Instant, from: ServerId, answer: PointAnswer) {
        let Some(survey) = self.scrub.surveys.get_mut(answer.id, answer.at) else {
            return;
        };
        if let Some(seen) = survey.servers.get_mut(&from)
            && !seen.is_final()
        {
            seen.heard = now;
            seen.stage = Some(answer.stage);
        }
    }

    pub(super) fn mend_answered(&mut self, _now: Instant, from: ServerId, answer: MendAnswer) {
        let surveys = &mut self.scrub.surveys.0;
        let Some(survey) = surveys.iter_mut().find(|it| it.question.id == answer.id) else {
            return;
        };
        if let Some(difference) = survey.differences.get_mut(&answer.chunk)
            && difference.at == answer.at
            && let Some(blocks) = answer.blocks
        {
            difference.replaced.insert(from, blocks);
        }
    }
}

fn note_difference(
    volume: &str,
    chunk: ChunkIndex,
    at: Slot,
    votes: &BTreeMap<Digest, BTreeSet<ServerId>>,
    minority: &BTreeSet<ServerId>,
) {
    let groups = votes.values().map(names);
    let groups = groups.collect::<Vec<_>>().join(" | ");
    match minority.is_empty() {
        true => tracing::error!(
            volume,
            chunk = chunk.0,
            slot = at.0,
            "servers hold different data, and no majority agrees: nothing is repaired (servers {groups})"
        ),
        false => tracing::error!(
            volume,
            chunk = chunk.0,
            slot = at.0,
            "server {} does not hold what the majority holds: its chunk is replaced (servers {groups})",
            names(minority)
        ),
    }
}

fn names(servers: &BTreeSet<ServerId>) -> String {
    let names: Vec<String> = servers.iter().map(ServerId::to_string).collect();
    names.join(", ")
}

fn server_info(server: ServerId, seen: &Seen) -> SurveyServer {
    let mut info = SurveyServer {
        server,
        ..SurveyServer::default()
    };
    let state = match &seen.stage {
        None | Some(PointStage::Waiting { .. }) => "waiting",
        Some(PointStage::Running { done, total }) => {
            (info.done, info.total) = (*done, *total);
            "running"
        }
        Some(PointStage::Refused(refusal)) => {
            info.reason = Some(refusal.reason().to_owned());
            "failed"
        }
        Some(PointStage::Done(result)) => {
            info.digest = result.digest.map(|digest| digest.to_string());
            (info.blocks, info.bad) = (result.blocks, result.bad);
            "done"
        }
    };
    info.state = seen.given_up.unwrap_or(state).to_owned();
    info
}
