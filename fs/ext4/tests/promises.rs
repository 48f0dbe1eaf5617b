//! What fsync and its relatives promise, in every mode of the journal: judged on the disk that
//! a power cut leaves when its cache loses all that it may lose.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::Arc;
use std::time::Duration;

use modes_common::*;
use uext_blockdev::{Bio, BioFlags, BioOp, BlockDevice, MemoryDevice, QueueLimits};
use uext_ext4::{DataMode, Ext4, MountOptions};
use uext_vfs::{FileSystem, Ino, SetAttr, SetTime, WriteFlags, XattrFlags};

const MODES: [Option<DataMode>; 3] =
    [Some(DataMode::Ordered), Some(DataMode::Journal), Some(DataMode::Writeback)];
const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4"];
const EXT3: &[&str] = &["-t", "ext3", "-b", "1024", "-J", "size=1"];

fn each_mode(test: impl Fn(&Disk, Option<DataMode>)) {
    for args in [EXT4, EXT3] {
        for mode in MODES {
            test(&Disk::new(image(16, args, &[]), &options(mode)), mode);
        }
    }
}

fn file(fs: &Ext4, name: &str) -> Vec<u8> {
    read(fs, ino(fs, name))
}

/// Its contents after the cut, `None` when it is not there.
fn after_cut(cut: Vec<u8>, name: &str) -> Option<Vec<u8>> {
    recovered(cut, |fs| {
        let found = fs.lookup(&ROOT, fs.root(), name.as_bytes()).ok()?;
        Some(read(fs, found.attr.ino))
    })
}

#[test]
fn fsync_makes_data_attributes_and_names_durable() {
    each_mode(|disk, mode| {
        let dir = disk.fs.mkdir(&ROOT, disk.fs.root(), b"dir", 0o755).unwrap().attr.ino;
        let made = disk.fs.mknod(&ROOT, dir, b"file", 0o100_600, 0).unwrap().attr.ino;
        let data = pattern(1, 70_001);
        disk.write(made, 0, &data).unwrap();
        disk.fs.setxattr(&ROOT, made, b"user.key", b"value", XattrFlags::empty()).unwrap();
        let set = SetAttr { uid: Some(7), mode: Some(0o640), ..SetAttr::default() };
        disk.fs.setattr(&ROOT, made, &set).unwrap();
        disk.fs.link(&ROOT, made, disk.fs.root(), b"second").unwrap();
        disk.fsync(made);
        recovered(disk.power_cut(), |fs| {
            let dir = ino(fs, "dir");
            let found = fs.lookup(&ROOT, dir, b"file").unwrap().attr;
            assert!(read(fs, found.ino) == data, "{mode:?}");
            assert_eq!((found.uid, found.perm, found.nlink), (7, 0o640, 2), "{mode:?}");
            assert_eq!(fs.getxattr(&ROOT, found.ino, b"user.key").unwrap(), b"value");
            assert_eq!(ino(fs, "second"), found.ino);
        });
        disk.check();
    });
}

/// The file itself is on the disk already; what was done to other names before the call is
/// promised all the same. With nothing done, nothing is committed.
#[test]
fn fsync_takes_along_every_name_made_before_it() {
    each_mode(|disk, mode| {
        let old = disk.create("old");
        disk.write(old, 0, b"old").unwrap();
        disk.fsync(old);
        let new = disk.create("new");
        disk.write(new, 0, b"new").unwrap();
        disk.fsync(old);
        let seen = after_cut(disk.power_cut(), "new");
        // Its data too where that goes through the journal.
        let want = if mode == Some(DataMode::Journal) { &b"new"[..] } else { b"" };
        assert_eq!(seen.as_deref(), Some(want), "{mode:?}");
        let (before, _) = disk.commits_and_flushes();
        disk.fsync(old);
        assert_eq!(disk.commits_and_flushes().0, before, "{mode:?}: nothing was done");
        disk.check();
    });
}

#[test]
fn fdatasync_skips_commits_of_times_and_attributes_but_not_of_sizes() {
    each_mode(|disk, mode| {
        let made = disk.create("file");
        disk.write(made, 0, &[1; 10_000]).unwrap();
        disk.fsync(made);
        let datasync = || disk.fs.fsync(&ROOT, made, FH, true).unwrap();
        let (before, flushes) = disk.commits_and_flushes();
        let time = Some(SetTime::At(uext_vfs::Timestamp { sec: 1_000_000, nsec: 0 }));
        let set = SetAttr { mtime: time, mode: Some(0o600), ..SetAttr::default() };
        disk.fs.setattr(&ROOT, made, &set).unwrap();
        datasync();
        let after = disk.commits_and_flushes();
        assert_eq!(after.0, before, "{mode:?}: a commit for times");
        assert!(after.1 > flushes, "{mode:?}: the device is flushed all the same");
        disk.fsync(made);
        assert_eq!(disk.commits_and_flushes().0, before + 1, "{mode:?}: fsync commits them");
        disk.write(made, 10_000, &[2; 5]).unwrap();
        datasync();
        assert_eq!(disk.commits_and_flushes().0, before + 2, "{mode:?}: the size is needed");
        let seen = after_cut(disk.power_cut(), "file").unwrap();
        assert_eq!((seen.len(), seen.last()), (10_005, Some(&2)));
        disk.check();
    });
}

/// Nothing but data changes: no commit in ordered mode, and the device is flushed for it.
#[test]
fn an_overwrite_is_flushed_to_the_device() {
    each_mode(|disk, mode| {
        let made = disk.create("file");
        disk.write(made, 0, &[1; 20_000]).unwrap();
        disk.fsync(made);
        let (before, _) = disk.commits_and_flushes();
        disk.write(made, 4096, &[9; 4096]).unwrap();
        disk.fs.fsync(&ROOT, made, FH, true).unwrap();
        let commits = disk.commits_and_flushes().0 - before;
        assert_eq!(commits, usize::from(mode == Some(DataMode::Journal)), "{mode:?}");
        let seen = after_cut(disk.power_cut(), "file").unwrap();
        assert!(seen[4096..8192].iter().all(|&byte| byte == 9), "{mode:?}");
        disk.check();
    });
}

#[test]
fn a_synchronous_write_is_durable_when_it_returns() {
    for flags in [WriteFlags::SYNC, WriteFlags::DSYNC] {
        each_mode(|disk, mode| {
            let made = disk.create("file");
            for round in 1..4u8 {
                let at = u64::from(round) * 3000;
                disk.fs.write(&ROOT, made, FH, at, &[round; 3000], flags).unwrap();
                let seen = after_cut(disk.power_cut(), "file").unwrap();
                assert_eq!(seen.len() as u64, at + 3000, "{mode:?} {flags:?}");
                assert!(seen[at as usize..].iter().all(|&b| b == round), "{mode:?} {flags:?}");
            }
            disk.check();
        });
    }
}

/// A device whose flushes take their time, as a disk's do.
struct Slow(Arc<MemoryDevice>);

impl BlockDevice for Slow {
    fn limits(&self) -> &QueueLimits {
        self.0.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        let flushes = BioFlags::PREFLUSH | BioFlags::FUA;
        if bio.op() == BioOp::Flush || bio.flags().intersects(flushes) {
            std::thread::sleep(Duration::from_millis(4));
        }
        self.0.submit_bio(bio);
    }
}

#[test]
fn concurrent_fsyncs_share_commits() {
    const THREADS: usize = 8;
    const EACH: usize = 15;
    let memory = MemoryDevice::from_vec(image(16, EXT4, &[]));
    let log = uext_blockdev::dm::LogWrites::new(Arc::new(Slow(memory)));
    let fs = Ext4::mount(log.clone(), "test", &options(None)).unwrap();
    let make =
        |name: String| fs.mknod(&ROOT, fs.root(), name.as_bytes(), 0o100_644, 0).unwrap().attr.ino;
    let files: Vec<Ino> = (0..THREADS).map(|n| make(format!("file-{n}"))).collect();
    std::thread::scope(|scope| {
        for &file in &files {
            let fs = &fs;
            scope.spawn(move || {
                for round in 0..EACH {
                    let data = [round as u8; 100];
                    let at = (round * 100) as u64;
                    fs.write(&ROOT, file, FH, at, &data, WriteFlags::empty()).unwrap();
                    fs.fsync(&ROOT, file, FH, false).unwrap();
                }
            });
        }
    });
    let magic = [0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 2];
    let entries = log.log().entries;
    let commits = entries.iter().filter(|entry| entry.data.starts_with(&magic)).count();
    let fsyncs = THREADS * EACH;
    println!("{fsyncs} fsyncs in {commits} commits");
    assert!(commits * 2 <= fsyncs, "{fsyncs} fsyncs took {commits} commits");
    fs.unmount().unwrap();
}

fn replaced_by_rename(options: &MountOptions, args: &[&str]) -> Disk {
    let disk = Disk::new(image(16, args, &[]), options);
    let old = disk.create("config");
    disk.write(old, 0, &[1; 9000]).unwrap();
    let other = disk.create("other");
    disk.fs.sync().unwrap();
    let new = disk.create("config.new");
    disk.write(new, 0, &[2; 11_000]).unwrap();
    disk.rename("config.new", "config").unwrap();
    disk.write(other, 0, b"later").unwrap();
    disk.fsync(other);
    disk
}

#[test]
fn a_file_that_replaces_another_by_rename_brings_its_data() {
    for args in [EXT4, EXT3] {
        for mode in MODES {
            let disk = replaced_by_rename(&options(mode), args);
            let seen = after_cut(disk.power_cut(), "config").unwrap();
            assert_eq!(seen, [2; 11_000], "{mode:?}");
            // At any moment before: old or new, and whole.
            let log = disk.log.log();
            for count in 0..log.completed_changes() {
                let cut = log.prefix(&disk.base, count).unwrap().to_vec().unwrap();
                if let Some(seen) = after_cut(cut, "config").filter(|seen| !seen.is_empty()) {
                    let whole = seen == [1; 9000] || seen == [2; 11_000];
                    assert!(whole, "{mode:?} cut {count}: {} bytes", seen.len());
                }
            }
            disk.check();
        }
    }
}

#[test]
fn noauto_da_alloc_leaves_the_data_of_a_replacing_file_to_writeback() {
    let relaxed = MountOptions { auto_da_alloc: false, ..options(None) };
    let disk = replaced_by_rename(&relaxed, EXT4);
    assert_eq!(after_cut(disk.power_cut(), "config").unwrap(), b"");
    disk.check();
}

/// The program that truncates and writes anew without fsync: a commit after its write has the
/// new contents whole.
#[test]
fn a_file_truncated_and_written_again_is_old_or_new_after_the_next_commit() {
    for (auto, want) in [(true, &[2u8; 7000][..]), (false, b"")] {
        for mode in MODES {
            let options = MountOptions { auto_da_alloc: auto, ..options(mode) };
            let disk = Disk::new(image(16, EXT4, &[]), &options);
            let made = disk.create("file");
            let other = disk.create("other");
            disk.write(made, 0, &[1; 9000]).unwrap();
            disk.fs.sync().unwrap();
            disk.truncate(made, 0);
            disk.write(made, 0, &[2; 7000]).unwrap();
            assert_eq!(after_cut(disk.power_cut(), "file").unwrap(), [1; 9000], "{mode:?}");
            disk.write(other, 0, b"later").unwrap();
            disk.fsync(other);
            let seen = after_cut(disk.power_cut(), "file").unwrap();
            // Journalled data is in the transaction in any case.
            let want = if mode == Some(DataMode::Journal) { &[2; 7000] } else { want };
            assert_eq!(seen, want, "{mode:?} {auto}");
            disk.check();
        }
    }
}

/// The timer's commit takes it along too.
#[test]
fn the_timers_commit_has_the_data_of_a_file_written_again() {
    let options = MountOptions { commit_interval: Duration::from_millis(200), ..options(None) };
    let disk = Disk::new(image(16, EXT4, &[]), &options);
    let made = disk.create("file");
    disk.write(made, 0, &[1; 9000]).unwrap();
    disk.fs.sync().unwrap();
    let (before, _) = disk.commits_and_flushes();
    disk.truncate(made, 0);
    disk.write(made, 0, &[2; 7000]).unwrap();
    while disk.commits_and_flushes().0 == before {
        std::thread::sleep(Duration::from_millis(10));
    }
    let seen = after_cut(disk.power_cut(), "file").unwrap();
    // The commit may have come between the two calls, or in the middle of being written.
    assert!([&[1; 9000][..], &[2; 7000], b""].contains(&&seen[..]), "{} bytes", seen.len());
    disk.check();
}

/// A shrunken file's tail is zeroed in memory; when the file grows again, what was cut off
/// must not come back from the disk.
#[test]
fn a_cut_off_tail_does_not_come_back_when_the_file_grows() {
    each_mode(|disk, mode| {
        let made = disk.create("file");
        disk.write(made, 0, &[7; 8192]).unwrap();
        disk.fs.sync().unwrap();
        disk.truncate(made, 100);
        disk.truncate(made, 4000);
        let other = disk.create("other");
        disk.fsync(other);
        let seen = after_cut(disk.power_cut(), "file").unwrap();
        let mut want = vec![7; 100];
        want.resize(4000, 0);
        assert!(seen == want, "{mode:?}: old data behind the old end");
        disk.check();
    });
}

/// Blocks are freed, and other files take them: at no cut does a file show bytes of another.
#[test]
fn no_file_shows_blocks_of_another() {
    each_mode(|disk, mode| {
        for round in 0..6u8 {
            let name = format!("file-{round}");
            let made = disk.create(&name);
            disk.write(made, 0, &vec![round + 1; 400_000]).unwrap();
            if round % 2 == 0 {
                disk.fsync(made);
            }
            if round >= 2 {
                disk.unlink(&format!("file-{}", round - 2));
            }
        }
        disk.fs.sync().unwrap();
        let log = disk.log.log();
        let total = log.completed_changes();
        for count in (0..total).step_by((total / 40).max(1)) {
            let cut = log.prefix(&disk.base, count).unwrap().to_vec().unwrap();
            recovered(cut, |fs| {
                for round in 0..6u8 {
                    let name = format!("file-{round}");
                    let Ok(found) = fs.lookup(&ROOT, fs.root(), name.as_bytes()) else { continue };
                    let bytes = read(fs, found.attr.ino);
                    let own = bytes.iter().all(|&byte| byte == round + 1 || byte == 0);
                    assert!(own, "{mode:?} cut {count}: {name} shows another's bytes");
                }
            });
        }
        disk.check();
    });
}

/// ext2: e2fsck makes the image whole, and what was fsynced is there.
#[test]
fn without_a_journal_fsynced_data_survives_e2fsck() {
    let disk = Disk::new(image(16, &["-t", "ext2", "-b", "1024"], &[]), &options(None));
    let made = disk.create("file");
    let data = pattern(3, 300_000);
    disk.write(made, 0, &data).unwrap();
    disk.fsync(made);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, disk.power_cut()).unwrap();
    let (code, text) = run(std::process::Command::new("e2fsck").arg("-fy").arg(&path));
    assert!(code <= 1, "e2fsck: {text}");
    let fixed = MemoryDevice::from_vec(std::fs::read(&path).unwrap());
    let fs = Ext4::mount(fixed, "fixed", &options(None)).unwrap();
    assert!(file(&fs, "file") == data);
    fs.unmount().unwrap();
    disk.check();
}

#[test]
fn a_mode_is_refused_without_a_journal() {
    let bytes = image(8, &["-t", "ext2"], &[]);
    for mode in MODES {
        let memory = MemoryDevice::from_vec(bytes.clone());
        let error = Ext4::mount(memory, "test", &options(mode)).err().unwrap().to_string();
        assert!(error.contains("data=") && !error.contains('\n'), "{error}");
    }
}
