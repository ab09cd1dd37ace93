//! Reservations of a volume: persistent ones (SPC-4 §5.13) and the older RESERVE/RELEASE(6) (SPC-2).
//!
//! A pure state machine: [`Reservations::apply`] depends on nothing but the present state and the
//! request, so that it can stand in the replicated state and every server decides the same.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

mod codec;

pub use codec::BadReservations;

/// Most registrations of a volume: a Windows cluster has 64 nodes with four paths each.
pub const REGISTRATIONS_MAX: usize = 256;
/// Most further nexuses in one REGISTER, so that the request fits into a frame.
pub const ALSO_MAX: usize = 64;
/// Most notices that are kept for gateways which have not heard of them: two commands' worth.
pub const NOTICES_MAX: usize = 2 * REGISTRATIONS_MAX;
/// Most bytes of a port's name: an iSCSI name (223 bytes, RFC 7143 §4.2.7.1) and `,i,0x` with an ISID.
pub const PORT_NAME_MAX: usize = 240;

/// Both ports of an I_T nexus, by their SCSI names. Whoever registers is known by it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Nexus {
    /// Initiator port, such as `iqn.1993-08.org.debian:01:abc,i,0x00023d000001`.
    pub initiator: String,
    /// Target port, such as `iqn.2001-03.jp.tritech:tgtd-pss,t,0x0001`.
    pub target: String,
}

/// Type of a persistent reservation, by its code (SPC-4 table 65).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum ReservationType {
    /// Others may read.
    WriteExclusive = 1,
    /// Others may do nothing.
    ExclusiveAccess = 3,
    /// Those who are not registered may read.
    WriteExclusiveRegistrantsOnly = 5,
    /// Those who are not registered may do nothing.
    ExclusiveAccessRegistrantsOnly = 6,
    /// As `WriteExclusiveRegistrantsOnly`; every registrant holds it.
    WriteExclusiveAllRegistrants = 7,
    /// As `ExclusiveAccessRegistrantsOnly`; every registrant holds it.
    ExclusiveAccessAllRegistrants = 8,
}

impl ReservationType {
    /// The type of a code.
    pub fn from_code(code: u8) -> Option<ReservationType> {
        use ReservationType::*;
        [
            WriteExclusive,
            ExclusiveAccess,
            WriteExclusiveRegistrantsOnly,
            ExclusiveAccessRegistrantsOnly,
            WriteExclusiveAllRegistrants,
            ExclusiveAccessAllRegistrants,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
    }

    /// Whether those who do not hold it may read.
    pub fn lets_read(self) -> bool {
        use ReservationType::*;
        match self {
            WriteExclusive | WriteExclusiveRegistrantsOnly | WriteExclusiveAllRegistrants => true,
            ExclusiveAccess | ExclusiveAccessRegistrantsOnly | ExclusiveAccessAllRegistrants => {
                false
            }
        }
    }

    /// Whether everyone who is registered may do what the holder may.
    pub fn lets_registrants(self) -> bool {
        !matches!(
            self,
            ReservationType::WriteExclusive | ReservationType::ExclusiveAccess
        )
    }

    /// Whether every registrant holds it.
    pub fn held_by_all(self) -> bool {
        matches!(
            self,
            ReservationType::WriteExclusiveAllRegistrants
                | ReservationType::ExclusiveAccessAllRegistrants
        )
    }
}

/// A request of one nexus about a volume's reservations.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ReservationRequest {
    /// Who asks.
    pub nexus: Nexus,
    /// What for.
    pub action: ReservationAction,
}

impl ReservationRequest {
    /// How things stand; who asks does not matter.
    pub fn read() -> ReservationRequest {
        ReservationRequest {
            nexus: Nexus {
                initiator: String::new(),
                target: String::new(),
            },
            action: ReservationAction::Read,
        }
    }
}

/// What a nexus asks for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ReservationAction {
    /// Changes nothing; the answer shows how things stand.
    Read,
    /// REGISTER, and REGISTER AND IGNORE EXISTING KEY.
    Register {
        /// The nexus's present key, 0 if it has none; not looked at with `ignore_existing`.
        key: u64,
        /// Its key from now on; 0 to unregister.
        new_key: u64,
        /// The second form.
        ignore_existing: bool,
        /// ACTIVATE PERSIST THROUGH POWER LOSS.
        aptpl: bool,
        /// Further nexuses that get `new_key` in the same step (SPEC_I_PT, ALL_TG_PT).
        also: Vec<Nexus>,
    },
    /// RESERVE.
    Reserve {
        /// Of the nexus.
        key: u64,
        /// Which kind.
        kind: ReservationType,
    },
    /// RELEASE.
    Release {
        /// Of the nexus.
        key: u64,
        /// Which kind; must be that of the reservation.
        kind: ReservationType,
    },
    /// CLEAR: all registrations and the reservation go.
    Clear {
        /// Of the nexus.
        key: u64,
    },
    /// PREEMPT, and PREEMPT AND ABORT.
    Preempt {
        /// Of the nexus.
        key: u64,
        /// Whose registrations go.
        victim: u64,
        /// Of the reservation that replaces the victim's.
        kind: ReservationType,
        /// The second form: the victims' tasks are aborted.
        abort: bool,
    },
    /// REGISTER AND MOVE.
    RegisterAndMove {
        /// Of the nexus.
        key: u64,
        /// Of the nexus that gets the reservation.
        new_key: u64,
        /// The nexus that asks is unregistered.
        unregister: bool,
        /// ACTIVATE PERSIST THROUGH POWER LOSS.
        aptpl: bool,
        /// Who gets the reservation.
        to: Nexus,
    },
    /// RESERVE(6) of the whole unit.
    ReserveUnit,
    /// RELEASE(6); nothing happens if another nexus holds it.
    ReleaseUnit,
    /// The nexus is gone, and with it its RESERVE(6).
    NexusLost,
    /// LOGICAL UNIT RESET: ends any RESERVE(6); told to every gateway.
    Reset,
}

/// Why a request was not done. The codes never change.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum ReservationRefusal {
    /// RESERVATION CONFLICT.
    Conflict = 1,
    /// The key or type is not that of the reservation (INVALID RELEASE OF PERSISTENT RESERVATION).
    InvalidRelease,
    /// No room for another registration (INSUFFICIENT REGISTRATION RESOURCES).
    TooMany,
    /// A key of zero, or a nexus that may not be the target of a move (INVALID FIELD).
    InvalidField,
}

/// Answer to a [`ReservationRequest`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReservationReply {
    /// Whether it was done.
    pub result: Result<(), ReservationRefusal>,
    /// How things stand now.
    pub now: Arc<Reservations>,
}

/// What a request of an initiator does to the volume, as far as reservations care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Never refused (INQUIRY).
    Free,
    /// Refused only while RESERVE(6) of another nexus holds (TEST UNIT READY).
    Status,
    /// Reads the medium.
    Read,
    /// Changes the medium, or may be used by the holder only (MODE SENSE).
    Write,
}

/// A persistent reservation.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Held {
    /// Its type.
    pub kind: ReservationType,
    /// Who made it; of an "all registrants" type every registrant is a holder all the same.
    pub by: Nexus,
}

/// Something that a nexus has to be told.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Notice {
    /// Version of the reservations that began with it.
    pub version: u64,
    /// What happened.
    pub kind: NoticeKind,
    /// To whom.
    pub to: Nexus,
}

/// What happened to a nexus through a request of another one.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum NoticeKind {
    /// RESERVATIONS PREEMPTED (2A/03).
    ReservationsPreempted = 1,
    /// RESERVATIONS RELEASED (2A/04).
    ReservationsReleased = 2,
    /// REGISTRATIONS PREEMPTED (2A/05).
    RegistrationsPreempted = 3,
    /// The tasks of the nexus are to be aborted.
    TasksAborted = 4,
}

impl NoticeKind {
    fn from_code(code: u8) -> Option<NoticeKind> {
        use NoticeKind::*;
        [
            ReservationsPreempted,
            ReservationsReleased,
            RegistrationsPreempted,
            TasksAborted,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
    }
}

/// Reservations of one volume.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Reservations {
    version: u64,
    generation: u32,
    aptpl: bool,
    registrations: BTreeMap<Nexus, u64>,
    held: Option<Held>,
    /// Holder of RESERVE(6).
    unit: Option<Nexus>,
    notices: VecDeque<Notice>,
    /// Version that began with the last reset, and who asked for it.
    reset: Option<(u64, Nexus)>,
}

impl Reservations {
    /// Changes with everything that is changed; 0 before the first change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// PRGENERATION.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// What the last registration said of PERSIST THROUGH POWER LOSS. PSS keeps all either way.
    pub fn aptpl(&self) -> bool {
        self.aptpl
    }

    /// Registered nexuses with their keys.
    pub fn registrations(&self) -> impl Iterator<Item = (&Nexus, u64)> {
        self.registrations.iter().map(|(nexus, key)| (nexus, *key))
    }

    /// The key of a nexus, if it is registered.
    pub fn key(&self, nexus: &Nexus) -> Option<u64> {
        self.registrations.get(nexus).copied()
    }

    /// The persistent reservation.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Holder of RESERVE(6).
    pub fn unit_holder(&self) -> Option<&Nexus> {
        self.unit.as_ref()
    }

    /// Whether a nexus holds the persistent reservation.
    pub fn is_holder(&self, nexus: &Nexus) -> bool {
        match &self.held {
            None => false,
            Some(held) if held.kind.held_by_all() => self.registrations.contains_key(nexus),
            Some(held) => held.by == *nexus,
        }
    }

    /// Notices of versions above `seen`, oldest first.
    pub fn notices_after(&self, seen: u64) -> impl Iterator<Item = &Notice> {
        self.notices
            .iter()
            .filter(move |notice| notice.version > seen)
    }

    /// Whether notices of versions above `seen` may have been dropped already.
    pub fn forgot_after(&self, seen: u64) -> bool {
        self.notices.len() >= NOTICES_MAX
            && self
                .notices
                .front()
                .is_some_and(|oldest| oldest.version > seen + 1)
    }

    /// The version that began with the last reset, and who asked for it.
    pub fn reset(&self) -> Option<(u64, &Nexus)> {
        self.reset.as_ref().map(|(version, by)| (*version, by))
    }

    /// Whether a request is allowed (SPC-4 tables 66 and 67, SBC-3 table 13; SPC-2 table 10 for
    /// RESERVE(6)). `None` is someone who cannot be registered, such as an NBD client.
    pub fn allows(&self, nexus: Option<&Nexus>, access: Access) -> bool {
        if access == Access::Free {
            return true;
        }
        if let Some(holder) = &self.unit
            && nexus != Some(holder)
        {
            return false;
        }
        let Some(held) = &self.held else {
            return true;
        };
        let may_all = nexus.is_some_and(|nexus| {
            self.is_holder(nexus)
                || held.kind.lets_registrants() && self.registrations.contains_key(nexus)
        });
        match access {
            Access::Free | Access::Status => true,
            Access::Read => may_all || held.kind.lets_read(),
            Access::Write => may_all,
        }
    }

    /// Carries out a request. Nothing is changed if it is refused.
    ///
    /// # Errors
    /// [`ReservationRefusal`].
    pub fn apply(&mut self, request: &ReservationRequest) -> Result<(), ReservationRefusal> {
        let ReservationRequest { nexus, action } = request;
        if matches!(action, ReservationAction::Read) {
            return Ok(());
        }
        check_name(nexus)?;
        self.check_unit(nexus, action)?;
        let before = self.version;
        match action {
            ReservationAction::Read => {}
            ReservationAction::Register {
                key,
                new_key,
                ignore_existing,
                aptpl,
                also,
            } => {
                self.check_register(nexus, *key, *new_key, *ignore_existing, also)?;
                self.register(nexus, *new_key, *aptpl, also);
            }
            ReservationAction::Reserve { key, kind } => self.reserve(nexus, *key, *kind)?,
            ReservationAction::Release { key, kind } => self.release(nexus, *key, *kind)?,
            ReservationAction::Clear { key } => {
                self.check_key(nexus, *key)?;
                self.clear(nexus);
            }
            ReservationAction::Preempt {
                key,
                victim,
                kind,
                abort,
            } => self.preempt(nexus, *key, *victim, *kind, *abort)?,
            ReservationAction::RegisterAndMove {
                key,
                new_key,
                unregister,
                aptpl,
                to,
            } => self.register_and_move(nexus, *key, *new_key, *unregister, *aptpl, to)?,
            ReservationAction::ReserveUnit => self.reserve_unit(nexus)?,
            ReservationAction::ReleaseUnit | ReservationAction::NexusLost => {
                if self.unit.as_ref() == Some(nexus) {
                    self.begin_version();
                    self.unit = None;
                }
            }
            ReservationAction::Reset => {
                self.begin_version();
                self.unit = None;
                self.reset = Some((self.version, nexus.clone()));
            }
        }
        assert!(
            self.version - before <= 1,
            "a request makes one version at most"
        );
        Ok(())
    }

    /// Persistent reservations conflict with a RESERVE(6) of anybody (SPC-2 §5.5.1).
    fn check_unit(
        &self,
        nexus: &Nexus,
        action: &ReservationAction,
    ) -> Result<(), ReservationRefusal> {
        let touches_unit = matches!(
            action,
            ReservationAction::ReserveUnit
                | ReservationAction::ReleaseUnit
                | ReservationAction::NexusLost
                | ReservationAction::Reset
        );
        match &self.unit {
            Some(_) if !touches_unit => Err(ReservationRefusal::Conflict),
            Some(holder) if *action == ReservationAction::ReserveUnit && holder != nexus => {
                Err(ReservationRefusal::Conflict)
            }
            _ => Ok(()),
        }
    }

    /// Ends the RESERVE(6) of a nexus whose gateway was fenced, and tells it: it may come back.
    pub fn end_unit(&mut self) {
        if let Some(holder) = self.unit.take() {
            self.begin_version();
            self.tell(NoticeKind::ReservationsPreempted, holder);
        }
    }

    fn check_key(&self, nexus: &Nexus, key: u64) -> Result<(), ReservationRefusal> {
        match self.registrations.get(nexus) {
            Some(registered) if *registered == key => Ok(()),
            _ => Err(ReservationRefusal::Conflict),
        }
    }

    fn begin_version(&mut self) {
        self.version += 1;
    }

    fn begin_generation(&mut self) {
        self.begin_version();
        self.generation = self.generation.wrapping_add(1);
    }

    fn tell(&mut self, kind: NoticeKind, to: Nexus) {
        if self.notices.len() >= NOTICES_MAX {
            self.notices.pop_front();
        }
        self.notices.push_back(Notice {
            version: self.version,
            kind,
            to,
        });
    }

    fn tell_registrants_but(&mut self, but: &Nexus, kind: NoticeKind) {
        let others: Vec<Nexus> = self
            .registrations
            .keys()
            .filter(|nexus| *nexus != but)
            .cloned()
            .collect();
        for nexus in others {
            self.tell(kind, nexus);
        }
    }

    /// SPC-4 §5.13.7, tables 68 and 69.
    fn check_register(
        &self,
        nexus: &Nexus,
        key: u64,
        new_key: u64,
        ignore_existing: bool,
        also: &[Nexus],
    ) -> Result<(), ReservationRefusal> {
        if !ignore_existing && self.registrations.get(nexus).copied().unwrap_or(0) != key {
            return Err(ReservationRefusal::Conflict);
        }
        if also.len() > ALSO_MAX {
            return Err(ReservationRefusal::TooMany);
        }
        for other in also {
            check_name(other)?;
        }
        let new: std::collections::BTreeSet<&Nexus> = also
            .iter()
            .chain([nexus])
            .filter(|nexus| !self.registrations.contains_key(*nexus))
            .collect();
        if new_key != 0 && self.registrations.len() + new.len() > REGISTRATIONS_MAX {
            return Err(ReservationRefusal::TooMany);
        }
        Ok(())
    }

    fn register(&mut self, nexus: &Nexus, new_key: u64, aptpl: bool, also: &[Nexus]) {
        if new_key == 0 {
            // "Do nothing except return GOOD status" for a nexus that is not registered.
            if also.iter().chain([nexus]).any(|it| self.key(it).is_some()) {
                self.begin_generation();
                self.aptpl = aptpl;
                for nexus in also.iter().chain([nexus]) {
                    self.unregister(nexus);
                }
            }
            return;
        }
        self.begin_generation();
        self.aptpl = aptpl;
        for nexus in also.iter().chain([nexus]) {
            self.registrations.insert(nexus.clone(), new_key);
        }
    }

    /// SPC-4 §5.13.11.2.3.
    fn unregister(&mut self, nexus: &Nexus) {
        let was_holder = self.is_holder(nexus);
        self.registrations.remove(nexus);
        let Some(held) = &self.held else {
            return;
        };
        let kind = held.kind;
        if was_holder && (!kind.held_by_all() || self.registrations.is_empty()) {
            self.held = None;
            if kind.lets_registrants() {
                self.tell_registrants_but(nexus, NoticeKind::ReservationsReleased);
            }
        }
    }

    /// SPC-4 §5.13.9.
    fn reserve(
        &mut self,
        nexus: &Nexus,
        key: u64,
        kind: ReservationType,
    ) -> Result<(), ReservationRefusal> {
        self.check_key(nexus, key)?;
        match &self.held {
            None => {
                self.begin_version();
                let by = nexus.clone();
                self.held = Some(Held { kind, by });
                Ok(())
            }
            Some(held) if held.kind == kind && self.is_holder(nexus) => Ok(()),
            Some(_) => Err(ReservationRefusal::Conflict),
        }
    }

    /// SPC-4 §5.13.11.2.2.
    fn release(
        &mut self,
        nexus: &Nexus,
        key: u64,
        kind: ReservationType,
    ) -> Result<(), ReservationRefusal> {
        self.check_key(nexus, key)?;
        let Some(held) = &self.held else {
            return Ok(());
        };
        if !self.is_holder(nexus) {
            return Ok(());
        }
        if held.kind != kind {
            return Err(ReservationRefusal::InvalidRelease);
        }
        self.begin_version();
        self.held = None;
        if kind.lets_registrants() {
            self.tell_registrants_but(nexus, NoticeKind::ReservationsReleased);
        }
        Ok(())
    }

    /// SPC-4 §5.13.11.2.7.
    fn clear(&mut self, nexus: &Nexus) {
        self.begin_generation();
        self.tell_registrants_but(nexus, NoticeKind::ReservationsPreempted);
        self.registrations.clear();
        self.held = None;
    }

    /// SPC-4 §5.13.11.2.4 to §5.13.11.2.6.
    fn preempt(
        &mut self,
        nexus: &Nexus,
        key: u64,
        victim: u64,
        kind: ReservationType,
        abort: bool,
    ) -> Result<(), ReservationRefusal> {
        self.check_key(nexus, key)?;
        let takes_reservation = match &self.held {
            None => false,
            Some(held) if held.kind.held_by_all() => victim == 0,
            Some(_) if victim == 0 => return Err(ReservationRefusal::InvalidField),
            Some(held) => self.key(&held.by) == Some(victim),
        };
        let is_victim = |(other, key): (&Nexus, &u64)| {
            let matches = match takes_reservation {
                // The preempting nexus stays registered.
                true => *other != *nexus && (victim == 0 || *key == victim),
                false => *key == victim,
            };
            matches.then(|| other.clone())
        };
        let victims: Vec<Nexus> = self.registrations.iter().filter_map(is_victim).collect();
        if victims.is_empty() && !takes_reservation {
            return Err(ReservationRefusal::Conflict);
        }
        self.begin_generation();
        for other in &victims {
            self.registrations.remove(other);
            if other != nexus {
                self.tell(NoticeKind::RegistrationsPreempted, other.clone());
                if abort {
                    self.tell(NoticeKind::TasksAborted, other.clone());
                }
            }
        }
        if takes_reservation {
            let by = nexus.clone();
            let old = self.held.replace(Held { kind, by });
            if old.is_some_and(|old| old.kind != kind) {
                self.tell_registrants_but(nexus, NoticeKind::ReservationsReleased);
            }
        } else if self.registrations.is_empty() {
            // The last of "all registrants" is gone.
            self.held = None;
        }
        Ok(())
    }

    /// SPC-4 §5.13.8.
    fn register_and_move(
        &mut self,
        nexus: &Nexus,
        key: u64,
        new_key: u64,
        unregister: bool,
        aptpl: bool,
        to: &Nexus,
    ) -> Result<(), ReservationRefusal> {
        self.check_key(nexus, key)?;
        check_name(to)?;
        let kind = match &self.held {
            Some(held) if held.by == *nexus && !held.kind.held_by_all() => held.kind,
            _ => return Err(ReservationRefusal::Conflict),
        };
        if new_key == 0 || to == nexus {
            return Err(ReservationRefusal::InvalidField);
        }
        let room = self.registrations.len() < REGISTRATIONS_MAX;
        if !room && !unregister && !self.registrations.contains_key(to) {
            return Err(ReservationRefusal::TooMany);
        }
        self.begin_generation();
        self.aptpl = aptpl;
        self.registrations.insert(to.clone(), new_key);
        self.held = Some(Held {
            kind,
            by: to.clone(),
        });
        if unregister {
            self.registrations.remove(nexus);
        }
        Ok(())
    }

    /// SPC-2 §7.21, with compatible reservation handling (SPC-4 §5.13.3): to those who may use a unit
    /// under persistent reservations RESERVE(6) says GOOD and does nothing.
    fn reserve_unit(&mut self, nexus: &Nexus) -> Result<(), ReservationRefusal> {
        if !self.registrations.is_empty() {
            let registered = self.registrations.contains_key(nexus);
            return if registered && self.allows(Some(nexus), Access::Write) {
                Ok(())
            } else {
                Err(ReservationRefusal::Conflict)
            };
        }
        if self.unit.as_ref() != Some(nexus) {
            self.begin_version();
            self.unit = Some(nexus.clone());
        }
        Ok(())
    }
}

fn check_name(nexus: &Nexus) -> Result<(), ReservationRefusal> {
    let fits = |name: &str| !name.is_empty() && name.len() <= PORT_NAME_MAX;
    if fits(&nexus.initiator) && fits(&nexus.target) {
        Ok(())
    } else {
        Err(ReservationRefusal::InvalidField)
    }
}

#[cfg(test)]
mod tests;
