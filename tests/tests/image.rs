//! A real file system image is copied into volumes with tools that others wrote while the leader is
//! killed, and comes back byte for byte: over NBD, and from the files of a stopped server with `cat`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pss_tests::binaries::tool;
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};

const IMAGE_BYTES: u64 = 256 << 20;
/// What the files of the image take together, about.
const TREE_BYTES: u64 = 190 << 20;
/// The leader is killed when so much has arrived.
const KILL_AT_BYTES: u64 = 40 << 20;
/// No copy takes this long.
const COPY: Duration = Duration::from_secs(120);

/// Copies parts of this machine's file system until there is enough.
fn make_tree(tree: &Path) {
    fs::create_dir(tree).unwrap();
    let mut left = TREE_BYTES;
    for top in ["/usr/share", "/usr/lib", "/usr/bin", "/usr/sbin"] {
        let to = tree.join(top.trim_start_matches('/'));
        fs::create_dir_all(&to).unwrap();
        let mut entries: Vec<_> = fs::read_dir(top)
            .unwrap()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        entries.sort();
        for entry in entries {
            let bytes = disk_usage(&entry);
            if bytes <= left {
                // Files that this user may not read are left out.
                let _ = Command::new("cp")
                    .arg("-a")
                    .args([&entry, &to])
                    .stderr(Stdio::null())
                    .status();
                left -= bytes;
            }
        }
    }
    assert!(left < TREE_BYTES / 4, "this machine has too few files");
}

fn disk_usage(path: &Path) -> u64 {
    let output = Command::new("du").arg("-sk").arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let kib = text.split_whitespace().next().unwrap_or("0");
    // Names and inodes take space as well.
    kib.parse::<u64>().unwrap() * 1024 * 11 / 10
}

fn run(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = output.status;
    assert!(
        status.success(),
        "{} {args:?}: {status}\n{text}",
        program.display()
    );
    text
}

/// A cell, and the image as a file.
struct Fixture {
    cell: Cell,
    image: String,
}

impl Fixture {
    fn new() -> Fixture {
        let layout = Layout {
            flags: "--segment-size 16M --checkpoint-size 64M --log-retain 64M".to_owned(),
            ..Layout::small(3)
        };
        let cell = Cell::started(layout, "1M");
        let tree = cell.bench.path("tree");
        make_tree(&tree);
        let image = cell.bench.path("image").display().to_string();
        let size = (IMAGE_BYTES >> 10).to_string();
        let mke2fs = tool("mke2fs", "e2fsprogs");
        let tree_name = tree.display().to_string();
        let args = ["-q", "-F", "-t", "ext4", "-d", &tree_name, &image, &size];
        run(&mke2fs, &args);
        fs::remove_dir_all(tree).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), IMAGE_BYTES);
        Fixture { cell, image }
    }

    fn create(&self, volume: &str) {
        let args = format!("volume create {volume} {IMAGE_BYTES}");
        self.cell.bench.run("pss", &args).done();
    }

    fn uri(&self, volume: &str) -> String {
        format!("nbd://{}/{volume}", self.cell.nbd(0))
    }

    fn show(&self, volume: &str) -> serde_json::Value {
        let args = format!("volume show {volume} --json");
        let outcome = self.cell.bench.run("pss", &args);
        serde_json::from_slice(&outcome.done().0.stdout).unwrap()
    }

    /// Copies with a tool and kills the leader in the middle. Gives who that was.
    fn copy(&mut self, volume: &str, program: &Path, args: &[&str]) -> u8 {
        self.create(volume);
        let leader = self.cell.leader();
        let begun = Instant::now();
        let log = self.cell.bench.path(&format!("copy-{volume}.log"));
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null());
        let mut copy = Process::start(volume, &mut command, log);
        wait_until("a part has arrived", COPY, || {
            self.show(volume)["allocated_bytes"].as_u64() >= Some(KILL_AT_BYTES)
        });
        self.cell.kill(leader);
        assert!(copy.runs(), "not killed in the middle: {}", copy.text());
        println!(
            "{volume}: leader {leader} killed after {:?}",
            begun.elapsed()
        );
        assert_eq!(copy.ends(COPY), Some(0), "{}", copy.text());
        println!("{volume}: copied after {:?}", begun.elapsed());
        self.cell.start(leader);
        leader
    }

    /// The volume is the image, as far as its readers can see.
    fn check(&self, volume: &str) {
        let back = self.cell.bench.path("back").display().to_string();
        run(&tool("nbdcopy", "libnbd-bin"), &[&self.uri(volume), &back]);
        run(Path::new("cmp"), &[&self.image, &back]);
        run(&tool("e2fsck", "e2fsprogs"), &["-f", "-n", &back]);
        fs::remove_file(&back).unwrap();
        let (image, uri) = (&self.image, self.uri(volume));
        let args = ["compare", "-f", "raw", "-F", "raw", image, &uri];
        let said = run(&tool("qemu-img", "qemu-utils"), &args);
        assert!(said.contains("Images are identical"), "{said}");
    }

    /// Puts the chunk files of a stopped server together as an operator would.
    fn check_files(&self, id: u8, volume: &str, chunk_bytes: u64) {
        let disk = self.cell.bench.path("disk").display().to_string();
        let script = r#"
            set -e
            cd "$1"
            for ((chunk = 0; chunk * $2 < $3; chunk++)); do
                name=$(printf %02x/%02x/%02x $((chunk >> 16)) $((chunk >> 8 & 255)) $((chunk & 255)))
                if [ -e $name ]; then head -c $2 $name; else head -c $2 /dev/zero; fi
            done | head -c $3 > "$4"
            cmp "$4" "$5"
            rm "$4"
        "#;
        let directory = self.cell.chunks(id, volume).display().to_string();
        let (chunk, size) = (chunk_bytes.to_string(), IMAGE_BYTES.to_string());
        let args = [
            "-c",
            script,
            "-",
            &directory,
            &chunk,
            &size,
            &disk,
            &self.image,
        ];
        run(Path::new("bash"), &args);
    }
}

#[test]
fn a_file_system_image_goes_in_and_comes_back_while_leaders_are_killed() {
    let start = Instant::now();
    let mut fixture = Fixture::new();
    println!("the image is made after {:?}", start.elapsed());
    let image = fixture.image.clone();

    let qemu_img = tool("qemu-img", "qemu-utils");
    let uri = fixture.uri("qemu");
    let args = ["convert", "-n", "-f", "raw", "-O", "raw", &image, &uri];
    let first = fixture.copy("qemu", &qemu_img, &args);
    fixture.check("qemu");
    println!("checked after {:?}", start.elapsed());
    fixture.cell.wait_current();

    let nbdcopy = tool("nbdcopy", "libnbd-bin");
    let uri = fixture.uri("nbdcopy");
    let second = fixture.copy("nbdcopy", &nbdcopy, &[&image, &uri]);
    fixture.check("nbdcopy");
    println!("checked after {:?}", start.elapsed());

    fixture.cell.wait_current();
    let chunk_bytes = fixture.show("qemu")["chunk_bytes"].as_u64().unwrap();
    fixture.cell.gateways.remove(&0);
    for id in 0..3 {
        let server = &mut fixture.cell.servers.remove(&id).unwrap();
        server.signal("TERM");
        assert_eq!(server.ends(PATIENCE), Some(0), "{}", server.text());
    }
    for id in [first, second] {
        fixture.check_files(id, "qemu", chunk_bytes);
        fixture.check_files(id, "nbdcopy", chunk_bytes);
    }
    println!("all is checked after {:?}", start.elapsed());
}
