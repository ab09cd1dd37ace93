//! `pss iscsi`, `pss-tgtadm` and `pss-tgt-admin` before a gateway with initiators logged in.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pss_tests::binaries::{self, tool};
use pss_tests::iscsi::{Gateway, libiscsi};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use pss_tests::programs::Outcome;
use serde_json::{Value, json};

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
const OPEN: &str = "iqn.2001-03.jp.tritech:open";
const NEW: &str = "iqn.2001-03.jp.tritech:new";
const USER: &str = "iscsi_pss%iscsi_pss000@";
const CONF: &str = "\
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store vol001>
    bs-type pss
    lun 1
  </backing-store>
  incominguser iscsi_pss iscsi_pss000
</target>
<target iqn.2001-03.jp.tritech:open>
  backing-store vol002
</target>
";

struct Bench {
    cell: Cell,
    gateway: Gateway,
}

impl Bench {
    fn new() -> Bench {
        let mut cell = Cell::new(Layout {
            gateways: 0,
            ..Layout::small(3)
        });
        for id in 0..3 {
            cell.start(id);
        }
        cell.wait_current();
        for name in ["vol001", "vol002", "vol003"] {
            let create = format!("volume create {name} 64M");
            cell.bench.run("pss", &create).done();
        }
        let gateway = Gateway::start(&cell, 0, CONF);
        Bench { cell, gateway }
    }

    fn pss(&self, args: &str) -> Outcome {
        let control = self.gateway.control.display();
        let args = format!("iscsi --control {control} {args}");
        self.cell.bench.run("pss", &args)
    }

    fn json(&self, args: &str) -> Value {
        let outcome = self.pss(&format!("{args} --json"));
        serde_json::from_str(&outcome.done().stdout()).unwrap()
    }

    fn tgt(&self, program: &str, args: &str) -> Outcome {
        let control = self.gateway.control.display();
        let args = format!("--control {control} {args}");
        self.cell.bench.run(program, &args)
    }

    fn tgtadm(&self, args: &str) -> Outcome {
        self.tgt("pss-tgtadm", &format!("--lld iscsi {args}"))
    }

    /// The session of an initiator at a target.
    fn session(&self, initiator: &str, target: &str) -> Option<Value> {
        let sessions = self.json("sessions");
        let mut all = sessions["sessions"].as_array().unwrap().iter();
        let found = all.find(|it| it["initiator_name"] == initiator && it["target"] == target);
        found.cloned()
    }

    fn wait_session(&self, initiator: &str, target: &str) -> Value {
        let mut found = None;
        wait_until("the initiator has logged in", PATIENCE, || {
            found = self.session(initiator, target);
            found.as_ref().is_some_and(|it| !it["idle_ms"].is_null())
        });
        found.unwrap()
    }

    fn finds(&self, target: &str) -> bool {
        let portal = format!("iscsi://{}", self.gateway.portal);
        let (done, said) = libiscsi("iscsi-ls", &[&portal]);
        assert!(done, "{said}");
        said.contains(target)
    }

    fn logs_in(&self, user: &str, target: &str) -> bool {
        let url = self.gateway.url(user, target, 1);
        libiscsi("iscsi-inq", &[&url]).0
    }
}

/// A real initiator that stays logged in and reads.
struct Initiator(Child);

impl Initiator {
    fn start(bench: &Bench, name: &str, user: &str, target: &str) -> Initiator {
        let mut command = Command::new(tool("iscsi-perf", "libiscsi-bin"));
        command.args(["-i", name, "-m", "2", "-t", "300"]);
        command.arg(bench.gateway.url(user, target, 1));
        command.stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Initiator(command.spawn().unwrap())
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sessions_are_seen_kicked_and_drained() {
    let bench = Bench::new();
    let _one = Initiator::start(&bench, "iqn.one", USER, TARGET);
    let two = Initiator::start(&bench, "iqn.two", "", OPEN);
    let one = bench.wait_session("iqn.one", TARGET);
    assert_eq!(one["user"], "iscsi_pss");
    assert!(one["received_bytes"].as_u64().unwrap() > 0);
    assert!(one["idle_ms"].as_u64().unwrap() < 60_000);
    let second = bench.wait_session("iqn.two", OPEN);
    assert_eq!(second["user"], Value::Null);

    // As text and as JSON.
    let sessions = bench.json("sessions");
    assert_eq!(sessions["schema"], "pss.iscsi.sessions/1");
    let text = bench.pss("sessions").done().stdout();
    for part in [
        "SESSION", "LAST IO", "iqn.one", "iqn.two", "127.", TARGET, OPEN,
    ] {
        assert!(text.contains(part), "no {part} in:\n{text}");
    }
    let targets = bench.json("targets");
    assert_eq!(targets["schema"], "pss.iscsi.targets/1");
    assert_eq!(targets["targets"][0]["luns"][0]["size_bytes"], 64 << 20);
    let text = bench.pss("targets").done().stdout();
    assert!(
        text.contains("1:vol001 64M") && text.contains("iscsi_pss"),
        "{text}"
    );
    let connections = bench.json("connections");
    assert_eq!(connections["schema"], "pss.iscsi.connections/1");
    assert_eq!(connections["connections"].as_array().unwrap().len(), 2);
    bench.pss("connections").done();
    let accounts = bench.json("accounts");
    assert_eq!(accounts["schema"], "pss.iscsi.accounts/1");
    assert_eq!(accounts["accounts"][0]["targets"], json!([TARGET]));
    assert!(!accounts.to_string().contains("iscsi_pss000"));
    bench.pss("accounts").done();

    // Kicked: the session is gone; libiscsi logs in again.
    let number = second["session"].as_u64().unwrap();
    let kicked = bench.pss(&format!("kick {number} --within 3s"));
    assert!(kicked.done().stderr().contains("has ended"));
    let all = bench.json("sessions");
    let mut all = all["sessions"].as_array().unwrap().iter();
    assert!(all.all(|it| it["session"] != number));
    bench
        .pss(&format!("kick {number}"))
        .fails(3, &[&format!("there is no session {number}")]);

    // Drained: no sessions, and no new ones.
    let drained = bench.json(&format!("drain {OPEN} --within 3s"));
    assert_eq!(drained["schema"], "pss.iscsi.drain/1");
    assert_eq!(drained["left"], 0);
    assert!(bench.session("iqn.two", OPEN).is_none());
    assert!(!bench.logs_in("", OPEN));
    let text = bench.pss("targets").done().stdout();
    assert!(text.contains("offline"), "{text}");
    bench.pss(&format!("undrain {OPEN}")).done();
    assert!(bench.logs_in("", OPEN));
    drop(two);

    // The other session was never touched.
    let still = bench.wait_session("iqn.one", TARGET);
    assert_eq!(still["session"], one["session"]);
    let drained = bench.pss("drain --within 1s");
    assert!(
        drained
            .done()
            .stderr()
            .contains("All targets take no new sessions")
    );
    assert!(bench.session("iqn.one", TARGET).is_none());
}

#[test]
fn reload_touches_only_what_changed() {
    let bench = Bench::new();
    let _one = Initiator::start(&bench, "iqn.one", USER, TARGET);
    let one = bench.wait_session("iqn.one", TARGET);
    let conf = bench.cell.bench.path("targets0.conf");
    let more = format!("{CONF}<target {NEW}>\nbacking-store vol003\n</target>\n");
    fs::write(&conf, &more).unwrap();
    let reloaded = bench.json("reload");
    assert_eq!(reloaded["schema"], "pss.iscsi.reload/1");
    assert_eq!(reloaded["changed"], json!([NEW]));
    assert!(bench.finds(NEW) && bench.logs_in("", NEW));

    // A wrong file changes nothing.
    fs::write(&conf, more.replace("lun 1", "lun x")).unwrap();
    bench
        .pss("reload")
        .fails(2, &["stays as it was", "targets0.conf:4", "lun x"]);
    assert!(bench.finds(NEW));
    // A volume that is not there is told.
    fs::write(&conf, more.replace("vol003", "nothing")).unwrap();
    let said = bench.pss("reload").done().stderr();
    assert!(said.contains("no volume nothing"), "{said}");
    fs::write(&conf, CONF).unwrap();
    let said = bench.pss("reload").done().stderr();
    assert!(
        said.contains("2 targets are served") && said.contains(NEW),
        "{said}"
    );
    assert!(!bench.finds(NEW));
    let still = bench.wait_session("iqn.one", TARGET);
    assert_eq!(still["session"], one["session"]);

    // Another password holds from the next login; another account ends the session.
    let user = "incominguser iscsi_pss iscsi_pss000";
    fs::write(&conf, CONF.replace(user, &format!("{user}other"))).unwrap();
    let said = bench.pss("reload").done().stderr();
    assert!(
        said.contains("password") && said.contains("next login"),
        "{said}"
    );
    assert!(!bench.logs_in(USER, TARGET));
    let still = bench.wait_session("iqn.one", TARGET);
    assert_eq!(still["session"], one["session"]);
    fs::write(&conf, CONF.replace(user, "incominguser other iscsi_pss000")).unwrap();
    let said = bench.pss("reload").done().stderr();
    let ended = format!("ended: session {} of iqn.one", one["session"]);
    assert!(said.contains(&ended) && said.contains("account"), "{said}");
    wait_until("the session is gone", PATIENCE, || {
        bench.session("iqn.one", TARGET).is_none()
    });
}

#[test]
fn tgtadm_makes_a_target_that_initiators_find() {
    let bench = Bench::new();
    bench
        .tgtadm(&format!("--op new --mode target --tid 7 -T {NEW}"))
        .done();
    bench
        .tgtadm("--op new --mode logicalunit --tid 7 --lun 1 -b vol003 --bstype pss")
        .done();
    bench
        .tgtadm("--op new --mode account --user u1 --password passpasspass")
        .done();
    bench
        .tgtadm("--op bind --mode account --tid 7 --user u1")
        .done();
    // Nobody is bound to it.
    assert!(!bench.finds(NEW));
    bench
        .tgtadm("--op bind --mode target --tid 7 -I ALL")
        .done();
    assert!(bench.finds(NEW));
    assert!(!bench.logs_in("", NEW));
    let user = "u1%passpasspass@";
    assert!(bench.logs_in(user, NEW));

    let initiator = Initiator::start(&bench, "iqn.one", user, NEW);
    let session = bench.wait_session("iqn.one", NEW)["session"].to_string();
    let shown = bench.tgtadm("--op show --mode target").done().stdout();
    let its = &shown[shown.find("Target 7:").unwrap()..];
    for part in [
        &format!("Target 7: {NEW}\n    System information:\n        Driver: iscsi\n"),
        &format!("        I_T nexus: {session}\n            Initiator: iqn.one alias: "),
        "            Connection: 0\n                IP Address: 127.",
        "        LUN: 0\n            Type: controller\n",
        "            Size: 67 MB, Block size: 512\n            Online: Yes\n",
        "            Backing store type: pss\n            Backing store path: vol003\n",
        "    Account information:\n        u1\n    ACL information:\n        ALL\n",
    ] {
        assert!(its.contains(part), "no {part} in:\n{its}");
    }
    let shown = bench.tgtadm("--op show --mode accunt").done().stdout();
    assert_eq!(shown, "Account list:\n    iscsi_pss\n    u1\n");
    let shown = bench.tgtadm("--op show --mode sys").done().stdout();
    assert!(shown.starts_with("System:\n    State: ready\n"), "{shown}");
    let shown = bench
        .tgtadm("--op show --mode conn --tid 7")
        .done()
        .stdout();
    assert!(
        shown.starts_with(&format!("Session: {session}\n")),
        "{shown}"
    );

    bench
        .tgtadm("--op delete --mode target --tid 7")
        .fails(22, &["a session uses", "force"]);
    bench
        .tgtadm("--op update --mode target --tid 7 --name MaxBurstLength --value 65536")
        .done();
    let shown = bench.tgtadm("--op show --mode target --tid 7");
    assert!(shown.done().stdout().contains("MaxBurstLength=65536\n"));
    let close = format!("--op delete --mode conn --tid 7 --sid {session} --cid 0");
    bench.tgtadm(&close).done();
    drop(initiator);
    bench
        .tgtadm("--op delete --mode target --tid 7 --force")
        .done();
    assert!(!bench.finds(NEW));
    bench.tgtadm("--op delete --mode account --user u1").done();
}

#[test]
fn tgtadm_says_what_is_wrong() {
    let bench = Bench::new();
    for (call, part) in [
        (
            "--op new --mode target --tid 1 -T iqn.2001-03.x:y",
            "target number 1 is",
        ),
        (
            &format!("--op new --mode target --tid 9 -T {OPEN}"),
            "is there already",
        ),
        (
            "--op new --mode target --tid 9 -T nonsense",
            "no iSCSI name",
        ),
        (
            "--op new --mode target --tid 0 -T iqn.2001-03.x:y",
            "number 0",
        ),
        (
            "--op delete --mode target --tid 9",
            "no target with number 9",
        ),
        ("--op new --mode lun --tid 1 --lun 1 -b vol003", "already"),
        (
            "--op new --mode lun --tid 1 --lun 2 -b nothing",
            "there is no volume nothing",
        ),
        (
            "--op new --mode lun --tid 1 --lun 2 -b /dev/sda",
            "this is a file",
        ),
        (
            "--op new --mode lun --tid 1 --lun 0 -b vol003",
            "0 is the controller",
        ),
        (
            "--op new --mode lun --tid 1 --lun 2 -b vol003 -E rdwr",
            "bs-type rdwr",
        ),
        (
            "--op delete --mode lun --tid 1 --lun 5",
            "no disk with LUN 5",
        ),
        (
            "--op bind --mode account --tid 1 --user u9",
            "no account u9",
        ),
        (
            "--op bind --mode target --tid 1 -I foo",
            "foo: not an ADDRESS",
        ),
        (
            "--op unbind --mode target --tid 1 -I 10.0.0.1",
            "is not bound",
        ),
        (
            "--op update --mode target --tid 1 -n state -v gone",
            "ready or offline",
        ),
        (
            "--op delete --mode account --user iscsi_pss",
            "unbind it first",
        ),
        ("--op show --mode nonsense", "nonsense"),
        ("--op delete --mode system", "systemctl stop pss-iscsi"),
        (
            "--op update --mode sys --name State -v gone",
            "ready or offline",
        ),
        ("--op update --mode sys --name Debug -v on", "only State"),
        ("--op new --mode target", "is missing"),
        ("--lld fc --op show --mode target", "lld"),
    ] {
        bench.tgtadm(call).fails(22, &[part]);
    }
    // By the name that scripts call.
    let link = bench.cell.bench.path("tgtadm");
    std::os::unix::fs::symlink(binaries::path("pss-tgtadm"), &link).unwrap();
    let output = Command::new(&link)
        .args(["--lld", "iscsi", "--op", "show", "--mode", "target"])
        .args(["--control", "nowhere"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(107));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("tgtadm: no pss-iscsi answers at nowhere"),
        "{said}"
    );
}

#[test]
fn tgt_admin_takes_all_targets() {
    let bench = Bench::new();
    let tgt_admin = |args: &str| bench.tgt("pss-tgt-admin", args);
    let shown = tgt_admin("-s").done().stdout();
    let same = bench.tgtadm("--op show --mode target").done().stdout();
    assert_eq!(shown, same);
    assert!(shown.contains("Target 1: ") && shown.contains("Target 2: "));
    tgt_admin(&format!("--offline {OPEN}")).done();
    assert!(tgt_admin("-s").done().stdout().contains("State: offline"));
    tgt_admin("--ready ALL").done();
    assert!(bench.logs_in("", OPEN));
    bench
        .tgtadm("--op update --mode sys --name State -v offline")
        .done();
    let shown = tgt_admin("-s").done().stdout();
    assert_eq!(shown.matches("State: offline").count(), 2, "{shown}");
    let system = bench.tgtadm("--op show --mode sys").done().stdout();
    assert!(system.contains("State: offline"), "{system}");
    bench
        .tgtadm("--op update --mode sys --name State -v ready")
        .done();
    tgt_admin(&format!("--delete {OPEN}")).done();
    assert!(!bench.finds(OPEN));
    tgt_admin(&format!("--update {OPEN}")).done();
    assert!(bench.logs_in("", OPEN));

    // A dump that is given its passwords exports the same. The target that went and came has another
    // number by now.
    let shown = tgt_admin("-s").done().stdout();
    let dumped = tgt_admin("--dump").done().stdout();
    assert!(!dumped.contains("iscsi_pss000"), "{dumped}");
    let conf = bench.cell.bench.path("targets0.conf");
    fs::write(&conf, &dumped).unwrap();
    tgt_admin("-e").fails(22, &["wants a user and a password"]);
    let user = "incominguser iscsi_pss";
    fs::write(&conf, dumped.replace(user, &format!("{user} iscsi_pss000"))).unwrap();
    tgt_admin("--update ALL").done();
    assert_eq!(tgt_admin("-s").done().stdout(), shown);

    tgt_admin("--delete ALL").done();
    assert_eq!(tgt_admin("-s").done().stdout(), "");
    tgt_admin("-e").done();
    assert!(bench.logs_in("", OPEN) && bench.logs_in(USER, TARGET));
    tgt_admin("--delete tid=99").fails(22, &["no target tid=99"]);
    tgt_admin(&format!("-e -c {}", conf.display())).done();
    tgt_admin("-e -c /dev/null").fails(22, &["/dev/null", "started with", "targets0.conf"]);
    tgt_admin("-e -c other.conf").fails(22, &["other.conf", "No such file"]);
    tgt_admin("").fails(22, &["--show"]);
}

#[test]
fn the_socket_and_who_is_not_there() {
    let mut bench = Bench::new();
    let programs = &bench.cell.bench;
    programs
        .run("pss", "iscsi targets --control nowhere")
        .fails(6, &["no pss-iscsi answers at nowhere", "--control"]);
    programs.run("pss", "iscsi kick abc").fails(2, &["abc"]);
    programs
        .run("pss", "iscsi kick 1 --within 11m")
        .fails(2, &["at most 600s"]);
    bench
        .pss("drain iqn.x")
        .fails(3, &["there is no target iqn.x"]);

    // A second gateway on the same socket, or on a file, ends before it opens its port.
    let port = TcpListener::bind((bench.gateway.portal.ip(), 0)).unwrap();
    let portal = port.local_addr().unwrap().to_string();
    let start = |control: &str| {
        let conf = "--config targets0.conf";
        bench.cell.bench.run(
            "pss-iscsi",
            &format!("--portal {portal} {conf} --control {control}"),
        )
    };
    let text = start("iscsi0.sock").stderr();
    assert!(text.contains("another pss-iscsi answers there"), "{text}");
    assert!(text.contains("--control PATH"), "{text}");
    let text = start("targets0.conf").stderr();
    assert!(text.contains("another file is there"), "{text}");

    // What a killed gateway left is replaced.
    bench.gateway.process.kill();
    assert!(bench.gateway.control.exists());
    bench.pss("targets").fails(6, &["no pss-iscsi answers"]);
    let begin = Instant::now();
    bench.gateway = Gateway::start(&bench.cell, 0, CONF);
    bench.pss("targets").done();
    assert!(begin.elapsed() < Duration::from_secs(30));
    // A stopped one takes its file along.
    bench.gateway.process.signal("TERM");
    assert_eq!(bench.gateway.process.ends(PATIENCE), Some(0));
    assert!(!bench.gateway.control.exists());
}

/// Everything that was done is in the events of the cell, with who asked for it.
#[test]
fn the_cell_notes_what_is_done_to_a_gateway() {
    let bench = Bench::new();
    let _one = Initiator::start(&bench, "iqn.one", USER, TARGET);
    let session = bench.wait_session("iqn.one", TARGET)["session"].clone();
    let before = gateway_events(&bench.cell).len();
    assert_eq!(before, 0, "what was only looked at is not noted");

    // Another user, if we may let one in; the socket is the gateway's own user's.
    let user = other_user(&bench);
    let kicked = as_user(&bench, user, &format!("kick {session} --within 3s --json"));
    let answer: Value = serde_json::from_str(&kicked.done().stdout()).unwrap();
    assert_eq!(answer["noted"], true, "{answer}");
    assert_eq!(answer["not_noted"], Value::Null);
    bench.pss("kick 999").fails(3, &["no session 999"]);
    bench.pss(&format!("drain {OPEN} --within 1s")).done();
    bench.pss("undrain 1").done();
    let conf = bench.cell.bench.path("targets0.conf");
    let more = format!("{CONF}<target {NEW}>\nbacking-store vol003\n</target>\n");
    fs::write(&conf, &more).unwrap();
    bench.pss("reload").done();
    fs::write(&conf, more.replace("lun 1", "lun x")).unwrap();
    bench.pss("reload").fails(2, &["stays as it was"]);
    bench
        .tgtadm("--op new --mode account --user u1 --password passpasspass")
        .done();
    bench
        .tgtadm("--op bind --mode account --tid 2 --user u1")
        .done();
    bench
        .tgtadm("--op delete --mode target --tid 3 --force")
        .done();
    bench
        .tgtadm("--op delete --mode target --tid 9")
        .fails(22, &["no target with number 9"]);
    fs::write(&conf, CONF).unwrap();
    bench.gateway.process.signal("HUP");
    wait_until("the signal is noted", PATIENCE, || {
        gateway_events(&bench.cell)
            .iter()
            .any(|it| it["text"].as_str().unwrap().contains("SIGHUP"))
    });

    let events = gateway_events(&bench.cell);
    let texts: Vec<&str> = events
        .iter()
        .map(|it| it["text"].as_str().unwrap())
        .collect();
    let expected = [
        &format!("kick session {session} of iqn.one with {TARGET}"),
        "could not kick session 999: there is no session 999",
        &format!("drain target {OPEN} of 0 sessions"),
        &format!("undrain target {OPEN}"),
        &format!("reload the configuration: changed {NEW}"),
        // The beginning; it is longer.
        "could not reload the configuration: configuration stays as it was: targets0.conf:4",
        "add account u1",
        &format!("bind account u1 to target {TARGET}"),
        &format!("delete target {NEW} by force"),
        "could not delete target number 9: there is no target with number 9",
        &format!("reload the configuration on SIGHUP: changed {TARGET}"),
    ];
    assert_eq!(texts.len(), expected.len(), "{texts:#?}");
    for (text, expected) in texts.iter().zip(expected) {
        let path = conf.display().to_string();
        let text = text.replace(&path, "targets0.conf");
        assert!(text.starts_with(expected), "{text}, not {expected}");
    }
    for (event, number) in events.iter().zip(0..) {
        let whose = match number {
            0 => user_name(user),
            10 => String::new(),
            _ => user_name(user_id()),
        };
        let user = event["user"].as_str().unwrap();
        assert!(user.starts_with(&whose), "{event}");
        assert_eq!(user.is_empty(), whose.is_empty(), "{event}");
        let address: SocketAddr = event["address"].as_str().unwrap().parse().unwrap();
        assert!(address.ip().is_loopback(), "{event}");
    }
    let log = bench.gateway.process.text();
    for text in texts {
        assert!(
            log.contains(text) || text.ends_with("..."),
            "{text}:\n{log}"
        );
    }
    assert!(!log.contains("passpasspass") && !json!(events).to_string().contains("passpasspass"));
}

/// A gateway does what it is told, and answers soon, when its cell cannot be reached; it says that that is not noted,
/// and notes it when the cell comes back.
#[test]
fn a_gateway_without_its_cell_notes_later() {
    let mut bench = Bench::new();
    for id in [0, 1] {
        bench.cell.kill(id);
    }
    let begin = Instant::now();
    let asked = 20;
    for _ in 0..asked {
        let answer = bench.json(&format!("undrain {OPEN}"));
        assert_eq!(answer["noted"], false, "{answer}");
        let reason = answer["not_noted"].as_str().unwrap();
        assert!(reason.contains("has not answered yet"), "{reason}");
    }
    let said = bench.pss(&format!("undrain {OPEN}")).done().stderr();
    assert!(said.contains("may be missing from 'pss events'"), "{said}");
    let warned = bench.tgtadm("--op new --mode account --user u1 --password passpasspass");
    let warned = warned.done().stderr();
    assert!(warned.contains("may be missing"), "{warned}");
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    for id in [0, 1] {
        bench.cell.start(id);
    }
    bench.cell.wait_current();
    wait_until("all of it is noted", PATIENCE, || {
        gateway_events(&bench.cell).len() == asked + 2
    });
    let answer = bench.json(&format!("undrain {OPEN}"));
    assert_eq!(answer["noted"], true, "{answer}");

    // Nor does stopping wait for the cell, but the log says what may be missing.
    for id in [0, 1] {
        bench.cell.kill(id);
    }
    bench.pss(&format!("drain {OPEN} --within 0")).done();
    let begin = Instant::now();
    bench.gateway.process.signal("TERM");
    assert_eq!(bench.gateway.process.ends(PATIENCE), Some(0));
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    let log = bench.gateway.process.text();
    let lost = format!("'drain target {OPEN} of 0 sessions' may be missing from 'pss events'");
    assert!(log.contains(&lost), "{log}");
}

/// What the cell's events have of gateways.
fn gateway_events(cell: &Cell) -> Vec<Value> {
    let outcome = cell.bench.run("pss", "events --json");
    let value: Value = serde_json::from_str(&outcome.done().stdout()).unwrap();
    let all = value["events"].as_array().unwrap().iter();
    let of_gateways = all.filter(|it| it["client"].as_str().unwrap().starts_with("pss-iscsi@"));
    of_gateways.cloned().collect()
}

fn user_id() -> u32 {
    let output = Command::new("id").arg("-u").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.trim().parse().unwrap()
}

fn user_name(id: u32) -> String {
    let output = Command::new("id").args(["-un", &id.to_string()]).output();
    String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
}

/// `nobody`, who is let in to the gateway, if we are root; else who we are.
fn other_user(bench: &Bench) -> u32 {
    const NOBODY: u32 = 65534;
    let own = user_id();
    if own != 0 {
        return own;
    }
    let programs = &bench.cell.bench;
    let open = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    open(&programs.path(""), 0o755);
    open(&bench.gateway.control, 0o666);
    NOBODY
}

/// `pss iscsi` of another user.
fn as_user(bench: &Bench, user: u32, args: &str) -> Outcome {
    // Where ours is others may not go.
    let program = bench.cell.bench.path("pss-copy");
    fs::copy(binaries::path("pss"), &program).unwrap();
    let mut command = Command::new(program);
    command
        .arg("iscsi")
        .arg("--control")
        .arg(&bench.gateway.control);
    command.args(args.split_whitespace()).stdin(Stdio::null());
    if user != user_id() {
        command.uid(user).gid(user);
    }
    Outcome(command.output().unwrap())
}
