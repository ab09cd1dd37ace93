//! A cell of servers in this process, each with its own directory and loopback address.

pub(crate) mod failing;
mod inspect;
pub(crate) mod raw;
mod speed;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pss_core::client::{Cell, CellConfig, ClientError, Shrink};
use pss_core::disk::Disk;
use pss_core::disk::files::FileDisk;
use pss_core::key::{CellId, CellKey};
use pss_core::servers::Servers;
use pss_core::storage::{Identity, IdentityFacts};
use pss_core::types::{Ballot, GroupId, Incarnation, ServerId};
use pss_core::volume::device::{
    BlockDevice, CompletionQueue, DeviceReply, DeviceRequest, DeviceResult, ReadPart, Volumes,
};
use pss_core::wire::client::ServerStatus;
use pss_server::config::{ServerConfig, Tuning};
use pss_server::node::{Server, ServerHandle, StartError};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// So long may anything take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct TestCell {
    dir: TempDir,
    pub(crate) servers: Servers,
    pub(crate) key: Option<CellKey>,
    pub(crate) id: CellId,
    pub(crate) tuning: Tuning,
    pub(crate) running: BTreeMap<u8, ServerHandle>,
    pub(crate) runtime: Arc<Runtime>,
}

/// Small, so that tests see segments change, checkpoints and elections soon.
pub(crate) fn small() -> Tuning {
    Tuning {
        scrub_period: None,
        segment_bytes: 8 << 20,
        checkpoint_bytes: 8 << 20,
        checkpoint_interval: Duration::from_millis(500),
        log_retain_bytes: 64 << 20,
        lease: Duration::from_millis(400),
    }
}

/// A loopback address that no other test uses.
fn own_address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let [.., high, low] = process.to_be_bytes();
    IpAddr::from([
        127,
        64 + high % 128,
        low,
        NEXT.fetch_add(1, Ordering::Relaxed),
    ])
}

impl TestCell {
    /// Formats servers 0 to `count - 1`, and starts none.
    pub(crate) fn new(count: u8, tuning: Tuning) -> TestCell {
        let ids: Vec<u8> = (0..count).collect();
        TestCell::with_ids(&ids, tuning)
    }

    /// Formats these servers, and starts none.
    pub(crate) fn with_ids(ids: &[u8], tuning: Tuning) -> TestCell {
        let address = own_address();
        let servers = Servers::new(ids.iter().map(|id| (ServerId(*id), address)));
        let cell = TestCell {
            dir: tempfile::tempdir().unwrap(),
            servers,
            key: Some(CellKey::from_bytes([7; 32])),
            id: CellId([3; 16]),
            tuning,
            running: BTreeMap::new(),
            runtime: Arc::new(Runtime::new().unwrap()),
        };
        for id in ids {
            cell.format(*id, &cell.disk(*id));
        }
        cell
    }

    pub(crate) fn started(count: u8, tuning: Tuning) -> TestCell {
        let mut cell = TestCell::new(count, tuning);
        for id in 0..count {
            cell.start(id);
        }
        cell
    }

    pub(crate) fn path(&self, id: u8) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    pub(crate) fn disk(&self, id: u8) -> Arc<dyn Disk> {
        Arc::new(FileDisk::open(self.path(id)).unwrap())
    }

    pub(crate) fn format(&self, id: u8, disk: &Arc<dyn Disk>) {
        let facts = IdentityFacts {
            group: GroupId(0),
            cell: self.id.0,
            server: ServerId(id),
            incarnation: Incarnation(1),
            promised: Ballot::default(),
            rejoining: false,
            discards: false,
        };
        Identity::create(Arc::clone(disk), facts, false).unwrap();
    }

    pub(crate) fn config(&self, id: u8) -> ServerConfig {
        ServerConfig {
            id: ServerId(id),
            servers: self.servers.clone(),
            path: self.path(id),
            key: self.key.clone(),
            cell: self.id,
            tuning: self.tuning.clone(),
            source: None,
            is_truth: false,
        }
    }

    pub(crate) fn try_start(&self, id: u8) -> Result<ServerHandle, StartError> {
        Server::start(self.config(id))
    }

    pub(crate) fn start(&mut self, id: u8) {
        let handle = self.try_start(id).unwrap();
        self.running.insert(id, handle);
    }

    /// As if the process had been killed.
    pub(crate) fn kill(&mut self, id: u8) {
        let handle = self.running.remove(&id).unwrap();
        handle.stop_now();
        handle.wait().unwrap();
    }

    pub(crate) fn stop(&mut self, id: u8) {
        let handle = self.running.remove(&id).unwrap();
        handle.stop();
        handle.wait().unwrap();
    }

    pub(crate) fn status(&self, id: u8) -> ServerStatus {
        self.running[&id].status().unwrap()
    }

    /// Waits until `done`; panics with what the servers say if that does not come.
    pub(crate) fn wait_for(&self, what: &str, done: impl Fn(&TestCell) -> bool) {
        let start = Instant::now();
        while !done(self) {
            if start.elapsed() > PATIENCE {
                let statuses: Vec<_> = self.running.values().map(ServerHandle::status).collect();
                panic!("waited in vain for {what}: {statuses:#?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn leader_now(&self) -> Option<u8> {
        let statuses = self.running.values().filter_map(ServerHandle::status);
        statuses
            .filter(|status| status.role == "leader")
            .map(|status| status.server.0)
            .next()
    }

    pub(crate) fn leader(&self) -> u8 {
        self.wait_for("a leader", |cell| cell.leader_now().is_some());
        self.leader_now().unwrap()
    }

    pub(crate) fn wait_caught_up(&self, id: u8) {
        self.wait_for("catching up", |cell| {
            let Some(leader) = cell.leader_now() else {
                return false;
            };
            let (leader, own) = (cell.status(leader), cell.status(id));
            own.applied >= leader.applied && own.copying.is_none()
        });
    }

    /// Waits until every server counts: what the leader holds is durable on all of them.
    pub(crate) fn wait_all_count(&self) {
        self.wait_for("all servers to count", |cell| {
            let Some(leader) = cell.leader_now() else {
                return false;
            };
            let leader = cell.status(leader);
            let others = leader.peers.iter();
            leader.last > 0 && { others }.all(|other| other.durable >= leader.last)
        });
    }

    pub(crate) fn tcp(&self, id: u8) -> SocketAddr {
        self.servers.tcp(ServerId(id)).unwrap()
    }

    pub(crate) fn udp(&self, id: u8) -> SocketAddr {
        self.servers.udp(ServerId(id)).unwrap()
    }

    pub(crate) fn client_config(&self) -> CellConfig {
        let ids = self.servers.ids().into_iter();
        let servers = ids.map(|id| (id, self.servers.tcp(id).unwrap())).collect();
        CellConfig {
            key: self.key.clone(),
            request_timeout: PATIENCE,
            ..CellConfig::new(servers, "test")
        }
    }

    pub(crate) fn client(&self) -> Client {
        let _inside = self.runtime.enter();
        Client {
            runtime: Arc::clone(&self.runtime),
            cell: Cell::connect(self.client_config()),
        }
    }
}

impl Drop for TestCell {
    fn drop(&mut self) {
        for handle in self.running.values() {
            handle.stop_now();
        }
        for handle in self.running.values() {
            let _ = handle.wait();
        }
    }
}

/// A client whose calls block.
pub(crate) struct Client {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) cell: Arc<Cell>,
}

impl Client {
    pub(crate) fn create(&self, name: &str, size_bytes: u64) {
        self.runtime
            .block_on(self.cell.create_volume(name, size_bytes, 1 << 20))
            .unwrap();
    }

    /// Whoever has it open, and whether it becomes smaller or not.
    pub(crate) fn resize(&self, name: &str, size_bytes: u64) -> Result<(), ClientError> {
        let resized = async {
            let volumes = self.cell.volumes().await.unwrap();
            let found = volumes.iter().find(|it| it.volume.name == name).unwrap();
            let volume = found.volume.id;
            self.cell
                .resize_volume(volume, size_bytes, Shrink::Always)
                .await
        };
        self.runtime.block_on(resized)
    }

    /// Nobody may have it open.
    pub(crate) fn delete(&self, name: &str) {
        let deleted = async {
            let volumes = self.cell.volumes().await.unwrap();
            let found = volumes.iter().find(|it| it.volume.name == name).unwrap();
            self.cell.delete_volume(found.volume.id, false).await
        };
        self.runtime.block_on(deleted).unwrap();
    }

    pub(crate) fn open(&self, name: &str) -> Volume {
        let device = self.runtime.block_on(self.cell.open(name)).unwrap();
        Volume {
            device: device.expect("the volume exists"),
        }
    }
}

/// A volume whose requests may be waited for.
#[derive(Clone)]
pub(crate) struct Volume {
    pub(crate) device: Arc<dyn BlockDevice>,
}

impl Volume {
    fn submit_to(&self, request: DeviceRequest) -> (Arc<CompletionQueue>, Receiver<()>) {
        let (done, wake) = channel();
        let queue = CompletionQueue::new(Box::new(move || {
            let _ = done.send(());
        }));
        self.device.submit(request, queue.completion(0));
        (queue, wake)
    }

    pub(crate) fn request(&self, request: DeviceRequest) -> DeviceResult {
        let (queue, done) = self.submit_to(request);
        done.recv_timeout(PATIENCE * 2)
            .expect("every request is answered");
        let mut results = Vec::new();
        queue.take(&mut results);
        results.remove(0).1
    }

    pub(crate) fn write(&self, offset_bytes: u64, data: &[u8]) {
        let data = Bytes::copy_from_slice(data);
        let write = DeviceRequest::Write {
            offset_bytes,
            data,
            fua: false,
        };
        assert_eq!(self.request(write), Ok(DeviceReply::Done));
    }

    pub(crate) fn read(&self, offset_bytes: u64, length_bytes: u32) -> Vec<u8> {
        match self.request(DeviceRequest::Read {
            offset_bytes,
            length_bytes,
        }) {
            Ok(DeviceReply::Data(parts)) => {
                let mut bytes = Vec::new();
                for part in parts {
                    match part {
                        ReadPart::Data(data) => bytes.extend_from_slice(&data),
                        ReadPart::Hole(length) => bytes.resize(bytes.len() + length as usize, 0),
                    }
                }
                bytes
            }
            other => panic!("read at {offset_bytes}: {other:?}"),
        }
    }
}

/// Content that tells blocks and versions apart.
pub(crate) fn pattern(block: u64, version: u64) -> Vec<u8> {
    let word = (block << 20 | version)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .to_le_bytes();
    word.iter().copied().cycle().take(4096).collect()
}

/// Memory of this process.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
