//! The chunk store on real files. Crashes and damage are tested on a simulated disk, in
//! tests/tests/crash.rs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proptest::prelude::*;

use super::store::LOOKED_AT_MAX;
use super::*;
use crate::disk::files::FileDisk;
use crate::disk::{DirEntry, Disk, DiskFile, OpenMode};
use crate::entry::block_checksums;
use crate::state::Volume;
use crate::types::{BLOCK_BYTES, ChunkIndex, Slot};
use crate::volume::device::{Extent, ReadPart};

mod points;

fn volume(id: u32, name: &str) -> Volume {
    Volume {
        id: VolumeId(id),
        name: name.into(),
        size_bytes: 64 << 30,
        chunk_bytes: 64 << 10,
        uuid: [id as u8; 16],
        created: Slot(1),
    }
}

struct Fixture {
    _directory: tempfile::TempDir,
    disk: Arc<dyn Disk>,
    store: Arc<ChunkStore>,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(directory.path()).unwrap());
    let store = open(&disk, &[]);
    Fixture {
        _directory: directory,
        disk,
        store,
    }
}

fn open(disk: &Arc<dyn Disk>, volumes: &[Volume]) -> Arc<ChunkStore> {
    let params = ChunkParams {
        tables_bytes_max: 4000,
        files_max: 3,
        ..ChunkParams::default()
    };
    Arc::new(ChunkStore::open(Arc::clone(disk), params, volumes).unwrap())
}

fn write(store: &ChunkStore, volume: &Volume, first_block: u64, data: Vec<u8>, slot: u64) {
    let checksums = block_checksums(volume.id, first_block, &data);
    store
        .write(volume, first_block, &checksums, &data.into(), Slot(slot))
        .unwrap();
}

fn data(value: u8, blocks: usize) -> Vec<u8> {
    vec![value; blocks * BLOCK_BYTES]
}

fn flush(store: &Arc<ChunkStore>) {
    store.begin_checkpoint().unwrap().flush().unwrap();
}

fn empty_trash(store: &ChunkStore) {
    while store.empty_trash(7).unwrap() {}
}

/// Zeros for holes.
fn read(store: &ChunkStore, volume: &Volume, first_block: u64, blocks: u64) -> Vec<u8> {
    let mut all = Vec::new();
    for part in store.read(volume, first_block, blocks, false).unwrap() {
        match part {
            ReadPart::Data(data) => all.extend_from_slice(&data),
            ReadPart::Hole(bytes) => all.resize(all.len() + bytes as usize, 0),
        }
    }
    all
}

/// Notes how many of its files are open when everything is synced, and how often names are changed.
struct CountingDisk {
    disk: FileDisk,
    directory: std::path::PathBuf,
    open_files: std::sync::atomic::AtomicUsize,
    renamed: std::sync::atomic::AtomicUsize,
    removed: std::sync::atomic::AtomicUsize,
    /// A file that ends like this cannot be removed.
    stuck: std::sync::OnceLock<&'static str>,
}

impl CountingDisk {
    fn new(directory: &tempfile::TempDir) -> Arc<CountingDisk> {
        Arc::new(CountingDisk {
            disk: FileDisk::open(directory.path()).unwrap(),
            directory: directory.path().canonicalize().unwrap(),
            open_files: Default::default(),
            renamed: Default::default(),
            removed: Default::default(),
            stuck: Default::default(),
        })
    }
}

impl Disk for CountingDisk {
    fn open(&self, path: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        self.disk.open(path, mode)
    }
    fn read_dir(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.disk.read_dir(path)
    }
    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.renamed.fetch_add(1, Ordering::Relaxed);
        self.disk.rename(from, to)
    }
    fn remove_file(&self, path: &str) -> io::Result<()> {
        if self.stuck.get().is_some_and(|end| path.ends_with(end)) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.removed.fetch_add(1, Ordering::Relaxed);
        self.disk.remove_file(path)
    }
    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        let inside = self.disk.read_dir(path)?;
        for entry in inside {
            let path = format!("{path}/{}", entry.name);
            match entry.is_dir {
                true => self.remove_dir_all(&path)?,
                false => self.remove_file(&path)?,
            }
        }
        self.removed.fetch_add(1, Ordering::Relaxed);
        self.disk.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.disk.sync_dir(path)
    }
    fn sync_all(&self) -> io::Result<()> {
        let open = std::fs::read_dir("/proc/self/fd")?.filter_map(Result::ok);
        let ours = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        let count = ours.filter(|it| it.starts_with(&self.directory)).count();
        self.open_files.fetch_max(count, Ordering::Relaxed);
        self.disk.sync_all()
    }
    fn space(&self) -> io::Result<(u64, u64)> {
        self.disk.space()
    }
}

/// A volume of 100 GiB that is written to at random has as many dirty chunks as a process cannot open.
#[test]
fn checkpoint_of_many_chunks_keeps_few_files_open() {
    let directory = tempfile::tempdir().unwrap();
    let disk = CountingDisk::new(&directory);
    let store = open(&(Arc::clone(&disk) as _), &[]);
    let volume = volume(1, "vol001");
    store.create_volume(&volume).unwrap();
    let blocks = u64::from(volume.chunk_bytes) / BLOCK_BYTES as u64;
    for chunk in 0..500 {
        write(&store, &volume, chunk * blocks, data(7, 1), chunk + 2);
    }
    flush(&store);
    let open_files = disk.open_files.load(Ordering::Relaxed);
    assert!((1..100).contains(&open_files), "{open_files}");
    assert_eq!(read(&store, &volume, 499 * blocks, 1), data(7, 1));
}

#[test]
fn neighbours_are_read_at_once() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    write(store, &volume, 14, data(1, 4), 1);
    let parts = store.read(&volume, 12, 10, false).unwrap();
    assert_eq!(
        parts,
        [
            ReadPart::Hole(2 * 4096),
            ReadPart::Data(data(1, 2).into()),
            ReadPart::Data(data(1, 2).into()),
            ReadPart::Hole(4 * 4096),
        ]
    );
    assert_eq!(
        store.read(&volume, 500, 5000, false).unwrap(),
        [ReadPart::Hole(5000 * 4096)]
    );
}

#[test]
fn reads_that_would_wait_say_so() {
    let fixture = fixture();
    let volume = volume(1, "v");
    fixture.store.create_volume(&volume).unwrap();
    write(&fixture.store, &volume, 0, data(1, 2), 1);
    flush(&fixture.store);
    assert!(fixture.store.read(&volume, 0, 2, true).is_ok());
    let store = open(&fixture.disk, std::slice::from_ref(&volume));
    // The table is not in memory.
    let error = store.read(&volume, 0, 2, true).unwrap_err();
    assert!(matches!(error, ReadError::WouldBlock), "{error}");
    store.read(&volume, 0, 2, false).unwrap();
    assert!(store.read(&volume, 0, 2, true).is_ok());
    assert!(store.read(&volume, 64, 2, true).is_ok());
}

#[test]
fn chunks_without_blocks_do_not_exist() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in 0..200 {
        write(store, &volume, chunk * 16, data(1, 16), 1);
    }
    let files = |leaf: &str| {
        fixture
            .disk
            .read_dir(&format!("data/v/{leaf}"))
            .unwrap()
            .len()
    };
    assert_eq!(files("00/00"), 200);
    assert_eq!(store.allocated_bytes(volume.id), 200 * (64 << 10));
    // The first and the last in part; of the others some at once, the rest at the checkpoint.
    store.zero(&volume, 8, 1 << 40, false, Slot(2)).unwrap();
    assert_eq!(store.allocated_bytes(volume.id), 8 * 4096);
    assert!(files("00/00") > 1);
    flush(store);
    assert_eq!(files("00/00"), 1);
    // Block by block it is the same.
    for block in 0..8 {
        store.zero(&volume, block, 1, false, Slot(3)).unwrap();
    }
    assert_eq!(files("00/00"), 0);
    let (list, rest) = store.list(&volume, ChunkIndex(0), 10).unwrap();
    assert_eq!((list.len(), rest), (0, None));
}

#[test]
fn allocated_zeros_take_space() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    store.zero(&volume, 10, 20, true, Slot(1)).unwrap();
    assert_eq!(read(store, &volume, 10, 20), data(0, 20));
    let extent = |blocks: u64, allocated| Extent {
        length_bytes: blocks * 4096,
        allocated,
    };
    assert_eq!(
        store.extents(&volume, 0, 1 << 30, 10, false).unwrap(),
        [
            extent(10, false),
            extent(20, true),
            extent((1 << 30) - 30, false)
        ]
    );
    assert_eq!(
        store.extents(&volume, 0, 1 << 30, 2, false).unwrap(),
        [extent(10, false), extent(20, true)]
    );
    assert_eq!(
        store.extents(&volume, 12, 3, 2, false).unwrap(),
        [extent(3, true)]
    );
    assert_eq!(store.extents(&volume, 12, 3, 0, false).unwrap(), []);
}

/// A volume has up to 2^24 tables, which may all have to be read from disk.
#[test]
fn one_question_looks_at_few_tables() {
    let fixture = fixture();
    let store = &fixture.store;
    let volume = volume(1, "v");
    store.create_volume(&volume).unwrap();
    let per_chunk = u64::from(volume.chunk_bytes) / BLOCK_BYTES as u64;
    let chunks = LOOKED_AT_MAX as u64 + 100;
    for chunk in 0..chunks {
        write(
            store,
            &volume,
            chunk * per_chunk,
            data(1, per_chunk as usize),
            1,
        );
    }
    flush(store);
    let blocks = chunks * per_chunk;
    let extents = store
        .extents(&volume, 0, blocks, usize::MAX, false)
        .unwrap();
    let covered = Extent {
        length_bytes: LOOKED_AT_MAX as u64 * u64::from(volume.chunk_bytes),
        allocated: true,
    };
    assert_eq!(extents, [covered]);
    let all = ChunkIndex(0)..ChunkIndex(chunks as u32);
    let (found, next) = store.statuses(&volume, all, usize::MAX, false).unwrap();
    assert_eq!(found.len(), LOOKED_AT_MAX);
    assert_eq!(next, Some(ChunkIndex(LOOKED_AT_MAX as u32)));
}

#[test]
fn deleted_volumes_leave_nothing_to_the_next_of_their_name() {
    let fixture = fixture();
    let store = &fixture.store;
    let (old, new) = (volume(1, "v"), volume(2, "v"));
    store.create_volume(&old).unwrap();
    write(store, &old, 0, data(1, 40), 1);
    flush(store);
    write(store, &old, 0, data(2, 4), 2);
    store.delete_volume(&old).unwrap();
    store.create_volume(&new).unwrap();
    assert_eq!(read(store, &new, 0, 40), data(0, 40));
    write(store, &new, 7, data(3, 1), 3);
    flush(store);
    assert_eq!(fixture.disk.read_dir("trash").unwrap().len(), 1);
    empty_trash(store);
    assert!(fixture.disk.read_dir("trash").unwrap().is_empty());
    let error = store.read(&old, 0, 1, false).unwrap_err();
    assert!(matches!(error, ReadError::NoSuchVolume(_)), "{error}");
    let store = open(&fixture.disk, std::slice::from_ref(&new));
    assert_eq!(read(&store, &new, 7, 1), data(3, 1));
}

/// A deleted volume is removed in steps, by this process or the next.
#[test]
fn trash_is_emptied_in_steps() {
    let directory = tempfile::tempdir().unwrap();
    let disk = CountingDisk::new(&directory);
    let store = open(&(Arc::clone(&disk) as _), &[]);
    let volume = volume(1, "v");
    store.create_volume(&volume).unwrap();
    for chunk in 0..300 {
        write(&store, &volume, chunk * 16, data(1, 1), 1);
    }
    store.delete_volume(&volume).unwrap();
    let removed = || disk.removed.load(Ordering::Relaxed);
    let mut before = removed();
    assert_eq!(before, 0);
    let mut store = store;
    for step in 0.. {
        if step == 10 {
            drop(store);
            store = open(&(Arc::clone(&disk) as _), &[]);
        }
        let more = store.empty_trash(11).unwrap();
        assert!(removed() - before <= 11);
        before = removed();
        let is_empty = disk.read_dir("trash").unwrap().is_empty();
        assert_eq!(more, !is_empty);
        assert_eq!(more, !store.is_trash_empty());
        if !more {
            break;
        }
    }
    // The volume's directory, one below it, two with files.
    assert_eq!(removed(), 300 + 4);
    assert!(!store.empty_trash(1).unwrap());
}

/// A file that cannot be removed keeps only itself and its directory.
#[test]
fn trash_is_emptied_around_what_stays() {
    let directory = tempfile::tempdir().unwrap();
    let disk = CountingDisk::new(&directory);
    disk.stuck.set("/00/01").unwrap();
    let store = open(&(Arc::clone(&disk) as _), &[]);
    let volume = volume(1, "v");
    store.create_volume(&volume).unwrap();
    for chunk in [1, 2, 3, 600] {
        write(&store, &volume, chunk * 16, data(1, 1), 1);
    }
    store.delete_volume(&volume).unwrap();
    let mut errors = 0;
    for _ in 0..20 {
        errors += usize::from(store.empty_trash(2).is_err());
    }
    assert!(errors > 2, "it is tried again");
    let of_volume = format!("trash/{}", disk.read_dir("trash").unwrap()[0].name);
    let left = |leaf: &str| disk.read_dir(&format!("{of_volume}/00/{leaf}"));
    assert_eq!(left("00").unwrap().len(), 1);
    assert!(left("02").unwrap().is_empty());
    assert!(!store.is_trash_empty());
}

/// Data that were deleted do not come back because someone has removed the directory for them.
#[test]
fn the_trash_is_made_again() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in 0..600 {
        write(store, &volume, chunk * 16, data(1, 1), 1);
    }
    flush(store);
    fixture.disk.remove_dir_all("trash").unwrap();
    store.zero(&volume, 0, 1 << 40, false, Slot(2)).unwrap();
    flush(store);
    let again = open(&fixture.disk, std::slice::from_ref(&volume));
    assert_eq!(again.allocated_bytes(volume.id), 0);
    assert_eq!(read(&again, &volume, 0, 16), data(0, 16));
    fixture.disk.remove_dir_all("trash").unwrap();
    again.delete_volume(&volume).unwrap();
    assert!(fixture.disk.read_dir("data").unwrap().is_empty());
}

/// The volumes of a base take the place of those of a state that may be between two entries.
#[test]
fn volumes_are_exchanged() {
    let fixture = fixture();
    let store = &fixture.store;
    let [stays, goes, comes] = [volume(1, "a"), volume(2, "b"), volume(3, "b")];
    for volume in [&stays, &goes] {
        store.create_volume(volume).unwrap();
        write(store, volume, 0, data(1, 1), 1);
    }
    store
        .exchange_volumes([&stays, &comes].into_iter())
        .unwrap();
    assert_eq!(read(store, &stays, 0, 1), data(1, 1));
    assert_eq!(read(store, &comes, 0, 1), data(0, 1));
    let error = store.read(&goes, 0, 1, false).unwrap_err();
    assert!(matches!(error, ReadError::NoSuchVolume(_)), "{error}");
}

/// Zeroing many chunks takes a few changes of names, and the next checkpoint does not remove them either.
#[test]
fn many_chunks_are_zeroed_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let disk = CountingDisk::new(&directory);
    let store = open(&(Arc::clone(&disk) as _), &[]);
    let volume = volume(1, "v");
    store.create_volume(&volume).unwrap();
    // In 13 directories; of the first and the last not all is zeroed.
    for chunk in 100..3200 {
        write(&store, &volume, chunk * 16, data(7, 1), 1);
    }
    let (first, last) = (110, 3190);
    let zero = |slot| {
        let blocks = (last - first) * 16;
        store.zero(&volume, first * 16, blocks, false, Slot(slot))
    };
    flush(&store);
    let changes = || {
        let (renamed, removed) = (&disk.renamed, &disk.removed);
        renamed.load(Ordering::Relaxed) + removed.load(Ordering::Relaxed)
    };
    let before = changes();
    zero(2).unwrap();
    assert!(changes() - before <= 11 + 64, "{}", changes() - before);
    let singly = (256 - 110) + (3190 - 12 * 256);
    assert_eq!(store.dirty_count(), (singly - 64) as usize);
    let check = |store: &ChunkStore| {
        for chunk in 100..3200 {
            let expected = if (first..last).contains(&chunk) { 0 } else { 7 };
            let found = read(store, &volume, chunk * 16, 1);
            assert!(found == data(expected, 1), "chunk {chunk}");
        }
        assert_eq!(store.allocated_bytes(volume.id), 20 * 4096);
    };
    check(&store);
    flush(&store);
    assert!(changes() - before <= 11 + singly as usize);
    // Nothing comes back with a restart, whether it was removed or not.
    check(&open(
        &(Arc::clone(&disk) as _),
        std::slice::from_ref(&volume),
    ));
    assert_eq!(disk.read_dir("trash").unwrap().len(), 11);
    empty_trash(&store);
    check(&open(
        &(Arc::clone(&disk) as _),
        std::slice::from_ref(&volume),
    ));
    assert!(disk.read_dir("trash").unwrap().is_empty());
    // A chunk that could not be found is one whose file is lost; these are not.
    assert_eq!(store.bad_blocks(), 0);
}

/// What is written while the files that were there before wait for their removal stays.
#[test]
fn chunks_are_written_anew_before_the_old_ones_are_removed() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in 0..600 {
        write(store, &volume, chunk * 16, data(1, 16), 1);
    }
    flush(store);
    store.zero(&volume, 0, 1 << 40, false, Slot(2)).unwrap();
    write(store, &volume, 300 * 16 + 4, data(2, 1), 3);
    store.empty_trash(50).unwrap();
    write(store, &volume, 301 * 16 + 4, data(2, 1), 4);
    empty_trash(store);
    flush(store);
    let check = |store: &ChunkStore| {
        for chunk in [300, 301] {
            assert_eq!(read(store, &volume, chunk * 16, 4), data(0, 4));
            assert_eq!(read(store, &volume, chunk * 16 + 4, 1), data(2, 1));
        }
        assert_eq!(read(store, &volume, 0, 300 * 16), data(0, 300 * 16));
    };
    check(store);
    let again = open(&fixture.disk, std::slice::from_ref(&volume));
    check(&again);
    assert_eq!(again.list(&volume, ChunkIndex(0), 9).unwrap().0.len(), 2);
}

/// While chunks are being copied, entries take effect on some of them only.
#[test]
fn chunks_that_take_no_part_are_not_zeroed_with_their_neighbours() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in [3, 300, 400, 600, 70_000, 200_000] {
        write(store, &volume, chunk * 16, data(1, 1), 1);
    }
    let takes_part = |chunk: ChunkIndex| ![400, 70_000].contains(&chunk.0);
    let takes_part = Some(&takes_part as &dyn Fn(ChunkIndex) -> bool);
    store
        .zero_where(&volume, 0, 1 << 40, false, Slot(2), takes_part)
        .unwrap();
    let (list, _) = store.list(&volume, ChunkIndex(0), 9).unwrap();
    let left: Vec<u32> = list.iter().map(|summary| summary.chunk.0).collect();
    assert_eq!(left, [400, 70_000]);
    assert_eq!(read(store, &volume, 400 * 16, 1), data(1, 1));
}

/// A chunk whose file is lost is damaged, not zero; but zeroed it is, with its directory.
#[test]
fn lost_chunks_are_zeroed_with_the_others() {
    let fixture = fixture();
    let volume = volume(1, "v");
    fixture.store.create_volume(&volume).unwrap();
    for chunk in [256, 257] {
        write(&fixture.store, &volume, chunk * 16, data(1, 1), 1);
    }
    flush(&fixture.store);
    let store = open(&fixture.disk, std::slice::from_ref(&volume));
    fixture.disk.remove_file("data/v/00/01/01").unwrap();
    store.read(&volume, 256 * 16, 1, false).unwrap();
    let error = store.read(&volume, 257 * 16, 1, false).unwrap_err();
    assert!(matches!(error, ReadError::BadBlock { .. }), "{error}");
    store.zero(&volume, 0, 1 << 20, false, Slot(2)).unwrap();
    assert_eq!(read(&store, &volume, 256 * 16, 32), data(0, 32));
    flush(&store);
    assert_eq!(store.allocated_bytes(volume.id), 0);
}

/// Readers, checkpoints and the trash beside a writer that puts directories aside: what is there is read
/// whole, what was put aside as zeros, and never as lost.
#[test]
fn readers_never_miss_chunks_that_are_put_aside() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    let done = AtomicBool::new(false);
    // More than there is memory for, so that tables are read again and again.
    let chunks = (0..40).map(|at| 256 + at * 5).collect::<Vec<u64>>();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for chunk in &chunks {
                        let block = read(store, &volume, chunk * 16, 1);
                        assert!(block.iter().all(|byte| *byte == block[0]));
                    }
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                flush(store);
                store.empty_trash(20).unwrap();
            }
        });
        let _done = Done(&done);
        for round in 1..300 {
            for chunk in &chunks {
                write(store, &volume, chunk * 16, data(round as u8, 1), round);
            }
            if round % 2 == 0 {
                store.zero(&volume, 0, 1 << 20, false, Slot(round)).unwrap();
                for chunk in &chunks {
                    assert_eq!(read(store, &volume, chunk * 16, 1), data(0, 1));
                }
            }
        }
    });
    assert_eq!(store.bad_blocks(), 0);
}

/// The files of a volume under a name that another one has now.
#[test]
fn chunks_of_another_volume_count_as_absent() {
    let fixture = fixture();
    let (old, new) = (volume(1, "v"), volume(2, "v"));
    fixture.store.create_volume(&old).unwrap();
    write(&fixture.store, &old, 0, data(1, 40), 1);
    flush(&fixture.store);
    let store = open(&fixture.disk, std::slice::from_ref(&new));
    assert_eq!(read(&store, &new, 0, 40), data(0, 40));
    write(&store, &new, 3, data(5, 1), 2);
    assert_eq!(read(&store, &new, 0, 3), data(0, 3));
    assert_eq!(read(&store, &new, 3, 1), data(5, 1));
    flush(&store);
    let store = open(&fixture.disk, std::slice::from_ref(&new));
    assert_eq!(read(&store, &new, 3, 1), data(5, 1));
    assert_eq!(read(&store, &new, 4, 12), data(0, 12));
}

#[test]
fn images_carry_chunks() {
    let (from, to) = (fixture(), fixture());
    let volume = volume(1, "v");
    for store in [&from.store, &to.store] {
        store.create_volume(&volume).unwrap();
    }
    write(&from.store, &volume, 2, data(1, 3), 5);
    write(&from.store, &volume, 8, data(2, 1), 6);
    write(&to.store, &volume, 0, data(9, 16), 3);
    let image = from.store.export(&volume, ChunkIndex(0)).unwrap();
    to.store.import(&volume, ChunkIndex(0), &image).unwrap();
    assert_eq!(
        read(&to.store, &volume, 0, 16),
        read(&from.store, &volume, 0, 16)
    );
    let list = |store: &ChunkStore| store.list(&volume, ChunkIndex(0), 9).unwrap();
    assert_eq!(list(&to.store), list(&from.store));
    let store = open(&to.disk, std::slice::from_ref(&volume));
    // It was durable when import returned.
    assert_eq!(
        read(&store, &volume, 0, 16),
        read(&from.store, &volume, 0, 16)
    );
    to.store
        .import(&volume, ChunkIndex(0), &Bytes::new())
        .unwrap();
    assert_eq!(list(&to.store).0, []);
    assert!(to.store.export(&volume, ChunkIndex(0)).unwrap().is_empty());
    let mut bad = image.to_vec();
    bad[5000] ^= 1;
    let error = to
        .store
        .import(&volume, ChunkIndex(0), &bad.into())
        .unwrap_err();
    assert!(matches!(error, ChunkError::BadImage(_)), "{error}");
    let error = to.store.import(&volume, ChunkIndex(1), &image).unwrap_err();
    assert!(matches!(error, ChunkError::BadImage(_)), "{error}");
}

#[test]
fn lists_come_in_parts() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in [0, 3, 255, 256, 70_000] {
        write(store, &volume, chunk * 16, data(1, 1), chunk + 1);
    }
    let (mut found, mut next) = (Vec::new(), Some(ChunkIndex(0)));
    while let Some(from) = next {
        let (list, rest) = store.list(&volume, from, 2).unwrap();
        found.extend(
            list.iter()
                .map(|summary| (summary.chunk.0, summary.last_slot.0)),
        );
        next = rest;
    }
    assert_eq!(
        found,
        [(0, 1), (3, 4), (255, 256), (256, 257), (70_000, 70_001)]
    );
}

/// Ends the other threads also when an assertion fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Readers, a writer, checkpoints and exports at once: every block is one of those written, whole.
#[test]
fn readers_never_see_half_a_block() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (store, volume, done) = (store, &volume, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let bytes = match store.read(volume, 5, 60, reader == 0) {
                        Err(ReadError::WouldBlock) => continue,
                        parts => parts.unwrap(),
                    };
                    for part in bytes {
                        if let ReadPart::Data(data) = part {
                            for block in data.chunks(BLOCK_BYTES) {
                                assert!(block.iter().all(|byte| *byte == block[0]));
                            }
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                flush(store);
                store.export(&volume, ChunkIndex(1)).unwrap();
                store.extents(&volume, 0, 1000, 1000, false).unwrap();
            }
        });
        let _done = Done(&done);
        for round in 0..4000u64 {
            let first = round * 7 % 60;
            match round % 11 {
                3 => store.zero(&volume, first, 3, false, Slot(round)).unwrap(),
                5 => store.zero(&volume, 16, 16, false, Slot(round)).unwrap(),
                _ => write(
                    store,
                    &volume,
                    first,
                    data((1 + round % 250) as u8, 4),
                    round,
                ),
            }
        }
    });
    assert_eq!(store.bad_blocks(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..90u64, 1..9usize, any::<u8>()).prop_map(|(at, n, v)| Step::Write(at, n, v)),
        3 => (0..90u64, 0..40u64, any::<bool>()).prop_map(|(at, n, a)| Step::Zero(at, n, a)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

/// Chunks at the ends of directories, and some between.
const CORNERS: [u64; 12] = [
    0, 1, 255, 256, 300, 511, 512, 0xffff, 0x1_0000, 0x1_00ff, 0x1_ffff, 0x2_0000,
];

#[derive(Clone, Debug)]
enum SparseStep {
    Write(u64, u8),
    /// From the first up to before the second.
    Zero(u64, u64),
    Flush,
    EmptyTrash(usize),
    Reopen,
}

fn sparse_step() -> impl Strategy<Value = SparseStep> {
    let corner = || proptest::sample::select(&CORNERS[..]);
    prop_oneof![
        8 => (corner(), any::<u8>()).prop_map(|(at, value)| SparseStep::Write(at, value)),
        2 => (corner(), corner()).prop_map(|(first, end)| SparseStep::Zero(first, end)),
        1 => corner().prop_map(|first| SparseStep::Zero(first, 1 << 24)),
        1 => Just(SparseStep::Flush),
        2 => (0..9usize).prop_map(SparseStep::EmptyTrash),
        1 => Just(SparseStep::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a plain vector of blocks.
    #[test]
    fn store_is_a_vector_of_blocks(steps in proptest::collection::vec(step(), 1..60)) {
        let fixture = fixture();
        let volume = volume(1, "v");
        let mut store = Arc::clone(&fixture.store);
        store.create_volume(&volume).unwrap();
        let mut model: Vec<Option<u8>> = vec![None; 160];
        for (slot, step) in steps.into_iter().enumerate() {
            let slot = slot as u64 + 1;
            match step {
                Step::Write(at, blocks, value) => {
                    write(&store, &volume, at, data(value, blocks), slot);
                    model[at as usize..][..blocks].fill(Some(value));
                }
                Step::Zero(at, blocks, allocate) => {
                    store.zero(&volume, at, blocks, allocate, Slot(slot)).unwrap();
                    model[at as usize..][..blocks as usize].fill(allocate.then_some(0));
                }
                Step::Flush => flush(&store),
                Step::Reopen => {
                    flush(&store);
                    store = open(&fixture.disk, std::slice::from_ref(&volume));
                }
            }
            let expected: Vec<u8> = model.iter().flat_map(|v| data(v.unwrap_or(0), 1)).collect();
            prop_assert!(read(&store, &volume, 0, 160) == expected);
            let allocated = model.iter().flatten().count() as u64 * 4096;
            prop_assert_eq!(store.allocated_bytes(volume.id), allocated);
            let extents = store.extents(&volume, 0, 160, 1000, false).unwrap();
            let found: Vec<bool> = extents
                .iter()
                .flat_map(|e| vec![e.allocated; (e.length_bytes / 4096) as usize])
                .collect();
            let wanted: Vec<bool> = model.iter().map(Option::is_some).collect();
            prop_assert_eq!(found, wanted);
        }
    }

    /// The same for a volume of many directories, of which only one block a chunk is looked at.
    #[test]
    fn store_is_a_sparse_vector_of_chunks(
        steps in proptest::collection::vec(sparse_step(), 1..60),
    ) {
        let fixture = fixture();
        let volume = volume(1, "v");
        let mut store = Arc::clone(&fixture.store);
        store.create_volume(&volume).unwrap();
        let mut model = std::collections::BTreeMap::new();
        for (slot, step) in steps.into_iter().enumerate() {
            let slot = slot as u64 + 1;
            match step {
                SparseStep::Write(chunk, value) => {
                    write(&store, &volume, chunk * 16 + 5, data(value, 1), slot);
                    model.insert(chunk, value);
                }
                SparseStep::Zero(first, end) => {
                    let blocks = end.saturating_sub(first) * 16;
                    store.zero(&volume, first * 16, blocks, false, Slot(slot)).unwrap();
                    model.retain(|chunk, _| !(first..end).contains(chunk));
                }
                SparseStep::Flush => flush(&store),
                SparseStep::EmptyTrash(names) => drop(store.empty_trash(names).unwrap()),
                SparseStep::Reopen => {
                    flush(&store);
                    store = open(&fixture.disk, std::slice::from_ref(&volume));
                }
            }
            for chunk in CORNERS {
                let value = model.get(&chunk).copied().unwrap_or(0);
                prop_assert_eq!(read(&store, &volume, chunk * 16 + 5, 1), data(value, 1));
            }
            let allocated = model.len() as u64 * 4096;
            prop_assert_eq!(store.allocated_bytes(volume.id), allocated);
        }
    }
}
