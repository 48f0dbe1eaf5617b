//! Who says whether a disk after a power cut is good.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use uext_blockdev::BlockDevice;
use uext_blockdev::dm::SnapshotDevice;
use uext_ext4::{DataMode, Ext4, MountOptions};
use uext_ondisk::features::RoCompat;
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, State, Superblock};
use uext_tests::has_repairs;
use uext_tools::fsck;
use uext_vfs::{FileHandle, FileSystem, WriteFlags};

use crate::history::History;
use crate::look::{read_all, walk};
use crate::recorder::{ROOT, options};

/// Mounts the disk (which replays it), judges what is there, writes again, unmounts, and
/// lets our check judge the rest.
///
/// # Errors
/// What is wrong.
pub fn ours(
    disk: &Arc<SnapshotDevice>,
    mode: DataMode,
    history: &History,
    time: u64,
) -> Result<(), String> {
    let fs = Ext4::mount(disk.clone(), "after the cut", &options(mode, false))
        .map_err(|error| format!("mount: {error}"))?;
    let (tree, inos) = walk(&*fs);
    let judged = history.judge(time, &tree, &mut |path| read_all(&*fs, inos[path]));
    let used = judged.and_then(|()| use_it(&*fs));
    fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
    used?;
    check(disk, "after mount and unmount", true)
}

/// Our check of a disk that must be clean; what the journal holds counts. `strict` about counts,
/// which nobody keeps while a filesystem is in use.
fn check(disk: &SnapshotDevice, when: &str, strict: bool) -> Result<(), String> {
    let mut text = Vec::new();
    let options = fsck::Options { force: true, strict, ..fsck::Options::default() };
    let outcome = fsck::check(disk, &options, &mut fsck::Progress::off(), &mut text);
    if outcome.exit == 0 {
        return Ok(());
    }
    Err(format!("{when}:\n{}", String::from_utf8_lossy(&text)))
}

/// Mounts a disk that may be refused, and judges it as if nothing had been promised; whether
/// it was mounted.
///
/// # Errors
/// What is wrong.
pub fn any_moment(
    disk: &Arc<SnapshotDevice>,
    mode: DataMode,
    history: &History,
) -> Result<bool, String> {
    let Ok(fs) = Ext4::mount(disk.clone(), "damaged", &options(mode, false)) else {
        return Ok(false);
    };
    let (tree, _) = walk(&*fs);
    let judged = history.judge_names(&tree);
    fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
    judged?;
    check(disk, "after mount and unmount", true).map(|()| true)
}

/// Work after the recovery: what it found free must be free.
fn use_it(fs: &dyn FileSystem) -> Result<(), String> {
    let say = |what: &'static str| move |error| format!("{what} after recovery: {error:?}");
    let dir = fs.mkdir(&ROOT, fs.root(), b"after", 0o755).map_err(say("mkdir"))?.attr.ino;
    for name in [b"1", b"2"] {
        let file =
            fs.mknod(&ROOT, dir, name, libc::S_IFREG | 0o644, 0).map_err(say("mknod"))?.attr.ino;
        let data = [7; 10_000];
        fs.write(&ROOT, file, FileHandle::default(), 0, &data, WriteFlags::empty())
            .map_err(say("write"))?;
    }
    Ok(())
}

/// A file in memory that takes the shape of one disk after the other, for e2fsck.
pub struct Kernel {
    dir: TempDir,
    base: Arc<Vec<u8>>,
}

impl Kernel {
    /// For disks over this image.
    pub fn new(base: Arc<Vec<u8>>) -> Self {
        let dir = tempfile::Builder::new().prefix("uext-crash-").tempdir_in("/dev/shm");
        Self { dir: dir.expect("a directory in /dev/shm"), base }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Writes all of it, since e2fsck may have changed what it was.
    fn put(&self, disk: &SnapshotDevice) -> File {
        let mut how = File::options();
        how.read(true).write(true).create(true).truncate(false);
        let file = how.open(self.path()).expect("create the disk's file");
        file.write_all_at(&self.base, 0).expect("write the disk's file");
        let device: &dyn BlockDevice = disk;
        for block in disk.changed_blocks() {
            let at = block * 4096;
            let len = (self.base.len() as u64 - at).min(4096);
            let data = device.read_at(at, len as usize).expect("a snapshot can be read");
            file.write_all_at(&data, at).expect("write the disk's file");
        }
        file
    }

    /// Our check through the journal; e2fsck's own replay, and its check of what that made.
    ///
    /// # Errors
    /// What they printed.
    pub fn judge_raw(&self, disk: &SnapshotDevice) -> Result<(), String> {
        let before = disk.fingerprint();
        check(disk, "through the journal", false)?;
        if before != disk.fingerprint() {
            return Err("a check that only reports has written".into());
        }
        let file = self.put(disk);
        let replayed = e2fsck(&self.path(), &["-y", "-E", "journal_only"]);
        if replayed.0 > 1 {
            return Err(format!("e2fsck's replay ends with {}: {}", replayed.0, replayed.1));
        }
        if has_orphans(&file) {
            // Deleting orphans is what comes after the replay, and is no repair.
            let (exit, text) = e2fsck(&self.path(), &["-fy"]);
            if exit > 1 || has_repairs(&text) {
                return Err(format!("e2fsck repairs after its replay ({exit}):\n{text}"));
            }
        }
        clean(&self.path(), "after its own replay")
    }

    /// e2fsck's check of a disk that must be clean.
    ///
    /// # Errors
    /// What it printed.
    pub fn judge_clean(&self, disk: &SnapshotDevice) -> Result<(), String> {
        drop(self.put(disk));
        clean(&self.path(), "after mount and unmount")
    }

    /// A disk without a journal: e2fsck repairs it and is content with what it did, and all
    /// that was promised is there.
    ///
    /// # Errors
    /// What is missing, or what e2fsck printed.
    pub fn judge_repaired(
        &self,
        disk: &SnapshotDevice,
        history: &History,
        time: u64,
    ) -> Result<(), String> {
        drop(self.put(disk));
        if says_clean(disk) {
            clean(&self.path(), "though it says that it is clean")?;
        }
        let (exit, text) = e2fsck(&self.path(), &["-fy"]);
        if exit > 2 {
            return Err(format!("e2fsck -fy ends with {exit}:\n{text}"));
        }
        clean(&self.path(), "after its repair")?;
        let repaired = std::fs::read(self.path()).expect("read the disk's file");
        let device = SnapshotDevice::over_vec(Arc::new(repaired));
        let options = MountOptions { read_only: true, ..options(DataMode::Ordered, false) };
        let fs = Ext4::mount(device, "after the repair", &options)
            .map_err(|error| format!("mount after the repair: {error}"))?;
        let (tree, inos) = walk(&*fs);
        let judged = history.judge_kept(time, &tree, &mut |path| read_all(&*fs, inos[path]));
        fs.unmount().map_err(|error| format!("unmount: {error:?}"))?;
        judged
    }
}

/// Whether the primary superblock fits no checksum, being half of one write and half of another.
pub fn superblock_is_torn(disk: &SnapshotDevice) -> bool {
    let device: &dyn BlockDevice = disk;
    let bytes = device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).expect("a snapshot can be read");
    Superblock::parse_torn(&bytes).is_some()
}

/// Whether the superblock says that no check is needed.
fn says_clean(disk: &SnapshotDevice) -> bool {
    let device: &dyn BlockDevice = disk;
    let bytes = device.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE).expect("a snapshot can be read");
    Superblock::parse(&bytes).is_ok_and(|sb| sb.state() == State::VALID)
}

fn has_orphans(file: &File) -> bool {
    let mut bytes = [0; 1024];
    file.read_exact_at(&mut bytes, 1024).expect("read the superblock");
    let sb = Superblock::parse(&bytes).expect("a superblock");
    sb.last_orphan().is_some() || sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT)
}

fn clean(path: &Path, when: &str) -> Result<(), String> {
    match e2fsck(path, &["-fn"]) {
        (0, _) => Ok(()),
        (exit, text) => Err(format!("e2fsck -fn {when} ends with {exit}:\n{text}")),
    }
}

/// Its exit status and what it printed.
fn e2fsck(path: &Path, arguments: &[&str]) -> (i32, String) {
    let output = Command::new("timeout")
        .args(["20", "e2fsck"])
        .args(arguments)
        .arg(path)
        .output()
        .expect("run e2fsck");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}
