//! Large writes that go from the caller's memory to the disk, past the page cache.
//!
//! The kernel keeps what a file's reader will want in a cache of its own, so a copy here only
//! costs: a frame, a folio and their places in trees for each page, and the same again when
//! they are written and when they make room for others. A large write has its run of blocks at
//! once, and it is mapped before it returns; so an fsync that follows finds little to do.
//!
//! The steps are those of [`crate::writeback`], with the caller's memory in place of the
//! pages, and so is their order: blocks are reserved, claimed in memory, written, and only
//! then marked used, mapped and behind the file's size, under one handle.
//!
//! Whoever wrote may go on before that: once space is reserved and the locks are held, nothing
//! comes between the write and who reads, syncs or changes the file after it, and the disk works
//! while the next write is on its way here. So a failure has to be kept. What could not be
//! written or mapped goes into the cache as dirty pages, with the reservation that it has: it
//! is read from there, tried again as anything dirty is, and a sync is told when that fails too.
//!
//! Invariants:
//! - None of the pages is in the cache from before the write until it is mapped: clean ones
//!   are dropped, and with a dirty one the write goes through the cache.
//! - The size on the disk grows only when nothing before it is dirty for want of a place.
//! - `FileData::large_write` is free only when the data is mapped or dirty, so that whoever has
//!   held it after a write finds the data in one of the two places.
//!
//! Only a disk that takes a large write quickly gets them so. The next write waits for the disk,
//! and where that is slow, memory and long runs serve everybody better: see [`Pace`].
//!
//! Locks: `Inode::rwsem` exclusive, by the caller, so that nobody makes a page meanwhile; then
//! `FileData::large_write`; then `Inode::writeback`, then each step's handle and `Inode::map`,
//! or, after a failure and without `Inode::writeback`, pages.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use uext_blockdev::mutant;
use uext_pagecache::{PAGE_SIZE, WritebackError};
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

impl Inode {
    /// Whether a large write is under way.
    pub(crate) fn has_large_write(&self) -> bool {
        self.data.large_write.try_lock().is_none()
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

    /// Waits until a large write under way is on the disk or among the dirty pages. The caller
    /// holds no lock of the file but perhaps `Inode::rwsem`, and no handle.
    pub(crate) fn wait_for_large_write(&self, inode: &Inode) {
        drop(inode.data.large_write.lock());
    }

    /// Writes whole pages at `offset` to the disk and maps them; gives how many bytes, or nothing
    /// when they have to go through the cache. `accept` is called with their number when that is
    /// all of the data, as soon as the write cannot fail any more for who wrote. The caller holds
    /// `Inode::rwsem` exclusively.
    pub(crate) fn write_past_cache(
        &self,
        inode: &Inode,
        offset: u64,
        data: &[u8],
        privileged: bool,
        accept: Option<&mut dyn FnMut(usize)>,
    ) -> Option<usize> {
        // The last page of the data may be the cache's.
        let (all, len) = (data.len(), data.len().min(WRITE_CHUNK));
        let data = &data[..len - len % PAGE_SIZE];
        if !self.may_pass_cache(inode, offset, data) {
            return None;
        }
        let end = offset + data.len() as u64;
        let pages = offset / PAGE..end / PAGE;
        if inode.mapping.has_pages(pages.clone()) && inode.mapping.invalidate(pages) > 0 {
            return None;
        }
        let grows = end > inode.core.lock().disk_size;
        if grows && !self.is_size_on_disk(inode) {
            return None;
        }
        let (first, last) = (self.block_at(offset), self.block_behind(end));
        // The cache's way knows what to do when space is short.
        let fresh = self.unmapped_ranges(inode, first, last).ok()?;
        self.delay_blocks(inode, &fresh, privileged).ok()?;
        let _under_way = inode.data.large_write.lock();
        let writeback = inode.writeback.lock();
        // Writeback that gave up a page, or a shutdown, may have dropped some since; reserving
        // may wait for writeback, so not under its lock.
        let dropped = self.unmapped_ranges(inode, first, last).ok()?;
        if !(dropped.holes.is_empty() && dropped.unwritten.is_empty()) {
            return None;
        }
        {
            let now = self.now();
            let mut core = inode.core.lock();
            (core.mtime, core.ctime) = (now, now);
            core.lazy_dirty = true;
            core.size = core.size.max(end);
        }
        if let Some(accept) = accept.filter(|_| data.len() == all) {
            accept(all);
        }
        let run = Run { logical: first, len: last - first };
        let written = self.write_and_map(inode, &run, data, end);
        drop(writeback);
        if let Err(error) = written {
            log::warn!("{}: inode {}: a large write is kept: {error}", self.name, inode.ino);
            self.keep(inode, offset, data);
        }
        Some(data.len())
    }

    /// Puts data that did not get to the disk into dirty pages. Its blocks are mapped or delayed.
    fn keep(&self, inode: &Inode, offset: u64, data: &[u8]) {
        let times = {
            let core = inode.core.lock();
            (core.mtime, core.ctime)
        };
        for (at, page) in (offset..).step_by(PAGE_SIZE).zip(data.chunks(PAGE_SIZE)) {
            // A whole page is not read before, so only damage of the process's own fails here.
            if let Err(error) = self.write_page(inode, at, page) {
                log::error!("{}: inode {}: bytes from {at} on: {error}", self.name, inode.ino);
                inode.mapping.errseq().set(WritebackError::Io);
                self.drop_delayed(inode, self.block_at(at), self.block_behind(at + PAGE));
            }
        }
        // Whoever wrote may have looked at them since.
        let mut core = inode.core.lock();
        (core.mtime, core.ctime) = times;
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

    /// Writes the data of a run that ends at the byte `end`, and maps it. What is not mapped after a failure is delayed.
    fn write_and_map(&self, inode: &Inode, run: &Run, data: &[u8], end: u64) -> Result<()> {
        let mut segments = Vec::new();
        let planned = self.plan_run(inode, run, &mut segments);
        let written = planned.and_then(|()| self.write_segments_of(run, &segments, data));
        if let Err(error) = written {
            segments.into_iter().for_each(|segment| self.give_up(segment));
            return Err(error);
        }
        let mut error = None;
        self.map_segments(inode, &mut [], &mut segments, &mut Vec::new(), end, &mut error);
        if let Some(error) = error {
            return Err(error);
        }
        if inode.core.lock().disk_size < end {
            // Over blocks that lie behind the size, and are written.
            let handle = self.start(credits::SETATTR)?;
            inode.core.lock().disk_size = end;
            self.mark_inode_dirty(&handle, inode)?;
        }
        Ok(())
    }

    /// Writes each segment's part of the data.
    fn write_segments_of(&self, run: &Run, segments: &[Segment], data: &[u8]) -> Result<()> {
        let block_size = self.block_size() as usize;
        let end = segments.iter().try_fold(run.logical, |at, segment| {
            (segment.logical == at).then_some(at + segment.len)
        });
        if end != Some(run.logical + run.len) {
            log::error!("{}: blocks from {} on have no place", self.name, run.logical);
            return Err(Errno::EIO.into());
        }
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
            self.buffers.device().write_slice_wait(sector, part)?;
        }
        self.pace.note(start.elapsed());
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use uext_vfs::{Context, FileHandle, FileSystem as _, ReadReply, WriteFlags};

    use super::*;
    use crate::MountOptions;
    use crate::test_image::mke2fs;

    /// What lies behind the gap went to the blocks before it.
    #[test]
    fn blocks_that_lost_their_reservation_have_nothing_written() {
        let device = mke2fs(16, &["-t", "ext4", "-b", "4096"]);
        let fs = Ext4::mount(device.clone(), "test", &MountOptions::default()).unwrap();
        let root = Context { uid: 0, gid: 0, pid: 1, umask: 0 };
        let made = fs.mknod(&root, fs.root(), b"file", 0o100_644, 0).unwrap().attr;
        let inode = fs.iget(uext_ondisk::InodeNumber(u32::try_from(made.ino).unwrap())).unwrap();
        // Twelve blocks of a hole, and what has a place.
        let (hole, blocks, old) = (12, 64, vec![3; 52 * PAGE_SIZE]);
        let at = u64::from(hole) * PAGE;
        let fh = FileHandle(0);
        let written = fs.write(&root, made.ino, fh, at, &old, WriteFlags::empty());
        assert_eq!(written, Ok(old.len()));
        fs.fsync(&root, made.ino, fh, false).unwrap();
        inode.mapping.invalidate(0..blocks.into());
        let fresh = fs.unmapped_ranges(&inode, 0, blocks).unwrap();
        fs.delay_blocks(&inode, &fresh, true).unwrap();
        fs.drop_delayed(&inode, 10, hole);

        let data = vec![7; 64 * PAGE_SIZE];
        let run = Run { logical: 0, len: blocks };
        assert!(fs.write_and_map(&inode, &run, &data, data.len() as u64).is_err());

        let mut reply = ReadReply::new();
        fs.file_read(&inode, at, old.len(), &mut reply).unwrap();
        assert!(reply.to_vec() == old, "it was written");
        fs.drop_delayed(&inode, 0, blocks);
        fs.unmount().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), device.snapshot()).unwrap();
        assert!(Command::new("e2fsck").arg("-fn").arg(file.path()).status().unwrap().success());
    }

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
