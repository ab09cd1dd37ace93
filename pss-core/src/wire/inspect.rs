//! What a server tells of its inside to whoever looks after it: connections, queues, open files, the log.
//!
//! Every server answers for itself, whether it leads or not. The answers are JSON; fields may be added, and readers
//! skip those that they do not know.

use serde::{Deserialize, Serialize};

use crate::types::{Ballot, ChunkIndex, ServerId, Slot, VolumeId};

/// Most log entries in one answer.
pub const INSPECT_ENTRIES_MAX: u16 = 256;
/// Most commands of one entry in an answer; [`EntryInfo::more`] counts the others.
pub const INSPECT_COMMANDS_MAX: usize = 16;
/// Most chunk files in one answer; [`FilesInfo::chunks_open`] counts all.
pub const INSPECT_CHUNKS_MAX: usize = 4096;

/// Most attached volumes in one answer.
pub const INSPECT_VOLUMES_MAX: usize = 1024;
/// Most bytes of a name of a session, or of the detail of a command.
pub const INSPECT_NAME_MAX: usize = 96;
/// Most sessions that an answer names of one volume. In JSON a byte of a name takes up to six, and with all volumes named
/// the answer must fit a frame.
pub const INSPECT_USERS_MAX: usize = 8;
/// Most segments of the log in one answer.
pub const INSPECT_SEGMENTS_MAX: usize = 4096;

/// What to look at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Inspect {
    /// The process; answered by [`Inspection::Process`].
    Process,
    /// Connected clients; answered by [`Inspection::Clients`].
    Clients,
    /// What waits to be sent to the other servers; answered by [`Inspection::Outbound`].
    Outbound,
    /// Open files; answered by [`Inspection::Files`].
    Files,
    /// Links to the other servers; answered by [`Inspection::Links`].
    Links,
    /// The agreement by slot, newest first; answered by [`Inspection::Log`].
    Log {
        /// Only slots below this one; `Slot(0)`: from the newest.
        before: Slot,
        /// At most so many, up to [`INSPECT_ENTRIES_MAX`].
        count: u16,
    },
    /// Sockets; answered by [`Inspection::Sockets`].
    Sockets,
    /// What servers hold; answered by [`Inspection::Survey`]. To be asked again, with the same id, until it is done: who does not ask
    /// any more has lost interest.
    Survey(SurveyQuestion),
}

/// What servers are to be asked for what they hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SurveyQuestion {
    /// Names it; random.
    pub id: u64,
    /// Which volume.
    pub volume: VolumeId,
    /// From this chunk on.
    pub from: ChunkIndex,
    /// Of whom, and what then.
    pub scope: SurveyScope,
}

/// See [`SurveyQuestion`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SurveyScope {
    /// The digest of the volume on the server that is asked.
    Own,
    /// The digests of the volume on all servers at one slot. Of the leader.
    All,
    /// The next chunks on all servers: compared, and repaired where they differ. Of the leader.
    Verify,
}

/// What was found.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Inspection {
    /// The process.
    Process(ProcessInfo),
    /// Connected clients, the longest connected first.
    Clients(Vec<ClientInfo>),
    /// By server.
    Outbound(Vec<OutboundInfo>),
    /// Open files.
    Files(FilesInfo),
    /// By server.
    Links(Vec<LinkInfo>),
    /// Log entries.
    Log(LogInfo),
    /// Sockets: those that listen first.
    Sockets(Vec<SocketInfo>),
    /// What servers hold.
    Survey(SurveyInfo),
}

/// A server's process.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// The server.
    pub server: ServerId,
    /// Process id.
    pub pid: u32,
    /// State as `ps` shows it, such as `Sl`.
    pub state: String,
    /// CPU time used so far, user and system, milliseconds. Of the whole process, which may hold several servers.
    pub cpu_ms: u64,
    /// Resident memory, bytes.
    pub memory_bytes: u64,
    /// Path of the program.
    pub program: String,
    /// Data directory.
    pub path: String,
    /// Seconds since the server was started.
    pub uptime_s: u64,
}

/// A connected client.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ClientInfo {
    /// What it calls itself, such as `pss-iscsi@gw1`.
    pub name: String,
    /// Address and port.
    pub address: String,
    /// Milliseconds since it connected.
    pub connected_ms: u64,
    /// Milliseconds since its last request; none if it has sent none.
    pub idle_ms: Option<u64>,
    /// Requests so far.
    pub requests: u64,
    /// Requests that are not answered.
    pub in_flight: u64,
    /// Bytes received from it.
    pub received_bytes: u64,
    /// Bytes sent to it.
    pub sent_bytes: u64,
    /// Bytes of answers that it has not taken.
    pub unsent_bytes: u64,
}

/// State of a connection to another server.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// It can be used.
    Up,
    /// It is being set up.
    Calling,
    /// There is none; it will be tried again.
    Down,
    /// A state of a later version.
    #[serde(untagged)]
    Newer(String),
}

/// What is held for another server.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct OutboundInfo {
    /// To which.
    pub server: ServerId,
    /// Its address and port.
    pub address: String,
    /// State of the connection on which it is sent.
    pub link: LinkState,
    /// Bytes that wait.
    pub waiting_bytes: u64,
    /// Most that may wait; what is more is dropped and asked for again.
    pub limit_bytes: u64,
    /// Messages that were dropped because too much waited or there was no connection, since the start.
    pub dropped: u64,
    /// Bytes sent on this and earlier connections since the start.
    pub sent_bytes: u64,
    /// Log entries that it has not acknowledged, if this server leads.
    pub unacknowledged: Option<u64>,
}

/// Open files.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct FilesInfo {
    /// Volumes that sessions have attached, at most [`INSPECT_VOLUMES_MAX`].
    pub volumes: Vec<OpenVolume>,
    /// Open chunk files, at most [`INSPECT_CHUNKS_MAX`].
    pub chunks: Vec<OpenChunk>,
    /// How many chunk files are open.
    pub chunks_open: u64,
    /// How many may be open.
    pub chunks_max: u64,
    /// Segments of the log, oldest first; the newest [`INSPECT_SEGMENTS_MAX`].
    pub segments: Vec<SegmentInfo>,
    /// Open descriptors of the process.
    pub descriptors: u64,
    /// How many it may have.
    pub descriptors_max: u64,
}

/// A volume in use.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct OpenVolume {
    /// Its name.
    pub name: String,
    /// Names of the sessions that have it attached, at most [`INSPECT_USERS_MAX`].
    pub attached_by: Vec<String>,
}

/// An open chunk file.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct OpenChunk {
    /// Path below the data directory, such as `data/vol001/00/00/01`.
    pub path: String,
    /// It has changes that are not on the disk for sure; they are in the log.
    pub dirty: bool,
}

/// A segment of the log.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Path below the data directory.
    pub path: String,
    /// Its first slot.
    pub first: Slot,
    /// Its size.
    pub bytes: u64,
}

/// How another server is connected, as one server sees it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// The other server.
    pub server: ServerId,
    /// Whether it was heard of lately.
    pub alive: bool,
    /// Milliseconds since it was last heard of; none if never.
    pub silent_ms: Option<u64>,
    /// The connection that this server has opened to it.
    pub link: LinkState,
    /// Milliseconds since it is up.
    pub up_ms: Option<u64>,
    /// Why it is not, if it was tried.
    pub trouble: Option<String>,
    /// Whether the other server has opened one to this one.
    pub inbound: bool,
    /// Smoothed round trip on the connection, microseconds (RFC 6298, by the kernel).
    pub round_trip_us: Option<u32>,
    /// TCP segments sent on the connection.
    pub segments_sent: u64,
    /// Of them, those that were sent again because they were lost.
    pub segments_lost: u64,
    /// Bytes sent to it over TCP since the start.
    pub sent_bytes: u64,
    /// Bytes received from it over TCP since the start.
    pub received_bytes: u64,
    /// Datagrams sent to it since the start.
    pub datagrams_sent: u64,
    /// Datagrams received from it since the start.
    pub datagrams_received: u64,
    /// Newest life of its data directory that was heard of.
    pub incarnation: Option<u64>,
    /// The lease between the two, if one leads and the other follows.
    pub lease: Option<LeaseInfo>,
}

/// A lease between two servers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct LeaseInfo {
    /// Who was granted it; the other one has granted it.
    pub holder: ServerId,
    /// For how long it still holds, milliseconds.
    pub left_ms: u64,
}

/// A page of the log.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct LogInfo {
    /// The server that was asked.
    pub server: ServerId,
    /// Its role, as in [`crate::wire::client::ServerStatus::role`].
    pub role: String,
    /// Its highest promised ballot.
    pub ballot: Ballot,
    /// First slot of its log.
    pub first: Slot,
    /// Last slot of its log.
    pub last: Slot,
    /// Slot up to which it knows entries to be chosen.
    pub chosen: Slot,
    /// Slot up to which it has applied them.
    pub applied: Slot,
    /// The entries, newest first.
    pub entries: Vec<EntryInfo>,
    /// [`Inspect::Log`]`::before` of the next page; none if there are no older entries in the log.
    pub next: Option<Slot>,
}

/// An entry of the log.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct EntryInfo {
    /// Slot.
    pub slot: Slot,
    /// Ballot under which it was first proposed.
    pub ballot: Ballot,
    /// What it orders, at most [`INSPECT_COMMANDS_MAX`].
    pub commands: Vec<CommandInfo>,
    /// How many commands more it holds.
    pub more: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Core servers that are known to hold it durably. A leader knows it of all, others of themselves and of those
    /// who have applied it.
    pub accepted_by: Vec<ServerId>,
    /// It is known to be chosen.
    pub chosen: bool,
    /// It is applied here.
    pub applied: bool,
    /// Its record in the log of this server is damaged, so that nothing more is known of it here.
    #[serde(default)]
    pub damaged: bool,
}

/// A command of an entry.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// What it does, such as `write`.
    pub what: String,
    /// Session that asked; 0: the servers themselves.
    pub session: u64,
    /// Number of the request in its session.
    pub number: u64,
    /// Number of the volume.
    pub volume: Option<VolumeId>,
    /// Its name, if it is there now.
    pub volume_name: Option<String>,
    /// Range, bytes from the start of the volume.
    pub offset_bytes: Option<u64>,
    /// Length of the range, bytes.
    pub length_bytes: Option<u64>,
    /// More about it, such as a new size.
    pub detail: Option<String>,
}

/// A socket.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SocketInfo {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Own address and port.
    pub local: String,
    /// The other end; none while it listens.
    pub remote: Option<String>,
    /// `LISTEN`, `ESTABLISHED`, `SYN_SENT`; empty for UDP.
    pub state: String,
    /// Bytes that have arrived and were not yet read; of UDP those of the datagram that is next.
    #[serde(default)]
    pub receive_queue_bytes: u64,
    /// Bytes that wait to be sent, in the server and in the kernel, or have not been acknowledged yet.
    pub send_queue_bytes: u64,
    /// Who is at the other end: a client's name, `server 2`, or nothing yet.
    pub who: Option<String>,
}

/// How far a survey is, and what it has found.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SurveyInfo {
    /// The server that was asked.
    pub server: ServerId,
    /// `running`, `done`, `failed`; `elsewhere`: another server leads.
    pub state: String,
    /// Who leads, if it is elsewhere.
    #[serde(default)]
    pub leader: Option<ServerId>,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    /// The servers hold this after the entry of this slot.
    #[serde(default)]
    pub slot: Option<Slot>,
    /// Size of the volume, bytes.
    #[serde(default)]
    pub size_bytes: u64,
    /// The chunks below this one were looked at; none: to the end.
    #[serde(default)]
    pub next: Option<u32>,
    /// By server.
    #[serde(default)]
    pub servers: Vec<SurveyServer>,
    /// Chunks of which servers held something else.
    #[serde(default)]
    pub differences: Vec<SurveyDifference>,
}

/// What a survey knows of one server.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct SurveyServer {
    /// Which.
    pub server: ServerId,
    /// `waiting`, `running`, `done`, `failed`, `silent`, `behind`.
    pub state: String,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    /// Chunks that it has read,
    #[serde(default)]
    pub done: u64,
    /// of so many; 0: not known yet.
    #[serde(default)]
    pub total: u64,
    /// The volume's digest, in hexadecimal.
    #[serde(default)]
    pub digest: Option<String>,
    /// Blocks that were compared with their checksums.
    #[serde(default)]
    pub blocks: u64,
    /// Of these, those that were damaged,
    #[serde(default)]
    pub bad: u64,
    /// and still are.
    #[serde(default)]
    pub bad_left: u64,
}

/// A chunk that is not the same on all servers.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SurveyDifference {
    /// Which.
    pub chunk: u32,
    /// Who had something else than the majority; empty: there was no majority.
    pub servers: Vec<ServerId>,
    /// Blocks that were replaced there.
    pub replaced: u64,
    /// Whether all servers hold the same now.
    pub repaired: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_later_versions_are_read() {
        let read = |text: &str| serde_json::from_str::<LinkState>(text).unwrap();
        assert_eq!(read(r#""calling""#), LinkState::Calling);
        let newer = LinkState::Newer("paused".into());
        assert_eq!(read(r#""paused""#), newer);
        for state in [LinkState::Up, LinkState::Down, newer] {
            assert_eq!(read(&serde_json::to_string(&state).unwrap()), state);
        }
    }
}
