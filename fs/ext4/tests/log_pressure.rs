//! The smallest journal there is, a cache that is too small, and threads that fill both: who
//! waits for space in the log, for a page and for a checkpoint must never wait in a circle.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use modes_common::*;
use uext_ext4::{DataMode, MountOptions};
use uext_vfs::{Errno, FileSystem, RenameFlags, SetAttr, WriteFlags};

/// Long enough for the slowest machine; a deadlock has no end.
const PATIENCE: Duration = Duration::from_secs(300);
const THREADS: u64 = 4;
const STEPS: u64 = 250;

/// One thread's work, in its own directory.
fn work(disk: &Disk, thread: u64, done: &AtomicU64) {
    let fs = &disk.fs;
    let name = format!("dir-{thread}");
    let dir = fs.mkdir(&ROOT, fs.root(), name.as_bytes(), 0o755).unwrap().attr.ino;
    let random = pattern(thread + 1, STEPS as usize * 8);
    for (step, bytes) in random.chunks(8).enumerate() {
        let name = format!("{}", bytes[0] % 8);
        let name = name.as_bytes();
        let found = fs.lookup(&ROOT, dir, name).map(|entry| entry.attr.ino);
        match (bytes[1] % 8, found) {
            (0, Ok(ino)) => {
                fs.unlink(&ROOT, dir, name).unwrap();
                fs.forget(ino, u64::MAX);
            }
            (1, Ok(_)) => {
                fs.rename(&ROOT, (dir, name), (dir, b"renamed"), RenameFlags::empty()).unwrap();
            }
            (2, Ok(ino)) => {
                let size = Some(u64::from(bytes[2]) << 8);
                fs.setattr(&ROOT, ino, &SetAttr { size, ..SetAttr::default() }).unwrap();
            }
            (3, Ok(ino)) => fs.fsync(&ROOT, ino, FH, bytes[2] & 1 == 0).unwrap(),
            (_, found) => {
                let made = || fs.mknod(&ROOT, dir, name, 0o100_644, 0).map(|entry| entry.attr.ino);
                let ino = found.or_else(|_| made()).unwrap();
                let data = vec![step as u8 | 1; 2000 + (usize::from(bytes[3]) << 9)];
                let at = u64::from(bytes[4]) << 10;
                match fs.write(&ROOT, ino, FH, at, &data, WriteFlags::empty()) {
                    Ok(_) | Err(Errno::ENOSPC) => {}
                    Err(error) => panic!("write: {error:?}"),
                }
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the process when the work makes no progress any more: a thread that waits for ever
/// cannot be ended otherwise.
fn watch(done: &AtomicU64, finished: &AtomicBool, what: &str) {
    let (mut seen, mut since) = (0, std::time::Instant::now());
    while !finished.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        let now = done.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, std::time::Instant::now());
        }
        if since.elapsed() > PATIENCE {
            eprintln!("{what}: nothing has moved since step {seen}: deadlock");
            std::process::abort();
        }
    }
}

fn press(args: &[&str], mode: DataMode) {
    let options = MountOptions { cache_bytes: Some(2 << 20), ..options(Some(mode)) };
    let disk = Disk::new(image(24, args, &[]), &options);
    let (done, finished) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let what = format!("{args:?} {mode:?}");
        let (done, finished, disk) = (&done, &finished, &disk);
        scope.spawn(move || watch(done, finished, &what));
        let threads: Vec<_> =
            (0..THREADS).map(|n| scope.spawn(move || work(disk, n, done))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        finished.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok), "a thread failed");
    });
    // What a cut leaves now is whole too.
    recovered(disk.crash(), |_| ());
    disk.check();
}

#[test]
fn a_log_of_1024_blocks_under_pressure_never_stands_still_ordered() {
    press(&["-t", "ext4", "-b", "1024", "-J", "size=1"], DataMode::Ordered);
    press(&["-t", "ext3", "-b", "1024", "-J", "size=1"], DataMode::Ordered);
}

#[test]
fn a_log_of_1024_blocks_under_pressure_never_stands_still_journal() {
    press(&["-t", "ext4", "-b", "1024", "-J", "size=1"], DataMode::Journal);
    press(&["-t", "ext3", "-b", "1024", "-J", "size=1"], DataMode::Journal);
}
