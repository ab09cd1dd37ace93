//! One server that leads alone; the test decides when its log is durable.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::chunk::{ChunkParams, ChunkStore};
use crate::disk::files::FileDisk;
use crate::engine::{Action, ClientId, Engine, EngineConfig};
use crate::entry::block_checksums;
use crate::paxos::output::WriteId;
use crate::paxos::quorum::Membership;
use crate::paxos::{Config, Recovered, RoleKind, Tuning};
use crate::state::{Refusal, State};
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, RequestNumber, ServerId, SessionId, Slot, VolumeId};
use crate::volume::reservation::{
    Nexus, ReservationAction, ReservationRequest, ReservationType, Reservations,
};
use crate::wire::client::{ReplyBody, ReplyError, Request, RequestBody};

const CLIENT: ClientId = ClientId(1);

struct Rig {
    _directory: tempfile::TempDir,
    engine: Engine,
    now: Instant,
    /// Log writes wait here while `holds`.
    holds: bool,
    held: Vec<WriteId>,
    replies: HashMap<u64, Result<ReplyBody, ReplyError>>,
    session: SessionId,
    volume: VolumeId,
    next: u64,
}

impl Rig {
    fn new() -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
        let chunks = ChunkStore::open(disk, ChunkParams::default(), &[]).unwrap();
        let config = EngineConfig {
            replica: Config {
                id: ServerId(0),
                incarnation: crate::types::Incarnation(0),
                members: Membership::new([ServerId(0)]),
                tuning: Tuning::default(),
                seed: 1,
            },
            checkpoint_bytes: 1 << 30,
            checkpoint_interval: Duration::from_secs(1000),
            checkpoint_chunks: 1000,
            log_bytes_max: u64::MAX,
            apply_bytes: usize::MAX,
            reserve_bytes: 0,
            session_lease: Duration::from_secs(1000),
        };
        let recovered = Recovered {
            log_first: Slot(1),
            ..Recovered::default()
        };
        let now = Instant(0);
        let engine = Engine::new(config, recovered, State::default(), Arc::new(chunks), now);
        let mut rig = Rig {
            _directory: directory,
            engine,
            now,
            holds: false,
            held: Vec::new(),
            replies: HashMap::new(),
            session: SessionId(0),
            volume: VolumeId(0),
            next: 0,
        };
        rig.engine.note_storage(1 << 40, Slot(1), 0);
        for _ in 0..1000 {
            if rig.engine.replica().role() == (RoleKind::Leader { serving: true }) {
                break;
            }
            rig.now = rig
                .engine
                .poll_timeout()
                .max(rig.now + Duration::from_millis(1));
            rig.engine.handle_timeout(rig.now);
            rig.step();
        }
        let open = RequestBody::OpenSession {
            user: String::new(),
            nonce: 5,
            name: "t".into(),
        };
        match rig.run(open) {
            Ok(ReplyBody::Session(session)) => rig.session = session,
            other => panic!("{other:?}"),
        }
        let create = RequestBody::CreateVolume {
            name: "v".into(),
            size_bytes: 1 << 20,
            chunk_bytes: 64 << 10,
            uuid: [1; 16],
        };
        match rig.run(create) {
            Ok(ReplyBody::VolumeCreated(volume)) => rig.volume = volume,
            other => panic!("{other:?}"),
        }
        rig
    }

    fn step(&mut self) {
        loop {
            while let Some(action) = self.engine.poll_action() {
                match action {
                    Action::Persist { write, .. } if self.holds => self.held.push(write),
                    Action::Persist { write, .. } => self.engine.handle_persisted(self.now, write),
                    Action::Reply { reply, .. } => {
                        self.replies.insert(reply.tag, reply.body);
                    }
                    Action::Read(read) => {
                        let result = read.run(&Arc::clone(&self.engine.chunks));
                        self.engine.handle_read(self.now, read, result);
                    }
                    _ => {}
                }
            }
            if self.engine.has_finished_reads() {
                self.engine.finish_reads(self.now);
            } else if self.engine.has_chosen() {
                self.engine.apply_chosen(self.now);
            } else {
                return;
            }
        }
    }

    /// What was held back is durable now.
    fn go_on(&mut self) {
        self.holds = false;
        for write in std::mem::take(&mut self.held) {
            self.engine.handle_persisted(self.now, write);
        }
        self.step();
    }

    fn send(&mut self, body: RequestBody) -> u64 {
        self.next += 1;
        let number = match body.is_numbered() {
            true => RequestNumber(self.next),
            false => RequestNumber(0),
        };
        let request = Request {
            tag: self.next,
            session: self.session,
            number,
            settled_below: RequestNumber(0),
            body,
        };
        self.engine.handle_request(self.now, CLIENT, request);
        self.engine.finish_batch(self.now);
        self.step();
        self.next
    }

    fn run(&mut self, body: RequestBody) -> Result<ReplyBody, ReplyError> {
        let tag = self.send(body);
        self.replies.remove(&tag).expect("an answer")
    }

    fn write(&self, byte: u8) -> RequestBody {
        let data = Bytes::from(vec![byte; BLOCK_BYTES]);
        RequestBody::Write {
            volume: self.volume,
            offset_bytes: 0,
            checksums: block_checksums(self.volume, 0, &data),
            data,
        }
    }

    fn read(&self) -> RequestBody {
        RequestBody::Read {
            volume: self.volume,
            offset_bytes: 0,
            length_bytes: 4096,
        }
    }

    /// A write of a part of a block: it reads before it is proposed.
    fn write_part(&self, byte: u8) -> RequestBody {
        let data = Bytes::from(vec![byte; 512]);
        RequestBody::Write {
            volume: self.volume,
            offset_bytes: 0,
            checksums: vec![crc32c::crc32c(&data)],
            data,
        }
    }

    fn reserve(&self, action: ReservationAction) -> RequestBody {
        let nexus = Nexus {
            initiator: "iqn.2026-01.test:i,i,0x1".into(),
            target: "iqn.2026-01.test:t,t,0x0001".into(),
        };
        let request = Box::new(ReservationRequest { nexus, action });
        RequestBody::Reserve {
            volume: self.volume,
            request,
        }
    }

    fn register(&self) -> RequestBody {
        self.reserve(ReservationAction::Register {
            key: 0,
            new_key: 1,
            ignore_existing: true,
            aptpl: true,
            also: Vec::new(),
        })
    }

    fn take(&self, kind: ReservationType) -> RequestBody {
        self.reserve(ReservationAction::Reserve { key: 1, kind })
    }

    fn reservations(&mut self) -> Reservations {
        let volume = self.volume;
        match self.run(RequestBody::Reservations { volume }) {
            Ok(ReplyBody::Reservations(now)) => *now,
            other => panic!("{other:?}"),
        }
    }
}

fn checked(reservations: u64, body: RequestBody) -> RequestBody {
    RequestBody::Checked {
        reservations,
        body: Box::new(body),
    }
}

fn refused(refusal: Refusal) -> Result<ReplyBody, ReplyError> {
    Err(ReplyError::Refused(refusal))
}

const DONE: Result<ReplyBody, ReplyError> = Ok(ReplyBody::Done);

#[test]
fn unchecked_requests_may_what_anybody_may() {
    let mut rig = Rig::new();
    assert_eq!(rig.run(rig.write(1)), DONE);
    assert_eq!(rig.run(rig.register()), DONE);
    assert_eq!(rig.run(rig.write(2)), DONE);
    assert_eq!(rig.run(rig.take(ReservationType::WriteExclusive)), DONE);
    assert_eq!(rig.run(rig.write(3)), refused(Refusal::Reserved));
    assert_eq!(rig.run(rig.write_part(3)), refused(Refusal::Reserved));
    assert!(matches!(rig.run(rig.read()), Ok(ReplyBody::Data(_))));
    let clear = rig.reserve(ReservationAction::Clear { key: 1 });
    assert_eq!(rig.run(clear), DONE);
    assert_eq!(rig.run(rig.register()), DONE);
    assert_eq!(rig.run(rig.take(ReservationType::ExclusiveAccess)), DONE);
    assert_eq!(rig.run(rig.read()), refused(Refusal::Reserved));
}

#[test]
fn checked_requests_need_the_present_version() {
    let mut rig = Rig::new();
    rig.run(rig.register()).unwrap();
    rig.run(rig.take(ReservationType::ExclusiveAccess)).unwrap();
    let version = rig.reservations().version();
    assert_eq!(rig.run(checked(version, rig.write(1))), DONE);
    assert!(rig.run(checked(version, rig.read())).is_ok());
    let changed = refused(Refusal::ReservationsChanged);
    assert_eq!(rig.run(checked(version - 1, rig.write(2))), changed);
    assert_eq!(rig.run(checked(version + 1, rig.read())), changed);
    let conflict = rig.take(ReservationType::WriteExclusive);
    assert_eq!(rig.run(conflict), refused(Refusal::ReservationConflict));
    assert_eq!(rig.reservations().version(), version);
}

#[test]
fn nothing_overtakes_a_change_that_is_proposed() {
    let mut rig = Rig::new();
    rig.run(rig.register()).unwrap();
    rig.holds = true;
    let before = rig.send(rig.write(1));
    let change = rig.send(rig.take(ReservationType::ExclusiveAccess));
    let after = [rig.send(rig.write(2)), rig.send(rig.read())];
    let again = rig.send(rig.reserve(ReservationAction::Release {
        key: 1,
        kind: ReservationType::ExclusiveAccess,
    }));
    let late = rig.send(rig.write(3));
    assert!(rig.replies.is_empty());
    rig.go_on();
    assert_eq!(rig.replies[&before], DONE, "it was checked before");
    assert_eq!(rig.replies[&change], DONE);
    for tag in after {
        assert_eq!(rig.replies[&tag], refused(Refusal::Reserved));
    }
    assert_eq!(rig.replies[&again], DONE);
    assert_eq!(rig.replies[&late], DONE, "in their order");
}

#[test]
fn a_change_waits_for_writes_that_were_checked_before_it() {
    let mut rig = Rig::new();
    rig.run(rig.register()).unwrap();
    rig.holds = true;
    // The second waits for the first, as it changes a part of the same block.
    let first = rig.send(rig.write(1));
    let part = rig.send(rig.write_part(2));
    let change = rig.send(rig.take(ReservationType::WriteExclusive));
    let version = rig
        .engine
        .state()
        .reservations(rig.volume)
        .unwrap()
        .version();
    rig.go_on();
    assert_eq!(rig.replies[&first], DONE);
    assert_eq!(rig.replies[&part], DONE);
    assert_eq!(rig.replies[&change], DONE);
    assert_eq!(rig.reservations().version(), version + 1);
}

#[test]
fn a_repeated_write_is_answered_whatever_holds_now() {
    let mut rig = Rig::new();
    let body = rig.write(1);
    let tag = rig.send(body.clone());
    assert_eq!(rig.replies.remove(&tag), Some(DONE));
    rig.run(rig.register()).unwrap();
    rig.run(rig.take(ReservationType::ExclusiveAccess)).unwrap();
    let request = Request {
        tag: 999,
        session: rig.session,
        number: RequestNumber(tag),
        settled_below: RequestNumber(0),
        body,
    };
    rig.engine.handle_request(rig.now, CLIENT, request);
    rig.step();
    assert_eq!(rig.replies[&999], DONE);
}

#[test]
fn what_was_allowed_before_there_were_reservations_is_checked_again() {
    let mut rig = Rig::new();
    assert_eq!(rig.run(checked(0, rig.write(1))), DONE);
    assert!(rig.run(checked(0, rig.read())).is_ok());
    assert_eq!(rig.run(rig.reserve(ReservationAction::Reset)), DONE);
    let changed = refused(Refusal::ReservationsChanged);
    assert_eq!(rig.run(checked(0, rig.write(2))), changed);
    assert_eq!(rig.run(checked(0, rig.read())), changed);
    assert_eq!(rig.run(checked(1, rig.write(2))), DONE);
}

#[test]
fn a_look_shows_what_was_answered_before() {
    let mut rig = Rig::new();
    let volume = rig.volume;
    let look = |rig: &mut Rig| rig.run(RequestBody::Look { volume });
    let shown = |size_bytes, reservations| {
        Ok(ReplyBody::Volume {
            size_bytes,
            reservations,
        })
    };
    assert_eq!(look(&mut rig), shown(1 << 20, 0));
    rig.run(rig.register()).unwrap();
    let resize = RequestBody::ResizeVolume {
        volume,
        size_bytes: 2 << 20,
        allow_shrink: false,
    };
    rig.run(resize).unwrap();
    assert_eq!(look(&mut rig), shown(2 << 20, 1));
    rig.run(RequestBody::DeleteVolume { volume }).unwrap();
    assert_eq!(look(&mut rig), refused(Refusal::NoSuchVolume));
}
