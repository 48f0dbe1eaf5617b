//! Where a file's blocks lie: the same questions to both kinds of mapping.
//!
//! Invariants: the cache of runs (`RunCache`) is filled under `Inode::map` shared and
//! changed or cleared under it exclusive, so it never tells of a mapping that is gone.
//!
//! Locks: `Inode::map`, then the run cache, a leaf.

use smallvec::SmallVec;
use uext_jbd2::Handle;
use uext_ondisk::extent::{Extent, ExtentNode, MAX_UNWRITTEN_LEN, MAX_WRITTEN_LEN};
use uext_ondisk::features::RoCompat;
use uext_ondisk::indirect::{
    DIRECT_BLOCKS, Pointers, max_block_map_file_size, max_extent_file_size,
};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{FsBlock, LogicalBlock};
use uext_sync::Mutex;
use uext_vfs::Errno;

use crate::credits;
use crate::error::Result;
use crate::extents::MAX_BLOCKS;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::map_io::{Budget, FsMapIo, MapIo};
use crate::{extents, extents_remove, extents_shift, indirect};

/// Runs of one file that are remembered.
const MAX_RUNS: usize = 64;
/// How far a block map is looked at in one go.
const BLOCK_MAP_RUN: u32 = 1024;
/// Most bytes of a revoke block that hold no records.
const REVOKE_HEADER: u32 = 32;
/// The largest file of an image without the feature `large_file`.
const LARGE_FILE_BYTES: u64 = i32::MAX as u64;
/// Groups whose bitmaps a step of removal may change (see `credits::TRUNCATE`).
const GROUPS_PER_STEP: usize = 8;

/// Where a run of a file's blocks lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The first block of the filesystem; `None` for a hole.
    pub start: Option<FsBlock>,
    /// Blocks, at least one.
    pub len: u32,
    /// Allocated, but reads as zeroes.
    pub unwritten: bool,
}

impl Mapping {
    /// A hole.
    pub fn hole(len: u32) -> Self {
        Self { start: None, len, unwritten: false }
    }

    /// Where data lies on the disk: not in a hole, and written.
    pub fn data(&self) -> Option<FsBlock> {
        self.start.filter(|_| !self.unwritten)
    }

    /// The mapping from `skip` blocks further on, at most `max` blocks.
    fn part(self, skip: u32, max: u32) -> Self {
        let start = self.start.map(|start| start + u64::from(skip));
        Self { start, len: (self.len - skip).min(max), ..self }
    }
}

/// Runs that were looked up lately, by their first block: an array that never grows, so that
/// writeback, which comes after a lookup by whoever wrote, needs no memory for it.
#[derive(Default)]
pub(crate) struct RunCache(Mutex<Vec<(u32, Mapping)>>);

impl RunCache {
    fn get(&self, logical: u32, max: u32) -> Option<Mapping> {
        let runs = self.0.lock();
        let at = runs.partition_point(|(first, _)| *first <= logical).checked_sub(1)?;
        let (first, run) = runs[at];
        let skip = logical - first;
        (skip < run.len).then(|| run.part(skip, max))
    }

    fn put(&self, logical: u32, run: Mapping) {
        let mut runs = self.0.lock();
        remove_overlapping(&mut runs, logical, logical.saturating_add(run.len));
        if runs.capacity() == 0 {
            runs.reserve_exact(MAX_RUNS);
        }
        if runs.len() >= MAX_RUNS {
            runs.clear();
        }
        let at = runs.partition_point(|(first, _)| *first < logical);
        runs.insert(at, (logical, run));
    }

    fn forget(&self, from: u32, end: u32) {
        remove_overlapping(&mut self.0.lock(), from, end);
    }
}

fn remove_overlapping(runs: &mut Vec<(u32, Mapping)>, from: u32, end: u32) {
    let low = runs.partition_point(|(first, run)| first.saturating_add(run.len) <= from);
    let high = runs.partition_point(|(first, _)| *first < end);
    if low < high {
        runs.drain(low..high);
    }
}

impl Ext4 {
    /// Where the blocks from `logical` on lie, at most `max`: one run, or one hole.
    ///
    /// # Errors
    /// `Corrupt` when the mapping is damaged, `Blk` when it cannot be read.
    pub(crate) fn map_lookup(
        &self,
        inode: &Inode,
        logical: LogicalBlock,
        max: u32,
    ) -> Result<Mapping> {
        let max = max.max(1);
        let _map = inode.map.read();
        if let Some(run) = inode.data.runs.get(logical.0, max) {
            return Ok(run);
        }
        let io = FsMapIo::reader(self, inode);
        let run = if io.is_extents() {
            extents::lookup(&io, logical.0)?
        } else {
            indirect::lookup(&io, logical.0, max.max(BLOCK_MAP_RUN))?
        };
        inode.data.runs.put(logical.0, run);
        Ok(run.part(0, max))
    }

    /// The blocks of the mapping that the inode itself points to, as far as a small file has
    /// such: what must be in memory before its data is found. None where they are damaged.
    pub(crate) fn map_nodes(&self, inode: &Inode) -> SmallVec<[FsBlock; 4]> {
        let io = FsMapIo::reader(self, inode);
        let root = io.root();
        let mut nodes = SmallVec::new();
        if io.is_extents() {
            let root = ExtentNode::new(&root[..]);
            nodes.extend(root.iter().flat_map(ExtentNode::indexes).map(|index| index.child));
        } else {
            let root = Pointers::new(&root[..]);
            nodes.extend(root.iter().filter_map(|root| root.get(DIRECT_BLOCKS as usize)));
        }
        nodes.retain(|node| io.check_run(*node, 1).is_ok());
        nodes
    }

    /// Where to look for blocks for `logical`.
    pub(crate) fn map_goal(&self, inode: &Inode, logical: u32) -> Result<FsBlock> {
        let _map = inode.map.read();
        let io = FsMapIo::reader(self, inode);
        let goal = if io.is_extents() {
            extents::goal(&io, logical)?
        } else {
            indirect::goal(&io, logical)?
        };
        Ok(goal.unwrap_or_else(|| self.goal_for(inode)))
    }

    /// Allocates and maps one block now, for directories and long symlinks; the caller marks
    /// the inode dirty.
    ///
    /// # Errors
    /// `ENOSPC`, `EFBIG`; nothing is changed then.
    pub(crate) fn map_new_meta(
        &self,
        handle: &Handle,
        inode: &Inode,
        logical: LogicalBlock,
    ) -> Result<FsBlock> {
        let goal = self.map_goal(inode, logical.0)?;
        let _map = inode.map.write();
        let block = self.new_meta_block(handle, goal)?;
        let io = FsMapIo::writer(self, inode, handle, 0);
        if let Err(error) = map_run(&io, inode, logical.0, block, 1) {
            self.free_blocks(handle, block, 1, false)?;
            return Err(error);
        }
        Ok(block)
    }

    /// Unmaps the end of `from..end` and frees its blocks, as much as one handle of
    /// `credits::TRUNCATE` may; returns where the rest ends, `None` when nothing is left. The
    /// caller marks the inode dirty.
    pub(crate) fn unmap_step(
        &self,
        handle: &Handle,
        inode: &Inode,
        from: u32,
        end: u32,
    ) -> Result<Option<u32>> {
        let _map = inode.map.write();
        inode.data.runs.forget(from, end);
        let io = FsMapIo::writer(self, inode, handle, 0);
        let mut budget = if self.is_logged(inode) {
            // One block of revokes is for the mapping's own nodes.
            let records = (self.block_size() - REVOKE_HEADER) / 8;
            Budget::with_blocks(GROUPS_PER_STEP, records * (credits::REVOKES - 1))
        } else {
            Budget::new(GROUPS_PER_STEP)
        };
        if io.is_extents() {
            extents_remove::remove_step(&io, from, end, &mut budget)
        } else {
            indirect::remove_step(&io, from, end, &mut budget)
        }
    }

    /// Makes the first written blocks of a range unwritten, as much as one handle of
    /// `credits::CONVERT` may; returns where the rest begins, `None` when nothing is left. The
    /// caller marks the inode dirty.
    pub(crate) fn unwrite_step(
        &self,
        handle: &Handle,
        inode: &Inode,
        from: u32,
        end: u32,
    ) -> Result<Option<u32>> {
        let _map = inode.map.write();
        inode.data.runs.forget(from, end);
        extents::unwrite_step(&FsMapIo::writer(self, inode, handle, 0), from, end)
    }

    /// Moves what one leaf maps from `from` on to `by` blocks before; returns where the next
    /// leaf begins. The caller marks the inode dirty.
    pub(crate) fn shift_left_step(
        &self,
        handle: &Handle,
        inode: &Inode,
        from: u32,
        by: u32,
    ) -> Result<Option<u32>> {
        let _map = inode.map.write();
        inode.data.runs.forget(0, MAX_BLOCKS);
        extents_shift::shift_left_step(&FsMapIo::writer(self, inode, handle, 0), from, by)
    }

    /// Moves what one leaf maps of `from..end` to `by` blocks behind; returns where the rest
    /// ends. The caller marks the inode dirty.
    pub(crate) fn shift_right_step(
        &self,
        handle: &Handle,
        inode: &Inode,
        (from, end): (u32, u32),
        by: u32,
    ) -> Result<Option<u32>> {
        let _map = inode.map.write();
        inode.data.runs.forget(0, MAX_BLOCKS);
        extents_shift::shift_right_step(&FsMapIo::writer(self, inode, handle, 0), from, end, by)
    }

    /// Has an extent begin at a block, if one holds it; gives the end of the last extent.
    pub(crate) fn split_at(&self, handle: &Handle, inode: &Inode, logical: u32) -> Result<u64> {
        let _map = inode.map.write();
        let io = FsMapIo::writer(self, inode, handle, 0);
        extents_shift::split_at(&io, logical)?;
        extents_shift::end_of_last(&io)
    }

    /// The largest size a file of this mapping can have, bytes.
    pub(crate) fn max_file_size(&self, inode: &Inode) -> u64 {
        let features = self.sb.features();
        let (block_size, huge) = (self.block_size(), features.huge_file());
        let most = if inode.core.lock().is_extents() {
            max_extent_file_size(block_size, huge)
        } else {
            max_block_map_file_size(block_size, huge)
        };
        // A revision 0 image has no features to say that it has large files.
        if self.sb.is_rev0() { most.min(LARGE_FILE_BYTES) } else { most }
    }

    /// Sets the feature that a file of this size needs, before the first file has it.
    ///
    /// # Errors
    /// How the journal failed.
    pub(crate) fn allow_size(&self, size: u64) -> Result<()> {
        let has_it = |sb: &Superblock| sb.features().ro_compat.contains(RoCompat::LARGE_FILE);
        if size <= LARGE_FILE_BYTES || has_it(&self.sb) || self.with_super(has_it) {
            return Ok(());
        }
        let handle = self.start(credits::LARGE_FILE)?;
        let mut set = Ok(());
        self.update_super(&handle, |sb| {
            let mut features = sb.features();
            features.ro_compat |= RoCompat::LARGE_FILE;
            set = sb.set_features(features);
        })?;
        Ok(set?)
    }
}

/// Maps a hole to blocks that are marked used, and counts them; `Inode::map` is held
/// exclusively.
pub(crate) fn map_run(
    io: &FsMapIo<'_>,
    inode: &Inode,
    logical: u32,
    start: FsBlock,
    len: u32,
) -> Result<()> {
    map_run_as(io, inode, logical, Mapping { start: Some(start), len, unwritten: false })
}

/// [`map_run`] for blocks that read as zeroes until they are written; only in extents.
pub(crate) fn map_unwritten(
    io: &FsMapIo<'_>,
    inode: &Inode,
    logical: u32,
    start: FsBlock,
    len: u32,
) -> Result<()> {
    map_run_as(io, inode, logical, Mapping { start: Some(start), len, unwritten: true })
}

fn map_run_as(io: &FsMapIo<'_>, inode: &Inode, logical: u32, run: Mapping) -> Result<()> {
    let Mapping { start, len, unwritten } = run;
    let start = start.ok_or(Errno::EIO)?;
    inode.data.runs.forget(logical, logical.saturating_add(len));
    if io.is_extents() {
        debug_assert!(len <= if unwritten { MAX_UNWRITTEN_LEN } else { MAX_WRITTEN_LEN });
        let logical = LogicalBlock(logical);
        extents::insert(io, Extent { logical, len, start, unwritten })?;
    } else if unwritten {
        return Err(Errno::EOPNOTSUPP.into());
    } else {
        indirect::insert(io, logical, start, len)?;
    }
    io.add_blocks(len);
    inode.data.runs.put(logical, run);
    Ok(())
}

/// Makes unwritten blocks whose data is on the disk written; `Inode::map` is held exclusively.
pub(crate) fn map_written(io: &FsMapIo<'_>, inode: &Inode, logical: u32, len: u32) -> Result<()> {
    let end = logical.saturating_add(len);
    inode.data.runs.forget(logical, end);
    extents::mark_written(io, logical, end)
}
