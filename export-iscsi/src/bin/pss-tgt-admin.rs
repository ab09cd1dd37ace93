//! `pss-tgt-admin`: tgt's tgt-admin before pss-iscsi. It may be linked as `tgt-admin`.

fn main() -> std::process::ExitCode {
    export_iscsi::tgt::batch::main()
}
