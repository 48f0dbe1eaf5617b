//! What a replay would do, found out without writing anything.
//!
//! A [`ReplayPlan`] is the three passes with nothing at their end: for each block that would be
//! written the place of its last copy in the log, what fast commits change over that, and the
//! journal superblock of the emptied log. [`Recovery::views`] makes devices of it that read as
//! the disk would after the replay; [`Recovery::replay_planned`] does it.
//!
//! Invariants: memory is a few words per block of the log, and the blocks that fast commits
//! change, which [`Recovery::check_room`] bounds by the log too; what a plan holds is true
//! only as long as nobody writes the devices.

use std::collections::BTreeMap;
use std::sync::Arc;

use uext_blockdev::BlockDevice;
use uext_ondisk::FsBlock;

use super::target::{LogPlace, PlanTarget};
use super::view::{DeviceRef, ReplayView};
use super::{Overlay, Recovery, RecoveryReport};
use crate::error::{JournalError, Result};
use crate::map::JournalMap;
use crate::tid::Tid;

/// Blocks and the places of their last copies in the log.
pub(super) type Places = BTreeMap<FsBlock, LogPlace>;

/// What a replay would do.
#[derive(Debug)]
pub struct ReplayPlan {
    /// What the log's passes found; not yet that fast commits were replayed.
    report: RecoveryReport,
    places: Arc<Places>,
    /// What fast commits change over the log's replay.
    pub(super) fast: Option<Overlay>,
    /// Fast commits behind the log.
    commits: usize,
    /// The superblock of the journal afterwards, by its block on the journal's device; nothing
    /// when the log is clean.
    superblock: Option<(FsBlock, Vec<u8>)>,
    map: Arc<JournalMap>,
    block_size: u32,
}

impl ReplayPlan {
    /// What could not be replayed whole: a mount is refused then.
    pub fn damage(&self) -> Option<&JournalError> {
        self.report.damage.as_ref()
    }

    /// What the replay will report.
    pub fn report(&self) -> RecoveryReport {
        let fast_commits = self.fast.as_ref().map_or(0, |_| self.commits);
        RecoveryReport { fast_commits, ..self.report.clone() }
    }

    /// The transaction number of the emptied log.
    pub(super) fn next_tid(&self) -> Tid {
        // After a failed pass e2fsck keeps the old number; after a whole one the number of the
        // first transaction that is not there is never used again, because half of it may lie
        // in the log. What fast commits change is a transaction of its own.
        let failed = !matches!(self.damage(), None | Some(JournalError::DamagedTransaction(_)));
        match self.fast {
            Some(_) => self.report.end_tid.wrapping_add(2),
            None if failed => self.report.start_tid,
            None => self.report.end_tid.wrapping_add(1),
        }
    }

    /// A device that reads as `fs` after the replay; `journal` is the journal's, which may be the
    /// same. Both must be those that were planned for.
    pub fn view_of<'a>(
        &self,
        fs: &'a dyn BlockDevice,
        journal: &'a dyn BlockDevice,
    ) -> ReplayView<'a> {
        let mut changes = self.fast.clone().unwrap_or_default();
        if !self.map.is_external() {
            changes.extend(self.superblock.clone());
        }
        ReplayView {
            limits: ReplayView::limits_over(fs),
            base: DeviceRef::Borrowed(fs),
            block_size: self.block_size,
            log: DeviceRef::Borrowed(journal),
            map: self.map.clone(),
            places: self.places.clone(),
            changes,
        }
    }

    /// Devices that read as after the replay: `fs` with the log's blocks, and the journal, in
    /// it or `external`, empty. Both devices must be those that were planned for.
    pub fn views(
        &self,
        fs: Arc<dyn BlockDevice>,
        external: Option<Arc<dyn BlockDevice>>,
    ) -> ReplayViews {
        let mut changes = self.fast.clone().unwrap_or_default();
        let mut emptied = Overlay::new();
        let side = if external.is_some() { &mut emptied } else { &mut changes };
        side.extend(self.superblock.clone());
        let view = |base: Arc<dyn BlockDevice>, changes| ReplayView {
            limits: ReplayView::limits_over(&*base),
            base: DeviceRef::Shared(base),
            block_size: self.block_size,
            log: DeviceRef::None,
            map: self.map.clone(),
            places: Arc::default(),
            changes,
        };
        let log = external.clone().unwrap_or_else(|| fs.clone());
        let fs = ReplayView {
            log: DeviceRef::Shared(log),
            places: self.places.clone(),
            ..view(fs, changes)
        };
        let journal = external.map(|base| Arc::new(view(base, emptied)) as Arc<dyn BlockDevice>);
        ReplayViews { fs: Arc::new(fs), journal }
    }
}

/// The devices as a replay would leave them; they cannot be written.
pub struct ReplayViews {
    /// The filesystem's.
    pub fs: Arc<dyn BlockDevice>,
    /// The external journal's.
    pub journal: Option<Arc<dyn BlockDevice>>,
}

impl Recovery<'_> {
    /// Finds out what a replay would do.
    ///
    /// # Errors
    /// `Io` when the journal's superblock cannot be read again; whatever else is wrong is the
    /// plan's damage.
    pub fn plan(&self) -> Result<ReplayPlan> {
        let mut plan = ReplayPlan {
            report: RecoveryReport::clean(&self.sb),
            places: Arc::default(),
            fast: None,
            commits: 0,
            superblock: None,
            map: Arc::new(self.journal.map.clone()),
            block_size: self.journal.block_size,
        };
        if !self.needs_recovery() {
            return Ok(plan);
        }
        let mut target = PlanTarget::new(self.fs, &self.journal);
        let (report, commits) = self.run(&mut target)?;
        plan.report = report;
        plan.commits = commits.len();
        plan.places = Arc::new(target.into_places());
        if plan.damage().is_none() && !commits.is_empty() {
            // The plan has only the log so far.
            let log = plan.view_of(self.fs, self.journal.device);
            let changes = crate::fast_commit::apply(&log, plan.block_size, &commits);
            match changes.and_then(|changes| self.check_room(changes.len()).map(|()| changes)) {
                Ok(changes) => plan.fast = Some(changes),
                Err(refused) => plan.report.damage = Some(refused),
            }
        }
        let at = self.journal.map.superblock();
        let home = FsBlock(self.journal.byte_offset(at)? / u64::from(plan.block_size));
        plan.superblock = Some((home, self.superblock_with(plan.next_tid(), 0)?));
        Ok(plan)
    }
}
