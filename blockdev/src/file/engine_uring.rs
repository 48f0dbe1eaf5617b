//! The io_uring engine.
//!
//! Threads that don't wait hand their bios to the reaper, which puts them into its ring, as
//! many as there are with one system call, and completes them. The ring is the reaper's
//! alone, so a completion wakes the reaper and nobody else: in a ring of several threads
//! the kernel posts a completion in the thread that submitted, which it interrupts in
//! whatever it does or wakes from its sleep, and only then is the reaper woken. A thread
//! that waits for a batch takes a small ring of its own from a pool, submits and reaps
//! there, and no other thread wakes up for it.
//!
//! What would block in the kernel's own workers goes to threads of the sync engine:
//! flushes, above all, of which a whole sequence (PREFLUSH, data, FUA) is then one
//! hand-over and not three.
//!
//! The bound: [`DEPTH`] bios in the ring and those that wait in the [`SlabQueue`]; a
//! submitter that comes then waits, except an `end_io` in the reaper, which must
//! not. No SQPOLL: on few cores its thread takes the time of those that work.
//!
//! No fixed buffers either: a bio's pages are scattered, the kernel has had a vectored
//! request on registered memory only since 6.15, and what it would save (finding the
//! pages, 2 % of a request at most) is not to be seen beside a disk. The rings of threads
//! that wait are not bound to one (no DEFER_TASKRUN): they share a pool.
//!
//! Invariants:
//! - Each flight in the ring has one entry at a time, and the ring has an entry for
//!   each flight and one for the wake-up, so neither queue can overflow.
//! - While the reaper sleeps and nothing waits, [`SlabQueue`] says so, and whoever adds
//!   something wakes it; the read of the wake-up is in the ring whenever it sleeps.
//! - A ring is given up only when nothing is in flight in it.
//!
//! Locks: the slab, held over no `end_io`, and not while waiting for a completion.

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use io_uring::{Builder, EnterFlags, IoUring, opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};

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
/// The user data of the entry that wakes the reaper.
const WAKE: u64 = u64::MAX;

pub(super) struct UringEngine {
    ring: Arc<SharedRing>,
    queue: Arc<dyn SimpleQueue>,
    reaper: Option<JoinHandle<()>>,
    batches: BatchPool<RingPort>,
}

struct SharedRing {
    /// [the reaper]
    ring: IoUring,
    target: Arc<Target>,
    /// Does what io_uring can't, or not well.
    helper: SyncEngine,
    taken: SlabQueue,
    /// Written to wake the reaper.
    wake: EventFd,
    /// [the kernel, while the read of `wake` is in the ring] What was read; of no interest.
    woken: UnsafeCell<u64>,
}

// SAFETY: the submission and completion queues and `woken` are used by the reaper alone; what
// else there is may be shared.
unsafe impl Sync for SharedRing {}

impl UringEngine {
    /// # Errors
    /// When the kernel has no io_uring, or doesn't let us have one.
    pub(super) fn new(target: Arc<Target>) -> io::Result<Self> {
        let ring = ring_of_one_thread()?;
        ring.submitter().register_files(&[target.fd()])?;
        let ring = Arc::new(SharedRing {
            ring,
            helper: SyncEngine::new(target.clone(), HELPERS),
            taken: SlabQueue::new(&target, DEPTH),
            target,
            wake: EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?,
            woken: UnsafeCell::new(0),
        });
        let shared = ring.clone();
        let reaper =
            thread::Builder::new().name("blk-uring".into()).spawn(move || shared.reap())?;
        ring.taken.set_reaper(reaper.thread().id());
        let queue = ring.clone();
        Ok(Self { ring, queue, reaper: Some(reaper), batches: BatchPool::new(RingPort::new) })
    }
}

/// A ring for the thread that enables it, in the best way that the kernel has.
fn ring_of_one_thread() -> io::Result<IoUring> {
    // DEFER_TASKRUN is there since 6.1, COOP_TASKRUN since 5.19.
    let ways: [fn(&mut Builder) -> &mut Builder; 3] = [
        |builder| builder.setup_single_issuer().setup_defer_taskrun(),
        Builder::setup_coop_taskrun,
        |builder| builder,
    ];
    let mut last = None;
    for way in ways {
        let mut builder = IoUring::builder();
        match way(builder.setup_submit_all().setup_r_disabled()).build(DEPTH + 1) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            result => return result,
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
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
                self.taken.push(bio, || self.wake());
            } else {
                self.helper.submit(&mut std::iter::once(bio));
            }
        }
        self.wake();
    }
}

impl SharedRing {
    /// Wakes the reaper where it sleeps and does not know of what waits.
    fn wake(&self) {
        let asleep = std::mem::take(&mut self.taken.lock().reaper_sleeps);
        if asleep {
            self.write_wake();
        }
    }

    fn write_wake(&self) {
        while let Err(errno) = self.wake.write(1) {
            if errno != nix::errno::Errno::EINTR {
                log::error!("eventfd: {errno}; trying again");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Tells the reaper to go when nothing is left.
    fn stop(&self) {
        self.taken.lock().stopping = true;
        self.write_wake();
    }
}

/// What the reaper alone does.
impl SharedRing {
    /// Until it is told to stop and nothing is left.
    fn reap(&self) {
        while let Err(error) = self.ring.submitter().register_enable_rings() {
            log::error!("io_uring_register: {error}; trying again");
            thread::sleep(Duration::from_millis(100));
        }
        let mut done = Vec::with_capacity(DEPTH as usize);
        let mut listens = false;
        loop {
            // Without a read of the wake-up in the ring, which ends when somebody stops.
            if !listens {
                let (stopping, over) = self.taken.lock().is_to_stop();
                if over {
                    release_file(&self.ring);
                    return;
                }
                if !stopping {
                    self.listen();
                    listens = true;
                }
            }
            self.submit_and_wait();
            listens &= !self.collect(&mut done);
            for (bio, status) in done.drain(..) {
                if self.taken.lock().is_worth_a_call() {
                    let entries = self.fill(false);
                    enter(&self.ring, entries, 0, EnterFlags::empty());
                }
                complete(bio, status);
            }
        }
    }

    /// Puts the read of the wake-up into the submission queue.
    fn listen(&self) {
        let fd = types::Fd(self.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.woken.get().cast(), size_of::<u64>() as u32);
        // SAFETY: this is the reaper. `woken` stays in place, and the reaper goes only when the
        // read has ended.
        let pushed = unsafe { self.ring.submission_shared().push(&entry.build().user_data(WAKE)) };
        assert!(pushed.is_ok(), "the ring has an entry for the wake-up");
    }

    /// Moves what waits into the submission queue, as far as there are places; how many entries
    /// are in that now. With `to_sleep` whoever adds something from now on wakes the reaper.
    fn fill(&self, to_sleep: bool) -> u32 {
        // SAFETY: this is the reaper.
        let mut entries = unsafe { self.ring.submission_shared() };
        let mut slab = self.taken.lock();
        while let Some(index) = slab.next_flight() {
            let entry = slab.flights[index as usize].entry(u64::from(index));
            // SAFETY: the flight stays in place and keeps its memory until its completion.
            let pushed = unsafe { entries.push(&entry) };
            assert!(pushed.is_ok(), "the ring has an entry for each flight");
        }
        // With the ring full a completion comes, and what waits then goes down.
        slab.reaper_sleeps = to_sleep && !slab.has_more();
        drop(slab);
        self.taken.made_room();
        // At most the ring's size.
        entries.len() as u32
    }

    /// Submits what waits and sleeps until a completion is there, with one system call.
    fn submit_and_wait(&self) {
        // SAFETY: this is the reaper.
        let sleep = unsafe { self.ring.completion_shared() }.is_empty();
        let entries = self.fill(sleep);
        if entries > 0 || sleep {
            // When the kernel takes only some of the entries it returns at once, and the next
            // round waits.
            enter(&self.ring, entries, u32::from(sleep), EnterFlags::GETEVENTS);
        }
    }

    /// Takes completions out of the ring; whether one of them is the wake-up.
    fn collect(&self, done: &mut Vec<(Bio, BlkResult<()>)>) -> bool {
        let mut woken = false;
        let mut slab = self.taken.lock();
        slab.reaper_sleeps = false;
        // SAFETY: this is the reaper.
        for cqe in unsafe { self.ring.completion_shared() } {
            if cqe.user_data() == WAKE {
                woken = true;
                continue;
            }
            // The index came from `fill`.
            let index = cqe.user_data() as u32;
            match slab.flights[index as usize].land(cqe.result(), &self.target) {
                Landing::Again => slab.again.push(index),
                Landing::Done(bio, status) => {
                    slab.free.push(index);
                    done.push((bio, status));
                }
            }
        }
        woken
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
fn enter(ring: &IoUring, entries: u32, want: u32, flags: EnterFlags) {
    // SAFETY: no argument is passed; the entries' flights stay until their completions.
    let result =
        unsafe { ring.submitter().enter::<libc::sigset_t>(entries, want, flags.bits(), None) };
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
