//! Writes of many pages, which go to the disk past the page cache: against a model beside small
//! writes, after power cuts, and where the disk fails.
#![allow(clippy::unwrap_used, missing_docs)]

mod model_common;
mod modes_common;

use model_common::{Random, write_model};
use modes_common::*;
use uext_blockdev::dm::flakey::{Ops, When};
use uext_ext4::{DataMode, Ext4};
use uext_vfs::{Errno, FileSystem, Ino};

const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4"];
const LARGE: usize = 256 << 10;

fn holds_what_the_model_holds(args: &[&str], seed: u64) {
    println!("mke2fs {args:?}, seed {seed}");
    let disk = Disk::new(image(32, args, &[]), &options(None));
    let ino = disk.create("file");
    let mut random = Random(seed);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..120u64 {
        match random.below(10) {
            0..=4 => {
                // Mostly at a page, as a stream's are, and often behind the end.
                let page = random.below(700) as usize * 4096;
                let end = model.len().next_multiple_of(4096).min(4 << 20);
                let at = [page, end, page + 100][random.below(3) as usize];
                let data = pattern(step + 1, LARGE + random.below(900_000) as usize);
                assert_eq!(disk.write(ino, at as u64, &data), Ok(data.len()), "step {step}");
                write_model(&mut model, at, &data);
            }
            5 | 6 => {
                let at = random.below(4 << 20) as usize;
                let data = pattern(step + 1, 1 + random.below(9000) as usize);
                assert_eq!(disk.write(ino, at as u64, &data), Ok(data.len()), "step {step}");
                write_model(&mut model, at, &data);
            }
            7 => {
                let size = random.below(4 << 20);
                disk.truncate(ino, size);
                model.resize(size as usize, 0);
            }
            8 => disk.fsync(ino),
            _ => assert!(read(&disk.fs, ino) == model, "step {step}"),
        }
    }
    assert!(read(&disk.fs, ino) == model);
    disk.fsync(ino);
    let after = |fs: &Ext4| read(fs, ino_of(fs));
    if args.contains(&"ext2") {
        disk.check();
    } else {
        assert!(recovered(disk.power_cut(), after) == model, "seed {seed}: after a power cut");
        disk.check();
    }
    assert!(recovered(disk.memory.snapshot(), after) == model, "seed {seed}: mounted again");
}

fn ino_of(fs: &Ext4) -> Ino {
    ino(fs, "file")
}

#[test]
fn ext4_holds_what_the_model_holds() {
    (1..=4).for_each(|seed| holds_what_the_model_holds(EXT4, seed));
}

#[test]
fn ext4_of_1k_blocks_holds_what_the_model_holds() {
    let args = ["-t", "ext4", "-b", "1024", "-J", "size=4"];
    (1..=4).for_each(|seed| holds_what_the_model_holds(&args, seed));
}

#[test]
fn block_maps_hold_what_the_model_holds() {
    let ext3 = ["-t", "ext3", "-b", "1024", "-J", "size=4"];
    (1..=3).for_each(|seed| holds_what_the_model_holds(&ext3, seed));
    (1..=3).for_each(|seed| holds_what_the_model_holds(&["-t", "ext2", "-b", "4096"], seed));
}

#[test]
fn a_large_write_is_on_the_disk_before_any_sync_and_nothing_refers_to_it_before() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(Some(DataMode::Ordered)));
    let ino = disk.create("file");
    let data = pattern(7, LARGE);

    assert_eq!(disk.write(ino, 0, &data), Ok(LARGE));

    assert_eq!(writes_of(&disk.log, &data[4096..4160]).len(), 1, "written once");
    assert_eq!(disk.commits_and_flushes().0, 0, "not committed");
    assert_eq!(read(&disk.fs, ino), data);
    disk.fsync(ino);
    assert_eq!(writes_of(&disk.log, &data[4096..4160]).len(), 1, "not written again");
    let found = recovered(disk.power_cut(), |fs| read(fs, ino_of(fs)));
    assert!(found == data, "an fsync holds");
    disk.check();
}

#[test]
fn the_size_on_the_disk_tells_of_no_byte_that_is_only_in_memory() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(Some(DataMode::Ordered)));
    let (small, large) = (pattern(1, 5000), pattern(2, LARGE));
    let file = disk.create("file");
    disk.write(file, 0, &small).unwrap();

    disk.write(file, 8192, &large).unwrap();
    // Commits what has happened, and not the file's own data.
    let other = disk.create("other");
    disk.fsync(other);

    let found = recovered(disk.power_cut(), |fs| read(fs, ino_of(fs)));
    assert_eq!(found.len(), 8192 + LARGE);
    assert!(found[..5000] == small && found[8192..] == large);
    disk.check();
}

/// The zeroes behind a truncated file's end are in memory, and the disk has what was cut off.
#[test]
fn what_was_cut_off_does_not_come_back_with_a_larger_size() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(Some(DataMode::Ordered)));
    let (old, large) = (pattern(1, 10_000), pattern(2, LARGE));
    let file = disk.create("file");
    disk.write(file, 0, &old).unwrap();
    disk.fsync(file);
    disk.truncate(file, 5000);

    disk.write(file, 12_288, &large).unwrap();
    let other = disk.create("other");
    disk.fsync(other);

    let found = recovered(disk.power_cut(), |fs| read(fs, ino_of(fs)));
    assert_eq!(found.len(), 12_288 + LARGE);
    assert!(found[..5000] == old[..5000] && found[12_288..] == large);
    assert!(found[5000..12_288].iter().all(|&byte| byte == 0));
    disk.check();
}

/// A write inside the file that lets no size on the disk tell of what is dirty around it.
#[test]
fn the_size_on_the_disk_stays_behind_a_large_write_before_the_end() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(Some(DataMode::Ordered)));
    let (small, large) = (pattern(1, 5000), pattern(2, LARGE));
    let file = disk.create("file");
    disk.write(file, 0, &small).unwrap();
    disk.write(file, 2 << 20, &small).unwrap();

    disk.write(file, 1 << 20, &large).unwrap();
    let other = disk.create("other");
    disk.fsync(other);

    let found = recovered(disk.power_cut(), |fs| read(fs, ino_of(fs)));
    let (at, end) = (1 << 20, (1 << 20) + LARGE);
    assert!(found.is_empty() || found[..5000] == small, "the beginning");
    assert!(
        found.len() <= at || found[at..end.min(found.len())] == large[..found.len().min(end) - at]
    );
    assert!(found.len() <= 2 << 20 || found[2 << 20..] == small, "the end");
    disk.check();
}

#[test]
fn a_large_write_that_fails_is_kept_and_tried_again() {
    for args in [EXT4, &["-t", "ext2", "-b", "1024"]] {
        let disk = Disk::new(image(32, args, &[]), &options(None));
        let ino = disk.create("file");
        // Small ones: the first large write of a mount goes past the cache, however long the
        // machine took for others.
        let before = pattern(1, LARGE);
        for (n, part) in before.chunks(LARGE / 4).enumerate() {
            disk.write(ino, (n * LARGE / 4) as u64, part).unwrap();
        }
        disk.fs.sync().unwrap();
        disk.fail(Ops::WRITE, When::From(1));
        let data = pattern(2, LARGE);

        assert_eq!(disk.write(ino, LARGE as u64, &data), Ok(LARGE));

        assert_eq!(disk.fs.getattr(&ROOT, ino).unwrap().size, 2 * LARGE as u64);
        assert!(read(&disk.fs, ino)[LARGE..] == data);
        assert_eq!(disk.fs.fsync(&ROOT, ino, FH, false), Err(Errno::EIO));
        disk.flakey.clear();
        disk.fsync(ino);
        let whole = [before, data].concat();
        assert!(read(&disk.fs, ino) == whole);
        disk.check();
        assert!(recovered(disk.memory.snapshot(), |fs| read(fs, ino_of(fs))) == whole);
    }
}

#[test]
fn a_large_write_over_data_that_fails_shows_nothing_old() {
    let disk = Disk::new(image(32, EXT4, &[]), &options(None));
    let ino = disk.create("file");
    let (old, new) = (pattern(1, LARGE), pattern(2, LARGE));
    old.chunks(LARGE / 4).enumerate().for_each(|(n, part)| {
        disk.write(ino, (n * LARGE / 4) as u64, part).unwrap();
    });
    disk.fsync(ino);
    disk.fail(Ops::WRITE, When::Nth(1));

    assert_eq!(disk.write(ino, 0, &new), Ok(LARGE));

    assert!(read(&disk.fs, ino) == new);
    disk.fsync(ino);
    assert!(recovered(disk.power_cut(), |fs| read(fs, ino_of(fs))) == new);
    disk.check();
}

#[test]
fn a_large_write_to_a_full_disk_writes_what_fits() {
    for args in [EXT4, &["-t", "ext2", "-b", "1024"]] {
        let disk = Disk::new(image(16, args, &[]), &options(None));
        let ino = disk.create("file");
        let data = pattern(5, 1 << 20);
        let mut model = Vec::new();
        let error = loop {
            match disk.write(ino, model.len() as u64, &data) {
                Ok(done) => model.extend_from_slice(&data[..done]),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Errno::ENOSPC);
        assert!(model.len() > 6 << 20, "only {} bytes fitted", model.len());
        disk.fsync(ino);
        assert!(read(&disk.fs, ino) == model);
        disk.check();
    }
}
