//! Blocks that no file may own: superblocks, descriptors, bitmaps and inode tables.
//!
//! Invariants: the ranges are sorted, disjoint and not empty. The set is fixed for
//! the life of the mount, since nothing here moves metadata.

use uext_ondisk::superblock::Superblock;
use uext_ondisk::{Corrupt, FsBlock};

use crate::error::Result;
use crate::groups::Desc;

/// The filesystem's own blocks.
#[derive(Debug, Default)]
pub(crate) struct SystemZone {
    /// Start and end of each range.
    ranges: Vec<(u64, u64)>,
}

impl SystemZone {
    /// Collects the zone from the descriptors, in group order.
    ///
    /// # Errors
    /// Those of the descriptors; with `writable`, that two structures share a block: a
    /// thread may hold both, as two blocks, and would write one into the other.
    pub fn new(
        sb: &Superblock,
        descs: impl Iterator<Item = Result<Desc>>,
        writable: bool,
    ) -> Result<Self> {
        let mut ranges = Vec::new();
        for (group, desc) in sb.groups().zip(descs) {
            let desc = desc?;
            let table = u64::from(sb.inode_table_blocks());
            let first = sb.group_first_block(group).0;
            let base = u64::from(sb.base_meta_blocks(group));
            for (start, count) in [
                (first, base),
                (desc.block_bitmap.0, 1),
                (desc.inode_bitmap.0, 1),
                (desc.inode_table.0, table),
            ] {
                if count > 0 {
                    ranges.push((start, start.saturating_add(count)));
                }
            }
        }
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match merged.last_mut() {
                Some(last) if start < last.1 && writable => {
                    let detail = format!("two structures lie at block {start}");
                    return Err(Corrupt::value("group descriptors", detail).into());
                }
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        Ok(Self { ranges: merged })
    }

    /// Whether a run of blocks touches the zone.
    pub fn overlaps(&self, start: FsBlock, count: u64) -> bool {
        let end = start.0.saturating_add(count);
        let next = self.ranges.partition_point(|&(_, zone_end)| zone_end <= start.0);
        self.ranges.get(next).is_some_and(|&(zone_start, _)| zone_start < end)
    }
    /// Blocks in all.
    pub fn blocks(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }
}
