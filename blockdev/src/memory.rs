//! A device in memory, sparse: the disk of most tests.
//!
//! Every bio is done in the submitting thread and completed before `submit_bio`
//! returns. A write is atomic towards other bios only within one chunk, as on a
//! disk.
//!
//! Invariants: a chunk that is absent reads as zeroes; nothing lies past the
//! capacity.
//!
//! Locks: one per shard of the chunk table, held for a copy, never over `end_io`.

use std::collections::HashMap;
use std::sync::Arc;

use uext_sync::RwLock;

use crate::bio::{Bio, BioOp};
use crate::device::BlockDevice;
use crate::limits::QueueLimits;
use crate::status::BlkResult;
use crate::units::Sector;

/// Bytes in a chunk, the unit of allocation.
const CHUNK: usize = 64 << 10;
/// Shards of the chunk table.
const SHARDS: usize = 16;

/// What a memory device claims to be.
#[derive(Clone, Debug)]
pub struct MemoryOptions {
    /// Smallest addressable unit, bytes; a power of two from 512.
    pub logical_block_size: u32,
    /// Writes fail with `ReadOnly`.
    pub read_only: bool,
    /// Claims a volatile cache, so that who uses it must flush. Nothing is ever lost
    /// all the same: cuts are made by [`dm::log_writes`](crate::dm::log_writes).
    pub write_cache: bool,
    /// Claims to honour FUA itself.
    pub fua: bool,
    /// Takes discards (the range reads as zeroes afterwards).
    pub discard: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            logical_block_size: 512,
            read_only: false,
            write_cache: true,
            fua: true,
            discard: true,
        }
    }
}

/// A sparse device in memory.
pub struct MemoryDevice {
    limits: QueueLimits,
    shards: [RwLock<HashMap<u64, Box<[u8]>>>; SHARDS],
}

impl MemoryDevice {
    /// A device of zeroes; `bytes` is rounded down to whole blocks.
    pub fn new(bytes: u64) -> Arc<Self> {
        Self::with_options(bytes, &MemoryOptions::default())
    }

    /// As [`MemoryDevice::new`], with options.
    ///
    /// # Panics
    /// When the block size is not a power of two from 512.
    pub fn with_options(bytes: u64, options: &MemoryOptions) -> Arc<Self> {
        let block = options.logical_block_size;
        assert!(block >= 512 && block.is_power_of_two(), "logical block size {block}");
        let mut limits =
            QueueLimits::new(Sector(bytes / u64::from(block) * u64::from(block / 512)));
        limits.logical_block_size = block;
        limits.physical_block_size = block.max(4096);
        limits.write_cache = options.write_cache;
        limits.fua = options.fua;
        limits.max_discard_bytes = if options.discard { u64::MAX } else { 0 };
        limits.max_write_zeroes_bytes = u64::MAX;
        limits.read_only = options.read_only;
        Arc::new(Self { limits, shards: Default::default() })
    }

    /// A device with these contents, padded with zeroes to a whole sector.
    pub fn from_vec(data: Vec<u8>) -> Arc<Self> {
        Self::from_vec_with(data, &MemoryOptions::default())
    }

    /// As [`MemoryDevice::from_vec`], with options; padded to a whole block.
    ///
    /// # Panics
    /// As [`MemoryDevice::with_options`].
    pub fn from_vec_with(data: Vec<u8>, options: &MemoryOptions) -> Arc<Self> {
        let bytes = (data.len() as u64).next_multiple_of(u64::from(options.logical_block_size));
        let dev = Self::with_options(bytes, options);
        for (index, part) in data.chunks(CHUNK).enumerate() {
            if part.iter().any(|&byte| byte != 0) {
                let mut chunk = vec![0; CHUNK];
                chunk[..part.len()].copy_from_slice(part);
                dev.shard(index as u64).write().insert(index as u64, chunk.into());
            }
        }
        dev
    }

    /// The contents, all of them. For images that fit in memory twice.
    pub fn snapshot(&self) -> Vec<u8> {
        let bytes = usize::try_from(self.limits.capacity.byte_offset()).unwrap_or(usize::MAX);
        let mut data = vec![0; bytes];
        for (index, part) in data.chunks_mut(CHUNK).enumerate() {
            if let Some(chunk) = self.shard(index as u64).read().get(&(index as u64)) {
                part.copy_from_slice(&chunk[..part.len()]);
            }
        }
        data
    }

    /// Bytes of memory the contents take.
    pub fn allocated(&self) -> u64 {
        self.shards.iter().map(|shard| shard.read().len() as u64 * CHUNK as u64).sum()
    }

    fn shard(&self, index: u64) -> &RwLock<HashMap<u64, Box<[u8]>>> {
        // The remainder is below SHARDS.
        &self.shards[(index % SHARDS as u64) as usize]
    }

    /// Does a bio that the limits let pass.
    fn run(&self, bio: &Bio) -> BlkResult<()> {
        let mut offset = bio.sector().byte_offset();
        match bio.op() {
            BioOp::Flush => {}
            BioOp::Discard | BioOp::WriteZeroes => self.zero(offset, bio.len()),
            BioOp::Read => {
                let mut data = Vec::new();
                for vec in bio.vecs() {
                    data.resize(vec.len as usize, 0);
                    self.read(offset, &mut data);
                    vec.copy_from_slice(&data);
                    offset += u64::from(vec.len);
                }
            }
            BioOp::Write => {
                let mut data = Vec::new();
                for vec in bio.vecs() {
                    data.resize(vec.len as usize, 0);
                    vec.copy_to_slice(&mut data);
                    self.write(offset, &data);
                    offset += u64::from(vec.len);
                }
            }
        }
        Ok(())
    }

    fn read(&self, mut offset: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let (index, skip, len) = chunk_part(offset, data.len() as u64);
            let (part, rest) = data.split_at_mut(len);
            match self.shard(index).read().get(&index) {
                Some(chunk) => part.copy_from_slice(&chunk[skip..skip + len]),
                None => part.fill(0),
            }
            data = rest;
            offset += len as u64;
        }
    }

    fn write(&self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (index, skip, len) = chunk_part(offset, data.len() as u64);
            let (part, rest) = data.split_at(len);
            let mut shard = self.shard(index).write();
            let chunk = shard.entry(index).or_insert_with(|| vec![0; CHUNK].into());
            chunk[skip..skip + len].copy_from_slice(part);
            data = rest;
            offset += len as u64;
        }
    }

    fn zero(&self, offset: u64, bytes: u64) {
        let end = offset + bytes;
        if bytes / CHUNK as u64 > self.allocated() / CHUNK as u64 {
            // A discard of all of a large sparse device: only look at what is there.
            let whole = offset.div_ceil(CHUNK as u64)..end / CHUNK as u64;
            for shard in &self.shards {
                shard.write().retain(|index, _| !whole.contains(index));
            }
            self.zero_part(offset, (whole.start * CHUNK as u64).min(end));
            self.zero_part((whole.end * CHUNK as u64).max(offset), end);
        } else {
            self.zero_part(offset, end);
        }
    }

    fn zero_part(&self, mut offset: u64, end: u64) {
        while offset < end {
            let (index, skip, len) = chunk_part(offset, end - offset);
            let mut shard = self.shard(index).write();
            if len == CHUNK {
                shard.remove(&index);
            } else if let Some(chunk) = shard.get_mut(&index) {
                chunk[skip..skip + len].fill(0);
            }
            offset += len as u64;
        }
    }
}

/// The chunk at a byte offset, the bytes to skip in it, and how many of `left` it holds.
fn chunk_part(offset: u64, left: u64) -> (u64, usize, usize) {
    let chunk = CHUNK as u64;
    let skip = offset % chunk;
    // Both are at most CHUNK.
    (offset / chunk, skip as usize, left.min(chunk - skip) as usize)
}

impl BlockDevice for MemoryDevice {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_bio(&self, bio: Bio) {
        let result = self.limits.check(&bio).and_then(|()| self.run(&bio));
        bio.end_io(result);
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        let (begin, chunk) = (sector.byte_offset(), CHUNK as u64);
        let mut chunks = begin / chunk..begin.saturating_add(bytes).div_ceil(chunk);
        chunks.any(|index| !self.shard(index).read().contains_key(&index))
    }

    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        drop(bio.take_end_io());
        self.limits.check(&bio).and_then(|()| self.run(&bio))?;
        Ok(bio)
    }
}
