//! ext2, ext3 and ext4.
//!
//! One filesystem for all three: what an image has is in its feature flags, not
//! in a type. [`Ext4`] is the mounted filesystem, [`inode::Inode`] a file in use.
//!
//! How data and metadata keep their order: file data is written to blocks that
//! are claimed in memory only, and when that write has completed, a journal
//! handle marks the blocks used and maps them. So no committed transaction ever
//! refers to data that is not on its way to the disk, and stale blocks never show,
//! whatever the journal mode. Journalled data (`data=journal`) goes into the transaction
//! that maps it instead. Blocks freed by a transaction stay claimed in memory
//! until it has committed, so nothing overwrites data that a crash would bring back.
//!
//! Lock order, outermost first:
//! 1. `Ext4::rename` (renames across directories)
//! 2. `Inode::rwsem` (directories before their children, else by number)
//! 3. `FileData::large_write` (a large write against a sync), then `Inode::writeback`
//!    (writeback against truncate)
//! 4. journal handle start (waiting for a commit counts as a lock)
//! 5. `Inode::map` (block mapping)
//! 6. `Ext4::orphans`
//! 7. `Group` (allocation)
//! 8. folio content lock; buffer content lock
//! 9. `Inode::core` (attributes; never held over anything that waits)
//! 10. inode cache shard
//!
//! A thread that blocks on a second directory's `rwsem` holds `Ext4::rename`; without
//! it, it only tries and starts over with the mutex, so directories that name each
//! other cannot lock each other out.
//!
//! No handle is started, and no `map` lock taken for writing, while a buffer's content
//! lock is held. Writeback alone holds folios (shared) across both, until their blocks
//! are mapped; so whoever holds a handle, or `map` exclusively, never waits for a folio
//! of a regular file. A reader that fills a folio may take `map` shared.
#![forbid(unsafe_code)]

pub mod error;
pub mod options;

mod acl;
mod alloc_fault;
mod balloc;
mod batch;
mod credits;
mod delayed;
mod dir;
mod errors;
mod extents;
mod extents_remove;
mod extents_shift;
mod fallocate;
mod fiemap;
mod file;
mod fs;
mod fsync;
mod gate;
mod groups;
mod htree;
mod ialloc;
mod indirect;
mod inline;
mod inode;
mod inode_cache;
mod ioctl;
mod journal_data;
mod journal_inode;
mod journal_place;
mod last_search;
mod listings;
mod loaded_maps;
mod lookups;
mod map_blocks;
mod map_io;
mod memory_plan;
mod mount;
mod namei;
mod orphan;
mod orphan_file;
mod past_cache;
mod quiet;
mod read_ahead;
mod readdir;
mod rename;
mod replay;
mod shift;
mod super_source;
mod symlink;
mod system_zone;
#[cfg(test)]
mod test_image;
mod trim;
mod truncate;
mod vfs_impl;
mod writeback;
mod writeback_group;
mod xattr;
mod xattr_share;

pub use error::{Error, Result};
pub use fs::Ext4;
pub use gate::MountError;
pub use options::{AtimePolicy, DataMode, ErrorsPolicy, MountOptions};
