//! A batch of reads or writes by io_uring.
//!
//! Invariants: [`Ring::run`] returns only when every entry of the batch has completed, so
//! the memory it was lent is never the kernel's afterwards.
//!
//! Locks: none; a ring belongs to one thread. Unsafe is here because an entry names memory
//! by its address.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode, types};

use crate::{Direction, Piece};

/// A ring.
pub struct Ring {
    ring: IoUring,
    depth: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("depth", &self.depth).finish_non_exhaustive()
    }
}

impl Ring {
    /// One for `depth` entries at a time.
    ///
    /// # Errors
    /// `ENOSYS` or `EPERM` where the kernel doesn't offer it.
    pub fn new(depth: u32) -> io::Result<Self> {
        Ok(Self { ring: IoUring::new(depth)?, depth: depth as usize })
    }

    /// Runs a batch to its end; the bytes that each piece moved, or its error.
    pub fn run(
        &mut self,
        direction: Direction,
        file: impl AsFd,
        pieces: &mut [Piece<'_>],
    ) -> Vec<io::Result<usize>> {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        let mut results = Vec::with_capacity(pieces.len());
        for chunk in pieces.chunks_mut(self.depth) {
            self.run_chunk(direction, fd, chunk, &mut results);
        }
        results
    }

    fn run_chunk(
        &mut self,
        direction: Direction,
        fd: types::Fd,
        pieces: &mut [Piece<'_>],
        results: &mut Vec<io::Result<usize>>,
    ) {
        let first = results.len();
        for (index, piece) in pieces.iter_mut().enumerate() {
            // A piece is at most some megabytes.
            let len = u32::try_from(piece.memory.len()).expect("a short piece");
            let memory = piece.memory.as_mut_ptr();
            let entry = match direction {
                Direction::Read => opcode::Read::new(fd, memory, len).offset(piece.offset).build(),
                Direction::Write => {
                    opcode::Write::new(fd, memory, len).offset(piece.offset).build()
                }
            };
            // SAFETY: the memory is borrowed until this returns, which is after the last
            // completion; the queue has room for a chunk.
            unsafe { self.ring.submission().push(&entry.user_data(index as u64)) }
                .expect("room in an empty queue");
            results.push(Err(io::ErrorKind::Other.into()));
        }
        let mut left = pieces.len();
        while left > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                // It would leave memory with the kernel that its owner takes back.
                Err(error) => panic!("io_uring_enter: {error}"),
            }
            for completion in self.ring.completion() {
                let slot = usize::try_from(completion.user_data()).ok();
                if let Some(result) = slot.and_then(|slot| results.get_mut(first + slot)) {
                    *result = usize::try_from(completion.result())
                        .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
                }
                left -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::moves_more_than_a_batch;

    #[test]
    fn a_batch_larger_than_the_ring_is_read_back_as_written() {
        let mut ring = Ring::new(4).expect("a ring");
        moves_more_than_a_batch(|direction, file, pieces| {
            let results = ring.run(direction, file, pieces);
            results.into_iter().map(|result| result.expect("moved")).sum()
        });
    }
}
