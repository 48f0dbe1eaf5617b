//! More freed blocks than a small log can revoke at once: handles wait for a commit, and the
//! journal is not aborted.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use uext_jbd2::{Journal, JournalConfig};
use uext_pagecache::{BufferCache, CacheConfig, PageCache};

#[test]
fn revokes_of_many_handles_at_once_fit_the_log() {
    if !have_e2fsprogs() {
        return;
    }
    let dir = scratch();
    let image = mkfs(dir.path(), &["-b", "1024", "-J", "size=1"], "8192");
    let device = memory(&image);
    let geometry = geometry(&device.snapshot());
    let map = journal_map(&image);
    let cache = PageCache::new(CacheConfig::default());
    let buffers = BufferCache::new(&cache, device.clone(), 1024);
    let config = JournalConfig {
        background: false,
        csum_v3: geometry.csum,
        wide: geometry.wide,
        ..JournalConfig::default()
    };
    let journal = Journal::open(device, map, geometry.uuid, buffers, config).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let journal = &journal;
            scope.spawn(move || {
                for round in 0..150u64 {
                    // Three blocks of records, as a step of a truncation asks for.
                    let handle = journal.start(4).unwrap();
                    for at in 0..360 {
                        handle.revoke(1_000_000 + (round * 4 + thread) * 1000 + at);
                    }
                }
            });
        }
    });
    journal.commit_all().unwrap();
    assert_eq!(journal.aborted(), None);
}
