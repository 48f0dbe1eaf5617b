//! How much is judged: what `cargo test` runs in about a minute, `make crash`
//! (`UEXT_CRASH=more`) in about ten, and `make crash-long` (`UEXT_CRASH=long`) in hours.
//!
//! With `UEXT_CRASH_KERNEL=all` every prefix is judged, and every state by e2fsck as well.

use std::time::Duration;

use uext_ext4::DataMode;

use crate::cuts::Budget;
use crate::image::{JOURNALLED, Kind};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Tier {
    Test,
    More,
    Long,
}

fn tier() -> Tier {
    match std::env::var("UEXT_CRASH").as_deref() {
        Err(_) => Tier::Test,
        Ok("more") => Tier::More,
        Ok("long") => Tier::Long,
        Ok(other) => panic!("UEXT_CRASH is `more` or `long`, not `{other}`"),
    }
}

fn with_kernel(budget: Budget) -> Budget {
    let all = std::env::var("UEXT_CRASH_KERNEL").is_ok_and(|which| which == "all");
    if all { Budget { kernel_share: 1, prefixes: usize::MAX, ..budget } } else { budget }
}

/// Of a fixed workload.
pub fn fixed() -> Budget {
    with_kernel(match tier() {
        Tier::Test => Budget {
            exhaustive: 3,
            seeded: 4,
            sets: 8,
            torn_sets: 4,
            prefixes: 100,
            kernel_share: 40,
            nested: 3,
            nested_sets: 4,
        },
        Tier::More => Budget {
            exhaustive: 8,
            seeded: 16,
            sets: 64,
            torn_sets: 24,
            prefixes: usize::MAX,
            kernel_share: 25,
            nested: 20,
            nested_sets: 8,
        },
        Tier::Long => Budget {
            exhaustive: 8,
            seeded: 64,
            sets: usize::MAX,
            torn_sets: 256,
            prefixes: usize::MAX,
            kernel_share: 25,
            nested: 1000,
            nested_sets: 16,
        },
    })
}

/// Of a fixed workload whose data is journalled: each was judged with ordered data already.
pub fn journalled() -> Budget {
    let budget = fixed();
    match tier() {
        Tier::Test => Budget { sets: 4, torn_sets: 2, prefixes: 40, nested: 1, ..budget },
        Tier::More | Tier::Long => budget,
    }
}

/// Of a workload whose handles are transactions of their own: prefixes above all, since there are
/// few writes between two commits.
pub fn apart() -> Budget {
    let budget = fixed();
    match tier() {
        Tier::Test => {
            Budget { seeded: 1, sets: 1, torn_sets: 0, prefixes: 24, nested: 0, ..budget }
        }
        Tier::More => {
            Budget { seeded: 2, sets: 3, torn_sets: 0, prefixes: 300, nested: 1, ..budget }
        }
        Tier::Long => Budget { sets: 8, torn_sets: 2, nested: 2, ..budget },
    }
}

/// The modes in which the fixed workloads are judged with their handles apart.
pub fn modes_apart() -> Vec<DataMode> {
    if tier() == Tier::Test { vec![DataMode::Ordered] } else { JOURNALLED.to_vec() }
}

/// One in so many sequences of one operation is judged with its handles apart.
pub fn apart_stride() -> usize {
    if tier() == Tier::Test { 11 } else { 1 }
}

/// Of a short workload that was made by rule.
pub fn short() -> Budget {
    with_kernel(match tier() {
        Tier::Test => Budget {
            exhaustive: 3,
            seeded: 2,
            sets: 6,
            torn_sets: 4,
            prefixes: 0,
            kernel_share: 200,
            nested: 1,
            nested_sets: 3,
        },
        Tier::More => Budget {
            exhaustive: 8,
            seeded: 8,
            sets: 256,
            torn_sets: 16,
            prefixes: usize::MAX,
            kernel_share: 100,
            nested: 2,
            nested_sets: 4,
        },
        Tier::Long => Budget {
            exhaustive: 8,
            seeded: 64,
            sets: usize::MAX,
            torn_sets: 128,
            prefixes: usize::MAX,
            kernel_share: 100,
            nested: 8,
            nested_sets: 16,
        },
    })
}

/// Of a short workload without a journal, of which e2fsck judges every state.
pub fn without_journal() -> Budget {
    let sets = if tier() == Tier::Test { 2 } else { 4 };
    Budget {
        exhaustive: 0,
        seeded: 1,
        sets,
        torn_sets: 0,
        prefixes: 0,
        kernel_share: 1,
        nested: 0,
        nested_sets: 0,
    }
}

/// One in so many sequences is judged without a journal.
pub fn without_journal_stride() -> usize {
    match tier() {
        Tier::Test => 37,
        Tier::More => 7,
        Tier::Long => 1,
    }
}

/// The filesystems of which all sequences of one operation are judged.
pub fn filesystems() -> Vec<(Kind, DataMode)> {
    let kinds: &[Kind] = match tier() {
        Tier::Test => &[Kind::Ext4],
        Tier::More | Tier::Long => &[Kind::Ext4, Kind::Small, Kind::Ext3],
    };
    kinds.iter().flat_map(|&kind| JOURNALLED.iter().map(move |&mode| (kind, mode))).collect()
}

/// How many sequences by chance, and in what time.
pub fn chances() -> (u64, Duration) {
    match tier() {
        Tier::Test => (180, Duration::from_secs(120)),
        Tier::More => (20_000, Duration::from_secs(120)),
        Tier::Long => (10_000_000, Duration::from_secs(2 * 3600)),
    }
}

/// Workloads whose logs are damaged.
pub const DAMAGED: &[&str] = &[
    "ext4 ordered mkdir A; sync | creat A/foo; append A/foo 9000 #1; fsync A/foo; mkdir A/d; \
     setxattr A/d user.large 900 #2; fsync A/d; rename A/foo A/d/bar; sync",
    "ext4-1k ordered mkdir A; sync | creat A/foo; fsync A/foo; symlink A/s 700; link A/foo A/bar; \
     fsync A/foo; unlink A/foo; sync",
];
