//! The log on real files. Crashes and damage are tested on a simulated disk, in tests/tests/crash.rs.

use super::*;
use crate::disk::files::FileDisk;
use crate::entry::{Command, Op, Origin, block_checksums};
use crate::types::{BLOCK_BYTES, Ballot, ServerId, SessionId, VolumeId};
use crate::volume::reservation::{Nexus, ReservationAction, ReservationRequest};

const SEGMENT_BYTES: u64 = 256 << 10;

fn params() -> LogParams {
    LogParams {
        segment_bytes: SEGMENT_BYTES,
        retain_bytes: 0,
        ..LogParams::new([5; 16])
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    disk: Arc<dyn Disk>,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    Fixture { directory, disk }
}

impl Fixture {
    fn open(&self, applied: EntryId) -> (Log, Recovered) {
        Log::open(Arc::clone(&self.disk), params(), applied).unwrap()
    }

    fn files(&self, prefix: &str) -> usize {
        let entries = std::fs::read_dir(self.directory.path().join("log")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(prefix)).count()
    }
}

fn ballot(number: u64) -> Ballot {
    Ballot {
        number,
        server: ServerId(0),
    }
}

fn entry(prev: EntryId, number: u64, data: Bytes) -> Entry {
    let op = Op::Write {
        volume: VolumeId(1),
        first_block: prev.slot.0,
        checksums: block_checksums(VolumeId(1), prev.slot.0, &data),
        payload: data,
    };
    Entry {
        id: EntryId {
            ballot: ballot(number),
            slot: prev.slot.next(),
        },
        prev: prev.ballot,
        commands: [Command::internal(op)].into(),
    }
}

/// Entries behind `prev`, each with so many blocks.
fn entries(prev: EntryId, number: u64, blocks: &[usize]) -> Vec<Entry> {
    let mut prev = prev;
    blocks
        .iter()
        .map(|blocks| {
            let data = vec![prev.slot.0 as u8; blocks * BLOCK_BYTES];
            let entry = entry(prev, number, data.into());
            prev = entry.id;
            entry
        })
        .collect()
}

fn read(log: &Log, after: u64) -> Vec<Entry> {
    match log.reader().read(Slot(after), Slot(u64::MAX), usize::MAX) {
        Ok(LogRead::Entries { prev, entries }) => {
            assert_eq!(prev.slot, Slot(after));
            entries
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn appended_entries_are_read_back() {
    let fixture = fixture();
    let (mut log, recovered) = fixture.open(EntryId::default());
    assert_eq!(recovered.last, EntryId::default());
    let all = entries(EntryId::default(), 1, &[1, 2, 0, 30, 1]);
    log.append(None, &all[..2], Slot(1)).unwrap();
    log.append(None, &all[2..], Slot(3)).unwrap();
    assert_eq!(read(&log, 0), all);
    assert_eq!(read(&log, 4), all[4..]);
    assert_eq!(read(&log, 5), []);
    drop(log);
    let (log, recovered) = fixture.open(EntryId::default());
    assert_eq!(recovered.last, all[4].id);
    assert_eq!(recovered.chosen, Slot(3));
    assert_eq!(recovered.tail, all[3..]);
    assert_eq!(recovered.replay, &all[..3]);
    assert_eq!(recovered.evidence, None);
    assert_eq!(read(&log, 0), all);
}

#[test]
fn what_is_kept_for_replay_is_bounded() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    // 1 MiB each: with the 64th there are 64 MiB, and no more are kept.
    let all = entries(EntryId::default(), 1, &[256; 71]);
    for entry in &all[..70] {
        let entry = std::slice::from_ref(entry);
        log.append(None, entry, Slot(0)).unwrap();
    }
    log.mark_idle(Slot(70)).unwrap();
    drop(log);
    let (mut log, recovered) = fixture.open(EntryId::default());
    assert_eq!((recovered.chosen, recovered.tail.len()), (Slot(70), 0));
    assert_eq!(recovered.replay, &all[..64]);
    log.append(None, &all[70..], Slot(70)).unwrap();
    drop(log);
    let (_, recovered) = fixture.open(all[9].id);
    assert_eq!(recovered.replay, &all[10..70]);
    assert_eq!(recovered.tail, all[70..]);
}

#[test]
fn a_batch_is_one_write_of_whole_pages() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let all = entries(EntryId::default(), 1, &[1, 1, 1, 1]);
    let batch = all.chunks(2).map(|entries| (None, entries, Slot(0)));
    log.append_many(batch).unwrap();
    // Header area and payload of each, and a marker at the end.
    assert_eq!(log.appended_bytes(), (4 * 2 + 1) * 4096);
    assert_eq!(read(&log, 0), all);
}

#[test]
fn large_aligned_payloads_are_written_from_where_they_are() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let mut data = AlignedBuf::zeroed(128 << 10);
    data.as_mut_slice().fill(3);
    let aligned = data.into_bytes();
    let shifted = Bytes::from(vec![4; (64 << 10) + 1]).slice(1..);
    let first = entry(EntryId::default(), 1, aligned.clone());
    let second = entry(first.id, 1, shifted);
    let third = entry(second.id, 1, aligned);
    let all = [first, second, third];
    log.append(None, &all, Slot(0)).unwrap();
    assert_eq!(read(&log, 0), all);
}

#[test]
fn an_entry_larger_than_a_segment_has_one_for_itself() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let all = entries(EntryId::default(), 1, &[1, 1024, 1, 1024]);
    log.append(None, &all, Slot(0)).unwrap();
    assert_eq!(read(&log, 0), all);
    drop(log);
    let (mut log, recovered) = fixture.open(EntryId::default());
    assert_eq!(recovered.last, all[3].id);
    assert_eq!(read(&log, 0), all);
    // Such a file does not become a spare.
    log.trim(Slot(4)).unwrap();
    assert_eq!(log.bytes() % SEGMENT_BYTES, 0);
}

#[test]
fn trimmed_segments_are_used_again() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let mut last = EntryId::default();
    for round in 0..40 {
        let all = entries(last, 1, &[7; 8]);
        last = all[7].id;
        log.append(None, &all, Slot(last.slot.0 - 8)).unwrap();
        log.trim(last.slot).unwrap();
        // What was trimmed is gone, the rest is there.
        let first = log.first_slot();
        assert_eq!(
            read(&log, first.0 - 1).len() as u64,
            last.slot.0 + 1 - first.0
        );
        if round > 0 {
            let gone = log.reader().read(Slot(0), last.slot, 1).unwrap();
            assert_eq!(gone, LogRead::Gone { first });
        }
        assert!(fixture.files("0") <= 2 && fixture.files("spare") <= 2);
    }
    drop(log);
    let (log, recovered) = fixture.open(last);
    assert_eq!(recovered.last, last);
    // The entries of the last rounds were not trimmed for they shared a segment; they stay readable.
    assert_eq!(log.first_slot(), recovered.base.slot.next());
}

#[test]
fn truncation_lasts() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let old = entries(EntryId::default(), 1, &[1; 9]);
    log.append(None, &old, Slot(4)).unwrap();
    let new = entries(old[5].id, 2, &[2; 5]);
    log.append(Some(Slot(6)), &new, Slot(4)).unwrap();
    let newer = entries(new[0].id, 3, &[1]);
    log.append(Some(Slot(7)), &newer, Slot(4)).unwrap();
    let expected = [&old[..6], &new[..1], &newer[..]].concat();
    assert_eq!(read(&log, 0), expected);
    drop(log);
    let (log, recovered) = fixture.open(EntryId::default());
    assert_eq!(read(&log, 0), expected);
    assert_eq!(recovered.tail, expected[4..]);
    assert_eq!(log.reader().id_at(Slot(7)), Some(new[0].id));
    assert_eq!(log.reader().id_at(Slot(6)), Some(old[5].id));
}

/// The start of a segment and its first record are lost, and with them which entries it replaced: the old
/// ones must not pass for chosen, nor may the server deny what replaced them.
#[test]
fn a_lost_truncation_makes_nothing_chosen() {
    let cases: [(&[usize], bool); 4] = [
        (&[1, 1, 3], false),
        (&[1, 7], false),
        (&[4, 2, 2], false),
        (&[2], true),
    ];
    for (writes, is_marked) in cases {
        let fixture = fixture();
        let (mut log, _) = fixture.open(EntryId::default());
        let old = entries(EntryId::default(), 1, &[1; 9]);
        log.append(None, &old, Slot(4)).unwrap();
        let new = entries(old[5].id, 2, &vec![1; writes.iter().sum()]);
        let (mut truncate_after, mut first) = (Some(Slot(6)), 0);
        for entries in writes {
            let chosen = if first == 0 { 4 } else { 6 + first };
            let write = &new[first..first + entries];
            log.append(truncate_after.take(), write, Slot(chosen as u64))
                .unwrap();
            first += entries;
        }
        if is_marked {
            log.mark_idle(Slot(8)).unwrap();
        }
        let sequence = log.next_sequence - 1;
        drop(log);
        let path = fixture.directory.path().join(segment_path(sequence));
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        let lost = SEGMENT_HEADER_BYTES + ALIGN_BYTES as u64;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![9; lost as usize], 0).unwrap();
        let (log, recovered) = fixture.open(EntryId::default());
        assert_eq!(recovered.chosen, Slot(4), "{writes:?}");
        let claimed = recovered.evidence.max(recovered.doubt);
        let acknowledged = new[first - writes.last().unwrap()..].first().unwrap().id;
        let acknowledged = if is_marked { new[1].id } else { acknowledged };
        assert!(
            claimed
                .is_some_and(|claimed| claimed.ballot == ballot(2)
                    && claimed.slot.0 + 1 >= acknowledged.slot.0),
            "{writes:?}: {recovered:?}"
        );
        // A second start says the same.
        drop(log);
        let (_, again) = fixture.open(EntryId::default());
        assert_eq!(
            (again.evidence, again.doubt),
            (recovered.evidence, recovered.doubt)
        );
        assert_eq!(again.chosen, Slot(4));
    }
}

#[test]
fn restarts_do_not_pile_up_segments() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    log.append(None, &entries(EntryId::default(), 1, &[1]), Slot(0))
        .unwrap();
    drop(log);
    for _ in 0..10 {
        let (log, recovered) = fixture.open(EntryId::default());
        assert_eq!(recovered.last.slot, Slot(1));
        drop(log);
    }
    assert_eq!(fixture.files("0"), 2);
    assert!(fixture.files("spare") <= 2);
}

#[test]
fn reset_forgets_everything_before() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    log.append(None, &entries(EntryId::default(), 1, &[1; 9]), Slot(4))
        .unwrap();
    let base = EntryId {
        ballot: ballot(4),
        slot: Slot(5),
    };
    log.reset(base).unwrap();
    assert_eq!((log.first_slot(), log.last()), (Slot(6), base));
    let all = entries(base, 4, &[1, 1]);
    log.append(None, &all, base.slot).unwrap();
    drop(log);
    let (log, recovered) = fixture.open(base);
    assert_eq!((recovered.base, recovered.last), (base, all[1].id));
    assert_eq!(read(&log, 5), all);
}

#[test]
fn markers_are_written_once() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    log.mark_idle(Slot(0)).unwrap();
    assert_eq!(log.appended_bytes(), 0);
    let all = entries(EntryId::default(), 1, &[0, 0]);
    log.append(None, &all[..1], Slot(0)).unwrap();
    for _ in 0..3 {
        log.mark_idle(Slot(1)).unwrap();
    }
    // The entry, the end of its write, and the proof that the write ended.
    assert_eq!(log.appended_bytes(), 3 * 4096);
    log.append(None, &all[1..], Slot(1)).unwrap();
    assert_eq!(read(&log, 0), all);
    drop(log);
    let (_, recovered) = fixture.open(EntryId::default());
    assert_eq!((recovered.last, recovered.chosen), (all[1].id, Slot(1)));
}

#[test]
fn other_versions_are_refused() {
    let fixture = fixture();
    drop(fixture.open(EntryId::default()));
    let path = fixture.directory.path().join("log/0000000000000001");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[12] = 3;
    let crc = crc32c::crc32c(&bytes[12..128]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Log::open(Arc::clone(&fixture.disk), params(), EntryId::default());
    let error = error.err().unwrap();
    assert!(
        matches!(error, LogError::Version { found: 3, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("knows versions up to 2"));
}

impl Fixture {
    fn versions(&self) -> Vec<u8> {
        let mut files = self.contents();
        files.retain(|(name, _)| !name.starts_with("spare"));
        files.iter().map(|(_, bytes)| bytes[12]).collect()
    }

    /// The files of the log, by name.
    fn contents(&self) -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(self.directory.path().join("log")).unwrap();
        let mut files: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, std::fs::read(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    /// Changes a segment; what is changed is then valid again.
    fn edit(&self, segment: u64, at: usize, edit: impl FnOnce(&mut [u8])) {
        let path = self.directory.path().join(segment_path(segment));
        let mut bytes = std::fs::read(&path).unwrap();
        let area = &mut bytes[at..at + 4096];
        edit(area);
        let (seed, end) = match at {
            0 => (0, 128),
            _ => (crc32c::crc32c(&[5; 16]), 96 + usize::from(area[56])),
        };
        let crc = crc32c::crc32c_append(seed, &area[12..end]);
        area[8..12].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
    }
}

/// New segments are of the newest version, whether their files are new, spares, or were segments of version 1.
#[test]
fn segments_of_version_1_are_read_and_none_is_begun() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let all = entries(EntryId::default(), 1, &[1, 2, 60, 1]);
    log.append(None, &all[..2], Slot(1)).unwrap();
    drop(log);
    fixture.edit(1, 0, |header| {
        assert_eq!(header[12..14], [2, 0]);
        header[12] = 1;
    });
    assert_eq!(fixture.versions(), [1]);
    let (mut log, recovered) = fixture.open(EntryId::default());
    assert_eq!((recovered.last, recovered.evidence), (all[1].id, None));
    assert_eq!(read(&log, 0), all[..2]);
    assert_eq!(fixture.versions(), [1, 2]);
    // The file of the first becomes a spare, and a segment again.
    log.append(None, &all[2..3], Slot(3)).unwrap();
    log.trim(Slot(2)).unwrap();
    assert_eq!(fixture.files("spare-"), 1);
    log.reset(all[2].id).unwrap();
    log.append(None, &all[3..], Slot(3)).unwrap();
    assert!(fixture.versions().iter().all(|version| *version == 2));
    drop(log);
    assert_eq!(fixture.open(all[2].id).1.last, all[3].id);
}

/// Where the code of an entry's first command stands in its record.
const CODE: usize = 96 + 8 + 9 + 9 + 4;

/// Four entries of one block, the third with another command. Each has its header area and its payload on a page of its
/// own, and all are one write.
fn with_third(fixture: &Fixture, op: Option<Op>) -> Vec<Entry> {
    let (mut log, _) = fixture.open(EntryId::default());
    let mut all = entries(EntryId::default(), 1, &[1, 1, 1, 1]);
    let first = all[2].commands[0].clone();
    all[2].commands = [op.map_or(first.clone(), Command::internal), first].into();
    log.append(None, &all, Slot(1)).unwrap();
    all
}

const THIRD: usize = 4096 + 2 * 2 * 4096;

/// What another version has written is neither torn nor damaged: it is named, and nothing is changed.
#[test]
fn an_entry_that_is_not_known_is_named_and_never_cut() {
    let origin = Op::OpenSessionFrom {
        nonce: 1,
        origin: Box::default(),
    };
    let family = CODE + 25 + 8 + 8;
    let reserve = Op::Reserve {
        volume: VolumeId(1),
        request: Box::new(ReservationRequest {
            nexus: Nexus {
                initiator: "i".into(),
                target: "t".into(),
            },
            action: ReservationAction::Read,
        }),
    };
    let action = CODE + 25 + 4 + 5 + 5;
    let sessions = Op::EndSessions {
        sessions: vec![SessionId(7)],
    };
    assert_eq!(Origin::default().address, None);
    let cases = [
        (None, CODE, 200, "command code 200"),
        (Some(origin), family, 9, "an address of family 9"),
        (Some(reserve), action, 99, "a request about reservations"),
        (Some(sessions), CODE, 0, "a form of a command"),
    ];
    for (op, at, value, what) in cases {
        // Alone; with the record before it torn, or its own payload; with the marker at the end of the write torn.
        for torn in [
            None,
            Some(THIRD - 8192),
            Some(THIRD + 4096),
            Some(THIRD + 4 * 4096),
        ] {
            let fixture = fixture();
            let all = with_third(&fixture, op.clone());
            fixture.edit(1, THIRD, |area| {
                assert_eq!(area[32], 3);
                area[at] = value;
            });
            if let Some(torn) = torn {
                let path = fixture.directory.path().join(segment_path(1));
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[torn..torn + 4096].fill(0);
                std::fs::write(&path, bytes).unwrap();
            }
            let before = fixture.contents();
            for _ in 0..2 {
                let opened = Log::open(Arc::clone(&fixture.disk), params(), EntryId::default());
                let error = opened.err().expect("it is not cut").to_string();
                let text = format!(
                    "log segment log/0000000000000001: the entry in slot 3 has {what}, which this version does not \
                     know: it was written by a newer version; start that one"
                );
                assert_eq!(error, text, "{torn:?}");
                assert_eq!(fixture.contents(), before, "{what} {torn:?}");
            }
            // What the checkpoint holds is not needed.
            assert!(Log::open(Arc::clone(&fixture.disk), params(), all[2].id).is_ok());
        }
    }
}

#[test]
fn a_reader_does_not_call_damaged_what_is_not_known() {
    let fixture = fixture();
    let all = with_third(&fixture, None);
    let (log, _) = fixture.open(EntryId::default());
    fixture.edit(1, THIRD, |area| area[CODE] = 200);
    let error = log.reader().read(Slot(1), Slot(4), usize::MAX).unwrap_err();
    let newer = matches!(error, LogReadError::Newer { slot: Slot(3), .. });
    assert!(newer, "{error}");
    assert!(error.to_string().contains("command code 200, which"));
    match log.reader().read(Slot(1), Slot(2), usize::MAX).unwrap() {
        LogRead::Entries { entries, .. } => assert_eq!(entries, all[1..2]),
        gone => panic!("{gone:?}"),
    }
}

#[test]
fn readers_go_on_beside_appends_and_trims() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let reader = log.reader();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut after = Slot(0);
            while !done.load(Ordering::Relaxed) || after < reader.last().slot {
                match reader.read(after, Slot(u64::MAX), 100_000).unwrap() {
                    LogRead::Entries { entries, .. } => {
                        for entry in &entries {
                            assert_eq!(entry.id.slot, after.next());
                            after = entry.id.slot;
                        }
                    }
                    LogRead::Gone { first } => {
                        assert!(first > after.next());
                        after = Slot(first.0 - 1);
                    }
                }
            }
        });
        let mut last = EntryId::default();
        for _ in 0..150 {
            let all = entries(last, 1, &[1, 3, 0, 2]);
            last = all[3].id;
            log.append(None, &all, last.slot).unwrap();
            log.trim(last.slot).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// A file that another segment uses from the first read on: before it, the log gives it up.
struct GivenUp {
    give_up: Box<dyn Fn() + Send + Sync>,
}

impl crate::disk::DiskFile for GivenUp {
    fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<usize> {
        (self.give_up)();
        buf.fill(0);
        Ok(buf.len())
    }

    fn read_at_nowait(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        unreachable!()
    }

    fn write_at(&self, _: &[IoSlice<'_>], _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn sync(&self) -> io::Result<()> {
        unreachable!()
    }

    fn len(&self) -> io::Result<u64> {
        unreachable!()
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn zero_range(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }
}

#[test]
fn headers_that_are_given_up_meanwhile_are_not_called_damaged() {
    let fixture = fixture();
    let (mut log, _) = fixture.open(EntryId::default());
    let all = entries(EntryId::default(), 1, &[7; 10]);
    log.append(None, &all, Slot(10)).unwrap();
    let reader = log.reader();
    let first_of_second = reader.segments()[1].1;
    assert!(first_of_second > Slot(2) && first_of_second < Slot(10));
    let log = Mutex::new(log);
    let give_up = move || log.lock().unwrap().trim(Slot(10)).unwrap();
    let file = GivenUp {
        give_up: Box::new(give_up),
    };
    reader.index.write().unwrap().segments[0].file = Arc::new(file);
    let headers = reader.headers(Slot(10), Slot(1));
    let slots: Vec<u64> = headers.iter().map(|(id, _)| id.slot.0).collect();
    let kept: Vec<u64> = (first_of_second.0..=10).rev().collect();
    assert_eq!(slots, kept);
    assert!(headers.iter().all(|(_, entry)| entry.is_some()));
}

#[test]
fn arbitrary_bytes_are_no_record() {
    let mut seed = 1u64;
    let mut bytes = vec![0; 8192];
    for round in 0..2000 {
        for byte in &mut bytes {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        }
        if round % 2 == 0 {
            bytes[..8].copy_from_slice(b"PSSLREC1");
        }
        let place = Place {
            cell: [5; 16],
            sequence: 1,
            offset: 4096,
        };
        let header = record::RecordHeader::decode(&bytes, &place);
        assert!(header.is_none_or(|header| header.verify(&bytes, &place).is_none()));
        record::SegmentHeader::decode(&bytes);
    }
}
