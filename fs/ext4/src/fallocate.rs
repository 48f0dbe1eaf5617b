//! fallocate(2): space ahead of data, holes, and zeroes without writing them.
//!
//! Space is unwritten extents, which read as zeroes until writeback has written over
//! them; a block map has no such thing, so only holes can be made in one.
//!
//! Invariants:
//! - The file's dirty data is written first. So every block is mapped or a hole, and what
//!   is mapped here takes nothing from the reservations of delayed data.
//! - Space is reserved before anything is mapped; an allocation that fails after all gives
//!   back what it has mapped, and the size stays.
//! - A hole is made from its end to its start, one handle a step, like a truncation, but a
//!   crash in between leaves part of it: there is no list of unfinished holes.
//!
//! Locks: `Inode::rwsem` exclusive, then `Inode::writeback` where blocks go or change; then
//! pages; then each step's handle and `Inode::map`.

use std::ops::Range;
use std::sync::Arc;

use uext_ondisk::FsBlock;
use uext_ondisk::extent::MAX_UNWRITTEN_LEN;
use uext_ondisk::indirect::max_block_map_file_size;
use uext_ondisk::inode::InodeFlags;
use uext_vfs::{Context, Errno, FileKind};

use crate::credits;
use crate::error::{Error, Result};
use crate::file::PAGE;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::map_blocks::map_unwritten;
use crate::map_io::FsMapIo;

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// What to do with a range.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Allocate,
    Punch,
    Zero,
}

/// Blocks that are promised to one call; given back when it ends.
struct Promise<'a> {
    fs: &'a Ext4,
    blocks: u64,
}

impl Promise<'_> {
    /// Gives up the promise of blocks that are taken now.
    fn take(&mut self, count: u64) {
        let count = count.min(self.blocks);
        self.fs.unreserve(count);
        self.blocks -= count;
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.fs.unreserve(self.blocks);
    }
}

/// What an allocation has to work with.
struct Budget<'a> {
    data: Promise<'a>,
    nodes: Promise<'a>,
    /// Runs that were mapped, should they have to go again.
    made: Vec<Range<u32>>,
}

impl Ext4 {
    /// fallocate(2) with the modes that reach a FUSE filesystem.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for another mode, and for anything but a hole in a block-mapped file;
    /// `EFBIG`, `ENOSPC`, `EPERM` as the kernel's ext4.
    pub(crate) fn file_allocate(
        &self,
        ctx: &Context,
        inode: &Arc<Inode>,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> Result<()> {
        let keep_size = mode & KEEP_SIZE != 0;
        let kind = match mode & !KEEP_SIZE {
            0 => Kind::Allocate,
            PUNCH_HOLE if keep_size => Kind::Punch,
            ZERO_RANGE => Kind::Zero,
            _ => return Err(Errno::EOPNOTSUPP.into()),
        };
        self.check_writable()?;
        match inode.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::ENODEV.into()),
        }
        let flags = inode.core.lock().flags;
        if flags.contains(InodeFlags::IMMUTABLE)
            || (flags.contains(InodeFlags::APPEND) && mode & !KEEP_SIZE != 0)
        {
            return Err(Errno::EPERM.into());
        }
        let end = offset.checked_add(len).ok_or(Error::Errno(Errno::EFBIG))?;
        if end > self.largest_file() {
            return Err(Errno::EFBIG.into());
        }
        let range = offset..end;
        {
            let _exclusive = inode.rwsem.write();
            if kind != Kind::Punch && !flags.contains(InodeFlags::EXTENTS) {
                return Err(Errno::EOPNOTSUPP.into());
            }
            self.flush_data(inode)?;
            if !keep_size {
                self.allow_size(end)?;
            }
            match kind {
                Kind::Allocate => self.preallocate(ctx, inode, &range)?,
                Kind::Punch => self.punch(inode, &range)?,
                Kind::Zero => self.zero_range(ctx, inode, &range)?,
            }
            if self.journals_data(inode) {
                // The zeroes at both ends, like all data of such a file, before this returns.
                self.journal_range(inode, range)?;
            }
            let size = inode.size();
            if !keep_size && end > size {
                self.extend(inode, size, end)?;
            } else {
                self.note_change(inode)?;
            }
        }
        if self.options.sync || flags.contains(InodeFlags::SYNC) {
            self.sync_inode(inode, false)?;
        }
        Ok(())
    }

    /// The times of a change of the data.
    fn note_change(&self, inode: &Inode) -> Result<()> {
        let handle = self.start(credits::SETATTR)?;
        let now = self.now();
        {
            let mut core = inode.core.lock();
            (core.mtime, core.ctime) = (now, now);
        }
        self.mark_inode_dirty(&handle, inode)
    }

    /// Gives every hole of a range unwritten blocks.
    fn preallocate(&self, ctx: &Context, inode: &Arc<Inode>, range: &Range<u64>) -> Result<()> {
        let (from, end) = (self.block_at(range.start), self.block_behind(range.end));
        let holes = self.unmapped_ranges(inode, from, end)?.holes;
        let count: u64 = holes.iter().map(|(from, end)| u64::from(end - from)).sum();
        if count == 0 {
            return Ok(());
        }
        let mut budget = self.promise(ctx, inode, count)?;
        for (from, end) in holes {
            if let Err(error) = self.fill_hole(inode, from, end, &mut budget) {
                for run in budget.made {
                    if let Err(error) = self.unmap(inode, run.start, run.end) {
                        self.report(Some(inode.ino), &error);
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Promises blocks for data and for the nodes that map it.
    fn promise(&self, ctx: &Context, inode: &Inode, count: u64) -> Result<Budget<'_>> {
        let worst = self.nodes_for(inode, count)?;
        let privileged = self.may_use_reserve(ctx, count + worst);
        // When space is short the worst does not have to come: few runs need few nodes, and
        // an allocation that finds none in the end is undone.
        let likely = worst.min(8 + count / 4096);
        let mut nodes = worst;
        let mut promised = self.reserve(count + nodes, privileged);
        if matches!(&promised, Err(error) if error.is(Errno::ENOSPC)) {
            self.settle_others(inode);
            promised = self.reserve(count + nodes, privileged);
        }
        for fewer in [likely, 0] {
            if promised.is_ok() {
                break;
            }
            nodes = fewer;
            promised = self.reserve(count + nodes, privileged);
        }
        promised?;
        Ok(Budget {
            data: Promise { fs: self, blocks: count },
            nodes: Promise { fs: self, blocks: nodes },
            made: Vec::new(),
        })
    }

    /// Lets delayed data of other files take what it needs and no more. The lock of this file
    /// is held, and its data is on the disk.
    fn settle_others(&self, inode: &Inode) {
        debug_assert!(inode.data.delayed.lock().is_empty());
        self.settle_reservations();
    }

    fn fill_hole(
        &self,
        inode: &Arc<Inode>,
        from: u32,
        end: u32,
        budget: &mut Budget<'_>,
    ) -> Result<()> {
        let mut at = from;
        let mut goal: Option<FsBlock> = None;
        while at < end {
            let near = match goal {
                Some(goal) => goal,
                None => self.map_goal(inode, at)?,
            };
            let claim = self.claim(near, (end - at).min(MAX_UNWRITTEN_LEN))?;
            budget.data.take(claim.len.into());
            let handle = self.start(credits::MAP_BLOCKS + credits::SETATTR)?;
            let _map = inode.map.write();
            let (start, len) = self.mark_used(&handle, claim)?;
            let io = FsMapIo::writer(self, inode, &handle, budget.nodes.blocks);
            let mapped = map_unwritten(&io, inode, at, start, len);
            budget.nodes.blocks = io.reserved_left();
            if let Err(error) = mapped {
                self.free_blocks(&handle, start, len, false)?;
                self.mark_inode_dirty(&handle, inode)?;
                return Err(error);
            }
            self.mark_inode_dirty(&handle, inode)?;
            match budget.made.last_mut() {
                Some(last) if last.end == at => last.end = at + len,
                _ => budget.made.push(at..at + len),
            }
            at += len;
            goal = Some(start + u64::from(len));
        }
        Ok(())
    }

    /// Makes a hole. Blocks behind the page that holds the end of the file stay.
    fn punch(&self, inode: &Inode, range: &Range<u64>) -> Result<()> {
        let size = inode.size();
        let most = if inode.core.lock().is_extents() {
            u64::MAX
        } else {
            let features = self.sb.features();
            max_block_map_file_size(self.block_size(), features.huge_file())
        };
        let end = if range.end > size { size.next_multiple_of(PAGE) } else { range.end };
        let end = end.min(most);
        if range.start >= size || range.start >= end {
            return Ok(());
        }
        let _writeback = inode.writeback.lock();
        let inner = self.zero_edges(inode, &(range.start..end))?;
        self.drop_range(inode, &inner);
        self.unmap(inode, inner.start, inner.end)
    }

    /// Makes a range read as zeroes, with blocks behind it that need not be written for that.
    fn zero_range(&self, ctx: &Context, inode: &Arc<Inode>, range: &Range<u64>) -> Result<()> {
        {
            let _writeback = inode.writeback.lock();
            let inner = self.zero_edges(inode, range)?;
            self.drop_range(inode, &inner);
            let mut next = (!inner.is_empty()).then_some(inner.start);
            while let Some(from) = next {
                next = self.with_space(|| {
                    let handle = self.start(credits::CONVERT + credits::SETATTR)?;
                    let rest = self.unwrite_step(&handle, inode, from, inner.end);
                    self.mark_inode_dirty(&handle, inode)?;
                    rest
                })?;
            }
        }
        self.preallocate(ctx, inode, range)
    }

    /// Zeroes the parts of blocks at both ends of a range; gives the whole blocks in it.
    fn zero_edges(&self, inode: &Inode, range: &Range<u64>) -> Result<Range<u32>> {
        let block_size = u64::from(self.block_size());
        let head_end = range.start.next_multiple_of(block_size).min(range.end);
        let tail_start = (range.end / block_size * block_size).max(head_end);
        self.zero_bytes(inode, range.start..head_end)?;
        self.zero_bytes(inode, tail_start..range.end)?;
        let (first, stop) = (self.block_behind(range.start), self.block_at(range.end));
        Ok(first..stop.max(first))
    }

    /// Drops what is cached of whole blocks, which are about to read as zeroes.
    fn drop_range(&self, inode: &Inode, blocks: &Range<u32>) {
        if blocks.is_empty() {
            return;
        }
        let block_size = u64::from(self.block_size());
        let bytes = u64::from(blocks.start) * block_size..u64::from(blocks.end) * block_size;
        let (first, last) = (bytes.start.div_ceil(PAGE), bytes.end / PAGE);
        if first <= last {
            inode.mapping.truncate_range(first..last);
            self.zero_cached(inode, bytes.start..first * PAGE);
            self.zero_cached(inode, last * PAGE..bytes.end);
        } else {
            self.zero_cached(inode, bytes);
        }
        self.drop_delayed(inode, blocks.start, blocks.end);
    }

    /// Zeroes what is cached of bytes of one page.
    fn zero_cached(&self, inode: &Inode, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        if let Some(folio) = inode.mapping.find(bytes.start / PAGE) {
            let start = (bytes.start % PAGE) as usize;
            let len = (bytes.end - bytes.start) as usize;
            folio.write()[start..start + len].fill(0);
        }
    }

    /// Unmaps and frees the blocks of a range.
    pub(crate) fn unmap(&self, inode: &Inode, from: u32, end: u32) -> Result<()> {
        let mut end = end;
        while from < end {
            let rest = self.with_space(|| {
                let handle = self.start(credits::PUNCH)?;
                let rest = self.unmap_step(&handle, inode, from, end);
                self.mark_inode_dirty(&handle, inode)?;
                rest
            })?;
            let Some(rest) = rest else { break };
            end = rest;
        }
        Ok(())
    }

    /// The largest size any file here can have, bytes.
    fn largest_file(&self) -> u64 {
        let features = self.sb.features();
        uext_ondisk::indirect::max_extent_file_size(self.block_size(), features.huge_file())
    }
}
