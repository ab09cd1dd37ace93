//! Log lines that anyone on the network could cause.

use std::time::Duration;

use crate::time::Instant;

/// Lines of one kind are counted over so long.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets some lines through in each period, and counts the others.
#[derive(Debug)]
pub struct Throttle {
    lines_max: u32,
    lines: u32,
    ends: Instant,
    suppressed: u64,
}

impl Default for Throttle {
    /// One line each 10 s.
    fn default() -> Throttle {
        Throttle::new(1)
    }
}

impl Throttle {
    /// So many lines each 10 s.
    pub fn new(lines_max: u32) -> Throttle {
        Throttle {
            lines_max,
            lines: 0,
            ends: Instant::default(),
            suppressed: 0,
        }
    }

    /// Whether to log now; if so, how many lines were left out since the last one.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if now >= self.ends {
            self.ends = now + PERIOD;
            self.lines = 0;
        }
        if self.lines >= self.lines_max {
            self.suppressed += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_period() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.admit(Instant(5)), Some(0));
        assert_eq!(throttle.admit(Instant(6)), None);
        assert_eq!(throttle.admit(Instant(7)), None);
        assert_eq!(throttle.admit(Instant(5) + PERIOD), Some(2));
    }

    #[test]
    fn some_lines_per_period() {
        let mut throttle = Throttle::new(2);
        let said: Vec<_> = (5..9).map(|at| throttle.admit(Instant(at))).collect();
        assert_eq!(said, [Some(0), Some(0), None, None]);
        let later = Instant(5) + PERIOD;
        assert_eq!(throttle.admit(later), Some(2));
        assert_eq!(throttle.admit(later), Some(0));
        assert_eq!(throttle.admit(later), None);
    }
}
