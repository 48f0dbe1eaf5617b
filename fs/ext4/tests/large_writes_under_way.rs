//! Whoever writes much goes on while the disk still works: what others see of the file meanwhile,
//! and what becomes of the data when the disk then fails.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use modes_common::*;
use uext_blockdev::dm::flakey::{Ops, When};
use uext_blockdev::dm::{Flakey, LogWrites, SnapshotDevice};
use uext_blockdev::{Bio, BlkResult, BlkStatus, BlockDevice, MemoryDevice, QueueLimits, Sector};
use uext_ext4::{DataMode, Ext4};
use uext_vfs::{Errno, FileSystem, Ino, SetAttr, Write, WriteFlags};

const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4"];
const EXT2: &[&str] = &["-t", "ext2", "-b", "1024"];
const LARGE: usize = 256 << 10;
/// Long enough for whoever does not wait.
const A_WHILE: Duration = Duration::from_millis(30);
const FOR_EVER: Duration = Duration::from_secs(60);

/// What the disk does with a large write.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    Nothing,
    Writes,
    Fails,
}

/// A disk that has not decided yet what becomes of large writes.
struct Slow {
    below: Arc<Flakey>,
    does: Mutex<Does>,
    decided: Condvar,
}

impl BlockDevice for Slow {
    fn limits(&self) -> &QueueLimits {
        self.below.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        self.below.submit_bio(bio);
    }

    fn write_slice_wait(&self, sector: Sector, data: &[u8]) -> BlkResult<()> {
        let does = self.does.lock().unwrap();
        let does = *self.decided.wait_while(does, |does| *does == Does::Nothing).unwrap();
        if does == Does::Fails {
            return Err(BlkStatus::IoErr);
        }
        self.below.write_slice_wait(sector, data)
    }
}

/// A file whose large write the disk has not done, although whoever wrote has gone on.
struct UnderWay {
    disk: Disk,
    slow: Arc<Slow>,
    ino: Ino,
    data: Vec<u8>,
    writer: std::thread::JoinHandle<()>,
}

impl UnderWay {
    fn new(args: &[&str]) -> Self {
        let bytes = image(32, args, &[]);
        let base = SnapshotDevice::over_vec(Arc::new(bytes.clone()));
        let memory = MemoryDevice::from_vec(bytes);
        let log = LogWrites::new(memory.clone());
        let flakey = Flakey::new(log.clone(), 1);
        let (does, decided) = (Mutex::new(Does::Nothing), Condvar::new());
        let slow = Arc::new(Slow { below: flakey.clone(), does, decided });
        let mode = args.contains(&"ext4").then_some(DataMode::Ordered);
        let fs = Ext4::mount(slow.clone(), "test", &options(mode)).unwrap();
        let disk = Disk { base, memory, flakey, log, fs };
        let ino = disk.create("file");
        disk.fs.sync().unwrap();
        let data = pattern(1, LARGE);
        let (accepted, is_accepted) = mpsc::channel();
        let (fs, all) = (disk.fs.clone(), data.clone());
        let writer = std::thread::spawn(move || {
            let write = Write { ino, fh: FH, offset: 0, data: &all, flags: WriteFlags::empty() };
            let mut accept = |written| accepted.send(written).unwrap();
            let _ = fs.write_accepted(&ROOT, &write, &mut accept);
        });
        assert_eq!(is_accepted.recv_timeout(FOR_EVER), Ok(LARGE));
        assert!(!writer.is_finished(), "the disk has done nothing");
        Self { disk, slow, ino, data, writer }
    }

    fn decide(&self, does: Does) {
        *self.slow.does.lock().unwrap() = does;
        self.slow.decided.notify_all();
    }

    /// Begins a call, which waits; lets the disk go on, and gives what the call gave.
    fn wait_for<T: Send>(&self, does: Does, call: impl FnOnce(&Ext4) -> T + Send) -> T {
        std::thread::scope(|scope| {
            let (ended, has_ended) = mpsc::channel();
            let fs = &self.disk.fs;
            scope.spawn(move || ended.send(call(fs)).unwrap());
            assert!(has_ended.recv_timeout(A_WHILE).is_err(), "it does not wait for the disk");
            self.decide(does);
            has_ended.recv_timeout(FOR_EVER).expect("it waits for ever")
        })
    }

    fn ended(self) -> (Disk, Ino) {
        self.writer.join().unwrap();
        (self.disk, self.ino)
    }
}

#[test]
fn who_reads_finds_what_was_written_and_the_size_at_once() {
    for (args, does) in [(EXT4, Does::Writes), (EXT4, Does::Fails), (EXT2, Does::Fails)] {
        let write = UnderWay::new(args);
        let ino = write.ino;
        assert_eq!(write.disk.fs.getattr(&ROOT, ino).unwrap().size, LARGE as u64);
        let found = write.wait_for(does, |fs| read(fs, ino));
        assert!(found == write.data);
        write.ended().0.check();
    }
}

#[test]
fn an_fsync_and_a_sync_wait_and_hold() {
    for does in [Does::Writes, Does::Fails] {
        let fsync = |fs: &Ext4, ino| fs.fsync(&ROOT, ino, FH, false);
        let fdatasync = |fs: &Ext4, ino| fs.fsync(&ROOT, ino, FH, true);
        let sync = |fs: &Ext4, _: Ino| fs.sync();
        for call in [fsync, fdatasync, sync] {
            let write = UnderWay::new(EXT4);
            let (ino, data) = (write.ino, write.data.clone());
            // One failure is no loss: the data is tried again.
            assert_eq!(write.wait_for(does, |fs| call(fs, ino)), Ok(()));
            let (disk, _) = write.ended();
            let found = recovered(disk.power_cut(), |fs| read(fs, self::ino(fs, "file")));
            assert!(found == data);
            disk.check();
        }
    }
}

#[test]
fn a_failure_that_stays_is_told_to_the_next_fsync() {
    for args in [EXT4, EXT2] {
        let write = UnderWay::new(args);
        let (ino, data) = (write.ino, write.data.clone());
        write.disk.fail(Ops::WRITE, When::From(1));
        let told = write.wait_for(Does::Fails, |fs| fs.fsync(&ROOT, ino, FH, false));
        assert_eq!(told, Err(Errno::EIO));
        let (disk, _) = write.ended();
        assert!(read(&disk.fs, ino) == data, "it is kept");
        disk.flakey.clear();
        disk.fsync(ino);
        assert!(read(&disk.fs, ino) == data);
        disk.check();
        let after = |fs: &Ext4| read(fs, self::ino(fs, "file"));
        assert!(recovered(disk.memory.snapshot(), after) == data);
    }
}

#[test]
fn an_unmount_waits_and_leaves_a_clean_image() {
    for (args, does) in [(EXT4, Does::Writes), (EXT4, Does::Fails), (EXT2, Does::Writes)] {
        let write = UnderWay::new(args);
        let data = write.data.clone();
        assert_eq!(write.wait_for(does, |fs| fs.unmount()), Ok(()));
        let disk = write.ended().0;
        fsck(&disk.memory.snapshot());
        let after = |fs: &Ext4| read(fs, ino(fs, "file"));
        assert!(recovered(disk.memory.snapshot(), after) == data);
    }
}

#[test]
fn what_changes_the_file_comes_after_it() {
    for does in [Does::Writes, Does::Fails] {
        let truncated = UnderWay::new(EXT4);
        let (ino, mut data) = (truncated.ino, truncated.data.clone());
        truncated.wait_for(does, |fs| {
            let set = SetAttr { size: Some(5000), ..SetAttr::default() };
            fs.setattr(&ROOT, ino, &set).unwrap()
        });
        let (disk, _) = truncated.ended();
        assert!(read(&disk.fs, ino) == data[..5000]);
        disk.check();

        let written = UnderWay::new(EXT4);
        let (ino, small) = (written.ino, pattern(2, 5000));
        let write = |fs: &Ext4| fs.write(&ROOT, ino, FH, 7000, &small, WriteFlags::empty());
        assert_eq!(written.wait_for(does, write), Ok(5000));
        data[7000..12_000].copy_from_slice(&small);
        let (disk, _) = written.ended();
        assert!(read(&disk.fs, ino) == data);
        disk.fsync(ino);
        let found = recovered(disk.power_cut(), |fs| read(fs, self::ino(fs, "file")));
        assert!(found == data);
        disk.check();

        let punched = UnderWay::new(EXT4);
        let (ino, mut data) = (punched.ino, punched.data.clone());
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let punch = |fs: &Ext4| fs.fallocate(&ROOT, ino, 8192, 100_000, mode);
        assert_eq!(punched.wait_for(does, punch), Ok(()));
        data[8192..108_192].fill(0);
        let (disk, _) = punched.ended();
        assert!(read(&disk.fs, ino) == data);
        disk.check();
    }
}

/// Whoever wrote has gone on: it closes the file, and another removes it.
#[test]
fn who_deletes_the_file_waits() {
    for (args, does) in [(EXT4, Does::Writes), (EXT4, Does::Fails), (EXT2, Does::Writes)] {
        let write = UnderWay::new(args);
        write.wait_for(does, |_| write.disk.unlink("file"));
        let (disk, _) = write.ended();
        assert_eq!(disk.fs.lookup(&ROOT, disk.fs.root(), b"file").unwrap_err(), Errno::ENOENT);
        disk.check();
    }
}

#[test]
fn a_commit_meanwhile_tells_nothing_of_it() {
    let write = UnderWay::new(EXT4);
    let other = write.disk.create("other");
    write.disk.fsync(other);

    let cut = write.disk.power_cut();

    let size = |fs: &Ext4| fs.getattr(&ROOT, ino(fs, "file")).unwrap().size;
    assert_eq!(
        recovered(cut, |fs| (size(fs), fs.lookup(&ROOT, fs.root(), b"other").is_ok())),
        (0, true)
    );
    write.decide(Does::Writes);
    write.ended().0.check();
}

#[test]
fn who_asks_for_the_disk_waits_for_it() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(None));
    let ino = disk.create("file");
    let data = pattern(1, LARGE);
    for flags in [WriteFlags::SYNC, WriteFlags::DSYNC, WriteFlags::DIRECT] {
        let write = Write { ino, fh: FH, offset: 0, data: &data, flags };
        let mut accept = |_| panic!("{flags:?}: told before the disk had it");
        assert_eq!(disk.fs.write_accepted(&ROOT, &write, &mut accept), Ok(LARGE));
    }
    // What goes through the cache is answered by its return.
    let write = Write { ino, fh: FH, offset: 3, data: &data, flags: WriteFlags::empty() };
    let mut accept = |_| panic!("told before it was in the cache");
    assert_eq!(disk.fs.write_accepted(&ROOT, &write, &mut accept), Ok(LARGE));
    disk.check();
}
