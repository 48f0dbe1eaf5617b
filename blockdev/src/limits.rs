//! What a device can take in one request.

use crate::units::Sector;

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
