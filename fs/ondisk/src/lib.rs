//! The ext2, ext3, ext4 and jbd2 formats: codecs without I/O.
//!
//! Everything here turns bytes into checked values and edits bytes in place.
//! Nothing here reads a disk, allocates from an on-disk number that was not
//! checked first, or panics on any input.
//!
//! Invariants:
//! - Raw structures (`RawSuperblock`, `RawInode`, …) are `#[repr(C)]`, unaligned
//!   and carry their byte order in the type; their fields keep Linux's names.
//!   They are edited in place, so fields this crate does not know survive.
//! - Checked types (`Superblock`, …) are parsed once; code past that point does
//!   not check again.
//! - Corruption is an [`error::Corrupt`] that says where.
#![forbid(unsafe_code)]

pub mod acl;
pub mod bitmap;
pub mod checksum;
pub mod dir_entry;
pub mod dirhash;
pub mod error;
pub mod extent;
pub mod fast_commit;
pub mod features;
#[doc(hidden)]
pub mod fuzzing;
pub mod geometry;
pub mod group_desc;
pub mod htree;
pub mod indirect;
pub mod inode;
pub mod jbd2;
pub mod orphan_file;
pub mod superblock;
pub mod units;
pub mod xattr;

pub use error::{Corrupt, Result};
pub use units::{FsBlock, GroupNumber, InodeNumber, LogicalBlock};
