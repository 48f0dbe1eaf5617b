//! Waiting for a batch of bios without an allocation.
//!
//! A [`Waiter`] is the `end_io` of a whole batch. It keeps the array in which finished bios
//! gather, so whoever keeps a waiter waits for the second batch of a size for free.
//!
//! Locks: `state`, a leaf.

use std::sync::Arc;

use uext_sync::{Condvar, Mutex};

use crate::bio::{Bio, BioEndIo};
use crate::device::BlockDevice;

/// Takes the finished bios of one batch at a time.
pub(crate) struct Waiter {
    state: Mutex<State>,
    all: Condvar,
}

#[derive(Default)]
struct State {
    pending: usize,
    ended: Vec<Bio>,
}

impl Waiter {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::default()), all: Condvar::new() })
    }

    /// Submits the bios of `batch`, in place of whose `end_io` the calling thread waits; each
    /// comes back with its status, in no particular order. One batch at a time.
    pub(crate) fn run<D: BlockDevice + ?Sized>(self: &Arc<Self>, dev: &D, batch: &mut Vec<Bio>) {
        {
            let mut state = self.state.lock();
            debug_assert!(state.pending == 0, "one batch at a time");
            state.pending = batch.len();
            state.ended.reserve(batch.len());
        }
        for bio in batch.iter_mut() {
            drop(bio.take_end_io());
            bio.set_end_io_shared(self.clone());
        }
        dev.submit_drain(batch);
        let mut state = self.state.lock();
        while state.pending > 0 {
            self.all.wait(&mut state);
        }
        batch.clear();
        std::mem::swap(batch, &mut state.ended);
    }
}

impl BioEndIo for Waiter {
    fn end_io(&self, bio: Bio) {
        let mut state = self.state.lock();
        state.ended.push(bio);
        state.pending -= 1;
        if state.pending == 0 {
            self.all.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::bio::{BioFlags, BioOp, BioVec};
    use crate::memory::MemoryDevice;
    use crate::units::Sector;

    #[test]
    fn a_batch_comes_back_whole_and_its_array_is_kept() {
        let dev = MemoryDevice::new(1 << 20);
        let waiter = Waiter::new();
        let mut batch = Vec::with_capacity(8);
        for round in 0..3u64 {
            for n in 0..8 {
                let sector = Sector(if n == 5 { 1 << 40 } else { n * 8 });
                let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), sector);
                bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&[1; 512]))));
                bio.set_private(round * 8 + n);
                batch.push(bio);
            }
            waiter.run(&*dev, &mut batch);
            let mut numbers: Vec<u64> = batch.iter().map(Bio::private).collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (round * 8..round * 8 + 8).collect::<Vec<_>>());
            assert_eq!(batch.iter().filter(|bio| bio.status().is_err()).count(), 1);
            batch.clear();
            assert!(batch.capacity() >= 8);
        }
    }
}
