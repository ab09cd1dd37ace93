//! The `[iscsi]` part of pss.toml:
//!
//! ```toml
//! [iscsi]
//! advertise = ["storage.example.com:3260"]
//! chap-algorithms = ["sha3-256", "sha-256", "sha1", "md5"]
//!
//! [[iscsi.target]]
//! name = "iqn.2001-03.jp.tritech:tgtd-pss"
//! initiator-addresses = ["10.0.0.0/8"]
//! incoming = [{ user = "iscsi_pss", secret = "iscsi_pss000" }]
//! [[iscsi.target.lun]]
//! lun = 1
//! volume = "vol001"
//! ```
//!
//! Other parts of the file are for others.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use super::targets_conf::text;
use super::{ConfigError, Loaded, Problem};
use crate::auth::{Account, Accounts, Algorithm, Secret};
use crate::catalog::{Catalog, ChapAlgorithms, LunEntry, Redirect, TargetEntry, normal_name};
use crate::scsi::{LUN_MAX, LunSettings};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    iscsi: Iscsi,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Iscsi {
    advertise: Vec<String>,
    chap_algorithms: Option<Vec<String>>,
    discovery_incoming: Vec<User>,
    discovery_outgoing: Option<User>,
    target: Vec<toml::Spanned<Target>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    user: String,
    secret: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Target {
    name: String,
    alias: Option<String>,
    #[serde(default)]
    initiator_addresses: Vec<String>,
    #[serde(default)]
    initiator_names: Vec<String>,
    #[serde(default)]
    incoming: Vec<User>,
    outgoing: Option<User>,
    #[serde(default)]
    offline: bool,
    redirect: Option<Moved>,
    #[serde(default)]
    lun: Vec<Lun>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Moved {
    address: String,
    #[serde(default)]
    permanent: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Lun {
    lun: u16,
    volume: String,
    block_size: Option<u32>,
    physical_block_size: Option<u32>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    removable: bool,
    thin: Option<bool>,
    #[serde(default)]
    sanitize: bool,
    vendor: Option<String>,
    product: Option<String>,
    revision: Option<String>,
    serial: Option<String>,
    scsi_id: Option<String>,
}

/// Reads a pss.toml.
///
/// # Errors
/// [`ConfigError`] with all that is wrong.
pub fn load(file: &Path) -> Result<Loaded, ConfigError> {
    let problem = |line: usize, text: String| Problem {
        file: file.to_owned(),
        line,
        is_warning: false,
        text,
    };
    let content = std::fs::read_to_string(file)
        .map_err(|error| ConfigError(vec![problem(0, format!("cannot read: {error}"))]))?;
    let line_of = |at: usize| content[..at.min(content.len())].matches('\n').count() + 1;
    let parsed: File = toml::from_str(&content).map_err(|error| {
        let line = error.span().map_or(0, |span| line_of(span.start));
        ConfigError(vec![problem(line, error.message().to_owned())])
    })?;
    let mut problems = Vec::new();
    let mut catalog = Catalog::default();
    let iscsi = parsed.iscsi;
    catalog.advertised = iscsi.advertise;
    catalog.discovery = accounts(iscsi.discovery_incoming, iscsi.discovery_outgoing);
    match iscsi.chap_algorithms.as_deref().map(algorithms) {
        None => {}
        Some(Ok(algorithms)) => catalog.algorithms = algorithms,
        Some(Err(text)) => problems.push(problem(0, text)),
    }
    for target in iscsi.target {
        let line = line_of(target.span().start);
        match target_entry(target.into_inner()) {
            Ok(entry) => {
                let name = entry.name.clone();
                let old = catalog.targets.insert(name.clone(), Arc::new(entry));
                if old.is_some() {
                    problems.push(problem(line, format!("target {name} is there already")));
                }
            }
            Err(text) => problems.push(problem(line, text)),
        }
    }
    match problems.is_empty() {
        true => Ok(Loaded {
            catalog,
            warnings: Vec::new(),
        }),
        false => Err(ConfigError(problems)),
    }
}

fn account(user: User) -> Account {
    Account {
        name: user.user,
        secret: Secret::new(user.secret),
    }
}

fn accounts(incoming: Vec<User>, outgoing: Option<User>) -> Accounts {
    Accounts {
        incoming: incoming.into_iter().map(account).collect(),
        outgoing: outgoing.map(account),
    }
}

fn algorithms(names: &[String]) -> Result<ChapAlgorithms, String> {
    let mut algorithms = Vec::new();
    for name in names {
        algorithms.push(match name.as_str() {
            "md5" => Algorithm::Md5,
            "sha1" => Algorithm::Sha1,
            "sha-256" => Algorithm::Sha256,
            "sha3-256" => Algorithm::Sha3,
            other => {
                return Err(format!(
                    "chap-algorithms: {other} is none of md5, sha1, sha-256, sha3-256"
                ));
            }
        });
    }
    match algorithms.is_empty() {
        true => Err("chap-algorithms must name one at least".to_owned()),
        false => Ok(ChapAlgorithms(algorithms)),
    }
}

fn target_entry(target: Target) -> Result<TargetEntry, String> {
    let name = normal_name(&target.name).map_err(|error| error.to_string())?;
    let mut entry = TargetEntry::new(&name);
    entry.alias = target.alias;
    entry.offline = target.offline;
    entry.initiators = target.initiator_names;
    for address in target.initiator_addresses {
        let network = address.parse();
        let network =
            network.map_err(|error| format!("initiator-addresses: {address}: {error}"))?;
        entry.addresses.push(network);
    }
    entry.accounts = accounts(target.incoming, target.outgoing);
    if entry.accounts.share_a_secret() {
        return Err("incoming and outgoing have one secret: both need their own".to_owned());
    }
    entry.redirect = target.redirect.map(|it| Redirect {
        address: it.address,
        permanent: it.permanent,
    });
    for lun in target.lun {
        let number = lun.lun;
        let disk = lun_entry(lun).map_err(|text| format!("target {name}, lun {number}: {text}"))?;
        if entry.luns.insert(number, disk).is_some() {
            return Err(format!("target {name} has two disks with LUN {number}"));
        }
    }
    Ok(entry)
}

fn lun_entry(lun: Lun) -> Result<LunEntry, String> {
    if lun.lun == 0 || lun.lun > LUN_MAX {
        return Err(format!("a disk's LUN is from 1 to {LUN_MAX}"));
    }
    let defaults = LunSettings::default();
    let short = |name: &str, value: Option<String>, most: usize, default: String| match value {
        None => Ok(default),
        Some(value) => text(&value, most)
            .ok_or_else(|| format!("{name} has 1 to {most} printable ASCII characters")),
    };
    let optional = |name: &str, value: Option<String>, most: usize| match value {
        None => Ok(None),
        Some(value) => short(name, Some(value), most, String::new()).map(Some),
    };
    let block_bytes = lun.block_size.unwrap_or(defaults.block_bytes);
    if !matches!(block_bytes, 512 | 4096) {
        return Err("block-size is 512 or 4096".to_owned());
    }
    let physical = lun
        .physical_block_size
        .unwrap_or(defaults.physical_block_bytes.max(block_bytes));
    if !physical.is_power_of_two() || physical < block_bytes || physical > 1 << 20 {
        return Err("physical-block-size is a power of two from block-size to 1 MiB".to_owned());
    }
    Ok(LunEntry {
        settings: LunSettings {
            block_bytes,
            physical_block_bytes: physical,
            read_only: lun.read_only,
            removable: lun.removable,
            thin: lun.thin.unwrap_or(defaults.thin),
            sanitize: lun.sanitize,
            vendor: short("vendor", lun.vendor, 8, defaults.vendor)?,
            product: short("product", lun.product, 16, defaults.product)?,
            revision: short("revision", lun.revision, 4, defaults.revision)?,
            serial: optional("serial", lun.serial, 36)?,
            scsi_id: optional("scsi-id", lun.scsi_id, 24)?,
            ..LunSettings::default()
        },
        volume: lun.volume,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str) -> Result<Loaded, String> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pss.toml");
        std::fs::write(&file, text).unwrap();
        let prefix = format!("{}:", file.display());
        super::super::load(&file).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    const GOOD: &str = r#"
# The office.
#

[iscsi]
advertise = ["storage.example.com:3260"]
chap-algorithms = ["sha-256", "md5"]

[[iscsi.target]]
name = "iqn.2001-03.jp.tritech:tgtd-pss"
alias = "office"
initiator-addresses = ["10.0.0.0/8"]
incoming = [{ user = "iscsi_pss", secret = "iscsi_pss000" }]

[[iscsi.target.lun]]
lun = 1
volume = "vol001"
block-size = 4096
"#;

    #[test]
    fn the_same_as_in_targets_conf() {
        let catalog = load_text(GOOD).unwrap().catalog;
        assert_eq!(catalog.advertised, ["storage.example.com:3260"]);
        assert_eq!(catalog.algorithms.0, [Algorithm::Sha256, Algorithm::Md5]);
        let target = &catalog.targets["iqn.2001-03.jp.tritech:tgtd-pss"];
        assert_eq!(target.luns[&1].volume, "vol001");
        assert_eq!(target.luns[&1].settings.physical_block_bytes, 4096);
        assert_eq!(target.accounts.incoming[0].name, "iscsi_pss");
        assert!(target.admits_address("10.1.1.1".parse().unwrap()));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let wrong = |from: &str, to: &str| load_text(&GOOD.replace(from, to)).unwrap_err();
        assert!(
            wrong("alias", "aliaz").starts_with("11: unknown field `aliaz`"),
            "{}",
            wrong("alias", "aliaz")
        );
        // A mistyped section would be one that nobody reads.
        let section = load_text("[isci]\n").unwrap_err();
        assert!(section.starts_with("1: unknown field `isci`"), "{section}");
        assert!(wrong("lun = 1", "lun = 0").contains("a disk's LUN is from 1"));
        assert!(wrong("4096", "1024").contains("block-size is 512 or 4096"));
        assert!(wrong("iqn.2001-03.jp", "iqn.jp").contains("is no iSCSI name"));
        assert!(wrong("\"md5\"", "\"md4\"").contains("md4 is none of"));
        assert!(wrong("/8", "/99").contains("10.0.0.0/99"));
        assert!(
            wrong("[iscsi]", "[iscsi").starts_with("5: "),
            "{}",
            wrong("[iscsi]", "[iscsi")
        );
    }
}
