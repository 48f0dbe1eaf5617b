//! Large writes that go from the caller's memory to the disk, past the page cache.
//!
//! The kernel keeps what a file's reader will want in a cache of its own, so a copy here only
//! costs: a frame, a folio and their places in trees for each page, and the same again when
//! they are written and when they make room for others. A large write has its run of blocks at
//! once, and it is mapped before it returns; so an fsync that follows finds little to do.
//!
//! The steps are those of [`crate::writeback`], with the caller's memory in place of the
//! pages, and so is their order: blocks are reserved, claimed in memory, written, and only
//! then marked used, mapped and behind the file's size, under one handle. A write that fails
//! is told to the caller and leaves the blocks it did not map as they were.
//!
//! Invariants:
//! - None of the pages is in the cache from before the write until it is mapped: clean ones
//!   are dropped, and with a dirty one the write goes through the cache.
//! - The size on the disk grows only when nothing before it is dirty for want of a place.
//! - `core.size` grows when the data is mapped, so nobody sees bytes that a failed write left out.
//!
//! Only a disk that takes a large write quickly gets them so. Whoever writes waits for the disk,
//! and where that is slow, memory and long runs serve everybody better: see [`Pace`].
//!
//! Locks: `Inode::rwsem` exclusive, by the caller, so that nobody makes a page meanwhile; then
//! `Inode::writeback`, then each step's handle and `Inode::map`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use uext_blockdev::mutant;
use uext_pagecache::PAGE_SIZE;
use uext_vfs::Errno;

use crate::credits;
use crate::error::{Error, Result};
use crate::file::{PAGE, WRITE_CHUNK};
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::writeback::{Run, Segment};

/// From this many bytes on a write goes past the cache: below, a request costs more than a copy.
pub(crate) const LARGE_WRITE: usize = 256 << 10;
/// A disk that needs longer for a large write is slow.
const SLOW: Duration = Duration::from_millis(4);
/// After so many large writes through the cache the disk is tried again.
const TRY_AGAIN: u32 = 64;

/// Whether the disk keeps up with whoever writes past the cache.
#[derive(Default)]
pub(crate) struct Pace {
    /// Large writes that still go through the cache.
    /// WHY-RELAXED: a hint; a lost update moves the next try by one write.
    waiting: AtomicU32,
}

impl Pace {
    /// Whether the next large write may go to the disk.
    fn allows(&self) -> bool {
        let waiting = self.waiting.load(Ordering::Relaxed);
        if waiting > 0 {
            self.waiting.store(waiting - 1, Ordering::Relaxed);
        }
        waiting == 0
    }

    /// How long the disk needed for one.
    fn note(&self, took: Duration) {
        if took > SLOW {
            self.waiting.store(TRY_AGAIN, Ordering::Relaxed);
        }
    }
}

impl Ext4 {
    /// Whether a write of data that lies in whole pages may go past the cache.
    fn may_pass_cache(&self, inode: &Inode, offset: u64, data: &[u8]) -> bool {
        let alignment = self.buffers.device().limits().dma_alignment as usize;
        data.len() >= LARGE_WRITE
            && offset.is_multiple_of(PAGE)
            && data.as_ptr().addr().is_multiple_of(alignment)
            && !self.journals_data(inode)
            && !mutant!("mapping-before-data")
            && self.pace.allows()
    }

    /// Writes whole pages at `offset` to the disk and maps them; gives how many bytes, or nothing
    /// when they have to go through the cache. The caller holds `Inode::rwsem` exclusively.
    ///
    /// # Errors
    /// How writing or mapping failed; part of the data may be there then.
    pub(crate) fn write_past_cache(
        &self,
        inode: &Inode,
        offset: u64,
        data: &[u8],
        privileged: bool,
    ) -> Result<Option<usize>> {
        // The last page of the data may be the cache's.
        let len = data.len().min(WRITE_CHUNK);
        let data = &data[..len - len % PAGE_SIZE];
        if !self.may_pass_cache(inode, offset, data) {
            return Ok(None);
        }
        let end = offset + data.len() as u64;
        let pages = offset / PAGE..end / PAGE;
        if inode.mapping.has_pages(pages.clone()) && inode.mapping.invalidate(pages) > 0 {
            return Ok(None);
        }
        if end > inode.size() && !self.is_size_on_disk(inode) {
            return Ok(None);
        }
        let (first, last) = (self.block_at(offset), self.block_behind(end));
        let delayed = self
            .unmapped_ranges(inode, first, last)
            .and_then(|fresh| self.delay_blocks(inode, &fresh, privileged));
        if delayed.is_err() {
            // The cache's way knows what to do when space is short.
            return Ok(None);
        }
        let _writeback = inode.writeback.lock();
        let written =
            self.write_and_map(inode, Run { logical: first, len: last - first }, data, end);
        if written.is_err() {
            self.drop_delayed(inode, first, last);
            // What was mapped before the failure is behind the size on the disk.
            let mut core = inode.core.lock();
            core.size = core.size.max(core.disk_size);
        }
        written.map(|()| Some(data.len()))
    }

    /// Writes what is dirty up to the end of the file, and the zeroes behind it, so that the size
    /// on the disk, which is about to grow further, tells of nothing that is still in memory or
    /// was cut off; whether it is there then.
    fn is_size_on_disk(&self, inode: &Inode) -> bool {
        let (from, to) = {
            let core = inode.core.lock();
            (core.disk_size.min(core.size), core.size)
        };
        // Whoever syncs the file hears of a failure; the cache's way tries again.
        let written = inode.mapping.write_and_wait(from / PAGE..to.div_ceil(PAGE));
        written.is_ok() && inode.core.lock().disk_size >= to
    }

    /// Writes the data of a run that ends at the byte `end`, and maps it.
    fn write_and_map(&self, inode: &Inode, run: Run, data: &[u8], end: u64) -> Result<()> {
        let mut segments = Vec::new();
        let planned = self.plan_run(inode, &run, &mut segments);
        let written = planned.and_then(|()| self.write_segments_of(inode, &run, &segments, data));
        if let Err(error) = written {
            segments.into_iter().for_each(|segment| self.give_up(segment));
            return Err(error);
        }
        let now = self.now();
        let size = {
            let mut core = inode.core.lock();
            (core.mtime, core.ctime) = (now, now);
            core.lazy_dirty = true;
            core.size.max(end)
        };
        let mut error = None;
        self.map_segments(inode, &mut [], &mut segments, &mut Vec::new(), size, &mut error);
        if let Some(error) = error {
            return Err(error);
        }
        let follows = {
            let mut core = inode.core.lock();
            core.size = size;
            core.disk_size < size
        };
        if follows {
            // Over blocks that lie behind the size, and are written.
            let handle = self.start(credits::SETATTR)?;
            inode.core.lock().disk_size = size;
            self.mark_inode_dirty(&handle, inode)?;
        }
        Ok(())
    }

    /// Writes each segment's part of the data.
    fn write_segments_of(
        &self,
        inode: &Inode,
        run: &Run,
        segments: &[Segment],
        data: &[u8],
    ) -> Result<()> {
        let block_size = self.block_size() as usize;
        let mut rest = data;
        let start = Instant::now();
        for segment in segments {
            let (part, behind) = rest
                .split_at_checked(segment.len as usize * block_size)
                .ok_or(Error::Errno(Errno::EIO))?;
            rest = behind;
            let start = segment.start();
            // Without a journal a freed block of metadata is free at once.
            self.buffers.wait_for_forgotten(start.0..start.0 + u64::from(segment.len));
            let sector = self.sector_of(start);
            if let Err(status) = self.buffers.device().write_slice_wait(sector, part) {
                log::error!(
                    "{}: inode {}: writing {} blocks at block {start} failed: {status}",
                    self.name,
                    inode.ino,
                    segment.len,
                );
                self.data_write_failed(status);
                return Err(status.into());
            }
        }
        self.pace.note(start.elapsed());
        debug_assert!(rest.is_empty(), "blocks from {} on have no place", run.logical);
        if rest.is_empty() { Ok(()) } else { Err(Errno::EIO.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_disk_is_left_alone_for_a_while() {
        let pace = Pace::default();
        pace.note(SLOW);
        assert!(pace.allows(), "not slower than that");
        pace.note(SLOW + Duration::from_millis(1));
        let through_the_cache = (0..1000).take_while(|_| !pace.allows()).count();
        assert_eq!(through_the_cache, TRY_AGAIN as usize);
        assert!(pace.allows());
    }
}
