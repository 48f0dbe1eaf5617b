//! The primitives that threads meet at: parking_lot and std, or the models' own.
//!
//! With `--cfg loom` they are loom's, which tries every interleaving of a few threads
//! and every value the memory model lets a load see; with `--cfg shuttle` they are
//! shuttle's, which schedules whole subsystems at random, sequentially consistent.
//! Without either this crate only names what it re-exports and costs nothing.
//!
//! One form for all: parking_lot's. Where a lock is taken from matters more than what
//! it is, so crates import from here and never from parking_lot:
//! - [`Mutex`], [`RwLock`], [`Condvar`] and their guards;
//! - [`raw`]: a reader-writer lock without data, released by any thread;
//! - [`atomic`], for atomics that other threads decide by. Statistics, and numbers that
//!   only have to be distinct, stay std's: they would multiply a model's schedules and
//!   add nothing to them;
//! - [`time`]: a clock that stands still in a model but for one step per look;
//! - [`thread_local!`], [`thread`].
//!
//! `Arc` is std's in shuttle too. [`Arc`] of this crate is loom's in loom, which then sees
//! a leak; that one has no `Weak`.
//!
//! With debug assertions, and `UEXT_LOCKDEP` in the environment, the locks watch the
//! order in which they are taken: see [`lockdep`].
//!
//! A timed wait of a model ends at once, as if it had timed out: what depends on a
//! wake-up must not have a limit, and what has one must not need the wake-up.
#![cfg_attr(not(any(loom, shuttle)), forbid(unsafe_code))]

#[cfg(shuttle)]
pub mod explore;
#[cfg(any(loom, shuttle))]
mod model;

#[cfg(any(loom, shuttle))]
pub use model::*;

#[cfg(all(debug_assertions, not(any(loom, shuttle))))]
mod checked;
#[cfg(all(debug_assertions, not(any(loom, shuttle))))]
pub mod lockdep;
#[cfg(not(all(debug_assertions, not(any(loom, shuttle)))))]
#[path = "lockdep_off.rs"]
pub mod lockdep;

#[cfg(all(debug_assertions, not(any(loom, shuttle))))]
pub use checked::*;
#[cfg(not(any(debug_assertions, loom, shuttle)))]
pub use parking_lot::{
    Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult,
};
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::Arc;
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::atomic;
#[cfg(not(any(loom, shuttle)))]
pub use std::{thread, thread_local};

/// A reader-writer lock without data, and the traits with its methods.
#[cfg(not(any(loom, shuttle)))]
pub mod raw {
    pub use parking_lot::RawRwLock;
    pub use parking_lot::lock_api::{RawRwLock as _, RawRwLockRecursive as _};
}

/// A clock.
#[cfg(not(any(loom, shuttle)))]
pub mod time {
    pub use std::time::{Duration, Instant};
}
