//! Test harness of PSS.

pub mod binaries;
pub mod checker;
pub mod programs;
