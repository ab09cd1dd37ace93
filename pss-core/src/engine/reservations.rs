//! Reservations at the leader: every request to blocks is checked in the order of the log.
//!
//! What is applied decides. So nothing that a change of reservations could forbid is begun while one is
//! proposed and not applied, and a change waits until the writes that were checked before it stand in the
//! log. In between, requests of the volume queue up here.

use crate::engine::{ClientId, Engine};
use crate::entry::{Entry, Op};
use crate::state::Refusal;
use crate::time::Instant;
use crate::types::VolumeId;
use crate::volume::reservation::{Access, Reservations};
use crate::wire::client::{ReplyBody, ReplyError, Request, RequestBody};

/// Changes of reservations that are proposed at once, so that what goes into one entry is bounded.
const RESERVING_MAX: usize = 8;

impl Engine {
    /// The request without what says under which reservations it was checked; `None` if it was refused
    /// or has to wait.
    pub(super) fn admit(&mut self, client: ClientId, request: Request) -> Option<Request> {
        let Some((volume, access)) = touched(request.body.unchecked()) else {
            return Some(request);
        };
        let never = self.reserving.is_empty()
            && self.queued.is_empty()
            && self.state.reservations(volume).is_none();
        let knows =
            !matches!(request.body, RequestBody::Checked { reservations, .. } if reservations != 0);
        if never && knows && access.is_some() {
            return Some(unwrapped(request).1);
        }
        if self.is_repeated(&request) {
            return Some(unwrapped(request).1);
        }
        if self.must_queue(volume, access) {
            self.queued.push_back((client, request));
            return None;
        }
        let (version, request) = unwrapped(request);
        let Some(access) = access else {
            return Some(request);
        };
        match self.check_access(volume, access, version) {
            Ok(()) => Some(request),
            Err(refusal) => {
                self.reply(client, request.tag, Err(ReplyError::Refused(refusal)));
                None
            }
        }
    }

    /// Whether a request has to wait; one without `access` changes reservations.
    fn must_queue(&self, volume: VolumeId, access: Option<Access>) -> bool {
        let in_order = |(_, it): &(ClientId, Request)| {
            touched(it.body.unchecked()).is_some_and(|it| it.0 == volume)
        };
        if self.reserving.contains_key(&volume) || self.queued.iter().any(in_order) {
            return true;
        }
        access.is_none()
            && (self.reserving.len() >= RESERVING_MAX
                || self.deferred.iter().any(|it| it.range.volume == volume)
                || self.merging.values().any(|it| it.range.volume == volume))
    }

    fn check_access(
        &self,
        volume: VolumeId,
        access: Access,
        version: Option<u64>,
    ) -> Result<(), Refusal> {
        let now = self.state.reservations(volume);
        match version {
            Some(version) if version == now.map_or(0, Reservations::version) => Ok(()),
            Some(_) => Err(Refusal::ReservationsChanged),
            None if now.is_none_or(|now| now.allows(None, access)) => Ok(()),
            None => Err(Refusal::Reserved),
        }
    }

    /// Begins what has waited long enough. Returns whether anything was begun.
    pub(super) fn pump_queued(&mut self, now: Instant) -> bool {
        if self.queued.is_empty() || !self.serves() {
            return false;
        }
        let queued = std::mem::take(&mut self.queued);
        let before = queued.len();
        for (client, request) in queued {
            // What must go on waiting queues up again, in the same order.
            self.dispatch(now, client, request);
        }
        let moved = self.queued.len() < before;
        if moved {
            self.replica.flush(now);
        }
        moved
    }

    /// An entry was applied: its changes of reservations hold from now on.
    pub(super) fn note_reserved(&mut self, entry: &Entry) {
        for command in entry.commands.iter() {
            if let Op::Reserve { volume, .. } = &command.op
                && let Some(count) = self.reserving.get_mut(volume)
            {
                *count -= 1;
                if *count == 0 {
                    self.reserving.remove(volume);
                }
            }
        }
    }

    pub(super) fn look(&self, volume: VolumeId) -> Result<ReplyBody, ReplyError> {
        let found = self.state.volume(volume);
        let volume = found.ok_or(ReplyError::Refused(Refusal::NoSuchVolume))?;
        let reservations = self.state.reservations(volume.id);
        Ok(ReplyBody::Volume {
            size_bytes: volume.size_bytes,
            reservations: reservations.map_or(0, Reservations::version),
        })
    }

    pub(super) fn reservations_of(&self, volume: VolumeId) -> Result<ReplyBody, ReplyError> {
        if self.state.volume(volume).is_none() {
            return Err(ReplyError::Refused(Refusal::NoSuchVolume));
        }
        let now = self.state.reservations(volume).cloned();
        Ok(ReplyBody::Reservations(Box::new(now.unwrap_or_default())))
    }
}

/// The version under which a request was checked, and the request itself.
fn unwrapped(request: Request) -> (Option<u64>, Request) {
    match request.body {
        RequestBody::Checked { reservations, body } => (
            Some(reservations),
            Request {
                body: *body,
                ..request
            },
        ),
        _ => (None, request),
    }
}

/// The volume whose reservations a request depends on and how it uses its blocks, or `None` for how if
/// it changes the reservations.
fn touched(body: &RequestBody) -> Option<(VolumeId, Option<Access>)> {
    match body {
        RequestBody::Read { volume, .. } | RequestBody::Extents { volume, .. } => {
            Some((*volume, Some(Access::Read)))
        }
        RequestBody::Write { volume, .. }
        | RequestBody::Zero { volume, .. }
        | RequestBody::CompareAndWrite { volume, .. } => Some((*volume, Some(Access::Write))),
        RequestBody::Reserve { volume, .. } => Some((*volume, None)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
