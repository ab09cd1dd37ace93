//! What the kernel knows of this process (proc(5)).

use rustix::process::{Resource, getrlimit};

/// Ticks of a second in `/proc`: `USER_HZ`, which is 100 on every machine that Linux runs on today.
const TICKS_PER_SECOND: u64 = 100;

/// State, time and memory of this process.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Usage {
    /// As `ps` shows it, such as `Sl`: the letter of the first thread, `l` if there are several.
    pub(crate) state: String,
    /// User and system time, milliseconds.
    pub(crate) cpu_ms: u64,
    /// Resident memory, bytes.
    pub(crate) memory_bytes: u64,
}

/// How this process is now; empty where `/proc` is not to be had.
pub(crate) fn usage() -> Usage {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    parse_stat(&stat, rustix::param::page_size() as u64).unwrap_or_default()
}

/// `/proc/PID/stat`: fields are counted from behind the name, which may hold anything.
fn parse_stat(stat: &str, page_bytes: u64) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Field 3 of the manual page is the first here.
    let field = |number: usize| fields.get(number - 3).copied();
    let number = |place: usize| field(place)?.parse::<u64>().ok();
    let threads = number(20)?;
    Some(Usage {
        state: format!("{}{}", field(3)?, if threads > 1 { "l" } else { "" }),
        cpu_ms: (number(14)? + number(15)?) * 1000 / TICKS_PER_SECOND,
        memory_bytes: number(24)? * page_bytes,
    })
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> u64 {
    let open = std::fs::read_dir("/proc/self/fd");
    // One of them is that of the directory.
    open.map_or(0, |open| open.count().saturating_sub(1) as u64)
}

/// How many it may have.
pub(crate) fn descriptors_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_is_skipped() {
        let stat = "9326 (a ) S (b) S 1 2 3 4 5 6 7 8 9 10 1400 60 0 0 20 0 9 0 77 1000 25 1";
        let usage = parse_stat(stat, 4096).unwrap();
        assert_eq!(usage.state, "Sl");
        assert_eq!(usage.cpu_ms, 14_600);
        assert_eq!(usage.memory_bytes, 25 * 4096);
        assert_eq!(parse_stat("", 4096), None);
        assert_eq!(parse_stat("1 (x) S 1", 4096), None);
    }

    #[test]
    fn this_process_is_found() {
        let usage = usage();
        assert!(usage.memory_bytes > 1 << 20, "{usage:?}");
        assert!(!usage.state.is_empty());
        assert!(descriptors() >= 3);
        assert!(descriptors_max() >= descriptors());
    }
}
