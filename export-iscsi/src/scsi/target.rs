//! One target: its logical units, their task sets, and what it knows of each nexus.

use std::collections::BTreeMap;
use std::sync::Arc;

use pss_core::time::Instant;
use pss_core::volume::device::{DeviceInfo, DeviceResult, Fate};
use pss_core::volume::reservation::{ReservationReply, Reservations};

use super::actions::{
    Action, Actions, Command, NexusId, NexusInfo, Outcome, Status, TaskFunction, TaskResponse,
};
use super::config::{LunConfig, TargetConfig};

/// A target.
pub struct Target {
    config: TargetConfig,
    nexuses: BTreeMap<NexusId, NexusInfo>,
}

impl Target {
    /// A target that nobody uses yet.
    pub fn new(config: TargetConfig) -> Target {
        Target {
            config,
            nexuses: BTreeMap::new(),
        }
    }

    /// What it was made of, with later changes.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    /// Adds a disk, or changes one; initiators are told (UA 3F/0E).
    pub fn add_lun(&mut self, lun: LunConfig, _actions: &mut Actions) {
        self.config.luns.retain(|old| old.lun != lun.lun);
        self.config.luns.push(lun);
    }

    /// Takes a disk away; its tasks are aborted.
    pub fn remove_lun(&mut self, lun: u16, _actions: &mut Actions) {
        self.config.luns.retain(|old| old.lun != lun);
    }

    /// An I_T nexus came to be.
    pub fn attach(&mut self, nexus: NexusId, info: NexusInfo) {
        self.nexuses.insert(nexus, info);
    }

    /// An I_T nexus was lost: its tasks end without a response.
    pub fn detach(&mut self, nexus: NexusId, _actions: &mut Actions) {
        self.nexuses.remove(&nexus);
    }

    /// A command came.
    pub fn submit(&mut self, command: Command, actions: &mut Actions) {
        actions.0.push(Action::Done {
            nexus: command.nexus,
            tag: command.tag,
            outcome: Outcome {
                status: Status::Busy,
                sense: Vec::new(),
                data_in: Vec::new(),
                in_bytes: 0,
                out_bytes: 0,
            },
        });
    }

    /// A task management function came; `id` comes back with the answer.
    pub fn task_management(
        &mut self,
        nexus: NexusId,
        id: u32,
        _function: TaskFunction,
        _lun: [u8; 8],
        _tag: u32,
        actions: &mut Actions,
    ) {
        actions.0.push(Action::Managed {
            nexus,
            id,
            response: TaskResponse::NotSupported,
        });
    }

    /// Result of an [`Action::Submit`].
    pub fn completed(&mut self, _cookie: u64, _result: DeviceResult, _actions: &mut Actions) {}

    /// Result of an [`Action::Reserve`]; `None` if it could not be reached in time.
    pub fn reserved(
        &mut self,
        _cookie: u64,
        _reply: Option<ReservationReply>,
        _actions: &mut Actions,
    ) {
    }

    /// Time goes on; to be called every half second, and before commands are handed over after a pause.
    pub fn tick(&mut self, _now: Instant, _actions: &mut Actions) {}

    /// A device's info or fate changed.
    pub fn device_changed(
        &mut self,
        lun: u16,
        info: DeviceInfo,
        _fate: Fate,
        _actions: &mut Actions,
    ) {
        if let Some(config) = self.config.luns.iter_mut().find(|it| it.lun == lun) {
            config.info = info;
        }
    }

    /// The reservations of a LUN's volume changed, maybe through another gateway.
    pub fn reservations_changed(
        &mut self,
        _lun: u16,
        _now: Arc<Reservations>,
        _actions: &mut Actions,
    ) {
    }
}
