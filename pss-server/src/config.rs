//! From server.conf and flags to a [`ServerConfig`] that cannot be wrong, before any port is opened.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pss_core::key::{CellId, CellKey, KeyError};
use pss_core::servers::{Servers, ServersError, ServersFile};
use pss_core::types::ServerId;

/// Everything that a server needs to know at its start.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Which server it is.
    pub id: ServerId,
    /// The servers of the cell, itself among them.
    pub servers: Servers,
    /// Its data directory.
    pub path: PathBuf,
    /// The cell key. Without one all addresses are loopback.
    pub key: Option<CellKey>,
    /// The cell that the data directory must belong to.
    pub cell: CellId,
    /// Sizes and times.
    pub tuning: Tuning,
    /// Whose chunks are copied first if this server lacks many; none: whoever has least to do.
    pub source: Option<ServerId>,
    /// Whether its data are to be the truth: it takes nothing from others until it has given them up.
    pub is_truth: bool,
}

/// Sizes and times that are rarely changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tuning {
    /// Size of a log segment.
    pub segment_bytes: u64,
    /// So much new log brings the next checkpoint about.
    pub checkpoint_bytes: u64,
    /// Longest time between checkpoints while there is something to do.
    pub checkpoint_interval: Duration,
    /// Log that is kept behind the checkpoint for servers that were down.
    pub log_retain_bytes: u64,
    /// How long a leader may serve reads after a majority granted it, and how long the others wait
    /// before they elect another.
    pub lease: Duration,
    /// Everything is verified once in this time, in the background; none: never.
    pub scrub_period: Option<Duration>,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            segment_bytes: 128 << 20,
            checkpoint_bytes: 512 << 20,
            checkpoint_interval: Duration::from_secs(30),
            log_retain_bytes: 1 << 30,
            lease: Duration::from_millis(500),
            scrub_period: Some(Duration::from_secs(14 * 24 * 3600)),
        }
    }
}

const SEGMENT_BYTES_MIN: u64 = 8 << 20;
const SEGMENT_BYTES_MAX: u64 = 4 << 30;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// server.conf is wrong.
    #[error(transparent)]
    Servers(#[from] ServersError),
    /// The key file is wrong.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An address that others can reach, and no key.
    #[error("{}:{line}: server {id} has the address {address}, which other machines can reach, but the cell has no key; make one with 'pss key new {}', copy it to every server and gateway, and start again", file.display(), key_file.display())]
    NoKey {
        /// server.conf.
        file: PathBuf,
        /// Of the record.
        line: usize,
        /// Of the record.
        id: ServerId,
        /// Of the record.
        address: IpAddr,
        /// Where the key would be found.
        key_file: PathBuf,
    },
    /// A size is out of bounds.
    #[error("--segment-size {0} is out of bounds: use a multiple of 4096 from 8M to 4G")]
    SegmentSize(u64),
    /// A size is out of bounds.
    #[error("--checkpoint-size {checkpoint} is smaller than a log segment ({segment} bytes)")]
    CheckpointSize {
        /// Given.
        checkpoint: u64,
        /// Given or default.
        segment: u64,
    },
}

/// A cell as the files describe it.
#[derive(Clone, Debug)]
pub struct CellFiles {
    /// server.conf.
    pub file: ServersFile,
    /// Its servers with their addresses.
    pub servers: Servers,
    /// The key.
    pub key: Option<CellKey>,
}

impl CellFiles {
    /// Reads server.conf and the key (see [`CellKey::find`]) and looks up the addresses.
    ///
    /// # Errors
    /// [`ConfigError`], also if there is no key although an address is not loopback.
    pub fn read(servers: &Path, key: Option<&Path>) -> Result<CellFiles, ConfigError> {
        let file = ServersFile::read(servers)?;
        let key = CellKey::find(key, servers)?;
        let servers = file.resolve()?;
        let cell = CellFiles { file, servers, key };
        cell.check_key()?;
        Ok(cell)
    }

    fn check_key(&self) -> Result<(), ConfigError> {
        if self.key.is_some() {
            return Ok(());
        }
        let open = self.file.records.iter().find_map(|record| {
            let address = self.servers.address(record.id)?;
            (!address.is_loopback()).then_some((record, address))
        });
        match open {
            None => Ok(()),
            Some((record, address)) => Err(ConfigError::NoKey {
                file: self.file.file.clone(),
                line: record.line,
                id: record.id,
                address,
                key_file: self.file.file.with_file_name(pss_core::key::KEY_FILE_NAME),
            }),
        }
    }

    /// The identity of the cell, unless the operator gives another.
    pub fn cell_id(&self, given: Option<CellId>) -> CellId {
        given.unwrap_or_else(|| CellId::derive(self.key.as_ref(), &self.file))
    }

    /// The configuration of one server of the cell; `path` replaces the data directory of server.conf.
    ///
    /// # Errors
    /// [`ConfigError`] if the server is not listed or a size makes no sense.
    pub fn server(
        &self,
        id: u8,
        path: Option<PathBuf>,
        cell: Option<CellId>,
        tuning: Tuning,
    ) -> Result<ServerConfig, ConfigError> {
        let record = self.file.record(id)?;
        tuning.check()?;
        Ok(ServerConfig {
            id: record.id,
            servers: self.servers.clone(),
            path: path.unwrap_or_else(|| record.path.clone()),
            key: self.key.clone(),
            cell: self.cell_id(cell),
            tuning,
            source: None,
            is_truth: false,
        })
    }
}

impl Tuning {
    fn check(&self) -> Result<(), ConfigError> {
        let segment = self.segment_bytes;
        let fits = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment);
        if !fits || !segment.is_multiple_of(4096) {
            return Err(ConfigError::SegmentSize(segment));
        }
        if self.checkpoint_bytes < segment {
            return Err(ConfigError::CheckpointSize {
                checkpoint: self.checkpoint_bytes,
                segment,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(servers: &str, key: bool) -> Result<CellFiles, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.conf");
        std::fs::write(&file, servers).unwrap();
        if key {
            let key = CellKey::from_bytes([3; 32]);
            key.write_new(&dir.path().join("cell.key")).unwrap();
        }
        CellFiles::read(&file, None)
    }

    #[test]
    fn without_a_key_only_loopback() {
        assert!(cell("0 127.0.0.1 /a\n1 127.1.2.3 /b\n2 ::1 /c", false).is_ok());
        let open = "0 127.0.0.1 /a\n\n1 192.0.2.1 /b";
        let message = cell(open, false).unwrap_err().to_string();
        assert!(message.contains("server.conf:3: server 1"), "{message}");
        assert!(message.contains("pss key new"), "{message}");
        assert!(cell(open, true).is_ok());
    }

    #[test]
    fn path_and_cell_can_be_given() {
        let cell = cell("0 127.0.0.1 /a\n1 127.0.0.1 /a", true).unwrap();
        let plain = cell.server(1, None, None, Tuning::default()).unwrap();
        assert_eq!(plain.path, Path::new("/a"));
        assert_eq!(plain.cell, cell.cell_id(None));
        let given = CellId([9; 16]);
        let config = cell
            .server(1, Some("/b".into()), Some(given), Tuning::default())
            .unwrap();
        assert_eq!(
            (config.path.as_path(), config.cell),
            (Path::new("/b"), given)
        );
        assert!(matches!(
            cell.server(2, None, None, Tuning::default()),
            Err(ConfigError::Servers(ServersError::NotListed { .. }))
        ));
    }

    #[test]
    fn sizes_are_bounded() {
        let tuning = |segment_bytes, checkpoint_bytes| Tuning {
            segment_bytes,
            checkpoint_bytes,
            ..Tuning::default()
        };
        assert!(Tuning::default().check().is_ok());
        assert!(tuning(8 << 20, 8 << 20).check().is_ok());
        assert!(tuning(4096, 8 << 20).check().is_err());
        assert!(tuning((8 << 20) + 1, 64 << 20).check().is_err());
        assert!(tuning(16 << 20, 8 << 20).check().is_err());
    }
}
