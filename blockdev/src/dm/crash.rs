//! The states that a power cut can leave, made from a log of writes.
//!
//! The model of the disk:
//! - A change is **durable** when it completed well before a flush was submitted
//!   that completed well before the cut, or when it is a FUA write that completed
//!   well before the cut.
//! - Every other change submitted before the cut is **volatile**: of each of its
//!   units (4 KiB, or sectors) the disk has it or not, in any combination. A change
//!   that failed stays volatile for ever.
//! - Where changes overlap, the one submitted later wins.
//!
//! [`WriteLog::crash_points`] gives one [`CrashPoint`] just before each event that
//! makes something durable, and one at the end of the log: any other cut has a
//! subset of the volatile units of the next point, with the same durable ones.
//!
//! ```text
//!   for point in log.crash_points(&base, CrashOptions::default()) {
//!       for set in UnitSet::choose(point.units().len(), 8, 64, seed) {
//!           let image = point.state(&set);     // a SnapshotDevice: replay, check, ...
//!       }
//!   }
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use super::Rng;
use super::log_writes::{LogEntry, LogOp, WriteLog};
use super::snapshot::SnapshotDevice;
use crate::status::BlkResult;
use crate::units::{SECTOR_SIZE, Sector};

/// What a discarded range holds afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiscardFill {
    /// Zeroes.
    #[default]
    Zeroes,
    /// What it held before.
    Old,
    /// Anything, by seed.
    Junk(u64),
}

/// How crash states are made.
#[derive(Clone, Copy, Debug)]
pub struct CrashOptions {
    /// Bytes that a disk writes or loses as one: 4096 or 512.
    pub unit_bytes: u32,
    /// What discards do.
    pub discard: DiscardFill,
}

impl Default for CrashOptions {
    fn default() -> Self {
        Self { unit_bytes: 4096, discard: DiscardFill::Zeroes }
    }
}

/// A piece of a change that may or may not have reached the disk.
#[derive(Clone, Debug)]
pub struct VolatileUnit {
    /// Index of its entry in the log.
    pub entry: usize,
    /// First sector.
    pub sector: Sector,
    /// Sectors.
    pub sectors: u64,
    /// Runs (first sector, sectors) that no durable later change covers.
    live: Vec<(u64, u64)>,
}

/// A moment of a power cut.
pub struct CrashPoint {
    /// Its number, from 0.
    pub index: usize,
    /// The time of the cut: events before it have happened.
    pub time: u64,
    log: Arc<WriteLog>,
    options: CrashOptions,
    durable: Arc<SnapshotDevice>,
    units: Vec<VolatileUnit>,
}

impl CrashPoint {
    /// What may or may not be there, in the order of submission.
    pub fn units(&self) -> &[VolatileUnit] {
        &self.units
    }

    /// The marks set before the cut.
    pub fn marks(&self) -> impl Iterator<Item = &str> {
        self.log.marks().filter(|(time, _)| *time < self.time).map(|(_, text)| text)
    }

    /// The disk after the cut, with the chosen units.
    ///
    /// # Panics
    /// When the base of the replay can't be read.
    pub fn state(&self, chosen: &UnitSet) -> Arc<SnapshotDevice> {
        let disk = self.durable.fork();
        for (index, unit) in self.units.iter().enumerate() {
            if chosen.contains(index) {
                let entry = &self.log.entries[unit.entry];
                for &(sector, sectors) in &unit.live {
                    apply(&disk, entry, sector, sectors, self.options.discard)
                        .expect("the base of a crash state can be read");
                }
            }
        }
        disk
    }
}

impl std::fmt::Debug for CrashPoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (index, time, units) = (self.index, self.time, self.units.len());
        write!(f, "CUT={index} time {time}, {units} volatile units")
    }
}

impl WriteLog {
    /// The cuts worth a test, over the contents at the start of the log.
    pub fn crash_points(
        &self,
        base: &SnapshotDevice,
        options: CrashOptions,
    ) -> impl Iterator<Item = CrashPoint> + use<> {
        CrashPoints::new(Arc::new(self.clone()), base.fork(), options)
    }

    /// The disk with the first `count` completed changes and nothing else: the
    /// simplest cut, right for a disk without a cache.
    ///
    /// # Errors
    /// When the base can't be read.
    pub fn prefix(&self, base: &SnapshotDevice, count: usize) -> BlkResult<Arc<SnapshotDevice>> {
        let mut done: Vec<&LogEntry> =
            self.entries.iter().filter(|e| e.is_change() && e.done_before(self.now)).collect();
        done.sort_by_key(|entry| entry.completed);
        done.truncate(count);
        done.sort_by_key(|entry| entry.submitted);
        let disk = base.fork();
        for entry in done {
            let sectors = entry.bytes / SECTOR_SIZE;
            apply(&disk, entry, entry.sector.0, sectors, DiscardFill::Zeroes)?;
        }
        Ok(disk)
    }
}

/// Puts a run of an entry's sectors on the disk.
fn apply(
    disk: &SnapshotDevice,
    entry: &LogEntry,
    sector: u64,
    sectors: u64,
    discard: DiscardFill,
) -> BlkResult<()> {
    let (offset, bytes) = (sector * SECTOR_SIZE, sectors * SECTOR_SIZE);
    match (&entry.op, discard) {
        (LogOp::Write, _) => {
            // The run lies inside the entry's data, which is in memory.
            let start = ((sector - entry.sector.0) * SECTOR_SIZE) as usize;
            disk.write(offset, &entry.data[start..start + bytes as usize])
        }
        (LogOp::WriteZeroes, _) | (LogOp::Discard, DiscardFill::Zeroes) => disk.zero(offset, bytes),
        (LogOp::Discard, DiscardFill::Junk(seed)) => {
            let mut rng = Rng::new(seed ^ sector);
            (sector..sector + sectors).try_for_each(|sector| {
                let junk = [rng.next_u64().to_le_bytes()[0]; SECTOR_SIZE as usize];
                disk.write(sector * SECTOR_SIZE, &junk)
            })
        }
        _ => Ok(()),
    }
}

/// An event of the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    time: u64,
    entry: usize,
    completion: bool,
}

/// Goes through the log's events and stops before those that make something durable.
struct CrashPoints {
    log: Arc<WriteLog>,
    options: CrashOptions,
    events: std::vec::IntoIter<Event>,
    /// The base and all that is durable.
    durable: Arc<SnapshotDevice>,
    /// Which change, by time of submission, a durable sector is from.
    owner: HashMap<u64, u64>,
    /// Changes submitted that are not durable, in the order of submission.
    volatile: Vec<usize>,
    /// What becomes durable before the walk goes on.
    landing: Vec<usize>,
    index: usize,
    finished: bool,
}

impl CrashPoints {
    fn new(log: Arc<WriteLog>, base: Arc<SnapshotDevice>, options: CrashOptions) -> Self {
        let mut events = Vec::new();
        for (entry, logged) in log.entries.iter().enumerate() {
            events.push(Event { time: logged.submitted, entry, completion: false });
            if let Some(time) = logged.completed {
                events.push(Event { time, entry, completion: true });
            }
        }
        events.sort_unstable();
        Self {
            log,
            options,
            events: events.into_iter(),
            durable: base,
            owner: HashMap::new(),
            volatile: Vec::new(),
            landing: Vec::new(),
            index: 0,
            finished: false,
        }
    }

    /// Which volatile changes an event makes durable.
    fn made_durable(&self, event: Event) -> Vec<usize> {
        let entry = &self.log.entries[event.entry];
        if !event.completion || entry.status.is_err() {
            return Vec::new();
        }
        let covered = |&index: &usize| match entry.op {
            LogOp::Flush => self.log.entries[index].done_before(entry.submitted),
            LogOp::Write => entry.fua && index == event.entry,
            _ => false,
        };
        self.volatile.iter().copied().filter(covered).collect()
    }

    /// Puts changes on the durable disk, where nothing later already is.
    fn land(&mut self) {
        for index in std::mem::take(&mut self.landing) {
            let entry = &self.log.entries[index];
            self.volatile.retain(|&other| other != index);
            let sectors = entry.sector.0..entry.sector.0 + entry.bytes / SECTOR_SIZE;
            for (first, count) in self.live_runs(entry, sectors.clone()) {
                apply(&self.durable, entry, first, count, self.options.discard)
                    .expect("the base of a crash state can be read");
            }
            for sector in sectors {
                let owner = self.owner.entry(sector).or_default();
                *owner = entry.submitted.max(*owner);
            }
        }
    }

    /// Runs of sectors of an entry that no durable change submitted later covers.
    fn live_runs(&self, entry: &LogEntry, sectors: std::ops::Range<u64>) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for sector in sectors {
            if self.owner.get(&sector).is_some_and(|&owner| owner > entry.submitted) {
                continue;
            }
            match runs.last_mut() {
                Some((first, count)) if *first + *count == sector => *count += 1,
                _ => runs.push((sector, 1)),
            }
        }
        runs
    }

    fn units(&self) -> Vec<VolatileUnit> {
        let mut units = Vec::new();
        for &index in &self.volatile {
            let entry = &self.log.entries[index];
            let end = entry.sector.0 + entry.bytes / SECTOR_SIZE;
            // A discard or zeroing is done or not; it has no units of its own.
            let unit = match entry.op {
                LogOp::Write => u64::from(self.options.unit_bytes) / SECTOR_SIZE,
                _ => u64::MAX,
            };
            let mut at = entry.sector.0;
            while at < end {
                let next = (at / unit).saturating_add(1).saturating_mul(unit).min(end);
                let live = self.live_runs(entry, at..next);
                if !live.is_empty() {
                    let (sector, sectors) = (Sector(at), next - at);
                    units.push(VolatileUnit { entry: index, sector, sectors, live });
                }
                at = next;
            }
        }
        units
    }

    fn point(&mut self, time: u64) -> CrashPoint {
        let index = self.index;
        self.index += 1;
        CrashPoint {
            index,
            time,
            log: self.log.clone(),
            options: self.options,
            durable: self.durable.fork(),
            units: self.units(),
        }
    }
}

impl Iterator for CrashPoints {
    type Item = CrashPoint;

    fn next(&mut self) -> Option<CrashPoint> {
        self.land();
        while let Some(event) = self.events.next() {
            if !event.completion && self.log.entries[event.entry].is_change() {
                self.volatile.push(event.entry);
                continue;
            }
            self.landing = self.made_durable(event);
            if !self.landing.is_empty() {
                return Some(self.point(event.time));
            }
        }
        if std::mem::replace(&mut self.finished, true) {
            return None;
        }
        Some(self.point(self.log.now))
    }
}

/// A choice of volatile units.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct UnitSet {
    chosen: Vec<bool>,
}

impl UnitSet {
    /// None of `count` units.
    pub fn none(count: usize) -> Self {
        Self { chosen: vec![false; count] }
    }

    /// All of `count` units.
    pub fn all(count: usize) -> Self {
        Self { chosen: vec![true; count] }
    }

    /// The first `first` of `count` units.
    pub fn prefix(count: usize, first: usize) -> Self {
        Self { chosen: (0..count).map(|n| n < first).collect() }
    }

    /// By the bits of a number, the lowest for the first unit.
    pub fn bits(count: usize, bits: u64) -> Self {
        Self { chosen: (0..count).map(|n| n < 64 && bits >> n & 1 == 1).collect() }
    }

    /// Exactly these.
    pub fn from_bools(chosen: Vec<bool>) -> Self {
        Self { chosen }
    }

    /// Of how many units it is a choice.
    pub fn count(&self) -> usize {
        self.chosen.len()
    }

    /// Whether a unit is in it.
    pub fn contains(&self, unit: usize) -> bool {
        self.chosen.get(unit).copied().unwrap_or(false)
    }

    /// The other choice for one unit.
    #[must_use]
    pub fn toggled(mut self, unit: usize) -> Self {
        if let Some(chosen) = self.chosen.get_mut(unit) {
            *chosen = !*chosen;
        }
        self
    }

    /// The choices worth a test: all of them up to `exhaustive` units (at most 20),
    /// else every prefix, all but one, only one, and `seeded` ones by chance.
    pub fn choose(
        count: usize,
        exhaustive: usize,
        seeded: usize,
        seed: u64,
    ) -> Box<dyn Iterator<Item = Self> + Send> {
        if count <= exhaustive.min(20) {
            return Box::new((0..1u64 << count).map(move |bits| Self::bits(count, bits)));
        }
        let prefixes = (0..=count).map(move |first| Self::prefix(count, first));
        // The last is a prefix, and so is the first alone.
        let omissions = (0..count - 1).map(move |unit| Self::all(count).toggled(unit));
        let inclusions = (1..count).map(move |unit| Self::none(count).toggled(unit));
        let mut rng = Rng::new(seed);
        let chance = (0..seeded)
            .map(move |_| Self { chosen: (0..count).map(|_| rng.next_u64() & 1 == 1).collect() });
        Box::new(prefixes.chain(omissions).chain(inclusions).chain(chance))
    }
}

impl std::fmt::Debug for UnitSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UNITS=")?;
        self.chosen.iter().try_for_each(|&chosen| f.write_str(if chosen { "1" } else { "0" }))
    }
}
