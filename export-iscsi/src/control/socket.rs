//! The control socket: a file that only our own user can open.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pss_gateway::user::user_of;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Control;
use super::protocol::{Answer, Failure, Kind, LINE_BYTES_MAX, line, parse};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 16;
/// A connection that says nothing for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Time to take an answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const BACKLOG: i32 = 16;
/// Only our own user, and root.
const MODE: u32 = 0o600;

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another server is there.
    #[error(
        "control socket {}: another pss-iscsi answers there; stop it, or give each one a --control PATH of its own",
        .0.display()
    )]
    InUse(PathBuf),
    /// Another file is there.
    #[error("control socket {}: another file is there; remove it, or give another --control PATH", .0.display())]
    NotASocket(PathBuf),
    /// The system does not let us.
    #[error("control socket {}: {action}: {source}; give another --control PATH", .path.display())]
    Io {
        /// Its file.
        path: PathBuf,
        /// What could not be done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The socket. Its file goes with it.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Makes the socket, and its directory if it is missing. The file of a server that is gone is replaced.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<ControlSocket, SocketError> {
        let failed = |action| {
            move |source| SocketError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            let mut builder = DirBuilder::new();
            let made = builder.recursive(true).mode(0o755).create(directory);
            made.map_err(failed("its directory cannot be made"))?;
        }
        make_room(path)?;
        let listener = bind_private(path).map_err(failed("it cannot be made"))?;
        Ok(ControlSocket {
            listener,
            path: path.to_owned(),
        })
    }

    /// Serves until it is dropped.
    pub async fn serve(self, control: Arc<Control>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept a connection to the control socket");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let control = Arc::clone(&control);
                    tokio::spawn(async move {
                        serve_stream(stream, &control).await;
                        drop(place);
                    });
                }
                Err(_) => {
                    tokio::spawn(async move {
                        let text = "too many connections to the control socket; try again";
                        let mut stream = stream;
                        let _ = send(&mut stream, Err(Failure::new(Kind::Busy, text))).await;
                    });
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Best effort: a file that stays is replaced at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the file of a server that is gone.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match probe(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|source| SocketError::Io {
                path: path.to_owned(),
                action: "what a server that is gone left cannot be removed",
                source,
            }),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => Err(SocketError::Io {
            path: path.to_owned(),
            action: "another user's is there",
            source,
        }),
        // A full backlog is a server, too.
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

/// Connects, and does not wait for a server that takes nobody.
fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// Makes the socket so that it was never open to others, whatever the umask is: the file gets the mode
/// that the socket had before.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let file = File::from(OwnedFd::from(Socket::new(
        Domain::UNIX,
        Type::STREAM,
        None,
    )?));
    file.set_permissions(Permissions::from_mode(MODE))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(MODE))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket.into())
}

async fn serve_stream(mut stream: UnixStream, control: &Control) {
    let mut input = BytesMut::new();
    // Known while the process is still there, which waits for its answer.
    let user = match stream.peer_cred() {
        Ok(peer) => user_of(peer.uid(), peer.pid()),
        Err(_) => String::new(),
    };
    loop {
        let request = match timeout(IDLE_MAX, read_line(&mut stream, &mut input)).await {
            Ok(Ok(Some(line))) => parse(&line),
            Ok(Ok(None)) => return,
            Ok(Err(failure)) => {
                let _ = send(&mut stream, Err(failure)).await;
                return;
            }
            Err(_) => return debug!("a connection to the control socket said nothing"),
        };
        let answer = match request {
            Ok(request) => control.handle(&user, request).await,
            Err(failure) => Err(failure),
        };
        if send(&mut stream, answer).await.is_err() {
            return;
        }
    }
}

/// The next line, or none if the other end is gone.
async fn read_line(
    stream: &mut UnixStream,
    input: &mut BytesMut,
) -> Result<Option<BytesMut>, Failure> {
    loop {
        if let Some(end) = input.iter().position(|byte| *byte == b'\n') {
            let line = input.split_to(end);
            input.advance(1);
            return Ok(Some(line));
        }
        if input.len() > LINE_BYTES_MAX {
            let text = format!("a request has at most {LINE_BYTES_MAX} bytes");
            return Err(Failure::new(Kind::Usage, text));
        }
        match stream.read_buf(input).await {
            Ok(count) if count > 0 => {}
            _ => return Ok(None),
        }
    }
}

async fn send(
    stream: &mut UnixStream,
    answer: Result<serde_json::Value, Failure>,
) -> io::Result<()> {
    let answer = match answer {
        Ok(value) => Answer::Ok(value),
        Err(failure) => Answer::Error(failure),
    };
    timeout(SEND_TIMEOUT, stream.write_all(&line(&answer))).await?
}
