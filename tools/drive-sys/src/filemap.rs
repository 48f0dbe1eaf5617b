//! A file's pages in memory, for reads and writes that are not system calls.
//!
//! Invariants: bytes go in and out by copies, never by a reference, since others may
//! change the file meanwhile. When the disk fails or the file is too short the kernel ends
//! the process with SIGBUS: who uses this must expect that.
//!
//! Locks: none. Unsafe is here because a mapping is a raw address.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

/// The first bytes of a file, mapped.
#[derive(Debug)]
pub struct FileMap {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping is the process's, and reached by copies through `&mut self` or for
// reading.
unsafe impl Send for FileMap {}

impl FileMap {
    /// Maps `len` bytes from the start.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        let protection =
            if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses the address.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, writable })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is no bytes long.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Outside the mapping.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        assert!(offset.checked_add(to.len()).is_some_and(|end| end <= self.len), "inside");
        // SAFETY: inside the mapping; the target is another piece of memory.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.as_ptr().add(offset),
                to.as_mut_ptr(),
                to.len(),
            );
        }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// Outside the mapping, or mapped for reading.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.len), "inside");
        assert!(self.writable, "mapped for reading");
        // SAFETY: inside the mapping, which may be written; the source is other memory.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.as_ptr(),
                self.base.as_ptr().add(offset),
                from.len(),
            );
        }
    }

    /// Has the pages written to the disk.
    ///
    /// # Errors
    /// The disk's.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping.
        unsafe { rustix::mm::msync(self.base.as_ptr().cast(), self.len, MsyncFlags::SYNC) }?;
        Ok(())
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_the_mapping_is_in_the_file() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(8192).expect("room");
        let mut map = FileMap::new(&file, 8192, true).expect("a mapping");
        map.write(4090, b"across pages");
        map.sync().expect("synced");
        let mut seen = [0; 12];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4090).expect("read");
        assert_eq!(&seen, b"across pages");
        map.read(4090, &mut seen[..6]);
        assert_eq!(&seen[..6], b"across");
    }
}
