//! Changing a file's size, and giving its blocks back.
//!
//! A truncation that needs more than one handle puts the inode on the orphan list in
//! the first, with the new size, and takes it off in the last: after a crash in between,
//! the next mount finishes it. Blocks go from the end, one step and one handle at a time,
//! and no handle is kept over a wait for another.
//!
//! Locks: `Inode::rwsem` is held exclusively by the caller; then `Inode::writeback`, so that
//! nothing is mapped meanwhile; then pages; then each step's handle and `Inode::map`.

use std::sync::Arc;

use uext_jbd2::Handle;
use uext_vfs::{Errno, FileKind};

use crate::credits;
use crate::error::Result;
use crate::extents::MAX_BLOCKS;
use crate::file::PAGE;
use crate::fs::Ext4;
use crate::inode::Inode;

/// Bytes of `i_block`: a symbolic link shorter than that is kept there.
const FAST_SYMLINK_SIZE: u64 = 60;

impl Ext4 {
    /// Sets the size of a file. Also to the size it has: then blocks behind its end are freed.
    ///
    /// # Errors
    /// `EFBIG` past the largest size; else how the device or the journal failed, and the file
    /// has the new size but may still own blocks behind it until it is truncated again.
    pub(crate) fn truncate(&self, inode: &Arc<Inode>, size: u64) -> Result<()> {
        let old = inode.size();
        if size > old { self.extend(inode, old, size) } else { self.shrink(inode, old, size) }
    }

    /// Lets a file grow, by a hole or over blocks behind its end.
    pub(crate) fn extend(&self, inode: &Inode, old: u64, size: u64) -> Result<()> {
        if size > self.max_file_size(inode) {
            return Err(Errno::EFBIG.into());
        }
        self.allow_size(size)?;
        self.zero_tail(inode, old)?;
        if inode.core.lock().disk_size < old {
            // Data before the old end is written first: the size on the disk tells of it.
            self.flush_data(inode)?;
        } else {
            // The zeroes behind the old end, which may be those of an earlier truncation, too:
            // what the disk has there must not show.
            inode.mapping.write_and_wait(old / PAGE..old.div_ceil(PAGE))?;
        }
        let handle = self.start(credits::SETATTR)?;
        self.set_sizes(inode, size);
        self.mark_inode_dirty(&handle, inode)
    }

    /// The new size, and the times of the change.
    pub(crate) fn set_sizes(&self, inode: &Inode, size: u64) {
        let now = self.now();
        let mut core = inode.core.lock();
        (core.size, core.disk_size) = (size, size);
        (core.mtime, core.ctime) = (now, now);
    }

    fn shrink(&self, inode: &Arc<Inode>, old: u64, size: u64) -> Result<()> {
        if inode.core.lock().disk_size < size {
            // The new end may lie in a hole, which no writeback would make the size follow to; so
            // the size goes to the disk now, after the data before it.
            inode.mapping.write_and_wait(0..size.div_ceil(PAGE))?;
        }
        let _writeback = inode.writeback.lock();
        self.zero_tail(inode, size)?;
        let first = self.block_behind(size);
        let handle = self.start(credits::TRUNCATE)?;
        self.set_sizes(inode, size);
        // The first step and the new size are one update.
        let stepped = self.unmap_step(&handle, inode, first, MAX_BLOCKS);
        if !matches!(stepped, Ok(None)) {
            self.orphan_add(&handle, inode)?;
        }
        self.mark_inode_dirty(&handle, inode)?;
        drop(handle);
        self.drop_cached(inode, size, first);
        if size == 0 && old > 0 && self.options.auto_da_alloc {
            self.note_replaced(inode);
        }
        let Some(mut end) = stepped? else { return Ok(()) };
        loop {
            let handle = self.start(credits::TRUNCATE)?;
            let rest = self.unmap_step(&handle, inode, first, end);
            // Without a name it stays on the list until it is deleted.
            if matches!(rest, Ok(None)) && inode.core.lock().nlink > 0 {
                self.orphan_del(&handle, inode)?;
            }
            self.mark_inode_dirty(&handle, inode)?;
            match rest? {
                Some(rest) => end = rest,
                None => return Ok(()),
            }
        }
    }

    /// Drops pages and delayed blocks behind a size.
    fn drop_cached(&self, inode: &Inode, size: u64, first: u32) {
        self.zero_cached_tail(inode, size);
        inode.mapping.truncate(size.div_ceil(PAGE));
        self.drop_delayed(inode, first, MAX_BLOCKS);
    }

    /// Whether the inode's `i_block` maps blocks.
    fn has_mapping(&self, inode: &Inode) -> bool {
        match inode.kind {
            FileKind::Regular | FileKind::Directory => true,
            FileKind::Symlink => {
                let core = inode.core.lock();
                let attribute =
                    if core.file_acl.0 == 0 { 0 } else { u64::from(self.block_size() / 512) };
                core.size >= FAST_SYMLINK_SIZE || core.blocks > attribute
            }
            _ => false,
        }
    }

    /// Frees every block of an inode that is being deleted and is on the orphan list already;
    /// its size and attributes are the caller's.
    ///
    /// # Errors
    /// As for [`Ext4::truncate`].
    pub(crate) fn drop_all_blocks(&self, inode: &Inode) -> Result<()> {
        let _writeback = inode.writeback.lock();
        inode.mapping.truncate(0);
        self.drop_delayed(inode, 0, MAX_BLOCKS);
        if !self.has_mapping(inode) {
            return Ok(());
        }
        let mut end = MAX_BLOCKS;
        loop {
            let handle = self.start(credits::TRUNCATE)?;
            let rest = self.unmap_marked(&handle, inode, end)?;
            match rest {
                Some(rest) => end = rest,
                None => return Ok(()),
            }
        }
    }

    fn unmap_marked(&self, handle: &Handle, inode: &Inode, end: u32) -> Result<Option<u32>> {
        let rest = self.unmap_step(handle, inode, 0, end);
        self.mark_inode_dirty(handle, inode)?;
        rest
    }
}
