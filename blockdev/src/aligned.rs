//! Page-aligned memory for direct I/O.
//!
//! Invariants: an [`AlignedBuf`] is zeroed at creation, its address is a
//! multiple of 4096, and its length never changes. It is exclusively owned
//! until it becomes an [`IoBuffer`](crate::IoBuffer) behind an `Arc`; then
//! whoever holds the `Arc` follows the I/O rule of [`crate::bio`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::bio::IoBuffer;

/// Alignment of every buffer, bytes: the page size, which satisfies every device.
pub const BUFFER_ALIGN: usize = 4096;

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
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, len }
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
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
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
