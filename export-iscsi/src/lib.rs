//! iSCSI target over any [`pss_core::volume::device::BlockDevice`].
//!
//! Pure, without IO: [`scsi`] (SAM-5, SPC-4 and SBC-3: what a command means).

pub mod scsi;
