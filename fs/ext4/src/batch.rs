//! What one batch of writeback works with.
//!
//! A [`Batch`] has room for all that a batch can hold, and bios with arrays of their own, from the
//! mount on: writing and mapping dirty pages needs no memory, however little is left. There is a
//! fixed number of them; who wants one more waits.
//!
//! Locks: `Inode::writeback` is held while a batch is waited for and used. Whoever has one waits for
//! handles and pages, never for another batch, so all of them come back.

use std::sync::Arc;

use uext_blockdev::{Bio, BioSet, BlkStatus, Mempool};
use uext_pagecache::{Folio, PAGE_SIZE, WritebackError, WritebackGuard};

use crate::writeback::{Run, SEGMENTS_PER_HANDLE, Segment};

/// Pages written together: enough for long extents and a busy disk.
pub(crate) const BATCH_PAGES: usize = 2048;
/// Bios submitted together.
pub(crate) const BATCH_BIOS: usize = 64;
/// Most pages of one bio.
pub(crate) const BIO_PAGES: usize = 256;
/// Batches of a filesystem.
const BATCHES: usize = 4;

/// A locked page and how its write went.
pub(crate) struct Page {
    pub guard: WritebackGuard,
    pub error: Option<WritebackError>,
}

/// The arrays of a batch; empty between two.
pub(crate) struct Batch {
    pub folios: Vec<Arc<Folio>>,
    pub pages: Vec<Page>,
    pub runs: Vec<Run>,
    pub segments: Vec<Segment>,
    /// Segments that one handle maps.
    pub group: Vec<Segment>,
    /// How the write of each segment failed.
    pub failed: Vec<Option<BlkStatus>>,
    pub bios: Vec<Bio>,
    pub set: BioSet,
    /// Pages and segments of all files that are written together; those above are of one.
    pub all_pages: Vec<Page>,
    pub all_segments: Vec<Segment>,
}

/// The batches of a filesystem.
pub(crate) type Batches = Mempool<Box<Batch>>;

impl Batch {
    /// All that a filesystem with blocks of this size has.
    pub fn pool(block_size: u32) -> Batches {
        Mempool::reserve_only(BATCHES, || Box::new(Self::new(block_size)))
    }

    fn new(block_size: u32) -> Self {
        // At worst every block of every page is a segment.
        let blocks = BATCH_PAGES * (PAGE_SIZE / block_size as usize).max(1);
        Self {
            folios: Vec::with_capacity(BATCH_PAGES),
            pages: Vec::with_capacity(BATCH_PAGES),
            runs: Vec::with_capacity(blocks),
            segments: Vec::with_capacity(blocks),
            group: Vec::with_capacity(SEGMENTS_PER_HANDLE),
            failed: Vec::with_capacity(blocks),
            bios: Vec::with_capacity(BATCH_BIOS),
            set: BioSet::reserve_only(BATCH_BIOS, BIO_PAGES),
            all_pages: Vec::with_capacity(BATCH_PAGES),
            all_segments: Vec::with_capacity(blocks),
        }
    }

    /// Empties what a batch that ended badly has left.
    pub fn clear(&mut self) {
        self.folios.clear();
        self.pages.clear();
        self.runs.clear();
        self.segments.clear();
        self.group.clear();
        self.failed.clear();
        self.bios.clear();
        self.all_pages.clear();
        self.all_segments.clear();
    }
}
