//! Page-aligned memory for direct I/O.
//!
//! Invariants: an [`AlignedBuf`] is zeroed at creation, its address is a
//! multiple of 4096, and its length never changes. It is exclusively owned
//! until it becomes an [`IoBuffer`](crate::IoBuffer) behind an `Arc`; then
//! whoever holds the `Arc` follows the I/O rule of [`crate::bio`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::bio::IoBuffer;

/// Alignment of every buffer, bytes: the page size, which satisfies every device.
pub const BUFFER_ALIGN: usize = 4096;

/// From this many bytes on memory is a mapping of its own. Its pages are zeroes when they come,
/// with their first use, where an allocator would write them all before.
const MAP_BYTES: usize = 128 << 10;

/// Zeroed, page-aligned memory.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is owned by the value and reached only through it.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference gives only shared access.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zeroed bytes; `len` may be any size, also 0.
    pub fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        let ptr = match NonZeroUsize::new(len).filter(|&len| Self::is_mapped(len.get())) {
            Some(len) => Self::map(len),
            // SAFETY: the layout's size is not zero.
            None => NonNull::new(unsafe { alloc_zeroed(layout) }),
        };
        let Some(ptr) = ptr else { handle_alloc_error(layout) };
        Self { ptr, len }
    }

    fn is_mapped(len: usize) -> bool {
        len >= MAP_BYTES
    }

    fn map(len: NonZeroUsize) -> Option<NonNull<u8>> {
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses a place where nothing is.
        let mapped = unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) };
        mapped.ok().map(NonNull::cast)
    }

    /// Has the kernel give the pages of a large buffer now, all with one call; where it does not,
    /// they come with their first use.
    pub fn populate(&self) {
        if Self::is_mapped(self.len) {
            // SAFETY: the mapping is the value's own, and its contents stay as they are.
            let _ = unsafe { madvise(self.ptr.cast(), self.len, MmapAdvise::MADV_POPULATE_WRITE) };
        }
    }

    /// A copy of `data`.
    pub fn from_slice(data: &[u8]) -> Self {
        let mut buf = Self::new(data.len());
        buf.copy_from_slice(data);
        buf
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), BUFFER_ALIGN).expect("buffer length fits in isize")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if Self::is_mapped(self.len) {
            // SAFETY: mapped in `new` with the same length; nobody has it any more.
            let unmapped = unsafe { munmap(self.ptr.cast(), self.len) };
            debug_assert_eq!(unmapped, Ok(()));
        } else {
            // SAFETY: allocated in `new` with the same layout.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is initialised, `len` bytes long and owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and self is exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

// SAFETY: the memory stays valid and in place until the value is dropped.
unsafe impl IoBuffer for AlignedBuf {
    fn io_ptr(&self) -> NonNull<u8> {
        self.ptr
    }
    fn io_len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_writable_whatever_its_length() {
        for len in [0, 1, 4096, MAP_BYTES - 1, MAP_BYTES, MAP_BYTES + 1, 1 << 20] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!((buf.len(), buf.as_ptr().addr() % BUFFER_ALIGN), (len, 0));
            assert!(buf.iter().all(|&byte| byte == 0));
            buf.fill(7);
            assert!(AlignedBuf::from_slice(&buf)[..] == buf[..]);
        }
    }
}
