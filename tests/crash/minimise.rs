//! Makes a failure small: fewest operations, then fewest units on the disk, then fewest
//! sectors. And the line that repeats it.

use uext_blockdev::dm::{SnapshotDevice, UnitSet};

use crate::case::{Case, Work};
use crate::cuts::{At, Budget, Court, Cut, Failure, Stats, make, parse_at, recovery_log};
use crate::image::image;
use crate::quiet::quietly;
use crate::recorder::Recording;

/// Removes parts of a list as long as `fails` (Zeller's ddmin).
pub fn ddmin<T: Clone>(list: &[T], mut fails: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut list = list.to_vec();
    let mut pieces = 2;
    while !list.is_empty() {
        let size = list.len().div_ceil(pieces);
        let mut start = 0;
        let mut removed = false;
        while start < list.len() {
            let end = (start + size).min(list.len());
            let rest: Vec<T> = list[..start].iter().chain(&list[end..]).cloned().collect();
            if fails(&rest) {
                list = rest;
                removed = true;
            } else {
                start = end;
            }
        }
        if size == 1 && !removed {
            break;
        }
        pieces = if removed { 2 } else { (pieces * 2).min(list.len().max(1)) };
    }
    list
}

/// Records a case and judges its states up to the first failure.
pub fn run(case: &Case, budget: Budget) -> (Stats, Option<Failure>) {
    match quietly(|| case.record()).and_then(|done| done) {
        Err(why) => (Stats::default(), Some(Failure { case: case.clone(), cuts: Vec::new(), why })),
        Ok(recording) => {
            let mut court = Court::new(case, &recording, budget);
            let failure = court.judge_all().err();
            (court.stats, failure)
        }
    }
}

/// The smallest failure that is found from this one, with at most `tries` runs of workloads.
pub fn minimise(failure: &Failure, budget: Budget, tries: usize) -> Failure {
    let mut best = failure.clone();
    let Some((before, ops)) = operations(&failure.case) else { return shrink_units(best) };
    let mut left = tries;
    let mut try_case = |best: &mut Failure, before: &[_], ops: &[_]| {
        if left == 0 {
            return false;
        }
        left -= 1;
        let work = Work::Ops { before: before.to_vec(), ops: ops.to_vec() };
        let case = Case { work, ..best.case.clone() };
        match run(&case, budget).1 {
            // Another failure is as good, if it is one of states and not of the workload.
            Some(found) if found.cuts.is_empty() == best.cuts.is_empty() => {
                *best = found;
                true
            }
            _ => false,
        }
    };
    let ops = ddmin(&ops, |ops| try_case(&mut best, &before, ops));
    ddmin(&before, |before| try_case(&mut best, before, &ops));
    shrink_units(best)
}

/// What a case does, as operations.
fn operations(case: &Case) -> Option<(Vec<crate::ops::Op>, Vec<crate::ops::Op>)> {
    match &case.work {
        Work::Ops { before, ops } => Some((before.clone(), ops.clone())),
        Work::Fixed(_) => Some((Vec::new(), quietly(|| case.record()).ok()?.ok()?.ops)),
    }
}

/// The fewest units, then the fewest sectors, of the last cut.
fn shrink_units(failure: Failure) -> Failure {
    let Ok(Ok(recording)) = quietly(|| failure.case.record()) else { return failure };
    let fewer = shrink_last(&failure, &recording);
    let Some(Cut { at: At::Blocks(index), units }) = fewer.cuts.last() else { return fewer };
    // The same moment has the same writes in either size of units, in the same order.
    let Ok(made) = disk(&fewer.case, &recording, &fewer.cuts) else { return fewer };
    let mut torn = fewer.clone();
    let at = At::Sectors(*index);
    let Some(sectors) = sectors_of(&fewer, &recording, at, units) else { return fewer };
    torn.cuts.pop();
    torn.cuts.push(Cut { at, units: sectors });
    let same = disk(&torn.case, &recording, &torn.cuts)
        .is_ok_and(|torn| torn.disk.fingerprint() == made.disk.fingerprint());
    if same { shrink_last(&torn, &recording) } else { fewer }
}

/// The sectors of chosen blocks.
fn sectors_of(
    failure: &Failure,
    recording: &Recording,
    at: At,
    units: &UnitSet,
) -> Option<UnitSet> {
    use uext_blockdev::dm::CrashOptions;
    let (log, start) = last_log(&failure.case, recording, &failure.cuts).ok()?;
    let At::Sectors(index) = at else { return None };
    let blocks = log.crash_points(&start, CrashOptions::default()).nth(index)?;
    let options = CrashOptions { unit_bytes: 512, ..CrashOptions::default() };
    let sectors = log.crash_points(&start, options).nth(index)?;
    let chosen = sectors.units().iter().map(|sector| {
        blocks.units().iter().enumerate().any(|(at, block)| {
            let inside = block.sector.0..block.sector.0 + block.sectors;
            units.contains(at) && block.entry == sector.entry && inside.contains(&sector.sector.0)
        })
    });
    Some(UnitSet::from_bools(chosen.collect()))
}

fn shrink_last(failure: &Failure, recording: &Recording) -> Failure {
    let Some(last) = failure.cuts.last() else { return failure.clone() };
    let count = last.units.count();
    let chosen: Vec<usize> = (0..count).filter(|&unit| last.units.contains(unit)).collect();
    let mut best = failure.clone();
    ddmin(&chosen, |chosen| {
        let units = UnitSet::from_bools((0..count).map(|unit| chosen.contains(&unit)).collect());
        let mut cuts = failure.cuts.clone();
        if let Some(last) = cuts.last_mut() {
            last.units = units;
        }
        match judge_one(&failure.case, recording, &cuts) {
            Err(why) => {
                best = Failure { cuts, why, ..failure.clone() };
                true
            }
            Ok(()) => false,
        }
    });
    best
}

/// The log that the last cut is in, and the disk at its start.
fn last_log(
    case: &Case,
    recording: &Recording,
    cuts: &[Cut],
) -> Result<(uext_blockdev::dm::WriteLog, std::sync::Arc<SnapshotDevice>), String> {
    let image = image(case.kind, case.large);
    let mut start = SnapshotDevice::over_vec(image.bytes.clone());
    let mut log = recording.log.clone();
    for cut in &cuts[..cuts.len().saturating_sub(1)] {
        start = make(&log, &start, cut.at, &|_| cut.units.clone())?.disk;
        log = recovery_log(&start, case)?;
    }
    Ok((log, start))
}

struct Disk {
    disk: std::sync::Arc<SnapshotDevice>,
    time: u64,
}

/// The disk that cuts leave, and the time of the first.
fn disk(case: &Case, recording: &Recording, cuts: &[Cut]) -> Result<Disk, String> {
    let image = image(case.kind, case.large);
    let mut disk = SnapshotDevice::over_vec(image.bytes.clone());
    let (mut log, mut time) = (recording.log.clone(), None);
    for (index, cut) in cuts.iter().enumerate() {
        if index > 0 {
            log = recovery_log(&disk, case)?;
        }
        let made = make(&log, &disk, cut.at, &|_| cut.units.clone())?;
        time = time.or(Some(made.time));
        disk = made.disk;
    }
    Ok(Disk { disk, time: time.ok_or("no cut")? })
}

/// Judges one state by everybody.
///
/// # Errors
/// What is wrong with it.
pub fn judge_one(case: &Case, recording: &Recording, cuts: &[Cut]) -> Result<(), String> {
    let made = disk(case, recording, cuts)?;
    let budget = Budget {
        exhaustive: 0,
        seeded: 0,
        sets: 0,
        torn_sets: 0,
        prefixes: 0,
        kernel_share: 1,
        nested: 0,
        nested_sets: 0,
    };
    Court::new(case, recording, budget).judge_now(made.time, &made.disk)
}

/// The line that repeats a failure.
pub fn line(failure: &Failure) -> String {
    let cuts: Vec<String> = failure.cuts.iter().map(|cut| cut.at.to_string()).collect();
    let units: Vec<String> = failure.cuts.iter().map(|cut| units_text(&cut.units)).collect();
    format!(
        "SEED={} WORKLOAD='{}' CUT={} UNITS={} cargo test -p uext-tests --test crash replay",
        failure.case.seed,
        failure.case,
        if cuts.is_empty() { "-".to_owned() } else { cuts.join("/") },
        if units.is_empty() { "-".to_owned() } else { units.join("/") },
    )
}

/// Which units are there: `0-3,7`, or `none`.
fn units_text(units: &UnitSet) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for unit in (0..units.count()).filter(|&unit| units.contains(unit)) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == unit => *last = unit,
            _ => runs.push((unit, unit)),
        }
    }
    let text = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let text: Vec<String> = runs.iter().map(text).collect();
    if text.is_empty() { "none".to_owned() } else { text.join(",") }
}

fn parse_units(text: &str, count: usize) -> Result<UnitSet, String> {
    let mut chosen = vec![false; count];
    for run in text.split(',').filter(|run| !matches!(*run, "none" | "-" | "")) {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("no units: `{run}`"));
        let range = number(first)?..=number(last)?;
        let units = chosen.get_mut(range).ok_or_else(|| format!("of {count} units: `{run}`"))?;
        units.fill(true);
    }
    Ok(UnitSet::from_bools(chosen))
}

/// Repeats a failure from the words of its line.
///
/// # Errors
/// What is wrong with the state, or with the words.
pub fn replay(seed: u64, workload: &str, cut: &str, units: &str) -> Result<(), String> {
    let case = Case::parse(workload, seed)?;
    let recording = quietly(|| case.record())??;
    if cut == "-" {
        return Ok(());
    }
    let image = image(case.kind, case.large);
    let mut start = SnapshotDevice::over_vec(image.bytes.clone());
    let (mut log, mut cuts) = (recording.log.clone(), Vec::new());
    for (at, units) in cut.split('/').zip(units.split('/')) {
        if !cuts.is_empty() {
            log = recovery_log(&start, &case)?;
        }
        let at = parse_at(at)?;
        let count = make(&log, &start, at, &UnitSet::none)?.units;
        let units = parse_units(units, count)?;
        start = make(&log, &start, at, &|_| units.clone())?.disk;
        cuts.push(Cut { at, units });
    }
    judge_one(&case, &recording, &cuts)
}

#[test]
fn ddmin_finds_the_few_that_matter() {
    let all: Vec<u32> = (0..100).collect();
    let fails = |list: &[u32]| list.contains(&13) && list.contains(&77);
    assert_eq!(ddmin(&all, fails), [13, 77]);
    assert!(ddmin(&all, |_| true).is_empty());
}

#[test]
fn units_read_as_they_were_written() {
    for text in ["none", "0", "0-3,7", "2,4,6-9"] {
        let set = parse_units(text, 10).expect("good units");
        assert_eq!(units_text(&set), text);
    }
    assert!(parse_units("3-12", 10).is_err());
}
