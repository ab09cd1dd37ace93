use crate::entry::EntryError;

/// Why bytes are not a message. The connection that they came from is not usable any more, except
/// where a decoder says otherwise.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends early, or a count in it is larger than the message.
    #[error("message is cut short")]
    Truncated,
    /// Bytes follow the message.
    #[error("message has bytes behind its end")]
    Trailing,
    /// A code that this version does not know.
    #[error("unknown {what} code {code}")]
    UnknownCode {
        /// Of what.
        what: &'static str,
        /// The code.
        code: u8,
    },
    /// Longer than allowed.
    #[error("{what} of {have}, at most {most} allowed")]
    TooLong {
        /// What is.
        what: &'static str,
        /// Its length.
        have: u64,
        /// The longest one allowed.
        most: u64,
    },
    /// The payload has another length than the header says.
    #[error("payload has {have} bytes, the message says {want}")]
    PayloadLength {
        /// Bytes received.
        have: u64,
        /// Bytes announced.
        want: u64,
    },
    /// The payload does not match its checksum.
    #[error("checksum mismatch in the payload")]
    Checksum,
    /// A string is not UTF-8.
    #[error("message holds a string that is not UTF-8")]
    NotUtf8,
    /// A part that is JSON is not what was expected.
    #[error("message holds JSON that was not expected")]
    Json,
    /// A value has no meaning where it stands.
    #[error("{0} has no meaning here")]
    Meaningless(&'static str),
    /// An entry in it is malformed.
    #[error(transparent)]
    Entry(#[from] EntryError),
}

/// Reads a message from its front. Little-endian.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (front, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(front)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (front, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*front)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            code => Err(DecodeError::UnknownCode { what: "flag", code }),
        }
    }

    /// A u32 count of items that take at least `item_bytes` each, so that it is safe to allocate.
    pub(crate) fn count(&mut self, item_bytes: usize) -> Result<usize, DecodeError> {
        let count = self.u32()? as usize;
        if count > self.0.len() / item_bytes {
            return Err(DecodeError::Truncated);
        }
        Ok(count)
    }

    /// A string with a u16 length in front.
    pub(crate) fn string(&mut self) -> Result<String, DecodeError> {
        let length = usize::from(self.u16()?);
        let text = self.bytes(length)?;
        match std::str::from_utf8(text) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(DecodeError::NotUtf8),
        }
    }

    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Trailing)
        }
    }
}

/// Writes a message behind what the buffer holds. Little-endian.
pub(crate) struct Output<'a>(pub(crate) &'a mut Vec<u8>);

impl Output<'_> {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn flag(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    /// A string with a u16 length in front; what does not fit is cut off at a character.
    pub(crate) fn string(&mut self, text: &str) {
        let text = shortened(text, usize::from(u16::MAX));
        self.bytes(&(text.len() as u16).to_le_bytes());
        self.bytes(text.as_bytes());
    }
}

/// The front of `text` of at most `most` bytes, cut at a character.
pub(crate) fn shortened(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
