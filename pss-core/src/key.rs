//! The cell key: the secret that the servers and clients of a cell share.
//!
//! A file with 64 hexadecimal digits that only its owner may read. From it comes also the cell's
//! identity, so that every server of a cell formats itself with the same one without asking another.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::servers::ServersFile;

/// Bytes of a cell key.
pub const KEY_BYTES: usize = 32;
/// Name of the key file beside server.conf.
pub const KEY_FILE_NAME: &str = "cell.key";
/// Where `pss key new` puts the key.
pub const KEY_FILE_DEFAULT: &str = "/etc/pss/cell.key";

/// The secret of a cell. Not shown by `Debug`.
#[derive(Clone, Eq, PartialEq)]
pub struct CellKey([u8; KEY_BYTES]);

impl fmt::Debug for CellKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CellKey(..)")
    }
}

/// What is wrong with a key file.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("{}: cannot read the cell key: {source}; make one with 'pss key new {}', or copy it from another server of the cell", file.display(), file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner may read or write it.
    #[error("{}: the cell key has mode {mode:04o}, so others may read it; run 'chmod 600 {}' (and make a new key if someone did)", file.display(), file.display())]
    Exposed {
        /// The file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It does not hold a key.
    #[error("{}: not a cell key: expected 64 hexadecimal digits; make a key with 'pss key new'", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
    },
    /// A new key would replace one.
    #[error("{}: exists already and is kept; a cell whose key is lost cannot be reached: remove the file first if that is what you want", file.display())]
    Exists {
        /// The file.
        file: PathBuf,
    },
    /// It cannot be written.
    #[error("{}: cannot write the cell key: {source}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The operating system gives no randomness.
    #[error("the operating system gives no random numbers: {0}")]
    NoRandomness(getrandom::Error),
}

impl CellKey {
    /// A key of known bytes.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> CellKey {
        CellKey(bytes)
    }

    /// A new random key.
    ///
    /// # Errors
    /// [`KeyError::NoRandomness`].
    pub fn generate() -> Result<CellKey, KeyError> {
        let mut bytes = [0; KEY_BYTES];
        getrandom::fill(&mut bytes).map_err(KeyError::NoRandomness)?;
        Ok(CellKey(bytes))
    }

    /// The secret itself.
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// [`KeyError`], also if anyone but the owner may read or write the file.
    pub fn read(file: &Path) -> Result<CellKey, KeyError> {
        let unreadable = |source| KeyError::Read {
            file: file.to_owned(),
            source,
        };
        let input = File::open(file).map_err(unreadable)?;
        let mode = input.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed {
                file: file.to_owned(),
                mode,
            });
        }
        let malformed = || KeyError::Malformed {
            file: file.to_owned(),
        };
        // Longer than any key, so that a wrong file is recognised without being read whole.
        let mut text = Vec::new();
        input.take(256).read_to_end(&mut text).map_err(unreadable)?;
        let text = std::str::from_utf8(&text).map_err(|_| malformed())?;
        decode_hex(text.trim()).map(CellKey).ok_or_else(malformed)
    }

    /// Writes the key to a new file that only its owner may read, and makes it durable. Missing
    /// directories are made.
    ///
    /// # Errors
    /// [`KeyError::Exists`], [`KeyError::Write`].
    pub fn write_new(&self, file: &Path) -> Result<(), KeyError> {
        let unwritable = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => KeyError::Exists {
                file: file.to_owned(),
            },
            _ => KeyError::Write {
                file: file.to_owned(),
                source,
            },
        };
        let dir = match file.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(unwritable)?;
        let mut output = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(file)
            .map_err(unwritable)?;
        let written = output
            .write_all(format!("{}\n", encode_hex(&self.0)).as_bytes())
            .and_then(|()| output.sync_all())
            .and_then(|()| File::open(dir)?.sync_all());
        written.map_err(|source| {
            // Half a key is worse than none: it would be taken for one and could not be replaced.
            let _ = std::fs::remove_file(file);
            unwritable(source)
        })
    }

    /// The key of a cell: from `given` if it is named, else from `cell.key` beside server.conf if
    /// there is one, else none.
    ///
    /// # Errors
    /// [`KeyError`] if the file is there, or named, and is no key.
    pub fn find(given: Option<&Path>, servers_file: &Path) -> Result<Option<CellKey>, KeyError> {
        if let Some(file) = given {
            return CellKey::read(file).map(Some);
        }
        let beside = servers_file.with_file_name(KEY_FILE_NAME);
        match CellKey::read(&beside) {
            Err(KeyError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            found => found.map(Some),
        }
    }
}

/// Identity of a cell.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CellId(pub [u8; 16]);

impl CellId {
    /// The identity that follows from the cell key, or, without one, from ids and hosts of
    /// server.conf.
    pub fn derive(key: Option<&CellKey>, servers: &ServersFile) -> CellId {
        let mut hash = Sha256::new();
        match key {
            Some(key) => {
                hash.update(b"pss cell id");
                hash.update(key.bytes());
            }
            None => {
                hash.update(b"pss cell id without key");
                for record in &servers.records {
                    hash.update([record.id.0]);
                    hash.update((record.host.len() as u64).to_le_bytes());
                    hash.update(record.host.as_bytes());
                }
            }
        }
        let digest: [u8; 32] = hash.finalize().into();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        CellId(id)
    }
}

impl fmt::Display for CellId {
    /// In the form of a UUID.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = encode_hex(&self.0);
        for (index, part) in [0..8, 8..12, 12..16, 16..20, 20..32]
            .into_iter()
            .enumerate()
        {
            if index > 0 {
                f.write_str("-")?;
            }
            f.write_str(&digits[part])?;
        }
        Ok(())
    }
}

/// The text is no UUID.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a cell id has 32 hexadecimal digits, such as 0cc1d6a2-54d2-4e64-b2a7-91f1e51ae6a6")]
pub struct BadCellId;

impl FromStr for CellId {
    type Err = BadCellId;

    fn from_str(text: &str) -> Result<CellId, BadCellId> {
        if text.len() > 64 {
            return Err(BadCellId);
        }
        decode_hex(&text.replace('-', ""))
            .map(CellId)
            .ok_or(BadCellId)
    }
}

fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_new_key_is_private_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/cell.key");
        let key = CellKey::generate().unwrap();
        key.write_new(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
        assert_eq!(std::fs::read(&file).unwrap().len(), 65);
        assert_eq!(CellKey::read(&file).unwrap(), key);
    }

    #[test]
    fn a_key_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cell.key");
        let first = CellKey::generate().unwrap();
        first.write_new(&file).unwrap();
        let again = CellKey::generate().unwrap().write_new(&file);
        assert!(matches!(again, Err(KeyError::Exists { .. })));
        assert_eq!(CellKey::read(&file).unwrap(), first);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cell.key");
        CellKey::generate().unwrap().write_new(&file).unwrap();
        for exposed in [0o640, 0o604, 0o620, 0o666] {
            set_mode(&file, exposed);
            let message = CellKey::read(&file).unwrap_err().to_string();
            assert!(message.contains("chmod 600"), "{message}");
        }
        set_mode(&file, 0o400);
        assert!(CellKey::read(&file).is_ok());
    }

    #[test]
    fn malformed_keys() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cell.key");
        let long = "0".repeat(1 << 20);
        for text in [
            "",
            "00",
            &"g".repeat(64),
            &"0".repeat(63),
            &"0".repeat(66),
            &long,
        ] {
            std::fs::write(&file, text).unwrap();
            set_mode(&file, 0o600);
            assert!(matches!(
                CellKey::read(&file),
                Err(KeyError::Malformed { .. })
            ));
        }
        std::fs::write(&file, format!(" {}\r\n", "aB".repeat(32))).unwrap();
        assert_eq!(CellKey::read(&file).unwrap().bytes(), &[0xab; 32]);
    }

    #[test]
    fn a_key_is_found_beside_server_conf() {
        let dir = tempfile::tempdir().unwrap();
        let servers = dir.path().join("server.conf");
        assert_eq!(CellKey::find(None, &servers).unwrap(), None);
        let beside = CellKey::generate().unwrap();
        beside.write_new(&dir.path().join("cell.key")).unwrap();
        assert_eq!(CellKey::find(None, &servers).unwrap(), Some(beside));
        let named = dir.path().join("other.key");
        assert!(CellKey::find(Some(&named), &servers).is_err());
        let other = CellKey::generate().unwrap();
        other.write_new(&named).unwrap();
        assert_eq!(CellKey::find(Some(&named), &servers).unwrap(), Some(other));
    }

    #[test]
    fn cell_ids() {
        let servers = |text: &str| ServersFile::parse(Path::new("s"), text.as_bytes()).unwrap();
        let three = servers("0 a /x\n1 b /x\n");
        let other_paths = servers("1 b /y\n0 a /y # comment\n");
        let other_hosts = servers("0 a /x\n1 c /x\n");
        let id = CellId::derive(None, &three);
        assert_eq!(id, CellId::derive(None, &other_paths));
        assert_ne!(id, CellId::derive(None, &other_hosts));
        let key = CellKey::from_bytes([7; 32]);
        let keyed = CellId::derive(Some(&key), &three);
        assert_eq!(keyed, CellId::derive(Some(&key), &other_hosts));
        assert_ne!(keyed, id);
        // Derived ids are on disks: they must never change. Checked with sha256sum.
        assert_eq!(keyed.to_string(), "74420612-2c98-e11e-2d42-ff868d075975");
        assert_eq!(keyed.to_string().parse(), Ok(keyed));
        assert_eq!("1".parse::<CellId>(), Err(BadCellId));
        assert_eq!("é".repeat(16).parse::<CellId>(), Err(BadCellId));
    }

    #[test]
    fn a_key_is_not_shown() {
        assert_eq!(format!("{:?}", CellKey::from_bytes([1; 32])), "CellKey(..)");
    }
}
