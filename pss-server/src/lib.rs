//! Server and command line of PSS.
//!
//! [`node`] is the server, started from a [`config::ServerConfig`]; [`cli`] holds the verbs of `pss` and
//! `pssd`, whose binaries only call it; [`up`] runs a whole cell in one process.

pub mod cli;
mod clients;
mod clock;
pub mod config;
pub mod node;
mod peers;
mod process;
pub mod render;
mod storage;
mod testing;
pub mod up;
