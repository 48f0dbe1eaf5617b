//! Inodes of 128, 256 and any other size, edited in place.
//!
//! Source: Documentation/filesystems/ext4/inodes.rst and checksums.rst.
//!
//! Invariants: an [`Inode`] is a view over exactly one inode's bytes (the superblock's
//! `inode_size` of them, at least 128). A field past byte 128 exists only when
//! `i_extra_isize` reaches past its end; reading one that does not exist gives its
//! neutral value, setting one does nothing. A setter does not recompute the checksum:
//! [`Inode::seal`] does, once after all edits. Constructing a view costs a length check.

mod timestamp;

#[cfg(test)]
mod tests;

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, Result};
use crate::features::Features;
use crate::superblock::Superblock;
use crate::units::{FsBlock, InodeNumber};

pub use self::timestamp::Timestamp;

const WHAT: &str = "inode";

/// Bytes every inode has.
pub const GOOD_OLD_SIZE: usize = 128;
/// `i_extra_isize` of an inode with all fields known today.
pub const CURRENT_EXTRA_ISIZE: u16 = size_of::<RawInodeExtra>() as u16;
/// Bytes of `i_block`.
pub const I_BLOCK_SIZE: usize = 60;

/// The first 128 bytes of `struct ext4_inode`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawInode {
    pub i_mode: U16,
    pub i_uid: U16,
    pub i_size_lo: U32,
    pub i_atime: U32,
    pub i_ctime: U32,
    pub i_mtime: U32,
    pub i_dtime: U32,
    pub i_gid: U16,
    pub i_links_count: U16,
    pub i_blocks_lo: U32,
    pub i_flags: U32,
    pub l_i_version: U32,
    pub i_block: [u8; I_BLOCK_SIZE],
    pub i_generation: U32,
    pub i_file_acl_lo: U32,
    pub i_size_high: U32,
    pub i_obso_faddr: U32,
    pub l_i_blocks_high: U16,
    pub l_i_file_acl_high: U16,
    pub l_i_uid_high: U16,
    pub l_i_gid_high: U16,
    pub l_i_checksum_lo: U16,
    pub l_i_reserved: U16,
}

/// What follows in `struct ext4_inode` when the inode is larger than 128 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields keep Linux's names and are documented there")]
pub struct RawInodeExtra {
    pub i_extra_isize: U16,
    pub i_checksum_hi: U16,
    pub i_ctime_extra: U32,
    pub i_mtime_extra: U32,
    pub i_atime_extra: U32,
    pub i_crtime: U32,
    pub i_crtime_extra: U32,
    pub i_version_hi: U32,
    pub i_projid: U32,
}

const CHECKSUM_LO_OFFSET: usize = std::mem::offset_of!(RawInode, l_i_checksum_lo);
/// Inodes up to this size have their checksum computed over a copy.
const COPIED_SIZE: usize = 256;
const CHECKSUM_HI_OFFSET: usize =
    GOOD_OLD_SIZE + std::mem::offset_of!(RawInodeExtra, i_checksum_hi);

const _: () = {
    assert!(size_of::<RawInode>() == GOOD_OLD_SIZE);
    assert!(size_of::<RawInodeExtra>() == 32);
    assert!(std::mem::offset_of!(RawInode, i_block) == 0x28);
    assert!(std::mem::offset_of!(RawInode, i_generation) == 0x64);
    assert!(CHECKSUM_LO_OFFSET == 0x7C);
    assert!(CHECKSUM_HI_OFFSET == 0x82);
};

bitflags! {
    /// `i_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
    pub struct InodeFlags: u32 {
        /// Overwrite on deletion; not implemented.
        const SECRM = 0x0000_0001;
        /// Undelete; not implemented.
        const UNRM = 0x0000_0002;
        /// Compressed; not implemented.
        const COMPR = 0x0000_0004;
        /// Synchronous writes.
        const SYNC = 0x0000_0008;
        /// Cannot be changed.
        const IMMUTABLE = 0x0000_0010;
        /// Can only be appended to.
        const APPEND = 0x0000_0020;
        /// `dump` skips it.
        const NODUMP = 0x0000_0040;
        /// Access times are not kept.
        const NOATIME = 0x0000_0080;
        /// Compression: dirty.
        const DIRTY = 0x0000_0100;
        /// Compression: has compressed clusters.
        const COMPRBLK = 0x0000_0200;
        /// Compression: off.
        const NOCOMPR = 0x0000_0400;
        /// Encrypted.
        const ENCRYPT = 0x0000_0800;
        /// A directory with a hash tree.
        const INDEX = 0x0000_1000;
        /// AFS directory.
        const IMAGIC = 0x0000_2000;
        /// Data goes through the journal.
        const JOURNAL_DATA = 0x0000_4000;
        /// Tails are not merged; not implemented.
        const NOTAIL = 0x0000_8000;
        /// Synchronous directory changes.
        const DIRSYNC = 0x0001_0000;
        /// The top of an unrelated directory tree, for placing.
        const TOPDIR = 0x0002_0000;
        /// `i_blocks` counts filesystem blocks.
        const HUGE_FILE = 0x0004_0000;
        /// Mapped by extents.
        const EXTENTS = 0x0008_0000;
        /// fs-verity.
        const VERITY = 0x0010_0000;
        /// Holds an attribute's value.
        const EA_INODE = 0x0020_0000;
        /// Blocks past the end; obsolete.
        const EOFBLOCKS = 0x0040_0000;
        /// Snapshot; never merged.
        const SNAPFILE = 0x0100_0000;
        /// Direct access.
        const DAX = 0x0200_0000;
        /// Snapshot being deleted; never merged.
        const SNAPFILE_DELETED = 0x0400_0000;
        /// Snapshot shrunk; never merged.
        const SNAPFILE_SHRUNK = 0x0800_0000;
        /// Data is in the inode.
        const INLINE_DATA = 0x1000_0000;
        /// New inodes inherit the project.
        const PROJINHERIT = 0x2000_0000;
        /// Names ignore case.
        const CASEFOLD = 0x4000_0000;
        /// Reserved for the library.
        const RESERVED = 0x8000_0000;
        const _ = !0;
    }
}

/// The type in `i_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileType {
    /// `S_IFIFO`.
    Fifo,
    /// `S_IFCHR`.
    CharDevice,
    /// `S_IFDIR`.
    Directory,
    /// `S_IFBLK`.
    BlockDevice,
    /// `S_IFREG`.
    Regular,
    /// `S_IFLNK`.
    Symlink,
    /// `S_IFSOCK`.
    Socket,
}

impl FileType {
    /// From a mode, `None` for a type that does not exist.
    pub fn from_mode(mode: u16) -> Option<Self> {
        match mode & 0xF000 {
            0x1000 => Some(Self::Fifo),
            0x2000 => Some(Self::CharDevice),
            0x4000 => Some(Self::Directory),
            0x6000 => Some(Self::BlockDevice),
            0x8000 => Some(Self::Regular),
            0xA000 => Some(Self::Symlink),
            0xC000 => Some(Self::Socket),
            _ => None,
        }
    }

    /// The type's bits of a mode.
    pub fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0x1000,
            Self::CharDevice => 0x2000,
            Self::Directory => 0x4000,
            Self::BlockDevice => 0x6000,
            Self::Regular => 0x8000,
            Self::Symlink => 0xA000,
            Self::Socket => 0xC000,
        }
    }
}

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct DeviceNumber {
    /// Major, 12 bits.
    pub major: u32,
    /// Minor, 20 bits.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `i_block`: the old encoding in the first word, else the new one in the second.
    pub fn decode(i_block: &[u8; I_BLOCK_SIZE]) -> Self {
        let word = |at: usize| {
            let bytes = &i_block[at..at + 4];
            bytes.iter().rev().fold(0u32, |value, &byte| value << 8 | u32::from(byte))
        };
        match word(0) {
            0 => Self::from_linux(word(4)),
            old => Self { major: old >> 8 & 0xFF, minor: old & 0xFF },
        }
    }

    /// Into `i_block`: the old encoding where it fits, as the kernel does.
    pub fn encode(self, i_block: &mut [u8; I_BLOCK_SIZE]) {
        let Self { major, minor } = self;
        let (old, new) =
            if major < 256 && minor < 256 { (major << 8 | minor, 0) } else { (0, self.to_linux()) };
        i_block[..4].copy_from_slice(&old.to_le_bytes());
        i_block[4..8].copy_from_slice(&new.to_le_bytes());
        // The word after the new encoding is cleared too, as the kernel does.
        i_block[8..12].fill(0);
    }

    /// From the 32 bits system calls and FUSE use (`new_decode_dev`).
    pub fn from_linux(dev: u32) -> Self {
        Self { major: dev >> 8 & 0xFFF, minor: dev & 0xFF | dev >> 12 & 0xF_FF00 }
    }

    /// To the 32 bits system calls and FUSE use (`new_encode_dev`).
    pub fn to_linux(self) -> u32 {
        self.minor & 0xFF | self.major << 8 | (self.minor & !0xFF) << 12
    }
}

/// Numbers of the fields past byte 128: where each ends, for the fit check.
macro_rules! extra_end {
    ($field:ident) => {
        std::mem::offset_of!(RawInodeExtra, $field) + size_of_val(&EXTRA_ZERO.$field)
    };
}
const EXTRA_ZERO: RawInodeExtra = RawInodeExtra {
    i_extra_isize: U16::ZERO,
    i_checksum_hi: U16::ZERO,
    i_ctime_extra: U32::ZERO,
    i_mtime_extra: U32::ZERO,
    i_atime_extra: U32::ZERO,
    i_crtime: U32::ZERO,
    i_crtime_extra: U32::ZERO,
    i_version_hi: U32::ZERO,
    i_projid: U32::ZERO,
};

/// A view of one inode: over `&[u8]` to read, over `&mut [u8]` to edit in place.
#[derive(Clone, Copy, Debug)]
pub struct Inode<B> {
    bytes: B,
}

/// A view to read.
pub type InodeRef<'a> = Inode<&'a [u8]>;
/// A view to edit.
pub type InodeMut<'a> = Inode<&'a mut [u8]>;

impl<B: AsRef<[u8]>> Inode<B> {
    /// A view over an inode's bytes, as many as the superblock's `inode_size`.
    ///
    /// # Errors
    /// `Truncated` below 128 bytes.
    #[inline]
    pub fn new(bytes: B) -> Result<Self> {
        let len = bytes.as_ref().len();
        if len < GOOD_OLD_SIZE {
            return Err(Corrupt::truncated(WHAT, len, GOOD_OLD_SIZE));
        }
        Ok(Self { bytes })
    }

    /// The bytes.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The first 128 bytes' fields.
    #[inline]
    pub fn raw(&self) -> &RawInode {
        RawInode::ref_from_prefix(self.bytes.as_ref()).expect("checked by new").0
    }

    /// The fields past byte 128 when the inode is large enough for all of them, whether or not
    /// `i_extra_isize` reaches them.
    #[inline]
    pub fn raw_extra(&self) -> Option<&RawInodeExtra> {
        let rest = &self.bytes.as_ref()[GOOD_OLD_SIZE..];
        Some(RawInodeExtra::ref_from_prefix(rest).ok()?.0)
    }

    /// `i_extra_isize`: bytes past 128 that hold fields, 0 in a small inode.
    pub fn extra_isize(&self) -> u16 {
        self.raw_extra().map_or(0, |extra| extra.i_extra_isize.get())
    }

    /// The fields past byte 128 when `i_extra_isize` reaches `end` bytes into them.
    #[inline]
    fn extra_up_to(&self, end: usize) -> Option<&RawInodeExtra> {
        self.raw_extra().filter(|extra| usize::from(extra.i_extra_isize.get()) >= end)
    }

    /// Whether `i_extra_isize` stays in the inode and is a multiple of 4.
    ///
    /// # Errors
    /// `Value` when not.
    pub fn check_extra_isize(&self) -> Result<()> {
        let room = self.bytes.as_ref().len() - GOOD_OLD_SIZE;
        let extra = self.extra_isize();
        if usize::from(extra) > room || !extra.is_multiple_of(4) {
            return Err(Corrupt::value(
                WHAT,
                format!("i_extra_isize {extra} with room for {room}"),
            ));
        }
        Ok(())
    }

    /// The bytes after the fields, where extended attributes may lie; empty in a small inode
    /// and when `i_extra_isize` is 0 or impossible.
    pub fn xattr_area(&self) -> &[u8] {
        match self.extra_isize() {
            0 => &[],
            extra => self.bytes.as_ref().get(GOOD_OLD_SIZE + usize::from(extra)..).unwrap_or(&[]),
        }
    }

    /// `i_mode`: type and permissions.
    #[inline]
    pub fn mode(&self) -> u16 {
        self.raw().i_mode.get()
    }

    /// The file type, `None` when it is none that exists.
    #[inline]
    pub fn file_type(&self) -> Option<FileType> {
        FileType::from_mode(self.mode())
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == Some(FileType::Directory)
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.file_type() == Some(FileType::Regular)
    }

    /// Whether it is a symlink.
    pub fn is_symlink(&self) -> bool {
        self.file_type() == Some(FileType::Symlink)
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        u32::from(self.raw().i_uid.get()) | u32::from(self.raw().l_i_uid_high.get()) << 16
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        u32::from(self.raw().i_gid.get()) | u32::from(self.raw().l_i_gid_high.get()) << 16
    }

    /// Bytes. The high half counts for regular files, and for all under `large_dir`.
    pub fn size(&self, features: Features) -> u64 {
        let raw = self.raw();
        let wide = features.large_dir() || self.is_regular();
        let high = if wide { u64::from(raw.i_size_high.get()) << 32 } else { 0 };
        high | u64::from(raw.i_size_lo.get())
    }

    /// The size with both halves, whatever the type: for fsck.
    pub fn raw_size(&self) -> u64 {
        u64::from(self.raw().i_size_lo.get()) | u64::from(self.raw().i_size_high.get()) << 32
    }

    /// `i_blocks` in 512-byte sectors. Under `huge_file` it has 48 bits and, when the inode's
    /// flag says so, counts filesystem blocks.
    pub fn sectors(&self, features: Features, block_size: u32) -> u64 {
        let raw = self.raw();
        if !features.huge_file() {
            return u64::from(raw.i_blocks_lo.get());
        }
        let count = u64::from(raw.i_blocks_lo.get()) | u64::from(raw.l_i_blocks_high.get()) << 32;
        if self.flags().contains(InodeFlags::HUGE_FILE) {
            count * u64::from(block_size / 512)
        } else {
            count
        }
    }

    /// Links.
    #[inline]
    pub fn links_count(&self) -> u16 {
        self.raw().i_links_count.get()
    }

    /// `i_flags`.
    #[inline]
    pub fn flags(&self) -> InodeFlags {
        InodeFlags::from_bits_retain(self.raw().i_flags.get())
    }

    /// Generation: changes when the number is used again.
    pub fn generation(&self) -> u32 {
        self.raw().i_generation.get()
    }

    /// The block of extended attributes, 0 when none. The high half holds under `64bit`.
    pub fn file_acl(&self, features: Features) -> FsBlock {
        let raw = self.raw();
        let high = if features.bit64() { u64::from(raw.l_i_file_acl_high.get()) << 32 } else { 0 };
        FsBlock(high | u64::from(raw.i_file_acl_lo.get()))
    }

    /// `i_block`: the block map, the root of the extent tree, a short symlink, inline data or
    /// a device number.
    #[inline]
    pub fn i_block(&self) -> &[u8; I_BLOCK_SIZE] {
        &self.raw().i_block
    }

    /// Last access.
    pub fn atime(&self) -> Timestamp {
        let extra = self.extra_up_to(extra_end!(i_atime_extra)).map(|x| x.i_atime_extra.get());
        Timestamp::decode(self.raw().i_atime.get(), extra.unwrap_or(0))
    }

    /// Last change of the inode.
    pub fn ctime(&self) -> Timestamp {
        let extra = self.extra_up_to(extra_end!(i_ctime_extra)).map(|x| x.i_ctime_extra.get());
        Timestamp::decode(self.raw().i_ctime.get(), extra.unwrap_or(0))
    }

    /// Last change of the data.
    pub fn mtime(&self) -> Timestamp {
        let extra = self.extra_up_to(extra_end!(i_mtime_extra)).map(|x| x.i_mtime_extra.get());
        Timestamp::decode(self.raw().i_mtime.get(), extra.unwrap_or(0))
    }

    /// Creation; `None` when the inode has no such field.
    pub fn crtime(&self) -> Option<Timestamp> {
        let secs = self.extra_up_to(extra_end!(i_crtime))?.i_crtime.get();
        let extra = self.extra_up_to(extra_end!(i_crtime_extra)).map(|x| x.i_crtime_extra.get());
        Some(Timestamp::decode(secs, extra.unwrap_or(0)))
    }

    /// Deletion in seconds since 1970, or the next inode of the orphan list.
    pub fn dtime(&self) -> u32 {
        self.raw().i_dtime.get()
    }

    /// The change counter, 64 bits when the inode has the high half.
    pub fn version(&self) -> u64 {
        let high = self.extra_up_to(extra_end!(i_version_hi)).map_or(0, |x| x.i_version_hi.get());
        u64::from(self.raw().l_i_version.get()) | u64::from(high) << 32
    }

    /// The project, 0 when the inode has no such field.
    pub fn project(&self) -> u32 {
        self.extra_up_to(extra_end!(i_projid)).map_or(0, |extra| extra.i_projid.get())
    }

    /// The device number of a device file: 16 bits in the first word of `i_block`, or when
    /// that is 0, 32 bits in the second.
    pub fn device(&self) -> DeviceNumber {
        DeviceNumber::decode(self.i_block())
    }

    /// The seed of this inode's checksum and of its extent blocks and directory blocks: from
    /// the filesystem's seed, the number and the generation.
    pub fn csum_seed(&self, fs_seed: u32, number: InodeNumber) -> u32 {
        inode_csum_seed(fs_seed, number, self.generation())
    }

    /// Whether the inode has the high half of the checksum.
    fn has_checksum_hi(&self) -> bool {
        self.extra_up_to(extra_end!(i_checksum_hi)).is_some()
    }

    /// The stored checksum, 16 bits when there is no room for the high half.
    pub fn checksum(&self) -> u32 {
        let low = u32::from(self.raw().l_i_checksum_lo.get());
        let high = self.extra_up_to(extra_end!(i_checksum_hi));
        high.map_or(low, |extra| low | u32::from(extra.i_checksum_hi.get()) << 16)
    }

    /// The checksum the inode should have, cut to 16 bits when there is no room for more.
    pub fn computed_checksum(&self, fs_seed: u32, number: InodeNumber) -> u32 {
        self.seeded_checksum(self.csum_seed(fs_seed, number))
    }

    /// [`Inode::computed_checksum`] from the inode's own seed.
    fn seeded_checksum(&self, seed: u32) -> u32 {
        let bytes = self.bytes.as_ref();
        let has_hi = self.has_checksum_hi();
        let mut copy = [0; COPIED_SIZE];
        let crc = if let Some(copy) = copy.get_mut(..bytes.len()) {
            // One run over a copy is much quicker than six short ones.
            copy.copy_from_slice(bytes);
            copy[CHECKSUM_LO_OFFSET..CHECKSUM_LO_OFFSET + 2].fill(0);
            if has_hi {
                copy[CHECKSUM_HI_OFFSET..CHECKSUM_HI_OFFSET + 2].fill(0);
            }
            crc32c(seed, copy)
        } else {
            self.checksum_in_pieces(seed)
        };
        if has_hi { crc } else { crc & 0xFFFF }
    }

    /// The checksum of all bytes but those that hold it, as if they were zero.
    fn checksum_in_pieces(&self, seed: u32) -> u32 {
        let bytes = self.bytes.as_ref();
        let crc = crc32c(crc32c(seed, &bytes[..CHECKSUM_LO_OFFSET]), &[0, 0]);
        let crc = crc32c(crc, &bytes[CHECKSUM_LO_OFFSET + 2..GOOD_OLD_SIZE]);
        if !self.has_checksum_hi() {
            return crc32c(crc, &bytes[GOOD_OLD_SIZE..]);
        }
        let crc = crc32c(crc32c(crc, &bytes[GOOD_OLD_SIZE..CHECKSUM_HI_OFFSET]), &[0, 0]);
        crc32c(crc, &bytes[CHECKSUM_HI_OFFSET + 2..])
    }

    /// Checks the checksum, under `metadata_csum`.
    ///
    /// # Errors
    /// `Checksum` with both.
    pub fn verify(&self, sb: &Superblock, number: InodeNumber) -> Result<()> {
        if !sb.features().metadata_csum() {
            return Ok(());
        }
        let (stored, computed) = (self.checksum(), self.computed_checksum(sb.csum_seed(), number));
        if stored == computed {
            return Ok(());
        }
        Err(Corrupt::checksum(WHAT, stored, computed).in_inode(number))
    }
}

/// The seed of an inode's checksums; see [`Inode::csum_seed`].
pub fn inode_csum_seed(fs_seed: u32, number: InodeNumber, generation: u32) -> u32 {
    crc32c(crc32c(fs_seed, &number.0.to_le_bytes()), &generation.to_le_bytes())
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Inode<B> {
    /// The bytes, to edit.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.as_mut()
    }

    /// The first 128 bytes' fields, to edit.
    #[inline]
    pub fn raw_mut(&mut self) -> &mut RawInode {
        RawInode::mut_from_prefix(self.bytes.as_mut()).expect("checked by new").0
    }

    /// The fields past byte 128 when the inode is large enough for all of them, to edit.
    #[inline]
    pub fn raw_extra_mut(&mut self) -> Option<&mut RawInodeExtra> {
        let rest = &mut self.bytes.as_mut()[GOOD_OLD_SIZE..];
        Some(RawInodeExtra::mut_from_prefix(rest).ok()?.0)
    }

    fn extra_up_to_mut(&mut self, end: usize) -> Option<&mut RawInodeExtra> {
        self.raw_extra_mut().filter(|extra| usize::from(extra.i_extra_isize.get()) >= end)
    }

    /// Clears all bytes and gives the inode `extra_isize` bytes of extra fields (0 in a small
    /// inode): the start of a new inode.
    pub fn init(&mut self, extra_isize: u16) {
        self.bytes.as_mut().fill(0);
        if let Some(extra) = self.raw_extra_mut() {
            extra.i_extra_isize = extra_isize.into();
        }
    }

    /// The bytes after the fields, where extended attributes lie, to edit.
    pub fn xattr_area_mut(&mut self) -> &mut [u8] {
        match self.extra_isize() {
            0 => &mut [],
            extra => self
                .bytes
                .as_mut()
                .get_mut(GOOD_OLD_SIZE + usize::from(extra)..)
                .unwrap_or_default(),
        }
    }

    /// Sets type and permissions.
    pub fn set_mode(&mut self, mode: u16) {
        self.raw_mut().i_mode = mode.into();
    }

    /// Sets the owner.
    pub fn set_uid(&mut self, uid: u32) {
        self.raw_mut().i_uid = (uid as u16).into();
        self.raw_mut().l_i_uid_high = ((uid >> 16) as u16).into();
    }

    /// Sets the group.
    pub fn set_gid(&mut self, gid: u32) {
        self.raw_mut().i_gid = (gid as u16).into();
        self.raw_mut().l_i_gid_high = ((gid >> 16) as u16).into();
    }

    /// Sets the size, both halves.
    pub fn set_size(&mut self, size: u64) {
        self.raw_mut().i_size_lo = (size as u32).into();
        self.raw_mut().i_size_high = ((size >> 32) as u32).into();
    }

    /// Sets `i_blocks` from 512-byte sectors, and the inode's `HUGE_FILE` flag to the unit
    /// that fits. `None`, and no change, when it fits no unit (without `huge_file` over
    /// 2³² - 1 sectors, else over 2⁴⁸ - 1 blocks).
    #[must_use]
    pub fn set_sectors(&mut self, sectors: u64, features: Features, block_size: u32) -> Option<()> {
        let limit = if features.huge_file() { 1u64 << 48 } else { 1 << 32 };
        let per_block = u64::from(block_size / 512);
        let (count, huge) =
            if sectors < limit { (sectors, false) } else { (sectors / per_block, true) };
        if count >= limit || (huge && !features.huge_file()) {
            return None;
        }
        let mut flags = self.flags();
        flags.set(InodeFlags::HUGE_FILE, huge);
        self.set_flags(flags);
        self.raw_mut().i_blocks_lo = (count as u32).into();
        self.raw_mut().l_i_blocks_high = ((count >> 32) as u16).into();
        Some(())
    }

    /// Sets the links.
    pub fn set_links_count(&mut self, count: u16) {
        self.raw_mut().i_links_count = count.into();
    }

    /// Sets `i_flags`.
    pub fn set_flags(&mut self, flags: InodeFlags) {
        self.raw_mut().i_flags = flags.bits().into();
    }

    /// Sets the generation.
    pub fn set_generation(&mut self, generation: u32) {
        self.raw_mut().i_generation = generation.into();
    }

    /// Sets the block of extended attributes.
    pub fn set_file_acl(&mut self, block: FsBlock) {
        self.raw_mut().i_file_acl_lo = (block.0 as u32).into();
        self.raw_mut().l_i_file_acl_high = ((block.0 >> 32) as u16).into();
    }

    /// `i_block`, to edit.
    #[inline]
    pub fn i_block_mut(&mut self) -> &mut [u8; I_BLOCK_SIZE] {
        &mut self.raw_mut().i_block
    }

    /// Sets the last access.
    pub fn set_atime(&mut self, time: Timestamp) {
        let secs = match self.extra_up_to_mut(extra_end!(i_atime_extra)) {
            None => time.encode_small(),
            Some(extra) => {
                let (secs, high) = time.encode();
                extra.i_atime_extra = high.into();
                secs
            }
        };
        self.raw_mut().i_atime = secs.into();
    }

    /// Sets the last change of the inode.
    pub fn set_ctime(&mut self, time: Timestamp) {
        let secs = match self.extra_up_to_mut(extra_end!(i_ctime_extra)) {
            None => time.encode_small(),
            Some(extra) => {
                let (secs, high) = time.encode();
                extra.i_ctime_extra = high.into();
                secs
            }
        };
        self.raw_mut().i_ctime = secs.into();
    }

    /// Sets the last change of the data.
    pub fn set_mtime(&mut self, time: Timestamp) {
        let secs = match self.extra_up_to_mut(extra_end!(i_mtime_extra)) {
            None => time.encode_small(),
            Some(extra) => {
                let (secs, high) = time.encode();
                extra.i_mtime_extra = high.into();
                secs
            }
        };
        self.raw_mut().i_mtime = secs.into();
    }

    /// Sets the creation.
    pub fn set_crtime(&mut self, time: Timestamp) {
        let (secs, high) = time.encode();
        match self.extra_up_to_mut(extra_end!(i_crtime_extra)) {
            Some(extra) => {
                extra.i_crtime_extra = high.into();
                extra.i_crtime = secs.into();
            }
            None => {
                if let Some(extra) = self.extra_up_to_mut(extra_end!(i_crtime)) {
                    extra.i_crtime = time.encode_small().into();
                }
            }
        }
    }

    /// Sets the deletion time, or the next inode of the orphan list.
    pub fn set_dtime(&mut self, value: u32) {
        self.raw_mut().i_dtime = value.into();
    }

    /// Sets the change counter.
    pub fn set_version(&mut self, version: u64) {
        self.raw_mut().l_i_version = (version as u32).into();
        if let Some(extra) = self.extra_up_to_mut(extra_end!(i_version_hi)) {
            extra.i_version_hi = ((version >> 32) as u32).into();
        }
    }

    /// Sets the project.
    pub fn set_project(&mut self, project: u32) {
        if let Some(extra) = self.extra_up_to_mut(extra_end!(i_projid)) {
            extra.i_projid = project.into();
        }
    }

    /// Sets the device number: 16 bits where they suffice, as the kernel does.
    pub fn set_device(&mut self, device: DeviceNumber) {
        device.encode(self.i_block_mut());
    }

    /// Computes and stores the checksum, under `metadata_csum`: the last step of every edit.
    pub fn seal(&mut self, sb: &Superblock, number: InodeNumber) {
        if sb.features().metadata_csum() {
            self.set_checksum(self.computed_checksum(sb.csum_seed(), number));
        }
    }

    /// As [`Inode::seal`], by who has the inode's own seed.
    pub fn seal_seeded(&mut self, sb: &Superblock, seed: u32) {
        if sb.features().metadata_csum() {
            self.set_checksum(self.seeded_checksum(seed));
        }
    }

    /// Stores a checksum; the high half where there is room.
    pub fn set_checksum(&mut self, csum: u32) {
        self.raw_mut().l_i_checksum_lo = (csum as u16).into();
        if let Some(extra) = self.extra_up_to_mut(extra_end!(i_checksum_hi)) {
            extra.i_checksum_hi = ((csum >> 16) as u16).into();
        }
    }
}
