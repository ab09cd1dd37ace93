//! One target: its logical units, their task sets, and what it knows of each nexus.

mod begin;
mod leftovers;
mod management;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use pss_core::time::Instant;
use pss_core::volume::device::{DeviceError, DeviceInfo, DeviceRequest, DeviceResult, Fate};
use pss_core::volume::reservation::{
    Nexus, NoticeKind, ReservationAction, ReservationReply, ReservationRequest, Reservations,
};

use self::leftovers::access;
use self::management::Management;
use super::actions::{Action, Actions, Command, NexusId, NexusInfo, Outcome, Status};
use super::cdb::Kind;
use super::config::{LUN_MAX, LunConfig, TargetConfig};
use super::copy::CopyStatus;
use super::job::{Answer, Job, Next};
use super::report::decode_lun;
use super::reserve::nexus_of;
use super::sanitize::{SanitizeState, Step};
use super::sense::{Asc, Failure, Sense, SenseKey};
use super::taskset::TaskSet;
use super::unit::{Disk, Unit};

/// Most tasks of one nexus on all units: more than any session's command window.
const NEXUS_TASKS_MAX: usize = 512;
/// Most tasks of one logical unit.
const UNIT_TASKS_MAX: usize = 4096;

/// A target.
pub struct Target {
    config: TargetConfig,
    units: BTreeMap<u16, Unit>,
    task_sets: BTreeMap<u16, TaskSet>,
    nexuses: BTreeMap<NexusId, NexusState>,
    tasks: BTreeMap<u64, Task>,
    /// What devices and reservations have been asked.
    requests: HashMap<u64, Request>,
    /// Those of them for which nobody waits any more.
    leftovers: BTreeSet<u64>,
    /// Tasks whose requests wait until leftovers that they overlap have ended.
    held: BTreeMap<u64, Vec<(u16, DeviceRequest)>>,
    management: Vec<Management>,
    /// Nexuses whose RESERVE(6) is to be given up, which the cell has not been told.
    lost: Vec<(u16, Nexus)>,
    next_task: u64,
    next_cookie: u64,
    now: Instant,
}

struct NexusState {
    info: NexusInfo,
    name: Nexus,
    tasks: usize,
    /// It is to be told that the list of LUNs changed.
    luns_changed: bool,
    /// Units on which it may hold RESERVE(6).
    unit_reserved: Vec<u16>,
}

/// A command on its way.
struct Task {
    nexus: NexusId,
    tag: u32,
    lun: u16,
    /// Until it may run.
    command: Option<Command>,
    /// The servers have been asked how its volume is since it came.
    looked: bool,
    kind: Option<Kind>,
    job: Option<Box<dyn Job>>,
    /// Of the requests that the job waits for, in their order.
    results: Vec<Option<DeviceResult>>,
    outstanding: usize,
    /// Since when it waits for them.
    since: Instant,
    out_bytes: u64,
    /// List identifier and number of segments of an EXTENDED COPY.
    copy: Option<(u8, u16)>,
}

/// A request to a device or to reservations.
struct Request {
    owner: Owner,
    lun: u16,
    /// Which of its owner's requests.
    part: usize,
    /// What it is, to be asked again or to be kept apart from others.
    request: Option<DeviceRequest>,
}

#[derive(Clone, Debug)]
enum Owner {
    Task(u64),
    /// A task that has not begun, and looks how its volume is.
    Look(u64),
    /// The reservations for a task that has not begun.
    Looked(u64),
    /// The unit's sanitize operation.
    Sanitize,
    /// The reservations before a request of the sanitize operation is made again.
    SanitizeAgain(usize, DeviceRequest),
    /// Nobody waits for it any more, but it may still change the disk.
    Nobody,
    /// A task's check of the reservations before its request is made again.
    Recheck(u64, usize, DeviceRequest),
    /// The end of a nexus's RESERVE(6).
    Lost(Nexus),
    /// A reset, for a task management function.
    Reset,
}

impl Target {
    /// A target that nobody uses yet.
    pub fn new(config: TargetConfig) -> Target {
        let mut target = Target {
            units: BTreeMap::from([(0, Unit::controller())]),
            task_sets: BTreeMap::new(),
            nexuses: BTreeMap::new(),
            tasks: BTreeMap::new(),
            requests: HashMap::new(),
            leftovers: BTreeSet::new(),
            held: BTreeMap::new(),
            management: Vec::new(),
            lost: Vec::new(),
            next_task: 0,
            next_cookie: 0,
            now: Instant::default(),
            config,
        };
        for lun in target.config.luns.clone() {
            target.insert_unit(lun);
        }
        target
    }

    /// What it was made of, with later changes.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    fn disk_mut(&mut self, lun: u16) -> Option<&mut Disk> {
        self.units.get_mut(&lun)?.disk.as_mut()
    }

    fn insert_unit(&mut self, lun: LunConfig) {
        if lun.lun == 0 || lun.lun > LUN_MAX {
            return;
        }
        let unit = Unit::disk(lun.lun, lun.info, lun.settings);
        self.units.insert(lun.lun, unit);
    }

    /// Adds a disk, or changes one; initiators are told.
    pub fn add_lun(&mut self, lun: LunConfig, actions: &mut Actions) {
        self.config.luns.retain(|old| old.lun != lun.lun);
        self.config.luns.push(lun.clone());
        let same_volume = self
            .units
            .get_mut(&lun.lun)
            .and_then(|unit| unit.disk.as_mut())
            .filter(|disk| disk.info.uuid == lun.info.uuid);
        if let Some(disk) = same_volume {
            disk.settings = lun.settings;
            let fate = disk.fate;
            self.device_changed(lun.lun, lun.info, fate, actions);
            return;
        }
        self.abort_unit(lun.lun, actions);
        self.leave_sanitize(lun.lun);
        self.insert_unit(lun);
        self.tell_luns_changed();
    }

    /// Takes a disk away; its tasks are aborted.
    pub fn remove_lun(&mut self, lun: u16, actions: &mut Actions) {
        self.config.luns.retain(|old| old.lun != lun);
        if lun != 0 && self.units.contains_key(&lun) {
            self.abort_unit(lun, actions);
            self.leave_sanitize(lun);
            self.units.remove(&lun);
            self.tell_luns_changed();
        }
    }

    fn tell_luns_changed(&mut self) {
        for nexus in self.nexuses.values_mut() {
            nexus.luns_changed = true;
        }
    }

    /// Aborts all tasks of a unit.
    fn abort_unit(&mut self, lun: u16, actions: &mut Actions) {
        let tasks = self.tasks_where(|task| task.lun == lun);
        self.abort_tasks(tasks, actions);
    }

    /// An I_T nexus came to be.
    pub fn attach(&mut self, nexus: NexusId, info: NexusInfo) {
        for unit in self.units.values_mut() {
            unit.attend(nexus, Asc::POWER_ON);
        }
        let state = NexusState {
            name: nexus_of(&self.config.name, &info),
            info,
            tasks: 0,
            luns_changed: false,
            unit_reserved: Vec::new(),
        };
        self.nexuses.insert(nexus, state);
    }

    /// An I_T nexus was lost: its tasks end without a response (SAM-5 §6.3.4).
    pub fn detach(&mut self, nexus: NexusId, actions: &mut Actions) {
        let tasks = self.tasks_where(|task| task.nexus == nexus);
        self.abort_tasks(tasks, actions);
        self.management.retain(|waiting| waiting.nexus != nexus);
        for unit in self.units.values_mut() {
            unit.forget(nexus);
        }
        if let Some(state) = self.nexuses.remove(&nexus) {
            for lun in state.unit_reserved {
                self.give_up_reserve6(lun, state.name.clone(), actions);
            }
        }
    }

    fn give_up_reserve6(&mut self, lun: u16, name: Nexus, actions: &mut Actions) {
        let request = ReservationRequest {
            nexus: name.clone(),
            action: ReservationAction::NexusLost,
        };
        let owner = Owner::Lost(name);
        self.ask_reservations(owner, lun, request, actions);
    }

    fn ask_reservations(
        &mut self,
        owner: Owner,
        lun: u16,
        request: ReservationRequest,
        actions: &mut Actions,
    ) -> u64 {
        let cookie = self.next_cookie();
        self.requests.insert(
            cookie,
            Request {
                owner,
                lun,
                part: 0,
                request: None,
            },
        );
        actions.0.push(Action::Reserve {
            cookie,
            lun,
            request,
        });
        cookie
    }

    fn next_cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie
    }

    fn tasks_where(&self, wanted: impl Fn(&Task) -> bool) -> Vec<u64> {
        let matching = self.tasks.iter().filter(|(_, task)| wanted(task));
        matching.map(|(id, _)| *id).collect()
    }

    /// A command came.
    pub fn submit(&mut self, command: Command, actions: &mut Actions) {
        let (nexus, tag) = (command.nexus, command.tag);
        let Some(tasks) = self.nexuses.get(&nexus).map(|state| state.tasks) else {
            return actions.0.push(Action::Aborted { nexus, tag });
        };
        let lun = decode_lun(command.lun).filter(|lun| self.units.contains_key(lun));
        if let Some(result) = self.answer_at_once(&command, lun) {
            let descriptor = self.descriptor_sense(lun);
            let outcome = outcome(result, descriptor, 0);
            return actions.0.push(Action::Done {
                nexus,
                tag,
                outcome,
            });
        }
        let lun = lun.unwrap_or(0);
        let full = tasks >= NEXUS_TASKS_MAX
            || self
                .task_sets
                .get(&lun)
                .is_some_and(|set| set.len() >= UNIT_TASKS_MAX);
        if full {
            let outcome = outcome(Err(Failure::Status(Status::TaskSetFull)), false, 0);
            return actions.0.push(Action::Done {
                nexus,
                tag,
                outcome,
            });
        }
        let attribute = command.attribute;
        self.next_task += 1;
        let id = self.next_task;
        self.tasks.insert(
            id,
            Task {
                nexus,
                tag,
                lun,
                command: Some(command),
                looked: false,
                kind: None,
                job: None,
                results: Vec::new(),
                outstanding: 0,
                since: self.now,
                out_bytes: 0,
                copy: None,
            },
        );
        if let Some(state) = self.nexuses.get_mut(&nexus) {
            state.tasks += 1;
        }
        let set = self.task_sets.entry(lun).or_default();
        if set.insert(id, attribute) {
            self.start(id, actions);
        }
    }

    fn descriptor_sense(&self, lun: Option<u16>) -> bool {
        lun.and_then(|lun| self.units.get(&lun))
            .is_some_and(|unit| unit.mode.descriptor_sense)
    }

    /// Begins a task, and those that had to wait for it if it ends at once.
    fn start(&mut self, id: u64, actions: &mut Actions) {
        let mut ready = vec![id];
        while let Some(id) = ready.pop() {
            if self.looks_first(id) {
                self.look(id, actions);
                continue;
            }
            let Some(command) = self.tasks.get_mut(&id).and_then(|it| it.command.take()) else {
                continue;
            };
            let next = self.begin(id, command, actions);
            if let Some(next) = next {
                ready.extend(self.proceed(id, next, actions));
            }
        }
    }

    /// Has the servers asked how a task's volume is, before it begins.
    ///
    /// What another gateway has answered before the task came, a reset, a new size, a reservation, counts for it.
    /// The cell checks requests to blocks; whatever ends without one is to be checked like this.
    fn look(&mut self, id: u64, actions: &mut Actions) {
        let Some(task) = self.tasks.get_mut(&id) else {
            return;
        };
        task.looked = true;
        task.outstanding = 1;
        task.since = self.now;
        let lun = task.lun;
        self.submit_request(Owner::Look(id), lun, 0, DeviceRequest::Look, actions);
    }

    /// A task's look has ended.
    fn look_completed(&mut self, id: u64, lun: u16, result: DeviceResult, actions: &mut Actions) {
        match result {
            Err(DeviceError::ReservationChanged | DeviceError::Reserved) => {
                self.ask_reservations(Owner::Looked(id), lun, ReservationRequest::read(), actions);
            }
            Err(DeviceError::Unavailable) => self.looked(id, false, actions),
            // A volume that is gone, or a fenced session, is known by the device's fate now.
            _ => self.looked(id, true, actions),
        }
    }

    fn looked(&mut self, id: u64, reached: bool, actions: &mut Actions) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.outstanding = 0;
        }
        if reached {
            return self.start(id, actions);
        }
        for ready in self.finish(id, Err(Failure::Status(Status::Busy)), actions) {
            self.start(ready, actions);
        }
    }

    /// Carries out what a task's job wants. Returns tasks that may run because this one has ended.
    fn proceed(&mut self, id: u64, next: Next, actions: &mut Actions) -> Vec<u64> {
        let Some(lun) = self.tasks.get(&id).map(|task| task.lun) else {
            return Vec::new();
        };
        match next {
            Next::Submit(requests) => {
                let requests = requests.into_iter().map(|it| (lun, it)).collect();
                self.submit_requests(id, requests, actions)
            }
            Next::SubmitTo(requests) => self.submit_requests(id, requests, actions),
            Next::Reserve(request) => {
                if request.action == ReservationAction::ReserveUnit {
                    let nexus = self.tasks.get(&id).map(|task| task.nexus);
                    let state = nexus.and_then(|nexus| self.nexuses.get_mut(&nexus));
                    if let Some(state) = state.filter(|it| !it.unit_reserved.contains(&lun)) {
                        state.unit_reserved.push(lun);
                    }
                }
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.outstanding = 1;
                    task.since = self.now;
                }
                self.ask_reservations(Owner::Task(id), lun, request, actions);
                Vec::new()
            }
            Next::Done(result) => self.finish(id, result, actions),
        }
    }

    fn submit_requests(
        &mut self,
        id: u64,
        requests: Vec<(u16, DeviceRequest)>,
        actions: &mut Actions,
    ) -> Vec<u64> {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.outstanding = requests.len();
            task.results = vec![None; requests.len()];
            task.since = self.now;
        }
        if self.meet_leftovers(&requests) {
            self.held.insert(id, requests);
        } else {
            self.submit_parts(id, requests, actions);
        }
        Vec::new()
    }

    fn submit_parts(
        &mut self,
        id: u64,
        requests: Vec<(u16, DeviceRequest)>,
        actions: &mut Actions,
    ) {
        for (part, (lun, request)) in requests.into_iter().enumerate() {
            self.submit_request(Owner::Task(id), lun, part, request, actions);
        }
    }

    fn submit_request(
        &mut self,
        owner: Owner,
        lun: u16,
        part: usize,
        request: DeviceRequest,
        actions: &mut Actions,
    ) {
        let cookie = self.next_cookie();
        let reservations = self.reservations(lun).version();
        self.requests.insert(
            cookie,
            Request {
                owner,
                lun,
                part,
                request: Some(request.clone()),
            },
        );
        actions.0.push(Action::Submit {
            cookie,
            lun,
            request,
            reservations,
        });
    }

    fn reservations(&self, lun: u16) -> Arc<Reservations> {
        let disk = self.units.get(&lun).and_then(|unit| unit.disk.as_ref());
        disk.map(|disk| Arc::clone(&disk.reservations))
            .unwrap_or_default()
    }

    /// A task has ended. Returns tasks that may run now.
    fn finish(
        &mut self,
        id: u64,
        result: Result<Answer, Failure>,
        actions: &mut Actions,
    ) -> Vec<u64> {
        let Some(task) = self.tasks.remove(&id) else {
            return Vec::new();
        };
        self.remember_copy(&task, result.is_ok());
        let result = match result {
            Err(Failure::Status(Status::Busy)) => Err(self.busy(task.lun)),
            other => other,
        };
        let descriptor = self.descriptor_sense(Some(task.lun));
        actions.0.push(Action::Done {
            nexus: task.nexus,
            tag: task.tag,
            outcome: outcome(result, descriptor, task.out_bytes),
        });
        self.release(id, &task)
    }

    fn remember_copy(&mut self, task: &Task, good: bool) {
        let disk = self
            .units
            .get_mut(&task.lun)
            .and_then(|it| it.disk.as_mut());
        if let (Some((list_id, segments)), Some(disk)) = (task.copy, disk) {
            let status = CopyStatus {
                list_id,
                good,
                segments: if good { segments } else { 0 },
                bytes: 0,
            };
            disk.copies.push(task.nexus, status);
        }
    }

    /// BUSY at first; NOT READY if the disk has not answered for longer.
    fn busy(&self, lun: u16) -> Failure {
        let disk = self.units.get(&lun).and_then(|unit| unit.disk.as_ref());
        let since = disk.and_then(|disk| disk.silent_since);
        if since.is_some_and(|since| self.now.since(since) > self.config.command_timeout) {
            let asc = Asc::ASYMMETRIC_ACCESS_STATE_TRANSITION;
            Sense::new(SenseKey::NotReady, asc).into()
        } else {
            Failure::Status(Status::Busy)
        }
    }

    fn release(&mut self, id: u64, task: &Task) -> Vec<u64> {
        self.held.remove(&id);
        if let Some(state) = self.nexuses.get_mut(&task.nexus) {
            state.tasks = state.tasks.saturating_sub(1);
        }
        match self.task_sets.get_mut(&task.lun) {
            Some(set) => set.remove(id),
            None => Vec::new(),
        }
    }

    /// Ends tasks without a response. Requests that they made go on; returns those that change the disk.
    fn abort_tasks(&mut self, ids: Vec<u64>, actions: &mut Actions) -> Vec<u64> {
        let mut left = Vec::new();
        let mut ended = Vec::new();
        for id in ids {
            if let Some(task) = self.tasks.remove(&id) {
                actions.0.push(Action::Aborted {
                    nexus: task.nexus,
                    tag: task.tag,
                });
                left.extend(self.leave_requests(id));
                ended.push((id, task));
            }
        }
        // Only when all of them are gone may others begin: none of these must.
        let ready: Vec<u64> = ended
            .iter()
            .flat_map(|(id, task)| self.release(*id, task))
            .collect();
        for id in ready {
            self.start(id, actions);
        }
        left
    }

    /// Result of an [`Action::Submit`].
    pub fn completed(&mut self, cookie: u64, result: DeviceResult, actions: &mut Actions) {
        let left = self.leftover(cookie);
        let Some(request) = self.requests.remove(&cookie) else {
            return;
        };
        self.note_device(request.lun, &result);
        match request.owner {
            Owner::Task(id) => match (result, request.request) {
                (Err(DeviceError::ReservationChanged | DeviceError::Reserved), Some(again)) => {
                    self.recheck(id, request.lun, request.part, again, actions);
                }
                (result, _) => self.part_completed(id, request.part, result, actions),
            },
            Owner::Sanitize => match (result, request.request) {
                // It was allowed when it began, and goes on whatever becomes of reservations.
                (Err(DeviceError::ReservationChanged | DeviceError::Reserved), Some(again)) => {
                    let owner = Owner::SanitizeAgain(request.part, again);
                    let read = ReservationRequest::read();
                    self.ask_reservations(owner, request.lun, read, actions);
                }
                (result, _) => {
                    self.sanitize_completed(request.lun, request.part, result, actions);
                }
            },
            Owner::Look(id) => self.look_completed(id, request.lun, result, actions),
            Owner::Nobody
            | Owner::Looked(_)
            | Owner::Recheck(..)
            | Owner::SanitizeAgain(..)
            | Owner::Lost(_)
            | Owner::Reset => {}
        }
        self.leftover_ended(cookie, left, actions);
        self.drained(cookie, actions);
    }

    /// Whether the device answers at all.
    fn note_device(&mut self, lun: u16, result: &DeviceResult) {
        let now = self.now;
        if let Some(disk) = self.disk_mut(lun) {
            match result {
                Err(DeviceError::Unavailable) => _ = disk.silent_since.get_or_insert(now),
                _ => disk.answers(now),
            }
        }
    }

    fn part_completed(
        &mut self,
        id: u64,
        part: usize,
        result: DeviceResult,
        actions: &mut Actions,
    ) {
        let Some(task) = self.tasks.get_mut(&id) else {
            return;
        };
        if let Some(place) = task.results.get_mut(part) {
            *place = Some(result);
        }
        task.outstanding = task.outstanding.saturating_sub(1);
        if task.outstanding > 0 {
            return;
        }
        let results = std::mem::take(&mut task.results);
        let results = results.into_iter().flatten().collect();
        let Some(job) = &mut task.job else {
            return;
        };
        let next = job.next(results);
        for ready in self.proceed(id, next, actions) {
            self.start(ready, actions);
        }
    }

    /// Result of an [`Action::Reserve`]; `None` if it could not be reached in time.
    pub fn reserved(
        &mut self,
        cookie: u64,
        reply: Option<ReservationReply>,
        actions: &mut Actions,
    ) {
        let left = self.leftover(cookie);
        let Some(request) = self.requests.remove(&cookie) else {
            return;
        };
        if let Some(reply) = &reply {
            let now = self.now;
            if let Some(disk) = self.disk_mut(request.lun) {
                disk.answers(now);
            }
            let own = matches!(request.owner, Owner::Task(_)) && reply.result.is_ok();
            self.learn_reservations(request.lun, Arc::clone(&reply.now), own, actions);
        }
        match request.owner {
            Owner::Task(id) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.outstanding = 0;
                    if let Some(job) = &mut task.job {
                        let next = job.reserved(reply);
                        for ready in self.proceed(id, next, actions) {
                            self.start(ready, actions);
                        }
                    }
                }
            }
            Owner::Recheck(id, part, again) => {
                self.rechecked(id, request.lun, part, again, reply.is_some(), actions)
            }
            Owner::SanitizeAgain(part, again) if reply.is_some() => {
                self.submit_request(Owner::Sanitize, request.lun, part, again, actions);
            }
            Owner::SanitizeAgain(part, _) => {
                let result = Err(DeviceError::Unavailable);
                self.sanitize_completed(request.lun, part, result, actions);
            }
            Owner::Looked(id) => self.looked(id, reply.is_some(), actions),
            Owner::Lost(name) if reply.is_none() => self.lost.push((request.lun, name)),
            Owner::Reset if reply.is_none_or(|it| it.result.is_err()) => self.reset_failed(cookie),
            Owner::Lost(_) | Owner::Nobody | Owner::Sanitize | Owner::Look(_) | Owner::Reset => {}
        }
        self.leftover_ended(cookie, left, actions);
        self.drained(cookie, actions);
    }

    /// The reservations had changed when a request met the cell: asks for them before it is made again.
    fn recheck(
        &mut self,
        id: u64,
        lun: u16,
        part: usize,
        again: DeviceRequest,
        actions: &mut Actions,
    ) {
        let nexus = self.tasks.get(&id).map(|task| task.nexus);
        let Some(state) = nexus.and_then(|nexus| self.nexuses.get(&nexus)) else {
            return;
        };
        let request = ReservationRequest {
            nexus: state.name.clone(),
            action: ReservationAction::Read,
        };
        let owner = Owner::Recheck(id, part, again);
        self.ask_reservations(owner, lun, request, actions);
    }

    /// The reservations are known: a request is made again if it is still allowed.
    fn rechecked(
        &mut self,
        id: u64,
        lun: u16,
        part: usize,
        request: DeviceRequest,
        reached: bool,
        actions: &mut Actions,
    ) {
        let Some(task) = self.tasks.get(&id) else {
            return;
        };
        let nexus = task.nexus;
        let name = self.nexuses.get(&nexus).map(|state| &state.name);
        let allowed = self.reservations(lun).allows(name, access(&request));
        // The change that was just heard of may have been answered before the task came: then what it tells this
        // nexus comes first, as it does for a task that begins (SAM-5 §5.14).
        let unit = self.units.get_mut(&lun).filter(|_| reached);
        let told = unit.and_then(|unit| unit.take_attention(nexus));
        let failure = match (reached, told) {
            (false, _) => Status::Busy.into(),
            (true, Some(asc)) => Sense::attention(asc).into(),
            (true, None) if allowed => {
                self.submit_request(Owner::Task(id), lun, part, request, actions);
                return;
            }
            (true, None) => Status::ReservationConflict.into(),
        };
        self.leave_requests(id);
        for ready in self.finish(id, Err(failure), actions) {
            self.start(ready, actions);
        }
    }

    /// What time it is; to be told before a command is handed over. A command's time is counted from then, and
    /// nobody calls [`Target::tick`] while nobody is logged in.
    pub fn note_time(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Whether [`Target::tick`] has something to do though nobody is logged in.
    pub fn is_owing(&self) -> bool {
        !self.lost.is_empty()
    }

    /// Time goes on; to be called every half second while anyone is logged in, or [`Target::is_owing`].
    pub fn tick(&mut self, now: Instant, actions: &mut Actions) {
        self.now = now;
        let limit = self.config.command_timeout;
        let late = self.tasks_where(|task| task.outstanding > 0 && now.since(task.since) > limit);
        for id in late {
            let lun = self.tasks.get(&id).map(|task| (task.lun, task.since));
            // A disk that has answered others meanwhile is there.
            if let Some((lun, since)) = lun
                && let Some(disk) = self.disk_mut(lun)
                && disk.answered <= since
            {
                disk.silent_since.get_or_insert(since + limit);
            }
            self.leave_requests(id);
            for ready in self.finish(id, Err(Failure::Status(Status::Busy)), actions) {
                self.start(ready, actions);
            }
        }
        for (lun, name) in std::mem::take(&mut self.lost) {
            self.give_up_reserve6(lun, name, actions);
        }
        self.expire_management(actions);
    }

    /// A device's info or fate changed.
    pub fn device_changed(
        &mut self,
        lun: u16,
        info: DeviceInfo,
        fate: Fate,
        _actions: &mut Actions,
    ) {
        if let Some(config) = self.config.luns.iter_mut().find(|it| it.lun == lun) {
            config.info = info.clone();
        }
        let Some(unit) = self.units.get_mut(&lun) else {
            return;
        };
        let Some(disk) = &mut unit.disk else {
            return;
        };
        let resized = disk.info.size_bytes != info.size_bytes;
        disk.info = info;
        disk.fate = fate;
        if resized {
            for nexus in self.nexuses.keys() {
                unit.attend(*nexus, Asc::CAPACITY_DATA_HAS_CHANGED);
            }
        }
    }

    /// Bytes that a LUN's volume uses and that are still free for it; for LOG SENSE.
    pub fn usage_changed(&mut self, lun: u16, used_bytes: u64, available_bytes: u64) {
        if let Some(disk) = self.units.get_mut(&lun).and_then(|it| it.disk.as_mut()) {
            disk.usage = Some((used_bytes, available_bytes));
        }
    }

    /// The reservations that a new LUN's volume has: what happened before is nobody's concern.
    pub fn reservations_known(&mut self, lun: u16, now: Arc<Reservations>) {
        if let Some(disk) = self.disk_mut(lun)
            && disk.reservations.version() < now.version()
        {
            disk.reservations = now;
        }
    }

    /// The reservations of a LUN's volume changed, maybe through another gateway.
    pub fn reservations_changed(
        &mut self,
        lun: u16,
        now: Arc<Reservations>,
        actions: &mut Actions,
    ) {
        self.learn_reservations(lun, now, false, actions);
    }

    /// `own`: a command of this target changed them, and has not been answered yet.
    fn learn_reservations(
        &mut self,
        lun: u16,
        now: Arc<Reservations>,
        own: bool,
        actions: &mut Actions,
    ) {
        let Some(unit) = self.units.get_mut(&lun) else {
            return;
        };
        let Some(disk) = &mut unit.disk else {
            return;
        };
        let seen = disk.reservations.version();
        if now.version() <= seen {
            return;
        }
        let before = std::mem::replace(&mut disk.reservations, Arc::clone(&now));
        let mut aborted = Vec::new();
        for (nexus, state) in &self.nexuses {
            let mut told = false;
            for notice in now.notices_after(seen).filter(|it| it.to == state.name) {
                told = true;
                match notice.kind {
                    NoticeKind::ReservationsPreempted => {
                        unit.attend(*nexus, Asc::RESERVATIONS_PREEMPTED);
                    }
                    NoticeKind::ReservationsReleased => {
                        unit.attend(*nexus, Asc::RESERVATIONS_RELEASED);
                    }
                    NoticeKind::RegistrationsPreempted => {
                        unit.attend(*nexus, Asc::REGISTRATIONS_PREEMPTED);
                    }
                    NoticeKind::TasksAborted => aborted.push(*nexus),
                }
            }
            // Too much has happened for the cell to remember all of it.
            if !told
                && now.forgot_after(seen)
                && before.key(&state.name).is_some()
                && now.key(&state.name).is_none()
            {
                unit.attend(*nexus, Asc::REGISTRATIONS_PREEMPTED);
            }
        }
        // Nothing but that command's change: what it ends came before it was answered (TAS 0: no response).
        let silent = own && now.version() == seen + 1;
        for nexus in aborted {
            let tasks = self.tasks_where(|task| task.nexus == nexus && task.lun == lun);
            match silent {
                true => _ = self.abort_tasks(tasks, actions),
                false => self.end_tasks(tasks, Asc::REGISTRATIONS_PREEMPTED, actions),
            }
        }
        if now.reset().is_some_and(|(version, _)| version > seen) {
            self.reset_unit(lun, actions);
        }
    }

    /// Ends tasks that something forbids of which another gateway may have answered before they came: each as
    /// though it had come afterwards and met the unit attention condition, which is told with that. Without a
    /// response, those that did come afterwards would be lost.
    fn end_tasks(&mut self, ids: Vec<u64>, asc: Asc, actions: &mut Actions) {
        let mut ready = Vec::new();
        for id in ids {
            let Some((nexus, lun)) = self.tasks.get(&id).map(|task| (task.nexus, task.lun)) else {
                continue;
            };
            if let Some(unit) = self.units.get_mut(&lun) {
                unit.clear_attention(nexus, asc);
            }
            self.leave_requests(id);
            ready.extend(self.finish(id, Err(Sense::attention(asc).into()), actions));
        }
        for id in ready {
            self.start(id, actions);
        }
    }

    fn sanitize_completed(
        &mut self,
        lun: u16,
        part: usize,
        result: DeviceResult,
        actions: &mut Actions,
    ) {
        let Some(disk) = self.units.get_mut(&lun).and_then(|it| it.disk.as_mut()) else {
            return;
        };
        if let Some(place) = disk.sanitize_results.get_mut(part) {
            *place = Some(result);
        }
        if disk.sanitize_results.iter().any(Option::is_none) {
            return;
        }
        let results = std::mem::take(&mut disk.sanitize_results);
        self.sanitize_step(lun, results.into_iter().flatten().collect(), actions);
    }

    fn sanitize_step(&mut self, lun: u16, results: Vec<DeviceResult>, actions: &mut Actions) {
        let Some(disk) = self.units.get_mut(&lun).and_then(|it| it.disk.as_mut()) else {
            return;
        };
        let SanitizeState::Running(sanitize) = &mut disk.sanitize else {
            return;
        };
        let result = match sanitize.step(results) {
            Step::Submit(requests) => {
                disk.sanitize_results = vec![None; requests.len()];
                for (part, request) in requests.into_iter().enumerate() {
                    self.submit_request(Owner::Sanitize, lun, part, request, actions);
                }
                return;
            }
            Step::Done => {
                disk.sanitize = SanitizeState::Idle;
                Ok(Answer::good())
            }
            Step::Failed(sense, unrestricted) => {
                disk.sanitize = match unrestricted {
                    true => SanitizeState::Idle,
                    false => SanitizeState::Failed,
                };
                Err(Failure::Sense(sense))
            }
        };
        if let Some(id) = disk.sanitize_task.take() {
            for ready in self.finish(id, result, actions) {
                self.start(ready, actions);
            }
        }
    }
}

/// How a command ended, for the transport.
fn outcome(result: Result<Answer, Failure>, descriptor: bool, out_bytes: u64) -> Outcome {
    let (status, sense, data_in, in_bytes) = match result {
        Ok(answer) => (
            answer.status.unwrap_or(Status::Good),
            Vec::new(),
            answer.data,
            answer.in_bytes,
        ),
        Err(Failure::Sense(sense)) => (
            Status::CheckCondition,
            sense.encode(descriptor),
            Vec::new(),
            0,
        ),
        Err(Failure::Status(status)) => (status, Vec::new(), Vec::new(), 0),
    };
    Outcome {
        status,
        sense,
        data_in,
        in_bytes,
        out_bytes,
    }
}

#[cfg(test)]
mod tests;
