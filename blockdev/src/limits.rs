//! What a device can take in one request.

use crate::bio::{Bio, BioOp};
use crate::status::{BlkResult, BlkStatus};
use crate::units::{SECTOR_SIZE, Sector};

/// Limits of a device, fixed for its life (`struct queue_limits`).
#[derive(Clone, Debug)]
pub struct QueueLimits {
    /// Size of the device in sectors.
    pub capacity: Sector,
    /// Smallest addressable unit, bytes: offset and length of every bio are multiples of it.
    pub logical_block_size: u32,
    /// Unit the device writes without read-modify-write, bytes.
    pub physical_block_size: u32,
    /// Alignment of a buffer's address, bytes.
    pub dma_alignment: u32,
    /// Most bytes in one request; longer bios are split by the device.
    pub max_bytes: u32,
    /// Most bvecs in one request; at most `IOV_MAX`.
    pub max_segments: u16,
    /// Writes are held in a volatile cache until a flush.
    pub write_cache: bool,
    /// The device honours FUA itself; otherwise FUA is emulated (`RWF_DSYNC` or a flush).
    pub fua: bool,
    /// Most bytes in one discard; 0 when discard is not supported.
    pub max_discard_bytes: u64,
    /// Most bytes in one write-zeroes; 0 when it is emulated by writing.
    pub max_write_zeroes_bytes: u64,
    /// Writes fail with `ReadOnly`.
    pub read_only: bool,
}

impl QueueLimits {
    /// Limits of a device of `capacity` with 512-byte blocks, no cache and no
    /// wishes, to change from.
    pub fn new(capacity: Sector) -> Self {
        Self {
            capacity,
            logical_block_size: 512,
            physical_block_size: 4096,
            dma_alignment: 1,
            max_bytes: 4 << 20,
            max_segments: 512,
            write_cache: false,
            fua: false,
            max_discard_bytes: 0,
            max_write_zeroes_bytes: 0,
            read_only: false,
        }
    }

    /// Passes a bio that [`QueueLimits::check`] lets pass; ends any other.
    pub fn admit(&self, bio: Bio) -> Option<Bio> {
        match self.check(&bio) {
            Ok(()) => Some(bio),
            Err(status) => {
                bio.end_io(Err(status));
                None
            }
        }
    }

    /// Whether the device can take the bio at all, whatever its length. Every
    /// device asks before it touches the bio's sector arithmetic, since the sector
    /// may come from a damaged image.
    ///
    /// # Errors
    /// `ReadOnly` for a change of a read-only device, `NotSupp` for a discard it
    /// doesn't do, `Invalid` outside the device or misaligned.
    pub fn check(&self, bio: &Bio) -> BlkResult<()> {
        match bio.op() {
            BioOp::Flush => return Ok(()),
            BioOp::Read => {}
            BioOp::Write | BioOp::WriteZeroes | BioOp::Discard if self.read_only => {
                return Err(BlkStatus::ReadOnly);
            }
            BioOp::Discard if self.max_discard_bytes == 0 => return Err(BlkStatus::NotSupp),
            BioOp::Write | BioOp::WriteZeroes | BioOp::Discard => {}
        }
        let block = u64::from(self.logical_block_size);
        if !self.is_inside(bio.sector(), bio.len()) {
            return Err(BlkStatus::Invalid);
        }
        let dma = self.dma_alignment as usize;
        let aligned = |vec: &crate::bio::BioVec| {
            u64::from(vec.len).is_multiple_of(block) && vec.as_ptr().addr().is_multiple_of(dma)
        };
        if bio.vecs().iter().all(aligned) { Ok(()) } else { Err(BlkStatus::Invalid) }
    }

    /// Whether the device can write a slice as it lies.
    ///
    /// # Errors
    /// `ReadOnly`, and `Invalid` as [`QueueLimits::check`] has it.
    pub fn check_write(&self, sector: Sector, data: &[u8]) -> BlkResult<()> {
        if self.read_only {
            return Err(BlkStatus::ReadOnly);
        }
        let aligned = data.as_ptr().addr().is_multiple_of(self.dma_alignment as usize);
        let inside = self.is_inside(sector, data.len() as u64);
        if aligned && inside { Ok(()) } else { Err(BlkStatus::Invalid) }
    }

    /// Whether these are whole blocks of the device.
    fn is_inside(&self, sector: Sector, len: u64) -> bool {
        let block = u64::from(self.logical_block_size);
        let end = sector.0.checked_add(len.div_ceil(SECTOR_SIZE));
        end.is_some_and(|end| end <= self.capacity.0)
            && len.is_multiple_of(block)
            && sector.byte_offset().is_multiple_of(block)
    }
}
