//! The namespace: what is where, how large, since when. Knows nothing of the kernel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pss_core::state::Volume;
use pss_core::types::{BLOCK_BYTES, ChunkIndex, ServerId, Slot, VolumeId};
use pss_core::volume::device::{Extent, ReadPart};
use pss_core::wire::client::{ChunkStatus, REQUEST_BYTES_MAX, ServerStatus, VolumeStatus};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::error::FsError;
use crate::node::{IMAGES_NAME, Node, parse_number};
use crate::source::Source;

/// How much of a volume is asked about at once when its extents are searched.
const EXTENTS_WINDOW_BYTES: u64 = 64 << 30;
/// How often a file is read whose digest is asked for and that is changed meanwhile.
const DIGEST_TRIES: usize = 3;
/// Volumes asked about at a time.
const VOLUMES_ASKED_MAX: usize = 16;
/// For so long the servers' progress is not asked for again: it only grows.
const STATUSES_KEPT: Duration = Duration::from_secs(1);

/// Slot of the last change: `user.pss.slot`.
const SLOT: &str = "user.pss.slot";
/// SHA-256 of a chunk's data, in hexadecimal digits.
const DIGEST: &str = "user.pss.digest";
/// Bytes that take space.
const ALLOCATED: &str = "user.pss.allocated_bytes";
/// Servers whose copy holds the last change, such as `0,1,2`.
const COPIES: &str = "user.pss.copies";

/// The cell's volumes and chunks as a tree.
pub struct Namespace {
    source: Arc<Source>,
    /// Whether `.volumes` is listed.
    shows_images: bool,
    /// Volumes as last seen: a chunk's size never changes, and the volume's size is asked for again when something
    /// lies behind it.
    known: Mutex<HashMap<VolumeId, Volume>>,
    statuses: Mutex<Option<(Instant, Vec<ServerStatus>)>>,
}

/// What there is to say of a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attributes {
    /// Which.
    pub node: Node,
    /// Length of the file; 0 for directories.
    pub size_bytes: u64,
    /// Bytes that take space, on each server that has a copy.
    pub allocated_bytes: u64,
    /// When it was changed last, milliseconds since the beginning of 1970, UTC; 0: unknown. Of directories of chunks:
    /// when the volume was.
    pub changed_ms: u64,
    /// Slot of the last change.
    pub changed: Slot,
    /// Two and the directories in it; 1 for files.
    pub links: u32,
}

impl Attributes {
    /// Of an empty directory.
    pub(crate) const NOTHING: Attributes = Attributes {
        node: Node::Root,
        size_bytes: 0,
        allocated_bytes: 0,
        changed_ms: 0,
        changed: Slot(0),
        links: 2,
    };
}

/// An entry of a directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The rest.
    pub attributes: Attributes,
}

/// What [`Namespace::seek`] looks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// Room on the servers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Capacity {
    /// Of the smallest file system, bytes.
    pub total_bytes: u64,
    /// Where least is free, bytes.
    pub free_bytes: u64,
}

impl Namespace {
    /// The namespace of a cell; `.volumes` is there in any case, and listed if `shows_images`.
    pub fn new(source: Source, shows_images: bool) -> Namespace {
        Namespace {
            source: Arc::new(source),
            shows_images,
            known: Mutex::default(),
            statuses: Mutex::default(),
        }
    }

    /// Where answers come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The node of a path such as `/vol001/00/00/01`. The leading `/` may be missing.
    ///
    /// # Errors
    /// [`FsError`].
    pub async fn resolve(&self, path: &str) -> Result<Attributes, FsError> {
        let mut at = None;
        for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
            let parent = at.map_or(Node::Root, |at: Attributes| at.node);
            at = Some(match name {
                // Nothing that the servers have is named so.
                ".." => self.attributes(parent.parent()).await?,
                name => self.lookup(parent, name).await?,
            });
        }
        let found = match at {
            Some(found) => found,
            None => self.attributes(Node::Root).await?,
        };
        match path.ends_with('/') && !found.node.is_directory() {
            true => Err(FsError::NotDirectory),
            false => Ok(found),
        }
    }

    /// The entry of that name in a directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`] and outages.
    pub async fn lookup(&self, parent: Node, name: &str) -> Result<Attributes, FsError> {
        let node = match parent {
            Node::Root if name == IMAGES_NAME => Node::Images,
            Node::Root | Node::Images => {
                let volumes = self.volumes().await?;
                let named = volumes.iter().find(|status| status.volume.name == name);
                let status = named.ok_or(FsError::NotFound)?;
                if parent == Node::Images {
                    return Ok(image(status));
                }
                return volume_directory(&self.source, status).await;
            }
            Node::Volume(_) | Node::Branch(..) | Node::Leaf(..) => {
                let child = parse_number(name).and_then(|number| parent.child(number));
                child.ok_or(FsError::NotFound)?
            }
            Node::Image(_) | Node::Chunk(..) => return Err(FsError::NotDirectory),
        };
        self.attributes(node).await
    }

    /// What there is to say of a node.
    ///
    /// # Errors
    /// [`FsError::NotFound`] and outages.
    pub async fn attributes(&self, node: Node) -> Result<Attributes, FsError> {
        match node {
            Node::Root | Node::Images => {
                let volumes = self.volumes().await?;
                Ok(collection(node, &volumes))
            }
            Node::Image(volume) => Ok(image(&self.volume(volume).await?)),
            Node::Volume(volume) => {
                let status = self.volume(volume).await?;
                volume_directory(&self.source, &status).await
            }
            Node::Branch(volume, _) | Node::Leaf(volume, _) => {
                let (status, directories) =
                    tokio::join!(self.volume(volume), self.source.directories(volume));
                let (status, directories) = (status?, directories?);
                let leaves = node.chunks().start >> 8..node.chunks().end >> 8;
                let is_in = |directory: &&u32| leaves.contains(directory);
                match directories.iter().filter(is_in).count() {
                    0 => Err(FsError::NotFound),
                    count => Ok(chunk_directory(node, &status, count)),
                }
            }
            Node::Chunk(volume, _) => {
                let (status, chunks) = tokio::join!(
                    self.volume(volume),
                    self.source.chunks(volume, node.chunks())
                );
                let (status, chunks) = (status?, chunks?);
                let found = chunks.first().ok_or(FsError::NotFound)?;
                Ok(chunk_file(&status.volume, found))
            }
        }
    }

    /// Everything in a directory, by name.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`] and outages.
    pub async fn list(&self, node: Node) -> Result<Vec<Entry>, FsError> {
        match node {
            Node::Root => self.list_root().await,
            Node::Images => {
                let volumes = self.volumes().await?;
                Ok(volumes
                    .iter()
                    .map(|status| named(status, image(status)))
                    .collect())
            }
            Node::Volume(volume) | Node::Branch(volume, _) => {
                let (status, directories) =
                    tokio::join!(self.volume(volume), self.source.directories(volume));
                let (status, directories) = (status?, directories?);
                let mut children: Vec<(Node, usize)> = Vec::new();
                let range = node.chunks();
                for leaf in directories {
                    if !range.contains(&(leaf << 8)) {
                        continue;
                    }
                    let leaf = Node::Leaf(volume, leaf as u16);
                    let child = match node {
                        Node::Volume(_) => leaf.parent(),
                        _ => leaf,
                    };
                    match children.last_mut() {
                        Some((last, count)) if *last == child => *count += 1,
                        _ => children.push((child, 1)),
                    }
                }
                let entry = |(child, count)| numbered(chunk_directory(child, &status, count));
                Ok(children.into_iter().filter_map(entry).collect())
            }
            Node::Leaf(volume, _) => {
                let (status, chunks) = tokio::join!(
                    self.volume(volume),
                    self.source.chunks(volume, node.chunks())
                );
                let (status, chunks) = (status?, chunks?);
                let entry = |chunk| numbered(chunk_file(&status.volume, chunk));
                Ok(chunks.iter().filter_map(entry).collect())
            }
            Node::Image(_) | Node::Chunk(..) => Err(FsError::NotDirectory),
        }
    }

    async fn list_root(&self) -> Result<Vec<Entry>, FsError> {
        let volumes = self.volumes().await?;
        let mut entries = Vec::new();
        if self.shows_images {
            entries.push(Entry {
                name: IMAGES_NAME.to_owned(),
                attributes: collection(Node::Images, &volumes),
            });
        }
        // All at once: there may be hundreds, and the leader far away.
        let under_way = Arc::new(Semaphore::new(VOLUMES_ASKED_MAX));
        let mut questions = JoinSet::new();
        for status in volumes {
            let (source, under_way) = (Arc::clone(&self.source), Arc::clone(&under_way));
            questions.spawn(async move {
                let _permit = under_way.acquire().await;
                let attributes = volume_directory(&source, &status).await?;
                Ok(named(&status, attributes))
            });
        }
        while let Some(entry) = questions.join_next().await {
            match entry.expect("questions do not panic") {
                Ok(entry) => entries.push(entry),
                // Deleted meanwhile.
                Err(FsError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Data of a file: at most up to its end, and at most [`REQUEST_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// [`FsError::IsDirectory`], [`FsError::NotFound`] if its volume was deleted, [`FsError::Damaged`], and outages.
    pub async fn read(
        &self,
        node: Node,
        offset_bytes: u64,
        length_bytes: usize,
    ) -> Result<Vec<ReadPart>, FsError> {
        let length = length_bytes.min(REQUEST_BYTES_MAX) as u64;
        let mut span = self.span(node).await?;
        let end = offset_bytes.saturating_add(length);
        // It may have grown.
        if end > span.length_bytes && span.may_grow {
            span = self.span_now(node).await?;
        }
        loop {
            let length = span.length_bytes.saturating_sub(offset_bytes).min(length);
            if length == 0 {
                return Ok(Vec::new());
            }
            let offset = span.offset_bytes + offset_bytes;
            match self.source.read(span.volume, offset, length as u32).await {
                // It became smaller after it was looked up; that has an end.
                Err(FsError::PastEnd) => {
                    let now = self.span_now(node).await?;
                    if now.length_bytes >= span.length_bytes {
                        return Err(FsError::Changing);
                    }
                    span = now;
                }
                result => return result,
            }
        }
    }

    /// Which parts of a file take space: from the start of the range, maybe not to its end, and not past the end of the
    /// file. Neighbours differ.
    ///
    /// # Errors
    /// As [`Namespace::read`].
    pub async fn extents(
        &self,
        node: Node,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<Vec<Extent>, FsError> {
        let span = self.span_now(node).await?;
        let rest = span.length_bytes.saturating_sub(offset_bytes);
        let length = length_bytes.min(rest).min(EXTENTS_WINDOW_BYTES);
        if length == 0 {
            return Ok(Vec::new());
        }
        let offset = span.offset_bytes + offset_bytes;
        self.source.extents(span.volume, offset, length).await
    }

    /// The next data, or the next hole, at or behind a position; the end of the file is a hole (lseek(2)).
    ///
    /// # Errors
    /// [`FsError::PastEnd`] at or behind the end of the file, or if no data follow; else as [`Namespace::read`].
    pub async fn seek(&self, node: Node, from_bytes: u64, what: Seek) -> Result<u64, FsError> {
        let length = self.span_now(node).await?.length_bytes;
        let patience = self.source.timeout() * 3 / 4;
        let started = Instant::now();
        let mut at = from_bytes;
        while at < length {
            // It may take thousands of questions. Data that are zeros, and no hole before the end, are answers as well.
            if started.elapsed() > patience {
                return Ok(match what {
                    Seek::Data => at,
                    Seek::Hole => length,
                });
            }
            let extents = self.extents(node, at, length - at).await?;
            let before = at;
            for extent in extents {
                if extent.allocated == (what == Seek::Data) {
                    return Ok(at);
                }
                at += extent.length_bytes;
            }
            if at == before {
                // It became smaller.
                break;
            }
        }
        match what {
            Seek::Hole if from_bytes < length => Ok(length),
            _ => Err(FsError::PastEnd),
        }
    }

    /// SHA-256 of a file's data, in hexadecimal digits, and what there was to say of the file while they were read.
    /// `progress` is told how many bytes are read, from the beginning again if the file was changed meanwhile.
    ///
    /// # Errors
    /// [`FsError::Changing`] if it was changed each time that it was read; else as [`Namespace::read`].
    pub async fn digest(
        &self,
        node: Node,
        progress: impl Fn(u64),
    ) -> Result<(String, Attributes), FsError> {
        let mut attributes = self.attributes(node).await?;
        for _ in 0..DIGEST_TRIES {
            let (digest, length) = self.digest_once(node, &progress).await?;
            let before = attributes;
            attributes = self.attributes(node).await?;
            // Also as long as it was: a file that ended early was changed, whatever it is now.
            if attributes == before && length == attributes.size_bytes {
                return Ok((digest, attributes));
            }
        }
        Err(FsError::Changing)
    }

    async fn digest_once(
        &self,
        node: Node,
        progress: impl Fn(u64),
    ) -> Result<(String, u64), FsError> {
        let mut digest = Sha256::new();
        let mut length = 0;
        loop {
            let parts = self.read(node, length, REQUEST_BYTES_MAX).await?;
            if parts.is_empty() {
                break;
            }
            for part in &parts {
                length += hash(&mut digest, part);
            }
            progress(length);
        }
        let digest = digest.finalize();
        let digits = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((digits, length))
    }

    /// Names of a node's extended attributes.
    pub fn attribute_names(&self, node: Node) -> &'static [&'static str] {
        match node {
            Node::Chunk(..) => &[SLOT, DIGEST, ALLOCATED, COPIES],
            // The digest of a whole volume would take as long as to read it.
            Node::Image(_) | Node::Volume(_) => &[SLOT, ALLOCATED, COPIES],
            Node::Root | Node::Images | Node::Branch(..) | Node::Leaf(..) => &[],
        }
    }

    /// An extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`]; else as [`Namespace::attributes`] and [`Namespace::read`].
    pub async fn attribute(&self, node: Node, name: &str) -> Result<String, FsError> {
        if !self.attribute_names(node).contains(&name) {
            return Err(FsError::NoAttribute);
        }
        if name == DIGEST {
            return Ok(self.digest(node, |_| {}).await?.0);
        }
        let attributes = self.attributes(node).await?;
        Ok(match name {
            SLOT => attributes.changed.to_string(),
            ALLOCATED => match node {
                Node::Volume(volume) => self.volume(volume).await?.allocated_bytes.to_string(),
                _ => attributes.allocated_bytes.to_string(),
            },
            _ => {
                let copies = self.copies(attributes.changed).await;
                let copies: Vec<String> = copies.iter().map(ServerId::to_string).collect();
                copies.join(",")
            }
        })
    }

    /// Servers that answer and whose chunks hold everything up to a slot.
    pub async fn copies(&self, changed: Slot) -> Vec<ServerId> {
        let holds =
            |status: &&ServerStatus| status.copying.is_none() && status.applied >= changed.0;
        let mut statuses = self.kept_statuses();
        if statuses.iter().filter(holds).count() < statuses.len() || statuses.is_empty() {
            // Who was behind may have caught up.
            statuses = self.statuses().await;
        }
        statuses
            .iter()
            .filter(holds)
            .map(|status| status.server)
            .collect()
    }

    /// Room on the servers; none if none answers.
    pub async fn capacity(&self) -> Option<Capacity> {
        let mut statuses = self.kept_statuses();
        if statuses.is_empty() {
            statuses = self.statuses().await;
        }
        Some(Capacity {
            total_bytes: statuses.iter().map(|status| status.total_bytes).min()?,
            free_bytes: statuses.iter().map(|status| status.free_bytes).min()?,
        })
    }

    /// A volume as it is now.
    ///
    /// # Errors
    /// [`FsError::NotFound`] and outages.
    pub async fn volume(&self, id: VolumeId) -> Result<VolumeStatus, FsError> {
        let volumes = self.volumes().await?;
        let found = volumes.into_iter().find(|status| status.volume.id == id);
        found.ok_or(FsError::NotFound)
    }

    /// All volumes as they are now, by name.
    ///
    /// # Errors
    /// Outages.
    pub async fn volumes(&self) -> Result<Vec<VolumeStatus>, FsError> {
        let mut volumes = self.source.volumes().await?;
        volumes.sort_by(|a, b| a.volume.name.cmp(&b.volume.name));
        let known = volumes
            .iter()
            .map(|status| (status.volume.id, status.volume.clone()));
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known.collect();
        Ok(volumes)
    }

    /// Where a file's data are, by what is known.
    async fn span(&self, node: Node) -> Result<Span, FsError> {
        let volume = node.volume().ok_or(FsError::IsDirectory)?;
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(&volume).and_then(|volume| span_of(node, volume))
        };
        match known {
            Some(span) => Ok(span),
            None => self.span_now(node).await,
        }
    }

    async fn span_now(&self, node: Node) -> Result<Span, FsError> {
        let volume = node.volume().ok_or(FsError::IsDirectory)?;
        let status = self.volume(volume).await?;
        span_of(node, &status.volume).ok_or(FsError::IsDirectory)
    }

    fn kept_statuses(&self) -> Vec<ServerStatus> {
        let kept = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((at, statuses)) if at.elapsed() < STATUSES_KEPT => statuses.clone(),
            _ => Vec::new(),
        }
    }

    async fn statuses(&self) -> Vec<ServerStatus> {
        let statuses = self.source.statuses().await;
        let mut kept = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some((Instant::now(), statuses.clone()));
        statuses
    }
}

async fn volume_directory(source: &Source, status: &VolumeStatus) -> Result<Attributes, FsError> {
    let leaves = source.directories(status.volume.id).await?;
    let mut branches: Vec<u32> = leaves.into_iter().map(|leaf| leaf >> 8).collect();
    branches.dedup();
    let node = Node::Volume(status.volume.id);
    Ok(directory(node, status, branches.len()))
}

/// The part of a volume that a file shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Span {
    volume: VolumeId,
    offset_bytes: u64,
    length_bytes: u64,
    /// Whether more may come: it ends where the volume ends, not where the chunk does.
    may_grow: bool,
}

fn span_of(node: Node, volume: &Volume) -> Option<Span> {
    let (offset_bytes, length_max) = match node {
        Node::Image(_) => (0, u64::MAX),
        Node::Chunk(_, chunk) => {
            let length = u64::from(volume.chunk_bytes);
            (u64::from(chunk.0) * length, length)
        }
        Node::Root | Node::Images | Node::Volume(_) | Node::Branch(..) | Node::Leaf(..) => {
            return None;
        }
    };
    let length_bytes = volume
        .size_bytes
        .saturating_sub(offset_bytes)
        .min(length_max);
    Some(Span {
        volume: volume.id,
        offset_bytes,
        length_bytes,
        may_grow: length_bytes < length_max,
    })
}

/// Adds a part to a digest and gives its length.
fn hash(digest: &mut Sha256, part: &ReadPart) -> u64 {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    match part {
        ReadPart::Data(data) => {
            digest.update(data);
            data.len() as u64
        }
        ReadPart::Hole(length) => {
            let mut left = *length as usize;
            while left > 0 {
                let now = left.min(ZEROS.len());
                digest.update(&ZEROS[..now]);
                left -= now;
            }
            u64::from(*length)
        }
    }
}

fn named(status: &VolumeStatus, attributes: Attributes) -> Entry {
    Entry {
        name: status.volume.name.clone(),
        attributes,
    }
}

fn numbered(attributes: Attributes) -> Option<Entry> {
    let name = attributes.node.number_name()?;
    Some(Entry { name, attributes })
}

/// The root or the directory of images.
fn collection(node: Node, volumes: &[VolumeStatus]) -> Attributes {
    let times = volumes.iter().map(|status| status.times);
    let directories = match node {
        Node::Root => volumes.len() + 1,
        _ => 0,
    };
    Attributes {
        node,
        size_bytes: 0,
        allocated_bytes: 0,
        changed_ms: times
            .clone()
            .map(|times| times.changed_ms.max(times.created_ms))
            .max()
            .unwrap_or(0),
        changed: times.map(|times| times.changed).max().unwrap_or_default(),
        links: 2 + directories as u32,
    }
}

fn directory(node: Node, status: &VolumeStatus, directories: usize) -> Attributes {
    Attributes {
        node,
        size_bytes: 0,
        allocated_bytes: 0,
        changed_ms: changed_ms(status),
        changed: status.times.changed.max(status.volume.created),
        links: 2 + directories as u32,
    }
}

/// A directory with that many leaves below it, or that is a leaf.
fn chunk_directory(node: Node, status: &VolumeStatus, leaves: usize) -> Attributes {
    let directories = match node {
        Node::Leaf(..) => 0,
        _ => leaves,
    };
    directory(node, status, directories)
}

fn image(status: &VolumeStatus) -> Attributes {
    Attributes {
        size_bytes: status.volume.size_bytes,
        allocated_bytes: status.allocated_bytes,
        links: 1,
        ..directory(Node::Image(status.volume.id), status, 0)
    }
}

fn chunk_file(volume: &Volume, chunk: &ChunkStatus) -> Attributes {
    let node = Node::Chunk(volume.id, ChunkIndex(chunk.chunk.0));
    Attributes {
        node,
        size_bytes: span_of(node, volume).map_or(0, |span| span.length_bytes),
        allocated_bytes: u64::from(chunk.allocated_blocks) * BLOCK_BYTES as u64,
        changed_ms: chunk.changed_ms,
        changed: chunk.changed,
        links: 1,
    }
}

/// When a volume was changed last; one that never was, when it was made.
fn changed_ms(status: &VolumeStatus) -> u64 {
    status.times.changed_ms.max(status.times.created_ms)
}
