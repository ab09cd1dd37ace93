//! The whole server over real sockets, with a wire-level client of our own and with libiscsi's tools.

use std::process::Command as Program;

use super::*;
use crate::auth::{Account, Secret};
use crate::catalog::LunEntry;
use crate::keys::{parse, put};
use crate::pdu::framing::Pdu;
use crate::pdu::request::{
    Common, DataOut, LoginRequest, LogoutRequest, NopOut, Request, ScsiCommand, TaskRequest,
    TextRequest, encode_whole,
};
use crate::pdu::{FINAL, RESERVED_TAG, opcode, word};
use crate::scsi::LunSettings;
use crate::session::opcode_of;
use pss_gateway::memory::{MemoryDevice, MemoryVolumes};
use tokio::net::TcpStream;

mod control;

const TARGET: &str = "iqn.2001-03.jp.tritech:a";
const LUN: [u8; 8] = [0, 1, 0, 0, 0, 0, 0, 0];
const PATIENCE: Duration = Duration::from_secs(10);

struct Bench {
    server: Arc<Server>,
    volumes: Arc<MemoryVolumes>,
    address: SocketAddr,
}

fn entry(name: &str, volume: &str) -> TargetEntry {
    let mut target = TargetEntry::new(name);
    let disk = LunEntry {
        volume: volume.to_owned(),
        settings: LunSettings::default(),
    };
    target.luns.insert(1, disk);
    target
}

fn catalog(targets: impl IntoIterator<Item = TargetEntry>) -> Catalog {
    let targets = targets.into_iter();
    Catalog {
        targets: targets.map(|it| (it.name.clone(), Arc::new(it))).collect(),
        ..Catalog::default()
    }
}

impl Bench {
    async fn with(limits: Limits, catalog: Catalog) -> Bench {
        let volumes = MemoryVolumes::new(["a", "b"].map(|it| MemoryDevice::new(it, 64 << 20)));
        Bench::of(volumes, 1, limits, catalog).await
    }

    /// A gateway before volumes that others may have as well.
    async fn of(
        volumes: Arc<MemoryVolumes>,
        portal_group: u16,
        limits: Limits,
        catalog: Catalog,
    ) -> Bench {
        let server = Server::new(Arc::clone(&volumes) as _, portal_group, limits);
        assert_eq!(server.apply(catalog).await, []);
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(tcp) = &listener else {
            panic!("TCP");
        };
        let address = tcp.local_addr().unwrap();
        tokio::spawn(Arc::clone(&server).serve(listener));
        Bench {
            server,
            volumes,
            address,
        }
    }

    async fn new() -> Bench {
        Bench::with(Limits::default(), catalog([entry(TARGET, "a")])).await
    }

    async fn client(&self, keys: &str) -> Client {
        let mut client = Client::connect(self.address).await;
        client.login(keys).await;
        client
    }

    fn device(&self) -> Arc<MemoryDevice> {
        self.volumes.get("a").unwrap()
    }

    fn url(&self, target: &str) -> String {
        format!("iscsi://{}/{target}/1", self.address)
    }
}

/// An initiator.
struct Client {
    stream: TcpStream,
    input: BytesMut,
    framing: Framing,
    digests: Digests,
    isid: [u8; 6],
    tsih: u16,
    cid: u16,
    cmd_sn: u32,
    next_itt: u32,
}

impl Client {
    async fn connect(address: SocketAddr) -> Client {
        Client {
            stream: TcpStream::connect(address).await.unwrap(),
            input: BytesMut::new(),
            framing: Framing::new(1 << 24),
            digests: Digests::default(),
            isid: [0x80, 0, 0, 0, 0, 1],
            tsih: 0,
            cid: 0,
            cmd_sn: 1,
            next_itt: 0,
        }
    }

    async fn send(&mut self, request: &Request, data: &[u8]) {
        let whole = encode_whole(request, data);
        let (bhs, data) = whole.split_at(48);
        let mut bytes = bhs.to_vec();
        if self.digests.header {
            bytes.extend(crc32c::crc32c(bhs).to_le_bytes());
        }
        bytes.extend_from_slice(data);
        if self.digests.data && !data.is_empty() {
            bytes.extend(crc32c::crc32c(data).to_le_bytes());
        }
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// The next PDU, or `None` if the connection was closed.
    async fn receive(&mut self) -> Option<Pdu> {
        loop {
            if let Some(pdu) = self.framing.poll(&mut self.input).unwrap() {
                assert!(pdu.data_is_intact);
                return Some(pdu);
            }
            let read = match self.framing.own_buffer() {
                Some(buffer) => {
                    let read = timeout(PATIENCE, self.stream.read(buffer.spare())).await;
                    if let Ok(Ok(count)) = read {
                        buffer.advance(count);
                    }
                    read
                }
                None => timeout(PATIENCE, self.stream.read_buf(&mut self.input)).await,
            };
            match read.expect("an answer in time") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    fn login_request(&self, flags: u8) -> Request {
        Request::Login(LoginRequest {
            common: Common {
                immediate: true,
                itt: 0x1000,
                cmd_sn: self.cmd_sn,
                exp_stat_sn: 0,
            },
            transit: flags & FINAL != 0,
            continues: false,
            current_stage: flags >> 2 & 3,
            next_stage: flags & 3,
            version_max: 0,
            version_min: 0,
            isid: self.isid,
            tsih: self.tsih,
            cid: self.cid,
        })
    }

    /// Logs in without security; gives the status.
    async fn try_login(&mut self, keys: &str) -> u16 {
        let discovery = keys.contains("SessionType=Discovery");
        let mut text = Vec::new();
        put(&mut text, "InitiatorName", "iqn.1994-05.com.redhat:me");
        if !discovery && !keys.contains("TargetName") {
            put(&mut text, "TargetName", TARGET);
        }
        for pair in parse(keys.replace(' ', "\0").as_bytes()).unwrap() {
            put(&mut text, &pair.key, &pair.value);
        }
        let request = self.login_request(0x87);
        self.send(&request, &text).await;
        let pdu = self.receive().await.expect("an answer");
        assert_eq!(opcode_of(&pdu.bhs), opcode::LOGIN_RESPONSE);
        let status = u16::from_be_bytes([pdu.bhs[36], pdu.bhs[37]]);
        if status == 0 {
            self.tsih = u16::from_be_bytes([pdu.bhs[14], pdu.bhs[15]]);
            let said = String::from_utf8_lossy(&pdu.data).into_owned();
            self.digests = Digests {
                header: said.contains("HeaderDigest=CRC32C"),
                data: said.contains("DataDigest=CRC32C"),
            };
            self.framing.set_terms(self.digests, 1 << 24);
        }
        status
    }

    async fn login(&mut self, keys: &str) {
        assert_eq!(self.try_login(keys).await, 0);
    }

    fn common(&mut self) -> Common {
        let cmd_sn = self.cmd_sn;
        self.cmd_sn = cmd_sn.wrapping_add(1);
        self.next_itt += 1;
        Common {
            immediate: false,
            itt: self.next_itt,
            cmd_sn,
            exp_stat_sn: 0,
        }
    }

    fn command(&mut self, cdb: &[u8], reads: u32, writes: u32) -> ScsiCommand {
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        ScsiCommand {
            common: self.common(),
            last: true,
            reads: reads > 0,
            writes: writes > 0,
            attribute: 1,
            lun: LUN,
            expected_bytes: reads.max(writes),
            cdb: padded,
            long_cdb: None,
            bidirectional_read_bytes: None,
        }
    }

    /// Sends a command, gives what is asked for, and collects what comes: status and data.
    async fn run(&mut self, command: ScsiCommand, immediate: usize, out: &[u8]) -> (u8, Vec<u8>) {
        let itt = command.common.itt;
        let request = Request::Command(command);
        self.send(&request, &out[..immediate]).await;
        let mut data = Vec::new();
        loop {
            let pdu = self.receive().await.expect("an answer");
            if word(&pdu.bhs, 16) != itt {
                continue;
            }
            match opcode_of(&pdu.bhs) {
                opcode::R2T => self.answer_r2t(&pdu, out).await,
                opcode::DATA_IN => {
                    assert_eq!(word(&pdu.bhs, 40) as usize, data.len());
                    data.extend_from_slice(&pdu.data);
                    if pdu.bhs[1] & 1 != 0 {
                        return (pdu.bhs[3], data);
                    }
                }
                opcode::SCSI_RESPONSE => {
                    data.extend_from_slice(&pdu.data);
                    return (pdu.bhs[3], data);
                }
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    async fn answer_r2t(&mut self, r2t: &Pdu, out: &[u8]) {
        let (from, length) = (word(&r2t.bhs, 40) as usize, word(&r2t.bhs, 44) as usize);
        let parts = out[from..from + length].chunks(100_000);
        let last = parts.len() - 1;
        for (at, part) in parts.enumerate() {
            let request = Request::DataOut(DataOut {
                last: at == last,
                lun: LUN,
                itt: word(&r2t.bhs, 16),
                ttt: word(&r2t.bhs, 20),
                exp_stat_sn: 0,
                data_sn: at as u32,
                buffer_offset: (from + at * 100_000) as u32,
            });
            self.send(&request, part).await;
        }
    }

    /// TEST UNIT READY until there is no unit attention.
    async fn ready(&mut self) {
        for _ in 0..10 {
            let command = self.command(&[0], 0, 0);
            if self.run(command, 0, &[]).await.0 == 0 {
                return;
            }
        }
        panic!("unit attentions without end");
    }

    async fn write(&mut self, lba: u32, data: &[u8], immediate: usize) -> u8 {
        let blocks = (data.len() / 512) as u16;
        let mut cdb = vec![0x2a, 0];
        cdb.extend(lba.to_be_bytes());
        cdb.push(0);
        cdb.extend(blocks.to_be_bytes());
        let command = self.command(&cdb, 0, data.len() as u32);
        self.run(command, immediate, data).await.0
    }

    async fn read(&mut self, lba: u32, bytes: usize) -> Vec<u8> {
        let mut cdb = vec![0x28, 0];
        cdb.extend(lba.to_be_bytes());
        cdb.push(0);
        cdb.extend(((bytes / 512) as u16).to_be_bytes());
        let command = self.command(&cdb, bytes as u32, 0);
        let (status, data) = self.run(command, 0, &[]).await;
        assert_eq!(status, 0);
        data
    }

    async fn ping(&mut self) {
        let request = Request::NopOut(NopOut {
            common: Common {
                immediate: true,
                itt: 0x9999,
                cmd_sn: self.cmd_sn,
                exp_stat_sn: 0,
            },
            lun: [0; 8],
            ttt: RESERVED_TAG,
        });
        self.send(&request, b"ping").await;
        let pong = self.receive().await.expect("an answer");
        assert_eq!(
            (opcode_of(&pong.bhs), &pong.data[..]),
            (opcode::NOP_IN, &b"ping"[..])
        );
    }

    async fn log_out(&mut self) {
        let request = Request::Logout(LogoutRequest {
            common: self.common(),
            reason: 0,
            cid: 0,
        });
        self.send(&request, b"").await;
        let pdu = self.receive().await.unwrap();
        assert_eq!(
            (opcode_of(&pdu.bhs), pdu.bhs[2]),
            (opcode::LOGOUT_RESPONSE, 0)
        );
    }

    async fn send_targets(&mut self) -> String {
        let request = Request::Text(TextRequest {
            common: self.common(),
            last: true,
            continues: false,
            lun: [0; 8],
            ttt: RESERVED_TAG,
        });
        self.send(&request, b"SendTargets=All\0").await;
        let pdu = self.receive().await.expect("an answer");
        assert_eq!(opcode_of(&pdu.bhs), opcode::TEXT_RESPONSE);
        String::from_utf8_lossy(&pdu.data)
            .replace('\0', " ")
            .trim()
            .to_owned()
    }

    async fn is_closed(&mut self) -> bool {
        self.receive().await.is_none()
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 + at) as u8).collect()
}

#[tokio::test]
async fn writes_and_reads_in_all_ways_data_can_travel() {
    let bench = Bench::new().await;
    for keys in [
        "",
        "HeaderDigest=CRC32C DataDigest=CRC32C",
        "HeaderDigest=None DataDigest=CRC32C MaxRecvDataSegmentLength=4096",
        "HeaderDigest=CRC32C DataDigest=None InitialR2T=No MaxBurstLength=65536 MaxOutstandingR2T=8",
        "MaxRecvDataSegmentLength=262144 MaxBurstLength=16776192 MaxOutstandingR2T=4",
    ] {
        let mut client = bench.client(keys).await;
        client.ready().await;
        for (bytes, immediate) in [(512, 512), (4096, 0), (65_536, 8192), (2 << 20, 0)] {
            let data = pattern(bytes);
            assert_eq!(client.write(8, &data, immediate).await, 0, "{keys}");
            assert_eq!(client.read(8, bytes).await, data, "{keys} {bytes}");
            assert_eq!(bench.device().content()[4096..4096 + bytes], data);
        }
        client.ping().await;
    }
}

#[tokio::test]
async fn logout_is_answered_and_closes() {
    let bench = Bench::new().await;
    let mut client = bench.client("").await;
    client.log_out().await;
    assert!(client.is_closed().await);
    assert!(bench.server.sessions().all().is_empty());
}

#[tokio::test]
async fn pings_are_answered_while_the_disk_is_slow() {
    let bench = Bench::new().await;
    let mut client = bench.client("").await;
    client.ready().await;
    bench.device().hold();
    let mut command = client.command(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1], 512, 0);
    command.common.immediate = false;
    client.send(&Request::Command(command), b"").await;
    while bench.device().held() == 0 {
        tokio::task::yield_now().await;
    }
    let asked = std::time::Instant::now();
    client.ping().await;
    assert!(asked.elapsed() < Duration::from_millis(100));
    bench.device().release();
    let pdu = client.receive().await.unwrap();
    assert_eq!(
        (opcode_of(&pdu.bhs), pdu.data.len()),
        (opcode::DATA_IN, 512)
    );
}

#[tokio::test]
async fn the_same_initiator_port_reinstates_its_session() {
    let bench = Bench::new().await;
    let mut old = bench.client("").await;
    old.ready().await;
    let mut new = bench.client("").await;
    assert!(old.is_closed().await);
    assert_eq!(bench.server.sessions().all().len(), 1);
    // A new nexus: it has a unit attention.
    let command = new.command(&[0], 0, 0);
    assert_eq!(new.run(command, 0, &[]).await.0, 2);
    new.ready().await;
    // Another ISID is another session.
    let mut other = Client::connect(bench.address).await;
    other.isid[5] = 9;
    other.login("").await;
    other.ready().await;
    new.ready().await;
    assert_eq!(bench.server.sessions().all().len(), 2);
}

#[tokio::test]
async fn a_session_with_two_connections() {
    let bench = Bench::new().await;
    let mut one = bench.client("MaxConnections=2").await;
    one.ready().await;
    let mut two = Client::connect(bench.address).await;
    (two.tsih, two.cid, two.cmd_sn) = (one.tsih, 1, one.cmd_sn);
    two.login("").await;
    let mut three = Client::connect(bench.address).await;
    (three.tsih, three.cid) = (one.tsih, 2);
    assert_eq!(three.try_login("").await, 0x0206);
    let mut four = Client::connect(bench.address).await;
    four.tsih = 4711;
    assert_eq!(four.try_login("").await, 0x020a);
    // CmdSN is the session's: a command on one, the next on the other.
    assert_eq!(two.read(0, 512).await.len(), 512);
    one.cmd_sn = two.cmd_sn;
    assert_eq!(one.read(0, 512).await.len(), 512);
    // The same CID again replaces the connection.
    let mut again = Client::connect(bench.address).await;
    (again.tsih, again.cid, again.cmd_sn) = (one.tsih, 1, one.cmd_sn);
    again.login("").await;
    assert!(two.is_closed().await);
    assert_eq!(again.read(0, 512).await.len(), 512);
    // One that is lost takes the session along.
    drop(again);
    assert!(one.is_closed().await);
}

#[tokio::test]
async fn discovery_shows_what_one_may_use() {
    let mut hidden = entry("iqn.2001-03.jp.tritech:b", "b");
    hidden.initiators = vec!["iqn.someone-else".into()];
    let catalog = catalog([entry(TARGET, "a"), hidden]);
    let bench = Bench::with(Limits::default(), catalog).await;
    let mut client = bench.client("SessionType=Discovery").await;
    let expected = format!("TargetName={TARGET} TargetAddress={},1", bench.address);
    assert_eq!(client.send_targets().await, expected);
}

#[tokio::test]
async fn silent_initiators_are_asked_and_dropped() {
    let probing = Probing {
        interval: Duration::from_millis(100),
        limit: Duration::from_millis(100),
    };
    let limits = Limits {
        probing,
        ..Limits::default()
    };
    let bench = Bench::with(limits, catalog([entry(TARGET, "a")])).await;
    let mut client = bench.client("").await;
    let probe = client.receive().await.unwrap();
    assert_eq!(opcode_of(&probe.bhs), opcode::NOP_IN);
    assert!(client.is_closed().await);
    assert!(bench.server.sessions().all().is_empty());
}

#[tokio::test]
async fn kicked_initiators_are_asked_to_log_out() {
    let bench = Bench::new().await;
    let mut client = bench.client("").await;
    assert!(!bench.server.kick(4711, Duration::ZERO));
    assert!(bench.server.kick(client.tsih, Duration::from_secs(1)));
    let pdu = client.receive().await.unwrap();
    assert_eq!(
        (opcode_of(&pdu.bhs), pdu.bhs[36]),
        (opcode::ASYNC_MESSAGE, 1)
    );
    // It does not: it is dropped.
    let pdu = client.receive().await.unwrap();
    assert_eq!(
        (opcode_of(&pdu.bhs), pdu.bhs[36]),
        (opcode::ASYNC_MESSAGE, 3)
    );
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn reload_touches_only_what_changed() {
    let other = "iqn.2001-03.jp.tritech:b";
    let both = || catalog([entry(TARGET, "a"), entry(other, "b")]);
    let bench = Bench::with(Limits::default(), both()).await;
    let mut stays = bench.client("").await;
    stays.ready().await;
    let mut goes = bench.client(&format!("TargetName={other}")).await;
    goes.ready().await;
    let missing = bench.server.apply(catalog([entry(TARGET, "a")])).await;
    assert_eq!(missing, []);
    // Dropped, and told so.
    let pdu = goes.receive().await.unwrap();
    assert_eq!(opcode_of(&pdu.bhs), opcode::ASYNC_MESSAGE);
    assert!(goes.is_closed().await);
    let mut late = Client::connect(bench.address).await;
    assert_eq!(late.try_login(&format!("TargetName={other}")).await, 0x0203);
    // No unit attention, no break.
    let command = stays.command(&[0], 0, 0);
    assert_eq!(stays.run(command, 0, &[]).await.0, 0);
    // A volume that is not there is told.
    let missing = bench.server.apply(catalog([entry(TARGET, "gone")])).await;
    assert_eq!(missing.len(), 1);
    assert_eq!(
        (missing[0].lun, &*missing[0].volume, missing[0].why),
        (1, "gone", None)
    );
}

#[tokio::test]
async fn targets_whose_volumes_are_not_open_tell_initiators_to_come_again() {
    let bench = Bench::new().await;
    bench
        .server
        .host_for(&entry("iqn.2001-03.jp.tritech:late", "a"));
    let late = catalog([
        entry(TARGET, "a"),
        entry("iqn.2001-03.jp.tritech:late", "a"),
    ]);
    *bench.server.catalog.write().unwrap() = Arc::new(late);
    let mut client = Client::connect(bench.address).await;
    let status = client
        .try_login("TargetName=iqn.2001-03.jp.tritech:late")
        .await;
    assert_eq!(status, 0x0301);
}

#[tokio::test]
async fn connections_that_do_not_log_in_are_bounded_and_timed() {
    let limits = Limits {
        login_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let bench = Bench::with(limits, catalog([entry(TARGET, "a")])).await;
    let mut idle = Vec::new();
    for _ in 0..LOGINS_PER_ADDRESS_MAX {
        idle.push(Client::connect(bench.address).await);
    }
    let mut late = Client::connect(bench.address).await;
    assert!(late.is_closed().await);
    for client in &mut idle {
        assert!(client.is_closed().await);
    }
    bench.client("").await;
}

/// An initiator that asks for much and reads nothing gets what is bounded, and harms nobody.
#[tokio::test]
async fn an_initiator_that_does_not_read_is_bounded() {
    let bench = Bench::new().await;
    let mut greedy = bench.client("").await;
    for _ in 0..100 {
        let command = greedy.command(&[0x28, 0, 0, 0, 0, 0, 0, 0x40, 0], 8 << 20, 0);
        greedy.send(&Request::Command(command), b"").await;
    }
    let mut other = Client::connect(bench.address).await;
    other.isid[5] = 3;
    other.login("").await;
    other.ready().await;
    let handles = bench.server.sessions().all();
    let greedy_handle = handles.iter().find(|it| it.isid[5] == 1).unwrap();
    let unsent: usize = greedy_handle
        .session()
        .connections()
        .map(|it| it.unsent_bytes())
        .sum();
    assert!(
        unsent <= crate::session::BYTES_IN_FLIGHT_MAX + (1 << 20),
        "{unsent}"
    );
    assert!(greedy_handle.session().tasks() > 50);
}

/// Nobody calls the SCSI side while nobody is logged in; a command that comes then has all of its time.
#[tokio::test]
async fn the_first_command_after_a_pause_has_its_time() {
    let limits = Limits {
        command_timeout: Duration::from_secs(2),
        ..Limits::default()
    };
    let bench = Bench::with(limits, catalog([entry(TARGET, "a")])).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut client = bench.client("").await;
    client.ready().await;
    bench.device().hold();
    let device = bench.device();
    let later = tokio::spawn(async move {
        // Longer than the SCSI side goes without looking at its clock.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(device.held(), 1);
        device.release();
    });
    assert_eq!(client.read(0, 512).await.len(), 512);
    later.await.unwrap();
}

/// Two gateways before one volume.
#[tokio::test]
async fn a_reset_of_one_gateway_is_seen_on_the_other() {
    let bench = Bench::new().await;
    let volumes = Arc::clone(&bench.volumes);
    let entries = catalog([entry(TARGET, "a")]);
    let other_side = Bench::of(volumes, 2, Limits::default(), entries).await;
    let mut one = bench.client("").await;
    let mut other = other_side.client("").await;
    one.ready().await;
    other.ready().await;
    other_side.device().hold();
    let write = other.command(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1], 0, 512);
    let (tag, request) = (write.common.itt, Request::Command(write));
    other.send(&request, &[7; 512]).await;
    while bench.device().held() == 0 {
        tokio::task::yield_now().await;
    }
    let reset = Request::Task(TaskRequest {
        common: one.common(),
        function: 5,
        lun: LUN,
        referenced_tag: RESERVED_TAG,
        ref_cmd_sn: 0,
    });
    one.send(&reset, b"").await;
    let answer = one.receive().await.unwrap();
    assert_eq!(
        (opcode_of(&answer.bhs), answer.bhs[2]),
        (opcode::TASK_RESPONSE, 0)
    );
    let ended = other.receive().await.unwrap();
    assert_eq!((word(&ended.bhs, 16), ended.bhs[3]), (tag, 2));
    assert_eq!(ended.data[14..16], [0x29, 0x03]);
    other_side.device().release();
    other.ready().await;
}

fn tool(name: &str, arguments: &[&str]) -> tokio::task::JoinHandle<(bool, String)> {
    let mut program = Program::new(name);
    program.args(arguments);
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || {
        let output = program
            .output()
            .unwrap_or_else(|error| panic!("{name} (package libiscsi-bin): {error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (
            output.status.success(),
            text + &String::from_utf8_lossy(&output.stderr),
        )
    })
}

#[tokio::test]
async fn libiscsis_tools() {
    let mut chap = entry("iqn.2001-03.jp.tritech:chap", "b");
    chap.accounts.incoming.push(Account {
        name: "iscsi_pss".into(),
        secret: Secret::new("iscsi_pss000"),
    });
    let bench = Bench::with(Limits::default(), catalog([entry(TARGET, "a"), chap])).await;
    let portal = format!("iscsi://{}", bench.address);
    let (_, said) = tool("iscsi-ls", &[&portal]).await.unwrap();
    assert!(
        said.contains(&format!("Target:{TARGET} Portal:{},1", bench.address)),
        "{said}"
    );
    let (done, said) = tool("iscsi-inq", &[&bench.url(TARGET)]).await.unwrap();
    assert!(done && said.contains("DIRECT_ACCESS"), "{said}");
    let digest = format!("{}?header_digest=crc32c", bench.url(TARGET));
    let (done, said) = tool("iscsi-readcapacity16", &[&digest]).await.unwrap();
    assert!(done && said.contains("Total size:67108864"), "{said}");
    let url = |user: &str| {
        let (address, name) = (bench.address, "iqn.2001-03.jp.tritech:chap");
        format!("iscsi://{user}{address}/{name}/1")
    };
    let (done, said) = tool("iscsi-inq", &[&url("iscsi_pss%iscsi_pss000@")])
        .await
        .unwrap();
    assert!(done && said.contains("DIRECT_ACCESS"), "{said}");
    for wrong in ["", "iscsi_pss%wrong_secret0@", "nobody%iscsi_pss000@"] {
        let (_, said) = tool("iscsi-inq", &[&url(wrong)]).await.unwrap();
        assert!(said.contains("Authentication failure"), "{said}");
    }
}

/// The part of libiscsi's suite that is about iSCSI itself; the rest is run by the tests of the workspace.
#[tokio::test]
async fn libiscsis_suite_for_the_protocol() {
    let bench = Bench::new().await;
    for suite in ["iSCSIcmdsn", "iSCSIdatasn", "iSCSIResiduals"] {
        let (url, test) = (bench.url(TARGET), format!("iSCSI.{suite}"));
        let (done, said) = tool("iscsi-test-cu", &["-d", "-f", "-t", &test, &url])
            .await
            .unwrap();
        // Total, ran, passed, failed. Skips are said apart.
        let row = said
            .lines()
            .find_map(|line| line.trim().strip_prefix("tests "));
        let counts = row.unwrap_or_default().split_whitespace();
        let counts: Vec<u32> = counts.map_while(|it| it.parse().ok()).collect();
        assert!(done && counts.len() > 3, "{said}");
        assert!(
            counts[0] > 0 && counts[0] == counts[2] && counts[3] == 0,
            "{said}"
        );
        assert!(!said.contains("[SKIPPED]"), "{said}");
    }
}
