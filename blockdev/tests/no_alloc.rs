//! Writeback must get through with no memory left: bios of a set, submitted to a
//! file device with each engine, allocate nothing. This binary has one test, so
//! that no other allocates meanwhile.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::disk_file;
use uext_blockdev::bio::BioEndIo;
use uext_blockdev::file::Engine;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioSet, BioVec, BlockDevice, FileDevice, OpenOptions, Sector,
};

struct Counting;

static ARMED: AtomicBool = AtomicBool::new(false);
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ARMED.load(Ordering::SeqCst) {
            ALLOCATED.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[derive(Default)]
struct Ended {
    good: AtomicUsize,
    bad: AtomicUsize,
}

impl BioEndIo for Ended {
    fn end_io(&self, bio: Bio) {
        let count = if bio.status().is_ok() { &self.good } else { &self.bad };
        // Gone before it is counted, so that its array is back.
        drop(bio);
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// Writes `count` bios of 16 pages, some of them durable, and waits for all.
fn write(dev: &FileDevice, set: &BioSet, page: &Arc<AlignedBuf>, ended: &Arc<Ended>, count: usize) {
    let handler: Arc<dyn BioEndIo> = ended.clone();
    for n in 0..count {
        let flags = match n % 16 {
            3 => BioFlags::FUA,
            7 => BioFlags::PREFLUSH | BioFlags::FUA,
            _ => BioFlags::empty(),
        };
        let mut bio = set.alloc(BioOp::Write, flags, Sector((n as u64 % 32) * 128));
        for _ in 0..16 {
            bio.add_vec(BioVec::whole(page.clone()));
        }
        bio.set_end_io_shared(handler.clone());
        dev.submit_bio(bio);
    }
    let start = Instant::now();
    while ended.good.load(Ordering::SeqCst) < count {
        assert!(start.elapsed() < Duration::from_secs(30), "all end");
        assert_eq!(ended.bad.load(Ordering::SeqCst), 0);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn submitting_bios_of_a_set_allocates_nothing() {
    let page = Arc::new(AlignedBuf::from_slice(&[5; 4096]));
    for engine in [Engine::Sync, Engine::IoUring, Engine::Aio] {
        let place = disk_file();
        place.resize(4 << 20);
        let options = OpenOptions { engine, ..OpenOptions::default() };
        let dev = FileDevice::open(place.path(), options).unwrap();
        let set = BioSet::reserve_only(24, 16);
        // Threads start, and take what they keep.
        write(&dev, &set, &page, &Arc::default(), 400);
        std::thread::sleep(Duration::from_millis(50));
        let ended = Arc::default();
        ARMED.store(true, Ordering::SeqCst);
        write(&dev, &set, &page, &ended, 200);
        ARMED.store(false, Ordering::SeqCst);
        assert_eq!(ALLOCATED.load(Ordering::SeqCst), 0, "allocations with {engine:?}");
    }
}
