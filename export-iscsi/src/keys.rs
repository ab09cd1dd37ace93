//! Text keys: their syntax (RFC 7143 §6.1), and what is agreed on by them (§6.2, §13).

use std::collections::BTreeSet;

/// Longest name of a key (§6.1).
const KEY_BYTES_MAX: usize = 63;
/// Longest value that we take: a binary value of 1024 bytes in hexadecimal and more.
const VALUE_BYTES_MAX: usize = 8192;
/// Most text of one exchange, bytes, over all its PDUs.
pub const TEXT_BYTES_MAX: usize = 64 << 10;
/// Most keys of one exchange.
const KEYS_MAX: usize = 1024;

/// Data segment that everybody takes without having said so (§13.12).
pub const DEFAULT_DATA_BYTES: usize = 8192;

/// A key with its value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pair {
    /// Name.
    pub key: String,
    /// Value, not decoded.
    pub value: String,
}

/// Text that is no list of keys.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TextError {
    /// No `=`.
    #[error("text without `=`")]
    NoValue,
    /// A name that no key can have.
    #[error("`{0}` is no name of a key")]
    BadKey(String),
    /// A value that no key can have.
    #[error("the value of {0} is too long or not UTF-8")]
    BadValue(String),
    /// Too much.
    #[error("more than {TEXT_BYTES_MAX} bytes or {KEYS_MAX} keys of text")]
    TooMuch,
    /// Named again with another value, or negotiated again.
    #[error("{0} is negotiated more than once")]
    Repeated(String),
}

/// Takes text apart.
///
/// # Errors
/// [`TextError`] if it is no list of keys.
pub fn parse(text: &[u8]) -> Result<Vec<Pair>, TextError> {
    let mut pairs = Vec::new();
    // Runs of NUL are padding.
    for piece in text.split(|byte| *byte == 0).filter(|it| !it.is_empty()) {
        if pairs.len() == KEYS_MAX {
            return Err(TextError::TooMuch);
        }
        let at = piece.iter().position(|byte| *byte == b'=');
        let (key, value) = piece.split_at(at.ok_or(TextError::NoValue)?);
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b".-+@_#".contains(byte);
        let shown: String = String::from_utf8_lossy(key).chars().take(80).collect();
        if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.iter().all(allowed) {
            return Err(TextError::BadKey(shown));
        }
        let value = &value[1..];
        match str::from_utf8(value) {
            Ok(value) if value.len() <= VALUE_BYTES_MAX => pairs.push(Pair {
                key: shown,
                value: value.to_owned(),
            }),
            _ => return Err(TextError::BadValue(shown)),
        }
    }
    Ok(pairs)
}

/// Puts a key behind others.
pub fn put(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// Answers that are no values (§6.2).
pub const NOT_UNDERSTOOD: &str = "NotUnderstood";
/// The key does not matter.
pub const IRRELEVANT: &str = "Irrelevant";
/// The value cannot be.
pub const REJECT: &str = "Reject";

/// A decimal or hexadecimal number within a range.
pub fn number(value: &str, min: u32, max: u32) -> Option<u32> {
    let hex = value
        .strip_prefix("0x")
        .or_else(|| value.strip_prefix("0X"));
    let digits = hex.unwrap_or(value);
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u32::from_str_radix(digits, if hex.is_some() { 16 } else { 10 }).ok()?;
    (min..=max).contains(&number).then_some(number)
}

/// Which digests a target takes, for one kind of digest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DigestPolicy {
    /// What the initiator prefers.
    Either,
    /// Never one.
    Never,
    /// Always one; initiators that cannot are refused.
    Always,
}

/// What a target wants; the names are those of §13.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wishes {
    /// HeaderDigest.
    pub header_digest: DigestPolicy,
    /// DataDigest.
    pub data_digest: DigestPolicy,
    /// MaxConnections.
    pub max_connections: u16,
    /// InitialR2T.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxRecvDataSegmentLength, bytes: what we take in one PDU.
    pub data_bytes_max: u32,
    /// Longest data segment that we send, bytes, even if the initiator takes more.
    pub sent_data_bytes_max: u32,
    /// MaxBurstLength, bytes.
    pub max_burst_length: u32,
    /// FirstBurstLength, bytes.
    pub first_burst_length: u32,
    /// DefaultTime2Wait, seconds.
    pub time2wait: u16,
    /// DefaultTime2Retain, seconds.
    pub time2retain: u16,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u16,
    /// ErrorRecoveryLevel.
    pub error_recovery_level: u8,
}

/// Most connections of a session.
pub const CONNECTIONS_MAX: u16 = 4;
/// Most requests for data of one command at a time.
pub const OUTSTANDING_R2T_MAX: u16 = 16;
/// Highest level of error recovery that we know.
pub const ERROR_RECOVERY_LEVEL_MAX: u8 = 1;

impl Default for Wishes {
    fn default() -> Wishes {
        Wishes {
            header_digest: DigestPolicy::Either,
            data_digest: DigestPolicy::Either,
            max_connections: CONNECTIONS_MAX,
            initial_r2t: false,
            immediate_data: true,
            // As long as the longest burst, so that a write of 1 MiB comes in one piece.
            data_bytes_max: 1 << 20,
            sent_data_bytes_max: 1 << 20,
            max_burst_length: 1 << 20,
            first_burst_length: 256 << 10,
            time2wait: 2,
            time2retain: 20,
            max_outstanding_r2t: OUTSTANDING_R2T_MAX,
            error_recovery_level: ERROR_RECOVERY_LEVEL_MAX,
        }
    }
}

/// What was agreed on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Params {
    /// CRC32C behind headers.
    pub header_digest: bool,
    /// CRC32C behind data.
    pub data_digest: bool,
    /// MaxConnections.
    pub max_connections: u16,
    /// Only immediate data may come unasked.
    pub initial_r2t: bool,
    /// Data may come in the command PDU.
    pub immediate_data: bool,
    /// Longest data segment that we take, bytes.
    pub data_bytes_max: usize,
    /// Longest data segment that we send, bytes.
    pub sent_data_bytes_max: usize,
    /// Longest run of data for one R2T, or of Data-In, bytes.
    pub max_burst_length: usize,
    /// Most data that may come unasked, bytes.
    pub first_burst_length: usize,
    /// Seconds.
    pub time2wait: u16,
    /// Seconds.
    pub time2retain: u16,
    /// R2Ts of one command at a time.
    pub max_outstanding_r2t: u16,
    /// Error recovery.
    pub error_recovery_level: u8,
}

impl Params {
    /// What holds if nothing is said (§13).
    fn defaults(wishes: &Wishes) -> Params {
        Params {
            header_digest: false,
            data_digest: false,
            max_connections: 1,
            initial_r2t: true,
            immediate_data: true,
            data_bytes_max: (wishes.data_bytes_max as usize).max(DEFAULT_DATA_BYTES),
            sent_data_bytes_max: DEFAULT_DATA_BYTES,
            max_burst_length: 262_144,
            first_burst_length: 65_536,
            time2wait: 2,
            time2retain: 20,
            max_outstanding_r2t: 1,
            error_recovery_level: 0,
        }
    }
}

/// The negotiation of the operational keys.
#[derive(Clone, Debug)]
pub struct Negotiation {
    wishes: Wishes,
    agreed: Params,
    seen: BTreeSet<String>,
}

impl Negotiation {
    /// Nothing said yet.
    pub fn new(wishes: Wishes) -> Negotiation {
        Negotiation {
            agreed: Params::defaults(&wishes),
            wishes,
            seen: BTreeSet::new(),
        }
    }

    /// What is agreed on so far.
    ///
    /// # Errors
    /// The digest that this target insists on and the initiator did not take.
    pub fn finish(&self) -> Result<Params, &'static str> {
        let mut agreed = self.agreed.clone();
        // §13.14: "FirstBurstLength MUST NOT exceed MaxBurstLength", in whatever order they came.
        agreed.first_burst_length = agreed.first_burst_length.min(agreed.max_burst_length);
        if self.wishes.header_digest == DigestPolicy::Always && !agreed.header_digest {
            return Err("HeaderDigest");
        }
        if self.wishes.data_digest == DigestPolicy::Always && !agreed.data_digest {
            return Err("DataDigest");
        }
        Ok(agreed)
    }

    /// Answers keys, in their order; declarations are not answered.
    ///
    /// # Errors
    /// [`TextError::Repeated`] if one is negotiated again.
    pub fn answer(&mut self, pairs: &[Pair], text: &mut Vec<u8>) -> Result<(), TextError> {
        for pair in pairs {
            if !self.seen.insert(pair.key.clone()) {
                return Err(TextError::Repeated(pair.key.clone()));
            }
        }
        // The longest burst bounds the first one, so it is settled before that is answered.
        let burst = pairs.iter().find(|pair| pair.key == "MaxBurstLength");
        let burst = burst.map(|pair| self.settle(&pair.key, &pair.value));
        for pair in pairs {
            let answer = match pair.key.as_str() {
                "MaxBurstLength" => burst.clone().unwrap_or_default(),
                key => self.settle(key, &pair.value),
            };
            if let Some(answer) = answer {
                put(text, &pair.key, &answer);
            }
        }
        Ok(())
    }

    fn settle(&mut self, key: &str, value: &str) -> Option<String> {
        let (wishes, agreed) = (&self.wishes, &mut self.agreed);
        let answer = match key {
            "HeaderDigest" => digest(value, wishes.header_digest, &mut agreed.header_digest),
            "DataDigest" => digest(value, wishes.data_digest, &mut agreed.data_digest),
            "MaxConnections" => {
                let least = |it: u32| it.min(wishes.max_connections.into());
                numeric(value, 1, 65_535, least, &mut agreed.max_connections)
            }
            "InitialR2T" => either(value, wishes.initial_r2t, &mut agreed.initial_r2t),
            "ImmediateData" => both(value, wishes.immediate_data, &mut agreed.immediate_data),
            "MaxRecvDataSegmentLength" => {
                return match number(value, 512, (1 << 24) - 1) {
                    Some(bytes) => {
                        agreed.sent_data_bytes_max =
                            bytes.min(wishes.sent_data_bytes_max).max(512) as usize;
                        None
                    }
                    None => Some(REJECT.to_owned()),
                };
            }
            "MaxBurstLength" => {
                let least = |it: u32| it.min(wishes.max_burst_length);
                let max = (1 << 24) - 1;
                numeric(value, 512, max, least, &mut agreed.max_burst_length)
            }
            "FirstBurstLength" => {
                let most = u32::try_from(agreed.max_burst_length).unwrap_or(u32::MAX);
                let least = |it: u32| it.min(wishes.first_burst_length).min(most);
                let max = (1 << 24) - 1;
                numeric(value, 512, max, least, &mut agreed.first_burst_length)
            }
            "DefaultTime2Wait" => {
                let most = |it: u32| it.max(wishes.time2wait.into());
                numeric(value, 0, 3600, most, &mut agreed.time2wait)
            }
            "DefaultTime2Retain" => {
                let least = |it: u32| it.min(wishes.time2retain.into());
                numeric(value, 0, 3600, least, &mut agreed.time2retain)
            }
            "MaxOutstandingR2T" => {
                let least = |it: u32| it.min(wishes.max_outstanding_r2t.into());
                numeric(value, 1, 65_535, least, &mut agreed.max_outstanding_r2t)
            }
            "ErrorRecoveryLevel" => {
                let least = |it: u32| it.min(wishes.error_recovery_level.into());
                numeric(value, 0, 2, least, &mut agreed.error_recovery_level)
            }
            // We never send or take data out of order.
            "DataPDUInOrder" | "DataSequenceInOrder" => either(value, true, &mut true),
            "TaskReporting" => choose(value, &["RFC3720"]),
            "iSCSIProtocolLevel" => numeric(value, 0, 31, |it| it.min(1), &mut 0u32),
            // Markers are obsolete (§13.25): there are none, and so no interval between them.
            "IFMarker" | "OFMarker" => either(value, false, &mut false).map(|_| "No".to_owned()),
            "IFMarkInt" | "OFMarkInt" => Some(IRRELEVANT.to_owned()),
            _ => return Some(NOT_UNDERSTOOD.to_owned()),
        };
        Some(answer.unwrap_or_else(|| REJECT.to_owned()))
    }
}

/// The first value of a list that we know.
fn choose(offered: &str, known: &[&str]) -> Option<String> {
    let mut offered = offered.split(',').map(str::trim);
    let chosen = offered.find(|value| known.contains(value))?;
    Some(chosen.to_owned())
}

fn digest(offered: &str, policy: DigestPolicy, agreed: &mut bool) -> Option<String> {
    let known: &[&str] = match policy {
        DigestPolicy::Either => &["CRC32C", "None"],
        DigestPolicy::Never => &["None"],
        DigestPolicy::Always => &["CRC32C"],
    };
    let chosen = choose(offered, known)?;
    *agreed = chosen == "CRC32C";
    Some(chosen)
}

fn numeric<T: TryFrom<u32>>(
    value: &str,
    min: u32,
    max: u32,
    result: impl Fn(u32) -> u32,
    agreed: &mut T,
) -> Option<String> {
    let settled = result(number(value, min, max)?);
    *agreed = T::try_from(settled).ok()?;
    Some(settled.to_string())
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

fn spoken(value: bool) -> String {
    if value { "Yes" } else { "No" }.to_owned()
}

/// A key whose result is OR.
fn either(value: &str, ours: bool, agreed: &mut bool) -> Option<String> {
    *agreed = boolean(value)? || ours;
    Some(spoken(*agreed))
}

/// A key whose result is AND.
fn both(value: &str, ours: bool, agreed: &mut bool) -> Option<String> {
    *agreed = boolean(value)? && ours;
    Some(spoken(*agreed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(text: &str) -> Vec<Pair> {
        parse(text.replace(' ', "\0").as_bytes()).unwrap()
    }

    fn negotiate(offers: &str) -> (String, Params) {
        negotiate_with(Wishes::default(), offers)
    }

    fn negotiate_with(wishes: Wishes, offers: &str) -> (String, Params) {
        let mut negotiation = Negotiation::new(wishes);
        let mut text = Vec::new();
        negotiation.answer(&pairs(offers), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap().replace('\0', " ");
        (text.trim().to_owned(), negotiation.finish().unwrap())
    }

    #[test]
    fn keys_are_separated_by_nul() {
        let found = parse(b"A=1\0B=x=y\0\0\0").unwrap();
        let found: Vec<_> = found.iter().map(|it| (&*it.key, &*it.value)).collect();
        assert_eq!(found, [("A", "1"), ("B", "x=y")]);
        assert_eq!(parse(b""), Ok(vec![]));
        assert_eq!(parse(b"\0\0\0\0"), Ok(vec![]));
    }

    #[test]
    fn malformed_text_is_refused() {
        assert_eq!(parse(b"NoEquals\0"), Err(TextError::NoValue));
        assert!(matches!(parse(b"=x\0"), Err(TextError::BadKey(_))));
        assert!(matches!(parse(b"a b=x\0"), Err(TextError::BadKey(_))));
        assert!(matches!(parse(b"A=\xff\0"), Err(TextError::BadValue(_))));
        let long = [b"A=".to_vec(), vec![b'x'; VALUE_BYTES_MAX + 1]].concat();
        assert!(matches!(parse(&long), Err(TextError::BadValue(_))));
        let many = b"k=v\0".repeat(KEYS_MAX + 1);
        assert_eq!(parse(&many), Err(TextError::TooMuch));
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("0x200", 0, 4096), Some(512));
        assert_eq!(number("512", 512, 512), Some(512));
        for bad in ["-1", "+5", "", "0x", "1.5", "99999999999", "511", "ten"] {
            assert_eq!(number(bad, 512, 8192), None, "{bad}");
        }
    }

    #[test]
    fn open_iscsi_offers() {
        // What iscsid.conf of Debian makes it say.
        let (answer, agreed) = negotiate(
            "HeaderDigest=None DataDigest=None DefaultTime2Wait=2 DefaultTime2Retain=0 \
             IFMarker=No OFMarker=No ErrorRecoveryLevel=0 InitialR2T=No ImmediateData=Yes \
             MaxBurstLength=16776192 FirstBurstLength=262144 MaxOutstandingR2T=1 MaxConnections=1 \
             DataPDUInOrder=Yes DataSequenceInOrder=Yes MaxRecvDataSegmentLength=262144",
        );
        assert_eq!(
            answer,
            "HeaderDigest=None DataDigest=None DefaultTime2Wait=2 DefaultTime2Retain=0 \
             IFMarker=No OFMarker=No ErrorRecoveryLevel=0 InitialR2T=No ImmediateData=Yes \
             MaxBurstLength=1048576 FirstBurstLength=262144 MaxOutstandingR2T=1 MaxConnections=1 \
             DataPDUInOrder=Yes DataSequenceInOrder=Yes"
        );
        assert_eq!(agreed.sent_data_bytes_max, 262_144);
        assert!(!agreed.initial_r2t && agreed.immediate_data);
    }

    #[test]
    fn digests_are_chosen_in_the_initiators_order() {
        // §6.2.1: "the first value ... that it supports".
        for (offer, chosen) in [
            ("CRC32C,None", true),
            ("None,CRC32C", false),
            ("X-private,CRC32C", true),
            ("None", false),
        ] {
            let (_, agreed) = negotiate(&format!("HeaderDigest={offer} DataDigest={offer}"));
            assert_eq!((agreed.header_digest, agreed.data_digest), (chosen, chosen));
        }
        assert_eq!(negotiate("HeaderDigest=Foo").0, "HeaderDigest=Reject");
    }

    #[test]
    fn required_digest_that_is_not_offered_fails() {
        let wishes = Wishes {
            data_digest: DigestPolicy::Always,
            ..Wishes::default()
        };
        let mut negotiation = Negotiation::new(wishes);
        let mut text = Vec::new();
        negotiation
            .answer(&pairs("DataDigest=None"), &mut text)
            .unwrap();
        assert_eq!(text, b"DataDigest=Reject\0");
        assert_eq!(negotiation.finish(), Err("DataDigest"));
    }

    #[test]
    fn first_burst_never_exceeds_max_burst_in_any_order() {
        let offers = ["MaxBurstLength=1024", "FirstBurstLength=65536"];
        for order in [[0, 1], [1, 0]] {
            let text = order.map(|at| offers[at]).join(" ");
            let (answer, agreed) = negotiate(&text);
            assert!(answer.contains("FirstBurstLength=1024"), "{answer}");
            assert_eq!(agreed.first_burst_length, 1024);
            // And over two PDUs.
            let mut negotiation = Negotiation::new(Wishes::default());
            for at in order {
                let pairs = pairs(offers[at]);
                negotiation.answer(&pairs, &mut Vec::new()).unwrap();
            }
            assert_eq!(negotiation.finish().unwrap().first_burst_length, 1024);
        }
    }

    #[test]
    fn values_out_of_range_are_rejected_and_change_nothing() {
        let (answer, agreed) = negotiate(
            "MaxBurstLength=100 FirstBurstLength=-5 MaxConnections=0 ErrorRecoveryLevel=3 \
             InitialR2T=maybe DefaultTime2Wait=3601 MaxRecvDataSegmentLength=511",
        );
        assert_eq!(answer.matches("=Reject").count(), 7);
        assert_eq!(agreed, Params::defaults(&Wishes::default()));
    }

    #[test]
    fn unknown_keys_are_not_understood() {
        let (answer, _) = negotiate("X-com.example.foo=1 X#bar=2 Whatever=3");
        assert_eq!(
            answer,
            "X-com.example.foo=NotUnderstood X#bar=NotUnderstood Whatever=NotUnderstood"
        );
    }

    #[test]
    fn negotiating_again_is_an_error() {
        // §6.3: "An attempt to renegotiate/redeclare parameters ... is a protocol error".
        let mut negotiation = Negotiation::new(Wishes::default());
        let once = pairs("InitialR2T=No");
        negotiation.answer(&once, &mut Vec::new()).unwrap();
        let again = negotiation.answer(&once, &mut Vec::new());
        assert_eq!(again, Err(TextError::Repeated("InitialR2T".into())));
    }

    #[test]
    fn larger_and_smaller_wishes_meet() {
        let (answer, agreed) = negotiate(
            "MaxConnections=9 MaxOutstandingR2T=0x40 ErrorRecoveryLevel=2 DefaultTime2Wait=5 \
             DefaultTime2Retain=3600 ImmediateData=No InitialR2T=Yes",
        );
        assert_eq!(
            answer,
            "MaxConnections=4 MaxOutstandingR2T=16 ErrorRecoveryLevel=1 DefaultTime2Wait=5 \
             DefaultTime2Retain=20 ImmediateData=No InitialR2T=Yes"
        );
        assert_eq!(
            (agreed.max_connections, agreed.max_outstanding_r2t),
            (4, 16)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_answered_or_refused(text in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(pairs) = parse(&text) {
                let mut negotiation = Negotiation::new(Wishes::default());
                let _ = negotiation.answer(&pairs, &mut Vec::new());
                let _ = negotiation.finish();
            }
        }

        #[test]
        fn any_values_keep_what_must_hold(
            order in Just([
                "MaxBurstLength", "FirstBurstLength", "MaxRecvDataSegmentLength", "MaxConnections",
                "MaxOutstandingR2T", "ErrorRecoveryLevel", "DefaultTime2Wait", "DefaultTime2Retain",
            ].to_vec()).prop_shuffle(),
            values in proptest::collection::vec(prop_oneof![0..70_000u32, any::<u32>()], 8),
            cut in 0..9usize,
        ) {
            let pairs: Vec<Pair> = order.iter().zip(&values)
                .map(|(key, value)| Pair { key: (*key).to_owned(), value: value.to_string() })
                .collect();
            let mut negotiation = Negotiation::new(Wishes::default());
            let (first, second) = pairs.split_at(cut.min(pairs.len()));
            negotiation.answer(first, &mut Vec::new()).unwrap();
            negotiation.answer(second, &mut Vec::new()).unwrap();
            let agreed = negotiation.finish().unwrap();
            prop_assert!(agreed.first_burst_length <= agreed.max_burst_length);
            prop_assert!((512..=1 << 20).contains(&agreed.sent_data_bytes_max));
            prop_assert!((1..=CONNECTIONS_MAX).contains(&agreed.max_connections));
            prop_assert!((1..=OUTSTANDING_R2T_MAX).contains(&agreed.max_outstanding_r2t));
            prop_assert!(agreed.error_recovery_level <= ERROR_RECOVERY_LEVEL_MAX);
        }
    }
}
