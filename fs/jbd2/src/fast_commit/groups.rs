//! Bitmaps, descriptors and counters of the groups that fast commits touch.
//!
//! Invariants:
//! - A block that is taken was free in the bitmap, once everything that was freed is: two owners
//!   of a block are damage, found before anything is written.
//! - What is allocated here was free before the first record and is named by no record.
//! - Free counts change by what changed in the bitmaps, so that they stay as exact as they were.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use uext_ondisk::group_desc::{GroupDesc, GroupFlags};
use uext_ondisk::superblock::Superblock;
use uext_ondisk::{Corrupt, FsBlock, GroupNumber, InodeNumber, bitmap};

use super::view::View;
use crate::error::{JournalError, Result};

const WHAT: &str = "fast commit";

/// A bitmap as it was and as it becomes.
struct Bitmap {
    base: Vec<u8>,
    now: Vec<u8>,
}

struct Blocks {
    map: Bitmap,
    /// In use before, named by a record, or allocated here.
    busy: Vec<u8>,
}

struct Group {
    desc: Vec<u8>,
    blocks: Option<Blocks>,
    inodes: Option<Bitmap>,
    /// Directories more (or fewer) than before.
    dirs: i64,
    /// Inodes of the table that are no longer unused, from its start.
    table_used: u32,
}

pub(super) struct Groups {
    loaded: BTreeMap<u32, Group>,
    /// Ranges that records map, first block to the block behind the last.
    named: BTreeMap<u64, u64>,
}

impl Groups {
    /// `named` are the ranges records map, which must not be allocated.
    pub(super) fn new(named: impl Iterator<Item = (FsBlock, u32)>) -> Self {
        let mut ranges = BTreeMap::new();
        for (start, count) in named {
            let end: &mut u64 = ranges.entry(start.0).or_default();
            *end = (*end).max(start.0.saturating_add(count.into()));
        }
        Self { loaded: BTreeMap::new(), named: ranges }
    }

    fn group(&mut self, view: &mut View<'_>, sb: &Superblock, number: u32) -> Result<&mut Group> {
        match self.loaded.entry(number) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let (block, offset) = sb.descriptor_at(GroupNumber(number));
                let bytes = view.read(sb.descriptor_block(block))?;
                let (start, size) = (offset as usize, usize::from(sb.desc_size()));
                let desc = bytes.get(start..start + size).unwrap_or_default().to_vec();
                let checked = GroupDesc::new(&desc[..])?;
                checked.verify(sb.desc_checksum(), GroupNumber(number))?;
                checked.check(sb, GroupNumber(number))?;
                let group = Group { desc, blocks: None, inodes: None, dirs: 0, table_used: 0 };
                Ok(entry.insert(group))
            }
        }
    }

    /// The first block of a group's inode table.
    pub(super) fn inode_table(
        &mut self,
        view: &mut View<'_>,
        sb: &Superblock,
        group: GroupNumber,
    ) -> Result<FsBlock> {
        let group = self.group(view, sb, group.0)?;
        Ok(GroupDesc::new(&group.desc[..])?.inode_table())
    }

    fn blocks(&mut self, view: &mut View<'_>, sb: &Superblock, number: u32) -> Result<&mut Blocks> {
        let loaded = self.group(view, sb, number)?;
        if loaded.blocks.is_none() {
            let group = GroupNumber(number);
            let desc = GroupDesc::new(&loaded.desc[..])?;
            let mut base = view.read(desc.block_bitmap())?;
            if has_flag(sb, &desc, GroupFlags::BLOCK_UNINIT) {
                sb.fill_uninit_block_bitmap(group, &desc, &mut base);
            } else {
                desc.verify_block_bitmap(sb, group, &base)?;
            }
            let mut busy = base.clone();
            let first = sb.group_first_block(group).0;
            let end = first + u64::from(sb.blocks_in_group(group));
            for (&start, &stop) in self.named.range(..end) {
                let (from, to) = (start.max(first), stop.min(end));
                if from < to {
                    bitmap::set_range(&mut busy, low(from - first), low(to - from));
                }
            }
            let map = Bitmap { now: base.clone(), base };
            self.loaded.get_mut(&number).expect("loaded above").blocks = Some(Blocks { map, busy });
        }
        let group = self.loaded.get_mut(&number).expect("loaded above");
        Ok(group.blocks.as_mut().expect("loaded above"))
    }

    fn inodes(&mut self, view: &mut View<'_>, sb: &Superblock, number: u32) -> Result<&mut Bitmap> {
        let loaded = self.group(view, sb, number)?;
        if loaded.inodes.is_none() {
            let desc = GroupDesc::new(&loaded.desc[..])?;
            let mut base = view.read(desc.inode_bitmap())?;
            if has_flag(sb, &desc, GroupFlags::INODE_UNINIT) {
                sb.fill_uninit_inode_bitmap(&mut base);
            } else {
                desc.verify_inode_bitmap(sb, GroupNumber(number), &base)?;
            }
            loaded.inodes = Some(Bitmap { now: base.clone(), base });
        }
        let group = self.loaded.get_mut(&number).expect("loaded above");
        Ok(group.inodes.as_mut().expect("loaded above"))
    }

    /// Whether an inode is in use.
    pub(super) fn inode_in_use(
        &mut self,
        view: &mut View<'_>,
        sb: &Superblock,
        ino: InodeNumber,
    ) -> Result<bool> {
        let place = location(sb, ino)?;
        let map = self.inodes(view, sb, place.0.0)?;
        Ok(bitmap::test(&map.now, place.1))
    }

    /// Notes what became of an inode: whether it is in use, and how many directories more.
    pub(super) fn set_inode(
        &mut self,
        view: &mut View<'_>,
        sb: &Superblock,
        ino: InodeNumber,
        (in_use, dirs): (bool, i64),
    ) -> Result<()> {
        let (group, index) = location(sb, ino)?;
        let map = self.inodes(view, sb, group.0)?;
        if in_use {
            bitmap::set(&mut map.now, index);
            // The table is in use now: the block bitmap must be one that was written.
            self.blocks(view, sb, group.0)?;
        } else {
            bitmap::clear(&mut map.now, index);
        }
        let loaded = self.group(view, sb, group.0)?;
        loaded.dirs += dirs;
        if in_use {
            loaded.table_used = loaded.table_used.max(index + 1);
        }
        Ok(())
    }

    /// Takes a free block, near a group.
    pub(super) fn allocate(
        &mut self,
        view: &mut View<'_>,
        sb: &Superblock,
        near: GroupNumber,
    ) -> Result<FsBlock> {
        let count = sb.groups_count();
        for step in 0..count {
            let number = u32::try_from((u64::from(near.0) + u64::from(step)) % u64::from(count))
                .unwrap_or(0);
            let group = self.group(view, sb, number)?;
            if GroupDesc::new(&group.desc[..])?.free_blocks_count() == 0 {
                continue;
            }
            let bits = sb.blocks_in_group(GroupNumber(number));
            let blocks = self.blocks(view, sb, number)?;
            if let Some(bit) = bitmap::find_next_zero(&blocks.busy, 0, bits) {
                bitmap::set(&mut blocks.busy, bit);
                return Ok(sb.group_first_block(GroupNumber(number)) + u64::from(bit));
            }
        }
        let text = "no space to apply the journal's fast commits: run e2fsck";
        Err(JournalError::Unsupported(text.into()))
    }

    /// Frees blocks, or with `take` marks them as in use.
    ///
    /// # Errors
    /// Blocks that are taken and in use already, or that lie outside.
    pub(super) fn change(
        &mut self,
        view: &mut View<'_>,
        sb: &Superblock,
        (mut start, mut count): (u64, u64),
        take: bool,
    ) -> Result<()> {
        let place = |detail| Corrupt::value(WHAT, detail).in_block(FsBlock(start));
        if !sb.is_fs_range(FsBlock(start), count) {
            return Err(place(format!("{count} blocks lie outside the filesystem")).into());
        }
        let in_use = place(format!("some of {count} blocks it maps have another owner"));
        while count > 0 {
            let (group, bit) = sb
                .group_and_offset(FsBlock(start))
                .ok_or_else(|| Corrupt::value(WHAT, "block in no group"))?;
            let here = count.min(u64::from(sb.blocks_in_group(group) - bit));
            let map = &mut self.blocks(view, sb, group.0)?.map.now;
            if !take {
                bitmap::clear_range(map, bit, low(here));
            } else if bitmap::is_range_clear(map, bit, low(here)) {
                bitmap::set_range(map, bit, low(here));
            } else {
                return Err(in_use.into());
            }
            start += here;
            count -= here;
        }
        Ok(())
    }

    /// Writes bitmaps, descriptors and the superblock's counts.
    pub(super) fn write(&self, view: &mut View<'_>, sb: &Superblock) -> Result<()> {
        let (mut blocks, mut inodes) = (0i64, 0i64);
        for (&number, group) in &self.loaded {
            let (more_blocks, more_inodes) = write_group(view, sb, number, group)?;
            blocks += more_blocks;
            inodes += more_inodes;
        }
        if blocks == 0 && inodes == 0 {
            return Ok(());
        }
        self.write_totals(view, sb)
    }

    /// The superblock's counts: a sum over all groups, since the kernel lets them lie.
    fn write_totals(&self, view: &mut View<'_>, sb: &Superblock) -> Result<()> {
        let (mut free_blocks, mut free_inodes) = (0u64, 0u32);
        let (mut held, mut bytes) = (None, Vec::new());
        for group in sb.groups() {
            let (block, offset) = sb.descriptor_at(group);
            if held != Some(block) {
                bytes = view.read(sb.descriptor_block(block))?;
                held = Some(block);
            }
            let (start, size) = (offset as usize, usize::from(sb.desc_size()));
            let desc = GroupDesc::new(bytes.get(start..start + size).unwrap_or_default())?;
            free_blocks = free_blocks.saturating_add(desc.free_blocks_count().into());
            free_inodes = free_inodes.saturating_add(desc.free_inodes_count());
        }
        let mut sb = sb.clone();
        sb.set_free_blocks_count(free_blocks);
        sb.set_free_inodes_count(free_inodes);
        let home = sb.super_block();
        let mut bytes = view.read(home)?;
        let at = super::offset_in_block(bytes.len());
        let sealed = sb.sealed_bytes();
        bytes[at..at + sealed.len()].copy_from_slice(sealed);
        view.write(home, bytes);
        Ok(())
    }
}

/// Writes a group's bitmaps and descriptor; how many free blocks and inodes it has more.
fn write_group(
    view: &mut View<'_>,
    sb: &Superblock,
    number: u32,
    group: &Group,
) -> Result<(i64, i64)> {
    let wrong =
        |what| Corrupt::value("group descriptor", format!("{what} does not fit what changed"));
    let number = GroupNumber(number);
    let mut bytes = group.desc.clone();
    let mut desc = GroupDesc::new(&mut bytes[..])?;
    let mut flags = desc.flags();
    let (mut more_blocks, mut more_inodes) = (0, 0);
    if let Some(Blocks { map, .. }) = &group.blocks {
        let bits = sb.blocks_in_group(number);
        more_blocks = difference(map, bits);
        let free = i64::from(desc.free_blocks_count()) + more_blocks;
        let free = u32::try_from(free).ok().filter(|&free| free <= bits);
        desc.set_free_blocks_count(free.ok_or_else(|| wrong("bg_free_blocks_count"))?);
        flags.remove(GroupFlags::BLOCK_UNINIT);
        desc.seal_block_bitmap(sb, &map.now);
        view.write(desc.block_bitmap(), map.now.clone());
    }
    if let Some(map) = group.inodes.as_ref().filter(|map| map.now != map.base) {
        let bits = sb.inodes_per_group();
        more_inodes = difference(map, bits);
        let free = i64::from(desc.free_inodes_count()) + more_inodes;
        let free = u32::try_from(free).ok().filter(|&free| free <= bits);
        desc.set_free_inodes_count(free.ok_or_else(|| wrong("bg_free_inodes_count"))?);
        flags.remove(GroupFlags::INODE_UNINIT);
        desc.seal_inode_bitmap(sb, &map.now);
        view.write(desc.inode_bitmap(), map.now.clone());
    }
    let dirs = u32::try_from(i64::from(desc.used_dirs_count()) + group.dirs);
    desc.set_used_dirs_count(dirs.map_err(|_| wrong("bg_used_dirs_count"))?);
    if sb.features().group_desc_csum() {
        desc.set_flags(flags);
        let unused = desc.itable_unused().min(sb.inodes_per_group() - group.table_used);
        desc.set_itable_unused(unused);
    }
    desc.seal(sb.desc_checksum(), number);
    let (block, offset) = sb.descriptor_at(number);
    let home = sb.descriptor_block(block);
    let mut table = view.read(home)?;
    let start = offset as usize;
    table[start..start + bytes.len()].copy_from_slice(&bytes);
    view.write(home, table);
    Ok((more_blocks, more_inodes))
}

/// Clear bits more than before.
fn difference(map: &Bitmap, bits: u32) -> i64 {
    i64::from(bitmap::count_zero(&map.now, bits)) - i64::from(bitmap::count_zero(&map.base, bits))
}

fn has_flag<B: AsRef<[u8]>>(sb: &Superblock, desc: &GroupDesc<B>, flag: GroupFlags) -> bool {
    sb.features().group_desc_csum() && desc.flags().contains(flag)
}

fn location(sb: &Superblock, ino: InodeNumber) -> Result<(GroupNumber, u32)> {
    let place = sb.check_inode(ino).ok().and_then(|ino| sb.inode_location(ino));
    let place = place.ok_or_else(|| Corrupt::value(WHAT, format!("there is no inode {ino}")))?;
    Ok((place.group, place.index))
}

/// Within a group, whose bits are counted in 32 bits.
fn low(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
