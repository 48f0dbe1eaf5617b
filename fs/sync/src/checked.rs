//! parking_lot's locks with their order looked at: see [`lockdep`](crate::lockdep).

use std::any::type_name;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

pub use parking_lot::WaitTimeoutResult;

use crate::lockdep::{Class, Held};

/// Mutual exclusion.
#[derive(Debug)]
pub struct Mutex<T> {
    class: Class,
    inner: parking_lot::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A free one.
    #[track_caller]
    pub fn new(value: T) -> Self {
        Self { class: Class::new(type_name::<T>()), inner: parking_lot::Mutex::new(value) }
    }

    /// Waits for it.
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.class.acquire();
        MutexGuard { guard: self.inner.lock(), _held: held }
    }

    /// Takes it when it is free.
    #[track_caller]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let guard = self.inner.try_lock()?;
        Some(MutexGuard { guard, _held: self.class.acquired() })
    }

    /// The value, which nobody else can reach.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }

    /// The value.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: Default> Default for Mutex<T> {
    #[track_caller]
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// A mutex that is held.
#[derive(Debug)]
#[must_use]
pub struct MutexGuard<'a, T> {
    guard: parking_lot::MutexGuard<'a, T>,
    _held: Held,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// A condition variable. While a thread waits it does nothing else, so its mutex counts
/// as held.
#[derive(Debug, Default)]
pub struct Condvar(parking_lot::Condvar);

impl Condvar {
    /// One that nobody waits for.
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    /// Gives the mutex up, waits for a wake-up, and takes the mutex again.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.0.wait(&mut guard.guard);
    }

    /// As [`Condvar::wait`], at most so long.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Duration) -> WaitTimeoutResult {
        self.0.wait_for(&mut guard.guard, limit)
    }

    /// As [`Condvar::wait`], not after the deadline.
    pub fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        deadline: Instant,
    ) -> WaitTimeoutResult {
        self.0.wait_until(&mut guard.guard, deadline)
    }

    /// Wakes one.
    pub fn notify_one(&self) -> bool {
        self.0.notify_one()
    }

    /// Wakes all.
    pub fn notify_all(&self) -> usize {
        self.0.notify_all()
    }
}

/// A lock for many readers or one writer.
#[derive(Debug)]
pub struct RwLock<T> {
    class: Class,
    inner: parking_lot::RwLock<T>,
}

impl<T> RwLock<T> {
    /// A free one.
    #[track_caller]
    pub fn new(value: T) -> Self {
        Self { class: Class::new(type_name::<T>()), inner: parking_lot::RwLock::new(value) }
    }

    /// Waits for writers.
    #[track_caller]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        let held = self.class.acquire();
        RwLockReadGuard { guard: self.inner.read(), _held: held }
    }

    /// Waits for all.
    #[track_caller]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        let held = self.class.acquire();
        RwLockWriteGuard { guard: self.inner.write(), _held: held }
    }

    /// Takes it when nobody writes.
    #[track_caller]
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        let guard = self.inner.try_read()?;
        Some(RwLockReadGuard { guard, _held: self.class.acquired() })
    }

    /// Takes it when nobody has it.
    #[track_caller]
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        let guard = self.inner.try_write()?;
        Some(RwLockWriteGuard { guard, _held: self.class.acquired() })
    }

    /// The value, which nobody else can reach.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }

    /// The value.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: Default> Default for RwLock<T> {
    #[track_caller]
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// It is held for reading.
#[derive(Debug)]
#[must_use]
pub struct RwLockReadGuard<'a, T> {
    guard: parking_lot::RwLockReadGuard<'a, T>,
    _held: Held,
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

/// It is held for writing.
#[derive(Debug)]
#[must_use]
pub struct RwLockWriteGuard<'a, T> {
    guard: parking_lot::RwLockWriteGuard<'a, T>,
    _held: Held,
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}
