//! Where everything lies: the geometry, then a place for each group's bitmaps and table.
//!
//! No I/O. The geometry follows mke2fs to the block, so that both make filesystems of
//! equal size and equal counts; the places follow its spirit.
//!
//! Invariant: the superblock of a [`Layout`] passes [`Superblock::from_raw`], and every
//! block that is written or reserved is taken in its [`Space`].

use uext_ondisk::GroupNumber;
use uext_ondisk::checksum::crc32c;
use uext_ondisk::features::{Compat, Incompat, RoCompat};
use uext_ondisk::inode::CURRENT_EXTRA_ISIZE;
use uext_ondisk::superblock::{
    CHECKSUM_TYPE_CRC32C, MAGIC, RawSuperblock, State, SuperFlags, Superblock, max_per_group,
};

use super::error::{MkfsError, Result, usage};
use super::params::Params;
use super::space::Space;

/// Where a group's own metadata lies.
#[derive(Clone, Copy, Debug, Default)]
pub struct GroupPlaces {
    /// The block bitmap.
    pub block_bitmap: u64,
    /// The inode bitmap.
    pub inode_bitmap: u64,
    /// The first block of the inode table.
    pub inode_table: u64,
}

/// A filesystem's plan.
#[derive(Debug)]
pub struct Layout {
    /// The superblock; free counts are set at the end.
    pub sb: Superblock,
    /// Each group's places.
    pub groups: Vec<GroupPlaces>,
    /// What is taken.
    pub space: Space,
}

impl Layout {
    /// Decides the geometry and gives every group its places.
    ///
    /// # Errors
    /// `TooSmall`, or a usage error when the counts asked for cannot be.
    pub fn plan(params: &Params) -> Result<Self> {
        let sb = geometry(params)?;
        let mut layout = Self {
            groups: vec![GroupPlaces::default(); sb.groups_count() as usize],
            space: Space::new(sb.first_data_block().0..sb.blocks_count()),
            sb,
        };
        layout.take_base_metadata();
        let placed = if layout.sb.features().flex_bg() && params.packed_meta {
            layout.place_packed()
        } else if layout.sb.log_groups_per_flex() > 0 {
            layout.place_flex()
        } else {
            layout.place_in_groups(u64::from(params.stride))
        };
        placed.ok_or_else(|| MkfsError::TooSmall("no room for bitmaps and inode tables".into()))?;
        Ok(layout)
    }

    /// Superblocks, descriptors and the blocks reserved for more of them.
    fn take_base_metadata(&mut self) {
        for group in self.sb.groups() {
            let base = u64::from(self.sb.base_meta_blocks(group));
            self.space.take(self.sb.group_first_block(group).0, base);
        }
    }

    /// All block bitmaps, then all inode bitmaps, then all tables, from the start on.
    fn place_packed(&mut self) -> Option<()> {
        let all = 0..self.sb.blocks_count();
        let table_blocks = u64::from(self.sb.inode_table_blocks());
        for group in 0..self.groups.len() {
            self.groups[group].block_bitmap = self.space.take_together(1, [all.clone()])?;
        }
        for group in 0..self.groups.len() {
            self.groups[group].inode_bitmap = self.space.take_together(1, [all.clone()])?;
        }
        for group in 0..self.groups.len() {
            let table = self.space.take_together(table_blocks, [all.clone()])?;
            self.groups[group].inode_table = table;
        }
        Some(())
    }

    /// Per flex group: the block bitmaps, the inode bitmaps and the tables, each together.
    fn place_flex(&mut self) -> Option<()> {
        let per_flex = 1usize << self.sb.log_groups_per_flex();
        let all = self.sb.first_data_block().0..self.sb.blocks_count();
        let table_blocks = u64::from(self.sb.inode_table_blocks());
        for first in (0..self.groups.len()).step_by(per_flex) {
            let end = (first + per_flex).min(self.groups.len());
            let flex_start = self.sb.group_first_block(GroupNumber(first as u32)).0;
            let last = GroupNumber(end as u32 - 1);
            let flex_end =
                self.sb.group_first_block(last).0 + u64::from(self.sb.blocks_in_group(last));
            let flex = flex_start..flex_end;
            let mut next = flex_start;
            let mut take = |space: &mut Space, len: u64| {
                // Behind the one before, else anywhere in the flex group, else anywhere.
                let ranges = [next..flex.end, flex.clone(), all.clone()];
                let start = space.take_together(len, ranges)?;
                next = start + len;
                Some(start)
            };
            for group in first..end {
                self.groups[group].block_bitmap = take(&mut self.space, 1)?;
            }
            for group in first..end {
                self.groups[group].inode_bitmap = take(&mut self.space, 1)?;
            }
            for group in first..end {
                self.groups[group].inode_table = take(&mut self.space, table_blocks)?;
            }
        }
        Some(())
    }

    /// Each group's in itself; with a RAID stride the bitmaps wander over the disks.
    fn place_in_groups(&mut self, stride: u64) -> Option<()> {
        let table_blocks = u64::from(self.sb.inode_table_blocks());
        for group in self.sb.groups() {
            let first = self.sb.group_first_block(group).0;
            let whole = first..first + u64::from(self.sb.blocks_in_group(group));
            let mut from = whole.start;
            if stride > 0 {
                let free = self.space.free_in(whole.clone()).next()?;
                let start = free.start + table_blocks;
                let room = whole.end.saturating_sub(start).max(1);
                from = start + stride * u64::from(group.0) % room;
            }
            let bitmap_ranges = [from..whole.end, whole.clone()];
            let places = GroupPlaces {
                block_bitmap: self.space.take_together(1, bitmap_ranges.clone())?,
                inode_bitmap: self.space.take_together(1, bitmap_ranges)?,
                inode_table: self.space.take_together(table_blocks, [whole])?,
            };
            self.groups[group.0 as usize] = places;
        }
        Some(())
    }

    /// The block after all of a group's blocks.
    pub fn group_end(&self, group: GroupNumber) -> u64 {
        self.sb.group_first_block(group).0 + u64::from(self.sb.blocks_in_group(group))
    }
}

/// The numbers the geometry is made of, while they are still being changed.
struct Counts {
    blocks: u64,
    reserved: u64,
    blocks_per_group: u32,
    inodes_per_group: u32,
    groups: u32,
    reserved_gdt: u32,
    meta_bg: bool,
}

/// Settles block, group and inode counts, and fills in the superblock.
fn geometry(params: &Params) -> Result<Superblock> {
    let bits = params.block_size.ilog2();
    let most = max_per_group(bits);
    let mut counts = Counts {
        blocks: params.blocks,
        reserved: (params.reserved_percent * params.blocks as f64 / 100.0) as u64,
        blocks_per_group: params.blocks_per_group.unwrap_or(most).min(most),
        inodes_per_group: 0,
        groups: 0,
        reserved_gdt: 0,
        meta_bg: params.features.meta_bg(),
    };
    // Each round drops a too short last group or makes groups smaller, so it ends.
    while !settle(params, &mut counts)? {}
    let raw = raw_superblock(params, &counts);
    Ok(Superblock::from_raw(raw)?)
}

/// One round; `true` when nothing had to change.
fn settle(params: &Params, counts: &mut Counts) -> Result<bool> {
    let first = u64::from(params.block_size == 1024);
    let Some(usable) = counts.blocks.checked_sub(first).filter(|&usable| usable > 0) else {
        return Err(MkfsError::TooSmall(format!("{} blocks", counts.blocks)));
    };
    let groups = usable.div_ceil(u64::from(counts.blocks_per_group));
    counts.groups = u32::try_from(groups).map_err(|_| usage(format!("{groups} groups")))?;
    if !settle_inodes(params, counts)? {
        return Ok(false);
    }
    let desc_size = if params.features.bit64() { u32::from(params.desc_size) } else { 32 };
    let desc_blocks = counts.groups.div_ceil(params.block_size / desc_size);
    settle_reserved_gdt(params, counts, desc_size, desc_blocks);
    let table =
        (counts.inodes_per_group * u32::from(params.inode_size)).div_ceil(params.block_size);
    let descs = if counts.meta_bg { 1 } else { desc_blocks };
    if 3 + table + counts.reserved_gdt + descs > counts.blocks_per_group {
        let text = format!("{} inodes per group leave no room for data", counts.inodes_per_group);
        return Err(usage(text));
    }
    // A last group that is too short for its own metadata and some data is given up.
    let rest = usable % u64::from(counts.blocks_per_group);
    let copy = if last_group_has_super(params, counts.groups) {
        1 + descs + counts.reserved_gdt
    } else {
        0
    };
    let needed = u64::from(2 + table + copy);
    if counts.groups == 1 && rest != 0 && rest < needed {
        return Err(MkfsError::TooSmall(format!(
            "{} blocks, {needed} for metadata",
            counts.blocks
        )));
    }
    if rest != 0 && rest < needed + 50 {
        if counts.groups == 1 {
            return Err(MkfsError::TooSmall(format!("{} blocks", counts.blocks)));
        }
        counts.blocks -= rest;
        counts.reserved = (params.reserved_percent * counts.blocks as f64 / 100.0) as u64;
        return Ok(false);
    }
    Ok(true)
}

/// Inodes per group: enough for the count asked for, filling whole blocks and whole bytes.
fn settle_inodes(params: &Params, counts: &mut Counts) -> Result<bool> {
    let bitmap_bits = 8 * params.block_size;
    let per_block = params.block_size / u32::from(params.inode_size);
    let mut per_group = params.inodes.div_ceil(counts.groups);
    if per_group > bitmap_bits {
        if counts.blocks_per_group < 256 + 8 {
            return Err(usage(format!("{} inodes are too many; see -i and -N", params.inodes)));
        }
        counts.blocks_per_group -= 8;
        counts.blocks = params.blocks;
        return Ok(false);
    }
    per_group = per_group.min((1 << 16) - per_block);
    loop {
        let filled = per_group.div_ceil(per_block) * per_block;
        let whole = (filled.max(8)) & !7;
        let total = u64::from(whole) * u64::from(counts.groups);
        if total > u64::from(u32::MAX) {
            per_group -= 1;
        } else if total < 12 {
            per_group += 8;
        } else {
            counts.inodes_per_group = whole;
            return Ok(true);
        }
    }
}

/// Descriptor blocks to reserve so that the filesystem may grow: by default to 1024 times its
/// size. Where descriptors would fill most of a group, they are spread instead.
fn settle_reserved_gdt(params: &Params, counts: &mut Counts, desc_size: u32, desc_blocks: u32) {
    let per_block = u64::from(params.block_size / desc_size);
    let first = u64::from(params.block_size == 1024);
    counts.reserved_gdt = 0;
    if params.features.compat.contains(Compat::RESIZE_INODE) && !counts.meta_bg {
        let limit = u64::from(u32::MAX);
        let grown = params.resize_to.unwrap_or_else(|| counts.blocks.saturating_mul(1024));
        let groups =
            (grown.min(limit).saturating_sub(first)).div_ceil(u64::from(counts.blocks_per_group));
        let blocks = groups.div_ceil(per_block).saturating_sub(u64::from(desc_blocks));
        counts.reserved_gdt = blocks.min(u64::from(params.block_size / 4)) as u32;
    }
    if counts.reserved_gdt + desc_blocks > counts.blocks_per_group / 4 * 3 {
        counts.meta_bg = true;
        counts.reserved_gdt = 0;
    }
}

fn last_group_has_super(params: &Params, groups: u32) -> bool {
    let features = params.features;
    if groups == 1 {
        return true;
    }
    if features.compat.contains(Compat::SPARSE_SUPER2) {
        return if groups == 2 { params.backups >= 1 } else { params.backups >= 2 };
    }
    !features.ro_compat.contains(RoCompat::SPARSE_SUPER)
        || uext_ondisk::geometry::is_sparse_group(GroupNumber(groups - 1))
}

/// The groups of the backups under `sparse_super2`: the second and the last.
fn backup_groups(params: &Params, groups: u32) -> [u32; 2] {
    let last = groups - 1;
    match params.backups.min(last.min(2) as u8) {
        0 => [0, 0],
        1 => [1, 0],
        _ => [1, last],
    }
}

fn raw_superblock(params: &Params, counts: &Counts) -> RawSuperblock {
    let mut raw = RawSuperblock::zeroed();
    let mut features = params.features;
    if counts.meta_bg && !features.meta_bg() {
        features.incompat.insert(Incompat::META_BG);
        features.compat.remove(Compat::RESIZE_INODE);
    }
    raw.s_magic = MAGIC.into();
    raw.s_state = State::VALID.bits().into();
    raw.s_errors = params.errors.to_raw().into();
    raw.s_rev_level = params.revision.into();
    raw.s_log_block_size = (params.block_size.ilog2() - 10).into();
    raw.s_log_cluster_size = raw.s_log_block_size;
    raw.s_first_data_block = u32::from(params.block_size == 1024).into();
    raw.s_blocks_count_lo = (counts.blocks as u32).into();
    raw.s_blocks_count_hi = ((counts.blocks >> 32) as u32).into();
    raw.s_r_blocks_count_lo = (counts.reserved as u32).into();
    raw.s_r_blocks_count_hi = ((counts.reserved >> 32) as u32).into();
    raw.s_blocks_per_group = counts.blocks_per_group.into();
    raw.s_clusters_per_group = counts.blocks_per_group.into();
    raw.s_inodes_per_group = counts.inodes_per_group.into();
    raw.s_inodes_count = (counts.inodes_per_group * counts.groups).into();
    raw.s_max_mnt_count = u16::MAX.into();
    raw.s_default_mount_opts = params.mount_opts.bits().into();
    raw.s_uuid = *params.uuid.as_bytes();
    raw.s_feature_compat = features.compat.bits().into();
    raw.s_feature_incompat = features.incompat.bits().into();
    raw.s_feature_ro_compat = features.ro_compat.bits().into();
    raw.s_reserved_gdt_blocks = (counts.reserved_gdt as u16).into();
    raw.s_raid_stride = params.stride.into();
    raw.s_raid_stripe_width = params.stripe_width.into();
    raw.s_first_ino = if params.revision == 0 { 0 } else { 11 }.into();
    if params.revision > 0 {
        raw.s_inode_size = params.inode_size.into();
    }
    if params.inode_size >= 128 + CURRENT_EXTRA_ISIZE {
        raw.s_min_extra_isize = CURRENT_EXTRA_ISIZE.into();
        raw.s_want_extra_isize = CURRENT_EXTRA_ISIZE.into();
    }
    if features.bit64() {
        raw.s_desc_size = params.desc_size.into();
    }
    if features.flex_bg() {
        raw.s_log_groups_per_flex = params.log_flex;
    }
    if features.compat.contains(Compat::SPARSE_SUPER2) {
        raw.s_backup_bgs = backup_groups(params, counts.groups).map(Into::into);
    }
    if features.metadata_csum() {
        raw.s_checksum_type = CHECKSUM_TYPE_CRC32C;
    }
    if features.incompat.contains(Incompat::CSUM_SEED) {
        raw.s_checksum_seed = crc32c(!0, params.uuid.as_bytes()).into();
    }
    let mut flags = SuperFlags::SIGNED_HASH;
    flags.set(SuperFlags::TEST_FILESYS, params.test_fs);
    raw.s_flags = flags.bits().into();
    // Half MD4, the default of dir_index.
    raw.s_def_hash_version = 1;
    for (word, bytes) in raw.s_hash_seed.iter_mut().zip(params.hash_seed.as_bytes().chunks(4)) {
        *word = bytes.iter().rev().fold(0u32, |word, &b| word << 8 | u32::from(b)).into();
    }
    let ext4 = RoCompat::HUGE_FILE
        | RoCompat::GDT_CSUM
        | RoCompat::DIR_NLINK
        | RoCompat::METADATA_CSUM
        | RoCompat::EXTRA_ISIZE;
    if features.flex_bg() || features.ro_compat.intersects(ext4) {
        raw.s_kbytes_written = 1.into();
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mkfs::options::Options;
    use crate::mkfs::params::{DeviceFacts, Surroundings};
    use clap::Parser as _;

    fn plan(args: &str, mib: u64) -> Layout {
        let words = std::iter::once("mkfs").chain(args.split_whitespace()).chain(["image"]);
        let options = Options::try_parse_from(words).unwrap();
        let facts = DeviceFacts { bytes: mib << 20, logical_block_size: 512 };
        let around = Surroundings { now: 1, uuid: uuid::Uuid::nil(), hash_seed: uuid::Uuid::nil() };
        Layout::plan(&Params::resolve(&options, &facts, &around).unwrap()).unwrap()
    }

    #[test]
    fn small_filesystems_get_small_blocks_and_more_inodes() {
        let small = plan("-t ext4", 64).sb;
        assert_eq!((small.block_size(), small.inodes_count()), (1024, 16384));
        let usual = plan("-t ext4", 1024).sb;
        assert_eq!((usual.block_size(), usual.inodes_count()), (4096, 65536));
    }

    #[test]
    fn flex_groups_pack_their_metadata() {
        let layout = plan("-t ext4", 8192);
        let first: Vec<u64> = layout.groups[..16].iter().map(|g| g.block_bitmap).collect();
        assert!(first.windows(2).all(|pair| pair[1] == pair[0] + 1), "{first:?}");
        assert_eq!(layout.groups[0].inode_bitmap, first[15] + 1);
    }

    #[test]
    fn without_flex_bg_every_group_keeps_its_own() {
        let layout = plan("-t ext2", 1024);
        for group in layout.sb.groups() {
            let range = layout.sb.group_first_block(group).0..layout.group_end(group);
            let places = layout.groups[group.0 as usize];
            assert!(range.contains(&places.block_bitmap) && range.contains(&places.inode_table));
        }
    }

    #[test]
    fn a_last_group_too_short_for_itself_is_given_up() {
        let layout = plan("-t ext2 -b 1024", 9);
        assert_eq!(layout.sb.blocks_count(), 9 * 1024);
        let words = ["mkfs", "-text2", "-b1024", "image", "8200"];
        let options = Options::try_parse_from(words).unwrap();
        let facts = DeviceFacts { bytes: 0, logical_block_size: 512 };
        let around = Surroundings { now: 1, uuid: uuid::Uuid::nil(), hash_seed: uuid::Uuid::nil() };
        let params = Params::resolve(&options, &facts, &around).unwrap();
        assert_eq!(Layout::plan(&params).unwrap().sb.blocks_count(), 8193);
    }
}
