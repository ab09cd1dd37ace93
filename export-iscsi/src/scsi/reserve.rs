//! PERSISTENT RESERVE IN and OUT, RESERVE(6) and RELEASE(6): between CDBs and the volume's reservations
//! (SPC-4 §6.15, §6.16; SPC-2 §7.16, §7.21).

use bytes::Bytes;
use pss_core::volume::device::DeviceResult;
use pss_core::volume::reservation::{
    Nexus, ReservationAction, ReservationRefusal, ReservationReply, ReservationRequest,
    ReservationType, Reservations,
};

use super::actions::{NexusInfo, Status};
use super::cdb::Cdb;
use super::config::TargetConfig;
use super::inquiry::target_port_name;
use super::job::{Answer, Begin, Begun, Job, Next, internal_failure, joined, length_of};
use super::sense::{Asc, Failure, Sense};

/// Longest parameter list of PERSISTENT RESERVE OUT: more TransportIDs than there may be registrations.
const PARAMETER_BYTES_MAX: usize = 64 << 10;
/// iSCSI in a TransportID (SPC-4 table 440).
const PROTOCOL_ISCSI: u8 = 0x05;

/// Names of the ports at both ends, as reservations know them (RFC 7143 §4.4.2).
pub(super) fn nexus_of(target: &str, info: &NexusInfo) -> Nexus {
    Nexus {
        initiator: initiator_port_name(&info.initiator_name, &info.isid),
        target: target_port_name(target, info.portal_group),
    }
}

fn initiator_port_name(name: &str, isid: &[u8; 6]) -> String {
    // iSCSI names are compared without regard to case (RFC 7143 §4.2.7.2).
    let name = name.to_ascii_lowercase();
    let isid: String = isid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name},i,0x{isid}")
}

/// Relative target port identifier of a target port's name.
fn relative_port(target: &str) -> u16 {
    target
        .rsplit_once(",t,0x")
        .and_then(|(_, group)| u16::from_str_radix(group, 16).ok())
        .unwrap_or(0)
}

/// RESERVE(6): of the whole unit only.
pub(super) fn reserve6(nexus: Nexus, cdb: &Cdb) -> Begin {
    if cdb.u8(1) & 0x11 != 0 {
        return Err(Sense::cdb(1).into());
    }
    Ok(ask(nexus, ReservationAction::ReserveUnit, Show::Nothing))
}

/// RELEASE(6).
pub(super) fn release6(nexus: Nexus, cdb: &Cdb) -> Begin {
    if cdb.u8(1) & 0x11 != 0 {
        return Err(Sense::cdb(1).into());
    }
    Ok(ask(nexus, ReservationAction::ReleaseUnit, Show::Nothing))
}

fn ask(nexus: Nexus, action: ReservationAction, show: Show) -> Begun {
    let request = ReservationRequest { nexus, action };
    Begun::Job(Box::new(ReserveJob {
        request: Some(request),
        show,
    }))
}

/// PERSISTENT RESERVE IN.
pub(super) fn persistent_in(nexus: Nexus, cdb: &Cdb) -> Begin {
    let allocation = cdb.u16(7);
    let what = match cdb.u8(1) & 0x1f {
        0 => In::Keys,
        1 => In::Reservation,
        2 => In::Capabilities,
        3 => In::FullStatus,
        _ => return Err(Sense::cdb_bit(1, 4).into()),
    };
    let show = Show::In(what, allocation);
    Ok(ask(nexus, ReservationAction::Read, show))
}

/// What the answer shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Show {
    Nothing,
    In(In, u16),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum In {
    Keys,
    Reservation,
    Capabilities,
    FullStatus,
}

struct ReserveJob {
    request: Option<ReservationRequest>,
    show: Show,
}

impl Job for ReserveJob {
    fn next(&mut self, _results: Vec<DeviceResult>) -> Next {
        match self.request.take() {
            Some(request) => Next::Reserve(request),
            None => Next::fail(internal_failure()),
        }
    }

    fn reserved(&mut self, reply: Option<ReservationReply>) -> Next {
        let Some(reply) = reply else {
            return Next::fail(Status::Busy);
        };
        if let Err(refusal) = reply.result {
            return Next::fail(refused(refusal));
        }
        match self.show {
            Show::Nothing => Next::good(),
            // While RESERVE(6) holds, persistent reservations are out of reach (SPC-2 §5.5.1).
            Show::In(..) if reply.now.unit_holder().is_some() => {
                Next::fail(Status::ReservationConflict)
            }
            Show::In(what, allocation) => {
                let data = what.encode(&reply.now);
                Next::Done(Ok(Answer::data(data, u64::from(allocation))))
            }
        }
    }
}

fn refused(refusal: ReservationRefusal) -> Failure {
    match refusal {
        ReservationRefusal::Conflict => Failure::Status(Status::ReservationConflict),
        ReservationRefusal::InvalidRelease => Sense::illegal(Asc::INVALID_RELEASE).into(),
        ReservationRefusal::TooMany => {
            Sense::illegal(Asc::INSUFFICIENT_REGISTRATION_RESOURCES).into()
        }
        // The SERVICE ACTION RESERVATION KEY.
        ReservationRefusal::InvalidField => Sense::parameter(8).into(),
    }
}

impl In {
    fn encode(self, now: &Reservations) -> Vec<u8> {
        match self {
            In::Keys => {
                let keys = now.registrations().flat_map(|(_, key)| key.to_be_bytes());
                with_header(now, keys.collect())
            }
            In::Reservation => with_header(now, reservation(now)),
            In::Capabilities => capabilities(now),
            In::FullStatus => {
                let status = now
                    .registrations()
                    .flat_map(|(nexus, key)| full_status(now, nexus, key));
                with_header(now, status.collect())
            }
        }
    }
}

fn with_header(now: &Reservations, body: Vec<u8>) -> Vec<u8> {
    let mut out = now.generation().to_be_bytes().to_vec();
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body);
    out
}

/// READ RESERVATION (SPC-4 §6.15.3). The key of an "all registrants" reservation is 0.
fn reservation(now: &Reservations) -> Vec<u8> {
    let Some(held) = now.held() else {
        return Vec::new();
    };
    let key = match held.kind.held_by_all() {
        true => 0,
        false => now.key(&held.by).unwrap_or(0),
    };
    let mut out = key.to_be_bytes().to_vec();
    out.extend([0, 0, 0, 0, 0, held.kind as u8, 0, 0]);
    out
}

/// REPORT CAPABILITIES (SPC-4 §6.15.4).
fn capabilities(now: &Reservations) -> Vec<u8> {
    // CRH, SIP_C, ATP_C, PTPL_C; TMV and, with TEST UNIT READY always allowed, ALLOW COMMANDS 001b;
    // PTPL_A; all six types.
    let persists = u8::from(now.aptpl());
    vec![0, 8, 0x1d, 0x90 | persists, 0xea, 0x01, 0, 0]
}

/// One descriptor of READ FULL STATUS (SPC-4 §6.15.5).
fn full_status(now: &Reservations, nexus: &Nexus, key: u64) -> Vec<u8> {
    let mut out = key.to_be_bytes().to_vec();
    out.extend([0; 4]);
    match now.held().filter(|_| now.is_holder(nexus)) {
        Some(held) => out.extend([0x01, held.kind as u8]),
        None => out.extend([0, 0]),
    }
    out.extend([0; 4]);
    out.extend(relative_port(&nexus.target).to_be_bytes());
    let id = transport_id(&nexus.initiator);
    out.extend((id.len() as u32).to_be_bytes());
    out.extend(id);
    out
}

/// iSCSI TransportID of an initiator port (SPC-4 §7.6.4.6): NUL-terminated, a multiple of four bytes, at
/// least 20 behind the header.
fn transport_id(initiator_port: &str) -> Vec<u8> {
    let mut name = initiator_port.as_bytes().to_vec();
    name.resize(((name.len() + 4) / 4 * 4).max(20), 0);
    let [high, low] = (name.len() as u16).to_be_bytes();
    let mut out = vec![0x40 | PROTOCOL_ISCSI, 0, high, low];
    out.extend(name);
    out
}

/// Takes a TransportID from the front of `list`, and says how long it was.
fn decode_transport_id(list: &[u8], at: usize) -> Result<(String, usize), Sense> {
    let header = list.get(..4).ok_or(Sense::list_length())?;
    // Only the form that names a port: a registration is of an I_T nexus.
    if header[0] != 0x40 | PROTOCOL_ISCSI {
        return Err(Sense::parameter(at));
    }
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if length < 20 || !length.is_multiple_of(4) {
        return Err(Sense::parameter(at + 2));
    }
    let name = list.get(4..4 + length).ok_or(Sense::list_length())?;
    let end = name.iter().position(|byte| *byte == 0);
    let name = &name[..end.ok_or(Sense::parameter(at + 4))?];
    let name = std::str::from_utf8(name).map_err(|_| Sense::parameter(at + 4))?;
    let (node, isid) = name
        .rsplit_once(",i,0x")
        .filter(|(node, _)| !node.is_empty() && node.len() <= 223)
        .ok_or(Sense::parameter(at + 4))?;
    // Written as we write it, so that it meets the name of the nexus.
    let isid = u64::from_str_radix(isid, 16)
        .ok()
        .filter(|_| isid.len() <= 12 && !isid.starts_with('+'))
        .ok_or(Sense::parameter(at + 4))?;
    let node = node.to_ascii_lowercase();
    Ok((format!("{node},i,0x{isid:012x}"), 4 + length))
}

/// PERSISTENT RESERVE OUT.
pub(super) fn persistent_out(
    config: &TargetConfig,
    nexus: Nexus,
    cdb: &Cdb,
    data: &[Bytes],
) -> Begin {
    let action = cdb.u8(1) & 0x1f;
    let length = cdb.u32(5) as usize;
    if !(24..=PARAMETER_BYTES_MAX).contains(&length) || length_of(data) < length as u64 {
        return Err(Sense::list_length().into());
    }
    let list = joined(data, length);
    let action = match action {
        7 => register_and_move(config, &list)?,
        _ => basic(config, &nexus, action, cdb, &list)?,
    };
    Ok(ask(nexus, action, Show::Nothing))
}

fn key_at(list: &[u8], at: usize) -> u64 {
    list[at..at + 8]
        .iter()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Basic parameter list (SPC-4 §6.16.3), whose 24 bytes are there.
fn basic(
    config: &TargetConfig,
    nexus: &Nexus,
    action: u8,
    cdb: &Cdb,
    list: &[u8],
) -> Result<ReservationAction, Failure> {
    let (key, service_key) = (key_at(list, 0), key_at(list, 8));
    let flags = list[20];
    let (spec_i_pt, all_ports, aptpl) = (flags >> 3 & 1 == 1, flags >> 2 & 1 == 1, flags & 1 == 1);
    let registers = matches!(action, 0 | 6);
    if spec_i_pt && action != 0 {
        return Err(Sense::parameter(20).into());
    }
    if list.len() != 24 && !spec_i_pt {
        return Err(Sense::list_length().into());
    }
    let kind = || {
        // SCOPE: the logical unit.
        if cdb.u8(2) >> 4 != 0 {
            return Err(Sense::cdb_bit(2, 7));
        }
        ReservationType::from_code(cdb.u8(2) & 0x0f).ok_or(Sense::cdb_bit(2, 3))
    };
    Ok(match action {
        0 | 6 => ReservationAction::Register {
            key,
            new_key: service_key,
            ignore_existing: action == 6,
            aptpl,
            also: further_nexuses(config, nexus, list, spec_i_pt, all_ports && registers)?,
        },
        1 => ReservationAction::Reserve { key, kind: kind()? },
        2 => ReservationAction::Release { key, kind: kind()? },
        3 => ReservationAction::Clear { key },
        4 | 5 => ReservationAction::Preempt {
            key,
            victim: service_key,
            kind: kind()?,
            abort: action == 5,
        },
        _ => return Err(Sense::cdb_bit(1, 4).into()),
    })
}

/// The nexuses that SPEC_I_PT and ALL_TG_PT add (SPC-4 §6.16.3).
fn further_nexuses(
    config: &TargetConfig,
    nexus: &Nexus,
    list: &[u8],
    spec_i_pt: bool,
    all_ports: bool,
) -> Result<Vec<Nexus>, Failure> {
    let mut initiators = vec![nexus.initiator.clone()];
    if spec_i_pt {
        let length = list.get(24..28).ok_or(Sense::list_length())?;
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let mut rest = length
            .checked_add(28)
            .and_then(|end| list.get(28..end))
            .ok_or(Sense::list_length())?;
        let mut at = 28;
        while !rest.is_empty() {
            let (initiator, length) = decode_transport_id(rest, at)?;
            initiators.push(initiator);
            rest = &rest[length..];
            at += length;
        }
    }
    let ports: Vec<String> = match all_ports {
        true => config
            .portal_groups
            .iter()
            .map(|group| target_port_name(&config.name, *group))
            .collect(),
        false => vec![nexus.target.clone()],
    };
    let mut also = Vec::new();
    for initiator in &initiators {
        for target in &ports {
            let other = Nexus {
                initiator: initiator.clone(),
                target: target.clone(),
            };
            if other != *nexus && !also.contains(&other) {
                also.push(other);
            }
        }
    }
    Ok(also)
}

/// REGISTER AND MOVE (SPC-4 §6.16.4).
fn register_and_move(config: &TargetConfig, list: &[u8]) -> Result<ReservationAction, Failure> {
    let flags = list[17];
    let port = u16::from_be_bytes([list[18], list[19]]);
    if !config.portal_groups.contains(&port) {
        return Err(Sense::parameter(18).into());
    }
    let length = u32::from_be_bytes([list[20], list[21], list[22], list[23]]) as usize;
    if list.len() != 24 + length {
        return Err(Sense::list_length().into());
    }
    let (initiator, used) = decode_transport_id(&list[24..], 24)?;
    if used != length {
        return Err(Sense::list_length().into());
    }
    Ok(ReservationAction::RegisterAndMove {
        key: key_at(list, 0),
        new_key: key_at(list, 8),
        unregister: flags >> 1 & 1 == 1,
        aptpl: flags & 1 == 1,
        to: Nexus {
            initiator,
            target: target_port_name(&config.name, port),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transport_ids_round_trip() {
        let port = "iqn.1993-08.org.debian:01:abc,i,0x00023d000001";
        let id = transport_id(port);
        assert_eq!(id[..2], [0x45, 0]);
        assert_eq!(id.len() % 4, 0);
        assert_eq!(decode_transport_id(&id, 24), Ok((port.into(), id.len())));
    }

    #[test]
    fn transport_ids_of_devices_and_other_protocols_are_refused() {
        let mut id = transport_id("iqn.2026-01.a:b,i,0x1");
        id[0] = 0x05;
        assert_eq!(decode_transport_id(&id, 24), Err(Sense::parameter(24)));
        id[0] = 0x46;
        assert!(decode_transport_id(&id, 24).is_err());
    }

    #[test]
    fn isid_is_written_in_one_form() {
        let id = transport_id("iqn.2026-01.A:b,i,0x23D000001");
        let (name, _) = decode_transport_id(&id, 0).unwrap();
        assert_eq!(name, "iqn.2026-01.a:b,i,0x00023d000001");
    }
}
