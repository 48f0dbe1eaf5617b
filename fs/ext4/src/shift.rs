//! Taking a range out of a file, and putting one in: what follows moves with its blocks.
//!
//! fallocate(2) does that with `FALLOC_FL_COLLAPSE_RANGE` and `FALLOC_FL_INSERT_RANGE`, which
//! FUSE does not carry, so they come as ioctls.
//!
//! Invariants:
//! - Both go in steps of one leaf and one handle. A crash in between leaves a whole tree,
//!   and a file of which a part has moved already, as on the kernel's ext4.
//! - The size grows before anything moves to the end and shrinks after all has moved to the
//!   front, so that no data is ever behind it.
//!
//! Locks: `Inode::rwsem` exclusive, then `Inode::writeback`; then each step's handle and
//! `Inode::map`.

use std::sync::Arc;

use uext_ondisk::inode::InodeFlags;
use uext_vfs::{Context, Errno, FileKind};

use crate::credits;
use crate::error::{Error, Result};
use crate::extents::MAX_BLOCKS;
use crate::file::{PAGE, kill_suidgid};
use crate::fs::Ext4;
use crate::inode::Inode;

impl Ext4 {
    /// Takes the range `(offset, len)` out of a file, or puts a hole of that size in.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not of whole blocks or reaches the end of the file, `EFBIG`
    /// where the file would grow too large, `EOPNOTSUPP` for a block-mapped file and for one
    /// whose data is journalled, `EPERM` for a caller who is neither root nor the
    /// owner: how the file was opened is not known here.
    pub(crate) fn shift_range(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        (offset, len): (u64, u64),
        insert: bool,
    ) -> Result<()> {
        self.check_writable()?;
        match inode.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::ENODEV.into()),
        }
        let _exclusive = inode.rwsem.write();
        // An ACL may forbid others what the mode allows, and their further groups are not known.
        let who = ctx.known();
        let (flags, owner) = {
            let core = inode.core.lock();
            (core.flags, core.uid)
        };
        let may = who.uid == 0 || who.uid != Context::UNKNOWN && who.uid == owner;
        if !may || flags.intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND) {
            return Err(Errno::EPERM.into());
        }
        if !flags.contains(InodeFlags::EXTENTS) || self.journals_data(inode) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let block_size = u64::from(self.block_size());
        let (size, end) = (inode.size(), offset.saturating_add(len));
        let past = if insert { offset >= size } else { end >= size };
        if len == 0 || !(offset | len).is_multiple_of(block_size) || past {
            return Err(Errno::EINVAL.into());
        }
        if insert && size.saturating_add(len) > self.max_file_size(inode) {
            return Err(Errno::EFBIG.into());
        }
        if who.uid != 0 {
            kill_suidgid(&who, inode);
        }
        self.kill_capability(inode)?;
        self.flush_data(inode)?;
        let writeback = inode.writeback.lock();
        // All of it is on the disk; what is cached from here on lies elsewhere soon.
        inode.mapping.truncate(offset / PAGE);
        let blocks = (self.block_at(offset), self.block_at(end));
        if insert {
            self.insert_range(inode, blocks, size + len)?;
        } else {
            self.collapse_range(inode, blocks, size - len)?;
        }
        drop(writeback);
        if self.options.sync || flags.contains(InodeFlags::SYNC) {
            self.sync_inode(inode, false)?;
        }
        Ok(())
    }

    fn collapse_range(&self, inode: &Inode, (from, end): (u32, u32), size: u64) -> Result<()> {
        self.unmap(inode, from, end)?;
        let mut next = Some(end);
        while let Some(at) = next {
            let handle = self.start(credits::MAP_BLOCKS)?;
            let step = self.shift_left_step(&handle, inode, at, end - from);
            self.mark_inode_dirty(&handle, inode)?;
            next = step?;
        }
        let handle = self.start(credits::SETATTR)?;
        self.set_sizes(inode, size);
        self.mark_inode_dirty(&handle, inode)
    }

    fn insert_range(&self, inode: &Inode, (from, end): (u32, u32), size: u64) -> Result<()> {
        let by = end - from;
        let last = self.with_space(|| {
            let handle = self.start(credits::CONVERT + credits::SETATTR)?;
            let last = self.split_at(&handle, inode, from);
            self.mark_inode_dirty(&handle, inode)?;
            last
        })?;
        // Blocks may lie behind the end of the file, too.
        if last + u64::from(by) > u64::from(MAX_BLOCKS) {
            return Err(Error::Errno(Errno::EINVAL));
        }
        self.allow_size(size)?;
        let mut rest = Some(MAX_BLOCKS);
        let mut sized = false;
        while let Some(stop) = rest {
            let handle = self.start(credits::MAP_BLOCKS + credits::SETATTR)?;
            if !sized {
                self.set_sizes(inode, size);
                sized = true;
            }
            let step = self.shift_right_step(&handle, inode, (from, stop), by);
            self.mark_inode_dirty(&handle, inode)?;
            rest = step?;
        }
        Ok(())
    }
}
