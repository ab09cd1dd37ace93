use std::time::Duration;

use super::*;
use crate::chunk::Digest;
use crate::chunk::digest::{TREE_LEVELS, Tree};
use crate::engine::repair::tests::{Cell, VOLUME};
use crate::paxos::message::Message;
use crate::types::{BLOCK_BYTES, ChunkIndex};
use crate::wire::client::{ReplyBody, RequestBody};
use crate::wire::inspect::{
    Inspect, Inspection, SurveyDifference, SurveyInfo, SurveyQuestion, SurveyScope,
};

impl Cell {
    /// Asks until it is done, as a client does.
    fn survey(&mut self, index: usize, id: u64, scope: SurveyScope) -> SurveyInfo {
        for _ in 0..1000 {
            let info = self.ask_survey(index, id, scope);
            if info.state != "running" {
                return info;
            }
            self.pass(Duration::from_millis(100));
        }
        panic!("it does not end");
    }

    fn ask_survey(&mut self, index: usize, id: u64, scope: SurveyScope) -> SurveyInfo {
        let question = SurveyQuestion {
            id,
            volume: VOLUME,
            from: ChunkIndex(0),
            scope,
        };
        let tag = self.ask(index, RequestBody::Inspect(Inspect::Survey(question)));
        match self.replies.remove(&tag) {
            Some(Ok(ReplyBody::Inspection(inspection))) => match *inspection {
                Inspection::Survey(info) => info,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    /// Changes a block as if another write of it and of its checksum had been lost.
    fn diverge(&mut self, index: usize, block: u64, value: u8) {
        let engine = &self.engines[index];
        let volume = engine.volumes[&VOLUME].clone();
        let data = vec![value; BLOCK_BYTES];
        engine.chunks.force(&volume, block, Some(&data)).unwrap();
    }

    fn digests(&mut self) -> Vec<Option<String>> {
        let leader = self.leader();
        self.next += 1000;
        let id = self.next;
        let info = self.survey(leader, id, SurveyScope::All);
        assert_eq!(info.state, "done", "{info:?}");
        info.servers.into_iter().map(|it| it.digest).collect()
    }

    fn are_equal(&mut self) -> bool {
        let digests = self.digests();
        digests[0].is_some() && digests.iter().all(|it| *it == digests[0])
    }
}

fn digest(blocks: &[(u64, u8)]) -> String {
    let mut tree = Tree::default();
    for (block, value) in blocks {
        tree.add(*block, 0, Digest::leaf(&[*value; BLOCK_BYTES]));
    }
    Digest::volume(1 << 20, &tree.root(TREE_LEVELS)).to_string()
}

fn mended(chunk: u32, server: usize, replaced: u64) -> SurveyDifference {
    SurveyDifference {
        chunk,
        servers: vec![ServerId(server as u8)],
        replaced,
        repaired: true,
    }
}

#[test]
fn all_servers_tell_the_same_digest_of_one_slot() {
    let mut cell = Cell::new(3);
    cell.write(3, 7, 2);
    cell.write(100, 8, 1);
    let expected = digest(&[(3, 7), (4, 7), (100, 8)]);
    assert_eq!(cell.digests(), vec![Some(expected.clone()); 3]);
    for index in 0..3 {
        let info = cell.survey(index, 5 + index as u64, SurveyScope::Own);
        assert_eq!(info.state, "done", "{info:?}");
        assert_eq!(info.servers[0].digest.as_ref(), Some(&expected));
        assert_eq!(info.slot, Some(cell.engines[index].state().applied()));
        assert_eq!(info.size_bytes, 1 << 20);
    }
    let follower = cell.order()[1];
    let info = cell.ask_survey(follower, 9, SurveyScope::All);
    assert_eq!(info.state, "elsewhere");
    assert_eq!(info.leader, Some(ServerId(cell.leader() as u8)));
}

/// Somebody who missed the question has applied a later slot when it is asked again.
#[test]
fn who_misses_the_question_is_asked_for_a_later_slot() {
    let mut cell = Cell::new(3);
    cell.write(3, 7, 2);
    let leader = cell.leader();
    cell.loses = |_, to, message| {
        to != ServerId(0) && matches!(message, Message::Sync(SyncMessage::TakePoint(_)))
    };
    let first = cell.ask_survey(leader, 77, SurveyScope::All);
    cell.pass(Duration::from_millis(500));
    cell.write(50, 9, 1);
    cell.loses = |_, _, _| false;
    let info = cell.survey(leader, 77, SurveyScope::All);
    assert_eq!(info.state, "done");
    assert!(info.slot > first.slot);
    assert!(info.servers.iter().all(|it| it.digest.is_some()));
}

#[test]
fn silent_servers_are_named() {
    let mut cell = Cell::new(3);
    let [leader, one, two] = cell.order();
    cell.loses = |_, _, message| matches!(message, Message::Sync(SyncMessage::TakePoint(_)));
    let info = cell.survey(leader, 77, SurveyScope::All);
    assert_eq!(info.state, "done");
    let states = [leader, one, two].map(|index| info.servers[index].state.as_str());
    assert_eq!(states, ["done", "silent", "silent"]);
}

#[test]
fn a_minority_takes_what_the_majority_holds() {
    for who in 0..3 {
        let mut cell = Cell::new(3);
        cell.write(0, 7, 40);
        let index = cell.order()[who];
        for block in [3, 4, 20] {
            cell.diverge(index, block, 9);
        }
        assert!(!cell.are_equal());
        let leader = cell.leader();
        let info = cell.survey(leader, 5, SurveyScope::Verify);
        assert_eq!((info.state.as_str(), info.next), ("done", None));
        let expected = [mended(0, index, 2), mended(1, index, 1)];
        assert_eq!(info.differences, expected, "{info:?}");
        assert!(cell.are_equal());
        for block in [3, 4, 20] {
            assert_eq!(cell.stored(index, block), vec![7; BLOCK_BYTES]);
        }
        let counts = cell.engines[index].scrub_counts();
        assert_eq!((counts.mended, counts.mended_blocks), (2, 3));
        let counts = cell.engines[leader].scrub_counts();
        assert_eq!((counts.different, counts.undecided), (2, 0));
        // It is on the disk after a restart.
        cell.reopen(index, |_| {});
        assert!(cell.are_equal());
        let info = cell.survey(leader, 6, SurveyScope::Verify);
        assert_eq!(info.differences, []);
        assert!(info.servers.iter().all(|it| it.blocks == 40));
    }
}

#[test]
fn lost_and_extra_chunks_are_differences() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 3);
    let [leader, one, two] = cell.order();
    let volume = cell.engines[one].volumes[&VOLUME].clone();
    let chunks = cell.engines[one].chunks.clone();
    chunks.zero(&volume, 0, 16, false, Slot(1)).unwrap();
    cell.diverge(two, 64, 3);
    assert!(!cell.are_equal());
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    assert_eq!(info.differences, [mended(0, one, 3), mended(4, two, 1)]);
    assert!(cell.are_equal());
    assert_eq!(cell.digests()[0], Some(digest(&[(0, 7), (1, 7), (2, 7)])));
}

#[test]
fn without_a_majority_nothing_is_repaired() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 3);
    let [leader, one, two] = cell.order();
    cell.diverge(one, 0, 8);
    cell.diverge(two, 0, 9);
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    let difference = SurveyDifference {
        chunk: 0,
        servers: Vec::new(),
        replaced: 0,
        repaired: false,
    };
    assert_eq!(info.differences, [difference]);
    assert_eq!(cell.engines[leader].scrub_counts().undecided, 1);
    let stored: Vec<u8> = [leader, one, two]
        .map(|index| cell.stored(index, 0)[0])
        .into();
    assert_eq!(stored, [7, 8, 9]);
}

/// Of two that answer, neither is a majority of three.
#[test]
fn a_majority_is_one_of_all_servers() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 3);
    let [leader, one, _] = cell.order();
    cell.diverge(one, 0, 8);
    cell.loses = |_, _, message| matches!(message, Message::Sync(SyncMessage::Point(answer)) if answer.id == 5);
    // Both others are silent: the leader has nobody to compare with.
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    assert_eq!(info.differences, []);
    let silent = info.servers.iter().filter(|it| it.state == "silent");
    assert_eq!(silent.count(), 2);
    assert_eq!(cell.stored(one, 0)[0], 8);
}

#[test]
fn damaged_blocks_are_found_and_repaired() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 40);
    let [leader, one, two] = cell.order();
    cell.damage(one, 3);
    cell.damage(two, 5);
    cell.damage(leader, 35);
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    assert_eq!(info.state, "done");
    for server in &info.servers {
        assert_eq!(
            (server.blocks, server.bad, server.bad_left),
            (40, 1, 0),
            "{info:?}"
        );
    }
    assert_eq!(info.differences, []);
    assert!(cell.are_equal());
    assert_eq!(cell.stored(two, 5), vec![7; BLOCK_BYTES]);
}

/// What comes is older than what was written here since it was asked for.
#[test]
fn a_chunk_that_is_written_to_is_asked_for_again() {
    let mut cell = Cell::new(3);
    cell.write(0, 7, 16);
    let [leader, one, _] = cell.order();
    cell.diverge(one, 3, 9);
    cell.holds = true;
    cell.ask_survey(leader, 5, SurveyScope::Verify);
    for _ in 0..50 {
        cell.pass(Duration::from_millis(20));
        if !cell.held.is_empty() {
            break;
        }
    }
    // Read at the other server before it is overwritten, but taken after.
    let held: Vec<_> = std::mem::take(&mut cell.held)
        .into_iter()
        .map(|(index, export)| {
            let exported = export.run(&cell.engines[index].chunks.clone());
            (index, export, exported)
        })
        .collect();
    assert_eq!(held.len(), 1);
    cell.write(5, 8, 1);
    cell.holds = false;
    let now = cell.now;
    for (index, export, exported) in held {
        cell.engines[index].handle_exported(now, export, exported);
    }
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    assert_eq!(info.differences, [mended(0, one, 1)]);
    assert_eq!(cell.stored(one, 5), vec![8; BLOCK_BYTES]);
    assert_eq!(cell.stored(one, 3), vec![7; BLOCK_BYTES]);
    assert!(cell.are_equal());
}

#[test]
fn ranges_follow_each_other() {
    let mut cell = Cell::new(3);
    for chunk in 0..16 {
        cell.write(chunk * 16, 7, 1);
    }
    cell.propose(crate::entry::Op::ResizeVolume {
        volume: VOLUME,
        size_bytes: 4 << 20,
        allow_shrink: false,
    });
    for chunk in 16..20 {
        cell.write(chunk * 16, 7, 1);
    }
    let leader = cell.leader();
    let info = cell.survey(leader, 5, SurveyScope::Verify);
    assert_eq!(info.next, Some(16));
    assert!(info.servers.iter().all(|it| it.blocks == 16));
}

#[test]
fn bad_questions_are_answered() {
    let mut cell = Cell::new(3);
    let leader = cell.leader();
    let question = SurveyQuestion {
        id: 1,
        volume: crate::types::VolumeId(99),
        from: ChunkIndex(u32::MAX),
        scope: SurveyScope::All,
    };
    for scope in [SurveyScope::All, SurveyScope::Verify, SurveyScope::Own] {
        let question = SurveyQuestion { scope, ..question };
        let tag = cell.ask(leader, RequestBody::Inspect(Inspect::Survey(question)));
        let reply = format!("{:?}", cell.replies[&tag]);
        assert!(reply.contains("failed"), "{reply}");
    }
    // From behind the end.
    let question = SurveyQuestion {
        id: 2,
        volume: VOLUME,
        scope: SurveyScope::Verify,
        ..question
    };
    cell.ask(leader, RequestBody::Inspect(Inspect::Survey(question)));
    cell.pass(Duration::from_secs(1));
    let tag = cell.ask(leader, RequestBody::Inspect(Inspect::Survey(question)));
    let reply = format!("{:?}", cell.replies[&tag]);
    assert!(reply.contains("done"), "{reply}");
}
