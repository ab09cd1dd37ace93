//! One volume on two iSCSI gateways before a real cell: what is answered on one is seen by the next command on the
//! other, with servers killed in between.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use pss_tests::iscsi::Gateway;
use pss_tests::iscsi_client::{Ended, IscsiClient, Reset, cdb10};
use pss_tests::load::Load;
use pss_tests::processes::{Cell, Layout};

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
/// For every answer: more than a change of the leader takes, less than a gateway's limit for a command.
const PATIENCE: Duration = Duration::from_secs(11);

const RESET: (u8, u16) = (6, 0x2903);
const CAPACITY_CHANGED: (u8, u16) = (6, 0x2a09);
const REGISTRATIONS_PREEMPTED: (u8, u16) = (6, 0x2a05);
const NOT_SUPPORTED: (u8, u16) = (5, 0x2500);
const CONFLICT: u8 = 0x18;
/// Activate Persist Through Power Loss.
const APTPL: u8 = 1;

/// Targets that show one volume each, as LUN 1.
fn conf(volumes: &[&str]) -> String {
    let target = |volume| {
        format!(
            "<target {TARGET}-{volume}>\n<backing-store {volume}>\nbs-type pss\nlun 1\n</backing-store>\n</target>\n"
        )
    };
    volumes.iter().map(target).collect()
}

/// Three servers, and two gateways that show volumes. `v` is always there, also over NBD.
fn cell(volumes: &[&str]) -> (Cell, [Gateway; 2]) {
    let cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    for volume in volumes.iter().filter(|volume| **volume != "v") {
        cell.bench
            .run("pss", &format!("volume create {volume} 64M"))
            .done();
    }
    let conf = conf(volumes);
    let gateways = [0, 1].map(|number| Gateway::start(&cell, number, &conf));
    (cell, gateways)
}

fn login(gateway: &Gateway, volume: &str) -> IscsiClient {
    let target = format!("{TARGET}-{volume}");
    let number = gateway.portal.port();
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
    reserve_out_as(client, action, kind, key, service_key, 0)
}

fn reserve_out_as(
    client: &mut IscsiClient,
    action: u8,
    kind: u8,
    key: u64,
    service_key: u64,
    flags: u8,
) -> u8 {
    let mut list = key.to_be_bytes().to_vec();
    list.extend(service_key.to_be_bytes());
    list.extend([0, 0, 0, 0, flags, 0, 0, 0]);
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
    for round in 0..12 {
        assert_eq!(reserve_out(&mut one, 6, 0, 0, 1), 0);
        assert_eq!(reserve_out(&mut other, 6, 0, 0, 2), 0);
        // WRITE EXCLUSIVE.
        assert_eq!(reserve_out(&mut one, 1, 1, 1, 0), 0);
        assert_eq!(write(&mut other, 0).status, CONFLICT, "round {round}");
        assert_eq!(read(&mut other, 0).status, 0);
        // PREEMPT, or PREEMPT AND ABORT.
        let preempt = 4 + (round / 2 % 2) as u8;
        assert_eq!(reserve_out(&mut other, preempt, 1, 2, 1), 0);
        let told = match round % 3 {
            0 => one.test_unit_ready().unwrap(),
            1 => write(&mut one, 0),
            // It would be allowed.
            _ => read(&mut one, 0),
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

/// A persistent reservation is the cell's: it outlives the leader, all servers, and the gateway that it came through.
#[test]
fn reservations_hold_while_servers_and_gateways_die() {
    let (mut cell, mut gateways) = cell(&["v"]);
    let [mut one, mut other] = gateways.each_ref().map(|gateway| login(gateway, "v"));
    // REGISTER AND IGNORE EXISTING KEY with APTPL, then WRITE EXCLUSIVE.
    assert_eq!(reserve_out_as(&mut one, 6, 0, 0, 1, APTPL), 0);
    assert_eq!(reserve_out(&mut one, 1, 1, 1, 0), 0);
    let leader = cell.leader();
    cell.kill(leader);
    assert_eq!(write(&mut other, 0).status, CONFLICT);
    assert_eq!(write(&mut one, 0).status, 0);
    cell.start(leader);
    cell.wait_current();
    for id in 0..3 {
        cell.kill(id);
    }
    for id in 0..3 {
        cell.start(id);
    }
    assert_eq!(write(&mut other, 0).status, CONFLICT);
    assert_eq!(write(&mut one, 0).status, 0);
    // Its session is gone with the gateway, its registration is not.
    gateways[0].process.kill();
    assert_eq!(write(&mut other, 0).status, CONFLICT);
    let killed = Instant::now();
    gateways[0] = Gateway::start(&cell, 0, &conf(&["v"]));
    one = login(&gateways[0], "v");
    println!("a killed gateway serves again after {:?}", killed.elapsed());
    assert_eq!(write(&mut one, 0).status, 0);
    assert_eq!(write(&mut other, 0).status, CONFLICT);
    // CLEAR.
    assert_eq!(reserve_out(&mut one, 3, 0, 1, 0), 0);
    cell.kill(cell.leader());
    assert_eq!(write(&mut other, 0).status, 0);
}

#[test]
fn a_new_size_is_seen_by_everyone_and_shrinking_is_for_volumes_that_nobody_has() {
    let (mut cell, gateways) = cell(&["v"]);
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
    // With the leader killed in between.
    let leader = cell.leader();
    pss("volume resize v 96M").done();
    cell.kill(leader);
    for client in &mut clients {
        let told = client.test_unit_ready().unwrap();
        assert_eq!(told.sense, Some(CAPACITY_CHANGED));
        assert_eq!(blocks(client), 196_608);
    }
    cell.start(leader);
    cell.wait_current();
    let pss = |args: &str| cell.bench.run("pss", args);
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

/// COMPARE AND WRITE of the first block (SBC-3 §5.3): whether the block was `old` and is `new` now.
fn compare_and_write(
    client: &mut IscsiClient,
    old: &[u8; 512],
    new: &[u8; 512],
) -> std::io::Result<bool> {
    let mut cdb = [0; 16];
    (cdb[0], cdb[13]) = (0x89, 1);
    let ended = client.command(&cdb, 0, &[&old[..], &new[..]].concat())?;
    match (ended.status, ended.sense) {
        (0, _) => Ok(true),
        (2, Some(MISCOMPARE)) => Ok(false),
        _ => panic!("{ended:?}"),
    }
}

const MISCOMPARE: (u8, u16) = (0xe, 0x1d00);

fn count_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

/// How an initiator has counted.
#[derive(Default)]
struct Counted {
    done: u64,
    /// Its session ended before the answer came.
    unknown: u64,
}

/// Increments the counter in the first block so often, or until its gateway is gone.
fn count_up(client: &mut IscsiClient, times: u64) -> Counted {
    let mut counted = Counted::default();
    while counted.done < times {
        let Ok(ended) = client.command(&cdb10(0x28, 0, 1), 512, &[]) else {
            return counted;
        };
        assert_eq!(ended.status, 0, "{ended:?}");
        let old: [u8; 512] = ended.data.try_into().unwrap();
        let mut new = old;
        new[..8].copy_from_slice(&(count_of(&old) + 1).to_le_bytes());
        match compare_and_write(client, &old, &new) {
            Ok(done) => counted.done += u64::from(done),
            Err(_) => {
                counted.unknown += 1;
                return counted;
            }
        }
    }
    counted
}

/// Lets all count at once; `fault` comes in the middle.
fn count_all(clients: &mut [IscsiClient], times: u64, fault: impl FnOnce()) -> Vec<Counted> {
    std::thread::scope(|scope| {
        let counting = clients.iter_mut();
        let counting: Vec<_> = counting
            .map(|client| scope.spawn(move || count_up(client, times)))
            .collect();
        std::thread::sleep(Duration::from_secs(1));
        fault();
        counting.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

/// A counter that initiators on both gateways increment with COMPARE AND WRITE is exact.
#[test]
fn a_counter_is_exact_over_two_gateways() {
    const EACH: u64 = 2500;
    let (mut cell, mut gateways) = cell(&["v"]);
    let mut clients = Vec::new();
    for _ in 0..2 {
        for gateway in &gateways {
            let number = clients.len() as u16;
            let target = format!("{TARGET}-v");
            let client = IscsiClient::login(gateway.portal, &target, number, PATIENCE);
            let mut client = client.unwrap();
            client.ready().unwrap();
            clients.push(client);
        }
    }
    // All answers come, although a leader is killed in the middle.
    let counted = count_all(&mut clients, EACH, || {
        let leader = cell.leader();
        cell.kill(leader);
        cell.start(leader);
    });
    assert!(counted.iter().all(|it| (it.done, it.unknown) == (EACH, 0)));
    let count = count_of(&read(&mut clients[0], 0).data);
    assert_eq!(count, 4 * EACH);

    // A gateway is killed: whose answer did not come may have counted, and nobody else.
    let counted = count_all(&mut clients, EACH, || gateways[1].process.kill());
    assert_eq!((counted[0].done, counted[2].done), (EACH, EACH));
    assert!(counted[1].done < EACH && counted[3].done < EACH);
    let done: u64 = counted.iter().map(|it| it.done).sum();
    let unknown: u64 = counted.iter().map(|it| it.unknown).sum();
    let now = count_of(&read(&mut clients[0], 0).data);
    assert!((count + done..=count + done + unknown).contains(&now));
}

/// What every 4 KiB block showed over two gateways is linearizable, with servers and gateways killed and paused;
/// nothing that was answered is lost, and a client of another protocol sees the same.
#[test]
fn histories_over_iscsi_are_linearizable() {
    const RETURN: Duration = Duration::from_secs(25);
    let calm = || std::thread::sleep(Duration::from_millis(1500));
    let (mut cell, mut gateways) = cell(&["v"]);
    let portals = gateways.iter().map(|it| it.portal).collect();
    let load = Load::over_iscsi(&format!("{TARGET}-v"), portals, 6, 1);
    for round in 0..4 {
        calm();
        let leader = cell.leader();
        match round {
            1 => {
                cell.signal(&[leader], "STOP");
                load.wait_served("leader paused", load.now(), RETURN);
                cell.signal(&[leader], "CONT");
            }
            2 => {
                for id in 0..3 {
                    cell.signal(&[id], "KILL");
                }
                for id in 0..3 {
                    cell.kill(id);
                    cell.start(id);
                }
                load.wait_served("all killed and started", load.now(), RETURN);
            }
            _ => {
                cell.kill(leader);
                load.wait_served("leader killed", load.now(), RETURN);
                cell.start(leader);
            }
        }
        cell.wait_current();
    }
    for (number, gateway) in gateways.iter_mut().enumerate() {
        calm();
        gateway.process.kill();
        load.wait_served("gateway killed", load.now(), RETURN);
        *gateway = Gateway::start(&cell, number as u16, &conf(&["v"]));
        calm();
    }
    let mut history = load.finish();
    // BUSY is what a gateway says when it has waited too long for a leader.
    let other_than_busy: Vec<_> = history.errors.iter().filter(|(it, _)| **it != 8).collect();
    assert!(other_than_busy.is_empty(), "{other_than_busy:?}");
    history.read_all(&mut cell.client(0));
    history.check();
}
