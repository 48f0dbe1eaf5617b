//! A plug: one thread's bios, held back until they can go down sorted and merged.
//!
//! Cost on this kind of disk is per request, so adjacent bios of one kind become
//! one request, and all of them one system call. Each bio still ends by itself,
//! with the status of the request that carried it.
//!
//! Invariants:
//! - Nothing is moved across a flush, a PREFLUSH or a FUA: what came before goes
//!   down before it, and what came after, after it. (Who needs a flush to *cover* a
//!   write still has to wait for that write first.)
//! - Only bios with the same operation and flags are merged, and only when the
//!   second starts where the first ends. A request keeps to the device's limits.
//! - At most [`MAX_PLUGGED`] bios are held back.
//!
//! Locks: none; a plug belongs to one thread.

use crate::bio::{Bio, BioFlags, BioOp};
use crate::device::BlockDevice;
use crate::limits::QueueLimits;

/// Bios held back before they go down by themselves.
pub const MAX_PLUGGED: usize = 256;

/// Gathers bios; they go down with [`Plug::finish`], or when the plug is dropped.
#[must_use]
pub struct Plug<'a> {
    dev: &'a dyn BlockDevice,
    bios: Vec<Bio>,
}

impl<'a> Plug<'a> {
    /// An empty plug in front of a device.
    pub fn new(dev: &'a dyn BlockDevice) -> Self {
        Self { dev, bios: Vec::new() }
    }

    /// Holds a bio back for a while.
    pub fn submit_bio(&mut self, bio: Bio) {
        self.bios.push(bio);
        if self.bios.len() >= MAX_PLUGGED {
            self.unplug();
        }
    }

    /// How many bios are held back.
    pub fn len(&self) -> usize {
        self.bios.len()
    }

    /// Whether no bio is held back.
    pub fn is_empty(&self) -> bool {
        self.bios.is_empty()
    }

    /// Sends everything down.
    pub fn finish(mut self) {
        self.unplug();
    }

    fn unplug(&mut self) {
        let limits = self.dev.limits();
        let mut batch = Vec::new();
        let mut section = Vec::new();
        for bio in std::mem::take(&mut self.bios) {
            if is_barrier(&bio) {
                merge(&mut section, limits, &mut batch);
                self.submit(&mut batch);
                self.dev.submit_bio(bio);
            } else {
                section.push(bio);
            }
        }
        merge(&mut section, limits, &mut batch);
        self.submit(&mut batch);
    }

    fn submit(&self, batch: &mut Vec<Bio>) {
        if !batch.is_empty() {
            self.dev.submit_bios(std::mem::take(batch));
        }
    }
}

impl Drop for Plug<'_> {
    fn drop(&mut self) {
        self.unplug();
    }
}

/// Whether the order towards this bio may mean something.
fn is_barrier(bio: &Bio) -> bool {
    bio.op() == BioOp::Flush || bio.flags().intersects(BioFlags::PREFLUSH | BioFlags::FUA)
}

/// Sorts the bios and appends them to `batch`, adjacent ones as one.
fn merge(bios: &mut Vec<Bio>, limits: &QueueLimits, batch: &mut Vec<Bio>) {
    // Stable, so that bios on the same sector stay in their order.
    bios.sort_by_key(Bio::sector);
    let mut run: Vec<Bio> = Vec::new();
    let mut size = Size::default();
    for bio in bios.drain(..) {
        let next = Size::of(&bio);
        let fits = run.last().is_some_and(|last| can_follow(last, &bio))
            && size.plus(next).is_within(limits)
            // What the device will refuse must not take its neighbours with it.
            && limits.check(&bio).is_ok();
        if !fits {
            flush_run(&mut run, batch);
            size = Size::default();
        }
        size = size.plus(next);
        run.push(bio);
    }
    flush_run(&mut run, batch);
}

#[derive(Clone, Copy, Default)]
struct Size {
    bytes: u64,
    segments: usize,
}

impl Size {
    fn of(bio: &Bio) -> Self {
        Self { bytes: bio.len(), segments: bio.vecs().len() }
    }

    fn plus(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { bytes, segments: self.segments + other.segments }
    }

    fn is_within(self, limits: &QueueLimits) -> bool {
        self.bytes <= u64::from(limits.max_bytes)
            && self.segments <= usize::from(limits.max_segments)
    }
}

/// Whether the second can be in one request behind the first.
fn can_follow(first: &Bio, second: &Bio) -> bool {
    matches!(first.op(), BioOp::Read | BioOp::Write)
        && first.op() == second.op()
        && first.flags() == second.flags()
        // Sectors may be from a damaged image, so no sum that could overflow.
        && second.sector().0.checked_sub(first.sector().0) == Some(first.len() / 512)
        && !first.is_empty()
        && first.len().is_multiple_of(512)
}

/// Appends a run of adjacent bios as one request.
fn flush_run(run: &mut Vec<Bio>, batch: &mut Vec<Bio>) {
    if run.len() <= 1 {
        batch.append(run);
        return;
    }
    let run = std::mem::take(run);
    let mut merged = Bio::new(run[0].op(), run[0].flags(), run[0].sector());
    merged.reserve_vecs(run.iter().map(|bio| bio.vecs().len()).sum());
    for vec in run.iter().flat_map(|bio| bio.vecs()) {
        merged.add_vec(vec.clone());
    }
    merged.set_end_io(move |merged| {
        for bio in run {
            bio.end_io(merged.status());
        }
    });
    batch.push(merged);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;
    use uext_sync::Mutex;

    use super::*;
    use crate::aligned::AlignedBuf;
    use crate::bio::BioVec;
    use crate::dm::flakey::{Action, Flakey, Ops, Rule, When};
    use crate::memory::MemoryDevice;
    use crate::status::{BlkResult, BlkStatus};
    use crate::units::Sector;

    /// Notes what comes down, and how many calls brought it.
    struct Noting {
        lower: Arc<dyn BlockDevice>,
        seen: Mutex<Vec<(BioOp, u64, u64)>>,
        calls: Mutex<usize>,
    }

    impl Noting {
        fn new(lower: Arc<dyn BlockDevice>) -> Self {
            Self { lower, seen: Mutex::default(), calls: Mutex::default() }
        }
        fn seen(&self) -> Vec<(BioOp, u64, u64)> {
            self.seen.lock().clone()
        }
    }

    impl BlockDevice for Noting {
        fn limits(&self) -> &QueueLimits {
            self.lower.limits()
        }
        fn submit_bio(&self, bio: Bio) {
            self.submit_bios(vec![bio]);
        }
        fn submit_bios(&self, bios: Vec<Bio>) {
            *self.calls.lock() += 1;
            for bio in bios {
                self.seen.lock().push((bio.op(), bio.sector().0, bio.len() / 512));
                self.lower.submit_bio(bio);
            }
        }
    }

    type Ended = (u64, BlkResult<()>);

    fn write(sector: u64, sectors: u64, flags: BioFlags, ended: &Sender<Ended>) -> Bio {
        let mut bio = Bio::new(BioOp::Write, flags, Sector(sector));
        let data: Vec<u8> =
            (0..sectors * 512).map(|n| sector.wrapping_add(n / 512) as u8).collect();
        bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&data))));
        let ended = ended.clone();
        bio.set_end_io(move |bio| {
            assert_eq!(bio.vecs().len(), 1, "its own memory");
            let _ = ended.send((bio.sector().0, bio.status()));
        });
        bio
    }

    fn ends() -> (Sender<Ended>, Receiver<Ended>) {
        channel()
    }

    const NONE: BioFlags = BioFlags::empty();

    #[test]
    fn adjacent_bios_go_down_sorted_and_as_one() {
        let dev = Noting::new(MemoryDevice::new(1 << 20));
        let (send, recv) = ends();
        let mut plug = Plug::new(&dev);
        for sector in [24, 8, 16, 100, 0] {
            plug.submit_bio(write(sector, 8, NONE, &send));
        }
        plug.finish();
        drop(send);

        assert_eq!(dev.seen(), [(BioOp::Write, 0, 32), (BioOp::Write, 100, 8)]);
        assert_eq!(*dev.calls.lock(), 1);
        let ended: Vec<_> = recv.iter().collect();
        assert_eq!(ended, [0, 8, 16, 24, 100].map(|sector| (sector, Ok(()))));
    }

    #[test]
    fn nothing_moves_across_a_flush_or_fua() {
        let dev = Noting::new(MemoryDevice::new(1 << 20));
        let (send, _recv) = ends();
        let mut plug = Plug::new(&dev);
        plug.submit_bio(write(16, 8, NONE, &send));
        plug.submit_bio(write(8, 8, NONE, &send));
        plug.submit_bio(Bio::flush());
        plug.submit_bio(write(0, 8, NONE, &send));
        plug.submit_bio(write(24, 8, BioFlags::FUA, &send));
        plug.submit_bio(write(32, 8, NONE, &send));
        drop(plug);

        let sectors: Vec<_> = dev.seen().iter().map(|seen| (seen.1, seen.2)).collect();
        assert_eq!(sectors, [(8, 16), (0, 0), (0, 8), (24, 8), (32, 8)]);
    }

    #[test]
    fn a_failed_request_fails_every_bio_in_it_and_no_other() {
        let flakey = Flakey::new(MemoryDevice::new(1 << 20), 1);
        flakey
            .add(Rule::new(Ops::WRITE, When::From(1), Action::Fail(BlkStatus::IoErr)).within(8..9));
        let (send, recv) = ends();
        let mut plug = Plug::new(&*flakey);
        for sector in [0, 8, 16, 100] {
            plug.submit_bio(write(sector, 8, NONE, &send));
        }
        plug.finish();
        drop(send);

        let failed = [0, 8, 16].map(|sector| (sector, Err(BlkStatus::IoErr)));
        assert_eq!(recv.iter().collect::<Vec<_>>(), [&failed[..], &[(100, Ok(()))]].concat());
    }

    #[test]
    fn a_sector_from_a_damaged_image_fails_alone() {
        let memory = MemoryDevice::new(1 << 20);
        let (send, recv) = ends();
        let mut plug = Plug::new(&*memory);
        for sector in [u64::MAX - 3, 2040, 2048] {
            plug.submit_bio(write(sector, 8, NONE, &send));
        }
        plug.finish();
        drop(send);
        let wrong = Err(BlkStatus::Invalid);
        let expected = [(2040, Ok(())), (2048, wrong), (u64::MAX - 3, wrong)];
        assert_eq!(recv.iter().collect::<Vec<_>>(), expected);
    }

    proptest! {
        #[test]
        fn merged_writes_leave_what_single_ones_would(
            order in Just((0..64u64).collect::<Vec<_>>()).prop_shuffle(),
            take in 1usize..64,
            max_sectors in 1u64..40,
            max_segments in 1u16..10,
        ) {
            /// Memory with limits of the test's.
            struct Small(Arc<MemoryDevice>, QueueLimits);
            impl BlockDevice for Small {
                fn limits(&self) -> &QueueLimits { &self.1 }
                fn submit_bio(&self, bio: Bio) {
                    let within = bio.vecs().len() == 1
                        || (bio.len() <= u64::from(self.1.max_bytes)
                            && bio.vecs().len() <= usize::from(self.1.max_segments));
                    assert!(within, "{bio:?}");
                    self.0.submit_bio(bio);
                }
            }
            let memory = MemoryDevice::new(64 * 8 * 512);
            let mut limits = memory.limits().clone();
            limits.max_bytes = (max_sectors * 512) as u32;
            limits.max_segments = max_segments;
            let dev = Small(memory.clone(), limits);
            let (send, recv) = ends();
            let mut model = vec![0; 64 * 8 * 512];
            let mut plug = Plug::new(&dev);
            for &block in &order[..take] {
                let sectors = 4 + block % 5;
                let bio = write(block * 8, sectors, NONE, &send);
                let start = block as usize * 4096;
                model[start..start + bio.len() as usize].copy_from_slice(&bio.data());
                plug.submit_bio(bio);
            }
            plug.finish();
            drop(send);
            let mut ended: Vec<_> = recv.iter().map(|(sector, status)| { status.unwrap(); sector / 8 }).collect();
            ended.sort_unstable();
            let mut expected = order[..take].to_vec();
            expected.sort_unstable();
            prop_assert_eq!(ended, expected);
            prop_assert!(memory.snapshot() == model);
        }
    }
}
