//! The filesystem as it is behind the log, and the blocks that change.
//!
//! Invariants: nothing is written to the device; no more than [`MAX_READS`] blocks are read,
//! whatever the records ask for.

use uext_blockdev::BlockDevice;
use uext_ondisk::FsBlock;

use crate::error::{IoWhat, JournalError, Result};
use crate::recovery::Overlay;

/// Blocks read by one replay. A full area of honest records needs a tenth.
const MAX_READS: u32 = 1 << 21;

pub(super) struct View<'a> {
    /// As the log's replay leaves it.
    fs: &'a dyn BlockDevice,
    block_size: u32,
    changed: Overlay,
    reads: u32,
}

impl<'a> View<'a> {
    pub(super) fn new(fs: &'a dyn BlockDevice, block_size: u32) -> Self {
        Self { fs, block_size, changed: Overlay::new(), reads: 0 }
    }

    /// A block as it is now.
    pub(super) fn read(&mut self, block: FsBlock) -> Result<Vec<u8>> {
        self.reads += 1;
        if self.reads > MAX_READS {
            let text = "the journal's fast commits ask for more work than records of their \
                        number can: run e2fsck";
            return Err(JournalError::Unsupported(text.into()));
        }
        match self.changed.get(&block) {
            Some(bytes) => Ok(bytes.clone()),
            None => self.read_base(block),
        }
    }

    /// A block as the log leaves it.
    fn read_base(&self, block: FsBlock) -> Result<Vec<u8>> {
        let size = u64::from(self.block_size);
        let failed = |status| JournalError::io(IoWhat::ReadFs, block.0, status);
        let offset = block.0.checked_mul(size).filter(|&at| at < self.fs.size());
        let offset = offset.ok_or_else(|| failed(uext_blockdev::BlkStatus::IoErr))?;
        self.fs.read_at(offset, self.block_size as usize).map_err(failed)
    }

    /// Changes a block.
    pub(super) fn write(&mut self, block: FsBlock, bytes: Vec<u8>) {
        self.changed.insert(block, bytes);
    }

    /// The blocks that are not what they were.
    pub(super) fn into_changes(mut self) -> Result<Overlay> {
        let mut changed = std::mem::take(&mut self.changed);
        let mut same = Vec::new();
        for (&block, bytes) in &changed {
            if self.read_base(block)? == *bytes {
                same.push(block);
            }
        }
        for block in same {
            changed.remove(&block);
        }
        Ok(changed)
    }
}
