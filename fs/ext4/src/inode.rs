//! The in-core inode: a file in use.
//!
//! Invariants:
//! - One [`Inode`] per inode number at a time: [`InodeCache`](crate::inode_cache::InodeCache)
//!   hands it out.
//! - `core` holds what the raw inode holds; [`Ext4::mark_inode_dirty`] writes it
//!   into the inode table's buffer under a handle. Bytes of the raw inode that
//!   `core` does not know (in-inode attributes, unknown fields) are never touched.
//! - `core.size` is what stat(2) shows, `core.disk_size` what the raw inode says:
//!   it follows when the data up to it has been written, so a crash never shows
//!   a size whose blocks were not written.
//!
//! Locks: see the crate's order. `core` is taken last and never held over
//! anything that waits.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use uext_blockdev::mutant;
use uext_jbd2::{Handle, Tid, tid_gt};
use uext_ondisk::features::RoCompat;
use uext_ondisk::inode::{DeviceNumber, Inode as RawView, InodeFlags, Timestamp as RawTime};
use uext_ondisk::{Corrupt, FsBlock, InodeNumber};
use uext_pagecache::{AddressSpace, AddressSpaceOps, Buffer};
use uext_sync::{Mutex, RwLock};
use uext_vfs::{Attr, Errno, FileKind, Timestamp};

use crate::credits;
use crate::delayed::FileData;
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::options::AtimePolicy;

/// Table blocks this close together are prefetched as one run, with what lies between.
const PREFETCH_GAP: u64 = 4;

/// The attributes of an inode and the root of its block mapping.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    /// Type and permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes, as stat(2) shows.
    pub size: u64,
    /// Bytes, as the raw inode says.
    pub disk_size: u64,
    /// Links as the raw inode says; a directory with more than 64,998 subdirectories has 1.
    pub nlink: u16,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    /// Birth, where the inode has room for it.
    pub crtime: Option<Timestamp>,
    pub flags: InodeFlags,
    /// Blocks in units of 512 bytes (`i_blocks`), mapping and attribute blocks included.
    pub blocks: u64,
    /// The external attribute block, 0 for none.
    pub file_acl: FsBlock,
    /// `i_block`: extent root, block map, fast symlink or device number.
    pub i_block: [u8; 60],
    /// `i_dtime`: deletion time, or the next inode of the orphan list.
    pub dtime: u32,
    /// Times changed in memory only; the next handle on the inode writes them.
    pub lazy_dirty: bool,
}

impl Core {
    /// Whether the mapping is an extent tree.
    pub fn is_extents(&self) -> bool {
        self.flags.contains(InodeFlags::EXTENTS)
    }
}

/// A file in use.
pub(crate) struct Inode {
    pub ino: InodeNumber,
    /// Tells this use of the inode number from earlier ones.
    pub generation: u32,
    /// Seed of the checksums of everything that belongs to the inode.
    pub csum_seed: u32,
    pub kind: FileKind,
    pub fs: Weak<Ext4>,
    /// Contents of a directory, size of a file: shared to look, exclusive to change.
    pub rwsem: RwLock<()>,
    /// Held by writeback, and by truncation against it.
    pub writeback: Mutex<()>,
    /// The block mapping: shared to look, exclusive to change.
    pub map: RwLock<()>,
    pub core: Mutex<Core>,
    /// The cached data; empty for anything but regular files.
    pub mapping: Arc<AddressSpace>,
    /// Blocks reserved for delayed data and its mapping.
    /// WHY-RELAXED: a copy of what `data.delayed` holds under its lock, for `st_blocks`.
    pub reserved: AtomicU64,
    /// Delayed blocks among them, for `st_blocks`.
    /// WHY-RELAXED: as `reserved`.
    pub delayed: AtomicU64,
    /// What the data path keeps: delayed blocks, looked-up runs, readahead.
    pub data: FileData,
    /// Used since the cache last looked for what it can do without.
    /// WHY-RELAXED: it says which inode to drop first, no more.
    pub used: AtomicBool,
    /// Kept for its pages, and not counted with those that are too many.
    /// WHY-RELAXED: changed under the lock of the cache's shard.
    pub spared: AtomicBool,
    /// The number was given back: whoever comes late to delete it finds it done [rwsem].
    /// WHY-RELAXED: the swap alone decides who deletes; what deleting needs is under rwsem.
    pub deleted: AtomicBool,
    /// The last transaction that changed the inode, and that changed what fdatasync needs.
    /// WHY-RELAXED: read by fsync after its own locks order it behind the change.
    pub sync_tid: AtomicU32,
    /// WHY-RELAXED: as `sync_tid`.
    pub datasync_tid: AtomicU32,
}

impl Inode {
    /// The filesystem; an inode never outlives its mount in use.
    pub fn fs(&self) -> Result<Arc<Ext4>> {
        self.fs.upgrade().ok_or(Error::Errno(Errno::EIO))
    }

    /// Notes that a transaction changed the inode; `data` when fdatasync must wait for it too.
    pub fn note_tid(&self, tid: Tid, data: bool) {
        let later = |slot: &AtomicU32| {
            // WHY-RELAXED: see the fields.
            let _ = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                tid_gt(tid, old).then_some(tid)
            });
        };
        later(&self.sync_tid);
        if data {
            later(&self.datasync_tid);
        }
    }

    /// Bytes, as stat(2) shows.
    pub fn size(&self) -> u64 {
        self.core.lock().size
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }

    /// What stat(2) shows.
    pub fn attr(&self, block_size: u32) -> Attr {
        // Delayed data counts as it will when it is mapped.
        let delayed = self.delayed_blocks() * u64::from(block_size / 512);
        let core = self.core.lock();
        let rdev = match self.kind {
            FileKind::BlockDevice | FileKind::CharDevice => {
                DeviceNumber::decode(&core.i_block).to_linux()
            }
            _ => 0,
        };
        Attr {
            ino: u64::from(self.ino.0),
            kind: self.kind,
            perm: core.mode & 0o7777,
            nlink: u32::from(core.nlink),
            uid: core.uid,
            gid: core.gid,
            rdev,
            size: core.size,
            blocks: core.blocks + delayed,
            blksize: block_size.max(4096),
            atime: core.atime,
            mtime: core.mtime,
            ctime: core.ctime,
            crtime: core.crtime,
        }
    }

    /// Blocks of delayed data; its mapping's reservation is not counted.
    fn delayed_blocks(&self) -> u64 {
        self.delayed.load(Ordering::Relaxed)
    }
}

fn from_raw_time(time: RawTime) -> Timestamp {
    Timestamp { sec: time.secs, nsec: time.nanos }
}

fn to_raw_time(time: Timestamp) -> RawTime {
    RawTime { secs: time.sec, nanos: time.nsec }
}

impl Core {
    fn parse<B: AsRef<[u8]>>(fs: &Ext4, raw: &RawView<B>) -> Self {
        let features = fs.sb.features();
        let size = raw.size(features);
        Self {
            mode: raw.mode(),
            uid: raw.uid(),
            gid: raw.gid(),
            size,
            disk_size: size,
            nlink: raw.links_count(),
            atime: from_raw_time(raw.atime()),
            mtime: from_raw_time(raw.mtime()),
            ctime: from_raw_time(raw.ctime()),
            crtime: raw.crtime().map(from_raw_time),
            flags: raw.flags(),
            blocks: raw.sectors(features, fs.block_size()),
            file_acl: raw.file_acl(features),
            i_block: *raw.i_block(),
            dtime: raw.dtime(),
            lazy_dirty: false,
        }
    }

    /// Writes what `self` knows into a raw inode; every other byte stays.
    fn store(&self, fs: &Ext4, raw: &mut RawView<&mut [u8]>) -> Result<()> {
        raw.set_mode(self.mode);
        raw.set_uid(self.uid);
        raw.set_gid(self.gid);
        raw.set_flags(self.flags);
        raw.set_links_count(self.nlink);
        raw.set_size(self.disk_size);
        raw.set_sectors(self.blocks, fs.sb.features(), fs.block_size())
            .ok_or(Error::Errno(Errno::EFBIG))?;
        raw.set_file_acl(self.file_acl);
        raw.set_atime(to_raw_time(self.atime));
        raw.set_mtime(to_raw_time(self.mtime));
        raw.set_ctime(to_raw_time(self.ctime));
        if let Some(crtime) = self.crtime {
            raw.set_crtime(to_raw_time(crtime));
        }
        raw.set_dtime(self.dtime);
        *raw.i_block_mut() = self.i_block;
        Ok(())
    }
}

impl Ext4 {
    /// The inode with this number, counted by its `Arc` only.
    ///
    /// # Errors
    /// `Corrupt` when the number or the raw inode is impossible, or the inode is not in use.
    pub(crate) fn iget(&self, ino: InodeNumber) -> Result<Arc<Inode>> {
        let inode = self.iget_deleted(ino)?;
        if inode.core.lock().nlink == 0 && !self.inodes.is_cached(ino) {
            let corrupt = Corrupt::value("inode", "is not in use, but a name or list points at it");
            return Err(corrupt.in_inode(ino).into());
        }
        Ok(inode)
    }

    /// As [`Ext4::iget`], also for an inode without links: orphans.
    pub(crate) fn iget_deleted(&self, ino: InodeNumber) -> Result<Arc<Inode>> {
        if let Some(inode) = self.inodes.find(ino) {
            return Ok(inode);
        }
        let ino = self.sb.check_inode(ino)?;
        let (buf, offset) = self.inode_buffer(ino)?;
        let inode = {
            let bytes = buf.read();
            let raw = RawView::new(&bytes[offset..offset + usize::from(self.sb.inode_size())])?;
            self.check_raw(ino, &raw)?;
            self.build_inode(ino, raw.generation(), Core::parse(self, &raw))
        };
        if inode.core.lock().nlink == 0 {
            // Not cached: its number may be given out again while nobody looks.
            return Ok(inode);
        }
        Ok(self.inodes.insert_or_find(&inode))
    }

    fn check_raw<B: AsRef<[u8]>>(&self, ino: InodeNumber, raw: &RawView<B>) -> Result<()> {
        let place = |c: Corrupt| c.in_inode(ino);
        raw.verify(&self.sb, ino).map_err(place)?;
        raw.check_extra_isize().map_err(place)?;
        if FileKind::from_mode(u32::from(raw.mode())).is_none() && ino != InodeNumber::BAD_BLOCKS {
            let kind = format!("mode {:#o} names no file type", raw.mode());
            return Err(Corrupt::value("inode", kind).in_inode(ino).into());
        }
        let flags = raw.flags();
        for (flag, name) in
            [(InodeFlags::ENCRYPT, "encrypted"), (InodeFlags::CASEFOLD, "casefolded")]
        {
            if flags.contains(flag) {
                log::warn!("{}: inode {ino}: {name} files are not supported", self.name);
                return Err(Errno::EOPNOTSUPP.into());
            }
        }
        let size = raw.size(self.sb.features());
        if size > i64::MAX.cast_unsigned() {
            return Err(Corrupt::value("inode", format!("size {size}")).in_inode(ino).into());
        }
        let acl = raw.file_acl(self.sb.features());
        if acl.0 != 0 && !self.is_data_range(acl, 1) {
            let detail = format!("attribute block {acl} is outside the data area");
            return Err(Corrupt::value("inode", detail).in_inode(ino).into());
        }
        Ok(())
    }

    /// The in-core inode of a number.
    pub(crate) fn build_inode(&self, ino: InodeNumber, generation: u32, core: Core) -> Arc<Inode> {
        let csum_seed = uext_ondisk::inode::inode_csum_seed(self.sb.csum_seed(), ino, generation);
        let kind = FileKind::from_mode(u32::from(core.mode)).unwrap_or(FileKind::Regular);
        // It may have been in memory before, and changed by a transaction still to commit.
        let tid = self.newest_tid();
        Arc::new_cyclic(|me: &Weak<Inode>| {
            let ops: Weak<dyn AddressSpaceOps> = me.clone();
            Inode {
                ino,
                generation,
                csum_seed,
                kind,
                fs: self.this.clone(),
                rwsem: RwLock::new(()),
                writeback: Mutex::new(()),
                map: RwLock::new(()),
                core: Mutex::new(core),
                mapping: AddressSpace::new(&self.cache, u64::from(ino.0), ops),
                reserved: AtomicU64::new(0),
                delayed: AtomicU64::new(0),
                data: FileData::new(self.cache.readahead()),
                used: AtomicBool::new(true),
                spared: AtomicBool::new(false),
                deleted: AtomicBool::new(false),
                sync_tid: AtomicU32::new(tid),
                datasync_tid: AtomicU32::new(tid),
            }
        })
    }

    /// The inode table block that holds an inode, and the byte offset in it.
    pub(crate) fn inode_buffer(&self, ino: InodeNumber) -> Result<(Buffer, usize)> {
        let location = self
            .sb
            .inode_location(ino)
            .ok_or_else(|| Corrupt::value("inode number", ino.to_string()))?;
        let desc = self.desc(location.group)?;
        let block = desc.inode_table.0 + u64::from(location.table_block);
        Ok((self.buffers.bread(block)?, location.offset as usize))
    }

    /// Begins to read the table blocks of inodes that are about to be asked for, neighbours
    /// with one request. What is wrong with a number shows when it is asked for.
    pub(crate) fn prefetch_inodes(&self, inos: impl Iterator<Item = u32>) {
        let mut blocks: Vec<u64> = inos
            .map(InodeNumber)
            .filter(|ino| !self.inodes.is_cached(*ino))
            .filter_map(|ino| self.sb.inode_location(ino))
            .filter_map(|place| {
                let desc = self.desc(place.group).ok()?;
                Some(desc.inode_table.0 + u64::from(place.table_block))
            })
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        for run in blocks.chunk_by(|a, b| b - a <= PREFETCH_GAP) {
            // A listing's blocks are far fewer than 2^32.
            self.buffers.readahead(run[0], (run[run.len() - 1] - run[0] + 1) as u32);
        }
    }

    /// Writes an inode's attributes into its table block under a handle.
    pub(crate) fn mark_inode_dirty(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        self.mark_attributes_dirty(handle, inode)?;
        inode.note_tid(handle.tid(), !mutant!("fdatasync-skips-size"));
        Ok(())
    }

    /// As [`Ext4::mark_inode_dirty`], when nothing changed that is needed to find the data:
    /// fdatasync does not wait for the transaction.
    pub(crate) fn mark_attributes_dirty(&self, handle: &Handle, inode: &Inode) -> Result<()> {
        let (buf, offset) = self.inode_buffer(inode.ino)?;
        let mut bytes = handle.write(&buf)?;
        let size = usize::from(self.sb.inode_size());
        let mut raw = RawView::new(&mut bytes[offset..offset + size])?;
        if raw.generation() != inode.generation || raw.mode() == 0 {
            // The raw inode was cleared when its number was taken.
            let extra = self.sb.want_extra_isize();
            raw.init(if self.sb.inode_size() > 128 { extra } else { 0 });
            raw.set_generation(inode.generation);
        }
        {
            let mut core = inode.core.lock();
            core.store(self, &mut raw)?;
            core.lazy_dirty = false;
        }
        raw.seal_seeded(&self.sb, inode.csum_seed);
        inode.note_tid(handle.tid(), false);
        Ok(())
    }

    /// The project an inode belongs to; 0 without the feature.
    pub(crate) fn project_of(&self, inode: &Inode) -> Result<u32> {
        if !self.sb.features().ro_compat.contains(RoCompat::PROJECT) {
            return Ok(0);
        }
        let (buf, offset) = self.inode_buffer(inode.ino)?;
        let bytes = buf.read();
        Ok(RawView::new(&bytes[offset..offset + usize::from(self.sb.inode_size())])?.project())
    }

    /// Recomputes a raw inode's checksum after an edit in place.
    pub(crate) fn seal_inode(&self, inode: &Inode, raw: &mut [u8]) -> Result<()> {
        RawView::new(raw)?.seal(&self.sb, inode.ino);
        Ok(())
    }

    /// Writes times that changed in memory only.
    pub(crate) fn write_lazy(&self, inode: &Inode) -> Result<()> {
        if !inode.core.lock().lazy_dirty || self.is_read_only() {
            return Ok(());
        }
        let handle = self.start(credits::SETATTR)?;
        self.mark_attributes_dirty(&handle, inode)
    }

    /// Notes a read in the access time, as the mount's policy says.
    pub(crate) fn touch_atime(&self, inode: &Inode) {
        let policy = self.atime.policy_for(inode.is_dir());
        if self.is_read_only() || policy == AtimePolicy::Never {
            return;
        }
        let now = self.now();
        let mut core = inode.core.lock();
        if core.flags.contains(InodeFlags::NOATIME) {
            return;
        }
        const DAY_SECS: i64 = 86_400;
        let due = match policy {
            AtimePolicy::Never => false,
            AtimePolicy::Strict => core.atime != now,
            AtimePolicy::Relative => {
                core.atime <= core.mtime
                    || core.atime <= core.ctime
                    || now.sec - core.atime.sec >= DAY_SECS
            }
        };
        if due {
            core.atime = now;
            core.lazy_dirty = true;
        }
    }

    /// Gives back lookups; an inode without links and lookups is deleted.
    pub(crate) fn forget_inode(&self, ino: InodeNumber, count: u64) {
        if let Some(inode) = self.inodes.forget(ino, count)
            && inode.core.lock().nlink == 0
        {
            // Who meets a full disk waits for it.
            self.space.lock().deleting += 1;
            if let Err(error) = self.delete_inode(&inode) {
                self.report(Some(ino), &error);
            }
            self.space.lock().deleting -= 1;
        }
        self.shrink_inodes();
    }

    /// Deletes an inode that has no links and no users: its blocks, attributes and number.
    pub(crate) fn delete_inode(&self, inode: &Arc<Inode>) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        let _exclusive = inode.rwsem.write();
        // The last unlink and the last forget may both come here, and a file that was made
        // without a name may have been linked meanwhile.
        let in_use = inode.core.lock().nlink > 0 || self.inodes.lookups(inode.ino) > 0;
        if in_use || inode.deleted.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.drop_all_blocks(inode)?;
        let handle = self.start(credits::XATTR + credits::NEW_INODE + credits::ORPHAN + 2)?;
        self.delete_xattr_block(&handle, inode)?;
        self.orphan_del(&handle, inode)?;
        {
            let mut core = inode.core.lock();
            core.size = 0;
            core.disk_size = 0;
            core.dtime = u32::try_from(self.now().sec).unwrap_or(u32::MAX);
        }
        self.mark_inode_dirty(&handle, inode)?;
        self.inodes.remove(inode);
        self.free_inode(&handle, inode, inode.is_dir())
    }

    /// Drops inodes beyond the cache's bound that nobody uses at the moment, front ends
    /// with lookups of them included: they come back when they are asked for. Called
    /// without locks and handles.
    pub(crate) fn shrink_inodes(&self) {
        for inode in self.inodes.victims() {
            let _ = self.write_lazy(&inode);
            self.inodes.drop_if_unused(&inode);
        }
    }

    /// The newest transaction that may have changed an inode nobody knows about.
    fn newest_tid(&self) -> Tid {
        let status = self.journal.status();
        status
            .running
            .map(|(tid, _)| tid)
            .or(status.committing.map(|(tid, _)| tid))
            .unwrap_or(status.committed)
    }
}
