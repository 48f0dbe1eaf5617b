//! Allocations that find no space, for tests of what follows.
//!
//! Counted is what may fail: a reservation for data, a metadata block, an inode. What was
//! reserved before cannot fail and is not counted.

use std::ops::Range;

use uext_sync::Mutex;
use uext_vfs::Errno;

use crate::error::Result;
use crate::fs::Ext4;

/// The count, and which of them fail.
#[derive(Default)]
pub(crate) struct AllocationFault(Mutex<(u64, Range<u64>)>);

impl AllocationFault {
    /// Counts an allocation.
    ///
    /// # Errors
    /// `ENOSPC` for one that is to fail.
    pub fn strike(&self) -> Result<()> {
        let mut state = self.0.lock();
        state.0 += 1;
        if state.1.contains(&state.0) { Err(Errno::ENOSPC.into()) } else { Ok(()) }
    }
}

impl Ext4 {
    /// Lets allocations find no space, by number, the first from now on being 1: for tests.
    pub fn fail_allocations(&self, which: Range<u64>) {
        *self.allocations.0.lock() = (0, which);
    }

    /// Allocations counted since [`Ext4::fail_allocations`], or the mount.
    pub fn allocations(&self) -> u64 {
        self.allocations.0.lock().0
    }
}
