//! What our replay leaves is what e2fsck's and the kernel's leave, block for block.
//!
//! `cargo test` compares a few states of each workload; with `UEXT_LONG=1` (`make identity`) or in `make crash`
//! all moments of all workloads, over 1,000 states.

use uext_blockdev::dm::{CrashOptions, SnapshotDevice, UnitSet, WriteLog};
use uext_tests::identity::Replays;

use std::sync::Arc;

/// States of a workload when nothing else was asked for.
const STATES: usize = 6;
/// States of a workload with `UEXT_LONG`.
const LONG_STATES: usize = 140;

/// Compares states of a recorded workload; how many there were.
pub fn compare(name: &str, base: &Arc<Vec<u8>>, log: &WriteLog) -> usize {
    let long = std::env::var_os("UEXT_LONG").is_some() || std::env::var_os("UEXT_CRASH").is_some();
    let most = if long { LONG_STATES } else { STATES };
    let replays = Replays::new(base);
    let start = SnapshotDevice::over_vec(base.clone());
    let mut states = Vec::new();
    for point in log.crash_points(&start, CrashOptions::default()) {
        let count = point.units().len();
        let seed = point.index as u64;
        for (index, set) in UnitSet::choose(count, 2, 3, seed).enumerate() {
            states.push((format!("point {} set {index}", point.index), point.state(&set)));
        }
    }
    let mut compared = 0;
    let stride = states.len().div_ceil(most).max(1);
    // The last states are those with the fullest log.
    for (what, disk) in states.iter().rev().step_by(stride) {
        let state = disk.to_vec().expect("a snapshot can be read");
        match replays.judge(state) {
            Ok(done) => compared += usize::from(done),
            Err(error) => panic!("{name}, {what}: {error}"),
        }
    }
    compared
}
