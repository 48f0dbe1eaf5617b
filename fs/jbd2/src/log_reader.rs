//! Reading a journal's log block by block, with readahead.
//!
//! Invariants: a block is only read when the map covers it; the window holds
//! whole blocks that lie one behind the other in the journal and on the device.

use uext_blockdev::{BlkStatus, BlockDevice};
use uext_ondisk::Corrupt;

use crate::error::{IoWhat, JournalError, Result};
use crate::map::JournalMap;

/// Bytes read at once.
const WINDOW_BYTES: u32 = 1 << 20;

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
    window: Vec<u8>,
}

impl<'a> LogReader<'a> {
    pub(crate) fn new(location: JournalLocation<'a>) -> Self {
        Self { location, start: 0, window: Vec::new() }
    }

    /// A block's bytes.
    pub(crate) fn read(&mut self, block: u32) -> Result<&[u8]> {
        if self.place(block).is_none() {
            self.fill(block)?;
        }
        let range = self.place(block).ok_or_else(|| outside(block, self.location.map))?;
        self.window.get(range).ok_or_else(|| outside(block, self.location.map))
    }

    /// Where a block lies in the window.
    fn place(&self, block: u32) -> Option<std::ops::Range<usize>> {
        let size = self.location.block_size as usize;
        let start = (block.checked_sub(self.start)? as usize).checked_mul(size)?;
        let end = start.checked_add(size)?;
        (end <= self.window.len()).then_some(start..end)
    }

    fn fill(&mut self, block: u32) -> Result<()> {
        let size = self.location.block_size;
        let most = (WINDOW_BYTES / size).max(1);
        let (_, count) =
            self.location.map.run(block, most).ok_or_else(|| outside(block, self.location.map))?;
        let offset = self.location.byte_offset(block)?;
        let device = self.location.device;
        self.window.clear();
        // One bad or missing block further on must not cost this one.
        let bytes = match device.read_at(offset, count as usize * size as usize) {
            Err(BlkStatus::Gone) => Err(BlkStatus::Gone),
            Err(_) if count > 1 => device.read_at(offset, size as usize),
            result => result,
        };
        self.window =
            bytes.map_err(|status| JournalError::io(IoWhat::ReadLog, block.into(), status))?;
        self.start = block;
        Ok(())
    }
}
