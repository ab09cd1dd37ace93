//! `pss-up`: a whole cell with its NBD and iSCSI servers in one process, what `cargo run` starts.

fn main() -> std::process::ExitCode {
    pss_server::cli::pss_up_main()
}
