//! Small files are read ahead for whoever reads them in the order of a listing: they are there
//! before they are asked for, and hold what they would hold without it.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use modes_common::*;
use uext_blockdev::{Bio, BioFlags, BioOp, BlkStatus, BlockDevice, MemoryDevice, QueueLimits};
use uext_ext4::{DataMode, Ext4};
use uext_vfs::{DirEntry, DirSink, FileKind, FileSystem, Ino, SetAttr, WriteFlags};

const KINDS: [&[&str]; 2] = [
    &["-t", "ext4", "-b", "4096", "-J", "size=4", "-N", "2048"],
    &["-t", "ext3", "-b", "1024", "-J", "size=4", "-N", "2048"],
];
const FILES: usize = 200;
/// Long enough for whoever does not wait.
const A_WHILE: Duration = Duration::from_millis(30);

/// A disk that can keep what is read ahead for itself.
struct Disk {
    below: Arc<MemoryDevice>,
    holds: AtomicBool,
    held: Mutex<Vec<Bio>>,
    /// Reads that somebody waited for.
    waits: AtomicUsize,
}

impl Disk {
    /// The held reads are done, or fail.
    fn release(&self, fail: bool) -> usize {
        self.holds.store(false, Ordering::SeqCst);
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let count = held.len();
        for bio in held {
            if fail { bio.end_io(Err(BlkStatus::IoErr)) } else { self.below.submit_bio(bio) }
        }
        count
    }
}

impl BlockDevice for Disk {
    fn limits(&self) -> &QueueLimits {
        self.below.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        let ahead = bio.flags().contains(BioFlags::RAHEAD);
        if bio.op() == BioOp::Read && !ahead {
            self.waits.fetch_add(1, Ordering::SeqCst);
        }
        // Where files lie is waited for before anything of them is held.
        if ahead && !bio.flags().contains(BioFlags::META) && self.holds.load(Ordering::SeqCst) {
            self.held.lock().unwrap().push(bio);
        } else {
            self.below.submit_bio(bio);
        }
    }
}

/// Of all sizes around a page, with holes, none large.
fn contents(n: usize) -> Vec<u8> {
    match n % 20 {
        0 => Vec::new(),
        1 => [vec![0; 20_000], pattern(n as u64, 50)].concat(),
        kind => pattern(n as u64, kind * 613),
    }
}

#[derive(Default)]
struct Files(Vec<(Ino, usize)>, u64);

impl DirSink for Files {
    fn add(&mut self, entry: &DirEntry<'_>) -> bool {
        self.1 = entry.next_offset;
        if entry.kind == Some(FileKind::Regular) {
            self.0.push((entry.ino, std::str::from_utf8(entry.name).unwrap().parse().unwrap()));
        }
        true
    }
}

/// A directory of files, of which nothing but the listing and the inodes is in memory.
fn listed(args: &[&str]) -> (Arc<Disk>, Arc<Ext4>, Vec<(Ino, usize)>) {
    let below = MemoryDevice::from_vec(image(64, args, &[]));
    let fs = Ext4::mount(below.clone(), "made", &options(Some(DataMode::Ordered))).unwrap();
    let dir = fs.mkdir(&ROOT, fs.root(), b"dir", 0o755).unwrap().attr.ino;
    for n in 0..FILES {
        let name = n.to_string();
        let ino = fs.mknod(&ROOT, dir, name.as_bytes(), 0o100_644, 0).unwrap().attr.ino;
        let (data, hole) = (contents(n), if n % 20 == 1 { 20_000 } else { 0 });
        fs.write(&ROOT, ino, FH, hole as u64, &data[hole..], WriteFlags::empty()).unwrap();
    }
    fs.unmount().unwrap();
    drop(fs);
    let holds = AtomicBool::new(false);
    let disk = Arc::new(Disk { below, holds, held: Mutex::default(), waits: AtomicUsize::new(0) });
    let fs = Ext4::mount(disk.clone(), "read", &options(Some(DataMode::Ordered))).unwrap();
    let (dir, mut files) = (ino(&fs, "dir"), Files::default());
    loop {
        let before = files.1;
        fs.readdir(&ROOT, dir, FH, before, &mut files).unwrap();
        if files.1 == before {
            break;
        }
    }
    assert_eq!(files.0.len(), FILES);
    for (ino, _) in &files.0 {
        fs.iget(&ROOT, *ino).unwrap();
    }
    (disk, fs, files.0)
}

#[test]
fn files_read_in_the_order_of_their_listing_cost_no_wait() {
    for args in KINDS {
        let (disk, fs, files) = listed(args);
        let before = disk.waits.load(Ordering::SeqCst);
        for (ino, n) in &files {
            assert!(read(&fs, *ino) == contents(*n), "file {n}");
        }
        let waits = disk.waits.load(Ordering::SeqCst) - before;
        // Until the order is seen: of data, and of pointers.
        assert!(waits <= 4, "{waits} waits for {FILES} files");
        fs.unmount().unwrap();
    }
}

#[test]
fn files_read_in_no_order_are_not_read_ahead() {
    let (disk, fs, files) = listed(KINDS[0]);
    disk.holds.store(true, Ordering::SeqCst);
    // The rest of a file that is read in pieces is another matter.
    for (ino, n) in files.iter().rev().filter(|(_, n)| contents(*n).len() <= 4096) {
        assert!(read(&fs, *ino) == contents(*n));
    }
    assert_eq!(disk.release(false), 0);
    fs.unmount().unwrap();
}

#[test]
fn what_happens_to_files_that_are_on_their_way_counts() {
    for args in KINDS {
        for fails in [false, true] {
            let (disk, fs, files) = listed(args);
            disk.holds.store(true, Ordering::SeqCst);
            let nonempty: Vec<_> =
                files.iter().filter(|(_, n)| !contents(*n).is_empty()).copied().collect();
            for (ino, n) in &nonempty[..2] {
                assert!(read(&fs, *ino) == contents(*n));
            }
            let on_their_way = disk.held.lock().unwrap().len();
            assert!(on_their_way > 0, "nothing is read ahead");
            let [written, cut, removed, untouched] = [2, 3, 4, 5].map(|at| nonempty[at]);
            let done = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let new = WriteFlags::empty();
                    assert_eq!(fs.write(&ROOT, written.0, FH, 5, b"new", new), Ok(3));
                    done.fetch_add(1, Ordering::SeqCst);
                });
                scope.spawn(|| {
                    for size in [3, 5000] {
                        let set = SetAttr { size: Some(size), ..SetAttr::default() };
                        fs.setattr(&ROOT, cut.0, &set).unwrap();
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                });
                scope.spawn(|| {
                    let name = removed.1.to_string();
                    fs.unlink(&ROOT, ino(&fs, "dir"), name.as_bytes()).unwrap();
                    fs.forget(removed.0, u64::MAX);
                    done.fetch_add(1, Ordering::SeqCst);
                });
                std::thread::sleep(A_WHILE);
                assert!(done.load(Ordering::SeqCst) < 3, "nobody waits for the disk");
                assert_eq!(disk.release(fails), on_their_way);
            });
            let mut expected = contents(written.1);
            expected.resize(expected.len().max(8), 0);
            expected[5..8].copy_from_slice(b"new");
            assert!(read(&fs, written.0) == expected);
            let expected = [&contents(cut.1)[..3], &[0; 4997]].concat();
            assert!(read(&fs, cut.0) == expected);
            assert!(read(&fs, untouched.0) == contents(untouched.1));
            for (ino, n) in nonempty.iter().skip(6) {
                assert!(read(&fs, *ino) == contents(*n), "file {n}");
            }
            fs.unmount().unwrap();
            fsck(&disk.below.snapshot());
        }
    }
}
