//! A disk for shuttle's models: small, with a volatile cache, other threads run
//! before and after each of its steps, and its power can be cut at any moment.
//!
//! Invariants: two writes under way never touch the same block, which it checks; a
//! flush covers the writes that completed before it was submitted.
//!
//! Locks: its own are std's and never held where another thread may run.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uext_sync::atomic::{AtomicBool, Ordering};
use uext_sync::explore::random;

use crate::bio::{Bio, BioFlags, BioOp};
use crate::device::BlockDevice;
use crate::limits::QueueLimits;
use crate::status::{BlkResult, BlkStatus};
use crate::units::Sector;

/// Bytes that a power cut keeps or loses as one.
const UNIT: usize = 512;

struct Contents {
    /// What reads see.
    now: Vec<u8>,
    /// What a power cut leaves for certain.
    durable: Vec<u8>,
    /// Written since the last flush, by unit: all the contents it had, oldest first.
    volatile: BTreeMap<usize, Vec<[u8; UNIT]>>,
    /// Bytes of writes under way.
    under_way: Vec<Range<u64>>,
    /// Writes and flushes until all of them fail.
    until_failure: u64,
}

/// The disk.
pub struct ModelDisk {
    limits: QueueLimits,
    contents: Mutex<Contents>,
    /// Where other threads get their turn (WHY-RELAXED: no more than that); `None`: the disk is a judge's, alone.
    turn: Option<AtomicBool>,
}

impl ModelDisk {
    /// A disk with these contents.
    pub fn new(image: Vec<u8>) -> Arc<Self> {
        Self::with(image, Some(AtomicBool::new(false)))
    }

    /// A disk that only one thread uses, without steps in between.
    pub fn quiet(image: Vec<u8>) -> Arc<Self> {
        Self::with(image, None)
    }

    fn with(image: Vec<u8>, turn: Option<AtomicBool>) -> Arc<Self> {
        let mut limits = QueueLimits::new(Sector(image.len() as u64 / 512));
        limits.write_cache = true;
        limits.fua = true;
        let contents = Contents {
            durable: image.clone(),
            now: image,
            volatile: BTreeMap::new(),
            under_way: Vec::new(),
            until_failure: u64::MAX,
        };
        Arc::new(Self { limits, contents: Mutex::new(contents), turn })
    }

    /// After `count` more writes and flushes all of them fail.
    pub fn fail_after(&self, count: u64) {
        self.contents().until_failure = count;
    }

    /// What a power cut leaves now: of each unit that was written since the last flush
    /// any of its contents. One moment: no other thread runs meanwhile.
    pub fn cut(&self) -> Vec<u8> {
        let contents = self.contents();
        let mut image = contents.durable.clone();
        for (&unit, versions) in &contents.volatile {
            // 0: none of them.
            let kept = random() as usize % (versions.len() + 1);
            if let Some(version) = kept.checked_sub(1) {
                image[unit * UNIT..][..UNIT].copy_from_slice(&versions[version]);
            }
        }
        image
    }

    /// What a read sees.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        self.contents().now[range].to_vec()
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other threads may run here.
    pub fn turn(&self) {
        if let Some(turn) = &self.turn {
            turn.load(Ordering::Relaxed);
        }
    }

    fn run(&self, bio: &Bio) -> BlkResult<()> {
        self.limits.check(bio)?;
        let range = bio.sector().byte_offset()..bio.sector().byte_offset() + bio.len();
        if bio.op() == BioOp::Write {
            let mut contents = self.contents();
            let meets =
                contents.under_way.iter().any(|r| r.start < range.end && range.start < r.end);
            assert!(!meets, "two writes of bytes {range:?} are under way");
            contents.under_way.push(range.clone());
        }
        self.turn();
        let result = self.contents().apply(bio, range.start as usize);
        self.turn();
        if bio.op() == BioOp::Write {
            self.contents().under_way.retain(|r| *r != range);
        }
        result
    }
}

impl Contents {
    fn apply(&mut self, bio: &Bio, start: usize) -> BlkResult<()> {
        if bio.op() != BioOp::Read {
            self.until_failure = self.until_failure.saturating_sub(1);
            if self.until_failure == 0 {
                return Err(BlkStatus::IoErr);
            }
        }
        match bio.op() {
            BioOp::Read => {
                let mut at = start;
                for vec in bio.vecs() {
                    vec.copy_from_slice(&self.now[at..at + vec.len as usize]);
                    at += vec.len as usize;
                }
            }
            BioOp::Write => {
                if bio.flags().contains(BioFlags::PREFLUSH) {
                    self.flush();
                }
                let mut data = vec![0; bio.len() as usize];
                let mut at = 0;
                for vec in bio.vecs() {
                    vec.copy_to_slice(&mut data[at..at + vec.len as usize]);
                    at += vec.len as usize;
                }
                self.write(start, &data, bio.flags().contains(BioFlags::FUA));
            }
            BioOp::Flush => self.flush(),
            BioOp::Discard | BioOp::WriteZeroes => return Err(BlkStatus::NotSupp),
        }
        Ok(())
    }

    fn write(&mut self, start: usize, data: &[u8], durable: bool) {
        self.now[start..start + data.len()].copy_from_slice(data);
        for (n, part) in data.chunks_exact(UNIT).enumerate() {
            let unit = start / UNIT + n;
            if durable {
                self.durable[unit * UNIT..][..UNIT].copy_from_slice(part);
                self.volatile.remove(&unit);
            } else {
                let mut kept = [0; UNIT];
                kept.copy_from_slice(part);
                self.volatile.entry(unit).or_default().push(kept);
            }
        }
    }

    fn flush(&mut self) {
        for (unit, versions) in std::mem::take(&mut self.volatile) {
            if let Some(last) = versions.last() {
                self.durable[unit * UNIT..][..UNIT].copy_from_slice(last);
            }
        }
    }
}

impl BlockDevice for ModelDisk {
    fn limits(&self) -> &QueueLimits {
        &self.limits
    }

    fn submit_bio(&self, bio: Bio) {
        let result = self.run(&bio);
        bio.end_io(result);
    }

    fn submit_bio_wait(&self, mut bio: Bio) -> BlkResult<Bio> {
        drop(bio.take_end_io());
        self.run(&bio)?;
        Ok(bio)
    }
}
