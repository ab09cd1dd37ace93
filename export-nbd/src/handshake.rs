//! The handshake phase: fixed newstyle negotiation, from the greeting to the chosen export.
//!
//! Without IO: bytes and answers about exports go in, replies and questions come out.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pss_core::volume::device::DeviceError;

use crate::export::{Export, Listed};
use crate::wire::{
    CLIENT_FLAGS_BYTES, EXPORT_NAME_ZEROES, Fields, OptionCode, OptionHeader, OptionReply,
    PAYLOAD_BYTES_MAX, WireError, allocation, encode_greeting, encode_option_reply, handshake_flag,
    info, text,
};

/// Longest data of an option that are looked at: 16 strings of the greatest length. Longer ones are
/// refused and skipped.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest option that is skipped rather than answered by closing.
const SKIPPED_BYTES_MAX: u32 = 32 << 20;
/// Most options of one connection. Real clients send fewer than ten.
const OPTIONS_MAX: u32 = 128;

/// What the handshake asks of the outside.
#[derive(Debug)]
pub enum Output {
    /// Send these bytes.
    Send(Bytes),
    /// Say which exports there are: [`Handshake::handle_list`].
    List,
    /// Open the export of this name: [`Handshake::handle_open`].
    Open(String),
    /// The transmission phase begins; bytes that are left belong to it.
    Start(Start),
    /// Close the connection, after what was sent.
    Close(Refusal),
}

/// What was negotiated.
#[derive(Clone, Debug)]
pub struct Start {
    /// The chosen export.
    pub export: Arc<Export>,
    /// READ is answered by structured replies.
    pub structured_replies: bool,
    /// BLOCK_STATUS is served, with `base:allocation`.
    pub allocation_context: bool,
}

/// Why a handshake ended without a chosen export.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// As the client wished.
    #[error("client ended the negotiation")]
    Aborted,
    /// The client flags have bits that do not exist.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// Not NBD.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// `NBD_OPT_EXPORT_NAME` cannot be refused otherwise.
    #[error("no such export")]
    UnknownExport,
    /// An option that nobody sends.
    #[error("option of {0} bytes")]
    OptionLength(u32),
    /// More than [`OPTIONS_MAX`] options.
    #[error("too many options")]
    TooManyOptions,
}

/// The server's side of one handshake.
pub struct Handshake {
    state: State,
    options_left: u32,
    no_zeroes: bool,
    structured_replies: bool,
    /// The export for which `base:allocation` was selected, as the client named it.
    allocation_context_of: Option<String>,
    /// The export opened last. INFO and the GO after it get the same answers, and one question to the
    /// cell serves META_CONTEXT, INFO and GO.
    opened: Option<(String, Arc<Export>)>,
    outputs: VecDeque<Output>,
}

enum State {
    ClientFlags,
    Option,
    Skip {
        left: u32,
        then: BytesMut,
    },
    Listing,
    Opening {
        option: u32,
        name: String,
        purpose: Purpose,
    },
    Ended,
}

/// Why an export is opened.
enum Purpose {
    ExportName,
    Info { requests: Vec<u16>, go: bool },
    MetaContext { queries: Vec<String>, select: bool },
}

impl Default for Handshake {
    fn default() -> Handshake {
        Handshake::new()
    }
}

impl Handshake {
    /// A handshake with the greeting to be sent.
    pub fn new() -> Handshake {
        let mut greeting = BytesMut::new();
        encode_greeting(&mut greeting);
        Handshake {
            state: State::ClientFlags,
            options_left: OPTIONS_MAX,
            no_zeroes: false,
            structured_replies: false,
            allocation_context_of: None,
            opened: None,
            outputs: VecDeque::from([Output::Send(greeting.freeze())]),
        }
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Takes what it can use from the front of `input`, at most one option, so that replies can be
    /// sent before more options are read. Returns whether it took anything.
    pub fn handle_bytes(&mut self, input: &mut BytesMut) -> bool {
        match &mut self.state {
            State::ClientFlags => self.take_client_flags(input),
            State::Option => self.take_option(input),
            State::Skip { left, then } => {
                let taken = input.len().min(*left as usize);
                input.advance(taken);
                *left -= taken as u32;
                if *left == 0 {
                    let reply = then.split().freeze();
                    self.state = State::Option;
                    self.outputs.push_back(Output::Send(reply));
                }
                taken > 0
            }
            State::Listing | State::Opening { .. } | State::Ended => false,
        }
    }

    fn take_client_flags(&mut self, input: &mut BytesMut) -> bool {
        let Some(flags) = Fields(input).u32() else {
            return false;
        };
        input.advance(CLIENT_FLAGS_BYTES);
        let fixed = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        // "the server MUST drop the TCP connection if the client sets an unknown flag".
        if flags & !(fixed | no_zeroes) != 0 {
            self.close(Refusal::ClientFlags(flags));
            return true;
        }
        // Clients without FIXED_NEWSTYLE exist that send more than EXPORT_NAME; they are served.
        self.no_zeroes = flags & no_zeroes != 0;
        self.state = State::Option;
        true
    }

    fn take_option(&mut self, input: &mut BytesMut) -> bool {
        let Some(header) = input.first_chunk() else {
            return false;
        };
        let header = match OptionHeader::decode(header) {
            Ok(header) => header,
            Err(error) => {
                self.close(error.into());
                return true;
            }
        };
        let length = header.length_bytes;
        if length > OPTION_BYTES_MAX {
            input.advance(OptionHeader::BYTES);
            self.refuse_long(header);
            return true;
        }
        let whole = OptionHeader::BYTES + length as usize;
        if input.len() < whole {
            return false;
        }
        let option = input.split_to(whole).freeze();
        match self.options_left.checked_sub(1) {
            Some(left) => self.options_left = left,
            None => {
                self.close(Refusal::TooManyOptions);
                return true;
            }
        }
        self.handle_option(header.code, &option[OptionHeader::BYTES..]);
        true
    }

    fn refuse_long(&mut self, header: OptionHeader) {
        let length = header.length_bytes;
        if length > SKIPPED_BYTES_MAX || header.code == 1 || self.options_left == 0 {
            return self.close(Refusal::OptionLength(length));
        }
        self.options_left -= 1;
        let (reply, message) = match OptionCode::from(header.code) {
            OptionCode::Unknown(_) | OptionCode::StartTls => {
                (OptionReply::ErrUnsupported, "unknown option")
            }
            _ => (OptionReply::ErrTooBig, "option is too long"),
        };
        let mut then = BytesMut::new();
        encode_option_reply(&mut then, header.code, reply, &[message.as_bytes()]);
        self.state = State::Skip { left: length, then };
    }

    fn handle_option(&mut self, code: u32, data: &[u8]) {
        match OptionCode::from(code) {
            OptionCode::ExportName => match text(data) {
                Some(name) => self.open(code, name, Purpose::ExportName),
                None => self.close(Refusal::UnknownExport),
            },
            OptionCode::Abort => {
                self.reply(code, OptionReply::Ack, b"");
                self.close(Refusal::Aborted);
            }
            // "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID".
            OptionCode::List | OptionCode::StructuredReply if !data.is_empty() => {
                self.refuse(code, OptionReply::ErrInvalid, "this option has no data");
            }
            OptionCode::List => {
                self.state = State::Listing;
                self.outputs.push_back(Output::List);
            }
            OptionCode::StructuredReply => {
                self.structured_replies = true;
                self.reply(code, OptionReply::Ack, b"");
            }
            OptionCode::Info | OptionCode::Go => {
                let go = OptionCode::from(code) == OptionCode::Go;
                match decode_info(data) {
                    Some((name, requests)) => {
                        self.open(code, name, Purpose::Info { requests, go });
                    }
                    None => self.refuse(code, OptionReply::ErrInvalid, "malformed option"),
                }
            }
            OptionCode::ListMetaContext => self.handle_meta_context(code, data, false),
            OptionCode::SetMetaContext => self.handle_meta_context(code, data, true),
            OptionCode::StartTls | OptionCode::Unknown(_) => {
                self.refuse(code, OptionReply::ErrUnsupported, "unknown option");
            }
        }
    }

    fn handle_meta_context(&mut self, code: u32, data: &[u8], select: bool) {
        if select {
            // "replaces all previously-set metadata contexts (including when this command fails)".
            self.allocation_context_of = None;
        }
        if !self.structured_replies {
            return self.refuse(
                code,
                OptionReply::ErrInvalid,
                "structured replies come first",
            );
        }
        match decode_meta_context(data) {
            Some((name, queries)) => {
                self.open(code, name, Purpose::MetaContext { queries, select });
            }
            None => self.refuse(code, OptionReply::ErrInvalid, "malformed option"),
        }
    }

    /// Answers [`Output::List`].
    pub fn handle_list(&mut self, listed: Result<Vec<Listed>, DeviceError>) {
        if !matches!(self.state, State::Listing) {
            return;
        }
        self.state = State::Option;
        let code = 3;
        match listed {
            Ok(exports) => {
                let mut replies = BytesMut::new();
                for export in exports {
                    let name = export.name.as_bytes();
                    let length = (name.len() as u32).to_be_bytes();
                    let data = [&length, name, export.description.as_bytes()];
                    encode_option_reply(&mut replies, code, OptionReply::Server, &data);
                }
                encode_option_reply(&mut replies, code, OptionReply::Ack, &[]);
                self.outputs.push_back(Output::Send(replies.freeze()));
            }
            Err(error) => self.refuse(code, OptionReply::ErrShutdown, &error.to_string()),
        }
    }

    fn open(&mut self, option: u32, name: &str, purpose: Purpose) {
        self.state = State::Opening {
            option,
            name: name.to_owned(),
            purpose,
        };
        match &self.opened {
            Some((opened, export)) if opened == name => {
                let export = Arc::clone(export);
                self.continue_with(Ok(Some(export)));
            }
            _ => {
                // Given back first: the new export may be the same one under another name.
                self.opened = None;
                self.outputs.push_back(Output::Open(name.to_owned()));
            }
        }
    }

    /// Answers [`Output::Open`].
    pub fn handle_open(&mut self, opened: Result<Option<Export>, DeviceError>) {
        self.continue_with(opened.map(|export| export.map(Arc::new)));
    }

    fn continue_with(&mut self, opened: Result<Option<Arc<Export>>, DeviceError>) {
        let state = std::mem::replace(&mut self.state, State::Option);
        let State::Opening {
            option,
            name,
            purpose,
        } = state
        else {
            self.state = state;
            return;
        };
        let by_name = matches!(purpose, Purpose::ExportName);
        let export = match opened {
            Ok(Some(export)) => export,
            Ok(None) | Err(_) if by_name => return self.close(Refusal::UnknownExport),
            Ok(None) => return self.refuse(option, OptionReply::ErrUnknown, "no such export"),
            Err(error) => return self.refuse(option, OptionReply::ErrShutdown, &error.to_string()),
        };
        self.opened = Some((name.clone(), Arc::clone(&export)));
        match purpose {
            Purpose::ExportName => self.start_by_name(&name, export),
            Purpose::Info { requests, go } => {
                self.describe(option, &requests, &export);
                if go {
                    self.start(&name, export);
                }
            }
            Purpose::MetaContext { queries, select } => {
                self.answer_meta_context(option, name, &queries, select);
            }
        }
    }

    /// Reply to `NBD_OPT_EXPORT_NAME`.
    ///
    /// |  0-7  | size, bytes                              |
    /// |  8-9  | transmission flags                       |
    /// | 10-   | 124 zeroes, unless NO_ZEROES was agreed  |
    fn start_by_name(&mut self, name: &str, export: Arc<Export>) {
        let mut reply = BytesMut::new();
        reply.put_u64(export.size_bytes);
        reply.put_u16(export.transmission_flags(self.structured_replies));
        if !self.no_zeroes {
            reply.put_bytes(0, EXPORT_NAME_ZEROES);
        }
        self.outputs.push_back(Output::Send(reply.freeze()));
        self.start(name, export);
    }

    fn start(&mut self, name: &str, export: Arc<Export>) {
        self.state = State::Ended;
        // "it referred to the same export name that was ultimately selected".
        let allocation_context = self.allocation_context_of.as_deref() == Some(name);
        self.outputs.push_back(Output::Start(Start {
            export,
            structured_replies: self.structured_replies,
            allocation_context,
        }));
    }

    fn describe(&mut self, option: u32, requests: &[u16], export: &Export) {
        let mut replies = BytesMut::new();
        let mut put = |kind: u16, data: &[&[u8]]| {
            let mut parts = vec![];
            let kind = kind.to_be_bytes();
            parts.push(&kind[..]);
            parts.extend_from_slice(data);
            encode_option_reply(&mut replies, option, OptionReply::Info, &parts);
        };
        let flags = export.transmission_flags(self.structured_replies);
        let size = export.size_bytes.to_be_bytes();
        put(info::EXPORT, &[&size, &flags.to_be_bytes()]);
        if requests.contains(&info::NAME) {
            put(info::NAME, &[export.name.as_bytes()]);
        }
        if requests.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            put(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        if requests.contains(&info::BLOCK_SIZE) {
            let sizes = [
                export.minimum_block_bytes.to_be_bytes(),
                export.preferred_block_bytes.to_be_bytes(),
                PAYLOAD_BYTES_MAX.to_be_bytes(),
            ];
            put(info::BLOCK_SIZE, &[sizes.as_flattened()]);
        }
        encode_option_reply(&mut replies, option, OptionReply::Ack, &[]);
        self.outputs.push_back(Output::Send(replies.freeze()));
    }

    fn answer_meta_context(&mut self, option: u32, name: String, queries: &[String], set: bool) {
        // `base:` is a wildcard in LIST and selects nothing in SET; no query lists everything and
        // selects nothing.
        let found = match set {
            true => queries.iter().any(|query| query == allocation::CONTEXT),
            false => {
                queries.is_empty()
                    || queries
                        .iter()
                        .any(|query| query == "base:" || query == allocation::CONTEXT)
            }
        };
        let mut replies = BytesMut::new();
        if found {
            let id = if set { allocation::CONTEXT_ID } else { 0 };
            let data = [&id.to_be_bytes(), allocation::CONTEXT.as_bytes()];
            encode_option_reply(&mut replies, option, OptionReply::MetaContext, &data);
        }
        encode_option_reply(&mut replies, option, OptionReply::Ack, &[]);
        self.outputs.push_back(Output::Send(replies.freeze()));
        if set && found {
            self.allocation_context_of = Some(name);
        }
    }

    fn reply(&mut self, option: u32, reply: OptionReply, data: &[u8]) {
        let mut bytes = BytesMut::new();
        encode_option_reply(&mut bytes, option, reply, &[data]);
        self.outputs.push_back(Output::Send(bytes.freeze()));
    }

    fn refuse(&mut self, option: u32, reply: OptionReply, message: &str) {
        self.reply(option, reply, message.as_bytes());
    }

    fn close(&mut self, why: Refusal) {
        self.state = State::Ended;
        self.outputs.push_back(Output::Close(why));
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
///
/// | 0-3   | length of the name    |
/// | 4-    | name                  |
/// | 2     | count of requests     |
/// | 2 x n | requests              |
fn decode_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let requests: Option<Vec<u16>> = (0..count).map(|_| fields.u16()).collect();
    fields.is_empty().then_some((name, requests?))
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
///
/// | 0-3  | length of the export's name  |
/// | 4-   | name                         |
/// | 4    | count of queries             |
/// | each | length (4), query            |
fn decode_meta_context(data: &[u8]) -> Option<(&str, Vec<String>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?.to_owned());
    }
    fields.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests;
