//! `/etc/init.d/pssd` with programs that only seem to be `pss`, `pssd` and `systemctl`: what it does when they fail.
//! What it does when they work is in `transcripts/manual.trycmd`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A server that stops when it is told to, and writes down that it was started. It fails where a file `fails-ID` is;
/// where `other-ID` is, its number soon belongs to another program, and somebody else answers at its address.
const PSSD: &str = r#"
echo "start $3${6:+ $(shift 5; echo "$*")}" >>"$STAGE/calls"
[ -e "$STAGE/fails-$3" ] && { echo "it fails" >&2; exit 1; }
[ -e "$STAGE/other-$3" ] && exec sh -c 'touch "$STAGE/up-$0"; sleep 1; echo "it fails later"' "$3"
trap 'rm "$STAGE/up-$3"; echo "stop $3" >>"$STAGE/calls"; exit 0' TERM
touch "$STAGE/up-$3"
while :; do sleep 0.05; done
"#;

/// Servers answer while they run; the cell is as the file `status` says, once it was asked as often as `lag` says.
const PSS: &str = r#"
[ "$1" = server ] && { [ -e "$STAGE/up-$3" ]; exit; }
echo "$*" >>"$STAGE/calls"
lag=$(cat "$STAGE/lag" 2>/dev/null || echo 0)
[ "$lag" -gt 0 ] && { echo $((lag - 1)) >"$STAGE/lag"; echo '{ "all_current": false }'; exit 0; }
cat "$STAGE/status"
"#;

/// Knows units of the servers, and carries out everything at once.
const SYSTEMCTL: &str = r#"
case $1 in
    list-unit-files) echo 'pssd@.service enabled' ;;
    is-active) [ -e "$STAGE/active-$3" ]; exit ;;
    *) echo "systemctl $*" >>"$STAGE/calls" ;;
esac
"#;

struct Stage {
    directory: tempfile::TempDir,
}

impl Stage {
    /// With so many servers, all on this machine.
    fn new(servers: u8) -> Stage {
        let stage = Stage {
            directory: tempfile::tempdir().unwrap(),
        };
        let lines: String = (0..servers)
            .map(|id| format!("{id} 127.0.0.1 /p{id}\n"))
            .collect();
        stage.write("server.conf", &lines);
        stage.write("status", "{ \"all_current\": true }\n");
        fs::create_dir(stage.path("bin")).unwrap();
        stage.program("pss", PSS);
        stage.program("pssd", PSSD);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    fn program(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the programs have noted, which is then forgotten.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        calls.lines().map(str::to_owned).collect()
    }

    fn command(&self, words: &str) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../packaging/manual/etc/init.d/pssd")
            .canonicalize()
            .unwrap();
        let mut command = Command::new("sh");
        let path = std::env::var("PATH").unwrap();
        command
            .arg(script)
            .args(words.split(' '))
            .current_dir(self.directory.path())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("STAGE", self.directory.path())
            .env("PSS_SERVERS", self.path("server.conf"))
            .env("PSS_RUN_DIR", self.path("run"))
            .env("PSS_LOG_DIR", self.path("log"))
            .env("PSS_DEFAULTS", self.path("none"))
            .env("PSS_SYSTEMD", self.path("systemd"))
            .env_remove("PSS_YES")
            .env("PSS_WAIT", "10");
        command
    }

    fn run(&self, words: &str) -> (i32, String) {
        text_of(self.command(words).output().unwrap())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.command("stop").output().unwrap();
    }
}

/// The exit code, and what was said.
fn text_of(output: Output) -> (i32, String) {
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8(said).unwrap(),
    )
}

/// Somebody answers and a process of that number is there, or was; but no server of that list.
#[test]
fn a_server_that_has_ended_is_not_called_running() {
    let stage = Stage::new(1);
    stage.write("other-0", "");
    let (code, said) = stage.run("start");
    assert_eq!(code, 1, "{said}");
    assert!(
        said.starts_with("pssd: server 0 did not start: it fails later; see "),
        "{said}"
    );
    assert_eq!(stage.run("status").0, 3);
    fs::remove_file(stage.path("other-0")).unwrap();
    stage.write("fails-0", "");
    let (code, said) = stage.run("start");
    assert_eq!(code, 1, "{said}");
    assert!(
        said.starts_with("pssd: server 0 did not start: it fails; see "),
        "{said}"
    );
}

/// Wherever it is called, and however the list is named, the servers are the same.
#[test]
fn a_relative_list_of_servers() {
    let stage = Stage::new(1);
    let at = |directory: &str, list: &str, words: &str| {
        let mut command = stage.command(words);
        command
            .current_dir(stage.path(directory))
            .env("PSS_SERVERS", list);
        text_of(command.output().unwrap())
    };
    assert_eq!(at("", "server.conf", "start").0, 0);
    for (directory, list) in [
        ("bin", "../server.conf"),
        ("", "./server.conf"),
        ("", "bin/../server.conf"),
    ] {
        let (code, said) = at(directory, list, "start");
        assert_eq!(code, 0, "{said}");
        assert!(
            said.starts_with("pssd: server 0 is running already, pid"),
            "{list}: {said}"
        );
    }
    assert!(stage.run("stop").1.contains("server 0 has stopped"));
    assert_eq!(stage.calls(), ["start 0", "stop 0"]);
    let (code, said) = at("", "nowhere/server.conf", "start");
    assert_eq!(code, 6);
    assert!(
        said.starts_with("pssd: nowhere/server.conf: cannot read"),
        "{said}"
    );
}

#[test]
fn restart_waits_until_the_copies_are_current() {
    let stage = Stage::new(3);
    assert_eq!(stage.run("start").0, 0);
    assert_eq!(stage.calls(), ["start 0", "start 1", "start 2"]);
    stage.write("lag", "2");
    let (code, said) = stage.run("restart");
    assert_eq!(code, 0, "{said}");
    let status = "status --json";
    assert_eq!(
        stage.calls(),
        [
            "stop 0", "start 0", status, status, status, "stop 1", "start 1", status, "stop 2",
            "start 2"
        ]
    );
}

#[test]
fn restart_leaves_the_others_alone_where_copies_stay_behind() {
    let stage = Stage::new(2);
    assert_eq!(stage.run("start").0, 0);
    stage.calls();
    stage.write(
        "status",
        "{ \"all_current\": false, \"summary\": \"Server 7 is behind.\" }\n",
    );
    let mut restart = stage.command("restart");
    let (code, said) = text_of(restart.env("PSS_CATCH_UP", "1").output().unwrap());
    assert_eq!(code, 1, "{said}");
    let last = "pssd: not all copies are current 1 s after server 0 was restarted; left alone: 1; see 'pss status'\n";
    assert!(said.ends_with(last), "{said}");
    let calls = stage.calls();
    assert!(!calls.contains(&"stop 1".to_owned()), "{calls:?}");
    assert_eq!(stage.run("status").0, 0);
}

/// With units, what runs by the script is stopped by it, and only then the units come in.
#[test]
fn a_server_that_the_script_has_started_is_its_own() {
    let stage = Stage::new(2);
    let mut start = stage.command("start");
    assert_eq!(text_of(start.env("PSS_IDS", "1").output().unwrap()).0, 0);
    assert_eq!(stage.calls(), ["start 1"]);
    fs::create_dir(stage.path("systemd")).unwrap();
    stage.program("systemctl", SYSTEMCTL);
    let (code, said) = stage.run("status");
    assert_eq!(code, 3);
    assert!(said.contains("server 0 is not running (pssd@0)"), "{said}");
    assert!(said.contains("server 1 is running, pid"), "{said}");
    let (code, said) = stage.run("stop");
    let told = "pssd: server 0 has stopped (pssd@0)\npssd: server 1 has stopped\n";
    assert_eq!((code, said.as_str()), (0, told));
    assert_eq!(stage.calls(), ["systemctl stop pssd@0.service", "stop 1"]);
    assert_eq!(stage.run("start").0, 0);
    assert_eq!(
        stage.calls(),
        [
            "systemctl start pssd@0.service",
            "systemctl start pssd@1.service"
        ]
    );
}

/// Where nothing runs there is nothing to wait for, and the copies are current only when all do.
#[test]
fn restart_starts_what_is_stopped() {
    let stage = Stage::new(3);
    stage.write("status", "{ \"all_current\": false }\n");
    let (code, said) = stage.run("restart");
    assert_eq!(code, 0, "{said}");
    assert_eq!(stage.calls(), ["start 0", "start 1", "start 2"]);
}

/// The only server of a machine has nobody to wait for.
#[test]
fn restart_of_one_does_not_ask() {
    let stage = Stage::new(1);
    assert_eq!(stage.run("start").0, 0);
    assert_eq!(stage.run("restart").0, 0);
    assert_eq!(stage.calls(), ["start 0", "stop 0", "start 0"]);
}

#[test]
fn restart_ends_with_the_first_failure() {
    let stage = Stage::new(3);
    assert_eq!(stage.run("start").0, 0);
    stage.calls();
    stage.write("fails-1", "");
    let (code, said) = stage.run("restart");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("server 1 did not start: it fails"), "{said}");
    let last = "pssd: server 1 could not be restarted; left alone: 2\n";
    assert!(said.ends_with(last), "{said}");
    let calls = stage.calls();
    assert_eq!(
        calls,
        ["stop 0", "start 0", "status --json", "stop 1", "start 1"]
    );
    assert!(stage.run("status").1.contains("server 2 is running"));
}

/// The data of all servers here but the named one are dropped, after a question, and never of two at once.
#[test]
fn restart_autonomic_drops_data_one_after_the_other() {
    let stage = Stage::new(3);
    assert_eq!(stage.run("start").0, 0);
    stage.calls();
    // Nobody can be asked here.
    let (code, said) = stage.run("restart autonomic 1");
    assert_eq!(code, 2, "{said}");
    let asked = "pssd: All data of these servers of this machine are dropped, one after the other, and taken from server 1: 0 2. \
                 Nothing was done: there is no terminal to ask on; set PSS_YES=1 to say yes\n";
    assert_eq!(said, asked);
    assert!(stage.calls().is_empty());
    let yes = |words: &str| {
        let mut command = stage.command(words);
        text_of(command.env("PSS_YES", "1").output().unwrap())
    };
    let (code, said) = yes("restart autonomic 1");
    assert_eq!(code, 0, "{said}");
    let status = "status --json";
    assert_eq!(
        stage.calls(),
        [
            "stop 0",
            "start 0 --restart autonomic 1 --yes",
            status,
            "stop 1",
            "start 1",
            status,
            "stop 2",
            "start 2 --restart autonomic 1 --yes"
        ]
    );
    // From the leader. The next one is left alone while the one before has not got its data.
    stage.write("status", "{ \"all_current\": false }\n");
    let mut restart = stage.command("restart autonomic");
    restart.env("PSS_CATCH_UP", "1").env("PSS_YES", "1");
    let (code, said) = text_of(restart.output().unwrap());
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("left alone: 1 2"), "{said}");
    let calls = stage.calls();
    assert_eq!(calls[..2], ["stop 0", "start 0 --restart autonomic --yes"]);
    assert!(!calls.iter().any(|call| call.contains(" 1")), "{calls:?}");
    // What is stopped loses its data as well, so it waits, too.
    stage.run("stop");
    stage.calls();
    let mut restart = stage.command("restart autonomic");
    restart.env("PSS_CATCH_UP", "1").env("PSS_YES", "1");
    assert_eq!(text_of(restart.output().unwrap()).0, 1);
    assert_eq!(stage.calls()[0], "start 0 --restart autonomic --yes");
}

/// A unit says itself how it is started.
#[test]
fn restart_autonomic_of_units_is_done_by_hand() {
    let stage = Stage::new(2);
    fs::create_dir(stage.path("systemd")).unwrap();
    stage.program("systemctl", SYSTEMCTL);
    let (code, said) = stage.run("restart autonomic 1");
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("'pssd start --id N --restart autonomic 1'"),
        "{said}"
    );
    assert!(stage.calls().is_empty());
}
