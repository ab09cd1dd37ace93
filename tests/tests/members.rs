//! Servers come and go while clients write.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use pss_tests::load::Load;
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};
use serde_json::Value;

/// Load between two changes.
const CALM: Duration = Duration::from_millis(800);

/// A line of server.conf.
fn line(cell: &Cell, id: u8) -> String {
    format!("{id} {} {}", cell.host(id), cell.path(id).display())
}

/// Three servers of which server.conf knows; the new ones have a list of their own.
fn cell() -> Cell {
    let cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let lines: Vec<String> = [0, 1, 2, 3, 4, 5].map(|id| line(&cell, id)).into();
    fs::write(cell.bench.path("all.conf"), lines.join("\n") + "\n").expect("it can be written");
    cell
}

fn add(cell: &mut Cell, id: u8) {
    let format = format!("format --servers all.conf --id {id}");
    cell.bench.run("pssd", &format).done();
    cell.start_by(id, "all.conf");
    let add = format!(
        "server add {id} {} {}",
        cell.host(id),
        cell.path(id).display()
    );
    let done = cell.bench.run("pss", &add);
    done.done();
}

fn remove(cell: &mut Cell, id: u8) {
    let done = cell.bench.run("pss", &format!("server remove {id} --yes"));
    done.done();
    cell.stop(id);
}

/// Ids of the servers that vote, as the cell says.
fn core(cell: &Cell) -> Vec<u64> {
    let status = cell.status().expect("the cell works");
    let servers = status["servers"].as_array().expect("a list");
    let core = servers.iter().filter(|it| it["core"] == true);
    core.filter_map(|it| it["id"].as_u64()).collect()
}

fn can_lose(cell: &Cell) -> Value {
    cell.status().expect("the cell works")["servers_that_may_fail"].clone()
}

/// Somebody leads, after whoever led was stopped.
fn wait_works(cell: &Cell) {
    wait_until("the cell works", PATIENCE, || {
        cell.status().is_some_and(|it| it["works"] == true)
    });
}

/// From three to five core servers and back to three others, whose files say nothing of it, with nothing lost.
#[test]
fn three_to_five_and_back_under_load() {
    let mut cell = cell();
    let load = Load::start(vec![cell.nbd(0)], 4, 5);
    std::thread::sleep(CALM);
    add(&mut cell, 3);
    assert_eq!(core(&cell), [0, 1, 2, 3]);
    std::thread::sleep(CALM);
    add(&mut cell, 4);
    assert_eq!(core(&cell), [0, 1, 2, 3, 4]);
    cell.wait_current();
    assert_eq!(can_lose(&cell), 2);
    add(&mut cell, 5);
    std::thread::sleep(CALM);
    // Two of those that were there first may go at once now.
    let fault = load.now();
    cell.kill(0);
    cell.kill(1);
    load.wait_served("three of five are left", fault, Duration::from_secs(20));
    cell.start(0);
    cell.start(1);
    cell.wait_current();
    // The leader goes as well: it hands over first.
    let leader = cell.leader();
    let goes = [leader, if leader == 1 { 2 } else { 1 }];
    for id in goes {
        remove(&mut cell, id);
        std::thread::sleep(CALM);
    }
    assert_eq!(core(&cell).len(), 3);
    cell.wait_current();
    assert_eq!(can_lose(&cell), 1);
    // What was changed lies in the log, not in server.conf: all start again.
    let left: Vec<u8> = cell.servers.keys().copied().collect();
    for id in &left {
        cell.kill(*id);
    }
    for id in &left {
        cell.start_by(*id, "all.conf");
    }
    cell.wait_current();
    assert_eq!(core(&cell).len(), 3);
    std::thread::sleep(CALM);
    let mut history = load.finish();
    let mut client = cell.client(0);
    history.read_all(&mut client);
    history.check();
    let size = 64 << 20;
    let learner = 5;
    for id in left.iter().chain([&learner]) {
        cell.stop(*id);
    }
    let first = cell.content(left[0], "v", 1 << 20, size);
    for id in &left[1..] {
        assert!(
            cell.content(*id, "v", 1 << 20, size) == first,
            "server {id}"
        );
    }
}

/// A machine with another address takes the place of one that has died.
#[test]
fn a_server_is_replaced_at_another_address() {
    let mut cell = cell();
    cell.kill(1);
    wait_works(&cell);
    fs::remove_dir_all(cell.path(1)).expect("it is there");
    let (host, path) = (cell.host(7), cell.bench.path("elsewhere"));
    let place = format!("{host} {}", path.display());
    cell.bench
        .run("pss", &format!("server replace 1 {place}"))
        .done();
    let lines = [line(&cell, 0), format!("1 {place}"), line(&cell, 2)];
    fs::write(cell.bench.path("new.conf"), lines.join("\n") + "\n").expect("it can be written");
    let format = cell
        .bench
        .run("pssd", "format --servers new.conf --id 1 --replace");
    format.done();
    cell.start_by(1, "new.conf");
    // Whoever still has the old file asks the others.
    let file = fs::read(cell.bench.path("new.conf")).expect("it is there");
    fs::write(cell.bench.path("server.conf"), file).expect("it can be written");
    cell.wait_current();
    cell.stop(0);
    wait_works(&cell);
}

/// What makes no sense is refused, and says why.
#[test]
fn changes_that_make_no_sense() {
    let mut cell = cell();
    let host = cell.host(3);
    let refusals = [
        (
            format!("server add 1 {host} /x"),
            4,
            "server 1 belongs to the cell already",
        ),
        (
            format!("server add 3 {host} x"),
            2,
            "does not start with '/'",
        ),
        (
            "server add 3 no.such.name.invalid /x".to_owned(),
            2,
            "cannot be resolved",
        ),
        (
            "server add 3 0.0.0.0 /x".to_owned(),
            2,
            "no server's address",
        ),
        (format!("server add 8 {host} /x"), 2, "8"),
        (
            "server remove 4 --yes".to_owned(),
            3,
            "server 4 is none of the cell's",
        ),
        (
            "server remove 1".to_owned(),
            2,
            "there is no terminal to ask on",
        ),
        (
            format!("server replace 4 {host} /x"),
            3,
            "'pss server add' adds one",
        ),
        (format!("server replace 1 {host} /x"), 4, "server 1 runs"),
    ];
    for (command, code, text) in &refusals {
        cell.bench.run("pss", command).fails(*code, &[text]);
    }
    // One that is not there does not come to vote, and nobody waits for it.
    let mut waits = cell.bench.command("pss");
    waits.args(["server", "add", "3", &host.to_string(), "/x"]);
    let mut waits = waits
        .stderr(Stdio::piped())
        .spawn()
        .expect("pss can be started");
    std::thread::sleep(Duration::from_secs(3));
    waits.kill().expect("it waits");
    let said = waits.wait_with_output().expect("it has ended").stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("belongs to the cell and learns"), "{said}");
    assert_eq!(core(&cell), [0, 1, 2]);
    let told = cell.bench.run("pss", "status");
    let told = told.stdout();
    assert!(told.contains("add the line '3 "), "{told}");
    cell.bench.run("pss", "server remove 3 --yes").done();
    // Without two of three nothing can be changed, and none of two that are needed goes.
    cell.stop(0);
    wait_works(&cell);
    let needed = cell.bench.run("pss", "server remove 1 --yes");
    needed.fails(
        6,
        &["without server 1 the cell would need 2 of servers 0 and 2"],
    );
    cell.stop(1);
    let no_majority = cell.bench.run("pss", "server remove 1 --yes");
    no_majority.fails(6, &["No majority"]);
}
