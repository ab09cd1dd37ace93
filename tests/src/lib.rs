//! Test harness of PSS.

pub mod binaries;
pub mod programs;
