//! Writing dirty pages to the disk, where delayed blocks get their place.
//!
//! A batch of pages goes through these steps:
//! 1. the pages are locked shared and clean ([`WritebackGuard`]), and the size is looked at;
//! 2. their dirty blocks become segments: runs that lie together in the file and on the disk,
//!    for delayed ones after claiming blocks in memory;
//! 3. one bio per segment, all submitted together and waited for;
//! 4. journal handles mark claimed blocks used and map them, and each lets `disk_size` follow
//!    to the end of what it maps, so that no commit has written blocks behind the end;
//! 5. the guards end, each with its page's result.
//!
//! So a transaction refers only to data that has been written. Data that goes through the
//! journal takes steps 3 and 4 as one: see `journal_data`. What fails leaves its pages
//! dirty and its blocks delayed, with their reservation.
//!
//! A dirty block that is neither mapped nor delayed lies behind the end of the file, and
//! is zeroes: it needs no place.
//!
//! Locks: `Inode::writeback`, then pages by rising index, then handle start, then
//! `Inode::map` exclusive. Nobody who holds a handle waits for a page of a file, so
//! holding pages while a handle starts is safe.

use std::ops::Range;
use std::sync::Arc;

use uext_blockdev::{Bio, BioFlags, BioOp, BioSet, BlkStatus, mutant};
use uext_jbd2::Handle;
use uext_ondisk::extent::MAX_WRITTEN_LEN;
use uext_ondisk::{FsBlock, LogicalBlock};
use uext_pagecache::{AddressSpace, AddressSpaceOps, PAGE_SIZE, WritebackControl, WritebackError};
use uext_vfs::Errno;

use crate::balloc::Claim;
use crate::batch::{BATCH_BIOS, BATCH_PAGES, BIO_PAGES, Batch, Page};
use crate::credits;
use crate::error::{Error, Result};
use crate::file::PAGE;
use crate::fs::Ext4;
use crate::indirect;
use crate::inode::Inode;
use crate::map_blocks::{map_run, map_written};
use crate::map_io::FsMapIo;

/// Most segments that one handle maps.
pub(crate) const SEGMENTS_PER_HANDLE: usize = 4;

/// Dirty blocks that lie together in the file.
pub(crate) struct Run {
    pub logical: u32,
    pub len: u32,
}

/// Where a segment goes.
pub(crate) enum Place {
    /// Over blocks that hold data already.
    Mapped(FsBlock),
    /// To blocks that are mapped but count as zeroes until they are written.
    Unwritten(FsBlock),
    /// To blocks that nothing on the disk knows yet.
    Claimed(Claim),
}

/// Blocks that lie together in the file and on the disk.
pub(crate) struct Segment {
    pub logical: u32,
    pub len: u32,
    pub place: Place,
}

impl Segment {
    pub fn start(&self) -> FsBlock {
        match &self.place {
            Place::Mapped(start) | Place::Unwritten(start) => *start,
            Place::Claimed(claim) => claim.start,
        }
    }

    /// The first `len` blocks, and the rest when there is one.
    pub fn cut(self, len: u32) -> (Self, Option<Self>) {
        if len >= self.len {
            return (self, None);
        }
        let behind = |start: FsBlock| start + u64::from(len);
        let (first, rest) = match self.place {
            Place::Mapped(start) => (Place::Mapped(start), Place::Mapped(behind(start))),
            Place::Unwritten(start) => (Place::Unwritten(start), Place::Unwritten(behind(start))),
            Place::Claimed(claim) => {
                let (first, rest) = claim.cut(len);
                (Place::Claimed(first), Place::Claimed(rest))
            }
        };
        let rest = Self { logical: self.logical + len, len: self.len - len, place: rest };
        (Self { logical: self.logical, len, place: first }, Some(rest))
    }
}

impl AddressSpaceOps for Inode {
    fn writepages(
        &self,
        mapping: &Arc<AddressSpace>,
        wbc: &WritebackControl,
    ) -> std::result::Result<u64, WritebackError> {
        let fs = self.fs().map_err(|error| as_writeback_error(&error))?;
        let most = if wbc.sync { u64::MAX } else { wbc.nr_to_write };
        fs.write_pages(self, mapping, wbc.range.clone(), most).map_err(|error| {
            fs.report(Some(self.ino), &error);
            as_writeback_error(&error)
        })
    }

    fn write_together(&self, mappings: &mut dyn Iterator<Item = &Arc<AddressSpace>>) {
        // Who fails is tried again alone, and told.
        if let Err(error) = self.fs().and_then(|fs| fs.write_small_mappings(mappings)) {
            log::debug!("files written together: {error}");
        }
    }
}

fn as_writeback_error(error: &Error) -> WritebackError {
    match error.errno() {
        Errno::ENOSPC => WritebackError::NoSpace,
        Errno::EROFS => WritebackError::ReadOnly,
        Errno::EUCLEAN | Errno::EBADMSG => WritebackError::Corrupt,
        Errno::EDQUOT => WritebackError::Quota,
        _ => WritebackError::Io,
    }
}

impl Ext4 {
    /// Writes and maps all dirty data of a file, and waits for it.
    ///
    /// # Errors
    /// The first failure; it is in the file's `errseq` too.
    pub(crate) fn flush_data(&self, inode: &Inode) -> Result<()> {
        self.wait_for_large_write(inode);
        Ok(inode.mapping.write_and_wait(0..u64::MAX)?)
    }

    /// Writes dirty pages of a range, at most `most`; gives how many were begun.
    pub(crate) fn write_pages(
        &self,
        inode: &Inode,
        mapping: &Arc<AddressSpace>,
        range: Range<u64>,
        most: u64,
    ) -> Result<u64> {
        self.stopped()?;
        let _writeback = inode.writeback.lock();
        let mut batch = self.batches.take();
        let (mut next, mut written, mut first_error) = (range.start, 0, None);
        while written < most {
            batch.clear();
            let count = usize::try_from(most - written).unwrap_or(BATCH_PAGES).min(BATCH_PAGES);
            mapping.dirty_folios_into(next..range.end, count, &mut batch.folios);
            let Some(last) = batch.folios.last() else { break };
            // Going on behind the last one ends the loop although failed pages are dirty again.
            next = last.index() + 1;
            let Batch { folios, pages, .. } = &mut **batch;
            pages.extend(
                folios
                    .drain(..)
                    .map(|folio| Page { guard: folio.begin_writeback(), error: None })
                    .filter(|page| page.guard.dirty() != 0),
            );
            if pages.is_empty() {
                continue;
            }
            written += pages.len() as u64;
            if let Err(error) = self.write_batch(inode, &mut batch) {
                first_error.get_or_insert(error);
            }
        }
        batch.clear();
        first_error.map_or(Ok(written), Err)
    }

    fn write_batch(&self, inode: &Inode, batch: &mut Batch) -> Result<()> {
        // Read while the pages are locked: what they hold is no shorter than this.
        let size = inode.size();
        let mut first_error = None;
        let Batch { pages, runs, segments, .. } = &mut *batch;
        self.plan_pages(inode, pages, runs, segments, size, &mut first_error);
        if self.journals_data(inode) {
            let segments = batch.segments.drain(..).collect();
            self.journal_segments(inode, &mut batch.pages, segments, size, &mut first_error);
        } else if mutant!("mapping-before-data") {
            // As if nobody waited for the data: a commit comes before it.
            let Batch { pages, segments, group, bios, failed, set, .. } = &mut *batch;
            self.queue_data(set, pages, segments, bios, failed);
            self.map_segments(inode, pages, segments, group, size, &mut first_error);
            self.journal.commit_all()?;
            self.submit_data(bios, failed);
        } else {
            self.write_segments(inode, batch, &mut first_error);
            let Batch { pages, segments, group, .. } = &mut *batch;
            self.map_segments(inode, pages, segments, group, size, &mut first_error);
        }
        self.finish_pages(inode, &mut batch.pages, size, &mut first_error);
        first_error.map_or(Ok(()), Err)
    }

    /// Segments for the dirty blocks of locked pages; pages of blocks without one are failed.
    pub(crate) fn plan_pages(
        &self,
        inode: &Inode,
        pages: &mut [Page],
        runs: &mut Vec<Run>,
        segments: &mut Vec<Segment>,
        size: u64,
        first_error: &mut Option<Error>,
    ) {
        self.dirty_runs(pages, runs, size);
        for run in runs.iter() {
            if let Err(error) = self.plan_run(inode, run, segments) {
                // What was planned of the run goes on; the rest has no segment.
                let planned = segments.last().filter(|s: &&Segment| s.logical >= run.logical);
                let done = planned.map_or(run.logical, |s| s.logical + s.len);
                self.fail(pages, done, run.logical + run.len, &error);
                first_error.get_or_insert(error);
            }
        }
    }

    /// Lets the size on the disk follow and ends the pages, each with its result.
    pub(crate) fn finish_pages(
        &self,
        inode: &Inode,
        pages: &mut Vec<Page>,
        size: u64,
        first_error: &mut Option<Error>,
    ) {
        if let Err(error) = self.follow_size(inode, pages, size) {
            if let Some(last) = pages.last_mut() {
                last.error.get_or_insert(as_writeback_error(&error));
            }
            first_error.get_or_insert(error);
        }
        for page in pages.drain(..) {
            let folio = page.guard.folio().clone();
            let failed = page.error.is_some();
            page.guard.complete(page.error.map_or(Ok(()), Err));
            if failed && !folio.is_dirty() {
                // The cache gave the page up; so its blocks never get a place.
                let first = folio.index() * PAGE;
                self.drop_delayed(inode, self.block_at(first), self.block_behind(first + PAGE));
            }
        }
    }

    /// The dirty blocks of the pages as runs of the file, without what is behind its end.
    fn dirty_runs(&self, pages: &[Page], runs: &mut Vec<Run>, size: u64) {
        let end = self.block_behind(size);
        let block_size = self.block_size() as usize;
        for page in pages {
            let first = self.block_at(page.guard.folio().index() * PAGE);
            for at in 0..(PAGE_SIZE / block_size) as u32 {
                let logical = first + at;
                if page.guard.dirty() & (1 << at) == 0 || logical >= end {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.logical + run.len == logical => run.len += 1,
                    _ => runs.push(Run { logical, len: 1 }),
                }
            }
        }
    }

    /// Finds or claims a place for every block of a run.
    pub(crate) fn plan_run(
        &self,
        inode: &Inode,
        run: &Run,
        segments: &mut Vec<Segment>,
    ) -> Result<()> {
        let (mut at, end) = (run.logical, run.logical + run.len);
        while at < end {
            let mapping = self.map_lookup(inode, LogicalBlock(at), end - at)?;
            let len = mapping.len;
            match mapping.start {
                Some(start) if mapping.unwritten => {
                    segments.push(Segment { logical: at, len, place: Place::Unwritten(start) });
                }
                Some(start) => {
                    segments.push(Segment { logical: at, len, place: Place::Mapped(start) });
                }
                None => self.claim_hole(inode, at, len, segments)?,
            }
            at += len;
        }
        Ok(())
    }

    /// Claims places for the delayed blocks of a hole.
    fn claim_hole(
        &self,
        inode: &Inode,
        logical: u32,
        len: u32,
        segments: &mut Vec<Segment>,
    ) -> Result<()> {
        let (mut at, end) = (logical, logical + len);
        let mut goal = None;
        while at < end {
            let (next, delayed_end) = {
                let delayed = inode.data.delayed.lock();
                let Some(next) = delayed.next(at).filter(|next| *next < end) else { return Ok(()) };
                (next, delayed.end_of(next).unwrap_or(next + 1))
            };
            let count = (delayed_end.min(end) - next).min(MAX_WRITTEN_LEN);
            let near = match goal {
                Some(goal) => goal,
                None => self.goal_after(inode, next, segments)?,
            };
            let claim = self.claim(near, count)?;
            self.unreserve(u64::from(claim.len));
            goal = Some(claim.start + u64::from(claim.len));
            at = next + claim.len;
            segments.push(Segment { logical: next, len: claim.len, place: Place::Claimed(claim) });
        }
        Ok(())
    }

    /// Where to look for blocks: behind the segment before, else where the mapping says.
    fn goal_after(&self, inode: &Inode, logical: u32, segments: &[Segment]) -> Result<FsBlock> {
        match segments.last() {
            Some(last) if last.logical + last.len == logical => {
                Ok(last.start() + u64::from(last.len))
            }
            _ => self.map_goal(inode, logical),
        }
    }

    /// Writes the data of all segments; those that fail are taken out.
    fn write_segments(&self, inode: &Inode, batch: &mut Batch, first_error: &mut Option<Error>) {
        let Batch { pages, segments, failed, bios, set, .. } = batch;
        self.queue_data(set, pages, segments, bios, failed);
        self.submit_data(bios, failed);
        let mut statuses = failed.drain(..);
        self.drop_failed(inode, pages, segments, || statuses.next().flatten(), first_error);
    }

    /// Adds the writes of segments to `bios`, and a place for each segment's result to `failed`;
    /// submits what fills a batch. A segment that begins where the last bio ends goes on in that
    /// bio, so that neighbours on the disk are one request, of whatever file they are.
    pub(crate) fn queue_data(
        &self,
        set: &BioSet,
        pages: &[Page],
        segments: &[Segment],
        bios: &mut Vec<Bio>,
        failed: &mut Vec<Option<BlkStatus>>,
    ) {
        for segment in segments {
            let index = failed.len() as u64;
            failed.push(None);
            let mut skip = 0;
            while skip < segment.len {
                let sector = self.sector_of(segment.start() + u64::from(skip));
                let goes_on = bios.last().is_some_and(|last| {
                    last.end_sector() == sector && last.vecs().len() < BIO_PAGES
                });
                if !goes_on {
                    if bios.len() == BATCH_BIOS {
                        self.submit_data(bios, failed);
                    }
                    let mut bio = set.alloc(BioOp::Write, BioFlags::empty(), sector);
                    bio.set_private(index);
                    bios.push(bio);
                }
                if let Some(bio) = bios.last_mut() {
                    skip += self.add_data(bio, pages, segment, skip);
                    // At most as many segments as a batch has blocks.
                    bio.set_private(bio.private() & 0xffff_ffff | index << 32);
                }
            }
        }
    }

    /// Takes out the segments whose write failed; `status_of_next` tells of each in turn.
    pub(crate) fn drop_failed(
        &self,
        inode: &Inode,
        pages: &mut [Page],
        segments: &mut Vec<Segment>,
        mut status_of_next: impl FnMut() -> Option<BlkStatus>,
        first_error: &mut Option<Error>,
    ) {
        segments.retain(|segment| {
            let Some(status) = status_of_next() else { return true };
            let error = Error::from(status);
            log::error!(
                "{}: inode {}: writing {} blocks at block {} failed: {error}",
                self.name,
                inode.ino,
                segment.len,
                segment.start()
            );
            self.fail(pages, segment.logical, segment.logical + segment.len, &error);
            self.data_write_failed(status);
            first_error.get_or_insert(error);
            // Before the claim goes with the segment.
            if let Place::Claimed(claim) = &segment.place {
                self.reserve_again(u64::from(claim.len));
            }
            false
        });
    }

    /// Writes data and waits; notes which segments failed.
    pub(crate) fn submit_data(&self, bios: &mut Vec<Bio>, failed: &mut [Option<BlkStatus>]) {
        if bios.is_empty() {
            return;
        }
        self.buffers.device().submit_batch_wait(bios);
        for bio in bios.drain(..) {
            let Err(status) = bio.status() else { continue };
            // The first and the last of its segments, from `queue_data`.
            let (first, last) = (bio.private() & 0xffff_ffff, bio.private() >> 32);
            for of_segment in &mut failed[first as usize..=last as usize] {
                of_segment.get_or_insert(status);
            }
        }
    }

    /// Adds a segment's memory from its `skip`th block on to a write, the pages' own; how many
    /// blocks went in.
    fn add_data(&self, bio: &mut Bio, pages: &[Page], segment: &Segment, skip: u32) -> u32 {
        let block_size = u64::from(self.block_size());
        // Without a journal a freed block of metadata is free at once.
        let place = segment.start().0;
        self.buffers.wait_for_forgotten(place + u64::from(skip)..place + u64::from(segment.len));
        let start = u64::from(segment.logical + skip) * block_size;
        let end = u64::from(segment.logical + segment.len) * block_size;
        let (mut offset, first) = (start, start / PAGE);
        let mut at = pages.partition_point(|page| page.guard.folio().index() < first);
        while offset < end && bio.vecs().len() < BIO_PAGES {
            // A segment is made of dirty blocks of locked pages, which follow each other.
            let in_page = offset % PAGE;
            let len = (end - offset).min(PAGE - in_page);
            bio.add_vec(pages[at].guard.bvec(in_page as usize, len as usize));
            offset += len;
            at += 1;
        }
        // No more than the segment's own blocks.
        ((offset - start) / block_size) as u32
    }

    /// A segment that is not mapped: its blocks are delayed again, with their reservation.
    pub(crate) fn give_up(&self, segment: Segment) {
        if let Place::Claimed(claim) = segment.place {
            self.reserve_again(u64::from(claim.len));
            drop(claim);
        }
    }

    /// Notes a failure in the pages of a range of blocks.
    pub(crate) fn fail(&self, pages: &mut [Page], from: u32, end: u32, error: &Error) {
        let block_size = u64::from(self.block_size());
        let range =
            u64::from(from) * block_size / PAGE..(u64::from(end) * block_size).div_ceil(PAGE);
        for page in pages.iter_mut().filter(|page| range.contains(&page.guard.folio().index())) {
            page.error.get_or_insert(as_writeback_error(error));
        }
    }

    /// Maps segments whose data was written; `group` is empty, before and after.
    pub(crate) fn map_segments(
        &self,
        inode: &Inode,
        pages: &mut [Page],
        segments: &mut Vec<Segment>,
        group: &mut Vec<Segment>,
        size: u64,
        first_error: &mut Option<Error>,
    ) {
        segments.retain(|segment| !matches!(segment.place, Place::Mapped(_)));
        segments.reverse();
        while !segments.is_empty() {
            let (count, credits) = self.group_of_segments(inode, segments);
            group.extend(segments.drain(segments.len() - count..));
            if let Err(error) = self.map_group(inode, group, size, credits) {
                // What the group still holds was not mapped.
                for segment in group.drain(..) {
                    self.fail(pages, segment.logical, segment.logical + segment.len, &error);
                    self.give_up(segment);
                }
                first_error.get_or_insert(error);
            }
        }
    }

    /// How many segments from the end of the vector go under one handle, and its credits.
    fn group_of_segments(&self, inode: &Inode, pending: &[Segment]) -> (usize, u32) {
        let is_extents = inode.core.lock().is_extents();
        let most = self.journal.max_credits() / 2;
        let (mut count, mut credits) = (0, credits::SETATTR);
        for segment in pending.iter().rev().take(SEGMENTS_PER_HANDLE) {
            let end = segment.logical.saturating_add(segment.len);
            // A long run needs one insertion in a tree, but many pointer blocks in a block map.
            let pointers = if is_extents {
                0
            } else {
                indirect::nodes_needed(segment.logical, end, self.block_size())
            };
            let more = credits::CONVERT + u32::try_from(pointers).unwrap_or(u32::MAX / 2);
            if count > 0 && credits + more > most {
                break;
            }
            (count, credits) = (count + 1, credits + more);
        }
        (count, credits)
    }

    /// Maps segments, last of the vector first, under one handle. Those left in it after an error
    /// were not mapped.
    fn map_group(
        &self,
        inode: &Inode,
        group: &mut Vec<Segment>,
        size: u64,
        credits: u32,
    ) -> Result<()> {
        let handle = self.start(credits)?;
        let mapped = self.map_under(&handle, inode, group, size);
        // Also after an error: what was mapped before it must reach the inode.
        let marked = self.mark_inode_dirty(&handle, inode);
        mapped.and(marked)
    }

    /// Maps segments, last of the vector first; `disk_size` follows each, up to `size`.
    pub(crate) fn map_under(
        &self,
        handle: &Handle,
        inode: &Inode,
        group: &mut Vec<Segment>,
        size: u64,
    ) -> Result<()> {
        let _map = inode.map.write();
        while let Some(segment) = group.pop() {
            let (logical, len) = (segment.logical, segment.len);
            match segment.place {
                Place::Mapped(_) => {}
                Place::Unwritten(start) => {
                    let reserved = inode.data.delayed.lock().nodes();
                    let io = FsMapIo::writer(self, inode, handle, reserved);
                    let written = map_written(&io, inode, logical, len);
                    let done = if written.is_ok() { logical + len } else { logical };
                    self.settle_delayed(inode, logical, done, reserved - io.reserved_left());
                    if let Err(error) = written {
                        group.push(Segment { logical, len, place: Place::Unwritten(start) });
                        return Err(error);
                    }
                }
                Place::Claimed(claim) => self.map_claim(handle, inode, logical, claim, group)?,
            }
            let end = u64::from(logical + len) * u64::from(self.block_size());
            let mut core = inode.core.lock();
            if !mutant!("size-in-another-handle") {
                core.disk_size = core.disk_size.max(end.min(size));
            }
        }
        Ok(())
    }

    fn map_claim(
        &self,
        handle: &Handle,
        inode: &Inode,
        logical: u32,
        claim: Claim,
        group: &mut Vec<Segment>,
    ) -> Result<()> {
        let len = claim.len;
        // When it fails the blocks are free again, so the reservation comes first.
        self.reserve_again(u64::from(len));
        let used = self.mark_used(handle, claim);
        let (start, len) = match used {
            Ok(run) => run,
            Err(error) => {
                let place = Place::Mapped(FsBlock(0));
                group.push(Segment { logical, len, place });
                return Err(error);
            }
        };
        let reserved = inode.data.delayed.lock().nodes();
        let io = FsMapIo::writer(self, inode, handle, reserved);
        let mapped = map_run(&io, inode, logical, start, len);
        let used = reserved - io.reserved_left();
        match mapped {
            Ok(()) => {
                self.unreserve(u64::from(len));
                self.settle_delayed(inode, logical, logical + len, used);
                Ok(())
            }
            Err(error) => {
                self.settle_delayed(inode, logical, logical, used);
                self.free_blocks(handle, start, len, false)?;
                let place = Place::Mapped(FsBlock(0));
                group.push(Segment { logical, len, place });
                Err(error)
            }
        }
    }

    /// Lets `disk_size` follow to the end of what this batch wrote.
    fn follow_size(&self, inode: &Inode, pages: &[Page], size: u64) -> Result<()> {
        let Some(end) = end_of_pages(pages, size) else { return Ok(()) };
        if inode.core.lock().disk_size >= end {
            return Ok(());
        }
        let handle = self.start(credits::SETATTR)?;
        inode.core.lock().disk_size = end;
        self.mark_inode_dirty(&handle, inode)
    }
}

/// Where the last page without an error ends, in a file of that size.
fn end_of_pages(pages: &[Page], size: u64) -> Option<u64> {
    let done = pages.iter().rev().find(|page| page.error.is_none())?;
    Some(size.min((done.guard.folio().index() + 1) * PAGE))
}
