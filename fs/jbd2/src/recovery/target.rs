//! Where replayed blocks go: home, or into a plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::bounded;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, SECTOR_SIZE, Sector, mutant,
};
use uext_ondisk::{Corrupt, FsBlock};

use super::plan::Places;
use crate::error::{IoWhat, JournalError, Result};
use crate::log_reader::JournalLocation;

/// Bytes gathered before they are sorted and written.
const CHUNK_BYTES: usize = 32 << 20;
/// Most bytes of one bio.
const BIO_BYTES: usize = 1 << 20;

/// Where a logged copy lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogPlace {
    /// The block of the journal.
    pub(super) block: u32,
    /// Its first bytes were the journal's magic and are zeroes there.
    pub(super) escaped: bool,
}

/// Takes replayed blocks in the order of the log.
pub(super) trait Target {
    /// Whether a block lies on the filesystem's device, and not in the journal itself.
    fn check(&self, block: FsBlock) -> Result<()>;

    /// Takes a block that was checked, and where the log holds it.
    fn put(&mut self, block: FsBlock, data: Vec<u8>, place: LogPlace) -> Result<()>;
}

/// Which blocks a log may write.
struct Bounds {
    /// Blocks of the filesystem's device.
    end: u64,
    /// The blocks of a journal that lies there too, as sorted ranges.
    journal: Vec<(u64, u64)>,
}

impl Bounds {
    fn new(fs: &dyn BlockDevice, journal: &JournalLocation<'_>) -> Self {
        let end = fs.size() / u64::from(journal.block_size);
        Self { end, journal: journal.map.own_ranges() }
    }

    fn check(&self, block: FsBlock) -> Result<()> {
        let next = self.journal.partition_point(|&(_, end)| end <= block.0);
        let own = self.journal.get(next).is_some_and(|&(start, _)| start <= block.0);
        let detail = match () {
            () if block.0 >= self.end => "tag lies outside the device",
            () if own => "tag lies in the journal itself",
            () => return Ok(()),
        };
        Err(Corrupt::value("journal descriptor block", detail).in_block(block).into())
    }
}

/// Remembers where the blocks lie in the log.
pub(super) struct PlanTarget {
    bounds: Bounds,
    places: Places,
}

impl PlanTarget {
    pub(super) fn new(fs: &dyn BlockDevice, journal: &JournalLocation<'_>) -> Self {
        Self { bounds: Bounds::new(fs, journal), places: Places::new() }
    }

    pub(super) fn into_places(self) -> Places {
        self.places
    }
}

impl Target for PlanTarget {
    fn check(&self, block: FsBlock) -> Result<()> {
        self.bounds.check(block)
    }

    fn put(&mut self, block: FsBlock, _: Vec<u8>, place: LogPlace) -> Result<()> {
        self.places.insert(block, place);
        Ok(())
    }
}

/// Writes the blocks home in sorted, merged chunks; later chunks go out after
/// earlier ones have completed, so the last copy of a block wins.
pub(super) struct DeviceTarget<'a> {
    device: &'a dyn BlockDevice,
    block_size: u32,
    bounds: Bounds,
    chunk: BTreeMap<FsBlock, Vec<u8>>,
}

impl<'a> DeviceTarget<'a> {
    pub(super) fn new(device: &'a dyn BlockDevice, journal: &JournalLocation<'_>) -> Self {
        let bounds = Bounds::new(device, journal);
        Self { device, block_size: journal.block_size, bounds, chunk: BTreeMap::new() }
    }

    /// Takes a block that was checked.
    pub(super) fn write(&mut self, block: FsBlock, data: Vec<u8>) -> Result<()> {
        self.chunk.insert(block, data);
        if self.chunk.len().saturating_mul(self.block_size as usize) >= CHUNK_BYTES {
            self.write_chunk()?;
        }
        Ok(())
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
        self.bounds.check(block)
    }

    fn put(&mut self, block: FsBlock, data: Vec<u8>, _: LogPlace) -> Result<()> {
        self.write(block, data)
    }
}
