//! Writing many small files together.
//!
//! One file at a time costs a wait for the disk each. Here the data of many files goes down
//! with one batch of bios, and since neighbours get neighbouring blocks, with few requests,
//! which they share; then each file is mapped as [`crate::writeback`] maps one, its size in the
//! handle that maps its blocks. What holds for one file holds here: a transaction refers only to
//! data that has been written. Files whose common request failed are written again one by one,
//! so that a bad spot costs the file that lies there and no other.
//!
//! Like all of writeback it needs no memory: what is of each file lies in the arrays of the batch.
//!
//! Locks: a batch, then `Inode::writeback` of every file by trying only, so that no order of
//! files matters, then their pages. A file whose lock is taken is left to the caller. Holding
//! pages of one file while waiting for those of another is safe: whoever has a page
//! exclusively waits for the disk, not for pages of another file.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use uext_blockdev::{BlkStatus, mutant};
use uext_ondisk::InodeNumber;
use uext_pagecache::{AddressSpace, MOST_TOGETHER};
use uext_sync::MutexGuard;

use crate::batch::{BATCH_PAGES, Batch, Page};
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;

/// Files written together: all that the flusher offers.
const GROUP_FILES: usize = MOST_TOGETHER;
/// Most dirty pages of a file that is small.
const SMALL_PAGES: usize = 64;

/// A file of the group, its dirty pages locked.
struct File<'a> {
    inode: &'a Inode,
    _writeback: MutexGuard<'a, ()>,
    size: u64,
    /// Which of the pages, segments and results of all files are its own.
    pages: Range<usize>,
    segments: Range<usize>,
    results: Range<usize>,
    /// The first failure.
    error: Option<Error>,
}

type Files<'a> = SmallVec<[File<'a>; GROUP_FILES]>;

impl Ext4 {
    /// Writes and maps the dirty data of small files among these, many at a time. What is
    /// left, because a file is large or busy, is for the caller.
    ///
    /// # Errors
    /// One of the failures; all were tried. It is in the file's `errseq` too.
    pub(crate) fn write_small_files(&self, inodes: &[Arc<Inode>]) -> Result<()> {
        let mut first_error = None;
        let mut rest = inodes.iter();
        loop {
            let mut batch = self.batches.take();
            batch.clear();
            let mut files = Files::new();
            while files.len() < GROUP_FILES && batch.all_pages.len() + SMALL_PAGES <= BATCH_PAGES {
                let Some(inode) = rest.next() else { break };
                files.extend(self.begin_small(inode, &mut batch));
            }
            if files.is_empty() {
                return first_error.map_or(Ok(()), Err);
            }
            self.write_group(files, &mut batch, &mut first_error);
            batch.clear();
        }
    }

    /// [`Ext4::write_small_files`] of the files that these pages are of, without memory when they
    /// are no more than [`GROUP_FILES`].
    pub(crate) fn write_small_mappings(
        &self,
        mappings: &mut dyn Iterator<Item = &Arc<AddressSpace>>,
    ) -> Result<()> {
        let find = |mapping: &Arc<AddressSpace>| {
            let ino = InodeNumber(u32::try_from(mapping.id()).ok()?);
            self.inodes.find(ino).filter(|inode| Arc::ptr_eq(&inode.mapping, mapping))
        };
        let inodes: SmallVec<[Arc<Inode>; GROUP_FILES]> = mappings.filter_map(find).collect();
        self.write_small_files(&inodes)
    }

    /// Locks the dirty pages of a small file and finds places for them.
    fn begin_small<'a>(&self, inode: &'a Inode, batch: &mut Batch) -> Option<File<'a>> {
        // What the mutant breaks is written out file by file.
        let single = self.journals_data(inode) || mutant!("mapping-before-data");
        if single || !inode.mapping.has_dirty() {
            return None;
        }
        let writeback = inode.writeback.try_lock()?;
        let Batch { folios, runs, pages, segments, all_pages, all_segments, .. } = batch;
        folios.clear();
        runs.clear();
        inode.mapping.dirty_folios_into(0..u64::MAX, SMALL_PAGES + 1, folios);
        if folios.len() > SMALL_PAGES {
            return None;
        }
        let begun = folios.drain(..).map(|folio| folio.begin_writeback());
        let dirty = begun.filter(|guard| guard.dirty() != 0);
        pages.extend(dirty.map(|guard| Page { guard, error: None }));
        if pages.is_empty() {
            return None;
        }
        // Read while the pages are locked: what they hold is no shorter than this.
        let size = inode.size();
        let mut error = None;
        self.plan_pages(inode, pages, runs, segments, size, &mut error);
        let pages = moved(pages, all_pages);
        let segments = moved(segments, all_segments);
        Some(File { inode, _writeback: writeback, size, pages, segments, results: 0..0, error })
    }

    fn write_group(
        &self,
        mut files: Files<'_>,
        batch: &mut Batch,
        first_error: &mut Option<Error>,
    ) {
        let Batch { bios, set, failed, group, pages, segments, all_pages, all_segments, .. } =
            batch;
        for file in &mut files {
            let from = failed.len();
            let (pages, segments) = (file.pages.clone(), file.segments.clone());
            self.queue_data(set, &all_pages[pages], &all_segments[segments], bios, failed);
            file.results = from..failed.len();
        }
        self.submit_data(bios, failed);
        let has_failed = |failed: &[Option<BlkStatus>], results: &Range<usize>| {
            failed[results.clone()].iter().any(Option::is_some)
        };
        let suspects = files.iter().filter(|file| has_failed(failed, &file.results)).count();
        // From the last on, so that what is left of the arrays is that of the others.
        while let Some(mut file) = files.pop() {
            let File {
                inode, size, error, results, pages: of_pages, segments: of_segments, ..
            } = &mut file;
            pages.extend(all_pages.drain(of_pages.start..));
            segments.extend(all_segments.drain(of_segments.start..));
            if suspects > 1 && has_failed(failed, results) {
                // It may have shared the request of the one whose fault it is.
                let from = failed.len();
                self.queue_data(set, pages, segments, bios, failed);
                self.submit_data(bios, failed);
                *results = from..failed.len();
            }
            let mut statuses = failed[results.clone()].iter().copied();
            self.drop_failed(inode, pages, segments, || statuses.next().flatten(), error);
            self.map_segments(inode, pages, segments, group, *size, error);
            self.finish_pages(inode, pages, *size, error);
            if let Some(error) = error.take() {
                self.report(Some(inode.ino), &error);
                first_error.get_or_insert(error);
            }
        }
    }
}

/// Moves all there is to the end of `all`; where it lies there.
fn moved<T>(some: &mut Vec<T>, all: &mut Vec<T>) -> Range<usize> {
    let start = all.len();
    all.append(some);
    start..all.len()
}
