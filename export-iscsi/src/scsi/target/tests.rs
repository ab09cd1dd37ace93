//! A target over volumes in memory, driven as the transport drives it.

mod blocks;
mod identity;
mod parsing;
mod reservations;
mod tasks;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pss_core::volume::device::{DeviceReply, Extent, ReadPart};

use super::super::actions::TaskAttribute;
use super::super::config::LunSettings;
use super::leftovers::range;
use super::*;

const MIB: u64 = 1 << 20;
const CELL_BLOCK: u64 = 4096;

/// A volume in memory.
struct Memory {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
    /// Answers everything with this.
    broken: Option<DeviceError>,
}

impl Memory {
    fn new(size: u64) -> Memory {
        Memory {
            bytes: vec![0; size as usize],
            allocated: vec![false; size.div_ceil(CELL_BLOCK) as usize],
            broken: None,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        let end = (offset + data.len() as u64).div_ceil(CELL_BLOCK);
        self.allocated[(offset / CELL_BLOCK) as usize..end as usize].fill(true);
    }

    fn answer(&mut self, request: &DeviceRequest) -> DeviceResult {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let (from, to) = range(request);
        if to > self.bytes.len() as u64 {
            return Err(DeviceError::OutOfRange);
        }
        match request {
            DeviceRequest::Read { .. } => {
                let data = Bytes::copy_from_slice(&self.bytes[from as usize..to as usize]);
                return Ok(DeviceReply::Data(vec![ReadPart::Data(data)]));
            }
            DeviceRequest::Write { data, .. } => self.write(from, data),
            DeviceRequest::WriteZeroes { allocate, .. } => {
                self.bytes[from as usize..to as usize].fill(0);
                if !allocate {
                    let first = from.div_ceil(CELL_BLOCK) as usize;
                    let end = (to / CELL_BLOCK) as usize;
                    if first < end {
                        self.allocated[first..end].fill(false);
                    }
                }
            }
            DeviceRequest::CompareAndWrite {
                expected, write, ..
            } => {
                let found = &self.bytes[from as usize..to as usize];
                if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
                    return Err(DeviceError::Miscompare(at as u64));
                }
                self.write(from, write);
            }
            DeviceRequest::Extents { .. } => {
                let mut extents: Vec<Extent> = Vec::new();
                let mut at = from;
                while at < to {
                    let end = ((at / CELL_BLOCK + 1) * CELL_BLOCK).min(to);
                    let allocated = self.allocated[(at / CELL_BLOCK) as usize];
                    match extents.last_mut() {
                        Some(last) if last.allocated == allocated => last.length_bytes += end - at,
                        _ => extents.push(Extent {
                            length_bytes: end - at,
                            allocated,
                        }),
                    }
                    at = end;
                }
                return Ok(DeviceReply::Extents(extents));
            }
            DeviceRequest::Trim { .. }
            | DeviceRequest::Flush
            | DeviceRequest::Look
            | DeviceRequest::Prefetch { .. } => {}
        }
        Ok(DeviceReply::Done)
    }
}

/// A target, its volumes, and what the initiators were sent.
struct Rig {
    target: Target,
    volumes: BTreeMap<u16, Memory>,
    reservations: BTreeMap<u16, Reservations>,
    /// Requests to devices, but for looks, wait here while `holds`.
    holds: bool,
    /// The cell does not answer: looks and requests to reservations fail.
    is_cut: bool,
    held: VecDeque<(u64, u16, DeviceRequest)>,
    done: Vec<(NexusId, u32, Outcome)>,
    aborted: Vec<(NexusId, u32)>,
    managed: Vec<(u32, super::super::actions::TaskResponse)>,
    dropped: Vec<NexusId>,
    next_tag: u32,
}

fn info(lun: u16, size_bytes: u64) -> DeviceInfo {
    DeviceInfo {
        name: format!("vol{lun:03}"),
        description: String::new(),
        size_bytes,
        read_only: false,
        minimum_block_bytes: 1,
        preferred_block_bytes: 4096,
        uuid: [lun as u8; 16],
    }
}

fn initiator(n: u64) -> NexusInfo {
    NexusInfo {
        initiator_name: format!("iqn.2026-01.test:i{n}"),
        isid: [0, 2, 0x3d, 0, 0, n as u8],
        portal_group: 1,
    }
}

const A: NexusId = NexusId(1);
const B: NexusId = NexusId(2);

impl Rig {
    /// One disk of 8 MiB as LUN 1, two initiators that have seen their power-on attention.
    fn new() -> Rig {
        Rig::with(LunSettings::default())
    }

    fn with(settings: LunSettings) -> Rig {
        let mut rig = Rig::of(vec![settings]);
        rig.clear_attentions();
        rig
    }

    fn of(disks: Vec<LunSettings>) -> Rig {
        let mut config = TargetConfig::new("iqn.2001-03.jp.tritech:tgtd-pss");
        let mut volumes = BTreeMap::new();
        for (lun, settings) in (1..).zip(disks) {
            config.luns.push(LunConfig {
                lun,
                info: info(lun, 8 * MIB),
                settings,
            });
            volumes.insert(lun, Memory::new(8 * MIB));
        }
        let mut target = Target::new(config);
        target.attach(A, initiator(1));
        target.attach(B, initiator(2));
        Rig {
            target,
            reservations: volumes
                .keys()
                .map(|lun| (*lun, Reservations::default()))
                .collect(),
            volumes,
            holds: false,
            is_cut: false,
            held: VecDeque::new(),
            done: Vec::new(),
            aborted: Vec::new(),
            managed: Vec::new(),
            dropped: Vec::new(),
            next_tag: 0,
        }
    }

    fn clear_attentions(&mut self) {
        let luns: Vec<u16> = self.target.units.keys().copied().collect();
        for nexus in [A, B] {
            for lun in &luns {
                while self.run(nexus, *lun, &[0; 6], &[]).status == Status::CheckCondition {}
            }
        }
    }

    /// Carries out what the target wants.
    fn drive(&mut self, mut actions: Actions) {
        while !actions.0.is_empty() {
            for action in std::mem::take(&mut actions.0) {
                match action {
                    Action::Submit {
                        cookie,
                        lun,
                        request,
                        reservations,
                    } => {
                        let current = self.reservations[&lun].version();
                        let looks = request == DeviceRequest::Look;
                        if looks && self.is_cut {
                            let silent = Err(DeviceError::Unavailable);
                            self.target.completed(cookie, silent, &mut actions);
                        } else if self.holds && !looks {
                            self.held.push_back((cookie, lun, request));
                        } else if reservations != current {
                            let changed = Err(DeviceError::ReservationChanged);
                            self.target.completed(cookie, changed, &mut actions);
                        } else {
                            let volume = self.volumes.get_mut(&lun).unwrap();
                            let result = volume.answer(&request);
                            self.target.completed(cookie, result, &mut actions);
                        }
                    }
                    Action::Reserve {
                        cookie,
                        lun,
                        request,
                    } => {
                        let state = self.reservations.get_mut(&lun).unwrap();
                        let reply = (!self.is_cut).then(|| ReservationReply {
                            result: state.apply(&request),
                            now: Arc::new(state.clone()),
                        });
                        self.target.reserved(cookie, reply, &mut actions);
                    }
                    Action::Done {
                        nexus,
                        tag,
                        outcome,
                    } => self.done.push((nexus, tag, outcome)),
                    Action::Aborted { nexus, tag } => self.aborted.push((nexus, tag)),
                    Action::Managed { id, response, .. } => self.managed.push((id, response)),
                    Action::DropSessions { nexuses } => self.dropped.extend(nexuses),
                }
            }
        }
    }

    /// Sends a command; its tag.
    fn send(&mut self, nexus: NexusId, lun: u16, cdb: &[u8], out: &[u8]) -> u32 {
        self.send_as(nexus, lun, cdb, out, TaskAttribute::Simple)
    }

    fn send_as(
        &mut self,
        nexus: NexusId,
        lun: u16,
        cdb: &[u8],
        out: &[u8],
        attribute: TaskAttribute,
    ) -> u32 {
        self.next_tag += 1;
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let command = Command {
            nexus,
            tag: self.next_tag,
            lun: super::super::report::encode_lun(lun),
            attribute,
            cdb: padded,
            long_cdb: None,
            data_out: match out.is_empty() {
                true => Vec::new(),
                false => vec![Bytes::copy_from_slice(out)],
            },
            read_bytes: 1 << 24,
            write_bytes: out.len() as u32,
        };
        let mut actions = Actions::default();
        self.target.submit(command, &mut actions);
        self.drive(actions);
        self.next_tag
    }

    /// How a command ended, if it has.
    fn ended(&mut self, tag: u32) -> Option<Outcome> {
        let at = self.done.iter().position(|(_, it, _)| *it == tag)?;
        Some(self.done.remove(at).2)
    }

    /// Sends a command that ends at once.
    fn run(&mut self, nexus: NexusId, lun: u16, cdb: &[u8], out: &[u8]) -> Outcome {
        let tag = self.send(nexus, lun, cdb, out);
        self.ended(tag).expect("the command has ended")
    }

    fn good(&mut self, lun: u16, cdb: &[u8], out: &[u8]) -> Vec<u8> {
        let outcome = self.run(A, lun, cdb, out);
        assert_eq!(outcome.status, Status::Good, "{:02x?} {outcome:x?}", cdb);
        let mut data = Vec::new();
        for part in outcome.data_in {
            match part {
                ReadPart::Data(bytes) => data.extend(bytes),
                ReadPart::Hole(zeros) => data.resize(data.len() + zeros as usize, 0),
            }
        }
        assert_eq!(data.len() as u64, outcome.in_bytes);
        data
    }

    /// Key and additional sense code of a command that fails.
    fn sense(&mut self, lun: u16, cdb: &[u8], out: &[u8]) -> (u8, u16) {
        let outcome = self.run(A, lun, cdb, out);
        sense_of(&outcome)
    }

    fn release_held(&mut self) {
        while let Some((cookie, lun, request)) = self.held.pop_front() {
            let result = self.volumes.get_mut(&lun).unwrap().answer(&request);
            let mut actions = Actions::default();
            self.target.completed(cookie, result, &mut actions);
            self.drive(actions);
        }
    }

    fn tick(&mut self, seconds: u64) {
        let mut actions = Actions::default();
        let now = Instant::default() + Duration::from_secs(seconds);
        self.target.tick(now, &mut actions);
        self.drive(actions);
    }
}

fn sense_of(outcome: &Outcome) -> (u8, u16) {
    assert_eq!(outcome.status, Status::CheckCondition, "{outcome:x?}");
    let sense = &outcome.sense;
    match sense[0] & 0x7f {
        0x72 => (sense[1], u16::from_be_bytes([sense[2], sense[3]])),
        _ => (sense[2], u16::from_be_bytes([sense[12], sense[13]])),
    }
}

const INVALID_CDB: (u8, u16) = (5, 0x2400);
const OUT_OF_RANGE: (u8, u16) = (5, 0x2100);

/// A 10-byte CDB with an LBA and a number of blocks.
fn cdb10(opcode: u8, flags: u8, lba: u32, blocks: u16) -> Vec<u8> {
    let mut cdb = vec![opcode, flags];
    cdb.extend(lba.to_be_bytes());
    cdb.push(0);
    cdb.extend(blocks.to_be_bytes());
    cdb.push(0);
    cdb
}

/// A 12-byte CDB with an LBA and a number of blocks.
fn cdb12(opcode: u8, flags: u8, lba: u32, blocks: u32) -> Vec<u8> {
    let mut cdb = vec![opcode, flags];
    cdb.extend(lba.to_be_bytes());
    cdb.extend(blocks.to_be_bytes());
    cdb.extend([0, 0]);
    cdb
}

/// A 16-byte CDB with an LBA and a number of blocks.
fn cdb16(opcode: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    let mut cdb = vec![opcode, flags];
    cdb.extend(lba.to_be_bytes());
    cdb.extend(blocks.to_be_bytes());
    cdb.extend([0, 0]);
    cdb
}

/// Bytes that differ from their neighbours.
fn pattern(blocks: usize, seed: u8) -> Vec<u8> {
    (0..blocks * 512)
        .map(|at| (at as u8).wrapping_mul(7) ^ (at >> 9) as u8 ^ seed)
        .collect()
}
