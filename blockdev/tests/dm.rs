//! The trial devices: what a power cut may leave, and failures on demand.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;
use std::sync::Arc;

use uext_blockdev::dm::flakey::{Action, Ops, Rule, When};
use uext_blockdev::dm::{
    CrashOptions, CrashPoint, DiscardFill, Flakey, LogWrites, Rng, SnapshotDevice, UnitSet,
};
use uext_blockdev::{
    AlignedBuf, Bio, BioFlags, BioOp, BioVec, BlkStatus, BlockDevice, MemoryDevice, Sector,
};

const SIZE: usize = 64 << 10;

fn logged() -> (Arc<LogWrites>, Arc<SnapshotDevice>) {
    let base = SnapshotDevice::over_vec(Arc::new(vec![0; SIZE]));
    (LogWrites::new(MemoryDevice::new(SIZE as u64)), base)
}

fn write(dev: &dyn BlockDevice, block: u64, fill: u8, flags: BioFlags) {
    dev.write_at(block * 4096, &[fill; 4096], flags).unwrap();
}

fn points(log: &LogWrites, base: &SnapshotDevice) -> Vec<CrashPoint> {
    log.log().crash_points(base, CrashOptions::default()).collect()
}

/// The first byte of each of the first blocks.
fn blocks(disk: &SnapshotDevice, count: usize) -> Vec<u8> {
    disk.to_vec().unwrap().chunks(4096).take(count).map(|block| block[0]).collect()
}

#[test]
fn writes_before_a_flush_are_durable_and_those_after_are_in_any_combination() {
    let (log, base) = logged();
    let dev: &dyn BlockDevice = &*log;
    write(dev, 0, 1, BioFlags::empty());
    dev.flush().unwrap();
    log.mark("one");
    write(dev, 1, 2, BioFlags::empty());
    write(dev, 2, 3, BioFlags::empty());

    let points = points(&log, &base);

    assert_eq!(points.len(), 2);
    assert_eq!((points[0].units().len(), points[0].marks().count()), (1, 0));
    assert_eq!(points[1].marks().collect::<Vec<_>>(), ["one"]);
    let states: HashSet<_> = UnitSet::choose(points[1].units().len(), 8, 0, 0)
        .map(|set| blocks(&points[1].state(&set), 3))
        .collect();
    let all = [[1, 0, 0], [1, 2, 0], [1, 0, 3], [1, 2, 3]].map(Vec::from);
    assert_eq!(states, HashSet::from(all));
}

#[test]
fn a_fua_write_is_durable_alone_and_is_not_undone_by_an_older_write() {
    let (log, base) = logged();
    let dev: &dyn BlockDevice = &*log;
    write(dev, 0, 1, BioFlags::empty());
    write(dev, 1, 1, BioFlags::empty());
    write(dev, 0, 2, BioFlags::FUA);

    let points = points(&log, &base);

    let last = points.last().unwrap();
    assert_eq!(last.units().len(), 1, "the older write of block 0 has nothing left to do");
    assert_eq!(blocks(&last.state(&UnitSet::all(1)), 2), [2, 1]);
    assert_eq!(blocks(&last.state(&UnitSet::none(1)), 2), [2, 0]);
}

#[test]
fn a_write_in_flight_at_the_flush_is_not_covered_by_it() {
    /// Keeps writes until the test lets them go.
    struct Slow(Arc<MemoryDevice>, uext_sync::Mutex<Vec<Bio>>);
    impl BlockDevice for Slow {
        fn limits(&self) -> &uext_blockdev::QueueLimits {
            self.0.limits()
        }
        fn submit_bio(&self, bio: Bio) {
            if bio.op() == BioOp::Write { self.1.lock().push(bio) } else { self.0.submit_bio(bio) }
        }
    }
    let slow = Arc::new(Slow(MemoryDevice::new(SIZE as u64), uext_sync::Mutex::default()));
    let log = LogWrites::new(slow.clone());
    let dev: &dyn BlockDevice = &*log;
    let mut bio = Bio::new(BioOp::Write, BioFlags::empty(), Sector(0));
    bio.add_vec(BioVec::whole(Arc::new(AlignedBuf::from_slice(&[9; 4096]))));
    dev.submit_bio(bio);
    dev.flush().unwrap();
    slow.0.submit_bio(slow.1.lock().pop().unwrap());

    let base = SnapshotDevice::over_vec(Arc::new(vec![0; SIZE]));
    let points = points(&log, &base);

    assert_eq!(points.len(), 1, "the flush made nothing durable");
    assert_eq!(points[0].units().len(), 1);
}

#[test]
fn a_failed_flush_makes_nothing_durable_and_a_failed_write_stays_volatile() {
    let flakey = Flakey::new(MemoryDevice::new(SIZE as u64), 1);
    flakey.add(Rule::new(Ops::FLUSH, When::Nth(1), Action::Fail(BlkStatus::IoErr)));
    flakey.add(Rule::new(Ops::WRITE, When::Nth(2), Action::Fail(BlkStatus::IoErr)));
    let log = LogWrites::new(flakey);
    let dev: &dyn BlockDevice = &*log;
    write(dev, 0, 1, BioFlags::empty());
    assert_eq!(dev.flush(), Err(BlkStatus::IoErr));
    assert_eq!(dev.write_at(4096, &[2; 4096], BioFlags::empty()), Err(BlkStatus::IoErr));

    let base = SnapshotDevice::over_vec(Arc::new(vec![0; SIZE]));
    let before: Vec<_> = points(&log, &base);
    dev.flush().unwrap();
    let after: Vec<_> = points(&log, &base);

    assert_eq!((before.len(), before[0].units().len()), (1, 2));
    assert_eq!((after.len(), after[1].units().len()), (2, 1));
}

#[test]
fn units_can_be_sectors_and_discards_leave_what_they_like() {
    let (log, base) = logged();
    let dev: &dyn BlockDevice = &*log;
    write(dev, 0, 1, BioFlags::FUA);
    write(dev, 1, 1, BioFlags::empty());
    dev.submit_bio_wait(Bio::range(BioOp::Discard, Sector(0), 4096)).unwrap();
    let at_end = |discard| {
        let options = CrashOptions { unit_bytes: 512, discard };
        let point = log.log().crash_points(&base, options).last().unwrap();
        assert_eq!(point.units().len(), 9);
        let state = point.state(&UnitSet::from_bools(vec![
            true, false, false, false, false, false, false, false, true,
        ]));
        state.to_vec().unwrap()
    };

    let (zeroes, old) = (at_end(DiscardFill::Zeroes), at_end(DiscardFill::Old));

    assert_eq!((zeroes[0], zeroes[4096], zeroes[4096 + 512]), (0, 1, 0));
    assert_eq!((old[0], old[4096], old[4096 + 512]), (1, 1, 0));
    assert_ne!(at_end(DiscardFill::Junk(3))[..4096], [0; 4096]);
}

#[test]
fn a_prefix_holds_the_first_completed_changes() {
    let (log, base) = logged();
    let dev: &dyn BlockDevice = &*log;
    for block in 0..3 {
        write(dev, block, block as u8 + 1, BioFlags::empty());
    }
    let log = log.log();

    assert_eq!(log.completed_changes(), 3);
    assert_eq!(blocks(&log.prefix(&base, 2).unwrap(), 3), [1, 2, 0]);
    assert_eq!(blocks(&log.prefix(&base, 3).unwrap(), 3), [1, 2, 3]);
}

/// Writes of a seeded history never survive out of the model: for each crash point
/// every block is one of the values written to it, not older than the durable one.
#[test]
fn no_crash_state_is_older_than_what_was_flushed() {
    for seed in 0..20 {
        let (log, base) = logged();
        let dev: &dyn BlockDevice = &*log;
        let mut rng = Rng::new(seed);
        let mut now = [0u8; 4];
        for value in 1..60 {
            let block = rng.below(4);
            match rng.below(8) {
                0 => {
                    dev.flush().unwrap();
                    log.mark(&format!("{} {} {} {}", now[0], now[1], now[2], now[3]));
                }
                1 => write(dev, block, value, BioFlags::FUA),
                _ => write(dev, block, value, BioFlags::empty()),
            }
            let read = dev.read_at(block * 4096, 1).unwrap()[0];
            now[block as usize] = read;
        }
        for point in log.log().crash_points(&base, CrashOptions::default()) {
            let bound: Vec<u8> = point
                .marks()
                .last()
                .map(|mark| mark.split(' ').map(|n| n.parse().unwrap()).collect())
                .unwrap_or_else(|| vec![0; 4]);
            for set in UnitSet::choose(point.units().len(), 6, 16, seed) {
                let state = blocks(&point.state(&set), 4);
                let fits = state.iter().zip(&bound).all(|(have, least)| have >= least);
                assert!(fits, "SEED={seed} {point:?} {set:?}: {state:?} below {bound:?}");
            }
            let all = UnitSet::all(point.units().len());
            assert!(blocks(&point.state(&all), 4).iter().zip(&now).all(|(have, now)| have <= now));
        }
    }
}

#[test]
fn choices_are_exhaustive_for_few_units_and_bounded_for_many() {
    let few: HashSet<_> = UnitSet::choose(5, 8, 10, 1).collect();
    assert_eq!(few.len(), 32);
    let many: Vec<_> = UnitSet::choose(100, 8, 10, 1).collect();
    assert_eq!(many.len(), 101 + 99 + 99 + 10);
    assert_eq!(many, UnitSet::choose(100, 8, 10, 1).collect::<Vec<_>>(), "the seed replays");
}

#[test]
fn a_fork_shares_the_past_and_not_the_future() {
    let base = Arc::new(vec![5; 5000]);
    let first = SnapshotDevice::over_vec(base.clone());
    let dev: &dyn BlockDevice = &*first;
    assert_eq!(dev.size(), 5120, "padded to a sector");
    dev.write_at(512, &[6; 512], BioFlags::empty()).unwrap();
    let second = first.fork();
    assert_eq!(first.fingerprint(), second.fingerprint());
    dev.write_at(0, &[7; 512], BioFlags::empty()).unwrap();

    assert_ne!(first.fingerprint(), second.fingerprint());
    let (first, second) = (first.to_vec().unwrap(), second.to_vec().unwrap());
    assert_eq!((first[0], first[512], first[1024]), (7, 6, 5));
    assert_eq!((second[0], second[512], second[1024]), (5, 6, 5));
    assert_eq!((base[0], second[5000]), (5, 0));
}

#[test]
fn a_snapshot_of_a_device_leaves_the_device_alone() {
    let lower = MemoryDevice::from_vec(vec![1; 8192]);
    let snapshot = SnapshotDevice::over_device(lower.clone());
    let dev: &dyn BlockDevice = &*snapshot;
    dev.write_at(100, &[2; 5000], BioFlags::empty()).unwrap();
    let data = dev.read_at(0, 8192).unwrap();
    assert_eq!((data[99], data[100], data[5099], data[5100]), (1, 2, 2, 1));
    assert_eq!(snapshot.to_vec().unwrap(), data);
    assert_eq!(lower.snapshot(), vec![1; 8192]);
}

#[test]
fn flakey_counts_strikes_once_or_for_ever_and_recovers() {
    let flakey = Flakey::new(MemoryDevice::new(SIZE as u64), 7);
    let dev: &dyn BlockDevice = &*flakey;
    flakey.add(Rule::new(Ops::READ, When::Nth(2), Action::Fail(BlkStatus::IoErr)));
    flakey.add(Rule::new(Ops::WRITE, When::From(1), Action::Fail(BlkStatus::NoSpc)).within(16..24));
    let reads: Vec<_> = (0..3).map(|_| dev.read_at(0, 512).map(drop)).collect();
    assert_eq!(reads, [Ok(()), Err(BlkStatus::IoErr), Ok(())]);
    assert_eq!(dev.write_at(0, &[1; 512], BioFlags::empty()), Ok(()));
    for _ in 0..2 {
        assert_eq!(dev.write_at(20 * 512, &[1; 512], BioFlags::empty()), Err(BlkStatus::NoSpc));
    }
    flakey.clear();
    assert_eq!(dev.write_at(20 * 512, &[1; 512], BioFlags::empty()), Ok(()));
    let counts = flakey.counts();
    assert_eq!((counts.reads, counts.writes, counts.struck), (3, 4, 3));
}

#[test]
fn flakey_loses_tears_and_flips() {
    let memory = MemoryDevice::new(SIZE as u64);
    let flakey = Flakey::new(memory.clone(), 7);
    let dev: &dyn BlockDevice = &*flakey;
    flakey.add(Rule::new(Ops::WRITE, When::Nth(1), Action::Drop));
    let tear = Action::Tear { sectors: 3, status: Ok(()) };
    flakey.add(Rule::new(Ops::WRITE, When::Nth(2), tear));
    flakey.add(Rule::new(Ops::WRITE, When::Nth(3), Action::FlipBit));
    flakey.add(Rule::new(Ops::READ, When::Nth(1), Action::FlipBit));
    for fill in [1, 2, 4] {
        let at = u64::from(fill) * 4096;
        dev.write_at(at, &[fill; 4096], BioFlags::empty()).unwrap();
    }
    let image = memory.snapshot();
    assert!(image[4096..8192].iter().all(|&byte| byte == 0), "lost");
    assert_eq!((image[8192 + 1535], image[8192 + 1536]), (2, 0), "torn");
    let wrong: u32 = image[16384..20480].iter().map(|byte| (byte ^ 4).count_ones()).sum();
    assert_eq!(wrong, 1, "flipped on the way down");
    let read = dev.read_at(8192, 512).unwrap();
    let wrong: u32 = read.iter().map(|byte| (byte ^ 2).count_ones()).sum();
    assert_eq!(wrong, 1, "flipped on the way up");
    assert_eq!(dev.read_at(8192, 512).unwrap(), [2; 512]);
}

#[test]
fn the_flush_of_a_preflush_can_fail_and_then_nothing_is_written() {
    let memory = MemoryDevice::new(SIZE as u64);
    let flakey = Flakey::new(memory.clone(), 7);
    let dev: &dyn BlockDevice = &*flakey;
    flakey.add(Rule::new(Ops::FLUSH, When::Nth(1), Action::Fail(BlkStatus::IoErr)));
    let both = BioFlags::PREFLUSH | BioFlags::FUA;
    assert_eq!(dev.write_at(0, &[1; 512], both), Err(BlkStatus::IoErr));
    assert_eq!(flakey.counts().writes, 0);
    assert!(memory.snapshot().iter().all(|&byte| byte == 0));
}
