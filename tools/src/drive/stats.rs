//! What is counted: operations by kind, with their latencies, in memory that clients and
//! coordinator share.
//!
//! Latencies go into buckets as a high dynamic range histogram has them, 64 for each power
//! of two, so about 1.6 % wide. Clients add to the buckets of one of some shards; the
//! coordinator sums the shards once an interval, whatever the number of clients, and hands
//! what is new to `hdrhistogram` for the percentiles. A client that is killed has lost
//! nothing: what it counted lies in shared memory.
//!
//! Locks: none.

use std::time::Duration;

use hdrhistogram::Histogram;
use uext_sync::atomic::{AtomicU64, Ordering};

/// Buckets for each power of two.
const PER_OCTAVE: u64 = 64;
/// Buckets of a kind: up to 2^40 ns, eighteen minutes.
pub const BUCKETS: usize = 36 * PER_OCTAVE as usize;
/// Shards, so that clients on many processors don't meet in one cache line.
pub const SHARDS: usize = 8;
/// Where bytes are counted: behind the buckets.
const BYTES: usize = BUCKETS;
/// Where the sum of the nanoseconds is.
const NANOS: usize = BUCKETS + 1;
/// Numbers of one kind in one shard.
pub const STRIDE: usize = BUCKETS + 8;

macro_rules! kinds {
    ($($variant:ident $name:literal,)*) => {
        /// A kind of operation, as the table has it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs, reason = "their names say it")]
        pub enum Op { $($variant,)* }

        impl Op {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

kinds! {
    Read "read", Write "write", Fsync "fsync", Fdatasync "fdatasync", Create "create",
    Open "open", Unlink "unlink", Rename "rename", Link "link", Symlink "symlink",
    Mkdir "mkdir", Rmdir "rmdir", Stat "stat", List "list", Setattr "setattr",
    Xattr "xattr", Truncate "truncate", Dirsync "dirsync",
}

/// Numbers that all shards take.
pub const LEN: usize = SHARDS * Op::ALL.len() * STRIDE;

fn bucket(nanos: u64) -> usize {
    let nanos = nanos.min((1 << 40) - 1);
    if nanos < 2 * PER_OCTAVE {
        return nanos as usize; // below 128
    }
    let shift = u64::from(63 - nanos.leading_zeros()) - 6;
    // Below BUCKETS, for a number of 40 bits.
    ((shift + 1) * PER_OCTAVE + (nanos >> shift) - PER_OCTAVE) as usize
}

/// The middle of a bucket, ns.
fn middle(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * PER_OCTAVE {
        return bucket;
    }
    let shift = bucket / PER_OCTAVE - 1;
    let low = (bucket % PER_OCTAVE + PER_OCTAVE) << shift;
    low + (1 << shift) / 2
}

/// Where one client counts.
#[derive(Clone, Copy, Debug)]
pub struct Shard<'a> {
    numbers: &'a [AtomicU64],
}

impl<'a> Shard<'a> {
    /// The client's, of the shared numbers.
    pub fn new(numbers: &'a [AtomicU64], client: usize) -> Self {
        let len = Op::ALL.len() * STRIDE;
        Self { numbers: &numbers[client % SHARDS * len..][..len] }
    }

    /// Counts an operation.
    pub fn count(&self, op: Op, took: Duration, bytes: u64) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let kind = &self.numbers[op as usize * STRIDE..][..STRIDE];
        // WHY-RELAXED: sums; nobody decides anything by them but what is shown.
        let add = |at: usize, by: u64| kind[at].fetch_add(by, Ordering::Relaxed);
        add(bucket(nanos), 1);
        add(NANOS, nanos);
        if bytes > 0 {
            add(BYTES, bytes);
        }
    }
}

/// Figures of one kind over some time.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Latencies, ns.
    pub latency: Histogram<u64>,
    /// Bytes moved.
    pub bytes: u64,
    /// Sum of the latencies, ns.
    pub nanos: u64,
}

impl Figures {
    fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, 1 << 41, 3).expect("bounds that fit");
        Self { latency, bytes: 0, nanos: 0 }
    }

    /// Operations.
    pub fn count(&self) -> u64 {
        self.latency.len()
    }

    /// A percentile, µs; 0 without operations.
    pub fn percentile(&self, percent: f64) -> f64 {
        if self.count() == 0 {
            return 0.0;
        }
        self.latency.value_at_percentile(percent) as f64 / 1e3
    }

    /// Mean, µs.
    pub fn mean(&self) -> f64 {
        self.nanos as f64 / 1e3 / (self.count().max(1)) as f64
    }
}

/// One interval of the run.
#[derive(Clone, Debug)]
pub struct Interval {
    /// When it ended, seconds from the start.
    pub end: f64,
    /// How long it was.
    pub seconds: f64,
    /// Figures by kind, in the order of [`Op::ALL`].
    pub ops: Vec<IntervalOp>,
}

/// A kind's figures in an interval.
#[derive(Clone, Copy, Debug, Default)]
pub struct IntervalOp {
    /// Operations.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
    /// Median, µs.
    pub p50: f64,
    /// 99th percentile, µs.
    pub p99: f64,
    /// Longest, µs.
    pub max: f64,
}

/// What the coordinator has of all clients.
#[derive(Debug)]
pub struct Totals {
    last: Vec<u64>,
    /// By kind, in the order of [`Op::ALL`].
    pub ops: Vec<Figures>,
    /// One after the other.
    pub intervals: Vec<Interval>,
    ended: f64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            last: vec![0; Op::ALL.len() * STRIDE],
            ops: Op::ALL.iter().map(|_| Figures::new()).collect(),
            intervals: Vec::new(),
            ended: 0.0,
        }
    }
}

impl Totals {
    /// Forgets what was counted so far: it was preparation.
    pub fn skip(&mut self, numbers: &[AtomicU64]) {
        self.last = Self::sum(numbers);
    }

    /// Ends an interval.
    pub fn interval(&mut self, numbers: &[AtomicU64], now: Duration) {
        let sums = Self::sum(numbers);
        let end = now.as_secs_f64();
        let mut interval =
            Interval { end, seconds: end - self.ended, ops: Vec::with_capacity(Op::ALL.len()) };
        self.ended = end;
        for (kind, total) in self.ops.iter_mut().enumerate() {
            let range = kind * STRIDE..(kind + 1) * STRIDE;
            let (new, old) = (&sums[range.clone()], &self.last[range]);
            let mut figures = Figures::new();
            for at in 0..BUCKETS {
                let count = new[at].saturating_sub(old[at]);
                if count > 0 {
                    figures.latency.saturating_record_n(middle(at).max(1), count);
                }
            }
            figures.bytes = new[BYTES].saturating_sub(old[BYTES]);
            figures.nanos = new[NANOS].saturating_sub(old[NANOS]);
            total.latency.add(&figures.latency).expect("the same bounds");
            total.bytes += figures.bytes;
            total.nanos += figures.nanos;
            interval.ops.push(IntervalOp {
                count: figures.count(),
                bytes: figures.bytes,
                p50: figures.percentile(50.0),
                p99: figures.percentile(99.0),
                max: figures.percentile(100.0),
            });
        }
        self.last = sums;
        self.intervals.push(interval);
    }

    fn sum(numbers: &[AtomicU64]) -> Vec<u64> {
        let len = Op::ALL.len() * STRIDE;
        let mut sums = vec![0u64; len];
        for shard in numbers.chunks_exact(len) {
            for (sum, number) in sums.iter_mut().zip(shard) {
                // WHY-RELAXED: a snapshot for showing; the last one is taken after all
                // clients have ended.
                *sum += number.load(Ordering::Relaxed);
            }
        }
        sums
    }

    /// All kinds together: operations and bytes.
    pub fn sums(&self) -> (u64, u64) {
        let count = self.ops.iter().map(Figures::count).sum();
        (count, self.ops.iter().map(|figures| figures.bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_as_narrow_as_promised_and_holds_its_values() {
        for nanos in (0..40).flat_map(|n| [1u64 << n, (1 << n) + 1, (3 << n) / 2]) {
            let middle = middle(bucket(nanos)) as f64;
            assert!((middle - nanos as f64).abs() <= (nanos as f64 / 64.0).max(0.5), "{nanos}");
        }
        assert!(bucket(u64::MAX) < BUCKETS);
        assert!((1..1 << 20).all(|n| bucket(n) >= bucket(n - 1)));
    }

    #[test]
    fn shards_add_up_and_intervals_hold_what_is_new() {
        let numbers: Vec<AtomicU64> = (0..LEN).map(|_| AtomicU64::new(0)).collect();
        let mut totals = Totals::default();
        Shard::new(&numbers, 0).count(Op::Stat, Duration::from_micros(1), 0);
        totals.skip(&numbers);
        for client in 0..20 {
            Shard::new(&numbers, client).count(Op::Read, Duration::from_micros(100), 4096);
        }
        totals.interval(&numbers, Duration::from_secs(1));
        Shard::new(&numbers, 3).count(Op::Read, Duration::from_millis(10), 1);
        totals.interval(&numbers, Duration::from_secs(2));
        let read = Op::Read as usize;
        assert_eq!(totals.intervals[0].ops[read].count, 20);
        assert_eq!(totals.intervals[1].ops[read].count, 1);
        assert_eq!(totals.sums(), (21, 20 * 4096 + 1));
        let figures = &totals.ops[read];
        assert!((figures.percentile(50.0) - 100.0).abs() < 2.0);
        assert!((figures.percentile(100.0) - 10_000.0).abs() < 200.0);
    }
}
