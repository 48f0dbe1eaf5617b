//! Two writes of one sector are never in flight together, whatever becomes of its block: a
//! device may carry them in any order, so a freed block's last write could arrive over the data
//! of the file that got the block.
#![allow(clippy::unwrap_used, missing_docs)]

mod modes_common;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use modes_common::*;
use uext_blockdev::{Bio, BioOp, BlockDevice, MemoryDevice, QueueLimits};
use uext_ext4::{DataMode, Ext4};
use uext_vfs::{Errno, FileSystem, Ino, SetAttr, WriteFlags, XattrFlags};

/// A device of several heads that carries bios out of order, those of metadata late, and
/// notices when two of its writes overlap.
struct Heads {
    disk: Arc<MemoryDevice>,
    queue: Mutex<Option<mpsc::Sender<Bio>>>,
    in_flight: Arc<Mutex<HashSet<u64>>>,
    overlapped: AtomicBool,
    heads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Heads {
    fn new(disk: Arc<MemoryDevice>) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel::<Bio>();
        let receiver = Arc::new(Mutex::new(receiver));
        let in_flight = Arc::new(Mutex::new(HashSet::new()));
        let heads = (0..8)
            .map(|_| {
                let (disk, receiver, in_flight) =
                    (disk.clone(), receiver.clone(), in_flight.clone());
                std::thread::spawn(move || {
                    loop {
                        let received = receiver.lock().unwrap().recv();
                        let Ok(mut bio) = received else { return };
                        if bio.flags().contains(uext_blockdev::BioFlags::META)
                            && bio.op() == BioOp::Write
                        {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                        let end_io = bio.take_end_io();
                        let status = match bio.op() {
                            BioOp::Read | BioOp::Write => {
                                disk.submit_bio_wait(bio.piece(0, bio.len())).map(drop)
                            }
                            _ => Ok(()),
                        };
                        if bio.op() == BioOp::Write {
                            let mut in_flight = in_flight.lock().unwrap();
                            (bio.sector().0..bio.end_sector().0).for_each(|sector| {
                                in_flight.remove(&sector);
                            });
                        }
                        bio.restore_end_io(end_io);
                        bio.end_io(status);
                    }
                })
            })
            .collect();
        Arc::new(Self {
            disk,
            queue: Mutex::new(Some(sender)),
            in_flight,
            overlapped: AtomicBool::new(false),
            heads: Mutex::new(heads),
        })
    }
}

impl BlockDevice for Heads {
    fn limits(&self) -> &QueueLimits {
        self.disk.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        if bio.op() == BioOp::Write {
            let mut in_flight = self.in_flight.lock().unwrap();
            for sector in bio.sector().0..bio.end_sector().0 {
                if !in_flight.insert(sector) && !self.overlapped.swap(true, Ordering::SeqCst) {
                    eprintln!("{bio:?} overlaps a write in flight at sector {sector}");
                }
            }
        }
        self.queue.lock().unwrap().as_ref().unwrap().send(bio).unwrap();
    }
}

impl Drop for Heads {
    fn drop(&mut self) {
        self.queue.lock().unwrap().take();
        let me = std::thread::current().id();
        for head in self.heads.lock().unwrap().drain(..).filter(|h| h.thread().id() != me) {
            let _ = head.join();
        }
    }
}

/// xorshift
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// One thread's files, each with what was last written to it.
fn worker(fs: &Ext4, dir: Ino, seed: u64, until: Instant) -> BTreeMap<String, Vec<u8>> {
    let mut rng = Rng(seed);
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let expected = |error: Errno| assert_eq!(error, Errno::ENOSPC, "seed {seed:#x}");
    while Instant::now() < until {
        let name = format!("f{}", rng.below(12));
        let old = files.get(&name).map(|_| fs.lookup(&ROOT, dir, name.as_bytes()).unwrap().attr);
        match (rng.below(10), old) {
            (0..5, None) => {
                let Ok(made) = fs
                    .mknod(&ROOT, dir, name.as_bytes(), 0o100_644, 0)
                    .inspect_err(|&error| expected(error))
                else {
                    continue;
                };
                let data = pattern(rng.below(1 << 30), 2000 + rng.below(120_000) as usize);
                let ino = made.attr.ino;
                let written = fs.write(&ROOT, ino, FH, 0, &data, WriteFlags::empty());
                let written = written.inspect_err(|&error| expected(error)).unwrap_or(0);
                // Its attributes do not fit into the inode.
                let value = vec![7; 600];
                let set = fs.setxattr(&ROOT, ino, b"user.big", &value, XattrFlags::empty());
                set.unwrap_or_else(expected);
                fs.forget(ino, 1);
                files.insert(name, data[..written].to_vec());
            }
            (0..4, Some(attr)) => {
                let size = rng.below(attr.size + 1);
                let set = SetAttr { size: Some(size), ..SetAttr::default() };
                fs.setattr(&ROOT, attr.ino, &set).unwrap();
                files.get_mut(&name).unwrap().truncate(size as usize);
            }
            (4..7, Some(_)) => {
                fs.unlink(&ROOT, dir, name.as_bytes()).unwrap();
                files.remove(&name);
            }
            (7, Some(attr)) => fs.fsync(&ROOT, attr.ino, FH, false).unwrap(),
            (8, _) => fs.sync().unwrap(),
            (9, None) => {
                if let Ok(made) = fs.mkdir(&ROOT, dir, b"sub", 0o755) {
                    fs.forget(made.attr.ino, 1);
                }
                let _ = fs.rmdir(&ROOT, dir, b"sub");
            }
            _ => {}
        }
        if let Some(attr) = old {
            fs.forget(attr.ino, 1);
        }
    }
    files
}

static RUN: AtomicU64 = AtomicU64::new(0);

fn writes_do_not_overlap(args: &[&str], mode: Option<DataMode>) {
    // Hardly room for what the workers write, so that what is freed is used again at once.
    let memory = MemoryDevice::from_vec(image(3, args, &[]));
    let heads = Heads::new(memory.clone());
    let fs = Ext4::mount(heads.clone(), "test", &options(mode)).unwrap();
    let until = Instant::now() + Duration::from_millis(1500);
    let seed = 0x5EED_0001 + RUN.fetch_add(1, Ordering::SeqCst) * 0x1000;
    let trees: Vec<(String, BTreeMap<String, Vec<u8>>)> = std::thread::scope(|scope| {
        let fs = &fs;
        let workers: Vec<_> = (0..4)
            .map(|n| {
                let name = format!("dir{n}");
                let made = fs.mkdir(&ROOT, fs.root(), name.as_bytes(), 0o755).unwrap();
                scope.spawn(move || (name, worker(fs, made.attr.ino, seed + n, until)))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    fs.unmount().unwrap();
    drop(fs);
    assert!(!heads.overlapped.load(Ordering::SeqCst), "writes overlapped; seed {seed:#x}");
    let disk = {
        let memory: &dyn BlockDevice = memory.as_ref();
        memory.read_at(0, memory.size() as usize).unwrap()
    };
    let again = Ext4::mount(MemoryDevice::from_vec(disk), "test", &options(mode)).unwrap();
    for (dir, files) in trees {
        let dir = ino(&again, &dir);
        for (name, data) in files {
            let found = again.lookup(&ROOT, dir, name.as_bytes()).unwrap().attr;
            assert!(read(&again, found.ino) == data, "{name} is another file; seed {seed:#x}");
        }
    }
    again.unmount().unwrap();
}

#[test]
fn without_a_journal() {
    for block_size in ["1024", "4096"] {
        writes_do_not_overlap(&["-t", "ext2", "-b", block_size, "-N", "128"], None);
    }
}

#[test]
fn with_extents_and_no_journal() {
    writes_do_not_overlap(&["-t", "ext4", "-b", "1024", "-O", "^has_journal", "-N", "128"], None);
}

#[test]
fn with_a_journal() {
    for mode in [DataMode::Ordered, DataMode::Journal] {
        let args = ["-t", "ext3", "-b", "1024", "-J", "size=1", "-N", "128"];
        writes_do_not_overlap(&args, Some(mode));
    }
}
