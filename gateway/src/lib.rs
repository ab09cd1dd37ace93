//! What every front end with sockets needs, whatever its protocol: [`listen`] (sockets), [`peer`] (who
//! connects), [`sending`] (replies on their way), [`alarm`] (wake-ups), [`program`] (what the gateways'
//! programs have in common), [`user`] (who uses a program), [`notes`] (what was done to a gateway, among the events of the cell), [`text`] (other people's on a terminal), [`progress`] (bars on a terminal), [`logging`]
//! (stderr or syslog), [`throttle`] (log lines that strangers cause). [`memory`] is a volume in memory for tests.

pub mod alarm;
pub mod listen;
pub mod logging;
pub mod memory;
pub mod notes;
pub mod peer;
pub mod program;
pub mod progress;
pub mod sending;
pub mod text;
pub mod throttle;
pub mod user;
