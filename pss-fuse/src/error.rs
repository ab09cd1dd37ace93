//! What can go wrong, and what that is to the kernel and to scripts.

use std::time::Duration;

use pss_core::client::{ClientError, ServerError};
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
    /// No server answers, although any would do.
    #[error("no server answers: {0}")]
    NoServer(String),
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
    /// A block cannot be read.
    #[error(
        "a block could not be read: its data do not match their checksum, or a disk failed; the servers' logs and 'pss status' say which"
    )]
    Damaged,
    /// It changed all the time while it was read.
    #[error("it changes while it is read")]
    Changing,
    /// The cell answers something else than what was asked.
    #[error("the servers' answer does not fit the question: {0}")]
    Unexpected(String),
}

impl FsError {
    /// What a client's failure is here; `listed` are the servers of the cell and `limit` how long was waited.
    pub fn from_client(error: ClientError, listed: &[ServerId], limit: Duration) -> FsError {
        match error {
            ClientError::Unavailable { answered, silent } => {
                if let (true, Some(denied)) = (answered.is_empty(), denied(&silent)) {
                    return denied;
                }
                let core = |servers: &mut dyn Iterator<Item = &ServerId>| {
                    servers.filter(|server| server.is_core()).count()
                };
                if core(&mut answered.iter()) > core(&mut listed.iter()) / 2 {
                    return FsError::TimedOut(limit);
                }
                FsError::NoMajority(reasons(&silent))
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

    /// What it is that no server has answered, although any might have.
    pub fn no_server(silent: &[(ServerId, ServerError)], limit: Duration) -> FsError {
        let is_slow =
            |(_, error): &(ServerId, ServerError)| matches!(error, ServerError::TimedOut(_));
        match denied(silent) {
            Some(denied) => denied,
            None if !silent.is_empty() && silent.iter().all(is_slow) => FsError::TimedOut(limit),
            None => FsError::NoServer(reasons(silent)),
        }
    }

    /// Whether the cell, not the question, is at fault.
    pub fn is_outage(&self) -> bool {
        match self {
            FsError::NoServer(_)
            | FsError::NoMajority(_)
            | FsError::TimedOut(_)
            | FsError::Denied(_) => true,
            FsError::NotFound
            | FsError::NotDirectory
            | FsError::IsDirectory
            | FsError::PastEnd
            | FsError::NoAttribute
            | FsError::Damaged
            | FsError::Changing
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
            FsError::Changing => Errno::AGAIN,
            FsError::NoServer(_)
            | FsError::NoMajority(_)
            | FsError::Damaged
            | FsError::Unexpected(_) => Errno::IO,
        }
    }
}

/// The failure to report if a server takes us for a stranger.
fn denied(silent: &[(ServerId, ServerError)]) -> Option<FsError> {
    let (server, error) = silent.iter().find(|(_, error)| error.is_denial())?;
    Some(FsError::Denied(format!("server {server}: {error}")))
}

fn reasons(silent: &[(ServerId, ServerError)]) -> String {
    let reasons = silent
        .iter()
        .map(|(server, error)| format!("server {server}: {error}"));
    reasons.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        let limit = Duration::from_secs(5);
        let late = |id| (ServerId(id), ServerError::TimedOut(Duration::from_secs(1)));
        let dead = (ServerId(2), refused());
        let all_late = FsError::no_server(&[late(0), late(1)], limit);
        assert_eq!(all_late, FsError::TimedOut(limit));
        let some = FsError::no_server(&[late(0), dead], limit);
        assert!(matches!(&some, FsError::NoServer(why) if why.contains("server 2")));
        for error in [slow, minority, denied, one, all_late, some] {
            assert!(error.is_outage());
        }
    }
}
