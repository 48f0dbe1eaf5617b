//! Frames: aligned, counted pages of memory, allocated in slabs.
//!
//! A frame is one to sixteen contiguous pages of a 256 KiB slab. It is divided
//! into equal *pieces* (a data page is one piece; four 1 KiB blocks are four),
//! and each piece has its own reader-writer lock.
//!
//! Invariants:
//! - Pages of a slab belong to at most one live [`Frame`]; the slab lives while
//!   any of its frames does.
//! - Bytes of a piece are reached only through a guard of that piece's lock, or by
//!   a device under the I/O rule of `uext_blockdev::bio`, whose submitter holds such
//!   a guard until `end_io`: shared for a write to disk, exclusive for a read.
//! - Memory is initialised from the start, so a stale frame is a leak, never
//!   undefined.
//!
//! Locks: piece locks may be held across I/O and released by another thread;
//! parking_lot's raw lock allows that as long as its `deadlock_detection`
//! feature is off, which the `send_guard` feature makes a compile error.
//! Shared locking is recursive: a reader never queues behind a waiting writer, so
//! a thread may read what it already reads. The pool's mutex is a leaf.
//!
//! The only unsafe code of the crate is in this file.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use uext_blockdev::{AlignedBuf, BioVec, IoBuffer};
use uext_sync::Mutex;
use uext_sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use uext_sync::raw::*;

use crate::rmap::{Mapping, Rmap};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// Pages in a slab, one bit each in its bitmaps.
const SLAB_PAGES: usize = 64;
/// Pieces a frame may have: 1 KiB blocks in a page.
const MAX_PIECES: usize = 4;
/// Most times a use of a frame saves it from the clock.
const MAX_USAGE: u8 = 2;
/// How many slabs with room are looked at for a frame of many pages.
const RUN_SEARCH: usize = 64;

/// What reclaim knows of a page: only the first page of a frame uses it.
#[derive(Default)]
struct Slot {
    /// Rounds of the clock the frame survives. WHY-RELAXED: a lost update costs or saves one.
    usage: AtomicU8,
    /// Reclaim keeps away while it is not zero. WHY-RELAXED: who pins holds the page, so
    /// that its eviction fails anyway; what is pinned then stays.
    pins: AtomicU32,
    /// Who maps the frame.
    rmap: Mutex<Rmap>,
}

/// 64 pages of memory.
pub(crate) struct Slab {
    memory: AlignedBuf,
    id: usize,
    /// Pages in use. [pool mutex for changes; reclaim only peeks]
    /// WHY-RELAXED: changes are ordered by the mutex; a peek that is late finds a frame too
    /// few or one that has no mapping.
    used: AtomicU64,
    /// First pages of frames. [as `used`] WHY-RELAXED: as `used`.
    heads: AtomicU64,
    /// Whether the pool's `partial` list has it. [pool mutex] WHY-RELAXED: the mutex orders it.
    listed: AtomicBool,
    /// Its memory has not been asked for yet. WHY-RELAXED: asking twice changes nothing.
    fresh: AtomicBool,
    slots: [Slot; SLAB_PAGES],
}

impl Slab {
    fn new(id: usize) -> Arc<Self> {
        Arc::new(Self {
            memory: AlignedBuf::new(SLAB_PAGES * PAGE_SIZE),
            id,
            used: AtomicU64::new(0),
            heads: AtomicU64::new(0),
            listed: AtomicBool::new(true),
            fresh: AtomicBool::new(true),
            slots: std::array::from_fn(|_| Slot::default()),
        })
    }

    /// Has the kernel give the memory at once, not page by page as each is first used. Not
    /// under the pool's mutex: it takes a while.
    fn populate(&self) {
        if self.fresh.load(Ordering::Relaxed) && self.fresh.swap(false, Ordering::Relaxed) {
            self.memory.populate();
        }
    }

    /// First page of a free run of `pages` pages, aligned to its length.
    fn find_run(&self, pages: usize) -> Option<usize> {
        let free = !self.used.load(Ordering::Relaxed);
        if pages == 1 {
            return (free != 0).then(|| free.trailing_zeros() as usize);
        }
        (0..SLAB_PAGES).step_by(pages).find(|&at| free & run_mask(at, pages) == run_mask(at, pages))
    }

    /// Gives each frame the clock's hand finds due to `evict`, until that returns
    /// false. Frames in use lose one round.
    pub(crate) fn tick(&self, mut evict: impl FnMut(Rmap) -> bool) {
        let mut heads = self.heads.load(Ordering::Relaxed);
        while heads != 0 {
            let slot = &self.slots[heads.trailing_zeros() as usize];
            heads &= heads - 1;
            let usage = slot.usage.load(Ordering::Relaxed);
            if usage > 0 {
                slot.usage.store(usage - 1, Ordering::Relaxed);
            } else if slot.pins.load(Ordering::Relaxed) == 0 {
                let mappings = slot.rmap.lock().clone();
                if !mappings.as_slice().is_empty() && !evict(mappings) {
                    return;
                }
            }
        }
    }
}

fn run_mask(at: usize, pages: usize) -> u64 {
    (u64::MAX >> (SLAB_PAGES - pages)) << at
}

#[derive(Default)]
struct Slabs {
    all: Vec<Option<Arc<Slab>>>,
    /// Empty places in `all`.
    vacant: Vec<usize>,
    /// Slabs with at least one free page.
    partial: Vec<usize>,
    /// Slabs with no page in use.
    empty: usize,
}

/// All slabs of a page cache.
pub(crate) struct FramePool {
    slabs: Mutex<Slabs>,
    /// Pages of live frames, charged before they are allocated. WHY-RELAXED: only compared
    /// with a limit that is allowed to be late.
    used: AtomicUsize,
    /// Where the clock's hand is. WHY-RELAXED: any slab is a good one.
    hand: AtomicUsize,
}

impl FramePool {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            slabs: Mutex::new(Slabs::default()),
            used: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
        })
    }

    /// Counts pages that a following [`FramePool::alloc`] takes.
    pub(crate) fn charge(&self, pages: usize) {
        self.used.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages charged.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Pages of all slabs.
    pub(crate) fn slab_pages(&self) -> usize {
        let slabs = self.slabs.lock();
        (slabs.all.len() - slabs.vacant.len()) * SLAB_PAGES
    }

    /// A frame of `pages` charged pages in pieces of `piece` bytes, contents arbitrary
    /// unless `zero`.
    ///
    /// # Panics
    /// When `pages` is no power of two up to 16 or the pieces do not divide it.
    pub(crate) fn alloc(self: &Arc<Self>, pages: usize, piece: usize, zero: bool) -> Arc<Frame> {
        assert!(pages.is_power_of_two() && pages <= 16, "a frame has 1, 2, 4, 8 or 16 pages");
        let pieces = pages * PAGE_SIZE / piece;
        assert!(piece * pieces == pages * PAGE_SIZE && pieces <= MAX_PIECES, "pieces divide it");
        let (slab, first) = self.take_run(pages);
        let frame = self.frame(slab, first, pages, piece);
        if zero {
            (0..pieces).for_each(|i| frame.write(i).fill(0));
        }
        frame
    }

    /// Frames of `count` charged pages, one each, that lie side by side where they can; contents
    /// arbitrary.
    pub(crate) fn alloc_many(self: &Arc<Self>, count: usize) -> Vec<Arc<Frame>> {
        let mut frames = Vec::with_capacity(count);
        while frames.len() < count {
            let (slab, mut pages) = self.slabs.lock().take(count - frames.len());
            slab.populate();
            while pages != 0 {
                let first = pages.trailing_zeros() as usize;
                pages &= pages - 1;
                frames.push(self.frame(slab.clone(), first, 1, PAGE_SIZE));
            }
        }
        frames
    }

    fn frame(
        self: &Arc<Self>,
        slab: Arc<Slab>,
        first: usize,
        pages: usize,
        piece: usize,
    ) -> Arc<Frame> {
        let slot = &slab.slots[first];
        slot.usage.store(0, Ordering::Relaxed);
        slot.pins.store(0, Ordering::Relaxed);
        Arc::new(Frame {
            pool: self.clone(),
            slab,
            first: first as u8,
            pages: pages as u8,
            piece: piece as u32,
            locks: [const { RawRwLock::INIT }; MAX_PIECES],
        })
    }

    fn take_run(&self, pages: usize) -> (Arc<Slab>, usize) {
        let mut slabs = self.slabs.lock();
        let found = slabs.partial.iter().rev().take(RUN_SEARCH).find_map(|&id| {
            let slab = slabs.all[id].as_ref()?;
            slab.find_run(pages).map(|first| (slab.clone(), first))
        });
        let (slab, first) = found.unwrap_or_else(|| (slabs.grow(), 0));
        slabs.mark_used(&slab, run_mask(first, pages), 1 << first);
        drop(slabs);
        slab.populate();
        (slab, first)
    }

    fn give_back(&self, slab: &Arc<Slab>, first: usize, pages: usize) {
        let mut slabs = self.slabs.lock();
        slab.heads.fetch_and(!(1 << first), Ordering::Relaxed);
        let left = slab.used.fetch_and(!run_mask(first, pages), Ordering::Relaxed)
            & !run_mask(first, pages);
        if !slab.listed.swap(true, Ordering::Relaxed) {
            slabs.partial.push(slab.id);
        }
        if left == 0 {
            slabs.empty += 1;
            // One empty slab stays, so that a cache at a boundary does not map and unmap.
            if slabs.empty > 1 {
                slabs.empty -= 1;
                slabs.unlist(slab);
                slabs.all[slab.id] = None;
                slabs.vacant.push(slab.id);
            }
        }
        drop(slabs);
        self.used.fetch_sub(pages, Ordering::Relaxed);
    }

    /// How many steps of the hand see every slab once.
    pub(crate) fn round(&self) -> usize {
        self.slabs.lock().all.len()
    }

    /// The slab under the clock's hand, which moves on.
    pub(crate) fn next_slab(&self) -> Option<Arc<Slab>> {
        let slabs = self.slabs.lock();
        let at = self.hand.fetch_add(1, Ordering::Relaxed).checked_rem(slabs.all.len())?;
        slabs.all[at].clone()
    }
}

impl Slabs {
    fn grow(&mut self) -> Arc<Slab> {
        let id = self.vacant.pop().unwrap_or(self.all.len());
        let slab = Slab::new(id);
        if id == self.all.len() {
            self.all.push(Some(slab.clone()));
        } else {
            self.all[id] = Some(slab.clone());
        }
        self.partial.push(id);
        self.empty += 1;
        slab
    }

    /// Takes up to `most` free pages of one slab: one bit each.
    fn take(&mut self, most: usize) -> (Arc<Slab>, u64) {
        let found = self.partial.last().and_then(|&id| self.all[id].clone());
        let slab = found.unwrap_or_else(|| self.grow());
        let mut free = !slab.used.load(Ordering::Relaxed);
        let mut pages = 0;
        for _ in 0..most.min(free.count_ones() as usize) {
            pages |= 1 << free.trailing_zeros();
            free &= free - 1;
        }
        self.mark_used(&slab, pages, pages);
        (slab, pages)
    }

    /// Takes free pages of a slab, some of which are the first of their frames.
    fn mark_used(&mut self, slab: &Slab, pages: u64, heads: u64) {
        let used = slab.used.fetch_or(pages, Ordering::Relaxed);
        slab.heads.fetch_or(heads, Ordering::Relaxed);
        if used == 0 {
            self.empty -= 1;
        }
        if used | pages == u64::MAX {
            self.unlist(slab);
        }
    }

    fn unlist(&mut self, slab: &Slab) {
        if slab.listed.swap(false, Ordering::Relaxed)
            && let Some(at) = self.partial.iter().rposition(|&id| id == slab.id)
        {
            self.partial.swap_remove(at);
        }
    }
}

/// One or more contiguous pages of memory, freed when the last reference goes.
pub struct Frame {
    pool: Arc<FramePool>,
    slab: Arc<Slab>,
    first: u8,
    pages: u8,
    /// Bytes under each lock.
    piece: u32,
    locks: [RawRwLock; MAX_PIECES],
}

impl Frame {
    /// Bytes.
    pub fn size(&self) -> usize {
        usize::from(self.pages) * PAGE_SIZE
    }

    fn slot(&self) -> &Slot {
        &self.slab.slots[usize::from(self.first)]
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the frame's pages lie inside the slab, by construction in `alloc`.
        unsafe { self.slab.memory.io_ptr().add(usize::from(self.first) * PAGE_SIZE) }
    }

    fn piece_ptr(&self, piece: usize) -> NonNull<u8> {
        assert!((piece + 1) * self.piece as usize <= self.size(), "piece outside its frame");
        // SAFETY: the piece lies inside the frame, checked above.
        unsafe { self.start().add(piece * self.piece as usize) }
    }

    /// Tells reclaim that the frame was used again.
    pub(crate) fn touch(&self) {
        let usage = &self.slot().usage;
        let now = usage.load(Ordering::Relaxed);
        if now < MAX_USAGE {
            usage.store(now + 1, Ordering::Relaxed);
        }
    }

    /// Keeps reclaim away from the frame until [`Frame::unpin`].
    pub fn pin(&self) {
        self.slot().pins.fetch_add(1, Ordering::Relaxed);
    }

    /// Undoes one [`Frame::pin`].
    pub fn unpin(&self) {
        let was = self.slot().pins.fetch_sub(1, Ordering::Relaxed);
        assert!(was > 0, "a frame was unpinned more often than pinned");
    }

    /// Records a mapping.
    pub(crate) fn map(&self, mapping: Mapping) {
        self.slot().rmap.lock().add(mapping);
    }

    /// Forgets a mapping.
    pub(crate) fn unmap(&self, mapping: &Mapping) {
        self.slot().rmap.lock().remove(mapping);
    }

    /// How many address spaces map it.
    pub fn map_count(&self) -> usize {
        self.slot().rmap.lock().as_slice().len()
    }

    /// Shared access to a piece.
    pub(crate) fn read(&self, piece: usize) -> FrameRead<&Frame> {
        FrameRead::lock(self, piece)
    }

    /// Exclusive access to a piece.
    pub(crate) fn write(&self, piece: usize) -> FrameWrite<&Frame> {
        FrameWrite::lock(self, piece)
    }

    /// Memory for a bio. The caller holds a guard of what the bvec covers until the
    /// bio has ended.
    pub(crate) fn bvec(self: &Arc<Self>, offset: usize, len: usize) -> BioVec {
        BioVec::part(self.clone(), offset as u32, len as u32)
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        // A mapping left behind would be reclaim's next victim in the name of the page's new owner.
        *self.slot().rmap.lock() = Rmap::None;
        self.pool.give_back(&self.slab, usize::from(self.first), usize::from(self.pages));
    }
}

// SAFETY: a frame is whole pages of a page-aligned slab that it keeps alive, initialised when the
// slab was made, and its memory never moves.
unsafe impl IoBuffer for Frame {
    fn io_ptr(&self) -> NonNull<u8> {
        self.start()
    }
    fn io_len(&self) -> usize {
        self.size()
    }
}

/// Shared access to one piece; `H` is `&Frame` or `Arc<Frame>`.
pub(crate) struct FrameRead<H: Deref<Target = Frame>> {
    frame: H,
    piece: u8,
}

impl<H: Deref<Target = Frame>> FrameRead<H> {
    pub(crate) fn lock(frame: H, piece: usize) -> Self {
        frame.locks[piece].lock_shared_recursive();
        Self { frame, piece: piece as u8 }
    }
}

impl<H: Deref<Target = Frame>> Deref for FrameRead<H> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.frame.piece_ptr(usize::from(self.piece));
        // SAFETY: the piece is initialised memory inside the frame, which the guard keeps alive;
        // its lock is held shared, so nobody has it exclusively.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.frame.piece as usize) }
    }
}

impl<H: Deref<Target = Frame>> Drop for FrameRead<H> {
    fn drop(&mut self) {
        // SAFETY: `lock` took the lock shared and only the drop gives it up. The raw lock keeps no
        // owner, so any thread may (see the file's comment).
        unsafe { self.frame.locks[usize::from(self.piece)].unlock_shared() }
    }
}

/// Exclusive access to one piece; `H` is `&Frame` or `Arc<Frame>`.
pub(crate) struct FrameWrite<H: Deref<Target = Frame>> {
    frame: H,
    piece: u8,
}

impl<H: Deref<Target = Frame>> FrameWrite<H> {
    pub(crate) fn lock(frame: H, piece: usize) -> Self {
        frame.locks[piece].lock_exclusive();
        Self { frame, piece: piece as u8 }
    }

    pub(crate) fn try_lock(frame: H, piece: usize) -> Option<Self> {
        frame.locks[piece].try_lock_exclusive().then(|| Self { frame, piece: piece as u8 })
    }
}

impl<H: Deref<Target = Frame>> Deref for FrameWrite<H> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.frame.piece_ptr(usize::from(self.piece));
        // SAFETY: as for `FrameRead::deref`; the lock is held exclusively by this guard.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.frame.piece as usize) }
    }
}

impl<H: Deref<Target = Frame>> DerefMut for FrameWrite<H> {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.frame.piece_ptr(usize::from(self.piece));
        // SAFETY: the lock is held exclusively by this guard, which is borrowed exclusively, so no
        // other reference to the piece exists.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.frame.piece as usize) }
    }
}

impl<H: Deref<Target = Frame>> Drop for FrameWrite<H> {
    fn drop(&mut self) {
        // SAFETY: `lock` or `try_lock` took the lock exclusively and only the drop gives it up.
        unsafe { self.frame.locks[usize::from(self.piece)].unlock_exclusive() }
    }
}
