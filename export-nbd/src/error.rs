//! The error values of NBD, and which of them a failure of a device becomes.

use pss_core::volume::device::DeviceError;

/// The error values that may appear in a reply; no others exist ("Error values").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum NbdError {
    /// Operation not permitted: a change of a read-only export.
    NotPermitted = 1,
    /// Input/output error.
    Io = 5,
    /// Invalid argument.
    Invalid = 22,
    /// No space left: also a write past the end.
    NoSpace = 28,
    /// Not supported: only as answer to FAST_ZERO.
    NotSupported = 95,
    /// The export is gone.
    Shutdown = 108,
}

/// What a failed request is answered with; `writes` says whether it would have put data there, because
/// a range past the end is ENOSPC for those and EINVAL for the others.
pub fn device_error(error: DeviceError, writes: bool) -> NbdError {
    match error {
        DeviceError::OutOfRange if writes => NbdError::NoSpace,
        DeviceError::OutOfRange => NbdError::Invalid,
        DeviceError::Invalid => NbdError::Invalid,
        DeviceError::ReadOnly | DeviceError::Reserved => NbdError::NotPermitted,
        DeviceError::NoSpace => NbdError::NoSpace,
        // A deleted volume does not come back: the client is told to stop asking. The other losses of
        // service are never ESHUTDOWN, because clients fail their users at once on it.
        DeviceError::Deleted => NbdError::Shutdown,
        DeviceError::Miscompare(_)
        | DeviceError::Fenced
        | DeviceError::Unavailable
        | DeviceError::ReservationChanged
        | DeviceError::Io => NbdError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_end_depends_on_the_direction() {
        // proto.md, "Error values": ENOSPC for writes beyond the size, EINVAL for reads.
        assert_eq!(device_error(DeviceError::OutOfRange, true) as u32, 28);
        assert_eq!(device_error(DeviceError::OutOfRange, false) as u32, 22);
    }

    #[test]
    fn only_a_deleted_volume_says_shutdown() {
        for error in [
            DeviceError::Fenced,
            DeviceError::Unavailable,
            DeviceError::Io,
            DeviceError::Miscompare(0),
        ] {
            assert_eq!(device_error(error, true) as u32, 5);
        }
        assert_eq!(device_error(DeviceError::Deleted, false) as u32, 108);
        assert_eq!(device_error(DeviceError::ReadOnly, true) as u32, 1);
        assert_eq!(device_error(DeviceError::NoSpace, true) as u32, 28);
    }
}
