//! Bytes on the network: framing, who is at the other end, messages of servers and of clients.
//!
//! No IO: TCP bytes go through [`frame::FrameReader`] and [`frame::SendQueue`], datagrams through
//! [`peer::Datagrams`], whatever sockets the caller has. `docs/wire.md` has every layout.

pub mod auth;
pub mod client;
pub(crate) mod codec;
pub mod events;
pub mod frame;
pub mod inspect;
pub mod peer;
pub mod survey;

pub use codec::DecodeError;
