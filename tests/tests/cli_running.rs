//! The programs against servers that run: `pssd` by itself, and a cell under `pss-up`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use pss_tests::binaries;
use pss_tests::iscsi_client::IscsiClient;
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout};
use pss_tests::programs::{Bench, Running};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// A cell of one server at an address of this test's own.
fn single(host: &str) -> Bench {
    let bench = Bench::new();
    bench.servers(format!("0 {host} /pss\n1 {host} /pss\n2 {host} /pss\n"));
    bench
}

fn pssd(bench: &Bench, args: &str) -> Running {
    Running::start(bench.command("pssd").args(args.split_whitespace()))
}

#[test]
fn start_on_a_wrong_directory() {
    let bench = single("127.0.3.1");
    bench
        .run("pssd", "start --id 0 --path none")
        .fails(1, &["none", "pssd format"]);
    fs::create_dir(bench.path("empty")).unwrap();
    bench
        .run("pssd", "start --id 0 --path empty")
        .fails(1, &["empty", "pssd format"]);
    bench.run("pssd", "format --id 0 --path data").done();
    bench.run("pssd", "start --id 1 --path data").fails(
        1,
        &["data: ", "belongs to server 0, not to server 1", "--id 0"],
    );
    bench.run("pss", "key new cell.key").done();
    bench
        .run("pssd", "start --id 0 --path data")
        .fails(1, &["data: ", "belongs to another cell", "--cell"]);
    bench
        .run("pssd", "format --id 0 --path data --force")
        .done();
    for copy in ["data/identity.0", "data/identity.1"] {
        let mut bytes = fs::read(bench.path(copy)).unwrap();
        // docs/formats.md: CRC32C at 8 of everything from 12, where the version is.
        bytes[12] = 9;
        let checksum = crc32c::crc32c(&bytes[12..]);
        bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
        fs::write(bench.path(copy), bytes).unwrap();
    }
    bench
        .run("pssd", "start --id 0 --path data")
        .fails(1, &["data: ", "format version 9", "newer pssd"]);
}

#[test]
fn start_on_a_directory_in_use() {
    let bench = single("127.0.3.2");
    bench.run("pssd", "format --id 0 --path data").done();
    let socket = UnixDatagram::bind(bench.path("notify")).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let mut command = bench.command("pssd");
    command.args(["start", "--id", "0", "--path", "data"]);
    let mut first = Running::start(command.env("NOTIFY_SOCKET", bench.path("notify")));
    let mut message = [0; 256];
    let length = socket.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"READY=1"));

    bench
        .run("pssd", "start --id 0 --path data")
        .fails(1, &["data", "in use"]);
    bench
        .run("pssd", "format --id 0 --path data --force")
        .fails(1, &["server 0 runs (pid", "stop it first"]);

    first.signal("TERM");
    assert_eq!(first.ends(SOON), Some(0));
    let length = socket.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"STOPPING=1"));
}

#[test]
fn start_with_a_taken_port() {
    let bench = single("127.0.3.3");
    bench.run("pssd", "format --id 0 --path data").done();
    let taken = UdpSocket::bind("127.0.3.3:4000").unwrap();
    bench
        .run("pssd", "start --id 0 --path data")
        .fails(1, &["127.0.3.3:4000"]);
    drop(taken);
    let _taken = TcpListener::bind("127.0.3.3:4010").unwrap();
    bench
        .run("pssd", "start --id 0 --path data")
        .fails(1, &["127.0.3.3:4010"]);
    let _taken = TcpListener::bind("127.0.3.3:10809").unwrap();
    for program in [
        "pss-nbd --listen",
        "pss-up --dir up --nbd",
        "pss-up --dir up --nbd 127.0.3.3:0 --iscsi",
    ] {
        let (program, flags) = program.split_once(' ').unwrap();
        bench
            .run(program, &format!("{flags} 127.0.3.3:10809"))
            .fails(
                1,
                &[
                    "127.0.3.3:10809",
                    "in use",
                    flags.split(' ').next_back().unwrap(),
                ],
            );
    }
}

#[test]
fn syslog_lines_have_the_tag() {
    let bench = single("127.0.3.4");
    bench.run("pssd", "format --id 2 --path data").done();
    let socket = UnixDatagram::bind(bench.path("log")).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let mut command = bench.command("pssd");
    command.args(["start", "--id", "2", "--path", "data", "--log", "syslog"]);
    let mut server = Running::start(command.env("PSS_SYSLOG_SOCKET", bench.path("log")));
    let mut message = [0; 4096];
    let length = socket.recv(&mut message).unwrap();
    let line = String::from_utf8_lossy(&message[..length]).into_owned();
    let tag = format!("pssd_2[{}]: ", server.pid());
    // Facility daemon is 3, times 8, plus the severity.
    assert!(line.starts_with("<2") || line.starts_with("<3"), "{line}");
    assert!(line.contains(&tag), "{line}");
    server.signal("INT");
    assert_eq!(server.ends(SOON), Some(0));
}

#[test]
fn one_server_of_three_is_no_majority() {
    let bench = single("127.0.3.5");
    bench.run("pssd", "format --id 1 --path data").done();
    let _server = pssd(&bench, "start --id 1 --path data");
    let expected = "No majority: 1 of 3 core servers answers (server 1); 2 are needed.";
    let end = Instant::now() + SOON;
    loop {
        let status = bench.run("pss", "status --timeout 1s");
        if status.stdout().starts_with(expected) {
            assert_eq!(status.0.status.code(), Some(6));
            break;
        }
        assert!(Instant::now() < end, "{}", status.stdout());
    }
    bench
        .run("pss", "volume list --timeout 1s")
        .fails(6, &[expected]);
}

/// A cell under `pss-up` at an address of its own.
struct Up {
    bench: Bench,
    running: Running,
    nbd: String,
}

impl Up {
    fn new(host: &str) -> Up {
        let bench = Bench::new();
        // As if a former run had chosen the address, so that tests never meet.
        let records: String = (0..3)
            .map(|id| {
                format!(
                    "{id} {host} {}\n",
                    bench.path(&format!("server{id}")).display()
                )
            })
            .collect();
        bench.servers(records);
        bench.run("pss", "key new cell.key").done();
        let (running, nbd) = Up::start(&bench);
        Up {
            bench,
            running,
            nbd,
        }
    }

    fn start(bench: &Bench) -> (Running, String) {
        let mut command = bench.command("pss-up");
        command.args([
            "--dir",
            ".",
            "--nbd",
            "127.0.0.1:0",
            "--iscsi",
            "127.0.0.1:0",
        ]);
        let mut running = Running::start(&mut command);
        let line = running.wait_for("nbd://", SOON);
        let nbd = line.split_once("nbd://").unwrap().1;
        let address = nbd.split('/').next().unwrap().to_owned();
        (running, address)
    }

    /// Waits until `pss status` starts with this.
    #[track_caller]
    fn status_is(&self, expected: &str) {
        let end = Instant::now() + SOON;
        loop {
            let text = self.bench.run("pss", "status").stdout();
            if text.starts_with(expected) {
                return;
            }
            assert!(Instant::now() < end, "{text}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn json(&self, args: &str) -> Value {
        let outcome = self.bench.run("pss", &format!("--json {args}"));
        serde_json::from_slice(&outcome.done().0.stdout).unwrap()
    }
}

#[test]
fn volumes_from_creation_to_deletion() {
    let up = Up::new("127.0.3.10");
    let pss = |args: &str| up.bench.run("pss", args);
    up.status_is("All 3 copies current. Any 1 server may fail.");
    let list = up.json("volume list");
    assert_eq!(list["schema"], "pss.volume.list/1");
    assert_eq!(list["volumes"][0]["name"], "vol001");
    assert_eq!(list["volumes"][0]["size_bytes"], 10u64 << 30);
    assert_eq!(list["volumes"][0]["allocated_bytes"], 0);

    pss("volume create small 1M --chunk-size 64K").done();
    pss("volume create small 2M").fails(4, &["small", "exists"]);
    pss("volume show none").fails(3, &["none", "pss volume list"]);
    pss("volume resize none 1G").fails(3, &["none"]);
    pss("volume delete none --yes").fails(3, &["none"]);
    pss("volume resize small +1M").done();
    let shown = up.json("volume show small");
    assert_eq!(shown["size_bytes"], 2 << 20);
    assert_eq!(shown["chunk_bytes"], 64 << 10);
    let (created, changed) = (&shown["created_ms"], &shown["changed_ms"]);
    assert!(created.as_u64() > Some(1_700_000_000_000), "{shown}");
    assert!(changed.as_u64() >= created.as_u64(), "{shown}");
    assert!(shown["changed"].as_str().unwrap().ends_with('Z'), "{shown}");
    let year = &shown["created"].as_str().unwrap()[..4];
    let text = pss("volume show small").done().stdout();
    assert!(text.contains(&format!("Created      {year}-")), "{text}");
    pss("volume resize small 1M").fails(2, &["smaller", "--allow-shrink"]);
    pss("volume resize small 65T").fails(2, &["at most"]);
    pss("volume resize small 1M --allow-shrink").done();
    assert_eq!(up.json("volume show small")["size_bytes"], 1 << 20);
    assert!(pss("volume list").done().stdout().contains("small"));
    pss("volume delete small").fails(2, &["Delete volume small", "--yes"]);
    pss("volume show small").done();
    pss("volume delete small --yes").done();
    pss("volume show small").fails(3, &["small"]);

    pss("key new other.key").done();
    pss("--key other.key volume list").fails(5, &["key"]);
}

#[test]
fn an_attached_volume_is_not_deleted() {
    let mut up = Up::new("127.0.3.11");
    let nbdsh = binaries::tool("nbdsh", "python3-libnbd");
    // It runs the first python3 of PATH, which has to be the system's.
    let path = "/usr/bin:/bin";
    // vol001 is a disk of the iSCSI target: in use while an initiator is logged in.
    let said = up.running.wait_for("iscsi://", SOON);
    let portal = said.split_once("iscsi://").unwrap().1.split('/').next();
    let portal = portal.unwrap().parse().unwrap();
    let target = "iqn.2001-03.jp.tritech:pss-up";
    let mut initiator = IscsiClient::login(portal, target, 1, SOON).unwrap();
    initiator.ready().unwrap();
    let refused = ["vol001", "attached by", "pss-up", "--force"];
    for change in ["delete vol001 --yes", "resize vol001 1G --allow-shrink"] {
        up.bench
            .run("pss", &format!("volume {change}"))
            .fails(4, &refused);
    }
    up.bench
        .run("pss", "volume resize vol001 1G --force")
        .fails(2, &["--allow-shrink"]);
    drop(initiator);
    let end = Instant::now() + SOON;
    let resize = "volume resize vol001 1G --allow-shrink";
    while up.bench.run("pss", resize).0.status.code() != Some(0) {
        assert!(Instant::now() < end);
    }
    up.bench.run("pss", "volume delete vol001 --yes").done();
    up.bench.run("pss", "volume create other 10G").done();
    let uri = format!("nbd://{}/other", up.nbd);
    let script = "import sys, time; print(h.get_size(), flush=True); time.sleep(60)";
    let mut command = std::process::Command::new(nbdsh);
    let mut client = Running::start(command.args(["-u", &uri, "-c", script]).env("PATH", path));
    client.wait_for("10737418240", SOON);
    up.bench
        .run("pss", "volume delete other --yes")
        .fails(4, &["other", "attached by"]);
    drop(client);
    let end = Instant::now() + SOON;
    while up
        .bench
        .run("pss", "volume delete other --yes")
        .0
        .status
        .code()
        != Some(0)
    {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_iscsi_server_of_pss_up_is_seen() {
    let up = Up::new("127.0.3.29");
    let targets = up.json("iscsi --control iscsi.sock targets");
    assert_eq!(targets["targets"][0]["state"], "ready");
    assert_eq!(targets["targets"][0]["luns"][0]["volume"], "vol001");
    up.bench
        .run("pss", "iscsi --control iscsi.sock reload")
        .fails(9, &["no configuration file"]);
}

#[test]
fn servers_are_stopped_one_by_one() {
    let mut up = Up::new("127.0.3.12");
    up.status_is("All 3 copies current.");
    let list = up.json("server list");
    assert_eq!(list["servers"][1]["answers"], true);
    assert_eq!(list["servers"][1]["tcp_port"], 4011);
    up.bench.run("pss", "server shutdown 2").done();
    up.status_is("Server 2 ");
    let status = up.json("status");
    assert_eq!(status["works"], true);
    assert_eq!(status["servers_that_may_fail"], 0);
    up.bench.run("pss", "volume create after 1M").done();
    up.bench
        .run("pss", "server shutdown 1")
        .fails(2, &["no majority is left", "--yes"]);
    up.bench.run("pss", "server shutdown 1 --yes").done();
    up.status_is("No majority: 1 of 3 core servers answers (server 0); 2 are needed.");
    let none = ["1 of 3 core servers answers (server 0)"];
    up.bench
        .run("pss", "volume create without 1M --timeout 2s")
        .fails(6, &none);
    // A leader answers reads until the lease that the others granted it ends.
    let end = Instant::now() + SOON;
    let refused = loop {
        let asked = up.bench.run("pss", "volume list --timeout 2s");
        if asked.0.status.code() != Some(0) || Instant::now() >= end {
            break asked;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    refused.fails(6, &none);
    up.running.signal("INT");
    assert_eq!(up.running.ends(SOON), Some(0));
}

#[test]
fn up_again_on_the_same_data() {
    let mut up = Up::new("127.0.3.13");
    up.bench.run("pss", "volume create kept 3M").done();
    let other = up
        .bench
        .run("pss-up", "--dir . --nbd 127.0.0.1:0 --iscsi 127.0.0.1:0");
    other.fails(1, &["another 'pss up' runs there", "--dir"]);
    up.running.signal("INT");
    assert_eq!(up.running.ends(SOON), Some(0), "{}", up.running.output());

    let said = up.running.output();
    // The disk of whoever runs this may be.
    let mut lines = said
        .lines()
        .filter(|line| !line.contains("the disk is nearly full"));
    assert!(
        !lines.any(|line| line.contains("WARN") || line.contains("ERROR")),
        "{said}"
    );

    (up.running, up.nbd) = Up::start(&up.bench);
    let list = up.json("volume list");
    let names: Vec<_> = list["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| &v["name"])
        .collect();
    assert_eq!(names, ["kept", "vol001"]);
    up.running.signal("TERM");
    assert_eq!(up.running.ends(SOON), Some(0), "{}", up.running.output());
}

#[test]
fn a_second_interrupt_ends_at_once() {
    let mut up = Up::new("127.0.3.14");
    up.status_is("All 3 copies current.");
    let mut client = NbdClient::connect(up.nbd.parse().unwrap(), "vol001", SOON).unwrap();
    // Without a majority the end of the gateway's session, which a clean stop waits for, takes seconds.
    up.bench.run("pss", "server shutdown 1").done();
    up.bench.run("pss", "server shutdown 2 --yes").done();
    client.submit(Command::Write, 0, 4096, &[1; 4096]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    up.running.signal("INT");
    std::thread::sleep(Duration::from_millis(100));
    up.running.signal("INT");
    assert_eq!(up.running.ends(SOON), Some(130), "{}", up.running.output());

    // It is as after a power cut: nothing that was answered is lost.
    (up.running, up.nbd) = Up::start(&up.bench);
    up.status_is("All 3 copies current.");
    up.running.signal("INT");
    assert_eq!(up.running.ends(SOON), Some(0), "{}", up.running.output());
}

#[test]
fn deletion_asks_on_a_terminal() {
    let up = Up::new("127.0.3.15");
    up.bench.run("pss", "volume create small 1M").done();
    let delete = |answer: &str| {
        let mut command = up.bench.command("pss");
        command.args(["volume", "delete", "small"]);
        let (mut running, mut person) = Running::start_on_terminal(&mut command);
        running.wait_for("Type yes to go on", SOON);
        assert!(running.output().contains("Delete volume small of 1M"));
        person.write_all(answer.as_bytes()).unwrap();
        let code = running.ends(SOON);
        (code, running.output().to_owned())
    };
    // The last one is Ctrl-D: no answer.
    for answer in ["no\n", "\n", "y\n", "yes, please\n", "\u{4}"] {
        let (code, said) = delete(answer);
        assert_eq!(code, Some(1), "{answer:?}: {said}");
        assert!(said.contains("nothing was done"), "{answer:?}: {said}");
        up.bench.run("pss", "volume show small").done();
    }
    let (code, said) = delete("yes\n");
    assert_eq!(code, Some(0), "{said}");
    up.bench
        .run("pss", "volume show small")
        .fails(3, &["small"]);
    // Half a terminal is none: nobody would see the question.
    let (_person, program) = pss_tests::programs::terminal();
    up.bench.run("pss", "volume create small 1M").done();
    let mut command = up.bench.command("pss");
    command.args(["volume", "delete", "small"]).stdin(program);
    let outcome = pss_tests::programs::Outcome(command.output().unwrap());
    outcome.fails(2, &["Delete volume small", "--yes"]);
}

#[test]
fn status_is_watched() {
    let up = Up::new("127.0.3.16");
    up.status_is("All 3 copies current.");
    let mut command = up.bench.command("pss");
    let mut text = Running::start(command.args(["status", "--watch"]));
    let mut command = up.bench.command("pss");
    let mut json = Running::start(command.args(["status", "--watch", "--json"]));
    for _ in 0..2 {
        text.wait_for("All 3 copies current. Any 1 server may fail.", SOON);
        json.wait_for("\"works\": true", SOON);
    }
    up.bench.run("pss", "server shutdown 2").done();
    text.wait_for("Server 2 ", SOON);
    up.bench.run("pss", "server shutdown 1 --yes").done();
    // Without a majority it goes on: it is there to see the servers come back.
    text.wait_for("No majority: 1 of 3 core servers answers", SOON);
    json.wait_for("\"works\": false", SOON);
    text.wait_for("No majority: 1 of 3 core servers answers", SOON);
    text.signal("INT");
    assert_eq!(text.ends(SOON), None, "ended by the signal");
    assert!(!text.output().contains('\u{1b}'), "no terminal, no colours");

    let mut command = up.bench.command("pss");
    let (mut screen, _person) = Running::start_on_terminal(command.args(["status", "--watch"]));
    screen.wait_for("\u{1b}[H\u{1b}[2JNo majority", SOON);
}

#[test]
fn up_chooses_other_ports_and_says_so() {
    let bench = Bench::new();
    // If somebody else has the usual port already, so much the better.
    let _taken = TcpListener::bind("127.0.0.1:10809");
    let _taken_too = TcpListener::bind("127.0.0.1:3260");
    let host = "127.0.3.17";
    bench.servers(format!("0 {host} {}\n", bench.path("server0").display()));
    bench.run("pss", "key new cell.key").done();
    let _udp = UdpSocket::bind((host, 4000)).unwrap();
    let mut command = bench.command("pss-up");
    command.args(["--dir", ".", "--volume", "a:1M", "--volume", "b c:2M"]);
    let mut running = Running::start(&mut command);
    running.wait_for("127.0.3.17:4000 is taken", SOON);
    let said = running.wait_for("127.0.0.1:10809 is taken", SOON);
    assert!(said.contains("NBD uses 127.0.0.1:108"), "{said}");
    let said = running.wait_for("127.0.0.1:3260 is taken", SOON);
    assert!(said.contains("iSCSI uses 127.0.0.1:32"), "{said}");
    let said = running.wait_for("PSS cell of 1 server at 127.0.", SOON);
    assert!(!said.contains(host), "{said}");
    running.wait_for("Volume a of 1M at nbd://127.0.0.1:108", SOON);
    let said = running.wait_for("Volume b c of 2M at nbd://127.0.0.1:108", SOON);
    let uri = format!("nbd://{}", said.split_once("nbd://").unwrap().1);
    let nbdinfo = binaries::tool("nbdinfo", "libnbd-bin");
    let output = std::process::Command::new(nbdinfo)
        .args(["--size", &uri])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"2097152\n", "{uri}");
    // The second volume is the second disk of the target.
    let said = running.wait_for(":pss-up/2", SOON);
    let url = said.trim().trim_start_matches("or ");
    let capacity = binaries::tool("iscsi-readcapacity16", "libiscsi-bin");
    let output = std::process::Command::new(capacity)
        .arg(url)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Total size:2097152"), "{url}: {output:?}");
    running.signal("INT");
    assert_eq!(running.ends(SOON), Some(0), "{}", running.output());
}

/// Who did what stays known, whoever leads; it is the same on all servers and in their logs.
#[test]
fn events_say_who_did_what() {
    let mut cell = Cell::started(Layout::small(3), "64M");
    let pss = |cell: &Cell, args: &str| cell.bench.run("pss", args);
    let mut follow = cell.bench.command("pss");
    follow.args(["events", "--follow", "--json", "--last", "0"]);
    let mut follow = Running::start(&mut follow);
    // It asks the cell for the last number first.
    std::thread::sleep(Duration::from_secs(1));
    pss(&cell, "volume create small 1M --chunk-size 64K").done();
    pss(&cell, "volume create small 2M").fails(4, &["exists"]);
    pss(&cell, "volume resize small +1M").done();
    pss(&cell, "volume resize small 1M").fails(2, &["--allow-shrink"]);
    pss(&cell, "volume resize small 1M --allow-shrink").done();
    // v is attached once somebody uses it.
    let client = cell.client(0);
    pss(&cell, "volume delete v --yes").fails(4, &["attached"]);
    pss(&cell, "volume delete small --yes").done();
    let leader = cell.leader();
    let stopped = (leader + 1) % 3;
    pss(&cell, &format!("server shutdown {stopped} --yes")).done();
    drop(client);

    let expected = [
        "created volume v (64M)".to_owned(),
        "created volume small (1M)".to_owned(),
        "resized volume small from 1M to 2M".to_owned(),
        "resized volume small from 2M to 1M".to_owned(),
        "deleted volume small (1M)".to_owned(),
        format!("stop server {stopped}"),
    ];
    let done = |cell: &Cell| -> Vec<String> {
        let events = events(cell);
        let done = events.iter().filter(|it| it["done"] == true);
        done.map(|it| it["text"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(done(&cell), expected);
    let all = events(&cell);
    let refused: Vec<_> = all.iter().filter(|it| it["done"] == false).collect();
    let reasons: Vec<_> = refused
        .iter()
        .map(|it| it["refused"].as_str().unwrap())
        .collect();
    assert!(
        reasons.contains(&"a volume of that name exists"),
        "{reasons:?}"
    );
    let user = all[0]["user"].as_str().unwrap().to_owned();
    let id = std::process::Command::new("id")
        .arg("-un")
        .output()
        .unwrap();
    let name = String::from_utf8_lossy(&id.stdout).trim().to_owned();
    assert!(user.starts_with(&name), "{user}");
    for (event, number) in all.iter().zip(1..) {
        assert_eq!(event["number"], number);
        assert_eq!(event["user"], user);
        assert!(
            event["client"].as_str().unwrap().starts_with("pss@"),
            "{event}"
        );
        let address: std::net::SocketAddr = event["address"].as_str().unwrap().parse().unwrap();
        assert!(address.ip().is_loopback() && address.port() > 0);
    }
    let text = pss(&cell, "events --last 1").done().stdout();
    let line = format!("Z  {user}@127.0.0.1  pss@");
    assert!(text.contains(&line) && text.lines().count() == 1, "{text}");

    // The one that was stopped, and the leader after it, come back; what they know is the same.
    cell.servers.remove(&stopped);
    cell.start(stopped);
    cell.wait_current();
    cell.kill(leader);
    assert_eq!(done(&cell), expected);
    assert_eq!(events(&cell), all);
    pss(&cell, "volume create late 1M").done();
    let line = follow.wait_for("created volume late", SOON);
    let last: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(last["schema"], "pss.events/1");
    assert_eq!(last["number"], all.len() as u64 + 1);
    let followed = follow.output().lines().count();
    assert_eq!(
        followed,
        all.len(),
        "all but the first, and the last: {}",
        follow.output()
    );
    follow.signal("INT");
    follow.ends(SOON);

    cell.start(leader);
    cell.wait_current();
    for id in 0..3 {
        let log = fs::read_to_string(cell.bench.path(&format!("pssd{id}.log"))).unwrap();
        for text in expected
            .iter()
            .map(String::as_str)
            .chain(["created volume late"])
        {
            assert!(
                log.contains(text),
                "server {id} did not log '{text}':\n{log}"
            );
        }
    }
    // Without a majority a server is stopped all the same.
    for id in [leader, stopped] {
        cell.kill(id);
    }
    let left = 3 - leader - stopped;
    let outcome = pss(&cell, &format!("server shutdown {left} --yes --timeout 2s"));
    assert!(
        outcome
            .done()
            .stderr()
            .contains("may be missing from 'pss events'"),
        "{}",
        outcome.stderr()
    );
}

fn events(cell: &Cell) -> Vec<Value> {
    let outcome = cell.bench.run("pss", "events --json");
    let value: Value = serde_json::from_slice(&outcome.done().0.stdout).unwrap();
    assert_eq!(value["schema"], "pss.events/1");
    value["events"].as_array().unwrap().clone()
}
