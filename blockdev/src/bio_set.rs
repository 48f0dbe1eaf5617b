//! Bios whose bvec arrays come from a reserve.
//!
//! A bio is a value and needs no memory of its own; its array of bvecs does. A
//! [`BioSet`] keeps `min_nr` arrays of a fixed length and lends one to each bio,
//! which gives it back when it is dropped. [`BioSet::alloc`] waits and never fails;
//! with [`Bio::set_end_io_shared`] writeback then allocates nothing for its bios.
//!
//! Every level that holds a bio of its own while it needs another has its own set;
//! see [`crate::mempool`].

use crate::bio::{Bio, BioFlags, BioOp, BioVec};
use crate::mempool::Mempool;
use crate::units::Sector;

/// A source of bios that never fails.
pub struct BioSet {
    arrays: Mempool<Vec<BioVec>>,
    max_vecs: usize,
}

impl BioSet {
    /// `min_nr` bios at a time for certain, each of up to `max_vecs` bvecs; more
    /// while the allocator gives more.
    pub fn new(min_nr: usize, max_vecs: usize) -> Self {
        let make = move || Vec::with_capacity(max_vecs);
        let alloc = move || {
            let mut vecs = Vec::new();
            vecs.try_reserve_exact(max_vecs).ok()?;
            Some(vecs)
        };
        Self::over(Mempool::new(min_nr, make, alloc), max_vecs)
    }

    /// Exactly `nr` bios at a time and no allocation after this one.
    pub fn reserve_only(nr: usize, max_vecs: usize) -> Self {
        Self::over(Mempool::reserve_only(nr, move || Vec::with_capacity(max_vecs)), max_vecs)
    }

    fn over(arrays: Mempool<Vec<BioVec>>, max_vecs: usize) -> Self {
        Self { arrays, max_vecs }
    }

    /// Most bvecs that a bio of this set takes without allocating.
    pub fn max_vecs(&self) -> usize {
        self.max_vecs
    }

    /// A read or write without memory; waits for another bio's end where there is no
    /// array left.
    pub fn alloc(&self, op: BioOp, flags: BioFlags, sector: Sector) -> Bio {
        Bio::pooled(op, flags, sector, self.arrays.take())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::device::BlockDevice;
    use crate::memory::MemoryDevice;

    #[test]
    fn an_array_is_used_again_and_keeps_its_memory() {
        let set = BioSet::reserve_only(1, 16);
        let buf = Arc::new(AlignedBuf::new(4096));
        let mut bio = set.alloc(BioOp::Write, BioFlags::empty(), Sector(0));
        bio.add_vec(BioVec::whole(buf.clone()));
        let array = bio.vecs().as_ptr();
        drop(bio);

        let again = set.alloc(BioOp::Read, BioFlags::empty(), Sector(8));

        assert_eq!((again.vecs().as_ptr(), again.vecs().len()), (array, 0));
        assert_eq!(Arc::strong_count(&buf), 1, "the memory was let go");
    }

    #[test]
    fn threads_wait_for_bios_and_all_get_through() {
        let set = BioSet::reserve_only(2, 4);
        let dev = MemoryDevice::new(1 << 20);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (set, dev) = (&set, &dev);
                scope.spawn(move || {
                    for n in 0..100 {
                        let sector = Sector(thread * 100 + n);
                        let mut bio = set.alloc(BioOp::Write, BioFlags::empty(), sector);
                        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&[1; 512]))));
                        dev.submit_bio(bio);
                    }
                });
            }
        });
        assert!(dev.snapshot()[..400 * 512].iter().all(|&byte| byte == 1));
        assert_eq!(set.arrays.in_reserve(), 2);
    }
}
