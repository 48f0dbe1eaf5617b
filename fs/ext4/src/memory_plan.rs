//! What becomes of the memory that a mount was given (`cache_size`).
//!
//! The figure is the daemon's, not the pages' alone: what is kept about a page or inode
//! counts too, so that the resident size is the figure and what the program itself takes.
//!
//! Locks: none.

/// Memory of a cached inode, its pages apart, with its places in the maps.
const INODE_BYTES: usize = 1536;
/// Inodes kept at most, however much memory there is.
const MAX_INODES: usize = 32_768;
/// Bitmaps of groups, at least.
const MIN_BITMAP_BYTES: usize = 64 << 10;
/// Inodes kept at least.
const MIN_INODES: usize = 1024;

/// The shares of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// Pages of data and metadata, bytes.
    pub page_bytes: usize,
    /// Inodes.
    pub inodes: usize,
    /// Bitmaps of groups, bytes.
    pub bitmap_bytes: usize,
}

impl MemoryPlan {
    /// Divides `bytes`: an eighth at most is for inodes, a sixty-fourth for bitmaps, and of the
    /// rest an eighth for what is kept about each page (some 250 bytes for one of data, 500 for
    /// one of metadata).
    pub fn of(bytes: usize) -> Self {
        let inodes = (bytes / 8 / INODE_BYTES).clamp(MIN_INODES, MAX_INODES);
        let bitmap_bytes = (bytes / 64).max(MIN_BITMAP_BYTES);
        let rest = bytes.saturating_sub(inodes * INODE_BYTES + bitmap_bytes);
        Self { page_bytes: rest - rest / 8, inodes, bitmap_bytes }
    }

    /// Blocks of the pages that the journal may hold: half of them.
    pub fn journal_blocks(&self, block_size: u32) -> u32 {
        u32::try_from(self.page_bytes / 2 / block_size as usize).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_are_the_whole() {
        for bytes in [0, 1 << 20, 64 << 20, 512 << 20, 8 << 30] {
            let plan = MemoryPlan::of(bytes);
            assert!((MIN_INODES..=MAX_INODES).contains(&plan.inodes));
            let least = MIN_INODES * INODE_BYTES + MIN_BITMAP_BYTES;
            let all = plan.page_bytes + plan.page_bytes / 7 + plan.inodes * INODE_BYTES;
            assert!(all + plan.bitmap_bytes <= bytes.max(least) + 7, "{bytes}: {plan:?}");
            assert!(plan.page_bytes >= bytes / 4 * 3 || bytes < 16 << 20, "{bytes}: {plan:?}");
        }
    }
}
