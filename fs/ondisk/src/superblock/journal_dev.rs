//! The superblock of a device that is an external journal.
//!
//! Source: Documentation/filesystems/ext4/journal.rst, "External journal". It has the
//! magic, a block size, a block count and a UUID of its own; the rest of a filesystem's
//! fields mean nothing. The journal's superblock lies in the block behind it.

use uuid::Uuid;
use zerocopy::FromBytes;

use super::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, RawSuperblock, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE};
use crate::error::{Corrupt, Result};
use crate::features::{Features, Incompat};

const WHAT: &str = "external journal";

/// What an external journal's own superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalDevice {
    /// Bytes per block: the filesystem's, too.
    pub block_size: u32,
    /// Blocks of the journal, all before it included.
    pub blocks_count: u32,
    /// The journal's UUID, which the filesystem names.
    pub uuid: Uuid,
}

impl JournalDevice {
    /// Reads the 1024 bytes at byte 1024 of the device.
    ///
    /// # Errors
    /// `Magic`, `Checksum`, `Value` when it is a filesystem and no journal, or a field is
    /// outside its range.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (raw, _) = RawSuperblock::read_from_prefix(bytes)
            .map_err(|_| Corrupt::truncated(WHAT, bytes.len(), SUPERBLOCK_SIZE))?;
        super::check::check_magic(&raw)?;
        super::check::check_checksum(&raw)?;
        let incompat = raw.s_feature_incompat.get();
        if !Features::from_bits(0, incompat, 0).incompat.contains(Incompat::JOURNAL_DEV) {
            return Err(Corrupt::value(WHAT, "is a filesystem, not a journal"));
        }
        let log = raw.s_log_block_size.get();
        if log > MAX_BLOCK_SIZE.ilog2() - MIN_BLOCK_SIZE.ilog2() {
            return Err(Corrupt::value(WHAT, format!("s_log_block_size {log}")));
        }
        // A journal's blocks have 32 bits.
        let blocks_count = raw.s_blocks_count_lo.get();
        if raw.s_blocks_count_hi.get() != 0 || blocks_count < 2 {
            return Err(Corrupt::value(WHAT, format!("{blocks_count} blocks")));
        }
        Ok(Self {
            block_size: MIN_BLOCK_SIZE << log,
            blocks_count,
            uuid: Uuid::from_bytes(raw.s_uuid),
        })
    }

    /// The block of the journal's superblock.
    pub fn superblock(&self) -> u32 {
        // At most 1: the block of byte 1024.
        (SUPERBLOCK_OFFSET / u64::from(self.block_size)) as u32 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::sample_superblock;

    #[test]
    fn a_filesystem_is_no_journal_and_a_journal_says_where_it_begins() {
        let mut sb = sample_superblock();
        assert!(JournalDevice::parse(sb.sealed_bytes()).is_err());
        let incompat = sb.raw().s_feature_incompat.get() | Incompat::JOURNAL_DEV.bits();
        sb.raw_mut().s_feature_incompat = incompat.into();
        let parsed = JournalDevice::parse(sb.sealed_bytes()).unwrap();
        assert_eq!((parsed.block_size, parsed.superblock()), (4096, 1));
        let small = JournalDevice { block_size: 1024, ..parsed };
        assert_eq!(small.superblock(), 2);
        assert!(JournalDevice::parse(&[0; 1024]).is_err());
    }
}
