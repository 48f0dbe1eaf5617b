//! Fast commits of the kernel: uext replays them to what was fsynced, whatever cuts the replay
//! short and whatever the records say.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use uext_blockdev::dm::flakey::{Action, Flakey, Ops, Rule, When};
use uext_blockdev::dm::snapshot::SnapshotDevice;
use uext_blockdev::{BlkStatus, BlockDevice};
use uext_jbd2::{JournalLocation, OnDamage, Recovery, RecoveryReport};
use uext_ondisk::checksum::crc32c;
use uext_ondisk::jbd2::JournalSuperblock;
use uext_tests::identity::Replays;
use uext_tests::mounts::{KernelMount, UextMount};
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::tree::{Rng, assert_same};
use uext_tests::{require, run, sh};

const IMAGE_BYTES: u64 = 64 << 20;

fn write(path: &Path, bytes: &[u8], at: u64) -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let file = file.expect("open");
    file.write_all_at(bytes, at).expect("write");
    file
}

/// What is committed by a transaction, before.
fn before(root: &Path, rng: &mut Rng) {
    for dir in ["base", "gone", "big"] {
        fs::create_dir(root.join(dir)).expect("mkdir");
    }
    for i in 0..100 {
        let len = rng.below(30_000) as usize;
        write(&root.join(format!("base/f{i}")), &rng.bytes(len), 0);
    }
    for i in 0..900 {
        write(&root.join(format!("big/name-of-some-length-{i:06}")), b"x", 0);
    }
    sh(&format!("sync -f '{}'", root.display()));
}

/// What fast commits hold: names of all sorts, ranges, a directory that grows and one that splits.
fn work(root: &Path, rng: &mut Rng) {
    let base = |i: u32| root.join(format!("base/f{i}"));
    fs::create_dir_all(root.join("new/deep")).expect("mkdir");
    for i in 0..70 {
        let len = rng.below(9_000) as usize;
        write(&root.join(format!("new/deep/a-name-that-fills-blocks-{i}")), &rng.bytes(len), 0);
    }
    for i in 0..60 {
        write(&root.join(format!("big/another-name-{i:06}")), b"y", 0);
    }
    for i in (0..30).step_by(3) {
        fs::remove_file(base(i)).expect("unlink");
        fs::rename(base(i + 1), root.join(format!("new/r{i}"))).expect("rename");
        fs::hard_link(base(i + 2), root.join(format!("new/l{i}"))).expect("link");
        fs::rename(base(i + 40), base(i + 60)).expect("rename over a file");
    }
    fs::remove_dir(root.join("gone")).expect("rmdir");
    let file = write(&base(98), &rng.bytes(20_000), 100_000);
    file.sync_all().expect("fsync");
    for i in 0..12 {
        file.write_all_at(&rng.bytes(4096), 200_000 + i * 16_384).expect("write");
    }
    write(&base(97), b"", 0).set_len(3000).expect("truncate");
    file.sync_all().expect("fsync");
    fs::create_dir_all(root.join("new/deep/x/y")).expect("mkdir");
    let last = write(&root.join("new/deep/x/y/z"), &rng.bytes(12_345), 0);
    fs::remove_file(root.join("new/deep/a-name-that-fills-blocks-5")).expect("unlink");
    file.set_len(230_000).expect("truncate");
    file.sync_all().expect("fsync");
    last.sync_all().expect("fsync");
}

/// A few names and ranges, which the kernel's own replay masters too.
fn little_work(root: &Path, rng: &mut Rng) {
    for i in 0..10 {
        let path = root.join(format!("base/new-{i}"));
        write(&path, &rng.bytes(9000), 0).sync_all().expect("fsync");
    }
    fs::remove_file(root.join("base/f1")).expect("unlink");
    fs::hard_link(root.join("base/f2"), root.join("base/link")).expect("link");
    let file = write(&root.join("base/f3"), &rng.bytes(20_000), 100_000);
    file.sync_all().expect("fsync");
}

/// All that is promised of a tree: not the size of directories, nor when they changed.
fn tree(root: &Path, with_links: bool) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = fs::symlink_metadata(&path).expect("stat");
        let links = if with_links { meta.nlink() } else { 0 };
        let mut line = format!("{:o} {links} {} {}", meta.mode(), meta.uid(), meta.gid());
        if meta.is_dir() {
            let entries = fs::read_dir(&path).expect("readdir");
            stack.extend(entries.map(|entry| entry.expect("entry").path()));
        } else {
            let bytes = fs::read(&path).expect("read");
            line += &format!(" {} {:#x} {}", bytes.len(), crc32c(0, &bytes), meta.mtime());
        }
        out.insert(path.strip_prefix(root).expect("below the root").to_owned(), line);
    }
    out
}

/// An image whose journal holds fast commits, and what a tree was when the machine stopped.
struct Stopped {
    image: PathBuf,
    with_links: BTreeMap<PathBuf, String>,
    names: BTreeMap<PathBuf, String>,
}

fn stopped(scratch: &Scratch, block_size: u32, seed: u64, work: fn(&Path, &mut Rng)) -> Stopped {
    let kind = Kind { fs: "ext4", block_size };
    let area = ["-O", "fast_commit", "-J", "size=16,fast_commit_size=512"];
    let live = scratch.mkfs("live.img", kind, IMAGE_BYTES, &area);
    let image = scratch.path().join("stopped.img");
    let dir = scratch.mount_point("live");
    // Sizes and blocks of files that nobody fsyncs are known when they are written.
    let mount = KernelMount::new(&live, &dir, "nodelalloc,commit=1000");
    let mut rng = Rng(seed);
    before(&dir, &mut rng);
    work(&dir, &mut rng);
    run(Command::new("cp").arg("--sparse=always").arg(&live).arg(&image));
    let (with_links, names) = (tree(&dir, true), tree(&dir, false));
    mount.unmount();
    Stopped { image, with_links, names }
}

fn copy(from: &Path, name: &str) -> PathBuf {
    let to = from.with_file_name(name);
    run(Command::new("cp").arg("--sparse=always").arg(from).arg(&to));
    to
}

fn fast_commits_are_replayed(block_size: u32) {
    let scratch = Scratch::new();
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let stopped = stopped(&scratch, block_size, seed, work);
    let dir = scratch.mount_point("mnt");

    let image = copy(&stopped.image, "ro.img");
    let mount = UextMount::new(&image, &dir, "ro");
    assert!(!mount.log().contains(" 0 fast commits"), "{}", mount.log());
    assert_same(&tree(&dir, true), &stopped.with_links);
    mount.unmount();
    assert!(fs::read(&image).ok() == fs::read(&stopped.image).ok(), "a read-only mount wrote");

    let image = copy(&stopped.image, "rw.img");
    let mount = UextMount::new(&image, &dir, "");
    assert_same(&tree(&dir, true), &stopped.with_links);
    mount.unmount();
    assert_clean(&image);
    let mount = KernelMount::new(&image, &dir, "");
    assert_same(&tree(&dir, true), &stopped.with_links);
    mount.unmount();
}

#[test]
fn the_kernel_replays_to_the_same_names() {
    require!("mke2fs", "e2fsck", "debugfs");
    let (scratch, block_size) = (Scratch::new(), 4096);
    let stopped = stopped(&scratch, block_size, 3, little_work);
    let dir = scratch.mount_point("mnt");
    // The kernel's replay sets times as it likes.
    let without_times = |tree: &BTreeMap<PathBuf, String>| -> BTreeMap<PathBuf, String> {
        let cut = |line: &String| line.rsplit_once(' ').map_or("", |(rest, _)| rest).to_owned();
        tree.iter().map(|(path, line)| (path.clone(), cut(line))).collect()
    };
    let wanted = without_times(&stopped.names);
    let image = copy(&stopped.image, "ours.img");
    let mount = UextMount::new(&image, &dir, "");
    assert_same(&without_times(&tree(&dir, false)), &wanted);
    mount.unmount();
    let image = copy(&stopped.image, "kernel.img");
    let mount = KernelMount::new(&image, &dir, "");
    assert_same(&without_times(&tree(&dir, false)), &wanted);
    mount.unmount();
}

#[test]
fn of_1k_blocks() {
    require!("mke2fs", "e2fsck", "debugfs");
    fast_commits_are_replayed(1024);
}

#[test]
fn of_4k_blocks() {
    require!("mke2fs", "e2fsck", "debugfs");
    fast_commits_are_replayed(4096);
}

fn replay(
    replays: &Replays,
    device: &dyn BlockDevice,
    block_size: u32,
) -> Result<RecoveryReport, uext_jbd2::JournalError> {
    let journal = JournalLocation { device, map: replays.map(), block_size };
    Recovery::open(journal, device)?.replay(OnDamage::Keep)
}

/// All bytes but the journal's.
fn outside(replays: &Replays, device: &SnapshotDevice, block_size: u32) -> Vec<u8> {
    let mut bytes = device.to_vec().expect("read");
    let size = block_size as usize;
    for block in (0..replays.map().block_count()).filter_map(|at| replays.map().map(at)) {
        bytes[block as usize * size..][..size].fill(0);
    }
    bytes
}

#[test]
fn a_replay_cut_short_at_any_write_is_repeated_to_the_same_blocks() {
    require!("mke2fs", "e2fsck", "debugfs");
    let (scratch, block_size) = (Scratch::new(), 4096);
    let stopped = stopped(&scratch, block_size, 1, work);
    let base = Arc::new(fs::read(&stopped.image).expect("read"));
    let replays = Replays::new(&base);
    let whole = SnapshotDevice::over_vec(base.clone());
    let counting = Flakey::new(whole.clone(), 1);
    let report = replay(&replays, &*counting, block_size).expect("replay");
    assert!(report.fast_commits > 0, "{report:?}");
    let wanted = outside(&replays, &whole, block_size);
    let counts = counting.counts();
    assert!(counts.writes > 20, "{counts:?}");
    let cuts = (1..=counts.writes).map(|n| (Ops::WRITE, n));
    for (ops, nth) in cuts.chain((1..=counts.flushes).map(|n| (Ops::FLUSH, n))) {
        let device = SnapshotDevice::over_vec(base.clone());
        let flakey = Flakey::new(device.clone(), 1);
        flakey.add(Rule::new(ops, When::Nth(nth), Action::Fail(BlkStatus::IoErr)));
        assert!(replay(&replays, &*flakey, block_size).is_err(), "{ops:?} {nth}");
        replay(&replays, &*device, block_size).unwrap_or_else(|e| panic!("{ops:?} {nth}: {e}"));
        assert!(outside(&replays, &device, block_size) == wanted, "after {ops:?} {nth}");
    }
}

/// Where the records of an area lie in its bytes: the value of each, its tag, and its tail.
fn records(area: &[u8], block_size: usize) -> Vec<(u16, std::ops::Range<usize>)> {
    let mut out = Vec::new();
    for start in (0..area.len()).step_by(block_size) {
        let mut at = start;
        while at + 4 <= start + block_size {
            let tag = u16::from_le_bytes([area[at], area[at + 1]]);
            let len = usize::from(u16::from_le_bytes([area[at + 2], area[at + 3]]));
            if tag == 0 || at + 4 + len > start + block_size {
                break;
            }
            out.push((tag, at + 4..at + 4 + len));
            at += 4 + len;
        }
    }
    out
}

/// Gives every tail the checksum of what is before it.
fn repair(area: &mut [u8], block_size: usize) {
    const TAIL: u16 = 8;
    let mut crc = 0;
    for (tag, value) in records(area, block_size) {
        if tag == TAIL {
            let sum = crc32c(crc, &area[value.start - 4..value.start + 4]);
            area[value.start + 4..value.start + 8].copy_from_slice(&sum.to_le_bytes());
            crc = 0;
        } else {
            crc = crc32c(crc, &area[value.start - 4..value.end]);
        }
    }
}

#[test]
fn records_that_lie_are_refused_or_applied_and_never_hang() {
    require!("mke2fs", "e2fsck", "debugfs");
    let (scratch, block_size) = (Scratch::new(), 1024);
    let stopped = stopped(&scratch, block_size, 2, work);
    let base = fs::read(&stopped.image).expect("read");
    let replays = Replays::new(&base);
    let home = |at| replays.map().map(at).expect("in the journal") as usize * block_size as usize;
    let size = block_size as usize;
    let sb = JournalSuperblock::parse(&base[home(0)..][..size]).expect("a journal");
    let blocks: Vec<usize> = (sb.log_end() + 1..sb.block_count).map(home).collect();
    let area: Vec<u8> = blocks.iter().flat_map(|&at| base[at..at + size].to_vec()).collect();
    let base = Arc::new(base);
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let (mut applied, mut refused) = (0, 0);
    let all = records(&area, size);
    for _ in 0..400 {
        let mut bad = area.clone();
        for _ in 0..=rng.below(2) {
            let (_, value) = &all[rng.below(all.len() as u64) as usize];
            // Where the numbers are, mostly.
            let most = if rng.below(4) == 0 { value.len() } else { value.len().min(16) };
            let at = value.start + rng.below(most.max(1) as u64) as usize;
            bad[at] = match rng.below(3) {
                0 => bad[at] ^ (1 << rng.below(8)),
                1 => 0xFF,
                _ => rng.below(256) as u8,
            };
        }
        repair(&mut bad, size);
        let device = SnapshotDevice::over_vec(base.clone());
        for (block, bytes) in blocks.iter().zip(bad.chunks(size)) {
            let device: &dyn BlockDevice = &*device;
            let written = device.write_at(*block as u64, bytes, uext_blockdev::BioFlags::empty());
            written.expect("write");
        }
        let journal = JournalLocation { device: &*device, map: replays.map(), block_size };
        let plan = Recovery::open(journal, &*device).expect("a journal").plan().expect("a plan");
        match plan.damage() {
            None => applied += 1,
            Some(error) => {
                refused += 1;
                assert_eq!(error.to_string().lines().count(), 1, "{error}");
            }
        }
    }
    println!("{applied} applied, {refused} refused");
    assert!(applied > 20 && refused > 100, "{applied} applied, {refused} refused");
}
