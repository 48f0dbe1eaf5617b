//! A device as a replay would leave it, without anything being written.
//!
//! A block that the log holds is read from its place in the log, so that a log of any length
//! costs a few words per block.
//!
//! Invariants: nothing is ever written to what lies below; neither the filesystem's device nor
//! the log changes while the view lives.

use std::sync::Arc;

use uext_blockdev::{Bio, BioOp, BlkResult, BlkStatus, BlockDevice, QueueLimits};
use uext_ondisk::{FsBlock, jbd2};

use super::Overlay;
use super::plan::Places;
use super::target::LogPlace;
use crate::map::JournalMap;

/// A device, shared or borrowed.
pub(super) enum DeviceRef<'a> {
    Shared(Arc<dyn BlockDevice>),
    Borrowed(&'a dyn BlockDevice),
    None,
}

impl DeviceRef<'_> {
    fn read(&self, offset: u64, len: usize) -> BlkResult<Vec<u8>> {
        match self {
            Self::Shared(device) => device.read_at(offset, len),
            Self::Borrowed(device) => device.read_at(offset, len),
            Self::None => Err(BlkStatus::IoErr),
        }
    }
}

/// A device as a replay would leave it: see [`ReplayPlan`](super::ReplayPlan).
pub struct ReplayView<'a> {
    pub(super) limits: QueueLimits,
    pub(super) base: DeviceRef<'a>,
    /// Where the log is read.
    pub(super) log: DeviceRef<'a>,
    pub(super) map: Arc<JournalMap>,
    pub(super) block_size: u32,
    /// Blocks that the log holds.
    pub(super) places: Arc<Places>,
    /// Blocks that change after the log.
    pub(super) changes: Overlay,
}

impl ReplayView<'_> {
    /// Those of the device below, which is only read.
    pub(super) fn limits_over(base: &dyn BlockDevice) -> QueueLimits {
        QueueLimits { read_only: true, ..base.limits().clone() }
    }

    /// Shows other contents of a block.
    pub fn overwrite(&mut self, block: FsBlock, bytes: Vec<u8>) {
        self.changes.insert(block, bytes);
    }

    /// A block that is not what the device below has.
    fn changed(&self, block: FsBlock) -> BlkResult<Option<Vec<u8>>> {
        if let Some(bytes) = self.changes.get(&block) {
            return Ok(Some(bytes.clone()));
        }
        let Some(&LogPlace { block, escaped }) = self.places.get(&block) else { return Ok(None) };
        // It was read there once.
        let physical = self.map.map(block).ok_or(BlkStatus::IoErr)?;
        let size = self.block_size;
        let mut bytes = self.log.read(physical * u64::from(size), size as usize)?;
        if escaped {
            jbd2::unescape(&mut bytes);
        }
        Ok(Some(bytes))
    }

    /// The first changed block of `from..end`.
    fn next_changed(&self, from: u64, end: u64) -> u64 {
        let range = FsBlock(from)..FsBlock(end);
        let place = self.places.range(range.clone()).next().map(|(block, _)| block.0);
        let change = self.changes.range(range).next().map(|(block, _)| block.0);
        place.into_iter().chain(change).min().unwrap_or(end)
    }

    fn read(&self, mut offset: u64, mut data: &mut [u8]) -> BlkResult<()> {
        let size = u64::from(self.block_size);
        while !data.is_empty() {
            let end = offset + data.len() as u64;
            let block = offset / size;
            if let Some(bytes) = self.changed(FsBlock(block))? {
                // Both fit a block.
                let skip = (offset % size) as usize;
                let len = (bytes.len() - skip).min(data.len());
                let (part, rest) = data.split_at_mut(len);
                part.copy_from_slice(&bytes[skip..skip + len]);
                (data, offset) = (rest, offset + len as u64);
                continue;
            }
            let stop = self.next_changed(block + 1, end.div_ceil(size)).saturating_mul(size);
            // At most the length of `data`.
            let len = (stop.min(end) - offset) as usize;
            let (part, rest) = data.split_at_mut(len);
            part.copy_from_slice(&self.base.read(offset, len)?);
            (data, offset) = (rest, offset + len as u64);
        }
        Ok(())
    }

    fn run(&self, bio: &Bio) -> BlkResult<()> {
        self.limits.check(bio)?;
        if bio.op() != BioOp::Read {
            return Ok(()); // A flush: there is nothing to be made durable.
        }
        let mut offset = bio.sector().byte_offset();
        let mut data = Vec::new();
        for vec in bio.vecs() {
            data.resize(vec.len as usize, 0);
            self.read(offset, &mut data)?;
            vec.copy_from_slice(&data);
            offset += u64::from(vec.len);
        }
        Ok(())
    }
}

impl BlockDevice for ReplayView<'_> {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_bio(&self, bio: Bio) {
        let result = self.run(&bio);
        bio.end_io(result);
    }

    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        drop(bio.take_end_io());
        self.run(&bio)?;
        Ok(bio)
    }
}
