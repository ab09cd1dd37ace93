//! The tokio shell: accepts clients, leads them through the handshake, and hands them to a connection.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pss_gateway::throttle::SharedThrottle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::connection::Connection;
use crate::export::{Exports, Peer};
use crate::handshake::{Handshake, Output, Start};
use crate::listen::{Listener, Stream};

/// Most connections at a time, unless configured. One may keep about 200 MiB in the worst case, and
/// usually keeps less than one.
pub const CONNECTIONS_MAX: usize = 1024;
/// Time that a client has for its part of the handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for requests in flight when the server stops.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed `accept`, which fails again at once when file descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Receive buffer of the handshake.
const HANDSHAKE_RECEIVE_BYTES: usize = 4 << 10;

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections at a time; further ones are closed at once.
    pub connections_max: usize,
    /// Time that a client has for its part of the handshake.
    pub handshake_timeout: Duration,
    /// Time for requests in flight when the server stops.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_max: CONNECTIONS_MAX,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            stop_timeout: STOP_TIMEOUT,
        }
    }
}

/// An NBD server.
pub struct Server {
    exports: Arc<Exports>,
    limits: Limits,
    places: Arc<Semaphore>,
    crowded: SharedThrottle,
    stopping: watch::Sender<bool>,
}

impl Server {
    /// A server of these exports.
    pub fn new(exports: Arc<Exports>, limits: Limits) -> Arc<Server> {
        Arc::new(Server {
            exports,
            limits,
            places: Arc::new(Semaphore::new(limits.connections_max)),
            crowded: SharedThrottle::new(1),
            stopping: watch::Sender::new(false),
        })
    }

    /// Serves the clients of all listeners until `stop` is done, and then ends as [`Server::serve`] does.
    pub async fn run(self: Arc<Self>, listeners: Vec<Listener>, stop: impl Future<Output = ()>) {
        let mut serving = JoinSet::new();
        for listener in listeners {
            info!(uri = listener.uri("nbd"), "serving");
            serving.spawn(Arc::clone(&self).serve(listener));
        }
        stop.await;
        self.stop();
        serving.join_all().await;
    }

    /// Serves one client until it is gone or `stop` is done.
    pub async fn run_one(
        self: Arc<Self>,
        stream: Stream,
        peer: Peer,
        stop: impl Future<Output = ()>,
    ) {
        let mut serving = JoinSet::new();
        serving.spawn(Arc::clone(&self).serve_stream(stream, peer));
        tokio::select! {
            _ = serving.join_next() => return,
            () = stop => self.stop(),
        }
        self.wait_for(serving).await;
    }

    /// Serves the clients of a listener until [`Server::stop`], and returns when their requests in
    /// flight are answered, at the latest after the time that [`Limits`] give.
    pub async fn serve(self: Arc<Self>, listener: Listener) {
        let mut connections = JoinSet::new();
        let mut stopping = self.stopping.subscribe();
        loop {
            tokio::select! {
                () = stopped(&mut stopping) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let server = Arc::clone(&self);
                        connections.spawn(server.serve_stream(stream, peer));
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        self.wait_for(connections).await;
    }

    async fn wait_for(&self, mut connections: JoinSet<()>) {
        let all_ended = async { while connections.join_next().await.is_some() {} };
        let ended = timeout(self.limits.stop_timeout, all_ended).await;
        if ended.is_err() {
            let left = connections.len();
            warn!(left, "stopped with requests in flight");
        }
    }

    /// Serves one client.
    pub async fn serve_stream(self: Arc<Self>, mut stream: Stream, peer: Peer) {
        let Ok(_place) = Arc::clone(&self.places).try_acquire_owned() else {
            if let Some(more) = self.crowded.admit() {
                warn!(%peer, more, "too many connections");
            }
            return;
        };
        let mut input = BytesMut::with_capacity(HANDSHAKE_RECEIVE_BYTES);
        let mut stopping = self.stopping.subscribe();
        let start = tokio::select! {
            start = self.handshake(&mut stream, &mut input, peer) => start,
            () = stopped(&mut stopping) => return,
        };
        let Some(start) = start else {
            return;
        };
        let volume = start.export.name.clone();
        info!(%peer, volume, "connected");
        let mut connection = Connection::new(stream, input, start);
        let ending = tokio::select! {
            biased;
            ending = connection.run() => Some(ending),
            () = stopped(&mut stopping) => None,
        };
        let ending = match ending {
            Some(ending) => ending,
            None => {
                connection.stop();
                connection.run().await
            }
        };
        info!(%peer, volume, "{ending}");
    }

    /// Stops accepting, and ends all connections when their requests in flight are answered. Clients see
    /// the connection close, on which they reconnect; ESHUTDOWN would make them fail.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    async fn handshake(
        &self,
        stream: &mut Stream,
        input: &mut BytesMut,
        peer: Peer,
    ) -> Option<Start> {
        let mut handshake = Handshake::new();
        let mut deadline = Instant::now() + self.limits.handshake_timeout;
        loop {
            while let Some(output) = handshake.poll_output() {
                match output {
                    Output::Send(bytes) => {
                        let sent = timeout_at(deadline, stream.write_all(&bytes)).await;
                        if !matches!(sent, Ok(Ok(()))) {
                            debug!(%peer, "client left during the handshake");
                            return None;
                        }
                    }
                    // The time that the cell takes is not the client's.
                    Output::List => {
                        let asked = Instant::now();
                        handshake.handle_list(self.exports.list(peer).await);
                        deadline += asked.elapsed();
                    }
                    Output::Open(name) => {
                        let asked = Instant::now();
                        handshake.handle_open(self.exports.open(&name, peer).await);
                        deadline += asked.elapsed();
                    }
                    Output::Start(start) => return Some(start),
                    Output::Close(why) => {
                        debug!(%peer, "{why}");
                        return None;
                    }
                }
            }
            if handshake.handle_bytes(input) {
                continue;
            }
            input.reserve(HANDSHAKE_RECEIVE_BYTES);
            let received = timeout_at(deadline, stream.read_buf(input)).await;
            if !matches!(received, Ok(Ok(count)) if count > 0) {
                debug!(%peer, "client left during the handshake");
                return None;
            }
        }
    }
}

/// Ends when the server stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server is gone.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

#[cfg(test)]
mod tests;
