//! The bad days, as a person lives through them: disks that are lost.

use std::fs;

use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};

const MIB: usize = 1 << 20;
/// Chunks are small, so that there are many.
const VOLUME: &str = "64M --chunk-size 64K";
const SIZE: usize = 64 * MIB;

/// What a volume holds after `round`: every block something else.
fn pattern(round: u8) -> Vec<u8> {
    let block = |number: usize| {
        let mut bytes = vec![round; 4096];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    (0..SIZE / 4096).flat_map(block).collect()
}

fn write_all(client: &mut NbdClient, data: &[u8]) {
    for (number, part) in data.chunks(MIB).enumerate() {
        let offset = (number * MIB) as u64;
        let reply = client.request(Command::Write, offset, part.len() as u32, part);
        assert_eq!(reply.expect("the gateway serves").error, 0);
    }
}

fn read_all(client: &mut NbdClient) -> Vec<u8> {
    let parts = (0..SIZE / MIB).flat_map(|number| {
        let offset = (number * MIB) as u64;
        let reply = client.request(Command::Read, offset, MIB as u32, &[]);
        let reply = reply.expect("the gateway serves");
        assert_eq!(reply.error, 0);
        reply.data
    });
    parts.collect()
}

/// A server whose disk is lost learns everything from the others. Afterwards another may be lost for good.
#[test]
fn a_lost_disk_is_replaced() {
    let mut cell = Cell::started(Layout::small(3), VOLUME);
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(1));
    let lost = 2;
    cell.kill(lost);
    fs::remove_dir_all(cell.path(lost)).expect("it is there");
    // Enough for the others' logs not to go back so far.
    write_all(&mut client, &pattern(2));
    write_all(&mut client, &pattern(3));

    // Whoever forgets to say that it is a replacement is told so, even with --force.
    for flags in ["", " --force"] {
        let format = cell
            .bench
            .run("pssd", &format!("format --id {lost}{flags}"));
        let told = [
            "the cell runs and knows server 2",
            "'pssd format --replace'",
        ];
        format.fails(1, &told);
    }
    // And a server that runs is not formatted.
    let format = cell
        .bench
        .run("pssd", "format --id 0 --replace --path other");
    format.fails(1, &["server 0 runs (pid ", "stop it first"]);

    let format = cell
        .bench
        .run("pssd", &format!("format --id {lost} --replace"));
    let text = format.done().stderr();
    assert!(
        text.contains("It learns everything from the others"),
        "{text}"
    );
    cell.start(lost);
    // Until it has, it is not counted.
    let mut seen = Vec::new();
    wait_until("the copy is current", PATIENCE, || {
        let Some(status) = cell.status() else {
            return false;
        };
        let state = status["servers"][usize::from(lost)]["state"].to_string();
        if state.contains("learning") {
            assert_eq!(status["servers_that_may_fail"], 0, "{status:#}");
        }
        seen.push(state);
        status["all_current"] == true
    });
    assert!(
        seen.iter().any(|state| state.contains("learning")),
        "{seen:?}"
    );
    let log = cell.servers[&lost].text();
    assert!(
        log.contains("neither votes nor counts until it has"),
        "{log}"
    );
    assert!(log.contains("votes and counts again"), "{log}");
    let status = cell.bench.run("pss", "status").done().stdout();
    assert!(status.starts_with("All 3 copies current."), "{status}");

    // Now another one is lost, and the new disk is half of what is left.
    let other = cell.leader();
    let other = if other == lost { 0 } else { other };
    cell.kill(other);
    fs::remove_dir_all(cell.path(other)).expect("it is there");
    assert!(
        read_all(&mut client) == pattern(3),
        "the volume holds something else"
    );
    cell.bench
        .run("pssd", &format!("format --id {other} --replace"))
        .done();
    cell.start(other);
    cell.wait_current();
    drop(client);
    for id in 0..3 {
        cell.stop(id);
    }
    for id in 0..3 {
        let content = cell.content(id, "v", 64 << 10, SIZE);
        assert!(content == pattern(3), "the copy of server {id} differs");
    }
}

/// Nobody was there to say that the directory is not new. The cell finds out, and does not count the server before it
/// has learned everything.
#[test]
fn a_directory_that_was_formatted_without_a_word_is_found_out() {
    let mut cell = Cell::started(Layout::small(3), VOLUME);
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(1));
    cell.wait_current();
    drop(client);
    for id in 0..3 {
        cell.stop(id);
    }
    fs::remove_dir_all(cell.path(1)).expect("it is there");
    cell.format(1, "");
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    let log = cell.servers[&1].text();
    assert!(log.contains("is new to the cell"), "{log}");
    assert!(log.contains("votes and counts again"), "{log}");
    cell.gateways.clear();
    cell.start_gateway(0);
    assert!(read_all(&mut cell.client(0)) == pattern(1));
}

/// An old disk whose place is taken comes back, and goes again: it never counts, and nothing is lost.
#[test]
fn an_old_disk_that_comes_back_learns_what_it_missed() {
    let mut cell = Cell::started(Layout::small(3), VOLUME);
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(1));
    cell.wait_current();
    cell.stop(2);
    let (path, old) = (cell.path(2), cell.bench.path("old"));
    fs::rename(&path, &old).expect("it is there");
    cell.format(2, "--replace");
    // Only with both others may it be replaced: not while one of them learns itself.
    let format = cell.bench.run("pssd", "format --id 1 --replace --force");
    format.fails(1, &["server 1 runs"]);
    cell.stop(1);
    let format = cell.bench.run("pssd", "format --id 2 --replace --force");
    let told = [
        "2 other core servers with all data must be there",
        "1 answers: start them first",
    ];
    format.fails(1, &told);
    cell.start(1);
    cell.start(2);
    cell.wait_current();
    write_all(&mut client, &pattern(2));

    // The disk of before finds out that it was replaced, and learns what it missed; then the other one does.
    let new = cell.bench.path("new");
    for (count, away, here) in [(1, &new, &old), (2, &old, &new)] {
        cell.stop(2);
        fs::rename(&path, away).expect("it is there");
        fs::rename(here, &path).expect("it is there");
        cell.start(2);
        wait_until("it is found out", PATIENCE, || {
            let log = cell.servers[&2].text();
            log.matches("older than what others have seen").count() == count
        });
        cell.wait_current();
        assert!(cell.content(2, "v", 64 << 10, SIZE) == pattern(2));
    }
    assert!(read_all(&mut client) == pattern(2));
}

/// A directory that was restored from a backup of the same life looks as if nothing was missing. The others have seen more of it.
#[test]
fn an_old_backup_is_found_out() {
    let mut cell = Cell::started(Layout::small(3), VOLUME);
    let mut client = cell.client(0);
    write_all(&mut client, &pattern(1));
    cell.wait_current();
    cell.stop(2);
    let (path, backup) = (cell.path(2), cell.bench.path("backup"));
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&path, &backup])
        .status();
    assert!(copied.expect("there is cp").success());
    cell.start(2);
    cell.wait_current();
    write_all(&mut client, &pattern(2));
    cell.wait_current();

    // All stop; what the others have seen is on their disks. One of them stays away.
    for id in 0..3 {
        cell.stop(id);
    }
    let led = |cell: &Cell, id: u8| {
        let log = fs::read_to_string(cell.bench.path(&format!("pssd{id}.log")));
        log.unwrap_or_default().matches("leads under").count()
    };
    let before = [led(&cell, 1), led(&cell, 2)];
    fs::remove_dir_all(&path).expect("it is there");
    fs::rename(&backup, &path).expect("it is there");
    cell.start(1);
    cell.start(2);
    wait_until("it is found out", PATIENCE, || {
        let log = cell.servers[&2].text();
        log.contains("older than what others have seen")
    });
    std::thread::sleep(std::time::Duration::from_secs(3));
    let led = [led(&cell, 1), led(&cell, 2)];
    assert_eq!(led, before, "two of three must not count");
    cell.start(0);
    cell.wait_current();
    assert!(read_all(&mut client) == pattern(2));
    cell.stop(0);
    // Now it counts.
    assert!(read_all(&mut client) == pattern(2));
}

/// A cell that does not work without a server cannot let it in again.
#[test]
fn two_servers_cannot_replace_one() {
    let cell = Cell::new(Layout::small(2));
    let format = cell.bench.run("pssd", "format --id 1 --replace --force");
    format.fails(
        1,
        &["a cell of 2 core servers does not work without server 1"],
    );
}
