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

    /// Does a batch, or gives it back where a ring isn't worth it or not to be had.
    pub(super) fn run(&self, bios: Vec<Bio>, target: &Target) -> Result<Vec<Bio>, Vec<Bio>> {
        if bios.len() < 2 {
            return Err(bios);
        }
        let kept = self.rings.lock().pop();
        let ring = match kept {
            Some(ring) => Ok(ring),
            None => (self.make)(target).map(|port| Batch::new(port, target)),
        };
        let Ok(mut ring) = ring else { return Err(bios) };
        let done = ring.run(bios, target);
        let mut rings = self.rings.lock();
        if rings.len() < MAX_BATCH_RINGS {
            rings.push(ring);
        }
        Ok(done)
    }
}

struct Batch<P: Port> {
    port: P,
    flights: Box<[Flight]>,
    free: Vec<u32>,
}

impl<P: Port> Batch<P> {
    fn new(port: P, target: &Target) -> Self {
        Self {
            port,
            flights: (0..BATCH_DEPTH).map(|_| Flight::new(target)).collect(),
            free: (0..BATCH_DEPTH).rev().collect(),
        }
    }

    /// Does all of the bios: what is one plain step in the ring, the rest afterwards
    /// one by one.
    fn run(&mut self, bios: Vec<Bio>, target: &Target) -> Vec<Bio> {
        let mut done = Vec::with_capacity(bios.len());
        let mut single = Vec::new();
        let mut queued = VecDeque::with_capacity(bios.len());
        for mut bio in bios {
            if let Err(status) = target.limits.check(&bio) {
                bio.set_status(Err(status));
                done.push(bio);
            } else if is_plain(&bio, &target.limits) {
                queued.push_back(bio);
            } else {
                single.push(bio);
            }
        }
        let mut again = Vec::new();
        while !(queued.is_empty() && again.is_empty() && self.free.len() == self.flights.len()) {
            self.fill(&mut queued, &mut again);
            let in_flight = self.flights.len() - self.free.len();
            // With more to come half is enough; the rest then overlaps with it.
            let want = if queued.is_empty() { in_flight } else { in_flight.div_ceil(2) };
            self.port.submit_and_wait(want);
            self.collect(target, &mut again, &mut done);
        }
        for mut bio in single {
            let status = target.run(&bio);
            bio.set_status(status);
            done.push(bio);
        }
        done
    }

    fn fill(&mut self, queued: &mut VecDeque<Bio>, again: &mut Vec<u32>) {
        loop {
            let index = if let Some(index) = again.pop() {
                index
            } else if !queued.is_empty()
                && let Some(index) = self.free.pop()
                && let Some(bio) = queued.pop_front()
            {
                self.flights[index as usize].board(bio);
                index
            } else {
                return;
            };
            self.port.push(index, &self.flights[index as usize]);
        }
    }

    fn collect(&mut self, target: &Target, again: &mut Vec<u32>, done: &mut Vec<Bio>) {
        while let Some((index, result)) = self.port.next_completion() {
            match self.flights[index as usize].land(result, target) {
                Landing::Again => again.push(index),
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
