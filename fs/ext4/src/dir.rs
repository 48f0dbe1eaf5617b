//! Directories: their blocks, and names in them, indexed or not.
//!
//! Source: Documentation/filesystems/ext4/directory.rst.
//!
//! A directory is a file of whole blocks. Linear blocks hold entries; in an indexed
//! directory (the INDEX flag, with the dir_index feature) block 0 is the root of a
//! hash tree whose inner nodes are blocks too ([`crate::htree`]), and the leaves are
//! linear blocks. Here is what both kinds share: reading and appending blocks, and
//! finding, adding, removing and redirecting a name.
//!
//! Invariants:
//! - Whatever changes a block leaves its checksum right before the guard goes.
//! - A block is changed only after all of it that is walked over was found sound.
//! - At most one buffer of a directory is locked at a time by a thread, so a damaged
//!   image that maps one block twice cannot make it wait for itself.
//!
//! Locks: the caller holds `rwsem`, shared to look and exclusively to change, except
//! for [`Ext4::parent_of`], which takes it.

use std::sync::Arc;

use uext_jbd2::Handle;
use uext_ondisk::dir_entry::{DirBlock, DirBlockMut, DirFormat, FileType};
use uext_ondisk::htree::{DxBlock, DxBlockMut, MAX_INDIRECT_LEVELS};
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{Corrupt, InodeNumber, LogicalBlock};
use uext_pagecache::Buffer;
use uext_vfs::{Errno, FileKind};

use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

const WHAT: &str = "directory";

/// Where a name stands: good while the directory's `rwsem` is held and nothing is added.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The block of the directory.
    pub logical: LogicalBlock,
    /// The same block's buffer.
    pub buffer: Buffer,
    /// The entry's offset in it, bytes.
    pub offset: usize,
    /// Where it leads.
    pub ino: InodeNumber,
}

/// Where a name that is not there may be put: good while the directory's `rwsem` is held
/// exclusively and nothing else is added.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    /// The block of the directory.
    pub logical: LogicalBlock,
    /// The same block's buffer.
    pub buffer: Buffer,
    /// The offset of the entry whose space it is, bytes.
    pub offset: usize,
}

/// What a search for a name came to.
#[derive(Clone)]
pub(crate) enum Search {
    Found(Slot),
    /// It is not there; some room for it, when the search has met the one place it may go to.
    Missing(Option<Room>),
}

impl Search {
    /// The name's place.
    pub fn found(self) -> Option<Slot> {
        match self {
            Self::Found(slot) => Some(slot),
            Self::Missing(_) => None,
        }
    }
}

/// What a name leads to, when it is added or redirected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub ino: InodeNumber,
    pub file_type: FileType,
}

impl Target {
    /// A name's target.
    pub fn of(inode: &Inode) -> Self {
        Self { ino: inode.ino, file_type: file_type_of(inode.kind) }
    }
}

/// The type byte of an entry.
pub(crate) fn file_type_of(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::Regular,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Fifo => FileType::Fifo,
        FileKind::Socket => FileType::Socket,
    }
}

/// Whether a block of an indexed directory begins as an inner node does.
fn looks_like_node(bytes: &[u8], csum: bool) -> bool {
    DxBlock::node(bytes, csum).is_ok()
}

impl Ext4 {
    /// How directories are written here.
    pub(crate) fn dir_format(&self) -> DirFormat {
        let features = self.sb.features();
        DirFormat {
            filetype: features.filetype(),
            csum: features.metadata_csum(),
            inodes_count: self.sb.inodes_count(),
        }
    }

    /// The format for walking a block that may be part of the index: a tail then reads as
    /// an unused entry, and the entries that hide an index may cover it.
    fn walk_format(&self) -> DirFormat {
        DirFormat { csum: false, ..self.dir_format() }
    }

    /// Whether a directory has an index.
    pub(crate) fn is_indexed(&self, dir: &Inode) -> bool {
        self.sb.features().dir_index() && dir.core.lock().flags.contains(InodeFlags::INDEX)
    }

    /// Whether a directory lies in its inode.
    pub(crate) fn is_inline(&self, dir: &Inode) -> bool {
        dir.core.lock().flags.contains(InodeFlags::INLINE_DATA)
    }

    /// Blocks of a directory.
    ///
    /// # Errors
    /// `Corrupt` when its size leaves the range of block numbers.
    pub(crate) fn dir_blocks(&self, dir: &Inode) -> Result<u32> {
        let size = dir.core.lock().size;
        u32::try_from(size / u64::from(self.block_size()))
            .map_err(|_| Corrupt::value(WHAT, format!("size is {size}")).in_inode(dir.ino).into())
    }

    /// An error of a directory's block, with its place.
    pub(crate) fn in_dir(&self, dir: &Inode, logical: LogicalBlock, corrupt: Corrupt) -> Error {
        corrupt.in_inode(dir.ino).at_logical(logical).into()
    }

    /// Reads a block without looking at its contents; `None` is a hole.
    fn dir_block(&self, dir: &Inode, logical: LogicalBlock) -> Result<Option<Buffer>> {
        match self.map_lookup(dir, logical, 1)?.start {
            Some(block) => Ok(Some(self.buffers.bread(block.0)?)),
            None => Ok(None),
        }
    }

    /// Reads a linear block (or leaf) and checks its checksum once; `None` is a hole.
    ///
    /// # Errors
    /// `Corrupt` for a bad checksum.
    pub(crate) fn leaf_or_hole(
        &self,
        dir: &Inode,
        logical: LogicalBlock,
    ) -> Result<Option<Buffer>> {
        let Some(buffer) = self.dir_block(dir, logical)? else { return Ok(None) };
        if self.dir_format().csum && !buffer.is_verified() {
            let bytes = buffer.read();
            DirBlock::new(&bytes, self.dir_format())
                .verify_checksum(dir.csum_seed)
                .map_err(|c| self.in_dir(dir, logical, c))?;
            buffer.set_verified();
        }
        Ok(Some(buffer))
    }

    /// Reads a leaf of the index, which cannot be a hole, nor the root.
    pub(crate) fn leaf(&self, dir: &Inode, logical: LogicalBlock) -> Result<Buffer> {
        let hole = || self.in_dir(dir, logical, Corrupt::value(WHAT, "the index leads to no leaf"));
        if logical.0 == 0 {
            return Err(hole());
        }
        self.leaf_or_hole(dir, logical)?.ok_or_else(hole)
    }

    /// Reads the root (block 0) or an inner node of the index and checks its checksum once.
    pub(crate) fn index_block(&self, dir: &Inode, logical: LogicalBlock) -> Result<Buffer> {
        let hole = || self.in_dir(dir, logical, Corrupt::value(WHAT, "the index has a hole"));
        let buffer = self.dir_block(dir, logical)?.ok_or_else(hole)?;
        let csum = self.dir_format().csum;
        if csum && !buffer.is_verified() {
            let bytes = buffer.read();
            let block = match logical.0 {
                0 => DxBlock::root(&bytes, csum).map(|(root, _)| root),
                _ => DxBlock::node(&bytes, csum),
            };
            block
                .and_then(|block| block.verify_checksum(dir.csum_seed))
                .map_err(|c| self.in_dir(dir, logical, c))?;
            buffer.set_verified();
        }
        Ok(buffer)
    }

    /// Appends a block with the contents `fill` makes, which end with their checksum.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn append_dir_block(
        &self,
        handle: &Handle,
        dir: &Inode,
        content: &[u8],
    ) -> Result<LogicalBlock> {
        let logical = LogicalBlock(self.dir_blocks(dir)?);
        let size = (u64::from(logical.0) + 1) * u64::from(self.block_size());
        // Without large_dir a directory's size has 32 bits.
        if size > u64::from(u32::MAX) {
            return Err(Errno::ENOSPC.into());
        }
        let block = self.map_new_meta(handle, dir, logical)?;
        let buffer = self.buffers.getblk(block.0);
        {
            let mut bytes = handle.create(&buffer)?;
            bytes.copy_from_slice(content);
            buffer.set_verified();
        }
        {
            let mut core = dir.core.lock();
            core.size = size;
            core.disk_size = size;
        }
        self.mark_inode_dirty(handle, dir)?;
        Ok(logical)
    }

    /// Puts new contents, already with their checksum, into a block of a directory.
    pub(crate) fn replace_block(
        &self,
        handle: &Handle,
        buffer: &Buffer,
        content: &[u8],
    ) -> Result<()> {
        handle.write(buffer)?.copy_from_slice(content);
        Ok(())
    }

    /// Makes a new directory's first block: `.` and `..`.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn init_dir(&self, handle: &Handle, dir: &Inode, parent: InodeNumber) -> Result<()> {
        let mut bytes = vec![0; self.block_size() as usize];
        let mut block = DirBlockMut::new(&mut bytes, self.dir_format());
        block.init_dot(dir.ino, parent);
        block.set_checksum(dir.csum_seed)?;
        self.append_dir_block(handle, dir, &bytes)?;
        Ok(())
    }

    /// Finds a name.
    ///
    /// # Errors
    /// `Corrupt` when a block that may hold it cannot be used. A damaged index is reported
    /// and done without.
    pub(crate) fn find_entry(&self, dir: &Inode, name: &[u8]) -> Result<Option<Slot>> {
        self.search_entry(dir, name).map(Search::found)
    }

    /// Finds a name, or where it may be put.
    ///
    /// # Errors
    /// As [`Ext4::find_entry`].
    pub(crate) fn search_entry(&self, dir: &Inode, name: &[u8]) -> Result<Search> {
        let by_slot = |slot: Option<Slot>| slot.map_or(Search::Missing(None), Search::Found);
        if self.is_inline(dir) {
            return self.inline_find(dir, name).map(by_slot);
        }
        if name == b"." || name == b".." {
            return self.find_dot(dir, name).map(Search::Found);
        }
        let indexed = self.is_indexed(dir);
        if indexed {
            match self.htree_find(dir, name) {
                Ok(search) => return search,
                Err(damage) => self.report(Some(dir.ino), &damage),
            }
        }
        match self.linear_find(dir, name, indexed)? {
            // Where the index would have it is not known.
            Search::Missing(_) if indexed => Ok(Search::Missing(None)),
            search => Ok(search),
        }
    }

    /// Looks through every block; those of an index are passed over.
    fn linear_find(&self, dir: &Inode, name: &[u8], indexed: bool) -> Result<Search> {
        let mut room = None;
        for number in 0..self.dir_blocks(dir)? {
            let logical = LogicalBlock(number);
            let Some(buffer) = self.linear_block(dir, logical, indexed)? else { continue };
            match self.search_block(dir, logical, &buffer, name)? {
                Search::Missing(here) => room = room.or(here),
                found @ Search::Found(_) => return Ok(found),
            }
        }
        Ok(Search::Missing(room))
    }

    /// A block of a directory that is walked from end to end; `None` for a hole, and for the
    /// root and the inner nodes of an index that is not trusted.
    pub(crate) fn linear_block(
        &self,
        dir: &Inode,
        logical: LogicalBlock,
        indexed: bool,
    ) -> Result<Option<Buffer>> {
        if !indexed {
            return self.leaf_or_hole(dir, logical);
        }
        if logical.0 == 0 {
            return Ok(None);
        }
        let Some(buffer) = self.dir_block(dir, logical)? else { return Ok(None) };
        let is_node = looks_like_node(&buffer.read(), self.dir_format().csum);
        if is_node { Ok(None) } else { self.leaf_or_hole(dir, logical) }
    }

    /// Finds a name in a linear block, or room for it.
    pub(crate) fn search_block(
        &self,
        dir: &Inode,
        logical: LogicalBlock,
        buffer: &Buffer,
        name: &[u8],
    ) -> Result<Search> {
        let bytes = buffer.read();
        let search = DirBlock::new(&bytes, self.dir_format())
            .search(name, uext_ondisk::dir_entry::entry_size(name.len()))
            .map_err(|c| self.in_dir(dir, logical, c))?;
        Ok(match (search.found, search.room_at) {
            (Some(entry), _) => Search::Found(Slot {
                logical,
                buffer: buffer.clone(),
                offset: entry.offset,
                ino: entry.inode,
            }),
            (None, room) => {
                Search::Missing(room.map(|offset| Room { logical, buffer: buffer.clone(), offset }))
            }
        })
    }

    /// Finds `.` or `..`: the first two entries of block 0, indexed or not.
    pub(crate) fn find_dot(&self, dir: &Inode, name: &[u8]) -> Result<Slot> {
        let logical = LogicalBlock(0);
        let bad = |detail: &str| self.in_dir(dir, logical, Corrupt::value(WHAT, detail));
        if self.is_inline(dir) {
            return self.inline_find(dir, name)?.ok_or_else(|| bad("has no `.`"));
        }
        if self.dir_blocks(dir)? == 0 {
            return Err(bad("has no block"));
        }
        let buffer = if self.is_indexed(dir) {
            self.index_block(dir, logical)?
        } else {
            self.leaf_or_hole(dir, logical)?.ok_or_else(|| bad("block 0 is a hole"))?
        };
        let bytes = buffer.read();
        let entries = DirBlock::new(&bytes, self.walk_format()).entries().take(2);
        for entry in entries {
            let entry = entry.map_err(|c| self.in_dir(dir, logical, c))?;
            if entry.in_use() && entry.name == name {
                return Ok(Slot {
                    logical,
                    buffer: buffer.clone(),
                    offset: entry.offset,
                    ino: entry.inode,
                });
            }
        }
        Err(bad("`.` or `..` is missing"))
    }

    /// The directory that `..` of a directory leads to.
    pub(crate) fn parent_of(&self, dir: &Inode) -> Result<InodeNumber> {
        let _shared = dir.rwsem.read();
        Ok(self.find_dot(dir, b"..")?.ino)
    }

    /// Adds a name that a search has not found, where the search says if it says so.
    ///
    /// # Errors
    /// As [`Ext4::add_entry`].
    pub(crate) fn add_missing(
        &self,
        handle: &Handle,
        dir: &Inode,
        name: &[u8],
        target: Target,
        room: Option<Room>,
    ) -> Result<()> {
        let Some(Room { logical, buffer, offset }) = room else {
            return self.add_entry(handle, dir, name, target);
        };
        // An index that is not used must go before the change makes it wrong.
        let stale = !self.is_indexed(dir) && dir.core.lock().flags.contains(InodeFlags::INDEX);
        if stale || !self.put_entry(handle, dir, (logical, &buffer, offset), name, target)? {
            return self.add_entry(handle, dir, name, target);
        }
        Ok(())
    }

    /// Adds a name that is not there.
    ///
    /// # Errors
    /// `ENOSPC`, also when an index is full: the directory is sound then, and without the name.
    pub(crate) fn add_entry(
        &self,
        handle: &Handle,
        dir: &Inode,
        name: &[u8],
        target: Target,
    ) -> Result<()> {
        if self.is_indexed(dir) {
            match self.htree_add(handle, dir, name, target) {
                Ok(added) => return added,
                Err(damage) => {
                    self.report(Some(dir.ino), &damage);
                    // With checksums the index's blocks could not be told from leaves later.
                    if self.dir_format().csum {
                        return Err(damage);
                    }
                    dir.core.lock().flags.remove(InodeFlags::INDEX);
                    self.mark_inode_dirty(handle, dir)?;
                    return self.linear_add(handle, dir, name, target, false);
                }
            }
        }
        self.linear_add(handle, dir, name, target, self.sb.features().dir_index())
    }

    /// Adds a name to a directory without an index; `may_index` lets a single full block
    /// become the first leaf of one.
    fn linear_add(
        &self,
        handle: &Handle,
        dir: &Inode,
        name: &[u8],
        target: Target,
        may_index: bool,
    ) -> Result<()> {
        let blocks = self.dir_blocks(dir)?;
        // A filesystem that lost dir_index may still have flagged directories: the flag must go
        // before a linear change makes the index wrong.
        if dir.core.lock().flags.contains(InodeFlags::INDEX) {
            dir.core.lock().flags.remove(InodeFlags::INDEX);
            self.mark_inode_dirty(handle, dir)?;
        }
        for number in 0..blocks {
            let logical = LogicalBlock(number);
            let Some(buffer) = self.leaf_or_hole(dir, logical)? else { continue };
            if self.add_to_block(handle, dir, (logical, &buffer), name, target)? {
                return Ok(());
            }
        }
        if blocks == 1 && may_index {
            self.make_indexed(handle, dir)?;
            return self.htree_add(handle, dir, name, target)?;
        }
        let mut bytes = vec![0; self.block_size() as usize];
        let mut block = DirBlockMut::new(&mut bytes, self.dir_format());
        block.init_empty();
        block.insert(name, target.ino, target.file_type)?;
        block.set_checksum(dir.csum_seed)?;
        self.append_dir_block(handle, dir, &bytes)?;
        Ok(())
    }

    /// Adds a name to a linear block; whether there was room.
    pub(crate) fn add_to_block(
        &self,
        handle: &Handle,
        dir: &Inode,
        (logical, buffer): (LogicalBlock, &Buffer),
        name: &[u8],
        target: Target,
    ) -> Result<bool> {
        // A block without room is not touched: the journal would have to write it.
        let need = uext_ondisk::dir_entry::entry_size(name.len());
        let room = DirBlock::new(&buffer.read(), self.dir_format()).find_room(need);
        match room.map_err(|c| self.in_dir(dir, logical, c))? {
            Some(offset) => self.put_entry(handle, dir, (logical, buffer, offset), name, target),
            None => Ok(false),
        }
    }

    /// Puts a name after the entry at an offset of a linear block that was found sound; whether
    /// there was room.
    fn put_entry(
        &self,
        handle: &Handle,
        dir: &Inode,
        (logical, buffer, offset): (LogicalBlock, &Buffer, usize),
        name: &[u8],
        target: Target,
    ) -> Result<bool> {
        let mut bytes = handle.write(buffer)?;
        let mut block = DirBlockMut::new(&mut bytes, self.dir_format());
        let added = block.insert_at(offset, name, target.ino, target.file_type);
        if added.is_some() {
            block.set_checksum(dir.csum_seed).map_err(|c| self.in_dir(dir, logical, c))?;
        }
        Ok(added.is_some())
    }

    /// Sets the checksum of a block of a directory after a change that kept its form.
    fn seal_dir_block(&self, dir: &Inode, logical: LogicalBlock, bytes: &mut [u8]) -> Result<()> {
        let format = self.dir_format();
        if logical.0 == 0 && self.is_indexed(dir) {
            DxBlockMut::root(bytes, format.csum)?.set_checksum(dir.csum_seed);
        } else {
            DirBlockMut::new(bytes, format).set_checksum(dir.csum_seed)?;
        }
        Ok(())
    }

    /// Removes the name at a slot.
    pub(crate) fn remove_entry(&self, handle: &Handle, dir: &Inode, slot: &Slot) -> Result<()> {
        let bad = |c| self.in_dir(dir, slot.logical, c);
        let mut bytes = handle.write(&slot.buffer)?;
        let mut block = DirBlockMut::new(&mut bytes, self.dir_format());
        block.remove(slot.offset).map_err(bad)?;
        block.set_checksum(dir.csum_seed).map_err(bad)
    }

    /// Lets the name at a slot lead elsewhere.
    pub(crate) fn redirect_entry(
        &self,
        handle: &Handle,
        dir: &Inode,
        slot: &Slot,
        target: Target,
    ) -> Result<()> {
        let bad = |c| self.in_dir(dir, slot.logical, c);
        let mut bytes = handle.write(&slot.buffer)?;
        DirBlockMut::new(&mut bytes, self.walk_format())
            .set_target(slot.offset, target.ino, target.file_type)
            .map_err(bad)?;
        self.seal_dir_block(dir, slot.logical, &mut bytes)
    }

    /// Whether a directory holds nothing but `.` and `..`.
    pub(crate) fn is_empty_dir(&self, dir: &Inode) -> Result<bool> {
        self.find_dot(dir, b".")?;
        self.find_dot(dir, b"..")?;
        let indexed = self.is_indexed(dir);
        for number in 0..self.dir_blocks(dir)? {
            let logical = LogicalBlock(number);
            let Some(buffer) = self.linear_block(dir, logical, indexed)? else { continue };
            let bytes = buffer.read();
            for entry in DirBlock::new(&bytes, self.dir_format()).entries() {
                let entry = entry.map_err(|c| self.in_dir(dir, logical, c))?;
                if entry.in_use() && entry.name != b"." && entry.name != b".." {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The most levels of inner nodes an index may have here.
    pub(crate) fn max_index_levels(&self) -> u8 {
        if self.sb.features().large_dir() {
            uext_ondisk::htree::MAX_INDIRECT_LEVELS_LARGE_DIR
        } else {
            MAX_INDIRECT_LEVELS
        }
    }

    /// A directory changed: its times become now, and fsync must wait for the handle.
    pub(crate) fn dir_changed(&self, handle: &Handle, dir: &Arc<Inode>) -> Result<()> {
        let now = self.now();
        {
            let mut core = dir.core.lock();
            core.mtime = now;
            core.ctime = now;
        }
        self.mark_inode_dirty(handle, dir)?;
        dir.note_tid(handle.tid(), true);
        Ok(())
    }
}
