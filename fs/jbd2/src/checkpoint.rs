//! Checkpoint: bringing committed blocks home, so that the log's tail may move.
//!
//! Order: the blocks' writes complete, a flush, the journal superblock with the
//! new tail (durable itself), and only then are the blocks of the log free.
//!
//! A buffer that the running or the committing transaction holds is not written:
//! its contents may not be committed. It is freed from the old transaction by
//! that newer one's commit, which the checkpoint asks for.

use std::sync::Arc;

use uext_blockdev::{AlignedBuf, Bio, BioFlags, BioOp, BioVec, Sector};
use uext_pagecache::Buffer;

use crate::error::{IoWhat, JournalError, Result};
use crate::journal::Journal;
use crate::log::Log;
use crate::tid::Tid;

/// Bytes written between two waits.
const BATCH_BYTES: usize = 1 << 20;

/// What one step of a checkpoint is to do.
enum Step {
    /// Nothing: there is space.
    Done,
    /// Bring these home.
    Write(Vec<Buffer>),
    /// A newer transaction holds the oldest one's last buffers.
    Commit(Tid),
    /// The oldest transactions are home: move the tail.
    MoveTail,
}

impl Journal {
    /// Checkpoints the oldest transactions until `needed` blocks of the log are free, or
    /// the log is empty.
    pub(crate) fn checkpoint(&self, needed: u32) -> Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        let _one = self.checkpointing.lock();
        loop {
            match self.next_step(needed)? {
                Step::Done => return Ok(()),
                Step::Write(buffers) => {
                    self.write_home(log, &buffers).map_err(|error| self.abort_with(error))?;
                }
                Step::Commit(tid) => self.commit(tid)?,
                Step::MoveTail => self.move_tail(log).map_err(|error| self.abort_with(error))?,
            }
        }
    }

    /// Commits and brings everything home: the log is empty afterwards. Handles wait
    /// meanwhile. Without a journal, writes what is dirty and flushes.
    ///
    /// # Errors
    /// `Aborted`, or what failed.
    pub fn checkpoint_all(&self) -> Result<()> {
        let Some(log) = &self.log else {
            let device = self.buffers.device();
            self.buffers
                .write_dirty()
                .map_err(|status| JournalError::io(IoWhat::WriteFs, 0, status))?;
            return device.flush().map_err(|status| JournalError::io(IoWhat::Flush, 0, status));
        };
        self.state.lock().barriers += 1;
        let result = self.empty_log(log);
        self.state.lock().barriers -= 1;
        self.changed.notify_all();
        result
    }

    fn empty_log(&self, log: &Log) -> Result<()> {
        self.commit_all()?;
        self.checkpoint(log.ring())?;
        let _one = self.checkpointing.lock();
        let state = self.state.lock();
        if let Some(why) = &state.aborted {
            return Err(why.as_aborted());
        }
        // A running transaction has its number already; the next one gets it again.
        let next = state.running.as_ref().map_or(state.next_tid, |tx| tx.tid);
        let head = state.head;
        drop(state);
        log.flush(&**self.buffers.device()).map_err(|error| self.abort_with(error))?;
        log.write_empty(next, head).map_err(|error| self.abort_with(error))
    }

    fn next_step(&self, needed: u32) -> Result<Step> {
        let state = self.state.lock();
        if let Some(why) = &state.aborted {
            return Err(why.as_aborted());
        }
        if state.free >= needed || state.checkpoints.is_empty() {
            return Ok(Step::Done);
        }
        let mut free = state.free;
        let mut write = Vec::new();
        let mut held = None;
        for old in &state.checkpoints {
            if free >= needed {
                break;
            }
            free += old.log_blocks;
            for buffer in old.buffers.values() {
                let head = buffer.journal();
                match head.running.or(head.committing) {
                    Some(newer) => held = held.or(Some(newer)),
                    None => write.push(buffer.clone()),
                }
            }
            if held.is_some() && !write.is_empty() {
                break;
            }
        }
        if !write.is_empty() {
            return Ok(Step::Write(write));
        }
        match held {
            // Nothing of the oldest is left to write, but it is not free yet.
            Some(newer) if state.checkpoints.front().is_some_and(|c| !c.buffers.is_empty()) => {
                Ok(Step::Commit(newer))
            }
            _ => Ok(Step::MoveTail),
        }
    }

    /// Writes committed contents home, in block order, and waits.
    fn write_home(&self, log: &Log, buffers: &[Buffer]) -> Result<()> {
        let mut sorted: Vec<&Buffer> = buffers.iter().collect();
        sorted.sort_unstable_by_key(|buffer| buffer.block());
        sorted.dedup_by_key(|buffer| buffer.block());
        let size = log.block_size as usize;
        let mut memory = Arc::new(AlignedBuf::new(BATCH_BYTES.min(size * sorted.len())));
        for batch in sorted.chunks((BATCH_BYTES / size).max(1)) {
            if Arc::get_mut(&mut memory).is_none() {
                memory = Arc::new(AlignedBuf::new(size * batch.len()));
            }
            self.write_batch(log, batch, &mut memory)?;
        }
        Ok(())
    }

    fn write_batch(
        &self,
        log: &Log,
        batch: &[&Buffer],
        memory: &mut Arc<AlignedBuf>,
    ) -> Result<()> {
        // From before the contents are judged until they are on the disk: a commit
        // that frees one of the blocks waits for this.
        let _on_the_way = self.home_io.lock();
        let size = log.block_size as usize;
        let bytes = Arc::get_mut(memory).expect("the caller made sure that it is unshared");
        let mut written: Vec<(&Buffer, Tid)> = Vec::with_capacity(batch.len());
        for &buffer in batch {
            let content = buffer.read();
            let head = buffer.journal();
            let busy = head.running.is_some() || head.committing.is_some();
            let Some(tid) = head.checkpoint.filter(|_| !busy) else { continue };
            drop(head);
            let at = written.len() * size;
            bytes[at..at + size].copy_from_slice(&content);
            written.push((buffer, tid));
        }
        let bios = home_bios(&written, memory, log.block_size);
        let done = self.buffers.device().submit_bios_wait(bios);
        if let Some(failed) = done.iter().find(|bio| bio.status().is_err()) {
            let block = failed.sector().byte_offset() / u64::from(log.block_size);
            let status = failed.status().err().unwrap_or(uext_blockdev::BlkStatus::IoErr);
            return Err(JournalError::io(IoWhat::WriteFs, block, status));
        }
        drop(done);
        let mut state = self.state.lock();
        for (buffer, tid) in written {
            let mut head = buffer.journal();
            if head.checkpoint == Some(tid) {
                head.checkpoint = None;
                state.leave_checkpoint(tid, buffer.block());
            }
        }
        Ok(())
    }

    /// Frees the log of the oldest transactions whose blocks are all home.
    fn move_tail(&self, log: &Log) -> Result<()> {
        let state = self.state.lock();
        let home = state.checkpoints.iter().take_while(|old| old.buffers.is_empty()).count();
        let freed: u32 = state.checkpoints.iter().take(home).map(|old| old.log_blocks).sum();
        let (tid, start) = match state.checkpoints.get(home) {
            Some(oldest) => (oldest.tid, oldest.log_start),
            None => {
                // What comes next begins behind the last one.
                let last =
                    state.checkpoints.back().map(|old| (old.tid, old.log_start, old.log_blocks));
                let Some((tid, start, blocks)) = last else { return Ok(()) };
                (tid.wrapping_add(1), log.advance(start, blocks))
            }
        };
        drop(state);
        if !Arc::ptr_eq(&log.device, self.buffers.device()) {
            log.flush(&**self.buffers.device())?;
        }
        // Its PREFLUSH makes the blocks' writes durable first.
        log.write_tail(tid, start)?;
        let mut state = self.state.lock();
        state.checkpoints.drain(..home);
        state.free += freed;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}

/// One bio for each run of adjacent blocks, from consecutive pieces of `memory`.
fn home_bios(sorted: &[(&Buffer, Tid)], memory: &Arc<AlignedBuf>, block_size: u32) -> Vec<Bio> {
    let mut bios = Vec::new();
    let mut from = 0;
    for at in 1..=sorted.len() {
        let joins =
            sorted.get(at).is_some_and(|next| sorted[at - 1].0.block() + 1 == next.0.block());
        if joins {
            continue;
        }
        // A block that is cached lies inside the device, whose bytes fit a u64.
        let sector = Sector::from_byte_offset(sorted[from].0.block() * u64::from(block_size));
        let mut bio = Bio::new(BioOp::Write, BioFlags::META | BioFlags::SYNC, sector);
        let (offset, count) = (from as u32, (at - from) as u32);
        bio.add_vec(BioVec::part(memory.clone(), offset * block_size, count * block_size));
        bios.push(bio);
        from = at;
    }
    bios
}
