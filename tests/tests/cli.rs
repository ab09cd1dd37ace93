//! The real programs with wrong input: every message names the place and what to do, exit codes are as
//! documented, stdout stays clean, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pss_tests::binaries;
use pss_tests::programs::{Bench, Outcome};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn wrong_server_conf_names_file_and_line() {
    let bench = Bench::new();
    for (text, parts) in [
        (
            "0 a /p\n0 b /p\n",
            [
                "server.conf:2: server id 0 is already used in line 1",
                "its own id",
            ],
        ),
        (
            "# x\n\n8 a /p\n",
            ["server.conf:3: server id 8 is above 7", "0 to 4"],
        ),
        (
            "0 127.0.0.1\n",
            ["server.conf:1: the path is missing", "0 127.0.0.1 /pss"],
        ),
        (
            "0 no-such-host.invalid /p\n",
            [
                "server.conf:1: the name 'no-such-host.invalid'",
                "/etc/hosts",
            ],
        ),
        (
            "hello\n",
            ["server.conf:1: 'hello' is no server id", "ID HOST PATH"],
        ),
        (
            "0 a /p q r\n",
            ["server.conf:1: 'q' follows the path", "ID HOST PATH"],
        ),
        ("", ["server.conf: lists no server", "ID HOST PATH"]),
        (
            "5 127.0.0.1 /p\n",
            ["server.conf: lists no core server", "0 to 4"],
        ),
    ] {
        bench.servers(text);
        bench.run("pssd", "start --id 0").fails(2, &parts);
        bench.run("pssd", "format --id 0").fails(2, &parts);
        bench.run("pss", "status").fails(2, &parts);
    }
    bench.servers(b"\x7fELF\x00\xff\xfe");
    let parts = ["server.conf:1: not UTF-8"];
    bench.run("pss", "status").fails(2, &parts);
}

#[test]
fn missing_server_conf() {
    let bench = Bench::new();
    fs::remove_file(bench.path("server.conf")).unwrap();
    let parts = ["server.conf: cannot read", "--servers", "PSS_SERVERS"];
    bench.run("pss", "volume list").fails(2, &parts);
    bench.run("pssd", "start --id 0").fails(2, &parts);
    let outcome = bench.run("pss", "--servers /nonexistent/conf status");
    outcome.fails(2, &["/nonexistent/conf: cannot read"]);
}

#[test]
fn server_that_is_not_listed() {
    let bench = Bench::new();
    let parts = ["does not list server 4", "0, 1 and 2"];
    bench.run("pssd", "start --id 4").fails(2, &parts);
    bench.run("pssd", "format --id 4").fails(2, &parts);
    bench.run("pss", "server shutdown 4").fails(3, &parts);
}

#[test]
fn without_key_only_loopback() {
    let bench = Bench::new();
    bench.servers("0 127.0.0.1 /pss\n\n1 192.0.2.7 /pss\n");
    let parts = ["server.conf:3: server 1", "192.0.2.7", "pss key new"];
    bench
        .run("pssd", "format --id 0 --path data")
        .fails(2, &parts);
    bench
        .run("pssd", "start --id 0 --path data")
        .fails(2, &parts);
    assert!(!bench.path("data").exists());
    bench.run("pss", "key new cell.key").done();
    bench.run("pssd", "format --id 0 --path data").done();
}

#[test]
fn key_files() {
    let bench = Bench::new();
    bench.run("pss", "key new sub/cell.key").done();
    let key = bench.path("sub/cell.key");
    assert_eq!(mode(&key), 0o600);
    let content = fs::read(&key).unwrap();
    assert_eq!(content.len(), 65);
    bench
        .run("pss", "key new sub/cell.key")
        .fails(4, &["sub/cell.key: exists already"]);
    assert_eq!(fs::read(&key).unwrap(), content);

    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let parts = ["sub/cell.key: the cell key has mode 0644", "chmod 600"];
    bench
        .run("pss", "--key sub/cell.key status")
        .fails(2, &parts);
    bench
        .run("pssd", "start --id 0 --key sub/cell.key")
        .fails(2, &parts);
    // Found beside server.conf, it must be as good.
    fs::copy(&key, bench.path("cell.key")).unwrap();
    bench
        .run("pss", "status")
        .fails(2, &["cell.key: the cell key has mode 0644"]);

    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "not a key").unwrap();
    bench
        .run("pss", "--key sub/cell.key status")
        .fails(2, &["sub/cell.key: not a cell key", "pss key new"]);
    bench
        .run("pss", "--key none.key status")
        .fails(2, &["none.key: cannot read the cell key", "pss key new"]);
}

#[test]
fn format_keeps_what_is_there() {
    let bench = Bench::new();
    let data = bench.path("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("precious"), "x").unwrap();
    bench
        .run("pssd", "format --id 0 --path data")
        .fails(1, &["data: not empty", "precious", "--force"]);
    assert_eq!(fs::read(data.join("precious")).unwrap(), b"x");

    fs::write(bench.path("file"), "y").unwrap();
    bench
        .run("pssd", "format --id 0 --path file --force")
        .fails(1, &["file: not a directory"]);
    assert_eq!(fs::read(bench.path("file")).unwrap(), b"y");

    bench.run("pssd", "format --id 0 --path new/data").done();
    bench
        .run("pssd", "format --id 0 --path new/data")
        .fails(1, &["new/data: not empty", "--force"]);
    bench
        .run("pssd", "format --id 0 --path new/data --force")
        .done();
}

#[test]
fn all_servers_of_a_cell_format_themselves_alike() {
    let bench = Bench::new();
    let cell = |args: &str| {
        let outcome = bench.run("pssd", args);
        let text = outcome.done().stderr();
        text.split("of cell ").nth(1).unwrap()[..36].to_owned()
    };
    let first = cell("format --id 0 --path d0");
    assert_eq!(first, cell("format --id 1 --path d1"));
    bench.run("pss", "key new cell.key").done();
    let keyed = cell("format --id 0 --path k0");
    assert_ne!(keyed, first);
    assert_eq!(keyed, cell("format --id 2 --path k2"));
    let given = "0cc1d6a2-54d2-4e64-b2a7-91f1e51ae6a6";
    assert_eq!(
        given,
        cell(&format!("format --id 1 --path g1 --cell {given}"))
    );
    bench
        .run("pssd", "format --id 1 --path g2 --cell 0cc1")
        .fails(2, &["32 hexadecimal digits"]);
}

#[test]
fn start_says_what_is_wrong_before_it_opens_a_port() {
    let bench = Bench::new();
    bench
        .run("pssd", "start --id 0 --segment-size 5K")
        .fails(2, &["--segment-size", "8M to 4G"]);
    bench
        .run("pssd", "start --id 0 --checkpoint-size 1M")
        .fails(2, &["--checkpoint-size"]);
    bench
        .run("pssd", "start --id 0 --log-retain 10X")
        .fails(2, &["unknown unit 'X'"]);
    bench.run("pssd", "start").fails(2, &["--id"]);
    bench.run("pssd", "start --id x").fails(2, &["--id"]);
    let output = binaries::command("pssd")
        .args(["start", "--id", "0", "--log", "syslog"])
        .env("PSS_SERVERS", bench.path("server.conf"))
        .env("PSS_SYSLOG_SOCKET", bench.path("none"))
        .output()
        .unwrap();
    Outcome(output).fails(1, &["no syslog at", "--log stderr"]);
}

#[test]
fn wrong_sizes_and_names() {
    let bench = Bench::new();
    let long = "x".repeat(65);
    for (args, parts) in [
        (vec!["v", "10X"], vec!["unknown unit 'X'", "K, M, G"]),
        (vec!["v", "0"], vec!["'0' is zero"]),
        (vec!["v", "10GB"], vec!["ambiguous", "10G or 10GiB"]),
        (vec!["v", "1.5G"], vec!["1536M"]),
        (vec!["v", "65T"], vec!["65T", "at most 64T"]),
        (vec!["v", "99999999999999999999"], vec!["too large"]),
        (vec!["v", "1000"], vec!["multiple of 512", "use 1024"]),
        (
            vec!["a/b", "1G"],
            vec!["volume name 'a/b'", "1 to 64 bytes"],
        ),
        (vec!["..", "1G"], vec!["volume name '..'"]),
        (vec!["", "1G"], vec!["volume name ''"]),
        (vec![&long, "1G"], vec!["volume name 'xxx", "1 to 64 bytes"]),
        (
            vec!["v", "1G", "--chunk-size", "3M"],
            vec!["--chunk-size 3M", "power of two"],
        ),
        (
            vec!["v", "2T", "--chunk-size", "64K"],
            vec!["larger --chunk-size"],
        ),
    ] {
        let args = [vec!["volume", "create"], args].concat();
        bench.run_args("pss", &args).fails(2, &parts);
    }
    bench
        .run("pss", "volume resize v +10GB")
        .fails(2, &["ambiguous"]);
    bench
        .run("pss", "--timeout never volume list")
        .fails(2, &["--timeout", "such as 10s"]);
}

#[test]
fn nobody_answers() {
    let bench = Bench::new();
    let none = ["none of 3 core servers answers", "2 are needed"];
    for args in [
        "volume list",
        "volume create v 1G",
        "volume show v",
        "volume resize v 1G",
        "volume delete v --yes",
    ] {
        let args = format!("--timeout 300ms {args}");
        bench.run("pss", &args).fails(6, &none);
    }
    bench
        .run("pss", "server shutdown 1 --timeout 300ms")
        .fails(6, &["server 1 does not answer at 127.9.9.2:4011"]);

    let status = bench.run("pss", "status --timeout 300ms");
    assert_eq!(status.0.status.code(), Some(6));
    let text = status.stdout();
    assert!(
        text.starts_with("No majority: none of 3 core servers answers; 2 are needed."),
        "{text}"
    );
    assert!(text.contains("127.9.9.3:4012"), "{text}");
    let status = bench.run("pss", "status --json --timeout 300ms");
    assert_eq!(status.0.status.code(), Some(6));
    let value: serde_json::Value = serde_json::from_slice(&status.0.stdout).unwrap();
    assert_eq!(value["schema"], "pss.status/1");
    assert_eq!(value["works"], false);
    // What the file says can be listed without anybody.
    let list = bench.run("pss", "server list --json --timeout 300ms");
    let value: serde_json::Value = serde_json::from_slice(&list.done().0.stdout).unwrap();
    assert_eq!(value["servers"][2]["address"], "127.9.9.3");
    assert_eq!(value["servers"][2]["answers"], false);
}

#[test]
fn usage() {
    let bench = Bench::new();
    for (program, args) in [
        ("pss", ""),
        ("pss", "frobnicate"),
        ("pss", "volume create v"),
        ("pss", "status --bogus"),
        ("pssd", ""),
        ("pssd", "format"),
    ] {
        bench.run(program, args).fails(2, &["Usage"]);
    }
    for program in ["pss", "pssd"] {
        let help = bench.run(program, "--help");
        assert!(help.done().stdout().contains("Exit codes:\n  0  "));
        bench.run(program, "--version").done();
    }
    let help = bench.run("pss", "--help").stdout();
    assert!(help.contains("6  no majority"), "{help}");
}

#[test]
fn up_with_wrong_input() {
    let bench = Bench::new();
    for (args, parts) in [
        ("--count 2", vec!["1, 3, 5"]),
        ("--volume vol001", vec!["NAME:SIZE"]),
        ("--volume vol001:10X", vec!["unknown unit"]),
        ("--volume a/b:1G", vec!["volume name 'a/b'"]),
        ("--volume v:65T", vec!["at most 64T"]),
        ("--nbd nonsense", vec!["--nbd"]),
    ] {
        let args = format!("--dir d {args}");
        bench.run("pss-up", &args).fails(2, &parts);
        bench.run("pss", &format!("up {args}")).fails(2, &parts);
        assert!(!bench.path("d").exists());
    }
    bench
        .run_args("pss-up", &["--dir", "with blank"])
        .fails(2, &["blank", "another --dir"]);
    fs::write(bench.path("file"), "x").unwrap();
    bench.run("pss-up", "--dir file").fails(1, &["file"]);
    // The list of servers that an operator wrote is not overwritten.
    fs::create_dir(bench.path("mine")).unwrap();
    let mine = bench.path("mine/server.conf");
    fs::write(&mine, "0 paxos00 /pss\n").unwrap();
    bench
        .run("pss-up", "--dir mine")
        .fails(2, &["mine/server.conf", "another --dir"]);
    assert_eq!(fs::read(&mine).unwrap(), b"0 paxos00 /pss\n");
}

#[test]
fn shells_and_manuals_know_every_program() {
    let bench = Bench::new();
    let programs = ["pss", "pssd", "pss-up", "pss-nbd", "pss-iscsi", "pss-fuse"];
    for shell in ["bash", "zsh", "fish"] {
        let one = bench.run("pss", &format!("completions {shell} pss-fuse"));
        assert!(one.done().stdout().contains("metadata-ttl"), "{shell}");
        bench
            .run("pss", &format!("completions {shell} --out {shell}"))
            .done();
        let files = fs::read_dir(bench.path(shell)).unwrap().count();
        assert_eq!(files, programs.len(), "{shell}");
    }
    let script = bench.path("bash/pss.bash");
    let status = std::process::Command::new("bash")
        .arg("-c")
        .arg(". \"$0\" && COMP_WORDS=(pss volume cre) COMP_CWORD=2 && _pss pss cre volume && echo ${COMPREPLY[*]}")
        .arg(&script)
        .output()
        .unwrap();
    let completed = String::from_utf8(status.stdout).unwrap();
    assert_eq!(completed.trim(), "create");

    bench.run("pss", "man --out man").done();
    for (page, part) in [
        ("pss.1", "Examples"),
        ("pssd.8", "Exit codes"),
        ("pss-nbd.8", "unix"),
        ("pss-iscsi.8", "portal"),
        ("pss-volume-create.1", "chunk"),
        ("pss-fuse-mount.1", "metadata"),
    ] {
        let text = fs::read_to_string(bench.path("man").join(page)).unwrap();
        assert!(
            text.contains(".TH ") && text.contains(part),
            "{page}: {text}"
        );
    }
    let hidden = bench.path("man/pss-fuse-watch.1");
    assert!(!hidden.exists());
    let page = bench.run("pss", "man pssd").done().stdout();
    assert!(page.contains(".TH pssd 8"), "{page}");
    bench
        .run("pss", "man sh")
        .fails(2, &["no program sh", "pss-nbd"]);
    bench.run("pss", "completions tcsh").fails(2, &["tcsh"]);
    fs::write(bench.path("file"), "").unwrap();
    bench.run("pss", "man --out file").fails(1, &["file"]);
}

#[test]
fn configurations_are_checked() {
    let bench = Bench::new();
    let check = |file: &str| bench.run("pss", &format!("config check {file}"));
    let said = check("server.conf").done().stdout();
    assert!(said.contains("3 servers decide; any 1 may fail"), "{said}");
    assert!(said.contains("warning: the cell has no key"), "{said}");
    fs::write(
        bench.path("four"),
        "0 127.0.0.1 /a\n1 127.0.0.1 /b\n2 127.0.0.2 /c\n3 127.0.0.3 /d\n6 127.0.0.4 /e\n",
    )
    .unwrap();
    let said = check("four").done().stdout();
    for part in [
        "4 servers decide, 1 more holds copies; any 1 may fail",
        "warning: 4 servers decide",
        "servers 0 and 1 are on one machine",
    ] {
        assert!(said.contains(part), "no '{part}' in {said}");
    }
    fs::write(bench.path("wrong"), "0 127.0.0.1 /a\n9 127.0.0.1 /b\n").unwrap();
    check("wrong").fails(2, &["wrong:2", "above 7"]);
    check("none").fails(2, &["none"]);
    fs::write(bench.path("open"), "0 192.0.2.1 /a\n").unwrap();
    check("open").fails(2, &["open:1", "no key", "pss key new"]);

    let target =
        "<target iqn.2001-03.jp.tritech:a>\n  backing-store vol001\n  bs-type pss\n</target>\n";
    fs::write(bench.path("targets.conf"), target).unwrap();
    let said = check("targets.conf").done().stdout();
    assert!(said.contains("1 target with 1 disk"), "{said}");
    fs::write(bench.path("other"), format!("{target}colour red\n")).unwrap();
    check("other").fails(2, &["other:5", "colour"]);
    fs::write(bench.path("pss.toml"), "colour = 1\n").unwrap();
    check("pss.toml").fails(2, &["pss.toml", "colour"]);
    let json = bench.run("pss", "config check four --json").done().stdout();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["schema"], "pss.config.check/1");
    assert_eq!(json["warnings"].as_array().unwrap().len(), 3);
}
