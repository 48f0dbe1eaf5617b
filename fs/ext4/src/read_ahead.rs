//! Reading what nobody has asked for yet: the next pages of a file, and the small files that were
//! listed behind one.
//!
//! Errors show when a page is really read, and nothing waits here for a page or an inode that
//! somebody else has. What waits for the disk is to learn where files lie, when that stands in
//! blocks of their own that are not in memory: once for all of them.
//!
//! Locks: `Inode::rwsem` of other files only when it is free, while that of the file that is read
//! is held shared; pages only when they are free, and until their bios have ended.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uext_blockdev::{Bio, BioFlags, Plug};
use uext_ondisk::InodeNumber;
use uext_vfs::FileKind;

use crate::error::Result;
use crate::file::{Fill, PAGE, unpack};
use crate::fs::Ext4;
use crate::inode::Inode;

/// Pages that are read ahead together: a reader waits for all of them.
const AHEAD_PAGES: u64 = 256;
/// A file of more pages is not read because of its neighbours.
const MOST_FILE_PAGES: u64 = 16;
/// Most pages of neighbours that are read in one go.
const MOST_LISTED_PAGES: u64 = 128;

impl Ext4 {
    /// Reads pages ahead of a sequential reader.
    pub(crate) fn read_ahead(&self, inode: &Arc<Inode>, range: Range<u64>) {
        for from in range.clone().step_by(AHEAD_PAGES as usize) {
            let piece = from..range.end.min(from + AHEAD_PAGES);
            let bios = self.bios_ahead(inode, piece);
            if !bios.is_empty() {
                self.buffers.device().submit_bios(bios);
            }
        }
    }

    /// A file is read from its beginning, which was `missing` in the cache or not: reads the files
    /// ahead that are likely to be next.
    pub(crate) fn read_listed_ahead(&self, inode: &Inode, missing: bool) {
        let ahead = &inode.data.read_with_others;
        // WHY-RELAXED: told twice, or not, it costs or saves a read.
        let was_ahead = ahead.load(Ordering::Relaxed) && ahead.swap(false, Ordering::Relaxed);
        if !missing && !was_ahead {
            return;
        }
        self.read_files_ahead(&self.listings.on_read(inode.ino, was_ahead));
    }

    /// A listing goes on, so that the inodes of what was listed before are in memory.
    pub(crate) fn read_listed_on(&self) {
        self.read_files_ahead(&self.listings.go_on());
    }

    fn read_files_ahead(&self, files: &[InodeNumber]) {
        if files.is_empty() {
            return;
        }
        let mut left = MOST_LISTED_PAGES.min(self.cache.readahead().max_pages());
        let wanted = |number: &InodeNumber| {
            let other = self.inodes.find(*number)?;
            let is_small = other.kind == FileKind::Regular && pages_of(&other) <= MOST_FILE_PAGES;
            (is_small && other.mapping.nr_pages() == 0).then_some(other)
        };
        // All that says where they lie first, so that it is waited for once. Who frees such a
        // block reads it before, and so waits for what has begun here.
        for other in files.iter().filter_map(wanted) {
            let Some(_shared) = other.rwsem.try_read() else { continue };
            for node in self.map_nodes(&other) {
                self.buffers.readahead(node.0, 1);
            }
        }
        let mut plug = Plug::new(&**self.buffers.device());
        for (at, number) in files.iter().enumerate() {
            let Some(other) = wanted(number) else { continue };
            let Some(_shared) = other.rwsem.try_read() else { continue };
            // It may have grown since it was looked at.
            let pages = pages_of(&other).min(MOST_FILE_PAGES);
            if pages > left {
                self.listings.left_over(files.len() - at);
                break;
            }
            left -= pages;
            // WHY-RELAXED: told twice, or not, it costs or saves a read.
            other.data.read_with_others.store(true, Ordering::Relaxed);
            self.bios_ahead(&other, 0..pages).into_iter().for_each(|bio| plug.submit_bio(bio));
        }
        plug.finish();
    }

    /// The bios that fill those pages of a range that are not cached; their pages stay locked
    /// until the last of them has ended.
    fn bios_ahead(&self, inode: &Arc<Inode>, pages: Range<u64>) -> Vec<Bio> {
        self.plan_ahead(inode, pages).unwrap_or_else(|error| {
            log::debug!("{}: inode {}: readahead: {error}", self.name, inode.ino);
            Vec::new()
        })
    }

    fn plan_ahead(&self, inode: &Arc<Inode>, pages: Range<u64>) -> Result<Vec<Bio>> {
        let (_cached, made) = self.make_pages(inode, pages)?;
        made.iter().for_each(|folio| folio.set_readahead());
        let (fills, mut bios) = self.plan_fill(inode, &made, BioFlags::RAHEAD)?;
        let shared = Arc::new(Batch::new(fills, bios.len()));
        for bio in &mut bios {
            let shared = shared.clone();
            bio.set_end_io(move |bio| shared.end(&bio));
        }
        Ok(bios)
    }
}

fn pages_of(inode: &Inode) -> u64 {
    inode.size().div_ceil(PAGE)
}

/// Pages read ahead, locked until the last bio of the batch has ended.
struct Batch(uext_sync::Mutex<(Vec<Fill>, usize)>);

impl Batch {
    fn new(mut fills: Vec<Fill>, bios: usize) -> Self {
        if bios == 0 {
            fills.drain(..).for_each(|fill| fill.guard.set_uptodate());
        }
        Self(uext_sync::Mutex::new((fills, bios)))
    }

    fn end(&self, bio: &Bio) {
        let mut batch = self.0.lock();
        let (fills, pending) = &mut *batch;
        if bio.status().is_err() {
            let (first, count) = unpack(bio.private());
            fills[first..first + count].iter_mut().for_each(|fill| fill.failed = true);
        }
        *pending -= 1;
        if *pending == 0 {
            for fill in fills.drain(..).filter(|fill| !fill.failed) {
                fill.guard.set_uptodate();
            }
        }
    }
}
