//! NBD server over any `BlockDevice`.
