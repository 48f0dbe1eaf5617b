//! parking_lot's form over loom's and shuttle's primitives.
//!
//! Poison is ignored: a thread of a model that panics ends the model.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

#[cfg(loom)]
use loom as tool;
#[cfg(all(shuttle, not(loom)))]
use shuttle as tool;

pub use tool::sync::{Arc, atomic};
pub use tool::thread;

#[cfg(all(shuttle, not(loom)))]
pub use tool::thread_local;

#[cfg(loom)]
#[doc(hidden)]
pub use loom as loom_crate;

/// Loom's form does not know constant initialisers.
#[cfg(loom)]
#[macro_export]
macro_rules! thread_local {
    ($(#[$attr:meta])* $vis:vis static $name:ident: $t:ty = const { $init:expr };) => {
        $crate::loom_crate::thread_local! { $(#[$attr])* $vis static $name: $t = $init; }
    };
}

/// Mutual exclusion.
#[derive(Debug)]
pub struct Mutex<T>(tool::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A free one.
    pub fn new(value: T) -> Self {
        Self(tool::sync::Mutex::new(value))
    }

    /// Waits for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        MutexGuard { guard: Some(guard), mutex: self }
    }

    /// Takes it when it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        Some(MutexGuard { guard: Some(self.0.try_lock().ok()?), mutex: self })
    }

    /// The value, which nobody else can reach.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// A mutex that is held.
pub struct MutexGuard<'a, T> {
    /// `None` only inside a wait.
    guard: Option<tool::sync::MutexGuard<'a, T>>,
    mutex: &'a Mutex<T>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.guard.as_ref().expect("held")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_mut().expect("held")
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

/// Whether a timed wait ended without a wake-up.
#[derive(Clone, Copy, Debug)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// It did.
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

/// A condition variable.
#[derive(Debug, Default)]
pub struct Condvar(tool::sync::Condvar);

impl Condvar {
    /// One that nobody waits for.
    pub fn new() -> Self {
        Self(tool::sync::Condvar::new())
    }

    /// Gives the mutex up, waits for a wake-up, and takes the mutex again.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.guard.take().expect("held");
        guard.guard = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    /// Gives the mutex up for a moment and says that the limit was reached.
    pub fn wait_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        _limit: time::Duration,
    ) -> WaitTimeoutResult {
        drop(guard.guard.take());
        thread::yield_now();
        guard.guard = guard.mutex.lock().guard;
        WaitTimeoutResult(true)
    }

    /// As [`Condvar::wait_for`].
    pub fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        _deadline: time::Instant,
    ) -> WaitTimeoutResult {
        self.wait_for(guard, time::Duration::ZERO)
    }

    /// Wakes one.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// A lock for many readers or one writer.
#[derive(Debug)]
pub struct RwLock<T>(tool::sync::RwLock<T>);

/// It is held for reading.
pub type RwLockReadGuard<'a, T> = tool::sync::RwLockReadGuard<'a, T>;
/// It is held for writing.
pub type RwLockWriteGuard<'a, T> = tool::sync::RwLockWriteGuard<'a, T>;

impl<T> RwLock<T> {
    /// A free one.
    pub fn new(value: T) -> Self {
        Self(tool::sync::RwLock::new(value))
    }

    /// Waits for writers.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes it when nobody writes.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        self.0.try_read().ok()
    }

    /// Takes it when nobody has it.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        self.0.try_write().ok()
    }

    /// The value, which nobody else can reach.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// A reader-writer lock without data.
pub mod raw {
    use std::sync::OnceLock;

    use super::{Condvar, Mutex};

    #[derive(Default)]
    struct Inner {
        /// How many readers; -1: a writer.
        users: Mutex<i32>,
        freed: Condvar,
    }

    /// The lock, with the methods of lock_api's traits.
    pub struct RawRwLock(OnceLock<Inner>);

    impl RawRwLock {
        /// A free one.
        #[allow(clippy::declare_interior_mutable_const, reason = "lock_api's form")]
        pub const INIT: Self = Self(OnceLock::new());

        fn inner(&self) -> &Inner {
            self.0.get_or_init(Inner::default)
        }

        /// Waits for a writer that holds it, not for one that waits.
        pub fn lock_shared_recursive(&self) {
            let inner = self.inner();
            let mut users = inner.users.lock();
            while *users < 0 {
                inner.freed.wait(&mut users);
            }
            *users += 1;
        }

        /// Waits for all.
        pub fn lock_exclusive(&self) {
            let inner = self.inner();
            let mut users = inner.users.lock();
            while *users != 0 {
                inner.freed.wait(&mut users);
            }
            *users = -1;
        }

        /// Takes it when nobody has it.
        pub fn try_lock_exclusive(&self) -> bool {
            let mut users = self.inner().users.lock();
            let free = *users == 0;
            if free {
                *users = -1;
            }
            free
        }

        /// Gives it up.
        ///
        /// # Safety
        /// It is held shared. (Nothing of this type depends on it, what it guards does.)
        pub unsafe fn unlock_shared(&self) {
            let mut users = self.inner().users.lock();
            assert!(*users > 0, "a lock was given up that was not held shared");
            *users -= 1;
            if *users == 0 {
                self.inner().freed.notify_all();
            }
        }

        /// Gives it up.
        ///
        /// # Safety
        /// It is held exclusively. (Nothing of this type depends on it, what it guards does.)
        pub unsafe fn unlock_exclusive(&self) {
            let mut users = self.inner().users.lock();
            assert_eq!(*users, -1, "a lock was given up that was not held exclusively");
            *users = 0;
            self.inner().freed.notify_all();
        }
    }
}

/// A clock that moves only when somebody looks at it, so that a schedule that failed
/// fails again.
pub mod time {
    use std::ops::{Add, Sub};
    use std::sync::atomic::{AtomicU64, Ordering};

    pub use std::time::Duration;

    /// A moment.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        /// A millisecond after the last look.
        pub fn now() -> Self {
            // Far from its beginning, so that there is a moment before any.
            // WHY-RELAXED: only rising numbers are wanted.
            static MILLIS: AtomicU64 = AtomicU64::new(1 << 40);
            Self(Duration::from_millis(MILLIS.fetch_add(1, Ordering::Relaxed)))
        }

        /// How long ago it was.
        pub fn elapsed(&self) -> Duration {
            Self::now().saturating_duration_since(*self)
        }

        /// Since an earlier moment.
        pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
            self.0.saturating_sub(earlier.0)
        }

        /// A later moment.
        pub fn checked_add(&self, by: Duration) -> Option<Self> {
            self.0.checked_add(by).map(Self)
        }

        /// An earlier moment.
        pub fn checked_sub(&self, by: Duration) -> Option<Self> {
            self.0.checked_sub(by).map(Self)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;
        fn add(self, by: Duration) -> Self {
            Self(self.0 + by)
        }
    }

    impl Sub<Self> for Instant {
        type Output = Duration;
        fn sub(self, other: Self) -> Duration {
            self.0 - other.0
        }
    }
}
