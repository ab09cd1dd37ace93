//! The end of the log that a replica keeps in memory: everything that is not applied, and some more
//! for servers that lag a little.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::entry::{Entry, Op};
use crate::members::Members;
use crate::types::{Admitted, EntryId, Incarnation, ServerId, Slot};

/// Consecutive entries behind `base`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Tail {
    base: EntryId,
    /// Weight of everything up to and including `base`, on an arbitrary scale.
    base_weight: u64,
    /// Entries with the weight of everything up to and including them.
    entries: VecDeque<(Entry, u64)>,
    /// Which lives of servers count up to and including `base`.
    base_admitted: Admitted,
    /// What the entries behind it say of that, in their order.
    admissions: VecDeque<(Slot, ServerId, Incarnation)>,
    /// The last list of servers up to and including `base`.
    base_members: Option<Arc<Members>>,
    /// Those behind it, in their order.
    lists: VecDeque<(Slot, Arc<Members>)>,
}

impl Tail {
    /// Nothing but `base`, and which lives of servers count there, and who they are.
    pub(super) fn new(base: EntryId, admitted: Admitted, members: Option<Arc<Members>>) -> Tail {
        Tail {
            base_members: members,
            lists: VecDeque::new(),
            base_admitted: admitted,
            admissions: VecDeque::new(),
            base,
            base_weight: 0,
            entries: VecDeque::new(),
        }
    }

    /// Id of the entry before the first one.
    pub(super) fn base(&self) -> EntryId {
        self.base
    }

    /// Id of the last entry, or `base`.
    pub(super) fn last(&self) -> EntryId {
        self.entries.back().map_or(self.base, |(entry, _)| entry.id)
    }

    /// Id of the entry in `slot`, if it is here or `base`.
    pub(super) fn id(&self, slot: Slot) -> Option<EntryId> {
        if slot == self.base.slot {
            return Some(self.base);
        }
        self.get(slot).map(|entry| entry.id)
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Entry> {
        let index = slot.0.checked_sub(self.base.slot.0 + 1)?;
        self.entries.get(index as usize).map(|(entry, _)| entry)
    }

    pub(super) fn push(&mut self, entry: Entry) {
        let last = self.last();
        assert_eq!(entry.id.slot, last.slot.next(), "the log has no gaps");
        assert_eq!(
            entry.prev, last.ballot,
            "an entry follows the one it was proposed behind"
        );
        assert!(
            entry.id.ballot >= last.ballot,
            "ballots only rise along the log"
        );
        for command in entry.commands.iter() {
            match &command.op {
                Op::AdmitServer {
                    server,
                    incarnation,
                } => {
                    let admission = (entry.id.slot, *server, *incarnation);
                    self.admissions.push_back(admission);
                }
                Op::SetMembers { members } => {
                    self.lists.push_back((entry.id.slot, Arc::clone(members)));
                }
                _ => {}
            }
        }
        let weight = self.weight_through(last.slot) + entry.weight_bytes() as u64;
        self.entries.push_back((entry, weight));
    }

    /// Removes everything behind `slot`.
    pub(super) fn truncate_after(&mut self, slot: Slot) {
        assert!(slot >= self.base.slot, "what left memory is chosen");
        self.entries.truncate((slot.0 - self.base.slot.0) as usize);
        self.admissions.retain(|(at, _, _)| *at <= slot);
        self.lists.retain(|(at, _)| *at <= slot);
    }

    /// Weight of the entries behind `after` up to `through`, bytes.
    pub(super) fn weight_between(&self, after: Slot, through: Slot) -> u64 {
        self.weight_through(through)
            .saturating_sub(self.weight_through(after))
    }

    /// Weight of all entries here, bytes.
    pub(super) fn weight(&self) -> u64 {
        self.weight_through(self.last().slot) - self.base_weight
    }

    fn weight_through(&self, slot: Slot) -> u64 {
        match slot.0.checked_sub(self.base.slot.0 + 1) {
            None => self.base_weight,
            Some(index) => match self.entries.get(index as usize) {
                Some((_, weight)) => *weight,
                None => self
                    .entries
                    .back()
                    .map_or(self.base_weight, |(_, weight)| *weight),
            },
        }
    }

    /// Entries behind `after` up to `until`, at least one if there is one, then as many as fit into
    /// `bytes_max`. `None` if `after` lies before what is here.
    pub(super) fn read(
        &self,
        after: Slot,
        until: Slot,
        bytes_max: usize,
    ) -> Option<(EntryId, Vec<Entry>)> {
        let prev = self.id(after)?;
        let first = (after.0 - self.base.slot.0) as usize;
        let mut bytes = 0;
        let mut entries = Vec::new();
        for (entry, _) in self.entries.range(first..) {
            bytes += entry.weight_bytes();
            if entry.id.slot > until || (bytes > bytes_max && !entries.is_empty()) {
                break;
            }
            entries.push(entry.clone());
        }
        Some((prev, entries))
    }

    /// Which lives of servers count, as the log up to `slot` says; it must not lie before `base`.
    pub(super) fn admitted_through(&self, slot: Slot) -> Admitted {
        let mut admitted = self.base_admitted;
        for (at, server, incarnation) in &self.admissions {
            if *at <= slot {
                admitted.admit(*server, *incarnation);
            }
        }
        admitted
    }

    /// The last list of servers; `None`: it is that of the configuration.
    pub(super) fn members(&self) -> Option<&Arc<Members>> {
        let last = self.lists.back().map(|(_, members)| members);
        last.or(self.base_members.as_ref())
    }

    /// The lists of servers that may hold: the last one up to `chosen`, if there is one, and all behind it.
    pub(super) fn lists_since(&self, chosen: Slot) -> impl Iterator<Item = &Arc<Members>> {
        let settled = self
            .lists
            .iter()
            .take_while(|(at, _)| *at <= chosen)
            .count();
        let base = self.base_members.as_ref().filter(|_| settled == 0);
        let lists = self.lists.iter().skip(settled.saturating_sub(1));
        base.into_iter().chain(lists.map(|(_, members)| members))
    }

    /// Whether there is one up to `slot`.
    pub(super) fn has_list(&self, slot: Slot) -> bool {
        let first = self.lists.front();
        self.base_members.is_some() || first.is_some_and(|(at, _)| *at <= slot)
    }

    /// Where that stands, if it lies behind `base`.
    pub(super) fn members_slot(&self) -> Slot {
        self.lists.back().map_or(Slot(0), |(slot, _)| *slot)
    }

    /// Forgets the first entry. Only for entries that are applied.
    pub(super) fn pop_front(&mut self) {
        if let Some((entry, weight)) = self.entries.pop_front() {
            self.base = entry.id;
            self.base_weight = weight;
            while let Some((slot, server, incarnation)) = self.admissions.front().copied()
                && slot <= entry.id.slot
            {
                self.base_admitted.admit(server, incarnation);
                self.admissions.pop_front();
            }
            while self
                .lists
                .front()
                .is_some_and(|(slot, _)| *slot <= entry.id.slot)
            {
                self.base_members = self.lists.pop_front().map(|(_, members)| members);
            }
        }
    }

    /// Slot of the first entry, if there is one.
    pub(super) fn first(&self) -> Option<Slot> {
        self.entries.front().map(|(entry, _)| entry.id.slot)
    }
}
