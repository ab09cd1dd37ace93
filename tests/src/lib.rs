//! Test harness of PSS.

pub mod checker;
