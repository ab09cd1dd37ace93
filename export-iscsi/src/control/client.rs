//! The other end of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{Answer, Failure, Request};

/// Longest answer that is taken: what thousands of sessions come to.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error(
        "no pss-iscsi answers at {}: {source}; it must run on this machine, and --control PATH say where its socket is",
        .path.display()
    )]
    Absent {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// We are not allowed to ask.
    #[error("{}: permission denied; only the user that pss-iscsi runs as, and root, may use it", .0.display())]
    Denied(PathBuf),
    /// It does not answer in time.
    #[error("pss-iscsi at {} does not answer in time", .0.display())]
    Timeout(PathBuf),
    /// It went away, or is something else.
    #[error("pss-iscsi at {}: {text}", .path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        text: String,
    },
    /// It does not do it.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// Asks the server at a socket, and waits for its answer at most so long.
///
/// # Errors
/// [`ClientError`].
pub fn ask<T: DeserializeOwned>(
    path: &Path,
    request: &Request,
    patience: Duration,
) -> Result<T, ClientError> {
    let broken = |text: String| ClientError::Broken {
        path: path.to_owned(),
        text,
    };
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            ClientError::Timeout(path.to_owned())
        }
        _ => broken(source.to_string()),
    };
    let mut stream = connect(path, patience).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => ClientError::Denied(path.to_owned()),
        io::ErrorKind::WouldBlock => ClientError::Timeout(path.to_owned()),
        _ => ClientError::Absent {
            path: path.to_owned(),
            source,
        },
    })?;
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    let mut line = serde_json::to_vec(request).map_err(|error| broken(error.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let mut answer = Vec::new();
    let mut reader = BufReader::new(stream).take(ANSWER_BYTES_MAX);
    reader.read_until(b'\n', &mut answer).map_err(failed)?;
    if answer.is_empty() {
        return Err(broken("it went away".to_owned()));
    }
    let answer = serde_json::from_slice(&answer).map_err(|error| broken(error.to_string()))?;
    match answer {
        Answer::Ok(value) => {
            serde_json::from_value(value).map_err(|error| broken(error.to_string()))
        }
        Answer::Error(failure) => Err(failure.into()),
    }
}

/// Connects; a server that takes nobody is waited for no longer than for an answer.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // It bounds connecting, too (unix(7) waits while the backlog is full).
    socket.set_write_timeout(Some(patience))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_take_nobody_or_say_nothing_are_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let asked = || ask::<()>(&path, &Request::Targets, Duration::from_millis(50));
        let _first = UnixStream::connect(&path).unwrap();
        assert!(matches!(asked(), Err(ClientError::Timeout(_))));
        drop(socket);
        assert!(matches!(asked(), Err(ClientError::Absent { .. })));
    }
}
