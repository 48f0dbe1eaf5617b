//! Commit: making the running transaction durable.
//!
//! The thread that wants the commit does it; others that want the same one wait
//! for it. Steps, each visible as a [`TxState`]:
//! 1. Locked: no new handles; wait for the open ones.
//! 2. Switch: the transaction's place in the log is taken, and the next one may open.
//! 3. Flush: revoke, descriptor and metadata blocks are copied and written.
//! 4. Commit: the commit block behind a flush, durable itself.
//! 5. Finished: its buffers wait for their checkpoint; the call-backs run.

use uext_blockdev::mutant;
use uext_pagecache::Buffer;
use uext_sync::MutexGuard;
use uext_sync::time::{Duration, Instant};

use crate::error::{JournalError, Result};
use crate::handle::HANDLE;
use crate::journal::{Journal, is_pending};
use crate::log::{Log, Place};
use crate::tid::{Tid, tid_geq};
use crate::transaction::{Checkpoint, State, Transaction, TxState};

impl Journal {
    /// Waits until a transaction is durable and returns at once when it is, or when it
    /// holds nothing. Concurrent callers share one commit. The caller must not hold a
    /// handle or a buffer's content lock.
    ///
    /// # Errors
    /// `Aborted`, or what aborted the journal just now: the transaction may be lost.
    pub fn commit(&self, tid: Tid) -> Result<()> {
        self.commit_covering(tid).map(|_| ())
    }

    /// As [`Journal::commit`]; whether the commit's flush began after this call. Then data
    /// written before the call is durable too; else that needs a flush of its own.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub fn commit_covering(&self, tid: Tid) -> Result<bool> {
        let Some(log) = &self.log else { return Ok(false) };
        HANDLE.check();
        let mut state = self.state.lock();
        let covers = state.running.as_ref().is_some_and(|tx| tx.tid == tid);
        loop {
            if tid_geq(state.committed, tid) || !is_pending(&state, tid) {
                return match &state.aborted {
                    Some(why) => Err(why.as_aborted()),
                    None => Ok(covers),
                };
            }
            if let Some(why) = &state.aborted {
                return Err(why.as_aborted());
            }
            if state.committing.is_some() {
                self.changed.wait(&mut state);
                continue;
            }
            return self.commit_running(log, state);
        }
    }

    /// Makes everything before the call durable.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub fn commit_all(&self) -> Result<()> {
        self.commit_all_covering().map(|_| ())
    }

    /// As [`Journal::commit_all`], and tells what [`Journal::commit_covering`] tells.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub fn commit_all_covering(&self) -> Result<bool> {
        let state = self.state.lock();
        let newest = state.running.as_ref().map(|tx| tx.tid);
        let newest = newest.or(state.committing.map(|(tid, _)| tid));
        let committed = state.committed;
        drop(state);
        self.commit_covering(newest.unwrap_or(committed))
    }

    /// Commits the running transaction when it is older than `age`.
    pub(crate) fn commit_old(&self, age: Duration) -> Result<()> {
        let state = self.state.lock();
        let old = state.running.as_ref().filter(|tx| tx.started.elapsed() >= age);
        let Some(tid) = old.map(|tx| tx.tid) else { return Ok(()) };
        drop(state);
        self.before_commit.read().iter().for_each(|call| call());
        self.commit(tid)
    }

    /// How long until the running transaction is `age` old.
    pub(crate) fn time_to_commit(&self, age: Duration) -> Duration {
        let state = self.state.lock();
        let due = state.running.as_ref().and_then(|tx| tx.started.checked_add(age));
        let left = due.map_or(age, |due| due.saturating_duration_since(Instant::now()));
        left.max(Duration::from_millis(10))
    }

    /// Commits the running transaction; `false` when it holds nothing. Nobody else is committing.
    fn commit_running(&self, log: &Log, mut state: MutexGuard<'_, State>) -> Result<bool> {
        let Some(tid) = self.lock_transaction(&mut state) else { return Ok(false) };
        if let Some(why) = &state.aborted {
            let error = why.as_aborted();
            state.committing = None;
            self.changed.notify_all();
            return Err(error);
        }
        let Some((transaction, place)) = switch(&mut state, log) else {
            // More revokes than the slack of the log was made for.
            let text = "the log has no room for a transaction".to_owned();
            drop(state);
            return Err(self.fail_commit(JournalError::Unsupported(text)));
        };
        drop(state);
        self.changed.notify_all();
        if let Err(error) = self.write_transaction(log, &transaction, &place) {
            return Err(self.fail_commit(error));
        }
        self.finish(transaction, place);
        self.after_commit(tid);
        Ok(true)
    }

    /// Stops new handles and waits for the open ones. `None` when the transaction turned
    /// out empty: then it goes on running.
    fn lock_transaction(&self, state: &mut MutexGuard<'_, State>) -> Option<Tid> {
        let tx = state.running.as_mut()?;
        let tid = tx.tid;
        tx.state = TxState::Locked;
        state.committing = Some((tid, TxState::Locked));
        while state.running.as_ref().is_some_and(|tx| tx.handles > 0) {
            self.changed.wait(state);
        }
        if let Some(tx) = state.running.as_mut().filter(|tx| tx.is_empty()) {
            tx.state = TxState::Running;
            state.committing = None;
            self.changed.notify_all();
            return None;
        }
        Some(tid)
    }

    fn set_commit_state(&self, tid: Tid, step: TxState) {
        self.state.lock().committing = Some((tid, step));
    }

    fn fail_commit(&self, error: JournalError) -> JournalError {
        let error = self.abort_with(error);
        self.state.lock().committing = None;
        self.changed.notify_all();
        error
    }

    fn write_transaction(&self, log: &Log, tx: &Transaction, place: &Place) -> Result<()> {
        let revoked = if mutant!("revoke-not-written") { None } else { Some(&tx.revoked) };
        if !tx.revoked.is_empty() {
            log.set_revoke_feature()?;
        }
        log.begin_if_empty(tx.tid, place.start)?;
        self.set_commit_state(tx.tid, TxState::Flush);
        let mut writer = log.writer(tx.tid, place);
        writer.revokes(revoked.into_iter().flatten().copied())?;
        let copy = |buffer: &Buffer, bytes: &mut [u8]| copy_for_log(buffer, tx.tid, bytes);
        writer.blocks_of(tx.buffers.values(), copy)?;
        writer.finish_blocks()?;
        self.set_commit_state(tx.tid, TxState::Commit);
        if !std::sync::Arc::ptr_eq(&log.device, self.buffers.device()) {
            // Data that the transaction maps lies on the other device.
            log.flush(&**self.buffers.device())?;
        }
        writer.commit()
    }

    /// Hands the buffers of a durable transaction to their checkpoint.
    fn finish(&self, mut transaction: Transaction, place: Place) {
        let tid = transaction.tid;
        let mut state = self.state.lock();
        let left = transaction.buffers.len();
        for (block, buffer) in transaction.buffers.drain() {
            let older = {
                let mut head = buffer.journal();
                head.committing = None;
                head.frozen = None;
                head.checkpoint.replace(tid)
            };
            if let Some(older) = older {
                state.leave_checkpoint(older, block);
            }
            state.home.insert(block, (tid, buffer));
        }
        state.spare.push(std::mem::take(&mut transaction.buffers));
        for (&block, buffer) in &transaction.forgotten {
            let mut head = buffer.journal();
            if head.running == Some(tid) {
                head.running = None;
            }
            if head.committing == Some(tid) {
                head.committing = None;
                head.frozen = None;
            }
            if let Some(old) = head.checkpoint.take() {
                state.leave_checkpoint(old, block);
            }
        }
        state.checkpoints.push_back(Checkpoint {
            tid,
            log_start: place.start,
            log_blocks: place.blocks,
            left,
        });
        state.committed = tid;
        state.committing = Some((tid, TxState::Finished));
        let is_due = self.is_checkpoint_due(&state);
        drop(state);
        self.changed.notify_all();
        if !transaction.forgotten.is_empty() {
            self.drop_forgotten(&transaction);
        }
        if is_due {
            self.wake_checkpointer();
        }
    }

    /// Drops what is cached of blocks a durable transaction freed.
    fn drop_forgotten(&self, transaction: &Transaction) {
        // A copy that is on its way home must not arrive after the block has become
        // something else, which the call-backs of this commit allow.
        drop(self.home_io.lock());
        for (&block, buffer) in &transaction.forgotten {
            if !buffer.journal().is_pinned() {
                self.buffers.forget(block);
            }
        }
    }

    fn after_commit(&self, tid: Tid) {
        for call in self.on_commit.read().iter() {
            call(tid);
        }
        self.state.lock().committing = None;
        self.changed.notify_all();
    }
}

/// Takes the locked transaction out of the way and a place in the log for it; `None`
/// when there is none.
fn switch(state: &mut State, log: &Log) -> Option<(Transaction, Place)> {
    let tx = state.running.as_mut()?;
    let blocks = log.blocks_needed(tx.buffers.len(), tx.revoked.len());
    let free = state.free.checked_sub(blocks)?;
    tx.state = TxState::Switch;
    let transaction = state.running.take()?;
    let place = Place { start: state.head, blocks, free };
    state.free = free;
    state.head = log.advance(place.start, blocks);
    state.committing = Some((transaction.tid, TxState::Switch));
    Some((transaction, place))
}

/// Copies the contents that transaction `tid` gives a buffer.
fn copy_for_log(buffer: &Buffer, tid: Tid, bytes: &mut [u8]) {
    if copy_frozen(buffer, tid, bytes) {
        return;
    }
    let content = buffer.read();
    // A writer of the next transaction may have come first.
    if copy_frozen(buffer, tid, bytes) {
        return;
    }
    bytes.copy_from_slice(&content);
    let mut head = buffer.journal();
    head.running = None;
    head.committing = Some(tid);
}

fn copy_frozen(buffer: &Buffer, tid: Tid, bytes: &mut [u8]) -> bool {
    let mut head = buffer.journal();
    if head.committing != Some(tid) {
        return false;
    }
    match head.frozen.take() {
        Some(frozen) => {
            bytes.copy_from_slice(&frozen);
            true
        }
        None => false,
    }
}
