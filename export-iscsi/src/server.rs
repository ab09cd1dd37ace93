//! The tokio shell: accepts initiators, leads them through login, and serves their sessions.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pss_core::volume::device::{DeviceError, ReadPart, Volumes};
use pss_core::volume::reservation::ReservationRequest;
use pss_gateway::listen::{Listener, Stream};
use pss_gateway::sending::SendQueue;
use pss_gateway::throttle::SharedThrottle;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, error, info, warn};

use crate::auth::Challenges;
use crate::catalog::{Catalog, NotAdmitted, TargetEntry};
use crate::clock::Clock;
use crate::host::Host;
use crate::keys::DEFAULT_DATA_BYTES;
use crate::link::Link;
use crate::login::{Context, Established, Login, Output, SessionRefusal};
use crate::pdu::framing::Framing;
use crate::pdu::outgoing::push;
use crate::pdu::{Bhs, Digests};
use crate::scsi::TargetConfig;
use crate::session::{Ending, Probing, Wanted};
use crate::sessions::{Ends, Handle, Place, SESSIONS_MAX, Sessions};

/// Most connections at a time, unless configured.
pub const CONNECTIONS_MAX: usize = 4096;
/// Time that an initiator has for its login.
pub const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);
/// Most connections of one address that have not logged in.
const LOGINS_PER_ADDRESS_MAX: usize = 64;
/// Most connections that have not logged in.
const LOGINS_MAX: usize = 512;
/// Pause after a failed `accept`, which fails again at once when file descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Data that was sent and is not acknowledged for so long ends a connection.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(20);
/// Receive buffer of the login.
const LOGIN_RECEIVE_BYTES: usize = 4 << 10;
/// Refused logins that are logged in 10 s; others are counted.
const REFUSALS_LOGGED: u32 = 50;
/// How often volumes that could not be opened are tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections at a time; further ones are closed at once.
    pub connections_max: usize,
    /// Most sessions.
    pub sessions_max: usize,
    /// Time that an initiator has for its login.
    pub login_timeout: Duration,
    /// Time that initiators have to log out when the server stops.
    pub stop_timeout: Duration,
    /// When silent initiators are asked.
    pub probing: Probing,
    /// After which a command whose disk does not answer is answered BUSY.
    pub command_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_max: CONNECTIONS_MAX,
            sessions_max: SESSIONS_MAX,
            login_timeout: LOGIN_TIMEOUT,
            stop_timeout: Duration::from_secs(2),
            probing: Probing::default(),
            command_timeout: crate::scsi::COMMAND_TIMEOUT,
        }
    }
}

/// An iSCSI server.
pub struct Server {
    volumes: Arc<dyn Volumes>,
    limits: Limits,
    portal_group: u16,
    clock: Clock,
    catalog: RwLock<Arc<Catalog>>,
    hosts: Mutex<BTreeMap<String, Arc<Host>>>,
    sessions: Sessions,
    challenges: Arc<Challenges>,
    places: Arc<Semaphore>,
    refused: SharedThrottle,
    crowded: SharedThrottle,
    logins: Mutex<HashMap<IpAddr, usize>>,
    stopping: watch::Sender<bool>,
}

impl Server {
    /// A server of volumes, without targets yet.
    pub fn new(volumes: Arc<dyn Volumes>, portal_group: u16, limits: Limits) -> Arc<Server> {
        Arc::new(Server {
            volumes,
            limits,
            portal_group,
            clock: Clock::default(),
            catalog: RwLock::default(),
            hosts: Mutex::default(),
            sessions: Sessions::new(limits.sessions_max, limits.probing),
            challenges: Arc::default(),
            places: Arc::new(Semaphore::new(limits.connections_max)),
            refused: SharedThrottle::new(REFUSALS_LOGGED),
            crowded: SharedThrottle::new(1),
            logins: Mutex::default(),
            stopping: watch::Sender::new(false),
        })
    }

    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// All sessions.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// What is exported now.
    pub fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.catalog.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A target that is served.
    pub fn host(&self, name: &str) -> Option<Arc<Host>> {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.get(name).cloned()
    }

    /// Whether there is a volume of this name.
    ///
    /// # Errors
    /// If the cell cannot be asked.
    pub async fn has_volume(&self, name: &str) -> Result<bool, DeviceError> {
        Ok(self.volumes.open_unused(name).await?.is_some())
    }

    /// Exports what a catalog says from now on. Sessions of targets that are still there go on; disks
    /// that are the same are not touched.
    ///
    /// Gives the volumes that could not be opened, which are tried again later.
    pub async fn apply(self: &Arc<Self>, catalog: Catalog) -> Vec<Missing> {
        let catalog = Arc::new(catalog);
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&catalog);
        let gone: Vec<Arc<Host>> = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            let names = hosts
                .keys()
                .filter(|name| !catalog.targets.contains_key(*name));
            let names: Vec<String> = names.cloned().collect();
            names.iter().filter_map(|name| hosts.remove(name)).collect()
        };
        for host in gone {
            self.end_target(&host);
        }
        for entry in catalog.targets.values() {
            let host = self.host_for(entry);
            for (lun, (volume, settings)) in host.luns() {
                let wanted = entry.luns.get(&lun);
                let same = wanted.is_some_and(|it| it.volume == volume && it.settings == settings);
                if !same || host.is_gone(lun) {
                    host.remove_lun(lun);
                }
            }
        }
        let missing = self.open_missing(&catalog).await;
        if !missing.is_empty() {
            tokio::spawn(Arc::clone(self).open_later(Arc::clone(&catalog)));
        }
        missing
    }

    fn host_for(&self, entry: &TargetEntry) -> Arc<Host> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let host = hosts.entry(entry.name.clone()).or_insert_with(|| {
            let config = TargetConfig {
                portal_groups: vec![self.portal_group],
                command_timeout: self.limits.command_timeout,
                ..TargetConfig::new(&entry.name)
            };
            let host = Host::new(config, self.clock);
            tokio::spawn(Arc::clone(&host).run());
            host
        });
        Arc::clone(host)
    }

    fn end_target(&self, host: &Host) {
        for handle in host.sessions() {
            handle.session().drop_session();
            handle.ring();
            self.sessions.leave(&handle);
        }
        host.retire();
        info!(target_name = host.name(), "target is no longer served");
    }

    /// Opens the volumes of disks that are not there yet.
    async fn open_missing(&self, catalog: &Catalog) -> Vec<Missing> {
        let mut missing = Vec::new();
        let mut failure = None;
        for entry in catalog.targets.values() {
            let Some(host) = self.host(&entry.name) else {
                continue;
            };
            let there = host.luns();
            for (lun, disk) in &entry.luns {
                if there.contains_key(lun) {
                    continue;
                }
                // A cell that could not be asked for one volume need not be waited for again.
                let opened = match failure {
                    None => self.volumes.open_unused(&disk.volume).await,
                    Some(error) => Err(error),
                };
                let why = match opened {
                    Ok(Some(device)) => match device.reserve(ReservationRequest::read()).await {
                        Some(reply) => {
                            host.add_lun(*lun, device, disk.settings.clone(), reply.now);
                            continue;
                        }
                        None => Some(DeviceError::Unavailable),
                    },
                    Ok(None) => None,
                    Err(error) => Some(error),
                };
                failure = failure.or(why);
                missing.push(Missing {
                    target: entry.name.clone(),
                    lun: *lun,
                    volume: disk.volume.clone(),
                    why,
                });
            }
            if failure.is_none() {
                host.set_ready();
            }
        }
        missing
    }

    async fn open_later(self: Arc<Self>, catalog: Arc<Catalog>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                () = stopped(&mut stopping) => return,
                () = tokio::time::sleep(OPEN_AGAIN) => {}
            }
            // Another catalog has its own.
            if !Arc::ptr_eq(&catalog, &self.catalog()) {
                return;
            }
            if self.open_missing(&catalog).await.is_empty() {
                info!("all volumes are exported now");
                return;
            }
        }
    }

    /// Serves the initiators of all listeners until `stop` is done.
    pub async fn run(self: Arc<Self>, listeners: Vec<Listener>, stop: impl Future<Output = ()>) {
        let mut serving = JoinSet::new();
        for listener in listeners {
            info!(uri = listener.uri("iscsi"), "serving");
            serving.spawn(Arc::clone(&self).serve(listener));
        }
        stop.await;
        self.stop();
        serving.join_all().await;
    }

    /// Asks all initiators to log out, and stops.
    pub fn stop(&self) {
        self.drain(None, self.limits.stop_timeout);
        self.stopping.send_replace(true);
    }

    /// Asks the initiators of a target, or of all, to log out within a time, after which they are dropped.
    pub fn drain(&self, target: Option<&str>, within: Duration) {
        let meant = |handle: &&Arc<Handle>| {
            let name = handle.host.as_ref().map(|host| host.name());
            target.is_none() || name == target
        };
        for handle in self.sessions.all().iter().filter(meant) {
            handle.session().request_logout(self.clock.now(), within);
            handle.ring();
        }
    }

    /// Asks one session to log out within a time; whether there is one with this handle.
    pub fn kick(&self, tsih: u16, within: Duration) -> bool {
        let found = self.sessions.all().into_iter().find(|it| it.tsih == tsih);
        if let Some(handle) = &found {
            handle.session().request_logout(self.clock.now(), within);
            handle.ring();
        }
        found.is_some()
    }

    /// Serves the initiators of a listener until [`Server::stop`].
    pub async fn serve(self: Arc<Self>, listener: Listener) {
        let mut connections = JoinSet::new();
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                () = stopped(&mut stopping) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(Arc::clone(&self).serve_stream(stream));
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        let all_ended = async { while connections.join_next().await.is_some() {} };
        let limit = self.limits.stop_timeout + Duration::from_secs(1);
        if timeout(limit, all_ended).await.is_err() {
            warn!(left = connections.len(), "stopped with connections");
        }
    }

    /// Serves one connection.
    pub async fn serve_stream(self: Arc<Self>, stream: Stream) {
        let Some(tcp) = stream.tcp() else {
            return warn!("iSCSI is served over TCP only");
        };
        let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else {
            return;
        };
        if let Err(error) = SockRef::from(tcp).set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX)) {
            debug!(%peer, %error, "TCP_USER_TIMEOUT cannot be set");
        }
        let Ok(_place) = Arc::clone(&self.places).try_acquire_owned() else {
            return self.log_crowded(peer, "too many connections");
        };
        let Some(entrance) = Entrance::take(&self, peer.ip()) else {
            return self.log_crowded(peer, "too many connections that have not logged in");
        };
        let mut stopping = self.stopping.subscribe();
        let linked = tokio::select! {
            linked = self.login(stream, peer, local) => linked,
            () = stopped(&mut stopping) => return,
        };
        drop(entrance);
        let Some(link) = linked else {
            return;
        };
        self.serve_link(link, peer).await;
    }

    async fn serve_link(&self, link: (Link, Arc<Handle>), peer: SocketAddr) {
        let (link, handle) = link;
        let target = handle.host.as_ref().map_or("discovery", |host| host.name());
        let initiator = &handle.initiator_name;
        info!(%peer, initiator, target_name = target, session = handle.tsih, "logged in");
        let ending = link.run().await;
        let received = handle.received_bytes.load(Ordering::Relaxed);
        let sent = handle.sent_bytes.load(Ordering::Relaxed);
        match ending {
            Some(why @ (Ending::LoggedOut | Ending::Reinstated)) => {
                info!(%peer, initiator, session = handle.tsih, received, sent, "{why}");
            }
            Some(why) => warn!(%peer, initiator, session = handle.tsih, received, sent, "{why}"),
            None => info!(%peer, initiator, session = handle.tsih, "connection closed"),
        }
    }

    /// Leads a connection through its login.
    async fn login(
        self: &Arc<Self>,
        mut stream: Stream,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Option<(Link, Arc<Handle>)> {
        let deadline = Instant::now() + self.limits.login_timeout;
        let mut login = Login::new(Context {
            catalog: self.catalog(),
            peer: peer.ip().to_canonical(),
            local,
            portal_group: self.portal_group,
            challenges: Arc::clone(&self.challenges),
        });
        let mut framing = Framing::new(DEFAULT_DATA_BYTES);
        let mut input = BytesMut::with_capacity(LOGIN_RECEIVE_BYTES);
        let mut joined: Option<(Place, Box<Established>)> = None;
        let ends = Ends {
            peer,
            portal: local,
        };
        loop {
            while let Some(output) = login.poll_output() {
                match output {
                    Output::Send(bhs, text) => {
                        let sent = timeout_at(deadline, send(&mut stream, bhs, text)).await;
                        if !matches!(sent, Ok(Ok(()))) {
                            debug!(%peer, "initiator left during its login");
                            return self.give_up(joined.map(|(place, _)| place));
                        }
                    }
                    Output::Establish(established) => {
                        let stat_sn = login.next_stat_sn().wrapping_add(1);
                        match self.join(&established, ends, stat_sn) {
                            Ok(place) => {
                                let window = place.window;
                                let tsih = place.handle.tsih;
                                login.accept(tsih, window.exp_cmd_sn, window.max_cmd_sn);
                                joined = Some((place, established));
                            }
                            Err(refusal) => login.refuse(refusal),
                        }
                    }
                    Output::Close(why) => {
                        self.log_refused(peer, login.initiator(), &why);
                        return None;
                    }
                }
            }
            if let Some((place, established)) = joined {
                let digests = Digests {
                    header: established.params.header_digest,
                    data: established.params.data_digest,
                };
                framing.set_terms(digests, established.params.data_bytes_max);
                let handle = Arc::clone(&place.handle);
                let link = Link::new(stream, input, framing, place, Arc::clone(self));
                return Some((link, handle));
            }
            match framing.poll(&mut input) {
                Ok(Some(pdu)) => {
                    login.handle_pdu(&pdu);
                    continue;
                }
                Ok(None) => {}
                Err(error) => {
                    self.log_refused(peer, login.initiator(), &error);
                    return None;
                }
            }
            input.reserve(LOGIN_RECEIVE_BYTES);
            match timeout_at(deadline, stream.read_buf(&mut input)).await {
                Ok(Ok(count)) if count > 0 => {}
                Ok(_) => {
                    debug!(%peer, "initiator left during its login");
                    return None;
                }
                Err(_) => {
                    self.log_refused(peer, login.initiator(), &"it took too long");
                    return None;
                }
            }
        }
    }

    fn log_crowded(&self, peer: SocketAddr, why: &str) {
        if let Some(more) = self.crowded.admit() {
            warn!(%peer, more, "{why}");
        }
    }

    fn log_refused(&self, peer: SocketAddr, initiator: &str, why: &dyn std::fmt::Display) {
        if let Some(more) = self.refused.admit() {
            warn!(%peer, initiator, more, "login refused: {why}");
        }
    }

    /// A connection that joined a session and is gone before its login was over.
    fn give_up<T>(&self, joined: Option<Place>) -> Option<T> {
        if let Some(place) = joined {
            place.handle.session().handle_lost(place.cid);
            self.sessions.hang_up(&place);
            if place.handle.session().ending().is_some() {
                self.sessions.leave(&place.handle);
            }
        }
        None
    }

    fn join(
        &self,
        established: &Established,
        ends: Ends,
        stat_sn: u32,
    ) -> Result<Place, SessionRefusal> {
        if *self.stopping.borrow() {
            return Err(SessionRefusal::Stopping);
        }
        let host = match &established.target {
            // It may have gone since the login began.
            Some(target) => Some(
                self.host(&target.name)
                    .ok_or(SessionRefusal::DoesNotExist)?,
            ),
            None => None,
        };
        if host.as_ref().is_some_and(|host| !host.is_ready()) {
            return Err(SessionRefusal::NotReady);
        }
        let now = self.clock.now();
        let group = self.portal_group;
        let place = self
            .sessions
            .join(established, host, group, ends, stat_sn, now)?;
        // What is exported may have changed since the login began. Whoever changes it looks at the sessions
        // afterwards, and this one is among them now: one of the two sees it.
        match self.admits_still(&place.handle) {
            Ok(()) => Ok(place),
            Err(refusal) => {
                self.give_up::<()>(Some(place));
                Err(refusal)
            }
        }
    }

    fn admits_still(&self, handle: &Handle) -> Result<(), SessionRefusal> {
        let Some(host) = &handle.host else {
            return Ok(());
        };
        let catalog = self.catalog();
        match catalog.targets.get(host.name()) {
            None => Err(SessionRefusal::DoesNotExist),
            Some(entry) if entry.offline => Err(SessionRefusal::NotReady),
            Some(entry) => Ok(handle.is_admitted(entry)?),
        }
    }

    /// Sessions that their targets would not let in again, with the rule.
    pub fn not_admitted(&self) -> Vec<(Arc<Handle>, NotAdmitted)> {
        let catalog = self.catalog();
        let rule = |handle: &Handle| {
            let entry = catalog.targets.get(handle.host.as_ref()?.name())?;
            handle.is_admitted(entry).err()
        };
        let sessions = self.sessions.all().into_iter();
        sessions
            .filter_map(|handle| rule(&handle).map(|rule| (handle, rule)))
            .collect()
    }

    /// Targets that an initiator may use, with their addresses.
    pub(crate) fn list_targets(
        &self,
        handle: &Handle,
        wanted: &Wanted,
        peer: Option<SocketAddr>,
        local: Option<SocketAddr>,
    ) -> Vec<(String, Vec<String>)> {
        let catalog = self.catalog();
        let this = handle.host.as_ref().map(|host| host.name().to_owned());
        let peer = peer.map(|it| it.ip().to_canonical());
        let shown = |entry: &&Arc<TargetEntry>| {
            let named = match wanted {
                Wanted::All => true,
                Wanted::Named(name) => entry.name == *name,
                Wanted::This => this.as_deref() == Some(entry.name.as_str()),
            };
            // What one may not use, one need not know of.
            let admitted = entry.admits_initiator(&handle.initiator_name)
                && peer.is_some_and(|peer| entry.admits_address(peer));
            named && admitted
        };
        let addresses = self.addresses(&catalog, local);
        let targets = catalog.targets.values().filter(shown);
        targets
            .map(|entry| (entry.name.clone(), addresses.clone()))
            .collect()
    }

    /// Where targets are, as `host:port,group`.
    fn addresses(&self, catalog: &Catalog, local: Option<SocketAddr>) -> Vec<String> {
        let group = self.portal_group;
        if !catalog.advertised.is_empty() {
            let advertised = catalog.advertised.iter();
            return advertised.map(|it| format!("{it},{group}")).collect();
        }
        let shown = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
        let local = local.map(|local| format!("{},{group}", shown(local)));
        local.into_iter().collect()
    }
}

/// A volume that is to be exported and is not there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Missing {
    /// Target.
    pub target: String,
    /// LUN.
    pub lun: u16,
    /// Volume.
    pub volume: String,
    /// Why, if not because there is no such volume.
    pub why: Option<DeviceError>,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Missing {
            target,
            lun,
            volume,
            why,
        } = self;
        write!(f, "target {target}, LUN {lun}: ")?;
        match why {
            None => write!(f, "there is no volume {volume}"),
            Some(why) => write!(f, "cannot open volume {volume}: {why}"),
        }
    }
}

impl Missing {
    /// Says so.
    pub fn log(&self) {
        let Missing {
            target,
            lun,
            volume,
            why,
        } = self;
        match why {
            None => error!(target_name = target, lun, volume, "there is no such volume"),
            Some(why) => error!(
                target_name = target,
                lun, volume, "cannot open volume: {why}"
            ),
        }
    }
}

/// One of the places for connections that have not logged in.
struct Entrance {
    server: Arc<Server>,
    address: IpAddr,
}

impl Entrance {
    fn take(server: &Arc<Server>, address: IpAddr) -> Option<Entrance> {
        let mut logins = server.logins.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = logins.values().sum();
        let here = logins.get(&address).copied().unwrap_or(0);
        if total >= LOGINS_MAX || here >= LOGINS_PER_ADDRESS_MAX {
            return None;
        }
        logins.insert(address, here + 1);
        Some(Entrance {
            server: Arc::clone(server),
            address,
        })
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        let logins = &self.server.logins;
        let mut logins = logins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = logins.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                logins.remove(&self.address);
            }
        }
    }
}

async fn send(stream: &mut Stream, bhs: Bhs, text: Bytes) -> std::io::Result<()> {
    let mut queue = SendQueue::default();
    push(&mut queue, Digests::default(), bhs, &[ReadPart::Data(text)]);
    while !queue.is_empty() {
        let mut slices = [std::io::IoSlice::new(&[]); 4];
        let filled = queue.fill(&mut slices);
        let sent = stream.write_vectored(&slices[..filled]).await?;
        if sent == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        queue.advance(sent);
    }
    Ok(())
}

/// Ends when the server stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server is gone.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

#[cfg(test)]
mod tests;
