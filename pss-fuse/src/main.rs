//! `pss-fuse`: the namespace of a cell as a file system, and for scripts. Also `mount.fuse.pss` and `PFSClient`, by
//! links of these names.

use std::process::ExitCode;

fn main() -> ExitCode {
    pss_fuse::cli::main()
}
