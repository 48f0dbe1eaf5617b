//! Blocks of the orphan file: slots of inodes that are being deleted or truncated.
//!
//! Source: Documentation/filesystems/ext4/orphan.rst. A block is an array of
//! inode numbers, 0 for a free slot, and a tail with a magic and a checksum.
//! The checksum covers the block's own number, so a block cannot stand in for another.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::{Corrupt, CorruptKind, Result};
use crate::units::{FsBlock, InodeNumber};

const WHAT: &str = "orphan file block";
/// `EXT4_ORPHAN_BLOCK_MAGIC`.
pub const MAGIC: u32 = 0x0B10_CA04;
const TAIL_SIZE: usize = 8;

/// `struct ext4_orphan_block_tail`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)] // The names are Linux's; orphan.rst describes them.
pub struct RawOrphanBlockTail {
    pub ob_magic: U32,
    pub ob_checksum: U32,
}

const _: () = assert!(size_of::<RawOrphanBlockTail>() == TAIL_SIZE);

/// Slots in a block of `block_size` bytes.
pub fn slots_per_block(block_size: usize) -> usize {
    block_size.saturating_sub(TAIL_SIZE) / 4
}

fn split(block: &[u8]) -> Result<(&[U32], &RawOrphanBlockTail)> {
    let (body, tail) = RawOrphanBlockTail::ref_from_suffix(block)
        .map_err(|_| Corrupt::truncated(WHAT, block.len(), TAIL_SIZE))?;
    let (slots, _) = <[U32]>::ref_from_prefix_with_elems(body, slots_per_block(block.len()))
        .map_err(|_| Corrupt::truncated(WHAT, block.len(), TAIL_SIZE))?;
    Ok((slots, tail))
}

/// The used slots of a block: index within the block, and the inode.
///
/// # Errors
/// `Magic` when this is no orphan file block, `Truncated`.
pub fn orphans(block: &[u8]) -> Result<impl Iterator<Item = (usize, InodeNumber)> + '_> {
    let (slots, tail) = split(block)?;
    let magic = tail.ob_magic.get();
    if magic != MAGIC {
        let detail = format!("ob_magic is {magic:#010x}");
        return Err(Corrupt::new(CorruptKind::Magic, WHAT, detail));
    }
    let used = slots.iter().map(|slot| InodeNumber(slot.get())).enumerate();
    Ok(used.filter(|(_, inode)| inode.0 != 0))
}

/// The first free slot of a block.
pub fn free_slot(block: &[u8]) -> Option<usize> {
    let (slots, _) = split(block).ok()?;
    slots.iter().position(|slot| slot.get() == 0)
}

/// Makes a block of free slots; the checksum is set by [`set_checksum`].
///
/// # Errors
/// `Truncated` when the block is shorter than its tail.
pub fn init(block: &mut [u8]) -> Result<()> {
    let have = block.len();
    block.fill(0);
    let (_, tail) = RawOrphanBlockTail::mut_from_suffix(block)
        .map_err(|_| Corrupt::truncated(WHAT, have, TAIL_SIZE))?;
    tail.ob_magic = U32::new(MAGIC);
    Ok(())
}

/// Sets slot `index` to an inode, or 0 to free it; the old contents.
///
/// # Errors
/// `Truncated` when the block has no such slot.
pub fn set_slot(block: &mut [u8], index: usize, inode: InodeNumber) -> Result<InodeNumber> {
    let count = slots_per_block(block.len());
    let slot = <[U32]>::mut_from_prefix_with_elems(block, count)
        .ok()
        .and_then(|(slots, _)| slots.get_mut(index))
        .ok_or_else(|| Corrupt::truncated(WHAT, count, index.saturating_add(1)))?;
    let old = InodeNumber(slot.get());
    *slot = U32::new(inode.0);
    Ok(old)
}

/// The checksum of a block: of its own number and its slots.
fn checksum(block: &[u8], inode_seed: u32, number: FsBlock) -> Result<u32> {
    let (slots, _) = split(block)?;
    Ok(crc32c(crc32c(inode_seed, U64::new(number.0).as_bytes()), slots.as_bytes()))
}

/// Checks the checksum of the block at `number` (metadata_csum only).
///
/// # Errors
/// `Checksum`, `Truncated`.
pub fn verify_checksum(block: &[u8], inode_seed: u32, number: FsBlock) -> Result<()> {
    let (_, tail) = split(block)?;
    let (stored, computed) = (tail.ob_checksum.get(), checksum(block, inode_seed, number)?);
    if stored == computed { Ok(()) } else { Err(Corrupt::checksum(WHAT, stored, computed)) }
}

/// Sets the checksum of the block at `number`.
///
/// # Errors
/// `Truncated`.
pub fn set_checksum(block: &mut [u8], inode_seed: u32, number: FsBlock) -> Result<()> {
    let computed = checksum(block, inode_seed, number)?;
    if let Ok((_, tail)) = RawOrphanBlockTail::mut_from_suffix(block) {
        tail.ob_checksum = U32::new(computed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_taken_and_freed_and_the_checksum_knows_its_place() {
        let mut block = vec![0xFF; 1024];
        init(&mut block).unwrap();
        assert_eq!(slots_per_block(1024), 254);
        assert_eq!(set_slot(&mut block, 3, InodeNumber(77)), Ok(InodeNumber(0)));
        assert!(set_slot(&mut block, 254, InodeNumber(1)).is_err());
        assert_eq!(orphans(&block).unwrap().collect::<Vec<_>>(), [(3, InodeNumber(77))]);
        set_slot(&mut block, 0, InodeNumber(5)).unwrap();
        assert_eq!(free_slot(&block), Some(1));
        set_slot(&mut block, 0, InodeNumber(0)).unwrap();
        assert_eq!((free_slot(&block), free_slot(&[0; 7])), (Some(0), None));
        set_checksum(&mut block, 9, FsBlock(500)).unwrap();
        assert_eq!(verify_checksum(&block, 9, FsBlock(500)), Ok(()));
        assert!(verify_checksum(&block, 9, FsBlock(501)).is_err());
        assert_eq!(set_slot(&mut block, 3, InodeNumber(0)), Ok(InodeNumber(77)));
        assert_eq!(orphans(&block).unwrap().count(), 0);
        assert!(orphans(&[0; 1024]).is_err());
        assert!(orphans(&[0; 7]).is_err());
    }
}
