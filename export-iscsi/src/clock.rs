//! The clock of the shell. Everything below takes time as a value.

use pss_core::time::Instant;

/// A monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: tokio::time::Instant,
}

impl Default for Clock {
    fn default() -> Clock {
        Clock {
            start: tokio::time::Instant::now(),
        }
    }
}

impl Clock {
    /// Now. Never zero, so that moments before the start can be told.
    pub fn now(&self) -> Instant {
        Instant(self.start.elapsed().as_nanos() as u64 + 1)
    }

    /// When a moment comes.
    pub fn at(&self, moment: Instant) -> tokio::time::Instant {
        self.start + std::time::Duration::from_nanos(moment.0)
    }
}
