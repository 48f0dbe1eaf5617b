//! The superblock: checked once, edited in place.
//!
//! Source: Documentation/filesystems/ext4/super.rst.
//!
//! Invariants of a [`Superblock`]:
//! - sizes are powers of two in the format's range, per-group counts fit a
//!   bitmap of one block, the group count follows from the block count and every
//!   group number fits 32 bits, so geometry arithmetic cannot overflow;
//! - the raw bytes are kept and edited in place, so unknown fields survive;
//! - the checksum in the raw bytes is current only in what
//!   [`Superblock::sealed_bytes`] gives.
//!
//! Whether the *features* are supported is the mounter's decision, not this file's.

mod check;
mod journal_dev;
mod raw;
#[cfg(test)]
mod tests;
mod torn;

use bitflags::bitflags;
use zerocopy::IntoBytes;

pub use self::check::max_per_group;
pub use self::journal_dev::JournalDevice;
pub use self::raw::RawSuperblock;
use crate::checksum;
use crate::error::Result;
use crate::features::{Compat, Features, Incompat};
use crate::units::{FsBlock, GroupNumber, InodeNumber};

/// Where the primary superblock lies, bytes from the start of the device.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its size, bytes.
pub const SUPERBLOCK_SIZE: usize = 1024;
/// `s_magic`.
pub const MAGIC: u16 = 0xEF53;
/// The smallest block size, bytes.
pub const MIN_BLOCK_SIZE: u32 = 1024;
/// The largest block size, bytes.
pub const MAX_BLOCK_SIZE: u32 = 65536;
/// Size of an inode on revision 0, and the smallest on revision 1, bytes.
pub const GOOD_OLD_INODE_SIZE: u16 = 128;
/// Size of a descriptor without `64bit`, bytes.
pub const MIN_DESC_SIZE: u16 = 32;
/// Smallest size of a descriptor with `64bit`, bytes.
pub const MIN_DESC_SIZE_64BIT: u16 = 64;
/// Largest size of a descriptor, bytes.
pub const MAX_DESC_SIZE: u16 = 1024;
/// `s_checksum_type`: CRC-32C, the only one.
pub const CHECKSUM_TYPE_CRC32C: u8 = 1;
/// `s_jnl_backup_type`: `s_jnl_blocks` holds the journal inode's `i_block` and size.
pub const JNL_BACKUP_BLOCKS: u8 = 1;

bitflags! {
    /// `s_state`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct State: u16 {
        /// Unmounted cleanly (`EXT4_VALID_FS`).
        const VALID = 0x0001;
        /// Errors were found (`EXT4_ERROR_FS`).
        const ERROR = 0x0002;
        /// Orphans are being deleted (`EXT4_ORPHAN_FS`).
        const ORPHAN = 0x0004;
        /// Fast commits are being replayed (`EXT4_FC_REPLAY`).
        const FC_REPLAY = 0x0020;
        const _ = !0;
    }
}

bitflags! {
    /// `s_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct SuperFlags: u32 {
        /// Directory hashes take bytes as signed.
        const SIGNED_HASH = 0x0001;
        /// Directory hashes take bytes as unsigned.
        const UNSIGNED_HASH = 0x0002;
        /// May be mounted as ext4dev.
        const TEST_FILESYS = 0x0004;
        const _ = !0;
    }
}

bitflags! {
    /// `s_default_mount_opts`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct DefaultMountOpts: u32 {
        /// `debug`.
        const DEBUG = 0x0001;
        /// `bsdgroups`.
        const BSDGROUPS = 0x0002;
        /// `user_xattr`.
        const XATTR_USER = 0x0004;
        /// `acl`.
        const ACL = 0x0008;
        /// `nouid32`.
        const UID16 = 0x0010;
        /// `data=journal`; with [`Self::JMODE_ORDERED`] it is `data=writeback`.
        const JMODE_DATA = 0x0020;
        /// `data=ordered`.
        const JMODE_ORDERED = 0x0040;
        /// `data=writeback`: both of the above.
        const JMODE_WBACK = 0x0060;
        /// `nobarrier`.
        const NOBARRIER = 0x0100;
        /// `block_validity`.
        const BLOCK_VALIDITY = 0x0200;
        /// `discard`.
        const DISCARD = 0x0400;
        /// `nodelalloc`.
        const NODELALLOC = 0x0800;
        const _ = !0;
    }
}

/// What to do when corruption is found (`s_errors`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ErrorsPolicy {
    /// Go on.
    #[default]
    Continue,
    /// Make the filesystem read-only.
    RemountRo,
    /// Stop the program.
    Panic,
}

impl ErrorsPolicy {
    /// From `s_errors`; an unknown value means the default, as the kernel takes it.
    pub fn from_raw(raw: u16) -> Self {
        match raw {
            2 => Self::RemountRo,
            3 => Self::Panic,
            _ => Self::Continue,
        }
    }

    /// As in `s_errors`.
    pub fn to_raw(self) -> u16 {
        match self {
            Self::Continue => 1,
            Self::RemountRo => 2,
            Self::Panic => 3,
        }
    }
}

/// A recorded error, for the first and the last error fields.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ErrorRecord {
    /// Seconds since 1970.
    pub time: u64,
    /// `EXT4_ERR_*`: the format's own small code.
    pub code: u8,
    /// The inode, 0 when none.
    pub inode: u32,
    /// The block, 0 when none.
    pub block: u64,
    /// The function, at most 32 bytes.
    pub func: String,
    /// The line.
    pub line: u32,
}

/// A checked superblock over its raw bytes.
#[derive(Clone, Debug)]
pub struct Superblock {
    raw: Box<RawSuperblock>,
    features: Features,
    block_size_bits: u32,
    cluster_ratio_bits: u32,
    blocks_count: u64,
    first_data_block: u64,
    blocks_per_group: u32,
    inodes_per_group: u32,
    groups_count: u32,
    inode_size: u16,
    desc_size: u16,
    csum_seed: u32,
}

impl Superblock {
    /// The raw bytes' fields.
    pub fn raw(&self) -> &RawSuperblock {
        &self.raw
    }

    /// The raw fields, to edit one that has no setter. A field the geometry or the features
    /// derive from must not be changed here: parse the result again instead.
    pub fn raw_mut(&mut self) -> &mut RawSuperblock {
        &mut self.raw
    }

    /// The bytes with a current checksum, ready to be written.
    pub fn sealed_bytes(&mut self) -> &[u8] {
        if self.features.metadata_csum() {
            self.raw.s_checksum_type = CHECKSUM_TYPE_CRC32C;
            self.raw.s_checksum = self.raw.computed_checksum().into();
        }
        self.raw.as_bytes()
    }

    /// The sealed bytes of the copy kept in `group`, whose number it carries.
    pub fn sealed_copy(&self, group: GroupNumber) -> [u8; SUPERBLOCK_SIZE] {
        let mut copy = *self.raw;
        // Only 16 bits: the format lets the number of a high group wrap.
        copy.s_block_group_nr = ((group.0 & 0xFFFF) as u16).into();
        if self.features.metadata_csum() {
            copy.s_checksum_type = CHECKSUM_TYPE_CRC32C;
            copy.s_checksum = copy.computed_checksum().into();
        }
        zerocopy::transmute!(copy)
    }

    /// The three feature sets.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Replaces the feature sets.
    ///
    /// # Errors
    /// When the geometry would no longer hold (`64bit`, `bigalloc`, `meta_bg`); nothing changes then.
    pub fn set_features(&mut self, features: Features) -> Result<()> {
        let mut raw = *self.raw;
        raw.s_feature_compat = features.compat.bits().into();
        raw.s_feature_incompat = features.incompat.bits().into();
        raw.s_feature_ro_compat = features.ro_compat.bits().into();
        *self = Self::from_raw(raw)?;
        Ok(())
    }

    /// Sets or clears `needs_recovery`, which no geometry depends on.
    pub fn set_needs_recovery(&mut self, on: bool) {
        self.features.incompat.set(Incompat::RECOVER, on);
        self.raw.s_feature_incompat = self.features.incompat.bits().into();
    }

    /// Sets or clears `orphan_present`, which no geometry depends on.
    pub fn set_orphan_present(&mut self, on: bool) {
        self.features.ro_compat.set(crate::features::RoCompat::ORPHAN_PRESENT, on);
        self.raw.s_feature_ro_compat = self.features.ro_compat.bits().into();
    }

    /// The seed of every metadata checksum of this filesystem.
    pub fn csum_seed(&self) -> u32 {
        self.csum_seed
    }

    fn computed_seed(&self) -> u32 {
        if self.features.incompat.contains(Incompat::CSUM_SEED) {
            self.raw.s_checksum_seed.get()
        } else {
            checksum::crc32c(!0, &self.raw.s_uuid)
        }
    }

    /// Bytes per block.
    pub fn block_size(&self) -> u32 {
        1 << self.block_size_bits
    }

    /// log2 of the block size.
    pub fn block_size_bits(&self) -> u32 {
        self.block_size_bits
    }

    /// Blocks per cluster; 1 without `bigalloc`.
    pub fn cluster_ratio(&self) -> u32 {
        1 << self.cluster_ratio_bits
    }

    /// log2 of the blocks per cluster.
    pub fn cluster_ratio_bits(&self) -> u32 {
        self.cluster_ratio_bits
    }

    /// Blocks of the filesystem, the ones before `first_data_block` included.
    pub fn blocks_count(&self) -> u64 {
        self.blocks_count
    }

    /// The first block of group 0: 1 with 1 KiB blocks, else 0.
    pub fn first_data_block(&self) -> FsBlock {
        FsBlock(self.first_data_block)
    }

    /// Blocks per group; the last group may be shorter.
    pub fn blocks_per_group(&self) -> u32 {
        self.blocks_per_group
    }

    /// Clusters per group: the bits a block bitmap uses.
    pub fn clusters_per_group(&self) -> u32 {
        self.blocks_per_group >> self.cluster_ratio_bits
    }

    /// Inodes per group; the last group has as many.
    pub fn inodes_per_group(&self) -> u32 {
        self.inodes_per_group
    }

    /// Groups.
    pub fn groups_count(&self) -> u32 {
        self.groups_count
    }

    /// Bytes per inode.
    pub fn inode_size(&self) -> u16 {
        self.inode_size
    }

    /// Bytes per group descriptor.
    pub fn desc_size(&self) -> u16 {
        self.desc_size
    }

    /// Inodes of the filesystem; inode numbers run from 1 to this.
    pub fn inodes_count(&self) -> u32 {
        self.raw.s_inodes_count.get()
    }

    /// The first inode that is not reserved.
    pub fn first_ino(&self) -> InodeNumber {
        if self.is_rev0() {
            InodeNumber::GOOD_OLD_FIRST
        } else {
            InodeNumber(self.raw.s_first_ino.get())
        }
    }

    /// Whether this is revision 0, without dynamic inode sizes or features.
    pub fn is_rev0(&self) -> bool {
        self.raw.s_rev_level.get() == 0
    }

    /// Free clusters, in blocks' units of the superblock (clusters times the ratio).
    pub fn free_blocks_count(&self) -> u64 {
        let raw = &self.raw;
        join(raw.s_free_blocks_count_lo.get(), raw.s_free_blocks_count_hi.get(), self.features)
    }

    /// Sets the free blocks.
    pub fn set_free_blocks_count(&mut self, count: u64) {
        self.raw.s_free_blocks_count_lo = (count as u32).into();
        if self.features.bit64() {
            self.raw.s_free_blocks_count_hi = ((count >> 32) as u32).into();
        }
    }

    /// Free inodes.
    pub fn free_inodes_count(&self) -> u32 {
        self.raw.s_free_inodes_count.get()
    }

    /// Sets the free inodes.
    pub fn set_free_inodes_count(&mut self, count: u32) {
        self.raw.s_free_inodes_count = count.into();
    }

    /// Blocks only the reserved user may take.
    pub fn reserved_blocks_count(&self) -> u64 {
        let raw = &self.raw;
        join(raw.s_r_blocks_count_lo.get(), raw.s_r_blocks_count_hi.get(), self.features)
    }

    /// Sets the reserved blocks.
    pub fn set_reserved_blocks_count(&mut self, count: u64) {
        self.raw.s_r_blocks_count_lo = (count as u32).into();
        if self.features.bit64() {
            self.raw.s_r_blocks_count_hi = ((count >> 32) as u32).into();
        }
    }

    /// The user who may take reserved blocks.
    pub fn reserved_uid(&self) -> u32 {
        u32::from(self.raw.s_def_resuid.get()) | u32::from(self.raw.s_def_resuid_hi.get()) << 16
    }

    /// The group who may take reserved blocks.
    pub fn reserved_gid(&self) -> u32 {
        u32::from(self.raw.s_def_resgid.get()) | u32::from(self.raw.s_def_resgid_hi.get()) << 16
    }

    /// Descriptor blocks reserved after the descriptors for growing.
    pub fn reserved_gdt_blocks(&self) -> u32 {
        u32::from(self.raw.s_reserved_gdt_blocks.get())
    }

    /// The first descriptor block that is placed by `meta_bg`.
    pub fn first_meta_bg(&self) -> u32 {
        self.raw.s_first_meta_bg.get()
    }

    /// log2 of the groups in a flex group; 0 when `flex_bg` is off.
    pub fn log_groups_per_flex(&self) -> u32 {
        if !self.features.flex_bg() {
            return 0;
        }
        // The kernel takes 0 and more than 31 as no flex groups.
        let log = u32::from(self.raw.s_log_groups_per_flex);
        if log > 31 { 0 } else { log }
    }

    /// The two groups with backups under `sparse_super2`.
    pub fn backup_bgs(&self) -> [u32; 2] {
        self.raw.s_backup_bgs.map(|group| group.get())
    }

    /// The UUID.
    pub fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::from_bytes(self.raw.s_uuid)
    }

    /// Sets the UUID. Without `metadata_csum_seed` this changes the seed of all checksums.
    pub fn set_uuid(&mut self, uuid: uuid::Uuid) {
        self.raw.s_uuid = *uuid.as_bytes();
        self.csum_seed = self.computed_seed();
    }

    /// The label's bytes, without the padding.
    pub fn label(&self) -> &[u8] {
        until_nul(&self.raw.s_volume_name)
    }

    /// Sets the label; at most 16 bytes count.
    pub fn set_label(&mut self, label: &[u8]) {
        self.raw.s_volume_name = padded(label);
    }

    /// Where it was last mounted, without the padding.
    pub fn last_mounted(&self) -> &[u8] {
        until_nul(&self.raw.s_last_mounted)
    }

    /// Sets where it was mounted; at most 64 bytes count.
    pub fn set_last_mounted(&mut self, path: &[u8]) {
        self.raw.s_last_mounted = padded(path);
    }

    /// `s_state`.
    pub fn state(&self) -> State {
        State::from_bits_retain(self.raw.s_state.get())
    }

    /// Sets `s_state`.
    pub fn set_state(&mut self, state: State) {
        self.raw.s_state = state.bits().into();
    }

    /// What to do when corruption is found.
    pub fn errors_policy(&self) -> ErrorsPolicy {
        ErrorsPolicy::from_raw(self.raw.s_errors.get())
    }

    /// Sets what to do when corruption is found.
    pub fn set_errors_policy(&mut self, policy: ErrorsPolicy) {
        self.raw.s_errors = policy.to_raw().into();
    }

    /// Mount options that hold unless the mount says otherwise.
    pub fn default_mount_opts(&self) -> DefaultMountOpts {
        DefaultMountOpts::from_bits_retain(self.raw.s_default_mount_opts.get())
    }

    /// Mount options as text, applied before those of the mount.
    pub fn mount_opts(&self) -> &[u8] {
        until_nul(&self.raw.s_mount_opts)
    }

    /// `s_flags`.
    pub fn flags(&self) -> SuperFlags {
        SuperFlags::from_bits_retain(self.raw.s_flags.get())
    }

    /// Sets `s_flags`.
    pub fn set_flags(&mut self, flags: SuperFlags) {
        self.raw.s_flags = flags.bits().into();
    }

    /// The seed of directory hashes; all zeroes means the hash's own constants.
    pub fn hash_seed(&self) -> [u32; 4] {
        self.raw.s_hash_seed.map(|word| word.get())
    }

    /// The hash version of new directories (0 legacy, 1 half MD4, 2 TEA; unsigned is a flag).
    pub fn def_hash_version(&self) -> u8 {
        self.raw.s_def_hash_version
    }

    /// Whether directory hashes take bytes as unsigned. Neither flag means signed here, as on
    /// x86 where such filesystems come from.
    pub fn unsigned_hash(&self) -> bool {
        self.flags().contains(SuperFlags::UNSIGNED_HASH)
    }

    /// The journal's inode, when the journal is inside.
    pub fn journal_inum(&self) -> Option<InodeNumber> {
        non_zero_inode(self.raw.s_journal_inum.get())
    }

    /// The device number of an external journal, 0 when none.
    pub fn journal_dev(&self) -> u32 {
        self.raw.s_journal_dev.get()
    }

    /// The UUID of an external journal.
    pub fn journal_uuid(&self) -> uuid::Uuid {
        uuid::Uuid::from_bytes(self.raw.s_journal_uuid)
    }

    /// The backup of the journal inode's `i_block` (15 words), when there is one.
    pub fn journal_backup_blocks(&self) -> Option<[u32; 15]> {
        if self.raw.s_jnl_backup_type != JNL_BACKUP_BLOCKS {
            return None;
        }
        let mut blocks = [0; 15];
        for (to, from) in blocks.iter_mut().zip(&self.raw.s_jnl_blocks) {
            *to = from.get();
        }
        Some(blocks)
    }

    /// The backup of the journal inode's size in bytes, when there is one.
    pub fn journal_backup_size(&self) -> Option<u64> {
        let words = &self.raw.s_jnl_blocks;
        (self.raw.s_jnl_backup_type == JNL_BACKUP_BLOCKS)
            .then(|| u64::from(words[16].get()) | u64::from(words[15].get()) << 32)
    }

    /// Keeps a copy of the journal inode's `i_block` and size in bytes.
    pub fn set_journal_backup(&mut self, i_block: [u32; 15], size: u64) {
        for (to, from) in self.raw.s_jnl_blocks.iter_mut().zip(i_block) {
            *to = from.into();
        }
        self.raw.s_jnl_blocks[15] = ((size >> 32) as u32).into();
        self.raw.s_jnl_blocks[16] = (size as u32).into();
        self.raw.s_jnl_backup_type = JNL_BACKUP_BLOCKS;
    }

    /// The head of the orphan list.
    pub fn last_orphan(&self) -> Option<InodeNumber> {
        non_zero_inode(self.raw.s_last_orphan.get())
    }

    /// Sets the head of the orphan list.
    pub fn set_last_orphan(&mut self, inode: Option<InodeNumber>) {
        self.raw.s_last_orphan = inode.map_or(0, |inode| inode.0).into();
    }

    /// The orphan file's inode, under `orphan_file`.
    pub fn orphan_file_inum(&self) -> Option<InodeNumber> {
        let on = self.features.compat.contains(Compat::ORPHAN_FILE);
        non_zero_inode(self.raw.s_orphan_file_inum.get()).filter(|_| on)
    }

    /// The least bytes past 128 that every inode uses.
    pub fn min_extra_isize(&self) -> u16 {
        self.raw.s_min_extra_isize.get()
    }

    /// The bytes past 128 that new inodes use: what the superblock wants, where it fits,
    /// else what a current inode needs; 0 with 128-byte inodes.
    pub fn want_extra_isize(&self) -> u16 {
        let room = self.inode_size.saturating_sub(GOOD_OLD_INODE_SIZE);
        let current = crate::inode::CURRENT_EXTRA_ISIZE.min(room);
        let extra_isize = crate::features::RoCompat::EXTRA_ISIZE;
        if !self.features.ro_compat.contains(extra_isize) {
            return current;
        }
        let want = self.raw.s_want_extra_isize.get().max(self.raw.s_min_extra_isize.get());
        if want <= room && want.is_multiple_of(4) { current.max(want) } else { current }
    }

    /// Clusters that are metadata of mkfs's making; 0 when not recorded.
    pub fn overhead_clusters(&self) -> u32 {
        self.raw.s_overhead_clusters.get()
    }

    /// The block of multiple mount protection, 0 when none.
    pub fn mmp_block(&self) -> FsBlock {
        FsBlock(self.raw.s_mmp_block.get())
    }

    /// Seconds between updates of multiple mount protection.
    pub fn mmp_update_interval(&self) -> u16 {
        self.raw.s_mmp_update_interval.get()
    }

    /// RAID stride in blocks, 0 when unknown.
    pub fn raid_stride(&self) -> u16 {
        self.raw.s_raid_stride.get()
    }

    /// RAID stripe width in blocks, 0 when unknown.
    pub fn raid_stripe_width(&self) -> u32 {
        self.raw.s_raid_stripe_width.get()
    }

    /// When it was last mounted, seconds since 1970.
    pub fn mount_time(&self) -> u64 {
        time40(self.raw.s_mtime.get(), self.raw.s_mtime_hi)
    }

    /// Sets when it was last mounted.
    pub fn set_mount_time(&mut self, seconds: u64) {
        (self.raw.s_mtime, self.raw.s_mtime_hi) = split40(seconds);
    }

    /// When it was last written, seconds since 1970.
    pub fn write_time(&self) -> u64 {
        time40(self.raw.s_wtime.get(), self.raw.s_wtime_hi)
    }

    /// Sets when it was last written.
    pub fn set_write_time(&mut self, seconds: u64) {
        (self.raw.s_wtime, self.raw.s_wtime_hi) = split40(seconds);
    }

    /// When it was last checked, seconds since 1970.
    pub fn last_check_time(&self) -> u64 {
        time40(self.raw.s_lastcheck.get(), self.raw.s_lastcheck_hi)
    }

    /// Sets when it was last checked.
    pub fn set_last_check_time(&mut self, seconds: u64) {
        (self.raw.s_lastcheck, self.raw.s_lastcheck_hi) = split40(seconds);
    }

    /// When it was made, seconds since 1970.
    pub fn mkfs_time(&self) -> u64 {
        time40(self.raw.s_mkfs_time.get(), self.raw.s_mkfs_time_hi)
    }

    /// Sets when it was made.
    pub fn set_mkfs_time(&mut self, seconds: u64) {
        (self.raw.s_mkfs_time, self.raw.s_mkfs_time_hi) = split40(seconds);
    }

    /// Mounts since the last check.
    pub fn mount_count(&self) -> u16 {
        self.raw.s_mnt_count.get()
    }

    /// Sets the mounts since the last check.
    pub fn set_mount_count(&mut self, count: u16) {
        self.raw.s_mnt_count = count.into();
    }

    /// KiB written in its life.
    pub fn kbytes_written(&self) -> u64 {
        self.raw.s_kbytes_written.get()
    }

    /// Sets the KiB written in its life.
    pub fn set_kbytes_written(&mut self, kib: u64) {
        self.raw.s_kbytes_written = kib.into();
    }

    /// Errors since the last check.
    pub fn error_count(&self) -> u32 {
        self.raw.s_error_count.get()
    }

    /// Records an error: counts it, keeps it as the last and, when it is the first, as that;
    /// sets [`State::ERROR`].
    pub fn record_error(&mut self, error: &ErrorRecord) {
        let raw = &mut self.raw;
        let func = padded(error.func.as_bytes());
        (raw.s_last_error_time, raw.s_last_error_time_hi) = split40(error.time);
        raw.s_last_error_ino = error.inode.into();
        raw.s_last_error_block = error.block.into();
        raw.s_last_error_func = func;
        raw.s_last_error_line = error.line.into();
        raw.s_last_error_errcode = error.code;
        if raw.s_error_count.get() == 0 {
            (raw.s_first_error_time, raw.s_first_error_time_hi) = split40(error.time);
            raw.s_first_error_ino = error.inode.into();
            raw.s_first_error_block = error.block.into();
            raw.s_first_error_func = func;
            raw.s_first_error_line = error.line.into();
            raw.s_first_error_errcode = error.code;
        }
        raw.s_error_count = raw.s_error_count.get().saturating_add(1).into();
        self.set_state(self.state() | State::ERROR);
    }

    /// The first recorded error, when there was one.
    pub fn first_error(&self) -> Option<ErrorRecord> {
        let raw = &self.raw;
        (raw.s_error_count.get() != 0).then(|| ErrorRecord {
            time: time40(raw.s_first_error_time.get(), raw.s_first_error_time_hi),
            code: raw.s_first_error_errcode,
            inode: raw.s_first_error_ino.get(),
            block: raw.s_first_error_block.get(),
            func: text(&raw.s_first_error_func),
            line: raw.s_first_error_line.get(),
        })
    }

    /// The last recorded error, when there was one.
    pub fn last_error(&self) -> Option<ErrorRecord> {
        let raw = &self.raw;
        (raw.s_error_count.get() != 0).then(|| ErrorRecord {
            time: time40(raw.s_last_error_time.get(), raw.s_last_error_time_hi),
            code: raw.s_last_error_errcode,
            inode: raw.s_last_error_ino.get(),
            block: raw.s_last_error_block.get(),
            func: text(&raw.s_last_error_func),
            line: raw.s_last_error_line.get(),
        })
    }

    /// Takes over what another superblock has recorded of errors.
    pub fn copy_errors(&mut self, from: &Self) {
        let (raw, other) = (&mut self.raw, &from.raw);
        raw.s_error_count = other.s_error_count;
        raw.s_first_error_time = other.s_first_error_time;
        raw.s_first_error_time_hi = other.s_first_error_time_hi;
        raw.s_first_error_ino = other.s_first_error_ino;
        raw.s_first_error_block = other.s_first_error_block;
        raw.s_first_error_func = other.s_first_error_func;
        raw.s_first_error_line = other.s_first_error_line;
        raw.s_first_error_errcode = other.s_first_error_errcode;
        raw.s_last_error_time = other.s_last_error_time;
        raw.s_last_error_time_hi = other.s_last_error_time_hi;
        raw.s_last_error_ino = other.s_last_error_ino;
        raw.s_last_error_block = other.s_last_error_block;
        raw.s_last_error_func = other.s_last_error_func;
        raw.s_last_error_line = other.s_last_error_line;
        raw.s_last_error_errcode = other.s_last_error_errcode;
        self.set_state(self.state() | (from.state() & State::ERROR));
    }

    /// Forgets all recorded errors, as fsck does.
    pub fn clear_errors(&mut self) {
        let raw = &mut self.raw;
        raw.s_error_count = 0.into();
        (raw.s_first_error_time, raw.s_first_error_time_hi) = split40(0);
        (raw.s_last_error_time, raw.s_last_error_time_hi) = split40(0);
        (raw.s_first_error_ino, raw.s_last_error_ino) = (0.into(), 0.into());
        (raw.s_first_error_block, raw.s_last_error_block) = (0.into(), 0.into());
        (raw.s_first_error_func, raw.s_last_error_func) = ([0; 32], [0; 32]);
        (raw.s_first_error_line, raw.s_last_error_line) = (0.into(), 0.into());
        (raw.s_first_error_errcode, raw.s_last_error_errcode) = (0, 0);
        self.set_state(self.state().difference(State::ERROR));
    }
}

/// A count of which the high half holds only under `64bit`.
fn join(lo: u32, hi: u32, features: Features) -> u64 {
    let hi = if features.bit64() { u64::from(hi) << 32 } else { 0 };
    hi | u64::from(lo)
}

fn time40(lo: u32, hi: u8) -> u64 {
    u64::from(lo) | u64::from(hi) << 32
}

fn split40(seconds: u64) -> (zerocopy::little_endian::U32, u8) {
    ((seconds as u32).into(), (seconds >> 32) as u8)
}

fn non_zero_inode(number: u32) -> Option<InodeNumber> {
    (number != 0).then_some(InodeNumber(number))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(until_nul(bytes)).into_owned()
}

fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let len = bytes.len().min(N);
    out[..len].copy_from_slice(&bytes[..len]);
    out
}
