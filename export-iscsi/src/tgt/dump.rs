//! What is exported, as a targets.conf.

use std::fmt::Write;

use crate::control::report::{Accounts, State, Target, Targets, parameters};
use crate::keys::Wishes;

/// A targets.conf that exports the same. Passwords are not known here: the lines that want one have none,
/// so that the file cannot be used before somebody puts them in.
pub fn dump(targets: &Targets, accounts: &Accounts) -> String {
    let mut text = "default-driver iscsi\n".to_owned();
    for account in &accounts.accounts {
        if account.discovery {
            text.push_str(&user("", "incomingdiscoveryuser", &account.user));
        }
        if account.outgoing_discovery {
            text.push_str(&user("", "outgoingdiscoveryuser", &account.user));
        }
    }
    for it in &targets.targets {
        let _ = write!(text, "\n<target {}>\n{}</target>\n", it.name, target(it));
    }
    text
}

fn user(indent: &str, directive: &str, user: &str) -> String {
    format!("{indent}# the password follows the user\n{indent}{directive} {user}\n")
}

fn target(target: &Target) -> String {
    let mut text = String::new();
    if target.state == State::Offline {
        text.push_str("    # offline now, which a targets.conf cannot say\n");
    }
    if let Some(address) = &target.redirect {
        let _ = writeln!(text, "    # redirected to {address}, which is to be put in");
    }
    for lun in &target.luns {
        let _ = writeln!(text, "    <backing-store {}>", lun.volume);
        let _ = writeln!(text, "        bs-type pss\n        lun {}", lun.lun);
        for (key, value) in &lun.options {
            let _ = writeln!(text, "        {key} {value}");
        }
        text.push_str("    </backing-store>\n");
    }
    for account in &target.accounts {
        text.push_str(&user("    ", "incominguser", account));
    }
    if let Some(account) = &target.outgoing_account {
        text.push_str(&user("    ", "outgoinguser", account));
    }
    if target.admits_nobody {
        // In a file no rule means everyone.
        text.push_str("    # nobody is bound to it\n    initiator-address 0.0.0.0\n");
    }
    for address in &target.initiator_addresses {
        let _ = writeln!(text, "    initiator-address {address}");
    }
    for name in &target.initiator_names {
        let _ = writeln!(text, "    initiator-name {name}");
    }
    let usual = parameters(&Wishes::default());
    for (name, value) in &target.parameters {
        if usual.get(name) != Some(value) {
            let _ = writeln!(text, "    {name} {value}");
        }
    }
    text
}
