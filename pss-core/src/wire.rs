//! Bytes on the network.

pub mod client;
