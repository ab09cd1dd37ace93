//! Log lines that anyone on the network could cause.

use std::sync::{Mutex, PoisonError};

pub use pss_core::throttle::Throttle;
use pss_core::time::Instant;

/// A [`Throttle`] that has a clock of its own and is shared by tasks.
#[derive(Debug)]
pub struct SharedThrottle {
    started: std::time::Instant,
    inner: Mutex<Throttle>,
}

impl SharedThrottle {
    /// So many lines each 10 s.
    pub fn new(lines_max: u32) -> SharedThrottle {
        SharedThrottle {
            started: std::time::Instant::now(),
            inner: Mutex::new(Throttle::new(lines_max)),
        }
    }

    /// As [`Throttle::admit`].
    pub fn admit(&self) -> Option<u64> {
        let now = Instant::default() + self.started.elapsed();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.admit(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_a_clock() {
        let shared = SharedThrottle::new(1);
        assert_eq!((shared.admit(), shared.admit()), (Some(0), None));
    }
}
