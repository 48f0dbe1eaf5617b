//! The Linux AIO engine: `io_submit` with as many bios as there are, completions
//! from the ring in user space (see [`super::aio_ring`]).
//!
//! Threads that don't wait share one context, and a reaper thread completes their
//! bios: it reads the ring until that is empty, and then sleeps in `io_getevents`. A read
//! of nothing, which completes at once, tells it to stop. A thread that waits for a batch
//! has a context of its own.
//!
//! `io_submit` itself may block, where the file below must allocate or the device's
//! queue is full. So on the shared context every request says `RWF_NOWAIT`, and what
//! would have blocked goes to a thread of the sync engine, as do flushes and
//! whatever else the kernel does not take. On files without direct I/O `io_submit`
//! would do all of the work in the submitter; there is no engine for those.
//!
//! `io_cancel` is advice: the kernel refuses it for reads and writes of disks, and a
//! cancelled request still ends in the ring. So the memory belongs to the flight
//! until the completion is seen, whatever was answered.
//!
//! Invariants:
//! - As many requests at most are in a context as its ring has places for.
//! - One thread takes completions of a context: the reaper, or who has the batch.
//! - A context is destroyed when nothing is in flight in it.
//!
//! Locks, outermost first: `sq` (the requests and `io_submit`), the slab. Neither is
//! held over an `end_io`, or while waiting for a completion.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use uext_sync::Mutex;

use super::EngineQueue;
use super::aio_context::{AioContext, Iocb};
use super::aio_ring::IoEvent;
use super::batch::{BATCH_DEPTH, BatchPool, Port};
use super::engine_sync::{HELPERS, SyncEngine};
use super::engine_uring::complete;
use super::flight::{Flight, Landing};
use super::slab::{Slab, SlabQueue};
use super::target::Target;
use crate::bio::{Bio, BioFlags};
use crate::flush::{self, SimpleQueue};
use crate::limits::QueueLimits;
use crate::status::BlkResult;

/// Bios in the shared context.
const DEPTH: u32 = 128;
/// The data of the request that tells the reaper to stop.
const STOP: u64 = u64::MAX;

pub(super) struct AioEngine {
    shared: Arc<SharedContext>,
    queue: Arc<dyn SimpleQueue>,
    reaper: Option<JoinHandle<()>>,
    batches: BatchPool<AioPort>,
}

struct SharedContext {
    /// [`sq` for submission; completions are the reaper's]
    context: AioContext,
    target: Arc<Target>,
    /// Does what AIO can't, or only by blocking.
    helper: SyncEngine,
    sq: Mutex<Requests>,
    taken: SlabQueue,
    /// PAIRS-WITH: the release of `stop` with the acquire of `reap`, which counts after it.
    stopping: AtomicBool,
    /// WHY-RELAXED: a hint; the worst is one more refused call.
    /// The file takes no `RWF_NOWAIT`: known after the first refusal.
    no_nowait: AtomicBool,
}

/// The requests of all flights, and the list of those to submit.
struct Requests {
    iocbs: Box<[Iocb]>,
    ready: Vec<u32>,
}

impl Requests {
    fn new(depth: u32) -> Self {
        let iocbs = (0..depth).map(|_| Iocb::empty()).collect();
        Self { iocbs, ready: Vec::with_capacity(depth as usize) }
    }

    fn prepare(&mut self, index: u32, flight: &Flight, fd: RawFd) {
        self.iocbs[index as usize] = Iocb::new(flight, fd, u64::from(index));
        self.ready.push(index);
    }
}

impl AioEngine {
    /// # Errors
    /// When the kernel has no context left (`aio-max-nr`), or no AIO.
    pub(super) fn new(target: Arc<Target>) -> io::Result<Self> {
        let shared = Arc::new(SharedContext {
            // One place is for the request to stop.
            context: AioContext::new(DEPTH + 1)?,
            helper: SyncEngine::new(target.clone(), HELPERS),
            sq: Mutex::new(Requests::new(DEPTH)),
            taken: SlabQueue::new(&target, DEPTH),
            target,
            stopping: AtomicBool::new(false),
            no_nowait: AtomicBool::new(false),
        });
        let reaping = shared.clone();
        let reaper = thread::Builder::new().name("blk-aio".into()).spawn(move || reaping.reap())?;
        shared.taken.set_reaper(reaper.thread().id());
        let queue = shared.clone();
        Ok(Self { shared, queue, reaper: Some(reaper), batches: BatchPool::new(AioPort::new) })
    }
}

impl EngineQueue for AioEngine {
    fn submit(&self, bios: &mut dyn Iterator<Item = Bio>) {
        let helper = &self.shared.helper;
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
        self.batches.run(bios, &self.shared.target)
    }

    fn name(&self) -> &'static str {
        "aio"
    }
}

impl Drop for AioEngine {
    /// Waits until everything taken is done; readahead may be called off.
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(reaper) = self.reaper.take() {
            // The last owner may be an `end_io` in the reaper, which then goes on alone.
            if reaper.thread().id() != thread::current().id() {
                let _ = reaper.join();
            }
        }
    }
}

impl SimpleQueue for SharedContext {
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

impl SharedContext {
    /// Moves what waits into the context, as far as there are places, with one system
    /// call where the kernel takes all.
    fn pump(&self) {
        // Again after a refusal: its place is free, and with nothing left in flight no
        // completion would come to fill it from the queue.
        while self.pump_once() {}
    }

    /// Whether bios were refused and went to the helper.
    fn pump_once(&self) -> bool {
        let refused = {
            let mut sq = self.sq.lock();
            let mut slab = self.taken.lock();
            while let Some(index) = slab.next_flight() {
                sq.prepare(index, &slab.flights[index as usize], self.target.fd());
            }
            drop(slab);
            self.taken.made_room();
            self.submit(&mut sq)
        };
        let any = !refused.is_empty();
        for bio in refused {
            self.helper.take_over(bio);
        }
        any
    }

    /// Submits what is ready; gives back what the kernel does not take.
    fn submit(&self, sq: &mut Requests) -> Vec<Bio> {
        let mut refused = Vec::new();
        let Requests { iocbs, ready } = sq;
        // WHY-RELAXED: a hint; the worst is one more refused call.
        let mut rwf = if self.no_nowait.load(Ordering::Relaxed) { 0 } else { libc::RWF_NOWAIT };
        let mut done = 0;
        while done < ready.len() {
            for index in &ready[done..] {
                iocbs[*index as usize].set_nowait(rwf);
            }
            // SAFETY: a flight keeps its memory until its completion has been seen, and
            // the flights whose requests are ready belong to this submission.
            let result = unsafe { self.context.submit(iocbs, &ready[done..]) };
            match result.map_err(|error| error.raw_os_error()) {
                Ok(submitted) if submitted > 0 => done += submitted,
                Err(Some(libc::EINTR)) => {}
                Err(Some(libc::EOPNOTSUPP)) if rwf != 0 => {
                    rwf = 0;
                    // WHY-RELAXED: as above.
                    self.no_nowait.store(true, Ordering::Relaxed);
                }
                // EAGAIN: the kernel is short of requests. Anything else: it does not
                // like the first one, and the sync engine will learn why.
                _ => {
                    refused.extend(self.taken.lock().disembark(ready[done]));
                    done += 1;
                }
            }
        }
        ready.clear();
        refused
    }

    /// The reaper's life: until it is told to stop and nothing is left.
    fn reap(&self) {
        // SAFETY: this is the reaper, the context's only reader.
        let mut completions = unsafe { self.context.completions() };
        let mut events = Vec::with_capacity(DEPTH as usize + 1);
        let mut done = Vec::with_capacity(DEPTH as usize);
        let mut blocked = Vec::with_capacity(DEPTH as usize);
        loop {
            // First, so that what the submitters saw of `stopping` is in the count.
            let stopping = self.stopping.load(Ordering::Acquire); // PAIRS-WITH: stop
            let over = stopping && self.taken.lock().is_idle();
            events.extend(std::iter::from_fn(|| completions.next()));
            if events.is_empty() {
                if over {
                    return;
                }
                completions.wait(1);
                continue;
            }
            self.land(&mut events, &mut done, &mut blocked);
            for bio in blocked.drain(..) {
                self.helper.take_over(bio);
            }
            for (bio, status) in done.drain(..) {
                if self.taken.lock().is_worth_a_call() {
                    self.pump();
                }
                complete(bio, status);
            }
            if self.taken.lock().has_more() {
                self.pump();
            }
        }
    }

    /// Ends the flights of completions: bios that are done, and those that would have blocked.
    fn land(
        &self,
        events: &mut Vec<IoEvent>,
        done: &mut Vec<(Bio, BlkResult<()>)>,
        blocked: &mut Vec<Bio>,
    ) {
        let mut slab = self.taken.lock();
        for event in events.drain(..).filter(|event| event.data != STOP) {
            // The index came from `pump`, the result is an int in the kernel.
            let (index, result) = (event.data as u32, event.res as i32);
            if result == -libc::EAGAIN {
                blocked.extend(slab.disembark(index));
                continue;
            }
            match slab.flights[index as usize].land(result, &self.target) {
                Landing::Again => slab.again.push(index),
                Landing::Done(bio, status) => {
                    slab.free.push(index);
                    done.push((bio, status));
                }
            }
        }
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Release); // PAIRS-WITH: reap
        {
            let sq = self.sq.lock();
            let slab = self.taken.lock();
            for index in readahead(&slab) {
                // Advice: whatever the answer, the completion comes through the ring.
                let _ = self.context.cancel(&sq.iocbs[index]);
            }
        }
        let mut nothing = [Iocb::nothing(self.target.fd(), STOP)];
        let mut complained = false;
        // SAFETY: the request has no memory.
        while let Err(error) = unsafe { self.context.submit(&mut nothing, &[0]) } {
            if !std::mem::replace(&mut complained, true) {
                log::warn!("io_submit, to stop: {error}; trying again");
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Flights in the kernel's hands that nobody would miss.
fn readahead(slab: &Slab) -> impl Iterator<Item = usize> {
    slab.flights.iter().enumerate().filter_map(|(index, flight)| {
        flight.bio().is_some_and(|bio| bio.flags().contains(BioFlags::RAHEAD)).then_some(index)
    })
}

/// A context that one thread at a time submits to and reaps from.
struct AioPort {
    context: AioContext,
    /// The device's, which outlives its batches.
    fd: RawFd,
    requests: Requests,
    /// Completions that were taken, or made up for what the kernel refused.
    completed: VecDeque<(u32, i32)>,
    in_flight: usize,
}

impl AioPort {
    fn new(target: &Target) -> io::Result<Self> {
        Ok(Self {
            context: AioContext::new(BATCH_DEPTH)?,
            fd: target.fd(),
            requests: Requests::new(BATCH_DEPTH),
            completed: VecDeque::with_capacity(BATCH_DEPTH as usize),
            in_flight: 0,
        })
    }

    /// Submits what is ready; the thread waits for it anyway, so it may block.
    fn submit(&mut self) {
        let mut done = 0;
        while done < self.requests.ready.len() {
            let ready = &self.requests.ready[done..];
            // SAFETY: the batch keeps flights and their memory until their completions.
            let result = unsafe { self.context.submit(&mut self.requests.iocbs, ready) };
            match result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)) {
                Ok(submitted) if submitted > 0 => {
                    done += submitted;
                    self.in_flight += submitted;
                }
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) | Ok(_) if self.in_flight > 0 => self.take(1),
                Err(libc::EAGAIN) | Ok(_) => thread::sleep(Duration::from_millis(1)),
                Err(errno) => {
                    self.completed.push_back((ready[0], -errno));
                    done += 1;
                }
            }
        }
        self.requests.ready.clear();
    }

    /// Takes what has completed, at least `want` more.
    fn take(&mut self, want: usize) {
        let want = want.min(self.in_flight);
        let mut taken = 0;
        // SAFETY: `&mut self`: this is the context's only reader.
        let mut events = unsafe { self.context.completions() };
        loop {
            while let Some(event) = events.next() {
                // The index came from `prepare`, the result is an int in the kernel.
                self.completed.push_back((event.data as u32, event.res as i32));
                taken += 1;
            }
            if taken >= want {
                break;
            }
            events.wait(want - taken);
        }
        self.in_flight -= taken;
    }
}

impl Port for AioPort {
    fn push(&mut self, index: u32, flight: &Flight) {
        self.requests.prepare(index, flight, self.fd);
    }

    fn submit_and_wait(&mut self, want: usize) {
        self.submit();
        self.take(want.saturating_sub(self.completed.len()));
    }

    fn next_completion(&mut self) -> Option<(u32, i32)> {
        self.completed.pop_front()
    }
}
