//! Inode allocation: Orlov for directories, the parent's group for the rest.
//!
//! Locks: the group lock covers bitmap, descriptor and the first write of the raw
//! inode, so that two new inodes of one table block never see it half made.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use uext_jbd2::Handle;
use uext_ondisk::bitmap;
use uext_ondisk::extent::ExtentNode;
use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::inode::{DeviceNumber, InodeFlags};
use uext_ondisk::{Corrupt, FsBlock, GroupNumber, InodeNumber};
use uext_vfs::Errno;

use crate::error::Result;
use crate::fs::Ext4;
use crate::groups::Desc;
use crate::inode::{Core, Inode};

/// What a new inode is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewInode {
    /// Type and permission bits.
    pub mode: u16,
    pub uid: u32,
    /// The group, unless the parent directory hands its own down.
    pub gid: u32,
    /// For device files, in the kernel's new encoding.
    pub rdev: u32,
}

/// Flags a new inode takes from its directory (`EXT4_FL_INHERITED`).
const INHERITED: InodeFlags = InodeFlags::SECRM
    .union(InodeFlags::UNRM)
    .union(InodeFlags::COMPR)
    .union(InodeFlags::SYNC)
    .union(InodeFlags::NODUMP)
    .union(InodeFlags::NOATIME)
    .union(InodeFlags::NOCOMPR)
    .union(InodeFlags::JOURNAL_DATA)
    .union(InodeFlags::NOTAIL)
    .union(InodeFlags::DIRSYNC)
    .union(InodeFlags::PROJINHERIT)
    .union(InodeFlags::DAX);
/// Of these, what a regular file may have.
const REG_MASK: InodeFlags = InodeFlags::DIRSYNC.union(InodeFlags::PROJINHERIT).complement();
/// And what anything else may have.
const OTHER_MASK: InodeFlags = InodeFlags::NODUMP.union(InodeFlags::NOATIME);

const S_IFMT: u16 = 0o170_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFBLK: u16 = 0o060_000;
const S_ISGID: u16 = 0o2000;

impl Ext4 {
    /// Allocates an inode and puts it into the cache, without a lookup counted. The caller
    /// finishes `core` and calls `mark_inode_dirty`.
    ///
    /// # Errors
    /// `ENOSPC` when no inode is free; nothing is changed then.
    pub(crate) fn new_inode(
        &self,
        handle: &Handle,
        parent: &Inode,
        spec: &NewInode,
    ) -> Result<Arc<Inode>> {
        self.allocations.strike()?;
        let is_dir = spec.mode & S_IFMT == S_IFDIR;
        let start = if is_dir { self.orlov_group(parent)? } else { self.file_group(parent)? };
        let count = self.groups_count();
        for step in 0..count {
            let group = GroupNumber((start.0 + step) % count);
            if let Some(ino) = self.take_inode(handle, group, is_dir)? {
                let inode = self.make_inode(ino, parent, spec);
                self.inodes.insert(&inode);
                return Ok(inode);
            }
        }
        Err(Errno::ENOSPC.into())
    }

    /// Takes the first free inode of a group, with a cleared raw inode.
    fn take_inode(
        &self,
        handle: &Handle,
        group: GroupNumber,
        is_dir: bool,
    ) -> Result<Option<InodeNumber>> {
        let mut state = self.group(group)?.state.lock();
        if state.bad || state.free_inodes == 0 {
            return Ok(None);
        }
        let desc = self.desc(group)?;
        let per_group = self.sb.inodes_per_group();
        let buf = if self.is_inode_uninit(&desc) {
            self.init_inode_bitmap(handle, group, &desc)?
        } else {
            self.buffers.bread(desc.inode_bitmap.0)?
        };
        if let Err(error) = self.verify_inode_bitmap(group, &desc, &buf) {
            state.bad = true;
            self.report(None, &error);
            return Ok(None);
        }
        let mut map = handle.write(&buf)?;
        let reserved = if group.0 == 0 { self.sb.first_ino().0 - 1 } else { 0 };
        let from = state.inode_hint.max(reserved);
        let Some(index) = bitmap::find_next_zero(&map, from, per_group) else {
            state.bad = true;
            let detail = format!("no inode is free, the descriptor says {}", state.free_inodes);
            drop(map);
            self.report(None, &Corrupt::value("inode bitmap", detail).in_group(group).into());
            return Ok(None);
        };
        self.clear_raw_inode(handle, &desc, index, &map)?;
        bitmap::set(&mut map, index);
        let desc = self.desc(group)?;
        if self.is_block_uninit(&desc) {
            self.init_block_bitmap(handle, group, &desc)?;
        }
        self.update_desc(handle, group, |d| {
            d.set_free_inodes_count(d.free_inodes_count().saturating_sub(1));
            if is_dir {
                d.set_used_dirs_count(d.used_dirs_count() + 1);
            }
            if self.has_group_checksums() {
                d.set_flags(d.flags() - GroupFlags::INODE_UNINIT);
                d.set_itable_unused(d.itable_unused().min(per_group - index - 1));
            }
            d.seal_inode_bitmap(&self.sb, &map);
        })?;
        state.free_inodes -= 1;
        state.used_dirs += u32::from(is_dir);
        state.inode_hint = index + 1;
        Ok(Some(self.sb.inode_number(group, index)))
    }

    /// Clears the raw inode at `index`; the group lock is held and `map` does not yet show it.
    /// When no inode of its block is in use the block is not read: it may never have been written.
    fn clear_raw_inode(&self, handle: &Handle, desc: &Desc, index: u32, map: &[u8]) -> Result<()> {
        let per_block = self.sb.inodes_per_block();
        let size = usize::from(self.sb.inode_size());
        let block = desc.inode_table + u64::from(index / per_block);
        let first = index / per_block * per_block;
        let end = (first + per_block).min(self.sb.inodes_per_group());
        let offset = (index - first) as usize * size;
        if bitmap::is_range_clear(map, first, end - first) {
            let buf = self.buffers.getblk(block.0);
            handle.create(&buf)?.fill(0);
        } else {
            let buf = self.buffers.bread(block.0)?;
            handle.write(&buf)?[offset..offset + size].fill(0);
        }
        Ok(())
    }

    fn is_inode_uninit(&self, desc: &Desc) -> bool {
        self.has_group_checksums() && desc.flags.contains(GroupFlags::INODE_UNINIT)
    }

    /// Writes the bitmap of a group none of whose inodes was ever used.
    fn init_inode_bitmap(
        &self,
        handle: &Handle,
        group: GroupNumber,
        desc: &Desc,
    ) -> Result<uext_pagecache::Buffer> {
        let buf = self.buffers.getblk(desc.inode_bitmap.0);
        {
            let mut map = handle.create(&buf)?;
            let per_group = self.sb.inodes_per_group();
            map.fill(0);
            bitmap::set_range(&mut map, per_group, self.block_size() * 8 - per_group);
            self.update_desc(handle, group, |d| {
                d.set_flags(d.flags() - GroupFlags::INODE_UNINIT);
                d.seal_inode_bitmap(&self.sb, &map);
            })?;
        }
        buf.set_verified();
        Ok(buf)
    }

    fn verify_inode_bitmap(
        &self,
        group: GroupNumber,
        desc: &Desc,
        buf: &uext_pagecache::Buffer,
    ) -> Result<()> {
        if !buf.is_verified() {
            let full = self.desc_bytes(group)?;
            GroupDesc::new(&full[..])?
                .verify_inode_bitmap(&self.sb, group, &buf.read())
                .map_err(|c| c.in_block(desc.inode_bitmap))?;
            buf.set_verified();
        }
        Ok(())
    }

    /// The in-core inode of a number just taken.
    fn make_inode(&self, ino: InodeNumber, parent: &Inode, spec: &NewInode) -> Arc<Inode> {
        let kind = spec.mode & S_IFMT;
        let (parent_mode, parent_gid, parent_flags) = {
            let core = parent.core.lock();
            (core.mode, core.gid, core.flags)
        };
        let mut mode = spec.mode;
        let mut gid = spec.gid;
        if parent_mode & S_ISGID != 0 {
            gid = parent_gid;
            if kind == S_IFDIR {
                mode |= S_ISGID;
            }
        }
        let mut flags = parent_flags & INHERITED;
        flags &= match kind {
            S_IFDIR => InodeFlags::all(),
            S_IFREG => REG_MASK,
            _ => OTHER_MASK,
        };
        let mut i_block = [0; 60];
        if self.sb.features().extents() && matches!(kind, S_IFDIR | S_IFREG | S_IFLNK) {
            flags |= InodeFlags::EXTENTS;
            ExtentNode::init(&mut i_block[..], 0);
        }
        if matches!(kind, S_IFCHR | S_IFBLK) {
            DeviceNumber::from_linux(spec.rdev).encode(&mut i_block);
        }
        let now = self.now();
        let crtime = (self.sb.inode_size() > 128).then_some(now);
        let core = Core {
            mode,
            uid: spec.uid,
            gid,
            size: 0,
            disk_size: 0,
            nlink: 1,
            atime: now,
            mtime: now,
            ctime: now,
            crtime,
            flags,
            blocks: 0,
            file_acl: FsBlock(0),
            i_block,
            dtime: 0,
            lazy_dirty: false,
        };
        let inode = self.build_inode(ino, self.next_generation(), core);
        // Its body was cleared. WHY-RELAXED: nobody else knows it yet.
        inode.data.no_xattrs.store(true, Ordering::Relaxed);
        inode
    }

    /// A generation that differs from the number's last use with near certainty.
    fn next_generation(&self) -> u32 {
        // WHY-RELAXED: only distinctness counts.
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let now = uext_vfs::Timestamp::now();
        (now.nsec ^ (now.sec as u32).rotate_left(16)).wrapping_add(count.wrapping_mul(0x9E37_79B9))
    }

    /// Gives an inode's number back; the raw inode was marked deleted under the same handle.
    pub(crate) fn free_inode(&self, handle: &Handle, inode: &Inode, was_dir: bool) -> Result<()> {
        let location = self.locate(inode.ino)?;
        let mut state = self.group(location.group)?.state.lock();
        let desc = self.desc(location.group)?;
        let buf = self.buffers.bread(desc.inode_bitmap.0)?;
        self.verify_inode_bitmap(location.group, &desc, &buf)?;
        let mut map = handle.write(&buf)?;
        if !bitmap::clear(&mut map, location.index) {
            let corrupt = Corrupt::value("inode bitmap", "the inode is free already");
            return Err(corrupt.in_inode(inode.ino).in_group(location.group).into());
        }
        self.update_desc(handle, location.group, |d| {
            d.set_free_inodes_count(d.free_inodes_count() + 1);
            if was_dir {
                d.set_used_dirs_count(d.used_dirs_count().saturating_sub(1));
            }
            d.seal_inode_bitmap(&self.sb, &map);
        })?;
        state.free_inodes += 1;
        state.used_dirs = state.used_dirs.saturating_sub(u32::from(was_dir));
        state.inode_hint = state.inode_hint.min(location.index);
        Ok(())
    }

    fn locate(&self, ino: InodeNumber) -> Result<uext_ondisk::geometry::InodeLocation> {
        self.sb
            .inode_location(ino)
            .ok_or_else(|| Corrupt::value("inode number", ino.to_string()).into())
    }

    /// The group of a new file: its directory's, else one found by a quadratic hash, else any.
    fn file_group(&self, parent: &Inode) -> Result<GroupNumber> {
        let home = self.locate(parent.ino)?.group;
        let count = self.groups_count();
        let usable = |group: GroupNumber| -> Result<bool> {
            let state = self.group(group)?.state.lock();
            Ok(!state.bad && state.free_inodes > 0 && state.free_blocks > 0)
        };
        if usable(home)? {
            return Ok(home);
        }
        let mut group = (home.0 + parent.ino.0 % count) % count;
        let mut step = 1;
        while step < count {
            group = (group + step) % count;
            if usable(GroupNumber(group))? {
                return Ok(GroupNumber(group));
            }
            step <<= 1;
        }
        Ok(home)
    }

    /// The group of a new directory (Orlov): directories of the root spread over the groups that
    /// are emptier than average; deeper ones stay near their parent unless that fills up.
    fn orlov_group(&self, parent: &Inode) -> Result<GroupNumber> {
        let count = self.groups_count();
        let home = self.locate(parent.ino)?.group;
        let (mut inodes, mut blocks, mut dirs) = (0u64, 0u64, 0u64);
        for group in &self.groups.list {
            let state = group.state.lock();
            inodes += u64::from(state.free_inodes);
            blocks += u64::from(state.free_blocks);
            dirs += u64::from(state.used_dirs);
        }
        let groups = u64::from(count);
        let (avg_inodes, avg_blocks) = (inodes / groups, blocks / groups);
        let top = parent.ino == InodeNumber::ROOT
            || parent.core.lock().flags.contains(InodeFlags::TOPDIR);
        if top {
            let start = self.next_generation() % count;
            let mut best: Option<(u32, GroupNumber)> = None;
            for step in 0..count {
                let group = GroupNumber((start + step) % count);
                let state = self.group(group)?.state.lock();
                let roomy = !state.bad
                    && state.free_inodes > 0
                    && u64::from(state.free_inodes) >= avg_inodes
                    && u64::from(state.free_blocks) >= avg_blocks;
                if roomy && best.is_none_or(|(dirs, _)| state.used_dirs < dirs) {
                    best = Some((state.used_dirs, group));
                }
            }
            if let Some((_, group)) = best {
                return Ok(group);
            }
        }
        // The bounds of the ext4 driver: not too many directories, not too few free inodes and blocks.
        let per_group = u64::from(self.sb.inodes_per_group());
        let max_dirs = dirs / groups + per_group / 16;
        let min_inodes = avg_inodes.saturating_sub(per_group / 4).max(1);
        let min_blocks = avg_blocks.saturating_sub(u64::from(self.sb.clusters_per_group()) / 4);
        for step in 0..count {
            let group = GroupNumber((home.0 + step) % count);
            let state = self.group(group)?.state.lock();
            if !state.bad
                && u64::from(state.used_dirs) < max_dirs
                && u64::from(state.free_inodes) >= min_inodes
                && u64::from(state.free_blocks) >= min_blocks
            {
                return Ok(group);
            }
        }
        for step in 0..count {
            let group = GroupNumber((home.0 + step) % count);
            let state = self.group(group)?.state.lock();
            if !state.bad && state.free_inodes > 0 && u64::from(state.free_inodes) >= avg_inodes {
                return Ok(group);
            }
        }
        Ok(home)
    }
}
