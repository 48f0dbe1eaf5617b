//! Where replayed blocks go: home, into memory, or nowhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::bounded;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, SECTOR_SIZE, Sector, mutant,
};
use uext_ondisk::{Corrupt, FsBlock};

use super::Overlay;
use crate::error::{IoWhat, JournalError, Result};

/// Bytes gathered before they are sorted and written.
const CHUNK_BYTES: usize = 32 << 20;
/// Most bytes of one bio.
const BIO_BYTES: usize = 1 << 20;

/// Takes replayed blocks in the order of the log.
pub(super) trait Target {
    /// Whether a block lies on the filesystem's device at all.
    fn check(&self, block: FsBlock) -> Result<()>;

    /// Takes a block that was checked.
    fn put(&mut self, block: FsBlock, data: Vec<u8>) -> Result<()>;
}

fn check_on_device(device: &dyn BlockDevice, block_size: u32, block: FsBlock) -> Result<()> {
    let end = block.0.checked_add(1).and_then(|end| end.checked_mul(block_size.into()));
    if end.is_some_and(|end| end <= device.size()) {
        return Ok(());
    }
    let corrupt = Corrupt::value("journal descriptor block", "tag lies outside the device");
    Err(corrupt.in_block(block).into())
}

/// Takes the blocks and forgets them: only whether there is damage is asked.
pub(super) struct TrialTarget<'a> {
    device: &'a dyn BlockDevice,
    block_size: u32,
}

impl<'a> TrialTarget<'a> {
    pub(super) fn new(device: &'a dyn BlockDevice, block_size: u32) -> Self {
        Self { device, block_size }
    }
}

impl Target for TrialTarget<'_> {
    fn check(&self, block: FsBlock) -> Result<()> {
        check_on_device(self.device, self.block_size, block)
    }

    fn put(&mut self, _: FsBlock, _: Vec<u8>) -> Result<()> {
        Ok(())
    }
}

/// Keeps the blocks.
pub(super) struct MemoryTarget<'a> {
    device: &'a dyn BlockDevice,
    block_size: u32,
    overlay: Overlay,
}

impl<'a> MemoryTarget<'a> {
    pub(super) fn new(device: &'a dyn BlockDevice, block_size: u32) -> Self {
        Self { device, block_size, overlay: Overlay::new() }
    }

    pub(super) fn into_overlay(self) -> Overlay {
        self.overlay
    }
}

impl Target for MemoryTarget<'_> {
    fn check(&self, block: FsBlock) -> Result<()> {
        check_on_device(self.device, self.block_size, block)
    }

    fn put(&mut self, block: FsBlock, data: Vec<u8>) -> Result<()> {
        self.overlay.insert(block, data);
        Ok(())
    }
}

/// Writes the blocks home in sorted, merged chunks; later chunks go out after
/// earlier ones have completed, so the last copy of a block wins.
pub(super) struct DeviceTarget<'a> {
    device: &'a dyn BlockDevice,
    block_size: u32,
    chunk: BTreeMap<FsBlock, Vec<u8>>,
}

impl<'a> DeviceTarget<'a> {
    pub(super) fn new(device: &'a dyn BlockDevice, block_size: u32) -> Self {
        Self { device, block_size, chunk: BTreeMap::new() }
    }

    /// Writes what is left and makes everything durable.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.write_chunk()?;
        if mutant!("replay-without-flush") {
            return Ok(());
        }
        self.device.flush().map_err(|status| JournalError::io(IoWhat::Flush, 0, status))
    }

    fn write_chunk(&mut self) -> Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        let bios = self.bios(&chunk)?;
        let (done, wait) = bounded(bios.len());
        let count = bios.len();
        let mut submit = Vec::with_capacity(count);
        for (block, mut bio) in bios {
            let done = done.clone();
            bio.set_end_io(move |bio| {
                // The receiver waits below.
                let _ = done.send((block, bio.status()));
            });
            submit.push(bio);
        }
        self.device.submit_bios(submit);
        let mut result = Ok(());
        for _ in 0..count {
            let (block, status) = wait.recv().unwrap_or((FsBlock(0), Err(BlkStatus::IoErr)));
            if let (Ok(()), Err(status)) = (&result, status) {
                result = Err(JournalError::io(IoWhat::WriteFs, block.0, status));
            }
        }
        result
    }

    /// One bio for each run of adjacent blocks.
    fn bios(&self, chunk: &BTreeMap<FsBlock, Vec<u8>>) -> Result<Vec<(FsBlock, Bio)>> {
        let mut bios = Vec::new();
        let mut run: Option<(FsBlock, Vec<u8>)> = None;
        let size = self.block_size as usize;
        for (&block, data) in chunk {
            let joins = run.as_ref().is_some_and(|(first, bytes)| {
                first.0 + (bytes.len() / size) as u64 == block.0 && bytes.len() < BIO_BYTES
            });
            match &mut run {
                Some((_, bytes)) if joins => bytes.extend_from_slice(data),
                _ => {
                    bios.extend(run.take().map(|(first, bytes)| self.bio(first, &bytes)));
                    run = Some((block, data.clone()));
                }
            }
        }
        bios.extend(run.map(|(first, bytes)| self.bio(first, &bytes)));
        Ok(bios)
    }

    fn bio(&self, first: FsBlock, bytes: &[u8]) -> (FsBlock, Bio) {
        // Checked against the device's size before it came here.
        let sector = Sector(first.0 * (u64::from(self.block_size) / SECTOR_SIZE));
        let mut bio = Bio::new(BioOp::Write, BioFlags::META | BioFlags::SYNC, sector);
        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(bytes))));
        (first, bio)
    }
}

impl Target for DeviceTarget<'_> {
    fn check(&self, block: FsBlock) -> Result<()> {
        check_on_device(self.device, self.block_size, block)
    }

    fn put(&mut self, block: FsBlock, data: Vec<u8>) -> Result<()> {
        self.chunk.insert(block, data);
        if self.chunk.len().saturating_mul(self.block_size as usize) >= CHUNK_BYTES {
            self.write_chunk()?;
        }
        Ok(())
    }
}
