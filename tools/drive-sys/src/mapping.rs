//! Memory that processes share: a memfd's, or a file's.
//!
//! Invariants: a mapping is shared and stays where it is until it is dropped; what is seen
//! of it are slices of [`Shareable`] types only, which change by atomic operations. Who
//! else has the file must keep to that too, and must not shorten it (the access would end
//! the process, not misread).
//!
//! Locks: none. Unsafe is here because a mapping is a raw address.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

#[cfg(not(any(loom, shuttle)))]
use crate::{Barrier, Gate, RobustMutex};

/// What may lie in memory that other processes change.
///
/// # Safety
/// Every bit pattern is a valid value, the layout is `repr(C)` or `repr(transparent)`, all
/// changes are atomic, and there is nothing to drop.
pub unsafe trait Shareable {}

// SAFETY: atomics are all of that.
unsafe impl Shareable for AtomicU32 {}
// SAFETY: as above.
unsafe impl Shareable for AtomicU64 {}
// SAFETY: made of atomics; a word that makes no sense makes it wait, no more.
#[cfg(not(any(loom, shuttle)))]
unsafe impl Shareable for RobustMutex {}
// SAFETY: made of a word.
#[cfg(not(any(loom, shuttle)))]
unsafe impl Shareable for Gate {}
// SAFETY: made of words.
#[cfg(not(any(loom, shuttle)))]
unsafe impl Shareable for Barrier {}

/// Shared memory.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is the process's, and what is seen of it is shared by its types.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of zeroes without a name, and the file that stands for them: whoever
    /// gets it can map them too.
    ///
    /// # Errors
    /// The kernel's.
    pub fn anonymous(name: &str, len: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        Ok((Self::of(&fd, len)?, fd))
    }

    /// The first `len` bytes of a file, which has them.
    ///
    /// # Errors
    /// The kernel's; a file that is shorter.
    pub fn of(file: impl AsFd, len: usize) -> io::Result<Self> {
        let size = rustix::fs::fstat(&file)?.st_size;
        if usize::try_from(size).is_ok_and(|size| size < len) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "shorter than its contents"));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// As [`Mapping::of`], all of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn whole(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len());
        Self::of(file, len.map_err(|_| io::ErrorKind::OutOfMemory)?)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is no bytes long.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `count` values from byte `offset` on.
    ///
    /// # Panics
    /// Outside the mapping, or not aligned.
    pub fn slice<T: Shareable>(&self, offset: usize, count: usize) -> &[T] {
        let bytes = count.checked_mul(size_of::<T>()).expect("fits in memory");
        let end = offset.checked_add(bytes).expect("fits in memory");
        assert!(end <= self.len, "{end} bytes of a mapping of {}", self.len);
        assert!(offset.is_multiple_of(align_of::<T>()), "{offset} is not aligned");
        // SAFETY: inside the mapping, which lives as long as self; aligned, since the
        // mapping begins at a page; any bytes are a value, and all changes are atomic.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset).cast::<T>(), count) }
    }

    /// Has a file's mapping written to its disk.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping.
        unsafe { rustix::mm::msync(self.base.as_ptr().cast(), self.len, MsyncFlags::SYNC) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody has a slice any more: they borrow self.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}
