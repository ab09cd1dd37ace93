//! What is seen of a running server. Secrets are in none of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use pss_core::time::Instant;
use serde::{Deserialize, Serialize};

use super::Tids;
use super::edit::all_accounts;
use crate::catalog::{Catalog, LunEntry, TargetEntry};
use crate::config::targets_conf::lun_options;
use crate::host::Host;
use crate::keys::{DigestPolicy, Wishes};
use crate::scsi::{hex, naa};
use crate::server::Server;
use crate::sessions::Handle;

/// All targets.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Targets {
    /// By number.
    pub targets: Vec<Target>,
}

/// A target.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Target {
    /// tgt's number of it; the same while the server runs.
    pub tid: u32,
    /// iSCSI name.
    pub name: String,
    /// For people.
    pub alias: Option<String>,
    /// Whether it takes sessions.
    pub state: State,
    /// Disks.
    pub luns: Vec<Lun>,
    /// Names of those that may log in; empty if CHAP is not needed.
    pub accounts: Vec<String>,
    /// Name with which it proves itself.
    pub outgoing_account: Option<String>,
    /// Addresses of initiators that may use it.
    pub initiator_addresses: Vec<String>,
    /// Names of initiators that may use it.
    pub initiator_names: Vec<String>,
    /// Whether nobody may use it.
    pub admits_nobody: bool,
    /// Where it is instead.
    pub redirect: Option<String>,
    /// So many sessions use it.
    pub sessions: usize,
    /// What it wants in negotiations.
    pub parameters: BTreeMap<String, String>,
}

/// Whether a target takes sessions.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Yes.
    Ready,
    /// No: it was drained, or the configuration says so.
    Offline,
    /// Not yet: the cell has not been asked for its volumes.
    Opening,
}

/// A disk.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Lun {
    /// Its number.
    pub lun: u16,
    /// The volume.
    pub volume: String,
    /// Whether the volume is there.
    pub online: bool,
    /// Size; 0 if it is not there.
    pub size_bytes: u64,
    /// Logical block.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the medium can be ejected.
    pub removable: bool,
    /// Whether thin provisioning is announced.
    pub thin: bool,
    /// Whether a write cache is announced.
    pub write_cache: bool,
    /// Vendor.
    pub vendor: String,
    /// T10 identifier.
    pub scsi_id: String,
    /// Serial number.
    pub serial: String,
    /// NAA identifier, as in `/dev/disk/by-id/wwn-0x...`.
    pub naa: Option<String>,
    /// What is not as usual, as a targets.conf says it.
    pub options: Vec<(String, String)>,
}

/// All sessions.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Sessions {
    /// By number.
    pub sessions: Vec<Session>,
}

/// A session.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Session {
    /// TSIH.
    pub session: u16,
    /// Initiator's part of the session's name, hexadecimal.
    pub isid: String,
    /// The target; none in a discovery session.
    pub target: Option<String>,
    /// iSCSI name of the initiator.
    pub initiator_name: String,
    /// For people; may be empty.
    pub initiator_alias: String,
    /// CHAP user.
    pub user: Option<String>,
    /// Whether headers have digests.
    pub header_digest: bool,
    /// Whether data have digests.
    pub data_digest: bool,
    /// Seconds since 1970.
    pub since: u64,
    /// Commands under way.
    pub tasks: usize,
    /// Time since the last command came; none if none ever did.
    pub idle_ms: Option<u64>,
    /// Bytes from the initiator.
    pub received_bytes: u64,
    /// Bytes to the initiator.
    pub sent_bytes: u64,
    /// Whether it was asked to log out.
    pub leaving: bool,
    /// Its connections.
    pub connections: Vec<Connection>,
}

/// All connections.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Connections {
    /// By session.
    pub connections: Vec<ConnectionOfSession>,
}

/// A connection with its session.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ConnectionOfSession {
    /// TSIH.
    pub session: u16,
    /// The target.
    pub target: Option<String>,
    /// iSCSI name of the initiator.
    pub initiator_name: String,
    /// The connection.
    #[serde(flatten)]
    pub connection: Connection,
}

/// A connection.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Connection {
    /// Its number in its session.
    pub cid: u16,
    /// The initiator's address.
    pub address: SocketAddr,
    /// Our address that it came to.
    pub portal: SocketAddr,
    /// Whether headers have digests.
    pub header_digest: bool,
    /// Whether data have digests.
    pub data_digest: bool,
    /// Time since anything was heard.
    pub silent_ms: u64,
    /// Bytes that wait to be sent.
    pub unsent_bytes: u64,
}

/// All accounts.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Accounts {
    /// By name.
    pub accounts: Vec<Account>,
}

/// An account.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Account {
    /// Its name.
    pub user: String,
    /// Targets into which it lets initiators.
    pub targets: Vec<String>,
    /// Targets that prove themselves with it.
    pub outgoing_targets: Vec<String>,
    /// Whether it is for discovery.
    pub discovery: bool,
    /// Whether we prove ourselves with it in discovery.
    pub outgoing_discovery: bool,
}

pub(super) fn targets(server: &Server, catalog: &Catalog, tids: &Tids) -> Targets {
    let mut targets: Vec<Target> = catalog
        .targets
        .values()
        .map(|entry| target(server, entry, tids.of(&entry.name)))
        .collect();
    targets.sort_by_key(|it| it.tid);
    Targets { targets }
}

fn target(server: &Server, entry: &TargetEntry, tid: u32) -> Target {
    let host = server.host(&entry.name);
    let state = match &host {
        _ if entry.offline => State::Offline,
        Some(host) if host.is_ready() => State::Ready,
        _ => State::Opening,
    };
    let names = entry.accounts.incoming.iter().map(|it| it.name.clone());
    Target {
        tid,
        name: entry.name.clone(),
        alias: entry.alias.clone(),
        state,
        luns: luns(entry, host.as_deref()),
        accounts: names.collect(),
        outgoing_account: entry.accounts.outgoing.as_ref().map(|it| it.name.clone()),
        initiator_addresses: entry.addresses.iter().map(ToString::to_string).collect(),
        initiator_names: entry.initiators.clone(),
        admits_nobody: entry.admits_nobody(),
        redirect: entry.redirect.as_ref().map(|it| it.address.clone()),
        sessions: host.map_or(0, |host| host.sessions().len()),
        parameters: parameters(&entry.wishes),
    }
}

fn luns(entry: &TargetEntry, host: Option<&Host>) -> Vec<Lun> {
    let disks = host.map(Host::disks).unwrap_or_default();
    let lun = |(lun, disk): (&u16, &LunEntry)| {
        let info = disks.get(lun).map(|(info, _)| info);
        let settings = &disk.settings;
        let uuid = info.map(|info| hex(&info.uuid)).unwrap_or_default();
        Lun {
            lun: *lun,
            volume: disk.volume.clone(),
            online: info.is_some(),
            size_bytes: info.map_or(0, |info| info.size_bytes),
            block_bytes: settings.block_bytes,
            read_only: settings.read_only || info.is_some_and(|info| info.read_only),
            removable: settings.removable,
            thin: settings.thin,
            write_cache: settings.write_cache,
            vendor: settings.vendor.clone(),
            scsi_id: settings.scsi_id.clone().unwrap_or_else(|| uuid.clone()),
            serial: settings.serial.clone().unwrap_or_else(|| uuid.clone()),
            naa: info.map(|info| hex(&naa(&info.uuid))),
            options: lun_options(settings),
        }
    };
    entry.luns.iter().map(lun).collect()
}

pub(crate) fn parameters(wishes: &Wishes) -> BTreeMap<String, String> {
    let digest = |policy: DigestPolicy| match policy {
        DigestPolicy::Never => "None",
        DigestPolicy::Always => "CRC32C",
        DigestPolicy::Either => "CRC32C,None",
    };
    let yes = |it: bool| if it { "Yes" } else { "No" };
    let all = [
        (
            "MaxRecvDataSegmentLength",
            wishes.data_bytes_max.to_string(),
        ),
        (
            "MaxXmitDataSegmentLength",
            wishes.sent_data_bytes_max.to_string(),
        ),
        ("HeaderDigest", digest(wishes.header_digest).to_owned()),
        ("DataDigest", digest(wishes.data_digest).to_owned()),
        ("InitialR2T", yes(wishes.initial_r2t).to_owned()),
        ("MaxOutstandingR2T", wishes.max_outstanding_r2t.to_string()),
        ("ImmediateData", yes(wishes.immediate_data).to_owned()),
        ("FirstBurstLength", wishes.first_burst_length.to_string()),
        ("MaxBurstLength", wishes.max_burst_length.to_string()),
        ("DataPDUInOrder", "Yes".to_owned()),
        ("DataSequenceInOrder", "Yes".to_owned()),
        (
            "ErrorRecoveryLevel",
            wishes.error_recovery_level.to_string(),
        ),
        ("IFMarker", "No".to_owned()),
        ("OFMarker", "No".to_owned()),
        ("DefaultTime2Wait", wishes.time2wait.to_string()),
        ("DefaultTime2Retain", wishes.time2retain.to_string()),
        ("MaxConnections", wishes.max_connections.to_string()),
    ];
    all.into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

pub(super) fn sessions(server: &Server) -> Sessions {
    let now = server.clock().now();
    let mut sessions: Vec<Session> = server
        .sessions()
        .all()
        .iter()
        .map(|handle| session(handle, now))
        .collect();
    sessions.sort_by_key(|it| it.session);
    Sessions { sessions }
}

fn milliseconds(from: Instant, now: Instant) -> u64 {
    now.0.saturating_sub(from.0) / 1_000_000
}

/// IPv4 addresses as such, on sockets that serve both.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn session(handle: &Arc<Handle>, now: Instant) -> Session {
    let ends = handle.ends();
    let session = handle.session();
    let connections = session.connections().filter_map(|it| {
        let ends = ends.get(&it.cid)?;
        Some(Connection {
            cid: it.cid,
            address: canonical(ends.peer),
            portal: canonical(ends.portal),
            header_digest: it.header_digest,
            data_digest: it.data_digest,
            silent_ms: milliseconds(it.heard(), now),
            unsent_bytes: it.unsent_bytes() as u64,
        })
    });
    let since = handle.since.duration_since(UNIX_EPOCH).unwrap_or_default();
    Session {
        session: handle.tsih,
        isid: hex(&handle.isid),
        target: handle.host.as_ref().map(|host| host.name().to_owned()),
        initiator_name: handle.initiator_name.clone(),
        initiator_alias: handle.initiator_alias.clone(),
        user: handle.account.as_ref().map(|it| it.name.clone()),
        header_digest: session.params().header_digest,
        data_digest: session.params().data_digest,
        since: since.as_secs(),
        tasks: session.tasks(),
        idle_ms: session.last_command().map(|last| milliseconds(last, now)),
        received_bytes: handle.received_bytes.load(Ordering::Relaxed),
        sent_bytes: handle.sent_bytes.load(Ordering::Relaxed),
        leaving: session.is_asked_to_leave(),
        connections: connections.collect(),
    }
}

pub(super) fn connections(server: &Server) -> Connections {
    let sessions = sessions(server).sessions;
    let connections = sessions.into_iter().flat_map(|session| {
        let Session {
            session,
            target,
            initiator_name,
            connections,
            ..
        } = session;
        connections
            .into_iter()
            .map(move |connection| ConnectionOfSession {
                session,
                target: target.clone(),
                initiator_name: initiator_name.clone(),
                connection,
            })
    });
    Connections {
        connections: connections.collect(),
    }
}

pub(super) fn accounts(catalog: &Catalog) -> Accounts {
    let users: BTreeSet<&str> = all_accounts(catalog).map(|it| it.name.as_str()).collect();
    let account = |user: &str| {
        let lets_in = |it: &crate::auth::Accounts| it.incoming.iter().any(|it| it.name == user);
        let proves =
            |it: &crate::auth::Accounts| it.outgoing.as_ref().is_some_and(|it| it.name == user);
        let targets_where = |holds: &dyn Fn(&crate::auth::Accounts) -> bool| {
            let targets = catalog.targets.values();
            let targets = targets.filter(|it| holds(&it.accounts));
            targets.map(|it| it.name.clone()).collect()
        };
        Account {
            user: user.to_owned(),
            targets: targets_where(&lets_in),
            outgoing_targets: targets_where(&proves),
            discovery: lets_in(&catalog.discovery),
            outgoing_discovery: proves(&catalog.discovery),
        }
    };
    Accounts {
        accounts: users.into_iter().map(account).collect(),
    }
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
