//! Descriptor blocks: the tags of the blocks that follow in the log.
//!
//! A tag without [`TagFlags::SAME_UUID`] is followed by the journal's 16-byte
//! UUID; the first tag of a block is written so. The tag with
//! [`TagFlags::LAST_TAG`] ends the list.

use bitflags::bitflags;
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::{BlockType, CsumVersion, HEADER_SIZE, Header, TagFormat, set_tail};
use crate::error::{Corrupt, Result};
use crate::units::FsBlock;

const UUID_SIZE: usize = 16;

bitflags! {
    /// `t_flags`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct TagFlags: u32 {
        /// The block began with the journal's magic, which is zeroed in the log.
        const ESCAPE = 0x1;
        /// No UUID follows this tag.
        const SAME_UUID = 0x2;
        /// The block was deleted by this transaction (never written any more).
        const DELETED = 0x4;
        /// The last tag of the block.
        const LAST_TAG = 0x8;
        const _ = !0;
    }
}

/// One logged block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Where the block belongs in the filesystem.
    pub block: FsBlock,
    /// Its flags.
    pub flags: TagFlags,
    /// Its checksum: 32 bits under csum v3, 16 under v2, 0 without.
    pub checksum: u32,
}

impl Tag {
    /// Whether a logged block's contents are what the tag says: always true without checksums.
    pub fn matches(&self, format: TagFormat, seed: u32, sequence: u32, data: &[u8]) -> bool {
        match format.csum {
            CsumVersion::None => true,
            CsumVersion::V2 => {
                self.checksum == super::logged_block_csum(seed, sequence, data) & 0xFFFF
            }
            CsumVersion::V3 => self.checksum == super::logged_block_csum(seed, sequence, data),
        }
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(U32::read_from_bytes(bytes.get(at..at.checked_add(4)?)?).ok()?.get())
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u32> {
    Some(U16::read_from_bytes(bytes.get(at..at.checked_add(2)?)?).ok()?.get().into())
}

fn read_tag(bytes: &[u8], format: TagFormat) -> Option<Tag> {
    let low = read_u32(bytes, 0)?;
    let (flags, high, checksum) = match format.csum {
        CsumVersion::V3 => (read_u32(bytes, 4)?, read_u32(bytes, 8)?, read_u32(bytes, 12)?),
        csum => {
            let high = if format.wide { read_u32(bytes, 8)? } else { 0 };
            let checksum = if csum == CsumVersion::V2 { read_u16(bytes, 4)? } else { 0 };
            (read_u16(bytes, 6)?, high, checksum)
        }
    };
    let high = if format.wide { high } else { 0 };
    Some(Tag {
        block: FsBlock(u64::from(high) << 32 | u64::from(low)),
        flags: TagFlags::from_bits_retain(flags),
        checksum,
    })
}

fn write_tag(bytes: &mut [u8], format: TagFormat, tag: &Tag) {
    // The halves are meant: the format splits the number.
    #[allow(clippy::cast_possible_truncation)]
    let (low, high) = (tag.block.0 as u32, (tag.block.0 >> 32) as u32);
    #[allow(clippy::cast_possible_truncation)]
    let (flags16, checksum16) = (tag.flags.bits() as u16, tag.checksum as u16);
    bytes.fill(0);
    bytes[..4].copy_from_slice(U32::new(low).as_bytes());
    if format.csum == CsumVersion::V3 {
        bytes[4..8].copy_from_slice(U32::new(tag.flags.bits()).as_bytes());
        bytes[8..12].copy_from_slice(U32::new(if format.wide { high } else { 0 }).as_bytes());
        bytes[12..16].copy_from_slice(U32::new(tag.checksum).as_bytes());
        return;
    }
    if format.csum == CsumVersion::V2 {
        bytes[4..6].copy_from_slice(U16::new(checksum16).as_bytes());
    }
    bytes[6..8].copy_from_slice(U16::new(flags16).as_bytes());
    if format.wide {
        bytes[8..12].copy_from_slice(U32::new(high).as_bytes());
    }
}

/// The tags of a descriptor block whose header was checked. Ends after the
/// last-tag flag, or where no further tag fits, as the kernel's recovery does.
pub fn descriptor_tags(block: &[u8], format: TagFormat) -> TagIter<'_> {
    let end = block.len().saturating_sub(format.tail_size());
    TagIter { bytes: &block[..end], at: HEADER_SIZE, format, done: false }
}

/// See [`descriptor_tags`].
pub struct TagIter<'a> {
    bytes: &'a [u8],
    at: usize,
    format: TagFormat,
    done: bool,
}

impl Iterator for TagIter<'_> {
    type Item = Tag;

    fn next(&mut self) -> Option<Tag> {
        if self.done {
            return None;
        }
        let size = self.format.tag_size();
        let bytes = self.bytes.get(self.at..self.at.checked_add(size)?)?;
        let tag = read_tag(bytes, self.format)?;
        self.at += size;
        if !tag.flags.contains(TagFlags::SAME_UUID) {
            self.at += UUID_SIZE;
        }
        self.done = tag.flags.contains(TagFlags::LAST_TAG);
        Some(tag)
    }
}

/// Fills a descriptor block tag by tag.
pub struct DescriptorWriter<'a> {
    block: &'a mut [u8],
    format: TagFormat,
    uuid: [u8; 16],
    at: usize,
    /// Where the last tag lies, to flag it at the end.
    last: Option<(usize, Tag)>,
}

impl<'a> DescriptorWriter<'a> {
    /// Begins a descriptor block of transaction `sequence`; the block is zeroed first.
    ///
    /// # Errors
    /// `Truncated` when the block cannot hold even one tag.
    pub fn new(
        block: &'a mut [u8],
        format: TagFormat,
        sequence: u32,
        uuid: [u8; 16],
    ) -> Result<Self> {
        let need = HEADER_SIZE + format.tag_size() + UUID_SIZE + format.tail_size();
        if block.len() < need {
            return Err(Corrupt::truncated("journal descriptor block", block.len(), need));
        }
        block.fill(0);
        Header { block_type: BlockType::Descriptor, sequence }.write(block);
        Ok(Self { block, format, uuid, at: HEADER_SIZE, last: None })
    }

    /// Most tags a block of `block_size` bytes holds.
    pub fn capacity(block_size: usize, format: TagFormat) -> usize {
        let fixed = HEADER_SIZE + UUID_SIZE + format.tail_size();
        block_size.saturating_sub(fixed) / format.tag_size()
    }

    /// Whether another tag fits.
    pub fn has_room(&self) -> bool {
        let uuid = if self.last.is_none() { UUID_SIZE } else { 0 };
        self.at + self.format.tag_size() + uuid + self.format.tail_size() <= self.block.len()
    }

    /// Appends the tag of a block; `checksum` is of its escaped contents (see
    /// [`super::logged_block_csum`]). False, and nothing done, when the block is full.
    #[must_use]
    pub fn push(&mut self, block: FsBlock, escaped: bool, checksum: u32) -> bool {
        if !self.has_room() {
            return false;
        }
        let mut flags = TagFlags::empty();
        flags.set(TagFlags::ESCAPE, escaped);
        flags.set(TagFlags::SAME_UUID, self.last.is_some());
        let checksum = match self.format.csum {
            CsumVersion::None => 0,
            CsumVersion::V2 => checksum & 0xFFFF,
            CsumVersion::V3 => checksum,
        };
        let tag = Tag { block, flags, checksum };
        let size = self.format.tag_size();
        write_tag(&mut self.block[self.at..self.at + size], self.format, &tag);
        let first = self.last.is_none();
        self.last = Some((self.at, tag));
        self.at += size;
        if first {
            self.block[self.at..self.at + UUID_SIZE].copy_from_slice(&self.uuid);
            self.at += UUID_SIZE;
        }
        true
    }

    /// Flags the last tag and sets the tail's checksum when the format has one.
    pub fn finish(self, seed: u32) {
        if let Some((at, mut tag)) = self.last {
            tag.flags |= TagFlags::LAST_TAG;
            write_tag(&mut self.block[at..at + self.format.tag_size()], self.format, &tag);
        }
        if self.format.has_csum() {
            set_tail(seed, self.block);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::jbd2::verify_tail;

    const CSUMS: [CsumVersion; 3] = [CsumVersion::None, CsumVersion::V2, CsumVersion::V3];

    proptest! {
        #[test]
        fn tags_survive_a_round_trip_in_every_form(
            csum in 0usize..3, wide: bool,
            blocks in prop::collection::vec((any::<u64>(), any::<bool>(), any::<u32>()), 1..200),
        ) {
            let format = TagFormat { csum: CSUMS[csum], wide };
            let mut block = vec![0xAA; 1024];
            let mut writer = DescriptorWriter::new(&mut block, format, 3, [9; 16]).unwrap();
            let mut written = Vec::new();
            for (number, escaped, checksum) in blocks {
                let number = if wide { number } else { number & 0xFFFF_FFFF };
                if !writer.push(FsBlock(number), escaped, checksum) {
                    break;
                }
                let checksum = match format.csum {
                    CsumVersion::None => 0,
                    CsumVersion::V2 => checksum & 0xFFFF,
                    CsumVersion::V3 => checksum,
                };
                written.push((FsBlock(number), escaped, checksum));
            }
            writer.finish(5);
            prop_assert!(written.len() <= DescriptorWriter::capacity(1024, format));
            let read: Vec<_> = descriptor_tags(&block, format)
                .map(|tag| (tag.block, tag.flags.contains(TagFlags::ESCAPE), tag.checksum))
                .collect();
            prop_assert_eq!(read, written);
            prop_assert!(!format.has_csum() || verify_tail(5, &block).is_ok());
        }

        #[test]
        fn any_bytes_give_a_bounded_number_of_tags(
            bytes in prop::collection::vec(any::<u8>(), 0..300), csum in 0usize..3, wide: bool,
        ) {
            let format = TagFormat { csum: CSUMS[csum], wide };
            prop_assert!(descriptor_tags(&bytes, format).count() <= bytes.len() / 8);
        }
    }

    #[test]
    fn a_full_block_takes_no_more() {
        let format = TagFormat { csum: CsumVersion::V3, wide: true };
        let mut block = vec![0; 1024];
        let mut writer = DescriptorWriter::new(&mut block, format, 3, [0; 16]).unwrap();
        let count = (0..1000).take_while(|&n| writer.push(FsBlock(n), false, 0)).count();
        assert_eq!(count, DescriptorWriter::capacity(1024, format));
        writer.finish(0);
        assert_eq!(descriptor_tags(&block, format).count(), count);
    }
}
