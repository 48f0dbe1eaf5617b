//! A folio: one cached page of a file, and what is known of its blocks.
//!
//! States, all in one word:
//! - *uptodate*: the whole page holds the file's contents. A page that is not may still
//!   have dirty blocks, when they were wholly overwritten; who reads the rest from disk
//!   leaves those alone.
//! - *dirty*, *mapped*, *delayed*: a bit per block (bit 0 the first of the page), up to
//!   four; with blocks of a page or more only bit 0 is used. Mapped: the block has a
//!   place on the disk. Delayed: space is reserved but not allocated.
//! - *writeback*: a [`WritebackGuard`] exists. It holds the contents shared, so pages
//!   being written are stable, and a writer waits.
//! - *detached*: truncate or reclaim took the page out of its address space; it cannot
//!   become dirty any more.
//!
//! Invariants: the dirty bits change, and writeback begins and ends, only under the
//! address space's tag mutex, together with its tags; a page becomes dirty only by an
//! exclusive guard, so its contents do not change between "clean" and the end of the write.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use uext_sync::atomic::{AtomicU32, Ordering};
use uext_sync::lockdep::Class;

use uext_blockdev::BioVec;

use crate::address_space::AddressSpace;
use crate::errseq::WritebackError;
use crate::frame::{Frame, FrameRead, FrameWrite, PAGE_SIZE};

/// The dirty bits' place in the word.
const DIRTY_SHIFT: u32 = 0;
/// The mapped bits' place.
const MAPPED_SHIFT: u32 = 4;
/// The delayed bits' place.
const DELAYED_SHIFT: u32 = 8;
/// Bits for the blocks of a page.
const BLOCKS: u32 = 0xf;
pub(crate) const UPTODATE: u32 = 1 << 12;
pub(crate) const WRITEBACK: u32 = 1 << 13;
pub(crate) const DETACHED: u32 = 1 << 14;
/// Dirty again because its write failed.
pub(crate) const FAILED: u32 = 1 << 15;
/// Read ahead and not yet used.
const READAHEAD: u32 = 1 << 16;

/// What is known of the blocks of a page: a bit each, bit 0 the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FolioBlocks {
    /// Newer than the disk.
    pub dirty: u8,
    /// Has a place on the disk.
    pub mapped: u8,
    /// Space is reserved, not allocated.
    pub delayed: u8,
}

/// For the order of locks: the contents of a page. Only waiting for them is looked at: a
/// guard may be given to a device.
pub static PAGE_CONTENTS: Class = Class::new("contents of a page");

/// One cached page of a file.
pub struct Folio {
    index: u64,
    frame: Arc<Frame>,
    /// PAIRS-WITH: itself: the acquire of `state` with the release of `set` and `clear`; who
    /// sees a flag sees what came before it:
    /// ```text
    /// CPU 0: a reader from the disk     CPU 1: is_uptodate, then the contents
    /// write the contents                load-acquire(state)
    /// or-release(state, UPTODATE)       read the contents, under their lock
    /// ```
    /// The dirty bits and writeback need more than that and change under the tags: see
    /// `loom_a_write_during_writeback_makes_the_page_dirty_again` and
    /// `loom_truncate_waits_for_writeback_and_leaves_nothing_dirty`.
    state: AtomicU32,
    mapping: Weak<AddressSpace>,
}

impl Folio {
    pub(crate) fn new(index: u64, frame: Arc<Frame>, mapping: Weak<AddressSpace>) -> Arc<Self> {
        Arc::new(Self { index, frame, state: AtomicU32::new(0), mapping })
    }

    /// Its place in the file, pages.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Its memory.
    pub fn frame(&self) -> &Arc<Frame> {
        &self.frame
    }

    /// The contents, shared; waits while somebody has them exclusively, as a read from
    /// the device does. May be taken again by a thread that holds it. Look at
    /// [`Folio::is_uptodate`] after this returns.
    pub fn read(self: &Arc<Self>) -> FolioReadGuard {
        PAGE_CONTENTS.check();
        FolioReadGuard(FrameRead::lock(self.frame.clone(), 0))
    }

    /// The contents, exclusive; waits for readers and for a write to disk. The page may
    /// have been truncated meanwhile: see [`Folio::is_attached`].
    pub fn write(self: &Arc<Self>) -> FolioWriteGuard {
        PAGE_CONTENTS.check();
        FolioWriteGuard { content: FrameWrite::lock(self.frame.clone(), 0), folio: self.clone() }
    }

    /// [`Folio::write`] when it need not wait.
    pub fn try_write(self: &Arc<Self>) -> Option<FolioWriteGuard> {
        let content = FrameWrite::try_lock(self.frame.clone(), 0)?;
        Some(FolioWriteGuard { content, folio: self.clone() })
    }

    pub(crate) fn state(&self) -> u32 {
        self.state.load(Ordering::Acquire)
    }

    pub(crate) fn has(&self, flag: u32) -> bool {
        self.state() & flag != 0
    }

    /// Sets flags; the word before.
    pub(crate) fn set(&self, flags: u32) -> u32 {
        self.state.fetch_or(flags, Ordering::AcqRel)
    }

    /// Clears flags; the word before.
    pub(crate) fn clear(&self, flags: u32) -> u32 {
        self.state.fetch_and(!flags, Ordering::AcqRel)
    }

    /// Whether the whole page holds the file's contents.
    pub fn is_uptodate(&self) -> bool {
        self.has(UPTODATE)
    }

    /// Whether any block is dirty.
    pub fn is_dirty(&self) -> bool {
        self.has(dirty_bits(BLOCKS as u8))
    }

    /// Whether it is being written.
    pub fn is_writeback(&self) -> bool {
        self.has(WRITEBACK)
    }

    /// Whether it is still its address space's page. A page found or made before an
    /// exclusive guard was taken may not be; then look it up again.
    pub fn is_attached(&self) -> bool {
        !self.has(DETACHED)
    }

    /// What is known of its blocks.
    pub fn blocks(&self) -> FolioBlocks {
        FolioBlocks::of(self.state())
    }

    /// The blocks of `mask` have a place on the disk. The caller holds a guard of any kind.
    pub fn set_mapped(&self, mask: u8) {
        self.set(bits(mask, MAPPED_SHIFT));
    }

    /// The blocks of `mask` have no place on the disk any more.
    pub fn clear_mapped(&self, mask: u8) {
        self.clear(bits(mask, MAPPED_SHIFT));
    }

    /// Space is reserved for the blocks of `mask`; returns those that had none before,
    /// so that two callers do not count one block twice.
    pub fn set_delayed(&self, mask: u8) -> u8 {
        mask & !FolioBlocks::of(self.set(bits(mask, DELAYED_SHIFT))).delayed
    }

    /// The reservation of the blocks of `mask` was used or given back; returns those
    /// that had one.
    pub fn clear_delayed(&self, mask: u8) -> u8 {
        mask & FolioBlocks::of(self.clear(bits(mask, DELAYED_SHIFT))).delayed
    }

    /// It was read before anybody asked for it: its first use does not count as a
    /// second one.
    pub fn set_readahead(&self) {
        self.set(READAHEAD);
    }

    /// Tells reclaim of a use.
    pub fn touch(&self) {
        if self.has(READAHEAD) {
            self.clear(READAHEAD);
        } else {
            self.frame.touch();
        }
    }

    /// Begins writing the page: its blocks become clean, its contents stay as they are
    /// until the guard ends. Waits for a writer, and for a write that is under way.
    /// [`WritebackGuard::dirty`] is 0 when another was faster or the page was truncated:
    /// then there is nothing to do.
    ///
    /// The order with journal handles is: start the handle, then call this.
    pub fn begin_writeback(self: &Arc<Self>) -> WritebackGuard {
        PAGE_CONTENTS.check();
        let content = FrameRead::lock(self.frame.clone(), 0);
        let mapping = self.mapping.upgrade();
        let dirty = mapping.as_ref().map_or(0, |m| m.begin_writeback(self));
        let mapping = mapping.filter(|_| dirty != 0);
        WritebackGuard { content, folio: self.clone(), mapping, dirty }
    }
}

impl FolioBlocks {
    pub(crate) fn of(state: u32) -> Self {
        Self {
            dirty: (state >> DIRTY_SHIFT & BLOCKS) as u8,
            mapped: (state >> MAPPED_SHIFT & BLOCKS) as u8,
            delayed: (state >> DELAYED_SHIFT & BLOCKS) as u8,
        }
    }
}

fn bits(mask: u8, shift: u32) -> u32 {
    assert!(u32::from(mask) <= BLOCKS, "a page has at most four blocks");
    u32::from(mask) << shift
}

/// The word's dirty bits for `mask`.
pub(crate) fn dirty_bits(mask: u8) -> u32 {
    bits(mask, DIRTY_SHIFT)
}

/// The word's dirty bits for all blocks.
pub(crate) const ALL_DIRTY: u32 = BLOCKS << DIRTY_SHIFT;
/// The word's delayed bits for all blocks.
pub(crate) const ALL_DELAYED: u32 = BLOCKS << DELAYED_SHIFT;

impl std::fmt::Debug for Folio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "folio {} state {:#x}", self.index, self.state())
    }
}

/// A page's bytes, held shared: nobody changes them while it lives. Any thread may
/// drop it.
pub struct FolioReadGuard(FrameRead<Arc<Frame>>);

impl Deref for FolioReadGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A page's bytes, held exclusively. Any thread may drop it, so a read from the device
/// keeps it until its `end_io`.
pub struct FolioWriteGuard {
    content: FrameWrite<Arc<Frame>>,
    folio: Arc<Folio>,
}

impl FolioWriteGuard {
    /// The page.
    pub fn folio(&self) -> &Arc<Folio> {
        &self.folio
    }

    /// Whether the whole page holds the file's contents.
    pub fn is_uptodate(&self) -> bool {
        self.folio.is_uptodate()
    }

    /// The whole page holds the file's contents now.
    pub fn set_uptodate(&self) {
        self.folio.set(UPTODATE);
    }

    /// What is known of its blocks.
    pub fn blocks(&self) -> FolioBlocks {
        self.folio.blocks()
    }

    /// The blocks of `mask` are newer than the disk. `false` when the page was truncated
    /// or reclaimed since it was looked up: then nothing was marked and nothing would be
    /// written; look it up again.
    pub fn mark_dirty(&self, mask: u8) -> bool {
        let want = dirty_bits(mask);
        let state = self.folio.state();
        if state & DETACHED != 0 {
            return false;
        }
        // Whoever clears dirty bits holds the contents shared, so these stay while we hold them.
        if state & want == want {
            return true;
        }
        self.folio.mapping.upgrade().is_some_and(|m| m.mark_dirty(&self.folio, want))
    }

    /// See [`Folio::set_mapped`].
    pub fn set_mapped(&self, mask: u8) {
        self.folio.set_mapped(mask);
    }

    /// See [`Folio::clear_mapped`].
    pub fn clear_mapped(&self, mask: u8) {
        self.folio.clear_mapped(mask);
    }

    /// See [`Folio::set_delayed`].
    pub fn set_delayed(&self, mask: u8) -> u8 {
        self.folio.set_delayed(mask)
    }

    /// See [`Folio::clear_delayed`].
    pub fn clear_delayed(&self, mask: u8) -> u8 {
        self.folio.clear_delayed(mask)
    }

    /// Memory for a bio that reads into the page; the guard is kept until `end_io`.
    pub fn bvec(&self, offset: usize, len: usize) -> BioVec {
        self.folio.frame.bvec(offset, len)
    }
}

impl Deref for FolioWriteGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.content
    }
}

impl DerefMut for FolioWriteGuard {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.content
    }
}

/// A page being written. It keeps the contents stable; end it with
/// [`WritebackGuard::complete`], from any thread. Dropped without that (the write was
/// given up before a bio was made), the blocks become dirty again without an error.
pub struct WritebackGuard {
    content: FrameRead<Arc<Frame>>,
    folio: Arc<Folio>,
    /// `None` when there is nothing to write, and after the end.
    mapping: Option<Arc<AddressSpace>>,
    dirty: u8,
}

impl WritebackGuard {
    /// The page.
    pub fn folio(&self) -> &Arc<Folio> {
        &self.folio
    }

    /// The blocks that were dirty and are to be written; 0: nothing to do.
    pub fn dirty(&self) -> u8 {
        self.dirty
    }

    /// Memory for a bio that writes the page; the guard is kept until `end_io`.
    ///
    /// # Panics
    /// When the range is not inside the page.
    pub fn bvec(&self, offset: usize, len: usize) -> BioVec {
        assert!(offset + len <= PAGE_SIZE, "range outside the page");
        self.folio.frame.bvec(offset, len)
    }

    /// Ends the write. A failure is recorded in the address space's `errseq`, and the
    /// blocks are dirty again, unless too much of the cache is held by failed pages.
    pub fn complete(mut self, result: Result<(), WritebackError>) {
        if let Some(mapping) = self.mapping.take() {
            mapping.end_writeback(&self.folio, self.dirty, result.map_err(Some));
        }
    }
}

impl Deref for WritebackGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.content
    }
}

impl Drop for WritebackGuard {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            mapping.end_writeback(&self.folio, self.dirty, Err(None));
        }
    }
}
