//! The namespace of a cell: its volumes as a tree of chunk files, mounted through FUSE or looked at by scripts.
//!
//! ```text
//!   cli ── mount ── fuse (the kernel's requests)
//!    └──────────────┴── namespace (what is where) ── source (questions to the cell)
//! ```

pub mod cli;
pub mod error;
pub mod fuse;
pub mod mount;
pub mod namespace;
pub mod node;
pub mod source;
