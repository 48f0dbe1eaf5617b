//! Frames, folios, address spaces, the reverse map and writeback.
//!
//! A [`PageCache`] has one memory limit and one flusher thread. From it are made
//! - a [`BufferCache`] per device: metadata, found by block number, as [`Buffer`]s;
//! - an [`AddressSpace`] per inode: file data, found by page index, as [`Folio`]s.
//!
//! Both live in [`Frame`]s: aligned pages of large slabs, which know who maps them
//! (`rmap`), so that reclaim goes over memory, not over files.
//!
//! Promises:
//! - What is dirty is written, or reported and logged; it is never dropped silently.
//! - The contents of a page or block being written do not change under the device.
//! - Allocation never fails; the limit is exceeded only by what cannot be dropped, after
//!   a bounded wait.
//!
//! Locks, outermost first:
//! 1. contents of a page or buffer (may be held across I/O, and released elsewhere),
//!    by rising index or block number; before them come a filesystem's inode lock and
//!    the start of a journal handle;
//! 2. a buffer's journal state;
//! 3. tags of an address space, dirty set of a buffer cache (writes under way are waited
//!    for on these);
//! 4. list of dirty address spaces;
//! 5. leaves: page map or shard, then the reverse map of a frame; frame pool; flusher state.
//!
//! Nothing is allocated from the pool, and nothing waited for, under 2 to 5 except on the
//! conditions of 3.

mod address_space;
mod buffer;
mod buffer_cache;
mod cache;
mod errseq;
mod folio;
mod frame;
#[cfg(all(test, loom))]
mod loom_model;
#[cfg(all(test, shuttle))]
mod model;
mod number_map;
mod readahead;
mod reclaim;
mod rmap;
mod writeback;

pub use address_space::{
    AddressSpace, AddressSpaceOps, MOST_TOGETHER, WritebackControl, WritebackReason,
};
pub use buffer::{
    BLOCK_CONTENTS, Buffer, BufferHead, BufferOwnedReadGuard, BufferReadGuard, BufferWriteGuard,
    JournalHead,
};
pub use buffer_cache::{BufferCache, CheckpointHook};
pub use cache::{CacheConfig, CacheStats, Change, ChangeListener, PageCache};
pub use errseq::{ErrSeq, ErrSeqMark, WritebackError};
pub use folio::{
    Folio, FolioBlocks, FolioReadGuard, FolioWriteGuard, PAGE_CONTENTS, WritebackGuard,
};
pub use frame::{Frame, PAGE_SIZE};
pub use number_map::{NumberHasher, NumberMap};
pub use readahead::ReadaheadState;
pub use reclaim::NoWaitScope;
