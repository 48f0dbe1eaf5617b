//! The metadata cache of a device: its blocks, found by number.
//!
//! Blocks are kept in groups: one block of a page or more, or the blocks that share
//! a page. A group has one frame and is reclaimed as a whole.
//!
//! Writes go from bounce buffers, a bounded pool of the cache, so a writer of a block
//! never waits for the disk: the contents are copied under the shared lock after the
//! dirty mark is cleared. Whatever changes the block later marks it dirty again.
//!
//! Locks, outermost first: bounce pool; a buffer's write under way (by rising block
//! number); content lock; then, as leaves, shard and dirty set. A shard lock is never
//! held while memory is allocated or I/O waited for.

use std::ops::Range;
use std::sync::{Arc, Weak};
use uext_sync::atomic::{AtomicBool, Ordering, fence};

use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkResult, BlkStatus, BlockDevice, Sector,
};
use uext_sync::{Condvar, Mutex, RwLock};

use crate::buffer::{Buffer, BufferHead, DirtyBuffers};
use crate::cache::PageCache;
use crate::frame::{Frame, FrameWrite, PAGE_SIZE};
use crate::number_map::NumberMap;
use crate::rmap::{FrameOwner, Mapping};

/// Shards of the table; a power of two.
const SHARDS: usize = 64;
/// Blocks of at most this many share a page.
const MAX_PER_PAGE: usize = 4;
/// Bytes of one bounce buffer: the most that is written between two waits.
const BOUNCE_BYTES: usize = 512 * 1024;
/// Bounce buffers of a cache: how many threads write at once.
const BOUNCE_COUNT: usize = 3;
/// Most bytes one call of `readahead` reads.
const READAHEAD_BYTES: u64 = 1024 * 1024;

/// The blocks that share a frame.
struct Group {
    frame: Arc<Frame>,
    heads: [Option<Buffer>; MAX_PER_PAGE],
}

type ShardMap = NumberMap<u64, Group>;
type Shard = Mutex<ShardMap>;

/// Called when memory is short and the journal holds buffers that only a checkpoint
/// frees.
pub trait CheckpointHook: Send + Sync {
    /// Asks for a checkpoint soon; must not wait for it.
    fn request_checkpoint(&self);
}

/// The cached blocks of one device.
pub struct BufferCache {
    me: Weak<BufferCache>,
    cache: Arc<PageCache>,
    dev: Arc<dyn BlockDevice>,
    block_size: u32,
    /// Blocks of a group; a power of two.
    per_group: u32,
    shards: Box<[Shard]>,
    dirty: Arc<DirtyBuffers>,
    bounce: BouncePool,
    /// Whether the flusher writes dirty buffers.
    /// WHY-RELAXED: set before the flusher has anything to write; seen late, one round is late.
    flusher: AtomicBool,
    checkpoint: RwLock<Option<Weak<dyn CheckpointHook>>>,
}

impl BufferCache {
    /// A cache of `dev`'s blocks of `block_size` bytes.
    ///
    /// # Panics
    /// When the block size is not a power of two from 1 KiB to 64 KiB.
    pub fn new(cache: &Arc<PageCache>, dev: Arc<dyn BlockDevice>, block_size: u32) -> Arc<Self> {
        assert!(
            block_size.is_power_of_two() && (1024..=65536).contains(&block_size),
            "block size {block_size} is not a power of two from 1 KiB to 64 KiB"
        );
        let this = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            cache: cache.clone(),
            dev,
            block_size,
            per_group: (PAGE_SIZE as u32 / block_size).max(1),
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            dirty: DirtyBuffers::new(cache.counters().clone()),
            bounce: BouncePool::default(),
            flusher: AtomicBool::new(true),
            checkpoint: RwLock::new(None),
        });
        cache.add_buffer_cache(&this);
        this
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.dev
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks on the device.
    pub fn block_count(&self) -> u64 {
        self.dev.size() / u64::from(self.block_size)
    }

    /// Whether the page cache's flusher writes dirty buffers that the journal does not
    /// hold (on at first).
    pub fn set_flusher(&self, on: bool) {
        self.flusher.store(on, Ordering::Relaxed);
    }

    pub(crate) fn has_flusher(&self) -> bool {
        self.flusher.load(Ordering::Relaxed)
    }

    /// Whom to ask for a checkpoint when memory is short.
    pub fn set_checkpoint_hook(&self, hook: Weak<dyn CheckpointHook>) {
        *self.checkpoint.write() = Some(hook);
    }

    pub(crate) fn request_checkpoint(&self) {
        let hook = self.checkpoint.read().as_ref().and_then(Weak::upgrade);
        if let Some(hook) = hook {
            hook.request_checkpoint();
        }
    }

    /// The block with its contents, from the cache or the device; waits. Concurrent
    /// calls read it once.
    ///
    /// # Errors
    /// `Invalid` for a block past the end of the device, else how the read failed; then
    /// the next call tries again.
    pub fn bread(&self, block: u64) -> BlkResult<Buffer> {
        if let Some(buffer) = self.find(block)
            && buffer.is_uptodate()
        {
            return Ok(buffer);
        }
        self.check_range(block)?;
        let buffer = self.get(block, false);
        let guard = buffer.write();
        if !buffer.is_uptodate() {
            // Read in the calling thread: a hand-over costs more than a cached device does.
            let mut bio =
                Bio::new(BioOp::Read, BioFlags::META | BioFlags::SYNC, self.sector(block));
            bio.add_vec(buffer.bvec());
            drop(self.dev.submit_bio_wait(bio)?);
            buffer.set_read();
        }
        drop(guard);
        Ok(buffer)
    }

    /// The block without reading it: for one that will be wholly overwritten. A new
    /// buffer is not uptodate and its contents mean nothing.
    pub fn getblk(&self, block: u64) -> Buffer {
        self.get(block, true)
    }

    /// The block when it is cached; perhaps not uptodate.
    pub fn find(&self, block: u64) -> Option<Buffer> {
        let (group, piece) = self.place(block);
        let shard = self.shard(group).lock();
        let buffer = shard.get(&group)?.heads[piece].clone()?;
        drop(shard);
        buffer.frame().touch();
        Some(buffer)
    }

    /// Begins to read `count` blocks from `first` that are not cached, as long runs.
    /// Best effort: errors show when the block is really read.
    pub fn readahead(&self, first: u64, count: u32) {
        let most = (READAHEAD_BYTES / u64::from(self.block_size)).min(u64::from(count));
        let end = first.saturating_add(most).min(self.block_count());
        let mut run = ReadRun::default();
        let mut bios = Vec::new();
        for block in first..end {
            let buffer = self.get(block, false);
            let guard = if buffer.is_uptodate() { None } else { buffer.try_write_owned() };
            match guard {
                // Again under the lock: another thread may have read it meanwhile.
                Some(guard) if !buffer.is_uptodate() => {
                    if run.is_full(self.dev.limits()) {
                        bios.extend(run.take_bio(self));
                    }
                    run.push(buffer, guard);
                }
                _ => bios.extend(run.take_bio(self)),
            }
        }
        bios.extend(run.take_bio(self));
        if !bios.is_empty() {
            self.dev.submit_bios(bios);
        }
    }

    /// The block was freed: its dirty state and contents are dropped, and it leaves the
    /// cache unless somebody still holds it or a write of it is under way, which this does
    /// not wait for: see [`BufferCache::wait_for_forgotten`].
    pub fn forget(&self, block: u64) {
        let (group, piece) = self.place(block);
        let mut shard = self.shard(group).lock();
        let Some(entry) = shard.get_mut(&group) else { return };
        let Some(buffer) = entry.heads[piece].as_ref() else { return };
        let writing = buffer.set_forgotten();
        if writing || !is_unused(buffer) || !buffer.is_reclaimable() {
            return;
        }
        let gone = entry.heads[piece].take();
        let empty = entry.heads.iter().all(Option::is_none);
        let frame = if empty { self.remove_group(&mut shard, group) } else { None };
        drop(shard);
        drop((gone, frame));
    }

    /// Waits for writes that were on their way to these blocks when they were forgotten. Who
    /// gives blocks to a file's data calls this before it writes them past this cache; it
    /// holds no guard of a buffer.
    pub fn wait_for_forgotten(&self, blocks: Range<u64>) {
        self.dirty.wait_for_stale(blocks);
    }

    /// Writes these blocks now, sorted and merged, and waits; no flush. Buffers are
    /// clean from the moment their contents are copied, and dirty again when the write
    /// fails. A block that was forgotten meanwhile is left out. The caller holds no
    /// guard of a buffer.
    ///
    /// # Errors
    /// The first failure; all blocks were tried. `Invalid` for a buffer that was never
    /// filled.
    pub fn write_buffers(&self, buffers: &[Buffer]) -> BlkResult<()> {
        self.write_sorted(buffers, false)
    }

    /// [`BufferCache::write_buffers`]; with `listed` they were dirty, and one that is not filled was
    /// forgotten since.
    fn write_sorted(&self, buffers: &[Buffer], listed: bool) -> BlkResult<()> {
        let mut sorted: Vec<&Buffer> = buffers.iter().collect();
        sorted.sort_unstable_by_key(|b| b.block());
        sorted.dedup_by_key(|b| b.block());
        let mut result = Ok(());
        for chunk in sorted.chunks(BOUNCE_BYTES / self.block_size as usize) {
            result = result.and(self.write_chunk(chunk, listed));
        }
        result
    }

    /// Writes every dirty buffer that the journal does not hold, and waits; no flush.
    ///
    /// # Errors
    /// The first failure; all were tried.
    pub fn write_dirty(&self) -> BlkResult<()> {
        let most = BOUNCE_BYTES / self.block_size as usize;
        let mut result = Ok(());
        let mut from = 0;
        loop {
            let blocks: Vec<u64> =
                self.dirty.blocks.lock().range(from..).take(most).copied().collect();
            let Some(last) = blocks.last() else { return result };
            let buffers: Vec<Buffer> = blocks
                .iter()
                .filter_map(|&block| self.find_quietly(block))
                .filter(|b| b.is_dirty() && !b.is_pinned())
                .collect();
            result = result.and(self.write_sorted(&buffers, true));
            let Some(next) = last.checked_add(1) else { return result };
            from = next;
        }
    }

    /// How many buffers are dirty.
    pub fn dirty_count(&self) -> usize {
        self.dirty.blocks.lock().len()
    }

    /// Whether every buffer's contents have been written: none is dirty, no write is under way.
    pub fn is_written(&self) -> bool {
        self.dirty.is_empty()
    }

    /// Makes everything written before durable.
    ///
    /// # Errors
    /// How the flush failed.
    pub fn flush_device(&self) -> BlkResult<()> {
        self.dev.flush()
    }

    /// Drops every clean buffer nobody holds: for tests, and for a device that was
    /// written behind the cache's back.
    pub fn drop_clean(&self) {
        for shard in &self.shards {
            let groups: Vec<u64> = shard.lock().keys().copied().collect();
            for group in groups {
                self.try_evict(group);
            }
        }
    }

    fn write_chunk(&self, chunk: &[&Buffer], listed: bool) -> BlkResult<()> {
        let mut bounce = self.bounce.take();
        let mut bad = Ok(());
        let mut writing: Vec<&Buffer> = Vec::with_capacity(chunk.len());
        let memory = bounce.memory();
        let size = self.block_size as usize;
        for buffer in chunk {
            if let Err(error) = self.check_range(buffer.block()) {
                bad = bad.and(Err(error));
                continue;
            }
            if !buffer.begin_write() {
                continue;
            }
            if !buffer.is_uptodate() {
                buffer.end_write(true);
                if !listed {
                    log::error!("block {} was to be written but never filled", buffer.block());
                    bad = Err(BlkStatus::Invalid);
                }
                continue;
            }
            let at = writing.len() * size;
            memory[at..at + size].copy_from_slice(&buffer.read());
            writing.push(buffer);
        }
        let runs = self.runs(&writing);
        let bios = runs.iter().enumerate();
        let bios = bios.map(|(at, run)| self.write_bio(&bounce, &writing, at, run)).collect();
        let mut status = vec![Err(BlkStatus::IoErr); runs.len()];
        for bio in self.dev.submit_bios_wait(bios) {
            status[bio.private() as usize] = bio.status();
        }
        for (run, status) in runs.into_iter().zip(status) {
            if let Err(error) = status {
                let (first, last) = (writing[run.start].block(), writing[run.end - 1].block());
                log::error!("write of blocks {first}..={last} failed: {error}");
            }
            writing[run].iter().for_each(|buffer| buffer.end_write(status.is_ok()));
            bad = bad.and(status);
        }
        bad
    }

    /// Splits sorted buffers into runs of adjacent blocks that fit into one request.
    fn runs(&self, sorted: &[&Buffer]) -> Vec<Range<usize>> {
        let most = (self.dev.limits().max_bytes / self.block_size).max(1) as usize;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (at, buffer) in sorted.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.len() < most && sorted[at - 1].block() + 1 == buffer.block() => {
                    run.end = at + 1;
                }
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    /// The bio that writes the run `run`, the `at`th of `sorted`, from the bounce buffer.
    fn write_bio(
        &self,
        bounce: &Bounce<'_>,
        sorted: &[&Buffer],
        at: usize,
        run: &Range<usize>,
    ) -> Bio {
        let flags = BioFlags::META | BioFlags::SYNC;
        let mut bio = Bio::new(BioOp::Write, flags, self.sector(sorted[run.start].block()));
        bio.set_private(at as u64);
        bio.add_vec(BioVec::part(
            bounce.buf.clone(),
            run.start as u32 * self.block_size,
            run.len() as u32 * self.block_size,
        ));
        bio
    }

    fn check_range(&self, block: u64) -> BlkResult<()> {
        if block < self.block_count() { Ok(()) } else { Err(BlkStatus::Invalid) }
    }

    /// The block's first sector; the block is inside the device.
    fn sector(&self, block: u64) -> Sector {
        Sector::from_byte_offset(block * u64::from(self.block_size))
    }

    fn place(&self, block: u64) -> (u64, usize) {
        let per_group = u64::from(self.per_group);
        (block / per_group, (block % per_group) as usize)
    }

    fn shard(&self, group: u64) -> &Shard {
        &self.shards[(group ^ (group >> 6)) as usize % SHARDS]
    }

    fn mapping(&self, group: u64) -> Mapping {
        Mapping { owner: self.me.clone(), key: group }
    }

    fn find_quietly(&self, block: u64) -> Option<Buffer> {
        let (group, piece) = self.place(block);
        self.shard(group).lock().get(&group)?.heads[piece].clone()
    }

    fn get(&self, block: u64, zero: bool) -> Buffer {
        if let Some(buffer) = self.find(block) {
            return buffer;
        }
        let (group, piece) = self.place(block);
        // Allocation may reclaim, which takes shard locks: not under one.
        let known = self.shard(group).lock().get(&group).map(|g| g.frame.clone());
        let frame = known.unwrap_or_else(|| self.alloc_frame(zero));
        let mut shard = self.shard(group).lock();
        let entry = shard.entry(group).or_insert_with(|| {
            frame.map(self.mapping(group));
            Group { frame: frame.clone(), heads: Default::default() }
        });
        let home = entry.frame.clone();
        let buffer = entry.heads[piece]
            .get_or_insert_with(|| {
                BufferHead::new(block, self.block_size, piece as u8, home, self.dirty.clone())
            })
            .clone();
        drop(shard);
        buffer
    }

    /// Takes a group out, and its frame's mapping with it: both under the shard lock, so
    /// that a frame which is put back at once keeps its new mapping.
    fn remove_group(&self, shard: &mut ShardMap, group: u64) -> Option<Group> {
        let gone = shard.remove(&group)?;
        gone.frame.unmap(&self.mapping(group));
        Some(gone)
    }

    fn alloc_frame(&self, zero: bool) -> Arc<Frame> {
        let size = self.block_size as usize;
        // Neighbours in a shared page must not see what the page held before.
        let zero = zero || self.per_group > 1;
        self.cache.alloc_frame(size.div_ceil(PAGE_SIZE), size, zero, false)
    }
}

impl FrameOwner for BufferCache {
    fn try_evict(&self, group: u64) -> bool {
        let mut shard = self.shard(group).lock();
        let Some(entry) = shard.get(&group) else { return true };
        let idle = entry.heads.iter().flatten().all(|b| is_unused(b) && b.is_reclaimable());
        if !idle {
            return false;
        }
        let gone = self.remove_group(&mut shard, group);
        drop(shard);
        drop(gone);
        true
    }
}

/// Whether only the table holds the buffer. The caller has the shard lock, without
/// which nobody can take another reference.
fn is_unused(buffer: &Buffer) -> bool {
    let unused = Arc::strong_count(buffer) == 1;
    // PAIRS-WITH: the release in the drop of the last other reference: what its holder did to the
    // buffer is seen by the checks that follow.
    fence(Ordering::Acquire);
    unused
}

/// Adjacent blocks that one bio reads.
#[derive(Default)]
struct ReadRun {
    blocks: Vec<(Buffer, FrameWrite<Arc<Frame>>)>,
}

impl ReadRun {
    fn push(&mut self, buffer: Buffer, guard: FrameWrite<Arc<Frame>>) {
        self.blocks.push((buffer, guard));
    }

    fn is_full(&self, limits: &uext_blockdev::QueueLimits) -> bool {
        let bytes = self.blocks.iter().map(|(b, _)| b.size() as u64).sum::<u64>();
        self.blocks.len() >= usize::from(limits.max_segments)
            || bytes >= u64::from(limits.max_bytes)
    }

    fn take_bio(&mut self, cache: &BufferCache) -> Option<Bio> {
        let blocks = std::mem::take(&mut self.blocks);
        let (first, _) = blocks.first()?;
        let flags = BioFlags::META | BioFlags::RAHEAD;
        let mut bio = Bio::new(BioOp::Read, flags, cache.sector(first.block()));
        blocks.iter().for_each(|(buffer, _)| bio.add_vec(buffer.bvec()));
        bio.set_end_io(move |bio| {
            for (buffer, guard) in blocks {
                if bio.status().is_ok() {
                    buffer.set_read();
                }
                drop(guard);
            }
        });
        Some(bio)
    }
}

/// Bounce buffers, a fixed number; taking one waits.
#[derive(Default)]
struct BouncePool {
    state: Mutex<BounceState>,
    returned: Condvar,
}

#[derive(Default)]
struct BounceState {
    idle: Vec<Arc<AlignedBuf>>,
    out: usize,
}

impl BouncePool {
    fn take(&self) -> Bounce<'_> {
        let mut state = self.state.lock();
        while state.out >= BOUNCE_COUNT {
            self.returned.wait(&mut state);
        }
        state.out += 1;
        let idle = state.idle.pop();
        drop(state);
        Bounce { pool: self, buf: idle.unwrap_or_else(|| Arc::new(AlignedBuf::new(BOUNCE_BYTES))) }
    }
}

/// A bounce buffer in use.
struct Bounce<'a> {
    pool: &'a BouncePool,
    buf: Arc<AlignedBuf>,
}

impl Bounce<'_> {
    fn memory(&mut self) -> &mut [u8] {
        if Arc::get_mut(&mut self.buf).is_none() {
            // A device kept the memory of a finished bio (a recording one may): leave it to it.
            self.buf = Arc::new(AlignedBuf::new(BOUNCE_BYTES));
        }
        Arc::get_mut(&mut self.buf).expect("just made, or just found unshared")
    }
}

impl Drop for Bounce<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.out -= 1;
        // The clone is the only reference by the time another thread gets this lock and looks at
        // it in `memory`, or that makes a new one: slower, never wrong.
        state.idle.push(self.buf.clone());
        drop(state);
        self.pool.returned.notify_one();
    }
}
