//! The program `pss-iscsi`, without a cell that answers.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const GOOD: &str = "\
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store vol001>
    bs-type pss
    lun 1
  </backing-store>
  incominguser iscsi_pss iscsi_pss000
</target>
";

/// A directory with a server.conf of a server that does not run, and a targets.conf.
fn directory(targets: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("server.conf"), "0 127.0.9.78 /pss\n").unwrap();
    std::fs::write(directory.path().join("targets.conf"), targets).unwrap();
    directory
}

fn run(directory: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pss-iscsi"));
    command
        .current_dir(directory)
        .args(["--servers", "server.conf", "--config", "targets.conf"])
        .args(arguments)
        .env_remove("PSS_KEY")
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null());
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let said = [stdout, stderr].concat();
    (status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn a_good_configuration_is_checked() {
    let directory = directory(GOOD);
    let (code, said) = run(directory.path(), &["--check"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("targets.conf: 1 target with 1 disk\n"),
        "{said}"
    );
}

#[test]
fn a_wrong_configuration_is_named_with_file_and_line() {
    let directory = directory(&GOOD.replace("bs-type pss", "bs-type rdwr\n    wibble 1"));
    let (code, said) = run(directory.path(), &["--portal", "127.0.9.78:0"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("targets.conf:3: bs-type rdwr"), "{said}");
    assert!(
        said.contains("targets.conf:4: unknown directive `wibble`"),
        "{said}"
    );
}

#[test]
fn a_configuration_that_is_not_there() {
    let directory = directory(GOOD);
    std::fs::remove_file(directory.path().join("targets.conf")).unwrap();
    let (code, said) = run(directory.path(), &["--check"]);
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with("pss-iscsi: targets.conf: cannot read"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_portal_that_is_taken() {
    let directory = directory(GOOD);
    let taken = TcpListener::bind("127.0.9.78:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, said) = run(directory.path(), &["--portal", &address]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains(&format!("cannot serve on portal {address}")),
        "{said}"
    );
}

#[test]
fn a_portal_that_is_no_address() {
    let directory = directory(GOOD);
    let (code, said) = run(directory.path(), &["--portal", "nowhere"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("write an ADDRESS, ADDRESS:PORT"), "{said}");
}
