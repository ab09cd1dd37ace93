//! Directories that were put aside: of deleted volumes, and of many chunks that were zeroed together.
//!
//! Where an entry is applied nothing may take long, and to remove a million files does. So the directory
//! that holds them is renamed, which takes its chunks out of the volume at once, whatever their number;
//! its files are removed later, name by name, by a thread that has time.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::{VolumeChunks, lock};
use super::point::PointFailure;
use super::store::ChunkStore;
use super::{ChunkError, path};
use crate::disk::Disk;
use crate::state::Volume;
use crate::types::ChunkIndex;

/// Says which chunks a range takes part in; `None`: all.
pub(super) type Filter<'a> = Option<&'a dyn Fn(ChunkIndex) -> bool>;

/// What waits for its removal.
pub(super) struct Trash {
    /// The next directory gets this number in its name.
    next: AtomicU64,
    /// The last is removed first. At most a few hundred names beside the directories that were put
    /// aside: those of one path down to the files.
    left: Mutex<Vec<Rubbish>>,
}

/// Something in the trash.
#[derive(Clone)]
struct Rubbish {
    path: String,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    /// What is in it was not looked at.
    Directory,
    /// What was in it stood above it in the list.
    Emptied,
}

fn is_missing(result: &io::Result<()>) -> bool {
    let error = result.as_ref().err();
    error.is_some_and(|it| it.kind() == io::ErrorKind::NotFound)
}

impl Kind {
    fn of(is_dir: bool) -> Kind {
        if is_dir { Kind::Directory } else { Kind::File }
    }
}

impl Trash {
    /// Finds what an earlier life has left.
    pub(super) fn open(disk: &dyn Disk) -> Result<Trash, ChunkError> {
        let entries = disk
            .read_dir(path::TRASH)
            .map_err(|source| ChunkError::io("read", path::TRASH, source))?;
        let number = |name: &str| name.rsplit('.').next()?.parse::<u64>().ok();
        let last = entries.iter().filter_map(|entry| number(&entry.name)).max();
        let left = entries.iter().map(|entry| Rubbish {
            path: format!("{}/{}", path::TRASH, entry.name),
            kind: Kind::of(entry.is_dir),
        });
        Ok(Trash {
            left: Mutex::new(left.collect()),
            next: AtomicU64::new(last.unwrap_or(0).saturating_add(1)),
        })
    }
}

impl ChunkStore {
    /// Removes up to `names_max` files and directories of what was put aside, for a thread of little
    /// importance. Says whether there is more. What is left when the process ends is found at the next
    /// start.
    ///
    /// # Errors
    /// [`ChunkError::Io`]; it does no harm, and the same is tried again after everything else.
    pub fn empty_trash(&self, names_max: usize) -> Result<bool, ChunkError> {
        for _ in 0..names_max {
            let Some(rubbish) = lock(&self.trash.left).pop() else {
                return Ok(false);
            };
            if let Err(source) = self.remove(&rubbish) {
                let error = ChunkError::io("remove", &rubbish.path, source);
                // The rest does not wait for it.
                lock(&self.trash.left).insert(0, rubbish);
                return Err(error);
            }
        }
        Ok(!self.is_trash_empty())
    }

    /// Whether nothing is left for [`ChunkStore::empty_trash`].
    pub fn is_trash_empty(&self) -> bool {
        lock(&self.trash.left).is_empty()
    }

    /// Removes one name, or finds out what is to be removed before it.
    fn remove(&self, rubbish: &Rubbish) -> io::Result<()> {
        let path = &rubbish.path;
        let removed = match rubbish.kind {
            Kind::File => self.disk.remove_file(path),
            Kind::Emptied => self.disk.remove_dir_all(path),
            Kind::Directory => {
                let inside = self.disk.read_dir(path)?;
                let emptied = Rubbish {
                    path: path.clone(),
                    kind: Kind::Emptied,
                };
                let inside = inside.iter().map(|entry| Rubbish {
                    path: format!("{path}/{}", entry.name),
                    kind: Kind::of(entry.is_dir),
                });
                lock(&self.trash.left).extend([emptied].into_iter().chain(inside));
                Ok(())
            }
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts directories aside that belong to no volume of the checkpoint: of volumes that were made
    /// since, which entries to come make and write anew, or left over from copying another server's
    /// chunks.
    pub(super) fn throw_away_unknown(&self, volumes: &[Volume]) -> Result<(), ChunkError> {
        let known: BTreeSet<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        let entries = self
            .disk
            .read_dir(path::DATA)
            .map_err(|source| ChunkError::io("read", path::DATA, source))?;
        for entry in entries {
            if entry.is_dir && !entry.name.starts_with('.') && !known.contains(&*entry.name) {
                self.throw_away(&path::volume(&entry.name), "unknown")?;
            }
        }
        Ok(())
    }

    /// Puts a directory aside, if it exists. `owner` is for whoever looks into the trash.
    pub(super) fn throw_away(
        &self,
        directory: &str,
        owner: impl Display,
    ) -> Result<(), ChunkError> {
        let number = self.trash.next.fetch_add(1, Ordering::Relaxed);
        let to = format!("{}/{owner}.{number}", path::TRASH);
        let mut renamed = self.disk.rename(directory, &to);
        if is_missing(&renamed) {
            // Of what does not exist nothing is left; but it may be the trash that someone has removed.
            let made = self.disk.create_dir_all(path::TRASH);
            self.finish("create", path::TRASH, made)?;
            lock(&self.dirty).directories.insert(String::new());
            renamed = self.disk.rename(directory, &to);
        }
        if is_missing(&renamed) {
            return Ok(());
        }
        self.finish("rename", directory, renamed)?;
        let parent = directory.rsplit_once('/').map_or("", |(parent, _)| parent);
        let mut dirty = lock(&self.dirty);
        dirty.directories.insert(parent.to_owned());
        dirty.directories.insert(path::TRASH.to_owned());
        drop(dirty);
        lock(&self.trash.left).push(Rubbish {
            path: to,
            kind: Kind::Directory,
        });
        Ok(())
    }

    /// Makes the chunks not exist that fill whole directories within `chunks`, by putting the directories
    /// aside: at most 256 with 65,536 chunks each and 2 x 255 with 256 each. Other chunks of the range stay.
    ///
    /// # Errors
    /// [`ChunkError`]; after [`ChunkError::NoSpace`] the rest may be tried again.
    pub(super) fn put_aside(
        &self,
        volume: &Arc<VolumeChunks>,
        chunks: Range<u64>,
        filter: Filter<'_>,
    ) -> Result<(), ChunkError> {
        if chunks.end.saturating_sub(chunks.start) < 1 << path::LEAF_BITS {
            return Ok(());
        }
        self.fail_points(volume.id, &chunks, PointFailure::Overwritten);
        let mut aside = false;
        let result = self.put_directories_aside(volume, &chunks, filter, &mut aside);
        if aside {
            // Their tables may be in memory, and a reader may just have read one.
            for chunk in self.cache.within(volume.id, &chunks) {
                let mut state = lock(&chunk.state);
                self.forget_if_put_aside(&chunk, &mut state);
            }
        }
        result
    }

    fn put_directories_aside(
        &self,
        volume: &VolumeChunks,
        chunks: &Range<u64>,
        filter: Filter<'_>,
        aside: &mut bool,
    ) -> Result<(), ChunkError> {
        let _names = volume.names.write().unwrap_or_else(PoisonError::into_inner);
        let fits = |directory: &Range<u64>| {
            directory.start >= chunks.start
                && directory.end <= chunks.end
                && volume.all_present(directory, filter)
        };
        let mut next = chunks.start;
        // So far directories of 65,536 chunks were looked at.
        let mut branches_end = 0;
        while let Some(chunk) = volume.next_present(next) {
            let (branch, leaf) = (path::branch_of(chunk), path::leaf_of(chunk));
            if leaf.start >= chunks.end {
                break;
            }
            if branch.start >= branches_end {
                branches_end = branch.end;
                if fits(&branch) {
                    let directory = path::branch(&volume.directory, chunk);
                    self.throw_away(&directory, volume.id)?;
                    volume.set_absent(&branch);
                    *aside = true;
                    next = branch.end;
                    continue;
                }
            }
            if fits(&leaf) {
                let directory = path::leaf(&volume.directory, chunk);
                self.throw_away(&directory, volume.id)?;
                volume.set_absent(&leaf);
                *aside = true;
            }
            next = leaf.end;
        }
        Ok(())
    }
}
