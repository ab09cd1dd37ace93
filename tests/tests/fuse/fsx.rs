//! Random changes to a volume over NBD, and random looks at it through a mount, as fsx does it to a file: after each
//! answered change every look must give what a model of the volume has.
//!
//! `PSS_FSX_SEED` chooses the run and `PSS_FSX_OPERATIONS` its length.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;

use pss_tests::fuse::{Mapping, Mount};
use pss_tests::nbd_client::{self, NbdClient};
use pss_tests::processes::{Cell, Layout, PATIENCE};
use pss_tests::rng::Rng;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::{random, read_fully};

const BLOCK: u64 = 4096;
const PAGE: usize = 4096;
/// Small, so that chunks come and go, and there is more than one directory of them.
const CHUNK: u64 = 64 << 10;
const SIZE_MIN: u64 = 4 << 20;
const SIZE_MAX: u64 = 24 << 20;
const LENGTH_MAX: u64 = 100_000;
/// Mappings and open files that are kept over other operations.
const KEPT_MAX: usize = 3;
/// Operations that are shown if one fails.
const SHOWN: usize = 20;

/// Whether a block takes space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Space {
    Hole,
    Data,
}

/// The volume as it should be.
struct Model {
    bytes: Vec<u8>,
    blocks: Vec<Space>,
}

impl Model {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        self.bytes[offset as usize..end as usize].copy_from_slice(data);
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            self.blocks[block as usize] = Space::Data;
        }
    }

    /// Whole blocks give their space back; parts of blocks are written like data.
    fn zero(&mut self, offset: u64, length: u64) {
        self.write(offset, &vec![0; length as usize]);
        self.free(offset, offset + length);
    }

    /// What is no whole block is left alone.
    fn trim(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let (first, last) = self.free(offset, end);
        if first < last {
            let end = (last * BLOCK).min(self.size());
            self.bytes[(first * BLOCK) as usize..end as usize].fill(0);
        }
    }

    fn free(&mut self, offset: u64, end: u64) -> (u64, u64) {
        let first = offset.div_ceil(BLOCK);
        // The last one of the volume may be shorter.
        let last = match end == self.size() {
            true => end.div_ceil(BLOCK),
            false => end / BLOCK,
        };
        for block in first..last {
            self.blocks[block as usize] = Space::Hole;
        }
        (first, last)
    }

    fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.blocks
            .resize(size.div_ceil(BLOCK) as usize, Space::Hole);
    }

    fn chunks(&self) -> u64 {
        self.size().div_ceil(CHUNK)
    }

    /// Empty behind the end.
    fn range_of(&self, chunk: u64) -> std::ops::Range<u64> {
        let size = self.size();
        (chunk * CHUNK).min(size)..((chunk + 1) * CHUNK).min(size)
    }

    /// Bytes of a range that take space.
    fn allocated(&self, range: std::ops::Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let blocks = (range.start / BLOCK) as usize..range.end.div_ceil(BLOCK) as usize;
        let data = self.blocks[blocks].iter();
        data.filter(|space| **space == Space::Data).count() as u64 * BLOCK
    }

    /// A chunk without a block is none.
    fn exists(&self, chunk: u64) -> bool {
        self.allocated(self.range_of(chunk)) > 0
    }

    /// The next byte at or behind one whose block is of a kind, before an end.
    fn seek(&self, from: u64, end: u64, what: Space) -> Option<u64> {
        let of_kind = |at: &u64| self.blocks[(at / BLOCK) as usize] == what;
        let later = (from / BLOCK + 1..end.div_ceil(BLOCK)).map(|block| block * BLOCK);
        std::iter::once(from).chain(later).find(of_kind)
    }
}

/// Part of a file that stays mapped.
struct KeptMapping {
    mapping: Mapping,
    from: u64,
    /// What each of its pages has held since it was mapped, as hashes.
    held: Vec<HashSet<u64>>,
}

impl KeptMapping {
    fn note(&mut self, model: &Model) {
        for (page, held) in self.held.iter_mut().enumerate() {
            let from = self.from as usize + page * PAGE;
            held.insert(hash(&model.bytes[from..][..PAGE]));
        }
    }

    /// Pages may be as old as the mapping, but not older, and not torn.
    fn check(&self) {
        for (page, held) in self.held.iter().enumerate() {
            let bytes = self.mapping.read(page * PAGE, PAGE);
            let at = self.from as usize + page * PAGE;
            assert!(held.contains(&hash(&bytes)), "mapped page at {at}");
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

struct Run {
    seed: u64,
    rng: Rng,
    cell: Cell,
    mount: Mount,
    client: Option<NbdClient>,
    model: Model,
    image: File,
    /// Files of chunks that stay open, whether their chunk exists or not.
    open: BTreeMap<u64, File>,
    mapped: Vec<KeptMapping>,
    last: VecDeque<String>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("PSS_FSX_SEED={} repeats this run; its end:", self.seed);
            for operation in &self.last {
                println!("    {operation}");
            }
        }
    }
}

impl Run {
    fn start(seed: u64) -> Run {
        let cell = Cell::started(Layout::small(3), "1M");
        let size = 6 << 20;
        let create = format!("volume create w {size} --chunk-size {CHUNK}");
        cell.bench.run("pss", &create).done();
        let mount = Mount::start(&cell, "mnt", "--metadata-ttl 0s");
        let image = File::open(mount.path(".volumes/w")).unwrap();
        let mut model = Model {
            bytes: Vec::new(),
            blocks: Vec::new(),
        };
        model.resize(size);
        Run {
            seed,
            rng: Rng::new(seed),
            cell,
            mount,
            client: None,
            model,
            image,
            open: BTreeMap::new(),
            mapped: Vec::new(),
            last: VecDeque::new(),
        }
    }

    fn step(&mut self, number: u64) {
        let kind = self.rng.below(1000);
        match kind {
            0..250 => self.write(number),
            250..350 => self.zero(number, nbd_client::Command::WriteZeroes),
            350..450 => self.zero(number, nbd_client::Command::Trim),
            450..460 => self.resize(number),
            460..600 => self.read_image(number),
            600..730 => self.read_chunk(number),
            730..800 => self.stat(number),
            800..840 => self.list(number),
            840..870 => self.walk(number),
            870..920 => self.seek(number),
            _ => self.map(number),
        }
    }

    fn say(&mut self, number: u64, what: String) {
        self.last.push_back(format!("{number}: {what}"));
        if self.last.len() > SHOWN {
            self.last.pop_front();
        }
    }

    /// Somewhere in the volume: often at the edge of a block or a chunk, or around the end.
    fn place(&mut self) -> (u64, u64) {
        let size = self.model.size();
        let offset = match self.rng.below(6) {
            0 => self.rng.below(size) / CHUNK * CHUNK,
            1 => self.rng.below(size) / BLOCK * BLOCK,
            2 => size - self.rng.between(1, LENGTH_MAX),
            _ => self.rng.below(size),
        };
        let length = match self.rng.below(6) {
            0 => self.rng.between(1, 4) * CHUNK,
            1 => self.rng.between(1, 16) * BLOCK,
            2 => self.rng.between(1, 600),
            3 => size - offset,
            _ => self.rng.between(1, LENGTH_MAX),
        };
        (offset, length.min(size - offset).min(4 * LENGTH_MAX))
    }

    fn request(&mut self, command: nbd_client::Command, offset: u64, length: u64, data: &[u8]) {
        let client = self.client.get_or_insert_with(|| {
            NbdClient::connect(self.cell.nbd(0), "w", PATIENCE).expect("the gateway serves")
        });
        let reply = client.request(command, offset, length as u32, data);
        assert_eq!(reply.unwrap().error, 0, "{command:?} {offset} {length}");
    }

    fn write(&mut self, number: u64) {
        let (offset, length) = self.place();
        self.say(number, format!("write {length} at {offset}"));
        let data = random(&mut self.rng, length as usize);
        self.request(nbd_client::Command::Write, offset, length, &data);
        self.model.write(offset, &data);
        self.changed();
    }

    fn zero(&mut self, number: u64, command: nbd_client::Command) {
        let (offset, length) = self.place();
        self.say(number, format!("{command:?} {length} at {offset}"));
        self.request(command, offset, length, &[]);
        match command {
            nbd_client::Command::Trim => self.model.trim(offset, length),
            _ => self.model.zero(offset, length),
        }
        self.changed();
    }

    fn resize(&mut self, number: u64) {
        let size = self.rng.between(SIZE_MIN / 512, SIZE_MAX / 512) * 512;
        let size = match self.rng.below(3) {
            // Mostly, it grows. Within a block it must not become smaller: see the test at the end.
            0 => match size < self.model.size() {
                true => size / BLOCK * BLOCK,
                false => size,
            },
            _ => size.max(self.model.size() + 512).min(SIZE_MAX),
        };
        self.say(number, format!("resize to {size}"));
        // A gateway tells the size to new connections only; pages behind the end must not be touched.
        self.client = None;
        self.mapped.clear();
        let resize = format!("volume resize w {size} --allow-shrink --force");
        self.cell.bench.run("pss", &resize).done();
        self.model.resize(size);
    }

    fn changed(&mut self) {
        for mapped in &mut self.mapped {
            mapped.note(&self.model);
        }
    }

    fn read_image(&mut self, number: u64) {
        let offset = self.rng.below(self.model.size() + 10_000);
        let length = self.rng.between(1, LENGTH_MAX);
        self.say(number, format!("read {length} at {offset}"));
        let mut bytes = vec![0xee; length as usize];
        let again = match self.rng.chance(100) {
            true => Some(File::open(self.mount.path(".volumes/w")).unwrap()),
            false => None,
        };
        let count = read_fully(again.as_ref().unwrap_or(&self.image), &mut bytes, offset);
        let end = (offset + length).min(self.model.size()).max(offset);
        assert_eq!(count as u64, end - offset, "length of {number}");
        let start = offset.min(self.model.size()) as usize;
        let wanted = &self.model.bytes[start..][..count];
        assert!(bytes[..count] == *wanted, "data of {number}");
    }

    fn chunk_path(&self, chunk: u64) -> std::path::PathBuf {
        let [.., high, middle, low] = chunk.to_be_bytes();
        let name = format!("w/{high:02x}/{middle:02x}/{low:02x}");
        self.mount.path(&name)
    }

    /// The file of a chunk, if it is there as it should be.
    fn open_chunk(&mut self, chunk: u64) -> Option<File> {
        match (File::open(self.chunk_path(chunk)), self.model.exists(chunk)) {
            (Ok(file), true) => Some(file),
            (Err(error), false) if error.kind() == std::io::ErrorKind::NotFound => None,
            (result, exists) => panic!("chunk {chunk} exists: {exists}, but {result:?}"),
        }
    }

    /// Data of a new or a kept file of a chunk; a kept one reads as zeros when its chunk is gone.
    fn read_chunk(&mut self, number: u64) {
        let kept = self.open.len() as u64;
        let chunk = match self.rng.below(2) {
            0 if kept > 0 => *self
                .open
                .keys()
                .nth(number as usize % kept as usize)
                .unwrap(),
            _ => self.rng.below(self.model.chunks()),
        };
        let range = self.model.range_of(chunk);
        let offset = self.rng.below(CHUNK + 1000);
        let length = self.rng.between(1, CHUNK);
        self.say(
            number,
            format!("read {length} at {offset} of chunk {chunk}"),
        );
        let new = self.open_chunk(chunk);
        for file in [new.as_ref(), self.open.get(&chunk)].into_iter().flatten() {
            let mut bytes = vec![0xee; length as usize];
            let count = read_fully(file, &mut bytes, offset);
            let start = (range.start + offset).min(range.end);
            let end = (start + length).min(range.end);
            assert_eq!(count as u64, end - start, "length of {number}");
            let wanted = &self.model.bytes[start as usize..end as usize];
            assert!(bytes[..count] == *wanted, "data of {number}");
        }
        if let Some(new) = new {
            self.open.insert(chunk, new);
        }
        if self.open.len() > KEPT_MAX {
            self.open.pop_first();
        }
    }

    fn stat(&mut self, number: u64) {
        let chunk = self.rng.below(self.model.chunks() + 1);
        self.say(number, format!("stat of the volume and of chunk {chunk}"));
        let about = self.image.metadata().unwrap();
        let size = self.model.size();
        assert_eq!(about.len(), size, "size");
        assert_eq!(about.blocks() * 512, self.model.allocated(0..size), "space");
        let found = fs::metadata(self.chunk_path(chunk));
        if !self.model.exists(chunk) {
            let error = found.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "chunk {chunk}");
            return;
        }
        let (found, range) = (found.unwrap(), self.model.range_of(chunk));
        assert_eq!(found.len(), range.end - range.start, "chunk {chunk}");
        assert_eq!(found.blocks() * 512, self.model.allocated(range));
    }

    fn list(&mut self, number: u64) {
        self.say(number, "list".to_owned());
        for leaf in 0..=1u64 {
            let path = self.mount.path(&format!("w/00/{leaf:02x}"));
            let chunks = leaf * 256..((leaf + 1) * 256).min(self.model.chunks());
            let wanted: Vec<String> = chunks
                .filter(|chunk| self.model.exists(*chunk))
                .map(|chunk| format!("{:02x}", chunk % 256))
                .collect();
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
                    assert!(wanted.is_empty(), "{} is missing", path.display());
                    continue;
                }
            };
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            assert_eq!(names, wanted, "{}", path.display());
        }
    }

    /// All data and holes of the volume or of a chunk.
    fn walk(&mut self, number: u64) {
        let chunk = self.rng.below(self.model.chunks());
        let chunk_file = match self.rng.below(3) {
            0 => None,
            _ => self.open_chunk(chunk),
        };
        self.say(number, format!("walk, chunk {chunk}"));
        let (file, range) = match &chunk_file {
            Some(file) => (file, self.model.range_of(chunk)),
            None => (&self.image, 0..self.model.size()),
        };
        let mut at = range.start;
        while at < range.end {
            for (from, what) in [
                (SeekFrom::Data as fn(u64) -> SeekFrom, Space::Data),
                (SeekFrom::Hole, Space::Hole),
            ] {
                let wanted = match (self.model.seek(at, range.end, what), what) {
                    (Some(wanted), _) => Ok(wanted),
                    (None, Space::Hole) => Ok(range.end),
                    (None, Space::Data) => Err(Errno::NXIO),
                };
                let found = rustix::fs::seek(file, from(at - range.start));
                let found = found.map(|found| found + range.start);
                assert_eq!(found, wanted, "{what:?} from {at} in {range:?}");
                match found {
                    Ok(found) => at = found,
                    Err(_) => return,
                }
            }
        }
    }

    fn seek(&mut self, number: u64) {
        let size = self.model.size();
        let from = self.rng.below(size + 5000);
        self.say(number, format!("seek from {from}"));
        let data = rustix::fs::seek(&self.image, SeekFrom::Data(from));
        let hole = rustix::fs::seek(&self.image, SeekFrom::Hole(from));
        let next = |what| match from < size {
            true => self.model.seek(from, size, what),
            false => None,
        };
        assert_eq!(
            data,
            next(Space::Data).ok_or(Errno::NXIO),
            "data of {number}"
        );
        let wanted = match from < size {
            true => Ok(next(Space::Hole).unwrap_or(size)),
            false => Err(Errno::NXIO),
        };
        assert_eq!(hole, wanted, "hole of {number}");
    }

    /// A new mapping shows what is there now; those that are kept show nothing from before they were made.
    fn map(&mut self, number: u64) {
        for mapped in &self.mapped {
            mapped.check();
        }
        let shared = self.rng.chance(500);
        let from = self.rng.below(self.model.size()) / BLOCK * BLOCK;
        let length = self
            .rng
            .between(1, LENGTH_MAX)
            .min(self.model.size() - from);
        self.say(number, format!("map {length} at {from}, shared {shared}"));
        // Whoever maps has asked for the size: the kernel must know of a new one.
        assert_eq!(self.image.metadata().unwrap().len(), self.model.size());
        let mapping = Mapping::new(&self.image, from, length as usize, shared).unwrap();
        let wanted = &self.model.bytes[from as usize..][..length as usize];
        let keeps = self.rng.chance(500);
        if !keeps || self.rng.chance(500) {
            assert!(mapping.read(0, length as usize) == *wanted, "mapped data");
        }
        if keeps {
            let mut kept = KeptMapping {
                mapping,
                from,
                held: vec![HashSet::new(); length as usize / PAGE],
            };
            kept.note(&self.model);
            self.mapped.push(kept);
        }
        if self.mapped.len() > KEPT_MAX {
            self.mapped.remove(0);
        }
    }
}

fn number_from(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is a number")),
        Err(_) => default,
    }
}

#[test]
fn every_look_at_a_changing_volume_is_right() {
    let mut run = Run::start(number_from("PSS_FSX_SEED", 1));
    for number in 0..number_from("PSS_FSX_OPERATIONS", 2000) {
        run.step(number);
    }
}

/// A volume does not become smaller within a block, whose rest would come back; behind an end between blocks all are
/// zeros when it grows again.
#[test]
fn nothing_comes_back_from_behind_an_end() {
    let mut run = Run::start(1);
    let at = SIZE_MIN - BLOCK;
    let data = vec![1; BLOCK as usize];
    run.request(nbd_client::Command::Write, at, BLOCK, &data);
    run.client = None;
    let resize = |size: u64| {
        let resize = format!("volume resize w {size} --allow-shrink --force");
        run.cell.bench.run("pss", &resize)
    };
    let parts = ["multiple of 4096", &format!("use {SIZE_MIN}")];
    resize(at + 512).fails(2, &parts);
    let mut seen = vec![0xee; BLOCK as usize];
    assert_eq!(read_fully(&run.image, &mut seen, at), BLOCK as usize);
    assert_eq!(seen, data);
    for size in [at, at + 512, SIZE_MIN] {
        resize(size).done();
    }
    assert_eq!(read_fully(&run.image, &mut seen, at), BLOCK as usize);
    assert_eq!(seen, vec![0; BLOCK as usize]);
}
