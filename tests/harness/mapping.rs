//! A shared mapping of a file, for tests.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

/// Bytes of a file, shared with everybody who maps it.
pub struct Mapping {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

impl Mapping {
    /// Maps the first `len` bytes, which the file must keep while this lives.
    pub fn new(file: &File, len: u64) -> Self {
        let len = usize::try_from(len).ok().and_then(NonZeroUsize::new).expect("not empty");
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let start = unsafe { mmap(None, len, rights, MapFlags::MAP_SHARED, file, 0) };
        Self { start: start.expect("mmap"), len }
    }

    /// Copies out of the mapping.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.assert_within(offset, into.len());
        // SAFETY: within the mapping; the destination is ours alone.
        unsafe {
            let from = self.start.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
    }

    /// Copies into the mapping.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.assert_within(offset, bytes.len());
        // SAFETY: within the mapping, which no reference points into.
        unsafe {
            let to = self.start.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// msync(2): what was written is on the disk.
    pub fn sync(&self) {
        // SAFETY: the whole mapping.
        unsafe { msync(self.start, self.len.get(), MsFlags::MS_SYNC) }.expect("msync");
    }

    fn assert_within(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len.get()));
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing points into it any more.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}
