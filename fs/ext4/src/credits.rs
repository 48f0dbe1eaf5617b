//! Journal credits per operation, in one table: the most metadata blocks that a
//! handle may dirty. A handle that runs short is a bug here, never a reason to
//! retry elsewhere.

/// Blocks that mapping one run of data blocks can touch: an insert that splits a
/// full tree (five levels, two nodes each, and a new root), one bitmap and one
/// descriptor for every node and for the data, and the inode.
pub const MAP_BLOCKS: u32 = 5 * 2 + 1 + 2 * (5 + 1) + 1;

/// As [`MAP_BLOCKS`], where one extent becomes three and a leaf is split twice for them.
pub const CONVERT: u32 = MAP_BLOCKS + 1 + 2;

/// The superblock, when the orphan list changes, and the neighbour inode on it; or a block of the
/// orphan file.
pub const ORPHAN: u32 = 2;

/// The superblock.
pub const SUPER: u32 = 1;

/// An attribute change of one inode.
pub const SETATTR: u32 = 1 + 1;

/// The superblock, for the feature that the first file over 2 GiB needs.
pub const LARGE_FILE: u32 = 1;

/// An inode and its place: bitmap, descriptor, table block.
pub const NEW_INODE: u32 = 3;

/// An extended attribute: the inode, the old and the new block, their bitmaps and descriptors.
pub const XATTR: u32 = 1 + 2 + 2 * 2 + 1;

/// A name added to a directory: a split at each of three index levels, a new leaf,
/// and the mapping of every block that is appended.
pub const ADD_ENTRY: u32 = 2 * 4 + 4 * MAP_BLOCKS / 2;

/// A name removed: its leaf and the directory's inode.
pub const DEL_ENTRY: u32 = 2;

/// Creating a file, directory or symlink with inherited ACLs and a security label.
pub const CREATE: u32 = NEW_INODE + ADD_ENTRY + 2 * XATTR + MAP_BLOCKS + 2;

/// Linking, by a second name.
pub const LINK: u32 = ADD_ENTRY + SETATTR + ORPHAN;

/// Removing a name and putting its inode on the orphan list.
pub const UNLINK: u32 = DEL_ENTRY + 2 * SETATTR + ORPHAN;

/// Renaming over an existing name, across directories, with the `..` of a directory.
pub const RENAME: u32 = ADD_ENTRY + 2 * DEL_ENTRY + 4 * SETATTR + 2 * ORPHAN + 1;

/// Blocks of the log for the revokes of a step of truncation, when the blocks it frees went
/// through the journal.
pub const REVOKES: u32 = 4;

/// A step of truncation; longer ones extend or restart their handle.
pub const TRUNCATE: u32 = 5 * 2 + 2 * 8 + SETATTR + ORPHAN + REVOKES;

/// A step of a hole, which may leave two parts of an extent.
pub const PUNCH: u32 = TRUNCATE + CONVERT;
