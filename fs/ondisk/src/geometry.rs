//! Where things lie: arithmetic on a checked superblock, no I/O.
//!
//! Source: Documentation/filesystems/ext4/blockgroup.rst and group_descr.rst.
//!
//! The arithmetic cannot overflow: [`Superblock`]'s invariants bound every operand.
//! What takes a group or block number asserts that it is in range; numbers from the
//! disk are checked first ([`Superblock::group_of_block`], [`Superblock::check_inode`]).

use crate::bitmap;
use crate::error::{Corrupt, Result};
use crate::features::{Compat, RoCompat};
use crate::group_desc::GroupDesc;
use crate::superblock::{SUPERBLOCK_OFFSET, Superblock, max_per_group};
use crate::units::{FsBlock, GroupNumber, InodeNumber};

/// Where an inode lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeLocation {
    /// Its group.
    pub group: GroupNumber,
    /// Its index in the group's inode bitmap and table.
    pub index: u32,
    /// The block of the group's inode table it lies in, from the table's start.
    pub table_block: u32,
    /// Bytes from the start of that block.
    pub offset: u32,
}

/// A place where a backup superblock may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupPlace {
    /// The block size this place belongs to.
    pub block_size: u32,
    /// The group.
    pub group: GroupNumber,
    /// Bytes from the start of the device.
    pub byte_offset: u64,
}

impl Superblock {
    /// The group of a block, `None` before the first or past the last.
    pub fn group_of_block(&self, block: FsBlock) -> Option<GroupNumber> {
        self.is_fs_block(block).then(|| {
            let index = (block.0 - self.first_data_block().0) / u64::from(self.blocks_per_group());
            GroupNumber(index as u32)
        })
    }

    /// The group of a block and the block's index in the group.
    pub fn group_and_offset(&self, block: FsBlock) -> Option<(GroupNumber, u32)> {
        let group = self.group_of_block(block)?;
        Some((group, (block.0 - self.group_first_block(group).0) as u32))
    }

    /// The group of a block and the bit of its cluster in the group's block bitmap.
    pub fn group_and_bit(&self, block: FsBlock) -> Option<(GroupNumber, u32)> {
        let (group, offset) = self.group_and_offset(block)?;
        Some((group, offset >> self.cluster_ratio_bits()))
    }

    /// Whether the block lies in the filesystem, from the first data block on.
    pub fn is_fs_block(&self, block: FsBlock) -> bool {
        self.first_data_block() <= block && block.0 < self.blocks_count()
    }

    /// Whether all `count` blocks from `start` lie in the filesystem.
    pub fn is_fs_range(&self, start: FsBlock, count: u64) -> bool {
        let end = start.0.checked_add(count);
        self.first_data_block() <= start && end.is_some_and(|end| end <= self.blocks_count())
    }

    /// The first block of a group.
    pub fn group_first_block(&self, group: GroupNumber) -> FsBlock {
        let offset = u64::from(group.0) * u64::from(self.blocks_per_group());
        FsBlock(self.first_data_block().0 + offset)
    }

    /// Blocks in a group; the last one may be shorter.
    ///
    /// # Panics
    /// When there is no such group.
    pub fn blocks_in_group(&self, group: GroupNumber) -> u32 {
        assert!(group.0 < self.groups_count(), "group {group} of {}", self.groups_count());
        let left = self.blocks_count() - self.group_first_block(group).0;
        left.min(u64::from(self.blocks_per_group())) as u32
    }

    /// Clusters in a group, the bits of its block bitmap that mean something.
    pub fn clusters_in_group(&self, group: GroupNumber) -> u32 {
        self.blocks_in_group(group).div_ceil(self.cluster_ratio())
    }

    /// All group numbers.
    pub fn groups(&self) -> impl DoubleEndedIterator<Item = GroupNumber> + use<> {
        (0..self.groups_count()).map(GroupNumber)
    }

    /// The inode number when it exists.
    ///
    /// # Errors
    /// `Value` when it is 0 or past the last.
    pub fn check_inode(&self, inode: InodeNumber) -> Result<InodeNumber> {
        if inode.0 == 0 || inode.0 > self.inodes_count() {
            let detail = format!("{inode} is not in 1..={}", self.inodes_count());
            return Err(Corrupt::value("inode number", detail));
        }
        Ok(inode)
    }

    /// Where an inode lies; `None` when there is no such inode.
    pub fn inode_location(&self, inode: InodeNumber) -> Option<InodeLocation> {
        if inode.0 > self.inodes_count() {
            return None;
        }
        let zero_based = inode.0.checked_sub(1)?;
        let index = zero_based % self.inodes_per_group();
        let byte = u64::from(index) * u64::from(self.inode_size());
        Some(InodeLocation {
            group: GroupNumber(zero_based / self.inodes_per_group()),
            index,
            table_block: (byte >> self.block_size_bits()) as u32,
            offset: (byte & u64::from(self.block_size() - 1)) as u32,
        })
    }

    /// The inode at an index of a group's table.
    pub fn inode_number(&self, group: GroupNumber, index: u32) -> InodeNumber {
        InodeNumber(group.0 * self.inodes_per_group() + index + 1)
    }

    /// Inodes in a block of an inode table.
    pub fn inodes_per_block(&self) -> u32 {
        self.block_size() / u32::from(self.inode_size())
    }

    /// Blocks of a group's inode table.
    pub fn inode_table_blocks(&self) -> u32 {
        self.inodes_per_group().div_ceil(self.inodes_per_block())
    }

    /// Descriptors in a block.
    pub fn descs_per_block(&self) -> u32 {
        self.block_size() / u32::from(self.desc_size())
    }

    /// Blocks of descriptors, each counted once.
    pub fn gdt_blocks(&self) -> u32 {
        self.groups_count().div_ceil(self.descs_per_block())
    }

    /// The block of descriptors a group's descriptor is in, and its byte offset there.
    pub fn descriptor_at(&self, group: GroupNumber) -> (u32, u32) {
        let per_block = self.descs_per_block();
        (group.0 / per_block, group.0 % per_block * u32::from(self.desc_size()))
    }

    /// The block the primary superblock lies in.
    pub fn super_block(&self) -> FsBlock {
        FsBlock(SUPERBLOCK_OFFSET >> self.block_size_bits())
    }

    /// Whether descriptor block `n` is placed by `meta_bg`.
    fn is_meta_bg_desc(&self, n: u32) -> bool {
        self.features().meta_bg() && n >= self.first_meta_bg()
    }

    /// Where the primary copy of descriptor block `n` lies.
    pub fn descriptor_block(&self, n: u32) -> FsBlock {
        if !self.is_meta_bg_desc(n) {
            return self.super_block() + 1 + u64::from(n);
        }
        let group = GroupNumber(n.saturating_mul(self.descs_per_block()));
        self.after_super(group)
    }

    /// Where the copy of descriptor block `n` lies that belongs to the backup superblock in
    /// `group`; for a block placed by `meta_bg` the copy in the second or last of its groups.
    pub fn descriptor_backup_block(&self, n: u32, group: GroupNumber) -> Option<FsBlock> {
        if !self.is_meta_bg_desc(n) {
            let copies = self.has_super(group) && group.0 != 0;
            return copies.then(|| self.after_super(group) + u64::from(n));
        }
        let first = n.saturating_mul(self.descs_per_block());
        let last = first.saturating_add(self.descs_per_block() - 1);
        let holds = (group.0 == first.saturating_add(1) || group.0 == last)
            && group.0 < self.groups_count()
            && group.0 != first;
        holds.then(|| self.after_super(group))
    }

    /// The first block of a group after its superblock, if it has one.
    fn after_super(&self, group: GroupNumber) -> FsBlock {
        // With 1 KiB blocks and first data block 0 (bigalloc) the superblock is block 1.
        let boot_block =
            group.0 == 0 && self.block_size() == 1024 && self.first_data_block().0 == 0;
        let blocks = u64::from(self.has_super(group)) + u64::from(boot_block);
        self.group_first_block(group) + blocks
    }

    /// Whether a group starts with a superblock (group 0 always).
    pub fn has_super(&self, group: GroupNumber) -> bool {
        let features = self.features();
        if group.0 == 0 {
            return true;
        }
        if features.compat.contains(Compat::SPARSE_SUPER2) {
            return self.backup_bgs().contains(&group.0);
        }
        !features.ro_compat.contains(RoCompat::SPARSE_SUPER) || is_sparse_group(group)
    }

    /// Groups with a backup superblock, in order.
    pub fn backup_groups(&self) -> impl Iterator<Item = GroupNumber> + '_ {
        self.groups().skip(1).filter(|&group| self.has_super(group))
    }

    /// Descriptor blocks that lie at the start of a group.
    pub fn gdt_blocks_in_group(&self, group: GroupNumber) -> u32 {
        let meta_bg = self.features().meta_bg();
        let meta_group = group.0 / self.descs_per_block();
        if meta_bg && meta_group >= self.first_meta_bg() {
            let in_meta = group.0 % self.descs_per_block();
            let last = self.descs_per_block() - 1;
            return u32::from(in_meta <= 1 || in_meta == last);
        }
        match self.has_super(group) {
            false => 0,
            true if meta_bg => self.first_meta_bg(),
            true => self.gdt_blocks(),
        }
    }

    /// Blocks at the start of a group that hold superblock, descriptors and the blocks
    /// reserved for more descriptors.
    pub fn base_meta_blocks(&self, group: GroupNumber) -> u32 {
        let super_block = u32::from(self.has_super(group));
        // The boot block of a 1 KiB bigalloc filesystem counts into group 0.
        let boot =
            u32::from(group.0 == 0 && self.block_size() == 1024 && self.first_data_block().0 == 0);
        let spread =
            self.features().meta_bg() && group.0 / self.descs_per_block() >= self.first_meta_bg();
        let reserved =
            if self.has_super(group) && !spread { self.reserved_gdt_blocks() } else { 0 };
        boot + super_block + self.gdt_blocks_in_group(group) + reserved
    }

    /// Bytes of a block bitmap its checksum covers.
    pub fn block_bitmap_bytes(&self) -> usize {
        (self.clusters_per_group() / 8) as usize
    }

    /// Bytes of an inode bitmap its checksum covers.
    pub fn inode_bitmap_bytes(&self) -> usize {
        (self.inodes_per_group() / 8) as usize
    }
}

impl Superblock {
    /// Fills in the block bitmap of a group whose descriptor says `BLOCK_UNINIT`: what the
    /// descriptor names in the group, the group's superblock and descriptors, and the bits
    /// past its end are in use.
    ///
    /// # Panics
    /// When `map` is shorter than a block.
    pub fn fill_uninit_block_bitmap<B: AsRef<[u8]>>(
        &self,
        group: GroupNumber,
        desc: &GroupDesc<B>,
        map: &mut [u8],
    ) {
        map.fill(0);
        let bits = self.block_size() * 8;
        let base = self.base_meta_blocks(group).div_ceil(self.cluster_ratio());
        bitmap::set_range(map, 0, base.min(bits));
        let table = u64::from(self.inode_table_blocks());
        for (start, count) in
            [(desc.block_bitmap(), 1), (desc.inode_bitmap(), 1), (desc.inode_table(), table)]
        {
            let first = self.group_first_block(group).0;
            let end = first + u64::from(self.blocks_in_group(group));
            // Under flex_bg any part of these may lie in another group.
            let from = start.0.max(first);
            let to = start.0.saturating_add(count).min(end);
            if from < to {
                let low = ((from - first) >> self.cluster_ratio_bits()) as u32;
                let high = ((to - 1 - first) >> self.cluster_ratio_bits()) as u32;
                bitmap::set_range(map, low, high - low + 1);
            }
        }
        let end = self.clusters_in_group(group);
        bitmap::set_range(map, end, bits - end);
    }

    /// Fills in the inode bitmap of a group whose descriptor says `INODE_UNINIT`: only the
    /// bits past its end are in use.
    ///
    /// # Panics
    /// When `map` is shorter than a block.
    pub fn fill_uninit_inode_bitmap(&self, map: &mut [u8]) {
        map.fill(0);
        let inodes = self.inodes_per_group();
        bitmap::set_range(map, inodes, self.block_size() * 8 - inodes);
    }
}

/// Whether `sparse_super` keeps a backup in the group: 0, 1 and powers of 3, 5 and 7.
pub fn is_sparse_group(group: GroupNumber) -> bool {
    let is_power = |base: u32| {
        let mut rest = group.0;
        while rest > 1 && rest.is_multiple_of(base) {
            rest /= base;
        }
        rest == 1
    };
    group.0 <= 1 || is_power(3) || is_power(5) || is_power(7)
}

/// Where backups may lie on a device whose superblock is unreadable: for each block size,
/// the first `per_size` groups that `sparse_super` keeps, taking full groups.
pub fn backup_places(device_bytes: u64, per_size: usize) -> Vec<BackupPlace> {
    let mut places = Vec::new();
    for bits in 10..=16u32 {
        let block_size = 1u32 << bits;
        let first = u64::from(block_size == 1024);
        let group_bytes = u64::from(block_size) * u64::from(max_per_group(bits));
        let groups = (1..=u32::MAX).map(GroupNumber).filter(|&group| is_sparse_group(group));
        places.extend(
            groups
                .map(|group| BackupPlace {
                    block_size,
                    group,
                    byte_offset: u64::from(group.0) * group_bytes + first * 1024,
                })
                .take_while(|place| place.byte_offset.saturating_add(1024) <= device_bytes)
                .take(per_size),
        );
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::sample_superblock;

    #[test]
    fn the_last_group_is_short() {
        let sb = sample_superblock();
        assert_eq!(sb.groups_count(), 8);
        assert_eq!(sb.blocks_in_group(GroupNumber(0)), 32768);
        assert_eq!(sb.blocks_in_group(GroupNumber(7)), 32768 - 100);
        assert_eq!(sb.group_of_block(FsBlock(262_144 - 101)), Some(GroupNumber(7)));
        assert_eq!(sb.group_of_block(FsBlock(262_144 - 100)), None);
    }

    #[test]
    fn inodes_count_from_one() {
        let sb = sample_superblock();
        let at = sb.inode_location(InodeNumber(8192 + 18)).unwrap();
        let wanted =
            InodeLocation { group: GroupNumber(1), index: 17, table_block: 1, offset: 256 };
        assert_eq!(at, wanted);
        assert_eq!(sb.inode_number(at.group, at.index), InodeNumber(8192 + 18));
        assert_eq!(sb.inode_location(InodeNumber(65537)), None);
        assert!(
            sb.check_inode(InodeNumber(0)).is_err() && sb.check_inode(InodeNumber(65536)).is_ok()
        );
    }

    #[test]
    fn sparse_groups_are_powers_of_3_5_and_7() {
        let groups: Vec<u32> = (0..130).filter(|&g| is_sparse_group(GroupNumber(g))).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn backups_are_where_mke2fs_says_they_are() {
        let of = |size| {
            let places = backup_places(1 << 40, 2);
            places
                .into_iter()
                .filter(|p| p.block_size == size)
                .map(|p| p.byte_offset / u64::from(size))
                .collect::<Vec<_>>()
        };
        assert_eq!(of(1024), [8193, 24577]);
        assert_eq!(of(2048), [16384, 49152]);
        assert_eq!(of(4096), [32768, 98304]);
        assert_eq!(of(65536), [65528, 196_584]);
    }

    #[test]
    fn an_uninit_bitmap_holds_the_groups_own_metadata_only() {
        let sb = sample_superblock();
        let mut bytes = [0u8; 64];
        let mut desc = GroupDesc::new(&mut bytes[..]).unwrap();
        desc.set_block_bitmap(FsBlock(32768 + 500));
        desc.set_inode_bitmap(FsBlock(7));
        desc.set_inode_table(FsBlock(32768 - 10));
        let mut map = vec![0xAA; 4096];
        sb.fill_uninit_block_bitmap(GroupNumber(1), &desc, &mut map);
        // Superblock, one descriptor block and 127 reserved; the table's other 502 blocks; the
        // bitmap lies under it.
        assert_eq!(bitmap::count_set(&map, 32768), 502);
        sb.fill_uninit_block_bitmap(GroupNumber(2), &desc, &mut map);
        assert_eq!(bitmap::count_set(&map, 32768), 0);
        sb.fill_uninit_block_bitmap(GroupNumber(7), &desc, &mut map);
        assert_eq!(bitmap::find_next_set(&map, 129, 32768), Some(32668));
    }
}
