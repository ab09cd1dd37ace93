//! SCSI: what the commands of an initiator mean for a volume (SAM-5, SPC-4, SBC-3).
//!
//! Without IO: a [`Target`] takes commands, task management functions and results of devices, and
//! appends what is to be done to [`Actions`], which the driver carries out in order. It knows nothing
//! of PDUs, sockets or clocks.
//!
//! A command is looked up in `cdb`, checked in `target/begin.rs` (unit attention, reservation, state of
//! the unit), and carried out by the file of its family, at once or as a `job` that asks the device.

mod actions;
mod block;
mod cdb;
mod config;
mod copy;
mod inquiry;
mod job;
mod mode;
mod provision;
mod report;
mod reserve;
mod sanitize;
mod sense;
mod target;
mod taskset;
mod unit;

pub use actions::{
    Action, Actions, Command, NexusId, NexusInfo, Outcome, Status, TaskAttribute, TaskFunction,
    TaskResponse,
};
pub use config::{COMMAND_TIMEOUT, LUN_MAX, LunConfig, LunSettings, TargetConfig};
pub(crate) use inquiry::{hex, naa};
pub use report::{decode_lun, encode_lun};
pub use target::Target;
