//! `server.conf`: which servers make up a cell, and where each keeps its data.
//!
//! ```text
//! # id server path
//! 0 paxos00 /pss
//! 1 192.0.2.11 /pss
//! ```
//! One record a line, fields separated by blanks, `#` begins a comment. Up to eight records; ids 0 to
//! 4 are the core servers whose majority decides, 5 to 7 learners. A server listens on UDP 4000 + id
//! and TCP 4010 + id of its address.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use crate::types::{CORE_SERVERS_MAX, SERVERS_MAX, ServerId};

/// UDP port of server 0.
pub const UDP_PORT_BASE: u16 = 4000;
/// TCP port of server 0.
pub const TCP_PORT_BASE: u16 = 4010;
/// A larger server.conf is none: eight records of a longest path and name fit in it many times.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Longest host name, RFC 1035 section 2.3.4.
const HOST_BYTES_MAX: usize = 255;

/// A record of server.conf.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServerRecord {
    /// The server's id.
    pub id: ServerId,
    /// Name or address, as written.
    pub host: String,
    /// Its data directory on that host.
    pub path: PathBuf,
    /// Line of the file, from 1.
    pub line: usize,
}

/// A server.conf that was read and found right.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServersFile {
    /// Where it was read from, for messages.
    pub file: PathBuf,
    /// The records, by id.
    pub records: Vec<ServerRecord>,
}

/// What is wrong with a server.conf. Every message names the file, the line if there is one, and what
/// to do.
#[derive(Debug, thiserror::Error)]
pub enum ServersError {
    /// It cannot be read.
    #[error(
        "{}: cannot read the list of servers: {source}; write one line 'ID HOST PATH' per server into it, or name another file with --servers or PSS_SERVERS",
        file.display()
    )]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is larger than any server.conf.
    #[error(
        "{}: not a list of servers: larger than {} KiB",
        file.display(),
        FILE_BYTES_MAX >> 10
    )]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// A line is wrong.
    #[error("{}:{line}: {problem}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: LineProblem,
    },
    /// No record at all.
    #[error(
        "{}: lists no server; write one line 'ID HOST PATH' per server, such as '0 paxos00 /pss'",
        file.display()
    )]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// Learners only.
    #[error(
        "{}: lists no core server; at least one record needs an id from 0 to 4 (three are usual)",
        file.display()
    )]
    NoCore {
        /// The file.
        file: PathBuf,
    },
    /// A server that was asked for is not listed.
    #[error(
        "{}: does not list server {id}; it lists {}; add a line '{id} HOST PATH' or use another id",
        file.display(),
        Ids(listed)
    )]
    NotListed {
        /// The file.
        file: PathBuf,
        /// Who was asked for.
        id: u8,
        /// Who is listed.
        listed: Vec<ServerId>,
    },
}

/// What is wrong with a line of server.conf.
#[derive(Debug, thiserror::Error)]
pub enum LineProblem {
    /// Bytes that are no text.
    #[error("not UTF-8 text; write one record 'ID HOST PATH' per line")]
    NotText,
    /// The first field is no number.
    #[error("'{0}' is no server id; a record is 'ID HOST PATH', such as '0 paxos00 /pss'")]
    BadId(String),
    /// The id is a number above 7.
    #[error("server id {0} is above 7; ids are 0 to 4 (core servers) and 5 to 7 (learners)")]
    IdTooHigh(String),
    /// An id for the second time.
    #[error("server id {id} is already used in line {first_line}; give every server its own id")]
    DuplicateId {
        /// The id.
        id: ServerId,
        /// Where it was first.
        first_line: usize,
    },
    /// No host.
    #[error("host and path are missing; a record is 'ID HOST PATH', such as '{0} paxos0{0} /pss'")]
    NoHost(ServerId),
    /// No path.
    #[error(
        "the path is missing; write the server's data directory at the end: '{id} {host} /pss'"
    )]
    NoPath {
        /// Of the record.
        id: ServerId,
        /// Of the record.
        host: String,
    },
    /// The path does not start with `/`.
    #[error("the path '{0}' does not start with '/'; write the data directory as an absolute path")]
    RelativePath(String),
    /// Something behind the path.
    #[error(
        "'{0}' follows the path; a record is 'ID HOST PATH' without blanks in the path, and a comment starts with '#'"
    )]
    Trailing(String),
    /// A host that cannot be one.
    #[error("'{0}' is no host name or address")]
    BadHost(String),
    /// The host's name is not known.
    #[error(
        "the name '{host}' of server {id} cannot be resolved: {reason}; add it to DNS or /etc/hosts, or write the server's address instead"
    )]
    UnknownHost {
        /// Of the record.
        id: ServerId,
        /// The name.
        host: String,
        /// What the resolver says.
        reason: String,
    },
}

impl ServersFile {
    /// Reads and checks a file. Names are not resolved yet.
    ///
    /// # Errors
    /// [`ServersError`].
    pub fn read(file: &Path) -> Result<ServersFile, ServersError> {
        let unreadable = |source| ServersError::Read {
            file: file.to_owned(),
            source,
        };
        let input = std::fs::File::open(file).map_err(unreadable)?;
        let mut bytes = Vec::new();
        let mut input = io::Read::take(input, FILE_BYTES_MAX + 1);
        io::Read::read_to_end(&mut input, &mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(ServersError::TooLarge {
                file: file.to_owned(),
            });
        }
        ServersFile::parse(file, &bytes)
    }

    /// Checks the content of a file; its name is used for messages only.
    ///
    /// # Errors
    /// [`ServersError`].
    pub fn parse(file: &Path, content: &[u8]) -> Result<ServersFile, ServersError> {
        let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        let mut records: BTreeMap<ServerId, ServerRecord> = BTreeMap::new();
        for (index, text) in content.split(|byte| *byte == b'\n').enumerate() {
            let line = index + 1;
            let wrong = |problem| ServersError::Line {
                file: file.to_owned(),
                line,
                problem,
            };
            let Some(record) = parse_line(line, text).map_err(wrong)? else {
                continue;
            };
            if let Some(first) = records.get(&record.id) {
                return Err(wrong(LineProblem::DuplicateId {
                    id: record.id,
                    first_line: first.line,
                }));
            }
            records.insert(record.id, record);
        }
        // Every id is below 8 and used once.
        assert!(records.len() <= SERVERS_MAX);
        let servers = ServersFile {
            file: file.to_owned(),
            records: records.into_values().collect(),
        };
        if servers.records.is_empty() {
            return Err(ServersError::Empty { file: servers.file });
        }
        if servers.core().is_empty() {
            return Err(ServersError::NoCore { file: servers.file });
        }
        Ok(servers)
    }

    /// The record of a server.
    ///
    /// # Errors
    /// [`ServersError::NotListed`].
    pub fn record(&self, id: u8) -> Result<&ServerRecord, ServersError> {
        self.records
            .iter()
            .find(|record| record.id.0 == id)
            .ok_or_else(|| ServersError::NotListed {
                file: self.file.clone(),
                id,
                listed: self.ids(),
            })
    }

    /// All ids, ascending.
    pub fn ids(&self) -> Vec<ServerId> {
        self.records.iter().map(|record| record.id).collect()
    }

    /// The core servers, ascending.
    pub fn core(&self) -> Vec<ServerId> {
        let mut ids = self.ids();
        ids.retain(|id| id.is_core());
        ids
    }

    /// How many core servers make a majority of those listed.
    pub fn majority(&self) -> usize {
        self.core().len() / 2 + 1
    }

    /// Looks up the hosts' addresses, IPv4 before IPv6.
    ///
    /// # Errors
    /// [`ServersError::Line`] with the line of the first name that is unknown.
    pub fn resolve(&self) -> Result<Servers, ServersError> {
        let mut addresses = BTreeMap::new();
        for record in &self.records {
            let address = resolve_host(&record.host).map_err(|reason| ServersError::Line {
                file: self.file.clone(),
                line: record.line,
                problem: LineProblem::UnknownHost {
                    id: record.id,
                    host: record.host.clone(),
                    reason,
                },
            })?;
            addresses.insert(record.id, address);
        }
        Ok(Servers { addresses })
    }
}

fn parse_line(line: usize, text: &[u8]) -> Result<Option<ServerRecord>, LineProblem> {
    // What a comment holds is nobody's business, so cut it before the text is looked at.
    let text = text.split(|byte| *byte == b'#').next().unwrap_or_default();
    let text = std::str::from_utf8(text).map_err(|_| LineProblem::NotText)?;
    let mut fields = text.split_whitespace();
    let Some(id) = fields.next() else {
        return Ok(None);
    };
    let id = parse_id(id)?;
    let host = fields.next().ok_or(LineProblem::NoHost(id))?;
    // A path in the place of the host: the host was forgotten.
    if host.starts_with('/') {
        return Err(LineProblem::BadHost(shorten(host)));
    }
    let bad = |c: char| !(c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%'));
    if host.len() > HOST_BYTES_MAX || host.contains(bad) {
        return Err(LineProblem::BadHost(shorten(host)));
    }
    let path = fields.next().ok_or_else(|| LineProblem::NoPath {
        id,
        host: host.to_owned(),
    })?;
    if !path.starts_with('/') || path.contains('\0') {
        return Err(LineProblem::RelativePath(shorten(path)));
    }
    if let Some(more) = fields.next() {
        return Err(LineProblem::Trailing(shorten(more)));
    }
    Ok(Some(ServerRecord {
        id,
        host: host.to_owned(),
        path: PathBuf::from(path),
        line,
    }))
}

fn parse_id(text: &str) -> Result<ServerId, LineProblem> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(LineProblem::BadId(shorten(text)));
    }
    match text.parse::<u8>() {
        Ok(id) if usize::from(id) < SERVERS_MAX => Ok(ServerId(id)),
        _ => Err(LineProblem::IdTooHigh(shorten(text))),
    }
}

fn resolve_host(host: &str) -> Result<IpAddr, String> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(address);
    }
    let found: Vec<SocketAddr> = (host, 0)
        .to_socket_addrs()
        .map_err(|error| error.to_string())?
        .collect();
    found
        .iter()
        .find(|address| address.is_ipv4())
        .or(found.first())
        .map(SocketAddr::ip)
        .ok_or_else(|| "it has no address".to_owned())
}

/// Input that is quoted in a message is not repeated without bound, nor are control characters.
fn shorten(text: &str) -> String {
    const MOST: usize = 64;
    let mut short: String = text
        .chars()
        .take(MOST)
        .flat_map(char::escape_default)
        .collect();
    if text.chars().nth(MOST).is_some() {
        short.push('…');
    }
    short
}

/// The servers of a cell and their addresses.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Servers {
    addresses: BTreeMap<ServerId, IpAddr>,
}

impl Servers {
    /// Servers at known addresses.
    ///
    /// # Panics
    /// If an id is above 7.
    pub fn new(addresses: impl IntoIterator<Item = (ServerId, IpAddr)>) -> Servers {
        let addresses: BTreeMap<_, _> = addresses.into_iter().collect();
        assert!(addresses.keys().all(|id| usize::from(id.0) < SERVERS_MAX));
        Servers { addresses }
    }

    /// All servers, by id.
    pub fn iter(&self) -> impl Iterator<Item = (ServerId, IpAddr)> + '_ {
        self.addresses.iter().map(|(id, address)| (*id, *address))
    }

    /// All ids, ascending.
    pub fn ids(&self) -> Vec<ServerId> {
        self.addresses.keys().copied().collect()
    }

    /// The core servers, ascending.
    pub fn core(&self) -> Vec<ServerId> {
        let mut ids = self.ids();
        ids.retain(|id| id.0 < CORE_SERVERS_MAX);
        ids
    }

    /// How many core servers make a majority of those listed.
    pub fn majority(&self) -> usize {
        self.core().len() / 2 + 1
    }

    /// Whether a server is listed.
    pub fn contains(&self, id: ServerId) -> bool {
        self.addresses.contains_key(&id)
    }

    /// A server's address.
    pub fn address(&self, id: ServerId) -> Option<IpAddr> {
        self.addresses.get(&id).copied()
    }

    /// Where a server hears the other servers' datagrams.
    pub fn udp(&self, id: ServerId) -> Option<SocketAddr> {
        let port = UDP_PORT_BASE + u16::from(id.0);
        Some(SocketAddr::new(self.address(id)?, port))
    }

    /// Where a server hears clients and the other servers' streams.
    pub fn tcp(&self, id: ServerId) -> Option<SocketAddr> {
        let port = TCP_PORT_BASE + u16::from(id.0);
        Some(SocketAddr::new(self.address(id)?, port))
    }
}

/// Where a server at an address takes connections and datagrams.
pub fn sockets(id: ServerId, address: IpAddr) -> (SocketAddr, SocketAddr) {
    let port = |base| base + u16::from(id.0);
    let tcp = SocketAddr::new(address, port(TCP_PORT_BASE));
    (tcp, SocketAddr::new(address, port(UDP_PORT_BASE)))
}

/// Ids for people: `0, 1 and 2`.
pub struct Ids<'a>(pub &'a [ServerId]);

impl fmt::Display for Ids<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, id) in self.0.iter().enumerate() {
            match index {
                0 => {}
                _ if index + 1 == self.0.len() => f.write_str(" and ")?,
                _ => f.write_str(", ")?,
            }
            id.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(content: impl AsRef<[u8]>) -> Result<ServersFile, ServersError> {
        ServersFile::parse(Path::new("/etc/pss/server.conf"), content.as_ref())
    }

    fn message(content: impl AsRef<[u8]>) -> String {
        parse(content).unwrap_err().to_string()
    }

    #[test]
    fn the_manuals_file() {
        let file = parse(
            "# id server path\n0 paxos00 /pss\n1\tpaxos01   /pss # second\r\n\n  2 192.0.2.3 /pss\n\
             3 paxos03 /pss\n4 paxos04 /pss\n5 paxos05 /pss\n6 paxos06 /pss\n7 fe80::1 /pss/7",
        )
        .unwrap();
        assert_eq!(file.records.len(), 8);
        assert_eq!(file.core().len(), 5);
        assert_eq!(file.majority(), 3);
        let last = file.record(7).unwrap();
        assert_eq!((last.host.as_str(), last.line), ("fe80::1", 10));
        assert_eq!(last.path, Path::new("/pss/7"));
    }

    #[test]
    fn records_are_ordered_by_id() {
        let file = parse("2 c /c\n0 a /a\n6 d /d\n").unwrap();
        assert_eq!(file.ids(), [ServerId(0), ServerId(2), ServerId(6)]);
        assert_eq!(file.majority(), 2);
    }

    #[test]
    fn wrong_lines_are_named() {
        for (content, expected) in [
            (
                "0 a /p\n\n0 b /p",
                "conf:3: server id 0 is already used in line 1",
            ),
            ("# x\n8 a /p", "conf:2: server id 8 is above 7"),
            (
                "99999999999999999999 a /p",
                "conf:1: server id 99999999999999999999 is above 7",
            ),
            (
                "1 paxos01",
                "conf:1: the path is missing; write the server's data directory at the end: '1 paxos01 /pss'",
            ),
            ("1", "conf:1: host and path are missing"),
            ("1 # paxos01 /pss", "conf:1: host and path are missing"),
            ("x a /p", "conf:1: 'x' is no server id"),
            ("-1 a /p", "conf:1: '-1' is no server id"),
            ("1 a p", "conf:1: the path 'p' does not start with '/'"),
            ("1 a /p q", "conf:1: 'q' follows the path"),
            ("1 /p", "conf:1: '/p' is no host name"),
            ("1 a,b /p", "conf:1: 'a,b' is no host name"),
            ("", "lists no server"),
            ("# only\n#comments\n", "lists no server"),
            ("5 a /p\n7 b /p", "lists no core server"),
            ("\u{1b}[2J\u{7}", "'\\u{1b}[2J\\u{7}' is no server id"),
        ] {
            let message = message(content);
            assert!(message.contains(expected), "{content:?}: {message}");
        }
        assert!(message(b"0 \xff\xfe /p").contains("conf:1: not UTF-8"));
    }

    #[test]
    fn bytes_in_a_comment_do_not_matter() {
        assert!(parse(b"\xef\xbb\xbf0 a /p # caf\xe9\n").is_ok());
    }

    #[test]
    fn names_are_resolved_ipv4_first() {
        let servers = parse("0 localhost /p\n1 192.0.2.1 /p\n5 ::1 /p")
            .unwrap()
            .resolve()
            .unwrap();
        assert_eq!(
            servers.udp(ServerId(0)).unwrap().to_string(),
            "127.0.0.1:4000"
        );
        assert_eq!(
            servers.tcp(ServerId(1)).unwrap().to_string(),
            "192.0.2.1:4011"
        );
        assert_eq!(servers.tcp(ServerId(5)).unwrap().to_string(), "[::1]:4015");
        assert_eq!(servers.tcp(ServerId(2)), None);
        assert_eq!(servers.majority(), 2);
    }

    #[test]
    fn an_unknown_name_is_an_error_with_its_line() {
        let file = parse("0 127.0.0.1 /p\n1 no-such-host.invalid /p").unwrap();
        let message = file.resolve().unwrap_err().to_string();
        assert!(
            message.contains("conf:2: the name 'no-such-host.invalid'"),
            "{message}"
        );
        assert!(message.contains("/etc/hosts"), "{message}");
    }

    #[test]
    fn a_server_that_is_not_listed() {
        let file = parse("0 a /p\n1 a /p\n2 a /p").unwrap();
        let message = file.record(4).unwrap_err().to_string();
        assert!(
            message.contains("does not list server 4; it lists 0, 1 and 2"),
            "{message}"
        );
    }

    #[test]
    fn missing_and_huge_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.conf");
        let missing = ServersFile::read(&path).unwrap_err().to_string();
        assert!(missing.contains("PSS_SERVERS"), "{missing}");
        std::fs::write(&path, vec![b'#'; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(matches!(
            ServersFile::read(&path),
            Err(ServersError::TooLarge { .. })
        ));
        std::fs::write(&path, "0 a /p\n").unwrap();
        assert!(ServersFile::read(&path).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(content in proptest::collection::vec(any::<u8>(), 0..400)) {
            check(&content)?;
        }

        #[test]
        fn any_fields_are_answered(content in "([0-9x# ]{0,3}[ \t]{0,2}[a-z0-9.:/#]{0,8}[ \t/]{0,2}[a-z/# ]{0,6}(\n|\r\n)){0,12}") {
            check(content.as_bytes())?;
        }
    }

    /// Whatever is accepted obeys the rules; whatever is refused names the file.
    fn check(content: &[u8]) -> Result<(), TestCaseError> {
        match parse(content) {
            Ok(file) => {
                prop_assert!((1..=8).contains(&file.records.len()));
                prop_assert!(file.records.is_sorted_by(|a, b| a.id < b.id));
                prop_assert!((1..=3).contains(&file.majority()));
                for record in &file.records {
                    prop_assert!(record.id.0 < 8 && !record.host.is_empty());
                    prop_assert!(record.path.is_absolute());
                }
            }
            Err(error) => {
                let message = error.to_string();
                prop_assert!(message.starts_with("/etc/pss/server.conf:"), "{message}");
                prop_assert!(message.len() < 2000);
            }
        }
        Ok(())
    }
}
