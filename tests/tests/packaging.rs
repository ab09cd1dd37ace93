//! The package `pss-manual` as dpkg installs it, and its script `/etc/init.d/pssd` on machines of several kinds: with
//! systemd, with syslog, with a user of their own for the servers.
//!
//! systemd and `/dev/log` are shown to the script in mount namespaces, which only root can make.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pss_tests::binaries;
use pss_tests::package::{self, Package, outcome, run};
use pss_tests::processes::wait_until;
use pss_tests::programs::Bench;

const SOON: Duration = Duration::from_secs(30);

/// In a mount namespace, has the directory $1 for /dev; the usual devices are in it.
const WITH_DEV: &str = r#"
for name in null zero full random urandom tty; do
    : >"$1/$name" && mount --bind "/dev/$name" "$1/$name" || exit 99
done
mount --rbind "$1" /dev || exit 99
shift
exec "$@"
"#;

/// In a mount namespace, has a /run as systemd leaves it.
const WITH_SYSTEMD: &str = r#"
mount -t tmpfs none /run && mkdir -p /run/systemd/system || exit 99
exec "$@"
"#;

/// systemctl as far as the script uses it: notes how it is called, and starts and stops servers as units would.
const SYSTEMCTL: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$*" >>"$here/calls"
id=${2#pssd@}
id=${id%.service}
runs() { [ -e "$here/$id.pid" ] && kill -0 "$(cat "$here/$id.pid")" 2>/dev/null; }
stop() { ! runs || kill "$(cat "$here/$id.pid")"; while runs; do sleep 0.1; done; }
start() {
    pssd start --id "$id" </dev/null >>"$here/log" 2>&1 &
    echo $! >"$here/$id.pid"
    until pss --timeout 1s server probe "$id" accept >/dev/null 2>&1; do runs || return 1; sleep 0.1; done
}
case $1 in
    list-unit-files) [ ! -e "$here/no-units" ] && echo 'pssd@.service disabled enabled' ;;
    is-active) id=${3#pssd@} && id=${id%.service} && runs ;;
    start) [ ! -e "$here/broken$id" ] && { runs || start; } ;;
    stop) stop ;;
    restart) stop && start ;;
    *) exit 1 ;;
esac
"#;

/// A command in a mount namespace that a shell script prepares.
fn in_namespace(prepare: &str, args: &[&Path], command: &Command) -> Command {
    assert!(
        rustix::process::geteuid().is_root(),
        "mount namespaces need root: run the tests as root"
    );
    let mut within = Command::new("unshare");
    within.args(["--mount", "sh", "-c", prepare, "sh"]);
    within.args(args);
    within.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => within.env(name, value),
            None => within.env_remove(name),
        };
    }
    within
}

/// A bench with a cell of servers on one address, formatted.
fn formatted(host: &str, servers: u8) -> Bench {
    let bench = Bench::new();
    let path = |id: u8| bench.path(&format!("PFS-{id}"));
    let line = |id: u8| format!("{id} {host} {}\n", path(id).display());
    let lines: String = (0..servers).map(line).collect();
    bench.servers(lines);
    for id in 0..servers {
        bench.run("pssd", &format!("format --id {id}")).done();
    }
    bench
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

// ---- the package ----

/// A system for `dpkg --root`, empty but for dpkg's own files.
struct System(PathBuf);

impl System {
    fn new(bench: &Bench) -> System {
        let root = bench.path("system");
        let admin = root.join("var/lib/dpkg");
        for directory in ["info", "updates"] {
            fs::create_dir_all(admin.join(directory)).unwrap();
        }
        fs::write(admin.join("status"), "").unwrap();
        System(root)
    }

    fn dpkg(&self, args: &[&str]) -> Command {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", self.0.display()));
        command.args(args).env("LC_ALL", "C");
        // dpkg looks for programs of administrators.
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command
    }
}

/// A package of links to programs under test, in place of one that is not built here.
fn stand_in(bench: &Bench, name: &str, programs: &[&str]) -> String {
    let tree = bench.path(name);
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    fs::create_dir_all(tree.join("usr/bin")).unwrap();
    for program in programs {
        symlink(binaries::path(program), tree.join("usr/bin").join(program)).unwrap();
    }
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@localhost>\nDescription: x\n"
    );
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let file = bench.path(&format!("{name}.deb")).display().to_string();
    run(Command::new("dpkg-deb")
        .args(["--build", "--root-owner-group"])
        .arg(tree)
        .arg(&file));
    file
}

#[test]
fn dpkg_installs_and_removes_it() {
    let bench = Bench::new();
    let system = System::new(&bench);
    let deb = package::build(&bench.path("debs")).display().to_string();

    // Without the packages that its links lead to, it is not configured.
    let alone = outcome(&mut system.dpkg(&["-i", &deb]));
    assert!(!alone.0.status.success());
    assert!(
        alone.stderr().contains("depends on pss-server"),
        "{}",
        alone.stderr()
    );
    let server = stand_in(&bench, "pss-server", &["pss", "pssd"]);
    let fuse = stand_in(&bench, "pss-fuse", &["pss-fuse"]);
    run(&mut system.dpkg(&["-i", &server, &fuse, &deb]));
    let status = run(&mut system.dpkg(&["-s", "pss-manual"]));
    assert!(status.contains("Status: install ok installed"), "{status}");
    assert!(status.contains(&format!("Version: {}\n", env!("CARGO_PKG_VERSION"))));
    assert!(
        status.contains("Conffiles:\n /etc/init.d/pssd "),
        "{status}"
    );

    // Everything in it belongs to root, and nobody else can write to it.
    let listed = run(Command::new("dpkg-deb").args(["-c", &deb]));
    for line in listed.lines() {
        let mut words = line.split_whitespace();
        let mode = words.next().unwrap();
        assert_eq!(words.next(), Some("root/root"), "{line}");
        assert!(
            ["drwxr-xr-x", "-rwxr-xr-x", "lrwxrwxrwx"].contains(&mode),
            "{line}"
        );
    }

    // Every link leads to a program, which knows it by that name.
    let bin = system.0.join("usr/bin");
    let programs = ["pss", "pss-fuse", "pssd"];
    let links = names(&bin);
    let links = links.iter().filter(|name| !programs.contains(&&***name));
    assert_eq!(links.clone().count(), 9);
    for link in links {
        let target = fs::read_link(bin.join(link)).unwrap();
        assert!(target == Path::new("pss") || target == Path::new("pss-fuse"));
        let help = run(Command::new(bin.join(link)).arg("--help"));
        let name = link.trim_end_matches(".sh");
        assert!(help.contains(&format!("Usage: {name}")), "{link}: {help}");
    }
    let script = system.0.join("etc/init.d/pssd");
    run(Command::new("sh").arg("-n").arg(&script));
    assert_eq!(
        fs::metadata(&script).unwrap().permissions().mode() & 0o777,
        0o755
    );

    // What was changed in the script outlives the package, but not its purge.
    run(&mut system.dpkg(&["-r", "pss-manual"]));
    assert_eq!(names(&bin), programs);
    assert!(script.exists());
    run(&mut system.dpkg(&["-P", "pss-manual"]));
    assert!(!script.exists());
}

// ---- systemd ----

/// A systemctl that is found before any other. What it has started is stopped when this is dropped.
struct Systemctl(PathBuf);

impl Systemctl {
    fn new(bench: &Bench) -> Systemctl {
        let directory = bench.path("fake");
        fs::create_dir(&directory).unwrap();
        let program = directory.join("systemctl");
        fs::write(&program, SYSTEMCTL).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Systemctl(directory)
    }

    /// The script on a machine that has systemd.
    fn script(&self, package: &Package, args: &str) -> Command {
        let script = package.script_with(args);
        let mut command = in_namespace(WITH_SYSTEMD, &[], &script);
        let path = std::env::var("PATH").unwrap();
        let (fake, bin) = (self.0.display(), package.bin());
        command.env("PATH", format!("{fake}:{}:{path}", bin.display()));
        command
    }

    /// How it was called since the last look, but for the question which units there are.
    fn calls(&self) -> Vec<String> {
        let file = self.0.join("calls");
        let text = fs::read_to_string(&file).unwrap_or_default();
        fs::write(&file, "").unwrap();
        let calls = text
            .lines()
            .filter(|call| !call.starts_with("list-unit-files"));
        calls.map(str::to_owned).collect()
    }

    fn pid(&self, id: u8) -> Option<String> {
        let text = fs::read_to_string(self.0.join(format!("{id}.pid"))).ok()?;
        Some(text.trim().to_owned())
    }
}

impl Drop for Systemctl {
    fn drop(&mut self) {
        for pid in (0..8).filter_map(|id| self.pid(id)) {
            // It may have been stopped.
            let _ = Command::new("kill").arg(pid).output();
        }
    }
}

#[test]
fn with_units_the_script_leaves_it_to_systemd() {
    let bench = formatted("127.0.92.1", 3);
    let package = Package::unpack(&bench);
    let systemctl = Systemctl::new(&bench);
    let script = |args: &str| outcome(&mut systemctl.script(&package, args));

    let stopped = script("status");
    assert_eq!(stopped.0.status.code(), Some(3), "{}", stopped.stderr());
    let not = |id| format!("pssd: server {id} is not running (pssd@{id})\n");
    assert_eq!(stopped.stdout(), [0, 1, 2].map(not).concat());
    systemctl.calls();

    let each = |verb: &str| [0, 1, 2].map(|id| format!("{verb} pssd@{id}.service"));
    let runs = [0, 1, 2].map(|id| format!("pssd: server {id} is running (pssd@{id})\n"));
    let started = script("start");
    assert_eq!(started.done().stdout(), runs.concat());
    assert_eq!(systemctl.calls(), each("start"));
    wait_until("the cell works", SOON, || {
        bench.run("pss", "status").0.status.success()
    });
    assert_eq!(script("status").done().stdout(), runs.concat());
    assert_eq!(systemctl.calls(), each("is-active --quiet"));
    // The script has started nothing by itself.
    assert!(!package.logs().exists());

    // Before the next one that runs is touched, the copies must be current.
    let [first, second, third] = each("restart");
    let [_, asked, asked_too] = each("is-active --quiet");
    let restarts = [first, asked, second, asked_too, third];
    let before = systemctl.pid(0);
    assert_eq!(script("restart").done().stdout(), runs.concat());
    assert_eq!(systemctl.calls(), restarts);
    assert_ne!(systemctl.pid(0), before);
    let autonomic = script("restart autonomic 2");
    autonomic.fails(2, &["with units pssd@ID it is done by hand"]);
    assert!(systemctl.calls().is_empty());

    let ended = script("stop");
    let has = |id| format!("pssd: server {id} has stopped (pssd@{id})\n");
    assert_eq!(ended.done().stdout(), [0, 1, 2].map(has).concat());
    assert_eq!(systemctl.calls(), each("stop"));

    // One that fails is told, and does not keep the others from it.
    fs::write(systemctl.0.join("broken1"), "").unwrap();
    let broken = script("start");
    assert_eq!(broken.0.status.code(), Some(1));
    assert_eq!(broken.stdout(), [&*runs[0], &*runs[2]].concat());
    assert_eq!(
        broken.stderr(),
        "pssd: systemctl start pssd@1 failed; see 'systemctl status pssd@1'\n"
    );
    script("stop").done();
}

#[test]
fn without_units_the_script_starts_servers_itself() {
    let bench = formatted("127.0.92.2", 1);
    let package = Package::unpack(&bench);
    let systemctl = Systemctl::new(&bench);
    fs::write(systemctl.0.join("no-units"), "").unwrap();
    let started = outcome(&mut systemctl.script(&package, "start"));
    let said = started.done().stdout();
    assert!(
        said.starts_with("pssd: server 0 is running, pid "),
        "{said}"
    );
    assert!(systemctl.calls().is_empty());
    bench.run("pss", "server probe 0 accept").done();
}

// ---- a user of their own ----

#[test]
fn servers_run_as_the_user_that_is_set() {
    assert!(
        rustix::process::geteuid().is_root(),
        "servers can be started as another user by root only: run the tests as root"
    );
    let bench = formatted("127.0.92.3", 1);
    bench.run("pss", "key new cell.key").done();
    bench.run("pssd", "format --id 0 --force").done();
    let package = Package::unpack(&bench);
    // That user can read neither the test's directory nor, maybe, the one that the programs are built in.
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let program = package.bin().join("pssd");
    fs::remove_file(&program).unwrap();
    fs::copy(binaries::path("pssd"), &program).unwrap();
    let script = |user: &str, args: &str| {
        let mut command = package.script_with(args);
        outcome(command.env("PSS_USER", user))
    };

    script("nosuchuser", "start").fails(
        2,
        &["pssd: PSS_USER is 'nosuchuser': there is no such user\n"],
    );
    // Root has formatted the directory and made the key, which nobody cannot read then.
    let refused = script("nobody", "start");
    assert_eq!(refused.0.status.code(), Some(1));
    let said = refused.stderr();
    assert!(
        said.starts_with("pssd: server 0 did not start: pssd: ")
            && said.contains("ermission denied"),
        "{said}"
    );
    run(Command::new("chown")
        .args(["-R", "nobody"])
        .arg(bench.path("PFS-0"))
        .arg(bench.path("cell.key")));

    let started = script("nobody", "start");
    let said = started.done().stdout();
    let pid = said
        .trim()
        .strip_prefix("pssd: server 0 is running, pid ")
        .unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.starts_with("Name:\tpssd\n"), "{status}");
    let nobody = fs::metadata(bench.path("PFS-0")).unwrap().uid();
    let all = format!("Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}\n");
    assert!(nobody != 0 && status.contains(&all), "{status}");
    assert!(!status.contains("Gid:\t0\t"), "{status}");
    let groups = status.lines().find(|line| line.starts_with("Groups:"));
    let mut groups = groups.unwrap().split_whitespace().skip(1);
    assert!(groups.all(|group| group != "0"), "{status}");
    for file in names(&bench.path("PFS-0")) {
        let owner = fs::metadata(bench.path("PFS-0").join(&file)).unwrap().uid();
        assert_eq!(owner, nobody, "{file}");
    }
    bench.run("pss", "volume create vol001 1G").done();

    // That user alone cannot stop what is root's, nor start for another.
    let mut command = package.script_with("start");
    let other = ["--reuid=nobody", "--regid=65534", "--clear-groups"];
    let mut as_nobody = Command::new("setpriv");
    as_nobody
        .args(other)
        .arg(command.get_program())
        .arg("restart");
    for (name, value) in command.env("PSS_USER", "root").get_envs() {
        if let Some(value) = value {
            as_nobody.env(name, value);
        }
    }
    outcome(&mut as_nobody).fails(
        4,
        &["only root can start servers as user root, as PSS_USER says"],
    );

    let restarted = script("nobody", "restart").done().stdout();
    assert!(
        restarted.starts_with("pssd: server 0 has stopped\n"),
        "{restarted}"
    );
    script("nobody", "stop").done();
    let log = fs::read_to_string(package.logs().join(&names(&package.logs())[0])).unwrap();
    assert!(log.contains("stops"), "{log}");
}

// ---- syslog ----

#[test]
fn lines_in_syslog_have_the_tag_of_the_manual() {
    let bench = formatted("127.0.92.4", 1);
    let package = Package::unpack(&bench);
    let dev = bench.path("dev");
    fs::create_dir(&dev).unwrap();
    let syslog = UnixDatagram::bind(dev.join("log")).unwrap();
    syslog.set_read_timeout(Some(SOON)).unwrap();
    let script = |args: &str| {
        let mut script = package.script_with(args);
        script.env_remove("PSS_LOG_DIR");
        outcome(&mut in_namespace(WITH_DEV, &[&dev], &script))
    };
    let started = script("start");
    let said = started.done().stdout();
    let pid = said
        .trim()
        .strip_prefix("pssd: server 0 is running, pid ")
        .unwrap();
    script("stop").done();
    let mut lines = Vec::new();
    let mut message = [0; 16 << 10];
    while !lines
        .last()
        .is_some_and(|line: &String| line.contains("stops"))
    {
        let length = syslog.recv(&mut message).unwrap();
        lines.push(String::from_utf8_lossy(&message[..length]).into_owned());
    }
    // Facility daemon (3 times 8) and the severity, the time, no host, tag (RFC 3164, §4.1).
    let tag = format!(" pssd_0[{pid}]: ");
    for line in &lines {
        let severity: u8 = line[1..3].parse().unwrap();
        assert!((24..32).contains(&severity), "{line}");
        let (head, text) = line
            .split_once(&tag)
            .unwrap_or_else(|| panic!("no{tag}in {line}"));
        assert_eq!(head.len(), "<30>Dec  1 03:04:05".len(), "{line}");
        assert!(!text.contains("pssd_0"), "{line}");
    }
    let about = |part: &str| lines.iter().any(|line| line.contains(part));
    assert!(
        about("no cell key") && about("runs at 127.0.92.4:4010"),
        "{lines:#?}"
    );
    assert!(!package.logs().exists());

    // Why it does not start is told on the spot as well.
    fs::remove_dir_all(bench.path("PFS-0")).unwrap();
    script("start").fails(
        1,
        &[
            "pssd: server 0 did not start: pssd: ",
            "prepare it with 'pssd format --id 0'",
            "; see syslog, tag pssd_0\n",
        ],
    );
    let length = syslog.recv(&mut message).unwrap();
    let line = String::from_utf8_lossy(&message[..length]).into_owned();
    assert!(line.contains(" pssd_0["), "{line}");
}
