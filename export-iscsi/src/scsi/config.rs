//! What a target and its logical units are made of.

use std::time::Duration;

use pss_core::volume::device::DeviceInfo;

/// A target.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TargetConfig {
    /// iSCSI name, such as `iqn.2001-03.jp.tritech:tgtd-pss`.
    pub name: String,
    /// Portal groups, each of which is a target port; its tag is the relative target port identifier.
    pub portal_groups: Vec<u16>,
    /// Disks. LUN 0 is the controller, which is always there.
    pub luns: Vec<LunConfig>,
    /// After which a command whose disk does not answer is answered BUSY.
    pub command_timeout: Duration,
}

/// Default of [`TargetConfig::command_timeout`]: before open-iscsi's 15 s to abort a command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(12);

impl TargetConfig {
    /// A target with portal group 1 and no disks yet.
    pub fn new(name: &str) -> TargetConfig {
        TargetConfig {
            name: name.to_owned(),
            portal_groups: vec![1],
            luns: Vec::new(),
            command_timeout: COMMAND_TIMEOUT,
        }
    }
}

/// A volume as a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LunConfig {
    /// From 1 to [`LUN_MAX`].
    pub lun: u16,
    /// The volume.
    pub info: DeviceInfo,
    /// How it is shown.
    pub settings: LunSettings,
}

/// Highest LUN: the flat space addressing method has 14 bits (SAM-5 §4.7.7.3).
pub const LUN_MAX: u16 = 0x3fff;

/// How a volume is shown as a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LunSettings {
    /// Logical block, bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Physical block, bytes: a power of two, at least `block_bytes`.
    pub physical_block_bytes: u32,
    /// Writes are refused, whatever the volume allows.
    pub read_only: bool,
    /// The medium can be ejected.
    pub removable: bool,
    /// Thin provisioning is announced; UNMAP and WRITE SAME with UNMAP are served.
    pub thin: bool,
    /// A volatile write cache is announced. PSS has none, so this changes nothing but what is said.
    pub write_cache: bool,
    /// SANITIZE is served.
    pub sanitize: bool,
    /// Vendor, at most 8 characters.
    pub vendor: String,
    /// Product, at most 16 characters.
    pub product: String,
    /// Revision, at most 4 characters.
    pub revision: String,
    /// Serial number (tgt's `scsi_sn`); by default the volume's UUID.
    pub serial: Option<String>,
    /// T10 identifier (tgt's `scsi_id`); by default made of the volume's UUID.
    pub scsi_id: Option<String>,
}

impl Default for LunSettings {
    fn default() -> LunSettings {
        LunSettings {
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            removable: false,
            thin: true,
            write_cache: false,
            sanitize: false,
            vendor: "PSS".into(),
            product: "VIRTUAL-DISK".into(),
            revision: env!("CARGO_PKG_VERSION").chars().take(4).collect(),
            serial: None,
            scsi_id: None,
        }
    }
}
