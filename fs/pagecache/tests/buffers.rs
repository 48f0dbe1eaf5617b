//! Buffers against memory devices: reading once, sharing pages, writing, errors,
//! forgetting, reclaim.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{Rng, SlowDevice, eventually, quiet_cache, seed, small_cache};
use uext_blockdev::{BlkStatus, BlockDevice, MemoryDevice};
use uext_pagecache::{Buffer, BufferCache, PAGE_SIZE};

const MIB: usize = 1 << 20;

fn buffers_of(dev: Arc<dyn BlockDevice>, block_size: u32) -> Arc<BufferCache> {
    BufferCache::new(&quiet_cache(16 * MIB), dev, block_size)
}

/// Fills a block and marks it dirty.
fn fill(buffer: &Buffer, byte: u8) {
    let mut guard = buffer.write();
    guard.fill(byte);
    buffer.mark_dirty();
}

fn on_disk(disk: &MemoryDevice, block: u64, size: usize) -> u8 {
    let data = (disk as &dyn BlockDevice).read_at(block * size as u64, size).unwrap();
    assert!(data.iter().all(|&b| b == data[0]), "a torn block");
    data[0]
}

#[test]
fn a_block_is_read_once_however_many_ask_for_it() {
    let dev = SlowDevice::new(MIB as u64, 2);
    let cache = buffers_of(dev.clone(), 4096);
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| (0..50).for_each(|block| drop(cache.bread(block).unwrap())));
        }
    });
    assert_eq!(dev.reads(), 50);
}

#[test]
fn blocks_smaller_than_a_page_share_it_and_do_not_disturb_each_other() {
    for block_size in [1024_usize, 2048] {
        let disk = MemoryDevice::new(MIB as u64);
        let page_cache = quiet_cache(16 * MIB);
        let cache = BufferCache::new(&page_cache, disk.clone(), block_size as u32);
        let per_page = PAGE_SIZE / block_size;
        let all: Vec<Buffer> = (0..4 * per_page as u64).map(|b| cache.bread(b).unwrap()).collect();
        assert_eq!(page_cache.stats().used_bytes, 4 * PAGE_SIZE);

        all.iter().for_each(|b| fill(b, 1 + b.block() as u8));
        assert!(all.iter().all(|b| b.read().iter().all(|&x| x == 1 + b.block() as u8)));
        // One of them is read again while its neighbours are dirty.
        all[1].clear_uptodate();
        assert!(cache.bread(1).unwrap().read().iter().all(|&x| x == 0));
        assert!(all[0].read().iter().all(|&x| x == 1));

        cache.write_dirty().unwrap();
        assert_eq!(on_disk(&disk, 0, block_size), 1);
        assert_eq!(on_disk(&disk, 1, block_size), 0);
        assert_eq!(on_disk(&disk, 2, block_size), 3);
    }
}

#[test]
fn a_writer_of_one_block_does_not_wait_for_its_neighbour_in_the_page() {
    let cache = buffers_of(MemoryDevice::new(MIB as u64), 1024);
    let (a, b) = (cache.bread(0).unwrap(), cache.bread(1).unwrap());
    let mut first = a.write();
    let mut second = b.write();
    first.fill(1);
    second.fill(2);
    assert!(first.iter().all(|&x| x == 1));
}

#[test]
fn blocks_of_64_kib_are_contiguous_memory() {
    let disk = MemoryDevice::new(16 * MIB as u64);
    let cache = buffers_of(disk.clone(), 65536);
    for block in 0..10 {
        fill(&cache.getblk(block), 7 + block as u8);
    }
    cache.write_dirty().unwrap();
    assert_eq!(cache.getblk(3).read().len(), 65536);
    assert_eq!(on_disk(&disk, 9, 65536), 16);
}

#[test]
fn a_failed_read_is_an_error_and_is_tried_again() {
    let dev = SlowDevice::new(MIB as u64, 1);
    let cache = buffers_of(dev.clone(), 4096);
    dev.fail_reads(true);
    assert_eq!(cache.bread(3).err(), Some(BlkStatus::IoErr));
    assert!(cache.find(3).is_none_or(|b| !b.is_uptodate()));
    dev.fail_reads(false);
    assert!(cache.bread(3).unwrap().is_uptodate());
}

#[test]
fn a_block_past_the_end_is_an_error_for_reads_and_writes() {
    let cache = buffers_of(MemoryDevice::new(MIB as u64), 4096);
    assert_eq!(cache.bread(256).err(), Some(BlkStatus::Invalid));
    assert_eq!(cache.bread(u64::MAX).err(), Some(BlkStatus::Invalid));
    let beyond = cache.getblk(u64::MAX / 4096);
    fill(&beyond, 1);
    assert_eq!(cache.write_buffers(&[beyond]), Err(BlkStatus::Invalid));
    cache.readahead(250, 1000);
    cache.readahead(u64::MAX - 3, 1000);
}

#[test]
fn a_buffer_that_was_never_filled_is_not_written() {
    let disk = MemoryDevice::new(MIB as u64);
    let cache = buffers_of(disk, 4096);
    assert_eq!(cache.write_buffers(&[cache.getblk(1)]), Err(BlkStatus::Invalid));
}

#[test]
fn adjacent_blocks_are_written_together_in_any_order_given() {
    let dev = SlowDevice::new(MIB as u64, 1);
    let cache = buffers_of(dev.clone(), 4096);
    let all: Vec<Buffer> = [5, 3, 4, 3, 20, 21, 100].map(|b| cache.getblk(b)).into();
    all.iter().for_each(|b| fill(b, b.block() as u8));
    cache.write_buffers(&all).unwrap();
    assert_eq!(dev.writes(), 3);
    assert!(
        all.iter().all(|b| !b.is_dirty() && on_disk(&dev.disk, b.block(), 4096) == b.block() as u8)
    );
    assert_eq!(cache.dirty_count(), 0);
}

#[test]
fn more_blocks_than_the_bounce_buffers_hold_are_written_all() {
    let disk = MemoryDevice::new(16 * MIB as u64);
    let cache = buffers_of(disk.clone(), 1024);
    (0..5000).for_each(|b| fill(&cache.getblk(b), b as u8));
    cache.write_dirty().unwrap();
    assert!((0..5000).all(|b| on_disk(&disk, b, 1024) == b as u8));
}

#[test]
fn a_failed_write_leaves_the_block_dirty_and_says_so() {
    let dev = SlowDevice::new(MIB as u64, 1);
    let cache = buffers_of(dev.clone(), 4096);
    let buffer = cache.getblk(9);
    fill(&buffer, 9);
    dev.fail_writes(1);
    assert_eq!(cache.write_dirty(), Err(BlkStatus::IoErr));
    assert!(buffer.is_dirty() && buffer.has_write_error());
    assert_eq!(cache.dirty_count(), 1);
    dev.fail_writes(0);
    cache.write_dirty().unwrap();
    assert!(!buffer.is_dirty() && !buffer.has_write_error());
    assert_eq!(on_disk(&dev.disk, 9, 4096), 9);
}

#[test]
fn a_change_during_a_write_does_not_wait_and_stays_dirty() {
    let dev = SlowDevice::new(MIB as u64, 1);
    let cache = buffers_of(dev.clone(), 4096);
    let buffer = cache.getblk(2);
    fill(&buffer, 1);
    std::thread::scope(|s| {
        dev.hold(|| {
            s.spawn(|| cache.write_buffers(&[cache.getblk(2)]).unwrap());
            eventually("the write is under way", || dev.in_flight() > 0);
            fill(&buffer, 2);
        });
    });
    assert!(buffer.is_dirty());
    assert_eq!(on_disk(&dev.disk, 2, 4096), 1);
    cache.write_dirty().unwrap();
    assert_eq!(on_disk(&dev.disk, 2, 4096), 2);
    dev.assert_clean();
}

#[test]
fn a_forgotten_block_is_not_written_and_its_contents_are_gone() {
    let disk = MemoryDevice::new(MIB as u64);
    let cache = buffers_of(disk.clone(), 1024);
    let held = cache.getblk(8);
    fill(&held, 5);
    fill(&cache.getblk(9), 6);
    cache.forget(8);
    cache.forget(9);
    cache.forget(10);
    assert!(!held.is_dirty() && !held.is_uptodate());
    assert!(cache.find(9).is_none(), "nobody held it");
    assert!(Arc::ptr_eq(&held, &cache.getblk(8)), "one block, one buffer");
    cache.write_buffers(&[held]).unwrap();
    cache.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 8, 1024), 0);
    assert_eq!(on_disk(&disk, 9, 1024), 0);
}

#[test]
fn a_failed_write_of_a_forgotten_block_does_not_bring_it_back() {
    let dev = SlowDevice::new(MIB as u64, 1);
    let cache = buffers_of(dev.clone(), 4096);
    fill(&cache.getblk(2), 1);
    dev.fail_writes(1);
    std::thread::scope(|s| {
        dev.hold(|| {
            let writer = s.spawn(|| cache.write_dirty());
            eventually("the write is under way", || dev.in_flight() > 0);
            cache.forget(2);
            writer
        })
        .join()
        .unwrap()
        .unwrap_err();
    });
    assert_eq!(cache.dirty_count(), 0);
}

#[test]
fn readahead_makes_later_reads_free_and_merges() {
    let dev = SlowDevice::new(4 * MIB as u64, 2);
    let cache = buffers_of(dev.clone(), 4096);
    drop(cache.bread(10).unwrap());
    cache.readahead(0, 64);
    (0..64).for_each(|b| drop(cache.bread(b).unwrap()));
    assert_eq!(dev.reads(), 3, "the block that was there splits the run in two");
}

#[test]
fn clean_buffers_are_reclaimed_and_what_is_held_dirty_or_journalled_stays() {
    let page_cache = quiet_cache(MIB);
    let cache = BufferCache::new(&page_cache, MemoryDevice::new(64 * MIB as u64), 4096);
    cache.set_flusher(false);
    let held = cache.bread(0).unwrap();
    fill(&cache.getblk(1), 1);
    cache.bread(2).unwrap().journal().checkpoint = Some(7);
    for block in 3..5000 {
        drop(cache.bread(block).unwrap());
    }
    let stats = page_cache.stats();
    assert!(stats.used_bytes <= MIB, "{stats:?}");
    assert!(stats.slab_bytes <= MIB + 2 * 256 * 1024, "{stats:?}");
    assert_eq!(stats.over_limit, 0);
    assert!(Arc::ptr_eq(&held, &cache.find(0).unwrap()));
    assert!(cache.find(1).unwrap().is_dirty());
    assert_eq!(cache.find(2).unwrap().journal().checkpoint, Some(7));
    assert!(cache.find(3).is_none());
}

#[test]
fn blocks_used_again_and_again_survive_a_stream() {
    let page_cache = quiet_cache(MIB);
    let cache = BufferCache::new(&page_cache, MemoryDevice::new(64 * MIB as u64), 4096);
    let hot = |cache: &BufferCache| (0..64).for_each(|b| drop(cache.bread(b).unwrap()));
    hot(&cache);
    let mut kept = 0;
    for block in 1000..9000 {
        drop(cache.bread(block).unwrap());
        if block % 100 == 0 {
            kept += (0..64).filter(|&b| cache.find(b).is_some()).count();
            hot(&cache);
        }
    }
    assert!(kept > 64 * 75, "only {kept} of {} times a hot block was there", 64 * 80);
}

#[test]
fn the_flusher_writes_dirty_buffers_but_not_those_of_the_journal() {
    let disk = MemoryDevice::new(MIB as u64);
    let cache = BufferCache::new(&small_cache(16 * MIB), disk.clone(), 4096);
    let journalled = cache.getblk(2);
    journalled.journal().running = Some(1);
    fill(&journalled, 9);
    let free = cache.getblk(1);
    fill(&free, 8);
    eventually("the flusher has written", || !free.is_dirty());
    assert_eq!(on_disk(&disk, 1, 4096), 8);
    assert!(journalled.is_dirty());
    assert_eq!(on_disk(&disk, 2, 4096), 0);
}

#[test]
fn any_sequence_of_operations_agrees_with_a_model() {
    let seed = seed(1);
    for round in 0..20 {
        model_round(&mut Rng::new(seed + round), [1024, 2048, 4096, 16384][round as usize % 4]);
    }
}

/// What a block should hold, in the cache's view and on the disk.
#[derive(Clone, Copy, Default)]
struct Model {
    now: u8,
    disk: u8,
}

fn model_round(rng: &mut Rng, block_size: u32) {
    const BLOCKS: u64 = 600;
    let disk = MemoryDevice::new(BLOCKS * u64::from(block_size));
    let page_cache = quiet_cache(256 * 1024);
    let cache = BufferCache::new(&page_cache, disk.clone(), block_size);
    cache.set_flusher(false);
    let mut model: HashMap<u64, Model> = HashMap::new();
    for _ in 0..3000 {
        let block = rng.below(BLOCKS);
        let entry = model.entry(block).or_default();
        match rng.below(20) {
            0..8 => assert!(cache.bread(block).unwrap().read().iter().all(|&b| b == entry.now)),
            8..12 => {
                entry.now = rng.below(256) as u8;
                fill(&cache.getblk(block), entry.now);
            }
            12..14 => {
                let buffer = cache.bread(block).unwrap();
                cache.write_buffers(&[buffer]).unwrap();
                entry.disk = entry.now;
            }
            14 => {
                cache.forget(block);
                entry.now = entry.disk;
            }
            15 => cache.readahead(block, rng.below(30) as u32),
            16 => cache.drop_clean(),
            17 => page_cache.drop_clean(),
            _ => {
                cache.write_dirty().unwrap();
                model.values_mut().for_each(|m| m.disk = m.now);
            }
        }
    }
    cache.write_dirty().unwrap();
    for (block, entry) in model {
        assert_eq!(on_disk(&disk, block, block_size as usize), entry.now);
    }
}

#[test]
fn writers_syncers_and_reclaim_together_lose_nothing() {
    let seed = seed(3);
    const BLOCKS: u64 = 512;
    let dev = SlowDevice::new(BLOCKS * 1024, 3);
    dev.fail_writes(10);
    let page_cache = small_cache(256 * 1024);
    let cache = BufferCache::new(&page_cache, dev.clone(), 1024);
    std::thread::scope(|s| {
        for writer in 0..3 {
            let (cache, mut rng) = (&cache, Rng::new(seed + writer));
            s.spawn(move || {
                for _ in 0..4000 {
                    // Each writer has its own blocks, so that it knows what they hold.
                    let block = rng.below(BLOCKS / 3) * 3 + writer;
                    let buffer = cache.bread(block).unwrap();
                    let mut guard = buffer.write();
                    let next = guard[0].wrapping_add(1);
                    assert!(guard.iter().all(|&b| b == guard[0]), "a torn block");
                    guard.fill(next);
                    buffer.mark_dirty();
                    drop(guard);
                    if rng.below(30) == 0 {
                        let _ = cache.write_buffers(&[buffer]);
                    }
                }
            });
        }
        s.spawn(|| (0..50).for_each(|_| cache.write_dirty().unwrap_or(())));
        s.spawn(|| {
            let mut rng = Rng::new(seed + 100);
            for _ in 0..3000 {
                cache.readahead(rng.below(BLOCKS), 40);
                cache.drop_clean();
            }
        });
    });
    let expect: Vec<u8> = (0..BLOCKS).map(|b| cache.bread(b).unwrap().read()[0]).collect();
    dev.fail_writes(0);
    while cache.dirty_count() > 0 {
        cache.write_dirty().unwrap();
    }
    dev.assert_clean();
    assert!((0..BLOCKS).all(|b| on_disk(&dev.disk, b, 1024) == expect[b as usize]));
    let total: u64 = expect.iter().map(|&b| u64::from(b)).sum();
    assert_eq!(total % 256, 12_000 % 256, "increments were lost");
}
