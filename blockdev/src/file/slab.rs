//! The bios an asynchronous engine has taken: those in flight, and those that wait
//! for a place.
//!
//! Invariants: a flight is free, in the kernel's hands, or in `again`; bios wait only
//! while there is no free flight or nobody has pumped yet.
//!
//! Locks: `slab`, never held over an `end_io` or a system call.

use std::collections::VecDeque;
use std::thread::{self, ThreadId};

use uext_sync::{Condvar, Mutex, MutexGuard};

use super::flight::Flight;
use super::target::Target;
use crate::bio::Bio;

/// Bios that wait for a place before submitters wait.
const MAX_QUEUED: usize = 1024;

/// What an engine has taken.
pub(super) struct SlabQueue {
    slab: Mutex<Slab>,
    /// There is room in the queue again.
    room: Condvar,
}

/// The places in the kernel's ring, and who waits for one.
pub(super) struct Slab {
    /// Never grows: the kernel may have pointers into it.
    pub(super) flights: Box<[Flight]>,
    pub(super) free: Vec<u32>,
    /// Flights that came short.
    pub(super) again: Vec<u32>,
    queued: VecDeque<Bio>,
    reaper: Option<ThreadId>,
    /// The reaper sleeps, or is about to, and has seen that nothing waits: whoever adds
    /// something wakes it. For an engine whose reaper alone submits.
    pub(super) reaper_sleeps: bool,
    /// The reaper is to go when nothing is left. For the same.
    pub(super) stopping: bool,
}

impl SlabQueue {
    pub(super) fn new(target: &Target, depth: u32) -> Self {
        let slab = Slab {
            flights: (0..depth).map(|_| Flight::new(target)).collect(),
            free: (0..depth).rev().collect(),
            again: Vec::with_capacity(depth as usize),
            queued: VecDeque::with_capacity(MAX_QUEUED),
            reaper: None,
            reaper_sleeps: false,
            stopping: false,
        };
        Self { slab: Mutex::new(slab), room: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Slab> {
        self.slab.lock()
    }

    /// Says which thread completes bios: it never waits in [`SlabQueue::push`].
    pub(super) fn set_reaper(&self, reaper: ThreadId) {
        self.slab.lock().reaper = Some(reaper);
    }

    /// Takes a bio, when there is room. `pump` moves what waits into the ring.
    pub(super) fn push(&self, bio: Bio, pump: impl Fn()) {
        let me = thread::current().id();
        let mut slab = self.slab.lock();
        while slab.queued.len() >= MAX_QUEUED && slab.reaper != Some(me) {
            drop(slab);
            pump();
            slab = self.slab.lock();
            if slab.queued.len() >= MAX_QUEUED {
                self.room.wait(&mut slab);
            }
        }
        slab.queued.push_back(bio);
    }

    /// Whether the calling thread is the one that completes bios.
    pub(super) fn is_reaper(&self) -> bool {
        self.slab.lock().reaper == Some(thread::current().id())
    }

    /// Wakes submitters that wait for room.
    pub(super) fn made_room(&self) {
        self.room.notify_all();
    }
}

impl Slab {
    /// A flight that is ready to be submitted: one that came short, or a queued bio
    /// in a free place.
    pub(super) fn next_flight(&mut self) -> Option<u32> {
        if let Some(index) = self.again.pop() {
            return Some(index);
        }
        if self.queued.is_empty() {
            return None;
        }
        let index = self.free.pop()?;
        let bio = self.queued.pop_front()?;
        self.flights[index as usize].board(bio);
        Some(index)
    }

    /// Takes a bio off a flight that the kernel doesn't have.
    pub(super) fn disembark(&mut self, index: u32) -> Option<Bio> {
        self.free.push(index);
        self.flights[index as usize].disembark()
    }

    /// Whether something waits to be submitted.
    pub(super) fn has_more(&self) -> bool {
        !self.again.is_empty() || !self.queued.is_empty()
    }

    /// Whether the reaper, in the middle of its round, should submit what waits: when it
    /// is an eighth of what the kernel has. Sooner costs a system call for few bios, and
    /// later the disk runs dry; at depth 32 the whole round at once made a quarter less.
    pub(super) fn is_worth_a_call(&self) -> bool {
        let waiting = self.again.len() + self.queued.len();
        let in_flight = self.flights.len() - self.free.len() - self.again.len();
        waiting > 0 && !(self.free.is_empty() && self.again.is_empty()) && waiting * 8 >= in_flight
    }

    /// Whether the reaper is to stop, and whether it can.
    pub(super) fn is_to_stop(&self) -> (bool, bool) {
        (self.stopping, self.stopping && self.is_idle())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queued.is_empty() && self.free.len() == self.flights.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::target::Kind;
    use crate::limits::QueueLimits;
    use crate::units::Sector;

    #[test]
    fn the_reaper_submits_before_the_disk_runs_dry_and_never_without_a_place() {
        let file = tempfile::tempfile().expect("a temporary file");
        let target = Target::new(file, Kind::Image, false, QueueLimits::new(Sector(0)));
        let queue = SlabQueue::new(&target, 32);
        assert!(!queue.lock().is_worth_a_call(), "nothing waits");

        queue.push(Bio::flush(), || ());
        assert!(queue.lock().is_worth_a_call(), "the kernel has nothing");

        let mut slab = queue.lock();
        slab.free.truncate(8);
        assert!(!slab.is_worth_a_call(), "24 are in flight, one waits");
        slab.queued.extend([Bio::flush(), Bio::flush()]);
        assert!(slab.is_worth_a_call());
        let free = std::mem::take(&mut slab.free);
        assert!(!slab.is_worth_a_call(), "there is no place");
        slab.again.push(free[0]);
        assert!(slab.is_worth_a_call(), "what came short has a place");
    }
}
