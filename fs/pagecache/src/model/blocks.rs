//! Blocks of a device: look-up, change, writeback, forget, readahead and reclaim at once.
//!
//! What is checked: a reader sees a block's newest contents; the disk never has two
//! writes of a block under way (the model's disk looks); what was forgotten and used
//! again is not overwritten by its past; in the end everything is on the disk, and no
//! frame is left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use uext_blockdev::dm::ModelDisk;
use uext_sync::explore::{below, explore};
use uext_sync::{Mutex, thread};

use super::{cache, number, put_number};
use crate::{BufferCache, PageCache};

const SIZE: usize = 1024;
/// Blocks, so that two pages are shared by several.
const BLOCKS: u64 = 6;
/// The one that is freed and used again.
const FREED: u64 = 1;

struct Model {
    disk: Arc<ModelDisk>,
    cache: Arc<PageCache>,
    buffers: Arc<BufferCache>,
    /// The newest contents, under the block's exclusive guard.
    newest: [AtomicU64; BLOCKS as usize],
    versions: AtomicU64,
    /// Whoever uses the block that is freed has this, as a bitmap's owner would.
    owner: Mutex<()>,
}

impl Model {
    fn new() -> Arc<Self> {
        let disk = ModelDisk::new(vec![0; BLOCKS as usize * SIZE]);
        let cache = cache();
        let buffers = BufferCache::new(&cache, disk.clone(), SIZE as u32);
        Arc::new(Self {
            disk,
            cache,
            buffers,
            newest: Default::default(),
            versions: AtomicU64::new(0),
            owner: Mutex::new(()),
        })
    }

    fn newest(&self, block: u64) -> &AtomicU64 {
        &self.newest[block as usize]
    }

    fn fill(&self, block: u64, bytes: &mut [u8]) {
        let version = self.versions.fetch_add(1, SeqCst) + 1;
        put_number(bytes, version);
        self.newest(block).store(version, SeqCst);
    }

    fn change(&self, block: u64) {
        let buffer = self.buffers.bread(block).unwrap();
        let mut guard = buffer.write();
        self.fill(block, &mut guard);
        buffer.mark_dirty();
    }

    fn read(&self, block: u64) {
        let buffer = self.buffers.bread(block).unwrap();
        let guard = buffer.read();
        assert_eq!(number(&guard), self.newest(block).load(SeqCst), "block {block} is not newest");
    }

    /// Frees the block and makes another of it.
    fn free_and_use(&self) {
        let _owner = self.owner.lock();
        self.buffers.forget(FREED);
        let buffer = self.buffers.getblk(FREED);
        let mut guard = buffer.write();
        guard.fill(0);
        self.fill(FREED, &mut guard);
        buffer.mark_dirty();
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
    model.buffers.write_dirty().unwrap();
    assert_eq!((model.buffers.dirty_count(), model.cache.stats().dirty_buffer_bytes), (0, 0));
    for block in 0..BLOCKS {
        let at = block as usize * SIZE;
        let disk = number(&model.disk.bytes(at..at + SIZE));
        assert_eq!(disk, model.newest(block).load(SeqCst), "block {block} was lost");
    }
    model.buffers.drop_clean();
    assert_eq!(model.cache.stats().used_bytes, 0, "a frame was leaked");
}

fn other_block() -> u64 {
    let block = below(BLOCKS - 1);
    if block >= FREED { block + 1 } else { block }
}

fn changer(model: &Model) {
    (0..3).for_each(|_| model.change(other_block()));
}

fn reader(model: &Model) {
    (0..3).for_each(|_| model.read(other_block()));
}

fn flusher(model: &Model) {
    (0..2).for_each(|_| model.buffers.write_dirty().unwrap());
}

fn reclaimer(model: &Model) {
    model.cache.drop_clean();
    model.buffers.drop_clean();
}

fn ahead(model: &Model) {
    model.buffers.readahead(2, 4);
}

fn freer(model: &Model) {
    (0..2).for_each(|_| model.free_and_use());
}

#[test]
fn model_lookup_reclaim_and_write() {
    explore("blocks", 1500, || run(&[changer, changer, reader, flusher, reclaimer, ahead]));
}

#[test]
fn model_a_block_that_is_freed_and_used_again() {
    explore("blocks, forget", 1500, || run(&[freer, freer, changer, flusher, flusher, reclaimer]));
}
