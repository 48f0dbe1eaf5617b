//! The page cache: one memory limit, one flusher, for all address spaces and buffer
//! caches made from it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use uext_sync::{Mutex, RwLock};

use crate::buffer_cache::BufferCache;
use crate::frame::{Frame, FramePool, PAGE_SIZE};
use crate::readahead::{self, ReadaheadState};
use crate::reclaim::Backoff;
use crate::writeback::{DirtyMappings, Flusher};

/// The smallest limit, whatever was asked for: below it, writeback could not move.
const MIN_LIMIT_BYTES: usize = 256 * 1024;

/// How a page cache behaves.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Most bytes of frames, data and metadata together. Exceeded only as far as pages
    /// that cannot be dropped demand, after a bounded wait.
    pub limit_bytes: usize,
    /// Per cent of the limit that may be dirty before the flusher starts, and how many bytes at
    /// most: a disk that has nothing to do while much is dirty makes the next sync wait.
    pub dirty_background_percent: u32,
    /// See there.
    pub dirty_background_bytes: usize,
    /// Per cent of the limit that may be dirty before writers wait.
    pub dirty_percent: u32,
    /// How often the flusher looks for old dirty pages.
    pub flush_interval: Duration,
    /// How old a dirty page gets before the flusher writes it.
    pub dirty_expire: Duration,
    /// Per cent of the limit that pages whose write failed may hold before they are
    /// dropped, which is logged.
    pub failed_percent: u32,
    /// Most pages one call of `writepages` is asked for.
    pub writeback_chunk_pages: u64,
    /// Run the flusher's thread. Tests that need every write in order switch it off, and
    /// dirty less than writers would have to wait for.
    pub background: bool,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            limit_bytes: (total_memory() / 16).max(64 << 20),
            dirty_background_percent: 10,
            dirty_background_bytes: 16 << 20,
            dirty_percent: 40,
            flush_interval: Duration::from_secs(5),
            dirty_expire: Duration::from_secs(5),
            failed_percent: 25,
            writeback_chunk_pages: 16384,
            background: true,
        }
    }
}

/// Bytes of memory of this machine, or 1 GiB when it does not say.
fn total_memory() -> usize {
    let ask = nix::unistd::sysconf;
    let pages = ask(nix::unistd::SysconfVar::_PHYS_PAGES).ok().flatten();
    let size = ask(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    let bytes = pages.zip(size).and_then(|(p, s)| p.checked_mul(s));
    bytes.and_then(|b| usize::try_from(b).ok()).unwrap_or(1 << 30)
}

/// What a page cache holds now, and did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// The limit, bytes.
    pub limit_bytes: usize,
    /// Bytes of frames in use.
    pub used_bytes: usize,
    /// Bytes of slabs, used or not.
    pub slab_bytes: usize,
    /// Data pages that are dirty.
    pub dirty_pages: usize,
    /// Data pages being written.
    pub writeback_pages: usize,
    /// Dirty data pages whose last write failed.
    pub failed_pages: usize,
    /// Bytes of dirty buffers.
    pub dirty_buffer_bytes: usize,
    /// Frames dropped by reclaim.
    pub evicted: u64,
    /// Allocations that went over the limit because nothing could be dropped in time.
    pub over_limit: u64,
    /// Times a writer waited for the dirty limit.
    pub throttled: u64,
    /// Data pages written.
    pub written_pages: u64,
}

/// Counters that outlive what they count. WHY-RELAXED: all are statistics or compared
/// with limits that may be late. They are std's in models too: nothing is decided by
/// their order.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) dirty: AtomicUsize,
    pub(crate) writeback: AtomicUsize,
    pub(crate) failed: AtomicUsize,
    pub(crate) dirty_buffer_bytes: AtomicUsize,
    pub(crate) evicted: AtomicU64,
    pub(crate) over_limit: AtomicU64,
    pub(crate) throttled: AtomicU64,
    pub(crate) written: AtomicU64,
}

impl Counters {
    pub(crate) fn buffer_dirtied(&self, bytes: usize) {
        self.dirty_buffer_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn buffer_cleaned(&self, bytes: usize) {
        self.dirty_buffer_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What happened to a cached page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Reclaim dropped it; the disk has the same contents.
    Evicted,
    /// It was cut off by a truncate or hole punch.
    Truncated,
    /// It was dropped because the disk was written past the cache.
    Invalidated,
}

/// A front end that wants to know when a page it may have mapped goes or changes hands.
pub trait ChangeListener: Send + Sync {
    /// A page of the address space `id` changed. Called without locks of the cache,
    /// perhaps under those of whoever caused it: it must not wait for I/O or call back
    /// into the cache.
    fn page_changed(&self, id: u64, index: u64, change: Change);
}

/// Frames, limits and the flusher that many address spaces share.
pub struct PageCache {
    me: Weak<PageCache>,
    pub(crate) config: CacheConfig,
    pub(crate) pool: Arc<FramePool>,
    counters: Arc<Counters>,
    pub(crate) backoff: Backoff,
    pub(crate) flusher: Arc<Flusher>,
    pub(crate) dirty: DirtyMappings,
    buffer_caches: Mutex<Vec<Weak<BufferCache>>>,
    listeners: RwLock<Vec<Weak<dyn ChangeListener>>>,
}

impl PageCache {
    /// A cache with its own memory limit and flusher thread.
    pub fn new(config: CacheConfig) -> Arc<Self> {
        let config = CacheConfig { limit_bytes: config.limit_bytes.max(MIN_LIMIT_BYTES), ..config };
        let cache = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            config,
            pool: FramePool::new(),
            counters: Arc::default(),
            backoff: Backoff::default(),
            flusher: Flusher::new(),
            dirty: DirtyMappings::default(),
            buffer_caches: Mutex::default(),
            listeners: RwLock::default(),
        });
        if cache.config.background {
            Flusher::start(&cache);
        }
        cache
    }

    /// What it holds.
    pub fn stats(&self) -> CacheStats {
        let c = &self.counters;
        CacheStats {
            limit_bytes: self.config.limit_bytes,
            used_bytes: self.pool.used() * PAGE_SIZE,
            slab_bytes: self.pool.slab_pages() * PAGE_SIZE,
            dirty_pages: c.dirty.load(Ordering::Relaxed),
            writeback_pages: c.writeback.load(Ordering::Relaxed),
            failed_pages: c.failed.load(Ordering::Relaxed),
            dirty_buffer_bytes: c.dirty_buffer_bytes.load(Ordering::Relaxed),
            evicted: c.evicted.load(Ordering::Relaxed),
            over_limit: c.over_limit.load(Ordering::Relaxed),
            throttled: c.throttled.load(Ordering::Relaxed),
            written_pages: c.written.load(Ordering::Relaxed),
        }
    }

    /// Registers a front end to be told of changes, until it is dropped.
    pub fn register_listener(&self, listener: Weak<dyn ChangeListener>) {
        let mut listeners = self.listeners.write();
        listeners.retain(|l| l.strong_count() > 0);
        listeners.push(listener);
    }

    pub(crate) fn notify_change(&self, id: u64, index: u64, change: Change) {
        let listeners = self.listeners.read();
        if listeners.is_empty() {
            return;
        }
        let alive: Vec<_> = listeners.iter().filter_map(Weak::upgrade).collect();
        drop(listeners);
        alive.iter().for_each(|l| l.page_changed(id, index, change));
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(crate) fn weak(&self) -> Weak<PageCache> {
        self.me.clone()
    }

    /// For a reader of one of its address spaces: windows that leave room for others.
    pub fn readahead(&self) -> ReadaheadState {
        ReadaheadState::new(readahead::MAX_PAGES.min(self.limit_pages() as u64 / 16))
    }

    pub(crate) fn limit_pages(&self) -> usize {
        self.config.limit_bytes / PAGE_SIZE
    }

    /// Pages at which the flusher starts.
    pub(crate) fn background_pages(&self) -> usize {
        let pages = self.limit_pages() * self.config.dirty_background_percent as usize / 100;
        pages.min(self.config.dirty_background_bytes / PAGE_SIZE)
    }

    /// Pages at which writers wait.
    pub(crate) fn dirty_limit_pages(&self) -> usize {
        (self.limit_pages() * self.config.dirty_percent as usize / 100).max(1)
    }

    pub(crate) fn add_buffer_cache(&self, buffers: &Arc<BufferCache>) {
        let mut all = self.buffer_caches.lock();
        all.retain(|b| b.strong_count() > 0);
        all.push(Arc::downgrade(buffers));
    }

    pub(crate) fn buffer_caches(&self) -> Vec<Arc<BufferCache>> {
        self.buffer_caches.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// A frame of `pages` pages; memory is reclaimed when the limit is reached. Never
    /// fails. `may_wait`: the caller can wait, for a bounded time, until the flusher has
    /// cleaned pages.
    pub(crate) fn alloc_frame(
        &self,
        pages: usize,
        piece: usize,
        zero: bool,
        may_wait: bool,
    ) -> Arc<Frame> {
        self.charge(pages, may_wait);
        self.pool.alloc(pages, piece, zero)
    }

    /// `count` frames of a page, as by [`PageCache::alloc_frame`]; contents arbitrary.
    pub(crate) fn alloc_pages(&self, count: usize) -> Vec<Arc<Frame>> {
        self.charge(count, true);
        self.pool.alloc_many(count)
    }

    fn charge(&self, pages: usize, may_wait: bool) {
        self.pool.charge(pages);
        if self.pool.used() > self.limit_pages() {
            self.make_room(may_wait);
        }
    }
}

impl Drop for PageCache {
    fn drop(&mut self) {
        self.flusher.stop();
    }
}

impl std::fmt::Debug for PageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.stats().fmt(f)
    }
}
