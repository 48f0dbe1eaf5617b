//! Devices over devices, for tests: what Linux has as device-mapper targets.
//!
//! They stack: a filesystem over [`log_writes`] over [`flakey`] over
//! [`snapshot`] records what it did to a trial image that fails on demand.

pub mod crash;
pub mod flakey;
pub mod log_writes;
#[cfg(shuttle)]
pub mod model;
pub mod snapshot;

pub use crash::{CrashOptions, CrashPoint, DiscardFill, UnitSet};
pub use flakey::Flakey;
pub use log_writes::{LogWrites, WriteLog};
#[cfg(shuttle)]
pub use model::ModelDisk;
pub use snapshot::SnapshotDevice;

/// A small generator (splitmix64) whose seed replays everything drawn from it.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed; every seed is good.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }
}
