//! A closed loop of bios: so many in flight, and the end of one submits the next.
//!
//! The next bio is submitted from `end_io`, in the thread that the engine completes
//! bios in: with one thread that reaps and submits the loop is what fio's is. With a
//! plug, `end_io` gathers until half of the depth is back and sends these together.
//!
//! Locks: `state`, held over no submission.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use uext_blockdev::bio::BioEndIo;
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, FileDevice, Plug, Sector,
};
use uext_sync::{Condvar, Mutex};

/// What goes round.
pub(super) struct Load {
    pub(super) write: bool,
    pub(super) random: bool,
    /// Bytes per bio.
    pub(super) block_size: u64,
    /// Bios in flight.
    pub(super) depth: u32,
    pub(super) plug: bool,
    /// Bytes from the device's start that are used.
    pub(super) area: u64,
    pub(super) seed: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    pub(super) iops: f64,
    pub(super) bytes_per_second: f64,
    /// Of a bio, from its submission to its end, microseconds.
    pub(super) mean_us: f64,
    pub(super) p99_us: f64,
}

impl Load {
    /// Runs for `time` and a tenth of it before, which doesn't count.
    ///
    /// # Errors
    /// What the load or the device doesn't allow, and the first error of a bio.
    pub(super) fn run(&self, dev: Arc<FileDevice>, time: Duration) -> Result<Figures, String> {
        let blocks = self.area / self.block_size.max(1);
        if self.block_size == 0 || blocks == 0 {
            return Err(format!("the device is smaller than {} bytes", self.block_size));
        }
        let logical = u64::from(dev.limits().logical_block_size);
        if !self.block_size.is_multiple_of(logical) {
            return Err(format!("{} is not a multiple of {logical}", self.block_size));
        }
        let depth = self.depth as usize;
        let wheel = Arc::new_cyclic(|this| Wheel {
            this: this.clone(),
            dev: dev.clone(),
            op: if self.write { BioOp::Write } else { BioOp::Read },
            random: self.random,
            sectors: self.block_size / 512,
            blocks,
            batch: if self.plug { depth.div_ceil(2) } else { 1 },
            state: Mutex::new(State {
                next: 0,
                rng: self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                started: vec![Instant::now(); depth],
                back: Vec::with_capacity(depth),
                counting: false,
                stopping: false,
                in_flight: 0,
                ended: 0,
                sum: Duration::ZERO,
                histogram: Histogram::default(),
                error: None,
            }),
            idle: Condvar::new(),
        });
        let len = usize::try_from(self.block_size).map_err(|error| error.to_string())?;
        let mut first = Vec::with_capacity(depth);
        for slot in 0..depth {
            let mut buf = AlignedBuf::new(len);
            buf.fill(slot as u8 ^ 0xa5);
            first.push((slot as u64, BioVec::whole(Arc::new(buf))));
        }
        wheel.clone().send(first);
        std::thread::sleep(time / 10);
        let start = Instant::now();
        wheel.state.lock().counting = true;
        std::thread::sleep(time);
        let mut state = wheel.state.lock();
        let (elapsed, ended) = (start.elapsed(), state.ended);
        state.stopping = true;
        while state.in_flight > 0 {
            wheel.idle.wait(&mut state);
        }
        let error = state.error;
        let (sum, p99_us) = (state.sum, state.histogram.percentile(0.99));
        drop(state);
        // The last bios still hold it for a moment, and through it the file's lock.
        while Arc::strong_count(&wheel) > 1 {
            std::thread::yield_now();
        }
        if let Some(status) = error {
            return Err(format!("a bio failed: {status}"));
        }
        let iops = ended as f64 / elapsed.as_secs_f64();
        Ok(Figures {
            iops,
            bytes_per_second: iops * self.block_size as f64,
            mean_us: sum.as_secs_f64() * 1e6 / (ended.max(1) as f64),
            p99_us,
        })
    }
}

/// What all bios of a load share.
struct Wheel {
    dev: Arc<FileDevice>,
    op: BioOp,
    random: bool,
    /// Sectors per bio.
    sectors: u64,
    /// Bios that the area holds.
    blocks: u64,
    /// Bios that go down together.
    batch: usize,
    /// Itself, for the bios to come.
    this: Weak<Wheel>,
    state: Mutex<State>,
    /// Nothing is in flight any more.
    idle: Condvar,
}

struct State {
    next: u64,
    rng: u64,
    /// When the bio of each slot went down.
    started: Vec<Instant>,
    /// Slots whose bios have ended and wait for others.
    back: Vec<(u64, BioVec)>,
    counting: bool,
    stopping: bool,
    in_flight: usize,
    ended: u64,
    sum: Duration,
    histogram: Histogram,
    error: Option<BlkStatus>,
}

impl Wheel {
    /// Sends a bio for each slot.
    fn send(self: Arc<Self>, slots: Vec<(u64, BioVec)>) {
        let now = Instant::now();
        let mut bios = Vec::with_capacity(slots.len());
        {
            let mut state = self.state.lock();
            state.in_flight += slots.len();
            for (slot, vec) in slots {
                let block = state.next_block(self.random, self.blocks);
                let mut bio = Bio::new(self.op, BioFlags::empty(), Sector(block * self.sectors));
                bio.add_vec(vec);
                bio.set_private(slot);
                bio.set_end_io_shared(self.clone());
                state.started[slot as usize] = now;
                bios.push(bio);
            }
        }
        if self.batch == 1 {
            for bio in bios {
                self.dev.submit_bio(bio);
            }
        } else {
            let mut plug = Plug::new(&*self.dev);
            for bio in bios {
                plug.submit_bio(bio);
            }
            plug.finish();
        }
    }

    /// Counts a bio; the slots to send next.
    fn count(&self, bio: &Bio) -> Vec<(u64, BioVec)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let slot = bio.private();
        let took = now - state.started[slot as usize];
        state.in_flight -= 1;
        if let Err(status) = bio.status() {
            state.error.get_or_insert(status);
            state.stopping = true;
        }
        if state.counting && !state.stopping {
            state.ended += 1;
            state.sum += took;
            state.histogram.add(took);
        }
        if state.stopping {
            if state.in_flight == 0 {
                self.idle.notify_all();
            }
            return Vec::new();
        }
        state.back.push((slot, bio.vecs()[0].clone()));
        if state.back.len() < self.batch { Vec::new() } else { std::mem::take(&mut state.back) }
    }
}

impl BioEndIo for Wheel {
    fn end_io(&self, bio: Bio) {
        let slots = self.count(&bio);
        if let (false, Some(this)) = (slots.is_empty(), self.this.upgrade()) {
            this.send(slots);
        }
    }
}

impl State {
    fn next_block(&mut self, random: bool, blocks: u64) -> u64 {
        if random {
            // xorshift64
            self.rng ^= self.rng << 13;
            self.rng ^= self.rng >> 7;
            self.rng ^= self.rng << 17;
            return self.rng % blocks;
        }
        let block = self.next;
        self.next = (block + 1) % blocks;
        block
    }
}

/// Times by size: eight steps to each doubling, from 1 microsecond.
struct Histogram {
    counts: [u64; 8 * 32],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; 8 * 32] }
    }
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let us = (took.as_secs_f64() * 1e6).max(1.0);
        // At least 0, since `us` is at least 1.
        let step = (us.log2() * 8.0) as usize;
        self.counts[step.min(self.counts.len() - 1)] += 1;
    }

    /// The upper end of the step that holds the percentile, microseconds.
    fn percentile(&self, part: f64) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let mut left = (total as f64 * part) as u64;
        for (step, count) in self.counts.iter().enumerate() {
            if *count > left {
                return ((step + 1) as f64 / 8.0).exp2();
            }
            left -= count;
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_within_a_step_of_the_truth() {
        let mut histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.add(Duration::from_micros(us));
        }
        for (part, truth) in [(0.5, 500.0), (0.99, 990.0)] {
            let ratio = histogram.percentile(part) / truth;
            assert!((1.0..1.1).contains(&ratio), "{part}: {ratio}");
        }
    }
}
