//! Commit blocks: a transaction whose commit block is whole and on disk happened.

use std::mem::offset_of;
use std::time::Duration;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BlockType, CHECKSUM_CRC32, Header, RawHeader};
use crate::checksum::crc32c;
use crate::error::{Corrupt, Result};

const WHAT: &str = "journal commit block";

/// `struct commit_header`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; journal.rst describes them.
pub struct RawCommitHeader {
    pub header: RawHeader,
    pub h_chksum_type: u8,
    pub h_chksum_size: u8,
    pub h_padding: [u8; 2],
    pub h_chksum: [U32; 8],
    pub h_commit_sec: U64,
    pub h_commit_nsec: U32,
}

const _: () = assert!(size_of::<RawCommitHeader>() == 60);
const _: () = assert!(offset_of!(RawCommitHeader, h_chksum) == 0x10);
const _: () = assert!(offset_of!(RawCommitHeader, h_commit_sec) == 0x30);

/// A commit block, its header checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitBlock {
    /// The transaction.
    pub sequence: u32,
    /// When it was committed, since the epoch; 0 when unknown.
    pub time: Duration,
    /// The CRC-32 of the whole transaction, when the block holds one (compat `CHECKSUM`).
    pub transaction_crc32: Option<u32>,
}

impl CommitBlock {
    /// Reads a commit block; its own checksum is checked by [`CommitBlock::verify`].
    ///
    /// # Errors
    /// As [`Header::parse`], and `Value` when the block is of another type.
    pub fn parse(block: &[u8]) -> Result<Self> {
        let header = Header::parse(block)?;
        if header.block_type != BlockType::Commit {
            return Err(Corrupt::value(WHAT, format!("is a {:?}", header.block_type)));
        }
        let (raw, _) = RawCommitHeader::ref_from_prefix(block)
            .map_err(|_| Corrupt::truncated(WHAT, block.len(), size_of::<RawCommitHeader>()))?;
        let crc = (raw.h_chksum_type == CHECKSUM_CRC32 && raw.h_chksum_size == 4)
            .then(|| raw.h_chksum[0].get());
        let nsec = raw.h_commit_nsec.get();
        let time = if nsec < 1_000_000_000 {
            Duration::new(raw.h_commit_sec.get(), nsec)
        } else {
            Duration::from_secs(raw.h_commit_sec.get())
        };
        Ok(Self { sequence: header.sequence, time, transaction_crc32: crc })
    }

    /// Writes a commit block over the whole of `block`. With `seed` (csum v2 and
    /// v3) it carries its own checksum, with `transaction_crc32` the transaction's.
    ///
    /// # Errors
    /// `Truncated` when the block is shorter than the header.
    pub fn write(&self, block: &mut [u8], seed: Option<u32>) -> Result<()> {
        let have = block.len();
        block.fill(0);
        let (raw, _) = RawCommitHeader::mut_from_prefix(block)
            .map_err(|_| Corrupt::truncated(WHAT, have, size_of::<RawCommitHeader>()))?;
        let header = Header { block_type: BlockType::Commit, sequence: self.sequence };
        header.write(raw.header.as_mut_bytes());
        raw.h_commit_sec = U64::new(self.time.as_secs());
        raw.h_commit_nsec = U32::new(self.time.subsec_nanos());
        if let (Some(crc), None) = (self.transaction_crc32, seed) {
            raw.h_chksum_type = CHECKSUM_CRC32;
            raw.h_chksum_size = 4;
            raw.h_chksum[0] = U32::new(crc);
        }
        if let Some(seed) = seed {
            let checksum = Self::checksum(seed, block);
            let at = offset_of!(RawCommitHeader, h_chksum);
            block[at..at + 4].copy_from_slice(U32::new(checksum).as_bytes());
        }
        Ok(())
    }

    /// The checksum of a commit block: the block with `h_chksum[0]` zero.
    fn checksum(seed: u32, block: &[u8]) -> u32 {
        let at = offset_of!(RawCommitHeader, h_chksum);
        let head = block.get(..at).unwrap_or(block);
        let rest = block.get(at + 4..).unwrap_or(&[]);
        crc32c(crc32c(crc32c(seed, head), &[0; 4]), rest)
    }

    /// Checks a commit block's own checksum (csum v2 and v3 only).
    ///
    /// # Errors
    /// `Checksum` when it does not match, `Truncated` when there is none.
    pub fn verify(block: &[u8], seed: u32) -> Result<()> {
        let (raw, _) = RawCommitHeader::ref_from_prefix(block)
            .map_err(|_| Corrupt::truncated(WHAT, block.len(), size_of::<RawCommitHeader>()))?;
        let (stored, computed) = (raw.h_chksum[0].get(), Self::checksum(seed, block));
        if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
    }
}

/// Continues the CRC-32 over a whole transaction (compat `CHECKSUM`): the
/// kernel's `crc32_be(crc, data)`. Begin with `!0`; feed every descriptor block
/// and logged block in the order of the log.
pub fn transaction_crc32(crc: u32, data: &[u8]) -> u32 {
    data.iter().fold(crc, |crc, &byte| {
        let index = (crc >> 24) ^ u32::from(byte);
        (crc << 8) ^ CRC32_BE[index as usize]
    })
}

/// The table of CRC-32 with the polynomial 0x04C11DB7, most significant bit first.
const CRC32_BE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        // `index` is below 256.
        #[allow(clippy::cast_possible_truncation)]
        let mut crc = (index as u32) << 24;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc >> 31 == 1 { (crc << 1) ^ 0x04C1_1DB7 } else { crc << 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CorruptKind;

    #[test]
    fn commit_block_survives_a_round_trip_with_its_checksum() {
        let commit = CommitBlock {
            sequence: 4,
            time: Duration::new(1_700_000_000, 5),
            transaction_crc32: None,
        };
        let mut block = vec![1; 1024];
        commit.write(&mut block, Some(0x1234)).unwrap();
        assert_eq!(CommitBlock::parse(&block), Ok(commit));
        assert_eq!(CommitBlock::verify(&block, 0x1234), Ok(()));
        block[1000] = 1;
        let error = CommitBlock::verify(&block, 0x1234).unwrap_err();
        assert_eq!(error.kind, CorruptKind::Checksum);
    }

    #[test]
    fn commit_block_carries_the_checksum_of_its_transaction() {
        let commit =
            CommitBlock { sequence: 4, time: Duration::ZERO, transaction_crc32: Some(0xABCD) };
        let mut block = vec![1; 1024];
        commit.write(&mut block, None).unwrap();
        assert_eq!(CommitBlock::parse(&block), Ok(commit));
    }

    #[test]
    fn crc32_be_has_its_known_check_value() {
        // CRC-32/MPEG-2: no final inversion, most significant bit first.
        assert_eq!(transaction_crc32(!0, b"123456789"), 0x0376_E6E7);
    }
}
