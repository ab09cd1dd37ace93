//! How a command begins: what is checked in which order, and who carries it out.

use bytes::Bytes;
use pss_core::volume::reservation::Access;

use super::super::actions::{Actions, Command, Status, TaskAttribute};
use super::super::cdb::{Cdb, Kind, Known, Transfer, find};
use super::super::copy::{self, CopyDisk};
use super::super::job::{Answer, Begin, Begun, Next};
use super::super::sanitize::{SanitizeState, sanitize};
use super::super::sense::{Asc, Failure, Sense, SenseKey};
use super::super::unit::{Disk, Unit};
use super::super::{block, inquiry, mode, provision, report, reserve};
use super::Target;

impl Target {
    /// Commands that are answered whatever waits before them, and those for units that do not exist.
    pub(super) fn answer_at_once(
        &mut self,
        command: &Command,
        lun: Option<u16>,
    ) -> Option<Result<Answer, Failure>> {
        let cdb = Cdb(command.cdb);
        let portal_group = self.nexuses.get(&command.nexus)?.info.portal_group;
        let begun = match (cdb.u8(0), lun) {
            _ if naca(&cdb).is_some() => Err(naca(&cdb)?.into()),
            (0x12, _) => {
                let unit = lun.and_then(|lun| self.units.get(&lun));
                inquiry::inquiry(&self.config, unit, portal_group, &cdb)
            }
            (0xa0, _) => self.report_luns(command, &cdb),
            (0x03, _) => {
                let unit = lun.and_then(|lun| self.units.get_mut(&lun));
                report::request_sense(unit, command.nexus, &cdb)
            }
            (_, None) => Err(Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED).into()),
            // No ACA condition is ever established (SAM-5 §5.10).
            _ if command.attribute == TaskAttribute::Aca => {
                Err(Sense::illegal(Asc::INVALID_MESSAGE).into())
            }
            _ => return None,
        };
        Some(match begun {
            Ok(Begun::Done(answer)) => Ok(answer),
            Ok(_) => Err(super::super::job::internal_failure()),
            Err(failure) => Err(failure),
        })
    }

    /// REPORT LUNS also takes the unit attention about it away (SPC-4 §6.33).
    fn report_luns(&mut self, command: &Command, cdb: &Cdb) -> Begin {
        if let Some(state) = self.nexuses.get_mut(&command.nexus) {
            state.luns_changed = false;
        }
        for unit in self.units.values_mut() {
            unit.clear_attention(command.nexus, Asc::REPORTED_LUNS_DATA_HAS_CHANGED);
        }
        report::luns(self.units.keys().copied(), cdb)
    }

    /// Whether a task has to look how its volume is before it begins. Those that ask the servers otherwise
    /// need not.
    pub(super) fn looks_first(&self, id: u64) -> bool {
        let task = self.tasks.get(&id).filter(|task| !task.looked);
        let Some((lun, command)) = task.and_then(|it| Some((it.lun, it.command.as_ref()?))) else {
            return false;
        };
        let is_disk = self.units.get(&lun).is_some_and(|it| it.disk.is_some());
        is_disk && !asks_servers(&Cdb(command.cdb))
    }

    /// Begins a task. `None`: it goes on by itself, as the unit's sanitize operation or after a look.
    pub(super) fn begin(
        &mut self,
        id: u64,
        command: Command,
        actions: &mut Actions,
    ) -> Option<Next> {
        let (lun, looked) = self.tasks.get(&id).map(|task| (task.lun, task.looked))?;
        let begun = self.begin_checked(id, lun, &command);
        let is_disk = self.units.get(&lun).is_some_and(|it| it.disk.is_some());
        if is_disk && !looked && begun.as_ref().is_err_and(may_be_outdated) {
            if let Some(task) = self.tasks.get_mut(&id) {
                task.command = Some(command);
            }
            self.look(id, actions);
            return None;
        }
        Some(match begun {
            Ok(Begun::Done(answer)) => Next::Done(Ok(answer)),
            Err(failure) => Next::Done(Err(failure)),
            Ok(Begun::Job(mut job)) => {
                let next = job.next(Vec::new());
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.job = Some(job);
                }
                next
            }
            Ok(Begun::Sanitize(sanitize, immediate)) => {
                let disk = self.units.get_mut(&lun).and_then(|it| it.disk.as_mut());
                if let Some(disk) = disk {
                    disk.sanitize = SanitizeState::Running(sanitize);
                    disk.sanitize_task = (!immediate).then_some(id);
                }
                self.sanitize_step(lun, Vec::new(), actions);
                return immediate.then(Next::good);
            }
        })
    }

    fn begin_checked(&mut self, id: u64, lun: u16, command: &Command) -> Begin {
        let cdb = Cdb(command.cdb);
        self.take_attention(lun, command)?;
        let unit = self
            .units
            .get(&lun)
            .ok_or(Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED))?;
        if command.long_cdb.is_some() {
            // All commands that are served have 16 bytes or fewer.
            return Err(Sense::illegal(Asc::INVALID_OPERATION_CODE).into());
        }
        let known = find(&cdb, |scope| unit.serves(scope))?;
        if let Some(task) = self.tasks.get_mut(&id) {
            task.kind = Some(known.kind);
            task.out_bytes = wanted_out(unit, known, &cdb, &command.data_out);
            if known.kind == Kind::ExtendedCopy {
                task.copy = copy::summary(&cdb, &command.data_out);
            }
        }
        if let Some(sense) = known.reserved_bit(&cdb) {
            return Err(sense.into());
        }
        let unit = self
            .units
            .get(&lun)
            .ok_or(Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED))?;
        self.check_reservation(lun, command, known, &cdb)?;
        if let Some(disk) = &unit.disk {
            check_state(unit, disk, known, &cdb)?;
        }
        self.carry_out(lun, command, known, &cdb)
    }

    /// Unit attention conditions come first (SAM-5 §5.14).
    fn take_attention(&mut self, lun: u16, command: &Command) -> Result<(), Failure> {
        if let Some(unit) = self.units.get_mut(&lun)
            && let Some(asc) = unit.take_attention(command.nexus)
        {
            return Err(Sense::attention(asc).into());
        }
        if let Some(state) = self.nexuses.get_mut(&command.nexus)
            && std::mem::take(&mut state.luns_changed)
        {
            return Err(Sense::attention(Asc::REPORTED_LUNS_DATA_HAS_CHANGED).into());
        }
        Ok(())
    }

    /// What is known of the reservations here; the cell checks again in the order of its log.
    fn check_reservation(
        &self,
        lun: u16,
        command: &Command,
        known: &Known,
        cdb: &Cdb,
    ) -> Result<(), Failure> {
        // SPC-4 table 66, SBC-3 table 13: the parameters count for two commands.
        let access = match known.kind {
            Kind::StartStopUnit if !cdb.bit(4, 0) || cdb.u8(4) >> 4 != 0 => Access::Write,
            Kind::PreventAllow if cdb.u8(4) & 3 != 0 => Access::Write,
            _ => known.access,
        };
        let name = self.nexuses.get(&command.nexus).map(|state| &state.name);
        if self.reservations(lun).allows(name, access) {
            Ok(())
        } else {
            Err(Status::ReservationConflict.into())
        }
    }

    fn carry_out(&mut self, lun: u16, command: &Command, known: &Known, cdb: &Cdb) -> Begin {
        match known.kind {
            Kind::ModeSelect => return self.mode_select(lun, command, cdb),
            Kind::StartStopUnit => return self.start_stop(lun, command, cdb),
            Kind::PreventAllow => return self.prevent_allow(lun, command, cdb),
            Kind::Sanitize if known.action == Some(0x1f) => return self.exit_failure(lun, cdb),
            Kind::ExtendedCopy => return self.extended_copy(command, cdb),
            _ => {}
        }
        let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
        let unit = self.units.get(&lun).ok_or(missing)?;
        let state = self.nexuses.get(&command.nexus).ok_or(missing)?;
        let data = &command.data_out[..];
        match known.kind {
            Kind::TestUnitReady => Ok(Begun::Done(Answer::good())),
            Kind::Inquiry => {
                inquiry::inquiry(&self.config, Some(unit), state.info.portal_group, cdb)
            }
            Kind::ReportLuns => report::luns(self.units.keys().copied(), cdb),
            Kind::ModeSense => mode::sense(unit, cdb),
            Kind::LogSense => report::log_sense(unit, cdb),
            Kind::ReportOperationCodes => report::operation_codes(unit, cdb),
            Kind::ReportTaskManagement => report::task_management(cdb),
            Kind::ReportTargetPortGroups => report::target_port_groups(&self.config, cdb),
            Kind::ReportIdentifyingInformation => report::identifying_information(cdb),
            Kind::SendDiagnostic => report::send_diagnostic(cdb),
            Kind::ReadCapacity10 => report::capacity10(unit.the_disk()?, cdb),
            Kind::ReadCapacity16 => report::capacity16(unit.the_disk()?, cdb),
            Kind::ReadDefectData => report::defect_data(cdb),
            Kind::Read => block::read(unit.the_disk()?, cdb),
            Kind::Write => block::write(unit.the_disk()?, cdb, data),
            Kind::WriteAndVerify => block::write_and_verify(unit.the_disk()?, cdb, data),
            Kind::Verify => block::verify(unit.the_disk()?, cdb, data),
            Kind::WriteAtomic => block::write_atomic(unit.the_disk()?, cdb, data),
            Kind::CompareAndWrite => block::compare_and_write(unit.the_disk()?, cdb, data),
            Kind::OrWrite => block::or_write(unit.the_disk()?, cdb, data),
            Kind::PreFetch => block::pre_fetch(unit.the_disk()?, cdb),
            Kind::SynchronizeCache => block::synchronize_cache(unit.the_disk()?, cdb),
            Kind::WriteSame => provision::write_same(unit.the_disk()?, cdb, data),
            Kind::Unmap => provision::unmap(unit.the_disk()?, cdb, data),
            Kind::GetLbaStatus => provision::lba_status(unit.the_disk()?, cdb),
            Kind::Reserve6 => reserve::reserve6(state.name.clone(), cdb),
            Kind::Release6 => reserve::release6(state.name.clone(), cdb),
            Kind::PersistentReserveIn => reserve::persistent_in(state.name.clone(), cdb),
            Kind::PersistentReserveOut => {
                reserve::persistent_out(&self.config, state.name.clone(), cdb, data)
            }
            Kind::ReceiveCopyResults => {
                copy::receive_results(&unit.the_disk()?.copies, command.nexus, cdb)
            }
            // What may still take effect would bring back what is erased.
            Kind::Sanitize if self.has_changes_left_over(lun) => Err(Failure::Status(Status::Busy)),
            Kind::Sanitize => sanitize(unit.the_disk()?, cdb, data),
            Kind::RequestSense
            | Kind::ModeSelect
            | Kind::StartStopUnit
            | Kind::PreventAllow
            | Kind::ExtendedCopy => Err(super::super::job::internal_failure()),
        }
    }

    /// MODE SELECT: the others are told (SPC-4 §6.11).
    fn mode_select(&mut self, lun: u16, command: &Command, cdb: &Cdb) -> Begin {
        let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
        let unit = self.units.get_mut(&lun).ok_or(missing)?;
        let list = super::super::job::joined(&command.data_out, usize::from(u16::MAX));
        let pages = mode::select(unit, cdb, &list)?;
        if pages != unit.mode {
            unit.mode = pages;
            for other in self.nexuses.keys().filter(|it| **it != command.nexus) {
                unit.attend(*other, Asc::MODE_PARAMETERS_CHANGED);
            }
        }
        Ok(Begun::Done(Answer::good()))
    }

    /// START STOP UNIT (SBC-3 §5.25): loads and ejects; a stop changes nothing, as other gateways may serve
    /// the volume.
    fn start_stop(&mut self, lun: u16, command: &Command, cdb: &Cdb) -> Begin {
        let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
        let unit = self.units.get_mut(&lun).ok_or(missing)?;
        let disk = unit.disk.as_mut().ok_or(missing)?;
        let (power, load, start) = (cdb.u8(4) >> 4, cdb.bit(4, 1), cdb.bit(4, 0));
        // With a power condition LOEJ and START are ignored.
        if power != 0 || !load {
            return Ok(Begun::Done(Answer::good()));
        }
        if !disk.settings.removable {
            return Err(Sense::cdb_bit(4, 1).into());
        }
        if !disk.prevented_by.is_empty() {
            return Err(Sense::illegal(Asc::MEDIUM_REMOVAL_PREVENTED).into());
        }
        let inserted = disk.ejected && start;
        disk.ejected = !start;
        if inserted {
            for other in self.nexuses.keys().filter(|it| **it != command.nexus) {
                unit.attend(*other, Asc::MEDIUM_MAY_HAVE_CHANGED);
            }
        }
        Ok(Begun::Done(Answer::good()))
    }

    /// PREVENT ALLOW MEDIUM REMOVAL (SBC-3 §5.12).
    fn prevent_allow(&mut self, lun: u16, command: &Command, cdb: &Cdb) -> Begin {
        let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
        let unit = self.units.get_mut(&lun).ok_or(missing)?;
        let disk = unit.disk.as_mut().ok_or(missing)?;
        match cdb.u8(4) & 3 {
            0 => disk.prevented_by.remove(&command.nexus),
            1 => disk.prevented_by.insert(command.nexus),
            // Obsolete values.
            _ => return Err(Sense::cdb_bit(4, 1).into()),
        };
        Ok(Begun::Done(Answer::good()))
    }

    /// SANITIZE, EXIT FAILURE MODE (SBC-3 §5.22.5).
    fn exit_failure(&mut self, lun: u16, cdb: &Cdb) -> Begin {
        let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
        let unit = self.units.get_mut(&lun).ok_or(missing)?;
        let disk = unit.disk.as_mut().ok_or(missing)?;
        let begun = sanitize(disk, cdb, &[])?;
        if matches!(disk.sanitize, SanitizeState::Failed) {
            disk.sanitize = SanitizeState::Idle;
        }
        Ok(begun)
    }

    fn extended_copy(&self, command: &Command, cdb: &Cdb) -> Begin {
        let name = self.nexuses.get(&command.nexus).map(|state| &state.name);
        let find = |wanted: &[u8]| {
            let disks = self
                .units
                .values()
                .filter_map(|it| Some((it.lun, it.disk.as_ref()?)));
            disks
                .filter(|(_, disk)| {
                    inquiry::unit_designators(disk).iter().any(|own| {
                        wanted.split_at_checked(2).is_some_and(|(form, bytes)| {
                            form == [own.code_set, own.kind] && bytes == own.bytes
                        })
                    })
                })
                .map(|(lun, disk)| CopyDisk {
                    lun,
                    block_bytes: disk.block_bytes(),
                    blocks: disk.blocks(),
                })
                .next()
        };
        let usable = |lun: u16, writes: bool| {
            let missing = Sense::illegal(Asc::LOGICAL_UNIT_NOT_SUPPORTED);
            let unit = self.units.get(&lun).ok_or(missing)?;
            let disk = unit.the_disk()?;
            disk.check_ready()?;
            let access = if writes { Access::Write } else { Access::Read };
            if !disk.reservations.allows(name, access) {
                return Err(Failure::Status(Status::ReservationConflict));
            }
            if writes {
                block::check_writable(disk, unit.mode.write_protected)?;
            }
            Ok(())
        };
        copy::extended_copy(cdb, &command.data_out, find, usable)
    }
}

/// Whether a command asks the servers in the course of being carried out, so that they refuse it if the volume is
/// not as it is thought to be here.
fn asks_servers(cdb: &Cdb) -> bool {
    match cdb.u8(0) {
        // RESERVE, RELEASE, PERSISTENT RESERVE IN and OUT.
        0x16 | 0x17 | 0x5e | 0x5f => true,
        // READ, WRITE and WRITE AND VERIFY of all lengths, COMPARE AND WRITE, ORWRITE, WRITE ATOMIC, WRITE SAME.
        0x08 | 0x28 | 0xa8 | 0x88 | 0x0a | 0x2a | 0xaa | 0x8a | 0x2e | 0xae | 0x8e | 0x89
        | 0x8b | 0x9c | 0x41 | 0x93 => Transfer::decode(cdb).is_ok_and(|it| it.blocks > 0),
        _ => false,
    }
}

/// Whether a command that failed before the servers were asked might fare better: after another gateway's RELEASE,
/// or on a volume that has grown.
fn may_be_outdated(failure: &Failure) -> bool {
    !matches!(failure, Failure::Sense(sense) if sense.key == SenseKey::UnitAttention)
}

/// Refuses the NACA bit of the CONTROL byte, which is the last one.
fn naca(cdb: &Cdb) -> Option<Sense> {
    let control = super::super::cdb::length_by_group(cdb.u8(0))? - 1;
    cdb.bit(control, 2).then(|| Sense::cdb_bit(control, 2))
}

/// Sanitize operations, a missing medium and write protection, for the commands that care.
fn check_state(unit: &Unit, disk: &Disk, known: &Known, cdb: &Cdb) -> Result<(), Failure> {
    match known.kind {
        // SBC-3 §4.11.2: these are carried out while a SANITIZE is in progress.
        Kind::Inquiry
        | Kind::RequestSense
        | Kind::ReportLuns
        | Kind::LogSense
        | Kind::ModeSense
        | Kind::PersistentReserveIn
        | Kind::ReportOperationCodes
        | Kind::ReportTaskManagement
        | Kind::ReportTargetPortGroups
        | Kind::ReportIdentifyingInformation => return Ok(()),
        // Another attempt, or the way out, after a failed one.
        Kind::Sanitize if matches!(disk.sanitize, SanitizeState::Failed) => {}
        _ => disk.sanitize.check()?,
    }
    match known.kind {
        Kind::ModeSelect
        | Kind::StartStopUnit
        | Kind::PreventAllow
        | Kind::Reserve6
        | Kind::Release6
        | Kind::PersistentReserveOut
        | Kind::SendDiagnostic
        | Kind::ReceiveCopyResults
        | Kind::ReadDefectData => return Ok(()),
        Kind::Sanitize => {}
        _ => disk.check_ready()?,
    }
    let writes = match known.kind {
        Kind::Write
        | Kind::WriteAndVerify
        | Kind::WriteSame
        | Kind::WriteAtomic
        | Kind::Unmap
        | Kind::CompareAndWrite
        | Kind::OrWrite => true,
        Kind::Sanitize => cdb.u8(1) & 0x1f != 0x1f,
        _ => false,
    };
    if writes {
        block::check_writable(disk, unit.mode.write_protected)?;
    }
    Ok(())
}

/// Data-out that a command asks for, bytes.
fn wanted_out(unit: &Unit, known: &Known, cdb: &Cdb, data: &[Bytes]) -> u64 {
    let Some(disk) = &unit.disk else {
        return match known.kind {
            Kind::ModeSelect if cdb.u8(0) == 0x15 => u64::from(cdb.u8(4)),
            Kind::ModeSelect => u64::from(cdb.u16(7)),
            Kind::SendDiagnostic => u64::from(cdb.u16(3)),
            _ => 0,
        };
    };
    let blocks = || Transfer::decode(cdb).map_or(0, |it| it.blocks);
    match known.kind {
        Kind::Write | Kind::WriteAndVerify | Kind::OrWrite | Kind::WriteAtomic => {
            blocks().saturating_mul(disk.block_bytes())
        }
        Kind::CompareAndWrite => blocks().saturating_mul(2 * disk.block_bytes()),
        Kind::Verify => block::verify_out_bytes(disk, cdb),
        Kind::WriteSame if cdb.u8(0) == 0x93 && cdb.bit(1, 0) => 0,
        Kind::WriteSame if cdb.bit(1, 3) && data.is_empty() => 0,
        Kind::WriteSame => disk.block_bytes(),
        Kind::Unmap | Kind::Sanitize => u64::from(cdb.u16(7)),
        Kind::ModeSelect if cdb.u8(0) == 0x15 => u64::from(cdb.u8(4)),
        Kind::ModeSelect => u64::from(cdb.u16(7)),
        Kind::PersistentReserveOut => u64::from(cdb.u32(5)),
        Kind::ExtendedCopy => u64::from(cdb.u32(10)),
        Kind::SendDiagnostic => u64::from(cdb.u16(3)),
        _ => 0,
    }
}
