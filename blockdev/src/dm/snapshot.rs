//! A copy-on-write trial image: writes stay in memory, the base is never changed.
//!
//! Made to be cheap, since a crash test makes thousands: a new one allocates
//! nothing for its base, and a [`SnapshotDevice::fork`] shares the changed blocks
//! of its parent.
//!
//! Invariants: the base doesn't change while the snapshot lives; a block is in the
//! overlay exactly when it was written.
//!
//! Locks: `overlay`, never held over an `end_io` or a read of the base.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uext_sync::RwLock;

use crate::bio::{Bio, BioOp};
use crate::device::BlockDevice;
use crate::limits::QueueLimits;
use crate::status::BlkResult;
use crate::units::{SECTOR_SIZE, Sector};

/// Bytes of a block of the overlay.
const BLOCK: usize = 4096;

/// A changed block, shared between snapshots until one of them changes it again.
struct Block {
    bytes: [u8; BLOCK],
    /// Of the bytes; 0 while it is not known.
    /// WHY-RELAXED: whoever finds 0 makes the same number of the same bytes.
    hash: AtomicU64,
}

impl Block {
    fn new(bytes: [u8; BLOCK]) -> Self {
        Self { bytes, hash: AtomicU64::new(0) }
    }

    /// Changes the bytes.
    fn change(&mut self) -> &mut [u8; BLOCK] {
        *self.hash.get_mut() = 0;
        &mut self.bytes
    }

    /// A number that almost surely only these bytes have. Counted once per change, since
    /// crash tests ask for it far more often than they write.
    fn hash(&self) -> u64 {
        match self.hash.load(Ordering::Relaxed) {
            0 => {
                let hash = hash_bytes(&self.bytes).max(1);
                self.hash.store(hash, Ordering::Relaxed);
                hash
            }
            hash => hash,
        }
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        Self { bytes: self.bytes, hash: AtomicU64::new(self.hash.load(Ordering::Relaxed)) }
    }
}

/// Mixes two numbers so that every bit of either counts.
fn mix(a: u64, b: u64) -> u64 {
    let mixed = (a ^ b).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) ^ (mixed >> 32)
}

/// Four lanes, so that the multiplications overlap.
fn hash_bytes(bytes: &[u8; BLOCK]) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    let (chunks, _) = bytes.as_chunks::<32>();
    for chunk in chunks {
        let (words, _) = chunk.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = mix(*lane, u64::from_le_bytes(*word));
        }
    }
    lanes.into_iter().fold(0, mix)
}

type Overlay = HashMap<u64, Arc<Block>>;

/// What lies below; read only.
#[derive(Clone)]
enum Base {
    Bytes(Arc<Vec<u8>>),
    Device(Arc<dyn BlockDevice>),
}

/// A copy-on-write device.
pub struct SnapshotDevice {
    limits: QueueLimits,
    base: Base,
    overlay: RwLock<Overlay>,
}

impl SnapshotDevice {
    /// Over an image in memory, padded with zeroes to a whole sector.
    pub fn over_vec(base: Arc<Vec<u8>>) -> Arc<Self> {
        let sectors = (base.len() as u64).div_ceil(SECTOR_SIZE);
        let mut limits = QueueLimits::new(Sector(sectors));
        limits.write_cache = true;
        limits.fua = true;
        limits.max_discard_bytes = u64::MAX;
        limits.max_write_zeroes_bytes = u64::MAX;
        Arc::new(Self { limits, base: Base::Bytes(base), overlay: RwLock::default() })
    }

    /// Over a device, which nobody may write meanwhile. A read-only device is a good base.
    ///
    /// Blocks that weren't written are read from it in the submitting thread.
    pub fn over_device(base: Arc<dyn BlockDevice>) -> Arc<Self> {
        let mut limits = base.limits().clone();
        limits.read_only = false;
        limits.max_discard_bytes = u64::MAX;
        limits.max_write_zeroes_bytes = u64::MAX;
        Arc::new(Self { limits, base: Base::Device(base), overlay: RwLock::default() })
    }

    /// Another snapshot that starts with these contents; changes of either don't
    /// show in the other.
    pub fn fork(&self) -> Arc<Self> {
        let overlay = RwLock::new(self.overlay.read().clone());
        Arc::new(Self { limits: self.limits.clone(), base: self.base.clone(), overlay })
    }

    /// Forgets what was written.
    pub fn reset(&self) {
        self.overlay.write().clear();
    }

    /// Blocks of 4096 bytes that were written, in order.
    pub fn changed_blocks(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self.overlay.read().keys().copied().collect();
        blocks.sort_unstable();
        blocks
    }

    /// A hash of what was written: two snapshots of one base with the same number
    /// almost surely have the same contents, so one of them needs no test.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint_where(|_| true)
    }

    /// As [`SnapshotDevice::fingerprint`], of the blocks of 4096 bytes that `counts` chooses.
    ///
    /// A block that was written with what the base holds counts like any other.
    pub fn fingerprint_where(&self, counts: impl Fn(u64) -> bool) -> u64 {
        let overlay = self.overlay.read();
        let chosen = overlay.iter().filter(|(block, _)| counts(**block));
        chosen.map(|(&block, data)| mix(block + 1, data.hash())).fold(0, |all, one| all ^ one)
    }

    /// All contents.
    ///
    /// # Errors
    /// How a read of the base failed.
    pub fn to_vec(&self) -> BlkResult<Vec<u8>> {
        let bytes = usize::try_from(self.limits.capacity.byte_offset()).unwrap_or(usize::MAX);
        let mut data = match &self.base {
            Base::Bytes(base) => base.as_ref().clone(),
            Base::Device(base) => base.read_at(0, bytes)?,
        };
        data.resize(bytes, 0);
        for (&block, changed) in self.overlay.read().iter() {
            // The block was written, so it lies inside the device.
            let start = block as usize * BLOCK;
            let len = BLOCK.min(bytes - start);
            data[start..start + len].copy_from_slice(&changed.bytes[..len]);
        }
        Ok(data)
    }

    /// Reads any whole sectors.
    fn read(&self, mut offset: u64, mut data: &mut [u8]) -> BlkResult<()> {
        while !data.is_empty() {
            let (block, skip, len) = block_part(offset, data.len() as u64);
            let (part, rest) = data.split_at_mut(len);
            let changed = self.overlay.read().get(&block).cloned();
            match changed {
                Some(changed) => part.copy_from_slice(&changed.bytes[skip..skip + len]),
                None => self.read_base(offset, part)?,
            }
            data = rest;
            offset += len as u64;
        }
        Ok(())
    }

    fn read_base(&self, offset: u64, data: &mut [u8]) -> BlkResult<()> {
        match &self.base {
            Base::Device(base) => data.copy_from_slice(&base.read_at(offset, data.len())?),
            Base::Bytes(base) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(base.len());
                let have = &base[start..base.len().min(start + data.len())];
                data[..have.len()].copy_from_slice(have);
                data[have.len()..].fill(0);
            }
        }
        Ok(())
    }

    /// Writes any whole sectors.
    pub(super) fn write(&self, mut offset: u64, mut data: &[u8]) -> BlkResult<()> {
        while !data.is_empty() {
            let (block, skip, len) = block_part(offset, data.len() as u64);
            let (part, rest) = data.split_at(len);
            self.with_block(block, len, |changed| changed[skip..skip + len].copy_from_slice(part))?;
            data = rest;
            offset += len as u64;
        }
        Ok(())
    }

    /// Zeroes any whole sectors; whole blocks share one block of zeroes.
    pub(super) fn zero(&self, mut offset: u64, bytes: u64) -> BlkResult<()> {
        let zeroes = Arc::new(Block::new([0; BLOCK]));
        let end = offset + bytes;
        while offset < end {
            let (block, skip, len) = block_part(offset, end - offset);
            if len == BLOCK {
                self.overlay.write().insert(block, zeroes.clone());
            } else {
                self.with_block(block, len, |changed| changed[skip..skip + len].fill(0))?;
            }
            offset += len as u64;
        }
        Ok(())
    }

    /// Changes a block of the overlay, filling it from the base first where only
    /// part of it changes.
    fn with_block(
        &self,
        block: u64,
        len: usize,
        change: impl Fn(&mut [u8; BLOCK]),
    ) -> BlkResult<()> {
        if let Some(changed) = self.overlay.write().get_mut(&block) {
            change(Arc::make_mut(changed).change());
            return Ok(());
        }
        let mut fresh = [0; BLOCK];
        if len < BLOCK {
            let start = block * BLOCK as u64;
            let inside = (self.limits.capacity.byte_offset() - start).min(BLOCK as u64);
            // At most BLOCK.
            self.read_base(start, &mut fresh[..inside as usize])?;
        }
        let mut overlay = self.overlay.write();
        // Another writer of the same block may have come between.
        let changed = overlay.entry(block).or_insert_with(|| Arc::new(Block::new(fresh)));
        change(Arc::make_mut(changed).change());
        Ok(())
    }

    fn run(&self, bio: &Bio) -> BlkResult<()> {
        let mut offset = bio.sector().byte_offset();
        let mut data = Vec::new();
        match bio.op() {
            BioOp::Flush => {}
            BioOp::Discard | BioOp::WriteZeroes => self.zero(offset, bio.len())?,
            BioOp::Read | BioOp::Write => {
                for vec in bio.vecs() {
                    data.resize(vec.len as usize, 0);
                    if bio.op() == BioOp::Read {
                        self.read(offset, &mut data)?;
                        vec.copy_from_slice(&data);
                    } else {
                        vec.copy_to_slice(&mut data);
                        self.write(offset, &data)?;
                    }
                    offset += u64::from(vec.len);
                }
            }
        }
        Ok(())
    }
}

/// The block at a byte offset, the bytes to skip in it, and how many of `left` it holds.
fn block_part(offset: u64, left: u64) -> (u64, usize, usize) {
    let block = BLOCK as u64;
    let skip = offset % block;
    // Both are at most BLOCK.
    (offset / block, skip as usize, left.min(block - skip) as usize)
}

impl BlockDevice for SnapshotDevice {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_bio(&self, bio: Bio) {
        let result = self.limits.check(&bio).and_then(|()| self.run(&bio));
        bio.end_io(result);
    }

    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        drop(bio.take_end_io());
        self.limits.check(&bio).and_then(|()| self.run(&bio))?;
        Ok(bio)
    }
}
