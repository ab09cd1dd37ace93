//! Who is at the other end of a TCP connection.
//!
//! The caller sends `Hello`, the other end answers `Welcome` or `Denied`. With a cell key each end
//! proves that it has it by an HMAC-SHA-256 over everything that both have said, which includes a
//! random nonce of each: the answering end in `Welcome`, the caller in `Proof`. Without a key both
//! are believed (servers bind to loopback only then).
//!
//! ```text
//! Hello    version u16, role u8 (1 client, 2 server), caller's id u8 (255: none), wanted id u8
//!          (255: any), has key u8, cell [16] (zeros: any), incarnation u64, boot u64, nonce [32],
//!          name (u16 length, UTF-8)
//! Welcome  version u16, server id u8, has key u8, cell [16], incarnation u64, boot u64, nonce [32],
//!          proof [32] (zeros without a key)
//! Proof    proof [32]
//! Denied   reason u8, server id u8, version u16, cell [16]
//! ```
//!
//! The proof covers identity at the start; bytes that follow are protected against accidents by CRCs,
//! not against someone who can rewrite an established connection.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::key::{CellId, CellKey};
use crate::types::{GroupId, Incarnation, ServerId};
use crate::wire::DecodeError;
use crate::wire::codec::{Input, Output, shortened};
use crate::wire::frame::{Frame, FrameKind, SendQueue};

/// Version of what follows the handshake.
pub const PROTOCOL_VERSION: u16 = 1;
/// Random bytes that each end contributes.
pub const NONCE_BYTES: usize = 32;
/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;

/// Most bytes of a caller's name that are kept.
const NAME_BYTES_MAX: usize = 256;
const NO_SERVER: u8 = 255;
const LABEL_WELCOME: &[u8] = b"PSS handshake 1: answering end";
const LABEL_PROOF: &[u8] = b"PSS handshake 1: calling end";

/// HMAC-SHA-256 under the cell key, with the key's schedule computed once.
#[derive(Clone)]
pub struct MacKey(Hmac<Sha256>);

impl std::fmt::Debug for MacKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MacKey(..)")
    }
}

impl MacKey {
    /// From the cell key.
    pub fn new(key: &CellKey) -> MacKey {
        MacKey(Hmac::new_from_slice(key.bytes()).expect("HMAC takes keys of any length"))
    }

    pub(super) fn over(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        for part in parts {
            mac.update(part);
        }
        mac
    }
}

/// One of the two ends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// A gateway or a tool, by what it calls itself.
    Client(String),
    /// A server of the cell.
    Server {
        /// Which.
        id: ServerId,
        /// Life of its data directory.
        incarnation: Incarnation,
        /// Random, chosen at each start of the process.
        boot: u64,
    },
}

/// What this end says of itself and expects of the other.
#[derive(Clone, Debug)]
pub struct HandshakeConfig {
    /// Our cell; `None` for a client that does not know it yet.
    pub cell: Option<CellId>,
    /// The cell key. Either both ends have one or neither.
    pub key: Option<MacKey>,
    /// Who we are.
    pub role: Role,
    /// For the calling end: the server that should be there.
    pub wanted: Option<ServerId>,
}

/// The other end, when the handshake has succeeded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Who it is.
    pub role: Role,
    /// The cell.
    pub cell: CellId,
}

/// Why the other end denies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Denial {
    /// It speaks another version.
    Version,
    /// It belongs to another cell.
    Cell,
    /// It is not the server that was wanted.
    Server,
    /// It has a cell key and we have not.
    KeyMissing,
    /// It has no cell key and we have one.
    KeyUnexpected,
    /// Our proof is wrong: the keys differ.
    Proof,
    /// Our message made no sense to it, or came at the wrong time.
    Malformed,
    /// Something newer than this program.
    Unknown(u8),
}

impl Denial {
    fn from_code(code: u8) -> Denial {
        match code {
            1 => Denial::Version,
            2 => Denial::Cell,
            3 => Denial::Server,
            4 => Denial::KeyMissing,
            5 => Denial::KeyUnexpected,
            6 => Denial::Proof,
            7 => Denial::Malformed,
            unknown => Denial::Unknown(unknown),
        }
    }

    fn code(self) -> u8 {
        match self {
            Denial::Version => 1,
            Denial::Cell => 2,
            Denial::Server => 3,
            Denial::KeyMissing => 4,
            Denial::KeyUnexpected => 5,
            Denial::Proof => 6,
            Denial::Malformed => 7,
            Denial::Unknown(code) => code,
        }
    }
}

/// Why a handshake failed. The connection must be closed, after what is in the send queue was sent.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HandshakeError {
    /// The ends speak different versions.
    #[error("the other end speaks protocol version {theirs}, this program {PROTOCOL_VERSION}")]
    Version {
        /// Theirs.
        theirs: u16,
    },
    /// The other end belongs to another cell.
    #[error("{} belongs to another cell, {theirs}; ours is {ours}", end(*.server))]
    OtherCell {
        /// Which server it says it is.
        server: Option<ServerId>,
        /// Its cell.
        theirs: CellId,
        /// Our cell.
        ours: CellId,
    },
    /// Another server is at that address.
    #[error("expected server {wanted} there, found {}", end(*.found))]
    OtherServer {
        /// Which was wanted.
        wanted: ServerId,
        /// Which answered.
        found: Option<ServerId>,
    },
    /// The other end asks for the cell key and we have none.
    #[error("{} asks for the cell key, and none is configured here", end(*.server))]
    KeyMissing {
        /// Which server it says it is.
        server: Option<ServerId>,
    },
    /// The other end has no cell key and we have one.
    #[error("{} has no cell key, and one is configured here", end(*.server))]
    KeyUnexpected {
        /// Which server it says it is.
        server: Option<ServerId>,
    },
    /// The other end has another key.
    #[error("{} has another cell key", end(*.server))]
    Proof {
        /// Which server it says it is.
        server: Option<ServerId>,
    },
    /// The other end denied for a reason of its own.
    #[error("{} refuses the connection ({reason:?})", end(*.server))]
    Denied {
        /// Which server it says it is.
        server: Option<ServerId>,
        /// Its reason.
        reason: Denial,
    },
    /// A frame that does not belong here.
    #[error("unexpected {0:?} frame in the handshake")]
    Unexpected(FrameKind),
    /// A message is malformed.
    #[error("malformed handshake: {0}")]
    Malformed(#[from] DecodeError),
}

fn end(server: Option<ServerId>) -> String {
    match server {
        Some(server) => format!("server {server}"),
        None => "the other end".to_owned(),
    }
}

/// One end's view of a handshake. Feed it frames until it gives the peer.
#[derive(Debug)]
pub struct Handshake {
    config: HandshakeConfig,
    nonce: [u8; NONCE_BYTES],
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// Answering end: nothing received.
    AwaitHello,
    /// Calling end: this hello was sent.
    AwaitWelcome { hello: Vec<u8> },
    /// Answering end: waits for the proof over this transcript.
    AwaitProof { transcript: Vec<u8>, peer: Peer },
    /// Finished or failed.
    Over,
}

impl Handshake {
    /// The calling end; puts its `Hello` into `out`. `nonce` is random and used once.
    pub fn client(
        config: HandshakeConfig,
        nonce: [u8; NONCE_BYTES],
        out: &mut SendQueue,
    ) -> Handshake {
        let hello = Hello::of(&config, nonce).encode();
        put(out, FrameKind::Hello, &hello);
        Handshake {
            config,
            nonce,
            step: Step::AwaitWelcome { hello },
        }
    }

    /// The answering end, always a server. `nonce` is random and used once.
    pub fn server(config: HandshakeConfig, nonce: [u8; NONCE_BYTES]) -> Handshake {
        Handshake {
            config,
            nonce,
            step: Step::AwaitHello,
        }
    }

    /// Takes the next frame; gives the other end when it is known for sure.
    ///
    /// # Errors
    /// [`HandshakeError`]. `out` may hold a last frame that tells the other end why.
    pub fn handle_frame(
        &mut self,
        frame: &Frame,
        out: &mut SendQueue,
    ) -> Result<Option<Peer>, HandshakeError> {
        let step = std::mem::replace(&mut self.step, Step::Over);
        let result = match (step, frame.kind) {
            (Step::AwaitHello, FrameKind::Hello) => self.handle_hello(&frame.header, out),
            (Step::AwaitWelcome { hello }, FrameKind::Welcome) => {
                self.handle_welcome(&hello, &frame.header, out).map(Some)
            }
            (Step::AwaitProof { transcript, peer }, FrameKind::Proof) => self
                .handle_proof(&transcript, peer, &frame.header)
                .map(Some),
            (Step::AwaitWelcome { .. } | Step::AwaitProof { .. }, FrameKind::Denied) => {
                return Err(self.denied(&frame.header)?);
            }
            (_, kind) => Err(HandshakeError::Unexpected(kind)),
        };
        if let Err(error) = &result {
            self.deny(error, out);
        }
        result
    }

    fn handle_hello(
        &mut self,
        header: &[u8],
        out: &mut SendQueue,
    ) -> Result<Option<Peer>, HandshakeError> {
        let hello = Hello::decode(header)?;
        let server = hello.role.server();
        if let Some(cell) = hello.cell {
            self.check_cell(server, cell)?;
        }
        let (own_id, _, _) = self.config.role.numbers();
        if let Some(wanted) = hello.wanted
            && wanted.0 != own_id
        {
            let found = self.config.role.server();
            return Err(HandshakeError::OtherServer { wanted, found });
        }
        self.check_key(server, hello.has_key)?;
        let peer = Peer {
            role: hello.role,
            cell: self.config.cell.unwrap_or_default(),
        };
        let mut welcome = Welcome::of(&self.config, self.nonce).encode();
        let mut transcript = header.to_vec();
        transcript.extend_from_slice(&welcome);
        let Some(key) = &self.config.key else {
            welcome.extend_from_slice(&[0; PROOF_BYTES]);
            put(out, FrameKind::Welcome, &welcome);
            return Ok(Some(peer));
        };
        let proof = key.over(&[LABEL_WELCOME, &transcript]).finalize();
        welcome.extend_from_slice(&proof.into_bytes());
        put(out, FrameKind::Welcome, &welcome);
        self.step = Step::AwaitProof { transcript, peer };
        Ok(None)
    }

    fn handle_welcome(
        &mut self,
        hello: &[u8],
        header: &[u8],
        out: &mut SendQueue,
    ) -> Result<Peer, HandshakeError> {
        let (welcome, proof) = Welcome::decode(header)?;
        let server = welcome.role.server();
        self.check_cell(server, welcome.cell)?;
        if let Some(wanted) = self.config.wanted
            && server != Some(wanted)
        {
            let found = server;
            return Err(HandshakeError::OtherServer { wanted, found });
        }
        self.check_key(server, welcome.has_key)?;
        if let Some(key) = &self.config.key {
            let said = &header[..header.len() - PROOF_BYTES];
            key.over(&[LABEL_WELCOME, hello, said])
                .verify_slice(&proof)
                .map_err(|_| HandshakeError::Proof { server })?;
            let proof = key.over(&[LABEL_PROOF, hello, said]).finalize();
            put(out, FrameKind::Proof, &proof.into_bytes());
        }
        Ok(Peer {
            role: welcome.role,
            cell: welcome.cell,
        })
    }

    fn handle_proof(
        &self,
        transcript: &[u8],
        peer: Peer,
        proof: &[u8],
    ) -> Result<Peer, HandshakeError> {
        let server = peer.role.server();
        let Some(key) = &self.config.key else {
            return Err(HandshakeError::Unexpected(FrameKind::Proof));
        };
        match key.over(&[LABEL_PROOF, transcript]).verify_slice(proof) {
            Ok(()) => Ok(peer),
            Err(_) => Err(HandshakeError::Proof { server }),
        }
    }

    fn check_cell(&self, server: Option<ServerId>, theirs: CellId) -> Result<(), HandshakeError> {
        match self.config.cell {
            Some(ours) if ours != theirs => Err(HandshakeError::OtherCell {
                server,
                theirs,
                ours,
            }),
            _ => Ok(()),
        }
    }

    fn check_key(&self, server: Option<ServerId>, has_key: bool) -> Result<(), HandshakeError> {
        match (self.config.key.is_some(), has_key) {
            (true, false) => Err(HandshakeError::KeyUnexpected { server }),
            (false, true) => Err(HandshakeError::KeyMissing { server }),
            _ => Ok(()),
        }
    }

    /// Tells the other end why it is refused, from its point of view.
    fn deny(&self, error: &HandshakeError, out: &mut SendQueue) {
        let reason = match error {
            HandshakeError::Version { .. } => Denial::Version,
            HandshakeError::OtherCell { .. } => Denial::Cell,
            HandshakeError::OtherServer { .. } => Denial::Server,
            HandshakeError::KeyUnexpected { .. } => Denial::KeyMissing,
            HandshakeError::KeyMissing { .. } => Denial::KeyUnexpected,
            HandshakeError::Proof { .. } => Denial::Proof,
            HandshakeError::Unexpected(_) | HandshakeError::Malformed(_) => Denial::Malformed,
            HandshakeError::Denied { .. } => return,
        };
        let (id, _, _) = self.config.role.numbers();
        let mut denied = vec![reason.code(), id];
        denied.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        denied.extend_from_slice(&self.config.cell.unwrap_or_default().0);
        put(out, FrameKind::Denied, &denied);
    }

    /// What a `Denied` frame means here.
    fn denied(&self, header: &[u8]) -> Result<HandshakeError, DecodeError> {
        let input = &mut Input(header);
        let reason = Denial::from_code(input.u8()?);
        let server = server_of(input.u8()?)?;
        let version = input.u16()?;
        let theirs = CellId(input.array()?);
        Ok(match (reason, self.config.cell, self.config.wanted) {
            (Denial::Version, _, _) => HandshakeError::Version { theirs: version },
            (Denial::Cell, Some(ours), _) => HandshakeError::OtherCell {
                server,
                theirs,
                ours,
            },
            (Denial::Server, _, Some(wanted)) => HandshakeError::OtherServer {
                wanted,
                found: server,
            },
            (Denial::KeyMissing, _, _) => HandshakeError::KeyMissing { server },
            (Denial::KeyUnexpected, _, _) => HandshakeError::KeyUnexpected { server },
            (Denial::Proof, _, _) => HandshakeError::Proof { server },
            (reason, _, _) => HandshakeError::Denied { server, reason },
        })
    }
}

impl Role {
    /// The server's id, for a server.
    pub fn server(&self) -> Option<ServerId> {
        match self {
            Role::Client(_) => None,
            Role::Server { id, .. } => Some(*id),
        }
    }

    /// Id, incarnation and boot as they are sent.
    fn numbers(&self) -> (u8, u64, u64) {
        match self {
            Role::Client(_) => (NO_SERVER, 0, 0),
            Role::Server {
                id,
                incarnation,
                boot,
            } => (id.0, incarnation.0, *boot),
        }
    }
}

struct Hello {
    role: Role,
    wanted: Option<ServerId>,
    has_key: bool,
    cell: Option<CellId>,
    nonce: [u8; NONCE_BYTES],
}

impl Hello {
    fn of(config: &HandshakeConfig, nonce: [u8; NONCE_BYTES]) -> Hello {
        Hello {
            role: config.role.clone(),
            wanted: config.wanted,
            has_key: config.key.is_some(),
            cell: config.cell,
            nonce,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let (id, incarnation, boot) = self.role.numbers();
        let mut out = Vec::new();
        out.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out.push(if id == NO_SERVER { 1 } else { 2 });
        out.push(id);
        out.push(self.wanted.map_or(NO_SERVER, |wanted| wanted.0));
        out.push(u8::from(self.has_key));
        out.extend_from_slice(&self.cell.unwrap_or_default().0);
        out.extend_from_slice(&incarnation.to_le_bytes());
        out.extend_from_slice(&boot.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        let name = match &self.role {
            Role::Client(name) => shortened(name, NAME_BYTES_MAX),
            Role::Server { .. } => "",
        };
        Output(&mut out).string(name);
        out
    }

    fn decode(header: &[u8]) -> Result<Hello, HandshakeError> {
        let input = &mut Input(header);
        check_version(input.u16()?)?;
        let role = input.u8()?;
        let id = server_of(input.u8()?)?;
        let wanted = server_of(input.u8()?)?;
        let has_key = input.flag()?;
        let cell = Some(CellId(input.array()?)).filter(|cell| *cell != CellId::default());
        let incarnation = Incarnation(input.u64()?);
        let boot = input.u64()?;
        let nonce = input.array()?;
        let name = input.string()?;
        input.end()?;
        let role = match (role, id) {
            (1, None) if name.len() <= NAME_BYTES_MAX => Role::Client(name),
            (2, Some(id)) => Role::Server {
                id,
                incarnation,
                boot,
            },
            (code, _) => return Err(DecodeError::UnknownCode { what: "role", code }.into()),
        };
        Ok(Hello {
            role,
            wanted,
            has_key,
            cell,
            nonce,
        })
    }
}

struct Welcome {
    role: Role,
    has_key: bool,
    cell: CellId,
    nonce: [u8; NONCE_BYTES],
}

impl Welcome {
    fn of(config: &HandshakeConfig, nonce: [u8; NONCE_BYTES]) -> Welcome {
        Welcome {
            role: config.role.clone(),
            has_key: config.key.is_some(),
            cell: config.cell.unwrap_or_default(),
            nonce,
        }
    }

    /// Everything but the proof.
    fn encode(&self) -> Vec<u8> {
        let (id, incarnation, boot) = self.role.numbers();
        let mut out = Vec::new();
        out.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out.push(id);
        out.push(u8::from(self.has_key));
        out.extend_from_slice(&self.cell.0);
        out.extend_from_slice(&incarnation.to_le_bytes());
        out.extend_from_slice(&boot.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out
    }

    fn decode(header: &[u8]) -> Result<(Welcome, [u8; PROOF_BYTES]), HandshakeError> {
        let input = &mut Input(header);
        check_version(input.u16()?)?;
        let id = server_of(input.u8()?)?.ok_or(DecodeError::Meaningless("no server"))?;
        let has_key = input.flag()?;
        let cell = CellId(input.array()?);
        let role = Role::Server {
            id,
            incarnation: Incarnation(input.u64()?),
            boot: input.u64()?,
        };
        let welcome = Welcome {
            role,
            has_key,
            cell,
            nonce: input.array()?,
        };
        let proof = input.array()?;
        input.end()?;
        Ok((welcome, proof))
    }
}

fn check_version(theirs: u16) -> Result<(), HandshakeError> {
    if theirs == PROTOCOL_VERSION {
        Ok(())
    } else {
        Err(HandshakeError::Version { theirs })
    }
}

fn server_of(id: u8) -> Result<Option<ServerId>, DecodeError> {
    match id {
        NO_SERVER => Ok(None),
        id if usize::from(id) < crate::types::SERVERS_MAX => Ok(Some(ServerId(id))),
        code => Err(DecodeError::UnknownCode {
            what: "server",
            code,
        }),
    }
}

fn put(out: &mut SendQueue, kind: FrameKind, header: &[u8]) {
    let write = |to: &mut Vec<u8>| to.extend_from_slice(header);
    out.frame(kind, GroupId(0), write, std::iter::empty());
}

#[cfg(test)]
mod tests;
