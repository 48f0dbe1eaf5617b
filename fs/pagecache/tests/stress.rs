//! Writers, readers, truncates, syncs, the flusher and reclaim, all at once on a cache
//! that is far too small and a disk whose freed blocks are soon another file's: a late
//! write, a lost dirty page or a page freed twice shows as a wrong number somewhere.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{Allocator, Inode, Rng, SlowDevice, seed, small_cache};
use uext_pagecache::PAGE_SIZE;
use uext_sync::Mutex;

const FILES: u64 = 4;
const PAGES: u64 = 200;

struct File {
    inode: Arc<Inode>,
    /// What each page holds.
    model: Mutex<HashMap<u64, u64>>,
}

impl File {
    fn step(&self, rng: &mut Rng, stamp: u64) {
        let index = rng.below(PAGES);
        match rng.below(100) {
            0..45 => {
                let _lock = self.inode.lock.write();
                self.inode.write_page(index, stamp);
                self.model.lock().insert(index, stamp);
            }
            45..85 => {
                let _lock = self.inode.lock.read();
                let found = self.inode.read_page(index);
                let expect = self.model.lock().get(&index).copied().unwrap_or(0);
                assert_eq!(found, expect, "page {index}");
            }
            85..88 => {
                let _lock = self.inode.lock.write();
                self.inode.truncate(index);
                self.model.lock().retain(|&i, _| i < index);
            }
            88..91 => {
                // Sync without the inode's lock, as fsync does; errors are part of the game.
                let _ = self.inode.mapping().write_and_wait(index..index + 50);
            }
            91..93 => {
                self.inode.mapping().invalidate(index..index + 20);
            }
            _ => self.inode.mapping().balance_dirty(),
        }
    }
}

fn run(seed: u64, limit_bytes: usize, fail_one_in: u64, steps: u64) {
    let cache = small_cache(limit_bytes);
    let blocks = FILES * PAGES * 2;
    let dev = SlowDevice::new(blocks * PAGE_SIZE as u64, 3);
    dev.fail_writes(fail_one_in);
    let allocator = Allocator::new(blocks);
    let files: Vec<File> = (0..FILES)
        .map(|id| File {
            inode: Inode::new(&cache, id, dev.clone(), allocator.clone()),
            model: Mutex::default(),
        })
        .collect();
    std::thread::scope(|s| {
        for thread in 0..4 {
            let (files, mut rng) = (&files, Rng::new(seed * 31 + thread));
            s.spawn(move || {
                for step in 0..steps {
                    let file = &files[rng.below(FILES) as usize];
                    file.step(&mut rng, (step << 8 | thread) + 1);
                }
            });
        }
    });
    dev.fail_writes(0);
    // A write that failed just before may still be told of once.
    let _ = cache.sync_all();
    cache.sync_all().unwrap();
    dev.assert_clean();
    let stats = cache.stats();
    assert_eq!((stats.dirty_pages, stats.writeback_pages, stats.failed_pages), (0, 0, 0));
    for file in &files {
        let model = file.model.lock();
        assert!((0..PAGES).all(|i| file.inode.disk_page(i) == model.get(&i).copied().unwrap_or(0)));
    }
    files.iter().for_each(|f| f.inode.mapping().truncate(0).eq(&0).then_some(()).unwrap());
    assert_eq!(cache.stats().used_bytes, 0, "a frame leaked");
}

#[test]
fn everything_at_once_loses_nothing() {
    run(seed(11), 256 * 1024, 0, 6000);
}

#[test]
fn everything_at_once_with_failing_writes_loses_nothing() {
    run(seed(12), 1 << 20, 20, 4000);
}
