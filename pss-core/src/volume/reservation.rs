//! Reservations of a volume: persistent ones (SPC-4 §5.13) and the older RESERVE/RELEASE(6) (SPC-2).
//!
//! A pure state machine: [`Reservations::apply`] depends on nothing but the present state and the
//! request, so that it can stand in the replicated state and every server decides the same.

use std::collections::BTreeMap;
use std::sync::Arc;

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

/// A request of one nexus about a volume's reservations.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ReservationRequest {
    /// Who asks.
    pub nexus: Nexus,
    /// What for.
    pub action: ReservationAction,
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

/// Why a request was not done.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ReservationRefusal {
    /// RESERVATION CONFLICT.
    Conflict,
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

/// Reservations of one volume.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Reservations {
    version: u64,
    generation: u32,
    registrations: BTreeMap<Nexus, u64>,
}

impl Reservations {
    /// Changes with everything that may allow or forbid a request; 0 before the first change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// PRGENERATION.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Registered nexuses with their keys.
    pub fn registrations(&self) -> impl Iterator<Item = (&Nexus, u64)> {
        self.registrations.iter().map(|(nexus, key)| (nexus, *key))
    }
}
