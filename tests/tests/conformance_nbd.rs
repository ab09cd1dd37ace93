//! The NBD server against clients that others wrote: libnbd's tools, qemu, fio and nbd-client.
//!
//! What runs is the NBD server in this process over a volume in memory, and then the same against
//! `pss-nbd` with a cell of three `pssd`; each on a unix socket and on a port of its own. Debian packages:
//! libnbd-bin python3-libnbd nbdkit qemu-utils fio nbd-client.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use export_nbd::export::{Exports, Policy};
use export_nbd::listen::Listener;
use export_nbd::memory::{MemoryDevice, MemoryVolumes};
use export_nbd::server::{Limits, Server};
use pss_tests::processes::{Cell, Layout, PATIENCE, Process, wait_until};
use pss_tests::programs::QEMU_IO;
use serde_json::Value;
use tempfile::TempDir;

const SIZE: u64 = 64 << 20;
/// No tool takes this long; a server that hangs is found by it.
const TOOL_SECONDS: &str = "60";

/// Exports `vol` (the default), `ro` (read-only, 4 MiB) and `other`.
struct Fixture {
    directory: TempDir,
    served: Served,
    tcp: String,
}

/// Who serves.
enum Served {
    /// The library, over memory; `vol` has a description.
    Memory {
        volumes: Arc<MemoryVolumes>,
        server: Arc<Server>,
        thread: Option<JoinHandle<()>>,
    },
    /// `pss-nbd`, over a cell.
    Cell { gateway: Process, cell: Box<Cell> },
}

/// Runs a test against the server over memory and against a cell.
fn both(test: impl Fn(&Fixture)) {
    println!("the server over memory:");
    test(&Fixture::memory());
    println!("pss-nbd with a cell:");
    test(&Fixture::cell());
}

impl Fixture {
    fn memory() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let volumes = MemoryVolumes::new([
            MemoryDevice::new("vol", SIZE).described("a disk"),
            MemoryDevice::new("ro", 4 << 20).read_only(),
            MemoryDevice::new("other", 1 << 20),
        ]);
        let policy = Policy {
            default_export: Some("vol".into()),
            ..Policy::default()
        };
        let exports = Exports::new(Arc::clone(&volumes) as _, policy);
        let server = Server::new(exports, Limits::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let guard = runtime.enter();
        let unix = Listener::unix(&directory.path().join("s")).unwrap();
        let tcp = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.uri("nbd");
        drop(guard);
        let serving = Arc::clone(&server);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let other = tokio::spawn(Arc::clone(&serving).serve(tcp));
                serving.serve(unix).await;
                other.await.unwrap();
            });
        });
        Fixture {
            directory,
            served: Served::Memory {
                volumes,
                server,
                thread: Some(thread),
            },
            tcp: address,
        }
    }

    fn cell() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let mut cell = Cell::new(Layout::small(3));
        for id in 0..3 {
            cell.start(id);
        }
        cell.wait_current();
        for volume in ["vol 64M", "ro 4M", "other 1M"] {
            let create = format!("volume create {volume} --chunk-size 1M");
            cell.bench.run("pss", &create).done();
        }
        let policy = directory.path().join("policy");
        std::fs::write(&policy, "ro read-only\n*\n").unwrap();
        let (socket, address) = (directory.path().join("s"), cell.nbd(0).to_string());
        let mut command = cell.bench.command("pss-nbd");
        command.arg("--unix").arg(&socket);
        command.args(["--listen", &address, "--default-export", "vol"]);
        command.arg("--export-policy").arg(&policy);
        let output = cell.bench.path("pss-nbd.log");
        let mut gateway = Process::start("pss-nbd", &mut command, output);
        wait_until("the gateway listens", PATIENCE, || {
            assert!(gateway.runs(), "{}", gateway.text());
            socket.exists() && TcpStream::connect(&address).is_ok()
        });
        Fixture {
            directory,
            served: Served::Cell {
                gateway,
                cell: Box::new(cell),
            },
            tcp: format!("nbd://{address}/"),
        }
    }

    /// What clients are told about an export.
    fn description(&self, export: &str) -> String {
        match (&self.served, export) {
            (Served::Memory { .. }, "vol") => "a disk".to_owned(),
            (Served::Memory { .. }, _) => String::new(),
            (Served::Cell { cell, .. }, _) => {
                let outcome = cell
                    .bench
                    .run("pss", &format!("volume show {export} --json"));
                let shown: Value = serde_json::from_slice(&outcome.done().0.stdout).unwrap();
                format!("PSS volume {}", shown["uuid"].as_str().unwrap())
            }
        }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("s").display())
    }

    fn tcp_uri(&self, export: &str) -> String {
        format!("{}{export}", self.tcp)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Of `vol`.
    fn content(&self) -> Vec<u8> {
        if let Served::Memory { volumes, .. } = &self.served {
            return volumes.get("vol").unwrap().content();
        }
        let copy = self.path("content");
        run("nbdcopy", &[&self.uri("vol"), copy.to_str().unwrap()]);
        std::fs::read(&copy).unwrap()
    }

    /// A sparse file as long as `vol`, runs of data with holes between them, and its content.
    fn image(&self) -> (String, Vec<u8>) {
        let path = self.path("source");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        let mut expected = vec![0; SIZE as usize];
        for (offset, length) in [(0, 1 << 20), (5 << 20, 12345), (40_000_000, 3 << 20)] {
            let data: Vec<u8> = (0..length).map(|at: u32| (at % 251) as u8 + 1).collect();
            file.write_all_at(&data, offset).unwrap();
            let at = offset as usize;
            expected[at..at + data.len()].copy_from_slice(&data);
        }
        (path.to_str().unwrap().to_owned(), expected)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        match &mut self.served {
            Served::Memory { server, thread, .. } => {
                server.stop();
                let ended = thread.take().map(JoinHandle::join);
                assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
            }
            Served::Cell { gateway, .. } if !std::thread::panicking() => {
                gateway.signal("TERM");
                assert_eq!(gateway.ends(PATIENCE), Some(0), "{}", gateway.text());
            }
            Served::Cell { .. } => {}
        }
    }
}

/// Where a tool is; fails with the package that has it.
fn find(tool: &str) -> PathBuf {
    let package = match tool {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        "qemu-img" | "qemu-io" => "qemu-utils",
        other => other,
    };
    let paths = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(|path| Path::new(path).join(tool));
    let found = paths.into_iter().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{tool} is missing: install the package {package}"))
}

fn tool(name: &str, arguments: &[&str]) -> Output {
    Command::new("timeout")
        .arg(TOOL_SECONDS)
        .arg(find(name))
        .args(arguments)
        // nbdsh runs the first python3 of PATH, which has to be the system's.
        .env("PATH", "/usr/bin:/usr/sbin:/bin:/sbin")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// Runs a tool that has to succeed; gives its standard output.
fn run(name: &str, arguments: &[&str]) -> String {
    let output = tool(name, arguments);
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {}\n{}",
        output.status,
        text(&output)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn json(name: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(name, arguments)).unwrap()
}

#[test]
fn nbdinfo_of_an_export() {
    both(|fixture| {
        let info = json("nbdinfo", &["--json", &fixture.uri("vol")]);
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        for (key, value) in [
            ("export-size", Value::from(SIZE)),
            ("description", fixture.description("vol").into()),
            ("contexts", vec!["base:allocation"].into()),
            ("block_size_minimum", 1.into()),
            ("block_size_preferred", 4096.into()),
            ("block_size_maximum", (32 << 20).into()),
            ("is_read_only", false.into()),
            ("is_rotational", false.into()),
            ("can_cache", true.into()),
            ("can_df", true.into()),
            ("can_fast_zero", true.into()),
            ("can_flush", true.into()),
            ("can_fua", true.into()),
            ("can_multi_conn", true.into()),
            ("can_trim", true.into()),
            ("can_zero", true.into()),
        ] {
            assert_eq!(export[key], value, "{key} in {export}");
        }
        let size = run("nbdinfo", &["--size", &fixture.tcp_uri("")]);
        assert_eq!(size.trim(), SIZE.to_string());
    });
}

#[test]
fn nbdinfo_can_and_is() {
    both(|fixture| {
        let (vol, ro) = (fixture.uri("vol"), fixture.uri("ro"));
        let code = |what: &[&str]| tool("nbdinfo", what).status.code();
        for (what, of_ro) in [
            ("connect", 0),
            ("read", 0),
            ("multi-conn", 0),
            ("flush", 0),
            ("fua", 0),
            ("cache", 0),
            ("df", 0),
            ("write", 2),
            ("zero", 2),
            ("trim", 2),
            ("fast-zero", 2),
        ] {
            assert_eq!(code(&["--can", what, &vol]), Some(0), "{what}");
            assert_eq!(code(&["--can", what, &ro]), Some(of_ro), "{what} of ro");
        }
        assert_eq!(code(&["--is", "read-only", &ro]), Some(0));
        assert_eq!(code(&["--is", "read-only", &vol]), Some(2));
        assert_eq!(code(&[&fixture.uri("none")]), Some(1));
    });
}

#[test]
fn nbdinfo_list() {
    both(|fixture| {
        let listed = json("nbdinfo", &["--list", "--json", &fixture.uri("")]);
        let exports = listed["exports"].as_array().unwrap();
        let names: Vec<_> = exports
            .iter()
            .map(|export| &export["export-name"])
            .collect();
        assert_eq!(names, ["other", "ro", "vol"]);
        let description = exports[2]["description"].as_str();
        assert_eq!(description.unwrap_or_default(), fixture.description("vol"));
        assert_eq!(exports[1]["is_read_only"], true);
        let listed = run("nbdinfo", &["--list", &fixture.tcp_uri("")]);
        assert!(listed.contains("export=\"other\":"), "{listed}");
    });
}

#[test]
fn nbd_client_list() {
    both(|fixture| {
        let address = fixture
            .tcp
            .trim_start_matches("nbd://")
            .trim_end_matches('/');
        let (host, port) = address.split_once(':').unwrap();
        let listed = run("nbd-client", &["-l", host, port]);
        for name in ["other", "ro", "vol"] {
            assert!(
                listed.lines().any(|line| line.starts_with(name)),
                "{listed}"
            );
        }
    });
}

#[test]
fn nbdcopy_there_and_back() {
    both(|fixture| {
        let (source, expected) = fixture.image();
        let (source, uri) = (&source, fixture.uri("vol"));
        run("nbdcopy", &[source, &uri]);
        assert!(fixture.content() == expected);

        let map = run("nbdinfo", &["--map", &uri]);
        let data = map.lines().filter(|line| line.ends_with("data"));
        assert_eq!(data.count(), 3, "{map}");
        let totals = run("nbdinfo", &["--map", "--totals", &fixture.tcp_uri("vol")]);
        assert!(totals.contains("hole,zero"), "{totals}");

        let back = fixture.path("back");
        run(
            "nbdcopy",
            &[&fixture.tcp_uri("vol"), back.to_str().unwrap()],
        );
        assert!(std::fs::read(&back).unwrap() == expected);
        let allocated = std::fs::metadata(&back).unwrap().blocks() * 512;
        assert!(allocated < 16 << 20, "holes became holes again");

        // All of it, written in full, by four connections.
        let many = [
            "--allocated",
            "--flush",
            "--connections=4",
            "--requests=64",
            source,
            &uri,
        ];
        run("nbdcopy", &many);
        assert!(fixture.content() == expected);
        run(
            "nbdcopy",
            &["--connections=4", "--requests=64", &uri, "null:"],
        );
    });
}

#[test]
fn qemu_img_reads_writes_and_compares() {
    both(|fixture| {
        let (source, expected) = fixture.image();
        let (source, uri) = (&source, fixture.uri("vol"));
        let raw = ["convert", "-n", "-f", "raw", "-O", "raw"];
        run("qemu-img", &[&raw[..], &[source, &uri]].concat());
        assert!(fixture.content() == expected);
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", source, &uri],
        );

        let info = json(
            "qemu-img",
            &["info", "--output=json", &fixture.tcp_uri("vol")],
        );
        assert_eq!(info["virtual-size"], SIZE);
        let map = json("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
        let parts = map.as_array().unwrap();
        let data = parts.iter().filter(|part| part["data"] == true);
        let data: u64 = data.map(|part| part["length"].as_u64().unwrap()).sum();
        assert!(((4 << 20) + 12345..5 << 20).contains(&data), "{map}");

        let back = fixture.path("back");
        let raw = ["convert", "-f", "raw", "-O", "raw", &uri];
        run("qemu-img", &[&raw[..], &[back.to_str().unwrap()]].concat());
        assert!(std::fs::read(&back).unwrap() == expected);
        let bench = ["bench", "-f", "raw", "-c", "2000", "-d", "16"];
        run("qemu-img", &[&bench[..], &["-w", &uri]].concat());
        run("qemu-img", &[&bench[..], &["-s", "65536", &uri]].concat());
    });
}

#[test]
fn qemu_io_commands() {
    both(|fixture| {
        let mut arguments = vec!["-f", "raw", "-d", "unmap"];
        for command in QEMU_IO.iter().chain(&["map"]) {
            arguments.extend(["-c", command]);
        }
        let uri = fixture.uri("vol");
        arguments.push(&uri);
        let output = tool("qemu-io", &arguments);
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        for sign in ["verification failed", "failed:", "error"] {
            assert!(!text.contains(sign), "{text}");
        }
        let ro = fixture.uri("ro");
        let read = tool("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4M", &ro]);
        assert!(read.status.success());
        let write = tool("qemu-io", &["-f", "raw", "-c", "write 0 4k", &ro]);
        assert!(!write.status.success(), "a read-only export takes no write");
    });
}

#[test]
fn fio_verifies_what_it_wrote() {
    both(|fixture| {
        let fio = |jobs: &[&str]| {
            let common = ["--ioengine=nbd", "--verify_fatal=1", "--do_verify=1"];
            run("fio", &[&common[..], jobs].concat())
        };
        let uri = format!("--uri={}", fixture.uri("vol"));
        fio(&[
            "--name=random",
            "--rw=randwrite",
            "--bs=4k",
            "--size=16M",
            "--iodepth=32",
            "--verify=crc32c",
            &uri,
        ]);
        // Lengths and offsets of any alignment, over TCP.
        let tcp = format!("--uri={}", fixture.tcp_uri("vol"));
        fio(&[
            "--name=uneven",
            "--rw=randwrite",
            "--bsrange=512-300k",
            "--bs_unaligned",
            "--size=32M",
            "--iodepth=16",
            "--verify=crc32c",
            &tcp,
        ]);
        // Four connections.
        fio(&[
            "--name=jobs",
            "--rw=randwrite",
            "--bs=4k",
            "--size=8M",
            "--offset_increment=8M",
            "--numjobs=4",
            "--iodepth=8",
            "--verify=sha1",
            &uri,
        ]);
    });
}

/// A server to compare ourselves with.
struct Nbdkit {
    child: Child,
    _directory: TempDir,
    uri: String,
}

impl Nbdkit {
    fn start() -> Nbdkit {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let child = Command::new(find("nbdkit"))
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .args(["memory", "64M"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !socket.exists() {
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "nbdkit does not start"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Nbdkit {
            child,
            _directory: directory,
            uri,
        }
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What nbdsh runs before the probes, once `SETUP` and `URI` are filled in.
const PROBE_PRELUDE: &str = r"
import json, nbd
h.set_strict_mode(0)
SETUP
h.connect_uri('URI')
size = h.get_size()
results = {}

def extents(length, offset, flags=0):
    found = []
    h.block_status(length, offset, lambda c, o, e, err: found.extend(e), flags)
    return found

def chunks(length, offset, flags=0):
    found = []
    def chunk(data, offset, status, error):
        found.append((offset, status, len(data)))
    h.pread_structured(length, offset, chunk, flags)
    return found

def run(name, probe):
    try:
        result = probe()
        silent = result is None or isinstance(result, (bytes, bytearray))
        results[name] = 'ok' if silent else str(result)
    except nbd.Error as error:
        results[name] = error.errno
";

/// Runs probes, one Python expression each, and gives what happened: `ok`, a value, or an errno.
fn probe<'a>(
    uri: &str,
    setup: &str,
    probes: impl Iterator<Item = (&'a str, &'a str)>,
) -> BTreeMap<String, String> {
    let mut script = PROBE_PRELUDE.replace("SETUP", setup).replace("URI", uri);
    for (name, expression) in probes {
        script.push_str(&format!("run({name:?}, lambda: {expression})\n"));
    }
    script.push_str("print(json.dumps(results))\n");
    serde_json::from_str(&run("nbdsh", &["-c", &script])).unwrap()
}

/// One row: name, Python expression, what proto.md asks of us, and what nbdkit 1.32 does if it differs.
type Probe = (
    &'static str,
    &'static str,
    &'static str,
    Option<&'static str>,
);

const BASIC_PROBES: &[Probe] = &[
    ("read", "h.pread(512, 0)", "ok", None),
    ("write", "h.pwrite(b'x' * 512, 512)", "ok", None),
    ("write at the end", "h.pwrite(b'x', size - 1)", "ok", None),
    ("unaligned", "h.pwrite(b'x' * 777, 12345)", "ok", None),
    ("read back", "h.pread(3, 12344) == b'\\0xx'", "True", None),
    ("flush", "h.flush()", "ok", None),
    ("fua", "h.pwrite(b'x', 0, nbd.CMD_FLAG_FUA)", "ok", None),
    ("trim", "h.trim(4096, 1 << 20)", "ok", None),
    ("trim fua", "h.trim(4096, 0, nbd.CMD_FLAG_FUA)", "ok", None),
    ("zero", "h.zero(8192, 100)", "ok", None),
    ("no hole", "h.zero(9, 1, nbd.CMD_FLAG_NO_HOLE)", "ok", None),
    ("zero of all", "h.zero(size, 0)", "ok", None),
    ("cache", "h.cache(65536, 0)", "ok", None),
];

const ERROR_PROBES: &[Probe] = &[
    // "NBD_EINVAL [...] read [...] beyond the end", "Error values".
    ("read past end", "h.pread(512, size)", "EINVAL", None),
    ("read over end", "h.pread(513, size - 512)", "EINVAL", None),
    ("read wrapping", "h.pread(5, (1 << 64) - 1)", "EINVAL", None),
    ("trim past end", "h.trim(512, size)", "EINVAL", None),
    ("cache past end", "h.cache(512, size)", "EINVAL", None),
    // "NBD_ENOSPC [...] write [...] beyond the size of the device".
    ("write past end", "h.pwrite(b'x', size)", "ENOSPC", None),
    (
        "write over end",
        "h.pwrite(b'x' * 513, size - 512)",
        "ENOSPC",
        None,
    ),
    ("zero past end", "h.zero(512, size)", "ENOSPC", None),
    ("trim of 4 GiB", "h.trim((1 << 32) - 1, 0)", "EINVAL", None),
    ("zero of 4 GiB", "h.zero((1 << 32) - 1, 0)", "ENOSPC", None),
    // "the behavior of a server on such a request is unspecified although the server SHOULD NOT
    // disconnect": ours succeeds, as qemu's does.
    ("read of none", "h.pread(0, 0)", "ok", Some("EINVAL")),
    ("write of none", "h.pwrite(b'', 0)", "ok", Some("ENOSPC")),
    ("trim of none", "h.trim(0, 0)", "ok", Some("EINVAL")),
    ("zero of none", "h.zero(0, 0)", "ok", Some("ENOSPC")),
    // The limit is what INFO_BLOCK_SIZE says: 32 MiB here, 64 MiB there.
    ("long read", "h.pread(32 << 20, 0)", "ok", None),
    ("long write", "h.pwrite(b'y' * (32 << 20), 0)", "ok", None),
    (
        "longer read",
        "h.pread((32 << 20) + 1, 0)",
        "EINVAL",
        Some("ok"),
    ),
    (
        "longer write",
        "h.pwrite(b'y' * ((32 << 20) + 1), 0)",
        "EINVAL",
        Some("ok"),
    ),
    ("undefined flag", "h.pread(5, 0, 1 << 15)", "EINVAL", None),
    (
        "flag of another command",
        "h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE)",
        "EINVAL",
        None,
    ),
    ("goes on", "h.pread(1, 0) == b'y'", "True", None),
];

/// For clients with structured replies and `base:allocation`.
const STRUCTURED_PROBES: &[Probe] = &[
    ("clear", "h.zero(32 << 20, 0)", "ok", None),
    ("clear the rest", "h.zero(32 << 20, 32 << 20)", "ok", None),
    ("data", "h.pwrite(b'x' * 65536, 131072)", "ok", None),
    (
        "extents",
        "extents(size, 0)",
        "[131072, 3, 65536, 0, 66912256, 3]",
        None,
    ),
    (
        "one extent",
        "extents(size, 0, nbd.CMD_FLAG_REQ_ONE)",
        "[131072, 3]",
        None,
    ),
    (
        "of a part",
        "extents(100, 131073)",
        "[100, 0]",
        Some("[32767, 0]"),
    ),
    ("past end", "extents(512, size)", "EINVAL", None),
    ("of none", "extents(0, 0)", "EINVAL", None),
    (
        "chunks",
        "chunks(262144, 65536)",
        "[(65536, 2, 65536), (131072, 1, 65536), (196608, 2, 131072)]",
        Some("[(65536, 1, 262144)]"),
    ),
    (
        "unfragmented",
        "chunks(262144, 65536, nbd.CMD_FLAG_DF)",
        "[(65536, 1, 262144)]",
        None,
    ),
    (
        "fast zero",
        "h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)",
        "ok",
        None,
    ),
    (
        "fast zero that keeps its space",
        "h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)",
        "ENOTSUP",
        Some("ok"),
    ),
];

const SIMPLE_PROBES: &[Probe] = &[
    (
        "simple",
        "h.get_structured_replies_negotiated()",
        "False",
        None,
    ),
    (
        "fragments",
        "h.pread(512, 0, nbd.CMD_FLAG_DF)",
        "EINVAL",
        None,
    ),
];

/// Runs tables against us, over memory and with a cell, and against nbdkit. Expectations are from proto.md; what nbdkit does otherwise
/// is written down, so that a mistake of ours in reading proto.md shows.
fn compare(setup: &str, tables: &[&[Probe]]) {
    let (memory, cell, nbdkit) = (Fixture::memory(), Fixture::cell(), Nbdkit::start());
    let rows: Vec<Probe> = tables.concat();
    let probes = || rows.iter().map(|row| (row.0, row.1));
    let ours = [("memory", &memory), ("cell", &cell)]
        .map(|(who, fixture)| (who, probe(&fixture.uri("vol"), setup, probes())));
    let theirs = probe(&nbdkit.uri, setup, probes());
    let mut wrong = Vec::new();
    for (name, expression, expected, nbdkit) in rows {
        for (who, results) in &ours {
            if results[name] != expected {
                let result = &results[name];
                wrong.push(format!("{expression}: {who} says {result}, not {expected}"));
            }
        }
        if theirs[name] != nbdkit.unwrap_or(expected) {
            wrong.push(format!("{expression}: nbdkit says {}", theirs[name]));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn probes_with_structured_replies() {
    let setup = "h.add_meta_context('base:allocation')";
    compare(setup, &[BASIC_PROBES, ERROR_PROBES, STRUCTURED_PROBES]);
}

#[test]
fn probes_with_simple_replies() {
    let setup = "h.set_request_structured_replies(False)";
    compare(setup, &[BASIC_PROBES, ERROR_PROBES, SIMPLE_PROBES]);
}

#[test]
fn probes_without_fixed_newstyle() {
    // EXPORT_NAME is then the only option: no GO, and 124 zeroes behind the reply.
    compare("h.set_handshake_flags(0)", &[BASIC_PROBES]);
    let setup = "h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)";
    compare(setup, &[BASIC_PROBES]);
}

#[test]
fn probes_of_a_read_only_export() {
    both(|fixture| {
        let setup = "h.add_meta_context('base:allocation')";
        let rows = [
            ("read", "h.pread(512, 0)", "ok"),
            ("flush", "h.flush()", "ok"),
            ("write", "h.pwrite(b'x', 0)", "EPERM"),
            ("long write", "h.pwrite(b'x' * 1000000, 0)", "EPERM"),
            ("zero", "h.zero(512, 0)", "EPERM"),
            ("trim", "h.trim(512, 0)", "EPERM"),
            ("extents", "extents(size, 0)", "[4194304, 3]"),
            ("cache", "h.cache(512, 0)", "ok"),
        ];
        let probes = rows.iter().map(|row| (row.0, row.1));
        let results = probe(&fixture.uri("ro"), setup, probes);
        for (name, _, expected) in rows {
            assert_eq!(results[name], expected, "{name}");
        }
    });
}

const HAGGLING: &str = r"
import nbd
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri('UNIX')
assert h.get_protocol() == 'newstyle-fixed'
found = []
assert h.opt_list(lambda name, text: found.append((name, text))) == 3
assert found == [('other', 'OTHER'), ('ro', 'RO'), ('vol', 'DESCRIPTION')], found

def no_export(option):
    try:
        option()
    except nbd.Error as error:
        assert error.errno == 'ENOENT', error
    else:
        assert False, 'there is no such export'

h.set_export_name('none')
no_export(h.opt_info)
no_export(h.opt_go)

def contexts(*queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []
    h.opt_list_meta_context(lambda name: found.append(name))
    return found

h.set_export_name('')
for queries in [[], ['base:'], ['base:allocation', 'qemu:x']]:
    assert contexts(*queries) == ['base:allocation'], queries
for queries in [['base:x'], ['x-pss:'], ['x:' + 'y' * 1000]]:
    assert contexts(*queries) == [], queries

def facts():
    sizes = [h.get_block_size(which) for which in range(3)]
    names = [h.get_canonical_export_name(), h.get_export_description()]
    can = [h.can_multi_conn(), h.can_df(), h.is_read_only()]
    return [h.get_size()] + names + sizes + can

h.clear_meta_contexts()
h.add_meta_context('base:allocation')
h.opt_info()
before = facts()
assert before[1:] == ['vol', 'DESCRIPTION', 1, 4096, 32 << 20, True, True, False], before
h.opt_go()
assert facts() == before, facts()
assert h.can_meta_context('base:allocation')
h.pread(1, 0)
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri('TCP')
h.opt_abort()
";

#[test]
fn option_haggling() {
    both(|fixture| {
        let script = HAGGLING
            .replace("UNIX", &fixture.uri(""))
            .replace("'OTHER'", &format!("'{}'", fixture.description("other")))
            .replace("'RO'", &format!("'{}'", fixture.description("ro")))
            .replace("DESCRIPTION", &fixture.description("vol"))
            .replace("TCP", &fixture.tcp_uri("vol"));
        run("nbdsh", &["-c", &script]);
    });
}

const TWO_CONNECTIONS: &str = r"
import nbd
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri('UNIX')
b.connect_uri('TCP')
for round in range(200):
    data = bytes([round + 1]) * 4096
    if round % 2:
        a.pwrite(data, round * 512, nbd.CMD_FLAG_FUA)
    else:
        a.pwrite(data, round * 512)
        a.flush()
    assert b.pread(4096, round * 512) == data
";

#[test]
fn pss_nbd_started_by_its_client() {
    let fixture = Fixture::cell();
    let Served::Cell { cell, .. } = &fixture.served else {
        unreachable!("it was made so");
    };
    let program = pss_tests::binaries::path("pss-nbd").display().to_string();
    let servers = cell.bench.path("server.conf").display().to_string();
    let command = [&program, "--servers", &servers, "--default-export", "vol"];
    // Socket activation, with LISTEN_FDS.
    let bracketed = [&["--size", "--", "["], &command[..], &["]"]].concat();
    assert_eq!(run("nbdinfo", &bracketed).trim(), SIZE.to_string());
    let script = format!(
        "h.connect_command({:?})\n\
         h.pwrite(b'on stdin', 1000)\n\
         assert h.pread(10, 999) == b'\\0on stdin\\0'\n\
         h.shutdown()",
        [&command[..], &["--stdio"]].concat()
    );
    run("nbdsh", &["-c", &script]);
    assert_eq!(fixture.content()[1000..1008], *b"on stdin");
}

#[test]
fn flushed_data_are_seen_by_other_connections() {
    both(|fixture| {
        // CAN_MULTI_CONN: "the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible across all
        // connections when the server sends its reply".
        let script = TWO_CONNECTIONS
            .replace("UNIX", &fixture.uri("vol"))
            .replace("TCP", &fixture.tcp_uri("vol"));
        run("nbdsh", &["-c", &script]);
    });
}

const IN_FLIGHT: &str = r"
import nbd
h.connect_uri('TCP')

def together(start):
    cookies = [start(block) for block in range(2000)]
    while cookies:
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
        if cookies:
            h.poll(-1)

source = [nbd.Buffer.from_bytearray(bytearray([n % 256]) * 4096) for n in range(2000)]
target = [nbd.Buffer(4096) for n in range(2000)]
together(lambda n: h.aio_pwrite(source[n], n * 4096))
together(lambda n: h.aio_pread(target[n], n * 4096))
for a, b in zip(source, target):
    assert a.to_bytearray() == b.to_bytearray()
";

#[test]
fn more_requests_than_may_be_in_flight() {
    both(|fixture| {
        let script = IN_FLIGHT.replace("TCP", &fixture.tcp_uri("vol"));
        run("nbdsh", &["-c", &script]);
    });
}

const STOPPED: &str = r"
import nbd, sys
h.connect_uri('UNIX')
h.pread(1, 0)
print('connected', flush=True)
sys.stdin.readline()
try:
    h.pread(1, 0)
except nbd.Error as error:
    assert error.errno != 'ESHUTDOWN', error
else:
    assert False, 'the server is gone'
";

#[test]
fn stopped_server_closes_and_never_says_shutdown() {
    stop_under_a_client(Fixture::memory());
    stop_under_a_client(Fixture::cell());
}

fn stop_under_a_client(fixture: Fixture) {
    let mut child = Command::new(find("nbdsh"))
        .args(["-c", &STOPPED.replace("UNIX", &fixture.uri("vol"))])
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 10];
    let stdout = child.stdout.as_mut().unwrap();
    std::io::Read::read_exact(stdout, &mut line).unwrap();
    drop(fixture);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn qemu_carries_on_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let volumes = MemoryVolumes::new([MemoryDevice::new("vol", SIZE)]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = || {
        let exports = Exports::new(Arc::clone(&volumes) as _, Policy::default());
        let server = Server::new(exports, Limits::default());
        let _guard = runtime.enter();
        let listener = Listener::unix(&socket).unwrap();
        let serving = runtime.spawn(Arc::clone(&server).serve(listener));
        (server, serving)
    };
    let (server, serving) = start();
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},\
         file.export=vol,file.reconnect-delay=20",
        socket.display()
    );
    let arguments = [
        "write -P 0x11 0 64k",
        "sleep 1500",
        "write -P 0x22 64k 64k",
        "read -P 0x11 0 64k",
    ];
    let arguments = arguments.iter().flat_map(|command| ["-c", command]);
    let child = Command::new(find("qemu-io"))
        .args(arguments)
        .args(["--image-opts", &image])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let device = volumes.get("vol").unwrap();
    let started = Instant::now();
    while device.content()[0] != 0x11 {
        assert!(started.elapsed() < Duration::from_secs(10), "no write");
        std::thread::sleep(Duration::from_millis(50));
    }
    server.stop();
    runtime.block_on(serving).unwrap();
    std::thread::sleep(Duration::from_millis(1700));
    let (server, serving) = start();
    let output = child.wait_with_output().unwrap();
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        !text.contains("failed") && device.content()[65536] == 0x22,
        "{text}"
    );
    server.stop();
    runtime.block_on(serving).unwrap();
}
