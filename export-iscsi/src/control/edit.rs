//! Changes of what is exported, while it is: a [`Catalog`] in, another one out, by the rules that hold for
//! the files.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::protocol::{Failure, Kind};
use crate::auth::{Account, Accounts, Secret};
use crate::catalog::{Catalog, LunEntry, TargetEntry, normal_name};
use crate::config::targets_conf::{
    LunOption, check_volume, is_parameter, name_pattern, networks, set_lun_option, set_parameter,
};
use crate::scsi::{LUN_MAX, LunSettings};

/// A change. Targets are told by their names.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "edit", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Edit {
    /// A target without disks, closed until an initiator is bound to it.
    NewTarget {
        /// iSCSI name.
        target: String,
    },
    /// A target goes.
    DeleteTarget {
        /// Its name.
        target: String,
    },
    /// Another state, alias or parameter of a target.
    UpdateTarget {
        /// Its name.
        target: String,
        /// `state`, `alias`, or a parameter by its name in RFC 7143.
        name: String,
        /// The new value.
        value: String,
    },
    /// A volume becomes a disk.
    NewLun {
        /// Of this target.
        target: String,
        /// From 1 on.
        lun: u16,
        /// Its name.
        volume: String,
        /// Options as in a targets.conf.
        #[serde(default)]
        options: Vec<(String, String)>,
    },
    /// Other options of a disk.
    UpdateLun {
        /// Of this target.
        target: String,
        /// The disk.
        lun: u16,
        /// Options as in a targets.conf.
        options: Vec<(String, String)>,
    },
    /// A disk goes.
    DeleteLun {
        /// Of this target.
        target: String,
        /// The disk.
        lun: u16,
    },
    /// An account that can be bound to targets.
    NewAccount {
        /// Its name.
        user: String,
        /// Its secret.
        password: Password,
    },
    /// An account goes, from all targets.
    DeleteAccount {
        /// Its name.
        user: String,
    },
    /// A target uses an account.
    BindAccount {
        /// Its name; without it the account is for discovery.
        target: Option<String>,
        /// The account's name.
        user: String,
        /// Whether it is the target that proves itself with it.
        #[serde(default)]
        outgoing: bool,
    },
    /// A target uses an account no more.
    UnbindAccount {
        /// Its name; without it the account is for discovery.
        target: Option<String>,
        /// The account's name.
        user: String,
        /// Whether it is the target that proves itself with it.
        #[serde(default)]
        outgoing: bool,
    },
    /// Initiators of an address may use a target.
    BindAddress {
        /// Its name.
        target: String,
        /// `ALL`, an address or a network.
        address: String,
    },
    /// That rule goes.
    UnbindAddress {
        /// Its name.
        target: String,
        /// `ALL`, an address or a network.
        address: String,
    },
    /// Initiators of a name may use a target.
    BindName {
        /// Its name.
        target: String,
        /// `ALL`, or a name, which may end in `*`.
        initiator: String,
    },
    /// That rule goes.
    UnbindName {
        /// Its name.
        target: String,
        /// `ALL`, or a name, which may end in `*`.
        initiator: String,
    },
}

/// A secret on its way; never shown.
#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Password(pub String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Edit {
    /// The target it is about, if it is about one that is there.
    pub(crate) fn target(&mut self) -> Option<&mut String> {
        match self {
            Edit::DeleteTarget { target }
            | Edit::UpdateTarget { target, .. }
            | Edit::NewLun { target, .. }
            | Edit::UpdateLun { target, .. }
            | Edit::DeleteLun { target, .. }
            | Edit::BindAddress { target, .. }
            | Edit::UnbindAddress { target, .. }
            | Edit::BindName { target, .. }
            | Edit::UnbindName { target, .. } => Some(target),
            Edit::BindAccount { target, .. } | Edit::UnbindAccount { target, .. } => {
                target.as_mut()
            }
            Edit::NewTarget { .. } | Edit::NewAccount { .. } | Edit::DeleteAccount { .. } => None,
        }
    }

    /// What the catalog is after it, and what a person should know about it.
    ///
    /// # Errors
    /// [`Failure`] if it cannot be made.
    pub fn apply(&self, catalog: &Catalog) -> Result<(Catalog, Vec<String>), Failure> {
        let mut next = catalog.clone();
        let mut warnings = Vec::new();
        self.change(&mut next, &mut warnings)?;
        Ok((next, warnings))
    }

    fn change(&self, catalog: &mut Catalog, warnings: &mut Vec<String>) -> Result<(), Failure> {
        match self {
            Edit::NewTarget { target } => new_target(catalog, target),
            Edit::DeleteTarget { target } => {
                let gone = catalog.targets.remove(target);
                gone.map(drop).ok_or_else(|| no_target(target))
            }
            Edit::UpdateTarget {
                target,
                name,
                value,
            } => update_target(entry(catalog, target)?, name, value),
            Edit::NewLun {
                target,
                lun,
                volume,
                options,
            } => new_lun(entry(catalog, target)?, *lun, volume, options, warnings),
            Edit::UpdateLun {
                target,
                lun,
                options,
            } => {
                let entry = entry(catalog, target)?;
                let disk = entry.luns.get_mut(lun);
                let disk = disk.ok_or_else(|| no_lun(target, *lun))?;
                set_options(&mut disk.settings, options, warnings)
            }
            Edit::DeleteLun { target, lun } => {
                let gone = entry(catalog, target)?.luns.remove(lun);
                gone.map(drop).ok_or_else(|| no_lun(target, *lun))
            }
            Edit::NewAccount { user, password } => new_account(catalog, user, password, warnings),
            Edit::DeleteAccount { user } => delete_account(catalog, user),
            Edit::BindAccount {
                target,
                user,
                outgoing,
            } => {
                let account = one_account(catalog, user)?;
                bind_account(accounts(catalog, target.as_deref())?, account, *outgoing)
            }
            Edit::UnbindAccount {
                target,
                user,
                outgoing,
            } => {
                // It can be bound again: tgt's accounts live on their own.
                let account = find_account(catalog, user)?;
                let accounts = accounts(catalog, target.as_deref())?;
                unbind_account(accounts, user, *outgoing)?;
                if !outgoing && !accounts.required() {
                    let what = target.as_deref().unwrap_or("discovery");
                    warnings.push(format!(
                        "{what} has no account now: it needs no CHAP any more"
                    ));
                }
                keep(catalog, account);
                Ok(())
            }
            Edit::BindAddress { target, address } => {
                let entry = entry(catalog, target)?;
                for network in address_rule(address)? {
                    if entry.addresses.contains(&network) {
                        return Err(Failure::new(
                            Kind::Exists,
                            format!("initiator-address {address} is bound to {target} already"),
                        ));
                    }
                    entry.addresses.push(network);
                }
                Ok(())
            }
            Edit::UnbindAddress { target, address } => {
                let entry = entry(catalog, target)?;
                let rules = address_rule(address)?;
                // A file without rules means ALL, and is shown so.
                let open = entry.addresses.is_empty()
                    && entry.initiators.is_empty()
                    && !entry.closed
                    && address == "ALL";
                if !open && !rules.iter().all(|it| entry.addresses.contains(it)) {
                    let text = format!("initiator-address {address} is not bound to {target}");
                    return Err(Failure::new(Kind::NotFound, text));
                }
                entry.addresses.retain(|it| !rules.contains(it));
                // Without rules files mean everyone; one who takes the last rule away does not.
                entry.closed = true;
                Ok(())
            }
            Edit::BindName { target, initiator } => {
                let entry = entry(catalog, target)?;
                let rule = name_rule(initiator)?;
                if entry.initiators.contains(&rule) {
                    let text = format!("initiator-name {initiator} is bound to {target} already");
                    return Err(Failure::new(Kind::Exists, text));
                }
                entry.initiators.push(rule);
                Ok(())
            }
            Edit::UnbindName { target, initiator } => {
                let entry = entry(catalog, target)?;
                let rule = name_rule(initiator)?;
                if !entry.initiators.contains(&rule) {
                    let text = format!("initiator-name {initiator} is not bound to {target}");
                    return Err(Failure::new(Kind::NotFound, text));
                }
                entry.initiators.retain(|it| *it != rule);
                entry.closed = true;
                Ok(())
            }
        }
    }
}

/// What it is to do, for people; never secrets.
impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let with = |options: &[(String, String)]| {
            let all = options
                .iter()
                .map(|(name, value)| format!(" {name} {value}"));
            all.collect::<Vec<_>>().join(",")
        };
        let role = |outgoing: &bool| {
            if *outgoing {
                "outgoing account"
            } else {
                "account"
            }
        };
        let place = |target: &Option<String>| match target {
            Some(target) => format!("target {target}"),
            None => "discovery".to_owned(),
        };
        match self {
            Edit::NewTarget { target } => write!(f, "add target {target}"),
            Edit::DeleteTarget { target } => write!(f, "delete target {target}"),
            Edit::UpdateTarget {
                target,
                name,
                value,
            } => write!(f, "set {name} of target {target} to {value}"),
            Edit::NewLun {
                target,
                lun,
                volume,
                options,
            } => write!(
                f,
                "add volume {volume} as LUN {lun} of target {target}{}",
                with(options)
            ),
            Edit::UpdateLun {
                target,
                lun,
                options,
            } => write!(f, "set LUN {lun} of target {target} to{}", with(options)),
            Edit::DeleteLun { target, lun } => write!(f, "delete LUN {lun} of target {target}"),
            Edit::NewAccount { user, .. } => write!(f, "add account {user}"),
            Edit::DeleteAccount { user } => write!(f, "delete account {user}"),
            Edit::BindAccount {
                target,
                user,
                outgoing,
            } => write!(f, "bind {} {user} to {}", role(outgoing), place(target)),
            Edit::UnbindAccount {
                target,
                user,
                outgoing,
            } => write!(f, "unbind {} {user} from {}", role(outgoing), place(target)),
            Edit::BindAddress { target, address } => {
                write!(f, "bind initiator-address {address} to target {target}")
            }
            Edit::UnbindAddress { target, address } => {
                write!(f, "unbind initiator-address {address} from target {target}")
            }
            Edit::BindName { target, initiator } => {
                write!(f, "bind initiator-name {initiator} to target {target}")
            }
            Edit::UnbindName { target, initiator } => {
                write!(f, "unbind initiator-name {initiator} from target {target}")
            }
        }
    }
}

fn no_target(name: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("there is no target {name}"))
}

fn no_lun(target: &str, lun: u16) -> Failure {
    let text = format!("target {target} has no disk with LUN {lun}");
    Failure::new(Kind::NotFound, text)
}

fn no_account(user: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("there is no account {user}"))
}

fn wrong(text: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Usage, text)
}

fn entry<'a>(catalog: &'a mut Catalog, name: &str) -> Result<&'a mut TargetEntry, Failure> {
    let entry = catalog.targets.get_mut(name);
    entry.map(Arc::make_mut).ok_or_else(|| no_target(name))
}

fn new_target(catalog: &mut Catalog, name: &str) -> Result<(), Failure> {
    let name = normal_name(name).map_err(|error| wrong(error.to_string()))?;
    if catalog.targets.contains_key(&name) {
        let text = format!("target {name} is there already");
        return Err(Failure::new(Kind::Exists, text));
    }
    let mut entry = TargetEntry::new(&name);
    entry.closed = true;
    catalog.targets.insert(name, Arc::new(entry));
    Ok(())
}

fn update_target(entry: &mut TargetEntry, name: &str, value: &str) -> Result<(), Failure> {
    let done = match name {
        "state" => {
            entry.offline = match value {
                "ready" => false,
                "offline" => true,
                _ => return Err(wrong(format!("state {value}: it is ready or offline"))),
            };
            Some(())
        }
        "alias" => {
            entry.alias = (!value.is_empty()).then(|| value.to_owned());
            Some(())
        }
        parameter if is_parameter(parameter) => set_parameter(&mut entry.wishes, parameter, value),
        other => {
            let text = format!(
                "{other} is no parameter: state, alias, or one of RFC 7143 such as MaxBurstLength"
            );
            return Err(wrong(text));
        }
    };
    done.ok_or_else(|| wrong(format!("{name} cannot be `{value}`")))
}

fn new_lun(
    entry: &mut TargetEntry,
    lun: u16,
    volume: &str,
    options: &[(String, String)],
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    check_volume(volume).map_err(wrong)?;
    if lun == 0 || lun > LUN_MAX {
        return Err(wrong(format!(
            "lun {lun}: a disk's LUN is from 1 to {LUN_MAX}; 0 is the controller"
        )));
    }
    if let Some(there) = entry.luns.get(&lun) {
        let text = format!(
            "LUN {lun} of {} is volume {} already",
            entry.name, there.volume
        );
        return Err(Failure::new(Kind::Exists, text));
    }
    let mut settings = LunSettings::default();
    set_options(&mut settings, options, warnings)?;
    let volume = volume.to_owned();
    entry.luns.insert(lun, LunEntry { volume, settings });
    Ok(())
}

fn set_options(
    settings: &mut LunSettings,
    options: &[(String, String)],
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    for (key, value) in options {
        match set_lun_option(settings, key, value) {
            LunOption::Done => {}
            LunOption::Meaningless => warnings.push(format!("{key} has no meaning here; ignored")),
            LunOption::Unknown => return Err(wrong(format!("unknown option `{key}` of a disk"))),
            LunOption::Wrong if key == "bs-type" => {
                let text = format!("bs-type {value}: the volumes of the cell are bs-type pss");
                return Err(wrong(text));
            }
            LunOption::Wrong => return Err(wrong(format!("{key} cannot be `{value}`"))),
        }
    }
    settings.physical_block_bytes = settings.physical_block_bytes.max(settings.block_bytes);
    Ok(())
}

fn new_account(
    catalog: &mut Catalog,
    user: &str,
    password: &Password,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    let word = |it: &str| !it.is_empty() && !it.contains(|c: char| c.is_whitespace() || c == '\0');
    if !word(user) || !word(&password.0) {
        return Err(wrong(
            "an account wants a user and a password, without spaces",
        ));
    }
    if find_account(catalog, user).is_ok() {
        let text = format!("account {user} is there already");
        return Err(Failure::new(Kind::Exists, text));
    }
    let secret = Secret::new(password.0.as_str());
    if !secret.fits_windows() {
        warnings.push(format!(
            "the secret of user {user:?} does not have 12 to 16 bytes; Windows refuses it"
        ));
    }
    let name = user.to_owned();
    catalog.accounts.push(Account { name, secret });
    Ok(())
}

/// An account by its name, wherever it is.
fn find_account(catalog: &Catalog, user: &str) -> Result<Account, Failure> {
    let found = all_accounts(catalog).find(|it| it.name == user);
    found.cloned().ok_or_else(|| no_account(user))
}

/// The account of a name. Files may give one name two secrets, on two targets.
fn one_account(catalog: &Catalog, user: &str) -> Result<Account, Failure> {
    let account = find_account(catalog, user)?;
    let mut same = all_accounts(catalog).filter(|it| it.name == user);
    match same.all(|it| it.secret == account.secret) {
        true => Ok(account),
        false => Err(Failure::new(
            Kind::Busy,
            format!(
                "account {user} has another password on another target: make one of another name"
            ),
        )),
    }
}

/// All accounts; one that several targets use comes as often.
pub(crate) fn all_accounts(catalog: &Catalog) -> impl Iterator<Item = &Account> {
    let of_targets = catalog.targets.values().map(|entry| &entry.accounts);
    let used = of_targets.chain([&catalog.discovery]);
    let used = used.flat_map(|it| it.incoming.iter().chain(&it.outgoing));
    catalog.accounts.iter().chain(used)
}

/// An account stays known when the last that uses it does so no more.
fn keep(catalog: &mut Catalog, account: Account) {
    if find_account(catalog, &account.name).is_err() {
        catalog.accounts.push(account);
    }
}

fn delete_account(catalog: &mut Catalog, user: &str) -> Result<(), Failure> {
    find_account(catalog, user)?;
    let users: Vec<&str> = catalog
        .targets
        .values()
        .filter(|entry| uses(&entry.accounts, user))
        .map(|entry| entry.name.as_str())
        .chain(uses(&catalog.discovery, user).then_some("discovery"))
        .collect();
    // A target whose last account goes would be open to everyone.
    if !users.is_empty() {
        let text = format!(
            "account {user} is bound to {}: unbind it first",
            users.join(", ")
        );
        return Err(Failure::new(Kind::Busy, text));
    }
    catalog.accounts.retain(|it| it.name != user);
    Ok(())
}

fn uses(accounts: &Accounts, user: &str) -> bool {
    let mut all = accounts.incoming.iter().chain(&accounts.outgoing);
    all.any(|it| it.name == user)
}

fn accounts<'a>(
    catalog: &'a mut Catalog,
    target: Option<&str>,
) -> Result<&'a mut Accounts, Failure> {
    match target {
        Some(target) => Ok(&mut entry(catalog, target)?.accounts),
        None => Ok(&mut catalog.discovery),
    }
}

fn bind_account(accounts: &mut Accounts, account: Account, outgoing: bool) -> Result<(), Failure> {
    let exists = |text: String| Err(Failure::new(Kind::Exists, text));
    match (outgoing, &accounts.outgoing) {
        (true, Some(there)) => {
            return exists(format!(
                "{} is the outgoing account already; there is one",
                there.name
            ));
        }
        (true, None) => accounts.outgoing = Some(account),
        (false, _) if accounts.incoming.iter().any(|it| it.name == account.name) => {
            return exists(format!("account {} is bound already", account.name));
        }
        (false, _) => accounts.incoming.push(account),
    }
    match accounts.share_a_secret() {
        true => Err(wrong(
            "an incoming and the outgoing account have one password: both directions need their own",
        )),
        false => Ok(()),
    }
}

fn unbind_account(accounts: &mut Accounts, user: &str, outgoing: bool) -> Result<(), Failure> {
    let found = match outgoing {
        true => accounts.outgoing.take_if(|it| it.name == user).is_some(),
        false => {
            let before = accounts.incoming.len();
            accounts.incoming.retain(|it| it.name != user);
            accounts.incoming.len() < before
        }
    };
    match found {
        true => Ok(()),
        false => {
            let way = if outgoing { "outgoing " } else { "" };
            let text = format!("account {user} is not bound as {way}account here");
            Err(Failure::new(Kind::NotFound, text))
        }
    }
}

fn address_rule(address: &str) -> Result<Vec<pss_gateway::peer::Network>, Failure> {
    networks(address).map_err(|error| wrong(format!("initiator-address {address}: {error}")))
}

fn name_rule(initiator: &str) -> Result<String, Failure> {
    match initiator {
        "" => Err(wrong("initiator-name wants a name")),
        name => Ok(name_pattern(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: &str = "iqn.2001-03.jp.tritech:a";

    fn made(edits: &[&str]) -> Catalog {
        let mut catalog = Catalog::default();
        for edit in edits {
            catalog = edited(&catalog, edit).unwrap();
        }
        catalog
    }

    fn edited(catalog: &Catalog, edit: &str) -> Result<Catalog, Failure> {
        let edit = edit.replace("TARGET", TARGET);
        let edit: Edit = serde_json::from_str(&edit).unwrap();
        edit.apply(catalog).map(|(catalog, _)| catalog)
    }

    const NEW: &str = r#"{"edit":"new-target","target":"TARGET"}"#;
    const ALL: &str = r#"{"edit":"bind-address","target":"TARGET","address":"ALL"}"#;
    const USER: &str = r#"{"edit":"new-account","user":"u","password":"passpasspass"}"#;
    const BIND: &str = r#"{"edit":"bind-account","target":"TARGET","user":"u"}"#;

    #[test]
    fn a_target_is_for_nobody_before_the_first_and_after_the_last_rule() {
        let address = "10.0.0.1".parse().unwrap();
        let target = |catalog: &Catalog| Arc::clone(&catalog.targets[TARGET]);
        let catalog = made(&[NEW]);
        assert!(!target(&catalog).admits_address(address));
        let catalog = edited(&catalog, ALL).unwrap();
        assert!(target(&catalog).admits_address(address));
        let unbind = ALL.replace("bind", "unbind");
        let closed = edited(&catalog, &unbind).unwrap();
        assert!(!target(&closed).admits_address(address));
        // A target of a file, whose rules are taken away.
        let mut of_file = TargetEntry::new(TARGET);
        of_file.initiators = vec!["iqn.x".into()];
        let mut catalog = Catalog::default();
        catalog.targets.insert(TARGET.into(), Arc::new(of_file));
        let unbind = r#"{"edit":"unbind-name","target":"TARGET","initiator":"iqn.x"}"#;
        let catalog = edited(&catalog, unbind).unwrap();
        assert!(target(&catalog).admits_nobody());
        // One without rules, which is shown as ALL.
        let mut catalog = Catalog::default();
        let of_file = TargetEntry::new(TARGET);
        catalog.targets.insert(TARGET.into(), Arc::new(of_file));
        let unbind = ALL.replace("bind", "unbind");
        let catalog = edited(&catalog, &unbind).unwrap();
        assert!(target(&catalog).admits_nobody());
        assert_eq!(edited(&catalog, &unbind).unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn accounts_are_made_bound_and_unbound() {
        let catalog = made(&[NEW, USER, BIND]);
        assert_eq!(catalog.targets[TARGET].accounts.incoming[0].name, "u");
        let delete = r#"{"edit":"delete-account","user":"u"}"#;
        let failure = edited(&catalog, delete).unwrap_err();
        assert_eq!(failure.kind, Kind::Busy);
        assert!(failure.message.contains(TARGET), "{failure}");
        let same = USER.replace(r#""u""#, r#""v""#);
        let catalog = edited(&catalog, &same).unwrap();
        let outgoing = BIND.replace(r#""u""#, r#""v","outgoing":true"#);
        assert_eq!(edited(&catalog, &outgoing).unwrap_err().kind, Kind::Usage);
        let catalog = edited(&catalog, &BIND.replace("bind", "unbind")).unwrap();
        assert!(!catalog.targets[TARGET].accounts.required());
        let catalog = edited(&catalog, BIND).unwrap();
        let catalog = edited(&catalog, &BIND.replace("bind", "unbind")).unwrap();
        assert!(edited(&catalog, delete).is_ok());
    }

    #[test]
    fn the_account_of_a_file_stays_known_when_it_is_unbound() {
        let mut entry = TargetEntry::new(TARGET);
        entry.accounts.incoming.push(Account {
            name: "u".into(),
            secret: Secret::new("passpasspass"),
        });
        let mut catalog = Catalog::default();
        catalog.targets.insert(TARGET.into(), Arc::new(entry));
        let catalog = edited(&catalog, &BIND.replace("bind", "unbind")).unwrap();
        assert!(edited(&catalog, BIND).is_ok());
    }

    #[test]
    fn disks_and_parameters_by_the_rules_of_the_files() {
        let lun = |lun: u16, options: &str| {
            format!(
                r#"{{"edit":"new-lun","target":"TARGET","lun":{lun},"volume":"v","options":[{options}]}}"#
            )
        };
        let catalog = made(&[NEW, &lun(1, r#"["readonly","1"],["vendor_id","ACME"]"#)]);
        let disk = &catalog.targets[TARGET].luns[&1];
        assert!(disk.settings.read_only && disk.settings.vendor == "ACME");
        let kind = |edit: &str| edited(&catalog, edit).unwrap_err().kind;
        assert_eq!(kind(&lun(1, "")), Kind::Exists);
        assert_eq!(kind(&lun(0, "")), Kind::Usage);
        assert_eq!(kind(&lun(0x4000, "")), Kind::Usage);
        assert_eq!(kind(&lun(2, r#"["bs-type","rdwr"]"#)), Kind::Usage);
        assert_eq!(kind(&lun(2, r#"["wibble","1"]"#)), Kind::Usage);
        assert_eq!(
            kind(&lun(2, "").replace(r#""v""#, r#""/dev/sda""#)),
            Kind::Usage
        );
        assert_eq!(kind(&lun(2, "").replace("TARGET", "iqn.x")), Kind::NotFound);
        assert_eq!(kind(NEW), Kind::Exists);
        let update = |name: &str, value: &str| {
            format!(
                r#"{{"edit":"update-target","target":"TARGET","name":"{name}","value":"{value}"}}"#
            )
        };
        let changed = edited(&catalog, &update("MaxBurstLength", "65536")).unwrap();
        assert_eq!(changed.targets[TARGET].wishes.max_burst_length, 65536);
        assert!(
            edited(&catalog, &update("state", "offline"))
                .unwrap()
                .targets[TARGET]
                .offline
        );
        for (name, value) in [
            ("MaxBurstLength", "abc"),
            ("nonsense", "1"),
            ("state", "gone"),
        ] {
            assert_eq!(kind(&update(name, value)), Kind::Usage);
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let edit: Edit = serde_json::from_str(USER).unwrap();
        assert!(!format!("{edit:?}").contains("passpass"));
    }
}
