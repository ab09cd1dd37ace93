//! One target with its disks and sessions: carries out what the SCSI side asks for.
//!
//! Locks are taken in the order host, session; a session is never locked while its host is asked.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use pss_core::volume::device::{
    BlockDevice, CompletionQueue, DeviceError, DeviceInfo, DeviceResult, Fate,
};
use pss_core::volume::reservation::{ReservationReply, ReservationRequest, Reservations};
use pss_gateway::alarm::Alarm;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::scsi::{
    Action, Actions, LunConfig, LunSettings, NexusId, NexusInfo, Outcome, Target, TargetConfig,
    TaskResponse,
};
use crate::session::Output;
use crate::sessions::Handle;

/// How often the SCSI side looks at its clock while it has something to do.
const TICK: Duration = Duration::from_millis(500);

/// A target that is served.
pub struct Host {
    name: String,
    state: Mutex<State>,
    queue: Arc<CompletionQueue>,
    answers: Arc<Mutex<Vec<Answer>>>,
    alarm: Arc<Alarm>,
    clock: Clock,
    retired: AtomicBool,
    ready: AtomicBool,
}

struct State {
    target: Target,
    actions: Actions,
    disks: BTreeMap<u16, Disk>,
    sessions: HashMap<NexusId, Arc<Handle>>,
}

struct Disk {
    device: Arc<dyn BlockDevice>,
    settings: LunSettings,
    changed: Arc<AtomicBool>,
    /// Version of the reservations that the SCSI side was told last.
    reservations: u64,
}

/// What was answered about reservations.
enum Answer {
    /// A request of the SCSI side.
    Reserved(u64, Option<ReservationReply>),
    /// They changed.
    Reservations(u16, Arc<Reservations>),
}

/// What is to be told to sessions, once the host is unlocked.
enum Delivery {
    Outcome(u32, Outcome),
    Aborted(u32),
    Managed(u32, TaskResponse),
    Drop,
}

impl State {
    /// A volume is attached while an initiator is logged in to its target, whether it uses that disk or not.
    fn use_disks(&self, in_use: bool) {
        for disk in self.disks.values() {
            disk.device.set_in_use(in_use);
        }
    }
}

impl Host {
    /// A target without disks.
    pub fn new(config: TargetConfig, clock: Clock) -> Arc<Host> {
        let alarm = Arc::new(Alarm::default());
        let rung = Arc::clone(&alarm);
        Arc::new(Host {
            name: config.name.clone(),
            state: Mutex::new(State {
                target: Target::new(config),
                actions: Actions::default(),
                disks: BTreeMap::new(),
                sessions: HashMap::new(),
            }),
            queue: CompletionQueue::new(Box::new(move || rung.ring())),
            answers: Arc::default(),
            alarm,
            clock,
            retired: AtomicBool::new(false),
            ready: AtomicBool::new(false),
        })
    }

    /// iSCSI name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its disks have been looked for. Until then initiators must not log in: they would take a
    /// disk that is only late for one that is gone.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// All its disks that exist are there.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
    }

    /// LUNs that have a disk, and how it is shown.
    pub fn luns(&self) -> BTreeMap<u16, (String, LunSettings)> {
        let state = self.state();
        let named = |(lun, disk): (&u16, &Disk)| {
            let name = disk.device.info().name;
            (*lun, (name, disk.settings.clone()))
        };
        state.disks.iter().map(named).collect()
    }

    /// Whether the volume of a LUN was deleted: another one may have its name.
    pub fn is_gone(&self, lun: u16) -> bool {
        let state = self.state();
        let disk = state.disks.get(&lun);
        disk.is_some_and(|disk| disk.device.fate() == Fate::Deleted)
    }

    /// Its disks and how they are shown.
    pub fn disks(&self) -> BTreeMap<u16, (DeviceInfo, LunSettings)> {
        let state = self.state();
        let shown =
            |(lun, disk): (&u16, &Disk)| (*lun, (disk.device.info(), disk.settings.clone()));
        state.disks.iter().map(shown).collect()
    }

    /// Shows a volume as a disk. What became of its reservations before it was opened is not told to anyone.
    pub fn add_lun(
        &self,
        lun: u16,
        device: Arc<dyn BlockDevice>,
        settings: LunSettings,
        reservations: Arc<Reservations>,
    ) {
        let changed = Arc::new(AtomicBool::new(true));
        let watched = (Arc::downgrade(&self.alarm), Arc::downgrade(&changed));
        device.watch(Box::new(move || {
            let (Some(alarm), Some(changed)) = (watched.0.upgrade(), watched.1.upgrade()) else {
                return false;
            };
            changed.store(true, Ordering::Release);
            alarm.ring();
            true
        }));
        let info = device.info();
        let mut state = self.state();
        device.set_in_use(!state.sessions.is_empty());
        let disk = Disk {
            device,
            settings: settings.clone(),
            changed,
            reservations: reservations.version(),
        };
        state.disks.insert(lun, disk);
        let config = LunConfig {
            lun,
            info,
            settings,
        };
        let State {
            target, actions, ..
        } = &mut *state;
        target.add_lun(config, actions);
        target.reservations_known(lun, reservations);
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
        self.alarm.ring();
    }

    /// Shows a disk no more.
    pub fn remove_lun(&self, lun: u16) {
        let mut state = self.state();
        state.disks.remove(&lun);
        let State {
            target, actions, ..
        } = &mut *state;
        target.remove_lun(lun, actions);
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
    }

    /// A session came to be.
    pub fn attach(&self, handle: &Arc<Handle>, info: NexusInfo) {
        let mut state = self.state();
        state.target.note_time(self.clock.now());
        state.target.attach(handle.nexus, info);
        if state.sessions.is_empty() {
            state.use_disks(true);
        }
        state.sessions.insert(handle.nexus, Arc::clone(handle));
        drop(state);
        self.alarm.ring();
    }

    /// A session is no more.
    pub fn detach(&self, nexus: NexusId) {
        let mut state = self.state();
        if state.sessions.remove(&nexus).is_none() {
            return;
        }
        if state.sessions.is_empty() {
            state.use_disks(false);
        }
        let State {
            target, actions, ..
        } = &mut *state;
        target.detach(nexus, actions);
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
    }

    /// Sessions that use it.
    pub fn sessions(&self) -> Vec<Arc<Handle>> {
        self.state().sessions.values().cloned().collect()
    }

    /// Carries out what a session asked for.
    pub fn carry_out(&self, nexus: NexusId, outputs: Vec<Output>) {
        if outputs.is_empty() {
            return;
        }
        let mut state = self.state();
        let State {
            target, actions, ..
        } = &mut *state;
        target.note_time(self.clock.now());
        for output in outputs {
            match output {
                Output::Submit(command) => target.submit(command, actions),
                Output::Manage {
                    id,
                    function,
                    lun,
                    tag,
                } => target.task_management(nexus, id, function, lun, tag, actions),
                // The server's own.
                Output::ListTargets { .. } => {}
            }
        }
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
        // Devices may have answered at once.
        self.take_results();
    }

    /// Does all that is in the state's actions; gives what is to be told to sessions.
    fn perform(&self, state: &mut State) -> Vec<(Arc<Handle>, Delivery)> {
        let mut deliveries = Vec::new();
        while !state.actions.0.is_empty() {
            for action in std::mem::take(&mut state.actions.0) {
                self.perform_one(state, action, &mut deliveries);
            }
        }
        deliveries
    }

    fn perform_one(
        &self,
        state: &mut State,
        action: Action,
        deliveries: &mut Vec<(Arc<Handle>, Delivery)>,
    ) {
        let mut tell = |nexus: &NexusId, delivery| {
            if let Some(handle) = state.sessions.get(nexus) {
                deliveries.push((Arc::clone(handle), delivery));
            }
        };
        match action {
            Action::Submit {
                cookie,
                lun,
                request,
                reservations,
            } => {
                let done = self.queue.completion(cookie);
                match state.disks.get(&lun) {
                    Some(disk) => disk.device.submit_checked(request, reservations, done),
                    None => done.complete(Err(DeviceError::Deleted)),
                }
            }
            Action::Reserve {
                cookie,
                lun,
                request,
            } => {
                // Begun here, so that they are carried out in their order.
                let disk = state.disks.get(&lun);
                let reply = disk.map(|disk| disk.device.reserve(request));
                let answers = Arc::clone(&self.answers);
                let alarm = Arc::clone(&self.alarm);
                tokio::spawn(async move {
                    let reply = match reply {
                        Some(reply) => reply.await,
                        None => None,
                    };
                    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                    answers.push(Answer::Reserved(cookie, reply));
                    drop(answers);
                    alarm.ring();
                });
            }
            Action::Done {
                nexus,
                tag,
                outcome,
            } => tell(&nexus, Delivery::Outcome(tag, outcome)),
            Action::Aborted { nexus, tag } => tell(&nexus, Delivery::Aborted(tag)),
            Action::Managed {
                nexus,
                id,
                response,
            } => tell(&nexus, Delivery::Managed(id, response)),
            Action::DropSessions { nexuses } => {
                for nexus in &nexuses {
                    tell(nexus, Delivery::Drop);
                }
            }
        }
    }

    /// Asks for reservations that changed, maybe through another gateway.
    fn ask_for_reservations(&self, state: &mut State) {
        for (lun, disk) in &mut state.disks {
            let version = disk.device.reservations_version();
            if version == disk.reservations {
                continue;
            }
            disk.reservations = version;
            let (lun, reply) = (*lun, disk.device.reserve(ReservationRequest::read()));
            let answers = Arc::clone(&self.answers);
            let alarm = Arc::clone(&self.alarm);
            tokio::spawn(async move {
                if let Some(reply) = reply.await {
                    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                    answers.push(Answer::Reservations(lun, reply.now));
                    drop(answers);
                    alarm.ring();
                }
            });
        }
    }

    /// Takes what was answered about reservations.
    fn take_answers(&self) {
        let answers = {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *answers)
        };
        if answers.is_empty() {
            return;
        }
        let mut state = self.state();
        let State {
            target, actions, ..
        } = &mut *state;
        for answer in answers {
            match answer {
                Answer::Reserved(cookie, reply) => target.reserved(cookie, reply, actions),
                Answer::Reservations(lun, now) => target.reservations_changed(lun, now, actions),
            }
        }
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
    }

    fn deliver(&self, deliveries: Vec<(Arc<Handle>, Delivery)>) {
        for (handle, delivery) in deliveries {
            let mut session = handle.session();
            match delivery {
                Delivery::Outcome(tag, outcome) => session.handle_outcome(tag, &outcome),
                Delivery::Aborted(tag) => session.handle_aborted(tag),
                Delivery::Managed(id, response) => session.handle_managed(id, response),
                Delivery::Drop => session.drop_session(),
            }
            drop(session);
            // The connection sends it, and sees to what the session wants next.
            handle.ring();
        }
    }

    /// Takes what devices answered.
    pub fn take_results(&self) {
        let mut results: Vec<(u64, DeviceResult)> = Vec::new();
        loop {
            self.queue.take(&mut results);
            if results.is_empty() {
                return;
            }
            let mut state = self.state();
            // A device says what it is before it answers whoever looked.
            Self::note_changes(&mut state);
            let State {
                target, actions, ..
            } = &mut *state;
            for (cookie, result) in results.drain(..) {
                target.completed(cookie, result, actions);
            }
            let deliveries = self.perform(&mut state);
            drop(state);
            self.deliver(deliveries);
        }
    }

    /// Tells the SCSI side which devices have changed.
    fn note_changes(state: &mut State) {
        let State {
            target,
            actions,
            disks,
            ..
        } = state;
        for (lun, disk) in disks.iter() {
            if disk.changed.load(Ordering::Acquire) && disk.changed.swap(false, Ordering::AcqRel) {
                let (info, fate) = (disk.device.info(), disk.device.fate());
                target.device_changed(*lun, info, fate, actions);
            }
        }
    }

    fn look_at_devices(&self) {
        let mut state = self.state();
        Self::note_changes(&mut state);
        self.ask_for_reservations(&mut state);
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
    }

    fn tick(&self) {
        let mut state = self.state();
        if state.sessions.is_empty() && !state.target.is_owing() {
            return;
        }
        let now = self.clock.now();
        let State {
            target, actions, ..
        } = &mut *state;
        target.tick(now, actions);
        self.ask_for_reservations(&mut state);
        let deliveries = self.perform(&mut state);
        drop(state);
        self.deliver(deliveries);
    }

    /// Ends [`Host::run`].
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.alarm.ring();
    }

    /// Serves the target until [`Host::retire`].
    pub async fn run(self: Arc<Self>) {
        info!(target_name = self.name, "target is served");
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        poll_fn(|cx| {
            self.alarm.register(cx.waker());
            self.look_at_devices();
            self.take_results();
            self.take_answers();
            while tick.poll_tick(cx).is_ready() {
                self.tick();
            }
            match self.retired.load(Ordering::Acquire) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        let left = self.state().sessions.len();
        if left > 0 {
            warn!(
                target_name = self.name,
                left, "target is gone with sessions"
            );
        }
    }
}
