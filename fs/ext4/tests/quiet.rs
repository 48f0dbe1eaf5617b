//! Without a journal: a power cut in a quiet moment needs no check, and a disk whose
//! superblock says clean is whole at any moment.
#![allow(clippy::unwrap_used, missing_docs)]

mod names_common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use names_common::{Image, ROOT};
use uext_blockdev::dm::{CrashOptions, LogWrites, SnapshotDevice, UnitSet};
use uext_blockdev::{BlockDevice, MemoryDevice};
use uext_ext4::{Ext4, MountOptions};
use uext_ondisk::superblock::{State, Superblock};
use uext_vfs::{FileHandle, FileSystem, WriteFlags};

fn says_clean(disk: &dyn BlockDevice) -> bool {
    let bytes = disk.read_at(1024, 1024).unwrap();
    Superblock::parse(&bytes).unwrap().state().contains(State::VALID)
}

/// e2fsck's exit status and words.
fn e2fsck(path: &Path, args: &[&str]) -> (i32, String) {
    let output = Command::new("e2fsck").args(args).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what} never happened");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn write(fs: &Ext4, name: &str, bytes: usize) -> u64 {
    let mode = libc::S_IFREG | 0o644;
    let ino = fs.mknod(&ROOT, fs.root(), name.as_bytes(), mode, 0).unwrap().attr.ino;
    let data = vec![7; bytes];
    fs.write(&ROOT, ino, FileHandle::default(), 0, &data, WriteFlags::empty()).unwrap();
    ino
}

fn work(fs: &Ext4, round: usize) {
    let dir = fs.mkdir(&ROOT, fs.root(), format!("dir{round}").as_bytes(), 0o755).unwrap().attr.ino;
    for i in 0..20 {
        let name = format!("f{round}-{i}");
        let ino = write(fs, &name, 3000 + i * 2000);
        fs.link(&ROOT, ino, dir, name.as_bytes()).unwrap();
        if i % 3 == 0 {
            fs.unlink(&ROOT, fs.root(), name.as_bytes()).unwrap();
        }
        if i == 7 {
            fs.fsync(&ROOT, ino, FileHandle::default(), false).unwrap();
        }
        fs.forget(ino, 2);
    }
    fs.forget(dir, 1);
}

#[test]
fn what_says_clean_is_whole_and_a_quiet_moment_says_clean() {
    let image = Image::new(24, &["-t", "ext2", "-b", "1024"]);
    let base = Arc::new(std::fs::read(image.file()).unwrap());
    let device = LogWrites::new(MemoryDevice::from_vec(base.as_ref().clone()));
    let options =
        MountOptions { quiet_interval: Duration::from_millis(200), ..MountOptions::default() };
    let fs = Ext4::mount(device.clone(), "quiet", &options).unwrap();
    let now = |device: &Arc<LogWrites>| -> bool {
        let device: &dyn BlockDevice = device.as_ref();
        says_clean(device)
    };
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("disk");
    for round in 0..3 {
        work(&fs, round);
        assert!(!now(&device), "it says clean while it is written");
        wait_for("the mark", || now(&device));
        // The plug is pulled.
        let log = device.log();
        let cut = SnapshotDevice::over_vec(base.clone());
        let last = log.crash_points(&cut, CrashOptions::default()).last().unwrap();
        let disk = last.state(&UnitSet::none(last.units().len())).to_vec().unwrap();
        std::fs::write(&path, disk).unwrap();
        let (exit, text) = e2fsck(&path, &["-n"]);
        assert!(exit == 0 && text.contains("clean"), "round {round}: {exit} {text}");
        let (exit, text) = e2fsck(&path, &["-fn"]);
        assert_eq!(exit, 0, "round {round}: {text}");
    }
    // An open file without a name is no quiet state: a check would find it.
    let ino = write(&fs, "open", 5000);
    fs.unlink(&ROOT, fs.root(), b"open").unwrap();
    std::thread::sleep(Duration::from_millis(900));
    assert!(!now(&device), "it says clean with an orphan");
    fs.forget(ino, 1);
    wait_for("the mark", || now(&device));
    fs.unmount().unwrap();

    // Every disk that says clean is whole, also in the middle of writes.
    let log = device.log();
    let start = SnapshotDevice::over_vec(base.clone());
    let (mut states, mut clean) = (0, 0);
    for point in log.crash_points(&start, CrashOptions::default()) {
        let count = point.units().len();
        for set in UnitSet::choose(count, 3, 4, point.index as u64) {
            let disk = point.state(&set);
            states += 1;
            if says_clean(disk.as_ref()) {
                clean += 1;
                std::fs::write(&path, disk.to_vec().unwrap()).unwrap();
                let (exit, text) = e2fsck(&path, &["-fn"]);
                assert_eq!(exit, 0, "point {} {set:?}: {text}", point.index);
            }
        }
    }
    println!("{states} states, {clean} that say clean");
    assert!(clean >= 4 && states > clean);
}

/// A cut in the middle of the work: fsck mends it, and what was synced is there.
#[test]
fn a_busy_cut_is_mended_and_keeps_synced_files() {
    let image = Image::new(24, &["-t", "ext2", "-b", "1024"]);
    let base = Arc::new(std::fs::read(image.file()).unwrap());
    let device = LogWrites::new(MemoryDevice::from_vec(base.as_ref().clone()));
    let options = MountOptions { quiet_interval: Duration::ZERO, ..MountOptions::default() };
    let fs = Ext4::mount(device.clone(), "busy", &options).unwrap();
    let mut synced = Vec::new();
    for i in 0..12 {
        let name = format!("synced{i}");
        let ino = write(&fs, &name, 9000 + i);
        write(&fs, &format!("other{i}"), 4000);
        fs.fsync(&ROOT, ino, FileHandle::default(), false).unwrap();
        synced.push((name, 9000 + i, device.mark("synced")));
        if i % 4 == 3 {
            let gone = write(&fs, "gone", 90_000);
            fs.unlink(&ROOT, fs.root(), b"gone").unwrap();
            fs.sync().unwrap();
            fs.forget(gone, 1);
        }
    }
    drop(fs);
    let log = device.log();
    let start = SnapshotDevice::over_vec(base.clone());
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("disk");
    let mut states = 0;
    for point in log.crash_points(&start, CrashOptions::default()).step_by(8) {
        let count = point.units().len();
        for set in UnitSet::choose(count, 1, 2, point.index as u64) {
            std::fs::write(&path, point.state(&set).to_vec().unwrap()).unwrap();
            let (exit, text) = e2fsck(&path, &["-fy"]);
            assert!(exit <= 1, "point {}: {exit} {text}", point.index);
            let (exit, text) = e2fsck(&path, &["-fn"]);
            assert_eq!(exit, 0, "point {}: {text}", point.index);
            let after = MemoryDevice::from_vec(std::fs::read(&path).unwrap());
            let fs = Ext4::mount(after, "after", &options).unwrap();
            for (name, bytes, _) in synced.iter().filter(|(_, _, time)| *time < point.time) {
                let found = fs.lookup(&ROOT, fs.root(), name.as_bytes());
                let found =
                    found.unwrap_or_else(|e| panic!("point {}: {name}: {e:?}", point.index));
                assert_eq!(found.attr.size, *bytes as u64, "point {}: {name}", point.index);
            }
            fs.unmount().unwrap();
            states += 1;
        }
    }
    println!("{states} states");
    assert!(states > 10);
}
