//! Runs many cases on all processors, stops at the first failure, and reports.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::case::Case;
use crate::cuts::{Budget, Failure, Stats};
use crate::minimise::{line, minimise, run};

/// Runs of workloads that making a failure small may take.
const TRIES: usize = 400;

/// What all cases of a list need at most, by far: a test that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What became of many cases.
pub struct Report {
    pub stats: Stats,
    pub failure: Option<Failure>,
    pub took: Duration,
    /// Time ended it before all cases were through.
    pub cut_short: bool,
}

impl Report {
    /// The line of figures.
    pub fn figures(&self) -> String {
        let s = &self.stats;
        let seconds = self.took.as_secs_f64();
        format!(
            "{} workloads, {} moments, {} states in {seconds:.1} s: {:.0} states/s; {} the same disk, \
             {} the same after replay, {} in recovery, {} with a torn superblock, {} by e2fsck too",
            s.workloads,
            s.points,
            s.states,
            s.states as f64 / seconds,
            s.same_disk,
            s.same_replayed,
            s.nested,
            s.torn,
            s.by_kernel,
        )
    }
}

/// Runs cases until one fails or the time is over.
pub fn run_cases(cases: &[(Case, Budget)], limit: Duration) -> Report {
    let begin = Instant::now();
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let cut_short = AtomicBool::new(false);
    let result: Mutex<(Stats, Option<Failure>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // WHY-RELAXED, all: each case is taken by one thread; the rest are hints.
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((case, budget)) = cases.get(at) else { return };
                    if begin.elapsed() > limit {
                        cut_short.store(true, Ordering::Relaxed);
                        return;
                    }
                    let (stats, failure) = run(case, *budget);
                    let mut result = result.lock().expect("no worker panicked");
                    result.0.add(&stats);
                    if let Some(failure) = failure {
                        stop.store(true, Ordering::Relaxed);
                        result.1.get_or_insert(failure);
                    }
                }
            });
        }
    });
    let (stats, failure) = result.into_inner().expect("no worker panicked");
    let took = begin.elapsed();
    let cut_short = cut_short.into_inner();
    Report { stats, failure, took, cut_short }
}

/// Runs cases and prints the figures.
///
/// # Panics
/// With the smallest failure and the line that repeats it, when there is one.
pub fn check(name: &str, cases: &[(Case, Budget)]) {
    let report = run_cases(cases, LIMIT);
    judge(name, cases, &report);
    assert!(!report.cut_short, "{name}: not all states could be judged in {LIMIT:?}");
}

/// As [`check`], as many as a time allows.
///
/// # Panics
/// As [`check`].
pub fn check_for(name: &str, cases: &[(Case, Budget)], time: Duration) {
    let report = run_cases(cases, time);
    judge(name, cases, &report);
    assert!(report.stats.workloads > 0, "{name}: there was no time for any");
}

fn judge(name: &str, cases: &[(Case, Budget)], report: &Report) {
    println!("{name}: {}", report.figures());
    if let Some(failure) = &report.failure {
        let budget = cases.iter().find(|(case, _)| *case == failure.case).map(|(_, b)| *b);
        let small = budget.map_or_else(|| failure.clone(), |b| minimise(failure, b, TRIES));
        panic!("{name}: {}\nREPLAY: {}", small.why, line(&small));
    }
}
