//! What real servers tell of their inside.

use pss_core::types::{ServerId, Slot};
use pss_core::wire::inspect::{
    ClientInfo, EntryInfo, FilesInfo, Inspect, Inspection, LinkInfo, LinkState, LogInfo,
    OutboundInfo, ProcessInfo, SocketInfo,
};

use crate::support::{Client, TestCell, pattern, small};

const BLOCK: u64 = 4096;

fn ask(client: &Client, server: u8, what: Inspect) -> Inspection {
    let answer = client.cell.inspect(ServerId(server), what);
    client.runtime.block_on(answer).unwrap()
}

macro_rules! ask {
    ($client:expr, $server:expr, $kind:ident) => {
        match ask($client, $server, Inspect::$kind) {
            Inspection::$kind(answer) => answer,
            other => panic!("{other:?}"),
        }
    };
}

fn log(client: &Client, server: u8, before: u64, count: u16) -> LogInfo {
    let before = Slot(before);
    match ask(client, server, Inspect::Log { before, count }) {
        Inspection::Log(page) => page,
        other => panic!("{other:?}"),
    }
}

/// All pages.
fn whole_log(client: &Client, server: u8, count: u16) -> Vec<EntryInfo> {
    let mut entries = Vec::new();
    let mut before = 0;
    loop {
        let page = log(client, server, before, count);
        assert!(page.entries.len() <= usize::from(count));
        entries.extend(page.entries);
        match page.next {
            Some(next) => before = next.0,
            None => return entries,
        }
    }
}

/// A cell with a volume of which some blocks are written, one after the other.
fn written() -> (TestCell, Client) {
    let cell = TestCell::started(3, small());
    let client = cell.client();
    client.create("vol001", 64 << 20);
    let volume = client.open("vol001");
    for block in 0..50 {
        volume.write(block * BLOCK, &pattern(block, 1));
    }
    // A majority is enough for the writes: the third may not have been connected yet.
    for id in 0..3 {
        cell.wait_caught_up(id);
    }
    (cell, client)
}

#[test]
fn connections_and_queues_are_told() {
    let (cell, client) = written();
    let leader = cell.leader();
    let clients: Vec<ClientInfo> = ask!(&client, leader, Clients);
    let user = clients.iter().find(|it| it.requests > 50).unwrap();
    assert!(user.received_bytes > 50 * 4096, "{user:?}");
    assert!(user.sent_bytes > 0 && user.unsent_bytes == 0, "{user:?}");
    assert!(user.address.starts_with("127."), "{user:?}");
    assert!(user.idle_ms.unwrap() <= user.connected_ms, "{user:?}");

    let outbound: Vec<OutboundInfo> = ask!(&client, leader, Outbound);
    let ids: Vec<u8> = outbound.iter().map(|it| it.server.0).collect();
    let others: Vec<u8> = (0..3).filter(|id| *id != leader).collect();
    assert_eq!(ids, others);
    for info in &outbound {
        assert_eq!(info.link, LinkState::Up);
        assert_eq!(info.address, cell.tcp(info.server.0).to_string());
        assert!(info.sent_bytes > 50 * 4096, "{info:?}");
        assert!(info.unacknowledged.is_some() && info.waiting_bytes <= info.limit_bytes);
    }

    let links: Vec<LinkInfo> = ask!(&client, leader, Links);
    for link in &links {
        assert!(link.alive && link.inbound, "{link:?}");
        assert!(link.up_ms.is_some() && link.trouble.is_none(), "{link:?}");
        assert!(link.round_trip_us.unwrap() > 0, "{link:?}");
        assert!(link.segments_sent > 0 && link.segments_lost <= link.segments_sent);
        assert!(
            link.datagrams_sent > 0 && link.datagrams_received > 0,
            "{link:?}"
        );
        assert!(link.incarnation.is_some());
        let lease = link.lease.unwrap();
        assert_eq!(lease.holder, ServerId(leader));
        assert!(lease.left_ms <= 400);
    }
    let follower = others[0];
    let links: Vec<LinkInfo> = ask!(&client, follower, Links);
    for link in &links {
        let holder = link.lease.map(|lease| lease.holder.0);
        assert_eq!(holder, (link.server.0 == leader).then_some(leader));
    }
}

#[test]
fn a_server_that_is_gone_is_seen_to_be() {
    let (mut cell, client) = written();
    let away = (0..3).find(|id| *id != cell.leader()).unwrap();
    cell.kill(away);
    let link = || -> LinkInfo {
        let links: Vec<LinkInfo> = ask!(&client, cell.leader(), Links);
        links.into_iter().find(|it| it.server.0 == away).unwrap()
    };
    cell.wait_for("the link to be down", |_| {
        let link = link();
        link.link != LinkState::Up
            && !link.inbound
            && link.trouble.is_some()
            && link.up_ms.is_none()
    });
    let volume = client.open("vol001");
    let before = link();
    volume.write(0, &pattern(0, 2));
    cell.wait_for("messages to be dropped", |_| {
        let outbound: Vec<OutboundInfo> = ask!(&client, cell.leader(), Outbound);
        let info = outbound.iter().find(|it| it.server.0 == away).unwrap();
        info.dropped > 0 && info.link != LinkState::Up
    });
    // What earlier connections have sent is not forgotten.
    assert!(before.sent_bytes > 50 * 4096, "{before:?}");
}

#[test]
fn files_process_and_sockets_are_told() {
    let (cell, client) = written();
    let leader = cell.leader();
    let _open = client.open("vol001");
    let files: FilesInfo = ask!(&client, leader, Files);
    assert_eq!(files.volumes.len(), 1);
    assert_eq!(files.volumes[0].name, "vol001");
    assert!(!files.volumes[0].attached_by.is_empty());
    let path = "data/vol001/00/00/00";
    assert!(files.chunks.iter().any(|it| it.path == path), "{files:?}");
    assert!(files.chunks_open >= 1 && files.chunks_open <= files.chunks_max);
    assert!(!files.segments.is_empty());
    for segment in &files.segments {
        let bytes = std::fs::metadata(cell.path(leader).join(&segment.path)).unwrap();
        assert_eq!(bytes.len(), segment.bytes);
    }
    assert!(files.descriptors > 10 && files.descriptors <= files.descriptors_max);

    for id in 0..3 {
        let process: ProcessInfo = ask!(&client, id, Process);
        assert_eq!(process.server, ServerId(id));
        assert_eq!(process.pid, std::process::id());
        assert_eq!(process.path, cell.path(id).display().to_string());
        assert!(process.state.ends_with('l'), "{process:?}");
        assert!(process.memory_bytes > 1 << 20);
        let sockets: Vec<SocketInfo> = ask!(&client, id, Sockets);
        assert_eq!(sockets[0].local, cell.udp(id).to_string());
        assert_eq!(sockets[1].local, cell.tcp(id).to_string());
        assert_eq!(sockets[1].state, "LISTEN");
        let to_servers = sockets.iter().filter(|it| {
            let who = it.who.as_deref().unwrap_or_default();
            it.state == "ESTABLISHED" && who.starts_with("server ")
        });
        assert_eq!(to_servers.count(), 4, "two out, two in: {sockets:?}");
    }
}

#[test]
fn the_log_is_shown_by_pages_from_memory_and_from_disk() {
    let (mut cell, client) = written();
    let leader = cell.leader();
    let page = log(&client, leader, 0, 20);
    assert_eq!(
        (page.server, page.role.as_str()),
        (ServerId(leader), "leader")
    );
    assert_eq!(page.entries.len(), 20);
    let newest = &page.entries[0];
    assert_eq!(newest.slot, page.last);
    let entries = whole_log(&client, leader, 20);
    let slots: Vec<u64> = entries.iter().map(|entry| entry.slot.0).collect();
    let (first, last) = (page.first.0, slots[0]);
    assert_eq!(slots, (first..=last).rev().collect::<Vec<u64>>());
    let writes: Vec<_> = entries
        .iter()
        .flat_map(|entry| &entry.commands)
        .filter(|command| command.what == "write")
        .collect();
    assert_eq!(writes.len(), 50);
    assert!(
        writes
            .iter()
            .all(|it| it.volume_name.as_deref() == Some("vol001"))
    );
    let mut offsets: Vec<u64> = writes.iter().map(|it| it.offset_bytes.unwrap()).collect();
    offsets.reverse();
    assert_eq!(
        offsets,
        (0..50).map(|block| block * BLOCK).collect::<Vec<u64>>()
    );
    assert!(writes.iter().all(|it| it.length_bytes == Some(BLOCK)));
    for entry in &entries[1..] {
        assert!(entry.chosen && entry.applied, "{entry:?}");
        assert!(entry.accepted_by.len() >= 2, "{entry:?}");
    }

    // A server that was started again has what is applied on disk only.
    let other = (0..3).find(|id| *id != leader).unwrap();
    cell.wait_caught_up(other);
    cell.stop(other);
    cell.start(other);
    cell.wait_caught_up(other);
    let from_disk = whole_log(&client, other, 7);
    let facts = |entry: &EntryInfo| {
        (
            entry.slot,
            entry.ballot,
            entry.commands.clone(),
            entry.payload_bytes,
        )
    };
    let common = |entries: &[EntryInfo]| -> Vec<_> {
        let old = entries.iter().filter(|entry| entry.slot.0 <= last);
        old.map(facts).collect()
    };
    assert_eq!(common(&from_disk), common(&entries));
    assert_eq!(log(&client, other, 1, 20).entries, []);
    let beyond = log(&client, other, u64::MAX, 1);
    assert_eq!(beyond.entries[0].slot, beyond.last);
}

#[test]
fn a_page_is_bounded() {
    let (cell, client) = written();
    let answer = client.cell.inspect(
        ServerId(cell.leader()),
        Inspect::Log {
            before: Slot(0),
            count: u16::MAX,
        },
    );
    assert!(
        client.runtime.block_on(answer).is_err(),
        "more than a page holds"
    );
    assert_eq!(log(&client, cell.leader(), 0, 0).entries.len(), 1);
}
