//! A small record in two copies. A write replaces both, one after the other, so that a crash harms at
//! most the one being written, and damage to one later does not bring an old record back.

use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::{Buf, BufMut};

use crate::disk::{Disk, OpenMode};

const VERSION: u16 = 1;
const HEADER_BYTES: usize = 32;
/// A longer record is taken for damage.
const RECORD_BYTES_MAX: u64 = 1 << 30;

/// Why a record cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// There is none.
    #[error("{name} does not exist: the data directory is not formatted")]
    Missing {
        /// Which.
        name: &'static str,
    },
    /// Both copies are damaged.
    #[error("both copies of {name} are damaged")]
    Damaged {
        /// Which.
        name: &'static str,
    },
    /// It was written by a newer program.
    #[error("{name} has format version {found}, this program knows version 1")]
    Version {
        /// Which.
        name: &'static str,
        /// Its version.
        found: u16,
    },
    /// It is whole, and says what this version does not know.
    #[error("{name} holds a {what}: it was written by a newer version; start that one")]
    Newer {
        /// Which.
        name: &'static str,
        /// What.
        what: String,
    },
    /// The disk failed.
    #[error("{name}: {action} failed")]
    Io {
        /// Which.
        name: &'static str,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The two copies, `NAME.0` and `NAME.1`.
///
/// | at | bytes | field                                 |
/// |----|-------|---------------------------------------|
/// | 0  | 8     | magic                                 |
/// | 8  | 4     | CRC32C of bytes 12..32 + body         |
/// | 12 | 2     | format version                        |
/// | 14 | 2     | zero                                  |
/// | 16 | 8     | generation: the higher is the newer   |
/// | 24 | 8     | bytes of the body                     |
/// | 32 |       | body; what follows it has no meaning  |
pub(super) struct Pair {
    disk: Arc<dyn Disk>,
    name: &'static str,
    magic: &'static [u8; 8],
    generation: u64,
    /// The copy that is written last: while the other is written, it is the valid one.
    newest: usize,
    poisoned: bool,
}

enum Copy {
    Missing,
    Damaged,
    Version(u16),
    Valid { generation: u64, body: Vec<u8> },
}

impl Pair {
    /// A pair that is written for the first time.
    pub(super) fn create(disk: Arc<dyn Disk>, name: &'static str, magic: &'static [u8; 8]) -> Pair {
        Pair {
            disk,
            name,
            magic,
            generation: 0,
            newest: 1,
            poisoned: false,
        }
    }

    /// Reads the newest record; heals a copy that is damaged or old.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        name: &'static str,
        magic: &'static [u8; 8],
    ) -> Result<(Pair, Vec<u8>), PairError> {
        let mut pair = Pair::create(disk, name, magic);
        let copies = [pair.read(0)?, pair.read(1)?];
        let (newest, body, generations) = match copies {
            [Copy::Version(found), _] | [_, Copy::Version(found)] => {
                return Err(PairError::Version { name, found });
            }
            [
                Copy::Valid { generation, body },
                Copy::Valid {
                    generation: other,
                    body: other_body,
                },
            ] => match generation > other {
                true => (0, body, (generation, other)),
                false => (1, other_body, (other, generation)),
            },
            [Copy::Valid { generation, body }, _] => (0, body, (generation, 0)),
            [_, Copy::Valid { generation, body }] => (1, body, (generation, 0)),
            [Copy::Missing, Copy::Missing] => return Err(PairError::Missing { name }),
            _ => return Err(PairError::Damaged { name }),
        };
        pair.newest = newest;
        pair.generation = generations.0;
        if generations.0 != generations.1 {
            pair.store(&body)?;
        }
        Ok((pair, body))
    }

    /// Replaces the record; durable when it returns.
    pub(super) fn store(&mut self, body: &[u8]) -> Result<(), PairError> {
        if self.poisoned {
            return Err(self.error("write", io::Error::other("a write has failed before")));
        }
        self.poisoned = true;
        self.generation += 1;
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        out.put_slice(self.magic);
        out.put_u32_le(0);
        out.put_u16_le(VERSION);
        out.put_u16_le(0);
        out.put_u64_le(self.generation);
        out.put_u64_le(body.len() as u64);
        out.put_slice(body);
        let crc = crc32c::crc32c(&out[12..]);
        out[8..12].copy_from_slice(&crc.to_le_bytes());
        for copy in [1 - self.newest, self.newest] {
            self.write(copy, &out)
                .map_err(|source| self.error("write", source))?;
        }
        self.poisoned = false;
        Ok(())
    }

    fn write(&self, copy: usize, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(copy);
        let file = self.disk.open(&path, OpenMode::Create)?;
        let is_new = file.is_empty()?;
        file.write_at(&[IoSlice::new(bytes)], 0)?;
        file.sync()?;
        if is_new {
            self.disk.sync_dir("")?;
        }
        Ok(())
    }

    fn read(&self, copy: usize) -> Result<Copy, PairError> {
        let file = match self.disk.open(&self.path(copy), OpenMode::Existing) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Copy::Missing),
            file => file.map_err(|source| self.error("open", source))?,
        };
        let read = || {
            // What an earlier process wrote and did not sync must not be lost once it was seen.
            file.sync()?;
            let mut bytes = vec![0; file.len()?.min(RECORD_BYTES_MAX) as usize];
            let length = file.read_at(&mut bytes, 0)?;
            bytes.truncate(length);
            Ok(bytes)
        };
        let bytes = read().map_err(|source| self.error("read", source))?;
        Ok(self.decode(&bytes).unwrap_or(Copy::Damaged))
    }

    fn decode(&self, bytes: &[u8]) -> Option<Copy> {
        let mut input = bytes.get(..HEADER_BYTES)?;
        if input.copy_to_bytes(8) != self.magic[..] {
            return None;
        }
        let crc = input.get_u32_le();
        let version = input.get_u16_le();
        input.advance(2);
        let generation = input.get_u64_le();
        let length = usize::try_from(input.get_u64_le()).ok()?;
        let end = HEADER_BYTES.checked_add(length)?;
        if crc != crc32c::crc32c(bytes.get(12..end)?) {
            return None;
        }
        if version != VERSION {
            return Some(Copy::Version(version));
        }
        let body = bytes[HEADER_BYTES..end].to_vec();
        Some(Copy::Valid { generation, body })
    }

    fn path(&self, copy: usize) -> String {
        format!("{}.{copy}", self.name)
    }

    pub(super) fn error(&self, action: &'static str, source: io::Error) -> PairError {
        PairError::Io {
            name: self.name,
            action,
            source,
        }
    }

    /// The record holds what only a newer program can have written.
    pub(super) fn newer(&self, what: String) -> PairError {
        PairError::Newer {
            name: self.name,
            what,
        }
    }

    /// The record makes no sense though its checksum fits.
    pub(super) fn damaged(&self) -> PairError {
        PairError::Damaged { name: self.name }
    }
}
