//! `pssd`: a PSS server.

fn main() -> std::process::ExitCode {
    pss_server::cli::pssd_main()
}
