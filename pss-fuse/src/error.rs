//! What can go wrong, and what that is to the kernel and to scripts.

use std::time::Duration;

use pss_core::client::ClientError;
use pss_core::state::Refusal;
use pss_core::types::ServerId;
use pss_core::wire::client::ReplyError;

/// Why something in the namespace could not be looked at.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FsError {
    /// It does not exist, or no more.
    #[error("no such file or directory")]
    NotFound,
    /// A part of the path is a file.
    #[error("not a directory")]
    NotDirectory,
    /// It is a directory.
    #[error("is a directory")]
    IsDirectory,
    /// The position lies behind the end of the file, or behind the last data.
    #[error("no data behind this position")]
    PastEnd,
    /// The file has no such attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// No majority of the servers works.
    #[error("no majority of the servers answers: {0}")]
    NoMajority(String),
    /// There was no answer in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The servers do not let this client in.
    #[error(
        "the servers do not let this client in: {0}; use the cell's own key with --key FILE or PSS_KEY"
    )]
    Denied(String),
    /// A block cannot be read on any server that was asked.
    #[error("a block could not be read: its data do not match their checksum")]
    Damaged,
    /// The cell answers something else than what was asked.
    #[error("the servers' answer does not fit the question: {0}")]
    Unexpected(String),
}

impl FsError {
    /// What a client's failure is here; `listed` are the servers of the cell and `limit` how long was waited.
    pub fn from_client(error: ClientError, listed: &[ServerId], limit: Duration) -> FsError {
        match error {
            ClientError::Unavailable { answered, silent } => {
                let denial = silent.iter().find(|(_, error)| error.is_denial());
                if let (true, Some((server, error))) = (answered.is_empty(), denial) {
                    return FsError::Denied(format!("server {server}: {error}"));
                }
                let core = |servers: &mut dyn Iterator<Item = &ServerId>| {
                    servers.filter(|server| server.is_core()).count()
                };
                if core(&mut answered.iter()) > core(&mut listed.iter()) / 2 {
                    return FsError::TimedOut(limit);
                }
                let reasons = silent
                    .iter()
                    .map(|(server, error)| format!("server {server}: {error}"));
                FsError::NoMajority(reasons.collect::<Vec<_>>().join("; "))
            }
            ClientError::Refused(Refusal::NoSuchVolume) => FsError::NotFound,
            ClientError::Refused(Refusal::OutOfRange) => FsError::PastEnd,
            ClientError::Refused(refusal) => FsError::Unexpected(refusal.to_string()),
            ClientError::Reply(ReplyError::Io) => FsError::Damaged,
            error @ (ClientError::Reply(_) | ClientError::Fenced | ClientError::Unexpected) => {
                FsError::Unexpected(error.to_string())
            }
        }
    }

    /// Whether the cell, not the question, is at fault.
    pub fn is_outage(&self) -> bool {
        match self {
            FsError::NoMajority(_) | FsError::TimedOut(_) | FsError::Denied(_) => true,
            FsError::NotFound
            | FsError::NotDirectory
            | FsError::IsDirectory
            | FsError::PastEnd
            | FsError::NoAttribute
            | FsError::Damaged
            | FsError::Unexpected(_) => false,
        }
    }

    /// What the kernel is told.
    pub fn errno(&self) -> rustix::io::Errno {
        use rustix::io::Errno;
        match self {
            FsError::NotFound => Errno::NOENT,
            FsError::NotDirectory => Errno::NOTDIR,
            FsError::IsDirectory => Errno::ISDIR,
            FsError::PastEnd => Errno::NXIO,
            FsError::NoAttribute => Errno::NODATA,
            FsError::TimedOut(_) => Errno::TIMEDOUT,
            FsError::Denied(_) => Errno::ACCESS,
            FsError::NoMajority(_) | FsError::Damaged | FsError::Unexpected(_) => Errno::IO,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pss_core::client::ServerError;
    use pss_core::wire::auth::HandshakeError;

    use super::*;

    fn unavailable(answered: &[u8], silent: &[(u8, ServerError)]) -> FsError {
        let silent = silent.iter();
        let error = ClientError::Unavailable {
            answered: answered.iter().copied().map(ServerId).collect(),
            silent: silent
                .map(|(server, error)| (ServerId(*server), error.clone()))
                .collect(),
        };
        let listed = [0, 1, 2, 6, 7].map(ServerId);
        FsError::from_client(error, &listed, Duration::from_secs(5))
    }

    fn refused() -> ServerError {
        let error = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        ServerError::Io(Arc::new(error))
    }

    #[test]
    fn outages_differ() {
        let slow = unavailable(&[0, 2], &[(1, refused())]);
        assert_eq!(slow, FsError::TimedOut(Duration::from_secs(5)));
        // Learners are no majority.
        let minority = unavailable(&[0, 6, 7], &[(1, refused()), (2, refused())]);
        assert!(matches!(&minority, FsError::NoMajority(why) if why.contains("server 1")));
        let key = ServerError::Handshake(HandshakeError::Proof { server: None });
        let denied = unavailable(&[], &[(0, refused()), (1, key.clone())]);
        assert!(matches!(&denied, FsError::Denied(why) if why.starts_with("server 1")));
        // One server with another key is not everybody's fault.
        let one = unavailable(&[0], &[(1, key)]);
        assert!(matches!(one, FsError::NoMajority(_)));
        for error in [slow, minority, denied, one] {
            assert!(error.is_outage());
        }
    }
}
