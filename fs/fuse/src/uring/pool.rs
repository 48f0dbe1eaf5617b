//! Threads for requests that may wait: for the disk, for a commit.
//!
//! A ring's thread serves all requests of its CPU, so one that waits would stall the
//! others. What may wait is handed to this pool, and the entry comes back to its ring
//! when the reply is in it.
//!
//! The bound: a thread for each entry of all rings, so no request waits for another
//! one's wait, and nothing here can deadlock: a thread of the pool needs no ring to
//! get done, and a ring's thread needs no thread of the pool.
//!
//! Locks: `state`, held over no request.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use uext_sync::{Condvar, Mutex};

use super::Shared;
use super::entry::Entry;
use crate::session::AbortOnPanic;
use crate::sys;

/// A request for the pool, and where its entry goes back to.
pub(super) struct Job {
    pub(super) entry: Entry,
    pub(super) home: Arc<Shared>,
}

/// Threads, started as they are needed.
pub(super) struct Pool {
    state: Mutex<State>,
    work: Condvar,
    most: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// At most `most` threads, one of them started now, so that there is one.
    pub(super) fn new(most: usize) -> io::Result<Arc<Self>> {
        let pool = Arc::new(Self { state: Mutex::default(), work: Condvar::new(), most });
        pool.start_thread(&mut pool.state.lock())?;
        Ok(pool)
    }

    /// Has a thread serve the request.
    pub(super) fn hand(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if state.jobs.len() > state.idle
            && state.threads.len() < self.most
            && let Err(error) = self.start_thread(&mut state)
        {
            log::warn!("no further thread for blocking requests: {error}");
        }
        drop(state);
        self.work.notify_one();
    }

    /// Ends the threads once there is nothing left to do, and waits for them.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.work.notify_all();
        for thread in threads {
            // A panic has aborted the program.
            let _ = thread.join();
        }
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let pool = self.clone();
        let name = format!("fuse-block-{}", state.threads.len());
        let thread = std::thread::Builder::new().name(name).spawn(move || pool.run())?;
        state.threads.push(thread);
        Ok(())
    }

    fn run(&self) {
        let _guard = AbortOnPanic;
        sys::set_io_flusher();
        let mut scratch = Vec::new();
        while let Some(Job { mut entry, home }) = self.next() {
            entry.serve(&home.dispatcher, &mut scratch);
            home.give_back(entry);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            self.work.wait(&mut state);
            state.idle -= 1;
        }
    }
}
