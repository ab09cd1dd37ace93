//! Mode pages: MODE SENSE and MODE SELECT (SPC-4 §6.11 to §6.16, §7.5; SBC-3 §6.5).

use super::cdb::Cdb;
use super::job::{Answer, Begin, Begun};
use super::sense::{Asc, Failure, Sense};
use super::unit::{Disk, Unit};

/// Read-write error recovery (SBC-3 §6.5.8).
const ERROR_RECOVERY: u8 = 0x01;
/// Caching (SBC-3 §6.5.5).
const CACHING: u8 = 0x08;
/// Control (SPC-4 §7.5.8).
const CONTROL: u8 = 0x0a;
/// Informational exceptions control (SBC-3 §6.5.7).
const EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

const WCE: u8 = 0x04;
const D_SENSE: u8 = 0x04;
const SWP: u8 = 0x08;

/// The mode pages of a logical unit: what can be changed in them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ModePages {
    default_write_cache: bool,
    /// WCE: said, without effect.
    write_cache: bool,
    /// D_SENSE: sense data in descriptor format.
    pub(super) descriptor_sense: bool,
    /// SWP.
    pub(super) write_protected: bool,
}

/// Which values a MODE SENSE wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum PageControl {
    Current,
    Changeable,
    Default,
}

impl ModePages {
    /// The default values.
    pub(super) fn new(write_cache: bool) -> ModePages {
        ModePages {
            default_write_cache: write_cache,
            write_cache,
            descriptor_sense: false,
            write_protected: false,
        }
    }

    /// A page, with its header.
    fn page(&self, code: u8, control: PageControl) -> Option<Vec<u8>> {
        let values = match control {
            PageControl::Current => *self,
            PageControl::Changeable => ModePages {
                write_cache: true,
                descriptor_sense: true,
                write_protected: true,
                ..*self
            },
            PageControl::Default => ModePages::new(self.default_write_cache),
        };
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let mut page = match code {
            ERROR_RECOVERY => vec![code, 0x0a, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            CACHING => {
                let mut page = vec![0; 20];
                page[..3].copy_from_slice(&[code, 0x12, flag(values.write_cache, WCE)]);
                page
            }
            CONTROL => {
                let mut page = vec![0; 12];
                page[..2].copy_from_slice(&[code, 0x0a]);
                page[2] = flag(values.descriptor_sense, D_SENSE);
                // QUEUE ALGORITHM MODIFIER 1: unrestricted reordering.
                page[3] = 0x10;
                page[4] = flag(values.write_protected, SWP);
                // BUSY TIMEOUT PERIOD: unlimited.
                page[8..10].copy_from_slice(&[0xff, 0xff]);
                page
            }
            EXCEPTIONS => vec![code, 0x0a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            _ => return None,
        };
        if control == PageControl::Changeable {
            let fixed = self.masked(code);
            for (byte, mask) in page[2..].iter_mut().zip(&fixed[2..]) {
                *byte &= mask;
            }
        }
        Some(page)
    }

    /// Bits of a page that can be changed.
    fn masked(&self, code: u8) -> [u8; 20] {
        let mut mask = [0; 20];
        match code {
            CACHING => mask[2] = WCE,
            CONTROL => {
                mask[2] = D_SENSE;
                mask[4] = SWP;
            }
            _ => {}
        }
        mask
    }

    /// Takes over a page of a MODE SELECT; `at` is where it stands in the parameter list.
    fn select(&mut self, page: &[u8], at: usize) -> Result<(), Sense> {
        let code = page[0] & 0x3f;
        let current = self
            .page(code, PageControl::Current)
            .ok_or(Sense::parameter(at))?;
        if page.len() != current.len() {
            return Err(Sense::parameter(at + 1));
        }
        let mask = self.masked(code);
        for (index, (new, old)) in page.iter().zip(&current).enumerate().skip(2) {
            if (new ^ old) & !mask[index] != 0 {
                return Err(Sense::parameter(at + index));
            }
        }
        match code {
            CACHING => self.write_cache = page[2] & WCE != 0,
            CONTROL => {
                self.descriptor_sense = page[2] & D_SENSE != 0;
                self.write_protected = page[4] & SWP != 0;
            }
            _ => {}
        }
        Ok(())
    }
}

/// MODE SENSE(6) and (10).
pub(super) fn sense(unit: &Unit, cdb: &Cdb) -> Begin {
    let long = cdb.u8(0) == 0x5a;
    let allocation = match long {
        true => u64::from(cdb.u16(7)),
        false => u64::from(cdb.u8(4)),
    };
    let control = match cdb.u8(2) >> 6 {
        0 => PageControl::Current,
        1 => PageControl::Changeable,
        2 => PageControl::Default,
        _ => return Err(Sense::illegal(Asc::SAVING_PARAMETERS_NOT_SUPPORTED).into()),
    };
    let (code, subpage) = (cdb.u8(2) & 0x3f, cdb.u8(3));
    let wanted: &[u8] = match code {
        ALL_PAGES if subpage == 0 || subpage == ALL_SUBPAGES => pages_of(unit),
        ALL_PAGES => return Err(Sense::cdb(3).into()),
        _ => &[code],
    };
    if code != ALL_PAGES && subpage != 0 && subpage != ALL_SUBPAGES {
        return Err(Sense::cdb(3).into());
    }
    let mut pages = Vec::new();
    for code in wanted {
        let page = unit.mode.page(*code, control);
        let page = page.filter(|_| pages_of(unit).contains(code));
        pages.extend(page.ok_or(Sense::cdb_bit(2, 5))?);
    }
    let block_descriptor = match &unit.disk {
        Some(disk) if !cdb.bit(1, 3) => block_descriptor(disk, long && cdb.bit(1, 4)),
        _ => Vec::new(),
    };
    let specific = unit.disk.as_ref().map_or(0, |disk| {
        let protected = disk.is_read_only() || unit.mode.write_protected;
        u8::from(protected) << 7 | 0x10
    });
    let mut data = header(
        long,
        specific,
        block_descriptor.len(),
        pages.len(),
        long && cdb.bit(1, 4),
    );
    data.extend(block_descriptor);
    data.extend(pages);
    Ok(Begun::Done(Answer::data(data, allocation)))
}

fn pages_of(unit: &Unit) -> &'static [u8] {
    match unit.disk {
        Some(_) => &[ERROR_RECOVERY, CACHING, CONTROL, EXCEPTIONS],
        None => &[CONTROL, EXCEPTIONS],
    }
}

/// Mode parameter header (SPC-4 §7.5.5).
fn header(long: bool, specific: u8, descriptor: usize, pages: usize, long_lba: bool) -> Vec<u8> {
    if long {
        let length = (6 + descriptor + pages) as u16;
        let [high, low] = length.to_be_bytes();
        let long_lba = u8::from(long_lba && descriptor > 0);
        vec![high, low, 0, specific, long_lba, 0, 0, descriptor as u8]
    } else {
        let length = (3 + descriptor + pages) as u8;
        vec![length, 0, specific, descriptor as u8]
    }
}

/// Mode parameter block descriptor (SBC-3 §6.5.2).
fn block_descriptor(disk: &Disk, long_lba: bool) -> Vec<u8> {
    let block_bytes = disk.settings.block_bytes;
    let mut out = Vec::new();
    if long_lba {
        out.extend(disk.blocks().to_be_bytes());
        out.extend([0; 4]);
        out.extend(block_bytes.to_be_bytes());
    } else {
        let blocks = u32::try_from(disk.blocks()).unwrap_or(u32::MAX);
        out.extend(blocks.to_be_bytes());
        out.extend(block_bytes.to_be_bytes());
    }
    out
}

/// MODE SELECT(6) and (10). Returns the new pages; they count from all or none of the list.
pub(super) fn select(unit: &Unit, cdb: &Cdb, list: &[u8]) -> Result<ModePages, Failure> {
    let long = cdb.u8(0) == 0x55;
    let length = match long {
        true => usize::from(cdb.u16(7)),
        false => usize::from(cdb.u8(4)),
    };
    if !cdb.bit(1, 4) && length > 0 {
        // Without PF the pages are of the vendor's making.
        return Err(Sense::cdb_bit(1, 4).into());
    }
    if cdb.bit(1, 0) {
        return Err(Sense::cdb_bit(1, 0).into());
    }
    if length == 0 {
        return Ok(unit.mode);
    }
    let list = list.get(..length).ok_or(Sense::list_length())?;
    let header_bytes = if long { 8 } else { 4 };
    let header = list.get(..header_bytes).ok_or(Sense::list_length())?;
    let (descriptor_bytes, long_lba) = match long {
        true => (
            usize::from(u16::from_be_bytes([header[6], header[7]])),
            header[4] & 1 == 1,
        ),
        false => (usize::from(header[3]), false),
    };
    let mut at = header_bytes + descriptor_bytes;
    let descriptor = list.get(header_bytes..at).ok_or(Sense::list_length())?;
    check_block_descriptor(unit, descriptor, long_lba, header_bytes)?;
    let mut pages = unit.mode;
    while at < list.len() {
        let rest = &list[at..];
        if rest[0] & 0x40 != 0 || !pages_of(unit).contains(&(rest[0] & 0x3f)) {
            return Err(Sense::parameter(at).into());
        }
        let page = rest
            .get(1)
            .and_then(|length| rest.get(..2 + usize::from(*length)))
            .ok_or(Sense::list_length())?;
        pages.select(page, at)?;
        at += page.len();
    }
    Ok(pages)
}

/// The capacity and the block size cannot be changed.
fn check_block_descriptor(
    unit: &Unit,
    descriptor: &[u8],
    long_lba: bool,
    at: usize,
) -> Result<(), Sense> {
    if descriptor.is_empty() {
        return Ok(());
    }
    let Some(disk) = &unit.disk else {
        return Err(Sense::parameter(at));
    };
    let present = block_descriptor(disk, long_lba);
    if descriptor.len() != present.len() {
        return Err(Sense::parameter(at - 1));
    }
    let blocks = descriptor.len() / 2;
    let zero_or_same = |range: std::ops::Range<usize>| {
        descriptor[range.clone()].iter().all(|byte| *byte == 0)
            || descriptor[range.clone()] == present[range]
    };
    // The first byte of the block length is reserved in the short form.
    let length_at = descriptor.len() - 3;
    if !zero_or_same(0..blocks) || descriptor[length_at..] != present[length_at..] {
        return Err(Sense::parameter(at));
    }
    Ok(())
}
