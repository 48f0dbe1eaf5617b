//! Power cuts: workloads run over a recording device, and every disk that a cut may leave
//! is mounted, compared with what was promised, used, and checked.
//!
//! [`cuts`] says which disks those are, [`history`] what may be found on them. Workloads are
//! the fixed ones of [`workloads`] and those that [`generate`] makes. A failure is made
//! small ([`minimise`]) and printed as one line that repeats it:
//! `SEED=1 WORKLOAD='ext4 ordered ...' CUT=blocks:3 UNITS=0-2 cargo test ... replay`.
//!
//! How much is judged is said in [`tiers`]. With the feature `mutants`, which plants defects,
//! a test shows that each is caught.

mod case;
mod cuts;
mod damage;
mod engine;
mod generate;
mod history;
mod identity;
mod image;
mod intruder;
mod judges;
mod look;
mod minimise;
#[cfg(feature = "mutants")]
mod mutants;
mod ops;
mod quiet;
mod recorder;
mod tiers;
mod workloads;

use uext_ext4::DataMode;
use uext_tests::require;

use crate::case::Case;
use crate::image::Kind;

macro_rules! crash_tests {
    ($($name:ident: $image:ident;)*) => {
        $(
            #[test]
            fn $name() {
                require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
                let case = Case::fixed(Kind::$image, stringify!($name));
                engine::check(stringify!($name), &[(case, tiers::fixed())]);
            }
        )*

        /// The fixed workloads and their images.
        const FIXED: &[(Kind, &str)] = &[$((Kind::$image, stringify!($name))),*];
    };
}

crash_tests! {
    create_and_fsync: Ext4;
    rename_across_directories: Small;
    replace_by_rename: Ext4;
    unlink_while_open: Ext4;
    truncate_and_extend: Ext3;
    append_and_fsync: Small;
    many_small_files: Small;
    attributes_and_acls: Ext4;
    growing_directory: Small;
    links: Ext3;
    delete_and_reuse: Ext3;
    delete_and_reuse_small: Small;
    long_extents: Ext4;
    log_that_wraps: Small;
    deep_extents: Small;
    made_during_commits: Ext4;
    written_in_place: Small;
    large_writes: Ext4;
    blocks_like_the_journals: Small;
}

/// The fixed workloads again, where file data goes through the journal.
#[test]
fn journalled_data() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    let cases: Vec<_> = FIXED
        .iter()
        .map(|&(kind, name)| {
            (Case { mode: DataMode::Journal, ..Case::fixed(kind, name) }, tiers::journalled())
        })
        .collect();
    engine::check("fixed workloads, data=journal", &cases);
}

/// The fixed workloads and sequences of one operation, where every journal handle is committed
/// alone: an operation of several handles leaves something mountable between any two.
#[test]
fn each_handle_is_committed() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    let apart = |case: Case| (Case { apart: true, ..case }, tiers::apart());
    for mode in tiers::modes_apart() {
        let fixed = FIXED.iter().map(|&(kind, name)| Case { mode, ..Case::fixed(kind, name) });
        let cases: Vec<_> = fixed.map(apart).collect();
        engine::check(
            &format!("fixed workloads, handles apart, {}", image::mode_name(mode)),
            &cases,
        );
    }
    for (kind, mode) in tiers::filesystems() {
        let cases: Vec<_> =
            generate::length_one(kind, mode).step_by(tiers::apart_stride()).map(apart).collect();
        let name =
            format!("one operation, handles apart, {} {}", kind.name(), image::mode_name(mode));
        engine::check(&name, &cases);
    }
}

/// What our replay, e2fsck's and the kernel's leave is the same.
#[test]
fn replays_leave_the_same_blocks() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs", "losetup");
    let compare = |&(kind, name): &(Kind, &str)| {
        let recording = Case::fixed(kind, name).record().unwrap_or_else(|why| panic!("{why}"));
        identity::compare(name, &image::image(kind, true).bytes, &recording.log)
    };
    let same: usize = FIXED.iter().map(compare).sum();
    println!("{same} states: uext, e2fsck and the kernel leave the same blocks");
    assert!(same > 20);
}

#[test]
fn sequences_of_one_operation() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    for (kind, mode) in tiers::filesystems() {
        let cases: Vec<_> =
            generate::length_one(kind, mode).map(|case| (case, tiers::short())).collect();
        let name = format!("one operation, {} {}", kind.name(), image::mode_name(mode));
        engine::check(&name, &cases);
    }
}

#[test]
fn sequences_of_two_and_three_by_chance() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    let (count, time) = tiers::chances();
    let kinds = [Kind::Ext4, Kind::Small, Kind::Ext3];
    let modes = image::JOURNALLED;
    let cases: Vec<_> = (1..=count)
        .map(|seed| {
            // The remainders are in range.
            let kind = kinds[(seed % 3) as usize];
            let mode = modes[(seed / 3 % modes.len() as u64) as usize];
            (generate::by_chance(kind, mode, 2 + (seed % 2) as usize, seed), tiers::short())
        })
        .collect();
    engine::check_for("two and three operations", &cases, time);
}

/// ext2: after a repair all that was fsynced is there.
#[test]
fn sequences_without_a_journal() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    let stride = tiers::without_journal_stride();
    let cases: Vec<_> = generate::length_one(Kind::Ext2, DataMode::Ordered)
        .step_by(stride)
        .map(|case| (case, tiers::without_journal()))
        .collect();
    engine::check("one operation, ext2", &cases);
}

#[test]
fn a_damaged_log_is_not_replayed() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    for workload in tiers::DAMAGED {
        let case = Case::parse(workload, 1).expect("a workload");
        let (refused, tried) = damage::flip_bits(&case).unwrap_or_else(|why| panic!("{why}"));
        println!("{case}: {tried} damaged logs, {refused} refused");
        assert!(refused > 0, "{case}: no damage was seen");
    }
}

/// `SEED`, `WORKLOAD`, `CUT` and `UNITS` say which state; without them it is one that must
/// be good, so that the way there is always tested.
#[test]
fn replay() {
    require!("mke2fs", "e2fsck", "debugfs", "dumpe2fs");
    let word = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    let seed = word("SEED", "1").parse().expect("SEED is a number");
    let workload = word("WORKLOAD", "ext4 ordered mkdir A; sync | creat A/foo; fsync A/foo");
    let (cut, units) = (word("CUT", "blocks:2/blocks:1"), word("UNITS", "0/none"));
    let judged = minimise::replay(seed, &workload, &cut, &units);
    assert_eq!(judged, Ok(()), "CUT={cut} UNITS={units}");
}
