//! What coordinator and clients agree on before anything starts.
//!
//! Workers are numbered through all clients. A *set* of files belongs to one worker, or to
//! the `share` workers that follow each other. Slots of the table are the files of set 0,
//! of set 1 and so on, and behind them a log for each worker where the workload has one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::workload::{Step, Workload};

/// What is driven.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// A mounted directory; the files are in a directory of their own in it.
    Directory(PathBuf),
    /// A plain file or a device, of so many bytes.
    Device(PathBuf, u64),
    /// An NBD export by its address, of so many bytes.
    Nbd(String, u64),
}

/// Of the directory in the target.
pub const DIRECTORY: &str = "uext-drive";
/// Name of the file that a thread's ways of copying use.
pub const STAGING: &str = "staging";

/// The plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What is driven.
    pub target: Target,
    /// What is done.
    pub workload: Workload,
    /// Tells this run's blocks from others'.
    pub run: u64,
    /// Where all chance comes from.
    pub seed: u64,
    /// Processes.
    pub clients: usize,
    /// Threads of each.
    pub threads: usize,
    /// Steps of all together; 0: no limit.
    pub ops: u64,
    /// Steps of all together per second; 0: no limit.
    pub rate: f64,
    /// Seconds in which the threads start, one after the other.
    pub ramp: f64,
}

impl Plan {
    /// Threads of all clients.
    pub fn workers(&self) -> usize {
        self.clients * self.threads
    }

    /// Sets of files.
    pub fn sets(&self) -> usize {
        self.workers().div_ceil(self.workload.share)
    }

    /// Whether each worker has a log.
    pub fn has_logs(&self) -> bool {
        let logs = |step: &Step, weight: &u32| *step == Step::Log && *weight > 0;
        self.is_directory()
            && self.workload.phases().iter().any(|p| p.steps.iter().any(|(s, w)| logs(s, w)))
    }

    /// Entries of the table.
    pub fn slots(&self) -> usize {
        self.sets() * self.workload.files + if self.has_logs() { self.workers() } else { 0 }
    }

    /// Blocks of each.
    pub fn blocks_per_slot(&self) -> usize {
        self.workload.most_blocks()
    }

    /// Whether there are names.
    pub fn is_directory(&self) -> bool {
        matches!(self.target, Target::Directory(_))
    }

    /// The slots that a worker uses.
    pub fn slots_of(&self, worker: usize) -> std::ops::Range<usize> {
        let set = worker / self.workload.share;
        set * self.workload.files..(set + 1) * self.workload.files
    }

    /// A worker's log.
    pub fn log_of(&self, worker: usize) -> Option<usize> {
        self.has_logs().then(|| self.sets() * self.workload.files + worker)
    }

    /// Whether a worker is the one of those who share that makes the files.
    pub fn makes_files(&self, worker: usize) -> bool {
        worker.is_multiple_of(self.workload.share)
    }

    /// The client that a slot belongs to; of a shared one the first.
    pub fn client_of(&self, slot: usize) -> usize {
        let files = self.sets() * self.workload.files;
        let worker = if slot < files {
            slot / self.workload.files * self.workload.share
        } else {
            slot - files
        };
        worker / self.threads
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        // Checked: at most 16 MiB.
        self.workload.block as usize
    }

    /// Bytes that a device needs.
    pub fn device_bytes(&self) -> u64 {
        self.slots() as u64 * self.blocks_per_slot() as u64 * self.workload.block
    }

    /// Where a slot begins on a device.
    pub fn device_offset(&self, slot: usize) -> u64 {
        slot as u64 * self.blocks_per_slot() as u64 * self.workload.block
    }

    /// The directory, by number, in which a slot's state has its file.
    pub fn dir_of(&self, slot: usize, state: u64) -> usize {
        let mixed = (slot as u64 ^ state.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
        // Less than `dirs`, which is a usize.
        ((mixed >> 32) % self.workload.dirs as u64) as usize
    }
}

/// A directory's path in the run's directory.
pub fn dir_name(client: usize, dir: usize) -> String {
    format!("c{client:04}/d{dir:03}")
}

/// Whether a name in the run's directory is that of a client's directory.
pub fn is_client_dir(name: &str) -> bool {
    name.strip_prefix('c')
        .is_some_and(|digits| digits.len() >= 4 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A file's name: its slot and the number of its state.
pub fn file_name(slot: usize, state: u64) -> String {
    format!("f{slot:x}.{state:x}")
}

/// What a file's name says.
pub fn parse_file_name(name: &str) -> Option<(usize, u64)> {
    let (slot, state) = name.strip_prefix('f')?.split_once('.')?;
    let parsed = (usize::from_str_radix(slot, 16).ok()?, u64::from_str_radix(state, 16).ok()?);
    (file_name(parsed.0, parsed.1) == name).then_some(parsed)
}

/// How a block names its file: the slot, and the state in which the file was made.
pub fn file_id(slot: usize, birth: u64) -> u64 {
    (slot as u64) << 32 | (birth & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are_and_nothing_else_does() {
        assert_eq!(parse_file_name(&file_name(0x1f, 0x200)), Some((0x1f, 0x200)));
        for name in ["f1", "f1.", "g1.2", "f01.2", "f1.2.3", "f1.2~", "F1.2"] {
            assert_eq!(parse_file_name(name), None, "{name}");
        }
    }

    #[test]
    fn sets_and_logs_take_different_slots() {
        let plan = Plan {
            target: Target::Directory("/".into()),
            workload: Workload::profile("database").expect("a profile"),
            run: 1,
            seed: 1,
            clients: 3,
            threads: 3,
            ops: 0,
            rate: 0.0,
            ramp: 0.0,
        };
        assert_eq!(plan.sets(), 3);
        assert_eq!(plan.slots(), 3 + 9);
        assert_eq!((plan.slots_of(3), plan.slots_of(4), plan.log_of(8)), (0..1, 1..2, Some(11)));
        assert_eq!((plan.client_of(1), plan.client_of(11)), (1, 2));
    }
}
