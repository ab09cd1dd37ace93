//! A client that does only what it is told.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::thread::JoinHandle;

use pss_core::types::{RequestNumber, SessionId};
use pss_core::wire::auth::{Handshake, HandshakeConfig, MacKey, Role};
use pss_core::wire::client::{Reply, Request, RequestBody};
use pss_core::wire::frame::{Frame, FrameLimits, FrameReader, SendQueue};

use super::TestCell;

pub(crate) struct RawClient {
    pub(crate) stream: TcpStream,
    reader: FrameReader,
    out: SendQueue,
}

/// Connects to a server and shakes hands.
pub(crate) fn connect(cell: &TestCell, id: u8) -> RawClient {
    let config = HandshakeConfig {
        cell: Some(cell.id),
        key: cell.key.as_ref().map(MacKey::new),
        role: Role::Client("raw".to_owned()),
        wanted: None,
    };
    let mut client = RawClient {
        stream: TcpStream::connect(cell.tcp(id)).unwrap(),
        reader: FrameReader::new(FrameLimits::REPLIES),
        out: SendQueue::new(),
    };
    let mut handshake = Handshake::client(config, [5; 32], &mut client.out);
    client.send().unwrap();
    let welcome = client.frame();
    let peer = handshake.handle_frame(&welcome, &mut client.out).unwrap();
    assert!(peer.is_some());
    client
}

impl RawClient {
    pub(crate) fn queue(&mut self, tag: u64, body: RequestBody) {
        let request = Request {
            tag,
            session: SessionId(0),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            body,
        };
        request.encode(&mut self.out);
    }

    pub(crate) fn send(&mut self) -> io::Result<()> {
        send(&mut self.stream, &mut self.out)
    }

    /// Sends what is left while this thread may read.
    pub(crate) fn send_rest(&mut self) -> JoinHandle<()> {
        let mut stream = self.stream.try_clone().unwrap();
        let mut out = std::mem::take(&mut self.out);
        std::thread::spawn(move || {
            stream.set_write_timeout(None).unwrap();
            send(&mut stream, &mut out).unwrap();
        })
    }

    fn frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.reader.poll_frame().unwrap() {
                return frame;
            }
            let count = self.stream.read(self.reader.spare()).unwrap();
            assert_ne!(count, 0, "the server has closed the connection");
            self.reader.filled(count);
        }
    }

    pub(crate) fn reply(&mut self) -> Reply {
        Reply::decode(self.frame()).unwrap()
    }
}

fn send(stream: &mut TcpStream, out: &mut SendQueue) -> io::Result<()> {
    while !out.is_empty() {
        let mut slices = [IoSlice::new(&[]); 64];
        let used = out.as_io_slices(&mut slices);
        let count = stream.write_vectored(&slices[..used])?;
        out.advance(count);
    }
    Ok(())
}
