//! Names in directories: linear and indexed ones.
//!
//! Invariants: a walk down an index visits as many blocks as it has levels, and one along its
//! leaves no more than the directory has; a block is checked before it is changed.

use uext_ondisk::dir_entry::{DirBlock, DirBlockMut, DirFormat, FileType};
use uext_ondisk::dirhash::{DirHasher, HashVersion};
use uext_ondisk::extent::Extent;
use uext_ondisk::features::{Compat, Incompat};
use uext_ondisk::htree::{
    self, DxBlock, DxBlockMut, MAX_INDIRECT_LEVELS, MAX_INDIRECT_LEVELS_LARGE_DIR,
};
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, FsBlock, InodeNumber, LogicalBlock};

use super::{Replay, unsupported};
use crate::error::{JournalError, Result};

/// An entry that was found.
pub(super) struct Found {
    block: FsBlock,
    offset: usize,
    pub(super) ino: InodeNumber,
}

/// The way down an index: blocks of the directory and the element taken in each.
struct Path {
    frames: Vec<(LogicalBlock, usize)>,
    hasher: DirHasher,
    hash: u32,
    leaf: LogicalBlock,
}

impl Replay<'_> {
    fn format(&self) -> DirFormat {
        DirFormat {
            filetype: self.sb.features().incompat.contains(Incompat::FILETYPE),
            csum: self.sb.features().metadata_csum(),
            inodes_count: self.sb.inodes_count(),
        }
    }

    fn dir_seed(&self, dir: InodeNumber) -> u32 {
        let fs_seed = self.sb.csum_seed();
        self.files.get(&dir).map_or(0, |file| file.inode().csum_seed(fs_seed, dir))
    }

    fn dir_blocks(&self, dir: InodeNumber) -> u32 {
        let size = self.files.get(&dir).map_or(0, |file| file.inode().size(self.sb.features()));
        u32::try_from(size / u64::from(self.sb.block_size())).unwrap_or(u32::MAX)
    }

    fn is_indexed(&self, dir: InodeNumber) -> bool {
        self.sb.features().compat.contains(Compat::DIR_INDEX)
            && self
                .files
                .get(&dir)
                .is_some_and(|file| file.inode().flags().contains(InodeFlags::INDEX))
    }

    /// A block of a directory and where it lies; `None` for a hole.
    fn dir_block(
        &mut self,
        dir: InodeNumber,
        logical: LogicalBlock,
    ) -> Result<Option<(FsBlock, Vec<u8>)>> {
        match self.files.get(&dir).and_then(|file| file.map(logical)) {
            Some(block) => Ok(Some((block, self.view.read(block)?))),
            None => Ok(None),
        }
    }

    /// A block that must be there.
    fn dir_block_at(
        &mut self,
        dir: InodeNumber,
        logical: LogicalBlock,
    ) -> Result<(FsBlock, Vec<u8>)> {
        let found = self.dir_block(dir, logical)?;
        found.ok_or_else(|| damaged(dir, logical, "the index leads to a hole"))
    }

    fn verify_leaf(&self, dir: InodeNumber, logical: LogicalBlock, bytes: &[u8]) -> Result<()> {
        let format = self.format();
        if format.csum {
            DirBlock::new(bytes, format)
                .verify_checksum(self.dir_seed(dir))
                .map_err(|c| c.in_inode(dir).at_logical(logical))?;
        }
        Ok(())
    }

    fn find_in(
        &self,
        dir: InodeNumber,
        logical: LogicalBlock,
        (block, bytes): (FsBlock, &[u8]),
        name: &[u8],
    ) -> Result<Option<Found>> {
        self.verify_leaf(dir, logical, bytes)?;
        let found = DirBlock::new(bytes, self.format())
            .find(name)
            .map_err(|c| c.in_inode(dir).at_logical(logical))?;
        Ok(found.map(|entry| Found { block, offset: entry.offset, ino: entry.inode }))
    }

    /// Finds a name in a directory that was loaded.
    pub(super) fn find(&mut self, dir: InodeNumber, name: &[u8]) -> Result<Option<Found>> {
        if self.is_indexed(dir) {
            return self.find_by_index(dir, name);
        }
        for logical in (0..self.dir_blocks(dir)).map(LogicalBlock) {
            if let Some((block, bytes)) = self.dir_block(dir, logical)?
                && let Some(found) = self.find_in(dir, logical, (block, &bytes), name)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn find_by_index(&mut self, dir: InodeNumber, name: &[u8]) -> Result<Option<Found>> {
        let mut path = self.probe(dir, name)?;
        for _ in 0..self.dir_blocks(dir) {
            let (block, bytes) = self.dir_block_at(dir, path.leaf)?;
            if let Some(found) = self.find_in(dir, path.leaf, (block, &bytes), name)? {
                return Ok(Some(found));
            }
            if !self.next_leaf(dir, &mut path)? {
                return Ok(None);
            }
        }
        Err(damaged(dir, path.leaf, "more leaves of one hash than blocks"))
    }

    /// A root or node of an index, checked.
    fn index_block(
        &mut self,
        dir: InodeNumber,
        logical: LogicalBlock,
    ) -> Result<(FsBlock, Vec<u8>)> {
        let (block, bytes) = self.dir_block_at(dir, logical)?;
        let csum = self.format().csum;
        let view = dx(&bytes, logical, csum).map_err(|c| c.in_inode(dir).at_logical(logical))?;
        if csum {
            view.verify_checksum(self.dir_seed(dir))
                .map_err(|c| c.in_inode(dir).at_logical(logical))?;
        }
        Ok((block, bytes))
    }

    fn max_levels(&self) -> u8 {
        if self.sb.features().large_dir() {
            MAX_INDIRECT_LEVELS_LARGE_DIR
        } else {
            MAX_INDIRECT_LEVELS
        }
    }

    fn probe(&mut self, dir: InodeNumber, name: &[u8]) -> Result<Path> {
        let zero = LogicalBlock(0);
        let csum = self.format().csum;
        let (_, bytes) = self.index_block(dir, zero)?;
        let (root, info) = DxBlock::root(&bytes, csum).map_err(|c| c.in_inode(dir))?;
        if info.flags & 1 != 0 || info.indirect_levels > self.max_levels() {
            return Err(damaged(dir, zero, "the index has unknown flags or too many levels"));
        }
        let version = HashVersion::from_raw(info.hash_version, self.sb.unsigned_hash())?;
        let hasher = DirHasher { version, seed: self.sb.hash_seed() };
        let hash = hasher.hash(name).hash;
        let index = root.lookup(hash);
        let mut next = root.entry(index).block;
        let mut frames = vec![(zero, index)];
        for _ in 0..info.indirect_levels {
            let logical = next;
            let (_, bytes) = self.inner(dir, logical)?;
            let node = DxBlock::node(&bytes, csum).map_err(|c| c.in_inode(dir))?;
            let index = node.lookup(hash);
            next = node.entry(index).block;
            frames.push((logical, index));
        }
        self.check_leaf(dir, next)?;
        Ok(Path { frames, hasher, hash, leaf: next })
    }

    fn inner(&mut self, dir: InodeNumber, logical: LogicalBlock) -> Result<(FsBlock, Vec<u8>)> {
        if logical.0 == 0 {
            return Err(damaged(dir, logical, "the index leads back to its root"));
        }
        self.index_block(dir, logical)
    }

    fn check_leaf(&self, dir: InodeNumber, leaf: LogicalBlock) -> Result<()> {
        if leaf.0 != 0 && leaf.0 < self.dir_blocks(dir) {
            return Ok(());
        }
        Err(damaged(dir, leaf, "the index leads outside the directory"))
    }

    /// Moves to the next leaf when names of the same hash go on there.
    fn next_leaf(&mut self, dir: InodeNumber, path: &mut Path) -> Result<bool> {
        let csum = self.format().csum;
        let levels = path.frames.len();
        for depth in (0..levels).rev() {
            let (logical, index) = path.frames[depth];
            let (_, bytes) = self.index_block(dir, logical)?;
            let node = dx(&bytes, logical, csum)?;
            if index + 1 >= node.count() {
                continue;
            }
            let entry = node.entry(index + 1);
            if entry.hash & 1 == 0 || entry.hash & !1 != path.hash {
                return Ok(false);
            }
            path.frames[depth].1 += 1;
            path.frames.truncate(depth + 1);
            let mut next = entry.block;
            while path.frames.len() < levels {
                let (_, bytes) = self.inner(dir, next)?;
                let node = DxBlock::node(&bytes, csum)?;
                path.frames.push((next, 0));
                next = node.entry(0).block;
            }
            self.check_leaf(dir, next)?;
            path.leaf = next;
            return Ok(true);
        }
        Ok(false)
    }

    /// Removes an entry that [`Replay::find`] found.
    pub(super) fn remove_entry(&mut self, dir: InodeNumber, found: &Found) -> Result<()> {
        let mut bytes = self.view.read(found.block)?;
        let mut block = DirBlockMut::new(&mut bytes, self.format());
        block.remove(found.offset).map_err(|c| c.in_inode(dir))?;
        block.set_checksum(self.dir_seed(dir)).map_err(|c| c.in_inode(dir))?;
        self.view.write(found.block, bytes);
        Ok(())
    }

    /// Adds a name that is not there.
    pub(super) fn add_entry(
        &mut self,
        dir: InodeNumber,
        name: &[u8],
        target: (InodeNumber, FileType),
    ) -> Result<()> {
        if self.is_indexed(dir) {
            return self.add_by_index(dir, name, target);
        }
        let blocks = self.dir_blocks(dir);
        for logical in (0..blocks).map(LogicalBlock) {
            if let Some((block, bytes)) = self.dir_block(dir, logical)? {
                self.verify_leaf(dir, logical, &bytes)?;
                if self.insert_into(dir, (block, bytes), name, target)? {
                    return Ok(());
                }
            }
        }
        if blocks == 1 && self.sb.features().compat.contains(Compat::DIR_INDEX) {
            self.make_indexed(dir)?;
            return self.add_by_index(dir, name, target);
        }
        let mut bytes = vec![0; self.sb.block_size() as usize];
        let format = self.format();
        DirBlockMut::new(&mut bytes, format).init_empty();
        let (_, block) = self.append(dir, bytes.clone())?;
        if self.insert_into(dir, (block, bytes), name, target)? {
            return Ok(());
        }
        Err(damaged(dir, LogicalBlock(blocks), "an empty block holds no name"))
    }

    fn insert_into(
        &mut self,
        dir: InodeNumber,
        (block, mut bytes): (FsBlock, Vec<u8>),
        name: &[u8],
        (ino, kind): (InodeNumber, FileType),
    ) -> Result<bool> {
        let mut leaf = DirBlockMut::new(&mut bytes, self.format());
        if leaf.insert(name, ino, kind).map_err(|c| c.in_inode(dir))?.is_none() {
            return Ok(false);
        }
        leaf.set_checksum(self.dir_seed(dir)).map_err(|c| c.in_inode(dir))?;
        self.view.write(block, bytes);
        Ok(true)
    }

    /// Gives a directory without blocks its first.
    pub(super) fn start_dir(&mut self, dir: InodeNumber, parent: InodeNumber) -> Result<()> {
        let mut bytes = vec![0; self.sb.block_size() as usize];
        let mut block = DirBlockMut::new(&mut bytes, self.format());
        block.init_dot(dir, parent);
        block.set_checksum(self.dir_seed(dir))?;
        self.append(dir, bytes).map(|_| ())
    }

    /// Appends a block to a directory.
    fn append(&mut self, dir: InodeNumber, bytes: Vec<u8>) -> Result<(LogicalBlock, FsBlock)> {
        let block = self.allocate_near(dir)?;
        let logical = LogicalBlock(self.dir_blocks(dir));
        let size = (u64::from(logical.0) + 1) * u64::from(self.sb.block_size());
        let file = self.load(dir)?;
        let extents = file.extents.as_mut();
        let extents = extents.ok_or_else(|| unsupported(dir, "is a directory without extents"))?;
        extents.insert(logical.0, Extent { logical, len: 1, start: block, unwritten: false });
        file.remapped = true;
        file.inode_mut().set_size(size);
        self.view.write(block, bytes);
        Ok((logical, block))
    }

    /// Turns a directory of one block into an indexed one.
    fn make_indexed(&mut self, dir: InodeNumber) -> Result<()> {
        let format = self.format();
        let (block, mut root) = self.dir_block_at(dir, LogicalBlock(0))?;
        let mut leaf = vec![0; root.len()];
        let version = HashVersion::from_raw(self.sb.def_hash_version(), self.sb.unsigned_hash())?;
        htree::convert_to_index(&mut root, &mut leaf, LogicalBlock(1), format, version)
            .map_err(|c| c.in_inode(dir))?;
        let seed = self.dir_seed(dir);
        DxBlockMut::root(&mut root, format.csum)?.set_checksum(seed);
        DirBlockMut::new(&mut leaf, format).set_checksum(seed)?;
        self.append(dir, leaf)?;
        self.view.write(block, root);
        let mut inode = self.load(dir)?.inode_mut();
        let flags = inode.flags() | InodeFlags::INDEX;
        inode.set_flags(flags);
        Ok(())
    }

    fn add_by_index(
        &mut self,
        dir: InodeNumber,
        name: &[u8],
        target: (InodeNumber, FileType),
    ) -> Result<()> {
        let path = self.probe(dir, name)?;
        let (block, bytes) = self.dir_block_at(dir, path.leaf)?;
        self.verify_leaf(dir, path.leaf, &bytes)?;
        if self.insert_into(dir, (block, bytes), name, target)? {
            return Ok(());
        }
        self.make_room(dir, &path)?;
        // The way down may be another now.
        let path = self.probe(dir, name)?;
        let place = self.split_leaf(dir, &path)?;
        let bytes = self.view.read(place)?;
        if self.insert_into(dir, (place, bytes), name, target)? {
            return Ok(());
        }
        Err(damaged(dir, path.leaf, "half a leaf holds no name"))
    }

    /// Splits what is full above a leaf.
    fn make_room(&mut self, dir: InodeNumber, path: &Path) -> Result<()> {
        let csum = self.format().csum;
        let mut roomy = None;
        for (depth, &(logical, _)) in path.frames.iter().enumerate().rev() {
            let (_, bytes) = self.index_block(dir, logical)?;
            if !dx(&bytes, logical, csum)?.is_full() {
                roomy = Some(depth);
                break;
            }
        }
        let mut frames = path.frames.clone();
        let roomy = match roomy {
            Some(depth) => depth,
            None => {
                let below = self.push_level(dir, &mut frames)?;
                frames.insert(1, below);
                1
            }
        };
        for depth in roomy + 1..frames.len() {
            self.split_node(dir, &mut frames, depth)?;
        }
        Ok(())
    }

    /// Puts a level below the root; the new node and the element in it.
    fn push_level(
        &mut self,
        dir: InodeNumber,
        frames: &mut [(LogicalBlock, usize)],
    ) -> Result<(LogicalBlock, usize)> {
        if frames.len() > usize::from(self.max_levels()) {
            let text = format!("fast commits overflow the index of directory {dir}: run e2fsck");
            return Err(JournalError::Unsupported(text));
        }
        let (csum, seed) = (self.format().csum, self.dir_seed(dir));
        let (block, mut root) = self.index_block(dir, LogicalBlock(0))?;
        let mut node = vec![0; root.len()];
        let logical = LogicalBlock(self.dir_blocks(dir));
        let mut edit = DxBlockMut::root(&mut root, csum)?;
        edit.push_level(&mut node, logical)?;
        edit.set_checksum(seed);
        DxBlockMut::node(&mut node, csum)?.set_checksum(seed);
        self.append(dir, node)?;
        self.view.write(block, root);
        Ok((logical, std::mem::take(&mut frames[0].1)))
    }

    /// Splits a node; the one above has room.
    fn split_node(
        &mut self,
        dir: InodeNumber,
        frames: &mut [(LogicalBlock, usize)],
        depth: usize,
    ) -> Result<()> {
        let (csum, seed) = (self.format().csum, self.dir_seed(dir));
        let (logical, index) = frames[depth];
        let (block, mut old) = self.index_block(dir, logical)?;
        let mut new = vec![0; old.len()];
        let mut edit = DxBlockMut::node(&mut old, csum)?;
        let hash = edit.split_into(&mut new)?;
        let kept = edit.view().count();
        edit.set_checksum(seed);
        DxBlockMut::node(&mut new, csum)?.set_checksum(seed);
        let (added, _) = self.append(dir, new)?;
        self.insert_element(dir, frames[depth - 1], hash, added)?;
        self.view.write(block, old);
        if index >= kept {
            frames[depth] = (added, index - kept);
            frames[depth - 1].1 += 1;
        }
        Ok(())
    }

    fn insert_element(
        &mut self,
        dir: InodeNumber,
        (logical, index): (LogicalBlock, usize),
        hash: u32,
        block: LogicalBlock,
    ) -> Result<()> {
        let csum = self.format().csum;
        let (home, mut bytes) = self.index_block(dir, logical)?;
        let mut edit = match logical.0 {
            0 => DxBlockMut::root(&mut bytes, csum)?,
            _ => DxBlockMut::node(&mut bytes, csum)?,
        };
        if index >= edit.view().count() || !edit.insert_after(index, hash, block) {
            return Err(damaged(dir, logical, "a node has no room where it should"));
        }
        edit.set_checksum(self.dir_seed(dir));
        self.view.write(home, bytes);
        Ok(())
    }

    /// Splits a full leaf; the node above has room. Gives the half for the path's hash.
    fn split_leaf(&mut self, dir: InodeNumber, path: &Path) -> Result<FsBlock> {
        let (format, seed) = (self.format(), self.dir_seed(dir));
        let (block, mut lower) = self.dir_block_at(dir, path.leaf)?;
        let mut upper = vec![0; lower.len()];
        let split = htree::split_leaf(&mut lower, &mut upper, format, &path.hasher)
            .map_err(|c| c.in_inode(dir).at_logical(path.leaf))?;
        for half in [&mut lower, &mut upper] {
            DirBlockMut::new(half, format).set_checksum(seed)?;
        }
        let (logical, new) = self.append(dir, upper)?;
        let last = path.frames.last().copied().unwrap_or_default();
        self.insert_element(dir, last, split.index_hash(), logical)?;
        self.view.write(block, lower);
        Ok(if path.hash >= split.hash { new } else { block })
    }
}

/// A root or node of an index.
fn dx(bytes: &[u8], logical: LogicalBlock, csum: bool) -> uext_ondisk::Result<DxBlock<'_>> {
    match logical.0 {
        0 => DxBlock::root(bytes, csum).map(|(root, _)| root),
        _ => DxBlock::node(bytes, csum),
    }
}

fn damaged(dir: InodeNumber, logical: LogicalBlock, detail: &str) -> JournalError {
    Corrupt::value("directory", detail).in_inode(dir).at_logical(logical).into()
}
