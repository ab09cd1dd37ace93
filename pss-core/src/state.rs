//! The replicated state: volumes and sessions. Equal on every server at equal slots.
//!
//! [`State::apply`] decides, in log order, what each command does; what it does to blocks is handed
//! back as an [`Effect`] for the chunk store. Nothing else may change the state.

mod events;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, BufMut};
use serde::{Deserialize, Serialize};

use crate::entry::{Command, NOTE_BYTES_MAX, Op, Origin, USER_NAME_MAX, VOLUME_NAME_MAX};
use crate::members::Members;
use crate::state::events::Events;
pub use crate::state::events::{AdminAction, AdminEvent, EVENTS_MAX};
use crate::types::{
    Admitted, BLOCK_BYTES, Incarnation, RequestNumber, SERVERS_MAX, ServerId, SessionId, Slot,
    VolumeId,
};
use crate::volume::reservation::{
    ReservationAction, ReservationRefusal, ReservationRequest, Reservations,
};
use crate::wire::codec::shortened;

/// Most requests of a session between the oldest that is not settled and the newest.
pub const SESSION_WINDOW: u64 = 4096;
/// Most characters of a session's name that are kept.
const SESSION_NAME_MAX: usize = 256;
/// Most sessions at once.
pub const SESSIONS_MAX: usize = 4096;
/// Most volumes.
pub const VOLUMES_MAX: usize = 4096;
/// Chunk size of a volume that is created without one.
pub const CHUNK_BYTES_DEFAULT: u32 = 4 << 20;
/// Smallest chunk.
pub const CHUNK_BYTES_MIN: u32 = 64 << 10;
/// Largest chunk.
pub const CHUNK_BYTES_MAX: u32 = 64 << 20;
/// Largest volume: 2^24 chunks of the default size.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// A volume.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Number, never used again.
    pub id: VolumeId,
    /// Name; also of its directory.
    pub name: String,
    /// Size, bytes: a multiple of 512.
    pub size_bytes: u64,
    /// Size of a chunk, bytes.
    pub chunk_bytes: u32,
    /// Random identity.
    pub uuid: [u8; 16],
    /// Slot of the entry that created it.
    pub created: Slot,
}

impl Volume {
    /// Size in blocks; the last one may be used only in part.
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES as u64)
    }
}

/// Why a command was refused. The codes are part of the log's meaning and never change.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[repr(u8)]
pub enum Refusal {
    /// The session was ended or never existed.
    #[error("the session was ended")]
    StaleSession = 1,
    /// There is no such volume.
    #[error("no such volume")]
    NoSuchVolume = 2,
    /// A volume of that name exists.
    #[error("a volume of that name exists")]
    VolumeExists = 3,
    /// A session uses the volume.
    #[error("the volume is attached")]
    VolumeAttached = 4,
    /// The range ends past the end of the volume.
    #[error("the range ends past the end of the volume")]
    OutOfRange = 5,
    /// The name is empty, too long, or holds a character that it may not.
    #[error("a volume's name has 1 to 64 bytes and no '/', NUL or leading '.'")]
    BadName = 6,
    /// The size is zero, too large, or no multiple of 512.
    #[error("a volume's size is a multiple of 512 bytes, at most 64T and at most 2^24 chunks")]
    BadSize = 7,
    /// The chunk size is no power of two from 64 KiB to 64 MiB.
    #[error("a chunk's size is a power of two from 64K to 64M")]
    BadChunkSize = 8,
    /// The volume would become smaller and that was not allowed.
    #[error("the volume would become smaller")]
    WouldShrink = 9,
    /// Too many sessions or volumes.
    #[error("too many sessions or volumes")]
    TooMany = 10,
    /// The request number lies outside the session's window.
    #[error("the request number lies outside the session's window")]
    OutsideWindow = 11,
    /// The request was settled before: the client said that it has the answer.
    #[error("the request was settled before")]
    Settled = 12,
    /// RESERVATION CONFLICT, of a request about reservations.
    #[error("a reservation or another key is in the way")]
    ReservationConflict = 13,
    /// INVALID RELEASE OF PERSISTENT RESERVATION.
    #[error("the reservation is of another type")]
    InvalidRelease = 14,
    /// INSUFFICIENT REGISTRATION RESOURCES.
    #[error("too many registrations")]
    TooManyRegistrations = 15,
    /// The request about reservations makes no sense.
    #[error("the request about reservations is not valid")]
    InvalidReservation = 16,
    /// The volume's reservations are not those under which the request was found to be allowed.
    #[error("the reservations of the volume have changed")]
    ReservationsChanged = 17,
    /// A SCSI initiator has reserved the volume.
    #[error("the volume is reserved by a SCSI initiator")]
    Reserved = 18,
    /// The volume would become smaller and end within a block of 4096 bytes.
    #[error("a volume becomes smaller to a multiple of 4096 bytes only")]
    EndWithinBlock = 19,
    /// An earlier change of the servers is not chosen yet.
    #[error("another change of the servers is under way")]
    ServersUnderWay = 20,
    /// The list of servers follows another one than the last.
    #[error("the servers have changed meanwhile")]
    ServersOutdated = 21,
    /// More than one core server would come or go.
    #[error("core servers come and go one at a time")]
    ServersTooMuch = 22,
    /// The leader would remove itself; it hands over.
    #[error("the server leads, and has to hand over first")]
    ServerLeads = 23,
    /// One that shall vote is not there, or has not got all data.
    #[error("the server does not answer, or has not got all data yet")]
    ServerBehind = 24,
    /// It is no list of servers.
    #[error(
        "that is no list of servers: distinct ids from 0 to 7, IP addresses, and 1 to 5 core servers"
    )]
    BadServers = 25,
    /// A majority is there, so nothing is lost for good.
    #[error("a majority of the core servers is there")]
    MajorityAlive = 26,
    /// The server lacks data that others may have.
    #[error("the server has not got all data itself")]
    Incomplete = 27,
}

impl Refusal {
    /// The refusal of a code, if this version knows it.
    pub fn from_code(code: u8) -> Option<Refusal> {
        use Refusal::*;
        [
            StaleSession,
            NoSuchVolume,
            VolumeExists,
            VolumeAttached,
            OutOfRange,
            BadName,
            BadSize,
            BadChunkSize,
            WouldShrink,
            TooMany,
            OutsideWindow,
            Settled,
            ReservationConflict,
            InvalidRelease,
            TooManyRegistrations,
            InvalidReservation,
            ReservationsChanged,
            Reserved,
            EndWithinBlock,
            ServersUnderWay,
            ServersOutdated,
            ServersTooMuch,
            ServerLeads,
            ServerBehind,
            BadServers,
            MajorityAlive,
            Incomplete,
        ]
        .into_iter()
        .find(|refusal| *refusal as u8 == code)
    }

    /// What it means of a request about reservations, if it comes from them.
    pub fn of_reservation(self) -> Option<ReservationRefusal> {
        match self {
            Refusal::ReservationConflict => Some(ReservationRefusal::Conflict),
            Refusal::InvalidRelease => Some(ReservationRefusal::InvalidRelease),
            Refusal::TooManyRegistrations => Some(ReservationRefusal::TooMany),
            Refusal::InvalidReservation => Some(ReservationRefusal::InvalidField),
            _ => None,
        }
    }
}

impl From<ReservationRefusal> for Refusal {
    fn from(refusal: ReservationRefusal) -> Refusal {
        match refusal {
            ReservationRefusal::Conflict => Refusal::ReservationConflict,
            ReservationRefusal::InvalidRelease => Refusal::InvalidRelease,
            ReservationRefusal::TooMany => Refusal::TooManyRegistrations,
            ReservationRefusal::InvalidField => Refusal::InvalidReservation,
        }
    }
}

/// What a command was answered. A repetition is answered the same.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Answer {
    /// Done.
    Done,
    /// Done; the id that it created.
    Created(u64),
    /// Not done.
    Refused(Refusal),
}

/// What a command does to blocks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect<'a> {
    /// Nothing.
    None,
    /// Write the command's blocks.
    Write(&'a Volume),
    /// Zero a range of blocks.
    Zero {
        /// Of this volume.
        volume: &'a Volume,
        /// First block.
        first_block: u64,
        /// How many.
        blocks: u64,
        /// Keep space allocated.
        allocate: bool,
    },
    /// Make the directory of a new volume.
    Create(&'a Volume),
    /// Remove a volume's directory.
    Delete(Volume),
}

#[derive(Clone, Debug, Eq, PartialEq, Hash)]
struct Session {
    nonce: u64,
    origin: Origin,
    /// Opened by [`Op::OpenSessionFrom`], so that what it does to the cell is recorded. Not so before: a server that
    /// applies an old log from its checkpoint on would record what others, with later checkpoints, do not.
    told: bool,
    opened: Slot,
    /// First request number in `answers`.
    floor: RequestNumber,
    /// Answers by number from `floor`; `None`: not seen.
    answers: VecDeque<Option<Answer>>,
    /// Attached volumes with how many times.
    attached: BTreeMap<VolumeId, u32>,
}

/// A session as people see it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Id.
    pub id: SessionId,
    /// What the client calls itself.
    pub name: String,
    /// Attached volumes.
    pub volumes: Vec<VolumeId>,
}

/// Volumes and sessions at one slot.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct State {
    applied: Slot,
    volumes_made: u32,
    volumes: BTreeMap<VolumeId, Volume>,
    sessions: BTreeMap<SessionId, Session>,
    /// Of volumes whose reservations were ever changed.
    reservations: BTreeMap<VolumeId, VolumeReservations>,
    /// What the last [`Op::Clock`] said; 0 if there was none.
    clock_ms: u64,
    /// Of volumes that were made or changed since the log tells the time.
    times: BTreeMap<VolumeId, VolumeTimes>,
    /// What was done to the cell.
    events: Events,
    admitted: Admitted,
    /// The servers; `None`: those of server.conf.
    members: Option<Arc<Members>>,
}

/// When a volume was made and changed, by the clocks of those who led: milliseconds since the beginning of 1970,
/// UTC; 0: before the log told the time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct VolumeTimes {
    /// When it was created.
    pub created_ms: u64,
    /// Last slot that changed its content or its size.
    pub changed: Slot,
    /// When that was.
    pub changed_ms: u64,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct VolumeReservations {
    now: Reservations,
    /// The session through which the holder of RESERVE(6) came; it ends with it.
    unit_session: SessionId,
}

impl State {
    /// Slot of the last entry that was applied.
    pub fn applied(&self) -> Slot {
        self.applied
    }

    /// Notes that all commands of the entry in `slot` have been applied.
    pub fn finish_slot(&mut self, slot: Slot) {
        assert_eq!(
            slot,
            self.applied.next(),
            "entries are applied in order, once"
        );
        self.applied = slot;
    }

    /// All volumes, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.values()
    }

    /// A volume by id.
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id)
    }

    /// A volume by name.
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volumes.values().find(|volume| volume.name == name)
    }

    /// How many sessions have a volume attached.
    pub fn attachments(&self, volume: VolumeId) -> usize {
        self.sessions
            .values()
            .filter(|session| session.attached.contains_key(&volume))
            .count()
    }

    /// The reservations of a volume; `None` if there never were any.
    pub fn reservations(&self, volume: VolumeId) -> Option<&Reservations> {
        self.reservations.get(&volume).map(|it| &it.now)
    }

    /// The time of the last entries, by the clock of whoever led: milliseconds since the beginning of 1970, UTC; 0
    /// if the log never told. Steps back if a leader's clock does.
    pub fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    /// When a volume was made and changed.
    pub fn times(&self, volume: VolumeId) -> VolumeTimes {
        self.times.get(&volume).copied().unwrap_or_default()
    }

    /// The servers, if the log has listed them.
    pub fn members(&self) -> Option<&Arc<Members>> {
        self.members.as_ref()
    }

    /// Which life of each server counts.
    pub fn admitted(&self) -> &Admitted {
        &self.admitted
    }

    /// How many administrative actions were ever recorded: the number of the last.
    pub fn events_made(&self) -> u64 {
        self.events.made()
    }

    /// Number of the oldest administrative action that is kept, or of the next if there is none.
    pub fn first_event(&self) -> u64 {
        self.events.first()
    }

    /// The administrative actions that are kept, oldest first: those behind the one of this number.
    pub fn events_after(&self, number: u64) -> impl Iterator<Item = &AdminEvent> {
        self.events.after(number)
    }

    /// What a command asks to be done to the cell, seen before it is carried out; `None` for commands that are no
    /// administrative actions.
    fn action(&self, op: &Op) -> Option<AdminAction> {
        let before = |volume: &VolumeId| match self.volumes.get(volume) {
            Some(volume) => (volume.name.clone(), volume.size_bytes),
            None => (String::new(), 0),
        };
        let resize = |volume: &VolumeId, to_bytes: &u64, forced| {
            let (name, from_bytes) = before(volume);
            AdminAction::ResizeVolume {
                volume: *volume,
                name,
                from_bytes,
                to_bytes: *to_bytes,
                forced,
            }
        };
        let delete = |volume: &VolumeId, forced| {
            let (name, size_bytes) = before(volume);
            AdminAction::DeleteVolume {
                volume: *volume,
                name,
                size_bytes,
                forced,
            }
        };
        Some(match op {
            Op::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                ..
            } => AdminAction::CreateVolume {
                volume: None,
                // One that is refused may be longer.
                name: shortened(name, VOLUME_NAME_MAX).to_owned(),
                size_bytes: *size_bytes,
                chunk_bytes: *chunk_bytes,
            },
            Op::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => resize(volume, size_bytes, *allow_shrink),
            Op::ShrinkVolume { volume, size_bytes } => resize(volume, size_bytes, false),
            Op::DeleteVolume { volume } => delete(volume, false),
            Op::DeleteAttachedVolume { volume } => delete(volume, true),
            Op::Note { text } => AdminAction::Note {
                text: shortened(text, NOTE_BYTES_MAX).to_owned(),
            },
            Op::Noop
            | Op::Write { .. }
            | Op::Zero { .. }
            | Op::OpenSession { .. }
            | Op::OpenSessionFrom { .. }
            | Op::EndSessions { .. }
            | Op::Attach { .. }
            | Op::Detach { .. }
            | Op::Reserve { .. }
            | Op::Clock { .. }
            | Op::AdmitServer { .. }
            | Op::SetMembers { .. } => return None,
        })
    }

    /// Keeps an administrative action with who asked for it and what came of it.
    fn record(
        &mut self,
        slot: Slot,
        session: SessionId,
        mut action: AdminAction,
        result: Result<Answer, Refusal>,
    ) {
        if let (AdminAction::CreateVolume { volume, .. }, Ok(Answer::Created(id))) =
            (&mut action, result)
        {
            *volume = Some(VolumeId(id as u32));
        }
        let session = self.sessions.get(&session);
        if !session.is_some_and(|it| it.told) && !matches!(action, AdminAction::Note { .. }) {
            return;
        }
        let by = session.map(|it| it.origin.clone()).unwrap_or_default();
        self.events.push(AdminEvent {
            number: 0,
            slot,
            time_ms: self.clock_ms,
            by,
            action,
            refused: result.err(),
        });
    }

    fn note_change(&mut self, slot: Slot, op: &Op, answer: Answer) {
        if self.clock_ms == 0 {
            return;
        }
        let changed_ms = self.clock_ms;
        match (op, answer) {
            (_, Answer::Refused(_)) => {}
            (
                Op::Write { volume, .. }
                | Op::Zero { volume, .. }
                | Op::ResizeVolume { volume, .. }
                | Op::ShrinkVolume { volume, .. },
                _,
            ) => {
                let times = self.times.entry(*volume).or_default();
                (times.changed, times.changed_ms) = (slot, changed_ms);
            }
            (Op::CreateVolume { .. }, Answer::Created(id)) => {
                let times = VolumeTimes {
                    created_ms: changed_ms,
                    changed: slot,
                    changed_ms,
                };
                self.times.insert(VolumeId(id as u32), times);
            }
            (Op::DeleteVolume { volume } | Op::DeleteAttachedVolume { volume }, _) => {
                self.times.remove(volume);
            }
            _ => {}
        }
    }

    /// Whether a session exists.
    pub fn has_session(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// All sessions, by id.
    pub fn sessions(&self) -> impl Iterator<Item = SessionInfo> + '_ {
        self.sessions.iter().map(|(id, session)| SessionInfo {
            id: *id,
            name: session.origin.name.clone(),
            volumes: session.attached.keys().copied().collect(),
        })
    }

    /// The answer of a request that was applied before, if the session still remembers it.
    pub fn remembered(&self, session: SessionId, number: RequestNumber) -> Option<Answer> {
        let session = self.sessions.get(&session)?;
        let index = number.0.checked_sub(session.floor.0)?;
        *session.answers.get(index as usize)?
    }

    /// Applies a command of the entry in `slot`, the `position`-th of it.
    ///
    /// The effect must be carried out before the answer is given.
    pub fn apply(&mut self, slot: Slot, position: u32, command: &Command) -> (Answer, Effect<'_>) {
        assert_eq!(
            slot,
            self.applied.next(),
            "entries are applied in order, once"
        );
        if command.session == SessionId(0) {
            return self.perform(slot, position, command);
        }
        match self.admit(command) {
            Err(answer) => (answer, Effect::None),
            Ok(()) => {
                // The answer is known before the effect is borrowed from the state: decide first.
                let answer = self.decide(slot, position, command);
                self.remember(command, answer);
                (answer, self.effect(command, answer))
            }
        }
    }

    fn perform(&mut self, slot: Slot, position: u32, command: &Command) -> (Answer, Effect<'_>) {
        let answer = self.decide(slot, position, command);
        (answer, self.effect(command, answer))
    }

    /// Lets a command through once; a repetition gets its answer again.
    fn admit(&mut self, command: &Command) -> Result<(), Answer> {
        let Some(session) = self.sessions.get_mut(&command.session) else {
            return Err(Answer::Refused(Refusal::StaleSession));
        };
        let number = command.number;
        if number < session.floor {
            return Err(Answer::Refused(Refusal::Settled));
        }
        let settled = command.settled_below.min(number);
        while session.floor < settled {
            session.floor.0 += 1;
            session.answers.pop_front();
        }
        let index = number.0 - session.floor.0;
        if index >= SESSION_WINDOW {
            return Err(Answer::Refused(Refusal::OutsideWindow));
        }
        match session.answers.get(index as usize) {
            Some(Some(answer)) => Err(*answer),
            _ => Ok(()),
        }
    }

    fn remember(&mut self, command: &Command, answer: Answer) {
        // A command that ends its own session leaves nothing to remember.
        let Some(session) = self.sessions.get_mut(&command.session) else {
            return;
        };
        let index = (command.number.0 - session.floor.0) as usize;
        if session.answers.len() <= index {
            session.answers.resize(index + 1, None);
        }
        session.answers[index] = Some(answer);
    }

    /// Changes volumes and sessions; says what the answer is.
    fn decide(&mut self, slot: Slot, position: u32, command: &Command) -> Answer {
        let action = self.action(&command.op);
        let result = match &command.op {
            Op::Noop => Ok(Answer::Done),
            Op::Write {
                volume,
                first_block,
                checksums,
                ..
            } => self.check_range(*volume, *first_block, checksums.len() as u64),
            Op::Zero {
                volume,
                first_block,
                blocks,
                ..
            } => self.check_range(*volume, *first_block, *blocks),
            Op::OpenSession { nonce, name } => {
                let name = name.clone();
                let origin = Origin {
                    name,
                    ..Origin::default()
                };
                self.open_session(slot, position, *nonce, &origin, false)
            }
            Op::OpenSessionFrom { nonce, origin } => {
                self.open_session(slot, position, *nonce, origin, true)
            }
            Op::Note { .. } => Ok(Answer::Done),
            Op::AdmitServer {
                server,
                incarnation,
            } => {
                self.admitted.admit(*server, *incarnation);
                Ok(Answer::Done)
            }
            Op::SetMembers { members } => {
                let epoch = self.members.as_ref().map_or(0, |it| it.epoch);
                if members.epoch > epoch {
                    // What they were told is done may be lost: whoever has a volume open must look anew.
                    let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
                    for session in sessions {
                        self.sessions.remove(&session);
                        self.end_units(session);
                    }
                }
                self.members = Some(Arc::clone(members));
                Ok(Answer::Done)
            }
            Op::EndSessions { sessions } => {
                for session in sessions {
                    self.sessions.remove(session);
                    self.end_units(*session);
                }
                Ok(Answer::Done)
            }
            Op::CreateVolume {
                name,
                size_bytes,
                chunk_bytes,
                uuid,
            } => self.create_volume(slot, name, *size_bytes, *chunk_bytes, *uuid),
            Op::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            } => self.resize_volume(*volume, *size_bytes, *allow_shrink),
            Op::DeleteVolume { volume } => match self.volumes.contains_key(volume) {
                false => Err(Refusal::NoSuchVolume),
                true if self.attachments(*volume) > 0 => Err(Refusal::VolumeAttached),
                true => Ok(Answer::Done),
            },
            Op::Attach { volume } => self.attach(command.session, *volume),
            Op::Detach { volume } => Ok(self.detach(command.session, *volume)),
            Op::Reserve { volume, request } => self.reserve(command.session, *volume, request),
            Op::ShrinkVolume { volume, size_bytes } => self.shrink_volume(*volume, *size_bytes),
            Op::DeleteAttachedVolume { volume } => match self.volumes.contains_key(volume) {
                false => Err(Refusal::NoSuchVolume),
                true => {
                    for session in self.sessions.values_mut() {
                        session.attached.remove(volume);
                    }
                    Ok(Answer::Done)
                }
            },
            Op::Clock { unix_ms } => {
                // 0 says that nobody told the time, and then the volumes' times would not be stored.
                self.clock_ms = (*unix_ms).max(1);
                Ok(Answer::Done)
            }
        };
        if let Some(action) = action {
            self.record(slot, command.session, action, result);
        }
        let answer = result.unwrap_or_else(Answer::Refused);
        self.note_change(slot, &command.op, answer);
        answer
    }

    fn effect(&mut self, command: &Command, answer: Answer) -> Effect<'_> {
        if let Answer::Refused(_) = answer {
            return Effect::None;
        }
        match &command.op {
            Op::Write { volume, .. } => Effect::Write(&self.volumes[volume]),
            Op::Zero {
                volume,
                first_block,
                blocks,
                allocate,
            } => Effect::Zero {
                volume: &self.volumes[volume],
                first_block: *first_block,
                blocks: *blocks,
                allocate: *allocate,
            },
            Op::CreateVolume { .. } => match answer {
                Answer::Created(id) => Effect::Create(&self.volumes[&VolumeId(id as u32)]),
                _ => Effect::None,
            },
            // What lies behind the new end must read as zeros if the volume grows again.
            Op::ResizeVolume {
                volume,
                allow_shrink: true,
                ..
            }
            | Op::ShrinkVolume { volume, .. } => {
                let volume = &self.volumes[volume];
                let first_block = volume.blocks();
                let most = crate::volume::map::blocks_per_chunk(volume.chunk_bytes) << 24;
                Effect::Zero {
                    volume,
                    first_block,
                    blocks: most - first_block,
                    allocate: false,
                }
            }
            Op::DeleteVolume { volume } | Op::DeleteAttachedVolume { volume } => {
                self.reservations.remove(volume);
                match self.volumes.remove(volume) {
                    Some(volume) => Effect::Delete(volume),
                    None => Effect::None,
                }
            }
            _ => Effect::None,
        }
    }

    fn check_range(&self, volume: VolumeId, first: u64, blocks: u64) -> Result<Answer, Refusal> {
        let volume = self.volumes.get(&volume).ok_or(Refusal::NoSuchVolume)?;
        match first.checked_add(blocks) {
            Some(end) if end <= volume.blocks() => Ok(Answer::Done),
            _ => Err(Refusal::OutOfRange),
        }
    }

    fn open_session(
        &mut self,
        slot: Slot,
        position: u32,
        nonce: u64,
        origin: &Origin,
        told: bool,
    ) -> Result<Answer, Refusal> {
        if let Some((id, _)) = self
            .sessions
            .iter()
            .find(|(_, session)| session.nonce == nonce)
        {
            return Ok(Answer::Created(id.0));
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(Refusal::TooMany);
        }
        // An entry has fewer than 2^16 commands, so slot and position make an id that is used once.
        let id = (slot.0 << 16) | u64::from(position);
        let session = Session {
            nonce,
            origin: Origin {
                name: origin.name.chars().take(SESSION_NAME_MAX).collect(),
                user: shortened(&origin.user, USER_NAME_MAX).to_owned(),
                // Without what the log does not hold: the scope of an address of IPv6.
                address: origin.address.map(|it| SocketAddr::new(it.ip(), it.port())),
            },
            told,
            opened: slot,
            floor: RequestNumber(1),
            answers: VecDeque::new(),
            attached: BTreeMap::new(),
        };
        self.sessions.insert(SessionId(id), session);
        Ok(Answer::Created(id))
    }

    fn create_volume(
        &mut self,
        slot: Slot,
        name: &str,
        size_bytes: u64,
        chunk_bytes: u32,
        uuid: [u8; 16],
    ) -> Result<Answer, Refusal> {
        check_volume_name(name)?;
        check_chunk_bytes(chunk_bytes)?;
        check_volume_size(size_bytes, chunk_bytes)?;
        if self.volume_named(name).is_some() {
            return Err(Refusal::VolumeExists);
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(Refusal::TooMany);
        }
        self.volumes_made += 1;
        let id = VolumeId(self.volumes_made);
        let name = name.to_owned();
        self.volumes.insert(
            id,
            Volume {
                id,
                name,
                size_bytes,
                chunk_bytes,
                uuid,
                created: slot,
            },
        );
        Ok(Answer::Created(u64::from(id.0)))
    }

    fn resize_volume(
        &mut self,
        id: VolumeId,
        size_bytes: u64,
        allow_shrink: bool,
    ) -> Result<Answer, Refusal> {
        let volume = self.volumes.get_mut(&id).ok_or(Refusal::NoSuchVolume)?;
        check_volume_size(size_bytes, volume.chunk_bytes)?;
        if size_bytes < volume.size_bytes && !allow_shrink {
            return Err(Refusal::WouldShrink);
        }
        volume.size_bytes = size_bytes;
        Ok(Answer::Done)
    }

    fn shrink_volume(&mut self, id: VolumeId, size_bytes: u64) -> Result<Answer, Refusal> {
        let volume = self.volumes.get(&id).ok_or(Refusal::NoSuchVolume)?;
        if size_bytes < volume.size_bytes && self.attachments(id) > 0 {
            check_volume_size(size_bytes, volume.chunk_bytes)?;
            return Err(Refusal::VolumeAttached);
        }
        self.resize_volume(id, size_bytes, true)
    }

    fn reserve(
        &mut self,
        session: SessionId,
        volume: VolumeId,
        request: &ReservationRequest,
    ) -> Result<Answer, Refusal> {
        if !self.volumes.contains_key(&volume) {
            return Err(Refusal::NoSuchVolume);
        }
        let mut changed = self.reservations.get(&volume).cloned().unwrap_or_default();
        changed.now.apply(request)?;
        if changed.now.version() == 0 {
            return Ok(Answer::Done);
        }
        if request.action == ReservationAction::ReserveUnit {
            changed.unit_session = session;
        }
        if changed.now.unit_holder().is_none() {
            changed.unit_session = SessionId(0);
        }
        self.reservations.insert(volume, changed);
        Ok(Answer::Done)
    }

    /// RESERVE(6) lasts as long as its nexus, which is gone with its gateway.
    fn end_units(&mut self, session: SessionId) {
        for reservations in self.reservations.values_mut() {
            if session != SessionId(0) && reservations.unit_session == session {
                reservations.now.end_unit();
                reservations.unit_session = SessionId(0);
            }
        }
    }

    fn attach(&mut self, session: SessionId, volume: VolumeId) -> Result<Answer, Refusal> {
        if !self.volumes.contains_key(&volume) {
            return Err(Refusal::NoSuchVolume);
        }
        let session = self
            .sessions
            .get_mut(&session)
            .ok_or(Refusal::StaleSession)?;
        *session.attached.entry(volume).or_default() += 1;
        Ok(Answer::Done)
    }

    fn detach(&mut self, session: SessionId, volume: VolumeId) -> Answer {
        if let Some(session) = self.sessions.get_mut(&session)
            && let Some(count) = session.attached.get_mut(&volume)
        {
            *count -= 1;
            if *count == 0 {
                session.attached.remove(&volume);
            }
        }
        Answer::Done
    }
}

/// Checks a volume's name.
///
/// # Errors
/// [`Refusal::BadName`].
pub fn check_volume_name(name: &str) -> Result<(), Refusal> {
    let bad = |c: char| c == '/' || c == '\0' || c.is_control();
    let fits = !name.is_empty() && name.len() <= VOLUME_NAME_MAX;
    // A leading dot is kept for PSS's own directories; `.` and `..` are covered by it.
    if fits && !name.starts_with('.') && !name.contains(bad) {
        Ok(())
    } else {
        Err(Refusal::BadName)
    }
}

/// Checks a chunk size.
///
/// # Errors
/// [`Refusal::BadChunkSize`].
pub fn check_chunk_bytes(chunk_bytes: u32) -> Result<(), Refusal> {
    let fits = (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes);
    if fits && chunk_bytes.is_power_of_two() {
        Ok(())
    } else {
        Err(Refusal::BadChunkSize)
    }
}

/// Checks a volume's size.
///
/// # Errors
/// [`Refusal::BadSize`].
pub fn check_volume_size(size_bytes: u64, chunk_bytes: u32) -> Result<(), Refusal> {
    let most = VOLUME_BYTES_MAX.min(u64::from(chunk_bytes) << 24);
    if size_bytes == 0 || size_bytes > most || !size_bytes.is_multiple_of(512) {
        return Err(Refusal::BadSize);
    }
    Ok(())
}

/// Version of [`State::encode`]'s layout without reservations.
const STATE_VERSION: u16 = 1;
/// With them. Written only if there are any, so that programs that do not know them can read the rest.
const STATE_VERSION_RESERVATIONS: u16 = 2;
/// With reservations, even if there are none, the clock, and the volumes' times.
const STATE_VERSION_CLOCK: u16 = 3;
/// With all of that, where sessions come from, and what was done to the cell.
const STATE_VERSION_EVENTS: u16 = 4;
/// With all of that, which life of each server counts.
const STATE_VERSION_LIVES: u16 = 5;
/// With all of that, the servers.
const STATE_VERSION_MEMBERS: u16 = 6;

/// Why bytes are no state.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BadState {
    /// They are not what [`State::encode`] makes.
    #[error("the bytes are not a replicated state")]
    Malformed,
    /// A newer program has written it.
    #[error("replicated state of version {0}, this program knows up to {STATE_VERSION_MEMBERS}")]
    Version(u16),
}

/// Layout, little-endian: version u16, applied u64, volumes made u32, volumes, sessions; lists and
/// strings with a u32 count in front. See docs/formats.md.
impl State {
    /// The state as bytes; equal states give equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let people = self.events.made() > 0 || self.origins().next().is_some();
        let version = match (self.clock_ms, self.reservations.is_empty()) {
            _ if self.members.is_some() => STATE_VERSION_MEMBERS,
            _ if self.admitted != Admitted::default() => STATE_VERSION_LIVES,
            _ if people => STATE_VERSION_EVENTS,
            (0, true) => STATE_VERSION,
            (0, false) => STATE_VERSION_RESERVATIONS,
            _ => STATE_VERSION_CLOCK,
        };
        out.put_u16_le(version);
        out.put_u64_le(self.applied.0);
        out.put_u32_le(self.volumes_made);
        out.put_u32_le(self.volumes.len() as u32);
        for volume in self.volumes.values() {
            out.put_u32_le(volume.id.0);
            put_string(&mut out, &volume.name);
            out.put_u64_le(volume.size_bytes);
            out.put_u32_le(volume.chunk_bytes);
            out.put_slice(&volume.uuid);
            out.put_u64_le(volume.created.0);
        }
        out.put_u32_le(self.sessions.len() as u32);
        for (id, session) in &self.sessions {
            out.put_u64_le(id.0);
            session.encode(&mut out);
        }
        if version >= STATE_VERSION_RESERVATIONS {
            out.put_u32_le(self.reservations.len() as u32);
            for (volume, reservations) in &self.reservations {
                out.put_u32_le(volume.0);
                out.put_u64_le(reservations.unit_session.0);
                reservations.now.encode(&mut out);
            }
        }
        if version >= STATE_VERSION_CLOCK {
            out.put_u64_le(self.clock_ms);
            out.put_u32_le(self.times.len() as u32);
            for (volume, times) in &self.times {
                out.put_u32_le(volume.0);
                out.put_u64_le(times.created_ms);
                out.put_u64_le(times.changed.0);
                out.put_u64_le(times.changed_ms);
            }
        }
        if version >= STATE_VERSION_EVENTS {
            out.put_u32_le(self.origins().count() as u32);
            for (id, origin) in self.origins() {
                out.put_u64_le(id.0);
                origin.encode(&mut out);
            }
            self.events.encode(&mut out);
        }
        if version >= STATE_VERSION_LIVES {
            let lives = self.admitted.iter();
            lives.for_each(|(_, incarnation)| out.put_u64_le(incarnation.0));
        }
        if let Some(members) = &self.members {
            members.encode(&mut out);
        }
        out
    }

    /// The sessions of which more is told than their name.
    fn origins(&self) -> impl Iterator<Item = (SessionId, &Origin)> {
        let told = self.sessions.iter().filter(|(_, session)| session.told);
        told.map(|(id, session)| (*id, &session.origin))
    }

    /// Reads what [`State::encode`] made.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn decode(mut bytes: &[u8]) -> Result<State, BadState> {
        let input = &mut bytes;
        let version = input.try_get_u16_le().map_err(|_| BadState::Malformed)?;
        if version > STATE_VERSION_MEMBERS {
            return Err(BadState::Version(version));
        }
        if version < STATE_VERSION {
            return Err(BadState::Malformed);
        }
        let mut state = State {
            applied: Slot(u64_of(input)?),
            volumes_made: u32_of(input)?,
            ..State::default()
        };
        for _ in 0..u32_of(input)? {
            let id = VolumeId(u32_of(input)?);
            let volume = Volume {
                id,
                name: string_of(input)?,
                size_bytes: u64_of(input)?,
                chunk_bytes: u32_of(input)?,
                uuid: array_of(input)?,
                created: Slot(u64_of(input)?),
            };
            check_chunk_bytes(volume.chunk_bytes).map_err(|_| BadState::Malformed)?;
            state.volumes.insert(id, volume);
        }
        for _ in 0..u32_of(input)? {
            let id = SessionId(u64_of(input)?);
            state.sessions.insert(id, Session::decode(input)?);
        }
        if version >= STATE_VERSION_RESERVATIONS {
            for _ in 0..u32_of(input)? {
                let volume = VolumeId(u32_of(input)?);
                let reservations = VolumeReservations {
                    unit_session: SessionId(u64_of(input)?),
                    now: Reservations::decode(input).map_err(|_| BadState::Malformed)?,
                };
                state.reservations.insert(volume, reservations);
            }
        }
        if version >= STATE_VERSION_CLOCK {
            state.clock_ms = u64_of(input)?;
            for _ in 0..u32_of(input)? {
                let volume = VolumeId(u32_of(input)?);
                let times = VolumeTimes {
                    created_ms: u64_of(input)?,
                    changed: Slot(u64_of(input)?),
                    changed_ms: u64_of(input)?,
                };
                state.times.insert(volume, times);
            }
        }
        if version >= STATE_VERSION_EVENTS {
            for _ in 0..u32_of(input)? {
                let id = SessionId(u64_of(input)?);
                let origin = Origin::decode(input).map_err(|_| BadState::Malformed)?;
                let session = state.sessions.get_mut(&id).ok_or(BadState::Malformed)?;
                (session.origin, session.told) = (origin, true);
            }
            state.events = Events::decode(input)?;
        }
        if version >= STATE_VERSION_LIVES {
            for server in (0..SERVERS_MAX as u8).map(ServerId) {
                state.admitted.admit(server, Incarnation(u64_of(input)?));
            }
        }
        if version >= STATE_VERSION_MEMBERS {
            let members = Members::decode(input).map_err(|_| BadState::Malformed)?;
            state.members = Some(Arc::new(members));
        }
        if input.is_empty() {
            Ok(state)
        } else {
            Err(BadState::Malformed)
        }
    }
}

impl Session {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.nonce);
        put_string(out, &self.origin.name);
        out.put_u64_le(self.opened.0);
        out.put_u64_le(self.floor.0);
        out.put_u32_le(self.answers.len() as u32);
        for answer in &self.answers {
            match answer {
                None => out.put_u8(0),
                Some(Answer::Done) => out.put_u8(255),
                Some(Answer::Created(id)) => {
                    out.put_u8(254);
                    out.put_u64_le(*id);
                }
                Some(Answer::Refused(refusal)) => out.put_u8(*refusal as u8),
            }
        }
        out.put_u32_le(self.attached.len() as u32);
        for (volume, count) in &self.attached {
            out.put_u32_le(volume.0);
            out.put_u32_le(*count);
        }
    }

    fn decode(input: &mut &[u8]) -> Result<Session, BadState> {
        let mut session = Session {
            nonce: u64_of(input)?,
            origin: Origin {
                name: string_of(input)?,
                ..Origin::default()
            },
            told: false,
            opened: Slot(u64_of(input)?),
            floor: RequestNumber(u64_of(input)?),
            answers: VecDeque::new(),
            attached: BTreeMap::new(),
        };
        for _ in 0..u32_of(input)? {
            let answer = match array_of::<1>(input)?[0] {
                0 => None,
                255 => Some(Answer::Done),
                254 => Some(Answer::Created(u64_of(input)?)),
                code => Some(Answer::Refused(
                    Refusal::from_code(code).ok_or(BadState::Malformed)?,
                )),
            };
            session.answers.push_back(answer);
        }
        for _ in 0..u32_of(input)? {
            session
                .attached
                .insert(VolumeId(u32_of(input)?), u32_of(input)?);
        }
        Ok(session)
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32_le(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn array_of<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], BadState> {
    let (array, rest) = input.split_first_chunk::<N>().ok_or(BadState::Malformed)?;
    *input = rest;
    Ok(*array)
}

fn u32_of(input: &mut &[u8]) -> Result<u32, BadState> {
    Ok(u32::from_le_bytes(array_of(input)?))
}

fn u64_of(input: &mut &[u8]) -> Result<u64, BadState> {
    Ok(u64::from_le_bytes(array_of(input)?))
}

fn string_of(input: &mut &[u8]) -> Result<String, BadState> {
    let length = u32_of(input)? as usize;
    let (text, rest) = input.split_at_checked(length).ok_or(BadState::Malformed)?;
    *input = rest;
    String::from_utf8(text.to_vec()).map_err(|_| BadState::Malformed)
}

#[cfg(test)]
mod tests;
