//! The memory in which clients and coordinator meet: gates, the barrier, mutexes and counts.
//!
//! ```text
//!   0       start gate, stop gate, barrier, each at a line of its own
//!   1 KiB   numbers (see the constants)
//!   4 KiB   mutexes of slots and blocks
//!   ...     counts of operations (`stats`)
//! ```
//!
//! Locks: a thread takes the mutexes of one batch in the order of their places, and none
//! while it has others.

use std::os::fd::OwnedFd;
use std::{io, ops::Range};

use smallvec::SmallVec;
use uext_drive_sys::{Barrier, Gate, Locked, Mapping, RobustMutex};
use uext_sync::atomic::{AtomicU64, Ordering};

use super::stats;

/// Mutexes.
const MUTEXES: usize = 1 << 14;
const NUMBERS_AT: usize = 1024;
const MUTEXES_AT: usize = 4096;
const COUNTS_AT: usize = MUTEXES_AT + MUTEXES * size_of::<RobustMutex>();
const LEN: usize = COUNTS_AT + stats::LEN * 8;

/// A number that all share.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// Workers that are still at work.
    Running,
    /// Steps done.
    Steps,
    /// Blocks that were read and verified.
    Verified,
    /// Mutexes taken over from an owner that died.
    Recovered,
    /// Nanoseconds of the clock (CLOCK_MONOTONIC) at which the run began.
    Began,
    /// What went wrong with the data.
    Findings,
    /// Errors by number begin here; the last place is for all above.
    Errors,
}

/// Places for errors.
const ERRORS: usize = 140;

/// The memory.
#[derive(Debug)]
pub struct Control {
    mapping: Mapping,
}

impl Control {
    /// A new one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let (mapping, fd) = Mapping::anonymous("uext-drive-control", LEN)?;
        Ok((Self { mapping }, fd))
    }

    /// The coordinator's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(fd: &OwnedFd) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::of(fd, LEN)? })
    }

    /// Opens when all are ready.
    pub fn start(&self) -> &Gate {
        &self.mapping.slice(0, 1)[0]
    }

    /// Opens when all should end.
    pub fn stop(&self) -> &Gate {
        &self.mapping.slice(64, 1)[0]
    }

    /// Between phases.
    pub fn barrier(&self) -> &Barrier {
        &self.mapping.slice(128, 1)[0]
    }

    /// Counts of operations.
    pub fn counts(&self) -> &[AtomicU64] {
        self.mapping.slice(COUNTS_AT, stats::LEN)
    }

    fn numbers(&self) -> &[AtomicU64] {
        self.mapping.slice(NUMBERS_AT, 16 + ERRORS)
    }

    /// A number's value.
    pub fn get(&self, number: Number) -> u64 {
        // WHY-RELAXED: counts for showing, or set before a gate opens, which orders them.
        self.numbers()[number as usize].load(Ordering::Relaxed)
    }

    /// Adds to a number, with wrap-around; what it was.
    pub fn add(&self, number: Number, by: u64) -> u64 {
        // WHY-RELAXED: as for `get`.
        self.numbers()[number as usize].fetch_add(by, Ordering::Relaxed)
    }

    /// Counts an error.
    pub fn count_error(&self, errno: i32) {
        let place = usize::try_from(errno).unwrap_or(0).min(ERRORS - 1);
        // WHY-RELAXED: a count for showing.
        self.numbers()[Number::Errors as usize + place].fetch_add(1, Ordering::Relaxed);
    }

    /// Errors that were counted, by number.
    pub fn errors(&self) -> Vec<(i32, u64)> {
        let places = &self.numbers()[Number::Errors as usize..];
        // WHY-RELAXED: a count for showing.
        let counts = places[..ERRORS].iter().map(|count| count.load(Ordering::Relaxed));
        // At most 140.
        counts.enumerate().filter(|(_, n)| *n > 0).map(|(e, n)| (e as i32, n)).collect()
    }

    fn mutexes(&self) -> &[RobustMutex] {
        self.mapping.slice(MUTEXES_AT, MUTEXES)
    }

    /// Takes the mutexes of pieces of a slot.
    pub fn lock(&self, slot: usize, pieces: impl Iterator<Item = usize>) -> Held<'_> {
        let place = |piece: usize| {
            let mixed = (slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ piece as u64;
            // Less than their number.
            (mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as usize % MUTEXES
        };
        let mut places: SmallVec<[usize; 8]> = pieces.map(place).collect();
        places.sort_unstable();
        places.dedup();
        let mut held = Held(SmallVec::new());
        for place in places {
            let locked = self.mutexes()[place].lock();
            if locked.recovered() {
                self.add(Number::Recovered, 1);
            }
            held.0.push(locked);
        }
        held
    }

    /// Recovers the mutexes that nobody has taken since their owner died; how many.
    pub fn recover(&self) -> u64 {
        let orphans = self.mutexes().iter().filter(|mutex| mutex.is_orphaned());
        let taken = orphans.filter_map(RobustMutex::try_lock);
        let recovered = taken.filter(Locked::recovered).count() as u64;
        self.add(Number::Recovered, recovered);
        recovered
    }
}

/// Mutexes that are held.
#[derive(Debug)]
pub struct Held<'a>(SmallVec<[Locked<'a>; 8]>);

/// Shares `total` among workers as evenly as can be: the share of one.
pub fn share(total: u64, workers: usize, worker: usize) -> u64 {
    let workers = workers as u64;
    total / workers + u64::from((worker as u64) < total % workers)
}

/// The pieces, of so many blocks each, that a range of blocks touches.
pub fn pieces(blocks: Range<usize>, per_piece: usize) -> Range<usize> {
    blocks.start / per_piece..blocks.end.div_ceil(per_piece)
}
