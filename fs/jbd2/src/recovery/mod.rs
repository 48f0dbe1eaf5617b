//! Recovery: bringing the committed transactions of a log home after a crash.
//!
//! Shared by mount and fsck, so it reads and writes through `BlockDevice` only.
//! Three passes over the log, as jbd2 and e2fsck make them, and with their
//! verdicts, so that the same blocks are left:
//! 1. **scan** finds the last transaction with a good commit block. A wrong
//!    magic or sequence is the end of the log; a damaged block inside it is an
//!    error unless its commit time shows it to be left over from an earlier lap.
//! 2. **revoke** collects, for each block, the last transaction that revoked it.
//! 3. **replay** writes each logged block home unless it was revoked by its own
//!    or a later transaction. A logged block with a wrong checksum is left out
//!    and reported; with [`OnDamage::Reset`] the others are still written, with
//!    [`OnDamage::Keep`] nothing is: a [`ReplayPlan`] of all passes comes first.
//!
//! Order of a replay: blocks home, flush, journal superblock (log empty, next
//! transaction number), flush. A cut anywhere in between replays again.
//!
//! Fast commits behind the log are applied to what the log leaves, in memory and before anything
//! is written. Once the log's blocks are home they become the log's only transaction, see
//! [`fast_commit`], and that is brought home as any other.
//!
//! Invariants: nothing is written before the scan succeeded; memory is bounded
//! by the length of the journal, never by a number read from it alone; no pass
//! visits more blocks than the log has.

mod fast_commit;
mod passes;
mod plan;
mod target;
mod view;

use std::collections::BTreeMap;

use uext_blockdev::{BioFlags, BlockDevice, mutant};
use uext_ondisk::fast_commit::FastCommit;
use uext_ondisk::jbd2::{JournalSuperblock, edit_superblock_with};
use uext_ondisk::{Corrupt, FsBlock};

use crate::error::{IoWhat, JournalError, Result};
use crate::log_reader::JournalLocation;
use crate::tid::Tid;
use passes::{Passes, Scan};
pub use plan::{ReplayPlan, ReplayViews};
use target::{DeviceTarget, Target};
pub use view::ReplayView;

/// What to do with the journal when a part of it was damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDamage {
    /// Keep the log, write nothing and fail, as a mount does: the next attempt, or fsck,
    /// sees the same.
    Keep,
    /// Empty the log all the same and report the damage, as fsck does before a full check.
    Reset,
}

/// What a recovery found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryReport {
    /// The log held something (`s_start` was not 0).
    pub was_dirty: bool,
    /// First transaction expected in the log.
    pub start_tid: Tid,
    /// First transaction that is not in it: `start_tid..end_tid` were replayed.
    pub end_tid: Tid,
    /// Transactions replayed.
    pub transactions: u32,
    /// Blocks written, a block of two transactions counted twice.
    pub blocks_replayed: u64,
    /// Revoke records read.
    pub revoke_records: u64,
    /// Blocks that were not written because of one.
    pub blocks_revoked: u64,
    /// `s_errno` before: the error the journal was aborted with, a negative errno, or 0.
    pub errno: i32,
    /// What could not be recovered.
    pub damage: Option<JournalError>,
    /// Fast commits that were replayed behind the last transaction.
    pub fast_commits: usize,
    /// Block of the log behind the last transaction.
    pub head: u32,
}

impl RecoveryReport {
    fn clean(sb: &JournalSuperblock) -> Self {
        Self {
            was_dirty: false,
            start_tid: sb.sequence,
            end_tid: sb.sequence,
            transactions: 0,
            blocks_replayed: 0,
            revoke_records: 0,
            blocks_revoked: 0,
            errno: sb.errno,
            damage: None,
            fast_commits: 0,
            head: sb.head,
        }
    }
}

/// Blocks that change, in memory.
pub type Overlay = BTreeMap<FsBlock, Vec<u8>>;

/// A journal whose superblock was read, ready to be replayed.
pub struct Recovery<'a> {
    journal: JournalLocation<'a>,
    fs: &'a dyn BlockDevice,
    sb: JournalSuperblock,
}

impl<'a> Recovery<'a> {
    /// Reads and checks the journal's superblock.
    ///
    /// # Errors
    /// `Io`; `Corrupt` when it is not one, or does not fit the map or the block
    /// size; `Unsupported` for unknown features.
    pub fn open(journal: JournalLocation<'a>, fs: &'a dyn BlockDevice) -> Result<Self> {
        let sb = read_superblock(&journal)?;
        Ok(Self { journal, fs, sb })
    }

    /// The journal's superblock as it was read.
    pub fn superblock(&self) -> &JournalSuperblock {
        &self.sb
    }

    /// Whether the log holds anything.
    pub fn needs_recovery(&self) -> bool {
        self.sb.needs_recovery()
    }

    /// Replays the log onto the filesystem and empties it. A clean journal is left as it is.
    ///
    /// # Errors
    /// As [`Recovery::replay_planned`].
    pub fn replay(&self, on_damage: OnDamage) -> Result<RecoveryReport> {
        self.replay_planned(&self.plan()?, on_damage)
    }

    /// Does what was planned, on the same devices.
    ///
    /// # Errors
    /// `Io` when a write or flush failed, and the log is kept; with [`OnDamage::Keep`] also
    /// whatever is damaged, or cannot be replayed, before anything is written.
    pub fn replay_planned(&self, plan: &ReplayPlan, on_damage: OnDamage) -> Result<RecoveryReport> {
        if !self.needs_recovery() {
            return Ok(plan.report());
        }
        if on_damage == OnDamage::Keep
            && let Some(damage) = plan.damage()
        {
            return Err(damage.clone());
        }
        let mut target = DeviceTarget::new(self.fs, &self.journal);
        let (report, _) = self.run(&mut target)?;
        if mutant!("log-emptied-before-replay") {
            self.mark_empty(report.end_tid.wrapping_add(1))?;
        }
        target.flush()?;
        if let Some(damage) = report.damage.filter(|_| plan.damage().is_none()) {
            return Err(damage); // It can only be the device's: the plan found none.
        }
        if let Some(changes) = &plan.fast {
            self.bring_home(report.end_tid, report.head, changes)?;
        }
        self.mark_empty(plan.next_tid())?;
        Ok(plan.report())
    }

    /// The three passes, and the fast commits that wait behind the log. Damage is in the report;
    /// an error means the target failed.
    fn run(&self, target: &mut dyn Target) -> Result<(RecoveryReport, Vec<FastCommit>)> {
        let mut passes = Passes::new(self.journal, &self.sb);
        let mut report = RecoveryReport { was_dirty: true, ..RecoveryReport::clean(&self.sb) };
        let scan = match passes.scan() {
            Ok(scan) => scan,
            Err(damage) => {
                report.damage = Some(damage);
                return Ok((report, Vec::new()));
            }
        };
        self.note_scan(&mut report, &scan);
        let commits = self.fast_commits(scan.end).unwrap_or_else(|damage| {
            report.damage.get_or_insert(damage);
            Vec::new()
        });
        let revoked = match passes.revoke(&scan) {
            Ok(revoked) => revoked,
            Err(damage) => {
                report.damage = Some(damage);
                return Ok((report, Vec::new()));
            }
        };
        report.revoke_records = revoked.records;
        let replayed = passes.replay(&scan, &revoked, target)?;
        report.blocks_replayed = replayed.written;
        report.blocks_revoked = replayed.revoked;
        report.damage = replayed.damage.or(report.damage);
        Ok((report, commits))
    }

    fn note_scan(&self, report: &mut RecoveryReport, scan: &Scan) {
        report.end_tid = scan.end;
        report.transactions = scan.end.wrapping_sub(report.start_tid);
        report.head = scan.head;
        report.damage = scan.failed_commit.map(JournalError::DamagedTransaction);
    }

    /// Writes the journal superblock of an empty log whose next transaction is `next`.
    fn mark_empty(&self, next: Tid) -> Result<()> {
        self.set_start(next, 0)
    }

    /// Says durably where the log begins, 0 when it is empty, and with which transaction.
    fn set_start(&self, tid: Tid, start: u32) -> Result<()> {
        let at = self.journal.map.superblock();
        let offset = self.journal.byte_offset(at)?;
        let block = self.superblock_with(tid, start)?;
        let device = self.journal.device;
        device
            .write_at(offset, &block, BioFlags::META | BioFlags::SYNC)
            .map_err(|status| JournalError::io(IoWhat::WriteLog, at.into(), status))?;
        device.flush().map_err(|status| JournalError::io(IoWhat::Flush, 0, status))
    }

    /// The journal's superblock, with another beginning of the log.
    fn superblock_with(&self, tid: Tid, start: u32) -> Result<Vec<u8>> {
        let mut block = self.journal.read(self.journal.map.superblock())?;
        edit_superblock_with(&mut block, |raw| {
            raw.s_sequence = tid.into();
            raw.s_start = start.into();
        })?;
        Ok(block)
    }
}

/// Reads a journal's superblock and checks it against where the journal lies.
///
/// # Errors
/// As [`Recovery::open`].
pub(crate) fn read_superblock(journal: &JournalLocation<'_>) -> Result<JournalSuperblock> {
    let block = journal.read(journal.map.superblock())?;
    let sb = JournalSuperblock::parse(&block)?;
    let bad = |detail: String| Err(Corrupt::value("journal superblock", detail).into());
    if sb.block_size != journal.block_size {
        return bad(format!(
            "s_blocksize is {}, the filesystem's is {}",
            sb.block_size, journal.block_size
        ));
    }
    if sb.block_count > journal.map.block_count() {
        return bad(format!(
            "s_maxlen is {}, the journal has {} blocks",
            sb.block_count,
            journal.map.block_count()
        ));
    }
    if sb.first <= journal.map.superblock() {
        return bad(format!("the log begins at its superblock, s_first is {}", sb.first));
    }
    if sb.user_count > 1 {
        let text = format!("the journal is shared by {} filesystems, not supported", sb.user_count);
        return Err(JournalError::Unsupported(text));
    }
    Ok(sb)
}
