//! One frame in two files: the reverse map against reclaim, truncate and invalidate.
//!
//! What is checked: a page that is read under a guard holds what belongs there, though
//! frames are freed and used again for something else all the time; nothing maps a frame
//! that is free; no frame is left behind.

use std::sync::{Arc, Weak};

use uext_blockdev::dm::ModelDisk;
use uext_sync::explore::{below, explore};
use uext_sync::thread;

use super::{cache, number, put_number};
use crate::{
    AddressSpace, AddressSpaceOps, BufferCache, PageCache, WritebackControl, WritebackError,
};

/// What the shared page holds.
const SHARED: u64 = 7;

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

struct Model {
    cache: Arc<PageCache>,
    files: [Arc<AddressSpace>; 2],
    ops: Arc<Nothing>,
}

fn space(cache: &Arc<PageCache>, id: u64, ops: &Arc<Nothing>) -> Arc<AddressSpace> {
    let weak: Weak<dyn AddressSpaceOps> = {
        let weak: Weak<Nothing> = Arc::downgrade(ops);
        weak
    };
    AddressSpace::new(cache, id, weak)
}

impl Model {
    fn new() -> Arc<Self> {
        let (cache, ops) = (cache(), Arc::new(Nothing));
        let files = [space(&cache, 1, &ops), space(&cache, 2, &ops)];
        Arc::new(Self { cache, files, ops })
    }

    /// Reads page 0 of a file: it is the other's when that has it, or read again.
    fn read(&self, which: usize) {
        let (file, other) = (&self.files[which], &self.files[1 - which]);
        let folio = match (file.find(0), other.find(0)) {
            (Some(folio), _) => folio,
            (None, Some(theirs)) => file.insert_shared(0, &theirs),
            (None, None) => file.find_or_create(0),
        };
        if !folio.is_uptodate() {
            let mut guard = folio.write();
            if !guard.is_uptodate() {
                put_number(&mut guard, SHARED);
                guard.set_uptodate();
            }
        }
        let guard = folio.read();
        assert_eq!(number(&guard), SHARED, "a page holds what belongs to another");
    }

    /// Uses frames that were freed for something else.
    fn reuse(&self) {
        let other = space(&self.cache, 3, &self.ops);
        for index in 0..2 {
            let folio = other.find_or_create(index);
            assert_eq!(folio.frame().map_count(), 1, "a frame has mappings of its last owner");
            let mut guard = folio.write();
            put_number(&mut guard, 1000 + index);
            thread::yield_now();
            assert_eq!(number(&guard), 1000 + index, "a frame has two owners");
        }
    }
}

type Part = fn(&Model);

fn run(parts: &[Part]) {
    let model = Model::new();
    let threads: Vec<_> = parts
        .iter()
        .map(|&part| {
            let model = model.clone();
            thread::spawn(move || part(&model))
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    for file in &model.files {
        if let Some(folio) = file.find(0) {
            let others = model.files.iter().filter(|f| f.has_pages(0..1)).count();
            let count = folio.frame().map_count();
            assert!((1..=others).contains(&count), "{count} mappings of a frame in {others} files");
        }
    }
    model.cache.drop_clean();
    model.files.iter().for_each(|file| {
        file.truncate(0);
    });
    assert_eq!(model.cache.stats().used_bytes, 0, "a frame was leaked");
}

fn reader(model: &Model) {
    (0..3).for_each(|_| model.read(below(2) as usize));
}

fn reclaimer(model: &Model) {
    (0..3).for_each(|_| model.cache.drop_clean());
}

fn truncater(model: &Model) {
    model.files[0].truncate(0);
}

fn invalidator(model: &Model) {
    model.files[1].invalidate(0..1);
}

#[test]
fn model_a_shared_frame_against_reclaim_and_truncate() {
    explore("shared frame", 5000, || {
        run(&[reader, reader, reclaimer, truncater, invalidator, Model::reuse]);
    });
}

#[test]
fn model_a_file_goes_while_reclaim_holds_its_mapping() {
    explore("shared frame, file goes", 2000, || {
        let model = Model::new();
        let (gone, kept) = (space(&model.cache, 9, &model.ops), &model.files[0]);
        gone.find_or_create(0);
        let shared = kept.insert_shared(0, &gone.find_or_create(1));
        let disk = ModelDisk::quiet(vec![0; 4096]);
        let blocks = BufferCache::new(&model.cache, disk, 1024);
        blocks.bread(0).unwrap();
        let reclaim = model.clone();
        let threads = [
            thread::spawn(move || reclaim.cache.drop_clean()),
            thread::spawn(move || drop(gone)),
            thread::spawn(move || drop(blocks)),
        ];
        model.reuse();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        model.reuse();
        assert_eq!(shared.frame().map_count(), 1, "a file that is gone maps a frame");
        drop(shared);
        kept.truncate(0);
        assert_eq!(model.cache.stats().used_bytes, 0, "a frame was leaked");
    });
}
