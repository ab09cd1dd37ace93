//! What is read and written: Data-In, R2T, Data-Out, residuals.

use super::*;

// Group: SCSI Data-In (§11.7).

#[test]
fn data_in_is_cut_at_segments_and_bursts() {
    let mut bench = Bench::new("MaxRecvDataSegmentLength=1000 MaxBurstLength=2500");
    let read = bench.read(1, 6000);
    bench.command(read, b"");
    bench.finish(1, with_data(6000));
    let sent = bench.sent();
    let shape: Vec<_> = sent
        .iter()
        .map(|it| {
            (
                word(&it.bhs, 36),
                word(&it.bhs, 40),
                it.data.len(),
                it.bhs[1],
            )
        })
        .collect();
    assert_eq!(
        shape,
        [
            (0, 0, 1000, 0),
            (1, 1000, 1000, 0),
            (2, 2000, 500, FINAL),
            (3, 2500, 1000, 0),
            (4, 3500, 1000, 0),
            (5, 4500, 500, FINAL),
            (6, 5000, 1000, FINAL | 1),
        ]
    );
}

#[test]
fn status_comes_apart_if_there_is_sense() {
    let mut bench = Bench::new("");
    let read = bench.read(1, 512);
    bench.command(read, b"");
    let outcome = Outcome {
        status: Status::CheckCondition,
        sense: vec![0x70, 0, 5],
        ..with_data(512)
    };
    bench.finish(1, outcome);
    let sent = bench.sent();
    assert_eq!((code(&sent[0]), sent[0].bhs[1]), (opcode::DATA_IN, FINAL));
    assert_eq!((code(&sent[1]), sent[1].bhs[3]), (opcode::SCSI_RESPONSE, 2));
    assert_eq!(&sent[1].data[..], [0, 3, 0x70, 0, 5]);
    assert_eq!(word(&sent[1].bhs, 36), 1, "ExpDataSN");
}

// Group: residuals (§11.4.5).

#[test]
fn read_residuals() {
    for (room, there, flag, count) in [(512, 1024, 4, 512), (1024, 512, 2, 512), (512, 512, 0, 0)] {
        let mut bench = Bench::new("");
        let read = bench.read(1, room);
        bench.command(read, b"");
        bench.finish(1, with_data(there));
        let pdu = bench.only();
        assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (flag, count));
        assert_eq!(data_bytes(&pdu.bhs), there.min(room as usize));
    }
}

#[test]
fn write_residuals() {
    for (announced, wanted, flag, count) in
        [(512, 1024, 4, 512), (1024, 512, 2, 512), (512, 512, 0, 0)]
    {
        let mut bench = Bench::new("");
        let write = bench.write(1, announced);
        bench.command(write, &vec![1; announced as usize]);
        bench.finish(1, written(wanted));
        let pdu = bench.only();
        assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (flag, count));
    }
}

#[test]
fn no_room_for_data_is_an_overflow() {
    let mut bench = Bench::new("");
    let mut read = bench.read(1, 0);
    read.reads = false;
    bench.command(read, b"");
    bench.finish(1, with_data(36));
    let pdu = bench.only();
    assert_eq!(code(&pdu), opcode::SCSI_RESPONSE);
    assert_eq!((pdu.bhs[1] & 6, word(&pdu.bhs, 44)), (4, 36));
}

// Group: R2T (§11.8) and Data-Out.

#[test]
fn data_comes_immediately_unsolicited_and_solicited() {
    let mut bench = Bench::new("InitialR2T=No FirstBurstLength=1024 MaxBurstLength=1024");
    let mut write = bench.write(1, 3000);
    write.last = false;
    bench.command(write, &[1; 512]);
    assert!(bench.sent().is_empty());
    bench.data_out(1, RESERVED_TAG, 0, 512, &[2; 256], false);
    bench.data_out(1, RESERVED_TAG, 1, 768, &[3; 256], true);
    let (offset, length, ttt) = r2t(&bench.only());
    assert_eq!((offset, length), (1024, 1024));
    bench.data_out(1, ttt, 0, 1024, &[4; 600], false);
    bench.data_out(1, ttt, 1, 1624, &[5; 424], true);
    let (offset, length, ttt) = r2t(&bench.only());
    assert_eq!((offset, length), (2048, 952));
    assert!(bench.outputs().is_empty());
    bench.data_out(1, ttt, 0, 2048, &[6; 952], true);
    let commands = bench.submitted();
    let data = commands[0].data_out.concat();
    let runs = [(1, 512), (2, 256), (3, 256), (4, 600), (5, 424), (6, 952)];
    let expected: Vec<u8> = runs
        .iter()
        .flat_map(|(byte, count)| vec![*byte; *count])
        .collect();
    assert_eq!(data, expected);
    bench.finish(1, written(3000));
    let pdu = bench.only();
    assert_eq!((code(&pdu), word(&pdu.bhs, 36)), (opcode::SCSI_RESPONSE, 2));
}

#[test]
fn many_r2ts_at_a_time() {
    let mut bench = Bench::new("MaxOutstandingR2T=3 MaxBurstLength=512");
    let write = bench.write(1, 2048);
    bench.command(write, b"");
    let asked: Vec<_> = bench.sent().iter().map(r2t).collect();
    assert_eq!(
        asked.iter().map(|it| it.0).collect::<Vec<_>>(),
        [0, 512, 1024]
    );
    bench.data_out(1, asked[0].2, 0, 0, &[1; 512], true);
    let fourth = r2t(&bench.only());
    assert_eq!((fourth.0, fourth.1), (1536, 512));
    for (offset, _, ttt) in [asked[1], asked[2], fourth] {
        bench.data_out(1, ttt, 0, offset, &[1; 512], true);
    }
    assert_eq!(bench.tags(), [1]);
}

#[test]
fn r2t_sn_counts_within_the_task() {
    let mut bench = Bench::new("MaxOutstandingR2T=2 MaxBurstLength=512");
    for itt in [1, 2] {
        let write = bench.write(itt, 1024);
        bench.command(write, b"");
        let sent = bench.sent();
        let numbers: Vec<u32> = sent.iter().map(|it| word(&it.bhs, 36)).collect();
        assert_eq!(numbers, [0, 1]);
        assert!(sent.iter().all(|it| word(&it.bhs, 20) != RESERVED_TAG));
    }
}

#[test]
fn unsolicited_data_that_was_not_agreed_on() {
    // InitialR2T=Yes, and yet F is 0.
    let mut bench = Bench::new("");
    let mut write = bench.write(1, 1024);
    write.last = false;
    bench.command(write, b"");
    bench.data_out(1, RESERVED_TAG, 0, 0, &[1; 512], true);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0c));
    // ImmediateData=No, and yet there is some.
    let mut bench = Bench::new("ImmediateData=No");
    let write = bench.write(1, 512);
    bench.command(write, &[1; 512]);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0c));
    assert!(bench.outputs().is_empty());
}

#[test]
fn data_beyond_first_burst_length() {
    let mut bench = Bench::new("InitialR2T=No FirstBurstLength=1024");
    let write = bench.write(1, 4096);
    bench.command(write, &[1; 2048]);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0d));
    let mut write = bench.write(2, 4096);
    write.last = false;
    bench.command(write, &[1; 1024]);
    bench.data_out(2, RESERVED_TAG, 0, 1024, &[1; 512], true);
    assert_eq!(sense_code(&bench.only()), (0x0b, 0x0c, 0x0d));
}

#[test]
fn wrong_data_sn_offset_and_length_fail_the_task() {
    type Case = (u32, u32, usize);
    let cases: [Case; 4] = [(1, 0, 1024), (0, 512, 1024), (0, 0, 1025), (0, 0, 1000)];
    for (data_sn, offset, length) in cases {
        let mut bench = Bench::new("MaxBurstLength=1024");
        let write = bench.write(1, 1024);
        bench.command(write, b"");
        let (_, _, ttt) = r2t(&bench.only());
        bench.data_out(1, ttt, data_sn, offset, &vec![1; length], true);
        assert_eq!(sense_code(&bench.only()).0, 0x0b);
        assert!(bench.outputs().is_empty());
        assert_eq!(bench.session.tasks(), 0);
    }
}

#[test]
fn unknown_tags() {
    let mut bench = Bench::new("");
    let write = bench.write(1, 1024);
    bench.command(write, b"");
    let (_, _, ttt) = r2t(&bench.only());
    bench.data_out(1, ttt.wrapping_add(9), 0, 0, &[1; 512], true);
    let pdu = bench.only();
    assert_eq!(
        (code(&pdu), pdu.bhs[2]),
        (opcode::REJECT, Reason::InvalidField as u8)
    );
    // Data of a task that is no more.
    bench.data_out(99, RESERVED_TAG, 0, 0, &[1; 512], true);
    assert!(bench.sent().is_empty());
}

#[test]
fn more_data_than_can_be_kept_waits() {
    let mut bench = Bench::new("");
    let size = COMMAND_BYTES_MAX;
    for itt in 0..4 {
        let write = bench.write(itt, size);
        bench.command(write, b"");
    }
    let asked = bench.sent();
    let tasks: Vec<u32> = asked.iter().map(|it| word(&it.bhs, 16)).collect();
    assert_eq!(tasks, [0, 1]);
    // A read that is small waits its turn, for fairness.
    bench.task_request(1, 0, FIRST);
    let codes: Vec<u8> = bench.sent().iter().map(code).collect();
    assert!(codes.contains(&opcode::R2T) && codes.contains(&opcode::TASK_RESPONSE));
}

#[test]
fn reads_wait_while_the_initiator_does_not_take_them() {
    let mut bench = Bench::new("");
    for itt in 0..3 {
        let read = bench.read(itt, COMMAND_BYTES_MAX);
        bench.command(read, b"");
    }
    assert_eq!(bench.tags(), [0, 1]);
    bench.finish(0, with_data(COMMAND_BYTES_MAX as usize));
    assert!(bench.outputs().is_empty());
    bench.sent();
    bench.session.pump();
    assert_eq!(bench.tags(), [2]);
}

#[test]
fn absurd_transfer_lengths_are_not_asked_for() {
    let mut bench = Bench::new("");
    let write = bench.write(1, u32::MAX);
    bench.command(write, b"");
    let mut asked = 0u64;
    loop {
        let sent = bench.sent();
        let Some(pdu) = sent.first() else { break };
        let (offset, length, ttt) = r2t(pdu);
        asked += u64::from(length);
        bench.data_out(1, ttt, 0, offset, &vec![0; length as usize], true);
    }
    assert_eq!(asked, u64::from(COMMAND_BYTES_MAX));
    assert_eq!(bench.tags(), [1]);
}

// Group: what was agreed on about writes (§13.10, §13.11, §13.14).

/// Data of a write, each byte of it telling where it belongs.
fn pattern(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|it| (it / 64) as u8).collect()
}

#[test]
fn every_way_to_write_asks_for_the_rest_and_keeps_the_data_whole() {
    for (immediate, initial_r2t) in [("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), ("No", "No")] {
        for size in [1, 511, 512, 1024, 1025, 2048, 2049, 5000] {
            let case = format!("ImmediateData={immediate} InitialR2T={initial_r2t}");
            let mut bench =
                Bench::new(&format!("{case} FirstBurstLength=1024 MaxBurstLength=2048"));
            let data = pattern(size);
            let first_burst = size.min(1024);
            let with_command = if immediate == "Yes" { size.min(512) } else { 0 };
            let unasked = match initial_r2t {
                "No" => first_burst,
                _ => with_command,
            };
            let mut write = bench.write(1, size);
            write.last = unasked == with_command;
            bench.command(write, &data[..with_command as usize]);
            if unasked > with_command {
                assert!(bench.sent().is_empty() && bench.outputs().is_empty());
                let rest = &data[with_command as usize..unasked as usize];
                bench.data_out(1, RESERVED_TAG, 0, with_command, rest, true);
            }
            let mut asked = Vec::new();
            while let Some(pdu) = bench.sent().pop() {
                let (offset, length, ttt) = r2t(&pdu);
                asked.push((offset, length));
                let burst = &data[offset as usize..(offset + length) as usize];
                bench.data_out(1, ttt, 0, offset, burst, true);
            }
            let offsets = (unasked..size).step_by(2048);
            let expected: Vec<_> = offsets.map(|it| (it, 2048.min(size - it))).collect();
            assert_eq!(asked, expected, "{case}, {size} bytes");
            assert_eq!(bench.submitted()[0].data_out.concat(), data);
        }
    }
}

#[test]
fn unsolicited_data_may_end_early() {
    let mut bench = Bench::new("InitialR2T=No FirstBurstLength=4096");
    let mut write = bench.write(1, 4096);
    write.last = false;
    bench.command(write, &[1; 512]);
    bench.data_out(1, RESERVED_TAG, 0, 512, &[2; 512], true);
    let (offset, length, ttt) = r2t(&bench.only());
    assert_eq!((offset, length), (1024, 3072));
    bench.data_out(1, ttt, 0, 1024, &[3; 3072], true);
    let command = bench.submitted().remove(0);
    assert_eq!(command.data_out.concat().len(), 4096);
}

#[test]
fn a_burst_goes_on_until_its_f_bit() {
    let mut bench = Bench::new("MaxBurstLength=1024");
    let write = bench.write(1, 1024);
    bench.command(write, b"");
    let (_, _, ttt) = r2t(&bench.only());
    bench.data_out(1, ttt, 0, 0, &[1; 1024], false);
    // All is there, but the burst has not ended; an empty PDU may end it (§11.7.1).
    assert!(bench.outputs().is_empty() && bench.sent().is_empty());
    bench.data_out(1, ttt, 1, 1024, b"", true);
    assert_eq!(bench.tags(), [1]);
}

#[test]
fn bursts_of_several_writes_may_come_in_any_order() {
    let mut bench = Bench::new("MaxBurstLength=512");
    for itt in [1, 2, 3] {
        let write = bench.write(itt, 512);
        bench.command(write, b"");
    }
    let sent = bench.sent();
    let mut asked: Vec<_> = sent
        .iter()
        .map(|it| (word(&it.bhs, 16), r2t(it).2))
        .collect();
    // No two have the same tag while they are open.
    assert!(asked[0].1 != asked[1].1 && asked[1].1 != asked[2].1 && asked[0].1 != asked[2].1);
    // Parts of all three, mixed.
    for (itt, ttt) in &asked {
        bench.data_out(*itt, *ttt, 0, 0, &[*itt as u8; 256], false);
    }
    asked.reverse();
    for (itt, ttt) in asked {
        bench.data_out(itt, ttt, 1, 256, &[itt as u8; 256], true);
    }
    let commands = bench.submitted();
    let came: Vec<_> = commands.iter().map(|it| it.tag).collect();
    assert_eq!(came, [3, 2, 1]);
    for command in commands {
        assert_eq!(command.data_out.concat(), [command.tag as u8; 512]);
    }
}

#[test]
fn a_tag_of_another_task_is_not_taken() {
    let mut bench = Bench::new("");
    for itt in [1, 2] {
        let write = bench.write(itt, 512);
        bench.command(write, b"");
    }
    let sent = bench.sent();
    let ttt = r2t(&sent[1]).2;
    bench.data_out(1, ttt, 0, 0, &[1; 512], true);
    assert_eq!(bench.only().bhs[2], Reason::InvalidField as u8);
    assert!(bench.outputs().is_empty());
}

#[test]
fn data_sn_starts_anew_with_every_burst_and_every_read() {
    let mut bench = Bench::new("MaxBurstLength=512 MaxRecvDataSegmentLength=512");
    let write = bench.write(1, 1024);
    bench.command(write, b"");
    for offset in [0, 512] {
        let (_, _, ttt) = r2t(&bench.only());
        bench.data_out(1, ttt, 0, offset, &[1; 256], false);
        bench.data_out(1, ttt, 1, offset + 256, &[1; 256], true);
    }
    assert_eq!(bench.tags(), [1]);
    for itt in [2, 3] {
        let read = bench.read(itt, 1024);
        bench.command(read, b"");
        bench.finish(itt, with_data(1024));
        let numbers: Vec<u32> = bench.sent().iter().map(|it| word(&it.bhs, 36)).collect();
        assert_eq!(numbers, [0, 1]);
    }
}
