//! What goes out: the engine's actions, datagrams, frames.

use std::io;

use pss_core::engine::{Action, ClientId};
use pss_core::paxos::message::Message;
use pss_core::paxos::output::RoleChange;
use pss_core::time::Instant;
use pss_core::types::ServerId;
use pss_core::wire::client::{Reply, ReplyBody};
use pss_core::wire::peer::encode_frame;

use crate::clock;
use crate::node::connections::{Kind, Slot};
use crate::node::receive::ConnectionError;
use crate::node::turn::Node;
use crate::peers::LINK_QUEUE_BYTES_MAX;
use crate::storage::{CheckpointJob, LogJob, ReadJob, ScrubJob};

impl Node {
    /// Does what the engine wants: sends what is to be sent with [`Node::send`], later in the turn; gives
    /// everything else to the threads at once.
    pub(super) fn carry_out(&mut self, now: Instant) {
        let life = self.engine.replica().incarnation();
        if life != self.incarnation {
            self.incarnation = life;
            self.datagrams.set_incarnation(life);
            // Connections say at their beginning of which life they are.
            let ours = |slot: &Slot| matches!(slot.kind, Kind::Outbound(_) | Kind::Calling(..));
            let ours = self.connections.iter().filter(|(_, slot)| ours(slot));
            let places: Vec<usize> = ours.map(|(place, _)| place).collect();
            for place in places {
                self.close(now, place, &ConnectionError::Outdated(self.config.id));
            }
        }
        while let Some(action) = self.engine.poll_action() {
            match action {
                Action::Send { to, message } => self.send_to_peer(to, message),
                Action::Reply { client, reply } => self.reply(now, client, reply),
                Action::Persist { write, what } => {
                    self.log_jobs.push(LogJob::Persist { write, what });
                }
                Action::ReadLog {
                    to,
                    after,
                    until,
                    bytes_max,
                    tail_for,
                } => {
                    self.threads.read(ReadJob::Log {
                        to,
                        after,
                        until,
                        bytes_max,
                        tail_for,
                    });
                }
                Action::Read(read) => self.threads.read(ReadJob::Blocks(read)),
                Action::Export(export) => self.threads.read(ReadJob::Export(export)),
                Action::Digest(job) => self.threads.digest(ScrubJob::Digest(job)),
                Action::StoreBase {
                    base,
                    proven,
                    marks,
                    state,
                } => {
                    let job = CheckpointJob::StoreBase {
                        base,
                        proven,
                        marks,
                        state,
                    };
                    self.threads.checkpoint(job);
                }
                Action::Checkpoint(checkpoint) => {
                    self.threads
                        .checkpoint(CheckpointJob::Checkpoint(checkpoint));
                }
                Action::Role(change) => self.log_role(change),
                Action::Inspect { client, tag, what } => self.inspect(now, client, tag, what),
                Action::Shutdown => {
                    tracing::info!("a client has asked this server to stop");
                    self.stop(now);
                }
            }
        }
        // The disk is the slowest: it starts first.
        if !self.log_jobs.is_empty() {
            self.threads.log(self.log_jobs.drain(..));
        }
    }

    fn log_role(&self, change: RoleChange) {
        match change {
            RoleChange::Leader(ballot) => {
                tracing::info!(%ballot, "leads under ballot {ballot}");
            }
            RoleChange::Follower => {
                let ballot = self.engine.replica().promised();
                match self.engine.replica().leader() {
                    Some(leader) => tracing::info!(%ballot, "follows server {leader}"),
                    None => tracing::info!(%ballot, "follows; no leader is known"),
                }
            }
        }
    }

    pub(super) fn send_to_peer(&mut self, to: ServerId, message: Message) {
        if !message.is_datagram() {
            return self.send_frame(to, &message);
        }
        // Acknowledgements are cumulative: one that was not sent yet is overtaken by the next.
        if let Message::Accepted { ballot, .. } = &message {
            let overtaken = |sent: &&mut (ServerId, Message)| {
                let same =
                    matches!(&sent.1, Message::Accepted { ballot: other, .. } if other == ballot);
                sent.0 == to && same
            };
            if let Some(sent) = self.outbox.iter_mut().find(overtaken) {
                sent.1 = message;
                return;
            }
        }
        self.outbox.push((to, message));
    }

    fn send_frame(&mut self, to: ServerId, message: &Message) {
        let Some(place) = self.peers.link(to) else {
            return self.peers.count(to, |counts| counts.dropped += 1);
        };
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        if slot.connection.out.len_bytes() < LINK_QUEUE_BYTES_MAX {
            encode_frame(message, &mut slot.connection.out);
            self.make_dirty(place);
        } else {
            self.peers.count(to, |counts| counts.dropped += 1);
            tracing::debug!(
                peer = to.0,
                "server {to} takes nothing: a message was dropped"
            );
        }
    }

    fn reply(&mut self, now: Instant, client: ClientId, mut reply: Reply) {
        if let Ok(ReplyBody::Status(status)) = &mut reply.body {
            self.complete_status(now, status);
        }
        let Some(place) = self.connections.place_of(client) else {
            return;
        };
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        if let Kind::Client(load) = &mut slot.kind {
            load.end(reply.tag);
        }
        reply.encode(&mut slot.connection.out);
        self.make_dirty(place);
    }

    /// Notes that a connection has something to send.
    pub(super) fn make_dirty(&mut self, place: usize) {
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(place);
        }
    }

    /// Sends everything that a turn has brought.
    pub(super) fn send(&mut self) {
        self.send_datagrams();
        // Closing a connection may make others dirty; they have the next turn.
        let mut dirty = std::mem::take(&mut self.dirty);
        for place in dirty.drain(..) {
            let Some(slot) = self.connections.get_mut(place) else {
                continue;
            };
            slot.dirty = false;
            if !slot.connected {
                continue;
            }
            if let Err(error) = slot.connection.flush() {
                self.close(clock::now(), place, &error.into());
                continue;
            }
            if slot.paused
                && let Kind::Client(load) = &slot.kind
                && !load.is_full(&slot.connection.out)
            {
                slot.paused = false;
                slot.queued = true;
                self.ready.push_back(place);
            }
        }
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
    }

    fn send_datagrams(&mut self) {
        let mut outbox = std::mem::take(&mut self.outbox);
        for (to, message) in outbox.drain(..) {
            let Some(address) = self.peers.udp(to) else {
                continue;
            };
            if self
                .datagrams
                .encode(to, &message, &mut self.datagram)
                .is_err()
            {
                // Too long for a datagram.
                self.send_frame(to, &message);
                continue;
            }
            match self.sockets.udp.send_to(&self.datagram, address) {
                Ok(_) => self.peers.count(to, |counts| counts.datagrams_sent += 1),
                // Lost, like others on the way. The agreement does without.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => tracing::debug!(peer = to.0, "sending to {address}: {error}"),
            }
        }
        self.outbox = outbox;
    }
}
