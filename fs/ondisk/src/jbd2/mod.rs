//! The journal's blocks: jbd2's format, big-endian throughout.
//!
//! Source: Documentation/filesystems/ext4/journal.rst. A journal is a ring of
//! blocks: descriptor blocks name the filesystem blocks whose contents follow,
//! revoke blocks name blocks that must not be replayed, a commit block ends a
//! transaction. Each begins with a [`RawHeader`].
//!
//! Invariants:
//! - Writers fill one block's bytes in place and finish with its checksum; a
//!   reader checks the magic, the type and, by a separate call, the checksum, so
//!   recovery can tell "not the next block of this log" from "damaged".
//! - The shape of a tag and of a revoke record follows the features alone
//!   ([`TagFormat`]), never the block's own bytes.

mod commit;
mod descriptor;
mod revoke;
mod superblock;

pub use commit::{CommitBlock, RawCommitHeader, transaction_crc32};
pub use descriptor::{DescriptorWriter, Tag, TagFlags, TagIter, descriptor_tags};
pub use revoke::{RawRevokeHeader, RevokeIter, RevokeWriter, revoke_records};
pub use superblock::{
    JournalCompat, JournalIncompat, JournalSuperblock, MIN_BLOCKS, RawJournalSuperblock,
    SUPERBLOCK_SIZE, edit_superblock, edit_superblock_with,
};

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};

/// `JBD2_MAGIC_NUMBER`.
pub const MAGIC: u32 = 0xC03B_3998;
/// Bytes of the checksum at the end of descriptor and revoke blocks.
pub const TAIL_SIZE: usize = 4;
/// Bytes of [`RawHeader`].
pub const HEADER_SIZE: usize = 12;
/// `JBD2_CRC32_CHKSUM`: the type of the checksum over a whole transaction.
pub const CHECKSUM_CRC32: u8 = 1;
/// `JBD2_CRC32C_CHKSUM`: the type csum v2 and v3 use.
pub const CHECKSUM_CRC32C: u8 = 4;

/// What a journal block is (`h_blocktype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// Names the blocks that follow.
    Descriptor,
    /// Ends a transaction.
    Commit,
    /// The superblock without features.
    SuperblockV1,
    /// The superblock.
    SuperblockV2,
    /// Names blocks that must not be replayed.
    Revoke,
}

impl BlockType {
    /// From `h_blocktype`; `None` for a number the format does not define.
    pub fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            1 => Some(Self::Descriptor),
            2 => Some(Self::Commit),
            3 => Some(Self::SuperblockV1),
            4 => Some(Self::SuperblockV2),
            5 => Some(Self::Revoke),
            _ => None,
        }
    }

    /// The number on disk.
    pub fn raw(self) -> u32 {
        match self {
            Self::Descriptor => 1,
            Self::Commit => 2,
            Self::SuperblockV1 => 3,
            Self::SuperblockV2 => 4,
            Self::Revoke => 5,
        }
    }
}

/// `struct journal_header_s`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`MAGIC`].
    pub h_magic: U32,
    /// See [`BlockType`].
    pub h_blocktype: U32,
    /// The transaction.
    pub h_sequence: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);

/// A journal block's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the block is.
    pub block_type: BlockType,
    /// The transaction it belongs to.
    pub sequence: u32,
}

impl Header {
    /// Reads the header of a journal block.
    ///
    /// # Errors
    /// `Magic` when the block does not carry the journal's magic (the usual end
    /// of a log), `Value` for an unknown type, `Truncated` below 12 bytes.
    pub fn parse(block: &[u8]) -> Result<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(block)
            .map_err(|_| Corrupt::truncated("journal block", block.len(), HEADER_SIZE))?;
        let magic = raw.h_magic.get();
        if magic != MAGIC {
            let detail = format!("h_magic is {magic:#010x}");
            return Err(Corrupt::new(CorruptKind::Magic, "journal block", detail));
        }
        let raw_type = raw.h_blocktype.get();
        let block_type = BlockType::from_raw(raw_type)
            .ok_or_else(|| Corrupt::value("journal block", format!("h_blocktype is {raw_type}")))?;
        Ok(Self { block_type, sequence: raw.h_sequence.get() })
    }

    /// Writes the header into the first 12 bytes.
    ///
    /// # Panics
    /// When the block is shorter than that: a broken promise of the caller.
    pub fn write(&self, block: &mut [u8]) {
        let raw = RawHeader {
            h_magic: U32::new(MAGIC),
            h_blocktype: U32::new(self.block_type.raw()),
            h_sequence: U32::new(self.sequence),
        };
        block[..HEADER_SIZE].copy_from_slice(raw.as_bytes());
    }
}

/// Which checksums the journal's metadata carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CsumVersion {
    /// None (or only the v1 checksum over a whole transaction in its commit block).
    #[default]
    None,
    /// csum v2: 16 bits per tag.
    V2,
    /// csum v3: 32 bits per tag.
    V3,
}

/// The shape of tags, tails and revoke records, from the journal's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TagFormat {
    /// The checksums.
    pub csum: CsumVersion,
    /// Block numbers have 64 bits.
    pub wide: bool,
}

impl TagFormat {
    /// Bytes of one tag, without the UUID that may follow it.
    pub fn tag_size(self) -> usize {
        match (self.csum, self.wide) {
            (CsumVersion::V3, _) => 16,
            // csum v2 grew the tag by two bytes that nothing uses.
            (CsumVersion::V2, true) => 14,
            (CsumVersion::V2, false) => 10,
            (CsumVersion::None, true) => 12,
            (CsumVersion::None, false) => 8,
        }
    }

    /// Bytes of the checksum at the end of descriptor and revoke blocks.
    pub fn tail_size(self) -> usize {
        if self.has_csum() { TAIL_SIZE } else { 0 }
    }

    /// Bytes of one revoke record.
    pub fn revoke_record_size(self) -> usize {
        if self.wide { 8 } else { 4 }
    }

    /// Whether blocks carry checksums of v2 or v3.
    pub fn has_csum(self) -> bool {
        self.csum != CsumVersion::None
    }
}

/// The seed of every journal checksum: `crc32c(!0, s_uuid)`.
pub fn csum_seed(journal_uuid: &[u8; 16]) -> u32 {
    crc32c(!0, journal_uuid)
}

/// The checksum of a logged block, as it lies in the journal (that is, escaped).
/// csum v2 stores its low 16 bits.
pub fn logged_block_csum(seed: u32, sequence: u32, data: &[u8]) -> u32 {
    crc32c(crc32c(seed, U32::new(sequence).as_bytes()), data)
}

/// Whether a block's contents begin with the journal's magic, so that its copy
/// in the log must be escaped.
pub fn needs_escape(data: &[u8]) -> bool {
    data.len() >= 4 && data[..4] == *U32::new(MAGIC).as_bytes()
}

/// Turns a block's contents into what the log may hold: the magic is zeroed.
/// Its tag must carry [`TagFlags::ESCAPE`].
pub fn escape(data: &mut [u8]) {
    if let Some(head) = data.get_mut(..4) {
        head.fill(0);
    }
}

/// Undoes [`escape`].
pub fn unescape(data: &mut [u8]) {
    if let Some(head) = data.get_mut(..4) {
        head.copy_from_slice(U32::new(MAGIC).as_bytes());
    }
}

/// The checksum of a block whose last four bytes hold it.
fn tail_csum(seed: u32, block: &[u8]) -> Option<(u32, u32)> {
    let (body, tail) = block.split_at_checked(block.len().checked_sub(TAIL_SIZE)?)?;
    let stored = U32::read_from_bytes(tail).ok()?.get();
    Some((stored, crc32c(crc32c(seed, body), &[0; TAIL_SIZE])))
}

/// Checks the tail of a descriptor or revoke block (csum v2 and v3 only).
///
/// # Errors
/// `Checksum` when it does not match, `Truncated` when there is no tail.
pub fn verify_tail(seed: u32, block: &[u8]) -> Result<()> {
    let (stored, computed) = tail_csum(seed, block)
        .ok_or_else(|| Corrupt::truncated("journal block", block.len(), TAIL_SIZE))?;
    if stored == computed {
        Ok(())
    } else {
        Err(Corrupt::checksum("journal block", stored, computed))
    }
}

/// Sets the tail of a descriptor or revoke block.
///
/// # Panics
/// When the block is shorter than the tail: a broken promise of the caller.
pub fn set_tail(seed: u32, block: &mut [u8]) {
    let (_, computed) = tail_csum(seed, block).expect("a journal block holds its tail");
    let at = block.len() - TAIL_SIZE;
    block[at..].copy_from_slice(U32::new(computed).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_a_round_trip_and_says_what_is_wrong() {
        let mut block = [0u8; 64];
        let header = Header { block_type: BlockType::Commit, sequence: 77 };
        header.write(&mut block);
        assert_eq!(Header::parse(&block), Ok(header));
        block[4..8].copy_from_slice(&9u32.to_be_bytes());
        assert_eq!(Header::parse(&block).unwrap_err().kind, CorruptKind::Value);
        block[0] = 0;
        assert_eq!(Header::parse(&block).unwrap_err().kind, CorruptKind::Magic);
        assert_eq!(Header::parse(&block[..11]).unwrap_err().kind, CorruptKind::Truncated);
    }

    #[test]
    fn a_block_that_begins_with_the_magic_is_escaped_and_comes_back() {
        let mut data = MAGIC.to_be_bytes().to_vec();
        data.push(5);
        assert!(needs_escape(&data));
        escape(&mut data);
        assert!(!needs_escape(&data));
        unescape(&mut data);
        assert_eq!(data, [0xC0, 0x3B, 0x39, 0x98, 5]);
    }

    #[test]
    fn tail_checksum_covers_the_block_and_ignores_its_old_value() {
        let mut block = vec![7u8; 1024];
        set_tail(1, &mut block);
        let once = block.clone();
        set_tail(1, &mut block);
        assert_eq!(once, block);
        assert_eq!(verify_tail(1, &block), Ok(()));
        block[0] ^= 1;
        assert_eq!(verify_tail(1, &block).unwrap_err().kind, CorruptKind::Checksum);
        assert_eq!(verify_tail(1, &block[..3]).unwrap_err().kind, CorruptKind::Truncated);
    }
}
