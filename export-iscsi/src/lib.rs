//! iSCSI target over any [`pss_core::volume::device::BlockDevice`].

pub mod pdu;
pub mod scsi;
