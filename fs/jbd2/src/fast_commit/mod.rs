//! Applying fast commits: what a filesystem becomes by the records behind its log.
//!
//! A record says what happened (a name was made, a range was mapped), not which blocks changed.
//! The operations are done in memory over what the log's replay leaves, and the blocks that are
//! different then are the result, which the recovery writes as one transaction.
//!
//! What counts is the state at the end of the last fast commit, as the kernel had it in memory:
//! - An inode's record holds its link count at the end of its fast commit, so names of that fast
//!   commit do not count again; they do for inodes without a record, such as the directory that a
//!   new directory lies in.
//! - A directory's blocks are in no record: they are allocated here, never where a record of
//!   the area maps something. The same goes for the blocks of extent trees.
//! - An inode without names is deleted, unless it is an orphan that the log knows: that is left
//!   to whoever works off the orphans.
//! - The times of directories that names were made in are not known and stay.
//!
//! Invariants: nothing is written here; the work is bounded by the records and by
//! [`view`]'s limit on reads; what contradicts the filesystem is an error, with no result.

mod dir;
mod file;
mod groups;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};

use uext_blockdev::BlockDevice;
use uext_ondisk::dir_entry;
use uext_ondisk::extent::{Extent, ExtentNode};
use uext_ondisk::fast_commit::{Dentry, FastCommit, Record};
use uext_ondisk::features::{Incompat, RoCompat};
use uext_ondisk::inode::{FileType, Inode, InodeFlags};
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use uext_ondisk::xattr::{XattrArea, set_block_checksum, set_block_refcount};
use uext_ondisk::{Corrupt, FsBlock, InodeNumber, orphan_file};

use crate::error::{JournalError, Result};
use crate::recovery::Overlay;
use file::File;
use groups::Groups;
use view::View;

const WHAT: &str = "fast commit";
/// Links a directory has when they are no longer counted (`dir_nlink`).
const UNCOUNTED: u16 = 1;
/// Most links a directory counts.
const MAX_DIR_LINKS: u16 = 65_000;

/// The blocks that `commits` change; `fs` reads as the log leaves it.
///
/// # Errors
/// `Corrupt` when the records contradict the filesystem, or when what they touch is damaged;
/// `Unsupported` for what is not done here; `Io`.
pub(crate) fn apply(
    fs: &dyn BlockDevice,
    block_size: u32,
    commits: &[FastCommit],
) -> Result<Overlay> {
    let mut view = View::new(fs, block_size);
    let home = FsBlock(SUPERBLOCK_OFFSET / u64::from(block_size));
    let bytes = view.read(home)?;
    let at = offset_in_block(bytes.len());
    let sb = Superblock::parse(bytes.get(at..at + SUPERBLOCK_SIZE).unwrap_or_default())?;
    if sb.block_size() != block_size {
        return Err(Corrupt::value(WHAT, "the journal's blocks are not the filesystem's").into());
    }
    check_features(&sb)?;
    let named = commits.iter().flatten().filter_map(|record| match record {
        Record::AddRange(_, extent) => Some((extent.start, extent.len)),
        _ => None,
    });
    let mut replay = Replay {
        groups: Groups::new(named),
        view,
        sb,
        files: BTreeMap::new(),
        orphans: HashSet::new(),
        second_names: HashMap::new(),
    };
    replay.read_orphans()?;
    for commit in commits {
        replay.commit(commit)?;
    }
    replay.finish()
}

/// Where the superblock lies in its block.
fn offset_in_block(block_size: usize) -> usize {
    if block_size == 1024 { 0 } else { 1024 }
}

fn check_features(sb: &Superblock) -> Result<()> {
    let features = sb.features();
    let name = if features.ro_compat.contains(RoCompat::BIGALLOC) {
        "bigalloc"
    } else if features.incompat.contains(Incompat::CASEFOLD) {
        "casefold"
    } else if features.incompat.contains(Incompat::ENCRYPT) {
        "encrypt"
    } else {
        return Ok(());
    };
    let text = format!(
        "the journal holds fast commits, which are not replayed with the feature {name}: mount it \
         with the kernel or run e2fsck"
    );
    Err(JournalError::Unsupported(text))
}

fn unsupported(ino: InodeNumber, why: &str) -> JournalError {
    let text = format!(
        "the journal's fast commits change inode {ino}, which {why}: mount it with the kernel or \
         run e2fsck"
    );
    JournalError::Unsupported(text)
}

fn corrupt(ino: InodeNumber, detail: impl Into<String>) -> JournalError {
    Corrupt::value(WHAT, detail).in_inode(ino).into()
}

struct Replay<'a> {
    view: View<'a>,
    sb: Superblock,
    groups: Groups,
    files: BTreeMap<InodeNumber, File>,
    /// Inodes on the orphan list and in the orphan file.
    orphans: HashSet<InodeNumber>,
    /// Directories that are being renamed: names beyond their first.
    second_names: HashMap<InodeNumber, u32>,
}

impl Replay<'_> {
    fn read_orphans(&mut self) -> Result<()> {
        let mut next = self.sb.last_orphan();
        while let Some(ino) = next.filter(|&ino| self.orphans.insert(ino)) {
            let bytes = self.read_inode(ino)?;
            next = Some(InodeNumber(Inode::new(&bytes[..])?.dtime())).filter(|ino| ino.0 != 0);
        }
        let present = self.sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT);
        if let Some(ino) = self.sb.orphan_file_inum().filter(|_| present) {
            let file = self.load(ino)?;
            let blocks: Vec<_> = file.owned.clone();
            let nodes: HashSet<_> = file.nodes.iter().map(|node| node.0).collect();
            for block in blocks.into_iter().flat_map(|(start, count)| start..start + count) {
                if nodes.contains(&block) {
                    continue;
                }
                let bytes = self.view.read(FsBlock(block))?;
                self.orphans.extend(orphan_file::orphans(&bytes)?.map(|(_, ino)| ino));
            }
        }
        Ok(())
    }

    /// Applies one fast commit.
    fn commit(&mut self, records: &[Record]) -> Result<()> {
        let exact: HashSet<InodeNumber> = records
            .iter()
            .filter_map(|record| match record {
                Record::Inode(ino, _) => Some(*ino),
                _ => None,
            })
            .collect();
        for record in records {
            match record {
                Record::AddRange(ino, extent) => self.add_range(*ino, extent)?,
                Record::DelRange { ino, start, len } => {
                    let first = u64::from(start.0);
                    if let Some(file) = self.file_to_remap(*ino)? {
                        file.unmap(first, first + u64::from(*len));
                    }
                }
                Record::Create(dentry) => self.link(dentry, true, &exact)?,
                Record::Link(dentry) => self.link(dentry, false, &exact)?,
                Record::Unlink(dentry) => self.unlink(dentry, &exact)?,
                Record::Inode(ino, raw) => self.inode(*ino, raw)?,
            }
        }
        Ok(())
    }

    /// Only inodes that users have change by fast commits.
    fn check_plain(&self, ino: InodeNumber) -> Result<()> {
        let special = Some(ino) == self.sb.orphan_file_inum();
        if ino < self.sb.first_ino() || special || self.sb.check_inode(ino).is_err() {
            return Err(corrupt(ino, "is no inode of a user"));
        }
        Ok(())
    }

    /// A file whose mapping may change; `None` when it is gone.
    fn file_to_remap(&mut self, ino: InodeNumber) -> Result<Option<&mut File>> {
        self.check_plain(ino)?;
        let file = self.load(ino)?;
        if !file.live {
            return Ok(None);
        }
        if file.extents.is_none() || file.inode().is_dir() {
            return Err(unsupported(ino, "is not mapped by extents"));
        }
        Ok(Some(file))
    }

    fn add_range(&mut self, ino: InodeNumber, extent: &Extent) -> Result<()> {
        if !self.sb.is_fs_range(extent.start, extent.len.into()) {
            let detail = format!("{} blocks lie outside the filesystem", extent.len);
            return Err(Corrupt::value(WHAT, detail).in_inode(ino).in_block(extent.start).into());
        }
        if let Some(file) = self.file_to_remap(ino)? {
            file.unmap(extent.logical.0.into(), extent.end());
            if let Some(extents) = &mut file.extents {
                extents.insert(extent.logical.0, *extent);
            }
        }
        Ok(())
    }

    /// Gives an inode the contents of its record, but for its map.
    fn inode(&mut self, ino: InodeNumber, raw: &[u8]) -> Result<()> {
        self.check_plain(ino)?;
        let (features, size) = (self.sb.features(), usize::from(self.sb.inode_size()));
        let orphan = self.orphans.contains(&ino);
        let mut bytes = vec![0; size];
        bytes
            .get_mut(..raw.len())
            .ok_or_else(|| corrupt(ino, format!("record of {} bytes", raw.len())))?
            .copy_from_slice(raw);
        let file = self.load(ino)?;
        let mut new = Inode::new(&mut bytes[..])?;
        new.check_extra_isize()?;
        let kind = new.file_type();
        let kind = kind.ok_or_else(|| corrupt(ino, format!("mode {:#o}", new.mode())))?;
        let flags = new.flags();
        if flags.intersects(InodeFlags::INLINE_DATA | InodeFlags::ENCRYPT | InodeFlags::EA_INODE) {
            return Err(unsupported(ino, "has inline data, is encrypted or holds an attribute"));
        }
        let same = file.live && file.inode().generation() == new.generation();
        if !same {
            file.reset();
        }
        let old = file.inode();
        if new.file_acl(features) != old.file_acl(features) {
            return Err(unsupported(ino, "has other attributes than before"));
        }
        new.set_dtime(if orphan { old.dtime() } else { 0 });
        if !same {
            start_map(&mut new, file, kind, ino)?;
        } else {
            if old.file_type() != Some(kind) {
                return Err(corrupt(ino, "is of another type than before"));
            }
            new.bytes_mut()[raw.len()..].copy_from_slice(&file.bytes[raw.len()..]);
            keep_map(&mut new, file, kind, ino)?;
        }
        file.live = new.links_count() > 0 || orphan;
        file.bytes = bytes;
        file.dirty = true;
        Ok(())
    }

    /// A directory that names are made in or taken from; `None` when it is gone.
    fn parent(&mut self, ino: InodeNumber) -> Result<Option<()>> {
        if ino != InodeNumber::ROOT {
            self.check_plain(ino)?;
        }
        let file = self.load(ino)?;
        if !file.live {
            return Ok(None);
        }
        if !file.inode().is_dir() {
            return Err(corrupt(ino, "is no directory"));
        }
        if file.extents.is_none() {
            return Err(unsupported(ino, "is a directory without extents"));
        }
        if file.inode().raw_size() == 0 {
            return Err(corrupt(ino, "is a directory without a name"));
        }
        Ok(Some(()))
    }

    fn link(&mut self, dentry: &Dentry, new: bool, exact: &HashSet<InodeNumber>) -> Result<()> {
        let Dentry { parent, ino, name } = dentry;
        self.check_plain(*ino)?;
        if parent == ino {
            return Err(corrupt(*ino, "is its own parent"));
        }
        // What was deleted before the fast commit ended has no record, or one without links.
        let child = self.load(*ino)?;
        let (live, is_dir) =
            (child.live && child.inode().links_count() > 0, child.inode().is_dir());
        let (mode, begun) = (child.inode().mode(), child.inode().raw_size() > 0);
        if self.parent(*parent)?.is_none() || !live {
            return Ok(());
        }
        if let Some(found) = self.find(*parent, name)? {
            if found.ino == *ino {
                return Ok(());
            }
            let detail = format!("{:?} leads elsewhere", String::from_utf8_lossy(name));
            return Err(corrupt(*parent, detail));
        }
        if is_dir && new {
            if begun {
                return Err(corrupt(*ino, "is a directory that is made twice"));
            }
            self.start_dir(*ino, *parent)?;
            if !exact.contains(parent) {
                self.count_subdir(*parent, true)?;
            }
        } else if is_dir {
            *self.second_names.entry(*ino).or_default() += 1;
        } else if !exact.contains(ino) {
            let mut inode = self.load(*ino)?.inode_mut();
            let links = inode.links_count().checked_add(1);
            inode.set_links_count(links.ok_or_else(|| corrupt(*ino, "has too many links"))?);
        }
        self.add_entry(*parent, name, (*ino, dir_entry::FileType::from_mode(mode)))
    }

    fn unlink(&mut self, dentry: &Dentry, exact: &HashSet<InodeNumber>) -> Result<()> {
        let Dentry { parent, ino, name } = dentry;
        self.check_plain(*ino)?;
        if self.parent(*parent)?.is_none() {
            return Ok(());
        }
        // A name that was made and removed between two fast commits was never there.
        let found = self.find(*parent, name)?.filter(|found| found.ino == *ino);
        let Some(found) = found else { return Ok(()) };
        self.remove_entry(*parent, &found)?;
        let orphan = self.orphans.contains(ino);
        let child = self.load(*ino)?;
        if !child.live {
            return Ok(());
        }
        if !child.inode().is_dir() {
            if !exact.contains(ino) {
                let links = child.inode().links_count().saturating_sub(1);
                child.inode_mut().set_links_count(links);
                child.live = links > 0 || orphan;
            }
            return Ok(());
        }
        match self.second_names.get_mut(ino) {
            Some(count) if *count > 0 => *count -= 1,
            _ => {
                let child = self.load(*ino)?;
                child.inode_mut().set_links_count(0);
                child.live = orphan;
                if !exact.contains(parent) {
                    self.count_subdir(*parent, false)?;
                }
            }
        }
        Ok(())
    }

    /// Counts a subdirectory more, or fewer, in its parent's links.
    fn count_subdir(&mut self, parent: InodeNumber, more: bool) -> Result<()> {
        let mut inode = self.load(parent)?.inode_mut();
        let links = match (inode.links_count(), more) {
            (UNCOUNTED, _) => UNCOUNTED,
            (links, true) if links >= MAX_DIR_LINKS - 1 => UNCOUNTED,
            (links, true) => links + 1,
            (links, false) => links.saturating_sub(1).max(2),
        };
        inode.set_links_count(links);
        Ok(())
    }

    /// Writes inodes, trees and bitmaps.
    fn finish(mut self) -> Result<Overlay> {
        if let Some((&ino, _)) = self.second_names.iter().find(|&(_, &count)| count > 0) {
            return Err(corrupt(ino, "is a directory with two names"));
        }
        let numbers: Vec<InodeNumber> = self.files.keys().copied().collect();
        for &ino in &numbers {
            self.finish_inode(ino)?;
        }
        // What is freed first: a range may have gone from one file to another.
        for take in [false, true] {
            for &ino in &numbers {
                self.finish_blocks(ino, take)?;
            }
        }
        self.groups.write(&mut self.view, &self.sb)?;
        self.view.into_changes()
    }

    fn finish_inode(&mut self, ino: InodeNumber) -> Result<()> {
        let file = self.load(ino)?;
        if !file.dirty {
            return Ok(());
        }
        let is_dir = |bytes: &Option<Vec<u8>>| {
            bytes.as_ref().and_then(|bytes| Inode::new(&bytes[..]).ok()).is_some_and(|i| i.is_dir())
        };
        let (was_used, was_dir) = (file.base.is_some(), is_dir(&file.base));
        let (live, dir_now) = (file.live, file.live && file.inode().is_dir());
        if live && dir_now && file.inode().raw_size() == 0 {
            return Err(corrupt(ino, "is a directory without a name"));
        }
        if !live && !was_used {
            return Ok(());
        }
        if live {
            if file.remapped && file.extents.is_some() {
                self.build_tree(ino)?;
            }
            self.count_sectors(ino)?;
        } else {
            self.delete(ino)?;
        }
        self.release_attributes(ino)?;
        let dirs = i64::from(dir_now) - i64::from(was_dir);
        self.groups.set_inode(&mut self.view, &self.sb, ino, (live, dirs))?;
        let sb = self.sb.clone();
        let file = self.load(ino)?;
        file.inode_mut().seal(&sb, ino);
        let bytes = file.bytes.clone();
        let (block, offset) = self.inode_place(ino)?;
        let mut table = self.view.read(block)?;
        table[offset..offset + bytes.len()].copy_from_slice(&bytes);
        self.view.write(block, table);
        Ok(())
    }

    /// Sets `i_blocks` by what the file owns now.
    fn count_sectors(&mut self, ino: InodeNumber) -> Result<()> {
        let (features, block_size) = (self.sb.features(), self.sb.block_size());
        let file = self.load(ino)?;
        if file.extents.is_none() {
            return Ok(());
        }
        let acl = u64::from(file.inode().file_acl(features).0 != 0);
        let blocks = file.data_blocks() + file.nodes.len() as u64 + acl;
        let sectors = blocks.saturating_mul(u64::from(block_size / 512));
        let set = file.inode_mut().set_sectors(sectors, features, block_size);
        set.ok_or_else(|| corrupt(ino, format!("owns {blocks} blocks")))
    }

    /// Makes an inode a deleted one.
    fn delete(&mut self, ino: InodeNumber) -> Result<()> {
        let (features, block_size) = (self.sb.features(), self.sb.block_size());
        if features.incompat.contains(Incompat::EA_INODE) {
            return Err(unsupported(ino, "is deleted and may have attributes in inodes"));
        }
        // A replay that is done twice leaves the same bytes, so this is no clock's time. Small
        // numbers would look like the next orphan's.
        let time = (self.sb.write_time() & 0xFFFF_FFFF).max(self.sb.inodes_count().into());
        let file = self.load(ino)?;
        file.extents = file.extents.take().map(|_| BTreeMap::new());
        file.nodes.clear();
        file.remapped = true;
        let mut inode = file.inode_mut();
        inode.set_links_count(0);
        inode.set_size(0);
        let _ = inode.set_sectors(0, features, block_size);
        inode.set_dtime(u32::try_from(time).unwrap_or(u32::MAX));
        inode.set_file_acl(FsBlock(0));
        inode.i_block_mut().fill(0);
        if inode.flags().contains(InodeFlags::EXTENTS) {
            let mut root = [0; 60];
            let _ = ExtentNode::init(&mut root[..], 0);
            *inode.i_block_mut() = root;
        }
        Ok(())
    }

    /// Lets go of the attribute block an inode had before and has no more.
    fn release_attributes(&mut self, ino: InodeNumber) -> Result<()> {
        let (features, seed) = (self.sb.features(), self.sb.csum_seed());
        let file = self.load(ino)?;
        let Some(base) = &file.base else { return Ok(()) };
        let block = Inode::new(&base[..])?.file_acl(features);
        if block.0 == 0 || block == file.inode().file_acl(features) {
            return Ok(());
        }
        if !self.sb.is_fs_block(block) {
            return Err(corrupt(ino, "its attribute block lies outside the filesystem"));
        }
        let mut bytes = self.view.read(block)?;
        let area = XattrArea::block(&bytes)?;
        if features.metadata_csum() {
            area.verify_checksum(seed, block)?;
        }
        match area.header().map_or(0, |header| header.h_refcount.get()) {
            0 | 1 => self.load(ino)?.owned.push((block.0, 1)),
            shares => {
                set_block_refcount(&mut bytes, shares - 1)?;
                if features.metadata_csum() {
                    set_block_checksum(&mut bytes, seed, block)?;
                }
                self.view.write(block, bytes);
            }
        }
        Ok(())
    }

    /// Frees what a file owned, or with `take` marks what it owns now.
    fn finish_blocks(&mut self, ino: InodeNumber, take: bool) -> Result<()> {
        let file = self.load(ino)?;
        if !file.dirty || !file.remapped {
            return Ok(());
        }
        let runs = match take {
            false => file.owned.clone(),
            true if file.live => file.owns(),
            true => Vec::new(),
        };
        for run in runs {
            self.groups.change(&mut self.view, &self.sb, run, take)?;
        }
        Ok(())
    }
}

/// The map of a new inode, or of a number that is used again.
fn start_map(
    new: &mut Inode<&mut [u8]>,
    file: &mut File,
    kind: FileType,
    ino: InodeNumber,
) -> Result<()> {
    let flags = new.flags();
    let by_extents = flags.contains(InodeFlags::EXTENTS);
    file.extents = by_extents.then(BTreeMap::new);
    match kind {
        _ if by_extents => {
            let mut root = [0; 60];
            let _ = ExtentNode::init(&mut root[..], 0);
            *new.i_block_mut() = root;
        }
        FileType::Regular | FileType::Directory if new.links_count() > 0 => {
            return Err(unsupported(ino, "is not mapped by extents"));
        }
        _ => {}
    }
    if kind == FileType::Directory {
        // Its blocks are made when its name is.
        new.set_size(0);
        new.set_flags(flags - InodeFlags::INDEX);
    }
    Ok(())
}

/// The map of an inode that was there before stays.
fn keep_map(
    new: &mut Inode<&mut [u8]>,
    file: &File,
    kind: FileType,
    ino: InodeNumber,
) -> Result<()> {
    let old = file.inode();
    let mapped = InodeFlags::EXTENTS | InodeFlags::INDEX;
    if kind == FileType::Directory {
        new.set_size(old.raw_size());
        new.set_flags((new.flags() - mapped) | (old.flags() & mapped));
        *new.i_block_mut() = *old.i_block();
        return Ok(());
    }
    if new.flags().contains(InodeFlags::EXTENTS) != old.flags().contains(InodeFlags::EXTENTS) {
        return Err(unsupported(ino, "changed how it is mapped"));
    }
    if file.extents.is_some() {
        *new.i_block_mut() = *old.i_block();
    } else if kind == FileType::Regular && new.i_block() != old.i_block() {
        return Err(unsupported(ino, "is not mapped by extents"));
    }
    Ok(())
}
