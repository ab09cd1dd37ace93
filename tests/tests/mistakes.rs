//! What a person can get wrong with server.conf and data directories: a directory is copied and both copies are started, a server is
//! started with an old server.conf. Nothing that was answered may be lost, and somebody has to say what is wrong.

use std::fs;
use std::path::PathBuf;
use std::process::Command as Program;
use std::time::Duration;

use pss_tests::load::Load;
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};

/// The cell serves everybody again after this time at most.
const RETURN: Duration = Duration::from_secs(25);

fn copy(cell: &Cell, id: u8) -> PathBuf {
    let copy = cell.bench.path(&format!("copy{id}"));
    let mut cp = Program::new("cp");
    let copied = cp.arg("-a").args([&cell.path(id), &copy]).status();
    assert!(copied.expect("there is cp").success());
    copy
}

/// server.conf as on a machine where server `id` is meant to be: at an address that the others do not know.
fn elsewhere(cell: &Cell, id: u8) -> PathBuf {
    let host = |other: u8| cell.host(if other == id { 7 } else { other });
    let lines =
        (0..3).map(|other| format!("{other} {} {}\n", host(other), cell.path(other).display()));
    let conf = cell.bench.path("elsewhere.conf");
    fs::write(&conf, lines.collect::<String>()).expect("it can be written");
    conf
}

fn start_copy(cell: &Cell, id: u8, path: &PathBuf) -> Process {
    let mut command = cell.bench.command("pssd");
    command.env("PSS_SERVERS", elsewhere(cell, id));
    command
        .args(["start", "--id", &id.to_string(), "--path"])
        .arg(path);
    command.args(cell.layout.flags.split_whitespace());
    let output = cell.bench.path(&format!("copy{id}.log"));
    Process::start(&format!("another pssd {id}"), &mut command, output)
}

/// Two machines run copies of one data directory. While both are heard neither counts; with one of them gone the other does.
#[test]
fn two_servers_with_one_directory() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], 4, 1);
    load.wait_served("the start", load.now(), RETURN);
    cell.stop(2);
    let path = copy(&cell, 2);
    cell.start(2);
    cell.wait_current();
    let mut other = start_copy(&cell, 2, &path);
    for id in [0, 1] {
        wait_until("both are heard", PATIENCE, || {
            assert!(other.runs(), "{}", other.text());
            let log = cell.servers[&id].text();
            log.contains("two processes say that they are server 2 (connected from")
        });
    }
    let status = cell.bench.run("pss", "status").stdout();
    assert!(
        status.contains("they are server 2, so neither counts: stop one of them"),
        "{status}"
    );
    load.wait_served("two of them", load.now(), RETURN);
    // So without one of the others there is no majority, though two claim to be the third.
    cell.kill(0);
    std::thread::sleep(Duration::from_secs(3));
    let fault = load.now();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(load.served_since(fault), 0, "one of the two has counted");
    other.kill();
    load.wait_served("one of them is gone", fault, RETURN);
    cell.start(0);
    cell.wait_current();
    let mut history = load.finish();
    history.read_all(&mut cell.client(0));
    history.check();
}

/// A server is replaced on another machine, whose address nobody was told, while the old one runs. The old one finds out, and does
/// not count any more; the others go on.
#[test]
fn a_replacement_beside_the_original() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let load = Load::start(vec![cell.nbd(0)], 4, 2);
    load.wait_served("the start", load.now(), RETURN);
    cell.wait_current();
    if cell.leader() == 2 {
        cell.stop(2);
        cell.start(2);
        cell.wait_current();
    }
    let (conf, path) = (elsewhere(&cell, 2), cell.bench.path("copy2"));
    let format = format!(
        "format --replace --id 2 --servers {} --path {}",
        conf.display(),
        path.display()
    );
    cell.bench.run("pssd", &format).done();
    let _other = start_copy(&cell, 2, &path);
    wait_until("the original finds out", PATIENCE, || {
        let log = cell.servers[&2].text();
        log.contains("another data directory has taken the place of this one")
    });
    load.wait_served("the two others", load.now(), RETURN);
    // The original is one copy no more: what it acknowledges is worth nothing.
    cell.kill(0);
    std::thread::sleep(Duration::from_secs(3));
    let fault = load.now();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(load.served_since(fault), 0, "the original has counted");
    cell.start(0);
    load.wait_served("both others again", fault, RETURN);
    let mut history = load.finish();
    history.read_all(&mut cell.client(0));
    history.check();
}

/// Servers that are started with an older server.conf go by the list in the cell's log, and say which lines to change.
#[test]
fn an_old_list_of_servers() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let line =
        |cell: &Cell, id: u8| format!("{id} {} {}\n", cell.host(id), cell.path(id).display());
    let write = |cell: &Cell, name: &str, ids: &[u8]| {
        let lines: String = ids.iter().map(|id| line(cell, *id)).collect();
        fs::write(cell.bench.path(name), lines).expect("it can be written");
    };
    write(&cell, "all.conf", &[0, 1, 2, 3, 4]);
    write(&cell, "alone.conf", &[0]);
    write(&cell, "removed.conf", &[0, 1, 2, 3, 4, 5]);
    let load = Load::start(vec![cell.nbd(0)], 4, 3);
    load.wait_served("the start", load.now(), RETURN);
    for id in [3, 4] {
        let format = format!("format --servers all.conf --id {id}");
        cell.bench.run("pssd", &format).done();
        cell.start_by(id, "all.conf");
        let place = format!("{} {}", cell.host(id), cell.path(id).display());
        cell.bench
            .run("pss", &format!("server add {id} {place}"))
            .done();
    }
    cell.wait_current();
    for id in 0..5 {
        cell.kill(id);
    }
    // By server.conf one of these would be a majority, and so would both.
    cell.start_by(0, "alone.conf");
    cell.start(1);
    std::thread::sleep(Duration::from_secs(3));
    let fault = load.now();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(load.served_since(fault), 0, "two of five have served");
    cell.start_by(2, "removed.conf");
    let says = |id: u8, part: &str| {
        wait_until(part, PATIENCE, || cell.servers[&id].text().contains(part));
    };
    for part in [
        "server 1 belongs to the cell and is not in this server's server.conf: add its line",
        "server 4 belongs to the cell and is not in this server's server.conf: add its line",
    ] {
        says(0, part);
    }
    says(
        2,
        "server 5 is in this server's server.conf and does not belong to the cell: take its line out",
    );
    let right = cell.servers[&1].text();
    assert!(!right.contains("server 2 belongs to the cell and is not"));
    // The log does not say where server 1 is, so this one reached nobody.
    cell.stop(0);
    cell.start(0);
    load.wait_served("three of five", fault, RETURN);
    cell.start_by(3, "all.conf");
    cell.start_by(4, "all.conf");
    cell.wait_current();
    let mut history = load.finish();
    history.read_all(&mut cell.client(0));
    history.check();
}

/// A server that is started with a list in which it is alone is no cell of its own, though the servers have never changed.
#[test]
fn a_list_of_one_server() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let line = format!("0 {} {}\n", cell.host(0), cell.path(0).display());
    fs::write(cell.bench.path("alone.conf"), line).expect("it can be written");
    let load = Load::start(vec![cell.nbd(0)], 4, 4);
    load.wait_served("the start", load.now(), RETURN);
    cell.wait_current();
    cell.stop(0);
    let before = fs::read_to_string(cell.bench.path("pssd0.log")).expect("it has run");
    cell.start_by(0, "alone.conf");
    wait_until("it says what is wrong", PATIENCE, || {
        let part = "server 1 belongs to the cell and is not in this server's server.conf";
        cell.servers[&0].text().contains(part)
    });
    std::thread::sleep(Duration::from_secs(2));
    let log = cell.servers[&0].text().split_off(before.len());
    assert!(!log.contains("leads under"), "{log}");
    load.wait_served("the two others", load.now(), RETURN);
    cell.stop(0);
    cell.start(0);
    cell.wait_current();
    let mut history = load.finish();
    history.read_all(&mut cell.client(0));
    history.check();
}
