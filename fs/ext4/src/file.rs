//! Reading and writing files through the page cache.
//!
//! Invariants:
//! - A page that is uptodate is zero behind the end of the file; a block on the disk is
//!   made so before the file grows over its tail.
//! - `core.size` grows while the page that made it grow is still locked, so that writeback,
//!   which locks a batch of pages and then looks at the size, never sees a size whose data
//!   is not in these pages.
//! - A block is delayed before its page is dirty (see `delayed`).
//! - Pages are locked by rising index, and never under a journal handle.
//!
//! Locks: `Inode::rwsem` shared to read, exclusive to write; then pages; then `Inode::map`
//! shared. What reserves space does so before a page is locked, since it may wait for a commit.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use uext_blockdev::{Bio, BioFlags, BioOp, BioVec, Sector, mutant};
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::{FsBlock, LogicalBlock};
use uext_pagecache::{Folio, FolioWriteGuard, PAGE_SIZE};
use uext_vfs::{Context, Errno, FileKind, ReadReply, ReadSegment, Write, WriteFlags};

use crate::delayed::Fresh;
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::map_blocks::Mapping;

/// Bytes of a page.
pub(crate) const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes for which space is reserved at once.
pub(crate) const WRITE_CHUNK: usize = 1 << 20;
/// Pages that are read, and lent to a reply, in one go.
const READ_PAGES: u64 = 512;
/// Blocks of which the place is looked up together.
const RUN: u32 = 1024;
/// Most bytes of one read.
const MAX_READ: usize = 64 << 20;
const S_ISUID: u16 = 0o4000;
const S_ISGID: u16 = 0o2000;
const S_IXGRP: u16 = 0o0010;

/// Pages, by rising index.
type Folios = Vec<Arc<Folio>>;
/// Parts of a page, and where they are on the disk.
type Places = SmallVec<[(Range<usize>, FsBlock); 4]>;

/// A locked page that is being read.
pub(crate) struct Fill {
    pub guard: FolioWriteGuard,
    /// A bio that fills it failed.
    pub failed: bool,
}

impl Ext4 {
    /// The sector of a block.
    pub(crate) fn sector_of(&self, block: FsBlock) -> Sector {
        Sector(block.0 * u64::from(self.block_size() / 512))
    }

    /// The block of a file that holds a byte; past the last possible one, that.
    pub(crate) fn block_at(&self, offset: u64) -> u32 {
        u32::try_from(offset / u64::from(self.block_size())).unwrap_or(u32::MAX)
    }

    /// The first block of a file that lies wholly behind a size.
    pub(crate) fn block_behind(&self, size: u64) -> u32 {
        u32::try_from(size.div_ceil(u64::from(self.block_size()))).unwrap_or(u32::MAX)
    }

    /// Reads up to `len` bytes at `offset`, fewer only at the end of the file. Pages that are
    /// cached, or now become so, are lent to the reply; holes need no page.
    ///
    /// # Errors
    /// `EISDIR`, `EINVAL` for what is no file, or what went wrong with the first page.
    pub(crate) fn file_read(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        len: usize,
        reply: &mut ReadReply,
    ) -> Result<()> {
        match inode.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::EINVAL.into()),
        }
        self.check_alive()?;
        let _shared = inode.rwsem.read();
        let size = inode.size();
        let end = size.min(offset.saturating_add(len.min(MAX_READ) as u64));
        if offset >= end {
            return Ok(());
        }
        self.touch_atime(inode);
        let (first, last) = (offset / PAGE, end.div_ceil(PAGE));
        let ahead = inode.data.readahead.lock().on_read(first, last - first, size.div_ceil(PAGE));
        // What is wanted now comes first, but where it is on its way the disk need not wait.
        let missing = !inode.mapping.has_pages(first..first + 1);
        let (before, behind) = if missing { (None, ahead) } else { (ahead, None) };
        if let Some(ahead) = before {
            self.read_ahead(inode, ahead);
        }
        // What a reply lends cannot leave the cache, so a long read is copied piece by piece.
        let lends = last - first <= READ_PAGES;
        for from in (first..last).step_by(READ_PAGES as usize) {
            let to = last.min(from + READ_PAGES);
            for (index, page) in (from..to).zip(self.pages_for_read(inode, from, to)?) {
                let start = offset.max(index * PAGE) - index * PAGE;
                let stop = end.min((index + 1) * PAGE) - index * PAGE;
                // Both are at most a page.
                let range = start as usize..stop as usize;
                reply.push(match page {
                    Some(folio) if lends => ReadSegment::Folio(folio.read(), range),
                    Some(folio) => ReadSegment::Bytes(folio.read()[range].to_vec()),
                    None => ReadSegment::Zeroes(range.len()),
                });
            }
        }
        if let Some(ahead) = behind {
            self.read_ahead(inode, ahead);
        }
        if offset == 0 {
            self.read_listed_ahead(inode, missing);
        }
        Ok(())
    }

    /// Pages `first..last`, uptodate; `None` where all of a page is a hole.
    fn pages_for_read(
        &self,
        inode: &Arc<Inode>,
        first: u64,
        last: u64,
    ) -> Result<Vec<Option<Arc<Folio>>>> {
        let (cached, made) = self.make_pages(inode, first..last)?;
        cached.iter().for_each(|folio| folio.touch());
        let mut pages = vec![None; (last - first) as usize];
        for folio in cached.into_iter().chain(made) {
            let at = (folio.index() - first) as usize;
            pages[at] = Some(folio);
        }
        let missing = pages.iter().flatten().filter(|folio| !folio.is_uptodate());
        let missing: Vec<_> = missing.cloned().collect();
        self.fill_pages(inode, &missing, BioFlags::SYNC)?;
        Ok(pages)
    }

    /// The pages of a range that are cached, and those that are made because there is data; what
    /// is left is holes. Writers are excluded.
    pub(crate) fn make_pages(&self, inode: &Inode, range: Range<u64>) -> Result<(Folios, Folios)> {
        let cached = inode.mapping.find_range(range.clone());
        let mut made = Vec::new();
        let mut from = range.start;
        for to in cached.iter().map(|folio| folio.index()).chain([range.end]) {
            for run in self.data_pages(inode, from..to)? {
                made.extend(inode.mapping.find_or_create_to_fill(run));
            }
            from = to + 1;
        }
        Ok((cached, made))
    }

    /// The pages of a range that have a block with data, in runs. None of them is cached, so what
    /// the mapping says of them stays.
    fn data_pages(&self, inode: &Inode, pages: Range<u64>) -> Result<SmallVec<[Range<u64>; 4]>> {
        let per_page = PAGE / u64::from(self.block_size());
        let block = |page: u64| u32::try_from(page * per_page).unwrap_or(u32::MAX);
        let (mut at, end) = (block(pages.start), block(pages.end));
        let mut runs: SmallVec<[Range<u64>; 4]> = SmallVec::new();
        while at < end {
            let (is_data, stop) = self.run_kind(inode, at, end)?;
            let stop = stop.min(end);
            if is_data {
                let (from, to) = (u64::from(at) / per_page, u64::from(stop).div_ceil(per_page));
                match runs.last_mut() {
                    Some(last) if from <= last.end => last.end = to,
                    _ => runs.push(from..to),
                }
            }
            at = stop;
        }
        Ok(runs)
    }

    /// Makes pages uptodate, with one bio per run on the disk. `folios` go by rising index.
    fn fill_pages(&self, inode: &Inode, folios: &[Arc<Folio>], flags: BioFlags) -> Result<()> {
        if folios.is_empty() {
            return Ok(());
        }
        let (mut fills, bios) = self.plan_fill(inode, folios, flags)?;
        let mut error = None;
        for bio in self.buffers.device().submit_bios_wait(bios) {
            if let Err(status) = bio.status() {
                error.get_or_insert(status);
                let (first, count) = unpack(bio.private());
                fills[first..first + count].iter_mut().for_each(|fill| fill.failed = true);
            }
        }
        for fill in fills.iter().filter(|fill| !fill.failed) {
            fill.guard.set_uptodate();
        }
        error.map_or(Ok(()), |status| Err(status.into()))
    }

    /// Locks pages and makes the bios that fill them. What is not on the disk is zeroed.
    pub(crate) fn plan_fill(
        &self,
        inode: &Inode,
        folios: &[Arc<Folio>],
        flags: BioFlags,
    ) -> Result<(Vec<Fill>, Vec<Bio>)> {
        let mut fills: Vec<Fill> = Vec::with_capacity(folios.len());
        let mut bios: Vec<Bio> = Vec::new();
        let mut run = None;
        let readahead = flags.contains(BioFlags::RAHEAD);
        for folio in folios {
            // Readahead never waits for a page: who has it reads it.
            let guard = if readahead { folio.try_write() } else { Some(folio.write()) };
            let Some(mut guard) = guard else { continue };
            if guard.is_uptodate() {
                continue;
            }
            for (range, block) in self.plan_page(inode, &mut guard, &mut run)? {
                let vec = guard.bvec(range.start, range.len());
                push_run(&mut bios, self.sector_of(block), vec, fills.len(), flags);
            }
            fills.push(Fill { guard, failed: false });
        }
        Ok((fills, bios))
    }

    /// What of a page is to be read, and from where; the rest is zeroed, but for dirty blocks.
    /// `run` is the run found last, for the next page; the pages are the caller's, so it holds.
    fn plan_page(
        &self,
        inode: &Inode,
        guard: &mut FolioWriteGuard,
        run: &mut Option<(u32, Mapping)>,
    ) -> Result<Places> {
        let block_size = self.block_size() as usize;
        let index = guard.folio().index();
        let size = inode.size();
        let dirty = guard.blocks().dirty;
        let in_log = self.journals_data(inode);
        let mut reads = Places::new();
        for (at, start) in (0..PAGE_SIZE).step_by(block_size).enumerate() {
            if dirty & (1 << at) != 0 {
                continue;
            }
            let offset = index * PAGE + start as u64;
            let range = start..start + block_size;
            let logical = self.block_at(offset);
            let mut place = None;
            if offset < size {
                let known = run.filter(|(first, run)| {
                    logical.checked_sub(*first).is_some_and(|skip| skip < run.len)
                });
                let (first, mapping) = match known {
                    Some(known) => known,
                    None => (logical, self.map_lookup(inode, LogicalBlock(logical), RUN)?),
                };
                *run = Some((first, mapping));
                place = mapping.data().map(|start| start + u64::from(logical - first));
            }
            match (place, reads.last_mut()) {
                (None, _) => guard[range].fill(0),
                (Some(block), _)
                    if in_log && self.copy_logged(block, &mut guard[range.clone()]) => {}
                (Some(block), Some((last, first)))
                    if last.end == start
                        && first.0 + (last.len() / block_size) as u64 == block.0 =>
                {
                    last.end = range.end;
                }
                (Some(block), _) => reads.push((range, block)),
            }
        }
        Ok(reads)
    }

    /// Makes a locked page uptodate.
    fn fill_locked(&self, inode: &Inode, guard: &mut FolioWriteGuard) -> Result<()> {
        let mut bios = Vec::new();
        for (range, block) in self.plan_page(inode, guard, &mut None)? {
            let mut bio = Bio::new(BioOp::Read, BioFlags::SYNC, self.sector_of(block));
            bio.add_vec(guard.bvec(range.start, range.len()));
            bios.push(bio);
        }
        if !bios.is_empty() {
            for bio in self.buffers.device().submit_bios_wait(bios) {
                bio.status()?;
            }
        }
        guard.set_uptodate();
        Ok(())
    }

    /// A page of the file, locked and uptodate.
    fn lock_page(&self, inode: &Inode, index: u64) -> Result<FolioWriteGuard> {
        loop {
            let folio = inode.mapping.find_or_create(index);
            let mut guard = folio.write();
            if !folio.is_attached() {
                continue;
            }
            if !guard.is_uptodate() {
                self.fill_locked(inode, &mut guard)?;
            }
            return Ok(guard);
        }
    }

    /// Writes at the offset, or at the end with `APPEND`, into the page cache, or past it. Gives
    /// how much was written: less than all only when space or the largest size ended it. Calls
    /// `accept` with that as soon as nothing can come in between, when that is long before.
    ///
    /// # Errors
    /// `ENOSPC`, `EFBIG`, `EROFS`, `EPERM`, or how reading a page failed, when nothing was written;
    /// with `DIRECT` also when something was, since the kernel makes `EIO` of a short direct write.
    pub(crate) fn file_write(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        write: &Write<'_>,
        mut accept: Option<&mut dyn FnMut(usize)>,
    ) -> Result<usize> {
        let &Write { offset, data, flags, .. } = write;
        self.check_writable()?;
        match inode.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::EINVAL.into()),
        }
        let inode_flags = inode.core.lock().flags;
        // What is appended comes with the end of the file as its offset.
        let appends = flags.contains(WriteFlags::APPEND) || offset >= inode.size();
        if inode_flags.contains(InodeFlags::IMMUTABLE)
            || (inode_flags.contains(InodeFlags::APPEND) && !appends)
        {
            return Err(Errno::EPERM.into());
        }
        if data.is_empty() {
            return Ok(0);
        }
        let sync = flags.contains(WriteFlags::SYNC)
            || self.options.sync
            || inode_flags.contains(InodeFlags::SYNC);
        if sync || flags.intersects(WriteFlags::DSYNC | WriteFlags::DIRECT) {
            accept = None;
        }
        let written = {
            let _exclusive = inode.rwsem.write();
            let size = inode.size();
            let offset = if flags.contains(WriteFlags::APPEND) { size } else { offset };
            let most = self.max_file_size(inode);
            if offset >= most {
                return Err(Errno::EFBIG.into());
            }
            let room = usize::try_from(most - offset).unwrap_or(usize::MAX);
            let direct = flags.contains(WriteFlags::DIRECT);
            if direct && room < data.len() {
                return Err(Errno::EFBIG.into());
            }
            let data = &data[..data.len().min(room)];
            self.allow_size(offset + data.len() as u64)?;
            if flags.contains(WriteFlags::KILL_SUIDGID) {
                kill_suidgid(ctx, inode);
            }
            if !flags.contains(WriteFlags::CACHE) {
                self.kill_capability(inode)?;
            }
            if offset > size {
                self.zero_tail(inode, size)?;
            }
            let privileged = self.may_use_reserve(ctx, 0);
            let how = (privileged, direct);
            let written = self.write_pages_of(inode, offset, data, how, accept)?;
            if self.journals_data(inode) {
                // From the old end on, whose tail may have been zeroed.
                self.journal_range(inode, offset.min(size)..offset + written as u64)?;
            }
            written
        };
        inode.mapping.balance_dirty();
        if sync || flags.contains(WriteFlags::DSYNC) {
            self.sync_inode(inode, !sync)?;
        }
        Ok(written)
    }

    fn write_pages_of(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        data: &[u8],
        (privileged, all_or_error): (bool, bool),
        mut accept: Option<&mut dyn FnMut(usize)>,
    ) -> Result<usize> {
        let mut done = 0;
        let mut chunk_len = WRITE_CHUNK;
        let mut settled = false;
        while done < data.len() {
            let at = offset + done as u64;
            // A write of several pieces is told of when its last is here.
            let accept = if done == 0 { accept.take() } else { None };
            if let Some(written) =
                self.write_past_cache(inode, at, &data[done..], privileged, accept)
            {
                done += written;
                continue;
            }
            // Up to the end of a page, so that every chunk but the last ends with one.
            let in_page = (at % PAGE) as usize;
            let len = (data.len() - done).min(chunk_len.max(PAGE_SIZE) - in_page);
            let (written, result) =
                self.write_chunk(inode, at, &data[done..done + len], privileged);
            done += written;
            match result {
                Ok(()) => {}
                Err(error) if error.is(Errno::ENOSPC) && !settled => {
                    // Reservations are for the worst case; once mapped, data takes what it needs.
                    self.settle_reservations();
                    settled = true;
                }
                Err(error) if error.is(Errno::ENOSPC) && chunk_len > PAGE_SIZE => {
                    chunk_len = PAGE_SIZE;
                }
                Err(_) if done > 0 && !all_or_error => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Writes all of a chunk, or fails after some of its pages, whose bytes are told, and leaves
    /// no reservation behind for the rest.
    fn write_chunk(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        data: &[u8],
        privileged: bool,
    ) -> (usize, Result<()>) {
        let end = offset + data.len() as u64;
        let fresh = self
            .unmapped_ranges(inode, self.block_at(offset), self.block_behind(end))
            .and_then(|fresh| self.delay_blocks(inode, &fresh, privileged).map(|()| fresh));
        let fresh = match fresh {
            Ok(fresh) => fresh,
            Err(error) => return (0, Err(error)),
        };
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let len = (data.len() - done).min(PAGE_SIZE - (at % PAGE) as usize);
            if let Err(error) = self.write_page(inode, at, &data[done..done + len]) {
                let failed = self.block_at(at);
                let unwritten = fresh.unwritten.iter();
                for &(from, to) in
                    fresh.holes.iter().chain(unwritten).filter(|(_, to)| *to > failed)
                {
                    self.drop_delayed(inode, from.max(failed), to);
                }
                return (done, Err(error));
            }
            done += len;
        }
        (done, Ok(()))
    }

    /// Ranges of blocks whose writing needs space that is not reserved.
    pub(crate) fn unmapped_ranges(&self, inode: &Inode, from: u32, end: u32) -> Result<Fresh> {
        let mut fresh = Fresh::default();
        let mut at = from;
        while at < end {
            // First whether it is delayed, then whether it is mapped: writeback maps a block
            // before it takes the reservation out, so it is seen as one of the two.
            let (delayed_end, next_delayed, converting) = {
                let delayed = inode.data.delayed.lock();
                let unwritten = delayed.unwritten();
                let converting = match unwritten.end_of(at) {
                    Some(stop) => (true, stop),
                    None => (false, unwritten.next(at).unwrap_or(end)),
                };
                (delayed.end_of(at), delayed.next(at).unwrap_or(end), converting)
            };
            let known_end = delayed_end.or(converting.0.then_some(converting.1));
            if let Some(known_end) = known_end {
                at = known_end;
                continue;
            }
            let most = next_delayed.min(converting.1).min(end) - at;
            let mapping = self.map_lookup(inode, LogicalBlock(at), most)?;
            if mapping.start.is_none() || mapping.unwritten {
                fresh.push(mapping.unwritten, at, at + mapping.len);
            }
            at += mapping.len;
        }
        Ok(fresh)
    }

    /// Copies into one page and marks its blocks dirty.
    pub(crate) fn write_page(&self, inode: &Inode, offset: u64, data: &[u8]) -> Result<()> {
        let (index, start) = (offset / PAGE, (offset % PAGE) as usize);
        let end = offset + data.len() as u64;
        let range = start..start + data.len();
        loop {
            let folio = inode.mapping.find_or_create(index);
            let mut guard = folio.write();
            if !folio.is_attached() {
                continue;
            }
            let size = inode.size();
            let (to_end, grows) = (end >= size, end > size);
            let is_all = data.len() == PAGE_SIZE || (start == 0 && to_end);
            if !guard.is_uptodate() && !is_all {
                self.fill_locked(inode, &mut guard)?;
            }
            guard[range.clone()].copy_from_slice(data);
            if to_end {
                guard[range.end..].fill(0);
            }
            guard.set_uptodate();
            if !guard.mark_dirty(self.block_mask(range.clone())) {
                continue;
            }
            let now = self.now();
            let mut core = inode.core.lock();
            if grows {
                core.size = end;
                if mutant!("size-before-data") {
                    core.disk_size = end;
                }
            }
            (core.mtime, core.ctime) = (now, now);
            core.lazy_dirty = true;
            return Ok(());
        }
    }

    /// The bits of a page's blocks that a byte range touches.
    pub(crate) fn block_mask(&self, range: Range<usize>) -> u8 {
        let block_size = self.block_size() as usize;
        (range.start / block_size..range.end.div_ceil(block_size))
            .fold(0, |mask, at| mask | 1 << at)
    }

    /// Zeroes the tail of the block that holds the end of the file, before the file grows over it:
    /// what wrote the image may have left something there.
    pub(crate) fn zero_tail(&self, inode: &Inode, size: u64) -> Result<()> {
        self.zero_bytes(inode, size..size.next_multiple_of(u64::from(self.block_size())))
    }

    /// Zeroes bytes of one block, if they are there.
    pub(crate) fn zero_bytes(&self, inode: &Inode, bytes: Range<u64>) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let logical = self.block_at(bytes.start);
        let is_delayed = inode.data.delayed.lock().end_of(logical).is_some();
        if !is_delayed && self.map_lookup(inode, LogicalBlock(logical), 1)?.start.is_none() {
            return Ok(());
        }
        loop {
            let mut guard = self.lock_page(inode, bytes.start / PAGE)?;
            let start = (bytes.start % PAGE) as usize;
            // Within one block, and so within the page.
            let range = start..start + (bytes.end - bytes.start) as usize;
            if guard[range.clone()].iter().all(|&byte| byte == 0) {
                return Ok(());
            }
            guard[range.clone()].fill(0);
            if guard.mark_dirty(self.block_mask(range)) {
                return Ok(());
            }
        }
    }

    /// Zeroes what is cached of the page that holds `size` behind it, where the file is about to
    /// end.
    pub(crate) fn zero_cached_tail(&self, inode: &Inode, size: u64) {
        if size.is_multiple_of(PAGE) {
            return;
        }
        if let Some(folio) = inode.mapping.find(size / PAGE) {
            let mut guard = folio.write();
            // The rest of a page that is not uptodate is made when it is read.
            guard[(size % PAGE) as usize..].fill(0);
        }
    }

    /// lseek(2) with `SEEK_DATA` and `SEEK_HOLE`.
    ///
    /// # Errors
    /// `ENXIO` at or past the end, and when no data follows; `EINVAL` for another `whence`.
    pub(crate) fn seek(&self, inode: &Arc<Inode>, offset: u64, whence: i32) -> Result<u64> {
        let want_data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Err(Errno::EINVAL.into()),
        };
        if inode.kind != FileKind::Regular {
            return Err(Errno::EINVAL.into());
        }
        let _shared = inode.rwsem.read();
        let size = inode.size();
        if offset >= size {
            return Err(Errno::ENXIO.into());
        }
        let (mut at, end) = (self.block_at(offset), self.block_behind(size));
        while at < end {
            let (is_data, stop) = self.run_kind(inode, at, end)?;
            if is_data == want_data {
                let found = u64::from(at) * u64::from(self.block_size());
                return Ok(found.max(offset));
            }
            at = stop;
        }
        if want_data { Err(Errno::ENXIO.into()) } else { Ok(size) }
    }

    /// Whether a block holds data, and up to where the answer is the same at least.
    fn run_kind(&self, inode: &Inode, at: u32, end: u32) -> Result<(bool, u32)> {
        let (delayed_end, next) = {
            let delayed = inode.data.delayed.lock();
            (delayed.end_of(at), delayed.next(at).unwrap_or(end))
        };
        if let Some(stop) = delayed_end {
            return Ok((true, stop));
        }
        let mapping = self.map_lookup(inode, LogicalBlock(at), next.min(end) - at)?;
        let stop = at + mapping.len;
        if !mapping.unwritten {
            return Ok((mapping.start.is_some(), stop));
        }
        // Unwritten blocks are data as soon as they are dirty.
        let delayed = inode.data.delayed.lock();
        Ok(match delayed.unwritten().end_of(at) {
            Some(end) => (true, end.min(stop)),
            None => (false, delayed.unwritten().next(at).map_or(stop, |next| next.min(stop))),
        })
    }
}

/// The mode of a file of this group that is left when somebody's change takes the set-id bits.
pub(crate) fn without_set_id(ctx: &Context, mode: u16, group: u32) -> u16 {
    // Without the group's execute bit one stays for members of the group, as far as is known. It
    // is asked only then: every write of an ordinary user comes here.
    let stays = mode & (S_ISGID | S_IXGRP) == S_ISGID && {
        let who = ctx.known();
        who.uid == 0 || who.gid == group
    };
    mode & !(if stays { S_ISUID } else { S_ISUID | S_ISGID })
}

/// Clears the set-id bits that a write by somebody else must not leave. The caller holds
/// `Inode::rwsem` exclusively.
pub(crate) fn kill_suidgid(ctx: &Context, inode: &Inode) {
    let (mode, group) = {
        let core = inode.core.lock();
        (core.mode, core.gid)
    };
    let mode = without_set_id(ctx, mode, group);
    let mut core = inode.core.lock();
    if mode != core.mode {
        core.mode = mode;
        core.lazy_dirty = true;
    }
}

/// Which pages of a batch a bio fills, in its private number.
fn pack(first: usize, count: usize) -> u64 {
    (first as u64) << 32 | count as u64
}

pub(crate) fn unpack(private: u64) -> (usize, usize) {
    ((private >> 32) as usize, (private & 0xffff_ffff) as usize)
}

/// Adds memory to the last bio when it continues that on the disk, else begins a new one.
fn push_run(bios: &mut Vec<Bio>, sector: Sector, vec: BioVec, page: usize, flags: BioFlags) {
    match bios.last_mut() {
        Some(bio) if bio.end_sector() == sector => {
            bio.add_vec(vec);
            let (first, _) = unpack(bio.private());
            bio.set_private(pack(first, page - first + 1));
        }
        _ => {
            let mut bio = Bio::new(BioOp::Read, flags, sector);
            bio.add_vec(vec);
            bio.set_private(pack(page, 1));
            bios.push(bio);
        }
    }
}

impl From<uext_pagecache::WritebackError> for Error {
    fn from(error: uext_pagecache::WritebackError) -> Self {
        Self::Errno(Errno(error.errno()))
    }
}
