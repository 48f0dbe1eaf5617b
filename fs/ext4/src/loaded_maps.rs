//! Which groups have their block bitmap in memory, so that they are not all there in the end:
//! a filesystem of 16 TiB has 512 MiB of them.
//!
//! A bitmap is dropped when it says what the disk does: nothing in it is claimed, or freed by
//! a transaction that has not committed. Bits set on the disk are set in it always, so it is
//! the same when both have as many free. What is not, is no cache, and stays. What stays of one
//! that was dropped is its longest free run, so that a search for a longer one, which goes
//! through all groups of a fragmented filesystem, does not load it again.
//!
//! Invariants:
//! - A group is in the list once, from when its bitmap is loaded until it is dropped.
//!
//! Locks: the list's, after a group's lock. Who drops holds no group lock before.

use std::collections::VecDeque;

use uext_ondisk::{GroupNumber, bitmap};
use uext_sync::Mutex;

use crate::error::Result;
use crate::fs::Ext4;

/// Bitmaps that a call looks at, at most: each load adds one, so the number comes down.
const LOOKS: usize = 4;

/// The groups whose bitmaps are in memory, the longest there first.
pub(crate) struct LoadedMaps {
    groups: Mutex<VecDeque<GroupNumber>>,
    /// Bitmaps that may be there before some are dropped.
    most: usize,
}

impl LoadedMaps {
    /// A list that keeps to `most`, as far as bitmaps can be dropped.
    pub fn new(most: usize) -> Self {
        Self { groups: Mutex::new(VecDeque::new()), most }
    }

    /// A bitmap was loaded. Its group's lock is held.
    pub fn add(&self, group: GroupNumber) {
        self.groups.lock().push_back(group);
    }

    /// The one that is longest there, when there are too many.
    fn surplus(&self) -> Option<GroupNumber> {
        let mut groups = self.groups.lock();
        if groups.len() > self.most { groups.pop_front() } else { None }
    }
}

impl Ext4 {
    /// Drops bitmaps that were not asked for lately, when there are too many. No group lock is
    /// held.
    ///
    /// # Errors
    /// When a descriptor cannot be read.
    pub(crate) fn trim_loaded_maps(&self) -> Result<()> {
        for _ in 0..LOOKS {
            let Some(group) = self.groups.loaded_maps.surplus() else { return Ok(()) };
            let mut state = self.group(group)?.state.lock();
            let was_used = std::mem::take(&mut state.claimed_used);
            if was_used || self.desc(group)?.free_blocks != state.free_blocks {
                self.groups.loaded_maps.add(group);
            } else if let Some(map) = state.claimed.take() {
                let end = self.sb.clusters_in_group(group);
                let longest = bitmap::zero_runs(&map, 0, end).map(|run| run.len).max();
                state.longest_run = Some(longest.unwrap_or(0));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use uext_vfs::FileSystem as _;

    use super::*;
    use crate::MountOptions;
    use crate::test_image::mke2fs;

    /// 256 groups of 256 blocks, of which the least cache keeps 64 bitmaps.
    fn mount() -> Arc<Ext4> {
        let device = mke2fs(64, &["-t", "ext4", "-b", "1024", "-g", "256", "-O", "^resize_inode"]);
        let options = MountOptions { cache_bytes: Some(4 << 20), ..MountOptions::default() };
        Ext4::mount(device, "test", &options).unwrap()
    }

    fn loaded(fs: &Ext4) -> Vec<u32> {
        let groups = fs.sb.groups().filter(|g| {
            let group = &fs.groups.list[g.0 as usize];
            group.state.lock().claimed.is_some()
        });
        groups.map(|g| g.0).collect()
    }

    /// Takes a run of so many blocks near the middle of a group for good.
    fn take(fs: &Ext4, group: GroupNumber, bit: u32, count: u32) -> GroupNumber {
        let claim = fs.claim(fs.sb.group_first_block(group) + u64::from(bit), count).unwrap();
        let (got, _) = fs.sb.group_and_bit(claim.start).unwrap();
        let handle = fs.start(4).unwrap();
        fs.mark_used(&handle, claim).unwrap();
        got
    }

    #[test]
    fn a_search_for_a_long_run_loads_no_bitmap_again_that_has_none() {
        let fs = mount();
        for group in fs.sb.groups() {
            for bit in [64, 128, 192] {
                take(&fs, group, bit, 1);
            }
        }
        let before = loaded(&fs);
        assert!(before.len() <= 64 + LOOKS, "{} bitmaps are not dropped", before.len());
        // There is none: what is found is a shorter one, where the search begins.
        let at = take(&fs, GroupNumber(100), 1, 100);
        let more: Vec<u32> =
            loaded(&fs).into_iter().filter(|g| !before.contains(g) && *g != at.0).collect();
        assert_eq!(more, [], "loaded again");
        fs.unmount().unwrap();
    }
}
