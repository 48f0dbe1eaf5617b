//! The cuts of a recorded workload, and what is asked of each.

use std::sync::Arc;
use std::time::Instant;

use uext_blockdev::dm::{CrashOptions, SnapshotDevice, UnitSet, WriteLog};

use crate::history::History;
use crate::judges::{self, Kernel};

/// Subsets of the volatile units tested at one flush boundary.
const SETS: usize = 8;
/// Sets of sectors tested at one flush boundary.
const TORN_SETS: usize = 3;
/// Prefixes tested when `UEXT_CRASH_STATES` does not say.
const PREFIXES: usize = 300;
/// One state of so many that are no flush boundary goes to e2fsck, if `UEXT_CRASH_KERNEL` is not set.
const KERNEL_SHARE: usize = 12;

/// `UEXT_CRASH_KERNEL=all`: every prefix, and every state to e2fsck as well.
fn kernel_judges_all() -> bool {
    std::env::var("UEXT_CRASH_KERNEL").is_ok_and(|which| which == "all")
}

/// Says on the way out of a panic how to come back to it.
struct Replay<'a> {
    name: &'a str,
    cut: String,
}

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "REPLAY: UEXT_CRASH_CUT={} cargo test -p uext-tests --test crash {}",
                self.cut, self.name
            );
        }
    }
}

struct Court<'a> {
    name: &'a str,
    history: &'a History,
    kernel: Kernel,
    only: Option<String>,
    states: usize,
    by_kernel: usize,
    /// States whose superblock is half of one write, half of another.
    torn: usize,
    failures: Vec<String>,
}

impl Court<'_> {
    fn judge(&mut self, cut: String, time: u64, disk: &Arc<SnapshotDevice>, kernel: bool) {
        if self.only.as_ref().is_some_and(|only| *only != cut) {
            return;
        }
        let kernel = kernel || kernel_judges_all();
        let replay = Replay { name: self.name, cut: cut.clone() };
        self.states += 1;
        self.by_kernel += usize::from(kernel);
        // From a superblock without a backup e2fsck does not come back.
        let torn = judges::superblock_is_torn(disk);
        self.torn += usize::from(torn);
        let raw = if kernel && !torn { self.kernel.judge_raw(disk) } else { Ok(()) };
        let judged = judges::ours(disk, self.history, time);
        let after = match &judged {
            Ok(()) if kernel => self.kernel.judge_clean(disk),
            _ => Ok(()),
        };
        for error in [raw, judged, after].into_iter().filter_map(Result::err) {
            self.failures.push(format!("UEXT_CRASH_CUT={cut}: {error}"));
        }
        assert!(self.failures.len() < 5, "{}:\n{}", self.name, self.failures.join("\n"));
        drop(replay);
    }
}

/// Judges every cut of a workload's log.
pub fn judge_all(name: &str, base: &Arc<Vec<u8>>, log: &WriteLog, history: &History) {
    let begin = Instant::now();
    let only = std::env::var("UEXT_CRASH_CUT").ok();
    let every = only.is_some() || kernel_judges_all();
    let mut court = Court {
        name,
        history,
        kernel: Kernel::new(base.clone()),
        only,
        states: 0,
        by_kernel: 0,
        torn: 0,
        failures: Vec::new(),
    };
    let start = SnapshotDevice::over_vec(base.clone());
    let boundaries = judge_boundaries(&mut court, &start, log);
    judge_torn_blocks(&mut court, &start, log);
    let prefixes = judge_prefixes(&mut court, &start, log, every);
    let took = begin.elapsed().as_secs_f64();
    println!(
        "{name}: {} steps, {} writes, {boundaries} flush boundaries, {prefixes} prefixes: {} states \
         ({} by e2fsck too, {} with a torn superblock) in {took:.1} s, {:.0} states/s",
        history.len(),
        log.completed_changes(),
        court.states,
        court.by_kernel,
        court.torn,
        court.states as f64 / took
    );
    assert!(court.failures.is_empty(), "{name}:\n{}", court.failures.join("\n"));
}

fn judge_boundaries(court: &mut Court<'_>, start: &SnapshotDevice, log: &WriteLog) -> usize {
    let mut boundaries = 0;
    for point in log.crash_points(start, CrashOptions::default()) {
        boundaries += 1;
        let count = point.units().len();
        let seed = point.index as u64;
        let all: Vec<UnitSet> = UnitSet::choose(count, 3, 4, seed).collect();
        let mut sets = vec![UnitSet::none(count), UnitSet::all(count)];
        // Those by chance come last, so going backwards takes some of them always.
        sets.extend(all.iter().rev().step_by(all.len().div_ceil(SETS)).cloned());
        sets.dedup();
        for (index, set) in sets.iter().enumerate() {
            let kernel = index < 1 || (point.index + index).is_multiple_of(KERNEL_SHARE);
            let cut = format!("point:{}:{index}", point.index);
            court.judge(cut, point.time, &point.state(set), kernel);
        }
    }
    boundaries
}

/// A disk that writes sectors and not blocks: blocks half old, half new, the superblock too.
fn judge_torn_blocks(court: &mut Court<'_>, start: &SnapshotDevice, log: &WriteLog) {
    let sectors = CrashOptions { unit_bytes: 512, ..CrashOptions::default() };
    for point in log.crash_points(start, sectors) {
        let count = point.units().len();
        let sets = UnitSet::choose(count, 0, TORN_SETS, point.index as u64);
        // Those by chance come last.
        let sets: Vec<UnitSet> = sets.collect();
        for (index, set) in sets.iter().rev().take(TORN_SETS).enumerate() {
            let cut = format!("sectors:{}:{index}", point.index);
            let kernel = (point.index + index).is_multiple_of(KERNEL_SHARE);
            court.judge(cut, point.time, &point.state(set), kernel);
        }
    }
}

fn judge_prefixes(
    court: &mut Court<'_>,
    start: &SnapshotDevice,
    log: &WriteLog,
    every: bool,
) -> usize {
    let states = std::env::var("UEXT_CRASH_STATES").ok().and_then(|text| text.parse().ok());
    let most: usize = states.unwrap_or(PREFIXES);
    let mut times: Vec<u64> = log
        .entries
        .iter()
        .filter(|entry| entry.is_change() && entry.done_before(log.now))
        .filter_map(|entry| entry.completed)
        .collect();
    times.sort_unstable();
    let stride = if every || most == 0 { 1 } else { times.len().div_ceil(most).max(1) };
    let mut tested = 0;
    for count in (0..=times.len()).step_by(stride) {
        let time = times.get(count).copied().unwrap_or(log.now);
        let cut = format!("prefix:{count}");
        if court.only.as_ref().is_some_and(|only| *only != cut) {
            continue;
        }
        let disk = log.prefix(start, count).expect("the base can be read");
        tested += 1;
        court.judge(cut, time, &disk, tested % KERNEL_SHARE == 0);
    }
    tested
}
