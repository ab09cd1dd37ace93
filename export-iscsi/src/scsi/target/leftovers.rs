//! Requests for which nobody waits any more, because their task was aborted or answered BUSY. They may still
//! take effect, and must not overtake what comes after them: that waits.

use pss_core::volume::device::DeviceRequest;
use pss_core::volume::reservation::Access;

use super::{Actions, Failure, Owner, Status, Target};

impl Target {
    /// The request of a leftover, as long as it is one.
    pub(super) fn leftover(&self, cookie: u64) -> Option<(u16, DeviceRequest)> {
        let request = self.requests.get(&cookie);
        let request = request.filter(|_| self.leftovers.contains(&cookie))?;
        Some((request.lun, request.request.clone()?))
    }

    /// A leftover has ended: what waited only for it goes on if it is still allowed.
    pub(super) fn leftover_ended(
        &mut self,
        cookie: u64,
        ended: Option<(u16, DeviceRequest)>,
        actions: &mut Actions,
    ) {
        self.leftovers.remove(&cookie);
        let Some((lun, ended)) = ended else {
            return;
        };
        // Others do not become free by this one.
        let waited = |requests: &[(u16, DeviceRequest)]| {
            let mut requests = requests.iter();
            requests.any(|(other, it)| *other == lun && overlap(&ended, it))
        };
        let free = self.held.iter();
        let free = free.filter(|(_, it)| waited(it) && !self.meet_leftovers(it));
        let free: Vec<u64> = free.map(|(id, _)| *id).collect();
        for id in free {
            // The task may have ended with one before it.
            let Some(requests) = self.held.remove(&id) else {
                continue;
            };
            if self.may_go_on(id, &requests) {
                self.submit_parts(id, requests, actions);
                continue;
            }
            let conflict = Failure::Status(Status::ReservationConflict);
            for ready in self.finish(id, Err(conflict), actions) {
                self.start(ready, actions);
            }
        }
    }

    fn may_go_on(&self, id: u64, requests: &[(u16, DeviceRequest)]) -> bool {
        let task = self.tasks.get(&id);
        let state = task.and_then(|task| self.nexuses.get(&task.nexus));
        let name = state.map(|state| &state.name);
        requests
            .iter()
            .all(|(lun, it)| self.reservations(*lun).allows(name, access(it)))
    }

    /// Whether requests overlap some that nobody waits for any more, which may still take effect: these must
    /// not overtake what is written now.
    pub(super) fn meet_leftovers(&self, requests: &[(u16, DeviceRequest)]) -> bool {
        self.leftovers.iter().any(|cookie| {
            let Some(other) = self.requests.get(cookie) else {
                return false;
            };
            other.request.as_ref().is_some_and(|left| {
                let mut requests = requests.iter();
                requests.any(|(lun, it)| *lun == other.lun && overlap(left, it))
            })
        })
    }

    /// Whether something that nobody waits for any more may still change a disk.
    pub(super) fn has_changes_left_over(&self, lun: u16) -> bool {
        self.leftovers.iter().any(|cookie| {
            let other = self.requests.get(cookie).filter(|it| it.lun == lun);
            other.is_some_and(|it| it.request.as_ref().is_some_and(changes))
        })
    }

    /// The disk of a LUN goes: what its sanitize operation has under way becomes nobody's.
    pub(super) fn leave_sanitize(&mut self, lun: u16) {
        for (cookie, request) in &mut self.requests {
            let own = matches!(request.owner, Owner::Sanitize | Owner::SanitizeAgain(..));
            if own && request.lun == lun {
                request.owner = Owner::Nobody;
                self.leftovers.insert(*cookie);
            }
        }
    }

    /// Requests of a task become nobody's. Returns those that may change something.
    pub(super) fn leave_requests(&mut self, id: u64) -> Vec<u64> {
        let mut left = Vec::new();
        for (cookie, request) in &mut self.requests {
            let own = match &request.owner {
                Owner::Task(owner)
                | Owner::Look(owner)
                | Owner::Looked(owner)
                | Owner::Recheck(owner, ..) => *owner == id,
                _ => false,
            };
            if own {
                request.owner = Owner::Nobody;
                self.leftovers.insert(*cookie);
                if request.request.as_ref().is_none_or(changes) {
                    left.push(*cookie);
                }
            }
        }
        left
    }
}

/// Whether a request may change the disk.
fn changes(request: &DeviceRequest) -> bool {
    match request {
        DeviceRequest::Write { .. }
        | DeviceRequest::WriteZeroes { .. }
        | DeviceRequest::Trim { .. }
        | DeviceRequest::CompareAndWrite { .. } => true,
        DeviceRequest::Read { .. }
        | DeviceRequest::Flush
        | DeviceRequest::Look
        | DeviceRequest::Extents { .. }
        | DeviceRequest::Prefetch { .. } => false,
    }
}

/// What it is to reservations.
pub(super) fn access(request: &DeviceRequest) -> Access {
    match changes(request) {
        true => Access::Write,
        false => Access::Read,
    }
}

/// Range of a request, in the cell's blocks' bytes.
pub(super) fn range(request: &DeviceRequest) -> (u64, u64) {
    let (offset, length) = match request {
        DeviceRequest::Read {
            offset_bytes,
            length_bytes,
        } => (*offset_bytes, u64::from(*length_bytes)),
        DeviceRequest::Write {
            offset_bytes, data, ..
        } => (*offset_bytes, data.len() as u64),
        DeviceRequest::CompareAndWrite {
            offset_bytes,
            write,
            ..
        } => (*offset_bytes, write.len() as u64),
        DeviceRequest::WriteZeroes {
            offset_bytes,
            length_bytes,
            ..
        }
        | DeviceRequest::Trim {
            offset_bytes,
            length_bytes,
            ..
        }
        | DeviceRequest::Extents {
            offset_bytes,
            length_bytes,
        }
        | DeviceRequest::Prefetch {
            offset_bytes,
            length_bytes,
        } => (*offset_bytes, *length_bytes),
        DeviceRequest::Flush | DeviceRequest::Look => (0, 0),
    };
    (offset, offset.saturating_add(length))
}

/// Whether two requests touch the same bytes and at least the first may change them.
fn overlap(left: &DeviceRequest, new: &DeviceRequest) -> bool {
    let ((from, to), (new_from, new_to)) = (range(left), range(new));
    changes(left) && from < new_to && new_from < to
}
