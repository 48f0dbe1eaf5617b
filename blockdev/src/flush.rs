//! The flush state machine: PREFLUSH, then data, then FUA or a flush afterwards.
//!
//! ```text
//!   bio ── PREFLUSH? ──▶ flush ──▶ data ── FUA, which the device lacks? ──▶ flush ──▶ end_io
//!                          │ failed  │ failed                                 │ failed
//!                          └─────────┴───────────────▶ end_io(error) ◀────────┘
//! ```
//!
//! Invariants:
//! - No step starts before the one before it has completed well, all its pieces
//!   included, so a short or failed piece can't let a flush overtake it.
//! - The bio ends well only when each step has; a failed flush is an error of the bio.
//! - On a device without a volatile cache all of this is nothing, and a flush
//!   completes at once.
//!
//! Locks: none.

use std::iter::once;
use std::sync::Arc;

use crate::bio::{Bio, BioFlags, BioOp};
use crate::limits::QueueLimits;
use crate::split::{fits, split};

/// A device below the machine. It gets only bios that passed the limits' check, fit
/// into one request, carry no PREFLUSH, and FUA only where the device has it.
pub trait SimpleQueue: Send + Sync {
    /// What the device can take.
    fn limits(&self) -> &QueueLimits;

    /// Takes bios and completes each once. The iterator must be run without locks.
    fn submit_simple(&self, bios: &mut dyn Iterator<Item = Bio>);
}

/// Submits any bios that passed the limits' check. Those that are one step go down
/// in one batch.
pub fn submit(queue: &Arc<dyn SimpleQueue>, bios: &mut dyn Iterator<Item = Bio>) {
    queue.submit_simple(&mut bios.filter_map(|bio| start(queue, bio)));
}

/// Begins a bio of several steps; gives back one that is a single step.
fn start(queue: &Arc<dyn SimpleQueue>, bio: Bio) -> Option<Bio> {
    let limits = queue.limits();
    if !limits.write_cache {
        return start_uncached(queue, bio);
    }
    if bio.op() == BioOp::Flush {
        return Some(bio);
    }
    let pre = bio.op() == BioOp::Write && bio.flags().contains(BioFlags::PREFLUSH);
    if bio.is_empty() && !pre {
        bio.end_io(Ok(()));
        return None;
    }
    if !pre {
        return start_data(queue, bio);
    }
    preflush(queue.clone(), bio);
    None
}

/// Without a cache only the data counts.
fn start_uncached(queue: &Arc<dyn SimpleQueue>, bio: Bio) -> Option<Bio> {
    if bio.is_empty() {
        bio.end_io(Ok(()));
        return None;
    }
    let durable = BioFlags::PREFLUSH | BioFlags::FUA;
    let bio = if bio.flags().intersects(durable) { without(bio, durable) } else { bio };
    send(queue, bio)
}

fn preflush(queue: Arc<dyn SimpleQueue>, bio: Bio) {
    let mut flush = Bio::flush();
    let next = queue.clone();
    flush.set_end_io(move |flush| match flush.status() {
        Err(status) => bio.end_io(Err(status)),
        Ok(()) if bio.is_empty() => bio.end_io(Ok(())),
        Ok(()) => {
            let bio = without(bio, BioFlags::PREFLUSH);
            if let Some(bio) = start_data(&next, bio) {
                next.submit_simple(&mut once(bio));
            }
        }
    });
    queue.submit_simple(&mut once(flush));
}

/// The data and what comes after it; gives back a bio that is a single step.
fn start_data(queue: &Arc<dyn SimpleQueue>, bio: Bio) -> Option<Bio> {
    let limits = queue.limits();
    let fua = bio.op() == BioOp::Write && bio.flags().contains(BioFlags::FUA);
    // Many durable pieces cost a cache flush each; one flush behind them does.
    if !fua || (limits.fua && fits(&bio, limits)) {
        return send(queue, bio);
    }
    let mut data = without(bio, BioFlags::FUA);
    let owner = data.take_end_io();
    let next = queue.clone();
    data.set_end_io(move |mut data| {
        data.restore_end_io(owner);
        match data.status() {
            Err(status) => data.end_io(Err(status)),
            Ok(()) => postflush(&next, data),
        }
    });
    send(queue, data)
}

fn postflush(queue: &Arc<dyn SimpleQueue>, bio: Bio) {
    let mut flush = Bio::flush();
    flush.set_end_io(move |flush| bio.end_io(flush.status()));
    queue.submit_simple(&mut once(flush));
}

/// Splits what is too large; gives back what is not.
fn send(queue: &Arc<dyn SimpleQueue>, bio: Bio) -> Option<Bio> {
    if fits(&bio, queue.limits()) {
        return Some(bio);
    }
    queue.submit_simple(&mut split(bio, queue.limits()).into_iter());
    None
}

/// The bio without these flags until it ends; its owner gets it back with them.
fn without(mut bio: Bio, flags: BioFlags) -> Bio {
    let before = bio.flags();
    let owner = bio.take_end_io();
    bio.set_flags(before - flags);
    bio.set_end_io(move |mut bio| {
        bio.set_flags(before);
        bio.restore_end_io(owner);
        let status = bio.status();
        bio.end_io(status);
    });
    bio
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use uext_sync::Mutex;

    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::bio::BioVec;
    use crate::status::{BlkResult, BlkStatus};
    use crate::units::Sector;

    /// Keeps what comes until the test ends it.
    struct Held {
        limits: QueueLimits,
        bios: Mutex<Vec<Bio>>,
    }

    impl SimpleQueue for Held {
        fn limits(&self) -> &QueueLimits {
            &self.limits
        }
        fn submit_simple(&self, bios: &mut dyn Iterator<Item = Bio>) {
            for bio in bios {
                assert!(!bio.flags().contains(BioFlags::PREFLUSH));
                assert!(self.limits.fua || !bio.flags().contains(BioFlags::FUA));
                self.bios.lock().push(bio);
            }
        }
    }

    impl Held {
        /// The one held bio: its operation and whether it is FUA.
        fn only(&self) -> (BioOp, bool) {
            let bios = self.bios.lock();
            assert_eq!(bios.len(), 1, "{bios:?}");
            (bios[0].op(), bios[0].flags().contains(BioFlags::FUA))
        }
        fn end(&self, status: BlkResult<()>) {
            let bio = self.bios.lock().remove(0);
            bio.end_io(status);
        }
        fn is_idle(&self) -> bool {
            self.bios.lock().is_empty()
        }
    }

    fn held(write_cache: bool, fua: bool) -> (Arc<Held>, Arc<dyn SimpleQueue>) {
        let mut limits = QueueLimits::new(Sector(1000));
        limits.write_cache = write_cache;
        limits.fua = fua;
        limits.max_bytes = 4096;
        let held = Arc::new(Held { limits, bios: Mutex::default() });
        (held.clone(), held)
    }

    fn write(queue: &Arc<dyn SimpleQueue>, bytes: usize) -> Receiver<(BlkResult<()>, BioFlags)> {
        let (send, recv) = channel();
        let flags = BioFlags::PREFLUSH | BioFlags::FUA;
        let mut bio = Bio::new(BioOp::Write, flags, Sector(8));
        if bytes > 0 {
            bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::new(bytes))));
        }
        bio.set_end_io(move |bio| send.send((bio.status(), bio.flags())).expect("a receiver"));
        submit(queue, &mut once(bio));
        recv
    }

    const BOTH: BioFlags = BioFlags::PREFLUSH.union(BioFlags::FUA);

    #[test]
    fn a_device_with_fua_gets_flush_then_durable_data() {
        let (held, queue) = held(true, true);
        let done = write(&queue, 4096);
        assert_eq!(held.only(), (BioOp::Flush, false));
        held.end(Ok(()));
        assert_eq!(held.only(), (BioOp::Write, true));
        held.end(Ok(()));
        assert_eq!(done.try_recv(), Ok((Ok(()), BOTH)));
        assert!(held.is_idle());
    }

    #[test]
    fn a_device_without_fua_gets_a_flush_behind_the_data() {
        let (held, queue) = held(true, false);
        let done = write(&queue, 4096);
        held.end(Ok(()));
        assert_eq!(held.only(), (BioOp::Write, false));
        held.end(Ok(()));
        assert_eq!(held.only(), (BioOp::Flush, false));
        assert!(done.try_recv().is_err(), "not before the flush");
        held.end(Ok(()));
        assert_eq!(done.try_recv(), Ok((Ok(()), BOTH)));
    }

    #[test]
    fn a_failed_step_ends_the_bio_and_starts_no_other() {
        for failing in 0..3 {
            let (held, queue) = held(true, false);
            let done = write(&queue, 4096);
            for _ in 0..failing {
                held.end(Ok(()));
            }
            held.end(Err(BlkStatus::Gone));
            assert_eq!(done.try_recv(), Ok((Err(BlkStatus::Gone), BOTH)), "step {failing}");
            assert!(held.is_idle(), "step {failing}");
        }
    }

    #[test]
    fn the_flush_waits_for_every_piece_and_a_failed_piece_is_not_forgotten() {
        for last in [Ok(()), Err(BlkStatus::IoErr)] {
            let (held, queue) = held(true, true);
            let done = write(&queue, 3 * 4096);
            held.end(Ok(()));
            assert_eq!(held.bios.lock().len(), 3);
            held.end(last);
            held.end(Ok(()));
            assert_eq!(held.only(), (BioOp::Write, false));
            held.end(Ok(()));
            if last.is_ok() {
                assert_eq!(held.only(), (BioOp::Flush, false));
                held.end(Ok(()));
            }
            assert_eq!(done.try_recv(), Ok((last, BOTH)));
            assert!(held.is_idle());
        }
    }

    #[test]
    fn an_empty_preflush_is_a_flush() {
        let (held, queue) = held(true, true);
        let done = write(&queue, 0);
        assert_eq!(held.only(), (BioOp::Flush, false));
        held.end(Err(BlkStatus::IoErr));
        assert_eq!(done.try_recv(), Ok((Err(BlkStatus::IoErr), BOTH)));
    }

    #[test]
    fn without_a_cache_only_the_data_is_sent() {
        let (held, queue) = held(false, false);
        let done = write(&queue, 4096);
        assert_eq!(held.only(), (BioOp::Write, false));
        held.end(Ok(()));
        assert_eq!(done.try_recv(), Ok((Ok(()), BOTH)));
    }
}
