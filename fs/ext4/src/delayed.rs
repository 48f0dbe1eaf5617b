//! Delayed data: blocks of a file that are dirty in memory and have no place yet.
//!
//! write(2) reserves space for a block and for the worst its mapping may need, so that
//! running out of space is its error; writeback allocates. What is delayed is kept here
//! by block of the file, not in the pages, so that it is exact whatever happens to them.
//!
//! Invariants:
//! - `Space::reserved` is the sum over all inodes of `blocks + nodes`, but for blocks that
//!   writeback has claimed, and of what fallocate(2) holds for itself.
//! - A dirty block over an unwritten one is counted too: its conversion may split extents.
//! - A delayed block is mapped by nobody else: only writeback, under `Inode::writeback`,
//!   turns it into a mapped one, and it takes it out after that.
//!
//! Locks: the state's mutex is a leaf but for `Space`, and never held over anything that waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use uext_pagecache::{ErrSeqMark, ReadaheadState};
use uext_sync::Mutex;

use crate::error::Result;
use crate::fs::Ext4;
use crate::inode::Inode;
use crate::map_blocks::RunCache;
use crate::map_io::FsMapIo;
use crate::{extents, indirect};

/// What the data path keeps of an inode, in memory only.
#[derive(Default)]
pub(crate) struct FileData {
    /// Runs of the mapping that were looked up lately.
    pub runs: RunCache,
    /// Dirty blocks without a place.
    pub delayed: Mutex<Delayed>,
    /// How far ahead of a reader to read.
    pub readahead: Mutex<ReadaheadState>,
    /// It is known to have no `security.capability`, so that writes need not look.
    /// WHY-RELAXED: read and changed under `Inode::rwsem` exclusive.
    pub no_capability: AtomicBool,
    /// It is known to have no extended attributes.
    /// WHY-RELAXED: changed under `Inode::rwsem`, to false exclusively.
    pub no_xattrs: AtomicBool,
    /// It was read ahead because of the file listed before it, and not read since.
    /// WHY-RELAXED: told twice, or not, it costs or saves a read.
    pub read_with_others: AtomicBool,
    /// [itself] Held while a large write goes to the disk: see `past_cache`.
    pub large_write: Mutex<()>,
    /// The write errors that fsync has reported.
    pub reported: Mutex<ErrSeqMark>,
}

impl FileData {
    pub fn new(readahead: ReadaheadState) -> Self {
        Self { readahead: Mutex::new(readahead), ..Self::default() }
    }
}

/// Blocks of a file, as ranges.
#[derive(Default)]
pub(crate) struct RangeSet {
    /// First block to end, disjoint and not adjacent.
    ranges: BTreeMap<u32, u32>,
    /// Blocks in `ranges`.
    blocks: u64,
    /// Block size when the file is block-mapped, else 0.
    map_block_size: u32,
    /// Pointer blocks the ranges of a block-mapped file can need, each for itself.
    map_cost: u64,
}

impl RangeSet {
    fn cost(&self, from: u32, end: u32) -> u64 {
        match self.map_block_size {
            0 => 0,
            block_size => indirect::nodes_needed(from, end, block_size),
        }
    }

    fn put(&mut self, from: u32, end: u32) {
        self.map_cost += self.cost(from, end);
        self.ranges.insert(from, end);
    }

    fn take(&mut self, from: u32) -> Option<u32> {
        let end = self.ranges.remove(&from)?;
        self.map_cost -= self.cost(from, end);
        Some(end)
    }

    /// The end of the range that holds the block.
    pub fn end_of(&self, logical: u32) -> Option<u32> {
        let (_, &end) = self.ranges.range(..=logical).next_back()?;
        (logical < end).then_some(end)
    }

    /// The first block at or after `logical`.
    pub fn next(&self, logical: u32) -> Option<u32> {
        if self.end_of(logical).is_some() {
            return Some(logical);
        }
        self.ranges.range(logical..).next().map(|(&first, _)| first)
    }

    /// Adds a range of which nothing is there.
    fn insert(&mut self, from: u32, end: u32) {
        debug_assert!(from < end && self.next(from).is_none_or(|next| next >= end));
        self.blocks += u64::from(end - from);
        let end = self.take(end).unwrap_or(end);
        let before = self.ranges.range(..from).next_back().filter(|(_, last)| **last == from);
        let first = before.map_or(from, |(&first, _)| first);
        self.take(first);
        self.put(first, end);
    }

    /// Takes out what is there of a range; how many blocks that were.
    fn remove(&mut self, from: u32, end: u32) -> u64 {
        let mut gone = 0;
        if from >= end {
            return gone;
        }
        if let Some((&first, &last)) = self.ranges.range(..from).next_back()
            && last > from
        {
            self.take(first);
            self.put(first, from);
            // Split where the range begins; the part inside is removed below.
            self.put(from, last);
        }
        while let Some((&first, _)) = self.ranges.range(from..end).next() {
            let last = self.take(first).unwrap_or(end);
            if last > end {
                self.put(end, last);
            }
            gone += u64::from(last.min(end) - first);
        }
        self.blocks -= gone;
        gone
    }
}

/// Blocks that are about to be dirtied and have no reservation yet: disjoint ranges, rising.
#[derive(Default)]
pub(crate) struct Fresh {
    /// Neither mapped nor delayed.
    pub holes: Vec<(u32, u32)>,
    /// Mapped but unwritten: making them written may split extents.
    pub unwritten: Vec<(u32, u32)>,
}

impl Fresh {
    /// Adds a range behind those that are there.
    pub fn push(&mut self, unwritten: bool, from: u32, end: u32) {
        let ranges = if unwritten { &mut self.unwritten } else { &mut self.holes };
        match ranges.last_mut() {
            Some((_, last)) if *last == from => *last = end,
            _ => ranges.push((from, end)),
        }
    }

    fn count(ranges: &[(u32, u32)]) -> u64 {
        ranges.iter().map(|(from, end)| u64::from(end - from)).sum()
    }
}

/// Dirty blocks of a file for which space is reserved.
#[derive(Default)]
pub(crate) struct Delayed {
    /// Without a place.
    holes: RangeSet,
    /// Over unwritten blocks; each may add two extents when it is made written.
    unwritten: RangeSet,
    /// Blocks reserved for mapping nodes.
    nodes: u64,
}

impl Delayed {
    /// The end of the delayed range that holds the block.
    pub fn end_of(&self, logical: u32) -> Option<u32> {
        self.holes.end_of(logical)
    }

    /// The first delayed block at or after `logical`.
    pub fn next(&self, logical: u32) -> Option<u32> {
        self.holes.next(logical)
    }

    /// Dirty blocks over unwritten ones.
    pub fn unwritten(&self) -> &RangeSet {
        &self.unwritten
    }

    /// Blocks reserved for mapping nodes.
    pub fn nodes(&self) -> u64 {
        self.nodes
    }

    /// Whether nothing is reserved.
    pub fn is_empty(&self) -> bool {
        self.holes.blocks == 0 && self.nodes == 0
    }

    /// Takes out what is there of a range; how many delayed blocks that were.
    fn remove(&mut self, from: u32, end: u32) -> u64 {
        self.unwritten.remove(from, end);
        self.holes.remove(from, end)
    }

    /// Most mapping blocks that the delayed blocks and `more` can need.
    fn nodes_needed(&self, shape: Shape, block_size: u32, more: &Fresh) -> u64 {
        let Shape::Extents { depth, root_len } = shape else {
            let cost = |&(from, end): &(u32, u32)| indirect::nodes_needed(from, end, block_size);
            return self.holes.map_cost + more.holes.iter().map(cost).sum::<u64>();
        };
        let extents = self.holes.blocks
            + Fresh::count(&more.holes)
            + 2 * (self.unwritten.blocks + Fresh::count(&more.unwritten));
        extents::nodes_needed(extents, depth, root_len, block_size)
    }
}

/// What the need for mapping blocks depends on.
#[derive(Clone, Copy)]
enum Shape {
    Extents { depth: u16, root_len: usize },
    BlockMap,
}

impl Ext4 {
    fn map_shape(&self, inode: &Inode) -> Result<Shape> {
        let io = FsMapIo::reader(self, inode);
        if !io.is_extents() {
            return Ok(Shape::BlockMap);
        }
        let (depth, root_len) = extents::tree_depth(&io)?;
        Ok(Shape::Extents { depth, root_len })
    }

    /// Reserves space for blocks that are about to be dirtied; the caller holds `Inode::rwsem`
    /// exclusively.
    ///
    /// # Errors
    /// `ENOSPC`; nothing is changed then.
    pub(crate) fn delay_blocks(
        &self,
        inode: &Inode,
        fresh: &Fresh,
        privileged: bool,
    ) -> Result<()> {
        if fresh.holes.is_empty() && fresh.unwritten.is_empty() {
            return Ok(());
        }
        let shape = self.map_shape(inode)?;
        // Only writeback changes it meanwhile, and that takes blocks out.
        let more_nodes = {
            let mut delayed = inode.data.delayed.lock();
            if matches!(shape, Shape::BlockMap) {
                delayed.holes.map_block_size = self.block_size();
            }
            let needed = delayed.nodes_needed(shape, self.block_size(), fresh);
            needed.saturating_sub(delayed.nodes)
        };
        match Fresh::count(&fresh.holes) {
            0 => self.reserve_nodes(more_nodes)?,
            count => self.reserve(count + more_nodes, privileged)?,
        }
        let mut delayed = inode.data.delayed.lock();
        fresh.holes.iter().for_each(|&(from, end)| delayed.holes.insert(from, end));
        fresh.unwritten.iter().for_each(|&(from, end)| delayed.unwritten.insert(from, end));
        delayed.nodes += more_nodes;
        publish(inode, &delayed);
        Ok(())
    }

    /// Most mapping blocks that mapping `count` single blocks can need.
    pub(crate) fn nodes_for(&self, inode: &Inode, count: u64) -> Result<u64> {
        Ok(match self.map_shape(inode)? {
            Shape::Extents { depth, root_len } => {
                extents::nodes_needed(count, depth, root_len, self.block_size())
            }
            Shape::BlockMap => count,
        })
    }

    /// Drops what is delayed of a range, and its reservation.
    pub(crate) fn drop_delayed(&self, inode: &Inode, from: u32, end: u32) {
        let gone = inode.data.delayed.lock().remove(from, end);
        self.unreserve(gone);
        self.trim_nodes(inode);
    }

    /// Takes out blocks that are mapped now, whose own reservation went with their claim;
    /// `used` of the blocks reserved for nodes were used up.
    pub(crate) fn settle_delayed(&self, inode: &Inode, from: u32, end: u32, used: u64) {
        {
            let mut delayed = inode.data.delayed.lock();
            delayed.remove(from, end);
            delayed.nodes = delayed.nodes.saturating_sub(used);
        }
        self.trim_nodes(inode);
    }

    /// Gives back what is reserved for nodes beyond the need.
    fn trim_nodes(&self, inode: &Inode) {
        let shape = self.map_shape(inode);
        let mut delayed = inode.data.delayed.lock();
        // A damaged root needs no nodes: nothing can be mapped.
        let needed = shape
            .map_or(0, |shape| delayed.nodes_needed(shape, self.block_size(), &Fresh::default()));
        let excess = delayed.nodes.saturating_sub(needed);
        delayed.nodes -= excess;
        publish(inode, &delayed);
        self.unreserve(excess);
    }

    /// Writes delayed data of all files, so that reservations for the worst case become what
    /// is really needed.
    pub(crate) fn settle_reservations(&self) {
        for inode in self.inodes.all() {
            if !inode.data.delayed.lock().is_empty()
                && let Err(error) = self.flush_data(&inode)
            {
                log::warn!("{}: inode {}: {error}", self.name, inode.ino);
            }
        }
    }
}

/// Shows the counts to stat(2).
fn publish(inode: &Inode, delayed: &Delayed) {
    // Relaxed: statistics.
    inode.delayed.store(delayed.holes.blocks, Ordering::Relaxed);
    inode.reserved.store(delayed.holes.blocks + delayed.nodes, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn ranges_hold_what_a_set_of_blocks_holds(ops in prop::collection::vec((0u32..200, 1u32..40, any::<bool>()), 1..80)) {
            let mut delayed = RangeSet::default();
            let mut model = BTreeSet::new();
            for (from, len, add) in ops {
                let end = from + len;
                if add {
                    let fresh: Vec<u32> = (from..end).filter(|b| model.insert(*b)).collect();
                    fresh.iter().for_each(|&b| delayed.insert(b, b + 1));
                } else {
                    let gone = (from..end).filter(|b| model.remove(b)).count();
                    prop_assert_eq!(delayed.remove(from, end), gone as u64);
                }
                prop_assert_eq!(delayed.blocks, model.len() as u64);
                for block in 0..250 {
                    prop_assert_eq!(delayed.end_of(block).is_some(), model.contains(&block));
                    prop_assert_eq!(delayed.next(block), model.range(block..).next().copied());
                }
                let joined = delayed.ranges.iter().zip(delayed.ranges.iter().skip(1)).all(|(a, b)| a.1 < b.0);
                prop_assert!(joined, "adjacent ranges are one");
            }
        }
    }
}
