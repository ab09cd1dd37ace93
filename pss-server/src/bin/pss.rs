//! `pss`: looks at a cell and manages its volumes.

fn main() -> std::process::ExitCode {
    pss_server::cli::pss_main()
}
