//! A handle: one atomic update of the filesystem.
//!
//! Invariants:
//! - Everything written under a handle belongs to one transaction (until
//!   [`Handle::restart`]), and a transaction commits only when all its handles
//!   have stopped: an update is on the disk whole or not at all.
//! - A [`WriteGuard`] does not outlive its handle, so nobody changes a block that
//!   a commit copies.
//! - Whoever first changes a block of the committing transaction on behalf of the
//!   running one freezes a copy, unless the commit has copied it already.
//!
//! What a buffer's [`JournalHead`](uext_pagecache::buffer::JournalHead) says, with T committing:
//!
//! | `running` | `committing` | `frozen` | |
//! |---|---|---|---|
//! | T | - | - | T holds it; the commit has not copied it |
//! | - or T+1 | T | - | T has copied it |
//! | T+1 | T | copy | changed since; T's contents are in the copy |

use std::cell::Cell;
use std::collections::hash_map::Entry;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use uext_sync::atomic::Ordering;
use uext_sync::lockdep::{Class, Held};

use uext_blockdev::{AlignedBuf, mutant};
use uext_pagecache::{Buffer, BufferWriteGuard};

use crate::error::{JournalError, Result};
use crate::journal::Journal;
use crate::tid::Tid;
use crate::transaction::TxState;

/// For the order of locks: a handle, which whoever starts one or commits may wait for.
pub static HANDLE: Class = Class::new("a journal handle");

/// An update in progress; dropping it ends the update.
#[must_use = "an update ends when its handle is dropped"]
pub struct Handle {
    journal: Arc<Journal>,
    tid: Tid,
    /// Blocks it may still add to its transaction.
    credits: Cell<u32>,
    sync: Cell<bool>,
    /// The filesystem's own; see [`Handle::note`].
    note: Cell<u32>,
    /// Counted in its transaction; not after a restart that failed.
    active: bool,
    held: Option<Held>,
}

impl Handle {
    pub(crate) fn new(journal: Arc<Journal>, tid: Tid, credits: u32) -> Self {
        let (credits, sync, note) = (Cell::new(credits), Cell::new(false), Cell::new(0));
        let held = journal.has_journal().then(|| HANDLE.acquired());
        Self { journal, tid, credits, sync, note, active: true, held }
    }

    /// The transaction it belongs to; 0 without a journal.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// The journal.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Blocks it may still add. Not counted without a journal.
    pub fn credits_left(&self) -> u32 {
        self.credits.get()
    }

    /// A word that the filesystem wrote on the handle; 0 at first.
    pub fn note(&self) -> u32 {
        self.note.get()
    }

    /// Sets [`Handle::note`].
    pub fn set_note(&self, note: u32) {
        self.note.set(note);
    }

    /// Asks for a commit when the handle ends, in the thread that drops it.
    pub fn set_sync(&self) {
        self.sync.set(true);
    }

    /// A metadata block's bytes, to be changed: `jbd2_journal_get_write_access` and
    /// `jbd2_journal_dirty_metadata` in one. Costs a credit when the block is new to the
    /// transaction.
    ///
    /// # Errors
    /// `Aborted`, or `NoCredits`.
    pub fn write<'b>(&'b self, buf: &'b Buffer) -> Result<WriteGuard<'b>> {
        debug_assert!(buf.is_uptodate(), "block {} changed before it was read", buf.block());
        let guard = buf.write();
        self.adopt(buf, &guard)?;
        Ok(WriteGuard { guard: Some(guard), buf, mark_dirty: !self.journal.has_journal() })
    }

    /// A newly allocated block's bytes, zeroed: `jbd2_journal_get_create_access`.
    ///
    /// # Errors
    /// As [`Handle::write`].
    pub fn create<'b>(&'b self, buf: &'b Buffer) -> Result<WriteGuard<'b>> {
        let mut guard = buf.write();
        self.adopt(buf, &guard)?;
        guard.fill(0);
        buf.set_uptodate();
        Ok(WriteGuard { guard: Some(guard), buf, mark_dirty: !self.journal.has_journal() })
    }

    /// Makes the buffer the transaction's. The caller holds its contents exclusively.
    fn adopt(&self, buf: &Buffer, bytes: &[u8]) -> Result<()> {
        if !self.journal.has_journal() {
            return Ok(());
        }
        let known = buf.journal().running == Some(self.tid);
        if known && self.active && !self.journal.has_forgotten.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut state = self.journal.state.lock();
        if let Some(why) = state.refusal() {
            return Err(why);
        }
        let tx = state.running.as_mut().filter(|tx| tx.tid == self.tid && self.active);
        let tx = tx.ok_or(JournalError::Closed)?;
        if let Entry::Vacant(place) = tx.buffers.entry(buf.block()) {
            let left = self.credits.get().checked_sub(1);
            self.credits.set(left.ok_or(JournalError::NoCredits { block: buf.block() })?);
            place.insert(buf.clone());
        }
        // A block that is used again must be replayed again.
        tx.revoked.remove(&buf.block());
        tx.forgotten.remove(&buf.block());
        self.take_over(buf, bytes);
        Ok(())
    }

    /// Marks the buffer as the running transaction's; keeps the contents an older one needs.
    fn take_over(&self, buf: &Buffer, bytes: &[u8]) {
        let mut head = buf.journal();
        if let Some(older) = head.running
            && older != self.tid
        {
            head.committing = Some(older);
            if mutant!("frozen-copy-not-taken") {
                head.running = Some(self.tid);
                return;
            }
            head.frozen = Some(Arc::new(AlignedBuf::from_slice(bytes)));
        }
        head.running = Some(self.tid);
    }

    /// The metadata block was freed: it leaves the transaction, copies of it in the log
    /// are not replayed, and what is cached of it is dropped when the transaction has
    /// committed. Writing or creating the block again in this transaction undoes this.
    pub fn revoke(&self, block: u64) {
        if !self.journal.has_journal() {
            self.journal.buffers.forget(block);
            return;
        }
        let buffer = self.journal.buffers.find(block);
        let guard = buffer.as_ref().map(|buffer| buffer.read());
        let mut state = self.journal.state.lock();
        let Some(tx) = state.running.as_mut().filter(|tx| tx.tid == self.tid) else { return };
        tx.revoked.insert(block);
        // WHY-RELAXED: who writes this block again comes after this call by the filesystem's locks.
        self.journal.has_forgotten.store(true, Ordering::Relaxed);
        if tx.buffers.remove(&block).is_some() {
            // Its place is free for another block of this handle.
            self.credits.set(self.credits.get() + 1);
        }
        if let (Some(buffer), Some(guard)) = (&buffer, &guard) {
            self.take_over(buffer, guard);
            tx.forgotten.insert(block, buffer.clone());
        }
    }

    /// Asks for more credits without ending the update. `false` when the transaction has
    /// no room or is about to commit: then [`Handle::restart`] at a point where the
    /// filesystem is consistent.
    ///
    /// # Errors
    /// `Aborted`.
    pub fn extend(&self, credits: u32) -> Result<bool> {
        let Some(log) = &self.journal.log else {
            self.credits.set(self.credits.get().saturating_add(credits));
            return Ok(true);
        };
        let mut state = self.journal.state.lock();
        if let Some(why) = state.refusal() {
            return Err(why);
        }
        let Some(tx) = &mut state.running else { return Ok(false) };
        if tx.state != TxState::Running || !self.journal.has_room(log, tx, credits) {
            return Ok(false);
        }
        tx.outstanding += credits;
        self.credits.set(self.credits.get() + credits);
        Ok(true)
    }

    /// Ends the update and begins another with `credits`, perhaps in a later transaction.
    ///
    /// # Errors
    /// As [`Journal::start`]; the handle then belongs to no transaction and can only be dropped.
    pub fn restart(&mut self, credits: u32) -> Result<()> {
        if std::mem::replace(&mut self.active, false) {
            self.journal.leave(self.tid, self.credits.replace(0));
        }
        self.held = None;
        self.tid = self.journal.join(credits)?;
        self.held = self.journal.has_journal().then(|| HANDLE.acquired());
        self.credits.set(credits);
        self.active = true;
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.active {
            self.journal.leave(self.tid, self.credits.get());
        }
        self.held = None;
        if self.sync.get()
            && let Err(error) = self.journal.commit(self.tid)
        {
            log::debug!("commit of a synchronous handle: {error}");
        }
    }
}

/// A metadata block's bytes under a handle.
pub struct WriteGuard<'b> {
    /// `Some` until dropped.
    guard: Option<BufferWriteGuard<'b>>,
    buf: &'b Buffer,
    mark_dirty: bool,
}

impl WriteGuard<'_> {
    /// The block.
    pub fn block(&self) -> u64 {
        self.buf.block()
    }

    /// The buffer.
    pub fn buffer(&self) -> &Buffer {
        self.buf
    }
}

impl Deref for WriteGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.guard.as_deref().unwrap_or(&[])
    }
}

impl DerefMut for WriteGuard<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.guard.as_deref_mut().unwrap_or(&mut [])
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if self.mark_dirty {
            self.buf.mark_dirty();
        }
        self.guard = None;
    }
}
