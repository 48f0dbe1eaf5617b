//! `data=journal` and the `j` flag: data goes through the log, and what a power cut leaves
//! is judged by our replay, the kernel's and e2fsck.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use modes_common::*;
use uext_blockdev::dm::{LogWrites, SnapshotDevice};
use uext_blockdev::{Bio, BioOp, BlockDevice, MemoryDevice, QueueLimits};
use uext_ext4::{DataMode, Ext4};
use uext_vfs::{FileSystem, Ino, Ioctl, NoCallerMemory, WriteFlags};

const JOURNAL: Option<DataMode> = Some(DataMode::Journal);
/// What mke2fs makes, with the smallest journal there is.
const SMALL: [&[&str]; 4] = [
    &["-t", "ext4", "-b", "1024", "-J", "size=1"],
    &["-t", "ext4", "-b", "4096", "-J", "size=4"],
    &["-t", "ext3", "-b", "1024", "-J", "size=1"],
    &["-t", "ext3", "-b", "4096", "-J", "size=4"],
];

#[test]
fn fsynced_data_is_in_the_log_and_every_replay_finds_it() {
    for args in SMALL {
        let disk = Disk::new(image(16, args, &[]), &options(JOURNAL));
        let ino = disk.create("file");
        let data = pattern(3, 150_000);
        assert_eq!(disk.write(ino, 0, &data), Ok(data.len()));
        disk.fsync(ino);
        let crashed = disk.crash();
        // Once in the log, and not yet where it belongs.
        assert_eq!(writes_of(&disk.log, &data[4096..4128]).len(), 1, "{args:?}");
        assert!(recovered(crashed.clone(), |fs| read(fs, ino_of(fs)) == data), "{args:?}");
        if let Some(bytes) = kernel_reads(&crashed, "file") {
            assert!(bytes == data, "{args:?}: the kernel's replay");
        }
        disk.check();
        assert_eq!(writes_of(&disk.log, &data[4096..4128]).len(), 2, "{args:?}");
    }
}

fn ino_of(fs: &Ext4) -> u64 {
    modes_common::ino(fs, "file")
}

#[test]
fn what_write_has_taken_is_in_the_next_commit_without_an_fsync_of_the_file() {
    let disk = Disk::new(image(16, SMALL[1], &[]), &options(JOURNAL));
    let (first, second) = (disk.create("file"), disk.create("second"));
    let data = pattern(4, 9000);
    disk.write(first, 0, &data).unwrap();
    disk.write(second, 0, b"later").unwrap();
    disk.fsync(second);
    let (a, b) = recovered(disk.crash(), |fs| (read(fs, ino_of(fs)), read(fs, ino(fs, "second"))));
    assert!(a == data && b == b"later", "an earlier write is missing: {} bytes", a.len());
}

/// The log marks its own blocks by a magic number: data that begins with it is escaped.
#[test]
fn data_that_looks_like_the_log_comes_back() {
    for args in SMALL {
        let disk = Disk::new(image(16, args, &[]), &options(JOURNAL));
        let ino = disk.create("file");
        let mut data = pattern(5, 64 << 10);
        for (at, block) in data.chunks_mut(1024).enumerate() {
            block[..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
            // A descriptor, a commit, a revoke block of the transaction that is running.
            block[4..8].copy_from_slice(&[0, 0, 0, [1, 2, 5][at % 3]]);
            block[8..12].copy_from_slice(&(at as u32 / 3).to_be_bytes());
        }
        disk.write(ino, 0, &data).unwrap();
        disk.fsync(ino);
        let crashed = disk.crash();
        assert!(recovered(crashed.clone(), |fs| read(fs, ino_of(fs)) == data), "{args:?}");
        if let Some(bytes) = kernel_reads(&crashed, "file") {
            assert!(bytes == data, "{args:?}: the kernel's replay");
        }
        disk.check();
    }
}

#[test]
fn the_superblock_says_journal_when_the_mount_says_nothing() {
    let tune: &[&[&str]] = &[&["tune2fs", "-o", "journal_data"]];
    for (more, mode, copies) in [
        (tune, None, 1),
        (tune, Some(DataMode::Ordered), 0),
        (&[][..], None, 0),
        (&[&["tune2fs", "-o", "journal_data_writeback"][..]][..], None, 0),
    ] {
        let disk = Disk::new(image(16, SMALL[1], more), &options(mode));
        let ino = disk.create("file");
        let data = pattern(6, 4096);
        disk.write(ino, 0, &data).unwrap();
        disk.fsync(ino);
        let log = disk.log.log();
        let written = writes_of(&disk.log, &data[..64]);
        // Journalled data goes out together with a descriptor, under META; other data does not.
        let in_log = written
            .iter()
            .filter(|(_, at)| log.entries[*at].flags.contains(uext_blockdev::BioFlags::META));
        assert_eq!((written.len(), in_log.count()), (1, copies), "{more:?} {mode:?}");
        disk.check();
    }
}

/// A file with the `j` flag on a mount that is ordered otherwise: its freed blocks become data
/// that goes past the log, and a replay must not put the old contents over it.
#[test]
fn freed_journalled_data_is_not_replayed_over_what_took_its_blocks() {
    let make = "set_inode_field /j flags 0x84000";
    for args in [SMALL[0], SMALL[1]] {
        let bytes = image(
            16,
            args,
            &[&["debugfs", "-w", "-R", "write /etc/hostname /j"], &["debugfs", "-w", "-R", make]],
        );
        let disk = Disk::new(bytes, &options(None));
        let logged = disk.ino("j");
        let old = pattern(7, 100_000);
        disk.write(logged, 0, &old).unwrap();
        disk.fsync(logged);
        let keeper = disk.create("keeper");
        disk.unlink("j");
        disk.fsync(keeper);
        // Everything free is taken, so that the old blocks are among it.
        let file = disk.create("file");
        let mut written = Vec::new();
        while let Ok(done) = disk.write(file, written.len() as u64, &pattern(8, 1 << 16)) {
            written.extend_from_slice(&pattern(8, 1 << 16)[..done]);
        }
        disk.fsync(file);
        let crashed = disk.crash();
        assert!(
            recovered(crashed.clone(), |fs| read(fs, ino_of(fs)) == written),
            "{args:?}: old journalled data came back"
        );
        if let Some(bytes) = kernel_reads(&crashed, "file") {
            assert!(bytes == written, "{args:?}: the kernel's replay");
        }
        disk.check();
    }
}

/// More blocks freed at once than a small log can revoke, even when it is empty: in steps that
/// fit. Unwritten blocks are revoked too, and take no time to make.
#[test]
fn deleting_a_large_journalled_file_fits_a_small_log() {
    let disk = Disk::new(image(160, SMALL[0], &[]), &options(JOURNAL));
    let fill = disk.create("fill");
    for _ in 0..6 {
        let file = disk.create("file");
        disk.fs.fallocate(&ROOT, file, 0, 140 << 20, 0).unwrap();
        // Half of the log is in use.
        for at in 0..5 {
            disk.write(fill, at << 17, &pattern(at, 100 << 10)).unwrap();
            disk.fsync(fill);
        }
        disk.unlink("file");
    }
    let after = disk.create("after");
    disk.write(after, 0, b"still alive").unwrap();
    disk.fsync(after);
    let seen = recovered(disk.crash(), |fs| read(fs, ino(fs, "after")));
    assert_eq!(seen, b"still alive");
    disk.check();
}

/// A device on which the log's writes take their time, so that others come in between.
struct Slow(Arc<MemoryDevice>);

impl BlockDevice for Slow {
    fn limits(&self) -> &QueueLimits {
        self.0.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        if bio.op() == BioOp::Write && bio.len() > 256 << 10 {
            std::thread::sleep(Duration::from_millis(4));
        }
        self.0.submit_bio(bio);
    }
}

/// A commit of several descriptors is under way while its blocks are written again: what it
/// has not copied yet must still go out as it was. All blocks are written in order, so after a
/// cut no block is of a later version than one before it.
#[test]
fn a_commit_takes_nothing_of_what_is_written_during_it() {
    const BLOCKS: u64 = 700;
    let bytes = image(64, &["-t", "ext4", "-b", "4096", "-J", "size=24"], &[]);
    let base = SnapshotDevice::over_vec(Arc::new(bytes.clone()));
    let log = LogWrites::new(Arc::new(Slow(MemoryDevice::from_vec(bytes))));
    let fs = Ext4::mount(log.clone(), "test", &options(JOURNAL)).unwrap();
    let file = fs.mknod(&ROOT, fs.root(), b"file", 0o100_644, 0).unwrap().attr.ino;
    let put = |block: u64, version: u64| {
        let bytes = version.to_le_bytes().repeat(512);
        fs.write(&ROOT, file, FH, block * 4096, &bytes, WriteFlags::empty()).unwrap();
    };
    (0..BLOCKS).for_each(|block| put(block, 0));
    fs.fsync(&ROOT, file, FH, false).unwrap();
    let first = log.log().completed_changes();
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let versions = (1..).take_while(|_| !stop.load(Ordering::Relaxed));
            for version in versions {
                for block in 0..BLOCKS {
                    put(block, version);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..12 {
            let seen = written.load(Ordering::Relaxed);
            while written.load(Ordering::Relaxed) < seen + BLOCKS / 2 {
                std::thread::yield_now();
            }
            fs.fsync(&ROOT, file, FH, false).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let log = log.log();
    // Right behind each commit block, the newest that a replay can find.
    let mut changes: Vec<_> =
        log.entries.iter().filter(|e| e.is_change() && e.done_before(log.now)).collect();
    changes.sort_by_key(|entry| entry.completed);
    let magic = [0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 2];
    let commits = changes.iter().enumerate().filter(|(_, e)| e.data.starts_with(&magic));
    let cuts: Vec<usize> = commits.map(|(at, _)| at + 1).filter(|&cut| cut > first).collect();
    assert!(cuts.len() >= 4, "{} commits", cuts.len());
    for cut in cuts {
        let state = log.prefix(&base, cut).unwrap();
        let fs = Ext4::mount(state, "after the cut", &options(None)).unwrap();
        let bytes = read(&fs, ino(&fs, "file"));
        let versions: Vec<u64> = bytes
            .chunks(4096)
            .map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()))
            .collect();
        let newer = versions.windows(2).position(|pair| pair[1] > pair[0]);
        assert_eq!(newer, None, "cut {cut}: a block is newer than the one before");
    }
    fs.unmount().unwrap();
}

/// Blocks of one version each are written again and again while commits run: whatever prefix
/// of the writes a cut leaves, every block is whole, and none is older than the last fsync.
#[test]
fn a_block_written_again_during_its_commit_is_never_torn() {
    const BLOCKS: u64 = 24;
    let disk = Disk::new(image(16, SMALL[1], &[]), &options(JOURNAL));
    let ino = disk.create("file");
    disk.write(ino, 0, &vec![0; BLOCKS as usize * 4096]).unwrap();
    disk.fsync(ino);
    let first = disk.log.log().completed_changes();
    let (version, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let durable = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let next = version.load(Ordering::Relaxed) + 1;
                for block in 0..BLOCKS {
                    let bytes: Vec<u8> = next.to_le_bytes().repeat(512);
                    disk.write(ino, block * 4096, &bytes).unwrap();
                }
                version.store(next, Ordering::Relaxed);
            }
        });
        let mut durable = Vec::new();
        for _ in 0..25 {
            let floor = version.load(Ordering::Relaxed);
            disk.fsync(ino);
            durable.push((disk.log.mark("fsync"), floor));
            while version.load(Ordering::Relaxed) <= floor {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        durable
    });
    let log = disk.log.log();
    let total = log.completed_changes();
    for count in (first..=total).step_by((total / 80).max(1)) {
        let state = log.prefix(&disk.base, count).unwrap().to_vec().unwrap();
        // The writes a cut leaves are the completed ones; a mark counts when all before it are.
        let changes = log.entries.iter().filter(|e| e.is_change() && e.done_before(log.now));
        let mut times: Vec<u64> = changes.map(|e| e.completed.unwrap()).collect();
        times.sort_unstable();
        let now = count.checked_sub(1).map_or(0, |last| times[last]);
        let floor = durable.iter().filter(|(time, _)| *time <= now).map(|d| d.1).max().unwrap_or(0);
        let bytes = recovered(state, |fs| read(fs, ino_of(fs)));
        let mut last = u64::MAX;
        for (at, block) in bytes.chunks(4096).enumerate() {
            let seen = u64::from_le_bytes(block[..8].try_into().unwrap());
            assert!(
                block.chunks(8).all(|c| c == seen.to_le_bytes()),
                "cut {count}: block {at} torn"
            );
            assert!(seen >= floor, "cut {count}: block {at} is version {seen}, {floor} was synced");
            // Written in order, and all of one moment: never newer than a block before it.
            assert!(seen <= last, "cut {count}: block {at} is newer than the one before");
            last = seen;
        }
    }
    disk.check();
}

/// chattr(1) `+j` and `-j`.
fn set_j(fs: &Ext4, file: Ino, on: bool) {
    const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
    const EXTENTS_AND_J: u32 = 0x0008_4000;
    let flags = if on { EXTENTS_AND_J } else { EXTENTS_AND_J & !0x4000 };
    let ioctl = Ioctl {
        cmd: FS_IOC_SETFLAGS,
        input: &flags.to_le_bytes(),
        out_size: 0,
        arg: 0,
        caller: &NoCallerMemory,
    };
    fs.ioctl(&ROOT, file, FH, &ioctl).unwrap();
}

/// With `j` the data of a file goes through the log of an ordered mount, without it again past
/// the log; and what is still in the log then is not replayed over it.
#[test]
fn the_j_flag_takes_a_file_into_the_log_and_out_of_it() {
    let disk = Disk::new(image(16, SMALL[1], &[]), &options(None));
    let file = disk.create("file");
    let versions: Vec<Vec<u8>> = (20..24).map(|seed| pattern(seed, 40_000)).collect();
    let meta_writes = |version: &[u8]| {
        let log = disk.log.log();
        let written = writes_of(&disk.log, &version[..64]);
        let is_meta = |at: usize| log.entries[at].flags.contains(uext_blockdev::BioFlags::META);
        written.iter().filter(|(_, at)| is_meta(*at)).count()
    };
    for (at, in_log) in [(0, 0), (1, 1), (2, 1), (3, 0)] {
        match at {
            1 => set_j(&disk.fs, file, true),
            3 => set_j(&disk.fs, file, false),
            _ => {}
        }
        disk.write(file, 0, &versions[at]).unwrap();
        disk.fsync(file);
        assert_eq!(meta_writes(&versions[at]), in_log, "version {at}");
        let crashed = disk.crash();
        assert!(
            recovered(crashed.clone(), |fs| read(fs, ino_of(fs)) == versions[at]),
            "version {at} is not what a replay leaves"
        );
        if let Some(bytes) = kernel_reads(&crashed, "file") {
            assert!(bytes == versions[at], "version {at}: the kernel's replay");
        }
    }
    disk.check();
}
