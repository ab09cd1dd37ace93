//! A machine that starts from a volume: iPXE in QEMU logs in, with CHAP both ways, and a boot sector reads and
//! writes through its INT 13h.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use pss_tests::iscsi::{Gateway, machine};
use pss_tests::nbd_client::{Command, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE};

const CONF: &str = "\
<target iqn.2001-03.jp.tritech:open>
  backing-store boot
</target>
<target iqn.2001-03.jp.tritech:chap>
  backing-store boot
  incominguser alice alicesecret1
</target>
<target iqn.2001-03.jp.tritech:mutual>
  backing-store boot
  incominguser alice alicesecret1
  outgoinguser bob bobsecret1234
</target>
";
const ALICE: &str = "set username alice\nset password alicesecret1\n";
const BOB: &str = "set reverse-username bob\nset reverse-password bobsecret1234\n";

/// What the boot sector says: it stands in the second sector, of which it makes the third a copy.
const SAYS: &[u8] = b"PSS boots\n\0";
/// Sector at 7C00h: reads the second sector to 8000h (INT 13h, 42h), writes it to the third (43h), says it on the
/// first serial port and leaves QEMU by port F4h with 10h, or with 11h after an error.
const SECTOR: [u8; 72] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0x8e, 0xd0, // mov ss, ax
    0xbc, 0x00, 0x7c, // mov sp, 7c00h
    0xbe, 0x38, 0x7c, // mov si, packet
    0xb4, 0x42, // mov ah, 42h
    0xcd, 0x13, // int 13h
    0x72, 0x1d, // jc fail
    0xff, 0x06, 0x40, 0x7c, // inc word [packet + 8]
    0xb8, 0x00, 0x43, // mov ax, 4300h
    0xcd, 0x13, // int 13h
    0x72, 0x12, // jc fail
    0xbe, 0x00, 0x80, // mov si, 8000h
    0xba, 0xf8, 0x03, // mov dx, 3f8h
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz done
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
    0xb0, 0x10, // done: mov al, 10h
    0xeb, 0x02, // jmp leave
    0xb0, 0x11, // fail: mov al, 11h
    0xba, 0xf4, 0x00, // leave: mov dx, 0f4h
    0xee, // out dx, al
    0xf4, // hlt
    16, 0, 1, 0, 0x00, 0x80, 0, 0, // packet: one sector to 0:8000h
    1, 0, 0, 0, 0, 0, 0, 0, // from LBA 1
];
/// QEMU's exit code for 10h.
const BOOTED: Option<i32> = Some(0x10 << 1 | 1);
/// And that of a machine which resets, as the script has it after a failure.
const REFUSED: Option<i32> = Some(0);

fn disk() -> Vec<u8> {
    let mut sectors = vec![0; 4096];
    sectors[..SECTOR.len()].copy_from_slice(&SECTOR);
    sectors[510..512].copy_from_slice(&[0x55, 0xaa]);
    sectors[512..][..SAYS.len()].copy_from_slice(SAYS);
    sectors
}

/// Starts a machine whose network card asks iPXE for the script; how it ended, and what it said.
fn boot(dir: &Path, script: &str) -> (Option<i32>, String) {
    fs::write(dir.join("boot.ipxe"), script).unwrap();
    let network = format!("user,id=network,tftp={},bootfile=boot.ipxe", dir.display());
    machine(&[
        // The firmware's console is the serial port.
        "-machine",
        "pc,accel=tcg,graphics=off",
        "-m",
        "64",
        "-display",
        "none",
        "-no-reboot",
        "-monitor",
        "none",
        "-serial",
        "stdio",
        "-boot",
        "n",
        "-netdev",
        &network,
        "-device",
        "e1000,netdev=network",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=1",
    ])
}

#[test]
fn a_machine_starts_from_a_volume() {
    let mut cell = Cell::new(Layout::small(3));
    for id in 0..3 {
        cell.start(id);
    }
    cell.wait_current();
    cell.bench.run("pss", "volume create boot 64M").done();
    cell.start_gateway(0);
    let mut nbd = NbdClient::connect(cell.nbd(0), "boot", PATIENCE).unwrap();
    let gateway = Gateway::start(&cell, 0, CONF);
    for (target, settings, ends) in [
        ("open", String::new(), BOOTED),
        ("chap", ALICE.to_owned(), BOOTED),
        ("mutual", format!("{ALICE}{BOB}"), BOOTED),
        ("chap", ALICE.replace("secret1", "secret2"), REFUSED),
        (
            "mutual",
            format!("{ALICE}{}", BOB.replace("34", "35")),
            REFUSED,
        ),
    ] {
        let written = nbd.request(Command::Write, 0, 4096, &disk()).unwrap();
        assert_eq!(written.error, 0);
        let script = format!(
            "#!ipxe\nset initiator-iqn iqn.2010-04.org.ipxe:guest\n{settings}\
             sanboot iscsi:{}::{}:1:iqn.2001-03.jp.tritech:{target} || reboot\n",
            gateway.portal.ip(),
            gateway.portal.port(),
        );
        let (code, said) = boot(&cell.bench.path(""), &script);
        assert_eq!(code, ends, "{script}\n{said}");
        assert_eq!(said.contains("PSS boots"), ends == BOOTED, "{said}");
        let third = nbd.request(Command::Read, 1024, 512, &[]).unwrap().data;
        assert_eq!(third.starts_with(SAYS), ends == BOOTED, "{third:?}");
    }
}
