//! How a journal is run.

use std::time::Duration;

/// Options of a running journal.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// A transaction is committed when it is this old.
    pub commit_interval: Duration,
    /// Flush the devices where durability needs it. Off only for throw-away images.
    pub barrier: bool,
    /// csum v3 in the log; what the filesystem's `metadata_csum` says.
    pub csum_v3: bool,
    /// 64-bit block numbers in the log; what the filesystem's `64bit` says.
    pub wide: bool,
    /// Blocks that transactions keep in memory, running, committing and not yet home: a
    /// quarter of them at most in one transaction.
    pub cached_blocks: u32,
    /// Run the background thread: timed commits and early checkpoints. Tests that
    /// need every write in order switch it off.
    pub background: bool,
    /// Every handle is a transaction of its own. For tests: whatever lies on the disk between
    /// two handles of one operation is then met by a power cut.
    pub commit_each_handle: bool,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self {
            commit_interval: Duration::from_secs(5),
            barrier: true,
            csum_v3: true,
            wide: true,
            cached_blocks: u32::MAX,
            background: true,
            commit_each_handle: false,
        }
    }
}
