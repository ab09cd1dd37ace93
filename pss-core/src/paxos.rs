//! The agreement core.

pub mod message;
pub mod output;
