//! `pss-tgtadm`: tgt's tgtadm before pss-iscsi. It may be linked as `tgtadm`.

fn main() -> std::process::ExitCode {
    export_iscsi::tgt::admin::main()
}
