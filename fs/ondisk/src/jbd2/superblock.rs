//! The journal's superblock (`struct journal_superblock_s`).
//!
//! It is edited in place by [`edit_superblock`], so that fields of external
//! journals (the users' UUIDs) and later features survive.

use bitflags::bitflags;
use uuid::Uuid;
use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BlockType, CHECKSUM_CRC32C, CsumVersion, Header, RawHeader, TagFormat};
use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};

const WHAT: &str = "journal superblock";

/// Bytes of the superblock; the rest of its block is unused.
pub const SUPERBLOCK_SIZE: usize = 1024;
/// Fewest blocks of a journal the kernel accepts (`JBD2_MIN_JOURNAL_BLOCKS`).
pub const MIN_BLOCKS: u32 = 1024;
/// Fast-commit blocks when `s_num_fc_blks` is 0 (`JBD2_DEFAULT_FAST_COMMIT_BLOCKS`).
const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;

bitflags! {
    /// `s_feature_compat`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct JournalCompat: u32 {
        /// The commit block holds a CRC-32 of the whole transaction.
        const CHECKSUM = 0x1;
        const _ = !0;
    }

    /// `s_feature_incompat`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct JournalIncompat: u32 {
        /// There are revoke blocks.
        const REVOKE = 0x1;
        /// Block numbers have 64 bits.
        const BITS64 = 0x2;
        /// The commit block may be written before the blocks it commits.
        const ASYNC_COMMIT = 0x4;
        /// 16-bit checksums in tags.
        const CSUM_V2 = 0x8;
        /// 32-bit checksums in tags.
        const CSUM_V3 = 0x10;
        /// The last `s_num_fc_blks` blocks hold fast commits.
        const FAST_COMMIT = 0x20;
        const _ = !0;
    }
}

impl JournalIncompat {
    /// What this crate reads and writes.
    pub const KNOWN: Self = Self::REVOKE
        .union(Self::BITS64)
        .union(Self::ASYNC_COMMIT)
        .union(Self::CSUM_V2)
        .union(Self::CSUM_V3)
        .union(Self::FAST_COMMIT);
}

/// `struct journal_superblock_s`.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; journal.rst describes them.
pub struct RawJournalSuperblock {
    pub s_header: RawHeader,
    pub s_blocksize: U32,
    pub s_maxlen: U32,
    pub s_first: U32,
    pub s_sequence: U32,
    pub s_start: U32,
    pub s_errno: U32,
    pub s_feature_compat: U32,
    pub s_feature_incompat: U32,
    pub s_feature_ro_compat: U32,
    pub s_uuid: [u8; 16],
    pub s_nr_users: U32,
    pub s_dynsuper: U32,
    pub s_max_transaction: U32,
    pub s_max_trans_data: U32,
    pub s_checksum_type: u8,
    pub s_padding2: [u8; 3],
    pub s_num_fc_blks: U32,
    pub s_head: U32,
    pub s_padding: [U32; 40],
    pub s_checksum: U32,
    pub s_users: [[u8; 16]; 48],
}

const _: () = assert!(size_of::<RawJournalSuperblock>() == SUPERBLOCK_SIZE);
const _: () = assert!(std::mem::offset_of!(RawJournalSuperblock, s_feature_compat) == 0x24);
const _: () = assert!(std::mem::offset_of!(RawJournalSuperblock, s_checksum_type) == 0x50);
const _: () = assert!(std::mem::offset_of!(RawJournalSuperblock, s_checksum) == 0xFC);

/// A journal superblock, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalSuperblock {
    /// Version 2, the one with features.
    pub v2: bool,
    /// Bytes of a journal block.
    pub block_size: u32,
    /// Blocks of the journal, its superblock and the fast-commit area included.
    pub block_count: u32,
    /// First block of the log.
    pub first: u32,
    /// The first transaction expected in the log.
    pub sequence: u32,
    /// The block the log starts at; 0 when the log is empty.
    pub start: u32,
    /// The error the journal was aborted with, a negative errno, or 0.
    pub errno: i32,
    /// Compatible features.
    pub compat: JournalCompat,
    /// Incompatible features, all of them known.
    pub incompat: JournalIncompat,
    /// Read-only compatible features; none is defined.
    pub ro_compat: u32,
    /// The UUID: the filesystem's, or an external journal's own.
    pub uuid: Uuid,
    /// Filesystems that use an external journal.
    pub user_count: u32,
    /// Blocks at the end of the journal for fast commits; 0 without the feature.
    pub fast_commit_count: u32,
    /// Where the log's head was at the last clean unmount; 0 when not known.
    pub head: u32,
}

impl JournalSuperblock {
    /// Reads and checks a superblock, its checksum included.
    ///
    /// # Errors
    /// `Magic` for something else, `Unsupported` for an unknown incompatible
    /// feature or checksum, `Checksum`, `Value` for impossible geometry, `Truncated`.
    pub fn parse(block: &[u8]) -> Result<Self> {
        let (raw, _) = RawJournalSuperblock::ref_from_prefix(block)
            .map_err(|_| Corrupt::truncated(WHAT, block.len(), SUPERBLOCK_SIZE))?;
        let sb = Self::from_raw(raw)?;
        sb.check_features()?;
        if sb.tag_format().has_csum() {
            if raw.s_checksum_type != CHECKSUM_CRC32C {
                let detail = format!("checksum type {} is not CRC-32C", raw.s_checksum_type);
                return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, detail));
            }
            let (stored, computed) = (raw.s_checksum.get(), raw.checksum());
            if stored != computed {
                return Err(Corrupt::checksum(WHAT, stored, computed));
            }
        }
        sb.check_geometry()?;
        Ok(sb)
    }

    /// The fields as they are, with only the magic and the version checked: for
    /// tools that report what is wrong.
    ///
    /// # Errors
    /// `Magic` when this is not a journal superblock.
    pub fn from_raw(raw: &RawJournalSuperblock) -> Result<Self> {
        let header = Header::parse(raw.s_header.as_bytes())?;
        let v2 = match header.block_type {
            BlockType::SuperblockV1 => false,
            BlockType::SuperblockV2 => true,
            other => return Err(Corrupt::new(CorruptKind::Magic, WHAT, format!("is a {other:?}"))),
        };
        // Version 1 ends after s_errno; what follows is not its own.
        let field = |value: U32| if v2 { value.get() } else { 0 };
        let incompat = JournalIncompat::from_bits_retain(field(raw.s_feature_incompat));
        let fast_commit_count = match raw.s_num_fc_blks.get() {
            _ if !incompat.contains(JournalIncompat::FAST_COMMIT) => 0,
            0 => DEFAULT_FAST_COMMIT_BLOCKS,
            count => count,
        };
        Ok(Self {
            v2,
            block_size: raw.s_blocksize.get(),
            block_count: raw.s_maxlen.get(),
            first: raw.s_first.get(),
            sequence: raw.s_sequence.get(),
            start: raw.s_start.get(),
            errno: raw.s_errno.get().cast_signed(),
            compat: JournalCompat::from_bits_retain(field(raw.s_feature_compat)),
            incompat,
            ro_compat: field(raw.s_feature_ro_compat),
            uuid: Uuid::from_bytes(if v2 { raw.s_uuid } else { [0; 16] }),
            user_count: field(raw.s_nr_users),
            fast_commit_count,
            head: field(raw.s_head),
        })
    }

    fn check_features(&self) -> Result<()> {
        let unknown = self.incompat.difference(JournalIncompat::KNOWN);
        if !unknown.is_empty() {
            let detail = format!("unknown incompatible features {:#x}", unknown.bits());
            return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, detail));
        }
        if self.ro_compat != 0 {
            let detail = format!("unknown read-only features {:#x}", self.ro_compat);
            return Err(Corrupt::new(CorruptKind::Unsupported, WHAT, detail));
        }
        let (v2, v3) = (JournalIncompat::CSUM_V2, JournalIncompat::CSUM_V3);
        if self.incompat.contains(v2 | v3) {
            return Err(Corrupt::value(WHAT, "both csum v2 and csum v3 are set"));
        }
        if self.compat.contains(JournalCompat::CHECKSUM) && self.incompat.intersects(v2 | v3) {
            return Err(Corrupt::value(WHAT, "both the v1 checksum and csum v2 or v3 are set"));
        }
        Ok(())
    }

    fn check_geometry(&self) -> Result<()> {
        if !self.block_size.is_power_of_two() || !(1024..=65536).contains(&self.block_size) {
            return Err(Corrupt::value(WHAT, format!("s_blocksize is {}", self.block_size)));
        }
        let end = self.log_end();
        if self.first == 0 || self.first >= end {
            let detail = format!("s_first is {}, the log ends at {end}", self.first);
            return Err(Corrupt::value(WHAT, detail));
        }
        if self.start != 0 && (self.start < self.first || self.start >= end) {
            let detail = format!("s_start is {} outside the log {}..{end}", self.start, self.first);
            return Err(Corrupt::value(WHAT, detail));
        }
        Ok(())
    }

    /// The block after the log's last: the ring wraps from here to `first`; the
    /// fast-commit area begins here.
    pub fn log_end(&self) -> u32 {
        self.block_count.saturating_sub(self.fast_commit_count)
    }

    /// Whether the log holds transactions to replay.
    pub fn needs_recovery(&self) -> bool {
        self.start != 0
    }

    /// The shape of tags and tails.
    pub fn tag_format(&self) -> TagFormat {
        let csum = if self.incompat.contains(JournalIncompat::CSUM_V3) {
            CsumVersion::V3
        } else if self.incompat.contains(JournalIncompat::CSUM_V2) {
            CsumVersion::V2
        } else {
            CsumVersion::None
        };
        TagFormat { csum, wide: self.incompat.contains(JournalIncompat::BITS64) }
    }

    /// The seed of the journal's checksums.
    pub fn csum_seed(&self) -> u32 {
        super::csum_seed(self.uuid.as_bytes())
    }
}

impl RawJournalSuperblock {
    /// An empty version 2 superblock of a journal of `block_count` blocks.
    pub fn new(block_size: u32, block_count: u32, first: u32, uuid: Uuid) -> Self {
        let mut raw = Self::new_zeroed();
        let header = Header { block_type: BlockType::SuperblockV2, sequence: 0 };
        header.write(raw.s_header.as_mut_bytes());
        raw.s_blocksize = U32::new(block_size);
        raw.s_maxlen = U32::new(block_count);
        raw.s_first = U32::new(first);
        raw.s_sequence = U32::new(1);
        raw.s_nr_users = U32::new(1);
        raw.s_uuid = uuid.into_bytes();
        raw
    }

    /// The checksum of the superblock: CRC-32C of its 1024 bytes with
    /// `s_checksum` zero, without the journal's seed.
    pub fn checksum(&self) -> u32 {
        let at = std::mem::offset_of!(Self, s_checksum);
        let bytes = self.as_bytes();
        crc32c(crc32c(crc32c(!0, &bytes[..at]), &[0; 4]), &bytes[at + 4..])
    }

    /// Sets checksum and checksum type when the features ask for them.
    pub fn update_checksum(&mut self) {
        let v2 = self.s_header.h_blocktype.get() == BlockType::SuperblockV2.raw();
        let incompat = JournalIncompat::from_bits_retain(self.s_feature_incompat.get());
        if v2 && incompat.intersects(JournalIncompat::CSUM_V2 | JournalIncompat::CSUM_V3) {
            self.s_checksum_type = CHECKSUM_CRC32C;
            self.s_checksum = U32::new(self.checksum());
        }
    }
}

/// Writes the log's state into a superblock's bytes and updates its checksum;
/// `start` 0 means empty. Everything else stays as it is.
///
/// # Errors
/// `Truncated` below 1024 bytes.
pub fn edit_superblock(block: &mut [u8], sequence: u32, start: u32, errno: i32) -> Result<()> {
    edit_superblock_with(block, |raw| {
        raw.s_sequence = U32::new(sequence);
        raw.s_start = U32::new(start);
        raw.s_errno = U32::new(errno.cast_unsigned());
    })
}

/// Edits a superblock's raw fields in place and updates its checksum.
///
/// # Errors
/// `Truncated` below 1024 bytes.
pub fn edit_superblock_with(
    block: &mut [u8],
    edit: impl FnOnce(&mut RawJournalSuperblock),
) -> Result<()> {
    let have = block.len();
    let (raw, _) = RawJournalSuperblock::mut_from_prefix(block)
        .map_err(|_| Corrupt::truncated(WHAT, have, SUPERBLOCK_SIZE))?;
    edit(raw);
    raw.update_checksum();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RawJournalSuperblock {
        let mut raw = RawJournalSuperblock::new(4096, 4096, 1, Uuid::from_u128(7));
        raw.s_feature_incompat = U32::new(0x12);
        raw.update_checksum();
        raw
    }

    #[test]
    fn new_superblock_parses_and_is_empty() {
        let sb = JournalSuperblock::parse(sample().as_bytes()).unwrap();
        assert!(!sb.needs_recovery());
        assert_eq!(sb.tag_format(), TagFormat { csum: CsumVersion::V3, wide: true });
        assert_eq!((sb.log_end(), sb.first, sb.sequence), (4096, 1, 1));
    }

    #[test]
    fn editing_keeps_the_checksum_right_and_the_rest_in_place() {
        let mut bytes = sample().as_bytes().to_vec();
        edit_superblock(&mut bytes, 9, 5, -5).unwrap();
        let sb = JournalSuperblock::parse(&bytes).unwrap();
        assert_eq!((sb.sequence, sb.start, sb.errno), (9, 5, -5));
        assert_eq!(sb.uuid, Uuid::from_u128(7));
    }

    #[test]
    fn damage_is_told_apart() {
        let kind = |edit: fn(&mut RawJournalSuperblock), fix: bool| {
            let mut raw = sample();
            edit(&mut raw);
            if fix {
                raw.update_checksum();
            }
            JournalSuperblock::parse(raw.as_bytes()).unwrap_err().kind
        };
        assert_eq!(kind(|raw| raw.s_first = U32::new(2), false), CorruptKind::Checksum);
        assert_eq!(kind(|raw| raw.s_first = U32::new(5000), true), CorruptKind::Value);
        assert_eq!(kind(|raw| raw.s_start = U32::new(4096), true), CorruptKind::Value);
        assert_eq!(kind(|raw| raw.s_blocksize = U32::new(0), true), CorruptKind::Value);
        assert_eq!(kind(|raw| raw.s_header.h_magic = U32::new(0), true), CorruptKind::Magic);
        let unknown = |raw: &mut RawJournalSuperblock| raw.s_feature_incompat = U32::new(0x112);
        assert_eq!(kind(unknown, true), CorruptKind::Unsupported);
    }

    #[test]
    fn fast_commit_area_ends_the_log() {
        let mut raw = sample();
        raw.s_feature_incompat = U32::new(0x32);
        raw.update_checksum();
        assert_eq!(JournalSuperblock::parse(raw.as_bytes()).unwrap().log_end(), 4096 - 256);
        raw.s_num_fc_blks = U32::new(9999);
        raw.update_checksum();
        assert_eq!(JournalSuperblock::parse(raw.as_bytes()).unwrap_err().kind, CorruptKind::Value);
    }
}
