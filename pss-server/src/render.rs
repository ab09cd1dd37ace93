//! Tables and numbers for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use pss_gateway::text::printable;

/// A table with headings; columns are padded to their widest cell.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

/// A column of a [`Table`].
pub struct Column {
    heading: &'static str,
    right: bool,
}

/// A column of words.
pub fn left(heading: &'static str) -> Column {
    Column {
        heading,
        right: false,
    }
}

/// A column of numbers.
pub fn right(heading: &'static str) -> Column {
    Column {
        heading,
        right: true,
    }
}

impl Table {
    /// An empty table.
    pub fn new(columns: impl IntoIterator<Item = Column>) -> Table {
        Table {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with as many cells as there are columns.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell)).collect();
        assert_eq!(cells.len(), self.columns.len(), "every column has a cell");
        self.rows.push(cells);
    }

    /// The table as lines, each with its line break.
    pub fn render(&self) -> String {
        let headings: Vec<String> = self
            .columns
            .iter()
            .map(|column| column.heading.to_owned())
            .collect();
        let lines = || std::iter::once(&headings).chain(&self.rows);
        let mut widths = vec![0; self.columns.len()];
        for line in lines() {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = String::new();
        for line in lines() {
            let mut text = String::new();
            for ((cell, width), column) in line.iter().zip(&widths).zip(&self.columns) {
                let cell = match column.right {
                    true => format!("{cell:>width$}  "),
                    false => format!("{cell:<width$}  "),
                };
                text.push_str(&cell);
            }
            out.push_str(text.trim_end());
            out.push('\n');
        }
        out
    }
}

/// A number with commas: `1,204`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A time for people, UTC: `2026-11-30 12:00:01Z`; `unknown` for 0.
pub fn time_text(unix_ms: u64) -> String {
    match time(unix_ms) {
        Some(time) => {
            let text = humantime::format_rfc3339_seconds(time).to_string();
            text.replace('T', " ")
        }
        None => "unknown".to_owned(),
    }
}

/// A time for programs, RFC 3339: `2026-11-30T12:00:01.250Z`; nothing for 0.
pub fn time_iso(unix_ms: u64) -> Option<String> {
    Some(humantime::format_rfc3339_millis(time(unix_ms)?).to_string())
}

/// The last year that can be written with four digits.
const YEAR_9999_MS: u64 = 253_402_300_799_999;

fn time(unix_ms: u64) -> Option<SystemTime> {
    let is_known = (1..=YEAR_9999_MS).contains(&unix_ms);
    is_known.then(|| UNIX_EPOCH + Duration::from_millis(unix_ms))
}

/// Bytes without rounding, in the largest unit that fits: `1536M`, `5000`.
pub fn exact(bytes: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    let fits = |(shift, _): &(u32, &str)| bytes > 0 && bytes.is_multiple_of(1 << shift);
    match units.into_iter().find(fits) {
        Some((shift, letter)) => format!("{}{letter}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A time span for people: `14 s`, `5 min`, `3 h`, `2 days`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(time_text(1_796_040_001_250), "2026-11-30 12:00:01Z");
        assert_eq!(
            time_iso(1_796_040_001_250).as_deref(),
            Some("2026-11-30T12:00:01.250Z")
        );
        assert_eq!(time_text(1), "1970-01-01 00:00:00Z");
        assert_eq!(time_text(YEAR_9999_MS), "9999-12-31 23:59:59Z");
        for unknown in [0, YEAR_9999_MS + 1, u64::MAX] {
            assert_eq!(time_text(unknown), "unknown");
            assert_eq!(time_iso(unknown), None);
        }
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new([left("NAME"), right("SIZE"), left("USE")]);
        table.row(["vol001".into(), "10G".into(), "".into()]);
        table.row(["ä\u{1b}".into(), "1023.9M".into(), "x".into()]);
        let expected = "NAME        SIZE  USE\nvol001       10G\nä\\u{1b}  1023.9M  x\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn times_and_exact_sizes() {
        for (bytes, text) in [
            (0, "0"),
            (512, "512"),
            (4096, "4K"),
            (1536 << 20, "1536M"),
            (3 << 40, "3072G"),
            (4097, "4097"),
        ] {
            assert_eq!(exact(bytes), text);
        }
    }

    #[test]
    fn numbers_and_spans() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1204, "1,204"),
            (1_000_000, "1,000,000"),
        ] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(span(14), "14 s");
        assert_eq!(span(300), "5 min");
        assert_eq!(span(7200), "2 h");
        assert_eq!(span(200_000), "2 days");
    }
}
