//! Looking for the next request for a moment, before sleeping until it comes.
//!
//! A program that works through files sends its next request some microseconds after an answer.
//! A worker that sleeps meanwhile lets its CPU halt, and waking a CPU takes several times as long
//! as what is then done, on a virtual machine above all. So a worker that has served a request
//! looks for another without blocking, for as long as [`Spin`] says.
//!
//! It gives way. Between two looks it yields; when that takes long, somebody else has work for
//! the CPU and the worker goes to sleep. Who has looked in vain looks less often, down to
//! once in [`RAREST`] requests. No more than [`Spin::new`]'s number look at a time.
//!
//! Locks: none.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A yield that takes longer has let somebody else run.
const BUSY: Duration = Duration::from_micros(20);
/// Requests between two looks when nothing is ever found.
const RAREST: u32 = 64;

/// How long the workers of a mount look, and how many do.
pub(crate) struct Spin {
    limit: Duration,
    most: usize,
    /// Workers that look.
    /// WHY-RELAXED: it bounds a number, and orders nothing.
    looking: AtomicUsize,
}

/// What a worker's looks have been worth.
#[derive(Default)]
pub(crate) struct Luck {
    /// Requests to serve before the next look.
    skip: u32,
    /// The same after the next look, when it is in vain.
    penalty: u32,
}

impl Spin {
    /// At most `most` workers look, each for `limit` at a time.
    pub fn new(limit: Duration, most: usize) -> Self {
        Self { limit, most, looking: AtomicUsize::new(0) }
    }

    /// Whether anybody ever looks.
    pub fn is_on(&self) -> bool {
        self.limit > Duration::ZERO && self.most > 0
    }

    /// Calls `look` until it finds something, time is up, or the CPU is wanted.
    pub fn until<T>(&self, luck: &mut Luck, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if luck.skip > 0 {
            luck.skip -= 1;
            return None;
        }
        if self.looking.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.looking.fetch_sub(1, Ordering::Relaxed); // WHY-RELAXED: see the field
            return None;
        }
        let begin = Instant::now();
        let mut last = begin;
        let found = loop {
            if let Some(found) = look() {
                break Some(found);
            }
            std::thread::yield_now();
            let now = Instant::now();
            if now - begin >= self.limit || now - last > BUSY {
                break None;
            }
            last = now;
        };
        self.looking.fetch_sub(1, Ordering::Relaxed); // WHY-RELAXED: see the field
        luck.learn(found.is_some());
        found
    }
}

impl Luck {
    fn learn(&mut self, found: bool) {
        self.penalty = if found { 0 } else { (self.penalty * 2 + 1).min(RAREST - 1) };
        self.skip = self.penalty;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves `requests`; how many looks there were.
    fn looks(spin: &Spin, luck: &mut Luck, requests: usize, found: bool) -> usize {
        let mut looks = 0;
        for _ in 0..requests {
            let mut looked = false;
            spin.until(luck, || {
                looked = true;
                found.then_some(())
            });
            looks += usize::from(looked);
        }
        looks
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_finds_ends_that() {
        let (spin, mut luck) = (Spin::new(Duration::from_micros(1), 1), Luck::default());
        let in_vain = looks(&spin, &mut luck, 6400, false);
        assert!((100..=110).contains(&in_vain), "{in_vain} looks");
        let rare = looks(&spin, &mut luck, 64, true);
        assert!(rare >= 1, "the next look found something");
        assert_eq!(looks(&spin, &mut luck, 100, true), 100);
    }

    #[test]
    fn no_more_than_allowed_look_at_a_time() {
        let spin = Spin::new(Duration::from_secs(1), 1);
        let inner = spin.until(&mut Luck::default(), || {
            let second = spin.until(&mut Luck::default(), || Some("a second looked"));
            Some(second)
        });
        assert_eq!(inner, Some(None));
        assert!(spin.until(&mut Luck::default(), || Some(())).is_some());
    }

    #[test]
    fn time_ends_a_look() {
        let spin = Spin::new(Duration::from_millis(2), 1);
        let begin = Instant::now();
        assert!(spin.until(&mut Luck::default(), || None::<()>).is_none());
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
