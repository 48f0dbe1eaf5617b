//! The journal's share of the page cache: what a transaction holds, and what is committed
//! and not home, cannot be dropped.
//!
//! Of the blocks that are meant for it ([`JournalConfig::cached_blocks`](crate::JournalConfig))
//! a quarter may be in one transaction; from a quarter on that are not home the background
//! thread brings them there, and beyond a half no transaction opens before that was done.
//!
//! A checkpoint for memory's sake asks for no commit: what a newer transaction holds as well
//! stays in memory anyway, and that one would become small for nothing.

use uext_sync::MutexGuard;

use crate::checkpoint::Aim;
use crate::error::Result;
use crate::journal::{Journal, revoke_blocks};
use crate::log::Log;
use crate::tid::Tid;
use crate::transaction::{State, Transaction};

/// Blocks that a transaction may have, however little memory there is: more than any handle
/// needs.
const MIN_IN_TRANSACTION: u32 = 256;

impl Journal {
    /// Blocks that memory has for one transaction.
    pub(crate) fn most_in_transaction(&self) -> u32 {
        (self.config.cached_blocks / 4).max(MIN_IN_TRANSACTION)
    }

    /// Whether a transaction can take so many blocks more. What it freed is kept too, until it
    /// has committed.
    pub(crate) fn has_room(&self, log: &Log, tx: &Transaction, credits: u32) -> bool {
        let blocks = tx.outstanding.saturating_add(credits).saturating_add(revoke_blocks(log, tx));
        blocks <= self.max_credits() && tx.forgotten.len() <= self.most_in_transaction() as usize
    }

    /// The transaction through which all must come home so that no more than half of `most`
    /// blocks wait for that; `None` when there are no more than `most`.
    fn surplus(state: &State, most: u32) -> Option<Tid> {
        let (mut kept, most) = (state.home.len(), most as usize);
        if kept <= most {
            return None;
        }
        let mut through = None;
        for old in &state.checkpoints {
            if kept <= most / 2 {
                break;
            }
            kept = kept.saturating_sub(old.left);
            through = Some(old.tid);
        }
        through
    }

    /// Whether the background thread has something to do.
    pub(crate) fn is_checkpoint_due(&self, state: &State) -> bool {
        self.is_log_low(state) || Self::surplus(state, self.config.cached_blocks / 4).is_some()
    }

    fn is_log_low(&self, state: &State) -> bool {
        let ring = self.log.as_ref().map_or(0, Log::ring);
        state.free < ring - self.watermarks().0
    }

    /// What the background thread is to achieve. Who asked for it without one of the two
    /// reasons is the page cache.
    pub(crate) fn background_aim(&self) -> Aim {
        let state = self.state.lock();
        let home = Self::surplus(&state, self.config.cached_blocks / 4);
        let for_log = self.is_log_low(&state) || home.is_none();
        Aim { free: if for_log { self.watermarks().1 } else { 0 }, home }
    }

    /// Brings blocks home while too many wait for that; no transaction runs. Returns with the
    /// list lock held again, and with whether there was need: then anything may have changed.
    pub(crate) fn wait_for_memory<'s>(
        &'s self,
        state: MutexGuard<'s, State>,
    ) -> Result<(MutexGuard<'s, State>, bool)> {
        let most = self.config.cached_blocks / 2;
        let Some(home) = Self::surplus(&state, most) else { return Ok((state, false)) };
        drop(state);
        self.checkpoint(Aim { free: 0, home: Some(home) })?;
        let mut state = self.state.lock();
        // What is left of them is held by the transaction that commits.
        if state.running.is_none()
            && state.committing.is_some()
            && Self::surplus(&state, most).is_some()
        {
            self.changed.wait(&mut state);
        }
        Ok((state, true))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use uext_blockdev::MemoryDevice;
    use uext_ondisk::jbd2::RawJournalSuperblock;
    use uext_pagecache::{BufferCache, CacheConfig, PageCache};
    use zerocopy::IntoBytes;

    use super::*;
    use crate::{JournalConfig, JournalMap, JournalRun};

    const SIZE: usize = 1024;
    /// The journal's superblock.
    const JOURNAL: usize = 512;
    const RING: u32 = 511;

    fn journal(cached_blocks: u32) -> Arc<Journal> {
        let mut image = vec![0; SIZE << 10];
        let mut sb = RawJournalSuperblock::new(SIZE as u32, RING + 1, 1, Default::default());
        sb.update_checksum();
        image[JOURNAL * SIZE..][..SIZE].copy_from_slice(sb.as_bytes());
        let device = MemoryDevice::from_vec(image);
        let cache = PageCache::new(CacheConfig::default());
        let buffers = BufferCache::new(&cache, device.clone(), SIZE as u32);
        let run = JournalRun { logical: 0, physical: JOURNAL as u64, count: RING + 1 };
        let map = JournalMap::from_runs(vec![run]).unwrap();
        let config = JournalConfig { background: false, cached_blocks, ..JournalConfig::default() };
        Journal::open(device, map, [0; 16], buffers, config).unwrap()
    }

    fn write(journal: &Arc<Journal>, blocks: std::ops::Range<u64>) {
        let handle = journal.start(32).unwrap();
        for block in blocks {
            let buffer = journal.buffers().bread(block).unwrap();
            handle.write(&buffer).unwrap().fill(1);
        }
    }

    #[test]
    fn a_checkpoint_for_memory_makes_no_transaction_small() {
        let journal = journal(64);
        write(&journal, 0..20);
        journal.commit_all().unwrap();
        write(&journal, 18..25);
        let aim = journal.background_aim();
        assert_eq!(aim.home, Some(journal.committed_tid()));
        journal.checkpoint(aim).unwrap();
        let status = journal.status();
        assert_eq!(status.kept_blocks, 2, "what the running transaction holds stays");
        assert!(status.running.is_some(), "the running transaction was committed");
        journal.close().unwrap();
    }

    #[test]
    fn a_log_that_is_low_is_emptied_whatever_runs() {
        let journal = journal(u32::MAX);
        for blocks in 0..13 {
            write(&journal, blocks..blocks + 20);
            journal.commit_all().unwrap();
        }
        write(&journal, 0..2);
        write(&journal, 31..32);
        let (used, aim) = (journal.status().used_blocks, journal.background_aim());
        assert!(used > RING / 2, "{used}");
        assert_eq!((aim.free, aim.home), (journal.watermarks().1, None));
        journal.checkpoint(aim).unwrap();
        assert!(journal.status().used_blocks <= RING - aim.free);
        journal.close().unwrap();
    }
}
