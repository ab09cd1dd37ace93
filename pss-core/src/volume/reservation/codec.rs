//! Reservations and requests as bytes, for the log, the checkpoint and the wire. Little-endian; strings
//! and lists carry a u32 count in front. See docs/formats.md.

use std::collections::{BTreeMap, VecDeque};

use bytes::BufMut;

use super::{
    ALSO_MAX, Held, NOTICES_MAX, Nexus, Notice, NoticeKind, PORT_NAME_MAX, REGISTRATIONS_MAX,
    ReservationAction, ReservationRefusal, ReservationRequest, ReservationType, Reservations,
};

/// The bytes are no reservations, or more of them than there may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the bytes are not reservations")]
pub struct BadReservations;

type Result<T> = std::result::Result<T, BadReservations>;

impl Reservations {
    /// Appends them; equal ones give equal bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64_le(self.version);
        out.put_u32_le(self.generation);
        out.put_u8(u8::from(self.aptpl));
        out.put_u32_le(self.registrations.len() as u32);
        for (nexus, key) in &self.registrations {
            nexus.encode(out);
            out.put_u64_le(*key);
        }
        match &self.held {
            None => out.put_u8(0),
            Some(held) => {
                out.put_u8(held.kind as u8);
                held.by.encode(out);
            }
        }
        put_option(out, self.unit.as_ref(), |out, nexus| nexus.encode(out));
        out.put_u32_le(self.notices.len() as u32);
        for notice in &self.notices {
            out.put_u64_le(notice.version);
            out.put_u8(notice.kind as u8);
            notice.to.encode(out);
        }
        put_option(out, self.reset.as_ref(), |out, (version, by)| {
            out.put_u64_le(*version);
            by.encode(out);
        });
    }

    /// Takes what [`Reservations::encode`] made from the front of `input`.
    ///
    /// # Errors
    /// [`BadReservations`].
    pub fn decode(input: &mut &[u8]) -> Result<Reservations> {
        let version = get_u64(input)?;
        let generation = get_u32(input)?;
        let aptpl = get_bool(input)?;
        let mut registrations = BTreeMap::new();
        for _ in 0..get_count(input, REGISTRATIONS_MAX)? {
            registrations.insert(Nexus::decode(input)?, get_u64(input)?);
        }
        let held = match get_u8(input)? {
            0 => None,
            code => Some(Held {
                kind: ReservationType::from_code(code).ok_or(BadReservations)?,
                by: Nexus::decode(input)?,
            }),
        };
        let unit = get_option(input, Nexus::decode)?;
        let mut notices = VecDeque::new();
        for _ in 0..get_count(input, NOTICES_MAX)? {
            notices.push_back(Notice {
                version: get_u64(input)?,
                kind: NoticeKind::from_code(get_u8(input)?).ok_or(BadReservations)?,
                to: Nexus::decode(input)?,
            });
        }
        let reset = get_option(input, |input| Ok((get_u64(input)?, Nexus::decode(input)?)))?;
        Ok(Reservations {
            version,
            generation,
            aptpl,
            registrations,
            held,
            unit,
            notices,
            reset,
        })
    }
}

impl ReservationRequest {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.nexus.encode(out);
        match &self.action {
            ReservationAction::Read => out.put_u8(0),
            ReservationAction::Register {
                key,
                new_key,
                ignore_existing,
                aptpl,
                also,
            } => {
                out.put_u8(1);
                out.put_u64_le(*key);
                out.put_u64_le(*new_key);
                out.put_u8(u8::from(*ignore_existing));
                out.put_u8(u8::from(*aptpl));
                out.put_u32_le(also.len() as u32);
                for nexus in also {
                    nexus.encode(out);
                }
            }
            ReservationAction::Reserve { key, kind } => {
                out.put_u8(2);
                out.put_u64_le(*key);
                out.put_u8(*kind as u8);
            }
            ReservationAction::Release { key, kind } => {
                out.put_u8(3);
                out.put_u64_le(*key);
                out.put_u8(*kind as u8);
            }
            ReservationAction::Clear { key } => {
                out.put_u8(4);
                out.put_u64_le(*key);
            }
            ReservationAction::Preempt {
                key,
                victim,
                kind,
                abort,
            } => {
                out.put_u8(5);
                out.put_u64_le(*key);
                out.put_u64_le(*victim);
                out.put_u8(*kind as u8);
                out.put_u8(u8::from(*abort));
            }
            ReservationAction::RegisterAndMove {
                key,
                new_key,
                unregister,
                aptpl,
                to,
            } => {
                out.put_u8(6);
                out.put_u64_le(*key);
                out.put_u64_le(*new_key);
                out.put_u8(u8::from(*unregister));
                out.put_u8(u8::from(*aptpl));
                to.encode(out);
            }
            ReservationAction::ReserveUnit => out.put_u8(7),
            ReservationAction::ReleaseUnit => out.put_u8(8),
            ReservationAction::NexusLost => out.put_u8(9),
            ReservationAction::Reset => out.put_u8(10),
        }
    }

    /// Takes what [`ReservationRequest::encode`] made from the front of `input`.
    ///
    /// # Errors
    /// [`BadReservations`].
    pub fn decode(input: &mut &[u8]) -> Result<ReservationRequest> {
        let nexus = Nexus::decode(input)?;
        let action = match get_u8(input)? {
            0 => ReservationAction::Read,
            1 => ReservationAction::Register {
                key: get_u64(input)?,
                new_key: get_u64(input)?,
                ignore_existing: get_bool(input)?,
                aptpl: get_bool(input)?,
                also: (0..get_count(input, ALSO_MAX)?)
                    .map(|_| Nexus::decode(input))
                    .collect::<Result<_>>()?,
            },
            2 => ReservationAction::Reserve {
                key: get_u64(input)?,
                kind: get_kind(input)?,
            },
            3 => ReservationAction::Release {
                key: get_u64(input)?,
                kind: get_kind(input)?,
            },
            4 => ReservationAction::Clear {
                key: get_u64(input)?,
            },
            5 => ReservationAction::Preempt {
                key: get_u64(input)?,
                victim: get_u64(input)?,
                kind: get_kind(input)?,
                abort: get_bool(input)?,
            },
            6 => ReservationAction::RegisterAndMove {
                key: get_u64(input)?,
                new_key: get_u64(input)?,
                unregister: get_bool(input)?,
                aptpl: get_bool(input)?,
                to: Nexus::decode(input)?,
            },
            7 => ReservationAction::ReserveUnit,
            8 => ReservationAction::ReleaseUnit,
            9 => ReservationAction::NexusLost,
            10 => ReservationAction::Reset,
            _ => return Err(BadReservations),
        };
        Ok(ReservationRequest { nexus, action })
    }
}

impl ReservationRefusal {
    /// Its code on the wire and in the log's answers.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The refusal of a code.
    pub fn from_code(code: u8) -> Option<ReservationRefusal> {
        use ReservationRefusal::*;
        [Conflict, InvalidRelease, TooMany, InvalidField]
            .into_iter()
            .find(|refusal| *refusal as u8 == code)
    }
}

impl Nexus {
    fn encode(&self, out: &mut Vec<u8>) {
        put_string(out, &self.initiator);
        put_string(out, &self.target);
    }

    fn decode(input: &mut &[u8]) -> Result<Nexus> {
        Ok(Nexus {
            initiator: get_string(input)?,
            target: get_string(input)?,
        })
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32_le(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn put_option<T>(out: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn get_array<const N: usize>(input: &mut &[u8]) -> Result<[u8; N]> {
    let (array, rest) = input.split_first_chunk::<N>().ok_or(BadReservations)?;
    *input = rest;
    Ok(*array)
}

fn get_u8(input: &mut &[u8]) -> Result<u8> {
    Ok(get_array::<1>(input)?[0])
}

fn get_u32(input: &mut &[u8]) -> Result<u32> {
    Ok(u32::from_le_bytes(get_array(input)?))
}

fn get_u64(input: &mut &[u8]) -> Result<u64> {
    Ok(u64::from_le_bytes(get_array(input)?))
}

fn get_bool(input: &mut &[u8]) -> Result<bool> {
    match get_u8(input)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(BadReservations),
    }
}

fn get_count(input: &mut &[u8], most: usize) -> Result<usize> {
    let count = get_u32(input)? as usize;
    if count > most {
        return Err(BadReservations);
    }
    Ok(count)
}

fn get_kind(input: &mut &[u8]) -> Result<ReservationType> {
    ReservationType::from_code(get_u8(input)?).ok_or(BadReservations)
}

fn get_option<T>(
    input: &mut &[u8],
    get: impl FnOnce(&mut &[u8]) -> Result<T>,
) -> Result<Option<T>> {
    match get_bool(input)? {
        true => get(input).map(Some),
        false => Ok(None),
    }
}

fn get_string(input: &mut &[u8]) -> Result<String> {
    let length = get_count(input, PORT_NAME_MAX)?;
    let (text, rest) = input.split_at_checked(length).ok_or(BadReservations)?;
    *input = rest;
    String::from_utf8(text.to_vec()).map_err(|_| BadReservations)
}
