//! The orphan file: slots for orphans in blocks of their own, so that the superblock need not
//! change for each (feature `orphan_file`).
//!
//! Invariants: a slot on the disk holds an inode exactly as long as the list in memory knows it
//! there, and changes under the handle that makes it an orphan, or no longer one; while the image
//! is mounted for writing the superblock says `orphan_present`.
//!
//! Locks: part of `Ext4::orphans`; the buffers' content locks come after it.

use uext_blockdev::mutant;
use uext_jbd2::Handle;
use uext_ondisk::{Corrupt, FsBlock, InodeNumber, LogicalBlock, orphan_file};
use uext_pagecache::Buffer;
use uext_vfs::FileKind;

use crate::error::Result;
use crate::fs::Ext4;

const WHAT: &str = "orphan file";
/// The kernel's bound on the file, bytes.
const MAX_BYTES: u64 = 8 << 20;

/// A place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    block: usize,
    index: usize,
}

struct OrphanBlock {
    buf: Buffer,
    number: FsBlock,
    free: usize,
}

/// The blocks of the file.
pub(crate) struct OrphanFile {
    blocks: Vec<OrphanBlock>,
    /// Slots of a block.
    slots: usize,
    /// Of its inode, for the checksums; nothing without metadata_csum.
    seed: Option<u32>,
}

impl OrphanFile {
    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(|block| block.free == self.slots)
    }

    /// Everything that is in it.
    ///
    /// # Errors
    /// `Corrupt` when a block is no longer what it was.
    pub fn orphans(&self) -> Result<Vec<(Slot, InodeNumber)>> {
        let mut found = Vec::new();
        for (at, block) in self.blocks.iter().enumerate() {
            let bytes = block.buf.read();
            let slots = orphan_file::orphans(&bytes)?;
            found.extend(slots.map(|(index, ino)| (Slot { block: at, index }, ino)));
        }
        Ok(found)
    }

    /// Takes a free slot for an inode; `None` when there is none.
    pub fn add(&mut self, handle: &Handle, ino: InodeNumber) -> Result<Option<Slot>> {
        let Some(at) = self.blocks.iter().position(|block| block.free > 0) else {
            return Ok(None);
        };
        let block = &mut self.blocks[at];
        let index = orphan_file::free_slot(&block.buf.read());
        let Some(index) = index else {
            return Err(Corrupt::value(WHAT, "a free slot is gone").in_block(block.number).into());
        };
        Self::set(self.seed, handle, block, index, ino)?;
        block.free -= 1;
        Ok(Some(Slot { block: at, index }))
    }

    /// Frees a slot.
    pub fn remove(&mut self, handle: &Handle, slot: Slot) -> Result<()> {
        let block = &mut self.blocks[slot.block];
        Self::set(self.seed, handle, block, slot.index, InodeNumber(0))?;
        block.free += 1;
        Ok(())
    }

    fn set(
        seed: Option<u32>,
        handle: &Handle,
        block: &OrphanBlock,
        index: usize,
        ino: InodeNumber,
    ) -> Result<()> {
        let mut bytes = handle.write(&block.buf)?;
        orphan_file::set_slot(&mut bytes, index, ino)?;
        if let Some(seed) = seed.filter(|_| !mutant!("orphan-block-checksum-stale")) {
            orphan_file::set_checksum(&mut bytes, seed, block.number)?;
        }
        Ok(())
    }
}

impl Ext4 {
    /// Reads and checks the orphan file.
    ///
    /// # Errors
    /// `Corrupt` when it has holes, is too large, or a block is damaged.
    pub(crate) fn load_orphan_file(&self) -> Result<OrphanFile> {
        let corrupt = |detail: String| Corrupt::value(WHAT, detail);
        let ino = self.sb.orphan_file_inum();
        let ino = ino.ok_or_else(|| corrupt("the superblock names none".into()))?;
        let file = self.iget(ino)?;
        let size = file.core.lock().size;
        if size > MAX_BYTES || file.kind != FileKind::Regular {
            let detail = format!("is no file of a possible size ({size} bytes)");
            return Err(corrupt(detail).in_inode(ino).into());
        }
        let seed = self.sb.features().metadata_csum().then_some(file.csum_seed);
        let slots = orphan_file::slots_per_block(self.block_size() as usize);
        let mut blocks = Vec::new();
        // The size is small.
        for logical in 0..(size / u64::from(self.block_size())) as u32 {
            let mapping = self.map_lookup(&file, LogicalBlock(logical), 1)?;
            let Some(number) = mapping.start else {
                return Err(corrupt(format!("block {logical} is missing")).in_inode(ino).into());
            };
            let buf = self.buffers.bread(number.0)?;
            let free = {
                let bytes = buf.read();
                let place = |corrupt: Corrupt| corrupt.in_inode(ino).in_block(number);
                if let Some(seed) = seed {
                    orphan_file::verify_checksum(&bytes, seed, number).map_err(place)?;
                }
                let used = orphan_file::orphans(&bytes).map_err(place)?.count();
                slots - used
            };
            blocks.push(OrphanBlock { buf, number, free });
        }
        Ok(OrphanFile { blocks, slots, seed })
    }
}
