//! An address space: the cached pages of one inode.
//!
//! Invariants:
//! - At most one attached folio per index.
//! - The tags agree with the folios: an index is in `dirty` exactly when its attached
//!   folio has dirty blocks, and counted in `writeback` while a write is under way.
//! - While it has dirty pages or pages being written it is in the cache's list of dirty
//!   address spaces, which keeps it alive: dirty pages never vanish with a dropped `Arc`.
//!   Its operations are held weakly; who implements them keeps them alive while
//!   [`AddressSpace::has_dirty`].
//!
//! Locks: page contents → tags → list of dirty address spaces; the page map is a leaf
//! and never held while memory is allocated or anything is waited for. Waiting for
//! writeback happens on the tags' condition.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};

use uext_sync::atomic::{Ordering, fence};
use uext_sync::{Condvar, Mutex, RwLock};

use crate::cache::{Change, PageCache};
use crate::errseq::{ErrSeq, WritebackError};
use crate::folio::{
    ALL_DELAYED, ALL_DIRTY, DETACHED, FAILED, Folio, FolioBlocks, UPTODATE, WRITEBACK, dirty_bits,
};
use crate::frame::PAGE_SIZE;
use crate::rmap::{FrameOwner, Mapping};

/// How often a sync begins again because others gave up writes of its pages meanwhile.
const GIVEN_UP_TRIES: u32 = 64;

/// Why pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritebackReason {
    /// They are old.
    Periodic,
    /// Too many are dirty.
    Background,
    /// Memory is short.
    Memory,
    /// Somebody waits: fsync, sync, unmount.
    Sync,
}

/// What to write.
#[derive(Clone, Debug)]
pub struct WritebackControl {
    /// Page indexes.
    pub range: Range<u64>,
    /// Most pages to write; with `sync`, no bound.
    pub nr_to_write: u64,
    /// Wait until they are written, and for writes that were under way.
    pub sync: bool,
    /// Why.
    pub reason: WritebackReason,
}

/// Address spaces that the flusher offers to be written together.
pub const MOST_TOGETHER: usize = 256;

/// What a filesystem does for the pages of an inode. Who wants to know of evicted pages
/// registers a [`ChangeListener`](crate::ChangeListener).
///
/// The flusher holds the operations strongly while it calls them, so it may be the last
/// to drop them: their `Drop` must not wait for writeback.
pub trait AddressSpaceOps: Send + Sync {
    /// Writes dirty pages of the range; delayed allocation happens here. Takes them with
    /// [`AddressSpace::dirty_folios`] and [`Folio::begin_writeback`]. With `wbc.sync` all
    /// dirty pages of the range are written and waited for. Called without locks of the
    /// cache, perhaps by many threads at once.
    ///
    /// Returns the pages whose write was begun.
    ///
    /// # Errors
    /// The first failure. A failure that did not go through
    /// [`WritebackGuard::complete`](crate::WritebackGuard::complete) is to be recorded
    /// with [`ErrSeq::set`] of [`AddressSpace::errseq`].
    fn writepages(
        &self,
        mapping: &Arc<AddressSpace>,
        wbc: &WritebackControl,
    ) -> Result<u64, WritebackError>;

    /// May write dirty pages of these address spaces, at most [`MOST_TOGETHER`] and perhaps not
    /// all of this filesystem, with fewer requests than one by one. What is left is written with
    /// [`AddressSpaceOps::writepages`]. Called as that.
    fn write_together(&self, _mappings: &mut dyn Iterator<Item = &Arc<AddressSpace>>) {}
}

/// Pages being written at once for which there is room without an allocation.
const WRITING_ROOM: usize = 2048;

/// How many writes of an index are under way: more than one when a page was truncated
/// during its write and made again. Room is made when pages become dirty, so that
/// writeback needs no memory.
#[derive(Default)]
struct Writing(VecDeque<(u64, u32)>);

impl Writing {
    fn place(&self, index: u64) -> Result<usize, usize> {
        self.0.binary_search_by_key(&index, |(index, _)| *index)
    }

    /// Makes room for as many as may be begun soon.
    fn reserve(&mut self, pages: usize) {
        self.0.reserve(pages.min(WRITING_ROOM).saturating_sub(self.0.len()));
    }

    fn begin(&mut self, index: u64) {
        match self.place(index) {
            Ok(at) => self.0[at].1 += 1,
            Err(at) => self.0.insert(at, (index, 1)),
        }
    }

    fn end(&mut self, index: u64) {
        let Ok(at) = self.place(index) else { return };
        self.0[at].1 -= 1;
        if self.0[at].1 == 0 {
            self.0.remove(at);
        }
    }

    fn any_in(&self, range: &Range<u64>) -> bool {
        let at = self.place(range.start).unwrap_or_else(|at| at);
        self.0.get(at).is_some_and(|(index, _)| *index < range.end)
    }
}

#[derive(Default)]
struct Tags {
    dirty: BTreeSet<u64>,
    writeback: Writing,
    /// Whether the cache's list has this address space.
    listed: bool,
    /// Writes that were given up: their pages are dirty again without an error.
    given_up: u64,
}

/// The cached pages of one inode.
pub struct AddressSpace {
    me: Weak<AddressSpace>,
    cache: Arc<PageCache>,
    id: u64,
    /// Its key in the list of dirty address spaces.
    seq: u64,
    ops: Weak<dyn AddressSpaceOps>,
    pages: RwLock<BTreeMap<u64, Arc<Folio>>>,
    tags: Mutex<Tags>,
    written: Condvar,
    errseq: ErrSeq,
}

impl AddressSpace {
    /// The pages of the inode `id`.
    pub fn new(cache: &Arc<PageCache>, id: u64, ops: Weak<dyn AddressSpaceOps>) -> Arc<Self> {
        // WHY-RELAXED: only distinct numbers are wanted.
        static SEQ: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            cache: cache.clone(),
            id,
            seq: SEQ.fetch_add(1, Ordering::Relaxed),
            ops,
            pages: RwLock::default(),
            tags: Mutex::default(),
            written: Condvar::new(),
            errseq: ErrSeq::default(),
        })
    }

    /// The inode's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The cache it belongs to.
    pub fn cache(&self) -> &Arc<PageCache> {
        &self.cache
    }

    /// Write errors, for open files to learn of.
    pub fn errseq(&self) -> &ErrSeq {
        &self.errseq
    }

    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    pub(crate) fn ops(&self) -> Option<Arc<dyn AddressSpaceOps>> {
        self.ops.upgrade()
    }

    /// The page, when it is cached; perhaps not uptodate.
    pub fn find(&self, index: u64) -> Option<Arc<Folio>> {
        let folio = self.pages.read().get(&index).cloned()?;
        folio.touch();
        Some(folio)
    }

    /// The page, made when it is not cached: then it is not uptodate, and what it holds until it
    /// is made so is arbitrary. May wait a bounded time for memory; never fails.
    pub fn find_or_create(&self, index: u64) -> Arc<Folio> {
        if let Some(folio) = self.find(index) {
            return folio;
        }
        let frame = self.cache.alloc_frame(1, PAGE_SIZE, false, true);
        let fresh = Folio::new(index, frame, self.me.clone());
        self.insert(fresh)
    }

    /// The pages `indexes`, as by [`AddressSpace::find_or_create`].
    pub fn find_or_create_to_fill(&self, indexes: Range<u64>) -> Vec<Arc<Folio>> {
        let count = usize::try_from(indexes.end - indexes.start).expect("pages that memory has");
        let frames = self.cache.alloc_pages(count);
        let fresh: Vec<_> = indexes
            .zip(frames)
            .map(|(index, frame)| Folio::new(index, frame, self.me.clone()))
            .collect();
        let mut pages = self.pages.write();
        let folios = fresh.into_iter().map(|fresh| match pages.entry(fresh.index()) {
            Entry::Occupied(there) => (there.get().clone(), Some(fresh)),
            Entry::Vacant(place) => {
                fresh.frame().map(self.mapping(fresh.index()));
                (place.insert(fresh).clone(), None)
            }
        });
        let (folios, unused): (Vec<_>, Vec<_>) = folios.unzip();
        // The map is a leaf, and frames go back to the pool.
        drop(pages);
        drop(unused);
        folios
    }

    /// Maps the page of another address space here too, for blocks that files share: one
    /// frame, two places. Returns the page already there when there is one. A file's own
    /// page must take its place (see [`AddressSpace::invalidate`]) before it is written.
    pub fn insert_shared(&self, index: u64, other: &Arc<Folio>) -> Arc<Folio> {
        let guard = other.read();
        let fresh = Folio::new(index, other.frame().clone(), self.me.clone());
        fresh.set(other.state() & UPTODATE);
        drop(guard);
        self.insert(fresh)
    }

    fn insert(&self, fresh: Arc<Folio>) -> Arc<Folio> {
        let mut pages = self.pages.write();
        let folio = pages.entry(fresh.index()).or_insert_with(|| {
            fresh.frame().map(self.mapping(fresh.index()));
            fresh.clone()
        });
        let folio = folio.clone();
        drop(pages);
        folio
    }

    /// Cached pages of the range, by rising index.
    pub fn find_range(&self, range: Range<u64>) -> Vec<Arc<Folio>> {
        if range.is_empty() {
            return Vec::new();
        }
        self.pages.read().range(range).map(|(_, folio)| folio.clone()).collect()
    }

    /// Whether any page of the range is cached: then a read or write may not go past the
    /// cache.
    pub fn has_pages(&self, range: Range<u64>) -> bool {
        !range.is_empty() && self.pages.read().range(range).next().is_some()
    }

    /// Dirty pages of the range, by rising index, at most `max`.
    pub fn dirty_folios(&self, range: Range<u64>, max: usize) -> Vec<Arc<Folio>> {
        let mut folios = Vec::new();
        self.dirty_folios_into(range, max, &mut folios);
        folios
    }

    /// [`AddressSpace::dirty_folios`] into an array that is kept.
    pub fn dirty_folios_into(&self, range: Range<u64>, max: usize, into: &mut Vec<Arc<Folio>>) {
        if range.is_empty() {
            return;
        }
        let tags = self.tags.lock();
        let pages = self.pages.read();
        let dirty = tags.dirty.range(range).take(max);
        into.extend(dirty.filter_map(|index| pages.get(index).cloned()));
    }

    /// Whether pages are dirty or being written: then the inode must stay.
    pub fn has_dirty(&self) -> bool {
        let tags = self.tags.lock();
        !tags.dirty.is_empty() || !tags.writeback.0.is_empty()
    }

    fn has_dirty_in(&self, range: Range<u64>) -> bool {
        !range.is_empty() && self.tags.lock().dirty.range(range).next().is_some()
    }

    /// How many pages are dirty.
    pub fn nr_dirty(&self) -> usize {
        self.tags.lock().dirty.len()
    }

    /// How many pages are cached.
    pub fn nr_pages(&self) -> usize {
        self.pages.read().len()
    }

    /// Drops every page at `first_index` and after, dirty or not, and waits for writes of
    /// them that are under way. Returns how many delayed blocks went, whose reservations
    /// the caller gives back. The caller excludes writers and new pages there, and holds
    /// no guard of these pages.
    pub fn truncate(&self, first_index: u64) -> u64 {
        let gone = self.pages.write().split_off(&first_index);
        self.drop_pages(gone.into_values().collect(), Change::Truncated)
    }

    /// [`AddressSpace::truncate`] for a range, as a hole punch needs.
    pub fn truncate_range(&self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let mut pages = self.pages.write();
        let mut gone = pages.split_off(&range.start);
        pages.append(&mut gone.split_off(&range.end));
        drop(pages);
        self.drop_pages(gone.into_values().collect(), Change::Truncated)
    }

    /// Drops clean pages of the range, because the disk is or will be written past the
    /// cache; waits for readers, and for writes under way. Returns how many dirty pages
    /// stayed. The caller holds no guard of these pages.
    pub fn invalidate(&self, range: Range<u64>) -> usize {
        let mut kept = 0;
        for folio in self.find_range(range) {
            let guard = folio.write();
            if folio.is_dirty() {
                kept += 1;
                continue;
            }
            // The exclusive guard keeps it clean. It may have left the map, even for another page.
            let mut pages = self.pages.write();
            if pages.get(&folio.index()).is_some_and(|now| Arc::ptr_eq(now, &folio)) {
                pages.remove(&folio.index());
                self.detach(&folio);
                drop(pages);
                drop(guard);
                self.cache.notify_change(self.id, folio.index(), Change::Invalidated);
            }
        }
        kept
    }

    /// Waits until no write of the range is under way.
    pub fn wait_writeback(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut tags = self.tags.lock();
        while tags.writeback.any_in(&range) {
            self.written.wait(&mut tags);
        }
    }

    /// Writes the dirty pages of the range, and waits for them and for writes that were
    /// under way. Errors of earlier writes are not told here but by
    /// [`AddressSpace::errseq`].
    ///
    /// # Errors
    /// The first failure of these writes.
    pub fn write_and_wait(self: &Arc<Self>, range: Range<u64>) -> Result<(), WritebackError> {
        let before = self.errseq.count();
        for _ in 0..GIVEN_UP_TRIES {
            let given_up = self.tags.lock().given_up;
            if self.has_dirty_in(range.clone()) {
                let wbc = WritebackControl {
                    range: range.clone(),
                    nr_to_write: u64::MAX,
                    sync: true,
                    reason: WritebackReason::Sync,
                };
                let Some(ops) = self.ops() else { return Err(WritebackError::Io) };
                ops.writepages(self, &wbc)?;
            }
            self.wait_writeback(range.clone());
            // A page that another had taken to write, and then did not, was neither dirty
            // nor an error when we looked.
            if self.tags.lock().given_up == given_up {
                return self.errseq.since_count(before);
            }
        }
        Err(WritebackError::Io)
    }

    /// Called by writers, without locks, after they dirtied pages: wakes the flusher, and
    /// waits a bounded time when too much is dirty.
    pub fn balance_dirty(&self) {
        self.cache.balance_dirty();
    }

    fn mapping(&self, index: u64) -> Mapping {
        Mapping { owner: self.me.clone(), key: index }
    }

    /// Marks a page as no longer here. [page map, or sole owner of the removed page]
    fn detach(&self, folio: &Folio) {
        folio.set(DETACHED);
        folio.frame().unmap(&self.mapping(folio.index()));
    }

    /// Ends pages that were taken out of the map.
    fn drop_pages(&self, gone: Vec<Arc<Folio>>, change: Change) -> u64 {
        let mut delayed = 0;
        for folio in &gone {
            let mut tags = self.tags.lock();
            self.detach(folio);
            if folio.clear(ALL_DIRTY) & ALL_DIRTY != 0 {
                // The tag may be a new page's by now, if the caller lets writers in.
                let successor = self.pages.read().get(&folio.index()).cloned();
                if !successor.is_some_and(|f| f.is_dirty()) {
                    tags.dirty.remove(&folio.index());
                }
                self.count_clean(folio);
            }
            while folio.has(WRITEBACK) {
                self.written.wait(&mut tags);
            }
            let was = folio.clear(ALL_DELAYED);
            delayed += u64::from(FolioBlocks::of(was).delayed.count_ones());
            let unlisted = self.unlist_if_clean(&mut tags);
            drop(tags);
            drop(unlisted);
            self.cache.notify_change(self.id, folio.index(), change);
        }
        delayed
    }

    /// The counters for a page that is no longer dirty.
    fn count_clean(&self, folio: &Folio) {
        let counters = self.cache.counters();
        counters.dirty.fetch_sub(1, Ordering::Relaxed);
        if folio.clear(FAILED) & FAILED != 0 {
            counters.failed.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Marks blocks dirty; the caller holds the contents exclusively. `false` when the
    /// page is detached.
    pub(crate) fn mark_dirty(self: &Arc<Self>, folio: &Folio, want: u32) -> bool {
        let mut tags = self.tags.lock();
        if folio.has(DETACHED) {
            return false;
        }
        self.tag_dirty(&mut tags, folio, want);
        drop(tags);
        self.cache.dirtied();
        true
    }

    fn tag_dirty(&self, tags: &mut Tags, folio: &Folio, want: u32) {
        if folio.set(want) & ALL_DIRTY != 0 {
            return;
        }
        tags.dirty.insert(folio.index());
        let dirty = tags.dirty.len();
        tags.writeback.reserve(dirty);
        self.cache.counters().dirty.fetch_add(1, Ordering::Relaxed);
        if !tags.listed {
            tags.listed = true;
            if let Some(me) = self.me.upgrade() {
                self.cache.dirty.insert(me);
            }
        }
    }

    /// Takes the dirty bits and begins a write; the caller holds the contents shared.
    /// Returns the blocks to write.
    pub(crate) fn begin_writeback(&self, folio: &Folio) -> u8 {
        let mut tags = self.tags.lock();
        while folio.has(WRITEBACK) {
            self.written.wait(&mut tags);
        }
        if folio.has(DETACHED) {
            return 0;
        }
        let dirty = FolioBlocks::of(folio.clear(ALL_DIRTY)).dirty;
        if dirty == 0 {
            return 0;
        }
        folio.set(WRITEBACK);
        tags.dirty.remove(&folio.index());
        tags.writeback.begin(folio.index());
        self.count_clean(folio);
        self.cache.counters().writeback.fetch_add(1, Ordering::Relaxed);
        dirty
    }

    /// Ends a write. `Err(None)`: it was not tried.
    pub(crate) fn end_writeback(
        &self,
        folio: &Folio,
        dirty: u8,
        result: Result<(), Option<WritebackError>>,
    ) {
        if let Err(Some(error)) = result {
            // Before the write counts as ended: who waits for it must see the error.
            self.errseq.set(error);
        }
        let mut tags = self.tags.lock();
        let counters = self.cache.counters();
        if !folio.has(DETACHED) {
            match result {
                Ok(()) => {
                    counters.written.fetch_add(1, Ordering::Relaxed);
                }
                Err(None) => {
                    tags.given_up += 1;
                    self.tag_dirty(&mut tags, folio, dirty_bits(dirty));
                }
                Err(Some(error)) => self.write_failed(&mut tags, folio, dirty, error),
            }
        }
        folio.clear(WRITEBACK);
        counters.writeback.fetch_sub(1, Ordering::Relaxed);
        tags.writeback.end(folio.index());
        let unlisted = self.unlist_if_clean(&mut tags);
        self.written.notify_all();
        drop(tags);
        drop(unlisted);
        self.cache.made_progress();
    }

    fn write_failed(&self, tags: &mut Tags, folio: &Folio, dirty: u8, error: WritebackError) {
        let failed = &self.cache.counters().failed;
        if failed.load(Ordering::Relaxed) >= self.cache.failed_limit_pages() {
            log::error!(
                "inode {}: write of page {} failed ({error}) and too many failed pages are \
                 kept: its data is lost",
                self.id,
                folio.index()
            );
            folio.clear(UPTODATE);
            return;
        }
        log::warn!("inode {}: write of page {} failed: {error}", self.id, folio.index());
        folio.set(FAILED);
        failed.fetch_add(1, Ordering::Relaxed);
        self.tag_dirty(tags, folio, dirty_bits(dirty));
    }

    /// Leaves the list of dirty address spaces when nothing keeps it there. The result is
    /// to be dropped after the tags.
    fn unlist_if_clean(&self, tags: &mut Tags) -> Option<Arc<AddressSpace>> {
        if !tags.listed || !tags.dirty.is_empty() || !tags.writeback.0.is_empty() {
            return None;
        }
        tags.listed = false;
        tags.writeback.0 = VecDeque::new();
        self.cache.dirty.remove(self.seq)
    }
}

impl FrameOwner for AddressSpace {
    fn try_evict(&self, index: u64) -> bool {
        let mut pages = self.pages.write();
        let Some(folio) = pages.get(&index) else { return true };
        if Arc::strong_count(folio) != 1 {
            return false;
        }
        // PAIRS-WITH: the release in the drop of the last other reference: what its holder did to
        // the folio is seen below. Nobody can take a new one without the page map.
        fence(Ordering::Acquire);
        if folio.has(ALL_DIRTY | WRITEBACK) {
            return false;
        }
        self.detach(folio);
        let gone = pages.remove(&index);
        drop(pages);
        drop(gone);
        self.cache.notify_change(self.id, index, Change::Evicted);
        true
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // A shared frame outlives this address space.
        for (index, folio) in std::mem::take(self.pages.get_mut()) {
            folio.set(DETACHED);
            folio.frame().unmap(&Mapping { owner: self.me.clone(), key: index });
        }
    }
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "address space {} pages {}", self.id, self.nr_pages())
    }
}
