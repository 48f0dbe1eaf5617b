//! The in-core inode: a file in use.
//!
//! Invariants:
//! - One [`Inode`] per inode number at a time: [`InodeCache`] hands it out.
//! - `core` holds what the raw inode holds; [`Ext4::mark_inode_dirty`] writes it
//!   into the inode table's buffer under a handle. Bytes of the raw inode that
//!   `core` does not know (in-inode attributes, unknown fields) are never touched.
//! - `core.size` is what stat(2) shows, `core.disk_size` what the raw inode says:
//!   it follows when the data up to it has been written, so a crash never shows
//!   a size whose blocks were not written.
//!
//! Locks: see the crate's order. `core` is taken last and never held over
//! anything that waits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use uext_jbd2::{Handle, Tid};
use uext_ondisk::inode::{InodeFlags, RawInode};
use uext_ondisk::{FsBlock, InodeNumber};
use uext_pagecache::{AddressSpace, Buffer};
use uext_vfs::{Attr, FileKind, Timestamp};

use crate::error::{Error, Result};
use crate::fs::Ext4;

/// The attributes of an inode and the root of its block mapping.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    /// Type and permission bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes, as stat(2) shows.
    pub size: u64,
    /// Bytes, as the raw inode says.
    pub disk_size: u64,
    /// Links as the raw inode says; a directory with more than 64,998 subdirectories has 1.
    pub nlink: u16,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    /// Birth, where the inode has room for it.
    pub crtime: Option<Timestamp>,
    pub flags: InodeFlags,
    /// Blocks in units of 512 bytes (`i_blocks`), mapping and attribute blocks included.
    pub blocks: u64,
    /// The external attribute block, 0 for none.
    pub file_acl: FsBlock,
    /// `i_block`: extent root, block map, fast symlink or device number.
    pub i_block: [u8; 60],
    /// `i_dtime`: deletion time, or the next inode of the orphan list.
    pub dtime: u32,
    /// Times changed in memory only; the next handle on the inode writes them.
    pub lazy_dirty: bool,
}

impl Core {
    /// Whether the mapping is an extent tree.
    pub fn is_extents(&self) -> bool {
        self.flags.contains(InodeFlags::EXTENTS)
    }
}

/// A file in use.
pub(crate) struct Inode {
    pub ino: InodeNumber,
    /// Tells this use of the inode number from earlier ones.
    pub generation: u32,
    /// Seed of the checksums of everything that belongs to the inode.
    pub csum_seed: u32,
    pub kind: FileKind,
    pub fs: Weak<Ext4>,
    /// Contents of a directory, size of a file: shared to look, exclusive to change.
    pub rwsem: RwLock<()>,
    /// Held by writeback, and by truncation against it.
    pub writeback: Mutex<()>,
    /// The block mapping: shared to look, exclusive to change.
    pub map: RwLock<()>,
    pub core: Mutex<Core>,
    /// The cached data; empty for anything but regular files.
    pub mapping: Arc<AddressSpace>,
    /// Blocks reserved for delayed data and its mapping [changed with folios locked].
    pub reserved: AtomicU64,
    /// Lookups that a front end owes a forget for [inode cache shard].
    pub lookups: AtomicU64,
    /// The last transaction that changed the inode, and that changed what fdatasync needs.
    /// WHY-RELAXED: read by fsync after its own locks order it behind the change.
    pub sync_tid: AtomicU32,
    pub datasync_tid: AtomicU32,
}

impl Inode {
    /// The filesystem; an inode never outlives its mount in use.
    pub fn fs(&self) -> Result<Arc<Ext4>> {
        self.fs.upgrade().ok_or(Error::Errno(uext_vfs::Errno::EIO))
    }

    /// Notes that a transaction changed the inode; `data` when fdatasync must wait for it too.
    pub fn note_tid(&self, tid: Tid, data: bool) {
        self.sync_tid.store(tid, Ordering::Relaxed);
        if data {
            self.datasync_tid.store(tid, Ordering::Relaxed);
        }
    }
}
