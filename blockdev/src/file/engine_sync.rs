//! The sync engine: `preadv2` and `pwritev2` on a few threads.
//!
//! Works everywhere, and carries what io_uring can't do (discard and zeroing of
//! block devices). The bound: at most [`MAX_WORKERS`] threads, started as they
//! are needed, and [`MAX_QUEUED`] bios waiting for them; a submitter that comes
//! then waits, except a worker's own `end_io`, which must not.
//!
//! Locks: `queue`, never held over a system call or an `end_io`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle, ThreadId};

use parking_lot::{Condvar, Mutex};

use super::EngineQueue;
use super::engine_uring::complete;
use super::target::Target;
use crate::bio::Bio;
use crate::status::BlkStatus;

/// Threads of one device.
const MAX_WORKERS: usize = 8;
/// Bios that wait for a thread before submitters wait.
const MAX_QUEUED: usize = 1024;

pub(super) struct SyncEngine {
    shared: Arc<Shared>,
}

struct Shared {
    target: Arc<Target>,
    queue: Mutex<Queue>,
    /// There are bios, or the end has come.
    work: Condvar,
    /// There is room again.
    room: Condvar,
}

#[derive(Default)]
struct Queue {
    bios: VecDeque<Bio>,
    /// Workers waiting for `work`.
    idle: usize,
    workers: Vec<JoinHandle<()>>,
    stopping: bool,
}

impl SyncEngine {
    pub(super) fn new(target: Arc<Target>) -> Self {
        let queue = Mutex::default();
        let shared = Shared { target, queue, work: Condvar::new(), room: Condvar::new() };
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
            queue.bios.push_back(bio);
            if queue.bios.len() > queue.idle && queue.workers.len() < MAX_WORKERS {
                self.start_worker(&mut queue);
            }
            let stranded = if queue.workers.is_empty() { queue.bios.pop_back() } else { None };
            drop(queue);
            match stranded {
                // Not one thread to be had: the bio must not wait for ever.
                Some(bio) => bio.end_io(Err(BlkStatus::IoErr)),
                None => drop(self.shared.work.notify_one()),
            }
        }
    }

    fn name(&self) -> &'static str {
        "sync"
    }
}

impl SyncEngine {
    fn start_worker(&self, queue: &mut Queue) {
        let shared = self.shared.clone();
        let name = format!("blk-sync-{}", queue.workers.len());
        match thread::Builder::new().name(name).spawn(move || shared.work()) {
            Ok(worker) => queue.workers.push(worker),
            Err(error) => log::warn!("no further I/O thread: {error}"),
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
        while let Some(bio) = self.next() {
            let result = self.target.run(&bio);
            complete(bio, result);
        }
    }

    fn next(&self) -> Option<Bio> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(bio) = queue.bios.pop_front() {
                self.room.notify_one();
                return Some(bio);
            }
            if queue.stopping {
                return None;
            }
            queue.idle += 1;
            self.work.wait(&mut queue);
            queue.idle -= 1;
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
