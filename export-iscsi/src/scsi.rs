//! SCSI: what the commands of an initiator mean for a volume (SAM-5, SPC-4, SBC-3).
//!
//! Without IO: a [`Target`] takes commands, task management functions and results of devices, and
//! appends what is to be done to [`Actions`], which the driver carries out in order. It knows nothing
//! of PDUs, sockets or clocks.

mod actions;
mod config;
mod target;

pub use actions::{
    Action, Actions, Command, NexusId, NexusInfo, Outcome, Status, TaskAttribute, TaskFunction,
    TaskResponse,
};
pub use config::{LUN_MAX, LunConfig, LunSettings, TargetConfig};
pub use target::Target;
