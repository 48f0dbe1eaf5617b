//! The cuts of a recorded workload, and the court that judges each of them once.
//!
//! Judged are all moments at which something is about to become durable, with all, none
//! and chosen subsets of what is volatile then, in units of 4 KiB and of 512 B, and the
//! prefixes of the completed writes. Recovery is a workload too: its own writes are cut,
//! and those of the recovery after that.
//!
//! A state is judged once: not again when the disk holds the same bytes, and not when it
//! does so after the replay, outside the journal. The same disk later is judged again
//! where more had been promised by then.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use uext_blockdev::BlockDevice;
use uext_blockdev::dm::{CrashOptions, LogWrites, SnapshotDevice, UnitSet, WriteLog};
use uext_ext4::Ext4;
use uext_jbd2::{JournalLocation, OnDamage, Recovery};
use uext_ondisk::features::Incompat;
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use uext_vfs::FileSystem;

use crate::case::Case;
use crate::image::{Image, Kind, image};
use crate::judges::{self, Kernel};
use crate::quiet::quietly;
use crate::recorder::{Recording, options};

/// How many states of a recording are judged.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Up to so many volatile units, all their subsets are made.
    pub exhaustive: usize,
    /// Subsets by chance where there are more.
    pub seeded: usize,
    /// Most subsets at one moment, evenly chosen; those by chance among them.
    pub sets: usize,
    /// The same for units of 512 B; 0: none.
    pub torn_sets: usize,
    /// Most prefixes.
    pub prefixes: usize,
    /// One state of so many goes to e2fsck as well; 0: none, 1: all.
    pub kernel_share: usize,
    /// Most states whose recovery is cut.
    pub nested: usize,
    /// Most subsets at one moment of a recovery.
    pub nested_sets: usize,
}

/// A moment, and what of the volatile units is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub at: At,
    pub units: UnitSet,
}

/// A moment in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// A crash point with units of 4 KiB.
    Blocks(usize),
    /// A crash point with units of 512 B.
    Sectors(usize),
    /// So many completed writes, and nothing else.
    Prefix(usize),
}

impl At {
    fn unit_bytes(self) -> u32 {
        if matches!(self, Self::Sectors(_)) { 512 } else { 4096 }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(index) => write!(f, "blocks:{index}"),
            Self::Sectors(index) => write!(f, "sectors:{index}"),
            Self::Prefix(count) => write!(f, "prefix:{count}"),
        }
    }
}

/// Reads a moment.
///
/// # Errors
/// When it is none.
pub fn parse_at(text: &str) -> Result<At, String> {
    let (word, number) = text.split_once(':').ok_or_else(|| format!("no cut: `{text}`"))?;
    let number = number.parse().map_err(|_| format!("no cut: `{text}`"))?;
    match word {
        "blocks" => Ok(At::Blocks(number)),
        "sectors" => Ok(At::Sectors(number)),
        "prefix" => Ok(At::Prefix(number)),
        _ => Err(format!("no cut: `{text}`")),
    }
}

/// A disk after a cut.
pub struct Made {
    pub disk: Arc<SnapshotDevice>,
    pub time: u64,
    pub units: usize,
}

/// The disk that a cut leaves; `choose` says which of so many units are there.
///
/// # Errors
/// When the log has no such moment.
pub fn make(
    log: &WriteLog,
    start: &SnapshotDevice,
    at: At,
    choose: &dyn Fn(usize) -> UnitSet,
) -> Result<Made, String> {
    let none = || format!("there is no cut {at}");
    if let At::Prefix(count) = at {
        let time = completions(log).get(count).copied().unwrap_or(log.now);
        let disk = log.prefix(start, count).expect("the base can be read");
        return Ok(Made { disk, time, units: 0 });
    }
    let (At::Blocks(index) | At::Sectors(index) | At::Prefix(index)) = at;
    let options = CrashOptions { unit_bytes: at.unit_bytes(), ..CrashOptions::default() };
    let point = log.crash_points(start, options).nth(index).ok_or_else(none)?;
    let units = point.units().len();
    Ok(Made { disk: point.state(&choose(units)), time: point.time, units })
}

/// When each completed change completed, in order.
fn completions(log: &WriteLog) -> Vec<u64> {
    let changes = log.entries.iter().filter(|e| e.is_change() && e.done_before(log.now));
    let mut times: Vec<u64> = changes.filter_map(|entry| entry.completed).collect();
    times.sort_unstable();
    times
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// States made.
    pub states: usize,
    /// Not judged since the disk was the same as one before.
    pub same_disk: usize,
    /// Not judged since the disk was the same after the replay.
    pub same_replayed: usize,
    /// States of a recovery among them.
    pub nested: usize,
    /// Judged by e2fsck too.
    pub by_kernel: usize,
    /// Judged with a superblock that is half of one write, half of another.
    pub torn: usize,
    /// Workloads.
    pub workloads: usize,
    /// Moments.
    pub points: usize,
}

impl Stats {
    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        self.states += other.states;
        self.same_disk += other.same_disk;
        self.same_replayed += other.same_replayed;
        self.nested += other.nested;
        self.by_kernel += other.by_kernel;
        self.torn += other.torn;
        self.workloads += other.workloads;
        self.points += other.points;
    }
}

/// A state that is not as it should be.
#[derive(Clone, Debug)]
pub struct Failure {
    pub case: Case,
    /// The cut, and those of the recoveries after it; empty when the workload itself failed.
    pub cuts: Vec<Cut>,
    pub why: String,
}

/// Judges the states of one recording.
pub struct Court<'a> {
    case: &'a Case,
    image: Arc<Image>,
    recording: &'a Recording,
    budget: Budget,
    kernel: Option<Kernel>,
    disks: HashSet<(u64, usize)>,
    replayed: HashSet<(u64, usize)>,
    nested_left: usize,
    /// Whose turn it is to go to e2fsck begins here.
    turn: usize,
    pub stats: Stats,
}

type Judged = Result<(), Failure>;

impl<'a> Court<'a> {
    /// For a case's recording.
    pub fn new(case: &'a Case, recording: &'a Recording, budget: Budget) -> Self {
        let image = image(case.kind, case.large);
        let by_kernel = budget.kernel_share > 0 || case.kind == Kind::Ext2;
        let kernel = by_kernel.then(|| Kernel::new(image.bytes.clone()));
        let stats = Stats { workloads: 1, ..Stats::default() };
        Self {
            case,
            image,
            recording,
            budget,
            kernel,
            disks: HashSet::new(),
            replayed: HashSet::new(),
            nested_left: budget.nested,
            turn: case.to_string().bytes().map(usize::from).sum(),
            stats,
        }
    }

    /// Judges all that the budget allows.
    ///
    /// # Errors
    /// The first state that is not as it should be.
    pub fn judge_all(&mut self) -> Judged {
        let start = SnapshotDevice::over_vec(self.image.bytes.clone());
        let (budget, log) = (self.budget, &self.recording.log);
        self.judge_points(log, &start, At::Blocks, budget.sets, None, &[])?;
        if budget.torn_sets > 0 {
            self.judge_points(log, &start, At::Sectors, budget.torn_sets, None, &[])?;
        }
        self.judge_prefixes(log, &start)
    }

    /// Judges the moments of a log: the workload's, or with `time` a recovery's.
    fn judge_points(
        &mut self,
        log: &WriteLog,
        start: &SnapshotDevice,
        at: fn(usize) -> At,
        most: usize,
        time: Option<u64>,
        before: &[Cut],
    ) -> Judged {
        let unit_bytes = at(0).unit_bytes();
        let options = CrashOptions { unit_bytes, ..CrashOptions::default() };
        for point in log.crash_points(start, options) {
            if time.is_none() && point.time <= self.recording.from {
                continue;
            }
            self.stats.points += 1;
            let count = point.units().len();
            let seed = self.case.seed.wrapping_mul(0x9E37_79B9).wrapping_add(point.index as u64);
            let budget = self.budget;
            for set in choose(count, budget.exhaustive, budget.seeded, most, seed) {
                let disk = point.state(&set);
                let mut cuts = before.to_vec();
                cuts.push(Cut { at: at(point.index), units: set });
                self.judge(cuts, time.unwrap_or(point.time), &disk)?;
            }
        }
        Ok(())
    }

    fn judge_prefixes(&mut self, log: &WriteLog, start: &SnapshotDevice) -> Judged {
        let times = completions(log);
        let first = times.partition_point(|&time| time < self.recording.from);
        let stride = (times.len() - first).div_ceil(self.budget.prefixes.max(1)).max(1);
        if self.budget.prefixes == 0 {
            return Ok(());
        }
        for count in (first..=times.len()).step_by(stride) {
            let at = At::Prefix(count);
            let made = make(log, start, at, &UnitSet::none).map_err(|why| self.failed(&[], why))?;
            self.judge(vec![Cut { at, units: UnitSet::none(0) }], made.time, &made.disk)?;
        }
        Ok(())
    }

    fn failed(&self, cuts: &[Cut], why: String) -> Failure {
        Failure { case: self.case.clone(), cuts: cuts.to_vec(), why }
    }

    /// Judges a state unless its like was judged before.
    fn judge(&mut self, cuts: Vec<Cut>, time: u64, disk: &Arc<SnapshotDevice>) -> Judged {
        self.stats.states += 1;
        self.stats.nested += usize::from(cuts.len() > 1);
        let promises = self.recording.history.promises(time);
        if !self.disks.insert((disk.fingerprint(), promises)) {
            self.stats.same_disk += 1;
            return Ok(());
        }
        let replayed = self.replay(disk);
        if let Some((fingerprint, _)) = replayed
            && !self.replayed.insert((fingerprint, promises))
        {
            self.stats.same_replayed += 1;
            return Ok(());
        }
        self.judge_now(time, disk).map_err(|why| self.failed(&cuts, why))?;
        if replayed.is_some_and(|(_, blocks)| blocks > 0) && cuts.len() <= 2 {
            self.judge_nested(&cuts, time, disk)?;
        }
        Ok(())
    }

    /// What a replay leaves outside the journal, and how many blocks it wrote; `None`
    /// when there is nothing to replay, or it fails.
    fn replay(&self, disk: &SnapshotDevice) -> Option<(u64, u64)> {
        let map = self.image.journal.as_ref()?;
        let disk = disk.fork();
        let device: &dyn BlockDevice = &*disk;
        let bytes = device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).ok()?;
        let sb = Superblock::parse(&bytes).ok()?;
        if !sb.features().incompat.contains(Incompat::RECOVER) {
            return None;
        }
        let block_size = self.image.block_size;
        let journal = JournalLocation { device, map, block_size };
        let report = Recovery::open(journal, device).ok()?.replay(OnDamage::Keep).ok()?;
        let outside = |page: u64| !self.image.journal_pages.contains(&page);
        Some((disk.fingerprint_where(outside), report.blocks_replayed))
    }

    /// Judges a state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge_now(&mut self, time: u64, disk: &Arc<SnapshotDevice>) -> Result<(), String> {
        let share = self.budget.kernel_share;
        let history = &self.recording.history;
        if let Some(kernel) = &self.kernel
            && self.case.kind == Kind::Ext2
        {
            self.stats.by_kernel += 1;
            return quietly(|| kernel.judge_repaired(disk, history, time))?;
        }
        // Short workloads too have their turn.
        let turn = self.stats.states.wrapping_add(self.turn);
        let kernel = self.kernel.as_ref().filter(|_| turn.is_multiple_of(share));
        self.stats.by_kernel += usize::from(kernel.is_some());
        // From a superblock without a backup e2fsck does not come back.
        let torn = judges::superblock_is_torn(disk);
        self.stats.torn += usize::from(torn);
        if let Some(kernel) = kernel.filter(|_| !torn) {
            kernel.judge_raw(disk)?;
        }
        let used = disk.fork();
        quietly(|| judges::ours(&used, self.case.mode, history, time))??;
        kernel.map_or(Ok(()), |kernel| kernel.judge_clean(&used))
    }

    /// Cuts the recovery of a state.
    fn judge_nested(&mut self, cuts: &[Cut], time: u64, disk: &Arc<SnapshotDevice>) -> Judged {
        if self.nested_left == 0 {
            return Ok(());
        }
        self.nested_left -= 1;
        let log = recovery_log(disk, self.case).map_err(|why| self.failed(cuts, why))?;
        self.judge_points(&log, disk, At::Blocks, self.budget.nested_sets, Some(time), cuts)
    }
}

/// What a mount writes.
///
/// # Errors
/// How it failed.
pub fn recovery_log(disk: &Arc<SnapshotDevice>, case: &Case) -> Result<WriteLog, String> {
    let device = LogWrites::new(disk.fork());
    let fs = Ext4::mount(device.clone(), "recovery", &options(case.mode, case.apart))
        .map_err(|error| format!("mount: {error}"))?;
    let log = device.log();
    fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
    Ok(log)
}

/// At most `most` of the choices worth a test; the first and last in any case.
fn choose(count: usize, exhaustive: usize, seeded: usize, most: usize, seed: u64) -> Vec<UnitSet> {
    let all: Vec<UnitSet> = UnitSet::choose(count, exhaustive, seeded, seed).collect();
    let mut sets = vec![UnitSet::none(count), UnitSet::all(count)];
    // Those by chance come last, so going backwards takes some of them always.
    sets.extend(all.iter().rev().step_by(all.len().div_ceil(most.max(1))).cloned());
    let mut seen = HashSet::new();
    sets.retain(|set| seen.insert(set.clone()));
    sets
}
