//! CHAP (RFC 7143 §12.1.3): who an initiator is, and if it asks, who we are.
//!
//! A response is `hash(identifier ‖ secret ‖ challenge)`. Secrets are never shown or logged.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use sha3::Sha3_256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Longest binary value (§6.1).
const BINARY_BYTES_MAX: usize = 1024;
/// Challenges that are remembered so that they cannot be played back to us.
const CHALLENGES_KEPT: usize = 4096;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// A CHAP secret.
#[derive(Clone, Eq, PartialEq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// A secret from a configuration file.
    pub fn new(secret: impl Into<Vec<u8>>) -> Secret {
        Secret(Zeroizing::new(secret.into()))
    }

    /// Whether Windows' initiator takes it: it wants 12 to 16 bytes.
    pub fn fits_windows(&self) -> bool {
        (12..=16).contains(&self.0.len())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A user with its secret.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Account {
    /// CHAP_N.
    pub name: String,
    /// What proves it.
    pub secret: Secret,
}

/// Who may log in, and how we prove who we are.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Accounts {
    /// Initiators' accounts; without any, everyone may log in.
    pub incoming: Vec<Account>,
    /// Ours, for initiators that ask.
    pub outgoing: Option<Account>,
}

impl Accounts {
    /// Whether a secret serves both directions, which lets an initiator have our answer made by ourselves.
    pub fn share_a_secret(&self) -> bool {
        let mut incoming = self.incoming.iter();
        let outgoing = self.outgoing.as_ref();
        outgoing.is_some_and(|outgoing| incoming.any(|it| it.secret == outgoing.secret))
    }

    /// Whether CHAP is needed.
    pub fn required(&self) -> bool {
        !self.incoming.is_empty()
    }
}

/// A hash algorithm, by IANA's number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Algorithm {
    /// MD5.
    Md5 = 5,
    /// SHA1.
    Sha1 = 6,
    /// SHA-256.
    Sha256 = 7,
    /// SHA3-256.
    Sha3 = 8,
}

impl Algorithm {
    /// All, strongest first.
    pub const ALL: [Algorithm; 4] = [
        Algorithm::Sha3,
        Algorithm::Sha256,
        Algorithm::Sha1,
        Algorithm::Md5,
    ];

    /// Whether it is no longer thought strong enough for new uses.
    pub fn is_weak(self) -> bool {
        matches!(self, Algorithm::Md5 | Algorithm::Sha1)
    }

    /// The response to a challenge.
    pub fn response(self, id: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(parts: [&[u8]; 3]) -> Vec<u8> {
            let mut digest = D::new();
            parts.iter().for_each(|part| digest.update(part));
            digest.finalize().to_vec()
        }
        let parts = [&[id][..], &secret.0, challenge];
        match self {
            Algorithm::Md5 => hash::<Md5>(parts),
            Algorithm::Sha1 => hash::<Sha1>(parts),
            Algorithm::Sha256 => hash::<Sha256>(parts),
            Algorithm::Sha3 => hash::<Sha3_256>(parts),
        }
    }

    /// Of a challenge: as long as the hash.
    fn challenge_bytes(self) -> usize {
        match self {
            Algorithm::Md5 => 16,
            Algorithm::Sha1 => 20,
            Algorithm::Sha256 | Algorithm::Sha3 => 32,
        }
    }

    /// The first of ours that is in an initiator's list.
    pub fn choose(ours: &[Algorithm], offered: &str) -> Option<Algorithm> {
        let offered: Vec<&str> = offered.split(',').map(str::trim).collect();
        let is_offered = |it: &&Algorithm| {
            let code = (**it as u8).to_string();
            offered.contains(&code.as_str())
        };
        ours.iter().find(is_offered).copied()
    }
}

/// Why CHAP failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ChapError {
    /// No algorithm in common.
    #[error("CHAP_A={0} has no algorithm that is allowed here")]
    NoAlgorithm(String),
    /// A key is missing or unexpected.
    #[error("{0} is missing, or came when it was not expected")]
    Unexpected(&'static str),
    /// A value is not what it should be.
    #[error("{0} is no number, hexadecimal or base64 value of the right length")]
    Malformed(&'static str),
    /// No such user.
    #[error("there is no user {0:?}")]
    UnknownUser(String),
    /// The wrong secret.
    #[error("user {0:?} has another secret")]
    WrongSecret(String),
    /// The initiator asks who we are, and we have no account.
    #[error("the initiator wants mutual CHAP, and no outgoing account is configured")]
    NoOutgoing,
    /// The initiator sent back a challenge of ours.
    #[error("the initiator's challenge is one of ours")]
    Reflected,
    /// One secret for both directions.
    #[error("the secrets of both directions are equal")]
    EqualSecrets,
}

/// Challenges of this process: random, and remembered so that one that comes back is found.
#[derive(Debug, Default)]
pub struct Challenges {
    recent: Mutex<(u8, VecDeque<Vec<u8>>)>,
}

impl Challenges {
    fn draw(&self, bytes: usize) -> (u8, Vec<u8>) {
        let mut challenge = vec![0; bytes];
        getrandom::fill(&mut challenge).expect("the system gives random bytes");
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, kept) = &mut *recent;
        // §12.1.3: identifiers change from login to login.
        *id = id.wrapping_add(1);
        kept.push_back(challenge.clone());
        if kept.len() > CHALLENGES_KEPT {
            kept.pop_front();
        }
        (*id, challenge)
    }

    fn knows(&self, challenge: &[u8]) -> bool {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.1.iter().any(|kept| kept == challenge)
    }
}

/// One CHAP exchange after CHAP_A.
#[derive(Debug)]
pub struct Chap {
    algorithm: Algorithm,
    id: u8,
    challenge: Vec<u8>,
}

/// The initiator's answer, as text.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChapAnswer<'a> {
    /// CHAP_N.
    pub name: Option<&'a str>,
    /// CHAP_R.
    pub response: Option<&'a str>,
    /// CHAP_I, if it asks who we are.
    pub id: Option<&'a str>,
    /// CHAP_C, if it asks who we are.
    pub challenge: Option<&'a str>,
}

impl Chap {
    /// Takes CHAP_A.
    ///
    /// # Errors
    /// [`ChapError::NoAlgorithm`].
    pub fn start(
        offered: &str,
        ours: &[Algorithm],
        challenges: &Challenges,
    ) -> Result<Chap, ChapError> {
        let algorithm = Algorithm::choose(ours, offered)
            .ok_or_else(|| ChapError::NoAlgorithm(offered.chars().take(80).collect()))?;
        let (id, challenge) = challenges.draw(algorithm.challenge_bytes());
        Ok(Chap {
            algorithm,
            id,
            challenge,
        })
    }

    /// CHAP_A, CHAP_I, CHAP_C.
    pub fn question(&self) -> [(&'static str, String); 3] {
        [
            ("CHAP_A", (self.algorithm as u8).to_string()),
            ("CHAP_I", self.id.to_string()),
            ("CHAP_C", hexadecimal(&self.challenge)),
        ]
    }

    /// The algorithm in use.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Takes the initiator's answer: the user's name, and CHAP_N and CHAP_R of ours if it asked.
    ///
    /// # Errors
    /// [`ChapError`] if it is not who it says, or asks what must not be answered.
    pub fn verify(
        &self,
        answer: ChapAnswer<'_>,
        accounts: &Accounts,
        challenges: &Challenges,
    ) -> Result<(Account, Option<(String, String)>), ChapError> {
        let name = answer.name.ok_or(ChapError::Unexpected("CHAP_N"))?;
        let response = answer.response.ok_or(ChapError::Unexpected("CHAP_R"))?;
        let response = binary(response).ok_or(ChapError::Malformed("CHAP_R"))?;
        if let Some(outgoing) = &accounts.outgoing {
            // "If the CHAP response received by one end ... is the same as the CHAP response that the
            // receiving endpoint would have generated for the same CHAP challenge, the response MUST
            // be treated as an authentication failure" (§12.1.3).
            let ours = self.respond(self.id, &outgoing.secret, &self.challenge);
            if bool::from(ours.ct_eq(&response)) {
                return Err(ChapError::EqualSecrets);
            }
        }
        let account = accounts.incoming.iter().find(|it| it.name == name);
        // An unknown user takes as long as a known one.
        let nobody = Secret::new(Vec::new());
        let secret = account.map_or(&nobody, |account| &account.secret);
        let expected = self.respond(self.id, secret, &self.challenge);
        let proven = bool::from(expected.ct_eq(&response));
        let shown = || name.chars().take(80).collect();
        let account = match account {
            None => return Err(ChapError::UnknownUser(shown())),
            Some(_) if !proven => return Err(ChapError::WrongSecret(shown())),
            Some(account) => account,
        };
        let ours = match (answer.id, answer.challenge) {
            (None, None) => None,
            (Some(id), Some(challenge)) => {
                Some(self.prove(id, challenge, secret, accounts, challenges)?)
            }
            (Some(_), None) => return Err(ChapError::Unexpected("CHAP_C")),
            (None, Some(_)) => return Err(ChapError::Unexpected("CHAP_I")),
        };
        Ok((account.clone(), ours))
    }

    fn prove(
        &self,
        id: &str,
        challenge: &str,
        incoming: &Secret,
        accounts: &Accounts,
        challenges: &Challenges,
    ) -> Result<(String, String), ChapError> {
        let outgoing = accounts.outgoing.as_ref().ok_or(ChapError::NoOutgoing)?;
        let id = identifier(id).ok_or(ChapError::Malformed("CHAP_I"))?;
        let challenge = binary(challenge).ok_or(ChapError::Malformed("CHAP_C"))?;
        if challenge.is_empty() {
            return Err(ChapError::Malformed("CHAP_C"));
        }
        // "Originators MUST NOT reuse the CHAP challenge sent by the responder for the other
        // direction": neither that of this connection nor of another one.
        if challenge == self.challenge || challenges.knows(&challenge) {
            return Err(ChapError::Reflected);
        }
        if bool::from(incoming.0.ct_eq(&outgoing.secret.0)) {
            return Err(ChapError::EqualSecrets);
        }
        let response = self.respond(id, &outgoing.secret, &challenge);
        Ok((outgoing.name.clone(), hexadecimal(&response)))
    }

    fn respond(&self, id: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
        self.algorithm.response(id, secret, challenge)
    }
}

/// Bytes as `0x...`.
pub fn hexadecimal(bytes: &[u8]) -> String {
    let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
    std::iter::once("0x".to_owned()).chain(digits).collect()
}

/// A binary value in hexadecimal or base64 (§6.1).
pub fn binary(value: &str) -> Option<Vec<u8>> {
    let (prefix, digits) = value.split_at_checked(2)?;
    let bytes = match prefix {
        "0x" | "0X" => {
            let digits = digits.as_bytes();
            let nibble = |byte: &u8| (*byte as char).to_digit(16).map(|it| it as u8);
            // An odd number of digits has a zero before them.
            let (first, pairs) = digits.split_at(digits.len() % 2);
            let first = first.iter().map(nibble);
            let pairs = pairs
                .chunks_exact(2)
                .map(|pair| Some(nibble(&pair[0])? << 4 | nibble(&pair[1])?));
            first.chain(pairs).collect::<Option<Vec<u8>>>()?
        }
        "0b" | "0B" => BASE64.decode(digits).ok()?,
        _ => return None,
    };
    (bytes.len() <= BINARY_BYTES_MAX).then_some(bytes)
}

/// CHAP_I: a number, or one byte in hexadecimal or base64.
fn identifier(value: &str) -> Option<u8> {
    if value.bytes().all(|byte| byte.is_ascii_digit()) {
        return value.parse().ok();
    }
    match binary(value)?[..] {
        [id] => Some(id),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn account(name: &str, secret: &str) -> Account {
        Account {
            name: name.to_owned(),
            secret: Secret::new(secret),
        }
    }

    fn accounts() -> Accounts {
        Accounts {
            incoming: vec![
                account("iscsi_pss", "iscsi_pss000"),
                account("0xbeef", "other secret"),
            ],
            outgoing: Some(account("target", "target secret")),
        }
    }

    fn answer_with(chap: &Chap, secret: &str) -> String {
        let response = chap.respond(chap.id, &Secret::new(secret), &chap.challenge);
        hexadecimal(&response)
    }

    #[test]
    fn md5_is_that_of_rfc_1994() {
        // md5(01 "secret" 00 01 02 03), computed with coreutils' md5sum.
        let response = Algorithm::Md5.response(1, &Secret::new("secret"), &[0, 1, 2, 3]);
        let expected = "0x".to_owned() + MD5_OF_EXAMPLE;
        assert_eq!(hexadecimal(&response), expected);
    }

    const MD5_OF_EXAMPLE: &str = "e82cb2ed1efe04893c9cf73d4dd12e2d";

    #[test]
    fn algorithms_are_chosen_in_our_order() {
        let all = Algorithm::ALL;
        assert_eq!(Algorithm::choose(&all, "5"), Some(Algorithm::Md5));
        assert_eq!(Algorithm::choose(&all, "5,6,7,8"), Some(Algorithm::Sha3));
        assert_eq!(Algorithm::choose(&all, "5,7"), Some(Algorithm::Sha256));
        assert_eq!(Algorithm::choose(&all, "55,9"), None);
        assert_eq!(Algorithm::choose(&all[..2], "5,6"), None);
    }

    #[test]
    fn every_algorithm_and_encoding_is_verified() {
        let challenges = Challenges::default();
        for algorithm in Algorithm::ALL {
            let offered = (algorithm as u8).to_string();
            let chap = Chap::start(&offered, &Algorithm::ALL, &challenges).unwrap();
            let secret = Secret::new("iscsi_pss000");
            let response = chap.respond(chap.id, &secret, &chap.challenge);
            for encoded in [
                hexadecimal(&response),
                hexadecimal(&response).to_uppercase(),
                format!("0b{}", BASE64.encode(&response)),
                format!("0B{}", BASE64.encode(&response).trim_end_matches('=')),
            ] {
                let answer = ChapAnswer {
                    name: Some("iscsi_pss"),
                    response: Some(&encoded),
                    ..ChapAnswer::default()
                };
                let verified = chap.verify(answer, &accounts(), &challenges);
                let (account, ours) = verified.unwrap();
                assert_eq!(
                    (account.name.as_str(), ours),
                    ("iscsi_pss", None),
                    "{encoded}"
                );
            }
        }
    }

    #[test]
    fn names_are_text_even_if_they_look_encoded() {
        let challenges = Challenges::default();
        let chap = Chap::start("5", &Algorithm::ALL, &challenges).unwrap();
        let response = answer_with(&chap, "other secret");
        let answer = ChapAnswer {
            name: Some("0xbeef"),
            response: Some(&response),
            ..ChapAnswer::default()
        };
        assert!(chap.verify(answer, &accounts(), &challenges).is_ok());
    }

    #[test]
    fn wrong_users_and_secrets_are_refused() {
        let challenges = Challenges::default();
        let chap = Chap::start("5", &Algorithm::ALL, &challenges).unwrap();
        let right = answer_with(&chap, "iscsi_pss000");
        let wrong = answer_with(&chap, "wrong");
        let too_long = right.clone() + "00";
        let verify = |name, response| {
            let answer = ChapAnswer {
                name,
                response,
                ..ChapAnswer::default()
            };
            chap.verify(answer, &accounts(), &challenges).unwrap_err()
        };
        let user = || "iscsi_pss".to_owned();
        assert_eq!(
            verify(Some("iscsi_pss"), Some(&*wrong)),
            ChapError::WrongSecret(user())
        );
        assert_eq!(
            verify(Some("iscsi_pss"), Some(&*too_long)),
            ChapError::WrongSecret(user())
        );
        assert_eq!(
            verify(Some("iscsi_pss"), Some("0x")),
            ChapError::WrongSecret(user())
        );
        assert_eq!(
            verify(Some("nobody"), Some(&*right)),
            ChapError::UnknownUser("nobody".into())
        );
        assert_eq!(
            verify(Some("iscsi_pss"), Some("junk")),
            ChapError::Malformed("CHAP_R")
        );
        assert_eq!(
            verify(Some("iscsi_pss"), None),
            ChapError::Unexpected("CHAP_R")
        );
        assert_eq!(verify(None, Some(&*right)), ChapError::Unexpected("CHAP_N"));
        // Nobody is let in with the empty secret that stands for unknown users.
        let empty = answer_with(&chap, "");
        assert_eq!(
            verify(Some("nobody"), Some(&*empty)),
            ChapError::UnknownUser("nobody".into())
        );
    }

    fn mutual(
        id: &str,
        challenge: &str,
        accounts: &Accounts,
        challenges: &Challenges,
    ) -> Result<Option<(String, String)>, ChapError> {
        let chap = Chap::start("7", &Algorithm::ALL, challenges).unwrap();
        let response = answer_with(&chap, "iscsi_pss000");
        let answer = ChapAnswer {
            name: Some("iscsi_pss"),
            response: Some(&response),
            id: Some(id),
            challenge: Some(challenge),
        };
        chap.verify(answer, accounts, challenges).map(|it| it.1)
    }

    #[test]
    fn mutual_chap_proves_who_we_are() {
        let challenges = Challenges::default();
        for id in ["9", "0x09", "0x9", "0bCQ=="] {
            let ours = mutual(id, "0x0102030405060708", &accounts(), &challenges).unwrap();
            let expected = Algorithm::Sha256.response(
                9,
                &Secret::new("target secret"),
                &[1, 2, 3, 4, 5, 6, 7, 8],
            );
            assert_eq!(ours, Some(("target".to_owned(), hexadecimal(&expected))));
        }
        for id in ["256", "-1", "0x0102", ""] {
            let refused = mutual(id, "0x01", &accounts(), &challenges);
            assert_eq!(refused, Err(ChapError::Malformed("CHAP_I")), "{id}");
        }
    }

    #[test]
    fn reflected_challenges_are_refused() {
        let challenges = Challenges::default();
        // Of this connection, and of an earlier one.
        let other = Chap::start("7", &Algorithm::ALL, &challenges).unwrap();
        let reflected = hexadecimal(&other.challenge);
        let refused = mutual("1", &reflected, &accounts(), &challenges);
        assert_eq!(refused, Err(ChapError::Reflected));
    }

    #[test]
    fn equal_secrets_are_refused() {
        let challenges = Challenges::default();
        let mut accounts = accounts();
        accounts.outgoing = Some(account("target", "iscsi_pss000"));
        let refused = mutual("1", "0x0102", &accounts, &challenges);
        assert_eq!(refused, Err(ChapError::EqualSecrets));
    }

    #[test]
    fn mutual_chap_without_an_account_is_refused() {
        let mut accounts = accounts();
        accounts.outgoing = None;
        let refused = mutual("1", "0x0102", &accounts, &Challenges::default());
        assert_eq!(refused, Err(ChapError::NoOutgoing));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", accounts());
        assert!(
            !shown.contains("secret\"") && !shown.contains("000"),
            "{shown}"
        );
    }

    #[test]
    fn windows_takes_12_to_16_bytes() {
        assert!(Secret::new("iscsi_pss000").fits_windows());
        assert!(!Secret::new("short").fits_windows());
        assert!(!Secret::new("much too long for it").fits_windows());
    }

    proptest! {
        #[test]
        fn any_value_is_decoded_or_refused(value in ".{0,60}") {
            let _ = binary(&value);
            let _ = identifier(&value);
        }

        #[test]
        fn binary_values_survive(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
            prop_assert_eq!(binary(&hexadecimal(&bytes)), Some(bytes.clone()));
            prop_assert_eq!(binary(&format!("0b{}", BASE64.encode(&bytes))), Some(bytes));
        }
    }
}
