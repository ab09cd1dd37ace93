//! What `pss-iscsi` sends, read by a decoder that others wrote: no PDU is malformed, and the numbers in them are
//! those of RFC 7143. The initiators are QEMU, libiscsi and one that asks for what those two do not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use pss_tests::iscsi::{Gateway, libiscsi, qemu, suite_test};
use pss_tests::iscsi_client::{IscsiClient, cdb10, put, word};
use pss_tests::processes::{Cell, Layout};
use pss_tests::programs::QEMU_IO;
use pss_tests::recorder::{Recorder, WirePdu};

const TARGET: &str = "iqn.2001-03.jp.tritech:tgtd-pss";
const CONF: &str = "\
<target iqn.2001-03.jp.tritech:tgtd-pss>
  <backing-store v>
    bs-type pss
    lun 1
  </backing-store>
</target>
";
const PATIENCE: Duration = Duration::from_secs(30);
const NO_TAG: u32 = u32::MAX;

// Opcodes (§11.2.1.2).
const NOP_OUT: u32 = 0x00;
const COMMAND: u32 = 0x01;
const TASK_REQUEST: u32 = 0x02;
const TEXT_REQUEST: u32 = 0x04;
const LOGOUT: u32 = 0x06;
const NOP_IN: u32 = 0x20;
const RESPONSE: u32 = 0x21;
const TASK_RESPONSE: u32 = 0x22;
const LOGIN_RESPONSE: u32 = 0x23;
const TEXT_RESPONSE: u32 = 0x24;
const DATA_IN: u32 = 0x25;
const LOGOUT_RESPONSE: u32 = 0x26;
const R2T: u32 = 0x31;
const ASYNC: u32 = 0x32;
const REJECT: u32 = 0x3f;

/// Tests of libiscsi's suite that send what is out of the ordinary.
const SUITE: [&str; 9] = [
    "iSCSIcmdsn.iSCSICmdSnTooHigh",
    "iSCSIcmdsn.iSCSICmdSnTooLow",
    "iSCSIResiduals.Read10Residuals",
    "iSCSIResiduals.Write10Residuals",
    "iSCSIResiduals.WriteVerify16Residuals",
    "iSCSITMF.AbortTaskSimpleAsync",
    "CompareAndWrite.Miscompare",
    "Inquiry.AllocLength",
    "Unmap.Simple",
];

#[test]
fn an_independent_decoder_finds_nothing_wrong() {
    let cell = Cell::started(Layout::small(3), "64M --chunk-size 1M");
    let gateway = Gateway::start(&cell, 0, CONF);
    let recorder = Recorder::start(cell.nbd(0).ip(), gateway.portal);
    let portal = recorder.address;
    let url = format!("iscsi://{portal}/{TARGET}/1");

    libiscsi("iscsi-ls", &["-s", &format!("iscsi://{portal}")]);
    for name in SUITE {
        suite_test(name, std::slice::from_ref(&url));
    }
    for digest in ["none", "crc32c"] {
        let options = format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={portal},file.target={TARGET},\
             file.lun=1,file.header-digest={digest}"
        );
        let mut args = vec!["-d", "unmap", "--image-opts"];
        for command in &QEMU_IO {
            args.extend(["-c", command]);
        }
        args.push(&options);
        let (done, said) = qemu("qemu-io", &args);
        assert!(done, "{said}");
    }
    scripted(&cell, &gateway, portal);

    let connections = recorder.decode(cell.bench.path("").as_path());
    let mut seen = BTreeSet::new();
    for (number, pdus) in connections.iter().enumerate() {
        assert!(!pdus.is_empty(), "connection {number}");
        let mut checker = Checker::default();
        for (at, pdu) in pdus.iter().enumerate() {
            if let Err(wrong) = checker.check(pdu) {
                panic!("connection {number}, PDU {at}: {wrong}: {pdu:?}");
            }
            seen.insert(pdu.opcode());
        }
    }
    for opcode in [
        NOP_IN,
        RESPONSE,
        TASK_RESPONSE,
        LOGIN_RESPONSE,
        TEXT_RESPONSE,
        DATA_IN,
        LOGOUT_RESPONSE,
        R2T,
        ASYNC,
        REJECT,
    ] {
        assert!(seen.contains(&opcode), "no PDU with opcode {opcode:#x}");
    }
}

/// A session with short segments and bursts, every request that there is, and one that is none.
fn scripted(cell: &Cell, gateway: &Gateway, portal: SocketAddr) {
    let keys = "MaxRecvDataSegmentLength=512\0MaxBurstLength=1024\0FirstBurstLength=512\0InitialR2T=Yes\0\
                ImmediateData=No\0MaxOutstandingR2T=2\0ErrorRecoveryLevel=1\0";
    let mut client = IscsiClient::login_with(portal, TARGET, 9, keys, PATIENCE).unwrap();
    client.ready().unwrap();
    // A read of several bursts.
    let read = client.command(&cdb10(0x28, 0, 9), 9 * 512, &[]).unwrap();
    assert_eq!((read.status, read.data.len()), (0, 9 * 512));
    // A write of several bursts, of which two are asked for at a time.
    let (mut write, itt) = client.request(0x01, 0xa1);
    put(&mut write, 20, 4096);
    write[32..42].copy_from_slice(&cdb10(0x2a, 0, 8));
    client.send(write, &[]).unwrap();
    loop {
        let (answer, _) = client.receive().unwrap();
        if answer[0] & 0x3f == 0x21 {
            assert_eq!((word(&answer, 16), answer[3]), (itt, 0));
            break;
        }
        let (offset, length) = (word(&answer, 40), word(&answer, 44));
        for (data_sn, at) in (0..).zip((0..length).step_by(512)) {
            let mut data = [0; 48];
            data[0] = 0x05;
            data[1] = if at + 512 == length { 0x80 } else { 0 };
            data[8..24].copy_from_slice(&answer[8..24]);
            put(&mut data, 36, data_sn);
            put(&mut data, 40, offset + at);
            client.send(data, &[0x5a; 512]).unwrap();
        }
    }
    // A ping with data, text, a reset, a SNACK for what is no more, an opcode that nobody knows.
    let (mut ping, _) = client.request(0x00, 0x80);
    put(&mut ping, 20, NO_TAG);
    client.send(ping, b"are you there").unwrap();
    assert_eq!(client.receive().unwrap().1, b"are you there");
    let (mut text, _) = client.request(0x04, 0x80);
    text[9] = 0;
    put(&mut text, 20, NO_TAG);
    client
        .send(text, b"SendTargets=\0X-test.unknown=1\0")
        .unwrap();
    assert_eq!(client.receive().unwrap().0[0], 0x24);
    let (mut reset, _) = client.request(0x02, 0x85);
    put(&mut reset, 20, NO_TAG);
    client.send(reset, &[]).unwrap();
    assert_eq!(client.receive().unwrap().0[0], 0x22);
    let mut snack = [0; 48];
    (snack[0], snack[1]) = (0x10, 0x80);
    put(&mut snack, 16, itt);
    put(&mut snack, 20, NO_TAG);
    client.send(snack, &[]).unwrap();
    assert_eq!(client.receive().unwrap().0[0], 0x3f);
    // A unit attention tells of the reset.
    assert_eq!(client.test_unit_ready().unwrap().sense, Some((6, 0x2903)));
    // The target asks it to leave, and it does.
    let control = gateway.control.display();
    let said = cell
        .bench
        .run("pss", &format!("iscsi --control {control} --json sessions"));
    let said: serde_json::Value = serde_json::from_str(&said.done().stdout()).unwrap();
    let session = said["sessions"][0]["session"].as_u64().unwrap();
    std::thread::scope(|scope| {
        let kick = format!("iscsi --control {control} kick {session} --within 20s");
        let kick = scope.spawn(move || cell.bench.run("pss", &kick).done().stderr());
        assert_eq!(client.receive().unwrap().0[0], 0x32);
        let (mut logout, _) = client.request(0x06, 0x80);
        logout[8..16].fill(0); // Reserved: it is for no logical unit.
        client.send(logout, &[]).unwrap();
        assert_eq!(client.receive().unwrap().0[0], 0x26);
        assert!(kick.join().unwrap().contains("has ended"));
    });
}

type Verdict = Result<(), String>;

fn wrong(condition: bool, what: impl Into<String>) -> Verdict {
    match condition {
        true => Err(what.into()),
        false => Ok(()),
    }
}

/// Serial number arithmetic (RFC 1982): whether `one` comes before `other`.
fn before(one: u32, other: u32) -> bool {
    one != other && other.wrapping_sub(one) < 1 << 31
}

/// A command under way.
#[derive(Default)]
struct Task {
    announced: u32,
    next_data_sn: u32,
    data_in: u32,
    next_r2t_sn: u32,
    asked_to: Option<u32>,
    tags: Vec<u32>,
}

/// The rules, for one connection.
#[derive(Default)]
struct Checker {
    stat_sn: Option<u32>,
    window: Option<(u32, u32)>,
    numbered: BTreeSet<u32>,
    tasks: BTreeMap<u32, Task>,
    /// Requests other than commands that wait for an answer, by tag, and how it is called.
    waiting: BTreeMap<u32, u32>,
    aborts: bool,
}

impl Checker {
    fn check(&mut self, pdu: &WirePdu) -> Verdict {
        match pdu.by_initiator {
            true => self.request(pdu),
            false => {
                self.numbers(pdu)?;
                self.answer(pdu)
            }
        }
    }

    fn request(&mut self, pdu: &WirePdu) -> Verdict {
        let opcode = pdu.opcode();
        let itt = pdu.get("initiatortasktag");
        if let (Some(cmd_sn), Some(0)) = (pdu.get("cmdsn"), pdu.get("I")) {
            self.numbered.insert(cmd_sn);
        }
        let answer = match opcode {
            COMMAND => {
                let task = Task {
                    announced: pdu.field("scsicommand.expecteddatatransferlength"),
                    ..Task::default()
                };
                self.tasks.insert(itt.unwrap(), task);
                return Ok(());
            }
            NOP_OUT if itt != Some(NO_TAG) => NOP_IN,
            TASK_REQUEST => {
                self.aborts = true;
                TASK_RESPONSE
            }
            TEXT_REQUEST => TEXT_RESPONSE,
            LOGOUT => LOGOUT_RESPONSE,
            _ => return Ok(()),
        };
        self.waiting.insert(itt.unwrap(), answer);
        Ok(())
    }

    /// StatSN, ExpCmdSN and MaxCmdSN.
    fn numbers(&mut self, pdu: &WirePdu) -> Verdict {
        let carries_status = match pdu.opcode() {
            NOP_IN => pdu.field("initiatortasktag") != NO_TAG,
            DATA_IN => pdu.field("scsidata.S") == 1,
            R2T => false,
            _ => true,
        };
        if carries_status {
            let stat_sn = pdu.field("statsn");
            let expected = self.stat_sn.unwrap_or(stat_sn);
            wrong(
                stat_sn != expected,
                format!("StatSN should be {expected:#x}"),
            )?;
            self.stat_sn = Some(stat_sn.wrapping_add(1));
        } else if pdu.opcode() != DATA_IN {
            let next = self.stat_sn.unwrap();
            wrong(
                pdu.field("statsn") != next,
                format!("the next StatSN is {next:#x}"),
            )?;
        }
        let (exp, max) = (pdu.field("expcmdsn"), pdu.field("maxcmdsn"));
        if let Some((exp_before, max_before)) = self.window {
            wrong(before(exp, exp_before), "ExpCmdSN falls")?;
            wrong(before(max, max_before), "MaxCmdSN falls")?;
            for taken in exp_before..exp {
                wrong(
                    !self.numbered.contains(&taken),
                    format!("nobody sent CmdSN {taken:#x}"),
                )?;
            }
        }
        wrong(
            before(max.wrapping_add(1), exp),
            "MaxCmdSN is less than ExpCmdSN - 1",
        )?;
        self.window = Some((exp, max));
        Ok(())
    }

    fn answer(&mut self, pdu: &WirePdu) -> Verdict {
        let opcode = pdu.opcode();
        let itt = pdu.get("initiatortasktag").unwrap_or(NO_TAG);
        match opcode {
            LOGIN_RESPONSE | ASYNC | REJECT => Ok(()),
            NOP_IN if itt == NO_TAG => wrong(
                pdu.field("targettransfertag") == NO_TAG,
                "a probe without a tag",
            ),
            DATA_IN => self.data_in(itt, pdu),
            R2T => self.r2t(itt, pdu),
            RESPONSE => {
                let Some(task) = self.tasks.remove(&itt) else {
                    return Err("there is no such task".into());
                };
                let sent = task.next_data_sn + task.next_r2t_sn;
                wrong(
                    pdu.get("expdatasn").is_some_and(|it| it != sent),
                    format!("ExpDataSN should be {sent}"),
                )
            }
            _ => {
                let waiting = self.waiting.remove(&itt);
                wrong(
                    waiting != Some(opcode),
                    format!("answers what waits for {waiting:?}"),
                )
            }
        }
    }

    fn data_in(&mut self, itt: u32, pdu: &WirePdu) -> Verdict {
        let Some(task) = self.tasks.get_mut(&itt) else {
            return Err("there is no such task".into());
        };
        let length = pdu.field("datasegmentlength");
        wrong(
            pdu.field("datasn") != task.next_data_sn,
            format!("DataSN should be {}", task.next_data_sn),
        )?;
        wrong(
            pdu.field("bufferOffset") != task.data_in,
            format!("data should go on at {}", task.data_in),
        )?;
        task.next_data_sn += 1;
        task.data_in += length;
        wrong(
            task.data_in > task.announced,
            "more data than there is room for",
        )?;
        if pdu.field("scsidata.S") == 0 {
            return Ok(());
        }
        wrong(
            pdu.field("scsidata.F") == 0,
            "status, but not the last data",
        )?;
        let missing = task.announced - task.data_in;
        let (under, over) = (pdu.field("scsidata.U") == 1, pdu.field("scsidata.O") == 1);
        let count = pdu.field("scsidata.readresidualcount");
        wrong(under && over, "under- and overflow")?;
        wrong(
            !over && (missing != 0) != under,
            format!("{missing} bytes are missing"),
        )?;
        wrong(
            under && count != missing,
            format!("the residual should be {missing}"),
        )?;
        self.tasks.remove(&itt);
        Ok(())
    }

    fn r2t(&mut self, itt: u32, pdu: &WirePdu) -> Verdict {
        let Some(task) = self.tasks.get_mut(&itt) else {
            return Err("there is no such task".into());
        };
        let (offset, length) = (pdu.field("bufferOffset"), pdu.field("desireddatalength"));
        let tag = pdu.field("targettransfertag");
        wrong(
            pdu.field("r2tsn") != task.next_r2t_sn,
            format!("R2TSN should be {}", task.next_r2t_sn),
        )?;
        wrong(
            task.asked_to.is_some_and(|it| it != offset),
            "bursts do not follow each other",
        )?;
        wrong(
            length == 0 || offset + length > task.announced,
            "beyond the end",
        )?;
        wrong(
            tag == NO_TAG || task.tags.contains(&tag),
            "a tag that is used already",
        )?;
        task.tags.push(tag);
        task.next_r2t_sn += 1;
        task.asked_to = Some(offset + length);
        Ok(())
    }
}
