//! The servers of a cell, as its log lists them. The first leader takes them over from server.conf;
//! as long as the log says nothing, the list is that of server.conf.

use std::fmt;
use std::net::IpAddr;

use bytes::{Buf, BufMut};
use serde::{Deserialize, Serialize};

use crate::paxos::quorum::Membership;
use crate::types::{SERVERS_MAX, ServerId};

/// Longest host of a server, bytes; that of DNS names (RFC 1035, section 3.1).
pub const HOST_BYTES_MAX: usize = 255;
/// Longest path of a data directory, bytes; Linux's PATH_MAX.
pub const PATH_BYTES_MAX: usize = 4096;
/// Most servers that vote.
pub const CORE_MAX: usize = 5;

/// A server of the cell.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Which.
    pub id: ServerId,
    /// Whether it votes.
    pub core: bool,
    /// Its IP address; empty: that of server.conf.
    pub host: String,
    /// Its data directory there, for people; empty: that of server.conf.
    pub path: String,
}

/// All of them, in order of their ids.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
pub struct Members {
    /// How often a majority was given up for good.
    pub epoch: u64,
    /// Counts changes.
    pub version: u64,
    /// Who.
    pub list: Vec<Member>,
}

/// Why a list cannot be one of members.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BadMembers {
    /// The bytes end too early, or a text is too long or not UTF-8.
    #[error("the bytes are not a list of members")]
    Malformed,
    /// An id twice, not in order, or above 7.
    #[error("a list of members has distinct ids from 0 to 7 in order")]
    Ids,
    /// A host is no IP address.
    #[error("the host of server {0} is not an IP address")]
    Host(ServerId),
    /// Nobody votes, or too many do.
    #[error("a cell has 1 to 5 core servers, not {0}")]
    Core(usize),
}

/// `servers 0 1 2, learners 5, change 3`.
impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = |core: bool| {
            let some = self.list.iter().filter(|it| it.core == core);
            let ids: Vec<String> = some.map(|it| it.id.to_string()).collect();
            ids.join(" ")
        };
        write!(f, "servers {}", ids(true))?;
        if self.list.iter().any(|it| !it.core) {
            write!(f, ", learners {}", ids(false))?;
        }
        write!(f, ", change {}", self.version)
    }
}

impl Member {
    /// Where it is, if that is not left to server.conf.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl Members {
    /// Who votes and who learns.
    pub fn membership(&self) -> Membership {
        let ids = |core| {
            let some = self.list.iter().filter(move |it| it.core == core);
            some.map(|it| it.id).collect()
        };
        Membership {
            core: ids(true),
            learners: ids(false),
        }
    }

    /// A server, if it is one of them.
    pub fn get(&self, id: ServerId) -> Option<&Member> {
        self.list.iter().find(|it| it.id == id)
    }

    /// Whether this is a list of members.
    ///
    /// # Errors
    /// [`BadMembers`].
    pub fn check(&self) -> Result<(), BadMembers> {
        let rise = self.list.windows(2).all(|two| two[0].id < two[1].id);
        let known = self
            .list
            .iter()
            .all(|it| usize::from(it.id.0) < SERVERS_MAX);
        if !rise || !known {
            return Err(BadMembers::Ids);
        }
        let short =
            |it: &Member| it.host.len() <= HOST_BYTES_MAX && it.path.len() <= PATH_BYTES_MAX;
        if !self.list.iter().all(short) {
            return Err(BadMembers::Malformed);
        }
        let is_address = |it: &&Member| it.host.is_empty() || it.address().is_some();
        if let Some(bad) = self.list.iter().find(|it| !is_address(it)) {
            return Err(BadMembers::Host(bad.id));
        }
        match self.list.iter().filter(|it| it.core).count() {
            1..=CORE_MAX => Ok(()),
            count => Err(BadMembers::Core(count)),
        }
    }

    /// Epoch u64, version u64, count u8; each: id u8, core u8, host and path with a u16 length each.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.version);
        out.put_u8(self.list.len() as u8);
        for member in &self.list {
            out.put_u8(member.id.0);
            out.put_u8(u8::from(member.core));
            for text in [&member.host, &member.path] {
                out.put_u16_le(text.len() as u16);
                out.put_slice(text.as_bytes());
            }
        }
    }

    /// Reads what [`Members::encode`] made.
    pub(crate) fn decode(input: &mut &[u8]) -> Result<Members, BadMembers> {
        let bad = |_| BadMembers::Malformed;
        let (epoch, version) = (
            input.try_get_u64_le().map_err(bad)?,
            input.try_get_u64_le().map_err(bad)?,
        );
        let count = input.try_get_u8().map_err(bad)?;
        if usize::from(count) > SERVERS_MAX {
            return Err(BadMembers::Ids);
        }
        let mut list = Vec::new();
        for _ in 0..count {
            let id = ServerId(input.try_get_u8().map_err(bad)?);
            let core = input.try_get_u8().map_err(bad)? != 0;
            let mut text = || {
                let length = usize::from(input.try_get_u16_le().map_err(bad)?);
                let (text, rest) = input
                    .split_at_checked(length)
                    .ok_or(BadMembers::Malformed)?;
                *input = rest;
                String::from_utf8(text.to_vec()).map_err(|_| BadMembers::Malformed)
            };
            let (host, path) = (text()?, text()?);
            list.push(Member {
                id,
                core,
                host,
                path,
            });
        }
        let members = Members {
            epoch,
            version,
            list,
        };
        members.check().map(|()| members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn three() -> Members {
        let member = |id: u8| Member {
            id: ServerId(id),
            core: id < 5,
            host: format!("10.0.0.{id}"),
            path: "/srv/pss".into(),
        };
        Members {
            epoch: 1,
            version: 7,
            list: vec![member(0), member(2), member(6)],
        }
    }

    #[test]
    fn literal_bytes() {
        let mut bytes = Vec::new();
        three().encode(&mut bytes);
        let mut text = vec![1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3];
        for (id, core) in [(0, 1), (2, 1), (6, 0)] {
            text.extend([id, core, 8, 0]);
            text.extend(format!("10.0.0.{id}").bytes());
            text.extend([8, 0]);
            text.extend(b"/srv/pss");
        }
        assert_eq!(bytes, text);
        let input = &mut &bytes[..];
        assert_eq!(Members::decode(input), Ok(three()));
        assert!(input.is_empty());
        for end in 0..bytes.len() {
            let cut = Members::decode(&mut &bytes[..end]);
            assert_eq!(cut, Err(BadMembers::Malformed), "{end}");
        }
    }

    #[test]
    fn what_no_cell_has_is_refused() {
        let mut twice = three();
        twice.list[1].id = ServerId(0);
        let mut high = three();
        high.list[2].id = ServerId(8);
        let mut name = three();
        name.list[1].host = "paxos01".into();
        let mut none = three();
        none.list.iter_mut().for_each(|it| it.core = false);
        for (members, error) in [
            (twice, BadMembers::Ids),
            (high, BadMembers::Ids),
            (name, BadMembers::Host(ServerId(2))),
            (none, BadMembers::Core(0)),
        ] {
            let mut bytes = Vec::new();
            members.encode(&mut bytes);
            assert_eq!(Members::decode(&mut &bytes[..]), Err(error));
        }
    }

    #[test]
    fn roles() {
        let membership = three().membership();
        assert_eq!(membership.core, [ServerId(0), ServerId(2)]);
        assert_eq!(membership.learners, [ServerId(6)]);
    }
}
