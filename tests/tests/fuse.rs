//! `pss-fuse` against cells of processes: for scripts, and mounted. Mounts take root and /dev/fuse.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pss_tests::binaries::{self, tool};
use pss_tests::fuse::{Mount, is_mounted};
use pss_tests::nbd_client::{self, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};
use pss_tests::programs::terminal;
use pss_tests::rng::Rng;
use rustix::fs::SeekFrom;
use serde_json::Value;

#[path = "fuse/fsx.rs"]
mod fsx;

const MIB: u64 = 1 << 20;
/// Of a volume's chunk, by default.
const CHUNK: u64 = 4 * MIB;
/// What a person takes for a hang.
const HANG: Duration = Duration::from_secs(20);

fn write(client: &mut NbdClient, offset: u64, data: &[u8]) {
    let reply = client.request(nbd_client::Command::Write, offset, data.len() as u32, data);
    assert_eq!(reply.unwrap().error, 0);
}

fn random(rng: &mut Rng, length: usize) -> Vec<u8> {
    (0..length).map(|_| rng.next() as u8).collect()
}

/// Runs a tool that must succeed, and gives what it prints.
fn run(program: &str, package: &str, args: &[&str]) -> String {
    let output = Command::new(tool(program, package))
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(cell: &Cell, args: &str) -> Value {
    let outcome = cell.bench.run("pss-fuse", args);
    serde_json::from_str(&outcome.done().stdout()).unwrap()
}

/// A cell whose volume `v` has data in chunks 0, 1 and 300, and what they are.
fn with_data(servers: u8) -> (Cell, Vec<(u64, Vec<u8>)>) {
    let cell = Cell::started(Layout::small(servers), "2G");
    let mut rng = Rng::new(7);
    let mut client = cell.client(0);
    let data = [
        (4096, 3 * MIB as usize),
        (CHUNK + 512, 1000),
        (300 * CHUNK, 8192),
    ]
    .map(|(offset, length)| (offset, random(&mut rng, length)));
    for (offset, data) in &data {
        write(&mut client, *offset, data);
    }
    (cell, data.into())
}

/// The bytes of a file that a range of the volume's data should be.
fn expected(data: &[(u64, Vec<u8>)], from: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (offset, data) in data {
        for (at, byte) in data.iter().enumerate() {
            let place = (offset + at as u64).checked_sub(from);
            if let Some(place) = place.filter(|place| *place < length as u64) {
                bytes[place as usize] = *byte;
            }
        }
    }
    bytes
}

/// Kills two of three servers, the leader among them: it would go on to answer reads until its lease ends.
fn keep_a_follower(cell: &mut Cell) -> u8 {
    let leader = cell.leader();
    cell.kill(leader);
    cell.kill((leader + 1) % 3);
    (leader + 2) % 3
}

#[test]
fn scripts_see_the_namespace() {
    let (cell, data) = with_data(3);
    let run = |args: &str| cell.bench.run("pss-fuse", args);
    let lines = |args: &str| run(args).done().stdout();
    assert_eq!(lines("ls"), "v\n");
    assert_eq!(lines("ls -a /"), ".volumes\nv\n");
    assert_eq!(lines("ls /.volumes"), "v\n");
    assert_eq!(lines("readdir /v/00"), "00\n01\n");
    assert_eq!(lines("ls v/00/01/"), "2c\n");
    assert_eq!(lines("ls -0 /v/00/00"), "00\x0001\0");
    assert_eq!(
        lines("ls -R"),
        "v\nv/00\nv/00/00\nv/00/00/00\nv/00/00/01\nv/00/01\nv/00/01/2c\n"
    );
    let listed = json(&cell, "ls --json /v/00/00");
    assert_eq!(listed["entries"][0]["size_bytes"], CHUNK);
    assert_eq!(listed["entries"][0]["allocated_bytes"], 3 * MIB);
    assert_eq!(listed["entries"][1]["allocated_bytes"], 4096);
    assert_eq!(listed["stale"], Value::Null);

    let shown = lines("stat /v/00/00/01");
    assert!(shown.contains("current on servers 0, 1, 2"), "{shown}");
    assert_eq!(
        lines("stat -c %s:%b:%F /v/00/01/2c"),
        format!("{CHUNK}:16:chunk\n")
    );
    let shown = json(&cell, "stat --json --digest /v/00/00/00 /v");
    let digest = shown["files"][0]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(shown["files"][1]["size_bytes"], 2048 * MIB);

    // To a file, which stays sparse, and its digest is that of other programs.
    run("read /v/00/00/00 out").done();
    let out = cell.bench.path("out");
    assert_eq!(fs::read(&out).unwrap(), expected(&data, 0, CHUNK as usize));
    assert!(fs::metadata(&out).unwrap().blocks() * 512 <= 3 * MIB + 64 * 1024);
    let sum = self::run("sha256sum", "coreutils", &[text(&out)]);
    assert!(sum.starts_with(&digest), "{sum} {digest}");
    let part = run("cat /.volumes/v --offset 4M --length 2000").0;
    assert_eq!(part.stdout, expected(&data, CHUNK, 2000));
    run("read /v/00/00/01 --offset 4194304 --out out").done();
    assert_eq!(fs::metadata(&out).unwrap().len(), 0);

    let map = json(&cell, "map --json /.volumes/v");
    let kinds: Vec<(u64, &str)> = map["extents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| {
            (
                extent["length_bytes"].as_u64().unwrap(),
                extent["kind"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        kinds[..3],
        [(4096, "hole"), (3 * MIB, "data"), (MIB - 4096, "hole")]
    );
    let total: u64 = kinds.iter().map(|(length, _)| length).sum();
    assert_eq!(total, 2048 * MIB);
    assert_eq!(
        lines("map /v/00/01/2c")
            .lines()
            .next()
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>(),
        ["0", "8192", "data"]
    );

    // A reader that takes its time is no failure of the cell.
    let mut slow = cell.bench.command("pss-fuse");
    slow.args("--timeout 1s read /.volumes/v --length 64M".split(' '));
    let mut slow = slow.stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let mut bytes = Vec::new();
    slow.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
    assert!(slow.wait().unwrap().success());
    assert!(bytes == expected(&data, 0, 64 << 20));

    // By the old name, as the 2011 manual has it.
    let old = cell.bench.path("PFSClient");
    symlink(binaries::path("pss-fuse"), &old).unwrap();
    let old = |args: &[&str]| {
        let output = Command::new(&old)
            .args(args)
            .env("PSS_SERVERS", cell.bench.path("server.conf"))
            .current_dir(cell.bench.path(""))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    assert_eq!(old(&["readdir", "/"]), b"v\n");
    assert!(old(&["stat", "/v"]).starts_with(b"     path: /v\n"));
    old(&["read", "/v/00/00/01", "file1"]);
    let file1 = fs::read(cell.bench.path("file1")).unwrap();
    assert_eq!(file1, expected(&data, CHUNK, CHUNK as usize));
}

#[test]
fn scripts_are_told_what_is_wrong() {
    let (mut cell, _) = with_data(3);
    let fuse = |cell: &Cell, args: &str| cell.bench.run("pss-fuse", args);
    fuse(&cell, "ls /w").fails(3, &["/w: no such file"]);
    fuse(&cell, "stat /v/00/00/02").fails(3, &["/v/00/00/02"]);
    fuse(&cell, "stat /v/0/00/00").fails(3, &["no such file"]);
    fuse(&cell, "ls /v/00/00/00/x").fails(2, &["not a directory"]);
    fuse(&cell, "stat /v/00/00/00/").fails(2, &["not a directory"]);
    fuse(&cell, "read /v").fails(2, &["/v: is a directory"]);
    fuse(&cell, "map /v/00").fails(2, &["is a directory"]);
    fuse(&cell, "read /v/00/00/00 --offset 5M").fails(2, &["--offset", "4194304"]);
    fuse(&cell, "read /v/00/00/00 --offset 1MB").fails(2, &["1MB"]);
    fuse(&cell, "read /v/00/00/00 none/out").fails(1, &["none/out"]);
    fuse(&cell, "stat -c %q /v").fails(2, &["%q", "%n"]);
    fuse(&cell, "--timeout 0 ls").fails(2, &["--timeout"]);
    fuse(&cell, "--servers none.conf ls").fails(2, &["none.conf"]);
    cell.bench.run("pss", "key new other.key").done();
    fuse(&cell, "--key other.key ls").fails(5, &["--key"]);
    fuse(&cell, "mount none").fails(3, &["none", "mkdir"]);
    fuse(&cell, "mount server.conf").fails(2, &["server.conf", "not a directory"]);
    fuse(&cell, "umount .").fails(3, &["no mounted namespace"]);

    // Without a majority there is an answer in seconds; what the nearest server has can be read all the same.
    let left = keep_a_follower(&mut cell);
    let started = Instant::now();
    fuse(&cell, "ls").fails(6, &["no majority", "refused"]);
    fs::create_dir(cell.bench.path("mnt")).unwrap();
    fuse(&cell, "mount mnt").fails(6, &["no majority"]);
    assert!(started.elapsed() < HANG);
    let outcome = fuse(&cell, "--stale ls");
    assert_eq!(outcome.done().stdout(), "v\n");
    assert!(
        outcome.stderr().contains(&format!("server {left}")),
        "{}",
        outcome.stderr()
    );
    assert!(
        outcome.stderr().contains("without a majority"),
        "{}",
        outcome.stderr()
    );
    let stale = json(&cell, "--stale ls --json /v/00/00");
    assert_eq!(stale["stale"]["server"], left);
    assert_eq!(stale["stale"]["behind_slots_max"], Value::Null);
    cell.kill(left);
    fuse(&cell, "--stale ls").fails(6, &[&format!("server {left}")]);
}

#[test]
fn a_stale_answer_says_how_far_behind_it_is() {
    let (cell, _) = with_data(3);
    let behind = || json(&cell, "--stale ls --json")["stale"]["behind_slots_max"].as_u64();
    wait_until("everybody has everything", PATIENCE, || behind() == Some(0));
    // The nearest is the only one that answers at once.
    let follower = (cell.leader() + 1) % 3;
    cell.signal(&[follower], "STOP");
    let mut client = cell.client(0);
    for at in 0..20 {
        write(&mut client, at * CHUNK, &[1; 4096]);
    }
    let others: Vec<u8> = (0..3).filter(|id| *id != follower).collect();
    cell.signal(&others, "STOP");
    cell.signal(&[follower], "CONT");
    let stale = json(&cell, "--stale --timeout 10s ls --json")["stale"].clone();
    assert_eq!(stale["server"], follower);
    assert_eq!(
        stale["behind_slots_max"],
        Value::Null,
        "no majority answers"
    );
    cell.signal(&others, "CONT");
    wait_until("it has caught up", PATIENCE, || behind() == Some(0));
}

#[test]
fn a_mount_shows_what_was_written() {
    let (cell, data) = with_data(3);
    let mount = Mount::start(&cell, "mnt", "--file-mode 0444 --uid 1 --gid 2");
    let names = |path: &str| {
        let mut names: Vec<String> = fs::read_dir(mount.path(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["v"]);
    assert_eq!(names(".volumes"), ["v"]);
    assert_eq!(names("v/00"), ["00", "01"]);
    assert_eq!(names("v/00/00"), ["00", "01"]);
    for (chunk, name) in [(0, "v/00/00/00"), (1, "v/00/00/01"), (300, "v/00/01/2c")] {
        let content = fs::read(mount.path(name)).unwrap();
        assert!(
            content == expected(&data, chunk * CHUNK, CHUNK as usize),
            "{name}"
        );
    }
    let about = fs::metadata(mount.path("v/00/00/00")).unwrap();
    assert_eq!((about.len(), about.blocks() * 512), (CHUNK, 3 * MIB));
    assert_eq!(
        (about.uid(), about.gid(), about.mode() & 0o7777),
        (1, 2, 0o444)
    );
    let age = about.modified().unwrap().elapsed().unwrap();
    assert!(age < Duration::from_secs(600), "{age:?}");
    let image = fs::metadata(mount.path(".volumes/v")).unwrap();
    assert_eq!(image.len(), 2048 * MIB);
    assert_eq!(image.blocks() * 512, 3 * MIB + 4096 + 8192);
    let used = run("du", "coreutils", &["-s", "-B1", text(&mount.path("v"))]);
    assert!(
        used.starts_with(&(3 * MIB + 4096 + 8192).to_string()),
        "{used}"
    );

    // Extended attributes.
    let attribute = |name: &str| {
        let mut value = [0; 200];
        let length = rustix::fs::getxattr(mount.path("v/00/00/01"), name, &mut value);
        length.map(|length| String::from_utf8(value[..length].to_vec()).unwrap())
    };
    assert_eq!(attribute("user.pss.copies").as_deref(), Ok("0,1,2"));
    assert_eq!(attribute("user.pss.allocated_bytes").as_deref(), Ok("4096"));
    assert!(attribute("user.pss.slot").unwrap().parse::<u64>().unwrap() > 0);
    let digest = attribute("user.pss.digest").unwrap();
    let sum = run("sha256sum", "coreutils", &[text(&mount.path("v/00/00/01"))]);
    assert!(sum.starts_with(&digest));
    assert_eq!(attribute("user.other"), Err(rustix::io::Errno::NODATA));
    // There are no others, and `ls -l` asks once, not for every file.
    for name in ["security.selinux", "system.posix_acl_access"] {
        assert_eq!(attribute(name), Err(rustix::io::Errno::OPNOTSUPP));
    }
    let mut names = [0; 200];
    let length = rustix::fs::listxattr(mount.path("v/00/00/01"), &mut names).unwrap();
    let names = String::from_utf8(names[..length].to_vec()).unwrap();
    let known = ["slot", "digest", "allocated_bytes", "copies"];
    assert_eq!(
        names,
        known.map(|name| format!("user.pss.{name}\0")).concat()
    );
    let calls = cell.bench.path("calls");
    let list = ["-o", text(&calls), "-e", "getxattr,lgetxattr", "ls", "-lR"];
    run(
        "strace",
        "strace",
        &[&list[..], &[text(&mount.directory)]].concat(),
    );
    let calls = fs::read_to_string(calls).unwrap();
    assert!(calls.matches("xattr(").count() <= 2, "{calls}");

    // Holes are known: a copy takes no time and no space.
    let file = File::open(mount.path(".volumes/v")).unwrap();
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(4096));
    assert_eq!(seek(SeekFrom::Hole(4096)), Ok(4096 + 3 * MIB));
    assert_eq!(seek(SeekFrom::Data(2 * CHUNK)), Ok(300 * CHUNK));
    assert_eq!(
        seek(SeekFrom::Data(301 * CHUNK)),
        Err(rustix::io::Errno::NXIO)
    );
    assert_eq!(seek(SeekFrom::Hole(2047 * MIB)), Ok(2047 * MIB));
    let copy = cell.bench.path("copy");
    run(
        "cp",
        "coreutils",
        &[
            "--sparse=always",
            text(&mount.path(".volumes/v")),
            text(&copy),
        ],
    );
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 4 * MIB);
    run(
        "cmp",
        "diffutils",
        &[text(&copy), text(&mount.path(".volumes/v"))],
    );

    // Trees.
    let tar = cell.bench.path("v.tar");
    run(
        "tar",
        "tar",
        &["cf", text(&tar), "-C", text(&mount.directory), "v"],
    );
    let tree = cell.bench.path("tree");
    fs::create_dir(&tree).unwrap();
    run("tar", "tar", &["xf", text(&tar), "-C", text(&tree)]);
    run(
        "rsync",
        "rsync",
        &[
            "-a",
            &format!("{}/", text(&mount.path("v"))),
            text(&cell.bench.path("synced")),
        ],
    );
    for copy in ["tree/v", "synced"] {
        run(
            "diff",
            "diffutils",
            &["-r", text(&mount.path("v")), text(&cell.bench.path(copy))],
        );
    }
    let free = rustix::fs::statvfs(&mount.directory).unwrap();
    assert!(free.f_blocks > 0 && free.f_bfree <= free.f_blocks);

    // Nothing can be changed.
    let refused = |result: std::io::Result<()>| {
        assert_eq!(
            result.unwrap_err().kind(),
            std::io::ErrorKind::ReadOnlyFilesystem
        );
    };
    refused(fs::write(mount.path("v/00/00/00"), "x"));
    refused(fs::write(mount.path("new"), "x"));
    refused(fs::create_dir(mount.path("w")));
    refused(fs::remove_file(mount.path("v/00/00/00")));
    refused(fs::rename(mount.path("v"), mount.path("w")));
    let missing = fs::metadata(mount.path("v/00/00/02")).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);

    // Numbers of inodes stay.
    let inode = about.ino();
    mount.stop();
    let again = Mount::start(&cell, "mnt", "--show-volumes");
    assert_eq!(fs::metadata(again.path("v/00/00/00")).unwrap().ino(), inode);
    let listed = fs::read_dir(&again.directory).unwrap().count();
    assert_eq!(listed, 2);
    again.stop();
}

/// Random writes, trims, sizes over NBD and `pss`; every read of the mount must give what was answered before.
#[test]
fn reads_of_a_mount_are_linearizable() {
    let cell = Cell::started(Layout::small(3), "64M");
    let mount = Mount::start(&cell, "mnt", "--metadata-ttl 0s");
    let mut client = cell.client(0);
    let mut rng = Rng::new(11);
    let mut model = vec![0; 64 << 20];
    let image = File::open(mount.path(".volumes/v")).unwrap();
    let length_max = 300_000;
    for step in 0..300 {
        let offset = rng.below(model.len() as u64 - length_max);
        let length = rng.between(1, length_max) as usize;
        let range = offset as usize..offset as usize + length;
        match rng.below(4) {
            0 => {
                let command = nbd_client::Command::WriteZeroes;
                let reply = client.request(command, offset, length as u32, &[]);
                assert_eq!(reply.unwrap().error, 0);
                model[range].fill(0);
            }
            _ => {
                let data = random(&mut rng, length);
                write(&mut client, offset, &data);
                model[range].copy_from_slice(&data);
            }
        }
        // Around what has changed, through the image and through a chunk's file.
        let from = offset.saturating_sub(rng.below(10_000));
        let mut seen = vec![0xee; length + 20_000];
        let count = read_fully(&image, &mut seen, from);
        let end = (from as usize + count).min(model.len());
        assert!(
            seen[..count] == model[from as usize..end],
            "step {step}, image at {from}"
        );
        let chunk = offset / CHUNK;
        let name = format!("v/00/00/{chunk:02x}");
        match fs::read(mount.path(&name)) {
            Ok(content) => {
                let start = (chunk * CHUNK) as usize;
                assert!(
                    content == model[start..start + CHUNK as usize],
                    "step {step}, {name}"
                );
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let start = (chunk * CHUNK) as usize;
                let is_zero = model[start..start + CHUNK as usize]
                    .iter()
                    .all(|byte| *byte == 0);
                assert!(is_zero, "step {step}: {name} is missing");
            }
            Err(error) => panic!("step {step}: {name}: {error}"),
        }
    }
    // What holds data is what the map says.
    let data = rustix::fs::seek(&image, SeekFrom::Data(0)).unwrap_or(model.len() as u64);
    assert!(model[..data as usize].iter().all(|byte| *byte == 0));

    // It grows under an open file, and a deleted one is gone.
    cell.bench.run("pss", "volume resize v +4M").done();
    assert_eq!(image.metadata().unwrap().len(), 68 << 20);
    let mut bytes = [1; 4096];
    assert_eq!(image.read_at(&mut bytes, 66 << 20).unwrap(), 4096);
    drop(client);
    let deletes = || {
        cell.bench
            .run("pss", "volume delete v --yes")
            .0
            .status
            .success()
    };
    wait_until("nobody has it attached", PATIENCE, deletes);
    let gone = image.read_at(&mut bytes, 0).unwrap_err();
    assert_eq!(
        gone.raw_os_error(),
        Some(rustix::io::Errno::STALE.raw_os_error())
    );
    assert!(!mount.path("v").exists());
    assert_eq!(fs::read_dir(&mount.directory).unwrap().count(), 0);
}

fn read_fully(file: &File, bytes: &mut [u8], from: u64) -> usize {
    let mut count = 0;
    while count < bytes.len() {
        match file
            .read_at(&mut bytes[count..], from + count as u64)
            .unwrap()
        {
            0 => break,
            more => count += more,
        }
    }
    count
}

/// Programs that copy trees go on while a third of the chunks is written to and others come and go; what is left alone
/// arrives as it is.
#[test]
fn copies_of_a_changing_volume_end_and_have_what_was_left_alone() {
    const STILL: u64 = 8;
    const GOES_FROM: u64 = 14;
    let cell = Cell::started(Layout::small(3), "64M");
    let mount = Mount::start(&cell, "mnt", "");
    let mut rng = Rng::new(5);
    let mut client = cell.client(0);
    let mut still = vec![0; (STILL * CHUNK) as usize];
    for chunk in 0..16 {
        let from = chunk * CHUNK + rng.below(CHUNK - MIB);
        let data = random(&mut rng, MIB as usize);
        write(&mut client, from, &data);
        if chunk < STILL {
            still[from as usize..][..MIB as usize].copy_from_slice(&data);
        }
    }
    let names: Vec<String> = (0..STILL)
        .map(|chunk| format!("00/00/{chunk:02x}"))
        .collect();
    let is_still = |tree: &Path| {
        for (name, content) in names.iter().zip(still.chunks(CHUNK as usize)) {
            assert!(
                fs::read(tree.join(name)).unwrap() == content,
                "{name} in {tree:?}"
            );
        }
    };
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                let chunk = rng.between(STILL, 15);
                let length = rng.between(1, 200_000);
                let offset = chunk * CHUNK + rng.below(CHUNK - length);
                let data = random(&mut rng, length as usize);
                write(&mut client, offset, &data);
                if chunk >= GOES_FROM {
                    let command = nbd_client::Command::Trim;
                    let reply = client.request(command, chunk * CHUNK, CHUNK as u32, &[]);
                    assert_eq!(reply.unwrap().error, 0);
                }
            }
        });
        // Whatever fails below, the writer must end.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let path = |name: &str| cell.bench.path(name);
            let tree = mount.path("v");
            let image = mount.path(".volumes/v");
            // Code and what is said; nothing may be wrong with a file that does not go away.
            let copied = |program: &str, package: &str, args: &[&str], codes: &[i32]| {
                let limit = HANG.as_secs().to_string();
                let program = tool(program, package);
                let all = [&[limit.as_str(), text(&program)], args].concat();
                let output = Command::new("timeout").args(all).output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let code = output.status.code().unwrap();
                assert!(codes.contains(&code), "{args:?} {code}: {said}");
                assert!(!said.contains("Input/output error"), "{args:?}: {said}");
                for name in &names {
                    assert!(!said.contains(name), "{args:?}: {said}");
                }
                String::from_utf8_lossy(&output.stdout).into_owned()
            };
            let to = path("copied");
            copied(
                "cp",
                "coreutils",
                &["-a", "--sparse=always", text(&tree), text(&to)],
                &[0, 1],
            );
            is_still(&to);

            let to = path("image");
            copied(
                "cp",
                "coreutils",
                &["-a", "--sparse=always", text(&image), text(&to)],
                &[0],
            );
            let bytes = fs::read(&to).unwrap();
            assert_eq!(bytes.len() as u64, 64 * MIB);
            assert!(bytes[..still.len()] == still);
            fs::remove_file(&to).unwrap();

            // It says so, by code 1, if a file changes under it.
            let tar = path("v.tar");
            copied(
                "tar",
                "tar",
                &["cSf", text(&tar), "-C", text(&mount.directory), "v"],
                &[0, 1],
            );
            let differ = copied(
                "tar",
                "tar",
                &["df", text(&tar), "-C", text(&mount.directory)],
                &[0, 1],
            );
            for name in &names {
                assert!(!differ.contains(name), "{differ}");
            }
            let to = path("unpacked");
            fs::create_dir(&to).unwrap();
            copied("tar", "tar", &["xf", text(&tar), "-C", text(&to)], &[0]);
            is_still(&to.join("v"));

            // Code 24, or 23: files went away.
            let to = path("synced");
            let from = format!("{}/", text(&tree));
            copied(
                "rsync",
                "rsync",
                &["-aS", "--delete", &from, text(&to)],
                &[0, 23, 24],
            );
            is_still(&to);

            let files: Vec<_> = names.iter().map(|name| tree.join(name)).collect();
            let copies = names.iter().map(|name| to.join(name));
            let digests = |files: &mut dyn Iterator<Item = &Path>| -> Vec<String> {
                let files: Vec<&str> = files.map(text).collect();
                let lines = copied("sha256sum", "coreutils", &files, &[0]);
                lines.lines().map(|line| line[..64].to_owned()).collect()
            };
            let copies: Vec<_> = copies.collect();
            assert_eq!(
                digests(&mut files.iter().map(PathBuf::as_path)),
                digests(&mut copies.iter().map(PathBuf::as_path))
            );
        }));
        ends.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    mount.stop();
}

/// What a user who is not root does with a mount, from the start to every end. /dev/fuse may be root's alone: then it is
/// another one, in a place that nobody else sees.
const AS_USER: &str = r#"
set -eu
if [ "${1:-}" != user ]; then
    if ! setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'exec 3<>/dev/fuse' 2>/dev/null; then
        mknod fuse c 10 229
        chmod 666 fuse
        mount --bind fuse /dev/fuse
    fi
    exec setpriv --reuid 65534 --regid 65534 --clear-groups sh "$0" user
fi
trap 'if [ -f pid ]; then kill -KILL "$(cat pid)"; fi' EXIT
gone() {
    for try in $(seq 100); do
        if ! grep -q "$PWD/mnt" /proc/mounts && [ ! -f pid ]; then return; fi
        sleep 0.1
    done
    echo "the mount is still there after $1" >&2
    exit 1
}
mounted() {
    ./pss-fuse mount mnt --pid-file pid
    grep "$PWD/mnt fuse.pss" /proc/mounts
    stat -c '%u %g %a' mnt/v/00/00/01
    sha256sum mnt/v/00/00/01
}
mkdir mnt
mounted
exec 9< mnt/.volumes/v
! ./pss-fuse umount mnt 2> busy
exec 9<&-
grep 'in use' busy
./pss-fuse umount mnt
gone 'pss-fuse umount'
mounted
fusermount3 -u mnt
gone 'fusermount3 -u'
mounted
kill -TERM "$(cat pid)"
gone SIGTERM
mounted
kill -KILL "$(cat pid)"
rm pid
gone SIGKILL
! ./pss-fuse umount mnt 2> none
grep 'no mounted namespace' none
"#;

#[test]
fn a_user_mounts_and_unmounts() {
    let helper = tool("fusermount3", "fuse3");
    let mode = fs::metadata(&helper).unwrap().mode();
    assert!(
        mode & 0o4000 != 0,
        "{} is not setuid root: install it again with 'apt-get install --reinstall fuse3'",
        helper.display()
    );
    assert!(
        Path::new("/dev/fuse").exists(),
        "/dev/fuse is missing: modprobe fuse"
    );
    let (cell, data) = with_data(1);
    // The test's own directory, and the program's, may be closed to others.
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    fs::copy(binaries::path("pss-fuse"), path("pss-fuse")).unwrap();
    for name in ["server.conf", "cell.key"] {
        fs::copy(cell.bench.path(name), path(name)).unwrap();
        std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
    }
    fs::write(path("script"), AS_USER).unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(home.path(), Some(65534), Some(65534)).unwrap();
    let log = path("log");
    let mut command = Command::new(tool("unshare", "util-linux"));
    command
        .args(["--mount", "--propagation", "private", "sh", "script"])
        .env("PSS_SERVERS", path("server.conf"))
        .current_dir(home.path())
        .stdin(Stdio::null());
    let mut script = Process::start("script", &mut command, log);
    assert_eq!(script.ends(PATIENCE), Some(0), "{}", script.text());
    let said = script.text();
    let content = cell.bench.path("content");
    fs::write(&content, expected(&data, CHUNK, CHUNK as usize)).unwrap();
    let digest = run("sha256sum", "coreutils", &[text(&content)]);
    for part in [
        &digest[..64],
        "65534 65534 440",
        "user_id=65534,",
        "nosuid,nodev,noexec",
    ] {
        assert_eq!(said.matches(part).count(), 4, "{part} in {said}");
    }
}

/// Whoever waits at a terminal sees how far it is; programs and files get nothing of that.
#[test]
fn long_reads_show_how_far_they_are() {
    let cell = Cell::started(Layout::small(1), "1M");
    // All of it is holes, which takes time enough.
    cell.bench.run("pss", "volume create large 1T").done();
    let verbs = [
        ("pss-fuse", "read /.volumes/large --out out", "reading"),
        ("pss-fuse", "stat --digest /.volumes/large", "reading"),
        ("pss", "volume export large exported", "exporting"),
    ];
    for (program, args, word) in verbs {
        let (mut person, other) = terminal();
        let mut command = cell.bench.command(program);
        command
            .args(args.split(' '))
            .stdout(Stdio::null())
            .stderr(other);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut seen = String::new();
        let mut bytes = [0; 4096];
        let started = Instant::now();
        while !(seen.contains(word) && seen.contains("of 1.00 TiB")) {
            let count = person.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
            assert!(started.elapsed() < HANG, "{program}: {seen}");
        }
        child.kill().unwrap();
        child.wait().unwrap();

        for name in ["out", "exported.part", "exported.part.json"] {
            let _ = fs::remove_file(cell.bench.path(name));
        }
        let mut command = cell.bench.command(program);
        command.args(args.split(' ')).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(2500));
        assert!(
            child.try_wait().unwrap().is_none(),
            "{program} took no time"
        );
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{program}");
    }
}

/// A real file system in a volume is checked and read through the mount.
#[test]
fn a_file_system_is_checked_through_the_mount() {
    let cell = Cell::started(Layout::small(3), "128M");
    let mount = Mount::start(&cell, "mnt", "");
    let tree = cell.bench.path("tree");
    fs::create_dir(&tree).unwrap();
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/../pss-core");
    run("cp", "coreutils", &["-r", sources, text(&tree)]);
    let image = cell.bench.path("image");
    run(
        "mke2fs",
        "e2fsprogs",
        &["-q", "-d", text(&tree), text(&image), "128M"],
    );
    let uri = format!("nbd://{}/v", cell.nbd(0));
    run(
        "qemu-img",
        "qemu-utils",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            text(&image),
            &uri,
        ],
    );
    let seen = mount.path(".volumes/v");
    run("e2fsck", "e2fsprogs", &["-fn", text(&seen)]);
    run("cmp", "diffutils", &[text(&seen), text(&image)]);
    if !Path::new("/dev/loop-control").exists() {
        println!("no loop devices: not mounted once more");
        return mount.stop();
    }
    let looped = cell.bench.path("looped");
    fs::create_dir(&looped).unwrap();
    run(
        "mount",
        "mount",
        &["-o", "ro,loop", text(&seen), text(&looped)],
    );
    let compared = Command::new("diff")
        .args(["-r", text(&tree), text(&looped)])
        .output();
    run("umount", "mount", &[text(&looped)]);
    let differences = String::from_utf8(compared.unwrap().stdout).unwrap();
    assert_eq!(
        differences.trim(),
        format!("Only in {}: lost+found", text(&looped))
    );
    mount.stop();
}

#[test]
fn a_mount_outlives_its_servers() {
    let (mut cell, data) = with_data(3);
    let mount = Mount::start(&cell, "mnt", "--timeout 5s --metadata-ttl 0s");
    let stale = Mount::start(&cell, "stale", "--timeout 2s --stale --metadata-ttl 0s");
    let content = expected(&data, 0, CHUNK as usize);
    let check = |mount: &Mount| {
        assert!(fs::read(mount.path("v/00/00/00")).unwrap() == content);
    };
    // Any one may be killed while it is read: readers wait for the next leader.
    for _ in 0..2 {
        let leader = cell.leader();
        let ends = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !ends.load(Ordering::Relaxed) {
                    check(&mount);
                    reads += 1;
                }
                reads
            });
            std::thread::sleep(Duration::from_millis(300));
            cell.kill(leader);
            std::thread::sleep(Duration::from_secs(2));
            ends.store(true, Ordering::Relaxed);
            assert!(reader.join().unwrap() > 2);
        });
        check(&stale);
        cell.start(leader);
        cell.wait_current();
    }
    // Without a majority everything fails in seconds, and a list of many files does not wait for each of them.
    let left = keep_a_follower(&mut cell);
    let started = Instant::now();
    let error = fs::read(mount.path("v/00/00/00")).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    for _ in 0..5 {
        fs::read_dir(mount.path("v")).unwrap_err();
        fs::metadata(mount.path("v/00/00/01")).unwrap_err();
    }
    assert!(started.elapsed() < HANG, "{:?}", started.elapsed());
    assert!(
        mount.process.text().contains("no majority"),
        "{}",
        mount.process.text()
    );
    check(&stale);
    let list = Command::new("ls")
        .arg("-lR")
        .arg(&stale.directory)
        .output()
        .unwrap();
    assert!(list.status.success(), "{list:?}");
    // It comes back by itself.
    for id in (0..3).filter(|id| *id != left) {
        cell.start(id);
    }
    wait_until("the mount works again", PATIENCE, || {
        fs::read(mount.path("v/00/00/00")).is_ok_and(|bytes| bytes == content)
    });
    // And all of them stand still: nobody answers, nobody refuses either.
    cell.wait_current();
    cell.signal(&[0, 1, 2], "STOP");
    let started = Instant::now();
    fs::read(mount.path("v/00/00/00")).unwrap_err();
    fs::read_dir(stale.path("v")).unwrap_err();
    assert!(started.elapsed() < HANG, "{:?}", started.elapsed());
    // A mount whose cell is away can be taken away.
    mount.stop();
    stale.stop();
    cell.signal(&[0, 1, 2], "CONT");
}

#[test]
fn a_mount_ends_cleanly_while_it_is_used() {
    let (cell, _) = with_data(3);
    let command = |args: &str| cell.bench.run("pss-fuse", args);

    // Somebody has a file open and stands in a directory.
    let mount = Mount::start(&cell, "a", "");
    let mut open = File::open(mount.path(".volumes/v")).unwrap();
    let mut stands = Command::new("sleep")
        .arg("60")
        .current_dir(mount.path("v/00"))
        .spawn()
        .unwrap();
    command("umount a").fails(4, &["in use", "--wait", "--lazy"]);
    command("mount a").fails(4, &["already mounted"]);
    let started = Instant::now();
    mount.stop();
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    // No dead mount, but what was open is dead.
    assert_eq!(fs::read_dir(cell.bench.path("a")).unwrap().count(), 0);
    assert!(open.read(&mut [0; 10]).is_err());
    drop(open);
    stands.kill().unwrap();
    stands.wait().unwrap();

    // Killed: whoever watches over it takes it away.
    let mut mount = Mount::start(&cell, "a", "");
    let open = File::open(mount.path(".volumes/v")).unwrap();
    mount.process.kill();
    wait_until("the dead mount is gone", PATIENCE, || {
        !is_mounted(&mount.directory)
    });
    drop((open, mount));

    // Unmounted by others: it ends by itself, and well.
    for how in [
        "umount",
        "pss-fuse umount",
        "pss-fuse umount --lazy",
        "umount -l",
    ] {
        let mut mount = Mount::start(&cell, "a", "");
        let mut words = how.split(' ');
        let mut program = match words.next() {
            Some("umount") => Command::new(tool("umount", "mount")),
            _ => cell.bench.command("pss-fuse"),
        };
        let status = program.args(words).arg(&mount.directory).status().unwrap();
        assert!(status.success(), "{how}");
        assert_eq!(
            mount.process.ends(PATIENCE),
            Some(0),
            "{how}: {}",
            mount.process.text()
        );
        assert!(!is_mounted(&mount.directory));
    }

    // Waits until nobody uses it.
    let mut mount = Mount::start(&cell, "a", "");
    let open = File::open(mount.path(".volumes/v")).unwrap();
    let mut waiting = cell.bench.command("pss-fuse");
    let mut waiting = waiting.args(["umount", "--wait", "a"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(waiting.try_wait().unwrap().is_none() && is_mounted(&mount.directory));
    drop(open);
    assert!(waiting.wait().unwrap().success());
    assert_eq!(mount.process.ends(PATIENCE), Some(0));

    // Whoever follows at once in its place is left alone, even if the kernel gives out the same number.
    for _ in 0..20 {
        let mut mount = Mount::start(&cell, "a", "");
        cell.bench.run("pss-fuse", "umount a").done();
        let next = Mount::start(&cell, "a", "");
        assert_eq!(mount.process.ends(PATIENCE), Some(0));
        assert!(is_mounted(&next.directory));
        assert!(next.path("v").exists());
        mount.process.kill();
        std::mem::forget(mount);
        next.stop();
    }

    // Another mount over it is not touched.
    let mount = Mount::start(&cell, "a", "");
    run(
        "mount",
        "mount",
        &["-t", "tmpfs", "pss-test", text(&mount.directory)],
    );
    fs::write(mount.directory.join("mine"), "x").unwrap();
    mount.process.signal("TERM");
    std::thread::sleep(Duration::from_secs(2));
    assert!(mount.directory.join("mine").exists());
    run("umount", "mount", &[text(&mount.directory)]);
    wait_until("what was below is gone", PATIENCE, || {
        !is_mounted(&mount.directory) || {
            // Its process could not reach it; a dead mount is taken away by the next.
            cell.bench
                .run("pss-fuse", "umount --lazy a")
                .0
                .status
                .success()
        }
    });
}

#[test]
fn a_dead_mount_is_replaced() {
    let (cell, data) = with_data(1);
    let mut mount = Mount::start(&cell, "a", "");
    // The process that watches over it has no time to do so.
    let watchers = run("pgrep", "procps", &["-P", &mount.process.pid().to_string()]);
    let watcher = watchers.trim().to_owned();
    run("kill", "procps", &["-KILL", &watcher]);
    mount.process.kill();
    assert!(is_mounted(&mount.directory));
    let error = fs::read_dir(&mount.directory).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::NOTCONN.raw_os_error())
    );
    let again = Mount::start_on(&cell, mount.directory.clone(), "");
    let content = fs::read(again.path("v/00/00/01")).unwrap();
    assert!(content == expected(&data, CHUNK, CHUNK as usize));
    again.stop();
}

#[test]
fn it_goes_into_the_background_when_it_works() {
    let (cell, _) = with_data(3);
    let a = cell.bench.path("a b");
    fs::create_dir(&a).unwrap();
    let started = |program: &Path, args: &[&str]| {
        let status = Command::new(program)
            .args(args)
            .env("PSS_SERVERS", "server.conf")
            .current_dir(cell.bench.path(""))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.unwrap().code()
    };
    let program = binaries::path("pss-fuse");
    // Relative paths hold although it leaves the directory.
    assert_eq!(
        started(&program, &["mount", "a b", "--pid-file", "pid"]),
        Some(0)
    );
    let shown = fs::read_dir(&a).unwrap().count();
    assert_eq!(shown, 1);
    let pid = fs::read_to_string(cell.bench.path("pid")).unwrap();
    let pid = pid.trim();
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        Path::new("/")
    );
    run("kill", "procps", &["-TERM", pid]);
    wait_until("it is unmounted", PATIENCE, || {
        fs::read_dir(&a).unwrap().count() == 0
    });
    wait_until("it has ended", PATIENCE, || {
        !cell.bench.path("pid").exists()
    });

    // As a line of /etc/fstab does.
    let helper = cell.bench.path("mount.fuse.pss");
    symlink(&program, &helper).unwrap();
    let source = format!("pss:{}", text(&cell.bench.path("server.conf")));
    let options = "rw,noauto,_netdev,allow_other,file_mode=0444,pid_file=pid";
    assert_eq!(started(&helper, &[&source, "a b", "-o", options]), Some(0));
    let mode = fs::metadata(a.join(".volumes/v")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o444);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let escaped = text(&a).replace(' ', "\\040");
    let line = mounts.lines().find(|line| line.contains(&escaped)).unwrap();
    for part in [
        "fuse.pss",
        "ro,",
        "nosuid",
        "noexec",
        "nodev",
        "allow_other",
        "default_permissions",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    run("umount", "mount", &[text(&a)]);
    wait_until("it has ended", PATIENCE, || {
        !cell.bench.path("pid").exists()
    });
    assert_eq!(
        started(&helper, &[&source, "a b", "-o", "colour=red"]),
        Some(2)
    );
    assert_eq!(started(&helper, &["vol001", "a b"]), Some(2));

    assert_eq!(started(&helper, &[&source, "a b", "-o", "exec"]), Some(2));

    // It fails before it leaves.
    assert_eq!(started(&program, &["mount", "none"]), Some(3));
    cell.signal(&[0, 1, 2], "STOP");
    assert_eq!(
        started(&program, &["mount", "a b", "--timeout", "1s"]),
        Some(6)
    );
    // And it can be stopped while it waits.
    let mut command = cell.bench.command("pss-fuse");
    command.args(["mount", "a b", "-f", "--timeout", "10m"]);
    let output = cell.bench.path("waiting.log");
    let mut waiting = Process::start("pss-fuse", &mut command, output);
    std::thread::sleep(Duration::from_millis(500));
    waiting.signal("TERM");
    assert_eq!(waiting.ends(HANG), Some(1));
    assert!(
        waiting.text().contains("stopped before"),
        "{}",
        waiting.text()
    );
    cell.signal(&[0, 1, 2], "CONT");
    assert_eq!(fs::read_dir(&a).unwrap().count(), 0);
}

/// systemd is told when the mount works.
#[test]
fn it_tells_the_service_manager() {
    let (cell, _) = with_data(1);
    let socket = std::os::unix::net::UnixDatagram::bind(cell.bench.path("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    fs::create_dir(cell.bench.path("a")).unwrap();
    let mut command = cell.bench.command("pss-fuse");
    command
        .args(["mount", "a", "--foreground"])
        .env("NOTIFY_SOCKET", cell.bench.path("notify"));
    let output = cell.bench.path("pss-fuse.log");
    let mut process = Process::start("pss-fuse", &mut command, output);
    let mut message = [0; 256];
    let length = socket.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"READY=1"));
    assert!(is_mounted(&cell.bench.path("a")));
    process.signal("TERM");
    let length = socket.recv(&mut message).unwrap();
    assert!(message[..length].starts_with(b"STOPPING=1"));
    assert_eq!(process.ends(PATIENCE), Some(0));
}
