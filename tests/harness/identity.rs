//! A replay leaves the same blocks whoever does it: uext, e2fsck or the kernel.
//!
//! Compared are all blocks of the device but those of the journal, which is empty after
//! any of the three. In the superblock the fields that each of them keeps for itself are
//! left out: times, counts of mounts, of KiB written and of what is free (the kernel sums
//! the groups), the mark that the journal needs recovery, and the checksum over them.
//! With `UEXT_KEEP=DIR` the images of a difference are kept.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use uext_blockdev::dm::SnapshotDevice;
use uext_jbd2::{JournalLocation, JournalMap, JournalRun, OnDamage, Recovery};
use uext_ondisk::features::{Incompat, RoCompat};
use uext_ondisk::orphan_file;
use uext_ondisk::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};

use crate::mounts::unmount;
use crate::run;

/// Blocks of an inode, by debugfs: mapping blocks among them.
fn blocks_of(image: &Path, inode: u32) -> Vec<u64> {
    let text = debugfs(image, &format!("blocks <{inode}>"));
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// What debugfs says, of a filesystem that has a log to be replayed: its bitmaps may lag behind
/// their checksums, and so are not read (`-c`).
fn debugfs(image: &Path, request: &str) -> String {
    run(Command::new("debugfs").args(["-c", "-R", request]).arg(image))
}

/// An image whose states after power cuts are replayed three times.
pub struct Replays {
    dir: TempDir,
    block_size: usize,
    journal: BTreeSet<u64>,
    map: JournalMap,
    orphan_blocks: Vec<u64>,
}

impl Replays {
    /// For states of this image.
    pub fn new(base: &[u8]) -> Self {
        let dir = tempfile::Builder::new().prefix("uext-replay-").tempdir_in("/dev/shm");
        let dir = dir.expect("a directory in /dev/shm");
        let path = dir.path().join("base");
        std::fs::write(&path, base).expect("write the image");
        let sb = superblock(base).expect("the image has a superblock");
        let inode = sb.journal_inum().expect("the image has a journal");
        let blocks = blocks_of(&path, inode.0);
        assert!(!blocks.is_empty(), "debugfs cannot open the image");
        let runs = debugfs(&path, "dump_extents -l <8>");
        let _ = std::fs::remove_file(&path);
        let orphan_blocks = match sb.orphan_file_inum() {
            Some(inode) => {
                std::fs::write(&path, base).expect("write the image");
                let blocks = blocks_of(&path, inode.0);
                let _ = std::fs::remove_file(&path);
                blocks
            }
            None => Vec::new(),
        };
        Self {
            dir,
            block_size: sb.block_size() as usize,
            map: journal_map(&runs, &blocks, &sb),
            journal: blocks.into_iter().collect(),
            orphan_blocks,
        }
    }

    /// Where the journal lies.
    pub fn map(&self) -> &JournalMap {
        &self.map
    }

    /// Replays a state three times and compares. False when there is nothing to compare: an empty
    /// log; a torn superblock, from which e2fsck and the kernel do not come back without help; or
    /// orphans, which both of them delete together with the replay.
    ///
    /// # Errors
    /// The first difference, or who failed to replay.
    pub fn judge(&self, state: Vec<u8>) -> Result<bool, String> {
        let Ok(sb) = superblock(&state) else { return Ok(false) };
        if !sb.features().incompat.contains(Incompat::RECOVER) {
            return Ok(false);
        }
        let state = Arc::new(state);
        let Some(ours) = self.ours(&state)? else { return Ok(false) };
        if self.has_orphans(&ours) {
            return Ok(false);
        }
        let (theirs, kernel) = (self.e2fsck(&state)?, self.kernel(&state)?);
        let same = same_metadata(&self.journal, &ours, &theirs, Some(&kernel));
        if let (Err(_), Some(dir)) = (&same, std::env::var_os("UEXT_KEEP")) {
            keep(
                Path::new(&dir),
                &[("state", &state), ("ours", &ours), ("e2fsck", &theirs), ("kernel", &kernel)],
            );
        }
        same.map(|()| true)
    }

    fn ours(&self, state: &Arc<Vec<u8>>) -> Result<Option<Vec<u8>>, String> {
        let disk = SnapshotDevice::over_vec(state.clone());
        let block_size = u32::try_from(self.block_size).expect("a block size");
        let journal = JournalLocation { device: &*disk, map: &self.map, block_size };
        let recovery = Recovery::open(journal, &*disk).map_err(|error| error.to_string())?;
        if !recovery.needs_recovery() {
            return Ok(None);
        }
        recovery.replay(OnDamage::Keep).map_err(|error| format!("our replay: {error}"))?;
        Ok(Some(disk.to_vec().map_err(|error| error.to_string())?))
    }

    fn put(&self, name: &str, state: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, state).expect("write a state");
        path
    }

    fn e2fsck(&self, state: &[u8]) -> Result<Vec<u8>, String> {
        let path = self.put("e2fsck", state);
        let mut e2fsck = Command::new("timeout");
        e2fsck.args(["20", "e2fsck", "-y", "-E", "journal_only"]).arg(&path);
        let output = e2fsck.output().expect("run e2fsck");
        if !matches!(output.status.code(), Some(0 | 1)) {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            return Err(format!("e2fsck's replay ends with {}: {text}", output.status));
        }
        std::fs::read(&path).map_err(|error| error.to_string())
    }

    /// A read-only mount of a device that may be written: it replays, and writes nothing else.
    fn kernel(&self, state: &[u8]) -> Result<Vec<u8>, String> {
        let path = self.put("kernel", state);
        let at = self.dir.path().join("mnt");
        std::fs::create_dir_all(&at).expect("a mount point");
        let mut attach = Command::new("losetup");
        let device = run(attach.args(["--show", "-f"]).arg(&path)).trim().to_owned();
        let mount = Command::new("mount")
            .args(["-t", "ext4", "-o", "ro", &device])
            .arg(&at)
            .output()
            .expect("run mount");
        if mount.status.success() {
            unmount(Command::new("umount").arg(&at));
        }
        run(Command::new("losetup").args(["-d", &device]));
        if !mount.status.success() {
            return Err(format!("the kernel: {}", String::from_utf8_lossy(&mount.stderr)));
        }
        std::fs::read(&path).map_err(|error| error.to_string())
    }

    fn has_orphans(&self, after: &[u8]) -> bool {
        let Ok(sb) = superblock(after) else { return true };
        let in_file = sb.features().ro_compat.contains(RoCompat::ORPHAN_PRESENT)
            && self.orphan_blocks.iter().any(|&block| {
                let bytes = block_bytes(after, block, self.block_size);
                orphan_file::orphans(bytes).is_ok_and(|mut orphans| orphans.next().is_some())
            });
        sb.last_orphan().is_some() || in_file
    }
}

/// Keeps images that somebody wants to look at.
fn keep(dir: &Path, images: &[(&str, &[u8])]) {
    for (name, bytes) in images {
        std::fs::write(dir.join(name), bytes).expect("keep an image");
    }
}

/// The journal's runs: from debugfs's list of extents, or for a block map from its blocks, of
/// which those that map are told by their place.
fn journal_map(extents: &str, blocks: &[u64], sb: &Superblock) -> JournalMap {
    let mut runs: Vec<JournalRun> = Vec::new();
    for line in extents.lines() {
        // " 0/ 0   1/  1     0 -  1023  8 - 1031   1024"
        let numbers: Vec<u64> = line
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        if let [_, _, _, _, first, last, start, ..] = numbers[..] {
            runs.push(JournalRun {
                logical: u32::try_from(first).expect("a block of the journal"),
                physical: start,
                count: u32::try_from(last - first + 1).expect("a length"),
            });
        }
    }
    if runs.is_empty() {
        // debugfs prints a mapping block before what it maps: 12 direct ones, the indirect
        // block, what it maps, the double indirect one, and so on.
        let per_block = sb.block_size() as usize / 4;
        let is_map = |at: usize| {
            at == 12
                || (at > 12 + per_block
                    && (at == 13 + per_block
                        || (at - 14 - per_block).is_multiple_of(per_block + 1)))
        };
        let data = blocks.iter().enumerate().filter(|(at, _)| !is_map(*at)).map(|(_, block)| block);
        for (logical, &physical) in (0u32..).zip(data) {
            runs.push(JournalRun { logical, physical, count: 1 });
        }
    }
    JournalMap::from_runs(runs).expect("the journal's map")
}

fn superblock(image: &[u8]) -> Result<Superblock, String> {
    let at = SUPERBLOCK_OFFSET as usize;
    Superblock::parse(&image[at..at + SUPERBLOCK_SIZE]).map_err(|error| error.to_string())
}

fn block_bytes(image: &[u8], block: u64, block_size: usize) -> &[u8] {
    let at = usize::try_from(block).expect("a block of the image") * block_size;
    &image[at..at + block_size]
}

/// The superblock without what everybody keeps for himself.
fn comparable(mut sb: Superblock) -> Vec<u8> {
    sb.set_needs_recovery(false);
    sb.set_orphan_present(false);
    sb.set_mount_time(0);
    sb.set_write_time(0);
    sb.set_mount_count(0);
    sb.set_kbytes_written(0);
    sb.set_free_blocks_count(0);
    sb.set_free_inodes_count(0);
    sb.sealed_bytes().to_vec()
}

/// Compares three images after a replay, `journal` being the journal's blocks.
///
/// # Errors
/// The first blocks that differ.
pub fn same_metadata(
    journal: &BTreeSet<u64>,
    after_ours: &[u8],
    after_e2fsck: &[u8],
    after_kernel: Option<&[u8]>,
) -> Result<(), String> {
    let others = [("e2fsck", Some(after_e2fsck)), ("the kernel", after_kernel)];
    for (name, other) in others {
        let Some(other) = other else { continue };
        let sb = superblock(after_ours).map_err(|error| format!("after our replay: {error}"))?;
        let their_sb =
            superblock(other).map_err(|error| format!("after {name}'s replay: {error}"))?;
        let size = sb.block_size() as usize;
        let place = SUPERBLOCK_OFFSET as usize..SUPERBLOCK_OFFSET as usize + SUPERBLOCK_SIZE;
        if comparable(sb) != comparable(their_sb) {
            let (a, b) = (&after_ours[place.clone()], &other[place]);
            let at: Vec<usize> = (0..SUPERBLOCK_SIZE).filter(|&at| a[at] != b[at]).collect();
            return Err(format!("{name} leaves another superblock, at bytes {at:x?}"));
        }
        let differs = |block: &u64| {
            let first = usize::try_from(*block).expect("a block of the image") * size;
            let (mut a, mut b) =
                (after_ours[first..first + size].to_vec(), other[first..first + size].to_vec());
            for at in first.max(place.start)..(first + size).min(place.end) {
                (a[at - first], b[at - first]) = (0, 0);
            }
            a != b
        };
        let blocks = (after_ours.len().min(other.len()) / size) as u64;
        let found: Vec<u64> =
            (0..blocks).filter(|block| !journal.contains(block)).filter(differs).take(8).collect();
        if !found.is_empty() {
            return Err(format!("{name} leaves other contents in blocks {found:?}"));
        }
    }
    Ok(())
}
