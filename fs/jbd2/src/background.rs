//! The journal's own thread: commits by time, checkpoints before they are urgent.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::journal::Journal;

/// The thread and the way to wake it.
pub(crate) struct Background {
    /// `None` once it was told to stop.
    wake: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    pub(crate) fn start(journal: &Arc<Journal>) -> Self {
        // One request is as good as many.
        let (wake, requests) = bounded(1);
        let weak = Arc::downgrade(journal);
        let interval = journal.commit_interval();
        let thread = std::thread::Builder::new().name("uext-jbd2".into()).spawn(move || {
            run(&requests, interval, || weak.upgrade());
        });
        let thread = thread.map_err(|error| log::error!("no journal thread: {error}")).ok();
        Self { wake: Some(wake), thread }
    }

    /// Asks for a checkpoint; does not wait.
    pub(crate) fn request_checkpoint(&self) {
        if let Some(wake) = &self.wake {
            // A full channel holds a request already.
            let _ = wake.try_send(());
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.wake = None;
        let Some(thread) = self.thread.take() else { return };
        // The thread itself drops the journal when it held the last reference.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

fn run(requests: &Receiver<()>, interval: Duration, journal: impl Fn() -> Option<Arc<Journal>>) {
    loop {
        let Some(tick) = journal().map(|journal| journal.time_to_commit(interval)) else { return };
        match requests.recv_timeout(tick) {
            Ok(()) => {
                let Some(journal) = journal() else { return };
                note(journal.checkpoint(journal.background_aim()));
            }
            Err(RecvTimeoutError::Timeout) => {
                let Some(journal) = journal() else { return };
                note(journal.commit_old(interval));
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The journal has aborted itself when something failed.
fn note(result: crate::Result<()>) {
    if let Err(error) = result {
        log::debug!("journal thread: {error}");
    }
}
