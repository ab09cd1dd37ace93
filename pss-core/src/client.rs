//! Gateways' and tools' side of a cell: finds the leader, keeps a session, repeats what was not
//! answered, and hands volumes out as [`BlockDevice`]s. Needs a tokio runtime with IO and time.
//!
//! One connection to the leader carries everything of one [`Cell`]. When it breaks or the leader
//! changes, requests that were not answered are sent to the next leader under the same numbers; the
//! front end sees a delay and nothing else. A request that gets no answer within
//! [`CellConfig::request_timeout`] completes with [`DeviceError::Unavailable`].
//!
//! A cell that did not hear from this gateway for too long ends its session. Then every write that was
//! under way, or waited, completes with [`DeviceError::Fenced`], and the devices' fate is
//! [`Fate::Fenced`](crate::volume::device::Fate::Fenced) until a new session has attached the volumes
//! again; after that they go on.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;

use crate::key::CellKey;
use crate::members::Members;
use crate::state::{Refusal, Volume};
use crate::types::{ServerId, VolumeId};
use crate::volume::device::{BlockDevice, BoxFuture, DeviceError, DeviceInfo, Volumes};
use crate::wire::DecodeError;
use crate::wire::auth::{Denial, HandshakeError};
use crate::wire::client::{
    Browse, ClientDecodeError, EventList, ReplyBody, ReplyError, RequestBody, ServerStatus,
    VolumeStatus,
};
use crate::wire::frame::FrameError;
use crate::wire::inspect::{Inspect, Inspection};

mod device;
mod driver;
mod leader;
mod nearest;
mod session;

pub use device::DEVICE_REQUEST_BYTES_MAX;
use device::{Device, info_of};
use driver::{CallError, Driver, Handle, Inbox, Item, Target};
use leader::Dialer;
pub use nearest::{Freshness, Nearest};

/// How to reach a cell.
#[derive(Clone, Debug)]
pub struct CellConfig {
    /// The servers with their TCP addresses.
    pub servers: Vec<(ServerId, SocketAddr)>,
    /// The cell key, if the cell has one.
    pub key: Option<CellKey>,
    /// What this client calls itself, for people: such as `pss-nbd@host`.
    pub client_name: String,
    /// Who uses this client, for people; may be empty. The servers cannot check it.
    pub client_user: String,
    /// A request without an answer for so long fails.
    pub request_timeout: Duration,
    /// A server that does not accept a connection, or does not answer a question about itself, for so
    /// long is taken for unreachable.
    pub connect_timeout: Duration,
}

impl CellConfig {
    /// With 30 s for requests and 1 s for connections.
    pub fn new(servers: Vec<(ServerId, SocketAddr)>, client_name: &str) -> CellConfig {
        CellConfig {
            servers,
            key: None,
            client_name: client_name.to_owned(),
            client_user: String::new(),
            request_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(1),
        }
    }
}

/// Why one server gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ServerError {
    /// It is not among the configured servers.
    #[error("no such server is configured")]
    NotListed,
    /// The connection failed.
    #[error("{0}")]
    Io(Arc<std::io::Error>),
    /// It did not answer.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// It closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// It is not who it should be, or does not let us in.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It sent bytes that are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It sent a frame that makes no sense.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It refused the request.
    #[error(transparent)]
    Reply(#[from] ReplyError),
    /// It answered something else than what was asked.
    #[error("the answer does not fit the question")]
    Unexpected,
}

impl ServerError {
    /// Whether the server, or this client, takes the other for a stranger: their keys differ.
    pub fn is_denial(&self) -> bool {
        let ServerError::Handshake(error) = self else {
            return false;
        };
        match error {
            HandshakeError::KeyMissing { .. }
            | HandshakeError::KeyUnexpected { .. }
            | HandshakeError::Proof { .. } => true,
            HandshakeError::Denied { reason, .. } => matches!(
                reason,
                Denial::KeyMissing | Denial::KeyUnexpected | Denial::Proof
            ),
            HandshakeError::Version { .. }
            | HandshakeError::OtherCell { .. }
            | HandshakeError::OtherServer { .. }
            | HandshakeError::Unexpected(_)
            | HandshakeError::Malformed(_) => false,
        }
    }
}

impl From<std::io::Error> for ServerError {
    fn from(error: std::io::Error) -> ServerError {
        ServerError::Io(Arc::new(error))
    }
}

impl From<ClientDecodeError> for ServerError {
    fn from(error: ClientDecodeError) -> ServerError {
        ServerError::Decode(error.error)
    }
}

/// Why a request to the cell failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// No leader was found, or it gave no answer in time: probably no majority of the servers works.
    /// Whether a change was made is open.
    #[error("no majority of the servers answered in time: {}", Outcomes(.answered, .silent))]
    Unavailable {
        /// Servers that answered when the leader was last searched.
        answered: Vec<ServerId>,
        /// The others, and why they did not.
        silent: Vec<(ServerId, ServerError)>,
    },
    /// The cell refuses.
    #[error(transparent)]
    Refused(Refusal),
    /// The leader cannot do it.
    #[error(transparent)]
    Reply(ReplyError),
    /// The session was ended while the request was under way; whether a change was made is open.
    #[error("the cell has ended this session; whether the change was made is open")]
    Fenced,
    /// The leader answered something else than what was asked.
    #[error("the leader's answer does not fit the question")]
    Unexpected,
}

/// Writes who answered and who did not.
struct Outcomes<'a>(&'a [ServerId], &'a [(ServerId, ServerError)]);

impl std::fmt::Display for Outcomes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let answered = self
            .0
            .iter()
            .map(|server| format!("server {server} answers"));
        let silent = self
            .1
            .iter()
            .map(|(server, error)| format!("server {server}: {error}"));
        let all: Vec<String> = answered.chain(silent).collect();
        f.write_str(&all.join("; "))
    }
}

/// Whether a volume may become smaller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shrink {
    /// No.
    Never,
    /// If no session has it attached.
    Unused,
    /// Whoever has it attached.
    Always,
}

/// A cell, as its clients see it.
pub struct Cell {
    handle: Arc<Handle>,
    dialer: Arc<Dialer>,
    /// Devices that are open. Locked over the whole of opening, so that a volume is attached once.
    open: Mutex<Vec<(VolumeId, Weak<Device>)>>,
}

impl Cell {
    /// Starts a task on the current tokio runtime and returns at once; the task connects when there
    /// is need.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn connect(config: CellConfig) -> Arc<Cell> {
        let inbox = Arc::new(Inbox::default());
        let dialer = Arc::new(Dialer::new(config));
        let nonces = Box::new(random);
        tokio::spawn(Driver::new(Arc::clone(&inbox), Arc::clone(&dialer), nonces));
        Arc::new(Cell {
            handle: Arc::new(Handle::new(inbox)),
            dialer,
            open: Mutex::default(),
        })
    }

    /// Ends the session, after what is under way, and returns when that is done or 2 s have passed.
    /// Later requests fail.
    pub async fn close(&self) {
        let (sender, ended) = oneshot::channel();
        self.handle.push(Item::Close(sender));
        let _ = ended.await;
    }

    /// The servers: those of the configuration, and those that the cell is known to have besides.
    pub fn servers(&self) -> Vec<ServerId> {
        self.dialer.servers()
    }

    /// Where one server stands.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn status(&self, server: ServerId) -> Result<ServerStatus, ServerError> {
        match self.dialer.ask(server, RequestBody::Status).await? {
            ReplyBody::Status(status) => Ok(*status),
            _ => Err(ServerError::Unexpected),
        }
    }

    /// Where all servers stand, in the order of their ids; also those that only the others know of.
    pub async fn status_all(&self) -> Vec<(ServerId, Result<ServerStatus, ServerError>)> {
        let mut answers: Vec<(ServerId, Result<ServerStatus, ServerError>)> = Vec::new();
        loop {
            let mut questions = JoinSet::new();
            for server in self.servers() {
                if answers.iter().any(|(asked, _)| *asked == server) {
                    continue;
                }
                let dialer = Arc::clone(&self.dialer);
                questions.spawn(async move {
                    let result = match dialer.ask(server, RequestBody::Status).await {
                        Ok(ReplyBody::Status(status)) => Ok(*status),
                        Ok(_) => Err(ServerError::Unexpected),
                        Err(error) => Err(error),
                    };
                    (server, result)
                });
            }
            if questions.is_empty() {
                break;
            }
            let told = questions.join_all().await;
            let statuses = told.iter().filter_map(|(_, it)| it.as_ref().ok());
            statuses.for_each(|status| self.dialer.learn(status.members.as_ref()));
            answers.extend(told);
        }
        answers.sort_by_key(|(server, _)| *server);
        answers
    }

    /// What one server tells of its inside, whether it leads or not.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn inspect(
        &self,
        server: ServerId,
        what: Inspect,
    ) -> Result<Inspection, ServerError> {
        match self.dialer.ask(server, RequestBody::Inspect(what)).await? {
            ReplyBody::Inspection(inspection) => Ok(*inspection),
            _ => Err(ServerError::Unexpected),
        }
    }

    /// Has a server give up the majority and go on alone.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn recover(&self, server: ServerId, members: Members) -> Result<(), ServerError> {
        let members = Box::new(members);
        let body = RequestBody::Recover { members };
        match self.dialer.ask(server, body).await? {
            ReplyBody::Done => Ok(()),
            _ => Err(ServerError::Unexpected),
        }
    }

    /// Stops a server cleanly.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn shutdown(&self, server: ServerId) -> Result<(), ServerError> {
        match self.dialer.ask(server, RequestBody::Shutdown).await? {
            ReplyBody::Done => Ok(()),
            _ => Err(ServerError::Unexpected),
        }
    }

    /// All volumes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn volumes(&self) -> Result<Vec<VolumeStatus>, ClientError> {
        match self.call(RequestBody::ListVolumes).await? {
            ReplyBody::Volumes(volumes) => Ok(volumes),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Looks at volumes as their keeper: reservations do not apply, and nothing is attached. Everything that was
    /// answered before is in the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn browse(&self, what: Browse) -> Result<ReplyBody, ClientError> {
        self.call(RequestBody::Browse { stale: false, what }).await
    }

    /// The cell's nearest server, for answers that may be stale.
    pub fn nearest(&self) -> Nearest {
        Nearest::new(Arc::clone(&self.dialer))
    }

    /// Creates a volume with a random identity.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn create_volume(
        &self,
        name: &str,
        size_bytes: u64,
        chunk_bytes: u32,
    ) -> Result<VolumeId, ClientError> {
        let body = RequestBody::CreateVolume {
            name: name.to_owned(),
            size_bytes,
            chunk_bytes,
            uuid: random_uuid(),
        };
        match self.call(body).await? {
            ReplyBody::VolumeCreated(id) => Ok(id),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Changes a volume's size.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn resize_volume(
        &self,
        volume: VolumeId,
        size_bytes: u64,
        shrink: Shrink,
    ) -> Result<(), ClientError> {
        let allow_shrink = shrink == Shrink::Always;
        let body = match shrink {
            Shrink::Unused => RequestBody::ShrinkVolume { volume, size_bytes },
            Shrink::Never | Shrink::Always => RequestBody::ResizeVolume {
                volume,
                size_bytes,
                allow_shrink,
            },
        };
        self.change(body).await
    }

    /// Deletes a volume; one that is attached only by `force`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete_volume(&self, volume: VolumeId, force: bool) -> Result<(), ClientError> {
        let body = match force {
            false => RequestBody::DeleteVolume { volume },
            true => RequestBody::DeleteAttachedVolume { volume },
        };
        self.change(body).await
    }

    /// Has the cell note what this client is about to do, or has done, of which its log would not know otherwise. The
    /// text is cut to [`NOTE_BYTES_MAX`](crate::entry::NOTE_BYTES_MAX).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn note(&self, text: &str) -> Result<(), ClientError> {
        let text = text.to_owned();
        self.change(RequestBody::Note { text }).await
    }

    /// Proposes another list of servers; see [`RequestBody::SetServers`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn set_servers(&self, members: Members) -> Result<(), ClientError> {
        let members = Box::new(members);
        self.change(RequestBody::SetServers { members }).await
    }

    /// What was done to the cell, by whom and when: of what it still has, the oldest
    /// [`EVENTS_ANSWERED_MAX`](crate::wire::client::EVENTS_ANSWERED_MAX) with numbers above `after`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn events(&self, after: u64) -> Result<EventList, ClientError> {
        match self.call(RequestBody::Events { after }).await? {
            ReplyBody::Events(list) => Ok(*list),
            _ => Err(ClientError::Unexpected),
        }
    }

    async fn change(&self, body: RequestBody) -> Result<(), ClientError> {
        match self.call(body).await? {
            ReplyBody::Done => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Has a request carried out by the leader, whoever that is or becomes.
    async fn call(&self, body: RequestBody) -> Result<ReplyBody, ClientError> {
        let (sender, answer) = oneshot::channel();
        self.handle.push(Item::Request {
            body,
            target: Target::Call(sender),
        });
        match answer.await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(CallError::Reply(ReplyError::Refused(refusal)))) => {
                Err(ClientError::Refused(refusal))
            }
            Ok(Err(CallError::Reply(error))) => Err(ClientError::Reply(error)),
            Ok(Err(CallError::Fenced)) => Err(ClientError::Fenced),
            Ok(Err(CallError::Expired)) | Err(_) => Err(self.unavailable()),
        }
    }

    /// The failure of a request that waits no longer: who answered, and who did not, when the leader was last searched.
    pub fn unavailable(&self) -> ClientError {
        let outcomes = self
            .dialer
            .outcomes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut answered = Vec::new();
        let mut silent = Vec::new();
        for (server, outcome) in outcomes.iter() {
            match outcome {
                Ok(()) => answered.push(*server),
                Err(error) => silent.push((*server, error.clone())),
            }
        }
        ClientError::Unavailable { answered, silent }
    }

    async fn open_volume_unused(&self, name: &str) -> Result<Option<Device>, ClientError> {
        let volumes = self.volumes().await?;
        let device = |volume| Device::new(volume, Arc::clone(&self.handle), false);
        Ok(named(&volumes, name).map(device))
    }

    async fn open_volume(&self, name: &str) -> Result<Option<Arc<dyn BlockDevice>>, ClientError> {
        let mut open = self.open.lock().await;
        let volumes = self.volumes().await?;
        let Some(volume) = named(&volumes, name) else {
            return Ok(None);
        };
        open.retain(|(_, device)| device.strong_count() > 0);
        let found = open.iter().find(|(id, _)| *id == volume.id);
        if let Some(device) = found.and_then(|(_, device)| device.upgrade()) {
            device.state.set_size(volume.size_bytes);
            return Ok(Some(device));
        }
        let device = Arc::new(Device::new(volume, Arc::clone(&self.handle), true));
        let attach = RequestBody::Attach { volume: volume.id };
        match self.change(attach).await {
            Ok(()) => {}
            Err(ClientError::Refused(Refusal::NoSuchVolume)) => return Ok(None),
            Err(error) => return Err(error),
        }
        open.push((volume.id, Arc::downgrade(&device)));
        Ok(Some(device))
    }
}

impl Volumes for Cell {
    fn list(&self) -> BoxFuture<'_, Result<Vec<DeviceInfo>, DeviceError>> {
        Box::pin(async {
            let volumes = self.volumes().await.map_err(|error| device_error(&error))?;
            let mut infos: Vec<DeviceInfo> = volumes
                .iter()
                .map(|status| info_of(&status.volume))
                .collect();
            infos.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(infos)
        })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn BlockDevice>>, DeviceError>> {
        Box::pin(async move {
            self.open_volume(name).await.map_err(|error| {
                tracing::warn!(volume = name, %error, "volume cannot be opened");
                device_error(&error)
            })
        })
    }

    fn open_unused<'a>(
        &'a self,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn BlockDevice>>, DeviceError>> {
        Box::pin(async move {
            match self.open_volume_unused(name).await {
                Ok(device) => Ok(device.map(|device| Arc::new(device) as Arc<dyn BlockDevice>)),
                Err(error) => {
                    tracing::warn!(volume = name, %error, "volume cannot be opened");
                    Err(device_error(&error))
                }
            }
        })
    }
}

/// The volume of that name; the only volume, if the name is empty.
fn named<'a>(volumes: &'a [VolumeStatus], name: &str) -> Option<&'a Volume> {
    if let ("", [only]) = (name, volumes) {
        return Some(&only.volume);
    }
    let mut volumes = volumes.iter().map(|status| &status.volume);
    volumes.find(|volume| volume.name == name)
}

fn device_error(error: &ClientError) -> DeviceError {
    match error {
        ClientError::Unavailable { .. } | ClientError::Refused(_) => DeviceError::Unavailable,
        ClientError::Reply(ReplyError::NoSpace) => DeviceError::NoSpace,
        ClientError::Reply(_) | ClientError::Unexpected => DeviceError::Io,
        ClientError::Fenced => DeviceError::Fenced,
    }
}

fn random() -> u64 {
    getrandom::u64().expect("the operating system gives random numbers")
}

/// A random UUID (version 4).
fn random_uuid() -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&random().to_le_bytes());
    uuid[8..].copy_from_slice(&random().to_le_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

#[cfg(test)]
mod tests;
