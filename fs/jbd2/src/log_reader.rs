//! Reading a journal's log block by block, with readahead.
//!
//! Invariants: a block is only read when the map covers it; the window holds
//! whole blocks that lie one behind the other in the journal and on the device.

use std::sync::Arc;

use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkResult, BlkStatus, BlockDevice, SECTOR_SIZE,
    Sector,
};
use uext_ondisk::Corrupt;

use crate::error::{IoWhat, JournalError, Result};
use crate::map::JournalMap;

/// Most bytes read at once.
const WINDOW_BYTES: usize = 1 << 20;
/// Bytes of the first read; each further one is twice as long, since most logs are short.
const FIRST_BYTES: usize = 64 << 10;

/// Where a journal lies and how large its blocks are.
#[derive(Clone, Copy)]
pub struct JournalLocation<'a> {
    /// The device of the journal.
    pub device: &'a dyn BlockDevice,
    /// Its blocks on that device.
    pub map: &'a JournalMap,
    /// Bytes of a block: the filesystem's, and the journal's.
    pub block_size: u32,
}

impl JournalLocation<'_> {
    /// The byte a journal block begins at.
    pub(crate) fn byte_offset(&self, block: u32) -> Result<u64> {
        let physical = self.map.map(block).ok_or_else(|| outside(block, self.map))?;
        physical.checked_mul(u64::from(self.block_size)).ok_or_else(|| outside(block, self.map))
    }

    /// Reads one journal block.
    pub(crate) fn read(&self, block: u32) -> Result<Vec<u8>> {
        let offset = self.byte_offset(block)?;
        self.device
            .read_at(offset, self.block_size as usize)
            .map_err(|status| JournalError::io(IoWhat::ReadLog, block.into(), status))
    }
}

fn outside(block: u32, map: &JournalMap) -> JournalError {
    let detail = format!("block {block} of {}", map.block_count());
    Corrupt::value("journal", detail).into()
}

/// Reads blocks of the log; mostly forwards.
pub(crate) struct LogReader<'a> {
    location: JournalLocation<'a>,
    /// First journal block of the window.
    start: u32,
    /// The window's memory, used for all of them: memory never touched before costs as much
    /// as a read of this disk.
    memory: Arc<AlignedBuf>,
    /// Bytes of the window.
    len: usize,
    /// Bytes to read next.
    next_len: usize,
}

impl<'a> LogReader<'a> {
    pub(crate) fn new(location: JournalLocation<'a>) -> Self {
        // No more than the journal has; it is touched when it is read into.
        let blocks = (WINDOW_BYTES / location.block_size as usize).max(1);
        let blocks = blocks.min(location.map.block_count() as usize).max(1);
        let memory = Arc::new(AlignedBuf::new(blocks * location.block_size as usize));
        Self { location, start: 0, memory, len: 0, next_len: FIRST_BYTES }
    }

    /// A block's bytes.
    pub(crate) fn read(&mut self, block: u32) -> Result<&[u8]> {
        if self.place(block).is_none() {
            self.fill(block)?;
        }
        let range = self.place(block).ok_or_else(|| outside(block, self.location.map))?;
        self.memory.get(range).ok_or_else(|| outside(block, self.location.map))
    }

    /// Where a block lies in the window.
    fn place(&self, block: u32) -> Option<std::ops::Range<usize>> {
        let size = self.location.block_size as usize;
        let start = (block.checked_sub(self.start)? as usize).checked_mul(size)?;
        let end = start.checked_add(size)?;
        (end <= self.len).then_some(start..end)
    }

    fn fill(&mut self, block: u32) -> Result<()> {
        let size = self.location.block_size as usize;
        // At most as many as a journal has blocks.
        let most = (self.next_len.min(self.memory.len()) / size).max(1) as u32;
        self.next_len = (self.next_len * 2).min(WINDOW_BYTES);
        let (_, count) =
            self.location.map.run(block, most).ok_or_else(|| outside(block, self.location.map))?;
        let offset = self.location.byte_offset(block)?;
        self.len = 0;
        let all = count as usize * size;
        let len = match self.read_window(offset, all) {
            // One bad or missing block further on must not cost this one; nor a device whose
            // blocks are larger than the journal's.
            Err(status)
                if status != BlkStatus::Gone && (count > 1 || status == BlkStatus::Invalid) =>
            {
                self.read_one(offset, size).map(|()| size)
            }
            result => result.map(|()| all),
        };
        self.len = len.map_err(|status| JournalError::io(IoWhat::ReadLog, block.into(), status))?;
        self.start = block;
        Ok(())
    }

    fn read_window(&self, offset: u64, len: usize) -> BlkResult<()> {
        let mut bio = Bio::new(BioOp::Read, BioFlags::SYNC, Sector(offset / SECTOR_SIZE));
        // At most `WINDOW_BYTES`, or one block.
        bio.add_vec(BioVec { buf: self.memory.clone(), offset: 0, len: len as u32 });
        self.location.device.submit_bio_wait(bio).map(drop)
    }

    fn read_one(&mut self, offset: u64, size: usize) -> BlkResult<()> {
        let mut memory = AlignedBuf::new(self.memory.len());
        memory[..size].copy_from_slice(&self.location.device.read_at(offset, size)?);
        self.memory = Arc::new(memory);
        Ok(())
    }
}
