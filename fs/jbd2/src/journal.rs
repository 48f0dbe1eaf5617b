//! The journal of a mounted filesystem.
//!
//! See the crate's documentation for the locks and the life of a transaction.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;
use uext_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use uext_blockdev::BlockDevice;
use uext_pagecache::{BLOCK_CONTENTS, BufferCache, CheckpointHook, PAGE_CONTENTS};
use uext_sync::{Condvar, Mutex, RwLock, lockdep};

use crate::background::Background;
use crate::checkpoint::{Aim, Workspace};
use crate::config::JournalConfig;
use crate::error::{JournalError, Result};
use crate::handle::{HANDLE, Handle};
use crate::log::Log;
use crate::map::JournalMap;
use crate::tid::{Tid, tid_geq};
use crate::transaction::{State, Transaction, TxState, block_map};

/// Called with a transaction that became durable.
pub type OnCommit = Box<dyn Fn(Tid) + Send + Sync>;
/// Called with the error that aborted the journal.
pub type OnAbort = Box<dyn Fn(&JournalError) + Send + Sync>;
/// Called before the timer commits.
pub type BeforeCommit = Box<dyn Fn() + Send + Sync>;

/// Blocks of the log kept for revoke blocks that open handles add beyond their credits.
const SLACK_BLOCKS: u32 = 32;

/// What the journal is doing, for statistics and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalStatus {
    /// The transaction that takes handles.
    pub running: Option<(Tid, TxState)>,
    /// The transaction on its way to the log.
    pub committing: Option<(Tid, TxState)>,
    /// The last durable transaction.
    pub committed: Tid,
    /// Blocks of the log in use, of how many.
    pub used_blocks: u32,
    /// Blocks of the ring.
    pub ring_blocks: u32,
    /// Committed transactions whose blocks are not all known to be home.
    pub checkpoints: usize,
    /// Their blocks, which memory keeps until they are home.
    pub kept_blocks: usize,
}

/// A journal, or the lack of one: a filesystem without journal uses the same
/// handles, which then only mark buffers dirty.
pub struct Journal {
    pub(crate) buffers: Arc<BufferCache>,
    /// `None` without a journal.
    pub(crate) log: Option<Log>,
    pub(crate) config: JournalConfig,
    /// The list lock.
    pub(crate) state: Mutex<State>,
    /// Anything in `state` that somebody may wait for has changed.
    pub(crate) changed: Condvar,
    /// Held by the one thread that checkpoints.
    pub(crate) checkpointing: Mutex<Workspace>,
    /// Held while blocks are on their way home.
    pub(crate) home_io: Mutex<()>,
    /// The running transaction has freed blocks: buffers it holds need a closer look.
    /// WHY-RELAXED: it matters for a block that this transaction freed and uses again, and
    /// who uses it again comes after who freed it by the filesystem's locks.
    pub(crate) has_forgotten: AtomicBool,
    pub(crate) on_commit: RwLock<Vec<OnCommit>>,
    on_abort: RwLock<Vec<OnAbort>>,
    pub(crate) before_commit: RwLock<Vec<BeforeCommit>>,
    background: Mutex<Option<Background>>,
    /// Handles without a journal: begun, and ended. PAIRS-WITH: [`Journal::plain_handles`].
    plain: [AtomicU64; 2],
}

impl Journal {
    /// Opens a journal that was recovered: its log must be empty.
    ///
    /// `dev` is the journal's device, `map` where it lies there; `buffers` is the
    /// cache of the filesystem's device.
    ///
    /// # Errors
    /// `Io`, `Corrupt`; `Unsupported` when the log is not empty or uses unknown features.
    pub fn open(
        dev: Arc<dyn BlockDevice>,
        map: JournalMap,
        fs_uuid: [u8; 16],
        buffers: Arc<BufferCache>,
        config: JournalConfig,
    ) -> Result<Arc<Self>> {
        lockdep::declare(&PAGE_CONTENTS, &HANDLE);
        lockdep::declare(&HANDLE, &BLOCK_CONTENTS);
        let (log, sb) = Log::open(dev, map, buffers.block_size(), fs_uuid, &config)?;
        let in_ring = sb.head >= log.first && sb.head < log.end;
        let head = if in_ring { sb.head } else { log.first };
        // The number in the superblock of an empty log may have been used; jbd2 goes one on.
        let next_tid = sb.sequence.wrapping_add(1);
        let free = log.ring();
        let state = new_state(next_tid, head, free);
        let background = config.background;
        let journal = Self::with(buffers, Some(log), config, state);
        let hook: Weak<dyn CheckpointHook> = {
            let weak: Weak<Self> = Arc::downgrade(&journal);
            weak
        };
        journal.buffers.set_checkpoint_hook(hook);
        if background {
            *journal.background.lock() = Some(Background::start(&journal));
        }
        Ok(journal)
    }

    /// No journal: handles mark buffers dirty, and ordinary writeback writes them.
    pub fn none(buffers: Arc<BufferCache>) -> Arc<Self> {
        Self::with(buffers, None, JournalConfig::default(), new_state(0, 0, 0))
    }

    fn with(
        buffers: Arc<BufferCache>,
        log: Option<Log>,
        config: JournalConfig,
        state: State,
    ) -> Arc<Self> {
        let work = Workspace::new(log.as_ref().map(|log| log.block_size));
        Arc::new(Self {
            buffers,
            log,
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
            checkpointing: Mutex::new(work),
            home_io: Mutex::new(()),
            has_forgotten: AtomicBool::new(false),
            on_commit: RwLock::default(),
            on_abort: RwLock::default(),
            before_commit: RwLock::default(),
            background: Mutex::new(None),
            plain: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    /// Whether there is one.
    pub fn has_journal(&self) -> bool {
        self.log.is_some()
    }

    /// Without a journal: how many handles began so far, and how many of them are open.
    pub fn plain_handles(&self) -> (u64, u64) {
        // The ended ones first: one that ends in between counts as open.
        let ended = self.plain[1].load(Ordering::SeqCst);
        let begun = self.plain[0].load(Ordering::SeqCst);
        (begun, begun - ended)
    }

    /// The cache whose buffers it journals.
    pub fn buffers(&self) -> &Arc<BufferCache> {
        &self.buffers
    }

    /// Most credits a handle may ask for.
    pub fn max_credits(&self) -> u32 {
        self.log.as_ref().map_or(u32::MAX, |log| {
            let budget = transaction_budget(log);
            // What descriptors, a revoke block and the commit block take of it.
            let overhead = log.blocks_needed(budget as usize, 1).saturating_sub(budget);
            budget.saturating_sub(overhead).min(self.most_in_transaction()).max(1)
        })
    }

    /// Credits the running transaction could still give: a hint for who can choose
    /// how much to do in one handle.
    pub fn credits_available(&self) -> u32 {
        let state = self.state.lock();
        let used = state.running.as_ref().map_or(0, |tx| tx.outstanding);
        self.max_credits().saturating_sub(used)
    }

    /// Begins an update of up to `credits` blocks. May wait for a commit or for space in
    /// the log; the caller must hold neither another handle nor a buffer's content lock.
    ///
    /// # Errors
    /// `TooManyCredits`, `Aborted`, `Closed`, or how making space failed.
    pub fn start(self: &Arc<Self>, credits: u32) -> Result<Handle> {
        let tid = self.join(credits)?;
        Ok(Handle::new(self.clone(), tid, credits))
    }

    /// Adds a handle to the running transaction; its number.
    pub(crate) fn join(&self, credits: u32) -> Result<Tid> {
        let Some(log) = &self.log else {
            self.plain[0].fetch_add(1, Ordering::SeqCst);
            return Ok(0);
        };
        HANDLE.check();
        let most = self.max_credits();
        if credits > most {
            return Err(JournalError::TooManyCredits { asked: credits, most });
        }
        let mut state = self.state.lock();
        loop {
            if let Some(why) = state.refusal() {
                return Err(why);
            }
            if state.barriers > 0 {
                self.changed.wait(&mut state);
                continue;
            }
            if state.running.is_none() {
                let waited;
                (state, waited) = self.wait_for_memory(state)?;
                if waited {
                    continue;
                }
            }
            let Some(tx) = &mut state.running else {
                let needed = transaction_budget(log).saturating_add(slack(log));
                if state.free >= needed {
                    let tid = state.next_tid;
                    state.next_tid = tid.wrapping_add(1);
                    let buffers = state.spare.pop().unwrap_or_default();
                    state.running = Some(Transaction::new(tid, buffers));
                    // WHY-RELAXED: the list lock orders it for the handles of the new transaction.
                    self.has_forgotten.store(false, Ordering::Relaxed);
                } else {
                    drop(state);
                    self.checkpoint(Aim { free: needed, home: None })?;
                    state = self.state.lock();
                }
                continue;
            };
            if tx.state != TxState::Running {
                self.changed.wait(&mut state);
                continue;
            }
            let full = !self.has_room(log, tx, credits) || self.config.commit_each_handle;
            if full && (tx.outstanding > 0 || !tx.revoked.is_empty()) {
                let tid = tx.tid;
                drop(state);
                self.commit(tid)?;
                state = self.state.lock();
                continue;
            }
            tx.outstanding += credits;
            tx.handles += 1;
            return Ok(tx.tid);
        }
    }

    /// Takes a handle out of its transaction, with the credits it did not use.
    pub(crate) fn leave(&self, tid: Tid, credits: u32) {
        if self.log.is_none() {
            self.plain[1].fetch_add(1, Ordering::SeqCst);
            return;
        }
        let mut state = self.state.lock();
        if let Some(tx) = &mut state.running
            && tx.tid == tid
        {
            tx.handles -= 1;
            tx.outstanding -= credits;
            if tx.handles == 0 && tx.state == TxState::Locked {
                self.changed.notify_all();
            }
        }
    }

    /// Tells the background thread when the log runs low.
    pub(crate) fn wake_checkpointer(&self) {
        if let Some(background) = &*self.background.lock() {
            background.request_checkpoint();
        }
    }

    /// Blocks in use beyond which checkpoints begin early, and what they aim at.
    pub(crate) fn watermarks(&self) -> (u32, u32) {
        self.log.as_ref().map_or((0, 0), |log| (log.ring() / 2, log.ring() / 4 * 3))
    }

    /// The transaction that takes handles.
    pub fn running_tid(&self) -> Option<Tid> {
        self.state.lock().running.as_ref().map(|tx| tx.tid)
    }

    /// The last durable transaction.
    pub fn committed_tid(&self) -> Tid {
        self.state.lock().committed
    }

    /// Whether a transaction is durable. True for one that never was.
    pub fn is_committed(&self, tid: Tid) -> bool {
        let state = self.state.lock();
        tid_geq(state.committed, tid) || !is_pending(&state, tid)
    }

    /// What it is doing.
    pub fn status(&self) -> JournalStatus {
        let state = self.state.lock();
        let ring = self.log.as_ref().map_or(0, Log::ring);
        JournalStatus {
            running: state.running.as_ref().map(|tx| (tx.tid, tx.state)),
            committing: state.committing,
            committed: state.committed,
            used_blocks: ring - state.free,
            ring_blocks: ring,
            checkpoints: state.checkpoints.len(),
            kept_blocks: state.home.len(),
        }
    }

    /// The age at which the timer commits the running transaction.
    pub fn commit_interval(&self) -> Duration {
        self.config.commit_interval
    }

    /// Calls `f` with each transaction after it became durable: only then may blocks
    /// that it freed be used again. Never called without a journal. `f` runs in the
    /// committing thread, which may hold the caller's locks: it takes none that is
    /// held over [`Journal::start`] or [`Journal::commit`].
    pub fn on_commit(&self, f: OnCommit) {
        self.on_commit.write().push(f);
    }

    /// Calls `f` once, when the journal is aborted, in the thread that found the error and
    /// under whatever locks it holds.
    pub fn on_abort(&self, f: OnAbort) {
        self.on_abort.write().push(f);
    }

    /// Calls `f` when the timer is about to commit, in the journal's own thread, which holds
    /// no lock: what is to be in that transaction can still be put there.
    pub fn before_commit(&self, f: BeforeCommit) {
        self.before_commit.write().push(f);
    }

    /// Stops the journal for good: what is in memory stays readable and nothing is
    /// written any more. Notes the error in the journal's superblock.
    pub fn abort(&self, why: JournalError) {
        let mut state = self.state.lock();
        if state.aborted.is_some() {
            return;
        }
        log::error!("journal aborted: {why}");
        let is_error = why != JournalError::Shutdown;
        let errno = why.errno();
        state.aborted = Some(why.clone());
        drop(state);
        self.changed.notify_all();
        if is_error
            && let Some(log) = &self.log
            && let Err(error) = log.write_errno(errno)
        {
            log::error!("noting the journal's error failed too: {error}");
        }
        for call in self.on_abort.read().iter() {
            call(&why);
        }
    }

    /// Why it was aborted.
    pub fn aborted(&self) -> Option<JournalError> {
        self.state.lock().aborted.clone()
    }

    /// Aborts with an error and passes it on.
    pub(crate) fn abort_with(&self, why: JournalError) -> JournalError {
        self.abort(why.clone());
        why
    }

    /// Commits, brings everything home and empties the log, for an unmount; then no
    /// handle starts any more. Without a journal, writes what is dirty.
    ///
    /// # Errors
    /// `Aborted`, or what failed; the log then stays to be replayed.
    pub fn close(&self) -> Result<()> {
        let result = self.checkpoint_all();
        let mut state = self.state.lock();
        state.closed = true;
        drop(state);
        self.changed.notify_all();
        let background = self.background.lock().take();
        drop(background);
        result
    }
}

/// Whether a transaction waits to become durable.
pub(crate) fn is_pending(state: &State, tid: Tid) -> bool {
    let running = state.running.as_ref().is_some_and(|tx| tx.tid == tid);
    running || state.committing.is_some_and(|(committing, _)| committing == tid)
}

/// Blocks of the log one transaction may take.
fn transaction_budget(log: &Log) -> u32 {
    log.ring() / 4
}

/// Blocks of the log that a transaction's revokes take.
pub(crate) fn revoke_blocks(log: &Log, tx: &Transaction) -> u32 {
    u32::try_from(tx.revoked.len().div_ceil(log.records_per_revoke())).unwrap_or(u32::MAX)
}

fn slack(log: &Log) -> u32 {
    SLACK_BLOCKS.min(log.ring() / 8)
}

fn new_state(next_tid: Tid, head: u32, free: u32) -> State {
    State {
        running: None,
        committing: None,
        next_tid,
        committed: next_tid.wrapping_sub(1),
        head,
        free,
        checkpoints: VecDeque::with_capacity(64),
        home: block_map(free),
        spare: (0..2).map(|_| block_map(free / 4)).collect(),
        barriers: 0,
        aborted: None,
        closed: false,
    }
}

impl CheckpointHook for Journal {
    fn request_checkpoint(&self) {
        self.wake_checkpointer();
    }
}
