//! The UDP socket of a server: many datagrams with one system call.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use mio::net::UdpSocket;
use pss_core::wire::peer::DATAGRAM_BYTES_MAX;
use socket2::{Domain, Protocol, Socket, Type};

/// Datagrams that one call takes from the socket.
const BATCH: usize = 32;
/// Room for one; longer ones are none of ours and are cut.
const BUFFER_BYTES: usize = 2048;
/// Heartbeats must not get lost while the node thread is busy with a large batch of requests.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

const _: () = assert!(DATAGRAM_BYTES_MAX < BUFFER_BYTES);

/// Opens the socket.
pub(super) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )?;
    // The kernel may grant less; that is no reason not to start.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.bind(&address.into())?;
    Ok(UdpSocket::from_std(socket.into()))
}

/// Buffers for received datagrams.
pub(super) struct Batch {
    buffers: Box<[[u8; BUFFER_BYTES]; BATCH]>,
    lengths: [usize; BATCH],
    count: usize,
}

impl Batch {
    pub(super) fn new() -> Batch {
        Batch {
            buffers: Box::new([[0; BUFFER_BYTES]; BATCH]),
            lengths: [0; BATCH],
            count: 0,
        }
    }

    /// Receives what is there. Returns whether there may be more.
    pub(super) fn receive(&mut self, socket: &UdpSocket) -> io::Result<bool> {
        self.count = 0;
        match receive_many(socket, &mut self.buffers, &mut self.lengths) {
            Ok(count) => {
                self.count = count;
                Ok(count == BATCH)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => Ok(false),
                io::ErrorKind::Interrupted => Ok(true),
                _ => Err(error),
            },
        }
    }

    /// What was received, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let received = self.buffers.iter().zip(&self.lengths).take(self.count);
        received.map(|(buffer, length)| &buffer[..*length])
    }
}

#[expect(unsafe_code, reason = "std receives one datagram with each call")]
fn receive_many(
    socket: &UdpSocket,
    buffers: &mut [[u8; BUFFER_BYTES]; BATCH],
    lengths: &mut [usize; BATCH],
) -> io::Result<usize> {
    let mut parts = buffers.each_mut().map(|buffer| libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: BUFFER_BYTES,
    });
    let mut headers = parts.each_mut().map(|part| {
        // SAFETY: all fields of `mmsghdr` are integers and pointers, for which zero is a value.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_iov = part;
        header.msg_hdr.msg_iovlen = 1;
        header
    });
    // SAFETY: there are `BATCH` headers; each points to one part, and that to a buffer of the length
    // it says; all of them live through the call and nothing else uses them meanwhile.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            BATCH as libc::c_uint,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        )
    };
    let count = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for (length, header) in lengths.iter_mut().zip(&headers).take(count) {
        *length = (header.msg_len as usize).min(BUFFER_BYTES);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_come_in_batches() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let receiver = bind(any).unwrap();
        let sender = std::net::UdpSocket::bind(any).unwrap();
        let mut batch = Batch::new();
        assert!(!batch.receive(&receiver).unwrap());
        assert_eq!(batch.iter().count(), 0);
        for number in 0..BATCH as u8 + 3 {
            let sent = vec![number; usize::from(number)];
            sender
                .send_to(&sent, receiver.local_addr().unwrap())
                .unwrap();
        }
        assert!(batch.receive(&receiver).unwrap());
        assert_eq!(batch.iter().nth(7).unwrap(), [7; 7]);
        assert_eq!(batch.iter().count(), BATCH);
        assert!(!batch.receive(&receiver).unwrap());
        assert_eq!(batch.iter().last().unwrap(), [34; 34]);
        let long = vec![1; BUFFER_BYTES + 1];
        sender
            .send_to(&long, receiver.local_addr().unwrap())
            .unwrap();
        batch.receive(&receiver).unwrap();
        assert_eq!(batch.iter().next().unwrap().len(), BUFFER_BYTES);
    }
}
