//! A futex: 32 bits of memory, shared between processes, that a thread can sleep on.
//!
//! `wait(expected)` sleeps only when the word still has the value `expected`; the kernel
//! compares under the lock that `wake` takes too, so a wake-up that follows a change of
//! the value is never lost:
//!
//! ```text
//!   waiter                          waker
//!   v = load(word)                  store(word, new)
//!   wait(word, v):                  wake(word):
//!     lock queue                      lock queue
//!     word == v ? sleep : return      wake who sleeps
//! ```
//!
//! Forbidden: the waiter finds the old value and sleeps, and the waker finds nobody.
//! Whichever takes the queue first is seen by the other.
//!
//! In a model (`--cfg loom`) the queue is a mutex and a condition variable of the tool's,
//! and a wait has no limit: what is modelled must not need one.
//!
//! Orderings are in the methods' names, so that the modules that use words say them at
//! each use.

use std::time::Duration;

use uext_sync::atomic::{AtomicU32, Ordering};

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Somebody woke it, or the value had changed, or for no reason: look again.
    Look,
    /// The limit was reached.
    TimedOut,
}

/// The word.
#[derive(Debug)]
#[cfg_attr(not(any(loom, shuttle)), repr(transparent))]
pub struct Word {
    /// PAIRS-WITH: the other methods here; who meets whom is said where they are used.
    /// WHY-RELAXED: `load_relaxed` feeds a compare-exchange or a wait, which look again.
    value: AtomicU32,
    #[cfg(any(loom, shuttle))]
    queue: uext_sync::Mutex<()>,
    #[cfg(any(loom, shuttle))]
    sleepers: uext_sync::Condvar,
}

impl Word {
    /// A word with a value.
    pub fn new(value: u32) -> Self {
        Self {
            value: AtomicU32::new(value),
            #[cfg(any(loom, shuttle))]
            queue: uext_sync::Mutex::new(()),
            #[cfg(any(loom, shuttle))]
            sleepers: uext_sync::Condvar::new(),
        }
    }

    /// The value, and all that was written before it was released.
    pub fn load_acquire(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    /// The value, as a first guess.
    pub fn load_relaxed(&self) -> u32 {
        self.value.load(Ordering::Relaxed)
    }

    /// Sets it and releases all that was written before.
    pub fn store_release(&self, value: u32) {
        self.value.store(value, Ordering::Release);
    }

    /// Sets it, releases, acquires, and gives what it was.
    pub fn swap_acq_rel(&self, value: u32) -> u32 {
        self.value.swap(value, Ordering::AcqRel)
    }

    /// Adds one, with wrap-around, and releases.
    pub fn increment_release(&self) {
        self.value.fetch_add(1, Ordering::Release);
    }

    /// Sets `new` when it is `current`; acquires and releases when it did. May fail for no
    /// reason where `spurious` failure is the processor's way.
    pub fn replace(&self, current: u32, new: u32) -> bool {
        self.value.compare_exchange(current, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Sleeps while the word is `expected`, at most for `limit`.
    #[cfg(not(any(loom, shuttle)))]
    pub fn wait(&self, expected: u32, limit: Option<Duration>) -> Wait {
        use rustix::io::Errno;
        use rustix::thread::futex::{self, Flags, Timespec};

        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        // Not PRIVATE: the waker may be another process.
        match futex::wait(&self.value, Flags::empty(), expected, limit.as_ref()) {
            Err(Errno::TIMEDOUT) => Wait::TimedOut,
            // A signal, a value that changed, a wake-up: all mean to look again.
            Ok(()) | Err(Errno::AGAIN | Errno::INTR) => Wait::Look,
            Err(error) => panic!("futex wait: {error}"),
        }
    }

    /// Wakes up to `count` sleepers.
    #[cfg(not(any(loom, shuttle)))]
    pub fn wake(&self, count: u32) {
        use rustix::thread::futex::{self, Flags};
        // The kernel's count is signed.
        let woken = futex::wake(&self.value, Flags::empty(), count.min(i32::MAX as u32));
        debug_assert!(woken.is_ok(), "futex wake: {woken:?}");
    }

    /// The model's: sleeps while the word is `expected`.
    #[cfg(any(loom, shuttle))]
    pub fn wait(&self, expected: u32, _limit: Option<Duration>) -> Wait {
        let mut queue = self.queue.lock();
        if self.value.load(Ordering::Relaxed) == expected {
            self.sleepers.wait(&mut queue);
        }
        Wait::Look
    }

    /// The model's: wakes up to `count` sleepers.
    #[cfg(any(loom, shuttle))]
    pub fn wake(&self, count: u32) {
        let _queue = self.queue.lock();
        match count {
            1 => self.sleepers.notify_one(),
            _ => self.sleepers.notify_all(),
        }
    }
}
