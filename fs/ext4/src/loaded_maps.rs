//! Which groups have their block bitmap in memory, so that they are not all there in the end:
//! a filesystem of 16 TiB has 512 MiB of them.
//!
//! A bitmap is dropped when it says what the disk does: nothing in it is claimed, or freed by
//! a transaction that has not committed. Bits set on the disk are set in it always, so it is
//! the same when both have as many free. What is not, is no cache, and stays.
//!
//! Invariants:
//! - A group is in the list once, from when its bitmap is loaded until it is dropped.
//!
//! Locks: the list's, after a group's lock. Who drops holds no group lock before.

use std::collections::VecDeque;

use uext_ondisk::GroupNumber;
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
            } else {
                state.claimed = None;
            }
        }
        Ok(())
    }
}
