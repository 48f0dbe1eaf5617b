//! Checkpoint: bringing committed blocks home, so that the log's tail may move.
//!
//! Order: the blocks' writes complete, a flush, the journal superblock with the
//! new tail (durable itself), and only then are the blocks of the log free.
//!
//! A buffer that the running or the committing transaction holds is not written:
//! its contents may not be committed. It is freed from the old transaction by
//! that newer one's commit, which the checkpoint asks for.

use std::ops::Range;
use std::sync::Arc;

use uext_blockdev::{AlignedBuf, Bio, BioFlags, BioOp, BioSet, BioVec, Sector, mutant};
use uext_pagecache::Buffer;

use crate::error::{IoWhat, JournalError, Result};
use crate::journal::Journal;
use crate::log::Log;
use crate::tid::{Tid, tid_geq, tid_gt};

/// Bytes copied at once.
const BATCH_BYTES: usize = 1 << 20;
/// Most buffers that are looked for, and sorted, at once.
const MAX_BUFFERS: usize = 4096;
/// Bios that go out together, each a run of blocks.
const MAX_BIOS: usize = 64;

/// What a checkpoint works with; kept, so that it needs no memory.
pub(crate) struct Workspace {
    /// To be brought home, in block order.
    buffers: Vec<Buffer>,
    /// Of these, by index, the ones that are being written, and for which transaction.
    written: Vec<(usize, Tid)>,
    memory: Arc<AlignedBuf>,
    batch: Vec<Bio>,
    bios: BioSet,
}

impl Workspace {
    /// For blocks of this size; without a journal nothing is needed.
    pub(crate) fn new(block_size: Option<u32>) -> Self {
        let (buffers, bytes) = block_size.map_or((0, 0), |_| (MAX_BUFFERS, BATCH_BYTES));
        Self {
            buffers: Vec::with_capacity(buffers),
            written: Vec::with_capacity(block_size.map_or(0, batch_blocks)),
            memory: Arc::new(AlignedBuf::new(bytes)),
            batch: Vec::with_capacity(MAX_BIOS),
            bios: BioSet::reserve_only(MAX_BIOS, 1),
        }
    }
}

fn batch_blocks(block_size: u32) -> usize {
    (BATCH_BYTES / block_size as usize).max(1)
}

/// What a checkpoint is to achieve; with an empty log there is no more to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Aim {
    /// Blocks of the log that are free.
    pub free: u32,
    /// The transaction through which everything is home, but for what newer ones hold too.
    pub home: Option<Tid>,
}

/// What one step of a checkpoint is to do.
enum Step {
    /// Nothing: there is space.
    Done,
    /// Bring home what the workspace holds.
    Write,
    /// A newer transaction holds the oldest one's last buffers.
    Commit(Tid),
    /// The oldest transactions are home: move the tail.
    MoveTail,
}

impl Journal {
    /// Checkpoints the oldest transactions until the aim is reached.
    pub(crate) fn checkpoint(&self, aim: Aim) -> Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        let mut one = self.checkpointing.lock();
        loop {
            match self.next_step(aim, &mut one.buffers)? {
                Step::Done => return Ok(()),
                Step::Write => {
                    let written = self.write_home(log, &mut one);
                    one.buffers.clear();
                    written.map_err(|error| self.abort_with(error))?;
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
        self.checkpoint(Aim { free: log.ring(), home: None })?;
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

    /// What is to be done; fills `write`, which is empty, with what is to be brought home.
    fn next_step(&self, aim: Aim, write: &mut Vec<Buffer>) -> Result<Step> {
        let state = self.state.lock();
        if let Some(why) = &state.aborted {
            return Err(why.as_aborted());
        }
        let mut free = state.free;
        let mut newest = None;
        for old in &state.checkpoints {
            if free >= aim.free && aim.home.is_none_or(|home| tid_gt(old.tid, home)) {
                break;
            }
            free += old.log_blocks;
            newest = Some(old.tid);
        }
        let Some(newest) = newest else { return Ok(Step::Done) };
        let mut held = None;
        let mut left = state.home.values().filter(|(tid, _)| tid_geq(newest, *tid));
        while write.len() < MAX_BUFFERS
            && let Some((_, buffer)) = left.next()
        {
            let head = buffer.journal();
            match head.running.or(head.committing) {
                Some(newer) => held = held.or(Some(newer)),
                None => write.push(buffer.clone()),
            }
        }
        if !write.is_empty() {
            return Ok(Step::Write);
        }
        // Nothing of the oldest is left to write, but perhaps it is not free yet.
        let is_held = state.checkpoints.front().is_some_and(|oldest| oldest.left > 0);
        match held {
            Some(newer) if is_held && state.free < aim.free => Ok(Step::Commit(newer)),
            Some(_) if is_held => Ok(Step::Done),
            _ => Ok(Step::MoveTail),
        }
    }

    /// Writes committed contents home, in block order, and waits.
    fn write_home(&self, log: &Log, work: &mut Workspace) -> Result<()> {
        work.buffers.sort_unstable_by_key(|buffer| buffer.block());
        work.buffers.dedup_by_key(|buffer| buffer.block());
        let mut from = 0;
        while from < work.buffers.len() {
            let end = work.buffers.len().min(from + batch_blocks(log.block_size));
            self.write_batch(log, work, from..end)?;
            from = end;
        }
        Ok(())
    }

    fn write_batch(&self, log: &Log, work: &mut Workspace, range: Range<usize>) -> Result<()> {
        // From before the contents are judged until they are on the disk: a commit
        // that frees one of the blocks waits for this.
        let _on_the_way = self.home_io.lock();
        let size = log.block_size as usize;
        if Arc::get_mut(&mut work.memory).is_none() {
            // A device that records kept the memory of a finished bio: leave it that.
            work.memory = Arc::new(AlignedBuf::new(BATCH_BYTES));
        }
        let bytes = Arc::get_mut(&mut work.memory).expect("just found or made unshared");
        work.written.clear();
        for index in range {
            let buffer = &work.buffers[index];
            let content = buffer.read();
            let head = buffer.journal();
            let busy = head.running.is_some() || head.committing.is_some();
            let Some(tid) = head.checkpoint.filter(|_| !busy) else { continue };
            drop(head);
            let at = work.written.len() * size;
            bytes[at..at + size].copy_from_slice(&content);
            work.written.push((index, tid));
        }
        self.submit_home(log, work)?;
        let mut state = self.state.lock();
        for &(index, tid) in &work.written {
            let buffer = &work.buffers[index];
            let mut head = buffer.journal();
            if head.checkpoint == Some(tid) {
                head.checkpoint = None;
                state.leave_checkpoint(tid, buffer.block());
            }
        }
        Ok(())
    }

    /// Writes what was copied, with one bio for each run of adjacent blocks, and waits.
    fn submit_home(&self, log: &Log, work: &mut Workspace) -> Result<()> {
        let skipped = usize::from(mutant!("checkpoint-skips-buffer") && !work.written.is_empty());
        let (block_size, count) = (log.block_size, work.written.len() - skipped);
        let block_of = |at: usize| work.buffers[work.written[at].0].block();
        let mut from = 0;
        for at in 1..=count {
            if at < count && block_of(at - 1) + 1 == block_of(at) {
                continue;
            }
            // A block that is cached lies inside the device, whose bytes fit a u64.
            let sector = Sector::from_byte_offset(block_of(from) * u64::from(block_size));
            let flags = BioFlags::META | BioFlags::SYNC;
            let mut bio = work.bios.alloc(BioOp::Write, flags, sector);
            // Both are below the blocks of a batch.
            let (offset, blocks) = (from as u32, (at - from) as u32);
            let piece = (offset * block_size, blocks * block_size);
            bio.add_vec(BioVec::part(work.memory.clone(), piece.0, piece.1));
            work.batch.push(bio);
            from = at;
            if work.batch.len() < MAX_BIOS && at < count {
                continue;
            }
            self.buffers.device().submit_batch_wait(&mut work.batch);
            let failed =
                work.batch.iter().find_map(|bio| Some((bio.status().err()?, bio.sector())));
            work.batch.clear();
            if let Some((status, sector)) = failed {
                let block = sector.byte_offset() / u64::from(block_size);
                return Err(JournalError::io(IoWhat::WriteFs, block, status));
            }
        }
        Ok(())
    }

    /// Frees the log of the oldest transactions whose blocks are all home.
    fn move_tail(&self, log: &Log) -> Result<()> {
        let state = self.state.lock();
        let home = state.checkpoints.iter().take_while(|old| old.left == 0).count();
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
        if !mutant!("tail-not-moved") {
            log.write_tail(tid, start)?;
        }
        let mut state = self.state.lock();
        state.checkpoints.drain(..home);
        state.free += freed;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}
