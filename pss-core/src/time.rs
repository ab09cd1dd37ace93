//! Time as a plain value: the core never reads a clock.

use std::ops::{Add, AddAssign, Sub};
use std::time::Duration;

/// A moment on one server's own clock, in nanoseconds since an arbitrary start.
///
/// The clock must be monotonic and count suspend (`CLOCK_BOOTTIME`); moments of two servers are never
/// compared.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Instant(pub u64);

impl Instant {
    /// Time since `earlier`; zero if that is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The moment that lies `by` before this one, or the clock's start.
    #[must_use]
    pub fn minus(self, by: Duration) -> Instant {
        Instant(self.0.saturating_sub(by.as_nanos() as u64))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, by: Duration) -> Instant {
        Instant(self.0.saturating_add(by.as_nanos() as u64))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, by: Duration) {
        *self = *self + by;
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.since(earlier)
    }
}
