//! A device that fails on demand: errors, lost writes, torn writes, flipped bits.
//!
//! Rules say which bios they are for (operation, range), when they strike (the nth,
//! from the nth on, every nth, by chance) and what happens. The first rule that
//! strikes decides; every rule counts the bios it is for all the same. The flush of
//! a PREFLUSH counts as a flush of its own, since the device carries it out itself.
//!
//! To fail each bio of a run once: run it clean, read [`Flakey::counts`], and run
//! it again for each n with [`When::Nth`].
//!
//! Locks: `rules`, never held over an `end_io` or a submission.

use std::ops::Range;
use std::sync::Arc;

use bitflags::bitflags;
use uext_sync::Mutex;

use super::Rng;
use crate::bio::{Bio, BioOp};
use crate::device::BlockDevice;
use crate::flush::{self, SimpleQueue};
use crate::limits::QueueLimits;
use crate::status::{BlkResult, BlkStatus};
use crate::units::{SECTOR_SIZE, Sector};

bitflags! {
    /// Operations that a rule is for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ops: u8 {
        /// Reads.
        const READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Flushes.
        const FLUSH = 4;
        /// Discards.
        const DISCARD = 8;
        /// Zeroing.
        const ZEROES = 16;
    }
}

impl From<BioOp> for Ops {
    fn from(op: BioOp) -> Self {
        match op {
            BioOp::Read => Self::READ,
            BioOp::Write => Self::WRITE,
            BioOp::Flush => Self::FLUSH,
            BioOp::Discard => Self::DISCARD,
            BioOp::WriteZeroes => Self::ZEROES,
        }
    }
}

/// When a rule strikes, counting from 1 the bios it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Once, at the nth.
    Nth(u64),
    /// From the nth on, for ever.
    From(u64),
    /// At every nth.
    Every(u64),
    /// At one of so many, by chance.
    Chance(u64),
}

/// What happens to a bio that a rule strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It fails and reaches nothing.
    Fail(BlkStatus),
    /// It succeeds and reaches nothing: a lost write, a flush that is a lie.
    Drop,
    /// Only its first sectors are written; then it ends like this.
    Tear {
        /// Sectors that are written, at most all.
        sectors: u64,
        /// How the bio ends.
        status: BlkResult<()>,
    },
    /// One bit of what is read, or written, is flipped, by the seed.
    FlipBit,
}

/// A rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The operations it is for.
    pub ops: Ops,
    /// The sectors it is for; a bio that touches one of them counts. A flush has none.
    pub sectors: Option<Range<u64>>,
    /// When it strikes.
    pub when: When,
    /// What then happens.
    pub action: Action,
}

impl Rule {
    /// For every sector.
    pub fn new(ops: Ops, when: When, action: Action) -> Self {
        Self { ops, sectors: None, when, action }
    }

    /// For bios that touch these sectors only.
    #[must_use]
    pub fn within(mut self, sectors: Range<u64>) -> Self {
        self.sectors = Some(sectors);
        self
    }

    fn is_for(&self, bio: &Bio) -> bool {
        self.ops.contains(bio.op().into())
            && self.sectors.as_ref().is_none_or(|sectors| {
                bio.sector().0 < sectors.end && sectors.start < bio.end_sector().0
            })
    }
}

/// How many bios came, whatever became of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards and zeroing.
    pub others: u64,
    /// Bios that a rule struck.
    pub struck: u64,
}

/// The device.
pub struct Flakey {
    inner: Arc<Inner>,
    queue: Arc<dyn SimpleQueue>,
}

struct Inner {
    limits: QueueLimits,
    lower: Arc<dyn BlockDevice>,
    rules: Mutex<Rules>,
}

struct Rules {
    /// Each with how many bios it has counted.
    rules: Vec<(Rule, u64)>,
    counts: Counts,
    rng: Rng,
}

impl Flakey {
    /// Over a device; without rules everything passes.
    pub fn new(lower: Arc<dyn BlockDevice>, seed: u64) -> Arc<Self> {
        let rules = Rules { rules: Vec::new(), counts: Counts::default(), rng: Rng::new(seed) };
        let limits = lower.limits().clone();
        let inner = Arc::new(Inner { limits, lower, rules: Mutex::new(rules) });
        Arc::new(Self { queue: inner.clone(), inner })
    }

    /// Adds a rule, which counts from now on.
    pub fn add(&self, rule: Rule) {
        self.inner.rules.lock().rules.push((rule, 0));
    }

    /// Removes all rules: the device is well again.
    pub fn clear(&self) {
        self.inner.rules.lock().rules.clear();
    }

    /// What came so far.
    pub fn counts(&self) -> Counts {
        self.inner.rules.lock().counts
    }
}

impl Rules {
    /// Counts a bio; what is to happen to it.
    fn judge(&mut self, bio: &Bio) -> Option<Action> {
        match bio.op() {
            BioOp::Read => self.counts.reads += 1,
            BioOp::Write => self.counts.writes += 1,
            BioOp::Flush => self.counts.flushes += 1,
            BioOp::Discard | BioOp::WriteZeroes => self.counts.others += 1,
        }
        let mut struck = None;
        for (rule, count) in self.rules.iter_mut().filter(|(rule, _)| rule.is_for(bio)) {
            *count += 1;
            let strikes = match rule.when {
                When::Nth(nth) => *count == nth,
                When::From(nth) => *count >= nth,
                When::Every(nth) => count.is_multiple_of(nth.max(1)),
                When::Chance(of) => self.rng.below(of) == 0,
            };
            if strikes && struck.is_none() {
                struck = Some(rule.action);
            }
        }
        self.counts.struck += u64::from(struck.is_some());
        struck
    }
}

impl Inner {
    /// Does to the bio what the rules say; gives back one that goes down.
    fn strike(&self, bio: Bio) -> Option<Bio> {
        let mut rules = self.rules.lock();
        let action = rules.judge(&bio);
        let random = rules.rng.next_u64();
        drop(rules);
        match action {
            None => return Some(bio),
            Some(Action::Fail(status)) => bio.end_io(Err(status)),
            Some(Action::Drop) => bio.end_io(Ok(())),
            Some(Action::Tear { sectors, status }) => self.tear(bio, sectors, status),
            Some(Action::FlipBit) => return Some(flip_bit(bio, random)),
        }
        None
    }

    /// Only the first sectors go down.
    fn tear(&self, bio: Bio, sectors: u64, status: BlkResult<()>) {
        let bytes = sectors.saturating_mul(SECTOR_SIZE).min(bio.len());
        let mut head = bio.piece(0, bytes);
        head.set_end_io(move |_| bio.end_io(status));
        self.lower.submit_bio(head);
    }
}

/// A read comes back with one bit wrong; a write goes down with one bit wrong.
fn flip_bit(mut bio: Bio, random: u64) -> Bio {
    let flip = move |data: &mut [u8]| {
        if !data.is_empty() {
            // The remainder fits, and so does a bit of a byte.
            let bit = (random % (data.len() as u64 * 8)) as usize;
            data[bit / 8] ^= 1 << (bit % 8);
        }
    };
    match bio.op() {
        BioOp::Read => {
            let owner = bio.take_end_io();
            bio.set_end_io(move |mut bio| {
                let mut data = bio.data();
                flip(&mut data);
                bio.fill(&data);
                bio.restore_end_io(owner);
                let status = bio.status();
                bio.end_io(status);
            });
            bio
        }
        BioOp::Write => {
            let mut data = bio.data();
            flip(&mut data);
            let mut wrong = Bio::new(bio.op(), bio.flags(), bio.sector());
            let buf = crate::aligned::AlignedBuf::from_slice(&data);
            wrong.add_vec(crate::bio::BioVec::whole(Arc::new(buf)));
            wrong.set_end_io(move |wrong| bio.end_io(wrong.status()));
            wrong
        }
        _ => bio,
    }
}

impl SimpleQueue for Inner {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_simple(&self, bios: &mut dyn Iterator<Item = Bio>) {
        let bios: Vec<Bio> = bios.filter_map(|bio| self.strike(bio)).collect();
        self.lower.submit_bios(bios);
    }
}

impl BlockDevice for Flakey {
    fn limits(&self) -> &QueueLimits {
        &self.inner.limits
    }

    fn is_sparse(&self, sector: Sector, bytes: u64) -> bool {
        self.inner.lower.is_sparse(sector, bytes)
    }

    fn submit_bio(&self, bio: Bio) {
        self.submit_bios(vec![bio]);
    }

    fn submit_bios(&self, bios: Vec<Bio>) {
        let limits = &self.inner.limits;
        flush::submit(&self.queue, &mut bios.into_iter().filter_map(|bio| limits.admit(bio)));
    }
}
