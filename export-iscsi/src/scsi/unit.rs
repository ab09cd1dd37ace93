//! A logical unit: what it is now, and what is known of each nexus that uses it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use pss_core::time::Instant;
use pss_core::volume::device::{DeviceInfo, DeviceResult, Fate};
use pss_core::volume::reservation::Reservations;

use super::actions::NexusId;
use super::cdb::{Scope, Transfer};
use super::config::LunSettings;
use super::copy::CopyHistory;
use super::mode::ModePages;
use super::sanitize::SanitizeState;
use super::sense::{Asc, Failure, Sense, SenseKey};

/// Most unit attention conditions that wait for one nexus; older ones are kept.
const ATTENTIONS_MAX: usize = 16;
/// Longest READ, WRITE, VERIFY and so on, bytes (VPD B0, MAXIMUM TRANSFER LENGTH).
pub(super) const TRANSFER_BYTES_MAX: u64 = 32 << 20;

/// A logical unit.
pub(super) struct Unit {
    /// Its number.
    pub(super) lun: u16,
    /// The disk; LUN 0, the controller, has none.
    pub(super) disk: Option<Disk>,
    /// Mode pages, of all nexuses.
    pub(super) mode: ModePages,
    attentions: BTreeMap<NexusId, VecDeque<Asc>>,
}

/// What a disk has beyond a controller.
pub(super) struct Disk {
    /// The volume.
    pub(super) info: DeviceInfo,
    /// Whether it can be used.
    pub(super) fate: Fate,
    /// How it is shown.
    pub(super) settings: LunSettings,
    /// The medium is out.
    pub(super) ejected: bool,
    /// Nexuses that prevent its removal.
    pub(super) prevented_by: BTreeSet<NexusId>,
    /// Last known reservations.
    pub(super) reservations: Arc<Reservations>,
    /// Whether it is being sanitized.
    pub(super) sanitize: SanitizeState,
    /// Results of the sanitize operation's requests.
    pub(super) sanitize_results: Vec<Option<DeviceResult>>,
    /// The task that waits for its end.
    pub(super) sanitize_task: Option<u64>,
    /// Since when the device has not answered.
    pub(super) silent_since: Option<Instant>,
    /// When it last answered.
    pub(super) answered: Instant,
    /// What EXTENDED COPY commands came to.
    pub(super) copies: CopyHistory,
    /// Bytes used and available, if known.
    pub(super) usage: Option<(u64, u64)>,
}

impl Unit {
    /// LUN 0.
    pub(super) fn controller() -> Unit {
        Unit {
            lun: 0,
            disk: None,
            mode: ModePages::new(false),
            attentions: BTreeMap::new(),
        }
    }

    /// A disk.
    pub(super) fn disk(lun: u16, info: DeviceInfo, settings: LunSettings) -> Unit {
        let mode = ModePages::new(settings.write_cache);
        Unit {
            lun,
            disk: Some(Disk {
                info,
                fate: Fate::Alive,
                settings,
                ejected: false,
                prevented_by: BTreeSet::new(),
                reservations: Arc::default(),
                sanitize: SanitizeState::Idle,
                sanitize_results: Vec::new(),
                sanitize_task: None,
                silent_since: None,
                answered: Instant::default(),
                copies: CopyHistory::default(),
                usage: None,
            }),
            mode,
            attentions: BTreeMap::new(),
        }
    }

    /// Whether the unit knows commands of a scope.
    pub(super) fn serves(&self, scope: Scope) -> bool {
        match (scope, &self.disk) {
            (Scope::Every, _) => true,
            (_, None) => false,
            (Scope::Disk, Some(_)) => true,
            (Scope::Thin, Some(disk)) => disk.settings.thin,
            (Scope::Sanitizable, Some(disk)) => disk.settings.sanitize,
        }
    }

    /// The disk of a command that only disks know.
    ///
    /// # Errors
    /// INVALID COMMAND OPERATION CODE.
    pub(super) fn the_disk(&self) -> Result<&Disk, Sense> {
        self.disk
            .as_ref()
            .ok_or(Sense::illegal(Asc::INVALID_OPERATION_CODE))
    }

    /// Establishes a unit attention condition.
    pub(super) fn attend(&mut self, nexus: NexusId, asc: Asc) {
        let waiting = self.attentions.entry(nexus).or_default();
        // Power on and resets cover what came before (SAM-5 §5.14, table 46).
        if matches!(asc, Asc::POWER_ON | Asc::BUS_DEVICE_RESET) {
            waiting.clear();
        }
        if waiting.len() < ATTENTIONS_MAX && !waiting.contains(&asc) {
            waiting.push_back(asc);
        }
    }

    /// Takes the oldest unit attention condition of a nexus.
    pub(super) fn take_attention(&mut self, nexus: NexusId) -> Option<Asc> {
        self.attentions.get_mut(&nexus)?.pop_front()
    }

    /// Forgets one kind of unit attention of a nexus.
    pub(super) fn clear_attention(&mut self, nexus: NexusId, asc: Asc) {
        if let Some(waiting) = self.attentions.get_mut(&nexus) {
            waiting.retain(|it| *it != asc);
        }
    }

    /// A nexus is gone.
    pub(super) fn forget(&mut self, nexus: NexusId) {
        self.attentions.remove(&nexus);
        if let Some(disk) = &mut self.disk {
            disk.prevented_by.remove(&nexus);
            disk.copies.forget(nexus);
        }
    }

    /// What a logical unit reset does beside ending tasks (SAM-5 §6.3.3).
    pub(super) fn reset(&mut self) {
        let write_cache = self
            .disk
            .as_ref()
            .is_some_and(|disk| disk.settings.write_cache);
        self.mode = ModePages::new(write_cache);
        if let Some(disk) = &mut self.disk {
            disk.prevented_by.clear();
        }
    }
}

impl Disk {
    /// The device has answered.
    pub(super) fn answers(&mut self, now: Instant) {
        self.silent_since = None;
        self.answered = now;
    }

    /// Bytes of a logical block.
    pub(super) fn block_bytes(&self) -> u64 {
        u64::from(self.settings.block_bytes)
    }

    /// How many logical blocks there are.
    pub(super) fn blocks(&self) -> u64 {
        self.info.size_bytes / self.block_bytes()
    }

    /// Logical blocks of a physical block, as a power of two.
    pub(super) fn physical_exponent(&self) -> u8 {
        (self.settings.physical_block_bytes / self.settings.block_bytes.max(1))
            .max(1)
            .ilog2() as u8
    }

    /// Most blocks of a READ, WRITE and so on.
    pub(super) fn transfer_blocks_max(&self) -> u64 {
        TRANSFER_BYTES_MAX / self.block_bytes()
    }

    /// Whether writes are refused, for another reason than SWP.
    pub(super) fn is_read_only(&self) -> bool {
        self.settings.read_only || self.info.read_only
    }

    /// Whether there is a medium to use (SPC-4 §6.47).
    ///
    /// # Errors
    /// NOT READY, or the sense of a failed SANITIZE.
    pub(super) fn check_ready(&self) -> Result<(), Failure> {
        self.sanitize.check()?;
        match self.fate {
            Fate::Deleted => return Err(Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED).into()),
            Fate::Fenced => {
                let asc = Asc::ASYMMETRIC_ACCESS_STATE_TRANSITION;
                return Err(Sense::new(SenseKey::NotReady, asc).into());
            }
            Fate::Alive => {}
        }
        if self.ejected {
            return Err(Sense::new(SenseKey::NotReady, Asc::MEDIUM_NOT_PRESENT).into());
        }
        Ok(())
    }

    /// Checks a range against the capacity, and its length against MAXIMUM TRANSFER LENGTH.
    ///
    /// # Errors
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE (SBC-3 §4.5), INVALID FIELD IN CDB.
    pub(super) fn check_range(&self, transfer: &Transfer, limited: bool) -> Result<(), Sense> {
        let fits = transfer
            .lba
            .checked_add(transfer.blocks)
            .is_some_and(|end| end <= self.blocks());
        if !fits {
            return Err(Sense::out_of_range(transfer.lba.max(self.blocks())));
        }
        if limited && transfer.blocks > self.transfer_blocks_max() {
            return Err(Sense::cdb(transfer.length_at));
        }
        Ok(())
    }

    /// First byte of a block that was checked to exist.
    pub(super) fn offset(&self, lba: u64) -> u64 {
        lba * self.block_bytes()
    }
}
