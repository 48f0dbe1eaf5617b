//! What a superblock must fulfil before anything trusts it.
//!
//! The checks are those of the kernel's mount and of libext2fs's open together.

use zerocopy::FromBytes;

use super::{
    CHECKSUM_TYPE_CRC32C, GOOD_OLD_INODE_SIZE, MAGIC, MAX_BLOCK_SIZE, MAX_DESC_SIZE,
    MIN_BLOCK_SIZE, MIN_DESC_SIZE, MIN_DESC_SIZE_64BIT, RawSuperblock, SUPERBLOCK_SIZE, Superblock,
    join,
};
use crate::error::{Corrupt, CorruptKind, Result};
use crate::features::Features;
use crate::units::InodeNumber;

/// What the structure is called in errors.
const WHAT: &str = "superblock";

impl Superblock {
    /// Checks the 1024 bytes of a superblock (the first of `bytes`).
    ///
    /// # Errors
    /// `Truncated`; `Magic` with what was found; `Checksum` with both; `Value` for a field
    /// outside its range; `Unsupported` for a checksum type or revision nobody knows.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (raw, _) = RawSuperblock::read_from_prefix(bytes)
            .map_err(|_| Corrupt::truncated(WHAT, bytes.len(), SUPERBLOCK_SIZE))?;
        check_magic(&raw)?;
        check_checksum(&raw)?;
        Self::from_raw(raw)
    }

    /// Checks everything but magic and checksum: for fsck, which repairs those, and mkfs.
    ///
    /// # Errors
    /// As [`Superblock::parse`], without `Magic` and `Checksum`.
    pub fn from_raw(raw: RawSuperblock) -> Result<Self> {
        let features = Features::from_bits(
            raw.s_feature_compat.get(),
            raw.s_feature_incompat.get(),
            raw.s_feature_ro_compat.get(),
        );
        if raw.s_rev_level.get() > 1 {
            let detail = format!("s_rev_level {} is newer than 1", raw.s_rev_level);
            return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, detail));
        }
        let block_size_bits = checked_block_size_bits(&raw)?;
        let cluster_ratio_bits = checked_cluster_ratio(&raw, features, block_size_bits)?;
        let inode_size = checked_inode_size(&raw, block_size_bits)?;
        let desc_size = checked_desc_size(&raw, features)?;
        check_per_group_counts(&raw, features, block_size_bits, cluster_ratio_bits, inode_size)?;
        let blocks_count = join(raw.s_blocks_count_lo.get(), raw.s_blocks_count_hi.get(), features);
        let groups_count =
            checked_groups_count(&raw, blocks_count, block_size_bits, cluster_ratio_bits)?;
        check_descriptors(&raw, features, groups_count, block_size_bits, desc_size)?;
        let mut sb = Self {
            features,
            block_size_bits,
            cluster_ratio_bits,
            blocks_count,
            first_data_block: u64::from(raw.s_first_data_block.get()),
            blocks_per_group: raw.s_blocks_per_group.get(),
            inodes_per_group: raw.s_inodes_per_group.get(),
            groups_count,
            inode_size,
            desc_size,
            csum_seed: 0,
            raw: Box::new(raw),
        };
        sb.csum_seed = sb.computed_seed();
        Ok(sb)
    }
}

fn bad(detail: String) -> Corrupt {
    Corrupt::value(WHAT, detail)
}

pub(super) fn check_magic(raw: &RawSuperblock) -> Result<()> {
    if raw.s_magic.get() == MAGIC {
        return Ok(());
    }
    let detail = format!("magic is {:#06x}, not {MAGIC:#06x}", raw.s_magic.get());
    Err(Corrupt::new(CorruptKind::Magic, WHAT, detail))
}

pub(super) fn check_checksum(raw: &RawSuperblock) -> Result<()> {
    let features = Features::from_bits(0, 0, raw.s_feature_ro_compat.get());
    if !features.metadata_csum() {
        return Ok(());
    }
    if raw.s_checksum_type != CHECKSUM_TYPE_CRC32C {
        let detail = format!("s_checksum_type {} is unknown", raw.s_checksum_type);
        return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, detail));
    }
    let (stored, computed) = (raw.s_checksum.get(), raw.computed_checksum());
    if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
}

fn checked_block_size_bits(raw: &RawSuperblock) -> Result<u32> {
    let log = raw.s_log_block_size.get();
    if log > MAX_BLOCK_SIZE.ilog2() - MIN_BLOCK_SIZE.ilog2() {
        return Err(bad(format!("s_log_block_size {log} is over 6 (64 KiB)")));
    }
    Ok(log + MIN_BLOCK_SIZE.ilog2())
}

fn checked_cluster_ratio(raw: &RawSuperblock, features: Features, bits: u32) -> Result<u32> {
    let (log_block, log_cluster) = (bits - 10, raw.s_log_cluster_size.get());
    if !features.bigalloc() {
        // The field held the fragment size once; fragments never worked, so it is the same.
        if log_cluster != log_block {
            return Err(bad(format!("s_log_cluster_size {log_cluster} without bigalloc")));
        }
        return Ok(0);
    }
    if log_cluster < log_block || log_cluster > 20 {
        return Err(bad(format!("s_log_cluster_size {log_cluster} is not in {log_block}..=20")));
    }
    Ok(log_cluster - log_block)
}

fn checked_inode_size(raw: &RawSuperblock, block_size_bits: u32) -> Result<u16> {
    if raw.s_rev_level.get() == 0 {
        return Ok(GOOD_OLD_INODE_SIZE);
    }
    let size = raw.s_inode_size.get();
    let fits = u32::from(size) <= 1 << block_size_bits;
    if size < GOOD_OLD_INODE_SIZE || !size.is_power_of_two() || !fits {
        return Err(bad(format!("s_inode_size {size}")));
    }
    let first = raw.s_first_ino.get();
    if first < InodeNumber::GOOD_OLD_FIRST.0 {
        return Err(bad(format!("s_first_ino {first} is below 11")));
    }
    Ok(size)
}

fn checked_desc_size(raw: &RawSuperblock, features: Features) -> Result<u16> {
    if !features.bit64() {
        return Ok(MIN_DESC_SIZE);
    }
    let size = raw.s_desc_size.get();
    if !(MIN_DESC_SIZE_64BIT..=MAX_DESC_SIZE).contains(&size) || !size.is_power_of_two() {
        return Err(bad(format!("s_desc_size {size} with 64bit")));
    }
    Ok(size)
}

/// Most clusters in a group: the bits of a block, but their count must fit the 16 bits of a
/// small descriptor.
pub fn max_per_group(block_size_bits: u32) -> u32 {
    (8 << block_size_bits).min((1 << 16) - 8)
}

fn check_per_group_counts(
    raw: &RawSuperblock,
    features: Features,
    block_size_bits: u32,
    cluster_ratio_bits: u32,
    inode_size: u16,
) -> Result<()> {
    let bitmap_bits = max_per_group(block_size_bits);
    let blocks = raw.s_blocks_per_group.get();
    let clusters = raw.s_clusters_per_group.get();
    let inodes = raw.s_inodes_per_group.get();
    let clusters_wanted = blocks >> cluster_ratio_bits;
    if !(8..=bitmap_bits).contains(&clusters_wanted) {
        return Err(bad(format!("s_blocks_per_group {blocks}")));
    }
    let exact = clusters_wanted.checked_shl(cluster_ratio_bits) == Some(blocks);
    if features.bigalloc() && (clusters != clusters_wanted || !exact) {
        let ratio = 1u32 << cluster_ratio_bits;
        return Err(bad(format!(
            "s_clusters_per_group {clusters} with {blocks} blocks per group and {ratio} per cluster"
        )));
    }
    let per_block = (1u32 << block_size_bits) / u32::from(inode_size);
    if inodes < per_block || inodes > (1 << 16) - per_block || inodes > 8 << block_size_bits {
        return Err(bad(format!("s_inodes_per_group {inodes}")));
    }
    Ok(())
}

fn checked_groups_count(
    raw: &RawSuperblock,
    blocks_count: u64,
    block_size_bits: u32,
    cluster_ratio_bits: u32,
) -> Result<u32> {
    let first = u64::from(raw.s_first_data_block.get());
    // With 1 KiB blocks block 0 is the boot block; clusters of several blocks include it.
    let first_wanted = u64::from(block_size_bits == 10 && cluster_ratio_bits == 0);
    if first != first_wanted {
        return Err(bad(format!("s_first_data_block {first}, not {first_wanted}")));
    }
    if blocks_count <= first {
        return Err(bad(format!("blocks count {blocks_count}")));
    }
    if blocks_count
        .checked_shl(block_size_bits)
        .is_none_or(|b| b >> block_size_bits != blocks_count)
    {
        return Err(bad(format!("blocks count {blocks_count} overflows 64-bit bytes")));
    }
    let groups = (blocks_count - first).div_ceil(u64::from(raw.s_blocks_per_group.get()));
    let inodes = groups.saturating_mul(u64::from(raw.s_inodes_per_group.get()));
    let Ok(groups) = u32::try_from(groups) else {
        return Err(bad(format!("{groups} groups do not fit 32 bits")));
    };
    let stored = raw.s_inodes_count.get();
    if u64::from(stored) != inodes {
        return Err(bad(format!("s_inodes_count {stored}, but the groups have {inodes}")));
    }
    Ok(groups)
}

fn check_descriptors(
    raw: &RawSuperblock,
    features: Features,
    groups: u32,
    block_size_bits: u32,
    desc_size: u16,
) -> Result<()> {
    let per_block = (1u32 << block_size_bits) / u32::from(desc_size);
    let desc_blocks = groups.div_ceil(per_block);
    let first_meta_bg = raw.s_first_meta_bg.get();
    if features.meta_bg() && first_meta_bg > desc_blocks {
        return Err(bad(format!("s_first_meta_bg {first_meta_bg} is over {desc_blocks}")));
    }
    let reserved = raw.s_reserved_gdt_blocks.get();
    if u32::from(reserved) > (1 << block_size_bits) / 4 {
        return Err(bad(format!("s_reserved_gdt_blocks {reserved}")));
    }
    // Group 0 must hold the descriptors that are not spread, or nothing else can be found.
    let in_group0 = if features.meta_bg() { first_meta_bg } else { desc_blocks };
    if u64::from(in_group0) + 1 > u64::from(raw.s_blocks_per_group.get()) {
        return Err(bad(format!("{in_group0} descriptor blocks do not fit a group")));
    }
    Ok(())
}
