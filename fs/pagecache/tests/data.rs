//! Address spaces: dirty pages, writeback, errors, truncate, reclaim, sharing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use common::{Allocator, Inode, SlowDevice, eventually, quiet_cache, small_cache};
use uext_blockdev::{BlockDevice, MemoryDevice};
use uext_pagecache::{
    AddressSpace, AddressSpaceOps, Buffer, BufferCache, CacheConfig, Change, ChangeListener, Folio,
    PAGE_SIZE, PageCache, WritebackControl, WritebackError,
};
use uext_sync::Mutex;

const MIB: usize = 1 << 20;

fn inode_on(cache: &Arc<PageCache>, dev: Arc<dyn BlockDevice>) -> Arc<Inode> {
    let blocks = dev.size() / PAGE_SIZE as u64;
    Inode::new(cache, 12, dev, Allocator::new(blocks))
}

fn inode(cache: &Arc<PageCache>) -> Arc<Inode> {
    inode_on(cache, MemoryDevice::new(64 * MIB as u64))
}

#[test]
fn a_new_page_is_not_uptodate_and_found_again() {
    let inode = inode(&quiet_cache(MIB));
    let mapping = inode.mapping();
    assert!(mapping.find(7).is_none());
    let folio = mapping.find_or_create(7);
    assert!(!folio.is_uptodate());
    assert!(Arc::ptr_eq(&folio, &mapping.find(7).unwrap()));
    assert_eq!((folio.index(), mapping.nr_pages()), (7, 1));
}

#[test]
fn pages_to_fill_are_those_cached_and_new_ones_side_by_side() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    let mapping = inode.mapping();
    let there = mapping.find_or_create(5);
    let folios = mapping.find_or_create_to_fill(0..40);
    let indexes: Vec<u64> = folios.iter().map(|folio| folio.index()).collect();
    assert_eq!(indexes, (0..40).collect::<Vec<_>>());
    assert!(Arc::ptr_eq(&folios[5], &there));
    assert!(folios.iter().all(|folio| Arc::ptr_eq(folio, &mapping.find(folio.index()).unwrap())));
    assert!(folios.iter().all(|folio| !folio.is_uptodate() && folio.is_attached()));
    assert_eq!(cache.stats().used_bytes, 40 * PAGE_SIZE, "what was not needed went back");
    // To the device they are few pieces: one but for the page that was there, and its like.
    let start = |folio: &Arc<Folio>| folio.write().bvec(0, PAGE_SIZE).as_ptr().addr();
    let breaks = folios.windows(2).filter(|two| start(&two[0]) + PAGE_SIZE != start(&two[1]));
    assert!(breaks.count() <= 3);
    assert!(mapping.find_or_create_to_fill(7..7).is_empty());
}

#[test]
fn guards_may_be_dropped_by_another_thread() {
    let inode = inode(&quiet_cache(MIB));
    let folio = inode.mapping().find_or_create(0);
    let guard = folio.write();
    std::thread::spawn(move || drop(guard)).join().unwrap();
    let guard = folio.read();
    assert!(folio.try_write().is_none());
    std::thread::spawn(move || drop(guard)).join().unwrap();
    assert!(folio.try_write().is_some());
}

#[test]
fn dirty_pages_are_listed_in_order_and_become_clean_by_a_sync() {
    let cache = quiet_cache(4 * MIB);
    let inode = inode(&cache);
    let mapping = inode.mapping();
    [9, 2, 5, 100].iter().for_each(|&i| inode.write_page(i, i + 1));
    let indexes = |range, max| -> Vec<u64> {
        mapping.dirty_folios(range, max).iter().map(|f| f.index()).collect()
    };
    assert_eq!(indexes(0..u64::MAX, 10), [2, 5, 9, 100]);
    assert_eq!(indexes(3..100, 10), [5, 9]);
    assert_eq!(indexes(0..u64::MAX, 2), [2, 5]);
    assert_eq!(cache.stats().dirty_pages, 4);

    cache.flush_mapping(&mapping, 0..10).unwrap();
    assert_eq!(indexes(0..u64::MAX, 10), [100]);
    cache.sync_all().unwrap();
    assert!(!mapping.has_dirty());
    assert_eq!(cache.stats().dirty_pages, 0);
    assert!([9, 2, 5, 100].iter().all(|&i| inode.disk_page(i) == i + 1));
}

#[test]
fn blocks_of_a_page_have_states_of_their_own() {
    let inode = inode(&quiet_cache(MIB));
    let folio = inode.mapping().find_or_create(0);
    let guard = folio.write();
    assert_eq!(guard.set_delayed(0b0110), 0b0110);
    assert_eq!(guard.set_delayed(0b0011), 0b0001);
    guard.set_mapped(0b1000);
    assert!(guard.mark_dirty(0b0111));
    let blocks = guard.blocks();
    assert_eq!((blocks.dirty, blocks.mapped, blocks.delayed), (0b0111, 0b1000, 0b0111));
    drop(guard);

    let writing = folio.begin_writeback();
    assert_eq!((writing.dirty(), folio.blocks().dirty), (0b0111, 0));
    assert_eq!(folio.begin_writeback_if_free(), None);
    assert_eq!(folio.clear_delayed(0b0001), 0b0001);
    writing.complete(Ok(()));
    assert_eq!(folio.blocks().delayed, 0b0110);
    assert_eq!(inode.mapping().truncate(0), 2, "delayed blocks are given back");
}

/// Helper of the test above: a second writer finds nothing to do.
trait BeginIfFree {
    fn begin_writeback_if_free(&self) -> Option<u8>;
}

impl BeginIfFree for Arc<uext_pagecache::Folio> {
    fn begin_writeback_if_free(&self) -> Option<u8> {
        (!self.is_writeback()).then(|| self.begin_writeback().dirty())
    }
}

#[test]
fn a_writer_waits_for_writeback_and_a_reader_does_not() {
    let inode = inode(&quiet_cache(MIB));
    inode.write_page(0, 5);
    let folio = inode.mapping().find(0).unwrap();
    let writing = folio.begin_writeback();
    assert!(folio.try_write().is_none());
    let waiter = std::thread::spawn({
        let inode = inode.clone();
        move || inode.write_page(0, 6)
    });
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(common::stamp_of(&folio.read()), 5, "readable while a writer queues");
    writing.complete(Ok(()));
    waiter.join().unwrap();
    assert!(folio.is_dirty());
}

#[test]
fn writeback_given_up_leaves_the_page_dirty_without_an_error() {
    let inode = inode(&quiet_cache(MIB));
    inode.write_page(0, 5);
    let mapping = inode.mapping();
    let mut mark = mapping.errseq().sample();
    drop(mapping.find(0).unwrap().begin_writeback());
    assert_eq!(mapping.nr_dirty(), 1);
    assert_eq!(mapping.errseq().check_and_advance(&mut mark), Ok(()));
}

#[test]
fn a_failed_write_is_told_once_per_file_and_the_page_stays_dirty() {
    let cache = quiet_cache(MIB);
    let dev = SlowDevice::new(MIB as u64, 1);
    let inode = inode_on(&cache, dev.clone());
    let mapping = inode.mapping();
    let (mut a, mut b) = (mapping.errseq().sample(), mapping.errseq().sample());
    inode.write_page(3, 33);
    dev.fail_writes(1);
    assert_eq!(mapping.write_and_wait(0..u64::MAX), Err(WritebackError::Io));
    assert_eq!((mapping.nr_dirty(), cache.stats().failed_pages), (1, 1));
    for mark in [&mut a, &mut b] {
        assert_eq!(mapping.errseq().check_and_advance(mark), Err(WritebackError::Io));
        assert_eq!(mapping.errseq().check_and_advance(mark), Ok(()));
    }
    dev.fail_writes(0);
    mapping.write_and_wait(0..u64::MAX).unwrap();
    assert_eq!((inode.disk_page(3), cache.stats().failed_pages), (33, 0));
}

#[test]
fn failed_pages_hold_only_their_part_of_the_cache() {
    let cache = quiet_cache(MIB);
    let dev = SlowDevice::new(4 * MIB as u64, 1);
    let inode = inode_on(&cache, dev.clone());
    dev.fail_writes(1);
    (0..200).for_each(|i| inode.write_page(i, i + 1));
    inode.mapping().write_and_wait(0..u64::MAX).unwrap_err();
    assert_eq!(cache.stats().failed_pages, 64);
    assert_eq!(inode.mapping().nr_dirty(), 64);
    let lost = inode.mapping().find_range(0..200).iter().filter(|f| !f.is_uptodate()).count();
    assert_eq!(lost, 136, "what was given up is not shown as if it were on the disk");
    inode.truncate(0);
    let stats = cache.stats();
    assert_eq!((stats.failed_pages, stats.dirty_pages), (0, 0));
}

#[test]
fn truncate_drops_dirty_pages_and_waits_for_writes_under_way() {
    let cache = quiet_cache(4 * MIB);
    let dev = SlowDevice::new(4 * MIB as u64, 1);
    let inode = inode_on(&cache, dev.clone());
    let mapping = inode.mapping();
    (0..10).for_each(|i| inode.write_page(i, i + 1));
    let held = mapping.find(9).unwrap();
    std::thread::scope(|s| {
        let done = dev.hold(|| {
            s.spawn(|| mapping.write_and_wait(0..8));
            eventually("the write is under way", || dev.in_flight() > 0);
            let done = s.spawn(|| inode.truncate(4));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!done.is_finished(), "a write of a page to drop is under way");
            done
        });
        done.join().unwrap();
    });
    assert_eq!(mapping.nr_pages(), 4);
    assert!(!held.is_attached() && !held.write().mark_dirty(1));
    mapping.write_and_wait(0..u64::MAX).unwrap();
    assert!(!mapping.has_dirty());
    assert_eq!(
        (0..10).map(|i| inode.read_page(i)).collect::<Vec<_>>(),
        [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn a_hole_leaves_both_sides() {
    let inode = inode(&quiet_cache(MIB));
    let mapping = inode.mapping();
    (0..10).for_each(|i| inode.write_page(i, i + 1));
    mapping.truncate_range(3..6);
    assert_eq!(mapping.find_range(0..100).len(), 7);
    assert_eq!(mapping.nr_dirty(), 7);
    assert!(mapping.find(3).is_none() && mapping.find(6).is_some());
}

#[test]
fn invalidate_drops_clean_pages_even_when_held_and_keeps_dirty_ones() {
    let inode = inode(&quiet_cache(MIB));
    let mapping = inode.mapping();
    (0..4).for_each(|i| inode.write_page(i, i + 1));
    mapping.write_and_wait(0..2).unwrap();
    let held = mapping.find(1).unwrap();
    assert_eq!(mapping.invalidate(0..4), 2);
    assert!(mapping.find(0).is_none() && mapping.find(1).is_none());
    assert!(!held.is_attached());
    assert_eq!(mapping.nr_dirty(), 2);
}

#[test]
fn the_flusher_writes_what_is_old() {
    let cache = small_cache(4 * MIB);
    let inode = inode(&cache);
    (0..10).for_each(|i| inode.write_page(i, i + 1));
    eventually("the flusher has written", || !inode.mapping().has_dirty());
    assert!((0..10).all(|i| inode.disk_page(i) == i + 1));
}

#[test]
fn the_flusher_starts_early_when_much_is_dirty() {
    let cache = quiet_cache(4 * MIB);
    let inode = inode(&cache);
    (0..120).for_each(|i| inode.write_page(i, i + 1));
    eventually("less is dirty", || cache.stats().dirty_pages + cache.stats().writeback_pages < 100);
}

#[test]
fn pages_of_a_dropped_address_space_are_still_written() {
    let cache = small_cache(4 * MIB);
    let inode = inode(&cache);
    inode.write_page(0, 77);
    let weak = Arc::downgrade(&inode.mapping());
    inode.mapping.write().take();
    drop(cache);
    eventually("it was written and freed", || weak.strong_count() == 0);
    assert_eq!(inode.disk_page(0), 77);
}

#[test]
fn an_owner_that_died_dirty_does_not_wedge_the_flusher() {
    let cache = small_cache(4 * MIB);
    let gone = inode(&cache);
    gone.write_page(0, 1);
    drop(gone);
    let alive = inode(&cache);
    alive.write_page(0, 2);
    eventually("the cache is clean", || cache.stats().dirty_pages == 0);
    assert_eq!(alive.disk_page(0), 2);
}

#[test]
fn the_limit_holds_for_a_stream_of_writes_far_larger_than_it() {
    let cache = quiet_cache(MIB);
    let dev = SlowDevice::new(64 * MIB as u64, 2);
    let inode = inode_on(&cache, dev.clone());
    let (mut most, mut dirty) = (0, 0);
    for i in 0..4000 {
        inode.write_page(i, i + 1);
        inode.mapping().balance_dirty();
        let stats = cache.stats();
        most = most.max(stats.used_bytes);
        // Counted one after the other, so a page on its way may be seen twice.
        dirty = dirty.max(stats.dirty_pages + stats.writeback_pages);
    }
    let stats = cache.stats();
    assert!(most <= MIB, "{most} bytes at the worst; {stats:?}");
    assert!(dirty <= 110, "{dirty} of 256 pages dirty at the worst, the limit is 102");
    assert!(stats.throttled > 0 && stats.evicted > 3000, "{stats:?}");
    cache.sync_all().unwrap();
    assert!((0..4000).all(|i| inode.disk_page(i) == i + 1));
    dev.assert_clean();
}

#[test]
fn without_throttling_dirty_pages_push_the_flusher_and_none_is_lost() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    (0..4000).for_each(|i| inode.write_page(i, i + 1));
    assert!(cache.stats().used_bytes <= 2 * MIB, "{:?}", cache.stats());
    cache.sync_all().unwrap();
    assert!((0..4000).all(|i| inode.read_page(i) == i + 1));
}

#[test]
fn a_dead_device_throttles_writers_only_for_a_bounded_time() {
    let cache = quiet_cache(MIB);
    let dev = SlowDevice::new(64 * MIB as u64, 1);
    let inode = inode_on(&cache, dev.clone());
    dev.hold(|| {
        (0..150).for_each(|i| inode.write_page(i, 1));
        inode.mapping().balance_dirty();
    });
    assert!(cache.stats().throttled > 0);
}

#[test]
fn a_stream_read_once_does_not_push_out_what_is_read_often() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    let hot = || (0..64).for_each(|i| assert_eq!(inode.read_page(i), 0));
    hot();
    hot();
    let mut kept = 0;
    for i in 1000..6000 {
        inode.read_page(i);
        if i % 100 == 0 {
            kept += inode.mapping().find_range(0..64).len();
            hot();
        }
    }
    assert!(kept > 64 * 45, "only {kept} of {} times a hot page was there", 64 * 50);
    assert!(cache.stats().used_bytes <= MIB);
}

#[test]
fn pages_held_by_readers_keep_their_contents_when_evicted() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    inode.write_page(0, 9);
    cache.sync_all().unwrap();
    let guard = inode.mapping().find(0).unwrap().read();
    (1..2000).for_each(|i| assert_eq!(inode.read_page(i), 0));
    assert_eq!(common::stamp_of(&guard), 9);
    assert_eq!(inode.read_page(0), 9);
}

#[test]
fn one_frame_mapped_twice_is_counted_once_and_reclaimed_from_both() {
    let cache = quiet_cache(MIB);
    let (a, b) = (inode(&cache), inode(&cache));
    a.write_page(1, 4);
    cache.sync_all().unwrap();
    let used = cache.stats().used_bytes;
    let shared = b.mapping().insert_shared(5, &a.mapping().find(1).unwrap());
    assert_eq!((shared.frame().map_count(), cache.stats().used_bytes), (2, used));
    assert_eq!(common::stamp_of(&shared.read()), 4);
    drop(shared);
    cache.drop_clean();
    assert_eq!((a.mapping().nr_pages(), b.mapping().nr_pages()), (0, 0));
    assert_eq!(cache.stats().used_bytes, 0);

    a.read_page(1);
    b.mapping().insert_shared(5, &a.mapping().find(1).unwrap());
    let frame = a.mapping().find(1).unwrap().frame().clone();
    b.mapping().truncate(5);
    assert_eq!(frame.map_count(), 1);
    b.mapping().insert_shared(6, &a.mapping().find(1).unwrap());
    assert_eq!(frame.map_count(), 2);
    a.mapping.write().take();
    assert_eq!(frame.map_count(), 1);
    b.mapping().invalidate(0..10);
    assert_eq!(frame.map_count(), 0);
}

#[test]
fn a_page_somebody_holds_is_not_evicted() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    inode.read_page(3);
    let held = inode.mapping().find(3).unwrap();
    cache.drop_clean();
    assert!(Arc::ptr_eq(&held, &inode.mapping().find(3).unwrap()));
}

#[test]
fn frames_of_all_sizes_lie_beside_each_other() {
    let cache = quiet_cache(8 * MIB);
    let disk: Arc<dyn BlockDevice> = MemoryDevice::new(64 * MIB as u64);
    let large = BufferCache::new(&cache, disk.clone(), 16384);
    let small = BufferCache::new(&cache, disk, 1024);
    let inode = inode(&cache);
    let fill = |buffer: &Buffer, byte: u8| {
        buffer.write().fill(byte);
        buffer.set_uptodate();
    };
    for i in 0..200_u8 {
        fill(&large.getblk(u64::from(i)), i);
        fill(&small.getblk(u64::from(i)), i ^ 0xff);
        inode.write_page(u64::from(i), u64::from(i) + 1000);
    }
    for i in 0..200_u8 {
        assert!(large.find(u64::from(i)).unwrap().read().iter().all(|&b| b == i));
        assert!(small.find(u64::from(i)).unwrap().read().iter().all(|&b| b == i ^ 0xff));
        assert_eq!(inode.read_page(u64::from(i)), u64::from(i) + 1000);
    }
    assert_eq!(cache.stats().used_bytes, 200 * (16384 + 1024 + PAGE_SIZE));
}

#[test]
fn a_pinned_frame_is_not_reclaimed() {
    let cache = quiet_cache(MIB);
    let inode = inode(&cache);
    inode.read_page(3);
    let frame = inode.mapping().find(3).unwrap().frame().clone();
    frame.pin();
    cache.drop_clean();
    assert!(inode.mapping().find(3).is_some());
    frame.unpin();
    cache.drop_clean();
    assert!(inode.mapping().find(3).is_none());
}

#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, u64, Change)>>);

impl ChangeListener for Recorder {
    fn page_changed(&self, id: u64, index: u64, change: Change) {
        self.0.lock().push((id, index, change));
    }
}

#[test]
fn a_listener_is_told_what_goes_and_why() {
    let cache = quiet_cache(MIB);
    let recorder = Arc::new(Recorder::default());
    let weak: Weak<Recorder> = Arc::downgrade(&recorder);
    cache.register_listener(weak);
    let inode = inode(&cache);
    (0..3).for_each(|i| assert_eq!(inode.read_page(i), 0));
    inode.mapping().truncate(2);
    inode.mapping().invalidate(1..2);
    cache.drop_clean();
    let expect =
        [(12, 2, Change::Truncated), (12, 1, Change::Invalidated), (12, 0, Change::Evicted)];
    assert_eq!(*recorder.0.lock(), expect);
}

/// Fails every writepages before any page is touched, and counts.
struct Refuses(AtomicUsize);

impl AddressSpaceOps for Refuses {
    fn writepages(
        &self,
        mapping: &Arc<AddressSpace>,
        _wbc: &WritebackControl,
    ) -> Result<u64, WritebackError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        mapping.errseq().set(WritebackError::ReadOnly);
        Err(WritebackError::ReadOnly)
    }
}

#[test]
fn a_file_that_cannot_be_written_is_tried_again_only_after_a_while() {
    let cache = PageCache::new(CacheConfig {
        limit_bytes: MIB,
        flush_interval: Duration::from_millis(100),
        dirty_expire: Duration::ZERO,
        ..CacheConfig::default()
    });
    let ops = Arc::new(Refuses(AtomicUsize::new(0)));
    let weak: Weak<Refuses> = Arc::downgrade(&ops);
    let mapping = AddressSpace::new(&cache, 1, weak);
    let mark = mapping.errseq().sample();
    assert!(mapping.find_or_create(0).write().mark_dirty(1));
    let healthy = inode(&cache);
    let begun = std::time::Instant::now();
    while ops.0.load(Ordering::SeqCst) < 3 {
        // Wakes the flusher all the time.
        healthy.write_page(0, 1);
        (0..40).for_each(|i| healthy.write_page(i, 1));
        healthy.mapping().balance_dirty();
    }
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(mapping.errseq().check(mark), Err(WritebackError::ReadOnly));
    assert_eq!(mapping.write_and_wait(0..1), Err(WritebackError::ReadOnly));
    assert_eq!(mapping.nr_dirty(), 1);
}
