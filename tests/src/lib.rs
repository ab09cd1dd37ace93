//! Test harness of PSS.

pub mod disk;
