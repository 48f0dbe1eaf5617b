//! Indexed directories: hash tree lookup, insertion and splits.
//!
//! Source: Documentation/filesystems/ext4/directory.rst (hash tree directories).
//!
//! Invariants:
//! - Index hashes rise along every level, so a walk to the next leaf always ends; a
//!   walk that does not get further is damage.
//! - Splits are made in private copies, checked there, and then copied into the
//!   buffers: damage is found before anything changes, and one buffer is locked at
//!   a time.
//! - Space is taken before anything leads to it. When a split fails for want of
//!   space, every level that was split before is sound.
//!
//! Errors here come in two layers: the outer one is damage of the index itself (the
//! caller may do without the index), the inner one everything else.

use uext_jbd2::Handle;
use uext_ondisk::dirhash::{DirHasher, HashVersion};
use uext_ondisk::htree::{self, DxBlock, DxBlockMut, DxEntry, RootInfo};
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, LogicalBlock};
use uext_pagecache::Buffer;
use uext_vfs::Errno;

use crate::dir::{Search, Target};
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

const WHAT: &str = "directory index";

/// A block of the index and the element taken in it.
struct Frame {
    logical: LogicalBlock,
    buffer: Buffer,
    /// The element that was followed.
    index: usize,
}

/// The way from the root to a leaf.
pub(crate) struct Path {
    pub hasher: DirHasher,
    levels: u8,
    frames: Vec<Frame>,
    /// The leaf.
    pub leaf: LogicalBlock,
}

/// A root or an inner node to look at.
fn view(bytes: &[u8], logical: LogicalBlock, csum: bool) -> uext_ondisk::Result<DxBlock<'_>> {
    match logical.0 {
        0 => DxBlock::root(bytes, csum).map(|(root, _)| root),
        _ => DxBlock::node(bytes, csum),
    }
}

/// A root or an inner node to edit.
fn edit(
    bytes: &mut [u8],
    logical: LogicalBlock,
    csum: bool,
) -> uext_ondisk::Result<DxBlockMut<'_>> {
    match logical.0 {
        0 => DxBlockMut::root(bytes, csum),
        _ => DxBlockMut::node(bytes, csum),
    }
}

impl Ext4 {
    /// What new indexes are hashed by.
    pub(crate) fn default_hasher(&self) -> Result<DirHasher> {
        let version = HashVersion::from_raw(self.sb.def_hash_version(), self.sb.unsigned_hash())?;
        Ok(DirHasher { version, seed: self.sb.hash_seed() })
    }

    fn csum(&self) -> bool {
        self.dir_format().csum
    }

    /// The root's fields, checked against what this filesystem may have.
    fn root_hasher(&self, info: RootInfo) -> uext_ondisk::Result<DirHasher> {
        if info.flags & 1 != 0 {
            return Err(Corrupt::value(WHAT, format!("unused_flags is {:#x}", info.flags)));
        }
        if info.indirect_levels > self.max_index_levels() {
            let detail = format!("indirect_levels is {}", info.indirect_levels);
            return Err(Corrupt::value(WHAT, detail));
        }
        let version = HashVersion::from_raw(info.hash_version, self.sb.unsigned_hash())?;
        Ok(DirHasher { version, seed: self.sb.hash_seed() })
    }

    /// The hash function of an indexed directory.
    pub(crate) fn hasher_of(&self, dir: &Inode) -> Result<DirHasher> {
        let root = self.index_block(dir, LogicalBlock(0))?;
        let bytes = root.read();
        let place = |c| self.in_dir(dir, LogicalBlock(0), c);
        let (_, info) = DxBlock::root(&bytes, self.csum()).map_err(place)?;
        self.root_hasher(info).map_err(place)
    }

    /// Follows the index to the leaf of a hash that `hash` computes from the hasher.
    ///
    /// # Errors
    /// Damage of the index.
    pub(crate) fn probe(&self, dir: &Inode, hash: impl FnOnce(&DirHasher) -> u32) -> Result<Path> {
        let root = self.index_block(dir, LogicalBlock(0))?;
        let (info, mut next, mut frames);
        let (hasher, hash) = {
            let bytes = root.read();
            let place = |c| self.in_dir(dir, LogicalBlock(0), c);
            let (block, root_info) = DxBlock::root(&bytes, self.csum()).map_err(place)?;
            let hasher = self.root_hasher(root_info).map_err(place)?;
            let hash = hash(&hasher);
            let index = block.lookup(hash);
            next = block.entry(index).block;
            info = root_info;
            frames = vec![Frame { logical: LogicalBlock(0), buffer: root.clone(), index }];
            (hasher, hash)
        };
        for _ in 0..info.indirect_levels {
            let (logical, buffer) = (next, self.inner_node(dir, next)?);
            let bytes = buffer.read();
            let block =
                view(&bytes, logical, self.csum()).map_err(|c| self.in_dir(dir, logical, c))?;
            let index = block.lookup(hash);
            next = block.entry(index).block;
            drop(bytes);
            frames.push(Frame { logical, buffer, index });
        }
        self.check_leaf(dir, next)?;
        Ok(Path { hasher, levels: info.indirect_levels, frames, leaf: next })
    }

    /// Whether a leaf can lie where the index says.
    fn check_leaf(&self, dir: &Inode, logical: LogicalBlock) -> Result<()> {
        if logical.0 != 0 && logical.0 < self.dir_blocks(dir)? {
            return Ok(());
        }
        let detail = format!("leads to block {logical} for a leaf");
        Err(self.in_dir(dir, LogicalBlock(0), Corrupt::value(WHAT, detail)))
    }

    fn inner_node(&self, dir: &Inode, logical: LogicalBlock) -> Result<Buffer> {
        if logical.0 == 0 {
            let detail = "the index leads back to its root";
            return Err(self.in_dir(dir, logical, Corrupt::value(WHAT, detail)));
        }
        self.index_block(dir, logical)
    }

    /// Moves the path to the next leaf; gives the hash of its element (bit 0: continued), or
    /// `None` at the end.
    ///
    /// # Errors
    /// Damage of the index.
    pub(crate) fn next_leaf(&self, dir: &Inode, path: &mut Path) -> Result<Option<u32>> {
        // The lowest level that has another element.
        let mut found = None;
        for (depth, frame) in path.frames.iter().enumerate().rev() {
            if let Some(entry) = self.element(dir, frame, frame.index + 1)? {
                found = Some((depth, entry));
                break;
            }
        }
        let Some((depth, entry)) = found else { return Ok(None) };
        path.frames[depth].index += 1;
        path.frames.truncate(depth + 1);
        let mut next = entry.block;
        while path.frames.len() <= usize::from(path.levels) {
            let frame = Frame { logical: next, buffer: self.inner_node(dir, next)?, index: 0 };
            let first = self.element(dir, &frame, 0)?;
            let empty = || self.in_dir(dir, next, Corrupt::value(WHAT, "a node is empty"));
            next = first.ok_or_else(empty)?.block;
            path.frames.push(frame);
        }
        self.check_leaf(dir, next)?;
        path.leaf = next;
        Ok(Some(entry.hash))
    }

    fn element(&self, dir: &Inode, frame: &Frame, index: usize) -> Result<Option<DxEntry>> {
        let bytes = frame.buffer.read();
        let block = view(&bytes, frame.logical, self.csum())
            .map_err(|c| self.in_dir(dir, frame.logical, c))?;
        Ok((index < block.count()).then(|| block.entry(index)))
    }

    /// Finds a name by the index; room for it only in the leaf that it is added to.
    pub(crate) fn htree_find(&self, dir: &Inode, name: &[u8]) -> Result<Result<Search>> {
        let mut hash = 0;
        let mut path = self.probe(dir, |hasher| {
            hash = hasher.hash(name).hash;
            hash
        })?;
        let first = path.leaf;
        let mut room = None;
        for _ in 0..self.dir_blocks(dir)? {
            let searched = self
                .leaf(dir, path.leaf)
                .and_then(|leaf| self.search_block(dir, path.leaf, &leaf, name));
            match searched {
                Ok(Search::Missing(here)) if path.leaf == first => room = here,
                Ok(Search::Missing(_)) => {}
                other => return Ok(other),
            }
            // Names of one hash may go on in the next leaf.
            match self.next_leaf(dir, &mut path)? {
                Some(next) if next & 1 == 1 && next & !1 == hash => {}
                _ => return Ok(Ok(Search::Missing(room))),
            }
        }
        let detail = "more leaves of one hash than blocks";
        Err(self.in_dir(dir, path.leaf, Corrupt::value(WHAT, detail)))
    }

    /// Adds a name by the index.
    pub(crate) fn htree_add(
        &self,
        handle: &Handle,
        dir: &Inode,
        name: &[u8],
        target: Target,
    ) -> Result<Result<()>> {
        let mut hash = 0;
        let mut path = self.probe(dir, |hasher| {
            hash = hasher.hash(name).hash;
            hash
        })?;
        let leaf = match self.leaf(dir, path.leaf) {
            Ok(leaf) => leaf,
            Err(error) => return Ok(Err(error)),
        };
        match self.add_to_block(handle, dir, (path.leaf, &leaf), name, target) {
            Ok(false) => {}
            Ok(true) => return Ok(Ok(())),
            Err(error) => return Ok(Err(error)),
        }
        Ok(self
            .make_room(handle, dir, &mut path)
            .and_then(|()| self.split_leaf(handle, dir, &mut path, &leaf, hash))
            .and_then(|(logical, half)| {
                if self.add_to_block(handle, dir, (logical, &half), name, target)? {
                    return Ok(());
                }
                // Half a block holds any name; a leaf that split worse is odd, not damaged.
                Err(Errno::ENOSPC.into())
            }))
    }

    /// Makes sure that the node above the leaf has room for another element: splits the
    /// nodes that are full, from the top down, below a new level if need be.
    ///
    /// # Errors
    /// `ENOSPC` when the index is full or a block cannot be had.
    fn make_room(&self, handle: &Handle, dir: &Inode, path: &mut Path) -> Result<()> {
        let mut roomy = None;
        for (depth, frame) in path.frames.iter().enumerate().rev() {
            let bytes = frame.buffer.read();
            let block = view(&bytes, frame.logical, self.csum())
                .map_err(|c| self.in_dir(dir, frame.logical, c))?;
            if !block.is_full() {
                roomy = Some(depth);
                break;
            }
        }
        let roomy = match roomy {
            Some(depth) => depth,
            None => {
                self.push_level(handle, dir, path)?;
                1
            }
        };
        for depth in roomy + 1..path.frames.len() {
            self.split_node(handle, dir, path, depth)?;
        }
        Ok(())
    }

    /// Puts a level between the root and what is below it.
    fn push_level(&self, handle: &Handle, dir: &Inode, path: &mut Path) -> Result<()> {
        if path.levels >= self.max_index_levels() {
            log::warn!("{}: inode {}: directory index full", self.name, dir.ino);
            return Err(Errno::ENOSPC.into());
        }
        let csum = self.csum();
        let place = |c| self.in_dir(dir, LogicalBlock(0), c);
        let mut root = path.frames[0].buffer.read().to_vec();
        let mut node = vec![0; root.len()];
        // The node is the next block of the directory.
        let logical = LogicalBlock(self.dir_blocks(dir)?);
        let mut block = DxBlockMut::root(&mut root, csum).map_err(place)?;
        block.push_level(&mut node, logical).map_err(place)?;
        block.set_checksum(dir.csum_seed);
        DxBlockMut::node(&mut node, csum).map_err(place)?.set_checksum(dir.csum_seed);

        self.append_dir_block(handle, dir, &node)?;
        self.replace_block(handle, &path.frames[0].buffer, &root)?;
        let index = std::mem::take(&mut path.frames[0].index);
        let buffer = self.index_block(dir, logical)?;
        path.frames.insert(1, Frame { logical, buffer, index });
        path.levels += 1;
        Ok(())
    }

    /// Splits the node at `depth`; the one above it has room. The path follows its half.
    fn split_node(
        &self,
        handle: &Handle,
        dir: &Inode,
        path: &mut Path,
        depth: usize,
    ) -> Result<()> {
        let csum = self.csum();
        let logical = path.frames[depth].logical;
        let place = |c| self.in_dir(dir, logical, c);
        let mut old = path.frames[depth].buffer.read().to_vec();
        let mut new = vec![0; old.len()];
        let mut block = DxBlockMut::node(&mut old, csum).map_err(place)?;
        let hash = block.split_into(&mut new).map_err(place)?;
        let kept = block.view().count();
        block.set_checksum(dir.csum_seed);
        DxBlockMut::node(&mut new, csum).map_err(place)?.set_checksum(dir.csum_seed);

        let new_logical = self.append_dir_block(handle, dir, &new)?;
        let above = path.frames[depth - 1].index;
        self.insert_element(handle, dir, &path.frames[depth - 1], above, hash, new_logical)?;
        self.replace_block(handle, &path.frames[depth].buffer, &old)?;
        if path.frames[depth].index >= kept {
            let index = path.frames[depth].index - kept;
            let buffer = self.index_block(dir, new_logical)?;
            path.frames[depth] = Frame { logical: new_logical, buffer, index };
            path.frames[depth - 1].index += 1;
        }
        Ok(())
    }

    /// Inserts an element after `index` in a node that has room.
    fn insert_element(
        &self,
        handle: &Handle,
        dir: &Inode,
        frame: &Frame,
        index: usize,
        hash: u32,
        block: LogicalBlock,
    ) -> Result<()> {
        let place = |c| self.in_dir(dir, frame.logical, c);
        let mut bytes = frame.buffer.read().to_vec();
        let mut node = edit(&mut bytes, frame.logical, self.csum()).map_err(place)?;
        if index >= node.view().count() || !node.insert_after(index, hash, block) {
            return Err(place(Corrupt::value(WHAT, "a node changed while it was held")));
        }
        node.set_checksum(dir.csum_seed);
        self.replace_block(handle, &frame.buffer, &bytes)
    }

    /// Splits a full leaf; the node above has room. Gives the half that `hash` belongs to.
    fn split_leaf(
        &self,
        handle: &Handle,
        dir: &Inode,
        path: &mut Path,
        leaf: &Buffer,
        hash: u32,
    ) -> Result<(LogicalBlock, Buffer)> {
        let place = |c| self.in_dir(dir, path.leaf, c);
        let format = self.dir_format();
        let mut lower = leaf.read().to_vec();
        let mut upper = vec![0; lower.len()];
        let split =
            htree::split_leaf(&mut lower, &mut upper, format, &path.hasher).map_err(place)?;
        for half in [&mut lower, &mut upper] {
            uext_ondisk::dir_entry::DirBlockMut::new(half, format)
                .set_checksum(dir.csum_seed)
                .map_err(place)?;
        }
        let new = self.append_dir_block(handle, dir, &upper)?;
        let last = path.frames.last().ok_or(Error::Errno(Errno::EIO))?;
        self.insert_element(handle, dir, last, last.index, split.index_hash(), new)?;
        self.replace_block(handle, leaf, &lower)?;
        if hash >= split.hash {
            Ok((new, self.leaf(dir, new)?))
        } else {
            Ok((path.leaf, leaf.clone()))
        }
    }

    /// Gives a directory of one linear block an index with one leaf.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn make_indexed(&self, handle: &Handle, dir: &Inode) -> Result<()> {
        let zero = LogicalBlock(0);
        let place = |c| self.in_dir(dir, zero, c);
        let hasher = self.default_hasher()?;
        let hole = || place(Corrupt::value(WHAT, "block 0 is a hole"));
        let buffer = self.leaf_or_hole(dir, zero)?.ok_or_else(hole)?;
        let mut root = buffer.read().to_vec();
        let mut leaf = vec![0; root.len()];
        let format = self.dir_format();
        let logical = LogicalBlock(1);
        htree::convert_to_index(&mut root, &mut leaf, logical, format, hasher.version)
            .map_err(place)?;
        DxBlockMut::root(&mut root, format.csum).map_err(place)?.set_checksum(dir.csum_seed);
        uext_ondisk::dir_entry::DirBlockMut::new(&mut leaf, format)
            .set_checksum(dir.csum_seed)
            .map_err(place)?;

        self.append_dir_block(handle, dir, &leaf)?;
        self.replace_block(handle, &buffer, &root)?;
        dir.core.lock().flags.insert(InodeFlags::INDEX);
        self.mark_inode_dirty(handle, dir)
    }
}
