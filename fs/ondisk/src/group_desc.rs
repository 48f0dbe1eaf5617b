//! Group descriptors of 32, 64 and more bytes, edited in place.
//!
//! Source: Documentation/filesystems/ext4/group_descr.rst and checksums.rst.
//!
//! Invariants: a [`GroupDesc`] is a view over exactly one descriptor's bytes. The
//! high halves exist only when the descriptor has 64 bytes; setters drop what does
//! not fit only after asserting that it is zero. A setter does not recompute the
//! checksum: [`GroupDesc::seal`] does, once after all edits.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::{crc16, crc32c};
use crate::error::{Corrupt, Result};
use crate::superblock::Superblock;
use crate::units::{FsBlock, GroupNumber};

const WHAT: &str = "group descriptor";

/// The first 32 bytes of `struct ext4_group_desc`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawGroupDesc {
    pub bg_block_bitmap_lo: U32,
    pub bg_inode_bitmap_lo: U32,
    pub bg_inode_table_lo: U32,
    pub bg_free_blocks_count_lo: U16,
    pub bg_free_inodes_count_lo: U16,
    pub bg_used_dirs_count_lo: U16,
    pub bg_flags: U16,
    pub bg_exclude_bitmap_lo: U32,
    pub bg_block_bitmap_csum_lo: U16,
    pub bg_inode_bitmap_csum_lo: U16,
    pub bg_itable_unused_lo: U16,
    pub bg_checksum: U16,
}

/// Bytes 32 to 64 of `struct ext4_group_desc`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawGroupDescHi {
    pub bg_block_bitmap_hi: U32,
    pub bg_inode_bitmap_hi: U32,
    pub bg_inode_table_hi: U32,
    pub bg_free_blocks_count_hi: U16,
    pub bg_free_inodes_count_hi: U16,
    pub bg_used_dirs_count_hi: U16,
    pub bg_itable_unused_hi: U16,
    pub bg_exclude_bitmap_hi: U32,
    pub bg_block_bitmap_csum_hi: U16,
    pub bg_inode_bitmap_csum_hi: U16,
    pub bg_reserved: U32,
}

const CHECKSUM_OFFSET: usize = std::mem::offset_of!(RawGroupDesc, bg_checksum);

const _: () = {
    assert!(size_of::<RawGroupDesc>() == 32);
    assert!(size_of::<RawGroupDescHi>() == 32);
    assert!(CHECKSUM_OFFSET == 0x1E);
    assert!(std::mem::offset_of!(RawGroupDescHi, bg_block_bitmap_csum_hi) == 0x38 - 32);
};

bitflags! {
    /// `bg_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct GroupFlags: u16 {
        /// Inode bitmap and table are not initialised.
        const INODE_UNINIT = 0x1;
        /// The block bitmap is not initialised.
        const BLOCK_UNINIT = 0x2;
        /// The inode table is zeroed.
        const INODE_ZEROED = 0x4;
        const _ = !0;
    }
}

/// How the descriptors of a filesystem are checked: a copy of what is needed of its superblock.
#[derive(Clone, Copy, Debug)]
pub enum DescChecksum {
    /// Not at all.
    None,
    /// `gdt_csum`: CRC-16 with this value over the UUID.
    Crc16(u16),
    /// `metadata_csum`: CRC-32C from this seed, the low 16 bits.
    Crc32c(u32),
}

impl Superblock {
    /// How descriptors are checked.
    pub fn desc_checksum(&self) -> DescChecksum {
        if self.features().metadata_csum() {
            DescChecksum::Crc32c(self.csum_seed())
        } else if self.features().gdt_csum() {
            DescChecksum::Crc16(crc16(!0, self.uuid().as_bytes()))
        } else {
            DescChecksum::None
        }
    }
}

/// A view of one descriptor: over `&[u8]` to read, over `&mut [u8]` to edit in place.
#[derive(Clone, Copy, Debug)]
pub struct GroupDesc<B> {
    bytes: B,
}

/// Joins a low and a high 16-bit half.
fn join16(lo: U16, hi: Option<U16>) -> u32 {
    u32::from(lo.get()) | hi.map_or(0, |hi| u32::from(hi.get()) << 16)
}

/// Joins a low and a high 32-bit half.
fn join32(lo: U32, hi: Option<U32>) -> u64 {
    u64::from(lo.get()) | hi.map_or(0, |hi| u64::from(hi.get()) << 32)
}

impl<B: AsRef<[u8]>> GroupDesc<B> {
    /// A view over a descriptor's bytes, as many as the superblock's `desc_size`.
    ///
    /// # Errors
    /// `Truncated` below 32 bytes.
    pub fn new(bytes: B) -> Result<Self> {
        let len = bytes.as_ref().len();
        if len < size_of::<RawGroupDesc>() {
            return Err(Corrupt::truncated(WHAT, len, size_of::<RawGroupDesc>()));
        }
        Ok(Self { bytes })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The first 32 bytes' fields.
    pub fn raw(&self) -> &RawGroupDesc {
        RawGroupDesc::ref_from_prefix(self.bytes.as_ref()).expect("checked by new").0
    }

    /// The high halves, when the descriptor has them.
    pub fn raw_hi(&self) -> Option<&RawGroupDescHi> {
        let rest = self.bytes.as_ref().get(size_of::<RawGroupDesc>()..)?;
        Some(RawGroupDescHi::ref_from_prefix(rest).ok()?.0)
    }

    /// The block of the block bitmap.
    pub fn block_bitmap(&self) -> FsBlock {
        let hi = self.raw_hi().map(|hi| hi.bg_block_bitmap_hi);
        FsBlock(join32(self.raw().bg_block_bitmap_lo, hi))
    }

    /// The block of the inode bitmap.
    pub fn inode_bitmap(&self) -> FsBlock {
        let hi = self.raw_hi().map(|hi| hi.bg_inode_bitmap_hi);
        FsBlock(join32(self.raw().bg_inode_bitmap_lo, hi))
    }

    /// The first block of the inode table.
    pub fn inode_table(&self) -> FsBlock {
        let hi = self.raw_hi().map(|hi| hi.bg_inode_table_hi);
        FsBlock(join32(self.raw().bg_inode_table_lo, hi))
    }

    /// Free clusters.
    pub fn free_blocks_count(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_free_blocks_count_hi);
        join16(self.raw().bg_free_blocks_count_lo, hi)
    }

    /// Free inodes.
    pub fn free_inodes_count(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_free_inodes_count_hi);
        join16(self.raw().bg_free_inodes_count_lo, hi)
    }

    /// Directories.
    pub fn used_dirs_count(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_used_dirs_count_hi);
        join16(self.raw().bg_used_dirs_count_lo, hi)
    }

    /// Inodes at the end of the table that were never used.
    pub fn itable_unused(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_itable_unused_hi);
        join16(self.raw().bg_itable_unused_lo, hi)
    }

    /// `bg_flags`. They mean something only when descriptors carry a checksum.
    pub fn flags(&self) -> GroupFlags {
        GroupFlags::from_bits_retain(self.raw().bg_flags.get())
    }

    /// The block of the snapshot exclude bitmap.
    pub fn exclude_bitmap(&self) -> FsBlock {
        let hi = self.raw_hi().map(|hi| hi.bg_exclude_bitmap_hi);
        FsBlock(join32(self.raw().bg_exclude_bitmap_lo, hi))
    }

    /// The stored checksum of the block bitmap; 16 bits in a small descriptor.
    pub fn block_bitmap_csum(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_block_bitmap_csum_hi);
        join16(self.raw().bg_block_bitmap_csum_lo, hi)
    }

    /// The stored checksum of the inode bitmap; 16 bits in a small descriptor.
    pub fn inode_bitmap_csum(&self) -> u32 {
        let hi = self.raw_hi().map(|hi| hi.bg_inode_bitmap_csum_hi);
        join16(self.raw().bg_inode_bitmap_csum_lo, hi)
    }

    /// The stored checksum of the descriptor.
    pub fn checksum(&self) -> u16 {
        self.raw().bg_checksum.get()
    }

    /// The checksum the descriptor should have, `None` when it has none.
    pub fn computed_checksum(&self, how: DescChecksum, group: GroupNumber) -> Option<u16> {
        let bytes = self.bytes.as_ref();
        let (head, rest) = (&bytes[..CHECKSUM_OFFSET], &bytes[CHECKSUM_OFFSET + 2..]);
        let number = group.0.to_le_bytes();
        match how {
            DescChecksum::None => None,
            DescChecksum::Crc16(seed) => Some(crc16(crc16(crc16(seed, &number), head), rest)),
            DescChecksum::Crc32c(seed) => {
                let crc = crc32c(crc32c(crc32c(seed, &number), head), &[0, 0]);
                Some(crc32c(crc, rest) as u16)
            }
        }
    }

    /// Checks the checksum.
    ///
    /// # Errors
    /// `Checksum` with both.
    pub fn verify(&self, how: DescChecksum, group: GroupNumber) -> Result<()> {
        match self.computed_checksum(how, group) {
            Some(computed) if computed != self.checksum() => {
                Err(Corrupt::checksum(WHAT, self.checksum().into(), computed.into())
                    .in_group(group))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the places the descriptor names lie in the filesystem, in the group unless
    /// `flex_bg` is on, and that its counts are possible.
    ///
    /// # Errors
    /// `Value` for the first field that is not.
    pub fn check(&self, sb: &Superblock, group: GroupNumber) -> Result<()> {
        let bad = |detail| Err(Corrupt::value(WHAT, detail).in_group(group));
        let places = [
            ("block bitmap", self.block_bitmap(), 1),
            ("inode bitmap", self.inode_bitmap(), 1),
            ("inode table", self.inode_table(), u64::from(sb.inode_table_blocks())),
        ];
        let first = sb.group_first_block(group).0;
        let end = first + u64::from(sb.blocks_in_group(group));
        for (name, start, count) in places {
            let in_group = first <= start.0 && start.0.saturating_add(count) <= end;
            let inside =
                if sb.features().flex_bg() { sb.is_fs_range(start, count) } else { in_group };
            if !inside {
                return bad(format!("{name} at block {start}"));
            }
        }
        let counts = [
            ("free blocks", self.free_blocks_count(), sb.clusters_in_group(group)),
            ("free inodes", self.free_inodes_count(), sb.inodes_per_group()),
            ("directories", self.used_dirs_count(), sb.inodes_per_group()),
            ("unused inodes", self.itable_unused(), sb.inodes_per_group()),
        ];
        for (name, count, most) in counts {
            if count > most {
                return bad(format!("{count} {name}, at most {most}"));
            }
        }
        Ok(())
    }

    /// Checks a block bitmap against its stored checksum, under `metadata_csum`.
    ///
    /// # Errors
    /// `Checksum` with both.
    pub fn verify_block_bitmap(
        &self,
        sb: &Superblock,
        group: GroupNumber,
        map: &[u8],
    ) -> Result<()> {
        let computed = bitmap_csum(sb, map, sb.block_bitmap_bytes());
        let stored = self.block_bitmap_csum();
        self.compare_bitmap("block bitmap", computed, stored, group)
    }

    /// Checks an inode bitmap against its stored checksum, under `metadata_csum`.
    ///
    /// # Errors
    /// `Checksum` with both.
    pub fn verify_inode_bitmap(
        &self,
        sb: &Superblock,
        group: GroupNumber,
        map: &[u8],
    ) -> Result<()> {
        let computed = bitmap_csum(sb, map, sb.inode_bitmap_bytes());
        let stored = self.inode_bitmap_csum();
        self.compare_bitmap("inode bitmap", computed, stored, group)
    }

    fn compare_bitmap(
        &self,
        what: &'static str,
        computed: Option<u32>,
        stored: u32,
        group: GroupNumber,
    ) -> Result<()> {
        let mask = if self.raw_hi().is_some() { !0 } else { 0xFFFF };
        match computed {
            Some(computed) if computed & mask != stored => {
                Err(Corrupt::checksum(what, stored, computed & mask).in_group(group))
            }
            _ => Ok(()),
        }
    }
}

/// The checksum of a bitmap's meaningful bytes, `None` without `metadata_csum`.
fn bitmap_csum(sb: &Superblock, map: &[u8], bytes: usize) -> Option<u32> {
    let covered = &map[..bytes.min(map.len())];
    sb.features().metadata_csum().then(|| crc32c(sb.csum_seed(), covered))
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> GroupDesc<B> {
    /// The first 32 bytes' fields, to edit.
    pub fn raw_mut(&mut self) -> &mut RawGroupDesc {
        RawGroupDesc::mut_from_prefix(self.bytes.as_mut()).expect("checked by new").0
    }

    /// The high halves, to edit.
    pub fn raw_hi_mut(&mut self) -> Option<&mut RawGroupDescHi> {
        let rest = self.bytes.as_mut().get_mut(size_of::<RawGroupDesc>()..)?;
        Some(RawGroupDescHi::mut_from_prefix(rest).ok()?.0)
    }

    /// Sets the block of the block bitmap.
    pub fn set_block_bitmap(&mut self, block: FsBlock) {
        self.raw_mut().bg_block_bitmap_lo = (block.0 as u32).into();
        self.set_hi32(block.0, |hi| &mut hi.bg_block_bitmap_hi);
    }

    /// Sets the block of the inode bitmap.
    pub fn set_inode_bitmap(&mut self, block: FsBlock) {
        self.raw_mut().bg_inode_bitmap_lo = (block.0 as u32).into();
        self.set_hi32(block.0, |hi| &mut hi.bg_inode_bitmap_hi);
    }

    /// Sets the first block of the inode table.
    pub fn set_inode_table(&mut self, block: FsBlock) {
        self.raw_mut().bg_inode_table_lo = (block.0 as u32).into();
        self.set_hi32(block.0, |hi| &mut hi.bg_inode_table_hi);
    }

    /// Sets the free clusters.
    pub fn set_free_blocks_count(&mut self, count: u32) {
        self.raw_mut().bg_free_blocks_count_lo = (count as u16).into();
        self.set_hi16(count, |hi| &mut hi.bg_free_blocks_count_hi);
    }

    /// Sets the free inodes.
    pub fn set_free_inodes_count(&mut self, count: u32) {
        self.raw_mut().bg_free_inodes_count_lo = (count as u16).into();
        self.set_hi16(count, |hi| &mut hi.bg_free_inodes_count_hi);
    }

    /// Sets the directories.
    pub fn set_used_dirs_count(&mut self, count: u32) {
        self.raw_mut().bg_used_dirs_count_lo = (count as u16).into();
        self.set_hi16(count, |hi| &mut hi.bg_used_dirs_count_hi);
    }

    /// Sets the inodes at the end of the table that were never used.
    pub fn set_itable_unused(&mut self, count: u32) {
        self.raw_mut().bg_itable_unused_lo = (count as u16).into();
        self.set_hi16(count, |hi| &mut hi.bg_itable_unused_hi);
    }

    /// Sets `bg_flags`.
    pub fn set_flags(&mut self, flags: GroupFlags) {
        self.raw_mut().bg_flags = flags.bits().into();
    }

    /// Computes and stores the block bitmap's checksum, under `metadata_csum`.
    pub fn seal_block_bitmap(&mut self, sb: &Superblock, map: &[u8]) {
        if let Some(csum) = bitmap_csum(sb, map, sb.block_bitmap_bytes()) {
            self.raw_mut().bg_block_bitmap_csum_lo = (csum as u16).into();
            if let Some(hi) = self.raw_hi_mut() {
                hi.bg_block_bitmap_csum_hi = ((csum >> 16) as u16).into();
            }
        }
    }

    /// Computes and stores the inode bitmap's checksum, under `metadata_csum`.
    pub fn seal_inode_bitmap(&mut self, sb: &Superblock, map: &[u8]) {
        if let Some(csum) = bitmap_csum(sb, map, sb.inode_bitmap_bytes()) {
            self.raw_mut().bg_inode_bitmap_csum_lo = (csum as u16).into();
            if let Some(hi) = self.raw_hi_mut() {
                hi.bg_inode_bitmap_csum_hi = ((csum >> 16) as u16).into();
            }
        }
    }

    /// Computes and stores the descriptor's checksum: the last step of every edit.
    pub fn seal(&mut self, how: DescChecksum, group: GroupNumber) {
        if let Some(csum) = self.computed_checksum(how, group) {
            self.raw_mut().bg_checksum = csum.into();
        }
    }

    fn set_hi32(&mut self, value: u64, field: impl Fn(&mut RawGroupDescHi) -> &mut U32) {
        let high = (value >> 32) as u32;
        match self.raw_hi_mut() {
            Some(hi) => *field(hi) = high.into(),
            None => assert_eq!(high, 0, "block {value} in a 32-byte descriptor"),
        }
    }

    fn set_hi16(&mut self, value: u32, field: impl Fn(&mut RawGroupDescHi) -> &mut U16) {
        let high = (value >> 16) as u16;
        match self.raw_hi_mut() {
            Some(hi) => *field(hi) = high.into(),
            None => assert_eq!(high, 0, "count {value} in a 32-byte descriptor"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::sample_superblock;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_set_reads_back(
            block in 0u64..1 << 48, count in 0u32..1 << 20, flags: u16, len in prop_oneof![Just(64usize), Just(128), Just(1024)]
        ) {
            let mut bytes = vec![0xA5; len];
            let mut desc = GroupDesc::new(&mut bytes[..]).unwrap();
            desc.set_block_bitmap(FsBlock(block));
            desc.set_inode_bitmap(FsBlock(block + 1));
            desc.set_inode_table(FsBlock(block + 2));
            desc.set_free_blocks_count(count);
            desc.set_free_inodes_count(count + 1);
            desc.set_used_dirs_count(count + 2);
            desc.set_itable_unused(count + 3);
            desc.set_flags(GroupFlags::from_bits_retain(flags));
            desc.seal(DescChecksum::Crc16(9), GroupNumber(5));
            let blocks = [desc.block_bitmap().0, desc.inode_bitmap().0, desc.inode_table().0];
            prop_assert_eq!(blocks, [block, block + 1, block + 2]);
            let counts = [desc.free_blocks_count(), desc.free_inodes_count(), desc.used_dirs_count(), desc.itable_unused()];
            prop_assert_eq!(counts, [count, count + 1, count + 2, count + 3]);
            prop_assert_eq!(desc.flags().bits(), flags);
            prop_assert!(desc.verify(DescChecksum::Crc16(9), GroupNumber(5)).is_ok());
            prop_assert!(desc.verify(DescChecksum::Crc16(9), GroupNumber(6)).is_err());
            prop_assert!(bytes[64..].iter().all(|&byte| byte == 0xA5));
        }
    }

    #[test]
    fn a_place_outside_the_filesystem_is_refused() {
        let sb = sample_superblock();
        let mut bytes = [0u8; 64];
        let mut desc = GroupDesc::new(&mut bytes[..]).unwrap();
        desc.set_block_bitmap(FsBlock(100));
        desc.set_inode_bitmap(FsBlock(101));
        desc.set_inode_table(FsBlock(sb.blocks_count() - 511));
        let error = desc.check(&sb, GroupNumber(0)).unwrap_err();
        assert_eq!(error.to_string(), "group descriptor of group 0: inode table at block 261533");
        desc.set_inode_table(FsBlock(sb.blocks_count() - 512));
        assert!(desc.check(&sb, GroupNumber(0)).is_ok());
        desc.set_free_inodes_count(8193);
        assert!(desc.check(&sb, GroupNumber(0)).is_err());
    }
}
