//! File data through the journal: `data=journal`, and files with the `j` flag.
//!
//! The contents of dirty pages are copied into buffers of the blocks they belong to, under
//! the handle that maps these blocks. From there they are metadata like any other: the
//! commit writes them into the log, a page that is written again meanwhile is copied into
//! the same buffer, which freezes what the commit still needs, and a checkpoint brings
//! them home. Nothing is written to the blocks themselves before.
//!
//! write(2) does this before it returns ([`Ext4::journal_range`]), so the contents of all
//! journalled files after a crash are those of one moment, as names and sizes are.
//! Writeback takes the same way with what is dirty for another reason: a zeroed tail, or
//! pages whose write failed.
//!
//! Invariants:
//! - A handle takes whole blocks, and a run of at most [`MAX_BLOCKS_PER_HANDLE`]: what
//!   reaches the disk of a larger write is a whole number of these pieces.
//! - While the journal holds a block's buffer, that buffer is newer than the disk: who fills
//!   a page of such a file copies from it ([`Ext4::copy_logged`]).
//! - Blocks of such a file are revoked when they are freed.
//! - Whether a file's data is journalled changes only while none of its blocks is in the log
//!   ([`Ext4::set_journal_data`]).
//!
//! Locks: as in [`crate::writeback`]; a buffer's content lock within the handle.

use std::ops::Range;
use std::sync::Arc;

use uext_blockdev::{Bio, BioFlags, BioOp, mutant};
use uext_jbd2::Handle;
use uext_ondisk::FsBlock;
use uext_ondisk::inode::InodeFlags;
use uext_ondisk::superblock::{DefaultMountOpts, Superblock};
use uext_pagecache::PAGE_SIZE;
use uext_vfs::FileKind;

use crate::batch::Page;
use crate::credits;
use crate::error::{Error, Result};
use crate::file::PAGE;
use crate::fs::Ext4;
use crate::gate::MountError;
use crate::indirect;
use crate::inode::Inode;
use crate::options::{DataMode, MountOptions};
use crate::writeback::{Place, Segment};

/// Most blocks of data under one handle: larger ones keep others waiting at a commit.
const MAX_BLOCKS_PER_HANDLE: u32 = 1024;

/// A long run is not cut for less than this at the end of a handle.
const SMALLEST_PIECE: u32 = 16;

/// Blocks of data that go under one handle, and where each run lies.
struct Group {
    /// To be mapped, last one first.
    segments: Vec<Segment>,
    /// (first block of the file, where it lies, blocks), in order.
    runs: Vec<(u32, FsBlock, u32)>,
    credits: u32,
}

/// Refuses `data=` where nothing can keep what it promises.
pub(crate) fn check_mode(
    options: &MountOptions,
    sb: &Superblock,
    read_only: bool,
) -> std::result::Result<(), MountError> {
    if options.data_mode.is_some() && !sb.features().has_journal() && !read_only {
        return Err(MountError::Options("data= needs a journal: mount without it"));
    }
    Ok(())
}

/// What was asked for, or what the superblock says (`tune2fs -o journal_data` and the like).
pub(crate) fn data_mode(options: &MountOptions, sb: &Superblock) -> DataMode {
    options.data_mode.unwrap_or(match sb.default_mount_opts() & DefaultMountOpts::JMODE_WBACK {
        DefaultMountOpts::JMODE_DATA => DataMode::Journal,
        DefaultMountOpts::JMODE_WBACK => DataMode::Writeback,
        _ => DataMode::Ordered,
    })
}

impl Ext4 {
    /// Whether a file's data goes through the journal.
    pub(crate) fn journals_data(&self, inode: &Inode) -> bool {
        inode.kind == FileKind::Regular
            && self.journal.has_journal()
            && (self.data_mode == DataMode::Journal
                || inode.core.lock().flags.contains(InodeFlags::JOURNAL_DATA))
    }

    /// Whether an inode's blocks go through the journal, so that freeing them revokes them:
    /// those of directories and long symbolic links do, and of files as above.
    pub(crate) fn is_logged(&self, inode: &Inode) -> bool {
        inode.kind != FileKind::Regular || self.journals_data(inode)
    }

    /// Puts what is dirty of a byte range into the running transaction. The caller holds
    /// `Inode::rwsem` exclusively.
    ///
    /// # Errors
    /// `EROFS` after an abort; the pages stay dirty.
    pub(crate) fn journal_range(&self, inode: &Inode, range: Range<u64>) -> Result<()> {
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        self.write_pages(inode, &inode.mapping, pages, u64::MAX).map(|_| ())
    }

    /// Sets or clears the `j` flag (`EXT4_JOURNAL_DATA_FL`). The caller holds `Inode::rwsem`
    /// exclusively and has checked that it may.
    ///
    /// # Errors
    /// How writing the file's data or the checkpoint failed: then the flag is as before.
    pub(crate) fn set_journal_data(&self, inode: &Arc<Inode>, on: bool) -> Result<()> {
        if inode.core.lock().flags.contains(InodeFlags::JOURNAL_DATA) == on {
            return Ok(());
        }
        self.flush_data(inode)?;
        // From here on no writeback of the file runs; what it has in the log goes home.
        let _writeback = inode.writeback.lock();
        self.journal.checkpoint_all()?;
        let handle = self.start(credits::SETATTR)?;
        {
            let mut core = inode.core.lock();
            core.flags.set(InodeFlags::JOURNAL_DATA, on);
            core.ctime = self.now();
        }
        self.mark_inode_dirty(&handle, inode)
    }

    /// Copies a block that the journal has newer than the disk; whether there was one.
    pub(crate) fn copy_logged(&self, block: FsBlock, bytes: &mut [u8]) -> bool {
        let Some(buffer) = self.buffers.find(block.0) else { return false };
        let contents = buffer.read();
        // One that came home after this was looked at is on the disk for the read that follows.
        if !buffer.journal().is_pinned() || !buffer.is_uptodate() {
            return false;
        }
        bytes.copy_from_slice(&contents);
        true
    }

    /// Maps the segments and puts their data into the journal, as many handles as it takes.
    pub(crate) fn journal_segments(
        &self,
        inode: &Inode,
        pages: &mut [Page],
        mut segments: Vec<Segment>,
        size: u64,
        first_error: &mut Option<Error>,
    ) {
        segments.reverse();
        while !segments.is_empty() {
            let mut group = self.next_group(inode, &mut segments);
            let Err(error) = self.journal_group(inode, pages, &mut group, size) else { continue };
            for (logical, _, len) in group.runs {
                self.fail(pages, logical, logical + len, &error);
            }
            group.segments.into_iter().for_each(|segment| self.give_up(segment));
            first_error.get_or_insert(error);
        }
    }

    /// Takes from the end of the vector what fits one handle; a segment that is longer is cut.
    fn next_group(&self, inode: &Inode, segments: &mut Vec<Segment>) -> Group {
        let is_extents = inode.core.lock().is_extents();
        let room = self.journal.max_credits() / 2;
        let mut group = Group { segments: Vec::new(), runs: Vec::new(), credits: credits::SETATTR };
        let mut blocks = 0;
        while let Some(segment) = segments.pop() {
            let most = (MAX_BLOCKS_PER_HANDLE - blocks).min(segment.len);
            let (len, credits) = self.fitting(&segment, most, is_extents, room, group.credits);
            // One block always goes, so that there is an end.
            if blocks > 0 && len < segment.len.min(SMALLEST_PIECE) {
                segments.push(segment);
                break;
            }
            let (taken, rest) = segment.cut(len.max(1));
            segments.extend(rest);
            group.runs.push((taken.logical, taken.start(), taken.len));
            group.credits += credits;
            blocks += taken.len;
            group.segments.push(taken);
            if blocks >= MAX_BLOCKS_PER_HANDLE {
                break;
            }
        }
        group.segments.reverse();
        group
    }

    /// How many blocks of a segment fit into what is left of `room`, and their credits.
    fn fitting(
        &self,
        segment: &Segment,
        most: u32,
        is_extents: bool,
        room: u32,
        used: u32,
    ) -> (u32, u32) {
        let mapping = |len: u32| {
            if matches!(segment.place, Place::Mapped(_)) {
                return 0;
            }
            let end = segment.logical.saturating_add(len);
            let pointers = if is_extents {
                0
            } else {
                indirect::nodes_needed(segment.logical, end, self.block_size())
            };
            credits::CONVERT + u32::try_from(pointers).unwrap_or(u32::MAX / 4)
        };
        let mut len = most;
        while len > 0 && used + mapping(len) + len > room {
            let excess = (used + mapping(len) + len - room).min(len);
            len -= excess;
        }
        (len, mapping(len.max(1)) + len.max(1))
    }

    /// One handle: maps and copies. The segments left in the group were not mapped.
    fn journal_group(
        &self,
        inode: &Inode,
        pages: &[Page],
        group: &mut Group,
        size: u64,
    ) -> Result<()> {
        if mutant!("journalled-data-home-early") {
            self.write_early(pages, &group.runs);
        }
        let handle = self.start(group.credits)?;
        let done = self
            .map_under(&handle, inode, &mut group.segments, size)
            .and_then(|()| self.copy_runs(&handle, pages, &group.runs));
        // Also after an error: what was mapped before it must reach the inode.
        let marked = self.mark_inode_dirty(&handle, inode);
        done.and(marked)
    }

    /// A planted defect: writes the blocks themselves, which nothing committed yet allows.
    fn write_early(&self, pages: &[Page], runs: &[(u32, FsBlock, u32)]) {
        let block_size = self.block_size() as usize;
        let per_page = (PAGE_SIZE / block_size) as u32;
        for (logical, block) in runs.iter().flat_map(|&(logical, start, len)| {
            (0..len).map(move |n| (logical + n, start + n.into()))
        }) {
            let index = u64::from(logical / per_page);
            let page = pages.partition_point(|page| page.guard.folio().index() < index);
            let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), self.sector_of(block));
            let offset = (logical % per_page) as usize * block_size;
            bio.add_vec(pages[page].guard.bvec(offset, block_size));
            self.buffers.device().submit_bios_wait(vec![bio]);
        }
    }

    fn copy_runs(
        &self,
        handle: &Handle,
        pages: &[Page],
        runs: &[(u32, FsBlock, u32)],
    ) -> Result<()> {
        let block_size = self.block_size() as usize;
        let per_page = (PAGE_SIZE / block_size) as u32;
        for &(logical, start, len) in runs {
            for at in 0..len {
                let index = u64::from((logical + at) / per_page);
                let offset = ((logical + at) % per_page) as usize * block_size;
                // A segment is made of dirty blocks of locked pages.
                let page = pages.partition_point(|page| page.guard.folio().index() < index);
                let buffer = self.buffers.getblk(start.0 + u64::from(at));
                let mut bytes = handle.create(&buffer)?;
                bytes.copy_from_slice(&pages[page].guard[offset..offset + block_size]);
            }
        }
        Ok(())
    }
}
