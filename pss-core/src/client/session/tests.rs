use std::io::IoSlice;
use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::wire::client::Request;
use crate::wire::frame::{FrameLimits, FrameReader};

struct Driver {
    session: Session<u32>,
    out: SendQueue,
    start: Instant,
}

impl Driver {
    fn new() -> Driver {
        let mut next = 100;
        let nonces = move || {
            next += 1;
            next
        };
        Driver {
            session: Session::new("test".into(), "alice".into(), Box::new(nonces)),
            out: SendQueue::new(),
            start: Instant::now(),
        }
    }

    /// With an open session of id 7.
    fn open() -> Driver {
        let mut driver = Driver::new();
        driver.write(0, 1);
        let requests = driver.pump();
        assert!(matches!(requests[..], [Request { tag: TAG_OPEN, .. }]));
        assert!(
            driver
                .reply(TAG_OPEN, Ok(ReplyBody::Session(SessionId(7))))
                .is_empty()
        );
        let requests = driver.pump();
        assert_eq!(requests[0].number, RequestNumber(1));
        let events = driver.reply(requests[0].tag, Ok(ReplyBody::Done));
        assert_eq!(events, ["0 answered Ok(Done)"]);
        driver
    }

    fn submit(&mut self, target: u32, body: RequestBody, seconds: u64) {
        self.session.submit(Pending {
            body,
            target: Some(target),
            deadline: self.start + Duration::from_secs(seconds),
        });
    }

    fn write(&mut self, target: u32, bytes: usize) {
        let data = Bytes::from(vec![target as u8; bytes]);
        let body = RequestBody::Write {
            volume: VolumeId(1),
            offset_bytes: 1,
            checksums: vec![crc32c::crc32c(&data)],
            data,
        };
        self.submit(target, body, 30);
    }

    fn read(&mut self, target: u32) {
        let body = RequestBody::Read {
            volume: VolumeId(1),
            offset_bytes: 0,
            length_bytes: 1,
        };
        self.submit(target, body, 30);
    }

    fn pump(&mut self) -> Vec<Request> {
        self.session.pump(&mut self.out);
        self.sent()
    }

    fn reconnect(&mut self) -> Vec<Request> {
        self.session.reconnected(&mut self.out);
        self.sent()
    }

    fn sent(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        let mut reader = FrameReader::new(FrameLimits::REQUESTS);
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[])];
            self.out.as_io_slices(&mut slices);
            let bytes = slices[0].to_vec();
            let take = |frame| requests.push(Request::decode(frame).unwrap());
            reader.handle_bytes(&bytes, take).unwrap();
            self.out.advance(bytes.len());
        }
        requests
    }

    fn reply(&mut self, tag: u64, body: Result<ReplyBody, ReplyError>) -> Vec<String> {
        let mut events = Vec::new();
        self.session.handle_reply(Reply { tag, body }, &mut events);
        events.iter().map(show).collect()
    }

    fn expire(&mut self, seconds: u64) -> (bool, Vec<String>) {
        let mut events = Vec::new();
        let now = self.start + Duration::from_secs(seconds);
        let is_numbered = self.session.expire(now, &mut events);
        (is_numbered, events.iter().map(show).collect())
    }
}

fn show(event: &Event<u32>) -> String {
    match event {
        Event::Answered { target, result, .. } => format!("{target} answered {result:?}"),
        Event::Expired(target) => format!("{target} expired"),
        Event::Fenced(target) => format!("{target} fenced"),
        other => format!("{other:?}"),
    }
}

fn numbers(requests: &[Request]) -> Vec<(u64, u64)> {
    let numbers = |request: &Request| (request.number.0, request.settled_below.0);
    requests.iter().map(numbers).collect()
}

const STALE: Result<ReplyBody, ReplyError> = Err(ReplyError::Refused(Refusal::StaleSession));

#[test]
fn damaged_data_are_sent_again() {
    let mut driver = Driver::open();
    driver.write(1, 1);
    driver.write(2, 1);
    let sent = driver.pump();
    assert_eq!(
        driver.reply(sent[0].tag, Err(ReplyError::Invalid)),
        ["Damaged"]
    );
    let again = driver.reconnect();
    assert_eq!(numbers(&again), numbers(&sent));
    assert_eq!(again[0].body, sent[0].body);
    let events = driver.reply(again[0].tag, Ok(ReplyBody::Done));
    assert_eq!(events, ["1 answered Ok(Done)"]);
    // Nobody waits any more: what does nothing carries no data.
    driver.expire(100);
    let events = driver.reply(sent[1].tag, Err(ReplyError::Invalid));
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn settled_below_stops_at_the_first_without_an_answer() {
    let mut driver = Driver::open();
    (1..=3).for_each(|target| driver.write(target, 1));
    let sent = driver.pump();
    assert_eq!(numbers(&sent), [(2, 2), (3, 2), (4, 2)]);
    driver.reply(sent[1].tag, Ok(ReplyBody::Done));
    driver.write(4, 1);
    assert_eq!(numbers(&driver.pump()), [(5, 2)]);
    driver.reply(sent[0].tag, Ok(ReplyBody::Done));
    driver.write(5, 1);
    assert_eq!(numbers(&driver.pump()), [(6, 4)]);
}

#[test]
fn after_a_disconnect_the_unanswered_are_sent_again_in_order_with_their_numbers() {
    let mut driver = Driver::open();
    (1..=3).for_each(|target| driver.write(target, 2000));
    driver.read(9);
    let first = driver.pump();
    let middle = first.iter().find(|request| request.number.0 == 3).unwrap();
    driver.reply(middle.tag, Ok(ReplyBody::Done));
    driver.write(4, 1);
    let again = driver.reconnect();
    assert_eq!(numbers(&again), [(2, 2), (4, 2), (0, 2), (5, 2)]);
    assert_eq!(again[0].body, first[1].body);
    assert_eq!(again[2].body, first[0].body);
    let events = driver.reply(again[1].tag, Ok(ReplyBody::Done));
    assert_eq!(events, ["3 answered Ok(Done)"]);
    assert!(
        driver.reply(again[1].tag, Ok(ReplyBody::Done)).is_empty(),
        "twice"
    );
}

#[test]
fn opening_is_repeated_with_the_same_nonce() {
    let mut driver = Driver::new();
    driver.write(0, 1);
    let first = driver.pump();
    assert!(driver.pump().is_empty());
    let again = driver.reconnect();
    assert_eq!(first[0].body, again[0].body);
}

#[test]
fn numbers_are_limited_and_the_rest_waits() {
    let mut driver = Driver::open();
    (0..NUMBERED_MAX as u32 + 5).for_each(|target| driver.write(target, 1));
    let sent = driver.pump();
    assert_eq!(sent.len() as u64, NUMBERED_MAX);
    driver.reply(sent[5].tag, Ok(ReplyBody::Done));
    assert!(driver.pump().is_empty(), "the window starts at the oldest");
    driver.reply(sent[0].tag, Ok(ReplyBody::Done));
    assert_eq!(driver.pump().len(), 1);
}

#[test]
fn bytes_are_limited() {
    let mut driver = Driver::open();
    (0..40).for_each(|target| driver.write(target, 1 << 20));
    let sent = driver.pump();
    assert_eq!(sent.len(), UNDER_WAY_BYTES_MAX >> 20);
    driver.reply(sent[3].tag, Ok(ReplyBody::Done));
    assert_eq!(driver.pump().len(), 1);
}

#[test]
fn expired_write_keeps_its_number_and_is_never_done_later() {
    let mut driver = Driver::open();
    driver.write(1, 5000);
    let original = driver.pump();
    assert_eq!(driver.expire(29), (false, vec![]));
    assert_eq!(driver.expire(31), (true, vec!["1 expired".to_owned()]));
    assert_eq!(driver.expire(60), (false, vec![]));
    let again = driver.reconnect();
    assert_eq!(numbers(&again), numbers(&original));
    assert_eq!(again[0].body, nothing());
    assert!(driver.session.is_busy());
    assert!(driver.reply(again[0].tag, Ok(ReplyBody::Done)).is_empty());
    assert!(!driver.session.is_busy());
    driver.write(2, 1);
    assert_eq!(numbers(&driver.pump()), [(3, 3)]);
}

#[test]
fn expired_before_it_was_sent_takes_no_number() {
    let mut driver = Driver::new();
    driver.write(1, 1);
    driver.read(2);
    driver.expire(31);
    assert!(!driver.session.is_busy());
    driver.read(3);
    driver.pump();
    assert_eq!(driver.expire(31), (false, vec!["3 expired".to_owned()]));
    assert!(!driver.session.is_awaiting());
}

#[test]
fn late_answer_to_an_expired_read_reaches_nobody() {
    let mut driver = Driver::open();
    driver.read(1);
    let late = driver.pump()[0].tag;
    driver.expire(31);
    driver.read(2);
    let next = driver.pump()[0].tag;
    assert!(driver.reply(late, Ok(ReplyBody::Done)).is_empty());
    assert_eq!(
        driver.reply(next, Ok(ReplyBody::Done)),
        ["2 answered Ok(Done)"]
    );
}

#[test]
fn stale_session_fences_what_was_under_way_and_what_waited() {
    let mut driver = Driver::open();
    driver.write(1, 1);
    driver.write(2, 1);
    driver.read(3);
    let sent = driver.pump();
    driver.write(4, 1);
    let events = driver.reply(sent[1].tag, STALE);
    assert_eq!(events, ["1 fenced", "2 fenced", "4 fenced", "SessionLost"]);
    assert!(!driver.session.is_open());
    // Late answers to the old session mean nothing to the new one.
    assert!(driver.reply(sent[2].tag, STALE).is_empty());
    driver.write(5, 1);
    let opening = driver.pump();
    assert_eq!(opening[0].tag, TAG_OPEN);
    driver.reply(TAG_OPEN, Ok(ReplyBody::Session(SessionId(8))));
    let sent_anew = driver.pump();
    assert_eq!(numbers(&sent_anew), [(1, 1)]);
    assert_eq!(sent_anew[0].session, SessionId(8));
    assert!(driver.reply(sent[1].tag, Ok(ReplyBody::Done)).is_empty());
    // The read is repeated.
    assert!(driver.reply(sent[0].tag, STALE).is_empty());
    assert_eq!(driver.pump()[0].session, SessionId(8));
    assert!(driver.session.is_open());
}

#[test]
fn keep_alive_finds_a_stale_session() {
    let mut driver = Driver::open();
    driver.session.keep_alive(&mut driver.out);
    driver.session.keep_alive(&mut driver.out);
    let sent = driver.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].body, RequestBody::KeepAlive);
    assert_eq!(driver.reply(TAG_KEEP_ALIVE, STALE), ["SessionLost"]);
    assert!(driver.reply(TAG_KEEP_ALIVE, STALE).is_empty());
}

#[test]
fn refused_session_fails_what_waits() {
    let mut driver = Driver::new();
    driver.write(1, 1);
    driver.pump();
    let events = driver.reply(TAG_OPEN, Err(ReplyError::Refused(Refusal::TooMany)));
    assert_eq!(events, ["1 answered Err(Refused(TooMany))"]);
}

#[test]
fn not_leader_leaves_everything_as_it_is() {
    let mut driver = Driver::open();
    driver.write(1, 1);
    let sent = driver.pump();
    let leader = Some(ServerId(2));
    let events = driver.reply(sent[0].tag, Err(ReplyError::NotLeader { leader }));
    assert_eq!(events, ["NotLeader(Some(ServerId(2)))"]);
    assert_eq!(driver.reconnect().len(), 1);
}

#[test]
fn senseless_tags_are_ignored() {
    let mut driver = Driver::open();
    for tag in [
        0,
        1,
        99,
        PLAIN_BIT,
        PLAIN_BIT | 77,
        TAG_OPEN,
        5 << NUMBER_BITS,
    ] {
        assert!(driver.reply(tag, Ok(ReplyBody::Done)).is_empty());
    }
}
