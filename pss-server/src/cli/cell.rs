//! The cell as the verbs of `pss` use it, and what its refusals mean to the caller.

use std::collections::BTreeMap;

use pss_core::servers::Ids;
use pss_core::state::Volume;
use pss_core::types::{ServerId, VolumeId};
use pss_core::wire::client::{ServerStatus, VolumeStatus};

use super::health::Answers;
use super::{CellArgs, CliError, Exit};
use crate::config::CellFiles;
use crate::render::printable;

/// A connection to a cell.
pub(super) struct Access {
    /// What the files say about it.
    pub(super) files: CellFiles,
}

impl Access {
    pub(super) fn connect(args: &CellArgs) -> Result<Access, CliError> {
        let files = args.read()?;
        Ok(Access { files })
    }

    /// Where the servers stand that answer in time.
    pub(super) fn answers(&self) -> Answers {
        Answers {
            listed: self.files.file.ids(),
            statuses: BTreeMap::new(),
        }
    }

    /// A server's address for messages.
    pub(super) fn address_text(&self, id: ServerId) -> String {
        let address = self.files.servers.tcp(id);
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    }

    pub(super) fn volumes(&self) -> Result<Vec<VolumeStatus>, CliError> {
        Err(self.unreachable())
    }

    /// A volume by name.
    pub(super) fn volume(&self, name: &str) -> Result<VolumeStatus, CliError> {
        self.volumes()?
            .into_iter()
            .find(|status| status.volume.name == name)
            .ok_or_else(|| {
                CliError::new(
                    Exit::NotFound,
                    format!(
                        "there is no volume {}; 'pss volume list' shows all",
                        printable(name)
                    ),
                )
            })
    }

    pub(super) fn create_volume(
        &self,
        _name: &str,
        _size: u64,
        _chunk: u32,
    ) -> Result<VolumeId, CliError> {
        Err(self.unreachable())
    }

    pub(super) fn resize_volume(
        &self,
        _volume: &Volume,
        _size: u64,
        _shrink: bool,
    ) -> Result<(), CliError> {
        Err(self.unreachable())
    }

    pub(super) fn delete_volume(&self, _volume: &Volume) -> Result<(), CliError> {
        Err(self.unreachable())
    }

    pub(super) fn shutdown(&self, _id: ServerId) -> Result<(), CliError> {
        Err(self.unreachable())
    }

    fn unreachable(&self) -> CliError {
        CliError::new(Exit::NoQuorum, self.answers().judge(None).sentence())
    }
}
