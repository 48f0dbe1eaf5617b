//! A superblock whose two sectors come from different writes.
//!
//! A disk writes sectors of 512 bytes, so a power cut may leave the first half of
//! one superblock with the second half of another: each field is that of some
//! superblock that was right, and only the checksum fits none. What no running
//! filesystem changes (geometry, identity, most features) is the same in both, and
//! in every backup; that is how such a superblock is told from a damaged one.

use zerocopy::FromBytes;

use super::{RawSuperblock, Superblock};
use crate::features::{Compat, Incompat, RoCompat};

/// Features that a mounted filesystem sets and clears in its primary superblock alone.
const LIVE_COMPAT: Compat = Compat::EXT_ATTR.union(Compat::DIR_INDEX);
const LIVE_INCOMPAT: Incompat = Incompat::RECOVER;
const LIVE_RO_COMPAT: RoCompat = RoCompat::ORPHAN_PRESENT.union(RoCompat::LARGE_FILE);

impl Superblock {
    /// The superblock in bytes that fulfil everything but their checksum; `None` when more is
    /// wrong, or nothing.
    pub fn parse_torn(bytes: &[u8]) -> Option<Self> {
        let (raw, _) = RawSuperblock::read_from_prefix(bytes).ok()?;
        super::check::check_magic(&raw).ok()?;
        super::check::check_checksum(&raw).err()?;
        let sb = Self::from_raw(raw).ok()?;
        sb.features.metadata_csum().then_some(sb)
    }

    /// The first field that says these are not two superblocks of one filesystem, as they stand
    /// at different times or in different groups.
    pub fn differs_from(&self, other: &Self) -> Option<&'static str> {
        let (a, b) = (&*self.raw, &*other.raw);
        let (f, g) = (self.features, other.features);
        let same = [
            ("s_uuid", a.s_uuid == b.s_uuid),
            ("s_log_block_size", self.block_size_bits == other.block_size_bits),
            ("s_log_cluster_size", self.cluster_ratio_bits == other.cluster_ratio_bits),
            ("s_blocks_count", self.blocks_count == other.blocks_count),
            ("s_inodes_count", a.s_inodes_count == b.s_inodes_count),
            ("s_first_data_block", self.first_data_block == other.first_data_block),
            ("s_blocks_per_group", self.blocks_per_group == other.blocks_per_group),
            ("s_inodes_per_group", self.inodes_per_group == other.inodes_per_group),
            ("s_rev_level", a.s_rev_level == b.s_rev_level),
            ("s_first_ino", self.first_ino() == other.first_ino()),
            ("s_inode_size", self.inode_size == other.inode_size),
            ("s_desc_size", self.desc_size == other.desc_size),
            ("s_feature_compat", f.compat - LIVE_COMPAT == g.compat - LIVE_COMPAT),
            ("s_feature_incompat", f.incompat - LIVE_INCOMPAT == g.incompat - LIVE_INCOMPAT),
            ("s_feature_ro_compat", f.ro_compat - LIVE_RO_COMPAT == g.ro_compat - LIVE_RO_COMPAT),
            ("s_checksum_seed", self.csum_seed == other.csum_seed),
            ("s_reserved_gdt_blocks", a.s_reserved_gdt_blocks == b.s_reserved_gdt_blocks),
            ("s_first_meta_bg", a.s_first_meta_bg == b.s_first_meta_bg),
            ("s_log_groups_per_flex", a.s_log_groups_per_flex == b.s_log_groups_per_flex),
            ("s_backup_bgs", a.s_backup_bgs == b.s_backup_bgs),
            ("s_journal_inum", a.s_journal_inum == b.s_journal_inum),
            ("s_journal_uuid", a.s_journal_uuid == b.s_journal_uuid),
            ("s_orphan_file_inum", a.s_orphan_file_inum == b.s_orphan_file_inum),
            ("s_hash_seed", a.s_hash_seed == b.s_hash_seed),
        ];
        same.into_iter().find(|(_, same)| !same).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GroupNumber;
    use crate::fuzzing::sample_superblock;

    #[test]
    fn two_halves_of_one_filesystem_are_torn_and_agree_with_a_backup() {
        let mut old = sample_superblock();
        let backup = Superblock::parse(&old.sealed_copy(GroupNumber(1))).unwrap();
        let mut new = old.clone();
        new.set_mount_count(77);
        new.set_needs_recovery(true);
        let mut bytes = old.sealed_bytes().to_vec();
        assert!(Superblock::parse_torn(&bytes).is_none(), "nothing is wrong with it");
        bytes[..512].copy_from_slice(&new.sealed_bytes()[..512]);
        assert!(Superblock::parse(&bytes).is_err());
        let torn = Superblock::parse_torn(&bytes).unwrap();
        assert_eq!(torn.mount_count(), 77);
        assert_eq!(torn.differs_from(&backup), None);
    }

    #[test]
    fn damage_is_not_taken_for_a_tear() {
        let mut sb = sample_superblock();
        let mut bytes = sb.sealed_bytes().to_vec();
        // A byte of the UUID.
        bytes[0x68] ^= 1;
        let torn = Superblock::parse_torn(&bytes).unwrap();
        assert_eq!(torn.differs_from(&sb), Some("s_uuid"));
        // The magic.
        bytes[0x38] = 0;
        assert!(Superblock::parse_torn(&bytes).is_none());
        assert!(Superblock::parse_torn(&[0; 1024]).is_none());
        assert!(Superblock::parse_torn(&[0; 100]).is_none());
    }
}
