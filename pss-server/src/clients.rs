//! Connections of clients: how much each of them may have under way.
//!
//! A client that sends faster than it is served, or does not read its answers, is not read from until
//! that has changed; TCP then stops it. The bounds are generous: they protect the server's memory from
//! one client, not its speed.

use pss_core::wire::client::{Browse, Request, RequestBody};
use pss_core::wire::frame::SendQueue;

/// Clients at once. Gateways hold one connection or a few each, and a cell has dozens of them.
pub(crate) const CLIENTS_MAX: usize = 1024;
/// Requests of one client that are not answered: more than any queue depth that gateways use.
const REQUESTS_IN_FLIGHT_MAX: usize = 1024;
/// Requests from this size on are counted by their bytes, too.
const LARGE_REQUEST_BYTES: usize = 64 << 10;
/// Bytes of large requests of one client that are not answered: 64 of the longest.
const LARGE_BYTES_IN_FLIGHT_MAX: usize = 64 << 20;
/// A list of volumes, directories, chunks or events counts as so much.
const LIST_BYTES: usize = 256 << 10;
/// Questions about the server's inside that are not answered, if a client asks nothing else.
const INSPECTIONS_IN_FLIGHT_MAX: usize = 2;
/// Answers that a client has not taken.
const UNSENT_BYTES_MAX: usize = 16 << 20;

/// What a client has under way.
#[derive(Debug)]
pub(crate) struct ClientLoad {
    /// What it calls itself.
    pub(crate) name: String,
    requests: usize,
    /// Tags and sizes of the large ones; few, so a list is faster than a map.
    large: Vec<(u64, usize)>,
    large_bytes: usize,
}

impl ClientLoad {
    pub(crate) fn new(name: String) -> ClientLoad {
        ClientLoad {
            name,
            requests: 0,
            large: Vec::new(),
            large_bytes: 0,
        }
    }

    /// A request was received.
    pub(crate) fn begin(&mut self, request: &Request) {
        self.requests += 1;
        let bytes = match request.body.unchecked() {
            RequestBody::Read { length_bytes, .. }
            | RequestBody::Browse {
                what: Browse::Read { length_bytes, .. },
                ..
            } => *length_bytes as usize,
            // The answers may be as long.
            RequestBody::Browse {
                what: Browse::Volumes | Browse::Directories { .. } | Browse::Chunks { .. },
                ..
            }
            | RequestBody::Events { .. } => LIST_BYTES,
            // The node thread itself looks, and the answers are long.
            RequestBody::Inspect(_) => LARGE_BYTES_IN_FLIGHT_MAX / INSPECTIONS_IN_FLIGHT_MAX,
            RequestBody::Write { data, .. } | RequestBody::CompareAndWrite { data, .. } => {
                data.len()
            }
            _ => 0,
        };
        if bytes >= LARGE_REQUEST_BYTES {
            self.large.push((request.tag, bytes));
            self.large_bytes += bytes;
        }
    }

    /// Requests that are not answered.
    pub(crate) fn under_way(&self) -> usize {
        self.requests
    }

    /// A request was answered.
    pub(crate) fn end(&mut self, tag: u64) {
        self.requests = self.requests.saturating_sub(1);
        if let Some(index) = self.large.iter().position(|(large, _)| *large == tag) {
            let (_, bytes) = self.large.swap_remove(index);
            self.large_bytes -= bytes;
        }
    }

    /// Whether no more is read from the client for now.
    pub(crate) fn is_full(&self, unsent: &SendQueue) -> bool {
        self.requests >= REQUESTS_IN_FLIGHT_MAX
            || self.large_bytes >= LARGE_BYTES_IN_FLIGHT_MAX
            || unsent.len_bytes() >= UNSENT_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use pss_core::types::{RequestNumber, SessionId, VolumeId};

    use super::*;

    fn read(tag: u64, length_bytes: u32) -> Request {
        Request {
            tag,
            session: SessionId(1),
            number: RequestNumber(0),
            settled_below: RequestNumber(0),
            body: RequestBody::Read {
                volume: VolumeId(1),
                offset_bytes: 0,
                length_bytes,
            },
        }
    }

    #[test]
    fn many_small_requests_fill() {
        let (mut load, unsent) = (ClientLoad::new(String::new()), SendQueue::new());
        for tag in 0..REQUESTS_IN_FLIGHT_MAX as u64 {
            assert!(!load.is_full(&unsent));
            load.begin(&read(tag, 4096));
        }
        assert!(load.is_full(&unsent));
        load.end(7);
        assert!(!load.is_full(&unsent));
    }

    #[test]
    fn whoever_browses_is_bounded_as_well() {
        let (mut load, unsent) = (ClientLoad::new(String::new()), SendQueue::new());
        let volume = VolumeId(1);
        let read = Browse::Read {
            volume,
            offset_bytes: 0,
            length_bytes: 1 << 20,
        };
        let browse = |tag, what: &Browse| Request {
            session: SessionId(0),
            body: RequestBody::Browse {
                stale: true,
                what: what.clone(),
            },
            ..super::tests::read(tag, 0)
        };
        for tag in 0..63 {
            load.begin(&browse(tag, &read));
        }
        for tag in 63..67 {
            assert!(!load.is_full(&unsent));
            load.begin(&browse(tag, &Browse::Directories { volume }));
        }
        assert!(load.is_full(&unsent));
        load.end(63);
        assert!(!load.is_full(&unsent));
    }

    #[test]
    fn few_large_requests_fill() {
        let (mut load, unsent) = (ClientLoad::new(String::new()), SendQueue::new());
        for tag in 0..64 {
            assert!(!load.is_full(&unsent));
            load.begin(&read(tag, 1 << 20));
        }
        assert!(load.is_full(&unsent));
        load.end(1000);
        assert!(load.is_full(&unsent));
        load.end(63);
        assert!(!load.is_full(&unsent));
    }
}
