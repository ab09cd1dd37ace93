//! Requests of clients, at the leader.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::chunk::ReadError;
use crate::engine::conflicts::BlockRange;
use crate::engine::{Action, ClientId, CommandKey, Engine, Fetched, ReadWhat, VolumeRead, Waiting};
use crate::entry::{Command, Entry, Op, Origin, block_checksums};
use crate::members::Members;
use crate::paxos::RoleKind;
use crate::paxos::members::ChangeRefused;
use crate::paxos::recover::RecoverRefused;
use crate::state::{Refusal, Volume};
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, RequestNumber, ServerId, SessionId, VolumeId};
use crate::volume::device::{Extent, ReadPart};
use crate::volume::reservation::Reservations;
use crate::wire::client::{
    EVENTS_ANSWERED_MAX, EventList, PeerStatus, REQUEST_BYTES_MAX, ReplyBody, ReplyError, Request,
    RequestBody, ServerStatus, VolumeStatus,
};
use crate::wire::inspect::Inspect;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Reads that wait for the lease at most; more are sent to whoever leads next.
const READS_WAITING_MAX: usize = 65_536;

/// A request that waits until it may touch its blocks.
pub(super) struct Deferred {
    client: ClientId,
    request: Request,
    pub(super) range: BlockRange,
    /// Reads before it writes, and is counted in `held`.
    merges: bool,
}

/// A request that has read, or is reading, what it changes in part.
pub(super) struct Merge {
    client: ClientId,
    request: Request,
    pub(super) range: BlockRange,
}

/// Who reads, and how.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    pub(super) client: ClientId,
    pub(super) tag: u64,
    /// If the answer may be given without the lease: how often chunks of another server had begun to come when it was
    /// asked for. Chunks that were read while they came may be of different ages.
    pub(super) stale: Option<u64>,
}

/// A read that another thread does.
pub(super) struct PendingRead {
    pub(super) reader: Reader,
    /// Of blocks; else nothing is cut off.
    span: Option<Span>,
}

/// Bytes of a volume.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) volume: VolumeId,
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u64,
}

impl Span {
    pub(super) fn new(volume: VolumeId, offset_bytes: u64, length_bytes: u64) -> Span {
        Span {
            volume,
            offset_bytes,
            length_bytes,
        }
    }

    fn blocks(&self) -> BlockRange {
        let first = self.offset_bytes / BLOCK;
        let end = (self.offset_bytes + self.length_bytes).div_ceil(BLOCK);
        BlockRange {
            volume: self.volume,
            first,
            blocks: end - first,
        }
    }

    fn is_aligned(&self) -> bool {
        self.offset_bytes.is_multiple_of(BLOCK) && self.length_bytes.is_multiple_of(BLOCK)
    }
}

impl Engine {
    /// A request of a client. Call [`Engine::finish_batch`] after a batch of them.
    pub fn handle_request(&mut self, now: Instant, client: ClientId, request: Request) {
        match &request.body {
            RequestBody::Status => {
                let status = ReplyBody::Status(Box::new(self.status(now)));
                return self.reply(client, request.tag, Ok(status));
            }
            RequestBody::Shutdown => {
                self.reply(client, request.tag, Ok(ReplyBody::Done));
                return self.actions.push_back(Action::Shutdown);
            }
            RequestBody::Recover { members } => {
                let answer = match self.recover(now, Members::clone(members)) {
                    Ok(()) => Ok(ReplyBody::Done),
                    Err(error) => Err(ReplyError::Refused(match error {
                        RecoverRefused::MajorityAlive(_) => Refusal::MajorityAlive,
                        RecoverRefused::Incomplete => Refusal::Incomplete,
                        RecoverRefused::NotAlone => Refusal::ServersOutdated,
                        RecoverRefused::Bad(_) => Refusal::BadServers,
                    })),
                };
                return self.reply(client, request.tag, answer);
            }
            RequestBody::Inspect(Inspect::Survey(question)) => {
                return self.answer_survey(now, client, request.tag, *question);
            }
            RequestBody::Inspect(what) => {
                let (tag, what) = (request.tag, *what);
                return self
                    .actions
                    .push_back(Action::Inspect { client, tag, what });
            }
            RequestBody::Browse { stale: true, what } => {
                let (tag, stale) = (request.tag, Some(self.installs));
                return self.browse(Reader { client, tag, stale }, what);
            }
            _ => {}
        }
        if !self.serves() {
            let leader = self.replica.leader().filter(|it| *it != self.replica.id());
            return self.reply(client, request.tag, Err(ReplyError::NotLeader { leader }));
        }
        if self.state.has_session(request.session) {
            self.heard.insert(request.session, now);
        } else if request.session != SessionId(0) && request.body != RequestBody::EndSession {
            // Without the lease another leader may have opened it meanwhile. Whoever ends a session
            // that has ended, because the answer was lost, goes through the log and gets it again.
            let error = match self.replica.may_read(now) {
                true => ReplyError::Refused(Refusal::StaleSession),
                false => ReplyError::NotLeader { leader: None },
            };
            return self.reply(client, request.tag, Err(error));
        }
        self.dispatch(now, client, request);
    }

    /// Begins a request of a known session, unless it has to wait for a change of reservations.
    pub(super) fn dispatch(&mut self, now: Instant, client: ClientId, request: Request) {
        let reads = matches!(
            request.body.unchecked(),
            RequestBody::Read { .. }
                | RequestBody::Extents { .. }
                | RequestBody::ListVolumes
                | RequestBody::Reservations { .. }
                | RequestBody::Look { .. }
                | RequestBody::Browse { .. }
                | RequestBody::Events { .. }
        );
        if reads && !self.replica.may_read(now) {
            // Checked when there is a lease.
            return self.read_later(client, request);
        }
        let Some(request) = self.admit(client, request) else {
            return;
        };
        match &request.body {
            RequestBody::KeepAlive => self.reply(client, request.tag, Ok(ReplyBody::Done)),
            RequestBody::SetServers { members } => {
                let done = self.set_servers(now, Members::clone(members));
                self.reply(client, request.tag, done);
            }
            _ if reads => self.read_request(now, client, request),
            _ => self.change_request(client, request),
        }
    }

    fn set_servers(&mut self, now: Instant, members: Members) -> Result<ReplyBody, ReplyError> {
        let refused = |refusal| Err(ReplyError::Refused(refusal));
        match self.change_members(now, members) {
            Ok(()) => Ok(ReplyBody::Done),
            Err(ChangeRefused::NotLeader) => Err(ReplyError::NotLeader { leader: None }),
            Err(ChangeRefused::UnderWay) => refused(Refusal::ServersUnderWay),
            Err(ChangeRefused::TooMuch) => refused(Refusal::ServersTooMuch),
            Err(ChangeRefused::Behind(_)) => refused(Refusal::ServerBehind),
            Err(ChangeRefused::Outdated) => refused(Refusal::ServersOutdated),
            Err(ChangeRefused::Bad(_)) => refused(Refusal::BadServers),
            Err(ChangeRefused::Leader) => {
                self.hand_over(now);
                refused(Refusal::ServerLeads)
            }
        }
    }

    /// Keeps a read until there is a lease.
    fn read_later(&mut self, client: ClientId, request: Request) {
        if self.reads_waiting.len() >= READS_WAITING_MAX {
            let leader = None;
            return self.reply(client, request.tag, Err(ReplyError::NotLeader { leader }));
        }
        self.reads_waiting.push_back((client, request));
    }

    /// Proposes what a batch of requests made.
    pub fn finish_batch(&mut self, now: Instant) {
        self.replica.flush(now);
        self.drain(now);
    }

    /// Whether [`Engine::finish_reads`] has something to do.
    pub fn has_finished_reads(&self) -> bool {
        !self.reads_done.is_empty()
    }

    /// Bytes that the finished reads have brought.
    pub fn finished_read_bytes(&self) -> usize {
        self.reads_done_bytes
    }

    /// Answers the reads that are done, if the lease still holds at `now`, which must have been taken
    /// after the last input was handled.
    pub fn finish_reads(&mut self, now: Instant) {
        if self.reads_done.is_empty() {
            return;
        }
        let may_read = self.replica.may_read(now);
        let is_complete = self.is_complete();
        self.reads_done_bytes = 0;
        for (reader, body) in std::mem::take(&mut self.reads_done) {
            let holds = match reader.stale {
                Some(installs) => is_complete && installs == self.installs,
                None => may_read,
            };
            let body = match holds {
                true => body,
                false => Err(ReplyError::NotLeader { leader: None }),
            };
            self.reply(reader.client, reader.tag, body);
        }
    }

    /// Says from where a client is connected: sessions that it opens from now on come from there.
    pub fn note_client(&mut self, client: ClientId, address: SocketAddr) {
        // What the log holds of it, so that all servers have the same.
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.addresses.insert(client, address);
    }

    /// A connection has ended: nobody waits for its answers.
    pub fn handle_client_gone(&mut self, client: ClientId) {
        self.addresses.remove(&client);
        self.reads_waiting.retain(|(waiting, _)| *waiting != client);
        self.queued.retain(|(waiting, _)| *waiting != client);
        self.reads_done
            .retain(|(reader, _)| reader.client != client);
        self.count_reads_done();
    }

    /// Another thread has read blocks.
    pub fn handle_read(
        &mut self,
        now: Instant,
        read: VolumeRead,
        result: Result<Fetched, ReadError>,
    ) {
        let ticket = read.ticket;
        let waits = self.slow_reads.contains_key(&ticket) || self.merging.contains_key(&ticket);
        if let (true, Ok(Fetched::Damaged(found))) = (waits, &result) {
            self.await_repair(now, read, found);
            return self.finish_batch(now);
        }
        self.forget_tries(ticket);
        if let Some(read) = self.slow_reads.remove(&ticket) {
            self.fetched(read.reader, read.span, result);
        } else if let Some(merge) = self.merging.remove(&ticket) {
            let parts = result
                .map_err(|_| ReplyError::Io)
                .map(|fetched| match fetched {
                    Fetched::Blocks(parts) => parts,
                    _ => unreachable!("a merge reads blocks"),
                });
            self.finish_merge(merge, parts);
            self.finish_batch(now);
        }
    }

    /// What was to be read cannot be read here.
    pub(super) fn fail_read(&mut self, ticket: u64, error: ReplyError) {
        if let Some(read) = self.slow_reads.remove(&ticket) {
            self.answer_reader(read.reader, Err(error));
        } else if let Some(merge) = self.merging.remove(&ticket) {
            self.finish_merge(merge, Err(error));
        }
    }

    /// Answers a read.
    fn fetched(&mut self, reader: Reader, span: Option<Span>, result: Result<Fetched, ReadError>) {
        let body = match result {
            Ok(Fetched::Blocks(parts)) => {
                let parts = match span {
                    Some(span) if !span.is_aligned() => {
                        let skip = (span.offset_bytes % BLOCK) as usize;
                        cut_parts(parts, skip, span.length_bytes as usize)
                    }
                    _ => parts,
                };
                Ok(ReplyBody::Data(parts))
            }
            Ok(Fetched::Extents(extents)) => {
                let extents = span.map_or_else(Vec::new, |span| cut_extents(extents, &span));
                Ok(ReplyBody::Extents(extents))
            }
            Ok(Fetched::Chunks(chunks, next)) => Ok(ReplyBody::Chunks { chunks, next }),
            Ok(Fetched::Damaged(_)) => unreachable!("it waits until they are repaired"),
            Err(ReadError::NoSuchVolume(_)) => Err(ReplyError::Refused(Refusal::NoSuchVolume)),
            Err(_) => Err(ReplyError::Io),
        };
        self.answer_reader(reader, body);
    }

    /// A read is done; [`Engine::finish_reads`] answers it.
    pub(super) fn answer_reader(&mut self, reader: Reader, body: Result<ReplyBody, ReplyError>) {
        self.reads_done_bytes += answer_bytes(&body);
        self.reads_done.push((reader, body));
    }

    fn count_reads_done(&mut self) {
        let left = self.reads_done.iter();
        self.reads_done_bytes = left.map(|(_, body)| answer_bytes(body)).sum();
    }

    fn read_request(&mut self, now: Instant, client: ClientId, request: Request) {
        if !self.replica.may_read(now) {
            return self.read_later(client, request);
        }
        let reader = Reader {
            client,
            tag: request.tag,
            stale: None,
        };
        match request.body {
            RequestBody::Read {
                volume,
                offset_bytes,
                length_bytes,
            } => {
                let span = Span::new(volume, offset_bytes, u64::from(length_bytes));
                self.read(reader, span);
            }
            RequestBody::Extents {
                volume,
                offset_bytes,
                length_bytes,
            } => self.extents(reader, Span::new(volume, offset_bytes, length_bytes)),
            RequestBody::Browse { what, .. } => self.browse(reader, &what),
            RequestBody::ListVolumes => {
                let body = Ok(ReplyBody::Volumes(self.volume_list()));
                self.answer_reader(reader, body);
            }
            RequestBody::Reservations { volume } => {
                let body = self.reservations_of(volume);
                self.answer_reader(reader, body);
            }
            RequestBody::Look { volume } => {
                let body = self.look(volume);
                self.answer_reader(reader, body);
            }
            RequestBody::Events { after } => {
                let events = self.state.events_after(after);
                let list = EventList {
                    first: self.state.first_event(),
                    last: self.state.events_made(),
                    events: events
                        .take(EVENTS_ANSWERED_MAX)
                        .cloned()
                        .map(Into::into)
                        .collect(),
                };
                self.answer_reader(reader, Ok(ReplyBody::Events(Box::new(list))));
            }
            _ => self.reply(client, request.tag, Err(ReplyError::Invalid)),
        }
    }

    pub(super) fn retry_waiting_reads(&mut self, now: Instant) {
        if !self.reads_waiting.is_empty() && self.replica.may_read(now) {
            for (client, request) in std::mem::take(&mut self.reads_waiting) {
                self.dispatch(now, client, request);
            }
        }
    }

    pub(super) fn read(&mut self, reader: Reader, span: Span) {
        match self.check_span(&span) {
            Ok(volume) => self.fetch(reader, volume, ReadWhat::Blocks(span.blocks()), Some(span)),
            Err(error) => self.answer_reader(reader, Err(error)),
        }
    }

    /// Reads what is in memory at once, and has another thread read what is not.
    pub(super) fn fetch(
        &mut self,
        reader: Reader,
        volume: Arc<Volume>,
        what: ReadWhat,
        span: Option<Span>,
    ) {
        match what.fetch(&self.chunks, &volume, true) {
            Err(ReadError::WouldBlock) => {
                let ticket = self.next_ticket();
                self.slow_reads.insert(ticket, PendingRead { reader, span });
                self.start_read(ticket, volume, what);
            }
            result => self.fetched(reader, span, result),
        }
    }

    fn next_ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn start_read(&mut self, ticket: u64, volume: Arc<Volume>, what: ReadWhat) {
        let read = VolumeRead {
            ticket,
            volume,
            what,
        };
        self.actions.push_back(Action::Read(read));
    }

    /// The volume, if the range lies within it and is not too long.
    fn check_span(&self, span: &Span) -> Result<Arc<Volume>, ReplyError> {
        let refuse = |refusal| Err(ReplyError::Refused(refusal));
        let Some(volume) = self.volumes.get(&span.volume) else {
            return refuse(Refusal::NoSuchVolume);
        };
        match span.offset_bytes.checked_add(span.length_bytes) {
            Some(end) if end <= volume.size_bytes => {}
            _ => return refuse(Refusal::OutOfRange),
        }
        if span.length_bytes > REQUEST_BYTES_MAX as u64 || span.length_bytes == 0 {
            return Err(ReplyError::Invalid);
        }
        Ok(Arc::clone(volume))
    }

    pub(super) fn extents(&mut self, reader: Reader, span: Span) {
        let start = Span {
            length_bytes: span.length_bytes.min(1),
            ..span
        };
        let end = span.offset_bytes.checked_add(span.length_bytes);
        let volume = self.check_span(&start).and_then(|volume| match end {
            Some(end) if end <= volume.size_bytes => Ok(volume),
            _ => Err(ReplyError::Refused(Refusal::OutOfRange)),
        });
        match volume {
            Ok(volume) => self.fetch(reader, volume, ReadWhat::Extents(span.blocks()), Some(span)),
            Err(error) => self.answer_reader(reader, Err(error)),
        }
    }

    pub(super) fn volume_list(&self) -> Vec<VolumeStatus> {
        let sessions: Vec<_> = self.state.sessions().collect();
        let status = |volume: &Volume| VolumeStatus {
            volume: volume.clone(),
            allocated_bytes: self.chunks.allocated_bytes(volume.id),
            attached_by: sessions
                .iter()
                .filter(|session| session.volumes.contains(&volume.id))
                .map(|session| session.name.clone())
                .collect(),
            reservations: self
                .state
                .reservations(volume.id)
                .map_or(0, Reservations::version),
            chunks: self.chunks.chunk_count(volume.id),
            times: self.state.times(volume.id),
        };
        self.state.volumes().map(status).collect()
    }

    /// Everything that goes through the log.
    fn change_request(&mut self, client: ClientId, request: Request) {
        let key = match &request.body {
            RequestBody::OpenSession { nonce, .. } => (SessionId(0), RequestNumber(*nonce)),
            // Ends as a command of the servers, under a number that no nonce is likely to have.
            RequestBody::EndSession => (SessionId(0), RequestNumber(request.session.0 | 1 << 63)),
            _ => (request.session, request.number),
        };
        // Repeated by a client that lost its connection: the answer goes to the new one.
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.client = client;
            waiting.tag = request.tag;
            return;
        }
        if self.readdress(client, &request) {
            return;
        }
        if let Some(answer) = self.state.remembered(key.0, key.1) {
            let waiting = Waiting {
                client,
                tag: request.tag,
                range: None,
            };
            self.waiting.insert(key, waiting);
            return self.answer_command(key, answer);
        }
        match self.check_change(&request) {
            Err(error) => self.reply(client, request.tag, Err(error)),
            Ok(None) => self.propose_control(client, key, request),
            Ok(Some((span, merges))) => {
                let range = span.blocks();
                if merges || self.held.touches(range) {
                    if merges {
                        self.held.add(range);
                    }
                    self.deferred.push_back(Deferred {
                        client,
                        request,
                        range,
                        merges,
                    });
                } else {
                    self.propose_write(client, request, range, None);
                }
            }
        }
    }

    /// Whether the request was begun before, so that its answer depends on nothing that holds now.
    pub(super) fn is_repeated(&self, request: &Request) -> bool {
        let key = (request.session, request.number);
        let same = |it: &Request| (it.session, it.number) == key;
        request.body.is_numbered()
            && (self.waiting.contains_key(&key)
                || self.deferred.iter().any(|it| same(&it.request))
                || self.merging.values().any(|it| same(&it.request))
                || self.state.remembered(key.0, key.1).is_some())
    }

    /// If the request waits for its blocks already, its answer goes to where it was repeated from. Twice in
    /// line, a compare-and-write would find its own work and say that it differs.
    fn readdress(&mut self, client: ClientId, request: &Request) -> bool {
        let same = |it: &Request| it.session == request.session && it.number == request.number;
        let deferred = self
            .deferred
            .iter_mut()
            .map(|it| (&mut it.client, &mut it.request));
        let merging = self
            .merging
            .values_mut()
            .map(|it| (&mut it.client, &mut it.request));
        match deferred.chain(merging).find(|(_, waiting)| same(waiting)) {
            Some((to, waiting)) => {
                *to = client;
                waiting.tag = request.tag;
                true
            }
            None => false,
        }
    }

    /// Checks what can be checked before the log; says which blocks are touched, and whether they have to
    /// be read first.
    fn check_change(&self, request: &Request) -> Result<Option<(Span, bool)>, ReplyError> {
        let named = request.session != SessionId(0) && request.number != RequestNumber(0);
        let (span, merges) = match &request.body {
            // That is how commands of the servers are known, which nobody waits for.
            RequestBody::OpenSession { nonce: 0, .. } => return Err(ReplyError::Invalid),
            RequestBody::OpenSession { .. } => return Ok(None),
            RequestBody::EndSession if request.session != SessionId(0) => return Ok(None),
            _ if !named => return Err(ReplyError::Invalid),
            RequestBody::Write {
                volume,
                offset_bytes,
                checksums,
                data,
            } => {
                let length_bytes = data.len() as u64;
                let span = Span {
                    volume: *volume,
                    offset_bytes: *offset_bytes,
                    length_bytes,
                };
                self.check_span(&span)?;
                let intact = if span.is_aligned() {
                    *checksums == block_checksums(*volume, offset_bytes / BLOCK, data)
                } else {
                    *checksums == [crc32c::crc32c(data)]
                };
                if !intact {
                    return Err(ReplyError::Invalid);
                }
                let merges = !span.is_aligned();
                (span, merges)
            }
            RequestBody::CompareAndWrite {
                volume,
                offset_bytes,
                checksum,
                data,
            } => {
                let length_bytes = data.len() as u64 / 2;
                let span = Span {
                    volume: *volume,
                    offset_bytes: *offset_bytes,
                    length_bytes,
                };
                self.check_span(&span)?;
                if data.len() % 2 != 0 || *checksum != crc32c::crc32c(data) {
                    return Err(ReplyError::Invalid);
                }
                (span, true)
            }
            RequestBody::Zero {
                volume,
                offset_bytes,
                length_bytes,
                allocate,
                ..
            } => {
                let known = Span {
                    volume: *volume,
                    offset_bytes: *offset_bytes,
                    length_bytes: 1,
                };
                let size = self.check_span(&known)?.size_bytes;
                let span = Span {
                    length_bytes: *length_bytes,
                    ..known
                };
                if offset_bytes
                    .checked_add(*length_bytes)
                    .is_none_or(|end| end > size)
                {
                    return Err(ReplyError::Refused(Refusal::OutOfRange));
                }
                if *allocate && *length_bytes > REQUEST_BYTES_MAX as u64 || *length_bytes == 0 {
                    return Err(ReplyError::Invalid);
                }
                (span, false)
            }
            RequestBody::ResizeVolume {
                volume, size_bytes, ..
            }
            | RequestBody::ShrinkVolume { volume, size_bytes } => {
                self.check_new_end(*volume, *size_bytes)?;
                return Ok(None);
            }
            _ => return Ok(None),
        };
        let needs_space = !matches!(
            request.body,
            RequestBody::Zero {
                allocate: false,
                ..
            }
        );
        if needs_space && self.refuses_writes() {
            return Err(ReplyError::NoSpace);
        }
        Ok(Some((span, merges)))
    }

    /// A volume becomes smaller to a whole number of blocks only: a part of a block behind the end stays in the block,
    /// and would come back when the volume grows again. What is refused here may be in logs of earlier versions, so
    /// [`crate::state::State`] lets it through. A size that was proposed may become the volume's before this one does.
    fn check_new_end(&self, id: VolumeId, size_bytes: u64) -> Result<(), ReplyError> {
        let own = self.state.volume(id).map(|volume| volume.size_bytes);
        let proposed = self.resizing.iter().filter(|(volume, _)| *volume == id);
        let largest = own.into_iter().chain(proposed.map(|(_, size)| *size)).max();
        let is_smaller = largest.is_some_and(|largest| size_bytes < largest);
        match is_smaller && !size_bytes.is_multiple_of(BLOCK) {
            true => Err(ReplyError::Refused(Refusal::EndWithinBlock)),
            false => Ok(()),
        }
    }

    /// An entry was applied: its new sizes are the volumes', or were refused.
    pub(super) fn note_resized(&mut self, entry: &Entry) {
        if self.resizing.is_empty() {
            return;
        }
        for command in entry.commands.iter() {
            let size = size_of(&command.op);
            if let Some(at) = self.resizing.iter().position(|it| Some(*it) == size) {
                self.resizing.swap_remove(at);
            }
        }
    }

    /// Proposes a request that touches no blocks by itself.
    fn propose_control(&mut self, client: ClientId, key: CommandKey, request: Request) {
        let reserves = match &request.body {
            RequestBody::Reserve { volume, .. } => Some(*volume),
            _ => None,
        };
        let op = match request.body {
            RequestBody::OpenSession { nonce, name, user } => Op::OpenSessionFrom {
                nonce,
                origin: Box::new(Origin {
                    name,
                    user,
                    address: self.addresses.get(&client).copied(),
                }),
            },
            RequestBody::Note { text } => Op::Note { text },
            RequestBody::EndSession => Op::EndSessions {
                sessions: vec![request.session],
            },
            RequestBody::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            } => Op::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            },
            RequestBody::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => Op::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            },
            RequestBody::DeleteVolume { volume } => Op::DeleteVolume { volume },
            RequestBody::ShrinkVolume { volume, size_bytes } => {
                Op::ShrinkVolume { volume, size_bytes }
            }
            RequestBody::DeleteAttachedVolume { volume } => Op::DeleteAttachedVolume { volume },
            RequestBody::Attach { volume } => Op::Attach { volume },
            RequestBody::Detach { volume } => Op::Detach { volume },
            RequestBody::Reserve { volume, request } => Op::Reserve { volume, request },
            _ => return self.reply(client, request.tag, Err(ReplyError::Invalid)),
        };
        let size = size_of(&op);
        let command = Command {
            session: key.0,
            number: key.1,
            settled_below: request.settled_below,
            op,
        };
        self.propose(client, request.tag, key, command, None);
        if self.waiting.contains_key(&key) {
            self.resizing.extend(size);
        }
        if let Some(volume) = reserves
            && self.waiting.contains_key(&key)
        {
            *self.reserving.entry(volume).or_default() += 1;
        }
    }

    /// Proposes a write of whole blocks; `merged` is what was made of a part of blocks.
    fn propose_write(
        &mut self,
        client: ClientId,
        request: Request,
        range: BlockRange,
        merged: Option<Bytes>,
    ) {
        let op = match (request.body, merged) {
            (_, Some(payload)) => Op::Write {
                volume: range.volume,
                first_block: range.first,
                checksums: block_checksums(range.volume, range.first, &payload),
                payload,
            },
            (
                RequestBody::Write {
                    checksums, data, ..
                },
                None,
            ) => Op::Write {
                volume: range.volume,
                first_block: range.first,
                checksums,
                payload: data,
            },
            (
                RequestBody::Zero {
                    volume,
                    offset_bytes,
                    length_bytes,
                    allocate,
                    ..
                },
                None,
            ) => {
                // Whole blocks only: clients write the rest as zeros.
                let first = offset_bytes.div_ceil(BLOCK);
                let end = self.zero_end(volume, offset_bytes + length_bytes);
                if end <= first {
                    return self.reply(client, request.tag, Ok(ReplyBody::Done));
                }
                Op::Zero {
                    volume,
                    first_block: first,
                    blocks: end - first,
                    allocate,
                }
            }
            _ => return self.reply(client, request.tag, Err(ReplyError::Invalid)),
        };
        let command = Command {
            session: request.session,
            number: request.number,
            settled_below: request.settled_below,
            op,
        };
        let key = (command.session, command.number);
        self.propose(client, request.tag, key, command, Some(range));
    }

    /// Block behind the last one that a zeroed range covers wholly; the volume's last block may be short.
    fn zero_end(&self, volume: VolumeId, end_bytes: u64) -> u64 {
        match self.volumes.get(&volume) {
            Some(volume) if volume.size_bytes == end_bytes => volume.blocks(),
            _ => end_bytes / BLOCK,
        }
    }

    fn propose(
        &mut self,
        client: ClientId,
        tag: u64,
        key: CommandKey,
        command: Command,
        range: Option<BlockRange>,
    ) {
        self.tell_time();
        match self.replica.propose(vec![command]) {
            Ok(()) => {
                if let Some(range) = range {
                    self.in_flight.add(range);
                }
                self.waiting.insert(key, Waiting { client, tag, range });
            }
            Err(_) => self.reply(client, tag, Err(ReplyError::NotLeader { leader: None })),
        }
    }

    /// Starts deferred requests that may run now. Returns whether something was proposed.
    pub(super) fn pump_deferred(&mut self, now: Instant) -> bool {
        if self.deferred.is_empty() {
            return false;
        }
        let mut before = super::Counts::new();
        let mut proposed = false;
        for deferred in std::mem::take(&mut self.deferred) {
            let range = deferred.range;
            let busy = before.touches(range)
                || self.in_flight.touches(range) && deferred.merges
                || self
                    .merging
                    .values()
                    .any(|merge| overlap(merge.range, range));
            if busy {
                before.add(range);
                self.deferred.push_back(deferred);
            } else if deferred.merges {
                proposed |= self.start_merge(deferred);
                before.add(range);
            } else {
                self.propose_write(deferred.client, deferred.request, range, None);
                proposed = true;
            }
        }
        if proposed {
            self.replica.flush(now);
        }
        proposed
    }

    fn start_merge(&mut self, deferred: Deferred) -> bool {
        let Deferred {
            client,
            request,
            range,
            ..
        } = deferred;
        let merge = Merge {
            client,
            request,
            range,
        };
        let Some(volume) = self.volumes.get(&range.volume).map(Arc::clone) else {
            self.held.remove(range);
            let gone = ReplyError::Refused(Refusal::NoSuchVolume);
            self.reply(merge.client, merge.request.tag, Err(gone));
            return false;
        };
        match self.chunks.read(&volume, range.first, range.blocks, true) {
            Err(ReadError::WouldBlock) => {
                let ticket = self.next_ticket();
                self.merging.insert(ticket, merge);
                self.start_read(ticket, volume, ReadWhat::Blocks(range));
                false
            }
            result => {
                self.finish_merge(merge, result.map_err(|_| ReplyError::Io));
                true
            }
        }
    }

    /// The blocks that a request changes in part have been read; no other write of them is under way.
    fn finish_merge(&mut self, merge: Merge, result: Result<Vec<ReadPart>, ReplyError>) {
        let Merge {
            client,
            request,
            range,
        } = merge;
        self.held.remove(range);
        let parts = match result {
            Ok(parts) => parts,
            Err(error) => return self.reply(client, request.tag, Err(error)),
        };
        let mut blocks = join_parts(&parts, (range.blocks * BLOCK) as usize);
        let (offset_bytes, expected, data) = match &request.body {
            RequestBody::Write {
                offset_bytes, data, ..
            } => (*offset_bytes, None, data.clone()),
            RequestBody::CompareAndWrite {
                offset_bytes, data, ..
            } => {
                let mut expected = data.clone();
                let write = expected.split_off(data.len() / 2);
                (*offset_bytes, Some(expected), write)
            }
            _ => return self.reply(client, request.tag, Err(ReplyError::Invalid)),
        };
        let skip = (offset_bytes % BLOCK) as usize;
        let target = &mut blocks[skip..skip + data.len()];
        if let Some(expected) = expected
            && let Some(at) = target
                .iter()
                .zip(&expected)
                .position(|(have, want)| have != want)
        {
            let differs = Err(ReplyError::Miscompare(at as u64));
            let reader = Reader {
                client,
                tag: request.tag,
                stale: None,
            };
            return self.answer_reader(reader, differs);
        }
        target.copy_from_slice(&data);
        self.propose_write(client, request, range, Some(blocks.freeze()));
    }

    /// We do not lead any more: everyone who waits must ask the next leader.
    pub(super) fn send_everyone_away(&mut self) {
        let mut away: Vec<(ClientId, u64)> = Vec::new();
        away.extend(
            self.waiting
                .drain()
                .map(|(_, waiting)| (waiting.client, waiting.tag)),
        );
        away.extend(
            self.deferred
                .drain(..)
                .map(|it| (it.client, it.request.tag)),
        );
        away.extend(
            self.merging
                .drain()
                .map(|(_, it)| (it.client, it.request.tag)),
        );
        // Who asks this server for what it has does not mind who leads.
        self.slow_reads.retain(|_, it| {
            if it.reader.stale.is_none() {
                away.push((it.reader.client, it.reader.tag));
            }
            it.reader.stale.is_some()
        });
        away.extend(self.queued.drain(..).map(|(client, it)| (client, it.tag)));
        away.extend(
            self.reads_waiting
                .drain(..)
                .map(|(client, it)| (client, it.tag)),
        );
        self.reads_done.retain(|(reader, _)| {
            if reader.stale.is_none() {
                away.push((reader.client, reader.tag));
            }
            reader.stale.is_some()
        });
        self.count_reads_done();
        // In a fixed order, so that simulations repeat.
        away.sort_unstable();
        self.in_flight.clear();
        self.held.clear();
        self.reserving.clear();
        self.resizing.clear();
        let leader = self.replica.leader().filter(|it| *it != self.replica.id());
        for (client, tag) in away {
            self.reply(client, tag, Err(ReplyError::NotLeader { leader }));
        }
    }

    /// Fences the sessions that were not heard of for too long.
    pub(super) fn expire_sessions(&mut self, now: Instant) {
        if !self.serves() {
            return;
        }
        let mut sessions: Vec<SessionId> = Vec::new();
        for session in self.state.sessions() {
            let heard = *self.heard.entry(session.id).or_insert(now);
            if now.since(heard) > self.config.session_lease {
                sessions.push(session.id);
            }
        }
        let state = &self.state;
        self.heard.retain(|session, _| state.has_session(*session));
        if sessions.is_empty() {
            return;
        }
        for session in &sessions {
            // Not again before this has had its time.
            self.heard.insert(*session, now);
        }
        self.tell_time();
        let end = Command::internal(Op::EndSessions { sessions });
        if self.replica.propose(vec![end]).is_ok() {
            self.replica.flush(now);
        }
    }

    /// Where this server stands, without what only the shell knows (cell, uptime, clients).
    pub fn status(&self, now: Instant) -> ServerStatus {
        let replica = &self.replica;
        let role = match replica.role() {
            RoleKind::Leader { serving: true } => "leader",
            RoleKind::Leader { serving: false } | RoleKind::Candidate => "candidate",
            RoleKind::Follower => "follower",
            RoleKind::Learner => "learner",
        };
        let lag = |view: &crate::paxos::PeerView| {
            let applied = view.heard.map(|_| view.progress.applied);
            applied.and_then(|applied| self.lag_of(applied))
        };
        let peer = |(server, view): (ServerId, crate::paxos::PeerView)| PeerStatus {
            behind_ms: lag(&view).map(|lag| lag.ms),
            behind_bytes: lag(&view).map(|lag| lag.bytes),
            left_s: self.pace.time_left(server).map(|left| left.as_secs()),
            server,
            acknowledged: replica
                .marks()
                .get(&server)
                .map_or(0, |mark| mark.acknowledged.slot.0),
            alive: view
                .heard
                .is_some_and(|at| now.since(at).as_millis() < 3000),
            applied: view.progress.applied.0,
            durable: replica.durable_at(server).unwrap_or_default().0,
            copying: view.progress.installing,
            silent_ms: view.heard.map(|at| now.since(at).as_millis() as u64),
        };
        let admitted = replica.admitted();
        let lives = admitted.iter();
        ServerStatus {
            cell: String::new(),
            server: replica.id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: 0,
            uptime_s: 0,
            role: role.to_owned(),
            leader: replica.leader(),
            ballot: replica.promised(),
            chosen: replica.chosen().0,
            applied: self.state.applied().0,
            last: replica.last().slot.0,
            log_first: replica.log_first().0,
            copying: self.copying(),
            copying_left_s: self.copying_left(now).map(|left| left.as_secs()),
            rejoining: replica.is_rejoining(),
            incarnation: replica.incarnation().0,
            lives: lives.map(|(_, life)| life.0).collect(),
            free_bytes: 0,
            space_left: self.space_left(),
            full: self.space_left() == 0,
            stalled: self.is_stalled(),
            total_bytes: 0,
            bad_blocks: self.repairs().found,
            repaired_blocks: self.repairs().repaired,
            lost_blocks: self.repairs().lost,
            scrub: Some(self.scrub_status(now)),
            clients: 0,
            peers: replica.peers().map(peer).collect(),
            members: self.state.members().map(|members| Members::clone(members)),
            last_ballot: replica.last().ballot,
            given_up_by: replica.given_up_by(),
            claimed_twice: Vec::new(),
        }
    }
}

/// The size that a command gives a volume.
fn size_of(op: &Op) -> Option<(VolumeId, u64)> {
    match op {
        Op::ResizeVolume {
            volume, size_bytes, ..
        }
        | Op::ShrinkVolume { volume, size_bytes } => Some((*volume, *size_bytes)),
        _ => None,
    }
}

fn overlap(a: BlockRange, b: BlockRange) -> bool {
    a.volume == b.volume && a.first < b.first + b.blocks && b.first < a.first + a.blocks
}

/// Takes `length` bytes from `skip` of consecutive parts.
/// From whole blocks to the bytes that were asked about.
fn cut_extents(mut extents: Vec<Extent>, span: &Span) -> Vec<Extent> {
    if let Some(first) = extents.first_mut() {
        first.length_bytes -= span.offset_bytes % BLOCK;
    }
    let total: u64 = extents.iter().map(|extent| extent.length_bytes).sum();
    if let Some(last) = extents.last_mut() {
        last.length_bytes -= total.saturating_sub(span.length_bytes);
    }
    extents
}

fn cut_parts(parts: Vec<ReadPart>, mut skip: usize, mut length: usize) -> Vec<ReadPart> {
    let mut out = Vec::with_capacity(parts.len());
    for part in parts {
        let have = match &part {
            ReadPart::Data(data) => data.len(),
            ReadPart::Hole(length) => *length as usize,
        };
        let from = skip.min(have);
        let take = (have - from).min(length);
        skip -= from;
        length -= take;
        if take > 0 {
            out.push(match part {
                ReadPart::Data(data) => ReadPart::Data(data.slice(from..from + take)),
                ReadPart::Hole(_) => ReadPart::Hole(take as u32),
            });
        }
    }
    out
}

fn join_parts(parts: &[ReadPart], bytes: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(bytes);
    for part in parts {
        match part {
            ReadPart::Data(data) => out.extend_from_slice(data),
            ReadPart::Hole(length) => out.resize(out.len() + *length as usize, 0),
        }
    }
    out.resize(bytes, 0);
    out
}

/// About how much an answer brings.
fn answer_bytes(body: &Result<ReplyBody, ReplyError>) -> usize {
    match body {
        Ok(ReplyBody::Data(parts)) => parts.iter().map(ReadPart::data_bytes).sum(),
        Ok(ReplyBody::Extents(extents)) => size_of_val(extents.as_slice()),
        Ok(ReplyBody::Directories(directories)) => size_of_val(directories.as_slice()),
        Ok(ReplyBody::Chunks { chunks, .. }) => size_of_val(chunks.as_slice()),
        Ok(ReplyBody::Volumes(volumes)) => size_of_val(volumes.as_slice()),
        Ok(ReplyBody::Events(list)) => size_of_val(list.events.as_slice()),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::chunk::{ChunkParams, ChunkStore};
    use crate::disk::files::FileDisk;
    use crate::engine::{EngineConfig, NOTE_LINES_MAX};
    use crate::paxos::quorum::Membership;
    use crate::paxos::{Config, Recovered, Tuning};
    use crate::state::State;
    use crate::wire::client::Browse;
    use crate::wire::client::Reply;

    /// A cell of one server, which leads.
    fn leader(directory: &tempfile::TempDir) -> Engine {
        leader_with(directory, |_| {})
    }

    fn leader_with(directory: &tempfile::TempDir, change: impl Fn(&mut EngineConfig)) -> Engine {
        let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
        let chunks = ChunkStore::open(disk, ChunkParams::default(), &[]).unwrap();
        let mut config = EngineConfig {
            replica: Config {
                id: ServerId(0),
                incarnation: crate::types::Incarnation(0),
                members: Membership::new([ServerId(0)]),
                tuning: Tuning::default(),
                seed: 1,
            },
            checkpoint_bytes: u64::MAX,
            checkpoint_interval: Duration::from_secs(1000),
            checkpoint_chunks: usize::MAX,
            log_bytes_max: u64::MAX,
            apply_bytes: usize::MAX,
            reserve_bytes: 0,
            session_lease: Duration::from_secs(60),
        };
        change(&mut config);
        let state = State::default();
        let start = Instant(0);
        let recovered = Recovered::default();
        let mut engine = Engine::new(config, recovered, state, Arc::new(chunks), start);
        engine.handle_timeout(start + Duration::from_secs(1));
        perform(&mut engine);
        assert!(engine.serves());
        engine
    }

    /// Does what the engine wants at once; gives the answers.
    fn perform(engine: &mut Engine) -> BTreeMap<u64, Result<ReplyBody, ReplyError>> {
        let now = Instant(0) + Duration::from_secs(1);
        let mut replies = BTreeMap::new();
        engine.finish_batch(now);
        loop {
            match engine.poll_action() {
                Some(Action::Persist { write, .. }) => engine.handle_persisted(now, write),
                Some(Action::Reply { reply, .. }) => {
                    let Reply { tag, body } = reply;
                    replies.insert(tag, body);
                }
                Some(_) => {}
                None if engine.has_chosen() => engine.apply_chosen(now),
                None => return replies,
            }
        }
    }

    #[test]
    fn ending_an_ended_session_again_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader(&directory);
        let mut ask = |tag, session, body| {
            let request = Request {
                tag,
                session,
                number: RequestNumber(0),
                settled_below: RequestNumber(0),
                body,
            };
            let now = Instant(0) + Duration::from_secs(1);
            engine.handle_request(now, ClientId(tag), request);
            perform(&mut engine).remove(&tag).unwrap()
        };
        let (nonce, name, user) = (5, "a client".to_owned(), String::new());
        let open = RequestBody::OpenSession { nonce, name, user };
        let opened = ask(1, SessionId(0), open);
        let Ok(ReplyBody::Session(session)) = opened else {
            panic!("{opened:?}");
        };
        let stale = Err(ReplyError::Refused(Refusal::StaleSession));
        assert_eq!(ask(2, session, RequestBody::KeepAlive), Ok(ReplyBody::Done));
        // The answer is lost with the connection.
        assert_eq!(
            ask(3, session, RequestBody::EndSession),
            Ok(ReplyBody::Done)
        );
        assert_eq!(
            ask(4, session, RequestBody::EndSession),
            Ok(ReplyBody::Done)
        );
        assert_eq!(ask(5, session, RequestBody::KeepAlive), stale);
    }

    /// Counts the lines about administration.
    #[derive(Clone, Default)]
    struct Lines(Arc<std::sync::Mutex<Vec<String>>>);

    impl tracing::Subscriber for Lines {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            *metadata.level() == tracing::Level::INFO
        }

        fn event(&self, event: &tracing::Event<'_>) {
            struct Text(String);
            impl tracing::field::Visit for Text {
                fn record_debug(
                    &mut self,
                    field: &tracing::field::Field,
                    value: &dyn std::fmt::Debug,
                ) {
                    self.0 += &format!("{}={value:?} ", field.name());
                }
            }
            let mut text = Text(String::new());
            event.record(&mut text);
            if text.0.contains("administration") {
                self.0.lock().unwrap().push(text.0);
            }
        }

        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }

        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn notes_do_not_flood_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader(&directory);
        let session = open_session(&mut engine);
        let mut number = 0;
        let mut ask = |engine: &mut Engine, seconds: u64, body: RequestBody| {
            number += 1;
            let request = Request {
                tag: 1,
                session,
                number: RequestNumber(number),
                settled_below: RequestNumber(number),
                body,
            };
            let now = Instant(0) + Duration::from_secs(seconds);
            engine.handle_request(now, ClientId(1), request);
            engine.finish_batch(now);
            while let Some(action) = engine.poll_action() {
                if let Action::Persist { write, .. } = action {
                    engine.handle_persisted(now, write);
                }
            }
            engine.apply_chosen(now);
        };
        let note = || RequestBody::Note {
            text: "again".to_owned(),
        };
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), || {
            for _ in 0..100 {
                ask(&mut engine, 2, note());
            }
            let volume = VolumeId(9);
            ask(&mut engine, 2, RequestBody::DeleteVolume { volume });
            ask(&mut engine, 13, note());
        });
        let lines = lines.0.lock().unwrap();
        let notes = NOTE_LINES_MAX as usize;
        assert_eq!(lines.len(), notes + 2, "{lines:?}");
        assert!(!lines[0].contains("more"), "{}", lines[0]);
        assert!(!lines[notes].contains("again"), "{}", lines[notes]);
        let left_out = format!("more={} ", 100 - notes);
        assert!(lines[notes + 1].contains(&left_out), "{}", lines[notes + 1]);
        assert_eq!(engine.state.events_made(), 102);
    }

    /// A volume that is growing must not shrink to a part of a block behind the size that it has now.
    #[test]
    fn a_size_that_is_proposed_counts_for_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader(&directory);
        create_volume(&mut engine);
        let now = Instant(0) + Duration::from_secs(1);
        let session = open_session(&mut engine);
        let mut number = 0;
        let mut resize = |engine: &mut Engine, size_bytes: u64, shrink: bool| {
            number += 1;
            let volume = VolumeId(1);
            let body = match shrink {
                true => RequestBody::ShrinkVolume { volume, size_bytes },
                false => RequestBody::ResizeVolume {
                    volume,
                    size_bytes,
                    allow_shrink: true,
                },
            };
            let request = Request {
                tag: 100 + number,
                session,
                number: RequestNumber(number),
                settled_below: RequestNumber(0),
                body,
            };
            engine.handle_request(now, ClientId(1), request);
        };
        let within = Err(ReplyError::Refused(Refusal::EndWithinBlock));
        // To 8 MiB, and before that is applied to a size that is larger than 4 MiB.
        resize(&mut engine, 8 << 20, false);
        resize(&mut engine, (6 << 20) + 512, false);
        resize(&mut engine, (6 << 20) + 512, true);
        resize(&mut engine, 7 << 20, false);
        resize(&mut engine, (8 << 20) + 512, false);
        resize(&mut engine, (8 << 20) + 1024, false);
        let replies = perform(&mut engine);
        let done = Ok(ReplyBody::Done);
        let expected = [&done, &within, &within, &done, &done, &done];
        assert_eq!(replies.values().collect::<Vec<_>>(), expected);
        assert_eq!(engine.resizing, []);
        // What was proposed holds no longer than it is under way.
        resize(&mut engine, 4 << 20, true);
        assert!(perform(&mut engine).values().all(|it| *it == done));
        resize(&mut engine, (4 << 20) + 512, true);
        resize(&mut engine, (4 << 20) + 512 * 3, true);
        assert!(perform(&mut engine).values().all(|it| *it == done));
        let volume = engine.state.volume(VolumeId(1)).unwrap();
        assert_eq!(volume.size_bytes, (4 << 20) + 512 * 3);
    }

    /// Proposes writes of the first blocks of chunks, and has them chosen.
    fn choose_writes(engine: &mut Engine, chunks: std::ops::Range<u64>) {
        let now = Instant(0) + Duration::from_secs(1);
        for chunk in chunks {
            let volume = VolumeId(1);
            let first_block = chunk * 16;
            let payload = Bytes::from(vec![chunk as u8 + 1; BLOCK_BYTES]);
            let op = Op::Write {
                volume,
                first_block,
                checksums: crate::entry::block_checksums(volume, first_block, &payload),
                payload,
            };
            engine
                .replica
                .propose(vec![Command::internal(op)])
                .expect("it leads");
            engine.finish_batch(now);
            while let Some(action) = engine.poll_action() {
                if let Action::Persist { write, .. } = action {
                    engine.handle_persisted(now, write);
                }
            }
        }
    }

    fn open_session(engine: &mut Engine) -> SessionId {
        let open = Request {
            tag: 1,
            session: SessionId(0),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            body: RequestBody::OpenSession {
                nonce: 5,
                name: "a client".to_owned(),
                user: String::new(),
            },
        };
        let now = Instant(0) + Duration::from_secs(1);
        engine.handle_request(now, ClientId(1), open);
        match perform(engine).remove(&1) {
            Some(Ok(ReplyBody::Session(session))) => session,
            other => panic!("{other:?}"),
        }
    }

    fn create_volume(engine: &mut Engine) {
        let create = Op::CreateVolume {
            name: "a".to_owned(),
            size_bytes: 4 << 20,
            chunk_bytes: crate::state::CHUNK_BYTES_MIN,
            uuid: [1; 16],
        };
        let proposed = engine.replica.propose(vec![Command::internal(create)]);
        proposed.expect("it leads");
        perform(engine);
        assert!(engine.state.volume(VolumeId(1)).is_some());
    }

    /// So that heartbeats have their turn between.
    #[test]
    fn a_backlog_is_applied_bit_by_bit() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader_with(&directory, |config| config.apply_bytes = 2 * BLOCK_BYTES);
        create_volume(&mut engine);
        let before = engine.state.applied().0;
        choose_writes(&mut engine, 0..5);
        let mut steps = Vec::new();
        while engine.has_chosen() {
            engine.apply_chosen(Instant(0) + Duration::from_secs(1));
            steps.push(engine.state.applied().0 - before);
        }
        assert_eq!(steps, [2, 4, 5]);
    }

    /// The checkpoint that a backlog needs begins while it is applied, and at twice as many changed chunks
    /// the rest waits until it is done.
    #[test]
    fn a_backlog_waits_for_the_checkpoint() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader_with(&directory, |config| config.checkpoint_chunks = 2);
        create_volume(&mut engine);
        let now = Instant(0) + Duration::from_secs(1);
        let before = engine.state.applied().0;
        choose_writes(&mut engine, 0..9);
        engine.apply_chosen(now);
        assert_eq!(engine.state.applied().0 - before, 6);
        assert!(!engine.has_chosen(), "nothing can be applied now");
        let checkpoint = std::iter::from_fn(|| engine.poll_action())
            .find_map(|action| match action {
                Action::Checkpoint(checkpoint) => Some(checkpoint),
                _ => None,
            })
            .expect("a checkpoint is due");
        assert_eq!(checkpoint.applied.slot.0 - before, 2);
        checkpoint.chunks.flush().unwrap();
        engine.handle_checkpoint_done(checkpoint.applied.slot);
        assert!(engine.has_chosen());
        engine.apply_chosen(now);
        assert_eq!(engine.state.applied().0 - before, 9);
    }

    /// Who keeps the cell sees chunks with the times of their changes, whoever has reserved the volume.
    #[test]
    fn browsing() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader(&directory);
        let now = Instant(0) + Duration::from_secs(1);
        let mut ask = |body, unix_ms| {
            engine.set_wall_clock(unix_ms);
            let request = Request {
                tag: 1,
                session: SessionId(0),
                number: RequestNumber(0),
                settled_below: RequestNumber(0),
                body,
            };
            let request = match request.body {
                RequestBody::OpenSession { .. } | RequestBody::Browse { .. } => request,
                _ => Request {
                    session: engine.state.sessions().next().unwrap().id,
                    number: RequestNumber(unix_ms),
                    ..request
                },
            };
            engine.handle_request(now, ClientId(1), request);
            let mut replies = perform(&mut engine);
            engine.finish_reads(now);
            replies.append(&mut perform(&mut engine));
            replies.remove(&1).unwrap()
        };
        let (nonce, name, user) = (1, "a".to_owned(), String::new());
        ask(RequestBody::OpenSession { nonce, name, user }, 10).unwrap();
        let create = RequestBody::CreateVolume {
            name: "a".to_owned(),
            size_bytes: 4 << 20,
            chunk_bytes: crate::state::CHUNK_BYTES_MIN,
            uuid: [1; 16],
        };
        ask(create, 1000).unwrap();
        let volume = VolumeId(1);
        let write = |offset_bytes: u64, length: usize| RequestBody::Write {
            volume,
            offset_bytes,
            checksums: block_checksums(volume, offset_bytes / BLOCK, &vec![1; length]),
            data: vec![1; length].into(),
        };
        ask(write(0, 8192), 2000).unwrap();
        // Less than a step later: the log does not tell the time again.
        ask(write(5 << 16, 4096), 2050).unwrap();
        ask(write(9 << 16, 4096), 3000).unwrap();
        let browse = |stale, what| RequestBody::Browse { stale, what };
        let chunks = |from, until| Browse::Chunks {
            volume,
            from: crate::types::ChunkIndex(from),
            until: crate::types::ChunkIndex(until),
        };
        for stale in [false, true] {
            let Ok(ReplyBody::Chunks { chunks, next }) = ask(browse(stale, chunks(0, 9)), 9999)
            else {
                panic!("chunks");
            };
            let seen = |it: &crate::wire::client::ChunkStatus| {
                (it.chunk.0, it.changed_ms, it.allocated_blocks)
            };
            assert_eq!(
                chunks.iter().map(seen).collect::<Vec<_>>(),
                [(0, 2000, 2), (5, 2000, 1)]
            );
            assert!(chunks[0].changed < chunks[1].changed);
            assert_eq!(next, None);
            let Ok(ReplyBody::Volumes(volumes)) = ask(browse(stale, Browse::Volumes), 9999) else {
                panic!("volumes");
            };
            let times = volumes[0].times;
            assert_eq!((times.created_ms, times.changed_ms), (1000, 3000));
            assert_eq!(volumes[0].chunks, 3);
            let directories = browse(stale, Browse::Directories { volume });
            assert_eq!(ask(directories, 9999), Ok(ReplyBody::Directories(vec![0])));
            let read = Browse::Read {
                volume,
                offset_bytes: 8191,
                length_bytes: 2,
            };
            let Ok(ReplyBody::Data(parts)) = ask(browse(stale, read), 9999) else {
                panic!("data");
            };
            let one = ReadPart::Data(Bytes::from_static(&[1]));
            assert_eq!(parts, [one, ReadPart::Hole(1)]);
            let gone = browse(
                stale,
                Browse::Chunks {
                    volume: VolumeId(9),
                    from: crate::types::ChunkIndex(0),
                    until: crate::types::ChunkIndex(1),
                },
            );
            let refused = ReplyError::Refused(Refusal::NoSuchVolume);
            assert_eq!(ask(gone, 9999), Err(refused));
        }
    }

    /// A turn ends early if reads have brought much; those that nobody waits for do not count.
    #[test]
    fn reads_of_clients_that_are_gone_bring_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut engine = leader(&directory);
        let body = || {
            Ok(ReplyBody::Data(vec![ReadPart::Data(Bytes::from(vec![
                1;
                100
            ]))]))
        };
        // Who asks this server for what it has waits all the same when it leads no more.
        let (client, tag, stale) = (ClientId(3), 0, Some(engine.installs));
        engine.answer_reader(Reader { client, tag, stale }, body());
        engine.send_everyone_away();
        assert_eq!(engine.finished_read_bytes(), 100);
        // What was read while chunks of another server came is given up.
        let answer = |engine: &mut Engine| {
            engine.finish_reads(Instant::default());
            let mut replies = std::iter::from_fn(|| engine.poll_action());
            replies.find_map(|action| match action {
                Action::Reply { reply, .. } => Some(reply.body.is_ok()),
                _ => None,
            })
        };
        assert_eq!(answer(&mut engine), Some(true));
        engine.answer_reader(Reader { client, tag, stale }, body());
        engine.installs += 1;
        assert_eq!(answer(&mut engine), Some(false));
        engine.handle_client_gone(client);
        for client in [1, 1, 2] {
            let (client, tag, stale) = (ClientId(client), 0, None);
            engine.answer_reader(Reader { client, tag, stale }, body());
        }
        assert_eq!(engine.finished_read_bytes(), 300);
        engine.handle_client_gone(ClientId(1));
        assert_eq!(engine.finished_read_bytes(), 100);
        engine.send_everyone_away();
        assert_eq!(engine.finished_read_bytes(), 0);
    }

    #[test]
    fn parts_are_cut_to_the_bytes() {
        let parts = vec![
            ReadPart::Hole(4096),
            ReadPart::Data(Bytes::from(vec![7; 4096])),
        ];
        let cut = cut_parts(parts, 4000, 200);
        assert_eq!(
            cut,
            [
                ReadPart::Hole(96),
                ReadPart::Data(Bytes::from(vec![7; 104]))
            ]
        );
    }

    #[test]
    fn joined_parts_fill_the_range() {
        let parts = [ReadPart::Hole(2), ReadPart::Data(Bytes::from_static(b"ab"))];
        assert_eq!(&join_parts(&parts, 4)[..], b"\0\0ab");
    }
}
