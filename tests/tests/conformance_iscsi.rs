//! iSCSI before a real cell, seen by initiators that others wrote: libiscsi's tools and its suite.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pss_tests::iscsi::{Gateway, Verdict, libiscsi, qemu, suite, suite_test};
use pss_tests::nbd_client::Command;
use pss_tests::processes::{Cell, Layout};
use pss_tests::programs::QEMU_IO;

/// The manual's example, to the letter.
const MANUAL: &str = "\
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store vol001>
    bs-type pss
    lun 1
  </backing-store>
  incominguser iscsi_pss iscsi_pss000
</target>
";
const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
const USER: &str = "iscsi_pss%iscsi_pss000@";

/// The shapes of disks on which the suite runs: name and directives.
const SHAPES: [(&str, &str); 4] = [
    ("thin", ""),
    ("exponent0", "lbppbe 0"),
    ("removable", "removable 1"),
    (READ_ONLY, "readonly 1"),
];
const READ_ONLY: &str = "readonly";

/// How the suite shows WRITE PROTECTED, of which tests that write complain on a disk that is read-only.
const WRITE_PROTECTED: [&str; 2] = ["(0x07)/(0x2700)", "WRITE_PROTECTED(0x2700)"];

/// What may fail, and why.
const MAY_FAIL: [(&str, &str); 2] = [
    (
        "GetLBAStatus.UnmapSingle",
        "a mistake of the tool where the exponent is not 0: it fails before tgt as well",
    ),
    (
        "iSCSITMF.LUNResetSimpleAsync",
        "1.19 run alone asserts before the answer is there (line 157); mended later in libiscsi",
    ),
];

/// What fails on a read-only disk without a word of why.
const SAYS_NOTHING: [&str; 2] = ["Sanitize.Reset", "Write10.Async"];

/// What is skipped on every shape, and why. The tests of SANITIZE skip a part and carry out the rest.
const MAY_SKIP: [(&str, &str); 3] = [
    ("Sanitize.CryptoErase", NOT_ENCRYPTED),
    ("Sanitize.Readonly", NOT_ENCRYPTED),
    ("Sanitize.Reservations", NOT_ENCRYPTED),
];
const NOT_ENCRYPTED: &str = "data are not encrypted, so there is no key that could be forgotten";

/// What only the long run has, as it takes a minute: it waits for the end of a SANITIZE, which has to take
/// longer than three seconds, and so has a larger disk.
const LONG: [&str; 1] = ["Sanitize.Reset"];

fn cell(volumes: &[&str]) -> Cell {
    let mut cell = Cell::new(Layout {
        gateways: 0,
        ..Layout::small(3)
    });
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    for volume in volumes {
        let create = format!("volume create {volume}");
        cell.bench.run("pss", &create).done();
    }
    cell
}

#[test]
fn the_manuals_example_on_two_gateways() {
    let mut cell = cell(&["vol001 1G"]);
    let gateways = [0, 1].map(|number| Gateway::start(&cell, number, MANUAL));
    let mut identities = Vec::new();
    for gateway in &gateways {
        let portal = format!("iscsi://{}", gateway.portal);
        let (done, said) = libiscsi("iscsi-ls", &[&portal]);
        assert!(done && said.contains(TARGET), "{said}");
        let (done, said) = libiscsi("iscsi-readcapacity16", &[&gateway.url(USER, TARGET, 1)]);
        assert!(done && said.contains("Total size:1073741824"), "{said}");
        let mut identity = String::new();
        for page in ["128", "131"] {
            let url = gateway.url(USER, TARGET, 1);
            let (done, said) = libiscsi("iscsi-inq", &["-e", "1", "-c", page, &url]);
            assert!(done, "{said}");
            // The port is another one on every gateway; the disk is not.
            let of_disk = said.split("Designator").filter(|it| !it.contains("PORT"));
            identity.extend(of_disk);
        }
        identities.push(identity);
        for wrong in ["", "iscsi_pss%iscsi_pss001@", "someone%iscsi_pss000@"] {
            let (done, said) = libiscsi("iscsi-inq", &[&gateway.url(wrong, TARGET, 1)]);
            assert!(!done, "{wrong}: {said}");
        }
        let text = gateway.process.text();
        assert!(text.contains("refused"), "{text}");
        assert!(!text.contains("iscsi_pss000"), "secrets are never logged");
    }
    assert_eq!(identities[0], identities[1]);
    // What is written over iSCSI is what NBD reads, with a server killed in between.
    let urls = gateways.each_ref().map(|it| it.url(USER, TARGET, 1));
    let (verdict, said) = suite_test("CompareAndWrite.Simple", &urls[..1]);
    assert_eq!(verdict, Verdict::Passed, "{said}");
    let leader = cell.leader();
    cell.kill(leader);
    let (verdict, said) = suite_test("WriteVerify10.Simple", &urls[1..]);
    assert_eq!(verdict, Verdict::Passed, "{said}");
    cell.start(leader);
    cell.wait_current();
    cell.start_gateway(0);
    let mut nbd = pss_tests::nbd_client::NbdClient::connect(
        cell.nbd(0),
        "vol001",
        pss_tests::processes::PATIENCE,
    )
    .unwrap();
    let reply = nbd.request(Command::Read, 0, 4096, &[]).unwrap();
    assert_eq!(reply.error, 0);
    // WriteVerify10.Simple writes 0xa6 over the first 256 blocks of 512.
    assert!(
        reply.data.iter().all(|byte| *byte == 0xa6),
        "{:?}",
        &reply.data[..8]
    );
}

/// A disk image goes into a volume and comes back, and every kind of request is made, with CHAP and with
/// each answer about digests that QEMU can ask for.
#[test]
fn qemu_over_iscsi() {
    let cell = cell(&["vol001 128M"]);
    let gateway = Gateway::start(&cell, 0, MANUAL);
    let image = cell.bench.path("image");
    let back = cell.bench.path("back");
    let (image, back) = (image.to_str().unwrap(), back.to_str().unwrap());
    // Data, a hole, data, a hole up to the size of the disk.
    let mut bytes: Vec<u8> = (0..24 << 20)
        .map(|at: u64| (at / 512 * 7 + at) as u8)
        .collect();
    bytes[8 << 20..16 << 20].fill(0);
    std::fs::write(image, &bytes).unwrap();
    let file = std::fs::File::options().write(true).open(image).unwrap();
    file.set_len(128 << 20).unwrap();

    let url = gateway.url(USER, TARGET, 1);
    let qemu_img = |args: &[&str]| {
        let (done, said) = qemu("qemu-img", args);
        assert!(done, "{args:?}: {said}");
        said
    };
    let raw = ["-f", "raw"];
    let said = qemu_img(&["info", "-f", "raw", "--output=json", &url]);
    assert!(said.contains("\"virtual-size\": 134217728"), "{said}");
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", image, &url]);
    qemu_img(&["compare", "-f", "raw", "-F", "raw", image, &url]);
    // What was a hole takes no space: GET LBA STATUS says so.
    let map = qemu_img(&["map", "-f", "raw", "--output=json", &url]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let is_hole = |at: u64| {
        let extents = map.as_array().unwrap();
        let covers = |it: &&serde_json::Value| {
            let start = it["start"].as_u64().unwrap();
            start <= at && at < start + it["length"].as_u64().unwrap()
        };
        extents.iter().find(covers).unwrap()["data"] == false
    };
    assert_eq!(
        [0, 20 << 20, 12 << 20, 100 << 20].map(is_hole),
        [false, false, true, true],
        "{map}"
    );
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &url, back]);
    assert!(std::fs::read(image).unwrap() == std::fs::read(back).unwrap());
    qemu_img(
        &[
            &["bench"],
            &raw[..],
            &["-c", "2000", "-d", "16", "-w", &url],
        ]
        .concat(),
    );
    qemu_img(
        &[
            &["bench"],
            &raw[..],
            &["-c", "2000", "-d", "16", "-s", "65536", &url],
        ]
        .concat(),
    );
    for wrong in ["", "iscsi_pss%iscsi_pss001@", "someone%iscsi_pss000@"] {
        let url = gateway.url(wrong, TARGET, 1);
        let (done, said) = qemu("qemu-img", &["info", "-f", "raw", &url]);
        assert!(!done, "{wrong}: {said}");
    }

    // CHAP with a secret that is on no command line, and all that QEMU can ask about header digests.
    let secret = cell.bench.path("secret");
    std::fs::write(&secret, "iscsi_pss000").unwrap();
    let secret = format!("secret,id=chap,file={}", secret.display());
    for (offer, agreed) in [
        ("none", false),
        ("crc32c", true),
        ("none-crc32c", false),
        ("crc32c-none", true),
    ] {
        let options = format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={},file.target={TARGET},file.lun=1,\
             file.user=iscsi_pss,file.password-secret=chap,file.header-digest={offer}",
            gateway.portal
        );
        let mut args = vec!["--object", &secret, "-d", "unmap", "--image-opts"];
        // The sleep is there for the session to be seen.
        for command in ["sleep 500"].iter().chain(&QEMU_IO) {
            args.extend(["-c", command]);
        }
        args.push(&options);
        let session = || {
            let control = gateway.control.display();
            let sessions = format!("iscsi --control {control} --json sessions");
            let said = cell.bench.run("pss", &sessions).done().stdout();
            let said: serde_json::Value = serde_json::from_str(&said).unwrap();
            said["sessions"][0]["header_digest"].as_bool()
        };
        let said = std::thread::scope(|scope| {
            let io = scope.spawn(|| qemu("qemu-io", &args));
            let mut seen = None;
            while !io.is_finished() {
                seen = session().or(seen);
            }
            assert_eq!(seen, Some(agreed), "{offer}");
            io.join().unwrap()
        });
        assert!(said.0, "{offer}: {}", said.1);
        for sign in ["verification failed", "failed:", "error"] {
            assert!(!said.1.contains(sign), "{offer}: {}", said.1);
        }
    }
}

#[test]
fn libiscsis_suite() {
    let is_short = |name: &String| !LONG.contains(&name.as_str());
    let names: Vec<String> = suite().into_iter().filter(is_short).collect();
    // The shape that skips least, and the one that is not written to.
    run_suite(&SHAPES[2..], &names);
}

#[test]
#[ignore = "for a command of its own: cargo test -p pss-tests --test conformance_iscsi -- --ignored --nocapture"]
fn libiscsis_suite_on_all_disks() {
    run_suite(&SHAPES, &suite());
}

/// Tests that want two paths to a disk.
fn is_multipath(name: &str) -> bool {
    name.starts_with("MultipathIO.")
}

/// Runs tests on all shapes and prints the table of docs/testing.md. Each disk has one gateway, and two
/// for the tests of multipath.
fn run_suite(shapes: &[(&str, &str)], names: &[String]) {
    let create = |(shape, _): &(&str, &str)| [format!("{shape} 64M"), format!("{shape}-large 1G")];
    let volumes: Vec<String> = shapes.iter().flat_map(create).collect();
    let volumes: Vec<&str> = volumes.iter().map(String::as_str).collect();
    let cell = cell(&volumes);
    let conf: String = shapes
        .iter()
        .map(|(shape, directives)| {
            format!(
                "<target iqn.2001-03.jp.tritech:{shape}>\n<backing-store {shape}>\nbs-type pss\nlun 1\n\
                 sanitize 1\n{directives}\n</backing-store>\n<backing-store {shape}-large>\n\
                 bs-type pss\nlun 2\nsanitize 1\n{directives}\n</backing-store>\n</target>\n"
            )
        })
        .collect();
    let gateways = [0, 1].map(|number| Gateway::start(&cell, number, &conf));
    let verdicts = Mutex::new(BTreeMap::<String, Vec<Verdict>>::new());
    let failures = Mutex::new(Vec::new());
    let counts: Vec<[AtomicUsize; 3]> = shapes.iter().map(|_| Default::default()).collect();
    // A disk is for one test at a time; the shapes are independent of each other.
    std::thread::scope(|scope| {
        for ((shape, _), count) in shapes.iter().zip(&counts) {
            let target = format!("iqn.2001-03.jp.tritech:{shape}");
            let urls = [1, 2].map(|lun| gateways.each_ref().map(|it| it.url("", &target, lun)));
            let (verdicts, failures) = (&verdicts, &failures);
            scope.spawn(move || {
                for name in names {
                    let paths = if is_multipath(name) { 2 } else { 1 };
                    let disk = usize::from(LONG.contains(&name.as_str()));
                    let (verdict, said) = suite_test(name, &urls[disk][..paths]);
                    count[verdict as usize].fetch_add(1, Ordering::Relaxed);
                    let mut verdicts = verdicts.lock().unwrap();
                    verdicts.entry(name.clone()).or_default().push(verdict);
                    let refused = *shape == READ_ONLY
                        && (WRITE_PROTECTED.iter().any(|it| said.contains(it))
                            || SAYS_NOTHING.contains(&name.as_str()));
                    let may = refused || MAY_FAIL.iter().any(|(it, _)| it == name);
                    if verdict == Verdict::Failed && !may {
                        let said = format!("{shape} {name}:\n{said}");
                        failures.lock().unwrap().push(said);
                    }
                }
            });
        }
    });
    println!("| disk | tests | passed | skipped | failed |\n|---|---|---|---|---|");
    for ((shape, _), count) in shapes.iter().zip(&counts) {
        let [passed, skipped, failed] = count.each_ref().map(|it| it.load(Ordering::Relaxed));
        let all = names.len();
        println!("| {shape} | {all} | {passed} | {skipped} | {failed} |");
    }
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    let verdicts = verdicts.into_inner().unwrap();
    let never = verdicts
        .into_iter()
        .filter(|(_, verdicts)| !verdicts.contains(&Verdict::Passed));
    let may = |name: &String| MAY_FAIL.iter().chain(&MAY_SKIP).any(|(it, _)| it == name);
    let never: Vec<String> = never.map(|(name, _)| name).filter(|it| !may(it)).collect();
    assert!(never.is_empty(), "passed on no disk: {never:?}");
    for mut gateway in gateways {
        assert!(gateway.process.runs(), "{}", gateway.process.text());
        assert!(!gateway.process.text().contains("panicked"));
    }
}
