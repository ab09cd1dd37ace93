//! NBD server over any [`pss_core::volume::device::BlockDevice`].
//!
//! Pure, without IO: [`wire`] (bytes), [`handshake`] (negotiation), [`transmission`] (requests and
//! replies), [`sending`] (replies on their way), [`error`] (what failures become). On top: [`export`]
//! (which volumes are shown to whom), [`listen`] (sockets), [`server`] (the tokio shell). [`memory`]
//! is a volume in memory for tests.

mod connection;
pub mod error;
pub mod export;
pub mod handshake;
pub mod listen;
pub mod memory;
pub mod sending;
pub mod server;
pub mod transmission;
pub mod wire;
