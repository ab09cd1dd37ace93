//! Constants and byte layouts of the NBD protocol (`doc/proto.md` of NetworkBlockDevice/nbd).
//! Everything is big-endian. Nothing here panics on bytes from outside.

use bytes::{BufMut, BytesMut};

/// First eight bytes of a server: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a server, and the start of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest payload of a request, bytes; "up to 32 MiB SHOULD NOT be treated as an attack".
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest string, bytes ("MUST NOT exceed 4096").
pub const STRING_BYTES_MAX: usize = 4096;
/// Zeroes behind the reply to `NBD_OPT_EXPORT_NAME` for clients without `NO_ZEROES`.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Most descriptors in one `BLOCK_STATUS` chunk ("SHOULD NOT exceed 2^20").
pub const DESCRIPTORS_MAX: usize = 1 << 20;

/// Bits of the handshake flags and, with the same values, of the client flags.
pub mod handshake_flag {
    /// Fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zeroes behind the reply to `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Bits of the transmission flags.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Flag FUA is served.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and flag NO_HOLE are served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Flag DF is served; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// FLUSH and FUA hold for all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Flag FAST_ZERO is served.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Bits of the flags of a request.
pub mod command_flag {
    /// Durable before the reply; valid for every command.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one descriptor.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail at once if it would not be faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Bit of a structured reply's flags: the last chunk.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Types of structured reply chunks.
pub mod chunk_type {
    /// Nothing; the last chunk.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Descriptors.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error with a message.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Status bits of `base:allocation`.
pub mod allocation {
    /// Name of the metadata context.
    pub const CONTEXT: &str = "base:allocation";
    /// The id that this server gives it.
    pub const CONTEXT_ID: u32 = 1;
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What a client can negotiate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OptionCode {
    /// Choose an export, the old way.
    ExportName,
    /// End the session.
    Abort,
    /// Name the exports.
    List,
    /// Upgrade to TLS.
    StartTls,
    /// Describe an export.
    Info,
    /// Choose an export.
    Go,
    /// Use structured replies.
    StructuredReply,
    /// Name metadata contexts.
    ListMetaContext,
    /// Choose metadata contexts.
    SetMetaContext,
    /// Anything else.
    Unknown(u32),
}

impl From<u32> for OptionCode {
    fn from(code: u32) -> OptionCode {
        match code {
            1 => OptionCode::ExportName,
            2 => OptionCode::Abort,
            3 => OptionCode::List,
            5 => OptionCode::StartTls,
            6 => OptionCode::Info,
            7 => OptionCode::Go,
            8 => OptionCode::StructuredReply,
            9 => OptionCode::ListMetaContext,
            10 => OptionCode::SetMetaContext,
            other => OptionCode::Unknown(other),
        }
    }
}

/// Types of replies to options.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum OptionReply {
    /// Done.
    Ack = 1,
    /// One export of a list.
    Server = 2,
    /// One fact about an export.
    Info = 3,
    /// One metadata context.
    MetaContext = 4,
    /// The option is not known.
    ErrUnsupported = (1 << 31) + 1,
    /// The option is forbidden here.
    ErrPolicy = (1 << 31) + 2,
    /// The option's data make no sense.
    ErrInvalid = (1 << 31) + 3,
    /// There is no such export.
    ErrUnknown = (1 << 31) + 6,
    /// No service at the moment.
    ErrShutdown = (1 << 31) + 7,
    /// The option is too long.
    ErrTooBig = (1 << 31) + 9,
}

/// Kinds of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What a client can request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// Read.
    Read,
    /// Write; the payload follows.
    Write,
    /// Finish what is in flight and close.
    Disconnect,
    /// Make answered writes durable.
    Flush,
    /// The content is no longer needed.
    Trim,
    /// The range will be used soon.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Which parts are allocated.
    BlockStatus,
    /// Anything else.
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(code: u16) -> Command {
        match code {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }
}

/// Why bytes could not be understood; there is no way to go on in the stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WireError {
    /// Wrong magic of an option.
    #[error("option starts with {0:#018x}")]
    OptionMagic(u64),
    /// Wrong magic of a request.
    #[error("request starts with {0:#010x}")]
    RequestMagic(u32),
}

/// Client flags, the client's first message.
///
/// | 0-3 | flags |
pub const CLIENT_FLAGS_BYTES: usize = 4;

/// Header of an option.
///
/// |   0-7 | [`OPTION_MAGIC`]         |
/// |  8-11 | option                   |
/// | 12-15 | length of what follows   |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OptionHeader {
    /// Which.
    pub code: u32,
    /// Bytes of data behind the header.
    pub length_bytes: u32,
}

impl OptionHeader {
    /// Length of the header, bytes.
    pub const BYTES: usize = 16;

    /// Decodes a header.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<OptionHeader, WireError> {
        let mut fields = Fields(bytes);
        let magic = fields.u64().unwrap_or(0);
        if magic != OPTION_MAGIC {
            return Err(WireError::OptionMagic(magic));
        }
        Ok(OptionHeader {
            code: fields.u32().unwrap_or(0),
            length_bytes: fields.u32().unwrap_or(0),
        })
    }
}

/// A request of the transmission phase.
///
/// |   0-3 | [`REQUEST_MAGIC`] |
/// |   4-5 | flags             |
/// |   6-7 | command           |
/// |  8-15 | cookie            |
/// | 16-23 | offset, bytes     |
/// | 24-27 | length, bytes     |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    /// Bits of [`command_flag`].
    pub flags: u16,
    /// What.
    pub command: Command,
    /// Chosen by the client; the reply carries it.
    pub cookie: u64,
    /// From.
    pub offset_bytes: u64,
    /// How much.
    pub length_bytes: u32,
}

impl Request {
    /// Length of a request without payload, bytes.
    pub const BYTES: usize = 28;

    /// Decodes a request.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Request, WireError> {
        let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let be32 = |at: usize| (u32::from(be16(at)) << 16) | u32::from(be16(at + 2));
        let be64 = |at: usize| (u64::from(be32(at)) << 32) | u64::from(be32(at + 4));
        if be32(0) != REQUEST_MAGIC {
            return Err(WireError::RequestMagic(be32(0)));
        }
        Ok(Request {
            flags: be16(4),
            command: Command::from(be16(6)),
            cookie: be64(8),
            offset_bytes: be64(16),
            length_bytes: be32(24),
        })
    }
}

/// Reads fields from the front; `None` when the bytes end too early.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `length` bytes.
    pub fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    /// A string behind its 32-bit length.
    pub fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        text(self.take(length)?)
    }

    /// Whether all has been read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The string in `bytes`: UTF-8, without NUL, at most [`STRING_BYTES_MAX`] ("Values", strings).
pub fn text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// The server's first message.
///
/// |   0-7 | [`GREETING_MAGIC`] |
/// |  8-15 | [`OPTION_MAGIC`]   |
/// | 16-17 | handshake flags    |
pub fn encode_greeting(into: &mut BytesMut) {
    into.put_u64(GREETING_MAGIC);
    into.put_u64(OPTION_MAGIC);
    into.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
}

/// A reply to an option; the data are the concatenation of `data`.
///
/// |   0-7 | [`OPTION_REPLY_MAGIC`] |
/// |  8-11 | option                 |
/// | 12-15 | reply type             |
/// | 16-19 | length of the data     |
/// |   20- | data                   |
pub fn encode_option_reply(into: &mut BytesMut, option: u32, reply: OptionReply, data: &[&[u8]]) {
    into.put_u64(OPTION_REPLY_MAGIC);
    into.put_u32(option);
    into.put_u32(reply as u32);
    let length: usize = data.iter().map(|part| part.len()).sum();
    into.put_u32(u32::try_from(length).expect("replies are made of strings of bounded length"));
    for part in data {
        into.put_slice(part);
    }
}

/// A simple reply without its data.
///
/// |  0-3 | [`SIMPLE_REPLY_MAGIC`] |
/// |  4-7 | error                  |
/// | 8-15 | cookie                 |
pub fn simple_reply(error: u32, cookie: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Header of a chunk of a structured reply.
///
/// |   0-3 | [`STRUCTURED_REPLY_MAGIC`] |
/// |   4-5 | flags                      |
/// |   6-7 | type                       |
/// |  8-15 | cookie                     |
/// | 16-19 | length of what follows     |
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_bytes() {
        let mut bytes = BytesMut::new();
        encode_greeting(&mut bytes);
        assert_eq!(&bytes[..], b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn request_bytes() {
        let bytes = b"\x25\x60\x95\x13\x00\x01\x00\x01COOKIE42\0\0\0\0\0\0\x10\0\0\0\x02\0";
        let request = Request::decode(bytes).unwrap();
        assert_eq!(
            request,
            Request {
                flags: command_flag::FUA,
                command: Command::Write,
                cookie: u64::from_be_bytes(*b"COOKIE42"),
                offset_bytes: 4096,
                length_bytes: 512,
            }
        );
    }

    #[test]
    fn request_with_wrong_magic() {
        assert_eq!(
            Request::decode(&[0x11; 28]),
            Err(WireError::RequestMagic(0x1111_1111))
        );
    }

    #[test]
    fn option_header_bytes() {
        let header = OptionHeader::decode(b"IHAVEOPT\0\0\0\x07\0\0\0\x06").unwrap();
        assert_eq!((header.code, header.length_bytes), (7, 6));
        assert_eq!(
            OptionHeader::decode(b"IHAVEOPS\0\0\0\x07\0\0\0\x06"),
            Err(WireError::OptionMagic(0x4948_4156_454f_5053))
        );
    }

    #[test]
    fn option_reply_bytes() {
        let mut bytes = BytesMut::new();
        encode_option_reply(&mut bytes, 3, OptionReply::Server, &[b"\0\0\0\x01", b"a"]);
        assert_eq!(
            &bytes[..],
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x03\0\0\0\x02\0\0\0\x05\0\0\0\x01a"
        );
    }

    #[test]
    fn strings_follow_the_rules() {
        assert_eq!(text(b"vol001"), Some("vol001"));
        assert_eq!(text(b""), Some(""));
        assert_eq!(text(b"a\0b"), None);
        assert_eq!(text(b"\xff"), None);
        assert_eq!(text(&[b'x'; 4097]), None);
    }
}
