//! The sync engine: `preadv2` and `pwritev2` on a few threads.
//!
//! Works everywhere, and carries what io_uring can't do (discard and zeroing of
//! block devices). The bound: a fixed number of threads, started all with the first
//! bio, so that later ones allocate nothing, and [`MAX_QUEUED`] bios waiting for
//! them; a submitter that comes then waits, except a worker's own `end_io`, which
//! must not. What an `end_io` submits waits until it returns: its worker takes the first
//! of it, and other workers wake up only for more, since at depth 1 a wake-up for each bio
//! costs a tenth.
//!
//! Locks: `queue`, never held over a system call or an `end_io`.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle, ThreadId};

use uext_sync::{Condvar, Mutex, MutexGuard};

use super::EngineQueue;
use super::engine_uring::complete;
use super::target::Target;
use crate::bio::Bio;
use crate::status::BlkStatus;

/// Threads of one device that has no other engine.
pub(super) const WORKERS: usize = 8;
/// Threads that help another engine.
pub(super) const HELPERS: usize = 3;
/// Bios that wait for a thread before submitters wait.
const MAX_QUEUED: usize = 1024;
/// Room for bios that another engine hands over, whatever waits.
const TAKEN_OVER: usize = 128;

pub(super) struct SyncEngine {
    shared: Arc<Shared>,
}

struct Shared {
    target: Arc<Target>,
    max_workers: usize,
    queue: Mutex<Queue>,
    /// There are bios, or the end has come.
    work: Condvar,
    /// There is room again.
    room: Condvar,
}

thread_local! {
    /// The engine for which this thread runs an `end_io`, as an address; 0 without one.
    static COMPLETING: Cell<usize> = const { Cell::new(0) };
}

#[derive(Default)]
struct Queue {
    bios: VecDeque<Bio>,
    /// How many of them no worker has been woken for: the one whose `end_io` queued them
    /// comes back for them.
    unannounced: usize,
    workers: Vec<JoinHandle<()>>,
    stopping: bool,
}

impl SyncEngine {
    pub(super) fn new(target: Arc<Target>, max_workers: usize) -> Self {
        let queue =
            Queue { bios: VecDeque::with_capacity(MAX_QUEUED + TAKEN_OVER), ..Queue::default() };
        let queue = Mutex::new(queue);
        let shared =
            Shared { target, max_workers, queue, work: Condvar::new(), room: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }
}

impl EngineQueue for SyncEngine {
    fn submit(&self, bios: &mut dyn Iterator<Item = Bio>) {
        // The iterator may complete bios of its own, so it runs without the lock.
        for bio in bios {
            let mut queue = self.shared.queue.lock();
            let me = thread::current().id();
            while queue.bios.len() >= MAX_QUEUED && !queue.is_worker(me) {
                self.shared.room.wait(&mut queue);
            }
            self.push(queue, bio);
        }
    }

    fn name(&self) -> &'static str {
        "sync"
    }
}

impl SyncEngine {
    /// Takes a bio over from another engine, without waiting for room: that engine's
    /// depth is the bound.
    pub(super) fn take_over(&self, bio: Bio) {
        self.push(self.shared.queue.lock(), bio);
    }

    /// Queues a bio and wakes a worker.
    fn push(&self, mut queue: MutexGuard<'_, Queue>, bio: Bio) {
        queue.bios.push_back(bio);
        if queue.workers.is_empty() {
            self.start_workers(&mut queue);
        }
        let stranded = if queue.workers.is_empty() { queue.bios.pop_back() } else { None };
        let comes_back = COMPLETING.get() == self.shared.address();
        queue.unannounced += usize::from(comes_back);
        drop(queue);
        match stranded {
            // Not one thread to be had: the bio must not wait for ever.
            Some(bio) => bio.end_io(Err(BlkStatus::IoErr)),
            None if comes_back => {}
            None => drop(self.shared.work.notify_one()),
        }
    }

    fn start_workers(&self, queue: &mut Queue) {
        for number in 0..self.shared.max_workers {
            let shared = self.shared.clone();
            let name = format!("blk-sync-{number}");
            match thread::Builder::new().name(name).spawn(move || shared.work()) {
                Ok(worker) => queue.workers.push(worker),
                Err(error) => return log::warn!("no further I/O thread: {error}"),
            }
        }
    }
}

impl Queue {
    fn is_worker(&self, id: ThreadId) -> bool {
        self.workers.iter().any(|worker| worker.thread().id() == id)
    }
}

impl Shared {
    /// A worker's life: until the queue is empty and the end has come.
    fn work(&self) {
        self.target.prepare_thread();
        while let Some(bio) = self.next() {
            let result = self.target.run(&bio);
            COMPLETING.set(self.address());
            complete(bio, result);
            COMPLETING.set(0);
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn next(&self) -> Option<Bio> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(bio) = queue.bios.pop_front() {
                // This thread takes one of them, others the rest.
                let others = std::mem::take(&mut queue.unannounced).saturating_sub(1);
                drop(queue);
                self.room.notify_one();
                for _ in 0..others {
                    self.work.notify_one();
                }
                return Some(bio);
            }
            if queue.stopping {
                return None;
            }
            self.work.wait(&mut queue);
        }
    }
}

impl Drop for SyncEngine {
    /// Waits until everything taken is done.
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.stopping = true;
        let workers = std::mem::take(&mut queue.workers);
        drop(queue);
        self.shared.work.notify_all();
        let me = thread::current().id();
        // The last owner may be an `end_io`, which a worker can't wait for.
        for worker in workers.into_iter().filter(|worker| worker.thread().id() != me) {
            // A worker that panicked has completed its bio by dropping it.
            let _ = worker.join();
        }
    }
}
