//! Task management functions (SAM-5 §7): what they end, and when they are answered.

use std::collections::BTreeSet;

use pss_core::time::Instant;
use pss_core::volume::reservation::{ReservationAction, ReservationRequest};

use super::super::actions::{Action, Actions, NexusId, TaskFunction, TaskResponse};
use super::super::report::decode_lun;
use super::super::sense::Asc;
use super::{Owner, Target};

/// A function that is answered when what it ended can have no more effect.
pub(super) struct Management {
    pub(super) nexus: NexusId,
    id: u32,
    /// Requests that are still under way.
    waits: BTreeSet<u64>,
    since: Instant,
    /// Sessions to close when it is done.
    drops: Vec<NexusId>,
    /// The cell did not do what it was to do.
    failed: bool,
}

impl Target {
    /// A task management function came; `id` comes back with the answer.
    pub fn task_management(
        &mut self,
        nexus: NexusId,
        id: u32,
        function: TaskFunction,
        lun: [u8; 8],
        tag: u32,
        actions: &mut Actions,
    ) {
        let unit = decode_lun(lun).filter(|lun| self.units.contains_key(lun));
        let needs_unit = !matches!(
            function,
            TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset
        );
        let answer = |actions: &mut Actions, response| {
            actions.0.push(Action::Managed {
                nexus,
                id,
                response,
            });
        };
        if function == TaskFunction::ClearAca {
            return answer(actions, TaskResponse::NotSupported);
        }
        let lun = match unit {
            None if needs_unit => return answer(actions, TaskResponse::LunDoesNotExist),
            unit => unit.unwrap_or(0),
        };
        let mut drops = Vec::new();
        let waits = match function {
            TaskFunction::AbortTask => {
                let found =
                    self.tasks_where(|it| it.nexus == nexus && it.tag == tag && it.lun == lun);
                if found.is_empty() {
                    return answer(actions, TaskResponse::TaskDoesNotExist);
                }
                self.abort_tasks(found, actions)
            }
            TaskFunction::AbortTaskSet => {
                let own = self.tasks_where(|it| it.nexus == nexus && it.lun == lun);
                self.abort_tasks(own, actions)
            }
            TaskFunction::ClearTaskSet => self.clear_task_set(nexus, lun, actions),
            TaskFunction::LogicalUnitReset => self.reset_by(nexus, lun, actions),
            TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset => {
                if function == TaskFunction::TargetColdReset {
                    drops = self.nexuses.keys().copied().collect();
                }
                let luns: Vec<u16> = self.units.keys().copied().collect();
                luns.into_iter()
                    .flat_map(|lun| self.reset_by(nexus, lun, actions))
                    .collect()
            }
            TaskFunction::ClearAca => Vec::new(),
        };
        self.management.push(Management {
            nexus,
            id,
            waits: waits.into_iter().collect(),
            since: self.now,
            drops,
            failed: false,
        });
        self.answer_drained(actions);
    }

    /// There is one task set for all nexuses (TST 000b); those whose tasks go are told.
    fn clear_task_set(&mut self, nexus: NexusId, lun: u16, actions: &mut Actions) -> Vec<u64> {
        let tasks = self.tasks_where(|it| it.lun == lun);
        let others: BTreeSet<NexusId> = tasks
            .iter()
            .filter_map(|task| self.tasks.get(task))
            .map(|task| task.nexus)
            .filter(|other| *other != nexus)
            .collect();
        if let Some(unit) = self.units.get_mut(&lun) {
            for other in others {
                unit.attend(other, Asc::COMMANDS_CLEARED_BY_ANOTHER_INITIATOR);
            }
        }
        self.abort_tasks(tasks, actions)
    }

    /// Resets a unit for one of our nexuses: a disk when the cell's log has it, at the same moment here and on
    /// every other gateway. The tasks that are here end at once.
    fn reset_by(&mut self, nexus: NexusId, lun: u16, actions: &mut Actions) -> Vec<u64> {
        let tasks = self.tasks_where(|it| it.lun == lun);
        let mut waits = self.abort_tasks(tasks, actions);
        let is_disk = self.units.get(&lun).is_some_and(|it| it.disk.is_some());
        match self.nexuses.get(&nexus).filter(|_| is_disk) {
            Some(state) => {
                let request = ReservationRequest {
                    nexus: state.name.clone(),
                    action: ReservationAction::Reset,
                };
                waits.push(self.ask_reservations(Owner::Reset, lun, request, actions));
            }
            None => self.reset_unit(lun, actions),
        }
        waits
    }

    /// A unit was reset (SAM-5 §6.3.3): by one of our nexuses or through another gateway.
    pub(super) fn reset_unit(&mut self, lun: u16, actions: &mut Actions) {
        let nexuses: Vec<NexusId> = self.nexuses.keys().copied().collect();
        if let Some(unit) = self.units.get_mut(&lun) {
            unit.reset();
            for nexus in nexuses {
                unit.attend(nexus, Asc::BUS_DEVICE_RESET);
            }
        }
        let tasks = self.tasks_where(|it| it.lun == lun);
        self.end_tasks(tasks, Asc::BUS_DEVICE_RESET, actions);
    }

    /// The cell did not do a reset, or nobody knows: that is not to be called complete.
    pub(super) fn reset_failed(&mut self, cookie: u64) {
        let waiting = self.management.iter_mut();
        for waiting in waiting.filter(|it| it.waits.contains(&cookie)) {
            waiting.failed = true;
        }
    }

    /// A request has ended: maybe a function waited for it.
    pub(super) fn drained(&mut self, cookie: u64, actions: &mut Actions) {
        if self.management.is_empty() {
            return;
        }
        for waiting in &mut self.management {
            waiting.waits.remove(&cookie);
        }
        self.answer_drained(actions);
    }

    fn answer_drained(&mut self, actions: &mut Actions) {
        for waiting in std::mem::take(&mut self.management) {
            if !waiting.waits.is_empty() {
                self.management.push(waiting);
                continue;
            }
            actions.0.push(Action::Managed {
                nexus: waiting.nexus,
                id: waiting.id,
                response: match waiting.failed {
                    true => TaskResponse::Rejected,
                    false => TaskResponse::Complete,
                },
            });
            if !waiting.drops.is_empty() && !waiting.failed {
                actions.0.push(Action::DropSessions {
                    nexuses: waiting.drops,
                });
            }
        }
    }

    /// Functions whose requests never end are refused: to say that they are complete would be wrong.
    pub(super) fn expire_management(&mut self, actions: &mut Actions) {
        let limit = self.config.command_timeout;
        for waiting in std::mem::take(&mut self.management) {
            if self.now.since(waiting.since) <= limit {
                self.management.push(waiting);
                continue;
            }
            actions.0.push(Action::Managed {
                nexus: waiting.nexus,
                id: waiting.id,
                response: TaskResponse::Rejected,
            });
        }
    }
}
