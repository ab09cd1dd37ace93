//! Agreement core, log, chunk store and volume layer of PSS.
//!
//! Pure, without IO, clock, threads or randomness: [`paxos`], [`state`], [`entry`], [`volume::map`] and
//! [`wire`], [`throttle`]. On files, through the one seam [`disk::Disk`]: the log and the chunk store. On sockets, with
//! tokio: `client` only. What people write: [`servers`] (server.conf), [`key`] (the cell key), [`size`].

pub mod chunk;
pub mod client;
pub mod disk;
pub mod engine;
pub mod entry;
pub mod key;
pub mod log;
pub mod members;
pub mod paxos;
pub mod payload;
pub mod servers;
pub mod size;
pub mod state;
pub mod storage;
pub mod throttle;
pub mod time;
pub mod types;
pub mod volume;
pub mod wire;
