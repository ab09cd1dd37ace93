use proptest::prelude::*;

use super::*;
use crate::wire::frame::{FrameLimits, FrameReader};

fn cell(byte: u8) -> CellId {
    CellId([byte; 16])
}

fn key(byte: u8) -> Option<MacKey> {
    Some(MacKey::new(&CellKey::from_bytes([byte; 32])))
}

fn server_role(id: u8) -> Role {
    Role::Server {
        id: ServerId(id),
        incarnation: Incarnation(3),
        boot: 77,
    }
}

fn server(key: Option<MacKey>) -> HandshakeConfig {
    HandshakeConfig {
        cell: Some(cell(1)),
        key,
        role: server_role(2),
        wanted: None,
    }
}

fn client(key: Option<MacKey>) -> HandshakeConfig {
    HandshakeConfig {
        cell: None,
        key,
        role: Role::Client("pss-nbd@host".into()),
        wanted: Some(ServerId(2)),
    }
}

fn take(out: &mut SendQueue) -> Vec<Frame> {
    let mut slices = [std::io::IoSlice::new(&[]); 8];
    let used = out.as_io_slices(&mut slices);
    let bytes: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
    out.clear();
    let mut frames = Vec::new();
    FrameReader::new(FrameLimits::HANDSHAKE)
        .handle_bytes(&bytes, |frame| frames.push(frame))
        .unwrap();
    frames
}

type Ended = Option<Result<Peer, HandshakeError>>;

/// Runs a handshake; gives what the caller and what the other end make of it.
fn run(caller: HandshakeConfig, answerer: HandshakeConfig) -> (Ended, Ended) {
    let mut out = SendQueue::new();
    let mut ends = [
        Handshake::client(caller, [1; 32], &mut out),
        Handshake::server(answerer, [2; 32]),
    ];
    let mut results = [None, None];
    let mut turn = 1;
    let mut frames = take(&mut out);
    while !frames.is_empty() && results[turn].is_none() {
        let mut out = SendQueue::new();
        for frame in &frames {
            results[turn] = ends[turn].handle_frame(frame, &mut out).transpose();
        }
        frames = take(&mut out);
        turn = 1 - turn;
    }
    let [caller, answerer] = results;
    (caller, answerer)
}

fn good_ends() -> (Ended, Ended) {
    let to_caller = Peer {
        role: server_role(2),
        cell: cell(1),
    };
    let to_answerer = Peer {
        role: Role::Client("pss-nbd@host".into()),
        cell: cell(1),
    };
    (Some(Ok(to_caller)), Some(Ok(to_answerer)))
}

#[test]
fn without_key() {
    assert_eq!(run(client(None), server(None)), good_ends());
}

#[test]
fn with_key() {
    assert_eq!(run(client(key(5)), server(key(5))), good_ends());
}

#[test]
fn between_servers() {
    let mut caller = server(key(5));
    caller.role = server_role(1);
    caller.wanted = Some(ServerId(2));
    let (to_caller, to_answerer) = run(caller, server(key(5)));
    assert_eq!(to_caller.unwrap().unwrap().role, server_role(2));
    assert_eq!(to_answerer.unwrap().unwrap().role, server_role(1));
}

#[test]
fn keys_that_differ() {
    let (caller, answerer) = run(client(key(5)), server(key(6)));
    let server = Some(ServerId(2));
    assert_eq!(caller, Some(Err(HandshakeError::Proof { server })));
    let denied = HandshakeError::Proof { server: None };
    assert_eq!(answerer, Some(Err(denied.clone())));
    assert_eq!(denied.to_string(), "the other end has another cell key");
}

#[test]
fn key_on_one_end_only() {
    let at_two = Some(ServerId(2));
    let (caller, answerer) = run(client(None), server(key(6)));
    assert_eq!(
        caller,
        Some(Err(HandshakeError::KeyMissing { server: at_two }))
    );
    assert_eq!(
        answerer,
        Some(Err(HandshakeError::KeyUnexpected { server: None }))
    );
    let (caller, _) = run(client(key(6)), server(None));
    assert_eq!(
        caller,
        Some(Err(HandshakeError::KeyUnexpected { server: at_two }))
    );
}

#[test]
fn another_cell_is_named() {
    let mut caller = client(None);
    caller.cell = Some(cell(9));
    let (caller, _) = run(caller, server(None));
    let error = caller.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "server 2 belongs to another cell, 01010101-0101-0101-0101-010101010101; \
         ours is 09090909-0909-0909-0909-090909090909"
    );
}

#[test]
fn another_server_is_named() {
    let mut caller = client(None);
    caller.wanted = Some(ServerId(4));
    let (caller, answerer) = run(caller, server(None));
    let error = HandshakeError::OtherServer {
        wanted: ServerId(4),
        found: Some(ServerId(2)),
    };
    assert_eq!(caller, Some(Err(error.clone())));
    assert_eq!(answerer, Some(Err(error)));
}

#[test]
fn other_version_is_named() {
    let mut hello = Hello::of(&client(None), [0; 32]).encode();
    hello[0] = 7;
    let frame = Frame {
        kind: FrameKind::Hello,
        group: GroupId(0),
        header: hello.into(),
        payload: bytes::Bytes::new(),
    };
    let mut out = SendQueue::new();
    let result = Handshake::server(server(None), [0; 32]).handle_frame(&frame, &mut out);
    assert_eq!(result, Err(HandshakeError::Version { theirs: 7 }));
    assert_eq!(take(&mut out)[0].kind, FrameKind::Denied);
}

#[test]
fn requests_before_the_handshake_are_refused() {
    let frame = Frame {
        kind: FrameKind::Request,
        group: GroupId(0),
        header: bytes::Bytes::new(),
        payload: bytes::Bytes::new(),
    };
    let mut out = SendQueue::new();
    let result = Handshake::server(server(None), [0; 32]).handle_frame(&frame, &mut out);
    assert_eq!(result, Err(HandshakeError::Unexpected(FrameKind::Request)));
}

#[test]
fn proof_of_another_handshake_is_worthless() {
    let mut out = SendQueue::new();
    let mut caller = Handshake::client(client(key(5)), [1; 32], &mut out);
    let hello = take(&mut out).remove(0);
    let mut first = Handshake::server(server(key(5)), [2; 32]);
    first.handle_frame(&hello, &mut out).unwrap();
    let welcome = take(&mut out).remove(0);
    caller.handle_frame(&welcome, &mut out).unwrap();
    let proof = take(&mut out).remove(0);
    let mut second = Handshake::server(server(key(5)), [3; 32]);
    second.handle_frame(&hello, &mut out).unwrap();
    assert_eq!(
        second.handle_frame(&proof, &mut out),
        Err(HandshakeError::Proof { server: None })
    );
    assert!(first.handle_frame(&proof, &mut out).unwrap().is_some());
}

#[test]
fn literal_hello() {
    let hello = Hello::of(&client(key(5)), [0xee; 32]).encode();
    let mut expected = vec![1, 0, 1, 255, 2, 1];
    expected.extend([0; 16 + 8 + 8]);
    expected.extend([0xee; 32]);
    expected.extend([12, 0]);
    expected.extend(b"pss-nbd@host");
    assert_eq!(hello, expected);
}

#[test]
fn literal_welcome() {
    let welcome = Welcome::of(&server(None), [0xdd; 32]).encode();
    let mut expected = vec![1, 0, 2, 0];
    expected.extend([1; 16]);
    expected.extend([3, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([77, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0xdd; 32]);
    assert_eq!(welcome, expected);
}

proptest! {
    #[test]
    fn garbage_never_panics(
        kind in prop::sample::select(vec![
            FrameKind::Hello, FrameKind::Welcome, FrameKind::Proof, FrameKind::Denied,
        ]),
        header in prop::collection::vec(any::<u8>(), 0..200),
        has_key in any::<bool>(),
    ) {
        let key = if has_key { key(1) } else { None };
        let frame = Frame { kind, group: GroupId(0), header: header.into(), payload: Default::default() };
        let mut out = SendQueue::new();
        let mut caller = Handshake::client(client(key.clone()), [1; 32], &mut out);
        let _ = caller.handle_frame(&frame, &mut out);
        let _ = Handshake::server(server(key), [1; 32]).handle_frame(&frame, &mut out);
    }

    #[test]
    fn changed_hello_is_never_accepted_with_a_key(at in 0..80_usize, change in 1..=255_u8) {
        // Whoever rewrites what the caller says cannot make both ends agree on it.
        let mut out = SendQueue::new();
        let mut caller = Handshake::client(client(key(5)), [1; 32], &mut out);
        let mut hello = take(&mut out).remove(0);
        let mut changed = hello.header.to_vec();
        let at = at % changed.len();
        changed[at] ^= change;
        hello.header = changed.into();
        let mut answerer = Handshake::server(server(key(5)), [2; 32]);
        if answerer.handle_frame(&hello, &mut out).is_ok() {
            let welcome = take(&mut out).remove(0);
            let result = caller.handle_frame(&welcome, &mut out);
            let is_proof_error = matches!(result, Err(HandshakeError::Proof { .. }));
            prop_assert!(is_proof_error);
        }
    }
}
