//! Block groups: descriptors in their buffers, and what is kept of them in memory.
//!
//! Invariants:
//! - The descriptor table's buffers are held for the life of the mount; they are
//!   the truth, [`GroupState`] only speeds up the search.
//! - A descriptor and the bitmap it counts change under the same handle and the
//!   same group lock, so every committed state has them agree.
//!
//! Locks: `Group::state` is the group lock; the buffers' content locks come after it.

use uext_jbd2::Handle;
use uext_ondisk::group_desc::{DescChecksum, GroupDesc, GroupFlags};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{Corrupt, FsBlock, GroupNumber};
use uext_pagecache::{Buffer, BufferCache};
use uext_sync::Mutex;

use crate::error::Result;
use crate::fs::Ext4;
use crate::loaded_maps::LoadedMaps;

/// A descriptor's fields, copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub block_bitmap: FsBlock,
    pub inode_bitmap: FsBlock,
    pub inode_table: FsBlock,
    pub free_blocks: u32,
    pub free_inodes: u32,
    pub used_dirs: u32,
    pub flags: GroupFlags,
}

impl<B: AsRef<[u8]>> From<&GroupDesc<B>> for Desc {
    fn from(desc: &GroupDesc<B>) -> Self {
        Self {
            block_bitmap: desc.block_bitmap(),
            inode_bitmap: desc.inode_bitmap(),
            inode_table: desc.inode_table(),
            free_blocks: desc.free_blocks_count(),
            free_inodes: desc.free_inodes_count(),
            used_dirs: desc.used_dirs_count(),
            flags: desc.flags(),
        }
    }
}

/// What memory knows of a group.
#[derive(Debug, Default)]
pub(crate) struct GroupState {
    /// The block bitmap with claimed and not yet reusable blocks set; loaded when needed, and
    /// dropped when it says what the disk does (see [`crate::loaded_maps`]).
    pub claimed: Option<Box<[u8]>>,
    /// `claimed` was asked for since it was last a candidate for dropping.
    pub claimed_used: bool,
    /// The longest free run of `claimed` when that was dropped; nothing changes until it is
    /// loaded again.
    pub longest_run: Option<u32>,
    /// No bit of `claimed` below this one is zero; the search for blocks starts here.
    pub first_free: u32,
    /// Blocks that may be claimed: zero bits of `claimed`, or the descriptor's count before it is loaded.
    pub free_blocks: u32,
    /// Free inodes, as the descriptor says.
    pub free_inodes: u32,
    /// Directories, as the descriptor says.
    pub used_dirs: u32,
    /// Where the next search for a free inode starts: no inode is free below.
    pub inode_hint: u32,
    /// The bitmaps cannot be trusted: nothing is allocated here.
    pub bad: bool,
}

/// A block group.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// The group lock.
    pub state: Mutex<GroupState>,
}

/// All groups of a filesystem.
pub(crate) struct Groups {
    pub list: Vec<Group>,
    /// Which of them have their `claimed` in memory.
    pub loaded_maps: LoadedMaps,
    tables: Vec<Buffer>,
    checksum: DescChecksum,
}

impl Groups {
    /// Reads and checks every descriptor.
    pub fn load(sb: &Superblock, buffers: &BufferCache, loaded_maps: LoadedMaps) -> Result<Self> {
        let checksum = sb.desc_checksum();
        let mut groups = Self { list: Vec::new(), loaded_maps, tables: Vec::new(), checksum };
        for n in 0..sb.gdt_blocks() {
            groups.tables.push(buffers.bread(sb.descriptor_block(n).0)?);
        }
        for number in sb.groups() {
            let desc = groups.checked(sb, number)?;
            groups.list.push(Group {
                state: Mutex::new(GroupState {
                    free_blocks: desc.free_blocks,
                    free_inodes: desc.free_inodes,
                    used_dirs: desc.used_dirs,
                    ..GroupState::default()
                }),
            });
        }
        Ok(groups)
    }

    /// A copy of a descriptor that was checked.
    pub fn checked(&self, sb: &Superblock, group: GroupNumber) -> Result<Desc> {
        let (table, offset) = sb.descriptor_at(group);
        let buf = &self.tables[table as usize];
        let bytes = buf.read();
        let start = offset as usize;
        let desc = GroupDesc::new(&bytes[start..start + usize::from(sb.desc_size())])?;
        desc.verify(self.checksum, group)?;
        desc.check(sb, group)?;
        Ok(Desc::from(&desc))
    }
}

impl Ext4 {
    /// A copy of a group's descriptor.
    pub(crate) fn desc(&self, group: GroupNumber) -> Result<Desc> {
        let (table, offset) = self.sb.descriptor_at(group);
        let bytes = self.groups.tables[table as usize].read();
        let start = offset as usize;
        let desc = GroupDesc::new(&bytes[start..start + usize::from(self.sb.desc_size())])?;
        Ok(Desc::from(&desc))
    }

    /// A copy of a group's descriptor, byte for byte.
    pub(crate) fn desc_bytes(&self, group: GroupNumber) -> Result<Vec<u8>> {
        let (table, offset) = self.sb.descriptor_at(group);
        let bytes = self.groups.tables[table as usize].read();
        let start = offset as usize;
        Ok(bytes[start..start + usize::from(self.sb.desc_size())].to_vec())
    }

    /// Changes a group's descriptor under a handle, with the group lock held, and seals it.
    pub(crate) fn update_desc(
        &self,
        handle: &Handle,
        group: GroupNumber,
        change: impl FnOnce(&mut GroupDesc<&mut [u8]>),
    ) -> Result<()> {
        let (table, offset) = self.sb.descriptor_at(group);
        let mut bytes = handle.write(&self.groups.tables[table as usize])?;
        let start = offset as usize;
        let slice: &mut [u8] = &mut bytes[start..start + usize::from(self.sb.desc_size())];
        let mut desc = GroupDesc::new(slice)?;
        change(&mut desc);
        desc.seal(self.groups.checksum, group);
        Ok(())
    }

    /// The group's in-memory part.
    pub(crate) fn group(&self, group: GroupNumber) -> Result<&Group> {
        self.groups
            .list
            .get(group.0 as usize)
            .ok_or_else(|| Corrupt::value("group number", group.to_string()).into())
    }

    /// Groups in all.
    pub(crate) fn groups_count(&self) -> u32 {
        self.sb.groups_count()
    }
}
