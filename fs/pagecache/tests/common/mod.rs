//! A device that is slow, reorders, fails on demand and checks the I/O rule; a small
//! random number generator; and an inode that allocates at writeback.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

use uext_blockdev::{
    Bio, BioFlags, BioOp, BlkStatus, BlockDevice, MemoryDevice, QueueLimits, Sector,
};
use uext_pagecache::{
    AddressSpace, AddressSpaceOps, CacheConfig, PAGE_SIZE, PageCache, WritebackControl,
    WritebackError, WritebackGuard,
};
use uext_sync::{Mutex, RwLock};

/// xorshift64*.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

/// The seed of a random test: `UEXT_SEED`, or `default`; printed for replay.
pub fn seed(default: u64) -> u64 {
    let seed = std::env::var("UEXT_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default);
    eprintln!("replay with UEXT_SEED={seed}");
    seed
}

pub fn small_cache(limit_bytes: usize) -> Arc<PageCache> {
    PageCache::new(CacheConfig {
        limit_bytes,
        flush_interval: Duration::from_millis(20),
        dirty_expire: Duration::from_millis(20),
        ..CacheConfig::default()
    })
}

/// A cache whose flusher stays asleep unless limits wake it.
pub fn quiet_cache(limit_bytes: usize) -> Arc<PageCache> {
    PageCache::new(CacheConfig {
        limit_bytes,
        flush_interval: Duration::from_secs(3600),
        dirty_expire: Duration::from_secs(3600),
        ..CacheConfig::default()
    })
}

/// Carries bios on threads of its own, out of order, and checks that the memory of a
/// write does not change on the way and that no sector is written twice at once.
pub struct SlowDevice {
    pub disk: Arc<MemoryDevice>,
    queue: Mutex<Option<mpsc::Sender<Bio>>>,
    workers: Mutex<Vec<std::thread::JoinHandle<()>>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    in_flight: Mutex<HashSet<u64>>,
    reads: AtomicU64,
    writes: AtomicU64,
    /// One write in so many fails; 0: none.
    fail_writes: AtomicU64,
    fail_reads: AtomicBool,
    held: RwLock<()>,
    broken: AtomicBool,
}

impl SlowDevice {
    pub fn new(bytes: u64, threads: u64) -> Arc<Self> {
        let disk = MemoryDevice::new(bytes);
        let shared = Arc::new(Shared::default());
        let (sender, receiver) = mpsc::channel::<Bio>();
        let receiver = Arc::new(Mutex::new(receiver));
        let workers = (0..threads)
            .map(|n| {
                let (disk, shared, receiver) = (disk.clone(), shared.clone(), receiver.clone());
                std::thread::spawn(move || worker(&disk, &shared, &receiver, Rng::new(n + 7)))
            })
            .collect();
        Arc::new(Self {
            disk,
            queue: Mutex::new(Some(sender)),
            workers: Mutex::new(workers),
            shared,
        })
    }

    pub fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::SeqCst)
    }

    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::SeqCst)
    }

    /// One write in `n` fails from now on; 0: none.
    pub fn fail_writes(&self, n: u64) {
        self.shared.fail_writes.store(n, Ordering::SeqCst);
    }

    pub fn fail_reads(&self, on: bool) {
        self.shared.fail_reads.store(on, Ordering::SeqCst);
    }

    /// Nothing completes while `during` runs.
    pub fn hold<T>(&self, during: impl FnOnce() -> T) -> T {
        let _held = self.shared.held.write();
        during()
    }

    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.lock().len()
    }

    /// The I/O rule was kept so far.
    pub fn assert_clean(&self) {
        assert!(!self.shared.broken.load(Ordering::SeqCst), "the I/O rule was broken");
    }
}

fn worker(disk: &MemoryDevice, shared: &Shared, queue: &Mutex<mpsc::Receiver<Bio>>, mut rng: Rng) {
    loop {
        let received = queue.lock().recv();
        let Ok(mut bio) = received else { return };
        let before = (bio.op() == BioOp::Write).then(|| bio.data());
        if rng.below(4) == 0 {
            std::thread::sleep(Duration::from_micros(rng.below(300)));
        }
        let held = shared.held.read();
        let end_io = bio.take_end_io();
        let status = match bio.op() {
            BioOp::Write => {
                shared.writes.fetch_add(1, Ordering::SeqCst);
                let every = shared.fail_writes.load(Ordering::SeqCst);
                if every > 0 && rng.below(every) == 0 {
                    Err(BlkStatus::IoErr)
                } else {
                    disk.submit_bio_wait(bio.piece(0, bio.len())).map(drop)
                }
            }
            BioOp::Read if shared.fail_reads.load(Ordering::SeqCst) => Err(BlkStatus::IoErr),
            BioOp::Read => {
                shared.reads.fetch_add(1, Ordering::SeqCst);
                disk.submit_bio_wait(bio.piece(0, bio.len())).map(drop)
            }
            _ => Ok(()),
        };
        drop(held);
        if let Some(before) = before {
            if before != bio.data() {
                eprintln!("the memory of {bio:?} changed on its way");
                shared.broken.store(true, Ordering::SeqCst);
            }
            let mut in_flight = shared.in_flight.lock();
            (bio.sector().0..bio.end_sector().0).for_each(|s| {
                in_flight.remove(&s);
            });
        }
        bio.restore_end_io(end_io);
        bio.end_io(status);
    }
}

impl BlockDevice for SlowDevice {
    fn limits(&self) -> &QueueLimits {
        self.disk.limits()
    }

    fn submit_bio(&self, bio: Bio) {
        if bio.op() == BioOp::Write {
            let mut in_flight = self.shared.in_flight.lock();
            for sector in bio.sector().0..bio.end_sector().0 {
                if !in_flight.insert(sector) {
                    eprintln!("{bio:?} overlaps a write in flight");
                    self.shared.broken.store(true, Ordering::SeqCst);
                }
            }
        }
        let queue = self.queue.lock();
        queue.as_ref().expect("the device runs").send(bio).expect("its workers run");
    }
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        self.queue.lock().take();
        let me = std::thread::current().id();
        for worker in self.workers.lock().drain(..) {
            if worker.thread().id() != me {
                let _ = worker.join();
            }
        }
    }
}

/// Disk blocks of a page each that files share; a freed block is soon another file's.
pub struct Allocator {
    free: Mutex<Vec<u64>>,
}

impl Allocator {
    pub fn new(blocks: u64) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new((0..blocks).rev().collect()) })
    }

    pub fn take(&self) -> u64 {
        self.free.lock().pop().expect("the test's disk is large enough")
    }

    pub fn give(&self, block: u64) {
        self.free.lock().push(block);
    }
}

/// A file whose pages get a block when they are first written back.
pub struct Inode {
    pub dev: Arc<dyn BlockDevice>,
    pub allocator: Arc<Allocator>,
    pub map: Mutex<BTreeMap<u64, u64>>,
    pub mapping: RwLock<Option<Arc<AddressSpace>>>,
    /// Held exclusively by writers and truncate, shared by readers.
    pub lock: RwLock<()>,
}

impl Inode {
    pub fn new(
        cache: &Arc<PageCache>,
        id: u64,
        dev: Arc<dyn BlockDevice>,
        allocator: Arc<Allocator>,
    ) -> Arc<Self> {
        let inode = Arc::new(Self {
            dev,
            allocator,
            map: Mutex::default(),
            mapping: RwLock::default(),
            lock: RwLock::default(),
        });
        let ops: Weak<Self> = Arc::downgrade(&inode);
        *inode.mapping.write() = Some(AddressSpace::new(cache, id, ops));
        inode
    }

    pub fn mapping(&self) -> Arc<AddressSpace> {
        self.mapping.read().clone().expect("the inode has pages")
    }

    /// Fills a page with a number.
    pub fn write_page(&self, index: u64, stamp: u64) {
        loop {
            let folio = self.mapping().find_or_create(index);
            let mut guard = folio.write();
            guard.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&stamp.to_le_bytes()));
            guard.set_uptodate();
            if guard.mark_dirty(1) {
                return;
            }
        }
    }

    /// The number a page is filled with; 0 for a hole. All of it must be the same.
    pub fn read_page(&self, index: u64) -> u64 {
        loop {
            let folio = self.mapping().find_or_create(index);
            if !folio.is_uptodate() {
                let mut guard = folio.write();
                if !guard.is_uptodate() {
                    let block = self.map.lock().get(&index).copied();
                    match block {
                        None => guard.fill(0),
                        Some(block) => self.read_block(block, guard.bvec(0, PAGE_SIZE)),
                    }
                    guard.set_uptodate();
                }
            }
            let guard = folio.read();
            if folio.is_uptodate() {
                return stamp_of(&guard);
            }
        }
    }

    fn read_block(&self, block: u64, vec: uext_blockdev::BioVec) {
        let sector = Sector::from_byte_offset(block * PAGE_SIZE as u64);
        let mut bio = Bio::new(BioOp::Read, BioFlags::SYNC, sector);
        bio.add_vec(vec);
        self.dev.submit_bio_wait(bio).expect("reads do not fail here");
    }

    /// What the disk holds for a page; 0 for a hole.
    pub fn disk_page(&self, index: u64) -> u64 {
        let Some(block) = self.map.lock().get(&index).copied() else { return 0 };
        stamp_of(&self.dev.read_at(block * PAGE_SIZE as u64, PAGE_SIZE).expect("a read"))
    }

    /// Cuts the file and frees its blocks.
    pub fn truncate(&self, first: u64) {
        self.mapping().truncate(first);
        let gone = self.map.lock().split_off(&first);
        gone.into_values().for_each(|block| self.allocator.give(block));
    }
}

pub fn stamp_of(page: &[u8]) -> u64 {
    let mut words =
        page.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")));
    let first = words.next().expect("a page has words");
    assert!(words.all(|w| w == first), "a torn page");
    first
}

impl AddressSpaceOps for Inode {
    fn writepages(
        &self,
        mapping: &Arc<AddressSpace>,
        wbc: &WritebackControl,
    ) -> Result<u64, WritebackError> {
        let max = usize::try_from(wbc.nr_to_write).unwrap_or(usize::MAX);
        let mut bios: Vec<Bio> = Vec::new();
        let mut count = 0;
        for folio in mapping.dirty_folios(wbc.range.clone(), max) {
            let guard = folio.begin_writeback();
            if guard.dirty() == 0 {
                continue;
            }
            let block =
                *self.map.lock().entry(folio.index()).or_insert_with(|| self.allocator.take());
            let sector = Sector::from_byte_offset(block * PAGE_SIZE as u64);
            let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), sector);
            bio.add_vec(guard.bvec(0, PAGE_SIZE));
            end_with(&mut bio, guard);
            bios.push(bio);
            count += 1;
        }
        self.dev.submit_bios(bios);
        if wbc.sync {
            mapping.wait_writeback(wbc.range.clone());
        }
        Ok(count)
    }
}

fn end_with(bio: &mut Bio, guard: WritebackGuard) {
    bio.set_end_io(move |bio| guard.complete(bio.status().map_err(WritebackError::from)));
}

/// Waits until `what` holds, or fails the test.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited 10 s in vain until {what}");
}
