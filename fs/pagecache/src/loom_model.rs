//! The page cache's words under loom: every interleaving of two or three threads within
//! a bound of preemptions, and every value the memory model lets a load see.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p uext-pagecache --lib loom` (own target
//! directory), or `make models`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::{Arc, Weak};

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use loom::thread;

use crate::errseq::{ErrSeq, WritebackError};
use crate::{AddressSpace, AddressSpaceOps, CacheConfig, PageCache, WritebackControl};

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let long = std::env::var_os("UEXT_MODEL_FACTOR").is_some();
    builder.preemption_bound = Some(preemptions + usize::from(long));
    builder.max_branches = 20_000;
    builder.check(model);
}

#[test]
fn loom_errseq_who_sees_the_count_sees_the_error() {
    check(4, || {
        let seq = Arc::new(ErrSeq::default());
        let before = seq.count();
        let writer = seq.clone();
        let thread = thread::spawn(move || writer.set(WritebackError::NoSpace));
        if seq.count() != before {
            assert_eq!(seq.since_count(before), Err(WritebackError::NoSpace));
        }
        thread.join().unwrap();
        assert_eq!(seq.since_count(before), Err(WritebackError::NoSpace));
    });
}

#[test]
fn loom_errseq_each_file_is_told_of_an_error_after_its_mark() {
    check(4, || {
        let seq = Arc::new(ErrSeq::default());
        let mut mark = seq.sample();
        let threads = [1, 2].map(|n| {
            let seq = seq.clone();
            thread::spawn(move || {
                seq.set(if n == 1 { WritebackError::Io } else { WritebackError::NoSpace });
            })
        });
        let early = seq.check_and_advance(&mut mark);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let late = seq.check_and_advance(&mut mark);
        assert!(early.is_err() || late.is_err(), "an error was swallowed");
        assert_eq!(seq.check_and_advance(&mut mark), Ok(()), "an error was told twice");
    });
}

#[test]
fn loom_errseq_two_who_report_at_once_are_both_told() {
    check(4, || {
        let seq = Arc::new(ErrSeq::default());
        let mut marks = [seq.sample(), seq.sample()];
        seq.set(WritebackError::Io);
        let other = seq.clone();
        let mut theirs = marks[1];
        let thread = thread::spawn(move || other.check_and_advance(&mut theirs));
        assert_eq!(seq.check_and_advance(&mut marks[0]), Err(WritebackError::Io));
        assert_eq!(thread.join().unwrap(), Err(WritebackError::Io));
    });
}

/// Reclaim's question whether it holds the only reference: std's count by hand, since loom
/// does not see std's and its own orders more. (Eviction as a whole is shuttle's.)
#[test]
fn loom_the_last_reference_shows_what_the_others_did() {
    check(4, || {
        let count = Arc::new(AtomicUsize::new(2));
        let dirty = Arc::new(AtomicBool::new(false));
        let (theirs, their_dirty) = (count.clone(), dirty.clone());
        let thread = thread::spawn(move || {
            their_dirty.store(true, Ordering::Relaxed);
            // As the drop of an `Arc`.
            theirs.fetch_sub(1, Ordering::Release);
        });
        if count.load(Ordering::Relaxed) == 1 {
            // As `AddressSpace::try_evict` and `buffer_cache::is_unused`.
            fence(Ordering::Acquire);
            assert!(dirty.load(Ordering::Relaxed), "a dirty page would be dropped");
        }
        thread.join().unwrap();
    });
}

struct Nothing;

impl AddressSpaceOps for Nothing {
    fn writepages(
        &self,
        _mapping: &Arc<AddressSpace>,
        _wbc: &WritebackControl,
    ) -> Result<u64, WritebackError> {
        Ok(0)
    }
}

fn one_page() -> (Arc<PageCache>, Arc<AddressSpace>, Arc<Nothing>) {
    let cache = PageCache::new(CacheConfig { limit_bytes: 0, ..CacheConfig::default() });
    let ops = Arc::new(Nothing);
    let weak: Weak<dyn AddressSpaceOps> = {
        let weak: Weak<Nothing> = Arc::downgrade(&ops);
        weak
    };
    let mapping = AddressSpace::new(&cache, 1, weak);
    let folio = mapping.find_or_create(0);
    let mut guard = folio.write();
    guard[0] = 1;
    guard.set_uptodate();
    assert!(guard.mark_dirty(1));
    drop(guard);
    (cache, mapping, ops)
}

#[test]
fn loom_a_write_during_writeback_makes_the_page_dirty_again() {
    check(2, || {
        let (_cache, mapping, _ops) = one_page();
        let theirs = mapping.clone();
        let thread = thread::spawn(move || {
            let folio = theirs.find(0).expect("nobody drops it");
            let mut guard = folio.write();
            guard[0] = 2;
            assert!(guard.mark_dirty(1), "nobody detaches it");
        });
        let folio = mapping.find(0).expect("nobody drops it");
        let guard = folio.begin_writeback();
        assert_eq!(guard.dirty(), 1);
        let disk = guard[0];
        guard.complete(Ok(()));
        thread.join().unwrap();
        assert_eq!(folio.is_dirty(), disk == 1, "newer contents and nobody will write them");
        assert_eq!(mapping.nr_dirty(), usize::from(disk == 1));
    });
}

#[test]
fn loom_truncate_waits_for_writeback_and_leaves_nothing_dirty() {
    check(2, || {
        let (cache, mapping, _ops) = one_page();
        let theirs = mapping.clone();
        let thread = thread::spawn(move || {
            let Some(folio) = theirs.find(0) else { return };
            let guard = folio.begin_writeback();
            if guard.dirty() != 0 {
                guard.complete(Err(WritebackError::Io));
            }
        });
        mapping.truncate(0);
        assert_eq!((mapping.nr_dirty(), mapping.has_dirty()), (0, false));
        thread.join().unwrap();
        assert!(!mapping.has_dirty());
        assert_eq!(cache.stats().used_bytes, 0, "a frame was leaked");
    });
}
