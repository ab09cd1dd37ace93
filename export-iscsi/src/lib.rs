//! iSCSI target over any [`pss_core::volume::device::BlockDevice`].

pub mod auth;
pub mod catalog;
pub mod connection;
pub mod keys;
pub mod login;
pub mod pdu;
pub mod scsi;
pub mod session;
