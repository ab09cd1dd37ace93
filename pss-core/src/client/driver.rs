//! The task that owns a gateway's session and its connection to the leader.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::client::ServerError;
use crate::client::device::{DeviceState, Join, device_result, look_result};
use crate::client::leader::{Connection, Dialer, find_leader};
use crate::client::session::{Event, Pending, Session, nothing};
use crate::state::Refusal;
use crate::types::{ServerId, VolumeId};
use crate::volume::device::{Completion, DeviceError, DeviceResult, Fate};
use crate::wire::client::{Reply, ReplyBody, ReplyError, RequestBody, VolumeStatus};
use crate::wire::frame::FrameKind;

/// While something is under way, deadlines and silence are looked at this often.
const TICK: Duration = Duration::from_millis(100);
/// Otherwise this often.
const REST: Duration = Duration::from_secs(1);
/// A session that sends nothing else says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Sizes and existence of open volumes are asked for this often.
const POLL_VOLUMES: Duration = Duration::from_secs(5);
/// A leader that owes an answer and says nothing for this long is doubted: another one may have been
/// elected while the connection hangs.
const SILENCE_DOUBTED: Duration = Duration::from_secs(2);
/// While it stays silent, the doubt is looked into again this often.
const DOUBT_AGAIN: Duration = Duration::from_secs(1);
/// And one that still seems to lead gets a new connection after this.
const SILENCE_BROKEN: Duration = Duration::from_secs(10);
/// After a server has said that it does not lead and names nobody, or that data were damaged, so long
/// until the next search. A named leader is asked at once, but no oftener than this: servers that name
/// each other are not worth a loop.
const NOT_LEADER_PAUSE: Duration = Duration::from_millis(50);
/// How long the last requests and the end of the session may take when all handles are gone.
const CLOSING_MAX: Duration = Duration::from_secs(2);
/// Reads from the socket before other tasks get a turn.
const FILLS_PER_TURN: usize = 16;
/// So much is taken from the socket before other tasks get a turn: front ends send it on while the leader
/// sends more.
const BYTES_PER_TURN: usize = 256 << 10;

/// Something for the task.
pub(super) enum Item {
    /// A request.
    Request { body: RequestBody, target: Target },
    /// A volume was opened; its `Attach` follows, if it is in use.
    Opened(Arc<DeviceState>),
    /// An open volume is in use from now on, or not any more.
    Used {
        device: Arc<DeviceState>,
        in_use: bool,
    },
    /// A volume was closed.
    Closed(Arc<DeviceState>),
    /// End the session; the sender is dropped when that is done.
    Close(oneshot::Sender<()>),
}

/// To whom the outcome of a request goes.
pub(super) enum Target {
    /// A front end.
    Device(Completion),
    /// A front end that looks how a volume is, with the version of the reservations that it knows.
    Look {
        device: Arc<DeviceState>,
        reservations: Option<u64>,
        done: Completion,
    },
    /// A part of a front end's request.
    Part { join: Arc<Join>, part: usize },
    /// A caller that waits.
    Call(oneshot::Sender<Result<ReplyBody, CallError>>),
    /// The task itself: attaching again after the session was lost.
    Attach(Arc<DeviceState>),
    /// The task itself: `ListVolumes`.
    Poll,
    /// Nobody.
    Nobody,
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    Reply(ReplyError),
    Expired,
    Fenced,
}

/// Where requests arrive, from any thread.
#[derive(Default)]
pub(super) struct Inbox(Mutex<InboxState>);

#[derive(Default)]
struct InboxState {
    items: Vec<Item>,
    waker: Option<Waker>,
    /// All handles are gone.
    is_closed: bool,
    /// The task is gone: whatever comes is dropped, which completes it.
    is_dead: bool,
}

impl Inbox {
    fn push_all(&self, items: impl IntoIterator<Item = Item>) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.is_dead {
                state.items.extend(items);
                state.waker.take()
            } else {
                // Dropped outside of the lock: that runs completions.
                drop(state);
                items.into_iter().for_each(drop);
                return;
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn close(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_closed = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes all items and leaves word to be woken for the next; gives whether all handles are gone.
    fn take(&self, cx: &Context<'_>, into: &mut Vec<Item>) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut state.items, into);
        state.waker = Some(cx.waker().clone());
        state.is_closed
    }

    /// No more items are taken; gives those that have come.
    pub(super) fn kill(&self) -> Vec<Item> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_dead = true;
        std::mem::take(&mut state.items)
    }
}

/// Held by everyone who can send requests; when the last one goes, the task ends.
pub(super) struct Handle {
    inbox: Arc<Inbox>,
}

impl Handle {
    pub(super) fn new(inbox: Arc<Inbox>) -> Handle {
        Handle { inbox }
    }

    pub(super) fn push(&self, item: Item) {
        self.inbox.push_all([item]);
    }

    pub(super) fn push_all(&self, items: Vec<Item>) {
        self.inbox.push_all(items);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

type Search = Pin<Box<dyn Future<Output = Connection> + Send>>;

enum Link {
    Down,
    /// Waits before the next search.
    Pausing(Pin<Box<Sleep>>),
    Searching(Search),
    Up(Box<Connection>),
}

/// The task. A hand-written future: one poll takes all new requests, all replies that have arrived,
/// and sends everything in one write.
pub(super) struct Driver {
    inbox: Arc<Inbox>,
    dialer: Arc<Dialer>,
    session: Session<Target>,
    link: Link,
    /// A search beside a connection that is silent.
    doubt: Option<Search>,
    /// When the last such search began.
    doubted: Instant,
    devices: Vec<Arc<DeviceState>>,
    /// Devices whose volume the servers would not attach again; tried now and then.
    unattached: Vec<Arc<DeviceState>>,
    closing: Option<Closing>,
    timer: Pin<Box<Sleep>>,
    /// Whether anything happened since the timer last fired.
    is_active: bool,
    /// Whether the timer fires late because there is nothing to do.
    is_resting: bool,
    /// When the server was last heard of, or began to owe an answer.
    heard: Instant,
    /// When the session last sent something.
    sent: Instant,
    /// When the connection was last left for a leader that was named.
    followed: Option<Instant>,
    polled: Instant,
    is_poll_under_way: bool,
    items: Vec<Item>,
    events: Vec<Event<Target>>,
}

/// The session is being ended.
struct Closing {
    deadline: Instant,
    is_end_sent: bool,
    is_ended: bool,
    waiters: Vec<oneshot::Sender<()>>,
}

impl Driver {
    pub(super) fn new(
        inbox: Arc<Inbox>,
        dialer: Arc<Dialer>,
        nonces: Box<dyn FnMut() -> u64 + Send>,
    ) -> Driver {
        let now = Instant::now();
        Driver {
            inbox,
            session: Session::new(
                dialer.config.client_name.clone(),
                dialer.config.client_user.clone(),
                nonces,
            ),
            dialer,
            link: Link::Down,
            doubt: None,
            doubted: now,
            devices: Vec::new(),
            unattached: Vec::new(),
            closing: None,
            timer: Box::pin(tokio::time::sleep(TICK)),
            is_active: false,
            is_resting: false,
            heard: now,
            sent: now,
            followed: None,
            polled: now,
            is_poll_under_way: false,
            items: Vec::new(),
            events: Vec::new(),
        }
    }

    fn take_items(&mut self, cx: &Context<'_>, now: Instant) {
        let mut items = std::mem::take(&mut self.items);
        let is_closed = self.inbox.take(cx, &mut items);
        if !items.is_empty() {
            self.is_active = true;
            if std::mem::take(&mut self.is_resting) {
                self.timer.as_mut().reset((now + TICK).into());
            }
        }
        for item in items.drain(..) {
            self.take_item(item, now);
        }
        self.items = items;
        if is_closed {
            self.closing(now);
        }
    }

    fn take_item(&mut self, item: Item, now: Instant) {
        match item {
            Item::Request { body, target } => self.submit(body, target, now),
            Item::Opened(device) => {
                if self.devices.is_empty() {
                    self.polled = now;
                }
                self.devices.push(device);
            }
            Item::Used { device, in_use } => {
                let volume = device.volume;
                match in_use {
                    true => {
                        let target = Target::Attach(device);
                        self.submit(RequestBody::Attach { volume }, target, now);
                    }
                    false => self.submit(RequestBody::Detach { volume }, Target::Nobody, now),
                }
            }
            Item::Closed(device) => {
                self.devices.retain(|open| !Arc::ptr_eq(open, &device));
                // Without a session nothing is attached.
                let is_known = self.session.is_open() || self.session.is_changing();
                if device.is_in_use() && is_known {
                    let volume = device.volume;
                    self.submit(RequestBody::Detach { volume }, Target::Nobody, now);
                }
            }
            Item::Close(waiter) => self.closing(now).waiters.push(waiter),
        }
    }

    fn closing(&mut self, now: Instant) -> &mut Closing {
        self.closing.get_or_insert_with(|| Closing {
            deadline: now + CLOSING_MAX,
            is_end_sent: false,
            is_ended: false,
            waiters: Vec::new(),
        })
    }

    fn submit(&mut self, body: RequestBody, target: Target, now: Instant) {
        self.session.submit(Pending {
            body,
            target: Some(target),
            deadline: now + self.dialer.config.request_timeout,
        });
    }

    /// Receives what has arrived. Gives whether more may be there.
    fn receive(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut bytes = 0;
        for _ in 0..FILLS_PER_TURN {
            let Link::Up(connection) = &mut self.link else {
                return false;
            };
            match connection.poll_fill(cx) {
                Poll::Pending => return false,
                Poll::Ready(Ok(count)) => {
                    self.heard = now;
                    bytes += count;
                }
                Poll::Ready(Err(error)) => {
                    self.disconnect(&error);
                    return true;
                }
            }
            self.is_active = true;
            if let Err(error) = self.take_replies() {
                self.disconnect(&error);
                return true;
            }
            if bytes >= BYTES_PER_TURN {
                break;
            }
        }
        true
    }

    fn take_replies(&mut self) -> Result<(), ServerError> {
        if let Link::Up(connection) = &mut self.link {
            while let Some(frame) = connection.poll_frame()? {
                if frame.kind != FrameKind::Reply {
                    return Err(ServerError::Unexpected);
                }
                let reply = Reply::decode(frame)?;
                self.session.handle_reply(reply, &mut self.events);
            }
        }
        self.take_events();
        Ok(())
    }

    fn take_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                Event::Answered {
                    target,
                    body,
                    result,
                } => self.answer(target, &body, result),
                Event::Expired(target) => self.fail(target, DeviceError::Unavailable),
                Event::Fenced(target) => self.fail(target, DeviceError::Fenced),
                Event::SessionLost => self.attach_again(),
                Event::NotLeader(leader) => self.leave(leader),
                Event::Damaged => self.send_again(),
                Event::Ended => {
                    if let Some(closing) = &mut self.closing {
                        closing.is_ended = true;
                    }
                }
            }
        }
        self.events = events;
    }

    fn answer(
        &mut self,
        target: Target,
        body: &RequestBody,
        result: Result<ReplyBody, ReplyError>,
    ) {
        match target {
            Target::Device(done) => done.complete(self.device_result(body, result)),
            Target::Look {
                device,
                reservations,
                done,
            } => done.complete(look_result(&device, reservations, result)),
            Target::Part { join, part } => {
                let result = self.device_result(body, result);
                if let Some(item) = join.finish(part, result) {
                    self.take_item(item, Instant::now());
                }
            }
            Target::Call(caller) => {
                let _ = caller.send(result.map_err(CallError::Reply));
            }
            Target::Attach(device) => match result {
                Ok(_) => device.set_fate(Fate::Alive),
                Err(ReplyError::Refused(Refusal::NoSuchVolume)) => device.set_fate(Fate::Deleted),
                Err(error) => {
                    tracing::warn!(%error, "volume cannot be attached again");
                    self.unattached.push(device);
                }
            },
            Target::Poll => {
                self.is_poll_under_way = false;
                if let Ok(ReplyBody::Volumes(volumes)) = result {
                    self.compare_volumes(&volumes);
                }
            }
            Target::Nobody => {}
        }
    }

    fn device_result(
        &mut self,
        body: &RequestBody,
        result: Result<ReplyBody, ReplyError>,
    ) -> DeviceResult {
        let result = device_result(body, result);
        if matches!(result, Err(DeviceError::OutOfRange | DeviceError::Deleted)) {
            self.poll_volumes(Instant::now());
        }
        result
    }

    fn fail(&mut self, target: Target, error: DeviceError) {
        match target {
            Target::Device(done) | Target::Look { done, .. } => done.complete(Err(error)),
            // No next part follows a part that failed.
            Target::Part { join, part } => drop(join.finish(part, Err(error))),
            Target::Call(caller) => {
                let error = match error {
                    DeviceError::Fenced => CallError::Fenced,
                    _ => CallError::Expired,
                };
                let _ = caller.send(Err(error));
            }
            Target::Attach(device) => {
                // A session lost again attaches everything again by itself.
                if error != DeviceError::Fenced && self.is_registered(&device) {
                    self.attach(device);
                }
            }
            Target::Poll => self.is_poll_under_way = false,
            Target::Nobody => {}
        }
    }

    fn is_registered(&self, device: &Arc<DeviceState>) -> bool {
        self.devices.iter().any(|open| Arc::ptr_eq(open, device))
    }

    /// Attaches a volume in a new session. One that is not in use is asked about by a request without effect: that
    /// there is a session again is what matters to it.
    fn attach(&mut self, device: Arc<DeviceState>) {
        let volume = device.volume;
        let body = match device.is_in_use() {
            true => RequestBody::Attach { volume },
            false => nothing(),
        };
        self.submit(body, Target::Attach(device), Instant::now());
    }

    fn attach_again(&mut self) {
        tracing::warn!(
            volumes = self.devices.len(),
            "the cell has ended this session: it was not heard of for too long"
        );
        for device in self.devices.clone() {
            device.set_fate(Fate::Fenced);
            self.attach(device);
        }
    }

    fn poll_volumes(&mut self, now: Instant) {
        if !self.is_poll_under_way {
            self.is_poll_under_way = true;
            self.polled = now;
            self.submit(RequestBody::ListVolumes, Target::Poll, now);
        }
    }

    fn compare_volumes(&mut self, volumes: &[VolumeStatus]) {
        let find = |id: VolumeId| volumes.iter().find(|status| status.volume.id == id);
        for device in &self.devices {
            match find(device.volume) {
                Some(status) => {
                    device.set_size(status.volume.size_bytes);
                    device.set_reservations(status.reservations);
                }
                None => device.set_fate(Fate::Deleted),
            }
        }
    }

    fn disconnect(&mut self, error: &ServerError) {
        if let Link::Up(connection) = &self.link {
            let server = connection.server;
            tracing::info!(%server, %error, "lost the connection to the leader");
        }
        self.link = Link::Down;
        self.doubt = None;
    }

    fn leave(&mut self, leader: Option<ServerId>) {
        let Link::Up(connection) = &self.link else {
            return;
        };
        let server = connection.server;
        tracing::info!(%server, ?leader, "server leads no more");
        let now = Instant::now();
        let is_due = self
            .followed
            .is_none_or(|last| now.duration_since(last) >= NOT_LEADER_PAUSE);
        self.link = match leader.filter(|named| *named != server && is_due) {
            Some(named) => {
                self.followed = Some(now);
                Link::Searching(self.search(Some(named)))
            }
            None => Link::Pausing(Box::pin(tokio::time::sleep(NOT_LEADER_PAUSE))),
        };
        self.doubt = None;
    }

    /// After data were damaged on their way; until their deadline. With a pause, in case it is not the
    /// network.
    fn send_again(&mut self) {
        if let Link::Up(connection) = &self.link {
            tracing::warn!(server = %connection.server, "data were damaged on their way, sending them again");
            self.link = Link::Pausing(Box::pin(tokio::time::sleep(NOT_LEADER_PAUSE)));
            self.doubt = None;
        }
    }

    /// Whether a connection is of use now.
    fn needs_link(&self) -> bool {
        self.session.is_busy() || self.session.is_open() || !self.devices.is_empty()
    }

    /// Searches the leader and connects, if there is need. Gives whether there is a new connection.
    fn poll_link(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        loop {
            let is_needed = self.needs_link();
            match &mut self.link {
                Link::Down if !is_needed => return false,
                Link::Down => self.link = Link::Searching(self.search(None)),
                Link::Pausing(pause) => match pause.as_mut().poll(cx) {
                    Poll::Pending => return false,
                    Poll::Ready(()) => self.link = Link::Down,
                },
                Link::Searching(search) => match search.as_mut().poll(cx) {
                    Poll::Pending => return false,
                    Poll::Ready(connection) => {
                        self.connected(connection, now);
                        return true;
                    }
                },
                Link::Up(_) => return self.poll_doubt(cx, now),
            }
        }
    }

    fn search(&self, named: Option<ServerId>) -> Search {
        Box::pin(find_leader(Arc::clone(&self.dialer), named))
    }

    fn connected(&mut self, mut connection: Connection, now: Instant) {
        tracing::info!(server = %connection.server, "connected to the leader");
        self.session.reconnected(&mut connection.out);
        if let Some(closing) = &mut self.closing {
            closing.is_end_sent = false;
        }
        self.link = Link::Up(Box::new(connection));
        self.doubt = None;
        self.heard = now;
        self.sent = now;
    }

    fn poll_doubt(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let (Link::Up(present), Some(search)) = (&self.link, &mut self.doubt) else {
            return false;
        };
        let silence = now.duration_since(self.heard);
        if silence < SILENCE_DOUBTED {
            self.doubt = None;
            return false;
        }
        let Poll::Ready(found) = search.as_mut().poll(cx) else {
            return false;
        };
        let is_same = found.server == present.server && found.boot == present.boot;
        self.doubt = None;
        if is_same && silence < SILENCE_BROKEN {
            return false;
        }
        self.connected(found, now);
        true
    }

    /// Deadlines, keep-alive, silence.
    fn poll_timer(&mut self, cx: &mut Context<'_>, now: Instant) {
        while self.timer.as_mut().poll(cx).is_ready() {
            self.tick(now);
            let is_waiting = self.is_active || self.session.is_busy() || self.closing.is_some();
            self.is_active = false;
            self.is_resting = !is_waiting;
            let pause = if is_waiting { TICK } else { REST };
            self.timer.as_mut().reset((now + pause).into());
        }
    }

    fn tick(&mut self, now: Instant) {
        if self.session.expire(now, &mut self.events) {
            self.disconnect(&ServerError::TimedOut(self.dialer.config.request_timeout));
        }
        self.take_events();
        if !self.devices.is_empty() && now.duration_since(self.polled) >= POLL_VOLUMES {
            self.poll_volumes(now);
            for device in std::mem::take(&mut self.unattached) {
                if self.is_registered(&device) {
                    self.attach(device);
                }
            }
        }
        let Link::Up(connection) = &mut self.link else {
            return;
        };
        if now.duration_since(self.sent) >= KEEP_ALIVE {
            self.sent = now;
            if !self.session.is_awaiting() {
                self.heard = now;
            }
            self.session.keep_alive(&mut connection.out);
        }
        let is_silent = now.duration_since(self.heard) >= SILENCE_DOUBTED;
        let is_due = now.duration_since(self.doubted) >= DOUBT_AGAIN && self.doubt.is_none();
        if is_silent && is_due && self.session.is_awaiting() {
            self.doubted = now;
            self.doubt = Some(self.search(None));
        }
    }

    /// Sends what waits.
    fn send(&mut self, cx: &mut Context<'_>, now: Instant) {
        let Link::Up(connection) = &mut self.link else {
            return;
        };
        let was_awaiting = self.session.is_awaiting();
        if self.session.pump(&mut connection.out) {
            self.sent = now;
            if !was_awaiting {
                self.heard = now;
            }
        }
        if let Poll::Ready(Err(error)) = connection.poll_flush(cx) {
            self.disconnect(&error);
        }
    }

    /// Whether the task is done.
    fn poll_closing(&mut self, now: Instant) -> bool {
        let Some(closing) = &mut self.closing else {
            return false;
        };
        if closing.is_ended || now >= closing.deadline {
            return true;
        }
        if self.session.is_changing() || closing.is_end_sent {
            return false;
        }
        let Link::Up(connection) = &mut self.link else {
            // Not worth a search: the servers end the session by themselves.
            return true;
        };
        if !self.session.is_open() {
            return true;
        }
        closing.is_end_sent = true;
        self.session.end(&mut connection.out);
        false
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let now = Instant::now();
        this.take_items(cx, now);
        let is_more = this.receive(cx, now);
        this.poll_timer(cx, now);
        if this.poll_closing(now) {
            return Poll::Ready(());
        }
        // A new connection has not been read from yet, so nothing would wake us for it.
        let is_new = this.poll_link(cx, now);
        this.send(cx, now);
        if is_more || is_new {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Completions that are dropped answer `Unavailable`; so does everything that comes later.
        drop(self.inbox.kill());
    }
}
