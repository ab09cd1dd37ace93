//! Points tell what chunks held when they were taken, whatever is done meanwhile.

use std::collections::BTreeMap;

use super::*;
use crate::chunk::digest::{TREE_LEVELS, Tree};

const BLOCKS: u64 = 4 * 16;

/// Content by block; zeros are left out.
type Model = BTreeMap<u64, u8>;

fn root_of(model: &Model) -> Digest {
    let mut tree = Tree::default();
    for (block, byte) in model {
        tree.add(*block, 0, Digest::leaf(&[*byte; BLOCK_BYTES]));
    }
    tree.root(TREE_LEVELS)
}

/// Looks at one chunk more; whether there was one.
fn step(store: &ChunkStore, point: &Point, tree: &mut Tree) -> bool {
    let Some(chunk) = point.next() else {
        return false;
    };
    let found = store.digest_chunk(point, chunk).unwrap();
    assert_eq!(found.bad, []);
    let level = point.chunk_levels();
    let first = u64::from(chunk.0) << level;
    tree.add(first, level, found.digest.unwrap());
    true
}

fn all(volume: &Volume) -> std::ops::Range<ChunkIndex> {
    ChunkIndex(0)..ChunkIndex((volume.size_bytes / u64::from(volume.chunk_bytes)) as u32)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Take,
    Look,
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..BLOCKS, 1..40_u64);
    let step = prop_oneof![
        4 => (range(), 1..=255u8).prop_map(|((first, count), byte)| Step::Write(first, count, byte)),
        3 => (range(), any::<bool>()).prop_map(|((first, count), keep)| Step::Zero(first, count, keep)),
        2 => Just(Step::Take),
        4 => Just(Step::Look),
        1 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #[test]
    fn a_point_tells_what_was_there(steps in steps()) {
        let fixture = fixture();
        let (store, volume) = (&fixture.store, volume(1, "v"));
        store.create_volume(&volume).unwrap();
        let mut model = Model::new();
        let mut points = Vec::new();
        for (step_number, what) in (1..).zip(steps) {
            match what {
                Step::Write(first, count, byte) => {
                    write(store, &volume, first, data(byte, count as usize), step_number);
                    model.extend((first..first + count).map(|block| (block, byte)));
                }
                Step::Zero(first, count, allocate) => {
                    store.zero(&volume, first, count, allocate, Slot(step_number)).unwrap();
                    model.retain(|block, _| !(first..first + count).contains(block));
                }
                Step::Take if points.len() < 3 => {
                    let (point, more) = store.take_point(&volume, all(&volume), None).unwrap();
                    prop_assert_eq!(more, None);
                    points.push((point, Tree::default(), root_of(&model)));
                }
                Step::Take => {}
                Step::Look => {
                    for (point, tree, _) in &mut points {
                        step(store, point, tree);
                    }
                }
                Step::Flush => flush(store),
            }
        }
        for (point, mut tree, expected) in points {
            while step(store, &point, &mut tree) {}
            prop_assert_eq!(tree.root(TREE_LEVELS), expected);
            store.end_point(&point);
        }
    }
}

#[test]
fn nothing_behind_the_end_counts() {
    let fixture = fixture();
    let store = &fixture.store;
    let volume = Volume {
        size_bytes: 5 * 4096 + 512,
        ..volume(1, "v")
    };
    store.create_volume(&volume).unwrap();
    write(store, &volume, 0, data(7, 16), 1);
    let (point, _) = store
        .take_point(&volume, ChunkIndex(0)..ChunkIndex(1), None)
        .unwrap();
    let mut tree = Tree::default();
    while step(store, &point, &mut tree) {}
    let mut expected = Tree::default();
    for block in 0..5 {
        expected.add(block, 0, Digest::leaf(&[7; 4096]));
    }
    let last = [[7; 512].as_slice(), &[0; 3584]].concat();
    expected.add(5, 0, Digest::leaf(&last));
    assert_eq!(tree.root(TREE_LEVELS), expected.root(TREE_LEVELS));
}

#[test]
fn damaged_blocks_are_told_and_leave_no_digest() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    write(store, &volume, 0, data(7, 32), 1);
    flush(store);
    let file = fixture
        .disk
        .open("data/v/00/00/00", OpenMode::Existing)
        .unwrap();
    file.write_at(&[io::IoSlice::new(b"rot")], 3 * 4096)
        .unwrap();
    let (point, _) = store.take_point(&volume, all(&volume), None).unwrap();
    let found = store.digest_chunk(&point, ChunkIndex(0)).unwrap();
    assert_eq!((found.digest, found.blocks), (None, 16));
    assert_eq!(
        found.bad.iter().map(|bad| bad.block).collect::<Vec<_>>(),
        [3]
    );
    let found = store.digest_chunk(&point, ChunkIndex(1)).unwrap();
    assert!(found.digest.is_some() && found.bad.is_empty());
    store.end_point(&point);
    // What is overwritten while it is damaged was damaged at the point all the same.
    let (point, _) = store.take_point(&volume, all(&volume), None).unwrap();
    write(store, &volume, 0, data(8, 16), 2);
    let found = store.digest_chunk(&point, ChunkIndex(0)).unwrap();
    assert_eq!((found.digest, found.bad), (None, Vec::new()));
}

#[test]
fn points_of_few_chunks_say_where_the_next_begins() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in [0, 63, 64, 500] {
        write(store, &volume, chunk * 16, data(7, 1), 1);
    }
    let (point, more) = store.take_point(&volume, all(&volume), Some(3)).unwrap();
    assert_eq!((point.chunks(), more), (3, Some(ChunkIndex(500))));
    let rest = ChunkIndex(500)..all(&volume).end;
    let (point, more) = store.take_point(&volume, rest, Some(3)).unwrap();
    assert_eq!(
        (point.next(), point.chunks(), more),
        (Some(ChunkIndex(500)), 1, None)
    );
}

#[test]
fn too_much_ends_a_point() {
    let fixture = fixture();
    let (store, volume) = (&fixture.store, volume(1, "v"));
    store.create_volume(&volume).unwrap();
    for chunk in 0..600 {
        write(store, &volume, chunk * 16, data(7, 1), 1);
    }
    let (point, _) = store.take_point(&volume, all(&volume), None).unwrap();
    // Whole directories.
    store.zero(&volume, 0, 512 * 16, false, Slot(2)).unwrap();
    assert_eq!(point.failure(), Some(PointFailure::Overwritten));
    store.end_point(&point);
    let (point, _) = store.take_point(&volume, all(&volume), None).unwrap();
    store.delete_volume(&volume).unwrap();
    assert_eq!(
        store.digest_chunk(&point, ChunkIndex(512)),
        Err(PointFailure::Gone)
    );
}
