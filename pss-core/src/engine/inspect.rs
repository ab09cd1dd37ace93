//! What a server tells of its inside.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::{ClientId, Engine};
use crate::entry::{Command, Entry, Op};
use crate::size::Size;
use crate::time::Instant;
use crate::types::{BLOCK_BYTES, EntryId, ServerId, Slot, VolumeId};
use crate::wire::client::ReplyBody;
use crate::wire::codec::shortened;
use crate::wire::inspect::{
    CommandInfo, EntryInfo, INSPECT_COMMANDS_MAX, INSPECT_ENTRIES_MAX, INSPECT_NAME_MAX,
    INSPECT_USERS_MAX, INSPECT_VOLUMES_MAX, Inspection, LeaseInfo, LogInfo, OpenVolume,
};

/// Entries of the log that someone wants to see.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LogPage {
    /// The newest.
    pub newest: Slot,
    /// The oldest.
    pub oldest: Slot,
}

impl Engine {
    /// Answers [`super::Action::Inspect`].
    pub fn answer_inspection(&mut self, client: ClientId, tag: u64, inspection: Inspection) {
        let body = ReplyBody::Inspection(Box::new(inspection));
        self.reply(client, tag, Ok(body));
    }

    /// Volumes that sessions have attached, by number; of each at most [`INSPECT_USERS_MAX`] of those who have.
    pub fn open_volumes(&self) -> Vec<OpenVolume> {
        let mut open: BTreeMap<VolumeId, Vec<String>> = BTreeMap::new();
        for session in self.state.sessions() {
            for volume in &session.volumes {
                let users = open.entry(*volume).or_default();
                if users.len() < INSPECT_USERS_MAX {
                    users.push(shortened(&session.name, INSPECT_NAME_MAX).to_owned());
                }
            }
        }
        let named = open.into_iter().filter_map(|(volume, attached_by)| {
            Some(OpenVolume {
                name: self.state.volume(volume)?.name.clone(),
                attached_by,
            })
        });
        named.take(INSPECT_VOLUMES_MAX).collect()
    }

    /// The lease between this server and another one: who holds it, and for how long.
    pub fn lease_with(&self, now: Instant, server: ServerId) -> Option<LeaseInfo> {
        let (holder, left) = self.replica.lease_with(now, server)?;
        Some(LeaseInfo {
            holder,
            left_ms: Duration::as_millis(&left) as u64,
        })
    }

    /// Which entries are on the page below `before` (0: the newest page) of about `count`; none if the log holds none.
    pub fn log_page(&self, before: Slot, count: u16) -> Option<LogPage> {
        let last = self.replica.last().slot;
        let newest = match before {
            Slot(0) => last,
            before => last.min(Slot(before.0 - 1)),
        };
        let count = u64::from(count.clamp(1, INSPECT_ENTRIES_MAX));
        let first = self.replica.log_first().max(Slot(1));
        let oldest = Slot(newest.0.saturating_sub(count - 1)).max(first);
        (oldest <= newest).then_some(LogPage { newest, oldest })
    }

    /// The entries of a page that are in memory, newest first, and what of the page is older than they.
    pub fn page_in_memory(&self, page: LogPage) -> (Vec<EntryInfo>, Option<LogPage>) {
        let slots = (page.oldest.0..=page.newest.0).rev().map(Slot);
        let entries = slots.map_while(|slot| self.replica.entry(slot));
        let entries: Vec<EntryInfo> = entries.map(EntryInfo::of).collect();
        let newest = Slot(page.newest.0 - entries.len() as u64);
        let rest = (newest >= page.oldest).then_some(LogPage { newest, ..page });
        (entries, rest)
    }

    /// The answer with the entries of a page, newest first, to which what this server knows of each is added. What the
    /// page lacks at its old end begins the next.
    pub fn log_info(&self, now: Instant, mut entries: Vec<EntryInfo>) -> LogInfo {
        for entry in &mut entries {
            entry.accepted_by = self.accepted_by(entry.slot);
            entry.chosen = entry.slot <= self.replica.chosen();
            entry.applied = entry.slot <= self.state.applied();
            for command in &mut entry.commands {
                let volume = command.volume.and_then(|id| self.state.volume(id));
                command.volume_name = volume.map(|volume| volume.name.clone());
            }
        }
        let first = self.replica.log_first();
        let oldest = entries.last().map(|entry| entry.slot);
        LogInfo {
            server: self.replica.id(),
            role: self.status(now).role,
            ballot: self.replica.promised(),
            first,
            last: self.replica.last().slot,
            chosen: self.replica.chosen(),
            applied: self.state.applied(),
            entries,
            next: oldest.filter(|oldest| *oldest > first),
        }
    }

    /// Core servers that are known to hold the entry durably.
    fn accepted_by(&self, slot: Slot) -> Vec<ServerId> {
        let replica = &self.replica;
        let own = (replica.durable() >= slot).then(|| replica.id());
        let peers = replica.peers().filter(|(server, view)| {
            let durable = replica.durable_at(*server).unwrap_or_default();
            durable.max(view.progress.applied) >= slot
        });
        let mut servers: Vec<ServerId> = own
            .into_iter()
            .chain(peers.map(|(server, _)| server))
            .filter(|server| server.is_core())
            .collect();
        servers.sort();
        servers
    }
}

impl EntryInfo {
    /// What an entry says of itself.
    pub fn of(entry: &Entry) -> EntryInfo {
        let shown = entry.commands.iter().take(INSPECT_COMMANDS_MAX);
        EntryInfo {
            slot: entry.id.slot,
            ballot: entry.id.ballot,
            commands: shown.map(CommandInfo::of).collect(),
            more: entry.commands.len().saturating_sub(INSPECT_COMMANDS_MAX) as u64,
            payload_bytes: entry.payload_bytes() as u64,
            accepted_by: Vec::new(),
            chosen: false,
            applied: false,
            damaged: false,
        }
    }

    /// An entry whose record cannot be read.
    pub fn damaged(id: EntryId) -> EntryInfo {
        EntryInfo {
            slot: id.slot,
            ballot: id.ballot,
            commands: Vec::new(),
            more: 0,
            payload_bytes: 0,
            accepted_by: Vec::new(),
            chosen: false,
            applied: false,
            damaged: true,
        }
    }
}

impl CommandInfo {
    fn of(command: &Command) -> CommandInfo {
        let mut info = CommandInfo {
            what: String::new(),
            session: command.session.0,
            number: command.number.0,
            volume: None,
            volume_name: None,
            offset_bytes: None,
            length_bytes: None,
            detail: None,
        };
        info.describe(&command.op);
        info
    }

    fn describe(&mut self, op: &Op) {
        let mut range = |volume: VolumeId, first_block: u64, blocks: u64| {
            self.volume = Some(volume);
            // Ranges were checked when they were applied, not when they were ordered.
            self.offset_bytes = Some(first_block.saturating_mul(BLOCK_BYTES as u64));
            self.length_bytes = Some(blocks.saturating_mul(BLOCK_BYTES as u64));
        };
        let (what, volume, detail) = match op {
            Op::Noop => ("barrier", None, None),
            Op::Write {
                volume,
                first_block,
                checksums,
                ..
            } => {
                range(*volume, *first_block, checksums.len() as u64);
                ("write", Some(*volume), None)
            }
            Op::Zero {
                volume,
                first_block,
                blocks,
                allocate,
            } => {
                range(*volume, *first_block, *blocks);
                let what = if *allocate { "zero" } else { "trim" };
                (what, Some(*volume), None)
            }
            Op::OpenSession { name, .. } => ("open session", None, Some(name.clone())),
            Op::OpenSessionFrom { origin, .. } => {
                let address = origin.address.map(|it| format!(" at {it}"));
                let detail = format!("{} {}", origin.user, origin.name);
                let detail = detail.trim_start().to_owned() + &address.unwrap_or_default();
                ("open session", None, Some(detail))
            }
            Op::Note { text } => ("note", None, Some(text.clone())),
            Op::AdmitServer {
                server,
                incarnation,
            } => {
                let what = format!("server {server}, incarnation {incarnation}");
                ("admit", None, Some(what))
            }
            Op::SetMembers { members } => ("servers", None, Some(members.to_string())),
            Op::EndSessions { sessions } => {
                let ids: Vec<String> = sessions.iter().take(8).map(|id| id.0.to_string()).collect();
                let more = if sessions.len() > ids.len() {
                    ", ..."
                } else {
                    ""
                };
                ("end sessions", None, Some(ids.join(", ") + more))
            }
            Op::CreateVolume {
                name, size_bytes, ..
            } => {
                let detail = format!("{name}, {}", Size(*size_bytes));
                ("create volume", None, Some(detail))
            }
            Op::ResizeVolume {
                volume, size_bytes, ..
            }
            | Op::ShrinkVolume { volume, size_bytes } => {
                let detail = Size(*size_bytes).to_string();
                ("resize volume", Some(*volume), Some(detail))
            }
            Op::DeleteVolume { volume } | Op::DeleteAttachedVolume { volume } => {
                ("delete volume", Some(*volume), None)
            }
            Op::Attach { volume } => ("attach", Some(*volume), None),
            Op::Detach { volume } => ("detach", Some(*volume), None),
            Op::Reserve { volume, .. } => ("reservations", Some(*volume), None),
            Op::Clock { unix_ms } => ("clock", None, Some(format!("{unix_ms} ms"))),
        };
        self.what = what.to_owned();
        self.volume = volume;
        self.detail = detail.map(|it| shortened(&it, INSPECT_NAME_MAX).to_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::types::{Ballot, RequestNumber, SessionId};

    fn entry(ops: Vec<Op>) -> Entry {
        let command = |op| Command {
            session: SessionId(3),
            number: RequestNumber(4),
            settled_below: RequestNumber(0),
            op,
        };
        let commands: Vec<Command> = ops.into_iter().map(command).collect();
        Entry {
            id: EntryId {
                ballot: Ballot::default(),
                slot: Slot(7),
            },
            prev: Ballot::default(),
            commands: Arc::from(commands),
        }
    }

    #[test]
    fn a_write_tells_its_range() {
        let write = Op::Write {
            volume: VolumeId(2),
            first_block: 3,
            checksums: vec![1, 2],
            payload: Bytes::from(vec![0; 2 * BLOCK_BYTES]),
        };
        let info = EntryInfo::of(&entry(vec![write]));
        assert_eq!((info.slot, info.payload_bytes), (Slot(7), 8192));
        let command = &info.commands[0];
        assert_eq!(
            (command.what.as_str(), command.volume),
            ("write", Some(VolumeId(2)))
        );
        assert_eq!(
            (command.offset_bytes, command.length_bytes),
            (Some(12288), Some(8192))
        );
        assert_eq!((command.session, command.number), (3, 4));
    }

    #[test]
    fn long_entries_are_cut() {
        let ops = vec![Op::Noop; INSPECT_COMMANDS_MAX + 5];
        let info = EntryInfo::of(&entry(ops));
        assert_eq!((info.commands.len(), info.more), (INSPECT_COMMANDS_MAX, 5));
    }

    #[test]
    fn ranges_past_every_end_are_told_without_a_panic() {
        let zero = Op::Zero {
            volume: VolumeId(2),
            first_block: u64::MAX,
            blocks: u64::MAX,
            allocate: false,
        };
        let info = EntryInfo::of(&entry(vec![zero]));
        assert_eq!(info.commands[0].offset_bytes, Some(u64::MAX));
    }
}
