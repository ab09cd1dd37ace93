//! Linux's own initiator and NBD client before a real cell: Debian's kernel with open-iscsi, multipath-tools and
//! nbd-client in a QEMU guest. `tests/guest/steps.sh` has what it does.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use pss_tests::guest::Guest;
use pss_tests::iscsi::Gateway;
use pss_tests::processes::{Cell, Layout};

/// Nothing that the guest does takes so long, emulated and on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

const TARGETS: &str = "\
<target iqn.2001-03.jp.tritech:open>
  <backing-store ext4>
    bs-type pss
    lun 1
  </backing-store>
  <backing-store xfs>
    bs-type pss
    lun 2
  </backing-store>
</target>
<target iqn.2001-03.jp.tritech:chap>
  backing-store chap
  incominguser alice alicesecret1
</target>
<target iqn.2001-03.jp.tritech:mutual>
  backing-store mutual
  incominguser alice alicesecret1
  outgoinguser bob bobsecret1234
</target>
<target iqn.2001-03.jp.tritech:multi>
  backing-store multi
</target>
";

/// The second gateway tells only those what it has who can say who they are.
const DISCOVERY: &str = "\
incomingdiscoveryuser carol carolsecret1
outgoingdiscoveryuser dave davesecret123
";

/// Functions of `steps.sh`, in an order in which each finds what it needs.
const STEPS: &[&str] = &[
    "discovery",
    "discovery_without_chap_is_refused",
    "discovery_with_a_wrong_secret_is_refused",
    "discovery_with_chap",
    "discovery_with_mutual_chap",
    "discovery_of_a_false_target_is_refused",
    "chap_missing_is_refused",
    "chap_wrong_user_is_refused",
    "chap_wrong_secret_is_refused",
    "chap_one_way",
    "chap_mutual",
    "chap_mutual_false_target_is_refused",
    "digests_none",
    "digests_header",
    "digests_data",
    "digests_both",
    "digests_preferred",
    "ext4",
    "xfs",
    "discard",
    "resize",
    "vpd",
    "opcodes",
    "persistent_reservations",
    "nbd",
    "multipath",
    "multipath_gateway_killed",
    "multipath_ended",
];

#[test]
#[ignore = "has a command of its own: cargo test -p pss-tests --test linux_initiator -- --ignored --nocapture"]
fn linuxs_own_initiator() {
    let mut cell = Cell::started(Layout::small(3), "256M");
    for volume in [
        "ext4 512M",
        "xfs 512M",
        "chap 64M",
        "mutual 64M",
        "multi 256M",
    ] {
        let create = format!("volume create {volume}");
        cell.bench.run("pss", &create).done();
    }
    let confs = [TARGETS.to_owned(), format!("{DISCOVERY}{TARGETS}")];
    let mut gateways =
        [0, 1].map(|number| Gateway::start(&cell, number, &confs[usize::from(number)]));
    let portals = gateways.each_ref().map(|it| it.portal.to_string());
    let mut guest = Guest::boot(&[
        ("portal0", &portals[0]),
        ("portal1", &portals[1]),
        ("nbd", &cell.nbd(0).to_string()),
        ("steps", &STEPS.join(",")),
    ]);
    let mut results = Vec::new();
    let start = Instant::now();
    loop {
        let line = guest.line(PATIENCE);
        println!("{:6.1} {line}", start.elapsed().as_secs_f64());
        match line.split_once(' ') {
            Some(("STEP", result)) => results.push(result.to_owned()),
            Some(("HOST", "resize")) => {
                cell.bench.run("pss", "volume resize ext4 768M").done();
            }
            Some(("HOST", "leader")) => {
                let leader = cell.leader();
                cell.kill(leader);
                cell.start(leader);
            }
            Some(("HOST", "kill")) => gateways[1].process.kill(),
            Some(("HOST", "start")) => gateways[1] = Gateway::start(&cell, 1, &confs[1]),
            Some(("HOST", other)) => panic!("the guest asks for '{other}'"),
            Some(("STEPS", "ended")) => break,
            _ => {}
        }
    }
    let expected: Vec<String> = STEPS.iter().map(|step| format!("{step} ok")).collect();
    assert_eq!(results, expected);
    for gateway in &mut gateways {
        assert!(gateway.process.runs(), "{}", gateway.process.text());
        let text = gateway.process.text();
        assert!(!text.contains("panicked"), "{text}");
        for secret in ["alicesecret", "bobsecret", "carolsecret", "davesecret"] {
            assert!(!text.contains(secret), "secrets are never logged: {text}");
        }
    }
}
