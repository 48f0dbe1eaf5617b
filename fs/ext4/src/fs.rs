//! The mounted filesystem: what every other module hangs its methods on.
//!
//! Invariants: geometry and features in `sb` are fixed at mount; what changes in the
//! superblock lives in `live_super`, whose bytes are copied into the superblock's
//! buffer under a handle at every change.
//!
//! Locks: the crate's order is in `lib.rs`; `live_super` is taken after the group
//! lock and before the superblock's buffer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use uext_blockdev::mutant;
use uext_jbd2::{Handle, Journal};
use uext_ondisk::FsBlock;
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use uext_pagecache::{Buffer, BufferCache, PageCache};
use uext_sync::Mutex;
use uext_vfs::{Errno, Timestamp};

use crate::alloc_fault::AllocationFault;
use crate::balloc::Space;
use crate::batch::Batches;
use crate::error::{Error, Result};
use crate::groups::Groups;
use crate::inode::Inode;
use crate::inode_cache::InodeCache;
use crate::last_search::LastSearches;
use crate::listings::Listings;
use crate::options::{Atime, DataMode, MountOptions};
use crate::orphan::OrphanList;
use crate::quiet::Watch;
use crate::readdir::Ties;
use crate::system_zone::SystemZone;
use crate::xattr_share::XattrShare;

/// A mounted filesystem.
pub struct Ext4 {
    pub(crate) this: Weak<Ext4>,
    /// The image's or device's name, for messages.
    pub(crate) name: String,
    pub(crate) options: MountOptions,
    /// How data and the journal relate, by the options or the superblock.
    pub(crate) data_mode: DataMode,
    /// The superblock as at mount: geometry and features.
    pub(crate) sb: Superblock,
    /// The superblock as it changes.
    pub(crate) live_super: Mutex<Superblock>,
    pub(crate) super_buf: Buffer,
    pub(crate) cache: Arc<PageCache>,
    pub(crate) buffers: Arc<BufferCache>,
    pub(crate) journal: Arc<Journal>,
    pub(crate) groups: Groups,
    pub(crate) system_zone: SystemZone,
    /// Blocks that are the filesystem's own, the journal's among them.
    pub(crate) overhead: u64,
    pub(crate) space: Mutex<Space>,
    pub(crate) allocations: AllocationFault,
    pub(crate) batches: Batches,
    pub(crate) inodes: InodeCache,
    pub(crate) orphans: Mutex<OrphanList>,
    /// Listing positions that a number alone cannot say.
    pub(crate) ties: Ties,
    /// Files listed lately, which are likely to be read in that order.
    pub(crate) listings: Listings,
    pub(crate) last_searches: LastSearches,
    pub(crate) xattr_share: XattrShare,
    /// Held by a rename between two directories, so that no two change the tree's shape at once.
    pub(crate) rename: Mutex<()>,
    /// Nothing is written: asked for at mount, or after an error under `errors=remount-ro`.
    /// WHY-RELAXED: a hint taken before work starts; the journal's abort state is the guard.
    pub(crate) read_only: AtomicBool,
    /// When reading updates access times.
    pub(crate) atime: Atime,
    /// Without a journal: who marks the image clean in quiet moments.
    pub(crate) quiet: Mutex<Option<Watch>>,
    /// Whether it was mounted to be written, and so has what writing needs.
    pub(crate) mounted_writable: bool,
    /// Everything fails from now on, on request. WHY-RELAXED: as for `read_only`.
    pub(crate) shut_down: AtomicBool,
    /// An error was recorded: the image is not marked clean at unmount.
    /// WHY-RELAXED: it only ever becomes true, and unmount, which decides by it, comes after
    /// all work has ended.
    pub(crate) had_error: AtomicBool,
    /// Errors recorded in memory have not been given to a transaction. WHY-RELAXED: what
    /// was recorded lies under `live_super`'s lock; seen late, the next call stores it.
    pub(crate) errors_pending: AtomicBool,
    /// An error has stopped everything that writes: fsync fails from then on.
    /// WHY-RELAXED: as `read_only`; it only ever becomes true.
    pub(crate) stopped: AtomicBool,
    /// Called when an error makes it read-only.
    pub(crate) on_read_only: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    /// Files that were truncated to nothing and are being written again (`auto_da_alloc`).
    pub(crate) replaced: Mutex<Vec<Weak<Inode>>>,
    /// Whether large writes go to the disk at once.
    pub(crate) pace: crate::past_cache::Pace,
}

impl Ext4 {
    /// The filesystem's own `Arc`.
    pub(crate) fn this(&self) -> Result<Arc<Ext4>> {
        self.this.upgrade().ok_or(Error::Errno(Errno::EIO))
    }

    /// Bytes per block.
    pub(crate) fn block_size(&self) -> u32 {
        self.sb.block_size()
    }

    /// Whether descriptors carry checksums, and with them the uninit flags their meaning.
    pub(crate) fn has_group_checksums(&self) -> bool {
        self.sb.features().group_desc_csum()
    }

    /// Whether writes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Whether the filesystem was shut down.
    pub(crate) fn is_shut_down(&self) -> bool {
        self.shut_down.load(Ordering::Relaxed)
    }

    /// `EIO` when the filesystem was shut down.
    pub(crate) fn check_alive(&self) -> Result<()> {
        if self.is_shut_down() { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// `EROFS` when writes are refused, `EIO` when nothing goes any more.
    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_alive()?;
        if self.is_read_only() { Err(Errno::EROFS.into()) } else { Ok(()) }
    }

    /// Starts a handle.
    ///
    /// # Errors
    /// `EROFS` on a read-only mount or after an abort.
    pub(crate) fn start(&self, credits: u32) -> Result<Handle> {
        self.check_writable()?;
        let credits = if mutant!("credits-short") { credits.min(4) } else { credits };
        Ok(self.journal.start(credits)?)
    }

    /// The clock, no finer than the inodes can hold.
    pub(crate) fn now(&self) -> Timestamp {
        let now = Timestamp::now();
        if self.sb.inode_size() > 128 { now } else { Timestamp { nsec: 0, ..now } }
    }

    /// The nearest time that the inodes can hold.
    pub(crate) fn storable_time(&self, time: Timestamp) -> Timestamp {
        const FIRST: i64 = i32::MIN as i64;
        let fine = self.sb.inode_size() > 128;
        // Two more bits of seconds stand beside the nanoseconds.
        let last = if fine { FIRST + (1 << 34) - 1 } else { i32::MAX.into() };
        let sec = time.sec.clamp(FIRST, last);
        let nsec = if fine && FIRST < sec && sec < last { time.nsec } else { 0 };
        Timestamp { sec, nsec }
    }

    /// Looks at the superblock as it is now.
    pub(crate) fn with_super<T>(&self, look: impl FnOnce(&Superblock) -> T) -> T {
        look(&self.live_super.lock())
    }

    /// Changes the superblock under a handle.
    pub(crate) fn update_super(
        &self,
        handle: &Handle,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        let mut sb = self.live_super.lock();
        change(&mut sb);
        let mut bytes = handle.write(&self.super_buf)?;
        bytes[self.super_range()].copy_from_slice(sb.sealed_bytes());
        Ok(())
    }

    /// Changes the superblock and writes it at once, outside the journal: for the flags that say
    /// whether the journal counts, and for errors.
    pub(crate) fn write_super(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        {
            let mut sb = self.live_super.lock();
            change(&mut sb);
            sb.set_write_time(u64::try_from(Timestamp::now().sec).unwrap_or(0));
            let mut bytes = self.super_buf.write();
            bytes[self.super_range()].copy_from_slice(sb.sealed_bytes());
        }
        self.super_buf.mark_dirty();
        self.buffers.write_buffers(std::slice::from_ref(&self.super_buf))?;
        if self.options.barrier {
            self.buffers.flush_device()?;
        }
        Ok(())
    }

    fn super_range(&self) -> std::ops::Range<usize> {
        let start = (SUPERBLOCK_OFFSET % u64::from(self.block_size())) as usize;
        start..start + SUPERBLOCK_SIZE
    }

    /// Sums the groups' counts into the superblock, as it is when everything is at rest.
    pub(crate) fn sum_counts(&self, sb: &mut Superblock) -> Result<()> {
        let (mut blocks, mut inodes) = (0u64, 0u32);
        for group in self.sb.groups() {
            let desc = self.desc(group)?;
            blocks += u64::from(desc.free_blocks);
            inodes += desc.free_inodes;
        }
        sb.set_free_blocks_count(blocks);
        sb.set_free_inodes_count(inodes);
        Ok(())
    }

    /// Where to look for an inode's first blocks: the start of its group, staggered so that
    /// files of one group do not all start at one place.
    pub(crate) fn goal_for(&self, inode: &Inode) -> FsBlock {
        let Some(location) = self.sb.inode_location(inode.ino) else {
            return self.sb.first_data_block();
        };
        // With flex_bg the metadata of a flex group fills the start of its first group.
        self.sb.group_first_block(location.group)
    }
}
