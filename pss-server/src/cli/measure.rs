//! What a disk can do, measured before it is formatted.

use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pss_core::disk::{AlignedBuf, Disk, OpenMode};

/// The file that is written to; removed afterwards.
pub(super) const FILE: &str = "measure.tmp";
const BLOCK: usize = 4096;
/// Size of the file, blocks: they are written one after the other, as the log does.
const BLOCKS: u64 = 256;
/// Measured until so many blocks are written, or for so long.
const WRITES_MAX: usize = 256;
const TIME_MAX: Duration = Duration::from_millis(500);
/// A write that is durable sooner was not: a controller with a battery takes longer to be told.
const HONEST: Duration = Duration::from_micros(5);
/// A disk that turns needs a good part of a turn.
const HONEST_TURNING: Duration = Duration::from_micros(500);
/// From here on every write of a client is felt.
const SLOW: Duration = Duration::from_millis(20);
/// `f_type` of file systems in memory (statfs(2)).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Times of durable writes of 4 KiB, one after the other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Measured {
    half: Duration,
    most: Duration,
    in_memory: bool,
    turns: bool,
}

/// Measures the disk of a directory.
///
/// # Errors
/// Of the file system.
pub(super) fn measure(disk: &dyn Disk, path: &Path) -> io::Result<Measured> {
    let measured = times(disk);
    disk.remove_file(FILE)?;
    disk.sync_dir("")?;
    let times = measured?;
    let at = |per_cent: usize| times[(times.len() - 1) * per_cent / 100];
    Ok(Measured {
        half: at(50),
        most: at(99),
        in_memory: is_in_memory(path),
        turns: turns(path),
    })
}

/// The times, in order.
fn times(disk: &dyn Disk) -> io::Result<Vec<Duration>> {
    let file = disk.open(FILE, OpenMode::Create)?;
    let zeros = vec![0; BLOCK * BLOCKS as usize];
    file.write_at(&[IoSlice::new(&zeros)], 0)?;
    file.sync()?;
    let file = disk.open(FILE, OpenMode::DirectSync)?;
    let mut block = AlignedBuf::zeroed(BLOCK);
    let mut times = Vec::with_capacity(WRITES_MAX);
    let start = Instant::now();
    while times.len() < WRITES_MAX && (times.is_empty() || start.elapsed() < TIME_MAX) {
        let number = times.len() as u64;
        block.as_mut_slice()[..8].copy_from_slice(&(number + 1).to_le_bytes());
        let before = Instant::now();
        file.write_at(
            &[IoSlice::new(block.as_slice())],
            number % BLOCKS * BLOCK as u64,
        )?;
        times.push(before.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

fn is_in_memory(path: &Path) -> bool {
    let found = rustix::fs::statfs(path);
    found.is_ok_and(|found| IN_MEMORY.contains(&found.f_type))
}

/// Whether the disk says that it turns.
fn turns(path: &Path) -> bool {
    let Ok(device) = fs::metadata(path).map(|it| it.dev()) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("/sys/dev/block/{major}:{minor}");
    // Of a partition the disk knows it.
    let queues = ["queue", "../queue"].map(|queue| format!("{device}/{queue}/rotational"));
    let text = queues
        .iter()
        .find_map(|queue| fs::read_to_string(queue).ok());
    text.is_some_and(|text| text.trim() == "1")
}

impl Measured {
    /// What it means, a sentence or more.
    pub(super) fn text(&self) -> String {
        let rate = 1.0 / self.half.as_secs_f64().max(1e-9);
        let mut text = format!(
            "A durable write of 4 KiB takes {} (99 of 100: at most {}), so about {} a second one after the other; writes \
             that come at once share one.",
            time(self.half),
            time(self.most),
            crate::render::grouped(rate as u64),
        );
        if self.in_memory {
            text += " Warning: the directory is in memory; a power cut takes everything.";
        } else if self.half < HONEST {
            text += " Warning: that is faster than a disk can be; its write cache seems to answer, and a power cut may take \
                     what was called durable. Turn the cache off, or use one with a battery.";
        } else if self.turns && self.half < HONEST_TURNING {
            // Those of virtual machines say so, whatever is behind them.
            text += " The disk says that it turns, and is faster than that: if it is no virtual one, its write cache answers, and \
                     a power cut may take what was called durable.";
        } else if self.half > SLOW {
            text += " Warning: that is slow, and clients will feel it in every write. A disk with protection against loss \
                     of power is much faster.";
        }
        text
    }
}

fn time(time: Duration) -> String {
    match time.as_micros() {
        micros @ 0..10_000 => format!("{micros} us"),
        micros => format!("{} ms", micros / 1000),
    }
}

#[cfg(test)]
mod tests {
    use pss_core::disk::files::FileDisk;

    use super::*;

    #[test]
    fn a_directory_is_measured_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path()).unwrap();
        let measured = measure(&disk, dir.path()).unwrap();
        assert!(measured.half > Duration::ZERO && measured.most >= measured.half);
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn what_it_says() {
        let measured = |micros, in_memory, turns| Measured {
            half: Duration::from_micros(micros),
            most: Duration::from_micros(micros * 4),
            in_memory,
            turns,
        };
        assert_eq!(
            measured(250, false, false).text(),
            "A durable write of 4 KiB takes 250 us (99 of 100: at most 1000 us), so about 4,000 a second one after the \
             other; writes that come at once share one."
        );
        for (measured, part) in [
            (measured(2, false, false), "write cache seems to answer"),
            (measured(250, false, true), "if it is no virtual one"),
            (measured(8000, false, true), "about 125 a second"),
            (measured(30_000, false, false), "takes 30 ms"),
            (measured(30_000, false, false), "that is slow"),
            (measured(250, true, false), "the directory is in memory"),
        ] {
            assert!(measured.text().contains(part), "{}", measured.text());
        }
    }
}
