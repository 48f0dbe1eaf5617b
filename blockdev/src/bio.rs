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

use crate::mempool::Pooled;
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

    /// First byte, for an engine, which may use the `len` bytes from there.
    ///
    /// # Panics
    /// When the range is not inside the buffer: the fields are public, so the
    /// check stands where the pointer is made.
    pub fn as_ptr(&self) -> *mut u8 {
        let end = self.offset as usize + self.len as usize;
        assert!(end <= self.buf.io_len(), "bvec outside its buffer");
        // SAFETY: the range was just checked against the buffer.
        unsafe { self.buf.io_ptr().as_ptr().add(self.offset as usize) }
    }

    /// Device side: copies the memory out, under the module's I/O rule (the
    /// caller carries the bio; nobody changes the memory meanwhile).
    ///
    /// # Panics
    /// When `dst` is not `len` bytes long.
    pub fn copy_to_slice(&self, dst: &mut [u8]) {
        assert_eq!(dst.len(), self.len as usize, "length of a bvec copy");
        // SAFETY: `as_ptr` checks the range, `dst` is exclusively borrowed, and
        // the I/O rule keeps others from writing the source.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), dst.as_mut_ptr(), dst.len()) }
    }

    /// Device side: fills the memory, under the module's I/O rule (the caller
    /// carries the bio; nobody else touches the memory meanwhile).
    ///
    /// # Panics
    /// When `src` is not `len` bytes long.
    pub fn copy_from_slice(&self, src: &[u8]) {
        assert_eq!(src.len(), self.len as usize, "length of a bvec copy");
        // SAFETY: as for `copy_to_slice`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), self.as_ptr(), src.len()) }
    }

    /// The part of this bvec from `skip` on, at most `len` bytes.
    fn sub(&self, skip: u32, len: u32) -> Self {
        Self { buf: self.buf.clone(), offset: self.offset + skip, len: len.min(self.len - skip) }
    }
}

/// Completes many bios without a closure for each: writeback, which must not
/// allocate, shares one handler and tells its bios apart by [`Bio::private`].
pub trait BioEndIo: Send + Sync {
    /// Called once with each finished bio.
    fn end_io(&self, bio: Bio);
}

/// What is called once with the finished bio.
pub enum EndIo {
    /// A closure of this bio.
    Once(Box<dyn FnOnce(Bio) + Send>),
    /// A handler shared by many bios; setting and calling it allocates nothing.
    Shared(Arc<dyn BioEndIo>),
}

impl EndIo {
    fn call(self, bio: Bio) {
        match self {
            Self::Once(end_io) => end_io(bio),
            Self::Shared(handler) => handler.end_io(bio),
        }
    }
}

/// One operation on a run of sectors.
pub struct Bio {
    op: BioOp,
    flags: BioFlags,
    sector: Sector,
    bytes: u64,
    vecs: Vec<BioVec>,
    status: BlkResult<()>,
    private: u64,
    end_io: Option<EndIo>,
    /// Where the array of bvecs goes back to.
    home: Option<Pooled<Vec<BioVec>>>,
}

impl Bio {
    /// A read or write; add memory with [`Bio::add_vec`].
    pub fn new(op: BioOp, flags: BioFlags, sector: Sector) -> Self {
        Self {
            op,
            flags,
            sector,
            bytes: 0,
            vecs: Vec::new(),
            status: Ok(()),
            private: 0,
            end_io: None,
            home: None,
        }
    }

    /// As [`Bio::new`], with a bvec array that goes back to its pool with the bio's drop.
    pub(crate) fn pooled(
        op: BioOp,
        flags: BioFlags,
        sector: Sector,
        mut home: Pooled<Vec<BioVec>>,
    ) -> Self {
        let mut bio = Self::new(op, flags, sector);
        bio.vecs = std::mem::take(&mut *home);
        bio.home = Some(home);
        bio
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

    /// Makes room for so many pieces of memory, so that appending them allocates nothing.
    pub(crate) fn reserve_vecs(&mut self, count: usize) {
        self.vecs.reserve_exact(count);
    }

    /// Appends memory.
    pub fn add_vec(&mut self, vec: BioVec) {
        assert!(matches!(self.op, BioOp::Read | BioOp::Write), "only reads and writes carry data");
        self.bytes += u64::from(vec.len);
        self.vecs.push(vec);
    }

    /// Sets what is called when the bio has finished.
    pub fn set_end_io(&mut self, end_io: impl FnOnce(Bio) + Send + 'static) {
        self.end_io = Some(EndIo::Once(Box::new(end_io)));
    }

    /// Sets a shared handler that is called when the bio has finished; allocates nothing.
    pub fn set_end_io_shared(&mut self, handler: Arc<dyn BioEndIo>) {
        self.end_io = Some(EndIo::Shared(handler));
    }

    /// Takes what would be called, for a layer that completes the bio in another
    /// way. A bio without it completes silently.
    pub fn take_end_io(&mut self) -> Option<EndIo> {
        self.end_io.take()
    }

    /// Puts back what [`Bio::take_end_io`] took.
    pub fn restore_end_io(&mut self, end_io: Option<EndIo>) {
        self.end_io = end_io;
    }

    /// Changes the modifiers, for a layer that does part of the work itself.
    pub fn set_flags(&mut self, flags: BioFlags) {
        self.flags = flags;
    }

    /// Moves the bio to another place, for a layer that maps sectors.
    pub fn set_sector(&mut self, sector: Sector) {
        self.sector = sector;
    }

    /// A number of the submitter's, carried along (`bi_private`).
    pub fn private(&self) -> u64 {
        self.private
    }

    /// Sets [`Bio::private`].
    pub fn set_private(&mut self, private: u64) {
        self.private = private;
    }

    /// A bio over the same memory for `bytes` bytes from `skip` on, with the same
    /// operation and flags and no `end_io`: a piece of a split, or a copy to try
    /// again with.
    ///
    /// # Panics
    /// When the range is not inside the bio.
    pub fn piece(&self, skip: u64, bytes: u64) -> Self {
        assert!(skip.checked_add(bytes).is_some_and(|end| end <= self.bytes), "piece outside bio");
        let mut piece = Self::new(self.op, self.flags, Sector(self.sector.0 + skip / SECTOR_SIZE));
        if self.vecs.is_empty() {
            piece.bytes = bytes;
            return piece;
        }
        let (mut skip, mut left) = (skip, bytes);
        for vec in &self.vecs {
            let len = u64::from(vec.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            if left == 0 {
                break;
            }
            // Both fit: `skip` is below the bvec's length, `left` is capped by it.
            let part = vec.sub(skip as u32, left.min(u64::from(u32::MAX)) as u32);
            left -= u64::from(part.len);
            skip = 0;
            piece.add_vec(part);
        }
        piece
    }

    /// Device side: a copy of a write's data.
    pub fn data(&self) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(self.bytes).unwrap_or(usize::MAX)];
        let mut rest = data.as_mut_slice();
        for vec in &self.vecs {
            let (part, tail) = rest.split_at_mut(vec.len as usize);
            vec.copy_to_slice(part);
            rest = tail;
        }
        data
    }

    /// Device side: gives a read its data.
    ///
    /// # Panics
    /// When `data` is not as long as the bio.
    pub fn fill(&self, data: &[u8]) {
        assert_eq!(data.len() as u64, self.bytes, "length of a read's data");
        let mut rest = data;
        for vec in &self.vecs {
            let (part, tail) = rest.split_at(vec.len as usize);
            vec.copy_from_slice(part);
            rest = tail;
        }
    }

    /// Completes the bio: called once, by the device.
    pub fn end_io(mut self, status: BlkResult<()>) {
        self.status = status;
        if let Some(end_io) = self.end_io.take() {
            end_io.call(self);
        }
    }

    /// Notes how it ended without calling `end_io`, where its submitter waits for it.
    pub fn set_status(&mut self, status: BlkResult<()>) {
        self.status = status;
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

    /// First sector after it; the last there is, where the sum is no sector (a bio
    /// that no device takes).
    pub fn end_sector(&self) -> Sector {
        Sector(self.sector.0.saturating_add(self.bytes / SECTOR_SIZE))
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
            end_io.call(lost);
        } else if let Some(mut home) = self.home.take() {
            self.vecs.clear();
            *home = std::mem::take(&mut self.vecs);
        }
    }
}

impl std::fmt::Debug for Bio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {} +{} {:?}", self.op, self.sector, self.bytes / SECTOR_SIZE, self.flags)
    }
}
