//! Reclaim: making room when frames reach the memory limit.
//!
//! A clock goes over the slabs. A frame that was used again since it came loses one
//! use; one that was used once, or is out of uses, is dropped through its reverse map,
//! when every mapping is clean and unused. So a stream that is read once leaves before
//! what is used again.
//!
//! When nothing can be dropped the flusher is woken, the journal is asked for a
//! checkpoint, and who may wait does so, for a bounded time. Then the allocation goes
//! over the limit: an allocation may be made under any lock of a filesystem, and
//! waiting for pages that only the caller's own progress cleans would never end. The
//! dirty limit, where writers wait without locks, keeps that excess small.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use uext_sync::time::{Duration, Instant};

use crate::cache::PageCache;
use crate::rmap::Rmap;

/// Frames freed beyond the need, so that not every allocation reclaims.
const BATCH: usize = 32;
/// Rounds of the clock before giving up: a frame survives two.
const ROUNDS: usize = 3;
/// How long one wait for the flusher lasts.
const WAIT: Duration = Duration::from_millis(10);
/// How many waits before an allocation goes over the limit.
const WAITS: usize = 10;
/// How long no new scan starts after one that found nothing.
const FRUITLESS: Duration = Duration::from_millis(2);

/// When the next scan is worth its time.
#[derive(Default)]
pub(crate) struct Backoff {
    /// Microseconds since the process's first scan. WHY-RELAXED: a hint.
    until: AtomicU64,
}

impl Backoff {
    fn now() -> u64 {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_micros() as u64
    }

    fn is_waiting(&self) -> bool {
        Self::now() < self.until.load(Ordering::Relaxed)
    }

    fn begin(&self) {
        self.until.store(Self::now() + FRUITLESS.as_micros() as u64, Ordering::Relaxed);
    }

    /// Something became clean.
    pub(crate) fn end(&self) {
        self.until.store(0, Ordering::Relaxed);
    }
}

uext_sync::thread_local! {
    static MAY_NOT_WAIT: Cell<u32> = const { Cell::new(0) };
}

/// While it lives, its thread never waits for the flusher: for the flusher itself, and
/// for threads whose progress writeback needs, as the journal's commit thread
/// (`PF_MEMALLOC`).
pub struct NoWaitScope {
    /// Not `Send`: the scope is its thread's.
    _thread: std::marker::PhantomData<*const ()>,
}

impl NoWaitScope {
    /// Begins a scope; scopes nest.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "a scope is begun, not defaulted")]
    pub fn new() -> Self {
        MAY_NOT_WAIT.with(|scopes| scopes.set(scopes.get() + 1));
        Self { _thread: std::marker::PhantomData }
    }

    pub(crate) fn is_active() -> bool {
        MAY_NOT_WAIT.with(Cell::get) > 0
    }
}

impl Drop for NoWaitScope {
    fn drop(&mut self) {
        MAY_NOT_WAIT.with(|scopes| scopes.set(scopes.get() - 1));
    }
}

impl PageCache {
    /// Brings charged pages to the limit, or gives up (see the file's comment).
    pub(crate) fn make_room(&self, may_wait: bool) {
        let may_wait = may_wait && !NoWaitScope::is_active();
        for _ in 0..=WAITS {
            if self.reclaim(self.pool.used().saturating_sub(self.limit_pages())) {
                return;
            }
            self.flusher.wake_for_memory();
            self.buffer_caches().iter().for_each(|b| b.request_checkpoint());
            if !may_wait {
                break;
            }
            self.flusher.wait_progress(WAIT);
        }
        self.counters().over_limit.fetch_add(1, Ordering::Relaxed);
    }

    /// Drops at least `need` pages, and some more, of frames that are clean and unused.
    /// Whether that many went.
    pub(crate) fn reclaim(&self, need: usize) -> bool {
        if need == 0 {
            return true;
        }
        if self.backoff.is_waiting() {
            return false;
        }
        let before = self.pool.used();
        let limit = self.limit_pages();
        let mut evicted = 0;
        for _ in 0..ROUNDS * self.pool.round() {
            let Some(slab) = self.pool.next_slab() else { continue };
            slab.tick(|rmap| {
                evicted += u64::from(evict(&rmap));
                evicted < (need + BATCH) as u64
            });
            if evicted >= (need + BATCH) as u64 {
                break;
            }
        }
        self.counters().evicted.fetch_add(evicted, Ordering::Relaxed);
        let now = self.pool.used();
        let enough = now <= limit || before.saturating_sub(now) >= need;
        if !enough {
            self.backoff.begin();
        }
        enough
    }

    /// Drops every clean, unused frame (`drop_caches`): for tests and measurements.
    pub fn drop_clean(&self) {
        for _ in 0..=ROUNDS * self.pool.round() {
            if let Some(slab) = self.pool.next_slab() {
                slab.tick(|rmap| {
                    evict(&rmap);
                    true
                });
            }
        }
    }
}

/// Takes a frame away from all who map it; whether all let go.
fn evict(rmap: &Rmap) -> bool {
    let mut gone = true;
    for mapping in rmap.as_slice() {
        gone &= mapping.owner.upgrade().is_none_or(|owner| owner.try_evict(mapping.key));
    }
    gone
}
