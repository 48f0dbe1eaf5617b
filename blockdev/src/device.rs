//! The trait of everything that carries bios.

use std::sync::Arc;

use crate::aligned::AlignedBuf;
use crate::bio::{Bio, BioFlags, BioOp, BioVec};
use crate::limits::QueueLimits;
use crate::status::{BlkResult, BlkStatus};
use crate::units::{SECTOR_SIZE, Sector};

/// A device that carries bios.
///
/// Bios of one device may complete in any order. A flush covers the writes that
/// completed before it was submitted.
pub trait BlockDevice: Send + Sync {
    /// What the device can take.
    fn limits(&self) -> &QueueLimits;

    /// Takes a bio; its `end_io` is called when it has finished, from any thread,
    /// possibly before this returns. Never blocks on the disk.
    fn submit_bio(&self, bio: Bio);

    /// Takes many at once; a device that can, sorts and merges them and submits
    /// them with one system call.
    fn submit_bios(&self, bios: Vec<Bio>) {
        for bio in bios {
            self.submit_bio(bio);
        }
    }
}

/// Submits a bio and waits for it; the bio comes back with its buffers.
///
/// # Errors
/// How the bio failed.
pub fn submit_bio_wait(dev: &dyn BlockDevice, mut bio: Bio) -> BlkResult<Bio> {
    let (done, wait) = crossbeam_channel::bounded(1);
    bio.set_end_io(move |bio| {
        // The receiver waits below, so the only error is its thread's panic.
        let _ = done.send(bio);
    });
    dev.submit_bio(bio);
    let bio = wait.recv().map_err(|_| BlkStatus::IoErr)?;
    bio.status().map(|()| bio)
}

impl dyn BlockDevice {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.limits().capacity.byte_offset()
    }

    /// Reads `len` bytes at `offset`, any alignment, and waits: for mkfs, fsck and recovery.
    ///
    /// # Errors
    /// `Invalid` past the end of the device, else how the bio failed.
    pub fn read_at(&self, offset: u64, len: usize) -> BlkResult<Vec<u8>> {
        let (start, buf) = self.aligned_range(offset, len)?;
        let buf = Arc::new(buf);
        let mut bio = Bio::new(BioOp::Read, BioFlags::SYNC, Sector(start / SECTOR_SIZE));
        bio.add_vec(BioVec::whole(buf.clone()));
        drop(submit_bio_wait(self, bio)?);
        let skip = usize::try_from(offset - start).map_err(|_| BlkStatus::Invalid)?;
        Ok(buf[skip..skip + len].to_vec())
    }

    /// Writes `data` at `offset` and waits. Unaligned edges are read and written back,
    /// which is only safe while nobody else writes the device.
    ///
    /// # Errors
    /// `Invalid` past the end of the device, else how the bio failed.
    pub fn write_at(&self, offset: u64, data: &[u8], flags: BioFlags) -> BlkResult<()> {
        let (start, mut buf) = self.aligned_range(offset, data.len())?;
        let skip = usize::try_from(offset - start).map_err(|_| BlkStatus::Invalid)?;
        if buf.len() != data.len() {
            let old = self.read_at(start, buf.len())?;
            buf.copy_from_slice(&old);
        }
        buf[skip..skip + data.len()].copy_from_slice(data);
        let mut bio = Bio::new(BioOp::Write, flags, Sector(start / SECTOR_SIZE));
        bio.add_vec(BioVec::whole(Arc::new(buf)));
        submit_bio_wait(self, bio).map(drop)
    }

    /// Makes everything written before durable.
    ///
    /// # Errors
    /// How the flush failed; then nothing may be called durable.
    pub fn flush(&self) -> BlkResult<()> {
        submit_bio_wait(self, Bio::flush()).map(drop)
    }

    /// The aligned range around `offset..offset+len` and a zeroed buffer for it.
    fn aligned_range(&self, offset: u64, len: usize) -> BlkResult<(u64, AlignedBuf)> {
        let block = u64::from(self.limits().logical_block_size);
        let len = u64::try_from(len).map_err(|_| BlkStatus::Invalid)?;
        let end = offset.checked_add(len).ok_or(BlkStatus::Invalid)?;
        let start = offset / block * block;
        let end = end.checked_next_multiple_of(block).ok_or(BlkStatus::Invalid)?;
        if end > self.size() {
            return Err(BlkStatus::Invalid);
        }
        let bytes = usize::try_from(end - start).map_err(|_| BlkStatus::Invalid)?;
        Ok((start, AlignedBuf::new(bytes)))
    }
}
