//! Where the blocks of a journal lie on its device.
//!
//! Invariants: the runs are sorted, without gaps or overlaps, and cover exactly
//! blocks `0..block_count`; every physical block number fits 64 bits.

use uext_ondisk::Corrupt;

use crate::error::Result;

const WHAT: &str = "journal map";

/// A run of journal blocks that lie one behind the other on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalRun {
    /// First block within the journal.
    pub logical: u32,
    /// Where it lies on the device, in blocks.
    pub physical: u64,
    /// Blocks.
    pub count: u32,
}

/// The map from a block of the journal to a block of its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalMap {
    runs: Vec<JournalRun>,
    /// The journal block that holds the superblock.
    superblock: u32,
    block_count: u32,
}

impl JournalMap {
    /// The journal of a file: the runs of its inode, in any order. Blocks behind
    /// the first gap do not count.
    ///
    /// # Errors
    /// `Corrupt` when the runs overlap, run past 64 bits or leave out block 0.
    pub fn from_runs(mut runs: Vec<JournalRun>) -> Result<Self> {
        runs.retain(|run| run.count != 0);
        runs.sort_by_key(|run| run.logical);
        let mut next = 0u32;
        let mut used = 0;
        for run in &runs {
            if run.logical < next {
                return Err(
                    Corrupt::value(WHAT, format!("block {} is mapped twice", run.logical)).into()
                );
            }
            if run.logical > next {
                break;
            }
            let end = run.logical.checked_add(run.count);
            let fits = run.physical.checked_add(u64::from(run.count)).is_some();
            next = end.filter(|_| fits).ok_or_else(|| {
                Corrupt::value(WHAT, format!("run at block {} is too long", run.logical))
            })?;
            used += 1;
        }
        runs.truncate(used);
        if next == 0 {
            return Err(Corrupt::value(WHAT, "block 0 is not mapped").into());
        }
        Ok(Self { runs, superblock: 0, block_count: next })
    }

    /// An external journal: blocks are the device's own, the journal superblock
    /// lies in block `superblock` (1, or 2 with blocks of 1 KiB).
    ///
    /// # Errors
    /// `Corrupt` when the superblock lies outside.
    pub fn external(superblock: u32, block_count: u32) -> Result<Self> {
        if superblock >= block_count {
            let detail = format!("superblock in block {superblock} of {block_count}");
            return Err(Corrupt::value(WHAT, detail).into());
        }
        let runs = vec![JournalRun { logical: 0, physical: 0, count: block_count }];
        Ok(Self { runs, superblock, block_count })
    }

    /// Blocks the map covers.
    pub fn block_count(&self) -> u32 {
        self.block_count
    }

    /// The journal block that holds the journal's superblock.
    pub fn superblock(&self) -> u32 {
        self.superblock
    }

    /// Whether the journal is a device of its own, whose first block is not the journal's.
    pub(crate) fn is_external(&self) -> bool {
        self.superblock != 0
    }

    /// Where a journal that is a file lies on its filesystem's device: sorted ranges of blocks.
    /// None for an external one.
    pub(crate) fn own_ranges(&self) -> Vec<(u64, u64)> {
        if self.is_external() {
            return Vec::new();
        }
        // Ends were checked to fit.
        let ranges =
            self.runs.iter().map(|run| (run.physical, run.physical + u64::from(run.count)));
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        ranges
    }

    /// Where a block lies on the device; `None` past the end.
    pub fn map(&self, logical: u32) -> Option<u64> {
        self.run(logical, 1).map(|(physical, _)| physical)
    }

    /// Where a block lies and how many of at most `max` follow it there.
    pub fn run(&self, logical: u32, max: u32) -> Option<(u64, u32)> {
        let index = self.runs.partition_point(|run| run.logical <= logical).checked_sub(1)?;
        let run = self.runs.get(index)?;
        let skip = logical - run.logical;
        let left = run.count.checked_sub(skip).filter(|&left| left > 0)?;
        Some((run.physical + u64::from(skip), left.min(max)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logical: u32, physical: u64, count: u32) -> JournalRun {
        JournalRun { logical, physical, count }
    }

    #[test]
    fn blocks_are_found_in_their_runs() {
        let map = JournalMap::from_runs(vec![run(4, 50, 3), run(0, 100, 4)]).unwrap();
        assert_eq!(map.block_count(), 7);
        assert_eq!((map.map(0), map.map(3), map.map(4)), (Some(100), Some(103), Some(50)));
        assert_eq!(map.map(7), None);
        assert_eq!(map.run(1, 9), Some((101, 3)));
    }

    #[test]
    fn a_gap_ends_the_journal_and_an_overlap_is_refused() {
        let map = JournalMap::from_runs(vec![run(0, 9, 2), run(3, 20, 2)]).unwrap();
        assert_eq!(map.block_count(), 2);
        assert!(JournalMap::from_runs(vec![run(0, 9, 2), run(1, 20, 2)]).is_err());
        assert!(JournalMap::from_runs(vec![run(1, 9, 2)]).is_err());
        assert!(JournalMap::from_runs(vec![run(0, u64::MAX, 2)]).is_err());
    }
}
