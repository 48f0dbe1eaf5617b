//! Revoke blocks: blocks whose older copies in the log must not be replayed.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BlockType, Header, RawHeader, TagFormat, set_tail};
use crate::error::{Corrupt, Result};
use crate::units::FsBlock;

const WHAT: &str = "journal revoke block";
const HEADER_SIZE: usize = size_of::<RawRevokeHeader>();

/// `struct jbd2_journal_revoke_header_s`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; journal.rst describes them.
pub struct RawRevokeHeader {
    pub r_header: RawHeader,
    /// Bytes used in the block, this header included.
    pub r_count: U32,
}

const _: () = assert!(HEADER_SIZE == 16);

/// The records of a revoke block whose header was checked.
///
/// # Errors
/// `Value` when `r_count` does not fit the block, `Truncated`.
pub fn revoke_records(block: &[u8], format: TagFormat) -> Result<RevokeIter<'_>> {
    let (raw, _) = RawRevokeHeader::ref_from_prefix(block)
        .map_err(|_| Corrupt::truncated(WHAT, block.len(), HEADER_SIZE))?;
    let count = raw.r_count.get();
    let room = block.len().saturating_sub(format.tail_size());
    let records = usize::try_from(count)
        .ok()
        .filter(|&used| used <= room)
        .and_then(|used| block.get(HEADER_SIZE..used))
        .ok_or_else(|| Corrupt::value(WHAT, format!("r_count is {count}, {room} bytes there")))?;
    Ok(RevokeIter { records: records.chunks_exact(format.revoke_record_size()) })
}

/// See [`revoke_records`].
pub struct RevokeIter<'a> {
    records: std::slice::ChunksExact<'a, u8>,
}

impl Iterator for RevokeIter<'_> {
    type Item = FsBlock;

    fn next(&mut self) -> Option<FsBlock> {
        let record = self.records.next()?;
        match U64::read_from_bytes(record) {
            Ok(wide) => Some(FsBlock(wide.get())),
            Err(_) => U32::read_from_bytes(record).ok().map(|low| FsBlock(low.get().into())),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.records.size_hint()
    }
}

/// Fills a revoke block record by record.
pub struct RevokeWriter<'a> {
    block: &'a mut [u8],
    format: TagFormat,
    at: usize,
}

impl<'a> RevokeWriter<'a> {
    /// Begins a revoke block of transaction `sequence`; the block is zeroed first.
    ///
    /// # Errors
    /// `Truncated` when the block cannot hold even one record.
    pub fn new(block: &'a mut [u8], format: TagFormat, sequence: u32) -> Result<Self> {
        let need = HEADER_SIZE + format.revoke_record_size() + format.tail_size();
        if block.len() < need {
            return Err(Corrupt::truncated(WHAT, block.len(), need));
        }
        block.fill(0);
        Header { block_type: BlockType::Revoke, sequence }.write(block);
        Ok(Self { block, format, at: HEADER_SIZE })
    }

    /// Most records a block of `block_size` bytes holds.
    pub fn capacity(block_size: usize, format: TagFormat) -> usize {
        block_size.saturating_sub(HEADER_SIZE + format.tail_size()) / format.revoke_record_size()
    }

    /// Appends a block. False, and nothing done, when the revoke block is full.
    ///
    /// # Panics
    /// When the block number does not fit the format: a broken promise of the caller.
    #[must_use]
    pub fn push(&mut self, block: FsBlock) -> bool {
        let end = self.at + self.format.revoke_record_size();
        if end + self.format.tail_size() > self.block.len() {
            return false;
        }
        if self.format.wide {
            self.block[self.at..end].copy_from_slice(U64::new(block.0).as_bytes());
        } else {
            let low = u32::try_from(block.0).expect("a journal without 64bit logs 32-bit blocks");
            self.block[self.at..end].copy_from_slice(U32::new(low).as_bytes());
        }
        self.at = end;
        true
    }

    /// Writes the count and the tail's checksum when the format has one.
    pub fn finish(self, seed: u32) {
        let used = u32::try_from(self.at).expect("a block is at most 64 KiB");
        self.block[12..HEADER_SIZE].copy_from_slice(U32::new(used).as_bytes());
        if self.format.has_csum() {
            set_tail(seed, self.block);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::jbd2::{CsumVersion, verify_tail};

    proptest! {
        #[test]
        fn records_survive_a_round_trip(
            wide: bool, csum: bool, blocks in prop::collection::vec(any::<u64>(), 0..400),
        ) {
            let csum = if csum { CsumVersion::V3 } else { CsumVersion::None };
            let format = TagFormat { csum, wide };
            let mut block = vec![0xAA; 1024];
            let mut writer = RevokeWriter::new(&mut block, format, 3).unwrap();
            let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
            let written: Vec<_> = blocks.iter().map(|n| FsBlock(n & mask))
                .take_while(|&n| writer.push(n)).collect();
            writer.finish(1);
            prop_assert!(written.len() <= RevokeWriter::capacity(1024, format));
            prop_assert_eq!(revoke_records(&block, format).unwrap().collect::<Vec<_>>(), written);
            prop_assert!(!format.has_csum() || verify_tail(1, &block).is_ok());
        }
    }

    #[test]
    fn an_impossible_count_is_refused() {
        let format = TagFormat::default();
        let mut block = vec![0; 1024];
        RevokeWriter::new(&mut block, format, 3).unwrap().finish(0);
        for count in [0u32, 15, 1025, u32::MAX] {
            block[12..16].copy_from_slice(&count.to_be_bytes());
            assert!(revoke_records(&block, format).is_err(), "{count}");
        }
        block[12..16].copy_from_slice(&1024u32.to_be_bytes());
        assert_eq!(revoke_records(&block, format).unwrap().count(), 252);
    }
}
