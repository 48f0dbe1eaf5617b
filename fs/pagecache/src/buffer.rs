//! A buffer: one filesystem block of a device, cached (`struct buffer_head`).
//!
//! Invariants:
//! - A dirty buffer is uptodate, and its block is in its cache's dirty set; both
//!   change together under that set's mutex.
//! - While a write of the block is under way the buffer is marked so, and a second
//!   write waits: two writes of one block are never in flight together.
//! - A freed block that a write is still on its way to is noted as stale, so that who gives it
//!   to a file waits for that write before its own.
//! - A buffer that is dirty, being written, or held by the journal is never
//!   reclaimed, and there is at most one buffer for a block.
//!
//! Locks: content lock (a piece of the frame) or journal state, either first but
//! not both by this crate; then the dirty set; then, as a leaf, the stale blocks.

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use uext_sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use uext_blockdev::{AlignedBuf, BioVec};
use uext_sync::lockdep::{Class, Held};
use uext_sync::{Condvar, Mutex, MutexGuard};

use crate::cache::Counters;
use crate::frame::{Frame, FrameRead, FrameWrite};

/// The contents are the block's newest.
const UPTODATE: u32 = 1 << 0;
/// Newer than the disk. [dirty set mutex for changes]
const DIRTY: u32 = 1 << 1;
/// A write is under way. [dirty set mutex for changes]
const WRITEBACK: u32 = 1 << 2;
/// The checksum was verified since the last read.
const VERIFIED: u32 = 1 << 3;
/// The last write failed.
const WRITE_ERROR: u32 = 1 << 4;
/// The block was freed; cleared when it gets contents again.
const FORGOTTEN: u32 = 1 << 5;

/// For the order of locks: the contents of a block.
pub static BLOCK_CONTENTS: Class = Class::new("contents of a block");

/// A counted reference to a buffer.
pub type Buffer = Arc<BufferHead>;

/// The blocks of one device that are dirty, and waiting for writes under way.
pub(crate) struct DirtyBuffers {
    pub(crate) blocks: Mutex<BTreeSet<u64>>,
    /// Writes under way [blocks]. WHY-RELAXED: changed and read under that lock.
    writing: AtomicUsize,
    /// A write under way has ended.
    written: Condvar,
    /// Freed blocks that a write is still on its way to. [changed under blocks]
    stale: Mutex<BTreeSet<u64>>,
    /// How many those are, to look at without a lock. WHY-RELAXED: a block is freed, and then
    /// found free, under the allocator's locks, which order the two sides.
    stale_count: AtomicUsize,
    pub(crate) counters: Arc<Counters>,
}

impl DirtyBuffers {
    /// Nothing is dirty, and no write is under way.
    pub(crate) fn is_empty(&self) -> bool {
        let blocks = self.blocks.lock();
        blocks.is_empty() && self.writing.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn new(counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            blocks: Mutex::default(),
            writing: AtomicUsize::new(0),
            written: Condvar::new(),
            stale: Mutex::default(),
            stale_count: AtomicUsize::new(0),
            counters,
        })
    }

    /// Waits until no write from before they were freed is on its way to these blocks.
    pub(crate) fn wait_for_stale(&self, range: Range<u64>) {
        if self.stale_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut blocks = self.blocks.lock();
        while self.stale.lock().range(range.clone()).next().is_some() {
            self.written.wait(&mut blocks);
        }
    }

    /// Changes `stale`; `blocks` is locked.
    fn change_stale(&self, change: impl FnOnce(&mut BTreeSet<u64>) -> bool) {
        let mut stale = self.stale.lock();
        change(&mut stale);
        // WHY-RELAXED: see the field.
        self.stale_count.store(stale.len(), Ordering::Relaxed);
    }
}

/// What the journal knows of a buffer. Plain data: the journal owns its meaning.
#[derive(Default)]
pub struct JournalHead {
    /// The running transaction that has changed the buffer.
    pub running: Option<u32>,
    /// The committing transaction that holds it.
    pub committing: Option<u32>,
    /// The transaction whose checkpoint must write it home.
    pub checkpoint: Option<u32>,
    /// The contents the committing transaction writes, when the running one has
    /// changed the buffer since.
    pub frozen: Option<Arc<AlignedBuf>>,
}

impl JournalHead {
    /// Whether the journal forbids that others write or drop the buffer.
    pub fn is_pinned(&self) -> bool {
        self.running.is_some()
            || self.committing.is_some()
            || self.checkpoint.is_some()
            || self.frozen.is_some()
    }
}

/// One block of a device.
pub struct BufferHead {
    block: u64,
    size: u32,
    /// Which piece of the frame it is.
    piece: u8,
    frame: Arc<Frame>,
    /// PAIRS-WITH: itself, as a folio's: the acquire of `has` with the release of `set` and
    /// `clear`; who sees a flag sees what came before it. The dirty mark changes under the
    /// dirty set's lock.
    /// WHY-RELAXED: in `Debug`, which shows a moment.
    state: AtomicU32,
    journal: Mutex<JournalHead>,
    dirty: Arc<DirtyBuffers>,
}

impl BufferHead {
    pub(crate) fn new(
        block: u64,
        size: u32,
        piece: u8,
        frame: Arc<Frame>,
        dirty: Arc<DirtyBuffers>,
    ) -> Buffer {
        Arc::new(Self {
            block,
            size,
            piece,
            frame,
            state: AtomicU32::new(0),
            journal: Mutex::default(),
            dirty,
        })
    }

    /// The block's number.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Bytes in the block.
    pub fn size(&self) -> usize {
        self.size as usize
    }

    /// The contents, shared. Waits while somebody writes them or a read from the
    /// device is under way. May be taken again by a thread that holds it.
    pub fn read(&self) -> BufferReadGuard<'_> {
        // First, so that the order is checked before this waits.
        let _held = BLOCK_CONTENTS.acquire();
        BufferReadGuard { frame: self.frame.read(usize::from(self.piece)), _held }
    }

    /// The contents, exclusive. Only journal handles and recovery use it: a change
    /// outside a transaction is lost or torn by a crash. A write to disk under way
    /// does not block it, since that has a copy.
    ///
    /// Mark the buffer dirty, or uptodate, before the guard goes: until then a
    /// concurrent [`bread`](crate::BufferCache::bread) of a block that was not read
    /// yet would fetch it from the device over the new contents.
    pub fn write(&self) -> BufferWriteGuard<'_> {
        // First, so that the order is checked before this waits.
        let _held = BLOCK_CONTENTS.acquire();
        BufferWriteGuard { frame: self.frame.write(usize::from(self.piece)), _held }
    }

    /// Exclusive access that may be released by another thread, when it is free.
    pub(crate) fn try_write_owned(&self) -> Option<FrameWrite<Arc<Frame>>> {
        FrameWrite::try_lock(self.frame.clone(), usize::from(self.piece))
    }

    /// The contents, shared, in a guard that any thread may release: the journal
    /// writes a block from its frame while it holds one (see [`BufferHead::bvec`]).
    pub fn read_owned(&self) -> BufferOwnedReadGuard {
        BufferOwnedReadGuard(FrameRead::lock(self.frame.clone(), usize::from(self.piece)))
    }

    /// The block's memory for a bio. The caller holds [`BufferHead::read_owned`] (for
    /// a write bio) until the bio has ended.
    pub fn bvec(&self) -> BioVec {
        let offset = usize::from(self.piece) * self.size();
        self.frame.bvec(offset, self.size())
    }

    fn has(&self, flag: u32) -> bool {
        self.state.load(Ordering::Acquire) & flag != 0
    }

    fn set(&self, flags: u32) {
        self.state.fetch_or(flags, Ordering::AcqRel);
    }

    fn clear(&self, flags: u32) {
        self.state.fetch_and(!flags, Ordering::AcqRel);
    }

    /// Whether the contents are the block's newest.
    pub fn is_uptodate(&self) -> bool {
        self.has(UPTODATE)
    }

    /// The contents are valid: they were wholly overwritten.
    pub fn set_uptodate(&self) {
        self.set(UPTODATE);
        self.clear(FORGOTTEN);
    }

    /// The contents are worthless: the next `bread` reads them again. A dirty buffer
    /// becomes clean.
    pub fn clear_uptodate(&self) {
        self.clear_dirty();
        self.clear(UPTODATE | VERIFIED);
    }

    /// Whether the contents are newer than the disk's.
    pub fn is_dirty(&self) -> bool {
        self.has(DIRTY)
    }

    /// The contents are newer than the disk's: somebody must write them. Makes the
    /// buffer uptodate.
    pub fn mark_dirty(&self) {
        // The fast path may miss a `clear_dirty` that runs now, but then that writer takes its copy
        // after this change: both go through the content lock, which orders them.
        if self.has(DIRTY) {
            return;
        }
        let mut blocks = self.dirty.blocks.lock();
        let old = self.state.fetch_or(DIRTY | UPTODATE, Ordering::AcqRel);
        if old & FORGOTTEN != 0 {
            self.clear(FORGOTTEN);
        }
        if old & DIRTY == 0 {
            blocks.insert(self.block);
            self.dirty.counters.buffer_dirtied(self.size());
        }
    }

    /// Takes the dirty mark away; whether it was there. Who does this before a write
    /// takes the duty to write with it.
    pub fn clear_dirty(&self) -> bool {
        if !self.has(DIRTY) {
            return false;
        }
        let mut blocks = self.dirty.blocks.lock();
        self.clear_dirty_locked(&mut blocks)
    }

    fn clear_dirty_locked(&self, blocks: &mut BTreeSet<u64>) -> bool {
        let was = self.state.fetch_and(!DIRTY, Ordering::AcqRel) & DIRTY != 0;
        if was {
            blocks.remove(&self.block);
            self.dirty.counters.buffer_cleaned(self.size());
        }
        was
    }

    /// Whether [`BufferHead::set_verified`] was called since the last read.
    pub fn is_verified(&self) -> bool {
        self.has(VERIFIED)
    }

    /// The checksum of the contents was found right.
    pub fn set_verified(&self) {
        self.set(VERIFIED);
    }

    /// Whether the last write of the block failed; it is dirty again.
    pub fn has_write_error(&self) -> bool {
        self.has(WRITE_ERROR)
    }

    /// The journal's state. Held for short: reclaim skips a buffer whose state is
    /// locked, and nothing may wait for I/O under it.
    pub fn journal(&self) -> MutexGuard<'_, JournalHead> {
        self.journal.lock()
    }

    /// Whether the journal forbids that others write the buffer.
    pub(crate) fn is_pinned(&self) -> bool {
        self.journal.lock().is_pinned()
    }

    /// Whether reclaim may drop it, given that nobody else holds it.
    pub(crate) fn is_reclaimable(&self) -> bool {
        !self.has(DIRTY | WRITEBACK) && self.journal.try_lock().is_some_and(|j| !j.is_pinned())
    }

    /// A read from the device has filled it.
    pub(crate) fn set_read(&self) {
        self.clear(VERIFIED | FORGOTTEN);
        self.set(UPTODATE);
    }

    /// The block was freed: whatever it holds, nobody wants it. Returns whether a
    /// write of it is under way.
    pub(crate) fn set_forgotten(&self) -> bool {
        let mut blocks = self.dirty.blocks.lock();
        self.clear_dirty_locked(&mut blocks);
        self.set(FORGOTTEN);
        self.clear(UPTODATE | VERIFIED | WRITE_ERROR);
        let writing = self.has(WRITEBACK);
        if writing {
            self.dirty.change_stale(|stale| stale.insert(self.block));
        }
        writing
    }

    /// Waits until no other write is under way, and begins one: the buffer is clean
    /// and its contents must be copied after this. Returns `false` when the block was
    /// forgotten and nothing is to be written.
    pub(crate) fn begin_write(&self) -> bool {
        let mut blocks = self.dirty.blocks.lock();
        while self.has(WRITEBACK) {
            self.dirty.written.wait(&mut blocks);
        }
        if self.has(FORGOTTEN) {
            return false;
        }
        self.clear_dirty_locked(&mut blocks);
        self.set(WRITEBACK);
        // WHY-RELAXED, all of `writing`: the list's lock orders them.
        self.dirty.writing.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Ends a write begun by [`BufferHead::begin_write`].
    pub(crate) fn end_write(&self, ok: bool) {
        let mut blocks = self.dirty.blocks.lock();
        self.dirty.writing.fetch_sub(1, Ordering::Relaxed);
        // WHY-RELAXED: it changes under `blocks`.
        if self.dirty.stale_count.load(Ordering::Relaxed) > 0 {
            self.dirty.change_stale(|stale| stale.remove(&self.block));
        }
        self.clear(WRITEBACK);
        if ok {
            self.clear(WRITE_ERROR);
        } else if !self.has(FORGOTTEN) {
            let old = self.state.fetch_or(DIRTY | WRITE_ERROR, Ordering::AcqRel);
            if old & DIRTY == 0 {
                blocks.insert(self.block);
                self.dirty.counters.buffer_dirtied(self.size());
            }
        }
        self.dirty.written.notify_all();
    }

    pub(crate) fn frame(&self) -> &Arc<Frame> {
        &self.frame
    }
}

impl std::fmt::Debug for BufferHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.load(Ordering::Relaxed);
        write!(f, "buffer {} +{} state {state:#x}", self.block, self.size)
    }
}

impl Drop for BufferHead {
    fn drop(&mut self) {
        // Only a cache that is dropped with dirty buffers gets here dirty.
        self.clear_dirty();
    }
}

/// A block's contents, shared.
pub struct BufferReadGuard<'a> {
    frame: FrameRead<&'a Frame>,
    _held: Held,
}

impl Deref for BufferReadGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.frame
    }
}

/// A block's contents, shared; may be released by any thread.
pub struct BufferOwnedReadGuard(FrameRead<Arc<Frame>>);

impl Deref for BufferOwnedReadGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A block's contents, exclusive.
pub struct BufferWriteGuard<'a> {
    frame: FrameWrite<&'a Frame>,
    _held: Held,
}

impl Deref for BufferWriteGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.frame
    }
}

impl DerefMut for BufferWriteGuard<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.frame
    }
}
