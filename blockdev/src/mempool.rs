//! A pool that never says no: what writeback allocates from.
//!
//! A [`Mempool`] stands over any allocator and keeps `min_nr` elements in reserve.
//! [`Mempool::take`] asks the allocator first, then the reserve, and then waits
//! until somebody gives an element back; it never fails. So with no memory left,
//! `min_nr` users make progress one after the other, as long as each gives its
//! element back without taking another from the same pool.
//!
//! **Nested levels use separate pools.** Who holds an element of a pool and needs a
//! second thing to finish takes it from the pool of the next level, and never from
//! one at its own level or above:
//!
//! ```text
//!   level                      draws from, and how much there is
//!   writing a file's pages     ext4's batches: 4, each with 64 bios of 256 pages
//!     > mapping them           the journal's block maps: room for 16,384 blocks per transaction
//!       > commit               the log's chunk: 1 MiB and 16 bios, one commit at a time
//!       > checkpoint           the journal's workspace: 1 MiB, 64 bios, one checkpoint at a time
//!   metadata without journal   a buffer cache's bounce buffers: 3 of 512 KiB
//!         > device             a device's waiters and rings (4 of each kept), its queues
//! ```
//!
//! A level holds what it has while it waits for the levels further right, never the other way:
//! a commit or checkpoint, which somebody who maps pages may have to wait for, needs no batch.
//!
//! Invariants:
//! - The reserve holds at most `min_nr` elements, and with those taken by users at
//!   least `min_nr` exist.
//! - Waiters are served in the order in which they came.
//! - An element given back first serves a waiter, then fills the reserve, and only
//!   then goes back to the allocator.
//!
//! Locks: `state`, never held while the allocator runs.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

use uext_sync::{Arc, Condvar, Mutex, MutexGuard};

/// Makes an element, or says that there is no memory for one now.
type Alloc<T> = Box<dyn Fn() -> Option<T> + Send + Sync>;

/// A pool with a reserve. Clones share it.
pub struct Mempool<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    alloc: Alloc<T>,
    min_nr: usize,
    state: Mutex<State<T>>,
    /// The first waiter may have changed, or there is something for it.
    returned: Condvar,
}

struct State<T> {
    reserve: Vec<T>,
    /// Tickets of those who wait, the first first.
    waiters: VecDeque<u64>,
    next_ticket: u64,
}

impl<T> Clone for Mempool<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<T> Mempool<T> {
    /// A pool of `min_nr` elements in reserve, at least one, made with `make`, over
    /// an allocator that may refuse.
    pub fn new(
        min_nr: usize,
        mut make: impl FnMut() -> T,
        alloc: impl Fn() -> Option<T> + Send + Sync + 'static,
    ) -> Self {
        let min_nr = min_nr.max(1);
        let reserve = (0..min_nr).map(|_| make()).collect();
        // Waiting must not allocate either, for as many as is usual.
        let waiters = VecDeque::with_capacity(64);
        let state = Mutex::new(State { reserve, waiters, next_ticket: 0 });
        let alloc = Box::new(alloc);
        Self { inner: Arc::new(Inner { alloc, min_nr, state, returned: Condvar::new() }) }
    }

    /// A pool of exactly `min_nr` elements, with nothing behind the reserve.
    pub fn reserve_only(min_nr: usize, make: impl FnMut() -> T) -> Self {
        Self::new(min_nr, make, || None)
    }

    /// An element; waits for one to be given back where there is none.
    pub fn take(&self) -> Pooled<T> {
        if let Some(taken) = self.try_take() {
            return taken;
        }
        let mut state = self.inner.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiters.push_back(ticket);
        loop {
            if state.waiters.front() == Some(&ticket)
                && let Some(value) = state.reserve.pop()
            {
                state.waiters.pop_front();
                self.inner.wake(&state);
                return self.pooled(value);
            }
            self.inner.returned.wait(&mut state);
        }
    }

    /// An element, if there is one without waiting; doesn't overtake who waits.
    pub fn try_take(&self) -> Option<Pooled<T>> {
        if let Some(value) = (self.inner.alloc)() {
            return Some(self.pooled(value));
        }
        let mut state = self.inner.state.lock();
        if !state.waiters.is_empty() {
            return None;
        }
        state.reserve.pop().map(|value| self.pooled(value))
    }

    /// Elements in reserve now, at most [`Mempool::min_nr`].
    pub fn in_reserve(&self) -> usize {
        self.inner.state.lock().reserve.len()
    }

    /// Elements that the pool keeps.
    pub fn min_nr(&self) -> usize {
        self.inner.min_nr
    }

    fn pooled(&self, value: T) -> Pooled<T> {
        Pooled { value: Some(value), pool: self.inner.clone() }
    }
}

impl<T> Inner<T> {
    /// Takes an element back: into the reserve, from where waiters take it, or away.
    fn give(&self, value: T) {
        let mut state = self.state.lock();
        if state.reserve.len() < self.min_nr {
            state.reserve.push(value);
            self.wake(&state);
        } else {
            drop(state);
            // Outside the lock: its drop may be anything.
            drop(value);
        }
    }

    /// Wakes the waiters when the first of them can be served.
    fn wake(&self, state: &MutexGuard<'_, State<T>>) {
        if !state.reserve.is_empty() && !state.waiters.is_empty() {
            // All: a condvar doesn't know which of them is the first.
            self.returned.notify_all();
        }
    }
}

/// An element of a pool; goes back when dropped.
#[must_use]
pub struct Pooled<T> {
    /// `None` only while dropping.
    value: Option<T>,
    pool: Arc<Inner<T>>,
}

impl<T> Deref for Pooled<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("an element is there until its drop")
    }
}

impl<T> DerefMut for Pooled<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("an element is there until its drop")
    }
}

impl<T> Drop for Pooled<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.pool.give(value);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_reserve_is_used_when_the_allocator_refuses_and_filled_again() {
        let refuse = Arc::new(AtomicBool::new(false));
        let refused = refuse.clone();
        let alloc = move || (!refused.load(Ordering::SeqCst)).then_some(0);
        let pool = Mempool::new(2, || 0, alloc);
        let first = pool.take();
        assert_eq!(pool.in_reserve(), 2, "from the allocator");
        refuse.store(true, Ordering::SeqCst);
        let (second, third) = (pool.take(), pool.take());
        assert_eq!(pool.in_reserve(), 0);
        assert!(pool.try_take().is_none());
        drop((first, second, third));
        assert_eq!(pool.in_reserve(), 2, "and no more than that");
    }

    #[test]
    fn many_threads_get_through_a_reserve_of_one() {
        let pool = Mempool::reserve_only(1, || 0u64);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        *pool.take() += 1;
                    }
                });
            }
        });
        assert_eq!(*pool.take(), 1600, "one element, never two users at once");
    }

    #[test]
    fn waiters_are_served_in_their_order() {
        let pool = Mempool::reserve_only(1, || ());
        let held = pool.take();
        let served = Mutex::new(Vec::new());
        let waiting = AtomicUsize::new(0);
        thread::scope(|scope| {
            for n in 0..4 {
                let (pool, served, waiting) = (&pool, &served, &waiting);
                scope.spawn(move || {
                    while waiting.load(Ordering::SeqCst) != n {
                        thread::yield_now();
                    }
                    waiting.store(n + 1, Ordering::SeqCst);
                    let element = pool.take();
                    served.lock().push(n);
                    drop(element);
                });
                // The next one starts once this one's ticket is drawn.
                while pool.inner.state.lock().waiters.len() <= n {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            assert!(pool.try_take().is_none());
            drop(held);
        });
        assert_eq!(*served.lock(), [0, 1, 2, 3]);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p uext-blockdev --lib loom` (own target directory).
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    /// A lost wakeup needs two preemptions; more take minutes, which `make models` has.
    fn check(model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        let long = std::env::var_os("UEXT_MODEL_FACTOR").is_some();
        builder.preemption_bound = Some(if long { 3 } else { 2 });
        builder.check(model);
    }

    #[test]
    fn loom_no_wakeup_is_lost_with_one_element_and_three_takers() {
        check(|| {
            let pool = Mempool::reserve_only(1, || 0u32);
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let pool = pool.clone();
                    loom::thread::spawn(move || *pool.take() += 1)
                })
                .collect();
            *pool.take() += 1;
            for thread in threads {
                thread.join().expect("a taker ends");
            }
            assert_eq!(*pool.take(), 3);
        });
    }

    #[test]
    fn loom_with_nothing_free_each_return_serves_the_first_waiter() {
        check(|| {
            let pool = Mempool::reserve_only(1, || Vec::new());
            let held = pool.take();
            let first = {
                let pool = pool.clone();
                loom::thread::spawn(move || pool.take().push(1))
            };
            while pool.inner.state.lock().waiters.is_empty() {
                loom::thread::yield_now();
            }
            let second = {
                let pool = pool.clone();
                loom::thread::spawn(move || pool.take().push(2))
            };
            drop(held);
            first.join().expect("the first is served");
            second.join().expect("the second is served");
            assert_eq!(*pool.take(), [1, 2], "nobody overtakes who waits");
        });
    }

    #[test]
    fn loom_try_take_neither_overtakes_nor_strands_a_waiter() {
        check(|| {
            let pool = Mempool::reserve_only(1, || 0u32);
            let held = pool.take();
            let waiter = {
                let pool = pool.clone();
                loom::thread::spawn(move || *pool.take() += 1)
            };
            let chancer = {
                let pool = pool.clone();
                loom::thread::spawn(move || drop(pool.try_take()))
            };
            drop(held);
            waiter.join().expect("the waiter is served");
            chancer.join().expect("the chancer ends");
            assert_eq!(pool.in_reserve(), 1);
        });
    }
}
