//! Listing directories.
//!
//! A listing goes on where the last call stopped, with nothing kept in between: the
//! offset alone says where. So every entry has a place that depends on it alone:
//! - in hash order, for indexed directories and, with dir_index, those of one block
//!   (which may become indexed while they are listed): 31 bits of the hash and 32 bits
//!   more, which are the minor hash, or where the function has none, a checksum of the
//!   name;
//! - by byte offset for the others: an entry never moves within its block.
//!
//! `next_offset` is an entry's place plus one: the listing goes on with the first entry
//! at or after it, whatever was added or removed meanwhile.
//!
//! Names that agree in all 63 bits share a place. When a reply ends among them, the
//! offset given out refers to [`Ties`], which remembers the name; that is the only
//! state, it is bounded, and without crafted names it stays empty.
//!
//! When the index is damaged, hash order is kept by looking through all blocks, so an
//! offset means the same with and without the index.

use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use uext_ondisk::checksum::crc32c;
use uext_ondisk::dir_entry::{DirBlock, DirEntry as RawEntry};
use uext_ondisk::dirhash::{DirHasher, HashFunction};
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, InodeNumber, LogicalBlock};
use uext_sync::Mutex;
use uext_vfs::{DirEntry, DirSink, Errno, FileKind};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

const WHAT: &str = "directory";
/// Where `..` stands in hash order; `.` is at 0.
const DOTDOT: u64 = 1;
/// Where names begin in hash order.
const FIRST_NAME: u64 = 2;
/// Offsets from here on refer to [`Ties`]: above every hash, below the sign bit.
const TIES: u64 = 0x7FFF_FFFF_8000_0000;
/// How many positions among names of one place are remembered.
const MAX_TIES: usize = 1024;
/// Most entries that a pass over a whole directory picks at once.
const BATCH: usize = 4096;
/// Most entries of leaves that share a hash.
const MAX_GROUP: usize = 1 << 20;

/// An entry picked for listing; ordered by place, then name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Listed {
    place: u64,
    name: Vec<u8>,
    ino: InodeNumber,
    file_type: u8,
}

/// Number, directory, place, last name listed.
type Tie = (u32, InodeNumber, u64, Vec<u8>);

/// Positions among names that share a place.
#[derive(Default)]
pub(crate) struct Ties {
    /// (number, directory, place, last name listed), oldest first.
    known: Mutex<(u32, VecDeque<Tie>)>,
}

impl Ties {
    /// An offset that stands for the position after a name.
    fn remember(&self, dir: InodeNumber, place: u64, name: &[u8]) -> u64 {
        let mut known = self.known.lock();
        let (next, list) = &mut *known;
        let same = |entry: &&Tie| entry.1 == dir && entry.2 == place && entry.3 == name;
        if let Some(entry) = list.iter().find(same) {
            return TIES + u64::from(entry.0);
        }
        if list.len() == MAX_TIES {
            list.pop_front();
        }
        let number = *next;
        *next = (*next + 1) & (i32::MAX as u32);
        list.push_back((number, dir, place, name.to_vec()));
        TIES + u64::from(number)
    }

    /// The place and name an offset stands for.
    fn recall(&self, dir: InodeNumber, offset: u64) -> Option<(u64, Vec<u8>)> {
        let known = self.known.lock();
        let found = known.1.iter().find(|e| TIES + u64::from(e.0) == offset && e.1 == dir)?;
        Some((found.2, found.3.clone()))
    }
}

/// Where a listing goes on: at a place, past a name of it.
struct Cursor {
    place: u64,
    past: Option<Vec<u8>>,
}

impl Cursor {
    /// Whether an entry is still to come.
    fn admits(&self, place: u64, name: &[u8]) -> bool {
        place > self.place
            || (place == self.place && self.past.as_ref().is_none_or(|past| name > &past[..]))
    }
}

/// The place of a name in hash order.
fn place_of(hasher: &DirHasher, name: &[u8]) -> u64 {
    let hash = hasher.hash(name);
    let minor = match hasher.version.function {
        HashFunction::Legacy => crc32c(!0, name),
        HashFunction::HalfMd4 | HashFunction::Tea => hash.minor,
    };
    (u64::from(hash.hash >> 1) << 32 | u64::from(minor)) + FIRST_NAME
}

/// The smallest hash of names at or after a place.
fn hash_from(place: u64) -> u32 {
    let major = place.saturating_sub(FIRST_NAME) >> 32;
    u32::try_from(major << 1).unwrap_or(u32::MAX)
}

/// The type an entry tells, if it does.
fn kind_of(file_type: u8) -> Option<FileKind> {
    Some(match file_type {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::CharDevice,
        4 => FileKind::BlockDevice,
        5 => FileKind::Fifo,
        6 => FileKind::Socket,
        7 => FileKind::Symlink,
        _ => return None,
    })
}

impl Ext4 {
    /// Lists a directory from `offset` until `sink` is full.
    ///
    /// # Errors
    /// `ENOTDIR`, or what is wrong with a block that holds entries.
    pub(crate) fn read_dir(
        &self,
        dir: &Arc<Inode>,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        if !dir.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        if offset > 0 {
            self.read_listed_on();
        }
        {
            let _shared = dir.rwsem.read();
            let (nlink, inline) = {
                let core = dir.core.lock();
                (core.nlink, core.flags.contains(InodeFlags::INLINE_DATA))
            };
            // A removed directory is empty.
            if nlink == 0 {
                return Ok(());
            }
            let mut sink = Noting { sink, files: Vec::new() };
            let done = if inline {
                self.list_inline(dir, offset, &mut sink)
            } else if self.lists_by_hash(dir)? {
                self.list_by_hash(dir, offset, &mut sink)
            } else {
                self.list_by_offset(dir, offset, &mut sink)
            };
            self.listings.note(&sink.files);
            done?;
        }
        self.touch_atime(dir);
        Ok(())
    }

    /// Whether a directory is listed in hash order: if it is indexed or may become so.
    fn lists_by_hash(&self, dir: &Inode) -> Result<bool> {
        Ok(self.sb.features().dir_index() && (self.is_indexed(dir) || self.dir_blocks(dir)? == 1))
    }

    fn list_by_hash(&self, dir: &Inode, offset: u64, sink: &mut dyn DirSink) -> Result<()> {
        let mut cursor = if offset < TIES {
            Cursor { place: offset, past: None }
        } else {
            // Forgotten, or made up: the listing ends.
            let Some((place, name)) = self.ties.recall(dir.ino, offset) else { return Ok(()) };
            Cursor { place, past: Some(name) }
        };
        for (place, name) in [(0, &b"."[..]), (DOTDOT, b"..")] {
            if cursor.admits(place, name) {
                let ino = match self.find_dot(dir, name) {
                    Ok(slot) => slot.ino,
                    // Names are worth more than the dots: they are listed without them.
                    Err(error @ Error::Corrupt(_)) => {
                        self.report(Some(dir.ino), &error);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let file_type = 2;
                let dot = Listed { place, name: name.to_vec(), ino, file_type };
                if !add(sink, &dot, place + 1) {
                    return Ok(());
                }
            }
        }
        cursor.place = cursor.place.max(FIRST_NAME);
        loop {
            let (batch, next) = self.batch(dir, &cursor)?;
            for (at, entry) in batch.iter().enumerate() {
                let after = batch.get(at + 1).map(|after| after.place);
                let after = after.or(next.as_ref().map(|next| next.place));
                let tied = after == Some(entry.place);
                let next_offset = if tied {
                    self.ties.remember(dir.ino, entry.place, &entry.name)
                } else {
                    entry.place + 1
                };
                if !add(sink, entry, next_offset) {
                    return Ok(());
                }
            }
            match next {
                Some(next) => cursor = next,
                None => return Ok(()),
            }
        }
    }

    /// The next entries in hash order, and where to go on; `None` when they are the last.
    fn batch(&self, dir: &Inode, cursor: &Cursor) -> Result<(Vec<Listed>, Option<Cursor>)> {
        if self.is_indexed(dir) {
            match self.batch_by_index(dir, cursor) {
                Ok(batch) => return batch,
                Err(damage) => self.report(Some(dir.ino), &damage),
            }
        }
        self.batch_by_scan(dir, cursor)
    }

    /// The entries of a leaf, and of the leaves that go on with its last hash. The outer error
    /// is damage of the index.
    #[allow(clippy::type_complexity)]
    fn batch_by_index(
        &self,
        dir: &Inode,
        cursor: &Cursor,
    ) -> Result<Result<(Vec<Listed>, Option<Cursor>)>> {
        let from = hash_from(cursor.place);
        let mut path = self.probe(dir, |_| from)?;
        let mut batch = Vec::new();
        let next = loop {
            let taken = self.leaf(dir, path.leaf).and_then(|leaf| {
                self.take_entries(dir, path.leaf, &leaf.read(), &path.hasher, |entry| {
                    if cursor.admits(entry.place, &entry.name) {
                        batch.push(entry);
                    }
                })
            });
            if let Err(error) = taken {
                return Ok(Err(error));
            }
            match self.next_leaf(dir, &mut path)? {
                // The same hash goes on in the next leaf, and order needs all of it.
                Some(hash) if hash & 1 == 1 => {
                    if batch.len() > MAX_GROUP {
                        let corrupt = Corrupt::value(WHAT, "too many leaves of one hash");
                        return Err(self.in_dir(dir, path.leaf, corrupt));
                    }
                }
                Some(hash) => {
                    let place = (u64::from(hash >> 1) << 32) + FIRST_NAME;
                    if place <= cursor.place {
                        let detail = "the index does not rise";
                        let corrupt = Corrupt::value(WHAT, detail);
                        return Err(self.in_dir(dir, path.leaf, corrupt));
                    }
                    break Some(Cursor { place, past: None });
                }
                None => break None,
            }
        };
        batch.sort_unstable();
        Ok(Ok((batch, next)))
    }

    /// The first entries at or after a cursor among all blocks: for a directory without an
    /// index, or with one that is not trusted.
    fn batch_by_scan(&self, dir: &Inode, cursor: &Cursor) -> Result<(Vec<Listed>, Option<Cursor>)> {
        let indexed = self.is_indexed(dir);
        let hasher = match indexed.then(|| self.hasher_of(dir)) {
            Some(Ok(hasher)) => hasher,
            _ => self.default_hasher()?,
        };
        let mut first: BinaryHeap<Listed> = BinaryHeap::new();
        for number in 0..self.dir_blocks(dir)? {
            let logical = LogicalBlock(number);
            let Some(buffer) = self.linear_block(dir, logical, indexed)? else { continue };
            self.take_entries(dir, logical, &buffer.read(), &hasher, |entry| {
                if cursor.admits(entry.place, &entry.name) {
                    first.push(entry);
                    if first.len() > BATCH {
                        first.pop();
                    }
                }
            })?;
        }
        let batch = first.into_sorted_vec();
        let next = match batch.last() {
            Some(last) if batch.len() == BATCH => {
                Some(Cursor { place: last.place, past: Some(last.name.clone()) })
            }
            _ => None,
        };
        Ok((batch, next))
    }

    /// Hands the names of a block, without `.` and `..`, to `take`. Damage is reported and ends
    /// the block: what comes before it is still listed.
    fn take_entries(
        &self,
        dir: &Inode,
        logical: LogicalBlock,
        bytes: &[u8],
        hasher: &DirHasher,
        mut take: impl FnMut(Listed),
    ) -> Result<()> {
        for entry in DirBlock::new(bytes, self.dir_format()).entries() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(corrupt) => {
                    self.report(Some(dir.ino), &self.in_dir(dir, logical, corrupt));
                    break;
                }
            };
            if is_listed(&entry) && entry.name != b"." && entry.name != b".." {
                take(Listed {
                    place: place_of(hasher, entry.name),
                    name: entry.name.to_vec(),
                    ino: entry.inode,
                    file_type: entry.file_type,
                });
            }
        }
        Ok(())
    }

    fn list_by_offset(&self, dir: &Inode, offset: u64, sink: &mut dyn DirSink) -> Result<()> {
        let block_size = u64::from(self.block_size());
        let blocks = self.dir_blocks(dir)?;
        let Ok(first) = u32::try_from(offset / block_size) else { return Ok(()) };
        let indexed = self.sb.features().dir_index() && self.is_indexed(dir);
        for number in first..blocks {
            let logical = LogicalBlock(number);
            let start = u64::from(number) * block_size;
            let Some(buffer) = self.linear_block(dir, logical, indexed)? else {
                let hole = Corrupt::value(WHAT, "a block is a hole");
                self.report(Some(dir.ino), &self.in_dir(dir, logical, hole));
                continue;
            };
            // Copied, so that the sink runs without the block's lock.
            let bytes = buffer.read().to_vec();
            for entry in DirBlock::new(&bytes, self.dir_format()).entries() {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(corrupt) => {
                        self.report(Some(dir.ino), &self.in_dir(dir, logical, corrupt));
                        break;
                    }
                };
                let place = start + entry.offset as u64;
                if place >= offset && is_listed(&entry) && !add_raw(sink, &entry, place + 1) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Lists a directory whose entries lie in the inode: places are offsets in those bytes,
    /// behind `.` and `..`.
    fn list_inline(&self, dir: &Inode, offset: u64, sink: &mut dyn DirSink) -> Result<()> {
        let bytes = self.inline_bytes(dir)?;
        let parts = self.inline_parts(dir, &bytes)?;
        let dots = [(0, &b"."[..], dir.ino), (DOTDOT, b"..", parts.parent)];
        for (place, name, ino) in dots {
            let dot = Listed { place, name: name.to_vec(), ino, file_type: 2 };
            if offset <= place && !add(sink, &dot, place + 1) {
                return Ok(());
            }
        }
        for (start, part) in parts.entries {
            for entry in DirBlock::new(part, parts.format).entries() {
                let entry = entry.map_err(|c| Error::from(c.in_inode(dir.ino)))?;
                let place = FIRST_NAME + (start + entry.offset) as u64;
                if place >= offset && is_listed(&entry) && !add_raw(sink, &entry, place + 1) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Whether an entry leads to a file by a name.
fn is_listed(entry: &RawEntry<'_>) -> bool {
    entry.in_use() && !entry.name.is_empty()
}

/// Notes which files are listed.
struct Noting<'a> {
    sink: &'a mut dyn DirSink,
    files: Vec<InodeNumber>,
}

impl DirSink for Noting<'_> {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        let taken = self.sink.add(entry);
        if taken && matches!(entry.kind, None | Some(FileKind::Regular)) {
            self.files.extend(u32::try_from(entry.ino).map(InodeNumber));
        }
        taken
    }
}

fn add(sink: &mut dyn DirSink, entry: &Listed, next_offset: u64) -> bool {
    sink.add(&DirEntry {
        ino: u64::from(entry.ino.0),
        kind: kind_of(entry.file_type),
        name: &entry.name,
        next_offset,
    })
}

fn add_raw(sink: &mut dyn DirSink, entry: &RawEntry<'_>, next_offset: u64) -> bool {
    sink.add(&DirEntry {
        ino: u64::from(entry.inode.0),
        kind: kind_of(entry.file_type),
        name: entry.name,
        next_offset,
    })
}

#[cfg(test)]
mod tests {
    use uext_ondisk::dirhash::HashVersion;

    use super::*;

    #[test]
    fn places_lie_between_the_dots_and_the_ties_and_name_the_hash() {
        for function in [HashFunction::Legacy, HashFunction::HalfMd4, HashFunction::Tea] {
            let version = HashVersion { function, unsigned: false };
            let hasher = DirHasher { version, seed: [1, 2, 3, 4] };
            for number in 0..10_000 {
                let name = format!("name {number}").into_bytes();
                let place = place_of(&hasher, &name);
                assert!((FIRST_NAME..TIES).contains(&place));
                assert_eq!(hash_from(place), hasher.hash(&name).hash);
            }
        }
    }

    #[test]
    fn a_tie_is_remembered_per_directory_until_many_newer_ones_came() {
        let (ties, dir) = (Ties::default(), InodeNumber(12));
        let offset = ties.remember(dir, 7, b"name");
        assert_eq!(ties.remember(dir, 7, b"name"), offset);
        assert_eq!(ties.recall(dir, offset), Some((7, b"name".to_vec())));
        assert_eq!(ties.recall(InodeNumber(13), offset), None);
        for number in 0..MAX_TIES {
            ties.remember(dir, 8, number.to_string().as_bytes());
        }
        assert_eq!(ties.recall(dir, offset), None);
    }

    #[test]
    fn a_cursor_past_a_name_admits_what_follows_it_at_its_place() {
        let cursor = Cursor { place: 7, past: Some(b"m".to_vec()) };
        assert!(!cursor.admits(6, b"z") && !cursor.admits(7, b"m") && !cursor.admits(7, b"a"));
        assert!(cursor.admits(7, b"n") && cursor.admits(8, b"a"));
    }
}
