//! A batch that its thread waits for, on a small ring of its own: it submits and
//! reaps there, and no other thread wakes up for it.
//!
//! Invariants: a ring is given up only when nothing is in flight in it; no code of
//! others runs while something is, so nothing can unwind past flights.
//!
//! Locks: the pool's, held for no system call.

use std::collections::VecDeque;
use std::io;

use uext_sync::Mutex;

use super::flight::{Flight, Landing};
use super::target::Target;
use crate::bio::{Bio, BioFlags, BioOp};
use crate::limits::QueueLimits;
use crate::split::fits;

/// Bios in the ring of a thread that waits.
pub(super) const BATCH_DEPTH: u32 = 32;
/// Bios of a batch for which such a ring has room from the start.
const BATCH_BIOS: usize = 256;
/// Rings kept for threads that wait.
const MAX_BATCH_RINGS: usize = 4;

/// A ring that one thread at a time uses.
pub(super) trait Port: Send {
    /// Adds a flight, which stays in place until its completion, to the next submission.
    fn push(&mut self, index: u32, flight: &Flight);

    /// Submits what was added, all of it, and waits for `want` completions.
    fn submit_and_wait(&mut self, want: usize);

    /// The next completion: which flight, and its bytes or negative errno.
    fn next_completion(&mut self) -> Option<(u32, i32)>;
}

/// Rings for threads that wait.
pub(super) struct BatchPool<P: Port> {
    rings: Mutex<Vec<Batch<P>>>,
    make: fn(&Target) -> io::Result<P>,
}

impl<P: Port> BatchPool<P> {
    pub(super) fn new(make: fn(&Target) -> io::Result<P>) -> Self {
        Self { rings: Mutex::default(), make }
    }

    /// Does a batch in place; `false` where a ring is not to be had.
    pub(super) fn run(&self, bios: &mut Vec<Bio>, target: &Target) -> bool {
        let kept = self.rings.lock().pop();
        let ring = match kept {
            Some(ring) => Ok(ring),
            None => (self.make)(target).map(|port| Batch::new(port, target)),
        };
        let Ok(mut ring) = ring else { return false };
        ring.run(bios, target);
        let mut rings = self.rings.lock();
        if rings.len() < MAX_BATCH_RINGS {
            rings.push(ring);
        }
        true
    }
}

struct Batch<P: Port> {
    port: P,
    flights: Box<[Flight]>,
    free: Vec<u32>,
    /// Flights that came short.
    again: Vec<u32>,
    /// Bios that wait for a place in the ring, and those that are no matter for it.
    queued: VecDeque<Bio>,
    single: Vec<Bio>,
}

impl<P: Port> Batch<P> {
    fn new(port: P, target: &Target) -> Self {
        Self {
            port,
            flights: (0..BATCH_DEPTH).map(|_| Flight::new(target)).collect(),
            free: (0..BATCH_DEPTH).rev().collect(),
            again: Vec::with_capacity(BATCH_DEPTH as usize),
            queued: VecDeque::with_capacity(BATCH_BIOS),
            single: Vec::with_capacity(BATCH_BIOS),
        }
    }

    /// Does all of the bios, in place: what is one plain step in the ring, the rest afterwards
    /// one by one.
    fn run(&mut self, bios: &mut Vec<Bio>, target: &Target) {
        for mut bio in bios.drain(..) {
            let checked = target.limits.check(&bio);
            bio.set_status(checked);
            if checked.is_ok() && is_plain(&bio, &target.limits) {
                self.queued.push_back(bio);
            } else {
                self.single.push(bio);
            }
        }
        while !(self.queued.is_empty()
            && self.again.is_empty()
            && self.free.len() == self.flights.len())
        {
            self.fill();
            let in_flight = self.flights.len() - self.free.len();
            // With more to come half is enough; the rest then overlaps with it.
            let want = if self.queued.is_empty() { in_flight } else { in_flight.div_ceil(2) };
            self.port.submit_and_wait(want);
            self.collect(target, bios);
        }
        for mut bio in self.single.drain(..) {
            if bio.status().is_ok() {
                let status = target.run(&bio);
                bio.set_status(status);
            }
            bios.push(bio);
        }
    }

    fn fill(&mut self) {
        loop {
            let index = if let Some(index) = self.again.pop() {
                index
            } else if !self.queued.is_empty()
                && let Some(index) = self.free.pop()
                && let Some(bio) = self.queued.pop_front()
            {
                self.flights[index as usize].board(bio);
                index
            } else {
                return;
            };
            self.port.push(index, &self.flights[index as usize]);
        }
    }

    fn collect(&mut self, target: &Target, done: &mut Vec<Bio>) {
        while let Some((index, result)) = self.port.next_completion() {
            match self.flights[index as usize].land(result, target) {
                Landing::Again => self.again.push(index),
                Landing::Done(mut bio, status) => {
                    self.free.push(index);
                    bio.set_status(status);
                    done.push(bio);
                }
            }
        }
    }
}

/// Whether the bio is one entry of a ring.
fn is_plain(bio: &Bio, limits: &QueueLimits) -> bool {
    matches!(bio.op(), BioOp::Read | BioOp::Write)
        && !bio.is_empty()
        && !bio.flags().contains(BioFlags::PREFLUSH)
        && fits(bio, limits)
}
