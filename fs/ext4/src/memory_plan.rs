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
/// Inodes kept at least.
const MIN_INODES: usize = 1024;

/// The shares of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// Pages of data and metadata, bytes.
    pub page_bytes: usize,
    /// Inodes.
    pub inodes: usize,
}

impl MemoryPlan {
    /// Divides `bytes`: an eighth at most is for inodes, and of the rest an eighth for what is
    /// kept about each page (some 250 bytes for one of data, 500 for one of metadata).
    pub fn of(bytes: usize) -> Self {
        let inodes = (bytes / 8 / INODE_BYTES).clamp(MIN_INODES, MAX_INODES);
        let rest = bytes.saturating_sub(inodes * INODE_BYTES);
        Self { page_bytes: rest - rest / 8, inodes }
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
            let all = plan.page_bytes + plan.page_bytes / 7 + plan.inodes * INODE_BYTES;
            assert!(all <= bytes.max(MIN_INODES * INODE_BYTES) + 7, "{bytes}: {plan:?}");
            assert!(plan.page_bytes >= bytes / 4 * 3 || bytes < 16 << 20, "{bytes}: {plan:?}");
        }
    }
}
