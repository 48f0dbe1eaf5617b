//! What `uext drive` needs below safe Rust, and nothing else.
//!
//! - [`Word`]: 32 bits that threads of several processes wait on (futex);
//! - [`RobustMutex`], [`Gate`], [`Barrier`]: made of words, for shared memory;
//! - [`Mapping`]: memory that processes share, seen as slices of the above;
//! - [`FileMap`]: a file's pages, for mapped I/O;
//! - [`Aio`], [`Ring`]: a batch of reads or writes by Linux AIO and by io_uring.
//!
//! All of it has a safe face; each unsafe block says what it stands on. The futex modules
//! take their atomics from `uext_sync`, so loom runs the same code with a futex of its own
//! (see [`word`]).
//!
//! Locks: a [`RobustMutex`] is the only one; nothing here takes two.

pub mod aio;
pub mod barrier;
pub mod filemap;
pub mod gate;
#[cfg(all(test, loom))]
mod loom_model;
pub mod mapping;
pub mod mutex;
mod robust_list;
pub mod uring;
pub mod word;

pub use aio::Aio;
pub use barrier::Barrier;
pub use filemap::FileMap;
pub use gate::Gate;
pub use mapping::{Mapping, Shareable};
pub use mutex::{Locked, RobustMutex};
pub use uring::Ring;
pub use word::Word;

/// One read or write of a batch: where in the file, and the memory.
#[derive(Debug)]
pub struct Piece<'a> {
    /// Bytes from the file's start.
    pub offset: u64,
    /// What is written, or where what is read goes.
    pub memory: &'a mut [u8],
}

/// Direction of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Writes more pieces than a batch of 4 takes, and reads them back.
    pub(crate) fn moves_more_than_a_batch(
        mut run: impl FnMut(Direction, &File, &mut [Piece<'_>]) -> usize,
    ) {
        let file = tempfile::tempfile().expect("a file");
        let mut moved = |memory: &mut [Vec<u8>], direction| {
            let mut pieces: Vec<Piece<'_>> = memory
                .iter_mut()
                .enumerate()
                .map(|(n, memory)| Piece { offset: n as u64 * 4096, memory })
                .collect();
            run(direction, &file, &mut pieces)
        };
        let mut memory: Vec<Vec<u8>> = (0..19u8).map(|n| vec![n; 4096]).collect();
        assert_eq!(moved(&mut memory, Direction::Write), 19 * 4096);
        let mut back = vec![vec![0xff; 4096]; 19];
        assert_eq!(moved(&mut back, Direction::Read), 19 * 4096);
        assert_eq!(back, memory);
    }
}
