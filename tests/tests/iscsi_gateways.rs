//! One volume on two iSCSI gateways before a real cell: what is answered on one is seen by the next command on the
//! other, with servers killed in between.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use pss_tests::iscsi::Gateway;
use pss_tests::iscsi_client::{Ended, IscsiClient, Reset, cdb10};
use pss_tests::processes::{Cell, Layout};

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
/// For every answer: more than a change of the leader takes, less than a gateway's limit for a command.
const PATIENCE: Duration = Duration::from_secs(11);

const RESET: (u8, u16) = (6, 0x2903);
const CAPACITY_CHANGED: (u8, u16) = (6, 0x2a09);
const REGISTRATIONS_PREEMPTED: (u8, u16) = (6, 0x2a05);
const NOT_SUPPORTED: (u8, u16) = (5, 0x2500);
const CONFLICT: u8 = 0x18;

/// Three servers and two gateways that show volumes, one target each, as LUN 1.
fn cell(volumes: &[&str]) -> (Cell, [Gateway; 2]) {
    let mut cell = Cell::new(Layout {
        gateways: 0,
        ..Layout::small(3)
    });
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    let mut conf = String::new();
    for volume in volumes {
        cell.bench
            .run("pss", &format!("volume create {volume} 64M"))
            .done();
        conf += &format!(
            "<target {TARGET}-{volume}>\n<backing-store {volume}>\nbs-type pss\nlun 1\n</backing-store>\n</target>\n"
        );
    }
    let gateways = [0, 1].map(|number| Gateway::start(&cell, number, &conf));
    (cell, gateways)
}

fn login(gateway: &Gateway, volume: &str) -> IscsiClient {
    let target = format!("{TARGET}-{volume}");
    let number = gateway.portal.port() as u8;
    let mut client = IscsiClient::login(gateway.portal, &target, number, PATIENCE).unwrap();
    client.ready().unwrap();
    client
}

fn read(client: &mut IscsiClient, lba: u32) -> Ended {
    client.command(&cdb10(0x28, lba, 1), 512, &[]).unwrap()
}

fn write(client: &mut IscsiClient, lba: u32) -> Ended {
    client.command(&cdb10(0x2a, lba, 1), 0, &[7; 512]).unwrap()
}

/// READ CAPACITY(10): blocks of 512 bytes.
fn blocks(client: &mut IscsiClient) -> u64 {
    let ended = client.command(&cdb10(0x25, 0, 0), 8, &[]).unwrap();
    assert_eq!((ended.status, ended.data.len()), (0, 8), "{ended:?}");
    u64::from(u32::from_be_bytes(ended.data[..4].try_into().unwrap())) + 1
}

/// PERSISTENT RESERVE OUT.
fn reserve_out(client: &mut IscsiClient, action: u8, kind: u8, key: u64, service_key: u64) -> u8 {
    let mut list = key.to_be_bytes().to_vec();
    list.extend(service_key.to_be_bytes());
    list.extend([0; 8]);
    let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0];
    client.command(&cdb, 0, &list).unwrap().status
}

#[test]
fn resets_are_seen_by_the_next_command_on_the_other_gateway() {
    let (mut cell, gateways) = cell(&["v"]);
    let mut clients = gateways.each_ref().map(|gateway| login(gateway, "v"));
    let mut down = None;
    for round in 0..24 {
        let (from, to) = (round % 2, 1 - round % 2);
        // With the leader killed between the last command and the reset, and between reset and command.
        let kills = [5, 6, 13].contains(&round);
        if let Some(id) = down.take() {
            cell.start(id);
            cell.wait_current();
        }
        if kills && round % 2 == 1 {
            let leader = cell.leader();
            cell.kill(leader);
            down = Some(leader);
        }
        let which = if round % 3 == 0 {
            Reset::Warm
        } else {
            Reset::Unit
        };
        assert_eq!(clients[from].reset(which).unwrap(), 0, "round {round}");
        if kills && round % 2 == 0 {
            let leader = cell.leader();
            cell.kill(leader);
            down = Some(leader);
        }
        let client = &mut clients[to];
        let told = match round / 2 % 3 {
            0 => client.test_unit_ready().unwrap(),
            1 => read(client, 0),
            _ => write(client, 8),
        };
        assert_eq!(told.sense, Some(RESET), "round {round}");
        // Once.
        assert_eq!(client.test_unit_ready().unwrap().status, 0, "round {round}");
        assert_eq!(clients[from].test_unit_ready().unwrap().sense, Some(RESET));
        assert_eq!(clients[from].test_unit_ready().unwrap().status, 0);
    }
    // A write that was told of a reset instead was not carried out.
    let content = read(&mut clients[0], 8);
    assert_eq!(content.data, [0; 512]);
    // A cold reset ends the sessions of its gateway (RFC 7143 §11.5.1).
    assert_eq!(clients[0].reset(Reset::Cold).unwrap(), 0);
    assert_eq!(clients[1].test_unit_ready().unwrap().sense, Some(RESET));
    assert!(clients[0].test_unit_ready().is_err());
}

#[test]
fn reservations_are_seen_by_the_next_command_on_the_other_gateway() {
    let (_cell, gateways) = cell(&["v"]);
    let [mut one, mut other] = gateways.each_ref().map(|gateway| login(gateway, "v"));
    for round in 0..10 {
        assert_eq!(reserve_out(&mut one, 6, 0, 0, 1), 0);
        assert_eq!(reserve_out(&mut other, 6, 0, 0, 2), 0);
        // WRITE EXCLUSIVE.
        assert_eq!(reserve_out(&mut one, 1, 1, 1, 0), 0);
        assert_eq!(write(&mut other, 0).status, CONFLICT, "round {round}");
        assert_eq!(read(&mut other, 0).status, 0);
        assert_eq!(reserve_out(&mut other, 5, 1, 2, 1), 0);
        let told = match round % 2 {
            0 => one.test_unit_ready().unwrap(),
            _ => write(&mut one, 0),
        };
        assert_eq!(told.sense, Some(REGISTRATIONS_PREEMPTED), "round {round}");
        assert_eq!(write(&mut one, 0).status, CONFLICT);
        assert_eq!(reserve_out(&mut other, 3, 0, 2, 0), 0);
        assert_eq!(write(&mut one, 0).status, 0, "round {round}");
    }
    // RESERVE(6) ends with its session, at once.
    for round in 0..10 {
        let mut holder = login(&gateways[0], "v");
        assert_eq!(
            holder
                .command(&[0x16, 0, 0, 0, 0, 0], 0, &[])
                .unwrap()
                .status,
            0
        );
        assert_eq!(
            other.test_unit_ready().unwrap().status,
            CONFLICT,
            "round {round}"
        );
        let mode_sense = other
            .command(&[0x1a, 0, 0x3f, 0, 192, 0], 192, &[])
            .unwrap();
        assert_eq!(mode_sense.status, CONFLICT);
        drop(holder);
        let lost = Instant::now();
        while other.test_unit_ready().unwrap().status != 0 {
            assert!(lost.elapsed() < Duration::from_secs(1), "round {round}");
        }
    }
}

#[test]
fn a_new_size_is_seen_by_everyone_and_shrinking_is_for_volumes_that_nobody_has() {
    let (cell, gateways) = cell(&["v"]);
    let pss = |args: &str| cell.bench.run("pss", args);
    // Nobody is logged in: the targets alone do not count.
    pss("volume resize v 32M --allow-shrink").done();
    let mut clients = gateways.each_ref().map(|gateway| login(gateway, "v"));
    assert_eq!(blocks(&mut clients[0]), 65_536);
    pss("volume resize v 64M").done();
    for client in &mut clients {
        assert_eq!(
            client.test_unit_ready().unwrap().sense,
            Some(CAPACITY_CHANGED)
        );
        assert_eq!(blocks(client), 131_072);
    }
    pss("volume resize v 32M --allow-shrink").fails(4, &["attached by", "pss-iscsi", "--force"]);
    assert_eq!(clients[0].test_unit_ready().unwrap().status, 0);
    pss("volume resize v 32M --allow-shrink --force").done();
    for client in &mut clients {
        // Behind the new end, and so not a command that could go by what was known.
        let told = read(client, 100_000);
        assert!(
            [Some(CAPACITY_CHANGED), Some((5, 0x2100))].contains(&told.sense),
            "{told:?}"
        );
        client.ready().unwrap();
        assert_eq!(read(client, 100_000).sense, Some((5, 0x2100)));
        assert_eq!(blocks(client), 65_536);
        assert_eq!(write(client, 0).status, 0);
    }
    drop(clients);
    let end = Instant::now() + PATIENCE;
    while pss("volume resize v 16M --allow-shrink").0.status.code() != Some(0) {
        assert!(Instant::now() < end, "nobody has it any more");
    }
}

#[test]
fn a_volume_is_deleted_while_nobody_has_it_or_by_force() {
    let (cell, gateways) = cell(&["idle", "used"]);
    let pss = |args: &str| cell.bench.run("pss", args);
    pss("volume delete idle --yes").done();
    let mut clients = gateways.each_ref().map(|gateway| login(gateway, "used"));
    pss("volume delete used --yes").fails(4, &["used", "attached by", "pss-iscsi", "--force"]);
    assert_eq!(write(&mut clients[0], 0).status, 0);
    pss("volume delete used --yes --force").done();
    let asked = Instant::now();
    for client in &mut clients {
        assert_eq!(client.test_unit_ready().unwrap().sense, Some(NOT_SUPPORTED));
        assert_eq!(write(client, 0).sense, Some(NOT_SUPPORTED));
        assert_eq!(read(client, 0).sense, Some(NOT_SUPPORTED));
    }
    assert!(asked.elapsed() < Duration::from_secs(2), "nobody waits");
    // Another volume of that name is another disk.
    pss("volume create used 32M").done();
    for gateway in &gateways {
        pss(&format!(
            "iscsi --control {} reload",
            gateway.control.display()
        ))
        .done();
    }
    let mut client = login(&gateways[0], "used");
    assert_eq!(blocks(&mut client), 65_536);
    assert_eq!(read(&mut client, 0).data, [0; 512]);
}
