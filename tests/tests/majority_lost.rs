//! A majority is lost for good: the page of docs/operating.md, as a person lives through it.

use std::fs;
use std::time::Duration;

use pss_tests::nbd_client::Command;
use pss_tests::processes::{Cell, Layout, PATIENCE, wait_until};

const BLOCK: usize = 4096;

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

/// Two of three die. The third goes on, a returned one does not count and is told why, and is taken in again.
#[test]
fn one_of_three_is_left() {
    let mut cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    write(&cell, 1, 0x11);
    cell.wait_current();
    // While a majority is there, nothing is given up: it says who is alive.
    let alive = cell.bench.run("pss", "recover --yes");
    alive.fails(1, &["nothing is lost", "0, 1 and 2", "majority"]);
    cell.kill(2);
    let alive = cell.bench.run("pss", "recover --yes");
    alive.fails(1, &["servers 0 and 1 answer", "majority"]);
    let mut open = cell.client(0);
    cell.kill(1);
    // Without a terminal and without --yes: no.
    wait_until("the leader misses the others", PATIENCE, || {
        let asked = cell.bench.run("pss", "recover");
        let said = asked.stderr();
        assert_ne!(asked.0.status.code(), Some(0), "{said}");
        said.contains("there is no terminal to ask on")
    });
    let look = cell.bench.run("pss", "recover --look");
    look.done();
    let text = look.stdout();
    for part in [
        "Server 0 has the newest log",
        "Nothing is known to be missing",
        "at least",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // The server hears the others until they have been silent for a while.
    wait_until("the others are missed", PATIENCE, || {
        cell.bench.run("pss", "recover --yes").0.status.success()
    });
    wait_until("it leads", PATIENCE, || {
        cell.status().is_some_and(|it| it["works"] == true)
    });
    // Who had the volume open was cut off, and looks anew.
    let data = [0x22; BLOCK];
    let cut = open.request(Command::Write, 0, BLOCK as u32, &data);
    assert!(cut.is_err() || cut.is_ok_and(|reply| reply.error != 0));
    wait_until("the volume can be opened again", PATIENCE, || {
        cell.connect(0).is_ok()
    });
    assert_eq!(read(&cell, 1), 0x11);
    write(&cell, 2, 0x33);
    let again = cell.bench.run("pss", "recover --yes");
    again.fails(1, &["nothing is lost: server 0 answers"]);

    // The old ones come back, a majority of what they know.
    cell.start(1);
    cell.start(2);
    for id in [1, 2] {
        wait_until("it is told", PATIENCE, || {
            cell.servers[&id]
                .text()
                .contains("recovered without this server (loss epoch 1)")
        });
    }
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(cell.leader(), 0);
    assert_eq!(read(&cell, 2), 0x33);
    let status = cell.bench.run("pss", "status").stdout();
    assert!(
        status.contains("Server 1 is in server.conf here, and was taken out"),
        "{status}"
    );
    // And are taken in again, as the log says.
    for id in [1, 2] {
        cell.stop(id);
        fs::remove_dir_all(cell.path(id)).expect("it is there");
        let format = format!("format --replace --id {id}");
        cell.bench.run("pssd", &format).done();
        cell.start(id);
        let place = format!("{} {}", cell.host(id), cell.path(id).display());
        cell.bench
            .run("pss", &format!("server add {id} {place}"))
            .done();
    }
    cell.wait_current();
    cell.stop(0);
    wait_until("the two that came back serve", PATIENCE, || {
        cell.status().is_some_and(|it| it["works"] == true)
    });
    assert_eq!(read(&cell, 1), 0x11);
    assert_eq!(read(&cell, 2), 0x33);
}

/// All core servers are lost, and a learner is left.
#[test]
fn a_learner_is_left() {
    let layout = Layout {
        learners: 1,
        ..Layout::small(3)
    };
    let mut cell = Cell::started(layout, "64M --chunk-size 1M");
    write(&cell, 1, 0x44);
    cell.wait_current();
    for id in 0..3 {
        cell.kill(id);
    }
    wait_until("the others are missed", PATIENCE, || {
        cell.bench.run("pss", "recover --yes").0.status.success()
    });
    wait_until("the volume can be opened", PATIENCE, || {
        cell.connect(0).is_ok()
    });
    assert_eq!(read(&cell, 1), 0x44);
    write(&cell, 2, 0x55);
    assert_eq!(read(&cell, 2), 0x55);
}
