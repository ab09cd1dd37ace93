//! tgt's targets.conf, as `man targets.conf` has it, with the cell's volumes as backing stores:
//!
//! ```text
//! <target iqn.2001-03.jp.tritech:tgtd-pss>
//!   <backing-store vol001>
//!     bs-type pss
//!     lun 1
//!   </backing-store>
//!   incominguser iscsi_pss iscsi_pss000
//! </target>
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pss_gateway::peer::{Network, NotANetwork};

use super::general::{self, Node};
use super::{ConfigError, Loaded, Problem};
use crate::auth::{Account, Accounts, Secret};
use crate::catalog::{Catalog, LunEntry, Redirect, TargetEntry, normal_name};
use crate::keys::{
    CONNECTIONS_MAX, DigestPolicy, ERROR_RECOVERY_LEVEL_MAX, OUTSTANDING_R2T_MAX, Wishes, number,
};
use crate::scsi::{LUN_MAX, LunSettings};

/// Reads a targets.conf.
///
/// # Errors
/// [`ConfigError`] with all that is wrong. With `ignore-errors yes`, only if it cannot be read at all;
/// what is wrong is then left out, and told as a warning.
pub fn load(file: &Path) -> Result<Loaded, ConfigError> {
    let nodes = general::read(file).map_err(|problem| ConfigError(vec![problem]))?;
    let mut reader = Reader::default();
    reader.globals(&nodes);
    let ignores = reader.ignore_errors;
    let (errors, warnings): (Vec<_>, Vec<_>) = reader
        .problems
        .into_iter()
        .partition(|problem| !problem.is_warning && !ignores);
    if !errors.is_empty() {
        return Err(ConfigError(errors));
    }
    Ok(Loaded {
        catalog: reader.catalog,
        warnings,
    })
}

#[derive(Default)]
struct Reader {
    catalog: Catalog,
    ignore_errors: bool,
    driver: String,
    problems: Vec<Problem>,
}

/// Where each target was first seen.
type Seen<'a> = BTreeMap<String, &'a Node>;

/// What a target's options come to, before its disks are numbered.
struct Draft {
    entry: TargetEntry,
    settings: LunSettings,
    redirect: RedirectDraft,
}

#[derive(Default)]
struct RedirectDraft {
    address: Option<String>,
    port: Option<String>,
    permanent: bool,
}

impl Reader {
    fn error(&mut self, node: &Node, text: impl Into<String>) {
        self.problems.push(node.problem(text));
    }

    fn warn(&mut self, node: &Node, text: impl Into<String>) {
        let mut problem = node.problem(text);
        problem.is_warning = true;
        self.problems.push(problem);
    }

    fn globals(&mut self, nodes: &[Node]) {
        self.driver = "iscsi".to_owned();
        let mut seen = Seen::new();
        // Targets may depend on what stands behind them.
        for node in nodes.iter().filter(|node| node.key != "target") {
            self.global(node);
        }
        for node in nodes.iter().filter(|node| node.key == "target") {
            self.target(node, &mut seen);
        }
    }

    fn global(&mut self, node: &Node) {
        match node.key.as_str() {
            "default-driver" => node.value.clone_into(&mut self.driver),
            "ignore-errors" => self.ignore_errors = node.value == "yes",
            "incomingdiscoveryuser" => {
                if let Some(account) = self.account(node) {
                    self.catalog.discovery.incoming.push(account);
                }
            }
            "outgoingdiscoveryuser" => {
                self.catalog.discovery.outgoing = self.account(node);
            }
            "control-port" => {}
            "iSNS" | "iSNSServerIP" | "iSNSServerPort" | "iSNSAccessControl" => {
                self.warn(
                    node,
                    format!("{}: iSNS is not supported; ignored", node.key),
                );
            }
            other => self.error(node, format!("unknown directive `{other}`")),
        }
    }

    fn account(&mut self, node: &Node) -> Option<Account> {
        let mut words = node.value.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(name), Some(secret), None) => Some(Account {
                name: name.to_owned(),
                secret: Secret::new(secret),
            }),
            _ => {
                self.error(node, format!("{} wants a user and a password", node.key));
                None
            }
        }
    }

    fn target<'a>(&mut self, node: &'a Node, seen: &mut Seen<'a>) {
        let Some(block) = &node.block else {
            return self.error(node, "target is a block: <target IQN> ... </target>");
        };
        let name = match normal_name(&node.value) {
            Ok(name) => name,
            Err(error) => return self.error(node, error.to_string()),
        };
        if let Some(first) = seen.get(&name) {
            let (file, line) = (first.file.display(), first.line);
            return self.error(node, format!("target {name} is at {file}:{line} already"));
        }
        seen.insert(name.clone(), node);
        let mut draft = Draft {
            entry: TargetEntry::new(&name),
            settings: LunSettings {
                // What tgt calls itself; people's scripts look for it.
                ..LunSettings::default()
            },
            redirect: RedirectDraft::default(),
        };
        let problems = self.problems.len();
        let driver = block.iter().find(|it| it.key == "driver");
        let driver = driver.map_or(self.driver.clone(), |it| it.value.clone());
        if driver != "iscsi" {
            return self.error(node, format!("driver {driver}: only iscsi is served"));
        }
        // Options of the target hold for all disks in it, wherever they stand.
        let is_store = |it: &&Node| matches!(it.key.as_str(), "backing-store" | "direct-store");
        for option in block.iter().filter(|it| !is_store(it)) {
            self.target_option(&mut draft, option);
        }
        self.stores(&mut draft, block.iter().filter(is_store));
        self.finish(node, draft, problems);
    }

    fn finish(&mut self, node: &Node, draft: Draft, problems: usize) {
        let Draft {
            mut entry,
            redirect,
            ..
        } = draft;
        if let Some(address) = redirect.address {
            let port = redirect.port.unwrap_or("3260".to_owned());
            let address = match address.contains(':') && !address.starts_with('[') {
                true => format!("[{address}]:{port}"),
                false => format!("{address}:{port}"),
            };
            entry.redirect = Some(Redirect {
                address,
                permanent: redirect.permanent,
            });
        }
        if entry.accounts.share_a_secret() {
            self.error(
                node,
                "incominguser and outgoinguser have one password: both directions need their own",
            );
        }
        if entry.accounts.outgoing.is_some() && entry.accounts.incoming.is_empty() {
            self.warn(node, "outgoinguser without incominguser is never asked for");
        }
        // A target that is partly wrong might be open to more people than was meant.
        let wrong = self.problems[problems..].iter().any(|it| !it.is_warning);
        if !wrong {
            let name = entry.name.clone();
            self.catalog.targets.insert(name, Arc::new(entry));
        }
    }

    fn target_option(&mut self, draft: &mut Draft, node: &Node) {
        let value = node.value.as_str();
        let entry = &mut draft.entry;
        match node.key.as_str() {
            "incominguser" => {
                if let Some(account) = self.account(node) {
                    self.add_incoming(node, &mut entry.accounts, account);
                }
            }
            "outgoinguser" => {
                if entry.accounts.outgoing.is_some() {
                    return self.error(node, "a target has one outgoinguser");
                }
                entry.accounts.outgoing = self.account(node);
            }
            "initiator-address" => match value {
                "" => self.error(node, "initiator-address wants an address"),
                _ => match networks(value) {
                    Ok(networks) => entry.addresses.extend(networks),
                    Err(error) => self.error(node, format!("initiator-address {value}: {error}")),
                },
            },
            "initiator-name" if value.is_empty() => {
                self.error(node, "initiator-name wants a name");
            }
            "initiator-name" => entry.initiators.push(name_pattern(value)),
            "driver" | "controller_tid" => {}
            "RedirectAddress" => draft.redirect.address = Some(value.to_owned()),
            "RedirectPort" => match value.parse::<u16>() {
                Ok(port) => draft.redirect.port = Some(port.to_string()),
                Err(_) => self.error(node, "RedirectPort wants a port"),
            },
            "RedirectReason" => match value {
                "Temporary" => draft.redirect.permanent = false,
                "Permanent" => draft.redirect.permanent = true,
                _ => self.error(node, "RedirectReason is Temporary or Permanent"),
            },
            "lun" => self.error(node, "lun belongs into a backing-store block"),
            key if is_parameter(key) => self.parameter(entry, node),
            _ => self.lun_option(&mut draft.settings, node),
        }
    }

    fn add_incoming(&mut self, node: &Node, accounts: &mut Accounts, account: Account) {
        if accounts.incoming.iter().any(|it| it.name == account.name) {
            return self.error(node, format!("user {} is there already", account.name));
        }
        accounts.incoming.push(account);
    }

    fn parameter(&mut self, entry: &mut TargetEntry, node: &Node) {
        if set_parameter(&mut entry.wishes, &node.key, &node.value).is_none() {
            self.error(node, format!("{} cannot be `{}`", node.key, node.value));
        }
    }

    fn lun_option(&mut self, settings: &mut LunSettings, node: &Node) {
        let (key, value) = (&node.key, &node.value);
        match set_lun_option(settings, key, value) {
            LunOption::Done => {}
            LunOption::Meaningless => {
                self.warn(node, format!("{key} has no meaning here; ignored"));
            }
            LunOption::Unknown => self.error(node, format!("unknown directive `{key}`")),
            LunOption::Wrong if key == "bs-type" => {
                let text = format!("bs-type {value}: the volumes of the cell are bs-type pss");
                self.error(node, text);
            }
            LunOption::Wrong => self.error(node, format!("{key} cannot be `{value}`")),
        }
    }

    /// Numbers the disks as tgt-admin does: one-line stores from 1 on in the order of the file; then, or
    /// otherwise, blocks in the order of their names, unless they say their LUN.
    fn stores<'a>(&mut self, draft: &mut Draft, stores: impl Iterator<Item = &'a Node>) {
        let mut stores: Vec<&Node> = stores.collect();
        stores.sort_by_key(|node| match node.block {
            None => (0, ""),
            Some(_) => (1, node.value.as_str()),
        });
        let mut lines: BTreeMap<u16, usize> = BTreeMap::new();
        let (said, unsaid): (Vec<_>, Vec<_>) = stores.into_iter().partition(|it| says_lun(it));
        for store in said.into_iter().chain(unsaid) {
            let Some((lun, entry)) = self.store(draft, store) else {
                continue;
            };
            let lun = lun.unwrap_or_else(|| {
                let free = |lun: &u16| !lines.contains_key(lun);
                (1..=LUN_MAX).find(free).unwrap_or(LUN_MAX)
            });
            if let Some(line) = lines.insert(lun, store.line) {
                self.error(store, format!("LUN {lun} is in line {line} already"));
                continue;
            }
            draft.entry.luns.insert(lun, entry);
        }
    }

    fn store(&mut self, draft: &Draft, store: &Node) -> Option<(Option<u16>, LunEntry)> {
        if store.key == "direct-store" {
            let text = "direct-store shows a local device as it is; a volume of the cell has none. Use \
                        backing-store";
            self.error(store, text);
            return None;
        }
        if let Err(text) = check_volume(&store.value) {
            self.error(store, text);
            return None;
        }
        let mut settings = draft.settings.clone();
        let mut lun = None;
        for option in store.block.iter().flatten() {
            if option.key != "lun" {
                self.lun_option(&mut settings, option);
                continue;
            }
            // LUN 0 is the controller.
            match number(&option.value, 1, LUN_MAX.into()) {
                Some(number) => lun = Some(number as u16),
                None => {
                    let text = format!("lun {}: a disk's LUN is from 1 to {LUN_MAX}", option.value);
                    self.error(option, text);
                }
            }
        }
        settings.physical_block_bytes = settings.physical_block_bytes.max(settings.block_bytes);
        Some((
            lun,
            LunEntry {
                volume: store.value.clone(),
                settings,
            },
        ))
    }
}

/// iSCSI parameters of a target, by their names in RFC 7143; whether the value could be used.
pub(crate) fn set_parameter(wishes: &mut Wishes, key: &str, value: &str) -> Option<()> {
    let bytes = |most: u32| number(value, 512, most);
    let ranged = |min: u32, max: u32| number(value, min, max);
    let yes = match value {
        "Yes" | "yes" | "1" => Some(true),
        "No" | "no" | "0" => Some(false),
        _ => None,
    };
    let digest = match value {
        "None" => Some(DigestPolicy::Never),
        "CRC32C" => Some(DigestPolicy::Always),
        "CRC32C,None" | "None,CRC32C" => Some(DigestPolicy::Either),
        _ => None,
    };
    const SEGMENT_MAX: u32 = 1 << 20;
    const BURST_MAX: u32 = (1 << 24) - 1;
    match key {
        "MaxRecvDataSegmentLength" => bytes(SEGMENT_MAX).map(|it| wishes.data_bytes_max = it),
        "MaxXmitDataSegmentLength" => bytes(SEGMENT_MAX).map(|it| wishes.sent_data_bytes_max = it),
        "MaxBurstLength" => bytes(BURST_MAX).map(|it| wishes.max_burst_length = it),
        "FirstBurstLength" => bytes(1 << 20).map(|it| wishes.first_burst_length = it),
        "HeaderDigest" => digest.map(|it| wishes.header_digest = it),
        "DataDigest" => digest.map(|it| wishes.data_digest = it),
        "InitialR2T" => yes.map(|it| wishes.initial_r2t = it),
        "ImmediateData" => yes.map(|it| wishes.immediate_data = it),
        "MaxOutstandingR2T" => {
            ranged(1, OUTSTANDING_R2T_MAX.into()).map(|it| wishes.max_outstanding_r2t = it as u16)
        }
        "MaxConnections" => {
            ranged(1, CONNECTIONS_MAX.into()).map(|it| wishes.max_connections = it as u16)
        }
        "ErrorRecoveryLevel" => ranged(0, ERROR_RECOVERY_LEVEL_MAX.into())
            .map(|it| wishes.error_recovery_level = it as u8),
        "DefaultTime2Wait" => ranged(0, 3600).map(|it| wishes.time2wait = it as u16),
        "DefaultTime2Retain" => ranged(0, 3600).map(|it| wishes.time2retain = it as u16),
        "DataPDUInOrder" | "DataSequenceInOrder" => yes.filter(|it| *it).map(drop),
        "IFMarker" | "OFMarker" => yes.filter(|it| !*it).map(drop),
        _ => None,
    }
}

/// What became of an option of a disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LunOption {
    Done,
    /// tgt's, without a meaning here.
    Meaningless,
    Unknown,
    /// It cannot have this value.
    Wrong,
}

/// Options of a disk.
pub(crate) fn set_lun_option(settings: &mut LunSettings, key: &str, value: &str) -> LunOption {
    let on = match value {
        "1" | "on" | "yes" | "Yes" => Some(true),
        "0" | "off" | "no" | "No" => Some(false),
        _ => None,
    };
    let done = match key {
        // The bare word means on.
        "write-cache" => on
            .or(value.is_empty().then_some(true))
            .map(|it| settings.write_cache = it),
        "removable" => on.map(|it| settings.removable = it),
        "readonly" => on.map(|it| settings.read_only = it),
        "thin-provisioning" | "thin_provisioning" => on.map(|it| settings.thin = it),
        "allow-in-use" => on.map(drop),
        "sanitize" => on.map(|it| settings.sanitize = it),
        "block-size" => number(value, 512, 4096)
            .filter(|bytes| matches!(bytes, 512 | 4096))
            .map(|it| settings.block_bytes = it),
        "lbppbe" => {
            number(value, 0, 8).map(|it| settings.physical_block_bytes = settings.block_bytes << it)
        }
        "scsi_id" => text(value, 24).map(|it| settings.scsi_id = Some(it)),
        "scsi_sn" => text(value, 36).map(|it| settings.serial = Some(it)),
        "vendor_id" => text(value, 8).map(|it| settings.vendor = it),
        "product_id" => text(value, 16).map(|it| settings.product = it),
        "product_rev" => text(value, 4).map(|it| settings.revision = it),
        "bs-type" => (value == "pss").then_some(()),
        "device-type" => matches!(value, "disk" | "sbc").then_some(()),
        "sense_format" | "mode_page" | "path" | "bsopts" | "bsoflags" | "la_lba" | "online"
        | "optimal_xfer_gran" | "optimal_xfer_len" | "params" => {
            return LunOption::Meaningless;
        }
        _ => return LunOption::Unknown,
    };
    match done {
        Some(()) => LunOption::Done,
        None => LunOption::Wrong,
    }
}

/// How options other than the usual are said, for [`set_lun_option`].
pub(crate) fn lun_options(settings: &LunSettings) -> Vec<(String, String)> {
    let usual = LunSettings::default();
    let bit = |it: bool| if it { "1" } else { "0" }.to_owned();
    let on = |it: bool| if it { "on" } else { "off" }.to_owned();
    let exponent = (settings.physical_block_bytes / settings.block_bytes).ilog2();
    let physical_differs = match settings.block_bytes == usual.block_bytes {
        true => settings.physical_block_bytes != usual.physical_block_bytes,
        false => exponent != 0,
    };
    let text = |value: &String, usual: &String| (value != usual).then(|| value.clone());
    let all = [
        (
            "block-size",
            (settings.block_bytes != usual.block_bytes).then(|| settings.block_bytes.to_string()),
        ),
        ("lbppbe", physical_differs.then(|| exponent.to_string())),
        (
            "readonly",
            (settings.read_only != usual.read_only).then(|| bit(settings.read_only)),
        ),
        (
            "removable",
            (settings.removable != usual.removable).then(|| bit(settings.removable)),
        ),
        (
            "thin-provisioning",
            (settings.thin != usual.thin).then(|| bit(settings.thin)),
        ),
        (
            "write-cache",
            (settings.write_cache != usual.write_cache).then(|| on(settings.write_cache)),
        ),
        (
            "sanitize",
            (settings.sanitize != usual.sanitize).then(|| bit(settings.sanitize)),
        ),
        ("vendor_id", text(&settings.vendor, &usual.vendor)),
        ("product_id", text(&settings.product, &usual.product)),
        ("product_rev", text(&settings.revision, &usual.revision)),
        ("scsi_sn", settings.serial.clone()),
        ("scsi_id", settings.scsi_id.clone()),
    ];
    let said = all
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    said.collect()
}

fn says_lun(node: &Node) -> bool {
    node.block
        .iter()
        .flatten()
        .any(|option| option.key == "lun")
}

pub(crate) fn is_parameter(key: &str) -> bool {
    matches!(
        key,
        "MaxRecvDataSegmentLength"
            | "MaxXmitDataSegmentLength"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "HeaderDigest"
            | "DataDigest"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxOutstandingR2T"
            | "MaxConnections"
            | "ErrorRecoveryLevel"
            | "DefaultTime2Wait"
            | "DefaultTime2Retain"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "IFMarker"
            | "OFMarker"
    )
}

/// Addresses as tgt names them: `ALL`, or one network.
pub(crate) fn networks(value: &str) -> Result<Vec<Network>, NotANetwork> {
    match value {
        "ALL" => ["0.0.0.0/0", "::/0"]
            .iter()
            .map(|all| all.parse())
            .collect(),
        _ => Ok(vec![value.parse()?]),
    }
}

/// Names as tgt has them: `ALL`, or one name, which may end in `*`.
pub(crate) fn name_pattern(value: &str) -> String {
    match value {
        "ALL" => "*".to_owned(),
        name => name.to_owned(),
    }
}

/// What cannot name a volume of the cell, and why.
pub(crate) fn check_volume(name: &str) -> Result<(), String> {
    match name {
        "" => Err("backing-store wants the name of a volume".to_owned()),
        _ if name.contains('/') => Err(format!(
            "backing-store {name}: this is a file; pss-iscsi exports the cell's volumes, by name"
        )),
        _ => Ok(()),
    }
}

/// Printable ASCII of at most so many characters.
pub(super) fn text(value: &str, most: usize) -> Option<String> {
    let printable = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    (printable && !value.is_empty() && value.len() <= most).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str) -> Result<Loaded, String> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("targets.conf");
        std::fs::write(&file, text).unwrap();
        let prefix = format!("{}:", file.display());
        super::super::load(&file).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    fn only(text: &str) -> Arc<TargetEntry> {
        let loaded = load_text(text).unwrap();
        assert_eq!(loaded.catalog.targets.len(), 1);
        loaded.catalog.targets.into_values().next().unwrap()
    }

    fn refused(text: &str) -> String {
        load_text(text).unwrap_err()
    }

    fn in_target(text: &str) -> String {
        format!("<target iqn.2001-03.jp.tritech:a>\n{text}\n</target>\n")
    }

    /// The manual's example, to the letter.
    const MANUAL: &str = "\
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store vol001>
    bs-type pss
    lun 1
  </backing-store>
  incominguser iscsi_pss iscsi_pss000
</target>
";

    #[test]
    fn the_manuals_example() {
        let loaded = load_text(MANUAL).unwrap();
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        let target = only(MANUAL);
        assert_eq!(target.name, "iqn.2001-03.jp.tritech:tgtd-pss");
        assert_eq!(target.luns.keys().collect::<Vec<_>>(), [&1]);
        assert_eq!(target.luns[&1].volume, "vol001");
        assert_eq!(target.accounts.incoming[0].name, "iscsi_pss");
        assert_eq!(
            target.accounts.incoming[0].secret,
            Secret::new("iscsi_pss000")
        );
        assert!(target.addresses.is_empty());
    }

    #[test]
    fn disks_are_numbered_as_tgt_does() {
        let target = only(&in_target("backing-store b\nbacking-store a\nbs-type pss"));
        let volumes: Vec<_> = target
            .luns
            .iter()
            .map(|(lun, it)| (*lun, &*it.volume))
            .collect();
        assert_eq!(volumes, [(1, "b"), (2, "a")]);
        let blocks = "<backing-store z>\nlun 1\n</backing-store>\n<backing-store y>\n</backing-store>\n\
                      <backing-store x>\n</backing-store>";
        let target = only(&in_target(blocks));
        let volumes: Vec<_> = target
            .luns
            .iter()
            .map(|(lun, it)| (*lun, &*it.volume))
            .collect();
        assert_eq!(volumes, [(1, "z"), (2, "x"), (3, "y")]);
    }

    #[test]
    fn options_of_disks_and_of_all_disks() {
        let target = only(&in_target(
            "write-cache off\nvendor_id ACME\n<backing-store a>\nblock-size 4096\nreadonly 1\nscsi_sn \
             s1\nscsi_id i1\nproduct_id P\nproduct_rev 1\nremovable 1\nallow-in-use yes\n\
             vendor_id OTHER\n</backing-store>\n<backing-store b>\nlbppbe 0\n</backing-store>",
        ));
        let (a, b) = (&target.luns[&1].settings, &target.luns[&2].settings);
        assert_eq!(
            (a.block_bytes, a.physical_block_bytes, a.read_only),
            (4096, 4096, true)
        );
        assert_eq!((&*a.vendor, &*a.product, &*a.revision), ("OTHER", "P", "1"));
        assert_eq!(
            (a.serial.as_deref(), a.scsi_id.as_deref()),
            (Some("s1"), Some("i1"))
        );
        assert!(a.removable && !a.write_cache && !b.removable);
        assert_eq!((&*b.vendor, b.physical_block_bytes), ("ACME", 512));
    }

    #[test]
    fn options_are_said_as_they_are_read() {
        for said in [
            "",
            "block-size 4096",
            "lbppbe 0",
            "block-size 4096\nlbppbe 2",
            "readonly 1\nremovable 1\nthin-provisioning 0\nwrite-cache on\nsanitize 1",
            "vendor_id A\nproduct_id B C\nproduct_rev 1\nscsi_sn s\nscsi_id i",
        ] {
            let block = format!("<backing-store a>\n{said}\n</backing-store>");
            let settings = only(&in_target(&block)).luns[&1].settings.clone();
            let mut again = LunSettings::default();
            let options = lun_options(&settings);
            let lines = options.iter().map(|(key, value)| format!("{key} {value}"));
            assert_eq!(lines.collect::<Vec<_>>().join("\n"), said);
            for (key, value) in options {
                assert_eq!(set_lun_option(&mut again, &key, &value), LunOption::Done);
            }
            again.physical_block_bytes = again.physical_block_bytes.max(again.block_bytes);
            assert_eq!(again, settings);
        }
    }

    #[test]
    fn acls_and_parameters() {
        let target = only(&in_target(
            "initiator-address 10.0.0.0/8\ninitiator-address ::1\ninitiator-name iqn.x:*\n\
             MaxRecvDataSegmentLength 65536\nHeaderDigest CRC32C\nInitialR2T Yes\nMaxConnections 1\n\
             RedirectAddress 10.0.0.9\nRedirectReason Permanent\nincominguser a aaaaaaaaaaaa\n\
             outgoinguser b bbbbbbbbbbbb",
        ));
        assert_eq!(target.addresses.len(), 2);
        assert_eq!(target.initiators, ["iqn.x:*"]);
        assert_eq!(target.wishes.data_bytes_max, 65_536);
        assert_eq!(target.wishes.header_digest, DigestPolicy::Always);
        assert!(target.wishes.initial_r2t && target.wishes.max_connections == 1);
        let redirect = target.redirect.as_ref().unwrap();
        assert_eq!(
            (&*redirect.address, redirect.permanent),
            ("10.0.0.9:3260", true)
        );
        assert_eq!(target.accounts.outgoing.as_ref().unwrap().name, "b");
        let all = only(&in_target("initiator-address ALL"));
        assert!(all.admits_address("10.0.0.1".parse().unwrap()));
        assert!(all.admits_address("fe80::1".parse().unwrap()));
    }

    #[test]
    fn discovery_accounts_and_other_globals() {
        let loaded = load_text(
            "default-driver iscsi\ncontrol-port 0\nincomingdiscoveryuser d dddddddddddd\n\
             outgoingdiscoveryuser o oooooooooooo\niSNS On\n",
        );
        let loaded = loaded.unwrap();
        assert_eq!(loaded.catalog.discovery.incoming[0].name, "d");
        assert_eq!(loaded.catalog.discovery.outgoing.unwrap().name, "o");
        assert_eq!(loaded.warnings.len(), 1);
    }

    #[test]
    fn everything_wrong_is_named_with_its_line() {
        let text = "frobnicate 1\n".to_owned()
            + &in_target(
                "wibble 2\nwrite-cache maybe\nInitialR2T perhaps\ninitiator-address nowhere",
            )
            + "<target nonsense>\n</target>\n";
        assert_eq!(
            refused(&text),
            "1: unknown directive `frobnicate`\n3: unknown directive `wibble`\n\
             4: write-cache cannot be `maybe`\n5: InitialR2T cannot be `perhaps`\n\
             6: initiator-address nowhere: not an ADDRESS or ADDRESS/BITS\n\
             8: \"nonsense\" is no iSCSI name: iqn.YYYY-MM.DOMAIN[:NAME], eui. and 16 hexadecimal \
             digits, or naa. and 16 or 32 of them"
        );
    }

    #[test]
    fn duplicates_and_what_is_no_volume() {
        let twice = in_target("") + &in_target("");
        assert!(refused(&twice).contains("4: target iqn.2001-03.jp.tritech:a is at"));
        let luns = "<backing-store a>\nlun 1\n</backing-store>\n<backing-store b>\nlun 1\n</backing-store>";
        assert_eq!(refused(&in_target(luns)), "5: LUN 1 is in line 2 already");
        assert!(refused(&in_target("direct-store /dev/sda")).contains("2: direct-store shows"));
        assert!(
            refused(&in_target("backing-store /dev/sda"))
                .contains("2: backing-store /dev/sda: this is a file")
        );
        assert!(refused(&in_target("bs-type rdwr")).contains("bs-type pss"));
        assert!(
            refused(&in_target("<backing-store a>\nlun 0\n</backing-store>")).contains("from 1 to")
        );
        assert!(refused(&in_target("incominguser only")).contains("wants a user and a password"));
        let equal = "incominguser a samesamesame\noutgoinguser b samesamesame";
        assert!(refused(&in_target(equal)).contains("need their own"));
        assert!(refused(&in_target("driver iser")).contains("only iscsi is served"));
    }

    #[test]
    fn ignored_errors_leave_the_target_out() {
        let text = "ignore-errors yes\n".to_owned() + &in_target("wibble 2") + MANUAL;
        let loaded = load_text(&text).unwrap();
        assert_eq!(loaded.catalog.targets.len(), 1);
        assert_eq!(loaded.warnings.len(), 1);
    }

    #[test]
    fn secrets_that_windows_refuses_are_warned_of() {
        let loaded = load_text(&in_target("incominguser a short")).unwrap();
        assert!(loaded.warnings[0].text.contains("12 to 16 bytes"));
        assert!(!loaded.warnings[0].text.contains("short"));
    }
}
