//! The journal under shuttle: a toy filesystem whose blocks tell after any power cut
//! whether updates were whole, whether what was acknowledged is there, and whether a
//! block that was freed and used again was spared by the replay.
//!
//! Blocks of the toy: two whose changes must come together, for each worker a counter
//! of its updates, and for each a block that is now metadata, now free, now data, with
//! another that says what it is.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test -p uext-jbd2 --lib model` (own target
//! directory), or `make models`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use uext_blockdev::dm::ModelDisk;
use uext_blockdev::{BioFlags, BlockDevice};
use uext_ondisk::jbd2::RawJournalSuperblock;
use uext_pagecache::{BufferCache, CacheConfig, PageCache};
use uext_sync::explore::{below, explore};
use uext_sync::thread;

use crate::checkpoint::Aim;
use crate::{
    Handle, Journal, JournalConfig, JournalError, JournalLocation, JournalMap, JournalRun,
    OnDamage, Recovery, Tid,
};

const SIZE: usize = 1024;
/// The two blocks whose changes come together: the first is 0 minus the second.
const LEFT: u64 = 1;
const RIGHT: u64 = 2;
/// Where the workers' counters, their words on their own block, and those blocks begin.
const COUNTERS: u64 = 4;
const WORDS: u64 = 8;
const OWN: u64 = 12;
/// First block of the journal, its superblock.
const JOURNAL: u64 = 16;
/// Blocks of the ring: so few that two or three transactions fill it.
const RING: u32 = 32;

/// What a worker may rely on after a cut.
#[derive(Clone, Copy, Default)]
struct Promise {
    count: u64,
    word: u64,
}

struct Toy {
    disk: Arc<ModelDisk>,
    cache: Arc<PageCache>,
    buffers: Arc<BufferCache>,
    journal: Arc<Journal>,
    promises: Mutex<Vec<Promise>>,
    /// The last transaction whose call-back ran. PAIRS-WITH: itself; it watches.
    called: AtomicU64,
}

fn map() -> JournalMap {
    let run = JournalRun { logical: 0, physical: JOURNAL, count: RING + 1 };
    JournalMap::from_runs(vec![run]).unwrap()
}

fn config(cached_blocks: u32) -> JournalConfig {
    JournalConfig { background: false, cached_blocks, ..JournalConfig::default() }
}

fn toy(workers: usize, cached_blocks: u32) -> Arc<Toy> {
    let mut image = vec![0; (JOURNAL as usize + RING as usize + 1) * SIZE];
    let mut sb = RawJournalSuperblock::new(SIZE as u32, RING + 1, 1, Default::default());
    sb.update_checksum();
    image[JOURNAL as usize * SIZE..][..SIZE].copy_from_slice(zerocopy::IntoBytes::as_bytes(&sb));
    let disk = ModelDisk::new(image);
    let cache = PageCache::new(CacheConfig { limit_bytes: 0, ..CacheConfig::default() });
    let buffers = BufferCache::new(&cache, disk.clone(), SIZE as u32);
    let config = config(cached_blocks);
    let journal = Journal::open(disk.clone(), map(), [0; 16], buffers.clone(), config).unwrap();
    let promises = Mutex::new(vec![Promise::default(); workers]);
    let toy = Toy { disk, cache, buffers, journal, promises, called: AtomicU64::new(0) };
    let toy = Arc::new(toy);
    let weak = Arc::downgrade(&toy);
    toy.journal.on_commit(Box::new(move |tid| {
        let toy = weak.upgrade().expect("the toy lives while its journal works");
        let before = toy.called.swap(u64::from(tid), SeqCst);
        assert!(before == 0 || before + 1 == u64::from(tid), "{tid} became durable after {before}");
        assert!(toy.journal.committed_tid() >= tid);
    }));
    toy
}

fn number(bytes: &[u8]) -> i64 {
    i64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn block(image: &[u8], block: u64) -> &[u8] {
    &image[block as usize * SIZE..][..SIZE]
}

/// What a worker's own block holds in its state `word`.
fn contents(worker: u64, word: u64) -> Vec<u8> {
    let mut bytes = vec![(worker * 50 + word) as u8; SIZE];
    if word % 2 == 1 {
        // Looks like a block of the journal, so that it must be escaped.
        bytes[..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
    }
    bytes
}

type Result<T> = std::result::Result<T, JournalError>;

impl Toy {
    /// Begins an update, in no transaction that a commit has locked. (One that turns out empty
    /// goes on, but here everybody writes.)
    fn start(&self, credits: u32) -> Result<Handle> {
        let locked = self.journal.status().committing;
        let handle = self.journal.start(credits)?;
        let joined = locked.is_some_and(|(tid, _)| tid == handle.tid());
        assert!(!joined, "a handle joined transaction {locked:?}");
        Ok(handle)
    }

    fn add(&self, handle: &Handle, at: u64, by: i64) -> Result<()> {
        let buffer = self.buffers.bread(at).expect("reads do not fail");
        let mut bytes = handle.write(&buffer)?;
        let now = number(&bytes) + by;
        bytes[..8].copy_from_slice(&now.to_le_bytes());
        Ok(())
    }

    /// One update that must be seen whole.
    fn update(&self, handle: &Handle, worker: u64) -> Result<()> {
        self.add(handle, LEFT, -1)?;
        self.add(handle, RIGHT, 1)?;
        self.add(handle, COUNTERS + worker, 1)
    }

    fn commit(&self, tid: Tid, worker: u64, promise: Promise) -> Result<()> {
        self.journal.commit(tid)?;
        self.promises.lock().unwrap()[worker as usize] = promise;
        Ok(())
    }

    /// Two updates, in one transaction when it has room.
    fn update_twice(&self, worker: u64, promise: &mut Promise) -> Result<Tid> {
        let mut handle = self.start(3)?;
        self.update(&handle, worker)?;
        promise.count += 1;
        if !handle.extend(3)? {
            handle.restart(3)?;
        }
        self.update(&handle, worker)?;
        promise.count += 1;
        Ok(handle.tid())
    }

    /// The worker's own block goes on: metadata, free, data, metadata ...
    fn use_own(&self, worker: u64, promise: &mut Promise) -> Result<Tid> {
        let (own, next) = (OWN + worker, promise.word + 1);
        if next.is_multiple_of(3) {
            // Data goes past the journal, before what makes it the file's.
            let offset = own * SIZE as u64;
            let data = contents(worker, next);
            let device: &dyn BlockDevice = &*self.disk;
            device
                .write_at(offset, &data, BioFlags::empty())
                .map_err(|status| JournalError::io(crate::IoWhat::WriteFs, own, status))?;
        }
        let handle = self.start(2)?;
        self.add(&handle, WORDS + worker, 1)?;
        if next % 3 == 1 {
            let buffer = self.buffers.getblk(own);
            handle.create(&buffer)?.copy_from_slice(&contents(worker, next));
        }
        if next % 3 == 2 {
            handle.revoke(own);
        }
        promise.word = next;
        let tid = handle.tid();
        drop(handle);
        if next % 3 == 2 {
            // Nobody may use it before this has committed.
            self.commit(tid, worker, *promise)?;
        }
        Ok(tid)
    }

    fn work(&self, worker: u64, steps: u64) -> Result<()> {
        let mut promise = Promise::default();
        for _ in 0..steps {
            let tid = match below(3) {
                0 => self.update_twice(worker, &mut promise)?,
                1 => {
                    let handle = self.start(3)?;
                    if below(4) == 0 {
                        handle.set_sync();
                    }
                    self.update(&handle, worker)?;
                    promise.count += 1;
                    handle.tid()
                }
                _ => self.use_own(worker, &mut promise)?,
            };
            if below(2) == 0 {
                self.commit(tid, worker, promise)?;
            }
        }
        Ok(())
    }

    /// What the background thread does when it needs memory more than space in the log.
    fn bring_home(&self) -> Result<()> {
        let committed = self.journal.committed_tid();
        self.journal.checkpoint(Aim { free: 0, home: Some(committed) })
    }

    /// What the background thread, the flusher and reclaim do.
    fn care(&self, steps: u64) {
        for _ in 0..steps {
            let result = match below(4) {
                0 => self.journal.commit_old(Duration::ZERO),
                1 if below(2) == 0 => self.journal.checkpoint(self.journal.background_aim()),
                1 => self.bring_home(),
                2 => {
                    self.buffers.drop_clean();
                    Ok(())
                }
                _ => {
                    self.cache.drop_clean();
                    Ok(())
                }
            };
            assert!(result.is_ok() || self.journal.aborted().is_some(), "{result:?}");
        }
    }

    /// What is left after a power cut now must be whole, and hold what was promised.
    fn cut_and_judge(&self) {
        let (image, promises) = (self.disk.cut(), self.promises.lock().unwrap().clone());
        let disk = ModelDisk::quiet(image);
        let map = map();
        let location = JournalLocation { device: &*disk, map: &map, block_size: SIZE as u32 };
        Recovery::open(location, &*disk).unwrap().replay(OnDamage::Keep).unwrap();
        judge(&disk.bytes(0..JOURNAL as usize * SIZE), &promises);
    }

    /// Credits are conserved: what no handle holds any more was used or given back.
    fn check_credits(&self) {
        let state = self.journal.state.lock();
        if let Some(tx) = &state.running {
            assert_eq!(tx.handles, 0, "handles left behind");
            assert_eq!(tx.outstanding as usize, tx.buffers.len(), "credits lost or made");
        }
        if state.aborted.is_none() {
            let logged: u32 = state.checkpoints.iter().map(|old| old.log_blocks).sum();
            assert_eq!(state.free + logged, RING, "blocks of the log lost or made");
        }
        assert_eq!(state.barriers, 0);
        assert_eq!(state.committing, None);
    }
}

fn judge(image: &[u8], promises: &[Promise]) {
    let (left, right) = (number(block(image, LEFT)), number(block(image, RIGHT)));
    assert_eq!(left, -right, "an update was torn");
    let mut total = 0;
    for (worker, promise) in promises.iter().enumerate() {
        let worker = worker as u64;
        let count = number(block(image, COUNTERS + worker));
        let word = number(block(image, WORDS + worker)).cast_unsigned();
        total += count;
        assert!(count >= promise.count.cast_signed(), "an acknowledged update is lost");
        assert!(word >= promise.word, "an acknowledged change of a block is lost");
        if word > 0 && word % 3 != 2 {
            let right = block(image, OWN + worker) == contents(worker, word);
            assert!(right, "the block of worker {worker} in state {word} holds something else");
        }
    }
    assert_eq!(total, right, "an update was torn");
}

/// Workers, the background's work and power cuts; then a close.
fn workers_and_cuts(
    workers: u64,
    steps: u64,
    disturb: impl FnOnce(&Arc<Toy>) -> Option<thread::JoinHandle<()>>,
) {
    workers_with_memory(workers, steps, u32::MAX, disturb);
}

/// As [`workers_and_cuts`], with memory for so many blocks.
fn workers_with_memory(
    workers: u64,
    steps: u64,
    cached_blocks: u32,
    disturb: impl FnOnce(&Arc<Toy>) -> Option<thread::JoinHandle<()>>,
) {
    let toy = toy(workers as usize, cached_blocks);
    let mut threads: Vec<_> = (0..workers)
        .map(|worker| {
            let toy = toy.clone();
            thread::spawn(move || {
                let result = toy.work(worker, steps);
                // The worker's own data may meet the failing disk before the journal does.
                let own = matches!(result, Err(JournalError::Io { .. }));
                let aborted = toy.journal.aborted().is_some();
                assert!(result.is_ok() || own || aborted, "{result:?}");
            })
        })
        .collect();
    let care = toy.clone();
    threads.push(thread::spawn(move || care.care(3)));
    let cutter = toy.clone();
    threads.push(thread::spawn(move || {
        (0..below(200)).for_each(|_| cutter.disk.turn());
        cutter.cut_and_judge();
    }));
    threads.extend(disturb(&toy));
    for thread in threads {
        thread.join().unwrap();
    }
    toy.cut_and_judge();
    toy.check_credits();
    let closed = toy.journal.close();
    match toy.journal.aborted() {
        None => {
            closed.unwrap();
            let all = JOURNAL as usize * SIZE;
            judge(&toy.disk.bytes(0..all), &toy.promises.lock().unwrap());
            assert_eq!(toy.journal.status().used_blocks, 0, "close empties the log");
        }
        Some(_) => {
            assert!(closed.is_err(), "a close after an abort is not clean");
            assert!(matches!(toy.journal.start(1), Err(JournalError::Aborted(_))));
            toy.cut_and_judge();
        }
    }
    assert!(toy.journal.start(1).is_err(), "no handle starts in a closed journal");
}

#[test]
fn model_updates_are_whole_and_promises_kept_at_any_cut() {
    explore("journal", 1500, || workers_and_cuts(2, 3, |_| None));
}

#[test]
fn model_three_workers_and_a_log_that_is_full() {
    explore("journal, full log", 600, || workers_and_cuts(3, 5, |_| None));
}

/// Whoever begins a transaction first brings home what the ones before have left, and waits for
/// the commit that holds some of it.
#[test]
fn model_memory_for_few_blocks_stops_nobody() {
    explore("journal, no memory", 400, || workers_with_memory(3, 4, 0, |_| None));
    explore("journal, little memory", 400, || workers_with_memory(3, 4, 8, |_| None));
}

#[test]
fn model_an_abort_wakes_everyone_and_keeps_promises() {
    explore("journal, abort", 800, || {
        workers_and_cuts(2, 3, |toy| {
            let toy = toy.clone();
            Some(thread::spawn(move || {
                (0..below(100)).for_each(|_| toy.disk.turn());
                toy.journal.abort(JournalError::Filesystem(5));
            }))
        });
    });
}

/// The disk notices two writes of a block at once: what goes home, and the data of who has the
/// block next.
#[test]
fn model_a_block_on_its_way_home_is_freed_and_used_again() {
    explore("journal, freed on its way", 1500, || {
        let toy = toy(1, u32::MAX);
        let home = toy.clone();
        let care = thread::spawn(move || (0..4).for_each(|_| home.bring_home().unwrap()));
        let mut promise = Promise::default();
        for _ in 0..6 {
            let tid = toy.use_own(0, &mut promise).unwrap();
            toy.commit(tid, 0, promise).unwrap();
        }
        care.join().unwrap();
        toy.cut_and_judge();
        toy.check_credits();
    });
}

/// A commit may take long, or for ever on a disk that hangs; who waits for it learns of an abort
/// at once.
#[test]
fn model_an_abort_is_told_to_who_waits_for_a_commit() {
    explore("journal, abort during a commit", 800, || {
        let toy = toy(1, u32::MAX);
        let handle = toy.journal.start(3).unwrap();
        toy.update(&handle, 0).unwrap();
        let tid = handle.tid();
        // One of them commits and waits for the handle, the other waits for that.
        let done = Arc::new((uext_sync::Mutex::new(0), uext_sync::Condvar::new()));
        let threads = [(); 2].map(|()| {
            let (toy, done) = (toy.clone(), done.clone());
            thread::spawn(move || {
                assert!(matches!(toy.journal.commit(tid), Err(JournalError::Aborted(_))));
                *done.0.lock() += 1;
                done.1.notify_all();
            })
        });
        while toy.journal.status().committing.is_none() {
            thread::yield_now();
        }
        toy.journal.abort(JournalError::Filesystem(5));
        let mut count = done.0.lock();
        while *count == 0 {
            done.1.wait(&mut count);
        }
        drop(count);
        drop(handle);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn model_a_disk_that_fails_aborts_and_keeps_promises() {
    explore("journal, failing disk", 800, || {
        workers_and_cuts(2, 3, |toy| {
            toy.disk.fail_after(1 + below(40));
            None
        });
    });
}

#[test]
fn model_a_barrier_lets_everyone_through_afterwards() {
    explore("journal, checkpoint_all", 600, || {
        workers_and_cuts(2, 2, |toy| {
            let toy = toy.clone();
            Some(thread::spawn(move || toy.journal.checkpoint_all().unwrap()))
        });
    });
}
