//! Test harness of PSS.

mod sim_storage;
pub mod binaries;
pub mod checker;
pub mod disk;
pub mod programs;
pub mod rng;
pub mod sim;
pub mod workload;
