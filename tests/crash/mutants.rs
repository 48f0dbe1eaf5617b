//! Planted defects, and who catches them.
//!
//! Each is active in a process of its own, the `hunt`, which goes through the workloads until
//! a state is not as it should be.

use std::process::Command;
use std::time::{Duration, Instant};

use uext_ext4::DataMode;

use crate::case::Case;
use crate::engine::run_cases;
use crate::image::{JOURNALLED, Kind};
use crate::minimise::line;
use crate::{FIXED, damage, generate, tiers};

/// The defects, as the code names them.
const MUTANTS: &[&str] = &[
    "commit-without-preflush",
    "commit-without-fua",
    "commit-before-blocks",
    "mapping-before-data",
    "size-before-data",
    "size-in-another-handle",
    "tag-checksum-wrong",
    "tag-checksum-unchecked",
    "revoke-not-written",
    "revoke-ignored",
    "escape-flag-missing",
    "escape-not-undone",
    "tail-before-checkpoint-flush",
    "tail-not-moved",
    "checkpoint-skips-buffer",
    "orphan-not-added",
    "orphan-not-removed",
    "orphan-present-not-set",
    "orphan-block-checksum-stale",
    "credits-short",
    "frozen-copy-not-taken",
    "fsync-without-commit",
    "fsync-without-barrier",
    "fdatasync-skips-size",
    "freed-blocks-reused-early",
    "rename-without-flush",
    "replay-without-flush",
    "log-emptied-before-replay",
    "needs-recovery-not-set",
    "dirty-flag-not-set",
    "torn-superblock-refused",
    "bitmap-checksum-stale",
    "nlink-not-journalled",
    "journalled-data-home-early",
];

/// What a hunt may take: a defect may well make it hang.
const LIMIT: Duration = Duration::from_secs(900);

/// Everything, in the order in which defects are found soonest.
fn cases() -> Vec<(Case, crate::cuts::Budget)> {
    let fixed = FIXED.iter().map(|&(kind, name)| (Case::fixed(kind, name), tiers::fixed()));
    let journalled = FIXED.iter().map(|&(kind, name)| {
        (Case { mode: DataMode::Journal, ..Case::fixed(kind, name) }, tiers::journalled())
    });
    let apart = FIXED
        .iter()
        .map(|&(kind, name)| (Case { apart: true, ..Case::fixed(kind, name) }, tiers::apart()));
    let kinds = [Kind::Ext4, Kind::Small, Kind::Ext3];
    let short = kinds.iter().flat_map(|&kind| {
        let modes = JOURNALLED.iter();
        modes.flat_map(move |&mode| generate::length_one(kind, mode).step_by(3))
    });
    let without = generate::length_one(Kind::Ext2, DataMode::Ordered).step_by(37);
    fixed
        .chain(without.map(|case| (case, tiers::without_journal())))
        .chain(journalled)
        .chain(short.map(|case| (case, tiers::short())))
        .chain(apart)
        .collect()
}

/// Goes through the workloads until one fails, and says so in a line for the table.
#[test]
fn hunt() {
    let report = run_cases(&cases(), LIMIT);
    let states = report.stats.states;
    if let Some(failure) = report.failure {
        let why = failure.why.lines().next().unwrap_or_default();
        println!("CAUGHT {states} {why}\nREPLAY {}", line(&failure));
        return;
    }
    for workload in tiers::DAMAGED {
        if let Err(why) = damage::flip_bits(&Case::parse(workload, 1).expect("a workload")) {
            println!("CAUGHT {states} {why}");
            return;
        }
    }
    println!("NOTHING {states}");
}

#[test]
fn every_mutant_is_caught() {
    let mut missed = Vec::new();
    println!("{:<30} {:>8} {:>7}  caught by", "mutant", "states", "s");
    for mutant in MUTANTS.iter().filter(|name| chosen(name)) {
        let begin = Instant::now();
        let exe = std::env::current_exe().expect("the test has a path");
        let output = Command::new("timeout")
            .arg((LIMIT * 2).as_secs().to_string())
            .arg(exe)
            .args(["--exact", "mutants::hunt", "--nocapture"])
            .env("UEXT_MUTANT", mutant)
            .output()
            .expect("run the hunt");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let reached = String::from_utf8_lossy(&output.stderr).contains(" reached");
        let line = text.lines().find_map(|line| Some(line.split_once("CAUGHT ")?.1));
        let (states, by) = match line.and_then(|line| line.split_once(' ')) {
            Some((states, by)) => (states, by.to_owned()),
            None if !output.status.success() => ("-", format!("the hunt: {}", output.status)),
            None => {
                missed.push(*mutant);
                ("-", format!("NOBODY{}", if reached { "" } else { ", it was never reached" }))
            }
        };
        let by: String = by.chars().take(110).collect();
        println!("{mutant:<30} {states:>8} {:>7.1}  {by}", begin.elapsed().as_secs_f64());
    }
    assert!(missed.is_empty(), "not caught: {}", missed.join(", "));
}

/// Whether `UEXT_MUTANTS` (a list of names, or nothing for all) names it.
fn chosen(name: &str) -> bool {
    std::env::var("UEXT_MUTANTS").map_or(true, |list| list.split(',').any(|one| one == name))
}

/// Without a planted defect the hunt finds nothing: else the table would prove nothing.
#[test]
fn nothing_is_caught_without_a_mutant() {
    let report = run_cases(&cases(), LIMIT);
    println!("no mutant: {}", report.figures());
    assert!(report.failure.is_none(), "{:?}", report.failure.map(|failure| failure.why));
}
