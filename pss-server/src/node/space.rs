//! Says in time that the disk is getting full.

use std::path::Path;

use pss_core::size::Size;

/// Warned is when less than this part of the file system is left for volumes, in hundredths, and again at each further step.
const STEPS_PERCENT: [u64; 4] = [10, 5, 2, 1];
/// With more than this left nobody is warned, however large the file system is.
const PLENTY_BYTES: u64 = 100 << 30;

/// How full a disk is.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
enum Level {
    #[default]
    Enough,
    /// So many of the steps are passed.
    NearlyFull(usize),
    Full,
}

impl Level {
    fn of(left_bytes: u64, total_bytes: u64) -> Level {
        let hundredths = u128::from(left_bytes) * 100;
        let is_passed =
            |percent: &&u64| hundredths < u128::from(total_bytes) * u128::from(**percent);
        let passed = STEPS_PERCENT.iter().filter(is_passed).count();
        match left_bytes {
            0 => Level::Full,
            PLENTY_BYTES.. => Level::Enough,
            _ if passed == 0 => Level::Enough,
            _ => Level::NearlyFull(passed),
        }
    }
}

/// Whether so little is left for volumes that somebody should know.
pub(crate) fn is_nearly_full(left_bytes: u64, total_bytes: u64) -> bool {
    Level::of(left_bytes, total_bytes) > Level::Enough
}

/// Logs each step once, and when there is space again.
#[derive(Default)]
pub(super) struct SpaceWatch {
    logged: Level,
}

impl SpaceWatch {
    /// Looks at what is left for volumes.
    pub(super) fn note(&mut self, left_bytes: u64, total_bytes: u64, path: &Path) {
        let level = Level::of(left_bytes, total_bytes);
        // What is freed and written again to and fro around a step is told once.
        let recovered = Level::of(left_bytes / 6 * 5, total_bytes) < self.logged;
        if level > self.logged {
            let path = path.display();
            let (left, total) = (Size(left_bytes), Size(total_bytes));
            match level {
                Level::Full => tracing::error!(
                    "nothing is left for volumes on {path}: writes are refused when that is so on a majority of the servers; \
                     free some space, or trim or delete volumes"
                ),
                _ => tracing::warn!(
                    "the disk is nearly full: {left} of {total} are left for volumes on {path}; writes are refused when a \
                     majority of the servers has nothing left"
                ),
            }
            self.logged = level;
        } else if level < self.logged && recovered {
            if level == Level::Enough {
                tracing::info!("{} are left for volumes again", Size(left_bytes));
            }
            self.logged = level;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn levels() {
        let of = |left| Level::of(left, 100 * GIB);
        assert_eq!(of(100 * GIB), Level::Enough);
        assert_eq!(of(10 * GIB), Level::Enough);
        assert_eq!(of(10 * GIB - 1), Level::NearlyFull(1));
        assert_eq!(of(3 * GIB), Level::NearlyFull(2));
        assert_eq!(of(1), Level::NearlyFull(4));
        assert_eq!(of(0), Level::Full);
        // A large disk.
        assert_eq!(Level::of(200 * GIB, 10_000 * GIB), Level::Enough);
        assert_eq!(Level::of(99 * GIB, 10_000 * GIB), Level::NearlyFull(4));
        assert!(!is_nearly_full(10 * GIB, 100 * GIB) && is_nearly_full(0, 100 * GIB));
    }

    #[test]
    fn a_step_is_told_once() {
        let mut watch = SpaceWatch::default();
        let mut note = |left: u64| {
            watch.note(left, 100 * GIB, Path::new("/pss"));
            watch.logged
        };
        assert_eq!(note(9 * GIB), Level::NearlyFull(1));
        assert_eq!(note(11 * GIB), Level::NearlyFull(1), "to and fro");
        assert_eq!(note(0), Level::Full);
        assert_eq!(note(3 * GIB), Level::NearlyFull(2));
        assert_eq!(note(13 * GIB), Level::Enough);
    }
}
