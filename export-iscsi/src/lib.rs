//! iSCSI target over any [`pss_core::volume::device::BlockDevice`].
//!
//! Pure, without IO: [`pdu`] (bytes), [`keys`] (text negotiation), [`auth`] (CHAP), [`login`],
//! [`session`] and [`connection`] (RFC 7143's full feature phase), [`scsi`] (SAM-5, SPC-4 and SBC-3: what
//! a command means), [`catalog`] (what is exported to whom), [`config`]
//! (files that say so). On top: [`host`] (one target with its disks),
//! [`sessions`], [`server`] (the tokio shell), [`control`] (how it is seen and steered while
//! it runs), and [`tgt`] (that in tgt's words).

pub mod args;
pub mod auth;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod connection;
pub mod control;
pub mod host;
pub mod keys;
mod link;
pub mod login;
pub mod pdu;
pub mod scsi;
pub mod server;
pub mod session;
pub mod sessions;
pub mod tgt;
