//! A small NBD client for load: many requests in flight on one connection, simple replies.
//!
//! It is no part of what is tested and shares no code with it: constants and layouts are those of
//! `doc/proto.md` of NetworkBlockDevice/nbd.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, and no zeroes.
const CLIENT_FLAGS: u32 = 3;

/// `ENOSPC` on the wire.
pub const ENOSPC: u32 = 28;
/// `EIO` on the wire.
pub const EIO: u32 = 5;

/// What a client asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Command {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Say goodbye.
    Disconnect = 2,
    /// Make answered writes durable.
    Flush = 3,
    /// The content is not needed any more.
    Trim = 4,
    /// Make it read as zeroes.
    WriteZeroes = 6,
}

/// An answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reply {
    /// Of the request.
    pub cookie: u64,
    /// 0, or an error number.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// A connection in transmission.
pub struct NbdClient {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    size: u64,
    next_cookie: u64,
    /// Bytes that the answers carry if they are no errors.
    in_flight: HashMap<u64, u32>,
}

impl NbdClient {
    /// Connects and chooses an export. Nothing waits longer than `timeout` for a byte.
    ///
    /// # Errors
    /// Also if the server refuses, `ConnectionRefused` with its message.
    pub fn connect(address: SocketAddr, export: &str, timeout: Duration) -> io::Result<NbdClient> {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut client = NbdClient {
            reader: BufReader::with_capacity(64 << 10, stream.try_clone()?),
            stream,
            size: 0,
            next_cookie: 1,
            in_flight: HashMap::new(),
        };
        client.greet()?;
        client.go(export)?;
        Ok(client)
    }

    fn greet(&mut self) -> io::Result<()> {
        let greeting: [u8; 18] = self.array()?;
        if !greeting.starts_with(GREETING) {
            return Err(wrong("the greeting"));
        }
        self.stream.write_all(&CLIENT_FLAGS.to_be_bytes())
    }

    fn go(&mut self, export: &str) -> io::Result<()> {
        let length = export.len() as u32;
        let mut option = Vec::from(OPTION_MAGIC);
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&(length + 6).to_be_bytes());
        option.extend_from_slice(&length.to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        option.extend_from_slice(&[0, 0]);
        self.stream.write_all(&option)?;
        loop {
            if u64::from_be_bytes(self.array()?) != OPTION_REPLY_MAGIC {
                return Err(wrong("a reply to an option"));
            }
            let _option: [u8; 4] = self.array()?;
            let kind = u32::from_be_bytes(self.array()?);
            let length = u32::from_be_bytes(self.array()?);
            let mut data = vec![0; length as usize];
            self.reader.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO if data.starts_with(&INFO_EXPORT.to_be_bytes()) && data.len() >= 10 => {
                    let size = data[2..10].try_into().expect("eight bytes");
                    self.size = u64::from_be_bytes(size);
                }
                REPLY_INFO => {}
                _ => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
                }
            }
        }
    }

    /// Size of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The socket, for a client that misbehaves.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Requests without an answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sends a request. `payload` is that of a write, and empty otherwise. Returns its cookie.
    ///
    /// # Errors
    /// Of the socket.
    pub fn submit(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request.extend_from_slice(&[0, 0]);
        request.extend_from_slice(&(command as u16).to_be_bytes());
        request.extend_from_slice(&cookie.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(payload);
        let reads = if command == Command::Read { length } else { 0 };
        self.in_flight.insert(cookie, reads);
        self.stream.write_all(&request)?;
        Ok(cookie)
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// Of the socket; also if the bytes are no answer. The connection cannot be used afterwards.
    pub fn complete(&mut self) -> io::Result<Reply> {
        if u32::from_be_bytes(self.array()?) != SIMPLE_REPLY_MAGIC {
            return Err(wrong("a reply"));
        }
        let error = u32::from_be_bytes(self.array()?);
        let cookie = u64::from_be_bytes(self.array()?);
        let length = self.in_flight.remove(&cookie);
        let length = length.ok_or_else(|| wrong("an answer to something"))?;
        let mut data = vec![0; if error == 0 { length as usize } else { 0 }];
        self.reader.read_exact(&mut data)?;
        Ok(Reply {
            cookie,
            error,
            data,
        })
    }

    /// Sends a request and waits for its answer; there must be no other one in flight.
    ///
    /// # Errors
    /// See [`NbdClient::complete`].
    pub fn request(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<Reply> {
        self.submit(command, offset, length, payload)?;
        self.complete()
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not {what}"))
}
