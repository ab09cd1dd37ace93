//! `pss volume import` and `export` before cells of processes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pss_tests::binaries::tool;
use pss_tests::nbd_client;
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};
use pss_tests::rng::Rng;

const MIB: usize = 1 << 20;

/// An image of so many MiB with data here and there, and an end within a sector.
fn image(path: &Path, mib: usize) -> Vec<u8> {
    let mut rng = Rng::new(3);
    let mut bytes = vec![0; mib * MIB + 100];
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for at in (0..mib).step_by(3) {
        let from = at * MIB + rng.below(MIB as u64) as usize;
        let length = rng.below(300_000).min((bytes.len() - from) as u64) as usize;
        for byte in &mut bytes[from..from + length] {
            *byte = rng.next() as u8;
        }
        file.write_all_at(&bytes[from..from + length], from as u64)
            .unwrap();
    }
    bytes
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

fn qemu_img(args: &[&str]) {
    let program = tool("qemu-img", "qemu-utils");
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
}

#[test]
fn images_come_and_go() {
    let cell = Cell::started(Layout::small(3), "1M");
    let run = |args: &str| cell.bench.run("pss", args);
    let path = |name: &str| cell.bench.path(name);
    let bytes = image(&path("raw"), 40);
    // The volume is of whole sectors.
    let mut padded = bytes.clone();
    padded.resize(bytes.len().next_multiple_of(512), 0);
    fs::write(path("padded"), &padded).unwrap();
    let digest = sha256(&path("padded"));

    let said = run("volume import raw a").done().stderr();
    assert!(said.contains(&digest), "{said}");
    let json = run("volume list --json").done().stdout();
    let listed: serde_json::Value = serde_json::from_str(&json).unwrap();
    let volume = &listed["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|it| it["name"] == "a")
        .unwrap()
        .clone();
    let used = volume["allocated_bytes"].as_u64().unwrap();
    let data = fs::metadata(path("raw")).unwrap().blocks() * 512;
    assert!(used <= data, "zeros take space: {used} of {data}");

    run("volume export a out").done();
    assert!(fs::read(path("out")).unwrap() == padded);
    assert!(fs::metadata(path("out")).unwrap().blocks() * 512 <= data + 64 * 1024);
    assert!(!path("out.part").exists() && !path("out.part.json").exists());

    // Through qemu-img, and back.
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        path("padded").to_str().unwrap(),
        path("disk").to_str().unwrap(),
    ]);
    run("volume import disk b").done();
    run("volume export b out2").done();
    assert!(fs::read(path("out2")).unwrap() == padded);
    run("volume export b out.qcow2").done();
    qemu_img(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        path("out.qcow2").to_str().unwrap(),
        path("padded").to_str().unwrap(),
    ]);

    // What is wrong, and what was not done.
    run("volume import raw a").fails(4, &["exists already", "--resume"]);
    run("volume import none c").fails(1, &["none"]);
    run("volume import . c").fails(1, &["."]);
    run("volume import /dev/null c").fails(2, &["a file or a disk"]);
    run("volume import raw a/b").fails(2, &["volume name 'a/b'"]);
    run("volume import padded c --format vmdk").fails(1, &["qemu-img"]);
    fs::write(path("empty"), "").unwrap();
    run("volume import empty c").fails(2, &["size"]);
    run("volume export a out").fails(4, &["out exists already"]);
    // Nobody else's file or disk is touched.
    fs::write(path("mine.part"), "precious").unwrap();
    run("volume export a mine").fails(4, &["mine.part exists"]);
    assert_eq!(fs::read(path("mine.part")).unwrap(), b"precious");
    std::os::unix::fs::symlink("padded", path("link.part")).unwrap();
    fs::write(path("link.part.json"), "").unwrap();
    run("volume export a link").done();
    assert!(fs::symlink_metadata(path("link")).unwrap().is_file());
    assert!(fs::read(path("padded")).unwrap() == padded);
    fs::write(path("notes.part.json"), "precious").unwrap();
    run("volume export a notes").fails(4, &["notes.part.json"]);
    let mut other = padded.clone();
    other[20 * MIB] ^= 1;
    let from = other.iter().rposition(|byte| *byte != 0).unwrap();
    other[from] ^= 1;
    fs::write(path("other"), &other).unwrap();
    run("volume import other a --resume").fails(4, &["other data than the image"]);
    run("volume export a same").done();
    assert!(fs::read(path("same")).unwrap() == padded);
    run("volume import disk b --resume").fails(2, &["raw images", "qcow2"]);
    run("volume import raw a --resume --chunk-size 64K").fails(2, &["--chunk-size"]);
    run("volume export c out3").fails(3, &["no volume c"]);
    run("volume export a none/out").fails(1, &["none/out"]);
    run("volume export a out3 --format vmdk").fails(2, &["raw or qcow2"]);
    run("volume import padded v --resume").fails(2, &["1048576 bytes"]);
    let without = cell
        .bench
        .command("pss")
        .args(["volume", "import", "disk", "c"])
        .env("PATH", "/nowhere")
        .output()
        .unwrap();
    assert_eq!(without.status.code(), Some(9));
    assert!(String::from_utf8_lossy(&without.stderr).contains("qemu-utils"));
    let names = run("volume list --json").done().stdout();
    assert!(!names.contains("\"c\""), "{names}");
}

#[test]
fn interrupted_copies_go_on() {
    let mut cell = Cell::started(Layout::small(3), "1M");
    let path = |cell: &Cell, name: &str| cell.bench.path(name);
    let mut bytes = image(&path(&cell, "raw"), 300);
    bytes.resize(bytes.len().next_multiple_of(512), 0);

    // Killed while it imports; a leader is killed, too.
    let mut command = cell.bench.command("pss");
    command.args(["volume", "import", "raw", "a"]);
    let mut import = Process::start("import", &mut command, path(&cell, "import.log"));
    wait_until("something has arrived", PATIENCE, || {
        let list = cell.bench.run("pss", "volume show a --json");
        let shown: serde_json::Value = serde_json::from_slice(&list.0.stdout).unwrap_or_default();
        shown["volume"]["allocated_bytes"]
            .as_u64()
            .or(shown["allocated_bytes"].as_u64())
            .is_some_and(|bytes| bytes > MIB as u64)
    });
    import.kill();
    let leader = cell.leader();
    cell.kill(leader);
    let resume = |cell: &Cell| {
        cell.bench
            .run("pss", "volume import raw a --resume --timeout 30s")
    };
    // The dead import's session holds the volume until it ends.
    wait_until("nobody has it attached", 2 * PATIENCE, || {
        resume(&cell).0.status.success()
    });
    cell.start(leader);
    cell.wait_current();

    cell.bench.run("pss", "volume export a out").done();
    assert!(fs::read(path(&cell, "out")).unwrap() == bytes);
    fs::remove_file(path(&cell, "out")).unwrap();

    // What an export that stopped after 256 MiB leaves behind.
    let done = |changed: u64| {
        let show = cell.bench.run("pss-fuse", "stat --json /a").done().stdout();
        let show: serde_json::Value = serde_json::from_str(&show).unwrap();
        let list = cell.bench.run("pss", "volume list --json").done().stdout();
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let volume = list["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .find(|it| it["name"] == "a")
            .unwrap();
        let uuid = volume["uuid"].as_str().unwrap().replace('-', "");
        let uuid: Vec<u8> = (0..16)
            .map(|at| u8::from_str_radix(&uuid[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let slot = show["files"][0]["slot"].as_u64().unwrap() + changed;
        let notes = serde_json::json!({"format": "raw", "uuid": uuid, "size_bytes": bytes.len(), "changed": slot, "done_bytes": 256 * MIB});
        fs::write(path(&cell, "out.part.json"), notes.to_string()).unwrap();
    };
    fs::write(path(&cell, "out.part"), &bytes[..256 * MIB]).unwrap();
    done(0);
    let said = cell
        .bench
        .run("pss", "volume export a out --resume")
        .done()
        .stderr();
    assert!(said.contains("Going on at 256M"), "{said}");
    assert!(fs::read(path(&cell, "out")).unwrap() == bytes);
    fs::remove_file(path(&cell, "out")).unwrap();

    // A first part that is wrong is found; one of another state of the volume is not used.
    let mut wrong = bytes[..256 * MIB].to_vec();
    wrong[1000] ^= 1;
    fs::write(path(&cell, "out.part"), &wrong).unwrap();
    done(0);
    cell.bench
        .run("pss", "volume export a out --resume")
        .fails(8, &["sha256", "without --resume"]);
    assert!(!path(&cell, "out").exists());
    fs::write(path(&cell, "out.part"), &wrong).unwrap();
    done(1);
    cell.bench.run("pss", "volume export a out --resume").done();
    assert!(fs::read(path(&cell, "out")).unwrap() == bytes);

    // Somebody else's disk is not overwritten while it is used.
    let mut client =
        nbd_client::NbdClient::connect(cell.nbd(0), "a", Duration::from_secs(30)).unwrap();
    let reply = client
        .request(nbd_client::Command::Read, 0, 512, &[])
        .unwrap();
    assert_eq!(reply.error, 0);
    cell.bench
        .run("pss", "volume import raw a --resume")
        .fails(4, &["attached by"]);
}
