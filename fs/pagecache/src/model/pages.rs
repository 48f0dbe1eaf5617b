//! Pages of a file: writers, readers, the flusher, fsync, truncate, invalidate and
//! reclaim at once.
//!
//! What is checked: a reader sees the newest contents, whatever was evicted or written
//! meanwhile; what is written to the disk does not change while it is being written, and
//! only one write of a page is under way; after fsync the disk has what was written
//! before it; nothing of a truncated page reaches the disk after truncate has returned;
//! in the end everything is on the disk, and no page or frame is left behind.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use uext_sync::explore::{below, explore};
use uext_sync::{RwLock, thread};

use super::{cache, number, put_number};
use crate::{
    AddressSpace, AddressSpaceOps, Folio, PageCache, WritebackControl, WritebackError,
    WritebackReason,
};

const PAGES: u64 = 3;

/// One page's place on the disk.
#[derive(Default)]
struct Place {
    /// The newest contents, under the page's exclusive guard.
    newest: AtomicU64,
    /// What the disk has.
    disk: AtomicU64,
    /// A write is under way.
    busy: AtomicBool,
    /// Contents up to this one were cut off: the disk must not get them any more.
    cut_off: AtomicU64,
}

/// A file on a disk of numbers. Its atomics are std's: they watch and never decide.
struct File {
    places: [Place; PAGES as usize],
    versions: AtomicU64,
    /// Truncates that have begun and that have ended; odd while one is under way.
    cuts: AtomicU64,
    /// Devices that end a write later.
    devices: Mutex<Vec<thread::JoinHandle<()>>>,
    /// Excludes writers from truncate, as an inode's lock does.
    inode: RwLock<()>,
    /// Every third write of the disk fails.
    failing: bool,
    writes: AtomicU64,
}

impl File {
    fn place(&self, index: u64) -> &Place {
        &self.places[index as usize]
    }

    /// A write that a device does now or later: `dirty` pages only.
    fn write(&self, guard: crate::WritebackGuard) {
        let place = self.place(guard.folio().index());
        assert!(!place.busy.swap(true, SeqCst), "two writes of one page are under way");
        let begun = number(&guard);
        thread::yield_now();
        assert_eq!(number(&guard), begun, "contents changed under the device");
        assert!(begun > place.cut_off.load(SeqCst), "a truncated page reached the disk");
        place.busy.store(false, SeqCst);
        let nth = self.writes.fetch_add(1, SeqCst);
        if self.failing && nth % 3 == 2 {
            return guard.complete(Err(WritebackError::Io));
        }
        let before = place.disk.swap(begun, SeqCst);
        assert!(before <= begun, "older contents overtook newer ones");
        guard.complete(Ok(()));
    }
}

struct Ops(Arc<File>);

impl AddressSpaceOps for Ops {
    fn writepages(
        &self,
        mapping: &Arc<AddressSpace>,
        wbc: &WritebackControl,
    ) -> Result<u64, WritebackError> {
        let mut begun = 0;
        for folio in mapping.dirty_folios(wbc.range.clone(), PAGES as usize) {
            let guard = folio.begin_writeback();
            if guard.dirty() == 0 {
                continue;
            }
            begun += 1;
            match below(4) {
                // Given up: dirty again, without an error. Not where somebody waits.
                0 if !wbc.sync => drop(guard),
                1 => self.0.write(guard),
                _ => {
                    // The device ends it later.
                    let file = self.0.clone();
                    let device = thread::spawn(move || file.write(guard));
                    self.0.devices.lock().unwrap().push(device);
                }
            }
        }
        if wbc.sync {
            mapping.wait_writeback(wbc.range.clone());
        }
        Ok(begun)
    }
}

struct Model {
    cache: Arc<PageCache>,
    file: Arc<File>,
    mapping: Arc<AddressSpace>,
    /// Keeps the operations alive.
    _ops: Arc<Ops>,
}

impl Model {
    fn new(failing: bool) -> Arc<Self> {
        let cache = cache();
        let file = Arc::new(File {
            places: Default::default(),
            versions: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            devices: Mutex::default(),
            inode: RwLock::new(()),
            failing,
            writes: AtomicU64::new(0),
        });
        let ops = Arc::new(Ops(file.clone()));
        let weak: Weak<dyn AddressSpaceOps> = {
            let weak: Weak<Ops> = Arc::downgrade(&ops);
            weak
        };
        let mapping = AddressSpace::new(&cache, 1, weak);
        Arc::new(Self { cache, file, mapping, _ops: ops })
    }

    fn page(&self, index: u64) -> Arc<Folio> {
        self.mapping.find_or_create(index)
    }

    fn write(&self, index: u64) {
        let _inode = self.file.inode.read();
        loop {
            let folio = self.page(index);
            let mut guard = folio.write();
            let version = self.file.versions.fetch_add(1, SeqCst) + 1;
            put_number(&mut guard, version);
            guard.set_uptodate();
            // Reclaim may have taken it between the look-up and the guard.
            if guard.mark_dirty(1) {
                self.file.place(index).newest.store(version, SeqCst);
                return;
            }
        }
    }

    fn read(&self, index: u64) {
        let place = self.file.place(index);
        let folio = self.page(index);
        if !folio.is_uptodate() {
            let mut guard = folio.write();
            if !folio.is_attached() {
                return;
            }
            if !guard.is_uptodate() {
                thread::yield_now();
                let disk = place.disk.load(SeqCst);
                put_number(&mut guard, disk);
                guard.set_uptodate();
            }
        }
        let guard = folio.read();
        if folio.is_attached() && folio.is_uptodate() {
            let newest = place.newest.load(SeqCst);
            assert_eq!(number(&guard), newest, "page {index} is not the newest");
        }
    }

    fn fsync(&self) {
        let cuts = self.file.cuts.load(SeqCst);
        let before: Vec<u64> = self.file.places.iter().map(|p| p.newest.load(SeqCst)).collect();
        let result = self.mapping.write_and_wait(0..u64::MAX);
        if result.is_err() || cuts % 2 == 1 || self.file.cuts.load(SeqCst) != cuts {
            return;
        }
        for (place, before) in self.file.places.iter().zip(before) {
            let disk = place.disk.load(SeqCst);
            assert!(disk >= before, "fsync said Ok and a page is not on the disk");
        }
    }

    fn truncate(&self, to: u64) {
        let _inode = self.file.inode.write();
        self.file.cuts.fetch_add(1, SeqCst);
        // No writer, so these are the last of what goes.
        let newest = self.file.versions.load(SeqCst);
        self.mapping.truncate(to);
        for place in &self.file.places[to as usize..] {
            assert!(!place.busy.load(SeqCst), "truncate returned before a write ended");
            place.cut_off.store(newest, SeqCst);
            place.disk.store(0, SeqCst);
            place.newest.store(0, SeqCst);
        }
        self.file.cuts.fetch_add(1, SeqCst);
    }

    fn finish(self: Arc<Self>, failing: bool) {
        for _ in 0..20 {
            if self.cache.sync_all().is_ok() && !self.mapping.has_dirty() {
                break;
            }
        }
        assert!(!self.mapping.has_dirty());
        let devices = std::mem::take(&mut *self.file.devices.lock().unwrap());
        devices.into_iter().for_each(|device| device.join().unwrap());
        for (index, place) in self.file.places.iter().enumerate() {
            let (disk, newest) = (place.disk.load(SeqCst), place.newest.load(SeqCst));
            assert_eq!(disk, newest, "page {index} was lost (failing disk: {failing})");
        }
        let stats = self.cache.stats();
        assert_eq!((stats.dirty_pages, stats.writeback_pages, stats.failed_pages), (0, 0, 0));
        self.mapping.truncate(0);
        assert_eq!(self.cache.stats().used_bytes, 0, "a frame was leaked");
    }
}

type Part = fn(&Model);

fn run(failing: bool, parts: &[Part]) {
    let model = Model::new(failing);
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
    model.finish(failing);
}

fn writer(model: &Model) {
    (0..3).for_each(|_| model.write(below(PAGES)));
}

fn reader(model: &Model) {
    (0..3).for_each(|_| model.read(below(PAGES)));
}

fn flusher(model: &Model) {
    for _ in 0..2 {
        model.cache.write_old(WritebackReason::Memory);
    }
}

fn fsyncer(model: &Model) {
    model.fsync();
}

fn reclaimer(model: &Model) {
    (0..2).for_each(|_| model.cache.drop_clean());
}

fn invalidator(model: &Model) {
    model.mapping.invalidate(0..PAGES);
}

fn truncater(model: &Model) {
    model.truncate(1);
}

#[test]
fn model_writers_flusher_fsync_and_reclaim() {
    explore("pages, writeback", 5000, || {
        run(false, &[writer, writer, reader, flusher, fsyncer, reclaimer]);
    });
}

#[test]
fn model_flusher_against_truncate() {
    explore("pages, truncate", 5000, || {
        run(false, &[writer, truncater, flusher, fsyncer, truncater]);
    });
}

#[test]
fn model_pages_come_and_go() {
    explore("pages, invalidate", 3000, || {
        run(false, &[writer, reader, reader, invalidator, reclaimer, flusher]);
    });
}

#[test]
fn model_a_failing_disk_loses_no_page() {
    explore("pages, failing disk", 4000, || {
        run(true, &[writer, writer, flusher, fsyncer, reclaimer]);
    });
}
