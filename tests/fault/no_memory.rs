//! Writeback without memory: once armed, every allocation of the process is counted by where it
//! was asked for (a large `AlignedBuf` by the `Arc` or slab around it, since it is a mapping), while dirty data, delayed allocation, commit and checkpoint go to the disk.
//!
//! This binary has one test, so that no other allocates meanwhile. What is counted is printed per
//! place. Nothing may be but by the writes of the journal's superblock, whether fsync(2) or the
//! flusher's thread writes, while the log wraps and checkpoints bring blocks home; sync(2) makes
//! a list of the inodes first.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use uext_blockdev::file::Engine;
use uext_blockdev::{FileDevice, OpenOptions};
use uext_ext4::{Ext4, MountOptions};
use uext_tests::scratch::{Kind, Scratch, assert_clean};
use uext_tests::tree::Rng;
use uext_vfs::{Context, FileHandle, FileSystem, Ino, ReadReply, WriteFlags};

struct Counting;

static ARMED: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static SITES: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// Set while an allocation is looked at, which allocates itself.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Counts an allocation, by the functions of this project that asked for it.
fn note() {
    if !ARMED.load(Ordering::SeqCst) || LOOKING.replace(true) {
        return;
    }
    COUNT.fetch_add(1, Ordering::SeqCst);
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    let ours = |line: &&str| line.contains("uext_") && !line.contains("no_memory");
    let names: Vec<&str> = trace
        .lines()
        .filter_map(|line| line.trim().split_once(": ").map(|(_, name)| name))
        .filter(ours)
        .take(3)
        .collect();
    if let Ok(mut sites) = SITES.lock() {
        *sites.entry(names.join(" < ")).or_default() += 1;
    }
    LOOKING.set(false);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const ROOT: Context = Context { uid: 0, gid: 0, pid: 0, umask: 0o022 };
const FH: FileHandle = FileHandle(0);
const FILES: u64 = 24;
/// Files that the flusher writes together.
const SMALL: u64 = 400;
/// Rounds of dirtying and syncing; together they fill the log more than once.
const ROUNDS: u32 = 12;
/// What may still grow once: a list that holds more bios than ever before.
const GROWTH: u64 = 8;
/// What a pass of the flusher's thread may ask for: its list of the metadata caches.
const FLUSHER: u64 = 64;

/// Dirties files: long runs, single blocks far apart, and blocks that are mapped already.
fn dirty(fs: &Ext4, files: &[Ino], rng: &mut Rng) {
    for (index, &ino) in files.iter().enumerate() {
        let write = |offset: u64, len: usize| {
            let data = vec![index as u8 + 1; len];
            let wrote = fs.write(&ROOT, ino, FH, offset, &data, WriteFlags::empty());
            assert_eq!(wrote, Ok(len));
        };
        write(0, 150_000);
        for _ in 0..12 {
            write(rng.below(8 << 20), 3000);
        }
    }
}

/// Counts what `work` allocates.
fn armed(what: &str, work: impl FnOnce()) -> u64 {
    COUNT.store(0, Ordering::SeqCst);
    if let Ok(mut sites) = SITES.lock() {
        sites.clear();
    }
    ARMED.store(true, Ordering::SeqCst);
    work();
    ARMED.store(false, Ordering::SeqCst);
    let count = COUNT.load(Ordering::SeqCst);
    if count > 0 {
        println!("{what}: {count} allocations");
    }
    if let Ok(sites) = SITES.lock() {
        let mut sites: Vec<(&String, &u64)> = sites.iter().collect();
        sites.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        sites.iter().take(60).for_each(|(site, count)| println!("  {count:6} {site}"));
    }
    count
}

fn run(kind: Kind, engine: Engine) {
    let scratch = Scratch::new();
    // A small log, so that it wraps.
    let image = scratch.mkfs("image", kind, 512 << 20, &["-J", "size=4"]);
    let options = OpenOptions { engine, ..OpenOptions::default() };
    let device = FileDevice::open(&image, options).expect("open the image");
    let options = MountOptions {
        // A round dirties less than a tenth, at which the flusher's thread would begin.
        cache_bytes: Some(128 << 20),
        commit_interval: Duration::from_secs(86_400),
        ..MountOptions::default()
    };
    let fs = Ext4::mount(device.clone(), "no memory", &options).expect("mount");
    let make = |index| {
        let name = format!("file{index}");
        let made = fs.mknod(&ROOT, fs.root(), name.as_bytes(), libc::S_IFREG | 0o644, 0);
        made.expect("mknod").attr.ino
    };
    let files: Vec<Ino> = (0..FILES).map(make).collect();
    let mut rng = Rng(7);
    let sync_each = || {
        for &ino in &files {
            fs.fsync(&ROOT, ino, FH, false).expect("fsync");
        }
    };
    let small: Vec<_> = (0..SMALL).map(|index| make(FILES + index)).collect();
    // Threads start, and what is kept for each thread that waits reaches its size.
    for _ in 0..4 {
        dirty(&fs, &files, &mut rng);
        std::thread::scope(|scope| {
            for part in files.chunks(3) {
                let fs = &fs;
                scope.spawn(move || {
                    part.iter().for_each(|&ino| fs.fsync(&ROOT, ino, FH, false).expect("fsync"));
                });
            }
        });
        sync_each();
        fs.sync().expect("sync");
    }
    let name = format!("{} {} {engine:?}", kind.fs, kind.block_size);
    let mut count = 0;
    for round in 0..ROUNDS {
        dirty(&fs, &files, &mut rng);
        count += armed(&format!("{name}: fsync, round {round}"), sync_each);
    }
    assert!(count <= GROWTH, "{name}: {count} allocations of writeback, commit and checkpoint");
    // More than a tenth of the cache, and the flusher's thread writes.
    let large = vec![1; 1 << 20];
    let count = armed(&format!("{name}: the flusher"), || {
        LOOKING.set(true);
        for &ino in &small {
            fs.write(&ROOT, ino, FH, 0, &large[..5000], WriteFlags::empty()).expect("write");
        }
        for (at, &ino) in files.iter().enumerate() {
            let offset = (16 << 20) + at as u64;
            fs.write(&ROOT, ino, FH, offset, &large, WriteFlags::empty()).expect("write");
        }
        LOOKING.set(false);
        std::thread::sleep(Duration::from_millis(500));
    });
    assert!(count <= FLUSHER, "{name}: {count} allocations of the flusher");
    fs.sync().expect("sync");
    for (index, &ino) in files.iter().enumerate() {
        let mut reply = ReadReply::new();
        fs.read(&ROOT, ino, FH, 0, 150_000, &mut reply).expect("read");
        assert_eq!(reply.to_vec(), vec![index as u8 + 1; 150_000]);
    }
    fs.unmount().expect("unmount");
    drop((fs, device));
    assert_clean(&image);
}

#[test]
fn writeback_needs_no_memory() {
    uext_tests::require!("mke2fs", "e2fsck");
    run(Kind { fs: "ext4", block_size: 4096 }, Engine::Sync);
    run(Kind { fs: "ext4", block_size: 4096 }, Engine::IoUring);
}
