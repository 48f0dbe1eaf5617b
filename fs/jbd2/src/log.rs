//! The log as a device sees it: the ring's geometry, its superblock, and writing it.
//!
//! Invariants:
//! - Log blocks go out in chunks of one buffer that exists from the start, so a
//!   commit needs no memory to get through.
//! - A descriptor block lies in the same chunk as the blocks it describes: its
//!   tags are known only when they have been copied.
//! - The superblock in memory is the one on disk, plus features that go out with
//!   its next write.
//!
//! Locks: superblock, chunk; both leaves, held over their I/O.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioSet, BioVec, BlkResult, BlkStatus, BlockDevice, Sector,
    mutant,
};
use uext_ondisk::jbd2::{
    BlockType, CommitBlock, DescriptorWriter, JournalCompat, JournalIncompat, JournalSuperblock,
    RawJournalSuperblock, RevokeWriter, TagFormat, edit_superblock_with,
};
use uext_pagecache::Buffer;
use uext_sync::Mutex;
use zerocopy::FromBytes;

use crate::ahead::Ahead;
use crate::config::JournalConfig;
use crate::error::{IoWhat, JournalError, Result};
use crate::log_reader::JournalLocation;
use crate::map::JournalMap;
use crate::recovery::read_superblock;
use crate::tid::Tid;

/// Bytes of the chunk the log is written from.
const CHUNK_BYTES: usize = 1 << 20;
/// Buffers of a transaction for which there is room from the start.
const MAX_SORTED: usize = 16_384;
/// Bios that go out together, each a run of the chunk that is contiguous on the device.
const MAX_BIOS: usize = 16;

/// A journal on its device.
pub(crate) struct Log {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) map: JournalMap,
    pub(crate) block_size: u32,
    /// First block of the ring, and the one behind its last.
    pub(crate) first: u32,
    pub(crate) end: u32,
    pub(crate) format: TagFormat,
    pub(crate) seed: u32,
    pub(crate) barrier: bool,
    /// Goes into the first tag of a descriptor.
    fs_uuid: [u8; 16],
    superblock: Mutex<Superblock>,
    chunk: Mutex<Option<Chunk>>,
    /// Its bios; taken by who has the chunk, so nobody waits.
    bios: BioSet,
}

/// What the log is written from; kept, so that a commit needs no memory.
struct Chunk {
    memory: Arc<AlignedBuf>,
    batch: Vec<Bio>,
    /// A transaction's buffers in block order.
    sorted: Vec<Buffer>,
    ahead: Ahead,
}

impl Chunk {
    fn new(ring: u32) -> Self {
        Self {
            memory: Arc::new(AlignedBuf::new(CHUNK_BYTES)),
            batch: Vec::with_capacity(MAX_BIOS),
            sorted: Vec::with_capacity(MAX_SORTED),
            ahead: Ahead::new(ring),
        }
    }
}

/// The journal's superblock.
struct Superblock {
    bytes: Vec<u8>,
    /// What it is written from; kept, so that moving the tail needs no memory.
    memory: Arc<AlignedBuf>,
    batch: Vec<Bio>,
    /// `s_start` on disk is 0: the next commit must change that first.
    empty: bool,
}

impl Log {
    /// Reads the superblock of a journal whose log is empty and sets its features.
    pub(crate) fn open(
        device: Arc<dyn BlockDevice>,
        map: JournalMap,
        block_size: u32,
        fs_uuid: [u8; 16],
        config: &JournalConfig,
    ) -> Result<(Self, JournalSuperblock)> {
        if device.limits().logical_block_size > block_size {
            let text = format!(
                "blocks of {block_size} bytes on a device of {}-byte sectors",
                device.limits().logical_block_size
            );
            return Err(JournalError::Unsupported(text));
        }
        let location = JournalLocation { device: &*device, map: &map, block_size };
        let old = read_superblock(&location)?;
        if old.needs_recovery() {
            let text = "the journal holds transactions: replay it first".to_owned();
            return Err(JournalError::Unsupported(text));
        }
        let mut bytes = location.read(map.superblock())?;
        edit_superblock_with(&mut bytes, |raw| set_features(raw, &old, config))?;
        let sb = JournalSuperblock::parse(&bytes)?;
        let superblock = Superblock {
            memory: Arc::new(AlignedBuf::new(bytes.len())),
            batch: Vec::with_capacity(1),
            bytes,
            empty: true,
        };
        let log = Self {
            device,
            map,
            block_size,
            first: sb.first,
            end: sb.log_end(),
            format: sb.tag_format(),
            seed: sb.csum_seed(),
            barrier: config.barrier,
            fs_uuid,
            superblock: Mutex::new(superblock),
            chunk: Mutex::new(Some(Chunk::new(sb.log_end() - sb.first))),
            bios: BioSet::reserve_only(MAX_BIOS, 1),
        };
        Ok((log, sb))
    }

    /// Blocks of the ring.
    pub(crate) fn ring(&self) -> u32 {
        self.end - self.first
    }

    /// The block `count` blocks further on the ring.
    pub(crate) fn advance(&self, block: u32, count: u32) -> u32 {
        let ring = u64::from(self.ring());
        let at = (u64::from(block - self.first) + u64::from(count)) % ring;
        // Below the ring's length, which is a u32.
        self.first + u32::try_from(at).unwrap_or(0)
    }

    /// How many blocks further on the ring `to` is than `from`: less than all of it.
    pub(crate) fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.ring() - (from - to) }
    }

    fn chunk_blocks(&self) -> usize {
        CHUNK_BYTES / self.block_size as usize
    }

    /// Most blocks one descriptor names.
    pub(crate) fn tags_per_descriptor(&self) -> usize {
        let fits = DescriptorWriter::capacity(self.block_size as usize, self.format);
        fits.min(self.chunk_blocks() - 1).max(1)
    }

    /// Most records of one revoke block.
    pub(crate) fn records_per_revoke(&self) -> usize {
        RevokeWriter::capacity(self.block_size as usize, self.format).max(1)
    }

    /// Blocks of the log a transaction takes, its commit block included.
    pub(crate) fn blocks_needed(&self, buffers: usize, revokes: usize) -> u32 {
        let descriptors = buffers.div_ceil(self.tags_per_descriptor());
        let revoke_blocks = revokes.div_ceil(self.records_per_revoke());
        u32::try_from(buffers + descriptors + revoke_blocks + 1).unwrap_or(u32::MAX)
    }

    fn flags(&self, extra: BioFlags) -> BioFlags {
        let flags = BioFlags::META | BioFlags::SYNC;
        if self.barrier { flags | extra } else { flags }
    }

    /// Flushes a device when barriers are on.
    pub(crate) fn flush(&self, device: &dyn BlockDevice) -> Result<()> {
        if !self.barrier {
            return Ok(());
        }
        device.flush().map_err(|status| JournalError::io(IoWhat::Flush, 0, status))
    }

    /// Writes the superblock, durably: what was written to its device before is
    /// durable before it.
    fn write_superblock(
        &self,
        sb: &mut Superblock,
        edit: impl FnOnce(&mut RawJournalSuperblock),
    ) -> Result<()> {
        edit_superblock_with(&mut sb.bytes, edit)?;
        let preflush = !mutant!("tail-before-checkpoint-flush");
        let at = self.map.superblock();
        let location =
            JournalLocation { device: &*self.device, map: &self.map, block_size: self.block_size };
        let sector = Sector::from_byte_offset(location.byte_offset(at)?);
        if Arc::get_mut(&mut sb.memory).is_none() {
            // A device that records kept the memory of a finished bio: leave it that.
            sb.memory = Arc::new(AlignedBuf::new(sb.bytes.len()));
        }
        let memory = Arc::get_mut(&mut sb.memory).expect("just found or made unshared");
        memory.copy_from_slice(&sb.bytes);
        let flags = self.flags(durably(preflush, true));
        let mut bio = self.bios.alloc(BioOp::Write, flags, sector);
        bio.add_vec(BioVec::whole(sb.memory.clone()));
        sb.batch.push(bio);
        self.device.submit_batch_wait(&mut sb.batch);
        let ended = sb.batch.drain(..).map(|bio| bio.status()).fold(Ok(()), BlkResult::and);
        ended.map_err(|status| JournalError::io(IoWhat::WriteLog, at.into(), status))
    }

    /// Says where the log begins.
    pub(crate) fn write_tail(&self, tid: Tid, start: u32) -> Result<()> {
        let mut sb = self.superblock.lock();
        self.write_superblock(&mut sb, |raw| {
            raw.s_sequence = tid.into();
            raw.s_start = start.into();
        })?;
        sb.empty = false;
        Ok(())
    }

    /// As [`Log::write_tail`], when the superblock says that the log is empty.
    pub(crate) fn begin_if_empty(&self, tid: Tid, start: u32) -> Result<()> {
        if self.superblock.lock().empty { self.write_tail(tid, start) } else { Ok(()) }
    }

    /// Says that the log is empty and what comes next.
    pub(crate) fn write_empty(&self, next: Tid, head: u32) -> Result<()> {
        let mut sb = self.superblock.lock();
        if sb.empty {
            return Ok(());
        }
        self.write_superblock(&mut sb, |raw| {
            raw.s_sequence = next.into();
            raw.s_start = 0.into();
            raw.s_head = head.into();
        })?;
        sb.empty = true;
        Ok(())
    }

    /// Notes the error of an abort.
    pub(crate) fn write_errno(&self, errno: i32) -> Result<()> {
        let mut sb = self.superblock.lock();
        self.write_superblock(&mut sb, |raw| {
            raw.s_errno = (-errno).cast_unsigned().into();
        })
    }

    /// Notes that the log holds revoke blocks; goes out with the next superblock.
    pub(crate) fn set_revoke_feature(&self) -> Result<()> {
        let mut sb = self.superblock.lock();
        edit_superblock_with(&mut sb.bytes, |raw| {
            let incompat = raw.s_feature_incompat.get() | JournalIncompat::REVOKE.bits();
            raw.s_feature_incompat = incompat.into();
        })?;
        Ok(())
    }

    /// Begins to write a transaction at its place in the ring.
    pub(crate) fn writer(&self, tid: Tid, place: &Place) -> LogWriter<'_> {
        let chunk = self.chunk.lock().take().unwrap_or_else(|| Chunk::new(self.ring()));
        let start = place.start;
        LogWriter { log: self, tid, chunk, used: 0, start, at: start, place: place.clone() }
    }
}

/// The flags of a write that makes what came before durable, and itself.
fn durably(preflush: bool, fua: bool) -> BioFlags {
    let mut flags = BioFlags::empty();
    flags.set(BioFlags::PREFLUSH, preflush);
    flags.set(BioFlags::FUA, fua);
    flags
}

/// Version 2 with the features the filesystem wants; the log is empty, so its format may change.
fn set_features(raw: &mut RawJournalSuperblock, old: &JournalSuperblock, config: &JournalConfig) {
    if !old.v2 {
        // What version 1 leaves behind its own fields is not meant for version 2.
        let own = std::mem::offset_of!(RawJournalSuperblock, s_feature_compat);
        let mut bytes = zerocopy::IntoBytes::as_bytes(raw).to_vec();
        bytes[own..].fill(0);
        if let Ok(cleared) = RawJournalSuperblock::read_from_bytes(&bytes) {
            *raw = cleared;
        }
        raw.s_header.h_blocktype = BlockType::SuperblockV2.raw().into();
        raw.s_nr_users = 1.into();
    }
    let mut compat = JournalCompat::from_bits_retain(raw.s_feature_compat.get());
    let mut incompat = JournalIncompat::from_bits_retain(raw.s_feature_incompat.get());
    compat.remove(JournalCompat::CHECKSUM);
    incompat.remove(JournalIncompat::CSUM_V2 | JournalIncompat::ASYNC_COMMIT);
    incompat.set(JournalIncompat::CSUM_V3, config.csum_v3);
    if config.wide {
        incompat.insert(JournalIncompat::BITS64);
    }
    raw.s_feature_compat = compat.bits().into();
    raw.s_feature_incompat = incompat.bits().into();
}

/// A transaction's place in the log.
#[derive(Clone)]
pub(crate) struct Place {
    pub start: u32,
    pub blocks: u32,
    /// Blocks behind it that are free, and stay it while this transaction is written.
    pub free: u32,
}

/// Writes one transaction into the log.
pub(crate) struct LogWriter<'l> {
    log: &'l Log,
    tid: Tid,
    chunk: Chunk,
    /// Blocks of the chunk that are filled.
    used: usize,
    /// Where the chunk's first block goes.
    start: u32,
    /// Where the next block goes.
    at: u32,
    place: Place,
}

impl LogWriter<'_> {
    /// Takes `count` blocks of the chunk, which the caller fills at once.
    fn blocks(&mut self, count: usize) -> Result<&mut [u8]> {
        if self.used + count > self.log.chunk_blocks() {
            self.submit()?;
        }
        let size = self.log.block_size as usize;
        let range = self.used * size..(self.used + count) * size;
        self.used += count;
        let advanced = u32::try_from(count).unwrap_or(0);
        self.at = self.log.advance(self.at, advanced);
        if Arc::get_mut(&mut self.chunk.memory).is_none() {
            // A device that records kept the memory of a finished bio: leave it that.
            let mut fresh = AlignedBuf::new(CHUNK_BYTES);
            fresh[..range.start].copy_from_slice(&self.chunk.memory[..range.start]);
            self.chunk.memory = Arc::new(fresh);
        }
        let memory = Arc::get_mut(&mut self.chunk.memory).expect("just found or made unshared");
        Ok(&mut memory[range])
    }

    /// Writes revoke blocks.
    pub(crate) fn revokes(&mut self, blocks: impl Iterator<Item = u64>) -> Result<()> {
        let (format, seed, tid) = (self.log.format, self.log.seed, self.tid);
        let mut blocks = blocks.peekable();
        while blocks.peek().is_some() {
            let mut revoke = RevokeWriter::new(self.blocks(1)?, format, tid)?;
            while let Some(&block) = blocks.peek() {
                if !revoke.push(block.into()) {
                    break;
                }
                blocks.next();
            }
            revoke.finish(seed);
        }
        Ok(())
    }

    /// Writes descriptors and the blocks of these buffers; `copy` gives each its contents.
    pub(crate) fn blocks_of<'b>(
        &mut self,
        buffers: impl Iterator<Item = &'b Buffer>,
        copy: impl Fn(&Buffer, &mut [u8]),
    ) -> Result<()> {
        let mut sorted = std::mem::take(&mut self.chunk.sorted);
        sorted.extend(buffers.cloned());
        sorted.sort_unstable_by_key(|buffer| buffer.block());
        let mut groups = sorted.chunks(self.log.tags_per_descriptor());
        let written = groups.try_for_each(|group| self.group(group, &copy));
        sorted.clear();
        self.chunk.sorted = sorted;
        written
    }

    /// Writes one descriptor and the blocks it names.
    fn group(&mut self, buffers: &[Buffer], copy: &impl Fn(&Buffer, &mut [u8])) -> Result<()> {
        let (format, seed, tid, uuid) =
            (self.log.format, self.log.seed, self.tid, self.log.fs_uuid);
        let size = self.log.block_size as usize;
        let (head, data) = self.blocks(buffers.len() + 1)?.split_at_mut(size);
        let mut descriptor = DescriptorWriter::new(head, format, tid, uuid)?;
        for (buffer, bytes) in buffers.iter().zip(data.chunks_exact_mut(size)) {
            copy(buffer, bytes);
            let escaped = uext_ondisk::jbd2::needs_escape(bytes);
            if escaped {
                uext_ondisk::jbd2::escape(bytes);
            }
            let escaped = escaped && !mutant!("escape-flag-missing");
            let checksum = if format.has_csum() {
                uext_ondisk::jbd2::logged_block_csum(seed, tid, bytes)
            } else {
                0
            };
            let checksum = if mutant!("tag-checksum-wrong") { !checksum } else { checksum };
            assert!(
                descriptor.push(buffer.block().into(), escaped, checksum),
                "the group fits its descriptor"
            );
        }
        descriptor.finish(seed);
        Ok(())
    }

    /// Writes what the chunk holds and waits.
    fn submit(&mut self) -> Result<()> {
        let result = self.write_out(BioFlags::empty());
        self.start = self.at;
        self.used = 0;
        result
    }

    /// Writes the filled part of the chunk, a bio for each run that is contiguous on the device.
    fn write_out(&mut self, extra: BioFlags) -> Result<()> {
        let flags = self.log.flags(extra);
        let lost = || JournalError::io(IoWhat::WriteLog, self.start.into(), BlkStatus::Invalid);
        let used = u32::try_from(self.used).map_err(|_| lost())?;
        let size = u64::from(self.log.block_size);
        let (mut at, mut done, mut result) = (self.start, 0u32, Ok(()));
        while done < used {
            let most = (used - done).min(self.log.end - at);
            let (physical, count) = self.log.map.run(at, most).ok_or_else(lost)?;
            let offset = physical.checked_mul(size).ok_or_else(lost)?;
            let sector = Sector::from_byte_offset(offset);
            let mut bio = self.log.bios.alloc(BioOp::Write, flags, sector);
            let piece = (done * self.log.block_size, count * self.log.block_size);
            bio.add_vec(BioVec::part(self.chunk.memory.clone(), piece.0, piece.1));
            self.chunk.batch.push(bio);
            done += count;
            at = self.log.advance(at, count);
            if self.chunk.batch.len() == MAX_BIOS || done == used {
                self.log.device.submit_batch_wait(&mut self.chunk.batch);
                let ended = self.chunk.batch.drain(..).map(|bio| bio.status());
                result = ended.fold(result, BlkResult::and);
            }
        }
        let start = self.start;
        result.map_err(|status| JournalError::io(IoWhat::WriteLog, start.into(), status))
    }

    /// Writes what is left of the transaction's blocks and waits for all of them.
    pub(crate) fn finish_blocks(&mut self) -> Result<()> {
        if mutant!("commit-before-blocks") {
            return Ok(());
        }
        let zeroes = self.blocks_ahead();
        if zeroes > 0 {
            let (used, at) = (self.used, self.at);
            self.blocks(zeroes as usize)?.fill(0);
            let written = self.write_out(BioFlags::empty());
            self.at = at;
            if written.is_ok() {
                (self.start, self.used) = (at, 0);
                return Ok(());
            }
            // Perhaps the storage has an end: what is needed may fit.
            self.used = used;
            self.chunk.ahead.stop();
        }
        if self.used > 0 { self.submit() } else { Ok(()) }
    }

    /// Blocks to fill from the one of the commit block on; they fit in the chunk.
    fn blocks_ahead(&mut self) -> u32 {
        let Place { start, blocks, free } = self.place;
        let own = self.log.distance(self.at, self.log.advance(start, blocks));
        let chunk = u32::try_from(self.log.chunk_blocks() - self.used).unwrap_or(0);
        self.chunk.ahead.due(self.log, start, self.at, own.saturating_add(free).min(chunk))
    }

    /// Writes the commit block behind a flush, durably.
    pub(crate) fn commit(mut self) -> Result<()> {
        let (tid, format, seed) = (self.tid, self.log.format, self.log.seed);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let block = CommitBlock { sequence: tid, time, transaction_crc32: None };
        block.write(self.blocks(1)?, format.has_csum().then_some(seed))?;
        let (preflush, fua) = (!mutant!("commit-without-preflush"), !mutant!("commit-without-fua"));
        self.write_out(durably(preflush, fua))?;
        self.used = 0;
        Ok(())
    }
}

impl Drop for LogWriter<'_> {
    fn drop(&mut self) {
        let memory = self.chunk.memory.clone();
        let ahead = Ahead::new(0);
        let none = Chunk { memory, batch: Vec::new(), sorted: Vec::new(), ahead };
        let chunk = std::mem::replace(&mut self.chunk, none);
        *self.log.chunk.lock() = Some(chunk);
    }
}
