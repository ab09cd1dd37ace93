//! Log lines that anyone on the network could cause.

use std::time::Duration;

use pss_core::time::Instant;

/// Lines of one kind are logged at most this often.
const PAUSE: Duration = Duration::from_secs(10);

/// Lets one line through now and then, and counts the others.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    quiet_until: Instant,
    suppressed: u64,
}

impl Throttle {
    /// Whether to log now; if so, how many lines were left out since the last one.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if now < self.quiet_until {
            self.suppressed += 1;
            return None;
        }
        self.quiet_until = now + PAUSE;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_pause() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.admit(Instant(5)), Some(0));
        assert_eq!(throttle.admit(Instant(6)), None);
        assert_eq!(throttle.admit(Instant(7)), None);
        assert_eq!(throttle.admit(Instant(5) + PAUSE), Some(2));
    }
}
