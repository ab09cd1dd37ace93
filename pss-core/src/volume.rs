//! Volumes: from byte ranges to blocks and chunks, and the interface of the front ends.

pub mod device;
pub mod map;
pub mod reservation;
