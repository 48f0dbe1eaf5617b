//! Many small files written by one sync: judged on the disk that a power cut leaves after it,
//! and by who hears of a write that failed.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::time::{Duration, Instant};

use modes_common::*;
use uext_blockdev::BlkStatus;
use uext_blockdev::dm::flakey::{Action, Ops, Rule, When};
use uext_blockdev::dm::log_writes::LogOp;
use uext_ext4::DataMode;
use uext_vfs::{Errno, FileSystem};

const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4", "-N", "2048"];
const EXT3: &[&str] = &["-t", "ext3", "-b", "1024", "-J", "size=4", "-N", "2048"];
/// More than one group of files that are written together.
const FILES: usize = 600;

fn name(n: usize) -> String {
    format!("file-{n}")
}

/// Of all sizes around a page, with holes, and some too large to count as small.
fn contents(n: usize) -> Vec<u8> {
    let seed = n as u64 + 1;
    match n % 20 {
        0 => Vec::new(),
        1 => [vec![0; 70_000], pattern(seed, 50)].concat(),
        2 if n < 100 => pattern(seed, 300_000),
        kind => pattern(seed, kind * 613),
    }
}

fn make(disk: &Disk, n: usize) {
    let (ino, data) = (disk.create(&name(n)), contents(n));
    // Zeroes at the start are left a hole.
    let hole = if n % 20 == 1 { 70_000 } else { 0 };
    disk.write(ino, hole as u64, &data[hole..]).unwrap();
}

#[test]
fn a_sync_makes_all_files_durable() {
    for args in [EXT4, EXT3] {
        for mode in [DataMode::Ordered, DataMode::Journal, DataMode::Writeback] {
            let disk = Disk::new(image(64, args, &[]), &options(Some(mode)));
            (0..FILES).for_each(|n| make(&disk, n));
            disk.fs.sync().unwrap();
            recovered(disk.power_cut(), |fs| {
                for n in 0..FILES {
                    assert!(read(fs, ino(fs, &name(n))) == contents(n), "{mode:?}: file {n}");
                }
            });
            disk.check();
        }
    }
}

/// Before, each file cost a wait for the disk.
#[test]
fn neighbours_go_down_together() {
    let disk = Disk::new(image(64, EXT4, &[]), &options(Some(DataMode::Ordered)));
    for n in 0..FILES {
        let ino = disk.create(&name(n));
        disk.write(ino, 0, &pattern(n as u64, 4096)).unwrap();
    }
    let writes = || disk.log.log().entries.iter().filter(|entry| entry.op == LogOp::Write).count();
    let before = writes();
    disk.fs.sync().unwrap();
    let requests = writes() - before;
    assert!(requests < FILES / 10, "{requests} requests for {FILES} files and the journal");
    // What lies next to each other on the disk belongs to files made one after the other.
    let place = |n: usize| disk.fs.bmap(&ROOT, disk.ino(&name(n)), 0, 4096).unwrap();
    let adjacent = (1..FILES).filter(|&n| place(n) == place(n - 1) + 1).count();
    assert!(adjacent > FILES * 9 / 10, "{adjacent} of {FILES} follow their neighbour");
    disk.check();
}

/// So too when nobody syncs, but much is dirty.
#[test]
fn the_flusher_writes_neighbours_together() {
    let args = ["-t", "ext4", "-b", "4096", "-J", "size=4", "-N", "4096"];
    let disk = Disk::new(image(64, &args, &[]), &options(Some(DataMode::Ordered)));
    let data = |n: usize| pattern(n as u64, 4096);
    let files = 2500;
    for n in 0..files {
        disk.write(disk.create(&name(n)), 0, &data(n)).unwrap();
    }
    let written = || {
        let log = disk.log.log();
        let writes = log.entries.iter().filter(|entry| entry.op == LogOp::Write);
        let pages = writes.map(|entry| entry.bytes as usize / 4096);
        pages.fold((0, 0), |(requests, all), pages| (requests + 1, all + pages))
    };
    let begin = Instant::now();
    while written().1 < 600 {
        assert!(begin.elapsed() < Duration::from_secs(30), "a tenth of the cache is dirty");
        std::thread::sleep(Duration::from_millis(10));
    }
    let (requests, pages) = written();
    assert!(requests < pages / 10, "{requests} requests for {pages} pages");
    disk.fs.sync().unwrap();
    recovered(disk.power_cut(), |fs| {
        (0..files).for_each(|n| assert!(read(fs, ino(fs, &name(n))) == data(n), "file {n}"));
    });
    disk.check();
}

/// A bad spot on the disk costs the file that lies there and none of its neighbours, whose data
/// goes down in the same request: the sync says so, the file's own fsync says so once, and the
/// next sync, on a device that works again, leaves nothing undone.
#[test]
fn a_bad_spot_fails_its_own_file_alone() {
    for bad in [0, 7, 40, 59] {
        let disk = Disk::new(image(64, EXT4, &[]), &options(Some(DataMode::Ordered)));
        let files: Vec<_> =
            (0..60).map(|n| (disk.create(&name(n)), pattern(n as u64, 5000))).collect();
        for (ino, data) in &files {
            disk.write(*ino, 0, &data.iter().rev().copied().collect::<Vec<_>>()).unwrap();
        }
        disk.fs.sync().unwrap();
        let spot = disk.fs.bmap(&ROOT, files[bad].0, 0, 4096).unwrap() * 8;
        for (ino, data) in &files {
            disk.write(*ino, 0, data).unwrap();
        }
        let fail = Action::Fail(BlkStatus::IoErr);
        disk.flakey.add(Rule::new(Ops::WRITE, When::From(1), fail).within(spot + 3..spot + 4));
        assert_eq!(disk.fs.sync(), Err(Errno::EIO), "file {bad}");
        disk.flakey.clear();
        let told = |ino| disk.fs.fsync(&ROOT, ino, FH, false) == Err(Errno::EIO);
        let all_told = || (0..files.len()).filter(|&n| told(files[n].0)).collect::<Vec<_>>();
        assert_eq!(all_told(), [bad]);
        assert_eq!(all_told(), [], "it was told once");
        disk.fs.sync().unwrap();
        recovered(disk.power_cut(), |fs| {
            for (n, (_, data)) in files.iter().enumerate() {
                assert!(read(fs, ino(fs, &name(n))) == *data, "file {n}");
            }
        });
        disk.check();
    }
}

/// A write that fails once and is nobody else's is told: by the sync, and once by fsync.
#[test]
fn a_write_of_one_file_that_failed_is_told_and_tried_again() {
    let disk = Disk::new(image(64, EXT4, &[]), &options(Some(DataMode::Ordered)));
    let (ino, data) = (disk.create(&name(0)), pattern(1, 5000));
    disk.write(ino, 0, &data).unwrap();
    disk.fail(Ops::WRITE, When::Nth(1));
    assert_eq!(disk.fs.sync(), Err(Errno::EIO));
    let fsync = || disk.fs.fsync(&ROOT, ino, FH, false);
    assert_eq!((fsync(), fsync()), (Err(Errno::EIO), Ok(())));
    recovered(disk.power_cut(), |fs| assert!(read(fs, self::ino(fs, &name(0))) == data));
    disk.check();
}

/// A request of several files that fails once is written again, file by file, before the sync
/// says that all is well.
#[test]
fn a_request_of_many_files_that_failed_once_is_on_the_disk() {
    let disk = Disk::new(image(64, EXT4, &[]), &options(Some(DataMode::Ordered)));
    for n in 0..60 {
        let ino = disk.create(&name(n));
        disk.write(ino, 0, &pattern(n as u64, 5000)).unwrap();
    }
    disk.fail(Ops::WRITE, When::Nth(1));
    disk.fs.sync().unwrap();
    assert_eq!(disk.flakey.counts().struck, 1);
    recovered(disk.power_cut(), |fs| {
        for n in 0..60 {
            assert!(read(fs, ino(fs, &name(n))) == pattern(n as u64, 5000), "file {n}");
        }
    });
    disk.check();
}
