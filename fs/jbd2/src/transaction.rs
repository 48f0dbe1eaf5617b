//! What one transaction holds, and what the journal knows of all of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use uext_pagecache::{Buffer, NumberMap};
use uext_sync::time::Instant;

use crate::error::JournalError;
use crate::tid::Tid;

/// Where a transaction stands on its way to the disk (`T_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxState {
    /// Takes handles.
    Running,
    /// Takes no new handles; waits for those it has.
    Locked,
    /// Its place in the log is taken; the next transaction may open.
    Switch,
    /// Its blocks go to the log.
    Flush,
    /// Its commit block goes to the log.
    Commit,
    /// Durable.
    Finished,
}

/// Something of blocks, by their number. It has room for what a transaction holds from the
/// start, so that neither a handle nor a commit needs memory for it.
pub(crate) type BlockMap<T> = NumberMap<u64, T>;

/// Most entries for which a map has room from the start.
const MAX_ROOM: usize = 16_384;

/// A map for `most` entries, or for as many as are kept room for; beyond that it grows.
pub(crate) fn block_map<T>(most: u32) -> BlockMap<T> {
    // Twice as many: a map that is half empty cleans up in place.
    let room = usize::try_from(most).unwrap_or(MAX_ROOM).min(MAX_ROOM) * 2;
    BlockMap::with_capacity_and_hasher(room, Default::default())
}

/// The running transaction.
pub(crate) struct Transaction {
    pub(crate) tid: Tid,
    pub(crate) state: TxState,
    pub(crate) started: Instant,
    /// Handles that have not stopped.
    pub(crate) handles: u32,
    /// Blocks it holds, and those its handles may still add.
    pub(crate) outstanding: u32,
    /// Blocks to log.
    pub(crate) buffers: BlockMap<Buffer>,
    /// Blocks it freed: nothing logged before it may be replayed over them.
    pub(crate) revoked: BTreeSet<u64>,
    /// Buffers of blocks it freed, which older transactions may still need if it
    /// never commits.
    pub(crate) forgotten: BTreeMap<u64, Buffer>,
}

impl Transaction {
    /// One that holds nothing; `buffers` is empty.
    pub(crate) fn new(tid: Tid, buffers: BlockMap<Buffer>) -> Self {
        Self {
            tid,
            state: TxState::Running,
            started: Instant::now(),
            handles: 0,
            outstanding: 0,
            buffers,
            revoked: BTreeSet::new(),
            forgotten: BTreeMap::new(),
        }
    }

    /// Whether committing it would change nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.buffers.is_empty() && self.revoked.is_empty() && self.forgotten.is_empty()
    }
}

/// A committed transaction some of whose blocks may not be home yet.
pub(crate) struct Checkpoint {
    pub(crate) tid: Tid,
    /// First block of the log it uses, and how many.
    pub(crate) log_start: u32,
    pub(crate) log_blocks: u32,
    /// How many of its blocks are in [`State::home`] still.
    pub(crate) left: usize,
}

/// Everything under the journal's list lock.
pub(crate) struct State {
    pub(crate) running: Option<Transaction>,
    /// The transaction being committed; set from the lock of the running one until
    /// its call-backs are through.
    pub(crate) committing: Option<(Tid, TxState)>,
    /// Number of the next transaction.
    pub(crate) next_tid: Tid,
    /// The last durable transaction.
    pub(crate) committed: Tid,
    /// Next free block of the log.
    pub(crate) head: u32,
    /// Blocks of the log not in use.
    pub(crate) free: u32,
    /// Committed transactions, oldest first.
    pub(crate) checkpoints: VecDeque<Checkpoint>,
    /// Their blocks that are not home, each with the newest of them that holds it.
    pub(crate) home: BlockMap<(Tid, Buffer)>,
    /// For the next transactions: there are two at a time, one running and one that commits.
    pub(crate) spare: Vec<BlockMap<Buffer>>,
    /// While not 0 no handle starts.
    pub(crate) barriers: u32,
    pub(crate) aborted: Option<JournalError>,
    pub(crate) closed: bool,
}

impl State {
    /// Takes a block out of the list of an older transaction.
    pub(crate) fn leave_checkpoint(&mut self, tid: Tid, block: u64) {
        if self.home.get(&block).is_none_or(|(of, _)| *of != tid) {
            return;
        }
        self.home.remove(&block);
        if let Some(old) = self.checkpoints.iter_mut().find(|old| old.tid == tid) {
            old.left -= 1;
        }
    }

    /// Why nothing may be started, if so.
    pub(crate) fn refusal(&self) -> Option<JournalError> {
        match &self.aborted {
            Some(why) => Some(why.as_aborted()),
            None if self.closed => Some(JournalError::Closed),
            None => None,
        }
    }
}
