//! The trait of everything that carries bios.

use std::sync::Arc;

use crate::aligned::AlignedBuf;
use crate::bio::{Bio, BioFlags, BioOp, BioVec};
use crate::limits::QueueLimits;
use crate::status::{BlkResult, BlkStatus};
use crate::units::{SECTOR_SIZE, Sector};
use crate::waiter::Waiter;

/// A device that carries bios.
///
/// Bios of one device may complete in any order. A flush covers the writes that
/// completed before it was submitted.
pub trait BlockDevice: Send + Sync {
    /// What the device can take.
    fn limits(&self) -> &QueueLimits;

    /// Takes a bio; its `end_io` is called when it has finished, from any thread,
    /// possibly before this returns. Never blocks on the disk. An `end_io` must not wait for
    /// another bio: what it submits may go down only after it returns.
    fn submit_bio(&self, bio: Bio);

    /// Takes many at once; a device that can, sorts and merges them and submits
    /// them with one system call.
    fn submit_bios(&self, bios: Vec<Bio>) {
        for bio in bios {
            self.submit_bio(bio);
        }
    }

    /// Submits a bio, in place of whose `end_io` the calling thread waits; the bio
    /// comes back with its buffers. A device that can do the work in the calling
    /// thread does, since handing it to another costs more than a fast disk.
    ///
    /// # Errors
    /// How the bio failed.
    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        let (done, wait) = crossbeam_channel::bounded(1);
        bio.set_end_io(move |bio| {
            // The receiver waits below, so the only error is its thread's panic.
            let _ = done.send(bio);
        });
        self.submit_bio(bio);
        let bio = wait.recv().map_err(|_| BlkStatus::IoErr)?;
        bio.status().map(|()| bio)
    }

    /// Writes whole blocks from the caller's own memory and waits. The memory is copied where
    /// a device can only write what it may keep; one that writes in the calling thread takes
    /// it as it lies.
    ///
    /// # Errors
    /// How the write failed; then any part of the data may have been written.
    fn write_slice_wait(&self, sector: Sector, data: &[u8]) -> BlkResult<()> {
        let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), sector);
        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(data))));
        self.submit_bio_wait(bio).map(drop)
    }

    /// [`BlockDevice::submit_bios`] that leaves the caller its empty array.
    fn submit_drain(&self, bios: &mut Vec<Bio>) {
        self.submit_bios(std::mem::take(bios));
    }

    /// Whether the range, or a part of it that is easily looked at, was never written, so that who
    /// keeps the device takes storage for it with the first write; `false` when it cannot tell.
    fn is_sparse(&self, _sector: Sector, _bytes: u64) -> bool {
        false
    }

    /// Submits many at once and waits for all of them; each comes back with its
    /// own [`Bio::status`], in no particular order. As for every batch nothing is
    /// promised about the order in which they are done.
    fn submit_bios_wait(&self, mut bios: Vec<Bio>) -> Vec<Bio> {
        self.submit_batch_wait(&mut bios);
        bios
    }

    /// [`BlockDevice::submit_bios_wait`] with an array that stays the caller's: who keeps it
    /// can have a second batch of that size without an allocation, if the device can.
    fn submit_batch_wait(&self, bios: &mut Vec<Bio>) {
        Waiter::new().run(self, bios);
    }
}

/// Submits a bio and waits for it; the bio comes back with its buffers.
///
/// # Errors
/// How the bio failed.
pub fn submit_bio_wait(dev: &dyn BlockDevice, bio: Bio) -> BlkResult<Bio> {
    dev.submit_bio_wait(bio)
}

/// Most bytes that `read_at` and `write_at` move with one bio.
const HELPER_CHUNK: usize = 8 << 20;

impl dyn BlockDevice + '_ {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.limits().capacity.byte_offset()
    }

    /// Reads `len` bytes at `offset`, any alignment, and waits: for mkfs, fsck and recovery.
    ///
    /// # Errors
    /// `Invalid` past the end of the device, else how the bio failed.
    pub fn read_at(&self, offset: u64, len: usize) -> BlkResult<Vec<u8>> {
        // The range is checked before memory is allocated for it.
        self.aligned_range(offset, len)?;
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let chunk = HELPER_CHUNK.min(len - data.len());
            let at = offset + data.len() as u64;
            let (start, bytes) = self.aligned_range(at, chunk)?;
            let buf = Arc::new(AlignedBuf::new(bytes));
            let mut bio = Bio::new(BioOp::Read, BioFlags::SYNC, Sector(start / SECTOR_SIZE));
            bio.add_vec(BioVec::whole(buf.clone()));
            drop(self.submit_bio_wait(bio)?);
            let skip = usize::try_from(at - start).map_err(|_| BlkStatus::Invalid)?;
            data.extend_from_slice(&buf[skip..skip + chunk]);
        }
        Ok(data)
    }

    /// Writes `data` at `offset` and waits. Unaligned edges are read and written back,
    /// which is only safe while nobody else writes the device. With `PREFLUSH` the
    /// flush comes before the first byte, with `FUA` all of it is durable afterwards.
    ///
    /// # Errors
    /// `Invalid` past the end of the device, else how the bio failed; then any part
    /// of the data may have been written.
    pub fn write_at(&self, offset: u64, data: &[u8], flags: BioFlags) -> BlkResult<()> {
        self.aligned_range(offset, data.len())?;
        let mut flags = flags;
        for (n, chunk) in data.chunks(HELPER_CHUNK).enumerate() {
            let at = offset + (n * HELPER_CHUNK) as u64;
            let (start, bytes) = self.aligned_range(at, chunk.len())?;
            let skip = usize::try_from(at - start).map_err(|_| BlkStatus::Invalid)?;
            let mut buf = AlignedBuf::new(bytes);
            if bytes != chunk.len() {
                buf.copy_from_slice(&self.read_at(start, bytes)?);
            }
            buf[skip..skip + chunk.len()].copy_from_slice(chunk);
            let mut bio = Bio::new(BioOp::Write, flags, Sector(start / SECTOR_SIZE));
            bio.add_vec(BioVec::whole(Arc::new(buf)));
            self.submit_bio_wait(bio)?;
            flags.remove(BioFlags::PREFLUSH);
        }
        Ok(())
    }

    /// Makes everything written before durable.
    ///
    /// # Errors
    /// How the flush failed; then nothing may be called durable.
    pub fn flush(&self) -> BlkResult<()> {
        self.submit_bio_wait(Bio::flush()).map(drop)
    }

    /// Start and length of the aligned range around `offset..offset+len`.
    fn aligned_range(&self, offset: u64, len: usize) -> BlkResult<(u64, usize)> {
        let block = u64::from(self.limits().logical_block_size);
        let len = u64::try_from(len).map_err(|_| BlkStatus::Invalid)?;
        let end = offset.checked_add(len).ok_or(BlkStatus::Invalid)?;
        let start = offset / block * block;
        let end = end.checked_next_multiple_of(block).ok_or(BlkStatus::Invalid)?;
        if end > self.size() {
            return Err(BlkStatus::Invalid);
        }
        let bytes = usize::try_from(end - start).map_err(|_| BlkStatus::Invalid)?;
        Ok((start, bytes))
    }
}
