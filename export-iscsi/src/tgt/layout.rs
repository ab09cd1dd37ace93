//! tgt's text layout: scripts look for these lines, their order and how far they are indented.

use std::fmt::Write;

use crate::control::report::{Accounts, Lun, Sessions, State, Target, Targets};

/// tgt counts millions of bytes.
const MB: u64 = 1_000_000;

/// `--op show --mode target`.
pub fn targets(targets: &Targets, sessions: &Sessions) -> String {
    let each = targets.targets.iter();
    each.map(|it| target(it, sessions)).collect()
}

fn target(target: &Target, sessions: &Sessions) -> String {
    let state = match target.state {
        State::Ready | State::Opening => "ready",
        State::Offline => "offline",
    };
    let mut text = format!(
        "Target {}: {}\n    System information:\n        Driver: iscsi\n        State: {state}\n    \
         I_T nexus information:\n",
        target.tid, target.name
    );
    text.push_str(&nexuses(target, sessions));
    text.push_str("    LUN information:\n");
    text.push_str(&controller(target));
    text.extend(target.luns.iter().map(disk));
    text.push_str("    Account information:\n");
    for account in &target.accounts {
        let _ = writeln!(text, "        {}", shown(account));
    }
    if let Some(account) = &target.outgoing_account {
        let _ = writeln!(text, "        {} (outgoing)", shown(account));
    }
    text.push_str("    ACL information:\n");
    for rule in acl(target) {
        let _ = writeln!(text, "        {}", shown(&rule));
    }
    text
}

/// What others chose must not break lines.
fn shown(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn nexuses(target: &Target, sessions: &Sessions) -> String {
    let mut text = String::new();
    let its = sessions.sessions.iter();
    for session in its.filter(|it| it.target.as_ref() == Some(&target.name)) {
        let alias = match session.initiator_alias.as_str() {
            "" => "none",
            alias => alias,
        };
        let _ = writeln!(
            text,
            "        I_T nexus: {}\n            Initiator: {} alias: {}",
            session.session,
            shown(&session.initiator_name),
            shown(alias)
        );
        for connection in &session.connections {
            let _ = writeln!(
                text,
                "            Connection: {}\n                IP Address: {}",
                connection.cid,
                connection.address.ip()
            );
        }
    }
    text
}

/// One entry of the LUN information.
struct Unit<'a> {
    lun: u16,
    kind: &'static str,
    vendor: &'a str,
    scsi_id: &'a str,
    serial: &'a str,
    size_bytes: u64,
    block_bytes: u32,
    flags: [bool; 4],
    store: (&'static str, &'a str),
}

fn unit(unit: &Unit<'_>) -> String {
    let yes = |it: bool| if it { "Yes" } else { "No" };
    let [online, removable, read_only, thin] = unit.flags.map(yes);
    let megabytes = (unit.size_bytes + MB / 2) / MB;
    let Unit {
        lun,
        kind,
        vendor,
        scsi_id,
        serial,
        block_bytes,
        store: (store, path),
        ..
    } = unit;
    [
        format!("        LUN: {lun}"),
        format!("Type: {kind}"),
        format!("SCSI ID: {vendor:<8}{scsi_id}"),
        format!("SCSI SN: {serial}"),
        format!("Size: {megabytes} MB, Block size: {block_bytes}"),
        format!("Online: {online}"),
        format!("Removable media: {removable}"),
        "Prevent removal: No".to_owned(),
        format!("Readonly: {read_only}"),
        "SWP: No".to_owned(),
        format!("Thin-provisioning: {thin}"),
        format!("Backing store type: {store}"),
        format!("Backing store path: {path}"),
        "Backing store flags: \n".to_owned(),
    ]
    .join("\n            ")
}

/// LUN 0.
fn controller(target: &Target) -> String {
    let id = format!("{:04x}0000", target.tid);
    unit(&Unit {
        lun: 0,
        kind: "controller",
        vendor: "PSS",
        scsi_id: &id,
        serial: &id,
        size_bytes: 0,
        block_bytes: 1,
        flags: [true, false, false, false],
        store: ("null", "None"),
    })
}

fn disk(lun: &Lun) -> String {
    unit(&Unit {
        lun: lun.lun,
        kind: "disk",
        vendor: &lun.vendor,
        scsi_id: &lun.scsi_id,
        serial: &lun.serial,
        size_bytes: lun.size_bytes,
        block_bytes: lun.block_bytes,
        flags: [lun.online, lun.removable, lun.read_only, lun.thin],
        store: ("pss", &lun.volume),
    })
}

/// Rules as tgt writes them: `ALL` for all addresses, one address without the length of its network.
fn acl(target: &Target) -> Vec<String> {
    let all = ["0.0.0.0/0", "::/0"];
    let mut rules = Vec::new();
    let addresses = &target.initiator_addresses;
    let has_all = all.iter().all(|it| addresses.iter().any(|rule| rule == it));
    let no_rule = addresses.is_empty() && target.initiator_names.is_empty();
    if has_all || no_rule && !target.admits_nobody {
        rules.push("ALL".to_owned());
    }
    for address in addresses {
        if has_all && all.contains(&address.as_str()) {
            continue;
        }
        let one = match address.contains(':') {
            true => address.strip_suffix("/128"),
            false => address.strip_suffix("/32"),
        };
        rules.push(one.unwrap_or(address).to_owned());
    }
    let names = target.initiator_names.iter();
    rules.extend(names.map(|name| match name.as_str() {
        "*" => "ALL".to_owned(),
        name => name.to_owned(),
    }));
    rules
}

/// `--op show --mode target --tid`.
pub fn parameters(target: &Target) -> String {
    let parameters = target.parameters.iter();
    parameters
        .map(|(name, value)| format!("{name}={value}\n"))
        .collect()
}

/// `--op show --mode conn --tid`.
pub fn connections(target: &Target, sessions: &Sessions) -> String {
    let mut text = String::new();
    let its = sessions.sessions.iter();
    for session in its.filter(|it| it.target.as_ref() == Some(&target.name)) {
        let _ = writeln!(text, "Session: {}", session.session);
        for connection in &session.connections {
            let _ = writeln!(
                text,
                "    Connection: {}\n        Initiator: {}\n        IP Address: {}",
                connection.cid,
                shown(&session.initiator_name),
                connection.address.ip()
            );
        }
    }
    text
}

/// `--op show --mode account`.
pub fn accounts(accounts: &Accounts) -> String {
    let mut text = "Account list:\n".to_owned();
    for account in &accounts.accounts {
        let _ = writeln!(text, "    {}", shown(&account.user));
    }
    text
}

/// `--op show --mode sys`. It is offline if all targets are.
pub fn system(targets: &Targets) -> String {
    let mut states = targets.targets.iter().map(|it| it.state);
    let is_offline = states.len() > 0 && states.all(|it| matches!(it, State::Offline));
    let state = if is_offline { "offline" } else { "ready" };
    format!(
        "System:\n    State: {state}\n    debug: off\nLLDs:\n    iscsi: ready\nBacking stores:\n    pss\n\
         Device types:\n    disk\n    controller\niSNS:\n    iSNS=Off\n    iSNSServerIP=\n    \
         iSNSServerPort=3205\n    iSNSAccessControl=Off\n"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> (Targets, Sessions) {
        let targets = json!({ "targets": [{
            "tid": 1, "name": "iqn.2001-03.jp.tritech:a", "alias": null, "state": "ready",
            "luns": [{
                "lun": 1, "volume": "vol001", "online": true, "size_bytes": 67108864,
                "block_bytes": 512, "read_only": false, "removable": false, "thin": true,
                "write_cache": false, "vendor": "PSS", "scsi_id": "00ff", "serial": "00ff",
                "naa": "3000000000000000", "options": [],
            }],
            "accounts": ["u1"], "outgoing_account": "u2",
            "initiator_addresses": ["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.1/32", "fe80::1/128"],
            "initiator_names": ["iqn.x"], "admits_nobody": false, "redirect": null, "sessions": 1,
            "parameters": { "MaxBurstLength": "262144" },
        }]});
        let sessions = json!({ "sessions": [{
            "session": 5, "isid": "800000000001", "target": "iqn.2001-03.jp.tritech:a",
            "initiator_name": "iqn.x", "initiator_alias": "", "user": null, "header_digest": false,
            "data_digest": false, "since": 0, "tasks": 0, "idle_ms": null, "received_bytes": 0,
            "sent_bytes": 0, "leaving": false,
            "connections": [{
                "cid": 0, "address": "127.0.0.1:5000", "portal": "127.0.0.1:3260", "header_digest": false, "data_digest": false,
                "silent_ms": 0, "unsent_bytes": 0,
            }],
        }]});
        let targets = serde_json::from_value(targets).unwrap();
        (targets, serde_json::from_value(sessions).unwrap())
    }

    /// As `tgtadm --lld iscsi --op show --mode target` of tgt 1.0.85 lays it out, with our values.
    const SHOWN: &str = "\
Target 1: iqn.2001-03.jp.tritech:a
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 5
            Initiator: iqn.x alias: none
            Connection: 0
                IP Address: 127.0.0.1
    LUN information:
        LUN: 0
            Type: controller
            SCSI ID: PSS     00010000
            SCSI SN: 00010000
            Size: 0 MB, Block size: 1
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: No
            SWP: No
            Thin-provisioning: No
            Backing store type: null
            Backing store path: None
            Backing store flags:_
        LUN: 1
            Type: disk
            SCSI ID: PSS     00ff
            SCSI SN: 00ff
            Size: 67 MB, Block size: 512
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: No
            SWP: No
            Thin-provisioning: Yes
            Backing store type: pss
            Backing store path: vol001
            Backing store flags:_
    Account information:
        u1
        u2 (outgoing)
    ACL information:
        ALL
        10.0.0.0/8
        10.0.0.1
        fe80::1
        iqn.x
";

    #[test]
    fn a_target_in_tgts_layout() {
        let (targets_seen, sessions) = report();
        // tgt's line ends in a space.
        let expected = SHOWN.replace("flags:_", "flags: ");
        assert_eq!(targets(&targets_seen, &sessions), expected);
    }

    #[test]
    fn who_may_use_a_target() {
        let (mut seen, _) = report();
        let target = &mut seen.targets[0];
        target.initiator_addresses.clear();
        assert_eq!(acl(target), ["iqn.x"]);
        target.initiator_names.clear();
        assert_eq!(acl(target), ["ALL"]);
        target.admits_nobody = true;
        assert!(acl(target).is_empty());
    }

    #[test]
    fn names_of_others_stay_on_their_line() {
        let (seen, mut sessions) = report();
        sessions.sessions[0].initiator_alias = "x\nTarget 9: y".into();
        let text = targets(&seen, &sessions);
        assert!(text.contains("alias: x?Target 9: y\n"), "{text}");
    }
}
