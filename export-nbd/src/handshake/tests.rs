//! Literal bytes in, literal bytes out. Quotations are from proto.md.

use proptest::prelude::*;

use super::*;
use crate::memory::MemoryDevice;

const CLIENT_FLAGS: &[u8] = b"\0\0\0\x03";
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";

/// Leads a handshake of a client that sees exports `vol` (8 MiB) and `ro`.
struct Driver {
    handshake: Handshake,
    input: BytesMut,
    sent: Vec<u8>,
    opens: Vec<String>,
    start: Option<Start>,
    close: Option<Refusal>,
    failing: bool,
}

impl Driver {
    fn new() -> Driver {
        Driver {
            handshake: Handshake::new(),
            input: BytesMut::new(),
            sent: Vec::new(),
            opens: Vec::new(),
            start: None,
            close: None,
            failing: false,
        }
    }

    /// A driver past greeting and client flags.
    fn greeted() -> Driver {
        let mut driver = Driver::new();
        driver.feed(CLIENT_FLAGS);
        assert_eq!(driver.take_sent(), GREETING);
        driver
    }

    fn feed(&mut self, bytes: &[u8]) -> &mut Driver {
        self.input.extend_from_slice(bytes);
        loop {
            while let Some(output) = self.handshake.poll_output() {
                self.answer(output);
            }
            if !self.handshake.handle_bytes(&mut self.input) {
                return self;
            }
        }
    }

    fn answer(&mut self, output: Output) {
        match output {
            Output::Send(bytes) => self.sent.extend_from_slice(&bytes),
            Output::List if self.failing => {
                self.handshake.handle_list(Err(DeviceError::Unavailable));
            }
            Output::List => self.handshake.handle_list(Ok(vec![
                Listed {
                    name: "vol".into(),
                    description: "a disk".into(),
                },
                Listed {
                    name: "ro".into(),
                    description: String::new(),
                },
            ])),
            Output::Open(name) => {
                let device = match name.as_str() {
                    "" | "vol" => Some(MemoryDevice::new("vol", 8 << 20).described("a disk")),
                    "ro" => Some(MemoryDevice::new("ro", 4096).read_only()),
                    _ => None,
                };
                self.opens.push(name);
                let export = device.map(|device| Export::new(Arc::new(device), false));
                self.handshake.handle_open(match self.failing {
                    true => Err(DeviceError::Unavailable),
                    false => Ok(export),
                });
            }
            Output::Start(start) => self.start = Some(start),
            Output::Close(why) => self.close = Some(why),
        }
    }

    fn take_sent(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sent)
    }

    /// Sends an option and gives the replies.
    fn option(&mut self, code: u32, data: &[u8]) -> Vec<u8> {
        self.feed(&option(code, data));
        self.take_sent()
    }
}

fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u32;
    [
        b"IHAVEOPT",
        &code.to_be_bytes()[..],
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn reply(code: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";
    let length = data.len() as u32;
    let (code, kind) = (code.to_be_bytes(), kind.to_be_bytes());
    [&magic[..], &code, &kind, &length.to_be_bytes(), data].concat()
}

/// Type of the only reply in `bytes`.
fn only_reply(bytes: &[u8]) -> u32 {
    let mut fields = Fields(bytes);
    assert_eq!(fields.u64(), Some(0x0003_e889_0455_65a9));
    fields.u32().unwrap();
    let kind = fields.u32().unwrap();
    let length = fields.u32().unwrap();
    assert_eq!(fields.0.len(), length as usize, "one reply");
    kind
}

const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_SHUTDOWN: u32 = 0x8000_0007;
const ERR_TOO_BIG: u32 = 0x8000_0009;

/// Data of INFO and GO.
fn info_data(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(requests.len() as u16).to_be_bytes());
    data.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

#[test]
fn unknown_client_flag_drops_the_connection() {
    // "the server MUST drop the TCP connection if the client sets an unknown flag".
    let mut driver = Driver::new();
    driver.feed(b"\0\0\0\x07");
    assert_eq!(driver.close, Some(Refusal::ClientFlags(7)));
    assert_eq!(driver.sent, GREETING);
}

#[test]
fn export_name_with_and_without_zeroes() {
    // "If set, the server MUST NOT send the 124 bytes of zero".
    let start = b"\0\0\0\0\0\x80\0\0\x0d\x6d";
    let mut driver = Driver::greeted();
    assert_eq!(driver.option(1, b"vol"), start);
    assert!(driver.start.is_some());

    let mut driver = Driver::new();
    driver.feed(b"\0\0\0\x01");
    driver.take_sent();
    assert_eq!(driver.option(1, b"vol"), [&start[..], &[0; 124]].concat());
}

#[test]
fn export_name_of_no_export_closes() {
    // "If the chosen export does not exist [...] the server MUST terminate the session."
    let mut driver = Driver::greeted();
    assert!(driver.option(1, b"other").is_empty());
    assert_eq!(driver.close, Some(Refusal::UnknownExport));
}

#[test]
fn empty_name_is_the_default_export() {
    let mut driver = Driver::greeted();
    driver.option(7, &info_data("", &[]));
    assert_eq!(driver.start.as_ref().unwrap().export.name, "vol");
}

#[test]
fn abort_is_answered() {
    // "The server MUST reply with NBD_REP_ACK"; "a server SHOULD ignore any data sent".
    let mut driver = Driver::greeted();
    assert_eq!(driver.option(2, b"data"), reply(2, 1, b""));
    assert_eq!(driver.close, Some(Refusal::Aborted));
}

#[test]
fn unknown_option_is_refused_and_the_next_one_served() {
    let mut driver = Driver::greeted();
    assert_eq!(only_reply(&driver.option(77, b"some data")), ERR_UNSUP);
    // STARTTLS and EXTENDED_HEADERS are not served.
    assert_eq!(only_reply(&driver.option(5, b"")), ERR_UNSUP);
    assert_eq!(only_reply(&driver.option(11, b"")), ERR_UNSUP);
    assert_eq!(driver.option(8, b""), reply(8, 1, b""));
}

#[test]
fn list_names_all_exports() {
    let mut driver = Driver::greeted();
    let expected = [
        reply(3, 2, b"\0\0\0\x03vola disk"),
        reply(3, 2, b"\0\0\0\x02ro"),
        reply(3, 1, b""),
    ];
    assert_eq!(driver.option(3, b""), expected.concat());
}

#[test]
fn list_with_data_is_invalid() {
    // "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID".
    let mut driver = Driver::greeted();
    assert_eq!(only_reply(&driver.option(3, b"x")), ERR_INVALID);
    assert_eq!(only_reply(&driver.option(8, b"x")), ERR_INVALID);
}

#[test]
fn cell_without_leader_is_told_apart_from_no_export() {
    let mut driver = Driver::greeted();
    driver.failing = true;
    assert_eq!(only_reply(&driver.option(3, b"")), ERR_SHUTDOWN);
    assert_eq!(
        only_reply(&driver.option(7, &info_data("vol", &[]))),
        ERR_SHUTDOWN
    );
    driver.failing = false;
    assert_eq!(
        only_reply(&driver.option(7, &info_data("other", &[]))),
        ERR_UNKNOWN
    );
}

#[test]
fn info_then_go_give_the_same_answers_without_zeroes() {
    let mut driver = Driver::new();
    driver.feed(b"\0\0\0\x01");
    driver.take_sent();
    // 99 is unknown: "The server MUST ignore any information requests it does not understand."
    let data = info_data("vol", &[1, 2, 3, 99]);
    let expected = |code| {
        [
            reply(code, 3, b"\0\0\0\0\0\0\0\x80\0\0\x0d\x6d"),
            reply(code, 3, b"\0\x01vol"),
            reply(code, 3, b"\0\x02a disk"),
            reply(code, 3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"),
            reply(code, 1, b""),
        ]
        .concat()
    };
    assert_eq!(driver.option(6, &data), expected(6));
    assert!(driver.start.is_none());
    // "The server MUST NOT send any zero padding bytes after the NBD_REP_ACK data".
    assert_eq!(driver.option(7, &data), expected(7));
    assert!(driver.start.is_some());
    assert_eq!(driver.opens, ["vol"], "one question to the cell");
}

#[test]
fn info_replies_only_with_what_was_asked() {
    let mut driver = Driver::greeted();
    let sent = driver.option(6, &info_data("ro", &[2]));
    let export = b"\0\0\0\0\0\0\0\0\x10\0\x05\x0f";
    assert_eq!(sent, [reply(6, 3, export), reply(6, 1, b"")].concat());
}

#[test]
fn malformed_info_is_invalid() {
    let mut driver = Driver::greeted();
    let good = info_data("vol", &[1]);
    for cut in 0..good.len() {
        assert_eq!(
            only_reply(&driver.option(6, &good[..cut])),
            ERR_INVALID,
            "cut at {cut}"
        );
    }
    let long = [&good[..], b"x"].concat();
    assert_eq!(only_reply(&driver.option(7, &long)), ERR_INVALID);
    assert_eq!(
        only_reply(&driver.option(7, b"\xff\xff\xff\xffvol\0\0")),
        ERR_INVALID
    );
    assert_eq!(
        only_reply(&driver.option(7, b"\0\0\0\x01\0\0\0")),
        ERR_INVALID,
        "NUL"
    );
    let name = "x".repeat(4097);
    assert_eq!(
        only_reply(&driver.option(7, &info_data(&name, &[]))),
        ERR_INVALID
    );
    assert_eq!(
        only_reply(&driver.option(7, &info_data(&name[1..], &[]))),
        ERR_UNKNOWN
    );
}

#[test]
fn structured_replies_are_remembered() {
    let mut driver = Driver::greeted();
    driver.option(8, b"");
    driver.option(7, &info_data("vol", &[]));
    let start = driver.start.unwrap();
    assert!(start.structured_replies && !start.allocation_context);
}

#[test]
fn meta_context_needs_structured_replies() {
    let mut driver = Driver::greeted();
    let data = meta_data("vol", &["base:allocation"]);
    assert_eq!(only_reply(&driver.option(9, &data)), ERR_INVALID);
    assert_eq!(only_reply(&driver.option(10, &data)), ERR_INVALID);
}

#[test]
fn meta_context_queries() {
    let mut driver = Driver::greeted();
    driver.option(8, b"");
    let mut ask = |code, queries: &[&str]| driver.option(code, &meta_data("vol", queries));
    let listed = [reply(9, 4, b"\0\0\0\0base:allocation"), reply(9, 1, b"")].concat();
    let selected = [
        reply(10, 4, b"\0\0\0\x01base:allocation"),
        reply(10, 1, b""),
    ]
    .concat();
    let none = |code| reply(code, 1, b"");
    // "If zero queries are sent, then the server MUST return all the metadata contexts".
    assert_eq!(ask(9, &[]), listed);
    assert_eq!(ask(9, &["base:"]), listed);
    assert_eq!(ask(9, &["qemu:dirty-bitmap:x", "base:allocation"]), listed);
    assert_eq!(ask(9, &["base:other", "x-y:"]), none(9));
    // "If zero queries are sent, the server MUST select no metadata contexts."
    assert_eq!(ask(10, &[]), none(10));
    assert_eq!(ask(10, &["base:"]), none(10), "a wildcard selects nothing");
    assert_eq!(ask(10, &["base:allocation", "base:allocation"]), selected);
}

#[test]
fn malformed_meta_context_is_invalid() {
    let mut driver = Driver::greeted();
    driver.option(8, b"");
    let good = meta_data("vol", &["base:allocation"]);
    for cut in 0..good.len() {
        assert_eq!(
            only_reply(&driver.option(10, &good[..cut])),
            ERR_INVALID,
            "cut at {cut}"
        );
    }
    let many = [&meta_data("vol", &[])[..7], b"\xff\xff\xff\xff"].concat();
    assert_eq!(only_reply(&driver.option(10, &many)), ERR_INVALID);
    assert_eq!(
        only_reply(&driver.option(10, &meta_data("other", &[]))),
        ERR_UNKNOWN
    );
}

#[test]
fn allocation_context_holds_for_the_export_it_was_set_for() {
    // "referred to the same export name that was ultimately selected for transmission phase".
    let go = |options: &[(u32, Vec<u8>)]| {
        let mut driver = Driver::greeted();
        driver.option(8, b"");
        for (code, data) in options {
            driver.option(*code, data);
        }
        driver.option(7, &info_data("vol", &[]));
        driver.start.unwrap().allocation_context
    };
    let set = |name, queries: &[&str]| (10, meta_data(name, queries));
    let context = &["base:allocation"];
    assert!(go(&[set("vol", context)]));
    assert!(!go(&[set("ro", context)]));
    assert!(!go(&[set("vol", &[])]));
    assert!(
        !go(&[(9, meta_data("vol", context))]),
        "LIST selects nothing"
    );
    // "Issuing this command replaces all previously-set metadata contexts (including when this
    // command fails)".
    assert!(!go(&[set("vol", context), set("vol", &[])]));
    assert!(!go(&[set("vol", context), (10, b"bad".to_vec())]));
    assert!(!go(&[set("vol", context), set("other", context)]));
}

#[test]
fn long_option_is_skipped_and_the_next_one_served() {
    let mut driver = Driver::greeted();
    let long = vec![0; OPTION_BYTES_MAX as usize + 1];
    assert_eq!(only_reply(&driver.option(7, &long)), ERR_TOO_BIG);
    assert_eq!(only_reply(&driver.option(99, &long)), ERR_UNSUP);
    assert_eq!(driver.option(8, b""), reply(8, 1, b""));
}

#[test]
fn absurd_option_closes() {
    let mut driver = Driver::greeted();
    driver.feed(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff");
    assert_eq!(driver.close, Some(Refusal::OptionLength(u32::MAX)));
}

#[test]
fn nonsense_instead_of_an_option_closes() {
    let mut driver = Driver::greeted();
    driver.feed(b"GET / HTTP/1.1\r\n\r\n");
    assert!(matches!(
        driver.close,
        Some(Refusal::Wire(WireError::OptionMagic(_)))
    ));
}

#[test]
fn options_without_end_close() {
    let mut driver = Driver::greeted();
    for _ in 0..OPTIONS_MAX {
        driver.option(99, b"");
    }
    assert_eq!(driver.close, None);
    driver.option(99, b"");
    assert_eq!(driver.close, Some(Refusal::TooManyOptions));
}

#[test]
fn bytes_behind_go_belong_to_the_transmission() {
    let mut driver = Driver::greeted();
    let mut bytes = option(7, &info_data("vol", &[]));
    bytes.extend_from_slice(b"first request");
    driver.feed(&bytes);
    assert!(driver.start.is_some());
    assert_eq!(&driver.input[..], b"first request");
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(info_data("vol", &[1, 3])),
        Just(info_data("other", &[])),
        Just(meta_data("vol", &["base:allocation"])),
        Just(Vec::new()),
    ];
    prop_oneof![
        8 => (0_u32..14, data).prop_map(|(code, data)| option(code, &data)),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    /// Whatever a client sends, the cuts of the stream change nothing.
    #[test]
    fn cuts_change_nothing(
        flags in prop_oneof![9 => Just(3_u32), 1 => any::<u32>()],
        options in prop::collection::vec(any_option(), 0..8),
        cuts in prop::collection::vec(1_usize..60, 1..40),
    ) {
        let bytes = [&flags.to_be_bytes()[..], &options.concat()].concat();
        let mut whole = Driver::new();
        whole.feed(&bytes);
        let mut pieces = Driver::new();
        pieces.feed(b"");
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (piece, behind) = rest.split_at((*cut).min(rest.len()));
            pieces.feed(piece);
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(&whole.sent, &pieces.sent);
        prop_assert_eq!(whole.close, pieces.close);
        prop_assert_eq!(whole.start.is_some(), pieces.start.is_some());
        prop_assert_eq!(whole.input, pieces.input);
    }
}
