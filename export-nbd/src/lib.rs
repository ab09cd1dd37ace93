//! NBD server over any [`pss_core::volume::device::BlockDevice`].
//!
//! Pure, without IO: [`wire`] (bytes), [`handshake`] (negotiation), [`transmission`] (requests and
//! replies), [`error`] (what failures become). On top: [`export`] (which volumes are shown to whom),
//! [`server`] (the tokio shell). What other front ends need too is in `pss-gateway`.

pub mod args;
mod connection;
pub mod error;
pub mod export;
pub mod handshake;
pub mod server;
pub mod transmission;
pub mod wire;

pub use pss_gateway::{listen, memory};
