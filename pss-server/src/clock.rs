//! The clock that the engine lives by.

use std::time::{SystemTime, UNIX_EPOCH};

use pss_core::time::Instant;

/// Now, on a monotonic clock that goes on while the machine is suspended.
///
/// A lease must not outlive a suspend unnoticed, so this is `CLOCK_BOOTTIME` and not what
/// [`std::time::Instant`] uses.
#[expect(unsafe_code, reason = "std has no clock that counts suspend")]
pub(crate) fn now() -> Instant {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one `timespec`, which lives through the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "every Linux that PSS runs on has CLOCK_BOOTTIME");
    Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// The time of day, in milliseconds since the beginning of 1970; for people, so nothing may rest on it.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_back() {
        let mut last = now();
        for _ in 0..1000 {
            let next = now();
            assert!(next >= last);
            last = next;
        }
        assert!(last.0 > 0);
    }
}
