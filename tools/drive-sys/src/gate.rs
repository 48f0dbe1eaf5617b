//! A gate: closed until somebody opens it for all.
//!
//! | value | meaning |
//! |---|---|
//! | 0 | closed, nobody waits |
//! | 1 | closed, somebody may wait |
//! | 2 | open |
//!
//! A waiter marks the word before it sleeps, so opening a gate nobody waits at makes no
//! system call, and passing an open one neither. What was written before `open` is seen
//! after `pass`: the swap releases, the load acquires. The mark can't be lost: `open`'s
//! swap either finds it and wakes, or comes first, and then the waiter's exchange from 0
//! fails and it looks again.

use std::time::{Duration, Instant};

use crate::word::{Wait, Word};

const CLOSED: u32 = 0;
const AWAITED: u32 = 1;
const OPEN: u32 = 2;

/// The gate.
#[derive(Debug)]
#[repr(C)]
pub struct Gate {
    word: Word,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A closed one. So is memory that is all zero.
    pub fn new() -> Self {
        Self { word: Word::new(CLOSED) }
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.word.load_acquire() == OPEN
    }

    /// Lets all through, now and later.
    pub fn open(&self) {
        if self.word.swap_acq_rel(OPEN) == AWAITED {
            self.word.wake(u32::MAX);
        }
    }

    /// Waits until it is open.
    pub fn pass(&self) {
        self.wait(None);
    }

    /// Waits until it is open, at most for `limit`; whether it is.
    pub fn pass_within(&self, limit: Duration) -> bool {
        self.wait(Some(limit))
    }

    fn wait(&self, limit: Option<Duration>) -> bool {
        if self.is_open() {
            return true;
        }
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            match self.word.load_acquire() {
                OPEN => return true,
                CLOSED if !self.word.replace(CLOSED, AWAITED) => continue,
                _ => {}
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero())
                || self.word.wait(AWAITED, left) == Wait::TimedOut
            {
                return self.is_open();
            }
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_holds_for_the_limit_and_an_open_one_not_at_all() {
        let gate = Gate::new();
        let start = Instant::now();
        assert!(!gate.pass_within(Duration::from_millis(30)));
        assert!(start.elapsed() >= Duration::from_millis(30));
        gate.open();
        gate.pass();
        assert!(gate.pass_within(Duration::ZERO));
    }

    #[test]
    fn opening_lets_every_waiter_through() {
        let gate = Gate::new();
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..64).map(|_| scope.spawn(|| gate.pass())).collect();
            std::thread::sleep(Duration::from_millis(20));
            gate.open();
            waiters.into_iter().for_each(|waiter| waiter.join().expect("through"));
        });
    }
}
