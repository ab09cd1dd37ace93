//! Where clients come from: TCP and unix sockets, our own or inherited, and standard input.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::peer::Peer;

/// A client that does not answer for one minute and three probes is gone.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 3;
const BACKLOG: u32 = 1024;

/// A socket that clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// Over TCP.
    Tcp(TcpListener),
    /// On this machine; the file is removed at the end if we made it.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// Its file.
        made: Option<PathBuf>,
    },
}

impl Listener {
    /// Listens on a TCP address.
    pub fn tcp(address: SocketAddr) -> io::Result<Listener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            // An address of one family says nothing about the other.
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG as i32)?;
        socket.set_nonblocking(true)?;
        Ok(Listener::Tcp(TcpListener::from_std(socket.into())?))
    }

    /// Listens on a unix socket. The file of a server that is gone is replaced.
    pub fn unix(path: &Path) -> io::Result<Listener> {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
        if is_socket {
            match std::os::unix::net::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path)?;
                }
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        Ok(Listener::Unix {
            socket: UnixListener::bind(path)?,
            made: Some(path.to_owned()),
        })
    }

    /// The sockets that a service manager or an NBD client passed (`LISTEN_PID`, `LISTEN_FDS`).
    pub fn inherited() -> io::Result<Vec<Listener>> {
        sd_notify::listen_fds()?
            .map(|fd| Listener::from_socket(take_fd(fd).into()))
            .collect()
    }

    fn from_socket(socket: Socket) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        if socket.domain()? == Domain::UNIX {
            let socket = UnixListener::from_std(socket.into())?;
            Ok(Listener::Unix { socket, made: None })
        } else {
            Ok(Listener::Tcp(TcpListener::from_std(socket.into())?))
        }
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Listener::Tcp(listener) => Stream::from_tcp(listener.accept().await?.0),
            Listener::Unix { socket, .. } => Stream::from_unix(socket.accept().await?.0),
        }
    }

    /// Where it listens, as the start of an URI of a scheme.
    pub fn uri(&self, scheme: &str) -> String {
        match self {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("{scheme}://{address}/"),
                Err(_) => format!("{scheme}://"),
            },
            Listener::Unix { socket, .. } => {
                let address = socket.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                let path = path.unwrap_or(Path::new("")).display();
                format!("{scheme}+unix:///?socket={path}")
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix {
            made: Some(path), ..
        } = self
        {
            // Best effort: a file that stays is replaced at the next start.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[expect(unsafe_code, reason = "a file descriptor number from the environment")]
fn take_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: sd_notify::listen_fds checked that these descriptors are open and were passed to this
    // process; main calls this once, so nothing else owns them.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// On this machine.
    Unix(UnixStream),
}

impl Stream {
    /// The connection on standard input, as inetd and NBD clients that start their server make it.
    pub fn stdio() -> io::Result<(Stream, Peer)> {
        let socket = Socket::from(io::stdin().as_fd().try_clone_to_owned()?);
        let domain = socket.domain().map_err(|_| {
            let text = "standard input is not a socket; inetd or a client must start this";
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        socket.set_nonblocking(true)?;
        if domain == Domain::UNIX {
            Stream::from_unix(UnixStream::from_std(socket.into())?)
        } else {
            Stream::from_tcp(TcpStream::from_std(socket.into())?)
        }
    }

    /// The TCP connection, if it is one.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(stream) => Some(stream),
            Stream::Unix(_) => None,
        }
    }

    fn from_tcp(stream: TcpStream) -> io::Result<(Stream, Peer)> {
        // "TCP_NODELAY SHOULD be set": replies go out in batches of our own making.
        stream.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(KEEPALIVE_EVERY)
            .with_retries(KEEPALIVE_PROBES);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let peer = Peer::Ip(stream.peer_addr()?.ip());
        Ok((Stream::Tcp(stream), peer))
    }

    fn from_unix(stream: UnixStream) -> io::Result<(Stream, Peer)> {
        let credentials = stream.peer_cred()?;
        let peer = Peer::Unix {
            uid: credentials.uid(),
            gid: credentials.gid(),
        };
        Ok((Stream::Unix(stream), peer))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_have_no_delay_and_are_kept_alive() {
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.uri("nbd");
        let address = address.trim_start_matches("nbd://").trim_end_matches('/');
        let _client = TcpStream::connect(address).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        assert_eq!(peer, Peer::Ip([127, 0, 0, 1].into()));
        let Stream::Tcp(stream) = stream else {
            panic!("not TCP");
        };
        // "TCP_NODELAY SHOULD be set" on both sides.
        assert!(stream.nodelay().unwrap());
        assert!(SockRef::from(&stream).keepalive().unwrap());
    }
}
