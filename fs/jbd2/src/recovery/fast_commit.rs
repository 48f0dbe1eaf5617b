//! Reading fast commits, and turning what they change into a transaction of the log.
//!
//! The area lies behind the log and adds to the first transaction that is not in it. Order, once
//! the log's own transactions are home and durable:
//! 1. the journal superblock: the log begins where it ended, with nothing in it. The records
//!    still add to what comes next, so a cut from here on applies them again, to the same blocks;
//! 2. the changed blocks as one transaction, then a flush, its commit block and another flush.
//!    From here on the log has them, and the records are of the past;
//! 3. the blocks home, and a flush.

use std::time::{SystemTime, UNIX_EPOCH};

use uext_blockdev::BioFlags;
use uext_ondisk::fast_commit::{FastCommit, Reader};
use uext_ondisk::jbd2::{
    CommitBlock, DescriptorWriter, JournalCompat, JournalIncompat, escape, logged_block_csum,
    needs_escape, transaction_crc32,
};

use super::target::{DeviceTarget, Target};
use super::{Overlay, Recovery};
use crate::error::{IoWhat, JournalError, Result};
use crate::log_reader::LogReader;
use crate::tid::Tid;

impl Recovery<'_> {
    /// The whole fast commits that add to transaction `expected`.
    pub(super) fn fast_commits(&self, expected: Tid) -> Result<Vec<FastCommit>> {
        if !self.sb.incompat.contains(JournalIncompat::FAST_COMMIT) {
            return Ok(Vec::new());
        }
        let mut blocks = LogReader::new(self.journal);
        let mut reader = Reader::new(expected);
        // The kernel leaves the first block of the area unused.
        for block in self.sb.log_end().saturating_add(1)..self.sb.block_count {
            if !reader.block(blocks.read(block)?)? {
                break;
            }
        }
        Ok(reader.finish())
    }

    /// Blocks one descriptor names.
    fn tags(&self) -> usize {
        let size = self.journal.block_size as usize;
        DescriptorWriter::capacity(size, self.sb.tag_format()).max(1)
    }

    /// Whether the log can hold a transaction of `count` blocks.
    pub(super) fn check_room(&self, count: usize) -> Result<()> {
        let need = count + count.div_ceil(self.tags()) + 1;
        let ring = (self.sb.log_end() - self.sb.first) as usize;
        if need < ring {
            return Ok(());
        }
        let text = format!(
            "the journal's fast commits change {count} blocks, more than its log of {ring} blocks \
             holds: run e2fsck"
        );
        Err(JournalError::Unsupported(text))
    }

    /// Logs the changed blocks as transaction `tid` at block `head`, then writes them home.
    pub(super) fn bring_home(&self, tid: Tid, head: u32, changes: &Overlay) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.set_start(tid, head)?;
        self.log_changes(tid, head, changes)?;
        let mut target = DeviceTarget::new(self.fs, &self.journal);
        for (&block, bytes) in changes {
            target.check(block)?;
            target.write(block, bytes.clone())?;
        }
        target.flush()
    }

    fn log_changes(&self, tid: Tid, head: u32, changes: &Overlay) -> Result<()> {
        let (format, seed) = (self.sb.tag_format(), self.sb.csum_seed());
        let mut log = LogEnd { recovery: self, at: head, crc: !0 };
        let mut blocks = changes.iter().peekable();
        while blocks.peek().is_some() {
            let group: Vec<_> = blocks.by_ref().take(self.tags()).collect();
            let mut head = vec![0; self.journal.block_size as usize];
            let uuid = *self.sb.uuid.as_bytes();
            let mut descriptor = DescriptorWriter::new(&mut head, format, tid, uuid)?;
            let mut copies = Vec::with_capacity(group.len());
            for (&block, bytes) in group {
                let mut copy = bytes.clone();
                let escaped = needs_escape(&copy);
                if escaped {
                    escape(&mut copy);
                }
                let csum = if format.has_csum() { logged_block_csum(seed, tid, &copy) } else { 0 };
                let pushed = descriptor.push(block, escaped, csum);
                debug_assert!(pushed, "a group has as many blocks as a descriptor has tags");
                copies.push(copy);
            }
            descriptor.finish(seed);
            log.write(&head)?;
            for copy in &copies {
                log.write(copy)?;
            }
        }
        self.flush_log()?;
        let crc = self.sb.compat.contains(JournalCompat::CHECKSUM).then_some(log.crc);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut block = vec![0; self.journal.block_size as usize];
        CommitBlock { sequence: tid, time, transaction_crc32: crc }
            .write(&mut block, format.has_csum().then_some(seed))?;
        log.write(&block)?;
        self.flush_log()
    }

    fn flush_log(&self) -> Result<()> {
        let flushed = self.journal.device.flush();
        flushed.map_err(|status| JournalError::io(IoWhat::Flush, 0, status))
    }
}

/// Where the log is written on.
struct LogEnd<'a> {
    recovery: &'a Recovery<'a>,
    at: u32,
    /// Over everything so far (compat `CHECKSUM`).
    crc: u32,
}

impl LogEnd<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let journal = &self.recovery.journal;
        let failed = |status| JournalError::io(IoWhat::WriteLog, self.at.into(), status);
        let offset = journal.byte_offset(self.at)?;
        let flags = BioFlags::META | BioFlags::SYNC;
        journal.device.write_at(offset, bytes, flags).map_err(failed)?;
        self.crc = transaction_crc32(self.crc, bytes);
        self.at += 1;
        if self.at >= self.recovery.sb.log_end() {
            self.at = self.recovery.sb.first;
        }
        Ok(())
    }
}
