//! The io_uring engine.
//!
//! Threads that don't wait put their bios into one ring, as many as there are with
//! one system call, and a reaper thread completes them. A thread that waits for a
//! batch takes a small ring of its own from a pool, submits and reaps there, and
//! no other thread wakes up for it.
//!
//! What would block in the kernel's own workers goes to threads of the sync engine:
//! flushes, above all, of which a whole sequence (PREFLUSH, data, FUA) is then one
//! hand-over and not three.
//!
//! The bound: [`DEPTH`] bios in the ring and those that wait in the [`SlabQueue`]; a
//! submitter that comes then waits, except an `end_io` in the reaper, which must
//! not. No SQPOLL: on few cores its thread takes the time of those that work. No
//! COOP_TASKRUN on the shared ring: completions are posted in the context of the
//! submitting thread, which may compute for long before its next system call.
//!
//! No fixed buffers either: a bio's pages are scattered, the kernel has had a vectored
//! request on registered memory only since 6.15, and what it would save (finding the
//! pages, 2 % of a request at most) is not to be seen beside a disk. No DEFER_TASKRUN,
//! which binds a ring to one thread: threads that wait share a pool of rings.
//!
//! Invariants:
//! - Each flight in the ring has one entry at a time, and the ring has an entry for
//!   each flight and one to stop, so neither queue can overflow.
//! - A ring is given up only when nothing is in flight in it.
//!
//! Locks, outermost first: `sq` (the submission queue and its system call), the slab.
//! Neither is held over an `end_io`, or while waiting for a completion.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, opcode};
use uext_sync::{Mutex, MutexGuard};

use super::EngineQueue;
use super::batch::{BATCH_DEPTH, BatchPool, Port};
use super::engine_sync::{HELPERS, SyncEngine};
use super::flight::{Flight, Landing};
use super::slab::SlabQueue;
use super::target::Target;
use crate::bio::Bio;
use crate::flush::{self, SimpleQueue};
use crate::limits::QueueLimits;
use crate::status::BlkResult;

/// Bios in the shared ring.
const DEPTH: u32 = 128;
/// The user data of the entry that stops the reaper.
const STOP: u64 = u64::MAX;

pub(super) struct UringEngine {
    ring: Arc<SharedRing>,
    queue: Arc<dyn SimpleQueue>,
    reaper: Option<JoinHandle<()>>,
    batches: BatchPool<RingPort>,
}

struct SharedRing {
    ring: IoUring,
    target: Arc<Target>,
    /// Does what io_uring can't, or not well.
    helper: SyncEngine,
    /// Held by who fills the submission queue or submits it.
    sq: Mutex<()>,
    taken: SlabQueue,
}

impl UringEngine {
    /// # Errors
    /// When the kernel has no io_uring, or doesn't let us have one.
    pub(super) fn new(target: Arc<Target>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_submit_all().build(DEPTH + 1)?;
        ring.submitter().register_files(&[target.fd()])?;
        let ring = Arc::new(SharedRing {
            ring,
            helper: SyncEngine::new(target.clone(), HELPERS),
            taken: SlabQueue::new(&target, DEPTH),
            target,
            sq: Mutex::new(()),
        });
        let shared = ring.clone();
        let reaper =
            thread::Builder::new().name("blk-uring".into()).spawn(move || shared.reap())?;
        ring.taken.set_reaper(reaper.thread().id());
        let queue = ring.clone();
        Ok(Self { ring, queue, reaper: Some(reaper), batches: BatchPool::new(RingPort::new) })
    }
}

impl EngineQueue for UringEngine {
    fn submit(&self, bios: &mut dyn Iterator<Item = Bio>) {
        let helper = &self.ring.helper;
        let mut plain = bios.filter_map(|bio| {
            if Flight::can_do(&bio) {
                return Some(bio);
            }
            helper.submit(&mut std::iter::once(bio));
            None
        });
        flush::submit(&self.queue, &mut plain);
    }

    fn submit_wait(&self, bios: &mut Vec<Bio>) -> bool {
        self.batches.run(bios, &self.ring.target)
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for UringEngine {
    /// Waits until everything taken is done.
    fn drop(&mut self) {
        self.ring.stop();
        if let Some(reaper) = self.reaper.take() {
            // The last owner may be an `end_io` in the reaper, which then goes on alone.
            if reaper.thread().id() != thread::current().id() {
                let _ = reaper.join();
            }
        }
    }
}

impl SimpleQueue for SharedRing {
    fn limits(&self) -> &QueueLimits {
        &self.target.limits
    }

    fn submit_simple(&self, bios: &mut dyn Iterator<Item = Bio>) {
        // The iterator may complete bios of its own, so it runs without locks.
        for bio in bios {
            if Flight::can_do(&bio) {
                self.taken.push(bio, || self.pump());
            } else {
                self.helper.submit(&mut std::iter::once(bio));
            }
        }
        // What the end_ios of one round submit goes down together after the round.
        if !self.taken.is_reaper() {
            self.pump();
        }
    }
}

impl SharedRing {
    /// Moves what waits into the ring, as far as there are places, and submits it
    /// with one system call.
    fn pump(&self) {
        let sq = self.sq.lock();
        if self.fill(&sq) > 0 {
            submit_all(&self.ring, 0);
        }
    }

    /// Moves what waits into the submission queue; how many entries are in that now.
    fn fill(&self, _sq: &MutexGuard<'_, ()>) -> u32 {
        // SAFETY: `sq` is held, so this is the only user of the submission queue.
        let mut entries = unsafe { self.ring.submission_shared() };
        let mut slab = self.taken.lock();
        while let Some(index) = slab.next_flight() {
            let entry = slab.flights[index as usize].entry(u64::from(index));
            // SAFETY: the flight stays in place and keeps its memory until its completion.
            let pushed = unsafe { entries.push(&entry) };
            assert!(pushed.is_ok(), "the ring has an entry for each flight");
        }
        drop(slab);
        self.taken.made_room();
        // At most the ring's size.
        entries.len() as u32
    }

    /// The reaper's: submits what waits and sleeps until a completion is there, with one
    /// system call.
    fn submit_and_wait(&self) {
        let entries = self.fill(&self.sq.lock());
        // SAFETY: only the reaper uses the completion queue.
        let want = u32::from(unsafe { self.ring.completion_shared() }.is_empty());
        if entries > 0 || want > 0 {
            // Another thread may submit the entries sooner. Then, or when it takes only some
            // of them, the kernel returns at once, and the next round waits.
            enter(&self.ring, entries, want);
        }
    }

    /// The reaper's life: until it is told to stop and nothing is left.
    fn reap(&self) {
        let mut stopping = false;
        let mut done = Vec::with_capacity(DEPTH as usize);
        loop {
            self.submit_and_wait();
            stopping |= self.collect(&mut done);
            for (bio, status) in done.drain(..) {
                if self.taken.lock().is_worth_a_call() {
                    self.pump();
                }
                complete(bio, status);
            }
            if stopping && self.taken.lock().is_idle() {
                return;
            }
        }
    }

    /// Takes completions out of the ring; whether one of them says stop.
    fn collect(&self, done: &mut Vec<(Bio, BlkResult<()>)>) -> bool {
        let mut stop = false;
        let mut slab = self.taken.lock();
        // SAFETY: only the reaper uses the completion queue.
        for cqe in unsafe { self.ring.completion_shared() } {
            if cqe.user_data() == STOP {
                stop = true;
                continue;
            }
            // The index came from `pump`.
            let index = cqe.user_data() as u32;
            match slab.flights[index as usize].land(cqe.result(), &self.target) {
                Landing::Again => slab.again.push(index),
                Landing::Done(bio, status) => {
                    slab.free.push(index);
                    done.push((bio, status));
                }
            }
        }
        stop
    }

    fn stop(&self) {
        let _sq = self.sq.lock();
        let entry = opcode::Nop::new().build().user_data(STOP);
        // SAFETY: `sq` is held, and the entry points nowhere.
        let pushed = unsafe { self.ring.submission_shared().push(&entry) };
        assert!(pushed.is_ok(), "the ring has an entry for the stop");
        submit_all(&self.ring, 0);
    }
}

/// A ring that one thread at a time submits to and reaps from.
struct RingPort {
    ring: IoUring,
}

impl RingPort {
    fn new(target: &Target) -> io::Result<Self> {
        // The waiting thread posts its own completions when it enters the kernel.
        let ring = IoUring::builder().setup_submit_all().setup_coop_taskrun().build(BATCH_DEPTH)?;
        ring.submitter().register_files(&[target.fd()])?;
        Ok(Self { ring })
    }
}

impl Port for RingPort {
    fn push(&mut self, index: u32, flight: &Flight) {
        let entry = flight.entry(u64::from(index));
        // SAFETY: the flight stays in place and keeps its memory until its completion,
        // for which the batch waits.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring has an entry for each flight");
    }

    fn submit_and_wait(&mut self, want: usize) {
        submit_all(&self.ring, want);
    }

    fn next_completion(&mut self) -> Option<(u32, i32)> {
        // The index came from `push`.
        self.ring.completion().next().map(|cqe| (cqe.user_data() as u32, cqe.result()))
    }
}

/// Takes the file out of a ring that is about to go: the kernel tears a ring down
/// later, and until then the file would stay open and claimed.
fn release_file(ring: &IoUring) {
    if let Err(error) = ring.submitter().unregister_files() {
        log::warn!("a ring keeps its file: {error}");
    }
}

impl Drop for SharedRing {
    fn drop(&mut self) {
        release_file(&self.ring);
    }
}

impl Drop for RingPort {
    fn drop(&mut self) {
        release_file(&self.ring);
    }
}

/// Submits what is in the queue, and waits for `want` completions. Never gives up:
/// what is in the queue belongs to bios that somebody waits for.
fn submit_all(ring: &IoUring, want: usize) {
    let mut complained = false;
    loop {
        let result = ring.submit_and_wait(want);
        // SAFETY: the caller is the only user of the submission queue.
        let left = unsafe { ring.submission_shared().len() };
        match result {
            Ok(_) if left == 0 => return,
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) => {
                // Short of memory, as a rule: in-flight bios will give some back.
                if !std::mem::replace(&mut complained, true) {
                    log::warn!("io_uring_enter: {error}; trying again");
                }
                if left == 0 {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Submits `entries` and waits until there are `want` completions, or something went wrong:
/// what is left in the queue is for the next call.
fn enter(ring: &IoUring, entries: u32, want: u32) {
    // SAFETY: no argument is passed; the entries' flights stay until their completions.
    let result = unsafe {
        let flags = EnterFlags::GETEVENTS.bits();
        ring.submitter().enter::<libc::sigset_t>(entries, want, flags, None)
    };
    match result {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
        Err(error) => {
            log::warn!("io_uring_enter: {error}; trying again");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Runs the owner's `end_io`; its panic must not take the other bios with it.
pub(super) fn complete(bio: Bio, status: BlkResult<()>) {
    if catch_unwind(AssertUnwindSafe(|| bio.end_io(status))).is_err() {
        log::error!("an end_io panicked");
    }
}
