//! A mutex for memory that processes share: without a system call when nobody else wants
//! it, and not lost with an owner that dies.
//!
//! The word has three states, and a fourth after a death:
//!
//! | value | meaning |
//! |---|---|
//! | 0 | free |
//! | thread's number | held, nobody sleeps |
//! | thread's number with `WAITERS` | held, somebody may sleep |
//! | `OWNER_DIED`, perhaps with `WAITERS` | free; its owner ended while it held it |
//!
//! ```text
//!   lock                                    unlock
//!   0 -> tid        (acquire), done         old = swap 0   (release)
//!   else tid -> tid | WAITERS               if old has WAITERS: wake one
//!        sleep while it is tid | WAITERS
//!        free -> mine | WAITERS (acquire)
//! ```
//!
//! A thread that has slept takes the mutex with `WAITERS`: others may sleep still, and its
//! unlock must wake one of them. So a sleeper is always covered, by the mark in the word or
//! by a wake-up under way. Everything written under the mutex happens before the next owner
//! reads it: unlock's swap releases, and the exchange that takes the mutex acquires. When an
//! owner dies, the kernel's own exchange follows all that the thread did.
//!
//! Who is woken and dies before it has taken the mutex passes the wake-up on: the kernel
//! finds the mutex as that thread's `pending` one (see `robust_list`) and wakes the next
//! when the word is 0. For what the kernel doesn't cover, the word being `OWNER_DIED` then,
//! sleepers look again every [`LOOK_AGAIN`].
//!
//! Checked by `loom_model`, by 10,000,000 handovers between two processes, and by owners
//! that are killed (`tests/`).

use std::marker::PhantomData;
use std::time::{Duration, Instant};

#[cfg(not(any(loom, shuttle)))]
use crate::robust_list;
use crate::word::Word;

/// Somebody may sleep (`FUTEX_WAITERS`).
pub(crate) const WAITERS: u32 = 0x8000_0000;
/// The owner ended (`FUTEX_OWNER_DIED`).
pub(crate) const OWNER_DIED: u32 = 0x4000_0000;
/// The owner's number (`FUTEX_TID_MASK`).
const OWNER: u32 = 0x3fff_ffff;

/// How long a sleeper trusts its wake-up.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The mutex. Where it lies, it stays.
#[derive(Debug)]
#[repr(C)]
pub struct RobustMutex {
    #[cfg(not(any(loom, shuttle)))]
    node: robust_list::Node,
    pub(crate) word: Word,
}

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(
    std::mem::offset_of!(RobustMutex, word) == size_of::<robust_list::Node>(),
    "robust_list::Head says so to the kernel"
);

/// The mutex is held; dropping this gives it up.
#[derive(Debug)]
#[must_use]
pub struct Locked<'a> {
    mutex: &'a RobustMutex,
    tid: u32,
    recovered: bool,
    /// The kernel's list is the thread's.
    thread: PhantomData<*const ()>,
}

impl Default for RobustMutex {
    fn default() -> Self {
        Self::new()
    }
}

impl RobustMutex {
    /// A free one. So is memory that is all zero.
    pub fn new() -> Self {
        Self {
            #[cfg(not(any(loom, shuttle)))]
            node: robust_list::Node::default(),
            word: Word::new(0),
        }
    }

    /// Waits for it.
    ///
    /// # Panics
    /// When this thread has it already.
    pub fn lock(&self) -> Locked<'_> {
        self.lock_looking(Some(LOOK_AGAIN))
    }

    /// As [`RobustMutex::lock`], but sleeps until it is woken: for tests that no wake-up is
    /// lost.
    #[doc(hidden)]
    pub fn lock_trusting_wakeups(&self) -> Locked<'_> {
        self.lock_looking(None)
    }

    fn lock_looking(&self, look_again: Option<Duration>) -> Locked<'_> {
        let tid = self.begin();
        let recovered = if self.word.replace(0, tid) {
            false
        } else {
            self.lock_contended(tid, None, look_again).expect("there is no limit")
        };
        self.taken(tid, recovered)
    }

    /// Waits for it, at most for `limit`.
    pub fn lock_for(&self, limit: Duration) -> Option<Locked<'_>> {
        let tid = self.begin();
        if self.word.replace(0, tid) {
            return Some(self.taken(tid, false));
        }
        let recovered = self.lock_contended(tid, Some(Instant::now() + limit), Some(LOOK_AGAIN));
        if recovered.is_none() {
            self.end();
        }
        recovered.map(|recovered| self.taken(tid, recovered))
    }

    /// Takes it when it is free.
    pub fn try_lock(&self) -> Option<Locked<'_>> {
        let tid = self.begin();
        let current = self.word.load_relaxed();
        let free = current & OWNER == 0;
        if free && self.word.replace(current, tid | (current & WAITERS)) {
            return Some(self.taken(tid, current & OWNER_DIED != 0));
        }
        self.end();
        None
    }

    /// Whether an owner died and nobody has taken it since.
    pub fn is_orphaned(&self) -> bool {
        self.word.load_relaxed() & OWNER_DIED != 0
    }

    /// Whether the last owner had died; `None` when the limit was reached.
    #[cold]
    fn lock_contended(
        &self,
        tid: u32,
        deadline: Option<Instant>,
        look_again: Option<Duration>,
    ) -> Option<bool> {
        let mut mine = tid;
        loop {
            let current = self.word.load_relaxed();
            if current & OWNER == 0 {
                if self.word.replace(current, mine | (current & WAITERS)) {
                    return Some(current & OWNER_DIED != 0);
                }
                continue;
            }
            assert_ne!(current & OWNER, tid, "a thread takes a mutex that it has");
            if current & WAITERS == 0 && !self.word.replace(current, current | WAITERS) {
                continue;
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let limit = left.into_iter().chain(look_again).min();
            self.word.wait(current | WAITERS, limit);
            mine = tid | WAITERS;
        }
    }

    #[cfg(not(any(loom, shuttle)))]
    fn begin(&self) -> u32 {
        let tid = robust_list::thread_id();
        robust_list::begin(&self.node);
        tid
    }

    #[cfg(not(any(loom, shuttle)))]
    fn end(&self) {
        robust_list::end();
    }

    #[cfg(not(any(loom, shuttle)))]
    fn taken(&self, tid: u32, recovered: bool) -> Locked<'_> {
        robust_list::push(&self.node);
        robust_list::end();
        Locked { mutex: self, tid, recovered, thread: PhantomData }
    }

    #[cfg(any(loom, shuttle))]
    fn begin(&self) -> u32 {
        crate::loom_model::thread_id()
    }

    #[cfg(any(loom, shuttle))]
    fn end(&self) {}

    #[cfg(any(loom, shuttle))]
    fn taken(&self, tid: u32, recovered: bool) -> Locked<'_> {
        Locked { mutex: self, tid, recovered, thread: PhantomData }
    }

    fn unlock(&self, tid: u32) {
        #[cfg(not(any(loom, shuttle)))]
        {
            robust_list::begin(&self.node);
            robust_list::remove(&self.node);
        }
        let old = self.word.swap_acq_rel(0);
        debug_assert_eq!(old & OWNER, tid, "a mutex is given up by who has it");
        if old & WAITERS != 0 {
            self.word.wake(1);
        }
        self.end();
    }
}

impl Locked<'_> {
    /// Whether the last owner died with it: what it guards may be half changed.
    pub fn recovered(&self) -> bool {
        self.recovered
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.mutex.unlock(self.tid);
    }
}
