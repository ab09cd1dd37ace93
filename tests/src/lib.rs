//! Test harness of PSS.

pub mod binaries;
