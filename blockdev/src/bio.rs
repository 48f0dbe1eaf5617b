//! The bio: one operation on a run of sectors, over many pieces of memory.
//!
//! Invariants:
//! - The data length of a read or write is the sum of its bvecs; a flush has
//!   none; discard and write-zeroes carry a length and no bvecs.
//! - A bio completes exactly once: the device calls [`Bio::end_io`], which hands
//!   the bio, with its buffers, to who owns it. A bio that is dropped instead
//!   completes with `IoErr`, so nothing can wait for ever.
//! - The I/O rule: from `submit_bio` to `end_io` the memory of a read is written
//!   by the device and nobody else touches it; the memory of a write is read by
//!   the device and nobody changes it. The submitter keeps the rule by its own
//!   locks (folio lock, writeback state); the bio keeps the memory alive.

use std::ptr::NonNull;
use std::sync::Arc;

use bitflags::bitflags;

use crate::status::{BlkResult, BlkStatus};
use crate::units::{SECTOR_SIZE, Sector};

/// What a bio does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BioOp {
    /// Device to memory.
    Read,
    /// Memory to device.
    Write,
    /// Everything completed before its submission becomes durable.
    Flush,
    /// The range's contents are no longer needed.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
}

bitflags! {
    /// Modifiers (`REQ_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct BioFlags: u16 {
        /// Flush the cache before the data of this write.
        const PREFLUSH = 1 << 0;
        /// The data is durable when the bio completes.
        const FUA = 1 << 1;
        /// Metadata.
        const META = 1 << 2;
        /// Somebody waits.
        const SYNC = 1 << 3;
        /// Readahead: may fail without harm.
        const RAHEAD = 1 << 4;
    }
}

/// Memory that a device may read or write while somebody else owns it.
///
/// # Safety
/// `io_ptr` gives `io_len` initialised bytes, page-aligned, that stay valid and
/// in place while any `Arc` of the value lives, and may be written through the
/// pointer under the module's I/O rule.
pub unsafe trait IoBuffer: Send + Sync {
    /// Start of the memory.
    fn io_ptr(&self) -> NonNull<u8>;
    /// Bytes.
    fn io_len(&self) -> usize;
}

/// A piece of memory of a bio (`struct bio_vec`).
#[derive(Clone)]
pub struct BioVec {
    /// The memory.
    pub buf: Arc<dyn IoBuffer>,
    /// Bytes from its start; a multiple of the device's DMA alignment.
    pub offset: u32,
    /// Bytes; a multiple of the device's logical block size.
    pub len: u32,
}

impl BioVec {
    /// A whole buffer.
    ///
    /// # Panics
    /// When it is longer than 4 GiB - 1.
    pub fn whole(buf: Arc<dyn IoBuffer>) -> Self {
        let len = u32::try_from(buf.io_len()).expect("a bvec is shorter than 4 GiB");
        Self { buf, offset: 0, len }
    }

    /// A part of a buffer.
    ///
    /// # Panics
    /// When the range is not inside the buffer.
    pub fn part(buf: Arc<dyn IoBuffer>, offset: u32, len: u32) -> Self {
        assert!(offset as usize + len as usize <= buf.io_len(), "bvec outside its buffer");
        Self { buf, offset, len }
    }

    /// First byte, for an engine.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: the range was checked against the buffer when the bvec was made.
        unsafe { self.buf.io_ptr().as_ptr().add(self.offset as usize) }
    }
}

/// Called once with the finished bio.
pub type EndIo = Box<dyn FnOnce(Bio) + Send>;

/// One operation on a run of sectors.
pub struct Bio {
    op: BioOp,
    flags: BioFlags,
    sector: Sector,
    bytes: u64,
    vecs: Vec<BioVec>,
    status: BlkResult<()>,
    end_io: Option<EndIo>,
}

impl Bio {
    /// A read or write; add memory with [`Bio::add_vec`].
    pub fn new(op: BioOp, flags: BioFlags, sector: Sector) -> Self {
        Self { op, flags, sector, bytes: 0, vecs: Vec::new(), status: Ok(()), end_io: None }
    }

    /// A cache flush.
    pub fn flush() -> Self {
        Self::new(BioOp::Flush, BioFlags::SYNC, Sector(0))
    }

    /// A discard or write-zeroes of `bytes` bytes.
    pub fn range(op: BioOp, sector: Sector, bytes: u64) -> Self {
        assert!(matches!(op, BioOp::Discard | BioOp::WriteZeroes), "only operations without data");
        let mut bio = Self::new(op, BioFlags::empty(), sector);
        bio.bytes = bytes;
        bio
    }

    /// Appends memory.
    pub fn add_vec(&mut self, vec: BioVec) {
        assert!(matches!(self.op, BioOp::Read | BioOp::Write), "only reads and writes carry data");
        self.bytes += u64::from(vec.len);
        self.vecs.push(vec);
    }

    /// Sets what is called when the bio has finished.
    pub fn set_end_io(&mut self, end_io: impl FnOnce(Bio) + Send + 'static) {
        self.end_io = Some(Box::new(end_io));
    }

    /// Completes the bio: called once, by the device.
    pub fn end_io(mut self, status: BlkResult<()>) {
        self.status = status;
        if let Some(end_io) = self.end_io.take() {
            end_io(self);
        }
    }

    /// What it does.
    pub fn op(&self) -> BioOp {
        self.op
    }

    /// Its modifiers.
    pub fn flags(&self) -> BioFlags {
        self.flags
    }

    /// First sector.
    pub fn sector(&self) -> Sector {
        self.sector
    }

    /// First sector after it.
    pub fn end_sector(&self) -> Sector {
        Sector(self.sector.0 + self.bytes / SECTOR_SIZE)
    }

    /// Bytes it moves or covers.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether it moves and covers nothing, as a flush does.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its memory.
    pub fn vecs(&self) -> &[BioVec] {
        &self.vecs
    }

    /// How it ended; `Ok` before it has.
    pub fn status(&self) -> BlkResult<()> {
        self.status
    }
}

impl Drop for Bio {
    fn drop(&mut self) {
        // A device that drops a bio (a dying engine thread) must not leave its owner waiting.
        if let Some(end_io) = self.end_io.take() {
            let empty = Bio::new(self.op, self.flags, self.sector);
            let mut lost = std::mem::replace(self, empty);
            lost.status = Err(BlkStatus::IoErr);
            end_io(lost);
        }
    }
}

impl std::fmt::Debug for Bio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {} +{} {:?}", self.op, self.sector, self.bytes / SECTOR_SIZE, self.flags)
    }
}
