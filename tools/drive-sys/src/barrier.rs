//! A barrier: those who meet there go on together, round after round.
//!
//! One word holds how many are `needed` (upper half) and how many have `arrived` (lower
//! half), so that an arrival and a departure for good can't miss each other; another counts
//! rounds, and is what the waiting sleep on.
//!
//! ```text
//!   arrive                                   leave (for one that died)
//!   r = load round         (acquire)         needed - 1
//!   arrived + 1            (acq_rel)         all the others there? as the last one
//!   last? arrived = 0; round + 1 (release); wake all
//!   else sleep while round == r
//! ```
//!
//! A round can't end between the first and the second step of an arrival: it needs that
//! arrival. Who arrives last has acquired all the others' arrivals, and the round's
//! increment releases them to everybody who sees it.

use std::time::Duration;

use crate::word::Word;

/// Bits of `arrived`.
const ARRIVED: u32 = 0xffff;
/// One more that is needed.
const ONE_NEEDED: u32 = 0x1_0000;

/// The barrier.
#[derive(Debug)]
#[repr(C)]
pub struct Barrier {
    state: Word,
    round: Word,
}

impl Default for Barrier {
    fn default() -> Self {
        Self::new()
    }
}

impl Barrier {
    /// The most that can meet.
    pub const MAX: usize = 0xffff;

    /// One that nobody takes part in. So is memory that is all zero.
    pub fn new() -> Self {
        Self { state: Word::new(0), round: Word::new(0) }
    }

    /// Says, before anybody arrives, how many meet.
    ///
    /// # Panics
    /// More than [`Barrier::MAX`].
    pub fn set_needed(&self, count: usize) {
        assert!(count <= Self::MAX, "{count} at one barrier");
        // Checked above.
        self.state.store_release((count as u32) << 16);
    }

    /// Waits for the others; whether this was the last to arrive. Gives up, and takes no
    /// part any more, when `stop` says so, which is asked every so often.
    pub fn arrive(&self, mut stop: impl FnMut() -> bool) -> bool {
        let round = self.round.load_acquire();
        loop {
            let state = self.state.load_relaxed();
            let last = (state & ARRIVED) + 1 >= state >> 16;
            let next = if last { state & !ARRIVED } else { state + 1 };
            if self.state.replace(state, next) {
                if last {
                    self.end_round();
                    return true;
                }
                break;
            }
        }
        while self.round.load_acquire() == round && !stop() {
            self.round.wait(round, Some(Duration::from_millis(200)));
        }
        false
    }

    /// One that is needed and has not arrived never will.
    pub fn leave(&self) {
        loop {
            let state = self.state.load_relaxed();
            let (needed, arrived) = (state >> 16, state & ARRIVED);
            if needed == 0 {
                return;
            }
            let complete = arrived > 0 && arrived >= needed - 1;
            let left = state - ONE_NEEDED;
            if self.state.replace(state, if complete { left & !ARRIVED } else { left }) {
                if complete {
                    self.end_round();
                }
                return;
            }
        }
    }

    fn end_round(&self) {
        self.round.increment_release();
        self.round.wake(u32::MAX);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn nobody_enters_a_round_before_all_have_left_the_last() {
        const THREADS: usize = 8;
        let (barrier, inside) = (Barrier::new(), AtomicUsize::new(0));
        barrier.set_needed(THREADS);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 0..2000 {
                        inside.fetch_add(1, Ordering::SeqCst);
                        barrier.arrive(|| false);
                        assert!(inside.load(Ordering::SeqCst) >= (round + 1) * THREADS);
                    }
                });
            }
        });
    }

    #[test]
    fn a_participant_that_leaves_is_not_waited_for() {
        let barrier = Barrier::new();
        barrier.set_needed(3);
        std::thread::scope(|scope| {
            let waiters: Vec<_> =
                (0..2).map(|_| scope.spawn(|| barrier.arrive(|| false))).collect();
            std::thread::sleep(Duration::from_millis(20));
            assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
            barrier.leave();
            waiters.into_iter().for_each(|waiter| assert!(!waiter.join().expect("through")));
        });
    }
}
