//! Images to start with, and e2fsck over what a run left.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use uext_blockdev::BlockDevice;
use uext_blockdev::dm::SnapshotDevice;
use uext_ext4::MountOptions;
use uext_ondisk::superblock::{State, Superblock};
use uext_tests::run;

/// An image to start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// `ext2`, `ext3` or `ext4`.
    pub fs: &'static str,
    /// Bytes per block.
    pub block: u32,
}

impl Image {
    /// Whether it has a journal.
    pub fn has_journal(self) -> bool {
        self.fs != "ext2"
    }

    /// Makes it, `mib` MiB long, always the same.
    pub fn make(self, mib: u64, more: &[&str]) -> Arc<Vec<u8>> {
        let file = tempfile::Builder::new().prefix("uext-fault-").tempfile_in("/dev/shm");
        let file = file.expect("a file in /dev/shm");
        file.as_file().set_len(mib << 20).expect("size an image");
        let mut mkfs = Command::new("mke2fs");
        mkfs.args(["-q", "-F", "-t", self.fs, "-b", &self.block.to_string()]);
        mkfs.args(["-U", "0123abcd-4567-89ab-cdef-0123456789ab"]);
        mkfs.args(["-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"]);
        if self.has_journal() {
            mkfs.args(["-J", &format!("size={}", if self.block == 1024 { 1 } else { 4 })]);
        }
        if self.fs == "ext4" {
            mkfs.args(["-O", "metadata_csum_seed,orphan_file"]);
        }
        run(mkfs.args(more).arg(file.path()));
        Arc::new(std::fs::read(file.path()).expect("read an image"))
    }
}

/// How everything here is mounted: no timer fires during a run, and a cache that holds all that fails.
pub fn options() -> MountOptions {
    MountOptions {
        commit_interval: Duration::from_secs(86_400),
        cache_bytes: Some(8 << 20),
        ..MountOptions::default()
    }
}

/// A file in memory that takes the shape of one disk after the other, for e2fsck.
pub struct Checker {
    dir: TempDir,
    bytes: u64,
}

impl Checker {
    /// For disks of so many bytes.
    pub fn new(bytes: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("uext-fault-").tempdir_in("/dev/shm");
        Self { dir: dir.expect("a directory in /dev/shm"), bytes: bytes as u64 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn put(&self, disk: &SnapshotDevice) {
        const BLOCK: usize = 4096;
        let mut how = std::fs::File::options();
        how.read(true).write(true).create(true).truncate(true);
        let file = how.open(self.path()).expect("create the disk's file");
        file.set_len(self.bytes).expect("size the disk's file");
        let bytes = disk.to_vec().expect("a snapshot can be read");
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            if block.iter().any(|&byte| byte != 0) {
                file.write_all_at(block, (index * BLOCK) as u64).expect("write the disk's file");
            }
        }
    }

    /// e2fsck finds nothing.
    ///
    /// # Errors
    /// What it printed.
    pub fn clean(&self, disk: &SnapshotDevice) -> Result<(), String> {
        self.put(disk);
        self.expect("-fn", 0)
    }

    /// e2fsck repairs it, and then finds nothing; the repaired disk.
    ///
    /// # Errors
    /// What it printed.
    pub fn repair(&self, disk: &SnapshotDevice) -> Result<Arc<SnapshotDevice>, String> {
        self.put(disk);
        self.expect("-fy", 1)?;
        self.expect("-fn", 0)?;
        let bytes = std::fs::read(self.path()).expect("read the disk's file");
        Ok(SnapshotDevice::over_vec(Arc::new(bytes)))
    }

    fn expect(&self, how: &str, most: i32) -> Result<(), String> {
        let output = Command::new("timeout").args(["20", "e2fsck", how]).arg(self.path()).output();
        let output = output.expect("run e2fsck");
        let exit = output.status.code().unwrap_or(-1);
        if (0..=most).contains(&exit) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        Err(format!("e2fsck {how} ends with {exit}:\n{text}"))
    }
}

/// Whether the superblock says that errors were found.
pub fn has_error_flag(disk: &SnapshotDevice) -> bool {
    let device: &dyn BlockDevice = disk;
    let bytes = device.read_at(1024, 1024).expect("a snapshot can be read");
    Superblock::parse(&bytes).is_ok_and(|sb| sb.state().contains(State::ERROR))
}
