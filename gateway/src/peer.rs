//! Who connects, and from where.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Who asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peer {
    /// A client over TCP.
    Ip(IpAddr),
    /// A client on this machine, over a unix socket.
    Unix {
        /// User id of the process.
        uid: u32,
        /// Group id of the process.
        gid: u32,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Ip(address) => write!(f, "{address}"),
            Peer::Unix { uid, gid } => write!(f, "unix uid {uid} gid {gid}"),
        }
    }
}

/// Addresses that share their first bits: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Not a network.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NotANetwork;

impl fmt::Display for NotANetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an ADDRESS or ADDRESS/BITS")
    }
}

impl std::error::Error for NotANetwork {}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Network {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Network, NotANetwork> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NotANetwork)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().map_err(|_| NotANetwork)?,
            None => most,
        };
        if bits > most {
            return Err(NotANetwork);
        }
        Ok(Network { address, bits })
    }
}

impl Network {
    /// Whether an address lies in it. A dual-stack socket shows IPv4 clients as `::ffff:a.b.c.d`.
    pub fn contains(self, peer: IpAddr) -> bool {
        match (self.address, peer.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(peer)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                (network.to_bits() ^ peer.to_bits()) & mask == 0
            }
            (IpAddr::V6(network), IpAddr::V6(peer)) => {
                let mask = u128::MAX
                    .checked_shl(128 - u32::from(self.bits))
                    .unwrap_or(0);
                (network.to_bits() ^ peer.to_bits()) & mask == 0
            }
            _ => false,
        }
    }
}
