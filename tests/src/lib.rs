//! Test harness of PSS.

pub mod binaries;
pub mod chaos;
pub mod checker;
pub mod disk;
pub mod fuse;
pub mod guest;
pub mod iscsi;
pub mod iscsi_client;
pub mod load;
pub mod nbd_client;
pub mod netns;
pub mod package;
pub mod processes;
pub mod programs;
pub mod proxy;
pub mod recorder;
pub mod rng;
pub mod sim;
mod sim_storage;
pub mod timeline;
pub mod workload;
