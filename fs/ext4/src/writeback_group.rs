//! Writing many small files together.
//!
//! One file at a time costs a wait for the disk each. Here the data of many files goes down
//! with one batch of bios, and since neighbours get neighbouring blocks, with few requests,
//! which they share; then each file is mapped as [`crate::writeback`] maps one, its size in the
//! handle that maps its blocks. What holds for one file holds here: a transaction refers only to
//! data that has been written. Files whose common request failed are written again one by one,
//! so that a bad spot costs the file that lies there and no other.
//!
//! Only a sync does this: it needs memory for the list of files, which the flusher, who
//! writes when there is none, must do without.
//!
//! Locks: a batch, then `Inode::writeback` of every file by trying only, so that no order of
//! files matters, then their pages. A file whose lock is taken is left to the caller. Holding
//! pages of one file while waiting for those of another is safe: whoever has a page
//! exclusively waits for the disk, not for pages of another file.

use std::ops::Range;
use std::sync::Arc;

use uext_blockdev::{BlkStatus, mutant};
use uext_sync::MutexGuard;

use crate::batch::{BATCH_PAGES, Batch, Page};
use crate::error::{Error, Result};
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::writeback::Segment;

/// Files written together.
const GROUP_FILES: usize = 256;
/// Most dirty pages of a file that is small.
const SMALL_PAGES: usize = 64;

/// A file of the group, its dirty pages locked.
struct File<'a> {
    inode: &'a Inode,
    _writeback: MutexGuard<'a, ()>,
    size: u64,
    pages: Vec<Page>,
    segments: Vec<Segment>,
    /// Where the results of its segments are.
    results: Range<usize>,
    /// The first failure.
    error: Option<Error>,
}

impl Ext4 {
    /// Writes and maps the dirty data of small files among these, many at a time. What is
    /// left, because a file is large or busy, is for the caller.
    ///
    /// # Errors
    /// The first failure; all were tried. It is in the file's `errseq` too.
    pub(crate) fn write_small_files(&self, inodes: &[Arc<Inode>]) -> Result<()> {
        let mut first_error = None;
        let mut rest = inodes.iter();
        loop {
            let mut batch = self.batches.take();
            batch.clear();
            let (mut files, mut pages) = (Vec::new(), 0);
            while files.len() < GROUP_FILES && pages + SMALL_PAGES <= BATCH_PAGES {
                let Some(inode) = rest.next() else { break };
                if let Some(file) = self.begin_small(inode, &mut batch) {
                    pages += file.pages.len();
                    files.push(file);
                }
            }
            if files.is_empty() {
                return first_error.map_or(Ok(()), Err);
            }
            self.write_group(&mut files, &mut batch, &mut first_error);
            batch.clear();
        }
    }

    /// Locks the dirty pages of a small file and finds places for them.
    fn begin_small<'a>(&self, inode: &'a Inode, batch: &mut Batch) -> Option<File<'a>> {
        // What the mutant breaks is written out file by file.
        let single = self.journals_data(inode) || mutant!("mapping-before-data");
        if single || !inode.mapping.has_dirty() {
            return None;
        }
        let writeback = inode.writeback.try_lock()?;
        let Batch { folios, runs, .. } = batch;
        folios.clear();
        runs.clear();
        inode.mapping.dirty_folios_into(0..u64::MAX, SMALL_PAGES + 1, folios);
        if folios.len() > SMALL_PAGES {
            return None;
        }
        let mut pages: Vec<Page> = folios
            .drain(..)
            .map(|folio| Page { guard: folio.begin_writeback(), error: None })
            .filter(|page| page.guard.dirty() != 0)
            .collect();
        if pages.is_empty() {
            return None;
        }
        // Read while the pages are locked: what they hold is no shorter than this.
        let size = inode.size();
        let mut segments = Vec::new();
        let mut error = None;
        self.plan_pages(inode, &mut pages, runs, &mut segments, size, &mut error);
        Some(File { inode, _writeback: writeback, size, pages, segments, results: 0..0, error })
    }

    fn write_group(
        &self,
        files: &mut [File<'_>],
        batch: &mut Batch,
        first_error: &mut Option<Error>,
    ) {
        let Batch { bios, set, failed, group, .. } = batch;
        for file in files.iter_mut() {
            let from = failed.len();
            self.queue_data(set, &file.pages, &file.segments, bios, failed);
            file.results = from..failed.len();
        }
        self.submit_data(bios, failed);
        let has_failed = |failed: &[Option<BlkStatus>], results: &Range<usize>| {
            failed[results.clone()].iter().any(Option::is_some)
        };
        let suspects = files.iter().filter(|file| has_failed(failed, &file.results)).count();
        for file in files {
            let File { inode, pages, segments, size, results, error, .. } = file;
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
