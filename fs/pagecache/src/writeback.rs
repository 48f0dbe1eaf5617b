//! The flusher: writes dirty pages when they are old, too many, or in the way.
//!
//! One thread per page cache. It holds the cache weakly, takes address spaces out of the
//! list of dirty ones by cloning, and calls their operations without any lock. Address
//! spaces are written oldest first, each in one go of many pages, so that delayed
//! allocation sees long runs.
//!
//! What the write path of this crate takes memory for: nothing for data (a page is
//! written from its own frame, and what keeps count of it got its room when the page became
//! dirty); for metadata bounce buffers from a fixed pool, and small vectors of indexes,
//! bounded by the request.
//! Frames for metadata that block allocation reads are never waited for by the flusher:
//! it runs in a [`NoWaitScope`].
//!
//! Dirty limits are of data pages; pages whose write failed do not count, since waiting
//! does not clean them (they have a limit of their own).
//!
//! Locks: the list and the flusher's state are leaves.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use uext_sync::atomic::{AtomicUsize, Ordering};
use uext_sync::time::{Duration, Instant};
use uext_sync::{Condvar, Mutex};

use crate::address_space::{AddressSpace, MOST_TOGETHER, WritebackControl, WritebackReason};
use crate::cache::PageCache;
use crate::errseq::WritebackError;
use crate::reclaim::NoWaitScope;

/// How long a throttled writer waits without any page being written before it goes on.
const STALLED: Duration = Duration::from_secs(1);
/// How long one wait of a throttled writer lasts.
const THROTTLE_WAIT: Duration = Duration::from_millis(10);

/// An address space that is dirty.
struct DirtyMapping {
    mapping: Arc<AddressSpace>,
    /// Since when, or since it was last written as a whole.
    since: Instant,
    /// Not before this, after a failure.
    retry_at: Option<Instant>,
}

/// Address spaces with dirty pages or pages being written, by their `seq`.
#[derive(Default)]
pub(crate) struct DirtyMappings {
    by_seq: Mutex<BTreeMap<u64, DirtyMapping>>,
    /// What the flusher goes over them with; as long as there are entries it has room for all.
    pass: Mutex<Vec<(Instant, Arc<AddressSpace>)>>,
}

impl DirtyMappings {
    pub(crate) fn insert(&self, mapping: Arc<AddressSpace>) {
        let entry =
            DirtyMapping { since: Instant::now(), retry_at: None, mapping: mapping.clone() };
        let mut all = self.by_seq.lock();
        all.insert(mapping.seq(), entry);
        let count = all.len();
        drop(all);
        let mut pass = self.pass.lock();
        let room = count.saturating_sub(pass.len());
        pass.reserve(room);
    }

    pub(crate) fn remove(&self, seq: u64) -> Option<Arc<AddressSpace>> {
        self.by_seq.lock().remove(&seq).map(|entry| entry.mapping)
    }

    /// Address spaces dirty since before `limit` and not waiting for a retry, oldest first. The
    /// array goes back with [`DirtyMappings::end_pass`].
    fn due(&self, limit: Instant, now: Instant) -> Vec<(Instant, Arc<AddressSpace>)> {
        let mut due = std::mem::take(&mut *self.pass.lock());
        let all = self.by_seq.lock();
        due.extend(
            all.values()
                .filter(|d| d.since <= limit && d.retry_at.is_none_or(|at| at <= now))
                .map(|d| (d.since, d.mapping.clone())),
        );
        drop(all);
        due.sort_unstable_by_key(|(since, mapping)| (*since, mapping.seq()));
        due
    }

    fn end_pass(&self, mut due: Vec<(Instant, Arc<AddressSpace>)>) {
        // Dropping an address space may take locks.
        due.clear();
        let mut pass = self.pass.lock();
        if due.capacity() > pass.capacity() {
            *pass = due;
        }
    }

    fn all(&self) -> Vec<Arc<AddressSpace>> {
        self.by_seq.lock().values().map(|d| d.mapping.clone()).collect()
    }

    fn update(&self, seq: u64, since: Option<Instant>, retry_at: Option<Instant>) {
        if let Some(entry) = self.by_seq.lock().get_mut(&seq) {
            entry.since = since.unwrap_or(entry.since);
            entry.retry_at = retry_at;
        }
    }
}

#[derive(Default)]
struct State {
    background: bool,
    memory: bool,
    stop: bool,
}

/// The flusher thread's mailbox.
pub(crate) struct Flusher {
    state: Mutex<State>,
    work: Condvar,
    progress: Mutex<()>,
    progressed: Condvar,
    /// Threads that wait for progress. WHY-RELAXED: a missed wake-up costs one bounded wait.
    waiters: AtomicUsize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Flusher {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            work: Condvar::new(),
            progress: Mutex::default(),
            progressed: Condvar::new(),
            waiters: AtomicUsize::new(0),
            thread: Mutex::default(),
        })
    }

    /// Starts the thread of `cache`.
    pub(crate) fn start(cache: &Arc<PageCache>) {
        if cfg!(any(loom, shuttle)) {
            // A model's threads are its own; one of them calls `write_old`.
            return;
        }
        let (weak, flusher) = (cache.weak(), cache.flusher.clone());
        let interval = cache.config.flush_interval;
        let thread = std::thread::Builder::new()
            .name("uext-flusher".into())
            .spawn(move || flusher.run(&weak, interval));
        match thread {
            Ok(handle) => *cache.flusher.thread.lock() = Some(handle),
            // Without it nothing is written in the background; limits and fsync still work.
            Err(error) => log::error!("no flusher thread: {error}"),
        }
    }

    fn run(&self, cache: &Weak<PageCache>, interval: Duration) {
        let _scope = NoWaitScope::new();
        loop {
            let Some(reason) = self.next_work(interval) else { return };
            let Some(cache) = cache.upgrade() else { return };
            cache.write_old(reason);
        }
    }

    /// Waits for work or the interval; `None`: stop.
    fn next_work(&self, interval: Duration) -> Option<WritebackReason> {
        let deadline = Instant::now() + interval;
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if std::mem::take(&mut state.memory) {
                state.background = false;
                return Some(WritebackReason::Memory);
            }
            if std::mem::take(&mut state.background) {
                return Some(WritebackReason::Background);
            }
            if self.work.wait_until(&mut state, deadline).timed_out() {
                return if state.stop { None } else { Some(WritebackReason::Periodic) };
            }
        }
    }

    /// Too much is dirty.
    pub(crate) fn wake(&self) {
        let mut state = self.state.lock();
        if !state.background {
            state.background = true;
            self.work.notify_one();
        }
    }

    /// Memory is short.
    pub(crate) fn wake_for_memory(&self) {
        let mut state = self.state.lock();
        if !state.memory {
            state.memory = true;
            self.work.notify_one();
        }
    }

    /// Pages became clean.
    fn notify_progress(&self) {
        if self.waiters.load(Ordering::Relaxed) > 0 {
            let _order = self.progress.lock();
            self.progressed.notify_all();
        }
    }

    /// Waits until pages became clean, or for `limit`.
    pub(crate) fn wait_progress(&self, limit: Duration) {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let mut guard = self.progress.lock();
        self.progressed.wait_for(&mut guard, limit);
        drop(guard);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.work.notify_all();
        let thread = self.thread.lock().take();
        // The flusher itself may drop the last reference to the cache.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            log::error!("the flusher thread panicked");
        }
    }
}

impl PageCache {
    /// Data pages that are dirty or being written and that waiting helps.
    fn dirty_total(&self) -> usize {
        let c = self.counters();
        let dirty = c.dirty.load(Ordering::Relaxed) + c.writeback.load(Ordering::Relaxed);
        dirty.saturating_sub(c.failed.load(Ordering::Relaxed))
    }

    pub(crate) fn failed_limit_pages(&self) -> usize {
        self.limit_pages() * self.config.failed_percent as usize / 100
    }

    /// A page became dirty.
    pub(crate) fn dirtied(&self) {
        if self.dirty_total() == self.background_pages() + 1 {
            self.flusher.wake();
        }
    }

    /// A page became clean, or at least was tried.
    pub(crate) fn made_progress(&self) {
        self.backoff.end();
        self.flusher.notify_progress();
    }

    /// See [`AddressSpace::balance_dirty`].
    pub fn balance_dirty(&self) {
        if self.dirty_total() <= self.background_pages() {
            return;
        }
        self.flusher.wake();
        if self.dirty_total() <= self.dirty_limit_pages() || NoWaitScope::is_active() {
            return;
        }
        let written = || self.counters().written.load(Ordering::Relaxed);
        self.counters().throttled.fetch_add(1, Ordering::Relaxed);
        let (mut seen, mut since) = (written(), Instant::now());
        while self.dirty_total() > self.dirty_limit_pages() {
            self.flusher.wake();
            self.flusher.wait_progress(THROTTLE_WAIT);
            let now = written();
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > STALLED {
                // A device that hangs or fails must not hold every writer for ever.
                log::warn!("no page was written for {STALLED:?}; a writer goes on");
                return;
            }
        }
    }

    /// One pass of the flusher.
    pub(crate) fn write_old(&self, reason: WritebackReason) {
        let now = Instant::now();
        let limit = match reason {
            WritebackReason::Periodic => now.checked_sub(self.config.dirty_expire),
            _ => Some(now),
        };
        let Some(limit) = limit else { return };
        let due = self.dirty.due(limit, now);
        let is_enough = || {
            reason == WritebackReason::Background
                && self.dirty_total() <= self.background_pages() / 2
        };
        for some in due.chunks(MOST_TOGETHER) {
            if let Some(ops) = some.first().and_then(|(_, mapping)| mapping.ops())
                && !is_enough()
            {
                ops.write_together(&mut some.iter().map(|(_, mapping)| mapping));
            }
            for (_, mapping) in some {
                if is_enough() {
                    break;
                }
                self.write_mapping(mapping, reason);
            }
        }
        self.dirty.end_pass(due);
        let held = self.counters().dirty_buffer_bytes.load(Ordering::Relaxed);
        let many = held > self.background_pages() * crate::PAGE_SIZE;
        if many || reason != WritebackReason::Background {
            self.write_buffer_caches();
        }
        // Whoever waits looks again, also when nothing could be written.
        self.made_progress();
    }

    /// Writes an address space until it is clean or makes no progress.
    fn write_mapping(&self, mapping: &Arc<AddressSpace>, reason: WritebackReason) {
        let Some(ops) = mapping.ops() else {
            if mapping.has_dirty() {
                log::error!("inode {} is gone and its dirty pages with it", mapping.id());
                mapping.truncate(0);
            }
            return;
        };
        let started = Instant::now();
        let wbc = WritebackControl {
            range: 0..u64::MAX,
            nr_to_write: self.config.writeback_chunk_pages,
            sync: false,
            reason,
        };
        let errors = mapping.errseq().count();
        while mapping.nr_dirty() > 0 {
            let result = ops.writepages(mapping, &wbc);
            // Writes begun a round ago may have failed meanwhile.
            if let Err(error) = result.and(mapping.errseq().since_count(errors)) {
                log::warn!("inode {}: writeback failed: {error}", mapping.id());
                let retry = started + self.config.flush_interval;
                self.dirty.update(mapping.seq(), None, Some(retry));
                return;
            }
            if result == Ok(0) {
                break;
            }
            // A file that is dirtied as fast as it is written must not keep the others waiting.
            if started.elapsed() > self.config.flush_interval {
                break;
            }
        }
        self.dirty.update(mapping.seq(), Some(Instant::now()), None);
    }

    fn write_buffer_caches(&self) {
        for buffers in self.buffer_caches() {
            if buffers.has_flusher()
                && let Err(error) = buffers.write_dirty()
            {
                log::warn!("writeback of metadata failed: {error}");
            }
        }
    }

    /// Writes everything that is dirty, and waits: data of all address spaces, then the
    /// buffers of caches the flusher writes. Does not flush the device.
    ///
    /// # Errors
    /// The first failure; all were tried.
    pub fn sync_all(&self) -> Result<(), WritebackError> {
        let mut result = Ok(());
        for mapping in self.dirty.all() {
            result = result.and(mapping.write_and_wait(0..u64::MAX));
        }
        for buffers in self.buffer_caches() {
            if buffers.has_flusher() {
                result = result.and(buffers.write_dirty().map_err(WritebackError::from));
            }
        }
        self.made_progress();
        result
    }

    /// [`AddressSpace::write_and_wait`].
    ///
    /// # Errors
    /// The first failure of these writes.
    pub fn flush_mapping(
        &self,
        mapping: &Arc<AddressSpace>,
        range: Range<u64>,
    ) -> Result<(), WritebackError> {
        mapping.write_and_wait(range)
    }
}
