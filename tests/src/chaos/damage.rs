//! Files of a stopped server are changed.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::load::{BLOCK, BLOCKS, offset};
use crate::processes::Cell;
use crate::rng::Rng;

use super::{CHUNK_BYTES, SERVERS};

/// Bytes of a table: docs/formats.md, section 3.
const TABLE_BYTES: u64 = 4096;
const _: () = assert!(64 + 4 * CHUNK_BYTES / BLOCK as usize <= TABLE_BYTES as usize);
/// First bytes of a record of the log: docs/formats.md, section 2.
const RECORD: &[u8; 8] = b"PSSLREC1";
/// Damage is to be where recovery will look.
const NEWEST_SEGMENTS: usize = 3;

/// What is damaged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Damage {
    /// A bit of up to three blocks.
    Blocks,
    /// A bit of one or both tables of a chunk.
    Table,
    /// A bit of a record of the log.
    Log,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Damage::Blocks => "blocks",
            Damage::Table => "table",
            Damage::Log => "log record",
        })
    }
}

impl Damage {
    pub(super) const ALL: [Damage; 3] = [Damage::Blocks, Damage::Table, Damage::Log];

    /// Changes files of a server that does not run; tells which.
    ///
    /// What was not read since stays damaged, so a chunk is damaged on two servers only, for good.
    pub(super) fn inflict(self, cell: &Cell, id: u8, rng: &mut Rng) -> String {
        let places = match self {
            Damage::Log => log(cell, id, rng).into_iter().collect(),
            Damage::Blocks => {
                let count = rng.between(1, 3);
                let blocks = (0..count).map(|_| block_of(id, rng));
                let blocks: Vec<u64> = blocks.collect();
                let flips = blocks.into_iter().filter_map(|block| {
                    let (path, at) = place(cell, id, block);
                    flip(&path, at + rng.below(BLOCK), rng)
                });
                flips.collect()
            }
            Damage::Table => {
                let block = block_of(id, rng);
                let (path, _) = place(cell, id, block);
                let slots: &[u64] = match rng.below(4) {
                    0 => &[0, 1],
                    1 => &[0],
                    _ => &[1],
                };
                let flips = slots.iter().filter_map(|slot| {
                    let at = CHUNK_BYTES as u64 + slot * TABLE_BYTES + rng.below(600);
                    flip(&path, at, rng)
                });
                flips.collect::<Vec<_>>()
            }
        };
        match &places[..] {
            [] => "there was nothing to damage".to_owned(),
            places => format!("damaged {}", places.join(", ")),
        }
    }
}

/// A block of the load in a chunk that may be damaged on this server.
fn block_of(id: u8, rng: &mut Rng) -> u64 {
    loop {
        let block = rng.below(BLOCKS);
        let chunk = offset(block) / CHUNK_BYTES as u64;
        let first = chunk % u64::from(SERVERS);
        if [first, (first + 1) % u64::from(SERVERS)].contains(&u64::from(id)) {
            return block;
        }
    }
}

/// Where a server has a block.
fn place(cell: &Cell, id: u8, block: u64) -> (PathBuf, u64) {
    let at = offset(block);
    let chunk = at / CHUNK_BYTES as u64;
    let name = format!("00/{:02x}/{:02x}", chunk >> 8, chunk & 255);
    (cell.chunks(id, "v").join(name), at % CHUNK_BYTES as u64)
}

/// Changes a bit, if the file is that long.
fn flip(path: &Path, at: u64, rng: &mut Rng) -> Option<String> {
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).ok()?;
    byte[0] ^= 1 << rng.below(8);
    file.write_all_at(&byte, at).ok()?;
    Some(format!("{} at {at}", path.display()))
}

/// Changes a bit of the head or of the payload of a record in one of the newest segments.
fn log(cell: &Cell, id: u8, rng: &mut Rng) -> Option<String> {
    let entries = fs::read_dir(cell.path(id).join("log")).ok()?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let segment = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.len() == 16)
    };
    let mut segments: Vec<PathBuf> = paths.filter(segment).collect();
    segments.sort();
    let newest = segments.len().saturating_sub(NEWEST_SEGMENTS);
    let segments = &segments[newest..];
    let mut records = Vec::new();
    for path in segments {
        let bytes = fs::read(path).ok()?;
        let starts = (0..bytes.len()).step_by(BLOCK as usize);
        let starts = starts.filter(|at| bytes[*at..].starts_with(RECORD));
        records.extend(starts.map(|at| (path, at as u64, payload_at(&bytes[at..]))));
    }
    if records.is_empty() {
        return None;
    }
    let (path, at, payload) = *rng.pick(&records);
    let at = match payload.filter(|_| rng.chance(500)) {
        Some(payload) => payload + rng.below(BLOCK),
        None => at + 12 + rng.below(84),
    };
    flip(path, at, rng)
}

/// Where the payload of a record is, if it has one.
fn payload_at(record: &[u8]) -> Option<u64> {
    let field = |at: usize| {
        let bytes = record.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    field(72).filter(|length| *length > 0)?;
    field(64)
}
