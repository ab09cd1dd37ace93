//! All sessions of a server: joining, reinstating, leaving.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use pss_core::time::Instant;
use pss_gateway::alarm::Alarm;

use crate::auth::Account;
use crate::catalog::{NotAdmitted, TargetEntry};
use crate::connection::{CmdNumbers, Connection};
use crate::host::Host;
use crate::login::{Established, SessionRefusal};
use crate::scsi::{NexusId, NexusInfo};
use crate::session::{Ending, Probing, Session};

/// Most sessions of a server, unless configured.
pub const SESSIONS_MAX: usize = 4096;

/// A session with what is known of its initiator.
pub struct Handle {
    /// Of the SCSI side.
    pub nexus: NexusId,
    /// Session handle.
    pub tsih: u16,
    /// Initiator's part of the session id.
    pub isid: [u8; 6],
    /// Who.
    pub initiator_name: String,
    /// For people.
    pub initiator_alias: String,
    /// What it proved itself with, if CHAP was done.
    pub account: Option<Account>,
    /// The target, or none in a discovery session.
    pub host: Option<Arc<Host>>,
    /// Since when.
    pub since: SystemTime,
    session: Mutex<Session>,
    links: Mutex<BTreeMap<u16, Line>>,
    /// Bytes in and out.
    pub received_bytes: AtomicU64,
    /// Bytes sent.
    pub sent_bytes: AtomicU64,
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ends {
    /// The initiator's.
    pub peer: SocketAddr,
    /// Ours.
    pub portal: SocketAddr,
}

/// How to reach the task of a connection.
struct Line {
    alarm: Arc<Alarm>,
    ends: Ends,
}

impl Handle {
    /// The session itself.
    pub fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<u16, Line>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all its connections.
    pub fn ring(&self) {
        for line in self.lines().values() {
            line.alarm.ring();
        }
    }

    /// Wakes its other connections.
    pub fn ring_others(&self, cid: u16) {
        let lines = self.lines();
        for (_, line) in lines.iter().filter(|(other, _)| **other != cid) {
            line.alarm.ring();
        }
    }

    /// Addresses of its connections, by their ids.
    pub fn ends(&self) -> BTreeMap<u16, Ends> {
        let lines = self.lines();
        lines.iter().map(|(cid, line)| (*cid, line.ends)).collect()
    }

    /// Whether a target would let it in again.
    ///
    /// # Errors
    /// [`NotAdmitted`]: the rule that would not.
    pub fn is_admitted(&self, target: &TargetEntry) -> Result<(), NotAdmitted> {
        let ends = self.ends();
        let addresses = ends.values().map(|it| it.peer.ip().to_canonical());
        target.admits_again(&self.initiator_name, addresses, self.account.as_ref())
    }

    /// Ends it now.
    pub fn end(&self, why: Ending) {
        self.session().end(why);
        self.ring();
    }
}

/// A connection's place in its session.
pub struct Place {
    /// The session.
    pub handle: Arc<Handle>,
    /// Connection id.
    pub cid: u16,
    /// Which of the connections with this id.
    pub incarnation: u64,
    /// Rung when there is something to do.
    pub alarm: Arc<Alarm>,
    /// For the last login response.
    pub window: CmdNumbers,
}

/// All sessions.
pub struct Sessions {
    inner: Mutex<Inner>,
    sessions_max: usize,
    probing: Probing,
}

#[derive(Default)]
struct Inner {
    by_tsih: BTreeMap<u16, Arc<Handle>>,
    last_tsih: u16,
    last_nexus: u64,
    last_incarnation: u64,
}

impl Sessions {
    /// None yet.
    pub fn new(sessions_max: usize, probing: Probing) -> Sessions {
        Sessions {
            inner: Mutex::default(),
            sessions_max: sessions_max.min(usize::from(u16::MAX - 1)),
            probing,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Handle>> {
        self.inner().by_tsih.values().cloned().collect()
    }

    /// Makes a connection that has logged in part of a new or an old session.
    ///
    /// # Errors
    /// [`SessionRefusal`] if it cannot be.
    pub fn join(
        &self,
        established: &Established,
        host: Option<Arc<Host>>,
        portal_group: u16,
        ends: Ends,
        stat_sn: u32,
        now: Instant,
    ) -> Result<Place, SessionRefusal> {
        let handle = match established.tsih {
            0 => self.create(established, host, portal_group)?,
            tsih => self.find(tsih, established, host.as_deref())?,
        };
        let cid = established.cid;
        let incarnation = {
            let mut inner = self.inner();
            inner.last_incarnation += 1;
            inner.last_incarnation
        };
        let mut session = handle.session();
        session.reinstate_connection(cid);
        let mut connection = Connection::new(cid, &established.params, stat_sn, now);
        connection.incarnation = incarnation;
        session.add_connection(connection);
        let window = session.window();
        drop(session);
        let alarm = Arc::new(Alarm::default());
        let line = Line {
            alarm: Arc::clone(&alarm),
            ends,
        };
        let replaced = handle.lines().insert(cid, line);
        if let Some(line) = replaced {
            line.alarm.ring();
        }
        Ok(Place {
            handle,
            cid,
            incarnation,
            alarm,
            window,
        })
    }

    fn create(
        &self,
        established: &Established,
        host: Option<Arc<Host>>,
        portal_group: u16,
    ) -> Result<Arc<Handle>, SessionRefusal> {
        // Session reinstatement (RFC 7143 §6.3.5): the nexus is lost before it comes to be again.
        if let Some(host) = &host {
            for old in self.same_port(established, host) {
                old.end(Ending::Reinstated);
                self.leave(&old);
            }
        }
        let mut inner = self.inner();
        if inner.by_tsih.len() >= self.sessions_max {
            return Err(SessionRefusal::TooManySessions);
        }
        let mut tsih = inner.last_tsih;
        loop {
            tsih = tsih.wrapping_add(1);
            if tsih != 0 && !inner.by_tsih.contains_key(&tsih) {
                break;
            }
        }
        inner.last_tsih = tsih;
        inner.last_nexus += 1;
        let nexus = NexusId(inner.last_nexus);
        let session = Session::new(
            nexus,
            host.is_none(),
            established.params.clone(),
            self.probing,
            established.cmd_sn,
        );
        let handle = Arc::new(Handle {
            nexus,
            tsih,
            isid: established.isid,
            initiator_name: established.initiator_name.clone(),
            initiator_alias: established.initiator_alias.clone(),
            account: established.account.clone(),
            host: host.clone(),
            since: SystemTime::now(),
            session: Mutex::new(session),
            links: Mutex::default(),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        });
        inner.by_tsih.insert(tsih, Arc::clone(&handle));
        drop(inner);
        if let Some(host) = &host {
            let info = NexusInfo {
                initiator_name: established.initiator_name.clone(),
                isid: established.isid,
                portal_group,
            };
            host.attach(&handle, info);
        }
        Ok(handle)
    }

    fn same_port(&self, established: &Established, host: &Host) -> Vec<Arc<Handle>> {
        let same = |handle: &&Arc<Handle>| {
            let its_host = handle.host.as_deref();
            handle.isid == established.isid
                && handle
                    .initiator_name
                    .eq_ignore_ascii_case(&established.initiator_name)
                && its_host.is_some_and(|it| it.name() == host.name())
        };
        let inner = self.inner();
        inner.by_tsih.values().filter(same).cloned().collect()
    }

    fn find(
        &self,
        tsih: u16,
        established: &Established,
        host: Option<&Host>,
    ) -> Result<Arc<Handle>, SessionRefusal> {
        let found = self.inner().by_tsih.get(&tsih).cloned();
        let handle = found.ok_or(SessionRefusal::DoesNotExist)?;
        let same_target = match (&handle.host, host) {
            (Some(one), Some(other)) => one.name() == other.name(),
            _ => false,
        };
        let same_initiator = handle.isid == established.isid
            && handle
                .initiator_name
                .eq_ignore_ascii_case(&established.initiator_name)
            && handle.account == established.account;
        if !same_target || !same_initiator {
            return Err(SessionRefusal::NotYours);
        }
        let session = handle.session();
        if session.ending().is_some() {
            return Err(SessionRefusal::DoesNotExist);
        }
        if !session.has_room_for(established.cid) {
            return Err(SessionRefusal::TooManyConnections);
        }
        drop(session);
        Ok(handle)
    }

    /// A session has ended: its nexus is lost, and its place is free.
    pub fn leave(&self, handle: &Arc<Handle>) {
        let mut inner = self.inner();
        let there = inner.by_tsih.get(&handle.tsih);
        if there.is_some_and(|it| Arc::ptr_eq(it, handle)) {
            inner.by_tsih.remove(&handle.tsih);
        }
        drop(inner);
        if let Some(host) = &handle.host {
            host.detach(handle.nexus);
        }
    }

    /// A connection's task ends.
    pub fn hang_up(&self, place: &Place) {
        let mut lines = place.handle.lines();
        if lines
            .get(&place.cid)
            .is_some_and(|line| Arc::ptr_eq(&line.alarm, &place.alarm))
        {
            lines.remove(&place.cid);
        }
    }
}
