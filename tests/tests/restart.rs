//! `pssd start --restart`: a person says whose data a server begins with, and what is refused because it would lose something.

use std::fs;
use std::io::Write;
use std::process::Command as Program;
use std::time::Duration;

use pss_tests::nbd_client::Command;
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};
use pss_tests::programs::Running;

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

fn write(cell: &Cell, block: u64, byte: u8) {
    let mut client = cell.client(0);
    let data = [byte; BLOCK];
    let reply = client.request(Command::Write, block * BLOCK as u64, BLOCK as u32, &data);
    assert_eq!(reply.expect("the gateway serves").error, 0);
}

fn read(cell: &Cell, block: u64) -> u8 {
    let mut client = cell.client(0);
    let reply = client.request(Command::Read, block * BLOCK as u64, BLOCK as u32, &[]);
    let reply = reply.expect("the gateway serves");
    assert_eq!(reply.error, 0);
    reply.data[0]
}

/// More than the logs of the others hold.
fn write_much(cell: &Cell, byte: u8) {
    let mut client = cell.client(0);
    let data = vec![byte; MIB];
    for round in 0..3 {
        for place in 0..48_u64 {
            let offset = (1 << 20) + place * MIB as u64;
            let reply = client.request(Command::Write, offset, MIB as u32, &data);
            assert_eq!(reply.expect("the gateway serves").error, 0, "{round}");
        }
    }
}

fn wait_works(cell: &Cell) {
    wait_until("the cell works", PATIENCE, || {
        cell.status().is_some_and(|it| it["works"] == true)
    });
}

fn restart(cell: &Cell, id: u8, how: &str) -> Program {
    let mut command = cell.bench.command("pssd");
    command.args(["start", "--id", &id.to_string(), "--restart"]);
    command.args(how.split_whitespace());
    command.args(cell.layout.flags.split_whitespace());
    command
}

/// Refused before a port is opened; nothing has changed.
#[track_caller]
fn refused(cell: &Cell, id: u8, how: &str, code: i32, parts: &[&str]) {
    let identity = || fs::read(cell.path(id).join("identity.0")).expect("it is formatted");
    let before = identity();
    let output = restart(cell, id, how).output().expect("it can be run");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "no '{part}' in: {said}");
    }
    assert!(before == identity(), "the directory has changed");
}

/// `pssd start --restart ...`, which goes on.
fn begin(cell: &mut Cell, id: u8, how: &str) {
    let mut command = restart(cell, id, how);
    let output = cell.bench.path(&format!("pssd{id}.log"));
    let process = Process::start(&format!("pssd {id}"), &mut command, output);
    cell.servers.insert(id, process);
}

fn log(cell: &Cell, id: u8) -> String {
    cell.servers[&id].text()
}

/// Two of three are gone. The third goes on with what it has, though another that is there has a newer log.
#[test]
fn its_own_data_are_the_truth() {
    let layout = Layout {
        learners: 1,
        ..Layout::small(3)
    };
    let mut cell = Cell::started(layout, "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    // Who runs is no case for it, and while others are a majority it is none for anybody.
    refused(
        &cell,
        0,
        "--yes",
        1,
        &["server 0 runs (pid ", "stop it first"],
    );
    // What it holds is an old backup in the end.
    cell.stop(0);
    let (path, backup) = (cell.path(0), cell.bench.path("backup"));
    let copied = Program::new("cp").arg("-a").args([&path, &backup]).status();
    assert!(copied.expect("there is cp").success());
    cell.start(0);
    wait_works(&cell);
    write(&cell, 3, 0x55);
    cell.wait_current();
    cell.stop(0);
    fs::remove_dir_all(&path).expect("it is there");
    fs::rename(&backup, &path).expect("it is there");
    wait_works(&cell);
    let alive = [
        "nothing is lost",
        "servers 1 and 2 answer",
        "with server 0 a majority of the core servers 0, 1 and 2",
        "without --restart",
    ];
    refused(&cell, 0, "--yes", 1, &alive);
    // The learner has what was written since; nobody who votes is left but this one.
    write(&cell, 2, 0x22);
    wait_until("the learner has it", PATIENCE, || {
        let status = cell.status().expect("somebody answers");
        let servers = status["servers"].as_array().expect("a list");
        let at = |id: u8, what: &str| {
            let found = servers.iter().find(|it| it["id"] == id);
            found.expect("it is listed")["status"][what].as_u64()
        };
        at(5, "applied") >= at(cell.leader(), "chosen")
    });
    // One is enough with this one.
    cell.kill(1);
    let alive = ["server 2 answers", "with server 0 a majority"];
    refused(&cell, 0, "--yes", 1, &alive);
    cell.kill(2);
    wait_until("nobody leads", PATIENCE, || {
        cell.status().is_none_or(|it| it["leader"].is_null())
    });

    // It shows what is given up, and asks.
    let output = restart(&cell, 0, "").output().expect("it can be run");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("there is no terminal to ask on"), "{said}");
    for part in [
        "this one",
        "That of server 5, which answers",
        "is newer by",
        "given up",
    ] {
        assert!(shown.contains(part), "no '{part}' in: {shown}");
    }
    for (answer, goes_on) in [("yes", false), ("give up", true)] {
        let mut command = restart(&cell, 0, "");
        let (mut server, mut person) = Running::start_on_terminal(&mut command);
        server.wait_for("LAST SLOT", PATIENCE);
        writeln!(person, "{answer}").expect("it listens");
        match goes_on {
            false => {
                server.wait_for("nothing was done", PATIENCE);
                assert_eq!(server.ends(PATIENCE), Some(1));
            }
            true => {
                server.wait_for("leads and serves", PATIENCE);
                server.signal("KILL");
            }
        }
    }
    // What was done stays done: it is its own majority now, and needs no thought.
    let again = [
        "server 0 is a majority of the core servers 0 itself",
        "without --restart",
    ];
    refused(&cell, 0, "--yes", 1, &again);
    cell.start(0);
    wait_works(&cell);
    wait_until("the volume can be opened", PATIENCE, || {
        cell.connect(0).is_ok()
    });
    assert_eq!(
        (read(&cell, 1), read(&cell, 2), read(&cell, 3)),
        (0x11, 0, 0)
    );
    write(&cell, 2, 0x33);
    // Those that were given up never count again.
    cell.start(1);
    cell.start(2);
    for id in [1, 2, 5] {
        wait_until("it is told", PATIENCE, || {
            log(&cell, id).contains("recovered without this server (loss epoch 1)")
        });
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cell.leader(), 0);
    assert_eq!(read(&cell, 2), 0x33);
    // Nor are their data the truth, whatever a person says.
    cell.stop(1);
    cell.stop(2);
    refused(&cell, 1, "--yes", 1, &["has not got all data itself"]);
    cell.kill(0);
    refused(&cell, 2, "--yes", 1, &["has not got all data itself"]);
}

/// Others that are left get what the server holds, and vote again.
#[test]
fn those_that_are_left_learn() {
    let layout = Layout {
        learners: 1,
        ..Layout::small(5)
    };
    let mut cell = Cell::started(layout, "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    // The leader has the newest log.
    let leader = cell.leader();
    for id in [0, 1, 2, 3, 4, 5] {
        cell.kill(id);
    }
    let other = (leader + 1) % 5;
    cell.start(other);
    cell.start(5);
    wait_until("they answer", PATIENCE, || {
        let status = cell.status();
        let servers = status.as_ref().and_then(|it| it["servers"].as_array());
        let answer = |it: &&serde_json::Value| it["status"].is_object();
        servers.is_some_and(|it| it.iter().filter(answer).count() == 2)
    });
    begin(&mut cell, leader, "--yes");
    wait_until("the other one votes again", PATIENCE, || {
        log(&cell, leader).contains("The cell works without servers")
    });
    let status = cell.status().expect("the cell works");
    let servers = status["servers"].as_array().expect("a list");
    let core = servers.iter().filter(|it| it["core"] == true);
    let core: Vec<u64> = core.filter_map(|it| it["id"].as_u64()).collect();
    let mut expected = [u64::from(leader), u64::from(other)];
    expected.sort_unstable();
    assert_eq!(core, expected);
    cell.wait_current();
    wait_until("the volume can be opened", PATIENCE, || {
        cell.connect(0).is_ok()
    });
    assert_eq!(read(&cell, 1), 0x11);
    write(&cell, 2, 0x22);
    let events = cell.bench.run("pss", "events").done().stdout();
    assert!(events.contains("loss epoch 1"), "{events}");
    // It is one copy of two now.
    cell.wait_current();
    for id in [leader, other, 5] {
        cell.stop(id);
    }
    let content = |id| cell.content(id, "v", MIB, 2 * BLOCK * 2);
    assert!(content(leader) == content(other) && content(leader) == content(5));
}

/// Two people do it at once, on servers that hear each other: nobody wins in silence.
#[test]
fn two_at_once() {
    let mut cell = Cell::started(Layout::small(5), "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    for id in 0..5 {
        cell.kill(id);
    }
    begin(&mut cell, 0, "--yes");
    begin(&mut cell, 1, "--yes");
    // Whoever looks second sees the other one, or that it has gone again.
    let mut refused_one = [false; 2];
    wait_until("one of them is refused", PATIENCE, || {
        for id in [0, 1] {
            let server = cell.servers.get_mut(&id).expect("it was started");
            refused_one[usize::from(id)] = !server.runs();
        }
        refused_one.contains(&true)
    });
    std::thread::sleep(Duration::from_secs(4));
    let ids = [0, 1].into_iter();
    for id in ids.filter(|id| refused_one[usize::from(*id)]) {
        let (said, other) = (log(&cell, id), 1 - id);
        let told = format!("nothing was done: since it was asked, server {other} has come up");
        assert!(said.contains(&told), "{said}");
    }
    let won = [0, 1].map(|id| log(&cell, id).contains("were given up"));
    assert_ne!(won, [true, true]);
    // The second one is later: the first leads.
    let first = if won[1] { 1 } else { 0 };
    if !won.contains(&true) {
        begin(&mut cell, first, "--yes");
    }
    wait_works(&cell);
    let told = [
        format!("the cell was recovered without server {}", 1 - first),
        "loss epoch 1".to_owned(),
    ];
    refused(
        &cell,
        1 - first,
        "--yes",
        1,
        &told.each_ref().map(String::as_str),
    );
    wait_until("the volume can be opened", PATIENCE, || {
        cell.connect(0).is_ok()
    });
    assert_eq!(read(&cell, 1), 0x11);
}

/// A server that starts hears the others though they do not answer whoever asks.
#[test]
fn a_majority_that_only_servers_hear() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    cell.stop(0);
    wait_works(&cell);
    // To whoever asks at other addresses nobody is there.
    let lines: Vec<String> = (0..3)
        .map(|id| match id {
            0 => format!("0 {} {}", cell.host(0), cell.path(0).display()),
            id => format!("{id} 127.9.9.{id} /pss"),
        })
        .collect();
    fs::write(cell.bench.path("wrong.conf"), lines.join("\n")).expect("it can be written");
    let mut command = restart(&cell, 0, "--yes");
    command.env("PSS_SERVERS", cell.bench.path("wrong.conf"));
    let output = cell.bench.path("pssd0.log");
    let mut process = Process::start("pssd 0", &mut command, output);
    // The others know where server 0 is, and tell it that they are there.
    assert_eq!(process.ends(PATIENCE), Some(1), "{}", process.text());
    let said = process.text();
    assert!(
        said.contains("hears a majority") || said.contains("nothing is lost"),
        "{said}"
    );
    write(&cell, 2, 0x22);
    cell.start(0);
    cell.wait_current();
    assert_eq!((read(&cell, 1), read(&cell, 2)), (0x11, 0x22));
}

/// A server drops what it has, and takes the data of one that a person names.
#[test]
fn the_data_of_another() {
    let layout = Layout {
        learners: 1,
        ..Layout::small(3)
    };
    let mut cell = Cell::started(layout, "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    let leader = cell.leader();
    let others: Vec<u8> = (0..3).filter(|id| *id != leader).collect();
    let (me, other) = (others[0], others[1]);

    refused(&cell, me, "autonomic --yes", 1, &["runs (pid "]);
    cell.stop(me);
    let itself = format!("autonomic {me} --yes");
    refused(&cell, me, &itself, 2, &["that is this server itself"]);
    refused(
        &cell,
        me,
        "autonomic 4 --yes",
        2,
        &["server 4 is none of the cell's"],
    );
    refused(&cell, me, "autonomic 9 --yes", 2, &["a number from 0 to 7"]);
    refused(
        &cell,
        me,
        "2 --yes",
        2,
        &["--restart 2: use --restart alone"],
    );
    refused(
        &cell,
        me,
        "autonomic",
        2,
        &["no terminal", "no further server may fail"],
    );
    // What it would drop might be the only copy.
    cell.kill(other);
    let alive = [
        "nothing was dropped: 2 other core servers with all data must be there",
        "and of the core servers 1 with all data",
        "may be needed",
    ];
    let from_leader = format!("autonomic {leader} --yes");
    refused(&cell, me, &from_leader, 1, &alive);
    refused(&cell, me, "autonomic --yes", 1, &alive);
    cell.start(other);
    wait_works(&cell);
    write_much(&cell, 0x44);

    // From each in turn, though a follower or the learner would be asked otherwise.
    let leader = cell.leader();
    for (source, how) in [
        (leader, "autonomic".to_owned()),
        (leader, format!("autonomic {leader}")),
        (other, format!("autonomic {other}")),
        (5, "autonomic 5".to_owned()),
    ] {
        wait_until("the others are there", PATIENCE, || {
            cell.status().is_some_and(|it| it["works"] == true)
        });
        let before = fs::read_to_string(cell.bench.path(&format!("pssd{me}.log")));
        let before = before.unwrap_or_default().len();
        begin(&mut cell, me, &format!("{how} --yes"));
        cell.wait_current();
        let text = log(&cell, me).split_off(before);
        let told = format!("copying chunks from server {source}");
        assert_eq!(
            text.matches("copying chunks from server").count(),
            1,
            "{text}"
        );
        assert!(text.contains(&told), "no '{told}' in {text}");
        assert!(text.contains("votes and counts again"), "{text}");
        assert_eq!(cell.leader(), leader, "nobody else had to notice");
        cell.stop(me);
    }

    // One that has to learn anyway has nothing to drop.
    cell.format(me, "--replace --force");
    let identity = || fs::read(cell.path(me).join("identity.0")).expect("it is formatted");
    let before = identity();
    refused(&cell, me, &format!("autonomic {me} --yes"), 2, &["itself"]);
    begin(&mut cell, me, &format!("autonomic {other} --yes"));
    wait_until("it goes on learning", PATIENCE, || {
        log(&cell, me).contains("has no data that count, and goes on learning them")
    });
    cell.wait_current();
    // Its incarnation is that of before.
    let identity = fs::read(cell.path(me).join("identity.0")).expect("it is formatted");
    assert_eq!(identity[32 + 24..32 + 32], before[32 + 24..32 + 32]);
}
